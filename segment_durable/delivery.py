"""One step of delivery: lease, batch, upload, decide, and ack, release or bury.  No thread, no sleep."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from segment_durable.answers import Kind, Outcome
from segment_durable.batch import MAX_BATCH_BYTES, Batch, pack
from segment_durable.clock import Clock
from segment_durable.config import Config
from segment_durable.errors import DeliveryError, EventsExpired, OutboxError
from segment_durable.outbox import Outbox
from segment_durable.records import Backoff, Lease, NotNow
from segment_durable.retry import Action, Decision, RetryPolicy
from segment_durable.upload import Uploader

__all__ = ["Delivery", "Reporter", "Step"]

log = logging.getLogger("segment.durable.delivery")

_DEAD_LETTERS_FULL_WAIT = 60.0  # seconds
_EXPIRE_EVERY = 1.0  # seconds


class Reporter:
    """Where a delivery says what happened, always after the commit.  The base class says nothing."""

    def failed(self, error: Exception, bodies: Sequence[bytes]) -> None:
        """The retry budget of these events is used up, or they expired.  `bodies`: joined JSON messages."""

    def delivered(self, events: bytes) -> None:
        """These events, joined by commas, were taken by the receiver and have left the outbox."""


@dataclass(frozen=True)
class Step:
    """What one step did.

    `kind`: "delivered", "buried", "split" or "lost" (the lease was lost) mean that the next step can follow at once;
    "failed", "backoff", "leased" and "empty" that it should wait: `seconds`, or for an event if that is `None`.
    """

    kind: str
    count: int = 0  # events that left
    seconds: float | None = 0.0
    exhausted: bool = False  # the retry budget is used up

    @property
    def progress(self) -> bool:
        return self.kind in ("delivered", "buried", "split", "lost")


class Delivery:
    """Delivers the events of one outbox, a request a step; used by one thread at a time."""

    def __init__(
        self,
        outbox: Outbox,
        uploader: Uploader,
        config: Config,
        clock: Clock,
        random: Callable[[], float],
        reporter: Reporter,
    ) -> None:
        self._outbox = outbox
        self._uploader = uploader
        self._config = config
        self._clock = clock
        self._random = random
        self._reporter = reporter
        self._policy = RetryPolicy(
            config.max_retries, config.max_total_backoff_duration, config.max_rate_limit_duration
        )
        assert config.write_key is not None
        self._write_key = config.write_key
        self._lease: Lease | None = None
        # Ranges of ids within the lease, the next one last; more than one while a refused batch is being halved.
        self._work: list[tuple[int, int]] = []
        self._delivered: Batch | None = None  # taken by the receiver, not yet acknowledged in the outbox
        self._next_expiry = 0.0
        self._odd_answer = ""

    def step(self, *, hurry: bool = False, within: float | None = None) -> Step:
        """Do one thing.  Raises `OutboxError` if the outbox fails; the next step then takes up where this one was.

        `hurry`: go before the end of a backoff, unless the receiver asked for it.  `within`: seconds that each wait
        for the network may take, if less than the `timeout` setting.
        """
        if self._delivered is not None:
            return self._ack(self._delivered)
        if self._lease is None:
            self._expire()
            found = self._outbox.lease(
                self._config.upload_size, self._config.lease, max_leases=self._config.thread, hurry=hurry
            )
            if isinstance(found, NotNow):
                return Step(found.reason, seconds=found.seconds, exhausted=found.exhausted)
            self._lease = found
            self._work = [(found.first, found.last)]
        batch = self._next_batch()
        if batch is None:
            return Step("lost")
        outcome = self._uploader.upload(batch.events, self._lease.attempt, within=within)
        if outcome.kind is Kind.DELIVERED:
            self._note_odd_answer(outcome)
            self._delivered = batch
            return self._ack(batch)
        before = self._outbox.backoff()
        decision = self._policy.decide(outcome, batch.count, before, self._clock.boot(), self._random)
        log.debug("batch of %d events: %s", batch.count, decision.reason)
        if decision.action is Action.SPLIT:
            return self._split(batch)
        if decision.action is Action.BURY:
            return self._bury(batch, outcome, before)
        return self._release(batch, outcome, decision)

    def close(self) -> None:
        """Give up what is leased and close the connections."""
        if self._delivered is not None:
            with contextlib.suppress(OutboxError):
                self._ack(self._delivered)
        lease = self._drop()
        if lease is not None:
            try:
                self._outbox.release(lease)
            except OutboxError:
                self._outbox.forget(lease)
        self._uploader.close()

    # -- inside

    def _next_batch(self) -> Batch | None:
        assert self._lease is not None
        lease = self._lease
        if lease.deadline - self._clock.boot() < self._config.lease / 2:
            extended = self._outbox.extend(lease, self._config.lease)
            if extended is None:
                self._drop()
                return None
            self._lease = lease = extended
        first, last = self._work[-1]
        rows = self._outbox.rows(first, last, MAX_BATCH_BYTES)
        if not rows:  # only a lost lease lets somebody else take them away
            self._drop()
            self._outbox.release(lease)
            return None
        return pack(rows, self._write_key, self._config.upload_size)

    def _ack(self, batch: Batch) -> Step:
        assert self._lease is not None
        deleted = self._outbox.ack(self._lease, batch.last)
        self._delivered = None
        if deleted is None:
            self._drop()
            return Step("lost")
        self._done_through(batch.last)
        self._reporter.delivered(batch.events)
        return Step("delivered", deleted)

    def _split(self, batch: Batch) -> Step:
        _, last = self._work.pop()
        rows = self._outbox.rows(batch.first, batch.last)
        middle = rows[(len(rows) - 1) // 2].id
        if batch.last < last:
            self._work.append((batch.last + 1, last))
        self._work += [(middle + 1, batch.last), (batch.first, middle)]
        return Step("split")

    def _bury(self, batch: Batch, outcome: Outcome, before: Backoff) -> Step:
        assert self._lease is not None
        buried = self._outbox.bury(
            self._lease,
            batch.last,
            status=outcome.status,
            code=outcome.code,
            answer=outcome.answer,
            max_dead=self._config.max_dead_letters,
        )
        if buried is None:
            self._drop()
            return Step("lost")
        if not buried:
            message = (
                f"{self._config.max_dead_letters} dead letters are kept (max_dead_letters) and another event was "
                "refused: delivery waits until some are requeued or erased"
            )
            after = replace(before, not_before=self._clock.boot() + _DEAD_LETTERS_FULL_WAIT, told=False, reported=True)
            full = Outcome(outcome.kind, outcome.status, "dead_letters_full", message)
            return self._release(batch, full, Decision(Action.WAIT, message, after, exhausted=not before.reported))
        self._done_through(batch.last)
        log.warning("an event was refused by itself (%d, %s): it is kept in the dead letters", *_said(outcome))
        self._reporter.failed(DeliveryError(outcome.status, outcome.code, outcome.message), [batch.events])
        return Step("buried", 1)

    def _release(self, batch: Batch, outcome: Outcome, decision: Decision) -> Step:
        assert decision.backoff is not None
        error = DeliveryError(outcome.status, outcome.code, outcome.message)
        backoff = replace(decision.backoff, last_error=str(error), last_error_at=self._clock.time())
        lease = self._drop()
        assert lease is not None
        try:
            released = self._outbox.release(lease, backoff)
        except OutboxError:
            self._outbox.forget(lease)
            raise
        if not released:
            return Step("lost")
        if decision.exhausted:
            log.error("not delivered, the events stay in the outbox and are tried on: %s", error)
            self._reporter.failed(error, [batch.events])
        else:
            log.info("not delivered, will be tried again: %s", error)
        return Step("failed", seconds=backoff.not_before - self._clock.boot(), exhausted=backoff.reported)

    def _expire(self) -> None:
        if self._config.max_age is None or self._clock.boot() < self._next_expiry:
            return
        self._next_expiry = self._clock.boot() + _EXPIRE_EVERY
        while bodies := self._outbox.expire(self._clock.time() - self._config.max_age):
            error = EventsExpired(len(bodies), self._config.max_age)
            log.error("%s", error)
            self._reporter.failed(error, bodies)

    def _done_through(self, event_id: int) -> None:
        """Everything up to that event has left; what remains of the lease is still ours."""
        _, last = self._work.pop()
        if event_id < last:
            self._work.append((event_id + 1, last))
        if not self._work:
            self._lease = None

    def _drop(self) -> Lease | None:
        lease, self._lease = self._lease, None
        self._work.clear()
        self._delivered = None
        return lease

    def _note_odd_answer(self, outcome: Outcome) -> None:
        """A 2xx is a 2xx, but one that is a web page comes from a proxy or a wrong host: said once."""
        kind = outcome.content_type.partition(";")[0].strip().lower()
        if kind == "text/html" and kind != self._odd_answer:
            self._odd_answer = kind
            log.warning(
                "the host answered %d with a page of type %s: check that `host` is Segment's", outcome.status, kind
            )


def _said(outcome: Outcome) -> tuple[int, str]:
    return outcome.status, outcome.code
