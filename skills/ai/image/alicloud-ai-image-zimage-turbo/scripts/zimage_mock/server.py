"""The server: all services on one loopback port."""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from zimage_mock.comfyui import ComfyUI
from zimage_mock.dashscope import DashScope
from zimage_mock.exchange import Reply, Request
from zimage_mock.faults import COMMON_FAULTS, Fault, fault_plan
from zimage_mock.gallery import Gallery
from zimage_mock.ledger import Ledger
from zimage_mock.modelscope import ModelScope
from zimage_mock.openai import OpenAI
from zimage_mock.provider import Provider, Studio
from zimage_mock.sdapi import SdApi
from zimage_mock.service import Service
from zimage_mock.zimageturbo import ZImageTurbo

MAX_BODY_BYTES = 1024 * 1024
DEFAULT_RPM = 120  # requests a minute and account: the vendor's model page, 2026
DEFAULT_LINK_TTL_S = 24 * 3600
# The first whose prefix fits answers: /api/v1/ before /api/.
PROVIDERS: Sequence[type[Provider]] = (DashScope, ZImageTurbo, ModelScope, OpenAI, SdApi, ComfyUI)
FAULTS: dict[str, Fault] = dict(COMMON_FAULTS)
for _provider in PROVIDERS:
    FAULTS |= _provider.own_faults


def services_that_know(fault: str) -> list[str]:
    """The services to which this fault means something."""
    return [provider.dialect.service for provider in PROVIDERS if fault in provider.faults()]


class MockServer(ThreadingHTTPServer):
    """The services on a loopback port, served from background threads between `start` and `close`.

    Args: `latency` of a picture in seconds; `rpm` requests a minute to each vendor, 0 for no limit; `faults` as for
    --fault; `link_ttl` in seconds; `api_key` empty for a random one; `log` gets one short line for each request.
    Raises ValueError for a setting out of bounds, OSError when the port cannot be had.
    """

    daemon_threads = True
    request_queue_size = 128
    allow_reuse_address = os.name != "nt"  # on Windows it would share a port that another program serves

    poll_s = 0.05  # until close() is heard

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        latency: float = 0.0,
        rpm: int = DEFAULT_RPM,
        faults: str = "",
        link_ttl: float = DEFAULT_LINK_TTL_S,
        api_key: str = "",
        log: Callable[[str], object] = lambda line: None,
    ) -> None:
        for name, value, top in (
            ("port", port, 65535),
            ("latency", latency, 3600),
            ("rpm", rpm, 1_000_000),
            ("link-ttl", link_ttl, 365 * 24 * 3600),
        ):
            if not 0 <= value <= top:
                raise ValueError(f"{name} must be from 0 to {top}, not {value}")
        if not re.fullmatch(r"[!-~]{0,200}", api_key):
            raise ValueError("api-key must be 1 to 200 printable ASCII characters without blanks")
        self.api_key = api_key or f"sk-mock-{secrets.token_hex(16)}"
        self._log = log
        plan = fault_plan(faults, FAULTS)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        super().__init__((_loopback(host), port), _Handler)
        root = f"http://{self.server_name}:{self.server_port}"
        self.base_url, self.zimageturbo_url, self.openai_url, self.sdapi_url, self.comfyui_url = (
            f"{root}{provider.prefix}".rstrip("/") for provider in (DashScope, ZImageTurbo, OpenAI, SdApi, ComfyUI)
        )
        self.modelscope_url = f"{root}{ModelScope.root}"
        self.endpoint = f"{root}{DashScope.generation_path}"
        self.stats_url = f"{root}{Ledger.stats_path}"
        rate_codes = {provider.dialect.codes["429"][1] for provider in PROVIDERS}
        self._ledger = Ledger(DashScope.dialect, rate_codes)
        gallery = Gallery(root, link_ttl, self._ledger)
        pause = partial(self._stopping.wait, latency)
        studio = Studio(self.api_key, plan, rpm, gallery, self._ledger, latency, pause)
        providers = (provider(studio) for provider in PROVIDERS)
        self._services: Sequence[Service] = (*providers, gallery, self._ledger)

    def start(self) -> MockServer:
        """Serve from a background thread."""
        self._thread = threading.Thread(target=self.serve_forever, args=(self.poll_s,), daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop serving, free the port, let waiting answers go."""
        self._stopping.set()
        if self._thread:
            self.shutdown()
            self._thread.join()
        self.server_close()

    def __enter__(self) -> MockServer:
        return self.start()

    def __exit__(self, *args: object) -> None:
        self.close()

    def stats(self) -> dict[str, Any]:
        """What GET /mock/stats answers."""
        return self._ledger.snapshot()

    def service(self, path: str) -> Service:
        """Who answers for a path."""
        return next(service for service in self._services if f"{path}/".startswith(service.prefix))

    def answer(self, request: Request) -> Reply:
        """The reply to one request, counted and logged."""
        service = self.service(request.path)
        try:
            reply = service.answer(request)
        except Exception as problem:  # a mistake in here must not end a rehearsal: say so, go on
            reply = service.dialect.refused("500", f"mock_server.py: {problem!r}")
        if request.path == Ledger.stats_path:
            return reply
        self._ledger.record(request, reply)
        notes = " ".join(filter(None, (reply.code, "billed" if reply.billed else "")))
        path = re.sub(r"[^!-~]", "?", request.path[:120])
        self._log(f"{time.strftime('%H:%M:%S')} {request.method} {path} {reply.status or 'no answer'} {notes}".rstrip())
        return reply

    def rest(self, seconds: float) -> bool:
        """Wait; true when the server stops meanwhile."""
        return self._stopping.wait(seconds)

    def server_bind(self) -> None:
        """Bind without the look-up of the host's full name, which can take seconds without a network."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no event; anything else is one line, no traceback."""
        problem = sys.exc_info()[1]
        if not isinstance(problem, ConnectionError):
            self._log(f"connection dropped: {problem!r}")


def _loopback(host: str) -> str:
    address = "127.0.0.1" if host == "localhost" else host
    try:
        if ipaddress.IPv4Address(address).is_loopback:
            return address
    except ValueError:
        pass
    raise ValueError(f"host must be localhost or an address 127.x.x.x, not {host!r}: the mock serves this machine only")


class _Handler(BaseHTTPRequestHandler):
    """Reads a request whole, writes a reply in the way that it asks for."""

    protocol_version = "HTTP/1.1"
    server_version = "mock-image-service"
    timeout = 75  # seconds without a byte, then the connection is closed
    disable_nagle_algorithm = True
    server: MockServer

    def do_GET(self) -> None:
        """Answer a request of any method."""
        try:
            body = self._read_body()
            url = urlsplit(self.path)
            query = dict(parse_qsl(url.query))
        except ValueError as problem:
            self._send(self.server.service(self.path).dialect.refused("400", str(problem)))
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        self._send(self.server.answer(Request(self.command, self.path, url.path, query, headers, body)))

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_GET

    def _read_body(self) -> bytes:
        length = self.headers.get("Content-Length", "0")
        if "transfer-encoding" in self.headers or not re.fullmatch(r"[0-9]{1,8}", length):
            self.close_connection = True  # where the body ends is not known
            raise ValueError("a body needs a Content-Length below 100 MB, and no Transfer-Encoding")
        body, left = b"", int(length)
        while left:
            # A body that is too big is read to its end all the same, else the client would not see the answer.
            part = self.rfile.read(min(left, MAX_BODY_BYTES))
            if not part:
                raise ConnectionAbortedError("the client left within its body")
            body, left = part, left - len(part)
        if int(length) > MAX_BODY_BYTES:
            raise ValueError(f"the body has {length} bytes, at most {MAX_BODY_BYTES} are taken")
        return body

    def _send(self, reply: Reply) -> None:
        if reply.delivery != "whole":
            self.close_connection = True
        if reply.delivery == "hangup":
            return
        self.send_response(reply.status)
        headers = {"Content-Type": reply.content_type, "Content-Length": str(len(reply.body)), **reply.headers}
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if reply.delivery == "dribble":
            for byte in reply.body:
                self.wfile.write(bytes([byte]))
                if self.server.rest(0.05):
                    break
        else:
            self.wfile.write(reply.body[: len(reply.body) // 2] if reply.delivery == "half" else reply.body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class says to garbage and unknown methods, in the service's form."""
        self.close_connection = True
        if code == 501:  # an unknown method; its path has been read
            dialect = self.server.service(self.path).dialect
            self._send(dialect.error(405, "MethodNotAllowed", message or "No such method."))
        else:
            self._send(DashScope.dialect.error(code, "BadRequest", message or "The request cannot be read."))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the server logs each request itself."""
