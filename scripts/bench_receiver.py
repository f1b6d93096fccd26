"""A receiver that costs little, in a process of its own: it reads requests, answers 200 and parses nothing."""

from __future__ import annotations

import socket
import threading

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 16\r\n\r\n" + b'{"success":true}'


def serve(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    data = b""
    while True:
        end = data.find(b"\r\n\r\n")
        if end < 0:
            more = connection.recv(1 << 16)
            if not more:
                return
            data += more
            continue
        head = data[:end].lower()
        length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
        missing = end + 4 + length - len(data)
        if missing > 0:
            buffer = bytearray(missing)
            view = memoryview(buffer)
            while missing:
                got = connection.recv_into(view[-missing:])
                if not got:
                    return
                missing -= got
            data = b""
        else:
            data = data[end + 4 + length :]
        connection.sendall(ANSWER)


def main() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection,), daemon=True).start()


main()
