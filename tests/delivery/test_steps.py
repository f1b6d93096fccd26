"""What one step does, for every answer and every trouble.  No network, no thread, no time but what is given."""

from __future__ import annotations

import gzip
import json
import logging
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from segment_durable import Client
from segment_durable.answers import ANSWER_LIMIT
from segment_durable.clock import utc_timestamp
from segment_durable.delivery import Reporter
from segment_durable.errors import DeliveryError, EventsExpired, StorageError
from segment_durable.records import Lease
from segment_durable.testing import Answer, Receiver
from segment_durable.testing.scripted import Post, Reply
from segment_durable.transport import Response, TransportError

from .conftest import WRITE_KEY, Bench, Reports, numbers_of

STATUSES = range(100, 600)
REFUSED = {400, 413, 414, 422}
RETRYABLE = {408, 410, 429, 460} | (set(range(500, 600)) - {501, 505, 511})
TROUBLES = ("timeout", "dns", "certificate", "tls", "proxy", "connection")


def throttled(seconds: object, status: int = 429, name: str = "Retry-After") -> Response:
    return Response(status, {name: str(seconds)}, b"")


def fail_once(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, *, after: int = 0, times: int = 1) -> None:
    """The next calls of a method raise a StorageError, `after` so many that still go well."""
    method, calls = getattr(owner, name), [0]

    def failing(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if after < calls[0] <= after + times:
            raise StorageError("the disk is unwell", "SQLITE_IOERR")
        return method(*args, **options)

    monkeypatch.setattr(owner, name, failing)


# -- which answers let events leave


@pytest.mark.parametrize("count", [1, 3])
def test_events_leave_by_a_2xx_or_as_a_refused_single_and_by_no_other_status(bench: Bench, count: int) -> None:
    for status in STATUSES:
        before = bench.outbox.stats()
        put = bench.put(count)
        sender = bench.sender([status])
        step = sender.step()
        after = bench.outbox.stats()
        assert sender.sent == [put], status
        if 200 <= status < 300:
            assert (step.kind, after.delivered - before.delivered, after.pending) == ("delivered", count, 0), status
        elif status in REFUSED and count == 1:
            assert (step.kind, after.dead - before.dead, after.pending) == ("buried", 1, 0), status
        elif status in REFUSED:
            assert (step.kind, after.pending, after.leased) == ("split", count, count), status
        else:
            assert (step.kind, after.pending, after.leased) == ("failed", count, 0), status
            assert (after.dead, after.delivered) == (before.dead, before.delivered), status
        sender.delivery.close()
        assert bench.outbox.stats().leased == 0
        bench.clock.advance(61)
        bench.sender().run()
        assert bench.pending() == []


def test_an_answer_that_may_go_better_next_time_waits_shortly_and_any_other_is_reported_and_waits_long(
    bench: Bench,
) -> None:
    for status in STATUSES:
        if 200 <= status < 300 or status in REFUSED:
            continue
        put = bench.put(2)
        sender, reports = bench.sender([status], reports=(reports := Reports())), reports
        step = sender.step()
        if status in RETRYABLE:
            assert (step.seconds, reports.failures) == (0.25, []), status  # half of 0.5 s, by a `chance` of 0.5
        else:
            assert step.seconds == 45, status
            ((error, told),) = reports.failures
            assert isinstance(error, DeliveryError)
            assert (error.status, told) == (status, put)
        assert step.exhausted == (status not in RETRYABLE)
        bench.clock.advance(step.seconds)
        bench.sender().run()


@pytest.mark.parametrize("kind", TROUBLES)
def test_a_transport_error_releases_the_batch_and_waits(bench: Bench, kind: str) -> None:
    put = bench.put(3)
    sender = bench.sender([TransportError(kind, "no answer")])
    step = sender.step()
    stats = bench.outbox.stats()
    assert (step.kind, step.seconds, stats.leased, stats.pending, stats.failures) == ("failed", 0.25, 0, 3, 1)
    assert kind in stats.last_error
    assert sender.step().kind == "backoff"
    bench.clock.advance(0.25)
    assert sender.step().kind == "delivered"
    assert sender.sent == [put, put]


def test_waits_double_from_half_a_second_to_a_minute_with_full_jitter(bench: Bench) -> None:
    bench.put()
    bench.configure(max_retries=1000)
    for chance in (0.0, 0.25, 1.0):
        sender = bench.sender(then=503, chance=chance)
        waits = []
        for _ in range(12):
            step = sender.step()
            assert step.kind == "failed"
            assert step.seconds is not None
            waits.append(step.seconds)
            bench.clock.advance(step.seconds)
        wanted = [chance * min(60.0, 0.5 * 2**failures) for failures in range(12)]
        assert waits == pytest.approx(wanted)
        bench.sender().run()
        bench.put()


@pytest.mark.parametrize("status", sorted(RETRYABLE))
def test_any_retryable_status_that_says_when_is_a_rate_limit(bench: Bench, status: int) -> None:
    bench.put()
    step = bench.sender([throttled(7, status)]).step()
    assert (step.kind, step.seconds, bench.outbox.stats().failures) == ("failed", 7, 0)
    assert bench.backoff().told


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "12"}, 12),
        ({"Retry-After": "12.5"}, 12.5),
        ({"Retry-After": "100000"}, 300),
        ({"X-RateLimit-Reset": "9"}, 9),
        ({"X-RateLimit-Reset": "1700000020"}, 20),
        ({"Retry-After": "Tue, 14 Nov 2023 22:13:50 GMT"}, 30),
        ({"Retry-After": "Tue, 14 Nov 2023 22:13:50 GMT", "Date": "Tue, 14 Nov 2023 22:13:40 GMT"}, 10),
        ({"Retry-After": "soon", "X-RateLimit-Reset": "4"}, 4),
        ({"Retry-After": "nan"}, 0.25),
        ({"Retry-After": "-3"}, 0.25),
        ({"Retry-After": "0"}, 0.25),
        ({"Retry-After": "Tue, 14 Nov 2023 22:13:10 GMT"}, 0.25),
    ],
)
def test_the_receivers_own_time_is_taken_where_it_can_be_read(
    bench: Bench, headers: dict[str, str], seconds: float
) -> None:
    bench.put()
    assert bench.clock.time() == 1_700_000_000  # Tue, 14 Nov 2023 22:13:20 GMT
    assert bench.sender([Response(429, headers, b"")]).step().seconds == seconds


# -- the shared backoff


def test_a_backoff_binds_a_second_delivery_and_survives_a_restart(bench: Bench) -> None:
    bench.put(2)
    bench.sender([503], chance=1.0).step()
    second = bench.sender()
    assert (second.step().kind, second.step().seconds) == ("backoff", 0.5)
    bench.clock.advance(0.4)
    bench.reopen()
    third = bench.sender()
    step = third.step()
    assert (step.kind, step.seconds) == ("backoff", pytest.approx(0.1))
    assert (second.posts, third.posts) == ([], [])
    bench.clock.advance(0.11)
    assert third.step().kind == "delivered"


def test_hurry_cuts_a_backoff_short(bench: Bench) -> None:
    put = bench.put()
    sender = bench.sender([503])
    sender.step()
    assert sender.step().kind == "backoff"
    assert sender.step(hurry=True).kind == "delivered"
    assert sender.sent == [put, put]


def test_nothing_is_sent_before_the_time_that_the_receiver_asked_for(bench: Bench) -> None:
    bench.put(5)
    first = bench.sender([throttled(60)])
    first.step()
    others = [first, bench.sender()]
    for half_second in range(119):
        bench.clock.advance(0.5)
        if half_second % 20 == 7:
            for sender in others:
                sender.delivery.close()
            bench.reopen()
            others = [bench.sender(), bench.sender()]
        for sender in others:
            for hurry in (False, True):
                step = sender.step(hurry=hurry)
                assert step.kind == "backoff"
                assert step.seconds == pytest.approx(60 - (half_second + 1) / 2)
    assert len(first.posts) == 1
    assert [sender.posts for sender in others] == [[], []]
    bench.clock.advance(0.5)
    assert others[0].step().kind == "delivered"


def test_a_success_that_was_under_way_does_not_end_a_wait_that_the_receiver_asked_for(bench: Bench) -> None:
    bench.configure(upload_size=2, thread=2)
    bench.put(6)
    limited = bench.sender([throttled(60)])

    def meanwhile(_: Post) -> Reply:
        assert limited.step().seconds == 60
        return 200

    assert bench.sender(meanwhile).step().kind == "delivered"
    step = bench.sender().step(hurry=True)
    assert (step.kind, step.seconds) == ("backoff", 60)
    assert bench.pending() == [3, 4, 5, 6]


@pytest.mark.parametrize("late", [503, 404, throttled(5)], ids=["503", "404", "throttled"])
def test_another_failure_that_was_under_way_does_not_shorten_it_either(bench: Bench, late: Reply) -> None:
    bench.configure(thread=2)
    bench.put(200)
    other = bench.sender([throttled(100)])

    def meanwhile(_: Post) -> Reply:
        assert other.step().kind == "failed"
        bench.clock.advance(1)
        return late

    assert bench.sender(meanwhile).step().seconds == 99
    assert bench.sender().step(hurry=True).seconds == 99


def test_what_another_sender_was_told_binds_one_that_goes_on_with_its_lease(bench: Bench) -> None:
    bench.configure(upload_size=2)
    put = bench.put(8)
    other = bench.sender()

    def slow(_: Post) -> Reply:
        bench.clock.advance(bench.config.lease)
        assert other.step().kind == "delivered"  # it has taken the lease over
        return throttled(100)

    assert bench.sender(slow).step().kind == "failed"
    step = other.step()
    assert (step.kind, step.seconds) == ("backoff", 100)
    assert other.sent == [put[:2]]
    bench.clock.advance(100)
    assert other.run().kind == "empty"
    assert other.sent == [put[:2], put[2:4], put[4:6], put[6:]]


def test_what_another_sender_was_told_binds_one_that_is_halving_which_then_goes_on_from_there(bench: Bench) -> None:
    bench.configure(thread=2, upload_size=8)
    put = bench.put(9)
    sender, other = bench.sender(lambda post: 400 if put[6] in numbers_of(post) else 200), bench.sender([throttled(60)])
    kinds = [sender.step().kind for _ in range(2)]
    assert other.step().kind == "failed"
    kinds += [sender.step().kind for _ in range(2)]
    assert kinds == ["split", "delivered", "backoff", "backoff"]
    bench.clock.advance(60)
    assert sender.run().kind == "empty"
    assert sender.sent[2:4] == [put[4:8], put[4:6]]
    assert bench.dead() == [put[6]]


def test_of_two_refusals_that_find_the_dead_letters_full_one_is_reported_and_a_told_wait_holds(bench: Bench) -> None:
    bench.configure(thread=3, upload_size=1, max_dead_letters=0)
    bench.put(3)
    reports = Reports()
    throttled_one = bench.sender([throttled(100)])

    def meanwhile(_: Post) -> Reply:
        assert throttled_one.step().kind == "failed"
        return 400

    other = bench.sender(meanwhile, reports=reports)

    def with_another(_: Post) -> Reply:
        assert other.step().told
        return 400

    step = bench.sender(with_another, reports=reports).step()
    assert (step.seconds, step.told, step.exhausted) == (100, True, False)
    assert [error.code for error in reports.errors if isinstance(error, DeliveryError)] == ["dead_letters_full"]
    assert bench.backoff().told


def test_a_jump_of_the_wall_clock_changes_nothing_about_a_wait(bench: Bench) -> None:
    bench.put()
    sender = bench.sender([throttled(60)])
    sender.step()
    for jump in (86_400, -7 * 86_400):
        bench.clock.jump(jump)
        assert sender.step().seconds == 60
    bench.reopen()
    assert bench.sender().step().seconds == 60


def test_a_rate_limit_holds_also_if_it_could_not_be_stored_at_first(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = bench.put(3)
    fail_once(monkeypatch, bench.outbox, "fail", times=2)
    sender, other = bench.sender([throttled(60)]), bench.sender()
    for _ in range(2):
        with pytest.raises(StorageError):
            sender.step(hurry=True)
        assert other.step(hurry=True).kind == "leased"
        bench.clock.advance(1)
    step = sender.step(hurry=True)
    assert (step.kind, step.seconds) == ("failed", 58)
    assert [each.step(hurry=True).kind for each in (sender, other)] == ["backoff", "backoff"]
    bench.clock.advance(58)
    assert other.step().kind == "delivered"
    assert (sender.sent, other.sent) == ([put], [put])


def test_a_used_up_budget_that_is_stored_by_close_is_reported_by_whoever_fails_next(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.configure(max_retries=0)
    put = bench.put(2)
    reports = Reports()
    fail_once(monkeypatch, bench.outbox, "fail")
    sender = bench.sender([503], reports=reports)
    with pytest.raises(StorageError):
        sender.step()
    sender.delivery.close()
    assert reports.failures == []
    assert bench.sender([503], reports=reports).step(hurry=True).exhausted
    assert [told for _, told in reports.failures] == [put]


def test_a_wait_that_was_not_stored_is_stored_by_close(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.put(3)
    fail_once(monkeypatch, bench.outbox, "fail")
    sender = bench.sender([throttled(60)])
    with pytest.raises(StorageError):
        sender.step()
    sender.delivery.close()
    assert bench.sender().step().seconds == 60


def test_a_release_that_never_succeeds_leaves_a_lease_that_dies_with_its_holder(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = bench.put(3)
    fail_once(monkeypatch, bench.outbox, "fail", times=100)
    sender = bench.sender([503])
    with pytest.raises(StorageError):
        sender.step()
    sender.delivery.close()
    other = bench.sender()
    assert other.step().kind == "delivered"
    assert other.sent == [put]
    assert other.posts[0].headers["X-Retry-Count"] == "1"


# -- the budget and its report


def test_each_sender_logs_once_in_each_outage_that_the_budget_is_used_up(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    def told() -> int:
        found = sum(each.levelname == "ERROR" for each in caplog.records)
        caplog.clear()
        return found

    bench.put(2)
    one, other = bench.sender([401, 401, 200, 401]), bench.sender([401, 401, 401])
    for sender, times in ((one, 1), (one, 0), (other, 1), (other, 0)):
        assert sender.step(hurry=True).exhausted
        assert told() == times
    assert one.step(hurry=True).kind == "delivered"
    bench.put(2)
    for sender, times in ((other, 1), (one, 1)):
        assert sender.step(hurry=True).exhausted
        assert told() == times


def test_a_used_up_budget_is_reported_once_and_the_events_are_tried_on(bench: Bench) -> None:
    bench.configure(max_retries=3)
    put = bench.put(2)
    reports = Reports()
    sender = bench.sender([503] * 7, reports=reports)
    exhausted = []
    for _ in range(7):
        step = sender.step()
        exhausted.append((step.exhausted, len(reports.failures)))
        assert step.seconds is not None
        bench.clock.advance(step.seconds)
    assert exhausted == [(False, 0)] * 3 + [(True, 1)] * 4
    ((error, told),) = reports.failures
    assert isinstance(error, DeliveryError)
    assert (error.status, told) == (503, put)
    assert sender.step().kind == "delivered"
    assert reports.deliveries == [put]


def test_the_report_is_not_repeated_by_another_delivery_nor_after_a_restart(bench: Bench) -> None:
    bench.configure(max_retries=0)
    bench.put()
    reports = Reports()
    for _ in range(4):
        bench.sender([503], reports=reports).step(hurry=True)
        bench.reopen()
    assert len(reports.failures) == 1


def test_the_next_outage_is_reported_again(bench: Bench) -> None:
    bench.configure(max_retries=0)
    reports = Reports()
    sender = bench.sender([503, 503, 200, 503, 503, 200], reports=reports)
    for number in (1, 2):
        bench.put()
        for _ in range(3):
            sender.step(hurry=True)
        assert len(reports.failures) == number


def test_the_next_outage_is_reported_again_after_a_refusal_too(bench: Bench) -> None:
    bench.configure(max_retries=0)
    reports = Reports()
    sender = bench.sender([503, 400, 503], reports=reports)
    bench.put(1)
    sender.step()
    sender.step(hurry=True)
    bench.put(1)
    sender.step(hurry=True)
    assert [error.status for error in reports.errors if isinstance(error, DeliveryError)] == [503, 400, 503]


def test_the_budget_is_also_a_time(bench: Bench) -> None:
    bench.configure(max_retries=1000, max_total_backoff_duration=100)
    bench.put()
    reports = Reports()
    sender = bench.sender(then=503, reports=reports)
    sender.step()
    bench.clock.advance(99)
    assert not sender.step().exhausted
    bench.clock.advance(60)
    assert sender.step().exhausted
    assert len(reports.failures) == 1


def test_rate_limits_have_a_budget_of_their_own(bench: Bench) -> None:
    bench.configure(max_retries=0, max_rate_limit_duration=100)
    bench.put()
    reports = Reports()
    sender = bench.sender([throttled(40)] * 4, reports=reports)
    exhausted = []
    for _ in range(4):
        exhausted.append(sender.step().exhausted)
        bench.clock.advance(40)
    assert exhausted == [False, False, True, True]
    assert len(reports.failures) == 1
    assert bench.outbox.stats().failures == 0
    assert sender.step().kind == "delivered"


# -- what is sent


def test_the_retry_count_counts_every_failed_attempt(bench: Bench) -> None:
    put = bench.put()
    answers: list[Reply] = [503, throttled(5), TransportError("timeout", "no answer"), 404, throttled(1), 200]
    sender = bench.sender(answers)
    for _ in answers:
        step = sender.step()
        bench.clock.advance(step.seconds or 0)
    assert sender.sent == [put] * 6
    assert [post.headers.get("X-Retry-Count") for post in sender.posts] == [None, "1", "2", "3", "4", "5"]
    bench.put()
    sender.step()
    assert "X-Retry-Count" not in sender.posts[-1].headers


def test_the_retry_count_survives_a_restart_and_a_crash(bench: Bench) -> None:
    bench.put()
    counts = []
    for _ in range(4):
        sender = bench.sender([503])
        sender.step(hurry=True)
        counts.append(sender.posts[0].headers.get("X-Retry-Count"))
        bench.reopen()
    assert counts == [None, "1", "2", "3"]

    class Crash(BaseException):
        pass

    crashing = bench.sender([Crash()])
    with pytest.raises(Crash):
        crashing.step(hurry=True)
    bench.lose_lease()
    after = bench.sender()
    assert after.step(hurry=True).kind == "delivered"
    assert after.posts[0].headers["X-Retry-Count"] == "5"


def test_a_retry_after_a_rate_limit_says_so_also_after_a_restart(bench: Bench) -> None:
    bench.put()
    bench.sender([throttled(1)]).step()
    bench.clock.advance(1)
    bench.reopen()
    after = bench.sender()
    after.step()
    assert after.posts[0].headers.get("X-Retry-Count") == "1"


def test_sent_at_is_the_time_of_the_attempt(bench: Bench) -> None:
    bench.put()
    sender = bench.sender([503, 200])
    times = []
    for _ in range(2):
        bench.clock.advance(3600.125)
        times.append(utc_timestamp(bench.clock.time()))
        sender.step()
    assert [json.loads(post.body)["sentAt"] for post in sender.posts] == times
    assert times[0] != times[1]


def test_the_payload_goes_out_byte_by_byte_as_it_was_put(bench: Bench) -> None:
    bench.configure(gzip=True)
    bodies = [b'{"messageId":"1","name":"caf\xc3\xa9"}', b'{"messageId": "2" , "n": 1.50}']
    for body in bodies:
        bench.outbox.put(body, 1)
    sender = bench.sender()
    sender.step()
    (post,) = sender.posts
    assert post.headers["Content-Encoding"] == "gzip"
    sent_at = utc_timestamp(bench.clock.time())
    wanted = b'{"batch":[%b],"sentAt":"%b","writeKey":"%b"}' % (
        b",".join(bodies),
        sent_at.encode(),
        WRITE_KEY.encode(),
    )
    assert gzip.decompress(post.raw) == wanted


def test_the_headers_are_those_of_segments_api(bench: Bench) -> None:
    bench.put()
    sender = bench.sender()
    sender.step()
    headers = sender.posts[0].headers
    assert sender.posts[0].url == "http://receiver.test/v1/batch"
    assert headers["Content-Type"] == "application/json"
    assert headers["Authorization"] == "Basic YS13cml0ZS1rZXktb2YtdGVzdHM6"
    assert headers["User-Agent"].startswith("segment-durable/")


def test_a_request_takes_as_many_events_as_the_limit_has_room_for(bench: Bench) -> None:
    bench.configure(upload_size=1000)
    put = bench.put(40, size=31_000)
    sender = bench.sender()
    sender.run()
    assert [each for sent in sender.sent for each in sent] == put
    sizes = [len(post.body) for post in sender.posts]
    assert max(sizes) <= 500_000
    assert all(size + 31_001 > 500_000 for size in sizes[:-1])


def test_the_limit_of_a_request_is_exact(bench: Bench) -> None:
    bench.configure(upload_size=1000)
    envelope = len(b'{"batch":[],"sentAt":"2023-11-14T22:13:20.000+00:00","writeKey":"a-write-key-of-tests"}')
    room = 500_000 - envelope - 15  # 16 events have 15 commas
    for surplus, batches in ((0, [16]), (1, [15, 1])):
        bench.put(15, size=31_000)
        bench.put(1, size=room - 15 * 31_000 + surplus)
        sender = bench.sender()
        sender.run()
        assert [len(sent) for sent in sender.sent] == batches
        assert (len(sender.posts[0].body) == 500_000) == (surplus == 0)


def test_a_request_has_at_most_upload_size_events_and_never_over_2500(bench: Bench) -> None:
    bench.put(7)
    bench.configure(upload_size=3)
    sender = bench.sender()
    sender.run()
    assert sender.sent == [[1, 2, 3], [4, 5, 6], [7]]
    bench.put(2501)
    bench.configure(upload_size=10_000)
    sender = bench.sender()
    sender.run()
    assert [len(sent) for sent in sender.sent] == [2500, 1]


def test_an_event_over_the_limit_by_itself_is_sent_alone_and_the_receiver_decides(bench: Bench) -> None:
    bench.put()
    (big,) = bench.put(size=600_000)
    bench.put()
    sender = bench.sender(lambda post: 413 if len(post.body) > 500_000 else 200)
    sender.run()
    assert (sender.sent, bench.dead()) == ([[1], [2], [3]], [big])


@pytest.mark.parametrize("seed", range(8))
def test_events_leave_in_the_order_in_which_they_were_put_whatever_happens(bench: Bench, seed: int) -> None:
    chance = random.Random(seed)
    bench.configure(upload_size=7)
    arrived: list[int] = []

    def answer(post: Post) -> Reply:
        status = chance.choice([200, 200, 503, 404, 429, 413])
        trouble = TransportError("connection", "reset")
        if chance.random() < 0.2:
            arrived.extend(numbers_of(post))  # taken, and the answer is lost
            return trouble
        if status == 413 and len(post.events) == 1:
            status = 200
        if status == 200:
            arrived.extend(numbers_of(post))
        return throttled(3) if status == 429 else status

    put: list[int] = []
    senders = [bench.sender(answer), bench.sender(answer)]
    while len(put) < 150 or bench.pending():
        if len(put) < 150:
            put += bench.put(chance.randrange(1, 9))
        sender = chance.choice(senders)
        step = sender.step(hurry=chance.random() < 0.5)
        if chance.random() < 0.1:
            bench.lose_lease()
            senders = [bench.sender(answer), bench.sender(answer)]
        bench.clock.advance(min(step.seconds or 0, 5.0))
    assert list(dict.fromkeys(arrived)) == put
    stats = bench.outbox.stats()
    assert (stats.delivered, stats.dead) == (len(put), 0)


# -- the lost lease


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("late", [200, 400, 413], ids=str)
def test_an_answer_that_comes_after_the_lease_was_lost_changes_nothing(bench: Bench, count: int, late: Reply) -> None:
    put = bench.put(count)
    other_reports, reports = Reports(), Reports()
    other = bench.sender(reports=other_reports)

    def slow(_: Post) -> Reply:
        bench.clock.advance(bench.config.lease + 1)
        assert other.step().kind == "delivered"
        bench.put(count)
        return late

    sender = bench.sender(slow, reports=reports)
    step = sender.step()
    if late in (400, 413) and count > 1:
        assert step.kind == "split"
        step = sender.step()
    assert step.kind == "lost"
    assert (reports.failures, reports.deliveries) == ([], [])
    assert other_reports.deliveries == [put]
    assert bench.pending() == [each + count for each in put]
    assert bench.dead() == []
    assert bench.backoff().not_before == 0
    assert other.step().kind == "delivered"


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize(
    ("late", "seconds", "failures"),
    [(503, 0.25, 1), (404, 45.0, 1), (throttled(100), 100.0, 0), (TransportError("dns", "no answer"), 0.25, 1)],
    ids=["503", "404", "throttled", "dns"],
)
def test_an_attempt_that_failed_after_the_lease_was_lost_counts_and_what_was_told_binds(
    bench: Bench, count: int, late: Reply, seconds: float, failures: int
) -> None:
    put = bench.put(count)
    reports = Reports()
    other = bench.sender()

    def slow(_: Post) -> Reply:
        bench.clock.advance(bench.config.lease + 1)
        assert other.step().kind == "delivered"
        bench.put(count)
        return late

    step = bench.sender(slow, reports=reports).step()
    assert (step.kind, step.seconds, step.exhausted) == ("failed", seconds, False)
    assert reports.failures == []  # that is left to whoever has the events
    assert bench.outbox.stats().failures == failures
    assert (bench.pending(), other.sent) == ([each + count for each in put], [put])
    again = other.step()
    assert (again.kind, again.seconds) == ("backoff", seconds)


@pytest.mark.parametrize("late", [200, 400], ids=str)
def test_an_answer_that_comes_while_another_has_the_lease_changes_nothing(bench: Bench, late: Reply) -> None:
    put = bench.put(4)
    reports = Reports()

    def slow(_: Post) -> Reply:
        bench.clock.advance(bench.config.lease + 1)
        bench.outbox.lease(100, 60)
        return late

    sender = bench.sender(slow, reports=reports)
    kinds = [sender.step().kind]
    if late == 400:
        sender.transport._answer = lambda _: 200
        kinds = [sender.step().kind]
    assert kinds == ["lost"]
    assert sender.step().kind == "leased"
    assert (bench.pending(), reports.failures, reports.deliveries) == (put, [], [])


def test_a_long_halving_keeps_its_lease(bench: Bench) -> None:
    bench.put(64)

    def slow(post: Post) -> Reply:
        bench.clock.advance(bench.config.lease * 0.45)
        return 400 if 40 in numbers_of(post) else 200

    sender, other = bench.sender(slow), bench.sender()
    while (step := sender.step()).progress:
        assert step.kind != "lost"
        assert other.step().kind in ("leased", "empty")
    assert (bench.dead(), bench.pending(), other.posts) == ([40], [], [])


# -- an outbox that fails in the middle


def test_an_ack_that_fails_is_tried_again_without_a_second_upload(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = bench.put(3)
    fail_once(monkeypatch, bench.outbox, "ack", times=3)
    reports = Reports()
    sender = bench.sender(reports=reports)
    for _ in range(3):
        with pytest.raises(StorageError):
            sender.step()
        assert (bench.pending(), reports.deliveries) == (put, [])
    assert sender.step().kind == "delivered"
    assert (sender.sent, reports.deliveries, bench.pending()) == ([put], [put], [])


def test_an_ack_that_failed_is_made_good_by_close(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.put(3)
    fail_once(monkeypatch, bench.outbox, "ack")
    sender = bench.sender()
    with pytest.raises(StorageError):
        sender.step()
    sender.delivery.close()
    assert bench.pending() == []
    assert sender.transport.closed == 1


@pytest.mark.parametrize("method", ["joined", "rows", "bury", "ack", "extend", "fail", "lease"])
@pytest.mark.parametrize("after", range(8))
def test_an_outbox_that_fails_anywhere_in_a_halving_loses_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, method: str, after: int
) -> None:
    put = bench.put(16)
    fail_once(monkeypatch, bench.outbox, method, after=after)
    poison = {5, 16}
    taken: list[int] = []

    def answer(post: Post) -> Reply:
        bench.clock.advance(bench.config.lease * 0.6)
        if len(sender.posts) == 4:
            return 503
        if poison & set(numbers_of(post)):
            return 400
        taken.extend(numbers_of(post))
        return 200

    sender = bench.sender(answer)
    troubles = 0
    for _ in range(200):
        try:
            step = sender.step(hurry=True)
        except StorageError:
            troubles += 1
            continue
        if step.kind == "empty":
            break
    monkeypatch.undo()
    assert taken == [each for each in put if each not in poison]
    assert (bench.dead(), bench.pending()) == (sorted(poison), [])
    assert troubles <= 1


def test_a_sender_says_why_delivery_is_held_up_and_goes_on(
    receiver: Receiver,
    make_client: Callable[..., Client],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = make_client()
    assert client._engine is not None
    fail_once(monkeypatch, client._engine.outbox, "lease", times=2)
    client.track("u", "e")
    assert any(client.flush(20) for _ in range(10))  # one does not wait for what may not end
    assert [event["event"] for event in receiver.events] == ["e"]
    told = [each for each in caplog.records if "held up" in each.getMessage()]
    assert [each.getMessage() for each in told] == ["delivery is held up (1 times): the disk is unwell"]
    assert [(each.levelname, bool(each.exc_info)) for each in told] == [("ERROR", False)]


def test_events_that_an_operator_erases_in_the_middle_of_a_halving_are_not_missed(bench: Bench) -> None:
    put = bench.put(8)
    erased = {1, 2, 3, 4, 6}

    def answer(post: Post) -> Reply:
        if len(sender.posts) == 1:
            with bench.outbox.db.write() as connection:
                for each in erased:
                    connection.execute("DELETE FROM event WHERE id = ?", (each,))
                connection.execute("UPDATE state SET erased = ?", (len(erased),))
        return 400 if 8 in numbers_of(post) else 200

    sender = bench.sender(answer)
    assert sender.run().kind == "empty"
    assert bench.dead() == [8]
    stats = bench.outbox.stats()
    assert (stats.delivered, stats.erased, stats.pending) == (len(put) - len(erased) - 1, len(erased), 0)


# -- callbacks


def test_reports_come_after_the_commit(bench: Bench) -> None:
    seen: list[tuple[str, int, int, int]] = []

    class Looking(Reporter):
        def failed(self, error: Exception, bodies: object) -> None:
            self.look(str(getattr(error, "status", "expired")))

        def delivered(self, events: bytes) -> None:
            self.look("delivered")

        def look(self, what: str) -> None:
            stats = bench.outbox.stats()
            seen.append((what, stats.pending, stats.leased, stats.dead))

    bench.configure(max_retries=0, max_age=100)
    bench.put(2)
    sender = bench.sender([503, 200, 400], reports=Looking())
    sender.step()
    sender.step(hurry=True)
    bench.put(1)
    sender.step()
    bench.put(1)
    bench.clock.advance(101)
    sender.step()
    assert seen == [("503", 2, 0, 0), ("delivered", 0, 0, 0), ("400", 0, 0, 1), ("expired", 0, 0, 1)]


def test_a_report_that_raises_changes_nothing(bench: Bench) -> None:
    class Raising(Reporter):
        def failed(self, error: Exception, bodies: object) -> None:
            raise RuntimeError("a callback")

        def delivered(self, events: bytes) -> None:
            raise RuntimeError("a callback")

    bench.configure(max_retries=0, upload_size=4)
    put = bench.put(10)
    taken: list[int] = []

    def answer(post: Post) -> Reply:
        if len(sender.posts) == 1:
            return 503
        if 3 in numbers_of(post):
            return 400
        taken.extend(numbers_of(post))
        return 200

    sender = bench.sender(answer, reports=Raising())
    raised = 0
    for _ in range(50):
        try:
            if sender.step(hurry=True).kind == "empty":
                break
        except RuntimeError:
            raised += 1
    assert taken == [each for each in put if each != 3]
    assert (bench.dead(), bench.pending(), raised) == ([3], [], 6)


@pytest.mark.parametrize("name", ["on_error", "on_success"])
def test_a_users_callback_that_raises_is_logged_and_changes_nothing(
    receiver: Receiver, make_client: Callable[..., Client], caplog: pytest.LogCaptureFixture, name: str
) -> None:
    calls: list[object] = []

    def callback(*args: object) -> None:
        calls.append(args)
        raise ValueError("from a callback")

    client = make_client(**{name: callback}, upload_size=2, max_retries=0)
    receiver.script(Answer(503))
    for number in range(6):
        assert client.track("user", f"event {number}")[0]
    client.flush(5.0)
    assert client.flush(10.0)
    assert client.shutdown(5.0)
    assert [event["event"] for event in receiver.unique] == [f"event {number}" for number in range(6)]
    assert len(calls) >= 1
    assert f"{name} raised" in caplog.text
    assert "from a callback" in caplog.text


def test_on_success_gets_the_events_of_each_batch_as_they_were_returned(
    receiver: Receiver, make_client: Callable[..., Client]
) -> None:
    delivered: list[list[dict[str, Any]]] = []
    client = make_client(on_success=delivered.append, upload_size=3, gzip=True)
    made = [client.track("user", "Signed Up", {"n": number, "text": "café"})[1] for number in range(7)]
    assert client.flush(10.0)
    assert [event for items in delivered for event in items] == made
    assert max(len(items) for items in delivered) <= 3
    assert receiver.events == made


def test_on_error_gets_the_events_and_the_receivers_words(
    receiver: Receiver, make_client: Callable[..., Client]
) -> None:
    failed: list[tuple[Exception, list[dict[str, Any]]]] = []
    receiver.script(Answer(404, body={"code": "no_such_place", "message": "not here"}))
    client = make_client(on_error=lambda error, items: failed.append((error, items)))
    made = client.track("user", "Signed Up")[1]
    assert not client.flush(10.0)
    ((error, items),) = failed
    assert isinstance(error, DeliveryError)
    assert (error.status, error.code, error.message) == (404, "no_such_place", "not here")
    assert items == [made]
    assert client.flush(10.0)


# -- what a lease covers, and for how long


def test_what_was_given_up_at_a_rest_is_not_sent_on(bench: Bench) -> None:
    bench.configure(upload_size=2)
    put = bench.put(8)
    resting = bench.sender()
    assert resting.step().kind == "delivered"
    assert resting.delivery.is_under_way
    resting.delivery.rest()
    assert not resting.delivery.is_under_way
    other = bench.sender()
    assert other.step().kind == "delivered"
    assert resting.step().kind == "leased"
    assert other.run().kind == "empty"
    assert resting.run().kind == "empty"
    assert resting.sent == [put[:2]]
    assert [each for batch in other.sent for each in batch] == put[2:]


def test_a_lease_is_extended_when_less_than_half_of_it_is_left(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.configure(upload_size=2)
    put = bench.put(8)
    sender = bench.sender()
    extended: list[float] = []
    began, half, real = bench.clock.boot(), bench.config.lease / 2, bench.outbox.extend

    def extend(lease: Lease, seconds: float) -> Lease | None:
        extended.append(bench.clock.boot() - began)
        return real(lease, seconds)

    monkeypatch.setattr(bench.outbox, "extend", extend)
    for then in (half, 1.0, half / 2, 0.0):
        assert sender.step().kind == "delivered"
        bench.clock.advance(then)
    assert extended == [half + 1.0]
    assert [each for batch in sender.sent for each in batch] == put


# -- what is older than the user wants


def test_events_over_max_age_leave_as_expired_and_are_reported(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.configure(max_age=100)
    old = bench.put(3)
    bench.clock.advance(60)
    new = bench.put(2)
    reports = Reports()
    sender = bench.sender(reports=reports)
    bench.clock.advance(41)
    assert sender.step().kind == "delivered"
    assert sender.sent == [new]
    ((error, told),) = reports.failures
    assert isinstance(error, EventsExpired)
    assert (error.count, told) == (3, old)
    assert [(each.levelname, each.getMessage()) for each in caplog.records] == [("ERROR", str(error))]
    stats = bench.outbox.stats()
    assert (stats.expired, stats.delivered) == (3, 2)


def test_nothing_expires_without_max_age_nor_before_it(bench: Bench) -> None:
    put = bench.put(3)
    bench.clock.advance(10 * 365 * 86_400)
    sender = bench.sender([503])
    sender.step()
    bench.configure(max_age=20 * 365 * 86_400)
    other = bench.sender()
    other.step(hurry=True)
    assert other.sent == [put]


def test_events_expire_in_the_middle_of_an_outage_also(bench: Bench) -> None:
    bench.configure(max_age=100)
    old = bench.put(3)
    reports = Reports()
    sender = bench.sender([throttled(300)], reports=reports)
    sender.step()
    bench.clock.advance(101)
    new = bench.put(1)
    assert sender.step().kind == "backoff"
    assert [told for _, told in reports.failures] == [old]
    assert bench.pending() == new


def test_a_backlog_of_thousands_expires_in_one_step(bench: Bench) -> None:
    bench.configure(max_age=1)
    old = bench.put(2500)
    bench.clock.advance(2)
    reports = Reports()
    assert bench.sender(reports=reports).step().kind == "empty"
    assert [each for _, told in reports.failures for each in told] == old


def test_events_that_another_sender_has_leased_do_not_expire(bench: Bench) -> None:
    bench.configure(max_age=10, lease_seconds=1000)
    put = bench.put(2)
    reports = Reports()
    other = bench.sender(reports=reports)

    def slow(_: Post) -> Reply:
        bench.clock.advance(11)
        assert other.step().kind == "leased"
        return 200

    sender = bench.sender(slow)
    assert sender.step().kind == "delivered"
    assert (reports.failures, bench.outbox.stats().delivered) == ([], len(put))


# -- credentials of the write key, odd answers, logs


@pytest.mark.parametrize("status", [401, 403, 511])
def test_without_oauth_refused_credentials_are_reported_and_not_tried_at_once(bench: Bench, status: int) -> None:
    bench.put(2)
    reports = Reports()
    sender = bench.sender(then=status, reports=reports)
    step = sender.step()
    assert (step.kind, step.exhausted, len(sender.posts), len(reports.failures)) == ("failed", True, 1, 1)
    assert step.seconds is not None
    assert 30 <= step.seconds <= 60


def test_a_page_that_looks_like_a_success_is_taken_and_said_once(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    page = Response(200, {"Content-Type": "text/html; charset=utf-8"}, b"<html>")
    sender = bench.sender(then=page)
    for _ in range(3):
        bench.put()
        assert sender.step().kind == "delivered"
    assert caplog.text.count("text/html") == 1


def test_what_a_receiver_quotes_is_not_repeated_with_the_write_key_in_it(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    said = json.dumps({"code": f"bad {WRITE_KEY}", "message": f"write key {WRITE_KEY} is unknown"}).encode()
    reports = Reports()
    sender = bench.sender([Response(404, {}, said), Response(400, {}, said)], reports=reports)
    bench.put()
    sender.step()
    sender.step(hurry=True)
    (letter,) = bench.outbox.dead_letters()
    told = " ".join(
        [caplog.text, *map(str, reports.errors), letter.answer, letter.code, bench.outbox.stats().last_error]
    )
    assert "write key *** is unknown" in told
    assert WRITE_KEY not in told
    assert len(reports.errors) == 2


def test_the_receivers_words_cannot_forge_log_lines_nor_flood_them(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    said = json.dumps({"code": "a\nERROR forged", "message": "\u2028\x1b[31m" + "y" * 60_000}).encode()
    bench.put()
    reports = Reports()
    bench.sender([Response(400, {}, said)], reports=reports).step()
    (error,) = reports.errors
    assert len(str(error)) < 500
    assert str(error).isprintable()
    assert all("\nERROR" not in record.getMessage() for record in caplog.records)
    (letter,) = bench.outbox.dead_letters()
    assert len(letter.answer) == ANSWER_LIMIT


def test_a_step_on_an_empty_outbox_posts_nothing_and_waits_for_an_event(bench: Bench) -> None:
    sender = bench.sender()
    step = sender.step()
    assert (step.kind, step.seconds, step.progress, sender.posts) == ("empty", None, False, [])


def test_batches_go_one_at_a_time_and_side_by_side_with_thread_2(bench: Bench) -> None:
    bench.put(6)
    for threads, kinds in ((1, ["leased"]), (2, ["delivered"])):
        bench.configure(upload_size=3, thread=threads)
        inner: list[str] = []

        def slow(_: Post, inner: list[str] = inner) -> Reply:
            inner.append(bench.sender().step().kind)
            return 503

        bench.clock.advance(60)
        bench.sender(slow).step()
        assert inner == kinds


def test_every_post_bears_the_timeout_and_less_if_there_is_less_time(bench: Bench) -> None:
    bench.configure(timeout=8)
    bench.put(1)
    sender = bench.sender([503, 503, 503, 503])
    for within in (None, 2.5, 100, 0):
        sender.step(hurry=True, within=within)
    assert [post.timeout for post in sender.posts] == [8, 2.5, 8, 0.001]


def test_posts_are_in_the_order_of_the_events_before_and_after_a_failure(bench: Bench) -> None:
    bench.configure(upload_size=2)
    sender = bench.sender([200, 503, 200, throttled(2), 200, 200])
    bench.put(5)
    for _ in range(6):
        step = sender.step()
        bench.put(1)
        bench.clock.advance(step.seconds or 0)
    sender.run()
    firsts = [sent[0] for sent in sender.sent]
    assert all(earlier <= later for earlier, later in pairwise(firsts))
    assert list(dict.fromkeys(each for sent in sender.sent for each in sent)) == list(range(1, 12))


# -- one lease, several batches


def test_one_lease_serves_four_batches_each_acknowledged_by_itself(bench: Bench) -> None:
    bench.configure(upload_size=10)
    bench.put(55)
    sender = bench.sender([200, 200, 503])
    left = []
    for _ in range(2):
        assert sender.step().kind == "delivered"
        left.append((bench.outbox.stats().leased, bench.outbox.pending()))
    assert left == [(30, 45), (20, 35)]
    assert sender.delivery.is_under_way
    assert sender.step().kind == "failed"
    assert bench.outbox.stats().leased == 0, "what was not tried goes back with what failed"
    assert not sender.delivery.is_under_way
    bench.clock.advance(60)
    sender.run()
    assert [len(post) for post in sender.sent] == [10] * 6 + [5]
    assert sender.sent[2] == sender.sent[3] == [*range(21, 31)]


def test_several_senders_share_what_there_is(bench: Bench) -> None:
    bench.configure(upload_size=10, thread=2)
    bench.put(30)
    sender = bench.sender()
    sender.step()
    assert bench.outbox.stats().leased == 0, "with several threads each takes one batch at a time"


def test_a_delivery_that_rests_keeps_nothing_from_others(bench: Bench) -> None:
    bench.configure(upload_size=10)
    bench.put(25)
    sender, other = bench.sender(), bench.sender()
    sender.step()
    assert other.step().kind == "leased"
    sender.delivery.rest()
    assert other.step().kind == "delivered"
    assert sender.sent + other.sent == [[*range(1, 11)], [*range(11, 21)]]


def test_a_delivery_that_rests_remembers_what_the_receiver_took(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.put(3)
    sender = bench.sender()

    def refuse(*_: object) -> None:
        raise StorageError("the outbox can't be used: disk I/O error", "SQLITE_IOERR")

    with monkeypatch.context() as patch:
        patch.setattr(bench.outbox, "ack", refuse)
        with pytest.raises(StorageError):
            sender.step()
        sender.delivery.rest()
    assert sender.run().kind == "empty"
    assert sender.sent == [[1, 2, 3]], "sent once"
