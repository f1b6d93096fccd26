"""An outbox's database as a file: created private, opened, told from other files, migrated."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from urllib.parse import quote

from segment_durable.errors import NotAnOutbox, OutboxUnavailable
from segment_durable.filesystem import mapping_problem
from segment_durable.identity import APPLICATION_ID, Damaged, check_content, check_identity, check_wal
from segment_durable.sqlite_errors import SQLITE_PROBLEMS, is_damage, is_unusable, may, storage_error, unwritable

__all__ = [
    "CHECKPOINT_BYTES",
    "DATABASE_NAME",
    "FOR_SYNC",
    "PAGE_SIZE",
    "WAL_LIMIT_BYTES",
    "connect",
    "connect_for_reading",
    "create",
    "file_size",
    "make_folder",
    "roll_back",
    "sync_file",
    "sync_folder",
    "unavailable",
]

DATABASE_NAME = "outbox.db"
SCHEMA_VERSION = 1

# Of 1, 2 and 4 KiB, measured with events of 430 and 4,000 bytes: 2 KiB writes a third less into the WAL than 4 KiB,
# checkpoints in two thirds of the time, and a put takes no longer.
PAGE_SIZE = 2048
# When the WAL has this a checkpoint is due, and a WAL that grew beyond is cut back to it when it starts anew.  Writers
# wait for a checkpoint.  With a third as much as 12 MiB it takes them a third of the time, and there are three times as
# many; a call takes as long on average.
CHECKPOINT_BYTES = 4 << 20
# A WAL beyond this, which only a reader that never ends can cause, takes no more events.
WAL_LIMIT_BYTES = 64 << 20
READ_CACHE_KIB = 256  # what is read is read once
BUSY_TIMEOUT = 5.0  # seconds that SQLite waits for a foreign program that doesn't know of our writer lock
# How a file is opened to be synced.  Not for writing, where that can be: if stdout was closed the descriptor may get
# its number, and must not be printed into.
FOR_SYNC = (os.O_RDWR if os.name == "nt" else os.O_RDONLY) | getattr(os, "O_CLOEXEC", 0)
_NOT_WRITABLE = "is not writable for this user: run as its owner, or set outbox_dir to a folder of this user's"
_LONGEST_PATH = 500  # bytes; nearly what SQLite takes, which adds to it
_WITHOUT_WAL = "its filesystem can't do SQLite's WAL mode: set outbox_dir to a folder on a local disk"


def connect(path: Path, *, full: bool, is_ours: bool) -> sqlite3.Connection:
    """A connection for reading and writing to the outbox at `path`, which is created if it isn't there.

    To be called under the writer lock.  `is_ours`: whether there is a sign that a file of which nothing can be read was
    an outbox.  Raises `Damaged`, `OutboxUnavailable`, `NotAnOutbox`, `sqlite3.Error` or `OSError`.
    """
    outbox_id = None if _create(path, is_ours=is_ours) else check_identity(path, is_ours=is_ours)
    connection = sqlite3.connect(str(path), timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
    try:
        if outbox_id is not None:
            check_wal(connection, outbox_id)
        _migrate(connection, path)
        check_content(connection)
        mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        if mode != "wal":
            raise OutboxUnavailable(path, _WITHOUT_WAL)
        connection.execute("PRAGMA wal_autocheckpoint=0")
        connection.execute(f"PRAGMA journal_size_limit={CHECKPOINT_BYTES}")
        connection.execute(f"PRAGMA synchronous={'FULL' if full else 'NORMAL'}")
        connection.execute("PRAGMA fullfsync=ON")  # as `sync_file`: it changes something on macOS only
        connection.execute("PRAGMA secure_delete=FAST")  # some builds default to ON, which rewrites deleted pages
        connection.execute("PRAGMA temp_store=MEMORY")
    except (Damaged, *SQLITE_PROBLEMS) as problem:
        if isinstance(problem, Damaged) or is_unusable(problem, path):
            raise Damaged(problem, connection) from problem
        connection.close()
        raise
    except BaseException:
        connection.close()
        raise
    return connection


def connect_for_reading(path: Path) -> sqlite3.Connection:
    """A second connection to an outbox, while one of `connect` is open in this process."""
    uri = f"file:{quote(str(path))}?mode=rw"  # read-only, SQLite could not take part in the WAL's shared memory
    connection = sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA query_only=ON")
        connection.execute("PRAGMA wal_autocheckpoint=0")
        connection.execute(f"PRAGMA cache_size=-{READ_CACHE_KIB}")
        connection.execute("SELECT 1 FROM state").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version >= SCHEMA_VERSION:
        # A newer schema is additive unless it says otherwise: during a rolling deploy both versions write.
        (least,) = connection.execute("SELECT value FROM meta WHERE name = 'min_writer'").fetchone() or ("1",)
        if not str(least).isdecimal() or int(least) > version:
            raise Damaged("min_writer can't be")
        if int(least) > SCHEMA_VERSION:
            raise OutboxUnavailable(
                path, f"was written by a newer segment_durable (schema {version}): upgrade this one"
            )
        return
    if connection.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID:
        raise Damaged(f"its schema version is {version}")
    if version == 0:
        connection.execute(f"PRAGMA page_size={PAGE_SIZE}")
        connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
    schema = resources.files("segment_durable").joinpath("schema.sql").read_text("utf-8")
    connection.execute("BEGIN IMMEDIATE")
    try:
        for statement in _statements(schema):
            connection.execute(statement)
        connection.execute("INSERT INTO meta VALUES ('created_at', strftime('%Y-%m-%dT%H:%M:%SZ', 'now'))")
        connection.execute("INSERT INTO meta VALUES ('outbox_id', lower(hex(randomblob(16))))")
        connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        roll_back(connection)
        raise


def make_folder(folder: Path) -> None:
    try:
        # One by one: with `parents=True` those above would get the mode of the umask.
        for missing in [*reversed(folder.parents), folder]:
            if not missing.exists():
                missing.mkdir(mode=0o700, exist_ok=True)
    except OSError as problem:
        raise unavailable(folder, problem) from problem
    if not folder.is_dir():
        raise OutboxUnavailable(folder, "is not a folder: set outbox_dir to a folder")
    if not may(os.W_OK | os.X_OK, folder):
        raise OutboxUnavailable(folder, _NOT_WRITABLE)


def _create(path: Path, *, is_ours: bool) -> bool:
    """Make the database if there is none or an empty file; whether it was made.

    It is made under another name, and gets its own when it is whole and on the disk: whatever interrupts that leaves
    nothing that could be taken for another application's database.  Raises `Damaged` if a WAL is there without it, or
    if the file is empty and there is a sign that an outbox was in it.
    """
    # Looked at, never opened here: closing a descriptor of a database drops the locks of SQLite's own.
    with contextlib.suppress(FileNotFoundError):
        found = os.lstat(path)
        if stat.S_ISLNK(found.st_mode):
            raise OutboxUnavailable(path, "is a symbolic link: make the folder one, or set outbox_dir to the other one")
        if not stat.S_ISREG(found.st_mode):
            raise NotAnOutbox(path, "is not a file")
        if found.st_size:
            return False
        if is_ours:
            raise Damaged("it is empty")
    with contextlib.suppress(FileNotFoundError):
        if os.stat(f"{path}-wal").st_size:
            raise Damaged("there is a WAL without a database")
    new = path.with_name(f"{path.name}.new")
    create(new)
    # Those of a database that is gone would be taken for the new one's.
    for left in (f"{path}-journal", f"{path}-wal", f"{path}-shm"):
        Path(left).unlink(missing_ok=True)
    os.replace(new, path)
    sync_folder(path.parent)
    return True


def create(new: Path) -> None:
    """Make an empty outbox at `new`, in the place of what is there.

    The schema comes before the WAL: so the file itself, without its WAL, says whose it is.  The mode 0600 is what
    SQLite then gives to the WAL and the shared memory too.
    """
    new.unlink(missing_ok=True)
    os.close(os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o600))
    connection = sqlite3.connect(str(new), isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode=MEMORY")
        _migrate(connection, new)
    finally:
        connection.close()


def file_size(path: Path) -> int:
    """Bytes; 0 if it isn't there."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def sync_file(fd: int) -> None:
    """Bring the file's content to the disk.  On macOS fsync() leaves it in the drive's cache."""
    try:
        import fcntl

        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # type: ignore[attr-defined, unused-ignore]
    except (ImportError, AttributeError, OSError):  # OSError: not every filesystem of macOS has it
        getattr(os, "fdatasync", os.fsync)(fd)


def sync_folder(folder: Path) -> None:
    """A new file survives a power cut only once its folder is synced."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _statements(script: str) -> Iterator[str]:
    """The statements of a script one by one: `executescript()` would commit before it begins."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def roll_back(connection: sqlite3.Connection) -> None:
    """SQLite itself has rolled back after some errors (FULL, IOERR), not after others."""
    if connection.in_transaction:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")


def unavailable(path: Path, problem: Exception) -> OutboxUnavailable:
    if isinstance(problem, Damaged):
        return OutboxUnavailable(path, f"is damaged, and so is what took its place ({problem}): is the disk failing?")
    if isinstance(problem, sqlite3.Error) and is_damage(storage_error(problem)):
        return NotAnOutbox(path, f"is damaged or not an outbox ({problem}); it was not touched")
    if isinstance(problem, sqlite3.Error) and storage_error(problem).code == "SQLITE_IOERR":
        obstacle = mapping_problem(path.parent)
        if obstacle:
            return OutboxUnavailable(path, f"no memory can be shared by a file there ({obstacle}), so {_WITHOUT_WAL}")
    file = problem.filename if isinstance(problem, PermissionError) else unwritable(path)
    if file is not None:
        return OutboxUnavailable(file, _NOT_WRITABLE)
    if isinstance(problem, sqlite3.Error) and len(os.fsencode(os.path.realpath(path))) > _LONGEST_PATH:
        return OutboxUnavailable(path, "its path is longer than SQLite takes: set outbox_dir to a shorter one")
    reason = problem.strerror if isinstance(problem, OSError) else problem
    return OutboxUnavailable(path, f"{reason}: set outbox_dir to a folder on a local disk that this user may write to")
