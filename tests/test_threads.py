"""Where no thread can run, everything is done without one, and the setting that mends it is named."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from segment_durable import Client, threads
from segment_durable.testing import Receiver

MakeClient = Callable[..., Client]


@pytest.fixture
def uwsgi(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What uWSGI shows of itself to a worker that runs threads."""
    module = ModuleType("uwsgi")
    module.has_threads = 1  # type: ignore[attr-defined]
    module.masterpid = os.getppid  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "uwsgi", module)
    monkeypatch.setattr(threads, "_told", False)
    return module


def ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("segment-durable")]


def test_a_worker_that_runs_threads_is_like_any_process(
    make_client: MakeClient, receiver: Receiver, uwsgi: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    make_client().track("u", "e")
    assert receiver.wait_for(1)
    assert caplog.records == []


def test_without_threads_the_setting_is_named_once_and_a_flush_delivers(
    make_client: MakeClient, receiver: Receiver, uwsgi: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    uwsgi.has_threads = 0
    client = make_client()
    for n in range(5):
        assert client.track("u", str(n))[0]
    assert ours() == []
    assert receiver.unique == []
    said = [(record.name, record.levelno) for record in caplog.records]
    assert said == [("segment.durable", logging.WARNING)]
    assert "enable-threads = true" in caplog.text
    assert client.flush(20) is True
    assert [event["event"] for event in receiver.unique] == [str(n) for n in range(5)]


def test_where_no_thread_can_be_made_it_is_as_where_none_can_start(
    make_client: MakeClient, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an interpreter within another that may have no daemons."""

    real = threading.Thread

    def refuse(*arguments: Any, name: str | None = None, **named: Any) -> threading.Thread:
        if name is not None and name.startswith("segment-durable"):
            raise RuntimeError("daemon threads are disabled in this (sub)interpreter")
        return real(*arguments, name=name, **named)

    client = make_client()
    with monkeypatch.context() as patch:
        patch.setattr(threading, "Thread", refuse)
        assert client.track("u", "e")[0]
        assert client.flush(20) is True
    assert [event["event"] for event in receiver.unique] == ["e"]


def test_in_the_master_no_thread_starts(
    make_client: MakeClient, receiver: Receiver, uwsgi: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    """It would stand still once the app is loaded, and could do so with the outbox locked."""
    uwsgi.masterpid = os.getpid
    client = make_client()
    assert client.track("u", "e")[0]
    assert ours() == []
    assert caplog.records == []
    uwsgi.masterpid = os.getppid  # forked
    assert client.track("u", "e")[0]
    assert receiver.wait_for(2)


def test_a_lock_made_after_gevents_patching_is_pythons_own_in_c() -> None:
    """gevent leaves no `threading._CRLock`: its `RLock` then has an `__init__` to be called."""
    code = """
import threading
threading._CRLock = None
assert hasattr(threading.RLock(), "_owner")
from segment_durable.threads import PatientLock
lock = PatientLock()
assert not lock.is_owned() and not hasattr(lock, "_owner")
with lock:
    assert lock.is_owned()
    with lock:
        pass
assert not lock.is_owned()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
