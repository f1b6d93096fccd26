"""The client as a whole: limits, callbacks, flush, join, shutdown, sharing, in every mode."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import segment_durable as analytics_module
from segment_durable import Client, ConfigError, OutboxFull, OutboxUnavailable, SourceMismatch, process, sender, worker
from segment_durable.clock import SystemClock
from segment_durable.errors import StorageError
from segment_durable.message import compose, encode_message
from segment_durable.outbox import Outbox
from segment_durable.records import NO_EVENTS
from segment_durable.testing import Answer, Delay, Hang, OAuthApp, Receiver

MakeClient = Callable[..., Client]


def names(receiver: Receiver) -> list[Any]:
    return [event.get("event") for event in receiver.unique]


def sender_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("segment-durable")]


def test_events_arrive_once_in_order_and_leave_the_outbox(make_client: MakeClient, receiver: Receiver) -> None:
    client = make_client()
    for i in range(250):
        assert client.track("u", str(i))[0] is True
    assert client.flush(10) is True
    stats = client.stats()
    assert (stats.accepted, stats.delivered, stats.pending) == (250, 250, 0)
    assert names(receiver) == [str(i) for i in range(250)]
    assert receiver.duplicates == 0


def test_a_batch_goes_out_without_a_flush_after_upload_interval(make_client: MakeClient, receiver: Receiver) -> None:
    client = make_client(upload_interval=0.01)
    client.track("u", "alone")
    assert receiver.wait_for(1, timeout=5)


def test_a_client_that_only_delivers_is_started_by_a_flush(make_client: MakeClient, receiver: Receiver) -> None:
    deliverer = make_client(upload_interval=0.01)
    assert deliverer.flush() is True
    make_client(deliver=False, upload_interval=0.01).track("u", "of another")
    assert receiver.wait_for(1, timeout=10)


def test_an_idle_sender_is_woken_by_the_first_event(
    make_client: MakeClient, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does not go on waiting for its next look at the outbox."""
    monkeypatch.setattr(worker, "_LOOK", 3600.0)
    client = make_client(upload_interval=0.01)
    for number in range(1, 6):
        client.track("u", "e")
        assert receiver.wait_for(number)


def test_what_others_take_meanwhile_does_not_count_for_a_batch(
    make_client: MakeClient, receiver: Receiver, tmp_path: Path
) -> None:
    client = make_client(upload_interval=3600, upload_size=10)
    other = Outbox(tmp_path / "outbox", SystemClock())
    for number in range(12):
        client.track("u", str(number))
        if number == 5:
            assert other.erase([1, 2, 3, 4, 5]) == 5  # by a lease the sender would be made to look
    # A batch of what is left would come at once: nothing else is to be waited for.
    assert not receiver.wait_for(1, timeout=0.3)
    for number in range(12, 15):
        client.track("u", str(number))
    assert receiver.wait_for(10)
    assert [len(batch.events) for batch in receiver.batches] == [10]
    other.close()


def test_no_look_at_the_outbox_is_needed_to_know_that_the_next_batch_is_full(
    make_client: MakeClient, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[tuple[int, int, int]] = []
    real = Outbox.load

    def load(self: Outbox) -> tuple[int, int, int]:
        looks.append(real(self))
        return looks[-1]

    def on_success(items: list[dict[str, Any]]) -> None:  # in the sender's thread
        looked.append(len(looks))
        for number in range(10 if len(looked) < 5 else 0):
            client.track("u", str(number))

    looked: list[int] = []
    monkeypatch.setattr(Outbox, "load", load)
    client = make_client(upload_interval=3600, upload_size=10, on_success=on_success)
    for number in range(10):
        client.track("u", str(number))
    assert receiver.wait_for(50)
    client.shutdown(10)
    assert [len(batch.events) for batch in receiver.batches] == [10] * 5
    assert looked == [looked[0]] * 5


def test_what_other_processes_append_is_found_while_a_batch_fills(
    make_client: MakeClient, receiver: Receiver, tmp_path: Path
) -> None:
    """Also where this process believes to know how many events wait."""
    other = Outbox(tmp_path / "outbox", SystemClock())

    def on_success(items: list[dict[str, Any]]) -> None:
        if items[0]["event"] == "0":
            client.track("u", "one of the next ten")
            for _ in range(9):
                message = compose("track", ("e", None), "u", None, None, None, None, None, 1.0)
                assert other.put(encode_message(message), 1000)

    client = make_client(upload_interval=3600, upload_size=10, on_success=on_success)
    for number in range(10):
        client.track("u", str(number))
    assert receiver.wait_for(20, timeout=10)
    other.close()


def test_a_full_batch_does_not_wait_for_upload_interval(make_client: MakeClient, receiver: Receiver) -> None:
    client = make_client(upload_interval=3600, upload_size=10)
    for i in range(20):
        client.track("u", str(i))
    assert receiver.wait_for(20, timeout=5)
    assert {len(batch.events) for batch in receiver.batches} == {10}


def test_what_an_earlier_process_left_goes_out_when_a_client_is_made(
    make_client: MakeClient, receiver: Receiver
) -> None:
    earlier = make_client(deliver=False)
    earlier.track("u", "left behind")
    earlier.shutdown()
    assert receiver.requests == ()
    make_client()
    assert receiver.wait_for(1, timeout=5)


def test_a_full_outbox_refuses_and_says_so_once_a_second(
    make_client: MakeClient, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class HandSet(SystemClock):
        now = 100.0

        def boot(self) -> float:
            return self.now

    clock = HandSet()
    monkeypatch.setattr(process, "SystemClock", lambda: clock)
    errors: list[tuple[Exception, list[Any]]] = []
    client = make_client(max_queue_size=3, deliver=False, on_error=lambda error, items: errors.append((error, items)))
    assert [client.track("u", str(i))[0] for i in range(1000)] == [True] * 3 + [False] * 997
    assert len([record for record in caplog.records if "full" in record.getMessage()]) == 1
    ((error, items),) = errors
    assert isinstance(error, OutboxFull)
    assert error.limit == 3
    assert [item["event"] for item in items] == ["3"]
    clock.now += 1.5
    client.track("u", "later")
    assert len(errors) == 2
    assert isinstance(errors[1][0], OutboxFull)
    assert errors[1][0].refused == 997
    assert client.stats().pending == 3


def test_max_queue_size_0_means_no_limit(make_client: MakeClient) -> None:
    client = make_client(max_queue_size=0, deliver=False)
    assert all(client.track("u", str(i))[0] for i in range(50))


def test_a_raising_callback_changes_nothing(
    make_client: MakeClient, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    def boom(*_: Any) -> None:
        raise RuntimeError("of the user's own")

    client = make_client(on_error=boom, on_success=boom, max_retries=0)
    receiver.script(Answer(503))
    client.track("u", "one")
    client.flush(10)
    assert client.flush(10) is True
    client.track("u", "two")
    assert client.flush(10) is True
    assert names(receiver) == ["one", "two"]
    assert "on_error raised" in caplog.text
    assert "on_success raised" in caplog.text


def test_a_callback_may_call_the_client_again(make_client: MakeClient, receiver: Receiver) -> None:
    def on_success(items: list[dict[str, Any]]) -> None:
        for item in items:
            if item["event"] == "first":
                client.track("u", "second")
                client.stats()

    client = make_client(on_success=on_success, upload_interval=0)
    client.track("u", "first")
    assert receiver.wait_for(2, timeout=5)
    assert names(receiver) == ["first", "second"]


def test_before_send_may_change_or_drop_a_copy(make_client: MakeClient, receiver: Receiver) -> None:
    properties = {"password": "secret", "n": 1}

    def before_send(message: dict[str, Any]) -> dict[str, Any] | None:
        if message["event"] == "drop":
            return None
        del message["properties"]["password"]
        return message

    client = make_client(before_send=before_send)
    assert client.track("u", "keep", properties)[0] is True
    assert client.track("u", "drop", properties)[0] is False
    client.flush(10)
    assert properties == {"password": "secret", "n": 1}
    assert [event["properties"] for event in receiver.events] == [{"n": 1}]


@pytest.mark.parametrize("problem", [RuntimeError, SystemExit])
def test_before_send_that_raises_leaves_the_message_as_it_was(
    make_client: MakeClient, receiver: Receiver, problem: type[BaseException]
) -> None:
    def before_send(message: dict[str, Any]) -> dict[str, Any] | None:
        message.clear()
        raise problem

    client = make_client(before_send=before_send)
    assert client.track("u", "e", {"a": 1})[0] is True
    client.flush(10)
    assert receiver.events[0]["properties"] == {"a": 1}


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("made", [True, False, 5, [], "text", object()], ids=lambda made: type(made).__name__)
def test_before_send_that_returns_no_message_leaves_it_as_it_was(
    make_client: MakeClient, receiver: Receiver, caplog: pytest.LogCaptureFixture, made: Any, debug: bool
) -> None:
    client = make_client(before_send=lambda message: made, debug=debug)
    assert client.track("u", "e", {"a": 1})[0] is True
    assert client.flush(10) is True
    assert receiver.events[0]["properties"] == {"a": 1}
    assert f"before_send must return a dict or None, not {type(made).__name__}" in caplog.text


@pytest.mark.parametrize("debug", [False, True])
def test_before_send_may_take_anything_out_of_the_message(make_client: MakeClient, debug: bool) -> None:
    client = make_client(before_send=lambda message: {}, deliver=False, debug=debug)
    assert client.track("u", "e") == (True, {})


def test_upload_size_may_be_anything_above_0(make_client: MakeClient, receiver: Receiver) -> None:
    client = make_client(upload_size=2**62 - 1)
    client.track("u", "e")
    assert client.flush(10) is True
    assert names(receiver) == ["e"]


# -- flush, join, shutdown

MODES: list[dict[str, Any]] = [{}, {"send": False}, {"deliver": False}, {"sync_mode": True}, {"thread": 3}]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("order", list(itertools.permutations(["flush", "join", "shutdown"])), ids="-".join)
def test_flush_join_and_shutdown_twice_in_any_order(
    make_client: MakeClient, receiver: Receiver, mode: dict[str, Any], order: tuple[str, ...]
) -> None:
    client = make_client(**mode)
    for name in (*order, *order):
        assert client.track("u", name)[0] is True
        for _ in range(2):
            assert getattr(client, name)() in (None, True, False)
    expected = [] if mode.get("send") is False or mode.get("deliver") is False else list(order) * 2
    if expected:
        assert client.flush(10) is True
    assert [event["event"] for event in receiver.unique] == expected
    client.shutdown()
    assert sender_threads() == []


@pytest.mark.parametrize("timeout", ["1", float("nan"), [1]])
def test_a_timeout_that_is_no_number_is_named(make_client: MakeClient, timeout: Any) -> None:
    client = make_client()
    for method in (client.flush, client.shutdown):
        with pytest.raises(ConfigError, match="timeout must be a number of seconds or None"):
            method(timeout)


@pytest.mark.parametrize("timeout", [float("inf"), 1e10, 1e308, 10**30, 10**400], ids=lambda timeout: str(timeout)[:6])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_timeout_beyond_what_clocks_take_is_a_long_one(
    make_client: MakeClient, receiver: Receiver, mode: dict[str, Any], timeout: Any
) -> None:
    client = make_client(**mode)
    client.track("u", "e")
    if mode.get("deliver") is False:
        make_client().flush(10)
    assert client.flush(timeout) is True
    client.track("u", "e")
    if mode.get("deliver") is False:
        make_client().flush(10)
    assert client.shutdown(timeout) is True


@pytest.mark.parametrize("timeout", [-1, -0.5, float("-inf"), -(10**400)], ids=lambda timeout: str(timeout)[:6])
def test_a_timeout_below_0_is_0(make_client: MakeClient, timeout: Any) -> None:
    client = make_client(upload_interval=3600)
    assert client.flush(timeout) is True
    client.track("u", "e")
    assert client.flush(timeout) is False
    assert client.shutdown(timeout) is False


def test_a_flush_that_waits_for_nothing_makes_nobody_send(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is being sent when a process ends has to be sent again."""
    hurried: list[int] = []
    monkeypatch.setattr(worker.Worker, "hurry_to", lambda self, target: hurried.append(target))
    client = make_client(upload_interval=3600)
    client.track("u", "e")
    assert client.flush(0) is False
    assert client.shutdown(0) is False
    assert hurried == []


def test_a_flush_that_waits_for_nothing_starts_nobody(make_client: MakeClient) -> None:
    client, other = make_client(upload_interval=3600), make_client(deliver=False)
    other.track("u", "e")
    assert client.flush(0) is False
    assert [thread for thread in sender_threads() if "sender" in thread.name] == []


def test_a_client_is_a_context_manager_that_flushes(make_client: MakeClient, receiver: Receiver) -> None:
    with make_client() as client:
        client.track("u", "e")
    assert names(receiver) == ["e"]
    assert sender_threads() == []


def test_flush_times_out_while_the_receiver_hangs_and_loses_nothing(
    make_client: MakeClient, receiver: Receiver
) -> None:
    receiver.script(Hang())
    client = make_client()
    client.track("u", "e")
    started = time.monotonic()
    assert client.flush(0.2) is False
    assert 0.1 < time.monotonic() - started < 5
    assert client.stats().pending == 1
    receiver.release()
    assert client.flush(10) is True
    assert names(receiver) == ["e"]


def test_a_client_is_made_although_the_outbox_can_not_be_read_at_that_moment(
    make_client: MakeClient, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_id(self: Outbox, *arguments: float) -> int | None:
        raise StorageError("disk I/O error", "SQLITE_IOERR")

    before = make_client(deliver=False)
    before.track("u", "left")
    before.shutdown(0)
    with monkeypatch.context() as patch:
        patch.setattr(Outbox, "first_id", first_id)
        make_client()
    assert receiver.wait_for(1, timeout=20)


@pytest.mark.parametrize("thread", [1, 3])
def test_flush_looks_at_the_outbox_when_all_may_have_left_and_not_after_each_batch(
    make_client: MakeClient, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, thread: int
) -> None:
    monkeypatch.setattr(sender, "_FLUSH_LOOK", 3600.0)  # not even that often
    before = make_client(deliver=False)
    for number in range(600):
        assert before.track("u", f"e{number}")[0]
    before.shutdown(0)
    looks: list[int | None] = []
    real = Outbox.first_id

    def first_id(self: Outbox, *arguments: float) -> int | None:
        looks.append(real(self, *arguments))
        return looks[-1]

    monkeypatch.setattr(Outbox, "first_id", first_id)
    client = make_client(thread=thread, upload_size=10)
    assert client.flush(30) is True
    assert len(receiver.events) == 600
    assert len(looks) < 20


def test_flush_gives_up_when_the_retry_budget_is_used_up(make_client: MakeClient, receiver: Receiver) -> None:
    errors: list[Any] = []
    receiver.always(Answer(503, body={"code": "down", "message": "for now"}))
    client = make_client(max_retries=1, on_error=lambda error, items: errors.append((error.status, items)))
    client.track("u", "e")
    assert client.flush() is False
    assert [(status, [item["event"] for item in items]) for status, items in errors] == [(503, ["e"])]
    assert client.stats().pending == 1
    assert "down" in client.stats().last_error
    receiver.always(None)
    assert client.flush() is True
    assert names(receiver) == ["e"]
    assert client.stats().failures == 0


def test_shutdown_leaves_on_disk_what_does_not_go_in_time(
    make_client: MakeClient, receiver: Receiver, tmp_path: Path
) -> None:
    receiver.always(Hang())
    client = make_client()
    client.track("u", "e")
    assert client.shutdown(0.1) is False
    receiver.always(None)
    receiver.release()
    other = make_client()
    assert other.flush(10) is True
    assert names(receiver) == ["e"]


def test_a_call_after_shutdown_opens_everything_again(make_client: MakeClient, receiver: Receiver) -> None:
    client = make_client()
    client.shutdown()
    assert client.track("u", "after")[0] is True
    assert client.flush(10) is True
    assert names(receiver) == ["after"]


def test_starting_and_stopping_from_many_threads_at_once_loses_nothing(
    make_client: MakeClient, receiver: Receiver
) -> None:
    client = make_client(upload_interval=0)
    failures: list[Any] = []

    def work(name: str) -> None:
        for i in range(40):
            if not client.track(name, str(i))[0]:
                failures.append((name, i))
            if i % 7 == 0:
                client.shutdown(0.05)
            if i % 5 == 0:
                client.join()
            if i % 3 == 0:
                client.flush(0.05)

    threads = [threading.Thread(target=work, args=(f"t{n}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert failures == []
    assert client.flush(20) is True
    for n in range(6):
        mine = [event["event"] for event in receiver.unique if event["userId"] == f"t{n}"]
        assert mine == [str(i) for i in range(40)]
    assert client.stats().balanced


# -- sync_mode, deliver=False


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside a client with a sender"])
def test_in_sync_mode_on_error_is_told_of_each_attempt_that_failed(
    make_client: MakeClient, receiver: Receiver, alone: bool
) -> None:
    receiver.always(Answer(503))
    told: list[tuple[Exception, list[str]]] = []
    if not alone:
        make_client(upload_interval=3600)
    client = make_client(
        sync_mode=True, on_error=lambda error, items: told.append((error, [each["event"] for each in items]))
    )
    for number in range(3):
        assert client.track("u", str(number))[0]
    assert [items for _, items in told] == [["0"]] * 3  # the same batch is tried again
    assert {str(error) for error, _ in told} == {"[Segment] unknown: status 503 (503)"}


def test_a_process_that_is_restarted_logs_that_the_receiver_still_refuses(
    make_client: MakeClient, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    """Though `on_error` is called once for it: silence would be taken for success."""
    receiver.always(Answer(401))
    told: list[Exception] = []
    for _ in range(2):
        caplog.clear()
        client = make_client(on_error=lambda error, items: told.append(error), upload_interval=0)
        client.track("u", "e")
        assert not client.flush()
        assert not client.flush()
        (record,) = [each for each in caplog.records if each.levelno >= logging.WARNING]
        assert record.getMessage().endswith("tried on: [Segment] unknown: status 401 (401)")
        client.shutdown(0)
    assert len(told) == 1


def test_sync_mode_has_no_sender_and_keeps_what_fails(make_client: MakeClient, receiver: Receiver) -> None:
    errors: list[Exception] = []
    client = make_client(sync_mode=True, max_retries=0, on_error=lambda error, items: errors.append(error))
    receiver.stop()
    assert client.track("u", "one")[0] is True
    assert len(errors) == 1
    assert client.stats().pending == 1
    receiver.start()
    assert client.track("u", "two")[0] is True
    assert names(receiver) == ["one", "two"]
    assert client.stats().pending == 0
    assert [thread for thread in sender_threads() if "sender" in thread.name] == []


def test_deliver_false_appends_for_another_process(make_client: MakeClient, receiver: Receiver) -> None:
    client = make_client(deliver=False)
    client.track("u", "e")
    assert client.flush() is False
    assert client.flush(0.05) is False
    assert [thread for thread in sender_threads() if "sender" in thread.name] == []
    assert receiver.requests == ()
    make_client()
    assert client.flush(10) is True


# -- several clients


def test_clients_on_one_outbox_share_its_sender(make_client: MakeClient, receiver: Receiver) -> None:
    one, two = make_client(), make_client()
    one.track("u", "1")
    two.track("u", "2")
    assert len([thread for thread in sender_threads() if "sender" in thread.name]) == 1
    one.shutdown()
    assert two.track("u", "3")[0] is True
    assert two.flush(10) is True
    assert names(receiver) == ["1", "2", "3"]


def test_clients_with_different_hosts_cannot_share_an_outbox(make_client: MakeClient) -> None:
    make_client()
    with pytest.raises(ConfigError, match="host differs"):
        make_client(host="http://127.0.0.1:9")


def test_another_write_key_is_refused(make_client: MakeClient, tmp_path: Path) -> None:
    make_client("one-key").shutdown()
    with pytest.raises(SourceMismatch, match="outbox_dir") as caught:
        make_client("other-key")
    assert "one-key" not in str(caught.value)
    assert "other-key" not in str(caught.value)


@pytest.mark.parametrize("deliver", [True, False])
def test_another_write_key_is_refused_beside_a_client_that_is_open(make_client: MakeClient, deliver: bool) -> None:
    """Its events would go out under the key of that one."""
    make_client("one-key", deliver=deliver)
    with pytest.raises(SourceMismatch, match="outbox_dir"):
        make_client("other-key", deliver=not deliver)


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_client_stays_in_its_folder_when_the_current_one_changes(
    make_client: MakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """As a daemon's does."""
    monkeypatch.chdir(tmp_path)
    if by == "environment":
        monkeypatch.setenv("SEGMENT_DURABLE_DIR", "box")
    client = make_client(outbox_dir="box" if by == "argument" else None, deliver=False)
    assert client.track("u", "before")[0]
    client.shutdown()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.delenv("SEGMENT_DURABLE_DIR", raising=False)
    assert client.track("u", "after")[0]
    assert client.stats().pending == 2


def test_without_a_current_folder_the_error_names_the_remedy(
    make_client: MakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone() -> str:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "getcwd", gone)
    with pytest.raises(OutboxUnavailable, match="set outbox_dir to an absolute path"):
        make_client(outbox_dir="box")


def test_a_key_file_is_read_once(make_client: MakeClient, tmp_path: Path) -> None:
    """A worker that runs as another user can't read it after the fork."""
    app, pem = OAuthApp.generate()
    path = tmp_path / "key.pem"
    path.write_text(pem)
    with Receiver(oauth=app) as receiver:
        oauth = {"oauth_client_id": "test-app", "oauth_key_id": "test-key", "oauth_auth_server": receiver.url}
        first = make_client(host=receiver.url, oauth_client_key=path, **oauth)
        second = make_client(host=receiver.url, oauth_client_key=path, **oauth)  # shares what the first has opened
        path.unlink()
        first.shutdown()
        second.shutdown()
        for number, client in enumerate((second, first)):  # and now it is the other one that opens it
            assert client.track("u", str(number))[0]
            assert client.flush(10) is True
            client.shutdown()
        assert names(receiver) == ["0", "1"]


def test_a_call_does_not_raise_though_another_client_has_opened_the_outbox_otherwise_meanwhile(
    make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    errors: list[Exception] = []
    first = make_client(deliver=False, on_error=lambda error, items: errors.append(error))
    first.shutdown()
    second = make_client(deliver=False, host="https://another.example")
    assert first.track("u", "e")[0] is False
    assert first.flush(1) is False
    assert isinstance(errors[0], ConfigError)
    assert "host" in caplog.text
    second.shutdown()
    assert first.track("u", "e")[0] is True


def test_the_last_events_that_were_refused_are_told_at_the_end(
    make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    """The first one is told at once, and then there are too many to tell of each."""
    errors: list[Exception] = []
    client = make_client(deliver=False, max_queue_size=2, on_error=lambda error, items: errors.append(error))
    assert [client.track("u", "e")[0] for _ in range(10)] == [True, True, *[False] * 8]
    client.shutdown()
    assert [error.refused for error in errors if isinstance(error, OutboxFull)] == [1, 7]
    told = [record.getMessage() for record in caplog.records if "is full" in record.getMessage()]
    assert [line.rsplit(" ", 1)[1] for line in told] == ["1", "7"]


def test_a_client_for_each_source(make_client: MakeClient, receiver: Receiver, tmp_path: Path) -> None:
    clients = [make_client(f"key-{n}", outbox_dir=tmp_path / str(n)) for n in range(3)]
    for n, client in enumerate(clients):
        client.track("u", str(n))
    for client in clients:
        assert client.flush(10) is True
    keys = {batch.headers["authorization"] for batch in receiver.batches}
    assert len(keys) == 3


def test_many_clients_leave_no_threads_and_no_handlers(make_client: MakeClient) -> None:
    handlers = list(logging.getLogger("segment").handlers)
    for _ in range(20):
        client = make_client(debug=True)
        client.track("u", "e")
        client.shutdown()
    assert sender_threads() == []
    assert logging.getLogger("segment").handlers == handlers


# -- trouble with the disk


def test_a_call_never_raises_for_the_disk(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    errors: list[Exception] = []
    client = make_client(deliver=False, on_error=lambda error, items: errors.append(error))
    assert client.track("u", "fine")[0] is True

    def broken(self: Outbox, *_: Any) -> bool:
        raise analytics_module.StorageError("the outbox can't be used: disk I/O error", "SQLITE_IOERR")

    with monkeypatch.context() as patch:
        patch.setattr(Outbox, "put", broken)
        for _ in range(100):
            assert client.track("u", "not fine")[0] is False
    assert len(errors) == 1
    assert len([record for record in caplog.records if "can't be written" in record.getMessage()]) == 1
    assert client.track("u", "fine again")[0] is True
    assert client.stats().pending == 2


def test_a_callback_that_flushes_or_shuts_down_does_not_wait_for_itself(
    make_client: MakeClient, receiver: Receiver
) -> None:
    results: list[bool] = []

    def on_success(items: list[dict[str, Any]]) -> None:
        client.track("u", "later")
        results.append(client.flush())
        client.shutdown()

    client = make_client(on_success=on_success, upload_interval=0, upload_size=1)
    client.track("u", "first")
    assert receiver.wait_for(1, timeout=5)
    for thread in sender_threads():
        thread.join(10)
    assert results[:1] == [False]
    assert client.stats().balanced


def test_that_a_flush_can_not_read_the_outbox_is_logged_once_with_a_count(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = make_client(deliver=False)
    client.track("u", "e")

    def fail(*_: object) -> int:
        raise StorageError("the outbox is in use by another thread", "SQLITE_BUSY")

    monkeypatch.setattr(Outbox, "last_id", fail)
    assert [client.flush(0) for _ in range(3)] == [False] * 3
    assert caplog.messages == ["flush (1 times): the outbox is in use by another thread"]


def wait_until(condition: Callable[[], bool]) -> None:
    """There is no signal for what a thread of the package has seen."""
    patience = threading.Event()
    for _ in range(1_500):
        if condition():
            return
        patience.wait(0.02)
    raise AssertionError("waited for 30 s")


@pytest.mark.parametrize("what", ["folder", "lock file", "all files"])
def test_an_outbox_that_is_deleted_while_it_is_used_is_made_anew_with_what_was_waiting(
    make_client: MakeClient, tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Exception] = []
    folder = tmp_path / "outbox"
    client = make_client(deliver=False, on_error=lambda problem, _: told.append(problem))
    for number in range(1_200):
        assert client.track("u", str(number))[0]
    if what == "folder":
        shutil.rmtree(folder)
    else:
        for name in ["outbox.lock"] if what == "lock file" else os.listdir(folder):
            (folder / name).unlink()
    sent = ["afterwards"]
    assert client.track("u", "afterwards")[0]  # into the file that nobody can open
    wait_until(lambda: bool(told))
    sent.append("later")
    assert client.track("u", "later")[0]
    client.shutdown(0)
    assert [type(each) for each in told] == [OutboxUnavailable]
    assert "was deleted or renamed while it was in use" in str(told[0])
    assert caplog.text.count("was deleted or renamed while it was in use") == 1
    with contextlib.closing(Outbox(folder, SystemClock())) as outbox:
        waiting = [json.loads(row.body)["event"] for row in outbox.rows(0, 1 << 60)]
        assert outbox.stats().balanced
    assert sorted(waiting) == sorted([*map(str, range(1_200)), *sent])


def test_clients_of_a_deleted_outbox_go_on_delivering_without_a_call(
    make_client: MakeClient, receiver: Receiver, tmp_path: Path
) -> None:
    told: list[Exception] = []
    client = make_client(upload_interval=600, on_error=lambda problem, _: told.append(problem))
    assert client.track("u", "before")[0]
    shutil.rmtree(tmp_path / "outbox")
    assert client.track("u", "afterwards")[0]
    wait_until(lambda: bool(told))
    assert client.flush(10)
    assert receiver.wait_for(lambda receiver: {"before", "afterwards"} <= set(names(receiver)))
    assert client.stats().pending == 0


@pytest.fixture
def switch(tmp_path: Path) -> Callable[[], None]:
    """Has the symbolic link `current`, which leads to a folder of the same user's, lead to another one."""
    for release in ("old", "new"):
        (tmp_path / release).mkdir(0o700)
    (tmp_path / "current").symlink_to("old", target_is_directory=True)
    (tmp_path / "next").symlink_to("new", target_is_directory=True)
    return lambda: os.replace(tmp_path / "next", tmp_path / "current")


def waiting_events(folder: Path) -> list[str]:
    with contextlib.closing(Outbox(folder, SystemClock())) as outbox:
        return [json.loads(row.body)["event"] for row in outbox.rows(0, 1 << 60)]


@pytest.mark.parametrize("also_another", [False, True])
def test_clients_of_an_outbox_whose_path_leads_elsewhere_go_on_there_with_one_engine(
    make_client: MakeClient, tmp_path: Path, switch: Callable[[], None], also_another: bool
) -> None:
    """As where each release of a program has a folder, and a symbolic link leads to that of now."""
    told: list[str] = []
    path = tmp_path / "current" / "outbox"
    client = make_client(deliver=False, outbox_dir=path, on_error=lambda *_: told.append("first"))
    second = make_client(deliver=False, outbox_dir=path, on_error=lambda *_: told.append("second"))
    assert client.track("u", "before")[0]
    other = make_client(deliver=False, outbox_dir=tmp_path / "new" / "outbox") if also_another else None
    switch()
    assert client.track("u", "afterwards")[0]
    wait_until(lambda: sorted(told) == ["first", "second"])
    (engine,) = process._engines.values()
    assert engine.key == str(tmp_path / "new" / "outbox")
    assert client.track("u", "later")[0]
    assert list(process._engines.values()) == [engine]
    client.shutdown(0)
    second.shutdown(0)
    if other is not None:
        assert other.stats().pending == 3
        other.shutdown(0)
    assert not process._engines
    assert sorted(waiting_events(tmp_path / "new" / "outbox")) == ["afterwards", "before", "later"]


@pytest.mark.parametrize("collected", [False, True])
def test_events_of_an_outbox_whose_path_leads_to_that_of_another_host_now_stay_where_they_are(
    receiver: Receiver, make_client: MakeClient, tmp_path: Path, switch: Callable[[], None], collected: bool
) -> None:
    told: list[Exception] = []
    client: Client | None = Client(
        "test-key",
        receiver.url,
        deliver=False,
        outbox_dir=tmp_path / "current" / "outbox",
        on_error=lambda problem, _: told.append(problem),
    )
    assert client is not None
    other = make_client(deliver=False, outbox_dir=tmp_path / "new" / "outbox", host="http://127.0.0.1:9")
    switch()
    assert client.track("u", "waits")[0]
    if collected:
        client = None
        gc.collect()
    wait_until(lambda: bool(told))
    assert isinstance(told[0], ConfigError)
    assert told[0].field == "host"
    assert other.stats().pending == 0
    assert waiting_events(tmp_path / "old" / "outbox") == ["waits"]


@pytest.mark.parametrize("is_exit", [False, True])
@pytest.mark.parametrize("is_empty", [False, True])
def test_a_shutdown_in_the_middle_of_which_the_path_leads_elsewhere_ends_the_engine_there(
    make_client: MakeClient,
    tmp_path: Path,
    switch: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_empty: bool,
    is_exit: bool,
) -> None:
    """And does not take for delivered what was moved: the old outbox may be found empty."""
    told: list[Exception] = []
    client = make_client(
        host="http://127.0.0.1:9",
        outbox_dir=tmp_path / "current" / "outbox",
        on_error=lambda problem, _: told.append(problem),
        max_retries=1000,
        shutdown_timeout=0.1,
    )
    assert client._engine is not None
    first, flush = client._engine.sender, sender.Sender.flush

    def flush_while_it_is_moved(self: sender.Sender, timeout: float | None = None) -> bool:
        if self is not first:
            return flush(self, timeout)
        wait_until(lambda: bool(told))
        return is_empty

    monkeypatch.setattr(sender.Sender, "flush", flush_while_it_is_moved)
    assert client.track("u", "e")[0]
    switch()
    if is_exit:
        process._at_exit()
        assert "events that stay on disk, for the next process that delivers: 1" in caplog.text
    else:
        assert client.shutdown(0.1) is False
    assert [type(each) for each in told] == [OutboxUnavailable]
    assert not process._engines
    assert waiting_events(tmp_path / "new" / "outbox") == ["e"]


def test_a_flush_in_the_middle_of_which_the_path_leads_elsewhere_has_the_time_that_is_left(
    make_client: MakeClient, tmp_path: Path, switch: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Exception] = []
    times: list[float] = []
    client = make_client(outbox_dir=tmp_path / "current" / "outbox", on_error=lambda problem, _: told.append(problem))

    def flush(self: sender.Sender, timeout: float) -> bool:
        times.append(timeout)
        wait_until(lambda: bool(told))
        return True

    monkeypatch.setattr(sender.Sender, "flush", flush)
    switch()
    assert client.track("u", "e")[0]
    assert client.flush(60)
    first, second = times
    assert 0 < second < first == 60


def test_join_ends_the_sender_of_where_the_path_leads_now(
    make_client: MakeClient, tmp_path: Path, switch: Callable[[], None]
) -> None:
    told: list[Exception] = []
    client = make_client(
        outbox_dir=tmp_path / "current" / "outbox",
        upload_interval=600,
        on_error=lambda problem, _: told.append(problem),
    )
    switch()
    assert client.track("u", "e")[0]
    wait_until(lambda: bool(told))
    (engine,) = process._engines.values()
    wait_until(lambda: engine.sender.is_running)
    client.join()
    assert not engine.sender.is_running


def test_a_log_handler_that_makes_a_client_waits_for_nobody_who_logs(make_client: MakeClient, tmp_path: Path) -> None:
    """It has a lock of its own, which who logs waits for."""
    in_handler, is_logging = threading.Event(), threading.Event()
    made: list[Client] = []

    class ToSegment(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name == "app":
                in_handler.set()
                is_logging.wait(1)  # nobody can log while this thread has the lock: the other one is about to
                made.append(make_client(deliver=False, outbox_dir=tmp_path / "logs"))

        def filter(self, record: logging.LogRecord) -> bool:
            if record.name != "app":
                is_logging.set()
            return True

    make_client(deliver=False)
    handler = ToSegment()
    logging.getLogger().addHandler(handler)
    try:
        app = threading.Thread(target=logging.getLogger("app").error, args=("of the app",), daemon=True)
        app.start()
        assert in_handler.wait(10)
        other = threading.Thread(target=lambda: made.append(make_client(deliver=False, gzip=True)), daemon=True)
        other.start()
        app.join(20)
        other.join(20)
    finally:
        logging.getLogger().removeHandler(handler)
    assert len(made) == 2


def test_an_outbox_that_is_found_to_be_elsewhere_just_after_the_shutdown_leaves_no_engine_behind(
    make_client: MakeClient, tmp_path: Path, switch: Callable[[], None]
) -> None:
    client = make_client(deliver=False, outbox_dir=tmp_path / "current" / "outbox")
    engine = client._engine
    assert engine is not None
    switch()
    client.shutdown(0)
    process._replace(engine)  # by its upkeep, which has waited for the shutdown to let go of the lock
    assert not process._engines


def test_what_can_be_moved_only_after_the_shutdown_leaves_no_engine_behind(
    make_client: MakeClient, tmp_path: Path, switch: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Exception] = []
    move_to, has_space = Outbox.move_to, threading.Event()

    def move(self: Outbox, other: Outbox, on_end: Callable[[], None]) -> int:
        if not has_space.is_set():
            raise StorageError("the outbox can't be used: database or disk is full", "SQLITE_FULL")
        return move_to(self, other, on_end)

    monkeypatch.setattr(Outbox, "move_to", move)
    client = make_client(
        deliver=False,
        outbox_dir=tmp_path / "current" / "outbox",
        on_error=lambda problem, _: told.append(problem),
    )
    assert client.track("u", "e")[0]
    engine = client._live()
    switch()
    wait_until(lambda: bool(told))
    assert engine.closed, "new events go where the path leads"
    client.shutdown(0)
    has_space.set()
    wait_until(lambda: any(isinstance(each, OutboxUnavailable) for each in told))
    wait_until(lambda: not process._engines)
    assert waiting_events(tmp_path / "new" / "outbox") == ["e"]


def move_away(tmp_path: Path, told: list[str], times: int) -> None:
    """Rename the outbox's folder under its process, as often, each time after that was told."""
    for number in range(1, times + 1):
        (tmp_path / "outbox").rename(tmp_path / f"elsewhere-{number}")
        wait_until(lambda number=number: sum("was deleted" in each for each in told) == number)  # type: ignore[misc]


def test_puts_while_an_outbox_that_was_moved_away_is_replaced_are_not_lost(
    make_client: MakeClient, tmp_path: Path
) -> None:
    told: list[str] = []
    client = make_client(
        deliver=False, max_queue_size=0, on_error=lambda problem, _: told.append(str(problem).partition(": ")[2])
    )
    accepted: list[list[str]] = [[] for _ in range(4)]
    end = threading.Event()

    def work(mine: list[str]) -> None:
        while not end.is_set():
            name = f"{id(mine)}-{len(mine)}"
            if client.track("u", name)[0]:
                mine.append(name)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in accepted]
    for thread in threads:
        thread.start()
    move_away(tmp_path, told, 3)
    end.set()
    for thread in threads:
        thread.join(30)
    client.shutdown(0)
    with contextlib.closing(Outbox(tmp_path / "outbox", SystemClock())) as outbox:
        waiting = {json.loads(row.body)["event"] for row in outbox.rows(0, 1 << 60)}
    assert [name for mine in accepted for name in mine if name not in waiting] == []


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Set, what waits may be moved to other files."""
    move_to, may_move = Outbox.move_to, threading.Event()

    def move(self: Outbox, other: Outbox, on_end: Callable[[], None]) -> int:
        assert may_move.wait(30)
        return move_to(self, other, on_end)

    monkeypatch.setattr(Outbox, "move_to", move)
    yield may_move
    may_move.set()


def test_a_flush_waits_for_what_is_just_being_moved(
    make_client: MakeClient, receiver: Receiver, tmp_path: Path, switch: Callable[[], None], moves: threading.Event
) -> None:
    """And does not look at it all the time."""
    client = make_client(outbox_dir=tmp_path / "current" / "outbox", upload_interval=0)
    engine = client._live()
    waits: list[float] = []
    wait = engine.clock.wait
    engine.clock.wait = lambda event, seconds: (waits.append(seconds), wait(event, seconds))[1]  # type: ignore[method-assign]
    switch()
    assert client.track("u", "e")[0]
    wait_until(lambda: engine.successor is not None)
    wait_until(lambda: engine.outbox.pending() == 0)  # it was on its way before
    waits.clear()
    assert client.flush(0) is False
    assert client.flush(0.1) is False
    assert len(waits) < 100
    moves.set()
    assert client.flush(20) is True
    assert names(receiver) == ["e"]


def test_the_exit_waits_for_what_is_just_being_moved(
    make_client: MakeClient,
    tmp_path: Path,
    switch: Callable[[], None],
    moves: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The old files may have been deleted: what is still in there would end with the process."""
    client = make_client(deliver=False, outbox_dir=tmp_path / "current" / "outbox")
    engine = client._live()
    switch()
    assert client.track("u", "e")[0]
    wait_until(lambda: engine.successor is not None)
    wait_until_closed, ends = engine.wait_until_closed, list[float | None]()

    def wait(end: float | None) -> bool:
        ends.append(end)
        moves.set()
        return wait_until_closed(end)

    monkeypatch.setattr(engine, "wait_until_closed", wait)
    now = engine.clock.boot()
    process._at_exit()
    assert ends == [pytest.approx(now + 5.0, abs=4.0)]
    assert waiting_events(tmp_path / "new" / "outbox") == ["e"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_what_the_path_leads_to_after_a_fork_is_not_written_under_the_old_lock(
    make_client: MakeClient, tmp_path: Path, switch: Callable[[], None]
) -> None:
    """The fork closes the files; what is opened then may be others, and belongs to another lock."""
    told: list[Exception] = []
    client = make_client(
        deliver=False,
        outbox_dir=tmp_path / "current" / "outbox",
        on_error=lambda problem, _: told.append(problem),
    )
    assert client.track("u", "before")[0]
    engine = client._live()
    engine.upkeep.stop(10)  # it is not noticed before the fork
    switch()
    make_client(deliver=False, outbox_dir=tmp_path / "new" / "outbox").shutdown(0)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert client.track("u", "after")[0] is False
    assert waiting_events(tmp_path / "new" / "outbox") == []
    assert type(told[0]) is StorageError
    process._replace(engine)
    assert client.track("u", "later")[0]
    assert "without what waited, for a fork came between" in str(told[-1])
    assert waiting_events(tmp_path / "new" / "outbox") == ["later"]


def test_a_damaged_database_has_none_set_aside_that_its_path_leads_to_by_then(
    make_client: MakeClient, tmp_path: Path, switch: Callable[[], None]
) -> None:
    client = make_client(deliver=False, outbox_dir=tmp_path / "current" / "outbox")
    engine = client._live()
    engine.upkeep.stop(10)
    connections = engine.outbox.db.connections
    switch()
    other = make_client(deliver=False, outbox_dir=tmp_path / "new" / "outbox")
    assert other.track("u", "of another")[0]
    with pytest.raises(StorageError, match="were deleted or renamed, or a link in its path was changed"):
        connections.replace(StorageError("damaged", "SQLITE_CORRUPT"), connections.generation)
    assert waiting_events(tmp_path / "new" / "outbox") == ["of another"]
    assert not list((tmp_path / "new" / "outbox").glob("*damaged*"))


def test_an_engine_is_closed_before_its_files_take_no_more(
    make_client: MakeClient, tmp_path: Path, switch: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that came just then would be refused."""
    client = make_client(deliver=False, outbox_dir=tmp_path / "current" / "outbox")
    engine = client._live()
    connections, closed = engine.outbox.db.connections, list[bool]()
    retire = connections.retire

    def retire_it() -> None:
        closed.append(engine.closed)
        retire()

    monkeypatch.setattr(connections, "retire", retire_it)
    switch()
    assert client.track("u", "e")[0]
    wait_until(lambda: bool(closed))
    assert closed == [True]


def test_an_outbox_that_was_moved_away_keeps_the_order_of_a_process(
    make_client: MakeClient, receiver: Receiver, tmp_path: Path
) -> None:
    told: list[str] = []
    client = make_client(
        max_queue_size=0,
        upload_size=20,
        upload_interval=0.02,
        on_error=lambda problem, _: told.append(str(problem).partition(": ")[2]),
    )
    receiver.always(Delay(0.01))
    counts, end = [0, 0], threading.Event()

    def work(mine: int) -> None:
        while not end.wait(0.001):
            counts[mine] += client.track("u", f"{mine}", {"number": counts[mine]})[0]

    threads = [threading.Thread(target=work, args=(mine,)) for mine in range(len(counts))]
    for thread in threads:
        thread.start()
    move_away(tmp_path, told, 4)
    end.set()
    for thread in threads:
        thread.join(30)
    assert client.flush(60)
    for mine, count in enumerate(counts):
        arrived = [each["properties"]["number"] for each in receiver.unique if each["event"] == f"{mine}"]
        assert arrived == [*range(count)]


# -- settings and callbacks of several clients


def test_the_settings_of_a_client_can_be_read_and_not_be_set(make_client: MakeClient) -> None:
    client = make_client(upload_size=7, send=False)
    assert (client.upload_size, client.send, client.write_key) == (7, False, "test-key")  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="send is settled when a client is made"):
        client.send = True  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="'Client' object has no attribute 'queue'"):
        _ = client.queue  # type: ignore[attr-defined]


def test_a_client_that_sends_nothing_has_no_outbox_to_be_asked(make_client: MakeClient, tmp_path: Path) -> None:
    client = make_client(send=False)
    client.track("u", "e")
    assert client.stats() == NO_EVENTS
    assert not (tmp_path / "outbox").exists()


def test_a_client_that_was_collected_binds_nobody_to_its_settings(make_client: MakeClient, tmp_path: Path) -> None:
    Client("test-key", "http://127.0.0.1:9", outbox_dir=tmp_path / "outbox").track("u", "left behind")
    gc.collect()
    (engine,) = process._engines.values()
    with Receiver() as another:
        client = make_client(host=another.url)
        assert engine.closed  # its threads, and its files
        assert client.flush(10) is True
        assert names(another) == ["left behind"]


def test_a_client_that_was_shut_down_is_not_called_any_more(make_client: MakeClient) -> None:
    called: list[str] = []
    first = make_client(on_success=lambda _: called.append("first"))
    second = make_client(on_success=lambda _: called.append("second"))
    second.track("u", "e")
    assert second.flush(10) is True
    assert sorted(called) == ["first", "second"]
    called.clear()
    first.shutdown()
    second.track("u", "e")
    assert second.flush(10) is True
    assert called == ["second"]


def test_the_last_of_two_clients_is_told_what_is_left_to_be_told(make_client: MakeClient) -> None:
    refused = 0

    def on_error(problem: Exception, items: object) -> None:
        nonlocal refused
        assert isinstance(problem, OutboxFull)
        refused += problem.refused

    first = make_client(max_queue_size=1, deliver=False)
    second = make_client(max_queue_size=1, deliver=False, on_error=on_error)
    first.shutdown(0)
    for _ in range(5):
        second.track("u", "e")
    second.shutdown(0)
    assert refused == 4


def test_callbacks_are_called_without_events_that_were_damaged(make_client: MakeClient, tmp_path: Path) -> None:
    """By a bit in a page, of which SQLite notices nothing."""
    told: list[list[dict[str, Any]]] = []
    other = Outbox(tmp_path / "outbox", SystemClock(), write_key="test-key")
    other.put(b'{"messageId":"1\xff"}', 1)
    other.put(b'{"messageId":"2}', 1)
    other.close()
    client = make_client(host="http://127.0.0.1:9", max_retries=0, on_error=lambda _, items: told.append(items))
    assert client.flush(10) is False
    assert told == [[]]


# -- a shutdown while something is on its way


def test_shutdown_called_again_says_what_it_said(make_client: MakeClient) -> None:
    client = make_client(host="http://127.0.0.1:9")
    client.track("u", "e")
    assert client.shutdown(0.1) is False
    assert client.shutdown() is False


@pytest.mark.parametrize("how", ["sync_mode", "join"])
def test_a_shutdown_leaves_the_files_to_whoever_delivers_still(
    make_client: MakeClient, receiver: Receiver, how: str
) -> None:
    """Or the batch would be sent again, with nobody having died."""
    receiver.script(Delay(30))
    client = make_client(sync_mode=how == "sync_mode", upload_interval=0)
    thread = threading.Thread(target=client.track, args=("u", "e"))
    thread.start()
    assert receiver.wait_for(lambda each: len(each.requests) == 1)
    if how == "join":
        thread.join()
        thread = threading.Thread(target=client.join)
        thread.start()
        while client._live().sender._workers:
            threading.Event().wait(0.001)
    client.shutdown(0.01)
    receiver.release()
    thread.join(10)
    again = make_client()
    assert again.flush(10) is True
    assert names(receiver) == ["e"]
    assert receiver.duplicates == 0


def test_a_flush_is_not_ended_by_an_attempt_that_was_under_way(make_client: MakeClient, receiver: Receiver) -> None:
    """It was not made to hurry: after a refusal that is no use to repeat, a flush makes one attempt of its own."""
    receiver.script(Delay(30, Answer(401)))
    client = make_client(upload_interval=0)
    client.track("u", "e")
    assert receiver.wait_for(lambda each: len(each.requests) == 1)
    flushed: list[bool] = []
    thread = threading.Thread(target=lambda: flushed.append(client.flush(20)))
    thread.start()
    while not client._live().sender._workers[0]._flush_to:
        threading.Event().wait(0.001)
    receiver.release()
    thread.join(30)
    assert flushed == [True]
    assert names(receiver) == ["e"]
