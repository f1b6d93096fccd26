"""Run with the shim preloaded: goes through the life of an outbox in one child after the other, each with its fault.

What is given on the command line as JSON is a list of runs; each has a journal of what was accepted and what was
acknowledged, beside the folder of its outbox.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from segment_durable import space, upkeep  # noqa: F401  (so that the children import nothing)
from segment_durable.clock import SystemClock
from segment_durable.errors import OutboxError
from segment_durable.outbox import Outbox
from segment_durable.records import Lease


class Life:
    """One outbox from its creation to its end, whatever fails; only `OutboxError` may be raised to its caller."""

    def __init__(self, folder: Path, *, full: bool) -> None:
        self.folder = folder
        self.full = full
        self.outbox: Outbox | None = None
        self.errors: list[str] = []
        self.journal: dict[str, list[str]] = {"accepted": [], "doubtful": [], "left": [], "perhaps_left": []}
        self.number = 0

    def attempt(self, call: Callable[..., Any], *args: Any, **named: Any) -> Any:
        try:
            return call(*args, **named)
        except OutboxError as problem:
            self.errors.append(f"{type(problem).__name__}: {problem}")
            return None

    def open(self) -> Outbox:
        for _ in range(40):
            self.outbox = self.attempt(Outbox, self.folder, SystemClock(), full=self.full, write_key="key")
            if self.outbox is not None:
                return self.outbox
        raise AssertionError(f"the outbox can't be opened any more: {self.errors[-1]}")

    def close(self) -> None:
        assert self.outbox is not None
        self.attempt(self.outbox.close)

    def put(self, outbox: Outbox, count: int, size: int) -> None:
        for _ in range(count):
            name = str(self.number)
            self.number += 1
            accepted = self.attempt(outbox.put, name.encode() + b" " * size, 1)
            self.journal["doubtful" if accepted is None else "accepted"].append(name)

    def take(self, outbox: Outbox, count: int, how: str) -> None:
        lease = self.attempt(outbox.lease, count, 60)
        if not isinstance(lease, Lease):
            return
        rows = self.attempt(outbox.rows, lease.first, lease.last)
        names = [row.body.decode().strip() for row in rows or []]
        done: Any = None
        if how == "ack":
            done = self.attempt(outbox.ack, lease, lease.last)
        elif how == "bury":
            names = names[:1]
            done = self.attempt(outbox.bury, lease, lease.first, status=400, code="c", answer="a", max_dead=99)
            self.attempt(outbox.release, lease)
        else:
            names = []
            self.attempt(outbox.release, lease)
        outbox.forget(lease)  # as a sender does that gives up
        self.journal["perhaps_left" if done is None else "left"] += names

    def live(self) -> None:
        outbox = self.open()
        self.put(outbox, 5, 100)
        self.take(outbox, 3, "ack")
        self.attempt(outbox.db.wal.sync)
        self.put(outbox, 4, 9_000)
        self.take(outbox, 2, "bury")
        self.attempt(outbox.db.wal.checkpoint)
        self.put(outbox, 2, 100)
        self.take(outbox, 4, "ack")
        self.attempt(outbox.db.space.give_back)
        self.attempt(outbox.db.wal.checkpoint, truncate=True)
        self.take(outbox, 2, "release")
        self.attempt(outbox.requeue)
        self.put(outbox, 2, 100)
        self.close()
        outbox = self.open()
        self.put(outbox, 20, 100)
        self.take(outbox, 1, "ack")

    def go_on(self) -> None:
        """The fault is over: the same object works again."""
        assert self.outbox is not None
        self.put(self.outbox, 2, 100)
        assert self.journal["accepted"][-1:] == [str(self.number - 1)], f"it never worked again: {self.errors[-1]}"
        self.close()


def run(shim: ctypes.CDLL, order: dict[str, Any]) -> None:
    """In a child of its own: what fails here ends it with the traceback in its journal."""
    life = Life(Path(order["folder"]), full=order["full"])
    found: dict[str, Any] = life.journal
    hits = -1
    try:
        below = os.fsencode(order["folder"])
        shim.shim_arm(below, order["kinds"], order["nth"], order["times"], order["errno"])
        life.live()
        hits = shim.shim_hits()
        shim.shim_arm(below, 0, 0, 0, 0)
        life.go_on()
    except BaseException:
        found["crash"] = traceback.format_exc()
    found["hits"], found["errors"] = hits, life.errors
    Path(order["journal"]).write_text(json.dumps(found))


def main(library: str) -> None:
    space.LOOK_SECONDS = 0.0  # not to wait until the next attempt to get out of trouble
    shim = ctypes.CDLL(library)
    shim.shim_arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_long, ctypes.c_int]
    shim.shim_hits.restype = ctypes.c_long
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            run(shim, json.loads(line))
            os._exit(0)
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
