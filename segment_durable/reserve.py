"""The reserve: a file that keeps space for delivery on a full disk.

Removing events needs space, too: each ack is written to the WAL, and a checkpoint may let the database grow.  So a
file of that much space lies beside the database.  When a write of a sender's or a checkpoint finds the disk full the
file is deleted; puts never get at its space.  While it is gone no put is accepted, in no process: that the file is
there is the truth for all of them.  It is deleted and made under the writer lock only.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["RESERVE_NAME", "Reserve"]

RESERVE_NAME = "outbox.reserve"
RESERVE_BYTES = 1 << 20
_SHARE = 4  # no more than one part of so many of the filesystem, or of the largest file that the process may write
_UNKNOWN = 1 << 62


class Reserve:
    """The reserve of the outbox in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / RESERVE_NAME
        self.file_limit = _file_limit()  # bytes
        self._size = 0

    @property
    def size(self) -> int:
        """Bytes: the same for all processes of the filesystem, however much of it is free."""
        if not self._size:
            self._size = min(RESERVE_BYTES, min(_disk(self._folder)[0], self.file_limit) // _SHARE)
        return self._size

    @property
    def margin(self) -> int:
        """Bytes that must be free beside the reserve before puts are accepted again."""
        return self.size // 4

    def room(self) -> int:
        """How many bytes can be written: what the disk has left, or the largest file if that is less."""
        return min(_disk(self._folder)[1], self.file_limit)

    def exists(self) -> bool:
        return os.path.exists(self._path)

    def is_needed(self) -> bool:
        """Whether there is too little space for puts."""
        return self.room() < self.margin + (0 if self.exists() else self.size)

    def make(self) -> bool:
        """Make the file unless it is there; whether it is there now."""
        if self.exists():
            return True
        if self.is_needed():
            return False
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o600)
        except OSError:
            return False
        try:
            _allocate(fd, self.size)
        except OSError:
            self.free()
            return False
        finally:
            os.close(fd)
        return True

    def free(self) -> bool:
        """Delete the file; whether there was one."""
        try:
            os.unlink(self._path)
        except OSError:
            return False
        return True


def _allocate(fd: int, size: int) -> None:
    """Really: a file with a hole takes no space."""
    with contextlib.suppress(AttributeError, OSError):  # macOS and Windows; filesystems that can't
        os.posix_fallocate(fd, 0, size)
        return
    os.lseek(fd, 0, os.SEEK_SET)
    zeros = bytes(1 << 16)
    while size > 0:
        size -= os.write(fd, zeros[:size])


def _disk(folder: Path) -> tuple[int, int]:
    """The bytes that the filesystem has, and those that this user may still write."""
    try:
        if hasattr(os, "statvfs"):
            found = os.statvfs(folder)
            free = found.f_bavail if os.geteuid() else found.f_bfree
            total, free = found.f_blocks * found.f_frsize, free * found.f_frsize
        else:
            import shutil

            total, _, free = shutil.disk_usage(folder)
    except OSError:
        return _UNKNOWN, _UNKNOWN
    return (total, free) if total else (_UNKNOWN, _UNKNOWN)  # some filesystems of the user space don't say


def _file_limit() -> int:
    """The size that no file of this process may exceed (RLIMIT_FSIZE)."""
    try:
        import resource
    except ImportError:  # Windows
        return _UNKNOWN
    limit: int = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return _UNKNOWN if limit == resource.RLIM_INFINITY else limit
