"""An outbox in plain Python: what every implementation must do, without a disk, processes or speed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from segment_durable.records import Backoff

__all__ = ["Holding", "Model", "Sender"]

REBOOT_CAP = 300.0


@dataclass
class Sender:
    """A process, here or elsewhere.  `life` changes when it dies and another takes its place."""

    name: str
    life: int = 0


@dataclass
class Holding:
    """A lease as the model knows it."""

    token: bytes | None  # None: what is left of a lost one, under a token that nobody knows
    first: int
    last: int
    deadline: float
    sender: Sender
    life: int

    @property
    def has_holder(self) -> bool:
        """Whether somebody may be sending what it covers, also after the deadline: who was frozen, or slow."""
        return self.sender.life == self.life

    def is_alive(self, now: float) -> bool:
        return self.has_holder and now < self.deadline


@dataclass
class Model:
    """Times: `now` is the boot clock's; a reboot ends all lives, so that a lease of before it is never alive."""

    events: dict[int, tuple[int, bytes]] = field(default_factory=dict)  # id -> (appended_at, body), in order
    dead: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    leases: list[Holding] = field(default_factory=list)  # that nobody has ended or taken over
    accepted: list[bytes] = field(default_factory=list)
    delivered: list[bytes] = field(default_factory=list)
    expired: list[bytes] = field(default_factory=list)
    erased: list[bytes] = field(default_factory=list)
    backoff: Backoff = field(default_factory=Backoff)
    last_id: int = 0

    # -- in

    def put(self, body: bytes, appended_at: int, limit: int) -> bool:
        if limit and len(self.events) >= limit:
            return False
        self.accepted.append(body)
        self._append(appended_at, body)
        return True

    def requeue(self, ids: Sequence[int] | None) -> int:
        moved = [each for each in (sorted(self.dead) if ids is None else dict.fromkeys(ids)) if each in self.dead]
        for each in moved:
            self._append(*self.dead.pop(each))
        return len(moved)

    def _append(self, appended_at: int, body: bytes) -> None:
        self.last_id += 1
        self.events[self.last_id] = (appended_at, body)

    # -- out

    def lease(self, now: float, limit: int, max_leases: int, hurry: bool) -> tuple[int, int] | str:
        """The range to be leased, or the reason why there is none."""
        if not self.events:
            return "empty"
        if self.backoff.not_before > now and not (hurry and not self.backoff.told):
            return "backoff"
        living = [each for each in self.leases if each.is_alive(now)]
        if len(living) >= max_leases:
            return "leased"
        run: list[int] = []
        for each in self._free_or_gap(living):
            if each is None:
                if run:
                    break
            elif not run or each < run[0] + limit:
                run.append(each)
        if not run:
            return "leased"
        for lost in [each for each in self.leases if each not in living and each.first <= run[-1]]:
            self.leases.remove(lost)
            if lost.last > run[-1]:  # the rest of it stays, for its attempts only
                self.leases.append(replace(lost, token=None, first=run[-1] + 1, life=-1))
        return run[0], run[-1]

    def _free_or_gap(self, living: list[Holding]) -> Iterator[int | None]:
        """The ids of events in order, `None` where a lease lies between."""
        leases = sorted((each.first, each.last) for each in living)
        for event_id in self.events:
            while leases and leases[0][1] < event_id:
                yield None
                leases.pop(0)
            if not (leases and leases[0][0] <= event_id):
                yield event_id

    def ack(self, holding: Holding, through: int, now: float) -> int | None:
        if holding not in self.leases:
            return None
        gone = [each for each in self.events if holding.first <= each <= through]
        self.delivered += [self.events.pop(each)[1] for each in gone]
        self._end_backoff(now)
        self._shrink(holding, through)
        return len(gone)

    def bury(self, holding: Holding, event_id: int, max_dead: int, now: float) -> bool | None:
        if holding not in self.leases:
            return None
        if len(self.dead) >= max_dead:
            return False
        if event_id in self.events:  # it is not if it has expired under a dead lease
            self.dead[event_id] = self.events.pop(event_id)
        self._end_backoff(now)
        self._shrink(holding, event_id)
        return True

    def release(self, holding: Holding) -> bool:
        if holding not in self.leases:
            return False
        self.leases.remove(holding)
        return True

    def fail(self, holding: Holding, after: Backoff) -> None:
        self.backoff = after
        self.release(holding)

    def extend(self, holding: Holding, deadline: float) -> bool:
        if holding not in self.leases:
            return False
        holding.deadline = deadline
        return True

    def expire(self, cutoff: int, limit: int) -> list[bytes]:
        held = [each for each in self.leases if each.has_holder]
        gone: list[bytes] = []
        for number, (event_id, (appended_at, body)) in enumerate(list(self.events.items())):
            is_held = any(one.first <= event_id <= one.last for one in held)
            if len(gone) == limit or (appended_at >= cutoff and not (is_held and number)):
                break
            if not is_held:
                del self.events[event_id]
                gone.append(body)
        self.expired += gone
        self._end_without_last()
        return gone

    def erase(self, ids: Sequence[int] | None) -> int:
        held = [each for each in self.leases if each.has_holder]
        gone = [
            each
            for each in (list(self.events) if ids is None else dict.fromkeys(ids))
            if each in self.events and not any(one.first <= each <= one.last for one in held)
        ]
        self.erased += [self.events.pop(each)[1] for each in gone]
        self._end_without_last()
        return len(gone)

    def erase_dead(self, ids: Sequence[int] | None) -> int:
        gone = [each for each in (list(self.dead) if ids is None else dict.fromkeys(ids)) if each in self.dead]
        self.erased += [self.dead.pop(each)[1] for each in gone]
        return len(gone)

    def _end_backoff(self, now: float) -> None:
        """A wait that the receiver has asked for meanwhile, in an answer to another sender, holds nevertheless."""
        if not (self.backoff.told and self.backoff.not_before > now):
            self.backoff = Backoff(last_error=self.backoff.last_error, last_error_at=self.backoff.last_error_at)

    def _shrink(self, holding: Holding, through: int) -> None:
        holding.first = through + 1
        if through >= holding.last:
            self.leases.remove(holding)

    def _end_without_last(self) -> None:
        """A dead lease, too, covers the event of its last id."""
        self.leases = [each for each in self.leases if each.last in self.events]

    # -- what is there

    def leased(self) -> int:
        return sum(1 for each in self.events for one in self.leases if one.has_holder and one.first <= each <= one.last)

    def everything(self) -> list[bytes]:
        """Every event that is anywhere: what was accepted must be here once."""
        kept = [body for rows in (self.events, self.dead) for _, body in rows.values()]
        return sorted(kept + self.delivered + self.expired + self.erased)
