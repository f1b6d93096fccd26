"""For tests of programs that send events: a receiver that is strict and can be told to fail.

Names are loaded when they are first used, for pytest imports this package at every start (see `pytest_plugin`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from segment_durable.testing.clock import FakeClock
    from segment_durable.testing.faults import Answer, Delay, Drop, Fault, HalfAnswer, Hang, Honest, Refuse
    from segment_durable.testing.oauth import OAuthApp
    from segment_durable.testing.receiver import Receiver
    from segment_durable.testing.records import Batch, Headers, Problem, Request

__all__ = [
    "Answer",
    "Batch",
    "Delay",
    "Drop",
    "FakeClock",
    "Fault",
    "HalfAnswer",
    "Hang",
    "Headers",
    "Honest",
    "OAuthApp",
    "Problem",
    "Receiver",
    "Refuse",
    "Request",
]

_MODULES = {
    "clock": ("FakeClock",),
    "faults": ("Answer", "Delay", "Drop", "Fault", "HalfAnswer", "Hang", "Honest", "Refuse"),
    "oauth": ("OAuthApp",),
    "receiver": ("Receiver",),
    "records": ("Batch", "Headers", "Problem", "Request"),
}

if not TYPE_CHECKING:  # or a type checker would believe in any name

    def __getattr__(name: str) -> object:
        for module, names in _MODULES.items():
            if name in names:
                value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
