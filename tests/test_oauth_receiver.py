"""The receiver's token endpoint: it issues a token to the one good assertion and to none of its bad neighbours."""

from __future__ import annotations

import email.utils
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import jwt
import pytest
import requests
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from segment_durable.testing import Answer, Delay, Drop, OAuthApp, Receiver

SECONDS = 5.0
NOW = 1_750_000_000.0
ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
_ids = itertools.count()


@pytest.fixture(scope="module")
def keys() -> tuple[bytes, RSAPrivateKey]:
    """One pair for all tests, for making one takes long: the public key in PEM, the private one ready for use."""
    private = serialization.load_pem_private_key(OAuthApp.generate()[1].encode(), None)
    assert isinstance(private, RSAPrivateKey)
    pem = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    return private.public_key().public_bytes(*pem), private


class Party:
    """A receiver with an app whose clock stands still at `self.now`, and a sender with the key."""

    def __init__(self, app: OAuthApp | bytes, private_key: RSAPrivateKey | str) -> None:
        self.now = NOW
        self.private_key = private_key
        self.app = OAuthApp("app", "kid-1", app, clock=lambda: self.now) if isinstance(app, bytes) else app
        self.receiver = Receiver(oauth=self.app, write_key="key")

    def claims(self, **changes: Any) -> dict[str, Any]:
        whole = {
            "iss": "app",
            "sub": "app",
            "aud": self.receiver.url,
            "iat": NOW,
            "exp": NOW + 60,
            "jti": f"jti-{next(_ids)}",
        } | changes
        return {key: value for key, value in whole.items() if value is not None}

    def assertion(self, kid: str | None = "kid-1", key: RSAPrivateKey | str | None = None, **changes: Any) -> str:
        headers = {} if kid is None else {"kid": kid}
        return jwt.encode(self.claims(**changes), key or self.private_key, "RS256", headers=headers)

    def ask(self, assertion: str | None = None, **changes: Any) -> requests.Response:
        form = {
            "grant_type": "client_credentials",
            "client_assertion_type": ASSERTION_TYPE,
            "client_assertion": assertion or self.assertion(),
            "scope": "tracking_api:write",
        } | changes
        return requests.post(f"{self.receiver.url}/token", data=form, timeout=SECONDS)

    def send(self, token: str, write_key: str | None = "key") -> int:
        moment = "2025-06-01T12:00:00Z"
        event = {"type": "identify", "userId": "u", "messageId": f"m{next(_ids)}", "timestamp": moment}
        body = {"batch": [event], "sentAt": moment} | ({"writeKey": write_key} if write_key else {})
        return requests.post(
            f"{self.receiver.url}/v1/batch", json=body, headers={"Authorization": f"Bearer {token}"}, timeout=SECONDS
        ).status_code


@pytest.fixture
def party(keys: tuple[bytes, RSAPrivateKey]) -> Iterator[Party]:
    party = Party(*keys)
    with party.receiver:
        yield party
        assert party.receiver.errors == ()


def test_a_good_assertion_gets_a_token_that_lets_events_in(party: Party) -> None:
    answer = party.ask()
    assert answer.status_code == 200
    assert {**answer.json(), "access_token": ""} == {"access_token": "", "token_type": "Bearer", "expires_in": 3600}
    assert party.send(answer.json()["access_token"]) == 200
    assert party.receiver.batches[0].authorization == "bearer"
    assert len(party.receiver.events) == 1
    assert party.app.token_requests == 1
    assert [(one.path, one.status, one.taken) for one in party.receiver.requests] == [
        ("/token", 200, True),
        ("/v1/batch", 200, True),
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"kid": "kid-2"},
        {"kid": None},
        {"iss": "other"},
        {"sub": "other"},
        {"sub": None},
        {"aud": "http://127.0.0.1:1"},
        {"aud": None},
        {"iat": None},
        {"iat": NOW + 6, "exp": NOW + 66},
        {"exp": None},
        {"exp": NOW + 61},
        {"exp": NOW + 30, "iat": NOW - 31},
        {"iat": NOW - 60, "exp": NOW},
        {"exp": "soon"},
        {"jti": None},
        {"jti": ""},
    ],
)
def test_a_bad_assertion_gets_none(party: Party, changes: dict[str, Any]) -> None:
    answer = party.ask(party.assertion(**changes))
    assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")
    assert answer.json()["error_description"]
    assert "access_token" not in answer.json()
    assert not party.receiver.requests[0].taken
    assert party.app.token_requests == 1


@pytest.mark.parametrize(
    "changes",
    [{"iat": NOW + 5, "exp": NOW + 65}, {"iat": NOW - 59, "exp": NOW + 1}, {"iat": NOW + 0.5, "exp": NOW + 60}],
)
def test_an_assertion_at_the_limits_is_good(party: Party, changes: dict[str, Any]) -> None:
    assert party.ask(party.assertion(**changes)).status_code == 200


def test_a_wrong_signature_or_algorithm_gets_none(party: Party) -> None:
    other = OAuthApp.generate()[1]
    head, payload, signature = party.assertion().split(".")
    for assertion in (
        party.assertion(key=other),
        f"{head}.{payload}.{signature[:-8]}AAAAAAAA",
        jwt.encode(party.claims(), "x" * 32, "HS256", headers={"kid": "kid-1"}),
        jwt.encode(party.claims(), None, "none", headers={"kid": "kid-1"}),
        jwt.encode(party.claims(), party.private_key, "RS512", headers={"kid": "kid-1"}),
        "no.such.thing",
    ):
        answer = party.ask(assertion)
        assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")


def test_an_assertion_is_good_once(party: Party) -> None:
    assertion = party.assertion()
    assert party.ask(assertion).status_code == 200
    again = party.ask(assertion)
    assert (again.status_code, again.json()["error"]) == (401, "invalid_client")
    assert "jti" in again.json()["error_description"]
    assert party.ask(party.assertion(jti="same")).status_code == 200
    assert party.ask(party.assertion(jti="same")).status_code == 401
    assert party.app.token_requests == 4


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"grant_type": "password"}, "unsupported_grant_type"),
        ({"grant_type": None}, "unsupported_grant_type"),
        ({"client_assertion_type": "other"}, "invalid_request"),
        ({"client_assertion": None}, "invalid_request"),
        ({"scope": "other"}, "invalid_scope"),
        ({"scope": None}, "invalid_scope"),
        ({"scope": ["tracking_api:write", "more"]}, "invalid_request"),
    ],
)
def test_a_bad_form_gets_none(party: Party, changes: dict[str, Any], error: str) -> None:
    answer = party.ask(**changes)
    assert (answer.status_code, answer.json()["error"]) == (400, error)


def test_json_is_no_form(party: Party) -> None:
    answer = requests.post(f"{party.receiver.url}/token", json={"grant_type": "client_credentials"}, timeout=SECONDS)
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")


def test_a_token_request_without_a_length_gets_none(party: Party) -> None:
    answer = requests.post(f"{party.receiver.url}/token", data=iter([b"a=b"]), timeout=SECONDS)
    assert (answer.status_code, answer.json()["code"]) == (411, "length_required")


def test_without_a_token_nothing_gets_in(party: Party) -> None:
    assert party.send("made-up") == 401
    assert party.send("") == 401
    body = json.loads(party.receiver.batches[0].body)
    answer = requests.post(f"{party.receiver.url}/v1/batch", json=body, auth=("key", ""), timeout=SECONDS)
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.status_code == 401  # Basic authorization is no way round
    assert [batch.authorization for batch in party.receiver.batches] == ["bearer", "bearer", "basic"]
    assert party.receiver.events == []


def test_the_body_must_carry_the_write_key(party: Party) -> None:
    token = party.ask().json()["access_token"]
    assert [party.send(token, key) for key in (None, "other", "key")] == [401, 401, 200]


def test_a_token_expires(party: Party) -> None:
    token = party.ask().json()["access_token"]
    party.now = NOW + 3599
    assert party.send(token) == 200
    party.now = NOW + 3600
    assert party.send(token) == 401


def test_an_app_can_be_generated_with_a_key_of_its_own() -> None:
    app, private_key = OAuthApp.generate("app", "kid-1", token_lifetime=0, scope="s", clock=lambda: NOW)
    assert (app.client_id, app.key_id, app.scope, app.token_lifetime) == ("app", "kid-1", "s", 0)
    party = Party(app, private_key)
    with party.receiver:
        answer = party.ask(scope="s")
        assert (answer.status_code, answer.json()["expires_in"]) == (200, 0)
        assert party.send(answer.json()["access_token"]) == 401  # it has expired already


def test_an_app_needs_an_rsa_key_and_a_lifetime(keys: tuple[bytes, RSAPrivateKey]) -> None:
    assert OAuthApp("app", "kid", keys[0].decode()).token_requests == 0
    with pytest.raises(ValueError):
        OAuthApp("app", "kid", keys[0], token_lifetime=-1)
    with pytest.raises(ValueError):
        OAuthApp("app", "kid", "no key")
    with pytest.raises(ValueError):
        OAuthApp("app", "kid", EC_PUBLIC_KEY)


EC_PUBLIC_KEY = """-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEaxfR8uEsQkf4vOblY6RA8ncDfYEt
6zOg9KE5RdiYwpZP40Li/hp/m47n60p8D54WK84zV2sxXs7LtkBoN79R9Q==
-----END PUBLIC KEY-----
"""


def test_revoked_tokens_let_nothing_in_and_new_ones_do(party: Party) -> None:
    token = party.ask().json()["access_token"]
    assert party.send(token) == 200
    assert party.receiver.oauth is party.app
    party.app.revoke_all()
    assert party.send(token) == 401
    assert party.send(party.ask().json()["access_token"]) == 200


def date_of(answer: requests.Response) -> float:
    return email.utils.parsedate_to_datetime(answer.headers["Date"]).timestamp()


def test_a_skewed_server_shows_it_in_its_date_and_judges_by_it(party: Party) -> None:
    party.app.date_skew = 600
    refused = party.ask()
    assert (refused.status_code, date_of(refused)) == (401, NOW + 600)
    corrected = party.ask(party.assertion(iat=NOW + 600, exp=NOW + 660))
    assert corrected.status_code == 200
    assert party.send(corrected.json()["access_token"]) == 200

    party.app.date_skew = -600
    party.receiver.token_script(Answer(429, {"X-RateLimit-Reset": "3"}))
    throttled = party.ask()
    assert (throttled.status_code, throttled.headers["X-RateLimit-Reset"], date_of(throttled)) == (429, "3", NOW - 600)
    assert party.ask().status_code == 401
    assert party.ask(party.assertion(iat=NOW - 600, exp=NOW - 540)).status_code == 200


def test_the_date_of_a_batch_answer_is_not_skewed(party: Party) -> None:
    party.app.date_skew = 600
    answer = requests.post(f"{party.receiver.url}/v1/batch", timeout=SECONDS)
    assert abs(date_of(answer) - time.time()) < 60


def test_token_requests_have_a_script_of_their_own(party: Party) -> None:
    party.receiver.always(Answer(503))
    party.receiver.token_script(Answer(500), Delay(0, Answer(400, body={"error": "odd"})), Drop(after=True))
    assert party.ask().status_code == 500
    assert party.ask().json() == {"error": "odd"}
    assertion = party.assertion()
    with pytest.raises(requests.ConnectionError):
        party.ask(assertion)
    assert [(one.status, one.taken) for one in party.receiver.requests] == [(500, False), (400, False), (None, True)]
    assert party.ask(assertion).status_code == 401  # the dropped one was used up
    assert party.ask().status_code == 200
    assert party.app.token_requests == 5


def test_a_dropped_request_that_was_not_taken_leaves_the_assertion_good(party: Party) -> None:
    party.receiver.token_script(Drop())
    assertion = party.assertion()
    with pytest.raises(requests.ConnectionError):
        party.ask(assertion)
    assert party.ask(assertion).status_code == 200


def test_what_a_clock_raises_is_kept(party: Party) -> None:
    with Receiver(oauth=party.app) as other:
        del party.now
        with pytest.raises(requests.ConnectionError):
            requests.post(f"{other.url}/token", data={"a": "b"}, timeout=SECONDS)
        assert other.wait_for(lambda seen: bool(seen.errors), SECONDS)
        assert {type(error) for error in other.errors} == {AttributeError}
