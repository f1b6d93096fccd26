"""The power goes: ext4 on a loop device is shut down without writing its journal, while processes write.

What the filesystem has in memory is lost with that, as in a power cut; what was synced is there.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from segment_durable import upkeep
from segment_durable.clock import SystemClock
from segment_durable.outbox import Outbox
from segment_durable.records import Lease
from segment_durable.testing import Delay, Receiver

from .conftest import mount, unmount

pytestmark = pytest.mark.timeout(300)

EXT4_IOC_SHUTDOWN = 0x8004587D
NO_LOG_FLUSH = 2
DISK = 1 << 30  # a sparse file
PATIENCE = 60.0
CONTROL = b"x" * 50_000  # what is written and not synced just before each cut

BOUND = 1.0  # seconds of events that a cut may take with NORMAL: half of that is promised, and this machine is busy

# Beside its name and number each event has the time at which its call returned, on the clock of all processes.  When
# syncs began and ended goes into a file that no cut takes anything of.
WRITER = """
import itertools, json, os, sys, time
from pathlib import Path
from segment_durable import Client, upkeep, wal
folder, name, told = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
upkeep.SYNC_SECONDS = told["sync_seconds"]
syncs, real = os.open(told["syncs"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), wal.sync_file

def sync_file(fd):
    os.write(syncs, f"{name} {time.monotonic()}\\n".encode())
    real(fd)
    os.write(syncs, f"{name} ended\\n".encode())

wal.sync_file = sync_file
client = Client("test-key", told["host"] or "http://127.0.0.1:9", outbox_dir=Path(folder), deliver=bool(told["host"]),
                max_queue_size=0, upload_interval=0.01, synchronous=told["synchronous"])
for number in itertools.count():
    event = f"{name}-{number}"
    if not client.track("u", "e", message_id=event)[0]:
        os._exit(0)  # the disk is gone
    os.write(1, f"{event} {time.monotonic()}\\n".encode())
    time.sleep(told["pause"])
"""

CREATOR = """
import itertools, os, sys
from pathlib import Path
from segment_durable.clock import SystemClock
from segment_durable.errors import OutboxError
from segment_durable.outbox import Outbox
for number in itertools.count():
    try:
        outbox = Outbox(Path(sys.argv[1]) / str(number), SystemClock(), write_key="key")
        outbox.put(b"1", 1)
        outbox.db.wal.sync()
        os.write(1, f"{number}\\n".encode())
        if number % 2:
            outbox.close()
    except OutboxError:
        os._exit(0)
"""


class Disk:
    """An ext4 of its own, whose power can be cut."""

    def __init__(self, image: Path, folder: Path) -> None:
        self._image = image
        self.folder = folder
        self._device = ""

    def make(self) -> None:
        with self._image.open("wb") as file:
            file.truncate(DISK)
        for command in (["mkfs.ext4", "-q", "-F", self._image], ["losetup", "--find", "--show", self._image]):
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            except FileNotFoundError:
                pytest.skip(f"needs the command {command[0]}")
            if done.returncode:
                pytest.skip(f"{command[0]} can't be used here: {done.stderr.strip()}")
        self._device = done.stdout.strip()
        self.folder.mkdir()
        self.mount()

    def mount(self) -> None:
        mount("-t", "ext4", self._device, self.folder)

    def cut(self) -> float:
        """From here on nothing reaches the disk, and what had not reached it is lost; when that began."""
        import fcntl

        (self.folder / "unsynced").write_bytes(CONTROL)
        began = time.monotonic()
        fd = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(fd)
        return began

    def restart(self) -> None:
        """Once nothing is open there any more: unmount, and mount it as after a start of the machine."""
        subprocess.run(["umount", self.folder], check=True, capture_output=True, timeout=60)
        self.mount()
        unsynced = self.folder / "unsynced"
        assert not unsynced.exists() or unsynced.stat().st_size == 0, "it was no cut: it took nothing"
        unsynced.unlink(missing_ok=True)

    def remove(self) -> None:
        unmount(self.folder)
        if self._device:
            subprocess.run(["losetup", "-d", self._device], capture_output=True, check=False)
        self._image.unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if not sys.platform.startswith("linux"):
        pytest.skip("needs Linux")
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a filesystem and to shut it down")
    disk = Disk(tmp_path / "image", tmp_path / "disk")
    try:
        disk.make()
        yield disk
    finally:
        disk.remove()


class Processes:
    """Started programs, whose lines are read as they come."""

    def __init__(self) -> None:
        self._started: list[tuple[subprocess.Popen[bytes], threading.Thread]] = []
        self.lines: list[bytes] = []
        self._changed = threading.Condition()

    def start(self, program: str, *arguments: object) -> None:
        command = [sys.executable, "-W", "error", "-c", program, *map(str, arguments)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        thread = threading.Thread(target=self._read, args=(process,), daemon=True)
        self._started.append((process, thread))
        thread.start()

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.endswith(b"\n"):
                with self._changed:
                    self.lines.append(line)
                    self._changed.notify_all()

    def wait_for(self, condition: Callable[[list[bytes]], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self.lines), PATIENCE), "the processes came to nothing"

    def end(self) -> None:
        for process, thread in self._started:
            process.kill()
            process.wait()
            thread.join(PATIENCE)
            assert process.stdout is not None
            process.stdout.close()


@pytest.fixture
def processes(disk: Disk) -> Iterator[Processes]:
    processes = Processes()
    yield processes
    processes.end()


def events(folder: Path) -> list[str]:
    """The names of the events that an outbox has; it works, and its books balance."""
    outbox = Outbox(folder, SystemClock(), write_key="test-key")
    with contextlib.closing(outbox):
        with outbox.db.read() as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            found = [
                name
                for (name,) in connection.execute("SELECT body ->> '$.messageId' FROM event ORDER BY id").fetchall()
            ]
        stats = outbox.stats()
        assert stats.balanced
        assert stats.pending == len(found)
        assert outbox.put(b"{}", 1)
        left = 0
        while isinstance(
            lease := outbox.lease(1 << 30, 60), Lease
        ):  # what a process had that is dead now, and the rest
            left += outbox.ack(lease, lease.last) or 0
        assert left == len(found) + 1
    return found


@dataclass
class Cut:
    """What writers were told before a cut, and what the disk has after it."""

    began: float
    acknowledged: dict[str, float]  # the event, and when its call returned
    found: set[str]
    syncing: float | None = None  # since when a sync was under way, which the cut may have taken

    @property
    def lost(self) -> list[str]:
        """Between the beginning of the cut and the process's end a sync may still be told that it went well."""
        return sorted(e for e, at in self.acknowledged.items() if e not in self.found and at < self.began)

    @property
    def excused(self) -> list[str]:
        return sorted(e for e, at in self.acknowledged.items() if e not in self.found and at >= self.began)

    @property
    def oldest(self) -> float:
        """Seconds before the cut at which the oldest event that is lost was acknowledged."""
        return max((self.began - self.acknowledged[event] for event in self.lost), default=0.0)

    def told(self) -> str:
        """Whether nobody had begun to sync it, or the disk took long for that."""
        since = "no sync was" if self.syncing is None else f"a sync was for {self.began - self.syncing:.3f} s"
        return f"{since} under way at the cut; lost: {', '.join(self.lost[:10])}"

    def __str__(self) -> str:
        return (
            f"{len(self.acknowledged)} acknowledged, {len(self.found)} on the disk, {len(self.lost)} missing, the"
            f" oldest {self.oldest:.3f} s before the cut; {len(self.excused)} excused, acknowledged after its beginning"
        )


@pytest.fixture
def cut(disk: Disk, processes: Processes) -> Callable[..., Cut]:
    """Has writers of these names write for two seconds, and cuts the power."""
    count = 0

    def cut(
        names: str, synchronous: str, *, host: str = "", pause: float = 0.0, sync_seconds: float = upkeep.SYNC_SECONDS
    ) -> Cut:
        nonlocal count
        count += 1
        folder = disk.folder / f"outbox-{count}"
        syncs = disk.folder.with_name(f"syncs-{count}")
        told = {"synchronous": synchronous, "host": host, "pause": pause, "sync_seconds": sync_seconds}
        told["syncs"] = str(syncs)
        seconds = 2.0 + 0.25 * (count * 0.618 % 1)  # not always at the same time since the last sync
        first = len(processes.lines)
        for name in names:
            processes.start(WRITER, folder, f"{name}{count}", json.dumps(told))

        def is_enough(lines: list[bytes]) -> bool:
            """All write, and there is something older than what may be lost."""
            new = lines[first:]
            times = [float(line.split()[1]) for line in (new[:1] + new[-1:])]
            return len(new) > 200 and times[-1] - times[0] > seconds and len({line[:1] for line in new}) == len(names)

        processes.wait_for(is_enough)
        began = disk.cut()
        processes.end()
        disk.restart()
        acknowledged = {}
        for line in processes.lines[first:]:
            event, returned = line.decode().split()
            acknowledged[event] = float(returned)
        last = dict(line.split() for line in syncs.read_text().splitlines())
        syncing = min((float(at) for at in last.values() if at != "ended"), default=None)
        result = Cut(began, acknowledged, set(events(folder)), syncing)
        print(f"{synchronous}, pauses of {pause} s: {result}")
        # One call of each process was under way.
        assert len(result.found - set(acknowledged)) <= len(names), "events are there that were never acknowledged"
        return result

    return cut


def test_with_full_a_power_cut_takes_nothing(cut: Callable[..., Cut], long: bool) -> None:
    for _ in range(8 if long else 1):
        assert cut("abc", "FULL").lost == []


def test_with_full_what_is_not_on_the_disk_after_a_power_cut_has_arrived(
    cut: Callable[..., Cut], receiver: Receiver, long: bool
) -> None:
    receiver.always(Delay(0.02))  # or hardly an event waits when the cut comes
    for _ in range(4 if long else 1):
        result = cut("abc", "FULL", host=receiver.url)
        arrived = {event["messageId"] for event in receiver.unique}
        print(f"{len(arrived)} arrived, {len(arrived & result.found)} of them are still on the disk")
        assert [event for event in result.lost if event not in arrived] == []
        assert arrived & set(result.acknowledged)
        assert result.found


def test_with_normal_a_power_cut_takes_the_last_moment_at_most(cut: Callable[..., Cut], long: bool) -> None:
    """At full speed, where it is mostly the checkpoints that sync."""
    for _ in range(8 if long else 1):
        result = cut("abc", "NORMAL")
        assert result.oldest < BOUND, result.told()


def test_with_normal_and_few_events_a_power_cut_takes_the_last_moment_at_most(
    cut: Callable[..., Cut], long: bool
) -> None:
    """So few that no checkpoint is made: only the upkeep's syncs bound the loss.  Something has to be lost."""
    results = []
    while len(results) < (8 if long else 2) or not any(result.lost for result in results):
        results.append(cut("a", "NORMAL", pause=0.005))
        assert results[-1].oldest < BOUND, results[-1].told()
        assert len(results) < 10, "nothing was lost in any round: these cuts take nothing, and so show nothing"


def test_without_the_syncs_of_upkeep_a_power_cut_takes_more(cut: Callable[..., Cut]) -> None:
    """What shows that the tests above can fail."""
    assert cut("a", "NORMAL", pause=0.005, sync_seconds=3600.0).oldest > BOUND


def test_a_cut_while_outboxes_are_made_leaves_what_the_next_start_can_use(
    disk: Disk, processes: Processes, long: bool
) -> None:
    for round_ in range(20 if long else 4):
        folder = disk.folder / f"round-{round_}"
        first = len(processes.lines)
        processes.start(CREATOR, folder)
        processes.wait_for(lambda lines, first=first, count=3 + round_ % 7: len(lines) - first >= count)  # type: ignore[misc]
        disk.cut()
        processes.end()
        disk.restart()
        whole = [int(line) for line in processes.lines[first:]]
        for number in range(whole[-1] + 3):  # and the one that was being made, and one after it
            outbox = Outbox(folder / str(number), SystemClock(), write_key="key")
            with contextlib.closing(outbox):
                bodies = [row.body for row in outbox.rows(0, 1 << 60)]
                assert bodies == [b"1"] or number not in whole, "what was synced is lost"
                assert outbox.put(b"2", 1)
