"""What the clients of one process share for one outbox: the outbox itself, its sender and its upkeep.

All that a sender needs is imported here and not by its thread: a child forked in the middle of an import waits for
ever for the import's lock.
"""

from __future__ import annotations

import json
import os
import random
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from segment_durable.clock import Clock
from segment_durable.config import Config
from segment_durable.delivery import Delivery, Reporter
from segment_durable.errors import ConfigError, OutboxDamaged, OutboxError, OutboxFull, OutboxUnavailable
from segment_durable.limiter import Limiter
from segment_durable.logs import call, get_log
from segment_durable.outbox import Outbox, other_source
from segment_durable.sender import Sender
from segment_durable.transport import RequestsTransport
from segment_durable.upkeep import Upkeep
from segment_durable.upload import Uploader

if TYPE_CHECKING:
    from segment_durable.oauth import Tokens

__all__ = ["Engine", "Member", "items_of"]

log = get_log("")

_MOVE_PATIENCE = 10.0  # seconds

# What decides where and as whom events are sent: clients that share an outbox must agree on it.
_MUST_AGREE = (
    *("host", "oauth_client_id", "oauth_client_key", "oauth_key_id", "oauth_auth_server", "oauth_scope"),
    "synchronous",
)
# What the first client decides for all.
_FIRST_DECIDES = (
    *("gzip", "max_retries", "timeout", "proxies", "thread", "upload_size", "upload_interval", "lease_seconds"),
    *("max_total_backoff_duration", "max_rate_limit_duration", "max_age", "max_dead_letters"),
)


class Member:
    """A client's share in an engine: its settings.  The engine refers to it weakly."""

    def __init__(self, config: Config) -> None:
        self.config = config


class Engine:
    """One outbox in this process.  Made by `process.attach`."""

    def __init__(self, config: Config, clock: Clock, *, key: str, on_gone: Callable[[Engine], None]) -> None:
        self.key = key  # which outbox it is, among those of this process
        self.pid = os.getpid()
        self.closed = False
        self.successor: Engine | None = None  # that has its clients now
        self.config = config
        self.clock = clock
        self._tokens: Tokens | None = _tokens(config, clock)
        self._members: set[weakref.ref[Member]] = set()
        self._is_first_gone = False  # the client whose `config` this is was shut down
        self.outbox = Outbox(config.outbox_path, clock, full=config.synchronous == "FULL", write_key=config.write_key)
        self.upkeep = Upkeep(self.outbox.db, clock)
        self.upkeep.on_gone = lambda: on_gone(self)
        self.reporter = _Callbacks(self)
        self.sender = Sender(self.outbox, config, clock, self._make_delivery)
        self._limit = 0
        self._full_log, self._full_call = Limiter(60.0, clock), Limiter(1.0, clock)
        self._trouble_log, self._trouble_call = Limiter(60.0, clock), Limiter(1.0, clock)
        self.outbox.db.damage.on_damaged = self._damaged

    @property
    def latest(self) -> Engine:
        """The one that has its clients now: this one, unless it has a successor."""
        return self if self.successor is None else self.successor.latest

    @property
    def members(self) -> list[Member]:
        """The clients that are there still."""
        # Copied in one step of the interpreter's, for others come and go meanwhile.
        return [member for each in list(self._members) if (member := each()) is not None]

    def join(self, member: Member) -> list[str]:
        """Let a client in; the names of its settings that do not hold, for those of the first client do.

        Raises `ConfigError` or `SourceMismatch` if it can't share this outbox.
        """
        if member.config.write_key != self.config.write_key:
            raise other_source(self.outbox.db.folder)
        name = self._contested(member)
        if name is not None:
            raise ConfigError(
                name,
                "differs from that of another client on the same outbox in this process: "
                "give this client an outbox_dir of its own",
            )
        self._members.add(weakref.ref(member, self._members.discard))
        return [n for n in _FIRST_DECIDES if getattr(member.config, n) != getattr(self.config, n)]

    def is_forsaken_for(self, member: Member) -> bool:
        """Whether a client's settings can't be met, and all whose these are were collected without a shutdown."""
        return not self.members and self._contested(member) is not None

    def _contested(self, member: Member) -> str | None:
        return next((n for n in _MUST_AGREE if getattr(member.config, n) != getattr(self.config, n)), None)

    def leave(self, member: Member) -> bool:
        """A client was shut down; whether it was the last."""
        if all(each is member for each in self.members):
            return True  # and it stays, for there may be something to be told at the end
        self._members.discard(weakref.ref(member))
        self._is_first_gone = self._is_first_gone or member.config is self.config
        return False

    def put(self, body: bytes, appended_at: int, config: Config) -> bool | None:
        """Append; whether it was accepted, or None if this engine has been closed: then another is to be attached.

        Raises nothing for what the disk does.
        """
        try:
            accepted = self.outbox.put(body, appended_at, config.max_queue_size)
        except OutboxError as problem:
            if self.closed:
                return None
            self.upkeep.written()  # the files may be in another place, which it looks for
            self._refused(problem, body)
            return False
        if not accepted:
            self._full(config.max_queue_size, body)
            return False
        return True

    def has_pending(self) -> bool:
        """Whether there may be something to deliver: also where that can't be read, which the sender then reports."""
        try:
            return self.outbox.first_id() is not None
        except OutboxError:
            return True

    def deliver_now(self) -> bool:
        """`sync_mode`: deliver in the calling thread up to the last event, one failed attempt at most."""
        try:
            end = self.clock.boot() + 2 * self.config.timeout
            return self.sender.drain(self.outbox.last_id(), end, tell=True)
        except OutboxError as problem:
            if not self.closed:  # by another thread; the event is on disk
                self._refused(problem)
            return False

    def close(self, timeout: float) -> bool:
        """End the threads and close the files; whether the threads ended within `timeout` seconds."""
        self.closed = True
        self._tell_rest()
        end = self.clock.boot() + timeout

        def close_files() -> None:
            self.upkeep.stop(max(0.0, end - self.clock.boot()))
            self.outbox.close(max(0.05, end - self.clock.boot()))

        return self.sender.close(timeout, close_files)

    @property
    def delivers(self) -> bool:
        """Whether any client has it deliver."""
        return self.sender.is_running or any(
            config.deliver and config.send for config in (self.config, *(each.config for each in self.members))
        )

    def hand_over(self, successor: Engine) -> None:
        """The files of this one were deleted while they were in use: what waits in them goes into the successor's.

        Raises `OutboxError` if that fails: then this one is as it was, but for being closed to new events.
        """
        moved = 0
        db = self.outbox.db
        is_adrift = db.connections.is_adrift
        try:
            if not is_adrift and not db.is_same_as(successor.outbox.db):
                # Not before all has been moved: an event that went straight to the successor would come before others.
                moved = self.outbox.move_to(successor.outbox, self._close_to_events)
        finally:
            self._close_to_events()
        told = OutboxUnavailable(
            self.outbox.db.folder,
            "was deleted or renamed while it was in use, or a link in its path was changed: there is a new one, "
            + ("without what waited, for a fork came between" if is_adrift else f"with the {moved} events that waited"),
        )
        log.error("%s", told)
        successor.reporter.call_on_error(told, [])
        if self.sender.is_running:
            successor.sender.start()
        self.close(0.0)

    def _close_to_events(self) -> None:
        self.closed = True

    def wait_until_closed(self, end: float | None) -> bool:
        """For what is in here to be with the successor, until `end` (boot clock), which `None` puts off to 10 s."""
        end = self.clock.boot() + _MOVE_PATIENCE if end is None else end
        while not self.closed:
            remaining = end - self.clock.boot()
            if remaining <= 0:
                return False
            self.clock.wait(threading.Event(), min(0.01, remaining))
        return True

    def complain(self, problem: ConfigError | OutboxError) -> None:
        """Tell, once in a while, of what keeps the outbox from being used."""
        self._refused(problem)

    def callbacks(self, name: str) -> list[Callable[..., object]]:
        """The callbacks that the clients gave for `name`, each once; those of one that was collected as well."""
        found: list[Callable[..., object]] = []
        first = [] if self._is_first_gone else [self.config]
        for config in (*first, *(member.config for member in self.members)):
            callback = getattr(config, name)
            if callback is not None and not any(callback == each for each in found):
                found.append(callback)
        return found

    def _make_delivery(self) -> Delivery:
        uploader = Uploader(self.config, RequestsTransport(self.config.proxies), self._tokens, self.clock)
        # Not the module's generator: forked children share its state, and would all retry at the same moments.
        return Delivery(self.outbox, uploader, self.config, self.clock, random.SystemRandom().random, self.reporter)

    def _full(self, limit: int, body: bytes) -> None:
        self._limit = limit
        self._tell_full(self._full_log.tick(), self._full_call.tick(), body)

    def _tell_full(self, logged: int, called: int, body: bytes) -> None:
        """Tell of so many refused events, in the log and to `on_error`; 0: not there."""
        if logged:
            log.warning(
                "the outbox is full (max_queue_size=%d, 0 means no limit): events refused since last told: %d",
                self._limit,
                logged,
            )
        if called:
            self.reporter.failed(OutboxFull(self._limit, called), [body])

    def _tell_rest(self) -> None:
        """At the end: what was kept back because so much of it had just been told."""
        self._tell_full(self._full_log.rest(), self._full_call.rest(), b"")
        times = self._trouble_log.rest()
        if times:
            log.error("the outbox could not be written %d more times", times)

    def _damaged(self, problem: OutboxDamaged) -> None:
        log.error("%s", problem)
        self.reporter.call_on_error(problem, [])

    def _refused(self, problem: ConfigError | OutboxError, body: bytes = b"") -> None:
        times = self._trouble_log.tick()
        if times:
            log.error("the outbox can't be written (%d times): %s", times, problem)
        if self._trouble_call.tick():
            self.reporter.failed(problem, [body])


class _Callbacks(Reporter):
    """Calls the users' callbacks.  What they raise is logged and changes nothing."""

    def __init__(self, engine: Engine) -> None:
        self._engine = weakref.ref(engine)

    def failed(self, error: Exception, bodies: Sequence[bytes]) -> None:
        engine = self._engine()
        if engine is not None and engine.callbacks("on_error"):
            self.call_on_error(error, items_of(b",".join(bodies)))

    def delivered(self, events: bytes) -> None:
        engine = self._engine()
        callbacks = engine.callbacks("on_success") if engine is not None else []
        for callback in callbacks:
            call(callback, "on_success", items_of(events))

    def call_on_error(self, error: Exception, items: list[dict[str, Any]]) -> None:
        engine = self._engine()
        for callback in engine.callbacks("on_error") if engine is not None else []:
            call(callback, "on_error", error, items)


def items_of(events: bytes) -> list[dict[str, Any]]:
    """What the callbacks get of messages that are joined by commas."""
    try:
        items: list[dict[str, Any]] = json.loads(b"[%b]" % events)
    except (ValueError, RecursionError):  # a damaged page may have changed what was stored: SQLite does not see that
        log.error("what was stored of these events is damaged, and no JSON: the callbacks are called without them")
        return []
    return items


def _tokens(config: Config, clock: Clock) -> Tokens | None:
    if not config.uses_oauth:
        return None
    from segment_durable.oauth import Tokens

    return Tokens(config, clock)
