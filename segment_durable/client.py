"""The client: the calls of `segment.analytics`, each thin, over a shared engine."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from datetime import datetime
from os import getpid
from time import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from segment_durable import process
from segment_durable.clock import SystemClock
from segment_durable.config import DEFAULTS, FOREVER, Config
from segment_durable.encoding import plain
from segment_durable.engine import Engine, Member, items_of
from segment_durable.errors import ConfigError, OutboxError
from segment_durable.interrupts import from_signal
from segment_durable.limiter import Limiter
from segment_durable.logs import call, get_log
from segment_durable.message import compose, encode_message
from segment_durable.records import NO_EVENTS, OutboxStats

if TYPE_CHECKING:  # a client has each setting under its name
    from segment_durable.config import Settings as _Settings
else:
    _Settings = object

__all__ = ["Client"]

log = get_log("client")

Result = tuple[bool, dict[str, Any]]
Identifier = Any  # a str, a number or a UUID; checked at run time


class Client(_Settings):
    """Takes events into the outbox of one source and has them delivered.

    The settings are those of segment-analytics-python's `Client`, in its order, and some more; `docs/settings.md`
    describes each.  Raises `ConfigError` for a wrong setting and an `OutboxError` if the outbox can't be used:
    `OutboxUnavailable`, `NotAnOutbox`, `SourceMismatch`, or `OutboxBusy` if others keep it locked for five seconds.

    The calls return `(accepted, message)`.  `accepted` is True once the message is committed to the outbox; it is
    False, with nothing stored, if `max_queue_size` events are waiting or the disk refuses the write.  They raise
    `InvalidMessage` for a wrong argument and `MessageTooLarge` for a message over 32 KiB, and nothing else.

    A client may be used from all threads, and on both sides of a fork.  Clients of a process that use the same outbox
    share its connection and its sender.
    """

    def __init__(
        self,
        write_key: str | None = None,
        host: str | None = None,
        debug: bool = DEFAULTS["debug"],
        max_queue_size: int = DEFAULTS["max_queue_size"],
        send: bool = DEFAULTS["send"],
        on_error: Callable[[Exception, list[dict[str, Any]]], object] | None = None,
        gzip: bool = DEFAULTS["gzip"],
        max_retries: int = DEFAULTS["max_retries"],
        sync_mode: bool = DEFAULTS["sync_mode"],
        timeout: float = DEFAULTS["timeout"],
        proxies: Mapping[str, str | None] | None = None,
        thread: int = DEFAULTS["thread"],
        upload_size: int = DEFAULTS["upload_size"],
        upload_interval: float = DEFAULTS["upload_interval"],
        log_handler: logging.Handler | None = None,
        oauth_client_id: str | None = None,
        oauth_client_key: str | bytes | os.PathLike[str] | None = None,
        oauth_key_id: str | None = None,
        oauth_auth_server: str = DEFAULTS["oauth_auth_server"],
        oauth_scope: str = DEFAULTS["oauth_scope"],
        max_total_backoff_duration: float = DEFAULTS["max_total_backoff_duration"],
        max_rate_limit_duration: float = DEFAULTS["max_rate_limit_duration"],
        *,
        outbox_dir: str | os.PathLike[str] | None = None,
        deliver: bool = DEFAULTS["deliver"],
        synchronous: str = DEFAULTS["synchronous"],
        lease_seconds: float = DEFAULTS["lease_seconds"],
        shutdown_timeout: float = DEFAULTS["shutdown_timeout"],
        max_age: float | None = None,
        max_dead_letters: int = DEFAULTS["max_dead_letters"],
        on_success: Callable[[list[dict[str, Any]]], object] | None = None,
        before_send: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None,
    ) -> None:
        settings = {name: value for name, value in locals().items() if name in DEFAULTS}
        self._config = config = Config(**settings)
        self._member = Member(config)
        self._engine: Engine | None = None
        self._was_flushed = True  # by the last shutdown
        self._trouble = Limiter(1.0, SystemClock())
        self._flush_trouble = Limiter(60.0, SystemClock())
        segment_log = logging.getLogger("segment")
        if config.log_handler is not None:
            segment_log.addHandler(config.log_handler)
        if config.debug:
            segment_log.setLevel(logging.DEBUG)
        if config.send:
            engine = self._attach()
            if self._delivers and engine.has_pending():
                engine.sender.start()  # what an earlier process left

    def identify(
        self,
        user_id: Identifier = None,
        traits: dict[Any, Any] | None = None,
        context: dict[Any, Any] | None = None,
        timestamp: datetime | None = None,
        anonymous_id: Identifier = None,
        integrations: dict[Any, Any] | None = None,
        message_id: Identifier = None,
    ) -> Result:
        """Tie a user to their traits."""
        return self._enqueue("identify", (traits,), user_id, anonymous_id, context, timestamp, integrations, message_id)

    def track(
        self,
        user_id: Identifier = None,
        event: str | None = None,
        properties: dict[Any, Any] | None = None,
        context: dict[Any, Any] | None = None,
        timestamp: datetime | None = None,
        anonymous_id: Identifier = None,
        integrations: dict[Any, Any] | None = None,
        message_id: Identifier = None,
    ) -> Result:
        """Record what a user did."""
        return self._enqueue(
            "track", (event, properties), user_id, anonymous_id, context, timestamp, integrations, message_id
        )

    def alias(
        self,
        previous_id: Identifier = None,
        user_id: Identifier = None,
        context: dict[Any, Any] | None = None,
        timestamp: datetime | None = None,
        integrations: dict[Any, Any] | None = None,
        message_id: Identifier = None,
    ) -> Result:
        """Say that two ids are the same user."""
        return self._enqueue("alias", (previous_id,), user_id, None, context, timestamp, integrations, message_id)

    def group(
        self,
        user_id: Identifier = None,
        group_id: Identifier = None,
        traits: dict[Any, Any] | None = None,
        context: dict[Any, Any] | None = None,
        timestamp: datetime | None = None,
        anonymous_id: Identifier = None,
        integrations: dict[Any, Any] | None = None,
        message_id: Identifier = None,
    ) -> Result:
        """Tie a user to a group, and the group to its traits."""
        return self._enqueue(
            "group", (group_id, traits), user_id, anonymous_id, context, timestamp, integrations, message_id
        )

    def page(
        self,
        user_id: Identifier = None,
        category: str | None = None,
        name: str | None = None,
        properties: dict[Any, Any] | None = None,
        context: dict[Any, Any] | None = None,
        timestamp: datetime | None = None,
        anonymous_id: Identifier = None,
        integrations: dict[Any, Any] | None = None,
        message_id: Identifier = None,
    ) -> Result:
        """Record that a user saw a page."""
        return self._enqueue(
            "page", (category, name, properties), user_id, anonymous_id, context, timestamp, integrations, message_id
        )

    def screen(
        self,
        user_id: Identifier = None,
        category: str | None = None,
        name: str | None = None,
        properties: dict[Any, Any] | None = None,
        context: dict[Any, Any] | None = None,
        timestamp: datetime | None = None,
        anonymous_id: Identifier = None,
        integrations: dict[Any, Any] | None = None,
        message_id: Identifier = None,
    ) -> Result:
        """Record that a user saw a screen of an app."""
        return self._enqueue(
            "screen", (category, name, properties), user_id, anonymous_id, context, timestamp, integrations, message_id
        )

    def flush(self, timeout: float | None = None) -> bool:
        """Deliver what is pending now; True if all of it has left the outbox.

        `timeout`: seconds to wait for that, 0: only says whether it has, and starts nothing.  `None` waits until it is
        done or the retry budget of a batch is used up (`max_retries`, `max_total_backoff_duration`,
        `max_rate_limit_duration`); a number ends then, too, but for a rate limit that is over within that time.  With
        `deliver=False` the events are another process's to deliver: `None` does not wait for that, a number does.
        With `send=False` it is True.

        Where nothing was tracked yet it starts the sender, which delivers what other processes append.
        """
        return self._flush_all(_checked(timeout), start=True)

    def _flush_all(self, timeout: float | None, *, start: bool) -> bool:
        if not self._config.send:
            return True
        end = None
        while True:
            engine = None
            try:
                engine = self._live()
                if start and timeout != 0 and self._delivers:
                    engine.sender.start()
                if timeout is not None:
                    now = engine.clock.boot()
                    end = now + timeout if end is None else end
                    timeout = max(0.0, end - now)
                generation = engine.outbox.generation
                flushed = self._flush(engine, timeout)
                # That outbox may be empty because all was moved, or is just being moved; and one that has taken a
                # damaged one's place may have given some events other ids.
                if flushed and engine.successor is not None and not engine.wait_until_closed(end):
                    return False
                if flushed and (engine.successor is not None or engine.outbox.generation != generation):
                    continue
                return flushed
            except (OutboxError, ConfigError) as problem:
                if engine is not None and engine.closed:
                    continue  # by another thread's shutdown(): its files are closed, so another one is attached
                times = self._flush_trouble.tick()
                if times:
                    log.error("flush (%d times): %s", times, problem)
                return False

    def join(self) -> None:
        """End the sender once the upload that it is at is over; does not flush.  A later call starts it again."""
        engine = self._engine
        if engine is not None and engine.pid == getpid():
            engine.latest.sender.stop(2 * self._config.timeout, _nothing)

    def shutdown(self, timeout: float | None = None) -> bool:
        """Flush, end the sender and close the files; True if all that was pending has left the outbox.

        `timeout`: seconds for all of that; what is left then stays on disk and goes out at the next start.  `None`
        and 0 as for `flush`.  Called again it does nothing, and returns the same; a later call of another method opens
        everything again.
        """
        timeout = _checked(timeout)
        engine = self._engine
        if engine is None:
            return self._was_flushed
        clock = engine.clock
        end = None if timeout is None else clock.boot() + timeout
        flushed = self._was_flushed = self._flush_all(timeout, start=False)
        if self._engine is not None and self._engine.pid != getpid():
            return flushed  # the parent's, from before a fork: nothing could be attached here
        engine, self._engine = self._engine, None
        if engine is not None:
            patience = 2 * self._config.timeout if end is None else max(0.0, end - clock.boot())
            process.detach(engine, self._member, patience)
        return flushed

    def stats(self) -> OutboxStats:
        """The outbox as it is now, for all processes on it.  Raises `OutboxError` if it can't be read.

        With `send=False` there is none, and all is 0.
        """
        if not self._config.send:
            return NO_EVENTS
        return self._live().outbox.stats()

    if not TYPE_CHECKING:  # a misspelt name is to be found

        def __getattr__(self, name: str) -> Any:
            """The settings, under their names, as segment-analytics-python has them."""
            if name in DEFAULTS:
                return getattr(self._config, name)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

        def __setattr__(self, name: str, value: object) -> None:
            if name in DEFAULTS:
                raise AttributeError(f"{name} is settled when a client is made: make another one")
            object.__setattr__(self, name, value)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _flush(self, engine: Engine, timeout: float | None) -> bool:
        if self._delivers:
            return engine.sender.flush(timeout)
        target = engine.outbox.last_id()
        if self._config.deliver:  # sync_mode
            return engine.sender.drain(target, None if timeout is None else engine.clock.boot() + timeout, tell=True)
        return engine.sender.wait_for_others(target, timeout or 0.0)

    @property
    def _delivers(self) -> bool:
        """Whether a sender thread delivers for this client."""
        return self._config.deliver and self._config.send and not self._config.sync_mode

    def _attach(self) -> Engine:
        self._engine = engine = process.attach(self._member)
        return engine

    def _live(self) -> Engine:
        engine = self._engine
        if engine is None or engine.closed or engine.pid != getpid():
            return self._attach()
        return engine

    def _enqueue(
        self,
        kind: str,
        values: tuple[Any, ...],
        user_id: Identifier,
        anonymous_id: Identifier,
        context: dict[Any, Any] | None,
        timestamp: datetime | None,
        integrations: dict[Any, Any] | None,
        message_id: Identifier,
    ) -> Result:
        now = time()
        message = compose(kind, values, user_id, anonymous_id, context, timestamp, integrations, message_id, now)
        config = self._config
        if config.before_send is None:
            body = encode_message(message, (values[-1] if kind != "alias" else None, context, integrations))
        else:
            chosen = self._before_send(message)
            if chosen is None:
                return False, message
            message = chosen
            body = encode_message(message)
        if not config.send:
            return self._unsent(message, body)
        engine = self._engine
        try:
            if engine is None or engine.pid != getpid():
                engine = self._attach()
            while (accepted := engine.put(body, int(now * 1000), config)) is None:
                engine = self._attach()  # another thread has just shut down what this one was about to use
        except (OutboxError, ConfigError) as problem:  # ConfigError: another client has opened it otherwise meanwhile
            self._unattached(problem, body)
            return False, message
        if not accepted:
            return False, message
        if log.logger.isEnabledFor(logging.DEBUG):
            log.debug("enqueued %s %s", kind, message.get("messageId"))
        if config.sync_mode and config.deliver:
            engine.deliver_now()
        elif config.deliver:
            engine.sender.appended()
            if engine.closed:
                self._resume()
        return True, message

    def _unsent(self, message: dict[str, Any], body: bytes) -> Result:
        """`send=False`."""
        return True, message

    def _resume(self) -> None:
        """Another thread shut the client down while this one appended: the event is not to wait for the next call."""
        try:
            self._live().sender.start()
        except (OutboxError, ConfigError) as problem:
            log.error("the event is on disk and waits for the next start: %s", problem)

    def _unattached(self, problem: OutboxError | ConfigError, body: bytes) -> None:
        """The outbox was fine at construction and can't be opened again now, in a forked child or after a shutdown."""
        times = self._trouble.tick()
        if times:
            log.error("the outbox can't be opened (%d times): %s", times, problem)
            if self._config.on_error is not None:
                call(self._config.on_error, "on_error", problem, items_of(body))

    def _before_send(self, message: dict[str, Any]) -> dict[str, Any] | None:
        """What the user's hook makes of a copy of the message; the message as it was if the hook fails."""
        assert self._config.before_send is not None
        message = plain(message)  # which uses up generators, so the copy for the hook is one of this
        try:
            made: Any = self._config.before_send(plain(message))
        except (Exception, SystemExit) as problem:
            if from_signal(problem):
                raise
            log.exception("before_send raised; the message is taken as it was")
            return message
        if made is None or isinstance(made, dict):
            return made
        log.error("before_send must return a dict or None, not %s; the message is taken as it was", type(made).__name__)
        return message


def _checked(timeout: float | None) -> float | None:
    if timeout is None:
        return None
    if not isinstance(timeout, (int, float)) or timeout != timeout:
        raise ConfigError("timeout", f"must be a number of seconds or None, not {type(timeout).__name__}")
    return float(max(0, min(timeout, FOREVER)))  # before that an int may be of any length


def _nothing() -> None:
    pass
