"""The thread that keeps the files in order: syncs, checkpoints, space given back, and rest."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from segment_durable import Client, space, upkeep, wal
from segment_durable.clock import SystemClock
from segment_durable.errors import OutboxBusy, StorageError
from segment_durable.outbox import Outbox
from segment_durable.records import Lease
from segment_durable.reserve import Reserve
from segment_durable.upkeep import Upkeep

BODY = b'{"n":1}'


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    outbox = Outbox(tmp_path / "outbox", SystemClock())
    yield outbox
    outbox.close()


@pytest.fixture
def keeper(outbox: Outbox) -> Iterator[Upkeep]:
    keeper = Upkeep(outbox.db, SystemClock())
    yield keeper
    assert keeper.stop(10)


class Signals:
    """Counts the calls of a function, and lets a test wait for them."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._changed = threading.Condition()

    def note(self) -> None:
        with self._changed:
            self.times.append(time.monotonic())
            self._changed.notify_all()

    def wait_for(self, count: int) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: len(self.times) >= count, timeout=10)


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> Signals:
    signals = Signals()
    real = wal.sync_file

    def sync_file(fd: int) -> None:
        real(fd)
        signals.note()

    monkeypatch.setattr(wal, "sync_file", sync_file)
    return signals


def test_a_commit_is_synced_within_half_a_second(outbox: Outbox, keeper: Upkeep, syncs: Signals) -> None:
    for count in (1, 2, 3):
        committed = time.monotonic()
        outbox.put(BODY, 1)
        assert outbox.db.wal.is_unsynced
        assert syncs.wait_for(count)
        # The bound is upkeep.SYNC_SECONDS and the sync itself; the rest is for a loaded machine.
        assert syncs.times[-1] - committed < 5
        assert not outbox.db.wal.is_unsynced
    assert upkeep.SYNC_SECONDS <= 0.5


def test_the_first_commit_of_a_new_client_is_synced(make_client: Callable[..., Client], syncs: Signals) -> None:
    """Making the outbox writes to it, too, before anybody watches."""
    client = make_client(deliver=False)
    client.track("u", "e")
    assert syncs.wait_for(1)


def test_many_commits_share_one_sync(outbox: Outbox, keeper: Upkeep, syncs: Signals) -> None:
    started = time.monotonic()
    for _ in range(300):
        outbox.put(BODY, 1)
    seconds = time.monotonic() - started
    assert syncs.wait_for(1)
    assert len(syncs.times) <= 2 + seconds / upkeep.SYNC_SECONDS


def test_nothing_runs_before_the_first_write_nor_without_any(outbox: Outbox, keeper: Upkeep, syncs: Signals) -> None:
    outbox.pending()
    assert [thread for thread in threading.enumerate() if "upkeep" in thread.name] == []
    outbox.put(BODY, 1)
    assert [thread.name for thread in threading.enumerate() if "upkeep" in thread.name] == ["segment-durable-upkeep"]


def test_a_thread_whose_start_was_interrupted_is_started_by_the_next_write(
    outbox: Outbox, keeper: Upkeep, syncs: Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a signal handler that raised."""
    strikes = iter([TimeoutError])
    real = upkeep.start_thread

    def start_thread(target: Callable[[], None], name: str) -> threading.Thread | None:
        for each in strikes:
            raise each
        return real(target, name)

    monkeypatch.setattr(upkeep, "start_thread", start_thread)
    with pytest.raises(TimeoutError):
        outbox.put(BODY, 1)
    outbox.put(BODY, 1)
    assert syncs.wait_for(1)


def test_a_thread_that_ends_does_not_complain_of_files_that_were_closed_meanwhile(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A shutdown in no time does not wait for it."""
    entered, leave = threading.Event(), threading.Event()
    real = outbox.db.wal.sync
    keeper = Upkeep(outbox.db, SystemClock())

    def sync() -> None:
        if threading.current_thread() is keeper._thread:
            entered.set()
            leave.wait(10)
            raise StorageError("the outbox has been closed", "SQLITE_MISUSE")
        real()

    monkeypatch.setattr(outbox.db.wal, "sync", sync)
    outbox.put(BODY, 1)
    assert entered.wait(10)
    assert not keeper.stop(0)
    leave.set()
    assert keeper.stop(10)
    assert caplog.records == []


def test_with_full_each_commit_is_synced_by_sqlite_and_not_again(tmp_path: Path, syncs: Signals) -> None:
    outbox = Outbox(tmp_path / "full", SystemClock(), full=True)
    keeper = Upkeep(outbox.db, SystemClock())
    outbox.put(BODY, 1)
    assert not outbox.db.wal.is_unsynced
    assert keeper.stop(10)
    assert syncs.times == []
    outbox.close()


def test_stop_syncs_what_is_left(outbox: Outbox, syncs: Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "SYNC_SECONDS", 3600.0)
    keeper = Upkeep(outbox.db, SystemClock())
    outbox.put(BODY, 1)
    assert keeper.stop(10)
    assert len(syncs.times) >= 1
    assert not outbox.db.wal.is_unsynced


def test_a_sync_that_fails_is_told_once_and_tried_again(
    outbox: Outbox, keeper: Upkeep, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(upkeep, "SYNC_SECONDS", 0.001)
    tried = Signals()

    def broken(fd: int) -> None:
        tried.note()
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(wal, "sync_file", broken)
        for count in (1, 2, 3):
            outbox.put(BODY, 1)
            assert tried.wait_for(count)
        with pytest.raises(StorageError, match="synced"):
            outbox.db.wal.sync()
        assert outbox.db.wal.is_unsynced
    assert len([record for record in caplog.records if "kept in order" in record.getMessage()]) == 1
    outbox.db.wal.sync()
    assert not outbox.db.wal.is_unsynced


def test_the_wal_is_checkpointed_when_due_so_that_it_stays_small(
    outbox: Outbox, keeper: Upkeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wal, "CHECKPOINT_BYTES", 200_000)
    checkpoints = Signals()
    real = outbox.db.wal.checkpoint

    def checkpoint(*, truncate: bool = False) -> bool:
        done = real(truncate=truncate)
        checkpoints.note()
        return done

    monkeypatch.setattr(outbox.db.wal, "checkpoint", checkpoint)
    with outbox.db.connections.writer() as connection:
        connection.execute("PRAGMA journal_size_limit=200000")  # as long as it may be when it starts anew
    body = b'"%b"' % (b"x" * 20_000)
    for _ in range(20):
        before = len(checkpoints.times)
        for _ in range(20):
            outbox.put(body, 1)
        assert checkpoints.wait_for(before + 1)
    # 8 MB of events went through it.
    assert outbox.db.wal.size() < 2_000_000


def test_without_a_thread_the_writer_checkpoints(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wal, "OVERDUE_BYTES", 200_000)
    body = b'"%b"' % (b"x" * 20_000)
    for _ in range(200):
        outbox.put(body, 1)
    assert outbox.db.wal.size() < 1_000_000


def test_space_comes_back_after_a_drain(outbox: Outbox, keeper: Upkeep, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, and never with VACUUM, which would write the whole database anew while everybody waits."""
    monkeypatch.setattr(upkeep, "_QUIET_SECONDS", 0.01)
    steps = Signals()
    real = outbox.db.wal.checkpoint

    def checkpoint(*, truncate: bool = False) -> bool:
        done = real(truncate=truncate)
        if truncate and done:
            steps.note()
        return done

    monkeypatch.setattr(outbox.db.wal, "checkpoint", checkpoint)
    statements: list[str] = []
    with outbox.db.connections.writer() as connection:
        connection.set_trace_callback(statements.append)
    body = b'"%b"' % (b"x" * 30_000)
    for _ in range(700):
        outbox.put(body, 1)
    assert real()  # by whichever comes first: the thread may have been slow, and all of it in the WAL still
    assert outbox.db.space.database_size() > 15_000_000
    while isinstance(lease := outbox.lease(100, 60), Lease):
        outbox.ack(lease, lease.last)
    count = 0
    while outbox.db.space.database_size() > upkeep._TIDY_BYTES:
        count += 1
        assert steps.wait_for(count), "the thread rests, and has not given the space back"
    assert any("incremental_vacuum" in statement for statement in statements)
    assert not any(statement.lstrip().upper().startswith("VACUUM") for statement in statements)


def test_space_of_a_backlog_of_an_earlier_process_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its events are in the database, and to drain it writes so little that no checkpoint is due for the WAL's sake."""
    monkeypatch.setattr(upkeep, "_QUIET_SECONDS", 0.01)
    body = b'"%b"' % (b"x" * 30_000)
    earlier = Outbox(tmp_path / "outbox", SystemClock())
    for _ in range(250):
        earlier.put(body, 1)
    earlier.close()
    outbox = Outbox(tmp_path / "outbox", SystemClock())
    keeper = Upkeep(outbox.db, SystemClock())
    assert outbox.db.space.size_on_disk() > 7_000_000
    while isinstance(lease := outbox.lease(100, 60), Lease):
        outbox.ack(lease, lease.last)
    end = time.monotonic() + 60
    pause = threading.Event()
    while outbox.db.space.database_size() > upkeep._TIDY_BYTES and time.monotonic() < end:
        pause.wait(0.01)
    assert keeper.stop(10)
    size = outbox.db.space.size_on_disk()
    outbox.close()
    assert size <= upkeep._TIDY_BYTES


def test_a_large_file_is_cut_in_portions(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """All writers wait while the kernel gives up the pages of what is cut off: 90 ms for 270 MB at once."""
    monkeypatch.setattr(upkeep, "_QUIET_SECONDS", 0.01)
    monkeypatch.setattr(upkeep, "_CUT_BYTES", 1 << 20)
    monkeypatch.setattr(space, "_SHRINK_SECONDS", 0.0005)
    body = b'"%b"' % (b"x" * 30_000)
    for _ in range(500):
        outbox.put(body, 1)
    outbox.db.wal.checkpoint(truncate=True)
    while isinstance(lease := outbox.lease(100, 60), Lease):
        outbox.ack(lease, lease.last)
    size = outbox.db.space.database_size
    cuts: list[int] = []
    small = threading.Event()
    real = outbox.db.wal.checkpoint

    def checkpoint(*, truncate: bool = False) -> bool:
        before = size()
        done = real(truncate=truncate)
        cuts.append(before - size())
        if size() <= upkeep._TIDY_BYTES:
            small.set()
        return done

    monkeypatch.setattr(outbox.db.wal, "checkpoint", checkpoint)
    keeper = Upkeep(outbox.db, SystemClock())
    outbox.put(BODY, 1)
    assert small.wait(60)
    assert keeper.stop(10)
    assert sum(cuts) > 10_000_000
    assert max(cuts) < 4_000_000


def test_space_comes_back_also_where_it_is_never_quiet(
    outbox: Outbox, keeper: Upkeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "SYNC_SECONDS", 0.001)
    body = b'"%b"' % (b"x" * 30_000)
    for _ in range(700):
        outbox.put(body, 1)
    assert outbox.db.space.size_on_disk() > 15_000_000
    while isinstance(lease := outbox.lease(100, 60), Lease):
        outbox.ack(lease, lease.last)
    end = time.monotonic() + 60
    while outbox.db.space.database_size() > upkeep._TIDY_BYTES:
        assert time.monotonic() < end
        assert outbox.put(b'"small"', 1)
        lease = outbox.lease(100, 60)
        assert isinstance(lease, Lease)
        outbox.ack(lease, lease.last)


def test_space_is_not_given_back_while_a_backlog_is_delivered(
    outbox: Outbox, keeper: Upkeep, syncs: Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both write, and who delivers would wait for each step: it took half as long again."""
    monkeypatch.setattr(upkeep, "SYNC_SECONDS", 0.001)
    monkeypatch.setattr(upkeep, "_QUIET_SECONDS", 3600.0)
    real = outbox.db.space.give_back
    left: list[int] = []
    given = threading.Event()

    def give_back() -> tuple[int, int]:
        left.append(outbox.pending())
        given.set()
        return real()

    monkeypatch.setattr(outbox.db.space, "give_back", give_back)
    body = b'"%b"' % (b"x" * 30_000)
    for _ in range(700):
        outbox.put(body, 1)
    while isinstance(lease := outbox.lease(10, 60), Lease):
        outbox.ack(lease, lease.last)
        assert syncs.wait_for(len(syncs.times) + 1), "the thread rests"
    outbox.put(BODY, 1)
    assert given.wait(10)
    assert max(left) * 30_000 < upkeep._TIDY_BYTES


def test_space_comes_back_beside_much_that_stays(
    outbox: Outbox, keeper: Upkeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dead letters, say, or a backlog that grows as fast as it is delivered."""
    monkeypatch.setattr(upkeep, "SYNC_SECONDS", 0.001)
    monkeypatch.setattr(upkeep, "_QUIET_SECONDS", 3600.0)
    monkeypatch.setattr(upkeep, "_STEADY_SECONDS", 0.05)
    body = b'"%b"' % (b"x" * 30_000)
    for _ in range(700):
        outbox.put(body, 1)
    while outbox.pending() > 200:
        lease = outbox.lease(100, 60)
        assert isinstance(lease, Lease)
        outbox.ack(lease, lease.last)
    end = time.monotonic() + 60
    while outbox.db.space.database_size() > 2 * 210 * 31_000:  # half of it may be free: it may be used again
        assert time.monotonic() < end
        outbox.put(body, 1)
        lease = outbox.lease(1, 60)
        assert isinstance(lease, Lease)
        outbox.ack(lease, lease.last)


def test_files_that_a_reader_kept_from_being_cut_are_cut_when_it_ends(
    outbox: Outbox, keeper: Upkeep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though nobody writes any more."""
    tried = Signals()
    real = outbox.db.wal.checkpoint

    def checkpoint(*, truncate: bool = False) -> bool:
        done = real(truncate=truncate)
        if truncate and not done:
            tried.note()
        return done

    monkeypatch.setattr(outbox.db.wal, "checkpoint", checkpoint)
    monkeypatch.setattr(upkeep, "_QUIET_SECONDS", 0.01)
    body = b'"%b"' % (b"x" * 30_000)
    for _ in range(300):
        outbox.put(body, 1)
    with contextlib.closing(sqlite3.connect(tmp_path / "outbox" / "outbox.db", isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM state").fetchone()
        while isinstance(lease := outbox.lease(100, 60), Lease):
            outbox.ack(lease, lease.last)
        assert tried.wait_for(2)
        assert outbox.db.space.size_on_disk() > 7_000_000
    end = time.monotonic() + 30
    while outbox.db.space.size_on_disk() > upkeep._TIDY_BYTES:
        assert time.monotonic() < end
        tried.wait_for(1)


@pytest.mark.parametrize("disturbed", ["another process", "a busy lock"])
def test_what_comes_in_between_does_not_leave_the_files_large(
    outbox: Outbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disturbed: str
) -> None:
    """Once, in the quiet second or when the files are to be cut; and nobody writes afterwards."""
    other = Outbox(tmp_path / "outbox", SystemClock())
    real = outbox.db.wal.checkpoint
    times: list[float] = []

    class Disturbed(SystemClock):
        def wait(self, event: threading.Event, seconds: float) -> bool:
            if seconds == upkeep._QUIET_SECONDS and not times and disturbed == "another process":
                times.append(seconds)
                other.put(BODY, 1)
            return super().wait(event, seconds)

    def checkpoint(*, truncate: bool = False) -> bool:
        if truncate and not times and disturbed == "a busy lock":
            times.append(0.0)
            raise OutboxBusy("another process has been writing")
        return real(truncate=truncate)

    monkeypatch.setattr(upkeep, "_QUIET_SECONDS", 0.05)
    monkeypatch.setattr(outbox.db.wal, "checkpoint", checkpoint)
    monkeypatch.setattr(Reserve, "size", 64 << 20)  # the length of the WAL is no reason
    body = b'"%b"' % (b"x" * 30_000)
    for _ in range(400):
        outbox.put(body, 1)
    outbox.db.wal.checkpoint()
    large = outbox.db.space.database_size()
    lease = outbox.lease(190, 60)  # less than half: so it takes quiet
    assert isinstance(lease, Lease)
    outbox.ack(lease, lease.last)
    keeper = Upkeep(outbox.db, Disturbed())
    outbox.put(BODY, 1)
    end = time.monotonic() + 30
    pause = threading.Event()
    while not times or outbox.db.space.database_size() > large * 0.6:
        assert time.monotonic() < end
        pause.wait(0.01)
    assert keeper.stop(10)
    other.close()


def test_it_is_not_quiet_while_another_process_delivers(
    outbox: Outbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Outbox(tmp_path / "outbox", SystemClock())
    rounds: list[int] = []
    given: list[int] = []
    done = threading.Event()

    class Delivering(SystemClock):
        def wait(self, event: threading.Event, seconds: float) -> bool:
            if seconds != upkeep._QUIET_SECONDS:
                return super().wait(event, seconds)
            if len(rounds) == 20:
                done.set()
                return super().wait(event, seconds)
            rounds.append(outbox.pending())
            lease = other.lease(10, 60)
            assert isinstance(lease, Lease)
            other.ack(lease, lease.last)
            keeper._written.set()  # go on: this process has written, too, but only after that second
            return False

    def give_back() -> tuple[int, int]:
        given.append(outbox.pending())
        return 0, 0

    monkeypatch.setattr(outbox.db.space, "give_back", give_back)
    monkeypatch.setattr(upkeep, "SYNC_SECONDS", 0.001)
    body = b'"%b"' % (b"x" * 30_000)
    for _ in range(400):
        outbox.put(body, 1)
    outbox.db.wal.checkpoint()
    keeper = Upkeep(outbox.db, Delivering())
    outbox.put(BODY, 1)
    assert done.wait(20)
    assert keeper.stop(10)
    assert rounds[-1] < 250
    assert given == []
    other.close()


def test_beside_writers_the_wal_is_left_as_long_as_it_is(
    outbox: Outbox, keeper: Upkeep, syncs: Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut, it would have to be made long again at once: it was, four times a second."""
    monkeypatch.setattr(upkeep, "SYNC_SECONDS", 0.001)
    monkeypatch.setattr(upkeep, "_QUIET_SECONDS", 3600.0)
    cut: list[int] = []
    real = outbox.db.wal.checkpoint

    def checkpoint(*, truncate: bool = False) -> bool:
        if truncate:
            cut.append(outbox.db.wal.size())
        return real(truncate=truncate)

    monkeypatch.setattr(outbox.db.wal, "checkpoint", checkpoint)
    body = b'"%b"' % (b"x" * 30_000)
    longest = 0
    for _ in range(300):
        outbox.put(body, 1)
        lease = outbox.lease(10, 60)
        assert isinstance(lease, Lease)
        outbox.ack(lease, lease.last)
        longest = max(longest, outbox.db.wal.size())
        assert syncs.wait_for(len(syncs.times) + 1), "the thread rests"
    assert longest > outbox.db.reserve.size
    assert cut == []


def test_stopping_does_not_wait_for_quiet(outbox: Outbox) -> None:
    """Every shutdown of a client that has just written would take a second longer."""
    late: list[float] = []

    class Watching(SystemClock):
        def wait(self, event: threading.Event, seconds: float) -> bool:
            if keeper._ending.is_set():
                late.append(seconds)
            return super().wait(event, seconds)

    keeper = Upkeep(outbox.db, Watching())
    for _ in range(3):
        outbox.put(BODY, 1)
    assert keeper.stop(10)
    assert upkeep._QUIET_SECONDS not in late
