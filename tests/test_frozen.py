"""A process that is stopped while its upload is on its way, and goes on when another has taken its events over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from segment_durable import Client
from segment_durable.testing import Answer, Delay, Hang, Honest, Receiver

# Does what it is told line by line, and tells what each upload came to and what each step was.  "with the answer": its
# sender does nothing about the first answer before it is told to go on.
PROCESS = """
import os, sys, threading
import segment_durable as analytics
from segment_durable.delivery import Delivery
from segment_durable.upload import Uploader

analytics.write_key, analytics.host, analytics.outbox_dir = "test-key", sys.argv[1], sys.argv[2]
analytics.timeout, analytics.lease_seconds, analytics.upload_interval = float(sys.argv[3]), 0.001, 0
go_on = threading.Event()
if sys.argv[4] != "with the answer":
    go_on.set()


def say(text):
    os.write(1, f"{text}\\n".encode())


def told(method, word):
    def call(self, *arguments, **named):
        result = method(self, *arguments, **named)
        say(f"{word} {getattr(result.kind, 'value', result.kind)}")
        if word == "upload":
            go_on.wait()
        return result
    return call


Uploader.upload = told(Uploader.upload, "upload")
Delivery.step = told(Delivery.step, "step")
say("ready")
for line in sys.stdin:
    order, *names = line.split()
    if order == "track":
        say(f"accepted {all([analytics.track('u', name, message_id=name)[0] for name in names])}")
    elif order == "go":
        go_on.set()
    else:
        say(f"flushed {analytics.flush(60)}")
"""


class Process:
    """One that tracks and delivers."""

    def __init__(self, receiver: Receiver, folder: Path, timeout: float, *waiting: str) -> None:
        command = [sys.executable, "-c", PROCESS, receiver.url, str(folder), str(timeout), *(waiting or [""])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._said: list[str] = []  # and nobody has waited for yet
        self.wait_for("ready")

    def order(self, order: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{order}\n")
        self._process.stdin.flush()

    def track(self, *names: str) -> None:
        self.order(f"track {' '.join(names)}")
        self.wait_for("accepted True")

    def flush(self) -> None:
        self.order("flush")
        self.wait_for("flushed True")

    def wait_for(self, text: str) -> None:
        """Bounded by the test's own time: the end of the process ends its output."""
        assert self._process.stdout is not None
        while text not in self._said:
            line = self._process.stdout.readline()
            assert line, f"it ended without {text!r}: {self._said}"
            self._said.append(line.strip())
        self._said.remove(text)

    def freeze(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)
        _, status = os.waitpid(self._process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)

    def thaw(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)
        self.order("go on")

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="nothing stops a process on Windows")
@pytest.mark.parametrize(
    ("first", "upload"),
    [(Hang(), "upload unreachable"), (Honest(), "upload delivered"), (Answer(400), "upload rejected")],
    ids=["no answer yet", "taken", "refused"],
)
def test_a_frozen_process_that_wakes_up_leaves_alone_what_another_has_taken_over(
    receiver: Receiver, tmp_path: Path, first: Hang | Honest | Answer, upload: str
) -> None:
    """It stops while it waits for the answer, or with the answer in its hand and nothing done about it yet."""
    folder = tmp_path / "outbox"
    processes: list[Process] = []
    observer = Client("test-key", receiver.url, outbox_dir=folder, deliver=False)
    try:
        # A lease is never shorter than four of the uploads that it is for, so this decides how long it takes to end.
        frozen = Process(receiver, folder, 1, *([] if isinstance(first, Hang) else ["with the answer"]))
        processes.append(frozen)
        receiver.script(first, Delay(60))
        frozen.track("a")  # so no thread of it is writing any more
        if isinstance(first, Hang):
            assert receiver.wait_for(lambda _: len(receiver.requests) == 1, 30)
        else:
            frozen.wait_for(upload)
        frozen.freeze()
        stats = observer.stats()
        assert (stats.pending, stats.leased) == (1, 1)

        other = Process(receiver, folder, 60)
        processes.append(other)
        other.track("b", "c")
        assert receiver.wait_for(lambda _: len(receiver.requests) == 2, 30)
        taken_over = receiver.batches[1].events
        assert taken_over[0]["event"] == "a"
        frozen.thaw()
        if isinstance(first, Hang):
            frozen.wait_for(upload)
        frozen.wait_for("step failed" if isinstance(first, Hang) else "step lost")
        stats = observer.stats()
        assert (stats.pending, stats.leased, stats.delivered, stats.dead) == (3, len(taken_over), 0, 0)
        assert stats.balanced

        receiver.release()
        for number in range(3):
            for process in processes:
                process.track(f"{number}-{processes.index(process)}")
                process.flush()
        expected = ["a", "b", "c", *(f"{number}-{index}" for number in range(3) for index in range(2))]
        assert [event["event"] for event in receiver.unique] == expected
        assert receiver.duplicates == isinstance(first, Honest)
        stats = observer.stats()
        assert stats.balanced
        assert (stats.pending, stats.leased, stats.dead, stats.failures) == (0, 0, 0, 0)
        assert stats.accepted == stats.delivered == len(expected)
        assert not receiver.errors
    finally:
        for process in processes:
            process.end()
        observer.shutdown(0)
