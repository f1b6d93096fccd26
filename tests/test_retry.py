"""The retry policy: pure functions from an outcome to an action and to the shared backoff."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segment_durable.answers import MAX_TOLD_WAIT, Kind, Outcome, classify
from segment_durable.records import Backoff
from segment_durable.retry import FIRST_WAIT, LONGEST_WAIT, Action, RetryPolicy, action, put_off
from segment_durable.transport import Response

HOPELESS = {Kind.UNAUTHORISED, Kind.MISDIRECTED}
ALMOST_1 = 1 - 2**-53

times = st.floats(0, 1e9)
chances = st.floats(0, ALMOST_1)
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
failures = st.sampled_from([kind for kind in Kind if action(kind, 1) is Action.WAIT]).flatmap(
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


@pytest.mark.parametrize("kind", Kind)
@given(count=st.integers(1, 2500))
def test_the_kind_and_the_count_choose_the_action(kind: Kind, count: int) -> None:
    chosen = action(kind, count)
    assert (chosen is Action.ACK) == (kind is Kind.DELIVERED)
    assert (chosen is Action.BURY) == (kind is Kind.REJECTED and count == 1)
    assert (chosen is Action.SPLIT) == (kind is Kind.REJECTED and count > 1)


@settings(deadline=None)
@given(policies, failures, backoffs, times, chances)
def test_a_wait_is_as_told_or_within_its_jitter_and_only_counts_if_it_was_not_told(
    policy: RetryPolicy, outcome: Outcome, before: Backoff, now: float, chance: float
) -> None:
    frozen = dataclasses.replace(before)
    after = policy.after(outcome, before, now, chance)
    assert after == policy.after(outcome, before, now, chance)
    assert before == frozen
    assert after.not_before >= now
    told = before.not_before if before.told else 0.0  # and maybe still to be waited for
    if outcome.kind is Kind.THROTTLED:
        assert after.not_before == max(told, now + outcome.retry_after)
        assert after.told
        assert (after.failures, after.first_failure) == (before.failures, before.first_failure)
    else:
        assert after.told == (told > now)
        assert after.failures == before.failures + 1
        if after.told:
            assert after.not_before == told
        elif outcome.kind in HOPELESS:
            assert now + LONGEST_WAIT / 2 <= after.not_before <= now + LONGEST_WAIT
        else:
            assert now <= after.not_before <= now + LONGEST_WAIT
    assert after.reported >= before.reported


@pytest.mark.parametrize("told", [False, True])
def test_only_a_wait_that_the_receiver_asked_for_and_that_is_not_over_stays_as_it_is(told: bool) -> None:
    before = Backoff(not_before=100.0, told=told)
    assert put_off(before, 99.0, 99.5) == Backoff(not_before=100.0 if told else 99.5, told=told)
    assert put_off(before, 99.0, 130.0) == Backoff(not_before=100.0 if told else 130.0, told=told)
    assert put_off(before, 99.0, 130.0, told=True) == Backoff(not_before=130.0, told=True)
    assert put_off(before, 100.0, 100.5) == Backoff(not_before=100.5, told=False)


def test_a_failure_during_a_rate_limit_leaves_its_budget_running() -> None:
    policy = RetryPolicy(max_rate_limit=400.0)
    first = policy.after(throttled(300.0), Backoff(), 0.0, 0.5)
    second = policy.after(failed(), first, 1.0, 0.5)
    assert second == dataclasses.replace(first, failures=1, first_failure=1.0)
    assert policy.after(throttled(300.0), second, 300.0, 0.5).reported


@pytest.mark.parametrize(
    ("failures", "ceiling"), [(1, 0.5), (2, 1), (3, 2), (4, 4), (5, 8), (6, 16), (7, 32), (8, 60), (9, 60), (10, 60)]
)
def test_waits_have_full_jitter_from_half_a_second_doubling_to_a_minute(failures: int, ceiling: float) -> None:
    before = Backoff(failures=failures - 1, first_failure=0.0)
    for number in (0.0, 0.25, ALMOST_1):
        after = RetryPolicy(max_retries=100).after(failed(), before, 0.0, number)
        assert after.not_before == pytest.approx(ceiling * number)
        assert not after.reported


def test_the_waits_start_and_end_as_the_design_has_them() -> None:
    assert (FIRST_WAIT, LONGEST_WAIT, MAX_TOLD_WAIT) == (0.5, 60.0, 300.0)


def test_a_used_up_budget_keeps_the_lower_half_of_the_longest_wait() -> None:
    for number, wait in ((0.0, 30.0), (ALMOST_1, 60.0)):
        after = RetryPolicy(max_retries=0).after(failed(), Backoff(), 0.0, number)
        assert after.not_before == pytest.approx(wait)


def test_years_of_failures_are_decided_as_fast_as_the_first() -> None:
    after = RetryPolicy(max_retries=2**61).after(failed(), Backoff(failures=2**60, first_failure=0.0), 1.0, ALMOST_1)
    assert after.not_before == pytest.approx(61.0)


@pytest.mark.parametrize("max_retries", [0, 1, 10])
def test_the_budget_is_reported_exactly_once_after_max_retries_more_attempts(max_retries: int) -> None:
    policy, backoff, reports = RetryPolicy(max_retries=max_retries), Backoff(), []
    for attempt in range(1, 40):
        before, backoff = backoff, policy.after(failed(), backoff, float(attempt), 0.5)
        reports += [attempt] * (backoff.reported and not before.reported)
    assert reports == [max_retries + 1]
    assert backoff.failures == 39


def test_the_total_backoff_is_counted_from_the_first_failure() -> None:
    policy = RetryPolicy(max_retries=10**6, max_total_backoff=100.0)
    backoff, reports = Backoff(), []
    for now in (1000.0, 1050.0, 1099.9, 1100.0, 1101.0):
        before, backoff = backoff, policy.after(failed(), backoff, now, 0.5)
        reports += [now] * (backoff.reported and not before.reported)
    assert reports == [1100.0]


def test_rate_limits_are_counted_in_seconds_and_never_as_retries() -> None:
    policy = RetryPolicy(max_retries=0, max_rate_limit=1800.0)
    backoff, now, reports = Backoff(), 50.0, []
    for _ in range(20):
        before, backoff = backoff, policy.after(throttled(300.0), backoff, now, 0.5)
        assert backoff.not_before == now + 300
        reports += [now] * (backoff.reported and not before.reported)
        now = backoff.not_before
    assert reports == [50.0 + 1800.0]
    assert backoff.failures == 0


def test_another_failure_between_ends_a_rate_limit_but_not_the_budget_of_failures() -> None:
    policy = RetryPolicy(max_retries=1, max_rate_limit=400.0)
    first = policy.after(throttled(300.0), Backoff(), 0.0, 0.5)
    second = policy.after(failed(), first, 300.0, 0.5)
    assert (second.first_throttle, second.told) == (None, False)
    third = policy.after(throttled(300.0), second, 301.0, 0.5)
    assert not third.reported
    assert policy.after(failed(), third, 601.0, 0.5).reported


@pytest.mark.parametrize("kind", sorted(HOPELESS, key=lambda kind: kind.value))
def test_wrong_credentials_and_a_wrong_host_are_reported_at_once(kind: Kind) -> None:
    first = RetryPolicy().after(failed(kind), Backoff(), 0.0, 0.0)
    assert first.reported
    assert first.not_before == 30.0


def test_a_policy_and_a_backoff_are_immutable() -> None:
    for value, name in ((RetryPolicy(), "max_retries"), (Backoff(), "failures")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, 1)


@settings(deadline=None)
@given(st.integers(100, 599), st.integers(1, 2500), st.sampled_from([{}, {"Retry-After": "7"}]))
def test_from_a_status_to_an_action(status: int, count: int, headers: dict[str, str]) -> None:
    outcome = classify(Response(status, headers, b""), 0.0)
    chosen = action(outcome.kind, count)
    if 200 <= status < 300:
        assert chosen is Action.ACK
    elif status in (400, 413, 414, 422):
        assert chosen is (Action.BURY if count == 1 else Action.SPLIT)
    else:
        assert chosen is Action.WAIT
