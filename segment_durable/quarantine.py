"""A damaged database is set aside, with its WAL, and another takes its place.

All of it happens under the writer lock, and in an order in which the process may be killed anywhere:

1. What can be read goes into a new file, `outbox.db.new`.  Until that is whole, nothing else is touched.
2. The generation is raised: from the next time that another process has the writer lock, it opens the outbox anew.
3. `outbox.db.new` becomes `outbox.db.damaged-TIME-N.salvaged`.  From here on whoever opens the outbox goes on.
4. The WAL and the database are renamed to `outbox.db.damaged-TIME-N`, so that SQLite's own tools find the one by the
   other; the shared memory is deleted.
5. The new file gets the name `outbox.db`.

A process that has the old files open can do no harm: it compares the generation before it writes, and SQLite neither
checkpoints nor deletes the WAL of a database that is not at its path any more.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from segment_durable.database_file import sync_folder
from segment_durable.records import DamagedSet, Salvaged
from segment_durable.salvage import DAMAGE_FACT, salvage

__all__ = ["finish", "kept_sets", "set_aside", "sets_since", "told_sets"]

_SET = re.compile(r"outbox\.db\.damaged-(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d)(\d\d)Z-\d+")
_DONE = ".salvaged"
_TIME = "%Y%m%dT%H%M%SZ"


def set_aside(path: Path, raise_generation: Callable[[], None]) -> str:
    """Put another database in the place of the one at `path`; the name of what is kept of the old one.

    Under the writer lock.  A connection to the old one that is open in this process has to stay so until the call
    returns: the last one to be closed would copy a WAL into it that need not be its own.  Raises `sqlite3.Error` or
    `OSError`, and then the next call, by any process, goes on from there.
    """
    left = finish(path)  # of an attempt that failed: what lies at `path` may be half of the old one
    if left is not None:
        return left
    kept = _new_name(path)
    with contextlib.ExitStack() as stack:

        def opened(name: str) -> int | None:
            try:
                fd = os.open(name, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            except FileNotFoundError:
                return None
            # Not closed before the end: with that the process loses the locks of its connections to that file.
            stack.callback(os.close, fd)
            return fd

        new = path.with_name(f"{path.name}.new")
        salvage(opened(str(path)), opened(f"{path}-wal"), new, kept.name)
        raise_generation()
        os.rename(new, f"{kept}{_DONE}")
        sync_folder(path.parent)
        _move(path, kept)
    return kept.name


def finish(path: Path) -> str | None:
    """Go on where a process was killed that set something aside; the name of that, None if there is nothing to do."""
    for each in os.listdir(path.parent):
        name = each.removesuffix(_DONE)
        if name != each and _SET.fullmatch(name):
            _move(path, path.with_name(name))
            return name
    return None


def kept_sets(folder: Path) -> dict[str, int]:
    """The names of the sets that are kept in `folder`, oldest first, and how many bytes each has."""
    sizes: dict[str, int] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            found = _SET.match(entry.name)
            if found and not entry.name.endswith(_DONE):
                with contextlib.suppress(FileNotFoundError):
                    sizes[found[0]] = sizes.get(found[0], 0) + entry.stat().st_size
    return dict(sorted(sizes.items()))


def sets_since(folder: Path, seconds: float) -> int:
    """How many sets were put aside in the last `seconds`."""
    oldest = time.time() - seconds
    return sum(_set_aside_at(name) >= oldest for name in kept_sets(folder))


def told_sets(connection: sqlite3.Connection, folder: Path) -> list[DamagedSet]:
    """The sets of which the database tells, oldest first, and those that are there without that."""
    sizes = kept_sets(folder)
    found: dict[str, Salvaged] = {}
    # As bytes: text that is not UTF-8 would end the query.
    for name, value in connection.execute(
        "SELECT CAST(substr(name, ?) AS BLOB), CAST(value AS BLOB) FROM meta WHERE substr(name, 1, ?) = ?",
        (len(DAMAGE_FACT) + 1, len(DAMAGE_FACT), DAMAGE_FACT),
    ).fetchall():
        with contextlib.suppress(ValueError, TypeError):
            text = name.decode()
            if _SET.fullmatch(text):
                found[text] = Salvaged(**json.loads(value))
    unknown = Salvaged(None, None, None)
    return [
        DamagedSet(name, _set_aside_at(name), sizes.get(name, 0), *found.get(name, unknown))
        for name in sorted({*sizes, *found})
    ]


def _set_aside_at(name: str) -> float:
    """Seconds since 1970, 0 if the name has a time that can't be."""
    match = _SET.fullmatch(name)
    with contextlib.suppress(ValueError):
        # Not by strptime(), which imports a module at its first call: that is no time to need a descriptor.
        return datetime.fromisoformat("{}-{}-{}T{}:{}:{}+00:00".format(*match.groups())).timestamp() if match else 0.0
    return 0.0


def _move(path: Path, kept: Path) -> None:
    for suffix in ("-wal", "-journal"):
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{path}{suffix}", f"{kept}{suffix}")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{path}-shm")
    if not os.path.lexists(kept):
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, kept)
    os.rename(f"{kept}{_DONE}", path)
    sync_folder(path.parent)


def _new_name(path: Path) -> Path:
    taken = os.listdir(path.parent)
    moment = time.strftime(_TIME, time.gmtime())
    number = 1
    while any(name.startswith(f"{path.name}.damaged-{moment}-{number}") for name in taken):
        number += 1
    return path.with_name(f"{path.name}.damaged-{moment}-{number}")
