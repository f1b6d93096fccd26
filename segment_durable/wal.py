"""The WAL of an outbox: how much was written, when that is synced, and how it is moved into the database."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable

from segment_durable.admission import Admission, disk_full
from segment_durable.connections import Connections
from segment_durable.damage import Damage
from segment_durable.database_file import (
    BUSY_TIMEOUT,
    CHECKPOINT_BYTES,
    FOR_SYNC,
    PAGE_SIZE,
    WAL_LIMIT_BYTES,
    file_size,
    sync_file,
)
from segment_durable.errors import OutboxError, StorageError
from segment_durable.reserve import Reserve
from segment_durable.sqlite_errors import is_full, storage_error

__all__ = ["Wal", "held_by_reader"]

# Where nobody makes the due checkpoints (no thread could be started), writers make them themselves after this.
OVERDUE_BYTES = WAL_LIMIT_BYTES // 2
# A reader that never ends may keep the WAL from being moved.  What loses nothing by it stops first: delivery, which
# writes into the WAL that events have left.
DELIVERY_LIMIT_BYTES = WAL_LIMIT_BYTES // 4 * 3
# How large the WAL really is, by the bytes of all processes, is looked up after so many of our own.
LOOK_BYTES = 512 << 10
_FRAME_HEADER_BYTES = 24
_COMMIT_BYTES = PAGE_SIZE + _FRAME_HEADER_BYTES  # what a commit writes beside its content


class Wal:
    """That of the database which `connections` are to."""

    def __init__(self, connections: Connections, reserve: Reserve, admission: Admission, damage: Damage) -> None:
        self._connections = connections
        self._reserve = reserve
        self._admission = admission
        self._damage = damage
        self._path = connections.path.with_name(f"{connections.path.name}-wal")
        self._dirty = False  # something was committed since the last sync
        self.needs_checkpoint = False
        self._unseen_bytes = 0  # written by this process since it last looked at the WAL
        self._look_after = 0
        self._held_bytes = 0  # what the WAL had at a checkpoint that a reader did not let move all of it
        self._scarce = False  # there is so little space that the WAL is to be kept short
        self._on_written: Callable[[], None] = _nothing
        damage.on_news = self._look_soon

    def watch(self, on_written: Callable[[], None]) -> None:
        """From now on call that as `wrote` says, and when puts are refused."""
        self._on_written = self._admission.on_refused = on_written
        self._dirty = False  # or what was written before would hide the next first commit

    def wrote(self, size: int) -> None:
        """About `size` bytes were committed, and the writer lock is free again.

        Calls what `watch` was given for the first commit since the last sync, and while a checkpoint is due.
        """
        unseen = self._unseen_bytes = self._unseen_bytes + size + _COMMIT_BYTES
        if self._dirty and unseen < self._look_after:
            return
        try:
            self._dirty = True
            self._look()
            self._on_written()
        except BaseException:  # a signal handler's: nobody may have been told, and the next commit is to do it
            self._look_soon()
            raise
        self._damage.tell()

    @property
    def is_unsynced(self) -> bool:
        """Whether a commit may not have reached the disk yet: always False with `full`."""
        return self._dirty and not self._connections.full

    def size(self) -> int:
        """Bytes, by whatever process."""
        return file_size(self._path)

    def is_too_long(self) -> bool:
        """Whether it has so much that no more events are taken."""
        return self.size() > WAL_LIMIT_BYTES

    def is_too_long_for_delivery(self) -> bool:
        return self.size() > DELIVERY_LIMIT_BYTES

    def sync(self) -> None:
        """Bring all commits so far to the disk.

        With `synchronous=NORMAL` SQLite syncs the WAL at checkpoints only; the call bounds what a power cut takes.
        SQLite keeps no locks on the WAL file, so opening and closing it here breaks none.
        """
        self._dirty = False
        if self._connections.full:
            return
        try:
            fd = os.open(self._path, FOR_SYNC)
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
        with self._connections.writer() as connection:
            # Not to wait for a reader: all writers of the host would wait with us.
            connection.execute("PRAGMA busy_timeout=0")
            pragma = f"PRAGMA wal_checkpoint({'TRUNCATE' if truncate or self._scarce else 'PASSIVE'})"
            try:
                try:
                    busy, frames, moved = connection.execute(pragma).fetchone()
                except sqlite3.Error as problem:
                    if not is_full(storage_error(problem)) or not self._reserve.free():
                        raise
                    busy, frames, moved = connection.execute(pragma).fetchone()
            finally:
                connection.execute(f"PRAGMA busy_timeout={int(BUSY_TIMEOUT * 1000)}")
            self.needs_checkpoint = False  # again: it was asked for by those who wrote while the WAL was synced
        done = not busy and frames == moved
        self._held_bytes = 0 if done else self.size()
        return bool(done)

    def _look(self) -> None:
        """See how long the WAL is, whoever wrote it, and how much space there is; make a checkpoint if it is overdue.

        At a commit SQLite cuts a WAL that starts anew to `CHECKPOINT_BYTES`, so one that is longer was not moved yet.
        The less space there is, the shorter the WAL is kept: the reserve has to hold what a checkpoint may need.
        """
        self._unseen_bytes = 0
        size = self.size()
        due = min(CHECKPOINT_BYTES, max(self._reserve.size // 8, self._reserve.room() // 4))
        self._scarce = due < CHECKPOINT_BYTES
        self._look_after = min(LOOK_BYTES, due // 4)
        if size <= due:
            self._held_bytes = 0
        held = self._held_bytes and self._held_bytes + due // 4  # a reader is in the way: not at each look
        self.needs_checkpoint = size > max(due, held)
        overdue = min(OVERDUE_BYTES, 2 * due) if self._scarce else OVERDUE_BYTES
        if size > max(overdue, held) and not self._connections.lock.depth:
            with contextlib.suppress(OutboxError):
                self.checkpoint(truncate=size > WAL_LIMIT_BYTES)
        if self._admission.trouble is not None:
            return
        if size > WAL_LIMIT_BYTES and self.is_too_long():
            self._admission.refuse(held_by_reader())
        elif not self._reserve.exists() and self._connections.is_in_place():  # or it went with the folder
            self._admission.refuse(disk_full())

    def _look_soon(self) -> None:
        self._look_after = 0  # so that the next `wrote` takes the time to tell


def held_by_reader() -> StorageError:
    return StorageError(
        "a reader has kept the WAL from being moved into the database, and it has become too long: "
        "end the program that has a transaction open on outbox.db",
        "SQLITE_BUSY",
    )


def _nothing() -> None:
    pass
