"""What `scripts/bench --profile` does: where the time of a call, of a sender and of a batch goes, as text."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench_fill import fill
from bench_table import machine, servers

from segment_durable import Client
from segment_durable.outbox import Outbox
from segment_durable.upload import Uploader

KEY = "bench-key"
PROPERTIES = {"plan": "Enterprise", "price": 17.9, "currency": "EUR", "items": 3, "path": "/docs/segment/connections"}
MESSAGE = b'{"type":"track","x":"' + b"x" * 410 + b'"}'
CALLS = 100_000
EVENTS = 60_000
STEPS: tuple[tuple[type, str], ...] = (
    (Outbox, "pending"),
    (Outbox, "lease"),
    (Outbox, "joined"),
    (Uploader, "upload"),
    (Outbox, "ack"),
)


def main() -> int:
    print(machine())
    for role, title in (("call", "A call of track(), nothing delivering"), ("sender", "A sender at a backlog")):
        with servers(True) as url, tempfile.TemporaryDirectory(prefix="segment-durable-bench-") as folder:
            fill(folder, EVENTS, MESSAGE, KEY)
            show(title, sampled(role, folder, url))
    print("\nThe steps of a batch of 100, microseconds, median\n")
    alone, beside = batches(calling=False), batches(calling=True)
    print("| step | alone | beside a caller |\n|---|---|---|")
    for name in alone:
        print(f"| {name} | {alone[name]:,.0f} | {beside[name]:,.0f} |")
    return 0


def play(role: str, folder: str, url: str) -> None:
    """What is sampled, in a process of its own."""
    client = Client(KEY, url, outbox_dir=folder, max_queue_size=0, deliver=role == "sender", sync_mode=True)
    if role == "sender":
        client.flush()
        return
    for _ in range(CALLS):
        client.track("f4ca124298", "Signed Up", PROPERTIES)


def sampled(role: str, folder: str, url: str) -> Counter[str]:
    """How often each function was the one at work, threads that wait for something left out."""
    result = Path(folder) / "samples"
    command = [str(Path(sys.executable).with_name("py-spy")), "record", "--rate", "1000", "--function"]
    command += ["--format", "raw", "--output", str(result), "--", sys.executable, __file__, role, folder, url]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"scripts/bench: py-spy could not sample, which may need root:\n{done.stderr}")
    found: Counter[str] = Counter()
    for line in result.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        if any(frame.startswith("play ") for frame in frames):  # and so neither the import nor the thread of upkeep
            found[frames[-1]] += int(count)
    return found


def show(title: str, samples: Counter[str]) -> None:
    total = sum(samples.values())
    print(f"\n{title}\n\n| share | function |\n|---|---|")
    for function, count in samples.most_common(12):
        print(f"| {count / total:.0%} | `{function}` |")


def batches(*, calling: bool) -> dict[str, float]:
    """Medians of what each step of a sender takes, with a thread that calls all the time or with none."""
    with servers(True) as url, tempfile.TemporaryDirectory(prefix="segment-durable-bench-") as folder, timed() as times:
        fill(folder, EVENTS, MESSAGE, KEY)
        client = Client(KEY, url, outbox_dir=folder, max_queue_size=0)
        ended = threading.Event()
        caller = threading.Thread(target=lambda: call_until(client, ended))
        if calling:
            caller.start()
        while client.stats().delivered < EVENTS // 2:
            ended.wait(0.05)
        ended.set()
        if calling:
            caller.join()
        client.shutdown(30)
    return {name: sorted(each)[len(each) // 2] * 1e6 for name, each in sorted(times.items())}


def call_until(client: Client, ended: threading.Event) -> None:
    while not ended.is_set():
        client.track("f4ca124298", "Signed Up", PROPERTIES)


@contextmanager
def timed() -> Iterator[dict[str, list[float]]]:
    times: dict[str, list[float]] = defaultdict(list)
    real = [getattr(owner, name) for owner, name in STEPS]

    def timing(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*args, **named)
            finally:
                times[name].append(time.perf_counter() - started)

        return run

    for (owner, name), method in zip(STEPS, real):
        setattr(owner, name, timing(name, method))
    try:
        yield times
    finally:
        for (owner, name), method in zip(STEPS, real):
            setattr(owner, name, method)


if __name__ == "__main__":
    play(*sys.argv[1:])
