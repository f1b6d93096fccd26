"""Another application's database in the place of the outbox, and damaged: refused, or set aside and kept.

It has no application id, as most have none: what tells whose it is are its tables, if they can be read.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from segment_durable.errors import NotAnOutbox
from segment_durable.outbox import Outbox
from segment_durable.quarantine import kept_sets

from .pages import overwrite

PAGE = 4096  # SQLite's default, and not ours

MakeOutbox = Callable[..., Outbox]


def make_foreign(path: Path) -> None:
    """With rows that look like events but for what is in them."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA page_size={PAGE}")
        connection.execute("BEGIN")
        connection.execute("CREATE TABLE job (id INTEGER PRIMARY KEY, due INTEGER, body TEXT)")
        connection.execute("CREATE TABLE name (name TEXT UNIQUE)")
        bodies = (json.dumps({"secret": number, "text": "x" * 300}) for number in range(1, 200))
        connection.executemany("INSERT INTO job (due, body) VALUES (5, ?)", [(body,) for body in bodies])
        connection.executemany("INSERT INTO name VALUES (?)", [(f"precious {number}",) for number in range(200)])
        connection.execute("COMMIT")
    assert path.stat().st_size > 10 * PAGE


def files(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in folder.iterdir()}


def garbage(size: int) -> bytes:
    return random.Random(1).randbytes(size)


def behind_the_first_page(path: Path) -> None:
    overwrite(path, PAGE, garbage(path.stat().st_size - PAGE))


def cut_in_the_middle(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 + 77)


def cut_to_one_page(path: Path) -> None:
    os.truncate(path, PAGE)


def cut_within_the_first_page(path: Path) -> None:
    os.truncate(path, 1000)


def no_tables_any_more(path: Path) -> None:
    """The first page says that it has no rows, and makes sense."""
    overwrite(path, 103, bytes(2))


def all_of_it(path: Path) -> None:
    overwrite(path, 0, garbage(path.stat().st_size))


def first_page(path: Path) -> None:
    overwrite(path, 0, garbage(PAGE))


def schema(path: Path) -> None:
    overwrite(path, 100, garbage(PAGE - 100))


def no_magic(path: Path) -> None:
    overwrite(path, 0, bytes(16))


def cut_to_a_stump(path: Path) -> None:
    os.truncate(path, 50)


REFUSED = [behind_the_first_page, cut_in_the_middle, cut_to_one_page, cut_within_the_first_page, no_tables_any_more]
SET_ASIDE = [all_of_it, first_page, schema, no_magic, cut_to_a_stump]


@pytest.mark.parametrize("damage", REFUSED, ids=lambda each: each.__name__)
def test_while_its_first_page_makes_sense_it_is_refused_and_not_touched(
    outbox_factory: MakeOutbox, folder: Path, damage: Callable[[Path], None]
) -> None:
    folder.mkdir()
    make_foreign(folder / "outbox.db")
    damage(folder / "outbox.db")
    before = files(folder)
    for _ in range(2):
        with pytest.raises(NotAnOutbox, match="another application"):
            outbox_factory()
    assert files(folder) == before | {"outbox.lock": b""}


@pytest.mark.parametrize("damage", SET_ASIDE, ids=lambda each: each.__name__)
def test_what_can_not_be_told_from_a_damaged_outbox_is_kept_under_another_name(
    outbox_factory: MakeOutbox, folder: Path, damage: Callable[[Path], None]
) -> None:
    folder.mkdir()
    make_foreign(folder / "outbox.db")
    damage(folder / "outbox.db")
    damaged = (folder / "outbox.db").read_bytes()
    outbox = outbox_factory()
    (name,) = kept_sets(folder)
    assert (folder / name).read_bytes() == damaged
    assert outbox.put(b"{}", 1)
    assert outbox.stats().balanced
    outbox.close()
    assert outbox_factory().put(b"{}", 1)
    assert list(kept_sets(folder)) == [name]
    assert (folder / name).read_bytes() == damaged


@pytest.mark.parametrize("damage", [first_page, no_magic], ids=lambda each: each.__name__)
def test_none_of_its_rows_become_events(
    outbox_factory: MakeOutbox, folder: Path, damage: Callable[[Path], None]
) -> None:
    """Or they would be sent to Segment."""
    folder.mkdir()
    make_foreign(folder / "outbox.db")
    damage(folder / "outbox.db")
    assert outbox_factory().rows(0, 1 << 60) == []


@pytest.mark.parametrize("suffix", ["-wal", "-journal"])
def test_what_it_had_not_moved_into_its_file_yet_is_kept_beside_it(
    outbox_factory: MakeOutbox, folder: Path, tmp_path: Path, suffix: str
) -> None:
    """Under the name by which SQLite's own tools find it."""
    folder.mkdir()
    theirs = tmp_path / "theirs.db"
    make_foreign(theirs)
    with contextlib.closing(sqlite3.connect(theirs, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA journal_mode={'WAL' if suffix == '-wal' else 'DELETE'}")
        connection.execute("PRAGMA cache_size=2")  # so that the journal is written before the commit
        connection.execute("BEGIN")
        connection.execute("UPDATE job SET due = due + 1")
        if suffix == "-wal":
            connection.execute("COMMIT")
        for each in ("", suffix):
            shutil.copy(f"{theirs}{each}", folder / f"outbox.db{each}")
    schema(folder / "outbox.db")
    before = files(folder)
    assert len(before[f"outbox.db{suffix}"]) > PAGE
    assert outbox_factory().put(b"{}", 1)
    (name,) = kept_sets(folder)
    assert {each: (folder / each.replace("outbox.db", name)).read_bytes() for each in before} == before
