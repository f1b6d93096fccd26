"""What stands in for the module's client while its outbox can't be opened: it accepts nothing, and raises nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from segment_durable.client import Client
from segment_durable.clock import SystemClock
from segment_durable.engine import items_of
from segment_durable.errors import OutboxError
from segment_durable.limiter import Limiter
from segment_durable.logs import call, get_log
from segment_durable.records import OutboxStats

__all__ = ["Unopened"]

log = get_log("client")

_TRY_AGAIN = 1.0  # seconds until the next call tries to open the outbox


class Unopened:
    """Has the methods of a `Client` with these `settings`; `problem` is why there is none."""

    _log, _flush_log = Limiter(60.0, SystemClock()), Limiter(60.0, SystemClock())

    def __init__(self, settings: dict[str, Any], problem: OutboxError) -> None:
        self.settings = settings
        self._client = _Refusing(self._refuse, settings)
        self._on_error = settings["on_error"]
        self._problem = problem
        self._clock = SystemClock()
        self._told = Limiter(1.0, self._clock)
        self._until = self._clock.boot() + _TRY_AGAIN

    @property
    def is_over(self) -> bool:
        """Whether it is time to try again."""
        return self._clock.boot() >= self._until

    def __getattr__(self, name: str) -> Callable[..., tuple[bool, dict[str, Any]]]:
        """`track` and the other calls that take an event."""
        taking: Callable[..., tuple[bool, dict[str, Any]]] = getattr(self._client, name)
        return taking

    def flush(self, timeout: float | None = None) -> bool:
        times = self._flush_log.tick()
        if times:
            log.error("flush (%d times): %s", times, self._problem)
        return False

    shutdown = flush

    def stats(self) -> OutboxStats:
        raise self._problem

    def _refuse(self, body: bytes) -> None:
        times = self._log.tick()
        if times:
            log.error("no event is accepted (%d calls so far): %s", times, self._problem)
        if self._on_error is not None and self._told.tick():
            call(self._on_error, "on_error", self._problem, items_of(body))


class _Refusing(Client):
    """Checks what is passed, and encodes it, and that is all."""

    def __init__(self, refuse: Callable[[bytes], None], settings: dict[str, Any]) -> None:
        super().__init__(**{**settings, "send": False})
        self._refuse = refuse

    def _unsent(self, message: dict[str, Any], body: bytes) -> tuple[bool, dict[str, Any]]:
        self._refuse(body)
        return False, message
