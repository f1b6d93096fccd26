"""The reserve by itself: when there is room for it, and that it really takes the space that it is to keep."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from segment_durable.reserve import RESERVE_BYTES, Reserve

pytestmark = pytest.mark.skipif(not hasattr(os, "statvfs"), reason="this system has no statvfs")

BLOCK = 4096
MARGIN = RESERVE_BYTES // 4
LARGE = 1 << 30
SetDisk = Callable[..., None]


@pytest.fixture
def reserve(tmp_path: Path) -> Reserve:
    return Reserve(tmp_path)


@pytest.fixture
def set_disk(monkeypatch: pytest.MonkeyPatch) -> SetDisk:
    """`set_disk(free)`: what statvfs says from now on, in bytes; for root so much more than for others."""

    def set_to(free: int, *, size: int = LARGE, for_root: int = 0) -> None:
        found = SimpleNamespace(
            f_frsize=BLOCK, f_blocks=size // BLOCK, f_bavail=free // BLOCK, f_bfree=(free + for_root) // BLOCK
        )
        monkeypatch.setattr(os, "statvfs", lambda path: found)

    return set_to


def is_made(reserve: Reserve, folder: Path) -> bool:
    """Make it; whether it is there, and then as large as it should be, on the disk as well."""
    made = reserve.make()
    assert made is reserve.exists()
    if made:
        found = (folder / "outbox.reserve").stat()
        assert found.st_size == reserve.size <= found.st_blocks * 512
    else:
        assert list(folder.iterdir()) == []
    return made


def test_there_has_to_be_room_for_it_and_for_a_quarter_more(
    reserve: Reserve, set_disk: SetDisk, tmp_path: Path
) -> None:
    set_disk(RESERVE_BYTES + MARGIN - BLOCK)
    assert reserve.is_needed()
    assert not is_made(reserve, tmp_path)
    set_disk(RESERVE_BYTES + MARGIN)
    assert not reserve.is_needed()
    assert is_made(reserve, tmp_path)


def test_beside_it_a_quarter_of_its_size_is_enough(reserve: Reserve, set_disk: SetDisk, tmp_path: Path) -> None:
    assert is_made(reserve, tmp_path)
    set_disk(MARGIN)
    assert not reserve.is_needed()
    set_disk(MARGIN - BLOCK)
    assert reserve.is_needed()
    assert reserve.make(), "it is there"
    assert reserve.free()
    assert not reserve.exists()
    assert not reserve.free(), "it was not there any more"


@pytest.mark.parametrize("user", [0, 1000])
def test_the_space_that_is_kept_for_root_is_roots_only(
    reserve: Reserve, set_disk: SetDisk, monkeypatch: pytest.MonkeyPatch, user: int
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    set_disk(BLOCK, for_root=LARGE // 2)
    assert reserve.room() == BLOCK + (0 if user else LARGE // 2)
    assert reserve.is_needed() is bool(user)


def test_of_a_small_disk_it_takes_a_quarter(reserve: Reserve, set_disk: SetDisk) -> None:
    set_disk(0, size=1 << 20)
    assert reserve.size == 1 << 18
    set_disk(0)
    assert reserve.size == 1 << 18, "the same for as long as the outbox is open"


def a_refusal(path: Path) -> os.statvfs_result:
    raise OSError(errno.ENOSYS, "Function not implemented")


@pytest.mark.parametrize("says", ["nothing", "that it has no size"])
def test_a_filesystem_that_does_not_tell_its_size_is_taken_for_large(
    reserve: Reserve, set_disk: SetDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str
) -> None:
    if says == "nothing":
        monkeypatch.setattr(os, "statvfs", a_refusal)
    else:
        set_disk(0, size=0)
    assert is_made(reserve, tmp_path)
    assert reserve.size == RESERVE_BYTES


@pytest.fixture
def without_fallocate(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)


@pytest.mark.usefixtures("without_fallocate")
def test_where_space_can_not_be_asked_for_it_is_written(reserve: Reserve, tmp_path: Path) -> None:
    assert is_made(reserve, tmp_path)
    assert (tmp_path / "outbox.reserve").read_bytes() == bytes(RESERVE_BYTES)


@pytest.mark.usefixtures("without_fallocate")
def test_nothing_is_left_of_it_if_the_disk_becomes_full_while_it_is_made(
    reserve: Reserve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = os.write, 0

    def write(fd: int, data: bytes) -> int:
        nonlocal written
        written += len(data)
        if written > RESERVE_BYTES // 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    assert not is_made(reserve, tmp_path)


def test_where_no_file_can_be_made_there_is_none(
    reserve: Reserve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        made = reserve.make()
    assert made is reserve.exists() is False
