"""The events of an outbox, one after the other, as the inspector sees them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from types import NoneType
from typing import Any

from segment_durable.cli.reading import Reader
from segment_durable.clock import Clock
from segment_durable.soundness import TOTALS_KINDS, is_sound, malformed
from segment_durable.views import TOTALS
from segment_durable.views import read_leases as read_rows

__all__ = ["STATES", "Event", "LeaseSeen", "find_id", "find_message", "read_leases", "scan"]

STATES = ("pending", "dead", "all")
_OF_DEAD = ((int, NoneType), (int, NoneType), (str, NoneType), (str, NoneType))
_CHUNK = 500  # events read in one view; at most 32 KiB each

_SELECT = {
    "pending": "SELECT id, appended_at, body, NULL AS buried_at, NULL AS status, NULL AS code, NULL AS answer "
    "FROM event WHERE id BETWEEN :first AND :last",
    "dead": "SELECT id, appended_at, body, buried_at, status, code, answer FROM dead WHERE id BETWEEN :first AND :last",
}
# Both tables have their rows in order, so SQLite merges them and sorts nothing.
_SELECT["all"] = f"{_SELECT['pending']} UNION ALL {_SELECT['dead']}"


@dataclass(frozen=True)
class LeaseSeen:
    """A lease as a reader sees it."""

    first: int
    last: int
    earlier_attempts: int  # known to have been made before this one
    pid: int
    age_seconds: float | None  # None: taken before the machine was restarted, so it can't be told
    remaining_seconds: float | None  # until the deadline, below 0 behind it; None as above

    @property
    def is_dead(self) -> bool:
        """Whether it has ended by itself.

        That its holder was killed is not seen: only the lock file knows, and a reader must not open that.
        """
        return self.remaining_seconds is None or self.remaining_seconds <= 0

    @classmethod
    def of(cls, row: Any, now: float, boot_id: str) -> LeaseSeen:
        """From a row of the table `lease`; `now` on the boot clock."""
        first, last, _, attempt, _, pid, lease_boot, leased_at, deadline = row[:9]
        if lease_boot != boot_id or leased_at > now + 1:
            return cls(first, last, attempt, pid, None, None)
        return cls(first, last, attempt, pid, max(0.0, now - leased_at), deadline - now)


@dataclass(frozen=True)
class Event:
    """One event.  Times: milliseconds since 1970.  The last four are None unless it is dead."""

    id: int
    state: str  # pending, leased or dead
    appended_at: int
    body: bytes
    buried_at: int | None
    status: int | None
    code: str | None
    answer: str | None

    @cached_property
    def message(self) -> Any:
        """The message; if somebody else has put something there that is not JSON, that as text."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return self.body.decode("utf-8", "replace")

    def field(self, *names: str) -> str | None:
        """The first of these fields of the message that is there, as text."""
        if isinstance(self.message, dict):
            for name in names:
                if self.message.get(name) is not None:
                    return str(self.message[name])
        return None


def read_leases(connection: sqlite3.Connection, clock: Clock) -> list[LeaseSeen]:
    return [LeaseSeen.of(row, clock.boot(), clock.boot_id()) for row in read_rows(connection)]


def scan(reader: Reader, clock: Clock, state: str, first: int = 0) -> Iterator[Event]:
    """The events from the id `first` up to the last there is now, in order; `state` is one of `STATES`.

    Memory does not grow with their number.  An event that changes its state meanwhile is seen at most once.
    """
    last = reader.view(_last_id)
    while first <= last:
        chunk = reader.view(partial(_read, clock=clock, state=state, first=first, last=last))
        yield from chunk
        if len(chunk) < _CHUNK:
            return
        first = chunk[-1].id + 1


def _last_id(connection: sqlite3.Connection) -> int:
    totals = connection.execute(TOTALS).fetchone()
    if not is_sound(totals, TOTALS_KINDS):
        raise malformed()
    return int(totals[0])


def find_id(reader: Reader, clock: Clock, event_id: int) -> Event | None:
    found = reader.view(partial(_read, clock=clock, state="all", first=event_id, last=event_id))
    return found[0] if found else None


def find_message(reader: Reader, clock: Clock, message_id: str) -> Event | None:
    """The first event with that messageId; reads every event up to it."""
    # Most bodies are passed over without parsing them; not where JSON might spell the id in another way.
    plain = message_id.isascii() and message_id.replace("-", "").replace("_", "").isalnum()
    needle = message_id.encode() if plain else b""
    for event in scan(reader, clock, "all"):
        if needle in event.body and event.field("messageId") == message_id:
            return event
    return None


def _read(connection: sqlite3.Connection, clock: Clock, state: str, first: int, last: int) -> list[Event]:
    living = [lease for lease in read_leases(connection, clock) if not lease.is_dead]
    events: list[Event] = []
    for row in connection.execute(f"{_SELECT[state]} ORDER BY id LIMIT {_CHUNK}", {"first": first, "last": last}):
        # Out of order they come from pages that a disk has written to the wrong places, and would come again for ever.
        is_next = first <= row[0] <= last and (not events or row[0] > events[-1].id)
        if not is_next or not is_sound(row[1:2], (int,)) or not is_sound(row[3:], _OF_DEAD):
            raise malformed()
        if row[4] is not None:
            now = "dead"
        else:
            now = "leased" if any(lease.first <= row[0] <= lease.last for lease in living) else "pending"
        body = row[2] if isinstance(row[2], bytes) else str(row[2]).encode()
        events.append(Event(row[0], now, row[1], body, *row[3:]))
    return events
