"""Any sequence of calls, by two processes that die and machines that restart: the outbox does what the model does.

`HYPOTHESIS_PROFILE=long` in the environment tries twenty times as many sequences.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from segment_durable.records import Backoff, Lease, NotNow
from segment_durable.testing.clock import FakeClock

from .common import becomes
from .implementations import make_outbox
from .model import REBOOT_CAP, Holding, Model, Sender
from .workers import Nursery

YEAR = 365 * 86_400.0
EXAMPLES = 60 * (20 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 1)

HERE, THERE = "here", "there"
senders = st.sampled_from([HERE, THERE])
durations = st.sampled_from([1.0, 30.0, 60.0, 400.0])
waits = st.sampled_from([1.0, 30.0, 60.0, 290.0])  # retries ask for no longer ones than 300 s

OFTEN = ["put", "lease", "use_a_lease"]
SOMETIMES = ["use_a_stale_lease", "time_passes", "expire", "requeue_all", "requeue_some", "there_dies"]
SELDOM = ["erase", "the_wall_clock_jumps", "the_machine_restarts", "here_is_closed_and_opened", "upkeep"]
ACTIONS = [*OFTEN * 8, *SOMETIMES * 2, *SELDOM]


class OutboxMachine(RuleBasedStateMachine):
    """`here` is this process, `there` another one, which is killed and replaced; both have the same outbox open."""

    implementation: ClassVar[str]
    nursery: ClassVar[Nursery]

    last_by = HERE  # who made the last call

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.clock = FakeClock()
        self.taken: list[tuple[Lease, Holding]] = []
        self.number = 0
        self.boots = 1
        self.backoff_is_old = False  # it was stored before a restart of the machine
        self.jumped_since_backoff = False
        self.sender = {name: Sender(name) for name in (HERE, THERE)}
        self.folder = Path(tempfile.mkdtemp(prefix="outbox-model-"))

    @initialize()
    def open(self) -> None:
        self.here = make_outbox(self.implementation, self.folder, self.clock)
        self.there = self.nursery.worker(self.implementation)
        self.there.open(self.folder, self.clock)
        # Reads behind the outbox's back.
        self.file = sqlite3.connect(f"file:{self.folder / 'outbox.db'}?mode=ro", uri=True, isolation_level=None)

    def teardown(self) -> None:
        if not hasattr(self, "file"):
            return
        try:
            assert self.file.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        finally:
            self.file.close()
            self.there.close()
            self.here.close()
            shutil.rmtree(self.folder)

    def call(self, by: str, name: str, *args: Any, **named: Any) -> Any:
        self.last_by = by
        if by == HERE:
            return getattr(self.here, name)(*args, **named)
        return self.there.call(name, *args, **named)

    @rule(data=st.data(), action=st.sampled_from(ACTIONS))
    def step(self, data: st.DataObject, action: str) -> None:
        """One rule for all: with a rule for each, Hypothesis leaves so many out of a run that leases were rare."""
        getattr(self, action)(data)
        self.backoff_is_old = self.backoff_is_old and self.model.backoff.not_before > 0

    # -- in

    def put(self, data: st.DataObject) -> None:
        by, count = data.draw(senders), data.draw(st.integers(1, 6))
        size, limit = data.draw(st.sampled_from([1, 40, 2_500])), data.draw(st.sampled_from([0, 5, 20]))
        for _ in range(count):
            self.number += 1
            body = f"{by}{self.number}".encode() * size
            now = int(self.clock.time() * 1000)
            assert self.call(by, "put", body, now, limit) == self.model.put(body, now, limit)

    # -- out

    def lease(self, data: st.DataObject) -> None:
        by, limit = data.draw(senders), data.draw(st.integers(1, 8))
        seconds, max_leases = data.draw(durations), data.draw(st.integers(1, 3))
        hurry = data.draw(st.sampled_from([True, True, False]))
        answer = self.call(by, "lease", limit, seconds, max_leases=max_leases, hurry=hurry)
        now = self.clock.boot()
        expected = self.model.lease(now, limit, max_leases, hurry)
        if isinstance(expected, str):
            assert isinstance(answer, NotNow)
            assert answer.reason == expected
            if expected == "backoff":
                assert answer.seconds == pytest.approx(self.model.backoff.not_before - now)
            return
        assert isinstance(answer, Lease)
        assert (answer.first, answer.last) == expected
        assert answer.deadline == now + seconds
        assert answer.attempt >= self.model.backoff.failures
        sender = self.sender[by]
        holding = Holding(answer.token, answer.first, answer.last, answer.deadline, sender, sender.life)
        self.model.leases.append(holding)
        self.taken.append((answer, holding))
        events = self.model.events
        rows = self.call(by, "rows", answer.first, answer.last)
        assert rows == [(each, events[each][1]) for each in events if answer.first <= each <= answer.last]

    def valid(self) -> list[tuple[Lease, Holding]]:
        """The leases whose holders live and have not lost them: a dead process says no more."""
        leases = self.model.leases
        return [each for each in self.taken if each[1] in leases and each[1].sender.life == each[1].life]

    def stale(self) -> list[tuple[Lease, Holding]]:
        """The last few that are over, for whatever reason."""
        return [each for each in self.taken if each[1] not in self.model.leases][-4:]

    def use_a_lease(self, data: st.DataObject) -> None:
        if self.valid():
            self.use(data.draw(st.sampled_from(self.valid())), data)
        else:
            self.lease(data)

    def use_a_stale_lease(self, data: st.DataObject) -> None:
        if self.stale():
            self.use(data.draw(st.sampled_from(self.stale())), data)

    def use(self, leased: tuple[Lease, Holding], data: st.DataObject) -> None:
        lease, holding = leased
        how = data.draw(st.sampled_from(["ack", "ack", "ack a part", "bury", "release", "back off", "extend"]))
        by, now, first = holding.sender.name, self.clock.boot(), min(holding.first, lease.last)
        if how in ("ack", "ack a part"):
            through = lease.last if how == "ack" else data.draw(st.integers(first, lease.last))
            answer = self.call(by, "ack", lease, through)
            assert answer == self.model.ack(holding, through, now)
        elif how == "bury":
            max_dead = data.draw(st.sampled_from([2, 1_000]))
            answer = self.call(by, "bury", lease, first, status=400, code="bad", answer="no", max_dead=max_dead)
            assert answer == self.model.bury(holding, first, max_dead, now)
        elif how == "release":
            assert self.call(by, "release", lease) == self.model.release(holding)
        elif how == "back off":
            wait, told, failures = data.draw(st.tuples(waits, st.booleans(), st.integers(0, 3)))
            backoff = Backoff(now + wait, told, failures, now - 1, None, False, "unreachable", 1_700_000_000.0)
            _, after = self.call(by, "fail", lease, becomes(backoff))
            self.model.fail(holding, backoff)
            assert after == backoff
            self.backoff_is_old = self.jumped_since_backoff = False
        else:
            longer = data.draw(durations)
            answer = self.call(by, "extend", lease, longer)
            if self.model.extend(holding, now + longer):
                assert (answer.token, answer.last, answer.deadline) == (lease.token, lease.last, now + longer)
            else:
                assert answer is None

    def expire(self, data: st.DataObject) -> None:
        age, limit = data.draw(st.sampled_from([0.0, 45.0, 1_000.0])), data.draw(st.sampled_from([2, 1_000]))
        older_than = self.clock.time() - age
        expected = self.model.expire(int(older_than * 1000), limit)
        assert self.call(data.draw(senders), "expire", older_than, limit) == expected

    # -- dead letters

    def requeue_all(self, data: st.DataObject) -> None:
        assert self.call(data.draw(senders), "requeue") == self.model.requeue(None)

    def requeue_some(self, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.integers(0, self.model.last_id + 1), max_size=2))
        ids += data.draw(st.lists(st.sampled_from(sorted(self.model.dead) or [0]), max_size=3))
        assert self.call(data.draw(senders), "requeue", ids) == self.model.requeue(ids)

    def erase(self, data: st.DataObject) -> None:
        """An operator's command, of all or of some, also of events that are not there."""
        some = data.draw(st.none() | st.lists(st.integers(0, self.model.last_id + 1), max_size=3, unique=True))
        if data.draw(st.booleans()):
            assert self.call(data.draw(senders), "erase", some) == self.model.erase(some)
        else:
            assert self.call(data.draw(senders), "erase_dead", some) == self.model.erase_dead(some)

    # -- time

    def time_passes(self, data: st.DataObject) -> None:
        self.clock.advance(data.draw(st.sampled_from([0.0, 0.5, 29.0, 31.0, 61.0, 500.0])))
        self.there.set_clock(self.clock)

    def the_wall_clock_jumps(self, data: st.DataObject) -> None:
        if not self.backoff_is_old:  # how such a wait ends if the clock is wrong: test_backoff.py
            self.clock.jump(data.draw(st.sampled_from([YEAR, -YEAR])))
            self.there.set_clock(self.clock)
            self.jumped_since_backoff = True

    def the_machine_restarts(self, data: st.DataObject) -> None:
        if self.jumped_since_backoff or self.backoff_is_old:
            return
        off = data.draw(st.sampled_from([0.0, 20.0, 1_000.0]))
        left = self.model.backoff.not_before - self.clock.boot() - off
        self.there_dies(data)
        self.boots += 1
        self.clock.reboot(f"boot-{self.boots}", off=off)
        self.here_is_closed_and_opened(data)
        self.there.set_clock(self.clock)
        if self.model.backoff.not_before:
            not_before = self.clock.boot() + min(max(0.0, left), REBOOT_CAP)
            self.model.backoff = replace(self.model.backoff, not_before=not_before)
            self.backoff_is_old = True

    # -- life and death

    def there_dies(self, data: st.DataObject) -> None:
        self.there.kill()
        self.sender[THERE].life += 1
        self.there = self.nursery.worker(self.implementation)
        self.there.open(self.folder, self.clock)

    def here_is_closed_and_opened(self, data: st.DataObject) -> None:
        self.here.close()
        self.sender[HERE].life += 1
        self.here = make_outbox(self.implementation, self.folder, self.clock)

    def upkeep(self, data: st.DataObject) -> None:
        truncate = data.draw(st.booleans())
        if data.draw(senders) == HERE:
            self.here.db.wal.checkpoint(truncate=truncate)
            self.here.db.space.give_back()
        else:
            self.there.call("db.wal.sync")
            self.there.call("db.wal.checkpoint", truncate=truncate)

    # -- after each step

    @invariant()
    def the_rows_are_the_models(self) -> None:
        if not hasattr(self, "file"):
            return
        model = self.model
        rows = self.file.execute("SELECT id, appended_at, body FROM event ORDER BY id").fetchall()
        assert rows == [(each, *row) for each, row in model.events.items()]
        dead = self.file.execute("SELECT id, appended_at, body FROM dead ORDER BY id").fetchall()
        assert dead == [(each, *row) for each, row in sorted(model.dead.items())]
        known = {lease.token for lease, _ in self.taken}
        leases = [
            (first, last, token if token in known else None, deadline)
            for first, last, token, deadline in self.file.execute(
                "SELECT first_id, last_id, token, deadline FROM lease ORDER BY first_id"
            )
        ]
        expected = sorted(model.leases, key=lambda each: each.first)
        assert leases == [(each.first, each.last, each.token, each.deadline) for each in expected]

    @invariant()
    def nothing_is_lost_and_nothing_is_there_twice(self) -> None:
        assert self.model.everything() == sorted(self.model.accepted)

    @invariant()
    def the_books_balance(self) -> None:
        if not hasattr(self, "file"):
            return
        model, now = self.model, self.clock.boot()
        counted = self.file.execute("SELECT count(*) FROM event").fetchone()[0]
        assert self.call(self.last_by, "pending") == counted == len(model.events)
        assert self.call(self.last_by, "last_id") == model.last_id
        stats = self.call(self.last_by, "stats")
        assert stats.balanced, stats
        assert (stats.pending, stats.leased, stats.dead) == (len(model.events), model.leased(), len(model.dead))
        assert (stats.accepted, stats.delivered) == (len(model.accepted), len(model.delivered))
        assert (stats.erased, stats.expired) == (len(model.erased), len(model.expired))
        assert stats.failures == model.backoff.failures
        assert stats.next_attempt_seconds == pytest.approx(max(0.0, model.backoff.not_before - now))
        assert stats.last_error == model.backoff.last_error


@pytest.fixture
def machine(nursery: Nursery, implementation: str) -> type[OutboxMachine]:
    class Machine(OutboxMachine):
        pass

    Machine.nursery, Machine.implementation = nursery, implementation
    return Machine


@pytest.mark.timeout(600 + 30 * EXAMPLES)
def test_any_sequence_of_calls_does_what_the_model_does(machine: type[OutboxMachine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=40,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
