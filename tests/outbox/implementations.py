"""The one place that names the outboxes under test; every test and every worker process makes its outbox here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from segment_durable.clock import Clock
from segment_durable.outbox import Outbox

__all__ = ["IMPLEMENTATIONS", "make_outbox"]

IMPLEMENTATIONS: dict[str, Callable[..., Outbox]] = {"sqlite": Outbox}


def make_outbox(
    implementation: str, folder: Path, clock: Clock, *, full: bool = False, write_key: str | None = None
) -> Outbox:
    return IMPLEMENTATIONS[implementation](folder, clock, full=full, write_key=write_key)
