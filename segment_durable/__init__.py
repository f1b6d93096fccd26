"""A drop-in replacement for `segment.analytics` whose events are never lost.

::

    import segment_durable as analytics

    analytics.write_key = "YOUR_WRITE_KEY"
    analytics.track("f4ca124298", "Signed Up", {"plan": "Enterprise"})

Every setting of `Client` can be set on the module before the first call.  Importing this starts nothing and loads
nothing heavy: the client, and what it needs, are loaded at first use.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from segment_durable.clock import SystemClock as _SystemClock
from segment_durable.config import DEFAULTS
from segment_durable.errors import (
    ConfigError,
    DeliveryError,
    EventsExpired,
    InvalidMessage,
    MessageTooLarge,
    NotAnOutbox,
    OutboxBusy,
    OutboxDamaged,
    OutboxError,
    OutboxFull,
    OutboxUnavailable,
    SegmentDurableError,
    SourceMismatch,
    StorageError,
)
from segment_durable.forks import loading as _loading
from segment_durable.interrupts import from_signal as _from_signal
from segment_durable.limiter import Limiter as _Limiter
from segment_durable.logs import call as _call
from segment_durable.logs import get_log as _get_log
from segment_durable.records import OutboxStats
from segment_durable.threads import PatientLock as _PatientLock
from segment_durable.version import VERSION

__all__ = [
    "VERSION",
    "Client",
    "ConfigError",
    "DeliveryError",
    "EventsExpired",
    "InvalidMessage",
    "MessageTooLarge",
    "NotAnOutbox",
    "OutboxBusy",
    "OutboxDamaged",
    "OutboxError",
    "OutboxFull",
    "OutboxStats",
    "OutboxUnavailable",
    "SegmentDurableError",
    "SourceMismatch",
    "StorageError",
    "alias",
    "flush",
    "group",
    "identify",
    "join",
    "page",
    "screen",
    "shutdown",
    "stats",
    "track",
]

__version__ = VERSION

default_client: Client | None = None
"""The client behind the calls of this module, made at the first of them; set it to None to have it made anew."""

_unopened: _Unopened | None = None


class _MakingLock(_PatientLock):
    """Not waited for without end.

    Its owner may log, and who waits may be in the log handler, and have the lock of that.
    """

    patience = 5.0


_lock = _MakingLock()


def _after_fork_in_child() -> None:
    # Another thread of the parent may have been making the client.
    global _lock
    _lock = _MakingLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Mapping

    from segment_durable.client import Client
    from segment_durable.unopened import Unopened as _Unopened

    write_key: str | None
    host: str | None
    debug: bool
    max_queue_size: int
    send: bool
    on_error: Callable[[Exception, list[dict[str, Any]]], object] | None
    gzip: bool
    max_retries: int
    sync_mode: bool
    timeout: float
    proxies: Mapping[str, str | None] | None
    thread: int
    upload_size: int
    upload_interval: float
    log_handler: logging.Handler | None
    oauth_client_id: str | None
    oauth_client_key: str | bytes | os.PathLike[str] | None
    oauth_key_id: str | None
    oauth_auth_server: str
    oauth_scope: str
    max_total_backoff_duration: float
    max_rate_limit_duration: float
    outbox_dir: str | os.PathLike[str] | None
    deliver: bool
    synchronous: str
    lease_seconds: float
    shutdown_timeout: float
    max_age: float | None
    max_dead_letters: int
    on_success: Callable[[list[dict[str, Any]]], object] | None
    before_send: Callable[[dict[str, Any]], dict[str, Any] | None] | None

    # The calls have the signatures of the client's methods.
    _client = Client()
    identify = _client.identify
    track = _client.track
    alias = _client.alias
    group = _client.group
    page = _client.page
    screen = _client.screen
    flush = _client.flush
    join = _client.join
    shutdown = _client.shutdown
    stats = _client.stats
else:
    globals().update(DEFAULTS)

    def identify(*args, **kwargs):
        """Tie a user to their traits; see `Client.identify`."""
        return _default_client().identify(*args, **kwargs)

    def track(*args, **kwargs):
        """Record what a user did; see `Client.track`."""
        return _default_client().track(*args, **kwargs)

    def alias(*args, **kwargs):
        """Say that two ids are the same user; see `Client.alias`."""
        return _default_client().alias(*args, **kwargs)

    def group(*args, **kwargs):
        """Tie a user to a group; see `Client.group`."""
        return _default_client().group(*args, **kwargs)

    def page(*args, **kwargs):
        """Record that a user saw a page; see `Client.page`."""
        return _default_client().page(*args, **kwargs)

    def screen(*args, **kwargs):
        """Record that a user saw a screen; see `Client.screen`."""
        return _default_client().screen(*args, **kwargs)

    def flush(*args, **kwargs):
        """Deliver what is pending; see `Client.flush`."""
        return _default_client().flush(*args, **kwargs)

    def join():
        """End the sender; see `Client.join`."""
        if default_client is not None:
            default_client.join()

    def shutdown(*args, **kwargs):
        """Flush, end the sender, close the files; see `Client.shutdown`."""
        if default_client is None and globals()["write_key"] is None:
            return True  # it was never set up
        return _default_client().shutdown(*args, **kwargs)

    def stats():
        """The outbox as it is now; see `Client.stats`."""
        return _default_client().stats()


class _Unloaded:
    """What stands in for the client while its modules can't be loaded, as where no descriptor is left for them.

    Or while another thread is making it.  It accepts nothing, and raises nothing.
    """

    _log, _told = _Limiter(60.0, _SystemClock()), _Limiter(1.0, _SystemClock())

    def __init__(self, problem: OutboxError) -> None:
        self._problem = problem

    def __getattr__(self, name: str) -> Callable[..., tuple[bool, dict[str, Any]]]:
        """`track` and the other calls that take an event; there is no message of it."""
        return lambda *_, **__: (self._refuse(), {})

    def flush(self, timeout: float | None = None) -> bool:
        times = self._log.tick()
        if times:
            _get_log("client").error("no event is accepted or sent (%d calls so far): %s", times, self._problem)
        return False

    shutdown = flush

    def stats(self) -> OutboxStats:
        raise self._problem

    def _refuse(self) -> bool:
        on_error = globals()["on_error"]
        if on_error is not None and self._told.tick():
            _call(on_error, "on_error", self._problem, [])
        return self.flush()


def _default_client() -> Client | _Unopened | _Unloaded:
    client = default_client
    if client is not None:
        return client
    try:
        return _make_client()
    except ModuleNotFoundError:  # it is not installed
        raise
    except (OSError, ImportError) as problem:  # the latter where it is a library that can't be loaded
        if _from_signal(problem):
            raise
        reason = problem.strerror if isinstance(problem, OSError) else problem
        return _Unloaded(StorageError(f"the package can't be loaded: {reason}", "SQLITE_CANTOPEN"))
    except OutboxBusy as problem:
        return _Unloaded(problem)


def _make_client() -> Client | _Unopened:
    global default_client, _unopened
    with _loading():
        from segment_durable.client import Client as _Client
        from segment_durable.unopened import Unopened as _Unopened

    make = globals().get("Client", _Client)  # which a test may have put something else into
    with _lock:
        if default_client is not None:
            return default_client
        settings = {name: globals()[name] for name in DEFAULTS}
        if _unopened is None or _unopened.is_over or _unopened.settings != settings:
            try:
                default_client, _unopened = make(**settings), None
                return default_client
            except (OutboxUnavailable, OutboxBusy, StorageError) as problem:
                _unopened = _Unopened(settings, problem)
        return _unopened


if not TYPE_CHECKING:  # a misspelt name is to be found

    def __getattr__(name: str) -> Any:
        if name == "Client":
            with _loading():
                from segment_durable.client import Client

            globals()["Client"] = Client
            return Client
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
