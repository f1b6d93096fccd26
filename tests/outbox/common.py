"""What the tests of the outbox share."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Any

from segment_durable.outbox import Outbox


def bodies(outbox: Outbox) -> list[bytes]:
    return [row.body for row in outbox.rows(0, 1 << 60)]


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll: there is no signal for "another thread waits for this lock"."""
    patience = threading.Event()
    for _ in range(3_000):
        if condition():
            return
        patience.wait(0.01)
    raise AssertionError("waited for 30 s")


class Remembering(deque[Any]):
    """The puts that wait, and all that ever did, so that a thread that hangs does not go on after its test."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Any] = []

    def append(self, put: Any) -> None:
        self.all.append(put)
        super().append(put)


class Interruption:
    """Calls `handle` once, before the bytecode number `at` that the package executes: any place a signal can come."""

    def __init__(self, at: int, handle: Callable[[], object]) -> None:
        self._left = at
        self._handle = handle
        self.happened = False

    def __enter__(self) -> Interruption:
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        if "segment_durable" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and not self.happened:
            self._left -= 1
            if self._left < 0:
                self.happened = True
                sys.settrace(None)
                self._handle()
        return self._trace
