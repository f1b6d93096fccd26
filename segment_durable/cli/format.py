"""Text for terminals and pipes."""

from __future__ import annotations

import json
import sys
from typing import Any

from segment_durable.clock import utc_timestamp

__all__ = ["age", "bytes_text", "harmless", "json_line", "json_pages", "moment", "say", "tell"]


def say(line: str) -> None:
    """Print one line, which `harmless` or a JSON function has made; what stdout can't encode comes out as escapes."""
    try:
        print(line)
    except UnicodeEncodeError:  # nothing was written: the text layer encodes a whole string before it keeps any of it
        print("".join(each if each.isascii() else _escape(each) for each in line))


def tell(line: str) -> None:
    """Print one line to stderr; nowhere if that is closed, for `print` would take stdout then."""
    if sys.stderr is not None:
        print(line, file=sys.stderr)


def harmless(text: str) -> str:
    """`text` in one line, without what a terminal obeys: control and format characters are JSON escapes."""
    return text if text.isprintable() else "".join(each if each.isprintable() else _escape(each) for each in text)


def json_line(value: Any) -> str:
    """One line of JSON, ASCII only."""
    return json.dumps(value)


def json_pages(value: Any) -> str:
    """Indented JSON that people can read; harmless, and still JSON, because such characters are within its strings."""
    return "\n".join(map(harmless, json.dumps(value, indent=2, ensure_ascii=False).split("\n")))


def age(seconds: float | None) -> str:
    """A duration in its two leading units: "7s", "4m 12s", "3h 05m", "2d 04h"; "-" for None."""
    if seconds is None:
        return "-"
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    if whole < 86_400:
        return f"{whole // 3600}h {whole % 3600 // 60:02}m"
    return f"{whole // 86_400}d {whole % 86_400 // 3600:02}h"


def bytes_text(size: int) -> str:
    amount = float(size)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{size} bytes" if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def moment(milliseconds: int) -> str:
    """ISO 8601 in UTC; `milliseconds` since 1970."""
    try:
        return utc_timestamp(milliseconds / 1000)
    except (ValueError, OverflowError, OSError):  # a clock that was set to the year 10,000
        return f"{milliseconds} ms"


def _escape(character: str) -> str:
    return json.dumps(character)[1:-1]
