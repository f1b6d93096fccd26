"""Small disks of one's own, and calls that fail; skipped with the reason where that can't be had."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def mount(*arguments: str | Path) -> None:
    """Run mount(8); skip the test where that is not to be had."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs Linux")
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a filesystem")
    try:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs the command mount")
    if done.returncode:
        pytest.skip(f"no filesystem can be mounted here: {done.stderr.strip()}")


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", folder], capture_output=True, check=False)


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a tmpfs of so many bytes and gives its folder."""
    made: list[Path] = []

    def make(size: int) -> Path:
        folder = tmp_path / f"disk-{len(made)}"
        folder.mkdir()
        mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
        made.append(folder)
        return folder

    yield make
    for folder in made:
        unmount(folder)


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shim.c as a library, to be preloaded."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the shim is for Linux")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler (cc)")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    source = Path(__file__).parent / "shim.c"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, source, "-ldl"]
    subprocess.run(command, check=True, timeout=60)
    return library
