"""Everything at once: processes that are killed, and a receiver that does all that a receiver can do wrong."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from segment_durable import Client
from segment_durable.clock import SystemClock
from segment_durable.outbox import Outbox
from segment_durable.testing import Answer, Batch, Delay, Drop, Fault, HalfAnswer, Hang, OAuthApp, Receiver, Refuse

from .torturer import track_until_killed

KEY = "a-write-key-of-tests"
SHORT, LONG = 15.0, 180.0  # seconds
PROCESSES = 2
POISON = Refuse(lambda event: event["event"] == "poison", 400, "poisoned", "an event was refused")

pytestmark = pytest.mark.skipif(os.name == "nt", reason="SIGKILL and forkserver")


class Diary:
    """What the processes said: in each of its lives, one reader thread a pipe."""

    def __init__(self) -> None:
        self.attempted: list[str] = []
        self.accepted: dict[str, bytes] = {}
        self._threads: list[threading.Thread] = []

    def listen(self, fd: int) -> None:
        thread = threading.Thread(target=self._read, args=(fd,))
        thread.start()
        self._threads.append(thread)

    def close(self) -> None:
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()

    def _read(self, fd: int) -> None:
        with os.fdopen(fd, "rb") as pipe:
            for line in pipe:
                if not line.endswith(b"\n"):
                    continue  # killed in the middle of it: that it was accepted nobody has learned
                mark, message_id, *body = line.rstrip(b"\n").split(b" ", 2)
                if mark == b"?":
                    self.attempted.append(message_id.decode())
                else:
                    self.accepted[message_id.decode()] = body[0]


class Lives:
    """Processes that track, one after the other under each of the names, all forked from one server."""

    def __init__(self, settings: dict[str, Any], chance: random.Random, diary: Diary) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["delivery.torturer", "segment_durable.client"])
        self._settings = settings
        self._chance = chance
        self._diary = diary
        self._living: list[Any] = [None] * PROCESSES
        self.born = 0

    def begin(self, place: int) -> None:
        name = f"p{place}.{self.born}"
        self.born += 1
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=track_until_killed, args=(name, self._chance.randrange(1 << 30), self._settings, theirs)
        )
        process.start()
        theirs.close()
        self._diary.listen(os.dup(ours.fileno()))
        ours.close()
        self._living[place] = process

    def end(self, place: int) -> None:
        process = self._living[place]
        process.kill()
        process.join(30)
        assert process.exitcode == -signal.SIGKILL, "it ended by itself, before it was killed"
        process.close()

    def freeze(self, place: int, seconds: float) -> None:
        pid = self._living[place].pid
        os.kill(pid, signal.SIGSTOP)
        threading.Event().wait(seconds)
        os.kill(pid, signal.SIGCONT)


class Weather(threading.Thread):
    """Keeps the receiver's scripts filled with faults until it is told that the sky has cleared."""

    def __init__(self, receiver: Receiver, app: OAuthApp, chance: random.Random) -> None:
        super().__init__(name="weather")
        self._receiver = receiver
        self._app = app
        self._chance = chance
        self.cleared = threading.Event()

    def run(self) -> None:
        faults = token_faults = 0
        while not self.cleared.is_set():
            here = len(self._receiver.requests)
            tokens = self._app.token_requests
            while faults < here - tokens + 3:
                self._receiver.script(self._fault())
                faults += 1
            while token_faults < tokens + 2:
                self._receiver.token_script(self._token_fault())
                token_faults += 1
            if self._chance.random() < 0.05:
                self._app.revoke_all()
            if self._chance.random() < 0.05:
                self._receiver.release()
            self._receiver.wait_for(lambda receiver, here=here: len(receiver.requests) > here, 0.1)

    def _fault(self) -> Fault:
        chance = self._chance
        if chance.random() < 0.65:
            return POISON
        soon = chance.choice(["0.05", "0.05", "0.2", "1"])
        return chance.choice(
            [
                Answer(chance.choice([300, 302, 401, 403, 404, 405, 408, 410, 429, 460, 500, 501, 502, 503, 504, 511])),
                Answer(chance.choice([400, 413, 414, 422]), body={"code": "moody", "message": "not today"}),
                Answer(500, taken=True),
                Answer(429, {"Retry-After": soon}),
                Answer(503, {"X-RateLimit-Reset": soon}, taken=True),
                Answer(200, {"Content-Length": "100000"}, b"cut", taken=True),
                Drop(),
                Drop(after=True),
                HalfAnswer(),
                HalfAnswer(taken=True),
                Hang(chance.choice([0, 0.1, 0.8])),
                Hang(chance.choice([0, 0.1, 0.8]), taken=True),
                Delay(chance.choice([0.01, 0.1, 0.6]), POISON),
                Delay(chance.choice([0.01, 0.1, 0.6]), Drop(after=True)),
            ]
        )

    def _token_fault(self) -> Fault:
        chance = self._chance
        if chance.random() < 0.7:
            return Delay(0)
        return chance.choice(
            [
                Answer(chance.choice([400, 401, 403, 404, 408, 413, 429, 500, 503])),
                Answer(429, {"X-RateLimit-Reset": "0.2"}),
                Answer(200, body={"access_token": "never-issued", "expires_in": 3600}),
                Answer(200, body="<html>"),
                Drop(),
                Drop(after=True),
                HalfAnswer(),
                Hang(0.8),
            ]
        )


def raw_events(batch: Batch) -> Iterator[bytes]:
    """The bytes of each event of a request's body."""
    text = batch.body.decode()
    place = text.index("[") + 1
    decoder = json.JSONDecoder()
    while text[place] != "]":
        _, end = decoder.raw_decode(text, place)
        yield text[place:end].encode()
        place = end + (text[end] == ",")


@pytest.mark.timeout(600)
def test_nothing_is_lost_and_nothing_invented_whatever_is_killed_and_whatever_is_answered(
    tmp_path: Path, long: bool
) -> None:
    seed = int(os.environ.get("SEGMENT_DURABLE_SEED") or random.SystemRandom().randrange(1 << 30))
    print(f"SEGMENT_DURABLE_SEED={seed}")  # pytest shows it if the test fails
    chance = random.Random(seed)
    app, private = OAuthApp.generate(token_lifetime=2.0)
    outbox = tmp_path / "outbox"
    diary = Diary()
    with Receiver(oauth=app, write_key=KEY) as receiver:
        receiver.always(POISON)
        settings = {
            "write_key": KEY,
            "host": receiver.url,
            "outbox_dir": str(outbox),
            "upload_interval": 0.01,
            "upload_size": 40,
            "max_queue_size": 3000,
            "max_retries": 3,
            "timeout": 0.5,
            "lease_seconds": 2,
            "oauth_client_id": app.client_id,
            "oauth_key_id": app.key_id,
            "oauth_client_key": private,
            "oauth_auth_server": receiver.url,
        }
        weather = Weather(receiver, app, random.Random(chance.random()))
        lives = Lives(settings, chance, diary)
        weather.start()
        try:
            for place in range(PROCESSES):
                lives.begin(place)
            end = time.monotonic() + (LONG if long else SHORT)
            while time.monotonic() < end:
                receiver.wait_for(lambda _: False, chance.choice([0.02, 0.1, 0.3, 0.8]))  # a while to live
                place = chance.randrange(PROCESSES)
                if chance.random() < 0.1:
                    lives.freeze(place, chance.choice([0.1, 2.5]))
                lives.end(place)
                if chance.random() < 0.1:
                    receiver.stop()  # and all connections with it
                    receiver.start()
                lives.begin(place)
        finally:
            weather.cleared.set()
            weather.join(30)
            for place in range(PROCESSES):
                lives.end(place)
            diary.close()
        receiver.heal()
        for _ in range(20):  # what is left of a wait that the receiver asked for
            if go_on(settings):
                break
        judge(diary, receiver, outbox)
        with Client(**{**settings, "timeout": 5}) as client:
            assert client.track("user", "good", message_id="fresh")[0]
            assert client.flush(20.0)
        assert receiver.unique[-1]["messageId"] == "fresh"
        print(f"{lives.born} lives, {len(diary.accepted)} events, {len(receiver.requests)} requests")
        print(f"{receiver.duplicates} events twice, answers: {Counter(batch.status for batch in receiver.batches)}")
        assert lives.born > 10
        assert len(diary.accepted) > 500
        assert receiver.duplicates > 0
        assert not receiver.errors


def go_on(settings: dict[str, Any]) -> bool:
    """One process as after a deploy; its flush goes before the end of a backoff, but not of a Retry-After."""
    with Client(**{**settings, "timeout": 5}) as client:
        return client.flush(5.0)


def judge(diary: Diary, receiver: Receiver, folder: Path) -> None:
    outbox = Outbox(folder, SystemClock(), write_key=KEY)
    stats, letters = outbox.stats(), outbox.dead_letters()
    outbox.close()
    attempted = set(diary.attempted)
    taken = [batch for batch in receiver.batches if batch.taken]
    arrived = {event["messageId"]: event for event in receiver.unique}
    dead = {json.loads(letter.body)["messageId"]: letter for letter in letters}

    assert (stats.pending, stats.leased) == (0, 0)
    lost = diary.accepted.keys() - arrived.keys() - dead.keys()
    assert not lost
    assert (arrived.keys() | dead.keys()) <= attempted
    assert len(attempted) == len(diary.attempted)

    for message_id, letter in dead.items():
        reasons = {"poisoned", "moody"} if b'"event":"poison"' in letter.body else {"moody"}
        assert letter.code in reasons, message_id
        assert letter.status in (400, 413, 414, 422)
        assert letter.body == diary.accepted.get(message_id, letter.body)

    for batch in taken:
        for raw, event in zip(raw_events(batch), batch.events):
            assert raw == diary.accepted.get(event["messageId"], raw)

    last: dict[str, int] = {}
    for message_id in arrived:  # in the order of first arrival
        if message_id in dead:
            continue  # buried, and an earlier try of it was taken after all
        name, _, number = message_id.partition("-")
        assert int(number) > last.get(name, -1), message_id
        last[name] = int(number)

    assert stats.balanced
    assert (stats.pending, stats.leased, stats.dead) == (0, 0, len(dead))
    assert stats.delivered == len(arrived.keys() - dead.keys())
    assert len(diary.accepted) <= stats.accepted <= len(attempted)
