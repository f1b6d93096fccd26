"""The token endpoint: Segment's OAuth 2.0, client credentials with a signed assertion (RFC 7523).

Needs PyJWT and cryptography, which are imported only when an `OAuthApp` is made.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from typing import Any, TypeGuard
from urllib.parse import parse_qs

from segment_durable.testing.faults import Answer
from segment_durable.testing.records import Refusal

GRANT_TYPE = "client_credentials"
ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
MAX_ASSERTION_SECONDS = 60
CLOCK_LEEWAY_SECONDS = 5


class OAuthApp:
    """An application that may send, and the server that gives it tokens at `POST /token` of its receiver.

    `ValueError` if `public_key`, in PEM, is no RSA key or `token_lifetime` is negative; `ImportError` without PyJWT
    and cryptography.
    """

    def __init__(
        self,
        client_id: str,
        key_id: str,
        public_key: str | bytes,
        scope: str = "tracking_api:write",
        token_lifetime: float = 3600,
        clock: Callable[[], float] = time.time,
        date_skew: float = 0.0,
    ) -> None:
        """`token_lifetime`: seconds, 0: a token is expired as soon as it is issued. `clock`: seconds since 1970."""
        if token_lifetime < 0:
            raise ValueError(f"token_lifetime must be 0 or more seconds, not {token_lifetime}")
        self.client_id = client_id
        self.key_id = key_id
        self.scope = scope
        self.token_lifetime = token_lifetime
        self.date_skew = date_skew
        """How many seconds this server's clock is ahead of `clock`: its `Date` header shows it, and assertions are
        judged by it. May be set at any time; the lifetime of tokens goes by `clock` alone."""
        self._clock = clock
        self._key = _load(public_key)
        self._lock = threading.Lock()
        self._expiries: dict[str, float] = {}
        self._seen_ids: set[str] = set()
        self._token_requests = 0

    @classmethod
    def generate(cls, client_id: str = "test-app", key_id: str = "test-key", **options: Any) -> tuple[OAuthApp, str]:
        """An app with a new RSA key of 2,048 bits, and the private key in PEM. `options` as of the constructor."""
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import rsa

        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return cls(client_id, key_id, public, **options), private.decode()

    @property
    def token_requests(self) -> int:
        """How many requests for a token arrived, whatever was answered."""
        with self._lock:
            return self._token_requests

    def count_request(self) -> None:
        """Called by the receiver for each request to the token endpoint."""
        with self._lock:
            self._token_requests += 1

    def now(self) -> float:
        """The time of this server's clock, in seconds since 1970, skew included."""
        return self._clock() + self.date_skew

    def is_valid(self, token: str) -> bool:
        """Whether the token was issued here and has neither expired nor been revoked."""
        now = self._clock()
        with self._lock:
            return now < self._expiries.get(token, float("-inf"))

    def revoke_all(self) -> None:
        """From now on no token that was issued before is valid."""
        with self._lock:
            self._expiries.clear()

    def issue(self, content_type: str, form: bytes, audience: str) -> Answer:
        """Answer a token request. `taken` is True if a token was issued; `audience` is the url of this server."""
        try:
            self._check(content_type, form, audience)
        except Refusal as refusal:
            problem = refusal.problem
            return Answer(problem.status, body={"error": problem.code, "error_description": problem.message})
        token = secrets.token_urlsafe(24)
        with self._lock:
            self._expiries[token] = self._clock() + self.token_lifetime
        body = {"access_token": token, "token_type": "Bearer", "expires_in": self.token_lifetime}
        return Answer(200, {"Cache-Control": "no-store"}, body, taken=True)

    def _check(self, content_type: str, form: bytes, audience: str) -> None:
        if content_type.partition(";")[0].strip().lower() != "application/x-www-form-urlencoded":
            raise Refusal(400, "invalid_request", "the body must be a form")
        try:
            fields = parse_qs(form.decode(), keep_blank_values=True, max_num_fields=100)
        except ValueError:
            raise Refusal(400, "invalid_request", "the body is not a form") from None
        if any(len(values) > 1 for values in fields.values()):
            raise Refusal(400, "invalid_request", "a parameter came twice")
        if fields.get("grant_type") != [GRANT_TYPE]:
            raise Refusal(400, "unsupported_grant_type", f"grant_type must be {GRANT_TYPE}")
        if fields.get("client_assertion_type") != [ASSERTION_TYPE]:
            raise Refusal(400, "invalid_request", f"client_assertion_type must be {ASSERTION_TYPE}")
        if fields.get("scope") != [self.scope]:
            raise Refusal(400, "invalid_scope", f"scope must be {self.scope}")
        if "client_assertion" not in fields:
            raise Refusal(400, "invalid_request", "client_assertion is missing")
        self._check_assertion(fields["client_assertion"][0], audience)

    def _check_assertion(self, assertion: str, audience: str) -> None:
        import jwt

        # Only the signature is left to PyJWT: it knows no clock but its own.
        options: Any = {f"verify_{claim}": False for claim in ("exp", "iat", "nbf", "aud", "iss", "sub", "jti")}
        try:
            whole = jwt.decode_complete(assertion, self._key, algorithms=["RS256"], options=options)
        except jwt.PyJWTError as error:
            raise Refusal(401, "invalid_client", f"the assertion is not valid: {type(error).__name__}") from None
        claims: dict[str, Any] = whole["payload"]
        first_use = self._use(claims.get("jti"))
        now = self.now()
        issued, expires = claims.get("iat"), claims.get("exp")
        if whole["header"].get("kid") != self.key_id:
            reason = "kid is not the key's id"
        elif claims.get("iss") != self.client_id or claims.get("sub") != self.client_id:
            reason = "iss and sub must be the client's id"
        elif claims.get("aud") != audience:
            reason = f"aud must be {audience}"
        elif not _is_number(issued) or not _is_number(expires):
            reason = "iat and exp must be numbers"
        elif issued > now + CLOCK_LEEWAY_SECONDS:
            reason = "iat is in the future"
        elif expires - issued > MAX_ASSERTION_SECONDS:
            reason = f"exp is more than {MAX_ASSERTION_SECONDS} s after iat"
        elif expires <= now:
            reason = "the assertion has expired"
        elif not first_use:
            reason = "jti must be text that was never used before"
        else:
            return
        raise Refusal(401, "invalid_client", reason)

    def _use(self, jti: object) -> bool:
        """Note the id of an assertion that was well signed. False if it is none, or was seen before."""
        if not isinstance(jti, str) or not jti:
            return False
        with self._lock:
            if jti in self._seen_ids:
                return False
            self._seen_ids.add(jti)
            return True


def _load(public_key: str | bytes) -> Any:
    import jwt  # noqa: F401 - so that a missing package is noticed here, not in a thread
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    key = load_pem_public_key(public_key.encode() if isinstance(public_key, str) else public_key)
    if not isinstance(key, RSAPublicKey):
        raise ValueError("public_key must be an RSA key")
    return key


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float)
