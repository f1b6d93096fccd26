"""Several processes that track and deliver at the same time: events arrive in the order in which they were appended.

Of whatever process they are.  How that order is known: each process numbers its event and appends it while it has a
lock that all share.  The number is written down before the event is appended, so a kill in between leaves a gap and
never the same number twice.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from segment_durable import Client
from segment_durable.testing import Delay, Hang, Honest, Receiver

WRITER = """
import fcntl, os, sys, threading
import segment_durable as analytics

analytics.write_key, analytics.host, analytics.outbox_dir = "test-key", sys.argv[1], sys.argv[2]
analytics.max_queue_size, analytics.upload_size, analytics.upload_interval = 0, 20, 0.01
numbers, end = os.open(sys.argv[3], os.O_RDWR), sys.argv[4]
pace = threading.Event()  # that nobody sets: what is delivered keeps up with what is tracked
is_first = True
while not os.path.exists(end):
    fcntl.flock(numbers, fcntl.LOCK_EX)
    number = int(os.pread(numbers, 20, 0)) + 1
    os.pwrite(numbers, b"%020d" % number, 0)
    accepted, _ = analytics.track(f"process {os.getpid()}", "e", {"n": number}, message_id=f"m-{number}")
    fcntl.flock(numbers, fcntl.LOCK_UN)
    os.write(1, b"%d\\n" % number if accepted else b"refused\\n")
    if is_first:
        sys.stdin.readline()
        is_first = False
    pace.wait(0.001)
sys.exit(0 if analytics.flush(60) else 3)
"""


# An answer that comes late lets a sender that didn't wait for its turn get ahead.
SLOW = [Delay(0.02), Honest(), Honest()]


def sender(folder: Path) -> int:
    """The process that has the only lease."""
    with contextlib.closing(sqlite3.connect(f"file:{folder / 'outbox.db'}?mode=ro", uri=True)) as connection:
        ((pid,),) = connection.execute("SELECT pid FROM lease").fetchall()
    assert isinstance(pid, int)
    return pid


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL on Windows")
@pytest.mark.parametrize("taken", [True, False], ids=["taken", "not taken"])
def test_events_of_three_delivering_processes_arrive_as_they_were_appended_although_one_is_killed(
    receiver: Receiver, tmp_path: Path, taken: bool
) -> None:
    """Killed in the middle of an upload, whose events had arrived or had not."""
    folder, numbers, end = tmp_path / "outbox", tmp_path / "numbers", tmp_path / "end"
    numbers.write_bytes(b"%020d" % 0)
    said = [tmp_path / f"said-{number}" for number in range(3)]
    command = [sys.executable, "-c", WRITER, receiver.url, str(folder), str(numbers), str(end)]
    writers: list[subprocess.Popen[bytes]] = []
    try:
        for path in said:
            with path.open("wb") as file:
                writers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file))
        assert receiver.wait_for(3, 60), "one event of each"
        before = len(receiver.requests)
        receiver.script(*SLOW * 20, Hang(taken=taken), *SLOW * 200)
        for each in writers:
            assert each.stdin is not None
            each.stdin.write(b"go on\n")
            each.stdin.close()
        assert receiver.wait_for(lambda _: len(receiver.requests) > before + 20 * len(SLOW), 60)
        held = receiver.batches[-1]
        assert held.status is None
        (killed,) = [each for each in writers if each.pid == sender(folder)]
        killed.kill()
        killed.wait(30)
        assert receiver.wait_for(lambda _: receiver.batches[-1].taken and receiver.batches[-1].status == 200, 30)
        receiver.release()
        assert receiver.wait_for(len(receiver.unique) + 300, 30)

        end.touch()
        assert [each.wait(90) for each in writers if each is not killed] == [0, 0]
    finally:
        for each in writers:
            each.kill()
            each.wait(30)

    with Client("test-key", receiver.url, outbox_dir=folder) as client:
        assert client.flush(60)
        stats = client.stats()
    arrived = [event["properties"]["n"] for event in receiver.unique]
    assert arrived == sorted(arrived)
    # The killed one may have got half of its last line out, or none of it.
    acknowledged = {int(line) for path in said for line in path.read_bytes().split(b"\n")[:-1]}
    assert acknowledged <= set(arrived)
    assert stats.balanced
    assert (stats.pending, stats.leased, stats.dead) == (0, 0, 0)
    assert stats.accepted == stats.delivered == len(arrived)
    of_each = Counter(event["userId"] for event in receiver.unique)
    assert len(of_each) == 3
    assert min(of_each.values()) > 10
    assert receiver.duplicates == (len(held.events) if taken else 0)
    assert not receiver.errors
