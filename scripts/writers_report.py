"""What `scripts/writers` does.  A writer is a process of its own: `writers_report.py ROLE FOLDER URL SECONDS`."""

from __future__ import annotations

import argparse
import atexit
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

from bench_table import machine, servers

PROCESSES = 8
RATE = 150  # events a second of each process, with delivery on
THREADS = 16
BACKLOG = 1_000_000
KEY = "writers-key"
PROPERTIES = {"plan": "Enterprise", "price": 17.9, "currency": "EUR", "path": "/docs/segment/connections/sources"}


def main() -> int:
    if len(sys.argv) == 5 and sys.argv[1] in (*ROLES, "backlog"):
        return play(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]))
    parser = argparse.ArgumentParser(prog="scripts/writers", description="Report how writers share an outbox.")
    parser.add_argument("--seconds", type=float, default=10, help="for each of the three parts (10)")
    parser.add_argument("--rounds", type=int, default=1, help="of which the medians are printed (1)")
    parser.add_argument("--only", choices=[part.__name__ for part in PARTS], help="one part")
    parser.add_argument("--sync-ms", type=float, default=0, help="each sync takes so much longer, as on a slower disk")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if options.sync_ms:
        slow_down(options.sync_ms)
    found: dict[str, Any] = {"date": str(date.today()), "machine": machine(), "seconds": options.seconds}
    found["sync_ms"], found["rounds"] = options.sync_ms, options.rounds
    for part in PARTS:
        if options.only not in (None, part.__name__):
            continue
        rounds = []
        for number in range(options.rounds):
            if not options.json:
                print(f"... {part.__doc__} ({number + 1}/{options.rounds})", file=sys.stderr, flush=True)
            rounds.append(part(options.seconds))
        found[part.__name__] = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    print(json.dumps(found) if options.json else table(found))
    return 0


def slow_down(milliseconds: float) -> None:
    """Of all writers that are started from now on."""
    folder = tempfile.mkdtemp(prefix="segment-durable-writers-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library = Path(folder) / "slow_sync.so"
    source = Path(__file__).with_name("slow_sync.c")
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    except (OSError, subprocess.CalledProcessError) as problem:
        sys.exit(f"scripts/writers: --sync-ms needs Linux and a C compiler: {problem}")
    os.environ.update(LD_PRELOAD=str(library), SLOW_SYNC_US=str(round(milliseconds * 1000)))


def full_speed(seconds: float) -> dict[str, float]:
    """Eight processes at full speed, nothing delivering."""
    results = run(["fast"] * PROCESSES, "", seconds)
    rates = sorted(len(each["waits"]) / seconds for each in results)
    waits = sorted(wait for each in results for wait in each["waits"])
    return {
        "refused": sum(each["refused"] for each in results),
        "events_a_second": sum(rates),
        "slowest_to_fastest": rates[0] / rates[-1],
        **spread(waits),
    }


def with_delivery(seconds: float) -> dict[str, float]:
    """Eight processes at 150 events a second each, with delivery on."""
    with servers(True) as url:
        results = run(["paced"] * PROCESSES, url, seconds)
    waits = sorted(wait for each in results for wait in each["waits"])
    return {
        "refused": sum(each["refused"] for each in results),
        "events_a_second": len(waits) / seconds,
        **spread(waits),
    }


def groups(seconds: float) -> dict[str, float]:
    """Threads that commit in groups, synchronous=FULL."""
    (one,) = run(["one_thread"], "", seconds / 2)
    (many,) = run(["threads"], "", seconds / 2)
    rates = {"one_thread": len(one["waits"]) / (seconds / 2), "sixteen": len(many["waits"]) / (seconds / 2)}
    return {**rates, "ratio": rates["sixteen"] / rates["one_thread"]}


def big_backlog(_: float) -> dict[str, float]:
    """A backlog of 1,000,000 is delivered and its space given back, while a thread tracks 150 events a second."""
    with servers(True) as url:
        (result,) = run(["backlog"], url, 300)
    delivering, shrinking = sorted(result["waits"]), sorted(result["later_waits"])
    return {
        **{name: result[name] for name in ("delivered_in", "small_in", "mebibytes")},
        **spread(sorted(delivering + shrinking)),
        "worst_delivering_ms": delivering[-1] * 1e3,
        "worst_shrinking_ms": shrinking[-1] * 1e3,
    }


def spread(waits: list[float]) -> dict[str, float]:
    """Milliseconds."""
    return {
        "p50_ms": waits[len(waits) // 2] * 1e3,
        "p99_ms": waits[len(waits) * 99 // 100] * 1e3,
        "p999_ms": waits[len(waits) * 999 // 1000] * 1e3,
        "worst_ms": waits[-1] * 1e3,
    }


def run(roles: list[str], url: str, seconds: float) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="segment-durable-writers-") as folder:
        writers = [
            subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), role, folder, url, str(seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for role in roles
        ]
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n", "a writer ended early"
        for writer in writers:  # all are up: begin
            assert writer.stdin is not None
            writer.stdin.write("go\n")
            writer.stdin.flush()
        return [json.loads(writer.communicate(timeout=seconds + 120)[0]) for writer in writers]


def play(role: str, folder: str, url: str, seconds: float) -> int:
    from segment_durable import Client

    if role == "backlog":
        return deliver_backlog(folder, url, seconds)
    threads, rate, settings = ROLES[role]
    host = url or "http://127.0.0.1:9"
    client = Client(KEY, host, outbox_dir=folder, max_queue_size=0, deliver=bool(url), **settings)
    client.track("f4ca124298", "Signed Up", PROPERTIES)
    print("ready", flush=True)
    sys.stdin.readline()
    waits: list[list[float]] = [[] for _ in range(threads)]
    refused = [0] * threads
    end = time.perf_counter() + seconds

    def work(number: int) -> None:
        due = time.perf_counter()
        while (began := time.perf_counter()) < end:
            if rate and began < due:
                time.sleep(min(due - began, end - began))
                continue
            due += 1 / rate if rate else 0
            began = time.perf_counter()
            accepted, _ = client.track("f4ca124298", "Signed Up", PROPERTIES)
            waits[number].append(time.perf_counter() - began)
            refused[number] += not accepted

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    client.shutdown(30 if url else None)  # a number waits for another process to deliver
    print(json.dumps({"waits": [wait for each in waits for wait in each], "refused": sum(refused)}))
    return 0


def deliver_backlog(folder: str, url: str, seconds: float) -> int:
    from bench_fill import fill

    from segment_durable import Client

    fill(folder, BACKLOG, b'{"type":"track","event":"e","userId":"u","messageId":"m","x":"' + b"x" * 360 + b'"}', KEY)
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    client = Client(KEY, url, outbox_dir=folder, max_queue_size=0)
    waits: list[float] = []
    later_waits: list[float] = []  # after the backlog has left, while space is given back
    delivered_in = 0.0
    while (elapsed := time.perf_counter() - started) < seconds:
        began = time.perf_counter()
        client.track("f4ca124298", "Signed Up", PROPERTIES)
        (later_waits if delivered_in else waits).append(time.perf_counter() - began)
        if (len(waits) + len(later_waits)) % 15 == 0:
            stats = client.stats()
            if stats.pending < RATE and not delivered_in:
                delivered_in = elapsed
            if delivered_in and stats.size_on_disk < 10 << 20:
                break
        time.sleep(1 / RATE)
    found = {
        "delivered_in": delivered_in,
        "small_in": time.perf_counter() - started,
        "mebibytes": client.stats().size_on_disk / (1 << 20),
    }
    client.shutdown(30)
    print(json.dumps({"waits": waits, "later_waits": later_waits, **found}))
    return 0


# threads, events a second of each (0: as fast as it goes), settings
ROLES: dict[str, tuple[int, float, dict[str, Any]]] = {
    "fast": (1, 0, {}),
    "paced": (1, RATE, {}),
    "one_thread": (1, 0, {"synchronous": "FULL"}),
    "threads": (THREADS, 0, {"synchronous": "FULL"}),
}


def table(found: dict[str, Any]) -> str:
    slower = f", each sync {found['sync_ms']:g} ms longer" if found["sync_ms"] else ""
    lines = [
        f"{found['date']}, {found['machine']}; {found['seconds']:g} s each, medians of {found['rounds']}{slower}",
        "",
        "| writers | events/s | a call | refused | |",
        "|---|---|---|---|---|",
    ]
    columns = "p50 {p50_ms:.2f}, p99 {p99_ms:.2f}, p99.9 {p999_ms:.2f}, worst {worst_ms:.0f} ms"
    for part, line in LINES.items():
        if part in found:
            lines.append(line.replace("{a_call}", columns).format(**found[part]))
    return "\n".join(lines)


PARTS = (full_speed, with_delivery, groups, big_backlog)
LINES = {
    "full_speed": "| eight processes at full speed | {events_a_second:,.0f} | {a_call} | {refused:.0f} "
    "| slowest {slowest_to_fastest:.2f} of the fastest |",
    "with_delivery": "| eight processes, 150 events/s each, delivered | {events_a_second:,.0f} | {a_call} "
    "| {refused:.0f} | |",
    "groups": "| FULL, 16 threads | {sixteen:,.0f} | | | {ratio:.1f} times one thread's {one_thread:,.0f} |",
    "big_backlog": "| one thread, 150 events/s, behind a backlog of 1,000,000 | | {a_call} | | delivered in "
    "{delivered_in:.0f} s, {mebibytes:.0f} MiB after {small_in:.0f} s; worst {worst_delivering_ms:.0f} ms while it is "
    "delivered, {worst_shrinking_ms:.0f} ms while space is given back |",
}

if __name__ == "__main__":
    sys.exit(main())
