"""Middlemen: a small HTTP proxy and a small SOCKS proxy on loopback, which know every name as that of one server.

    with FaultServer(tls=…, root="https://dashscope.aliyuncs.com") as service, HttpProxy(service.port) as proxy:
        ...                      # the program is given HTTPS_PROXY=proxy.url
        assert proxy.asked == ["CONNECT dashscope.aliyuncs.com:443"]

What they were asked for, and what came with it, may be read at any time.
"""

from __future__ import annotations

import base64
import contextlib
import socket
import struct
import threading
from types import TracebackType
from typing import Any


def free_port() -> int:
    """A port of loopback for a program that takes it at once."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def pump(source: socket.socket, target: socket.socket) -> None:
    """Bytes from one side to the other until it ends."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


class Middleman:
    """Takes connections and leads all of them to one port of this machine."""

    scheme = ""

    def __init__(self, port: int, user: str = "", password: str = "") -> None:
        self.target = port
        self.user, self.password = user, password
        self.asked: list[str] = []
        self.heads: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        who = f"{self.user}:{self.password}@" if self.user else ""
        return f"{self.scheme}://{who}{self.place}"

    def __enter__(self: Any) -> Any:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._listener.close()
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError, struct.error):
            connection.settimeout(30)
            self.serve(connection)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    def serve(self, connection: socket.socket) -> None:
        raise NotImplementedError

    def join(self, connection: socket.socket, first: bytes = b"") -> None:
        """Lead a connection on to the server."""
        with socket.create_connection(("127.0.0.1", self.target), 10) as server:
            server.sendall(first)
            there = threading.Thread(target=pump, args=(connection, server), daemon=True)
            there.start()
            pump(server, connection)


class HttpProxy(Middleman):
    """Tunnels by CONNECT and forwards what is asked for in absolute form; all else is 400, as real ones answer it.

    `refusal`: what everything is answered with instead.
    """

    scheme = "http"
    refusal: bytes = b""

    def serve(self, connection: socket.socket) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            block = connection.recv(65536)
            if not block:
                return
            data += block
            if data.startswith(b"\x16"):  # TLS
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
                return
        head, _, rest = data.partition(b"\r\n\r\n")
        first, *headers = head.decode("latin-1").split("\r\n")
        method, target, version = first.split(" ")
        self.asked.append(f"{method} {target}")
        self.heads.append(head)
        known = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        if self.refusal:
            connection.sendall(self.refusal)
        elif self.user and f"Proxy-Authorization: Basic {known}" not in headers:
            asks = b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=x\r\n"
            connection.sendall(asks + b"Content-Length: 0\r\n\r\n")
        elif method == "CONNECT":
            connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            self.join(connection)
        elif target.startswith("http://"):
            path = "/" + target.split("/", 3)[3]
            kept = [line for line in headers if not line.lower().startswith("proxy-")]
            lines = [f"{method} {path} {version}", *kept, "Via: 1.1 small", "", ""]
            self.join(connection, "\r\n".join(lines).encode("latin-1") + rest)
        else:
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


class SocksProxy(Middleman):
    """SOCKS 5 with or without a password, and SOCKS 4 and 4a. `reply`: the number of RFC 1928 that it answers with."""

    scheme = "socks5h"
    reply = 0

    def serve(self, connection: socket.socket) -> None:
        stream = connection.makefile("rb")
        version = stream.read(1)[0]
        if version == 4:
            return self._serve_4(connection, stream)
        if version != 5:
            return None
        methods = stream.read(stream.read(1)[0])
        wanted = 2 if self.user else 0
        if wanted not in methods:
            connection.sendall(b"\x05\xff")
            return None
        connection.sendall(bytes([5, wanted]))
        if self.user:
            stream.read(1)
            user, password = (stream.read(stream.read(1)[0]).decode() for _ in range(2))
            is_known = (user, password) == (self.user, self.password)
            connection.sendall(b"\x01\x00" if is_known else b"\x01\x01")
            if not is_known:
                return None
        kind = stream.read(4)[3]
        if kind == 3:
            host = stream.read(stream.read(1)[0]).decode()
        else:
            host = socket.inet_ntop(
                socket.AF_INET if kind == 1 else socket.AF_INET6, stream.read(4 if kind == 1 else 16)
            )
        (port,) = struct.unpack(">H", stream.read(2))
        self.asked.append(f"{host}:{port}")
        connection.sendall(bytes([5, self.reply, 0, 1, 0, 0, 0, 0, 0, 0]))
        return None if self.reply else self.join(connection)

    def _serve_4(self, connection: socket.socket, stream: Any) -> None:
        _, port, address = struct.unpack(">BH4s", stream.read(7))

        def word() -> str:
            return b"".join(iter(lambda: stream.read(1), b"\0")).decode()

        word()  # the user
        host = word() if address[:3] == b"\0\0\0" else socket.inet_ntoa(address)
        self.asked.append(f"{host}:{port}")
        connection.sendall(bytes([0, 0x5B if self.reply else 0x5A, 0, 0, 0, 0, 0, 0]))
        if not self.reply:
            self.join(connection)
