"""gunicorn: each kind of worker, the app loaded before the fork and after it, workers that end in every way."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from .running import Books, Load, Server, killing, needs

Launch = Callable[..., Server]
KINDS = {
    "sync": ["--worker-class", "sync"],
    "gthread": ["--worker-class", "gthread", "--threads", "4"],
    "gevent": ["--worker-class", "gevent"],
}


def start(launch: Launch, kind: str, *options: str, **environment: str) -> Server:
    needs("gunicorn", *(["gevent"] if kind == "gevent" else []))
    command = [sys.executable, "-m", "gunicorn", "--bind", "127.0.0.1:0", "--workers", "2", "--no-control-socket"]
    # gunicorn forgets to end a worker that is told so while it starts, and kills it after this many seconds.
    command += ["--graceful-timeout", "10"]
    server = launch([*command, *KINDS[kind], *options, "wsgi:application"], **environment)
    server.wait_until_up()
    return server


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_import", ["nothing", "client", "track"])
def test_a_clean_life(launch: Launch, books: Books, kind: str, at_import: str) -> None:
    """`nothing`: each worker loads the app.  Else the master does, and has a client, or its running threads."""
    options = [] if at_import == "nothing" else ["--preload"]
    server = start(launch, kind, *options, EVENTS_AT_IMPORT=at_import)
    load = Load(server)
    load.run(200, threads=8)
    load.run_until_workers(2)
    assert load.refused == load.unanswered == 0
    server.end()
    books.check(load.acknowledged)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["alone", "preload"])
def test_a_worker_killed_under_load(launch: Launch, books: Books, kind: str, preload: list[str]) -> None:
    server = start(launch, kind, *preload, EVENTS_AT_IMPORT="track" if preload else "")
    load = Load(server)
    load.run(200, threads=8, halfway=killing)
    load.run_until_workers(3)
    assert load.refused == 0
    books.wait_until_all_arrived(load.acknowledged)
    server.end()
    books.check(load.acknowledged, killed=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["alone", "preload"])
def test_workers_that_are_recycled(launch: Launch, books: Books, kind: str, preload: list[str]) -> None:
    server = start(launch, kind, *preload, "--max-requests", "25", EVENTS_AT_IMPORT="client")
    load = Load(server)
    load.run(150)
    load.run_until_workers(5)
    assert load.refused == 0
    # Two workers at a time: at least three of the five are replacements, and nothing but the limit ended the others.
    assert server.said().count("Autorestarting worker") >= 3
    assert "was sent SIG" not in server.said()
    server.end()
    books.check(load.acknowledged)
