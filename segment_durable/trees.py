"""The tables of a database, read without SQLite as far as their pages make sense.

SQLite ends a query at the first page that does not, and reads nothing at all without the first page of the file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from segment_durable.pages import Broken, Pages

__all__ = ["HIGHEST_ID", "TableRow", "Trees"]

HIGHEST_ID = 1 << 53  # beyond this an id is damaged
_INTERIOR, _LEAF, _INDEX_INTERIOR, _INDEX_LEAF = 5, 13, 2, 10
_LARGEST_PAYLOAD = 1 << 20  # of ours none comes near it: a damaged length is not to be believed
_INTEGER_BYTES = (0, 1, 2, 3, 4, 6, 8)


class TableRow(NamedTuple):
    """One row.  `stray`: its id is not one that could be at that place, so its id or what leads there is damaged."""

    id: int
    values: list[Any]
    stray: bool


class Trees:
    """Reads the tables in `pages`; `broken` counts the pages and the cells that made no sense meanwhile.

    `reached_end`: whether the last table could be read up to its highest id.
    """

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self.broken = 0
        self.reached_end = False

    def rows(self, root: int) -> Iterator[TableRow]:
        """The rows of the table whose tree begins at the page `root`, in order."""
        self.reached_end = False
        for page, start, low, high in self._leaves(root):
            broken = self.broken
            for cell in self._cells(page, start):
                try:
                    length, at = _varint(page, cell)
                    number, at = _varint(page, at)
                    values = _record(self._payload(page, at, length, self._pages.usable - 35))
                except Broken:
                    self.broken += 1
                    continue
                stray = not low <= number <= high
                if stray:
                    self.broken += 1
                else:
                    low = number + 1
                yield TableRow(number, values, stray)
            self.reached_end = high == HIGHEST_ID and self.broken == broken

    def entries(self, root: int) -> Iterator[list[Any]]:
        """The rows of a table WITHOUT ROWID, in no order."""
        seen: set[int] = set()
        waiting = [root]
        while waiting:
            try:
                page, _ = self._node(waiting.pop(), seen, (_INDEX_LEAF, _INDEX_INTERIOR))
            except Broken:
                self.broken += 1
                continue
            inner = page[0] == _INDEX_INTERIOR
            for cell in self._cells(page, 0):
                if inner:
                    waiting.append(_page_number(page, cell))
                try:
                    length, at = _varint(page, cell + 4 * inner)
                    yield _record(self._payload(page, at, length, (self._pages.usable - 12) * 64 // 255 - 23))
                except Broken:
                    self.broken += 1
            if inner:
                waiting.append(_page_number(page, 8))

    def _leaves(self, root: int) -> Iterator[tuple[bytes, int, int, int]]:
        """The leaf pages of a table, in order: the page, where its header is, the lowest and the highest id in it."""
        seen: set[int] = set()
        waiting = [(root, 1, HIGHEST_ID)]
        while waiting:
            number, low, high = waiting.pop()
            try:
                page, start = self._node(number, seen, (_LEAF, _INTERIOR))
            except Broken:
                self.broken += 1
                continue
            if page[start] == _LEAF:
                yield page, start, low, high
                continue
            children = []
            for cell in self._cells(page, start):
                try:
                    key, _ = _varint(page, cell + 4)
                except Broken:
                    key = -1
                if not low <= key <= high:  # damaged: of what is below it the ids are not known to be right
                    self.broken += 1
                    key = low - 1
                children.append((_page_number(page, cell), low, key))
                low = key + 1
            children.append((_page_number(page, start + 8), low, high))
            waiting += reversed(children)

    def _node(self, number: int, seen: set[int], kinds: tuple[int, int]) -> tuple[bytes, int]:
        """A page of a tree, and where its header is: on the first page of the file, behind the header of that."""
        if number in seen:
            raise Broken
        seen.add(number)
        page = self._pages.page(number)
        start = 100 if number == 1 else 0
        if page[start] not in kinds:
            raise Broken
        return page, start

    def _cells(self, page: bytes, start: int) -> list[int]:
        """Where the cells of a page begin."""
        count = int.from_bytes(page[start + 3 : start + 5], "big")
        pointers = start + (12 if page[start] in (_INTERIOR, _INDEX_INTERIOR) else 8)
        end = pointers + 2 * count
        if end > self._pages.usable:
            self.broken += 1
            return []
        cells = [cell for cell in struct.unpack(f">{count}H", page[pointers:end]) if end <= cell < self._pages.usable]
        self.broken += count - len(cells)
        return cells

    def _payload(self, page: bytes, at: int, length: int, largest: int) -> bytes:
        """The payload of `length` bytes that begins there; beyond `largest` it goes on in a chain of pages."""
        usable = self._pages.usable
        if not 0 < length <= _LARGEST_PAYLOAD:
            raise Broken
        local = length
        if length > largest:
            least = (usable - 12) * 32 // 255 - 23
            local = least + (length - least) % (usable - 4)
            local = local if local <= largest else least
        if at + local > usable:
            raise Broken
        parts = [page[at : at + local]]
        missing = length - local
        following = page[at + local : at + local + 4]
        while missing > 0:
            overflow = self._pages.page(int.from_bytes(following, "big"))
            following = overflow[:4]
            parts.append(overflow[4 : min(usable, 4 + missing)])
            missing -= len(parts[-1])
        return b"".join(parts)


def _record(payload: bytes) -> list[Any]:
    """The columns of a row; a text that is not UTF-8 as its bytes."""
    header, at = _varint(payload, 0)
    values: list[Any] = []
    content = header
    while at < header:
        kind, at = _varint(payload, at)
        if kind < 0 or kind in (10, 11):
            raise Broken
        size = (kind - 12) // 2 if kind >= 12 else _INTEGER_BYTES[kind] if kind < 7 else 8 * (kind == 7)
        field = payload[content : content + size]
        content += size
        if content > len(payload):
            raise Broken
        if kind >= 12:
            values.append(_text(field) if kind % 2 else field)
        elif kind == 7:
            values.append(struct.unpack(">d", field)[0])
        elif kind >= 8:
            values.append(kind - 8)
        else:
            values.append(int.from_bytes(field, "big", signed=True) if kind else None)
    return values


def _text(field: bytes) -> str | bytes:
    try:
        return field.decode()
    except UnicodeDecodeError:
        return field


def _page_number(page: bytes, at: int) -> int:
    return int.from_bytes(page[at : at + 4], "big")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins there, and where it ends."""
    value = 0
    try:
        for end in range(at, at + 8):
            byte = data[end]
            value = value << 7 | byte & 0x7F
            if byte < 0x80:
                return value, end + 1
        value = value << 8 | data[at + 8]
    except IndexError:
        raise Broken from None
    return value - (1 << 64) if value >> 63 else value, at + 9
