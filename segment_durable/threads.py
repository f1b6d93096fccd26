"""Starting threads, where they can run; and locks for programs that gevent patches later on, and for signal handlers.

Nothing of `threading` is bound when this is imported: gunicorn's `--preload` imports the app before gevent replaces it.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from segment_durable.errors import OutboxBusy
from segment_durable.logs import get_log

__all__ = ["PatientLock", "Wake", "start_thread"]

log = get_log("")

# In C.  `threading.RLock` is the same, but not after gevent's patching: then it is made of Python's steps.
_RLock: Any = _thread.RLock

_told = False


def start_thread(target: Callable[[], None], name: str) -> threading.Thread | None:
    """A running daemon thread; None where none can run, and then the caller has to do its work by itself.

    That is so while the interpreter exits (from Python 3.12 on), where the system has no more threads, in an
    interpreter within another that may have none, and in the processes of uWSGI that `_would_stand_still` knows.
    """
    if _would_stand_still():
        return None
    try:
        # A daemon: it must not keep the interpreter from exiting while it waits for the network.
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
    except RuntimeError:
        return None
    return thread


def _would_stand_still() -> bool:
    """Whether this is a uWSGI process that keeps Python's lock while it runs no Python code.

    Its master always does, and its workers do without `enable-threads`.  A thread would stand still there wherever it
    happened to be, mostly for ever, and in the middle of a transaction every other process would wait for it.
    """
    global _told
    uwsgi: Any = sys.modules.get("uwsgi")
    if not hasattr(uwsgi, "has_threads") or not hasattr(uwsgi, "masterpid"):
        return False
    if uwsgi.has_threads:
        return bool(uwsgi.masterpid() == os.getpid())
    if not _told:
        _told = True
        log.warning(
            "this uWSGI runs no threads: events are kept on disk, and delivered when this process ends or by another "
            "process on the same outbox; set enable-threads = true to have them delivered at once"
        )
    return True


class PatientLock(_RLock):  # type: ignore[misc]
    """A reentrant lock that is asked for again and again rather than waited for.

    To wait for a lock from before gevent's patching stops all greenlets, the one that has the lock among them; and
    such a lock takes all greenlets of a thread for one owner, so that is looked at as well.  It is left without a step
    of Python's, in which a signal handler could raise and leave it locked.
    """

    patience: float | None = None  # seconds, after which `with` raises `OutboxBusy`; None: it waits for ever

    def __init__(self) -> None:
        # Which of the greenlets of a thread has it, by the ids that gevent gives them.  A claim comes before the lock,
        # so that a signal handler knows in between, too, what it has interrupted.
        self._claims: set[int] = set()

    def wait(self, timeout: float | None = None) -> bool:
        """Take it; False if that takes more than so many seconds, `None`: as `with` does."""
        me = threading.get_ident()
        limit = self.patience if timeout is None else timeout
        end = None if limit is None else time.monotonic() + limit
        while True:
            was_owned = self._is_owned()
            if not was_owned:
                self._claims.add(me)
            if me in self._claims:
                try:
                    if self.acquire(False):
                        self._claims = {me}
                        return True
                    self._claims.discard(me)
                except BaseException:
                    if not was_owned and self._is_owned():
                        self.release()
                    raise
            if end is not None and time.monotonic() >= end:
                if timeout is None:
                    raise OutboxBusy(f"another thread has been opening the outbox for {limit:g} s")
                return False
            time.sleep(0.001)

    __enter__ = wait  # itself, and not a function around it, which a signal handler could end after it

    def is_owned(self) -> bool:
        """Whether this very thread has it: then this is a signal handler or a finalizer within another call."""
        return bool(self._is_owned()) and threading.get_ident() in self._claims


class Wake:
    """A `threading.Event` that one thread waits for, and that a signal handler may set while its own thread does.

    An Event has a lock that is not reentrant: the handler would wait for ever for the thread that it has interrupted.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # free: set
        self._lock.acquire()

    def is_set(self) -> bool:
        return not self._lock.locked()

    def set(self) -> None:
        with contextlib.suppress(RuntimeError):  # set already
            self._lock.release()

    def clear(self) -> None:
        self._lock.acquire(False)

    def wait(self, timeout: float | None = None) -> bool:
        """Whether it is set; waits `timeout` seconds at most for that, `None`: for ever."""
        if not self._lock.acquire(timeout=-1 if timeout is None else max(0.0, timeout)):
            return False
        self.set()
        return True
