"""Pages of an outbox's database, as a disk may leave them."""

from __future__ import annotations

import struct
from pathlib import Path

PAGE = 2048


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def leaf_pages(path: Path) -> list[int]:
    """The leaf pages of `event`, in order: its root, page 3, points to them."""
    data = path.read_bytes()
    page = data[2 * PAGE : 3 * PAGE]
    assert page[0] == 5
    cells = struct.unpack(f">{int.from_bytes(page[3:5], 'big')}H", page[12 : 12 + 2 * int.from_bytes(page[3:5], "big")])
    found = [int.from_bytes(page[at : at + 4], "big") for at in (*cells, 8)]
    assert {data[(number - 1) * PAGE] for number in found} == {13}
    return found


def put_leaf(path: Path, source: int, place: int) -> None:
    """Write one of the leaves also to the place of another: both are whole, and SQLite finds no damage."""
    leaves = leaf_pages(path)
    at = (leaves[source] - 1) * PAGE
    overwrite(path, (leaves[place] - 1) * PAGE, path.read_bytes()[at : at + PAGE])


def swap_leaves(path: Path, first: int, second: int) -> None:
    leaves = leaf_pages(path)
    data = path.read_bytes()
    for here, there in ((first, second), (second, first)):
        at = (leaves[there] - 1) * PAGE
        overwrite(path, (leaves[here] - 1) * PAGE, data[at : at + PAGE])
