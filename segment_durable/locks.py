"""The lock file of an outbox: the writer lock, and a sign of life for each process.

Byte 0 is the writer lock, and byte 1 is locked by one of those who wait for it.  Each process that may hold leases
locks one more byte, its slot, for as long as it lives; the kernel lets go of it however the process ends, so a locked
slot means a living holder.

POSIX record locks are used rather than flock: an flock lives on in a forked child of a dead holder.  They have a trap
of their own: a process loses all of them when it closes any descriptor of the file.  So a process opens the file once,
whatever number of outboxes and clients refers to it, and nothing else ever opens it.
"""

from __future__ import annotations

import contextlib
import os
import random
import stat
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from segment_durable.byte_locks import TAKEN, above_stderr, locker, try_lock, unlocker
from segment_durable.errors import OutboxBusy, OutboxUnavailable, StorageError
from segment_durable.threads import PatientLock

__all__ = ["LOCK_NAME", "LockFile", "abandon_inherited"]

LOCK_NAME = "outbox.lock"

_WRITER, _WAITING = 0, 1
_FIRST_SLOT, _LAST_SLOT = 1 << 10, 1 << 30

# A waiting writer asks again after this long.  Asking keeps every wait bounded, which a blocking lock is not, and
# measured with eight writers at full speed it is no less fair (slowest 0.91 of the fastest, 31 ms worst wait; blocking:
# 0.78 and 97 ms).
_SHORT_NAP, _LONG_NAP, _SHORT_NAPS = 0.000_05, 0.001, 40


class LockFile:
    """The lock file at `path`, shared by everything in this process that opens it; `close()` gives up one share."""

    _registry_lock = PatientLock()
    _registry: dict[tuple[int, int], LockFile] = {}

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._shares = 1
        # Reentrant, because a signal handler or a finalizer may call track() in the middle of a call to track().
        self.mutex = threading.RLock()
        self._acquire_mutex = self.mutex.acquire
        # Whether this very thread has the mutex: then this is a signal handler or a finalizer within another call.
        self.is_owned: Callable[[], bool] = self.mutex._is_owned  # type: ignore[attr-defined]
        # Who waits for the mutex has this, and keeps it until the end, and new puts of other threads come after that.
        # A thread that only waited would be woken at each release, find the mutex taken again by a busy caller, and
        # both would pay for that more than the work costs that it waits with.
        self._gate = threading.RLock()
        self.has_gate: Callable[[], bool] = self._gate._is_owned  # type: ignore[attr-defined]
        self._is_next = False  # a thread has the gate
        self._kept_gate = False  # the thread that has the mutex has the gate, too
        self._depth = 0
        self._has_file = False
        self._lock_file = locker(fd, _WRITER)
        self._unlock_file = unlocker(fd, _WRITER)
        self._lock_waiting, self._unlock_waiting = locker(fd, _WAITING), unlocker(fd, _WAITING)
        # Which database the outbox is, as a number that grows with each that takes another's place: the length of the
        # file, because looking at that is the cheapest thing that all processes can do before a write.
        self.generation: Callable[[], int] = partial(os.lseek, fd, 0, os.SEEK_END)
        self.slot = self._take_slot()
        self.held: set[bytes] = set()  # tokens of the leases that this process is working on

    @classmethod
    def open(cls, path: Path) -> LockFile:
        if cls._registry_lock.is_owned():
            # Two descriptors of one file would be worse: closing the one ends the locks of the other.
            raise OutboxBusy("the call was made by a signal handler while its thread was opening or closing an outbox")
        with cls._registry_lock:
            try:
                found = os.stat(path)
                known = cls._registry.get((found.st_dev, found.st_ino))
                if known is not None:
                    known._shares += 1
                    return known
                if not stat.S_ISREG(found.st_mode):
                    raise OutboxUnavailable(path, "is in the place of the lock file and is no file")
            except FileNotFoundError:
                pass
            fd = above_stderr(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600))
            try:
                made = cls(fd)
                found = os.fstat(fd)
            except BaseException:
                os.close(fd)
                raise
            cls._registry[found.st_dev, found.st_ino] = made
            return made

    def close(self, timeout: float) -> None:
        """Waits `timeout` seconds at most for a thread that writes; then the file stays open, for who opens it next.

        And at once where that thread is this one, which is a signal handler then.
        """
        with self._registry_lock:
            self._shares -= 1
            # Whoever waits for the mutex must not lock a descriptor that means another file by then.
            if self._shares or self.is_owned() or not self.mutex.acquire(timeout=timeout):
                return
            try:
                for key, each in list(self._registry.items()):
                    if each is self:
                        del self._registry[key]
                os.close(self._fd)
                self._fd = -1
            finally:
                self.mutex.release()

    def is_at(self, path: Path) -> bool:
        """Whether this is the file at `path` still: one that was deleted or replaced nobody else can open."""
        try:
            found, own = os.stat(path), os.fstat(self._fd)
        except FileNotFoundError:
            return False
        except OSError:
            return True  # nothing is known
        return (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino)

    def acquire(self, timeout: float) -> None:
        """Take the writer lock: no other thread or process writes until `release()`.

        Waits at most about `timeout` seconds, then raises `OutboxBusy`; `StorageError` if the system refuses.  May be
        taken again by the thread that has it.
        """
        if not self._acquire_mutex(False):
            self._acquire_next(timeout)
        self._enter(timeout)

    def acquire_unless_busy(self, timeout: float) -> bool:
        """As `acquire`, but False, with nothing taken, if another thread has the lock or waits for it."""
        if self._is_next or not self._acquire_mutex(False):
            return False
        self._enter(timeout)
        return True

    def acquire_mutex(self, timeout: float) -> bool:
        """Take the mutex alone, after the thread that is next; whether it was got within `timeout` seconds."""
        end = time.monotonic() + timeout
        # A signal handler may be called by the very thread that the next one waits for.
        if self._is_next and not self.is_owned():
            if not self._gate.acquire(timeout=timeout):
                return False
            self._gate.release()
        return self._acquire_mutex(timeout=max(0.0, end - time.monotonic()))

    def _acquire_next(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        got = False
        if self._gate.acquire(timeout=timeout):
            try:
                self._is_next = True
                got = self._acquire_mutex(timeout=max(0.0, end - time.monotonic()))
                self._kept_gate = got
            finally:
                if not got:
                    self._is_next = False
                    self._gate.release()
        if not got:
            raise OutboxBusy(f"another thread has been writing to the outbox for {timeout:g} s")

    def _enter(self, timeout: float) -> None:
        # A signal handler may come in between any two steps here and in `release`, and take and release the lock: so
        # what decides is whether the file is locked, and not how deep we are.
        self._depth += 1
        try:
            if not self._has_file:
                if self._fd < 0:
                    raise OutboxBusy("the outbox has been closed")
                try:
                    self._lock_file()
                except TAKEN:
                    self._wait_for_writer(timeout)
                self._has_file = True
        except BaseException as problem:
            if self._depth == 1 and self._fd >= 0:
                # A signal handler may have raised when it was locked and nothing said so.
                with contextlib.suppress(OSError):
                    self._unlock_file()
                self._has_file = False
            self.release()
            if isinstance(problem, OSError) and problem.errno is not None:  # else a signal handler's TimeoutError
                reason = problem.strerror or type(problem).__name__
                raise StorageError(f"the lock file can't be locked: {reason}", "SQLITE_IOERR") from problem
            raise

    def release(self) -> None:
        self._depth -= 1
        if self._has_file and self._depth == 0:
            self._has_file = False
            self._unlock_file()
        if self._kept_gate and self._depth == 0:
            self._kept_gate = self._is_next = False
            self.mutex.release()
            self._gate.release()
        else:
            self.mutex.release()

    def unwind(self) -> None:
        """Let go of all that this thread has of the lock, however far an exception let it come with taking it."""
        has_gate = self.has_gate()
        if has_gate:
            self._kept_gate = self._is_next = False
        if self.is_owned():
            self._depth = 0
            self._has_file = False
            if self._fd >= 0:
                with contextlib.suppress(OSError):
                    self._unlock_file()  # it may be locked before anything says so
            while self.is_owned():
                self.mutex.release()
        if has_gate:
            self._gate.release()

    def raise_generation(self) -> None:
        """Another database is about to take the outbox's place.  Under the writer lock."""
        os.ftruncate(self._fd, self.generation() + 1)

    @property
    def depth(self) -> int:
        """How often the thread that has the writer lock has taken it."""
        return self._depth

    def is_alive(self, slot: int, token: bytes) -> bool:
        """Whether the holder of a lease still lives.  To be called under the writer lock.

        Of another process the kernel knows it, by `slot`; of this one, `held` says whether `token` is still in use.
        """
        if slot == self.slot:
            return token in self.held
        if not _FIRST_SLOT <= slot < _LAST_SLOT:  # which no process has: what was stored was damaged
            return False
        if not try_lock(self._fd, slot):
            return True
        unlocker(self._fd, slot)()
        return False

    def is_waited_for(self) -> bool:
        """Whether another process waits for the lock, and has done so for some time; to be asked by who has it."""
        try:
            try:
                self._lock_waiting()
            finally:  # whatever a signal handler raises
                self._unlock_waiting()
        except TAKEN:
            return True
        except OSError as problem:
            if problem.errno is None:  # a signal handler's TimeoutError
                raise
        return False

    def give_way(self) -> None:
        """After the release, if another process waits: let it have the lock.

        Who has held it for long would have it again before the others look, and where there is one processor for all
        of them, at nearly every look.
        """
        time.sleep(2 * _LONG_NAP)

    def _wait_for_writer(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        naps, is_marked = 0, False
        try:
            while not try_lock(self._fd, _WRITER):
                if time.monotonic() > end:
                    raise OutboxBusy(f"another process has been writing to the outbox for {timeout:g} s")
                naps += 1
                if naps >= _SHORT_NAPS and not is_marked:
                    is_marked = try_lock(self._fd, _WAITING)
                time.sleep(_SHORT_NAP if naps < _SHORT_NAPS else _LONG_NAP)
        finally:
            if naps >= _SHORT_NAPS:
                try:  # nothing before it that a signal handler could end
                    self._unlock_waiting()
                except OSError as problem:
                    if problem.errno is None:
                        raise

    def _take_slot(self) -> int:
        chance = random.SystemRandom()
        while True:
            slot = chance.randrange(_FIRST_SLOT, _LAST_SLOT)
            if try_lock(self._fd, slot):
                return slot


def abandon_inherited() -> list[LockFile]:
    """In a forked child: forget the parent's lock files, whose locks the child does not have.

    They are returned to be kept: closing one after the child has opened its own would drop the child's locks.
    """
    inherited = list(LockFile._registry.values())
    LockFile._registry = {}
    LockFile._registry_lock = PatientLock()
    return inherited
