"""Room on the stack, for what must not end in the middle."""

from __future__ import annotations

__all__ = ["COMMITTING", "UNWINDING", "need_room"]

UNWINDING = 10  # calls within each other, in which all that a call has taken is let go of
COMMITTING = 30  # in which what was taken along for other threads is committed, or given back


def need_room(calls: int) -> None:
    """Raise `RecursionError` if so many calls can't be made within each other from where this one is made.

    Whoever recurses until that happens and goes on, as a recursion over somebody's data may, must find nothing locked:
    so it is asked before anything is taken, because at the end of the stack nothing could be let go of.
    """
    if calls > 1:
        need_room(calls - 1)
