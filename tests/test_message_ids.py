"""Message ids: what is drawn twice is dropped by the receiver as a duplicate."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from segment_durable import message
from segment_durable.message import new_message_id


@pytest.fixture(autouse=True)
def fresh_pool() -> Iterator[None]:
    yield
    message._forget_pool()  # it may hold what a test has put in the place of random bytes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_does_not_draw_its_parents_message_ids() -> None:
    """Segment would drop its events as duplicates."""
    new_message_id()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, "".join(new_message_id() for _ in range(100)).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, encoding="ascii") as file:
        text = file.read()
    assert os.waitpid(child, 0)[1] == 0
    of_the_child = {text[start : start + 36] for start in range(0, len(text), 36)}
    assert len(of_the_child) == 100
    assert not of_the_child & {new_message_id() for _ in range(100)}


@pytest.mark.parametrize("hook", [True, False])
def test_what_is_drawn_after_a_fork_was_fetched_after_it(monkeypatch: pytest.MonkeyPatch, hook: bool) -> None:
    """Also where the fork was made in C, and where the child of a child has the number of a process that has ended."""
    fetched: list[int] = []

    def urandom(size: int) -> bytes:
        fetched.append(size)
        return os.urandom(size)

    monkeypatch.setattr("segment_durable.message.urandom", urandom)
    message._forget_pool()
    new_message_id()
    new_message_id()
    assert len(fetched) == 1
    if hook:
        message._forget_pool()
    else:
        monkeypatch.setattr("segment_durable.message.getpid", lambda: os.getpid() + 1)
    new_message_id()
    assert len(fetched) == 2


def test_two_copies_of_one_machine_do_not_draw_the_same_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Started from one snapshot of its memory, at another time."""
    monkeypatch.setattr("segment_durable.message.urandom", lambda size: bytes(range(16)) * (size // 16))
    drawn = set()
    for moment in (1_700_000_000_000_000_000, 1_700_000_000_000_001_000):
        message._forget_pool()
        monkeypatch.setattr("segment_durable.message.time_ns", lambda moment=moment: moment)
        drawn.add(new_message_id())
    assert len(drawn) == 2


def test_threads_never_draw_the_same_id() -> None:
    drawn: list[list[str]] = [[] for _ in range(8)]

    def draw(mine: list[str]) -> None:
        mine += [new_message_id() for _ in range(5_000)]

    threads = [threading.Thread(target=draw, args=(mine,)) for mine in drawn]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({each for mine in drawn for each in mine}) == 40_000
