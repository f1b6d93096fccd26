"""Exceptions of signal handlers, told from those of the code in which they strike."""

from __future__ import annotations

import signal
from functools import partial
from types import CodeType

__all__ = ["from_signal"]

_MAX_DEPTH = 8  # of exceptions within each other


def from_signal(problem: BaseException | None) -> BaseException | None:
    """The exception that a signal handler of the program raised, be it this one or what it was made of; None if none.

    A time limit, say, is for the caller and nobody else.  It may be of any class, `TimeoutError` above all, and comes
    up in whatever was being done.
    """
    return _find(problem, {_code(signal.getsignal(number)) for number in signal.valid_signals()}, _MAX_DEPTH)


def _find(problem: BaseException | None, codes: set[CodeType | None], depth: int) -> BaseException | None:
    if problem is None or not depth:
        return None
    # The innermost: urllib3 gives the traceback of one to another that it makes of it.  But not by its context, which
    # is another one where the call was made while that was being handled.
    for inner in (problem.__cause__, *problem.args):
        found = _find(inner, codes, depth - 1) if isinstance(inner, BaseException) else None
        if found is not None:
            return found
    trace = problem.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in codes:
            return problem
        trace = trace.tb_next
    return None


def _code(handler: object) -> CodeType | None:
    while isinstance(handler, partial):
        handler = handler.func
    if not callable(handler):  # SIG_DFL and SIG_IGN, as members of an Enum, whose own `__call__` is Python code
        return None
    for each in (handler, getattr(handler, "__func__", None), getattr(type(handler), "__call__", None)):  # noqa: B004
        code = getattr(each, "__code__", None)
        if isinstance(code, CodeType):
            return code
    return None
