"""What a client's user learns of a damaged outbox: one line in the log, one call of `on_error`, and then it goes on."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from outbox.pages import PAGE, leaf_pages, overwrite

from segment_durable import Client
from segment_durable.errors import OutboxDamaged
from segment_durable.testing import Receiver

MakeClient = Callable[..., Client]
EVENTS = 300


def fill(make_client: MakeClient) -> Path:
    """An outbox with events, closed; where its database is."""
    client = make_client(deliver=False)
    for number in range(EVENTS):
        assert client.track("u", "e", {"text": "x" * 300}, message_id=f"m-{number}")[0]
    path = client._live().outbox.db.path
    client.shutdown(0)
    return path


def damage_a_leaf(path: Path) -> None:
    """The tenth of the pages that hold nothing but events."""
    data = path.read_bytes()
    leaves = [at for at in range(8 * PAGE, len(data), PAGE) if data[at] == 13]
    with path.open("r+b") as file:
        file.seek(leaves[9])
        file.write(b"\xff" * PAGE)


def told(errors: list[Exception], caplog: pytest.LogCaptureFixture) -> OutboxDamaged:
    """The one error that was told, and that it was logged once."""
    (error,) = [each for each in errors if isinstance(each, OutboxDamaged)]
    records = [each for each in caplog.records if "damaged" in each.getMessage()]
    assert [(each.levelno, each.name.partition(".")[0]) for each in records] == [(logging.ERROR, "segment")]
    assert error.path.exists()
    return error


def check_it_goes_on(client: Client, receiver: Receiver, lost: int | None) -> None:
    assert client.track("u", "after", message_id="after")[0]
    assert client.flush(30) is True
    arrived = [event["messageId"] for event in receiver.unique]
    assert arrived[-1] == "after"
    if lost is not None:
        assert len(arrived) == EVENTS + 1 - lost
    stats = client.stats()
    assert (stats.pending, stats.balanced) == (0, True)


def test_damage_that_is_found_at_construction_is_told_once(
    make_client: MakeClient, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    path = fill(make_client)
    with path.open("r+b") as file:
        file.write(b"x" * PAGE)
    errors: list[Exception] = []
    client = make_client(on_error=lambda error, items: errors.append(error))
    check_it_goes_on(client, receiver, 0)
    assert told(errors, caplog).salvaged == EVENTS
    client.shutdown()
    again = make_client(on_error=lambda error, items: errors.append(error))
    assert again.track("u", "e")[0]
    again.flush(30)
    told(errors, caplog)


def test_damage_that_delivery_meets_is_told_once_to_all_clients_and_the_rest_arrives(
    make_client: MakeClient, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    path = fill(make_client)
    errors: list[Exception] = []

    def on_error(error: Exception, items: list[Any]) -> None:
        errors.append(error)

    first = make_client(on_error=on_error)
    second = make_client(on_error=on_error)
    damage_a_leaf(path)
    assert second.track("u", "e", message_id="of the second")[0]
    assert second.flush(30) is True
    check_it_goes_on(first, receiver, None)
    error = told(errors, caplog)
    assert error.lost is not None
    assert 0 < error.lost < 20
    # Some of the lost ones may have arrived: their batch was on its way when the damage was found.
    assert EVENTS + 2 - error.lost <= len(receiver.unique) <= EVENTS + 2


def test_an_event_without_its_body_is_told_and_the_others_arrive(
    make_client: MakeClient, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    """SQLite notices nothing: the column is declared NOT NULL, and a bit says something else."""
    path = fill(make_client)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("UPDATE event SET body = 'no blob' WHERE id = 150")
    connection.close()
    errors: list[Exception] = []
    client = make_client(on_error=lambda error, items: errors.append(error))
    check_it_goes_on(client, receiver, 1)
    assert told(errors, caplog).lost == 1


def test_an_outbox_that_became_empty_is_told(
    make_client: MakeClient, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    path = fill(make_client)
    os.truncate(path, 0)
    errors: list[Exception] = []
    client = make_client(on_error=lambda error, items: errors.append(error))
    check_it_goes_on(client, receiver, EVENTS)
    error = told(errors, caplog)
    assert error.lost is None, "what was in it is not known"
    assert error.path.stat().st_size == 0
    client.shutdown()
    again = make_client(on_error=lambda error, items: errors.append(error))
    assert again.track("u", "e")[0]
    told(errors, caplog)


def test_an_outbox_that_was_not_finished_is_begun_anew_without_a_word(
    make_client: MakeClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that is killed while it makes the first database leaves no reserve."""
    folder = tmp_path / "outbox"
    folder.mkdir(mode=0o700)
    (folder / "outbox.db").touch()
    (folder / "outbox.lock").touch()
    errors: list[Exception] = []
    client = make_client(on_error=lambda error, items: errors.append(error))
    assert client.track("u", "e")[0]
    assert errors == []
    assert not [each for each in caplog.records if "damaged" in each.getMessage()]


@pytest.mark.parametrize("place", [5, 15, 30])
def test_a_flush_waits_for_what_has_another_id_after_it_was_salvaged(
    make_client: MakeClient, receiver: Receiver, place: int
) -> None:
    """The root of the tree was written to a leaf's place as well: below that SQLite comes to the leaves once more."""
    path = fill(make_client)
    overwrite(path, (leaf_pages(path)[place] - 1) * PAGE, path.read_bytes()[2 * PAGE : 3 * PAGE])
    errors: list[Exception] = []
    client = make_client(upload_size=10, upload_interval=0, on_error=lambda error, items: errors.append(error))
    assert client.flush(30) is True
    assert [type(each) for each in errors] == [OutboxDamaged]
    assert client.stats().pending == 0
    assert len(receiver.unique) > EVENTS - 30
