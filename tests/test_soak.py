"""Hours of ordinary bad luck: processes come, go, fork and die while the receiver fails at random.

Nothing may be lost, and a process that stays through all of it may not grow.  `--soak SECONDS` says how long it runs.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from segment_durable import Client
from segment_durable.testing import Answer, Drop, HalfAnswer, Hang, Receiver

PROCESSES = 8
MEBI = 1 << 20

# Tells each event that was acknowledged; forks now and then, and ends as it was told to, or by a SIGKILL from outside.
WORKER = """
import os, random, sys, threading, time
import segment_durable as analytics

name, url, folder, end, life = *sys.argv[1:5], float(sys.argv[5])
analytics.write_key, analytics.host, analytics.outbox_dir = "test-key", url, folder
analytics.max_queue_size, analytics.upload_size, analytics.upload_interval = 0, 20, 0.05
analytics.timeout, analytics.lease_seconds, analytics.shutdown_timeout = 1, 2, 1
chance = random.Random(name)
pace = threading.Event()  # that nobody sets


def track(count, who):
    for number in range(count):
        message_id = f"{who}-{number}"
        accepted, _ = analytics.track(name, "e", {"n": number}, message_id=message_id)
        if accepted:
            os.write(1, f"{message_id}\\n".encode())
        pace.wait(0.02)


started, round_ = time.monotonic(), 0
while time.monotonic() - started < life:
    round_ += 1
    track(chance.randrange(1, 10), f"{name}.{round_}")
    if chance.random() < 0.1 and end != "stay":
        child = os.fork()
        if child == 0:
            track(3, f"{name}.{round_}.child")
            if chance.random() < 0.5:
                os._exit(0)
            sys.exit(0)
        os.waitpid(child, 0)
    if chance.random() < 0.05:
        analytics.flush(0.1)
    pace.wait(chance.random() / 5)
if end == "shutdown":
    analytics.shutdown(1)
elif end == "abort":
    os._exit(1)
"""


class Worker:
    """A process that tracks, and a thread that keeps what it says was acknowledged."""

    def __init__(self, name: str, url: str, folder: Path, end: str, life: float, said: set[str]) -> None:
        command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", WORKER]
        self.end = end
        self.process = subprocess.Popen([*command, name, url, str(folder), end, str(life)], stdout=subprocess.PIPE)
        self.dies_at = time.monotonic() + life * 0.7
        self._said = said
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.endswith(b"\n"):
                self._said.add(line.decode().strip())

    def has_ended(self) -> bool:
        if self.end == "kill" and time.monotonic() > self.dies_at:
            self.process.kill()
        if self.process.poll() is None:
            return False
        self._listener.join(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        wanted = {"kill": (-signal.SIGKILL, 0), "abort": (1,)}.get(self.end, (0,))
        assert self.process.returncode in wanted, f"{self.end}: {self.process.returncode}"
        return True

    def footprint(self) -> tuple[int, int, int]:
        """Threads, open files and bytes of memory."""
        proc = Path("/proc") / str(self.process.pid)
        pages = int((proc / "statm").read_text().split()[1])
        return (
            len(list((proc / "task").iterdir())),
            len(list((proc / "fd").iterdir())),
            pages * os.sysconf("SC_PAGE_SIZE"),
        )

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(30)
        self._listener.join(30)
        if self.process.stdout is not None:
            self.process.stdout.close()


def make_trouble(receiver: Receiver, chance: random.Random) -> None:
    soon = {"Retry-After": "0.2"}
    faults = [
        *(Answer(status) for status in (408, 500, 503)),
        *(Answer(429, soon), Answer(503, soon, taken=True), Drop(), Drop(after=True), HalfAnswer(), Hang(0.5)),
    ]
    receiver.script(*chance.sample(faults, 2))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads threads, files and memory from Linux's /proc")
@pytest.mark.timeout(0)
def test_processes_come_go_fork_and_die_and_nothing_is_lost_nor_grows(tmp_path: Path, soak_seconds: float) -> None:
    seed = int(os.environ.get("SEGMENT_DURABLE_SEED") or random.SystemRandom().randrange(1 << 30))
    print(f"SEGMENT_DURABLE_SEED={seed}")
    chance = random.Random(seed)
    folder = tmp_path / "outbox"
    said: set[str] = set()
    workers: list[Worker] = []
    born = 0
    with Receiver() as receiver:

        def bear(end: str, life: float) -> Worker:
            nonlocal born
            born += 1
            return Worker(f"w{born}", receiver.url, folder, end, life, said)

        started = time.monotonic()
        resident = bear("stay", soak_seconds)
        quarters: list[tuple[int, int, int]] = []
        try:
            while not resident.has_ended():
                assert time.monotonic() - started < soak_seconds + 120, "the resident process hangs"
                workers = [worker for worker in workers if not worker.has_ended()]
                if len(workers) < PROCESSES - 1 and time.monotonic() - started < soak_seconds - 6:
                    end = chance.choice(["exit", "shutdown", "abort", "kill", "kill"])
                    workers.append(bear(end, 1 + 4 * chance.random()))
                if chance.random() < 0.1:
                    make_trouble(receiver, chance)
                receiver.wait_for(lambda _: False, 0.1)
                elapsed = time.monotonic() - started
                if len(quarters) < 3 and elapsed > soak_seconds / 4 * (len(quarters) + 1):
                    quarters.append(resident.footprint())
                if elapsed < soak_seconds - 1:
                    after = resident.footprint()
            while workers:
                workers = [worker for worker in workers if not worker.has_ended()]
                receiver.wait_for(lambda _: False, 0.05)
        finally:
            for worker in [resident, *workers]:
                worker.stop()
        receiver.heal()
        for _ in range(20):  # what is left of a wait that the receiver asked for
            with Client("test-key", receiver.url, outbox_dir=folder) as client:
                flushed = client.flush(10)
                stats = client.stats()
            if flushed:
                break
        arrived = {event["messageId"] for event in receiver.unique}

    print(f"{born} processes, {len(said)} acknowledged, {len(arrived)} arrived, {receiver.duplicates} twice")
    print(f"threads, files, memory of the one that stayed, after each quarter: {[*quarters, after]}")
    assert said - arrived == set()
    assert len(said) > 10 * soak_seconds
    assert (stats.pending, stats.leased, stats.dead, stats.balanced) == (0, 0, 0, True)
    assert stats.accepted == len(arrived)
    first, half, _ = quarters
    for threads, files, memory in [*quarters, after]:
        assert threads <= first[0]
        assert files <= first[1] + 2, "a connection to the receiver may come and go"
        assert memory < first[2] + 8 * MEBI
    assert after[2] < half[2] + 4 * MEBI
    assert sum(each.stat().st_size for each in folder.iterdir()) < 10 * MEBI
