"""Segment's rules for a batch, and the stricter ones that a test wants. Decides on bytes; no input or output."""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeGuard

from segment_durable.testing.records import Problem, Refusal
from segment_durable.testing.strict_json import scan

# Limits of Segment's HTTP API (its public documentation, 2025); each is itself still allowed.
MAX_BODY_BYTES = 500_000
MAX_EVENT_BYTES = 32 * 1024
MAX_EVENTS = 2_500
MAX_MESSAGE_ID_CHARACTERS = 100

EVENT_TYPES = frozenset({"alias", "group", "identify", "page", "screen", "track"})

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_TIMESTAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.\d{1,9})?(?:Z|[+-](?:[01]\d|2[0-3]):?[0-5]\d)", re.ASCII)


@dataclass
class Reading:
    """What could be made of a body, as far as it could be read."""

    body: bytes
    document: dict[str, Any] | None = None
    events: tuple[dict[str, Any], ...] | None = None
    """None: the body is no batch."""
    problem: Problem | None = None


def framing(method: str, headers: Mapping[str, str]) -> tuple[int | None, Problem | None]:
    """The length of a request's body in bytes, and what is wrong with it. None: nobody knows where the body ends."""
    if "Transfer-Encoding" in headers:
        return None, Problem(411, "length_required", "chunked bodies are refused; send Content-Length")
    text = headers.get("Content-Length")
    if text is None:
        if method not in ("POST", "PUT", "PATCH"):
            return 0, None
        return None, Problem(411, "length_required", "send Content-Length")
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        return None, Problem(400, "invalid_length", "Content-Length is not a number of bytes")
    # What counts is the size after gunzip, and gzip can make a body longer: the early refusal leaves it some room.
    limit = MAX_BODY_BYTES * (2 if headers.get("Content-Encoding", "").lower() == "gzip" else 1)
    return int(text), _too_large() if int(text) > limit else None


def read_batch(raw: bytes, headers: Mapping[str, str], *, strict: bool) -> Reading:
    """Read the body of a batch request and find the first rule that it breaks. Raises nothing."""
    reading = Reading(raw)
    try:
        document, events = _read(reading, headers)
        if strict:
            _check_strictly(reading.body, document, events)
    except Refusal as refusal:
        reading.problem = refusal.problem
    return reading


def _read(reading: Reading, headers: Mapping[str, str]) -> tuple[dict[str, Any], tuple[dict[str, Any], ...]]:
    if headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(400, "invalid_content_type", "Content-Type must be application/json")
    encoding = headers.get("Content-Encoding", "identity").lower()
    if encoding == "gzip":
        reading.body = _gunzip(reading.body)
    elif encoding != "identity":
        raise Refusal(400, "invalid_encoding", "Content-Encoding must be gzip or absent")
    if len(reading.body) > MAX_BODY_BYTES:
        reading.body, problem = b"", _too_large()
        raise Refusal(problem.status, problem.code, problem.message)
    try:
        text = reading.body.decode("utf-8")
        document, spans = scan(text)
    except (ValueError, RecursionError) as error:
        # A JSONDecodeError's own text names the place, the others' could quote the payload.
        reason = f": {error}" if isinstance(error, json.JSONDecodeError) else ""
        raise Refusal(400, "invalid_json", f"the body is not valid JSON in UTF-8{reason}") from None
    if not isinstance(document, dict):
        raise Refusal(400, "invalid_body", "the body must be a JSON object")
    reading.document = document
    events = document.get("batch")
    if not isinstance(events, list) or not events:
        raise Refusal(400, "invalid_batch", "the body needs a list `batch` that is not empty")
    for index, event in enumerate(events):
        if not isinstance(event, dict):
            raise Refusal(400, "invalid_event", f"batch[{index}] must be a JSON object")
    reading.events = tuple(events)
    if len(events) > MAX_EVENTS:
        raise Refusal(400, "too_many_events", f"{len(events)} events, at most {MAX_EVENTS} are allowed")
    if len(reading.body) > MAX_EVENT_BYTES:
        _check_sizes(text, spans)
    return document, reading.events


def _check_sizes(text: str, spans: list[tuple[int, int]]) -> None:
    ascii_only = text.isascii()
    for index, (start, end) in enumerate(spans):
        size = end - start if ascii_only else len(text[start:end].encode())
        if size > MAX_EVENT_BYTES:
            raise Refusal(
                400, "event_too_large", f"batch[{index}] has {size} bytes, at most {MAX_EVENT_BYTES} are allowed"
            )


def _gunzip(data: bytes) -> bytes:
    """At most one byte more than the limit is unpacked, so that a bomb costs nothing."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            return file.read(MAX_BODY_BYTES + 1)
    except (OSError, EOFError, zlib.error):
        raise Refusal(400, "invalid_gzip", "the body is not valid gzip") from None


def _too_large() -> Problem:
    return Problem(400, "body_too_large", f"the body is over {MAX_BODY_BYTES} bytes")


def _check_strictly(body: bytes, document: dict[str, Any], events: tuple[dict[str, Any], ...]) -> None:
    if _SURROGATE_ESCAPE.search(body):
        try:
            json.dumps(document, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise Refusal(400, "invalid_text", "half of a surrogate pair is no character") from None
    _check_time(document, "sentAt", "")
    for index, event in enumerate(events):
        _check_event(event, f"batch[{index}].")


def _check_event(event: dict[str, Any], place: str) -> None:
    kind = event.get("type")
    if not isinstance(kind, str) or kind not in EVENT_TYPES:
        raise Refusal(400, "invalid_type", f"{place}type must be one of {', '.join(sorted(EVENT_TYPES))}")
    message_id = event.get("messageId")
    if not _is_text(message_id) or len(message_id) > MAX_MESSAGE_ID_CHARACTERS:
        raise Refusal(
            400, "invalid_message_id", f"{place}messageId must be text of 1 to {MAX_MESSAGE_ID_CHARACTERS} characters"
        )
    if not _is_text(event.get("userId")) and not _is_text(event.get("anonymousId")):
        raise Refusal(400, "missing_id", f"{place}userId or {place}anonymousId must be text that is not empty")
    if kind == "track" and not _is_text(event.get("event")):
        raise Refusal(400, "missing_event_name", f"{place}event must be text that is not empty")
    required = {"group": ("groupId",), "alias": ("userId", "previousId")}.get(kind, ())
    for name in required:
        if not _is_text(event.get(name)):
            raise Refusal(400, "missing_id", f"{place}{name} must be text that is not empty")
    for name in ("traits", "properties", "context", "integrations"):
        if not isinstance(event.get(name, {}), dict):
            raise Refusal(400, "invalid_event", f"{place}{name} must be an object")
    _check_time(event, "timestamp", place)


def _check_time(owner: dict[str, Any], key: str, place: str) -> None:
    value = owner.get(key)
    match = _TIMESTAMP.fullmatch(value) if isinstance(value, str) else None
    try:
        if match is None:
            raise ValueError
        datetime.fromisoformat(match[1])
    except ValueError:
        code = "invalid_sent_at" if key == "sentAt" else "invalid_timestamp"
        raise Refusal(400, code, f"{place}{key} must be an ISO 8601 time with a zone") from None


def _is_text(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value)
