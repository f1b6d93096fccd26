"""The space of an outbox: made when there is too little for delivery or for puts, and given back when it is free."""

from __future__ import annotations

import contextlib
import sqlite3
import time

from segment_durable.admission import Admission
from segment_durable.connections import SPARE_PAGES, Connections
from segment_durable.database_file import PAGE_SIZE, file_size, roll_back
from segment_durable.errors import OutboxError, StorageError
from segment_durable.reserve import Reserve
from segment_durable.sqlite_errors import SQLITE_PROBLEMS, is_damage, is_full, storage_error
from segment_durable.wal import Wal, held_by_reader

__all__ = ["LOOK_SECONDS", "Space"]

LOOK_SECONDS = 0.25  # between two attempts to get out of trouble
# What one transaction that gives space back may take, for writers wait for it.  A free page at the file's end takes
# microseconds, but if it is in use and many others are free SQLite looks through the list of these for one further
# down, which takes up to a millisecond; and nobody knows beforehand where the one kind ends and the other begins.
_SHRINK_SECONDS = 0.004


class Space:
    """That of the database which `connections` are to, and of its WAL and its reserve."""

    def __init__(self, connections: Connections, wal: Wal, reserve: Reserve, admission: Admission) -> None:
        self._connections = connections
        self._wal = wal
        self._reserve = reserve
        self._admission = admission
        self._next_look = 0.0

    def check(self) -> None:
        """Raise `StorageError` while there is no space for new events.  Under the mutex, before a put."""
        if self._admission.trouble is not None and time.monotonic() >= self._next_look:
            self.recover()
        trouble = self._admission.trouble
        if trouble is not None:
            raise StorageError(str(trouble), trouble.code)

    def check_delivery(self) -> None:
        """Raise `StorageError` while a reader keeps the WAL so long that no event may leave.  Before a lease."""
        if not self._wal.is_too_long_for_delivery():
            return
        if time.monotonic() >= self._next_look:
            self.recover()
        if self._wal.is_too_long_for_delivery():
            raise held_by_reader()

    def make_room(self, problem: StorageError) -> bool:
        """For a write of the sender's that failed: free the reserve and begin the WAL anew; whether to try again.

        After damage it is worth another try as well: another database has taken the place of the damaged one.
        """
        if is_damage(problem):
            return True
        if not is_full(problem):
            return False
        connections = self._connections
        try:
            with connections.writer() as connection:
                if connection.in_transaction:
                    return False
                if problem.code == "SQLITE_FULL" and self._is_damaged_and_not_full(connection):
                    connections.replace(problem, connections.generation)
                    return True
                self._reserve.free()
                connections.limit_pages(connection, 0)
                with contextlib.suppress(OutboxError):
                    self._wal.checkpoint(truncate=True)
        except OutboxError:
            return False
        return True

    def recover(self) -> bool:
        """Make the WAL short, give space back and make the reserve again; whether puts are accepted now."""
        self._next_look = time.monotonic() + LOOK_SECONDS
        connections = self._connections
        with contextlib.suppress(OutboxError), connections.writer() as connection:
            if connection.in_transaction:
                return False
            with contextlib.suppress(OutboxError):
                self._wal.checkpoint(truncate=True)
                for _ in range(8):  # then others may write
                    if not self._reserve.is_needed() or not self._shrink()[0]:
                        break
                    self._wal.checkpoint(truncate=True)
            if self._wal.is_too_long():
                self._admission.trouble = held_by_reader()
            elif self._reserve.make() and not self._reserve.is_needed():
                connections.limit_pages(connections.current(), SPARE_PAGES)  # a checkpoint may have found damage
                self._admission.trouble = None
        return self._admission.trouble is None

    def give_back(self) -> tuple[int, int]:
        """Give free pages back in one short transaction: how many were, and how many are left.

        The file is cut by the next checkpoint.
        """
        given, left = self._shrink()
        if given:
            self._wal.wrote(given * PAGE_SIZE)
        return given, left

    def size_on_disk(self) -> int:
        """Bytes that the database and its WAL occupy."""
        return self.database_size() + self._wal.size()

    def database_size(self) -> int:
        """Bytes of the database alone, as far as checkpoints have come."""
        return file_size(self._connections.path)

    def _is_damaged_and_not_full(self, connection: sqlite3.Connection) -> bool:
        """Whether SQLite has said that the disk is full, and it is not.

        It says so, too, of a damaged page that refers to one beyond the largest that a database can have.  Whoever
        delivers would find that at each attempt, and send the same events for ever.
        """
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        (most,) = connection.execute("PRAGMA max_page_count").fetchone()
        if self._reserve.is_needed() or pages >= most:
            return False
        try:
            return bool(connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",))
        except SQLITE_PROBLEMS as problem:
            return is_damage(storage_error(problem))

    def _shrink(self) -> tuple[int, int]:
        """Give free pages back for a short time: how many were, and how many are left."""
        connections = self._connections
        with connections.writer() as connection:
            free: int = connection.execute("PRAGMA freelist_count").fetchone()[0]
            if not free:
                return 0, 0
            end = time.monotonic() + _SHRINK_SECONDS
            try:
                connection.execute("BEGIN IMMEDIATE")
                for given in range(1, free + 1):  # noqa: B007
                    # One page: it is a statement to be stepped once for each, and Python steps it once only.
                    connection.execute("PRAGMA incremental_vacuum(1)")
                    if time.monotonic() >= end:
                        break
                connection.execute("COMMIT")
            except BaseException:
                roll_back(connection)
                raise
        return given, free - given
