"""The error tree.

::

    SegmentDurableError
    +-- ConfigError            (ValueError, AssertionError)  a setting is wrong
    +-- InvalidMessage         (AssertionError)              a call's argument is wrong
    +-- MessageTooLarge        (RuntimeError)                a message is over 32 KiB
    +-- OutboxError                                          the outbox on disk
    |   +-- OutboxUnavailable                                it can't be opened or created here
    |   +-- NotAnOutbox                                      the path holds something else
    |   +-- SourceMismatch                                   it belongs to another write key
    |   +-- OutboxFull                                       `max_queue_size` is reached
    |   +-- OutboxBusy                                       the writer lock was not to be had in time
    |   +-- OutboxDamaged                                    it was damaged, and another has taken its place
    |   +-- StorageError                                     the disk is full, failing or read-only
    +-- DeliveryError                                        the receiver did not take a batch
    +-- EventsExpired                                        events grew older than `max_age`

The second bases are what segment-analytics-python 2.4.0 raises in the same place, so that its users' `except`
clauses go on working.  `ConfigError`, `InvalidMessage`, `MessageTooLarge`, `OutboxUnavailable`, `NotAnOutbox` and
`SourceMismatch` are raised to the caller; the others are only ever handed to `on_error`, and so is `OutboxUnavailable`
by the calls of the module.

No message quotes a write key, a token or an event's content.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = [
    "ConfigError",
    "DeliveryError",
    "EventsExpired",
    "InvalidMessage",
    "MessageTooLarge",
    "NotAnOutbox",
    "OutboxBusy",
    "OutboxDamaged",
    "OutboxError",
    "OutboxFull",
    "OutboxUnavailable",
    "SegmentDurableError",
    "SourceMismatch",
    "StorageError",
]


class SegmentDurableError(Exception):
    """Base of every error of this package.

    Each can be pickled, as a pool of processes does with what its workers raise.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.args, self.__dict__)


def _again(kind: type[SegmentDurableError], args: tuple[Any, ...], facts: dict[str, Any]) -> SegmentDurableError:
    """Such an error, without its `__init__`, which takes the parts that its text was made of."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(facts)
    return error


class ConfigError(SegmentDurableError, ValueError, AssertionError):
    """A setting is missing or wrong.

    `field` is the setting's name as it is passed to `Client`.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field} {problem}")
        self.field = field


class InvalidMessage(SegmentDurableError, AssertionError):
    """An argument of a call such as `track()` is missing or of a wrong type.

    `field` is the argument's name.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field} {problem}")
        self.field = field


class MessageTooLarge(SegmentDurableError, RuntimeError):
    """A message is over the receiver's limit for one event.

    `size` and `limit` are bytes of UTF-8 JSON; `size` is `None` where encoding was given up as hopeless.
    """

    def __init__(self, size: int | None, limit: int) -> None:
        found = "far more" if size is None else f"{size} bytes"
        super().__init__(
            f"Message exceeds {limit // 1024}kb limit: it has {found}. "
            "Send less in properties, traits or context, or split it over several events."
        )
        self.size = size
        self.limit = limit


class OutboxError(SegmentDurableError):
    """Base of what can go wrong with the outbox on disk."""


class OutboxUnavailable(OutboxError):
    """The outbox can't be opened or created; `path` is where it was looked for."""

    def __init__(self, path: str | Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = Path(path)


class NotAnOutbox(OutboxUnavailable):
    """The path holds something that is not an outbox; it was not touched."""


class SourceMismatch(OutboxUnavailable):
    """The outbox belongs to another write key: one outbox holds the events of one source."""


class OutboxFull(OutboxError):
    """`max_queue_size` events are waiting; the event of this call was not accepted.

    `limit` is that number of events; `refused` is how many calls were refused since the last report.
    """

    def __init__(self, limit: int, refused: int = 1) -> None:
        super().__init__(
            f"the outbox is full: {limit} events are waiting (max_queue_size); {refused} refused. "
            "Raise max_queue_size, or see why events are not being delivered."
        )
        self.limit = limit
        self.refused = refused


class OutboxBusy(OutboxError):
    """Another process or thread held the writer lock for too long; the event of this call was not accepted."""


class OutboxDamaged(OutboxError):
    """The database was damaged.  It is kept as `path`, what could be read is in a new one, and nothing has to be done.

    `salvaged` events and `dead` dead letters were read; `lost` is how many of both were not, None if that is not known.
    """

    def __init__(self, path: str | Path, salvaged: int | None, dead: int | None, lost: int | None) -> None:
        missing = "it is not known how many were lost" if lost is None else f"{lost} were lost"
        super().__init__(
            f"the outbox was damaged: {salvaged} events and {dead} dead letters were salvaged, {missing}; "
            f"what it was is kept as {path}"
        )
        self.path = Path(path)
        self.salvaged = salvaged
        self.dead = dead
        self.lost = lost


class StorageError(OutboxError):
    """SQLite or the disk refused a write or a read; what was acknowledged before is not touched.

    `code` is the name of SQLite's primary result code, such as ``"SQLITE_FULL"``.
    """

    def __init__(self, message: str, code: str = "SQLITE_ERROR") -> None:
        super().__init__(message)
        self.code = code


class DeliveryError(SegmentDurableError):
    """The receiver did not take a batch.  Its events stay in the outbox.

    `status` is the HTTP status, 0 where there was no answer; `code` and `message` are from the answer's JSON body
    where it had them.  The names are those of `APIError` of segment-analytics-python, whose `response` is always None
    here.
    """

    response: None = None

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"[Segment] {code}: {message} ({status})")
        self.status = status
        self.code = code
        self.message = message


class EventsExpired(SegmentDurableError):
    """`count` events were older than `max_age` (`seconds`) and left the outbox undelivered."""

    def __init__(self, count: int, seconds: float) -> None:
        super().__init__(f"{count} events were older than max_age ({seconds:g} s) and were removed undelivered")
        self.count = count
        self.seconds = seconds
