"""The settings: one home for names and defaults, every one of them checked, no secret in any text."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import logging
import math
import os
import pwd
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import platformdirs
import pytest

import segment_durable
from segment_durable import Client, ConfigError, OutboxUnavailable
from segment_durable.config import DEFAULT_HOST, DEFAULTS, ENVIRONMENT_DIR, Config, default_outbox_dir

KEY = "a-write-key-that-is-secret"
PEM = "-----BEGIN PRIVATE KEY-----secret"
PROXY = "http://user:secret-password@proxy:3128"
OAUTH = {"oauth_client_id": "app", "oauth_client_key": PEM, "oauth_key_id": "kid"}
SECRETS = (KEY, PEM, PROXY, "secret")

# In upstream's order, with its defaults, then our own by keyword.
UPSTREAM: dict[str, Any] = {
    "write_key": None,
    "host": None,
    "debug": False,
    "max_queue_size": 10000,
    "send": True,
    "on_error": None,
    "gzip": False,
    "max_retries": 10,
    "sync_mode": False,
    "timeout": 15,
    "proxies": None,
    "thread": 1,
    "upload_size": 100,
    "upload_interval": 0.5,
    "log_handler": None,
    "oauth_client_id": None,
    "oauth_client_key": None,
    "oauth_key_id": None,
    "oauth_auth_server": "https://oauth2.segment.io",
    "oauth_scope": "tracking_api:write",
    "max_total_backoff_duration": 43200,
    "max_rate_limit_duration": 1800,
}


def config(**settings: Any) -> Config:
    return Config(**({"write_key": KEY} | settings))


def refusal(**settings: Any) -> ConfigError:
    """Why settings are refused; the same for all three bases of the error."""
    with pytest.raises(ConfigError) as caught:
        config(**settings)
    problem = caught.value
    assert isinstance(problem, ValueError)
    assert isinstance(problem, AssertionError)
    assert re.match(rf"{problem.field} (must|is|has) ", str(problem))
    assert len(str(problem)) > len(problem.field) + 15  # there is a remedy, not a shrug
    assert not any(secret in str(problem) for secret in SECRETS)
    return problem


# -- one home


def module_annotations() -> list[str]:
    """The settings that the module declares for type checkers, in order."""
    tree = ast.parse(inspect.getsource(segment_durable))
    (block,) = [each for each in tree.body if isinstance(each, ast.If) and isinstance(each.test, ast.Name)]
    declared = [each for each in block.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)]
    return [each.target.id for each in declared if isinstance(each.target, ast.Name)]


def test_config_client_and_module_have_the_same_settings_in_the_same_order_with_the_same_defaults() -> None:
    fields = {each.name: each.default for each in dataclasses.fields(Config)}
    parameters = list(inspect.signature(Client.__init__).parameters.values())[1:]
    assert list(fields) == list(DEFAULTS) == module_annotations() == [each.name for each in parameters]
    assert fields == DEFAULTS == {each.name: each.default for each in parameters}
    assert {name: getattr(segment_durable, name) for name in fields} == DEFAULTS


def test_the_declared_types_are_the_same_too() -> None:
    def words(annotation: str) -> str:
        return annotation.replace("Message", "dict[str, Any]")

    tree = ast.parse(inspect.getsource(segment_durable))
    (block,) = [each for each in tree.body if isinstance(each, ast.If) and isinstance(each.test, ast.Name)]
    module = {each.target.id: ast.unparse(each.annotation) for each in block.body if isinstance(each, ast.AnnAssign)}  # type: ignore[union-attr]
    client = {each.name: str(each.annotation) for each in inspect.signature(Client.__init__).parameters.values()}
    for each in dataclasses.fields(Config):
        assert words(str(each.type)) == module[each.name] == client[each.name]


def test_upstreams_settings_come_first_in_its_order_and_ours_by_keyword_only() -> None:
    parameters = list(inspect.signature(Client.__init__).parameters.values())[1:]
    positional = [each for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    assert {each.name: each.default for each in positional} == UPSTREAM
    assert [each.name for each in positional] == list(UPSTREAM)
    assert {each.kind for each in parameters[len(UPSTREAM) :]} == {inspect.Parameter.KEYWORD_ONLY}


def test_a_config_is_immutable_and_the_defaults_are_valid() -> None:
    whole = config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        whole.debug = True  # type: ignore[misc]
    changed = {"write_key": KEY, "host": DEFAULT_HOST}
    assert {name: getattr(whole, name) for name in DEFAULTS} == DEFAULTS | changed
    assert whole.uses_oauth is False
    assert whole.lease == 60


# -- every setting is checked


def every(names: list[str], values: list[Any]) -> dict[str, list[Any]]:
    return dict.fromkeys(names, values)


NOT_TEXT = [None, 1, b"text", ["text"], object()]
WRONG: dict[str, list[Any]] = {
    "write_key": [*NOT_TEXT, "", " ", "a:b", "ключ", "a\nb", "\0"],
    "host": [
        *NOT_TEXT[1:],
        0,
        [],
        "ftp://host",
        "https://",
        "https:///path",
        "https://user:secret@host",
        "https://secret@host",
        "https://host?secret",
        "https://host?",
        "https://host#secret",
        "https://host:0",
        "https://host:99999",
        "https://host:port",
        "https://[::1",
        "https://a b",
        "https://a\nb",
        "https://a\0b",
        "https://a\\b",
        " ",
    ],
    **every(["debug", "send", "gzip", "sync_mode", "deliver"], [None, 2, -1, "yes", "", 1.0, []]),
    **every(["max_queue_size", "max_retries", "max_dead_letters"], [None, -1, 1.5, "1", True, 2**62]),
    **every(["thread", "upload_size"], [None, 0, -1, 1.5, "1", True, 2**62]),
    **every(
        ["upload_interval", "max_total_backoff_duration", "max_rate_limit_duration", "shutdown_timeout"],
        [None, -1, -0.001, math.nan, -math.inf, "1", True, [], -(10**400)],
    ),
    **every(["timeout", "lease_seconds"], [None, 0, 0.0, -1, math.nan, "1", True, (1, 2)]),
    "max_age": [0, -1, math.nan, "1", True],
    **every(["on_error", "on_success", "before_send"], [1, "print", [], {}]),
    "proxies": ["secret", 1, [], ["http", "secret"], {None: "secret"}, {1: "secret"}, {"http": b"secret"}],
    "log_handler": [1, "stderr", logging.Handler, logging.getLogger("x")],
    "synchronous": [None, 1, "", "OFF", "EXTRA", b"FULL"],
    "outbox_dir": [1, b"dir", ["dir"], "", " ", "a\0b"],
    "oauth_auth_server": [*NOT_TEXT, "", "ftp://host", "https://user:secret@host"],
    "oauth_scope": [*NOT_TEXT, ""],
}
OAUTH_WRONG: dict[str, list[Any]] = {
    "oauth_client_id": [None, "", 1, b"app", ["app"]],
    "oauth_client_key": [None, "", b"", 1, ["secret"], {"key": "secret"}],
    "oauth_key_id": [None, "", 1, b"kid", ["kid"]],
}


def test_every_setting_has_wrong_values_here() -> None:
    assert {**WRONG, **OAUTH_WRONG}.keys() == DEFAULTS.keys()


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in WRONG for value in WRONG[name]])
def test_a_wrong_setting_is_refused_by_its_name_with_a_remedy(name: str, value: Any) -> None:
    assert refusal(**{name: value}).field == name


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in OAUTH_WRONG for value in OAUTH_WRONG[name]])
def test_oauth_needs_all_of_its_parts_or_none(name: str, value: Any) -> None:
    assert refusal(**(OAUTH | {name: value})).field == name


def test_oauth_is_off_if_all_of_its_parts_are_empty() -> None:
    for empty in (None, "", b""):
        off = config(**dict.fromkeys(OAUTH, empty))
        assert (off.uses_oauth, off.oauth_client_id, off.oauth_client_key) == (False, None, None)
    assert config(**OAUTH).uses_oauth
    assert config(**(OAUTH | {"oauth_client_key": PEM.encode()})).uses_oauth
    assert config(**(OAUTH | {"oauth_client_key": Path("key.pem")})).uses_oauth


class OddPath:
    def __fspath__(self) -> bytes:
        return b"dir"


def test_a_path_of_bytes_is_refused() -> None:
    assert refusal(outbox_dir=OddPath()).field == "outbox_dir"


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        *[(name, value, bool(value)) for name in ("debug", "send", "gzip") for value in (0, 1, True, False)],
        ("max_queue_size", 0, 0),
        ("max_retries", 0, 0),
        ("thread", 64, 64),
        ("upload_size", 2500, 2500),
        ("upload_size", 2**61, 2500),  # more is never sent at once
        ("upload_interval", 0, 0),
        ("shutdown_timeout", 0.0, 0.0),
        ("timeout", 0.001, 0.001),
        ("timeout", 15, 15),
        ("max_age", None, None),
        ("max_age", 3600, 3600),
        ("synchronous", "full", "FULL"),
        ("synchronous", "Normal", "NORMAL"),
        ("proxies", {}, {}),
        ("proxies", {"https": PROXY}, {"https": PROXY}),
        ("proxies", {"https": None}, {"https": None}),
        ("max_total_backoff_duration", math.inf, 1e9),  # upstream takes it
        ("max_rate_limit_duration", 10**400, 1e9),
        ("timeout", math.inf, 1e9),
    ],
)
def test_a_sound_setting_is_kept(name: str, value: Any, kept: Any) -> None:
    assert getattr(config(**{name: value}), name) == kept
    assert type(getattr(config(**{name: value}), name)) is type(kept)


def test_a_client_that_sends_nothing_needs_no_write_key() -> None:
    """As it is where the variable is not set that has the key in production."""
    assert Config(write_key="", send=False).write_key == ""
    with pytest.raises(ConfigError, match="write_key must be a str, not NoneType"):
        Config(write_key=None, send=False)


def test_the_words_for_a_wrong_duration_are_upstreams() -> None:
    for name in ("max_total_backoff_duration", "max_rate_limit_duration"):
        with pytest.raises(ValueError, match=f"{name} must be a non-negative number"):
            config(**{name: -1})


@pytest.mark.parametrize(
    ("host", "url"),
    [
        (None, DEFAULT_HOST),
        ("", DEFAULT_HOST),
        ("https://api.segment.io", "https://api.segment.io"),
        ("https://api.segment.io/", "https://api.segment.io"),
        ("https://api.segment.io//", "https://api.segment.io"),
        ("api.segment.io", "https://api.segment.io"),
        ("events.eu1.segmentapis.com/", "https://events.eu1.segmentapis.com"),
        (" https://host ", "https://host"),
        ("http://localhost:8000", "http://localhost:8000"),
        ("localhost:8000", "https://localhost:8000"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("https://host/a/path/", "https://host/a/path"),
        ("HTTPS://Host", "HTTPS://Host"),
        ("https://bücher.example", "https://bücher.example"),
    ],
)
def test_a_host_may_be_written_in_these_forms(host: str | None, url: str) -> None:
    assert config(host=host).host == url


def test_a_lease_outlasts_a_slow_upload() -> None:
    assert config(timeout=100).lease == 400
    assert config(timeout=1, lease_seconds=5).lease == 5


# -- secrets


def test_a_repr_hides_what_is_secret() -> None:
    whole = config(**OAUTH, proxies={"https": PROXY})
    for text in (repr(whole), str(whole), f"{whole}", repr([whole])):
        assert not any(secret in text for secret in SECRETS)
        assert "oauth_client_id='app'" in text


@pytest.mark.parametrize(
    "settings",
    [
        {"write_key": KEY + ":"},
        {"write_key": KEY + "\n"},
        {"write_key": KEY.encode()},
        {"proxies": {"http": PROXY.encode()}},
        {"proxies": PROXY},
        {"oauth_client_key": PEM},
        OAUTH | {"oauth_client_key": [PEM]},
        OAUTH | {"oauth_key_id": None},
        {"host": PROXY},
        {"host": f"https://host?key={KEY}"},
        {"oauth_auth_server": PROXY},
    ],
)
def test_no_error_quotes_a_secret_and_no_traceback_does(settings: dict[str, Any]) -> None:
    problem = refusal(**settings)
    assert problem.__cause__ is None


# -- where the outbox is


def test_the_default_folder_is_below_the_users_state_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if sys.platform == "linux":
        assert default_outbox_dir(KEY).parent == tmp_path / "home/.local/state/segment-durable"
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        assert default_outbox_dir(KEY).parent == tmp_path / "state/segment-durable"
    monkeypatch.setenv(ENVIRONMENT_DIR, str(tmp_path / "ours"))
    assert default_outbox_dir(KEY).parent == tmp_path / "ours"
    assert config().outbox_path == default_outbox_dir(KEY)
    monkeypatch.setenv(ENVIRONMENT_DIR, "~/ours")
    assert default_outbox_dir(KEY).parent == tmp_path / "home/ours"
    monkeypatch.setenv(ENVIRONMENT_DIR, "here")
    assert default_outbox_dir(KEY).parent == Path.cwd() / "here"
    monkeypatch.setenv(ENVIRONMENT_DIR, "")
    assert default_outbox_dir(KEY).parent != Path.cwd()


def test_each_source_has_a_folder_of_its_own_whose_name_does_not_tell_the_key() -> None:
    folders = {default_outbox_dir(key).name for key in (KEY, KEY + "2", KEY.upper())}
    assert len(folders) == 3
    assert all(re.fullmatch("[0-9a-f]{16}", name) for name in folders)
    assert default_outbox_dir(KEY) == default_outbox_dir(KEY)


def test_no_folder_is_made_by_asking_for_it(tmp_path: Path) -> None:
    config().outbox_path
    assert not (tmp_path / "home").exists()


def test_outbox_dir_may_be_relative_or_below_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert config(outbox_dir="~/box").outbox_path == tmp_path / "home/box"
    assert config(outbox_dir=Path("~/box")).outbox_path == tmp_path / "home/box"
    assert config(outbox_dir="./~box").outbox_path == Path.cwd() / "~box"
    monkeypatch.chdir(tmp_path)
    path = config(outbox_dir="a/../box").outbox_path
    assert path == Path(os.path.abspath("box"))
    assert path.is_absolute()


@pytest.mark.parametrize("settings", [{}, {"outbox_dir": "~/box"}, {"outbox_dir": "~"}])
def test_without_any_home_the_error_names_the_remedy(
    settings: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(_: int) -> Any:
        raise KeyError("uid not found")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(OutboxUnavailable, match=f"set outbox_dir, or {ENVIRONMENT_DIR}"):
        config(**settings).outbox_path
    assert config(outbox_dir="/var/spool/box").outbox_path == Path("/var/spool/box")


def test_a_relative_answer_about_the_state_folder_is_no_place_to_keep_events(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer in ("~/.local/state/segment-durable", "state/segment-durable"):
        monkeypatch.setattr(platformdirs, "user_state_dir", lambda *_, answer=answer, **__: answer)
        with pytest.raises(OutboxUnavailable, match="set outbox_dir"):
            default_outbox_dir(KEY)


def test_an_unknown_users_home_is_not_a_folder_called_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutboxUnavailable, match="no such home"):
        config(outbox_dir="~no-such-user-here/box").outbox_path
    monkeypatch.setenv(ENVIRONMENT_DIR, "~no-such-user-here")
    with pytest.raises(OutboxUnavailable, match="no such home"):
        default_outbox_dir(KEY)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be somebody else")
def test_a_process_of_a_user_without_entry_and_home_gets_that_error() -> None:
    code = (
        "from segment_durable import config, errors\n"
        "import platformdirs.unix\n"  # the interpreter's own files may be out of reach afterwards
        "import os; os.setuid(54321)\n"
        "try: config.default_outbox_dir('k')\n"
        "except errors.OutboxUnavailable as problem: print(problem)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env={}, capture_output=True, text=True, timeout=60)
    assert ENVIRONMENT_DIR in done.stdout, done.stderr


def test_a_client_raises_what_config_raises(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        Client(None)
    with pytest.raises(AssertionError):
        Client(7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="thread"):
        Client(KEY, thread=0, outbox_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
