"""One POST over the network: a protocol of one method, and its implementation by requests."""

from __future__ import annotations

import http.client
import io
import os
import queue
import socket
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import requests
from requests.adapters import HTTPAdapter
from requests.utils import get_environ_proxies
from urllib3.exceptions import MaxRetryError, ProtocolError
from urllib3.util import Retry

from segment_durable.interrupts import from_signal
from segment_durable.transport_errors import PROBLEMS, TransportError, let_go, transport_error

__all__ = ["RequestsTransport", "Response", "Transport", "TransportError"]

MAX_ANSWER_BYTES = 64 << 10  # what of an answer is read; the rest is of no interest
_LONGEST_TIMEOUT = 1_000_000.0  # seconds; a socket takes 2**31 milliseconds at the most
_NO_RETRIES = Retry(0, read=False)  # as requests has it: retries are the outbox's
_ANY_HEADER = 32 + 15  # zlib's wbits for "zlib or gzip, whichever it is"


@dataclass(frozen=True)
class Response:
    """An answer: its status, its headers (looked up in any case) and the first 64 KiB of its body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Transport(Protocol):
    """How the package reaches the network; used by one thread at a time."""

    def post(self, url: str, headers: Mapping[str, str], body: bytes, timeout: float) -> Response:
        """Post `body` and return the answer, whatever its status; a redirect is an answer and not followed.

        `timeout` seconds bound the connecting, the sending, and the answer as a whole.  Raises `TransportError` if
        there is no whole answer.
        """

    def close(self) -> None:
        """Close the connections; a later `post()` opens new ones."""


class RequestsTransport:
    """Posts by one of requests' adapters, whose connections are kept alive.

    `proxies`: as requests takes them, before those of the environment (`HTTPS_PROXY`, `NO_PROXY` and so on); `None`
    means only those, an empty mapping none at all.  The environment is read once for each URL: requests itself would
    read it and `~/.netrc` at every post, at half the price of the post, and would let a netrc entry replace our
    Authorization header.
    """

    def __init__(self, proxies: Mapping[str, str | None] | None = None) -> None:
        self._proxies = proxies
        self._adapter: HTTPAdapter | None = None
        self._routes: dict[str, _Route] = {}

    def post(self, url: str, headers: Mapping[str, str], body: bytes, timeout: float) -> Response:
        timeout = min(timeout, _LONGEST_TIMEOUT)
        try:
            route = self._routes.get(url) or self._find_route(url)
            head = {**route.headers, **headers, "Content-Length": str(len(body))}
            end = time.monotonic() + timeout
            connections = route.pool.num_connections
            try:
                response = route.open(head, body, timeout)
            except (ProtocolError, MaxRetryError) as problem:  # the latter by a proxy
                # A host may close an idle connection just when the next request is on its way: that is no failure.
                timeout = end - time.monotonic()
                if route.pool.num_connections != connections or timeout <= 0 or from_signal(problem):
                    raise
                response = route.open(head, body, timeout)
            try:
                answer = _read(response)
            finally:
                response.close()  # a connection whose answer was read to its end is back in the pool by then
        except TransportError:
            raise
        except BaseException as problem:
            self.close()  # what a signal handler's exception has left is not gone on with
            struck = from_signal(problem)
            if struck is not None:
                let_go(problem)
                raise struck from None  # and not what a library has made of it
            if not isinstance(problem, PROBLEMS):
                raise
            # Without its cause, whose text may hold a proxy's password.
            error = transport_error(problem)
            let_go(problem)
            raise error from None
        return Response(response.status, response.headers, answer)

    def close(self) -> None:
        adapter, self._adapter = self._adapter, None
        self._routes.clear()
        if adapter is not None:
            for manager in (adapter.poolmanager, *adapter.proxy_manager.values()):
                _close_pools(manager)
            adapter.close()

    def _find_route(self, url: str) -> _Route:
        """The way to that URL: what requests would find out anew at every post, at half of its price."""
        adapter = self._adapter = self._adapter or HTTPAdapter(pool_connections=2, pool_maxsize=1, max_retries=0)
        verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
        environment = {} if self._proxies == {} else get_environ_proxies(url)
        proxies: Any = {**environment, **(self._proxies or {})}
        request = requests.PreparedRequest()
        request.prepare(method="POST", url=url, headers={"Accept": "application/json"})
        pool: Any = adapter.get_connection_with_tls_context(request, verify, proxies=proxies)
        # By the pool's scheme, which for an http URL may be that of an https proxy.
        adapter.cert_verify(pool, f"{pool.scheme}://", verify, None)  # type: ignore[no-untyped-call]
        pool.ConnectionCls = type("Connection", (pool.ConnectionCls,), {"response_class": _Answer})
        if not isinstance(pool.pool, _Idle):  # else another URL of the same host has been here
            pool.pool = _Idle(pool.pool.maxsize)
        route = self._routes[url] = _Route(pool, adapter.request_url(request, proxies), dict(request.headers))
        return route


class _Idle:
    """The idle connections of a pool that one thread uses, in the place of urllib3's queue.

    That has a lock of its own, which an exception of a signal handler's may leave locked in the middle of Python code:
    the next post would wait for it for ever.
    """

    def __init__(self, maxsize: int) -> None:
        self._connections: list[Any] = [None] * maxsize  # None: to be opened

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        if not self._connections:
            raise queue.Empty
        return self._connections.pop()

    def put(self, connection: Any, block: bool = True) -> None:
        self._connections.append(connection)

    def __del__(self) -> None:
        # urllib3's own finalizer knows the queue only that was here before.
        for connection in self._connections:
            if connection is not None:
                connection.close()


class _Answer(http.client.HTTPResponse):
    """An answer that has to end in time.

    The socket's timeout bounds each wait for data: a receiver that sends a byte now and then would be read for ever.
    """

    def __init__(self, sock: socket.socket, *arguments: Any, **named: Any) -> None:
        super().__init__(sock, *arguments, **named)
        # That of pyOpenSSL, if somebody has put it into urllib3, is none, but has one.
        real: Any = sock
        timeout = (real if hasattr(real, "gettimeout") else real.socket).gettimeout()
        if timeout is not None:
            self.fp = io.BufferedReader(_InTime(sock, self.fp.detach(), timeout))

    def _read_status(self) -> tuple[str, int, str]:
        # http.client passes over 100 only.  Any other interim answer it would take for the final one, and the final one
        # for that to the next request on the connection.
        while True:
            status: tuple[str, int, str] = super()._read_status()  # type: ignore[misc]
            if status[1] == 101:  # which answers a question that was not asked
                raise http.client.BadStatusLine("101")
            if not 101 < status[1] < 200:
                return status
            http.client.parse_headers(self.fp)


class _InTime(io.RawIOBase):
    """What `raw` reads from `sock`, until `timeout` is over: seconds, those of the socket."""

    def __init__(self, sock: socket.socket, raw: io.RawIOBase, timeout: float) -> None:
        self._sock, self._raw, self._timeout = sock, raw, timeout
        self._end = time.monotonic() + timeout
        self._is_first = True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._is_first:  # mostly the only one, and the socket has that timeout
            self._is_first = False
            return self._raw.readinto(buffer)
        remaining = self._end - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("the answer did not end in time")
        self._sock.settimeout(remaining)
        try:
            return self._raw.readinto(buffer)
        finally:
            self._sock.settimeout(self._timeout)  # the connection's next request counts on it

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Route(NamedTuple):
    pool: Any  # of connections to the host, or to the proxy
    target: str  # what the request line says
    headers: dict[str, str]

    def open(self, headers: Mapping[str, str], body: bytes, timeout: float) -> Any:
        """The answer, of which the head has been read."""
        return self.pool.urlopen(
            "POST",
            self.target,
            body=body,
            headers=headers,
            redirect=False,
            assert_same_host=False,
            preload_content=False,
            decode_content=False,
            retries=_NO_RETRIES,
            timeout=timeout,
        )


def _close_pools(manager: Any) -> None:
    """Close a manager's idle connections by hand.

    urllib3 leaves that to finalizers, and those have run before our own exit handler, which may use a connection.
    """
    for key in list(manager.pools.keys()):
        pool = manager.pools.get(key)
        if pool is not None:
            pool.close()


def _read(response: Any) -> bytes:
    """The body, as it came in: what is there is taken at once, for a read of n bytes would wait for all n of them."""
    answer = b""
    while len(answer) < MAX_ANSWER_BYTES:
        chunk = response.read1(8192, decode_content=False)
        if not chunk:
            break
        answer += chunk
    if not answer and _ends_in_its_head(response):
        raise TransportError("connection", "the answer ended in its headers")
    answer = answer[:MAX_ANSWER_BYTES]
    if response.headers.get("Content-Encoding", "").lower() in ("gzip", "deflate"):  # we did not ask for it
        try:
            return zlib.decompressobj(_ANY_HEADER).decompress(answer, MAX_ANSWER_BYTES)
        except zlib.error:
            pass
    return answer


def _ends_in_its_head(response: Any) -> bool:
    """Whether an answer without a body was cut off: http.client takes the end of the stream for the end of the headers.

    A cut between two headers can't be told from the answer of a simple server that announces no length.
    """
    if response.status in (204, 304) or {"Content-Length", "Transfer-Encoding"} & {*map(str.title, response.headers)}:
        return False
    head = getattr(getattr(response, "_original_response", None), "msg", None)
    return not response.headers or bool(getattr(head, "defects", ()))
