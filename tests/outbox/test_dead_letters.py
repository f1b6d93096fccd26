"""Dead letters: what the receiver refused is kept, and can be given another chance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from segment_durable import outbox as outbox_module
from segment_durable.outbox import Outbox
from segment_durable.records import DeadLetter, Lease, Row
from segment_durable.testing.clock import FakeClock

from .workers import Worker


def leased(outbox: Outbox, count: int) -> Lease:
    for number in range(1, count + 1):
        outbox.put(b"%d" % number, number * 1000)
    lease = outbox.lease(count, 60)
    assert isinstance(lease, Lease)
    return lease


def bury(outbox: Outbox, lease: Lease, event_id: int, max_dead: int = 9) -> bool | None:
    return outbox.bury(lease, event_id, status=400, code="bad", answer="no", max_dead=max_dead)


def test_a_buried_event_is_a_dead_letter_with_what_the_receiver_said(outbox: Outbox, clock: FakeClock) -> None:
    lease = leased(outbox, 1)
    assert outbox.bury(lease, 1, status=413, code="too_large", answer="é", max_dead=5) is True
    now = int(clock.time() * 1000) / 1000
    assert outbox.dead_letters() == [DeadLetter(1, 1.0, now, 413, "too_large", "é", b"1")]
    stats = outbox.stats()
    assert (stats.pending, stats.leased, stats.dead, stats.delivered, stats.balanced) == (0, 0, 1, 0, True)


def test_burying_the_first_of_a_lease_keeps_the_rest_leased(outbox: Outbox) -> None:
    lease = leased(outbox, 3)
    assert bury(outbox, lease, 1) is True
    assert outbox.stats().leased == 2
    assert outbox.ack(lease, 3) == 2


def test_burying_the_last_of_a_lease_ends_it(outbox: Outbox) -> None:
    lease = leased(outbox, 2)
    outbox.ack(lease, 1)
    assert bury(outbox, lease, 2) is True
    assert outbox.release(lease) is False
    assert outbox.stats().leased == 0


def test_nothing_more_is_buried_when_the_dead_letters_are_full(outbox: Outbox) -> None:
    lease = leased(outbox, 3)
    assert bury(outbox, lease, 1, max_dead=1) is True
    assert bury(outbox, lease, 2, max_dead=1) is False
    assert [letter.id for letter in outbox.dead_letters()] == [1]
    assert [row.id for row in outbox.rows(0, 9)] == [2, 3]
    assert outbox.ack(lease, 3) == 2, "the lease is still there"


def test_requeued_letters_make_room_for_new_ones(outbox: Outbox) -> None:
    lease = leased(outbox, 2)
    bury(outbox, lease, 1, max_dead=1)
    assert outbox.requeue() == 1
    assert bury(outbox, lease, 2, max_dead=1) is True


def test_a_requeued_letter_gets_a_new_id_behind_all_and_keeps_its_time(outbox: Outbox, clock: FakeClock) -> None:
    lease = leased(outbox, 2)
    bury(outbox, lease, 1)
    outbox.release(lease)
    assert outbox.requeue() == 1
    assert outbox.rows(0, 9) == [Row(2, b"2"), Row(3, b"1")]
    with outbox.db.read() as connection:
        assert connection.execute("SELECT appended_at FROM event WHERE id = 3").fetchone() == (1000,)
    assert outbox.dead_letters() == []


def test_requeue_takes_the_named_ones_only_and_each_once(outbox: Outbox) -> None:
    lease = leased(outbox, 4)
    for each in range(1, 5):
        bury(outbox, lease, each)
    assert outbox.requeue([3, 99, 1, 3]) == 2
    assert [letter.id for letter in outbox.dead_letters()] == [2, 4]
    assert [row.body for row in outbox.rows(0, 99)] == [b"3", b"1"]
    assert outbox.requeue([]) == 0
    assert outbox.requeue([99]) == 0


@pytest.mark.parametrize("method", ["requeue", "erase_dead"])
def test_many_letters_are_moved_in_portions_between_which_others_may_write(
    outbox: Outbox, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = leased(outbox, 7)
    for each in range(1, 8):
        bury(outbox, lease, each)
    monkeypatch.setattr(outbox_module, "_DEAD_AT_ONCE", 3)
    write, transactions = outbox.db.write, 0

    def counted() -> Any:
        nonlocal transactions
        transactions += 1
        return write()

    monkeypatch.setattr(outbox.db, "write", counted)
    assert getattr(outbox, method)() == 7
    assert transactions == 3
    assert outbox.dead_letters() == []
    assert len(outbox.rows(0, 99)) == (7 if method == "requeue" else 0)
    assert outbox.stats().balanced


def test_requeueing_does_not_count_an_event_as_accepted_again(outbox: Outbox) -> None:
    lease = leased(outbox, 3)
    for each in range(1, 4):
        bury(outbox, lease, each)
    outbox.requeue()
    again = outbox.lease(9, 60)
    assert isinstance(again, Lease)
    bury(outbox, again, again.first)
    outbox.ack(again, again.last)
    stats = outbox.stats()
    assert (stats.accepted, stats.delivered, stats.dead, stats.pending) == (3, 2, 1, 0)
    assert stats.balanced


def test_dead_letters_are_listed_oldest_first_up_to_a_limit(outbox: Outbox) -> None:
    lease = leased(outbox, 3)
    for each in range(1, 4):
        bury(outbox, lease, each)
    assert [letter.id for letter in outbox.dead_letters(2)] == [1, 2]
    assert outbox.dead_letters(0) == []


def test_dead_letters_survive_that_the_process_is_killed(worker: Worker, outbox_factory: Callable[..., Outbox]) -> None:
    worker.call("put", b"x", 1)
    lease = worker.call("lease", 1, 60)
    worker.call("bury", lease, 1, status=400, code="c", answer="a", max_dead=1)
    worker.kill()
    assert [letter.body for letter in outbox_factory().dead_letters()] == [b"x"]


def test_two_processes_that_requeue_at_the_same_time_move_each_letter_once(
    outbox: Outbox, worker_factory: Callable[..., Worker]
) -> None:
    lease = leased(outbox, 40)
    for each in range(1, 41):
        bury(outbox, lease, each, max_dead=100)
    workers = [worker_factory() for _ in range(2)]
    for worker in workers:
        worker.send("requeue")
    assert sum(worker.receive() for worker in workers) == 40
    assert len({row.body for row in outbox.rows(0, 999)}) == outbox.pending() == 40


# -- erased by a person


def test_what_is_erased_is_gone_and_in_the_books(outbox: Outbox) -> None:
    lease = leased(outbox, 3)
    bury(outbox, lease, 1)
    bury(outbox, lease, 2)
    assert outbox.erase_dead([2, 7]) == 1
    assert [letter.id for letter in outbox.dead_letters()] == [1]
    assert outbox.erase_dead() == 1
    outbox.release(lease)
    assert outbox.erase() == 1
    stats = outbox.stats()
    assert (stats.accepted, stats.erased, stats.pending, stats.dead, stats.balanced) == (3, 3, 0, 0, True)
    assert outbox.put(b"x", 1)
    assert [row.id for row in outbox.rows(0, 99)] == [4], "ids are not used again"


def test_what_is_on_its_way_is_not_erased(outbox: Outbox) -> None:
    for number in range(1, 11):
        outbox.put(b"%d" % number, 1)
    lease = outbox.lease(4, 60)
    assert isinstance(lease, Lease)
    assert outbox.erase([4, 5]) == 1
    assert outbox.erase() == 5
    assert [row.id for row in outbox.rows(0, 99)] == [1, 2, 3, 4]
    assert outbox.ack(lease, 4) == 4
    assert outbox.stats().balanced


def test_a_large_backlog_is_erased_in_portions(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segment_durable.outbox._ERASED_AT_ONCE", 4)
    for number in range(1, 11):
        outbox.put(b"%d" % number, 1)
    lease = outbox.lease(2, 60)
    assert isinstance(lease, Lease)
    assert outbox.erase() == 8
    assert outbox.stats().pending == 2


def test_an_erased_gap_is_no_hindrance_to_delivery(outbox: Outbox) -> None:
    for number in range(1, 8):
        outbox.put(b"%d" % number, 1)
    assert outbox.erase([3, 4, 7]) == 3
    lease = outbox.lease(5, 60)
    assert isinstance(lease, Lease)
    assert (lease.first, lease.last) == (1, 5)
    assert outbox.joined(1, 5, 9) == (3, 1, 5, b"1,2,5")
    assert outbox.ack(lease, 5) == 3
    assert outbox.pending() == 1
    assert outbox.stats().balanced
