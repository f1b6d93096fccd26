"""Backoff: one process fails, and all of the host wait; also after a restart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from segment_durable.outbox import Outbox
from segment_durable.records import Backoff, Lease, NotNow
from segment_durable.testing.clock import FakeClock

from .common import backoff_of, becomes
from .workers import Worker

YEAR = 365 * 86_400.0


def fail(outbox: Outbox, clock: FakeClock, wait: float, *, told: bool = False, failures: int = 1) -> Backoff:
    """Put an event if there is none, try it, and be told to wait for `wait` seconds."""
    if outbox.first_id() is None:
        outbox.put(b"x", 1)
    lease = outbox.lease(10, 60, hurry=True)
    assert isinstance(lease, Lease)
    now = clock.boot()
    backoff = Backoff(now + wait, told, failures, now - 2, now - 1 if told else None, False, "down", clock.time())
    before, after = outbox.fail(lease, becomes(backoff))
    assert after == backoff
    assert before != backoff
    return backoff


def wait_left(answer: object) -> float:
    """Of a `NotNow` because of a backoff, the seconds; 0 for a lease."""
    if isinstance(answer, Lease):
        return 0.0
    assert isinstance(answer, NotNow)
    assert answer.reason == "backoff"
    assert answer.seconds is not None
    return answer.seconds


def test_a_backoff_comes_back_as_it_was_stored(outbox: Outbox, worker: Worker, clock: FakeClock) -> None:
    assert backoff_of(outbox) == Backoff()
    stored = fail(outbox, clock, 40, told=True, failures=3)
    assert backoff_of(outbox) == stored
    assert worker.call("backoff") == stored


def test_a_backoff_binds_every_process_until_its_end(outbox: Outbox, worker: Worker, clock: FakeClock) -> None:
    fail(outbox, clock, 40)
    for answer in (outbox.lease(1, 60), worker.call("lease", 1, 60)):
        assert wait_left(answer) == 40
    clock.advance(39.5)
    worker.set_clock(clock)
    assert wait_left(worker.call("lease", 1, 60)) == 0.5
    clock.advance(0.5)
    worker.set_clock(clock)
    assert isinstance(worker.call("lease", 1, 60), Lease)


def test_the_backoff_is_told_with_the_wait(outbox: Outbox, clock: FakeClock) -> None:
    outbox.put(b"{}", 0)
    lease = outbox.lease(1, 60)
    assert isinstance(lease, Lease)
    backoff = Backoff(clock.boot() + 50, failures=2, reported=True)
    outbox.fail(lease, becomes(backoff))
    assert outbox.lease(1, 60) == NotNow("backoff", 50, backoff)


def test_hurry_goes_before_the_end_of_a_backoff(outbox: Outbox, clock: FakeClock) -> None:
    fail(outbox, clock, 40)
    assert isinstance(outbox.lease(1, 60, hurry=True), Lease)


def test_hurry_does_not_shorten_a_wait_that_the_receiver_asked_for(
    outbox: Outbox, worker: Worker, clock: FakeClock
) -> None:
    fail(outbox, clock, 40, told=True)
    for answer in (outbox.lease(1, 60, hurry=True), worker.call("lease", 1, 60, hurry=True)):
        assert wait_left(answer) == 40
    clock.advance(40)
    assert isinstance(outbox.lease(1, 60, hurry=True), Lease)


def test_an_empty_outbox_is_empty_also_during_a_backoff(outbox: Outbox, clock: FakeClock) -> None:
    fail(outbox, clock, 40)
    outbox.expire(clock.time())
    assert outbox.lease(1, 60) == NotNow("empty", None)


def test_events_are_taken_in_during_a_backoff(outbox: Outbox, clock: FakeClock) -> None:
    fail(outbox, clock, 40, told=True)
    assert outbox.put(b"y", 1)
    assert outbox.stats().pending == 2


def test_a_delivery_ends_the_backoff_and_keeps_the_last_error(outbox: Outbox, clock: FakeClock) -> None:
    fail(outbox, clock, 40, failures=4)
    clock.advance(40)
    lease = outbox.lease(1, 60)
    assert isinstance(lease, Lease)
    assert lease.attempt == 4
    outbox.ack(lease, lease.last)
    after = backoff_of(outbox)
    assert (after.not_before, after.failures, after.first_failure, after.told) == (0, 0, None, False)
    assert after.last_error == "down"
    stats = outbox.stats()
    assert (stats.failures, stats.next_attempt_seconds, stats.last_error) == (0, 0, "down")
    assert stats.last_error_age_seconds == 40


def two_leases(outbox: Outbox) -> tuple[Lease, Lease]:
    for _ in range(2):
        outbox.put(b"x", 1)
    one, other = (outbox.lease(1, 600, max_leases=2) for _ in range(2))
    assert isinstance(one, Lease)
    assert isinstance(other, Lease)
    return one, other


@pytest.mark.parametrize("way", ["ack", "bury"])
@pytest.mark.parametrize("told", [False, True])
def test_a_late_success_ends_a_backoff_but_not_a_wait_that_the_receiver_asked_for(
    outbox: Outbox, clock: FakeClock, told: bool, way: str
) -> None:
    one, other = two_leases(outbox)
    stored = Backoff(clock.boot() + 40, told, 2, clock.boot(), None, False, "down", clock.time())
    outbox.fail(one, becomes(stored))
    if way == "ack":
        assert outbox.ack(other, other.last) == 1
    else:
        assert outbox.bury(other, other.last, status=400, code="c", answer="", max_dead=9)
    if told:
        assert backoff_of(outbox) == stored
        assert wait_left(outbox.lease(1, 60, hurry=True)) == 40
    else:
        assert (backoff_of(outbox).not_before, backoff_of(outbox).failures) == (0, 0)
        assert isinstance(outbox.lease(1, 60), Lease)


def test_of_two_attempts_that_fail_at_the_same_time_both_are_counted(outbox: Outbox) -> None:
    def one_more(before: Backoff) -> Backoff:
        return replace(before, failures=before.failures + 1)

    for number, lease in enumerate(two_leases(outbox)):
        before, after = outbox.fail(lease, one_more)
        assert (before.failures, after.failures) == (number, number + 1)
    assert backoff_of(outbox).failures == 2


def test_a_release_without_a_backoff_leaves_the_stored_one(outbox: Outbox, clock: FakeClock) -> None:
    stored = fail(outbox, clock, 40)
    lease = outbox.lease(1, 60, hurry=True)
    assert isinstance(lease, Lease)
    outbox.release(lease)
    assert backoff_of(outbox) == stored


def test_a_backoff_survives_that_the_outbox_is_closed(outbox_factory: Callable[..., Outbox], clock: FakeClock) -> None:
    first = outbox_factory()
    stored = fail(first, clock, 40, told=True)
    first.close()
    clock.advance(10)
    second = outbox_factory()
    assert backoff_of(second) == stored
    assert wait_left(second.lease(1, 60)) == 30


@pytest.mark.parametrize("jump", [YEAR, -YEAR])
def test_a_wall_clock_that_jumps_by_a_year_changes_no_wait(outbox: Outbox, clock: FakeClock, jump: float) -> None:
    fail(outbox, clock, 40)
    clock.jump(jump)
    assert wait_left(outbox.lease(1, 60)) == 40
    clock.advance(40)
    assert isinstance(outbox.lease(1, 60), Lease)


# -- a restart of the machine


def test_after_a_restart_of_the_machine_what_is_left_of_a_wait_is_waited(outbox: Outbox, clock: FakeClock) -> None:
    fail(outbox, clock, 200, told=True, failures=5)
    clock.reboot("boot-2", boot=7.0, off=80)
    assert wait_left(outbox.lease(1, 60)) == pytest.approx(120)
    assert backoff_of(outbox).failures == 5
    clock.advance(119)
    assert wait_left(outbox.lease(1, 60)) == pytest.approx(1)
    clock.advance(1.001)
    assert isinstance(outbox.lease(1, 60), Lease)


def test_a_wait_that_ended_while_the_machine_was_off_is_over(outbox: Outbox, clock: FakeClock) -> None:
    fail(outbox, clock, 200, told=True)
    clock.reboot("boot-2", boot=7.0, off=201)
    assert isinstance(outbox.lease(1, 60), Lease)


def test_after_a_restart_a_budget_counts_from_no_earlier_than_the_restart(outbox: Outbox, clock: FakeClock) -> None:
    """The old times mean nothing on the new boot clock; taken as they are they could lie in its future."""
    clock.advance(50_000)
    fail(outbox, clock, 10, told=True)
    clock.reboot("boot-2", boot=7.0, off=60)
    after = backoff_of(outbox)
    assert after.first_failure == after.first_throttle == 7.0


def test_after_a_restart_no_wait_is_longer_than_300_seconds(outbox: Outbox, clock: FakeClock) -> None:
    fail(outbox, clock, 5_000)
    clock.reboot("boot-2")
    assert wait_left(outbox.lease(1, 60)) == 300


def test_a_wait_of_before_a_restart_is_over_300_seconds_after_it_whatever_the_wall_clock_says(
    outbox: Outbox, clock: FakeClock
) -> None:
    """A machine without a battery for its clock wakes up in 1970 and learns the time later, or never."""
    fail(outbox, clock, 60, told=True)
    clock.reboot("boot-2", boot=5.0)
    clock.jump(-YEAR)
    assert wait_left(outbox.lease(1, 60)) <= 300
    clock.advance(300)
    assert isinstance(outbox.lease(1, 60), Lease)


def test_a_wait_of_before_a_restart_is_no_longer_after_a_look_at_the_statistics(
    outbox: Outbox, clock: FakeClock
) -> None:
    fail(outbox, clock, 60, told=True)
    clock.reboot("boot-2", boot=5.0)
    clock.jump(-YEAR)
    outbox.lease(1, 60)
    clock.advance(200)
    assert outbox.stats().next_attempt_seconds <= 100


def test_a_wait_that_is_longer_than_any_that_is_stored_was_stored_before_the_machine_was_put_back(
    outbox: Outbox, clock: FakeClock
) -> None:
    outbox.put(b"{}", 1)
    lease = outbox.lease(1, 60)
    assert isinstance(lease, Lease)
    outbox.fail(lease, becomes(Backoff(not_before=clock.boot() + 300, told=True, failures=1)))
    clock.set(boot=clock.boot() - 80_000 if clock.boot() > 80_000 else 1.0)
    found = outbox.lease(1, 60, hurry=True)
    assert isinstance(found, NotNow)
    assert found.seconds is not None
    assert found.seconds <= 300


def test_without_a_boot_id_no_wait_of_before_a_restart_is_longer_than_300_seconds(
    outbox: Outbox, clock: FakeClock
) -> None:
    clock.set(boot_id="", boot=1_000_000.0)
    fail(outbox, clock, 60, told=True)
    clock.reboot("", boot=5.0)
    assert wait_left(outbox.lease(1, 60)) <= 300
    clock.advance(300)
    assert isinstance(outbox.lease(1, 60), Lease)
