"""A clock that stands still until a test moves it."""

from __future__ import annotations

import threading

from segment_durable.clock import Waitable

__all__ = ["FakeClock"]


class FakeClock:
    """A `segment_durable.clock.Clock` whose time passes only when it is told to; safe to use from several threads.

    `wall` is in seconds since 1970, `boot` in seconds since the machine started, `boot_id` names that start and may
    be "", as on systems that have no such name.

    >>> clock = FakeClock(wall=1_000.0, boot=10.0)
    >>> clock.advance(2.5)
    >>> clock.time(), clock.boot()
    (1002.5, 12.5)
    """

    def __init__(self, wall: float = 1_700_000_000.0, boot: float = 1_000.0, boot_id: str = "boot-1") -> None:
        self._lock = threading.Lock()
        self._wall = wall
        self._boot = boot
        self._boot_id = boot_id

    # -- what the package asks

    def time(self) -> float:
        """Seconds since 1970."""
        with self._lock:
            return self._wall

    def boot(self) -> float:
        """Seconds since the machine started."""
        with self._lock:
            return self._boot

    def boot_id(self) -> str:
        """The name of this start of the machine."""
        with self._lock:
            return self._boot_id

    def wait(self, event: Waitable, seconds: float) -> bool:
        """Return at once whether `event` is set; if it isn't, `seconds` have passed on both clocks."""
        if event.is_set():
            return True
        self.advance(max(0.0, seconds))
        return event.is_set()

    # -- what a test tells it

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass, on both clocks.  They can't be negative, for the boot clock never goes back."""
        if seconds < 0:
            raise ValueError("time passes forwards only: jump() sets the wall clock back")
        with self._lock:
            self._wall += seconds
            self._boot += seconds

    def jump(self, seconds: float) -> None:
        """Put the wall clock forward, or back if `seconds` is negative; the boot clock does not notice."""
        with self._lock:
            self._wall += seconds

    def reboot(self, boot_id: str, *, boot: float = 5.0, off: float = 0.0) -> None:
        """Restart the machine: its boot clock begins anew at `boot`, under another `boot_id`.

        The machine was off for `off` seconds, which only the wall clock tells.
        """
        with self._lock:
            self._wall += off
            self._boot = boot
            self._boot_id = boot_id

    def set(self, *, wall: float | None = None, boot: float | None = None, boot_id: str | None = None) -> None:
        """Set what is given and leave the rest; nothing is checked."""
        with self._lock:
            self._wall = self._wall if wall is None else wall
            self._boot = self._boot if boot is None else boot
            self._boot_id = self._boot_id if boot_id is None else boot_id
