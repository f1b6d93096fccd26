"""The settings: their names, defaults and validation have this one home."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any
from urllib.parse import urlsplit

from segment_durable.errors import ConfigError, OutboxUnavailable

__all__ = ["DEFAULTS", "DEFAULT_HOST", "FOREVER", "MAX_BATCH_EVENTS", "Config", "Settings", "default_outbox_dir"]

DEFAULT_HOST = "https://api.segment.io"
FOREVER = 1e9  # seconds, 31 years: what infinity and other absurd times are cut to; the system's clocks take no more
MAX_BATCH_EVENTS = 2_500  # over that Segment answers 200 and rejects
ENVIRONMENT_DIR = "SEGMENT_DURABLE_DIR"

Message = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Every setting of a client.  `docs/settings.md` says what each one does, with its unit."""

    write_key: str | None = field(default=None, repr=False)
    host: str | None = None
    debug: bool = False
    max_queue_size: int = 10_000
    send: bool = True
    on_error: Callable[[Exception, list[Message]], object] | None = None
    gzip: bool = False
    max_retries: int = 10
    sync_mode: bool = False
    timeout: float = 15
    proxies: Mapping[str, str | None] | None = field(default=None, repr=False)
    thread: int = 1
    upload_size: int = 100
    upload_interval: float = 0.5
    log_handler: logging.Handler | None = None
    oauth_client_id: str | None = None
    oauth_client_key: str | bytes | os.PathLike[str] | None = field(default=None, repr=False)
    oauth_key_id: str | None = None
    oauth_auth_server: str = "https://oauth2.segment.io"
    oauth_scope: str = "tracking_api:write"
    max_total_backoff_duration: float = 43_200
    max_rate_limit_duration: float = 1_800
    outbox_dir: str | os.PathLike[str] | None = None
    deliver: bool = True
    synchronous: str = "NORMAL"
    lease_seconds: float = 60
    shutdown_timeout: float = 5.0
    max_age: float | None = None
    max_dead_letters: int = 10_000
    on_success: Callable[[list[Message]], object] | None = None
    before_send: Callable[[Message], Message | None] | None = None


@dataclass(frozen=True)
class Config(Settings):
    """The settings, checked."""

    def __post_init__(self) -> None:
        self._check_write_key()
        object.__setattr__(
            self, "host", _url("host", DEFAULT_HOST if self.host is None or self.host == "" else self.host)
        )
        object.__setattr__(self, "oauth_auth_server", _url("oauth_auth_server", self.oauth_auth_server))
        for name in ("debug", "send", "gzip", "sync_mode", "deliver"):
            object.__setattr__(self, name, _flag(name, getattr(self, name)))
        for name, least in (("max_queue_size", 0), ("max_retries", 0), ("thread", 1), ("upload_size", 1)):
            _whole(name, getattr(self, name), least)
        _whole("max_dead_letters", self.max_dead_letters, 0)
        object.__setattr__(self, "upload_size", min(self.upload_size, MAX_BATCH_EVENTS))
        for name in ("upload_interval", "max_total_backoff_duration", "max_rate_limit_duration", "shutdown_timeout"):
            object.__setattr__(self, name, _seconds(name, getattr(self, name), zero=True))
        for name in ("timeout", "lease_seconds", *(["max_age"] if self.max_age is not None else [])):
            object.__setattr__(self, name, _seconds(name, getattr(self, name), zero=False))
        for name in ("on_error", "on_success", "before_send"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise ConfigError(name, f"must be callable or None, not {_kind(getattr(self, name))}")
        self._check_synchronous()
        self._check_proxies()
        self._check_oauth()
        if self.log_handler is not None and not isinstance(self.log_handler, logging.Handler):
            raise ConfigError("log_handler", f"must be a logging.Handler or None, not {_kind(self.log_handler)}")
        if self.outbox_dir is not None:
            _check_path("outbox_dir", self.outbox_dir)

    @property
    def uses_oauth(self) -> bool:
        return self.oauth_client_id is not None

    @property
    def lease(self) -> float:
        """Seconds that one lease lasts, at first: long enough for a slow upload, and for most that need a token."""
        return max(float(self.lease_seconds), 4.0 * self.timeout)

    @cached_property  # or a client would go on in another folder after a chdir() or a change of the environment
    def outbox_path(self) -> Path:
        """The folder of this source's outbox, absolute: as it was when it was first asked for.

        Raises `OutboxUnavailable` if the user has no home, or a relative path no current folder.
        """
        assert self.write_key is not None
        if self.outbox_dir is not None:
            return _absolute(os.fspath(self.outbox_dir))
        return default_outbox_dir(self.write_key)

    @cached_property  # a child of a fork may have no right to read the file any more
    def oauth_pem(self) -> bytes:
        """The private key as it was when it was first asked for.  Raises `ConfigError` if its file can't be read."""
        source = self.oauth_client_key
        if isinstance(source, str) and "-----BEGIN" in source:
            return source.replace("\\n", "\n").encode()  # as it comes out of many an environment variable
        if isinstance(source, bytes):
            return source
        try:
            return Path(source or "").expanduser().read_bytes()
        except (OSError, ValueError, RuntimeError):  # RuntimeError: "~name" of nobody
            raise ConfigError(
                "oauth_client_key",
                "must be a private key in PEM form, or the path of a file that is there and holds one",
            ) from None

    def _check_write_key(self) -> None:
        key = self.write_key
        if not isinstance(key, str):
            raise ConfigError("write_key", f"must be a str, not {_kind(key)}: set it to your source's write key")
        if not self.send:
            return  # nobody sees it: on a developer's machine it may be empty
        if not key.strip() or not key.isascii() or not key.isprintable() or ":" in key:
            raise ConfigError(
                "write_key", "must be your source's write key: plain ASCII, not empty, without a colon or a line break"
            )

    def _check_synchronous(self) -> None:
        value = self.synchronous
        if not isinstance(value, str) or value.upper() not in ("NORMAL", "FULL"):
            what = "" if isinstance(value, str) else f", not {_kind(value)}"
            raise ConfigError("synchronous", f'must be "NORMAL" or "FULL"{what}')
        object.__setattr__(self, "synchronous", value.upper())

    def _check_proxies(self) -> None:
        if self.proxies is None:
            return
        if not isinstance(self.proxies, Mapping) or not all(
            isinstance(scheme, str) and isinstance(url, (str, NoneType)) for scheme, url in self.proxies.items()
        ):
            raise ConfigError("proxies", 'must map schemes to URLs or None, such as {"https": "http://proxy:3128"}')

    def _check_oauth(self) -> None:
        if not isinstance(self.oauth_scope, str) or not self.oauth_scope:
            raise ConfigError(
                "oauth_scope", f'must be a str such as "tracking_api:write", not {_kind(self.oauth_scope)}'
            )
        parts = {name: getattr(self, name) for name in ("oauth_client_id", "oauth_client_key", "oauth_key_id")}
        missing = [
            name for name, value in parts.items() if value is None or (isinstance(value, (str, bytes)) and not value)
        ]
        if missing and len(missing) < len(parts):
            raise ConfigError(missing[0], f"is missing: OAuth needs {', '.join(parts)}, all or none of them")
        if missing:
            for name in parts:
                object.__setattr__(self, name, None)
            return
        for name in ("oauth_client_id", "oauth_key_id"):
            if not isinstance(parts[name], str):
                raise ConfigError(name, f"must be a str, not {_kind(parts[name])}")
        if not isinstance(parts["oauth_client_key"], (str, bytes, os.PathLike)):
            what = _kind(parts["oauth_client_key"])
            raise ConfigError(
                "oauth_client_key", f"must be the private key as PEM text or bytes, or a path, not {what}"
            )


DEFAULTS: dict[str, Any] = {each.name: each.default for each in fields(Config)}


def default_outbox_dir(write_key: str) -> Path:
    """Where a source's outbox is if `outbox_dir` is not set.

    `$SEGMENT_DURABLE_DIR/<source>` if that is set, else `<user state folder>/segment-durable/<source>`; `<source>` is
    made from a digest of the write key, which can't be turned back into it.
    """
    import platformdirs

    source = hashlib.sha256(b"segment-durable source\0" + write_key.encode()).hexdigest()[:16]
    base = os.environ.get(ENVIRONMENT_DIR)
    if not base:
        try:
            base = platformdirs.user_state_dir("segment-durable", appauthor=False)
        except RuntimeError:  # newer versions raise; older ones return a path that begins with "~"
            base = "~"
        if not os.path.isabs(base):
            raise _homeless(base)
    return _absolute(base) / source


def _absolute(path: str) -> Path:
    try:
        path.encode()
    except UnicodeEncodeError:
        name = path.encode(errors="backslashreplace").decode()
        raise OutboxUnavailable(
            name, "is not UTF-8, in which SQLite wants its names: set outbox_dir to one that is"
        ) from None
    whole = os.path.expanduser(path)
    if whole.startswith("~"):  # not expanded: no HOME and no entry in the user database, or no such user
        raise _homeless(path)
    try:
        return Path(os.path.abspath(whole))
    except OSError as problem:
        raise OutboxUnavailable(
            path, f"the current folder can't be told ({problem.strerror}): set outbox_dir to an absolute path"
        ) from problem


def _homeless(path: str) -> OutboxUnavailable:
    return OutboxUnavailable(
        path, f"there is no such home folder: set outbox_dir, or {ENVIRONMENT_DIR}, to a folder on a local disk"
    )


def _kind(value: object) -> str:
    return type(value).__name__


def _check_path(name: str, value: object) -> None:
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(path, str):
        raise ConfigError(name, f"must be a path or None, not {_kind(value)}")
    if not path.strip() or "\0" in path:
        raise ConfigError(name, "must be the path of a folder; None means the default one")


def _url(name: str, value: object) -> str:
    example = DEFAULTS[name] or DEFAULT_HOST
    if not isinstance(value, str):
        raise ConfigError(name, f"must be a URL such as {example}, not {_kind(value)}")
    text = value.strip()
    if "://" not in text:
        text = f"https://{text}"  # the user guide names hosts without a scheme
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise ConfigError(name, f"is not a URL: use one such as {example}") from None
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or port == 0
        or not text.isprintable()
        or " " in text
    ):
        raise ConfigError(name, f"must be an http or https URL such as {example}")
    if any(each in text for each in "?#@\\"):
        raise ConfigError(name, f"must have no user, query or fragment: use one such as {example}")
    return text.rstrip("/")


def _flag(name: str, value: object) -> bool:
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise ConfigError(name, f"must be True or False, not {_kind(value)}")


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**62:
        hint = " (0: no limit)" if name == "max_queue_size" else ""
        what = "" if type(value) is int else f", not {_kind(value)}"
        raise ConfigError(name, f"must be a whole number of at least {least}{hint}{what}")


def _seconds(name: str, value: object, *, zero: bool) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and (value > 0 or (zero and value == 0)):
        return min(value, FOREVER)
    # "non-negative number" is how upstream words it for the two durations.
    rule = "must be a non-negative number of seconds" if zero else "must be a number of seconds above 0"
    found = f"{value:g}" if type(value) is float else _kind(value)
    if type(value) is int:  # of any length
        found = "0" if value == 0 else "a negative one"
    raise ConfigError(name, f"{rule}, not {found}")
