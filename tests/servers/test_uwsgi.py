"""uWSGI: the app loaded in the master or in the workers, forked in C with and without Python's hooks, threads off."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from segment_durable.testing import Receiver

from .running import Books, Load, Server, killing, needs, program

Launch = Callable[..., Server]


def start(launch: Launch, *options: str, **environment: str) -> Server:
    needs(programs=("uwsgi",))
    command = [str(program("uwsgi")), "--http-socket", "127.0.0.1:0", "--master", "--workers", "2", "--need-app"]
    command += ["--home", sys.prefix, "--wsgi-file", "wsgi.py", "--disable-logging", *options]
    server = launch(command, **environment)
    server.wait_until_up()
    return server


MODES = {
    "lazy": ["--enable-threads", "--lazy-apps"],
    "in C": ["--enable-threads"],
    "in C, with the child's hook": ["--enable-threads", "--py-call-osafterfork"],
    "with all hooks": ["--enable-threads", "--py-call-uwsgi-fork-hooks"],
    "prethreaded": ["--threads", "4"],
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("at_import", ["client", "track"])
def test_a_clean_life(launch: Launch, books: Books, mode: str, at_import: str) -> None:
    server = start(launch, *MODES[mode], EVENTS_AT_IMPORT=at_import)
    load = Load(server)
    load.run(200)
    # Both: with lazy-apps the second one may be loading the app still, and the end would interrupt that.
    load.run_until_workers(2)
    assert load.refused == load.unanswered == 0
    books.wait_until_all_arrived(load.acknowledged)
    server.end(signal.SIGINT)
    books.check(load.acknowledged)


@pytest.mark.parametrize("at_import", ["client", "track"])
def test_a_worker_killed_under_load(launch: Launch, books: Books, at_import: str) -> None:
    server = start(launch, "--enable-threads", EVENTS_AT_IMPORT=at_import)
    load = Load(server)
    load.run(200, halfway=killing)
    load.run_until_workers(3)
    assert load.refused == 0
    books.wait_until_all_arrived(load.acknowledged)
    server.end(signal.SIGINT)
    books.check(load.acknowledged, killed=True)


def runs_threads_by_default() -> bool:
    """From 2.0.27 on `enable-threads` is always on."""
    said = subprocess.run([str(program("uwsgi")), "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(int(part) for part in re.findall(r"\d+", said)[:3]) >= (2, 0, 27)


@pytest.mark.parametrize("at_import", ["client", "track"])
def test_without_threads(launch: Launch, receiver: Receiver, books: Books, at_import: str) -> None:
    """Nothing is lost and nobody waits: what no thread could deliver goes out when the workers end.

    It takes a uWSGI before 2.0.27, as Debian 12 has: name one in SEGMENT_DURABLE_UWSGI.  A later one has nothing to
    warn of.
    """
    server = start(launch, EVENTS_AT_IMPORT=at_import)
    load = Load(server)
    load.run(200)
    load.run_until_workers(2)
    assert load.refused == load.unanswered == 0
    warnings = server.said().count("enable-threads = true")
    print(f"{warnings} warnings, {len(receiver.unique)} arrived while it ran, then ", end="")
    if runs_threads_by_default():
        assert warnings == 0
        books.wait_until_all_arrived(load.acknowledged)
    else:
        assert warnings == (1 if at_import == "track" else 2), "each process says it once, and none after its parent"
        assert len(receiver.unique) == 0
    server.end(signal.SIGINT)
    books.check(load.acknowledged)
