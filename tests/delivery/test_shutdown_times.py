"""`shutdown(timeout=...)` keeps to its time whatever the sender is at; that ends by itself, and nothing is lost."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from segment_durable import Client, connections
from segment_durable.clock import SystemClock
from segment_durable.testing import Answer, Hang, OAuthApp, Receiver

TIMEOUT = 0.3
ALLOWED = 0.2
# Measured on two cores, with and without other load: 0.300 to 0.308 s.  A machine of a CI may not run us for a while.
SLACK = 0.5 if os.environ.get("CI") else 0.0
NETWORK_TIMEOUT = 1.5  # seconds: well over what shutdown may take, so that waiting for it would be seen
KEY = "a-write-key-of-tests"


@dataclass
class State:
    """What a client's sender is caught in."""

    settings: dict[str, Any] = field(default_factory=dict)
    backs_off: bool = False
    end: Callable[[], None] = lambda: None  # ends the wait of the thread, if it does not by itself


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Look until it is true; the time decides nothing but when to give up."""
    never, end = threading.Event(), time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        never.wait(0.005)
    return True


def open_files() -> list[str]:
    """What the descriptors of this process mean, where the system tells."""
    found = []
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return found


def is_in(client: Client, state: State) -> bool:
    stats = client.stats()
    return stats.leased == 0 and stats.next_attempt_seconds > 1 if state.backs_off else stats.leased > 0


def sender_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("segment-durable")]


@contextlib.contextmanager
def black_hole() -> Iterator[str]:
    """The URL of a listener whose queue is full: a connection to it is neither made nor refused."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(16):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
            if not select.select([], [filler], [], 0.1)[1]:
                break
        else:
            pytest.skip("this system takes more connections than it was asked for")
        yield "http://{}:{}".format(*listener.getsockname())


@contextlib.contextmanager
def connecting(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    with black_hole() as url:
        yield State({"host": url})


@contextlib.contextmanager
def reading_an_answer(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    receiver.script(Hang())
    yield State(end=receiver.release)


@contextlib.contextmanager
def reading_an_answer_that_never_comes(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    receiver.script(Hang())
    yield State()


@contextlib.contextmanager
def backing_off(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    receiver.always(Answer(404))
    yield State(backs_off=True)
    receiver.always(None)


@contextlib.contextmanager
def rate_limited(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    receiver.always(Answer(429, {"Retry-After": "300"}))
    yield State(backs_off=True)
    receiver.always(None)


@contextlib.contextmanager
def waiting_for_a_token(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    app, private = OAuthApp.generate()
    with Receiver(oauth=app) as token_server:
        token_server.token_script(Hang())
        settings = {
            "oauth_client_id": app.client_id,
            "oauth_key_id": app.key_id,
            "oauth_client_key": private,
            "oauth_auth_server": token_server.url,
        }
        yield State(settings, end=token_server.release)


@contextlib.contextmanager
def resolving_a_name(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    """Nothing can time a getaddrinfo() out."""
    answered, real = threading.Event(), socket.getaddrinfo

    def hanging(host: Any, *args: Any, **options: Any) -> Any:
        if host == "receiver.test":
            assert answered.wait(60)
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return real(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", hanging)
    yield State({"host": "http://receiver.test"}, end=answered.set)


STATES = [
    connecting,
    reading_an_answer,
    reading_an_answer_that_never_comes,
    backing_off,
    rate_limited,
    waiting_for_a_token,
    resolving_a_name,
]


@pytest.mark.parametrize("begin", STATES, ids=lambda each: each.__name__)
@pytest.mark.parametrize("threads", [1, 3])
def test_shutdown_keeps_to_its_time_and_a_later_start_delivers_everything(
    receiver: Receiver,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    begin: Callable[[Receiver, pytest.MonkeyPatch], contextlib.AbstractContextManager[State]],
    threads: int,
) -> None:
    outbox = tmp_path / "outbox"
    sockets = sum(name.startswith("socket:") for name in open_files())
    with begin(receiver, monkeypatch) as state:
        settings = {"host": receiver.url, "timeout": NETWORK_TIMEOUT, "thread": threads, "upload_interval": 0}
        client = Client(KEY, outbox_dir=outbox, **{**settings, **state.settings})
        sent = [client.track("user", f"event {number}")[1] for number in range(5)]

        assert until(lambda: is_in(client, state))
        caught = sender_threads()
        assert len(caught) > threads  # the senders and the upkeep

        started = time.monotonic()
        finished = client.shutdown(timeout=TIMEOUT)
        took = time.monotonic() - started
        assert not finished
        assert took <= TIMEOUT + ALLOWED + SLACK
        if not state.backs_off:
            assert any(thread.is_alive() for thread in caught)

        state.end()
        for thread in caught:
            thread.join(10)
        assert not any(thread.is_alive() for thread in caught)
        assert not [name for name in open_files() if str(outbox) in name]

    receiver.release()  # a connection that still hangs there

    if state.backs_off:
        boot = SystemClock.boot
        monkeypatch.setattr(SystemClock, "boot", lambda self: boot(self) + 301)
    with Client(KEY, host=receiver.url, outbox_dir=outbox) as later:
        assert later.flush(20.0)
        stats = later.stats()
        assert (stats.delivered, stats.pending, stats.balanced) == (5, 0, True)
    by_id = {event["messageId"]: event for event in receiver.unique}
    assert by_id == {event["messageId"]: event for event in sent}
    if threads == 1:
        assert receiver.unique == sent
    assert until(lambda: sum(name.startswith("socket:") for name in open_files()) <= sockets)
    gc.collect()  # an unclosed socket or connection is a ResourceWarning, which is an error here
    assert until(lambda: not sender_threads())


def test_shutdown_without_trouble_ends_at_once_and_is_true(
    receiver: Receiver, make_client: Callable[..., Client]
) -> None:
    client = make_client()
    for number in range(50):
        client.track("user", f"event {number}")
    started = time.monotonic()
    assert client.shutdown(timeout=10)
    assert time.monotonic() - started < 5
    assert len(receiver.unique) == 50
    assert until(lambda: not sender_threads(), 2)


@pytest.mark.parametrize("timeout", [0, 0.05])
def test_shutdown_with_hardly_any_time_returns(
    receiver: Receiver, make_client: Callable[..., Client], timeout: float
) -> None:
    receiver.script(Hang())
    client = make_client(timeout=NETWORK_TIMEOUT, upload_interval=0)
    client.track("user", "Signed Up")
    assert until(lambda: client.stats().leased > 0)
    started = time.monotonic()
    assert not client.shutdown(timeout)
    assert time.monotonic() - started <= timeout + ALLOWED + SLACK
    receiver.release()
    assert until(lambda: not sender_threads())


def test_a_second_shutdown_and_one_by_another_thread_return_too(
    receiver: Receiver, make_client: Callable[..., Client]
) -> None:
    receiver.script(Hang())
    client = make_client(timeout=NETWORK_TIMEOUT, upload_interval=0)
    client.track("user", "Signed Up")
    assert until(lambda: client.stats().leased > 0)
    threads = [threading.Thread(target=client.shutdown, args=(TIMEOUT,)) for _ in range(4)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert client.shutdown(TIMEOUT) is False
    assert time.monotonic() - started <= TIMEOUT + ALLOWED + SLACK
    receiver.release()
    assert until(lambda: not sender_threads())


def test_shutdown_in_sync_mode_does_not_wait_for_a_call_in_another_thread(
    receiver: Receiver, make_client: Callable[..., Client]
) -> None:
    receiver.script(Hang())
    client = make_client(timeout=NETWORK_TIMEOUT, sync_mode=True)
    call = threading.Thread(target=client.track, args=("user", "Signed Up"))
    call.start()
    try:
        assert receiver.wait_for(lambda receiver: len(receiver.requests) == 1)
        started = time.monotonic()
        assert not client.shutdown(TIMEOUT)
        assert time.monotonic() - started <= TIMEOUT + ALLOWED + SLACK
    finally:
        receiver.release()
        call.join(10)


_HOLDER = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.lockf(fd, fcntl.LOCK_EX, 1, 0)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX locks")
def test_shutdown_keeps_to_its_time_while_another_process_keeps_the_writer_lock(
    receiver: Receiver, make_client: Callable[..., Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "WRITE_TIMEOUT", 2.0)
    client = make_client(upload_interval=0)
    receiver.script(Answer(404))
    client.track("user", "Signed Up")
    assert until(lambda: client.stats().next_attempt_seconds > 1)
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path / "outbox" / "outbox.lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        try:
            started = time.monotonic()
            client.shutdown(TIMEOUT)
            assert time.monotonic() - started <= TIMEOUT + ALLOWED + SLACK
        finally:
            holder.communicate()


def test_a_callback_that_ends_its_thread_does_not_end_delivery(
    receiver: Receiver, make_client: Callable[..., Client]
) -> None:
    calls: list[object] = []

    def callback(items: object) -> None:
        calls.append(items)
        if len(calls) == 1:
            raise KeyboardInterrupt

    client = make_client(on_success=callback, upload_interval=0)
    client.track("user", "first")
    assert receiver.wait_for(1)
    assert until(lambda: len(calls) == 1)
    until(lambda: not [thread for thread in sender_threads() if "sender" in thread.name], 0.5)
    client.track("user", "second")
    assert receiver.wait_for(2, timeout=2)
