"""The SQLite database of an outbox: transactions and reads, and the parts that they rest on.

Nothing here knows what an event is.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from segment_durable.admission import Admission
from segment_durable.connections import WRITE_TIMEOUT, Connections, Reader
from segment_durable.damage import Damage
from segment_durable.database_file import DATABASE_NAME, PAGE_SIZE, make_folder, roll_back, unavailable
from segment_durable.errors import OutboxBusy, StorageError
from segment_durable.filesystem import check_filesystem
from segment_durable.locks import LOCK_NAME, LockFile
from segment_durable.reserve import Reserve
from segment_durable.space import Space
from segment_durable.sqlite_errors import SQLITE_PROBLEMS, is_damage, storage_error
from segment_durable.wal import Wal

__all__ = ["Database"]


class Database:
    """The database in `folder`, created if there is none.

    `full`: sync at each commit (`PRAGMA synchronous=FULL`).  Raises `OutboxUnavailable` or `NotAnOutbox` if it can't
    be opened; later trouble is a `StorageError` or an `OutboxBusy`.  It ends with `connections.close()`.
    """

    def __init__(self, folder: Path, *, full: bool = False) -> None:
        self.folder = folder
        self.path = folder / DATABASE_NAME
        self.full = full  # sync at each commit
        check_filesystem(self.path)
        make_folder(folder)
        try:
            self.lock = LockFile.open(folder / LOCK_NAME)
        except OSError as problem:
            raise unavailable(folder, problem) from problem
        self.reserve = Reserve(folder)
        self.admission = Admission()
        self.damage = Damage(self.path, self.lock, self.reserve, self.admission)
        self.connections = Connections(self.path, self.lock, self.reserve, self.admission, self.damage, full=full)
        self.wal = Wal(self.connections, self.reserve, self.admission, self.damage)
        self.space = Space(self.connections, self.wal, self.reserve, self.admission)
        is_outermost = self.connections.is_outermost()
        try:
            with self.connections.writer():  # which opens them
                pass
        except BaseException:
            if is_outermost:
                self.connections.unwind()
            self.connections.close()
            raise

    def is_in_place(self) -> bool:
        """Whether the outbox's files are those that are open here, as far as the lock file tells."""
        return self.connections.is_in_place()

    def is_same_as(self, other: Database) -> bool:
        """Whether both are open on the same file."""
        mine, others = self.connections.files, other.connections.files
        return mine is not None and others is not None and mine[0] == others[0]

    def write(self) -> Transaction:
        """One transaction of the only writer; rolled back if the block raises.  It may not be nested."""
        return Transaction(self)

    def write_one(
        self, statement: str, parameters: tuple[Any, ...], ready: Callable[[], None] | None = None
    ) -> sqlite3.Cursor:
        """One statement in a transaction of its own, which is what a put is; the cursor knows what it did.

        Under the writer lock, after whose release `wal.wrote()` is to be called.  It may be called within another call
        by the same thread (a signal handler), as long as that has no transaction open.  `ready` is called when nothing
        but SQLite is left to wait for.
        """
        connection = self.connections.current()
        if connection.in_transaction:
            raise OutboxBusy("the call was made by a signal handler or a finalizer while its thread was writing")
        if self.admission.trouble is not None:
            self.space.check()
        if ready is not None:
            ready()
        try:
            return connection.execute(statement, parameters)
        except SQLITE_PROBLEMS as problem:
            roll_back(connection)
            error = self.admission.note(storage_error(problem))
            if not is_damage(error):
                raise error from problem
        self.connections.replace(error, self.connections.generation)
        try:
            return self.connections.current().execute(statement, parameters)
        except SQLITE_PROBLEMS as problem:
            raise self.connections.explained(problem) from problem

    def read(self, timeout: float = WRITE_TIMEOUT) -> Snapshot:
        """One consistent view of what is committed; blocks other readers of this process, and no writer.

        Raises `StorageError` if another thread keeps the connection for `timeout` seconds.
        """
        return Snapshot(self.connections.reader(timeout))

    def read_one(self, statement: str, parameters: tuple[Any, ...] = (), timeout: float = WRITE_TIMEOUT) -> Any:
        """The first row of one statement, None if there is none; `timeout` as for `read`."""
        try:
            with self.connections.reader(timeout) as connection:
                return connection.execute(statement, parameters).fetchone()
        except StorageError as problem:
            if not is_damage(problem):
                raise
        with self.connections.reader(timeout) as connection:
            return connection.execute(statement, parameters).fetchone()

    def pages(self) -> tuple[int, int]:
        """How many are in use, and how many are free."""
        (free,), (pages,) = self.read_one("PRAGMA freelist_count"), self.read_one("PRAGMA page_count")
        return pages - free, free

    def version(self) -> int:
        """A number that changes with each commit, by whatever process; and now and then without one."""
        version: int = self.read_one("PRAGMA data_version")[0]
        return version


class Transaction:
    """What `Database.write` returns."""

    __slots__ = ("_before", "_connection", "_database", "_writer")

    def __init__(self, database: Database) -> None:
        self._database = database
        self._writer = database.connections.writer()

    def __enter__(self) -> sqlite3.Connection:
        connection = self._connection = self._writer.__enter__()
        self._before = connection.total_changes
        try:
            connection.execute("BEGIN IMMEDIATE")
        except BaseException as problem:
            self._end(problem)
            raise
        return connection

    def __exit__(self, kind: object, problem: BaseException | None, trace: object) -> None:
        if problem is None:
            try:
                self._connection.execute("COMMIT")
            except BaseException as failure:
                self._end(failure)
                raise
        self._end(problem)

    def _end(self, problem: BaseException | None) -> None:
        connection, database = self._connection, self._database
        try:
            if problem is not None:
                roll_back(connection)
                if isinstance(problem, sqlite3.Error):
                    database.admission.note(storage_error(problem))
            is_changed = connection.total_changes != self._before
        finally:
            self._writer.__exit__(None, problem, None)
        if is_changed and problem is None:
            database.wal.wrote(4 * PAGE_SIZE)


class Snapshot:
    """What `Database.read` returns."""

    __slots__ = ("_connection", "_is_outermost", "_reader")

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def __enter__(self) -> sqlite3.Connection:
        connection = self._connection = self._reader.__enter__()
        self._is_outermost = not connection.in_transaction
        if self._is_outermost:
            try:
                connection.execute("BEGIN")
            except BaseException as problem:
                self._end(problem)
                raise
        return connection

    def __exit__(self, kind: object, problem: BaseException | None, trace: object) -> None:
        self._end(problem)

    def _end(self, problem: BaseException | None) -> None:
        try:
            if self._is_outermost:
                # Not by a function of ours, at whose beginning a signal handler may raise: then nobody would do it.
                self._connection.rollback()
        except sqlite3.Error:
            pass  # SQLite has ended it by itself
        finally:
            self._reader.__exit__(None, problem, None)
