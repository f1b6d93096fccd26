"""Which request is for whom, who may send, and what an honest receiver answers."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from segment_durable.testing.exchange import Exchange
from segment_durable.testing.faults import Answer
from segment_durable.testing.inbox import Inbox, Script
from segment_durable.testing.oauth import OAuthApp
from segment_durable.testing.records import AuthorizationKind, Batch, Headers, Problem, Refusal, Request
from segment_durable.testing.rules import Reading, read_batch

BATCH_PATH = "/v1/batch"
TOKEN_PATH = "/token"


class Judge:
    """Turns a request into an exchange. Holds the two scripts, for there is one for each path."""

    def __init__(self, inbox: Inbox, write_key: str | None, oauth: OAuthApp | None, strict: bool) -> None:
        self.batch_script = Script()
        self.token_script = Script()
        self._inbox = inbox
        self._write_key = write_key
        self._oauth = oauth
        self._strict = strict

    def open(
        self, method: str, target: str, port: int, headers: Headers, raw: bytes, problem: Problem | None, url: str
    ) -> Exchange:
        """Record a request that arrived whole. `problem` is what the transfer of its body already broke."""
        path = _path(target)
        if method != "POST":
            problem = Problem(405, "method_not_allowed", "only POST is allowed")
        elif path == BATCH_PATH:
            return self._open_batch(target, port, headers, raw, problem)
        elif path == TOKEN_PATH and self._oauth is not None:
            return self._open_token(self._oauth, target, port, headers, raw, problem, url)
        else:
            problem = Problem(404, "not_found", "there is nothing at this path")
        request = Request(
            method=method,
            path=target,
            client_port=port,
            headers=headers,
            body=raw,
            authorization=_kind(headers),
            problem=problem,
        )
        return Exchange(self._inbox, request, _always(self._refused(problem)))

    def _open_batch(self, target: str, port: int, headers: Headers, raw: bytes, problem: Problem | None) -> Exchange:
        reading = read_batch(raw, headers, strict=self._strict) if problem is None else Reading(raw)
        problem = problem or self._first_problem(headers, reading)
        fields: dict[str, Any] = {
            "method": "POST",
            "path": target,
            "client_port": port,
            "headers": headers,
            "body": reading.body,
            "authorization": _kind(headers),
            "problem": problem,
        }
        request = Request(**fields)
        if reading.document is not None and reading.events is not None:
            sent_at = reading.document.get("sentAt")
            request = Batch(**fields, events=reading.events, sent_at=sent_at if isinstance(sent_at, str) else None)
        answer = self._refused(problem) if problem else Answer(200, body={"success": True}, taken=True)
        return Exchange(self._inbox, request, _always(answer), self.batch_script)

    def _first_problem(self, headers: Headers, reading: Reading) -> Problem | None:
        """Credentials are looked at first, then the body, and last whether it goes with the credentials."""
        try:
            key = self._write_key
            if self._oauth is not None:
                _check_bearer(self._oauth, headers)
            else:
                key = _basic_user(headers)
                if self._write_key is not None and key != self._write_key:
                    raise Refusal(401, "unauthorized", "wrong write key")
            if reading.problem is None and reading.document is not None:
                self._check_claim(reading.document.get("writeKey"), key)
        except Refusal as refusal:
            return refusal.problem
        return reading.problem

    def _check_claim(self, claimed: object, key: str | None) -> None:
        """`claimed` is the body's write key; `key` that of the header or of the receiver. None: any will do."""
        if not self._strict and (self._oauth is not None or self._write_key is not None):
            return
        if not isinstance(claimed, str) or not claimed or key not in (None, claimed):
            raise Refusal(401, "unauthorized", "the body's writeKey is missing or not the right one")

    def _open_token(
        self, oauth: OAuthApp, target: str, port: int, headers: Headers, raw: bytes, problem: Problem | None, url: str
    ) -> Exchange:
        oauth.count_request()
        request = Request(
            method="POST",
            path=target,
            client_port=port,
            headers=headers,
            body=raw,
            authorization=_kind(headers),
            problem=problem,
        )

        def decide() -> Answer:
            if problem is not None:
                return self._refused(problem)
            return oauth.issue(headers.get("Content-Type", ""), raw, audience=url)

        return Exchange(self._inbox, request, decide, self.token_script, oauth.now)

    def _refused(self, problem: Problem) -> Answer:
        headers = {"Content-Type": "application/json"}
        if problem.status == 401:
            headers["WWW-Authenticate"] = 'Basic realm="segment"' if self._oauth is None else "Bearer"
        if problem.status == 405:
            headers["Allow"] = "POST"
        return Answer(problem.status, headers, {"code": problem.code, "message": problem.message})


def _always(answer: Answer) -> Callable[[], Answer]:
    return lambda: answer


def _path(target: str) -> str:
    """What a request is for; a proxy is sent a whole URL."""
    try:
        return urlsplit(target).path if "://" in target else target
    except ValueError:
        return ""


def _kind(headers: Headers) -> AuthorizationKind:
    if "Authorization" not in headers:
        return "none"
    scheme = headers["Authorization"].partition(" ")[0].lower()
    return "basic" if scheme == "basic" else "bearer" if scheme == "bearer" else "other"


def _check_bearer(oauth: OAuthApp, headers: Headers) -> None:
    if _kind(headers) != "bearer":
        raise Refusal(401, "unauthorized", "a Bearer token is needed")
    if not oauth.is_valid(headers["Authorization"].partition(" ")[2].strip()):
        raise Refusal(401, "unauthorized", "the token is unknown, expired or revoked")


def _basic_user(headers: Headers) -> str:
    """The user of a Basic Authorization header, which must have an empty password."""
    if _kind(headers) != "basic":
        raise Refusal(401, "unauthorized", "Basic authorization with the write key as user is needed")
    try:
        text = base64.b64decode(headers["Authorization"].partition(" ")[2].strip(), validate=True).decode()
    except (binascii.Error, ValueError):
        raise Refusal(401, "unauthorized", "the Authorization header is malformed") from None
    user, colon, password = text.partition(":")
    if not colon or password:
        raise Refusal(401, "unauthorized", "the user must be the write key, and the password empty")
    return user
