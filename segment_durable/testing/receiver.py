"""A receiver for tests: a real HTTP server on a port of its own that takes events as strictly as Segment should."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from segment_durable.testing.faults import Delay, Fault, Honest, Refuse, check_fault
from segment_durable.testing.inbox import Inbox
from segment_durable.testing.judge import Judge
from segment_durable.testing.oauth import OAuthApp
from segment_durable.testing.records import Batch, Request
from segment_durable.testing.server import Server


class Receiver:
    """Takes `POST /v1/batch` as Segment's HTTP API does, and keeps what arrived.

        with Receiver() as receiver:
            client = Client("key", host=receiver.url)
            client.track("user", "Signed Up")
            assert receiver.wait_for(1)

    It answers 400 with `{"code": ..., "message": ...}` to what breaks a limit of the API: a body that is not JSON (NaN,
    a key twice and invalid UTF-8 included), over 500,000 bytes (after gunzip), an event over 32 KiB, more than 2,500
    events, a wrong Content-Type. 401: wrong credentials; 404: another path; 405: another method; 411: no
    Content-Length. Segment itself answers 200 to more than 2,500 events and to a wrong write key, and drops the events.

    - `write_key`: the only one that is accepted. None: any, if the Authorization header and the body name the same.
    - `oauth`: a Bearer token that this app's `POST /token` issued is needed, and Basic authorization is refused. None:
      Basic authorization, with the write key as user and an empty password.
    - `strict`: also refuse what Segment answers 200 to and then drops or misreads: an event without a messageId of 1 to
      100 characters, without userId and anonymousId, of an unknown type, a track without a name, a missing or
      unreadable `timestamp` or `sentAt` (ISO 8601 with a zone), half of a surrogate pair, a wrong `writeKey` in the
      body. False: none of that is looked at.
    - `host`: an IPv4 address or name to listen on. `port`: 0 takes a free one, which the receiver then keeps.

    It belongs to the process that started it: a forked child may `stop` its copy, which changes nothing for the
    parent. All methods may be called from any thread.
    """

    def __init__(
        self,
        *,
        write_key: str | None = None,
        oauth: OAuthApp | None = None,
        strict: bool = True,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self._inbox = Inbox()
        self._judge = Judge(self._inbox, write_key, oauth, strict)
        self._oauth = oauth
        self._host = host
        self._port = port
        self._lifecycle = threading.Lock()
        self._server: Server | None = None

    def start(self) -> Receiver:
        """Listen. After a `stop` on the same port, with all that arrived before still there. Harmless if started.

        `OSError` if the port is not free, for instance because somebody took it in the meantime.
        """
        with self._lifecycle:
            if self._server is None:
                inbox, judge = self._inbox, self._judge
                server = Server(
                    (self._host, self._port),
                    lambda method, path, port, headers, body, problem: judge.open(
                        method, path, port, headers, body, problem, self.url
                    ),
                    inbox.fail,
                )
                self._port = server.server_port
                server.serve()
                self._server = server
        return self

    def stop(self) -> None:
        """Refuse connections, end the open ones and all waits, and wait for the threads, five seconds at most.

        An answer that is under way still gets out; a request that waits in a fault gets none. Harmless if stopped.
        """
        with self._lifecycle:
            server, self._server = self._server, None
            if server is not None:
                server.close(self._inbox.wake)

    def __enter__(self) -> Receiver:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """`http://host:port`, without a slash at the end. `RuntimeError` while the port is not known yet."""
        if not self._port:
            raise RuntimeError("the receiver has no port yet: call start() or use it in a `with` statement")
        return f"http://{self._host}:{self._port}"

    @property
    def oauth(self) -> OAuthApp | None:
        """The app that was given."""
        return self._oauth

    @property
    def requests(self) -> tuple[Request, ...]:
        """Every request that arrived whole, of any method and path, refused ones too, in order of arrival."""
        return self._inbox.requests()

    @property
    def batches(self) -> tuple[Batch, ...]:
        """Those of `requests` that are a batch, taken or not."""
        return tuple(request for request in self._inbox.requests() if isinstance(request, Batch))

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events of all taken batches, in the order in which they were taken, duplicates included."""
        return [event for batch in self._inbox.taken() for event in batch.events]

    @property
    def unique(self) -> list[dict[str, Any]]:
        """As `events`, but only the first of each messageId. An event without one counts as unique."""
        return self._inbox.unique()

    @property
    def duplicates(self) -> int:
        """How many events came again: `len(events) - len(unique)`."""
        return self._inbox.duplicates()

    @property
    def errors(self) -> tuple[Exception, ...]:
        """What was raised in the receiver's threads: by a `Refuse.matches`, by a clock. Worth an assertion."""
        with self._inbox.condition:
            return tuple(self._inbox.errors)

    def clear(self) -> None:
        """Forget all that arrived, and the errors. Scripts, tokens and the port stay."""
        self._inbox.clear()

    def wait_for(self, count: int | Callable[[Receiver], bool], timeout: float = 10.0) -> bool:
        """Wait until so many unique events arrived, or until the predicate is true; False after `timeout` seconds.

        The predicate is called whenever something arrived or was answered, while all requests wait: it should be quick,
        and must not wait itself. A timeout of 0 looks once.
        """
        if callable(count):
            predicate = count
            return self._inbox.wait_for(lambda: predicate(self), timeout)
        number = count
        return self._inbox.wait_for(lambda: self._inbox.unique_count() >= number, timeout)

    def script(self, *faults: Fault) -> None:
        """Append to what the next whole `POST /v1/batch` requests meet, one fault each, sound or not."""
        self._inbox.extend(self._judge.batch_script, faults)

    def always(self, fault: Fault | None) -> None:
        """What `POST /v1/batch` meets when the script is used up. None: the honest answer."""
        fault = Honest() if fault is None else fault
        check_fault(fault)
        with self._inbox.condition:
            self._judge.batch_script.default = fault

    def token_script(self, *faults: Fault) -> None:
        """As `script`, for `POST /token`; "taken" means that the token was issued. `TypeError` for `Refuse`."""
        for fault in faults:
            last: Fault | None = fault
            while isinstance(last, Delay):
                last = last.then
            if isinstance(last, Refuse):
                raise TypeError("a token request has no events to refuse")
        self._inbox.extend(self._judge.token_script, faults)

    def heal(self) -> None:
        """Forget what is left of the scripts and end all waits: from now on the answers are what `always` says."""
        with self._inbox.condition:
            self._judge.batch_script.queue.clear()
            self._judge.token_script.queue.clear()
        self._inbox.release()

    def release(self) -> None:
        """End the waits (`Hang`, `Delay`) of all requests that have arrived; later requests wait again."""
        self._inbox.release()
