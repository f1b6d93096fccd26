"""Exceptions of signal handlers, told from those of the code in which they strike."""

from __future__ import annotations

import signal
from functools import partial
from types import CodeType

__all__ = ["from_signal"]


def from_signal(problem: BaseException | None) -> BaseException | None:
    """The exception that a signal handler of the program raised, be it this one or its cause; None if none did.

    A time limit, say, is for the caller and nobody else.  It may be of any class, `TimeoutError` above all, and comes
    up in whatever was being done.
    """
    codes = {_code(signal.getsignal(number)) for number in signal.valid_signals()}
    while problem is not None:
        trace = problem.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code in codes:
                return problem
            trace = trace.tb_next
        problem = problem.__cause__  # and not its context: the call may have been made where another is being handled
    return None


def _code(handler: object) -> CodeType | None:
    while isinstance(handler, partial):
        handler = handler.func
    for each in (handler, getattr(handler, "__func__", None), getattr(type(handler), "__call__", None)):  # noqa: B004
        code = getattr(each, "__code__", None)
        if isinstance(code, CodeType):
            return code
    return None
