"""One measurement in a fresh process: `bench_cases.py CASE LIBRARY URL FOLDER` prints one number."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_fill import fill

CASE, LIBRARY, URL, FOLDER = sys.argv[1:]
CASE, _, SIZE = CASE.partition(":")  # "track:1000000" is track with that backlog
HOST = URL or "http://127.0.0.1:9"
# About 430 bytes a message, as a page view or an order has.
PROPERTIES = {
    "plan": "Enterprise",
    "price": 17.9,
    "currency": "EUR",
    "items": 3,
    "path": "/docs/segment/connections/sources",
    "referrer": "https://www.example.com/search",
}
MESSAGE = b"x" * 430


def client(**settings: Any) -> Any:
    if LIBRARY == "upstream":
        from segment.analytics.client import Client
    else:
        from segment_durable import Client

        settings.setdefault("outbox_dir", FOLDER)
    return Client("bench-key", host=HOST, **settings)


def idle_client(**settings: Any) -> Any:
    """A client that takes events and delivers none."""
    return client(**settings, **({"thread": 0} if LIBRARY == "upstream" else {"deliver": False}))


def track() -> float:
    """Microseconds for a call, at default settings but for the limit, and with SIZE events waiting already."""
    if SIZE:
        fill(FOLDER, int(SIZE), MESSAGE, "bench-key")
    return per_call(idle_client(max_queue_size=int(SIZE or 0) + 10_000))


def track_full() -> float:
    return per_call(idle_client(synchronous="FULL"), 2000)


def full_threads() -> float:
    """Events a second with synchronous=FULL, by SIZE threads."""
    threads, count = int(SIZE), 4000
    analytics = idle_client(synchronous="FULL", max_queue_size=0)
    analytics.track("f4ca124298", "Signed Up", PROPERTIES)

    def work() -> None:
        for _ in range(count // threads):
            analytics.track("f4ca124298", "Signed Up", PROPERTIES)

    return count / in_threads(work, threads)


def in_threads(work: Callable[[], None], threads: int) -> float:
    """Seconds that so many threads take for that, this one among them."""
    workers = [threading.Thread(target=work) for _ in range(threads - 1)]
    started = time.perf_counter()
    for worker in workers:
        worker.start()
    work()
    for worker in workers:
        worker.join()
    return time.perf_counter() - started


def per_call(analytics: Any, count: int = 9000) -> float:
    for _ in range(500):
        analytics.track("f4ca124298", "Signed Up", PROPERTIES)
    started = time.perf_counter()
    for _ in range(count):
        ok, _ = analytics.track("f4ca124298", "Signed Up", PROPERTIES)
    seconds = time.perf_counter() - started
    assert ok
    return seconds / count * 1e6


def end_to_end_1() -> float:
    return end_to_end(1)


def end_to_end_8() -> float:
    return end_to_end(8)


def end_to_end(threads: int, count: int = 40_000) -> float:
    """Events a second from the first call to the end of flush()."""
    analytics = client(max_queue_size=count, upload_size=int(SIZE or 100))
    analytics.track("f4ca124298", "Signed Up", PROPERTIES)
    analytics.flush()

    def work() -> None:
        for _ in range(count // threads):
            analytics.track("f4ca124298", "Signed Up", PROPERTIES)

    seconds = in_threads(work, threads)
    started = time.perf_counter()
    analytics.flush()
    return count / (seconds + time.perf_counter() - started)


def processes(count: int = 10_000) -> float:
    """Events a second of SIZE processes on one outbox that track at the same time."""
    command = [sys.executable, __file__, "writer", LIBRARY, URL, FOLDER]
    writers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(int(SIZE))
    ]
    for each in writers:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    started = time.perf_counter()
    for each in writers:
        assert each.stdin is not None
        each.stdin.write(f"{count}\n")
        each.stdin.flush()
    for each in writers:
        assert each.stdout is not None
        assert each.stdout.readline() == "done\n"
    seconds = time.perf_counter() - started
    for each in writers:
        each.communicate()
    return count * len(writers) / seconds


def writer() -> float:
    """One of `processes`."""
    analytics = idle_client(max_queue_size=0)
    analytics.track("f4ca124298", "Signed Up", PROPERTIES)
    print("ready", flush=True)
    for _ in range(int(sys.stdin.readline())):
        analytics.track("f4ca124298", "Signed Up", PROPERTIES)
    print("done", flush=True)
    return 0.0


def backlog(count: int = 100_000) -> float:
    """Events a second of what is queued already, with nobody calling."""
    first = idle_client(max_queue_size=count)
    for _ in range(count):
        assert first.track("f4ca124298", "Signed Up", PROPERTIES)[0]
    if LIBRARY == "upstream":
        second = client(max_queue_size=count)
        started = time.perf_counter()
        second.consumers[0].queue = second.queue = first.queue  # it waits on the old one for half a second at most
        first.queue.join()
        return count / (time.perf_counter() - started)
    first.shutdown()
    started = time.perf_counter()
    second = client(max_queue_size=count)
    assert second.flush()
    return count / (time.perf_counter() - started)


def memory(count: int = 50_000) -> float:
    """Bytes of resident memory for each event that is queued."""
    analytics = idle_client(max_queue_size=2 * count)
    for _ in range(1000):
        analytics.track("f4ca124298", "Signed Up", PROPERTIES)
    before = resident()
    for _ in range(count):
        analytics.track("f4ca124298", "Signed Up", PROPERTIES)
    return max(1.0, (resident() - before) / count)


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def import_() -> float:
    """Milliseconds that the import adds to the start of an interpreter."""
    name = "segment.analytics" if LIBRARY == "upstream" else "segment_durable"

    def start(code: str) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - started

    times = [start(f"import {name}") - start("pass") for _ in range(5)]
    return sorted(times)[2] * 1e3


def cpu() -> float:
    """Seconds of CPU, of this process, for a million events tracked and delivered."""
    before = sum(os.times()[:2])
    count = 20_000
    analytics = client(max_queue_size=count)
    for _ in range(count):
        analytics.track("f4ca124298", "Signed Up", PROPERTIES)
    analytics.flush()
    return (sum(os.times()[:2]) - before) / count * 1e6


def start() -> float:
    """Milliseconds from an interpreter that has imported the library to the end of a first call."""
    warm = client(send=False)  # what the first construction imports
    assert warm
    started = time.perf_counter()
    idle_client().track("f4ca124298", "Signed Up", PROPERTIES)
    return (time.perf_counter() - started) * 1e3


def idle(seconds: float = 10.0) -> float:
    """Percent of a core that a process takes which has sent an event and tracks nothing more."""
    analytics = client()
    analytics.track("f4ca124298", "Signed Up", PROPERTIES)
    analytics.flush()
    time.sleep(2)
    before = sum(os.times()[:2])
    time.sleep(seconds)
    return max(0.01, (sum(os.times()[:2]) - before) / seconds * 100)


def open_() -> float:
    """Milliseconds to open an outbox with SIZE events."""
    from segment_durable.clock import SystemClock
    from segment_durable.outbox import Outbox

    fill(FOLDER, int(SIZE), MESSAGE, "bench-key")
    started = time.perf_counter()
    outbox = Outbox(Path(FOLDER), SystemClock())
    assert outbox.pending() == int(SIZE)
    return (time.perf_counter() - started) * 1e3


def written() -> float:
    """Bytes handed to the kernel's write calls for each byte of an event, checkpoints included."""
    analytics = idle_client(max_queue_size=0)
    _, message = analytics.track("f4ca124298", "Signed Up", PROPERTIES)
    size = len(json.dumps(message, separators=(",", ":")))
    before = written_bytes()
    count = 40_000
    for _ in range(count):
        analytics.track("f4ca124298", "Signed Up", PROPERTIES)
    analytics.shutdown()
    return (written_bytes() - before) / count / size


def floor_written(count: int = 40_000) -> float:
    before = written_bytes()
    floor_commit(count=count, checkpoint=True)
    return (written_bytes() - before) / count / len(MESSAGE)


def written_bytes() -> int:
    with open("/proc/self/io") as file:
        return int(dict(line.split(": ") for line in file)["wchar"])


def put() -> float:
    """Microseconds to put 430 bytes into the queue, on disk when the call returns."""
    return each_of(queue()[0], 5000)


def get_and_ack() -> float:
    """Microseconds for each event to take it out for good: in batches of 100 where the queue has batches."""
    append, take, at_once = queue()
    count = 3000
    for _ in range(count):
        append()
    return each_of(take, count // at_once) / at_once


def each_of(work: Callable[[], object], count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        work()
    return (time.perf_counter() - started) / count * 1e6


def queue() -> tuple[Callable[[], object], Callable[[], object], int]:
    """A put, a get with its acknowledgement, and how many events that takes."""
    path = os.path.join(FOLDER, "queue")
    if LIBRARY == "persist-queue":
        from persistqueue import SQLiteAckQueue

        persistent = SQLiteAckQueue(path, multithreading=True)
        return lambda: persistent.put(MESSAGE), lambda: persistent.ack(persistent.get()), 1
    if LIBRARY == "litequeue":
        from litequeue import LiteQueue

        lite = LiteQueue(path)
        text = MESSAGE.decode()
        return lambda: lite.put(text), lambda: lite.done(lite.pop().message_id), 1

    from segment_durable.clock import SystemClock
    from segment_durable.outbox import Outbox
    from segment_durable.records import Lease

    outbox = Outbox(Path(path), SystemClock())

    def take() -> None:
        lease = outbox.lease(100, 60)
        assert isinstance(lease, Lease)
        outbox.joined(lease.first, lease.last, 100)
        outbox.ack(lease, lease.last)

    return lambda: outbox.put(MESSAGE, 1), take, 100


def floor_commit(full: bool = False, count: int = 9000, rows: int = 1, checkpoint: bool = False) -> float:
    """Microseconds for each row of a bare commit of `rows`, at SQLite's best settings and with nothing around it."""
    connection = sqlite3.connect(os.path.join(FOLDER, "floor.db"), isolation_level=None)
    for pragma in ("page_size=2048", "journal_mode=WAL", f"synchronous={'FULL' if full else 'NORMAL'}"):
        connection.execute(f"PRAGMA {pragma}").fetchall()
    connection.execute("PRAGMA wal_autocheckpoint=0").fetchall()
    connection.execute("CREATE TABLE event (id INTEGER PRIMARY KEY, body BLOB NOT NULL)")
    started = time.perf_counter()
    for number in range(count // rows):
        if rows > 1:
            connection.execute("BEGIN")
            connection.executemany("INSERT INTO event (body) VALUES (?)", [(MESSAGE,)] * rows)
            connection.execute("COMMIT")
        else:
            connection.execute("INSERT INTO event (body) VALUES (?)", (MESSAGE,))
        if checkpoint and number % 4000 == 3999:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
    seconds = time.perf_counter() - started
    connection.close()
    return seconds / count * 1e6


def floor_orjson(count: int = 100_000) -> float:
    """Microseconds to encode a message of that size."""
    import orjson

    _, message = client(send=False).track("f4ca124298", "Signed Up", PROPERTIES)
    return each_of(lambda: orjson.dumps(message), count)


def floor_post(count: int = 300) -> float:
    """Events a second of bare posts of 100 by a requests session, with nothing around them."""
    import requests

    body = MESSAGE * 100
    with requests.Session() as session:
        session.post(f"{URL}/v1/batch", data=body)
        started = time.perf_counter()
        for _ in range(count):
            session.post(f"{URL}/v1/batch", data=body)
        return count * 100 / (time.perf_counter() - started)


CASES: dict[str, Callable[[], float]] = {
    "track": track,
    "track_full": track_full,
    "processes": processes,
    "writer": writer,
    "full_threads": full_threads,
    "cpu": cpu,
    "start": start,
    "idle": idle,
    "open": open_,
    "written": written,
    "put": put,
    "get_and_ack": get_and_ack,
    "floor_written": floor_written,
    "floor_insert_100": lambda: floor_commit(count=50_000, rows=100),
    "floor_orjson": floor_orjson,
    "end_to_end_1": end_to_end_1,
    "end_to_end_8": end_to_end_8,
    "backlog": backlog,
    "memory": memory,
    "import": import_,
    "floor_commit": floor_commit,
    "floor_commit_full": lambda: floor_commit(full=True, count=2000),
    "floor_post": floor_post,
}

print(CASES[CASE]())
sys.stdout.flush()
os._exit(0)
