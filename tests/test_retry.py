"""The retry policy: a pure function from an outcome to a decision."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segment_durable.answers import MAX_TOLD_WAIT, Kind, Outcome, classify
from segment_durable.records import Backoff
from segment_durable.retry import FIRST_WAIT, LONGEST_WAIT, Action, Decision, RetryPolicy
from segment_durable.transport import Response

HOPELESS = {Kind.UNAUTHORISED, Kind.MISDIRECTED}
ALMOST_1 = 1 - 2**-53

times = st.floats(0, 1e9)
backoffs = st.builds(
    Backoff,
    not_before=times,
    told=st.booleans(),
    failures=st.integers(0, 10**6),
    first_failure=st.none() | times,
    first_throttle=st.none() | times,
    reported=st.booleans(),
)
policies = st.builds(
    RetryPolicy, max_retries=st.integers(0, 1000), max_total_backoff=times, max_rate_limit=st.floats(0, 1e5)
)
outcomes = st.sampled_from(Kind).flatmap(
    lambda kind: st.builds(
        Outcome,
        kind=st.just(kind),
        status=st.integers(0, 999),
        retry_after=st.floats(0.001, MAX_TOLD_WAIT) if kind is Kind.THROTTLED else st.just(0.0),
    )
)


def failed(kind: Kind = Kind.UNREACHABLE) -> Outcome:
    return Outcome(kind, 503)


def throttled(seconds: float) -> Outcome:
    return Outcome(Kind.THROTTLED, 429, retry_after=seconds)


def after(decision: Decision) -> Backoff:
    assert decision.action is Action.WAIT
    assert decision.backoff is not None
    return decision.backoff


@settings(deadline=None)
@given(policies, outcomes, st.integers(1, 2500), backoffs, times, st.integers())
def test_the_kind_and_the_count_alone_choose_the_action_and_nothing_is_decided_twice_differently(
    policy: RetryPolicy, outcome: Outcome, count: int, before: Backoff, now: float, seed: int
) -> None:
    frozen = dataclasses.replace(before)
    decision = policy.decide(outcome, count, before, now, random.Random(seed).random)
    assert decision == policy.decide(outcome, count, before, now, random.Random(seed).random)
    assert before == frozen
    assert (decision.action is Action.ACK) == (outcome.kind is Kind.DELIVERED)
    assert (decision.action is Action.BURY) == (outcome.kind is Kind.REJECTED and count == 1)
    assert (decision.action is Action.SPLIT) == (outcome.kind is Kind.REJECTED and count > 1)
    assert (decision.backoff is not None) == (decision.action is Action.WAIT)
    assert decision.reason
    if decision.action is not Action.WAIT:
        assert not decision.exhausted


@settings(deadline=None)
@given(policies, outcomes, backoffs, times, st.integers())
def test_a_wait_is_as_told_or_within_its_jitter_and_only_counts_if_it_was_not_told(
    policy: RetryPolicy, outcome: Outcome, before: Backoff, now: float, seed: int
) -> None:
    decision = policy.decide(outcome, 1, before, now, random.Random(seed).random)
    if decision.action is not Action.WAIT:
        return
    backoff = after(decision)
    assert backoff.not_before >= now
    if outcome.kind is Kind.THROTTLED:
        assert backoff.not_before == now + outcome.retry_after
        assert backoff.told
        assert (backoff.failures, backoff.first_failure) == (before.failures, before.first_failure)
    else:
        assert backoff.not_before <= now + LONGEST_WAIT
        assert not backoff.told
        assert backoff.failures == before.failures + 1
        if outcome.kind in HOPELESS:
            assert backoff.not_before >= now + LONGEST_WAIT / 2
    assert backoff.reported >= before.reported
    assert decision.exhausted == (backoff.reported and not before.reported)


@pytest.mark.parametrize(
    ("failures", "ceiling"), [(1, 0.5), (2, 1), (3, 2), (4, 4), (5, 8), (6, 16), (7, 32), (8, 60), (9, 60), (10, 60)]
)
def test_waits_have_full_jitter_from_half_a_second_doubling_to_a_minute(failures: int, ceiling: float) -> None:
    before = Backoff(failures=failures - 1, first_failure=0.0)
    for number in (0.0, 0.25, ALMOST_1):
        decision = RetryPolicy(max_retries=100).decide(failed(), 1, before, 0.0, lambda number=number: number)  # type: ignore[misc]
        assert after(decision).not_before == pytest.approx(ceiling * number)
        assert not decision.exhausted


def test_the_waits_start_and_end_as_the_design_has_them() -> None:
    assert (FIRST_WAIT, LONGEST_WAIT, MAX_TOLD_WAIT) == (0.5, 60.0, 300.0)


def test_a_used_up_budget_keeps_the_lower_half_of_the_longest_wait() -> None:
    for number, wait in ((0.0, 30.0), (ALMOST_1, 60.0)):
        decision = RetryPolicy(max_retries=0).decide(failed(), 1, Backoff(), 0.0, lambda number=number: number)  # type: ignore[misc]
        assert after(decision).not_before == pytest.approx(wait)


def test_years_of_failures_are_decided_as_fast_as_the_first() -> None:
    decision = RetryPolicy(max_retries=2**61).decide(
        failed(), 1, Backoff(failures=2**60, first_failure=0.0), 1.0, lambda: ALMOST_1
    )
    assert after(decision).not_before == pytest.approx(61.0)


@pytest.mark.parametrize("max_retries", [0, 1, 10])
def test_the_budget_is_reported_exactly_once_after_max_retries_more_attempts(max_retries: int) -> None:
    policy, backoff, reports = RetryPolicy(max_retries=max_retries), Backoff(), []
    for attempt in range(1, 40):
        decision = policy.decide(failed(), 5, backoff, float(attempt), lambda: 0.5)
        backoff = after(decision)
        reports += [attempt] * decision.exhausted
    assert reports == [max_retries + 1]
    assert backoff.failures == 39


def test_the_total_backoff_is_counted_from_the_first_failure() -> None:
    policy = RetryPolicy(max_retries=10**6, max_total_backoff=100.0)
    backoff, reports = Backoff(), []
    for now in (1000.0, 1050.0, 1099.9, 1100.0, 1101.0):
        decision = policy.decide(failed(), 1, backoff, now, lambda: 0.5)
        backoff = after(decision)
        reports += [now] * decision.exhausted
    assert reports == [1100.0]


def test_rate_limits_are_counted_in_seconds_and_never_as_retries() -> None:
    policy = RetryPolicy(max_retries=0, max_rate_limit=1800.0)
    backoff, now, reports = Backoff(), 50.0, []
    for _ in range(20):
        decision = policy.decide(throttled(300.0), 1, backoff, now, lambda: 0.5)
        backoff = after(decision)
        assert backoff.not_before == now + 300
        reports += [now] * decision.exhausted
        now = backoff.not_before
    assert reports == [50.0 + 1800.0]
    assert backoff.failures == 0


def test_another_failure_between_ends_a_rate_limit_but_not_the_budget_of_failures() -> None:
    policy = RetryPolicy(max_retries=1, max_rate_limit=400.0)
    first = after(policy.decide(throttled(300.0), 1, Backoff(), 0.0, lambda: 0.5))
    second = after(policy.decide(failed(), 1, first, 300.0, lambda: 0.5))
    assert (second.first_throttle, second.told) == (None, False)
    third = policy.decide(throttled(300.0), 1, second, 301.0, lambda: 0.5)
    assert not third.exhausted
    assert policy.decide(failed(), 1, after(third), 601.0, lambda: 0.5).exhausted


@pytest.mark.parametrize("kind", sorted(HOPELESS, key=lambda kind: kind.value))
def test_wrong_credentials_and_a_wrong_host_are_reported_at_once_and_then_not_again(kind: Kind) -> None:
    policy = RetryPolicy()
    first = policy.decide(failed(kind), 1, Backoff(), 0.0, lambda: 0.0)
    assert first.exhausted
    assert after(first).not_before == 30.0
    assert not policy.decide(failed(kind), 1, after(first), 30.0, lambda: 0.0).exhausted


def test_a_policy_and_a_decision_are_immutable() -> None:
    decision = RetryPolicy().decide(failed(), 1, Backoff(), 0.0, lambda: 0.5)
    for value, name in ((RetryPolicy(), "max_retries"), (decision, "action"), (after(decision), "failures")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, 1)


@settings(deadline=None)
@given(st.integers(100, 599), st.integers(1, 2500), st.sampled_from([{}, {"Retry-After": "7"}]))
def test_from_a_status_to_an_action(status: int, count: int, headers: dict[str, str]) -> None:
    outcome = classify(Response(status, headers, b""), 0.0)
    action = RetryPolicy().decide(outcome, count, Backoff(), 0.0, lambda: 0.5).action
    if 200 <= status < 300:
        assert action is Action.ACK
    elif status in (400, 413, 414, 422):
        assert action is (Action.BURY if count == 1 else Action.SPLIT)
    else:
        assert action is Action.WAIT
