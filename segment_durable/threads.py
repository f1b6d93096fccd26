"""Starting threads, where they can run; and a lock that suits a program which gevent patches later on.

Nothing here is bound when it is imported: gunicorn's `--preload` imports the app before gevent replaces `threading`.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

__all__ = ["PatientLock", "start_thread"]

_told = False


def start_thread(target: Callable[[], None], name: str) -> threading.Thread | None:
    """A running daemon thread; None where none can run, and then the caller has to do its work by itself.

    That is so while the interpreter exits (from Python 3.12 on), where the system has no more threads, and in the
    processes of uWSGI that `_would_stand_still` knows.
    """
    if _would_stand_still():
        return None
    # A daemon: it must not keep the interpreter from exiting while it waits for the network.
    thread = threading.Thread(target=target, name=name, daemon=True)
    try:
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
        import logging

        logging.getLogger("segment.durable").warning(
            "this uWSGI runs no threads: events are kept on disk, and delivered when this process ends or by another "
            "process on the same outbox; set enable-threads = true to have them delivered at once"
        )
    return True


class PatientLock:
    """A lock that is asked for again and again rather than waited for.

    To wait for a lock from before gevent's patching stops all greenlets, the one that has the lock among them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def acquire(self) -> None:
        while not self._lock.acquire(False):
            time.sleep(0.001)

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
