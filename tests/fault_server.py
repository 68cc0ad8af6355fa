"""A service on loopback that plays any fault of a service or a network, byte by byte, and counts what reached it.

    with FaultServer() as server:
        server.play(GENERATE, error(503, "ServiceUnavailable"), good())   # one after the other, the last one for ever
        server.play("/img/picture.png", Answer(cut_after=100, body=png()))

It knows nothing of the program under test nor of the mock service, and is on purpose no good HTTP server: what it
sends is exactly what an `Answer` says, however wrong. Without a script it makes a picture and hands it out.
"""

from __future__ import annotations

import contextlib
import io
import json
import socket
import ssl
import struct
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import TracebackType
from typing import Any, Literal, TypeAlias, TypeVar
from urllib.parse import urlsplit

from PIL import Image

GENERATE = "/api/v1/services/aigc/multimodal-generation/generation"
PICTURE = "/img/picture.png"
PICTURE_FOLDER = "/img/"
HOLD_S = 60.0  # longer than any test; ends early when the server closes
BLOCK = bytes(64 * 1024)


@dataclass(frozen=True)
class Received:
    """One request that arrived whole. `root` is the address of the server that it reached."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]  # names in lower case, in their order
    body: bytes = field(repr=False)
    root: str
    at: float  # time.monotonic()

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    def header(self, name: str) -> str | None:
        return next((value for known, value in self.headers if known == name), None)


@dataclass(frozen=True)
class Answer:
    """What is sent for one request, and how; the default is an empty, well-formed 200.

    `bills`: a picture is counted as billed when the request has arrived, whatever becomes of the answer.
    """

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    bills: bool = False
    raw: bytes | None = None  # sent instead of status line, headers and body
    framing: Literal["length", "chunked", "chunked-without-end", "close"] = "length"
    claimed_length: int | None = None  # instead of the true one
    hang_up: Literal["", "before-reading", "after-reading"] = ""
    cut_after: int | None = None  # bytes of the body (or of `raw`) after which the connection ends
    reset: bool = False  # end with RST instead of FIN
    delay_s: float = 0.0  # before the first byte
    dribble_head_s: float = 0.0  # pause after each byte of the head
    dribble_body_s: float = 0.0
    quick: int = 0  # bytes that are sent at once before dribbling begins
    repeat: bytes = b""  # sent behind the body again and again, for ever


Server = TypeVar("Server", bound="FaultServer")
Behaviour: TypeAlias = "Answer | Callable[[Received], Answer]"


# ---------------------------------------------------------------------------------------------------------------------
# Handy answers
# ---------------------------------------------------------------------------------------------------------------------


def json_answer(value: object, status: int = 200, **fields: Any) -> Answer:
    return typed(json.dumps(value).encode(), "application/json", status, **fields)


def typed(body: bytes, content_type: str, status: int = 200, **fields: Any) -> Answer:
    headers = (("Content-Type", content_type), *fields.pop("headers", ()))
    return Answer(status=status, headers=headers, body=body, **fields)


def good_body(link: str, **changes: Any) -> dict[str, Any]:
    """The service's answer with a picture; `changes` replace fields of `message` and, if known there, of the top."""
    message = {
        "role": "assistant",
        "content": [{"image": link}, {"text": "x"}],
        "reasoning_content": "",
    }
    top = {"request_id": "req-0001", "usage": {"width": 1024, "height": 1024, "image_count": 1}}
    top |= {name: changes.pop(name) for name in list(changes) if name in top}
    return top | {"output": {"choices": [{"finish_reason": "stop", "message": message | changes}]}}


def good(link: str = PICTURE, *, how: Answer | None = None, **changes: Any) -> Callable[[Received], Answer]:
    """A picture was made and billed. A link that begins with `/` leads to this server; `how` says how it is sent."""

    def answer(request: Received) -> Answer:
        body = good_body(request.root + link if link.startswith("/") else link, **changes)
        return replace(how or Answer(), body=json.dumps(body).encode(), bills=True)

    return answer


def good_text(change: Callable[[bytes], bytes], **fields: Any) -> Callable[[Received], Answer]:
    """A picture was made and billed, and the text of its answer was changed on the way."""

    def answer(request: Received) -> Answer:
        return Answer(body=change(json.dumps(good_body(request.root + PICTURE)).encode()), bills=True, **fields)

    return answer


def error(status: int, code: str, message: str = "it did not work", **fields: Any) -> Answer:
    """An error in the service's own form."""
    return json_answer({"code": code, "message": message, "request_id": "req-0002"}, status, **fields)


def html(status: int, text: str = "something in between", **fields: Any) -> Answer:
    """What a gateway says."""
    return typed(f"<html><body><h1>{status}</h1>{text}</body></html>".encode(), "text/html", status, **fields)


def oss_error(status: int, code: str, message: str) -> Answer:
    """An error of the vendor's file storage, where the pictures lie."""
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return typed(body.encode(), "application/xml", status)


def redirect(location: str, status: int = 302) -> Callable[[Received], Answer]:
    """A redirect; a location that begins with a single `/` stays on this server."""

    def answer(request: Received) -> Answer:
        stays = location.startswith("/") and not location.startswith("//")
        return Answer(status=status, headers=(("Location", request.root + location if stays else location),))

    return answer


def file(content: bytes, content_type: str = "image/png", **fields: Any) -> Answer:
    return typed(content, content_type, **fields)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures, whole and broken
# ---------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def drawn(kind: str = "PNG", width: int = 1024, height: int = 1024, colour: str = "teal") -> bytes:
    """A real image file, with enough in it that a half of it is no picture."""
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    image.paste(colour, (0, 0, max(1, width // 2), max(1, height // 2)))
    target = io.BytesIO()
    image.save(target, kind)
    return target.getvalue()


def png(width: int = 1024, height: int = 1024, colour: str = "teal") -> bytes:
    return drawn("PNG", width, height, colour)


@lru_cache(maxsize=1)
def noise_png() -> bytes:
    """A 1024*1024 PNG that no compression makes small: about 1 MiB."""
    image = Image.effect_noise((1024, 1024), 100)
    target = io.BytesIO()
    image.save(target, "PNG")
    return target.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, *extra: bytes, pixels: bytes | None = None) -> bytes:
    """A grey PNG put together by hand: any size, with extra chunks before its pixels."""
    rows = pixels if pixels is not None else zlib.compress(bytes((width + 1) * height))
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


# ---------------------------------------------------------------------------------------------------------------------
# The server
# ---------------------------------------------------------------------------------------------------------------------


class FaultServer:
    """Plays behaviours by path. What it counts may be read at any time from the test's thread.

    `tls`: it speaks TLS. `root`: how it is called where that is not by its address.
    """

    def __init__(self, tls: ssl.SSLContext | None = None, root: str = "") -> None:
        self._tls = tls
        self.requests: list[Received] = []  # all that arrived whole
        self.billed = 0  # pictures made
        self.connections = 0  # also those on which nothing arrived
        self._scripts: dict[str, list[Behaviour]] = {GENERATE: [good()]}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self.root = root or f"http{'s' if tls else ''}://127.0.0.1:{self.port}"
        self.base_url = f"{self.root}/api/v1"
        self._first_behaviour: Behaviour | None = None

    def __enter__(self: Server) -> Server:
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all connections; from here on the port refuses new ones."""
        if self._closing.is_set():
            return
        self._closing.set()
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), 1).close()  # wakes accept()
        self._acceptor.join(10)
        self._listener.close()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            threads = list(self._threads)
        for thread in threads:
            thread.join(10)

    def play(self, path: str, *behaviours: Behaviour) -> None:
        """What requests for a path get, one after the other; the last behaviour holds for all that follow.

        A path that ends in a slash stands for all that lie right below it and are not played themselves.
        """
        with self._lock:
            self._scripts[path] = list(behaviours)

    def at_connection(self, answer: Answer) -> None:
        """What every connection gets from now on before anything is read from it."""
        self._first_behaviour = answer

    @property
    def posts(self) -> list[Received]:
        """The requests that ask for a picture."""
        with self._lock:
            return [request for request in self.requests if request.method == "POST"]

    @property
    def downloads(self) -> list[Received]:
        with self._lock:
            return [request for request in self.requests if request.method != "POST"]

    def wait_until(self, condition: Callable[[], object], timeout: float = 30) -> None:
        """Poll until the condition holds."""
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, "what the test waits for did not happen"
            time.sleep(0.005)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            if self._closing.is_set():
                connection.close()
                return
            with self._lock:
                self.connections += 1
                self._open.add(connection)
                thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
                self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        reset = False
        try:
            connection.settimeout(HOLD_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._first_behaviour is not None:
                reset = self._first_behaviour_ends(connection)
                return
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
            request = self._read(connection)
            if request is None:
                return
            answer = self._answer_to(request)
            reset = answer.reset
            if answer.hang_up != "after-reading":
                self._send(connection, answer)
        except OSError:
            pass  # the client went, or the server closes: both are business as usual here
        finally:
            if reset:
                with contextlib.suppress(OSError):
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def _first_behaviour_ends(self, connection: socket.socket) -> bool:
        answer = self._first_behaviour
        assert isinstance(answer, Answer)
        if answer.hang_up != "before-reading":
            self._send(connection, answer)
        else:
            self._closing.wait(0.3)  # until connect() is over at the other side: else nothing has left there
        return answer.reset

    def _read(self, connection: socket.socket) -> Received | None:
        """One request, read whole; None where it never becomes whole."""
        data = bytearray()
        while b"\r\n\r\n" not in data:
            block = connection.recv(65536)
            if not block:
                return None
            data += block
        head, _, body = bytes(data).partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        pairs = [line.partition(":") for line in lines]
        headers = tuple((name.strip().lower(), value.strip()) for name, _, value in pairs)
        length = int(dict(headers).get("content-length", "0"))
        while len(body) < length:
            block = connection.recv(65536)
            if not block:
                return None
            body += block
        method, _, rest = first.partition(" ")
        return Received(method, rest.rpartition(" ")[0], headers, body, self.root, time.monotonic())

    def _answer_to(self, request: Received) -> Answer:
        with self._lock:
            folder = request.path.rpartition("/")[0] + "/"
            script = self._scripts.get(request.path) or self._scripts.get(folder)
            behaviour = None if script is None else script.pop(0) if len(script) > 1 else script[0]
        if behaviour is None:
            is_picture = request.path.startswith(PICTURE_FOLDER)
            behaviour = file(png()) if is_picture else html(404, "nothing of this name")
        answer = behaviour if isinstance(behaviour, Answer) else behaviour(request)
        with self._lock:
            self.billed += answer.bills
            self.requests.append(request)
        return answer

    def _send(self, connection: socket.socket, answer: Answer) -> None:
        if answer.delay_s and self._closing.wait(answer.delay_s):
            return
        if answer.raw is None:
            self._push(connection, self._head(answer), answer.dribble_head_s, answer.quick)
            body = self._framed(answer)
        else:
            body = answer.raw
        self._push(connection, body[: answer.cut_after], answer.dribble_body_s, answer.quick)
        while answer.repeat and not self._closing.is_set():
            connection.sendall(answer.repeat)
        if not answer.reset:
            self._end_gently(connection)

    @staticmethod
    def _head(answer: Answer) -> bytes:
        lines = [f"HTTP/1.1 {answer.status} Whatever", *(f"{name}: {value}" for name, value in answer.headers)]
        if answer.framing == "length":
            length = len(answer.body) if answer.claimed_length is None else answer.claimed_length
            lines.append(f"Content-Length: {length}")
        elif answer.framing != "close":
            lines.append("Transfer-Encoding: chunked")
        return "\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1", "replace")

    @staticmethod
    def _framed(answer: Answer) -> bytes:
        if not answer.framing.startswith("chunked"):
            return answer.body
        parts = [answer.body[start : start + 1000] for start in range(0, len(answer.body), 1000)]
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
        return chunks + (b"0\r\n\r\n" if answer.framing == "chunked" else b"")

    def _push(self, connection: socket.socket, data: bytes, pause_s: float, quick: int) -> None:
        if not pause_s:
            connection.sendall(data)
            return
        connection.sendall(data[:quick])
        for byte in data[quick:]:
            connection.sendall(bytes([byte]))
            if self._closing.wait(pause_s):
                return

    @staticmethod
    def _end_gently(connection: socket.socket) -> None:
        """Close so that what was sent arrives even where not all of the request was read."""
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(5)
        while connection.recv(65536):
            pass
