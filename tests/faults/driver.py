"""Run with the shim preloaded: goes through a life in one child after the other, each with its fault.

Each line of the input is a run as JSON: the fault, the folder of its outbox, whose life it is, and the name of a file
for the journal of what was accepted and what has left.  The answer is the child's exit status.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from segment_durable import Client, space, upkeep
from segment_durable.clock import SystemClock
from segment_durable.errors import OutboxError, OutboxUnavailable
from segment_durable.outbox import Outbox
from segment_durable.records import Lease
from segment_durable.testing import Receiver

PATIENCE = 60.0  # seconds


class OutboxLife:
    """One outbox from its creation to its end, whatever fails; only `OutboxError` may be raised to its caller."""

    def __init__(self, folder: Path, synchronous: str) -> None:
        self.folder = folder
        self.full = synchronous == "FULL"
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
            self.attempt(outbox.fail, lease, lambda before: replace(before, failures=before.failures + 1))
        outbox.forget(lease.token)  # as a sender does that gives up
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
        self.take(outbox, 2, "fail")
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


class ClientLife:
    """One client with its threads and a receiver; only `OutboxUnavailable` may be raised, and by its making only."""

    def __init__(self, folder: Path, synchronous: str) -> None:
        self.folder = folder
        self.synchronous = synchronous
        self.errors: list[str] = []
        self.journal: dict[str, list[str]] = {"accepted": [], "refused": [], "arrived": [], "told": []}
        self.number = 0
        # So that all that the threads do in their time comes within this life.
        upkeep.SYNC_SECONDS, upkeep._QUIET_SECONDS, upkeep._TIDY_BYTES = 0.002, 0.01, 0

    def make(self) -> Client:
        for _ in range(40):
            try:
                return Client(
                    "key",
                    self.receiver.url,
                    outbox_dir=self.folder,
                    synchronous=self.synchronous,
                    upload_interval=0.01,
                    upload_size=3,
                    on_error=lambda error, items: self.journal["told"].append(str(error)),
                )
            except OutboxUnavailable as problem:
                self.errors.append(str(problem))
        raise AssertionError(f"no client can be made any more: {self.errors[-1]}")

    def track(self, count: int, size: int) -> None:
        for _ in range(count):
            name = str(self.number)
            self.number += 1
            accepted, _ = self.client.track("u", "e", {"filler": "x" * size}, message_id=name)
            self.journal["accepted" if accepted else "refused"].append(name)

    def live(self) -> None:
        self.receiver = Receiver().start()
        self.client = self.make()
        self.track(5, 100)
        self.client.flush(PATIENCE)
        self.receiver.stop()
        self.track(4, 9_000)
        self.client.flush(0.02)  # which is the time for upkeep as well
        self.receiver.start()
        self.track(2, 100)
        self.client.shutdown(PATIENCE)
        self.client.flush(PATIENCE)  # which opens everything again
        self.client.shutdown(PATIENCE)
        self.track(4, 100)  # and so does this
        self.client.flush(PATIENCE)
        self.track(1, 100)
        self.client.shutdown(PATIENCE)
        self.client = self.make()
        self.track(3, 100)

    def go_on(self) -> None:
        """The fault is over: the same client works again, and all that was accepted arrives."""
        self.track(2, 100)
        assert self.journal["accepted"][-1:] == [str(self.number - 1)], f"never again: {self.journal['told'][-1:]}"
        assert self.client.flush(PATIENCE) is True, f"nothing is delivered any more: {self.journal['told'][-1:]}"
        arrived = self.journal["arrived"] = [event["messageId"] for event in self.receiver.unique]
        assert set(self.journal["accepted"]) <= set(arrived), "an acknowledged event is lost"
        assert self.client.shutdown(PATIENCE) is True
        assert bool(self.journal["refused"]) <= bool(self.journal["told"]), "nobody was told why a call was refused"
        assert not self.receiver.errors
        self.receiver.stop()


LIVES = {"outbox": OutboxLife, "client": ClientLife}


def run(shim: ctypes.CDLL, order: dict[str, Any]) -> None:
    """In a child of its own: what fails here ends it with the traceback in its journal."""
    life = LIVES[order["life"]](Path(order["folder"]), order["synchronous"])
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
