"""A batch's bytes in, one `Outcome` out: the envelope, the headers, the credentials and one request."""

from __future__ import annotations

import base64
import gzip
from dataclasses import replace
from typing import Protocol

from segment_durable.answers import Kind, Outcome, classify, unanswered
from segment_durable.batch import envelope
from segment_durable.clock import Clock, utc_timestamp
from segment_durable.config import Config
from segment_durable.transport import Response, Transport, TransportError
from segment_durable.version import VERSION

__all__ = ["USER_AGENT", "TokenRefused", "TokenSource", "Uploader", "without"]

USER_AGENT = f"segment-durable/{VERSION}"
GZIP_LEVEL = 1  # 110 us for 100 events, and 14.9% of their size; level 3 takes 160 us for 14.5%, level 6 340 for 13.1%
_LEAST_SECRET = 8  # characters; what is shorter is a test's, and would be found in many a word


class TokenRefused(Exception):
    """There is no token to be had now; `outcome` says what that means for the batch."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.message)
        self.outcome = outcome


class TokenSource(Protocol):
    """What OAuth is to an uploader; `oauth.Tokens` is it.  A protocol, so that cryptography loads for OAuth only."""

    def token(self, transport: Transport, timeout: float) -> str: ...

    def invalidate(self, token: str) -> None: ...


class Uploader:
    """Posts batches for one sender.  `tokens`: None means Basic auth with the write key."""

    def __init__(self, config: Config, transport: Transport, tokens: TokenSource | None, clock: Clock) -> None:
        assert config.write_key is not None
        self._url = f"{config.host}/v1/batch"
        self._write_key = config.write_key
        self._gzip = config.gzip
        self._timeout = float(config.timeout)
        self._transport = transport
        self._tokens = tokens
        self._clock = clock
        self._basic = "Basic " + base64.b64encode(f"{config.write_key}:".encode()).decode()

    def upload(self, events: bytes, attempt: int, *, within: float | None = None) -> Outcome:
        """Post the joined `events`; never raises for what the network does.

        `attempt` is how many attempts there were before.  `within`: seconds for all of it; without that each request,
        of which there may be some for a token, has the `timeout` of the settings.
        """
        end = None if within is None else self._clock.boot() + within
        if self._tokens is None:
            return self._post(events, attempt, self._basic, self._until(end))
        try:
            token = self._tokens.token(self._transport, self._until(end))
            outcome = self._post(events, attempt, f"Bearer {token}", self._until(end))
            if outcome.kind is Kind.UNAUTHORISED:
                self._tokens.invalidate(token)
                token = self._tokens.token(self._transport, self._until(end))
                outcome = self._post(events, attempt + 1, f"Bearer {token}", self._until(end))
            return outcome
        except TokenRefused as refused:
            return refused.outcome

    def close(self) -> None:
        self._transport.close()

    def _until(self, end: float | None) -> float:
        """Seconds that the next request may take."""
        return self._timeout if end is None else max(0.001, min(self._timeout, end - self._clock.boot()))

    def _post(self, events: bytes, attempt: int, authorization: str, timeout: float) -> Outcome:
        # Segment takes an event's time to be receivedAt - (sentAt - timestamp): sentAt is that of this very attempt.
        body = envelope(events, utc_timestamp(self._clock.time()), self._write_key)
        headers = {"Content-Type": "application/json", "User-Agent": USER_AGENT, "Authorization": authorization}
        if attempt:
            headers["X-Retry-Count"] = str(attempt)
        if self._gzip:
            headers["Content-Encoding"] = "gzip"
            body = gzip.compress(body, GZIP_LEVEL, mtime=0)
        try:
            response = self._transport.post(self._url, headers, body, timeout)
        except TransportError as problem:
            return unanswered(problem)
        return classify(without(response, authorization.partition(" ")[2], self._write_key), self._clock.time())


def without(response: Response, *secrets: str) -> Response:
    """The answer with `secrets` blotted out of its body, which goes into logs, errors and dead letters.

    A receiver that refuses something may well quote it.
    """
    body = response.body
    for secret in secrets:
        if len(secret) >= _LEAST_SECRET:
            body = body.replace(secret.encode(), b"***")
    return response if body is response.body else replace(response, body=body)
