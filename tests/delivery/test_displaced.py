"""Delivery from a database in which a disk has written a page also to the place of another one."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from outbox.pages import leaf_pages, put_leaf

from segment_durable.quarantine import kept_sets

from .conftest import Bench, numbers_of

LEAVES = 8
EVENTS, IN_A_LEAF = 80, 9


def fill(bench: Bench) -> Path:
    bench.put(EVENTS, size=200)
    path = bench.folder / "outbox.db"
    bench.outbox.close()
    assert len(leaf_pages(path)) >= LEAVES
    return path


@pytest.mark.parametrize("refused", [3, -1], ids=["some are refused", "all are taken"])
@pytest.mark.parametrize("size", [30, 600], ids=["joined by SQLite", "packed"])
@pytest.mark.parametrize(("source", "place"), [*itertools.permutations(range(LEAVES), 2)], ids=str)
def test_delivery_comes_to_an_end_and_notices(bench: Bench, source: int, place: int, size: int, refused: int) -> None:
    """What one look at the events finds another one may not: SQLite searches in other pages, and sees no damage."""
    bench.configure(upload_size=size)
    put_leaf(fill(bench), source, place)
    bench.reopen()
    sender = bench.sender(lambda post: 400 if any(number % 13 == refused for number in numbers_of(post)) else 200)
    while (step := sender.step()).kind != "empty":
        assert step.progress
        assert len(sender.posts) < 200, "it is halved for ever"
    arrived = {number for batch in sender.sent for number in batch if number % 13 != refused}
    assert len({*arrived, *bench.dead()}) >= EVENTS - IN_A_LEAF
    assert bench.pending() == []
    assert kept_sets(bench.folder), "what was in the other page is lost, and nobody has noticed"
