"""The `segment-durable` command; `docs/cli.md` describes it for its users.

Each group of commands is one module with an `add_commands(commands)`; a command is a function of the parsed arguments
and a clock that returns the exit code.  Exit codes: 0 all is well, 1 what was asked for is not so (the books don't
balance, no such event), 2 the command line is wrong or the outbox can't be read, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sqlite3
import sys
from collections.abc import Sequence

from segment_durable.cli import changes, inspection
from segment_durable.cli.arguments import PROGRAM, CommandParser, Program, UsageError
from segment_durable.cli.format import harmless, tell
from segment_durable.clock import SystemClock
from segment_durable.errors import SegmentDurableError
from segment_durable.version import VERSION

__all__ = ["build_parser", "main"]

_GROUPS = (inspection, changes)


def build_parser() -> argparse.ArgumentParser:
    parser = Program(prog=PROGRAM, description="Look after the outbox of a program that uses segment_durable.")
    parser.add_argument("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", title="commands", required=True, parser_class=CommandParser
    )
    for group in _GROUPS:
        group.add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` without the program's name, `None` means that of the process.  Returns the exit code."""
    code = 0
    try:
        args = _parse(argv)
        code = args.run(args, SystemClock())
        if sys.stdout is not None:  # as it is where that was closed
            sys.stdout.flush()
    except SystemExit as end:  # argparse, after --help and --version
        return int(end.code or 0)
    except BrokenPipeError:
        _discard_output()
    except KeyboardInterrupt:
        return 130
    except (SegmentDurableError, UsageError, sqlite3.Error, OSError) as problem:
        tell(f"{PROGRAM}: {harmless(_one_line(problem))}")
        return 2
    return code


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    # Not parse_args(): its message repeats what it did not understand, and that may be a write key.
    args, unknown = build_parser().parse_known_args(argv)
    if unknown:
        options = [each.partition("=")[0] for each in unknown if each.startswith("-") and each != "--"]
        problem = f"unknown option {options[0]}" if options else "too many arguments"
        raise UsageError(f"{problem} (see {PROGRAM} {args.command} --help)")
    return args


def _one_line(problem: Exception) -> str:
    if isinstance(problem, OSError) and problem.strerror:
        return f"{problem.filename}: {problem.strerror}" if problem.filename else problem.strerror
    return str(problem)


def _discard_output() -> None:
    """The reader (`| head`) has gone: what is still buffered must not raise once more when the interpreter ends."""
    with contextlib.suppress(OSError, ValueError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(devnull, sys.stdout.fileno())
        finally:
            os.close(devnull)
