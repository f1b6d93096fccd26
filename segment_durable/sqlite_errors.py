"""What SQLite's errors mean: no space, a damaged file, or something else."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from segment_durable.errors import StorageError

__all__ = ["SQLITE_PROBLEMS", "is_damage", "is_full", "is_unusable", "may", "storage_error", "unwritable"]

# Python 3.10 does not give the result code, only SQLite's fixed English text for it.
_CODES = {
    "database or disk is full": "SQLITE_FULL",
    "disk I/O error": "SQLITE_IOERR",
    "database is locked": "SQLITE_BUSY",
    "attempt to write a readonly database": "SQLITE_READONLY",
    "unable to open database file": "SQLITE_CANTOPEN",
    "database disk image is malformed": "SQLITE_CORRUPT",
    "file is not a database": "SQLITE_NOTADB",
}


# What SQLite says of a file that it can open, and that is not what it should be.
_UNUSABLE = (
    *("malformed database schema", "unsupported file format", "Could not decode to UTF-8", "no such table"),
    *("no such column", "table event already exists", "attached databases must use the same text encoding"),
    # We write nothing that these refuse: a value that was read is not what it was.
    *("NOT NULL constraint failed", "UNIQUE constraint failed", "CHECK constraint failed", "datatype mismatch"),
)


# Python raises the second where the text of an error quotes a schema that is not UTF-8; 3.10 the first, without a text.
SQLITE_PROBLEMS = (sqlite3.Error, UnicodeError)


def storage_error(problem: Exception) -> StorageError:
    """`problem` is one of `SQLITE_PROBLEMS`."""
    text = str(problem)
    code = "SQLITE_CORRUPT" if text.startswith(_UNUSABLE) else _CODES.get(text, "SQLITE_ERROR")
    # The last quotes what it can't decode.
    if isinstance(problem, UnicodeError) or not text or text.startswith("Could not decode"):
        text, code = "there is text that is not UTF-8", "SQLITE_CORRUPT"
    return StorageError(f"the outbox can't be used: {text}", code)


def is_full(problem: StorageError) -> bool:
    """Whether it may be for want of space: SQLite reports a file that may not grow as an I/O error."""
    return problem.code in ("SQLITE_FULL", "SQLITE_IOERR")


def is_damage(problem: StorageError) -> bool:
    """Whether it is because the file is damaged."""
    return problem.code in ("SQLITE_CORRUPT", "SQLITE_NOTADB")


def is_unusable(problem: Exception, path: Path) -> bool:
    """Whether an attempt to open the file has failed because it is damaged."""
    error = storage_error(problem)
    return is_damage(error) or (error.code == "SQLITE_READONLY" and _says_read_only(path))


def _says_read_only(path: Path) -> bool:
    """Whether the file itself says that it may only be read, by the version that its header asks of writers.

    SQLite says the same where it could open one of the files for reading only: by its mode, for a security module, or
    because there was no descriptor for a moment.
    """
    try:
        # SQLite's locks on the file end when it is closed.  Under the writer lock nobody closes the database meanwhile,
        # and a connection that goes on has them twice: see shared_locks.py.
        with open(path, "rb") as file:
            return file.read(19)[18:] > b"\2"
    except OSError:
        return False


def unwritable(path: Path) -> Path | None:
    """The one of a database's files that is there and that this user may not write to; `None` if there is none."""
    files = [path, *(path.with_name(path.name + suffix) for suffix in ("-wal", "-shm"))]
    return next((each for each in files if os.path.exists(each) and not may(os.W_OK, each)), None)


def may(do: int, path: Path) -> bool:
    """As `os.access`, by the user as whom this process acts, which need not be the one who has started it."""
    return os.access(path, do, effective_ids=os.access in os.supports_effective_ids)
