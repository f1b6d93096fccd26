"""What a process does about a damaged database: has it set aside, within limits, and tells of each set once."""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Callable
from pathlib import Path

from segment_durable.admission import Admission
from segment_durable.errors import OutboxDamaged, StorageError
from segment_durable.locks import LockFile
from segment_durable.logs import get_log
from segment_durable.quarantine import set_aside, sets_since, told_sets
from segment_durable.reserve import Reserve
from segment_durable.sqlite_errors import is_damage, storage_error

__all__ = ["Damage"]

log = get_log("outbox")

# A disk that damages whatever is written to it must not be filled with what is set aside.
_MOST_SETS, _SETS_SECONDS = 5, 60.0


class Damage:
    """That of the database at `path`.  It has no connection: whoever has one sees to it that it is opened anew."""

    def __init__(self, path: Path, lock: LockFile, reserve: Reserve, admission: Admission) -> None:
        self._path = path
        self._folder = path.parent
        self._lock = lock
        self._reserve = reserve
        self._admission = admission
        self._known_sets: set[str] | None = None  # that were set aside, as far as this object has looked
        self.is_gone = False  # the database was found to be gone, and that was not told yet
        self.news: deque[OutboxDamaged] = deque()  # what was found and not been told yet
        self.on_news: Callable[[], None] = _nothing  # there is something to `tell` soon; called under the writer lock
        # Called in any thread, and without the writer lock; until it is set, what there is to tell waits.
        self.on_damaged: Callable[[OutboxDamaged], None] | None = None

    def check_limit(self, problem: StorageError) -> None:
        """Raise `StorageError`, of that problem, if so many were set aside lately that no other may be."""
        if sets_since(self._folder, _SETS_SECONDS) >= _MOST_SETS:
            raise StorageError(f"{problem}; it has been damaged again and again: is the disk failing?", problem.code)

    def set_aside(self) -> str:
        """Put another database in the place of the damaged one; the name of what is kept of that.

        Under the writer lock, and with all connections of this process to it still open.  Raises `sqlite3.Error` or
        `OSError`.
        """
        try:
            return set_aside(self._path, self._lock.raise_generation)
        except (sqlite3.Error, OSError):
            if not self._reserve.free():
                raise
            return set_aside(self._path, self._lock.raise_generation)

    def not_replaced(self, problem: Exception) -> StorageError:
        """The error to raise after `set_aside` has failed with `problem`."""
        error = storage_error(problem) if isinstance(problem, sqlite3.Error) else None
        if error is None or is_damage(error):
            error = StorageError(str(problem), "SQLITE_IOERR")
        return self._admission.note(
            StorageError(f"the outbox is damaged, and another can't be made: {error}", error.code)
        )

    def look_for_sets(self, connection: sqlite3.Connection, aside: str | None) -> None:
        """Have those told that this object has not seen yet; of the first time, only `aside`, just set aside."""
        found = {each.name: each for each in told_sets(connection, self._folder)}
        new = {aside} if self._known_sets is None else found.keys() - self._known_sets
        self._known_sets = set(found)
        for each in sorted(found.keys() & new):
            kept = found[each]
            self.news.append(OutboxDamaged(self._folder / kept.name, kept.events, kept.dead, kept.lost))
            self.on_news()

    def tell(self) -> None:
        """Log, and call `on_damaged` for, what has been found and not been told yet.  Not under the writer lock."""
        if self.is_gone:
            self.is_gone = False
            log.warning("%s was gone, with the events that were in it: an empty one was made", self._path)
        while self.news and self.on_damaged is not None:
            try:
                news = self.news.popleft()
            except IndexError:  # another thread tells it
                return
            self.on_damaged(news)


def _nothing() -> None:
    pass
