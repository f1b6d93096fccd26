"""The pytest fixture `segment_receiver`. pytest imports this file at every start, so it imports next to nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from segment_durable.testing.receiver import Receiver


@pytest.fixture
def segment_receiver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """A started `Receiver` that accepts any write key; it is stopped when the test is over.

    Outboxes without an `outbox_dir` are in the test's own folder meanwhile.
    """
    from segment_durable.config import ENVIRONMENT_DIR
    from segment_durable.testing.receiver import Receiver

    monkeypatch.setenv(ENVIRONMENT_DIR, str(tmp_path / "segment-durable"))
    with Receiver() as receiver:
        yield receiver
