"""All events moved into another outbox, while others go on with this one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from segment_durable.admission import disk_full
from segment_durable.errors import OutboxError, StorageError
from segment_durable.outbox import Outbox
from segment_durable.quarantine import kept_sets
from segment_durable.records import Lease, NotNow
from segment_durable.testing.clock import FakeClock

from .common import bodies
from .workers import Worker

BODIES = [b"%d" % number for number in range(1, 1_202)]


@pytest.fixture
def other(tmp_path: Path, clock: FakeClock) -> Iterator[Outbox]:
    with contextlib.closing(Outbox(tmp_path / "other", clock)) as outbox:
        yield outbox


def test_all_events_are_moved_in_order_with_their_times_and_no_more_are_taken(outbox: Outbox, other: Outbox) -> None:
    for number, body in enumerate(BODIES):
        assert outbox.put(body, 1_000 + number)
    assert outbox.move_to(other, lambda: None) == len(BODIES)
    assert bodies(other) == BODIES
    assert other.expire(1.5, limit=9_999) == BODIES[:500]
    assert other.stats().balanced
    with pytest.raises(OutboxError):
        outbox.put(b"late", 1)


def test_nothing_is_leased_meanwhile(outbox: Outbox, other: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be delivered before what has been moved, and waits in the other one."""
    for body in BODIES:
        assert outbox.put(body, 1)
    write, answers = outbox.db.write, list[object]()

    def write_between() -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(outbox.db, "write", write)
            answers.append(outbox.lease(10, 60))
        return write()

    monkeypatch.setattr(outbox.db, "write", write_between)
    ended: list[list[bytes]] = []
    assert outbox.move_to(other, lambda: ended.append(bodies(other))) == len(BODIES)
    assert answers == [NotNow("leased", 0.5)] * 4
    assert ended == [BODIES]


def test_what_could_not_be_moved_is_leased_again(
    outbox: Outbox, other: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox.put(b"1", 1)

    def refuse() -> None:
        raise disk_full()

    monkeypatch.setattr(other.db.space, "check", refuse)
    with pytest.raises(StorageError, match="the disk is full"):
        outbox.move_to(other, lambda: None)
    assert isinstance(outbox.lease(10, 60), Lease)


@pytest.mark.parametrize("way", ["ack", "bury", "fail"])
def test_an_attempt_that_is_under_way_elsewhere_touches_nothing_that_comes_later(
    outbox: Outbox, other: Outbox, worker_factory: Callable[..., Worker], way: str
) -> None:
    """The ids of what was moved are not given again, or its answer would be taken for one to what got them."""
    for body in BODIES[:3]:
        assert outbox.put(body, 1)
    worker = worker_factory()
    lease = worker.call("lease", 10, 60)
    assert isinstance(lease, Lease)
    assert outbox.move_to(other, lambda: None) == 3
    later = BODIES[3:10]
    for body in later:
        assert worker.call("put", body, 1)
    if way == "ack":
        assert worker.call("ack", lease, lease.last) is None
    elif way == "bury":
        assert worker.call("bury", lease, lease.first, status=400, code="", answer="", max_dead=9) is None
    else:
        assert worker.call("release", lease) is False
    assert [row.body for row in worker.call("rows", 0, 1 << 60)] == later
    assert bodies(other) == BODIES[:3]
    stats = worker.call("stats")
    assert (stats.accepted, stats.pending, stats.erased, stats.delivered) == (10, 7, 3, 0)
    assert stats.balanced


def test_the_outbox_is_sound_afterwards_also_if_later_events_had_left_before(
    outbox: Outbox, other: Outbox, worker_factory: Callable[..., Worker]
) -> None:
    for body in BODIES[:4]:
        assert outbox.put(body, 1)
    first, second = (outbox.lease(2, 60, max_leases=2) for _ in range(2))
    assert isinstance(first, Lease)
    assert isinstance(second, Lease)
    assert outbox.ack(second, second.last) == 2
    assert outbox.move_to(other, lambda: None) == 2
    worker = worker_factory()
    assert worker.call("pending") == 0
    assert worker.call("stats").balanced
    assert worker.call("put", b"later", 1)
    assert worker.call("lease", 10, 60).first == 5
    assert kept_sets(outbox.db.folder) == {}
