"""The WAL is bounded: with many processes that deliver nothing, and with a reader that never ends."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from segment_durable import Client, space, wal
from segment_durable.clock import SystemClock
from segment_durable.errors import StorageError
from segment_durable.outbox import Outbox
from segment_durable.records import Lease

MIB = 1 << 20
BODY = b'"%b"' % (b"x" * 1_000)

# A process that puts without anything beside it, no sender and no upkeep: so many events of so many bytes, where a
# checkpoint is overdue after so many bytes, and looked for after so many.  The longest WAL that it has seen.
PUTTER = """
import sys
from pathlib import Path
from segment_durable import wal
from segment_durable.clock import SystemClock
from segment_durable.outbox import Outbox
events, size, wal.OVERDUE_BYTES, wal.LOOK_BYTES = map(int, sys.argv[2:])
outbox = Outbox(Path(sys.argv[1]), SystemClock())
body = b'"%b"' % (b"x" * size)
print("ready", flush=True)
sys.stdin.readline()
longest = 0
for _ in range(events):
    assert outbox.put(body, 1)
    longest = max(longest, outbox.db.wal.size())
print(longest, flush=True)
sys.stdin.readline()
outbox.close()
"""

READER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN")
print(connection.execute("SELECT count(*) FROM event").fetchone()[0], flush=True)
sys.stdin.readline()
"""


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_these_are_the_bounds() -> None:
    """What the tests below make smaller, and docs/architecture.md tells."""
    assert (wal.CHECKPOINT_BYTES, wal.OVERDUE_BYTES) == (4 * MIB, 32 * MIB)
    assert (wal.DELIVERY_LIMIT_BYTES, wal.WAL_LIMIT_BYTES) == (48 * MIB, 64 * MIB)


def put_in_eight_processes(folder: Path, *numbers: int) -> int:
    """Run eight of `PUTTER` at once; the longest WAL that was seen, in bytes."""
    with contextlib.closing(Outbox(folder, SystemClock())) as outbox:
        processes = [start(PUTTER, folder, *numbers) for _ in range(8)]
        try:
            for process in processes:
                assert hear(process) == "ready"
            for process in processes:
                tell(process)
            longest = max(int(hear(process)) for process in processes)
            assert outbox.pending() == 8 * numbers[0]
        finally:
            for process in processes:
                process.communicate("\n", timeout=30)
    print(f"the longest WAL: {longest} bytes")
    return longest


def test_the_bytes_of_all_processes_count(tmp_path: Path) -> None:
    """Each of eight writes about as much as the bound, and all of them many times as much."""
    assert MIB < put_in_eight_processes(tmp_path / "outbox", 400, 1_000, MIB, 64 << 10) < 3 * MIB


def test_the_bytes_of_all_processes_count_with_the_bounds_as_they_are(tmp_path: Path) -> None:
    """Eight write 200 MiB, and deliver nothing."""
    longest = put_in_eight_processes(tmp_path / "outbox", 800, 30_000, wal.OVERDUE_BYTES, wal.LOOK_BYTES)
    assert 32 * MIB < longest < 32 * MIB + 8 * (wal.LOOK_BYTES + 64 * 1024)


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def begin() -> subprocess.Popen[str]:
        started.append(start(READER, tmp_path / "outbox" / "outbox.db"))
        assert hear(started[-1]) == "1"
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def put_until_refused(outbox: Outbox, body: bytes = BODY) -> StorageError:
    for _ in range(20_000):
        try:
            outbox.put(body, 1)
        except StorageError as problem:
            return problem
    raise AssertionError("nothing bounds the WAL")


def test_a_reader_that_never_ends_stops_puts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: Callable[[], subprocess.Popen[str]]
) -> None:
    monkeypatch.setattr(wal, "WAL_LIMIT_BYTES", 2 * MIB)
    monkeypatch.setattr(wal, "OVERDUE_BYTES", MIB)
    monkeypatch.setattr(wal, "LOOK_BYTES", 64 << 10)
    monkeypatch.setattr(space, "LOOK_SECONDS", 0.0)
    outbox = Outbox(tmp_path / "outbox", SystemClock())
    outbox.put(b"1", 1)
    process = reader()
    problem = put_until_refused(outbox)
    assert "a reader has kept the WAL" in str(problem)
    assert problem.code == "SQLITE_BUSY"
    size = outbox.db.wal.size()
    assert 2 * MIB < size < 3 * MIB
    for _ in range(100):
        with pytest.raises(StorageError, match="a reader"):
            outbox.put(BODY, 1)
    assert outbox.db.wal.size() == size
    process.communicate("\n", timeout=30)
    assert outbox.put(BODY, 1), "the reader has ended"
    assert outbox.db.wal.size() < MIB
    assert outbox.db.reserve.exists()
    outbox.close()


def test_a_reader_that_never_ends_stops_all_with_the_bounds_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: Callable[[], subprocess.Popen[str]]
) -> None:
    monkeypatch.setattr(space, "LOOK_SECONDS", 0.0)
    with contextlib.closing(Outbox(tmp_path / "outbox", SystemClock())) as outbox:
        outbox.put(b"1", 1)
        process = reader()
        problem = put_until_refused(outbox, b'"%b"' % (b"x" * 30_000))
        assert "a reader has kept the WAL" in str(problem)
        size = outbox.db.wal.size()
        assert 64 * MIB < size < 64 * MIB + wal.LOOK_BYTES + 64 * 1024
        with pytest.raises(StorageError, match="a reader"):
            outbox.lease(1, 60)
        assert outbox.db.wal.size() == size
        process.communicate("\n", timeout=30)
        assert outbox.put(BODY, 1)
        assert isinstance(outbox.lease(1, 60), Lease)
        assert outbox.db.wal.size() < MIB


def deliver_all(outbox: Outbox) -> None:
    while isinstance(lease := outbox.lease(50, 60), Lease):
        outbox.ack(lease, lease.last)


def test_a_reader_that_never_ends_stops_delivery_before_puts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: Callable[[], subprocess.Popen[str]]
) -> None:
    """Events that wait longer are not lost; those that are refused are."""
    monkeypatch.setattr(wal, "WAL_LIMIT_BYTES", 2 * MIB)
    monkeypatch.setattr(wal, "DELIVERY_LIMIT_BYTES", MIB)
    monkeypatch.setattr(wal, "LOOK_BYTES", 64 << 10)
    monkeypatch.setattr(space, "LOOK_SECONDS", 0.0)
    outbox = Outbox(tmp_path / "outbox", SystemClock())
    outbox.put(b"1", 1)
    for _ in range(5_000):
        outbox.put(BODY, 1)
    outbox.db.wal.checkpoint(truncate=True)
    process = start(READER, tmp_path / "outbox" / "outbox.db")
    assert hear(process) == "5001"
    with pytest.raises(StorageError, match="a reader"):
        deliver_all(outbox)
    delivered = outbox.stats().delivered
    assert 0 < delivered < 5_001
    assert MIB < outbox.db.wal.size() < MIB + 256 * 1024
    assert outbox.put(BODY, 1)
    assert outbox.stats().balanced
    process.communicate("\n", timeout=30)
    deliver_all(outbox)
    assert outbox.stats().delivered == 5_002
    assert outbox.db.wal.size() < MIB
    outbox.close()


def test_clients_are_told_of_the_reader_once_and_work_again_by_themselves(
    tmp_path: Path,
    make_client: Callable[..., Client],
    monkeypatch: pytest.MonkeyPatch,
    reader: Callable[[], subprocess.Popen[str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(wal, "WAL_LIMIT_BYTES", MIB)
    monkeypatch.setattr(wal, "LOOK_BYTES", 64 << 10)
    errors: list[Exception] = []
    client = make_client(deliver=False, max_queue_size=0, on_error=lambda error, items: errors.append(error))
    client.track("u", "e")
    process = reader()
    end = time.monotonic() + 60
    refused = 0
    while refused < 500:
        refused += not client.track("u", "e", {"f": "x" * 1_000})[0]
        assert time.monotonic() < end
    assert any("a reader has kept the WAL" in str(error) for error in errors)
    assert len([each for each in caplog.records if "a reader has kept the WAL" in each.getMessage()]) == 1
    process.communicate("\n", timeout=30)
    while not client.track("u", "e")[0]:
        assert time.monotonic() < end


def test_a_long_wal_is_cut_when_the_reader_ends(
    tmp_path: Path, reader: Callable[[], subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What tells a look that there is something to move: SQLite cuts a WAL that starts anew."""
    outbox = Outbox(tmp_path / "outbox", SystemClock())
    outbox.put(b"1", 1)
    process = reader()
    big = b'"%b"' % (b"x" * 500_000)
    while outbox.db.wal.size() < 20 * MIB:
        outbox.put(big, 1)
    assert outbox.db.wal.needs_checkpoint
    assert not outbox.db.wal.checkpoint()
    process.communicate("\n", timeout=30)
    assert outbox.db.wal.checkpoint()
    outbox.put(b"2", 1)
    assert outbox.db.wal.size() <= wal.CHECKPOINT_BYTES
    outbox.db.wal._look()
    assert not outbox.db.wal.needs_checkpoint
    with contextlib.closing(sqlite3.connect(tmp_path / "outbox" / "outbox.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    outbox.close()
