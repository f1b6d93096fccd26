"""The pages of a database, read without SQLite: those of the file, and over them those that its WAL has committed.

SQLite would recover a WAL, delete that of an empty file, and copy one into the database when the last connection is
closed.  Here nothing is changed, so the WAL can still be told from one that is not this file's.
https://www.sqlite.org/fileformat2.html describes what is read.
"""

from __future__ import annotations

import os
import struct

__all__ = ["Broken", "Pages"]

_MAGIC = b"SQLite format 3\0"
_WAL_HEADER_BYTES, _FRAME_HEADER_BYTES = 32, 24
_WAL_MAGICS = {0x377F0682: "<", 0x377F0683: ">"}  # the byte order of its checksums
_MOST_RESERVED = 32


class Broken(Exception):
    """What was read makes no sense."""


class Pages:
    """The pages of the database in the file `main`, with what the WAL in the file `wal` has committed.

    Both are descriptors, which are only read; None where there is no such file.  `page_size` (bytes) holds where the
    files themselves don't tell.  Raises `OSError` where the disk fails.
    """

    def __init__(self, main: int | None, wal: int | None, page_size: int) -> None:
        self._main, self._wal = main, wal
        self._size, reserved = page_size, 0
        header = b"" if main is None else os.pread(main, 100, 0)
        if header.startswith(_MAGIC) and len(header) == 100:
            self._size = self._plausible(int.from_bytes(header[16:18], "big"))
            reserved = header[20] if header[20] <= _MOST_RESERVED else 0
        self._frames: dict[int, int] = {}  # page number to where its latest content is in the WAL
        self.is_wal_torn = False  # there was more in it, or may have been, that can't be read
        if wal is not None:
            self._read_wal(wal)
        self.usable = self._size - reserved  # bytes of each page
        length = 0 if main is None else os.fstat(main).st_size
        self._count = max([length // self._size, *self._frames])

    @property
    def has_wal(self) -> bool:
        """Whether the WAL has anything to say."""
        return bool(self._frames)

    def page(self, number: int) -> bytes:
        """The first is number 1.  Raises `Broken` if there is none of that number."""
        if not 1 <= number <= self._count:
            raise Broken
        frame = self._frames.get(number)
        if frame is not None and self._wal is not None:
            page = os.pread(self._wal, self._size, frame)
        elif self._main is not None:
            page = os.pread(self._main, self._size, (number - 1) * self._size)
        else:
            page = b""
        if len(page) < self._size:
            raise Broken
        return page

    def _read_wal(self, wal: int) -> None:
        """Find what is committed, as SQLite does: up to the first frame that is not of this WAL, or not whole."""
        header = os.pread(wal, _WAL_HEADER_BYTES, 0)
        if len(header) < _WAL_HEADER_BYTES:
            return
        magic, _, page_size, _, *salts, first, second = struct.unpack(">8I", header)
        order = _WAL_MAGICS.get(magic)
        if order is None or (first, second) != _checksum(header[:24], order, 0, 0):
            self.is_wal_torn = True
            return
        self._size = self._plausible(page_size)
        size = _FRAME_HEADER_BYTES + self._size
        at = _WAL_HEADER_BYTES
        new: dict[int, int] = {}
        while len(frame := os.pread(wal, size, at)) == size:
            number, total, *found, one, two = struct.unpack_from(">6I", frame)
            if found != salts:
                break
            first, second = _checksum(frame[:8], order, first, second)
            first, second = _checksum(frame[_FRAME_HEADER_BYTES:], order, first, second)
            if (one, two) != (first, second):
                self.is_wal_torn = True
                break
            new[number] = at + _FRAME_HEADER_BYTES
            if total:  # the last frame of a transaction
                self._frames.update(new)
                new.clear()
            at += size

    def _plausible(self, size: int) -> int:
        size = 65536 if size == 1 else size
        return size if 512 <= size <= 65536 and size & (size - 1) == 0 else self._size


def _checksum(data: bytes, order: str, first: int, second: int) -> tuple[int, int]:
    words = iter(struct.unpack(f"{order}{len(data) // 4}I", data))
    for one, two in zip(words, words):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + two + first) & 0xFFFFFFFF
    return first, second
