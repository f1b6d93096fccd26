"""uWSGI: the app loaded in the master or in the workers, forked in C with and without Python's hooks, threads off."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

import pytest

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
    assert load.refused == load.unanswered == 0
    books.wait_until_all_arrived(load.acknowledged)
    server.end(signal.SIGINT)
    books.check(load.acknowledged)


@pytest.mark.parametrize("at_import", ["client", "track"])
def test_a_worker_killed_under_load(launch: Launch, books: Books, at_import: str) -> None:
    server = start(launch, "--enable-threads", EVENTS_AT_IMPORT=at_import)
    load = Load(server)
    load.run(200, halfway=killing)
    assert load.refused == 0
    books.wait_until_all_arrived(load.acknowledged)
    server.end(signal.SIGINT)
    books.check(load.acknowledged, killed=True)


@pytest.mark.parametrize("at_import", ["client", "track"])
def test_without_threads(launch: Launch, books: Books, at_import: str) -> None:
    """Nothing is lost and nobody waits: what no thread could deliver goes out when the workers end.

    From 2.0.27 or so on uWSGI runs threads unless it is built without them; then there is nothing to warn of.
    """
    server = start(launch, EVENTS_AT_IMPORT=at_import)
    load = Load(server)
    load.run(200)
    assert load.refused == load.unanswered == 0
    runs_threads = "threads support is disabled" not in server.said().lower()
    assert ("enable-threads = true" in server.said()) is not runs_threads
    server.end(signal.SIGINT)
    books.check(load.acknowledged)
