"""An outbox with a backlog, for the measurements."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from segment_durable.clock import SystemClock
from segment_durable.outbox import Outbox


def fill(folder: str, count: int, body: bytes, write_key: str) -> None:
    """Make an outbox with so many events, written in one transaction."""
    Outbox(Path(folder), SystemClock(), write_key=write_key).close()
    connection = sqlite3.connect(Path(folder) / "outbox.db", isolation_level=None)
    connection.execute("BEGIN")
    connection.executemany("INSERT INTO event VALUES (?, 1, ?)", ((number + 1, body) for number in range(count)))
    connection.execute("COMMIT")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    connection.close()
