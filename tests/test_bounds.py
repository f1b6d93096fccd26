"""A backlog of a million events costs neither memory nor time: what a call does, it does in so many steps."""

from __future__ import annotations

import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from segment_durable.outbox import Outbox
from segment_durable.records import Lease
from segment_durable.testing import Receiver
from segment_durable.testing.clock import FakeClock

FEW, MANY = 1_000, 1_000_000
MEBI = 1 << 20


def fill(folder: Path, count: int) -> Path:
    """An outbox with so many events: written at once, for by puts it would take a minute."""
    Outbox(folder, FakeClock(), write_key="test-key").close()
    body = b'{"type":"track","event":"e","userId":"u","messageId":"m","properties":{"text":"%s"}}' % (b"x" * 80)
    with closing(sqlite3.connect(folder / "outbox.db", isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous=OFF")
        connection.execute(
            "WITH RECURSIVE number(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < ?) "
            "INSERT INTO event SELECT n, 1, ? FROM number",
            (count, body),
        )
    return folder


@pytest.fixture(scope="module")
def outboxes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Path]]:
    """One with no event, one with a few and one with many.

    The tests use the same ones; the last takes more out of the many than there are in the few.
    """
    base = tmp_path_factory.mktemp("bounds")
    yield {count: fill(base / str(count), count) for count in (0, FEW, MANY)}
    shutil.rmtree(base)


# -- steps


class Watch:
    """Counts the steps of SQLite's virtual machine on all connections that are made, and keeps the statements."""

    def __init__(self) -> None:
        self.statements: list[str] = []
        self.steps = 0
        self._connect = sqlite3.connect

    def connect(self, *arguments: Any, **named: Any) -> sqlite3.Connection:
        connection = self._connect(*arguments, **named)
        connection.set_progress_handler(self._step, 1)
        connection.set_trace_callback(self.statements.append)
        return connection

    def _step(self) -> None:
        self.steps += 1

    def count(self, call: Callable[[], Any]) -> tuple[int, Any]:
        """How many steps the call took, and what it returned."""
        before = self.steps
        result = call()
        return self.steps - before, result


def use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, int], list[str]]:
    """Everything that putting and delivering ask of an outbox: the steps of each call, and all statements."""
    watch = Watch()
    clock = FakeClock()
    steps: dict[str, int] = {}
    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", watch.connect)
        steps["open"], outbox = watch.count(lambda: Outbox(folder, clock, write_key="test-key"))
        with closing(outbox):
            last = outbox.last_id()
            steps["put"], accepted = watch.count(lambda: outbox.put(b"{}", 1, 2 * MANY))
            assert accepted
            steps["put at the limit"], accepted = watch.count(lambda: outbox.put(b"{}", 1, 5))
            assert not accepted
            steps["lease"], lease = watch.count(lambda: outbox.lease(400, 60, batch=100))
            assert isinstance(lease, Lease)
            steps["joined"], joined = watch.count(lambda: outbox.joined(lease.first, lease.last, 100))
            assert joined[0] == 100
            steps["rows"], rows = watch.count(lambda: outbox.rows(lease.first, lease.last, 10_000))
            assert rows[0].id == lease.first
            steps["extend"], lease = watch.count(lambda: outbox.extend(lease, 60))
            steps["ack"], acknowledged = watch.count(lambda: outbox.ack(lease, lease.first + 99))
            assert acknowledged == 100
            steps["stats"], stats = watch.count(outbox.stats)
            assert (stats.leased, stats.accepted) == (300, last + 1)
            steps["lease, while there is one"], _ = watch.count(lambda: outbox.lease(100, 60))
            steps["release"], released = watch.count(lambda: outbox.release(lease))
            assert released
            steps["lease of the dead"], lease = watch.count(lambda: outbox.lease(100, 60))
            clock.advance(61)
            steps["takeover"], lease = watch.count(lambda: outbox.lease(10, 60))
            assert isinstance(lease, Lease)
            steps["ack of all"], acknowledged = watch.count(lambda: outbox.ack(lease, lease.last))
            assert acknowledged == 10
            steps["load"], _ = watch.count(outbox.load)
            steps["expire"], expired = watch.count(lambda: outbox.expire(0))
            assert expired == []
    return steps, watch.statements


def test_what_a_call_does_takes_as_many_steps_however_many_events_there_are(
    outboxes: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    few, _ = use(outboxes[FEW], monkeypatch)
    many, _ = use(outboxes[MANY], monkeypatch)
    print(many)
    assert min(few.values()) > 0
    assert many == few


def is_scan(step: str) -> bool:
    return re.match(r"SCAN (TABLE )?(event|dead)\b", step) is not None


def test_no_statement_scans_the_events(outboxes: dict[int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at apart: to SQLite's virtual machine a count of all rows is one step."""
    _, statements = use(outboxes[FEW], monkeypatch)
    queries = {each for each in statements if re.match(r"\s*(SELECT|INSERT|UPDATE|DELETE|WITH)", each)}
    assert len(queries) > 20
    with closing(sqlite3.connect(outboxes[FEW] / "outbox.db")) as connection:
        for each in queries:
            plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {each}")]
            if not re.search(r"\bLIMIT \d+\s*$", each):  # with that it is a look at the first ones
                assert not any(map(is_scan, plan)), (each, plan)
        ((_, _, _, step),) = connection.execute("EXPLAIN QUERY PLAN SELECT count(*) FROM event")
        assert is_scan(step), "or this test could not fail"


# -- memory

DELIVER = """
import re, sys, threading
from pathlib import Path
from segment_durable import Client

done, batches = threading.Event(), 0


def count(_):
    global batches
    batches += 1
    if batches == int(sys.argv[3]):
        done.set()


client = Client("test-key", sys.argv[1], outbox_dir=sys.argv[2], max_queue_size=0, on_success=count, deliver=False)
assert client.track("u", "one more")[0]
client.shutdown(0)
client = Client("test-key", sys.argv[1], outbox_dir=sys.argv[2], max_queue_size=0, on_success=count)
assert done.wait(60)
assert client.stats().balanced
print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
client.shutdown(0)
"""


def peak(receiver: Receiver, folder: Path, batches: int) -> int:
    """Bytes of memory that a process had at most which opened the outbox, put one event and delivered."""
    command = [sys.executable, "-c", DELIVER, receiver.url, str(folder), str(batches)]
    return 1024 * int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=100).stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from Linux's /proc")
def test_memory_does_not_grow_with_the_backlog(outboxes: dict[int, Path]) -> None:
    with Receiver(strict=False) as receiver:
        none, many = peak(receiver, outboxes[0], 1), peak(receiver, outboxes[MANY], 50)
        assert len(receiver.events) > 50 * 100
    print(f"{none / MEBI:.1f} MiB with no event, {many / MEBI:.1f} MiB with {MANY:,}")
    assert many < none + 20 * MEBI
