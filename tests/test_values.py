"""Any value at all may be in a message: it is sent as strict JSON, and its neighbours never suffer."""

from __future__ import annotations

import array
import copy
import dataclasses
import enum
import io
import itertools
import json
import logging
import math
import tracemalloc
import types
import uuid
from collections import ChainMap, OrderedDict, UserDict, UserString, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from fractions import Fraction
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import MagicMock, Mock
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from segment_durable import MessageTooLarge, encoding
from segment_durable.encoding import encode, plain

LIMIT = 32 << 10
SURROGATE = "\ud800"
NEIGHBOUR = {"text": "näh 漢字 😀", "numbers": [1, -2.5, 1e300, 2**53], "yes": True, "no": None, "deep": {"a": [{}]}}


# -- reading as strictly as a receiver may


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    assert len(read) == len(pairs), "a key is there twice"
    return read


def constant(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


def strict(body: bytes) -> Any:
    assert type(body) is bytes
    return json.loads(body.decode("utf-8"), object_pairs_hook=once, parse_constant=constant)


def same(a: Any, b: Any) -> bool:
    """Equal, and of equal types: 1 is neither 1.0 nor True."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) and (a != 0 or not isinstance(a, float) or math.copysign(1, a) == math.copysign(1, b))


def on_both_paths(make: Callable[[], Any]) -> Any:
    """What a value becomes, the same alone and beside a lone surrogate, which forces the slow path."""
    alone = strict(encode({"odd": make(), "beside": NEIGHBOUR}, LIMIT))
    slow = strict(encode({"odd": make(), "beside": NEIGHBOUR, "surrogate": SURROGATE}, LIMIT))
    assert same(slow.pop("surrogate"), "\ufffd")
    assert same(alone, slow)
    assert same(alone["beside"], NEIGHBOUR)
    cleaned = plain({"odd": make()})
    assert same(strict(json.dumps(cleaned, allow_nan=False).encode()), {"odd": alone["odd"]})
    return alone["odd"]


# -- odd values, each made anew by its function, for some can be used but once


class Colour(enum.Enum):
    RED = "red"
    ODD = Decimal("1.5")
    LIST = [1, (2, 3)]
    NOTHING = None
    TIME = datetime(2026, 1, 2, 3, 4, 5)


class Level(enum.IntEnum):
    HIGH = 3


class Flags(enum.IntFlag):
    A = 1
    B = 2


class Plan(str, enum.Enum):
    FREE = "free"


class Raw(bytes, enum.Enum):
    A = b"raw"


Pair = namedtuple("Pair", "left right")


class Typed(NamedTuple):
    name: str
    tags: set[str]


class Str(str):
    def __str__(self) -> str:
        raise RuntimeError

    def encode(self, *_: Any) -> bytes:
        raise RuntimeError


class Int(int):
    def __repr__(self) -> str:
        raise RuntimeError

    __str__ = __repr__


class Float(float):
    __repr__ = Int.__repr__


class Query(dict):  # type: ignore[type-arg]
    """As Django's QueryDict: what it says is not what it stores."""

    def items(self) -> Any:
        return [(key, value[-1]) for key, value in super().items()]


class List(list):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[Any]:
        return iter(["by", "iter"])


@dataclasses.dataclass
class Item:
    name: str
    price: Decimal
    parts: list[Any] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Slotted:
    __slots__ = ("a",)
    a: int


class Where(tzinfo):
    def __init__(self, offset: timedelta | None) -> None:
        self.offset = offset

    def utcoffset(self, _: datetime | None) -> timedelta | None:
        return self.offset

    def dst(self, _: datetime | None) -> timedelta | None:
        return None


class FailingZone(tzinfo):
    def utcoffset(self, _: datetime | None) -> timedelta:
        raise RuntimeError


class BytesPath:
    def __fspath__(self) -> bytes:
        return b"/by/bytes"


class Plain:
    pass


def _boom(*_: Any) -> Any:
    raise RuntimeError("hostile")


class Hostile:
    __repr__ = __str__ = __iter__ = __len__ = __bool__ = __eq__ = __int__ = __float__ = __getattr__ = _boom
    __hash__ = object.__hash__


class HostileClass:
    @property
    def __class__(self) -> Any:
        return _boom()


class HostileMeta(type):
    def __getattribute__(cls, name: str) -> Any:
        return _boom()


class OfHostileMeta(metaclass=HostileMeta):
    pass


class HostileMapping(Mapping[str, int]):
    __getitem__ = __len__ = __iter__ = _boom


class Unpaired(dict):  # type: ignore[type-arg]
    def items(self) -> Any:
        return [1, 2, 3]


class Recursive:
    def __getattr__(self, name: str) -> Any:
        return getattr(self, name + "_")


class RecursiveIter(list):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(self)


class Array:
    """As numpy's arrays and scalars, which are not installed here."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def tolist(self) -> Any:
        return self.value


Array.__module__ = "numpy"


@dataclasses.dataclass
class Dtype:
    name: str

    @property
    def kind(self) -> str:
        return "m" if "time" not in self.name or "delta" in self.name else "M"

    def __str__(self) -> str:
        return self.name


class Time(Array):
    """As numpy's times: of less than microseconds it makes integers; a span is a number, which can't be one."""

    def __init__(self, unit: str, value: Any) -> None:
        super().__init__(12345 if unit in ("ns", "ps", "fs", "as") else value)
        self.exact = value
        kind = "timedelta64" if isinstance(value, timedelta) else "datetime64"
        self.dtype = Dtype(f"{kind}[{unit}]")

    def astype(self, dtype: str) -> Time:
        assert dtype == f"{self.dtype.kind}8[us]"
        return Time("us", self.exact)

    def __int__(self) -> int:
        raise TypeError


class Span(Time):
    pass


Integral.register(Span)
Time.__module__ = Span.__module__ = "numpy"


def generator() -> Iterator[int]:
    yield from (1, 2, 3)


def failing_generator() -> Iterator[int]:
    yield 1
    raise RuntimeError


def cyclic_list() -> list[Any]:
    cycle: list[Any] = [1]
    cycle.append(cycle)
    return cycle


def cyclic_dict() -> dict[str, Any]:
    cycle: dict[str, Any] = {"a": 1}
    cycle["self"] = cycle
    return cycle


def mutual() -> Any:
    a, b = [1], {"a": 2}
    a.append(b)  # type: ignore[arg-type]
    b["b"] = a  # type: ignore[assignment]
    return a


def family() -> Item:
    """A parent and its children, each of which knows it: small, though endless to who does not see the cycle."""
    parent = Item("parent", Decimal(1))
    parent.parts = [Item(f"child {i}", Decimal(2), [parent, parent]) for i in range(5)]
    return parent


def nested(levels: int, kind: Callable[[Any], Any]) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = kind(value)
    return value


BIG = 2**63
ODD: dict[str, tuple[Callable[[], Any], Any]] = {
    "None": (lambda: None, None),
    "nan": (lambda: math.nan, None),
    "infinity": (lambda: math.inf, None),
    "minus infinity": (lambda: [-math.inf], [None]),
    "minus zero": (lambda: -0.0, -0.0),
    "the least float": (lambda: 5e-324, 5e-324),
    "1e16": (lambda: 1e16, 1e16),
    "a lone high surrogate": (lambda: "a\ud800b", "a\ufffdb"),
    "a lone low surrogate": (lambda: "a\udfffb", "a\ufffdb"),
    "a lone surrogate at the end": (lambda: "ab\ud800", "ab\ufffd"),
    "a pair of surrogates": (lambda: "a\ud83d\ude00b", "a😀b"),
    "a pair the wrong way round": (lambda: "\ude00\ud83d", "\ufffd\ufffd"),
    "a byte order mark": (lambda: "\ufeff\ud800", "\ufeff\ufffd"),
    "controls": (lambda: '\0\x1f\x7f\u2028"\\', '\0\x1f\x7f\u2028"\\'),
    "int over 63 bits": (lambda: BIG, BIG),
    "int over 64 bits": (lambda: -(2**70), -(2**70)),
    "int just in a double's range": (lambda: 2**1023, 2**1023),
    "int beyond a double's range": (lambda: 2**1024 - 1, None),
    "int of 10,000 digits": (lambda: 1 << 33_000, None),
    "Decimal": (lambda: Decimal("12.50"), 12.5),
    "Decimal NaN": (lambda: Decimal("NaN"), None),
    "Decimal sNaN": (lambda: Decimal("sNaN"), None),
    "Decimal infinity": (lambda: Decimal("-Infinity"), None),
    "Decimal beyond a double": (lambda: Decimal("1e999"), None),
    "Fraction": (lambda: Fraction(1, 4), 0.25),
    "Fraction beyond a double": (lambda: Fraction(10**400), None),
    "complex": (lambda: 1 + 2j, "complex"),
    "Enum": (lambda: Colour.RED, "red"),
    "Enum of a Decimal": (lambda: Colour.ODD, 1.5),
    "Enum of a list": (lambda: Colour.LIST, [1, [2, 3]]),
    "Enum of None": (lambda: Colour.NOTHING, None),
    "Enum of a time": (lambda: Colour.TIME, "2026-01-02T03:04:05"),
    "Enums in a list": (lambda: [Colour.RED, Level.HIGH], ["red", 3]),
    "IntEnum": (lambda: Level.HIGH, 3),
    "IntFlag": (lambda: Flags.A | Flags.B, 3),
    "str Enum": (lambda: Plan.FREE, "free"),
    "bytes Enum": (lambda: Raw.A, "raw"),
    "set": (lambda: {7}, [7]),
    "empty set": (lambda: set(), []),
    "frozenset in a set": (lambda: {frozenset({"a"})}, [["a"]]),
    "tuple": (lambda: (1, (2, {"a": (3,)})), [1, [2, {"a": [3]}]]),
    "namedtuple": (lambda: Pair(1, [2]), [1, [2]]),
    "typed namedtuple": (lambda: Typed("n", {"t"}), ["n", ["t"]]),
    "generator": (generator, [1, 2, 3]),
    "generator that fails": (failing_generator, "failing_generator"),
    "generator of generators": (lambda: (generator() for _ in range(2)), [[1, 2, 3], [1, 2, 3]]),
    "map": (lambda: map(str, [1, 2]), ["1", "2"]),
    "deque": (lambda: deque([1, 2]), [1, 2]),
    "range": (lambda: range(3), [0, 1, 2]),
    "array": (lambda: array.array("d", [1.5]), [1.5]),
    "dict keys": (lambda: {"a": 1}.keys(), ["a"]),
    "dict values": (lambda: {"a": 1}.values(), [1]),
    "dict items": (lambda: {"a": 1}.items(), [["a", 1]]),
    "MappingProxyType": (lambda: types.MappingProxyType({"a": {1}}), {"a": [1]}),
    "OrderedDict": (lambda: OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
    "defaultdict": (lambda: defaultdict(list, a=[1]), {"a": [1]}),
    "ChainMap": (lambda: ChainMap({"a": 1}, {"a": 2, "b": 3}), {"a": 1, "b": 3}),
    "UserDict": (lambda: UserDict(a=[1]), {"a": [1]}),
    "UserString": (lambda: UserString("text"), "text"),
    "str subclass": (lambda: Str("text"), "text"),
    "int subclass": (lambda: Int(5), 5),
    "int subclass over 64 bits": (lambda: Int(2**80), 2**80),
    "float subclass": (lambda: Float(1.5), 1.5),
    "float subclass NaN": (lambda: Float("nan"), None),
    "dict subclass": (lambda: Query(a=[1, 2]), {"a": 2}),
    "dict subclass of nested ones": (lambda: Query(a=[Query(b=[{"c": 1}])]), {"a": {"b": {"c": 1}}}),
    "list subclass": (lambda: List([1, 2, 3]), ["by", "iter"]),
    "bytes": (lambda: b"caf\xc3\xa9", "café"),
    "bytes that are no text": (lambda: b"\xff\xd8", "\ufffd\ufffd"),
    "bytearray": (lambda: bytearray(b"ab"), "ab"),
    "memoryview": (lambda: memoryview(b"abcd")[::2], "ac"),
    "datetime": (lambda: datetime(2026, 1, 2, 3, 4, 5, 6), "2026-01-02T03:04:05.000006"),
    "datetime in UTC": (lambda: datetime(2026, 1, 2, tzinfo=timezone.utc), "2026-01-02T00:00:00+00:00"),
    "datetime in a zone": (
        lambda: datetime(2026, 1, 2, tzinfo=ZoneInfo("Pacific/Chatham")),
        "2026-01-02T00:00:00+13:45",
    ),
    "datetime with seconds in its offset": (
        lambda: datetime(1800, 1, 2, tzinfo=ZoneInfo("Asia/Kolkata")),
        "1800-01-01T18:06:32+00:00",
    ),
    "datetime with microseconds in its offset": (
        lambda: datetime(2026, 1, 2, tzinfo=timezone(timedelta(microseconds=1))),
        "2026-01-01T23:59:59.999999+00:00",
    ),
    "datetime of an unknown zone": (lambda: datetime(2026, 1, 2, tzinfo=Where(None)), "2026-01-02T00:00:00"),
    "datetime of a failing zone": (lambda: datetime(2026, 1, 2, tzinfo=FailingZone()), "datetime"),
    "year 1": (lambda: datetime.min, "0001-01-01T00:00:00"),
    "date": (lambda: date(2026, 1, 2), "2026-01-02"),
    "time": (lambda: time(1, 2, 3), "01:02:03"),
    "time with a zone": (lambda: time(1, 2, tzinfo=timezone.utc), "01:02:00+00:00"),
    "timedelta": (lambda: timedelta(days=1, milliseconds=5), 86400.005),
    "UUID": (lambda: uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    "Path": (lambda: Path("/a/b"), "/a/b"),
    "a path of bytes": (BytesPath, "/by/bytes"),
    "dataclass": (lambda: Item("n", Decimal("2.5"), [{1}]), {"name": "n", "price": 2.5, "parts": [[1]]}),
    "dataclass with slots": (lambda: Slotted(1), {"a": 1}),
    "dataclass type": (lambda: Item, "Item"),
    "numpy-like array": (lambda: Array([[1, 2], [3.5, math.nan]]), [[1, 2], [3.5, None]]),
    "numpy-like scalar": (lambda: Array(7), 7),
    "numpy-like time": (lambda: Time("s", datetime(2020, 1, 2, 3)), "2020-01-02T03:00:00"),
    "numpy-like fine time": (lambda: Time("ns", datetime(2020, 1, 2, 3)), "2020-01-02T03:00:00"),
    "numpy-like span": (lambda: Span("s", timedelta(seconds=90)), 90.0),
    "numpy-like fine span": (lambda: Span("ns", timedelta(seconds=90)), 90.0),
    "object": (Plain, "Plain"),
    "class": (lambda: Plain, "Plain"),
    "function": (lambda: generator, "generator"),
    "builtin": (lambda: len, "len"),
    "module": (lambda: math, "module"),
    "open file": (lambda: io.StringIO("line\n"), "StringIO"),
    "hostile object": (Hostile, "Hostile"),
    "hostile __class__": (HostileClass, "HostileClass"),
    "hostile metaclass": (OfHostileMeta, "OfHostileMeta"),
    "hostile class": (lambda: OfHostileMeta, "HostileMeta"),
    "hostile mapping": (HostileMapping, "HostileMapping"),
    "items that are no pairs": (lambda: Unpaired(a=1), "Unpaired"),
    "endless __getattr__": (Recursive, "Recursive"),
    "endless __iter__": (lambda: RecursiveIter([1]), None),
    "Mock": (Mock, "Mock"),
    "Mock of a dict": (lambda: Mock(spec=dict), "Mock"),
    "list in itself": (cyclic_list, [1, None]),
    "dict in itself": (cyclic_dict, {"a": 1, "self": None}),
    "list and dict in each other": (mutual, [1, {"a": 2, "b": None}]),
    "dataclasses in each other": (
        family,
        {
            "name": "parent",
            "price": 1.0,
            "parts": [{"name": f"child {i}", "price": 2.0, "parts": [None, None]} for i in range(5)],
        },
    ),
    "the same list twice": (lambda: [[1]] * 3, [[1], [1], [1]]),
    "int keys": (lambda: {1: "a", -2: "b", 2**70: "c"}, {"1": "a", "-2": "b", str(2**70): "c"}),
    "bool and None keys": (lambda: {True: 1, None: 2}, {"true": 1, "null": 2}),
    "float keys": (lambda: {1.5: 1, math.nan: 2, math.inf: 3}, {"1.5": 1, "NaN": 2, "Infinity": 3}),
    "tuple keys": (lambda: {(1, "a"): 1}, {"1,a": 1}),
    "Enum keys": (lambda: {Colour.RED: 1, Level.HIGH: 2, Plan.FREE: 3}, {"red": 1, "3": 2, "free": 3}),
    "other keys": (
        lambda: {date(2026, 1, 2): 1, uuid.UUID(int=1): 2, b"b": 3, Decimal("1.5"): 4, Path("/p"): 5, Str("s"): 6},
        {"2026-01-02": 1, "00000000-0000-0000-0000-000000000001": 2, "b": 3, "1.5": 4, "/p": 5, "s": 6},
    ),
    "object keys": (lambda: {Plain(): 1, Hostile(): 2, len: 3}, {"Plain": 1, "Hostile": 2, "len": 3}),
    "an int key of 10,000 digits": (lambda: {1 << 33_000: 1}, {"int": 1}),
    "surrogate keys": (lambda: {"a\ud800": 1, "\ud83d\ude00": 2}, {"a\ufffd": 1, "😀": 2}),
    "a text key wins over one that looks like it": (lambda: {"1": "text", 1: "number"}, {"1": "text"}),
    "a text key wins, also later": (lambda: {1: "number", "1": "text"}, {"1": "text"}),
    "200 lists in each other": (lambda: nested(200, lambda v: [v]), nested(200, lambda v: [v])),
    "200 dicts in each other": (lambda: nested(200, lambda v: {"a": v}), nested(200, lambda v: {"a": v})),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_value_has_its_json_form_on_both_paths(name: str) -> None:
    make, expected = ODD[name]
    assert same(on_both_paths(make), expected)


@pytest.mark.parametrize("make", [MagicMock, lambda: Mock(spec=list), lambda: Mock(spec=str), lambda: Mock(spec=int)])
def test_a_mock_that_can_be_anything_harms_nobody(make: Callable[[], Any]) -> None:
    on_both_paths(make)


def levels(value: Any) -> int:
    depth = 0
    while isinstance(value, (list, dict)):
        value = value[0] if isinstance(value, list) else value["a"]
        depth += 1
    assert value is None or value == 1
    return depth


@pytest.mark.parametrize("kind", [lambda v: [v], lambda v: {"a": v}, lambda v: (v,), lambda v: deque([v])])
@pytest.mark.parametrize("depth", [15, 16, 17, 18, 249, 250, 251, 1000, 50_000])
def test_too_deep_a_nesting_is_cut_at_one_place(depth: int, kind: Callable[[Any], Any]) -> None:
    value = nested(depth, kind)
    assert levels(strict(encode(value, 1 << 20))) == min(depth, 250)
    assert levels(on_both_paths(lambda: value)) == min(depth, 249)
    while isinstance(value, (tuple, deque, list)):  # or the interpreter's own destructor would have to dig
        value = value[0]


def test_a_stack_that_is_deep_already_cuts_earlier_and_keeps_the_neighbour() -> None:
    def dig(frames: int) -> Any:
        if frames:
            return dig(frames - 1)
        return strict(encode({"odd": {"a": nested(200, lambda v: [v])}, "s": SURROGATE, "beside": NEIGHBOUR}, LIMIT))

    assert same(dig(500)["beside"], NEIGHBOUR)


# -- what would not end


def shared(kind: Callable[[Any], Any], levels: int = 40) -> Any:
    value: Any = kind(1)
    for _ in range(levels):
        value = kind(value)
    return value


@dataclasses.dataclass(frozen=True)
class Both:
    left: Any
    right: Any


class Endless(Sequence[int]):
    """Has a length, and never ends."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: Any) -> int:
        return 1


class EndlessMapping(Mapping[str, int]):
    __getitem__ = __len__ = lambda *_: 1  # type: ignore[assignment]

    def __iter__(self) -> Iterator[str]:
        return map(str, itertools.count())


class EndlessList(list):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[int]:
        return itertools.count()


class Tree(enum.Enum):
    SHARED = shared(lambda v: [v, v])


ENDLESS: dict[str, Callable[[], Any]] = {
    "lists": lambda: shared(lambda v: [v, v]),
    "dicts": lambda: shared(lambda v: {"a": v, "b": v}),
    "lists and dicts": lambda: shared(lambda v: {"a": [v], "b": (v,)}),
    "dataclasses": lambda: shared(lambda v: Both(v, v)),
    "named tuples": lambda: shared(lambda v: Pair(v, v)),
    "deques": lambda: shared(lambda v: deque([v, v])),
    "ordered dicts": lambda: shared(lambda v: OrderedDict(a=v, b=v)),
    "frozensets": lambda: shared(lambda v: frozenset({v, (v,)})),
    "proxies": lambda: shared(lambda v: types.MappingProxyType({"a": v, "b": v})),
    "arrays": lambda: shared(lambda v: Array([v, v])),
    "an Enum": lambda: Tree.SHARED,
    "keys": lambda: {shared(lambda v: frozenset({v, (v,)}), 7): 1, shared(lambda v: (v,) * 20, 3): 2},
    "few levels, wide": lambda: nested(4, lambda v: [v] * 1000),
    "a few thousand sets": lambda: [set(range(100))] * 10_000,
    "itertools.count": lambda: itertools.count(),
    "itertools.repeat in a list": lambda: [itertools.repeat(1)],
    "range": lambda: range(10**15),
    "a sequence without end": Endless,
    "a mapping without end": EndlessMapping,
    "a list without end": EndlessList,
    "a list of a million": lambda: [0] * 1_000_000,
    "an endless generator of lists": lambda: ([] for _ in itertools.count()),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("beside", ["", SURROGATE], ids=["fast", "slow"])
@pytest.mark.parametrize("name", ENDLESS)
def test_what_would_not_end_is_too_large_at_once_and_takes_no_memory(name: str, beside: str) -> None:
    value = ENDLESS[name]()
    tracemalloc.start()
    try:
        assert len(encode({"odd": value, "beside": beside}, LIMIT)) > LIMIT  # as `encode_message` finds then
    except MessageTooLarge:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 16 << 20
    if not beside:
        with pytest.raises(MessageTooLarge):
            plain(value)


def test_nothing_that_fits_is_refused_for_the_number_of_its_values() -> None:
    lists: Any = [1] * 16_383, [[]] * 10_922, [{}, []] * 5_000, [[1]] * 8_000
    for value in lists:
        body = encode(value, LIMIT)
        assert LIMIT * 0.9 < len(body) < LIMIT
        assert same(strict(body), value)
        value[-8:] = [SURROGATE]
        body = encode(value, LIMIT)
        assert LIMIT * 0.9 < len(body) < LIMIT
        assert same(strict(body), [*value[:-1], "\ufffd"])


# -- properties

texts = st.text(st.characters(exclude_categories=[]), max_size=8)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**200), 2**200)
    | st.floats()
    | texts
    | st.decimals()
    | st.fractions()
    | st.complex_numbers()
    | st.binary(max_size=8)
    | st.datetimes(timezones=st.none() | st.timezones())
    | st.dates()
    | st.times(timezones=st.none() | st.just(timezone.utc))
    | st.timedeltas()
    | st.uuids()
    | st.sampled_from([Colour.RED, Colour.ODD, Colour.LIST, Level.HIGH, Plan.FREE, Raw.A, Flags.A])
    | texts.map(Str)
    | st.integers().map(Int)
    | st.floats().map(Float)
)
keys = (
    texts
    | st.integers()
    | st.floats()
    | st.booleans()
    | st.none()
    | st.tuples(st.integers(), texts)
    | st.dates()
    | st.uuids()
    | st.decimals(allow_nan=False)
    | st.sampled_from([Colour.RED, Level.HIGH, Plan.FREE, len, Plain])
)


def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists = st.lists(children, max_size=4)
    return (
        lists
        | lists.map(tuple)
        | lists.map(deque)
        | lists.map(lambda v: Pair(v, v))
        | lists.map(lambda v: Item("n", Decimal(1), v))
        | st.dictionaries(keys, children, max_size=4)
        | st.dictionaries(texts, children, max_size=4)
        | st.dictionaries(texts, children, max_size=4).map(OrderedDict)
        | st.dictionaries(keys, children, max_size=4).map(types.MappingProxyType)
        | st.dictionaries(texts, st.lists(children, min_size=1, max_size=2), max_size=3).map(Query)
        | st.sets(st.integers() | texts | st.dates(), max_size=4)
    )


values = st.recursive(scalars, containers, max_leaves=12)


def structure(value: Any) -> Any:
    """What a value is, to be compared: types, order and all, for NaN is not equal to itself."""
    if isinstance(value, Mapping):
        return type(value), [(structure(k), structure(v)) for k, v in Mapping.items(value)]
    if isinstance(value, (list, tuple, deque, set)):
        return type(value), [structure(each) for each in list.__iter__(list(value))]
    if dataclasses.is_dataclass(value):
        return type(value), [structure(getattr(value, each.name)) for each in dataclasses.fields(value)]
    if isinstance(value, (int, float)) and not isinstance(value, enum.Enum):
        return type(value), (int if isinstance(value, int) else float).__repr__(value)
    return type(value), value if isinstance(value, str) else repr(value)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(values)
def test_any_value_is_sent_the_same_way_on_both_paths_and_stays_as_it_was(value: Any) -> None:
    before = structure(value)
    on_both_paths(lambda: value)
    assert structure(value) == before


@settings(deadline=None)
@given(st.recursive(scalars, lambda children: st.lists(children) | st.dictionaries(keys, children), max_leaves=8))
def test_the_values_around_an_odd_one_arrive_unchanged(value: Any) -> None:
    for around in ({"a": 1, "odd": value, "z": "last"}, {"a": 1, "odd": [[value], {"x": value}], "z": "last"}):
        sent = strict(encode(around, 1 << 20))
        assert list(sent) == ["a", "odd", "z"]
        assert same((sent["a"], sent["z"]), (1, "last"))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**1000), 2**1000)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children, max_size=5) | st.dictionaries(st.text(), children, max_size=5),
)


@settings(deadline=None)
@given(json_values)
def test_what_is_json_already_arrives_as_it_is(value: Any) -> None:
    assert same(on_both_paths(lambda: value), value)
    assert same(plain(value), value)


@settings(deadline=None)
@given(values)
def test_plain_shares_no_container_with_what_it_was_given(value: Any) -> None:
    original = {"value": value}
    cleaned = plain(original)
    reference = copy.deepcopy(cleaned)
    stack = [cleaned]
    before = structure(value)
    while stack:
        each = stack.pop()
        stack += each.values() if isinstance(each, dict) else each if isinstance(each, list) else []
        if isinstance(each, (dict, list)):
            each.clear()
    assert structure(value) == before
    assert same(plain(original), reference)


# -- what is said


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    fresh: set[str] = set()
    monkeypatch.setattr(encoding, "_WARNED", fresh)
    return fresh


def test_there_is_one_warning_a_type_which_names_the_type_and_not_the_value(
    warned: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    class Secretive:
        def __repr__(self) -> str:
            return "the secret"

    for _ in range(3):
        for beside in ("", SURROGATE):
            encode([Secretive(), Secretive(), {Secretive(): Hostile()}, object(), beside], LIMIT)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    assert {name.rpartition(".")[2] for name in warned} == {"Secretive", "Hostile", "object"}
    assert all(any(name in line for line in said) for name in ("Secretive", "Hostile", "object"))
    assert "the secret" not in caplog.text


def test_a_value_that_failed_is_warned_of_too(warned: set[str], caplog: pytest.LogCaptureFixture) -> None:
    encode([failing_generator()], LIMIT)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "generator" in caplog.text


def test_many_types_do_not_fill_the_memory_with_names(warned: set[str], caplog: pytest.LogCaptureFixture) -> None:
    for i in range(1100):
        encode(type(f"Type{i}", (), {})(), LIMIT)
    assert len(warned) == len(caplog.records) == 1000


def test_a_log_handler_that_fails_is_not_the_callers_trouble(warned: set[str]) -> None:
    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError("disk full")

    handler = Broken()
    encoding.log.logger.addHandler(handler)
    try:
        assert same(on_both_paths(Plain), "Plain")
    finally:
        encoding.log.logger.removeHandler(handler)
    assert "Plain" in warned


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interrupt_while_encoding_is_not_swallowed(interrupt: type[BaseException]) -> None:
    class Interrupted(list):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            raise interrupt

    with pytest.raises(interrupt):
        encode({"odd": Interrupted([1])}, LIMIT)
    with pytest.raises(interrupt):
        encode({"odd": Interrupted([1]), "s": SURROGATE}, LIMIT)


def test_a_file_is_not_read() -> None:
    file = io.StringIO("first\nsecond\n")
    on_both_paths(lambda: file)
    assert file.read() == "first\nsecond\n"


def test_a_time_limit_that_strikes_while_a_message_is_encoded_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler may raise anything there, as Celery's does and many that raise TimeoutError."""

    class TimeLimit(Exception):
        pass

    for limit in (TimeLimit, TimeoutError, KeyboardInterrupt):

        def strike(*_: object, limit: type[BaseException] = limit) -> bytes:
            raise limit

        monkeypatch.setattr(encoding, "_dumps", strike)
        with pytest.raises(limit):
            encode({"a": 1}, LIMIT)


def test_a_member_of_an_enum_whose_value_raises_is_encoded_all_the_same() -> None:
    class Odd(enum.Enum):
        MEMBER = 1

        @property
        def value(self) -> int:
            raise LookupError

    assert json.loads(encode({"a": [Odd.MEMBER], "b": 1}, LIMIT))["b"] == 1
