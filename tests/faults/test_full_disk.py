"""A full disk: calls are refused and never raise, delivery goes on, and then events are accepted again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from segment_durable import Client, space
from segment_durable.clock import SystemClock
from segment_durable.connections import SPARE_PAGES
from segment_durable.database_file import PAGE_SIZE, file_size
from segment_durable.errors import StorageError
from segment_durable.outbox import Outbox
from segment_durable.records import Lease
from segment_durable.reserve import RESERVE_BYTES, Reserve
from segment_durable.testing import Receiver
from segment_durable.wal import Wal

DISK = 4 << 20
PATIENCE = 60.0  # seconds


def wait_until(condition: Callable[[], object]) -> None:
    """Poll: there is no signal for "a disk has space again"."""
    end, pause = time.monotonic() + PATIENCE, threading.Event()
    while not condition():
        assert time.monotonic() < end, "it did not come to that in time"
        pause.wait(0.001)


def fill(client: Client, name: str, refusals: int = 20, after_each: Callable[[], object] = lambda: None) -> list[str]:
    """Track until that many calls were refused; the ids of those that were accepted.

    Nothing may be delivered meanwhile: what leaves makes room for what comes, and the disk would never be full.
    """
    accepted: list[str] = []
    number = 0
    while refusals:
        taken, message = client.track("u", "e", {"filler": "x" * 400}, message_id=f"{name}-{number}")
        if taken:
            accepted.append(f"{name}-{number}")
        else:
            assert message["userId"] == "u"
            refusals -= 1
        number += 1
        assert number < 100_000, "the disk does not become full"
        after_each()
    return accepted


def arrived(receiver: Receiver) -> list[str]:
    return [event["messageId"] for event in receiver.unique]


def is_accepted(client: Client, name: str) -> bool:
    return client.track("u", "e", message_id=name)[0]


@pytest.fixture
def errors() -> list[Exception]:
    return []


@pytest.fixture
def make_full(make_client: Callable[..., Client], errors: list[Exception]) -> Callable[..., Client]:
    """Clients without a limit of events, whose errors are noted."""

    def make(outbox: Path, **settings: Any) -> Client:
        settings = {"max_queue_size": 0, "upload_interval": 0.01, **settings}
        return make_client(outbox_dir=outbox, on_error=lambda error, items: errors.append(error), **settings)

    return make


def test_a_full_disk_of_4_mb_is_delivered_and_then_takes_events_again(
    make_disk: Callable[[int], Path],
    make_full: Callable[..., Client],
    receiver: Receiver,
    errors: list[Exception],
    caplog: pytest.LogCaptureFixture,
) -> None:
    outbox = make_disk(DISK) / "outbox"
    receiver.stop()
    client = make_full(outbox)
    assert (outbox / "outbox.reserve").stat().st_size == DISK // 4
    lacking: list[int] = []  # bytes that a checkpoint may need, beyond what the disk has left

    def look() -> None:
        disk = os.statvfs(outbox)
        lacking.append(file_size(outbox / "outbox.db-wal") - disk.f_bavail * disk.f_frsize)

    accepted = fill(client, "a", 300, look)
    print(f"{len(accepted)} accepted; at the most {max(lacking)} bytes of the WAL had no room in the database")
    assert 0 < max(lacking) < DISK // 4, "a checkpoint may need more than the reserve has"
    assert len(accepted) > 2_000, "the reserve and the WAL leave little of the disk"
    full = [error for error in errors if isinstance(error, StorageError)]
    assert {error.code for error in full} == {"SQLITE_FULL"}
    assert len([record for record in caplog.records if "can't be written" in record.getMessage()]) == 1
    receiver.start()
    assert client.flush(PATIENCE) is True
    assert set(accepted) <= set(arrived(receiver)), "an event was lost"
    wait_until(lambda: is_accepted(client, "later"))
    assert (outbox / "outbox.reserve").exists()
    receiver.stop()
    for number in range(len(accepted) * 9 // 10):
        wait_until(lambda number=number: is_accepted(client, f"b-{number}"))  # type: ignore[misc]
    receiver.start()
    assert client.flush(PATIENCE) is True
    assert {f"b-{n}" for n in range(len(accepted) * 9 // 10)} <= set(arrived(receiver))
    stats = client.stats()
    assert stats.balanced
    assert stats.accepted == len(receiver.unique), "what was refused is not there"


@pytest.mark.parametrize(("disk", "size"), [(1 << 20, 1 << 18), (2 << 20, 1 << 19), (16 << 20, RESERVE_BYTES)])
def test_the_reserve_is_a_quarter_of_a_small_disk(make_disk: Callable[[int], Path], disk: int, size: int) -> None:
    with contextlib.closing(Outbox(make_disk(disk) / "outbox", SystemClock())) as outbox:
        found = (outbox.db.folder / "outbox.reserve").stat()
        assert outbox.db.reserve.size == size == found.st_size == found.st_blocks * 512


def test_another_program_fills_the_disk_with_a_backlog_waiting(
    make_disk: Callable[[int], Path], make_full: Callable[..., Client], receiver: Receiver
) -> None:
    disk = make_disk(DISK)
    receiver.stop()
    client = make_full(disk / "outbox")
    accepted = [f"a-{n}" for n in range(1_500) if client.track("u", "e", {"f": "x" * 400}, message_id=f"a-{n}")[0]]
    assert len(accepted) == 1_500
    use_up(disk / "theirs")
    accepted += fill(client, "b")
    receiver.start()
    assert client.flush(PATIENCE) is True
    assert set(accepted) <= set(arrived(receiver))
    (disk / "theirs").unlink()
    wait_until(lambda: is_accepted(client, "later"))
    assert client.flush(PATIENCE) is True
    assert "later" in arrived(receiver)


def test_delivery_frees_the_reserve_where_another_program_took_all_space_while_nothing_was_tracked(
    make_disk: Callable[[int], Path], make_full: Callable[..., Client], receiver: Receiver
) -> None:
    """The WAL has no bytes to write into again, and no put is refused that would have somebody look for space."""
    disk = make_disk(DISK)
    receiver.stop()
    client = make_full(disk / "outbox")
    tracked = [f"a-{n}" for n in range(1_500)]
    assert all(client.track("u", "e", {"f": "x" * 400}, message_id=each)[0] for each in tracked)
    assert client._engine is not None
    client._engine.outbox.db.wal.checkpoint(truncate=True)
    use_up(disk / "theirs")
    receiver.start()
    assert client.flush(PATIENCE) is True
    assert arrived(receiver) == tracked
    (disk / "theirs").unlink()
    wait_until(lambda: is_accepted(client, "later"))
    assert (disk / "outbox" / "outbox.reserve").exists()


def use_up(path: Path) -> None:
    """Write a file until the disk is full."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                pass


def test_a_process_that_starts_on_a_full_disk_delivers(
    make_disk: Callable[[int], Path], make_full: Callable[..., Client], receiver: Receiver
) -> None:
    """Opening needs space for the WAL's shared memory; the last process was killed."""
    disk = make_disk(DISK)
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from segment_durable import Client\n"
        "client = Client('test-key', sys.argv[2], outbox_dir=Path(sys.argv[1]), deliver=False)\n"
        "for n in range(1000):\n"
        "    assert client.track('u', 'e', {'f': 'x' * 400}, message_id=f'a-{n}')[0]\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-W", "error", "-c", program, disk / "outbox", receiver.url]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    (disk / "outbox" / "outbox.db-shm").unlink()
    use_up(disk / "theirs")
    receiver.stop()
    client = make_full(disk / "outbox")
    accepted = fill(client, "b")
    receiver.start()
    assert client.flush(PATIENCE) is True
    assert {*accepted, *(f"a-{n}" for n in range(1000))} <= set(arrived(receiver))
    (disk / "theirs").unlink()
    wait_until(lambda: is_accepted(client, "later"))


WRITER = """
import sys, time
from pathlib import Path
from segment_durable import Client
client = Client("test-key", sys.argv[2], outbox_dir=Path(sys.argv[1]), deliver=False, max_queue_size=0)
number = 0
def track(then):
    global number
    taken = client.track("u", "e", {"f": "x" * 400}, message_id=f"{sys.argv[3]}-{number}")[0]
    if taken:
        print(f"{sys.argv[3]}-{number}", flush=True)
    number += 1
    return taken is then
refused = 0
while refused < 200:
    refused += track(False)
print("full", flush=True)
sys.stdin.readline()
end, accepted = time.monotonic() + 60, 0
while accepted < 50 and time.monotonic() < end:
    accepted += track(True)
print("again" if accepted == 50 else "never", flush=True)
sys.stdin.readline()
client.shutdown(0)
"""


def test_several_processes_agree_that_the_disk_is_full(
    make_disk: Callable[[int], Path], make_full: Callable[..., Client], receiver: Receiver
) -> None:
    disk = make_disk(DISK)
    writers = []
    for name in "ab":
        command = [sys.executable, "-W", "error", "-c", WRITER, disk / "outbox", receiver.url, name]
        writers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    accepted: list[str] = []

    def read_until(writer: subprocess.Popen[str], word: str) -> int:
        assert writer.stdout is not None
        before = len(accepted)
        while (line := writer.stdout.readline().strip()) != word:
            assert line not in ("", "never")
            accepted.append(line)
        return len(accepted) - before

    try:
        assert sum(read_until(writer, "full") for writer in writers) > 2_000
        client = make_full(disk / "outbox")
        assert client.flush(PATIENCE) is True
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("go on\n")
            writer.stdin.flush()
        assert [read_until(writer, "again") for writer in writers] == [50, 50]
        for writer in writers:
            writer.communicate("end\n", timeout=PATIENCE)
            assert writer.returncode == 0
        assert client.flush(PATIENCE) is True
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    assert set(accepted) <= set(arrived(receiver))
    assert client.stats().balanced


def test_puts_never_delete_the_reserve_and_a_missing_one_stops_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space, "LOOK_SECONDS", 0.0)
    outbox = Outbox(tmp_path / "outbox", SystemClock())
    reserve = tmp_path / "outbox" / "outbox.reserve"
    found = reserve.stat()
    assert found.st_size == found.st_blocks * 512 == RESERVE_BYTES
    assert stat.S_IMODE(found.st_mode) == 0o600
    outbox.db.admission.note(StorageError("full", "SQLITE_FULL"))
    assert reserve.exists()
    assert outbox.put(b"1", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Reserve, "room", lambda self: RESERVE_BYTES)  # another process has freed it, and nothing is left
        reserve.unlink()
        accepted = put_until_refused(outbox)
        assert 0 < accepted < 1_000
        for _ in range(20):
            with pytest.raises(StorageError, match="the disk is full"):
                outbox.put(b"1", 1)
        assert outbox.pending() == 1 + accepted
        assert not reserve.exists()
        reserve.write_bytes(bytes(RESERVE_BYTES))  # as the process does that freed it
        assert outbox.put(b"1", 1)
        reserve.unlink()
        assert put_until_refused(outbox) < 1_000
    assert outbox.put(b"1", 1), "there is room"
    assert reserve.stat().st_size == RESERVE_BYTES
    outbox.close()


def put_until_refused(outbox: Outbox) -> int:
    for accepted in range(10_000):
        try:
            outbox.put(b'"%b"' % (b"x" * 1_000), 1)
        except StorageError:
            return accepted
    raise AssertionError("nothing is refused")


def test_the_last_pages_of_the_largest_file_are_for_delivery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where RLIMIT_FSIZE bounds the database: an event that is refused by itself takes more space than it leaves."""
    monkeypatch.setattr("segment_durable.reserve._file_limit", lambda: 1 << 20)
    with contextlib.closing(Outbox(tmp_path / "outbox", SystemClock())) as outbox:
        limit = (1 << 20) // PAGE_SIZE
        waiting = put_until_refused(outbox)
        lease = outbox.lease(10, 60)
        assert isinstance(lease, Lease)
        for event_id in range(lease.first, lease.last + 1):
            answer = "x" * 4_000
            assert outbox.bury(lease, event_id, status=400, code="no", answer=answer, max_dead=100) is True
        grown = sum(outbox.db.pages())
        assert limit - SPARE_PAGES < grown <= limit, "without the last pages it would not have been possible"
        monkeypatch.setattr(space, "LOOK_SECONDS", 0.0)
        while isinstance(lease := outbox.lease(500, 60), Lease):
            assert outbox.ack(lease, lease.last)
        assert put_until_refused(outbox) > waiting // 2
        assert sum(outbox.db.pages()) <= grown, "puts take no more of them"


def test_while_the_disk_is_full_space_is_not_looked_for_at_each_put(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[float] = []
    now = 1_000.0
    real = Wal.checkpoint

    def checkpoint(self: Wal, *, truncate: bool = False) -> bool:
        looks.append(now)
        return real(self, truncate=truncate)

    def refused(times: int) -> int:
        looks.clear()
        for _ in range(times):
            with pytest.raises(StorageError, match="full"):
                outbox.put(b"1", 1)
        return len(looks)

    with contextlib.closing(Outbox(tmp_path / "outbox", SystemClock())) as outbox:
        monkeypatch.setattr(Wal, "checkpoint", checkpoint)
        monkeypatch.setattr(space, "time", SimpleNamespace(monotonic=lambda: now))
        with monkeypatch.context() as patch:
            patch.setattr(Reserve, "room", lambda self: 0)
            outbox.db.admission.note(StorageError("full", "SQLITE_FULL"))
            assert refused(50) == 1
            now += space.LOOK_SECONDS * 0.99
            assert refused(50) == 0
            now += space.LOOK_SECONDS * 0.02
            assert refused(50) == 1
        assert refused(50) == 0
        now += space.LOOK_SECONDS
        assert outbox.put(b"1", 1)


def test_a_checkpoint_that_finds_the_disk_full_frees_the_reserve(make_disk: Callable[[int], Path]) -> None:
    disk = make_disk(DISK)
    with contextlib.closing(Outbox(disk / "outbox", SystemClock())) as outbox:
        for _ in range(200):
            assert outbox.put(b'"%b"' % (b"x" * 1_000), 1)
        before = file_size(outbox.db.path)
        use_up(disk / "theirs")
        assert outbox.db.wal.checkpoint() is True
        assert file_size(outbox.db.path) > before + 200_000
        assert not outbox.db.reserve.exists()


LIMITED = """
import json, os, resource, sys, time
from pathlib import Path
limit = int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from segment_durable import Client
from segment_durable.testing import Receiver
with Receiver() as receiver:
    receiver.stop()
    settings = dict(outbox_dir=Path(sys.argv[1]), max_queue_size=0, upload_interval=0.01)
    client = Client("test-key", receiver.url, **settings)
    rounds = []
    for name in "abc":
        accepted = []
        refused = number = 0
        while refused < 50:
            if client.track("u", "e", {"f": "x" * 400}, message_id=f"{name}-{number}")[0]:
                accepted.append(f"{name}-{number}")
            else:
                refused += 1
            number += 1
        receiver.start()
        assert client.flush(60) is True
        assert set(accepted) <= {event["messageId"] for event in receiver.unique}
        receiver.stop()
        end = time.monotonic() + 60
        while not client.track("u", "e")[0]:
            assert time.monotonic() < end, "nothing is accepted any more"
        rounds.append(len(accepted))
    largest = max(each.stat().st_size for each in Path(sys.argv[1]).iterdir())
    client.shutdown(0)
print(json.dumps([rounds, largest]))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no RLIMIT_FSIZE")
@pytest.mark.parametrize("limit", [1 << 20, 3 << 20])
def test_where_files_may_not_grow_beyond_a_limit_delivery_goes_on(tmp_path: Path, limit: int) -> None:
    command = [sys.executable, "-W", "error", "-c", LIMITED, tmp_path / "outbox", "-", str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rounds, largest = json.loads(done.stdout)
    assert min(rounds) > limit / 3_000
    assert largest <= limit
