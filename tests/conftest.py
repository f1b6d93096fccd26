"""Fixtures for all tests.  Nothing here sleeps; what waits, waits for a signal with a bound."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import segment_durable
from segment_durable import Client, config, process
from segment_durable.testing import Receiver


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the long forms of the crash and model tests")
    parser.addoption("--soak", type=float, default=20.0, metavar="SECONDS", help="how long the soak test runs (20)")


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """Whether the long forms were asked for."""
    return bool(request.config.getoption("--long"))


@pytest.fixture
def soak_seconds(request: pytest.FixtureRequest) -> float:
    return float(request.config.getoption("--soak"))


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test touches the user's own outboxes, and none leaves threads, files or log settings behind."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.delenv(config.ENVIRONMENT_DIR, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    segment_log = logging.getLogger("segment")
    level, handlers = segment_log.level, list(segment_log.handlers)
    yield
    for each in list(process._engines.values()):
        each.close(5.0)
    process._engines.clear()
    segment_log.setLevel(level)
    segment_log.handlers[:] = handlers


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A strict receiver of its own port, up."""
    with Receiver() as receiver:
        yield receiver


@pytest.fixture
def make_client(receiver: Receiver, tmp_path: Path) -> Iterator[Callable[..., Client]]:
    """Clients that send to the receiver, all on one outbox unless told otherwise; shut down at the end."""
    made: list[Client] = []

    def make(write_key: str = "test-key", **settings: Any) -> Client:
        settings.setdefault("host", receiver.url)
        settings.setdefault("outbox_dir", tmp_path / "outbox")
        client = Client(write_key, **settings)
        made.append(client)
        return client

    yield make
    for client in made:
        client.shutdown(0)


@pytest.fixture
def analytics(receiver: Receiver, tmp_path: Path) -> Iterator[ModuleType]:
    """The module as a user imports it, fresh, with the receiver as its host."""
    module = importlib.reload(segment_durable)
    module.write_key = "YOUR_WRITE_KEY"
    module.host = receiver.url
    module.outbox_dir = tmp_path / "outbox"
    yield module
    if module.default_client is not None:
        module.shutdown(0)
    importlib.reload(segment_durable)
