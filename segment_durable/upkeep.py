"""The thread that keeps an outbox's files in order: syncs, checkpoints, space given back.

It bounds what a power cut takes with `synchronous="NORMAL"`, keeps checkpoints off the callers' backs, and is asleep
while nothing is written and nothing is left to be done.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from segment_durable.clock import Clock
from segment_durable.database_file import PAGE_SIZE
from segment_durable.db import Database
from segment_durable.errors import OutboxError
from segment_durable.limiter import Limiter
from segment_durable.logs import get_log
from segment_durable.space import LOOK_SECONDS
from segment_durable.threads import PatientLock, Wake, start_thread

__all__ = ["Upkeep"]

log = get_log("upkeep")

SYNC_SECONDS = 0.25  # from a commit to its sync; with the sync itself well below half a second
_QUIET_SECONDS = 1.0  # without a write, after which all space is given back
_STEADY_SECONDS = 5.0  # in which no more pages came free than ever before: then no backlog is being delivered
_TIDY_REST = 0.01  # seconds between two transactions that give space back, in which writers come
# Given back before the file is cut, which the kernel takes about a quarter of a millisecond for each MiB for, while all
# writers wait.
_CUT_BYTES = 32 << 20
_TIDY_BYTES = 4 << 20  # a database below this is left as it is


class Upkeep:
    """Looks after `database`; the thread starts at the first write."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._wal = database.wal
        self._clock = clock
        self._written = Wake()
        self._due = Wake()  # don't wait for the interval to end
        self._start_lock = PatientLock()
        self._thread: threading.Thread | None = None
        self._ending = Wake()
        self._trouble = Limiter(60.0, clock)
        self._least_used, self._least_at = 1 << 62, 0.0  # pages that were in use at the least, lately, and since when
        self._is_uncut = False  # a reader was in the way when the files were to be cut
        self.on_gone: Callable[[], None] = _nothing  # the files were deleted, and nobody else can open them any more
        self._wal.watch(self.written)

    def written(self) -> None:
        """Something was committed: see `Wal.wrote`."""
        if not self._written.is_set():
            self._written.set()
        if self._thread is None:
            self._start()
        if self._wal.needs_checkpoint and not self._due.is_set():
            self._due.set()

    def stop(self, timeout: float) -> bool:
        """Bring everything to the disk and end the thread; whether it ended within `timeout` seconds."""
        self._wal.watch(_nothing)
        self._ending.set()
        self._written.set()
        self._due.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)
        self._sync(checkpoint=False)
        return thread is None or not thread.is_alive()

    def _start(self) -> None:
        if self._start_lock.is_owned():
            return  # within a signal handler: it is being done
        with self._start_lock:
            if self._thread is not None or self._ending.is_set():
                return
            self._thread = start_thread(self._run, "segment-durable-upkeep")
            if self._thread is None:
                self._sync()
                self._written.clear()
                self._look_for_files()

    def _run(self) -> None:
        self._thread = threading.current_thread()  # whatever a signal handler raised in who started it
        while not self._ending.is_set():
            self._written.wait()
            self._clock.wait(self._due, SYNC_SECONDS)
            self._due.clear()
            self._written.clear()
            try:
                pause = self._turn()
            except BaseException as problem:  # a callback's, or a defect of ours: nobody would start the thread again
                self._complain(problem, exc_info=True)
                pause = SYNC_SECONDS
            if pause:
                self._written.set()  # nobody else says so again
                self._clock.wait(self._ending, pause)

    def _turn(self) -> float:
        """Seconds until all of it is to be done again, 0: when something was written."""
        is_synced = self._sync()
        if not self._look_for_files() or not is_synced:
            return SYNC_SECONDS
        if self._ending.is_set():
            return 0.0
        if self._database.admission.trouble is not None and not self._database.space.recover():
            return LOOK_SECONDS  # puts are refused meanwhile
        self._tidy()
        return 0.0

    def _look_for_files(self) -> bool:
        """Whether they are in their place; if not, somebody is told who may put others there."""
        if self._ending.is_set() or self._database.is_in_place():
            return True
        self.on_gone()
        return False

    def _sync(self, *, checkpoint: bool = True) -> bool:
        try:
            if checkpoint and self._wal.needs_checkpoint:
                self._wal.checkpoint()
            else:
                self._wal.sync()
        except OutboxError as problem:
            self._complain(problem)
            return False
        return True

    def _tidy(self) -> None:
        """Give back what is free, once all are quiet; beside writers only what they don't use again.

        And not while a backlog is delivered, which would wait for each step.  The WAL is left as long as it is beside
        writers, too: they would only have to make it long again.
        """
        try:
            version = self._database.version()
            # Not to write is not enough to be quiet: another process may be at work.
            is_quiet = not self._clock.wait(self._written, _QUIET_SECONDS) and version == self._database.version()
            if self._ending.is_set():
                return
            is_shorter = self._is_large() and (is_quiet or self._is_steady()) and self._give_back()
            if is_shorter or self._is_uncut or (is_quiet and self._wal.size() > self._database.reserve.size):
                self._is_uncut = True
                self._is_uncut = not self._wal.checkpoint(truncate=is_quiet)
            if self._is_uncut or (self._is_large() and not is_quiet):
                self._written.set()  # look again, also if this process does not write any more
        except OutboxError as problem:
            self._complain(problem)
            self._written.set()
            self._clock.wait(self._ending, _QUIET_SECONDS)

    def _is_large(self) -> bool:
        return self._database.space.database_size() > _TIDY_BYTES

    def _is_steady(self) -> bool:
        """Whether most of the database is free, and what is in use is little, or has not become less of late."""
        used, free = self._database.pages()
        now = self._clock.boot()
        if used < self._least_used:  # a backlog is being delivered
            self._least_used, self._least_at = used, now
        is_steady = now >= self._least_at + _STEADY_SECONDS
        if is_steady:
            self._least_used = used
        little = max(_TIDY_BYTES // PAGE_SIZE, (used + free) // 10)
        return used < free and (used <= little or is_steady)

    def _give_back(self) -> bool:
        """In small steps; whether any was given back, and all of it, for something more urgent may come."""
        given, left = self._database.space.give_back()
        uncut = given
        while left:
            if uncut > _CUT_BYTES // PAGE_SIZE:
                self._wal.checkpoint()
                uncut = 0
            if self._clock.wait(self._ending, _TIDY_REST) or self._due.is_set():
                return False
            more, left = self._database.space.give_back()
            uncut += more
        return given > 0

    def _complain(self, problem: BaseException, *, exc_info: bool = False) -> None:
        if self._ending.is_set() and threading.current_thread() is self._thread:
            return  # the files may have been closed under it: who ends it syncs once more, and complains
        times = self._trouble.tick()
        if times:
            log.error("the outbox's files can't be kept in order (%d times): %s", times, problem, exc_info=exc_info)


def _nothing() -> None:
    pass
