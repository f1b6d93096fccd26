"""Values of a wrong type in pages that are whole: SQLite sees no damage there, and hands them out like any others."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from segment_durable.errors import OutboxDamaged
from segment_durable.outbox import Outbox
from segment_durable.quarantine import kept_sets
from segment_durable.records import Backoff, Lease
from segment_durable.testing.clock import FakeClock

from .common import becomes

MakeOutbox = Callable[..., Outbox]

NOT_UTF8 = object()
WRONG: dict[str, list[Any]] = {
    "INTEGER": [None, "zzz", 1.5, b"x"],
    "REAL": [None, "zzz", b"x"],
    "TEXT": [None, 7, 1.5, b"x", NOT_UTF8],
    "BLOB": [None, 7, 1.5, "zzz"],
}
COLUMNS = {
    "event": {"appended_at": "INTEGER", "body": "BLOB"},
    "dead": {
        **dict.fromkeys(("appended_at", "buried_at", "status"), "INTEGER"),
        **dict.fromkeys(("code", "answer"), "TEXT"),
        "body": "BLOB",
    },
    "lease": {
        **dict.fromkeys(("last_id", "attempt", "holder", "pid"), "INTEGER"),
        **dict.fromkeys(("leased_at", "deadline"), "REAL"),
        "token": "BLOB",
        "boot_id": "TEXT",
    },
    "state": dict.fromkeys(
        ("last_id", "delivered", "buried", "erased", "expired", "requeued", "dead_erased"), "INTEGER"
    ),
    "backoff": {
        **dict.fromkeys(("told", "failures", "reported", "last_error_at"), "INTEGER"),
        **dict.fromkeys(("not_before", "not_before_wall", "first_failure", "first_throttle"), "REAL"),
        **dict.fromkeys(("boot_id", "last_error"), "TEXT"),
    },
    "meta": {"name": "TEXT", "value": "TEXT"},
}
NULLABLE = {("backoff", "first_failure"), ("backoff", "first_throttle")}
Damage = tuple[str, str, Any]


def damages() -> Iterator[Damage]:
    for table, columns in COLUMNS.items():
        for column, kind in columns.items():
            for value in WRONG[kind]:
                if value is not None or (table, column) not in NULLABLE | {("meta", "name")}:
                    yield table, column, value


def damage(folder: Path, table: str, column: str, value: Any, where: str = "") -> None:
    """Put a value there that the table's own declaration would not take."""
    path = folder / "outbox.db"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA wal_autocheckpoint=0")
        (declared,) = connection.execute("SELECT sql FROM sqlite_master WHERE name = ?", (table,)).fetchone()
        lax = re.sub(r"(?<!KEY)(?: (?:INTEGER|REAL|TEXT|BLOB)(?! PRIMARY)| NOT NULL)+(?=,|\s)", " ", declared)
        _declare(connection, table, lax.replace("TEXT PRIMARY", "PRIMARY"))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA wal_autocheckpoint=0")
        expression, parameters = ("CAST(x'ff' AS TEXT)", ()) if value is NOT_UTF8 else ("?", (value,))
        connection.execute(f"UPDATE {table} SET {column} = {expression} {where}", parameters)
        _declare(connection, table, declared)


def _declare(connection: sqlite3.Connection, table: str, sql: str) -> None:
    (version,) = connection.execute("PRAGMA schema_version").fetchone()
    connection.execute("PRAGMA writable_schema=ON")
    connection.execute("UPDATE sqlite_master SET sql = ? WHERE name = ?", (sql, table))
    connection.execute(f"PRAGMA schema_version={version + 1}")


PENDING, DEAD, LEASED = range(5, 21), (1, 2, 3), (5, 12)
HIT = {"event": "WHERE id = 8", "dead": "WHERE id = 2", "meta": "WHERE name = 'source_digest'"}


def body(number: int) -> bytes:
    return json.dumps({"messageId": f"m-{number}", "text": "x" * number}).encode()


def fill(folder: Path) -> None:
    """1 to 3 dead, 4 delivered, 5 to 20 pending, and a failed attempt."""
    outbox = Outbox(folder, FakeClock(), write_key="key")
    for number in range(1, 21):
        assert outbox.put(body(number), 1000 + number)
    lease = take(outbox, 20)
    for number in DEAD:
        assert outbox.bury(lease, number, status=400, code="c", answer="a", max_dead=99)
    assert outbox.ack(lease, 4) == 1
    outbox.fail(lease, becomes(Backoff(failures=2, last_error="503", last_error_at=5.0)))
    outbox.close()


def take(outbox: Outbox, limit: int) -> Lease:
    lease = outbox.lease(limit, 60, hurry=True)
    assert isinstance(lease, Lease), lease
    return lease


class Life:
    """What happens to an outbox, and what became of each event."""

    def __init__(self, outbox: Outbox, lease: Lease | None) -> None:
        self.outbox = outbox
        self.held = [lease] if lease is not None else []
        self.out: list[bytes] = []  # in the order in which they left
        self.erased = 0

    def send(self, lease: Lease, *, by_row: bool = False, through: int | None = None) -> None:
        last = lease.last if through is None else through
        if by_row:
            rows = self.outbox.rows(lease.first, last)
            if not rows:
                return
            last, events = rows[-1].id, b",".join(row.body for row in rows)
        else:
            count, _, last, events = self.outbox.joined(lease.first, last, 100)
            if not count:
                return
        bodies = [json.dumps(each).encode() for each in json.loads(b"[" + events + b"]")]
        deleted = self.outbox.ack(lease, last)
        if deleted is not None:
            assert deleted == len(bodies), "something was acknowledged that was not sent"
            self.out += bodies

    def leased(self) -> Lease:
        if not self.held:
            self.held.append(take(self.outbox, 8))
        return self.held[-1]

    def drain(self) -> None:
        for _ in range(8):
            found = self.outbox.lease(100, 60, hurry=True)
            if isinstance(found, Lease):
                self.send(found)
            elif found.reason == "empty":
                return
            else:
                self.outbox.release(self.held.pop())
        raise AssertionError("it does not come to an end")

    # Each of these finds the damage first.

    def put(self) -> None:
        for number in (21, 22):
            assert self.outbox.put(body(number), 5, 1000)

    def put_without_a_limit(self) -> None:
        assert self.outbox.put(body(21), 5)

    def lease_more(self) -> None:
        found = self.outbox.lease(3, 60, max_leases=2, hurry=True)
        assert isinstance(found, Lease)
        self.held.append(found)

    def send_joined(self) -> None:
        self.send(self.leased())

    def send_rows(self) -> None:
        self.send(self.leased(), by_row=True)

    def send_a_part(self) -> None:
        self.send(self.leased(), through=9)

    def bury(self) -> None:
        lease = self.leased()
        for number in range(5, 10):
            if self.outbox.bury(lease, number, status=400, code="c", answer="a", max_dead=99) is None:
                break

    def fail(self) -> None:
        lease = self.leased()
        self.outbox.fail(lease, becomes(Backoff(failures=1, first_failure=1.0)))

    def extend(self) -> None:
        self.outbox.extend(self.leased(), 60)

    def expire(self) -> None:
        for lease in self.held:
            self.outbox.release(lease)
        self.out += self.outbox.expire(1.010)

    def stats(self) -> None:
        assert self.outbox.stats().balanced

    def pending(self) -> None:
        assert self.outbox.pending() >= 15

    def last_id(self) -> None:
        assert self.outbox.last_id() >= 20

    def dead_letters(self) -> None:
        assert len(self.outbox.dead_letters()) in (2, 3)

    def requeue(self) -> None:
        self.outbox.requeue()

    def erase(self) -> None:
        self.erased += self.outbox.erase()

    def erase_dead(self) -> None:
        self.erased += self.outbox.erase_dead([2, 3])


CALLS = [
    *("put", "put_without_a_limit", "lease_more", "send_joined", "send_rows", "send_a_part", "bury", "fail"),
    *("extend", "expire", "stats", "pending", "last_id", "dead_letters", "requeue", "erase", "erase_dead"),
]
LEAVING = ("expire", "erase", "erase_dead", "requeue")


@pytest.mark.parametrize("opened", [True, False], ids=["open", "closed"])
@pytest.mark.parametrize("call", CALLS)
def test_a_value_of_a_wrong_type_is_damage(
    outbox_factory: MakeOutbox, tmp_path: Path, long: bool, call: str, opened: bool
) -> None:
    fill(tmp_path / "whole")
    chance = random.Random(f"{call} {opened}")
    for table, column, value in damages() if long else [each for each in damages() if chance.random() < 0.25]:
        if table == "lease" and not opened:
            continue  # it died with its holder
        folder = tmp_path / "damaged"
        shutil.copytree(tmp_path / "whole", folder)
        try:
            _live_with(outbox_factory, folder, (table, column, value), call, opened=opened)
        except Exception as problem:
            raise AssertionError(f"{table}.{column} = {value!r}: {problem!r}") from problem
        shutil.rmtree(folder)


@pytest.mark.parametrize("last_id", [1 << 53, 1 << 62, (1 << 63) - 1])
def test_a_last_id_that_no_outbox_can_have_come_to_is_damage_and_is_not_gone_on_from(
    outbox_factory: MakeOutbox, tmp_path: Path, last_id: int
) -> None:
    fill(tmp_path / "damaged")
    damage(tmp_path / "damaged", "state", "last_id", last_id)
    outbox = outbox_factory(folder=tmp_path / "damaged", write_key="key")
    assert outbox.put(body(21), 5, 1000)
    assert outbox.last_id() < 1 << 40
    life = Life(outbox, None)
    life.drain()
    assert outbox.stats().pending == 0
    assert outbox.stats().balanced
    assert len(kept_sets(tmp_path / "damaged")) == 1


@pytest.mark.parametrize("value", [-(1 << 53), 1 << 53, (1 << 63) - 1])
@pytest.mark.parametrize("column", ["lease.last_id", "lease.attempt", "backoff.failures", "backoff.last_error_at"])
def test_a_number_that_nothing_was_ever_counted_up_to_is_damage(
    outbox_factory: MakeOutbox, tmp_path: Path, column: str, value: int
) -> None:
    fill(tmp_path)
    told: list[OutboxDamaged] = []
    outbox = outbox_factory(folder=tmp_path, write_key="key")
    outbox.db.damage.on_damaged = told.append
    life = Life(outbox, take(outbox, 8))
    table, _, name = column.partition(".")
    damage(tmp_path, table, name, value)
    life.lease_more()
    life.drain()
    outbox.db.damage.tell()
    assert len(told) == 1
    assert outbox.stats().pending == 0
    assert life.out == [body(number) for number in PENDING]


def _live_with(outbox_factory: MakeOutbox, folder: Path, what: Damage, call: str, *, opened: bool) -> None:
    told: list[OutboxDamaged] = []
    lease = None
    if opened:
        outbox = outbox_factory(folder=folder, write_key="key")
        lease = take(outbox, 8)
        assert (lease.first, lease.last) == LEASED
        outbox.stats()  # opens the second connection
    damage(folder, *what, HIT.get(what[0], ""))
    if not opened:
        outbox = outbox_factory(folder=folder, write_key="key")
    outbox.db.damage.on_damaged = told.append
    life = Life(outbox, lease)
    getattr(life, call)()
    life.stats()
    life.dead_letters() if call not in ("bury", "requeue", "erase_dead") else outbox.dead_letters()
    assert outbox.put(body(23), 5, 1000)
    life.drain()
    outbox.db.damage.tell()
    stats = outbox.stats()
    assert stats.balanced
    assert stats.pending == 0
    dead = outbox.dead_letters()
    assert stats.dead == len(dead)
    assert outbox.last_id() >= 20
    with outbox.db.read() as connection:
        if told:  # and of values of a wrong type this does tell
            assert connection.execute("PRAGMA quick_check").fetchone() == ("ok",)
    originals = {body(number) for number in (*DEAD, *PENDING)}
    missing = originals - set(life.out) - {letter.body for letter in dead}
    assert len(told) == len(kept_sets(folder)) <= 1
    is_lost = what[1] == "body" and len(missing) > life.erased
    assert len(missing) == life.erased + is_lost
    if told:
        # Counters that make no sense can't tell it.
        assert told[0].lost == (None if what[0] == "state" else is_lost)
    else:
        assert not is_lost
        # It was written anew, has left, is not asked for, or is read at the next opening.
        assert what[0] in ("lease", "backoff", "meta") or what[:2] == ("event", "appended_at") or call in LEAVING
    outbox.close()
    again = outbox_factory(folder=folder, write_key="key")
    assert again.stats().balanced
    assert again.put(body(24), 5, 1000)
    again.close()
