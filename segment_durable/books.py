"""The books: counters in the table `state`, set in the transactions that move the events."""

from __future__ import annotations

import sqlite3

from segment_durable.soundness import malformed

__all__ = ["count"]

# Of a text SQLite would count on from 0.
_COUNT = """
UPDATE state SET {} WHERE typeof(last_id) = 'integer' AND typeof(delivered) = 'integer' AND typeof(buried) = 'integer'
AND typeof(erased) = 'integer' AND typeof(expired) = 'integer' AND typeof(requeued) = 'integer'
AND typeof(dead_erased) = 'integer'
"""


def count(connection: sqlite3.Connection, change: str, parameters: tuple[int, ...]) -> None:
    """Set counters, as the SQL `change` says; raises what SQLite does of a damaged database if one is no number."""
    if connection.execute(_COUNT.format(change), parameters).rowcount != 1:
        raise malformed()
