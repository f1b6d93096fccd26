"""Every code example of Segment's user guide for Python, with the import line changed, and what arrives of it."""

from __future__ import annotations

import datetime
import json
import logging
import logging.config
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import dateutil.parser
import pytest
import pytz
from dateutil.tz import tzlocal, tzutc

from segment_durable import VERSION
from segment_durable.testing import OAuthApp, Receiver

UUID4 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
ISO_MILLISECONDS = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d")
LIBRARY = {"name": "segment-durable", "version": VERSION}


@pytest.fixture
def arrived(receiver: Receiver, analytics: ModuleType) -> Callable[..., list[dict[str, Any]]]:
    """Flush; the events that arrived, without those fields that each has and that are checked here."""

    def check() -> list[dict[str, Any]]:
        started = datetime.datetime.now(datetime.timezone.utc)
        assert analytics.flush(10) is True
        events = []
        for event in receiver.events:
            event = dict(event)
            assert UUID4.fullmatch(event.pop("messageId"))
            assert ISO_MILLISECONDS.fullmatch(event["timestamp"])
            if abs(datetime.datetime.fromisoformat(event["timestamp"]) - started) < datetime.timedelta(seconds=30):
                event["timestamp"] = "now"
            assert event["context"].pop("library") == LIBRARY
            events.append(event)
        assert receiver.duplicates == 0
        return events

    return check


def full(kind: str, user: str | None, **fields: Any) -> dict[str, Any]:
    """An event as it has to arrive, field by field."""
    event = {"type": kind, "userId": user, "timestamp": "now", "context": {}, "integrations": {}}
    if kind != "alias":
        event["anonymousId"] = None
    return {**event, **fields}


def test_identify(analytics: ModuleType, arrived: Callable[..., list[dict[str, Any]]]) -> None:
    ok, msg = analytics.identify('019mr8mf4r', {
        'email': 'john@example.com',
        'name': 'John Smith',
        'friends': 30
    })  # fmt: skip
    assert ok is True
    assert msg["userId"] == "019mr8mf4r"
    traits = {"email": "john@example.com", "name": "John Smith", "friends": 30}
    assert arrived() == [full("identify", "019mr8mf4r", traits=traits)]


def test_track(analytics: ModuleType, arrived: Callable[..., list[dict[str, Any]]]) -> None:
    analytics.track('f4ca124298', 'Signed Up', {
      'plan': 'Enterprise'
    })  # fmt: skip
    analytics.track('f4ca124298', 'Article Bookmarked', {
        'title': 'Snow Fall',
        'subtitle': 'The Avalance at Tunnel Creek',
        'author': 'John Branch'
    })  # fmt: skip
    article = {"title": "Snow Fall", "subtitle": "The Avalance at Tunnel Creek", "author": "John Branch"}
    assert arrived() == [
        full("track", "f4ca124298", event="Signed Up", properties={"plan": "Enterprise"}),
        full("track", "f4ca124298", event="Article Bookmarked", properties=article),
    ]


def test_page_and_screen(analytics: ModuleType, arrived: Callable[..., list[dict[str, Any]]]) -> None:
    analytics.page('user_id', 'Docs', 'Python', {
      'url': 'http://segment.com'
    })  # fmt: skip
    analytics.screen('user_id', 'Settings', 'Brightness', {
      'from': 'Home Screen'
    })  # fmt: skip
    assert arrived() == [
        full("page", "user_id", category="Docs", name="Python", properties={"url": "http://segment.com"}),
        full("screen", "user_id", category="Settings", name="Brightness", properties={"from": "Home Screen"}),
    ]


def test_group(analytics: ModuleType, arrived: Callable[..., list[dict[str, Any]]]) -> None:
    analytics.group('user_id', 'group_id', {
      'name': 'Initech',
      'domain': 'Accounting Software'
    })  # fmt: skip
    traits = {"name": "Initech", "domain": "Accounting Software"}
    assert arrived() == [full("group", "user_id", groupId="group_id", traits=traits)]


def test_alias_by_names(analytics: ModuleType, arrived: Callable[..., list[dict[str, Any]]]) -> None:
    previous_id, user_id = "old", "new"
    analytics.alias(previous_id, user_id)
    assert arrived() == [full("alias", "new", previousId="old")]


def test_alias_in_full(analytics: ModuleType, arrived: Callable[..., list[dict[str, Any]]]) -> None:
    plan = "plan"
    # the anonymous user does actions under an anonymous ID
    analytics.track('92734232-2342423423-973945', 'Anonymous Event')  # fmt: skip
    # the anonymous user signs up and is aliased to their new user ID
    analytics.alias('92734232-2342423423-973945', '1234')  # fmt: skip
    # the user is identified
    analytics.identify('1234', { plan: 'Free' })  # fmt: skip
    # the identified user does actions
    analytics.track('1234', 'Identified Action')  # fmt: skip
    assert arrived() == [
        full("track", "92734232-2342423423-973945", event="Anonymous Event", properties={}),
        full("alias", "1234", previousId="92734232-2342423423-973945"),
        full("identify", "1234", traits={"plan": "Free"}),
        full("track", "1234", event="Identified Action", properties={}),
    ]


def test_historical_import(analytics: ModuleType, arrived: Callable[..., list[dict[str, Any]]]) -> None:
    timestamp = datetime.datetime(2538, 10, 17, 0, 0, 0, 0, tzinfo=tzutc())
    analytics.track('019mr8mf4r', 'Bought a game', {
        'game': 'Duke Nukem forever'
    }, timestamp=timestamp)  # fmt: skip
    (event,) = arrived()
    assert event["timestamp"] == "2538-10-17T00:00:00.000+00:00"
    assert event["properties"] == {"game": "Duke Nukem forever"}


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("2012-10-17T18:58:57.911Z", "2012-10-17T18:58:57.911+00:00"),
        ("2016-06-06T01:46:33.939388+00:00", "2016-06-06T01:46:33.939+00:00"),
        ("2016-06-06T01:46:33.939388+07:00", "2016-06-06T01:46:33.939+07:00"),
        ("2016-06-06T01:46:33.939388-07:00", "2016-06-06T01:46:33.939-07:00"),
    ],
)
def test_timestamps_that_dateutil_parsed(
    analytics: ModuleType, arrived: Callable[..., list[dict[str, Any]]], text: str, sent: str
) -> None:
    analytics.track("u", "e", timestamp=dateutil.parser.parse(text))
    assert arrived()[0]["timestamp"] == sent


def test_time_zones(analytics: ModuleType, arrived: Callable[..., list[dict[str, Any]]]) -> None:
    naive = datetime.datetime(2015, 1, 5, 0, 0, 0, 0)
    aware = datetime.datetime(2015, 1, 5, 0, 0, 0, 0, tzinfo=tzutc())
    assert naive.isoformat() == "2015-01-05T00:00:00"
    assert aware.isoformat() == "2015-01-05T00:00:00+00:00"
    localized = pytz.timezone("US/Pacific").localize(datetime.datetime(2016, 6, 5, 21, 52, 14, 499635))
    for each in (naive, aware, localized):
        analytics.track("u", "e", timestamp=each)
    assert [event["timestamp"] for event in arrived()] == [
        "2015-01-05T00:00:00.000+00:00",
        "2015-01-05T00:00:00.000+00:00",
        "2016-06-05T21:52:14.499-07:00",
    ]


def test_server_logs(receiver: Receiver, analytics: ModuleType) -> None:
    log = [
        '2012-10-17T18:58:57.911Z 019mr8mf4r /purchased/tshirt'
    ]  # fmt: skip
    for entry in log:
        timestamp_str, user_id, _url = entry.split(' ')  # fmt: skip
        timestamp = dateutil.parser.parse(timestamp_str)  # resulting datetime.datetime object is aware

        # have a timezone? check yo'self
        assert timestamp.tzinfo is not None and timestamp.tzinfo.utcoffset(timestamp) is not None  # noqa: PT018

        analytics.track(user_id, 'Shirt Bought', {
            'color': 'Blue',
            'revenue': 17.90
        }, timestamp=timestamp)  # fmt: skip

    analytics.flush()
    (event,) = receiver.events
    assert event["userId"] == "019mr8mf4r"
    assert event["event"] == "Shirt Bought"
    assert event["timestamp"] == "2012-10-17T18:58:57.911+00:00"
    assert event["properties"] == {"color": "Blue", "revenue": 17.9}


def test_selecting_destinations(analytics: ModuleType, arrived: Callable[..., list[dict[str, Any]]]) -> None:
    analytics.track('9742', 'Song Played', integrations={
      'all': False,
      'Kissmetrics': True,
      'Google Analytics': False
    })  # fmt: skip
    chosen = {"all": False, "Kissmetrics": True, "Google Analytics": False}
    assert arrived() == [full("track", "9742", event="Song Played", properties={}, integrations=chosen)]


def test_overridden_context(analytics: ModuleType, arrived: Callable[..., list[dict[str, Any]]]) -> None:
    agent = "Mozilla/5.0 (Linux; U; Android 4.1.1; en-gb; Build/KLP) AppleWebKit/534.30 (KHTML, like Gecko)"
    analytics.track('9742', 'Song Played', context={
      'ip': 1234,
      'userAgent': agent
    })  # fmt: skip
    assert arrived()[0]["context"] == {"ip": 1234, "userAgent": agent}


def test_send_false_sends_nothing(receiver: Receiver, analytics: ModuleType, tmp_path: Path) -> None:
    analytics.send = False
    ok, msg = analytics.track("u", "e")
    assert ok is True
    assert msg["event"] == "e"
    assert analytics.flush() is True
    assert receiver.requests == ()
    assert not (tmp_path / "outbox").exists()


def test_debug_and_on_error(receiver: Receiver, analytics: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[tuple[Exception, list[dict[str, Any]]]] = []

    def on_error(error: Exception, items: list[dict[str, Any]]) -> None:
        seen.append((error, items))

    receiver.stop()
    analytics.debug = True
    analytics.on_error = on_error
    analytics.max_retries = 0
    analytics.track("u", "Not Delivered")
    assert analytics.flush(10) is False
    ((error, items),) = seen
    assert "Connection refused" in str(error)
    assert [item["event"] for item in items] == ["Not Delivered"]
    assert any(record.levelno == logging.DEBUG for record in caplog.records)
    assert analytics.write_key not in caplog.text
    receiver.start()
    assert analytics.flush(10) is True
    assert [event["event"] for event in receiver.events] == ["Not Delivered"]


def test_log_level_by_the_logger_segment(analytics: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger('segment').setLevel('DEBUG')  # fmt: skip
    analytics.track("u", "e")
    records = [record for record in caplog.records if record.levelno == logging.DEBUG]
    assert records
    assert all(record.name.startswith("segment.") for record in records)


def test_a_client_with_gzip(receiver: Receiver, make_client: Callable[..., Any]) -> None:
    client = make_client('YOUR_WRITE_KEY', gzip=True)  # fmt: skip
    client.track("u", "e", {"text": "x" * 1000})
    assert client.flush(10) is True
    assert receiver.batches[0].headers["content-encoding"] == "gzip"
    assert receiver.events[0]["properties"] == {"text": "x" * 1000}


def test_a_client_with_options(receiver: Receiver, make_client: Callable[..., Any]) -> None:
    def on_error(error: Exception, items: list[dict[str, Any]]) -> None:
        raise AssertionError(error)

    client = make_client('YOUR_WRITE_KEY', debug=True, on_error=on_error, send=True,
           max_queue_size=100000, upload_interval=5, upload_size=500, gzip=True)  # fmt: skip
    for i in range(1001):
        assert client.track("u", "e", {"i": i})[0]
    assert client.flush(10) is True
    assert [event["properties"]["i"] for event in receiver.events] == list(range(1001))
    assert {len(batch.events) for batch in receiver.batches} <= {1, 500, *range(1, 501)}


def test_sync_mode(receiver: Receiver, analytics: ModuleType) -> None:
    analytics.sync_mode = True
    assert analytics.track("u", "In This Thread")[0] is True
    assert [event["event"] for event in receiver.events] == ["In This Thread"]


def test_version(analytics: ModuleType) -> None:
    code = "import segment_durable as analytics; print(analytics.VERSION)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == VERSION == analytics.__version__


def test_oauth(tmp_path: Path) -> None:
    app, key = OAuthApp.generate()
    (tmp_path / "private_key.pem").write_text(key)
    with Receiver(oauth=app) as receiver:
        code = f"""
import segment_durable as analytics
with open({str(tmp_path / "private_key.pem")!r}) as f:
    privatekey = f.read()

analytics.write_key = '<YOUR WRITE KEY HERE>'
analytics.host = analytics.oauth_auth_server = {receiver.url!r}
analytics.outbox_dir = {str(tmp_path / "outbox")!r}

analytics.oauth_client_id = {app.client_id!r} # OAuth application ID from segment dashboard
analytics.oauth_client_key = privatekey # generated as a public/private key pair in PEM format from OpenSSL
analytics.oauth_key_id = {app.key_id!r} # From segment dashboard after uploading public key

def on_error(error, items):
    print("An error occurred: ", error)
analytics.on_error = on_error

analytics.track('AUser', 'track')
analytics.flush()
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout + done.stderr == ""
        assert [event["userId"] for event in receiver.events] == ["AUser"]
        assert receiver.batches[0].headers["authorization"].startswith("Bearer ")


DJANGO_SETTINGS = """
INSTALLED_APPS = ["myapp.apps.MyAppConfig"]
USE_TZ = True
LOGGING = {
    'version': 1,
    'formatters': {
        'simple': {
            'format': '%(levelname)s %(message)s'
        }
    },
    'handlers': {
        'console': {
                'level': 'DEBUG',
                'class': 'logging.StreamHandler',
                'formatter': 'simple'
        }
    },
    'loggers': {
        'segment': {
            'handlers': ['console'],
            'level': 'DEBUG',
            'propagate': True,
        }
    }
}
"""

DJANGO_APP = """
from django.apps import AppConfig
import segment_durable as analytics

class MyAppConfig(AppConfig):
    name = 'myapp'

    def ready(self):
        analytics.write_key = 'YOUR_WRITE_KEY'
"""


def test_django(receiver: Receiver, tmp_path: Path) -> None:
    (tmp_path / "myapp").mkdir()
    (tmp_path / "myapp" / "__init__.py").write_text("")
    (tmp_path / "myapp" / "apps.py").write_text(DJANGO_APP)
    (tmp_path / "settings.py").write_text(DJANGO_SETTINGS)
    code = f"""
import django
django.setup()
import segment_durable as analytics
analytics.debug = True # turn on debug logging
analytics.host = {receiver.url!r}
analytics.outbox_dir = "outbox"
from django.utils.safestring import mark_safe
from django.utils.translation import gettext_lazy
assert analytics.track('u', mark_safe('From Django'), {{'safe': mark_safe('<b>')}})[0]
assert analytics.flush()
"""
    environment = {"PYTHONPATH": str(tmp_path), "DJANGO_SETTINGS_MODULE": "settings", "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "DEBUG enqueued track" in done.stderr
    assert "YOUR_WRITE_KEY" not in done.stderr
    assert [(event["event"], event["properties"]) for event in receiver.events] == [("From Django", {"safe": "<b>"})]


def test_positional_and_keyword_forms_are_the_same(
    analytics: ModuleType, arrived: Callable[..., list[dict[str, Any]]]
) -> None:
    when = datetime.datetime(2020, 2, 3, 4, 5, 6, 789000, tzinfo=tzutc())
    common = {"context": {"ip": "1.2.3.4"}, "timestamp": when, "integrations": {"All": True}}
    rest = ({"ip": "1.2.3.4"}, when)
    data = {"a": 1}
    anonymous, chosen = "anon", {"All": True}
    analytics.identify("u", data, *rest, anonymous, chosen)
    analytics.identify(user_id="u", traits=data, anonymous_id=anonymous, **common)
    analytics.track("u", "e", data, *rest, anonymous, chosen)
    analytics.track(user_id="u", event="e", properties=data, anonymous_id=anonymous, **common)
    analytics.page("u", "c", "n", data, *rest, anonymous, chosen)
    analytics.page(user_id="u", category="c", name="n", properties=data, anonymous_id=anonymous, **common)
    analytics.screen("u", "c", "n", data, *rest, anonymous, chosen)
    analytics.screen(user_id="u", category="c", name="n", properties=data, anonymous_id=anonymous, **common)
    analytics.group("u", "g", data, *rest, anonymous, chosen)
    analytics.group(user_id="u", group_id="g", traits=data, anonymous_id=anonymous, **common)
    analytics.alias("p", "u", *rest, chosen)
    analytics.alias(previous_id="p", user_id="u", **common)
    events = arrived()
    assert len(events) == 12
    for positional, keyword in zip(events[::2], events[1::2]):
        assert positional == keyword
        assert positional["timestamp"] == "2020-02-03T04:05:06.789+00:00"
        assert positional["context"] == {"ip": "1.2.3.4"}
        assert positional["integrations"] == {"All": True}
        assert positional["userId"] == "u"
        assert positional.get("anonymousId") == (None if positional["type"] == "alias" else "anon")


def test_a_message_id_of_the_users_own_is_kept(receiver: Receiver, analytics: ModuleType) -> None:
    analytics.track("u", "e", message_id="order-17")
    analytics.flush(10)
    assert receiver.events[0]["messageId"] == "order-17"


def test_the_local_zone_of_now(analytics: ModuleType, arrived: Callable[..., list[dict[str, Any]]]) -> None:
    analytics.track("u", "e", timestamp=datetime.datetime.now(tzlocal()))
    assert arrived()[0]["timestamp"] == "now"


def test_what_is_sent_is_the_bytes_of_the_outbox(receiver: Receiver, analytics: ModuleType) -> None:
    _, msg = analytics.track("u", "e", {"text": "Grüße 漢字 \u2028"})
    analytics.flush(10)
    body = receiver.batches[0].body
    assert json.dumps(msg, separators=(",", ":"), ensure_ascii=False).encode() in body
    assert json.loads(body)["writeKey"] == "YOUR_WRITE_KEY"
