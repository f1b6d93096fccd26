"""What an answer means: the whole table, and every form of a header that says when."""

from __future__ import annotations

import json
import time
from datetime import datetime, timezone
from email.utils import format_datetime

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from requests.structures import CaseInsensitiveDict

from segment_durable.answers import ANSWER_LIMIT, MAX_TOLD_WAIT, Kind, Outcome, classify, told_wait, unanswered
from segment_durable.transport import Response, TransportError

NOW = datetime(2026, 3, 4, 5, 6, 7, tzinfo=timezone.utc).timestamp()
LATER = datetime.fromtimestamp(NOW + 42, timezone.utc)
RETRYABLE = {408, 410, 429, 460} | (set(range(500, 600)) - {501, 505, 511})

# One row for each rule of the design.
TABLE = {
    **dict.fromkeys(range(100, 600), Kind.MISDIRECTED),
    **dict.fromkeys(range(200, 300), Kind.DELIVERED),
    **dict.fromkeys([400, 413, 414, 422], Kind.REJECTED),
    **dict.fromkeys([401, 403, 511], Kind.UNAUTHORISED),
    **dict.fromkeys(RETRYABLE, Kind.UNREACHABLE),
}


def answer(status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> Outcome:
    return classify(Response(status, CaseInsensitiveDict(headers or {}), body), NOW)


@pytest.mark.parametrize("status", range(100, 600))
def test_every_status_means_what_the_table_says(status: int) -> None:
    assert answer(status).kind is TABLE[status]
    assert answer(status).status == status


@pytest.mark.parametrize("status", range(100, 600))
@pytest.mark.parametrize("name", ["Retry-After", "x-ratelimit-reset"])
def test_a_time_in_a_header_throttles_what_may_be_tried_again_and_nothing_else(status: int, name: str) -> None:
    outcome = answer(status, {name: "30"})
    expected = Kind.THROTTLED if status in RETRYABLE else TABLE[status]
    assert (outcome.kind, outcome.retry_after) == (expected, 30.0 if status in RETRYABLE else 0.0)


def test_the_table_names_each_rule_of_the_design() -> None:
    for status, kind in {
        302: Kind.MISDIRECTED,
        307: Kind.MISDIRECTED,
        404: Kind.MISDIRECTED,
        405: Kind.MISDIRECTED,
        501: Kind.MISDIRECTED,
        505: Kind.MISDIRECTED,
        418: Kind.MISDIRECTED,
        500: Kind.UNREACHABLE,
        502: Kind.UNREACHABLE,
        503: Kind.UNREACHABLE,
        504: Kind.UNREACHABLE,
        429: Kind.UNREACHABLE,  # that says no time
    }.items():
        assert answer(status).kind is kind


@pytest.mark.parametrize("content_type", ["text/html", "Text/HTML; charset=utf-8", "application/xhtml+xml"])
def test_a_refusal_that_is_a_web_page_is_not_the_receivers(content_type: str) -> None:
    """It would refuse each event of a backlog by itself, and all would end in the dead letters."""
    for status in (400, 422):
        assert answer(status, {"Content-Type": content_type}).kind is Kind.MISDIRECTED
        assert answer(status, {"Content-Type": "text/plain"}).kind is Kind.REJECTED
    for status in (413, 414):  # the request was too long, for a proxy or for the receiver
        assert answer(status, {"Content-Type": content_type}).kind is Kind.REJECTED


@pytest.mark.parametrize("status", [-1, 0, 99, 600, 999, 10**9])
def test_a_status_that_does_not_exist_delivers_nothing(status: int) -> None:
    assert answer(status).kind is Kind.MISDIRECTED


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1", 1.0),
        ("  17 ", 17.0),
        ("0.25", 0.25),
        ("1e2", 100.0),
        ("300", 300.0),
        ("301", 300.0),
        ("86400", 300.0),
        ("1" + "0" * 30, 300.0),
        (str(int(NOW) + 42), 42.0),  # an epoch date
        (str(int(NOW) + 9000), 300.0),
        (str(int(NOW) - 1), 0.0),
        ("0", 0.0),
        ("-5", 0.0),
        ("", 0.0),
        ("soon", 0.0),
        ("nan", 0.0),
        ("inf", 0.0),
        ("1" * 400, 0.0),  # beyond a double
        ("1_0", 0.0),
        ("١٢", 0.0),
        ("²", 0.0),
        ("10, 20", 20.0),  # said twice, by a gateway as well
        ("17, soon", 17.0),
        (format_datetime(LATER, usegmt=True), 42.0),
        (LATER.strftime("%a, %d %b %Y %H:%M:%S -0000"), 42.0),
        (LATER.strftime("%a, %d %b %Y %H:%M:%S +0000"), 42.0),
        (LATER.strftime("%A, %d-%b-%y %H:%M:%S GMT"), 42.0),  # RFC 850
        (LATER.strftime("%a %b %d %H:%M:%S %Y"), 42.0),  # asctime
        ("Wed, 04 Mar 2026 07:06:49 +0200", 42.0),
        ("Wed, 04 Mar 2026 05:06:07 GMT", 0.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 300.0),
        ("Fri, 31 Dec 9999 23:59:59 -2359", 300.0),
        ("Mon, 01 Jan 0001 00:00:00 +2359", 0.0),
        ("Wed, 32 Mar 2026 25:61:61 GMT", 0.0),
        ("Wed, 04 Mar 2026 05:06:49 +99999999999", 0.0),
        ("Wed,", 0.0),
    ],
)
@pytest.mark.parametrize("name", ["Retry-After", "X-RateLimit-Reset"])
@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Pacific/Chatham"])
def test_every_form_of_a_time_is_read_in_every_zone(
    text: str, seconds: float, name: str, zone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", zone)
        time.tzset()
        found = told_wait({name: text}, NOW)
    time.tzset()
    assert found == pytest.approx(seconds)


@settings(deadline=None)
@given(st.text() | st.text("0123456789.,-+: eE_GMTWedMarjan", max_size=40))
@example("Wed, 04 Mar 2026 05:06:49 " + "9" * 50)
@example("1-1-1-1-1:1:1")
def test_no_header_raises_and_no_wait_is_outside_its_bounds(text: str) -> None:
    for headers in ({"Retry-After": text}, {"X-RateLimit-Reset": text}, {"Retry-After": LATER.ctime(), "Date": text}):
        assert 0.0 <= told_wait(headers, NOW) <= MAX_TOLD_WAIT


def test_a_wrong_clock_of_ours_does_not_matter_if_the_answer_says_what_time_it_is() -> None:
    date = "Wed, 04 Mar 2026 05:06:07 GMT"
    for now in (0.0, NOW - 1e6, NOW + 1e6):
        assert told_wait({"Retry-After": "Wed, 04 Mar 2026 05:06:49 GMT", "Date": date}, now) == 42.0
        assert told_wait({"X-RateLimit-Reset": str(int(NOW) + 42), "Date": date}, now) == 42.0
    assert told_wait({"Retry-After": "Wed, 04 Mar 2026 05:06:49 GMT", "Date": "yesterday"}, NOW) == 42.0


def test_retry_after_comes_first_and_the_other_stands_in_if_it_says_nothing() -> None:
    assert told_wait({"Retry-After": "5", "X-RateLimit-Reset": "9"}, NOW) == 5.0
    assert told_wait({"Retry-After": "soon", "X-RateLimit-Reset": "9"}, NOW) == 9.0
    assert told_wait({}, NOW) == 0.0


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (b'{"code":"invalid_size","message":"too big"}', "invalid_size", "too big"),
        (b'{"error":{"code":"c","message":"m"}}', "c", "m"),
        (b'{"error":"invalid_client","error_description":"who?"}', "invalid_client", "who?"),
        (b'{"type":"t","message":"m"}', "t", "m"),
        (b'{"code":7}', "7", "status 400"),
        (b'{"code":null,"message":[1]}', "unknown", "status 400"),
        (b'{"code":{"a":1},"message":""}', "unknown", "status 400"),
        (b'["code"]', "unknown", "status 400"),
        (b"null", "unknown", "status 400"),
        (b"<html>", "unknown", "status 400"),
        (b"", "unknown", "status 400"),
        (b"\xff\xfe\x00", "unknown", "status 400"),
        (b"[" * 100_000, "unknown", "status 400"),
        (b'{"code":' + b"9" * 9000 + b"}", "unknown", "status 400"),
        (b'{"code":"a\\u0000b\\nc\\u001b[31m\\ud800","message":"x\\r\\ny"}', "a b c [31m", "x  y"),
    ],
)
def test_the_receivers_words_are_kept_as_one_printable_line(body: bytes, code: str, message: str) -> None:
    outcome = answer(400, body=body)
    assert (outcome.code, outcome.message) == (code, message)


def test_long_words_and_long_answers_are_cut() -> None:
    outcome = answer(400, body=json.dumps({"code": "c" * 9000, "message": "m" * 9000}).encode())
    assert len(outcome.code) == len(outcome.message) == 200
    assert len(outcome.answer) == ANSWER_LIMIT
    assert outcome.answer.startswith('{"code": "ccc')


@settings(deadline=None)
@given(st.integers(100, 599), st.dictionaries(st.sampled_from(["Retry-After", "Date"]), st.text()), st.binary())
def test_no_answer_raises(status: int, headers: dict[str, str], body: bytes) -> None:
    outcome = answer(status, headers, body)
    assert (outcome.kind is Kind.DELIVERED) == (200 <= status < 300)
    assert (outcome.kind is Kind.REJECTED) == (status in (400, 413, 414, 422))
    assert (outcome.retry_after > 0) == (outcome.kind is Kind.THROTTLED)
    assert (outcome.code + outcome.message).isprintable()
    outcome.answer.encode()


@pytest.mark.parametrize("kind", ["timeout", "dns", "certificate", "tls", "proxy", "connection"])
def test_no_answer_at_all_may_go_better_next_time(kind: str) -> None:
    outcome = unanswered(TransportError(kind, "what happened"))
    assert (outcome.kind, outcome.status, outcome.code, outcome.message) == (Kind.UNREACHABLE, 0, kind, "what happened")
