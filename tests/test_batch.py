"""Batches stay within the receiver's limits, whatever the rows are."""

from __future__ import annotations

import json
from datetime import datetime, timezone

from hypothesis import given, settings
from hypothesis import strategies as st

from segment_durable.batch import MAX_BATCH_BYTES, MAX_BATCH_EVENTS, envelope, pack
from segment_durable.clock import utc_timestamp
from segment_durable.records import Row

NOW = utc_timestamp(1_700_000_000.123)
ROW_BYTES = 32 << 10
WRITE_KEYS = st.sampled_from(["key", 'quo"te', "back\\slash", '\\"', "x" * 400]) | st.text(
    st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=60
)


def rows_of(sizes: list[int], first: int = 1) -> list[Row]:
    """Rows of exactly so many bytes, each of them JSON that can be told from its neighbours."""
    return [
        Row(first + i, (b'"%d' % i).ljust(max(size, len(b'"%d"' % i)) - 1, b".") + b'"') for i, size in enumerate(sizes)
    ]


def check(rows: list[Row], write_key: str, max_events: int) -> int:
    batch = pack(rows, write_key, max_events)
    assert 1 <= batch.count <= min(max(1, max_events), MAX_BATCH_EVENTS, len(rows))
    taken = rows[: batch.count]
    assert (batch.first, batch.last) == (taken[0].id, taken[-1].id)
    assert batch.events == b",".join(row.body for row in taken)
    body = envelope(batch.events, NOW, write_key)
    assert json.loads(body) == {"batch": [json.loads(r.body) for r in taken], "sentAt": NOW, "writeKey": write_key}
    assert len(body) <= MAX_BATCH_BYTES or batch.count == 1
    assert len(taken[0].body) > ROW_BYTES or len(body) <= MAX_BATCH_BYTES
    if batch.count < min(len(rows), max_events, MAX_BATCH_EVENTS):  # it was the bytes that ended it: no room was left
        more = envelope(batch.events + b"," + rows[batch.count].body, NOW, write_key)
        assert len(more) > MAX_BATCH_BYTES
    return batch.count


@settings(deadline=None)
@given(
    st.lists(st.integers(3, ROW_BYTES) | st.sampled_from([ROW_BYTES, 24_990, 100]), min_size=1, max_size=60),
    WRITE_KEYS,
    st.integers(1, 3000),
    st.integers(1, 2**62),
)
def test_a_batch_is_the_most_of_the_first_rows_that_fits(
    sizes: list[int], write_key: str, max_events: int, first: int
) -> None:
    check(rows_of(sizes, first), write_key, max_events)


def test_there_are_never_more_than_2500_events_in_a_request() -> None:
    rows = rows_of([5] * 2600)
    assert check(rows, "key", 10_000) == 2500
    assert check(rows, "key", 2501) == 2500
    assert check(rows, "key", 2499) == 2499


def test_a_body_of_exactly_500_000_bytes_is_whole_and_one_byte_more_is_not() -> None:
    room = MAX_BATCH_BYTES - len(envelope(b"", NOW, "key"))
    fits = rows_of([30_000] * 16 + [room - 16 * 30_001])
    assert check(fits, "key", 100) == 17
    assert len(envelope(pack(fits, "key", 100).events, NOW, "key")) == MAX_BATCH_BYTES
    assert check(rows_of([30_000] * 16 + [room - 16 * 30_001 + 1]), "key", 100) == 16


def test_a_write_key_that_needs_escapes_counts_with_them() -> None:
    room = MAX_BATCH_BYTES - len(envelope(b"", NOW, "k" * 50))
    rows = rows_of([30_000] * 16 + [room - 16 * 30_001])
    assert check(rows, "k" * 50, 100) == 17
    assert check(rows, '"' * 50, 100) == 16


def test_a_row_over_the_limit_goes_alone_and_so_the_receiver_can_refuse_it() -> None:
    rows = rows_of([MAX_BATCH_BYTES + 1, 10])
    assert pack(rows, "key", 100).count == 1
    assert pack(rows[::-1], "key", 100).count == 1


def test_at_least_one_row_is_taken_whatever_max_events_is() -> None:
    assert check(rows_of([10, 10]), "key", 0) == 1


@settings(deadline=None)
@given(st.floats(0, 4e9))
def test_sent_at_is_always_as_long_as_the_room_that_was_kept_for_it(seconds: float) -> None:
    text = utc_timestamp(seconds)
    assert len(text) == len(NOW)
    assert abs(datetime.fromisoformat(text) - datetime.fromtimestamp(seconds, timezone.utc)).total_seconds() <= 0.001
