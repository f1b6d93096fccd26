"""Whether events are accepted, as far as the space for them goes, and why not."""

from __future__ import annotations

from collections.abc import Callable

from segment_durable.errors import StorageError
from segment_durable.sqlite_errors import is_full

__all__ = ["Admission", "disk_full"]


class Admission:
    """Of one outbox, in this process."""

    def __init__(self) -> None:
        self.trouble: StorageError | None = None  # why puts are refused, if they are
        self.on_refused: Callable[[], None] = _nothing

    def refuse(self, why: StorageError) -> None:
        """From now on puts are refused, until `trouble` is None again."""
        self.trouble = why
        self.on_refused()

    def note(self, error: StorageError) -> StorageError:
        """Remember that a write failed because there is no space; the same error."""
        if is_full(error) and self.trouble is None:
            self.refuse(error)
        return error


def disk_full() -> StorageError:
    return StorageError(
        "the disk is full: no event is accepted until delivery has made room, or something else is deleted",
        "SQLITE_FULL",
    )


def _nothing() -> None:
    pass
