"""The transport against raw sockets: what it sends, what it takes for an answer, and what it says if there is none."""

from __future__ import annotations

import base64
import contextlib
import gc
import gzip
import re
import select
import signal
import socket
import ssl
import threading
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from ipaddress import ip_address
from pathlib import Path

import pytest
from outbox.common import Interruption, in_its_own_thread

from segment_durable.transport import MAX_ANSWER_BYTES, RequestsTransport, Response, TransportError, _Answer

HEADERS = {"Content-Type": "application/json", "Authorization": "Basic a2V5Og==", "User-Agent": "test/1"}
BODY = b'{"batch":[]}'
PASSWORD = "the-proxy-password"
TIMEOUT = 5.0
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n" + b'{"success":true}'


class Server:
    """A loopback listener; `answer` is given each request's bytes and its connection, and sends what it likes.

    The connection is kept open as long as `answer` returns True.
    """

    def __init__(self, answer: Callable[[bytes, socket.socket], object], tls: ssl.SSLContext | None = None) -> None:
        self._answer = answer
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads: list[threading.Thread] = []
        self._open: list[socket.socket] = []
        self.closing = threading.Event()
        self.port = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self.connections = 0
        self.requests: list[bytes] = []

    def __enter__(self) -> Server:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def _start(self, run: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=run, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self.closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(connection)
            self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        try:
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
                self._open.append(connection)
            while request := read_request(connection):
                self.requests.append(request)
                if self._answer(request, connection) is not True:
                    return
        except OSError:
            pass
        finally:
            connection.close()


def read_request(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = connection.recv(65536)
        if not chunk:
            return b""
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    while length and len(body) < int(length[1]):
        chunk = connection.recv(65536)
        if not chunk:
            return b""
        body += chunk
    return head + b"\r\n\r\n" + body


def header(request: bytes, name: str) -> list[str]:
    head = request.partition(b"\r\n\r\n")[0].decode("latin-1")
    return re.findall(rf"(?im)^{name}: *(.*?)\r?$", head)


def sends(answer: bytes, keep: bool = True) -> Callable[[bytes, socket.socket], bool]:
    def run(_: bytes, connection: socket.socket) -> bool:
        connection.sendall(answer)
        return keep

    return run


@pytest.fixture
def transport() -> Iterator[RequestsTransport]:
    transport = RequestsTransport()
    yield transport
    transport.close()


def post(transport: RequestsTransport, url: str, timeout: float = TIMEOUT) -> Response:
    return transport.post(f"{url}/v1/batch", HEADERS, BODY, timeout)


def failure(transport: RequestsTransport, url: str, timeout: float = TIMEOUT) -> TransportError:
    with pytest.raises(TransportError) as caught:
        post(transport, url, timeout)
    problem = caught.value
    assert PASSWORD not in "".join(traceback.format_exception(problem))
    assert "\n" not in str(problem)
    return problem


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


# -- requests and answers


def test_a_post_sends_what_it_was_given_and_returns_the_answer(transport: RequestsTransport) -> None:
    answer = b"HTTP/1.1 418 Teapot\r\nX-Odd: Yes\r\nContent-Length: 3\r\n\r\nno\xff"
    with Server(sends(answer)) as server:
        response = post(transport, server.url)
    assert (response.status, response.body) == (418, b"no\xff")
    assert response.headers["x-odd"] == response.headers["X-ODD"] == "Yes"
    (request,) = server.requests
    assert request.startswith(b"POST /v1/batch HTTP/1.1\r\n")
    assert request.endswith(b"\r\n\r\n" + BODY)
    for name, value in {**HEADERS, "Content-Length": str(len(BODY)), "Accept": "application/json"}.items():
        assert header(request, name) == [value]
    assert header(request, "Transfer-Encoding") == []
    assert header(request, "Accept-Encoding") in ([], ["identity"])
    assert header(request, "Cookie") == []


@pytest.mark.parametrize(
    "answer",
    [
        OK,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\n" + b'{"success":true}' + b"\r\n0\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
        b"HTTP/1.1 500 Oh\r\nContent-Length: 2\r\n\r\nno",
    ],
)
def test_one_connection_serves_many_posts(transport: RequestsTransport, answer: bytes) -> None:
    with Server(sends(answer)) as server:
        statuses = {post(transport, server.url).status for _ in range(20)}
        assert len(statuses) == 1
        assert (len(server.requests), server.connections) == (20, 1)
        transport.close()
        post(transport, server.url)
        assert server.connections == 2
        transport.close()


def test_one_connection_serves_two_urls_of_a_host(transport: RequestsTransport) -> None:
    with Server(sends(OK)) as server:
        for _ in range(2):
            for path in ("v1/batch", "token"):
                assert transport.post(f"{server.url}/{path}", HEADERS, BODY, TIMEOUT).status == 200
        assert server.connections == 1
        transport.close()


def test_a_connection_that_the_host_has_closed_between_two_posts_is_no_error(transport: RequestsTransport) -> None:
    with Server(sends(OK, keep=False)) as server:
        for number in range(1, 4):
            assert post(transport, server.url).status == 200
            for thread in server._threads[1:]:
                thread.join(10)  # it is closed now
            assert server.connections == number


@pytest.mark.parametrize("way", ["closed", "reset"])
def test_a_connection_that_the_host_closes_while_the_next_post_is_on_its_way_is_no_error(
    transport: RequestsTransport, way: str
) -> None:
    """Its idle time was over just then: the post is repeated, once, on a new connection."""

    def answer(_: bytes, connection: socket.socket) -> bool:
        if len(server.requests) % 2:
            connection.sendall(OK)
            return True
        if way == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        return False

    with Server(answer) as server:
        for _ in range(4):
            assert post(transport, server.url).status == 200
        # The second post finds the first connection closing, and is the first on another one; and so on.
        assert (len(server.requests), server.connections) == (7, 4)
        transport.close()


def test_a_host_that_closes_each_connection_is_asked_no_more_than_twice(transport: RequestsTransport) -> None:
    with Server(sends(OK)) as server:
        assert post(transport, server.url).status == 200
        server._answer = lambda *_: False
        assert failure(transport, server.url).kind == "connection"
        assert len(server.requests) == 3
        assert failure(transport, server.url).kind == "connection"
        assert len(server.requests) == 4  # it was a new connection
        transport.close()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer sends a signal here")
def test_a_time_limit_that_strikes_while_the_answer_is_waited_for_is_not_taken_for_a_failure(
    transport: RequestsTransport,
) -> None:
    class TimeLimit(Exception):
        pass

    def strike(*_: object) -> None:
        raise TimeLimit

    before = signal.signal(signal.SIGALRM, strike)
    try:
        with Server(lambda *_: server.closing.wait(30)) as server:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(TimeLimit):
                post(transport, server.url)
            transport.close()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # a socket that was just opened is not closed
@in_its_own_thread
def test_whatever_a_signal_handler_has_ended_the_next_post_waits_for_nothing() -> None:
    """A pool of urllib3's has a lock that an exception in the middle of Python's own code leaves locked."""

    class TimeLimit(Exception):
        pass

    def strike() -> None:
        raise TimeLimit

    transport = RequestsTransport()
    within = ("urllib3", "queue.py", "threading.py", "http/client.py")
    with Server(sends(OK)) as server:
        for place in range(1 << 30):
            assert post(transport, server.url).status == 200, f"before place {place}"
            with (
                contextlib.suppress(TimeLimit),
                Interruption(place, strike, checked=True, within=within) as interruption,
            ):
                post(transport, server.url)
            if not interruption.happened:
                break
            if place % 2:
                transport.close()
        transport.close()
    assert place > 100
    gc.collect()


def test_a_cookie_of_an_answer_is_not_sent_back(transport: RequestsTransport) -> None:
    with Server(sends(OK.replace(b"OK\r\n", b"OK\r\nSet-Cookie: a=b\r\n"))) as server:
        for _ in range(2):
            post(transport, server.url)
    assert [header(request, "Cookie") for request in server.requests] == [[], []]


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 305, 307, 308, 399])
def test_no_redirect_is_followed(transport: RequestsTransport, status: int) -> None:
    with Server(sends(OK)) as elsewhere:
        answer = f"HTTP/1.1 {status} Moved\r\nLocation: {elsewhere.url}/v1/batch\r\nContent-Length: 0\r\n\r\n"
        with Server(sends(answer.encode())) as server:
            assert post(transport, server.url).status == status
            transport.close()
        assert len(server.requests) == 1
        assert elsewhere.connections == 0


def test_a_netrc_does_not_replace_our_credentials(
    transport: RequestsTransport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "netrc-home"
    home.mkdir()
    (home / ".netrc").write_text(f"machine 127.0.0.1 login somebody password {PASSWORD}\n")
    (home / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / ".netrc"))
    with Server(sends(OK)) as server:
        post(transport, server.url)
    assert header(server.requests[0], "Authorization") == [HEADERS["Authorization"]]


# -- proxies


@pytest.fixture
def proxy() -> Iterator[Server]:
    """A proxy that answers itself and so tells that it was asked."""
    with Server(sends(b"HTTP/1.1 299 By Proxy\r\nContent-Length: 0\r\n\r\n")) as server:
        yield server


def test_a_proxy_of_the_settings_is_used_with_its_credentials(proxy: Server) -> None:
    transport = RequestsTransport({"http": f"http://user:{PASSWORD}@127.0.0.1:{proxy.port}"})
    assert post(transport, "http://receiver.invalid").status == 299
    transport.close()
    (request,) = proxy.requests
    assert request.startswith(b"POST http://receiver.invalid/v1/batch HTTP/1.1\r\n")
    login = base64.b64encode(f"user:{PASSWORD}".encode()).decode()
    assert header(request, "Proxy-Authorization") == [f"Basic {login}"]
    assert header(request, "Authorization") == [HEADERS["Authorization"]]


def test_a_proxy_of_the_environment_is_used_unless_no_proxy_names_the_host(
    proxy: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.setenv("no_proxy", "")
    with Server(sends(OK)) as server:
        by_proxy, direct = RequestsTransport(), RequestsTransport()
        assert post(by_proxy, server.url).status == 299
        monkeypatch.setenv("no_proxy", "elsewhere.test,127.0.0.1")
        assert post(direct, server.url).status == 200
        by_proxy.close()
        direct.close()
    assert (len(proxy.requests), len(server.requests)) == (1, 1)


@pytest.mark.parametrize("settings", [{}, {"http": None}], ids=str)
def test_the_settings_can_do_without_the_proxies_of_the_environment(
    proxy: Server, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str | None]
) -> None:
    monkeypatch.setenv("http_proxy", proxy.url)
    with Server(sends(OK)) as server:
        transport = RequestsTransport(settings)
        assert post(transport, server.url).status == 200
        transport.close()
    assert proxy.requests == []


def test_proxies_of_the_environment_are_used_for_what_the_settings_do_not_name(
    proxy: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As requests does it."""
    monkeypatch.setenv("http_proxy", proxy.url)
    transport = RequestsTransport({"https": "http://127.0.0.1:9"})
    assert post(transport, "http://receiver.invalid").status == 299
    transport.close()
    assert len(proxy.requests) == 1


def test_a_connection_that_a_proxy_closes_in_the_middle_of_a_request_costs_no_attempt() -> None:
    def answer(_: bytes, connection: socket.socket) -> None:
        connection.sendall(OK)
        connection.recv(1)  # the next request is on its way

    with Server(answer) as proxy:
        transport = RequestsTransport({"http": proxy.url})
        for _ in range(2):
            assert post(transport, "http://receiver.invalid").status == 200
        transport.close()
        assert proxy.connections == 2


def test_https_goes_through_a_tunnel_and_a_refused_tunnel_is_the_proxys_fault() -> None:
    with Server(sends(b"HTTP/1.1 407 Login\r\nContent-Length: 0\r\n\r\n")) as proxy:
        transport = RequestsTransport({"https": f"http://user:{PASSWORD}@127.0.0.1:{proxy.port}"})
        problem = failure(transport, "https://receiver.invalid")
        transport.close()
    assert problem.kind == "proxy"
    assert proxy.requests[0].startswith(b"CONNECT receiver.invalid:443 ")
    assert header(proxy.requests[0], "Authorization") == []


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_is_not_there_is_told_without_its_password(scheme: str) -> None:
    transport = RequestsTransport({scheme: f"http://user:{PASSWORD}@127.0.0.1:{unused_port()}"})
    assert failure(transport, f"{scheme}://receiver.invalid").kind == "proxy"
    transport.close()


@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{PASSWORD}@",
        f"http://user:{PASSWORD}@proxy:port",
        f"http://user:{PASSWORD}@[::1",
        f"ftp://user:{PASSWORD}@127.0.0.1",
        f"socks5://user:{PASSWORD}@127.0.0.1:1",
        f"//user:{PASSWORD}@",
        f"user:{PASSWORD}",
    ],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_is_no_url_is_told_without_its_password(url: str, scheme: str) -> None:
    transport = RequestsTransport({scheme: url})
    assert failure(transport, f"{scheme}://127.0.0.1:{unused_port()}").kind in ("proxy", "connection", "dns")
    transport.close()


# -- answers that are none


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n",
        b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"success"',
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\nhalf\r\n0\r\n\r\n",
        b"HTTP/1.1 two hundred\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\x00\x01\x02\x03",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n",
    ],
)
def test_half_an_answer_or_no_http_at_all_is_no_answer(transport: RequestsTransport, answer: bytes) -> None:
    def half(_: bytes, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.sendall(answer)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass

    with Server(half) as server:
        assert failure(transport, server.url).kind == "connection"
        transport.close()


def test_two_lengths_that_differ_are_no_answer(transport: RequestsTransport) -> None:
    with warnings.catch_warnings(), Server(sends(OK.replace(b": 16", b": 16, 15"))) as server:
        warnings.simplefilter("ignore", ResourceWarning)  # urllib3 leaves this connection to the garbage collector
        assert failure(transport, server.url).kind == "connection"
        gc.collect()


def test_a_simple_server_need_not_announce_a_length(transport: RequestsTransport) -> None:
    for body in (b"", b"fine"):
        with Server(sends(b"HTTP/1.0 200 OK\r\nServer: simple\r\n\r\n" + body, keep=False)) as server:
            response = post(transport, server.url)
            assert (response.status, response.body) == (200, body)


def test_a_line_that_is_no_header_does_not_spoil_an_answer(transport: RequestsTransport) -> None:
    with Server(sends(OK.replace(b"\r\n\r\n", b"\r\nno header\r\n\r\n"))) as server:
        assert post(transport, server.url).body == b'{"success":true}'
        transport.close()


@pytest.mark.parametrize("chunked", [False, True])
def test_an_endless_body_is_cut(transport: RequestsTransport, chunked: bool) -> None:
    def endless(_: bytes, connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 400 No\r\n" + (b"Transfer-Encoding: chunked\r\n" if chunked else b"") + b"\r\n")
        while True:  # until the other side has had enough
            connection.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n" if chunked else b"x" * 4096)

    with Server(endless) as server:
        response = post(transport, server.url)
        assert (response.status, response.body) == (400, b"x" * MAX_ANSWER_BYTES)
        assert post(transport, server.url).status == 400
        assert server.connections == 2  # what was not read to its end is not used again
        transport.close()


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("with_length", [False, True])
def test_a_body_that_drips_is_bounded_by_the_timeout(
    transport: RequestsTransport, chunked: bool, with_length: bool
) -> None:
    def drip(_: bytes, connection: socket.socket) -> None:
        head = b"Transfer-Encoding: chunked\r\n" if chunked else b"Content-Length: 60000\r\n" if with_length else b""
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n")
        while not server.closing.wait(0.02):
            connection.sendall(b"1\r\nx\r\n" if chunked else b"x")

    with Server(drip) as server:
        started = time.monotonic()
        assert failure(transport, server.url, timeout=0.3).kind == "timeout"
        assert time.monotonic() - started < 3  # all of it would take 20 minutes
        transport.close()


@pytest.mark.parametrize(
    "interim", [b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", b"HTTP/1.1 102 Processing\r\n\r\n"]
)
def test_an_interim_answer_is_not_taken_for_the_final_one(transport: RequestsTransport, interim: bytes) -> None:
    """Nor the final one for that to the next request: an event that was refused would count as delivered."""
    statuses = iter([b"200 OK", b"503 Service Unavailable", b"400 Bad Request"])

    def answer(_: bytes, connection: socket.socket) -> bool:
        connection.sendall(interim + interim)
        connection.sendall(b"HTTP/1.1 %b\r\nContent-Length: 1\r\n\r\nx" % next(statuses))
        return True

    with Server(answer) as server:
        assert [post(transport, server.url).status for _ in range(3)] == [200, 503, 400]
        assert server.connections == 1
        transport.close()


def test_a_switch_of_protocols_is_no_answer(transport: RequestsTransport) -> None:
    """Nobody asked for it, and what follows on that connection is not known."""

    def answer(_: bytes, connection: socket.socket) -> bool:
        if server.connections == 1:
            connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        else:
            connection.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n")
        return True

    with Server(answer) as server:
        assert failure(transport, server.url).kind == "connection"
        assert post(transport, server.url).status == 503
        transport.close()


def test_an_answer_is_read_from_a_socket_of_pyopenssl() -> None:
    """urllib3.contrib.pyopenssl, which others may put into urllib3, has one that does not tell its timeout."""

    class Wrapped:
        def __init__(self, inner: socket.socket) -> None:
            self.socket = inner
            self.makefile = inner.makefile
            self.settimeout = inner.settimeout

    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(20)
        theirs.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        answer = _Answer(Wrapped(ours))  # type: ignore[arg-type]
        answer.begin()
        assert (answer.status, answer.read()) == (200, b"ok")
        answer.close()


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"", b"H"),
        (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
        (b"HTTP/1.1 2", b"0"),
        (b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
    ],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_headers_that_drip_are_bounded_by_the_timeout(scheme: str, head: bytes, piece: bytes) -> None:
    """With https it is the answer of a proxy that is to make a tunnel."""

    def drip(_: bytes, connection: socket.socket) -> None:
        connection.sendall(head)
        while not server.closing.wait(0.02):
            connection.sendall(piece)

    with Server(drip) as server:
        transport = RequestsTransport({"https": server.url})
        started = time.monotonic()
        url = server.url if scheme == "http" else "https://api.example.com"
        assert failure(transport, url, timeout=0.3).kind in ("timeout", "proxy")
        assert time.monotonic() - started < 1.5  # a hundred headers take 2 seconds
        transport.close()


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"])
def test_silence_is_a_timeout(transport: RequestsTransport, said: bytes) -> None:
    def hang(_: bytes, connection: socket.socket) -> None:
        connection.sendall(said)
        server.closing.wait(20)

    with Server(hang) as server:
        problem = failure(transport, server.url, timeout=0.1)
        assert problem.kind == "timeout"
        assert "waiting for the answer" in str(problem)
        transport.close()


def test_a_host_that_takes_no_connection_is_a_timeout(transport: RequestsTransport) -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(16):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
            if not select.select([], [filler], [], 0.1)[1]:
                break
        else:
            pytest.skip("this system takes more connections than it was asked for")
        problem = failure(transport, "http://{}:{}".format(*listener.getsockname()), timeout=0.1)
    assert problem.kind == "timeout"
    assert "connecting" in str(problem)


@pytest.mark.parametrize("timeout", [1e9, 2_147_484.0, 1e300])
def test_a_timeout_of_years_is_no_error(transport: RequestsTransport, timeout: float) -> None:
    with Server(sends(OK)) as server:
        assert post(transport, server.url, timeout).status == 200
        transport.close()


@pytest.mark.parametrize("coding", ["gzip", "deflate", "GZIP"])
def test_an_answer_that_is_compressed_all_the_same_is_read_and_a_bomb_is_cut(
    transport: RequestsTransport, coding: str
) -> None:
    for text, expected in ((b"words", b"words"), (b"x" * 10_000_000, b"x" * MAX_ANSWER_BYTES)):
        packed = zlib.compress(text) if coding == "deflate" else gzip.compress(text)
        head = f"HTTP/1.1 400 No\r\nContent-Encoding: {coding}\r\nContent-Length: {len(packed)}\r\n\r\n"
        with Server(sends(head.encode() + packed)) as server:
            assert post(transport, server.url).body == expected
            transport.close()


def test_an_answer_that_claims_to_be_compressed_is_kept_as_it_is(transport: RequestsTransport) -> None:
    with Server(sends(OK.replace(b"OK\r\n", b"OK\r\nContent-Encoding: gzip\r\n"))) as server:
        response = post(transport, server.url)
        transport.close()
    assert (response.status, response.body) == (200, b'{"success":true}')


# -- no connection


def test_a_refused_connection(transport: RequestsTransport) -> None:
    problem = failure(transport, f"http://127.0.0.1:{unused_port()}")
    assert problem.kind == "connection"
    assert "refused" in str(problem).lower()


def test_a_reset_connection(transport: RequestsTransport) -> None:
    def reset(_: bytes, connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with Server(reset) as server:
        assert failure(transport, server.url).kind == "connection"
        transport.close()


def test_a_name_that_does_not_exist(transport: RequestsTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with monkeypatch.context() as patch:  # whatever this machine's resolver makes of it
        patch.setattr(socket, "getaddrinfo", unknown)
        assert failure(transport, "http://receiver.invalid").kind == "dns"
    assert failure(transport, "http://receiver.invalid").kind == "dns"


@pytest.mark.parametrize(
    "url", ["http://" + "a" * 70 + ".test", "http://*.test", "http://a..test", "gopher://host", "nothing", "http://"]
)
def test_what_is_no_url_is_an_error_of_this_kind_too(transport: RequestsTransport, url: str) -> None:
    assert failure(transport, url).kind in ("connection", "dns")


# -- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for 127.0.0.1, and its key, in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "receiver")])
    now = datetime.now(timezone.utc)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + signed.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.fixture
def tls_server(certificate: Path) -> Iterator[Server]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with Server(sends(OK), context) as server:
        yield server


def test_a_certificate_that_nobody_signed_is_not_accepted(transport: RequestsTransport, tls_server: Server) -> None:
    problem = failure(transport, tls_server.url)
    assert problem.kind == "certificate"
    assert "self-signed" in str(problem) or "self signed" in str(problem)
    assert tls_server.requests == []


@pytest.mark.parametrize("name", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_a_bundle_of_the_environment_is_trusted(
    transport: RequestsTransport, tls_server: Server, certificate: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, str(certificate))
    assert post(transport, tls_server.url).body == b'{"success":true}'
    wrong_name = failure(transport, tls_server.url.replace("127.0.0.1", "localhost"))
    assert wrong_name.kind == "certificate"
    transport.close()


def test_the_certificate_of_a_proxy_is_looked_at_also_for_a_host_without_one(
    tls_server: Server, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is sent a password."""
    transport = RequestsTransport({"http": tls_server.url.replace("//", f"//user:{PASSWORD}@")})
    assert failure(transport, "http://receiver.invalid").kind in ("certificate", "proxy")
    assert tls_server.requests == []
    transport.close()
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    assert post(transport, "http://receiver.invalid").status == 200
    transport.close()


def test_a_bundle_that_is_not_there_is_named(
    transport: RequestsTransport, tls_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "nowhere.pem"))
    problem = failure(transport, tls_server.url)
    assert problem.kind == "certificate"
    assert "REQUESTS_CA_BUNDLE" in str(problem)


def test_https_to_a_port_that_does_not_speak_it(transport: RequestsTransport) -> None:
    def plain(connection: socket.socket) -> None:
        connection.recv(10)
        connection.sendall(b"HTTP/1.1 400 This is no TLS\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                plain(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        problem = failure(transport, f"https://127.0.0.1:{listener.getsockname()[1]}")
        thread.join(10)
    assert problem.kind == "tls"


# -- life


def test_closing_twice_or_unused_is_fine_and_a_closed_transport_opens_again() -> None:
    transport = RequestsTransport()
    transport.close()
    with Server(sends(OK)) as server:
        assert post(transport, server.url).status == 200
        transport.close()
        transport.close()
        assert post(transport, server.url).status == 200
        transport.close()


def test_an_error_leaves_the_transport_usable(transport: RequestsTransport) -> None:
    answers = iter([b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", OK])

    def once_bad(_: bytes, connection: socket.socket) -> None:
        connection.sendall(next(answers))

    with Server(once_bad) as server:
        assert failure(transport, server.url).kind == "connection"
        assert post(transport, server.url).status == 200
        transport.close()
