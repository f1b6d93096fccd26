"""Uploads that take longer than a lease lasts, and senders that take the same events from each other.

An upload has no bound of its own: names are looked up without a time limit, and each address of a host gets the
`timeout`.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable
from typing import Any

import pytest

from segment_durable.delivery import Step
from segment_durable.testing.scripted import Post, Reply
from segment_durable.transport import TransportError

from .conftest import Bench, Reports, Sender

PATIENCE = 30.0  # seconds for what takes none


class World:
    """Several senders on one outbox, at the same time by the bench's clock, which goes on when all of them wait."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.posts = 0
        self.steps: list[Step] = []
        self._changed = threading.Condition()
        self._waiting: list[tuple[float, int, threading.Event]] = []
        self._running = 0
        self._is_over = False

    def sender(self, seconds: float, reply: Reply, **options: Any) -> Sender:
        """One whose every upload takes so many seconds."""

        def slow(_: Post) -> Reply:
            self.posts += 1
            self._wait(seconds)
            return reply

        return self.bench.sender(slow, **options)

    def run(self, *senders: Sender, until: Callable[[Step], bool], posts: int) -> None:
        """Have them step until one of them has done what is waited for; that may take so many posts."""
        self._running = len(senders)
        threads = [threading.Thread(target=self._step, args=(each, until), daemon=True) for each in senders]
        for thread in threads:
            thread.start()
        try:
            while not self._is_over:
                with self._changed:
                    assert self._changed.wait_for(lambda: len(self._waiting) == self._running, PATIENCE)
                    if not self._waiting:
                        break
                    time, _, event = heapq.heappop(self._waiting)
                    self.bench.clock.advance(max(0.0, time - self.bench.clock.boot()))
                    event.set()
                assert self.posts <= posts, [step.kind for step in self.steps]
        finally:
            self._is_over = True
            for _, _, event in self._waiting:
                event.set()
            for thread in threads:
                thread.join(PATIENCE)

    def _step(self, sender: Sender, until: Callable[[Step], bool]) -> None:
        try:
            while not self._is_over:
                step = sender.step()
                self.steps.append(step)
                if until(step):
                    self._is_over = True
                elif not step.progress:
                    self._wait(step.seconds or 0.5)
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify()

    def _wait(self, seconds: float) -> None:
        event = threading.Event()
        with self._changed:
            heapq.heappush(self._waiting, (self.bench.clock.boot() + seconds, id(event), event))
            self._changed.notify()
        assert self._is_over or event.wait(PATIENCE)


@pytest.mark.parametrize("slowness", [0.9, 1.3, 5.0])
@pytest.mark.parametrize("threads", [1, 2])
def test_two_senders_do_not_take_the_same_events_from_each_other_for_ever(
    bench: Bench, threads: int, slowness: float
) -> None:
    bench.configure(thread=threads)
    put = bench.put(3)
    world, reports = World(bench), Reports()
    senders = [world.sender(slowness * bench.config.lease, 200, reports=reports) for _ in range(2)]
    world.run(*senders, until=lambda step: step.kind == "delivered", posts=1 if slowness < 1 else 20)
    assert (bench.pending(), reports.deliveries) == ([], [put])


@pytest.mark.parametrize("threads", [1, 2])
def test_failures_that_take_longer_than_a_lease_count_and_are_reported(bench: Bench, threads: int) -> None:
    bench.configure(thread=threads, max_retries=2)
    put = bench.put(3)
    world, reports = World(bench), Reports()
    error = TransportError("dns", "no such host")
    senders = [world.sender(1.3 * bench.config.lease, error, reports=reports) for _ in range(2)]
    world.run(*senders, until=lambda step: step.exhausted, posts=10)
    assert len(reports.failures) == 1
    assert bench.outbox.stats().failures == 3
    assert bench.pending() == put


def test_a_longer_lease_is_extended_when_less_than_half_of_it_is_left(bench: Bench) -> None:
    bench.configure(upload_size=1)
    bench.put(4)
    other = bench.sender()
    kinds: list[str] = []
    slowness = iter([1.0, 1.2, 1.0, 0.1])

    def slow(_: Post) -> Reply:
        bench.clock.advance(next(slowness) * bench.config.lease - 0.001)
        kinds.append(other.step().kind)
        bench.clock.advance(0.001)
        return 200

    assert bench.sender(slow).run().kind == "empty"
    assert (kinds, other.posts) == (["leased"] * 4, [])


def test_a_lease_gets_longer_with_each_upload_that_outlasts_it_and_is_as_before_after_one_that_does_not(
    bench: Bench,
) -> None:
    bench.configure(upload_size=1, thread=2)  # a lease for each event
    lasted: list[float] = []
    slowness = iter([1.0, 2.0, 4.0, 4.0, 0.6, 0.4, 0.0, 1.0, 0.0])

    def slow(_: Post) -> Reply:
        with bench.outbox.db.read() as connection:
            lasted.append(connection.execute("SELECT deadline - leased_at FROM lease").fetchone()[0])
        bench.clock.advance(next(slowness) * bench.config.lease)
        return 200

    bench.put(9)
    sender = bench.sender(slow)
    assert sender.run().kind == "empty"
    assert [each / bench.config.lease for each in lasted] == [1, 2, 4, 8, 8, 8, 1, 1, 2]
