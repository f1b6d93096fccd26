"""One request on its way to an answer: what the script and the honest decision make of it. No socket is touched."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from segment_durable.testing.faults import Answer, Delay, Drop, Fault, HalfAnswer, Hang, Honest, Refuse
from segment_durable.testing.inbox import Inbox, Script
from segment_durable.testing.records import Batch, Request

Ending: TypeAlias = Answer | HalfAnswer | Drop | Hang
"""What is left to do on the socket. A `Hang` has waited already: the connection is closed."""


@dataclass
class Exchange:
    """`decide` gives the honest answer, `taken` if it is a success; it may have effects, so it is called once."""

    inbox: Inbox
    request: Request
    decide: Callable[[], Answer]
    script: Script | None = None
    now: Callable[[], float] = time.time
    """For the `Date` header of the answer, in seconds since 1970."""
    _number: int = field(init=False)
    _fault: Fault = field(init=False)
    _releases: int = field(init=False)

    def __post_init__(self) -> None:
        self._number, self._fault, self._releases = self.inbox.arrive(self.request, self.script)

    def resolve(self, closing: threading.Event) -> Ending:
        """Wait as scripted, decide, and record the decision before the sender can learn of it."""
        try:
            return self._resolve(closing)
        except Exception as error:
            self.inbox.fail(error)
            self._settle(500, taken=False)
            return Answer(500, body={"code": "receiver_error", "message": "see Receiver.errors"})

    def _resolve(self, closing: threading.Event) -> Ending:
        fault = self._fault
        while isinstance(fault, Delay):
            if not self.inbox.pause(self._releases, fault.seconds, closing):
                return Hang()
            fault = fault.then or Honest()
        if isinstance(fault, Refuse):
            fault = self._refusal(fault) or Honest()
        if isinstance(fault, Honest):
            answer = self.decide()
            self._settle(answer.status, taken=answer.is_taken)
            return answer
        if isinstance(fault, Answer):
            status, wanted = fault.status, fault.is_taken
        else:
            status, wanted = None, fault.after if isinstance(fault, Drop) else fault.taken
        self._settle(status, taken=wanted and self.decide().is_taken)
        if isinstance(fault, Hang):
            self.inbox.pause(self._releases, fault.seconds, closing)
        return fault

    def _refusal(self, fault: Refuse) -> Answer | None:
        request = self.request
        if not isinstance(request, Batch) or request.problem is not None:
            return None
        if not any(fault.matches(event) for event in request.events):
            return None
        return Answer(fault.status, body={"code": fault.code, "message": fault.message})

    def _settle(self, status: int | None, *, taken: bool) -> None:
        self.inbox.settle(self._number, replace(self.request, status=status, taken=taken))
