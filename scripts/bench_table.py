"""What `scripts/bench` does: runs the cases in turns and prints the table."""

from __future__ import annotations

import argparse
import json
import platform
import sqlite3
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
OURS, UPSTREAM = "ours", "upstream"
NAMES = {UPSTREAM: "segment-analytics-python"}
LIBRARIES = (UPSTREAM, "persist-queue", "litequeue")


@dataclass(frozen=True)
class Row:
    """One line of the table: a case of `bench_cases.py`, and what is set against it."""

    title: str
    case: str
    against: str  # a library, or another case of ours
    unit: str
    more_is_better: bool
    receiver: bool = False


ROWS = [
    Row("track() alone, nothing delivering", "track", UPSTREAM, "us", False),
    Row("... against a bare one-row commit", "track", "floor_commit", "us", False),
    Row("... against a row of a bare insert of 100", "track", "floor_insert_100", "us", False),
    Row("... against orjson alone", "track", "floor_orjson", "us", False),
    Row("... with 10,000 waiting", "track:10000", "track", "us", False),
    Row("... with 1,000,000 waiting", "track:1000000", "track", "us", False),
    Row("track() alone, synchronous=FULL", "track_full", "floor_commit_full", "us", False),
    Row("... by 16 threads", "full_threads:16", "full_threads:1", "events/s", True),
    Row("tracked and delivered, one caller", "end_to_end_1", UPSTREAM, "events/s", True, True),
    Row("tracked and delivered, eight threads", "end_to_end_8", UPSTREAM, "events/s", True, True),
    Row("tracked by eight processes", "processes:8", "processes:1", "events/s", True),
    Row("CPU for a million events, one caller", "cpu", UPSTREAM, "s", False, True),
    Row("a backlog of 100,000 delivered", "backlog", UPSTREAM, "events/s", True, True),
    Row("... against bare posts of 100", "backlog", "floor_post", "events/s", True, True),
    Row("put into the queue", "put", "persist-queue", "us", False),
    Row("put into the queue", "put", "litequeue", "us", False),
    Row("get and ack", "get_and_ack", "persist-queue", "us", False),
    Row("get and ack", "get_and_ack", "litequeue", "us", False),
    Row("memory for each queued event", "memory", UPSTREAM, "bytes", False),
    Row("bytes written for each byte of an event", "written", "floor_written", "bytes", False),
    Row("an outbox with 1,000,000 events opened", "open:1000000", "open:0", "ms", False),
    Row("import", "import", UPSTREAM, "ms", False),
    Row("from the import to the end of a first call", "start", UPSTREAM, "ms", False),
    Row("a core while nothing is tracked", "idle", UPSTREAM, "%", False, True),
]


@dataclass
class Result:
    title: str
    unit: str
    ours: float
    other: float
    against: str
    ratio: float  # over 1: ours is better
    worst: float
    best: float
    rounds: int


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measure, in pairs, and print a table.")
    parser.add_argument("rows", nargs="*", help="cases to run, such as track or end_to_end_1; all without any")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of runs for each row (7)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plots", action="store_true", help="make the plots of docs/performance.md instead")
    parser.add_argument("--profile", action="store_true", help="show where the time goes instead")
    options = parser.parse_args()
    if options.profile:
        import bench_profile

        return bench_profile.main()
    if options.plots:
        import bench_plots

        return bench_plots.main(options.rounds)
    rows = [row for row in ROWS if not options.rows or row.case in options.rows]
    if not rows:
        parser.error(f"there are {', '.join(sorted({row.case for row in ROWS}))}")
    results = []
    for number, row in enumerate(rows, 1):
        results.append(measure(row, options.rounds, f"[{number}/{len(rows)}] {row.title}"))
    if options.json:
        print(json.dumps({"date": str(date.today()), "machine": machine(), "rows": [asdict(r) for r in results]}))
    else:
        show(results, options.rounds)
    return 0


def measure(row: Row, rounds: int, label: str) -> Result:
    ours, other, ratios = [], [], []
    for round_ in range(rounds):
        progress(label, round_, rounds)
        with servers(row.receiver) as url:
            mine = run(row.case, OURS, url)
        with servers(row.receiver) as url:
            pair = (row.case, row.against) if row.against in LIBRARIES else (row.against, OURS)
            theirs = run(*pair, url)
        ours.append(mine)
        other.append(theirs)
        ratios.append(mine / theirs if row.more_is_better else theirs / mine)
    progress(label, rounds, rounds)
    against = NAMES.get(row.against, row.against)
    medians = statistics.median(ours), statistics.median(other), statistics.median(ratios)
    return Result(row.title, row.unit, medians[0], medians[1], against, medians[2], min(ratios), max(ratios), rounds)


@contextmanager
def servers(needed: bool) -> Iterator[str]:
    if not needed:
        yield ""
        return
    process = subprocess.Popen([sys.executable, str(HERE / "bench_receiver.py")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


def run(case: str, library: str, url: str) -> float:
    with tempfile.TemporaryDirectory(prefix="segment-durable-bench-") as folder:
        command = [sys.executable, str(HERE / "bench_cases.py"), case, library, url, folder]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            sys.exit(f"scripts/bench: {case} with {library} failed:\n{done.stderr}")
        return float(done.stdout)


def progress(label: str, done: int, of: int) -> None:
    if sys.stderr.isatty():
        bar = "#" * (20 * done // of)
        print(f"\r{label[:60]:<60} [{bar:<20}]", end="\n" if done == of else "", file=sys.stderr, flush=True)


def machine() -> str:
    system = f"{platform.system()} {platform.machine()}"
    return f"{system}, CPython {platform.python_version()}, SQLite {sqlite3.sqlite_version}"


def show(results: list[Result], rounds: int) -> None:
    print(f"{date.today()}, {machine()}; medians of {rounds} interleaved pairs; a ratio over 1 means ours is better\n")
    print("| | ours | against | | ratio (worst to best) |")
    print("|---|---|---|---|---|")
    for each in results:
        print(
            f"| {each.title} | {number(each.ours)} {each.unit} | {each.against} | {number(each.other)} {each.unit} "
            f"| **{each.ratio:.2f}** ({each.worst:.2f} to {each.best:.2f}) |"
        )


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"
