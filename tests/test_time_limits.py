"""Time limits, by signal handlers that raise an ordinary exception: it reaches the caller, whatever it struck in.

In a user's hook or value, in a log handler, in the network.  `test_signals.py` has each place of a call.
"""

from __future__ import annotations

import gc
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from enum import Enum
from functools import partial
from types import FrameType
from typing import Any

import pytest

from segment_durable import Client
from segment_durable.encoding import encode
from segment_durable.interrupts import from_signal
from segment_durable.testing import Hang, Receiver

MakeClient = Callable[..., Client]
PROBLEMS = [TimeoutError, RuntimeError, TypeError, ValueError]

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="there is no such signal here")


class Plan(Enum):
    FREE = "free"


def of_an_enum(*_: object) -> Any:
    return Plan("Gold")


@pytest.mark.parametrize("where", ["before_send", "on_error", "a log handler", "a value"])
def test_an_ordinary_exception_that_comes_by_way_of_an_enum_is_none_of_a_signal_handler(
    make_client: MakeClient, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What signals do by default are members of an Enum, too."""
    hooks = {name: of_an_enum for name in ("before_send", "on_error") if name == where}
    client = make_client(deliver=False, max_queue_size=1, **hooks)
    if where == "a log handler":
        handler = logging.Handler()
        monkeypatch.setattr(handler, "emit", of_an_enum)
        monkeypatch.setattr(logging.getLogger("segment"), "handlers", [handler])
    assert client.track("u", "e", {"key": Items()} if where == "a value" else None)[0]
    assert not client.track("u", "e")[0]


class Items(dict[str, Any]):
    items = of_an_enum  # type: ignore[assignment]


@pytest.fixture(params=PROBLEMS, ids=lambda each: each.__name__)
def limit(request: pytest.FixtureRequest) -> Iterator[type[Exception]]:
    def handle(number: int, frame: FrameType | None) -> None:
        raise request.param("the time is over")

    before = signal.signal(signal.SIGUSR1, handle)
    yield request.param
    signal.signal(signal.SIGUSR1, before)


def strike(*_: object) -> Any:
    signal.raise_signal(signal.SIGUSR1)


def generator() -> Iterator[int]:
    strike()
    yield 1


class Key:
    def __getattr__(self, name: str) -> str:
        return str(strike())


@pytest.mark.parametrize(
    "make", [generator, lambda: {"deep": [[generator()]]}, lambda: {Key(): 1}, Key], ids=["flat", "deep", "key", "name"]
)
def test_while_a_value_is_encoded(limit: type[Exception], make: Callable[[], object]) -> None:
    with pytest.raises(limit, match="the time is over"):
        encode({"value": make()}, 32 << 10)


def test_in_before_send(limit: type[Exception], make_client: MakeClient) -> None:
    client = make_client(before_send=strike, deliver=False)
    with pytest.raises(limit, match="the time is over"):
        client.track("u", "e")
    assert client.stats().accepted == 0


def test_in_on_error(limit: type[Exception], make_client: MakeClient) -> None:
    client = make_client(on_error=strike, deliver=False, max_queue_size=1)
    assert client.track("u", "e")[0] is True
    with pytest.raises(limit, match="the time is over"):
        client.track("u", "e")


def test_in_a_log_handler(limit: type[Exception], make_client: MakeClient) -> None:
    handler = logging.Handler()
    handler.emit = strike  # type: ignore[method-assign]
    client = make_client(deliver=False, max_queue_size=1, log_handler=handler)
    client.track("u", "e")
    with pytest.raises(limit, match="the time is over"):
        client.track("u", "e")


def test_while_the_answer_is_waited_for(limit: type[Exception], make_client: MakeClient, receiver: Receiver) -> None:
    if limit is TypeError:
        pytest.skip("http.client itself takes one that strikes while it sends for something else")
    receiver.always(Hang())
    client = make_client(sync_mode=True)
    main = threading.get_ident()

    def end() -> None:
        if receiver.wait_for(lambda each: len(each.requests) == 1):
            signal.pthread_kill(main, signal.SIGUSR1)

    thread = threading.Thread(target=end)
    thread.start()
    with pytest.raises(limit, match="the time is over"):
        client.track("u", "e")
    thread.join(10)
    receiver.always(None)
    receiver.release()
    stats = client.stats()
    assert (stats.pending, stats.failures) == (1, 0)
    gc.collect()  # here, and not in a test after this one, it may be told what was not closed


@pytest.mark.parametrize("kind", ["function", "method", "partial", "object"])
def test_handlers_of_any_kind_are_known(kind: str) -> None:
    class Handler:
        def __call__(self, number: int, frame: object) -> None:
            raise TimeoutError

        def method(self, number: int, frame: object) -> None:
            raise TimeoutError

    def function(*_: object) -> None:
        raise TimeoutError

    handlers: dict[str, Any] = {
        "function": function,
        "method": Handler().method,
        "partial": partial(partial(function, 1), 2),
        "object": Handler(),
    }
    before = signal.signal(signal.SIGUSR1, handlers[kind])
    try:
        with pytest.raises(TimeoutError) as caught:
            strike()
        assert from_signal(caught.value) is caught.value
        wrapped = OSError()
        wrapped.__cause__ = caught.value
        assert from_signal(wrapped) is caught.value
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert from_signal(caught.value) is None  # which nobody has installed any more


def test_what_else_is_raised_where_a_limit_is_being_handled_is_no_limit(
    limit: type[Exception], make_client: MakeClient
) -> None:
    def before_send(message: dict[str, Any]) -> dict[str, Any]:
        raise LookupError

    client = make_client(before_send=before_send, deliver=False)
    try:
        strike()
    except limit:
        assert client.track("u", "e")[0] is True
    assert client.stats().accepted == 1
