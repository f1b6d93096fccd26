"""Looking into an outbox without leaving a trace.

SQLite's read-only mode does leave one: beside an idle database, which has no WAL, it creates a WAL and shared memory
that it can't remove again.  So an idle database is opened as immutable, which creates and locks nothing, and
afterwards the file must be as it was before; if it is not, a process has come and the look is taken again.

Views are short, and each has a connection of its own: a reader that stays (`list | less`) would keep the WAL from
being checkpointed, and its files from being removed by the last process.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from segment_durable.database_file import BUSY_TIMEOUT, DATABASE_NAME, SCHEMA_VERSION
from segment_durable.errors import NotAnOutbox, OutboxUnavailable
from segment_durable.identity import APPLICATION_ID
from segment_durable.soundness import malformed
from segment_durable.sqlite_errors import SQLITE_PROBLEMS, is_damage, may, storage_error

__all__ = ["Reader"]

_LOOKS = 20  # each is spoilt only by a process that starts or ends during it

_Seen = TypeVar("_Seen")


class Reader:
    """The outbox in `folder`, to be looked at; nothing is opened until `view`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / DATABASE_NAME
        self._wal = folder / f"{DATABASE_NAME}-wal"
        self._shm = folder / f"{DATABASE_NAME}-shm"

    def view(self, look: Callable[[sqlite3.Connection], _Seen]) -> _Seen:
        """What `look` returns; it sees one consistent state, and is called again if that was not to be had.

        Raises `OutboxUnavailable` or `NotAnOutbox`.
        """
        for remaining in reversed(range(_LOOKS)):
            self._check_file()
            idle, before = self._is_idle(), self._file_state()
            try:
                with contextlib.closing(self._open(immutable=idle)) as connection:
                    connection.execute("BEGIN")
                    self._check_identity(connection)
                    seen = look(connection)
            except (*SQLITE_PROBLEMS, NotAnOutbox) as problem:
                spoilt = self._file_state() != before if idle else self._is_idle()
                if spoilt and remaining:
                    continue
                if isinstance(problem, SQLITE_PROBLEMS):
                    raise self._unreadable(problem) from problem
                raise
            if not idle or self._file_state() == before:
                return seen
        raise OutboxUnavailable(self.folder, "is opened and closed all the time: try again")

    def size_on_disk(self) -> int:
        """Bytes that the database and its WAL occupy."""
        return _size(self._path) + _size(self._wal)

    def _is_idle(self) -> bool:
        """Whether the database file alone is the whole content, and no process has it open."""
        return not os.path.exists(self._wal) or (_size(self._wal) == 0 and not os.path.exists(self._shm))

    def _file_state(self) -> tuple[int, ...]:
        try:
            found = os.stat(self._path)
        except OSError:
            return ()
        return found.st_ino, found.st_size, found.st_mtime_ns, _size(self._wal)

    def _check_file(self) -> None:
        try:
            mode = os.stat(self._path).st_mode
        except FileNotFoundError:
            problem = "no outbox is here: outbox.db is missing" if self.folder.exists() else "there is no such folder"
            raise OutboxUnavailable(self.folder, problem) from None
        except NotADirectoryError:
            raise OutboxUnavailable(self.folder, f"is no folder: name the one that holds {DATABASE_NAME}") from None
        if not stat.S_ISREG(mode):
            raise NotAnOutbox(self._path, "is no file")
        if not may(os.R_OK, self._path):
            raise OutboxUnavailable(self._path, "this user may not read it")

    def _open(self, *, immutable: bool) -> sqlite3.Connection:
        uri = f"{self._path.absolute().as_uri()}?mode=ro{'&immutable=1' if immutable else ''}"
        connection = sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT, isolation_level=None)
        connection.text_factory = _text
        return connection

    def _check_identity(self, connection: sqlite3.Connection) -> None:
        if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise NotAnOutbox(self._path, "is a database, but not an outbox")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            least = connection.execute("SELECT value FROM meta WHERE name = 'min_writer'").fetchone()
            if least is not None and not str(least[0]).isdecimal():
                raise malformed()
            if least is not None and int(least[0]) > SCHEMA_VERSION:
                raise OutboxUnavailable(self._path, f"is of a newer segment_durable (schema {version}): use that one")

    def _unreadable(self, problem: Exception) -> OutboxUnavailable:
        text = str(problem)
        if is_damage(storage_error(problem)):
            reason = "there is text that is not UTF-8" if isinstance(problem, UnicodeError) or not text else text
            return NotAnOutbox(self._path, f"is damaged or not an outbox ({reason})")
        if text == "unable to open database file" and not may(os.W_OK, self.folder):
            text += "; with a WAL it needs the shared memory of a running process, or the right to write in the folder"
        return OutboxUnavailable(self._path, f"can't be read: {text}")


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _text(content: bytes) -> str:
    return content.decode("utf-8", "replace")  # a refusing answer was cut to its first bytes
