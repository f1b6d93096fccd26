"""Events in: each put is committed when it returns, and threads that come at the same time are committed together."""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from threading import Lock, get_ident

from segment_durable.connections import WRITE_TIMEOUT
from segment_durable.courtesy import Courtesy
from segment_durable.db import Database
from segment_durable.errors import OutboxBusy, OutboxError, StorageError
from segment_durable.sqlite_errors import SQLITE_PROBLEMS
from segment_durable.stack import COMMITTING, UNWINDING, need_room

__all__ = ["Intake"]

_NO_LIMIT = 1 << 62

# The last id ever given is max(the last row, state.last_id), because SQLite alone would hand the ids of a deleted tail
# out again; what has left is counted in `state`, so the number of events waiting is a subtraction.  Each LIMIT keeps
# SQLite from merging the queries, which would look for the last row once for each time that it is named.
_LAST = """
    SELECT highest, max(last_id, ifnull(highest, 0)) AS last, gone
    FROM (
        SELECT (SELECT max(id) FROM event) AS highest, last_id, delivered + buried + erased + expired AS gone
        FROM state LIMIT 1
    ) LIMIT 1
"""

# Limit, id and insert in one statement.  At the limit the id is that of a row that exists, and so the row is ignored.
# (INSERT ... SELECT ... WHERE would say it more plainly, and take 1.5 us longer: it reads the table that it writes, and
# so goes through a temporary one.)
_PUT = f"""
INSERT OR IGNORE INTO event (id, appended_at, body)
VALUES ((SELECT CASE WHEN last - gone < ? THEN last + 1 ELSE highest END FROM ({_LAST})), ?, ?)
"""


def _put_group(rows: int) -> str:
    """The same for so many events, of which those without a body are left out; the limit is the last parameter.

    One statement and so one step: Python's sqlite3 gives the interpreter lock away at each, and gets it back only when
    the threads that come for the next group let it have it.
    """
    values = ", ".join(f"({number}, ?, ?)" for number in range(1, rows + 1))
    return f"""
INSERT INTO event (id, appended_at, body)
SELECT last + column1, column2, column3 FROM ({_LAST}), (VALUES {values})
WHERE column3 IS NOT NULL AND last - gone + column1 <= ?
"""


# Few sizes, for each is a statement to be prepared and kept; the largest has less than SQLite's 999 parameters.
_SIZES = (4, 16, 64, 256)
_GROUPS = [_put_group(rows) for rows in _SIZES]
_MAX_GROUP = _SIZES[-1]
_MAX_TURN = 4  # groups that a thread commits before it leaves that to another, where each waits for the disk

_NEWEST = "SELECT body FROM event ORDER BY id DESC LIMIT ?"


class _Put:
    """A put that waits for a thread to commit it together with others."""

    __slots__ = ("_turn", "_waits", "accepted", "error", "parameters", "thread")

    def __init__(self, parameters: tuple[int, int, bytes]) -> None:
        self.parameters = parameters
        self.accepted: bool | None = None
        self.error: BaseException | None = None
        self.thread = get_ident()
        self._waits = False
        self._turn = Lock()
        self._turn.acquire()

    @property
    def is_decided(self) -> bool:
        return self.accepted is not None or self.error is not None

    def wait(self, seconds: float) -> bool:
        """Wait until it may be done, or the first of those who wait; False if that takes too long."""
        self._waits = True
        try:
            return self._turn.acquire(timeout=seconds)
        finally:
            self._waits = False

    def wake(self) -> bool:
        """Whether a thread waits for it."""
        with contextlib.suppress(RuntimeError):  # it is awake already
            self._turn.release()
        return self._waits


class Intake:
    """Appends events to the table `event` of `database`; an `Outbox` has one.

    Threads that come while another writes wait for the writer lock, and the first to get it commits the events of all.

    Where each commit waits for the disk (`full`) one thread leads: it commits group after group, up to `_MAX_TURN`, and
    the others wait for their results rather than for the lock.  What counts there is that the disk is not idle and that
    no thread waits for the interpreter lock more often than it must: so of those whose event is committed the first is
    woken just before the next commit, when nothing but the disk is left to wait for, and each of them wakes the next.

    Otherwise it is the other way round: it is quicker to let the thread that runs go on than to wake each for its turn
    (26,000 events a second from 8 threads, and 18,000 so).
    """

    def __init__(self, database: Database) -> None:
        self._db = database
        self._waiting: deque[_Put] = deque()
        self._done: deque[_Put] = deque()  # whose threads are to be woken, one by the other
        self._committing = False
        self._leader: int | None = None  # the thread that commits for all, with `full`
        self._courtesy = Courtesy(database)
        self.newest = 0  # the id of the event that was last appended here; 0: none was

    def put(self, body: bytes, appended_at: int, max_pending: int = 0) -> bool:
        """Append one event; it is committed when the call returns.

        `appended_at`: milliseconds since 1970.  Returns False, with nothing appended, if `max_pending` events are
        waiting.  Threads that come at the same time are committed in one transaction.
        """
        parameters = (max_pending or _NO_LIMIT, appended_at, body)
        need_room(UNWINDING)
        is_outermost = self._db.connections.is_outermost()
        try:
            return self._append(parameters)
        except BaseException:
            if is_outermost:
                self._db.connections.unwind()
            self._pass_on()  # wherever it was ended: nobody else would wake those who wait
            raise

    def put_all(self, events: Sequence[tuple[int, bytes]]) -> None:
        """Append these, of which each is the time and the body, in one transaction and whatever their number."""
        lock = self._db.lock
        lock.acquire(WRITE_TIMEOUT)
        try:
            self._db.space.check()
            with self._db.write() as connection:
                for appended_at, body in events:
                    if connection.execute(_PUT, (_NO_LIMIT, appended_at, body)).rowcount != 1:
                        raise StorageError("the outbox takes no events")
        finally:
            lock.release()
        self._db.wal.wrote(sum(len(body) for _, body in events))

    def _append(self, parameters: tuple[int, int, bytes]) -> bool:
        db, lock = self._db, self._db.lock
        if not self._waiting and lock.acquire_unless_busy(WRITE_TIMEOUT):
            try:
                done = db.write_one(_PUT, parameters)
                accepted = done.rowcount == 1
                if accepted:
                    self.newest = done.lastrowid or 0
                gives_way = db.full and self._courtesy.is_due()
            finally:
                lock.release()
            if gives_way:
                lock.give_way()
            db.wal.wrote(len(parameters[2]))
            return accepted
        need_room(COMMITTING)
        put = _Put(parameters)
        try:
            self._waiting.append(put)
            is_to_commit = self._is_to_commit(put)
            if is_to_commit:
                leader = self._leader
                try:
                    self._commit_waiting(put)
                finally:
                    self._leader = leader  # this thread already, if this is its signal handler
                    lock.mutex.release()
        except BaseException:  # also a signal handler's: those behind it would wait for one that nobody is to commit
            self._withdraw(put)
            raise
        if is_to_commit:
            self._pass_on()
        if put.accepted is None and put.error is not None:
            raise put.error
        return bool(put.accepted)

    def _is_to_commit(self, put: _Put) -> bool:
        """Wait until another thread has committed that put, or it is this one's to do: then it has the mutex."""
        lock = self._db.lock
        in_time = True
        if self._db.full and not self._is_first():
            in_time = self._wait(put, WRITE_TIMEOUT)
            if put.is_decided:
                return False
        if in_time and lock.acquire_mutex(WRITE_TIMEOUT):
            return True
        if self._withdraw(put):
            raise OutboxBusy(f"another thread has been writing to the outbox for {WRITE_TIMEOUT:g} s")
        # The thread that writes has just taken it along: see how that ends.
        while not put.is_decided:
            # Withdrawn: that thread was ended by a signal handler.
            if not self._wait(put, 2 * WRITE_TIMEOUT) or self._withdraw(put):
                raise OutboxBusy("another thread is still writing this event to the outbox")
        return False

    def _is_first(self) -> bool:
        """Whether nobody leads, and the first of those who wait is of this thread.

        That may be another put than the one at hand, and this thread may be the leader itself, or within a transaction:
        a signal handler can't wait for what the call that it has interrupted was about to do.
        """
        if self._db.lock.is_owned():
            return True
        try:
            return self._leader is None and self._waiting[0].thread == get_ident()
        except IndexError:
            return False

    def _withdraw(self, put: _Put) -> bool:
        try:
            self._waiting.remove(put)
        except ValueError:
            return False
        return True

    def _wait(self, put: _Put, seconds: float) -> bool:
        try:
            return put.wait(seconds)
        finally:
            self._wake_next()

    def _pass_on(self) -> None:
        """Leave the rest to the first of those who wait; if there is none, have those woken who are done."""
        try:
            self._waiting[0].wake()
        except IndexError:
            self._wake_next()

    def _wake_next(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                # Woken before it is taken off: in between a signal handler may raise.
                put = self._done[0]
                is_awake = put.wake()
                with contextlib.suppress(ValueError):  # another thread has taken it off
                    self._done.remove(put)
                if is_awake:
                    return

    def _commit_waiting(self, put: _Put) -> None:
        """Commit what waits, under the mutex: that put in any case."""
        if self._committing or self._db.connections.is_writing:
            self._withdraw(put)
            raise OutboxBusy("the call was made by a signal handler or a finalizer while its thread was writing")
        groups = size = 0
        lock = self._db.lock
        lock.acquire(WRITE_TIMEOUT)
        try:
            if self._db.full:
                self._leader = get_ident()
            while (put.accepted is None and put.error is None) or (
                self._leader and self._waiting and groups < _MAX_TURN
            ):
                size += self._put_group()
                groups += 1
            gives_way = self._db.full and self._courtesy.is_due()
        finally:
            lock.release()
        if gives_way:
            lock.give_way()
        if size:
            self._db.wal.wrote(size)

    def _put_group(self) -> int:
        """Commit the puts that wait, in the order in which they came, as far as they have the same limit.

        Under the writer lock.  How many bytes that were.
        """
        self._committing = True
        group: list[_Put] = []
        try:
            while self._waiting and len(group) < _MAX_GROUP:
                taken = len(group)
                try:
                    # Into the group first: an exception in between, from a signal handler, must not lose one.
                    group.append(self._waiting[0])
                    group[-1] = self._waiting.popleft()
                    if group[-1].parameters[0] != group[0].parameters[0]:
                        self._waiting.appendleft(group[-1])
                        del group[taken:]
                        break
                except IndexError:
                    del group[taken:]  # the last one was withdrawn, by its own thread, between two of these steps
            if not group:
                return 0
            accepted = self._insert(group)
            for number, put in enumerate(group):
                put.accepted = number < accepted
        except OutboxError as problem:
            for put in group:
                put.error = problem
            return 0
        except BaseException:
            self._settle(group)
            raise
        finally:
            self._committing = False
            self._done.extend(group)  # in one step; one that is not decided has another turn, by its own thread
        return sum(len(put.parameters[2]) for put in group)

    def _settle(self, group: list[_Put]) -> None:
        """A signal handler has raised somewhere in a commit: those that are not in the outbox wait for the next one.

        Under the writer lock: nobody but this thread has written since, and so they are among the last rows.
        """
        undecided = [put for put in group if not put.is_decided]
        try:
            rows = self._db.connections.current().execute(_NEWEST, (2 * _MAX_GROUP,))
            stored = {body for (body,) in rows}
        except (OutboxError, *SQLITE_PROBLEMS):
            for put in undecided:
                put.error = StorageError("the write was interrupted")
            return
        for put in reversed(undecided):
            if put.parameters[2] in stored:
                put.accepted = True
            elif put not in self._waiting:
                self._waiting.appendleft(put)

    def _insert(self, group: list[_Put]) -> int:
        """How many of them were accepted: the first ones, for the limit is the same for all."""
        if len(group) == 1:
            done = self._db.write_one(_PUT, group[0].parameters, self._wake_next)
        else:
            size = bisect_left(_SIZES, len(group))
            given = [value for put in group for value in put.parameters[1:]]
            missing = [None, None] * (_SIZES[size] - len(group))
            done = self._db.write_one(_GROUPS[size], (*given, *missing, group[0].parameters[0]), self._wake_next)
        if done.rowcount:
            self.newest = done.lastrowid or 0
        return done.rowcount
