"""Whose outbox it is: a digest of the write key, under a salt of the outbox's own."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import sqlite3

from segment_durable.soundness import all_sound, malformed

__all__ = ["SOURCE_FACTS", "claim"]

SOURCE_FACTS = {"source_salt": re.compile("[0-9a-f]{32}"), "source_digest": re.compile("[0-9a-f]{64}")}


def claim(connection: sqlite3.Connection, write_key: str) -> bool:
    """Mark a new outbox as this source's, in an open transaction; False if it is another's."""
    facts = dict(all_sound(connection.execute("SELECT name, value FROM meta"), (str, str)))
    if not SOURCE_FACTS.keys() <= facts.keys():
        salt = secrets.token_hex(16)
        connection.executemany(
            "INSERT OR REPLACE INTO meta VALUES (?, ?)",
            [("source_salt", salt), ("source_digest", _digest(salt, write_key))],
        )
        return True
    if not all(pattern.fullmatch(facts[name]) for name, pattern in SOURCE_FACTS.items()):
        raise malformed()
    return hmac.compare_digest(facts["source_digest"], _digest(facts["source_salt"], write_key))


def _digest(salt: str, write_key: str) -> str:
    return hashlib.sha256(f"{salt}:{write_key}".encode()).hexdigest()
