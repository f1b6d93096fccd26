"""The outbox: the sole owner of an event's states.

::

    from       by                              to
    (none)     put                             pending
    pending    lease                           leased
    leased     ack                             gone, delivered
    leased     bury                            dead
    leased     release, or the lease's death   pending
    pending    expire                          gone, expired
    pending    erase                           gone, erased
    dead       requeue                         pending, under a new id
    dead       erase_dead                      gone, erased

A lease is one row that covers a range of ids, so an event is "leased" by where its id lies and leasing writes O(1).
Every ack, release and bury names the lease's token in the same transaction; a token that is not there any more means
that the lease was lost to another sender, and no event is touched.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from segment_durable.backoff import current_backoff, end_backoff, store_backoff
from segment_durable.books import count
from segment_durable.clock import Clock
from segment_durable.connections import WRITE_TIMEOUT
from segment_durable.database_file import unavailable
from segment_durable.db import Database
from segment_durable.dead_letters import (
    bury_event,
    dead_ids,
    erase_letters,
    how_many_dead,
    read_letters,
    requeue_letters,
)
from segment_durable.errors import OutboxError, SourceMismatch, StorageError
from segment_durable.guards import after_damage, whole, with_reserve
from segment_durable.intake import Intake
from segment_durable.leases import AHEAD, between, end_lease, end_without_last, first_free, shrink, take_over
from segment_durable.records import Backoff, DeadLetter, Lease, NotNow, OutboxStats, Row
from segment_durable.soundness import MOST, TOTALS_KINDS, UNSOUND_BODY, all_sound, are_books_sound, malformed, sound
from segment_durable.source import claim
from segment_durable.views import TOTALS, read_leases, read_stats

__all__ = ["Outbox", "other_source"]

_NO_LIMIT = 1 << 62
_SPAN = "SELECT id, appended_at, body FROM event WHERE id BETWEEN ? AND ? ORDER BY id LIMIT ?"
_ERASED_AT_ONCE = 5_000  # events in one transaction
_MOVED_AT_ONCE, _MOVED_BYTES = 500, 1 << 20  # events, and after how many bytes of them no more
_DEAD_AT_ONCE = 100  # dead letters, of up to 32 KiB each, in one transaction
_BUSY_LOOK = 0.5  # seconds after which a sender looks again at leases of others

# The first id is looked up apart: that costs less than an aggregate, by as much as the comparison takes.
_JOINED = """
SELECT count(*), (SELECT min(id) FROM event WHERE id >= ?), max(id), CAST(group_concat(body, ',') AS BLOB)
FROM (SELECT id, body FROM event WHERE id BETWEEN ? AND ? AND body >= x'' ORDER BY id LIMIT ?)
"""
_UNSOUND = f"SELECT 1 FROM event WHERE id BETWEEN ? AND ? AND {UNSOUND_BODY} LIMIT 1"


class Outbox:
    """The outbox in `folder`, created if there is none.

    Raises `OutboxUnavailable`, `NotAnOutbox` or `SourceMismatch` if it can't be used; its methods raise
    `StorageError` and `OutboxBusy`, and then have changed nothing (`erase`, `requeue` and `erase_dead`: nothing more).
    `max_pending` of a put: 0 means no limit.
    """

    def __init__(self, folder: Path, clock: Clock, *, full: bool = False, write_key: str | None = None) -> None:
        self._clock = clock
        self.db = Database(folder, full=full)
        self._intake = Intake(self.db)
        self._is_moving = False
        self._none_through = 0  # none of this process's events up to that id is known to wait
        if write_key is not None:
            try:
                self._claim(write_key)
            except BaseException as problem:
                self.db.connections.close()
                if isinstance(problem, StorageError):
                    raise unavailable(folder, problem) from problem
                raise

    @whole
    def close(self, timeout: float = WRITE_TIMEOUT) -> None:
        """Close the files, waiting for other threads and processes `timeout` seconds at most.

        May be called twice; nothing else may be called afterwards.
        """
        self.db.connections.close(timeout)

    def is_outermost(self) -> bool:
        """Whether this thread is in no other call on this outbox, as a signal handler's may be."""
        return self.db.connections.is_outermost()

    # -- in

    def put(self, body: bytes, appended_at: int, max_pending: int = 0) -> bool:
        """Append one event; see `Intake.put`."""
        return self._intake.put(body, appended_at, max_pending) or self._put_after_all(body, appended_at, max_pending)

    @whole
    def put_all(self, events: Sequence[tuple[int, bytes]]) -> None:
        """Append events that another outbox had taken; see `Intake.put_all`."""
        self._intake.put_all(events)

    # -- out

    @with_reserve
    def lease(
        self,
        limit: int,
        seconds: float,
        *,
        batch: int = 1,
        max_leases: int = 1,
        hurry: bool = False,
        token: bytes | None = None,
    ) -> Lease | NotNow:
        """Take the first `limit` events that nobody has, for `seconds`.

        Of more than `batch` events as many as make whole batches, so that no small one has to follow them.  At most
        `max_leases` leases live at once; with 1, events leave in order.  `hurry` goes before the end of a backoff, but
        not of one that the receiver asked for.  `token` is the lease's name, for who may have to `forget` it without
        having got it; `None` has one made.
        """
        newest = self.newest()
        if newest <= self._none_through and self.db.read_one("SELECT min(id) FROM event")[0] is None:
            return NotNow("empty", None)  # found out without waiting for the writers
        self.db.space.check_delivery()
        token = token or secrets.token_bytes(16)
        try:
            found = self._lease(token, limit, seconds, batch, max_leases, hurry)
            if isinstance(found, NotNow) and found.reason == "empty":
                self._none_through = newest
            return found
        except BaseException:
            self.db.lock.held.discard(token)  # or it would be taken for a lease that there is
            raise

    def _lease(
        self, token: bytes, limit: int, seconds: float, batch: int, max_leases: int, hurry: bool
    ) -> Lease | NotNow:
        with self.db.write() as connection:
            if self._is_moving:
                return NotNow("leased", _BUSY_LOOK)
            now = self._clock.boot()
            count, low, high = connection.execute(AHEAD, (_NO_LIMIT, limit, 0, _NO_LIMIT)).fetchone()
            if low is None:
                return NotNow("empty", None)
            before = current_backoff(connection, self._clock)
            if before.not_before > now and not (hurry and not before.told):
                return NotNow("backoff", before.not_before - now, before)
            living: list[Any] = []
            dead: list[Any] = []
            if count:
                living, dead = self._sort_leases(connection, now)
                if len(living) >= max_leases:
                    return NotNow("leased", _BUSY_LOOK)
                span = first_free(connection, living, limit)
            else:
                span = (low, high)
            if span is None:
                return NotNow("leased", _BUSY_LOOK)
            first, last = span
            if last - first >= batch:
                last -= (last - first + 1) % batch
                # Of a lease the last id is that of an event, whatever has left from the middle of the others.
                (last,) = connection.execute("SELECT max(id) FROM event WHERE id <= ?", (last,)).fetchone()
            attempts = [before.failures + (before.first_throttle is not None)]
            attempts += take_over(connection, dead, first, last)
            lease = Lease(token, first, last, max(attempts), now + seconds)
            connection.execute(
                "INSERT INTO lease (first_id, last_id, token, attempt, holder, pid, boot_id, leased_at, deadline) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(first, last, lease.token, lease.attempt, self.db.lock.slot),
                    *(os.getpid(), self._clock.boot_id(), now, lease.deadline),
                ),
            )
            self.db.lock.held.add(lease.token)  # before anybody else can see the lease
        return lease

    @after_damage
    def rows(self, first: int, last: int, max_bytes: int = _NO_LIMIT) -> list[Row]:
        """The events with these ids, in order; some may have left.

        Reading ends after the event with which their bodies come to more than `max_bytes`.
        """
        found: list[Row] = []
        with self.db.read() as connection:
            for event_id, body in connection.execute(
                "SELECT id, body FROM event WHERE id BETWEEN ? AND ? ORDER BY id", (first, last)
            ):
                # The ids of pages that a disk has written to the wrong places may come in any order.
                if type(body) is not bytes or not first <= event_id <= last or (found and event_id <= found[-1].id):
                    raise malformed()
                found.append(Row(event_id, body))
                max_bytes -= len(body)
                if max_bytes < 0:
                    break
        return found

    @after_damage
    def confirm(self, lease: Lease) -> None:
        """For when no event was found: raise `StorageError` if the lease is held, for its last id is that of an event.

        Pages that a disk has written to the wrong places are whole, and SQLite finds nothing wrong with them.
        """
        with self.db.read() as connection:
            found = connection.execute("SELECT first_id, last_id FROM lease WHERE token = ?", (lease.token,)).fetchone()
            if found is None:
                return
            first, last = sound(found, (int, int))
            if connection.execute("SELECT 1 FROM event WHERE id BETWEEN ? AND ?", (first, last)).fetchone() is None:
                raise malformed()

    @after_damage
    def joined(self, first: int, last: int, limit: int) -> tuple[int, int, int, bytes]:
        """The first `limit` events with these ids: how many, the first and the last id, the bodies joined by commas.

        SQLite joins them in one step.  Python's sqlite3 gives the interpreter lock away at each step, and beside a
        busy caller every time costs more than the row does.
        """
        count, low, high, events = self.db.read_one(_JOINED, (first, first, last, limit))
        end = high if count == limit else last
        if count != end - first + 1:  # some have left, or were passed over because they are damaged
            with self.db.read() as connection:
                if connection.execute(_UNSOUND, (first, end)).fetchone() is not None:
                    raise malformed()
        return (count, low, high, events) if count else (0, 0, 0, b"")

    @after_damage
    def halve(self, first: int, last: int, limit: int) -> tuple[int, int] | None:
        """Of what `joined` counts: the last id of the first half, and that of the second; None of fewer than two.

        Pages that a disk has written to the wrong places are whole, and hold other ids than they should: then the two
        looks here do not agree.  A halving that went on with that would come to no end.
        """
        with self.db.read() as connection:
            count, low, high, _ = connection.execute(_JOINED, (first, first, last, limit)).fetchone()
            if count < 2:
                return None
            query = "SELECT id FROM event WHERE id BETWEEN ? AND ? ORDER BY id"
            ids = [each for (each,) in connection.execute(query, (low, high))]
            if len(ids) != count or not low == ids[0] < ids[-1] == high or ids != sorted(ids):
                raise malformed()
        return ids[(count - 1) // 2], high

    @with_reserve
    def extend(self, lease: Lease, seconds: float) -> Lease | None:
        """The lease with its deadline `seconds` from now, or None if it was lost."""
        deadline = self._clock.boot() + seconds
        with self.db.write() as connection:
            changed = connection.execute(
                "UPDATE lease SET deadline = ? WHERE token = ?", (deadline, lease.token)
            ).rowcount
        if not changed:
            self.db.lock.held.discard(lease.token)
            return None
        return Lease(lease.token, lease.first, lease.last, lease.attempt, deadline)

    @with_reserve
    def ack(self, lease: Lease, through: int) -> int | None:
        """Delivered, up to and with the event `through`: delete those, keep the rest leased.

        How many were deleted, or None if the lease was lost and nothing was.
        """
        with self.db.write() as connection:
            if through == lease.last and end_lease(connection, lease):
                first, last = lease.first, lease.last
            else:
                found = self._fence(connection, lease, through)
                if found is None:
                    return None
                first, last = found
                shrink(connection, lease, through, last)
            deleted = connection.execute("DELETE FROM event WHERE id BETWEEN ? AND ?", (first, through)).rowcount
            count(connection, "delivered = delivered + ?, last_id = max(last_id, ?)", (deleted, through))
            end_backoff(connection, self._clock)
        if through >= last:
            self.db.lock.held.discard(lease.token)
        self._none_through = through
        return deleted

    @with_reserve
    def bury(self, lease: Lease, event_id: int, *, status: int, code: str, answer: str, max_dead: int) -> bool | None:
        """Refused by itself: move the event, the first of the lease, to the dead letters.

        True if it was moved, False if there are `max_dead` dead letters already, None if the lease was lost.
        """
        with self.db.write() as connection:
            found = self._fence(connection, lease, event_id)
            if found is None:
                return None
            if how_many_dead(connection) >= max_dead:
                return False
            bury_event(connection, event_id, int(self._clock.time() * 1000), status, code, answer)
            end_backoff(connection, self._clock)
            shrink(connection, lease, event_id, found[1])
        if event_id >= found[1]:
            self.db.lock.held.discard(lease.token)
        return True

    @with_reserve
    def release(self, lease: Lease) -> bool:
        """Give the lease up: the rest of it is pending again.  False if it was lost already."""
        with self.db.write() as connection:
            removed = connection.execute("DELETE FROM lease WHERE token = ?", (lease.token,)).rowcount
        self.db.lock.held.discard(lease.token)
        return bool(removed)

    @with_reserve
    def fail(self, lease: Lease, change: Callable[[Backoff], Backoff]) -> tuple[Backoff, Backoff]:
        """Not delivered: the rest of the lease is pending again, and `change` makes the backoff that binds all senders.

        That before and that after it.  It is changed all the same if the lease was lost: an attempt was made, and
        failed.  That the budget is used up is then for the next one to report, who has the events.
        """
        with self.db.write() as connection:
            removed = connection.execute("DELETE FROM lease WHERE token = ?", (lease.token,)).rowcount
            before = current_backoff(connection, self._clock)
            after = change(before) if removed else replace(change(before), reported=before.reported)
            store_backoff(connection, self._clock, after)
        self.db.lock.held.discard(lease.token)
        return before, after

    @after_damage
    def is_told_to_wait(self) -> bool:
        """Whether the receiver has asked for a wait that is not over."""
        now = self._clock.boot(), self._clock.boot_id()
        return self.db.read_one("SELECT 1 FROM backoff WHERE told AND not_before > ? AND boot_id = ?", now) is not None

    def forget(self, token: bytes) -> None:
        """Give a lease up without touching the disk, for when that fails: the next `lease()` finds it dead."""
        self.db.lock.held.discard(token)

    @with_reserve
    def expire(self, older_than: float, limit: int = 1000) -> list[bytes]:
        """Remove the first events, up to `limit`, that were appended before `older_than` (seconds since 1970).

        Their messages are returned.  What is on its way stays: it may have arrived already.
        """
        cutoff = int(older_than * 1000)
        with self.db.read() as connection:
            oldest = connection.execute("SELECT appended_at FROM event ORDER BY id LIMIT 1").fetchone()
            if oldest is None or sound(oldest, (int,))[0] >= cutoff:
                return []
        with self.db.write() as connection:
            expired: list[Row] = []
            for low, high in between(self._on_their_way(connection), 0, MOST):
                found = connection.execute(_SPAN, (low, high, limit - len(expired)))
                rows = list(all_sound(found, (int, int, bytes)))
                old = list(takewhile(lambda row: row[1] < cutoff, rows))
                if old:
                    connection.execute("DELETE FROM event WHERE id BETWEEN ? AND ?", (low, old[-1][0]))
                    expired += [Row(event_id, body) for event_id, _, body in old]
                if len(old) < len(rows):
                    break
            if expired:
                end_without_last(connection)
                count(connection, "expired = expired + ?, last_id = max(last_id, ?)", (len(expired), expired[-1].id))
        return [row.body for row in expired]

    @whole
    def erase(self, ids: Sequence[int] | None = None) -> int:
        """Remove pending events, all that are there now or those with these ids, for good; how many.

        What is on its way stays: it may have arrived already.
        """
        if ids is not None:
            return self._erase([(each, each) for each in ids])
        erased, after, end = 0, 0, self.last_id()
        while after < end:  # in portions: other writers are let in between
            with self.db.read() as connection:
                query = "SELECT max(id) FROM (SELECT id FROM event WHERE id BETWEEN ? AND ? ORDER BY id LIMIT ?)"
                (last,) = connection.execute(query, (after + 1, end, _ERASED_AT_ONCE)).fetchone()
            if last is None:
                break
            erased += self._erase([(after + 1, last)])
            after = last
        return erased

    def move_to(self, other: Outbox, on_end: Callable[[], None]) -> int:
        """Append all events to another outbox and take no more; how many were moved.

        For when this one's path leads to other files.  In its books they count as erased, for another process may have
        it open still, or find it elsewhere.  What is on its way may arrive twice.  `on_end` is called when all was
        moved, and just before nothing is taken any more.
        """
        self._is_moving = True  # what others lease from here meanwhile would come before what was moved
        try:
            return self._move_to(other, on_end)
        finally:
            self._is_moving = False

    def _move_to(self, other: Outbox, on_end: Callable[[], None]) -> int:
        moved = 0
        while True:
            with self.db.write() as connection:
                query = "SELECT id, appended_at, body FROM event ORDER BY id LIMIT ?"
                rows = connection.execute(query, (_MOVED_AT_ONCE,))
                found, size = [], 0
                for row in all_sound(rows, (int, int, bytes)):
                    found.append(row)
                    size += len(row[2])
                    if size > _MOVED_BYTES:
                        break
                rows.close()
                if not found:
                    on_end()
                    self.db.connections.retire()
                    return moved
                other.put_all([(appended_at, body) for _, appended_at, body in found])
                connection.execute("DELETE FROM event WHERE id <= ?", (found[-1][0],))
                end_without_last(connection)
                count(connection, "erased = erased + ?, last_id = max(last_id, ?)", (len(found), found[-1][0]))
                is_waited_for = self.db.lock.is_waited_for()
            moved += len(found)
            if is_waited_for:  # by another process, which has the old files open
                self.db.lock.give_way()

    # -- dead letters

    @after_damage
    def dead_letters(self, limit: int = -1) -> list[DeadLetter]:
        """The dead letters, oldest first; at most `limit`, -1 means all."""
        with self.db.read() as connection:
            return read_letters(connection, limit)

    @whole
    def requeue(self, ids: Sequence[int] | None = None) -> int:
        """Give dead letters, all or those with these ids, another chance, behind what is pending; how many."""
        return self._in_portions(self._requeue, ids)

    @whole
    def erase_dead(self, ids: Sequence[int] | None = None) -> int:
        """Remove dead letters, all that are there now or those with these ids, for good; how many."""
        return self._in_portions(self._erase_dead, ids)

    # -- what is there

    def last_id(self, timeout: float = WRITE_TIMEOUT) -> int:
        """The highest id ever given, 0 if none was; `timeout` as for `first_id`."""
        last: int = self._totals(timeout)[0]
        return last

    @whole
    def first_id(self, timeout: float = WRITE_TIMEOUT) -> int | None:
        """The lowest id among the events that have not left, or None.

        Raises `StorageError` if another thread keeps the connection for `timeout` seconds.
        """
        first: int | None = self.db.read_one("SELECT min(id) FROM event", timeout=timeout)[0]
        return first

    @property
    def generation(self) -> int:
        """Another number for each database that has taken a damaged one's place, as far as this process has seen."""
        return self.db.connections.generation

    def newest(self) -> int:
        """The id of the event that was last appended by this process, without a look at the disk; 0: none was.

        Ids are dense, so where all before another one have left it tells how many wait at least.
        """
        return self._intake.newest

    def pending(self) -> int:
        """How many events have not left, those on their way included; does not count rows."""
        return self.load()[0]

    def load(self) -> tuple[int, int, int]:
        """The same; how many leases there are, dead ones included; and how many of them are not this process's."""
        own = len(self.db.lock.held)  # nearly: leases come and go meanwhile
        last, _, delivered, buried, erased, expired, _, _, leases = self._totals()
        return last - delivered - buried - erased - expired, leases, leases - own

    @after_damage
    def stats(self) -> OutboxStats:
        with self.db.read() as connection:
            if not are_books_sound(connection.execute(TOTALS).fetchone()):
                raise malformed()
            return read_stats(connection, self._clock, self.db.space.size_on_disk(), self._is_gone)

    # -- inside

    def _put_after_all(self, body: bytes, appended_at: int, max_pending: int) -> bool:
        """Refused, and so the limit is reached; or the counters are damaged, and another try is worth it."""
        try:
            pending = self.pending()
        except OutboxError:
            return False
        if max_pending and pending >= max_pending:
            return False
        if self._intake.put(body, appended_at, max_pending):
            return True
        self._check_next_id()
        return self._intake.put(body, appended_at, max_pending)

    @after_damage
    def _check_next_id(self) -> None:
        """See to it that there is no such event yet: in a page that is in a wrong place there may be one."""
        with self.db.read() as connection:
            (last, *_) = sound(connection.execute(TOTALS).fetchone(), TOTALS_KINDS)
            if connection.execute("SELECT 1 FROM event WHERE id = ?", (last + 1,)).fetchone() is not None:
                raise malformed()

    @after_damage
    def _totals(self, timeout: float = WRITE_TIMEOUT) -> Any:
        """The row of `TOTALS`."""
        totals = self.db.read_one(TOTALS, timeout=timeout)
        if not are_books_sound(totals):
            with self.db.read(timeout) as connection:  # once more: here it is known which database is the damaged one
                totals = connection.execute(TOTALS).fetchone()
                if not are_books_sound(totals):
                    raise malformed()
        return totals

    @with_reserve
    def _erase(self, spans: Sequence[tuple[int, int]]) -> int:
        erased = highest = 0
        with self.db.write() as connection:
            taken = self._on_their_way(connection)
            for first, last in spans:
                for low, high in between(taken, first, last):
                    (top,) = connection.execute(
                        "SELECT max(id) FROM event WHERE id BETWEEN ? AND ?", (low, high)
                    ).fetchone()
                    highest = max(highest, top or 0)
                    erased += connection.execute("DELETE FROM event WHERE id BETWEEN ? AND ?", (low, high)).rowcount
            end_without_last(connection)
            count(connection, "erased = erased + ?, last_id = max(last_id, ?)", (erased, highest))
        return erased

    def _in_portions(self, change: Callable[[Sequence[int]], int], ids: Sequence[int] | None) -> int:
        """Do it to those dead letters, all if `None`; other writers are let in between, and the WAL is kept short."""
        if ids is None:
            with self.db.read() as connection:
                ids = dead_ids(connection)
        return sum(change(ids[start : start + _DEAD_AT_ONCE]) for start in range(0, len(ids), _DEAD_AT_ONCE))

    @with_reserve
    def _requeue(self, ids: Sequence[int]) -> int:
        with self.db.write() as connection:
            moved, size = requeue_letters(connection, ids)
        self.db.wal.wrote(size)
        return moved

    @with_reserve
    def _erase_dead(self, ids: Sequence[int]) -> int:
        with self.db.write() as connection:
            return erase_letters(connection, ids)

    @after_damage
    def _claim(self, write_key: str) -> None:
        with self.db.write() as connection:
            is_ours = claim(connection, write_key)
        if not is_ours:
            raise other_source(self.db.folder)

    def _sort_leases(self, connection: sqlite3.Connection, now: float) -> tuple[list[Any], list[Any]]:
        living: list[Any] = []
        dead: list[Any] = []
        for lease in read_leases(connection):
            (dead if now >= lease[-1] or self._is_gone(lease, now) else living).append(lease)
        return living, dead

    def _on_their_way(self, connection: sqlite3.Connection) -> list[Any]:
        """The leases whose holders live, also those that are over.

        A frozen process may send what it had when it wakes, and a slow one when it has got its token or found the host.
        """
        now = self._clock.boot()
        return [lease for lease in read_leases(connection) if not self._is_gone(lease, now)]

    def _is_gone(self, lease: Any, now: float) -> bool:
        """Whether the holder of the lease has ended."""
        _, _, token, _, holder, _, boot_id, leased_at, _ = lease
        if boot_id != self._clock.boot_id():
            return True
        if leased_at > now + 1:  # from an earlier start of a machine that has no boot id
            return True
        return not self.db.lock.is_alive(holder, token)

    def _fence(self, connection: sqlite3.Connection, lease: Lease, through: int) -> tuple[int, int] | None:
        found = connection.execute("SELECT first_id, last_id FROM lease WHERE token = ?", (lease.token,)).fetchone()
        if found is None:
            self.db.lock.held.discard(lease.token)
            return None
        first, last = sound(found, (int, int))
        if last != lease.last or first < lease.first:  # or what others have would be acknowledged as well
            raise malformed()
        if not first <= through <= last:
            raise ValueError(f"event {through} is not within the lease of {first} to {last}")
        return first, last


def other_source(folder: Path) -> SourceMismatch:
    return SourceMismatch(folder, "this outbox belongs to another write_key: give each source an outbox_dir of its own")
