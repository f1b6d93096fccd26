"""Repeated troubles are told once, with a count."""

from __future__ import annotations

import threading

from segment_durable.clock import Clock

__all__ = ["Limiter"]


class Limiter:
    """Lets one of many through in `interval` seconds."""

    def __init__(self, interval: float, clock: Clock) -> None:
        self._interval = interval
        self._clock = clock
        self._lock = threading.RLock()  # for signal handlers
        self._next: float | None = None
        self._count = 0

    def tick(self) -> int:
        """How often this has happened since it was last told, if it is to be told now; else 0."""
        now = self._clock.boot()
        with self._lock:
            self._count += 1
            if self._next is not None and now < self._next:
                return 0
            self._next = now + self._interval
            count, self._count = self._count, 0
            return count

    def rest(self) -> int:
        """How often this has happened since it was last told, however long ago that is."""
        with self._lock:
            count, self._count = self._count, 0
            return count
