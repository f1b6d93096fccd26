"""What an outbox is on disk: private, its own, and nobody else's."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from segment_durable import Client, connections, database_file
from segment_durable.database_file import sync_file
from segment_durable.errors import NotAnOutbox, OutboxError, OutboxUnavailable, SourceMismatch
from segment_durable.outbox import Outbox
from segment_durable.quarantine import kept_sets
from segment_durable.records import Row
from segment_durable.testing.clock import FakeClock

from .common import bodies
from .workers import Worker

posix_only = pytest.mark.skipif(os.name == "nt", reason="file modes are POSIX's")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def pragma(outbox: Outbox, name: str) -> object:
    with outbox.db.write() as connection:
        return connection.execute(f"PRAGMA {name}").fetchone()[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in folder.iterdir() if each.name.startswith("outbox.db")}


def kept(folder: Path, before: dict[str, bytes]) -> dict[str, bytes | None]:
    """What is now in the files that were there before."""
    after = contents(folder)
    return {name: after.get(name) for name in before}


# -- modes


@posix_only
@pytest.mark.parametrize("mask", [0, 0o022, 0o077])
def test_the_folder_and_all_its_files_are_private_whatever_the_umask_is(
    worker_factory: Callable[..., Worker], folder: Path, mask: int
) -> None:
    worker = worker_factory(opened=False)
    worker.call("umask", mask)
    worker.call("open", "sqlite", folder, {})
    worker.call("put", b"x", 1)
    assert mode(folder) == 0o700
    modes = {each.name: oct(mode(each)) for each in folder.iterdir()}
    names = {"outbox.db", "outbox.db-wal", "outbox.db-shm", "outbox.lock"}
    assert names <= set(modes)
    assert set(modes.values()) == {"0o600"}


@posix_only
def test_no_folder_on_the_way_that_is_made_for_the_outbox_lets_others_write(
    worker_factory: Callable[..., Worker], tmp_path: Path
) -> None:
    """Who may write into a folder above can put another in the outbox's place."""
    worker = worker_factory(opened=False)
    worker.call("umask", 0)
    worker.call("open", "sqlite", tmp_path / "state" / "segment" / "outbox", {})
    for each in (tmp_path / "state", tmp_path / "state" / "segment", tmp_path / "state" / "segment" / "outbox"):
        assert mode(each) & 0o022 == 0, each


AS_ANOTHER_USER = """
import os, sys
from pathlib import Path
from segment_durable import client, clock, errors, outbox

folder, how = Path(sys.argv[1]), sys.argv[2]
# Everything is loaded before: the interpreter's own files may be out of reach afterwards.
outbox.Outbox(folder.with_name("first"), clock.SystemClock(), write_key="key").close()
getattr(os, how)(65534)
try:
    outbox.Outbox(folder, clock.SystemClock(), write_key="key")
except errors.OutboxUnavailable as problem:
    print(problem)
"""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize("how", ["setuid", "seteuid"])
@pytest.mark.parametrize("name", ["outbox.db", "outbox.db-wal", "outbox.db-shm", "outbox.lock"])
def test_a_file_that_this_user_may_not_write_is_not_taken_for_a_damaged_one(name: str, how: str) -> None:
    with tempfile.TemporaryDirectory() as base:  # pytest's own are out of another user's reach
        os.chmod(base, 0o755)
        folder = Path(base, "outbox")
        with contextlib.closing(Outbox(folder, FakeClock(), write_key="key")) as outbox:
            assert outbox.put(b"{}", 1)
            for each in (folder, *folder.iterdir()):
                os.chown(each, 65534, 65534)
            os.chown(folder / name, 0, 0)
            os.chmod(folder / name, 0o444)
            before = contents(folder)
            command = [sys.executable, "-c", AS_ANOTHER_USER, str(folder), how]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert done.stdout == (
                f"{folder / name}: is not writable for this user: run as its owner, or set outbox_dir to a folder of "
                "this user's\n"
            ), done.stderr
            assert kept(folder, before).keys() == before.keys()
            assert (folder / "outbox.reserve").exists()  # it is no want of space either
            assert not [each.name for each in folder.iterdir() if "damaged" in each.name]
            assert bodies(outbox) == [b"{}"]


# -- the database


def test_the_database_is_set_up_as_the_design_says(outbox: Outbox) -> None:
    assert pragma(outbox, "journal_mode") == "wal"
    assert pragma(outbox, "wal_autocheckpoint") == 0
    assert pragma(outbox, "auto_vacuum") == 2
    assert pragma(outbox, "page_size") == 2048
    assert pragma(outbox, "application_id") == 0x53445142
    assert pragma(outbox, "user_version") == 1
    assert pragma(outbox, "synchronous") == 1
    assert pragma(outbox, "fullfsync") == 1


def test_a_file_is_synced_where_the_filesystem_does_not_know_the_full_sync_of_macos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")
    synced: list[int] = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 1 << 20, raising=False)  # which no system has
    monkeypatch.setattr(os, "fdatasync", synced.append, raising=False)
    with (tmp_path / "file").open("wb") as file:
        sync_file(file.fileno())
        assert synced == [file.fileno()]


def test_full_syncs_at_each_commit(outbox_factory: Callable[..., Outbox]) -> None:
    assert pragma(outbox_factory(full=True), "synchronous") == 2


def test_what_was_set_up_stays_when_it_is_opened_again(outbox_factory: Callable[..., Outbox]) -> None:
    outbox_factory().close()
    test_the_database_is_set_up_as_the_design_says(outbox_factory())


def test_an_empty_file_in_the_place_of_the_database_is_taken_over(
    outbox_factory: Callable[..., Outbox], folder: Path
) -> None:
    """Whoever began to make it was killed."""
    folder.mkdir()
    (folder / "outbox.db").touch()
    outbox = outbox_factory()
    test_the_database_is_set_up_as_the_design_says(outbox)
    assert outbox.put(b"x", 1)


@pytest.mark.parametrize("left", ["", "-shm", "reserve"])
def test_a_database_that_was_deleted_is_told_and_nobody_goes_on_writing_into_it(
    worker_factory: Callable[..., Worker],
    outbox_factory: Callable[..., Outbox],
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    left: str,
) -> None:
    """Told if the reserve is still there: without it, this may be a new outbox.

    The shared memory is the old WAL's, and would be believed.
    """
    worker = worker_factory()
    assert worker.call("put", b"lost", 1)
    for each in folder.glob("outbox.[dr]*"):
        if not (left and each.name.endswith(left)):
            each.unlink()
    outbox = outbox_factory()
    assert worker.call("put", b"kept", 1)
    assert outbox.db.wal.checkpoint()
    assert [row.body for row in outbox.rows(0, 99)] == [b"kept"]
    assert outbox_factory().pending() == 1
    assert kept_sets(folder) == {}
    told = [(record.name, "outbox.db was gone" in record.getMessage()) for record in caplog.records]
    assert told == ([("segment.durable.outbox", True)] if left == "reserve" else [])


def test_a_folder_that_was_renamed_is_not_taken_for_a_full_disk(outbox: Outbox, folder: Path) -> None:
    """The reserve's absence is the sign of that; here it went with all the other files, which are written to still."""
    outbox.put(b"x", 1)
    folder.rename(folder.with_name("elsewhere"))
    for number in range(100):
        assert outbox.put(b"x" * 10_000, number)


def test_a_reopening_that_failed_is_tried_again(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(24, "Too many open files")

    assert outbox.put(b"1", 1)
    with monkeypatch.context() as patch:
        patch.setattr(outbox.db.damage, "look_for_sets", fail)
        outbox.db.lock.raise_generation()
        with pytest.raises(OutboxUnavailable, match="Too many open files"):
            outbox.put(b"2", 1)
    assert outbox.put(b"3", 1)
    assert [row.body for row in outbox.rows(0, 99)] == [b"1", b"3"]


def test_attempts_that_fail_leave_one_connection_open_at_the_most(
    outbox: Outbox, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is to be: the last that is closed copies the WAL into the file, and it need not be that file's."""

    def fail(*_: object) -> None:
        raise sqlite3.DatabaseError("database disk image is malformed")

    assert outbox.put(b"1", 1)
    with monkeypatch.context() as patch:
        patch.setattr(connections, "connect_for_reading", fail)
        outbox.db.lock.raise_generation()
        for _ in range(5):
            with pytest.raises(OutboxUnavailable):
                outbox.put(b"2", 1)
    assert len(outbox.db.connections._held) == 1
    assert outbox.put(b"3", 1)
    assert outbox.db.connections._held == []


def test_a_process_killed_while_it_makes_the_database_anew_leaves_nobody_in_the_old_one(
    worker_factory: Callable[..., Worker],
    outbox_factory: Callable[..., Outbox],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = worker_factory()
    assert worker.call("put", b"lost", 1)
    for each in folder.glob("outbox.db*"):
        each.unlink()

    def killed(*_: object, **__: object) -> sqlite3.Connection:
        database_file.connect(folder / "outbox.db", full=False, is_ours=True).close()
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(connections, "connect", killed)
        with pytest.raises(OutboxUnavailable):
            outbox_factory()
    assert worker.call("put", b"kept", 1)
    assert [row.body for row in outbox_factory().rows(0, 99)] == [b"kept"]


def test_many_processes_may_create_the_outbox_at_the_same_time(
    worker_factory: Callable[..., Worker], outbox_factory: Callable[..., Outbox], folder: Path
) -> None:
    workers = [worker_factory(opened=False) for _ in range(6)]
    for worker in workers:
        worker.send("open", "sqlite", folder, {"write_key": "key"})
    for worker in workers:
        worker.receive()
    for worker in workers:
        assert worker.call("put", b"x", 1)
    assert outbox_factory(write_key="key").pending() == 6


def test_a_checkpoint_that_was_killed_half_way_is_no_reason_to_refuse_the_file(
    worker_factory: Callable[..., Worker], outbox_factory: Callable[..., Outbox], folder: Path, tmp_path: Path
) -> None:
    """Without its WAL the file makes no sense then: its first page may tell of pages that are not there yet."""
    worker = worker_factory()
    for number in range(200):
        worker.call("put", b"%d" % number * 200, 1)
    worker.kill()
    shutil.copytree(folder, tmp_path / "whole")
    outbox_factory(folder=tmp_path / "whole").close()  # which makes the checkpoint
    checkpointed, database = (tmp_path / "whole" / "outbox.db").read_bytes(), folder / "outbox.db"
    assert len(checkpointed) > len(database.read_bytes())
    database.write_bytes(checkpointed[:2048] + database.read_bytes()[2048:])
    assert (folder / "outbox.db-wal").stat().st_size > 0
    outbox = outbox_factory()
    assert outbox.pending() == len(outbox.rows(0, 999)) == 200
    assert outbox.put(b"x", 1)


# -- other versions


def test_a_newer_additive_schema_is_written_to(outbox_factory: Callable[..., Outbox], folder: Path) -> None:
    outbox_factory().close()
    change(folder, "PRAGMA user_version=7", "ALTER TABLE lease RENAME COLUMN pid TO process")
    outbox = outbox_factory()
    assert outbox.put(b"x", 1)
    assert pragma(outbox, "user_version") == 7


def test_a_newer_schema_that_asks_for_a_newer_writer_is_refused(
    outbox_factory: Callable[..., Outbox], folder: Path
) -> None:
    outbox_factory().close()
    change(folder, "PRAGMA user_version=7", "UPDATE meta SET value = '7' WHERE name = 'min_writer'")
    before = contents(folder)
    with pytest.raises(OutboxUnavailable, match="upgrade"):
        outbox_factory()
    assert contents(folder) == before


def change(folder: Path, *statements: str) -> None:
    connection = sqlite3.connect(folder / "outbox.db", isolation_level=None)
    for each in statements:
        connection.execute(each)
    connection.close()


# -- one source


def test_an_outbox_belongs_to_one_write_key(outbox_factory: Callable[..., Outbox]) -> None:
    outbox_factory(write_key="one").put(b"x", 1)
    with pytest.raises(SourceMismatch) as caught:
        outbox_factory(write_key="other")
    assert "outbox_dir" in str(caught.value)
    assert outbox_factory(write_key="one").pending() == 1


def test_an_outbox_that_was_made_without_a_write_key_takes_the_first_one(outbox_factory: Callable[..., Outbox]) -> None:
    outbox_factory().close()
    outbox_factory(write_key="one").close()
    with pytest.raises(SourceMismatch):
        outbox_factory(write_key="other")
    assert outbox_factory().put(b"x", 1), "an operator's tool need not know the key"


def test_the_write_key_is_nowhere_on_disk(outbox_factory: Callable[..., Outbox], folder: Path) -> None:
    outbox_factory(write_key="a-very-secret-key")
    assert not any(b"a-very-secret-key" in each.read_bytes() for each in folder.iterdir())


def test_two_outboxes_of_one_source_keep_different_digests(
    outbox_factory: Callable[..., Outbox], tmp_path: Path
) -> None:
    outboxes = [outbox_factory(folder=tmp_path / name, write_key="key") for name in ("a", "b")]
    digests = set()
    for outbox in outboxes:
        with outbox.db.read() as connection:
            digests.add(connection.execute("SELECT value FROM meta WHERE name = 'source_digest'").fetchone()[0])
    assert len(digests) == 2


# -- what is not an outbox


def make_foreign(path: Path, *settings: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    for each in settings:
        connection.execute(f"PRAGMA {each}")
    connection.execute("CREATE TABLE theirs (a)")
    connection.execute("INSERT INTO theirs VALUES ('precious')")
    return connection


@pytest.mark.parametrize("settings", [(), ("application_id=42",), ("journal_mode=WAL",)], ids=str)
def test_a_database_of_another_application_is_refused_and_not_touched(
    outbox_factory: Callable[..., Outbox], folder: Path, settings: tuple[str, ...]
) -> None:
    folder.mkdir()
    make_foreign(folder / "outbox.db", *settings).close()
    before = contents(folder)
    with pytest.raises(NotAnOutbox, match="another application"):
        outbox_factory()
    assert kept(folder, before) == before


@pytest.mark.skipif(os.name == "nt", reason="a link needs a right of its own here")
@pytest.mark.parametrize("leads_to", ["an outbox", "nothing"])
def test_a_database_that_is_a_symbolic_link_is_named_as_one(
    outbox_factory: Callable[..., Outbox], folder: Path, tmp_path: Path, leads_to: str
) -> None:
    """SQLite would keep the WAL beside what it leads to."""
    outbox = outbox_factory()
    assert outbox.put(b"{}", 1)
    outbox.close()
    (folder / "outbox.db").rename(tmp_path / "real.db")
    (folder / "outbox.db").symlink_to(tmp_path / "real.db")
    if leads_to == "nothing":
        (tmp_path / "real.db").unlink()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutboxUnavailable, match="is a symbolic link"):
        outbox_factory()
    assert sorted(tmp_path.rglob("*")) == before
    assert (folder / "outbox.db").is_symlink()


def test_a_path_that_is_too_long_for_sqlite_is_named_as_such(
    outbox_factory: Callable[..., Outbox], tmp_path: Path
) -> None:
    folder = tmp_path.joinpath(*["x" * 100] * 5)
    with pytest.raises(OutboxUnavailable, match="longer than SQLite takes: set outbox_dir to a shorter one"):
        outbox_factory(folder=folder)


def test_an_empty_database_with_another_applications_id_is_refused(
    outbox_factory: Callable[..., Outbox], folder: Path
) -> None:
    folder.mkdir()
    change(folder, "PRAGMA application_id=42", "PRAGMA user_version=3")
    before = contents(folder)
    with pytest.raises(NotAnOutbox):
        outbox_factory()
    assert contents(folder) == before


def test_what_another_application_left_in_its_wal_is_not_touched(
    outbox_factory: Callable[..., Outbox], folder: Path, tmp_path: Path
) -> None:
    """It was killed, or is about to come back: its WAL is its own to recover."""
    folder.mkdir()
    connection = make_foreign(tmp_path / "theirs.db", "journal_mode=WAL")
    for suffix in ("", "-wal"):
        shutil.copy(tmp_path / f"theirs.db{suffix}", folder / f"outbox.db{suffix}")
    connection.close()
    before = contents(folder)
    assert len(before["outbox.db-wal"]) > 0
    with pytest.raises(NotAnOutbox):
        outbox_factory()
    assert kept(folder, before) == before


def test_what_another_application_left_in_its_journal_is_not_touched(
    outbox_factory: Callable[..., Outbox], folder: Path, tmp_path: Path
) -> None:
    folder.mkdir()
    connection = make_foreign(tmp_path / "theirs.db", "cache_size=2")
    connection.executemany("INSERT INTO theirs VALUES (?)", [("x" * 900,)] * 50)
    connection.execute("BEGIN")
    connection.execute("UPDATE theirs SET a = a || 'y'")
    for suffix in ("", "-journal"):
        shutil.copy(tmp_path / f"theirs.db{suffix}", folder / f"outbox.db{suffix}")
    connection.close()
    before = contents(folder)
    assert before["outbox.db-journal"][:8] != bytes(8)
    with pytest.raises(OutboxUnavailable):
        outbox_factory()
    assert kept(folder, before) == before


def test_a_file_that_is_no_database_is_kept_under_another_name(
    outbox_factory: Callable[..., Outbox], folder: Path
) -> None:
    """It may be what a disk has made of an outbox, and that must not keep a program from starting."""
    folder.mkdir()
    (folder / "outbox.db").write_bytes(b"My diary. " * 500)
    assert outbox_factory().put(b"x", 1)
    (kept,) = folder.glob("outbox.db.damaged-*")
    assert kept.read_bytes() == b"My diary. " * 500


@pytest.mark.parametrize("name", ["outbox.db", "outbox.lock"])
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_something_else_in_the_place_of_a_file_is_refused(
    outbox_factory: Callable[..., Outbox], folder: Path, name: str, kind: str
) -> None:
    folder.mkdir()
    if kind == "folder":
        (folder / name).mkdir()
    else:
        os.mkfifo(folder / name)
    with pytest.raises(OutboxUnavailable):
        outbox_factory()


# -- where it can't be


def test_a_path_that_is_a_file_is_refused_with_the_remedy(outbox_factory: Callable[..., Outbox], folder: Path) -> None:
    folder.write_bytes(b"theirs")
    with pytest.raises(OutboxUnavailable) as caught:
        outbox_factory()
    assert "outbox_dir" in str(caught.value)
    assert caught.value.path == folder
    assert folder.read_bytes() == b"theirs"


def test_a_path_below_a_file_is_refused(outbox_factory: Callable[..., Outbox], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutboxUnavailable, match="outbox_dir"):
        outbox_factory(folder=tmp_path / "file" / "outbox")


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that an unprivileged process can reach, which pytest's own are not if root runs the tests."""
    path = Path(tempfile.mkdtemp(prefix="outbox-public-"))
    path.chmod(0o755)
    yield path
    path.chmod(0o755)
    shutil.rmtree(path)


@posix_only
@pytest.mark.parametrize("below", ["", "new"], ids=["itself", "its parent"])
def test_a_folder_that_is_not_writable_is_refused_with_the_remedy(
    worker_factory: Callable[..., Worker], public_folder: Path, below: str
) -> None:
    worker = worker_factory(opened=False)
    public_folder.chmod(0o555)
    if os.geteuid() == 0:
        worker.call("drop_privileges", 65_534)
    with pytest.raises(OutboxUnavailable, match="outbox_dir"):
        worker.call("open", "sqlite", public_folder / below, {})
    assert list(public_folder.iterdir()) == []


@posix_only
def test_an_outbox_of_another_user_is_refused(
    worker_factory: Callable[..., Worker], outbox_factory: Callable[..., Outbox], public_folder: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    outbox_factory(folder=public_folder).put(b"x", 1)
    public_folder.chmod(0o777)
    worker = worker_factory(opened=False)
    worker.call("drop_privileges", 65_534)
    with pytest.raises(OutboxUnavailable):
        worker.call("open", "sqlite", public_folder, {})


def test_paths_may_hold_any_characters(outbox_factory: Callable[..., Outbox], tmp_path: Path) -> None:
    outbox = outbox_factory(folder=tmp_path / "a b%20?mode=ro#é😀")
    outbox.put(b"x", 1)
    outbox.close()
    assert outbox_factory(folder=tmp_path / "a b%20?mode=ro#é😀").rows(1, 1) == [Row(1, b"x")]


# -- closing


def test_closing_twice_is_fine(outbox_factory: Callable[..., Outbox]) -> None:
    outbox = outbox_factory()
    outbox.put(b"x", 1)
    outbox.close()
    outbox.close()


def test_a_closed_outbox_takes_nothing_and_opens_nothing(outbox_factory: Callable[..., Outbox]) -> None:
    outbox = outbox_factory()
    outbox.close()
    with pytest.raises(OutboxError):
        outbox.put(b"x", 1)
    assert outbox_factory().pending() == 0


def test_the_last_one_to_close_leaves_no_wal(
    outbox_factory: Callable[..., Outbox], worker: Worker, folder: Path
) -> None:
    outbox = outbox_factory()
    worker.call("put", b"x", 1)
    outbox.close()
    assert (folder / "outbox.db-wal").exists()
    worker.close()
    assert not (folder / "outbox.db-wal").exists()
    assert outbox_factory().pending() == 1


@pytest.fixture
def descriptors() -> Callable[[], int]:
    if not sys.platform.startswith("linux"):
        pytest.skip("descriptors are counted in /proc")
    gc.collect()  # what tests before this one left in cycles would be closed in the middle of it
    return lambda: len(os.listdir("/proc/self/fd"))


def test_opening_and_closing_leaves_no_descriptor(
    outbox_factory: Callable[..., Outbox], descriptors: Callable[[], int]
) -> None:
    before = descriptors()
    for _ in range(10):
        one, other = outbox_factory(), outbox_factory()
        one.put(b"x", 1)
        other.put(b"x", 1)
        one.close()
        other.close()
    assert descriptors() == before


def test_being_refused_leaves_no_descriptor(
    outbox_factory: Callable[..., Outbox],
    folder: Path,
    descriptors: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outbox_factory(write_key="one").close()
    before = descriptors()
    with pytest.raises(SourceMismatch):
        outbox_factory(write_key="other")
    assert descriptors() == before

    def refuse(fd: int, byte: int) -> bool:
        raise OSError(37, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr("segment_durable.locks.try_lock", refuse)
        with pytest.raises(OutboxUnavailable, match="No locks available"):
            outbox_factory()
    assert descriptors() == before
    (folder / "outbox.db").unlink()
    make_foreign(folder / "outbox.db").close()
    with pytest.raises(NotAnOutbox):
        outbox_factory()
    assert descriptors() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="descriptors are no small numbers here")
def test_no_file_of_an_outbox_takes_the_place_of_stdout_or_stderr(tmp_path: Path) -> None:
    """Where these were closed, as by a daemon: what is printed later would go into it."""
    code = """
import os, sys
for fd in (0, 1, 2):
    os.close(fd)
from segment_durable.clock import SystemClock
from pathlib import Path
from segment_durable.outbox import Outbox
outbox = Outbox(Path(sys.argv[1]), SystemClock())
outbox.put(b"1", 1)
for fd in (0, 1, 2):
    try:
        os.write(fd, b"printed")
    except OSError:
        pass
outbox.close()
"""
    folder = tmp_path / "outbox"
    assert subprocess.run([sys.executable, "-c", code, folder], check=False).returncode == 0
    for path in folder.iterdir():
        assert b"printed" not in path.read_bytes(), path.name


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are Unicode here")
def test_a_folder_whose_name_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(OutboxUnavailable, match=r"\\udcff: is not UTF-8"):
        Client("key", outbox_dir=os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
