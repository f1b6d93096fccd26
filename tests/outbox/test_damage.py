"""Damaged files: what is kept, what is salvaged, and that everything goes on by itself."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from segment_durable import damage, database_file, quarantine, salvage
from segment_durable.clock import SystemClock
from segment_durable.errors import NotAnOutbox, OutboxDamaged, OutboxUnavailable, StorageError
from segment_durable.outbox import Outbox
from segment_durable.quarantine import kept_sets
from segment_durable.records import Lease
from segment_durable.testing.clock import FakeClock

from .pages import PAGE, leaf_pages, overwrite, put_leaf, swap_leaves
from .workers import Worker

PENDING, DEAD = 300, 7
MakeOutbox = Callable[..., Outbox]
MakeWorker = Callable[..., Worker]


def body(number: int) -> bytes:
    """Some of them go on in other pages."""
    return json.dumps({"messageId": f"m-{number}", "text": "é" * (5000 if number % 20 == 0 else number % 300)}).encode()


def fill(folder: Path, *, checkpointed: bool = True, write_key: str = "key") -> dict[int, bytes]:
    """An outbox with PENDING events and DEAD dead letters, of which nothing is open; all of them by their ids."""
    outbox = Outbox(folder, FakeClock(), write_key=write_key)
    for number in range(1, DEAD + PENDING + 11):
        assert outbox.put(body(number), 1000 + number)
    for number in range(1, DEAD + 11):
        lease = outbox.lease(1, 60)
        assert isinstance(lease, Lease)
        if number <= DEAD:
            outbox.bury(lease, number, status=400, code="c", answer="a", max_dead=99)
        else:
            outbox.ack(lease, number)
    if not checkpointed:
        shutil.copytree(folder, folder.with_name("copy"))
    outbox.close()
    if not checkpointed:
        shutil.rmtree(folder)
        shutil.move(folder.with_name("copy"), folder)
        (folder / "outbox.db-shm").unlink()
    return {number: body(number) for number in [*range(1, DEAD + 1), *range(DEAD + 11, DEAD + PENDING + 11)]}


def content(outbox: Outbox, *, exact: bool = True) -> dict[int, bytes]:
    """All that is there, by its id; `exact`: nothing of it is damaged."""
    rows = outbox.rows(0, 1 << 62)
    assert [row.id for row in rows] == sorted({row.id for row in rows})
    found = {row.id: row.body for row in rows}
    dead = {letter.id: letter.body for letter in outbox.dead_letters()}
    assert not found.keys() & dead.keys()
    stats = outbox.stats()
    assert stats.balanced
    if exact:
        assert (stats.pending, stats.dead) == (len(found), len(dead))
        assert outbox.pending() == len(found)
        with outbox.db.read() as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    return found | dead


def check_it_works(outbox: Outbox, before: dict[int, bytes]) -> None:
    """The next id is higher than all before, the next lease begins with the oldest, and what is acknowledged leaves."""
    highest = max([0, *before])
    assert outbox.put(b'{"new":1}', 1)
    assert outbox.last_id() > highest
    assert outbox.rows(outbox.last_id(), outbox.last_id())[0].body == b'{"new":1}'
    if not deliver_all(outbox):
        # It was damaged where nobody had read: within what was leased, or behind an id that is too high now, at which
        # SQLite ends a range without a word.  The new one has no leases, and what is left is sent once more.
        outbox.load()  # as a sender does before it waits: the books say that there are more
        assert kept_sets(outbox.db.folder)
        assert deliver_all(outbox)
    assert outbox.stats().balanced


def deliver_all(outbox: Outbox) -> bool:
    """Whether as many were acknowledged as were waiting."""
    lease = outbox.lease(1 << 30, 60)
    assert isinstance(lease, Lease)
    assert lease.first == outbox.first_id()
    pending = outbox.pending()
    return outbox.ack(lease, lease.last) == pending


NOTHING_LOADED = """
import sys
from pathlib import Path
from segment_durable import client, clock, outbox

sound, damaged = (Path(each) for each in sys.argv[1:])
outbox.Outbox(sound, clock.SystemClock(), write_key="key")
before = set(sys.modules)
assert outbox.Outbox(damaged, clock.SystemClock(), write_key="key").db.damage.news
print(*sys.modules.keys() - before)
"""


def test_damage_is_met_without_loading_a_module(folder: Path) -> None:
    """That is no time to need a descriptor, nor to be forked in the middle of."""
    fill(folder)
    garbage(folder / "outbox.db")
    command = [sys.executable, "-c", NOTHING_LOADED, str(folder.with_name("sound")), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == ([], "")


@pytest.mark.parametrize("at", [0, 20, 32 + 24 + PAGE // 2, -PAGE // 2], ids=["magic", "salt", "first frame", "last"])
def test_how_many_were_lost_is_not_known_where_the_wal_can_not_be_read_to_its_end(
    outbox_factory: MakeOutbox, folder: Path, at: int
) -> None:
    fill(folder, checkpointed=False)
    wal = folder / "outbox.db-wal"
    overwrite(wal, at if at >= 0 else wal.stat().st_size + at, b"printed")
    overwrite(folder / "outbox.db", 16, b"xx")
    outbox = outbox_factory()
    (told,) = outbox.db.damage.news
    assert told.lost is None


# -- what is found when the outbox is opened


def garbage(path: Path) -> None:
    path.write_bytes(random.Random(1).randbytes(path.stat().st_size))


def first_page(path: Path) -> None:
    overwrite(path, 0, b"x" * PAGE)


def no_magic(path: Path) -> None:
    overwrite(path, 0, bytes(16))


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 + 77)


def truncated_to_a_stump(path: Path) -> None:
    os.truncate(path, 50)


def first_leaf(path: Path) -> None:
    """Of `event`: the first that is read."""
    overwrite(path, (leaf_pages(path)[0] - 1) * PAGE, b"\xff" * PAGE)


def root(path: Path) -> None:
    """Of `event`: there is no way to its rows any more."""
    overwrite(path, 2 * PAGE, bytes(PAGE))


def application_id(path: Path) -> None:
    overwrite(path, 68, b"\x01\x02\x03\x04")


def versions(path: Path) -> None:
    overwrite(path, 60, bytes(12))


def text_encoding(path: Path) -> None:
    overwrite(path, 56, b"\x00\x00\x00\x03")


def read_only(path: Path) -> None:
    overwrite(path, 18, b"\x09")


def schema(path: Path) -> None:
    overwrite(path, 100, random.Random(2).randbytes(PAGE - 100))


def books(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE state SET delivered = 3000000")


def no_state(path: Path) -> None:
    overwrite(path, 5 * PAGE, bytes(PAGE))


def no_meta(path: Path) -> None:
    overwrite(path, 7 * PAGE, bytes(PAGE))


NOTHING_LOST = [
    *(first_page, no_magic, application_id, versions, text_encoding, read_only, schema, books, no_state, no_meta)
]


@pytest.mark.parametrize(
    "damage",
    [garbage, truncated, truncated_to_a_stump, first_leaf, root, *NOTHING_LOST],
    ids=lambda each: each.__name__,
)
def test_a_damaged_file_is_kept_and_what_can_be_read_is_salvaged(
    outbox_factory: MakeOutbox, folder: Path, damage: Callable[[Path], None]
) -> None:
    before = fill(folder)
    damage(folder / "outbox.db")
    damaged = (folder / "outbox.db").read_bytes()
    outbox = outbox_factory(write_key="key")
    told: list[OutboxDamaged] = []
    outbox.db.damage.on_damaged = told.append
    found = content(outbox)
    outbox.db.damage.tell()
    (error,) = told
    assert error.path.read_bytes() == damaged
    assert list(kept_sets(folder)) == [error.path.name]
    assert (error.salvaged, error.dead) == (outbox.pending(), outbox.stats().dead)
    assert found.items() <= before.items()
    if damage in NOTHING_LOST:
        assert found == before
        assert error.lost in (0, None)
    if damage is truncated:
        assert len(found) > 50
        assert error.lost is None, "what the last id was can't be read any more"
    if damage is first_leaf:
        assert len(before) - 20 < len(found) < len(before)
        assert error.lost == len(before) - len(found)
    check_it_works(outbox, before)
    outbox.close()
    again = outbox_factory(write_key="key")
    again.db.damage.on_damaged = told.append
    assert again.put(b"{}", 1)
    assert len(told) == 1, "it is told of once"
    assert again.stats().balanced


def test_a_file_that_became_empty_while_its_wal_is_there(outbox_factory: MakeOutbox, folder: Path) -> None:
    before = fill(folder, checkpointed=False)
    wal = (folder / "outbox.db-wal").read_bytes()
    os.truncate(folder / "outbox.db", 0)
    outbox = outbox_factory(write_key="key")
    assert content(outbox) == before
    (name,) = kept_sets(folder)
    assert (folder / f"{name}-wal").read_bytes() == wal
    check_it_works(outbox, before)


def test_a_file_that_is_gone_while_its_wal_is_there(outbox_factory: MakeOutbox, folder: Path) -> None:
    before = fill(folder, checkpointed=False)
    (folder / "outbox.db").unlink()
    assert content(outbox_factory(write_key="key")) == before
    (name,) = kept_sets(folder)
    assert (folder / f"{name}-wal").exists()


def test_a_missing_wal_is_none_if_the_file_alone_is_whole(outbox_factory: MakeOutbox, folder: Path) -> None:
    """What was in it is gone, and nothing tells that there was one."""
    fill(folder, checkpointed=False)
    (folder / "outbox.db-wal").unlink()
    outbox = outbox_factory(write_key="key")
    assert content(outbox) == {}
    check_it_works(outbox, {})
    assert kept_sets(folder) == {}


def test_a_missing_wal_after_half_a_checkpoint(outbox_factory: MakeOutbox, folder: Path, tmp_path: Path) -> None:
    before = fill(folder, checkpointed=False)
    shutil.copytree(folder, tmp_path / "whole")
    Outbox(tmp_path / "whole", FakeClock()).close()
    checkpointed = (tmp_path / "whole" / "outbox.db").read_bytes()
    (folder / "outbox.db").write_bytes(checkpointed[: len(checkpointed) // 2 // PAGE * PAGE])
    (folder / "outbox.db-wal").unlink()
    outbox = outbox_factory(write_key="key")
    found = content(outbox)
    assert 0 < len(found) < len(before)
    assert found.items() <= before.items()
    check_it_works(outbox, before)
    assert len(kept_sets(folder)) == 1


def test_damage_in_the_file_with_all_events_in_the_wal(outbox_factory: MakeOutbox, folder: Path) -> None:
    before = fill(folder, checkpointed=False)
    garbage(folder / "outbox.db")
    assert content(outbox_factory(write_key="key")) == before
    (name,) = kept_sets(folder)
    assert (folder / f"{name}-wal").stat().st_size > 100 * PAGE


@pytest.mark.parametrize("theirs", ["an outbox of the same source", "another outbox", "another application"])
def test_a_wal_of_another_database(outbox_factory: MakeOutbox, folder: Path, tmp_path: Path, theirs: str) -> None:
    """SQLite takes it for the file's own; the file itself must stay as it is."""
    before = fill(folder)
    other = tmp_path / "other"
    if theirs == "another application":
        other.mkdir()
        connection = sqlite3.connect(other / "outbox.db", isolation_level=None)
        for statement in ("page_size=2048", "journal_mode=WAL"):
            connection.execute(f"PRAGMA {statement}")
        connection.execute("CREATE TABLE theirs (a)")
        connection.executemany("INSERT INTO theirs VALUES (?)", [(b"x" * 900,)] * 50)
        shutil.copy(other / "outbox.db-wal", folder)
        connection.close()
    else:
        box = Outbox(other, FakeClock(), write_key="key" if "same" in theirs else "another")
        for number in range(40):
            box.put(b'{"foreign":%d}' % number, 1)
        shutil.copy(other / "outbox.db-wal", folder)
        box.close()
    file, wal = (folder / "outbox.db").read_bytes(), (folder / "outbox.db-wal").read_bytes()
    outbox = outbox_factory(write_key="key")
    assert content(outbox) == before
    (name,) = kept_sets(folder)
    assert (folder / name).read_bytes() == file
    assert (folder / f"{name}-wal").read_bytes() == wal
    check_it_works(outbox, before)


def test_a_newer_schema_that_is_damaged_as_well_is_salvaged(outbox_factory: MakeOutbox, folder: Path) -> None:
    before = fill(folder)
    with contextlib.closing(sqlite3.connect(folder / "outbox.db", isolation_level=None)) as connection:
        connection.execute("ALTER TABLE event ADD COLUMN later TEXT")
        connection.execute("ALTER TABLE state ADD COLUMN later TEXT DEFAULT 'x'")
        connection.execute("PRAGMA user_version=2")
    no_magic(folder / "outbox.db")
    assert content(outbox_factory(write_key="key")) == before


def test_another_applications_damaged_database_is_not_touched(outbox_factory: MakeOutbox, folder: Path) -> None:
    folder.mkdir()
    with contextlib.closing(sqlite3.connect(folder / "outbox.db", isolation_level=None)) as connection:
        connection.execute("PRAGMA application_id=42")
        connection.execute("CREATE TABLE theirs (a)")
    overwrite(folder / "outbox.db", 100, b"x" * 300)
    before = (folder / "outbox.db").read_bytes()
    for _ in range(2):
        with pytest.raises(NotAnOutbox, match="another application"):
            outbox_factory()
    assert (folder / "outbox.db").read_bytes() == before
    assert kept_sets(folder) == {}


def test_a_body_that_is_no_message_any_more_is_left_behind(outbox_factory: MakeOutbox, folder: Path) -> None:
    before = fill(folder)
    data = (folder / "outbox.db").read_bytes()
    overwrite(folder / "outbox.db", data.index(b'"m-100"') + 2, b"\xff\x00")
    first_leaf(folder / "outbox.db")
    found = content(outbox_factory(write_key="key"))
    assert 100 not in found
    assert found.items() <= before.items()
    assert 101 in found


def test_an_event_whose_id_is_damaged_is_put_behind_the_others(outbox_factory: MakeOutbox, folder: Path) -> None:
    before = fill(folder)
    path = folder / "outbox.db"
    data = path.read_bytes()
    # Between the id and the body: the record's header of five bytes, and the time in two.
    at = data.index(b'{"messageId": "m-101"') - 8
    assert data[at] == 101
    overwrite(path, at, b"\x05")
    first_leaf(path)
    outbox = outbox_factory(write_key="key")
    found = content(outbox)
    assert found[max(found)] == body(101)
    assert max(found) > max(before)
    del found[max(found)]
    assert found.items() <= before.items()
    check_it_works(outbox, before)


def test_where_schema_sql_puts_the_tables(outbox: Outbox) -> None:
    with outbox.db.read() as connection:
        roots = dict(connection.execute("SELECT name, rootpage FROM sqlite_master").fetchall())
    assert {name: roots[name] for name in salvage._ROOTS} == salvage._ROOTS


def test_ten_thousand_events_are_salvaged_quickly(outbox_factory: MakeOutbox, folder: Path) -> None:
    outbox = outbox_factory()
    with outbox.db.write() as connection:
        connection.executemany(
            "INSERT INTO event VALUES (?, 1, ?)", [(number, body(number % 20 + 1)) for number in range(1, 10_001)]
        )
    outbox.close()
    no_magic(folder / "outbox.db")
    clock = SystemClock()
    begun = clock.boot()
    assert outbox_factory().pending() == 10_000
    assert clock.boot() - begun < 3.0, "about 0.3 s on an idle machine"


# -- any damage


@pytest.mark.parametrize("checkpointed", [True, False], ids=["file", "wal"])
def test_random_damage(outbox_factory: MakeOutbox, tmp_path: Path, long: bool, checkpointed: bool) -> None:
    before = fill(tmp_path / "whole", checkpointed=checkpointed)
    originals = {body(number) for number in range(DEAD + PENDING + 20)}
    for seed in range(1000 if long else 250):
        chance = random.Random(seed)
        folder = tmp_path / "damaged"
        shutil.copytree(tmp_path / "whole", folder)
        paths = sorted(each for each in folder.iterdir() if each.name in ("outbox.db", "outbox.db-wal"))
        for _ in range(chance.randint(1, 4)):
            path = chance.choice(paths)
            size = path.stat().st_size
            at = chance.randrange(size) if size else 0
            if chance.random() < 0.2:
                os.truncate(path, at)
            else:
                # Of these no byte can be part of a JSON text, so that what was hit can be told from what was not.
                overwrite(path, at, bytes(chance.choices(range(0x80, 0xC0), k=chance.choice([1, 4, 64, 3000]))))
        try:
            outbox = outbox_factory(folder=folder, write_key="key")
            found = content(outbox, exact=False)
            if kept_sets(folder):
                found = content(outbox)
            if kept_sets(folder):
                assert set(found.values()) <= originals, "a body is not what it was"
            else:  # within a body SQLite doesn't see it, and the receiver will refuse that event
                assert len(set(found.values()) - originals) <= 4
            assert len(set(found.values())) == len(found), "an event is there twice"
            same = [number for number, each in found.items() if number in before and each in originals]
            assert all(before[number] == found[number] for number in same), "an event has another's id"
            check_it_works(outbox, found)
            outbox.close()
        except Exception as problem:
            raise AssertionError(f"seed {seed}: {problem}") from problem
        shutil.rmtree(folder)


# -- what is found while processes are at work


def test_three_processes_go_on_in_the_new_file(worker_factory: MakeWorker, folder: Path, tmp_path: Path) -> None:
    before = fill(folder)
    workers = [worker_factory(write_key="key") for _ in range(3)]
    for number, worker in enumerate(workers):
        assert worker.call("put", b'{"first":%d}' % number, 1)
        worker.call("db.wal.checkpoint")
        assert worker.call("first_id") == DEAD + 11
    path = folder / "outbox.db"
    for page in leaf_pages(path)[2:]:
        overwrite(path, (page - 1) * PAGE, b"\xff" * PAGE)
    with path.open("rb") as old:
        for _ in range(4):  # pages that a process has in memory are not read again
            for number, worker in enumerate(workers):
                worker.call("db.wal.checkpoint")
                with contextlib.suppress(StorageError):
                    worker.call("joined", 0, 1 << 60, 10_000)
                assert worker.call("put", b'{"then":%d}' % number, 1)
        (name,) = kept_sets(folder)
        assert os.fstat(old.fileno()).st_ino == (folder / name).stat().st_ino
        size = os.fstat(old.fileno()).st_size
        kept = (folder / name).read_bytes(), (folder / f"{name}-wal").read_bytes()
        for number, worker in enumerate(workers):
            assert worker.call("put", b'{"last":%d}' % number, 1)
        assert os.fstat(old.fileno()).st_size == size
    seen = [row.body for row in workers[2].call("rows", 0, 1 << 60)]
    for word, times in ((b"then", 4), (b"last", 1)):
        for number in range(3):
            assert seen.count(b'{"%b":%d}' % (word, number)) == times
    assert len(seen) > 15
    for worker in workers:
        worker.close()
    assert ((folder / name).read_bytes(), (folder / f"{name}-wal").read_bytes()) == kept
    outbox = Outbox(folder, FakeClock(), write_key="key")
    with contextlib.closing(outbox):
        assert [each for each in content(outbox).values() if each in seen] == seen
        check_it_works(outbox, before)


@pytest.mark.parametrize("end", ["close", "kill", "read", "sync"])
def test_who_has_the_old_file_open_does_no_harm_to_the_new_one(
    worker_factory: MakeWorker, outbox_factory: MakeOutbox, folder: Path, tmp_path: Path, end: str
) -> None:
    """SQLite deletes a WAL by its name, and that is now the new one's."""
    before = fill(folder)
    old = worker_factory(write_key="key")
    old.call("put", b'{"old":1}', 1)
    assert old.call("pending") == PENDING + 1
    outbox = outbox_factory(write_key="key")
    with outbox.db.write():
        pass
    outbox.db.connections.replace(StorageError("damaged", "SQLITE_CORRUPT"), outbox.db.lock.generation())
    assert outbox.put(b'{"new":1}', 1)
    assert (folder / "outbox.db-wal").stat().st_size > 0
    if end in ("close", "kill"):
        getattr(old, end)()
    elif end == "read":
        assert old.call("pending") == PENDING + 2
    else:
        old.call("db.wal.sync")
    assert (folder / "outbox.db-wal").stat().st_size > 0
    shutil.copytree(folder, tmp_path / "copy")  # as if all were killed now
    copy = outbox_factory(folder=tmp_path / "copy", write_key="key")
    assert list(content(copy).values())[-1 - DEAD - 1 :][:2] == [b'{"old":1}', b'{"new":1}']
    assert before.items() <= content(copy).items()
    assert content(outbox) == content(copy)


def test_a_process_that_only_reads_goes_over_as_well(worker_factory: MakeWorker, folder: Path) -> None:
    fill(folder)
    reader, writer = worker_factory(write_key="key"), worker_factory(write_key="key")
    assert reader.call("pending") == PENDING
    path = folder / "outbox.db"
    first_leaf(path)
    writer.call("open", "sqlite", folder, {"write_key": "key"})
    assert len(kept_sets(folder)) == 1
    assert writer.call("put", b'{"new":1}', 1)
    assert reader.call("last_id") == writer.call("last_id") == PENDING + DEAD + 11
    assert reader.call("pending") == writer.call("pending") < PENDING


@pytest.mark.parametrize("call", ["put", "lease", "rows", "stats", "checkpoint", "group"])
def test_whichever_call_finds_the_damage_it_is_replaced_and_the_call_is_done(
    outbox_factory: MakeOutbox, folder: Path, call: str
) -> None:
    """The error is SQLite's own: of a file that was overwritten under an open connection."""
    fill(folder)
    outbox = outbox_factory(write_key="key")
    told: list[OutboxDamaged] = []
    outbox.db.damage.on_damaged = told.append
    garbage(folder / "outbox.db")
    with contextlib.suppress(FileNotFoundError):
        os.truncate(folder / "outbox.db-wal", 0)
    if call == "put":
        assert outbox.put(b"{}", 1)
    elif call == "group":
        with outbox.db.write() as connection:
            assert connection.execute("SELECT 1").fetchone()
        assert outbox.put(b"{}", 1)
    elif call == "lease":
        outbox.lease(10, 60)
    elif call == "rows":
        outbox.rows(0, 1 << 60)
    elif call == "stats":
        assert outbox.stats().balanced
    else:
        outbox.db.wal.checkpoint()
    assert outbox.put(b"{}", 1)
    content(outbox)
    outbox.db.damage.tell()
    assert len(told) == len(kept_sets(folder)) == 1


def test_a_disk_that_damages_everything_is_not_filled(outbox_factory: MakeOutbox, folder: Path) -> None:
    outbox = outbox_factory()
    for _ in range(damage._MOST_SETS):
        assert outbox.put(b"{}", 1)
        outbox.db.connections.replace(StorageError("damaged", "SQLITE_CORRUPT"), outbox.db.lock.generation())
    assert outbox.put(b"{}", 1)
    with pytest.raises(StorageError, match="again and again"):
        outbox.db.connections.replace(StorageError("damaged", "SQLITE_CORRUPT"), outbox.db.lock.generation())
    assert len(kept_sets(folder)) == damage._MOST_SETS
    assert outbox.pending() == damage._MOST_SETS + 1


# -- killed on the way


STEPS = {
    quarantine: ["sync_folder"],
    salvage: ["create", "sync_file"],
    quarantine.os: ["rename", "unlink", "ftruncate", "close"],
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_any_step_nothing_is_lost(
    worker_factory: MakeWorker, outbox_factory: MakeOutbox, tmp_path: Path, after: bool
) -> None:
    before = fill(tmp_path / "whole", checkpointed=False)
    first_page(tmp_path / "whole" / "outbox.db")
    step = 0
    while True:
        folder = tmp_path / f"killed-{step}"
        shutil.copytree(tmp_path / "whole", folder)
        child = os.fork()
        if child == 0:
            try:
                _die_at(step, after=after)
                Outbox(folder, FakeClock(), write_key="key")
            finally:
                os._exit(1)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        outbox = outbox_factory(folder=folder, write_key="key")
        assert content(outbox) == before, step
        assert not list(folder.glob("*.salvaged")), step
        kept = kept_sets(folder)
        assert len(kept) == 1, (step, kept)
        (name,) = kept
        for suffix in ("", "-wal"):
            whole = (tmp_path / "whole" / f"outbox.db{suffix}").read_bytes()
            assert (folder / f"{name}{suffix}").read_bytes() == whole, step
        check_it_works(outbox, before)
        outbox.close()
        if not died:
            break
        step += 1
    assert step >= 9


def test_an_error_at_any_step_is_gone_on_from_and_nothing_is_lost(
    outbox_factory: MakeOutbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, as of a disk that has a bad moment: the second attempt, by the same process, must not begin anew."""
    before = fill(tmp_path / "whole", checkpointed=False)
    first_page(tmp_path / "whole" / "outbox.db")
    step = 0
    while True:
        folder = tmp_path / f"failed-{step}"
        shutil.copytree(tmp_path / "whole", folder)
        with monkeypatch.context() as patch:
            failed = _fail_at(step, patch)
            with contextlib.suppress(OutboxUnavailable):
                outbox_factory(folder=folder, write_key="key").close()
        outbox = outbox_factory(folder=folder, write_key="key")
        assert content(outbox) == before, step
        assert outbox.put(b'{"new":1}', 1)
        outbox.close()
        outbox = outbox_factory(folder=folder, write_key="key")
        assert list(content(outbox)).count(outbox.last_id()) == 1
        assert outbox.pending() == PENDING + 1, step
        name, *others = kept_sets(folder)
        assert not others or failed == ["sync_folder"], step  # a whole new one is replaced as well, which loses nothing
        for suffix in ("", "-wal"):
            whole = (tmp_path / "whole" / f"outbox.db{suffix}").read_bytes()
            assert (folder / f"{name}{suffix}").read_bytes() == whole, step
        assert not list(folder.glob("*.salvaged")), step
        outbox.close()
        if not failed:
            break
        step += 1
    assert step >= 5


def _fail_at(step: int, patch: pytest.MonkeyPatch) -> list[str]:
    """Let the call number `step` of those that move files fail, before it does anything; it is in the list then."""
    count = 0
    failed: list[str] = []

    def failing(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            nonlocal count
            number, count = count, count + 1
            if number == step:
                failed.append(name)
                raise OSError(5, "Input/output error")
            return real(*arguments)

        return call

    for owner, name in ((quarantine.os, "rename"), (quarantine.os, "unlink"), (quarantine, "sync_folder")):
        patch.setattr(owner, name, failing(name, getattr(owner, name)))
    return failed


def _die_at(step: int, *, after: bool) -> None:
    """In a child: end at the call number `step` of those that change the files, before or after it."""
    count = 0

    def dying(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **named: object) -> object:
            nonlocal count
            number, count = count, count + 1
            if number == step and not after:
                os._exit(9)
            try:
                return real(*args, **named)
            finally:
                if number == step:
                    os._exit(9)

        return call

    for module, names in STEPS.items():
        for name in names:
            setattr(module, name, dying(getattr(module, name)))


def test_a_full_disk_leaves_the_damaged_file_where_it_is_until_there_is_room(
    outbox_factory: MakeOutbox, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fill(folder)
    first_page(folder / "outbox.db")
    damaged = (folder / "outbox.db").read_bytes()

    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(salvage, "create", full)
        with pytest.raises(OutboxUnavailable, match="full"):
            outbox_factory(write_key="key")
        assert (folder / "outbox.db").read_bytes() == damaged
        assert kept_sets(folder) == {}
    assert content(outbox_factory(write_key="key")) == before


def test_a_new_database_is_no_outbox_that_was_there_before(tmp_path: Path) -> None:
    """By their ids a WAL is told from that of another one."""
    ids = set()
    for name in ("a", "b"):
        database_file.create(tmp_path / name)
        with contextlib.closing(sqlite3.connect(tmp_path / name)) as connection:
            ids.add(connection.execute("SELECT value FROM meta WHERE name = 'outbox_id'").fetchone()[0])
    assert len(ids) == 2


# -- pages that a disk has written to the wrong places: whole, and SQLite finds nothing wrong with them


def delivered_bodies(outbox: Outbox) -> list[bytes]:
    """All that leaves, by the steps of a sender: leased, read, confirmed where nothing is there, acknowledged."""
    found: list[bytes] = []
    for _ in range(200):
        lease = outbox.lease(40, 60, batch=10)
        if not isinstance(lease, Lease):
            assert lease.reason == "empty"
            return found
        through = lease.first - 1
        while True:
            rows = outbox.rows(through + 1, lease.last)
            if not rows:
                outbox.confirm(lease)
                outbox.release(lease)
                break
            found += [row.body for row in rows]
            through = rows[-1].id
            if outbox.ack(lease, through) is None or through >= lease.last:
                break
    raise AssertionError("delivery goes on for ever")


@pytest.mark.parametrize("places", [(1, 5), (0, -2), (3, 4), (-3, -1)], ids=str)
def test_leaves_that_changed_places_hold_delivery_up_for_a_moment_at_most(
    outbox_factory: MakeOutbox, folder: Path, places: tuple[int, int]
) -> None:
    before = fill(folder)
    swap_leaves(folder / "outbox.db", *places)
    outbox = outbox_factory()
    assert set(delivered_bodies(outbox)) == {each for number, each in before.items() if number > DEAD}
    assert outbox.pending() == 0
    assert outbox.put(b'{"messageId":"new"}', 1)
    assert delivered_bodies(outbox) == [b'{"messageId":"new"}']


@pytest.mark.parametrize("places", [(1, 5), (5, 1), (0, -2)], ids=str)
def test_events_are_read_once_and_in_order_where_a_leaf_is_in_two_places(
    outbox_factory: MakeOutbox, folder: Path, places: tuple[int, int]
) -> None:
    """An acknowledgement of the last of them would delete what was never sent."""
    fill(folder)
    put_leaf(folder / "outbox.db", *places)
    ids = [row.id for row in outbox_factory().rows(0, 1 << 60)]
    assert ids == sorted(set(ids))
    assert kept_sets(folder)


@pytest.mark.parametrize("limit", [0, PENDING + 100])
def test_a_last_leaf_that_changed_places_refuses_no_event(outbox_factory: MakeOutbox, folder: Path, limit: int) -> None:
    """The highest id is looked up in the last leaf: it is that of an event that is there already."""
    before = fill(folder)
    swap_leaves(folder / "outbox.db", 2, -1)
    outbox = outbox_factory()
    assert outbox.put(b'{"messageId":"new"}', 1, limit)
    bodies = {row.body for row in outbox.rows(0, 1 << 60)}
    assert bodies == {each for number, each in before.items() if number > DEAD} | {b'{"messageId":"new"}'}
    assert kept_sets(folder)
