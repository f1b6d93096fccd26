"""JSON as RFC 8259 has it: no NaN or Infinity, no key twice; with the place of each event in the text."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

_SPACE = re.compile(r"[ \t\n\r]*")


def scan(text: str) -> tuple[Any, list[tuple[int, int]]]:
    """The value of a JSON text, and where in it each element of the top object's `batch` begins and ends.

    Each event is parsed once, and can be measured as it was sent. Raises `ValueError` (a `json.JSONDecodeError` where
    the grammar is broken) or `RecursionError`.
    """
    return _Scanner(text).document()


class _Scanner:
    def __init__(self, text: str) -> None:
        self._text = text
        # A decoder of its own: it keeps a memo of keys, which threads should not share.
        decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
        self._decode = decoder.raw_decode

    def document(self) -> tuple[Any, list[tuple[int, int]]]:
        spans: list[tuple[int, int]] = []
        at = self._skip(0)
        if self._text[at : at + 1] == "{":
            value, at = self._object(at, spans)
        else:
            value, at = self._decode(self._text, at)
        at = self._skip(at)
        if at != len(self._text):
            self._fail("Extra data", at)
        return value, spans

    def _object(self, at: int, spans: list[tuple[int, int]]) -> tuple[dict[str, Any], int]:
        pairs: list[tuple[str, Any]] = []
        at = self._skip(at + 1)
        if self._text[at : at + 1] == "}":
            return {}, at + 1
        while True:
            if self._text[at : at + 1] != '"':
                self._fail("Expecting property name", at)
            key, at = self._decode(self._text, at)
            at = self._skip(self._expect(":", self._skip(at)))
            if key == "batch" and self._text[at : at + 1] == "[":
                value, at = self._array(at, spans)
            else:
                value, at = self._decode(self._text, at)
            pairs.append((key, value))
            at = self._skip(at)
            if self._text[at : at + 1] == "}":
                return _unique(pairs), at + 1
            at = self._skip(self._expect(",", at))

    def _array(self, at: int, spans: list[tuple[int, int]]) -> tuple[list[Any], int]:
        values: list[Any] = []
        at = self._skip(at + 1)
        if self._text[at : at + 1] == "]":
            return values, at + 1
        while True:
            value, end = self._decode(self._text, at)
            values.append(value)
            spans.append((at, end))
            at = self._skip(end)
            if self._text[at : at + 1] == "]":
                return values, at + 1
            at = self._skip(self._expect(",", at))

    def _skip(self, at: int) -> int:
        match = _SPACE.match(self._text, at)
        return match.end() if match else at

    def _expect(self, character: str, at: int) -> int:
        if self._text[at : at + 1] != character:
            self._fail(f"Expecting {character!r}", at)
        return at + 1

    def _fail(self, message: str, at: int) -> NoReturn:
        raise json.JSONDecodeError(message, self._text, at)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice in one object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
