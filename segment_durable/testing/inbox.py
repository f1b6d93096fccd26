"""What arrived, and the scripts: all state of a receiver, under one condition."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from segment_durable.testing.faults import Fault, Honest, check_fault
from segment_durable.testing.records import Batch, Request


@dataclass
class Script:
    """Faults for one kind of request: the queue is used up first, then `default` goes on for ever."""

    queue: deque[Fault] = field(default_factory=deque)
    default: Fault = field(default_factory=Honest)


class Inbox:
    """Every method takes the condition, which is re-entrant, and wakes those who wait when it changed something."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.errors: list[Exception] = []
        self._next_number = 0
        self._releases = 0
        self.clear()

    def clear(self) -> None:
        """Forget what arrived. A request that is being answered now is there again once it has been taken."""
        with self.condition:
            self._requests: dict[int, Request] = {}
            self._taken: list[Batch] = []
            self._unique: list[dict[str, Any]] = []
            self._message_ids: set[str] = set()
            self._duplicates = 0
            self.errors.clear()
            self.condition.notify_all()

    def arrive(self, request: Request, script: Script | None) -> tuple[int, Fault, int]:
        """Record a request before it is answered: its number, its fault, and how often `release` was called before."""
        with self.condition:
            number, self._next_number = self._next_number, self._next_number + 1
            self._requests[number] = request
            fault: Fault = Honest()
            if script is not None:
                fault = script.queue.popleft() if script.queue else script.default
            self.condition.notify_all()
            return number, fault, self._releases

    def settle(self, number: int, request: Request) -> None:
        """Replace the record of a request by a later state of it."""
        with self.condition:
            if request.taken or number in self._requests:
                self._requests[number] = request
            if request.taken and isinstance(request, Batch):
                self._take(request)
            self.condition.notify_all()

    def _take(self, batch: Batch) -> None:
        self._taken.append(batch)
        for event in batch.events:
            message_id = event.get("messageId")
            if isinstance(message_id, str):
                if message_id in self._message_ids:
                    self._duplicates += 1
                    continue
                self._message_ids.add(message_id)
            self._unique.append(event)

    def extend(self, script: Script, faults: tuple[Fault, ...]) -> None:
        """Append to a script."""
        for fault in faults:
            check_fault(fault)
        with self.condition:
            script.queue.extend(faults)

    def fail(self, error: Exception) -> None:
        """Keep what a test, or a defect here, raised in a thread where nobody would see it."""
        with self.condition:
            self.errors.append(error)
            self.condition.notify_all()

    def release(self) -> None:
        """End the waits of all requests that have arrived so far."""
        with self.condition:
            self._releases += 1
            self.condition.notify_all()

    def pause(self, releases: int, seconds: float | None, closing: threading.Event) -> bool:
        """Wait for a release later than the given count, or for the time to pass. False if the server closes."""
        with self.condition:
            self.condition.wait_for(lambda: closing.is_set() or self._releases != releases, seconds)
            return not closing.is_set()

    def wake(self) -> None:
        """Let everybody who waits look again."""
        with self.condition:
            self.condition.notify_all()

    def wait_for(self, predicate: Callable[[], bool], timeout: float) -> bool:
        """Wait until the predicate, called with the condition held, is true. False after `timeout` seconds."""
        with self.condition:
            return bool(self.condition.wait_for(predicate, timeout))

    def requests(self) -> tuple[Request, ...]:
        """All that arrived, in order of arrival."""
        with self.condition:
            return tuple(self._requests.values())

    def taken(self) -> tuple[Batch, ...]:
        """The batches whose events count, in the order in which they were taken."""
        with self.condition:
            return tuple(self._taken)

    def unique(self) -> list[dict[str, Any]]:
        """The first of each message id."""
        with self.condition:
            return list(self._unique)

    def unique_count(self) -> int:
        """How many `unique` has, without a copy."""
        with self.condition:
            return len(self._unique)

    def duplicates(self) -> int:
        """How many events came again."""
        with self.condition:
            return self._duplicates
