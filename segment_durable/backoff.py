"""The backoff that all senders on an outbox share, as one row: read, stored and ended in an open transaction."""

from __future__ import annotations

import sqlite3
from dataclasses import replace

from segment_durable.clock import Clock
from segment_durable.records import Backoff
from segment_durable.views import read_backoff

__all__ = ["current_backoff", "end_backoff", "store_backoff"]


def current_backoff(connection: sqlite3.Connection, clock: Clock) -> Backoff:
    """The shared backoff; after a restart of the machine it becomes, once, one of times of its boot clock.

    Going by the wall clock at each look would wait for ever on a machine that wakes up in 1970.
    """
    backoff = read_backoff(connection, clock)
    if backoff.restarted:
        backoff = replace(backoff, restarted=False)
        store_backoff(connection, clock, backoff)
    return backoff


def store_backoff(connection: sqlite3.Connection, clock: Clock, backoff: Backoff) -> None:
    wall = clock.time() + max(0.0, backoff.not_before - clock.boot())
    connection.execute(
        "UPDATE backoff SET boot_id = ?, not_before = ?, not_before_wall = ?, told = ?, failures = ?, "
        "first_failure = ?, first_throttle = ?, reported = ?, last_error = ?, last_error_at = ?",
        (
            *(clock.boot_id(), backoff.not_before, wall, backoff.told, backoff.failures),
            *(backoff.first_failure, backoff.first_throttle, backoff.reported),
            *(backoff.last_error, round(backoff.last_error_at * 1000)),
        ),
    )


def end_backoff(connection: sqlite3.Connection, clock: Clock) -> None:
    """The receiver took or judged something, so it is there again.

    A wait that it has asked for meanwhile, in an answer to another sender, holds nevertheless.
    """
    connection.execute(
        "UPDATE backoff SET not_before = 0, not_before_wall = 0, told = 0, failures = 0, first_failure = NULL, "
        "first_throttle = NULL, reported = 0 "
        "WHERE (failures > 0 OR told OR reported OR not_before > 0 OR first_throttle IS NOT NULL) "
        "AND NOT (told AND not_before > ? AND boot_id = ?)",
        (clock.boot(), clock.boot_id()),
    )
