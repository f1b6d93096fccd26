"""Rows in, one request body out, within the receiver's limits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from segment_durable.config import MAX_BATCH_EVENTS
from segment_durable.records import Row

__all__ = ["MAX_BATCH_BYTES", "MAX_BATCH_EVENTS", "Batch", "envelope", "pack", "room"]

MAX_BATCH_BYTES = 500_000  # Segment's limit for a request, before gzip and with the envelope
_SENT_AT = "2000-01-01T00:00:00.000+00:00"  # as long as every other


@dataclass(frozen=True)
class Batch:
    """Consecutive events, joined as they will be sent."""

    first: int  # id of the first event
    last: int
    count: int
    events: bytes  # the messages, separated by commas


def pack(rows: Sequence[Row], write_key: str, max_events: int) -> Batch:
    """As many of `rows`, of which there must be one, as one request can hold: checked before each is added.

    The first is taken in any case; if it is over the limit by itself, the receiver's refusal says so.
    """
    left = room(write_key)
    taken: list[bytes] = []
    for row in rows[: max(1, min(max_events, MAX_BATCH_EVENTS))]:
        left -= len(row.body) + (1 if taken else 0)
        if left < 0 and taken:
            break
        taken.append(row.body)
    return Batch(rows[0].id, rows[len(taken) - 1].id, len(taken), b",".join(taken))


def room(write_key: str) -> int:
    """Bytes that the joined events of one request may have."""
    return MAX_BATCH_BYTES - len(envelope(b"", _SENT_AT, write_key))


def envelope(events: bytes, sent_at: str, write_key: str) -> bytes:
    """The body of a request; nothing in it is parsed again."""
    return b'{"batch":[%b],"sentAt":"%b","writeKey":%b}' % (events, sent_at.encode(), json.dumps(write_key).encode())
