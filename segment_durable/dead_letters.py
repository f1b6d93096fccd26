"""Dead letters: events that the receiver refused by themselves, buried, shown, requeued and erased.

Functions of an open transaction; `outbox.py` is their only caller.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from segment_durable.books import count
from segment_durable.records import DeadLetter
from segment_durable.soundness import Kinds, all_sound, malformed, sound

__all__ = ["bury_event", "dead_ids", "erase_letters", "how_many_dead", "read_letters", "requeue_letters"]

_KINDS: Kinds = (int, int, int, int, str, str, bytes)


def how_many_dead(connection: sqlite3.Connection) -> int:
    found = connection.execute("SELECT buried - requeued - dead_erased FROM state").fetchone()
    number: int = sound(found, (int,))[0]
    return number


def bury_event(
    connection: sqlite3.Connection, event_id: int, buried_at: int, status: int, code: str, answer: str
) -> None:
    """Move the event, if it is there, to the dead letters.  `buried_at`: milliseconds since 1970."""
    moved = connection.execute(
        "INSERT INTO dead (id, appended_at, buried_at, status, code, answer, body) "
        "SELECT id, appended_at, ?, ?, ?, ?, body FROM event "
        "WHERE id = ? AND typeof(appended_at) = 'integer' AND typeof(body) = 'blob'",
        (buried_at, status, code, answer, event_id),
    ).rowcount
    if connection.execute("DELETE FROM event WHERE id = ?", (event_id,)).rowcount != moved:
        raise malformed()
    count(connection, "buried = buried + ?, last_id = max(last_id, ?)", (moved, event_id))


def read_letters(connection: sqlite3.Connection, limit: int) -> list[DeadLetter]:
    """The dead letters, oldest first; at most `limit`, -1 means all."""
    query = "SELECT id, appended_at, buried_at, status, code, answer, body FROM dead ORDER BY id LIMIT ?"
    return [
        DeadLetter(row[0], row[1] / 1000, row[2] / 1000, *row[3:])
        for row in all_sound(connection.execute(query, (limit,)), _KINDS)
    ]


def dead_ids(connection: sqlite3.Connection) -> list[int]:
    return [row[0] for row in connection.execute("SELECT id FROM dead ORDER BY id")]


def requeue_letters(connection: sqlite3.Connection, ids: Sequence[int]) -> tuple[int, int]:
    """Make them events again, behind all others, under new ids; how many there were, and the bytes of their bodies."""
    moved = size = 0
    for each in ids:
        (length,) = connection.execute("SELECT ifnull(sum(length(body)), 0) FROM dead WHERE id = ?", (each,)).fetchone()
        size += length
        found = connection.execute(
            "INSERT INTO event (id, appended_at, body) "
            "SELECT (SELECT max(last_id, ifnull((SELECT max(id) FROM event), 0)) FROM state) + 1, "
            "appended_at, body FROM dead "
            "WHERE id = ? AND typeof(appended_at) = 'integer' AND typeof(body) = 'blob'",
            (each,),
        ).rowcount
        if connection.execute("DELETE FROM dead WHERE id = ?", (each,)).rowcount != found:
            raise malformed()
        moved += found
    count(connection, "requeued = requeued + ?", (moved,))
    return moved, size


def erase_letters(connection: sqlite3.Connection, ids: Sequence[int]) -> int:
    """Remove them for good; how many there were."""
    erased = sum(connection.execute("DELETE FROM dead WHERE id = ?", (each,)).rowcount for each in ids)
    count(connection, "dead_erased = dead_erased + ?", (erased,))
    return erased
