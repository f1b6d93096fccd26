"""requeue and erase: what only a person may decide.  Safe beside running processes."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

from segment_durable.cli.arguments import add_outbox_options, locate, whole_number
from segment_durable.cli.events import find_id
from segment_durable.cli.format import say, tell
from segment_durable.cli.reading import Reader
from segment_durable.clock import Clock
from segment_durable.outbox import Outbox

__all__ = ["add_commands", "erase", "requeue"]


def add_commands(commands: Any) -> None:
    """Add this group to what `ArgumentParser.add_subparsers()` has returned."""
    parser = commands.add_parser("requeue", help="give dead letters another chance, behind what is pending")
    add_outbox_options(parser)
    _add_which(parser)
    parser.set_defaults(run=requeue)

    parser = commands.add_parser("erase", help="remove events for good, undelivered")
    add_outbox_options(parser)
    parser.add_argument("--state", choices=("pending", "dead"), required=True, help="of which events")
    _add_which(parser)
    parser.add_argument("--yes", action="store_true", help="do it; without this nothing is removed")
    parser.set_defaults(run=erase)


def requeue(args: argparse.Namespace, clock: Clock) -> int:
    """Exit code 0, or 1 if one of the ids is not a dead letter's."""
    with _outbox(args, clock) as outbox:
        moved = outbox.requeue(args.ids)
    say(f"{_events(moved)} requeued")
    return _is_short(args, moved)


def erase(args: argparse.Namespace, clock: Clock) -> int:
    """Exit code 0; 1 if `--yes` is missing, or one of the ids is not there or is on its way."""
    with _outbox(args, clock) as outbox:
        if not args.yes:
            stats = outbox.stats()
            there = stats.dead if args.state == "dead" else stats.pending
            which = "" if args.ids is None else f", of which {_named(args, clock)} by --id"
            tell(f"nothing was removed: {_events(there)} {args.state}{which}; to remove them for good add --yes")
            return 1
        erased = outbox.erase_dead(args.ids) if args.state == "dead" else outbox.erase(args.ids)
        left = outbox.stats().leased if args.state == "pending" else 0
    say(f"{_events(erased)} erased" + (f", {left} on their way stay" if left else ""))
    return _is_short(args, erased)


def _add_which(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true", help="all of them")
    which.add_argument(
        "--id", metavar="ID", dest="ids", type=whole_number, action="append", help="this one; repeatable"
    )


@contextlib.contextmanager
def _outbox(args: argparse.Namespace, clock: Clock) -> Iterator[Outbox]:
    reader = Reader(locate(args))
    reader.view(lambda _: None)  # says clearly if there is none: opening for writing would make one
    outbox = Outbox(reader.folder, clock)
    try:
        yield outbox
    except KeyboardInterrupt:
        tell("interrupted: what was done up to now stays done, see `segment-durable status`")
        raise
    finally:
        outbox.close()


def _named(args: argparse.Namespace, clock: Clock) -> int:
    """How many of the ids are there, in the state that is asked for."""
    found = (find_id(Reader(locate(args)), clock, each) for each in set(args.ids))
    return sum((each.state == "dead") == (args.state == "dead") for each in found if each is not None)


def _events(count: int) -> str:
    return f"{count} event" if count == 1 else f"{count} events"


def _is_short(args: argparse.Namespace, done: int) -> int:
    if args.ids is None or done == len(set(args.ids)):
        return 0
    tell("not all of these ids are there in that state, or some are on their way now")
    return 1
