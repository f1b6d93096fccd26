"""Events in: each put is committed when it returns, and threads that come at the same time are committed together."""

from __future__ import annotations

import contextlib
from collections import deque
from threading import Lock, get_ident

from segment_durable.connections import WRITE_TIMEOUT
from segment_durable.db import Database
from segment_durable.errors import OutboxBusy, OutboxError, StorageError
from segment_durable.sqlite_errors import is_damage

__all__ = ["Intake"]

_NO_LIMIT = 1 << 62
_MAX_GROUP = 500  # puts in one transaction

# Limit, id and insert in one statement.  The last id ever given is max(the last row, state.last_id), because SQLite
# alone would hand the ids of a deleted tail out again; what has left is counted in `state`, so the number of events
# waiting is a subtraction.  At the limit the id is that of a row that exists, and so the row is ignored.  (INSERT ...
# SELECT ... WHERE would say it more plainly, and take 1.5 us longer: it reads the table that it writes, and so goes
# through a temporary one.)
_PUT = """
INSERT OR IGNORE INTO event (id, appended_at, body)
VALUES ((
    SELECT CASE WHEN last - gone < ? THEN last + 1 ELSE (SELECT max(id) FROM event) END
    FROM (
        SELECT max(last_id, ifnull((SELECT max(id) FROM event), 0)) AS last,
               delivered + buried + erased + expired AS gone
        FROM state
    )
), ?, ?)
"""


class _Put:
    """A put that waits for a thread to commit it together with others."""

    __slots__ = ("_turn", "accepted", "error", "parameters", "thread")

    def __init__(self, parameters: tuple[int, int, bytes]) -> None:
        self.parameters = parameters
        self.accepted: bool | None = None
        self.error: BaseException | None = None
        self.thread = get_ident()
        self._turn = Lock()
        self._turn.acquire()

    def wait(self, seconds: float) -> bool:
        """Wait until it may be done, or the first of those who wait; False if that takes too long."""
        return self._turn.acquire(timeout=seconds)

    def wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # it is awake already
            self._turn.release()


class Intake:
    """Appends events to the table `event` of `database`; an `Outbox` has one.

    Threads that come while another writes wait for the writer lock, and the first to get it commits the events of all.
    Where each commit waits for the disk only the first waits for the lock, and the others for it: those whose event is
    committed could not return before they had the lock, while the fastest thread took it again and again for its own
    event alone (6,500 events a second from 16 threads, and 11,000 so).  Without that wait it is the other way round: it
    is quicker to let the thread that runs go on than to wake each for its turn (26,000 from 8 threads, and 18,000 so).
    """

    def __init__(self, database: Database) -> None:
        self._db = database
        self._waiting: deque[_Put] = deque()
        self._committing = False

    def put(self, body: bytes, appended_at: int, max_pending: int = 0) -> bool:
        """Append one event; it is committed when the call returns.

        `appended_at`: milliseconds since 1970.  Returns False, with nothing appended, if `max_pending` events are
        waiting.  Threads that come at the same time are committed in one transaction.
        """
        parameters = (max_pending or _NO_LIMIT, appended_at, body)
        db, lock = self._db, self._db.lock
        if not self._waiting and lock.acquire_unless_busy(WRITE_TIMEOUT):
            try:
                accepted = db.write_one(_PUT, parameters)
            finally:
                lock.release()
            db.wal.wrote(len(body))
            return accepted == 1
        put = _Put(parameters)
        self._waiting.append(put)
        if self._is_to_commit(put):
            try:
                if self._committing:  # and so this is a signal handler or a finalizer in the very thread that commits
                    self._withdraw(put)
                    raise OutboxBusy(
                        "the call was made by a signal handler or a finalizer while its thread was writing"
                    )
                while put.accepted is None and put.error is None:
                    self._put_group()
            finally:
                lock.mutex.release()
                self._wake_first()
        if put.accepted is None and put.error is not None:
            raise put.error
        return bool(put.accepted)

    def _is_to_commit(self, put: _Put) -> bool:
        """Wait until another thread has committed that put, or it is this one's to do: then it has the mutex."""
        lock = self._db.lock
        in_time = True
        if self._db.full and not self._is_first_ours():
            in_time = put.wait(WRITE_TIMEOUT)
            if put.accepted is not None or put.error is not None:
                return False
        if in_time and lock.acquire_mutex(WRITE_TIMEOUT):
            return True
        if self._withdraw(put):
            self._wake_first()
            raise OutboxBusy(f"another thread has been writing to the outbox for {WRITE_TIMEOUT:g} s")
        # The thread that writes has just taken it along: see how that ends.
        while put.accepted is None and put.error is None:
            if not put.wait(2 * WRITE_TIMEOUT):
                raise OutboxBusy("another thread is still writing this event to the outbox")
        return False

    def _is_first_ours(self) -> bool:
        """Whether the first of those who wait is of this thread.

        That may be another put than the one at hand: a signal handler can't wait for what the call that it has
        interrupted was about to do.
        """
        try:
            return self._waiting[0].thread == get_ident()
        except IndexError:
            return False

    def _withdraw(self, put: _Put) -> bool:
        try:
            self._waiting.remove(put)
        except ValueError:
            return False
        return True

    def _wake_first(self) -> None:
        with contextlib.suppress(IndexError):
            self._waiting[0].wake()

    def _put_group(self) -> None:
        """Commit the puts that wait, in the order in which they came.  Under the mutex."""
        self._committing = True
        group: list[_Put] = []
        try:
            while self._waiting and len(group) < _MAX_GROUP:
                taken = len(group)
                try:
                    # Into the group first: an exception in between, from a signal handler, must not lose one.
                    group.append(self._waiting[0])
                    group[-1] = self._waiting.popleft()
                except IndexError:
                    del group[taken:]  # the last one was withdrawn, by its own thread, between two of these steps
            if not group:
                return
            try:
                accepted = self._insert(group)
            except StorageError as problem:
                if not is_damage(problem):
                    raise
                accepted = self._insert(group)  # into the database that has taken the place of the damaged one
            for put, each in zip(group, accepted):
                put.accepted = each
        except BaseException as problem:
            for put in group:
                put.error = problem if isinstance(problem, OutboxError) else StorageError("the write was interrupted")
            if not isinstance(problem, OutboxError):
                raise
            return
        finally:
            self._committing = False
            for put in group:
                put.wake()
        self._db.wal.wrote(sum(len(put.parameters[2]) for put in group))

    def _insert(self, group: list[_Put]) -> list[bool]:
        lock = self._db.lock
        if len(group) == 1:
            lock.acquire(WRITE_TIMEOUT)
            try:
                return [self._db.write_one(_PUT, group[0].parameters) == 1]
            finally:
                lock.release()
        self._db.space.check()
        with self._db.write() as connection:
            return [connection.execute(_PUT, put.parameters).rowcount == 1 for put in group]
