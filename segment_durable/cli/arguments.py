"""The command line: its parser, and which outbox is meant."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, NoReturn

from segment_durable.config import ENVIRONMENT_DIR, Config, default_outbox_dir
from segment_durable.database_file import DATABASE_NAME
from segment_durable.errors import OutboxUnavailable

__all__ = ["PROGRAM", "CommandParser", "Program", "UsageError", "add_outbox_options", "locate", "whole_number"]

PROGRAM = "segment-durable"
ENVIRONMENT_KEY = "SEGMENT_WRITE_KEY"
_LARGEST_ID = 2**63 - 1  # of SQLite


class UsageError(Exception):
    """The command line is wrong: exit code 2."""


class Program(argparse.ArgumentParser):
    """The parser of the words before a command.  Raises `UsageError` instead of exiting."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        # argparse's message would repeat the word that is no command, and with a misplaced option that is its value.
        raise UsageError(f"name a command first, options come after it (see {PROGRAM} --help)")


class CommandParser(argparse.ArgumentParser):
    """The parser of one command: options may stand before, between and behind the other arguments.

    Plain argparse takes an optional DIR for absent as soon as it meets an option (`status --json DIR`).
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)
        self._mixing = False

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._mixing:  # called by the line below
            return super().parse_known_args(args, namespace)
        self._mixing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._mixing = False


def add_outbox_options(parser: argparse.ArgumentParser) -> None:
    """DIR, --outbox and --write-key, which `locate` understands."""
    parser.add_argument("folder", metavar="DIR", nargs="?", help=f"the outbox: the folder that holds {DATABASE_NAME}")
    parser.add_argument("--outbox", metavar="DIR", help="the same as DIR")
    parser.add_argument(
        "--write-key",
        metavar="KEY",
        help=f"the source whose outbox is meant, if its program does not set outbox_dir (default: ${ENVIRONMENT_KEY})",
    )


def whole_number(text: str) -> int:
    """An argument that is 0 or more, and no more than an id can be."""
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) <= _LARGEST_ID):
        raise argparse.ArgumentTypeError("must be a whole number, 0 or more")
    return int(text)


def locate(args: argparse.Namespace) -> Path:
    """The folder of the outbox that is meant.

    Named by DIR or --outbox; else by --write-key or its variable; else the only one in the base folder.  Raises
    `UsageError`, `ConfigError` or `OutboxUnavailable`; whether there is an outbox in a named folder is not checked.
    """
    folders = [each for each in (args.folder, args.outbox) if each is not None]
    if len(folders) + (args.write_key is not None) > 1:
        raise UsageError("give only one of DIR, --outbox and --write-key")
    if folders:
        if not folders[0]:
            raise UsageError("the outbox's folder is an empty text")
        return Path(os.path.abspath(os.path.expanduser(folders[0])))
    key = args.write_key if args.write_key is not None else os.environ.get(ENVIRONMENT_KEY) or None
    return (
        _only_outbox() if key is None else _outbox_of(key, "--write-key" if args.write_key else f"${ENVIRONMENT_KEY}")
    )


def _outbox_of(key: str, origin: str) -> Path:
    folder = Config(write_key=key).outbox_path
    if not os.path.lexists(folder):
        raise OutboxUnavailable(
            folder, f"there is no outbox of the source in {origin}: if its program sets outbox_dir, use --outbox DIR"
        )
    return folder


def _only_outbox() -> Path:
    base = default_outbox_dir("").parent  # the part that is the same for every write key
    try:
        found = sorted(each for each in base.iterdir() if os.path.isfile(each / DATABASE_NAME))
    except FileNotFoundError:
        found = []
    if len(found) == 1:
        return found[0]
    if found:
        paths = ", ".join(map(str, found))
        raise OutboxUnavailable(
            base, f"holds several outboxes: use --write-key KEY, SEGMENT_WRITE_KEY, or --outbox with one of {paths}"
        )
    raise OutboxUnavailable(
        base, f"no outbox was found here: use --outbox DIR, --write-key KEY, or set {ENVIRONMENT_DIR}"
    )
