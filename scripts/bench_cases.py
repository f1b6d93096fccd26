"""One measurement in a fresh process: `bench_cases.py CASE LIBRARY URL FOLDER` prints one number."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
import time
from typing import Any

CASE, LIBRARY, URL, FOLDER = sys.argv[1:]
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
    """Microseconds for a call, at default settings."""
    return per_call(idle_client())


def track_full() -> float:
    return per_call(idle_client(synchronous="FULL"), 2000)


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
    analytics = client(max_queue_size=count)
    analytics.track("f4ca124298", "Signed Up", PROPERTIES)
    analytics.flush()

    def work() -> None:
        for _ in range(count // threads):
            analytics.track("f4ca124298", "Signed Up", PROPERTIES)

    workers = [threading.Thread(target=work) for _ in range(threads - 1)]
    started = time.perf_counter()
    for worker in workers:
        worker.start()
    work()
    for worker in workers:
        worker.join()
    analytics.flush()
    return count / (time.perf_counter() - started)


def backlog(count: int = 50_000) -> float:
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


def floor_commit(full: bool = False, count: int = 9000) -> float:
    """Microseconds of a one-row commit at SQLite's best settings, called from Python with nothing around it."""
    connection = sqlite3.connect(os.path.join(FOLDER, "floor.db"), isolation_level=None)
    for pragma in ("page_size=2048", "journal_mode=WAL", f"synchronous={'FULL' if full else 'NORMAL'}"):
        connection.execute(f"PRAGMA {pragma}").fetchall()
    connection.execute("PRAGMA wal_autocheckpoint=0").fetchall()
    connection.execute("CREATE TABLE event (id INTEGER PRIMARY KEY, body BLOB NOT NULL)")
    started = time.perf_counter()
    for _ in range(count):
        connection.execute("INSERT INTO event (body) VALUES (?)", (MESSAGE,))
    seconds = time.perf_counter() - started
    connection.close()
    return seconds / count * 1e6


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


CASES = {
    "track": track,
    "track_full": track_full,
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
