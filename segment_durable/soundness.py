"""Values as a damaged page may have made them.

SQLite notices damage in the structure of a page only.  A value of another type than that of its column it hands out
like any other, skips in an aggregate, or takes for 0 in a sum.  What these functions raise is what SQLite raises for a
damaged page, so that within a transaction it ends in the same way.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from types import NoneType
from typing import Any

__all__ = [
    "MOST",
    "TOTALS_KINDS",
    "UNSOUND_BODY",
    "Kinds",
    "all_sound",
    "are_books_sound",
    "check_numbers",
    "is_sound",
    "malformed",
    "sound",
]

Kinds = tuple[type | tuple[type, ...], ...]  # of the columns of a row

# No number that is stored is as high: as many events would be a million a second for three centuries, as many
# milliseconds since 1970 go beyond the year 280,000.
MOST = 1 << 53

TOTALS_KINDS: Kinds = (int, (int, NoneType), int, int, int, int, int, int, int)

# A blob is greater than any other value; of one comparison less is felt than of typeof(), which is a function call.
UNSOUND_BODY = "(body >= x'') IS NOT 1"


def malformed() -> sqlite3.DatabaseError:
    return sqlite3.DatabaseError("database disk image is malformed")


def is_sound(row: Any, kinds: Kinds) -> bool:
    return row is not None and all(map(isinstance, row, kinds))


def sound(row: Any, kinds: Kinds) -> Any:
    """The row; raises `malformed()` if there is none, or if one of its values is of another type."""
    if row is None or not all(map(isinstance, row, kinds)):
        raise malformed()
    return row


def all_sound(rows: sqlite3.Cursor, kinds: Kinds) -> Iterator[Any]:
    """The rows, one by one; raises as `sound` does."""
    return (sound(row, kinds) for row in rows)


def check_numbers(*numbers: int) -> None:
    """Raise `malformed()` if one of them is none that can be counted up to."""
    if not all(0 <= number < MOST for number in numbers):
        raise malformed()


def are_books_sound(totals: Any) -> bool:
    """Whether the counters can be: `totals` is a row of `views.TOTALS`."""
    if not is_sound(totals, TOTALS_KINDS):
        return False
    last, first, delivered, buried, erased, expired, requeued, dead_erased, _ = totals
    pending = last - delivered - buried - erased - expired
    room = 0 if first is None else last - first + 1
    return bool(
        min(totals[2:]) >= 0 and last < MOST and (room > 0) <= pending <= room and requeued + dead_erased <= buried
    )
