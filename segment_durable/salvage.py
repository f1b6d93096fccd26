"""What can be read of a damaged database, put into a new one: events and dead letters, with their ids and bodies.

Leases and the backoff are left behind: what was on its way is pending again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from segment_durable.database_file import FOR_SYNC, PAGE_SIZE, create, sync_file
from segment_durable.identity import APPLICATION_ID
from segment_durable.pages import Broken, Pages
from segment_durable.records import Salvaged
from segment_durable.soundness import MOST
from segment_durable.source import SOURCE_FACTS
from segment_durable.trees import Trees

__all__ = ["DAMAGE_FACT", "salvage"]

DAMAGE_FACT = "damaged:"  # in `meta`, before the name of a set that was put aside

# Where schema.sql puts the tables, for when the schema can't be read.
_ROOTS = {"event": 3, "dead": 4, "state": 6, "meta": 8}
_SHAPES: dict[str, tuple[type, ...]] = {"event": (int, bytes), "dead": (int, int, int, str, str, bytes)}
_TIMES = {"event": 1, "dead": 2}  # how many columns of these are times
_OUTBOX_ID = re.compile("[0-9a-f]{32}")
_IN_EACH_MESSAGE = ("type", "messageId")
_MARGIN = 1_000_000  # ids that are skipped where it is not known which ones were given
_LEAST_ROW_BYTES = 8
_DAY = 86_400_000  # milliseconds


def salvage(main: int | None, wal: int | None, new: Path, name: str) -> Salvaged:
    """Make a whole database at `new`, on the disk, of what can be read in `main` and `wal`: descriptors, or None.

    Memory does not grow with the number of events.  The new database remembers, under `name`, what came of it.
    Raises `sqlite3.Error` or `OSError` where the disk fails.
    """
    source = _choose(main, wal)
    create(new)
    with contextlib.closing(sqlite3.connect(str(new), isolation_level=None)) as connection:
        # Whatever interrupts this, the file is made anew.
        connection.execute("PRAGMA journal_mode=OFF")
        connection.execute("PRAGMA synchronous=OFF")
        connection.execute("BEGIN")
        result = _copy(source, connection, 0 if main is None else os.fstat(main).st_size)
        facts = {**source.kept_facts(), DAMAGE_FACT + name: json.dumps(result._asdict())}
        connection.executemany("INSERT INTO meta VALUES (?, ?)", facts.items())
        connection.execute("COMMIT")
    fd = os.open(new, FOR_SYNC)
    try:
        sync_file(fd)
    finally:
        os.close(fd)
    return result


class _Source:
    """The tables of a damaged outbox."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self.is_torn = pages.is_wal_torn
        self.trees = Trees(pages)
        self._roots = dict(_ROOTS)
        for row in self.trees.rows(1):
            if len(row.values) >= 4 and row.values[0] == "table" and row.values[1] in _ROOTS:
                self._roots[row.values[1]] = row.values[3] if isinstance(row.values[3], int) else 0
        # Without a sign of that it may be another application's, whose rows must not be sent.
        self._is_ours = self._has_our_number() or self.outbox_id() is not None or self.state() is not None

    def is_whole(self) -> bool:
        """Whether it is an outbox of which every page can be read."""
        # What the counters are tells nothing of whose WAL it is, but there has to be one row of them.
        if not self._has_our_number() or self._counters() is None or self.outbox_id() is None:
            return False
        rows = (row for table in _SHAPES for row in self.trees.rows(self._roots[table]))
        return not any(row.stray or self.trees.broken for row in rows) and not self.trees.broken

    def facts(self) -> dict[str, str]:
        """What `meta` says, as far as it can be read."""
        entries = self.trees.entries(self._roots["meta"])
        return dict(each for each in entries if len(each) == 2 and all(isinstance(value, str) for value in each))

    def kept_facts(self) -> dict[str, str]:
        """Whose outbox this is, if that can be believed, and what was put aside before."""
        facts = self.facts()
        kept = {name: value for name, value in facts.items() if name.startswith(DAMAGE_FACT)}
        if all(pattern.fullmatch(facts.get(name, "")) for name, pattern in SOURCE_FACTS.items()):
            kept.update((name, facts[name]) for name in SOURCE_FACTS)
        return kept

    def outbox_id(self) -> str | None:
        found = _OUTBOX_ID.fullmatch(self.facts().get("outbox_id", ""))
        return found[0] if found else None

    def state(self) -> list[int] | None:
        """last_id, delivered, buried, erased, expired, requeued, dead_erased; None if that can't be."""
        found = self._counters()
        return found if found and all(isinstance(each, int) and 0 <= each < MOST for each in found) else None

    def _has_our_number(self) -> bool:
        try:
            return int.from_bytes(self._pages.page(1)[68:72], "big") == APPLICATION_ID
        except Broken:
            return False

    def _counters(self) -> list[Any] | None:
        found = [row.values[1:8] for row in self.trees.rows(self._roots["state"])]
        return found[0] if len(found) == 1 and len(found[0]) == 7 else None

    def rows(self, table: str, *, stray: bool) -> Iterator[tuple[Any, ...]]:
        """The rows that can be used, as they are to be inserted; the strays, or the others."""
        shape = _SHAPES[table]
        now = int(time.time() * 1000)
        for row in self.trees.rows(self._roots[table]):
            if row.stray is not stray or len(row.values) <= len(shape):
                continue
            *facts, body = row.values[1 : len(shape) + 1]
            if isinstance(body, str):  # of one bit another value, and the same bytes
                body = body.encode()
            if not isinstance(body, bytes) or not _is_event(body, () if self._is_ours else _IN_EACH_MESSAGE):
                continue
            # Without what else is known of it an event can be delivered all the same.
            facts = [value if isinstance(value, kind) else kind() for value, kind in zip(facts, shape)]
            for number in range(_TIMES[table]):
                if not 0 < facts[number] < now + _DAY:  # or max_age would expire it by a damaged time
                    facts[number] = now
            yield (row.id, *facts, body)


def _choose(main: int | None, wal: int | None) -> _Source:
    """The file with its WAL, or without one that is not its own.

    What a WAL adds to its own file makes sense; so if the file alone does and both together do not, or if both are
    different outboxes, another database's WAL was put beside it.  Where both tells against the other, as where the
    file's own id is damaged, the one that can be read as a whole is right.
    """
    pages = Pages(main, wal, PAGE_SIZE)
    both = _Source(pages)
    if main is None or not pages.has_wal:
        return both
    alone = _Source(Pages(main, None, PAGE_SIZE))
    if None in (alone.outbox_id(), both.outbox_id()) or alone.outbox_id() == both.outbox_id():
        # Asked first of the one that mostly is not whole: at the first damage that is known.
        return alone if not both.is_whole() and alone.is_whole() else both
    return both if not alone.is_whole() and both.is_whole() else alone


def _copy(source: _Source, connection: sqlite3.Connection, size: int) -> Salvaged:
    source.trees.broken = 0
    counts, highest, reached_end = [], 0, True
    for table, shape in _SHAPES.items():
        insert = f"INSERT OR IGNORE INTO {table} VALUES ({', '.join('?' * (len(shape) + 1))})"
        connection.executemany(insert, source.rows(table, stray=False))
        reached_end = reached_end and source.trees.reached_end
        top, count = connection.execute(f"SELECT ifnull(max(id), 0), count(*) FROM {table}").fetchone()
        highest = max(highest, top)
        counts.append(count)
    # An id is given once: it is the event as it was before it was refused.
    counts[0] -= connection.execute("DELETE FROM event WHERE id IN (SELECT id FROM dead)").rowcount
    state = source.state()
    last = highest if state is None else max(highest, state[0])
    known = last
    if source.trees.broken or state is None:
        for number, (table, shape) in enumerate(_SHAPES.items()):
            # Behind the others: which of these is first is not known.
            for row in source.rows(table, stray=True):
                last += 1
                counts[number] += 1
                connection.execute(
                    f"INSERT INTO {table} VALUES ({', '.join('?' * (len(shape) + 1))})", (last, *row[1:])
                )
    if not reached_end or state is None:
        last += _MARGIN
    pending, dead = counts
    last = max(last, pending + dead)
    delivered, erased, expired, dead_erased, lost = _books(state, known, pending, dead)
    if not reached_end or source.is_torn or (lost or 0) * _LEAST_ROW_BYTES > size:
        lost = None
    # An id that no event has any more is booked as buried and requeued: it was given twice, so to speak, and so it
    # counts neither as accepted nor as anything else.
    buried = last - pending - delivered - erased - expired
    connection.execute(
        "UPDATE state SET last_id = ?, delivered = ?, buried = ?, erased = ?, expired = ?, requeued = ?, "
        "dead_erased = ?",
        (last, delivered, buried, erased, expired, buried - dead_erased - dead, dead_erased),
    )
    return Salvaged(pending, dead, lost)


def _books(state: list[int] | None, last: int, pending: int, dead: int) -> tuple[int, int, int, int, int | None]:
    """delivered, erased, expired, dead_erased, and how many events were lost: None if the books can't be believed."""
    if state is not None:
        _, delivered, buried, erased, expired, requeued, dead_erased = state
        lost = last - delivered - buried - erased - expired - pending
        lost_dead = buried - requeued - dead_erased - dead
        if lost >= 0 and lost_dead >= 0:
            return delivered, erased, expired, dead_erased, lost + lost_dead
    return 0, 0, 0, 0, None


def _is_event(body: bytes, names: Collection[str]) -> bool:
    """Whether it is a message still, with those names in it: one that is none would have its whole batch refused."""
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(message, dict) and message.keys() >= set(names)
