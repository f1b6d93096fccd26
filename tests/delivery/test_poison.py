"""Poison: events that the receiver refuses, together with whatever shares a batch with them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from itertools import count as counting

import pytest

from segment_durable import Client
from segment_durable.answers import ANSWER_LIMIT
from segment_durable.errors import DeliveryError
from segment_durable.testing import Receiver, Refuse
from segment_durable.testing.scripted import Post, Reply
from segment_durable.transport import Response, TransportError

from .conftest import Bench, Reports, Sender, numbers_of


class Host:
    """Refuses a whole batch if it holds poison, as Segment does; keeps what it took."""

    def __init__(self, poison: Iterable[int], status: int = 400) -> None:
        self.poison = set(poison)
        self.status = status
        self.taken: list[list[int]] = []
        self.requests = 0

    def __call__(self, post: Post) -> Reply:
        self.requests += 1
        sent = numbers_of(post)
        if self.poison & set(sent):
            return Response(self.status, {}, b'{"code":"invalid_event","message":"an event was refused"}')
        self.taken.append(sent)
        return 200

    @property
    def arrived(self) -> list[int]:
        return [each for sent in self.taken for each in sent]


def most_requests(poison: int, batch: int) -> int:
    """The bound: 1 + 2 N ceil(log2 B).

    The halvings form a tree of depth ceil(log2 B).  Posted are its root and both children of each refused node; at each
    of the levels at most N nodes that have children are refused.
    """
    return 1 + 2 * poison * (batch - 1).bit_length()


PLACES = [
    *[(size, (place,)) for size in (2, 3, 8, 100) for place in (1, size // 2 + 1, size)],
    (1, (1,)),
    (7, (3, 4)),
    (64, (32, 33)),
    (64, (1, 64)),
    (100, (1, 2, 3)),
    (100, (98, 99, 100)),
    (100, tuple(range(1, 101, 9))),
    (16, tuple(range(1, 17))),
    (5, tuple(range(1, 6))),
]


@pytest.mark.parametrize(("size", "poison"), PLACES, ids=lambda value: str(value).replace(" ", ""))
@pytest.mark.parametrize("status", [400, 413])
def test_poison_is_buried_and_all_its_neighbours_are_delivered_in_order(
    bench: Bench, size: int, poison: tuple[int, ...], status: int
) -> None:
    bench.configure(upload_size=size)
    put = bench.put(size)
    reports = Reports()
    host = Host(poison, status)
    sender = bench.sender(host, reports=reports)
    assert sender.run().kind == "empty"
    assert host.arrived == [each for each in put if each not in poison]
    assert bench.dead() == list(poison)
    assert host.requests <= most_requests(len(poison), size)
    assert [told for _, told in reports.failures] == [[each] for each in poison]
    assert all(isinstance(error, DeliveryError) and error.status == status for error in reports.errors)
    assert [each for told in reports.deliveries for each in told] == host.arrived
    stats = bench.outbox.stats()
    assert (stats.delivered, stats.dead) == (size - len(poison), len(poison))


@pytest.mark.parametrize("seed", range(12))
def test_poison_anywhere_costs_no_more_than_the_bound(bench: Bench, seed: int) -> None:
    chance = random.Random(seed)
    size = chance.randrange(2, 300)
    bench.configure(upload_size=size)
    put = bench.put(size)
    poison = sorted(chance.sample(put, chance.randrange(1, min(size, 12) + 1)))
    host = Host(poison)
    bench.sender(host).run()
    assert (host.arrived, bench.dead()) == ([each for each in put if each not in poison], poison)
    assert host.requests <= most_requests(len(poison), size)


def test_one_poison_event_in_a_hundred_costs_fifteen_requests_at_most(bench: Bench) -> None:
    """The bound in figures, so that nobody loosens its formula unnoticed."""
    bench.put(100)
    host = Host({50})
    bench.sender(host).run()
    assert host.requests <= 15


def test_a_dead_letter_tells_the_status_the_code_the_answer_and_the_times(bench: Bench) -> None:
    bench.put(3, name="café")
    put_at = bench.clock.time()
    bench.clock.advance(77)
    said = b'{"code":"invalid_event","message":"no"} ' + b"x" * 10_000
    sender = bench.sender(lambda post: Response(422, {}, said) if 2 in numbers_of(post) else 200)
    sender.run()
    (letter,) = bench.outbox.dead_letters()
    assert (letter.id, letter.status) == (2, 422)
    assert letter.code == "unknown"  # what follows the JSON makes it none
    assert letter.answer.encode() == said[:2048]
    assert ANSWER_LIMIT == 2048
    assert (letter.appended_at, letter.buried_at) == (put_at, put_at + 77)
    assert letter.body == b'{"messageId": "2", "type": "track", "name": "caf\\u00e9"}'


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (b'{"code":"too_old","message":"no"}', "too_old"),
        (b'{"error":{"code":"too_old","message":"no"}}', "too_old"),
        (b'{"code":17}', "17"),
        (b"", "unknown"),
        (b"<html>\x00\xff\xfe", "unknown"),
        (b"[" * 20_000, "unknown"),
        (b'{"code":"\\ud800\\u0000x"}', "x"),
    ],
)
def test_the_code_of_a_refusal_is_read_from_any_answer(bench: Bench, said: bytes, code: str) -> None:
    bench.put()
    bench.sender([Response(400, {}, said)]).step()
    (letter,) = bench.outbox.dead_letters()
    assert letter.code == code
    assert letter.answer == said.decode("utf-8", "replace")[:2048]


def test_a_batch_that_is_refused_as_too_large_is_halved_until_it_fits(bench: Bench) -> None:
    put = bench.put(100)
    sent = []

    def answer(post: Post) -> Reply:
        if len(numbers_of(post)) > 13:
            return 413
        sent.extend(numbers_of(post))
        return 200

    bench.sender(answer).run()
    assert (sent, bench.dead()) == (put, [])


def test_the_next_batch_is_whole_again(bench: Bench) -> None:
    bench.configure(upload_size=8)
    bench.put(24)
    host = Host({3})
    bench.sender(host).run()
    assert host.taken[-2:] == [list(range(9, 17)), list(range(17, 25))]


def test_an_outage_in_the_middle_of_a_halving_only_delays_it(bench: Bench) -> None:
    put = bench.put(32)
    host = Host({11, 12})
    outage = counting()

    def answer(post: Post) -> Reply:
        return 503 if next(outage) % 3 == 2 else host(post)

    sender = bench.sender(answer)
    for _ in range(300):
        step = sender.step()
        bench.clock.advance(step.seconds or 0)
        if step.kind == "empty":
            break
    assert (host.arrived, bench.dead()) == ([each for each in put if each not in (11, 12)], [11, 12])
    assert next(outage) <= 2 * most_requests(2, 32)


def test_while_the_dead_letters_are_full_one_request_a_minute_asks_again(bench: Bench) -> None:
    bench.configure(max_dead_letters=0)
    bench.put(100)
    host = Host({60})
    sender = bench.sender(host)
    sender.run()
    for _ in range(5):
        before = host.requests
        bench.clock.advance(60)
        assert sender.run().kind == "failed"
        assert host.requests == before + 1


# -- crashes


class Crash(BaseException):
    """The process is gone: nothing after this runs in it."""


def crash_while_halving(bench: Bench, crash_at: int, moment: str, host: Host) -> Sender:
    """Deliver until post number `crash_at`, where the process dies "before" or "after" the receiver has it."""
    posts = counting(1)

    def answer(post: Post) -> Reply:
        if next(posts) == crash_at:
            if moment == "after":
                host(post)
            return Crash()
        return host(post)

    sender = bench.sender(answer)
    try:
        sender.run()
    except Crash:
        bench.lose_lease()
    return sender


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("poison", [{1}, {16}, {6, 7}, {2, 15}], ids=str)
def test_a_crash_at_any_request_of_a_halving_loses_nothing_and_repeats_one_batch_at_most(
    bench: Bench, poison: set[int], moment: str
) -> None:
    size = 16
    bench.configure(upload_size=size)
    crash_at, crashed, last = 0, True, 0
    while crashed:
        crash_at += 1
        put = bench.put(size)
        here = {each + last for each in poison}
        last = put[-1]
        host = Host(here)
        before = bench.outbox.stats()
        sender = crash_while_halving(bench, crash_at, moment, host)
        crashed = len(sender.posts) >= crash_at
        taken_before = len(host.arrived)
        bench.reopen() if crash_at % 2 else None
        assert bench.sender(host).run().kind == "empty"
        wanted = [each for each in put if each not in here]
        assert list(dict.fromkeys(host.arrived)) == wanted
        repeated = len(host.arrived) - len(wanted)
        assert repeated <= (size if moment == "after" and crashed else 0)
        assert repeated <= taken_before
        stats = bench.outbox.stats()
        assert stats.dead - before.dead == len(here)
        assert stats.delivered - before.delivered == len(wanted)
        assert set(bench.dead()) >= here
    assert crash_at > 8


@pytest.mark.parametrize("stop_after", range(1, 30))
def test_a_delivery_that_is_dropped_after_any_step_of_a_halving_leaves_the_rest_to_the_next(
    bench: Bench, stop_after: int
) -> None:
    bench.configure(upload_size=16)
    put = bench.put(16)
    host = Host({5, 12})
    dropped = bench.sender(host)
    for _ in range(stop_after):
        dropped.step()
    if bench.pending():
        assert bench.sender(host).step().kind == "leased"
    if stop_after % 2:
        bench.lose_lease()  # killed
    else:
        bench.clock.advance(bench.config.lease)  # frozen
    assert bench.sender(host).run().kind == "empty"
    assert host.arrived == [each for each in put if each not in (5, 12)]
    assert bench.dead() == [5, 12]
    assert dropped.step().kind in ("lost", "empty")


# -- the limit of dead letters


def test_no_more_than_the_limit_is_buried_and_delivery_waits_until_there_is_space(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.configure(max_dead_letters=2)
    put = bench.put(10)
    reports = Reports()
    host = Host({2, 4, 7})
    sender = bench.sender(host, reports=reports)
    step = sender.run()
    assert (step.kind, step.seconds, step.exhausted) == ("failed", 60, True)
    assert (bench.dead(), bench.pending()) == ([2, 4], [7, 8, 9, 10])
    for _ in range(3):
        assert sender.run().kind == "backoff"
        bench.clock.advance(60)
        assert sender.run().kind == "failed"
    assert (bench.dead(), bench.pending(), bench.outbox.stats().leased) == ([2, 4], [7, 8, 9, 10], 0)
    codes = [error.code for error in reports.errors if isinstance(error, DeliveryError)]
    assert codes == ["invalid_event", "invalid_event", "dead_letters_full"]
    assert "max_dead_letters" in bench.outbox.stats().last_error

    bench.outbox.requeue([2])
    bench.clock.advance(60)
    host.poison.discard(2)
    assert sender.run().kind == "empty"
    assert bench.dead() == [4, 7]
    assert host.arrived == [1, 3, 5, 6, 8, 9, 10, 2]
    assert len(put) == len(host.arrived) + 2
    told = [(each.levelname, "dead letters" in each.getMessage()) for each in caplog.records]
    assert told == [("WARNING", True), ("WARNING", True), ("ERROR", True), ("WARNING", True)]


def test_with_no_dead_letters_allowed_nothing_is_buried(bench: Bench) -> None:
    bench.configure(max_dead_letters=0)
    put = bench.put(3)
    reports = Reports()
    host = Host({2})
    sender = bench.sender(host, reports=reports)
    assert sender.run().kind == "failed"
    assert (host.arrived, bench.pending(), bench.dead(), len(reports.failures)) == ([1], put[1:], [], 1)
    bench.configure(max_dead_letters=1)
    assert bench.sender(host).run().kind == "backoff"
    assert bench.sender(host).step(hurry=True).progress
    bench.clock.advance(60)
    bench.lose_lease()
    assert bench.sender(host).run().kind == "empty"
    assert (host.arrived, bench.dead()) == ([1, 3], [2])


def test_a_requeued_event_goes_out_last_and_once_it_is_accepted_counts_as_delivered(bench: Bench) -> None:
    bench.put(4)
    host = Host({2, 3})
    sender = bench.sender(host)
    sender.run()
    host.poison.clear()
    assert bench.outbox.requeue() == 2
    sender.run()
    assert host.arrived == [1, 4, 2, 3]
    stats = bench.outbox.stats()
    assert (stats.accepted, stats.delivered, stats.dead) == (4, 4, 0)


# -- over a real network


def test_a_real_receiver_gets_every_event_but_the_poison(
    receiver: Receiver, make_client: Callable[..., Client], tmp_path: object
) -> None:
    errors: list[Exception] = []
    receiver.always(Refuse(lambda event: event["event"].startswith("poison"), 400, "invalid_event", "no"))
    client = make_client(on_error=lambda error, _: errors.append(error))
    names = [f"poison {number}" if number in (0, 37, 38, 119) else f"good {number}" for number in range(120)]
    for name in names:
        assert client.track("user", name)[0]
    assert client.flush(20.0)
    assert [event["event"] for event in receiver.events] == [name for name in names if name.startswith("good")]
    stats = client.stats()
    assert (stats.dead, stats.delivered, stats.balanced) == (4, 116, True)
    assert [getattr(error, "status", None) for error in errors] == [400] * 4
    assert receiver.duplicates == 0
    assert not receiver.errors


def test_a_host_that_never_answers_buries_nothing(bench: Bench) -> None:
    put = bench.put(4)
    sender = bench.sender(then=TransportError("timeout", "no answer"))
    for _ in range(50):
        sender.step(hurry=True)
    assert (bench.pending(), bench.dead()) == (put, [])
