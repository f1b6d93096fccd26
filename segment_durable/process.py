"""The engines of this process: one for each outbox, what a fork does to them, and the exit.

Nothing is carried over a fork: a child builds its own engine at its first call, on the same outbox.
"""

from __future__ import annotations

import atexit
import os
from pathlib import Path
from typing import Any

import platformdirs  # noqa: F401  loaded with this, and not when it is first needed: see forks.py

from segment_durable import forks
from segment_durable.clock import SystemClock
from segment_durable.connections import abandon_connections, living_connections
from segment_durable.engine import Engine, Member
from segment_durable.errors import ConfigError, OutboxBusy, OutboxError, OutboxUnavailable
from segment_durable.locks import abandon_inherited
from segment_durable.logs import get_log
from segment_durable.shared_locks import Files, abandon, hold_inherited
from segment_durable.threads import PatientLock

__all__ = ["attach", "detach"]

log = get_log("")

_LAST_MOMENT = 0.1  # seconds for idle threads to end, whatever the time: an interpreter within another dies of them

_lock = PatientLock()
_engines: dict[str, Engine] = {}
_moving: list[Engine] = []  # of which what waits is on its way into a successor's files
_pid = os.getpid()
_is_ready = False  # for a fork, which the thread that has the lock is about to make
_inherited: list[Any] = []  # what a child must neither use nor let be collected
# The databases to which a connection of the parent, or of its parent, is open in the memory of this process.
_haunted: dict[Path, Files] = {}
_unusable: str | None = None  # why SQLite can't be used in this process, if so
_noticing: dict[int, PatientLock] = {}  # by process id: a child's own can't have been locked by a thread of the parent


def attach(member: Member) -> Engine:
    """The engine for the member's outbox in this process, made if there is none.

    Raises `ConfigError`, `OutboxUnavailable`, `NotAnOutbox`, `SourceMismatch` or `OutboxBusy`.
    """
    _notice_fork()
    if _unusable is not None:
        raise OutboxUnavailable(member.config.outbox_path, _unusable)
    if _lock.is_owned():
        raise OutboxBusy("the call was made by a signal handler while its thread was opening or closing an outbox")
    with _lock:
        # Nothing is logged in here: a handler's lock may be held by a thread that waits to come in.
        # In here, for which a fork waits: on Python 3.11 and older these have a lock of their own.
        key = os.path.realpath(member.config.outbox_path)
        if member.config.uses_oauth:
            _ = member.config.oauth_pem  # read now, also where another client's engine is there already
        engine, forsaken = _engines.get(key), None
        if engine is not None and engine.is_forsaken_for(member):
            engine, forsaken = None, engine
        if engine is None:
            engine = Engine(member.config, SystemClock(), key=key, on_gone=_replace)
            _engines[key] = engine
        overruled = engine.join(member)
    if overruled:
        log.warning("%s: the values of the first client on this outbox hold, not these", ", ".join(overruled))
    if forsaken is not None:
        forsaken.close(0.0)
    engine.outbox.db.damage.tell()  # not before: a callback may make a client, and that takes the lock
    return engine


def detach(engine: Engine, member: Member, timeout: float) -> bool:
    """A client was shut down: close the engine if it was the last one's.

    Whether the threads ended within `timeout` seconds.
    """
    end = engine.clock.boot() + timeout
    for each in list(_moving):
        if each.latest is engine.latest:
            each.wait_until_closed(end)  # or what is on its way into the files that are to be closed would not come in
    try:
        with _lock:
            engine = engine.latest  # of which the client may not know yet
            if not engine.leave(member):
                return True
            if _engines.get(engine.key) is engine:
                del _engines[engine.key]
        ended = engine.close(max(0.0, end - engine.clock.boot()))
    except BaseException:  # a signal handler's: nobody else knows of the engine any more, and its threads would stay
        if _engines.get(engine.key) is not engine:
            engine.close(0.0)
        raise
    return ended


def _replace(engine: Engine) -> None:
    """Its path does not lead to the files of that engine any more: its clients, and what waits in it, go on there.

    They were deleted, or the path has a symbolic link in it that leads elsewhere now.
    """
    try:
        with _lock:
            # Its clients were shut down, now or since an attempt that failed: what waits is moved all the same.
            is_over = engine.latest.closed if engine.successor else _engines.get(engine.key) is not engine
            key = os.path.realpath(engine.config.outbox_path)
            successor = _engines.get(key)
            is_new = successor is None or successor is engine
            if successor is None or successor is engine:
                successor = Engine(engine.config, engine.clock, key=key, on_gone=_replace)
            _take_along(engine, successor, with_clients=not is_over)
            if _engines.get(engine.key) is engine:
                del _engines[engine.key]
            _engines[key] = engine.successor = successor
            _moving.append(engine)
        try:
            engine.hand_over(successor)
        finally:
            _moving.remove(engine)
            if is_over and is_new:
                _end_unless_used(successor)
    except (ConfigError, OutboxError) as problem:  # the next attempt is a little later
        engine.complain(problem)


def _take_along(engine: Engine, successor: Engine, *, with_clients: bool) -> None:
    """Let its clients in; where there is none its settings have to agree all the same, for its events go along."""
    for member in (engine.members if with_clients else []) or [Member(engine.config)]:
        successor.join(member)


def _end_unless_used(engine: Engine) -> None:
    """It was made with no client to end it; one may have come since."""
    with _lock:
        if engine.members or _engines.get(engine.key) is not engine:
            return
        del _engines[engine.key]
    engine.close(0.0)


def _before_fork() -> None:
    global _is_ready
    _notice_fork()
    if not (_is_ready and _lock.is_owned()):  # by another thread's fork, that is
        for engine in list(_moving):  # its files can't be opened again
            engine.wait_until_closed(None)
        _lock.wait()
        for each in living_connections():
            each.suspend()
        _is_ready = True


def _after_fork_in_parent() -> None:
    global _is_ready
    _is_ready = False
    try:
        for each in living_connections():
            each.resume()
    finally:
        while _lock.is_owned():
            _lock.release()


def _after_fork_in_child() -> None:
    _start_anew(hooked=True)


def _notice_fork() -> None:
    """Where Python's hooks don't run, because the fork was made in C: the child notices it by itself."""
    pid = os.getpid()
    if _pid != pid:
        with _noticing.setdefault(pid, PatientLock()):
            if _pid != pid:
                _start_anew(hooked=False)


def _start_anew(*, hooked: bool) -> None:
    """In a forked child: forget what belongs to the parent."""
    global _lock, _pid, _engines, _moving, _unusable, _is_ready
    lock_files, connections = abandon_inherited(), abandon_connections()
    _inherited.append((lock_files, connections, _engines, abandon()))
    for each in connections:
        if each.is_suspended:
            continue
        # A connection that is open in the parent is so in the memory of this process.
        files = each.inherited()
        if files is not None:
            _haunted[each.path] = files
        if each.was_in_use():
            _unusable = _unusable or _forked_amid(hooked)
    for path, files in _haunted.items():
        try:
            if _unusable is None:
                _inherited.append(hold_inherited(path, files))
        except OSError as problem:
            _unusable = _forked_unlocked(path, problem)
    _engines, _moving, _lock, _is_ready = {}, [], PatientLock(), False
    _pid = os.getpid()  # last: other threads wait for it


def _forked_amid(hooked: bool) -> str:
    # SQLite's mutexes are the process's, not an outbox's: a thread that was inside them is not here to leave them.
    if hooked:
        return (
            "this process was forked while another thread was at work in an outbox, and did not leave it in time: "
            "SQLite can't be used here; is the disk very slow?"
        )
    return (
        f"this process was forked while another thread was at work in an outbox: SQLite can't be used here; {_REMEDY}"
    )


def _forked_unlocked(path: Path, problem: OSError) -> str:
    reason = problem.strerror or type(problem).__name__
    return f"this process was forked while {path} was open, and can't be used with it ({reason}): {_REMEDY}"


_REMEDY = "make the client after the fork, or have Python's fork hooks called (uWSGI: py-call-uwsgi-fork-hooks = true)"


def _at_exit() -> None:
    """Deliver what can be delivered in time; the rest stays on disk for the next start."""
    if _pid != os.getpid():
        return
    # All at the same time.
    moving, engines = _with_ends(list(_moving)), _with_ends(list(_engines.values()))
    for engine, end in moving:  # where the old files were deleted, what is left there ends with the process
        engine.wait_until_closed(end)
    for engine, end in engines:
        if engine.delivers and end > engine.clock.boot():
            engine.sender.hurry()
    for engine, end in engines:
        remaining = max(0.0, end - engine.clock.boot())
        try:
            if engine.delivers and not engine.sender.flush(remaining):
                pending = engine.outbox.pending()
                if pending:
                    log.warning("events that stay on disk, for the next process that delivers: %d", pending)
        except OutboxError as problem:
            if engine.successor is None:
                log.error("at exit: %s", problem)
        if engine.successor is not None and not any(each is engine.successor for each, _ in engines):  # since just now
            engine.wait_until_closed(end)
            engines.append((engine.successor, end))
        if _engines.get(engine.key) is engine:
            del _engines[engine.key]  # a thread that goes on gets another one
        engine.close(max(_LAST_MOMENT, end - engine.clock.boot()))


def _with_ends(engines: list[Engine]) -> list[tuple[Engine, float]]:
    return [(each, each.clock.boot() + each.config.shutdown_timeout) for each in engines]


atexit.register(_at_exit)
forks.register(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
