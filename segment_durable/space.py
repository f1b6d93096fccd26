"""The space of an outbox: made when there is too little for delivery or for puts, and given back when it is free."""

from __future__ import annotations

import contextlib
import sqlite3
import time

from segment_durable.admission import Admission
from segment_durable.connections import SPARE_PAGES, Connections
from segment_durable.database_file import PAGE_SIZE, file_size
from segment_durable.errors import OutboxError, StorageError
from segment_durable.reserve import Reserve
from segment_durable.sqlite_errors import SQLITE_PROBLEMS, is_damage, is_full, storage_error
from segment_durable.wal import Wal, held_by_reader

__all__ = ["LOOK_SECONDS", "Space"]

LOOK_SECONDS = 0.25  # between two attempts to get out of trouble
_GIVE_BACK_PAGES = 256


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
                    if not self._reserve.is_needed() or not self._shrink(_GIVE_BACK_PAGES):
                        break
                    self._wal.checkpoint(truncate=True)
            if self._wal.is_too_long():
                self._admission.trouble = held_by_reader()
            elif self._reserve.make() and not self._reserve.is_needed():
                connections.limit_pages(connections.current(), SPARE_PAGES)  # a checkpoint may have found damage
                self._admission.trouble = None
        return self._admission.trouble is None

    def give_back(self, pages: int) -> bool:
        """Return up to `pages` free pages to the filesystem, in one short transaction; whether there are more."""
        free = self._shrink(pages)
        if free:
            self._wal.wrote(pages * PAGE_SIZE)
        return free > pages

    def size_on_disk(self) -> int:
        """Bytes that the database and its WAL occupy."""
        return file_size(self._connections.path) + self._wal.size()

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

    def _shrink(self, pages: int) -> int:
        """Give up to `pages` free pages back; how many there were."""
        with self._connections.writer() as connection, self._connections.translated():
            free: int = connection.execute("PRAGMA freelist_count").fetchone()[0]
            if free:
                # Not execute(): the pragma is a statement without columns that has to be stepped once for each page,
                # and a cursor of Python's steps such a one once only.
                connection.executescript(f"PRAGMA incremental_vacuum({pages})")
        return free
