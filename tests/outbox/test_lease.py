"""Leases: who may deliver what, for how long, and that nobody touches what is another's."""

from __future__ import annotations

import contextlib
import errno
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from segment_durable.errors import StorageError
from segment_durable.outbox import Outbox
from segment_durable.records import Backoff, Lease, NotNow, OutboxStats
from segment_durable.testing.clock import FakeClock

from .common import backoff_of, becomes
from .workers import Worker

YEAR = 365 * 86_400.0


def fill(outbox: Outbox, count: int) -> None:
    for number in range(1, count + 1):
        outbox.put(b"%d" % number, 1)


def take(outbox: Outbox, limit: int = 10, seconds: float = 60.0, **options: int) -> Lease:
    lease = outbox.lease(limit, seconds, **options)  # type: ignore[arg-type]
    assert isinstance(lease, Lease), lease
    return lease


def bury(outbox: Outbox, lease: Lease, event_id: int, max_dead: int = 9) -> bool | None:
    return outbox.bury(lease, event_id, status=400, code="bad", answer="no", max_dead=max_dead)


def content(outbox: Outbox) -> tuple[object, ...]:
    """All rows of all tables, those of the backoff last."""
    with outbox.db.read() as connection:
        tables = ("event", "dead", "lease", "state", "backoff")
        return tuple(connection.execute(f"SELECT * FROM {each}").fetchall() for each in tables)


# -- ranges


def test_a_lease_takes_the_first_events_up_to_the_limit(outbox: Outbox) -> None:
    fill(outbox, 5)
    lease = take(outbox, 3)
    assert (lease.first, lease.last) == (1, 3)
    assert outbox.stats().leased == 3


@pytest.mark.parametrize(("there", "taken"), [(2, 2), (3, 3), (4, 3), (5, 3), (6, 6), (8, 6), (12, 9)])
def test_of_more_than_a_batch_a_lease_takes_whole_batches(outbox: Outbox, there: int, taken: int) -> None:
    fill(outbox, there)
    lease = take(outbox, 9, batch=3)
    assert (lease.first, lease.last) == (1, taken)


def ack_in_two_parts(outbox: Outbox, lease: Lease) -> object:
    return outbox.ack(lease, lease.first), outbox.ack(lease, lease.last)


ENDS: dict[str, Callable[[Outbox, Lease], object]] = {
    "ack": lambda outbox, lease: outbox.ack(lease, lease.last),
    "ack in two parts": ack_in_two_parts,
    "bury": lambda outbox, lease: [bury(outbox, lease, each) for each in range(lease.first, lease.last + 1)],
    "release": lambda outbox, lease: outbox.release(lease),
    "fail": lambda outbox, lease: outbox.fail(lease, becomes(Backoff())),
    "forget": lambda outbox, lease: outbox.forget(lease.token),
    "extend": lambda outbox, lease: outbox.extend(lease, 60),
}


@pytest.mark.parametrize("is_lost", [False, True], ids=["held", "lost"])
@pytest.mark.parametrize("end", ENDS)
def test_of_a_lease_that_has_ended_nothing_is_kept_in_memory(outbox: Outbox, end: str, is_lost: bool) -> None:
    """A sender has thousands in an hour; and as many of other processes' would not be seen."""
    fill(outbox, 3)
    lease = take(outbox)
    assert outbox.db.lock.held == {lease.token}
    if is_lost:
        with outbox.db.write() as connection:
            connection.execute("DELETE FROM lease")
    ENDS[end](outbox, lease)
    assert outbox.db.lock.held == ({lease.token} if end == "extend" and not is_lost else set())


def test_a_lease_that_was_not_committed_is_none(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this process's leases so many would be thought to be there, and others' would go unseen for so many."""
    write = outbox.db.write

    @contextlib.contextmanager
    def fails_to_commit() -> Iterator[sqlite3.Connection]:
        with write() as connection:
            yield connection
            raise sqlite3.OperationalError("disk I/O error")

    assert outbox.put(b"1", 1)
    with monkeypatch.context() as patch:
        patch.setattr(outbox.db, "write", fails_to_commit)
        with pytest.raises(StorageError):
            outbox.lease(1, 60)
    assert outbox.load() == (1, 0, 0)
    assert isinstance(outbox.lease(1, 60), Lease)
    assert outbox.load() == (1, 1, 0)


def test_a_look_that_finds_nothing_to_lease_is_no_write(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or there would be a sync for each, as long as somebody else has the lease."""
    assert outbox.put(b"1", 1)
    assert isinstance(outbox.lease(1, 60), Lease)
    written: list[int] = []
    monkeypatch.setattr(outbox.db.wal, "wrote", written.append)
    assert isinstance(outbox.lease(1, 60), NotNow)
    assert written == []
    assert outbox.put(b"2", 1)
    assert len(written) == 1


def test_an_idle_sender_does_not_wait_for_the_writers_though_others_delivered_what_it_appended(
    outbox: Outbox, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(outbox, 2)
    assert worker.call("ack", worker.call("lease", 2, 60), 2) == 2
    assert outbox.lease(1, 60) == NotNow("empty", None)  # it may have waited for them here, to find that out
    writes: list[None] = []
    write = outbox.db.write

    def counted() -> contextlib.AbstractContextManager[sqlite3.Connection]:
        writes.append(None)
        return write()

    monkeypatch.setattr(outbox.db, "write", counted)
    for _ in range(3):
        assert outbox.lease(1, 60) == NotNow("empty", None)
    assert writes == []
    fill(outbox, 1)
    assert isinstance(outbox.lease(1, 60), Lease)
    assert len(writes) == 1


def test_with_one_lease_at_a_time_nobody_else_gets_one(outbox: Outbox, worker: Worker) -> None:
    fill(outbox, 5)
    take(outbox, 2)
    for answer in (outbox.lease(2, 60), worker.call("lease", 2, 60)):
        assert isinstance(answer, NotNow)
        assert answer.reason == "leased"
        assert answer.seconds is not None


def test_several_leases_at_a_time_do_not_overlap(outbox: Outbox, worker: Worker) -> None:
    fill(outbox, 5)
    first = take(outbox, 2)
    second = worker.call("lease", 2, 60, max_leases=3)
    third = take(outbox, 2, max_leases=3)
    assert [(each.first, each.last) for each in (first, second, third)] == [(1, 2), (3, 4), (5, 5)]
    outbox.put(b"6", 1)
    assert outbox.lease(2, 60, max_leases=3) == NotNow("leased", 0.5)


def test_a_gap_between_two_leases_is_leased_first_and_alone(outbox: Outbox) -> None:
    fill(outbox, 6)
    take(outbox, 2)
    middle = take(outbox, 2, max_leases=2)
    take(outbox, 1, max_leases=3)
    outbox.release(middle)
    again = take(outbox, 10, max_leases=3)
    assert (again.first, again.last) == (3, 4)


def test_an_empty_outbox_says_so_and_that_only_an_event_changes_it(outbox: Outbox) -> None:
    assert outbox.lease(1, 60) == NotNow("empty", None)


def test_all_being_leased_is_not_empty(outbox: Outbox) -> None:
    fill(outbox, 1)
    take(outbox)
    answer = outbox.lease(1, 60, max_leases=2)
    assert isinstance(answer, NotNow)
    assert answer.reason == "leased"


def test_every_lease_has_a_token_of_its_own(outbox: Outbox) -> None:
    fill(outbox, 3)
    tokens = {take(outbox, 1, max_leases=3).token for _ in range(3)}
    assert len(tokens) == 3
    assert all(len(token) >= 16 for token in tokens)


# -- ends


def test_an_ack_of_all_ends_the_lease(outbox: Outbox) -> None:
    fill(outbox, 3)
    lease = take(outbox)
    assert outbox.ack(lease, 3) == 3
    assert outbox.ack(lease, 3) is None
    stats = outbox.stats()
    assert (stats.pending, stats.leased, stats.delivered, stats.balanced) == (0, 0, 3, True)


def test_an_ack_of_a_part_keeps_the_rest_leased(outbox: Outbox) -> None:
    fill(outbox, 5)
    lease = take(outbox, 4)
    assert outbox.ack(lease, 2) == 2
    assert outbox.stats().leased == 2
    assert outbox.lease(9, 60) == NotNow("leased", 0.5)
    assert outbox.ack(lease, 4) == 2
    assert [row.id for row in outbox.rows(0, 9)] == [5]


@pytest.mark.parametrize("through", [0, 4, 99])
def test_an_ack_of_an_event_outside_the_lease_is_a_mistake_and_changes_nothing(outbox: Outbox, through: int) -> None:
    fill(outbox, 5)
    lease = take(outbox, 3)
    before = content(outbox)
    with pytest.raises(ValueError, match="not within the lease"):
        outbox.ack(lease, through)
    assert content(outbox) == before
    assert outbox.ack(lease, 3) == 3


def test_a_released_lease_is_pending_again_in_its_old_place(outbox: Outbox) -> None:
    fill(outbox, 3)
    assert outbox.release(take(outbox, 2)) is True
    again = take(outbox)
    assert (again.first, again.last) == (1, 3)


def test_releasing_after_a_part_was_delivered_gives_back_the_rest(outbox: Outbox) -> None:
    fill(outbox, 4)
    lease = take(outbox)
    outbox.ack(lease, 1)
    bury(outbox, lease, 2)
    assert outbox.release(lease) is True
    assert take(outbox).first == 3


def test_extend_moves_the_deadline_from_now(outbox: Outbox, clock: FakeClock) -> None:
    fill(outbox, 1)
    lease = take(outbox, seconds=60)
    clock.advance(50)
    longer = outbox.extend(lease, 60)
    assert longer is not None
    assert (longer.token, longer.first, longer.last) == (lease.token, lease.first, lease.last)
    assert longer.deadline == clock.boot() + 60
    clock.advance(59)
    assert isinstance(outbox.lease(1, 60), NotNow)
    clock.advance(1)
    assert isinstance(outbox.lease(1, 60), Lease)


# -- fencing


@pytest.fixture
def stale(outbox: Outbox, worker: Worker, clock: FakeClock) -> Lease:
    """A lease of this process on the events 1 to 3 that has passed over to another process, with backoff and all."""
    fill(outbox, 5)
    stale = take(outbox, 3, seconds=60)
    clock.advance(60)
    worker.set_clock(clock)
    assert isinstance(worker.call("lease", 3, 60), Lease)
    return stale


def test_a_stale_ack_changes_nothing(outbox: Outbox, stale: Lease) -> None:
    before = content(outbox)
    assert outbox.ack(stale, 3) is None
    assert outbox.ack(stale, 1) is None
    assert content(outbox) == before


def test_a_stale_bury_changes_nothing(outbox: Outbox, stale: Lease) -> None:
    before = content(outbox)
    assert bury(outbox, stale, 1) is None
    assert content(outbox) == before


def test_a_stale_release_changes_nothing(outbox: Outbox, stale: Lease) -> None:
    before = content(outbox)
    assert outbox.release(stale) is False
    assert content(outbox) == before


def test_a_stale_failure_changes_the_backoff_only(outbox: Outbox, stale: Lease, clock: FakeClock) -> None:
    """It was an attempt all the same, and what the receiver has asked for binds; who has the events reports."""
    before = content(outbox)
    told = Backoff(not_before=clock.boot() + 300, told=True, failures=7)
    assert outbox.fail(stale, becomes(replace(told, reported=True))) == (Backoff(), told)
    assert backoff_of(outbox) == told
    assert content(outbox)[:-1] == before[:-1]


def test_a_stale_extend_changes_nothing(outbox: Outbox, stale: Lease) -> None:
    before = content(outbox)
    assert outbox.extend(stale, 1_000) is None
    assert content(outbox) == before


def test_whoever_took_over_goes_on_undisturbed_by_the_stale_one(
    outbox: Outbox, worker: Worker, clock: FakeClock
) -> None:
    fill(outbox, 3)
    stale = take(outbox, seconds=60)
    clock.advance(60)
    worker.set_clock(clock)
    fresh = worker.call("lease", 10, 60)
    outbox.ack(stale, 3)
    outbox.release(stale)
    assert worker.call("ack", fresh, 2) == 2
    assert outbox.ack(stale, 3) is None
    assert worker.call("ack", fresh, 3) == 1
    assert outbox.stats().delivered == 3


def test_a_lease_that_is_over_but_that_nobody_wanted_may_still_be_acked(outbox: Outbox, clock: FakeClock) -> None:
    """The events were delivered: to send them again would only make work."""
    fill(outbox, 2)
    lease = take(outbox, seconds=60)
    clock.advance(1_000)
    assert outbox.ack(lease, 2) == 2


def test_an_ack_after_the_events_expired_counts_nothing_twice(outbox: Outbox, clock: FakeClock) -> None:
    fill(outbox, 3)
    lease = take(outbox, seconds=60)
    clock.advance(60)
    outbox.forget(lease.token)
    assert len(outbox.expire(clock.time(), 2)) == 2
    assert outbox.ack(lease, 3) == 1
    stats = outbox.stats()
    assert (stats.expired, stats.delivered, stats.pending, stats.balanced) == (2, 1, 0, True)


# -- death


def test_the_lease_of_a_killed_process_is_taken_over_at_once(outbox: Outbox, worker: Worker) -> None:
    fill(outbox, 3)
    lost = worker.call("lease", 2, 3_600)
    assert isinstance(outbox.lease(2, 60), NotNow)
    worker.kill()
    assert outbox.stats().leased == 0
    again = take(outbox, 2)
    assert (again.first, again.last) == (lost.first, lost.last)
    assert again.attempt == lost.attempt + 1
    assert outbox.ack(lost, 2) is None


def test_the_lease_of_a_process_that_closed_its_outbox_is_taken_over_at_once(outbox: Outbox, worker: Worker) -> None:
    fill(outbox, 1)
    worker.call("lease", 1, 3_600)
    worker.close()
    assert isinstance(outbox.lease(1, 60), Lease)


def test_looking_at_a_lease_does_not_kill_it(outbox: Outbox, worker: Worker) -> None:
    fill(outbox, 1)
    worker.call("lease", 1, 3_600)
    for _ in range(3):
        assert outbox.stats().leased == 1
        assert isinstance(outbox.lease(1, 60), NotNow)
    assert worker.call("stats").leased == 1


def test_the_lease_of_a_frozen_process_is_taken_over_at_its_deadline_and_not_before(
    outbox: Outbox, worker: Worker, clock: FakeClock
) -> None:
    fill(outbox, 2)
    frozen = worker.call("lease", 2, 60)
    worker.freeze()
    clock.advance(59.9)
    assert isinstance(outbox.lease(2, 60), NotNow)
    clock.advance(0.1)
    fresh = take(outbox)
    worker.thaw()
    worker.set_clock(clock)
    assert worker.call("ack", frozen, 2) is None
    assert outbox.ack(fresh, 2) == 2


def test_a_lease_of_before_a_restart_of_the_machine_is_dead(outbox: Outbox, worker: Worker, clock: FakeClock) -> None:
    """Its holder's number may have been given anew, so that it is alive says nothing: only the boot id tells."""
    fill(outbox, 1)
    worker.call("lease", 1, 3_600)
    clock.reboot("boot-2", boot=clock.boot())
    assert outbox.stats().leased == 0
    assert isinstance(outbox.lease(1, 60), Lease)


def test_without_a_boot_id_a_lease_from_the_future_is_from_before_a_restart(
    outbox: Outbox, worker: Worker, clock: FakeClock
) -> None:
    clock.set(boot_id="", boot=50_000.0)
    worker.set_clock(clock)
    fill(outbox, 1)
    worker.call("lease", 1, 3_600)
    assert isinstance(outbox.lease(1, 60), NotNow)
    clock.set(boot=5.0)
    assert isinstance(outbox.lease(1, 60), Lease)


@pytest.mark.parametrize("jump", [YEAR, -YEAR])
def test_a_wall_clock_that_jumps_by_a_year_neither_ends_nor_prolongs_a_lease(
    outbox: Outbox, worker: Worker, clock: FakeClock, jump: float
) -> None:
    fill(outbox, 1)
    worker.call("lease", 1, 60)
    clock.jump(jump)
    assert isinstance(outbox.lease(1, 60), NotNow)
    clock.advance(59)
    assert isinstance(outbox.lease(1, 60), NotNow)
    clock.advance(1)
    assert isinstance(outbox.lease(1, 60), Lease)


def test_of_several_leases_only_the_dead_one_is_taken_over(outbox: Outbox, worker: Worker) -> None:
    fill(outbox, 6)
    kept = take(outbox, 2, max_leases=3)
    lost = worker.call("lease", 2, 60, max_leases=3)
    also_kept = take(outbox, 2, max_leases=3)
    worker.kill()
    again = take(outbox, 10, max_leases=3)
    assert (again.first, again.last) == (lost.first, lost.last)
    assert outbox.ack(kept, kept.last) == 2
    assert outbox.ack(also_kept, also_kept.last) == 2


def test_two_outboxes_of_one_process_know_each_others_leases(outbox_factory: Callable[..., Outbox]) -> None:
    one, other = outbox_factory(), outbox_factory()
    fill(one, 1)
    lease = take(one)
    assert isinstance(other.lease(1, 60), NotNow)
    assert one.release(lease)
    assert isinstance(other.lease(1, 60), Lease)


def test_closing_one_outbox_of_a_process_leaves_the_others_leases_alive(
    outbox_factory: Callable[..., Outbox], worker: Worker
) -> None:
    """POSIX locks go when any descriptor of the file is closed: the process has one, and closes it last."""
    one, other = outbox_factory(), outbox_factory()
    fill(one, 1)
    take(one, seconds=3_600)
    other.close()
    assert isinstance(worker.call("lease", 1, 60), NotNow)
    outbox_factory().close()
    assert isinstance(worker.call("lease", 1, 60), NotNow)


# -- attempts


def test_the_attempt_counts_the_senders_that_died_with_the_events(
    outbox: Outbox, worker_factory: Callable[..., Worker]
) -> None:
    fill(outbox, 2)
    for attempt in range(3):
        worker = worker_factory()
        assert worker.call("lease", 2, 60).attempt == attempt
        worker.kill()
    assert take(outbox).attempt == 3


def test_the_attempt_is_kept_while_another_lease_stands_in_the_way(
    outbox: Outbox, worker_factory: Callable[..., Worker]
) -> None:
    """A sender that is told to wait must not make the next one forget that an attempt was made."""
    fill(outbox, 4)
    living = take(outbox, 2)
    doomed = worker_factory()
    assert doomed.call("lease", 2, 60, max_leases=2).first == 3
    doomed.kill()
    assert isinstance(outbox.lease(2, 60, max_leases=1), NotNow)
    outbox.ack(living, 2)
    assert take(outbox, 2).attempt == 1


def test_the_attempt_is_kept_for_the_part_of_a_lost_lease_that_is_taken_later(outbox: Outbox, worker: Worker) -> None:
    fill(outbox, 4)
    worker.call("lease", 4, 60)
    worker.kill()
    assert take(outbox, 2).attempt == 1
    assert take(outbox, 2, max_leases=2).attempt == 1


def test_lock_errors_other_than_taken_are_not_mistaken_for_a_living_holder(
    outbox: Outbox, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(outbox, 1)
    worker.call("lease", 1, 3_600)
    worker.kill()

    def busy(fd: int, byte: int) -> bool:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr("segment_durable.locks.try_lock", busy)
        with pytest.raises(Exception, match="lock"):
            outbox.lease(1, 60)
    assert isinstance(outbox.lease(1, 60), Lease)


def test_stats_are_of_one_moment(outbox: Outbox, worker: Worker) -> None:
    """Whatever another process does meanwhile, the books balance."""
    worker.send("put_many", 300, b"x", 0)
    seen: list[OutboxStats] = []
    while not worker.has_answered():
        seen.append(outbox.stats())
        lease = outbox.lease(5, 60)
        if isinstance(lease, Lease):
            outbox.ack(lease, lease.last)
    assert len(worker.receive()) == 300
    assert all(each.balanced for each in seen)
    assert outbox.stats().accepted == 300


def test_the_last_id_of_a_lease_is_that_of_an_event(outbox: Outbox, clock: FakeClock) -> None:
    """Also where it is cut to whole batches and events in its middle were erased: what remains of it is never empty."""
    for number in range(1, 31):
        outbox.put(b"%d" % number, 1)
    outbox.erase(range(14, 21))
    lease = outbox.lease(40, 60, batch=10)
    assert isinstance(lease, Lease)
    assert (lease.first, lease.last) == (1, 30)
    outbox.release(lease)
    outbox.put(b"31", 1)
    outbox.erase([21, 22, 23, 30])
    lease = outbox.lease(40, 60, batch=20)
    assert isinstance(lease, Lease)
    assert (lease.first, lease.last) == (1, 13)


@pytest.mark.parametrize("how", ["erase", "expire"])
def test_what_a_frozen_process_has_stays_until_another_has_it_or_it_has_ended(
    outbox: Outbox, worker: Worker, clock: FakeClock, how: str
) -> None:
    """It may have read it already, and sends it when it wakes."""
    for number in range(1, 6):
        outbox.put(b"%d" % number, 1)

    def remove() -> int:
        return outbox.erase() if how == "erase" else len(outbox.expire(clock.time() + 1))

    assert isinstance(worker.call("lease", 3, 60), Lease)
    worker.freeze()
    clock.advance(61)
    assert remove() == 2
    assert outbox.stats().leased == 3
    again = outbox.lease(2, 60)
    assert isinstance(again, Lease)
    assert (again.first, again.last) == (1, 2)
    assert remove() == 1  # that one is nobody's by now
    outbox.release(again)
    worker.kill()
    assert remove() == 2


@pytest.mark.parametrize("how", ["erase", "expire"])
def test_a_lease_whose_last_event_was_removed_meanwhile_is_lost(outbox: Outbox, clock: FakeClock, how: str) -> None:
    """Of which nobody knew any more.  A lease without an event would look like damage."""
    for number in range(1, 4):
        outbox.put(b"%d" % number, 1)
    lease = outbox.lease(3, 60)
    assert isinstance(lease, Lease)
    outbox.forget(lease.token)
    if how == "erase":
        assert outbox.erase([3]) == 1
    else:
        assert len(outbox.expire(clock.time() + 1)) == 3
    assert outbox.extend(lease, 60) is None
    outbox.confirm(lease)
    assert outbox.ack(lease, 3) is None


def test_a_lease_that_is_held_and_has_no_event_is_damage(outbox: Outbox) -> None:
    outbox.put(b"1", 1)
    lease = outbox.lease(1, 60)
    assert isinstance(lease, Lease)
    outbox.confirm(lease)
    with outbox.db.write() as connection:
        connection.execute("DELETE FROM event")  # as it looks where its page has changed places with another
    outbox.confirm(lease)  # once more, on the database that is in its place now
    assert outbox.stats().pending == 0
    assert len(list(outbox.db.folder.glob("*.damaged-*"))) >= 1
