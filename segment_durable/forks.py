"""What a fork waits for, and what is done before and after it.

A child has the locks of its parent as they were, and of its threads only the one that has forked: what another one had
locked stays so for ever.  Of the import system that goes for each module that is just being loaded, and so the package
loads its modules under a lock for which a fork waits.  The hooks are here, for Python must know of them before.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from segment_durable.threads import PatientLock

__all__ = ["loading", "register"]

_WAIT = 30.0  # seconds that a fork waits for modules that are being loaded

_loading = PatientLock()
_times = 0  # that it was taken by `_before`
_hooks: list[tuple[Callable[[], None], Callable[[], None], Callable[[], None]]] = []


def loading() -> PatientLock:
    """To be held while modules of the package are loaded, and for nothing else."""
    return _loading


def register(
    *, before: Callable[[], None], after_in_parent: Callable[[], None], after_in_child: Callable[[], None]
) -> None:
    """As `os.register_at_fork`, but also for a fork that waits for the module which registers them.

    `before` and `after_in_parent` may be called twice for one fork.
    """
    _hooks.append((before, after_in_parent, after_in_child))


def _before() -> None:
    global _times
    if _loading.wait(_WAIT):
        _times += 1
    for before, _, _ in _hooks:
        before()


def _after_in_parent() -> None:
    global _times
    try:
        for _, after_in_parent, _ in _hooks:
            after_in_parent()
    finally:
        while _times:
            _times -= 1
            _loading.release()


def _after_in_child() -> None:
    global _loading, _times
    _loading, _times = PatientLock(), 0
    for _, _, after_in_child in _hooks:
        after_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
    # Once more, for a signal handler may raise in the first: Python ignores that, with what is left to do, and forks.
    os.register_at_fork(before=_before, after_in_parent=_after_in_parent)
