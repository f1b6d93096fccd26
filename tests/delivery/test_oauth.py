"""OAuth: the token is fetched when it is needed, and nothing that goes wrong there costs an event or shows a secret."""

from __future__ import annotations

import json
import logging
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from segment_durable import Client
from segment_durable.config import Config
from segment_durable.delivery import Delivery
from segment_durable.errors import ConfigError, DeliveryError
from segment_durable.oauth import Tokens
from segment_durable.outbox import Outbox
from segment_durable.testing import Answer, Drop, HalfAnswer, Hang, OAuthApp, Receiver
from segment_durable.testing.clock import FakeClock
from segment_durable.testing.scripted import Post, Reply, ScriptedTransport
from segment_durable.transport import RequestsTransport, Response, TransportError
from segment_durable.upload import TokenRefused, Uploader

from .conftest import Reports

KEY = "a-write-key-of-tests"
PEM = serialization.Encoding.PEM
PKCS8 = serialization.PrivateFormat.PKCS8
PLAIN = serialization.NoEncryption()


@pytest.fixture(scope="module")
def pair() -> tuple[bytes, str]:
    """The public and the private key of all tests here: making one takes long."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    public = key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return public, key.private_bytes(PEM, PKCS8, PLAIN).decode()


class World:
    """A receiver with its token endpoint and a sender, both on one clock that stands still."""

    def __init__(self, folder: Path, pair: tuple[bytes, str], **options: Any) -> None:
        self.clock = FakeClock()
        self.app = OAuthApp("app", "kid-1", pair[0], clock=self.clock.time, **options)
        self.receiver = Receiver(oauth=self.app, write_key=KEY).start()
        self.settings: dict[str, Any] = {
            "write_key": KEY,
            "host": self.receiver.url,
            "timeout": 5,
            "oauth_client_id": "app",
            "oauth_key_id": "kid-1",
            "oauth_client_key": pair[1],
            "oauth_auth_server": self.receiver.url,
        }
        self.outbox = Outbox(folder, self.clock, write_key=KEY)
        self.reports = Reports()
        self.made: list[Delivery] = []
        self.tokens = Tokens(self.config(), self.clock)
        self._number = 0

    def config(self, **settings: Any) -> Config:
        return Config(**{**self.settings, **settings})

    def put(self, count: int = 1) -> None:
        for _ in range(count):
            self._number += 1
            event = {
                "type": "track",
                "event": "Signed Up",
                "userId": "u",
                "messageId": str(self._number),
                "timestamp": "2025-06-01T12:00:00Z",
            }
            self.outbox.put(json.dumps(event).encode(), int(self.clock.time() * 1000))

    def sender(self, **settings: Any) -> Delivery:
        """A delivery; with `settings` it has tokens of its own."""
        config = self.config(**settings)
        tokens = Tokens(config, self.clock) if settings else self.tokens
        uploader = Uploader(config, RequestsTransport(config.proxies), tokens, self.clock)
        self.made.append(Delivery(self.outbox, uploader, config, self.clock, lambda: 0.5, self.reports))
        return self.made[-1]

    def close(self) -> None:
        for delivery in self.made:
            delivery.close()
        self.outbox.close()
        self.receiver.stop()


@pytest.fixture
def world(tmp_path: Path, pair: tuple[bytes, str]) -> Iterator[World]:
    world = World(tmp_path / "outbox", pair)
    yield world
    assert world.outbox.stats().balanced
    world.close()
    assert not world.receiver.errors


# -- the life of a token


def test_a_token_is_fetched_once_and_used_for_all_batches(world: World) -> None:
    sender = world.sender()
    for _ in range(5):
        world.put(3)
        assert sender.step().kind == "delivered"
    assert world.app.token_requests == 1
    assert len({batch.headers["Authorization"] for batch in world.receiver.batches}) == 1
    assert {batch.authorization for batch in world.receiver.batches} == {"bearer"}
    assert len(world.receiver.unique) == 15


@pytest.mark.parametrize(("life", "early"), [(3600.0, 60.0), (50.0, 25.0)])
def test_a_token_is_replaced_before_it_expires(world: World, life: float, early: float) -> None:
    world.app.token_lifetime = life
    sender = world.sender()
    requests = 0
    for wait in (0.0, life - early - 0.5, 1.0, life - early - 0.5, 1.0):
        requests += wait != life - early - 0.5
        world.clock.advance(wait)
        world.put()
        assert sender.step().kind == "delivered"
        assert world.app.token_requests == requests
    assert [batch.status for batch in world.receiver.batches] == [200] * 5


def test_a_jump_of_the_wall_clock_does_not_prolong_a_token(world: World) -> None:
    world.tokens.token(RequestsTransport(), 5)
    world.clock.jump(-86_400)
    world.clock.advance(3600)
    transport = RequestsTransport()
    world.tokens.token(transport, 5)
    transport.close()
    assert world.app.token_requests == 2


def test_eight_threads_that_need_a_token_make_one_request(world: World) -> None:
    gate, inside = threading.Event(), threading.Barrier(8)
    requests: list[Post] = []

    def answer(post: Post) -> Reply:
        requests.append(post)
        assert gate.wait(10)
        return Response(200, {}, b'{"access_token":"the-token","expires_in":3600}')

    def ask() -> str:
        inside.wait(10)
        return world.tokens.token(ScriptedTransport(answer), 5)

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask) for _ in range(8)]
        gate.set()
        assert [each.result(10) for each in asked] == ["the-token"] * 8
    assert len(requests) == 1


def test_a_thread_waits_only_so_long_for_another_threads_token(world: World) -> None:
    started, gate = threading.Event(), threading.Event()

    def hang(_: Post) -> Reply:
        started.set()
        gate.wait(10)
        return Response(200, {}, b'{"access_token":"the-token"}')

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(world.tokens.token, ScriptedTransport(hang), 0.01)
        assert started.wait(10)
        with pytest.raises(TokenRefused):
            world.tokens.token(ScriptedTransport(), 0.01)
        gate.set()
        assert first.result(10) == "the-token"


def test_dropping_a_token_that_was_replaced_keeps_the_new_one(world: World) -> None:
    answers = [Response(200, {}, b'{"access_token":"%d"}' % number) for number in range(3)]
    transport = ScriptedTransport(answers)
    old = world.tokens.token(transport, 5)
    world.tokens.invalidate(old)
    new = world.tokens.token(transport, 5)
    world.tokens.invalidate(old)
    assert world.tokens.token(transport, 5) == new != old


@pytest.mark.parametrize("status", [401, 403, 511])
def test_a_refused_token_is_replaced_and_the_batch_tried_once_more_at_once(world: World, status: int) -> None:
    sender = world.sender()
    world.put(2)
    sender.step()
    world.receiver.script(Answer(status))
    world.put(2)
    assert sender.step().kind == "delivered"
    assert world.app.token_requests == 2
    first, refused, accepted = world.receiver.batches
    assert refused.headers["Authorization"] == first.headers["Authorization"] != accepted.headers["Authorization"]
    assert accepted.headers["X-Retry-Count"] == "1"
    assert (len(world.receiver.events), world.reports.failures) == (4, [])


def test_a_second_refusal_is_the_end_of_the_attempt(world: World) -> None:
    sender = world.sender()
    world.receiver.always(Answer(401))
    world.put(2)
    step = sender.step()
    assert (step.kind, step.exhausted, len(world.receiver.batches), world.app.token_requests) == ("failed", True, 2, 2)
    assert step.seconds is not None
    assert step.seconds >= 30
    assert world.outbox.stats().pending == 2
    ((error, told),) = world.reports.failures
    assert isinstance(error, DeliveryError)
    assert (error.status, told) == (401, [1, 2])


def test_tokens_that_are_revoked_mid_way_cost_nothing(world: World) -> None:
    sender = world.sender()
    for number in range(6):
        world.put(2)
        if number % 2:
            world.app.revoke_all()
        assert sender.step().kind == "delivered"
    assert (len(world.receiver.events), world.receiver.duplicates, world.app.token_requests) == (12, 0, 4)
    assert world.reports.failures == []


def test_a_token_that_expired_while_the_machine_was_off_is_replaced(world: World) -> None:
    sender = world.sender()
    world.put()
    sender.step()
    world.clock.jump(7200)  # the receiver's clock went on, the boot clock did not
    world.put()
    assert sender.step().kind == "delivered"
    assert [batch.status for batch in world.receiver.batches] == [200, 401, 200]


# -- wrong credentials


@pytest.fixture(scope="module")
def other_key() -> str:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return key.private_bytes(PEM, PKCS8, PLAIN).decode()


@pytest.mark.parametrize("wrong", ["key", "kid", "client id", "scope"])
def test_wrong_credentials_are_reported_and_keep_the_events(world: World, other_key: str, wrong: str) -> None:
    settings = {
        "key": {"oauth_client_key": other_key},
        "kid": {"oauth_key_id": "another"},
        "client id": {"oauth_client_id": "another"},
        "scope": {"oauth_scope": "public_api:read"},
    }[wrong]
    sender = world.sender(**settings)
    world.put(3)
    step = sender.step()
    assert (step.kind, step.exhausted) == ("failed", True)
    assert step.seconds is not None
    assert step.seconds >= 30
    stats = world.outbox.stats()
    assert (stats.pending, stats.leased, stats.dead) == (3, 0, 0)
    ((error, told),) = world.reports.failures
    assert isinstance(error, DeliveryError)
    assert error.status in (400, 401)
    assert error.message.startswith("no OAuth token")
    assert told == [1, 2, 3]
    assert world.receiver.batches == ()
    assert world.sender().step(hurry=True).kind == "delivered"


def test_with_wrong_credentials_flush_is_false_and_on_error_is_called(
    pair: tuple[bytes, str], other_key: str, tmp_path: Path
) -> None:
    errors: list[Exception] = []
    app = OAuthApp("app", "kid-1", pair[0])
    with Receiver(oauth=app) as receiver:
        client = Client(
            KEY,
            host=receiver.url,
            outbox_dir=tmp_path / "outbox",
            oauth_client_id="app",
            oauth_key_id="kid-1",
            oauth_client_key=other_key,
            oauth_auth_server=receiver.url,
            on_error=lambda error, items: errors.append(error),
        )
        client.track("user", "Signed Up")
        assert not client.flush(20.0)
        assert client.stats().pending == 1
        assert [type(error) for error in errors] == [DeliveryError]
        assert not client.shutdown(0)
        assert receiver.batches == ()


# -- a token endpoint in trouble


@pytest.mark.parametrize("status", [429, 503, 500])
def test_a_rate_limit_of_the_token_endpoint_is_honoured_and_shared(world: World, status: int) -> None:
    world.receiver.token_script(Answer(status, {"X-RateLimit-Reset": "40"}))
    world.put(2)
    step = world.sender().step()
    assert (step.kind, step.seconds, step.exhausted) == ("failed", 40, False)
    for wait in (0, 20, 19.5):
        world.clock.advance(wait)
        assert world.sender().step(hurry=True).kind == "backoff"
    assert world.app.token_requests == 1
    world.clock.advance(0.5)
    assert world.sender().step().kind == "delivered"


@pytest.mark.parametrize(
    "fault",
    [
        *[Answer(status) for status in (408, 429, 500, 502, 503, 504)],
        Drop(),
        Drop(after=True),
        HalfAnswer(),
        Hang(0),
        Answer(200, body="<html>It works!</html>"),
        Answer(200, body=b""),
        Answer(204),
        Answer(200, body=[1, 2]),
        Answer(200, body={"token_type": "Bearer"}),
        Answer(200, body={"access_token": ""}),
        Answer(200, body={"access_token": None}),
        Answer(200, body={"access_token": 17}),
        Answer(200, body={"access_token": ["x"]}),
        Answer(200, body={"access_token": "töken"}),
        Answer(200, body={"access_token": "a\r\nX-Injected: yes"}),
        Answer(200, body=b'{"access_token": "cut o'),
        Answer(200, body=b"[" * 50_000),
        Answer(413),
        Answer(414),
    ],
    ids=lambda fault: repr(fault)[:60],
)
def test_trouble_at_the_token_endpoint_is_waited_out_as_an_outage(world: World, fault: Any) -> None:
    world.receiver.token_script(fault)
    sender = world.sender()
    world.put(2)
    step = sender.step()
    assert (step.kind, step.seconds, step.exhausted) == ("failed", 0.25, False)
    stats = world.outbox.stats()
    assert (stats.pending, stats.leased, stats.dead, stats.failures) == (2, 0, 0, 1)
    assert "no OAuth token" in stats.last_error or "OAuth" in stats.last_error
    assert world.receiver.batches == ()
    world.clock.advance(0.25)
    assert sender.step().kind == "delivered"
    assert "X-Injected" not in world.receiver.batches[-1].headers


@pytest.mark.parametrize("status", [300, 302, 404, 405, 501, 505, 400, 401, 403, 415, 422, 511])
def test_a_wrong_token_endpoint_or_application_is_reported_and_never_buries(world: World, status: int) -> None:
    answer = Answer(status, {"Location": "/elsewhere"} if status < 400 else {})
    world.receiver.token_script(answer)
    world.put(1)
    step = world.sender().step()
    assert (step.kind, step.exhausted, len(world.reports.failures)) == ("failed", True, 1)
    stats = world.outbox.stats()
    assert (stats.pending, stats.dead) == (1, 0)
    assert [request.path for request in world.receiver.requests] == ["/token"]


def test_a_hanging_token_endpoint_is_given_up_after_the_timeout(world: World) -> None:
    world.receiver.token_script(Hang())
    world.put(1)
    sender = world.sender(timeout=0.2)
    assert sender.step().kind == "failed"
    assert "timed out" in world.outbox.stats().last_error
    world.receiver.release()
    assert sender.step(hurry=True).kind == "delivered"


@pytest.mark.parametrize(
    ("expires_in", "good_for"),
    [
        (600, 540),
        (600.5, 540.5),
        ("600", 540),
        (10, 5),
        (None, 3540),
        ("soon", 3540),
        (0, 3540),
        (-5, 3540),
        (10**400, 3540),
        (1e300, 3540),
        ({}, 3540),
        ([600], 3540),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_good_token_is_used_whatever_its_expires_in(world: World, expires_in: object, good_for: float) -> None:
    answer = {"access_token": "first", "expires_in": expires_in}
    transport = ScriptedTransport(
        [Response(200, {}, json.dumps(answer).encode()), Response(200, {}, b'{"access_token":"second"}')]
    )
    assert world.tokens.token(transport, 5) == "first"
    world.clock.advance(good_for - 0.5)
    assert world.tokens.token(transport, 5) == "first"
    world.clock.advance(1)
    assert world.tokens.token(transport, 5) == "second"


@pytest.mark.parametrize("expires_in", ["NaN", "Infinity", "-Infinity"])
def test_an_expires_in_that_is_no_number_of_json_is_no_reason_to_refuse_a_token(world: World, expires_in: str) -> None:
    body = b'{"access_token":"first","expires_in":%b}' % expires_in.encode()
    assert world.tokens.token(ScriptedTransport([Response(200, {}, body)]), 5) == "first"


# -- clocks that differ


@pytest.mark.parametrize("skew", [3600, -3600, 86_400 * 400, 90, -90])
def test_a_clock_that_is_wrong_costs_one_assertion(world: World, skew: float) -> None:
    world.app.date_skew = skew
    sender = world.sender()
    for _ in range(3):
        world.put()
        assert sender.step().kind == "delivered"
        world.clock.advance(3600)
    assert [request.status for request in world.receiver.requests if request.path == "/token"] == [401, 200, 200, 200]
    assert world.reports.failures == []


def test_a_server_whose_clock_is_put_right_again_is_understood(world: World) -> None:
    sender = world.sender()
    for skew in (3600.0, 0.0, -3600.0):
        world.app.date_skew = skew
        world.app.revoke_all()
        world.put()
        assert sender.step().kind == "delivered"


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="no time zone can be set here")
def test_a_date_of_an_unknown_zone_is_utc(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "EST5")
    time.tzset()
    try:
        date = format_datetime(datetime.fromtimestamp(world.clock.time(), timezone.utc).replace(tzinfo=None))
        assert date.endswith("-0000")
        world.tokens.token(ScriptedTransport([Response(200, {"Date": date}, b'{"access_token":"a"}')]), 5)
        assert world.tokens._skew == 0
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_difference_of_a_second_is_no_difference(world: World) -> None:
    for skew in (1.0, -1.0):
        world.app.date_skew = skew
        world.app.revoke_all()
        world.put()
        assert world.sender().step().kind == "delivered"
    assert all(request.status == 200 for request in world.receiver.requests if request.path == "/token")


@pytest.mark.parametrize("date", ["", "yesterday", "Tue, 99 Nov 2023 22:13:50 GMT", "Mon, 01 Jan 99999 00:00:00 GMT"])
def test_a_date_that_cannot_be_read_is_not_heeded(world: World, date: str) -> None:
    answers = [Response(401, {"Date": date}, b""), Response(200, {}, b'{"access_token":"x"}')]
    transport = ScriptedTransport(answers)
    with pytest.raises(TokenRefused):
        world.tokens.token(transport, 5)
    assert len(transport.posts) == 1


# -- how the token is asked for


def test_the_token_request_is_that_of_segments_documentation(world: World) -> None:
    world.put()
    world.sender(gzip=True).step()
    token, batch = world.receiver.requests
    assert token.headers["Content-Type"] == "application/x-www-form-urlencoded"
    assert token.headers["User-Agent"] == batch.headers["User-Agent"]
    assert "Authorization" not in token.headers
    form = parse_qs(token.body.decode())
    assert set(form) == {"grant_type", "client_assertion_type", "client_assertion", "scope"}
    assert KEY not in token.body.decode()
    assert batch.headers["Content-Encoding"] == "gzip"


def test_token_requests_go_through_the_proxies(world: World) -> None:
    world.put()
    proxy = world.receiver.url
    sender = world.sender(
        proxies={"http": proxy},
        host=world.receiver.url,
        oauth_auth_server=world.receiver.url,
    )
    assert sender.step().kind == "delivered"
    assert [request.path for request in world.receiver.requests] == [f"{proxy}/token", f"{proxy}/v1/batch"]


def test_token_requests_bear_the_timeout(world: World) -> None:
    transport = ScriptedTransport(then=Response(200, {}, b'{"access_token":"x"}'))
    uploader = Uploader(world.config(timeout=7), transport, world.tokens, world.clock)
    uploader.upload(b"{}", 0)
    world.tokens.invalidate("x")
    uploader.upload(b"{}", 0, within=0.5)
    assert [post.timeout for post in transport.posts] == [7, 7, 0.5, 0.5]


@pytest.mark.parametrize("within", [None, 4.0])
def test_what_a_flush_has_time_for_is_shared_by_all_requests(world: World, within: float | None) -> None:
    """And what was to be the last of it leaves nothing to those that follow."""

    def slowly(post: Post) -> Response:
        world.clock.advance(1.5)
        return Response(200, {}, b'{"access_token":"x"}') if post.url.endswith("/token") else Response(401, {}, b"")

    transport = ScriptedTransport(slowly)
    uploader = Uploader(world.config(timeout=7), transport, world.tokens, world.clock)
    uploader.upload(b"{}", 0, within=within)
    expected = [7, 7, 7, 7] if within is None else [4.0, 2.5, 1.0, 0.001]
    assert [post.timeout for post in transport.posts] == pytest.approx(expected)


# -- the key


def test_the_key_may_be_text_bytes_or_a_path(pair: tuple[bytes, str], world: World, tmp_path: Path) -> None:
    file = tmp_path / "key.pem"
    file.write_text(pair[1])
    old_form = serialization.load_pem_private_key(pair[1].encode(), None).private_bytes(
        PEM, serialization.PrivateFormat.TraditionalOpenSSL, PLAIN
    )
    forms: list[Any] = [
        pair[1],
        pair[1].encode(),
        file,
        str(file),
        pair[1].replace("\n", "\\n"),
        pair[1].replace("\n", "\r\n"),
        "\n  " + pair[1] + "\n",
        old_form,
        old_form.decode(),
    ]
    for form in forms:
        world.put()
        assert world.sender(oauth_client_key=form).step().kind == "delivered"


def test_a_key_file_in_the_home_folder_is_found(
    pair: tuple[bytes, str], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "key.pem").write_text(pair[1])
    world.put()
    assert world.sender(oauth_client_key="~/key.pem").step().kind == "delivered"


def bad_keys(pair: tuple[bytes, str], tmp_path: Path) -> dict[str, Any]:
    private = serialization.load_pem_private_key(pair[1].encode(), None)
    curve = ec.generate_private_key(ec.SECP256R1())
    lines = pair[1].splitlines()
    garbled = "\n".join([*lines[:5], lines[5][::-1], *lines[6:]])
    wrong_file = tmp_path / "wrong.pem"
    wrong_file.write_text(garbled)
    return {
        "garbage": "-----BEGIN PRIVATE KEY-----\nbm90IGEga2V5\n-----END PRIVATE KEY-----\n",
        "cut": pair[1][: len(pair[1]) // 2],
        "garbled": garbled,
        "garbled file": wrong_file,
        "without its head": "\n".join(lines[1:-1]),
        "without its head, as bytes": "\n".join(lines[1:-1]).encode(),
        "one line": "".join(lines[1:-1]),
        "elliptic": curve.private_bytes(PEM, PKCS8, PLAIN).decode(),
        "encrypted": private.private_bytes(PEM, PKCS8, serialization.BestAvailableEncryption(b"secret")),
        "public": pair[0].decode(),
        "no file": tmp_path / "there-is-none.pem",
        "no file, as text": "there-is-none.pem",
        "nobody's home": "~nobody-of-that-name/key.pem",
        "folder": tmp_path,
        "null": "a\0b",
    }


@pytest.mark.parametrize(
    "name",
    [
        *("garbage", "cut", "garbled", "garbled file", "without its head", "without its head, as bytes", "one line"),
        *("elliptic", "encrypted", "public", "no file", "no file, as text", "nobody's home", "folder", "null"),
    ],
)
def test_a_bad_key_is_a_config_error_at_construction_that_shows_nothing_of_it(
    pair: tuple[bytes, str], tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    caplog.set_level(logging.DEBUG)
    key = bad_keys(pair, tmp_path)[name]
    with pytest.raises(ConfigError) as caught:
        Client(
            KEY,
            outbox_dir=tmp_path / "outbox",
            oauth_client_id="app",
            oauth_key_id="kid-1",
            oauth_client_key=key,
        )
    assert caught.value.field == "oauth_client_key"
    told = "".join(traceback.format_exception(caught.value)) + caplog.text + repr(caught.value)
    shown = key.decode() if isinstance(key, bytes) else str(key)
    material = {pair[1], *pair[1].splitlines(), *shown.splitlines()}
    for line in material:
        if len(line) > 20 and not line.startswith(("-----", "/", "~", "there-is")):
            assert line not in told
    assert not (tmp_path / "outbox" / "outbox.db").exists()


def test_a_config_with_a_key_does_not_show_it(world: World, pair: tuple[bytes, str]) -> None:
    told = repr(world.config()) + repr(world.tokens) + str(vars(world.tokens))
    assert all(line not in told for line in pair[1].splitlines()[1:-1])
    assert KEY not in repr(world.config())


# -- what is told


def test_no_token_assertion_or_key_is_ever_told(
    world: World, pair: tuple[bytes, str], caplog: pytest.LogCaptureFixture
) -> None:
    """Also by servers that quote what they were sent."""
    caplog.set_level(logging.DEBUG)
    secrets = {line for line in pair[1].splitlines() if len(line) > 20 and not line.startswith("-----")}
    secrets.add(KEY)
    tokens = iter(f"secret-token-{number}" for number in range(100))
    token_turns = iter(["issue", "issue", "quote", "page", "drop", "issue"])
    batch_turns = iter(["quote", "quote", "quote", "poison"])

    def answer(post: Post) -> Reply:
        said = {"code": "odd"}
        if post.url.endswith("/token"):
            assertion = parse_qs(post.raw.decode())["client_assertion"][0]
            secrets.update({assertion, *assertion.split(".")})
            turn = next(token_turns)
            if turn == "issue":
                token = next(tokens)
                secrets.add(token)
                return Response(200, {}, json.dumps({"access_token": token}).encode())
            if turn == "quote":
                said = {"error": assertion, "error_description": f"{assertion} is not valid"}
                return Response(401, {}, json.dumps(said).encode())
            if turn == "page":
                return Response(500, {}, f"<html>{assertion}".encode())
            return TransportError("connection", "ConnectionResetError")
        turn = next(batch_turns)
        token = post.headers["Authorization"].removeprefix("Bearer ")
        said = {"code": token, "message": f"Bearer {token} may not write to {KEY}"}
        return Response(400 if turn == "poison" else 401, {}, json.dumps(said).encode())

    config = replace(world.config(), max_retries=0)
    uploader = Uploader(config, ScriptedTransport(answer), world.tokens, world.clock)
    sender = Delivery(world.outbox, uploader, config, world.clock, lambda: 0.5, world.reports)
    world.put()
    told = ""
    for _ in range(5):
        if not sender.step(hurry=True).progress:
            told += world.outbox.stats().last_error
    (letter,) = world.outbox.dead_letters()
    told += caplog.text + repr(letter) + "".join(map(repr, [*world.reports.errors, *map(str, world.reports.errors)]))
    assert "may not write" in told
    assert "is not valid" in told
    assert (list(token_turns), list(batch_turns)) == ([], [])
    assert len(secrets) > 20
    for secret in secrets:
        assert secret not in told


def test_a_whole_delivery_over_the_network_tells_no_secret(
    pair: tuple[bytes, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    app = OAuthApp("app", "kid-1", pair[0])
    errors: list[Exception] = []
    with Receiver(oauth=app, write_key=KEY) as receiver:
        receiver.script(Answer(401), Answer(503), Drop())
        receiver.token_script(Answer(500), Drop())
        with Client(
            KEY,
            debug=True,
            host=receiver.url,
            outbox_dir=tmp_path / "outbox",
            max_retries=0,
            oauth_client_id="app",
            oauth_key_id="kid-1",
            oauth_client_key=pair[1],
            oauth_auth_server=receiver.url,
            on_error=lambda error, items: errors.append(error),
        ) as client:
            client.track("user", "Signed Up", {"card": "4111-1111"})
            for _ in range(6):
                client.flush(10.0)
            assert client.stats().pending == 0
        secrets = [line for line in pair[1].splitlines() if not line.startswith("-----")]
        secrets += [KEY, "4111-1111"]
        for request in receiver.requests:
            secrets.append(request.headers.get("Authorization", "Bearer none").partition(" ")[2])
            if request.path == "/token":
                secrets += parse_qs(request.body.decode())["client_assertion"][0].split(".")
    told = caplog.text + "".join(map(repr, errors))
    assert errors
    assert "enqueued" in told
    assert all(secret not in told for secret in secrets)
