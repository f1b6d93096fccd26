"""Forks: by os.fork, by multiprocessing, and in C where no hook of Python's runs."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import mmap
import multiprocessing
import os
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest

from segment_durable import Client, OutboxUnavailable, config, outbox, process
from segment_durable.connections import Connections
from segment_durable.outbox import Outbox
from segment_durable.records import Lease, NotNow
from segment_durable.testing import Hang, Receiver

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
    # Python 3.12 and later warn of every fork of a process with threads, which is what is tested here.
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]
MakeClient = Callable[..., Client]
in_c = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="calls the C library's fork by name")


def fork_in_c() -> int:
    """As uWSGI does without threads: no hook of Python's runs, and nobody else has the interpreter lock meanwhile.

    Nor may anybody wait for it: that would hang the child inside CPython, for the C library's condition variables wait
    for the waiters that they remember.  Who waits for it asks again every 5 ms, and so has been awake soon afterwards:
    a child is let go only if no other thread has been, from before the fork until then, and else another one is made.
    """
    library = ctypes.PyDLL(None)  # keeps the interpreter lock in its calls
    for _ in range(1_000):
        before = _at_rest()
        if before is None:
            time.sleep(0.001)
            continue
        go, ready = os.pipe()
        child = library.fork()
        if child == 0:
            library.close(ready)
            if library.read(go, ctypes.create_string_buffer(1), 1) != 1:
                library._exit(1)
            library.close(go)
            return 0
        time.sleep(0.03)
        is_well = _at_rest() == before
        if is_well:
            os.write(ready, b"x")
        os.close(ready)
        os.close(go)
        if is_well:
            return int(child)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    raise AssertionError("the other threads don't come to rest")


def _at_rest() -> dict[str, str] | None:
    """How often each other thread of this process has gone to rest, or None if one is not at rest."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        if int(task.name) != threading.get_native_id():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                lines = (task / "status").read_text().splitlines()
                status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
                if not status["State"].startswith("S"):
                    return None
                found[task.name] = status["voluntary_ctxt_switches"]
    return found


def in_child(work: Callable[[], Any], fork: Callable[[], int] = os.fork) -> int:
    """Do that in a forked child, which ends by os._exit; its process id."""
    child = fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)  # also one that nobody waits for, or that hangs inside SQLite, ends
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def ended_well(child: int, within: float = 30.0) -> bool:
    """Whether it ended in that many seconds, by the exit code 0; one that hangs is killed."""
    if hasattr(os, "pidfd_open"):
        pidfd = os.pidfd_open(child)
        try:
            has_ended = bool(select.select([pidfd], [], [], within)[0])
        finally:
            os.close(pidfd)
    else:  # macOS
        end = select.kevent(child, select.KQ_FILTER_PROC, select.KQ_EV_ADD, select.KQ_NOTE_EXIT)
        with contextlib.closing(select.kqueue()) as queue:
            try:
                has_ended = bool(queue.control([end], 1, within))
            except ProcessLookupError:
                has_ended = True
    if not has_ended:
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and has_ended


def test_both_sides_of_a_fork_go_on(make_client: MakeClient, receiver: Receiver) -> None:
    client = make_client()
    client.track("parent", "before")

    def work() -> None:
        for i in range(50):
            assert client.track("child", str(i))[0]
        assert client.shutdown(20) is True

    child = in_child(work)
    for i in range(50):
        assert client.track("parent", str(i))[0]
    assert ended_well(child)
    assert client.flush(20) is True
    for who in ("parent", "child"):
        mine = [event["event"] for event in receiver.events if event["userId"] == who]
        assert mine == ["before"] * (who == "parent") + [str(i) for i in range(50)]
    assert receiver.duplicates == 0
    assert client.stats().balanced


def test_parent_and_child_share_no_http_connection(
    make_client: MakeClient, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = mmap.mmap(-1, 1)  # shared: who may deliver, "p" or "c"
    turning = multiprocessing.get_context("fork").Lock()
    role = b"p"
    real = Outbox.lease

    def lease(self: Outbox, *args: Any, **named: Any) -> Lease | NotNow:
        with turning:
            return real(self, *args, **named) if turn[:] == role else NotNow("leased", 0.01)

    monkeypatch.setattr(Outbox, "lease", lease)
    client = make_client()
    to_child, from_parent = os.pipe()
    to_parent, from_child = os.pipe()

    def deliver() -> None:
        with turning:
            turn[:] = role
        assert client.track(role.decode(), "e")[0]
        assert client.flush(20) is True

    def work() -> None:
        nonlocal role
        role = b"c"
        deliver()
        os.write(from_child, b"x")
        assert os.read(to_child, 1) == b"x"
        deliver()
        assert client.shutdown(20) is True

    deliver()  # so that a connection is open, and kept, when the process is forked
    child = in_child(work)
    os.close(from_child)
    assert os.read(to_parent, 1) == b"x"
    deliver()
    os.write(from_parent, b"x")
    assert ended_well(child)
    deliver()
    for fd in (to_child, from_parent, to_parent):
        os.close(fd)
    assert [[event["userId"] for event in batch.events] for batch in receiver.batches] == [[who] for who in "pcpcp"]
    assert receiver.duplicates == 0
    ports = [batch.client_port for batch in receiver.batches]
    assert len(set(ports[0::2])) == 1
    assert len(set(ports[1::2])) == 1
    assert ports[0] != ports[1]


def test_a_child_that_ends_at_once_leaves_its_events_to_the_parent(make_client: MakeClient, receiver: Receiver) -> None:
    client = make_client()
    client.track("parent", "first")
    assert ended_well(in_child(lambda: client.track("child", "e")))
    assert receiver.wait_for(2, timeout=20)


@pytest.mark.parametrize("timeout", [20, 0])
def test_a_shutdown_in_a_child_that_has_tracked_nothing_says_whether_all_has_left(
    make_client: MakeClient, receiver: Receiver, timeout: float
) -> None:
    client = make_client(upload_interval=3600)
    client.track("parent", "e")

    def work() -> None:
        assert client.shutdown(timeout) is (timeout > 0)

    assert ended_well(in_child(work))
    assert len(receiver.unique) == (timeout > 0)
    assert client.flush(20)


@pytest.mark.parametrize("flushed", [True, False], ids=["flushed", "left to others"])
def test_a_fork_of_a_fork(make_client: MakeClient, receiver: Receiver, flushed: bool) -> None:
    client = make_client()

    def track(who: str) -> None:
        assert client.track(who, "e")[0]
        if flushed:
            assert client.shutdown(20) is True

    def child_work() -> None:
        grandchild = in_child(lambda: track("grandchild"))
        track("child")
        assert ended_well(grandchild)

    assert ended_well(in_child(child_work))
    client.track("parent", "e")
    assert client.flush(20) is True
    assert sorted(event["userId"] for event in receiver.unique) == ["child", "grandchild", "parent"]
    if flushed:
        assert receiver.duplicates == 0


def test_forks_while_threads_are_inside_calls(make_client: MakeClient, receiver: Receiver) -> None:
    client = make_client(max_queue_size=0)
    stop = threading.Event()
    counts = [0, 0, 0]

    def work(n: int) -> None:
        while not stop.is_set():
            if client.track(f"t{n}", str(counts[n]))[0]:
                counts[n] += 1

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    try:
        for round_ in range(25):
            name = str(round_)
            assert ended_well(in_child(lambda name=name: client.track("child", name)[0] or os._exit(3)))
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
    assert client.flush(60) is True
    for n in range(3):
        mine = [event["event"] for event in receiver.unique if event["userId"] == f"t{n}"]
        assert mine == [str(i) for i in range(counts[n])]
    assert sorted(int(e["event"]) for e in receiver.unique if e["userId"] == "child") == list(range(25))


def _tracks(url: str, folder: str, name: str, inherited: Client | None) -> None:
    client = Client("test-key", url, outbox_dir=folder) if inherited is None else inherited
    for i in range(20):
        assert client.track(name, str(i))[0]
    assert client.shutdown(20) is True


@pytest.mark.parametrize(
    ("method", "inherits"),
    [(method, False) for method in multiprocessing.get_all_start_methods()] + [("fork", True)],
    ids=lambda value: {True: "inherited", False: "own"}.get(value, value),
)
def test_multiprocessing(
    make_client: MakeClient, receiver: Receiver, tmp_path: Path, method: str, inherits: bool
) -> None:
    client = make_client()
    context = multiprocessing.get_context(method)
    arguments = [(receiver.url, str(tmp_path / "outbox"), f"p{n}", client if inherits else None) for n in range(3)]
    processes = [context.Process(target=_tracks, args=each) for each in arguments]
    stop, count = threading.Event(), 0

    def track() -> None:
        nonlocal count
        while not stop.wait(0.002):
            assert client.track("parent", str(count))[0]
            count += 1

    thread = threading.Thread(target=track)
    thread.start()
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
    finally:
        stop.set()
        thread.join(20)
    assert client.flush(20) is True
    for name, number in [("p0", 20), ("p1", 20), ("p2", 20), ("parent", count)]:
        mine = [event["event"] for event in receiver.events if event["userId"] == name]
        assert mine == [str(i) for i in range(number)]
    assert receiver.duplicates == 0
    assert client.stats().balanced


@in_c
@pytest.mark.parametrize("between", ["", "closed", "copied"])
def test_a_fork_in_c_keeps_the_wal_that_the_child_writes(make_client: MakeClient, tmp_path: Path, between: str) -> None:
    """As uWSGI forks: no hook runs, so the child inherits an open connection with SQLite's idea of its locks.

    Without the two locks that the child takes by itself, another process that opens or closes the database takes it
    for unused and deletes the WAL, and what the child commits afterwards is lost.
    """
    client = make_client(deliver=False)
    client.track("parent", "before")
    to_child, from_parent = os.pipe()
    to_parent, from_child = os.pipe()

    def work() -> None:
        assert client.track("child", "1")[0]
        if between == "closed":
            client.shutdown()  # and the parent's connection is in the child's memory still
        elif between == "copied" and sys.platform.startswith("linux"):  # see test_beside.py
            shutil.copytree(tmp_path / "outbox", tmp_path / "copy")
        os.write(from_child, b"x")
        assert os.read(to_child, 1) == b"x"
        assert client.track("child", "2")[0]

    child = in_child(work, fork_in_c)
    assert os.read(to_parent, 1) == b"x"
    client.shutdown()  # the parent's is the last connection that the kernel knows of
    code = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('SELECT count(*) FROM event'); c.close()"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "outbox" / "outbox.db")], check=True)
    os.write(from_parent, b"x")
    assert ended_well(child)
    for fd in (to_child, from_parent, to_parent, from_child):
        os.close(fd)
    connection = sqlite3.connect(tmp_path / "outbox" / "outbox.db")
    (count,) = connection.execute("SELECT count(*) FROM event").fetchone()
    connection.close()
    assert count == 3


# -- a thread at work in the outbox


@contextlib.contextmanager
def a_sender_inside_its_transaction(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[tuple[threading.Event, threading.Event]]:
    """The next `ack` is held before its commit: it sets the first event, and goes on when the second one is set."""
    inside, leave = threading.Event(), threading.Event()
    real = outbox.end_backoff

    def hold(connection: sqlite3.Connection, clock: Any) -> None:
        real(connection, clock)
        if connection.in_transaction and not inside.is_set():
            inside.set()
            assert leave.wait(60)

    monkeypatch.setattr(outbox, "end_backoff", hold)
    try:
        yield inside, leave
    finally:
        leave.set()


def is_refused(client: Client, problems: list[Exception], caplog: pytest.LogCaptureFixture) -> None:
    """In a child that can't use SQLite: three calls at once."""
    problems.clear()
    caplog.clear()
    for number in range(3):
        accepted, message = client.track("child", str(number))
        assert not accepted
        assert message["event"] == str(number)
    assert [type(problem) for problem in problems] == [OutboxUnavailable]
    assert "forked" in str(problems[0])
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert client.flush(5) is False
    with pytest.raises(OutboxUnavailable):
        client.stats()
    assert client.shutdown(5) is False  # what is in there it can't tell
    # The parent's it must not end: that would close the connections that it has inherited.
    assert client._engine is not None
    assert not client._engine.closed


def test_a_fork_waits_until_the_sender_has_left_its_transaction(
    make_client: MakeClient, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client()
    real = Connections.suspend

    with a_sender_inside_its_transaction(monkeypatch) as (inside, leave):
        forking = threading.Event()

        def suspend(self: Connections) -> bool:
            forking.set()
            return real(self)

        monkeypatch.setattr(Connections, "suspend", suspend)

        def let_it_go() -> None:
            assert forking.wait(60)
            leave.set()

        thread = threading.Thread(target=let_it_go)
        thread.start()
        client.track("parent", "before")
        assert inside.wait(20)

        def work() -> None:
            assert client.track("child", "e")[0]
            assert client.shutdown(20) is True

        child = in_child(work)
        assert client.track("parent", "after")[0]
        assert ended_well(child)
        thread.join(20)
    assert client.flush(20) is True
    assert sorted(event["event"] for event in receiver.events) == ["after", "before", "e"]
    assert client.stats().balanced


@pytest.mark.parametrize("how", ["os.fork that gave up waiting", pytest.param("fork in C", marks=in_c)])
def test_a_child_forked_while_the_sender_is_inside_a_transaction_is_refused_and_the_parent_goes_on(
    make_client: MakeClient,
    receiver: Receiver,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    problems: list[Exception] = []
    client = make_client(on_error=lambda problem, items: problems.append(problem))
    other = make_client(outbox_dir=tmp_path / "other")  # another outbox of the process, where nobody is at work
    monkeypatch.setattr(Connections, "suspend", partialmethod(Connections.suspend, timeout=0.05))
    with a_sender_inside_its_transaction(monkeypatch) as (inside, leave):
        client.track("parent", "before")
        assert inside.wait(20)

        def work() -> None:
            is_refused(client, problems, caplog)
            assert other.track("child", "e")[0] is False
            with pytest.raises(OutboxUnavailable):
                Client("test-key", outbox_dir=tmp_path / "third")
            assert ended_well(in_child(lambda: client.track("grandchild", "e")[0] and os._exit(3)))

        assert ended_well(in_child(work, fork_in_c if how == "fork in C" else os.fork))
        leave.set()
        assert client.track("parent", "after")[0]
        assert other.track("parent", "other")[0]
        assert client.flush(20) is True
        assert other.flush(20) is True
    assert sorted(event["event"] for event in receiver.events) == ["after", "before", "other"]
    assert client.stats().balanced
    assert problems == []
    assert ended_well(in_child(lambda: client.track("child", "e")[0] or os._exit(3)))  # a later fork is as any


@pytest.fixture
def sqlite_mutex() -> Iterator[Callable[[str], None]]:
    """`sqlite_mutex("enter")`, `sqlite_mutex("leave")`: one of the mutexes that SQLite has for the whole process."""
    library = ctypes.CDLL(None)
    maps = Path("/proc/self/maps")
    loaded = (
        [line.split()[-1] for line in maps.read_text().splitlines() if "libsqlite3" in line] if maps.exists() else []
    )
    if loaded:
        library = ctypes.CDLL(loaded[0])
    if not hasattr(library, "sqlite3_mutex_alloc"):
        pytest.skip("Python's SQLite can't be called from here")
    library.sqlite3_mutex_alloc.restype = ctypes.c_void_p
    mutexes = [ctypes.c_void_p(library.sqlite3_mutex_alloc(number)) for number in (2, 11)]  # main; the files

    def call(how: str) -> None:
        for mutex in mutexes:
            getattr(library, f"sqlite3_mutex_{how}")(mutex)

    return call


CAN_LOCK_WRITER = """
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
"""


@in_c
def test_a_child_that_can_not_use_sqlite_neither_hangs_nor_keeps_the_writer_lock(
    make_client: MakeClient,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    sqlite_mutex: Callable[[str], None],
) -> None:
    """The thread that is inside SQLite at the fork has SQLite's own mutexes, which nobody can free in the child."""
    problems: list[Exception] = []
    client = make_client(deliver=False, on_error=lambda problem, items: problems.append(problem))
    client.track("parent", "before")
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        assert client._engine is not None
        with client._engine.outbox.db.read():
            sqlite_mutex("enter")
            inside.set()
            leave.wait(60)
            sqlite_mutex("leave")

    thread = threading.Thread(target=stay)
    thread.start()
    assert inside.wait(20)
    to_child, from_parent = os.pipe()
    to_parent, from_child = os.pipe()

    def work() -> None:
        is_refused(client, problems, caplog)
        os.write(from_child, b"x")
        assert os.read(to_child, 1) == b"x"

    child = in_child(work, fork_in_c)
    os.close(from_child)
    leave.set()
    thread.join(20)
    answer = os.read(to_parent, 1)
    subprocess.run([sys.executable, "-c", CAN_LOCK_WRITER, str(tmp_path / "outbox" / "outbox.lock")], check=True)
    os.write(from_parent, b"x")
    assert ended_well(child)
    assert answer == b"x"
    for fd in (to_child, from_parent, to_parent):
        os.close(fd)
    assert client.track("parent", "after")[0]


@in_c
def test_a_child_of_a_fork_in_c_refuses_once_all_others_have_closed_the_database(
    make_client: MakeClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """SQLite has the deleted shared memory in its mind there: others would not see what the child commits."""
    problems: list[Exception] = []
    client = make_client(deliver=False, on_error=lambda problem, items: problems.append(problem))
    client.track("parent", "before")
    to_child, from_parent = os.pipe()

    def work() -> None:
        assert os.read(to_child, 1) == b"x"
        is_refused(client, problems, caplog)

    child = in_child(work, fork_in_c)
    client.shutdown()
    assert not (tmp_path / "outbox" / "outbox.db-shm").exists()
    assert client.track("parent", "after")[0]
    os.write(from_parent, b"x")
    assert ended_well(child)
    for fd in (to_child, from_parent):
        os.close(fd)
    assert client.stats().pending == 2


@in_c
@pytest.mark.parametrize("replaced", [False, True], ids=["deleted", "replaced"])
def test_a_child_of_a_fork_in_c_goes_on_with_another_database_than_its_parents(
    make_client: MakeClient, tmp_path: Path, replaced: bool
) -> None:
    """Of that one SQLite remembers nothing."""
    client = make_client(deliver=False)
    client.track("parent", "before")
    to_child, from_parent = os.pipe()

    def work() -> None:
        assert os.read(to_child, 1) == b"x"
        assert client.track("child", "after")[0]
        client.shutdown(0)

    child = in_child(work, fork_in_c)
    client.shutdown(0)
    shutil.rmtree(tmp_path / "outbox")
    if replaced:
        assert client.track("parent", "after")[0]
    os.write(from_parent, b"x")
    assert ended_well(child)
    for fd in (to_child, from_parent):
        os.close(fd)
    assert client.stats().pending == 1 + replaced


@in_c
@pytest.mark.parametrize("again", [os.fork, fork_in_c], ids=["by os.fork", "in C"])
@pytest.mark.parametrize("used", [True, False], ids=["used", "unused"])
def test_a_fork_of_a_fork_in_c_keeps_the_wal_that_it_writes(
    make_client: MakeClient, tmp_path: Path, again: Callable[[], int], used: bool
) -> None:
    """A connection of the grandparent is still in the memory of the grandchild, and none of the locks."""
    client = make_client(deliver=False)
    client.track("parent", "before")
    to_child, from_parent = os.pipe()
    to_parent, from_child = os.pipe()

    def work() -> None:
        assert client.track("grandchild", "1")[0]
        os.write(from_child, b"x")
        assert os.read(to_child, 1) == b"x"
        assert client.track("grandchild", "2")[0]

    def fork_again() -> None:
        if used:
            assert client.track("child", "e")[0]
        in_child(work, again)

    assert ended_well(in_child(fork_again, fork_in_c))  # and none of the child's locks is left
    os.close(from_child)
    assert os.read(to_parent, 1) == b"x"
    client.shutdown()
    code = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('SELECT count(*) FROM event'); c.close()"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "outbox" / "outbox.db")], check=True)
    os.write(from_parent, b"x")
    assert os.read(to_parent, 1) == b""  # it has ended
    for fd in (to_child, from_parent, to_parent):
        os.close(fd)
    assert client.stats().pending == 3 + used


@in_c
def test_threads_of_a_child_that_notice_a_fork_in_c_at_the_same_time_share_one_engine(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client(deliver=False)
    client.track("parent", "before")

    def work() -> None:
        real = process.abandon_inherited
        notice = process._notice_fork
        together, calls = threading.Barrier(4), []
        come = threading.Semaphore(0)

        def noticing() -> None:
            come.release()
            notice()

        def abandon() -> Any:
            calls.append(1)
            for _ in range(4):
                assert come.acquire(timeout=20)
            return real()

        monkeypatch.setattr(process, "_notice_fork", noticing)
        monkeypatch.setattr(process, "abandon_inherited", abandon)

        def track() -> None:
            together.wait(20)
            assert client.track("child", "e")[0]

        threads = [threading.Thread(target=track) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(calls) == 1
        assert len(process._engines) == 1

    assert ended_well(in_child(work, fork_in_c))
    assert client.stats().pending == 5


@in_c
def test_a_child_forks_on_although_another_thread_was_making_a_client_at_its_fork_in_c(make_client: MakeClient) -> None:
    client = make_client()
    client.track("parent", "e")
    assert client.flush(20) is True
    with process._lock:
        child = in_child(
            lambda: ended_well(in_child(lambda: client.track("grandchild", "e"))) or os._exit(3), fork_in_c
        )
    assert ended_well(child)


def test_a_fork_while_a_sender_that_was_not_waited_for_is_still_at_work(
    make_client: MakeClient, receiver: Receiver
) -> None:
    """shutdown() gave up on it: its connection is open until its request is over, and must not be in the child."""
    receiver.always(Hang())
    client = make_client()
    assert client._engine is not None
    at_work = client._engine.outbox.db.connections
    client.track("parent", "e")
    assert receiver.wait_for(lambda receiver: len(receiver.requests) == 1)
    assert client.shutdown(0) is False
    assert at_work._connection is not None

    def work() -> None:
        assert at_work._connection is None
        assert client.track("child", "e")[0]

    assert ended_well(in_child(work))
    receiver.always(None)
    receiver.release()
    assert client.flush(20) is True
    assert {event["userId"] for event in receiver.unique} == {"parent", "child"}


def test_join_in_a_child_leaves_the_parents_sender_alone(make_client: MakeClient, receiver: Receiver) -> None:
    client = make_client()
    client.track("parent", "e")
    assert client._engine is not None
    with client._engine.sender._lock:  # as if another thread were starting the sender
        assert ended_well(in_child(client.join), within=10)
    assert client.flush(20) is True


LOCKED_BYTES = """
import fcntl, json, signal, sys

def look(start, length):
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
    except OSError:
        if length == 1:
            return [start]
        return look(start, length // 2) + look(start + length // 2, length - length // 2)
    fcntl.lockf(file, fcntl.LOCK_UN, length, start)
    return []

with open(sys.argv[1], "r+b") as file:
    signal.alarm(20)
    fcntl.lockf(file, fcntl.LOCK_EX, 1, 0)  # the writer lock, which may be in use but not be left held
    print(json.dumps(look(1, 1 << 62)))
"""


def locked_bytes(file: Path) -> list[int]:
    """Those that any process has locked but byte 0, which is locked here once: an error if it can't be in 20 s."""
    command = [sys.executable, "-c", LOCKED_BYTES, str(file)]
    found: list[int] = json.loads(subprocess.run(command, check=True, timeout=60, stdout=subprocess.PIPE).stdout)
    return found


@pytest.mark.timeout(300)
def test_five_hundred_forks_under_load_lose_nothing_and_leave_no_lock(
    make_client: MakeClient, receiver: Receiver, tmp_path: Path
) -> None:
    """Some children track, some of them fork again, and some end without a call."""
    client = make_client(max_queue_size=0, upload_interval=0.01)
    stop = threading.Event()
    counts = [0, 0]

    def work(n: int) -> None:
        while not stop.wait(0.001):
            if client.track(f"t{n}", str(counts[n]))[0]:
                counts[n] += 1

    def track_twice(name: str) -> None:
        assert client.track("child", name)[0]
        assert client.track("child", f"{name} again")[0]

    def fork_again(name: str) -> None:
        assert ended_well(in_child(lambda: track_twice(name)))

    works = (track_twice, fork_again, lambda name: None)
    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(500):
            assert ended_well(in_child(partial(works[number % 3], str(number))))
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
    assert client.flush(60) is True
    folder = tmp_path / "outbox"
    assert client._engine is not None
    assert locked_bytes(folder / "outbox.lock") == [client._engine.outbox.db.lock.slot]
    stats = client.stats()
    assert stats.balanced
    assert (stats.pending, stats.leased) == (0, 0)
    assert client.shutdown(20) is True
    for file in folder.iterdir():
        assert locked_bytes(file) == [], file
    assert not (folder / "outbox.db-shm").exists()  # the last to close the database was alone
    for n in range(2):
        mine = [event["event"] for event in receiver.unique if event["userId"] == f"t{n}"]
        assert mine == [str(i) for i in range(counts[n])]
    wanted = {f"{n}{again}" for n in range(500) if n % 3 != 2 for again in ("", " again")}
    arrived = [event["event"] for event in receiver.unique if event["userId"] == "child"]
    assert (len(arrived), set(arrived)) == (len(wanted), wanted)


# -- a thread that loads the client

AT_A_MODULE = """
import os, signal, sys, threading, time
import segment_durable as analytics

analytics.write_key, analytics.outbox_dir, analytics.deliver = "key", sys.argv[2], False
is_loading, go_on = threading.Event(), threading.Event()

class Watch:
    def find_spec(self, name, *_):
        if name == sys.argv[1] and threading.current_thread() is not threading.main_thread():
            is_loading.set()
            go_on.wait(0.3)  # so that the fork comes first, if nothing keeps it

sys.meta_path.insert(0, Watch())
first = threading.Thread(target=lambda: analytics.track("u", "parent") if sys.argv[3] == "call" else analytics.Client)
first.start()
is_loading.wait()
child = os.fork()
go_on.set()
if child == 0:
    signal.alarm(20)  # for one that hangs
    os._exit(0 if analytics.track("u", "child")[0] else 1)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
first.join()
print(code, analytics.track("u", "afterwards")[0], analytics.stats().pending)
"""


@pytest.mark.parametrize(
    ("how", "module"),
    [
        *(("call", each) for each in ("segment_durable.process", "sqlite3", "requests", "segment_durable.unopened")),
        *(("attribute", each) for each in ("segment_durable.process", "sqlite3")),
    ],
)
def test_a_fork_waits_for_a_thread_that_loads_the_client(tmp_path: Path, module: str, how: str) -> None:
    """In the child its import lock would stay locked for ever, and so would all that it had locked on its way."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", AT_A_MODULE, module, str(tmp_path / "o"), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"0 True {2 + (how == 'call')}\n", done.stderr


def test_a_fork_waits_for_a_thread_that_is_settling_where_the_outbox_is(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to Python 3.11 a cached property has a lock."""
    settling, go_on = threading.Event(), threading.Event()
    real = config._absolute

    def slowly(path: str) -> Path:
        if threading.current_thread() is not threading.main_thread():
            settling.set()
            go_on.wait(0.3)  # so that the fork comes first, if nothing keeps it
        return real(path)

    monkeypatch.setattr(config, "_absolute", slowly)
    thread = threading.Thread(target=lambda: make_client(deliver=False).track("u", "parent"))
    thread.start()
    assert settling.wait(20)

    def work() -> None:
        assert make_client(deliver=False).track("u", "child")[0]

    child = in_child(work)
    go_on.set()
    thread.join()
    assert ended_well(child)
    assert make_client(deliver=False).stats().pending == 2
