"""A lock on one byte of a file, between processes: the kernel lets go of it however its holder ends."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial

__all__ = ["TAKEN", "above_stderr", "locker", "try_lock", "unlocker"]

try:
    import fcntl
except ModuleNotFoundError:  # Windows; not where it can't be loaded just now
    import msvcrt

    def _lock(fd: int, byte: int) -> None:
        os.lseek(fd, byte, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
        except OSError as problem:
            if problem.errno in (errno.EACCES, errno.EDEADLK):
                raise BlockingIOError(errno.EAGAIN, "locked by another process") from problem
            raise

    def _unlock(fd: int, byte: int) -> None:
        os.lseek(fd, byte, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined, unused-ignore]

    def above_stderr(fd: int) -> int:
        return fd

    def locker(fd: int, byte: int) -> Callable[[], None]:
        return partial(_lock, fd, byte)

    def unlocker(fd: int, byte: int) -> Callable[[], None]:
        return partial(_unlock, fd, byte)

else:

    def above_stderr(fd: int) -> int:
        """The same file under a number of its own: where stdout was closed it has that one's, and is printed to."""
        if fd > 2:
            return fd
        try:
            return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
        finally:
            os.close(fd)

    # What is called for each put goes straight to the system.

    def locker(fd: int, byte: int) -> Callable[[], None]:
        return partial(fcntl.lockf, fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)

    def unlocker(fd: int, byte: int) -> Callable[[], None]:
        return partial(fcntl.lockf, fd, fcntl.LOCK_UN, 1, byte)


TAKEN = (BlockingIOError, PermissionError)  # by another process; POSIX allows EACCES in the place of EAGAIN


def try_lock(fd: int, byte: int) -> bool:
    """Lock that byte; False if another process has it.  Raises `OSError` for any other reason."""
    try:
        locker(fd, byte)()
    except TAKEN:
        return False
    return True
