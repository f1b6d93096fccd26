"""The threads around the steps: flushed, stopped, ended by callbacks; and deliveries that are given up half-way."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from segment_durable import Client
from segment_durable.clock import SystemClock, Waitable
from segment_durable.delivery import Step
from segment_durable.errors import OutboxBusy, StorageError
from segment_durable.outbox import Outbox
from segment_durable.sender import Sender
from segment_durable.testing import Answer, Receiver
from segment_durable.testing.scripted import Post
from segment_durable.worker import Worker

from .conftest import Bench, numbers_of
from .test_steps import fail_once, throttled

MakeClient = Callable[..., Client]


class LateAnswer:
    """Of a receiver that takes a post, and says so when it is due."""

    def __init__(self) -> None:
        self.is_asked, self.is_due = threading.Event(), threading.Event()

    def __call__(self, _: Post) -> int:
        self.is_asked.set()
        assert self.is_due.wait(10)
        return 200


def test_a_halving_that_rests_goes_on_where_it_was(bench: Bench) -> None:
    """Begun anew at each call it would never end in sync_mode, at a receiver too slow for a halving in one call."""
    bench.put(8)
    sender = bench.sender(lambda post: 400 if 8 in numbers_of(post) else 200)
    assert sender.step().kind == "split"
    sender.delivery.rest()
    assert sender.step().kind == "delivered"
    assert sender.sent == [[*range(1, 9)], [*range(1, 5)]]


def test_a_rest_that_a_signal_handler_ends_keeps_nothing_from_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.configure(upload_size=2)
    bench.put(4)
    sender = bench.sender()
    assert sender.step().kind == "delivered"

    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bench.outbox, "release", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sender.delivery.rest()
    other = bench.sender()
    assert other.step().kind == "delivered"
    assert other.sent == [[3, 4]]


def test_a_batch_after_a_flush_waits_to_be_filled_again(make_client: MakeClient, receiver: Receiver) -> None:
    client = make_client(upload_interval=3600, upload_size=10)
    client.track("u", "flushed")
    assert client.flush(10)
    assert not receiver.wait_for(2, timeout=0.1)  # the sender has seen by now that nothing is left
    for number in range(9):
        client.track("u", str(number))
    assert not receiver.wait_for(2, timeout=0.3)
    client.track("u", "the tenth")
    assert receiver.wait_for(11)
    assert [len(batch.events) for batch in receiver.batches] == [1, 10]


def test_nobody_delivers_inline_once_the_sender_is_closed(bench: Bench) -> None:
    bench.put(1)
    delivery = bench.sender()
    sender = Sender(bench.outbox, bench.config, bench.clock, lambda: delivery.delivery)
    assert sender.close(0.0, lambda: None)
    with pytest.raises(OutboxBusy):
        sender.drain(1, None)
    assert delivery.posts == []


@pytest.mark.parametrize("answer", [None, 503], ids=["nothing to do", "a receiver that is away"])
def test_a_sender_waits_as_a_step_says(bench: Bench, answer: int | None) -> None:
    if answer is not None:
        bench.put(1)
    steps: list[tuple[Step, float]] = []

    def note(step: Step, began: float) -> None:
        steps.append((step, bench.clock.boot()))
        if len(steps) == 12:
            worker.end()

    delivery = bench.sender(lambda _: answer or 200).delivery
    worker = Worker(note, bench.outbox, bench.config, bench.clock, lambda: delivery)
    worker._run()
    assert {step.kind for step, _ in steps} == {"empty" if answer is None else "failed"}
    for (step, at), (_, later) in itertools.pairwise(steps):
        assert later - at >= (0.5 if step.seconds is None else step.seconds)
    assert steps[-1][1] - steps[0][1] > 5


@pytest.mark.parametrize(
    ("pending", "answer", "wakes"),
    [(0, 200, 1), (1, 200, 3), (4, 503, None)],
    ids=["the first", "the one that fills the batch", "none before the next attempt"],
)
def test_which_event_wakes_a_sender_that_waits(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, pending: int, answer: int, wakes: int | None
) -> None:
    bench.configure(upload_size=4, upload_interval=0.2)
    bench.put(pending)

    def respond(_: Post) -> int:
        worker.event.set()  # an event was appended meanwhile
        return answer

    delivery = bench.sender(respond).delivery
    worker = Worker(lambda step, began: None, bench.outbox, bench.config, bench.clock, lambda: delivery)
    waits: list[int | None] = []

    def wait(event: Waitable, seconds: float) -> bool:
        assert not event.is_set()
        waits.append(worker.wake_at if worker.wake_at < 1000 else None)
        worker.end()
        return True

    monkeypatch.setattr(bench.clock, "wait", wait)
    worker._run()
    assert waits == [wakes]


def test_how_full_the_next_batch_is_is_known_from_the_ids_and_it_waits_to_be_full(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.configure(upload_size=4, upload_interval=10)
    bench.put(4)
    delivery = bench.sender().delivery
    looks, waits = [], []

    def note(step: Step, began: float) -> None:
        bench.put(1)
        monkeypatch.setattr(bench.outbox, "load", lambda: looks.append("at the outbox"))

    def wait(event: Waitable, seconds: float) -> bool:
        waits.append(worker.wake_at)
        worker.end()
        return True

    worker = Worker(note, bench.outbox, bench.config, bench.clock, lambda: delivery)
    monkeypatch.setattr(bench.clock, "wait", wait)
    worker._run()
    assert (waits, looks) == ([3], [])


@pytest.mark.parametrize("how", ["drain", "stop"])
def test_who_has_waited_in_vain_for_an_inline_delivery_does_not_end_its_lock(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Greenlets of one thread are one owner to the lock itself."""
    bench.put(1)
    delivery = bench.sender()
    sender = Sender(bench.outbox, bench.config, bench.clock, lambda: delivery.delivery)
    me = [1]
    monkeypatch.setattr("threading.get_ident", lambda: me[0])
    with sender._inline_lock:
        me[0] = 2  # another greenlet's turn
        assert (sender.drain(1, bench.clock.boot()) if how == "drain" else sender.stop(0.0, lambda: None)) is False
        me[0] = 1
        assert sender._inline_lock.is_owned()
    assert delivery.posts == []


def test_to_stop_a_worker_that_has_ended_calls_back_at_once(bench: Bench) -> None:
    worker = Worker(lambda step, began: None, bench.outbox, bench.config, bench.clock, lambda: bench.sender().delivery)
    worker.end()
    assert worker.start()
    worker.join(10)
    calls: list[str] = []
    worker.stop(lambda: calls.append("ended"))
    assert calls == ["ended"]


def test_inline_delivery_waits_for_the_lease_of_others(bench: Bench) -> None:
    bench.configure(upload_size=2)
    bench.put(4)
    other, own = bench.sender(), bench.sender()
    assert other.step().kind == "delivered"
    assert other.delivery.is_under_way
    sender = Sender(bench.outbox, bench.config, bench.clock, lambda: own.delivery)
    assert sender.drain(4, None) is True
    assert own.sent == [[3, 4]]


def test_a_flush_in_a_callback_after_a_join_does_not_wait_for_itself(make_client: MakeClient) -> None:
    before = make_client(deliver=False)
    for number in range(4):
        before.track("u", str(number))
    before.shutdown(0)
    results: list[bool] = []
    done = threading.Event()

    def on_success(items: list[dict[str, Any]]) -> None:
        if not results:
            client.join()
            results.append(client.flush(600))
            done.set()

    client = make_client(on_success=on_success, upload_interval=0, upload_size=1)
    client.flush(10)
    assert done.wait(20)
    assert results == [False]


@pytest.mark.parametrize("problem", [SystemExit, ValueError])
def test_a_callback_that_raises_or_calls_sys_exit_holds_nothing_up(
    make_client: MakeClient, receiver: Receiver, problem: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    def on_success(items: list[dict[str, Any]]) -> None:
        raise problem("of the callback's own")

    client = make_client(on_success=on_success, upload_size=1)
    for number in range(5):
        assert client.track("u", str(number))[0]
    assert client.flush(20) is True
    assert len(receiver.unique) == 5
    assert client.shutdown(20) is True
    assert caplog.text.count("on_success raised; nothing else is changed by that") == 5


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_callback_that_ends_its_thread_at_the_end_leaves_no_files_open(
    make_client: MakeClient, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    called, closed = threading.Event(), threading.Event()

    def on_success(items: list[dict[str, Any]]) -> None:
        called.set()
        raise KeyboardInterrupt

    client = make_client(on_success=on_success, upload_interval=0)
    engine = client._live()
    fail_once(monkeypatch, engine.outbox, "ack")
    close = engine.outbox.close

    def closing(*args: Any) -> None:
        close(*args)
        closed.set()

    monkeypatch.setattr(engine.outbox, "close", closing)
    client.track("u", "e")
    assert receiver.wait_for(1)
    while engine.sender._last_failure[0] == 0.0:  # the ack has failed, and is tried again in a second
        threading.Event().wait(0.001)
    (worker,) = engine.sender._workers
    client.shutdown(0)
    assert called.wait(10)
    assert closed.wait(10)
    worker.join(10)


def test_an_event_that_comes_while_the_outbox_is_found_empty_waits_for_its_batch(
    make_client: MakeClient, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, tracked, looked_again = threading.Event(), threading.Event(), threading.Event()
    load = Outbox.load

    def slowly(self: Outbox) -> tuple[int, int, int]:
        found = load(self)
        if looked.is_set():
            looked_again.set()
        looked.set()
        assert tracked.wait(10)
        return found

    monkeypatch.setattr(Outbox, "load", slowly)
    client = make_client(upload_interval=3600)
    assert client.flush(1)  # starts the thread
    assert looked.wait(10)
    client.track("u", "e")
    tracked.set()
    assert looked_again.wait(10)  # after the step, if there was one
    assert not receiver.requests


def test_what_an_abandoned_delivery_had_leased_is_taken_over_at_once(bench: Bench) -> None:
    put = bench.put(3)
    sender, other = bench.sender([KeyboardInterrupt()]), bench.sender()
    with pytest.raises(KeyboardInterrupt):
        sender.step()
    assert other.step().kind == "leased"
    sender.delivery.abandon()
    assert sender.transport.closed == 1
    assert other.step().kind == "delivered"
    assert other.sent == [put]


def test_a_rest_does_not_give_up_what_failed_before_the_wait_could_be_stored(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.put(3)
    fail_once(monkeypatch, bench.outbox, "fail", times=2)
    sender, other = bench.sender([throttled(60)]), bench.sender()
    with pytest.raises(StorageError):
        sender.step()
    sender.delivery.rest()
    assert other.step().kind == "leased"
    monkeypatch.undo()
    assert sender.step().kind == "failed"
    assert other.step().kind == "backoff"
    assert other.posts == []


def test_a_flush_does_not_wait_for_dead_letters_that_were_full_after_a_rate_limit(bench: Bench) -> None:
    """The wait is ours, and not the receiver's: after a requeue or an erasure a flush is to deliver at once."""
    bench.configure(max_dead_letters=0)
    bench.put(1)
    sender = bench.sender([throttled(1), 400, 200])
    assert sender.step().seconds == 1
    bench.clock.advance(1)
    assert sender.step().seconds == 60
    assert sender.step().kind == "backoff"
    assert sender.step(hurry=True).kind == "delivered"


def test_a_flush_does_not_wait_for_a_rate_limit_that_has_used_up_the_budget(
    make_client: MakeClient, receiver: Receiver
) -> None:
    receiver.always(Answer(429, {"Retry-After": "300"}))
    client = make_client(max_rate_limit_duration=1)
    client.track("u", "e")
    flushed: list[bool] = []
    for _ in range(2):  # the second makes no attempt
        thread = threading.Thread(target=lambda: flushed.append(client.flush()), daemon=True)
        thread.start()
        thread.join(5)
    assert flushed == [False, False]
    assert len(receiver.requests) == 1


def test_a_flush_with_time_left_waits_for_a_rate_limit_though_the_budget_is_used_up(
    make_client: MakeClient, receiver: Receiver
) -> None:
    receiver.script(*[Answer(429, {"Retry-After": "1"})] * 2)
    client = make_client(max_rate_limit_duration=0.5)
    client.track("u", "e")
    assert not client.flush()
    assert not client.flush()
    assert client.flush(20)
    assert len(receiver.requests) == 3


def test_a_flush_with_much_time_does_not_wait_for_another_attempt_either(
    make_client: MakeClient, receiver: Receiver
) -> None:
    """After one that failed and has used up the budget; its wait of a minute at most would be over in time."""
    receiver.always(Answer(404))
    client = make_client()
    client.track("u", "e")
    flushed: list[bool] = []
    thread = threading.Thread(target=lambda: flushed.append(client.flush(90)), daemon=True)
    thread.start()
    thread.join(20)
    assert flushed == [False]


@pytest.mark.parametrize("timeout", [None, 20])
def test_a_flush_waits_for_a_rate_limit_after_failures_that_have_used_up_their_own_budget(
    make_client: MakeClient, receiver: Receiver, timeout: float | None
) -> None:
    receiver.script(Answer(404), Answer(429, {"Retry-After": "1"}))
    client = make_client()
    client.track("u", "e")
    assert not client.flush()
    assert client.flush(timeout)
    assert len(receiver.requests) == 3


def test_a_sender_that_is_closed_within_its_start_leaves_no_thread(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a signal handler, which has interrupted the start in this very thread."""
    workers: list[Worker] = []
    real = Worker.start

    def start(self: Worker) -> bool:
        workers.append(self)
        started = real(self)
        sender.close(0.0, lambda: None)
        return started

    monkeypatch.setattr(Worker, "start", start)
    sender = Sender(bench.outbox, bench.config, bench.clock, lambda: bench.sender().delivery)
    sender.start()
    try:
        (worker,) = workers
        worker.join(2)
        assert not worker.is_alive()
    finally:
        for each in workers:
            each.end()
            each.join(10)


def test_a_delivery_inline_is_made_anew_once_after_a_join(bench: Bench) -> None:
    made: list[Any] = []

    def make() -> Any:
        made.append(bench.sender())
        return made[-1].delivery

    sender = Sender(bench.outbox, bench.config, bench.clock, make)
    for number in range(1, 4):
        bench.put(1)
        assert sender.drain(number, None)
        if number == 1:
            assert sender.stop(0.0, lambda: None)
    assert [len(each.posts) for each in made] == [1, 2]


def test_a_delivery_inline_that_is_stopped_meanwhile_is_closed(bench: Bench) -> None:
    """Nobody would come back for its connections."""
    bench.put(1)

    def answer(post: Post) -> int:
        sender.stop(0.0, lambda: None)
        return 200

    own = bench.sender(answer)
    sender = Sender(bench.outbox, bench.config, bench.clock, lambda: own.delivery)
    assert sender.drain(1, None)
    assert own.transport.closed == 1


def test_a_thread_that_was_told_to_end_before_is_waited_for_until_the_files_are_closed(bench: Bench) -> None:
    bench.configure(upload_interval=0)
    bench.put(1)
    closed, answer = threading.Event(), LateAnswer()
    own = bench.sender(answer)
    sender = Sender(bench.outbox, bench.config, bench.clock, lambda: own.delivery)
    assert sender.start()
    assert answer.is_asked.wait(10)
    try:
        assert not sender.stop(0.0, lambda: None)
        assert not sender.close(0.0, closed.set)
        assert not closed.is_set()
    finally:
        answer.is_due.set()
    assert closed.wait(10)
    assert bench.pending() == []


def test_a_lease_whose_events_are_gone_is_damage_and_is_told(bench: Bench) -> None:
    bench.configure(upload_size=2)
    bench.put(4)
    told: list[Exception] = []
    bench.outbox.db.damage.on_damaged = told.append
    sender = bench.sender()
    assert sender.step().kind == "delivered"
    with bench.outbox.db.write() as connection:
        connection.execute("DELETE FROM event")
    assert sender.step().kind == "lost"
    assert len(told) == 1


@pytest.mark.parametrize(("answer", "kind"), [(200, "lost"), (400, "lost"), (503, "failed")])
def test_a_sender_that_has_lost_its_lease_sends_nothing_more_of_it(bench: Bench, answer: int, kind: str) -> None:
    bench.configure(upload_size=1)
    bench.put(3)

    def respond(_: Post) -> int:
        with bench.outbox.db.write() as connection:  # as another process that takes it over, and ends
            connection.execute("DELETE FROM lease")
        return answer

    sender = bench.sender(respond)
    assert sender.step().kind == kind
    assert not sender.delivery.is_under_way
    assert bench.outbox.pending() == 3


def test_for_expired_events_it_is_looked_once_a_second(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.configure(upload_size=1, max_age=3600)
    looks: list[float] = []
    monkeypatch.setattr(bench.outbox, "expire", lambda older_than: looks.append(older_than))
    sender = bench.sender()
    for number in range(24):
        bench.put(1)
        assert sender.step().kind == "delivered", number
        bench.clock.advance(0.125)
    assert len(looks) == 3


def test_where_a_part_of_a_lease_is_gone_the_rest_is_leased_anew(bench: Bench) -> None:
    bench.put(8)
    sender = bench.sender(lambda post: 400 if len(numbers_of(post)) == 8 else 200)
    assert sender.step().kind == "split"
    with bench.outbox.db.write() as connection:
        connection.execute("DELETE FROM event WHERE id <= 4")
    assert sender.step().kind == "lost"
    assert not sender.delivery.is_under_way
    assert sender.step().kind == "delivered"
    assert sender.sent[1:] == [[5, 6, 7, 8]]


def test_counters_that_do_not_know_of_an_event_are_found_to_be_damaged(make_client: MakeClient, tmp_path: Path) -> None:
    told = threading.Event()
    client = make_client(upload_interval=3600, on_error=lambda problem, items: told.set())
    client.track("u", "e")
    with contextlib.closing(sqlite3.connect(tmp_path / "outbox" / "outbox.db")) as connection:
        connection.execute("UPDATE state SET delivered = delivered + 1")
        connection.commit()
    assert told.wait(20)
    assert client.flush(20)
    assert client.stats().delivered == 1


@pytest.mark.parametrize("thread", [1, 3])
def test_what_a_dead_process_had_leased_does_not_wait_for_a_batch_to_fill(
    make_client: MakeClient, receiver: Receiver, tmp_path: Path, thread: int
) -> None:
    before = make_client(deliver=False)
    for number in range(3):
        before.track("u", str(number))
    before.shutdown(0)
    dead = Outbox(tmp_path / "outbox", SystemClock())
    dead.lease(100, 60)
    dead.close()
    make_client(thread=thread, upload_interval=3600)
    assert receiver.wait_for(3, timeout=20)


def test_a_stop_says_that_another_thread_delivers_inline_still(bench: Bench) -> None:
    bench.put(1)
    ended, answer = threading.Event(), LateAnswer()
    own = bench.sender(answer)
    sender = Sender(bench.outbox, bench.config, bench.clock, lambda: own.delivery)
    thread = threading.Thread(target=sender.drain, args=(1, None))
    thread.start()
    try:
        assert answer.is_asked.wait(10)
        assert sender.stop(0.0, ended.set) is False
        assert not ended.is_set()
    finally:
        answer.is_due.set()
        thread.join(10)
    assert ended.is_set()


def test_a_flush_hurries_one_attempt_and_not_those_after_it(make_client: MakeClient, receiver: Receiver) -> None:
    receiver.always(Answer(404))
    client = make_client(upload_interval=0)
    client.track("u", "e")
    assert client.flush(10) is False
    attempts = len(receiver.requests)
    assert not receiver.wait_for(lambda each: len(each.requests) > attempts, timeout=0.5)


def test_a_flush_whose_threads_have_ended_delivers_by_itself(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Worker, "_run", lambda self: None)
    bench.put(1)
    own = bench.sender()
    sender = Sender(bench.outbox, bench.config, bench.clock, lambda: own.delivery)
    flushed: list[bool] = []
    thread = threading.Thread(target=lambda: flushed.append(sender.flush()), daemon=True)
    thread.start()
    thread.join(5)
    assert flushed == [True]
