"""The SQLite database of an outbox: transactions under the writer lock, syncs and checkpoints.

Two connections for each process and outbox.  One writes, under the lock file's mutex, so that it never crosses
threads without a lock and threads can commit together.  The other reads, under a mutex of its own, so that neither
waits for the other.  Nothing here knows what an event is.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from segment_durable.database_file import (
    BUSY_TIMEOUT,
    CHECKPOINT_BYTES,
    DATABASE_NAME,
    PAGE_SIZE,
    WAL_LIMIT_BYTES,
    connect,
    connect_for_reading,
    make_folder,
    roll_back,
    sync_file,
    unavailable,
)
from segment_durable.errors import OutboxBusy, OutboxDamaged, OutboxError, StorageError
from segment_durable.identity import Damaged
from segment_durable.locks import LockFile
from segment_durable.quarantine import finish, set_aside, sets_since, told_sets
from segment_durable.reserve import Reserve
from segment_durable.sqlite_errors import SQLITE_PROBLEMS, is_damage, is_full, storage_error

__all__ = ["LOCK_NAME", "Database"]

LOCK_NAME = "outbox.lock"
# Where nobody makes the due checkpoints (no thread could be started), writers make them themselves after this.
OVERDUE_BYTES = WAL_LIMIT_BYTES // 2
# How large the WAL really is, by the bytes of all processes, is looked up after so many of our own.
LOOK_BYTES = 512 << 10
FRAME_HEADER_BYTES = 24
LOOK_SECONDS = 0.25  # between two attempts to get out of trouble
_GIVE_BACK_PAGES = 256
_SPARE_PAGES = 32  # of the largest file that the process may write: not for puts
WRITE_TIMEOUT = 5.0  # seconds that a write waits for other writers
# A disk that damages whatever is written to it must not be filled with what is set aside.
_MOST_SETS, _SETS_SECONDS = 5, 60.0


class Database:
    """The database in `folder`, created if there is none.

    `full`: sync at each commit (`PRAGMA synchronous=FULL`).  Raises `OutboxUnavailable` or `NotAnOutbox` if it can't
    be opened; later trouble is a `StorageError` or an `OutboxBusy`.
    """

    def __init__(self, folder: Path, *, full: bool = False) -> None:
        self.folder = folder
        self.path = folder / DATABASE_NAME
        self._wal_path = folder / f"{DATABASE_NAME}-wal"
        self.full = full  # sync at each commit
        self._closed = False
        self._connection: sqlite3.Connection | None = None
        self._generation = -1  # of the lock file, to which the connection belongs
        self._reading: sqlite3.Connection | None = None
        self._reading_generation = -1
        self._spare: sqlite3.Connection | None = None  # for reading, for the next that asks for one
        self._held: list[sqlite3.Connection] = []  # to a damaged database that could not be set aside yet
        self._known_sets: set[str] | None = None  # that were set aside, as far as this object has looked
        self._news: deque[OutboxDamaged] = deque()
        # Taken before the lock file's mutex where both are needed; reentrant for the same reason as that one.
        self._reading_mutex = threading.RLock()
        self._dirty = False  # something was committed since the last sync
        self.needs_checkpoint = False
        self._unseen_bytes = 0  # written by this process since it last looked at the WAL
        self._look_after = 0
        self._held_bytes = 0  # what the WAL had at a checkpoint that a reader did not let move all of it
        self._scarce = False  # there is so little space that the WAL is to be kept short
        self._trouble: StorageError | None = None  # why puts are refused, if they are
        self._next_look = 0.0
        self.reserve = Reserve(folder)
        self.on_written: Callable[[], None] = _nothing  # set by `watch`
        # Called in any thread, and without the writer lock; until it is set, what there is to tell waits.
        self.on_damaged: Callable[[OutboxDamaged], None] | None = None
        make_folder(folder)
        try:
            self.lock = LockFile.open(folder / LOCK_NAME)
        except OSError as problem:
            raise unavailable(folder, problem) from problem
        try:
            with self._writer():  # which opens the connection
                pass
        except BaseException:
            self.close()
            raise

    # -- transactions

    @contextlib.contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """One transaction of the only writer; rolled back if the block raises.  It may not be nested."""
        with self._writer() as connection, self._translated():
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException as problem:
                roll_back(connection)
                if isinstance(problem, sqlite3.Error):
                    self._note(storage_error(problem))
                raise
        self.wrote(4 * PAGE_SIZE)

    def write_one(
        self, statement: str, parameters: tuple[Any, ...], ready: Callable[[], None] | None = None
    ) -> int:
        """One statement in a transaction of its own, which is what a put is; how many rows it changed.

        `ready` is called when nothing but SQLite is left to wait for.

        Under the writer lock, after whose release `wrote()` is to be called.  It may be called within another call by
        the same thread (a signal handler), as long as that has no transaction open.
        """
        connection = self._current()
        if connection.in_transaction:
            raise OutboxBusy("the call was made by a signal handler or a finalizer while its thread was writing")
        if self._trouble is not None:
            self.check_space()
        if ready is not None:
            ready()
        try:
            return connection.execute(statement, parameters).rowcount
        except SQLITE_PROBLEMS as problem:
            roll_back(connection)
            error = self._note(storage_error(problem))
            if not is_damage(error):
                raise error from problem
        self._replace(error, self._generation)
        with self._translated():
            return self._current().execute(statement, parameters).rowcount

    def wrote(self, size: int) -> None:
        """About `size` bytes were committed, and the writer lock is free again.

        Calls `on_written` for the first commit since the last sync, and while a checkpoint is due.
        """
        unseen = self._unseen_bytes = self._unseen_bytes + size + PAGE_SIZE + FRAME_HEADER_BYTES
        if self._dirty and unseen < self._look_after:
            return
        self._dirty = True
        self._look()
        self.on_written()
        self.tell()

    @contextlib.contextmanager
    def read(self, timeout: float = WRITE_TIMEOUT) -> Iterator[sqlite3.Connection]:
        """One consistent view of what is committed; blocks other readers of this process, and no writer.

        Raises `StorageError` if another thread keeps the connection for `timeout` seconds.
        """
        with self._reader(timeout) as connection:
            outermost = not connection.in_transaction
            if outermost:
                connection.execute("BEGIN")
            try:
                yield connection
            finally:
                if outermost:
                    roll_back(connection)

    def read_one(self, statement: str, parameters: tuple[Any, ...] = (), timeout: float = WRITE_TIMEOUT) -> Any:
        """The first row of one statement, None if there is none; `timeout` as for `read`."""
        try:
            with self._reader(timeout) as connection:
                return connection.execute(statement, parameters).fetchone()
        except StorageError as problem:
            if not is_damage(problem):
                raise
        with self._reader(timeout) as connection:
            return connection.execute(statement, parameters).fetchone()

    # -- upkeep

    def watch(self, on_written: Callable[[], None]) -> None:
        """From now on call that as `wrote` says."""
        self.on_written = on_written
        self._dirty = False  # or what was written before would hide the next first commit

    @property
    def is_unsynced(self) -> bool:
        """Whether a commit may not have reached the disk yet: always False with `full`."""
        return self._dirty and not self.full

    def sync(self) -> None:
        """Bring all commits so far to the disk.

        With `synchronous=NORMAL` SQLite syncs the WAL at checkpoints only; the call bounds what a power cut takes.
        SQLite keeps no locks on the WAL file, so opening and closing it here breaks none.
        """
        self._dirty = False
        if self.full:
            return
        try:
            fd = os.open(self._wal_path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
        except FileNotFoundError:
            return  # a checkpoint has moved everything into the database and synced that
        except OSError as problem:
            self._dirty = True
            raise StorageError(f"the outbox can't be synced: {problem.strerror}", "SQLITE_IOERR") from problem
        try:
            sync_file(fd)
        except OSError as problem:
            self._dirty = True
            raise StorageError(f"the outbox can't be synced: {problem.strerror}", "SQLITE_IOERR") from problem
        finally:
            os.close(fd)

    def checkpoint(self, *, truncate: bool = False) -> bool:
        """Move the WAL's content into the database; whether all of it was moved.

        Only ever done under the writer lock: SQLite 3.7.0 to 3.51.2 can corrupt a database whose WAL is reset by two
        connections at the same moment.  `truncate` also gives the WAL's space back.
        """
        self.needs_checkpoint = False
        self.sync()  # before taking the lock: then the checkpoint's own sync of the WAL has nothing left to do
        with self._writer() as connection, self._translated():
            # Not to wait for a reader: all writers of the host would wait with us.
            connection.execute("PRAGMA busy_timeout=0")
            pragma = f"PRAGMA wal_checkpoint({'TRUNCATE' if truncate or self._scarce else 'PASSIVE'})"
            try:
                try:
                    busy, frames, moved = connection.execute(pragma).fetchone()
                except sqlite3.Error as problem:
                    if not is_full(storage_error(problem)) or not self.reserve.free():
                        raise
                    busy, frames, moved = connection.execute(pragma).fetchone()
            finally:
                connection.execute(f"PRAGMA busy_timeout={int(BUSY_TIMEOUT * 1000)}")
            self.needs_checkpoint = False  # again: it was asked for by those who wrote while the WAL was synced
        done = not busy and frames == moved
        self._held_bytes = 0 if done else self.wal_bytes()
        return bool(done)

    def give_back_space(self, pages: int) -> bool:
        """Return up to `pages` free pages to the filesystem, in one short transaction; whether there are more."""
        free = self._shrink(pages)
        if free:
            self.wrote(pages * PAGE_SIZE)
        return free > pages

    def is_mostly_free(self) -> bool:
        """Whether more than half of the database's pages are free."""
        (free,), (pages,) = self.read_one("PRAGMA freelist_count"), self.read_one("PRAGMA page_count")
        return bool(2 * free > pages)

    def wal_bytes(self) -> int:
        return _size(self._wal_path)

    def size_on_disk(self) -> int:
        """Bytes that the database and its WAL occupy."""
        return _size(self.path) + self.wal_bytes()

    # -- space

    @property
    def is_in_trouble(self) -> bool:
        """Whether puts are refused, because the disk is full or the WAL can't be kept short."""
        return self._trouble is not None

    def check_space(self) -> None:
        """Raise `StorageError` while there is no space for new events.  Under the mutex, before a put."""
        if self._trouble is not None and time.monotonic() >= self._next_look:
            self.recover()
        if self._trouble is not None:
            raise StorageError(str(self._trouble), self._trouble.code)

    def make_room(self, problem: StorageError) -> bool:
        """For a write of the sender's that failed: free the reserve and begin the WAL anew; whether to try again.

        After damage it is worth another try as well: another database has taken the place of the damaged one.
        """
        if is_damage(problem):
            return True
        if not is_full(problem):
            return False
        try:
            with self._writer() as connection:
                if connection.in_transaction:
                    return False
                if problem.code == "SQLITE_FULL" and self._is_damaged_and_not_full(connection):
                    self._replace(problem, self._generation)
                    return True
                self.reserve.free()
                self._limit_pages(connection, 0)
                with contextlib.suppress(OutboxError):
                    self.checkpoint(truncate=True)
        except OutboxError:
            return False
        return True

    def _is_damaged_and_not_full(self, connection: sqlite3.Connection) -> bool:
        """Whether SQLite has said that the disk is full, and it is not.

        It says so, too, of a damaged page that refers to one beyond the largest that a database can have.  Whoever
        delivers would find that at each attempt, and send the same events for ever.
        """
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        (most,) = connection.execute("PRAGMA max_page_count").fetchone()
        if self.reserve.is_needed() or pages >= most:
            return False
        try:
            return bool(connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",))
        except SQLITE_PROBLEMS as problem:
            return is_damage(storage_error(problem))

    def recover(self) -> bool:
        """Make the WAL short, give space back and make the reserve again; whether puts are accepted now."""
        self._next_look = time.monotonic() + LOOK_SECONDS
        with contextlib.suppress(OutboxError), self._writer() as connection:
            if connection.in_transaction:
                return False
            with contextlib.suppress(OutboxError):
                self.checkpoint(truncate=True)
                for _ in range(8):  # then others may write
                    if not self.reserve.is_needed() or not self._shrink(_GIVE_BACK_PAGES):
                        break
                    self.checkpoint(truncate=True)
            if self.wal_bytes() > WAL_LIMIT_BYTES:
                self._trouble = _held_by_reader()
            elif self.reserve.make() and not self.reserve.is_needed():
                self._limit_pages(self._current(), _SPARE_PAGES)  # a checkpoint may have found the database damaged
                self._trouble = None
        return self._trouble is None

    # -- life

    def suspend(self, timeout: float = 30.0) -> bool:
        """Close the connection and keep every other thread out until `resume()`: done around a fork.

        A SQLite connection must not be carried over a fork, not even unused: SQLite counts its POSIX locks for each
        process in memory that the child inherits, so a connection that the child opens beside an inherited one
        believes that it holds locks which it does not hold.  Another process then takes the database for unused and
        deletes the WAL under the child's feet (seen: the child's next commit was lost).  Returns False, with nothing
        done, if another thread did not leave the connection within `timeout` seconds.
        """
        end = time.monotonic() + timeout
        if not self._reading_mutex.acquire(timeout=timeout):
            return False
        if not self.lock.mutex.acquire(timeout=max(0.0, end - time.monotonic())):
            self._reading_mutex.release()
            return False
        self._disconnect(WRITE_TIMEOUT)
        return True

    def resume(self) -> None:
        """End `suspend()`, in the process that called it; the next call opens the connection again."""
        self.lock.mutex.release()
        self._reading_mutex.release()

    def close(self, timeout: float = WRITE_TIMEOUT) -> None:
        """Close the connection and the lock file, waiting for others `timeout` seconds at most.

        The object can't be used any more; may be called twice.
        """
        if self._closed:
            return
        self._closed = True
        end = time.monotonic() + timeout
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
            self.lock.close()
        # Otherwise a thread is at work in there: its connection and the lock file end with the process.

    # -- inside

    def _look(self) -> None:
        """See how long the WAL is, whoever wrote it, and how much space there is; make a checkpoint if it is overdue.

        At a commit SQLite cuts a WAL that starts anew to `CHECKPOINT_BYTES`, so one that is longer was not moved yet.
        The less space there is, the shorter the WAL is kept: the reserve has to hold what a checkpoint may need.
        """
        self._unseen_bytes = 0
        size = self.wal_bytes()
        due = min(CHECKPOINT_BYTES, max(self.reserve.size // 8, self.reserve.room() // 4))
        self._scarce = due < CHECKPOINT_BYTES
        self._look_after = min(LOOK_BYTES, due // 4)
        if size <= due:
            self._held_bytes = 0
        held = self._held_bytes and self._held_bytes + due // 4  # a reader is in the way: not at each look
        self.needs_checkpoint = size > max(due, held)
        overdue = min(OVERDUE_BYTES, 2 * due) if self._scarce else OVERDUE_BYTES
        if size > max(overdue, held) and not self.lock.depth:
            with contextlib.suppress(OutboxError):
                self.checkpoint(truncate=size > WAL_LIMIT_BYTES)
        if self._trouble is not None:
            return
        if size > WAL_LIMIT_BYTES and self.wal_bytes() > WAL_LIMIT_BYTES:
            self._refuse(_held_by_reader())
        elif not self.reserve.exists():
            self._refuse(_full())

    def _note(self, error: StorageError) -> StorageError:
        """Remember that a write failed because there is no space."""
        if is_full(error) and self._trouble is None:
            self._refuse(error)
        return error

    def _refuse(self, why: StorageError) -> None:
        self._trouble = why
        self.on_written()

    def _limit_pages(self, connection: sqlite3.Connection, spare: int) -> None:
        """Where files may not grow beyond a size: a database of more could never take in its WAL."""
        pages = self.reserve.file_limit // PAGE_SIZE
        if pages < 1 << 31:
            connection.execute(f"PRAGMA max_page_count={max(pages - spare, 1)}")

    def _shrink(self, pages: int) -> int:
        """Give up to `pages` free pages back; how many there were."""
        with self._writer() as connection, self._translated():
            free: int = connection.execute("PRAGMA freelist_count").fetchone()[0]
            if free:
                # Not execute(): the pragma is a statement without columns that has to be stepped once for each page,
                # and a cursor of Python's steps such a one once only.
                connection.executescript(f"PRAGMA incremental_vacuum({pages})")
        return free

    @contextlib.contextmanager
    def _writer(self) -> Iterator[sqlite3.Connection]:
        self.lock.acquire(WRITE_TIMEOUT)
        try:
            yield self._current()
        finally:
            self.lock.release()

    def _current(self) -> sqlite3.Connection:
        """The connection for writing, under the writer lock: never one to a database that was set aside."""
        connection = self._connection
        if connection is None or self.lock.generation() != self._generation:
            return self._open()
        return connection

    @contextlib.contextmanager
    def _reader(self, timeout: float) -> Iterator[sqlite3.Connection]:
        """The connection for reading, under its mutex."""
        if not self._reading_mutex.acquire(timeout=timeout):
            raise StorageError("the outbox is in use by another thread", "SQLITE_BUSY")
        try:
            reading = self._reading
            if reading is None or (not reading.in_transaction and self.lock.generation() != self._reading_generation):
                reading = self._open_for_reading(timeout)
            generation = self._reading_generation
            try:
                yield reading
            except SQLITE_PROBLEMS as problem:
                error = storage_error(problem)
                if is_damage(error):
                    self._replace(error, generation)
                raise error from problem
        finally:
            self._reading_mutex.release()
        if self._news:
            self.tell()

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Under the writer lock: what SQLite raises becomes a `StorageError`; a damaged database is replaced."""
        try:
            yield
        except SQLITE_PROBLEMS as problem:
            error = storage_error(problem)
            if is_damage(error):
                self._replace(error, self._generation)
            raise error from problem

    def _open(self) -> sqlite3.Connection:
        """Connect, under the mutex; create or check the schema, which takes the writer lock."""
        if self._closed:
            raise StorageError("the outbox has been closed", "SQLITE_MISUSE")
        self.lock.acquire(WRITE_TIMEOUT)
        old, self._connection = self._connection, None
        connection = None
        try:
            aside = finish(self.path)
            try:
                connection = self._connect()
            except Damaged as problem:
                self._hold(problem.connection)
                aside = self._set_aside()
                connection = self._connect()
            self._limit_pages(connection, _SPARE_PAGES)
            # Opened here, and not when something is read, so that it is under the writer lock: a database that is just
            # being set aside must not be opened, and who reads must not wait for the writers.
            self._close_spare()
            self._spare = connect_for_reading(self.path)
            self._generation = self.lock.generation()
            self._connection = connection
            self._look_for_sets(connection, aside)
            if not self.reserve.make():
                self._refuse(_full())
        except (Damaged, sqlite3.Error, OSError) as problem:
            self._hold(connection)
            raise unavailable(self.path, problem) from problem
        finally:
            if old is not None:
                old.close()  # after the new one was opened: the last one to be closed makes a checkpoint
            self.lock.release()
        return connection

    def _connect(self) -> sqlite3.Connection:
        is_ours = self.reserve.exists()
        try:
            return connect(self.path, full=self.full, is_ours=is_ours)
        except sqlite3.Error:
            if not self.reserve.free():  # opening takes space as well
                raise
            return connect(self.path, full=self.full, is_ours=is_ours)

    def _replace(self, problem: StorageError, generation: int) -> None:
        """The database of that generation is damaged: put another in its place, unless that has been done.

        Raises `OutboxError` if it can't be.
        """
        self.lock.acquire(WRITE_TIMEOUT)
        try:
            if self.lock.generation() != generation:
                return
            if sets_since(self.folder, _SETS_SECONDS) >= _MOST_SETS:
                raise StorageError(
                    f"{problem}; it has been damaged again and again: is the disk failing?", problem.code
                )
            try:
                self._set_aside()
            except (sqlite3.Error, OSError) as failure:
                raise self._note(_not_replaced(failure)) from failure
        finally:
            self.lock.release()

    def _set_aside(self) -> str:
        """Under the writer lock.  The connections to the damaged database stay open until it is not there any more."""
        try:
            name = set_aside(self.path, self.lock.raise_generation)
        except (sqlite3.Error, OSError):
            if not self.reserve.free():
                raise
            name = set_aside(self.path, self.lock.raise_generation)
        current, self._connection = self._connection, None
        self._hold(current)
        while self._held:
            self._held.pop().close()
        return name

    def _hold(self, connection: sqlite3.Connection | None) -> None:
        if connection is not None and connection is not self._connection:
            self._held.append(connection)

    def _look_for_sets(self, connection: sqlite3.Connection, aside: str | None) -> None:
        """Have those told that this object has not seen yet; of the first time, only what it has just set aside."""
        found = {each.name: each for each in told_sets(connection, self.folder)}
        new = {aside} if self._known_sets is None else found.keys() - self._known_sets
        self._known_sets = set(found)
        for each in sorted(found.keys() & new):
            kept = found[each]
            self._news.append(OutboxDamaged(self.folder / kept.name, kept.events, kept.dead, kept.lost))
            self._look_after = 0  # so that the next `wrote` takes the time to tell

    def tell(self) -> None:
        """Call `on_damaged` for what has been found and not been told yet.  Not under the writer lock."""
        while self._news and self.on_damaged is not None:
            try:
                news = self._news.popleft()
            except IndexError:  # another thread tells it
                return
            self.on_damaged(news)

    def _open_for_reading(self, timeout: float) -> sqlite3.Connection:
        if not self.lock.mutex.acquire(timeout=timeout):
            raise StorageError("the outbox is in use by another thread", "SQLITE_BUSY")
        try:
            if self._connection is None or self._spare is None or self.lock.generation() != self._generation:
                self._open()
            connection, self._spare = self._spare, None
            assert connection is not None
            old, self._reading = self._reading, connection
            self._reading_generation = self._generation
        finally:
            self.lock.mutex.release()
        if old is not None:
            old.close()
        return connection

    def _close_spare(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.close()

    def _disconnect(self, timeout: float) -> None:
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.close()
        self._close_spare()
        connection, self._connection = self._connection, None
        if connection is None:
            return
        # The last close of all processes checkpoints and removes the WAL; that, too, belongs under the writer lock.
        # A process that keeps the lock has the database open, so this is not the last.
        try:
            self.lock.acquire(timeout)
        except OutboxError:
            connection.close()
            return
        try:
            connection.close()
        finally:
            self.lock.release()


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _full() -> StorageError:
    return StorageError(
        "the disk is full: no event is accepted until delivery has made room, or something else is deleted",
        "SQLITE_FULL",
    )


def _held_by_reader() -> StorageError:
    return StorageError(
        f"a reader has kept the WAL from being moved into the database, and it has {WAL_LIMIT_BYTES >> 20} MiB: "
        "end the program that has a transaction open on outbox.db",
        "SQLITE_BUSY",
    )


def _not_replaced(problem: Exception) -> StorageError:
    error = storage_error(problem) if isinstance(problem, sqlite3.Error) else None
    if error is None or is_damage(error):
        error = StorageError(str(problem), "SQLITE_IOERR")
    return StorageError(f"the outbox is damaged, and another can't be made: {error}", error.code)


def _nothing() -> None:
    pass
