"""The sockets: one thread for each connection, and an end for all of them that does not wait for the sender."""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, TypeAlias

from segment_durable.testing.exchange import Exchange
from segment_durable.testing.faults import Answer, Drop, HalfAnswer
from segment_durable.testing.records import Headers, Problem
from segment_durable.testing.rules import framing

Open: TypeAlias = Callable[[str, str, int, Headers, bytes, "Problem | None"], Exchange]
"""(method, path, the sender's port, headers, body, what the transfer broke) -> an exchange."""

_ACCEPT_POLL_SECONDS = 0.05
_FINISH_SECONDS = 1.0
_STOP_SECONDS = 5.0
_DRAIN_SECONDS = 1.0
_CHUNK_BYTES = 65_536


class Server(ThreadingHTTPServer):
    """Listens from its making on; `serve` starts its threads and `close` ends them, each once."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], open_exchange: Open, fail: Callable[[Exception], None]) -> None:
        self.open_exchange = open_exchange
        self.closing = threading.Event()
        self._fail = fail
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._resets: set[socket.socket] = set()
        self._drains: set[socket.socket] = set()
        self._acceptor = threading.Thread(
            target=self.serve_forever, args=(_ACCEPT_POLL_SECONDS,), name="segment-receiver", daemon=True
        )
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's own asks the name service for the host's name, which can take long
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.socket.settimeout(1.0)  # a client that is gone again must not block the acceptor

    def serve(self) -> None:
        self._acceptor.start()

    def close(self, wake: Callable[[], None]) -> None:
        """End everything within about five seconds. `wake` is called once `closing` is set."""
        if self._pid != os.getpid():
            self._abandon()
            return
        self.closing.set()
        wake()
        with suppress(OSError):
            # Wakes the acceptor at once, and ends the listening also where a forked child holds a copy of the socket.
            self.socket.shutdown(socket.SHUT_RDWR)
        self.shutdown()
        self.server_close()
        with self._lock:
            connections = dict(self._connections)
        # First only the reading ends, so that an answer under way still gets out, then everything.
        for how, seconds in ((socket.SHUT_RD, _FINISH_SECONDS), (socket.SHUT_RDWR, _STOP_SECONDS - _FINISH_SECONDS)):
            deadline = time.monotonic() + seconds
            for connection in connections:
                with suppress(OSError):
                    connection.shutdown(how)
            for thread in (self._acceptor, *connections.values()):
                if thread is not threading.current_thread():
                    thread.join(max(0.0, deadline - time.monotonic()))
            connections = {one: thread for one, thread in connections.items() if thread.is_alive()}

    def _abandon(self) -> None:
        """In a forked child: none of the threads is here, and the sockets are the parent's to shut down."""
        self.socket.close()
        for connection in list(self._connections):
            with suppress(OSError):
                os.close(connection.detach())

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(
            target=self._run, args=(request, client_address), name="segment-receiver-connection", daemon=True
        )
        with self._lock:
            self._connections[request] = thread
        try:
            thread.start()
        except BaseException:
            self._forget(request)
            raise

    def _run(self, request: Any, client_address: Any) -> None:
        try:
            self.process_request_thread(request, client_address)
        finally:
            self._forget(request)

    def _forget(self, request: Any) -> None:
        with self._lock:
            self._connections.pop(request, None)

    def reset_at_end(self, connection: socket.socket) -> None:
        """Close this connection by a RST."""
        self._resets.add(connection)

    def drain_at_end(self, connection: socket.socket) -> None:
        """Read what still comes before closing: a close with unread data is a RST, which can overtake the answer."""
        self._drains.add(connection)

    def shutdown_request(self, request: Any) -> None:
        if request in self._resets:
            self._resets.discard(request)
            with suppress(OSError):
                request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_request(request)
            return
        if request in self._drains:
            self._drains.discard(request)
            with suppress(OSError):
                self._drain(request)
        super().shutdown_request(request)

    def _drain(self, request: socket.socket) -> None:
        request.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + _DRAIN_SECONDS
        while not self.closing.is_set() and (left := deadline - time.monotonic()) > 0:
            request.settimeout(left)
            if not request.recv(_CHUNK_BYTES):
                return

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        # An OSError is the connection's: a hostile or hasty client. What a test raises is caught in the exchange.
        if isinstance(error, Exception) and not isinstance(error, OSError):
            self._fail(error)


class Handler(BaseHTTPRequestHandler):
    """Reads requests from one connection, and does what their exchanges say."""

    protocol_version = "HTTP/1.1"
    server_version = "segment-durable-receiver"
    sys_version = ""
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing on stderr."""

    def handle_one_request(self) -> None:
        self.close_connection = True
        self.requestline = self.request_version = self.command = ""
        self.raw_requestline = self.rfile.readline(_CHUNK_BYTES + 1)
        if not self.raw_requestline or self.server.closing.is_set():
            return
        if len(self.raw_requestline) > _CHUNK_BYTES:
            self.send_error(414)
            return
        if not self.parse_request():
            return
        exchange = self._receive()
        if exchange is not None:
            self._finish(exchange)

    def _receive(self) -> Exchange | None:
        """The whole request. None: the sender left in the middle of it."""
        headers = Headers(self.headers.items())
        length, problem = framing(self.command, headers)
        body = b""
        if length is None:
            self._end(self.server.drain_at_end)
        elif problem is not None:
            while length > 0 and not self.server.closing.is_set():
                chunk = self.rfile.read(min(length, _CHUNK_BYTES))
                length = length - len(chunk) if chunk else -1
        else:
            body = self.rfile.read(length)
            length -= len(body)
        if length:
            self.close_connection = True
            return None
        return self.server.open_exchange(self.command, self.path, self.client_address[1], headers, body, problem)

    def _finish(self, exchange: Exchange) -> None:
        ending = exchange.resolve(self.server.closing)
        if isinstance(ending, Answer):
            self.wfile.write(self._head(ending, exchange) + self._payload(ending))
            return
        self.close_connection = True
        if isinstance(ending, HalfAnswer):
            answer = Answer(200, body={"success": True})
            payload = self._payload(answer)
            self.wfile.write(self._head(answer, exchange) + payload[: len(payload) // 2])
        elif isinstance(ending, Drop):
            self._end(self.server.reset_at_end)

    def _end(self, how: Callable[[socket.socket], None]) -> None:
        self.close_connection = True
        how(self.connection)

    def _payload(self, answer: Answer) -> bytes:
        return b"" if self.command == "HEAD" or answer.status in (204, 304) else answer.payload()

    def _head(self, answer: Answer, exchange: Exchange) -> bytes:
        fields = {"Server": self.server_version, "Date": self.date_time_string(exchange.now())}
        if answer.status not in (204, 304):
            fields["Content-Type"] = answer.content_type
            fields["Content-Length"] = str(len(answer.payload()))
        given = {name.lower() for name in answer.headers}
        fields = {name: value for name, value in fields.items() if name.lower() not in given} | dict(answer.headers)
        options = next((value for name, value in fields.items() if name.lower() == "connection"), None)
        if options is None and self.close_connection:
            fields["Connection"] = "close"
        elif options is not None and options.lower() == "close":
            self.close_connection = True
        phrase = self.responses[answer.status][0] if answer.status in self.responses else "Unknown"
        lines = [f"HTTP/1.1 {answer.status} {phrase}", *(f"{name}: {value}" for name, value in fields.items())]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")
