"""Servers as processes: started, put under load, ended, and what they acknowledged."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from segment_durable import Client
from segment_durable.testing import Receiver

APPS = Path(__file__).parent / "apps"
# What servers import from: the apps, then what this process was told.
PYTHONPATH = os.pathsep.join([str(APPS), *filter(None, [os.environ.get("PYTHONPATH")])])
PATIENCE = 30.0  # seconds for anything that is waited for; reached only when something is wrong


def needs(*modules: str, programs: tuple[str, ...] = ()) -> None:
    """Skip the test if one of these is not installed, or fail it where the servers are required."""
    missing = [f"the package {name}" for name in modules if importlib.util.find_spec(name) is None]
    missing += [name for name in programs if program(name) is None]
    if not missing:
        return
    reason = f"{' and '.join(missing)} not installed: pip install -e '.[servers]'; Debian has redis-server"
    if os.environ.get("SEGMENT_DURABLE_REQUIRE_SERVERS"):
        pytest.fail(reason)
    pytest.skip(reason)


def program(name: str) -> str | None:
    """Where that program is: beside this Python first, unless SEGMENT_DURABLE_UWSGI (say) names another."""
    other = os.environ.get(f"SEGMENT_DURABLE_{name.upper().replace('-', '_')}")
    if other:
        return other
    return shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}")


def eventually(condition: Callable[[], bool]) -> bool:
    """Poll until that is true, for other programs give no signal; False if it does not become so."""
    end, pause = time.monotonic() + PATIENCE, threading.Event()
    while not condition():
        if time.monotonic() > end:
            return False
        pause.wait(0.02)
    return True


class Server:
    """A server in a process group of its own; its output goes to `log`."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str]) -> None:
        self.log = log
        self._port = 0
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=env, cwd=APPS, start_new_session=True
            )

    def said(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        assert eventually(lambda: self.process.poll() is not None or condition()), f"the server never {what}"
        assert self.process.poll() is None, f"the server ended before it {what}"

    def wait_until_up(self) -> None:
        """Until it answers on the port that it announces in its output: it was told to take a free one."""
        self.wait_until(lambda: re.search(r"127\.0\.0\.1:[1-9]", self.said()) is not None, "named its port")
        self._port = int(re.findall(r"127\.0\.0\.1:([1-9]\d*)", self.said())[0])
        self.wait_until(lambda: self.get("/") is not None, "answered")

    def get(self, path: str) -> dict[str, str | int | None] | None:
        """The answer, or None if there was none or it was no success."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
            return dict(json.loads(body)) if response.status == 200 else None
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def end(self, number: int = signal.SIGTERM) -> None:
        """End it as an operator does, and wait for all of it; it has to end by itself and without a traceback."""
        self.process.send_signal(number)
        self.process.wait(PATIENCE)
        assert eventually(lambda: not self._is_alive()), "a process of the server outlived it"
        assert "Traceback" not in self.said()

    def kill(self) -> None:
        """Whatever state it is in, nothing of it is left."""
        if self._is_alive():
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)

    def _is_alive(self) -> bool:
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True


class Load:
    """Requests from some threads at once, and what was acknowledged."""

    def __init__(self, server: Server, path: str = "/track") -> None:
        self._server = server
        self._path = path
        self._lock = threading.Lock()
        self.acknowledged: set[str] = set()
        self.refused = 0  # answers that say that the event was not accepted
        self.unanswered = 0
        self.pids: list[int] = []

    def run(self, count: int, threads: int = 4, *, halfway: Callable[[int], None] | None = None) -> None:
        """Until `count` more are acknowledged.  `halfway` is called once, under load, with a worker's process id."""
        goal = len(self.acknowledged) + count
        middle = goal - count // 2
        end = time.monotonic() + PATIENCE
        told = [halfway is None]

        def work() -> None:
            while len(self.acknowledged) < goal and time.monotonic() < end:
                answer = self._server.get(self._path)
                with self._lock:
                    self._note(answer)
                    due = not told[0] and len(self.acknowledged) >= middle
                    told[0] |= due
                if due and halfway is not None:
                    halfway(self.pids[-1])

        workers = [threading.Thread(target=work) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(self.acknowledged) >= goal, f"{len(self.acknowledged)} of {goal}, {self.unanswered} unanswered"

    def run_until_workers(self, number: int) -> None:
        """Until that many worker processes have acknowledged something: recycled and killed ones are replaced."""
        end = time.monotonic() + PATIENCE
        while len(set(self.pids)) < number:
            assert time.monotonic() < end, f"only {len(set(self.pids))} of {number} workers were seen"
            self.run(10)

    def _note(self, answer: dict[str, str | int | None] | None) -> None:
        if answer is None:
            self.unanswered += 1
        elif answer["id"] is None:
            self.refused += 1
        else:
            self.acknowledged.add(str(answer["id"]))
            self.pids.append(int(answer["pid"] or 0))


class Books:
    """What arrived, against what was acknowledged."""

    def __init__(self, receiver: Receiver, outbox: Path) -> None:
        self._receiver = receiver
        self._outbox = outbox

    def missing(self, acknowledged: set[str]) -> set[str]:
        return acknowledged - {event["messageId"] for event in self._receiver.unique}

    def wait_until_all_arrived(self, acknowledged: set[str]) -> None:
        """While the server runs: its workers deliver without being asked."""
        self._receiver.wait_for(lambda _: not self.missing(acknowledged), PATIENCE)
        assert self.missing(acknowledged) == set()

    def check(self, acknowledged: set[str], *, killed: bool = False, left: bool = False) -> None:
        """After the server's end.  `left`: some may be on disk still, and then the next process delivers them."""
        with Client("test-key", self._receiver.url, outbox_dir=self._outbox, deliver=left) as client:
            before = client.stats()
            assert left or before.pending == 0, f"{before.pending} were not delivered at the end"
            if left:
                assert client.flush(PATIENCE) is True
            stats = client.stats()
        print(f"{len(acknowledged)} acknowledged, {len(self._receiver.unique)} arrived, ", end="")
        print(f"{self._receiver.duplicates} twice, {before.pending} were left to the next process")
        assert self.missing(acknowledged) == set()
        assert killed or self._receiver.duplicates == 0
        assert stats.balanced
        assert stats.dead == 0
        assert stats.delivered == stats.accepted == len(self._receiver.unique)
        assert self._receiver.errors == ()


def killing(pid: int) -> None:
    """As the kernel's out-of-memory killer does."""
    os.kill(pid, signal.SIGKILL)
