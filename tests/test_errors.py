"""The errors themselves."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

import segment_durable
from segment_durable import errors

ERRORS = [
    errors.ConfigError("write_key", "is missing"),
    errors.InvalidMessage("user_id", "must be a str"),
    errors.MessageTooLarge(40_000, 32_768),
    errors.OutboxUnavailable("/outbox", "is not a folder"),
    errors.NotAnOutbox("/outbox", "is not a file"),
    errors.SourceMismatch("/outbox", "belongs to another write_key"),
    errors.OutboxFull(5, 7),
    errors.OutboxBusy("another process writes"),
    errors.OutboxDamaged("/outbox/kept", 1, 2, 3),
    errors.StorageError("the disk is full", "SQLITE_FULL"),
    errors.DeliveryError(400, "code", "message"),
    errors.EventsExpired(3, 5.0),
]


@pytest.mark.parametrize("again", [lambda each: pickle.loads(pickle.dumps(each)), copy.copy, copy.deepcopy])
@pytest.mark.parametrize("error", ERRORS, ids=lambda each: type(each).__name__)
def test_an_error_is_the_same_after_it_was_pickled_or_copied(error: Exception, again: Callable[..., Any]) -> None:
    other = again(error)
    assert type(other) is type(error)
    assert (str(other), other.args, vars(other)) == (str(error), error.args, vars(error))


def _refused() -> None:
    segment_durable.Client("key", send=False).track(None, "e")


def test_what_a_worker_of_a_pool_raises_reaches_its_parent() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for _ in range(2):
            with pytest.raises(errors.InvalidMessage, match="user_id or anonymous_id must be"):
                pool.submit(_refused).result(60)
