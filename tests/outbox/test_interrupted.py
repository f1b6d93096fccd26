"""A signal handler that raises, as a time limit's does: wherever it strikes, nothing stays taken, and nothing open."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from segment_durable import intake
from segment_durable.errors import OutboxBusy
from segment_durable.outbox import Outbox
from segment_durable.records import Backoff, Lease

from .common import Interruption, becomes, bodies, in_its_own_thread
from .workers import Worker


class TimeLimit(TimeoutError):
    """Of the kind that is an OSError, too, as many handlers raise it."""


PROBE = """
import fcntl, os, sys
for path in sys.stdin:
    fd = os.open(path.rstrip("\\n"), os.O_RDWR)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 2, 0)  # and the mark of who waits for it
        found = "free"
    except OSError:
        found = "locked"
    finally:
        os.close(fd)  # first: whoever is told must not find it locked by this process
    print(found, flush=True)
"""


class Probe:
    """Another process, which can tell whether the kernel has the writer lock as taken."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def sees(self, outbox: Outbox) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(outbox.db.folder / "outbox.lock", file=self._process.stdin, flush=True)
        return self._process.stdout.readline().strip()


@pytest.fixture(scope="module")
def probe() -> Iterator[Probe]:
    pytest.importorskip("fcntl")
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", PROBE], stdin=pipe, stdout=pipe, text=True) as process:
        yield Probe(process)
        assert process.stdin is not None
        process.stdin.close()


def strike() -> None:
    raise TimeLimit


def leased(outbox: Outbox) -> Lease:
    outbox.put(b"to be leased", 1)
    lease = outbox.lease(10, 60, max_leases=1 << 30)
    assert isinstance(lease, Lease)
    return lease


def dead_letter(outbox: Outbox) -> int:
    lease = leased(outbox)
    assert outbox.bury(lease, lease.first, status=400, code="http_400", answer="", max_dead=1 << 30)
    outbox.release(lease)
    return lease.first


# What is done before, and what is interrupted.
CALLS: dict[str, tuple[Callable[[Outbox], Any], Callable[[Outbox, Any], object]]] = {
    "put": (lambda outbox: None, lambda outbox, _: outbox.put(b"interrupted", 1)),
    "lease": (lambda outbox: outbox.put(b"waits", 1), lambda outbox, _: outbox.lease(10, 60)),
    "ack": (leased, lambda outbox, lease: outbox.ack(lease, lease.last)),
    "release": (leased, lambda outbox, lease: outbox.release(lease)),
    "fail": (leased, lambda outbox, lease: outbox.fail(lease, becomes(Backoff(failures=1, not_before=1.0)))),
    "extend": (leased, lambda outbox, lease: outbox.extend(lease, 60)),
    "bury": (
        leased,
        lambda outbox, lease: outbox.bury(lease, lease.first, status=400, code="", answer="", max_dead=1 << 30),
    ),
    "requeue": (dead_letter, lambda outbox, _: outbox.requeue()),
    "erase_dead": (dead_letter, lambda outbox, _: outbox.erase_dead()),
    "erase": (lambda outbox: outbox.put(b"waits", 1), lambda outbox, _: outbox.erase()),
    "expire": (lambda outbox: outbox.put(b"old", 1), lambda outbox, _: outbox.expire(1e9)),
    "rows": (leased, lambda outbox, lease: outbox.rows(lease.first, lease.last)),
    "joined": (leased, lambda outbox, lease: outbox.joined(lease.first, lease.last, 100)),
    "first_id": (lambda outbox: None, lambda outbox, _: outbox.first_id()),
    "last_id": (lambda outbox: None, lambda outbox, _: outbox.last_id()),
    "stats": (lambda outbox: None, lambda outbox, _: outbox.stats()),
    "dead_letters": (dead_letter, lambda outbox, _: outbox.dead_letters()),
}


def check_that_nothing_is_taken(outbox: Outbox, probe: Probe, where: str) -> None:
    connections, lock = outbox.db.connections, outbox.db.lock
    assert connections.is_outermost(), where
    assert (lock.depth, lock._has_file, lock._is_next) == (0, False, False), where
    assert probe.sees(outbox) == "free", where
    for connection in (connections._connection, connections._reading):
        assert connection is None or not connection.in_transaction, where
    answers: list[object] = []

    def use() -> None:  # in another thread, for this one has reentrant locks
        try:
            assert lock._gate.acquire(blocking=False)
            lock._gate.release()
            assert lock.mutex.acquire(blocking=False)
            lock.mutex.release()
            answers.append(outbox.put(b"afterwards", 1) and outbox.first_id() is not None)
        except BaseException as problem:
            answers.append(problem)

    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    thread.join(30)
    assert answers == [True], where


@pytest.mark.timeout(120)
@in_its_own_thread
def test_an_exception_from_a_signal_handler_while_another_process_writes_leaves_nothing_taken(
    outbox: Outbox, worker: Worker, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor the mark that this one waits."""
    naps = 0

    def nap(_: float) -> None:
        nonlocal naps
        naps += 1
        if naps == 43:  # that it waits is marked at the fortieth
            worker.call("release_writer_lock")

    monkeypatch.setattr("segment_durable.locks.time.sleep", nap)
    places = 0
    while True:
        naps = 0
        worker.call("hold_writer_lock")
        within = ("contextlib",)
        with contextlib.suppress(TimeLimit), Interruption(places, strike, checked=True, within=within) as interruption:
            outbox.put(b"x", 1)
        if naps < 43:
            worker.call("release_writer_lock")
        if not interruption.happened:
            break
        check_that_nothing_is_taken(outbox, probe, f"at place {places}")
        places += 1
    assert places > 100


@pytest.mark.timeout(120)
@pytest.mark.parametrize("full", [False, True], ids=["normal", "full"])
@pytest.mark.parametrize("name", CALLS)
@in_its_own_thread
def test_an_exception_from_a_signal_handler_at_any_place_leaves_nothing_taken(
    outbox_factory: Callable[..., Outbox], probe: Probe, name: str, full: bool
) -> None:
    outbox = outbox_factory(full=full)
    prepare, call = CALLS[name]
    places = 0
    while True:
        with outbox.db.write() as connection:
            connection.execute("DELETE FROM lease")
        outbox.erase()
        outbox.erase_dead()
        prepared = prepare(outbox)
        with contextlib.suppress(TimeLimit), Interruption(places, strike, checked=True) as interruption:
            call(outbox, prepared)
        if not interruption.happened:
            break
        check_that_nothing_is_taken(outbox, probe, f"{name} at place {places}")
        places += 1
    assert places > 10
    assert outbox.stats().pending == len(bodies(outbox))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("full", [False, True], ids=["normal", "full"])
@in_its_own_thread
def test_an_exception_from_a_signal_handler_in_a_put_that_waits_leaves_nothing_taken(
    outbox_factory: Callable[..., Outbox], probe: Probe, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """The other way through a put: behind a thread that has the lock, or with one that waits for its commit."""
    monkeypatch.setattr(intake, "WRITE_TIMEOUT", 100)
    outbox = outbox_factory(full=full)
    for places in range(1 << 30):
        entered, leave = threading.Event(), threading.Event()
        answers: list[object] = []

        def stay(entered: threading.Event = entered, leave: threading.Event = leave) -> None:
            with outbox.db.connections.writer():
                entered.set()
                leave.wait(30)

        def put(answers: list[object] = answers) -> None:
            answers.append(outbox.put(b"of a thread", 1))

        threads = [threading.Thread(target=each, daemon=True) for each in (stay, put)]
        for thread in threads:
            thread.start()
        entered.wait(30)
        while not outbox._intake._waiting:
            threading.Event().wait(0.001)

        def let_go(leave: threading.Event = leave) -> None:
            leave.set()
            raise TimeLimit

        timer = threading.Timer(0.01, leave.set)  # for what comes after the wait
        timer.start()
        with contextlib.suppress(TimeLimit), Interruption(places, let_go, checked=True) as interruption:
            outbox.put(b"interrupted", 1)
        for thread in (*threads, timer):
            thread.join(30)
        assert answers == [True], f"at place {places}"
        if not interruption.happened:
            break
        check_that_nothing_is_taken(outbox, probe, f"at place {places}")
    assert places > 10


@pytest.mark.timeout(120)
@pytest.mark.parametrize("full", [False, True], ids=["normal", "full"])
@pytest.mark.parametrize("raises", [True, False], ids=["raises", "puts"])
@in_its_own_thread
def test_a_signal_handler_in_the_thread_that_commits_for_others_refuses_no_put_of_theirs(
    outbox_factory: Callable[..., Outbox], probe: Probe, monkeypatch: pytest.MonkeyPatch, full: bool, raises: bool
) -> None:
    """Their callers would send them again, though they may have been committed.  Nor does one wait for nothing."""
    monkeypatch.setattr(intake, "WRITE_TIMEOUT", 100)
    outbox = outbox_factory(full=full)
    waiting = outbox._intake._waiting
    together = 0
    for places in range(1 << 30):
        entered, over = threading.Event(), threading.Event()
        answers: list[object] = []
        within: list[bool] = []

        def handle(within: list[bool] = within) -> None:
            if raises:
                raise TimeLimit
            with contextlib.suppress(OutboxBusy):
                within.append(outbox.put(b"of the handler", 1))

        def until(count: int, over: threading.Event = over) -> bool:
            while len(waiting) < count and not over.is_set():
                over.wait(0.001)
            return len(waiting) >= count

        def put(answers: list[object] = answers) -> None:
            try:
                answers.append(outbox.put(b"of a thread", 1))
            except Exception as problem:
                answers.append(problem)

        def stay(entered: threading.Event = entered) -> None:
            other = threading.Thread(target=put, daemon=True)
            with outbox.db.connections.writer():
                entered.set()
                if until(1):
                    other.start()
                    until(2)
            if other.ident is not None:
                other.join(30)

        stays = threading.Thread(target=stay, daemon=True)
        stays.start()
        assert entered.wait(30)
        with contextlib.suppress(TimeLimit), Interruption(places, handle, checked=True) as interruption:
            outbox.put(b"interrupted", 1)
        over.set()
        stays.join(30)
        together += len(answers)
        assert answers in ([], [True]), f"at place {places}"
        stored = bodies(outbox)
        assert stored.count(b"of a thread") == len(answers), f"at place {places}"
        assert stored.count(b"of the handler") == len(within), f"at place {places}"
        assert stored.count(b"interrupted") == 1 or (raises and b"interrupted" not in stored), f"at place {places}"
        if not interruption.happened:
            break
        check_that_nothing_is_taken(outbox, probe, f"at place {places}")
        outbox.erase()
    assert together > 10


# -- a stack that is nearly used up, as by a recursion that tracks in each frame, and catches what ends it


def deepest() -> int:
    """How often a function can call itself from here, until nothing can be called any more."""

    def descend(depth: int) -> int:
        try:
            return descend(depth + 1)
        except RecursionError:
            return depth

    return descend(0)


def with_room(room: int, call: Callable[[], object]) -> bool:
    """Whether `call` succeeds where so many calls can be nested below it; what else it raises is raised."""

    def descend(depth: int) -> None:
        if depth > 0:
            descend(depth - 1)
        else:
            call()

    depth = deepest() - room
    assert depth > 0
    try:
        descend(depth)
    except RecursionError:
        return False
    return True


@pytest.mark.timeout(120)
@pytest.mark.parametrize("full", [False, True], ids=["normal", "full"])
@pytest.mark.parametrize("name", CALLS)
@in_its_own_thread
def test_a_recursion_error_at_any_depth_leaves_nothing_taken(
    outbox_factory: Callable[..., Outbox], probe: Probe, name: str, full: bool
) -> None:
    outbox = outbox_factory(full=full)
    prepare, call = CALLS[name]
    for room in range(200):
        with outbox.db.write() as connection:
            connection.execute("DELETE FROM lease")
        outbox.erase()
        outbox.erase_dead()
        prepared = prepare(outbox)
        is_done = with_room(room, partial(call, outbox, prepared))
        check_that_nothing_is_taken(outbox, probe, f"{name} with room for {room} calls")
        if is_done and room > 50:
            break
    assert is_done
    assert outbox.stats().pending == len(bodies(outbox))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("full", [False, True], ids=["normal", "full"])
@in_its_own_thread
def test_a_recursion_error_at_any_depth_beside_other_threads_hangs_and_loses_nothing(
    outbox_factory: Callable[..., Outbox], probe: Probe, full: bool
) -> None:
    outbox = outbox_factory(full=full)
    waiting = outbox._intake._waiting
    for room in range(80):
        entered, over = threading.Event(), threading.Event()
        answers: list[object] = []

        def put(answers: list[object] = answers) -> None:
            try:
                answers.append(outbox.put(b"of a thread", 1))
            except Exception as problem:
                answers.append(problem)

        def stay(entered: threading.Event = entered, over: threading.Event = over) -> None:
            others = [threading.Thread(target=put, daemon=True) for _ in range(3)]
            with outbox.db.connections.writer():
                entered.set()
                while not waiting and not over.is_set():
                    over.wait(0.001)
                for count, other in enumerate(others, len(waiting) + 1):
                    other.start()
                    while len(waiting) < count:
                        over.wait(0.001)
            for other in others:
                other.join(30)

        stays = threading.Thread(target=stay, daemon=True)
        stays.start()
        assert entered.wait(30)
        is_done = with_room(room, lambda: outbox.put(b"of a deep call", 1))
        over.set()
        stays.join(60)
        where = f"with room for {room} calls"
        assert answers == [True] * 3, where
        stored = bodies(outbox)
        assert stored.count(b"of a thread") == 3, where
        assert stored.count(b"of a deep call") == is_done, where
        check_that_nothing_is_taken(outbox, probe, where)
        outbox.erase()
    assert is_done
