"""What an answer means: a table from status and headers to an `Outcome`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timezone
from email.utils import parsedate_to_datetime
from enum import Enum
from math import isfinite

from segment_durable.transport import Response, TransportError

__all__ = [
    "ANSWER_LIMIT",
    "MAX_TOLD_WAIT",
    "Kind",
    "Outcome",
    "classify",
    "http_date",
    "is_page",
    "told_wait",
    "unanswered",
]

MAX_TOLD_WAIT = 300.0  # seconds; a guard against an absurd header
ANSWER_LIMIT = 2048  # characters of an answer that a dead letter keeps
_WORDS_LIMIT = 200  # characters of the receiver's own words in an error message
_EPOCH = 1_000_000_000  # an X-RateLimit-Reset above this is a date, not a number of seconds to wait


class Kind(Enum):
    """What became of one attempt."""

    DELIVERED = "delivered"  # 2xx
    THROTTLED = "throttled"  # "later", and when
    UNREACHABLE = "unreachable"  # no answer, or one that says that it may go better next time
    UNAUTHORISED = "unauthorised"  # the credentials were not accepted
    MISDIRECTED = "misdirected"  # the host or the setup is wrong
    REJECTED = "rejected"  # something in the batch was refused


@dataclass(frozen=True)
class Outcome:
    """One attempt's result."""

    kind: Kind
    status: int = 0  # 0: there was no answer
    code: str = "unknown"
    message: str = ""
    answer: str = ""  # the beginning of the body
    retry_after: float = 0.0  # THROTTLED: seconds to wait
    content_type: str = ""


_REJECTED = frozenset({400, 413, 414, 422})
# Something in front of the receiver says these with a page, and would of every event, as nginx does of plain HTTP
# at a port for HTTPS.  Of 413 and 414 it is the same with a page or without: the request was too long.
_NEVER_A_PAGE = frozenset({400, 422})
_UNAUTHORISED = frozenset({401, 403, 511})
_RETRYABLE_4XX = frozenset({408, 410, 429, 460})
_FINAL_5XX = frozenset({501, 505})


def classify(response: Response, now: float) -> Outcome:
    """The meaning of an answer; `now` is the wall clock, seconds since 1970."""
    status = response.status
    content_type = response.headers.get("Content-Type", "")
    retry_after = 0.0
    if 200 <= status < 300:
        kind = Kind.DELIVERED
    elif status in _REJECTED and not (status in _NEVER_A_PAGE and is_page(content_type)):
        kind = Kind.REJECTED
    elif status in _UNAUTHORISED:
        kind = Kind.UNAUTHORISED
    elif status in _RETRYABLE_4XX or (500 <= status < 600 and status not in _FINAL_5XX):
        retry_after = told_wait(response.headers, now)
        kind = Kind.THROTTLED if retry_after else Kind.UNREACHABLE
    else:
        kind = Kind.MISDIRECTED
    code, message = _said(response)
    return Outcome(
        kind=kind,
        status=status,
        code=code,
        message=message,
        answer=response.body.decode("utf-8", "replace")[:ANSWER_LIMIT],
        retry_after=retry_after,
        content_type=content_type,
    )


def unanswered(problem: TransportError) -> Outcome:
    return Outcome(Kind.UNREACHABLE, code=problem.kind, message=str(problem))


def is_page(content_type: str) -> bool:
    """Whether it is that of a web page, which the receiver never sends: a proxy does, or a wrong host."""
    return content_type.partition(";")[0].strip().lower() in ("text/html", "application/xhtml+xml")


def told_wait(headers: Mapping[str, str], now: float) -> float:
    """Seconds to wait by Retry-After or X-RateLimit-Reset, at most 300.

    Either may hold a number of seconds, an HTTP date or seconds since 1970.  0 means that neither says so, or not in a
    form that can be read, or that it is over.
    """
    for name in ("Retry-After", "X-RateLimit-Reset"):
        text = headers.get(name, "").strip()
        if not text:
            continue
        seconds = _number(text)
        if seconds is None:  # said by more than one on the way: urllib3 joins them
            several = [number for number in map(_number, text.split(",")) if number is not None]
            seconds = max(several, default=None)
        if seconds is None or seconds > _EPOCH:
            seconds = _seconds_until(http_date(text) if seconds is None else seconds, headers.get("Date", ""), now)
        if seconds is not None and seconds > 0:
            return min(seconds, MAX_TOLD_WAIT)
    return 0.0


def _number(text: str) -> float | None:
    if not text.isascii() or "_" in text:
        return None  # float() takes digits of any script, and Python's own way to group them
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if isfinite(seconds) else None


def _seconds_until(until: float | None, date: str, now: float) -> float | None:
    """From the answer's own Date if it has one: then it does not matter that our clock is wrong."""
    if until is None:
        return None
    sent = http_date(date)
    return until - (now if sent is None else sent)


def http_date(text: str) -> float | None:
    """Seconds since 1970, None if it is no date."""
    try:
        date = parsedate_to_datetime(text)
        if date.tzinfo is None:  # "-0000": UTC, of an unknown zone
            date = date.replace(tzinfo=timezone.utc)
        return date.timestamp()
    except (TypeError, ValueError, OverflowError, IndexError):
        return None


def _said(response: Response) -> tuple[str, str]:
    """`code` and `message` of a JSON answer, made fit for a log line."""
    try:
        said = json.loads(response.body)
    except (ValueError, RecursionError):
        said = None
    if isinstance(said, dict) and isinstance(said.get("error"), dict):
        said = said["error"]
    if not isinstance(said, dict):
        return "unknown", f"status {response.status}"
    code = said.get("code", said.get("error", said.get("type")))
    message = said.get("message", said.get("error_description"))
    return _line(code) or "unknown", _line(message) or f"status {response.status}"


def _line(value: object) -> str:
    if not isinstance(value, (str, int)):
        return ""
    return "".join(each if each.isprintable() else " " for each in str(value)[:_WORDS_LIMIT]).strip()
