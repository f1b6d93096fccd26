"""A program that imports this package before gevent patches it, as gunicorn's `--preload` does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from segment_durable.testing import Receiver

from .running import needs

HEAD = """
import os, subprocess, sys, time, warnings
import segment_durable as analytics
analytics.write_key, analytics.host, analytics.outbox_dir = "test-key", sys.argv[1], sys.argv[2]
analytics.track("u", "before")
analytics.shutdown(10)
analytics.default_client = None
HOLD = '''
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    fcntl.lockf(file, fcntl.LOCK_EX, 1, 0)
    print("held", flush=True)
    sys.stdin.read()
'''
lock = os.path.join(sys.argv[2], "outbox.lock")
holder = subprocess.Popen([sys.executable, "-c", HOLD, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
warnings.simplefilter("ignore")  # gevent says that ssl was imported before
from gevent import monkey
monkey.patch_all()
import gevent
"""


def run(code: str, receiver: Receiver, tmp_path: Path) -> str:
    needs("gevent")
    done = subprocess.run(
        [sys.executable, "-c", HEAD + code, receiver.url, str(tmp_path / "outbox")],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_greenlets_wait_for_another_process(receiver: Receiver, tmp_path: Path) -> None:
    """Their locks were made before the patching: one that waits for such a lock would stop all the others."""
    code = """
assert holder.stdout.readline() == b"held\\n"
greenlets = [gevent.spawn(analytics.track, "u", str(n)) for n in range(3)]
gevent.sleep(0.01)
assert not any(greenlet.dead for greenlet in greenlets)
holder.communicate()
gevent.joinall(greenlets, timeout=20, raise_error=True)
print([greenlet.value[0] for greenlet in greenlets])
"""
    assert run(code, receiver, tmp_path) == "[True, True, True]\n"
    assert len(receiver.unique) == 4
    assert receiver.duplicates == 0


def test_the_end_waits_for_the_sender_no_longer_than_it_lives(receiver: Receiver, tmp_path: Path) -> None:
    code = """
holder.communicate()
analytics.track("u", "e")
assert analytics.flush(20)
started = time.monotonic()
analytics.shutdown(20)
assert time.monotonic() - started < 10, time.monotonic() - started
"""
    run(code, receiver, tmp_path)
    assert len(receiver.unique) == 2


@pytest.mark.parametrize("first", ["gevent", "the client"])
def test_tls_needs_the_patching_first_and_the_error_says_so(receiver: Receiver, tmp_path: Path, first: str) -> None:
    """Else each attempt ends in a RecursionError of Python's ssl.  The receiver speaks no TLS: the other end."""
    needs("gevent")
    code = """
import sys, warnings
warnings.simplefilter("ignore")
if sys.argv[3] == "the client":
    import segment_durable.client
from gevent import monkey
monkey.patch_all()
import segment_durable
said = []
host = sys.argv[1].replace("http:", "https:")
client = segment_durable.Client(
    "k", host, outbox_dir=sys.argv[2], max_retries=0, on_error=lambda error, items: said.append(str(error))
)
assert client.track("u", "e")[0]
assert client.flush(20) is False
assert client.stats().pending == 1
print(said[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, receiver.url, str(tmp_path / "outbox"), first],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    assert ("monkey.patch_all() before" in done.stdout) is (first == "the client")
    assert "RecursionError" not in done.stdout
