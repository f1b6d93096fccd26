"""What an accepted event is promised: a place, an id of its own, and the limit kept to the last one."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from segment_durable.errors import OutboxBusy, StorageError
from segment_durable.outbox import Outbox
from segment_durable.records import Lease, Row
from segment_durable.testing.clock import FakeClock

from .common import bodies, wait_until
from .workers import Worker


def deliver_all(outbox: Outbox) -> int:
    lease = outbox.lease(10_000, 60)
    assert isinstance(lease, Lease)
    delivered = outbox.ack(lease, lease.last)
    assert delivered is not None
    return delivered


def run_threads(count: int, work: Callable[[int], None]) -> None:
    """Run `work(0)` to `work(count - 1)` in threads that start at the same moment; raise what they raise."""
    problems: list[BaseException] = []
    start = threading.Barrier(count)

    def run(number: int) -> None:
        try:
            start.wait(30)
            work(number)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a put hangs"
    if problems:
        raise problems[0]


# -- one after the other


def test_events_get_dense_ids_in_the_order_of_the_calls(outbox: Outbox) -> None:
    for body in (b"a", b"b", b"c"):
        assert outbox.put(body, 1) is True
    assert outbox.rows(0, 9) == [Row(1, b"a"), Row(2, b"b"), Row(3, b"c")]


@pytest.mark.parametrize(
    "body", [b"", b"\x00\xff", b"x" * 32_768, "é😀".encode()], ids=["empty", "raw", "32KiB", "utf8"]
)
def test_the_bytes_come_back_as_they_went_in(outbox: Outbox, body: bytes) -> None:
    outbox.put(body, 1)
    assert outbox.rows(1, 1) == [Row(1, body)]


def test_rows_gives_the_asked_range_only(outbox: Outbox) -> None:
    for number in range(1, 6):
        outbox.put(b"%d" % number, 1)
    assert [row.id for row in outbox.rows(2, 4)] == [2, 3, 4]
    assert outbox.rows(6, 9) == []


def test_an_empty_outbox_has_nothing_of_anything(outbox: Outbox) -> None:
    stats = outbox.stats()
    assert (outbox.pending(), outbox.last_id(), outbox.first_id()) == (0, 0, None)
    assert (stats.pending, stats.leased, stats.dead, stats.accepted, stats.delivered) == (0, 0, 0, 0, 0)
    assert stats.oldest_age_seconds is None
    assert stats.last_error_age_seconds is None
    assert stats.balanced


def test_an_event_is_seen_by_another_process_when_put_returns(outbox: Outbox, worker: Worker) -> None:
    outbox.put(b"a", 1)
    assert worker.call("rows", 1, 1) == [Row(1, b"a")]
    assert worker.call("put", b"b", 1) is True
    assert bodies(outbox) == [b"a", b"b"]


def test_the_age_of_the_oldest_event_counts_from_its_call(outbox: Outbox, clock: FakeClock) -> None:
    outbox.put(b"a", int(clock.time() * 1000))
    clock.advance(90)
    outbox.put(b"b", int(clock.time() * 1000))
    assert outbox.stats().oldest_age_seconds == 90
    clock.jump(-1_000)
    assert outbox.stats().oldest_age_seconds == 0


# -- the limit


def test_the_limit_refuses_one_more_and_appends_nothing(outbox: Outbox) -> None:
    assert [outbox.put(b"x", 1, 3) for _ in range(5)] == [True, True, True, False, False]
    assert outbox.pending() == outbox.stats().accepted == 3


def test_a_limit_of_0_is_none(outbox: Outbox) -> None:
    assert all(outbox.put(b"x", 1, 0) for _ in range(20))


def test_a_leased_event_counts_against_the_limit_and_a_delivered_one_does_not(outbox: Outbox) -> None:
    for _ in range(3):
        outbox.put(b"x", 1)
    lease = outbox.lease(2, 60)
    assert isinstance(lease, Lease)
    assert not outbox.put(b"y", 1, 3)
    outbox.ack(lease, lease.first)
    assert outbox.put(b"y", 1, 3)
    assert not outbox.put(b"y", 1, 3)


def test_a_dead_letter_does_not_count_against_the_limit(outbox: Outbox) -> None:
    outbox.put(b"x", 1)
    lease = outbox.lease(1, 60)
    assert isinstance(lease, Lease)
    outbox.bury(lease, 1, status=400, code="c", answer="", max_dead=9)
    assert outbox.put(b"y", 1, 1)


def test_eight_threads_fill_the_outbox_to_the_limit_exactly(outbox: Outbox) -> None:
    accepted: list[bytes] = []

    def put(number: int) -> None:
        for each in range(60):
            body = b"%d-%d" % (number, each)
            if outbox.put(body, 1, 250):
                accepted.append(body)

    run_threads(8, put)
    assert len(accepted) == 250
    assert sorted(bodies(outbox)) == sorted(accepted)
    assert [row.id for row in outbox.rows(0, 9_999)] == list(range(1, 251))


def test_four_processes_fill_the_outbox_to_the_limit_exactly(
    outbox: Outbox, worker_factory: Callable[..., Worker]
) -> None:
    workers = [worker_factory() for _ in range(4)]
    for number, each in enumerate(workers):
        each.send("put_many", 150, b"%d-" % number, 333)
    accepted = [body for each in workers for body in each.receive()]
    assert len(accepted) == 333
    assert sorted(bodies(outbox)) == sorted(accepted)
    assert outbox.pending() == 333


def test_each_thread_finds_its_own_events_in_its_own_order(outbox: Outbox) -> None:
    run_threads(8, lambda number: [outbox.put(b"%d %d" % (number, each), 1) for each in range(40)] and None)
    found: dict[bytes, list[int]] = {}
    for body in bodies(outbox):
        thread, each = body.split()
        found.setdefault(thread, []).append(int(each))
    assert len(found) == 8
    assert all(each == list(range(40)) for each in found.values())


# -- ids


def test_ids_go_on_after_the_outbox_was_emptied(outbox: Outbox) -> None:
    for _ in range(5):
        outbox.put(b"x", 1)
    assert deliver_all(outbox) == 5
    outbox.put(b"y", 1)
    assert outbox.first_id() == outbox.last_id() == 6


def test_ids_go_on_after_the_outbox_was_emptied_and_opened_again(outbox_factory: Callable[..., Outbox]) -> None:
    first = outbox_factory()
    for _ in range(5):
        first.put(b"x", 1)
    deliver_all(first)
    first.close()
    second = outbox_factory()
    assert second.last_id() == 5
    second.put(b"y", 1)
    assert second.first_id() == 6


@pytest.mark.parametrize("way", ["bury", "expire"])
def test_ids_go_on_after_the_last_event_left_undelivered(outbox: Outbox, clock: FakeClock, way: str) -> None:
    outbox.put(b"x", 1)
    if way == "bury":
        lease = outbox.lease(1, 60)
        assert isinstance(lease, Lease)
        assert outbox.bury(lease, 1, status=400, code="c", answer="", max_dead=9)
    else:
        assert outbox.expire(clock.time()) == [b"x"]
    outbox.put(b"y", 1)
    assert outbox.first_id() == 2


# -- expiry


def test_expire_takes_the_old_from_the_front_and_stops_at_the_first_young_one(outbox: Outbox, clock: FakeClock) -> None:
    now = clock.time()
    for age in (100, 90, 10, 80):
        outbox.put(b"%d" % age, int((now - age) * 1000))
    assert outbox.expire(now - 50) == [b"100", b"90"]
    assert bodies(outbox) == [b"10", b"80"]
    assert outbox.stats().expired == 2
    assert outbox.stats().balanced


def test_expire_keeps_to_its_limit(outbox: Outbox, clock: FakeClock) -> None:
    for _ in range(5):
        outbox.put(b"x", 1)
    assert len(outbox.expire(clock.time(), 3)) == 3
    assert outbox.pending() == 2


def test_what_is_leased_does_not_expire(outbox: Outbox, clock: FakeClock) -> None:
    """And what is not does: with several senders there is a lease at nearly any time."""
    for number in range(1, 7):
        outbox.put(b"%d" % number, 1 if number < 6 else int(clock.time() * 1000) + 100_000)
    first, second = outbox.lease(1, 60), outbox.lease(2, 120, max_leases=2)
    assert isinstance(first, Lease)
    assert isinstance(second, Lease)
    assert outbox.ack(second, 2) == 1
    assert outbox.expire(clock.time()) == [b"4", b"5"]
    assert bodies(outbox) == [b"1", b"3", b"6"]
    assert outbox.ack(second, 3) == 1
    clock.advance(60)  # the lease of the first is over, but its holder lives, and may send it still
    assert outbox.expire(clock.time() - 1) == []
    outbox.forget(first.token)
    assert outbox.expire(clock.time() - 1) == [b"1"]
    assert (outbox.stats().expired, outbox.stats().pending) == (3, 1)
    assert outbox.stats().balanced


# -- threads commit together


def test_sixteen_threads_commit_in_fewer_transactions_than_events(outbox: Outbox, folder: Path) -> None:
    begun: list[str] = []
    with outbox.db.write() as connection:
        pass
    connection.set_trace_callback(begun.append)
    # All wait for the thread lock, as behind a slow commit, and are then committed by whoever gets it first.
    outbox.db.lock.mutex.acquire()
    try:
        threads = [threading.Thread(target=outbox.put, args=(b"%d" % each, 1), daemon=True) for each in range(16)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(outbox._intake._waiting) == 16)
    finally:
        outbox.db.lock.mutex.release()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    connection.set_trace_callback(None)
    assert outbox.pending() == 16
    assert sum(statement.lstrip().startswith("INSERT") for statement in begun) == 1


def test_a_limit_that_is_reached_within_a_group_refuses_the_rest_of_it(outbox: Outbox) -> None:
    accepted: list[bool] = []
    outbox.db.lock.mutex.acquire()
    try:
        put = lambda: accepted.append(outbox.put(b"x", 1, 5))  # noqa: E731
        threads = [threading.Thread(target=put, daemon=True) for _ in range(9)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(outbox._intake._waiting) == 9)
    finally:
        outbox.db.lock.mutex.release()
    for thread in threads:
        thread.join(30)
    assert sorted(accepted) == [False] * 4 + [True] * 5
    assert outbox.pending() == 5


# -- a put that fails


class Failing:
    """A connection that raises `error` once, at the first statement that starts with `prefix`."""

    def __init__(self, connection: sqlite3.Connection, prefix: str, error: Exception) -> None:
        self._connection = connection
        self._prefix = prefix
        self._error: Exception | None = error

    def execute(self, statement: str, *args: Any) -> sqlite3.Cursor:
        if self._error is not None and statement.strip().startswith(self._prefix):
            error, self._error = self._error, None
            raise error
        return self._connection.execute(statement, *args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("database or disk is full", "SQLITE_FULL"),
        ("disk I/O error", "SQLITE_IOERR"),
        ("database is locked", "SQLITE_BUSY"),
        ("attempt to write a readonly database", "SQLITE_READONLY"),
    ],
)
def test_a_put_that_the_disk_refuses_raises_with_the_code_and_the_next_one_works(
    outbox: Outbox, worker: Worker, text: str, code: str
) -> None:
    outbox.put(b"before", 1)
    connection: Any = outbox.db.connections._connection
    outbox.db.connections._connection = Failing(connection, "INSERT", sqlite3.OperationalError(text))  # type: ignore[assignment]
    with pytest.raises(StorageError) as caught:
        outbox.put(b"refused", 1)
    assert caught.value.code == code
    assert not connection.in_transaction
    assert worker.call("put", b"of another", 1) is True  # the writer lock was given back
    assert outbox.put(b"after", 1) is True
    outbox.db.connections._connection = connection
    assert bodies(outbox) == [b"before", b"of another", b"after"]


@pytest.mark.parametrize("failing", ["BEGIN", "INSERT INTO lease", "COMMIT"])
def test_a_transaction_that_fails_anywhere_leaves_nothing_behind(outbox: Outbox, worker: Worker, failing: str) -> None:
    outbox.put(b"a", 1)
    connection: Any = outbox.db.connections._connection
    error = sqlite3.OperationalError("database is locked")
    outbox.db.connections._connection = Failing(connection, failing, error)  # type: ignore[assignment]
    with pytest.raises(StorageError):
        outbox.lease(1, 60)
    assert not connection.in_transaction
    outbox.db.connections._connection = connection
    assert isinstance(worker.call("lease", 1, 60), Lease)


def test_a_group_that_fails_refuses_all_of_it_and_the_next_puts_work(outbox: Outbox) -> None:
    connection: Any = outbox.db.connections._connection
    error = sqlite3.OperationalError("database or disk is full")
    outbox.db.connections._connection = Failing(connection, "INSERT", error)  # type: ignore[assignment]
    refused: list[StorageError] = []

    def put() -> None:
        try:
            outbox.put(b"x", 1)
        except StorageError as problem:
            refused.append(problem)

    outbox.db.lock.mutex.acquire()
    try:
        threads = [threading.Thread(target=put, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(outbox._intake._waiting) == 4)
    finally:
        outbox.db.lock.mutex.release()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert [problem.code for problem in refused] == ["SQLITE_FULL"] * 4
    assert outbox.pending() == 0
    assert outbox.put(b"y", 1)
    assert bodies(outbox) == [b"y"]


def test_a_lock_file_that_can_not_be_locked_is_a_storage_error(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(37, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(outbox.db.lock, "_lock_file", refuse)
        with pytest.raises(StorageError):
            outbox.put(b"x", 1)
    assert outbox.put(b"y", 1)


def test_a_put_gives_up_when_another_process_keeps_the_writer_lock(
    outbox: Outbox, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.call("hold_writer_lock")
    for module in ("connections", "intake"):
        monkeypatch.setattr(f"segment_durable.{module}.WRITE_TIMEOUT", 0.05)
    with pytest.raises(OutboxBusy):
        outbox.put(b"x", 1)
    worker.call("release_writer_lock")
    assert outbox.put(b"y", 1)
    assert bodies(outbox) == [b"y"]


def test_a_put_gives_up_when_another_thread_keeps_the_outbox(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segment_durable.intake.WRITE_TIMEOUT", 0.05)
    caught: list[OutboxBusy] = []

    def put() -> None:
        try:
            outbox.put(b"x", 1)
        except OutboxBusy as problem:
            caught.append(problem)

    thread = threading.Thread(target=put, daemon=True)
    outbox.db.lock.mutex.acquire()
    try:
        thread.start()
        thread.join(30)
    finally:
        outbox.db.lock.mutex.release()
    assert len(caught) == 1
    assert outbox.put(b"y", 1)
    assert bodies(outbox) == [b"y"], "what was refused does not come later"


# -- killed


def test_every_acknowledged_event_survives_kill_9(
    outbox: Outbox, worker_factory: Callable[..., Worker], tmp_path: Path
) -> None:
    diaries = [tmp_path / f"diary-{number}" for number in range(2)]
    workers = [worker_factory() for _ in diaries]
    for number, (worker, diary) in enumerate(zip(workers, diaries)):
        diary.touch()
        worker.send("put_forever", os.fspath(diary), b"%d:" % number)
    wait_until(lambda: all(diary.stat().st_size > 2_000 for diary in diaries))
    for worker in workers:
        worker.kill()
    acknowledged = [line for diary in diaries for line in diary.read_bytes().split()]
    found = bodies(outbox)
    assert set(acknowledged) <= set(found)
    assert len(found) - len(acknowledged) <= 2, "at most one for each process was committed and not yet noted"
    assert len(set(found)) == len(found) == outbox.pending()
    with outbox.db.read() as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_the_last_process_that_is_killed_leaves_all_its_events(
    worker: Worker, outbox_factory: Callable[..., Outbox]
) -> None:
    accepted = worker.call("put_many", 50, b"", 0)
    worker.kill()
    assert bodies(outbox_factory()) == accepted


def test_a_put_that_was_taken_along_waits_for_the_end_of_that_also_if_it_is_woken_before(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever leaves wakes the first of those who wait, and that it is the first is no answer."""
    monkeypatch.setattr("segment_durable.intake.WRITE_TIMEOUT", 0.05)
    waits: list[float] = []

    def wait(self: Any, seconds: float) -> bool:
        waits.append(seconds)
        if len(waits) == 2:
            self.accepted = True
        return True

    monkeypatch.setattr("segment_durable.intake._Put.wait", wait)
    monkeypatch.setattr(outbox._intake, "_withdraw", lambda put: False)  # another thread has taken it along
    entered, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with outbox.db.write():
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=stay)
    thread.start()
    assert entered.wait(30)
    try:
        assert outbox.put(b"x", 1) is True
    finally:
        outbox._intake._waiting.clear()
        leave.set()
        thread.join(30)
    assert len(waits) == 2
