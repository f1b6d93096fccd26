"""The calls: what is accepted, what is refused and with which words, and what a message looks like."""

from __future__ import annotations

import contextlib
import copy
import enum
import inspect
import json
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date, datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType, ModuleType
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segment_durable import Client, InvalidMessage, MessageTooLarge
from segment_durable.message import MAX_MESSAGE_BYTES, compose, encode_message, new_message_id
from segment_durable.version import VERSION

NOW = datetime(2026, 7, 1, 12, 0, 0, 123_456, tzinfo=timezone.utc)
ZONES = ["UTC", "America/New_York", "Asia/Kolkata", "Pacific/Chatham"]
SECRET = "the-secret-value"
LIBRARY = {"name": "segment-durable", "version": VERSION}

# What segment-analytics-python 2.4.0 has, in its order.
COMMON = ["context", "timestamp", "anonymous_id", "integrations", "message_id"]
SIGNATURES = {
    "identify": ["user_id", "traits", *COMMON],
    "track": ["user_id", "event", "properties", *COMMON],
    "alias": ["previous_id", "user_id", "context", "timestamp", "integrations", "message_id"],
    "group": ["user_id", "group_id", "traits", *COMMON],
    "page": ["user_id", "category", "name", "properties", *COMMON],
    "screen": ["user_id", "category", "name", "properties", *COMMON],
}
# Enough for each call to be a whole one.
NEEDED: dict[str, dict[str, Any]] = {
    "identify": {"user_id": "u"},
    "track": {"user_id": "u", "event": "e"},
    "alias": {"previous_id": "p", "user_id": "u"},
    "group": {"user_id": "u", "group_id": "g"},
    "page": {"user_id": "u"},
    "screen": {"user_id": "u"},
}
KINDS = sorted(NEEDED)


@pytest.fixture(scope="module")
def client() -> Client:
    """One that validates only: `send=False` touches no disk."""
    return Client("test-key", send=False)


def call(client: Client, kind: str, **arguments: Any) -> dict[str, Any]:
    """The message of a whole call with these arguments besides; None takes one away."""
    accepted, message = getattr(client, kind)(**(NEEDED[kind] | arguments))
    assert accepted is True
    assert message["type"] == kind
    encoded = json.loads(encode_message(message))
    assert encoded.keys() == message.keys()
    return encoded


def refusal(client: Client, kind: str, **arguments: Any) -> InvalidMessage:
    with pytest.raises(AssertionError) as caught:
        getattr(client, kind)(**(NEEDED[kind] | arguments))
    problem = caught.value
    assert type(problem) is InvalidMessage
    assert str(problem).startswith(f"{problem.field} must ")
    assert SECRET not in str(problem)
    return problem


@contextmanager
def zone(name: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", name)
        time.tzset()
        yield
    time.tzset()


def stamp(value: Any, now: datetime = NOW) -> str:
    message = compose("track", ("e", None), "u", None, None, value, None, None, now.timestamp())
    return str(message["timestamp"])


# -- the signatures


@pytest.mark.parametrize("kind", KINDS)
def test_the_calls_of_a_client_have_upstreams_parameters(kind: str) -> None:
    parameters = list(inspect.signature(getattr(Client, kind)).parameters.values())[1:]
    assert [each.name for each in parameters] == SIGNATURES[kind]
    assert all(each.default is None and each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters)


@pytest.mark.parametrize("kind", KINDS)
def test_the_calls_of_the_module_take_them_by_position_and_by_name(analytics: ModuleType, kind: str) -> None:
    analytics.send = False
    values: dict[str, Any] = {
        "user_id": "u",
        "anonymous_id": "a",
        "previous_id": "p",
        "group_id": "g",
        "event": "e",
        "category": "c",
        "name": "n",
        "properties": {"p": 1},
        "traits": {"t": 1},
        "context": {"c": 1},
        "integrations": {"i": True},
        "timestamp": NOW,
        "message_id": "m",
    }
    arguments = {name: values[name] for name in SIGNATURES[kind]}
    by_name = getattr(analytics, kind)(**arguments)
    assert by_name == getattr(analytics, kind)(*arguments.values())
    keys = {"user_id": "userId", "anonymous_id": "anonymousId", "previous_id": "previousId", "group_id": "groupId"}
    expected = {keys.get(name, name): value for name, value in arguments.items() if name != "message_id"}
    expected |= {"messageId": "m", "type": kind, "timestamp": "2026-07-01T12:00:00.123+00:00"}
    expected["context"] = {"c": 1, "library": LIBRARY}
    assert by_name == (True, expected)
    with pytest.raises(TypeError):
        getattr(analytics, kind)(unknown=1)


# -- ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("empty", [None, ""])
def test_a_call_without_any_id_is_refused(client: Client, kind: str, empty: Any) -> None:
    wrong = refusal(client, kind, user_id=empty)
    assert wrong.field == ("user_id" if kind == "alias" else "user_id or anonymous_id")
    if kind != "alias":
        refusal(client, kind, user_id=empty, anonymous_id="")
        message = call(client, kind, user_id=empty, anonymous_id="a")
        assert (message["userId"], message["anonymousId"]) == (None, "a")


class Number(enum.IntEnum):
    SEVEN = 7


class Name(str, enum.Enum):
    ANN = "ann"


class Loud(str):
    def __str__(self) -> str:
        raise RuntimeError(SECRET)


class LoudInt(int):
    def __str__(self) -> str:
        raise RuntimeError(SECRET)


UUID = uuid.UUID(int=5)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (-1, "-1"),
        (2**70, str(2**70)),
        (1.5, "1.5"),
        (Decimal("10"), "10"),
        (Fraction(1, 2), "1/2"),
        (UUID, str(UUID)),
        (Number.SEVEN, "7"),
        (Name.ANN, "ann"),
        (Loud("loud"), "loud"),
        ("漢字", "漢字"),
        (" ", " "),
    ],
)
def test_an_id_of_any_sensible_type_is_sent_as_text(client: Client, value: Any, text: str) -> None:
    assert call(client, "track", user_id=value)["userId"] == text
    assert call(client, "track", user_id=None, anonymous_id=value)["anonymousId"] == text
    assert call(client, "group", group_id=value)["groupId"] == text
    assert call(client, "alias", previous_id=value)["previousId"] == text
    assert call(client, "track", message_id=value)["messageId"] == text


@pytest.mark.parametrize("field", ["user_id", "anonymous_id", "group_id", "message_id"])
@pytest.mark.parametrize(
    "value",
    [
        True,
        False,
        float("nan"),
        float("inf"),
        Decimal("NaN"),
        Decimal("sNaN"),
        Decimal("-Infinity"),
        1j,
        1 << 33_000,
        LoudInt(1),
        [],
        [SECRET],
        {},
        {"id": SECRET},
        SECRET.encode(),
        object(),
        enum.Enum("Empty", {"A": True}).A,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_identifies_nobody_is_refused_also_beside_a_good_id(client: Client, field: str, value: Any) -> None:
    assert refusal(client, "group", **{field: value}).field == field


@pytest.mark.parametrize(("kind", "field"), [("group", "group_id"), ("alias", "previous_id"), ("alias", "user_id")])
@pytest.mark.parametrize("value", [None, ""])
def test_an_id_that_a_call_needs_must_be_there(client: Client, kind: str, field: str, value: Any) -> None:
    assert refusal(client, kind, **{field: value}).field == field


# -- the other arguments


@pytest.mark.parametrize("value", [None, "", 0, 1, b"e", ["e"], object()], ids=repr)
def test_an_event_needs_a_name(client: Client, value: Any) -> None:
    assert refusal(client, "track", event=value).field == "event"


def test_an_event_name_may_be_a_subclass_of_str(client: Client) -> None:
    assert call(client, "track", event=Name.ANN)["event"] == "ann"
    assert call(client, "track", event=Loud("e"))["event"] == "e"


@pytest.mark.parametrize("kind", ["page", "screen"])
@pytest.mark.parametrize("field", ["category", "name"])
def test_a_category_and_a_name_are_optional_texts(client: Client, kind: str, field: str) -> None:
    assert call(client, kind, **{field: "text"})[field] == "text"
    for empty in (None, "", 0, []):
        assert call(client, kind, **{field: empty})[field] is None
    for wrong in (1, [SECRET], SECRET.encode(), object()):
        assert refusal(client, kind, **{field: wrong}).field == field


class Unreadable(dict):  # type: ignore[type-arg]
    def items(self) -> Any:
        raise RuntimeError(SECRET)


class Ambiguous:
    """As numpy's arrays and pandas' frames are."""

    def __bool__(self) -> bool:
        raise ValueError(SECRET)


class Lost:
    """As a proxy of a web framework outside of a request."""

    @property
    def __class__(self) -> Any:
        raise RuntimeError(SECRET)

    def __bool__(self) -> bool:
        raise RuntimeError(SECRET)


OBJECTS = [
    *[(kind, name) for kind in KINDS for name in SIGNATURES[kind] if name in ("properties", "traits", "context")],
    *[(kind, "integrations") for kind in KINDS],
]


@pytest.mark.parametrize(("kind", "field"), OBJECTS)
def test_objects_are_dicts_or_empty(client: Client, kind: str, field: str) -> None:
    none = {"library": LIBRARY} if field == "context" else {}
    for empty in (None, {}, [], "", 0, False, MappingProxyType({})):
        assert call(client, kind, **{field: empty})[field] == none
    assert call(client, kind, **{field: {"a": 1}})[field] == {"a": 1, **none}
    for wrong in ([SECRET], SECRET, 1, True, MappingProxyType({"a": SECRET}), Ambiguous(), Lost()):
        assert refusal(client, kind, **{field: wrong}).field == field


def test_nothing_but_invalid_message_is_raised_whatever_is_passed(client: Client) -> None:
    for kind in KINDS:
        for field in SIGNATURES[kind]:
            for value in (Lost(), Ambiguous(), object(), lambda: 1, range(5), Unreadable(a=1)):
                with contextlib.suppress(InvalidMessage):
                    call(client, kind, **{field: value})


def test_a_context_that_cannot_be_read_is_refused(client: Client) -> None:
    assert refusal(client, "track", context=Unreadable(a=1)).field == "context"


@pytest.mark.parametrize("field", ["user_id", "group_id", "traits", "context", "integrations", "timestamp"])
def test_a_proxy_without_its_target_is_refused_like_any_other_value(client: Client, field: str) -> None:
    assert refusal(client, "group", **{field: Lost()}).field == field


def test_what_the_caller_passed_is_neither_changed_nor_reached_by_the_message(client: Client) -> None:
    passed: dict[str, Any] = {
        "context": {"ip": "1.2.3.4", "library": {"name": "mine"}},
        "properties": {"when": NOW, "set": {1}, "deep": {"a": [1]}},
        "integrations": {"All": False},
    }
    before = copy.deepcopy(passed)
    _, message = client.track("u", "e", **passed)
    assert passed == before
    assert message["context"] == {"ip": "1.2.3.4", "library": LIBRARY}
    message["context"]["added"] = message["context"]["library"]["added"] = 1
    assert passed == before
    _, other = client.track("u", "e")
    assert other["context"] == {"library": LIBRARY}


def test_a_context_says_by_its_items_what_it_holds(client: Client) -> None:
    class Query(dict):  # type: ignore[type-arg]
        def items(self) -> Any:
            return [(key, value[-1]) for key, value in super().items()]

    assert call(client, "track", context=Query(a=[1, 2]))["context"] == {"a": 2, "library": LIBRARY}


# -- message ids


def test_a_message_id_is_a_random_uuid_of_version_4(client: Client) -> None:
    ids = {new_message_id() for _ in range(5000)} | {call(client, "track")["messageId"] for _ in range(50)}
    assert len(ids) == 5050
    for each in ids:
        parsed = uuid.UUID(each)
        assert (str(parsed), parsed.version, parsed.variant) == (each, 4, uuid.RFC_4122)
    # All bits that are not fixed are both 0 and 1 somewhere.
    numbers = [uuid.UUID(each).int for each in ids]
    ones, zeros = 0, 0
    for number in numbers:
        ones, zeros = ones | number, zeros | ~number
    fixed = (0xF << 76) | (0b11 << 62)
    assert (ones & zeros) & ((1 << 128) - 1) == ((1 << 128) - 1) & ~fixed


def test_an_empty_message_id_is_not_given(client: Client) -> None:
    assert re.fullmatch(r"[0-9a-f-]{36}", call(client, "track", message_id="")["messageId"])


def test_a_message_id_has_at_most_100_characters(client: Client) -> None:
    assert call(client, "track", message_id="x" * 100)["messageId"] == "x" * 100
    assert call(client, "track", message_id="漢" * 100)["messageId"] == "漢" * 100
    problem = refusal(client, "track", message_id=SECRET + "x" * 100)
    assert problem.field == "message_id"
    assert "100 characters" in str(problem)
    assert refusal(client, "track", message_id=10**100).field == "message_id"


# -- sizes


@pytest.mark.parametrize("character", ["x", "é", "漢", "😀", '"', "\n", "\ud800"])
@pytest.mark.parametrize("where", ["properties", "context", "integrations", "event"])
def test_the_limit_is_32_kib_of_real_utf_8(client: Client, character: str, where: str) -> None:
    def arguments(count: int, pad: int) -> dict[str, Any]:
        text = character * count + "." * pad
        return {where: text if where == "event" else {"k": text}, "message_id": "m", "timestamp": NOW}

    each = {"x": 1, "é": 2, "漢": 3, "😀": 4, '"': 2, "\n": 2, "\ud800": 3}[character]
    empty = len(encode_message(client.track("u", **({"event": "e"} | arguments(1, 0)))[1])) - each
    count, pad = divmod(MAX_MESSAGE_BYTES - empty, each)
    _, message = client.track("u", **({"event": "e"} | arguments(count, pad)))
    assert len(encode_message(message)) == MAX_MESSAGE_BYTES
    with pytest.raises(RuntimeError) as caught:
        client.track("u", **({"event": "e"} | arguments(count, pad + 1)))
    problem = caught.value
    assert type(problem) is MessageTooLarge
    assert (problem.size, problem.limit) == (MAX_MESSAGE_BYTES + 1, MAX_MESSAGE_BYTES)
    assert "32kb" in str(problem)
    assert "Send less" in str(problem)


def test_a_message_that_is_too_large_quotes_nothing(client: Client) -> None:
    for value in (SECRET * 5000, [SECRET] * 20_000, [f"{SECRET}\ud800"] * 5000):
        with pytest.raises(MessageTooLarge) as caught:
            client.track(SECRET, SECRET, {SECRET: value})
        assert SECRET not in str(caught.value)


# -- times


def test_without_a_timestamp_it_is_now_in_utc_to_the_millisecond(client: Client) -> None:
    before = datetime.now(timezone.utc)
    text = call(client, "track")["timestamp"]
    after = datetime.now(timezone.utc)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", text)
    assert before - timedelta(milliseconds=1) <= datetime.fromisoformat(text) <= after
    assert stamp(None) == "2026-07-01T12:00:00.123+00:00"


@pytest.mark.parametrize("local", ZONES)
def test_an_aware_time_keeps_its_zone(local: str) -> None:
    with zone(local):
        assert stamp(NOW) == "2026-07-01T12:00:00.123+00:00"
        assert stamp(NOW.astimezone(ZoneInfo("Asia/Kolkata"))) == "2026-07-01T17:30:00.123+05:30"
        assert stamp(datetime(2020, 1, 2, tzinfo=ZoneInfo("Pacific/Chatham"))) == "2020-01-02T00:00:00.000+13:45"
        assert stamp(datetime(2020, 1, 2, tzinfo=ZoneInfo("America/New_York"))) == "2020-01-02T00:00:00.000-05:00"


@pytest.mark.parametrize("local", ZONES)
def test_a_naive_time_is_utc(local: str) -> None:
    with zone(local):
        assert stamp(datetime(2020, 1, 2, 3, 4, 5, 6789)) == "2020-01-02T03:04:05.006+00:00"
        assert stamp(datetime(2099, 1, 2)) == "2099-01-02T00:00:00.000+00:00"
        assert stamp(datetime.min) == "0001-01-01T00:00:00.000+00:00"
        assert stamp(datetime.max) == "9999-12-31T23:59:59.999+00:00"
        for seconds in (-900, -60, -6, 6, 60, 900):
            near = NOW.replace(tzinfo=None, microsecond=0) + timedelta(seconds=seconds)
            assert datetime.fromisoformat(stamp(near)) == near.replace(tzinfo=timezone.utc)


@pytest.mark.parametrize("local", ZONES)
@pytest.mark.parametrize("season", [NOW, NOW.replace(month=1)], ids=["July", "January"])
@pytest.mark.parametrize("ago", [0.0, 4.9, -4.9])
def test_a_naive_now_is_local_and_a_naive_utcnow_is_never_shifted(local: str, season: datetime, ago: float) -> None:
    meant = season - timedelta(seconds=ago)
    with zone(local):
        naive_now = meant.astimezone().replace(tzinfo=None)
        naive_utcnow = meant.replace(tzinfo=None)
        assert datetime.fromisoformat(stamp(naive_now, season)) == meant.replace(
            microsecond=meant.microsecond // 1000 * 1000
        )
        assert datetime.fromisoformat(stamp(naive_utcnow, season)) == datetime.fromisoformat(stamp(naive_now, season))
    assert local == "UTC" or naive_now != naive_utcnow


@pytest.mark.parametrize("local", ZONES)
def test_the_naive_now_of_a_real_call_is_the_time_of_that_call(client: Client, local: str) -> None:
    with zone(local):
        for naive in (datetime.now(), datetime.now(timezone.utc).replace(tzinfo=None)):
            sent = datetime.fromisoformat(call(client, "track", timestamp=naive)["timestamp"])
            assert abs((datetime.now(timezone.utc) - sent).total_seconds()) < 600


def test_both_hours_of_the_night_when_the_clocks_go_back_are_read_right() -> None:
    for utc_hour in (5, 6):  # 01:30 comes twice in New York
        now = datetime(2026, 11, 1, utc_hour, 30, tzinfo=timezone.utc)
        with zone("America/New_York"):
            naive = now.astimezone().replace(tzinfo=None, fold=0)
            assert naive.hour == 1
            assert datetime.fromisoformat(stamp(naive, now)) == now


class Offset(tzinfo):
    def __init__(self, answer: Callable[[], Any]) -> None:
        self.answer = answer

    def utcoffset(self, _: datetime | None) -> Any:
        return self.answer()

    def dst(self, _: datetime | None) -> Any:
        return None

    def tzname(self, _: datetime | None) -> str:
        return SECRET


def fail() -> Any:
    raise RuntimeError(SECRET)


def test_an_offset_with_seconds_is_sent_in_utc_for_rfc_3339_has_none() -> None:
    assert stamp(datetime(1800, 1, 2, tzinfo=ZoneInfo("Asia/Kolkata"))) == "1800-01-01T18:06:32.000+00:00"
    odd = Offset(lambda: timedelta(microseconds=1000))
    assert stamp(datetime(2026, 1, 2, tzinfo=odd)) == "2026-01-01T23:59:59.999+00:00"


def test_a_zone_without_an_offset_is_no_zone() -> None:
    assert stamp(datetime(2026, 1, 2, tzinfo=Offset(lambda: None))) == "2026-01-02T00:00:00.000+00:00"


class NaT(datetime):
    """As pandas' "not a time", which is a datetime."""

    def isoformat(self, *_: Any, **__: Any) -> str:
        return "NaT"


@pytest.mark.parametrize(
    "value",
    [
        datetime(2026, 1, 2, tzinfo=Offset(fail)),
        datetime(2026, 1, 2, tzinfo=Offset(lambda: 5)),
        datetime(2026, 1, 2, tzinfo=Offset(lambda: timedelta(days=2))),
        datetime.min.replace(tzinfo=Offset(lambda: timedelta(seconds=1))),
        NaT(2026, 1, 2),
        date(2026, 1, 2),
        "2026-01-02T00:00:00Z",
        1_700_000_000,
        0,
        "",
        False,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_time_is_refused(client: Client, value: Any) -> None:
    problem = refusal(client, "track", timestamp=value)
    assert problem.field == "timestamp"
    assert "or None" in str(problem)


@settings(deadline=None)
@given(
    st.datetimes(
        timezones=st.none() | st.timezones() | st.timedeltas(-timedelta(hours=23), timedelta(hours=23)).map(timezone)
    )
)
def test_any_other_time_is_sent_as_the_moment_that_it_is(value: datetime) -> None:
    try:
        text = stamp(value)
    except InvalidMessage:
        assert value.year in (1, 9999)  # has no form in UTC
        return
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d", text)
    aware = value if value.tzinfo is not None else value.replace(tzinfo=timezone.utc)
    lost = aware - datetime.fromisoformat(text)
    assert timedelta(0) <= lost < timedelta(milliseconds=1)
