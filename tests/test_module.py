"""The module as a drop-in: light to import, one default client, every public name there and described."""

from __future__ import annotations

import ast
import inspect
import json
import os
import signal
import subprocess
import sys
import threading
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import segment_durable
from segment_durable import client as client_module
from segment_durable.config import DEFAULTS
from segment_durable.errors import InvalidMessage, OutboxUnavailable
from segment_durable.testing import Answer, Receiver

HEAVY = ["jwt", "cryptography", "requests", "sqlite3", "orjson", "tenacity", "platformdirs", "urllib3", "dateutil"]


def fresh(code: str, *arguments: str) -> Any:
    """What `code` prints as JSON in an interpreter of its own, with every warning an error."""
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)


def test_an_import_loads_nothing_heavy_and_starts_nothing() -> None:
    loaded, threads, handlers, sockets = fresh(
        "import sys, json, threading, logging\n"
        "import segment_durable\n"
        "print(json.dumps([sorted(sys.modules), threading.active_count(), len(logging.getLogger('segment').handlers),"
        " 'socket' in sys.modules]))"
    )
    assert "segment_durable" in loaded
    assert [name for name in loaded if name.partition(".")[0] in HEAVY] == []
    assert "segment_durable.client" not in loaded
    assert (threads, handlers, sockets) == (1, 0, False)


def test_the_client_loads_when_it_is_asked_for() -> None:
    before, after = fresh(
        "import sys, json, segment_durable\n"
        "before = 'segment_durable.client' in sys.modules\n"
        "segment_durable.Client\n"
        "print(json.dumps([before, 'segment_durable.client' in sys.modules]))"
    )
    assert (before, after) == (False, True)
    (names,) = fresh(
        "import json\nfrom segment_durable import *\nprint(json.dumps([[Client.__name__, track.__name__, VERSION]]))"
    )
    assert names == ["Client", "track", segment_durable.VERSION]


def public_names() -> set[str]:
    """Every public function, class and import from this package that the module's source defines."""
    tree = ast.parse(inspect.getsource(segment_durable))
    names: set[str] = set()
    for each in ast.walk(tree):
        if isinstance(each, (ast.FunctionDef, ast.ClassDef)):
            names.add(each.name)
        elif isinstance(each, ast.ImportFrom) and (each.module or "").startswith("segment_durable"):
            names.update(alias.asname or alias.name for alias in each.names)
    return {name for name in names if not name.startswith("_")} - {"DEFAULTS"}


def test_all_is_sorted_and_complete() -> None:
    names = segment_durable.__all__
    # As ruff sorts it: constants, classes, the rest.
    assert names == sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert set(names) == public_names()
    assert len(names) == len(set(names))
    for name in names:
        assert getattr(segment_durable, name) is not None
    assert set(names) | DEFAULTS.keys() <= set(dir(segment_durable))


def test_every_public_name_has_a_docstring() -> None:
    assert segment_durable.__doc__
    for name in segment_durable.__all__:
        each = getattr(segment_durable, name)
        if name == "VERSION":
            assert each == segment_durable.__version__
            continue
        assert (inspect.getdoc(each) or "").strip(), name
        assert each.__doc__, name  # its own, not its base's
        if inspect.isclass(each):
            for key, member in vars(each).items():
                if not key.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                    assert member.__doc__, f"{name}.{key}"


def test_calls_return_false_while_the_outbox_cannot_be_opened_and_go_on_when_it_can(
    analytics: ModuleType, receiver: Receiver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A call of the module is on a request's path: what the disk does must not fail the request."""
    (tmp_path / "file").touch()
    errors: list[tuple[Exception, list[Any]]] = []
    analytics.outbox_dir = tmp_path / "file" / "outbox"
    analytics.on_error = lambda error, items: errors.append((error, items))
    accepted, message = analytics.track("u", "e", {"price": Decimal("1.5"), "items": (each for each in "ab")})
    assert (accepted, message["event"]) == (False, "e")
    assert analytics.identify("u")[0] is False
    with pytest.raises(InvalidMessage):
        analytics.track()
    assert analytics.flush(1) is False
    with pytest.raises(OutboxUnavailable):
        analytics.stats()
    assert analytics.shutdown() is False
    ((error, items),) = errors
    assert isinstance(error, OutboxUnavailable)
    assert items == [{**message, "properties": {"price": 1.5, "items": ["a", "b"]}}]
    (told,) = [record for record in caplog.records if "no event is accepted" in record.getMessage()]
    assert "outbox_dir" in told.getMessage()
    (tmp_path / "file").unlink()
    analytics._unopened._until = 0.0
    assert analytics.track("u", "e")[0] is True
    assert analytics.flush(20) is True
    assert [event["event"] for event in receiver.unique] == ["e"]


def test_a_call_does_not_wait_for_ever_for_the_thread_that_makes_the_client(
    analytics: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That may wait for a log handler's lock, which this one has if the handler tracks."""
    is_making, go_on = threading.Event(), threading.Event()
    told: list[tuple[Exception, list[Any]]] = []
    analytics.on_error = lambda problem, items: told.append((problem, items))

    class Slow(client_module.Client):
        def __init__(self, *args: Any, **settings: Any) -> None:
            is_making.set()
            assert go_on.wait(20)
            super().__init__(*args, **settings)

    monkeypatch.setattr(analytics, "Client", Slow)
    monkeypatch.setattr(analytics._MakingLock, "patience", 0.01)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(analytics.track("u", "e")), daemon=True)
    thread.start()
    assert is_making.wait(20)
    assert analytics.track("u", "e") == (False, {})
    assert analytics.flush(1) is False
    go_on.set()
    thread.join(20)
    assert results[0][0]
    ((problem, items),) = told
    assert (type(problem), items) == (analytics.OutboxBusy, [])


def test_settings_that_were_mended_are_read_by_the_next_call(analytics: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    analytics.outbox_dir = tmp_path / "file" / "outbox"
    assert analytics.track("u", "e")[0] is False
    analytics.outbox_dir = tmp_path / "outbox"
    assert analytics.track("u", "e")[0] is True


WITHOUT_DESCRIPTORS = """
import io, json, logging, os, resource, sys
import segment_durable as analytics

before = sys.argv[1]  # the module of which none is left to load it with; "": none from the start
logging.getLogger("segment").addHandler(logging.StreamHandler(log := io.StringIO()))
analytics.write_key, analytics.outbox_dir, analytics.deliver = "key", sys.argv[2], False
called = []
analytics.on_error = lambda problem, items: called.append([str(problem), items])
limits = resource.getrlimit(resource.RLIMIT_NOFILE)

class Watch:
    def find_spec(self, name, *_):
        if name == before:
            resource.setrlimit(resource.RLIMIT_NOFILE, (os.dup(0), limits[1]))

sys.meta_path.insert(0, Watch())
Watch().find_spec("")
first, flushed, told = [analytics.track("u", "e") for _ in range(3)], [analytics.flush(1), analytics.shutdown(1)], ""
try:
    analytics.stats()
except analytics.StorageError as problem:
    told = str(problem)
resource.setrlimit(resource.RLIMIT_NOFILE, limits)
sys.meta_path.pop(0)
print(json.dumps([first, flushed, told, log.getvalue(), called, analytics.track("u", "e")[0]]))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
@pytest.mark.parametrize("before", ["", "segment_durable.encoding", "fcntl", "select", "_sqlite3"])
def test_calls_return_false_while_no_descriptor_is_left_to_load_the_client_with(tmp_path: Path, before: str) -> None:
    """Where it is a library that can't be loaded, Python says so by an `ImportError`."""
    first, flushed, told, logged, called, later = fresh(WITHOUT_DESCRIPTORS, before, str(tmp_path / "outbox"))
    assert (first, flushed, later) == ([[False, {}]] * 3, [False, False], True)
    assert told.startswith("the package can't be loaded: ")
    assert told.endswith("Too many open files")
    ((problem, items),) = called
    assert problem.startswith("the package can't be loaded: ")
    assert items == []
    assert logged == f"no event is accepted or sent (1 calls so far): {problem}\n"


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="Windows has no such signal")
def test_a_time_limit_that_strikes_while_the_client_is_loaded_reaches_the_caller() -> None:
    """It is an `OSError` by its class."""
    told = fresh(
        "import json, signal, sys, segment_durable\n"
        "def strike(number, frame):\n"
        "    raise TimeoutError('the time is up')\n"
        "class Watch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'segment_durable.outbox':\n"
        "            signal.raise_signal(signal.SIGUSR1)\n"
        "signal.signal(signal.SIGUSR1, strike)\n"
        "sys.meta_path.insert(0, Watch())\n"
        "try:\n"
        "    segment_durable.track('u', 'e')\n"
        "except TimeoutError as problem:\n"
        "    print(json.dumps(str(problem)))\n"
    )
    assert told == "the time is up"


def test_a_package_that_is_not_installed_is_nothing_that_passes() -> None:
    told = fresh(
        "import json, sys, segment_durable\n"
        "sys.modules['requests'] = None\n"
        "try:\n"
        "    segment_durable.track('u', 'e')\n"
        "except ModuleNotFoundError as problem:\n"
        "    print(json.dumps(problem.name))\n"
    )
    assert told == "requests"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trakc'"):
        segment_durable.trakc


def test_the_default_client_is_made_once_also_if_eight_threads_ask_at_once(
    analytics: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    inside = threading.Barrier(8)
    second_may_come = threading.Event()

    class Slow(client_module.Client):
        def __init__(self, *args: Any, **settings: Any) -> None:
            made.append(self)
            second_may_come.wait(0.2)  # time for the seven others to come in here, if they could
            super().__init__(*args, **settings)

    monkeypatch.setattr(analytics, "Client", Slow)
    results: list[tuple[bool, Any]] = []

    def track(i: int) -> None:
        inside.wait(10)
        results.append(analytics.track("u", str(i)))

    threads = [threading.Thread(target=track, args=(i,)) for i in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(30)
    assert [accepted for accepted, _ in results] == [True] * 8
    assert made == [analytics.default_client]
    assert analytics.stats().accepted == 8


def test_default_client_none_makes_a_new_one_with_the_settings_of_then(analytics: ModuleType) -> None:
    analytics.track("u", "one")
    first = analytics.default_client
    assert first is not None
    analytics.track("u", "two")
    assert analytics.default_client is first
    first.shutdown(10)
    analytics.default_client = None
    analytics.max_queue_size = 1
    analytics.deliver = False
    assert analytics.track("u", "three")[0] is True
    assert analytics.track("u", "four")[0] is False
    assert analytics.default_client is not first
    assert analytics.stats().accepted == 3


def test_every_setting_of_the_module_reaches_the_client(analytics: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    received: dict[str, Any] = {}

    class Recorder:
        def __init__(self, **settings: Any) -> None:
            received.update(settings)

        def track(self, *_: Any) -> tuple[bool, dict[str, Any]]:
            return True, {}

    monkeypatch.setattr(analytics, "Client", Recorder)
    values = {name: object() for name in DEFAULTS}
    for name, value in values.items():
        monkeypatch.setattr(analytics, name, value)
    analytics.track("u", "e")
    assert received == values
    analytics.default_client = None  # it has no shutdown()


def test_flush_and_shutdown_take_a_timeout_and_tell_whether_all_has_left(analytics: ModuleType) -> None:
    assert analytics.track("u", "e")[0] is True
    assert analytics.flush(timeout=10) is True
    assert analytics.stats().delivered == 1
    analytics.join()
    assert analytics.shutdown(timeout=10) is True


def test_ending_what_was_never_set_up_makes_no_client(analytics: ModuleType) -> None:
    analytics.write_key = None
    analytics.join()
    assert analytics.shutdown() is True
    assert analytics.default_client is None


def test_a_shutdown_as_the_first_call_delivers_what_an_earlier_run_has_left(
    analytics: ModuleType, receiver: Receiver, tmp_path: Path
) -> None:
    with segment_durable.Client(analytics.write_key, outbox_dir=tmp_path / "outbox", deliver=False) as earlier:
        earlier.track("u", "left")
    receiver.script(Answer(401))
    assert analytics.shutdown() is False
    analytics.default_client = None
    assert analytics.shutdown(20) is True
    assert [event["event"] for event in receiver.unique] == ["left"]


@pytest.mark.parametrize("name", ["flush", "stats", "track"])
def test_a_wrong_setting_is_told_at_the_first_call(analytics: ModuleType, name: str) -> None:
    analytics.write_key = None
    with pytest.raises(AssertionError, match="write_key must be a str"):
        getattr(analytics, name)(*(["u", "e"] if name == "track" else []))
    assert analytics.default_client is None
