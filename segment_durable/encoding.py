"""Anything a user may put into a message, as strict JSON.

The fast path is orjson.  What orjson refuses (lone surrogates, integers over 64 bits, keys that are not text, cycles,
types it does not know) goes through `plain`, which never raises but for size, and the standard library's encoder.
Both paths convert single values by the same function, so a value means the same on either.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence, Set, ValuesView
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from itertools import islice
from numbers import Integral, Real
from os import PathLike, fspath
from typing import Any
from uuid import UUID

import orjson

from segment_durable.errors import MessageTooLarge

__all__ = ["encode", "plain"]

log = logging.getLogger("segment.durable.message")

# Subclasses and dataclasses come to us: a subclass of dict such as Django's QueryDict says by its items() what it
# holds, which is not what its storage holds.  NaN and the infinities are null in orjson already.
_OPTIONS = orjson.OPT_PASSTHROUGH_SUBCLASS | orjson.OPT_PASSTHROUGH_DATACLASS
# orjson refuses containers nested deeper than 254; the slow path cuts there.
_MAX_DEPTH = 250
_WARNED: set[str] = set()
_MAX_WARNED = 1000

_CONTAINERS = (dict, list)
_LISTS = (tuple, Set, deque, Sequence, ValuesView, Iterator)


def encode(value: Any, limit: int) -> bytes:
    """`value` as UTF-8 JSON.

    `limit` bytes is where the slow path gives up with `MessageTooLarge`, so that an endless generator ends; the fast
    path does not check it.  Raises nothing else.
    """
    try:
        return orjson.dumps(value, default=_fast, option=_OPTIONS)
    except Exception:
        # Each node takes two bytes of JSON at the least, so a value with more nodes than limit / 2 can't fit.
        clean = plain(value, max_nodes=limit // 2 + 1, limit=limit)
        text = json.dumps(clean, allow_nan=False, ensure_ascii=False, separators=(",", ":"), check_circular=False)
        return text.encode("utf-8")


def plain(value: Any, *, max_nodes: int = 16_385, limit: int = 32 << 10) -> Any:
    """A copy of `value` made of dict, list, str, int, float, bool and None only; `json.dumps` takes it as it is.

    Raises `MessageTooLarge` if there are more than `max_nodes` values in it, and nothing else.
    """
    return _Cleaner(max_nodes, limit).clean(value, 0)


class _Cleaner:
    def __init__(self, max_nodes: int, limit: int) -> None:
        self._left = max_nodes
        self._limit = limit
        self._path: set[int] = set()

    def clean(self, value: Any, depth: int) -> Any:
        self._left -= 1
        if self._left < 0:
            raise MessageTooLarge(None, self._limit)
        try:
            return self._clean(value, depth)
        except MessageTooLarge:
            raise
        except RecursionError:
            return None  # the caller's own stack was deep already: cut here
        except Exception:
            return _name(value)

    def _clean(self, value: Any, depth: int) -> Any:
        if value is None or value is True or value is False:
            return value
        if isinstance(value, str) and not isinstance(value, Enum):
            return _text(value)
        if type(value) is int:
            return value if value.bit_length() <= 1024 else None  # beyond a double's range: as infinity
        if type(value) is float:
            return value if math.isfinite(value) else None
        if not isinstance(value, _CONTAINERS):
            value, again = _convert(value)
            if again:
                return self.clean(value, depth + 1) if depth < _MAX_DEPTH else None
            if value is None or isinstance(value, (str, float)):
                return self._clean(value, depth)
        if depth >= _MAX_DEPTH or id(value) in self._path:
            return None
        self._path.add(id(value))
        try:
            if isinstance(value, Mapping):
                return {_key(key): self.clean(each, depth + 1) for key, each in list(value.items())}
            return [self.clean(each, depth + 1) for each in value]
        finally:
            self._path.discard(id(value))


def _fast(value: Any) -> Any:
    """orjson's `default`: one value that orjson has no form for.  Raising sends the message to the slow path."""
    if isinstance(value, Iterator):
        raise TypeError  # may be endless; only the slow path counts
    converted, _ = _convert(value)
    if isinstance(converted, Mapping):
        return dict(converted.items())
    if isinstance(converted, (str, int, float)) or converted is None:
        return converted
    return list(converted)


def _convert(value: Any) -> tuple[Any, bool]:
    """One value that is no plain JSON, as something nearer to it, and whether that has to be converted again."""
    if isinstance(value, Enum):
        return value.value, True
    if isinstance(value, str):
        return "".join((value,)), False
    if isinstance(value, (Mapping, *_LISTS)) and not isinstance(value, (bytes, bytearray, memoryview)):
        if hasattr(value, "_asdict"):  # a named tuple has names to keep
            return value._asdict(), False
        return value, False
    if isinstance(value, (datetime, date, time)):
        return value.isoformat(), False
    if isinstance(value, (UUID, PathLike)):
        return (str(value) if isinstance(value, UUID) else fspath(value)), True
    if isinstance(value, timedelta):
        return value.total_seconds(), False
    if isinstance(value, Integral):
        return int(value), True
    if isinstance(value, (Decimal, Real)):
        return _float(value), False
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value).decode("utf-8", "replace"), False
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}, False
    if type(value).__module__.partition(".")[0] == "numpy":
        return value.tolist(), True
    _warn(value)
    return _name(value), False


def _float(value: Any) -> float | None:
    try:
        number = float(value)
    except (ValueError, OverflowError):  # a signalling NaN, a fraction beyond a double's range
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


def _key(key: Any) -> str:
    """A dict's key as text, as `json.dumps` has it where it has one."""
    if isinstance(key, Enum):
        return _key(key.value)
    if isinstance(key, str):
        return _text(key)
    if key is None or isinstance(key, (bool, int, float)):
        return str(json.dumps(key)) if not isinstance(key, int) or key.bit_length() <= 1024 else _name(key)
    if isinstance(key, (tuple, frozenset)):
        return ",".join(_key(each) for each in islice(key, 100))
    try:
        converted, _ = _convert(key)
        return _text(converted) if isinstance(converted, str) else _text(str(converted))
    except Exception:
        return _name(key)


def _name(value: Any) -> str:
    """What stands for a value that has no other form: its own name if it has one, else that of its type."""
    try:
        name = value.__qualname__
        if isinstance(name, str):
            return _text(name)
    except Exception:
        pass
    return _text(type(value).__qualname__)


def _warn(value: Any) -> None:
    kind = type(value).__qualname__
    if kind not in _WARNED and len(_WARNED) < _MAX_WARNED:
        _WARNED.add(kind)
        log.warning("a value of type %s has no JSON form: its name is sent in its place (said once for a type)", kind)
