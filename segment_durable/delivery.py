"""One step of delivery: lease, batch, upload, decide, and ack, release or bury.  No thread, no sleep."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from segment_durable.answers import Kind, Outcome, is_page
from segment_durable.batch import MAX_BATCH_BYTES, Batch, pack, room
from segment_durable.clock import Clock
from segment_durable.config import Config
from segment_durable.errors import DeliveryError, EventsExpired, OutboxError
from segment_durable.logs import get_log
from segment_durable.outbox import Outbox
from segment_durable.records import Backoff, Lease, NotNow
from segment_durable.retry import Action, RetryPolicy, action, put_off
from segment_durable.upload import Uploader

__all__ = ["Delivery", "Reporter", "Step"]

log = get_log("delivery")

_DEAD_LETTERS_FULL_WAIT = 60.0  # seconds
_EXPIRE_EVERY = 1.0  # seconds
_BATCHES_A_LEASE = 4  # that one sender takes at once, where it is the only one
_JOIN_AT_MOST = 500  # events that are joined before it is known that they fit: 16 MB at the worst


class Reporter:
    """Where a delivery says what happened, always after the commit.  The base class says nothing."""

    def failed(self, error: Exception, bodies: Sequence[bytes]) -> None:
        """The retry budget of these events is used up, or they expired; where each is to be told, an attempt failed.

        `bodies`: joined JSON messages.
        """

    def delivered(self, events: bytes) -> None:
        """These events, joined by commas, were taken by the receiver and have left the outbox."""


@dataclass(frozen=True)
class _Failure:
    """An attempt that delivered nothing, and what follows from it."""

    error: DeliveryError
    change: Callable[[Backoff], Backoff]  # of the shared backoff
    events: bytes


@dataclass(frozen=True)
class Step:
    """What one step did.

    `kind`: "delivered", "buried", "split" or "lost" (the lease was lost) mean that the next step can follow at once;
    "failed", "backoff", "leased" and "empty" that it should wait: `seconds`, or for an event if that is `None`.
    """

    kind: str
    count: int = 0  # events that left
    seconds: float | None = 0.0
    exhausted: bool = False  # the retry budget of what is waited for is used up
    told: bool = False  # the receiver has said when to come again
    through: int | None = None  # all events up to that id have left, if that is known

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
        self._room = room(config.write_key)
        self._lease: Lease | None = None
        self._token = b""  # of the last lease that was asked for
        # Ranges of ids within the lease, the next one last; more than one while a refused batch is being halved.
        self._work: list[tuple[int, int]] = []
        # Where the ranges ended when an attempt failed in the middle of a halving, which then goes on from there: begun
        # anew each time, it would never end at a receiver that answers 503 or 429 to every few requests.
        self._cuts: list[int] = []
        # What the outbox has still to be told, should it fail: a batch that the receiver took, or a failed attempt.
        self._delivered: Batch | None = None
        self._failure: _Failure | None = None
        self._tried = (0, 0)  # id of the first event of the last failed batch; attempts so far, rate limits included
        self._lease_seconds = config.lease
        self._next_expiry = 0.0
        self._through = 0  # the last event that was delivered here
        self._odd_answer = ""
        self._tells = False  # of each failed attempt
        self._is_logged = False  # that the retry budget is used up

    def step(self, *, hurry: bool = False, within: float | None = None, tell: bool = False) -> Step:
        """Do one thing.  Raises `OutboxError` if the outbox fails; the next step then takes up where this one was.

        `hurry`: go before the end of a backoff, unless the receiver asked for it.  `within`: in the place of the
        `timeout` setting, if it is less.  `tell`: report each attempt that fails, and not only that which uses up the
        retry budget.
        """
        self._tells = tell
        if self._delivered is not None:
            return self._ack(self._delivered)
        if self._failure is not None:
            return self._release(self._failure)
        if self._lease is not None and self._outbox.is_told_to_wait():
            self._give_up()  # told in an answer to another sender, since this one has the lease
        if self._lease is None:
            self._expire()
            threads = self._config.thread
            size = self._config.upload_size
            limit = size * (_BATCHES_A_LEASE if threads == 1 else 1)
            self._token = secrets.token_bytes(16)
            found = self._outbox.lease(
                limit, self._lease_seconds, batch=size, max_leases=threads, hurry=hurry, token=self._token
            )
            if isinstance(found, NotNow):
                return self._waiting(found.reason, found.seconds, found.backoff)
            self._lease = found
            self._work = _ranges(found.first, found.last, self._cuts)
        batch = self._next_batch()
        if batch is None:
            return Step("lost")
        attempt = max(self._lease.attempt, self._tried[1] if self._tried[0] == batch.first else 0)
        began = self._clock.boot()
        outcome = self._uploader.upload(batch.events, attempt, within=within)
        self._fit_lease(began)
        if outcome.kind is Kind.DELIVERED:
            self._note_odd_answer(outcome)
            self._delivered = batch
            return self._ack(batch)
        log.debug("batch of %d events: %s (%d)", batch.count, outcome.kind.value, outcome.status)
        what = action(outcome.kind, batch.count)
        if what is Action.SPLIT:
            return self._split(batch)
        if what is Action.BURY:
            return self._bury(batch, outcome)
        self._tried = (batch.first, attempt + 1)
        now, chance = self._clock.boot(), self._random()
        return self._fail(batch, outcome, lambda before: self._policy.after(outcome, before, now, chance))

    def close(self) -> None:
        """Give up what is leased and close the connections."""
        try:
            if self._delivered is not None:
                with contextlib.suppress(OutboxError):
                    self._ack(self._delivered)
        finally:  # a callback may call sys.exit()
            self._give_up()
            self._uploader.close()

    def abandon(self) -> None:
        """For when a step was ended by an exception that is none of ours, a signal handler's: as if we had died there.

        Nothing can be said of what was between two steps; what was leased is taken over.
        """
        self._outbox.forget(self._token)
        self._uploader.close()

    @property
    def is_under_way(self) -> bool:
        """Whether there is something leased that the next step goes on with."""
        return self._lease is not None

    def rest(self) -> None:
        """Give up what is leased and has not been tried; for when no step follows soon."""
        if self._delivered is None and self._failure is None:
            self._give_up()

    # -- inside

    def _give_up(self) -> None:
        lease = self._lease
        if lease is None:
            return
        try:
            failure = self._failure
            self._cuts = [last for _, last in self._work]
            self._drop()
            if failure is None:
                self._outbox.release(lease)
            else:
                # Whoever fails next reports it: here nobody would be told.
                self._outbox.fail(lease, lambda before: replace(failure.change(before), reported=before.reported))
        except OutboxError:
            self._outbox.forget(lease.token)
        except BaseException:  # a signal handler's
            self._outbox.forget(lease.token)
            raise

    def _next_batch(self) -> Batch | None:
        assert self._lease is not None
        lease = self._lease
        if lease.deadline - self._clock.boot() < self._lease_seconds / 2:
            extended = self._outbox.extend(lease, self._lease_seconds)
            if extended is None:
                self._drop()
                return None
            self._lease = lease = extended
        first, last = self._work[-1]
        if self._config.upload_size <= _JOIN_AT_MOST:
            count, low, high, events = self._outbox.joined(first, last, self._config.upload_size)
            if count and len(events) <= self._room:
                return Batch(low, high, count, events)
        rows = self._outbox.rows(first, last, MAX_BATCH_BYTES)
        if not rows:  # the lease was lost
            self._outbox.confirm(lease)
            self._outbox.release(lease)
            self._drop()
            return None
        return pack(rows, self._write_key, self._config.upload_size)

    def _fit_lease(self, began: float) -> None:
        """After an upload that had begun then, on the boot clock.

        An upload has no bound of its own: names are looked up without one, and each address gets the `timeout`.  One
        that took longer than its lease gets twice the time, or two senders would take the same events from each other
        for ever.
        """
        assert self._lease is not None
        now = self._clock.boot()
        if now >= self._lease.deadline:
            self._lease_seconds *= 2
        elif now - began < self._config.lease / 2:
            self._lease_seconds = self._config.lease

    def _ack(self, batch: Batch) -> Step:
        assert self._lease is not None
        deleted = self._outbox.ack(self._lease, batch.last)
        self._delivered = None
        if deleted is None:
            self._drop()
            return Step("lost")
        self._done_through(batch.last)
        self._is_logged = False
        self._reporter.delivered(batch.events)
        # If others had delivered in between, there would be a gap, for ids are dense.
        is_next = batch.first == self._through + 1
        self._through = batch.last
        return Step("delivered", deleted, through=batch.last if is_next and self._lease is None else None)

    def _split(self, batch: Batch) -> Step:
        first, last = self._work[-1]
        halves = self._outbox.halve(first, last, batch.count)
        if halves is None:  # the others have left meanwhile: the next step sends what remains, or finds the lease lost
            return Step("split")
        middle, end = halves
        # Only now: a range that was gone from here while its events are still there would be deleted by the next ack.
        self._work.pop()
        if end < last:
            self._work.append((end + 1, last))
        self._work += [(middle + 1, end), (first, middle)]
        return Step("split")

    def _bury(self, batch: Batch, outcome: Outcome) -> Step:
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
                "refused: delivery waits until some are removed (segment-durable requeue, segment-durable erase)"
            )
            full = Outcome(outcome.kind, outcome.status, "dead_letters_full", message)
            now = self._clock.boot()
            return self._fail(
                batch,
                full,
                lambda before: replace(put_off(before, now, now + _DEAD_LETTERS_FULL_WAIT), reported=True),
            )
        self._done_through(batch.last)
        log.warning("an event was refused by itself (%d, %s): it is kept in the dead letters", *_said(outcome))
        self._reporter.failed(DeliveryError(outcome.status, outcome.code, outcome.message), [batch.events])
        return Step("buried", 1)

    def _fail(self, batch: Batch, outcome: Outcome, change: Callable[[Backoff], Backoff]) -> Step:
        error = DeliveryError(outcome.status, outcome.code, outcome.message)
        now = self._clock.time()
        self._failure = _Failure(
            error, lambda before: replace(change(before), last_error=str(error), last_error_at=now), batch.events
        )
        return self._release(self._failure)

    def _release(self, failure: _Failure) -> Step:
        """If the outbox fails here the lease is kept, so that nobody sends before the backoff could be stored."""
        assert self._lease is not None
        before, after = self._outbox.fail(self._lease, failure.change)
        self._cuts = [last for _, last in self._work]
        self._drop()
        is_first = after.reported and not before.reported
        # Logged once by each sender: who has restarted the process to mend that would take silence for success.
        if is_first or (after.reported and not self._is_logged):
            self._is_logged = True
            log.error("not delivered, the events stay in the outbox and are tried on: %s", failure.error)
        else:
            log.info("not delivered, will be tried again: %s", failure.error)
        if is_first or self._tells:
            self._reporter.failed(failure.error, [failure.events])
        wait = max(0.0, after.not_before - self._clock.boot())
        return self._waiting("failed", wait, after)

    def _waiting(self, kind: str, seconds: float | None, backoff: Backoff) -> Step:
        return Step(kind, seconds=seconds, exhausted=self._policy.is_spent(backoff), told=backoff.told)

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

    def _drop(self) -> None:
        self._lease = None
        self._work.clear()
        self._delivered = None
        self._failure = None

    def _note_odd_answer(self, outcome: Outcome) -> None:
        """A 2xx is a 2xx, but one that is a web page comes from a proxy or a wrong host: said once."""
        kind = outcome.content_type.partition(";")[0].strip().lower()
        if is_page(kind) and kind != self._odd_answer:
            self._odd_answer = kind
            log.warning(
                "the host answered %d with a page of type %s: check that `host` is Segment's", outcome.status, kind
            )


def _ranges(first: int, last: int, cuts: Sequence[int]) -> list[tuple[int, int]]:
    """The range from `first` to `last`, cut behind each of `cuts` that lies in it; the first one last."""
    ends = sorted({last, *(cut for cut in cuts if first <= cut < last)})
    return [(start, end) for start, end in zip([first, *(end + 1 for end in ends)], ends)][::-1]


def _said(outcome: Outcome) -> tuple[int, str]:
    return outcome.status, outcome.code
