"""Anything a user may put into a message, as strict JSON.

The fast path is orjson.  What it refuses (lone surrogates, integers over 64 bits, keys that are not text, types it does
not know) and what might grow on the way (cycles, sharing, iterators) goes through `plain`, which counts and never
raises but for size, and the standard library's encoder.  Both paths convert single values by the same function, so a
value means the same on either.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import UserString, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set, ValuesView
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from io import IOBase
from itertools import islice
from numbers import Integral, Real
from os import PathLike, fspath
from typing import Any
from uuid import UUID

import orjson

from segment_durable.errors import MessageTooLarge
from segment_durable.interrupts import from_signal
from segment_durable.logs import get_log

__all__ = ["encode", "plain"]

log = get_log("message")

# Subclasses and dataclasses come to us: a subclass of dict such as Django's QueryDict says by its items() what it
# holds, which is not what its storage holds.  Times too: orjson rounds an offset that has seconds.  NaN and the
# infinities are null in orjson already.
_OPTIONS = orjson.OPT_PASSTHROUGH_SUBCLASS | orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME
_MAX_DEPTH = 250  # of containers in containers; what is deeper is null.  Python's own stack ends near 1,000 frames.
_MAX_FAST_DEPTH = 16
_MAX_KEY_DEPTH = 8
_MAX_FAST_ITEMS = 100  # of a container that is no dict, list or tuple
_WARNED: set[str] = set()
_MAX_WARNED = 1000

_dumps = orjson.dumps
_NESTING = frozenset({dict, list, tuple})
_SCALARS = frozenset({str, int, float, bool, type(None), datetime, date, time, timedelta, Decimal, UUID})
_all_scalars = _SCALARS.issuperset
_TOO_FINE = ("[ns]", "[ps]", "[fs]", "[as]")  # of numpy's units of time
_LISTS = (tuple, Set, deque, Sequence, ValuesView, Iterator)


def encode(value: Any, limit: int, parts: tuple[Any, ...] | None = None) -> bytes:
    """`value` as UTF-8 JSON.

    `limit` bytes is where the slow path gives up with `MessageTooLarge`, so that an endless generator ends; the fast
    path does not check it.  `parts`: what in `value` may be anything, if the rest is known to be small and flat; it
    saves a look at that.  Raises nothing else.
    """
    # Each value takes two bytes of JSON at the least, its comma included: more of them than limit / 2 can't fit.
    most = limit // 2 + 1
    try:
        if (parts is not None and _are_flat(parts)) or _is_small(value if type(value) is dict else (value,), most):
            return _dumps(value, _fast, _OPTIONS)
    except (TypeError, RuntimeError) as problem:  # orjson's, and a dict that another thread changes; not a time limit's
        cause = problem.__cause__
        if cause is not None and (not isinstance(cause, Exception) or from_signal(cause)):
            raise cause from None  # orjson wraps a KeyboardInterrupt in our `_fast` like any other
    clean = plain(value, max_nodes=most, limit=limit)
    text = json.dumps(clean, allow_nan=False, ensure_ascii=False, separators=(",", ":"), check_circular=False)
    return text.encode("utf-8")


def plain(value: Any, *, max_nodes: int = 16_385, limit: int = 32 << 10) -> Any:
    """A copy of `value` made of dict, list, str, int, float, bool and None only; `json.dumps` takes it as it is.

    Raises `MessageTooLarge` if there are more than `max_nodes` values in it, and nothing else.
    """
    return _Cleaner(max_nodes, limit).clean(value, 0)


def _are_flat(parts: tuple[Any, ...]) -> bool:
    """Whether these are None or dicts of scalars: orjson takes no more time or memory for them than they do."""
    for part in parts:
        if part is None:
            continue
        if type(part) is not dict or not _all_scalars(map(type, part.values())):
            return False
    return True


def _is_small(value: Any, most: int) -> bool:
    """Whether orjson will meet at most `most` values in there, none of them deep.

    orjson can't be stopped once it runs: forty lists, each of them twice in the next, take no memory here and terabytes
    as JSON.  Nor does it count how deep it is in tuples: a few thousand end the process (3.13.0).  This look costs a
    call with five flat properties 1.2 us.
    """
    level = [value]
    for _ in range(_MAX_FAST_DEPTH):
        deeper = []
        for container in level:
            most -= len(container)
            if most < 0:
                return False
            for each in container.values() if type(container) is dict else container:
                kind = type(each)
                if kind is str or kind in _SCALARS:
                    continue
                if kind in _NESTING:
                    deeper.append(each)
                elif issubclass(kind, Enum) and not _is_scalar_member(each):
                    return False
        if not deeper:
            return True
        level = deeper
    return False


def _is_scalar_member(member: Enum) -> bool:
    """orjson takes the value of a member by itself, and ends the process where that is a property that raises."""
    try:
        return type(member.value) in _SCALARS
    except Exception as problem:
        if from_signal(problem):
            raise
        return False


class _Cleaner:
    def __init__(self, max_nodes: int, limit: int) -> None:
        self._left = max_nodes
        self._limit = limit
        self._path: set[int] = set()

    def clean(self, value: Any, depth: int) -> Any:
        self._count()
        try:
            return self._clean(value, depth)
        except MessageTooLarge:
            raise
        except RecursionError:
            return None  # the caller's own stack was deep already: cut here
        except Exception as problem:
            if from_signal(problem):
                raise
            return _name(value)

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise MessageTooLarge(None, self._limit)

    def _clean(self, value: Any, depth: int) -> Any:
        if value is None or value is True or value is False:
            return value
        kind = type(value)
        if kind is str:
            return _text(value)
        if kind is int:
            return None if _float(value) is None else value  # beyond a double's range: as infinity
        if kind is float:
            return _float(value)
        mark = id(value)
        if depth >= _MAX_DEPTH or mark in self._path:
            return None
        self._path.add(mark)
        try:
            if kind is dict:
                return self._object(list(value.items()), depth)
            if kind is not list:
                value, again = _convert(value)
                if again:
                    return self.clean(value, depth + 1)
                if value is None or isinstance(value, (str, float)):
                    return self._clean(value, depth)
                if isinstance(value, Mapping):
                    return self._object(islice(value.items(), self._left + 1), depth)
            return [self.clean(each, depth + 1) for each in value]
        finally:
            self._path.discard(mark)

    def _object(self, items: Iterable[tuple[Any, Any]], depth: int) -> dict[str, Any]:
        clean: dict[str, Any] = {}
        for key, each in items:
            name = self._key(key, 0)
            if type(key) is str or name not in clean:  # of {1: ..., "1": ...} the text is what was meant
                clean[name] = self.clean(each, depth + 1)
        return clean

    def _key(self, key: Any, depth: int) -> str:
        """A dict's key as text, as `json.dumps` has it where it has one."""
        if type(key) is str:
            return _text(key)
        self._count()
        try:
            if key is None or (isinstance(key, (bool, int, float)) and not isinstance(key, Enum)):
                return str(json.dumps(key)) if not isinstance(key, int) or key.bit_length() <= 1024 else _name(key)
            if isinstance(key, (tuple, frozenset)) and depth < _MAX_KEY_DEPTH:
                return ",".join([self._key(each, depth + 1) for each in key])
            value, again = _convert(key)
            if again and depth < _MAX_KEY_DEPTH:
                return self._key(value, depth + 1)
            return _text(value) if isinstance(value, str) else str(value) if type(value) is float else _name(key)
        except MessageTooLarge:
            raise
        except Exception as problem:
            if from_signal(problem):
                raise
            return _name(key)


def _fast(value: Any) -> Any:
    """orjson's `default`: one value that orjson has no form for.  Raising sends the message to the slow path."""
    if type(value) is datetime:
        return _iso(value)
    if isinstance(value, Iterator):
        raise TypeError  # may be endless; only the slow path counts
    converted, again = _convert(value)
    if type(converted) in _SCALARS:
        return converted
    if again:
        raise TypeError
    # What is in here was not counted by `_is_small`: it has to be few and flat.
    if isinstance(converted, Mapping):
        mapping = dict(islice(converted.items(), _MAX_FAST_ITEMS + 1))
        items = list(mapping.values())
    else:
        items = list(islice(converted, _MAX_FAST_ITEMS + 1))
    if len(items) > _MAX_FAST_ITEMS or not _SCALARS.issuperset(map(type, items)):
        raise TypeError
    return mapping if isinstance(converted, Mapping) else items


def _convert(value: Any) -> tuple[Any, bool]:
    """One value that is no plain JSON, as something nearer to it, and whether that has to be converted again."""
    if isinstance(value, Enum):
        return value.value, True
    if isinstance(value, (str, UserString)):
        return "".join((value if isinstance(value, str) else value.data,)), False
    if isinstance(value, (Mapping, *_LISTS)) and not isinstance(value, (bytes, bytearray, memoryview, IOBase)):
        return value, False
    if isinstance(value, (datetime, date, time)):
        return _iso(value), False
    if isinstance(value, (UUID, PathLike)):
        return (str(value) if isinstance(value, UUID) else fspath(value)), True
    if isinstance(value, timedelta):
        return value.total_seconds(), False
    if _numpy_kind(value) in ("m", "M"):  # a span of time is an Integral, says numpy
        if str(value.dtype).endswith(_TOO_FINE):  # it would make plain integers
            value = value.astype(f"{value.dtype.kind}8[us]")
        return value.tolist(), True
    if isinstance(value, Integral):
        return int(value), True
    if isinstance(value, (Decimal, Real)):
        return _float(value), False
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value).decode("utf-8", "replace"), False
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}, False
    if _is_numpys(value):
        return value.tolist(), True
    return _name(value), False


def _is_numpys(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "numpy"


def _numpy_kind(value: Any) -> str:
    """The letter that numpy has for the kind of its type; "" if it is none of numpy's."""
    return getattr(getattr(value, "dtype", None), "kind", "") if _is_numpys(value) else ""


def _iso(value: date | time) -> str:
    """ISO 8601; in UTC where the offset has seconds, which RFC 3339 does not know (local mean times have them)."""
    if isinstance(value, datetime) and value.tzinfo is not None and value.tzinfo is not timezone.utc:
        offset = value.utcoffset()
        if offset is not None and (offset.seconds % 60 or offset.microseconds):
            value = value.astimezone(timezone.utc)
    return value.isoformat()


def _float(value: Any) -> float | None:
    try:
        number = float(value)
    except (ValueError, OverflowError):  # a signalling NaN, a fraction or an int beyond a double's range
        return None
    return number if math.isfinite(number) else None


def _text(value: str) -> str:
    exact = "".join((value,))
    try:
        exact.encode("utf-8")
    except UnicodeEncodeError:
        # Two surrogates that are a pair become the character they mean, a lone one the replacement character.
        return exact.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return exact


def _name(value: Any) -> str:
    """What stands for a value that has no other form: its own name if it has one, else that of its type."""
    kind = _text(type.__dict__["__qualname__"].__get__(type(value)))  # whatever a metaclass says
    if kind not in _WARNED and len(_WARNED) < _MAX_WARNED:
        _WARNED.add(kind)
        log.warning("a value of type %s has no JSON form: its name is sent in its place (said once for a type)", kind)
    try:
        name = value.__qualname__
        return _text(name) if isinstance(name, str) else kind
    except Exception as problem:
        if from_signal(problem):
            raise
        return kind
