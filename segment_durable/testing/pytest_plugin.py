"""The pytest fixture `segment_receiver`. pytest imports this file at every start, so it imports next to nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from segment_durable.testing.receiver import Receiver


@pytest.fixture
def segment_receiver() -> Iterator[Receiver]:
    """A started `Receiver` that accepts any write key; it is stopped when the test is over."""
    from segment_durable.testing.receiver import Receiver

    with Receiver() as receiver:
        yield receiver
