"""The locks that say that an outbox's database is open, where SQLite's own are not enough.

SQLite holds one on the database and one on its shared memory for as long as a connection is open.  Whoever sees neither
takes the database for unused, and deletes the WAL.  They are POSIX record locks, and a process loses all of those that
it has on a file when it closes any descriptor of it, as one does that copies the outbox's files; and a forked child has
none of its parent's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias
from weakref import WeakSet

try:
    from fcntl import F_OFD_SETLK, F_RDLCK, F_UNLCK, fcntl
except ImportError:
    _HAS_LOCKS_OF_DESCRIPTORS = False  # macOS and Windows: SQLite's are all that there is
else:
    _HAS_LOCKS_OF_DESCRIPTORS = True

__all__ = ["Files", "abandon", "close_unused", "hold", "hold_inherited", "identify", "let_go"]

_File: TypeAlias = tuple[int, int]
Files: TypeAlias = tuple[_File, _File]
"""Which files the database and its shared memory are: device and number of each."""

# Where SQLite's locks are: the shared one of a database, and the "deadman switch" of a shared memory.
_RANGES = (("", 0x40000002, 510), ("-shm", 128, 1))


def identify(path: Path) -> Files:
    """The files of the database at `path`, to which a connection is open."""
    database, memory = os.stat(path), os.stat(f"{path}-shm")
    return (database.st_dev, database.st_ino), (memory.st_dev, memory.st_ino)


# -- beside a copy in this process


class _Hold:
    """A descriptor with a lock that belongs to it, and not to the process: no other one's end ends it."""

    def __init__(self, fd: int, first: int, length: int) -> None:
        self.fd = fd
        self.owners: WeakSet[object] = WeakSet()
        self._range = first, length

    def lock(self) -> None:
        self._set(F_RDLCK)

    def unlock(self) -> None:
        self._set(F_UNLCK)

    def _set(self, kind: int) -> None:
        with contextlib.suppress(OSError):  # not every filesystem has it
            fcntl(self.fd, F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, *self._range, 0))


_holds: dict[_File, _Hold] = {}
_haunted: set[_File] = set()  # with a lock of `hold_inherited` on it: no descriptor of it may be closed


def hold(path: Path, files: Files, owner: object) -> None:
    """Lock them for `owner` as well, who has just opened a connection, until it lets go of them.

    Under the outbox's mutex, as all of these.
    """
    if not _HAS_LOCKS_OF_DESCRIPTORS:
        return
    for (suffix, first, length), file in zip(_RANGES, files):
        known = _holds.get(file)
        if known is None:
            try:
                # Not for writing: where stdout was closed this may get its number, and must not be printed into.
                fd = os.open(f"{path}{suffix}", os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            except OSError:
                continue  # there are too many open
            known = _holds[file] = _Hold(fd, first, length)  # whatever comes: closing it would end SQLite's own locks
        known.owners.add(owner)
        known.lock()


def let_go(files: Iterable[_File], owner: object) -> None:
    """To be called before the owner's connections are closed, or SQLite would not see that they are the last ones."""
    for known in map(_holds.get, files):
        if known is not None:
            known.owners.discard(owner)
            if not known.owners:
                known.unlock()


def close_unused(files: Iterable[_File]) -> None:
    """To be called after they were closed: with the descriptors SQLite's locks end."""
    for file in files:
        known = _holds.get(file)
        if known is not None and not known.owners and file not in _haunted:
            del _holds[file]
            os.close(known.fd)


def abandon() -> dict[_File, _Hold]:
    """In a forked child: forget the parent's.  To be kept: closing one would end locks that the child takes."""
    global _holds
    inherited, _holds = _holds, {}
    return inherited


# -- after a fork


def hold_inherited(path: Path, files: Files) -> list[int]:
    """In a child forked while a connection was open to those `files`: take the two locks that SQLite believes in here.

    SQLite keeps the number of its POSIX locks in memory, which the child inherits; the locks themselves it does not.
    A connection opened in the child therefore takes neither the shared lock on the database nor the one on the shared
    memory, and another process that closes or opens the database takes it for unused, and deletes the WAL.  The
    descriptors are returned and must stay open for as long as the process lives: closing them drops the locks.

    Raises `OSError` if the locks can't be had, or too late: when the last of the others closed the database it deleted
    the shared memory, and a connection opened here would go on with the inherited one, which nobody else sees.
    """
    if os.name == "nt":
        return []
    import fcntl

    held: list[int] = []
    try:
        # In this order: nobody deletes the shared memory once the database is locked.
        for (suffix, first, length), wanted in zip(_RANGES, files):
            fd = os.open(f"{path}{suffix}", os.O_RDONLY | os.O_CLOEXEC)
            held.append(fd)
            found = os.fstat(fd)
            if (found.st_dev, found.st_ino) != wanted:
                if len(held) == 1:
                    return held  # another database has taken its place, of which SQLite remembers nothing
                raise OSError(errno.ESTALE, "all others have closed it since the fork")
            _haunted.add(wanted)
            fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB, length, first)
    except OSError as problem:
        for fd in held:
            os.close(fd)
        if isinstance(problem, FileNotFoundError):
            if not held:
                return held  # another database will be made
            raise OSError(errno.ESTALE, "all others have closed it since the fork") from problem
        raise
    return held
