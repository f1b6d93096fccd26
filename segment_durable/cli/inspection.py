"""status, list and show: they only read, and leave no trace in the outbox."""

from __future__ import annotations

import argparse
import sqlite3
import sys
from dataclasses import asdict
from itertools import islice
from typing import Any

from segment_durable.cli.arguments import add_outbox_options, locate, whole_number
from segment_durable.cli.damaged import damaged_lines, damaged_report, read_damaged
from segment_durable.cli.events import STATES, Event, LeaseSeen, find_id, find_message, read_leases, scan
from segment_durable.cli.format import age, bytes_text, harmless, json_line, json_pages, moment, say, tell
from segment_durable.cli.reading import Reader
from segment_durable.clock import Clock
from segment_durable.records import DamagedSet, OutboxStats
from segment_durable.views import read_stats

__all__ = ["add_commands", "list_events", "show", "status"]

_NAME_WIDTH = 32  # characters of an event's name in a line
_DAMAGES = 10  # of those that SQLite finds, how many are reported


def add_commands(commands: Any) -> None:
    """Add this group to what `ArgumentParser.add_subparsers()` has returned."""
    parser = commands.add_parser("status", help="how many events wait, what keeps them, and whether the books balance")
    add_outbox_options(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--verify", action="store_true", help="count the events and check the database; takes longer")
    parser.set_defaults(run=status)

    parser = commands.add_parser("list", help="the events, one a line, oldest first")
    add_outbox_options(parser)
    parser.add_argument("--state", choices=STATES, default="all", help="which ones (default: all)")
    parser.add_argument("--limit", metavar="N", type=whole_number, default=20, help="at most N; 0: all (default: 20)")
    parser.add_argument("--from", metavar="ID", dest="first", type=whole_number, default=0, help="from this id on")
    parser.add_argument("--type", metavar="TYPE", help="of this type only, such as track")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.set_defaults(run=list_events)

    parser = commands.add_parser("show", help="one event as a whole")
    add_outbox_options(parser)
    parser.add_argument("event", metavar="ID|MESSAGE_ID", help="its number in the outbox, or its messageId")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=show)


def status(args: argparse.Namespace, clock: Clock) -> int:
    """Exit code 0, or 1 if the books don't balance or the verification fails."""
    reader = Reader(locate(args))

    def look(
        connection: sqlite3.Connection,
    ) -> tuple[OutboxStats, list[LeaseSeen], list[DamagedSet], bool, list[int | None]]:
        def is_dead(row: Any, now: float) -> bool:
            return LeaseSeen.of(row, now, clock.boot_id()).is_dead

        stats = read_stats(connection, clock, reader.size_on_disk(), is_dead)
        counts = [_count(connection, table) for table in ("event", "dead")] if args.verify else []
        damaged = read_damaged(connection, reader.folder)
        return stats, read_leases(connection, clock), damaged, _is_balanced(connection, stats), counts

    stats, leases, damaged, balanced, counts = reader.view(look)
    report: dict[str, Any] = {"outbox": str(reader.folder), **asdict(stats)}
    report["leases"] = [{**asdict(lease), "dead": lease.is_dead} for lease in leases]
    report["damaged"] = damaged_report(damaged)
    report["balanced"] = balanced
    good = balanced
    if args.verify:
        # In a view of its own: it takes long, and while a view lasts the WAL can't be checkpointed.
        damages = reader.view(_find_damages)
        verified = counts == [stats.pending, stats.dead] and not damages
        report["verification"] = {"events": counts[0], "dead": counts[1], "damages": damages, "passed": verified}
        good = good and verified
    if args.json:
        say(json_line(report))
    else:
        for name, text in _status_lines(report, leases, damaged):
            say(harmless(f"{name:<14}{text}"))
    return 0 if good else 1


def list_events(args: argparse.Namespace, clock: Clock) -> int:
    """Exit code 0, also if there is none."""
    now = clock.time()
    events = scan(Reader(locate(args)), clock, args.state, args.first)
    if args.type is not None:
        events = (event for event in events if event.field("type") == args.type)
    for event in islice(events, args.limit or None):
        say(json_line(_summary(event, now)) if args.json else _line(event, now))
    # With --type the next one may be a million events away.
    ask = args.limit and args.type is None and not args.json
    following = next(events, None) if ask else None
    if following is not None:
        if sys.stdout is not None:
            sys.stdout.flush()
        tell(f"there are more: --from {following.id}")
    return 0


def show(args: argparse.Namespace, clock: Clock) -> int:
    """Exit code 0, or 1 if there is no such event."""
    reader = Reader(locate(args))
    event = None
    try:
        event = find_id(reader, clock, whole_number(args.event))
    except argparse.ArgumentTypeError:
        pass
    if event is None:
        event = find_message(reader, clock, args.event)
    if event is None:
        tell(f"{harmless(args.event)}: it has left the outbox, or never was in it")
        return 1
    if args.json:
        say(json_line(_whole(event)))
        return 0
    facts = _whole(event)
    message = facts.pop("message")
    for name, value in facts.items():
        say(harmless(f"{name:<14}{value}"))
    say("")
    for line in json_pages(message).split("\n"):
        say(line)
    return 0


def _is_balanced(connection: sqlite3.Connection, stats: OutboxStats) -> bool:
    """The books, and what of the rows can be compared with them without counting: the first and the last id."""
    low, high = connection.execute("SELECT (SELECT min(id) FROM event), (SELECT max(id) FROM event)").fetchone()
    room = 0 if low is None else high - low + 1
    return stats.balanced and stats.pending <= room and (stats.pending > 0) == (room > 0)


def _count(connection: sqlite3.Connection, table: str) -> int | None:
    """How many rows there are, None if the table is damaged."""
    try:
        count: int = connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
    except sqlite3.OperationalError:  # not what is in the file, but that it can't be read now
        raise
    except sqlite3.DatabaseError:
        return None
    return count


def _find_damages(connection: sqlite3.Connection) -> list[str]:
    """What SQLite's quick_check finds, in its own words."""
    try:
        found = [str(row[0]) for row in connection.execute(f"PRAGMA quick_check({_DAMAGES})")]
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as problem:
        return [str(problem)]
    return [] if found == ["ok"] else found


def _status_lines(report: dict[str, Any], leases: list[LeaseSeen], damaged: list[DamagedSet]) -> list[tuple[str, str]]:
    wait = report["next_attempt_seconds"]
    error = report["last_error"]
    lines = [
        ("outbox", report["outbox"]),
        ("pending", str(report["pending"])),
        ("leased", str(report["leased"])),
        ("dead", str(report["dead"])),
        ("oldest", age(report["oldest_age_seconds"])),
        ("size on disk", bytes_text(report["size_on_disk"])),
        ("failures", f"{report['failures']} in a row"),
        ("next attempt", f"in {age(wait)}" if wait > 0 else "at any time"),
        ("last error", f"{error} ({age(report['last_error_age_seconds'])} ago)" if error else "none"),
        *(("lease", _lease_text(lease)) for lease in leases),
        *damaged_lines(damaged),
        (
            "books",
            "accepted {accepted} = delivered {delivered} + dead {dead} + erased {erased} + expired {expired} "
            "+ pending {pending}: {verdict}".format(
                **report, verdict="balanced" if report["balanced"] else "NOT BALANCED"
            ),
        ),
    ]
    check = report.get("verification")
    if check is not None:
        verdict = "passed" if check["passed"] else "FAILED"
        pending, dead = ("?" if check[table] is None else check[table] for table in ("events", "dead"))
        lines.append(("verification", f"{verdict}: counted {pending} pending, {dead} dead"))
        lines += [("damage", each) for each in check["damages"]]
    return lines


def _lease_text(lease: LeaseSeen) -> str:
    what = f"ids {lease.first} to {lease.last}, pid {lease.pid}, attempt {lease.earlier_attempts + 1}"
    if lease.remaining_seconds is None:
        return f"{what}, from before a restart of this machine: will be taken over"
    if lease.is_dead:
        return f"{what}, deadline passed {age(-lease.remaining_seconds)} ago: will be taken over"
    return f"{what}, taken {age(lease.age_seconds)} ago, deadline in {age(lease.remaining_seconds)}"


def _summary(event: Event, now: float) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "id": event.id,
        "state": event.state,
        "age_seconds": round(max(0.0, now - event.appended_at / 1000), 3),
        "type": event.field("type"),
        "event": event.field("event", "name"),
        "messageId": event.field("messageId"),
        "userId": event.field("userId"),
    }
    if event.state == "dead":
        facts |= {"status": event.status, "code": event.code}
    return facts


def _line(event: Event, now: float) -> str:
    facts = _summary(event, now)
    texts = {name: "-" if value is None else harmless(str(value)) for name, value in facts.items()}
    name = texts["event"] if len(texts["event"]) <= _NAME_WIDTH else f"{texts['event'][: _NAME_WIDTH - 3]}..."
    line = (
        f"{event.id:>8}  {event.state:<7}  {age(facts['age_seconds']):>7}  {texts['type']:<8}  {name:<{_NAME_WIDTH}}  "
        f"{texts['messageId']:<36}  {texts['userId']}"
    )
    return f"{line}  {texts['status']} {texts['code']}" if event.state == "dead" else line


def _whole(event: Event) -> dict[str, Any]:
    facts: dict[str, Any] = {"id": event.id, "state": event.state, "appended_at": moment(event.appended_at)}
    if event.state == "dead":
        facts |= {"buried_at": moment(event.buried_at or 0), "status": event.status, "code": event.code}
        facts |= {"answer": event.answer}
    return facts | {"message": event.message}
