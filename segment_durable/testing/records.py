"""What a receiver keeps of each request. All are frozen; a later state of a request is a new record."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

AuthorizationKind: TypeAlias = Literal["basic", "bearer", "none", "other"]
"""The scheme of the Authorization header: "none" if there is no such header, "other" for any further scheme."""


class Headers(Mapping[str, str]):
    """The headers of a request; names are looked up without regard to case and listed in lower case.

    A header that came several times is one value, joined by ", ".
    """

    def __init__(self, items: Iterable[tuple[str, str]] = ()) -> None:
        self._values: dict[str, str] = {}
        for name, value in items:
            name = name.lower()
            self._values[name] = f"{self._values[name]}, {value}" if name in self._values else value

    def __getitem__(self, name: str) -> str:
        return self._values[name.lower()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Headers({self._values!r})"


@dataclass(frozen=True)
class Problem:
    """The first rule that a request breaks, and the answer that it deserves for it."""

    status: int
    code: str
    """A word for programs, such as `body_too_large`; the answer's `code` (the `error`, at the token endpoint)."""
    message: str
    """A sentence for people. It names the place, `batch[3].timestamp`, and never quotes the payload."""


class Refusal(Exception):
    """Raised by a rule; `problem` says which. Never leaves this package."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.problem = Problem(status, code, message)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request that arrived whole, of any method and path, also when it was refused."""

    method: str
    path: str
    """As sent; an absolute URL when the receiver is used as a proxy."""
    client_port: int = field(repr=False)
    """The sender's TCP port: requests that share it in one test came over one connection."""
    headers: Headers = field(repr=False)
    body: bytes = field(repr=False)
    """After gunzip. As sent if it is no gzip; empty if it is over the limit, or if it has no `Content-Length`."""
    authorization: AuthorizationKind
    problem: Problem | None
    """What is wrong with the request, also when a scripted fault was answered instead. None: nothing is."""
    status: int | None = None
    """The status that was answered. None: no complete answer - not yet, or the connection was cut."""
    taken: bool = False
    """True if its events count as received (for a token request: if a token was issued)."""


@dataclass(frozen=True, kw_only=True)
class Batch(Request):
    """A `POST /v1/batch` whose body could be read as a batch, taken or not."""

    events: tuple[dict[str, Any], ...]
    sent_at: str | None
    """The body's `sentAt` as sent. None if it is missing or not a string."""
