"""The damaged databases that are kept beside an outbox, as `status` tells of them."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from segment_durable.cli.format import bytes_text, moment
from segment_durable.quarantine import kept_sets, told_sets
from segment_durable.records import DamagedSet

__all__ = ["damaged_lines", "damaged_report", "read_damaged"]


def read_damaged(connection: sqlite3.Connection, folder: Path) -> list[DamagedSet]:
    """The sets that are still there, oldest first; none if this user may not list the folder."""
    try:
        there = kept_sets(folder)
        return [each for each in told_sets(connection, folder) if each.name in there] if there else []
    except PermissionError:
        return []


def damaged_report(sets: Sequence[DamagedSet]) -> list[dict[str, Any]]:
    """For JSON: times are ISO 8601 in UTC, sizes are bytes, what is not known is None."""
    return [{**asdict(each), "set_aside_at": _when(each)} for each in sets]


def damaged_lines(sets: Sequence[DamagedSet]) -> list[tuple[str, str]]:
    """A line for each set, and one that says what can be done with them; none if there is no set."""
    lines = [
        ("damaged", f"{each.name}, {bytes_text(each.bytes)}, set aside {_when(each)}: {_fate(each)}") for each in sets
    ]
    if lines:
        lines.append(("", "kept, and never read or changed again: delete by hand what is no longer wanted"))
    return lines


def _when(each: DamagedSet) -> str:
    return moment(round(each.set_aside_at * 1000))


def _fate(each: DamagedSet) -> str:
    if each.events is None or each.dead is None:
        return "unknown what was salvaged and lost"
    lost = "unknown how many lost" if each.lost is None else f"{each.lost} lost"
    return f"{each.events} events and {each.dead} dead letters salvaged, {lost}"
