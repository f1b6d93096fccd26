"""What an outbox can be asked by anyone who has a connection to it, also a read-only one."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from types import NoneType
from typing import Any

from segment_durable.clock import Clock
from segment_durable.records import Backoff, OutboxStats
from segment_durable.soundness import TOTALS_KINDS, Kinds, all_sound, check_numbers, sound

__all__ = ["REBOOT_CAP", "TOTALS", "read_backoff", "read_leases", "read_stats"]

# Seconds that any wait has left at the most, and so one from before a reboot.  One that seems to have more was stored
# before the machine was put back to a snapshot.
REBOOT_CAP = 300.0

# Columns are named, not "*": a later schema may add some.
_LEASES = """
SELECT first_id, last_id, token, attempt, holder, pid, boot_id, leased_at, deadline FROM lease ORDER BY first_id
"""
_LEASE_KINDS: Kinds = (int, int, bytes, int, int, int, str, float, float)

_BACKOFF = """
SELECT boot_id, not_before, not_before_wall, told, failures,
       first_failure, first_throttle, reported, last_error, last_error_at
FROM backoff
"""
_BACKOFF_KINDS: Kinds = (
    *(str, float, float, int, int),
    *((float, NoneType), (float, NoneType), int, str, int),
)

TOTALS = """
SELECT max(last_id, ifnull((SELECT max(id) FROM event), 0)), (SELECT min(id) FROM event),
       delivered, buried, erased, expired, requeued, dead_erased, (SELECT count(*) FROM lease)
FROM state
"""


# What is read here raises what SQLite does of a damaged database, if a value is none that was ever stored.


def read_leases(connection: sqlite3.Connection) -> list[Any]:
    """first_id, last_id, token, attempt, holder, pid, boot_id, leased_at, deadline of each, in order."""
    leases = list(all_sound(connection.execute(_LEASES), _LEASE_KINDS))
    for first, last, _, attempt, *_ in leases:
        check_numbers(first, last, attempt)
    return leases


def read_backoff(connection: sqlite3.Connection, clock: Clock) -> Backoff:
    """The shared backoff, its times on the boot clock of now even if the machine was restarted since."""
    row = sound(connection.execute(_BACKOFF).fetchone(), _BACKOFF_KINDS)
    boot_id, not_before, not_before_wall, told, failures = row[:5]
    first_failure, first_throttle, reported, last_error, last_error_at = row[5:]
    check_numbers(failures, abs(last_error_at))  # before 1970, says a clock that was never set
    now = clock.boot()
    restarted = not_before > 0 and (boot_id != clock.boot_id() or not_before - now > REBOOT_CAP)
    if restarted:
        not_before = now + min(max(0.0, not_before_wall - clock.time()), REBOOT_CAP)
        first_failure = None if first_failure is None else now
        first_throttle = None if first_throttle is None else now
    return Backoff(
        *(not_before, bool(told), failures, first_failure, first_throttle),
        *(bool(reported), last_error, last_error_at / 1000, restarted),
    )


def read_stats(
    connection: sqlite3.Connection, clock: Clock, size_on_disk: int, is_gone: Callable[[Any, float], bool]
) -> OutboxStats:
    """Statistics from one open transaction; `is_gone` tells of which leases the holders have ended."""
    last, first, delivered, buried, erased, expired, requeued, dead_erased, _ = sound(
        connection.execute(TOTALS).fetchone(), TOTALS_KINDS
    )
    now = clock.boot()
    leased = 0
    for lease in read_leases(connection):
        if not is_gone(lease, now):
            span = (lease[0], lease[1])
            leased += connection.execute("SELECT count(*) FROM event WHERE id BETWEEN ? AND ?", span).fetchone()[0]
    oldest = None
    if first is not None:
        found = connection.execute("SELECT appended_at FROM event WHERE id = ?", (first,)).fetchone()
        (appended_at,) = sound(found, (int,))
        oldest = max(0.0, clock.time() - appended_at / 1000)
    backoff = read_backoff(connection, clock)
    return OutboxStats(
        pending=last - delivered - buried - erased - expired,
        leased=leased,
        dead=buried - requeued - dead_erased,
        oldest_age_seconds=oldest,
        accepted=last - requeued,
        delivered=delivered,
        erased=erased + dead_erased,
        expired=expired,
        failures=backoff.failures,
        next_attempt_seconds=max(0.0, backoff.not_before - now),
        last_error=backoff.last_error,
        last_error_age_seconds=max(0.0, clock.time() - backoff.last_error_at) if backoff.last_error_at else None,
        size_on_disk=size_on_disk,
    )
