"""Places where an outbox can't be: a clear error when it is made, with the remedy."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from segment_durable import Client, database_file
from segment_durable.errors import OutboxUnavailable

from .test_full_disk import use_up


def refusal(make_client: Callable[..., Client], folder: Path) -> str:
    with pytest.raises(OutboxUnavailable, match="outbox_dir") as caught:
        make_client(outbox_dir=folder)
    return str(caught.value)


@pytest.mark.parametrize("below", ["", "outbox", "new/outbox"], ids=["itself", "there before", "not there"])
def test_a_read_only_mount(make_disk: Callable[[int], Path], make_client: Callable[..., Client], below: str) -> None:
    disk = make_disk(4 << 20)
    with make_client(outbox_dir=disk / "outbox", deliver=False) as client:
        assert client.track("u", "e")[0]
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True, capture_output=True)
    assert str(disk) in refusal(make_client, disk / below)
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True, capture_output=True)
    with make_client(outbox_dir=disk / "outbox") as client:
        assert client.flush(30)
        assert client.track("u", "e")[0]


def test_a_folder_that_is_missing_is_made_with_those_above_it(
    make_client: Callable[..., Client], tmp_path: Path
) -> None:
    assert make_client(outbox_dir=tmp_path / "a" / "b" / "c").track("u", "e")[0]
    assert (tmp_path / "a" / "b" / "c" / "outbox.db").exists()


def test_a_disk_that_is_full_from_the_beginning(
    make_disk: Callable[[int], Path], make_client: Callable[..., Client]
) -> None:
    disk = make_disk(4 << 20)
    use_up(disk / "theirs")
    assert "disk is full" in refusal(make_client, disk / "outbox")
    (disk / "theirs").unlink()
    client = make_client(outbox_dir=disk / "outbox")
    assert client.track("u", "e")[0]
    assert client.flush(30)


class _WithoutWal:
    """A connection on a filesystem that has no shared memory, where SQLite keeps its rollback journal."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def execute(self, statement: str, *args: Any) -> sqlite3.Cursor:
        return self._connection.execute(statement.replace("journal_mode=WAL", "journal_mode=DELETE"), *args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


def test_a_filesystem_without_wal(
    make_client: Callable[..., Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sqlite3.connect

    with monkeypatch.context() as patch:
        patch.setattr(database_file.sqlite3, "connect", lambda *args, **named: _WithoutWal(real(*args, **named)))
        said = refusal(make_client, tmp_path / "outbox")
        assert "WAL" in said
        assert "local disk" in said
    assert make_client(outbox_dir=tmp_path / "outbox").track("u", "e")[0]


# Preloaded with the shim: what a client says below a folder in which no file can be mapped, and then where one can.
UNMAPPABLE = """
import ctypes, sys
from pathlib import Path
from segment_durable import Client
from segment_durable.errors import OutboxUnavailable
shim = ctypes.CDLL(sys.argv[1])
shim.shim_arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_long, ctypes.c_int]
shim.shim_arm(sys.argv[2].encode(), 32, 1, 1 << 60, int(sys.argv[3]))
try:
    Client("test-key", outbox_dir=Path(sys.argv[2]))
except OutboxUnavailable as problem:
    print(problem)
shim.shim_arm(sys.argv[2].encode(), 0, 0, 0, 0)
with Client("test-key", "http://127.0.0.1:9", outbox_dir=Path(sys.argv[2]), deliver=False) as client:
    print(client.track("u", "e")[0])
"""


@pytest.mark.parametrize("there", [False, True], ids=["not there", "there before"])
def test_a_filesystem_on_which_the_shared_memory_cannot_be_mapped(
    shim: Path, make_client: Callable[..., Client], tmp_path: Path, there: bool
) -> None:
    """SQLite says "disk I/O error" of it."""
    if there:
        with make_client(outbox_dir=tmp_path / "outbox", deliver=False) as client:
            assert client.track("u", "e")[0]
    command = [sys.executable, "-W", "error", "-c", UNMAPPABLE, shim, tmp_path / "outbox", str(errno.ENODEV)]
    environment = {**os.environ, "LD_PRELOAD": str(shim)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.stderr == ""
    said, accepted = done.stdout.splitlines()
    assert "its filesystem can't do SQLite's WAL mode: set outbox_dir to a folder on a local disk" in said
    assert os.strerror(errno.ENODEV) in said
    assert accepted == "True", "something was left there that is in the way"
    assert make_client(outbox_dir=tmp_path / "outbox", deliver=False).stats().pending == 1 + there


def test_a_filesystem_without_locks(
    make_client: Callable[..., Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An NFS whose lock service is down."""

    def refuse() -> None:
        raise OSError(37, "No locks available")

    with monkeypatch.context() as patch:
        for module in ("byte_locks", "locks"):
            patch.setattr(f"segment_durable.{module}.locker", lambda fd, byte: refuse)
        assert "No locks available" in refusal(make_client, tmp_path / "outbox")
    assert make_client(outbox_dir=tmp_path / "outbox").track("u", "e")[0]
