"""Celery's prefork pool over a real Redis."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .running import PATIENCE, PYTHONPATH, Books, Server, eventually, killing, needs, program

Launch = Callable[..., Server]

# Keeps tasks waiting and prints each result: Celery stays out of the tests' own process.  It goes on when the test has
# read the result, so that what is sent after a kill is not done before it.  Celery takes a task off its queue in Redis
# before it notes that it has it, so a kill in between loses the task: then another one is sent.
CALLER = """
import collections, json, sys
import celery.exceptions
import tasks
left, waiting, lost = int(sys.argv[1]), collections.deque(), []
while left or waiting:
    while left and len(waiting) < 40:
        waiting.append(getattr(tasks, sys.argv[2]).delay())
        left -= 1
    result = waiting.popleft()
    try:
        print(json.dumps(result.get(timeout=10)), flush=True)
    except celery.exceptions.TimeoutError:
        lost.append(result)
        if len(lost) > 3:
            raise
        print("lost", result.id, file=sys.stderr, flush=True)
        left += 1
    else:
        sys.stdin.readline()
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

    def run_until_children(self, number: int) -> None:
        """Until that many processes have done something."""
        end = time.monotonic() + PATIENCE
        while len(self.pids) < number:
            assert time.monotonic() < end, f"only {len(self.pids)} of {number} children were seen"
            self.run(10)

    def run(self, count: int, *, halfway: Callable[[int], None] | None = None, task: str = "track") -> None:
        command = [sys.executable, "-c", CALLER, str(count), task]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, env=self._env, stdin=pipe, stdout=pipe, text=True, bufsize=1) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                for number, line in enumerate(process.stdout):
                    self.answers.append(json.loads(line))
                    if number == count // 2 and halfway is not None:
                        halfway(self.answers[-1]["pid"])
                    process.stdin.write("\n")
                assert process.wait(30) == 0
            finally:
                process.kill()
        assert None not in self.acknowledged
        assert len(self.acknowledged) == len(self.answers), "one message id was given to two tasks"


@pytest.fixture
def calls(redis: str, receiver: Any, outbox: Path) -> Calls:
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
    calls.run_until_children(2)
    server.end()
    books.check(calls.acknowledged)


def test_children_that_do_not_leave_the_rest_on_disk(launch: Launch, redis: str, calls: Calls, books: Books) -> None:
    """Celery ends its children without Python's exit: as after a kill, the next process delivers."""
    server = start(launch, redis)
    calls.run(100)
    calls.run_until_children(2)
    server.end()
    books.check(calls.acknowledged, killed=True, left=True)


def test_a_child_killed_under_load(launch: Launch, redis: str, calls: Calls, books: Books) -> None:
    server = start(launch, redis, EVENTS_AT_END="shutdown")
    calls.run(100, halfway=killing)
    calls.run_until_children(3)
    books.wait_until_all_arrived(calls.acknowledged)
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(30)
    assert eventually(lambda: "exited with signal 9" in server.said() or "SIGKILL" in server.said())
    books.check(calls.acknowledged, killed=True)


def test_tasks_that_a_soft_time_limit_ends_in_the_middle_of_a_call(
    launch: Launch, redis: str, calls: Calls, books: Books
) -> None:
    server = start(launch, redis, EVENTS_AT_END="shutdown")
    calls.run(4, task="track_until_the_limit")
    in_time = {each for answer in calls.answers for each in answer["ids"]}
    calls.run(20)
    books.wait_until_all_arrived(in_time | calls.acknowledged)
    server.end()
    books.check(in_time | calls.acknowledged)  # what a call that the limit ended had committed may have arrived as well


@pytest.mark.parametrize("at_end", ["nothing", "shutdown"])
def test_children_that_are_recycled(launch: Launch, redis: str, calls: Calls, books: Books, at_end: str) -> None:
    server = start(launch, redis, "--max-tasks-per-child", "10", EVENTS_AT_END=at_end)
    calls.run(60)
    assert len(calls.pids) >= 4
    server.end()
    books.check(calls.acknowledged, killed=at_end == "nothing", left=at_end == "nothing")


@pytest.mark.parametrize("killed", ["the main process", "all of them"])
@pytest.mark.parametrize("at_import", ["nothing", "track"])
def test_a_main_process_killed_under_load(
    launch: Launch, redis: str, calls: Calls, books: Books, killed: str, at_import: str
) -> None:
    """The children of a killed one may go on beside those of the next, for as long as they like."""
    environment = {"EVENTS_AT_IMPORT": at_import, "EVENTS_AT_END": "shutdown"}
    servers = [start(launch, redis, **environment)]
    calls.run_until_children(2)
    before = calls.pids

    def kill_and_start_another(_: int) -> None:
        first = servers[0]
        if killed == "all of them":
            first.kill()
        else:
            first.process.kill()
            first.process.wait(PATIENCE)
        servers.append(start(launch, redis, **environment))

    calls.run(300, halfway=kill_and_start_another)
    assert calls.pids - before, "nothing was done by the children of the next one"
    books.wait_until_all_arrived(calls.acknowledged)
    servers[0].kill()
    servers[1].end()
    books.check(calls.acknowledged, killed=True)
