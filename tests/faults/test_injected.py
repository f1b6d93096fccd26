"""Each write, sync, truncation and deletion fails once: no crash, no acknowledged event lost, and it works again."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from segment_durable.clock import SystemClock
from segment_durable.outbox import Outbox
from segment_durable.records import Lease

HERE = Path(__file__).parent
KINDS = {"write": 1, "sync": 2, "truncate": 4, "unlink": 8, "allocate": 16}
OPEN = 64


@pytest.fixture
def run(shim: Path, tmp_path: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """Lets a driver's child live with one fault; its journal."""
    command = [sys.executable, "-W", "error", HERE / "driver.py", shim]
    driver = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "LD_PRELOAD": str(shim)}
    )
    assert driver.stdin is not None
    assert driver.stdout is not None

    def run(**order: Any) -> dict[str, Any]:
        assert driver.stdin is not None
        assert driver.stdout is not None
        journal = tmp_path / "journal"
        driver.stdin.write(json.dumps({"folder": str(tmp_path / "outbox"), "journal": str(journal), **order}) + "\n")
        driver.stdin.flush()
        assert driver.stdout.readline() == "0\n", "the process crashed"
        found: dict[str, Any] = json.loads(journal.read_text())
        return found

    yield run
    driver.communicate()


def check(folder: Path, journal: dict[str, Any]) -> None:
    """Open what that life has left, without any fault, and compare it with what its caller knows."""
    assert "crash" not in journal, journal["crash"]
    accepted, doubtful = set(journal["accepted"]), set(journal["doubtful"])
    left, perhaps_left = set(journal["left"]), set(journal["perhaps_left"])
    outbox = Outbox(folder, SystemClock(), write_key="key")
    try:
        rows = [row.body.decode().strip() for row in outbox.rows(0, 1 << 60)]
        dead = [row.body.decode().strip() for row in outbox.dead_letters()]
        there = {*rows, *dead}
        assert len(there) == len(rows) + len(dead), "an event is there twice"
        requeued = set(dead) | (set(rows) & left)  # buried, and perhaps pending again
        assert accepted - left - perhaps_left <= there, "an acknowledged event is lost"
        assert there <= accepted | doubtful, "an event is there that nobody put"
        assert len(requeued & left) <= 1, "what was delivered came back"
        stats = outbox.stats()
        assert stats.balanced
        assert (stats.pending, stats.dead) == (len(rows), len(dead)), "the books are wrong"
        with outbox.db.read() as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert outbox.put(b"new", 1), "the outbox does not work again"
        lease = outbox.lease(1 << 30, 60)
        assert isinstance(lease, Lease)
        assert outbox.ack(lease, lease.last) == len(rows) + 1
        assert outbox.db.reserve.exists()
    finally:
        outbox.close()


@pytest.mark.parametrize("times", [1, 6])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize(
    ("kind", "synchronous"),
    [
        *(("write", "NORMAL"), ("sync", "NORMAL"), ("sync", "FULL")),
        *(("truncate", "NORMAL"), ("unlink", "NORMAL"), ("allocate", "NORMAL")),
    ],
)
@pytest.mark.timeout(900)
def test_whichever_call_fails(
    run: Callable[..., dict[str, Any]],
    tmp_path: Path,
    long: bool,
    kind: str,
    synchronous: str,
    number: int,
    times: int,
) -> None:
    order = {"life": "outbox", "kinds": KINDS[kind], "times": times, "errno": number, "synchronous": synchronous}
    clean = run(nth=1 << 30, **order)
    assert clean["errors"] == []
    shutil.rmtree(tmp_path / "outbox")
    for nth in numbers(12 if kind in ("write", "sync") and not long else None):
        journal = run(nth=nth, **order)
        with naming(kind, nth, journal):
            check(tmp_path / "outbox", journal)
        shutil.rmtree(tmp_path / "outbox")
        if not journal["hits"]:
            break
    assert nth > 1, "nothing was hit"


@pytest.mark.parametrize(("number", "times"), [(errno.EIO, 1), (errno.ENOSPC, 6)], ids=["EIO once", "ENOSPC six times"])
@pytest.mark.parametrize(
    ("kind", "synchronous"),
    [("write", "NORMAL"), ("sync", "FULL"), ("truncate", "NORMAL"), ("unlink", "NORMAL"), ("allocate", "NORMAL")],
)
@pytest.mark.timeout(900)
def test_whichever_call_below_a_client_fails(
    run: Callable[..., dict[str, Any]],
    tmp_path: Path,
    long: bool,
    kind: str,
    synchronous: str,
    number: int,
    times: int,
) -> None:
    """Its threads make their calls at another time in each run: some numbers are hit twice and some never."""
    order = {"life": "client", "kinds": KINDS[kind], "times": times, "errno": number, "synchronous": synchronous}
    clean = run(nth=1 << 30, **order)
    assert clean["errors"] == clean["refused"] == []
    shutil.rmtree(tmp_path / "outbox")
    unhit = refusals = 0
    for nth in numbers(None if long else 3):
        journal = run(nth=nth, **order)
        with naming(kind, nth, journal):
            assert "crash" not in journal, journal["crash"]
            check_client(tmp_path / "outbox", journal)
        shutil.rmtree(tmp_path / "outbox")
        refusals += len(journal["refused"])
        unhit = 0 if journal["hits"] else unhit + 1
        if unhit == 3:
            break
    assert nth > 3, "nothing was hit"
    print(f"{nth} calls, {refusals} refusals")
    assert refusals or kind not in ("write", "sync"), "no fault came to where a call is refused for it"


def numbers(dense: int | None) -> Iterator[int]:
    """Rising from 1: all, or so many, and then ever more of them at once."""
    nth = step = 1
    for count in itertools.count(1):
        yield nth
        if dense is not None and count >= dense:
            step += 1 + count // 10
        nth += step


@contextlib.contextmanager
def naming(kind: str, nth: int, journal: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except Exception as problem:
        raise AssertionError(f"{kind} number {nth}: {problem}\n{journal}") from problem


def check_client(folder: Path, journal: dict[str, Any]) -> None:
    accepted, arrived = set(journal["accepted"]), set(journal["arrived"])
    with contextlib.closing(Outbox(folder, SystemClock(), write_key="key")) as outbox:
        assert outbox.rows(0, 1 << 60) == [], "all has left"
        assert outbox.dead_letters() == []
        stats = outbox.stats()
        assert stats.balanced
        # A call that is refused for a sync that failed may have been written.
        assert len(accepted) <= stats.accepted == len(arrived)
        assert arrived <= accepted | set(journal["refused"])
        with outbox.db.read() as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert outbox.db.reserve.exists()


OPENED = """
import ctypes, sys
from pathlib import Path
from segment_durable import clock, errors, outbox

shim, path, *numbers = sys.argv[1:]
shim = ctypes.CDLL(shim)
shim.shim_arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_long, ctypes.c_int]
shim.shim_hits.restype = ctypes.c_long
shim.shim_arm(path.encode(), *map(int, numbers))
try:
    print(outbox.Outbox(Path(path).parent, clock.SystemClock(), write_key="key").pending())
except errors.OutboxUnavailable as problem:
    print(problem)
print(shim.shim_hits())
"""


def opened(shim: Path, path: Path, nth: int, times: int, number: int) -> tuple[str, int]:
    """What a process says that opens the outbox while openings of `path` fail, and how many did."""
    arguments = map(str, (shim, path, OPEN, nth, times, number))
    done = subprocess.run(
        [sys.executable, "-c", OPENED, *arguments],
        env={**os.environ, "LD_PRELOAD": str(shim)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    told, hits = done.stdout.splitlines()
    return told, int(hits)


@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize(
    ("name", "nth", "times", "number"),
    [
        ("outbox.db", 1, 2, errno.EACCES),
        ("outbox.db-wal", 1, 1 << 30, errno.EACCES),
        ("outbox.db", 2, 1, errno.EMFILE),
    ],
    ids=["denied", "WAL denied", "no descriptor for a moment"],
)
def test_a_database_that_can_be_opened_for_reading_only_is_not_taken_for_a_damaged_one(
    shim: Path, tmp_path: Path, is_open: bool, name: str, nth: int, times: int, number: int
) -> None:
    """A security module may deny what the mode of a file allows.  SQLite then opens it for reading."""
    folder = tmp_path / "outbox"
    outbox = Outbox(folder, SystemClock(), write_key="key")
    assert outbox.put(b"x", 1)
    if not is_open:
        outbox.close()
    told, hits = opened(shim, folder / name, nth, times, number)
    assert not [each for each in os.listdir(folder) if "damaged" in each]
    assert told.startswith(f"{folder / 'outbox.db'}: attempt to write a readonly database: set outbox_dir to "), told
    assert hits > 0
    outbox.close()
    with contextlib.closing(Outbox(folder, SystemClock(), write_key="key")) as outbox:
        assert [row.body for row in outbox.rows(0, 99)] == [b"x"]


def test_a_file_that_can_not_be_made_on_a_full_disk_is_made_in_the_reserve(
    shim: Path, make_disk: Callable[[int], Path]
) -> None:
    """Not every filesystem has room for a new file then; SQLite says no more than that it could not open it."""
    disk = make_disk(4 << 20)
    folder = disk / "outbox"
    with contextlib.closing(Outbox(folder, SystemClock(), write_key="key")) as outbox:
        assert outbox.put(b"x", 1)
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass
    assert opened(shim, folder / "outbox.db-wal", 1, 1, errno.ENOSPC) == ("1", 1)
    assert not (folder / "outbox.reserve").exists()
