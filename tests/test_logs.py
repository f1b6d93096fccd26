"""Log handlers of the application that fail: nothing else fails with them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from segment_durable import Client, ConfigError, upkeep
from segment_durable.clock import SystemClock
from segment_durable.errors import StorageError
from segment_durable.logs import get_log
from segment_durable.outbox import Outbox
from segment_durable.testing import Answer, Receiver
from segment_durable.wal import Wal

MakeClient = Callable[..., Client]


class Failing(logging.Handler):
    """Raises at every record, and remembers what it was about."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())
        raise OSError("the log's disk is full")


@pytest.fixture
def failing() -> Iterator[Failing]:
    handler = Failing()
    segment = logging.getLogger("segment")
    segment.addHandler(handler)
    segment.setLevel(logging.DEBUG)
    yield handler
    segment.removeHandler(handler)
    assert handler.said, "nothing was logged, so nothing was tested"


def test_the_sender_goes_on_after_an_outbox_that_failed(
    failing: Failing, make_client: MakeClient, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter([StorageError("once", "SQLITE_IOERR")])
    real = Outbox.lease

    def lease(self: Outbox, *arguments: Any, **named: Any) -> Any:
        for problem in failures:
            raise problem
        return real(self, *arguments, **named)

    monkeypatch.setattr(Outbox, "lease", lease)
    make_client(upload_interval=0.01).track("u", "e")
    assert receiver.wait_for(1)
    assert any("delivery is held up" in each for each in failing.said)


def test_the_sender_goes_on_after_anything_that_its_look_at_the_outbox_raises(
    make_client: MakeClient, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures = iter([MemoryError("once")])
    real = Outbox.load

    def load(self: Outbox) -> tuple[int, int, int]:
        for problem in failures:
            raise problem
        return real(self)

    monkeypatch.setattr(Outbox, "load", load)
    make_client(upload_interval=0.01).track("u", "e")
    assert receiver.wait_for(1)
    assert "delivery is held up (1 times): once" in caplog.text


def test_delivery_goes_on_after_a_failed_attempt_and_a_refused_event(
    failing: Failing, make_client: MakeClient, receiver: Receiver
) -> None:
    receiver.script(Answer(500), Answer(400))
    client = make_client(max_retries=0)
    client.track("u", "poison")
    assert client.flush(10) is False  # the first attempt, after which it may wait
    client.track("u", "sound")
    assert client.flush(10) is True
    assert [event["event"] for event in receiver.unique] == ["sound"]
    stats = client.stats()
    assert (stats.delivered, stats.dead) == (1, 1)


def test_a_call_at_a_full_outbox_is_refused_as_ever(failing: Failing, make_client: MakeClient) -> None:
    client = make_client(max_queue_size=1, deliver=False, debug=True)
    assert client.track("u", "e")[0] is True
    assert client.track("u", "e")[0] is False


@pytest.mark.parametrize("problem", [StorageError("once", "SQLITE_IOERR"), MemoryError("once"), SystemExit(1)])
def test_upkeep_goes_on_after_a_sync_that_failed(
    failing: Failing, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch, problem: BaseException
) -> None:
    failures = iter([problem])
    real = Wal.sync

    def sync(self: Wal) -> None:
        for problem in failures:
            raise problem
        real(self)

    monkeypatch.setattr(Wal, "sync", sync)
    monkeypatch.setattr(upkeep, "SYNC_SECONDS", 0.001)
    client = make_client(deliver=False)
    client.track("u", "e")
    wal = client._live().outbox.db.wal
    for _ in range(3_000):
        if not wal.is_unsynced:
            break
        failing.acquire()  # no signal says so: the thread is to have a turn
        failing.release()
        SystemClock().wait(upkeep.Wake(), 0.01)
    assert not wal.is_unsynced


def test_a_hook_that_raises_is_told_of_and_nothing_more(failing: Failing, make_client: MakeClient) -> None:
    def before_send(message: dict[str, Any]) -> dict[str, Any]:
        raise LookupError

    def on_error(problem: Exception, items: object) -> None:
        raise LookupError

    client = make_client(max_queue_size=1, deliver=False, before_send=before_send, on_error=on_error)
    assert client.track("u", "e")[0] is True
    assert client.track("u", "e")[0] is False


@pytest.mark.parametrize("raise_exceptions", [True, False])
@pytest.mark.parametrize("stderr", ["there", "closed", "none"])
def test_what_a_handler_raises_is_printed_as_python_prints_what_its_own_fail_at(
    failing: Failing,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    raise_exceptions: bool,
    stderr: str,
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", raise_exceptions)
    if stderr == "none":
        monkeypatch.setattr(sys, "stderr", None)
    elif stderr == "closed":
        closed = (tmp_path / "closed").open("w")
        closed.close()
        monkeypatch.setattr(sys, "stderr", closed)
    get_log("client").error("of %s", "no matter")
    assert failing.said == ["of no matter"]
    said = capsys.readouterr().err
    assert ("OSError: the log's disk is full" in said) is (raise_exceptions and stderr == "there")


def test_who_logs_is_told_of_where_it_does(caplog: pytest.LogCaptureFixture) -> None:
    get_log("").warning("here")
    (record,) = caplog.records
    assert (record.name, record.filename, record.funcName) == (
        "segment.durable",
        Path(__file__).name,
        "test_who_logs_is_told_of_where_it_does",
    )


def test_what_is_raised_for_a_wrong_setting_is_none_of_that(make_client: MakeClient) -> None:
    with pytest.raises(ConfigError):
        make_client(log_handler="stderr")
