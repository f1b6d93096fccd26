"""Celery's prefork pool over a real Redis."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .running import PYTHONPATH, Books, Server, eventually, killing, needs, program

Launch = Callable[..., Server]

# Sends tasks and prints each result: Celery stays out of the tests' own process.
CALLER = """
import json, sys
import tasks
for result in [tasks.track.delay() for _ in range(int(sys.argv[1]))]:
    print(json.dumps(result.get(timeout=30)), flush=True)
"""


@pytest.fixture
def redis(launch: Launch, tmp_path: Path) -> str:
    """The URL of a broker of this test's own, that keeps nothing."""
    needs("celery", "redis", programs=("redis-server",))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(tmp_path)]
    server = launch([str(program("redis-server")), *options])
    server.wait_until(lambda: "Ready to accept connections" in server.said(), "was ready")
    return f"redis://127.0.0.1:{port}/0"


class Calls:
    """A process that has tasks run, and what they answered."""

    def __init__(self, redis: str, receiver_url: str, outbox: Path) -> None:
        self._env = {**os.environ, "PYTHONPATH": PYTHONPATH, "EVENTS_REDIS": redis}
        self._env |= {"EVENTS_HOST": receiver_url, "EVENTS_OUTBOX": str(outbox)}
        self.answers: list[dict[str, Any]] = []

    @property
    def acknowledged(self) -> set[str]:
        return {answer["id"] for answer in self.answers}

    @property
    def pids(self) -> set[int]:
        return {answer["pid"] for answer in self.answers}

    def run(self, count: int, *, halfway: Callable[[int], None] | None = None) -> None:
        command = [sys.executable, "-c", CALLER, str(count)]
        with subprocess.Popen(command, env=self._env, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                for number, line in enumerate(process.stdout):
                    self.answers.append(json.loads(line))
                    if number == count // 2 and halfway is not None:
                        halfway(self.answers[-1]["pid"])
                assert process.wait(30) == 0
            finally:
                process.kill()
        assert None not in self.acknowledged


@pytest.fixture
def calls(redis: str, receiver: Any, outbox: Path) -> Iterator[Calls]:
    return Calls(redis, receiver.url, outbox)


def start(launch: Launch, redis: str, *options: str, **environment: str) -> Server:
    command = [sys.executable, "-m", "celery", "--app", "tasks", "worker", "--pool", "prefork", "--concurrency", "2"]
    command += ["--loglevel", "INFO", "--without-gossip", "--without-mingle", *options]
    server = launch(command, EVENTS_REDIS=redis, **environment)
    server.wait_until(lambda: " ready." in server.said(), "was ready")
    return server


@pytest.mark.parametrize("at_import", ["nothing", "client", "track"])
def test_children_that_shut_the_client_down(
    launch: Launch, redis: str, calls: Calls, books: Books, at_import: str
) -> None:
    server = start(launch, redis, EVENTS_AT_IMPORT=at_import, EVENTS_AT_END="shutdown")
    calls.run(100)
    server.end()
    books.check(calls.acknowledged)


def test_children_that_do_not_leave_the_rest_on_disk(launch: Launch, redis: str, calls: Calls, books: Books) -> None:
    """Celery ends its children without Python's exit: as after a kill, the next process delivers."""
    server = start(launch, redis)
    calls.run(100)
    server.end()
    books.check(calls.acknowledged, killed=True, left=True)


def test_a_child_killed_under_load(launch: Launch, redis: str, calls: Calls, books: Books) -> None:
    server = start(launch, redis, EVENTS_AT_END="shutdown")
    calls.run(100, halfway=killing)
    books.wait_until_all_arrived(calls.acknowledged)
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(30)
    assert eventually(lambda: "exited with signal 9" in server.said() or "SIGKILL" in server.said())
    books.check(calls.acknowledged, killed=True)


@pytest.mark.parametrize("at_end", ["nothing", "shutdown"])
def test_children_that_are_recycled(launch: Launch, redis: str, calls: Calls, books: Books, at_end: str) -> None:
    server = start(launch, redis, "--max-tasks-per-child", "10", EVENTS_AT_END=at_end)
    calls.run(60)
    assert len(calls.pids) >= 4
    server.end()
    books.check(calls.acknowledged, killed=at_end == "nothing", left=at_end == "nothing")
