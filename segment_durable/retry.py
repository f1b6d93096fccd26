"""What follows from an outcome: pure functions that decide and do nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, cast

import tenacity

from segment_durable.answers import Kind, Outcome
from segment_durable.records import Backoff

__all__ = ["Action", "RetryPolicy", "action", "put_off"]

FIRST_WAIT = 0.5  # seconds; doubles with each failure
LONGEST_WAIT = 60.0

_exponential = tenacity.wait_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT)


class Action(Enum):
    """What to do with a batch."""

    ACK = "ack"
    WAIT = "wait"
    SPLIT = "split"
    BURY = "bury"


def action(kind: Kind, count: int) -> Action:
    """For a batch of `count` events."""
    if kind is Kind.DELIVERED:
        return Action.ACK
    if kind is Kind.REJECTED:
        return Action.SPLIT if count > 1 else Action.BURY
    return Action.WAIT


def put_off(before: Backoff, now: float, until: float, *, told: bool = False) -> Backoff:
    """`before` with its end at `until`; `told`: by the receiver.

    A wait that the receiver asked for, and that is not over `now`, stays as it is unless it asks for a longer one: it
    may have told another sender while this one was at its attempt.
    """
    if before.told and before.not_before > now:
        return replace(before, not_before=max(before.not_before, until)) if told else before
    return replace(before, not_before=until, told=told)


@dataclass(frozen=True)
class RetryPolicy:
    """The retry budget of a batch.

    `max_retries` counts failed attempts after the first; `max_total_backoff` bounds the seconds since the first of
    them; `max_rate_limit` bounds the seconds of a rate limit, whose attempts are not counted.  A used-up budget ends
    in one report and in longer waits, never in a deletion.
    """

    max_retries: int = 10
    max_total_backoff: float = 43_200.0
    max_rate_limit: float = 1_800.0

    def after(self, outcome: Outcome, before: Backoff, now: float, chance: float) -> Backoff:
        """The shared backoff after an attempt that calls for `Action.WAIT`.

        `before` is that until then, `now` the boot clock in seconds, `chance` a random number in [0, 1).  `reported`
        is set with the attempt that uses up the budget.
        """
        if outcome.kind is Kind.THROTTLED:
            return self._throttled(outcome, before, now)
        return self._failed(outcome, before, now, chance)

    def is_spent(self, backoff: Backoff) -> bool:
        """Whether the budget of what it is waited for is used up: of the rate limit where the receiver has asked."""
        if not backoff.told:
            return backoff.reported
        since = backoff.not_before if backoff.first_throttle is None else backoff.first_throttle
        return backoff.not_before - since > self.max_rate_limit

    def _throttled(self, outcome: Outcome, before: Backoff, now: float) -> Backoff:
        since = now if before.first_throttle is None else before.first_throttle
        until = now + outcome.retry_after
        after = replace(put_off(before, now, until, told=True), first_throttle=since)
        return replace(after, reported=before.reported or self.is_spent(after))

    def _failed(self, outcome: Outcome, before: Backoff, now: float, chance: float) -> Backoff:
        failures = before.failures + 1
        since = now if before.first_failure is None else before.first_failure
        hopeless = outcome.kind in (Kind.UNAUTHORISED, Kind.MISDIRECTED)
        spent = hopeless or failures > self.max_retries or now - since >= self.max_total_backoff
        # Full jitter spreads the retries of many hosts; the longest wait keeps its lower half, so that a host that
        # will not come back soon is not asked too often.
        delay = LONGEST_WAIT * (0.5 + chance / 2) if spent else chance * _ceiling(failures)
        after = put_off(before, now, now + delay)
        return replace(
            after,
            failures=failures,
            first_failure=since,
            first_throttle=before.first_throttle if after.told else None,
            reported=before.reported or spent,
        )


def _ceiling(failures: int) -> float:
    """The longest wait after that many failures, in seconds, by tenacity's exponential wait."""
    state = tenacity.RetryCallState(cast(Any, None), None, (), {})
    state.attempt_number = min(failures, 64)  # tenacity works out 2 ** failures before it looks at the maximum
    return float(_exponential(state))
