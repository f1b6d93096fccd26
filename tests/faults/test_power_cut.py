"""The power goes: ext4 on a loop device is shut down without writing its journal, while processes write.

What the filesystem has in memory is lost with that, as in a power cut; what was synced is there.
"""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from segment_durable.clock import SystemClock
from segment_durable.outbox import Outbox
from segment_durable.records import Lease

from .conftest import mount, unmount

pytestmark = pytest.mark.timeout(300)

EXT4_IOC_SHUTDOWN = 0x8004587D
NO_LOG_FLUSH = 2
DISK = 1 << 30  # a sparse file
PATIENCE = 60.0

# Beside its name and number each event has the time at which its call returned, on the clock of all processes.
WRITER = """
import itertools, os, sys, time
from pathlib import Path
from segment_durable import Client
client = Client("test-key", "http://127.0.0.1:9", outbox_dir=Path(sys.argv[1]), deliver=False, max_queue_size=0,
                synchronous=sys.argv[2])
for number in itertools.count():
    name = f"{sys.argv[3]}-{number}"
    if not client.track("u", "e", message_id=name)[0]:
        os._exit(0)  # the disk is gone
    os.write(1, f"{name} {time.monotonic()}\\n".encode())
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

    def cut(self) -> None:
        """From here on nothing reaches the disk, and what had not reached it is lost."""
        import fcntl

        fd = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(fd)

    def restart(self) -> None:
        """Once nothing is open there any more: unmount, and mount it as after a start of the machine."""
        subprocess.run(["umount", self.folder], check=True, capture_output=True, timeout=60)
        self.mount()

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
        lease = outbox.lease(1 << 30, 60)
        assert isinstance(lease, Lease)
        assert outbox.ack(lease, lease.last) == len(found) + 1
    return found


@pytest.mark.parametrize("synchronous", ["FULL", "NORMAL"])
def test_what_a_power_cut_takes(disk: Disk, processes: Processes, synchronous: str, long: bool) -> None:
    for round_ in range(8 if long else 2):
        folder = disk.folder / f"outbox-{round_}"
        first = len(processes.lines)
        for name in "abc":
            processes.start(WRITER, folder, synchronous, f"{name}{round_}")

        def is_enough(lines: list[bytes], first: int = first) -> bool:
            """All write, some checkpoints were made, and there is something older than what may be lost."""
            new = lines[first:]
            times = [float(line.split()[1]) for line in (new[:1] + new[-1:])]
            return len(new) > 300 and times[-1] - times[0] > 2.0 and len({line[:1] for line in new}) == 3

        processes.wait_for(is_enough)
        cut_begins = time.monotonic()
        disk.cut()
        processes.end()
        disk.restart()
        acknowledged = {}
        for line in processes.lines[first:]:
            name, returned = line.decode().split()
            acknowledged[name] = float(returned)
        found = set(events(folder))
        # Between the beginning of the cut and the end of the process a sync may still be told that it went well.
        lost = sorted(name for name, at in acknowledged.items() if name not in found and at < cut_begins)
        oldest = max((cut_begins - acknowledged[name] for name in lost), default=0.0)
        if synchronous == "FULL":
            assert lost == []
        else:
            assert oldest < 1.0, f"lost: {lost[:10]}"
        # One call of each process was under way.
        assert len(found - set(acknowledged)) <= 3, "events are there that were never acknowledged"


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
