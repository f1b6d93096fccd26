"""Loggers of the package: children of `segment`, to which nothing is added that the user did not ask for.

And the users' callbacks, which may raise as their log handlers may.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from segment_durable.interrupts import from_signal

__all__ = ["Log", "call", "get_log"]

if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter

# From `Log.log` to who logs.  Before Python 3.11 the frames of `logging` itself count.
_TO_CALLER = 2 if sys.version_info >= (3, 11) else 4


class Log(_Adapter):
    """A logger whose handlers and filters may fail: that is said on stderr, and is nobody else's trouble.

    `logging` does the same for what its own handlers fail at; one of somebody else's may simply raise, and would end a
    sender's thread, or a call whose event is refused, or the delivery at exit.
    """

    def log(self, level: int, msg: object, *args: Any, **named: Any) -> None:
        try:
            super().log(level, msg, *args, stacklevel=_TO_CALLER, **named)
        except Exception as problem:
            if from_signal(problem):
                raise
            if logging.raiseExceptions:
                with contextlib.suppress(Exception):  # as when stderr is closed
                    traceback.print_exc()


def get_log(name: str) -> Log:
    """The one named `segment.durable.<name>`; without a name the one above these."""
    return Log(logging.getLogger(f"segment.durable.{name}" if name else "segment.durable"), {})


def call(callback: Callable[..., object], name: str, *arguments: object) -> None:
    """Call a user's callback; what it raises, also by `sys.exit()`, is logged and changes nothing."""
    try:
        callback(*arguments)
    except (Exception, SystemExit) as problem:
        if from_signal(problem):
            raise
        get_log("").exception("%s raised; nothing else is changed by that", name)
