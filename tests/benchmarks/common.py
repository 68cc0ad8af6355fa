"""What the benchmarks of the batch share: a fast service that keeps a record of every call, and the batch as a process.

The mock service draws a picture for every call and remembers the last hundred; these benchmarks need one that costs
next to nothing and forgets nothing. It runs in the threads of the process that measures, which else only waits.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

from PIL import Image

SCRIPTS = Path(__file__).resolve().parents[2] / "skills/ai/image/alicloud-ai-image-zimage-turbo/scripts"
GENERATE = "/api/v1/services/aigc/multimodal-generation/generation"
FILES = "/files/"
TEST_KEY = "sk-test-0123456789abcdef"
LINK_LIFE_S = 24 * 3600

# Outcomes of a call, by what its client can know.
GOOD = ("ok", "image-500", "image-cut")  # billed, answered; the last two suffer at the first download
BEGUN = ("cut-answer",)  # billed; its link had arrived whole unless a kill was in time
UNUSABLE = ("image-corrupt",)  # billed, answered, and the picture is damaged for good
UNKNOWABLE = ("hangup-after", "cut-answer", "502", "504", "timeout", "hangup-before", "no-image")
NOT_BILLED = ("429", "500", "503")  # surely not: sent again
REFUSED = ("blocked",)
FAULTS = (*GOOD[1:], *UNUSABLE, *UNKNOWABLE, *NOT_BILLED, *REFUSED)
BILLED = (*GOOD, *UNUSABLE, "hangup-after", "cut-answer", "502", "504", "timeout")

ERRORS = {
    "429": (429, "Throttling.RateQuota"),
    "500": (500, "InternalError"),
    "503": (503, "ServiceUnavailable"),
    "timeout": (500, "RequestTimeOut"),
    "blocked": (400, "DataInspectionFailed"),
}


# ---------------------------------------------------------------------------------------------------------------------
# The service
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """One request for a picture that arrived whole. Moments are of time.monotonic()."""

    arrived: float
    prompt: str
    seed: int
    outcome: str
    answered: float | None = None  # when all of the answer had been handed to the network
    downloads: int = 0

    @property
    def billed(self) -> bool:
        return self.outcome in BILLED


class Limit:
    """A limit of R calls a second in all the ways that services count, together.

    A bucket that holds a second's worth and refills steadily, R in any second, and 60 R in any minute.
    """

    def __init__(self, per_second: int) -> None:
        self._rate = per_second
        self._bucket = float(per_second)
        self._filled_at = time.monotonic()
        self._windows = ((1.0, per_second, deque[float]()), (60.0, 60 * per_second, deque[float]()))

    def wait(self, now: float) -> float:
        """0 lets a call through; else the seconds until one would pass."""
        self._bucket = min(float(self._rate), self._bucket + (now - self._filled_at) * self._rate)
        self._filled_at = now
        wait = (1 - self._bucket) / self._rate
        for length, most, admitted in self._windows:
            while admitted and admitted[0] <= now - length:
                admitted.popleft()
            if len(admitted) >= most:
                wait = max(wait, admitted[0] + length - now)
        if wait > 0:
            return wait
        self._bucket -= 1
        for _, _, admitted in self._windows:
            admitted.append(now)
        return 0.0


@dataclass
class Service:
    """DashScope's protocol on loopback, from bytes that are there before the first call.

    A thread each waits for connections, and keeps one until its client ends it. The picture of a call is one of
    `pictures` with the prompt's hash in it, so that no two saved files are the same.
    """

    pictures: Sequence[bytes]
    latency_s: Callable[[], float] = lambda: 0.0
    fault: Callable[[], str] = lambda: "ok"
    limit: Limit | None = None
    says_when: bool = True  # refusals carry Retry-After
    workers: int = 128
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.root = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.base_url = f"{self.root}/api/v1"
        self._threads = [threading.Thread(target=self._accept, daemon=True) for _ in range(self.workers)]

    def __enter__(self) -> Service:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._closing.set()
        with self._lock:
            sockets = [self._listener, *self._open]
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(timeout=10)
        self._listener.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._open.add(connection)
            with connection, contextlib.suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._serve(connection)
            with self._lock:
                self._open.discard(connection)

    def _serve(self, connection: socket.socket) -> None:
        buffer = bytearray()
        stays = asked_to_stay = True
        while stays and asked_to_stay and not self._closing.is_set():
            while b"\r\n\r\n" not in buffer:
                block = connection.recv(65536)
                if not block:
                    return
                buffer += block
            head, _, rest = bytes(buffer).partition(b"\r\n\r\n")
            method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
            length = 0
            for line in head.split(b"\r\n")[1:]:
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
                elif name.lower() == b"connection":
                    asked_to_stay = value.strip().lower() != b"close"
            body = bytearray(rest)
            while len(body) < length:
                block = connection.recv(65536)
                if not block:
                    return
                body += block
            buffer = body[length:]
            if method == "POST" and target == GENERATE:
                stays = self._generate(connection, json.loads(body[:length]))
            elif method == "GET" and target.startswith(FILES):
                stays = self._download(connection, int(target.removeprefix(FILES).partition(".")[0]))
            else:
                connection.sendall(http(404, b"nothing of this name", "text/plain"))

    def _generate(self, connection: socket.socket, request: dict[str, Any]) -> bool:
        """Answer one call for a picture; returns whether the connection stays open."""
        prompt, parameters = request["input"]["messages"][0]["content"][0]["text"], request["parameters"]
        with self._lock:
            now = time.monotonic()
            wait = self.limit.wait(now) if self.limit else 0.0
            outcome = "429" if wait else self.fault()
            call = Call(now, prompt, parameters["seed"], outcome)
            number = len(self.calls)
            self.calls.append(call)
            latency = self.latency_s()
        if outcome != "429":
            time.sleep(latency)
        if outcome.startswith("hangup"):
            return False
        answer, stays = self._answer(number, call, parameters["size"], wait)
        connection.sendall(answer)
        call.answered = time.monotonic()
        return stays

    def _answer(self, number: int, call: Call, size: str, wait: float) -> tuple[bytes, bool]:
        if call.outcome in ERRORS:
            status, code = ERRORS[call.outcome]
            more = f"Retry-After: {max(1, round(wait + 0.5))}\r\n" if wait and self.says_when else ""
            error = {"code": code, "message": "it did not work", "request_id": f"req-{number}"}
            return http(status, json.dumps(error).encode(), more=more), True
        if call.outcome in ("502", "504"):
            return http(int(call.outcome), b"<html><h1>something in between</h1></html>", "text/html"), True
        link = f"{self.root}{FILES}{number}.png?Expires={int(time.time()) + LINK_LIFE_S}&Signature=none"
        width, height = size.split("*")
        content = [{"image": link}, {"text": call.prompt}]
        message = {"role": "assistant", "content": content[call.outcome == "no-image" :], "reasoning_content": ""}
        answer = {
            "request_id": f"req-{number}",
            "output": {"choices": [{"finish_reason": "stop", "message": message}]},
            "usage": {"width": int(width), "height": int(height), "image_count": 1},
        }
        whole = http(200, json.dumps(answer).encode())
        return (whole[: len(whole) - 100], False) if call.outcome == "cut-answer" else (whole, True)

    def _download(self, connection: socket.socket, number: int) -> bool:
        call = self.calls[number]
        with self._lock:
            call.downloads += 1
            first = call.downloads == 1
        picture = marked(self.pictures[number % len(self.pictures)], call.prompt)
        if call.outcome == "image-500" and first:
            connection.sendall(http(500, b"<Error><Code>InternalError</Code></Error>", "application/xml"))
            return True
        if call.outcome == "image-corrupt":
            middle = len(picture) // 2
            damaged = bytes(255 - byte for byte in picture[middle : middle + 16])
            picture = picture[:middle] + damaged + picture[middle + 16 :]
        answer = http(200, picture, "image/png")
        cut = call.outcome == "image-cut" and first
        connection.sendall(answer[: len(answer) - len(picture) // 2] if cut else answer)
        return not cut

    def has_seen(self, calls: int) -> bool:
        return len(self.calls) >= calls

    def billed(self) -> Counter[str]:
        """How many pictures were made and billed, by prompt."""
        with self._lock:
            return Counter(call.prompt for call in self.calls if call.billed)

    def environment(self, home: Path) -> dict[str, str]:
        """What a client of this service needs, and nothing else of this machine."""
        kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        addresses = {"DASHSCOPE_BASE_URL": self.base_url, "DASHSCOPE_HTTP_BASE_URL": self.base_url}
        return kept | addresses | {"HOME": str(home), "DASHSCOPE_API_KEY": TEST_KEY}


def http(status: int, body: bytes, kind: str = "application/json", more: str = "") -> bytes:
    head = f"HTTP/1.1 {status} Whatever\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------

PNG_HEAD = 8 + 25  # signature and header chunk


def mark_of(prompt: str) -> bytes:
    return b"Comment\0" + hashlib.sha256(prompt.encode()).hexdigest().encode()


def marked(png: bytes, prompt: str) -> bytes:
    """A PNG with the prompt's hash in it: whether a file is the picture of its prompt can be seen."""

    text = b"tEXt" + mark_of(prompt)
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    return b"".join((png[:PNG_HEAD], chunk, png[PNG_HEAD:]))


def flat(colour: str, side: int = 512) -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(target, "PNG")
    return target.getvalue()


def flats() -> list[bytes]:
    """Pictures that cost next to nothing to send and to decode."""
    return [flat(colour) for colour in ("teal", "maroon", "olive", "navy", "orange", "gray", "black", "white")]


# ---------------------------------------------------------------------------------------------------------------------
# The batch
# ---------------------------------------------------------------------------------------------------------------------


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    peak_mb: float
    cpu_s: float

    @property
    def json(self) -> dict[str, Any]:
        value = json.loads(self.stdout)
        if not isinstance(value, dict):
            fail(f"no JSON object on standard output: {self.stdout[:500]}")
        return value


def batch_command(*arguments: str | Path) -> list[str]:
    return [sys.executable, str(SCRIPTS / "generate_batch.py"), *map(str, arguments)]


def run(command: Sequence[str], env: dict[str, str], folder: Path) -> Ended:
    """Run a process to its end; its time, and the most memory it had."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        stdout.seek(0)
        stderr.seek(0)
        peak = usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3 / 1.024)
        cpu = usage.ru_utime + usage.ru_stime
        texts = (stdout.read().decode(), stderr.read().decode())
        return Ended(process.returncode, *texts, seconds, peak, cpu)


def write_rows(path: Path, rows: Iterator[dict[str, Any]]) -> Path:
    with open(path, "w", encoding="utf-8") as target:
        target.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@contextlib.contextmanager
def working_folder(given: str | None) -> Iterator[Path]:
    """A new folder inside the given one, else inside that for temporary files; it goes in the end."""
    with tempfile.TemporaryDirectory(prefix="batch-", dir=given) as folder:
        yield Path(folder)


# ---------------------------------------------------------------------------------------------------------------------
# What is printed
# ---------------------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns as wide as they must be: the first to the left, the others to the right."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        first, *others = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join([line[0].ljust(len(first)), *others]), flush=True)


def fail(*reasons: str) -> NoReturn:
    """A promise was broken: say which, and end."""
    for reason in reasons:
        print(f"BROKEN: {reason}", file=sys.stderr)
    sys.exit(1)
