"""Django under gunicorn, Django and FastAPI under uvicorn, two workers each."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from .running import Books, Load, Server, killing, needs

Launch = Callable[..., Server]


@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["alone", "preload"])
def test_django_under_gunicorn(launch: Launch, books: Books, preload: list[str]) -> None:
    needs("django", "gunicorn")
    command = [sys.executable, "-m", "gunicorn", "--bind", "127.0.0.1:0", "--workers", "2", "--no-control-socket"]
    server = launch([*command, *preload, "--worker-class", "gthread", "--threads", "2", "django_app:application"])
    server.wait_until_up()
    load = Load(server)
    load.run(150)
    load.run_until_workers(2)
    assert load.refused == load.unanswered == 0
    server.end()
    books.check(load.acknowledged)


def uvicorn(launch: Launch, app: str = "asgi:app", **environment: str) -> Server:
    needs("django" if app.startswith("django") else "fastapi", "uvicorn")
    command = [sys.executable, "-m", "uvicorn", "--port", "0", "--workers", "2", "--log-level", "info", app]
    server = launch(command, **environment)
    server.wait_until_up()
    return server


@pytest.mark.parametrize("path", ["/track", "/track-in-loop"])
def test_fastapi_that_shuts_the_client_down(launch: Launch, books: Books, path: str) -> None:
    server = uvicorn(launch, EVENTS_AT_END="shutdown")
    load = Load(server, path)
    load.run(150)
    load.run_until_workers(2)
    assert load.refused == load.unanswered == 0
    server.end()
    books.check(load.acknowledged)


def test_fastapi_that_does_not_leaves_the_rest_on_disk(launch: Launch, books: Books) -> None:
    """Uvicorn's workers end by the signal itself, without Python's exit: as after a kill, the next process delivers."""
    server = uvicorn(launch)
    load = Load(server)
    load.run(150)
    load.run_until_workers(2)
    assert load.refused == load.unanswered == 0
    server.end()
    books.check(load.acknowledged, killed=True, left=True)


def test_a_fastapi_worker_killed_under_load(launch: Launch, books: Books) -> None:
    server = uvicorn(launch, EVENTS_AT_END="shutdown")
    load = Load(server)
    load.run(150, halfway=killing)
    load.run_until_workers(3)
    assert load.refused == 0
    books.wait_until_all_arrived(load.acknowledged)
    server.end()
    books.check(load.acknowledged, killed=True)


DJANGO = "django_app:asgi_application"


@pytest.mark.parametrize("path", ["/track", "/track-in-loop"])
def test_django_under_uvicorn_leaves_the_rest_on_disk(launch: Launch, books: Books, path: str) -> None:
    """Django knows no lifespan in which the client could be shut down."""
    server = uvicorn(launch, DJANGO)
    load = Load(server, path)
    load.run(150)
    load.run_until_workers(2)
    assert load.refused == load.unanswered == 0
    server.end()
    books.check(load.acknowledged, killed=True, left=True)


@pytest.mark.parametrize("path", ["/track", "/track-in-loop"])
def test_a_django_worker_killed_under_uvicorn(launch: Launch, books: Books, path: str) -> None:
    server = uvicorn(launch, DJANGO)
    load = Load(server, path)
    load.run(150, halfway=killing)
    load.run_until_workers(3)
    assert load.refused == 0
    books.wait_until_all_arrived(load.acknowledged)
    server.end()
    books.check(load.acknowledged, killed=True, left=True)
