"""How the methods of an outbox meet exceptions: nothing stays taken, and what another attempt may mend gets one."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from segment_durable.db import Database
from segment_durable.errors import StorageError
from segment_durable.sqlite_errors import is_damage
from segment_durable.stack import UNWINDING, need_room

__all__ = ["after_damage", "whole", "with_reserve"]


class _OnDatabase(Protocol):
    db: Database


Owner = TypeVar("Owner", bound=_OnDatabase)
P = ParamSpec("P")
R = TypeVar("R")


def whole(method: Callable[Concatenate[Owner, P], R]) -> Callable[Concatenate[Owner, P], R]:
    """What an exception ends, of whatever origin, leaves nothing taken: see `Connections.unwind`."""

    @wraps(method)
    def unwinding(self: Owner, /, *args: P.args, **named: P.kwargs) -> R:
        need_room(UNWINDING)
        is_outermost = self.db.connections.is_outermost()
        try:
            return method(self, *args, **named)
        except BaseException:
            if is_outermost:
                self.db.connections.unwind()
            raise

    return unwinding


def with_reserve(method: Callable[Concatenate[Owner, P], R]) -> Callable[Concatenate[Owner, P], R]:
    """On a full disk: free the reserve, and do it once more.  Nothing was changed by what failed."""
    return _once_more(method, lambda owner, problem: owner.db.space.make_room(problem))


def after_damage(method: Callable[Concatenate[Owner, P], R]) -> Callable[Concatenate[Owner, P], R]:
    """Read once more if the database was damaged: another has taken its place."""
    return _once_more(method, lambda _, problem: is_damage(problem))


def _once_more(
    method: Callable[Concatenate[Owner, P], R], may_help: Callable[[Owner, StorageError], bool]
) -> Callable[Concatenate[Owner, P], R]:
    @whole
    @wraps(method)
    def trying(self: Owner, /, *args: P.args, **named: P.kwargs) -> R:
        try:
            return method(self, *args, **named)
        except StorageError as problem:
            if not may_help(self, problem):
                raise
        return method(self, *args, **named)

    return trying
