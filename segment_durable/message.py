"""Call arguments in, a validated message and its bytes out.

The six types of message are a table; time and ids are passed in.  The bytes made here are what the outbox stores and
what is sent: a message is encoded once.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from enum import Enum
from numbers import Integral, Number
from os import getpid, urandom
from time import time_ns
from typing import Any
from uuid import UUID

from segment_durable.clock import utc_timestamp
from segment_durable.encoding import encode
from segment_durable.errors import InvalidMessage, MessageTooLarge
from segment_durable.version import VERSION

__all__ = ["MAX_MESSAGE_BYTES", "compose", "encode_message", "new_message_id"]

MAX_MESSAGE_BYTES = 32 << 10  # Segment's limit for one event
MAX_MESSAGE_ID_LENGTH = 100  # characters, Segment's limit
LIBRARY_NAME = "segment-durable"

Check = Callable[[str, Any], Any]


def _identifier(name: str, value: Any) -> str | None:
    """The id as text; None and "" mean that it was not given, 0 is an id like any other."""
    if type(value) is str:
        return value or None
    if value is None:
        return None
    try:
        if isinstance(value, Enum):
            return _identifier(name, value.value)
        if isinstance(value, str):
            return "".join((value,)) or None  # an exact str: a subclass may override anything
        if isinstance(value, UUID):
            return str(value)
        if isinstance(value, Number) and not isinstance(value, (bool, complex)):
            if isinstance(value, Integral) or math.isfinite(value):  # type: ignore[arg-type]
                return "".join((str(value),))
            problem = "must be a str, a number or a UUID; NaN and infinities identify nobody"
        else:
            problem = f"must be a str, a number or a UUID, got {type(value).__name__}"
    except InvalidMessage:
        raise
    except Exception as failure:  # a number of thousands of digits, a signalling NaN, anybody's __str__
        raise InvalidMessage(name, f"must be an id that can be written as text ({type(failure).__name__})") from None
    raise InvalidMessage(name, problem)


def _required_identifier(name: str, value: Any) -> str:
    identifier = _identifier(name, value)
    if identifier is None:
        raise InvalidMessage(name, "must be a str, a number or a UUID, and not empty")
    return identifier


def _is_a(kind: type, value: Any) -> bool:
    """`isinstance`, where a proxy without its target (outside a web request, say) raises."""
    try:
        return isinstance(value, kind)
    except Exception:
        return False


def _is_empty(value: Any) -> bool:
    """As upstream: any empty value is "nothing to say".  What raises here (an array, say) is not empty."""
    try:
        return not value
    except Exception:
        return False


def _object(name: str, value: Any) -> dict[Any, Any]:
    if type(value) is dict or _is_a(dict, value):
        return value  # type: ignore[no-any-return]
    if _is_empty(value):
        return {}
    raise InvalidMessage(name, f"must be a dict, got {type(value).__name__}")


def _context(value: Any, library: dict[str, str]) -> dict[Any, Any]:
    """A copy of the caller's context, with our name in it."""
    given = _object("context", value)
    try:
        # What a subclass holds is what its items() say, as in `encoding`.
        own = given if type(given) is dict else dict(given.items())
        return {**own, "library": library}
    except Exception as problem:
        raise InvalidMessage("context", f"must be a dict that can be read ({type(problem).__name__})") from problem


def _event_name(name: str, value: Any) -> str:
    if type(value) is str and value:
        return value
    is_text = _is_a(str, value)
    text = _optional_text(name, value) if is_text else None
    if text:
        return text
    problem = "it is empty" if is_text else f"got {type(value).__name__}"
    raise InvalidMessage(name, f"must be the event's name, a str that is not empty; {problem}")


def _optional_text(name: str, value: Any) -> str | None:
    if _is_a(str, value):
        with contextlib.suppress(Exception):  # of what only claims to be one
            return "".join((value,)) or None  # an exact str, as above
    elif _is_empty(value):
        return None
    raise InvalidMessage(name, f"must be a str, got {type(value).__name__}")


# For each type the fields that only it has, in the order of the call: (name in the call, name in JSON, check).
FIELDS: dict[str, tuple[tuple[str, str, Check], ...]] = {
    "identify": (("traits", "traits", _object),),
    "track": (("event", "event", _event_name), ("properties", "properties", _object)),
    "page": (
        ("category", "category", _optional_text),
        ("name", "name", _optional_text),
        ("properties", "properties", _object),
    ),
    "screen": (
        ("category", "category", _optional_text),
        ("name", "name", _optional_text),
        ("properties", "properties", _object),
    ),
    "group": (("group_id", "groupId", _required_identifier), ("traits", "traits", _object)),
    "alias": (("previous_id", "previousId", _required_identifier),),
}


def compose(
    kind: str,
    values: Sequence[Any],
    user_id: Any,
    anonymous_id: Any,
    context: Any,
    timestamp: datetime | None,
    integrations: Any,
    message_id: Any,
    now: float,
) -> dict[str, Any]:
    """A message of type `kind`; `values` are those of `FIELDS[kind]`, in order.

    `now` is the time of the call, in seconds since 1970.  Raises `InvalidMessage` with the name of the wrong argument.
    The dicts that are passed in are referred to, and not changed.
    """
    user = user_id if type(user_id) is str and user_id else _identifier("user_id", user_id)
    anonymous = None if anonymous_id is None else _identifier("anonymous_id", anonymous_id)
    if user is None and (anonymous is None or kind == "alias"):
        name = "user_id" if kind == "alias" else "user_id or anonymous_id"
        raise InvalidMessage(name, "must be a str, a number or a UUID, and not empty")
    message: dict[str, Any] = {
        "type": kind,
        "messageId": new_message_id() if message_id is None else _message_id(message_id),
        "timestamp": utc_timestamp(now) if timestamp is None else _timestamp(timestamp, now),
        "userId": user,
    }
    if kind != "alias":
        message["anonymousId"] = anonymous
    for (name, key, check), value in zip(FIELDS[kind], values):
        message[key] = check(name, value)
    library = {"name": LIBRARY_NAME, "version": VERSION}
    message["context"] = {"library": library} if context is None else _context(context, library)
    message["integrations"] = {} if integrations is None else _object("integrations", integrations)
    return message


def encode_message(message: dict[str, Any], parts: tuple[Any, ...] | None = None) -> bytes:
    """The message as UTF-8 JSON; raises `MessageTooLarge` if that is over 32 KiB, and nothing else.

    `parts`: the values in it that are the user's, if `compose` made the rest.
    """
    body = encode(message, MAX_MESSAGE_BYTES, parts)
    if len(body) > MAX_MESSAGE_BYTES:
        raise MessageTooLarge(len(body), MAX_MESSAGE_BYTES)
    return body


_POOL = 64  # ids for which random bytes are fetched at once
_pool: tuple[int, list[bytes]] = (0, [])  # the process that has fetched them, and what is left


def new_message_id() -> str:
    """A random UUID (version 4) as text.

    The kernel's random bytes are fetched for many at once: a system call for each takes twice as long, and lets all
    threads that wait for the interpreter lock go first.  A process that comes out of a fork fetches its own, and the
    time goes in as well, for copies of a virtual machine that was stopped and is started more than once: Segment would
    drop events with the same id as duplicates.
    """
    global _pool
    pid, drawn = _pool
    if pid != getpid() or not drawn:
        chance = urandom(16 * _POOL)
        drawn = [chance[start : start + 16] for start in range(0, len(chance), 16)]
        _pool = (getpid(), drawn)
    try:
        chance = drawn.pop()
    except IndexError:  # other threads have drawn the rest
        chance = urandom(16)
    digits = f"{int.from_bytes(chance, 'big') ^ time_ns() << 64:032x}"
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{'89ab'[chance[8] >> 6]}{digits[17:20]}-{digits[20:]}"


def _forget_pool() -> None:
    global _pool
    _pool = (0, [])


if hasattr(os, "register_at_fork"):  # a child of a child may have the number of a process that has ended
    os.register_at_fork(after_in_child=_forget_pool)


def _message_id(value: Any) -> str:
    text = _identifier("message_id", value) or new_message_id()
    if len(text) > MAX_MESSAGE_ID_LENGTH:
        raise InvalidMessage("message_id", f"must have at most {MAX_MESSAGE_ID_LENGTH} characters, got {len(text)}")
    return text


def _timestamp(value: Any, now: float) -> str:
    if not _is_a(datetime, value):
        raise InvalidMessage("timestamp", f"must be a datetime or None, got {type(value).__name__}")
    try:
        text = _aware(value, now).isoformat(timespec="milliseconds")
        if type(text) is str and text[:4].isdecimal():
            return text
        problem = "it is no time"  # pandas' NaT is a datetime, too
    except Exception as failure:  # a tzinfo may be anybody's code
        problem = f"its tzinfo raised {type(failure).__name__}"
    raise InvalidMessage("timestamp", f"must be a datetime with an ISO 8601 form, or None; {problem}")


def _aware(value: datetime, now: float) -> datetime:
    offset = value.utcoffset()
    if offset is not None:
        # RFC 3339 has no seconds in an offset (local mean times before 1900 have).
        return value.astimezone(timezone.utc) if offset.total_seconds() % 60 else value
    local_now = datetime.fromtimestamp(now, timezone.utc).astimezone()
    local = value.replace(tzinfo=local_now.tzinfo)
    # A naive time is UTC, unless it was just made by datetime.now().  Where the zone has an offset, utcnow() is at
    # least a quarter of an hour away from now(), so the two can't be mistaken.
    if abs((local_now - local).total_seconds()) < 5:
        return local
    return value.replace(tzinfo=timezone.utc)
