"""The receiver: every rule refuses what breaks it and lets its neighbour pass; every fault does what it says."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import gzip
import http.client
import json
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from segment_durable import testing
from segment_durable.testing import (
    Answer,
    Batch,
    Delay,
    Drop,
    HalfAnswer,
    Hang,
    Headers,
    Honest,
    Receiver,
    Refuse,
)
from segment_durable.testing.rules import framing

SECONDS = 5.0
TIME = "2025-06-01T12:00:00.123Z"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver
        assert receiver.errors == ()


def event(message_id: str = "m1", **changes: Any) -> dict[str, Any]:
    """A sound event; a change to None takes the key away."""
    whole = {"type": "track", "event": "E", "userId": "u", "messageId": message_id, "timestamp": TIME} | changes
    return {key: value for key, value in whole.items() if value is not None}


def body(*events: Any, **changes: Any) -> bytes:
    whole = {"batch": list(events) or [event()], "sentAt": TIME, "writeKey": "key"} | changes
    return json.dumps({key: value for key, value in whole.items() if value is not None}).encode()


def basic(user: str, password: str = "") -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


HEADERS = {"Content-Type": "application/json", "Authorization": basic("key")}


@contextlib.contextmanager
def connect(receiver: Receiver) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection(receiver.url.removeprefix("http://"), timeout=SECONDS)
    try:
        yield connection
    finally:
        connection.close()


def post(
    receiver: Receiver,
    data: bytes | None = None,
    *,
    path: str = "/v1/batch",
    method: str = "POST",
    **headers: str | None,
) -> tuple[int, Any, http.client.HTTPMessage]:
    """Status, body (decoded where it is JSON) and headers. A header is named with underscores; None takes it away."""
    changed = {name.replace("_", "-"): value for name, value in headers.items()}
    sent = {name: value for name, value in (HEADERS | changed).items() if value is not None}
    with connect(receiver) as connection:
        connection.request(method, path, body() if data is None else data, sent)
        response = connection.getresponse()
        content = response.read()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, json.loads(content) if is_json and content else content, response.headers


@contextlib.contextmanager
def sending(receiver: Receiver, data: bytes | None = None) -> Iterator[socket.socket]:
    """A connection on which a whole batch request was sent and no answer was read."""
    content = body() if data is None else data
    head = f"POST /v1/batch HTTP/1.1\r\nHost: x\r\nAuthorization: {basic('key')}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    with raw(receiver) as connection:
        connection.sendall(head.encode() + content)
        yield connection


@contextlib.contextmanager
def raw(receiver: Receiver) -> Iterator[socket.socket]:
    host, port = receiver.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), SECONDS) as connection:
        yield connection


def read_to_end(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65_536), b""))


def is_silent(connection: socket.socket) -> bool:
    """Neither an answer nor an end within a twentieth of a second."""
    return not select.select([connection], [], [], 0.05)[0]


# --- what arrived


def test_a_sound_batch_is_taken_and_can_be_looked_at(receiver: Receiver) -> None:
    data = body(event("a"), event("b", type="identify", event=None))
    assert post(receiver, data)[:2] == (200, {"success": True})

    (batch,) = receiver.batches
    assert (batch.method, batch.path, batch.status, batch.taken, batch.problem) == (
        "POST",
        "/v1/batch",
        200,
        True,
        None,
    )
    assert (batch.body, batch.sent_at, batch.authorization) == (data, TIME, "basic")
    assert batch.headers["content-TYPE"] == "application/json"
    assert "authorization" in set(batch.headers)
    assert list(batch.events) == receiver.events == [event("a"), event("b", type="identify", event=None)]
    assert receiver.requests == (batch,)


def test_neither_body_nor_credentials_are_in_a_repr(receiver: Receiver) -> None:
    post(receiver, body(event(event="Secret")), Authorization=basic("key"))
    shown = repr(receiver.requests[0]).replace(repr(receiver.batches[0].events), "")
    assert "Secret" not in shown
    assert HEADERS["Authorization"] not in shown


def test_duplicates_are_counted_and_unique_keeps_the_first(receiver: Receiver) -> None:
    post(receiver, body(event("a", event="first"), event("b")))
    post(receiver, body(event("a", event="second"), event("c")))
    assert [one["messageId"] for one in receiver.events] == ["a", "b", "a", "c"]
    assert [one["messageId"] for one in receiver.unique] == ["a", "b", "c"]
    assert receiver.unique[0]["event"] == "first"
    assert receiver.duplicates == 1


def test_a_refused_batch_is_kept_and_its_events_do_not_count(receiver: Receiver) -> None:
    assert post(receiver, body(event("a"), event("b", type="nonsense")))[0] == 400
    (batch,) = receiver.batches
    assert (batch.status, batch.taken, len(batch.events)) == (400, False, 2)
    assert batch.problem is not None
    assert batch.problem.code == "invalid_type"
    assert batch.problem.message.startswith("batch[1].type")
    assert receiver.events == receiver.unique == []


def test_gzip_is_unpacked(receiver: Receiver) -> None:
    assert post(receiver, gzip.compress(body()), Content_Encoding="gzip")[0] == 200
    assert receiver.batches[0].body == body()


def test_clear_forgets_what_arrived_and_keeps_the_script(receiver: Receiver) -> None:
    receiver.script(Honest(), Answer(503))
    post(receiver)
    receiver.clear()
    assert (receiver.requests, receiver.events, receiver.unique, receiver.duplicates) == ((), [], [], 0)
    assert post(receiver)[0] == 503
    assert post(receiver)[0] == 200
    assert receiver.duplicates == 0  # the id from before was forgotten too


def test_a_connection_serves_many_requests(receiver: Receiver) -> None:
    with connect(receiver) as connection:
        connection.connect()
        opened = connection.sock
        for number, status in enumerate([200, 400, 200]):
            data = body(event(str(number))) if status == 200 else b"{"
            connection.request("POST", "/v1/batch", data, HEADERS)
            response = connection.getresponse()
            response.read()
            assert response.status == status
            assert connection.sock is opened
        port = opened.getsockname()[1]
    assert [request.client_port for request in receiver.requests] == [port] * 3
    post(receiver)
    assert receiver.requests[-1].client_port != port


def test_it_can_be_used_as_a_proxy(receiver: Receiver) -> None:
    assert post(receiver, path="http://api.example/v1/batch")[0] == 200
    assert receiver.batches[0].path == "http://api.example/v1/batch"


# --- wait_for


def test_wait_for_wakes_when_the_events_arrive(receiver: Receiver) -> None:
    threads = [threading.Thread(target=post, args=(receiver, body(event(str(n))))) for n in range(5)]
    for thread in threads:
        thread.start()
    assert receiver.wait_for(5, SECONDS)
    for thread in threads:
        thread.join()
    assert len(receiver.unique) == 5


def test_wait_for_counts_unique_events_and_gives_up(receiver: Receiver) -> None:
    post(receiver, body(event("a")))
    post(receiver, body(event("a")))
    assert receiver.wait_for(1, 0)
    assert not receiver.wait_for(2, 0)
    begun = time.monotonic()
    assert not receiver.wait_for(2, 0.05)
    assert time.monotonic() - begun >= 0.05


def test_wait_for_takes_a_predicate_and_passes_on_what_it_raises(receiver: Receiver) -> None:
    waiting = threading.Event()

    def refused(seen: Receiver) -> bool:
        waiting.set()
        return any(request.status == 404 for request in seen.requests)

    def send() -> None:
        assert waiting.wait(SECONDS)
        post(receiver, path="/nowhere")

    sender = threading.Thread(target=send)
    sender.start()
    assert receiver.wait_for(refused, SECONDS)
    sender.join()
    with pytest.raises(ZeroDivisionError):
        receiver.wait_for(lambda seen: bool(1 / 0))


# --- what is refused always


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "BREW"])
def test_other_methods_are_refused_and_recorded(receiver: Receiver, method: str) -> None:
    status, _, headers = post(receiver, b"", method=method, path="/anything")
    assert (status, headers["Allow"]) == (405, "POST")
    assert [(one.method, one.path, one.status) for one in receiver.requests] == [(method, "/anything", 405)]
    assert receiver.batches == ()


@pytest.mark.parametrize("path", ["/", "/v1/import", "/v1/batch/", "/v1/batch?x", "/token"])
def test_other_paths_are_refused_and_recorded(receiver: Receiver, path: str) -> None:
    status, answer, _ = post(receiver, path=path)
    assert (status, answer["code"]) == (404, "not_found")
    assert receiver.requests[0].path == path
    assert receiver.batches == ()


def numbered(count: int) -> bytes:
    return body(*(event(str(number)) for number in range(count)))


def sized(size: int, letter: str = "x") -> dict[str, Any]:
    """An event that has so many bytes as `body` sends it."""
    width = len(letter.encode())
    room = size - len(json.dumps(event(filler="")))
    return event(filler=letter * (room // width) + "x" * (room % width))


def padded(size: int) -> bytes:
    """A body of so many bytes."""
    events = [event(str(number), filler="x" * 30_000) for number in range(16)]
    return body(*events, padding="x" * (size - len(body(*events, padding=""))))


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (body()[:-1], "invalid_json"),
        (body() + b"x", "invalid_json"),
        (b"\xef\xbb\xbf" + body(), "invalid_json"),
        (body().replace(b'"E"', b'"\xff"'), "invalid_json"),
        (body().replace(b'"E"', b'"\xed\xa0\x80"'), "invalid_json"),
        (body().replace(b'"E"', b'"a\nb"'), "invalid_json"),
        (body().replace(b'"E"', b"NaN"), "invalid_json"),
        (body().replace(b'"E"', b"-Infinity"), "invalid_json"),
        (body().replace(b'"event"', b'"type"'), "invalid_json"),
        (body().replace(b'"sentAt"', b'"writeKey"'), "invalid_json"),
        (body().replace(b", ", b",,", 1), "invalid_json"),
        (body().replace(b'"writeKey": ', b'"writeKey" '), "invalid_json"),
        (body().replace(b'"writeKey"', b"writeKey"), "invalid_json"),
        (body(b := event()).replace(b"}]", b"},]"), "invalid_json"),
        (body().replace(b'"E"', b"[" * 100_000), "invalid_json"),
        (body().replace(b'"E"', b"9" * 10_000), "invalid_json"),
        (b"[]", "invalid_body"),
        (b'"text"', "invalid_body"),
        (b"{}", "invalid_batch"),
        (body(batch=None), "invalid_batch"),
        (body(batch=[]), "invalid_batch"),
        (body(batch={"a": 1}), "invalid_batch"),
        (body(event(), "text"), "invalid_event"),
        (body(event(), None), "invalid_event"),
        (numbered(2_501), "too_many_events"),
        (body(event("a"), sized(32_769)), "event_too_large"),
        (padded(500_001), "body_too_large"),
        (padded(5_000_000), "body_too_large"),
    ],
)
def test_a_body_that_breaks_the_api_is_refused_whether_strict_or_not(data: bytes, code: str) -> None:
    for strict in (True, False):
        with Receiver(strict=strict) as receiver:
            status, answer, _ = post(receiver, data)
            assert (status, answer["code"]) == (400, code)
            assert isinstance(answer["message"], str)
            assert not receiver.requests[0].taken
            assert receiver.events == []
            assert receiver.errors == ()


@pytest.mark.parametrize(
    "data",
    [
        b" \r\n\t" + json.dumps(json.loads(body()), indent=2).encode() + b"\n",
        numbered(2_500),
        body(event("a"), sized(32_768)),
        padded(500_000),
        body(event(properties={"deep": [[{"a": None, "": []}]]}), other={}),
        body().replace(b'"E"', '"é 漢字"'.encode()),
        body().replace(b'"E"', b'"\\ud83d\\ude00"'),
    ],
)
def test_a_body_at_the_limits_is_taken(receiver: Receiver, data: bytes) -> None:
    assert post(receiver, data)[:2] == (200, {"success": True})
    assert receiver.events == json.loads(data)["batch"]


def test_an_event_is_measured_in_the_bytes_that_were_sent(receiver: Receiver) -> None:
    def sent(character: str, bytes_of_event: int) -> bytes:
        """The same event, its text either escaped, six bytes a character, or in UTF-8, three bytes."""
        room = bytes_of_event - len(json.dumps(event(filler="")))
        text = character * (room // len(character.encode())) + "x" * (room % len(character.encode()))
        return body(event(filler="?")).replace(b'"?"', f'"{text}"'.encode())

    for character in ("漢", "\\u6f22"):
        assert post(receiver, sent(character, 32_768))[0] == 200
        assert post(receiver, sent(character, 32_769))[1]["code"] == "event_too_large"


@pytest.mark.parametrize(
    "data",
    [
        b"no gzip",
        gzip.compress(body())[:-9],
        gzip.compress(body())[:-8] + b"\0" * 8,
        gzip.compress(body())[:10] + b"\xff" * 50,
    ],
)
def test_bad_gzip_is_refused(receiver: Receiver, data: bytes) -> None:
    status, answer, _ = post(receiver, data, Content_Encoding="gzip")
    assert (status, answer["code"]) == (400, "invalid_gzip")
    assert receiver.requests[0].body == data


def test_the_size_is_that_after_gunzip(receiver: Receiver) -> None:
    assert post(receiver, gzip.compress(padded(500_001)), Content_Encoding="gzip")[1]["code"] == "body_too_large"
    assert post(receiver, gzip.compress(padded(500_000)), Content_Encoding="gzip")[0] == 200
    stored = gzip.compress(padded(500_000), compresslevel=0)
    assert len(stored) > 500_000
    assert post(receiver, stored, Content_Encoding="gzip")[0] == 200
    bomb = gzip.compress(b" " * 50_000_000)
    assert post(receiver, bomb, Content_Encoding="gzip")[1]["code"] == "body_too_large"


def test_a_huge_body_is_read_and_refused_without_being_kept(receiver: Receiver) -> None:
    with connect(receiver) as connection:
        connection.request("POST", "/v1/batch", b" " * 20_000_000, HEADERS)
        opened = connection.sock
        assert connection.getresponse().read().startswith(b'{"code": "body_too_large"')
        connection.request("POST", "/v1/batch", body(), HEADERS)
        assert connection.getresponse().status == 200
        assert connection.sock is opened  # the discarded body did not upset the connection
    assert receiver.requests[0].body == b""


@pytest.mark.parametrize("kind", [None, "text/plain", "application/jsonp"])
def test_another_content_type_is_refused(receiver: Receiver, kind: str | None) -> None:
    status, answer, _ = post(receiver, Content_Type=kind)
    assert (status, answer["code"]) == (400, "invalid_content_type")
    assert post(receiver, Content_Type="Application/JSON; charset=utf-8")[0] == 200


def test_another_content_encoding_is_refused(receiver: Receiver) -> None:
    assert post(receiver, Content_Encoding="br")[1]["code"] == "invalid_encoding"
    assert post(receiver, Content_Encoding="identity")[0] == 200


@pytest.mark.parametrize(
    ("head", "rest", "status"),
    [
        ("", b"", 411),
        ("Transfer-Encoding: chunked\r\n", b"2\r\n{}\r\n0\r\n\r\n" * 20_000, 411),
        ("Content-Length: 2\r\nTransfer-Encoding: chunked\r\n", b"{}", 411),
        ("Content-Length: -1\r\n", b"{}", 400),
        ("Content-Length: 1_0\r\n", b"{}", 400),
        ("Content-Length: " + "9" * 30 + "\r\n", b"{}", 400),
    ],
)
def test_a_body_without_a_known_end_is_refused_and_the_answer_arrives(
    receiver: Receiver, head: str, rest: bytes, status: int
) -> None:
    with raw(receiver) as connection:
        connection.sendall(f"POST /v1/batch HTTP/1.1\r\nHost: x\r\n{head}\r\n".encode() + rest)
        answer = read_to_end(connection)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"Connection: close" in answer
    assert receiver.requests[0].status == status


def test_who_goes_on_sending_after_a_refusal_is_not_cut_off(receiver: Receiver) -> None:
    with raw(receiver) as connection:
        connection.sendall(b"POST /v1/batch HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert read_to_end(connection).startswith(b"HTTP/1.1 411 ")
        for _ in range(3):
            connection.sendall(b"3e8\r\n" + b"x" * 1000 + b"\r\n")


def test_an_identity_body_is_too_large_by_its_length_alone() -> None:
    for encoding, length, code in (
        ("identity", 500_000, None),
        ("identity", 500_001, "body_too_large"),
        ("gzip", 500_001, None),
        ("gzip", 1_000_001, "body_too_large"),
    ):
        known, problem = framing("POST", Headers({"Content-Encoding": encoding, "Content-Length": f"{length}"}.items()))
        assert (known, problem and problem.code) == (length, code)


def test_headers_are_looked_up_in_any_case_and_repeated_ones_are_joined() -> None:
    headers = Headers([("X-One", "1"), ("x-two", "2"), ("x-ONE", "3")])
    assert (headers["X-ONE"], headers.get("x-Two"), list(headers)) == ("1, 3", "2", ["x-one", "x-two"])
    assert "X-Three" not in headers
    with pytest.raises(KeyError):
        _ = headers["X-Three"]


@pytest.mark.parametrize(("method", "status"), [("HEAD", 405), ("POST", 204), ("POST", 304)])
def test_an_answer_that_has_no_body_is_followed_by_the_next_one(receiver: Receiver, method: str, status: int) -> None:
    receiver.script(Answer(status, body=b"not to be sent"))
    with raw(receiver) as connection:
        first = f"{method} /v1/batch HTTP/1.1\r\nContent-Length: 0\r\n\r\n"
        connection.sendall(f"{first}GET / HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
        head, _, rest = read_to_end(connection).partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert rest.startswith(b"HTTP/1.1 405 ")


def test_too_long_a_request_line_is_refused(receiver: Receiver) -> None:
    with raw(receiver) as connection:
        connection.sendall(b"GET /" + b"x" * 65_532)  # as much as is read of it: nothing is left that could reset
        assert read_to_end(connection).startswith(b"HTTP/1.1 414 ")


def test_expect_continue_is_answered(receiver: Receiver) -> None:
    with raw(receiver) as connection:
        head = f"POST /v1/batch HTTP/1.1\r\nAuthorization: {basic('key')}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body())}\r\nExpect: 100-continue\r\n\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
        connection.sendall(body())
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


# --- what is refused only if strict


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (body(event(messageId=None)), "invalid_message_id"),
        (body(event(messageId="")), "invalid_message_id"),
        (body(event(messageId=7)), "invalid_message_id"),
        (body(event(messageId=["x"])), "invalid_message_id"),
        (body(event(messageId="x" * 101)), "invalid_message_id"),
        (body(event(userId=None)), "missing_id"),
        (body(event(userId="", anonymousId="")), "missing_id"),
        (body(event(userId=7)), "missing_id"),
        (body(event(type="group")), "missing_id"),
        (body(event(type="group", groupId="")), "missing_id"),
        (body(event(type="alias")), "missing_id"),
        (body(event(type="alias", previousId="p", userId=None, anonymousId="a")), "missing_id"),
        *((body(event(**{name: []})), "invalid_event") for name in ("traits", "properties", "context", "integrations")),
        (body(event(type=None)), "invalid_type"),
        (body(event(type="Track")), "invalid_type"),
        (body(event(type=["track"])), "invalid_type"),
        (body(event(event=None)), "missing_event_name"),
        (body(event(event="")), "missing_event_name"),
        (body(event(event=7)), "missing_event_name"),
        (body(event(timestamp=None)), "invalid_timestamp"),
        (body(event(timestamp=1)), "invalid_timestamp"),
        (body(event(timestamp="2025-06-01T12:00:00")), "invalid_timestamp"),
        (body(event(timestamp="2025-06-01 12:00:00Z")), "invalid_timestamp"),
        (body(event(timestamp="2025-02-30T12:00:00Z")), "invalid_timestamp"),
        (body(event(timestamp="2025-06-01T12:00:00+24:00")), "invalid_timestamp"),
        (body(event(timestamp="2025-06-01T12:00:00Z\n")), "invalid_timestamp"),
        (body(event(timestamp="2025-06-01T12:00:00.\u0661Z")), "invalid_timestamp"),
        (body(sentAt=None), "invalid_sent_at"),
        (body(sentAt="now"), "invalid_sent_at"),
        (body(event(event="\ud800")), "invalid_text"),
    ],
)
def test_what_segment_takes_and_drops_is_refused_if_strict(data: bytes, code: str) -> None:
    with Receiver() as receiver:
        status, answer, _ = post(receiver, data)
        assert (status, answer["code"]) == (400, code)
        assert receiver.batches[0].problem is not None
    with Receiver(strict=False) as receiver:
        assert post(receiver, data)[0] == 200
        assert receiver.unique == receiver.events == json.loads(data)["batch"]


@pytest.mark.parametrize(
    "sound",
    [
        event(messageId="x" * 100),
        event(userId=None, anonymousId="a"),
        event(timestamp="2025-06-01T12:00:00Z"),
        event(timestamp="2025-06-01T12:00:00.123456+05:30"),
        event(timestamp="2025-06-01T12:00:00-0500"),
        *(event(type=kind, event=None) for kind in ("identify", "page", "screen")),
        event(type="group", event=None, groupId="g"),
        event(type="alias", event=None, previousId="p"),
    ],
)
def test_what_is_just_right_is_taken_though_strict(receiver: Receiver, sound: dict[str, Any]) -> None:
    assert post(receiver, body(sound))[:2] == (200, {"success": True})


# --- who may send


@pytest.mark.parametrize(
    ("header", "kind"),
    [
        (None, "none"),
        ("Basic", "basic"),
        ("Basic !!!", "basic"),
        (HEADERS["Authorization"].replace("V", "V!"), "basic"),
        ("Basic " + base64.b64encode(b"key").decode(), "basic"),
        ("Basic " + base64.b64encode(b"\xff:").decode(), "basic"),
        (basic("key", "password"), "basic"),
        (basic(""), "basic"),
        (basic("other"), "basic"),
        ("Bearer key", "bearer"),
        ("Digest key", "other"),
    ],
)
@pytest.mark.parametrize("write_key", ["key", None])
def test_wrong_credentials_are_refused(header: str | None, kind: str, write_key: str | None) -> None:
    with Receiver(write_key=write_key) as receiver:
        status, answer, headers = post(receiver, Authorization=header)
        assert (status, answer["code"]) == (401, "unauthorized")
        assert headers["WWW-Authenticate"].startswith("Basic ")
        (batch,) = receiver.batches
        assert (batch.authorization, batch.taken, receiver.events) == (kind, False, [])
        assert post(receiver)[0] == 200


def test_the_body_must_name_the_same_write_key() -> None:
    with Receiver() as receiver:
        assert post(receiver, body(writeKey="other"))[0] == 401
        assert post(receiver, body(writeKey="other"), Authorization=basic("other"))[0] == 200
    with Receiver(write_key="key") as receiver:
        assert post(receiver, body(writeKey=None))[0] == 401
        assert post(receiver, body(writeKey="other"), Authorization=basic("other"))[0] == 401
    with Receiver(strict=False) as receiver:
        assert post(receiver, body(writeKey="other"))[0] == 401
        assert post(receiver, body(writeKey=None))[0] == 401
    with Receiver(write_key="key", strict=False) as receiver:
        assert post(receiver, body(writeKey=None))[0] == 200


# --- faults


def test_a_script_is_used_up_one_entry_a_request_then_comes_what_is_always(receiver: Receiver) -> None:
    receiver.script(Answer(500), Honest())
    receiver.script(Answer(503))
    receiver.always(Answer(429))
    assert [post(receiver, body(event(str(n))))[0] for n in range(5)] == [500, 200, 503, 429, 429]
    receiver.always(None)
    assert post(receiver, body(event("5")))[0] == 200
    assert [one["messageId"] for one in receiver.events] == ["1", "5"]
    assert [batch.status for batch in receiver.batches] == [500, 200, 503, 429, 429, 200]


def test_only_batch_requests_use_up_the_script(receiver: Receiver) -> None:
    receiver.script(Answer(503))
    assert [post(receiver, path="/x")[0], post(receiver, method="GET")[0], post(receiver)[0]] == [404, 405, 503]


def test_an_answer_is_sent_as_given(receiver: Receiver) -> None:
    receiver.script(
        Answer(429, {"Retry-After": "7"}),
        Answer(200, {"content-type": "text/html"}, "<html>é"),
        Answer(460, body={"code": "odd"}),
        Answer(204),
        Answer(502, body=b"\xff"),
    )
    status, content, headers = post(receiver)
    assert (status, content, headers["Retry-After"]) == (429, b"", "7")
    status, content, headers = post(receiver)
    assert (status, content, headers.get_all("Content-Type")) == (200, "<html>é".encode(), ["text/html"])
    assert post(receiver)[:2] == (460, {"code": "odd"})
    status, content, headers = post(receiver)
    assert (status, content, headers["Content-Length"]) == (204, b"", None)
    assert post(receiver)[:2] == (502, b"\xff")
    assert [batch.taken for batch in receiver.batches] == [False, True, False, True, False]


@pytest.mark.parametrize(("status", "taken"), [(200, False), (503, True)])
def test_whether_the_events_were_taken_may_be_another_thing_than_the_status(
    receiver: Receiver, status: int, taken: bool
) -> None:
    receiver.script(Answer(status, taken=taken))
    assert post(receiver)[0] == status
    assert len(receiver.events) == taken


def test_a_copy_of_an_answer_with_another_status_is_taken_as_that_says() -> None:
    answer = Answer(200)
    assert (answer.is_taken, dataclasses.replace(answer, status=503).is_taken) == (True, False)


def test_an_answer_can_close_the_connection(receiver: Receiver) -> None:
    receiver.script(Answer(503, {"Connection": "close"}))
    with sending(receiver) as connection:
        assert read_to_end(connection).startswith(b"HTTP/1.1 503 ")


def test_an_error_can_be_answered_to_events_that_were_taken(receiver: Receiver) -> None:
    receiver.script(Answer(500, taken=True))
    assert post(receiver)[0] == 500
    assert (receiver.batches[0].status, receiver.batches[0].taken) == (500, True)
    assert post(receiver)[0] == 200
    assert (len(receiver.unique), receiver.duplicates) == (1, 1)


def test_a_fault_never_takes_what_breaks_a_rule(receiver: Receiver) -> None:
    receiver.script(Answer(200, taken=True), Answer(200, taken=True), Drop(after=True))
    assert post(receiver, body(event(type="nonsense")))[0] == 200
    assert post(receiver, Authorization="Bearer x")[0] == 200
    with sending(receiver, b"{}") as connection, pytest.raises(ConnectionResetError):
        connection.recv(1)
    assert [request.problem and request.problem.code for request in receiver.requests] == [
        "invalid_type",
        "unauthorized",
        "invalid_batch",
    ]
    assert [request.taken for request in receiver.requests] == [False] * 3
    assert receiver.events == []


def test_a_redirect_that_is_followed_is_seen(receiver: Receiver) -> None:
    receiver.script(Answer(302, {"Location": f"{receiver.url}/v1/batch"}))
    status, _, headers = post(receiver)
    assert status == 302
    assert post(receiver, b"", method="GET", path=headers["Location"].removeprefix(receiver.url))[0] == 405
    assert [(one.method, one.status) for one in receiver.requests] == [("POST", 302), ("GET", 405)]


@pytest.mark.parametrize("after", [False, True])
def test_drop_resets_the_connection(receiver: Receiver, after: bool) -> None:
    receiver.script(Drop(after=after))
    with sending(receiver) as connection, pytest.raises(ConnectionResetError):
        connection.recv(1)
    (batch,) = receiver.batches
    assert (batch.status, batch.taken, len(receiver.events)) == (None, after, int(after))


@pytest.mark.parametrize("taken", [False, True])
def test_half_an_answer_ends_in_its_body(receiver: Receiver, taken: bool) -> None:
    receiver.script(HalfAnswer(taken=taken))
    with pytest.raises(http.client.IncompleteRead) as caught:
        post(receiver)
    assert caught.value.partial == b'{"succes'
    (batch,) = receiver.batches
    assert (batch.status, batch.taken, len(receiver.events)) == (None, taken, int(taken))


@pytest.mark.parametrize("taken", [False, True])
def test_a_hang_lasts_until_it_is_released(receiver: Receiver, taken: bool) -> None:
    receiver.script(Hang(taken=taken))
    with sending(receiver) as connection:
        assert receiver.wait_for(lambda seen: any(batch.taken == taken for batch in seen.batches), SECONDS)
        assert is_silent(connection)
        assert (receiver.batches[0].status, len(receiver.events)) == (None, int(taken))
        receiver.release()
        assert read_to_end(connection) == b""
    assert post(receiver)[0] == 200


def test_a_release_is_for_the_requests_that_have_arrived(receiver: Receiver) -> None:
    receiver.script(Hang(), Hang())
    with sending(receiver) as first:
        assert receiver.wait_for(lambda seen: len(seen.requests) == 1, SECONDS)
        receiver.release()
        assert read_to_end(first) == b""
    with sending(receiver) as second:
        assert receiver.wait_for(lambda seen: len(seen.requests) == 2, SECONDS)
        assert is_silent(second)


def test_a_hang_can_end_by_itself(receiver: Receiver) -> None:
    receiver.script(Hang(0.05))
    begun = time.monotonic()
    with sending(receiver) as connection:
        assert read_to_end(connection) == b""
    assert time.monotonic() - begun >= 0.05


def test_a_delay_is_followed_by_the_honest_answer_or_by_another_fault(receiver: Receiver) -> None:
    receiver.script(Delay(0.05), Delay(0, Delay(0.05, Answer(503))))
    for status in (200, 503):
        begun = time.monotonic()
        assert post(receiver)[0] == status
        assert time.monotonic() - begun >= 0.05
    assert len(receiver.events) == 1


def test_a_delayed_batch_is_taken_after_the_wait_which_release_ends(receiver: Receiver) -> None:
    receiver.script(Delay(600))
    with sending(receiver) as connection:
        assert receiver.wait_for(lambda seen: len(seen.requests) == 1, SECONDS)
        assert is_silent(connection)
        assert receiver.events == []
        receiver.release()
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
    assert len(receiver.events) == 1


def test_a_poison_event_has_its_whole_batch_refused(receiver: Receiver) -> None:
    receiver.always(Refuse(lambda one: one["event"] == "bad", code="poison", message="no"))
    bad = event("b", event="bad")
    assert post(receiver, body(event("a"), bad))[:2] == (400, {"code": "poison", "message": "no"})
    assert post(receiver, body(event("a")))[0] == 200
    assert post(receiver, b"{}")[1]["code"] == "invalid_batch"
    assert post(receiver, body(bad), Authorization=basic("other"))[1]["code"] == "unauthorized"
    assert [one["messageId"] for one in receiver.events] == ["a"]
    assert (receiver.batches[0].status, receiver.batches[0].problem) == (400, None)


def test_an_error_in_a_test_s_own_predicate_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    with Receiver() as receiver:
        receiver.script(Refuse(lambda one: bool(one["absent"])))
        assert post(receiver)[0] == 500
        assert [type(error) for error in receiver.errors] == [KeyError]
        assert (receiver.batches[0].status, receiver.events) == (500, [])
        receiver.clear()
        assert receiver.errors == ()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Answer(99),
        lambda: Answer(100),
        lambda: Answer(1000),
        lambda: Answer(200, {"X": "a\r\nb"}),
        lambda: Answer(200, {"X": "漢"}),
        lambda: Answer(200, body={1, 2}),
        lambda: Hang(-1),
        lambda: Delay(float("nan")),
        lambda: Delay(1, "soon"),  # type: ignore[arg-type]
        lambda: Receiver().script(503),  # type: ignore[arg-type]
        lambda: Receiver().always("bad"),  # type: ignore[arg-type]
        lambda: Receiver().token_script(Delay(1, Refuse(bool))),
    ],
)
def test_a_fault_that_makes_no_sense_is_an_error_in_the_test_itself(make: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        make()


# --- start and stop


def test_a_receiver_comes_back_on_the_same_port_with_all_it_had() -> None:
    receiver = Receiver()
    with pytest.raises(RuntimeError):
        _ = receiver.url
    for attempt in range(3):
        assert receiver.start() is receiver.start()
        assert post(receiver, body(event(str(attempt))))[0] == 200
        url = receiver.url
        receiver.stop()
        receiver.stop()
        assert receiver.url == url
        with pytest.raises(ConnectionRefusedError):
            post(receiver)
    assert len(receiver.events) == 3


def test_stop_ends_idle_connections_and_hangs_and_its_threads() -> None:
    before = set(threading.enumerate())
    receiver = Receiver().start()
    receiver.script(Hang(), Delay(600), Answer(200))
    with sending(receiver) as hanging, sending(receiver) as delayed, sending(receiver) as idle, raw(receiver) as half:
        half.sendall(b"POST /v1/batch HTTP/1.1\r\nContent-Length: 100\r\n\r\nhalf of it")
        assert receiver.wait_for(lambda seen: len(seen.requests) == 3, SECONDS)
        answered = next(
            one
            for one in (hanging, delayed, idle)
            if one in select.select([hanging, delayed, idle], [], [], SECONDS)[0]
        )
        assert answered.recv(1000).startswith(b"HTTP/1.1 200 ")
        begun = time.monotonic()
        receiver.stop()
        assert time.monotonic() - begun < SECONDS / 2
        assert set(threading.enumerate()) <= before
        for connection in (hanging, delayed, idle):
            assert read_to_end(connection) == b""
        with contextlib.suppress(ConnectionResetError):
            assert read_to_end(half) == b""
    assert len(receiver.events) == 1
    assert len(receiver.requests) == 3


def test_a_request_that_a_stopped_receiver_delayed_is_answered_when_it_is_sent_again() -> None:
    with Receiver() as receiver:
        receiver.script(Delay(600))
        with sending(receiver) as connection:
            assert receiver.wait_for(lambda seen: len(seen.requests) == 1, SECONDS)
            receiver.stop()
            assert read_to_end(connection) == b""
        receiver.start()
        assert post(receiver)[0] == 200
        assert (len(receiver.events), receiver.duplicates) == (1, 0)


def test_a_port_that_is_taken_is_an_error() -> None:
    with Receiver() as receiver:
        other = Receiver(port=int(receiver.url.rpartition(":")[2]))
        with pytest.raises(OSError):
            other.start()
        other.stop()


def test_a_forked_child_neither_stops_the_receiver_nor_keeps_its_port_open() -> None:
    with Receiver() as receiver, connect(receiver) as connection:
        connection.request("POST", "/v1/batch", body(event("a")), HEADERS)
        assert connection.getresponse().read()
        told, tell = os.pipe()
        child = fork()
        if child == 0:
            status = 1
            try:
                os.close(tell)
                os.read(told, 1)  # until the parent is done
                receiver.stop()
                status = 0
            finally:
                os._exit(status)
        try:
            receiver.stop()
            with pytest.raises(ConnectionRefusedError):
                post(receiver)
            receiver.start()
            assert post(receiver, body(event("b")))[0] == 200
        finally:
            os.close(told)
            os.close(tell)
            assert os.waitpid(child, 0)[1] == 0
        assert post(receiver, body(event("c")))[0] == 200


def test_a_child_that_stops_its_copy_leaves_the_parent_s_connections_alone() -> None:
    with Receiver() as receiver, connect(receiver) as connection:
        connection.request("POST", "/v1/batch", body(event("a")), HEADERS)
        assert connection.getresponse().read()
        opened = connection.sock
        child = fork()
        if child == 0:
            try:
                receiver.stop()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        connection.request("POST", "/v1/batch", body(event("b")), HEADERS)
        assert connection.getresponse().read() == b'{"success": true}'
        assert connection.sock is opened


def fork() -> int:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads, which is the point here
        return os.fork()


# --- hostile senders


def test_hostile_senders_leave_no_trace_on_stderr(receiver: Receiver, capfd: pytest.CaptureFixture[str]) -> None:
    for data in (
        b"",
        b"\r\n",
        b"\x16\x03\x01\x00",
        b"POST\r\n\r\n",
        b"POST /v1/batch HTTP/9.9\r\n\r\n",
        b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"POST /v1/batch HTTP/1.1\r\nContent-Length: 100\r\n\r\nshort",
        b"POST /v1/batch HTTP/1.1\r\nContent-Length: 600000\r\n\r\nshort",
        b"POST /v1/batch HTTP/1.1\r\nAuthorization: \xff\xfe\r\nContent-Length: 2\r\n\r\n{}",
        b"POST http://[ HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}",
    ):
        for end in ("orderly", "reset"):
            with raw(receiver) as connection, contextlib.suppress(ConnectionError):
                connection.sendall(data)
                if end == "reset":
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                else:
                    connection.shutdown(socket.SHUT_WR)
                    read_to_end(connection)
    assert post(receiver)[0] == 200
    receiver.stop()
    assert receiver.errors == ()
    assert capfd.readouterr() == ("", "")
    assert all(isinstance(request, Batch) == request.taken for request in receiver.requests)


def test_a_cut_request_did_not_arrive_and_uses_up_no_script(receiver: Receiver) -> None:
    receiver.script(Answer(503))
    with raw(receiver) as connection:
        connection.sendall(b"POST /v1/batch HTTP/1.1\r\nContent-Length: 100\r\n\r\nshort")
        connection.shutdown(socket.SHUT_WR)
        assert read_to_end(connection) == b""
    assert receiver.requests == ()
    assert post(receiver)[0] == 503


# --- the package


def test_all_is_sorted_complete_and_loads() -> None:
    assert testing.__all__ == sorted(testing.__all__)
    assert {name for names in testing._MODULES.values() for name in names} == set(testing.__all__)
    for name in testing.__all__:
        assert getattr(testing, name) is not None
        assert name in dir(testing)
    with pytest.raises(AttributeError):
        _ = testing.Reciever


def test_the_package_and_its_plugin_import_next_to_nothing() -> None:
    root = str(Path(testing.__file__).parent.parent)
    # The parent package is none of this test's business: an empty one stands in for it.
    program = f"""
import sys, types
parent = sys.modules["segment_durable"] = types.ModuleType("segment_durable")
parent.__path__ = [{root!r}]
import segment_durable.testing, segment_durable.testing.pytest_plugin
print(*(name for name in sys.modules if name.split(".")[0] in {{"segment_durable", "http", "jwt", "cryptography"}}))
from segment_durable.testing import Receiver
print(*(name for name in sys.modules if name.split(".")[0] in {{"jwt", "cryptography", "requests"}}))
print(*(name for name in sys.modules if name.startswith("segment_durable.") and ".testing" not in name))
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    started, with_receiver, outside = done.stdout.splitlines()
    ours = {"segment_durable", "segment_durable.testing", "segment_durable.testing.pytest_plugin"}
    assert set(started.split()) - {"http", "http.client"} == ours
    assert (with_receiver, outside) == ("", "")


def test_the_plugin_gives_a_started_receiver(tmp_path: Path) -> None:
    (tmp_path / "test_user.py").write_text(
        "import socket\n"
        "def test_fixture(segment_receiver):\n"
        "    host, port = segment_receiver.url.removeprefix('http://').split(':')\n"
        "    socket.create_connection((host, int(port)), 5).close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "segment_durable.testing.pytest_plugin", "."],
        cwd=tmp_path,
        env=os.environ
        | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(Path(testing.__file__).parent.parent.parent)},
        capture_output=True,
        text=True,
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_a_receiver_that_is_healed_answers_as_always(receiver: Receiver) -> None:
    receiver.script(Answer(503), Hang())
    receiver.heal()
    assert post(receiver)[0] == 200
    assert len(receiver.unique) == 1
