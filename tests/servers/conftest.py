"""Fixtures: servers that are always ended, and whose output is shown when a test fails."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from segment_durable.testing import Receiver

from .running import PYTHONPATH, Books, Server

SERVERS = pytest.StashKey[list[Server]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.failed:
        for server in item.stash.get(SERVERS, []):
            report.sections.append((f"output of {server.process.args[0]}", server.said()[-8000:]))
    return report


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    return tmp_path / "outbox"


@pytest.fixture
def books(receiver: Receiver, outbox: Path) -> Books:
    return Books(receiver, outbox)


@pytest.fixture
def launch(
    request: pytest.FixtureRequest, receiver: Receiver, tmp_path: Path, outbox: Path
) -> Iterator[Callable[..., Server]]:
    """Start a command with the apps on its path: `launch(command, **environment)`."""
    servers = request.node.stash[SERVERS] = []

    def start(command: list[str], **environment: str) -> Server:
        env = {
            **os.environ,
            "PYTHONPATH": PYTHONPATH,
            "EVENTS_HOST": receiver.url,
            "EVENTS_OUTBOX": str(outbox),
            **environment,
        }
        server = Server(command, tmp_path / f"server-{len(servers)}.log", env)
        servers.append(server)
        return server

    try:
        yield start
    finally:
        for server in reversed(servers):
            server.kill()
