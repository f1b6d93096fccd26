"""Threads that commit together where each commit waits for the disk: one leads, and the others wait for it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from segment_durable import intake
from segment_durable.errors import OutboxBusy, OutboxError, StorageError
from segment_durable.outbox import Outbox

from .common import Interruption, Remembering, bodies, wait_until


@pytest.fixture
def full(outbox_factory: Callable[..., Outbox]) -> Iterator[Outbox]:
    outbox = outbox_factory(full=True)
    outbox._intake._waiting = waiting = Remembering()
    yield outbox
    for put in waiting.all:
        put.error = put.error or StorageError("the test is over")
        put.wake()


def start_puts(outbox: Outbox, bodies: Sequence[bytes], limit: int = 0) -> tuple[list[threading.Thread], list[object]]:
    """Threads that put these, and wait in that order for a commit of another; and what they will be told."""
    answers: list[object] = [None] * len(bodies)

    def put(number: int) -> None:
        try:
            answers[number] = outbox.put(bodies[number], 1, limit)
        except OutboxError as problem:
            answers[number] = problem

    threads = []
    before = len(outbox._intake._waiting)
    for number in range(len(bodies)):
        threads.append(threading.Thread(target=put, args=(number,), daemon=True))
        threads[-1].start()
        wait_until(lambda: len(outbox._intake._waiting) == before + len(threads))
    return threads, answers


def join(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.join(3)  # less than `WRITE_TIMEOUT`: nobody may have been forgotten until that
        assert not thread.is_alive(), "a put hangs"


@pytest.mark.parametrize("count", [2, 4, 5, 16, 17, 64])
def test_a_group_is_one_statement_and_keeps_the_order_in_which_its_threads_came(full: Outbox, count: int) -> None:
    commits: list[str] = []
    wanted = [b"%d" % number for number in range(count)]
    with full.db.write() as connection:
        pass
    full.db.lock.mutex.acquire()
    try:
        threads, answers = start_puts(full, wanted)
        connection.set_trace_callback(commits.append)
    finally:
        full.db.lock.mutex.release()
    join(threads)
    connection.set_trace_callback(None)
    assert answers == [True] * count
    assert bodies(full) == wanted
    assert [row.id for row in full.rows(1, count)] == list(range(1, count + 1))
    assert len(commits) == 1


def test_puts_of_different_limits_that_wait_together_are_each_judged_by_their_own(full: Outbox) -> None:
    full.db.lock.mutex.acquire()
    try:
        first, of_three = start_puts(full, [b"a", b"b", b"c", b"d"], 3)
        second, of_five = start_puts(full, [b"e", b"f", b"g"], 5)
        third, of_any = start_puts(full, [b"h", b"i"])
    finally:
        full.db.lock.mutex.release()
    join([*first, *second, *third])
    assert (of_three, of_five, of_any) == ([True, True, True, False], [True, True, False], [True, True])
    assert bodies(full) == [b"a", b"b", b"c", b"e", b"f", b"h", b"i"]
    assert full.last_id() == 7


def test_a_leader_leaves_the_rest_to_another_thread_after_some_groups(
    full: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own caller is not to wait for everybody else's events."""
    leaders: list[int] = []
    put_group = full._intake._put_group

    def remembering() -> int:
        leaders.append(threading.get_ident())
        return put_group()

    monkeypatch.setattr(full._intake, "_put_group", remembering)
    threads = []
    full.db.lock.mutex.acquire()
    try:
        for number in range(12):  # of different limits, so that each is a group
            threads += start_puts(full, [b"%d" % number], 100 + number)[0]
    finally:
        full.db.lock.mutex.release()
    join(threads)
    assert bodies(full) == [b"%d" % number for number in range(12)]
    assert len(leaders) == 12
    assert max(leaders.count(each) for each in leaders) == intake._MAX_TURN


@pytest.mark.parametrize("place", ["acquire_mutex", "wait"])
def test_a_thread_that_is_interrupted_while_it_waits_stands_in_nobodys_way(
    full: Outbox, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Ctrl-C, or a server's time limit: nobody is behind its put any more, which may be the first of all."""

    def interrupt(original: Callable[..., bool]) -> Callable[..., bool]:
        def interrupted(*args: Any) -> bool:
            if threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            return original(*args)

        return interrupted

    entered, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with full.db.write():
            entered.set()
            leave.wait(30)

    sender = threading.Thread(target=stay, daemon=True)
    sender.start()
    assert entered.wait(30)
    owner: Any = full.db.lock if place == "acquire_mutex" else intake._Put
    ahead: list[threading.Thread] = []
    if place == "wait":
        ahead = start_puts(full, [b"of the first"])[0]
    with monkeypatch.context() as patch:
        patch.setattr(owner, place, interrupt(getattr(owner, place)))
        with pytest.raises(KeyboardInterrupt):
            full.put(b"interrupted", 1)
        behind, answers = start_puts(full, [b"of a thread", b"of another"])
    leave.set()
    join([sender, *ahead, *behind])
    assert answers == [True, True]
    assert bodies(full) == [b"of the first"] * len(ahead) + [b"of a thread", b"of another"]
    assert not full._intake._waiting


def test_a_signal_handler_that_puts_at_any_place_of_a_leaders_turn_costs_no_thread_its_event(full: Outbox) -> None:
    at = 0
    while True:

        def handle() -> None:
            with contextlib.suppress(OutboxError):
                full.put(b"of the handler", 1)

        full.db.lock.mutex.acquire()
        try:
            threads, answers = start_puts(full, [b"of a thread"] * 2)
            with Interruption(at, handle) as interruption:
                mine = full.put(b"of this thread", 1)
        finally:
            full.db.lock.mutex.release()
        join(threads)
        assert (mine, answers) == (True, [True, True]), f"at place {at}"
        if not interruption.happened:
            break
        at += 1
    assert at > 50
    found = bodies(full)
    assert found.count(b"of a thread") == 2 * (at + 1)
    assert found.count(b"of this thread") == at + 1


def test_many_threads_that_each_wait_for_the_disk_all_get_their_turn(full: Outbox) -> None:
    def work(who: int) -> None:
        for number in range(50):
            assert full.put(b"%d.%d" % (who, number), 1)

    threads = [threading.Thread(target=work, args=(who,), daemon=True) for who in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    found = bodies(full)
    for who in range(16):
        mine = [body for body in found if body.startswith(b"%d." % who)]
        assert mine == [b"%d.%d" % (who, number) for number in range(50)]
    assert not full._intake._waiting
    assert not full._intake._done


@pytest.mark.parametrize("synchronous", ["NORMAL", "FULL"])
def test_a_signal_handler_within_a_transaction_is_told_so_at_once_and_costs_those_who_wait_nothing(
    outbox_factory: Callable[..., Outbox], synchronous: str
) -> None:
    outbox = outbox_factory(full=synchronous == "FULL")
    with outbox.db.write():
        threads, answers = start_puts(outbox, [b"of a thread", b"of another"])
        with pytest.raises(OutboxBusy, match="signal handler"):
            outbox.put(b"of the handler", 1)
        assert len(outbox._intake._waiting) == 2
    join(threads)
    assert answers == [True, True]
    assert bodies(outbox) == [b"of a thread", b"of another"]
