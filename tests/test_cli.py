"""The command line: what it prints, how it ends, and that it leaves no trace."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from outbox.pages import PAGE, leaf_pages, overwrite

from segment_durable.cli import build_parser, main
from segment_durable.cli.arguments import CommandParser
from segment_durable.cli.events import scan
from segment_durable.cli.format import age, bytes_text, harmless
from segment_durable.cli.reading import Reader
from segment_durable.clock import SystemClock
from segment_durable.config import default_outbox_dir
from segment_durable.errors import OutboxUnavailable
from segment_durable.outbox import Outbox
from segment_durable.records import Backoff, Lease

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "outbox.py"
KEY = "a-write-key-that-nobody-may-see"
posix_only = pytest.mark.skipif(os.name != "posix", reason="file modes and /proc")


class OtherStart(SystemClock):
    """The clock of another start of the machine, which may have been up for `later` seconds more."""

    def __init__(self, boot_id: str | None = None, later: float = 0.0) -> None:
        self._boot_id = boot_id
        self._later = later

    def boot(self) -> float:
        return super().boot() + self._later

    def boot_id(self) -> str:
        return super().boot_id() if self._boot_id is None else self._boot_id


def body(number: int, **fields: Any) -> bytes:
    message = {"type": "track", "event": f"Event {number}", "messageId": f"message-{number}", "userId": f"u{number}"}
    return json.dumps({**message, **fields}).encode()


def fill(box: Outbox, count: int, seconds_ago: float = 0.0) -> None:
    for number in range(1, count + 1):
        assert box.put(body(number), int((time.time() - seconds_ago) * 1000))


def take(box: Outbox, limit: int, seconds: float = 60.0) -> Lease:
    lease = box.lease(limit, seconds)
    assert isinstance(lease, Lease)
    return lease


def close(box: Outbox) -> None:
    box.close()
    assert not os.path.exists(box.db.path.with_name("outbox.db-wal")), "the outbox is not idle"


def trace(folder: Path) -> dict[str, tuple[int, int, str]]:
    """All that a reader could have changed.  The shared memory has the readers' own marks, so of it only the name."""
    found = {}
    for path in sorted(folder.iterdir()):
        seen = path.stat()
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[path.name] = (0, 0, "") if path.name.endswith("-shm") else (seen.st_size, seen.st_mtime_ns, content)
    return found


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No outbox of this machine may be found."""
    monkeypatch.delenv("SEGMENT_WRITE_KEY", raising=False)
    monkeypatch.setenv("SEGMENT_DURABLE_DIR", str(tmp_path / "base"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "outbox"


@pytest.fixture
def box(folder: Path) -> Iterator[Outbox]:
    box = Outbox(folder, SystemClock(), write_key=KEY)
    yield box
    box.close()


@pytest.fixture
def mixed(box: Outbox) -> Outbox:
    """1 delivered, 2 dead, 3 and 4 leased, 5 and 6 pending; 3 failures, the next attempt in 5 minutes."""
    fill(box, 6, seconds_ago=90)
    lease = take(box, 2)
    assert box.ack(lease, 1) == 1
    assert box.bury(lease, 2, status=400, code="invalid_event", answer='{"error": "no \x1b[31m"}', max_dead=10)
    lease = take(box, 2)
    now = SystemClock()
    failed = Backoff(
        now.boot() + 300, failures=3, first_failure=now.boot(), last_error="503 \x1b", last_error_at=time.time()
    )
    box.fail(lease, lambda _: failed)
    take_hurried = box.lease(2, 60, hurry=True)
    assert isinstance(take_hurried, Lease)
    return box


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*argv: str | Path) -> tuple[int, str, str]:
        code = main([str(each) for each in argv])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def fails(result: tuple[int, str, str], *words: str) -> None:
    """One clear line on stderr, nothing else, exit code 2."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.count("\n") == 1, err
    assert err.startswith("segment-durable: "), err
    for word in words:
        assert word in err


# -- status


def test_status_tells_what_waits_and_why(mixed: Outbox, folder: Path, run: Run) -> None:
    code, out, err = run("status", folder)
    assert (code, err) == (0, "")
    found = {line[:14].strip(): line[14:] for line in out.splitlines()}
    assert found["outbox"] == str(folder)
    assert (found["pending"], found["leased"], found["dead"]) == ("4", "2", "1")
    assert re.fullmatch(r"1m 3\ds", found["oldest"])
    assert found["size on disk"] == bytes_text(mixed.db.space.size_on_disk())
    assert found["failures"] == "3 in a row"
    assert re.fullmatch(r"in (5m 00s|4m 5\ds)", found["next attempt"])
    assert re.fullmatch(r"503 \\u001b \(\ds ago\)", found["last error"])
    assert re.fullmatch(
        rf"ids 3 to 4, pid {os.getpid()}, attempt 4, taken \ds ago, deadline in (59s|1m 00s)", found["lease"]
    )
    assert found["books"] == ("accepted 6 = delivered 1 + dead 1 + erased 0 + expired 0 + pending 4: balanced")


def test_status_as_json_agrees_with_the_outbox(mixed: Outbox, folder: Path, run: Run) -> None:
    code, out, err = run("status", "--json", "--verify", folder)
    assert (code, err, out.count("\n")) == (0, "", 1)
    found = json.loads(out)
    stats = mixed.stats()
    for name in ("pending", "leased", "dead", "accepted", "delivered", "erased", "expired", "failures", "size_on_disk"):
        assert found[name] == getattr(stats, name)
    assert found["last_error"] == "503 \x1b"
    assert found["oldest_age_seconds"] == pytest.approx(stats.oldest_age_seconds, abs=5)
    assert found["next_attempt_seconds"] == pytest.approx(300, abs=5)
    (lease,) = found["leases"]
    assert (lease["first"], lease["last"], lease["pid"], lease["dead"]) == (3, 4, os.getpid(), False)
    assert found["balanced"] is True
    assert found["verification"] == {"events": 4, "dead": 1, "damages": [], "passed": True}


def test_status_of_an_empty_outbox(box: Outbox, folder: Path, run: Run) -> None:
    code, out, _ = run("status", "--verify", folder)
    assert code == 0
    for text in ("pending       0\n", "oldest        -\n", "next attempt  at any time\n", "last error    none\n"):
        assert text in out
    assert "\nlease " not in out
    assert out.endswith("verification  passed: counted 0 pending, 0 dead\n")


@pytest.mark.parametrize(
    ("clock", "seconds", "text"),
    [
        (SystemClock(), -940, "deadline passed 15m 40s ago: will be taken over"),
        (OtherStart("another"), 60, "from before a restart of this machine: will be taken over"),
        (OtherStart(later=1000), 60, "from before a restart of this machine: will be taken over"),
    ],
)
def test_a_lease_that_has_ended_does_not_count(
    clock: SystemClock, seconds: float, text: str, folder: Path, run: Run
) -> None:
    box = Outbox(folder, clock)
    fill(box, 3)
    take(box, 2, seconds)
    _, out, _ = run("status", folder)
    assert "leased        0\n" in out
    assert text in out
    assert "leased" not in run("list", folder)[1]
    box.close()


@pytest.mark.parametrize(
    "damage",
    [
        "delivered = 9",  # fewer than no events wait
        "delivered = 3",  # no event waits, but some are there
        "last_id = 9",  # more wait than there can be
        "requeued = 1",  # fewer than no dead letters
    ],
)
def test_status_notices_books_that_do_not_balance(box: Outbox, folder: Path, run: Run, damage: str) -> None:
    fill(box, 3)
    assert run("status", folder)[0] == 0
    with box.db.write() as connection:
        connection.execute(f"UPDATE state SET {damage}")
    code, out, _ = run("status", folder)
    assert code == 1
    assert out.endswith("NOT BALANCED\n")
    assert json.loads(run("status", "--json", folder)[1])["balanced"] is False


@pytest.mark.parametrize("where", ["", " WHERE id < 3"])
def test_status_notices_events_that_are_gone_from_an_end(box: Outbox, folder: Path, run: Run, where: str) -> None:
    fill(box, 3)
    take(box, 3)
    with box.db.write() as connection:
        connection.execute("UPDATE state SET last_id = 3")
        connection.execute("DELETE FROM event" + where)
    code, out, _ = run("status", folder)
    assert code == 1
    assert out.endswith("NOT BALANCED\n")


@pytest.mark.parametrize(("table", "counted"), [("event", "4 pending, 1 dead"), ("dead", "5 pending, 0 dead")])
def test_verify_counts_the_rows(box: Outbox, folder: Path, run: Run, table: str, counted: str) -> None:
    fill(box, 6)
    box.bury(take(box, 1), 1, status=400, code="bad", answer="", max_dead=10)
    assert run("status", "--verify", folder)[0] == 0
    with box.db.write() as connection:
        connection.execute(f"DELETE FROM {table} WHERE id IN (1, 3)")
    assert run("status", folder)[0] == 0  # this needs counting
    code, out, _ = run("status", "--verify", folder)
    assert code == 1
    assert f"verification  FAILED: counted {counted}\n" in out


def test_verify_finds_damage(folder: Path, run: Run) -> None:
    box = Outbox(folder, SystemClock())
    box.put(body(1, properties={"text": "marker" * 2000}), 1)
    close(box)
    path = folder / "outbox.db"
    content = bytearray(path.read_bytes())
    page = 2048
    overflow = (content.rindex(b"markermarker") // page - 2) * page
    content[overflow : overflow + 4] = b"\x7f\xff\xff\xff"  # the number of the page that goes on with the body
    path.write_bytes(content)
    assert run("status", folder)[0] == 0
    code, out, _ = run("status", "--verify", folder)
    assert code == 1
    assert "verification  FAILED: counted 1 pending, 0 dead\n" in out
    assert "\ndamage " in out
    report = json.loads(run("status", "--verify", "--json", folder)[1])["verification"]
    assert report["damages"]
    assert report["passed"] is False


@pytest.mark.parametrize(
    "command", [("list", "--limit", "0"), ("show",), ("status", "--verify")], ids=lambda command: command[0]
)
def test_pages_that_lead_round_in_a_circle_end_a_listing(folder: Path, run: Run, command: tuple[str, ...]) -> None:
    """The root of the tree was written to a leaf's place as well, and so the ids come in any order."""
    box = Outbox(folder, SystemClock())
    for number in range(1, 1001):
        box.put(body(number), 1)
    close(box)
    path = folder / "outbox.db"
    root = path.read_bytes()[2 * PAGE : 3 * PAGE]
    overwrite(path, (leaf_pages(path)[-3] - 1) * PAGE, root)
    code, out, err = run(*command, folder, *(["no-such-message"] if command == ("show",) else []))
    assert code == (1 if command[0] == "status" else 2)
    assert len(out.splitlines()) < 3000
    assert ("damaged" in err) or command[0] == "status"


@pytest.mark.parametrize("command", ["status", "list", "show"])
def test_a_schema_that_is_no_text_is_named_as_damage(box: Outbox, folder: Path, run: Run, command: str) -> None:
    fill(box, 1)
    close(box)
    path = folder / "outbox.db"
    overwrite(path, path.read_bytes().index(b"CREATE TABLE event") + 3, b"\xbf")
    code, _, err = run(command, folder, *(["1"] if command == "show" else []))
    assert code == 2
    assert err.count("\n") == 1
    assert "is damaged or not an outbox (there is text that is not UTF-8)" in err


def test_status_lists_the_damaged_sets_that_are_kept(folder: Path, run: Run) -> None:
    box = Outbox(folder, SystemClock())
    fill(box, 3)
    box.bury(take(box, 1), 1, status=400, code="bad", answer="", max_dead=10)
    close(box)
    damaged = (folder / "outbox.db").read_bytes()
    (folder / "outbox.db").write_bytes(bytes(16) + damaged[16:])
    close(Outbox(folder, SystemClock()))
    unknown = "outbox.db.damaged-20240229T130501Z-1"  # of which the database does not tell
    (folder / unknown).write_bytes(bytes(2000))
    (folder / f"{unknown}-wal").write_bytes(bytes(1000))
    before = trace(folder)
    code, out, err = run("status", folder)
    assert (code, err) == (0, "")
    first, second, hint = (line for line in out.splitlines() if line.startswith(("damaged", "  ")))
    assert first == (
        f"damaged       {unknown}, 2.9 KiB, set aside 2024-02-29T13:05:01.000+00:00: unknown what was salvaged and lost"
    )
    name = next(each for each in before if "damaged" in each and each != unknown and not each.endswith("-wal"))
    assert second.startswith(f"damaged       {name}, {bytes_text(len(damaged))}, set aside 20")
    assert second.endswith(": 2 events and 1 dead letters salvaged, 0 lost")
    assert "never read or changed again" in hint
    assert "delete by hand" in hint
    found = json.loads(run("status", "--json", folder)[1])["damaged"]
    assert found[0] == {
        "name": unknown,
        "set_aside_at": "2024-02-29T13:05:01.000+00:00",
        "bytes": 3000,
        **dict.fromkeys(("events", "dead", "lost")),
    }
    assert (found[1]["name"], found[1]["bytes"]) == (name, len(damaged))
    assert (found[1]["events"], found[1]["dead"], found[1]["lost"]) == (2, 1, 0)
    assert trace(folder) == before
    for each in folder.glob("*damaged*"):
        each.unlink()
    assert "\ndamaged " not in run("status", folder)[1]
    assert json.loads(run("status", "--json", folder)[1])["damaged"] == []


def test_a_damaged_set_of_which_the_loss_is_not_known(folder: Path, run: Run) -> None:
    box = Outbox(folder, SystemClock())
    fact = "damaged:outbox.db.damaged-20240229T130501Z-1"
    with box.db.write() as connection:
        connection.execute("INSERT INTO meta VALUES (?, ?)", (fact, '{"events": 5, "dead": 0, "lost": null}'))
        # What is damaged in there itself is passed over.
        connection.execute("INSERT INTO meta VALUES ('damaged:' || CAST(x'ff' AS TEXT), '{}')")
        connection.execute("INSERT INTO meta VALUES ('damaged:outbox.db.damaged-20240229T130501Z-2', x'ff')")
    (folder / fact.partition(":")[2]).write_bytes(b"")
    close(box)
    out = run("status", folder)[1]
    assert out.count("damaged-") == 1
    assert "0 bytes, set aside 2024-02-29T13:05:01" in out
    assert ": 5 events and 0 dead letters salvaged, unknown how many lost\n" in out
    close(Outbox(folder, SystemClock()))


@pytest.mark.parametrize(
    ("table", "column"), [("event", "appended_at"), ("state", "delivered"), ("lease", "deadline"), ("backoff", "told")]
)
def test_a_value_of_a_wrong_type_is_said_to_be_damage(
    mixed: Outbox, folder: Path, run: Run, table: str, column: str
) -> None:
    with mixed.db.write() as connection:
        connection.execute(f"UPDATE {table} SET {column} = 'zzz'")
    for argv in (["status", folder], ["list", folder], ["show", folder, "3"]):
        if argv[0] == "status" or table in ("event", "lease"):
            fails(run(*argv), "is damaged or not an outbox")


# -- list


def test_list_has_a_line_for_each_event(mixed: Outbox, folder: Path, run: Run) -> None:
    code, out, err = run("list", folder)
    assert (code, err) == (0, "")
    lines = [re.split(r"  +", line.strip()) for line in out.splitlines()]
    assert [(line[0], line[1]) for line in lines] == [
        ("2", "dead"),
        ("3", "leased"),
        ("4", "leased"),
        ("5", "pending"),
        ("6", "pending"),
    ]
    assert re.fullmatch(r"1m 3\ds", lines[1][2])
    assert lines[1][3:] == ["track", "Event 3", "message-3", "u3"]
    assert lines[0][3:] == ["track", "Event 2", "message-2", "u2", "400 invalid_event"]
    starts = {line.index("message-") for line in out.splitlines()}
    assert len(starts) == 1  # aligned


def test_list_as_json_lines(mixed: Outbox, folder: Path, run: Run) -> None:
    code, out, err = run("list", "--json", "--limit", "2", folder)
    assert (code, err) == (0, "")
    dead, leased = map(json.loads, out.splitlines())
    assert leased.pop("age_seconds") == pytest.approx(90, abs=8)
    assert leased == {
        "id": 3,
        "state": "leased",
        "type": "track",
        "event": "Event 3",
        "messageId": "message-3",
        "userId": "u3",
    }
    assert (dead["id"], dead["status"], dead["code"]) == (2, 400, "invalid_event")


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        (["--state", "pending"], [3, 4, 5, 6]),
        (["--state", "dead"], [2]),
        (["--state", "all"], [2, 3, 4, 5, 6]),
        (["--from", "4"], [4, 5, 6]),
        (["--from", "5", "--limit", "1"], [5]),
        (["--from", "7"], []),
        (["--type", "track", "--limit", "1"], [2]),
        (["--type", "page"], []),
    ],
)
def test_list_selects(mixed: Outbox, folder: Path, run: Run, options: list[str], ids: list[int]) -> None:
    code, out, _ = run("list", folder, "--json", *options)
    assert code == 0
    assert [json.loads(line)["id"] for line in out.splitlines()] == ids


def test_list_by_type_looks_behind_other_types(box: Outbox, folder: Path, run: Run) -> None:
    fill(box, 40)
    box.put(body(41, type="page", name="Home", event=None), 0)
    out = run("list", folder, "--type", "page")[1]
    assert re.split(r"  +", out.strip())[3:5] == ["page", "Home"]


def test_list_stops_at_20_and_says_how_to_go_on(box: Outbox, folder: Path, run: Run) -> None:
    fill(box, 25)
    _, out, err = run("list", folder)
    assert (out.count("\n"), err) == (20, "there are more: --from 21\n")
    _, out, err = run("list", folder, "--from", "21")
    assert (out.count("\n"), err) == (5, "")
    _, out, err = run("list", folder, "--limit", "0")
    assert (out.count("\n"), err) == (25, "")


def test_list_goes_through_more_than_one_chunk_in_order(box: Outbox, folder: Path, run: Run) -> None:
    fill(box, 1203)
    lease = take(box, 700)
    assert box.ack(lease, 502) == 502
    assert box.bury(lease, 503, status=400, code="bad", answer="", max_dead=10)
    found = [json.loads(line) for line in run("list", folder, "--limit", "0", "--json")[1].splitlines()]
    assert [each["id"] for each in found] == list(range(503, 1204))
    assert [each["state"] for each in found] == ["dead"] + ["leased"] * 197 + ["pending"] * 503


def test_an_event_that_is_refused_meanwhile_is_listed_once(box: Outbox, folder: Path) -> None:
    fill(box, 600)
    seen = []
    for event in scan(Reader(folder), SystemClock(), "all"):
        if event.id == 500:  # the first chunk is over
            lease = take(box, 600)
            for each in range(1, 503):
                assert box.bury(lease, each, status=400, code="bad", answer="", max_dead=1000)
            box.put(body(601), 0)  # came after the scan had begun
        seen.append((event.id, event.state))
    assert [each for each, _ in seen] == list(range(1, 601))
    assert [state for _, state in seen[499:503]] == ["pending", "dead", "dead", "leased"]


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "a\nb\rc", "a\x9b31mb", "a\u202eb", "a\x00b", "a\ud800b"])
def test_control_characters_reach_no_terminal(name: str, box: Outbox, folder: Path, run: Run) -> None:
    box.put(body(1, event=name, messageId=name, userId=name, type=name), 0)
    said = name.replace("\ud800", "?")  # which no answer can hold
    box.bury(take(box, 1), 1, status=400, code=said, answer=said, max_dead=10)
    for argv in (["list", folder], ["list", "--json", folder], ["show", folder, "1"], ["show", "--json", folder, "1"]):
        out = run(*argv)[1]
        assert "b" in out
        assert out.replace("\n", "").isprintable()
        assert out.count("\n") == 1 or argv[0] == "show"
    assert run("list", folder)[1].count("\n") == 1
    shown = run("show", folder, "1")[1]
    assert json.loads(shown.partition("\n\n")[2])["event"] == name  # escapes, yet still the same JSON


def test_a_body_that_is_no_message_is_shown_as_it_is(box: Outbox, folder: Path, run: Run) -> None:
    for each in (b"\xff no json \x1b", b"[1]", b"[" * 100_000, b"7"):
        box.put(each, 0)
    with box.db.write() as connection:
        connection.execute("INSERT INTO event VALUES (5, 99999999999999999, 'text')")
    code, out, _ = run("list", folder)
    assert (code, out.count("\n")) == (0, 5)
    assert re.split(r"  +", out.splitlines()[0].strip())[3:] == ["-", "-", "-", "-"]
    assert "\\u001b" in run("show", folder, "1")[1]
    assert run("show", folder, "3")[0] == 0
    assert "99999999999999999 ms" in run("show", folder, "5")[1]


def test_list_prints_to_a_terminal_that_knows_only_ascii(folder: Path) -> None:
    box = Outbox(folder, SystemClock())
    box.put(body(1, event="Gr\u00fc\u00dfe"), 0)
    close(box)
    result = script("list", folder, PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr) == (0, "")
    assert "Gr\\u00fc\\u00dfe" in result.stdout


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="/proc")
def test_memory_does_not_grow_with_the_outbox(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        box = Outbox(tmp_path / str(count), SystemClock())
        with box.db.write() as connection:
            connection.execute(
                "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?) "
                "INSERT INTO event SELECT i, 0, ? FROM n",
                (count, body(1, properties={"text": "x" * 300})),
            )
        close(box)
        code = (
            "import sys; from segment_durable.cli import main; assert main(sys.argv[1:]) == 0\n"
            "print([line for line in open('/proc/self/status') if line.startswith('VmHWM')][0].split()[1])"
        )
        result = subprocess.run(
            [sys.executable, "-c", code, "list", str(tmp_path / str(count)), "--limit", "0"],
            capture_output=True, text=True, check=True, cwd=ROOT,
        )  # fmt: skip
        assert result.stdout.count("\n") == count + 1
        return int(result.stdout.splitlines()[-1])

    assert peak(60_000) - peak(1_000) < 8_000  # KiB; the bodies alone are 24,000


# -- show


def test_show_prints_the_whole_event(mixed: Outbox, folder: Path, run: Run) -> None:
    code, out, err = run("show", folder, "2")
    assert (code, err) == (0, "")
    head, _, message = out.partition("\n\n")
    found = {line[:14].strip(): line[14:] for line in head.splitlines()}
    assert list(found) == ["id", "state", "appended_at", "buried_at", "status", "code", "answer"]
    assert (found["id"], found["state"], found["status"], found["code"]) == ("2", "dead", "400", "invalid_event")
    assert found["answer"] == '{"error": "no \\u001b[31m"}'
    assert found["appended_at"] < found["buried_at"]
    assert json.loads(message) == json.loads(body(2))
    assert message.startswith('{\n  "type": "track",\n')


def test_show_as_json(mixed: Outbox, folder: Path, run: Run) -> None:
    code, out, _ = run("show", folder, "3", "--json")
    assert (code, out.count("\n")) == (0, 1)
    found = json.loads(out)
    assert (found["id"], found["state"]) == (3, "leased")
    assert found["message"] == json.loads(body(3))
    assert set(found) == {"id", "state", "appended_at", "message"}


@pytest.mark.parametrize("message_id", ["message-3", 'a \u00e4 "quoted" \\ one', "12345", "9" * 30, "-dash"])
def test_show_finds_by_message_id(message_id: str, box: Outbox, folder: Path, run: Run) -> None:
    fill(box, 2)
    box.put(body(7, messageId=message_id, properties={"x": "message-3"}), 0)
    box.put(body(8, messageId=message_id), 0)
    code, out, _ = run("show", "--json", folder, "--", message_id)
    assert code == 0
    assert json.loads(out)["id"] == 3


def test_show_is_not_misled_by_another_field_with_that_text(box: Outbox, folder: Path, run: Run) -> None:
    box.put(body(1, userId="message-2"), 0)
    box.put(body(2), 0)
    assert json.loads(run("show", "--json", folder, "message-2")[1])["id"] == 2


@pytest.mark.parametrize("wanted", ["1", "99", "message-1", "no\x1bsuch", "9" * 30])
def test_show_says_that_an_event_has_left(mixed: Outbox, folder: Path, run: Run, wanted: str) -> None:
    assert run("show", folder, wanted) == (1, "", f"{harmless(wanted)}: it has left the outbox, or never was in it\n")


# -- which outbox


@pytest.mark.parametrize(
    "argv",
    [
        "status DIR", "status --json DIR", "status DIR --json", "status --outbox DIR", "status --outbox=DIR --json",
        "list DIR --limit 3", "list --limit 3 DIR", "list --limit 3 DIR --json", "list --outbox DIR",
        "show DIR 2", "show --json DIR 2", "show DIR --json 2", "show DIR 2 --json", "show --outbox DIR 2",
        "show 2 --outbox DIR", "show --outbox DIR --json 2", "show DIR -- 2",
    ],
)  # fmt: skip
def test_an_outbox_is_named_by_its_folder(argv: str, mixed: Outbox, folder: Path, run: Run) -> None:
    code, out, err = run(*argv.replace("DIR", str(folder)).split())
    assert (code, err if "limit" not in argv else "") == (0, "")
    assert "track" in out or str(folder) in out


def test_an_outbox_is_named_by_its_write_key(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, count in ((KEY, 1), ("another", 2)):
        box = Outbox(default_outbox_dir(key), SystemClock(), write_key=key)
        fill(box, count)
        box.close()
    assert json.loads(run("status", "--json", "--write-key", KEY)[1])["pending"] == 1
    monkeypatch.setenv("SEGMENT_WRITE_KEY", "another")
    assert json.loads(run("status", "--json")[1])["pending"] == 2
    assert json.loads(run("status", "--json", "--write-key", KEY)[1])["pending"] == 1  # before the environment
    assert json.loads(run("status", "--json", default_outbox_dir(KEY))[1])["pending"] == 1
    monkeypatch.setenv("SEGMENT_WRITE_KEY", "a third")
    fails(run("status"), "$SEGMENT_WRITE_KEY", "--outbox", str(default_outbox_dir("a third")))


def test_the_only_outbox_is_found(run: Run, tmp_path: Path) -> None:
    fails(run("status"), str(tmp_path / "base"), "no outbox was found", "--outbox", "SEGMENT_DURABLE_DIR")
    (tmp_path / "base" / "no outbox").mkdir(parents=True)
    fails(run("status"), "no outbox was found")
    Outbox(default_outbox_dir(KEY), SystemClock()).close()
    code, out, _ = run("status")
    assert code == 0
    assert str(default_outbox_dir(KEY)) in out
    Outbox(default_outbox_dir("another"), SystemClock()).close()
    names = [default_outbox_dir(key).name for key in (KEY, "another")]
    fails(run("status"), "several", *names)


def test_a_write_key_is_never_printed(run: Run, monkeypatch: pytest.MonkeyPatch, mixed: Outbox, folder: Path) -> None:
    mistakes: list[list[str | Path]] = [
        ["status", "--write-key", KEY],
        ["--write-key", KEY, "status"],
        [f"--write-key={KEY}", "status"],
        ["--write-key", KEY],
        ["status", "--write_key", KEY],
        ["status", f"--write_key={KEY}"],
        ["status", f"--write={KEY}"],
        ["show", "1", "--write-key", KEY],
        ["status", "--write-key", f"{KEY}:"],
        ["status", "--write-key", f"{KEY}\n"],
        ["status", folder, "--write-key", KEY],
        ["status", "a", "b", KEY],
    ]
    for argv in mistakes:
        result = run(*argv)
        fails(result)
        assert KEY not in result[2], argv
    monkeypatch.setenv("SEGMENT_WRITE_KEY", KEY)
    fails(run("status"))
    assert KEY not in "".join(map(str, run("status", folder) + run("list", folder) + run("show", folder, "2")))


# -- errors


def test_a_wrong_command_line(run: Run, folder: Path) -> None:
    fails(run(), "name a command")
    fails(run("stauts"), "name a command")
    fails(run("show"), "ID|MESSAGE_ID")
    fails(run("list", "--limit", "-1"), "--limit")
    fails(run("list", "--limit", "many"), "--limit", "whole number")
    fails(run("list", "--from", str(2**63)), "--from")
    fails(run("list", "--state", "gone"), "--state")
    fails(run("status", folder, "--nonsense"), "--nonsense")
    fails(run("status", folder, "more"), "too many arguments")
    fails(run("status", folder, "--outbox", folder), "only one")
    fails(run("status", ""), "empty")
    fails(run("status", "--outbox="), "empty")


def test_help_and_version(run: Run) -> None:
    assert run("--version")[:2] == (0, (ROOT / "segment_durable" / "version.py").read_text().split('"')[1] + "\n")
    code, out, _ = run("--help")
    assert (code, "status" in out) == (0, True)
    code, out, _ = run("show", "--help")
    assert (code, "[DIR] ID|MESSAGE_ID" in out) == (0, True)


@pytest.mark.parametrize("command", ["status", "list", "show"])
def test_a_path_that_is_no_outbox(run: Run, tmp_path: Path, command: str) -> None:
    def attempt(path: Path) -> tuple[int, str, str]:
        return run(command, path, *(["1"] if command == "show" else []))

    fails(attempt(tmp_path / "nowhere"), str(tmp_path / "nowhere"), "no such folder")
    fails(attempt(tmp_path), str(tmp_path), "outbox.db is missing")
    path = tmp_path / "outbox.db"
    path.mkdir()
    fails(attempt(tmp_path), str(path), "is no file")
    path.rmdir()
    path.write_bytes(b"")
    fails(attempt(tmp_path), "not an outbox")
    fails(attempt(path), "is no folder")
    for garbage in (b"hello", b"garbage " * 5000, b"SQLite format 3\0" + b"\xff" * 5000):
        path.write_bytes(garbage)
        fails(attempt(tmp_path), str(path), "not an outbox")
        assert path.read_bytes() == garbage
    path.unlink()
    for mode in ("delete", "wal"):
        other = sqlite3.connect(path)
        other.execute(f"PRAGMA journal_mode={mode}")
        other.execute(f"CREATE TABLE journal_{mode} (x)")
        other.close()
        fails(attempt(tmp_path), str(path), "not an outbox")
    assert [each.name for each in tmp_path.iterdir()] == ["outbox.db"]


def test_a_damaged_outbox(folder: Path, run: Run) -> None:
    box = Outbox(folder, SystemClock())
    fill(box, 50)
    close(box)
    path = folder / "outbox.db"
    content = path.read_bytes()
    path.write_bytes(content[:2048] + b"\xff" * (len(content) - 2048))
    for argv in (["status", folder], ["list", folder], ["show", folder, "1"], ["show", folder, "message-1"]):
        fails(run(*argv), str(path), "damaged")


def test_an_outbox_of_a_newer_version(folder: Path, run: Run) -> None:
    box = Outbox(folder, SystemClock())
    close(box)
    with contextlib.closing(sqlite3.connect(folder / "outbox.db")) as connection:
        connection.execute("PRAGMA user_version=2")
    assert run("status", folder)[0] == 0  # additive, as it does not say otherwise
    with contextlib.closing(sqlite3.connect(folder / "outbox.db")) as connection:
        connection.execute("UPDATE meta SET value = '2' WHERE name = 'min_writer'")
        connection.commit()
    fails(run("status", folder), "newer")
    with contextlib.closing(sqlite3.connect(folder / "outbox.db")) as connection:
        connection.execute("UPDATE meta SET value = 'x' WHERE name = 'min_writer'")
        connection.commit()
    for command in (["status"], ["list"], ["show", "1"]):
        fails(run(command[0], folder, *command[1:]), "damaged")


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM state",
        "UPDATE state SET last_id = 'x'",
        "UPDATE dead SET code = x'00'",
        "UPDATE dead SET answer = x'07'",
        "UPDATE dead SET buried_at = 'x'",
    ],
)
def test_values_that_can_not_be_are_damage(box: Outbox, folder: Path, run: Run, damage: str) -> None:
    box.put(body(1), 0)
    box.bury(take(box, 1), 1, status=400, code="c", answer="a", max_dead=10)
    with box.db.write() as connection:
        connection.execute("PRAGMA ignore_check_constraints=ON")
        connection.execute(damage)
    for argv in (["list", folder], ["list", "--json", folder]):
        fails(run(*argv), "damaged")


# -- no trace


COMMANDS = (["status", "--verify"], ["list"], ["list", "--limit", "0", "--json"], ["show", "2"], ["show", "message-6"])


def look_at(folder: Path, run: Run) -> None:
    for command, *rest in COMMANDS:
        code, out, _ = run(command, "--outbox", folder, *rest)
        assert code == 0
        assert out


def test_an_outbox_in_use_is_not_changed(mixed: Outbox, folder: Path, run: Run) -> None:
    before = trace(folder)
    assert "outbox.db-wal" in before
    look_at(folder, run)
    assert trace(folder) == before
    assert mixed.put(body(7), 0)  # and its owner goes on


def test_an_idle_outbox_is_not_changed(mixed: Outbox, folder: Path, run: Run) -> None:
    close(mixed)
    before = trace(folder)
    assert set(before) == {"outbox.db", "outbox.lock", "outbox.reserve"}
    look_at(folder, run)
    assert trace(folder) == before


def test_the_lock_file_is_not_opened(mixed: Outbox, folder: Path, run: Run) -> None:
    close(mixed)
    (folder / "outbox.lock").unlink()
    os.mkfifo(folder / "outbox.lock")  # to open it would hang
    look_at(folder, run)


def test_what_a_killed_process_left_is_read_and_not_changed(folder: Path, run: Run) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from segment_durable.clock import SystemClock; from segment_durable.outbox import Outbox\n"
        "box = Outbox(Path(sys.argv[1]), SystemClock())\n"
        'for i in range(6): box.put(b\'{"messageId": "message-%d"}\' % (i + 1), 0)\n'
        "box.lease(2, 60)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT).returncode == -signal.SIGKILL
    before = trace(folder)
    assert before["outbox.db-wal"][0] > 0
    look_at(folder, run)
    assert trace(folder) == before
    # Whether the holder lives is in the lock file; for a reader the lease lasts until its deadline.
    assert json.loads(run("status", "--json", folder)[1])["leased"] == 2


def test_a_look_is_taken_again_when_a_process_comes_meanwhile(folder: Path) -> None:
    close(Outbox(folder, SystemClock()))
    looks: list[int] = []

    def look(connection: sqlite3.Connection) -> int:
        looks.append(connection.execute("SELECT count(*) FROM event").fetchone()[0])
        if len(looks) == 1:
            box = Outbox(folder, SystemClock())
            fill(box, 3)
            close(box)
        return looks[-1]

    assert Reader(folder).view(look) == 3
    assert looks == [0, 3]


def test_damage_is_believed_only_if_no_process_came_meanwhile(folder: Path) -> None:
    close(Outbox(folder, SystemClock()))
    looks = []

    def look(connection: sqlite3.Connection) -> None:
        looks.append(1)
        if len(looks) == 1:
            box = Outbox(folder, SystemClock())
            fill(box, 1)
            close(box)
        raise sqlite3.DatabaseError("database disk image is malformed")

    with pytest.raises(OutboxUnavailable, match="damaged"):
        Reader(folder).view(look)
    assert len(looks) == 2


def test_looks_have_an_end(folder: Path) -> None:
    close(Outbox(folder, SystemClock()))
    path = folder / "outbox.db"
    with pytest.raises(OutboxUnavailable, match="try again"):
        Reader(folder).view(lambda _: os.utime(path, ns=(0, path.stat().st_mtime_ns + 1)))


# -- beside other processes


def script(*argv: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *argv], capture_output=True, text=True, env={**os.environ, **environment}, timeout=60
    )


WRITER = """
import sys, threading, time
from pathlib import Path
from segment_durable.clock import SystemClock
from segment_durable.outbox import Outbox

box = Outbox(Path(sys.argv[1]), SystemClock())
end = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), end.set()), daemon=True).start()
count = 0
while not end.is_set():
    assert box.put(b'{"type": "track", "messageId": "m-%d"}' % (count + 1), int(time.time() * 1000))
    count += 1
    if count % 5 == 0:
        lease = box.lease(3, 60)
        assert box.ack(lease, lease.last) == 3
    if count == 50:
        print("ready", flush=True)
print(count, flush=True)
sys.stdin.close()
import os, signal
os.kill(os.getpid(), signal.SIGKILL)
"""


@contextlib.contextmanager
def writer(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the outbox open, appends and delivers; it has begun."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def test_the_script_beside_a_process_that_writes(folder: Path) -> None:
    with writer(folder) as process:
        before = set(os.listdir(folder))
        accepted = [0]
        for _ in range(5):
            result = script("status", "--json", "--verify", folder)
            assert (result.returncode, result.stderr) == (0, "")
            found = json.loads(result.stdout)
            assert found["accepted"] == found["delivered"] + found["pending"]
            assert found["verification"]["passed"] is True
            accepted.append(found["accepted"])
        assert accepted == sorted(set(accepted))  # it went on all the time
        result = script("list", folder)
        assert (result.returncode, result.stdout.count("\n")) == (0, 20)
        assert set(os.listdir(folder)) == before
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        count = int(process.stdout.readline())
        process.wait()
    assert json.loads(script("status", "--json", folder).stdout)["accepted"] == count


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["list --limit 0", "list --limit 3", "status"])
def test_a_closed_pipe_is_no_error(folder: Path, command: str, unbuffered: str) -> None:
    box = Outbox(folder, SystemClock())
    fill(box, 3000)
    close(box)
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *command.split(), folder],
        stdout=writing, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    os.close(writing)
    if command.endswith("0"):  # then more than a pipe holds is still to come after the first bytes
        assert os.read(reading, 10)
    os.close(reading)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0


def test_the_script_goes_into_the_checkouts_environment_where_a_module_is_missing(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    copied = shutil.copy(SCRIPT, tmp_path / "scripts")
    (tmp_path / "scripts" / "_venv.py").write_text("import sys\n\ndef run_inside():\n    sys.exit('arranged')\n")
    result = subprocess.run([sys.executable, "-I", "-S", copied, "status"], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", "arranged\n")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can reach, which those of pytest are not."""
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        folder = Path(parent) / "outbox"
        yield folder
        folder.chmod(0o700)


def as_guest(*argv: str | Path) -> tuple[int, str, str]:
    """Run the command in a process that may not do what root may."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                sys.stdout, sys.stderr = out, err
                if os.geteuid() == 0:
                    os.setgroups([])
                    os.setgid(65_534)
                    os.setuid(65_534)
                code = main([str(each) for each in argv])
                out.flush()
                err.flush()
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0)
        err.seek(0)
        return code, out.read(), err.read()


def share(folder: Path, *, mode: int) -> None:
    for path in folder.iterdir():
        path.chmod(0o644)
    folder.chmod(mode)


@posix_only
def test_a_folder_that_is_not_writable(open_folder: Path) -> None:
    box = Outbox(open_folder, SystemClock())
    fill(box, 3)
    close(box)
    share(open_folder, mode=0o555)
    before = trace(open_folder)
    code, out, err = as_guest("status", "--verify", open_folder)
    assert (code, err) == (0, "")
    assert "pending       3\n" in out
    assert as_guest("list", open_folder)[1].count("\n") == 3
    assert as_guest("show", open_folder, "message-3")[0] == 0
    assert trace(open_folder) == before


@posix_only
def test_a_folder_that_is_not_writable_while_its_owner_writes(open_folder: Path) -> None:
    with writer(open_folder):
        share(open_folder, mode=0o555)
        code, out, err = as_guest("status", "--verify", "--json", open_folder)
        assert (code, err) == (0, "")
        assert json.loads(out)["accepted"] >= 50
        open_folder.chmod(0o700)


@posix_only
def test_a_wal_without_shared_memory_in_a_folder_that_is_not_writable(open_folder: Path, tmp_path: Path) -> None:
    box = Outbox(tmp_path / "original", SystemClock())
    fill(box, 3)
    shutil.copytree(tmp_path / "original", open_folder)  # a backup
    box.close()
    (open_folder / "outbox.db-shm").unlink()
    share(open_folder, mode=0o555)
    fails(as_guest("status", open_folder), "outbox.db", "write in the folder")


@posix_only
@pytest.mark.skipif(os.name == "posix" and os.geteuid() != 0, reason="needs another user's files")
def test_an_outbox_that_this_user_may_not_read(open_folder: Path) -> None:
    close(Outbox(open_folder, SystemClock()))
    fails(as_guest("status", open_folder), str(open_folder), "Permission denied")
    open_folder.chmod(0o755)
    fails(as_guest("status", open_folder), "outbox.db", "may not read")


# -- words


def test_ages_have_two_units() -> None:
    found = [age(each) for each in (None, 0, -1, 59.9, 60, 252, 3599, 3600, 11_100, 86_399, 86_400, 187_200)]
    assert found == [
        *("-", "0s", "0s", "59s", "1m 00s", "4m 12s", "59m 59s"),
        *("1h 00m", "3h 05m", "23h 59m", "1d 00h", "2d 04h"),
    ]


def test_sizes_have_a_unit() -> None:
    found = [bytes_text(each) for each in (0, 1023, 1024, 1_300_000, 5 << 30, 3 << 40)]
    assert found == ["0 bytes", "1023 bytes", "1.0 KiB", "1.2 MiB", "5.0 GiB", "3.0 TiB"]


# -- docs


def commands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (each for each in build_parser()._actions if isinstance(each, argparse._SubParsersAction))
    return dict(action.choices)


def test_the_documentation_has_every_command_and_option() -> None:
    text = (ROOT / "docs" / "cli.md").read_text("utf-8")
    sections = dict(re.findall(r"^## `(\w+)[^\n]*\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert sorted(sections) == sorted(commands())
    shared = {"--outbox", "--write-key", "-h", "--help"}
    assert all(f"`{each}" in text for each in (*shared, "--version"))
    for name, parser in commands().items():
        assert isinstance(parser, CommandParser)
        options = {option for action in parser._actions for option in action.option_strings} - shared
        # A table row for each option, and no row for an option that is not there.
        assert set(re.findall(r"^\| `(--?[\w-]+)", sections[name], re.MULTILINE)) == options, name
        assert f"$ segment-durable {name}" in sections[name]


# -- requeue and erase


def dead_letters_of(folder: Path, count: int, pending: int = 0) -> None:
    box = Outbox(folder, SystemClock())
    fill(box, count + pending)
    lease = take(box, count)
    for number in range(1, count + 1):
        box.bury(lease, number, status=400, code="bad", answer="no", max_dead=99)
    close(box)


def after(folder: Path) -> tuple[int, int, int, bool]:
    box = Outbox(folder, SystemClock())
    stats = box.stats()
    close(box)
    return stats.pending, stats.dead, stats.erased, stats.balanced


def test_requeue_gives_dead_letters_another_chance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dead_letters_of(tmp_path, 3)
    assert main(["requeue", str(tmp_path), "--id", "1", "--id", "3"]) == 0
    assert capsys.readouterr().out == "2 events requeued\n"
    assert after(tmp_path) == (2, 1, 0, True)
    assert main(["requeue", "--all", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "1 event requeued\n"
    assert after(tmp_path) == (3, 0, 0, True)
    assert main(["requeue", str(tmp_path), "--id", "1"]) == 1
    assert "not all" in capsys.readouterr().err


def test_erase_asks_for_a_yes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dead_letters_of(tmp_path, 2, pending=3)
    for state, there in (("dead", "2 events"), ("pending", "3 events")):
        assert main(["erase", str(tmp_path), "--state", state, "--all"]) == 1
        said = capsys.readouterr()
        assert (said.out, there in said.err, "--yes" in said.err) == ("", True, True)
    assert main(["erase", str(tmp_path), "--state", "pending", "--id", "4", "--id", "4"]) == 1
    assert "3 events pending, of which 1 by --id;" in capsys.readouterr().err
    for there, ids in ((0, ("2", "99")), (2, ("2", "3", "4"))):  # 2 is dead
        assert main(["erase", str(tmp_path), "--state", "pending", *(f"--id={each}" for each in ids)]) == 1
        assert f"3 events pending, of which {there} by --id;" in capsys.readouterr().err
    assert main(["erase", str(tmp_path), "--state", "dead", "--id", "2", "--id", "4"]) == 1
    assert "2 events dead, of which 1 by --id;" in capsys.readouterr().err
    assert after(tmp_path) == (3, 2, 0, True)
    assert main(["erase", str(tmp_path), "--state", "dead", "--all", "--yes"]) == 0
    assert main(["erase", str(tmp_path), "--state", "pending", "--id", "4", "--yes"]) == 0
    assert capsys.readouterr().out == "2 events erased\n1 event erased\n"
    assert after(tmp_path) == (2, 0, 3, True)


def test_erase_leaves_what_a_running_process_has_on_its_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    box = Outbox(tmp_path, SystemClock())
    fill(box, 5)
    lease = take(box, 2)
    # In a process of its own: in this one the lease would be this one's.
    command = [sys.executable, str(SCRIPT), "erase", str(tmp_path), "--state", "pending", "--all", "--yes"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "3 events erased, 2 on their way stay\n")
    assert box.ack(lease, 2) == 2
    assert box.stats().balanced
    close(box)


def test_a_change_that_is_interrupted_says_where_to_see_how_far_it_came(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Outbox(tmp_path, SystemClock())
    fill(box, 5)
    close(box)
    erase, portions = Outbox._erase, iter(range(2))

    def erase_a_portion(self: Outbox, spans: Sequence[tuple[int, int]]) -> int:
        if next(portions, None) is None:
            raise KeyboardInterrupt
        return erase(self, spans)

    monkeypatch.setattr("segment_durable.outbox._ERASED_AT_ONCE", 2)
    monkeypatch.setattr(Outbox, "_erase", erase_a_portion)
    assert main(["erase", str(tmp_path), "--state", "pending", "--all", "--yes"]) == 130
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert "stays done, see `segment-durable status`" in said.err
    assert after(tmp_path) == (1, 0, 4, True)


@pytest.mark.parametrize("command", [["requeue", "--all"], ["erase", "--state", "dead", "--all", "--yes"]])
def test_what_changes_an_outbox_makes_none(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, str(tmp_path)]) == 2
    assert "no outbox is here" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main([command[0], str(tmp_path)]) == 2
    assert "--" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "said"), [("status", ""), ("list", "there are more: --from 21\n")])
def test_a_command_whose_stdout_is_closed_does_its_work(tmp_path: Path, name: str, said: str) -> None:
    box = Outbox(tmp_path / "outbox", SystemClock(), write_key="k")
    for _ in range(21):
        box.put(b"{}", 1)
    box.close()
    program = "import sys; from segment_durable.cli import main; sys.exit(main())"
    command = shlex.join([sys.executable, "-c", program, name, str(tmp_path / "outbox")])
    done = subprocess.run(["sh", "-c", f"{command} >&-"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, said)


def test_what_belongs_on_a_closed_stderr_does_not_come_out_of_stdout(tmp_path: Path) -> None:
    program = "import sys; from segment_durable.cli import main; sys.exit(main())"
    command = shlex.join([sys.executable, "-c", program, "status", str(tmp_path / "nowhere")])
    done = subprocess.run(["sh", "-c", f"{command} 2>&-"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
