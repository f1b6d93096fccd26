"""Writing beside others: the writer lock, checkpoints, syncs, forks and signal handlers."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from segment_durable import connections, space, wal
from segment_durable.errors import OutboxBusy, OutboxError, StorageError
from segment_durable.outbox import Outbox
from segment_durable.records import Lease
from segment_durable.testing.clock import FakeClock

from .common import Interruption, Remembering, bodies, wait_until
from .workers import Worker, work

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
MIB = 1 << 20


# -- the writer lock


def test_nobody_writes_while_another_process_has_the_writer_lock(
    outbox: Outbox, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox.put(b"x", 1)
    worker.call("hold_writer_lock")
    for module in ("connections", "intake"):
        monkeypatch.setattr(f"segment_durable.{module}.WRITE_TIMEOUT", 0.05)
    for write in (
        lambda: outbox.put(b"y", 1),
        lambda: outbox.lease(1, 60),
        lambda: outbox.requeue([1]),
        lambda: outbox.db.wal.checkpoint(),
        lambda: outbox.db.wal.checkpoint(truncate=True),
        outbox.db.space.give_back,
    ):
        with pytest.raises(OutboxBusy):
            write()
    assert outbox.pending() == 1, "reading needs no lock"
    worker.call("release_writer_lock")
    assert outbox.put(b"y", 1)
    assert outbox.db.wal.checkpoint()


def test_reading_does_not_wait_for_a_thread_that_writes(outbox: Outbox) -> None:
    outbox.put(b"x", 1)
    assert outbox.pending() == 1
    seen: list[int] = []
    with outbox.db.write() as connection:
        connection.execute("DELETE FROM event")
        thread = threading.Thread(target=lambda: seen.append(outbox.pending()))
        thread.start()
        thread.join(30)
        assert seen == [1], "and it sees what is committed"


class Waiter:
    """A thread that wants the writer lock, which this thread has."""

    def __init__(self, outbox: Outbox) -> None:
        self.lock = outbox.db.lock
        self.seen: list[int] = []
        self.may_end = threading.Event()
        self._outbox = outbox
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        wait_until(self._is_next)

    def _is_next(self) -> bool:
        if not self.lock.acquire_unless_busy(1):
            return True
        self.lock.release()
        return False

    def _run(self) -> None:
        with self._outbox.db.write():
            self.seen.append(self._outbox.pending())
            assert self.may_end.wait(30)


def test_a_thread_that_waits_comes_before_the_next_put_of_a_busy_caller(outbox: Outbox) -> None:
    outbox.db.lock.acquire(1)
    waiter = Waiter(outbox)
    caller = threading.Thread(target=lambda: outbox.put(b"x", 1))
    caller.start()
    outbox.db.lock.release()
    assert not outbox.db.lock.acquire_unless_busy(1), "it is the other's turn, whether it has woken up or not"
    wait_until(lambda: bool(waiter.seen))
    assert outbox.pending() == 0, "the put, too, waits until it is done"
    waiter.may_end.set()
    waiter.thread.join(30)
    caller.join(30)
    assert outbox.pending() == 1
    assert outbox.db.lock.acquire_unless_busy(1), "and then it is free again"
    outbox.db.lock.release()


def test_a_put_within_a_call_of_the_thread_that_others_wait_for_goes_through(outbox: Outbox) -> None:
    """As a signal handler's does, in the middle of a put."""
    outbox.db.lock.acquire(1)
    waiter = Waiter(outbox)
    assert outbox.put(b"x", 1)
    outbox.db.lock.release()
    waiter.may_end.set()
    waiter.thread.join(30)
    assert waiter.seen == [1]


def test_a_thread_that_gives_up_waiting_stands_in_nobodys_way(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[OutboxBusy] = []

    def wait() -> None:
        try:
            outbox.db.lock.acquire(0.01)
        except OutboxBusy as problem:
            refused.append(problem)

    outbox.db.lock.acquire(1)
    threads = [threading.Thread(target=wait) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(refused) == 2
    outbox.db.lock.release()
    assert outbox.put(b"x", 1)
    assert outbox.db.lock.acquire_unless_busy(1)
    outbox.db.lock.release()


def test_who_waits_for_the_lock_is_given_way_to_for_as_long_as_it_comes(
    outbox: Outbox, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one processor for both the other would find it taken at each look; but it may be frozen just then."""
    lock, courtesy, now = outbox.db.lock, outbox._intake._courtesy, [100.0]
    monkeypatch.setattr("segment_durable.courtesy.time", SimpleNamespace(monotonic=lambda: now[0]))
    lock.acquire(1)
    assert not courtesy.is_due()
    worker.send("put", b"x", 1)
    wait_until(lock.is_waited_for)
    assert [courtesy.is_due() for _ in range(4)] == [True, True, True, False]
    pauses = []
    for _ in range(8):
        begun = now[0]
        while not courtesy.is_due():
            now[0] += 0.05
        pauses.append(now[0] - begun)
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0], abs=0.06)
    lock.release()
    assert worker.receive() is True
    lock.acquire(1)
    assert not courtesy.is_due()
    worker.send("put", b"x", 1)
    wait_until(lock.is_waited_for)
    assert [courtesy.is_due() for _ in range(4)] == [True, True, True, False], "from the beginning"
    lock.release()
    assert worker.receive() is True


def test_who_comes_is_given_way_to_again(outbox: Outbox, worker_factory: Callable[..., Worker]) -> None:
    """One of several: the next of them is waiting by then."""
    lock, courtesy = outbox.db.lock, outbox._intake._courtesy
    first, *others = (worker_factory() for _ in range(4))
    for each in others:
        first.call("put", b"x", 1)
        lock.acquire(1)
        each.send("put", b"x", 1)
        wait_until(lock.is_waited_for)
        assert courtesy.is_due()
        lock.release()
        assert each.receive() is True


@pytest.mark.parametrize("full", [False, True])
def test_way_is_given_after_each_turn_that_waited_for_the_disk(
    outbox_factory: Callable[..., Outbox], monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    outbox = outbox_factory(full=full)
    lock, given = outbox.db.lock, list[bool]()
    monkeypatch.setattr(outbox._intake._courtesy, "is_due", lambda: True)
    monkeypatch.setattr(lock, "give_way", lambda: given.append(lock._has_file))
    outbox.put(b"1", 1)
    assert given == [False] * full
    lock.acquire(1)
    threads = [threading.Thread(target=outbox.put, args=(b"2", 1)) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(outbox._intake._waiting) == len(threads))
    lock.release()
    for thread in threads:
        thread.join(30)
    assert outbox.pending() == 4
    assert set(given) == ({False} if full else set())


def test_a_waiting_writer_goes_on_when_the_lock_is_given_back(outbox: Outbox, worker: Worker) -> None:
    outbox.db.lock.acquire(5)
    worker.send("put", b"x", 1)
    assert outbox.pending() == 0
    assert not worker.has_answered()
    outbox.db.lock.release()
    assert worker.receive() is True
    assert bodies(outbox) == [b"x"]


def test_the_writer_lock_of_a_killed_process_is_free(outbox: Outbox, worker: Worker) -> None:
    worker.call("hold_writer_lock")
    worker.kill()
    assert outbox.put(b"x", 1)


def test_a_process_that_is_killed_while_it_writes_leaves_whole_transactions(
    outbox: Outbox, worker_factory: Callable[..., Worker], tmp_path: Path
) -> None:
    diary = tmp_path / "diary"
    for number in range(3):
        diary.touch()
        before = diary.stat().st_size
        worker = worker_factory()
        worker.send("put_forever", os.fspath(diary), b"%d:" % number)
        wait_until(lambda: diary.stat().st_size > before + 300)  # noqa: B023
        worker.kill()
        assert outbox.put(b"after", 1)
    assert set(diary.read_bytes().split()) <= set(bodies(outbox))
    assert outbox.stats().balanced


def test_no_writer_starves_while_others_write_without_a_pause(
    worker_factory: Callable[..., Worker], outbox: Outbox, tmp_path: Path
) -> None:
    """With SQLite's own way of waiting some do."""
    diaries = [tmp_path / f"diary-{number}" for number in range(4)]
    workers = [worker_factory() for _ in diaries]
    for number, (worker, diary) in enumerate(zip(workers, diaries)):
        diary.touch()
        worker.send("put_forever", os.fspath(diary), b"%d:" % number)
    wait_until(lambda: all(diary.stat().st_size > 500 for diary in diaries))
    for worker in workers:
        worker.kill()
    acknowledged = {line for diary in diaries for line in diary.read_bytes().split()}
    assert acknowledged <= set(bodies(outbox))


# -- checkpoints


def rows_in_the_database_file(folder: Path, elsewhere: Path) -> int:
    """What is there without the WAL."""
    shutil.copy(folder / "outbox.db", elsewhere)
    connection = sqlite3.connect(elsewhere)
    try:
        count: int = connection.execute("SELECT count(*) FROM event").fetchone()[0]
    except sqlite3.OperationalError:  # not even the table
        return 0
    finally:
        connection.close()
    return count


def test_a_checkpoint_moves_the_wal_into_the_database(outbox: Outbox, folder: Path, tmp_path: Path) -> None:
    for _ in range(20):
        outbox.put(b"x" * 1_000, 1)
    assert rows_in_the_database_file(folder, tmp_path / "before.db") == 0
    assert outbox.db.wal.checkpoint() is True
    assert rows_in_the_database_file(folder, tmp_path / "after.db") == 20
    assert outbox.db.wal.size() > 0


def test_a_truncating_checkpoint_gives_the_wals_space_back(outbox: Outbox) -> None:
    outbox.put(b"x" * 30_000, 1)
    assert outbox.db.wal.size() > 30_000
    assert outbox.db.wal.checkpoint(truncate=True) is True
    assert outbox.db.wal.size() == 0
    assert bodies(outbox) == [b"x" * 30_000]


def test_the_wal_is_written_over_after_a_checkpoint(outbox: Outbox) -> None:
    for _ in range(20):
        outbox.put(b"x" * 1_000, 1)
        outbox.db.wal.checkpoint()
    assert outbox.db.wal.size() < 40_000


def test_a_reader_stalls_a_checkpoint_but_no_writer(outbox: Outbox, worker: Worker) -> None:
    outbox.put(b"x", 1)
    assert worker.call("begin_reading") == 1
    assert outbox.put(b"y", 1)
    assert outbox.db.wal.checkpoint() is False
    assert outbox.put(b"z", 1)
    worker.call("end_reading")
    assert outbox.db.wal.checkpoint() is True


def test_a_truncating_checkpoint_does_not_wait_for_a_reader_with_the_lock_in_its_hand(
    outbox: Outbox, worker: Worker
) -> None:
    """Every put of the host would wait for as long as somebody looks at the outbox."""
    outbox.put(b"x", 1)
    worker.call("begin_reading")
    outbox.put(b"y", 1)
    began = time.monotonic()
    assert outbox.db.wal.checkpoint(truncate=True) is False
    assert time.monotonic() - began < connections.WRITE_TIMEOUT / 2
    worker.call("end_reading")
    assert outbox.db.wal.checkpoint(truncate=True) is True


def test_nothing_checkpoints_by_itself_at_a_commit(outbox: Outbox, folder: Path, tmp_path: Path) -> None:
    """SQLite would after 1,000 pages, whoever holds the writer lock."""
    for _ in range(150):
        outbox.put(b"x" * 16_000, 1)
    assert outbox.db.wal.size() > 1_200 * 2_048
    assert rows_in_the_database_file(folder, tmp_path / "copy.db") == 0


def test_a_checkpoint_is_due_after_so_many_bytes_of_puts(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wal, "CHECKPOINT_BYTES", MIB)
    assert not outbox.db.wal.needs_checkpoint
    for _ in range(40):
        outbox.put(b"x" * 30_000, 1)
    assert outbox.db.wal.needs_checkpoint
    outbox.db.wal.checkpoint()
    assert not outbox.db.wal.needs_checkpoint


def put_in_one_group(outbox: Outbox, count: int, body: bytes) -> None:
    outbox.db.lock.mutex.acquire()
    try:
        threads = [threading.Thread(target=outbox.put, args=(body, 1), daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(outbox._intake._waiting) == count)
    finally:
        outbox.db.lock.mutex.release()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_a_checkpoint_is_due_after_so_many_bytes_of_grouped_puts(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wal, "CHECKPOINT_BYTES", MIB)
    put_in_one_group(outbox, 80, b"x" * 30_000)
    assert outbox.db.wal.size() > 2 * MIB
    assert outbox.db.wal.needs_checkpoint


def test_a_checkpoint_is_due_after_a_transaction_that_wrote_much(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(80):
        outbox.put(b"x" * 30_000, 1)
    lease = outbox.lease(80, 60)
    assert isinstance(lease, Lease)
    for each in range(1, 81):
        outbox.bury(lease, each, status=400, code="c", answer="", max_dead=99)
    outbox.db.wal.checkpoint(truncate=True)
    monkeypatch.setattr(wal, "CHECKPOINT_BYTES", MIB)
    assert outbox.requeue() == 80
    assert outbox.db.wal.size() > 2 * MIB
    assert outbox.db.wal.needs_checkpoint


@pytest.mark.parametrize("together", [1, 20])
def test_where_nobody_makes_checkpoints_the_wal_has_a_bound_all_the_same(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    monkeypatch.setattr(wal, "OVERDUE_BYTES", MIB)
    for _ in range(200 // together):
        if together == 1:
            outbox.put(b"x" * 30_000, 1)
        else:
            put_in_one_group(outbox, together, b"x" * 30_000)
    assert outbox.pending() == 200
    assert outbox.db.wal.size() < 3 * MIB


@pytest.mark.parametrize("seconds", [0.0, 3600.0])
def test_space_comes_back_in_transactions_that_end_in_time(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Each gives at least one page back, and as many as the time allows."""
    monkeypatch.setattr(space, "_SHRINK_SECONDS", seconds)
    for _ in range(300):
        outbox.put(b"x" * 4_000, 1)
    outbox.db.wal.checkpoint(truncate=True)
    full = outbox.db.space.size_on_disk()
    lease = outbox.lease(300, 60)
    assert isinstance(lease, Lease)
    outbox.ack(lease, 300)
    (free,) = outbox.db.read_one("PRAGMA freelist_count")
    steps = 1
    while outbox.db.space.give_back()[1]:
        steps += 1
    assert free > 500
    assert steps == (1 if seconds else free)
    outbox.db.wal.checkpoint(truncate=True)
    assert outbox.db.space.size_on_disk() < full / 20
    assert outbox.put(b"y", 1)


# -- syncs


def test_a_put_is_unsynced_until_a_sync(outbox: Outbox, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []

    def sync(fd: int) -> None:
        synced.append(os.fstat(fd).st_ino)
        if os.name != "nt":
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.write(fd, b"printed")  # as to stdout, whose number it has if that was closed just before

    monkeypatch.setattr(wal, "sync_file", sync)
    outbox.put(b"x", 1)
    assert outbox.db.wal.is_unsynced
    outbox.db.wal.sync()
    assert not outbox.db.wal.is_unsynced
    assert synced == [(folder / "outbox.db-wal").stat().st_ino]
    outbox.put(b"y", 1)
    assert outbox.db.wal.is_unsynced


def test_the_wal_is_not_looked_at_after_each_put(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    real = wal.Wal._look

    def look(self: wal.Wal) -> None:
        nonlocal looks
        looks += 1
        real(self)

    monkeypatch.setattr(wal.Wal, "_look", look)
    puts = 3 * wal.LOOK_BYTES // wal._COMMIT_BYTES
    for _ in range(puts):
        assert outbox.put(b"x", 1)
    assert 3 <= looks <= 4


def test_with_full_nothing_is_ever_unsynced(outbox_factory: Callable[..., Outbox]) -> None:
    outbox = outbox_factory(full=True)
    outbox.put(b"x", 1)
    outbox.lease(1, 60)
    assert not outbox.db.wal.is_unsynced


@pytest.mark.parametrize("step", ["open", "sync"])
def test_a_sync_that_fails_is_a_storage_error_and_is_still_to_be_done(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    outbox.put(b"x", 1)
    with monkeypatch.context() as patch:
        if step == "open":
            patch.setattr(wal.os, "open", fail)
        else:
            patch.setattr(wal, "sync_file", fail)
        with pytest.raises(StorageError):
            outbox.db.wal.sync()
    assert outbox.db.wal.is_unsynced
    outbox.db.wal.sync()
    assert not outbox.db.wal.is_unsynced


def test_a_sync_takes_no_lock_from_sqlite_or_from_the_outbox(outbox: Outbox, worker: Worker) -> None:
    """A process that closes any descriptor of a file loses its POSIX locks on it."""
    outbox.put(b"x", 1)
    lease = outbox.lease(1, 3_600)
    assert isinstance(lease, Lease)
    outbox.db.wal.sync()
    assert not isinstance(worker.call("lease", 1, 60), Lease)
    worker.close()  # not the last: it must see this process's locks, and leave the WAL
    assert (outbox.db.folder / "outbox.db-wal").exists()
    assert outbox.ack(lease, 1) == 1


# -- fork


@pytest.fixture
def fork(implementation: str) -> Iterator[Callable[[], Worker]]:
    """Forks this process, as it is; the child is a worker that has opened nothing of its own."""
    made: list[Worker] = []

    def make() -> Worker:
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                ours.close()
                work(Connection(theirs.detach()))
                code = 0
            finally:
                os._exit(code)
        theirs.close()
        made.append(Worker(pid, Connection(ours.detach()), lambda pid: os.waitpid(pid, 0), implementation))
        return made[-1]

    yield make
    for worker in made:
        worker.close()


@needs_fork
def test_parent_and_child_both_put_after_a_fork_and_nothing_is_lost(
    outbox: Outbox, folder: Path, clock: FakeClock, fork: Callable[[], Worker], worker: Worker
) -> None:
    outbox.put(b"before", 1)
    assert outbox.db.connections.suspend()
    child = fork()
    outbox.db.connections.resume()
    child.call("forget_inherited")
    child.open(folder, clock)
    expected = [b"before"]
    for number in range(5):
        for put in (lambda body: child.call("put", body, 1), lambda body: outbox.put(body, 1)):
            expected.append(b"%d" % len(expected))
            assert put(expected[-1])
        if number == 2:
            worker.close()  # closes the database while both have it open: the WAL must stay
            assert (folder / "outbox.db-wal").exists()
    assert bodies(outbox) == expected
    assert child.call("pending") == len(expected)


@needs_fork
def test_the_wal_stays_under_a_child_when_its_parent_is_gone(
    worker: Worker, outbox_factory: Callable[..., Outbox], folder: Path, clock: FakeClock, fork: Callable[[], Worker]
) -> None:
    outbox = outbox_factory()
    outbox.put(b"a", 1)
    assert outbox.db.connections.suspend()
    child = fork()
    outbox.db.connections.resume()
    child.call("forget_inherited")
    child.open(folder, clock)
    assert child.call("put", b"b", 1)
    outbox.close()
    worker.close()
    wal = (folder / "outbox.db-wal").stat().st_ino
    assert child.call("put", b"c", 1)
    assert (folder / "outbox.db-wal").stat().st_ino == wal
    child.kill()
    assert bodies(outbox_factory()) == [b"a", b"b", b"c"]


@needs_fork
def test_a_fork_leaves_the_parents_lease_alive_and_gives_the_child_none_of_it(
    outbox: Outbox, folder: Path, clock: FakeClock, fork: Callable[[], Worker]
) -> None:
    outbox.put(b"x", 1)
    lease = outbox.lease(1, 3_600)
    assert isinstance(lease, Lease)
    assert outbox.db.connections.suspend()
    child = fork()
    outbox.db.connections.resume()
    child.call("forget_inherited")
    child.open(folder, clock)
    assert not isinstance(child.call("lease", 1, 60), Lease)
    child.close()
    assert outbox.ack(lease, 1) == 1


@needs_fork
def test_a_child_does_not_keep_a_dead_parents_lease_alive(
    worker_factory: Callable[..., Worker], outbox: Outbox, clock: FakeClock, folder: Path
) -> None:
    """With flock it would, for as long as the child lives."""
    outbox.put(b"x", 1)
    parent = worker_factory()
    parent.call("lease", 1, 3_600)
    parent.call("fork_a_child_that_stays")
    assert not isinstance(outbox.lease(1, 60), Lease)
    parent.kill()
    assert isinstance(outbox.lease(1, 60), Lease)


def test_other_threads_wait_while_the_outbox_is_suspended(outbox: Outbox) -> None:
    assert outbox.db.connections.suspend()
    thread = threading.Thread(target=outbox.put, args=(b"x", 1), daemon=True)
    thread.start()
    wait_until(lambda: len(outbox._intake._waiting) == 1)
    outbox.db.connections.resume()
    thread.join(30)
    assert bodies(outbox) == [b"x"]


def test_suspend_gives_up_on_a_thread_that_does_not_leave_and_changes_nothing(outbox: Outbox) -> None:
    entered, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with outbox.db.read():
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=stay, daemon=True)
    thread.start()
    assert entered.wait(30)
    assert outbox.db.connections.suspend(timeout=0.05) is False
    leave.set()
    thread.join(30)
    assert outbox.put(b"x", 1)
    assert outbox.db.connections.suspend(timeout=0.05) is True
    outbox.db.connections.resume()


# -- signal handlers


@pytest.fixture
def on_signal() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Sets what SIGUSR1 does in this test."""
    before = signal.getsignal(signal.SIGUSR1)
    yield lambda handle: signal.signal(signal.SIGUSR1, lambda *_: handle()) and None
    signal.signal(signal.SIGUSR1, before)


def test_a_signal_handler_may_put_while_its_thread_puts(
    outbox: Outbox, on_signal: Callable[[Callable[[], object]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_signal(lambda: outbox.put(b"of the handler", 1))
    write_one = outbox.db.write_one

    def interrupted(*args: Any) -> int:
        monkeypatch.undo()
        signal.raise_signal(signal.SIGUSR1)
        return write_one(*args)

    monkeypatch.setattr(outbox.db, "write_one", interrupted)
    assert outbox.put(b"of the thread", 1)
    assert sorted(bodies(outbox)) == [b"of the handler", b"of the thread"]


def test_a_signal_handler_in_the_middle_of_a_transaction_is_told_busy_and_spoils_nothing(
    outbox: Outbox, on_signal: Callable[[Callable[[], object]], None]
) -> None:
    answers: list[OutboxError] = []

    def handle() -> None:
        try:
            outbox.put(b"of the handler", 1)
        except OutboxError as problem:
            answers.append(problem)

    on_signal(handle)
    with outbox.db.write() as connection:
        connection.execute("UPDATE state SET erased = 0")
        signal.raise_signal(signal.SIGUSR1)
        connection.execute("INSERT INTO event VALUES (1, 1, x'61')")
    assert [type(each) for each in answers] == [OutboxBusy]
    assert bodies(outbox) == [b"a"]
    assert outbox.put(b"b", 1)


def test_a_signal_handler_does_not_write_while_another_process_has_the_writer_lock(
    outbox: Outbox, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread waits for that lock just then, and does not have it yet."""
    worker.call("hold_writer_lock")
    for module in ("connections", "intake"):
        monkeypatch.setattr(f"segment_durable.{module}.WRITE_TIMEOUT", 0.1)
    nap = time.sleep
    accepted: list[bool] = []

    def interrupted(seconds: float) -> None:
        monkeypatch.setattr("segment_durable.locks.time.sleep", nap)
        try:
            accepted.append(outbox.put(b"of the handler", 1))
        except OutboxBusy:
            accepted.append(False)

    monkeypatch.setattr("segment_durable.locks.time.sleep", interrupted)
    with pytest.raises(OutboxBusy):
        outbox.put(b"of the thread", 1)
    assert accepted == [False]
    assert outbox.pending() == 0


@pytest.fixture
def waiting(outbox: Outbox) -> Iterator[Remembering]:
    outbox._intake._waiting = waiting = Remembering()
    yield waiting
    for put in waiting.all:
        put.error = put.error or StorageError("the test is over")


def test_a_signal_handler_may_put_at_any_place_of_a_put(outbox: Outbox, worker: Worker) -> None:
    """And it writes under the writer lock, or not at all."""
    expected: set[bytes] = set()
    at = 0
    while True:

        def handle(body: bytes = b"handler %d" % at) -> None:
            try:
                outbox.put(body, 1)
            except OutboxError:
                return
            expected.add(body)

        with Interruption(at, handle) as interruption:
            assert outbox.put(b"%d" % at, 1)
        expected.add(b"%d" % at)
        assert worker.call("can_lock_writer"), f"the writer lock was kept (place {at})"
        if not interruption.happened:
            break
        at += 1
    assert at > 50
    assert set(bodies(outbox)) == expected
    assert outbox.stats().balanced
    assert len([body for body in expected if body.startswith(b"handler")]) > at / 2


def test_a_signal_handler_that_writes_at_any_place_of_a_put_has_the_writer_lock(outbox: Outbox, worker: Worker) -> None:
    at, checked = 0, 0
    while True:

        def handle() -> None:
            nonlocal checked
            try:
                with outbox.db.write():
                    assert not worker.call("can_lock_writer"), f"written without the lock (place {at})"  # noqa: B023
                    checked += 1
            except OutboxError:
                return

        with Interruption(at, handle) as interruption:
            assert outbox.put(b"x", 1)
        if not interruption.happened:
            break
        at += 1
    assert checked > 50


def test_a_signal_handler_that_puts_at_any_place_of_a_group_costs_no_other_thread_its_event(
    outbox: Outbox, waiting: Remembering
) -> None:
    at = 0
    while True:
        answers: list[object] = []

        def put(body: bytes, answers: list[object] = answers) -> None:
            try:
                answers.append(outbox.put(body, 1))
            except Exception as problem:
                answers.append(problem)

        def handle() -> None:
            try:
                outbox.put(b"of the handler", 1)
            except OutboxError:
                return

        threads = [threading.Thread(target=put, args=(b"of a thread",), daemon=True) for _ in range(2)]
        outbox.db.lock.mutex.acquire()
        try:
            for thread in threads:
                thread.start()
            wait_until(lambda: len(outbox._intake._waiting) == 2)
            with Interruption(at, handle) as interruption:
                put(b"of this thread")
        finally:
            outbox.db.lock.mutex.release()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive(), f"a put hangs (place {at})"
        assert answers == [True] * 3, f"at place {at}"
        if not interruption.happened:
            break
        at += 1
    assert at > 50
    found = bodies(outbox)
    assert found.count(b"of a thread") == 2 * (at + 1)
    assert found.count(b"of this thread") == at + 1


def test_a_put_that_gives_up_while_it_is_being_taken_along_costs_no_other_thread_its_event(
    outbox: Outbox, waiting: Remembering, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread has waited for too long, and withdraws it without the lock."""

    def popleft(self: Remembering) -> Any:
        if len(self) == 1:
            self[0].error = OutboxBusy("withdrawn by its thread")
            self.clear()
        return deque.popleft(self)

    answers: list[object] = []

    def put() -> None:
        try:
            answers.append(outbox.put(b"x", 1))
        except OutboxError as problem:
            answers.append(problem)

    threads = [threading.Thread(target=put, daemon=True) for _ in range(3)]
    outbox.db.lock.mutex.acquire()
    try:
        for thread in threads:
            thread.start()
        wait_until(lambda: len(waiting) == 3)
        with monkeypatch.context() as patch:
            patch.setattr(Remembering, "popleft", popleft)
            outbox._intake._put_group()
    finally:
        outbox.db.lock.mutex.release()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive(), "a put hangs"
    assert answers.count(True) == 2
    assert bodies(outbox) == [b"x"] * 2


def test_a_group_that_is_interrupted_by_an_exception_leaves_no_thread_waiting_for_ever(
    outbox: Outbox, waiting: Remembering, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C, or a worker's server that exits from its signal handler."""

    def popleft(self: Remembering) -> Any:
        taken = deque.popleft(self)
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        return taken

    monkeypatch.setattr(Remembering, "popleft", popleft)
    answers: list[object] = []

    def put() -> None:
        try:
            answers.append(outbox.put(b"of a thread", 1))
        except OutboxError as problem:
            answers.append(problem)

    threads = [threading.Thread(target=put, daemon=True) for _ in range(3)]
    outbox.db.lock.mutex.acquire()
    try:
        for thread in threads:
            thread.start()
        wait_until(lambda: len(outbox._intake._waiting) == 3)
        with pytest.raises(KeyboardInterrupt):
            outbox.put(b"of this thread", 1)
    finally:
        outbox.db.lock.mutex.release()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive(), "a put hangs"
    assert len(answers) == 3
    assert bodies(outbox).count(b"of a thread") == answers.count(True)
