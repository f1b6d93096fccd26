"""What a receiver can be told to do instead of its honest answer. All are frozen values; none does anything by itself.

"Taken" means: the events count as received, whatever the sender is told. A fault never takes what the honest receiver
would refuse: a batch that breaks a rule is not taken, whatever the script says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Honest:
    """Behave as if nothing were scripted: a place holder for the requests that are to go well."""


@dataclass(frozen=True)
class Answer:
    """Answer with this status, for example `Answer(429, {"Retry-After": "1"})`. A redirect needs a `Location`.

    `ValueError` if the status is not one of a final answer or a header cannot be sent, `TypeError` if the body is
    neither bytes nor text nor JSON.
    """

    status: int
    """From 200 to 999. 204 and 304 carry no body."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent as they are; they replace those which the receiver would send by itself, `Content-Length` included."""
    body: object = b""
    """Bytes and text are sent as they are (`text/plain`), None as an empty body, all else as `application/json`."""
    taken: bool | None = None
    """Whether the events count as received, whatever the answer says. None: if the status is from 200 to 299."""

    def __post_init__(self) -> None:
        if not 200 <= self.status <= 999:
            raise ValueError(f"status must be from 200 to 999, not {self.status}")
        for name, value in self.headers.items():
            if any(character in f"{name}{value}" for character in "\r\n"):
                raise ValueError(f"the header {name!r} must be one line")
            f"{name}{value}".encode("latin-1")
        self.payload()

    @property
    def is_taken(self) -> bool:
        """`taken`, or what the status says."""
        return self.status < 300 if self.taken is None else self.taken

    def payload(self) -> bytes:
        """The body as it is sent."""
        if self.body is None:
            return b""
        if isinstance(self.body, bytes):
            return self.body
        if isinstance(self.body, str):
            return self.body.encode()
        return json.dumps(self.body).encode()

    @property
    def content_type(self) -> str:
        """The type that goes with the body when `headers` name none."""
        plain = self.body is None or isinstance(self.body, bytes | str)
        return "text/plain; charset=utf-8" if plain else "application/json"


@dataclass(frozen=True)
class Drop:
    """Read the whole request, then reset the connection (a TCP RST) without an answer."""

    after: bool = False
    """False: dropped before the batch was taken. True: taken, then dropped, so that a retry is a duplicate."""


@dataclass(frozen=True)
class HalfAnswer:
    """Send the head of a 200 and half of its body, then close the connection in good order."""

    taken: bool = False
    """True: the events count as received."""


@dataclass(frozen=True)
class Hang:
    """Say nothing, then close the connection without an answer."""

    seconds: float | None = None
    """How long. None: until `release()` or `stop()`, which also cut a given time short. 0: close at once."""
    taken: bool = False
    """True: the events count as received, from the beginning of the wait on."""

    def __post_init__(self) -> None:
        _check_seconds(self.seconds)


@dataclass(frozen=True)
class Delay:
    """Wait, then go on. `release()` ends the wait early; `stop()` ends the connection without an answer."""

    seconds: float
    """0: no wait."""
    then: Fault | None = None
    """What to do after the wait. None: the honest answer, decided after the wait."""

    def __post_init__(self) -> None:
        _check_seconds(self.seconds)
        if self.then is not None:
            check_fault(self.then)


@dataclass(frozen=True)
class Refuse:
    """Refuse a whole batch if any of its events matches, as Segment does with a poison event; else be honest.

    Made for `Receiver.always`. It has no meaning for token requests.
    """

    matches: Callable[[dict[str, Any]], bool]
    """Called with each event of a batch that is sound. What it raises lands in `Receiver.errors`; the answer is 500."""
    status: int = 400
    code: str = "invalid_event"
    message: str = "an event of the batch was refused"


Fault: TypeAlias = Honest | Answer | Drop | HalfAnswer | Hang | Delay | Refuse
"""Anything that `Receiver.script` accepts."""

_FAULTS = (Honest, Answer, Drop, HalfAnswer, Hang, Delay, Refuse)


def check_fault(fault: object) -> None:
    """Raise `TypeError` for what is not a fault, so that a typing error fails in the test and not in a thread."""
    if not isinstance(fault, _FAULTS):
        raise TypeError(f"a fault is one of {', '.join(kind.__name__ for kind in _FAULTS)}, not {type(fault).__name__}")


def _check_seconds(seconds: float | None) -> None:
    if seconds is not None and not seconds >= 0:
        raise ValueError(f"seconds must be 0 or more, not {seconds}")
