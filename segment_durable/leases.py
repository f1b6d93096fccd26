"""What leases do to rows: which ids are free, what dies with a lease, how one gets smaller.

Functions of an open transaction; `outbox.py` is their only caller.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Sequence
from typing import Any

from segment_durable.records import Lease

__all__ = ["AHEAD", "between", "end_lease", "end_without_last", "first_free", "shrink", "take_over"]

_NO_LIMIT = 1 << 62

# The first events from an id on, before another: the ids of the first and of the last of at most so many.
_RANGE = """
SELECT low, (SELECT max(id) FROM event WHERE id < min(?, low + ?))
FROM (SELECT min(id) AS low FROM event WHERE id >= ? AND id < ?)
"""


# The same, and how many leases there are: mostly none, and then this one look is all that a lease takes.
AHEAD = _RANGE.replace("SELECT low,", "SELECT (SELECT count(*) FROM lease), low,", 1)


def end_lease(connection: sqlite3.Connection, lease: Lease) -> bool:
    """Remove the lease if it is still as it was given, fence and removal in one statement."""
    return bool(
        connection.execute(
            "DELETE FROM lease WHERE first_id = ? AND token = ? AND last_id = ?",
            (lease.first, lease.token, lease.last),
        ).rowcount
    )


def end_without_last(connection: sqlite3.Connection) -> None:
    """Remove the leases, of dead holders, whose last event was removed in another way: each covers that of its last id.

    Should its holder wake, a lease without any event would look like damage.
    """
    connection.execute("DELETE FROM lease WHERE NOT EXISTS (SELECT 1 FROM event WHERE id = lease.last_id)")


def shrink(connection: sqlite3.Connection, lease: Lease, through: int, last: int) -> None:
    if through >= last:
        connection.execute("DELETE FROM lease WHERE token = ?", (lease.token,))
    else:
        connection.execute("UPDATE lease SET first_id = ? WHERE token = ?", (through + 1, lease.token))


def take_over(connection: sqlite3.Connection, dead: Sequence[Any], first: int, last: int) -> list[int]:
    """Take the events `first` to `last` out of the dead leases; the attempts that were made for them.

    What nobody takes now stays on record, for its attempts, under a token and a holder that nobody is: its own may only
    be frozen, and must not acknowledge any of it when it wakes.
    """
    attempts = []
    for first_id, last_id, token, attempt, *_ in dead:
        if last_id < first:
            connection.execute("DELETE FROM lease WHERE token = ?", (token,))  # all of its events have left
        elif first_id <= last:
            attempts.append(attempt + 1)
            if last_id <= last:
                connection.execute("DELETE FROM lease WHERE token = ?", (token,))
            else:
                connection.execute(
                    "UPDATE lease SET first_id = ?, token = ?, holder = 0 WHERE token = ?",
                    (last + 1, secrets.token_bytes(16), token),
                )
    return attempts


def first_free(connection: sqlite3.Connection, living: Sequence[Any], limit: int) -> tuple[int, int] | None:
    """The first range of at most `limit` ids, with an event at each end, that no living lease covers."""
    start = 0
    for first, last, *_ in [*living, (_NO_LIMIT, _NO_LIMIT)]:
        low, high = connection.execute(_RANGE, (first, limit, start, first)).fetchone()
        if low is not None:
            return low, high
        start = last + 1
    return None


def between(living: Sequence[Any], first: int, last: int) -> list[tuple[int, int]]:
    """The parts of the range of ids from `first` to `last` that no living lease covers."""
    parts = []
    for low, high, *_ in [*living, (last + 1, last + 1)]:
        if first < low and first <= last:
            parts.append((first, min(low - 1, last)))
        first = max(first, high + 1)
    return parts
