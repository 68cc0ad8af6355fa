"""A proxy that breaks the byte stream between the program and the mock service, at one position and in one way.

    with MockServer(rpm=0) as mock, Proxy(mock, Break("download", "chunk", "reset")) as proxy:
        ...                      # the program is pointed at proxy.root
        proxy.heal()             # from here on everything passes

It ends TLS itself where it is given a certificate, so that the places within a request and an answer are the same with
it and without. An answer is taken from the mock whole, its links are made to lead through here, and it is framed anew
as the break says. What was sent to the client of what was paid for is in `sent`.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import re
import socket
import ssl
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, TypeAlias

from mock_server import MockServer

Stage: TypeAlias = Literal["ask", "paid", "poll", "download"]  # ask: what the server is, before it is paid
# Where, in the order in which a connection comes to it. Of TLS alone: hello, handshake, record.
TLS_PLACES = ("hello", "handshake")
REQUEST_PLACES = ("request-line", "request-headers", "request-body", "request", "made")
HEAD_PLACES = ("status", "status-end", "headers", "headers-end")
BODY_PLACES = ("link", "link-end", "body", "body-last")
CHUNK_PLACES = ("chunk-size", "chunk", "chunk-link", "chunk-gap", "last-chunk", "trailer")
# What is not broken off but spoilt, and goes on.
GARBLES = (
    "flip-status",
    "flip-header",
    "flip-body",
    "flip-size",
    "garbage",
    "twice",
    "continue",
    "hints",
    "short-length",
    "dribble",
)
STILL_GOOD = ("flip-header", "twice", "continue", "hints")
DRIBBLE_S = 0.1  # a byte: not even the head comes in time
HOLD_S = 60.0  # longer than any command of these tests


class Break(NamedTuple):
    """`act` at a place: close (FIN), reset (RST), half (FIN, and goes on reading), stall, notify (TLS's own word).

    Or one of GARBLES, which has no place. `times`: for so many connections of the stage.
    """

    stage: Stage
    place: str
    act: str
    framing: Literal["length", "chunked", "close"] = "length"
    times: int = 1_000_000


class Gone(Exception):
    """This connection has come to its end."""


class Line:
    """One connection from the program; with a context it is a TLS server's side, whose raw bytes are at hand."""

    def __init__(self, connection: socket.socket, context: ssl.SSLContext | None) -> None:
        self.socket = connection
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=True) if context else None

    def handshake(self, at: Callable[[str], None]) -> None:
        """Greet; `at` is told of the places on the way."""
        if self._tls is None:
            return
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                flight = self._out.read()
                self.socket.sendall(flight[: len(flight) // 2])
                if flight:
                    at("handshake")
                self.socket.sendall(flight[len(flight) // 2 :])
                self._take()
                at("hello")
        self.socket.sendall(self._out.read())

    def _take(self) -> None:
        got = self.socket.recv(65536)
        if not got:
            raise Gone
        self._in.write(got)

    def read(self, most: int) -> bytes:
        """Bytes of the program's, or none at their end."""
        if self._tls is None:
            return self.socket.recv(most)
        while True:
            try:
                return self._tls.read(most)
            except ssl.SSLWantReadError:
                try:
                    self._take()
                except Gone:
                    return b""
            except ssl.SSLZeroReturnError:
                return b""

    def sealed(self, data: bytes) -> bytes:
        """What goes over the wire for these bytes."""
        if self._tls is None or not data:
            return data
        self._tls.write(data)
        return self._out.read()

    def write(self, data: bytes) -> None:
        self.socket.sendall(self.sealed(data))

    def notify(self) -> None:
        """Say in TLS that nothing more will come."""
        if self._tls is not None:
            with contextlib.suppress(ssl.SSLError):
                self._tls.unwrap()
            self.socket.sendall(self._out.read())


class Answer:
    """An answer as bytes, and where in them the places are."""

    def __init__(self, status: int, headers: list[tuple[str, str]], body: bytes, framing: str) -> None:
        status_line = f"HTTP/1.1 {status} {http.client.responses.get(status, '')}\r\n".encode()
        self.length = f"{len(body):d}".encode()
        fields = [f"{name}: {value}" for name, value in headers]
        fields += {"length": [f"Content-Length: {len(body)}"], "chunked": ["Transfer-Encoding: chunked"]}.get(
            framing, []
        )
        self.head = status_line + "\r\n".join([*fields, "Connection: close", "", ""]).encode("latin-1")
        self.places = {
            "status": 6,
            "status-end": len(status_line),
            "headers": (len(status_line) + len(self.head)) // 2,
            "headers-end": len(self.head),
        }
        start = len(self.head)
        if framing == "chunked":
            framed = self._chunked(body, start)
        else:
            framed = body
            self.places |= {"body": start + len(body) // 2, "body-last": start + len(body) - 1}
            if found := WORTH.search(body):
                # Of the name of a task that is a number, what stands before its last digits is one, too.
                self.places |= {"link": start + found.end() - (3 if found[0][-1:].isdigit() else 8)}
                self.places |= {"link-end": start + found.end() + 1}
        self.bytes = self.head + framed
        self.places["end"] = len(self.bytes)

    def _chunked(self, body: bytes, start: int) -> bytes:
        found = WORTH.search(body)
        # What it is worth comes within one chunk, with a little behind it.
        cuts = (len(body) // 3, 2 * len(body) // 3)
        if found:
            cuts = (min(20, found.start()), min(found.end() + 10, len(body) - 1))
        parts = body[: cuts[0]], body[cuts[0] : cuts[1]], body[cuts[1] :]
        chunks = [b"%x\r\n%s\r\n" % (len(part), part) for part in parts]
        gap = start + len(chunks[0])
        end = start + sum(map(len, chunks))
        self.places |= {"chunk-gap": gap, "chunk-size": gap + 1, "chunk": gap + len(chunks[1]) // 2}
        self.places |= {"last-chunk": end + 1, "trailer": end + 8}
        if found:
            self.places["chunk-link"] = end - len(chunks[2]) - 2 - (cuts[1] - found.end() - 1)
        return b"".join(chunks) + b"0\r\nX-Sum: none\r\n\r\n"

    def spoilt(self, how: str) -> bytes:
        """The whole answer with one of GARBLES done to it."""
        data = bytearray(self.bytes)
        if how == "flip-status":
            data[9] ^= 1  # 200 becomes 300
        elif how == "flip-header":
            data[data.index(b"Content-Length")] ^= 1
        elif how == "flip-size":
            data[self.places["chunk-size"]] ^= 0x40
        elif how == "flip-body":
            start = len(self.head)
            *_, found = [None, *WORTH.finditer(self.bytes, start)]  # the last: a task is named beside its link
            # A bit in the pixels of a JPEG makes another picture, which nobody can tell: there it is one of its header.
            body_is_jpeg = self.bytes[start : start + 2] == b"\xff\xd8"
            data[start + 2 if body_is_jpeg else found.end() - 3 if found else (start + len(data)) // 2] ^= 1
        elif how == "short-length":
            data = bytearray(self.bytes.replace(b"Content-Length: " + self.length, b"Content-Length: 100", 1))
        extra = {
            "garbage": b"\x15\x03\x01\x00\x02\x02\x46" * 9 + b"\r\n",
            "twice": bytes(data),
            "continue": b"HTTP/1.1 100 Continue\r\n\r\n",
            "hints": b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n",
        }
        return extra.get(how, b"") + bytes(data)


# What an answer is worth: the link, the name of the task, the picture itself.
WORTH = re.compile(
    rb'"(?:image|url|task_id|prompt_id|b64_json|filename)": "[^"]+|"task_id": [0-9]+'
    rb'|"(?:response|output_images)": \["[^"]+|"images": \["[^"]{100,}'
)
WORTH_WHOLE = re.compile(
    rb'"(?:image|url|task_id|b64_json|response|output_images)": \[?"[^"]+"'
    rb'|"task_id": [0-9]+[,}]|"images": \["[^"]{100,}"'
)


class Proxy:
    """`at` is called when the position is reached. All that it knows may be read from the test's thread.

    `questions`: how many a program asks of a server that answers them, before its first paid call.
    """

    def __init__(
        self,
        mock: MockServer,
        fault: Break | None,
        context: ssl.SSLContext | None = None,
        at: Callable[[], None] = lambda: None,
        questions: int = 0,
    ) -> None:
        self._mock, self._context = mock, context
        self.fault, self.at = fault, at
        self.left = fault.times if fault else 0
        self.reached = threading.Event()
        self.reached_at = 0.0
        self.sent: list[tuple[bytes, bytes]] = []  # requests of paid calls and questions, and what was sent for them
        self.keys_seen: dict[str, int] = {}  # by stage, requests with an Authorization
        self._questions = questions  # still to come
        self._stage: Stage = "ask" if questions else "paid"  # of the next connection
        self._closing, self._healed = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._open: set[socket.socket] = set()
        self._holder = self._bound(0)  # keeps the port while it refuses connections
        self.port: int = self._holder.getsockname()[1]
        self.root = f"{'https' if context else 'http'}://127.0.0.1:{self.port}"
        self._listener: socket.socket | None = None

    def __enter__(self) -> Proxy:
        if self._refuses(self._stage):
            self._hit()
        else:
            self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._healed.set()
        self._deaf()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        self._holder.close()

    def heal(self) -> None:
        """From now on everything passes."""
        self.fault = None
        self._healed.set()
        if self._listener is None:
            self._listen()

    @property
    def arrived(self) -> bool:
        """Whether the client was sent, whole and unspoilt, what its money was worth: link, task or picture."""
        return any(WORTH_WHOLE.search(sent) for _, sent in self.sent)

    # Connections ------------------------------------------------------------------------------------------------------

    @staticmethod
    def _bound(port: int) -> socket.socket:
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(("127.0.0.1", port))
        return made

    def _refuses(self, stage: Stage) -> bool:
        return self.fault is not None and self.fault.stage == stage and self.fault.place == "refuse"

    def _listen(self) -> None:
        self._listener = self._bound(self.port)
        self._listener.listen(64)
        thread = threading.Thread(target=self._accept, args=(self._listener,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _deaf(self) -> None:
        """Refuse connections."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            with self._lock:
                self._open.add(connection)
                self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(HOLD_S)
        line = Line(connection, self._context)
        try:
            with self._lock:
                before = self._break_for(self._stage)
            self._at(line, before, "connect")
            line.handshake(lambda place: self._at(line, before, place))
            self._exchange(line)
            line.notify()
        except (Gone, OSError, http.client.HTTPException):
            pass  # it was ended on purpose, or the program went
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def _break_for(self, stage: Stage) -> Break | None:
        return self.fault if self.fault and self.fault.stage == stage and self.left > 0 else None

    # The break --------------------------------------------------------------------------------------------------------

    def _hit(self) -> bool:
        """Whether this connection is one of those to be broken; then it is counted."""
        with self._lock:
            if self.left <= 0 or self.fault is None:
                return False
            self.left -= 1
        self.reached_at = self.reached_at or time.monotonic()
        self.reached.set()
        self.at()
        return True

    def _at(self, line: Line, fault: Break | None, place: str) -> None:
        """Do what is to be done if this is the place. Raises Gone where that ends the connection."""
        if fault is None or fault.place != place or not self._hit():
            return
        if place in ("connect", *TLS_PLACES):
            self._stage = "paid" if self._stage == "ask" else self._stage  # whoever does not answer is asked no more
        connection = line.socket
        if fault.act == "reset":
            emptied(connection)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()  # now: what is closed with the thread may be late
        elif fault.act == "notify":
            line.notify()
        elif fault.act in ("half", "stall"):
            if fault.act == "half":
                connection.shutdown(socket.SHUT_WR)
            self._hold(line)
        raise Gone

    def _hold(self, line: Line) -> None:
        """Until the program goes, or all is to be well."""
        line.socket.settimeout(0.05)
        while not self._healed.is_set():
            with contextlib.suppress(TimeoutError):
                if not line.socket.recv(65536):
                    return

    # One exchange -----------------------------------------------------------------------------------------------------

    def _exchange(self, line: Line) -> None:
        data = bytearray()
        fault: Break | None = None
        looked = False
        for data in self._growing(line):
            if not looked and (b"\n" in data or len(data) >= LOOKED_AT):
                looked, fault = True, self._break_for(stage_of(bytes(data)))
            head = data.find(b"\r\n\r\n")
            if len(data) == 20:
                self._at(line, fault, "request-line")
            elif head < 0 and data.find(b"\r\n") == len(data) - 12:
                self._at(line, fault, "request-headers")
            elif head >= 0 and len(data) - head - 4 == max(1, length_of(bytes(data[:head])) // 2):
                self._at(line, fault, "request-body")
        request = bytes(data)
        stage = stage_of(request)
        if b"\nauthorization:" in request.lower():
            self.keys_seen[stage] = self.keys_seen.get(stage, 0) + 1
        self._at(line, fault, "request")
        answer = self._ask(request, fault.framing if fault else "length")
        self._at(line, fault, "made")
        self._answer(line, answer, fault, stage, request)

    def _growing(self, line: Line) -> Iterator[bytearray]:
        """The request so far, byte by byte, until it is whole."""
        data = bytearray()
        while True:
            got = line.read(1)
            if not got:
                raise Gone
            data += got
            yield data
            head = data.find(b"\r\n\r\n")
            if head >= 0 and len(data) >= head + 4 + length_of(bytes(data[:head])):
                return

    def _ask(self, request: bytes, framing: str) -> Answer:
        head, _, body = request.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ")
        upstream = http.client.HTTPConnection("127.0.0.1", self._mock.server_port, timeout=30)
        with contextlib.closing(upstream):
            upstream.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
            for line in lines:
                name, _, value = line.partition(":")
                upstream.putheader(name, value.strip())
            upstream.endheaders(body)
            reply = upstream.getresponse()
            content = reply.read()
        known = f"http://127.0.0.1:{self._mock.server_port}".encode()
        left_out = ("content-length", "connection", "date", "server")
        headers = [(name, value) for name, value in reply.getheaders() if name.lower() not in left_out]
        return Answer(reply.status, headers, content.replace(known, self.root.encode()), framing)

    def _answer(self, line: Line, answer: Answer, fault: Break | None, stage: Stage, request: bytes) -> None:
        if stage == "ask":
            self._questions -= 1
            self._goes_on_with("ask" if self._questions > 0 else "paid", after=stage)
        elif stage != "download" and answer.bytes.startswith(b"HTTP/1.1 200"):
            leads_on = b"/files/" in answer.bytes or b'"filename": ' in answer.bytes
            self._goes_on_with("download" if leads_on else "poll", after=stage)
        place = fault.place if fault else ""
        if fault and place == "record":
            self._break_record(line, answer, fault)
        elif place in GARBLES and self._hit():
            self._spoil(line, answer, place)
            if place in STILL_GOOD:
                self._note(stage, request, answer.bytes)
        else:
            end = answer.places.get(place, len(answer.bytes))
            line.write(answer.bytes[:end])
            self._note(stage, request, answer.bytes[:end])
            if place in answer.places:
                self._at(line, fault, place)
            line.write(answer.bytes[end:])  # it was the turn of another connection
            self._note(stage, request, answer.bytes)

    def _note(self, stage: Stage, request: bytes, sent: bytes) -> None:
        if stage in ("paid", "poll"):
            self.sent.append((request, sent))

    def _goes_on_with(self, stage: Stage, after: Stage) -> None:
        self._stage = stage
        if self._refuses(stage) and stage != after:
            self._deaf()
            self._hit()

    def _break_record(self, line: Line, answer: Answer, fault: Break) -> None:
        """Break within what TLS has sealed."""
        sealed = bytearray(line.sealed(answer.bytes))
        middle = len(sealed) // 2
        if fault.act == "flip-body" and self._hit():
            sealed[middle] ^= 1
        line.socket.sendall(sealed[:middle])
        if fault.act != "flip-body":
            self._at(line, fault, "record")
        line.socket.sendall(sealed[middle:])

    def _spoil(self, line: Line, answer: Answer, how: str) -> None:
        data = answer.spoilt(how)
        if how != "dribble":
            line.write(data)
            return
        for number in range(len(data)):
            line.write(data[number : number + 1])
            if self._healed.wait(DRIBBLE_S):
                return


def emptied(connection: socket.socket) -> None:
    """Wait until what was sent has arrived: the end by RST throws the rest away."""
    end = time.monotonic() + 1
    waiting = struct.pack("i", 0)
    while time.monotonic() < end:
        if not struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, waiting))[0]:
            return
        time.sleep(0.002)


# How requests begin; all others ask what a server is.
STAGES: tuple[tuple[bytes, Stage], ...] = (
    (b"POST ", "paid"),
    (b"GET /api/status", "poll"),
    (b"GET /modelscope/v1", "poll"),
    (b"GET /comfyui/hist", "poll"),
    (b"GET /comfyui/queue", "poll"),
    (b"GET /comfyui/view", "download"),
    (b"GET /files/", "download"),
)
LOOKED_AT = max(len(start) for start, _ in STAGES)  # bytes


def stage_of(request: bytes) -> Stage:
    return next((stage for start, stage in STAGES if request.startswith(start)), "ask")


def length_of(head: bytes) -> int:
    found = re.search(rb"(?i)\ncontent-length: *([0-9]+)", head)
    return int(found[1]) if found else 0
