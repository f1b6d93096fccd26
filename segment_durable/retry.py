"""What follows from an outcome: an immutable policy that decides and does nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, cast

import tenacity

from segment_durable.answers import Kind, Outcome
from segment_durable.records import Backoff

__all__ = ["Action", "Decision", "RetryPolicy"]

FIRST_WAIT = 0.5  # seconds; doubles with each failure
LONGEST_WAIT = 60.0

_exponential = tenacity.wait_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT)


class Action(Enum):
    ACK = "ack"
    WAIT = "wait"
    SPLIT = "split"
    BURY = "bury"


@dataclass(frozen=True)
class Decision:
    """What to do with a batch, and why."""

    action: Action
    reason: str
    backoff: Backoff | None = None  # WAIT: the new shared backoff
    exhausted: bool = False  # WAIT: the budget has just been used up, on_error is to be called


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

    def decide(
        self, outcome: Outcome, count: int, before: Backoff, now: float, random: Callable[[], float]
    ) -> Decision:
        """The decision for a batch of `count` events.

        `before` is the shared backoff so far, `now` the boot clock in seconds, `random` gives numbers in [0, 1).
        """
        if outcome.kind is Kind.DELIVERED:
            return Decision(Action.ACK, "delivered")
        if outcome.kind is Kind.REJECTED:
            if count > 1:
                return Decision(Action.SPLIT, f"refused ({outcome.status}): something in the batch is to blame")
            return Decision(Action.BURY, f"refused by itself ({outcome.status})")
        if outcome.kind is Kind.THROTTLED:
            return self._throttled(outcome, before, now)
        return self._failed(outcome, before, now, random)

    def _throttled(self, outcome: Outcome, before: Backoff, now: float) -> Decision:
        since = now if before.first_throttle is None else before.first_throttle
        after = replace(before, not_before=now + outcome.retry_after, told=True, first_throttle=since)
        spent = now + outcome.retry_after - since > self.max_rate_limit
        return _wait(f"told to wait {outcome.retry_after:g} s", before, after, spent)

    def _failed(self, outcome: Outcome, before: Backoff, now: float, random: Callable[[], float]) -> Decision:
        failures = before.failures + 1
        since = now if before.first_failure is None else before.first_failure
        hopeless = outcome.kind in (Kind.UNAUTHORISED, Kind.MISDIRECTED)
        spent = hopeless or failures > self.max_retries or now - since >= self.max_total_backoff
        # Full jitter spreads the retries of many hosts; the longest wait keeps its lower half, so that a host that
        # will not come back soon is not asked too often.
        delay = LONGEST_WAIT * (0.5 + random() / 2) if spent else random() * _ceiling(failures)
        after = replace(
            before,
            not_before=now + delay,
            told=False,
            failures=failures,
            first_failure=since,
            first_throttle=None,
        )
        return _wait(f"{outcome.kind.value}, attempt {failures}", before, after, spent)


def _wait(reason: str, before: Backoff, after: Backoff, spent: bool) -> Decision:
    return Decision(
        Action.WAIT,
        reason,
        replace(after, reported=before.reported or spent),
        exhausted=spent and not before.reported,
    )


def _ceiling(failures: int) -> float:
    """The longest wait after that many failures, in seconds, by tenacity's exponential wait."""
    state = tenacity.RetryCallState(cast(Any, None), None, (), {})
    state.attempt_number = min(failures, 64)  # tenacity works out 2 ** failures before it looks at the maximum
    return float(_exponential(state))
