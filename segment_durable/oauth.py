"""OAuth 2.0 by a signed assertion (RFC 7523): a token, fetched when it is needed, in the thread that needs it."""

from __future__ import annotations

import json
import threading
import uuid
from typing import Any
from urllib.parse import urlencode

import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from segment_durable.answers import Kind, Outcome, classify, http_date, unanswered
from segment_durable.clock import Clock
from segment_durable.config import Config
from segment_durable.errors import ConfigError
from segment_durable.transport import Response, Transport, TransportError
from segment_durable.upload import USER_AGENT, TokenRefused, without

__all__ = ["Tokens"]

ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
ASSERTION_SECONDS = 60  # the longest that Segment accepts
_BACKDATED = 5  # seconds, for clocks that differ a little
_REFRESH_EARLY = 60.0  # seconds before its end that a token is replaced, at most half of its life
_DEFAULT_LIFE = 3600.0  # seconds, where the answer does not say
_SKEW_MATTERS = 2.0  # seconds; a Date header has whole seconds


class Tokens:
    """The access token of one OAuth application, shared by the senders of a process.

    Raises `ConfigError` at construction if the key can't be used; no message shows any of it.
    """

    def __init__(self, config: Config, clock: Clock) -> None:
        self._client_id = config.oauth_client_id
        self._key_id = config.oauth_key_id
        self._server = config.oauth_auth_server
        self._scope = config.oauth_scope
        self._key = _private_key(config.oauth_pem)
        self._clock = clock
        self._lock = threading.RLock()
        self._token: str | None = None
        self._good_until = 0.0  # on the boot clock
        self._skew = 0.0  # the server's clock minus ours, in seconds

    def token(self, transport: Transport, timeout: float) -> str:
        """A token that is good now.

        If a new one is needed, one thread fetches it through its `transport` while the others wait for it.  Raises
        `TokenRefused`.  `timeout`: seconds as for a `Transport`.
        """
        try:
            if not self._lock.acquire(timeout=2 * timeout + 1):
                raise TokenRefused(
                    Outcome(Kind.UNREACHABLE, code="oauth", message="another thread is waiting for a token")
                )
            if self._token is None or self._clock.boot() >= self._good_until:
                self._token = None
                self._token, self._good_until = self._fetch(transport, timeout)
            return self._token
        finally:
            try:
                self._lock.release()
            except RuntimeError:
                pass  # it was not got

    def invalidate(self, token: str) -> None:
        """Drop `token`, which was not accepted; one that has replaced it meanwhile is kept."""
        with self._lock:
            if self._token == token:
                self._token = None

    def _fetch(self, transport: Transport, timeout: float) -> tuple[str, float]:
        skew = self._skew
        response = self._request(transport, timeout)
        if response.status in (400, 401) and abs(self._skew - skew) >= _SKEW_MATTERS:
            response = self._request(transport, timeout)  # the first assertion had the wrong time
        if response.status != 200:
            raise TokenRefused(self._refusal(response))
        try:
            answer = json.loads(response.body)
            token, life = answer["access_token"], answer.get("expires_in")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            token, life = None, None
        if not isinstance(token, str) or not token or not token.isascii() or not token.isprintable():
            raise TokenRefused(
                Outcome(Kind.UNREACHABLE, 200, "oauth", "the OAuth server's answer holds no usable access_token")
            )
        seconds = _life(life)
        return token, self._clock.boot() + seconds - min(_REFRESH_EARLY, seconds / 2)

    def _request(self, transport: Transport, timeout: float) -> Response:
        issued = int(self._clock.time() + self._skew) - _BACKDATED
        claims: dict[str, Any] = {
            "iss": self._client_id,
            "sub": self._client_id,
            "aud": self._server,
            "iat": issued,
            "exp": issued + ASSERTION_SECONDS,
            "jti": str(uuid.uuid4()),
        }
        assertion = jwt.encode(claims, self._key, algorithm="RS256", headers={"kid": self._key_id})
        form = {
            "grant_type": "client_credentials",
            "client_assertion_type": ASSERTION_TYPE,
            "client_assertion": assertion,
            "scope": self._scope,
        }
        headers = {"Content-Type": "application/x-www-form-urlencoded", "User-Agent": USER_AGENT}
        try:
            response = transport.post(f"{self._server}/token", headers, urlencode(form).encode(), timeout)
        except TransportError as problem:
            outcome = unanswered(problem)
            raise TokenRefused(
                Outcome(outcome.kind, code=outcome.code, message=f"no OAuth token: {outcome.message}")
            ) from problem
        self._note_skew(response)
        return response if response.status == 200 else without(response, assertion)

    def _note_skew(self, response: Response) -> None:
        date = http_date(response.headers.get("Date", ""))
        if date is None:
            return
        skew = date - self._clock.time()
        self._skew = skew if abs(skew) >= _SKEW_MATTERS else 0.0

    def _refusal(self, response: Response) -> Outcome:
        outcome = classify(response, self._clock.time())
        kind = outcome.kind
        if response.status in (400, 401, 403, 415, 422):
            kind = Kind.UNAUTHORISED
        elif kind in (Kind.DELIVERED, Kind.REJECTED):
            kind = Kind.UNREACHABLE
        return Outcome(
            kind,
            status=response.status,
            code=outcome.code,
            message=f"no OAuth token: {outcome.message}",
            retry_after=outcome.retry_after,
        )


def _life(expires_in: object) -> float:
    """Seconds; a default for what is no such number, since the token itself may well be good."""
    try:
        seconds = float(expires_in)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return _DEFAULT_LIFE
    return seconds if 0 < seconds < 1e9 else _DEFAULT_LIFE


def _private_key(pem: bytes) -> RSAPrivateKey:
    name = "oauth_client_key"
    try:
        key = load_pem_private_key(pem.strip(), password=None)  # older versions read no blanks before the first line
    except TypeError:
        raise ConfigError(name, "is encrypted with a passphrase: give it without one") from None
    except Exception:  # the parser's own words may hold parts of the key
        raise ConfigError(name, "is not a private key in PEM form (-----BEGIN PRIVATE KEY-----)") from None
    if not isinstance(key, RSAPrivateKey):
        raise ConfigError(name, "must be an RSA key: Segment verifies RS256")
    return key
