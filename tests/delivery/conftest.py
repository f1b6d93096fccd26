"""A bench: one outbox on a clock that stands still, and deliveries on it that are stepped by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from segment_durable.config import Config
from segment_durable.delivery import Delivery, Reporter, Step
from segment_durable.outbox import Outbox
from segment_durable.records import Backoff
from segment_durable.testing.clock import FakeClock
from segment_durable.testing.scripted import Post, Reply, ScriptedTransport
from segment_durable.upload import Uploader
from segment_durable.views import read_backoff

WRITE_KEY = "a-write-key-of-tests"
HOST = "http://receiver.test"


class Reports(Reporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.failures: list[tuple[Exception, list[int]]] = []
        self.deliveries: list[list[int]] = []

    def failed(self, error: Exception, bodies: Sequence[bytes]) -> None:
        self.failures.append((error, numbers(b",".join(bodies))))

    def delivered(self, events: bytes) -> None:
        self.deliveries.append(numbers(events))

    @property
    def errors(self) -> list[Exception]:
        return [error for error, _ in self.failures]


def numbers(events: bytes) -> list[int]:
    """The numbers of joined events as `Bench.put` makes them."""
    return [int(event["messageId"]) for event in json.loads(b"[%b]" % events)]


def numbers_of(post: Post) -> list[int]:
    return [int(event["messageId"]) for event in post.events]


class Sender:
    """A delivery with the transport and the reports of its own."""

    def __init__(self, bench: Bench, transport: ScriptedTransport, reports: Reporter, chance: float) -> None:
        self.bench = bench
        self.transport = transport
        self.uploader = Uploader(bench.config, transport, bench.tokens, bench.clock)
        self.delivery = Delivery(bench.outbox, self.uploader, bench.config, bench.clock, lambda: chance, reports)

    def step(self, **options: Any) -> Step:
        return self.delivery.step(**options)

    def run(self, limit: int = 10_000) -> Step:
        """Step until a step makes no progress, and return that one."""
        for _ in range(limit):
            step = self.step()
            if not step.progress:
                return step
        raise AssertionError(f"{limit} steps came to no end")

    @property
    def posts(self) -> list[Post]:
        return self.transport.posts

    @property
    def sent(self) -> list[list[int]]:
        """The numbers of the events of each post."""
        return [numbers_of(post) for post in self.posts]


class Bench:
    """One outbox; `put` numbers the events from 1 on, as the outbox does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = FakeClock()
        self.tokens: Any = None
        self.configure()
        self.outbox = Outbox(folder, self.clock, write_key=WRITE_KEY)
        self._number = 0

    def configure(self, **settings: Any) -> None:
        self.config = Config(write_key=WRITE_KEY, **{"host": HOST, **settings})

    def put(self, count: int = 1, *, size: int = 0, **fields: Any) -> list[int]:
        """Append events, each of exactly `size` bytes if that is more than it needs; their numbers."""
        made = []
        for _ in range(count):
            self._number += 1
            event = {"messageId": str(self._number), "type": "track", **fields}
            body = json.dumps(event).encode()
            if size:
                event["filler"] = ""
                event["filler"] = "x" * (size - len(json.dumps(event)))
                body = json.dumps(event).encode()
            assert self.outbox.put(body, int(self.clock.time() * 1000))
            made.append(self._number)
        return made

    def sender(
        self,
        answers: Iterable[Reply] | Callable[[Post], Reply] = (),
        *,
        then: Reply = 200,
        reports: Reporter | None = None,
        chance: float = 0.5,
    ) -> Sender:
        """A new delivery on the outbox; `chance` is what its random numbers always are."""
        return Sender(self, ScriptedTransport(answers, then=then), reports or Reports(), chance)

    def reopen(self) -> None:
        """As after a restart of the process."""
        self.outbox.close()
        self.outbox = Outbox(self.folder, self.clock, write_key=WRITE_KEY)

    def lose_lease(self) -> None:
        """What a killed process's lease is: the row is there, its holder is not."""
        self.outbox.db.lock.held.clear()

    def pending(self) -> list[int]:
        return [int(json.loads(row.body)["messageId"]) for row in self.outbox.rows(0, 1 << 60)]

    def dead(self) -> list[int]:
        return [int(json.loads(letter.body)["messageId"]) for letter in self.outbox.dead_letters()]

    def backoff(self) -> Backoff:
        with self.outbox.db.read() as connection:
            return read_backoff(connection, self.clock)

    def check_books(self) -> None:
        stats = self.outbox.stats()
        assert stats.balanced
        assert stats.pending == len(self.pending())
        assert stats.dead == len(self.dead())


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "bench")
    yield bench
    bench.check_books()
    bench.outbox.close()
