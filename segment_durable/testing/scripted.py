"""A transport without a network: it answers as it is told to, and keeps what was posted."""

from __future__ import annotations

import gzip
import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from segment_durable.transport import Response

__all__ = ["Post", "Reply", "ScriptedTransport"]


@dataclass(frozen=True)
class Post:
    """One call of `post()`."""

    url: str
    headers: Mapping[str, str]
    raw: bytes
    """The body as it was given, compressed if it was."""
    timeout: float
    """Seconds."""

    @property
    def body(self) -> bytes:
        return gzip.decompress(self.raw) if self.headers.get("Content-Encoding") == "gzip" else self.raw

    @property
    def events(self) -> list[dict[str, Any]]:
        """The messages of a batch."""
        events: list[dict[str, Any]] = json.loads(self.body)["batch"]
        return events


Reply: TypeAlias = int | Response | BaseException
"""A status without headers and body, a whole answer, or what is raised: a `TransportError` is what senders expect."""


class ScriptedTransport:
    """A `segment_durable.transport.Transport` for tests.

    `answers`: one reply for each post, in order; when they are used up, `then` is the reply to all others.  Or a
    function that is called with each `Post`, after it was recorded, and returns the reply.

    >>> transport = ScriptedTransport([503])
    >>> [transport.post("http://localhost/", {}, b"", 1.0).status for _ in range(3)]
    [503, 200, 200]
    >>> len(transport.posts)
    3
    """

    def __init__(self, answers: Iterable[Reply] | Callable[[Post], Reply] = (), *, then: Reply = 200) -> None:
        self.posts: list[Post] = []
        """All posts so far."""
        self.closed = 0
        """How often `close()` was called."""
        if callable(answers):
            self._answer = answers
        else:
            replies = deque(answers)
            self._answer = lambda _: replies.popleft() if replies else then

    def post(self, url: str, headers: Mapping[str, str], body: bytes, timeout: float) -> Response:
        """Record the post and give the reply."""
        post = Post(url, dict(headers), bytes(body), timeout)
        self.posts.append(post)
        reply = self._answer(post)
        if isinstance(reply, BaseException):
            raise reply
        return Response(reply, {}, b"") if isinstance(reply, int) else reply

    def close(self) -> None:
        self.closed += 1
