"""kill -9 at random points: nothing that was acknowledged is lost, and the order of each process holds."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from segment_durable import Client
from segment_durable.testing import Hang, Receiver

WRITER = """
import json, sys
import segment_durable as analytics
analytics.write_key, analytics.host, analytics.outbox_dir = "test-key", sys.argv[1], sys.argv[2]
analytics.max_queue_size = 0
analytics.upload_size = 50
analytics.upload_interval = 0.01
name, start = sys.argv[3], int(sys.argv[4])
write = sys.stdout.write
for i in range(start, 1 << 60):
    accepted, message = analytics.track(name, "e", {"i": i}, message_id=f"{name}-{i}")
    if accepted:
        write(f"{i}\\n")
        sys.stdout.flush()
"""


class Writer:
    """A process that tracks as fast as it can and names each event that was acknowledged."""

    def __init__(self, name: str, url: str, outbox: Path) -> None:
        self.name = name
        self.command = [sys.executable, "-c", WRITER, url, str(outbox), name]
        self.acknowledged: list[int] = []
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        # One that was in flight when the process was killed may be in the outbox: go on behind it.
        first = self.acknowledged[-1] + 2 if self.acknowledged else 0
        self.process = subprocess.Popen([*self.command, str(first)], stdout=subprocess.PIPE)

    def wait_for_first(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the writer ended by itself"
        self.acknowledged.append(int(line))

    def kill(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        self.process.send_signal(signal.SIGKILL)
        with self.process:
            lines = self.process.stdout.read().split(b"\n")
        # The last piece has no newline: it is empty, or half a number.
        self.acknowledged += [int(line) for line in lines[:-1]]


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL on Windows")
@pytest.mark.timeout(600)
def test_three_writers_killed_at_random_lose_nothing(tmp_path: Path, long: bool) -> None:
    rounds = 100 if long else 12
    seed = int(os.environ.get("SEGMENT_DURABLE_SEED", "0")) or random.SystemRandom().randrange(1 << 32)
    print(f"SEGMENT_DURABLE_SEED={seed}, {rounds} rounds")
    chance = random.Random(seed)
    outbox = tmp_path / "outbox"
    with Receiver() as receiver:
        writers = [Writer(name, receiver.url, outbox) for name in "abc"]
        for writer in writers:
            writer.start()
        for round_ in range(rounds):
            for writer in writers:
                writer.wait_for_first()
            # Some rounds see a dead host, so that a backlog is there when the processes are killed.
            if round_ % 3 == 1:
                receiver.stop()
            # How long they live is decided by how far one of them gets, not by a clock.
            target = chance.randrange(1, 400)
            while len(writers[0].acknowledged) % 400 != target and chance.random() > 0.005:
                writers[0].wait_for_first()
            chance.shuffle(writers)
            for writer in writers:
                writer.kill()
            if round_ % 3 == 1:
                receiver.start()
            for writer in writers if round_ + 1 < rounds else []:
                writer.start()

        acknowledged = {f"{writer.name}-{i}" for writer in writers for i in writer.acknowledged}
        with Client("test-key", receiver.url, outbox_dir=outbox) as client:
            before = client.stats()
            assert client.flush(60) is True
            stats = client.stats()
        assert stats.balanced
        assert stats.pending == 0
        assert stats.dead == 0
        arrived = [event["messageId"] for event in receiver.unique]
        print(f"{len(acknowledged)} acknowledged, {len(arrived)} arrived, {receiver.duplicates} twice, ", end="")
        print(f"{before.pending} waited at the end, {len(receiver.batches)} batches")
        assert acknowledged - set(arrived) == set()
        assert stats.accepted == len(arrived)
        for writer in writers:
            mine = [int(each.split("-")[1]) for each in arrived if each.startswith(writer.name)]
            assert mine == sorted(mine)
        assert json.loads(receiver.batches[0].body)["writeKey"] == "test-key"


HELPER = """
import sys
import time
import segment_durable as analytics
analytics.write_key, analytics.host, analytics.outbox_dir = "test-key", sys.argv[1], sys.argv[2]
analytics.upload_interval, analytics.thread = float(sys.argv[3]), int(sys.argv[4])
print("ready", flush=True)
for line in sys.stdin:
    for name in line.split():
        analytics.track("u", name, message_id=name)
    print(analytics.flush(), flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL on Windows")
@pytest.mark.parametrize("thread", [1, 3])
@pytest.mark.parametrize("upload_interval", [0.5, 60])
def test_what_a_killed_process_was_sending_is_taken_over_by_an_idle_one_at_its_next_look(
    tmp_path: Path, upload_interval: float, thread: int
) -> None:
    """Within half a second, and not only when a batch could have become full."""
    with Receiver() as receiver:
        settings = [str(upload_interval), str(thread)]
        command = [sys.executable, "-c", HELPER, receiver.url, str(tmp_path / "outbox"), *settings]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes: list[subprocess.Popen[str]] = [subprocess.Popen(command, **pipes) for _ in range(3)]  # type: ignore[call-overload]
        try:
            for number, process in enumerate(processes):
                assert process.stdin is not None
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
                process.stdin.write(f"warm-{number}\n")
                process.stdin.flush()
                assert process.stdout.readline() == "True\n"
            connection = sqlite3.connect(tmp_path / "outbox" / "outbox.db")
            receiver.script(Hang())
            assert processes[0].stdin is not None
            sent = len(receiver.requests)
            processes[0].stdin.write("a b c\n")
            processes[0].stdin.flush()
            assert receiver.wait_for(lambda _: len(receiver.requests) > sent, 30)
            # Mostly it is the one that tracked; another may just have been at the end of its own flush.
            (holder,) = connection.execute("SELECT pid FROM lease").fetchone()
            next(process for process in processes if process.pid == holder).kill()
            killed = time.monotonic()
            assert receiver.wait_for(lambda _: len(receiver.unique) == 6, 30)
            print(f"taken over {time.monotonic() - killed:.2f} s after the kill")
            arrived = [event["event"] for event in receiver.unique][3:]
            assert (arrived if thread == 1 else sorted(arrived)) == ["a", "b", "c"]
            receiver.release()
            connection.close()
        finally:
            for process in processes:
                process.kill()
                process.communicate()
