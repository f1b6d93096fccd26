"""Real processes that hold an outbox and do what a test says, one call at a time.

A nursery, one for the whole run, has imported everything and opened nothing; it forks a worker in a few milliseconds.
It is also the workers' parent: when `kill()` returns, it has seen the worker's end, so the kernel has let go of the
worker's locks.  A test and a worker speak over a socket, in pickles.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a nursery: this folder's package, whatever its name is, isn't imported
    sys.path.insert(0, str(Path(__file__).parent))
    from common import backoff_of
    from implementations import make_outbox
else:
    from .common import backoff_of
    from .implementations import make_outbox

import segment_durable.errors
from segment_durable.errors import OutboxBusy
from segment_durable.locks import abandon_inherited
from segment_durable.records import Backoff
from segment_durable.testing.clock import FakeClock

__all__ = ["Died", "Nursery", "Worker", "work"]

PATIENCE = 30.0  # seconds until a test gives up on a worker's answer


class Died(Exception):
    """The worker ended before it answered."""


class Nursery:
    """Where workers come from."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        package = Path(segment_durable.errors.__file__).parents[1]
        path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": path},
        )
        theirs.close()
        self._socket = ours
        self._talk = Connection(os.dup(ours.fileno()))

    def worker(self, implementation: str = "sqlite") -> Worker:
        """A new process, in which nothing is open yet."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._talk.send("fork")
            socket.send_fds(self._socket, [b"!"], [theirs.fileno()])
            pid = self._answer()
        return Worker(pid, Connection(ours.detach()), self.reap, implementation)

    def reap(self, pid: int) -> int:
        """Wait for the end of a worker; its wait status."""
        self._talk.send(pid)
        return self._answer()

    def close(self) -> None:
        self._talk.close()
        self._socket.close()
        self._process.wait(PATIENCE)

    def _answer(self) -> int:
        if not self._talk.poll(PATIENCE):
            raise Died("the nursery does not answer")
        answer: int = self._talk.recv()
        return answer


class Worker:
    """A process: `call("put", ...)` calls that method of its outbox there, `send` and `receive` do it in two steps."""

    def __init__(self, pid: int, talk: Connection, reap: Callable[[int], object], implementation: str) -> None:
        self._talk = talk
        self._reap = reap
        self._implementation = implementation
        self.pid = pid
        self.ended = False

    def open(self, folder: Path, clock: FakeClock, **options: Any) -> None:
        """Open an outbox there, in place of the one that it had; the worker's clock is set like `clock` before."""
        self.set_clock(clock)
        self.call("open", self._implementation, folder, options)

    def set_clock(self, clock: FakeClock) -> None:
        self.call("set_clock", clock.time(), clock.boot(), clock.boot_id())

    def call(self, name: str, *args: Any, **named: Any) -> Any:
        self.send(name, *args, **named)
        return self.receive()

    def send(self, name: str, *args: Any, **named: Any) -> None:
        try:
            self._talk.send((name, args, named))
        except OSError as problem:
            raise Died(name) from problem

    def receive(self) -> Any:
        """What the call returned.  What it raised is raised here, as an error of the same class."""
        if not self._talk.poll(PATIENCE):
            raise TimeoutError("the worker does not answer")
        try:
            good, answer = self._talk.recv()
        except (EOFError, OSError) as problem:
            raise Died from problem
        if good:
            return answer
        raise _revive(*answer)

    def has_answered(self) -> bool:
        return self._talk.poll(0)

    def kill(self) -> None:
        """SIGKILL; the process is gone, with its locks, when this returns."""
        os.kill(self.pid, signal.SIGKILL)
        self._end()

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """Let the process close its outbox and end; may be called twice."""
        if self.ended:
            return
        self.thaw()
        try:
            self.call("close")
        finally:
            self._end()

    def _end(self) -> None:
        self.ended = True
        self._talk.close()
        self._reap(self.pid)


def _revive(kind: str, text: str) -> Exception:
    found = getattr(segment_durable.errors, kind, None)
    if found is None:
        return RuntimeError(f"{kind}: {text}")
    error: Exception = found.__new__(found)
    Exception.__init__(error, text)
    return error


# -- in the nursery and in the workers


def _keep_nursery(fd: int) -> None:
    common = socket.socket(fileno=fd)
    talk = Connection(os.dup(fd))
    while True:
        try:
            order = talk.recv()
        except EOFError:
            common.close()
            return
        if order != "fork":
            talk.send(os.waitpid(order, 0)[1])
            continue
        _, (worker_fd, *_), _, _ = socket.recv_fds(common, 1, 1)
        pid = os.fork()
        if pid == 0:
            common.close()
            talk.close()
            work(Connection(worker_fd))
            os._exit(0)
        os.close(worker_fd)
        talk.send(pid)


def work(talk: Connection) -> None:
    """Do what is asked through `talk` until the order to close, or until nobody is there to ask."""
    office = _Office()
    while True:
        try:
            name, args, named = talk.recv()
        except EOFError:
            return
        try:
            answer = (True, office.find(name)(*args, **named))
        except Exception as problem:
            answer = (False, (type(problem).__name__, str(problem)))
        try:
            talk.send(answer)
        except OSError:
            return
        if name == "close":
            return


class _Office:
    """What a worker can do beside calling its outbox."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.outbox: Any = None
        self.waits: Any = None

    def find(self, name: str) -> Callable[..., Any]:
        own = getattr(self, f"do_{name}", None)
        if own is not None:
            return own  # type: ignore[no-any-return]
        found = self.outbox
        for part in name.split("."):
            found = getattr(found, part)
        return found  # type: ignore[no-any-return]

    def do_set_clock(self, wall: float, boot: float, boot_id: str) -> None:
        self.clock.set(wall=wall, boot=boot, boot_id=boot_id)

    def do_open(self, implementation: str, folder: Path, options: dict[str, Any]) -> None:
        self.do_close()
        self.outbox = make_outbox(implementation, folder, self.clock, **options)

    def do_close(self) -> None:
        if self.outbox is not None:
            outbox, self.outbox = self.outbox, None
            outbox.close()

    def do_backoff(self) -> Backoff:
        return backoff_of(self.outbox)

    def do_put_many(self, count: int, prefix: bytes, limit: int) -> list[bytes]:
        """Put `count` events named after `prefix`; those that were accepted."""
        bodies = [prefix + str(number).encode() for number in range(count)]
        return [body for body in bodies if self.outbox.put(body, 1, limit)]

    def do_put_forever(self, fd_path: str, prefix: bytes) -> None:
        """Put until killed; each body goes to the file at `fd_path` when it is acknowledged."""
        fd = os.open(fd_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        number = 0
        while True:
            body = prefix + str(number).encode()
            if self.outbox.put(body, 1):
                os.write(fd, body + b"\n")
            number += 1

    def do_hold_writer_lock(self) -> None:
        self.outbox.db.lock.acquire(PATIENCE)

    def do_can_lock_writer(self) -> bool:
        """Whether no other process has the writer lock at this moment."""
        try:
            self.outbox.db.lock.acquire(0)
        except OutboxBusy:
            return False
        self.outbox.db.lock.release()
        return True

    def do_release_writer_lock(self) -> None:
        self.outbox.db.lock.release()

    def do_begin_reading(self) -> int:
        """Open a read transaction and leave it open; how many events it sees."""
        self.reading = self.outbox.db.read()
        connection = self.reading.__enter__()
        count: int = connection.execute("SELECT count(*) FROM event").fetchone()[0]
        return count

    def do_end_reading(self) -> None:
        self.reading.__exit__(None, None, None)

    def do_fork_a_child_that_stays(self) -> None:
        """A child that does nothing, until the test and this process have let go of the pipe."""
        reading, self.until = os.pipe()
        if os.fork() == 0:
            os.close(self.until)
            os.read(reading, 1)
            os._exit(0)
        os.close(reading)

    def do_forget_inherited(self) -> None:
        """What a forked child does first."""
        self.inherited = abandon_inherited()

    def do_drop_privileges(self, uid: int) -> None:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)

    def do_umask(self, mask: int) -> None:
        os.umask(mask)


if __name__ == "__main__":
    _keep_nursery(int(sys.argv[1]))
