"""What happens at interpreter exit, in real interpreters."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from segment_durable import Client
from segment_durable.testing import Answer, Hang, Receiver

HEAD = """
import sys
import segment_durable as analytics
analytics.write_key, analytics.host, analytics.outbox_dir = "test-key", sys.argv[1], sys.argv[2]
"""


def run(code: str, receiver: Receiver, tmp_path: Path) -> tuple[str, float]:
    """Run a program; what it wrote, and how long it took."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", HEAD + code, receiver.url, str(tmp_path / "outbox")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr, time.monotonic() - started


@pytest.mark.parametrize("mode", ["", "analytics.sync_mode = True", "analytics.thread = 2"])
def test_a_script_that_just_ends_delivers(receiver: Receiver, tmp_path: Path, mode: str) -> None:
    said, _ = run(f"{mode}\nfor i in range(250): analytics.track('u', 'e', {{'i': i}})", receiver, tmp_path)
    assert said == ""
    arrived = [event["properties"]["i"] for event in receiver.unique]
    assert (sorted(arrived) if "thread" in mode else arrived) == list(range(250))  # two threads keep no order


def test_the_exit_is_bounded_and_what_is_left_goes_out_at_the_next_start(receiver: Receiver, tmp_path: Path) -> None:
    receiver.always(Hang())
    said, seconds = run("analytics.shutdown_timeout = 0.5; analytics.track('u', 'kept')", receiver, tmp_path)
    assert said == "events that stay on disk, for the next process that delivers: 1\n"
    assert seconds < 10
    receiver.always(None)
    receiver.release()
    with Client("test-key", receiver.url, outbox_dir=tmp_path / "outbox") as client:
        assert client.flush(10) is True
        assert client.stats().balanced
    assert [event["event"] for event in receiver.unique] == ["kept"]


def test_the_exit_with_many_outboxes_is_bounded_by_one_timeout_and_each_is_delivered_at_once(
    receiver: Receiver, tmp_path: Path
) -> None:
    receiver.always(Hang())
    code = """
import atexit, time
started = []
atexit.register(lambda: print(time.monotonic() - started[0]))  # before ours, and so it runs after it
clients = [
    analytics.Client(f"key-{i}", sys.argv[1], outbox_dir=f"{sys.argv[2]}-{i}", shutdown_timeout=3, upload_interval=600)
    for i in range(4)
]
for client in clients:
    client.track("u", "kept")
started.append(time.monotonic())
"""
    said, _ = run(code, receiver, tmp_path)
    first, *rest = said.splitlines()
    assert float(first) < 10  # and not 12
    assert rest == ["events that stay on disk, for the next process that delivers: 1"] * 4
    assert len(receiver.requests) == 4  # by four threads: none had to wait for another's end


def test_the_exit_delivers_if_any_client_of_the_outbox_does(receiver: Receiver, tmp_path: Path) -> None:
    code = """
first, second = (
    analytics.Client("test-key", sys.argv[1], outbox_dir=sys.argv[2], upload_interval=600, deliver=deliver)
    for deliver in (False, True)
)
first.track("u", "of the first")
second.track("u", "of the second")
"""
    said, _ = run(code, receiver, tmp_path)
    assert said == ""
    assert [event["event"] for event in receiver.unique] == ["of the first", "of the second"]


def test_the_exit_delivers_nothing_if_none_of_its_clients_does(receiver: Receiver, tmp_path: Path) -> None:
    said, _ = run("analytics.deliver = False; analytics.track('u', 'kept')", receiver, tmp_path)
    assert (said, receiver.requests) == ("", ())
    with Client("test-key", receiver.url, outbox_dir=tmp_path / "outbox", deliver=False) as client:
        assert client.stats().pending == 1


def test_the_exit_says_what_keeps_it_from_delivering_and_goes_on_with_the_others(
    receiver: Receiver, tmp_path: Path
) -> None:
    code = """
from segment_durable.errors import StorageError
clients = [
    analytics.Client(f"key-{i}", sys.argv[1], outbox_dir=f"{sys.argv[2]}-{i}", upload_interval=600) for i in range(2)
]
for client in clients:
    client.track("u", client.write_key)

def fail(timeout):
    raise StorageError("the disk is unwell", "SQLITE_IOERR")

clients[0]._engine.sender.flush = fail
"""
    said, _ = run(code, receiver, tmp_path)
    assert said == "at exit: the disk is unwell\n"
    assert "key-1" in [event["event"] for event in receiver.unique]


def test_shutdown_timeout_0_does_not_wait_at_all(receiver: Receiver, tmp_path: Path) -> None:
    receiver.always(Answer(503))
    code = """
from segment_durable.worker import Worker
Worker.hurry_to = lambda self, target: print("hurried")
analytics.shutdown_timeout = 0; analytics.track('u', 'kept')
"""
    said, seconds = run(code, receiver, tmp_path)
    assert seconds < 10
    assert "hurried" not in said  # what is being sent when the process ends has to be sent again
    with Client("test-key", receiver.url, outbox_dir=tmp_path / "outbox", deliver=False) as client:
        assert client.stats().pending == 1


def test_an_event_tracked_while_the_interpreter_exits_is_delivered_or_kept(receiver: Receiver, tmp_path: Path) -> None:
    # Registered first, so it runs after our own handler; from Python 3.12 on no thread can be started there.
    code = """
import atexit
atexit.register(lambda: print(analytics.track("u", "very late")[0], analytics.flush(5)))
analytics.track("u", "early")
"""
    said, _ = run(code, receiver, tmp_path)
    assert said == "True True\n"
    assert [event["event"] for event in receiver.unique] == ["early", "very late"]


def test_the_first_call_at_exit_works_without_any_thread(receiver: Receiver, tmp_path: Path) -> None:
    code = """
import atexit
atexit.register(lambda: print(analytics.track("u", "only")[0], analytics.flush(5), analytics.shutdown(5)))
"""
    said, _ = run(code, receiver, tmp_path)
    assert said == "True True True\n"
    assert [event["event"] for event in receiver.unique] == ["only"]


def test_sys_exit_in_a_thread_and_an_uncaught_error_still_deliver(receiver: Receiver, tmp_path: Path) -> None:
    code = """
import threading
def work():
    analytics.track("u", "from a thread")
thread = threading.Thread(target=work); thread.start(); thread.join()
analytics.track("u", "last words")
sys.stderr = open("/dev/null", "w")
try:
    raise SystemExit(0)
finally:
    analytics.track("u", "in finally")
"""
    run(code, receiver, tmp_path)
    assert [event["event"] for event in receiver.unique] == ["from a thread", "last words", "in finally"]


def test_os_exit_loses_nothing(receiver: Receiver, tmp_path: Path) -> None:
    run("import os\nfor i in range(10): analytics.track('u', str(i))\nos._exit(0)", receiver, tmp_path)
    with Client("test-key", receiver.url, outbox_dir=tmp_path / "outbox") as client:
        assert client.flush(10) is True
    assert [event["event"] for event in receiver.unique] == [str(i) for i in range(10)]


def test_a_log_handler_that_raises_at_exit_keeps_no_other_outbox_from_being_delivered(
    receiver: Receiver, tmp_path: Path
) -> None:
    code = """
import logging
class Failing(logging.Handler):
    def emit(self, record):
        print(record.getMessage())
        raise OSError
logging.raiseExceptions = False
logging.getLogger("segment").addHandler(Failing())
for host in ("http://127.0.0.1:9", sys.argv[1]):
    client = analytics.Client("test-key", host, outbox_dir=sys.argv[2] + host[-4:], upload_interval=600, max_retries=0)
    client.track("u", "e")
"""
    said, _ = run(code, receiver, tmp_path)
    assert "events that stay on disk, for the next process that delivers: 1" in said
    assert [event["event"] for event in receiver.unique] == ["e"]


def test_a_thread_that_tracks_while_the_program_exits_does_not_spin(receiver: Receiver, tmp_path: Path) -> None:
    """One outbox is closed already, and another one is being delivered: the call opens its own again."""
    receiver.always(Hang())
    code = """
import threading
first = analytics.Client("key", sys.argv[1], outbox_dir=sys.argv[2] + "-first", deliver=False)
second = analytics.Client("key", sys.argv[1], outbox_dir=sys.argv[2] + "-second", shutdown_timeout=2)
first.track("u", "e")
second.track("u", "e")
from segment_durable.engine import Engine
real, closed = Engine.close, threading.Event()
def close(self, timeout):
    done = real(self, timeout)
    closed.set()
    return done
Engine.close = close
def work():
    closed.wait()
    print("accepted while another is flushed:", first.track("u", "late")[0], flush=True)
threading.Thread(target=work, daemon=True).start()
"""
    said, _ = run(code, receiver, tmp_path)
    lines = said.splitlines()
    assert lines[0] == "accepted while another is flushed: True", said
    assert lines[1].startswith("events that stay on disk"), said


@pytest.mark.skipif(sys.version_info < (3, 12), reason="before 3.12 an interpreter with threads can't be ended at all")
def test_an_interpreter_within_another_ends_while_the_receiver_is_away(receiver: Receiver, tmp_path: Path) -> None:
    """As those of mod_wsgi: where a thread of it is left, Python ends the process."""
    receiver.always(Answer(503))
    code = """
inner = f'''
import sys
sys.argv = {sys.argv!r}
{head}
analytics.shutdown_timeout = 0.5
accepted, _ = analytics.track("u", "kept")
assert accepted
'''
if sys.version_info >= (3, 13):
    import _interpreters
    within = _interpreters.create("legacy")
    failed = _interpreters.exec(within, inner)
    _interpreters.destroy(within)
else:
    import _xxsubinterpreters
    within = _xxsubinterpreters.create(isolated=False)
    failed = _xxsubinterpreters.run_string(within, inner)
    _xxsubinterpreters.destroy(within)
assert failed is None, failed
"""
    said, _ = run(f"head = {HEAD!r}{code}", receiver, tmp_path)
    assert said == "events that stay on disk, for the next process that delivers: 1\n"
