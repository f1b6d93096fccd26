"""What lies beside a sound database and is damaged: the shared memory, the lock file, the reserve.

None of them holds an event, so none is lost, and no call is refused.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from segment_durable.outbox import Outbox
from segment_durable.quarantine import kept_sets
from segment_durable.records import Lease, NotNow
from segment_durable.testing.clock import FakeClock

from .common import bodies
from .workers import Worker

MakeOutbox = Callable[..., Outbox]
MakeWorker = Callable[..., Worker]

BEFORE = [b'{"before":%d}' % number for number in range(50)]


def garbage(size: int) -> bytes:
    return random.Random(1).randbytes(size)


def rewrite(path: Path, content: bytes) -> None:
    """In the same file: who has it open sees that."""
    with path.open("r+b") as file:
        file.truncate(0)
        file.write(content)


def put_all(worker: Worker) -> None:
    for body in BEFORE:
        assert worker.call("put", body, 1)


def check_all_is_there(outbox: Outbox, *more: bytes) -> None:
    assert bodies(outbox) == [*BEFORE, *more]
    stats = outbox.stats()
    assert stats.balanced
    assert stats.pending == stats.accepted == len(BEFORE) + len(more)
    assert kept_sets(outbox.db.folder) == {}


@pytest.mark.parametrize("size", [0, 100, 32_768, 200_000])
def test_garbage_in_the_shared_memory_that_nobody_has_open(
    worker_factory: MakeWorker, outbox_factory: MakeOutbox, folder: Path, size: int
) -> None:
    """A process that was killed leaves it behind, and all events are in the WAL only."""
    worker = worker_factory()
    put_all(worker)
    worker.kill()
    assert (folder / "outbox.db-wal").stat().st_size > 0
    rewrite(folder / "outbox.db-shm", garbage(size))
    outbox = outbox_factory()
    check_all_is_there(outbox)
    assert outbox.put(b"{}", 1)
    outbox.close()
    check_all_is_there(outbox_factory(), b"{}")


@pytest.mark.parametrize("content", [b"", garbage(3000)], ids=["empty", "garbage"])
def test_a_damaged_lock_file_that_nobody_has_open(
    worker_factory: MakeWorker, outbox_factory: MakeOutbox, folder: Path, content: bytes
) -> None:
    worker = worker_factory()
    put_all(worker)
    worker.kill()
    rewrite(folder / "outbox.lock", content)
    outbox, other = outbox_factory(), worker_factory()
    check_all_is_there(outbox)
    assert other.call("put", b"{}", 1)
    check_all_is_there(outbox, b"{}")


@pytest.mark.parametrize("content", [b"", garbage(3000)], ids=["empty", "garbage"])
def test_a_lock_file_that_is_damaged_while_another_process_has_it_open(
    worker_factory: MakeWorker, outbox_factory: MakeOutbox, folder: Path, content: bytes
) -> None:
    """The locks are the kernel's and not in the file: a lease lives on, and dies with its holder."""
    worker = worker_factory()
    put_all(worker)
    lease = worker.call("lease", 10, 1_000)
    assert isinstance(lease, Lease)
    worker.call("db.lock.raise_generation")  # as after damage, so that there is something to be truncated
    assert worker.call("last_id") == len(BEFORE)
    rewrite(folder / "outbox.lock", content)
    outbox = outbox_factory()
    check_all_is_there(outbox)
    assert isinstance(outbox.lease(10, 60), NotNow)
    more = []
    for number in range(5):
        more += [b'{"theirs":%d}' % number, b'{"ours":%d}' % number]
        assert worker.call("put", more[-2], 1)
        assert outbox.put(more[-1], 1)
    check_all_is_there(outbox, *more)
    assert worker.call("ack", lease, lease.first) == 1
    worker.kill()
    taken = outbox.lease(100, 60)
    assert isinstance(taken, Lease)
    assert (taken.first, taken.last) == (lease.first + 1, len(BEFORE) + len(more))
    assert outbox.ack(taken, taken.last) == len(BEFORE) + len(more) - 1
    assert outbox.stats().balanced


def test_a_damaged_lock_file_while_another_process_has_the_writer_lock(
    worker_factory: MakeWorker, folder: Path, clock: FakeClock
) -> None:
    worker, other = worker_factory(), worker_factory()
    put_all(worker)
    worker.call("db.lock.acquire", 5.0)
    rewrite(folder / "outbox.lock", garbage(3000))
    other.send("put", b"{}", 1)
    worker.call("put", b'{"first":1}', 1)
    assert not other.has_answered()
    worker.call("db.lock.release")
    assert other.receive()
    last = other.call("rows", len(BEFORE) + 1, 1_000)
    assert [row.body for row in last] == [b'{"first":1}', b"{}"]


@pytest.mark.parametrize("inside", [[], ["something"]], ids=["empty", "with a file"])
@pytest.mark.parametrize("is_open", [False, True], ids=["nobody", "another process"])
def test_a_folder_in_the_place_of_the_reserve(
    worker_factory: MakeWorker, outbox_factory: MakeOutbox, folder: Path, inside: list[str], is_open: bool
) -> None:
    """It keeps no space, but a disk that is not full needs none."""
    worker = worker_factory()
    put_all(worker)
    if not is_open:
        worker.kill()
    reserve = folder / "outbox.reserve"
    os.unlink(reserve)
    reserve.mkdir()
    for name in inside:
        (reserve / name).touch()
    outbox = outbox_factory()
    check_all_is_there(outbox)
    assert outbox.put(b"{}", 1)
    lease = outbox.lease(1, 60)
    assert isinstance(lease, Lease)
    assert outbox.ack(lease, 1) == 1
    if is_open:
        assert worker.call("put", b"{}", 1)
    assert outbox.stats().balanced
    assert [each.name for each in reserve.iterdir()] == inside


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has locks that outlive such a copy")
@pytest.mark.parametrize("others", [0, 1], ids=["its only outbox", "and has closed another"])
def test_files_copied_by_a_process_that_has_them_open(
    worker_factory: MakeWorker, outbox_factory: MakeOutbox, folder: Path, tmp_path: Path, others: int
) -> None:
    """Closing a copied file drops all POSIX locks of the process on it: the next one to close is not the last one."""
    outbox = outbox_factory()
    assert outbox.put(BEFORE[0], 1)
    for _ in range(others):
        outbox_factory().close()
    shutil.copytree(folder, tmp_path / "backup")
    other = worker_factory()
    assert other.call("put", BEFORE[1], 1)
    other.close()
    assert (folder / "outbox.db-wal").exists()
    assert outbox.put(BEFORE[2], 1)
    for _ in range(2):  # the first one opens what the others have open, the second what they have left
        assert bodies(outbox) == BEFORE[:3]
        reader = worker_factory()
        assert [row.body for row in reader.call("rows", 0, 100)] == BEFORE[:3]
        reader.close()
        outbox.close()
        outbox = outbox_factory()
    outbox.close()
    assert not (folder / "outbox.db-wal").exists()


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="only Linux tells by a folder")
def test_an_outbox_that_is_closed_leaves_no_descriptor(outbox_factory: MakeOutbox) -> None:
    open_ones = []
    for _ in range(3):
        outbox = outbox_factory()
        assert outbox.put(BEFORE[0], 1)
        outbox.close()
        open_ones.append(len(os.listdir("/proc/self/fd")))
    assert len({*open_ones}) == 1
