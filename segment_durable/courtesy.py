"""When a process that has the writer lock nearly all the time lets another one have it."""

from __future__ import annotations

import time

from segment_durable.db import Database
from segment_durable.errors import OutboxError
from segment_durable.sqlite_errors import SQLITE_PROBLEMS

__all__ = ["Courtesy"]

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds


class Courtesy:
    """Of a process whose commits wait for the disk.

    One that waits may be frozen, and would have each commit of the others take 2 ms more: where nobody has written
    after two of them had given way, it is not done again for a time that doubles.
    """

    def __init__(self, database: Database) -> None:
        self._db = database
        self._version = -1
        self._in_vain = 0
        self._not_before = 0.0

    def is_due(self) -> bool:
        """Whether to give way after the release of the lock, which this thread has."""
        if not self._db.lock.is_waited_for():
            self._in_vain, self._not_before = 0, 0.0
            return False
        now = time.monotonic()
        if now < self._not_before:
            return False
        try:
            # Another one with each commit of another connection.
            (version,) = self._db.connections.current().execute("PRAGMA data_version").fetchone()
        except (OutboxError, *SQLITE_PROBLEMS):
            return False  # the event is stored; who writes next meets the trouble
        self._in_vain = self._in_vain + 1 if version == self._version else 0
        self._version = version
        if self._in_vain > 1:
            self._not_before = now + min(_FIRST_PAUSE * 2.0 ** (self._in_vain - 2), _LONGEST_PAUSE)
        return True
