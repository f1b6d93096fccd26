"""The connections of a process to an outbox's database: opened, exchanged after damage, closed around a fork.

Two for each process and outbox.  One writes, under the lock file's mutex, so that it never crosses threads without a
lock and threads can commit together.  The other reads, under a mutex of its own, so that neither waits for the other.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
import weakref
from pathlib import Path

from segment_durable.admission import Admission, disk_full
from segment_durable.damage import Damage
from segment_durable.database_file import (
    PAGE_SIZE,
    connect,
    connect_for_reading,
    roll_back,
    unavailable,
)
from segment_durable.errors import OutboxError, StorageError
from segment_durable.identity import Damaged
from segment_durable.locks import LOCK_NAME, LockFile
from segment_durable.quarantine import finish
from segment_durable.reserve import Reserve
from segment_durable.shared_locks import Files, close_unused, hold, identify, let_go
from segment_durable.sqlite_errors import SQLITE_PROBLEMS, is_damage, is_full, storage_error

__all__ = [
    "SPARE_PAGES",
    "WRITE_TIMEOUT",
    "Connections",
    "Reader",
    "Writer",
    "abandon_connections",
    "living_connections",
]

WRITE_TIMEOUT = 5.0  # seconds that a write waits for other writers
SPARE_PAGES = 32  # of the largest file that the process may write: not for puts


class Connections:
    """Those to the database at `path`, which is created if there is none; nothing is opened before it is used.

    `full`: sync at each commit (`PRAGMA synchronous=FULL`).  Opening raises `OutboxUnavailable` or `NotAnOutbox` if
    the file can't be used; later trouble is a `StorageError` or an `OutboxBusy`.
    """

    def __init__(
        self, path: Path, lock: LockFile, reserve: Reserve, admission: Admission, damage: Damage, *, full: bool
    ) -> None:
        self.path = path
        self.full = full
        self.lock = lock
        self._reserve = reserve
        self._admission = admission
        self._damage = damage
        self._closed = False
        self._retired = False
        self.is_suspended = False  # closed around a fork, in the thread that forks
        self._is_fork_outermost = True
        self._connection: sqlite3.Connection | None = None
        self.files: Files | None = None  # that it is to
        self.generation = -1  # of the lock file, to which the connection for writing belongs
        self._reading: sqlite3.Connection | None = None
        self._reading_generation = -1
        self._spare: sqlite3.Connection | None = None  # for reading, for the next that asks for one
        self._held: list[sqlite3.Connection] = []  # to a damaged database that could not be set aside yet
        self._leaving: list[sqlite3.Connection] = []  # that are about to be closed
        # Taken before the lock file's mutex where both are needed; reentrant for the same reason as that one.
        self._reading_mutex = threading.RLock()
        _living.add(weakref.ref(self, _living.discard))

    # -- use

    def writer(self) -> Writer:
        """The connection for writing, under the writer lock."""
        return Writer(self)

    def current(self) -> sqlite3.Connection:
        """The connection for writing, under the writer lock: never one to a database that was set aside."""
        connection = self._connection
        if connection is None or self.lock.generation() != self.generation:
            return self._open()
        return connection

    def is_in_place(self) -> bool:
        """Whether the outbox's files are those that are open here, as far as the lock file tells."""
        return self.lock.is_at(self.path.with_name(LOCK_NAME))

    @property
    def is_adrift(self) -> bool:
        """Whether they were closed, around a fork, and where they led to there are other files now."""
        return self._connection is None and self.files is not None and not self.is_in_place()

    @property
    def is_writing(self) -> bool:
        """Whether a transaction is open; under the mutex, and so it is this thread's own."""
        return self._connection is not None and self._connection.in_transaction

    def reader(self, timeout: float) -> Reader:
        """The connection for reading, under its mutex, for which `timeout` seconds are waited at most."""
        return Reader(self, timeout)

    def explained(self, problem: Exception, generation: int | None = None) -> StorageError:
        """What SQLite has raised, as a `StorageError`; the database of that generation is replaced if it is damaged.

        `None`: that of the connection for writing, under the writer lock.
        """
        error = storage_error(problem)
        if is_damage(error):
            self.replace(error, self.generation if generation is None else generation)
        return error

    def is_outermost(self) -> bool:
        """Whether this thread is in no other call on this outbox, as a signal handler's is."""
        return not (self.lock.is_owned() or self.lock.has_gate() or self._reading_mutex._is_owned())  # type: ignore[attr-defined]

    def unwind(self) -> None:
        """An exception has ended the outermost call of this thread: nothing that it took stays taken.

        A signal handler may raise between any two steps (a time limit of Celery's, Ctrl-C): also between taking a lock
        and the `try` that lets it go, or on the way into what lets it go.
        """
        mutex = self._reading_mutex
        if mutex._is_owned():  # type: ignore[attr-defined]
            if self._reading is not None:
                roll_back(self._reading)
            while mutex._is_owned():  # type: ignore[attr-defined]
                mutex.release()
        if self.lock.is_owned() and self._connection is not None:
            roll_back(self._connection)
        self.lock.unwind()

    def limit_pages(self, connection: sqlite3.Connection, spare: int) -> None:
        """Where files may not grow beyond a size: a database of more could never take in its WAL."""
        pages = self._reserve.file_limit // PAGE_SIZE
        if pages < 1 << 31:
            connection.execute(f"PRAGMA max_page_count={max(pages - spare, 1)}")

    def retire(self) -> None:
        """Under the writer lock: nothing is written after the transaction that is open; `close()` may come later."""
        self._retired = True
        self.generation = -1  # so that the next who writes looks

    def _check_place(self) -> None:
        """Raise `StorageError` where the path leads to other files: those belong to another lock."""
        if self.files is not None and not self.is_in_place():
            raise StorageError(
                f"the files of {self.path.parent} were deleted or renamed, or a link in its path was changed",
                "SQLITE_CANTOPEN",
            )

    # -- another database

    def replace(self, problem: StorageError, generation: int) -> None:
        """The database of that generation is damaged: put another in its place, unless that has been done.

        Raises `OutboxError` if it can't be.
        """
        self.lock.acquire(WRITE_TIMEOUT)
        try:
            if self.lock.generation() != generation:
                return
            self._damage.check_limit(problem)
            try:
                self._set_aside()
            except (sqlite3.Error, OSError) as failure:
                raise self._damage.not_replaced(failure) from failure
        finally:
            self.lock.release()

    def _set_aside(self) -> str:
        """Under the writer lock.  The connections to the damaged database stay open until it is not there any more."""
        self._check_place()
        name = self._damage.set_aside()
        current, self._connection = self._connection, None
        self._hold(current)
        self._close_held()
        return name

    def _close_held(self) -> None:
        while self._held:
            self._held.pop().close()

    def _hold(self, connection: sqlite3.Connection | None) -> None:
        """Keep it open, and no older one: it is not the last one to be closed then, or to a file that was renamed."""
        if connection is not None and connection is not self._connection:
            older, self._held = self._held, [connection]
            for each in older:
                each.close()

    # -- life

    def suspend(self, timeout: float = 30.0) -> bool:
        """Close the connections and keep every other thread out until `resume()`: done around a fork.

        A SQLite connection must not be carried over a fork, not even unused: SQLite counts its POSIX locks for each
        process in memory that the child inherits, so a connection that the child opens beside an inherited one
        believes that it holds locks which it does not hold.  Another process then takes the database for unused and
        deletes the WAL under the child's feet (seen: the child's next commit was lost).  Returns False, with nothing
        done, if another thread did not leave the connection within `timeout` seconds.
        """
        if self.is_suspended:
            return True
        end = time.monotonic() + timeout
        self._is_fork_outermost = self.is_outermost()
        try:
            if not self._reading_mutex.acquire(timeout=timeout):
                return False
            if not self.lock.mutex.acquire(timeout=max(0.0, end - time.monotonic())):
                self._reading_mutex.release()
                return False
            self.is_suspended = True
            self._disconnect(WRITE_TIMEOUT)
        except BaseException:
            self.is_suspended = True  # or nearly so
            self.resume()
            raise
        return True

    def resume(self) -> None:
        """End `suspend()`, in the process that called it; the next call opens the connection again.

        May be called again, should a signal handler have raised in here.
        """
        if not self.is_suspended:
            return
        if self._is_fork_outermost:
            self.unwind()
        else:  # the fork was made by a signal handler within a call
            for mutex in (self.lock.mutex, self._reading_mutex):
                with contextlib.suppress(RuntimeError):
                    mutex.release()
        self.is_suspended = False

    def was_in_use(self) -> bool:
        """In a child forked without `suspend()`: whether a thread of the parent was at work in here at that moment.

        It holds one of these mutexes for ever in the child, and may do so with SQLite's own.
        """
        for mutex in (self._reading_mutex, self.lock.mutex):
            # Owned by this very thread: the fork was made by a signal handler within a call.
            if mutex._is_owned() or not mutex.acquire(blocking=False):  # type: ignore[attr-defined]
                return True
            mutex.release()
        return False

    def inherited(self) -> Files | None:
        """In a child forked without `suspend()`: the files to which a connection of the parent was open."""
        is_open = self._connection or self._reading or self._spare or self._held or self._leaving
        return self.files if is_open else None

    def close(self, timeout: float = WRITE_TIMEOUT) -> None:
        """Close the connections and the lock file, waiting for others `timeout` seconds at most.

        Neither this nor what uses it can be used any more; may be called twice.
        """
        if self._closed:
            return
        self._closed = True
        end = time.monotonic() + timeout
        if not self.is_outermost():
            return  # a signal handler: the call that it has interrupted goes on with them
        if self._reading_mutex.acquire(timeout=timeout):
            try:
                if not self.lock.mutex.acquire(timeout=max(0.0, end - time.monotonic())):
                    return
                try:
                    self._disconnect(timeout)
                finally:
                    self.lock.mutex.release()
            finally:
                self._reading_mutex.release()
            self.lock.close(max(0.0, end - time.monotonic()))
        # Otherwise a thread is at work in there: what it uses ends with it, or with the process.

    # -- inside

    def _begin_reading(self, timeout: float) -> sqlite3.Connection:
        if not self._reading_mutex.acquire(timeout=timeout):
            raise StorageError("the outbox is in use by another thread", "SQLITE_BUSY")
        try:
            reading = self._reading
            if reading is None or (not reading.in_transaction and self.lock.generation() != self._reading_generation):
                reading = self._open_for_reading(timeout)
            return reading
        except BaseException:
            self._reading_mutex.release()
            raise

    def _end_reading(self, problem: BaseException | None, generation: int) -> None:
        try:
            if isinstance(problem, SQLITE_PROBLEMS):
                raise self.explained(problem, generation) from problem
        finally:
            self._reading_mutex.release()
        if problem is None:
            self._damage.tell()

    def _open_for_reading(self, timeout: float) -> sqlite3.Connection:
        if not self.lock.mutex.acquire(timeout=timeout):
            raise StorageError("the outbox is in use by another thread", "SQLITE_BUSY")
        try:
            connection = None
            while connection is None:  # also if a signal handler has taken the one that was just opened
                if self._connection is None or self._spare is None or self.lock.generation() != self.generation:
                    self._open()
                connection, self._spare = self._spare, None
            old, self._reading = self._reading, connection
            self._reading_generation = self.generation
        finally:
            self.lock.mutex.release()
        if old is not None:
            old.close()
        return connection

    def _open(self) -> sqlite3.Connection:
        """Connect, under the mutex; create or check the schema, which takes the writer lock."""
        if self._closed or self._retired:
            raise StorageError("the outbox has been closed", "SQLITE_MISUSE")
        self._check_place()
        self.lock.acquire(WRITE_TIMEOUT)
        old, self._connection = self._connection, None
        old_files = set(self.files or ())
        connection = None
        try:
            aside = finish(self.path)
            try:
                connection = self._connect()
            except Damaged as problem:
                self._hold(problem.connection)
                aside = self._set_aside()
                connection = self._connect()
            self.limit_pages(connection, SPARE_PAGES)
            # Opened here, and not when something is read, so that it is under the writer lock: a database that is just
            # being set aside must not be opened, and who reads must not wait for the writers.
            self._close_spare()
            self._spare = connect_for_reading(self.path)
            self.generation = self.lock.generation()
            files = identify(self.path)
            hold(self.path, files, self)
            self._connection, self.files = connection, files
            self._damage.look_for_sets(connection, aside)
            if not self._reserve.make():
                self._admission.refuse(disk_full())
            self._close_held()  # none of them is the last one now
        except (Damaged, sqlite3.Error, OSError) as problem:
            self._connection = None  # or it would be used, which it may have been made for by then
            if isinstance(problem, Damaged):
                self._hold(problem.connection)
            elif isinstance(problem, sqlite3.Error) and is_damage(storage_error(problem)):
                self._hold(connection)
            elif connection is not None:
                connection.close()
            raise unavailable(self.path, problem) from problem
        finally:
            if old is not None:
                old.close()  # after the new one was opened: the last one to be closed makes a checkpoint
            gone = old_files.difference(self.files or ())
            let_go(gone, self)
            close_unused(gone)
            self.lock.release()
        return connection

    def _connect(self) -> sqlite3.Connection:
        is_ours = self._reserve.exists()
        is_made = not os.path.lexists(self.path)
        if is_made:
            # First: a process that has one open which was deleted must not go on writing into it.
            self.lock.raise_generation()
        try:
            connection = connect(self.path, full=self.full, is_ours=is_ours)
        except sqlite3.Error as problem:
            # Opening takes space as well.  SQLite does not say that it is for want of that if a file can't be made.
            is_for_space = is_full(storage_error(problem)) or self._reserve.is_needed()
            if not is_for_space or not self._reserve.free():
                raise
            connection = connect(self.path, full=self.full, is_ours=is_ours)
        if is_made and is_ours:
            self._damage.is_gone = True
        return connection

    def _close_spare(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.close()

    def _disconnect(self, timeout: float) -> None:
        # Known until they are closed: of one that a signal handler's exception leaves before that, a fork must not find
        # nothing to close, and take it along.
        self._leaving += [each for each in (self._reading, self._spare, self._connection) if each is not None]
        self._reading = self._spare = self._connection = None
        if not self._leaving:
            return
        # The last close of all processes checkpoints and removes the WAL; that, too, belongs under the writer lock.
        # A process that keeps the lock has the database open, so this is not the last.
        try:
            self.lock.acquire(timeout)
        except OutboxError:
            self._close_leaving()
            return
        try:
            self._close_leaving()
        finally:
            self.lock.release()

    def _close_leaving(self) -> None:
        let_go(self.files or (), self)
        while self._leaving:
            self._leaving[-1].close()
            self._leaving.pop()
        close_unused(self.files or ())


# Classes, and no generators: one of those that a signal handler's exception has left behind would go on to its
# `finally` whenever it is collected, and let go of what another call has taken by then.


class Writer:
    """What `Connections.writer` returns; SQLite's errors leave it as `StorageError`s."""

    __slots__ = ("_connections",)

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def __enter__(self) -> sqlite3.Connection:
        self._connections.lock.acquire(WRITE_TIMEOUT)
        try:
            return self._connections.current()
        except BaseException:
            self._connections.lock.release()
            raise

    def __exit__(self, kind: object, problem: BaseException | None, trace: object) -> None:
        try:
            if isinstance(problem, SQLITE_PROBLEMS):
                raise self._connections.explained(problem) from problem
        finally:
            self._connections.lock.release()


class Reader:
    """What `Connections.reader` returns; SQLite's errors leave it as `StorageError`s."""

    __slots__ = ("_connections", "_generation", "_timeout")

    def __init__(self, connections: Connections, timeout: float) -> None:
        self._connections = connections
        self._timeout = timeout
        self._generation = -1

    def __enter__(self) -> sqlite3.Connection:
        reading = self._connections._begin_reading(self._timeout)
        self._generation = self._connections._reading_generation
        return reading

    def __exit__(self, kind: object, problem: BaseException | None, trace: object) -> None:
        self._connections._end_reading(problem, self._generation)


# Weakly: also those of an engine that has been closed, but whose thread has not left yet.
_living: set[weakref.ref[Connections]] = set()


def living_connections() -> list[Connections]:
    """All of this process, of which some may have been closed."""
    return [each for each in (reference() for reference in list(_living)) if each is not None]


def abandon_connections() -> list[Connections]:
    """In a forked child: forget the parent's.  They are returned to be kept: their end would close the connections."""
    inherited = living_connections()
    _living.clear()
    return inherited
