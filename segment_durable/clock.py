"""Time: the wall clock for people, the boot clock for deadlines, and a wait that can be interrupted."""

from __future__ import annotations

import threading
import time
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Protocol

__all__ = ["Clock", "SystemClock", "utc_timestamp"]

# CLOCK_BOOTTIME goes on while the machine sleeps, which CLOCK_MONOTONIC does not on Linux: a Retry-After of an hour
# is over after an hour, whether or not the lid was shut.
_BOOT_CLOCK = getattr(time, "CLOCK_BOOTTIME", None)


class Clock(Protocol):
    """What the package asks of time; `segment_durable.testing.FakeClock` is the other implementation."""

    def time(self) -> float:
        """Seconds since 1970 by the wall clock, which may jump."""

    def boot(self) -> float:
        """Seconds since this machine started, the same for all of its processes; never jumps."""

    def boot_id(self) -> str:
        """A name of this start of the machine, or "" where the system has none."""

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Wait until `event` is set, at most `seconds`; whether it is set."""


class SystemClock:
    """The clocks of the operating system."""

    def time(self) -> float:
        return time.time()

    def boot(self) -> float:
        return time.monotonic() if _BOOT_CLOCK is None else time.clock_gettime(_BOOT_CLOCK)

    def boot_id(self) -> str:
        return _boot_id()

    def wait(self, event: threading.Event, seconds: float) -> bool:
        return event.wait(seconds)


@lru_cache(maxsize=1)
def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


_second: tuple[int, str] = (-1, "")


def utc_timestamp(seconds: float) -> str:
    """ISO 8601 in UTC to the millisecond; `seconds` since 1970.

    It is made for each event: formatting a second once and the milliseconds each time takes a quarter of the time of
    `isoformat`.
    """
    global _second
    whole = int(seconds // 1)
    known = _second
    if known[0] != whole:
        known = _second = (whole, datetime.fromtimestamp(whole, timezone.utc).isoformat()[:19])
    return f"{known[1]}.{int((seconds - whole) * 1000):03d}+00:00"
