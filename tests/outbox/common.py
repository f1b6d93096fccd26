"""What the tests of the outbox share."""

from __future__ import annotations

import dis
import functools
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import CodeType, FrameType
from typing import Any, ParamSpec

from segment_durable.outbox import Outbox
from segment_durable.records import Backoff
from segment_durable.views import read_backoff

P = ParamSpec("P")


def becomes(after: Backoff) -> Callable[[Backoff], Backoff]:
    """For `Outbox.fail`: the shared backoff becomes that, whatever it was.  Can be sent to another process."""
    return functools.partial(replace, **vars(after))


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


def backoff_of(outbox: Outbox) -> Backoff:
    """The shared backoff as it is stored."""
    with outbox.db.read() as connection:
        return read_backoff(connection, outbox._clock)


class Remembering(deque[Any]):
    """The puts that wait, and all that ever did, so that a thread that hangs does not go on after its test."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Any] = []

    def append(self, put: Any) -> None:
        self.all.append(put)
        super().append(put)


class Interruption:
    """Calls `handle` once, before the bytecode number `at` that the package executes: any place a signal can come.

    With `checked` only those count at which Python looks for signals: after a call, at the beginning of a function and
    in a loop.  What runs in between is not interrupted, and an exception that is raised there proves nothing.
    `within`: parts of the names of other files than the package's, whose code counts as well.
    """

    def __init__(
        self, at: int, handle: Callable[[], object], *, checked: bool = False, within: tuple[str, ...] = ()
    ) -> None:
        self._left = at
        self._handle = handle
        self._checked = checked
        self._within = ("segment_durable", *within)
        self._last: dict[FrameType, str] = {}
        self.happened = False

    def __enter__(self) -> Interruption:
        self._before = sys.gettrace()
        # Python 3.12 looks at this when it begins to trace, and not when a new function asks for it.
        frame = sys._getframe()
        frame.f_trace_opcodes = True
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)
        self._last.clear()

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        if not any(each in frame.f_code.co_filename for each in self._within):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and not self.happened and self._is_place(frame):
            self._left -= 1
            if self._left < 0:
                self.happened = True
                sys.settrace(None)
                self._last.clear()
                self._handle()
        return self._trace

    def _is_place(self, frame: FrameType) -> bool:
        if not self._checked:
            return True
        last = self._last.get(frame, "")
        self._last[frame] = _instructions(frame.f_code)[frame.f_lasti]
        return last.startswith("CALL") or last in ("RESUME", "JUMP_BACKWARD", "JUMP_ABSOLUTE")


def in_its_own_thread(test: Callable[P, None]) -> Callable[P, None]:
    """Run the test there, for what a trace function raises.

    Python 3.12 and 3.13 may go on to take such an exception for the one that the thread is handling, and make it the
    context of all others.
    """

    @functools.wraps(test)
    def wrapped(*args: P.args, **named: P.kwargs) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(test, *args, **named).result()

    return wrapped


@functools.cache
def _instructions(code: CodeType) -> dict[int, str]:
    return {each.offset: each.opname for each in dis.get_instructions(code)}
