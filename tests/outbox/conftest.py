"""Outboxes for tests, in this process and in others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from segment_durable.outbox import Outbox
from segment_durable.testing.clock import FakeClock

from .implementations import IMPLEMENTATIONS, make_outbox
from .workers import Nursery, Worker


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with contextlib.closing(Nursery()) as nursery:
        yield nursery


@pytest.fixture(params=sorted(IMPLEMENTATIONS))
def implementation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where this test's outbox goes; nothing is there yet."""
    return tmp_path / "outbox"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def outbox_factory(implementation: str, folder: Path, clock: FakeClock) -> Iterator[Callable[..., Outbox]]:
    """Makes an outbox and closes it when the test is over.

    Where nothing is said it is in `folder`, and its time is that of `clock`.
    """
    made: list[Outbox] = []

    def make(folder: Path = folder, clock: FakeClock = clock, **options: object) -> Outbox:
        made.append(make_outbox(implementation, folder, clock, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for outbox in reversed(made):
        outbox.close()


@pytest.fixture
def outbox(outbox_factory: Callable[..., Outbox]) -> Outbox:
    return outbox_factory()


@pytest.fixture
def worker_factory(
    nursery: Nursery, implementation: str, folder: Path, clock: FakeClock
) -> Iterator[Callable[..., Worker]]:
    """Makes a process that has the outbox in `folder` open, unless `opened=False`."""
    made: list[Worker] = []

    def make(folder: Path = folder, clock: FakeClock = clock, *, opened: bool = True, **options: object) -> Worker:
        made.append(nursery.worker(implementation))
        if opened:
            made[-1].open(folder, clock, **options)
        return made[-1]

    yield make
    for worker in made:
        worker.close()


@pytest.fixture
def worker(worker_factory: Callable[..., Worker]) -> Worker:
    """One other process that has the outbox open."""
    return worker_factory()
