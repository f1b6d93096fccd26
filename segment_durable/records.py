"""What the outbox hands out: plain, frozen records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["NO_EVENTS", "Backoff", "DamagedSet", "DeadLetter", "Lease", "NotNow", "OutboxStats", "Row", "Salvaged"]


class Row(NamedTuple):
    """One event: its id and the bytes of its message."""

    id: int
    body: bytes


class Salvaged(NamedTuple):
    """What was got out of a damaged database; None: not known."""

    events: int | None
    dead: int | None
    lost: int | None  # events and dead letters that could not be read


@dataclass(frozen=True)
class DamagedSet:
    """A damaged database that is kept in the folder of the outbox: `name`, and beside it its WAL."""

    name: str
    set_aside_at: float  # seconds since 1970
    bytes: int
    events: int | None  # that were salvaged; None: not known
    dead: int | None
    lost: int | None


@dataclass(frozen=True)
class Lease:
    """The right to deliver the events `first` to `last`; times are seconds on the boot clock."""

    token: bytes
    first: int
    last: int
    attempt: int  # attempts known to have been made before this one
    deadline: float


@dataclass(frozen=True)
class Backoff:
    """What failed attempts have led to; shared by all senders on the outbox.  Times: seconds on the boot clock."""

    not_before: float = 0.0  # the earliest time of the next attempt
    told: bool = False  # the receiver asked for that time
    failures: int = 0  # failed attempts in a row that count against the budget
    first_failure: float | None = None
    first_throttle: float | None = None
    reported: bool = False  # the budget is used up, on_error was called
    last_error: str = ""
    last_error_at: float = 0.0  # seconds since 1970; 0: never
    restarted: bool = False  # as stored it is of an earlier start of the machine; the times have been converted


@dataclass(frozen=True)
class NotNow:
    """Why there is nothing to lease.

    `reason` is "empty" (no event waits), "leased" (other senders are at work) or "backoff" (an earlier attempt
    failed); `seconds` is how long until it is worth asking again, `None` where only a new event can change it.
    """

    reason: str
    seconds: float | None
    backoff: Backoff = Backoff()  # for that reason


@dataclass(frozen=True)
class DeadLetter:
    """An event that the receiver refused by itself.  Times: seconds since 1970."""

    id: int
    appended_at: float
    buried_at: float
    status: int
    code: str
    answer: str
    body: bytes


@dataclass(frozen=True)
class OutboxStats:
    """An outbox at one moment: all numbers are from one consistent view.

    The books: `accepted == delivered + dead + erased + expired + pending`.
    """

    pending: int  # events that have not left, those that are leased included
    leased: int  # of these, how many are on their way now
    dead: int  # refused by the receiver and kept
    oldest_age_seconds: float | None  # age of the oldest pending event, None if there is none
    accepted: int  # events ever taken in
    delivered: int  # answered by a 2xx
    erased: int  # removed by an operator's command
    expired: int  # removed by max_age
    failures: int  # failed attempts in a row, now
    next_attempt_seconds: float  # until the next attempt is allowed, 0 if it is
    last_error: str  # of the last failed attempt, "" if there never was one
    last_error_age_seconds: float | None
    size_on_disk: int  # bytes

    @property
    def balanced(self) -> bool:
        """Whether the books balance.

        Where they can't be true `Client.stats()` raises `StorageError`.  It counts no rows, whose number is known from
        the same counters; `segment-durable status --verify` does.
        """
        left = self.delivered + self.dead + self.erased + self.expired
        return self.pending >= 0 and self.dead >= 0 and self.accepted == left + self.pending


NO_EVENTS = OutboxStats(
    pending=0,
    leased=0,
    dead=0,
    oldest_age_seconds=None,
    accepted=0,
    delivered=0,
    erased=0,
    expired=0,
    failures=0,
    next_attempt_seconds=0.0,
    last_error="",
    last_error_age_seconds=None,
    size_on_disk=0,
)
