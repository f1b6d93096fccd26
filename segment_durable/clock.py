"""Time: the wall clock for people, the boot clock for deadlines, and a wait that can be interrupted."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Protocol

__all__ = ["Clock", "SystemClock", "Waitable", "utc_timestamp"]

# CLOCK_BOOTTIME goes on while the machine sleeps, which CLOCK_MONOTONIC does not on Linux: a Retry-After of an hour
# is over after an hour, whether or not the lid was shut.
_BOOT_CLOCK = getattr(time, "CLOCK_BOOTTIME", None)


class Waitable(Protocol):
    """What a clock waits for: a `threading.Event`, or what is like one."""

    def is_set(self) -> bool: ...

    def wait(self, timeout: float | None = None) -> bool: ...


class Clock(Protocol):
    """What the package asks of time; `segment_durable.testing.FakeClock` is the other implementation."""

    def time(self) -> float:
        """Seconds since 1970 by the wall clock, which may jump."""

    def boot(self) -> float:
        """Seconds since this machine started, the same for all of its processes; never jumps."""

    def boot_id(self) -> str:
        """A name of this start of the machine, or "" where the system has none."""

    def wait(self, event: Waitable, seconds: float) -> bool:
        """Wait until `event` is set, at most `seconds`; whether it is set."""


class SystemClock:
    """The clocks of the operating system."""

    def time(self) -> float:
        return time.time()

    def boot(self) -> float:
        return time.monotonic() if _BOOT_CLOCK is None else time.clock_gettime(_BOOT_CLOCK)

    def boot_id(self) -> str:
        return _boot_id()

    def wait(self, event: Waitable, seconds: float) -> bool:
        return event.wait(seconds)


@lru_cache(maxsize=1)
def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


_known: tuple[int, str] = (-1, "")  # the millisecond last asked for


def utc_timestamp(seconds: float) -> str:
    """ISO 8601 in UTC to the millisecond; `seconds` since 1970.

    It is made for each event, and where time counts there are many of them in a millisecond.
    """
    global _known
    millisecond = int(seconds * 1000)
    known = _known
    if known[0] != millisecond:
        whole, rest = divmod(millisecond, 1000)
        if known[0] // 1000 == whole:
            second = known[1][:19]
        else:
            second = datetime.fromtimestamp(whole, timezone.utc).isoformat()[:19]
        known = _known = (millisecond, f"{second}.{rest:03d}+00:00")
    return known[1]
