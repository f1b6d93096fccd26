"""Signal handlers that call the API, at any place of a call: none waits for what it has interrupted."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from outbox.common import Interruption, in_its_own_thread

from segment_durable import Client, engine, process, worker
from segment_durable.outbox import Outbox
from segment_durable.testing import FakeClock, Receiver
from segment_durable.testing.scripted import ScriptedTransport


class TimeLimit(Exception):
    pass


def strike(client: Client) -> None:
    raise TimeLimit


def track(client: Client) -> list[str]:
    accepted, message = client.track("u", "of the handler")
    return [message["messageId"]] if accepted else []


# What interrupts, and whether the interrupted call goes on; the ids of what it had accepted.
HANDLERS: dict[str, Callable[[Client], list[str] | None]] = {
    "track": track,
    "flush": lambda client: client.flush() and [],  # type: ignore[dict-item]
    "shutdown": lambda client: client.shutdown() and [],  # type: ignore[dict-item]
    "raise": strike,
}

CALLS: dict[str, tuple[dict[str, Any], Callable[[Client], object]]] = {
    "first track": ({}, lambda client: client.shutdown(0.0)),
    "track": ({}, lambda client: client.track("u", "first")),
    "track in sync_mode": ({"sync_mode": True}, lambda client: None),
    "track with a full outbox": ({"max_queue_size": 1, "deliver": False}, lambda client: client.track("u", "first")),
}


def first_place(long: bool) -> tuple[int, int]:
    """Where to begin, and how far to the next: with `--long` each place, without every third one, others each time."""
    return (0, 1) if long else (random.randrange(3), 3)


@pytest.mark.timeout(240)
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # a file that was just opened is not closed
@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("call", CALLS)
@in_its_own_thread
def test_a_signal_handler_at_any_place_of_a_call_ends_and_costs_no_event(
    call: str, handler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long: bool
) -> None:
    transports: list[ScriptedTransport] = []

    def make_transport(_: object) -> ScriptedTransport:
        transports.append(ScriptedTransport())
        return transports[-1]

    monkeypatch.setattr(engine, "RequestsTransport", make_transport)
    folder = tmp_path / "outbox"
    settings, prepare = CALLS[call]
    places, step = first_place(long)
    while True:
        transports.clear()
        client = Client("test", outbox_dir=folder, upload_interval=60, on_error=lambda *_: None, **settings)
        prepare(client)
        accepted: list[str] = []

        def handle(client: Client = client, accepted: list[str] = accepted) -> None:
            accepted += HANDLERS[handler](client) or []

        with contextlib.suppress(TimeLimit), Interruption(places, handle, checked=True) as interruption:
            done, message = client.track("u", "interrupted")
            if done:
                accepted.append(message["messageId"])
        where = f"{handler} at place {places} of: {call}"
        done, message = client.track("u", "afterwards")
        assert done or call == "track with a full outbox", where
        if done:
            accepted.append(message["messageId"])
            using = client._engine
            assert using is not None
            assert using.upkeep._thread is not None, f"nobody syncs: {where}"
            assert using.sender.is_running or not client._delivers, f"nobody delivers: {where}"
        client.shutdown(0.0)
        assert not process._engines, where
        for thread in threading.enumerate():
            if thread.name.startswith("segment-durable"):
                thread.join(10)
                assert not thread.is_alive(), where
        with contextlib.closing(Outbox(folder, FakeClock())) as outbox:
            there = b"".join(row.body for row in outbox.rows(0, 1 << 60))
        sent = [event["messageId"] for transport in transports for post in transport.posts for event in post.events]
        assert [each for each in accepted if each.encode() not in there and each not in sent] == [], where
        shutil.rmtree(folder)
        if not interruption.happened:
            break
        places += step
    assert places > 20
    gc.collect()  # here, and not in a test after this one, it may be told what was not closed


ENDS: dict[str, Callable[[Client], object]] = {
    "flush": lambda client: client.flush(),
    "shutdown": lambda client: client.shutdown(),
    "shutdown in no time": lambda client: client.shutdown(0),
    "join": lambda client: client.join(),
    "stats": lambda client: client.stats(),
    "another client": lambda client: Client("test", outbox_dir=client._config.outbox_dir, deliver=False).shutdown(0),
}


@pytest.mark.timeout(240)
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # a file that was just opened is not closed
@pytest.mark.parametrize("mode", [{}, {"sync_mode": True}, {"deliver": False}], ids=str)
@pytest.mark.parametrize("call", ENDS)
@in_its_own_thread
def test_a_signal_handler_that_raises_at_any_place_of_these_leaves_a_client_that_works(
    call: str, mode: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long: bool
) -> None:
    """Ctrl-C during a flush, above all."""
    monkeypatch.setattr(engine, "RequestsTransport", lambda _: ScriptedTransport())
    places, step = first_place(long)
    while True:
        folder = tmp_path / str(places)
        client = Client("test", outbox_dir=folder, upload_interval=60, **mode)
        client.track("u", "first")
        raises = partial(strike, client)
        with contextlib.suppress(TimeLimit), Interruption(places, raises, checked=True) as interruption:
            ENDS[call](client)
        where = f"at place {places} of: {call}"
        with ThreadPoolExecutor(1) as another:  # this thread has reentrant locks
            assert another.submit(client.track, "u", "afterwards").result(30)[0], where
            stats = another.submit(client.stats).result(30)
            assert (stats.accepted, stats.balanced) == (2, True), where
            delivers = mode.get("deliver", True)
            seconds = 10 if delivers else 0
            assert another.submit(client.flush, seconds).result(60) is delivers, where
            assert another.submit(client.shutdown, seconds).result(60) is delivers, where
        assert not process._engines or call == "another client", where
        for each in list(process._engines.values()):  # of a client that was not finished, or that nobody has shut down
            each.close(5.0)
        process._engines.clear()
        for thread in threading.enumerate():
            if thread.name.startswith("segment-durable"):
                thread.join(10)
                assert not thread.is_alive(), where
        with contextlib.closing(Outbox(folder, FakeClock())) as outbox:
            assert outbox.stats().delivered == (2 if delivers else 0), where
        shutil.rmtree(folder)
        if not interruption.happened:
            break
        places += step
    assert places > 20
    gc.collect()


@pytest.mark.parametrize("is_started", [False, True], ids=["before its thread", "after its thread"])
def test_a_sender_whose_start_was_interrupted_is_started_by_the_next_call(
    make_client: Callable[..., Client], receiver: Receiver, monkeypatch: pytest.MonkeyPatch, is_started: bool
) -> None:
    strikes = iter([TimeLimit])
    threads: list[threading.Thread | None] = []

    def start_thread(target: Callable[[], None], name: str) -> threading.Thread | None:
        for each in strikes:
            if is_started:
                threads.append(real(target, name))
            raise each
        threads.append(real(target, name))
        return threads[-1]

    real = worker.start_thread
    monkeypatch.setattr(worker, "start_thread", start_thread)
    client = make_client(upload_interval=0.01)
    with pytest.raises(TimeLimit):
        client.track("u", "interrupted")
    client.track("u", "afterwards")
    assert receiver.wait_for(2)
    client.shutdown(0)
    for thread in threads:
        assert thread is not None
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.timeout(120)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # Python ignores what hooks of a fork raise
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@in_its_own_thread
def test_a_signal_handler_that_raises_at_any_place_of_a_fork_costs_neither_side_its_outbox(tmp_path: Path) -> None:
    client = Client("test", outbox_dir=tmp_path / "outbox", deliver=False)
    with at_work(tmp_path / "busy"):
        places = fork_at_each_place(client)
    assert places > 20
    stats = client.stats()
    assert stats.pending == 3 * (places + 1)
    assert stats.balanced
    client.shutdown(0)
    gc.collect()


@contextlib.contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """Another thread puts all the time, so that it is mostly inside SQLite."""
    over = threading.Event()
    # Made before: a fork waits for who makes one by way of a client only.
    with contextlib.closing(Outbox(folder, FakeClock())) as outbox, ThreadPoolExecutor(1) as pool:

        def work() -> None:
            while not over.is_set():
                outbox.put(b"{}", 1)

        working = pool.submit(work)
        try:
            yield
        finally:
            over.set()
        working.result()


def fork_at_each_place(client: Client) -> int:
    """At which a signal handler raises: how many there are."""
    places = 0
    while True:
        client.track("u", "opens it")
        with contextlib.suppress(TimeLimit), Interruption(places, lambda: strike(client), checked=True) as interruption:
            child = os.fork()
            if not child:
                sys.settrace(None)
                os._exit(0 if client.track("u", "of the child")[0] else 7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, f"at place {places}"
        with ThreadPoolExecutor(1) as another:
            assert another.submit(client.track, "u", "of another thread").result()[0], f"at place {places}"
        if not interruption.happened:
            return places
        places += 1
