"""Whose file lies where the outbox should be, and whether it is one that can be used."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path
from urllib.parse import quote

from segment_durable.errors import NotAnOutbox
from segment_durable.sqlite_errors import SQLITE_PROBLEMS, is_unusable, storage_error

__all__ = ["APPLICATION_ID", "Damaged", "check_content", "check_identity", "check_wal"]

APPLICATION_ID = 0x53445142  # "SDQB", so that no other application's database is taken for an outbox
_TABLES = ("event", "dead", "lease", "state", "backoff", "meta")
_BOOKS = """
SELECT ifnull((SELECT min(id) FROM event), 0), ifnull((SELECT max(id) FROM event), 0), last_id,
       delivered, buried, erased, expired, requeued, dead_erased
FROM state
"""


class Damaged(Exception):
    """The file is an outbox that can't be used.

    `connection`, if there is one, has to stay open until the file is not at its path any more: closing the last one
    copies the WAL into the file, and it need not be that file's.
    """

    def __init__(self, problem: object, connection: sqlite3.Connection | None = None) -> None:
        super().__init__(str(problem))
        self.connection = connection


def check_identity(path: Path, *, is_ours: bool) -> str | None:
    """Refuse another application's database before SQLite opens it.

    Returns the outbox's id, "" if it can't be read, and None if the database is empty and nobody's.

    Opening it would recover its WAL or its journal, which is that application's to do.  "immutable" reads the file
    alone and takes no locks; and it reads by SQLite, which knows that closing a descriptor drops the locks of all.
    The file alone makes no sense after a checkpoint that was killed half-way: its first page tells whose it is, and no
    more than that may be asked of one that is ours.
    """
    application = 0
    uri = f"file:{quote(str(path))}?immutable=1"
    with contextlib.closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as connection:
        try:
            connection.execute("PRAGMA writable_schema=ON")  # or SQLite reads no file that is shorter than it says
            application = connection.execute("PRAGMA application_id").fetchone()[0]
            if application == APPLICATION_ID:
                return _outbox_id(connection)
            tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
            pages: int = connection.execute("PRAGMA page_count").fetchone()[0]
        except SQLITE_PROBLEMS as problem:
            if not is_unusable(problem, path):
                raise
            if application and not is_ours:
                raise _foreign(path) from problem
            raise Damaged(problem) from problem
    if tables.issuperset(_TABLES):
        return ""  # only its application id is damaged
    is_empty = not tables and pages <= 1  # of more, without a table, the rows may still be there
    if application or not is_empty or any(os.path.exists(f"{path}{suffix}") for suffix in ("-wal", "-journal")):
        raise _foreign(path)
    return None


def _foreign(path: Path) -> NotAnOutbox:
    return NotAnOutbox(path, "is a database of another application; it was not touched: set another outbox_dir")


def check_wal(connection: sqlite3.Connection, outbox_id: str) -> None:
    """Raise `Damaged` if the file is another's with its WAL; `outbox_id` is what `check_identity` has found without."""
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise Damaged("its application id is another")
    if outbox_id and outbox_id != _outbox_id(connection):
        raise Damaged("its WAL is another outbox's")


def _outbox_id(connection: sqlite3.Connection) -> str:
    try:
        found = connection.execute("SELECT value FROM meta WHERE name = 'outbox_id'").fetchone()
    except SQLITE_PROBLEMS:
        return ""
    return "" if found is None else str(found[0])


def check_content(connection: sqlite3.Connection) -> None:
    """Raise `Damaged` or `sqlite3.Error` for what can be seen at once: a look at each table, and at the books."""
    for table in _TABLES:
        connection.execute(f"SELECT * FROM {table} LIMIT 1").fetchone()
    try:
        connection.execute("UPDATE state SET last_id = last_id WHERE 0")  # the file itself can say that it is read-only
    except sqlite3.OperationalError as problem:
        if storage_error(problem).code != "SQLITE_BUSY":  # which a foreign program may cause, and which passes
            raise
    facts = connection.execute(_BOOKS).fetchone()
    if connection.execute("SELECT 1 FROM backoff").fetchone() is None or facts is None:
        raise Damaged("a row is missing")
    if not all(isinstance(each, int) and each >= 0 for each in facts):
        raise Damaged("the books make no sense")
    first, last, last_id, delivered, buried, erased, expired, requeued, dead_erased = facts
    pending = max(last, last_id) - delivered - buried - erased - expired
    if not (last > 0) <= pending <= (last - first + 1 if last else 0) or requeued + dead_erased > buried:
        raise Damaged("the books don't balance")
