#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["Pillow>=10.3,<14"]
# ///
"""The image services on loopback: offline, free, and as strict as the real ones.

For rehearsals, demos and tests. Each of the three ways to the model answers at its natural path with its own bodies
and errors: DashScope below /api/v1, zimageturbo.ai below /api, a server of one's own (OpenAI's Images API) below /v1.
The mock hands out signed links that expire, limits the rate, fails on request (--fault), and keeps count of what
would have been paid for. Its pictures are drawn from prompt, seed and size, and say in their caption that no model
made them.

    python3 mock_server.py --port 8080 --fault 429,hangup-after
    with MockServer(rpm=0, faults="429") as mock: ...      # in a test

Chapters: what passes between them, errors and faults, counting and limits, pictures behind links, what the image
services share, DashScope, zimageturbo, OpenAI's Images API, the server, drawing, the command line. A further service
is one more `Dialect`, for its errors, and one more `Provider`: a prefix, a table of routes, what it takes and answers.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import heapq
import hmac
import io
import ipaddress
import json
import math
import os
import random
import re
import secrets
import signal
import socketserver
import struct
import sys
import threading
import time
import unicodedata
import uuid
import zlib
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, repeat
from typing import Any, Literal, NamedTuple, NoReturn, Protocol, TypeVar
from urllib.parse import parse_qsl, quote, urlsplit

from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFont, ImageOps

MAX_BODY_BYTES = 1024 * 1024
MIN_PIXELS, MAX_PIXELS = 512 * 512, 2048 * 2048  # the service's bounds on width * height
MIN_SIDE = 64  # the service names none: this only keeps out slivers that cannot be drawn
MAX_SEED = 2147483647
DEFAULT_SIZE = "1024*1536"
DEFAULT_RPM = 120  # requests a minute and account: the vendor's model page, 2026
DEFAULT_LINK_TTL_S = 24 * 3600
# So that a long run does not eat the memory.
LINKS_KEPT, TASKS_KEPT, REQUESTS_KEPT, PICTURES_KEPT = 10_000, 10_000, 100, 24


# ---------------------------------------------------------------------------------------------------------------------
# What passes between the chapters
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One HTTP request, read whole. `target` is path and query as sent."""

    method: str
    target: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]  # names in lower case
    body: bytes


@dataclass(frozen=True)
class Reply:
    """One HTTP answer, and how it is to reach the client. `code` is the service's error code, for the statistics."""

    status: int
    body: bytes = b""
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    code: str = ""
    billed: bool = False
    delivery: Literal["whole", "half", "dribble", "hangup"] = "whole"


class Refusal(Exception):
    """Ends the handling of a request with an error reply."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.code)
        self.reply = reply


@dataclass(frozen=True)
class Picture:
    """All that a picture is drawn from: the same five give the same bytes."""

    prompt: str
    seed: int
    width: int
    height: int
    kind: str = "png"  # or "jpeg", "webp"


class Order(NamedTuple):
    """A valid generation request, in the words of the service."""

    model: str
    prompt: str
    parameters: Mapping[str, Any]


class Service(Protocol):
    """Whoever answers for all paths under `prefix`, which ends in a slash or is empty."""

    prefix: str
    dialect: Dialect  # for what the server itself has to say about a request

    def answer(self, request: Request) -> Reply:
        """Answer one request."""


def json_reply(value: object, **fields: Any) -> Reply:
    """A 200 with a JSON body; `fields` are further fields of the Reply."""
    return Reply(200, json.dumps(value, ensure_ascii=False).encode(errors="replace"), **fields)


def xml_error(status: int, code: str, message: str) -> Reply:
    """An error in the form of OSS, the vendor's file storage."""
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error>\n  <Code>{code}</Code>\n  <Message>{message}</Message>\n'
        f"  <RequestId>{uuid.uuid4().hex[:24].upper()}</RequestId>\n</Error>\n"
    )
    return Reply(status, body.encode(), "application/xml", code=code)


def html_page(status: int, title: str) -> Reply:
    """What a gateway or a captive portal says in place of the service."""
    body = f"<html><head><title>{title}</title></head><body><h1>{title}</h1></body></html>\n"
    return Reply(status, body.encode(), "text/html")


Routes = Mapping[str, Mapping[str, Callable[[Request], Reply]]]


def route(routes: Routes, request: Request, dialect: Dialect) -> Reply:
    """Call what a table of path and method names; 404 or 405 where it names nothing."""
    methods = routes.get(request.path)
    if methods is None:
        return dialect.error(404, "NotFound", f"No such path: {request.path[:200]}")
    if request.method not in methods:
        allowed = ", ".join(methods)
        return dialect.error(405, "MethodNotAllowed", f"Use {allowed}.", headers={"Allow": allowed})
    return methods[request.method](request)


# ---------------------------------------------------------------------------------------------------------------------
# Errors and faults: what can go wrong, as tables
# ---------------------------------------------------------------------------------------------------------------------


class ErrorRow(NamedTuple):
    """One way to be refused, whichever service it is. Nothing is made or billed, unless `made`."""

    help: str
    message: str
    retry_after_s: int = 0  # 0: the header is not sent
    made: bool = False


NO_BALANCE = ErrorRow(
    "402, the account is overdue (dashscope: 400 Arrearage)",
    "Access denied, please make sure your account is in good standing.",
)
TOO_MANY = ErrorRow("rate limit, no Retry-After", "Requests rate limit exceeded, please try again later.")
ERRORS = {
    "400": ErrorRow("the request is wrong", "Required parameter is missing or invalid, please check the request."),
    "blocked": ErrorRow("400, refused by content safety", "Input or output data may contain inappropriate content."),
    "402": NO_BALANCE,
    "arrearage": NO_BALANCE,
    "401": ErrorRow("the key is wrong", "Invalid API-key provided."),
    "403": ErrorRow("no permission for the model", "Model access denied."),
    "quota": ErrorRow("403, the free quota is used up", "The free tier of the model has been exhausted."),
    "quota-429": ErrorRow("429, the quota is used up", "Allocated quota exceeded, please increase your quota."),
    "404": ErrorRow("no such model", "Model not exist."),
    "429": TOO_MANY,
    "429-wait": TOO_MANY._replace(help="rate limit, Retry-After: 1", retry_after_s=1),
    "429-long": TOO_MANY._replace(help="rate limit, Retry-After: 3600", retry_after_s=3600),
    "500": ErrorRow("a fault of the service", "An internal error has occurred, please try again later."),
    "503": ErrorRow("overloaded", "The service is overloaded, please try again later."),
    "timeout": ErrorRow(
        "picture made and billed, the service says that it timed out",
        "Request timed out, please try again later.",
        made=True,
    ),
}


@dataclass(frozen=True)
class Dialect:
    """How one service words its errors: the body of HTTP status, code and message, and the errors that it knows."""

    service: str
    body: Callable[[int, str, str], object]
    codes: Mapping[str, tuple[int, str]]  # HTTP status and code, by the names of ERRORS

    def error(self, status: int, code: str, message: str, **fields: Any) -> Reply:
        """An error in the service's form; `fields` are further fields of the Reply."""
        return replace(json_reply(self.body(status, code, message), **fields), status=status, code=code)

    def refused(self, name: str, message: str = "", retry_after_s: int = 0) -> Reply:
        """The error of this name. Message and wait are those of its row unless given."""
        row = ERRORS[name]
        wait = retry_after_s or row.retry_after_s
        return self.error(*self.codes[name], message or row.message, headers={"Retry-After": str(wait)} if wait else {})


def _openai_error(status: int, code: str, message: str) -> object:
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


BALANCE_NAMES = ("402", "arrearage")
RATE_NAMES = ("429", "429-wait", "429-long")
DASHSCOPE = Dialect(
    "dashscope",
    lambda status, code, message: {"code": code, "message": message, "request_id": str(uuid.uuid4())},
    {
        "400": (400, "InvalidParameter"),
        "blocked": (400, "DataInspectionFailed"),
        **dict.fromkeys(BALANCE_NAMES, (400, "Arrearage")),
        "401": (401, "InvalidApiKey"),
        "403": (403, "Model.AccessDenied"),
        "quota": (403, "AllocationQuota.FreeTierOnly"),
        "quota-429": (429, "Throttling.AllocationQuota"),
        "404": (404, "ModelNotFound"),
        **dict.fromkeys(RATE_NAMES, (429, "Throttling.RateQuota")),
        "500": (500, "InternalError"),
        "503": (503, "ServiceUnavailable"),
        "timeout": (500, "RequestTimeOut"),
    },
)
ZIMAGETURBO = Dialect(
    "zimageturbo",
    lambda status, code, message: {"code": status, "message": message, "data": None},
    {
        **{name: (int(name), name) for name in ("400", "401", "403", "404", "500", "503")},
        "blocked": (400, "400"),
        **dict.fromkeys(BALANCE_NAMES, (402, "402")),
        **dict.fromkeys(RATE_NAMES, (429, "429")),
        "timeout": (504, "504"),
    },
)
OPENAI = Dialect(
    "openai",
    _openai_error,
    {
        "400": (400, "invalid_value"),
        "blocked": (400, "moderation_blocked"),
        **dict.fromkeys(BALANCE_NAMES, (402, "insufficient_balance")),
        "401": (401, "invalid_api_key"),
        "403": (403, "insufficient_permissions"),
        "quota-429": (429, "insufficient_quota"),
        "404": (404, "model_not_found"),
        **dict.fromkeys(RATE_NAMES, (429, "rate_limit_exceeded")),
        "500": (500, "server_error"),
        "503": (503, "overloaded"),
        "timeout": (504, "timeout"),
    },
)
DIALECTS = (DASHSCOPE, ZIMAGETURBO, OPENAI)
SERVICES = tuple(dialect.service for dialect in DIALECTS)
RATE_CODES = {dialect.codes["429"][1] for dialect in DIALECTS}


class Course(NamedTuple):
    """How a task of zimageturbo goes on, as the status queries tell it."""

    end: Literal["SUCCESS", "FAILED", "IN_PROGRESS"] = "SUCCESS"
    error_message: str | None = None
    pictures: int = 1
    early: str | Reply = "IN_PROGRESS"  # a status, or an error, that the first queries are told, however it stands
    early_queries: float = 0

    @property
    def billed(self) -> bool:
        """Whether the task will be paid for: only a picture is."""
        return self.end == "SUCCESS" and self.pictures > 0


class Fault(NamedTuple):
    """One way to fail on purpose. Where nothing but `help` is set, the service itself knows the name."""

    help: str
    instead: Reply | None = None  # answered at once, nothing is made or billed
    answer: Callable[[Reply], Reply] | None = None  # the picture is made and billed, the answer suffers
    image: Callable[[Picture, str], Reply] | None = None  # the answer is good, its link (the second argument) is not
    once: bool = False  # of an image fault: the first download only
    task: Course = Course()
    services: Sequence[str] = SERVICES  # who knows it; to others it means "ok"


def _billed(page: Reply) -> Callable[[Reply], Reply]:
    return lambda good: replace(page, billed=True)


def _hangup(good: Reply) -> Reply:
    return replace(good, status=0, delivery="hangup")


def _damaged(picture: Picture, link: str) -> Reply:
    good = _drawn(picture)
    # The decoders forgive much: to JPEG, zeros would be pixels, and this is a table that cannot be; WebP minds only
    # its header.
    start = 20 if picture.kind == "webp" else len(good.body) // 2
    return replace(good, body=good.body[:start] + b"\xff\xc4\x00\x03" * 16 + good.body[start + 64 :])


def _bomb() -> bytes:
    """A valid PNG of some 90 bytes whose header claims 50000 * 50000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(999))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _drawn(picture: Picture) -> Reply:
    return Reply(200, draw_file(picture), f"image/{picture.kind}")


def _bigger(picture: Picture, link: str) -> Reply:
    return _drawn(replace(picture, width=picture.width + 64, height=picture.height + 64))


def _halved(picture: Picture, link: str) -> Reply:
    return replace(_drawn(picture), delivery="half")


def _to_itself(picture: Picture, link: str) -> Reply:
    return Reply(302, headers={"Location": link})


NO_RIGHT = xml_error(403, "AccessDenied", "You have no right to access this object because of bucket acl.")
EXPIRED = xml_error(403, "AccessDenied", "Request has expired.")
NO_FILE = xml_error(404, "NoSuchKey", "The specified key does not exist.")
STORE_DOWN = xml_error(500, "InternalError", "We encountered an internal error. Please try again.")
ELSEWHERE = Reply(307, headers={"Location": "/mock/elsewhere"})

TASK_FAULTS = {
    "task-failed": Fault("FAILED, not billed", task=Course("FAILED", "Image generation failed.")),
    "task-blocked": Fault(
        "FAILED for sensitive content, not billed",
        task=Course("FAILED", "The prompt may contain sensitive content."),
    ),
    "task-lost": Fault(
        "404 to every status query, not billed",
        task=Course("FAILED", early=ZIMAGETURBO.refused("404", "Task not found."), early_queries=math.inf),
    ),
    "task-status": Fault(
        "two status queries are told an undocumented status",
        task=Course(early="PENDING_REVIEW", early_queries=2),
    ),
    "task-slow": Fault("IN_PROGRESS for ever, not billed", task=Course("IN_PROGRESS")),
    "status-500": Fault(
        "two status queries get 500 HTML of a gateway",
        task=Course(early=html_page(500, "Internal Server Error"), early_queries=2),
    ),
    "status-429": Fault(
        "the first status query gets 429, Retry-After: 1",
        task=Course(early=ZIMAGETURBO.refused("429-wait"), early_queries=1),
    ),
    "two-pictures": Fault("two links, billed once", task=Course(pictures=2)),
    **{
        f"envelope-{name}": Fault(
            f"HTTP 200, but {name} in the envelope; no task",
            instead=replace(ZIMAGETURBO.refused(name), status=200),
        )
        for name in ("401", "402", "429", "500")
    },
}
OPENAI_FAULTS = {
    "url": Fault("a link where base64 was asked for"),
    "data-url": Fault("a link that is the picture, as data:image/...;base64,..."),
    "bad-base64": Fault("base64 that cannot be decoded"),
}
FAULTS: dict[str, Fault] = {
    "ok": Fault("normal service"),
    **{
        name: Fault(row.help, services=tuple(dialect.service for dialect in DIALECTS if name in dialect.codes))
        for name, row in ERRORS.items()
    },
    "hangup-before": Fault("connection closed without an answer, nothing made", Reply(0, delivery="hangup")),
    "redirect": Fault("307 to another path, nothing made", ELSEWHERE),
    "no-image": Fault("200 (or SUCCESS) without an image, not billed", task=Course(pictures=0)),
    "hangup-after": Fault("picture made and billed, connection closed", answer=_hangup),
    "cut-answer": Fault("picture made and billed, half the JSON", answer=lambda r: replace(r, delivery="half")),
    "slow": Fault("picture made and billed, answer byte by byte", answer=lambda r: replace(r, delivery="dribble")),
    "not-json": Fault("200 that is not JSON, billed", answer=_billed(Reply(200, b"OK, done."))),
    "500-html": Fault("500 HTML of a gateway, billed", answer=_billed(html_page(500, "Internal Server Error"))),
    "502": Fault("502 HTML of a gateway, billed", answer=_billed(html_page(502, "Bad Gateway"))),
    "504": Fault("504 HTML of a gateway, billed", answer=_billed(html_page(504, "Gateway Time-out"))),
    "image-403": Fault("link: 403 AccessDenied", image=lambda p, link: NO_RIGHT),
    "image-expired": Fault("link: 403 Request has expired", image=lambda p, link: EXPIRED),
    "image-404": Fault("link: 404 NoSuchKey", image=lambda p, link: NO_FILE),
    "image-500": Fault("link: 500, first download only", image=lambda p, link: STORE_DOWN, once=True),
    "image-cut": Fault("link: half, first download only", image=_halved, once=True),
    "image-corrupt": Fault("link: whole length, damaged bytes", image=_damaged),
    "image-html": Fault("link: 200 with an HTML page", image=lambda p, link: html_page(200, "Please sign in")),
    "image-bomb": Fault(
        "link: a tiny PNG that claims 50000*50000", image=lambda p, link: Reply(200, _bomb(), "image/png")
    ),
    "image-big-size": Fault("link: a picture of another size than asked", image=_bigger),
    "image-redirect": Fault("link: 302 to itself, first download only", image=_to_itself, once=True),
    "image-redirect-loop": Fault("link: 302 to itself", image=_to_itself),
    "image-jpeg": Fault("link: a JPEG", image=lambda p, link: _drawn(replace(p, kind="jpeg"))),
    **{name: fault._replace(services=["zimageturbo"]) for name, fault in TASK_FAULTS.items()},
    **{name: fault._replace(services=["openai"]) for name, fault in OPENAI_FAULTS.items()},
}


def fault_plan(spec: str) -> Iterator[str]:
    """The faults of SPEC in order, then "ok" for ever.

    SPEC is "NAME[*COUNT],...", COUNT a number or "inf". Raises ValueError.
    """
    plan: list[Iterator[str]] = []
    for entry in filter(None, (part.strip() for part in spec.split(","))):
        name, star, count = entry.partition("*")
        if name not in FAULTS:
            raise ValueError(f"unknown fault {name!r}: --fault list names them all")
        if star and not re.fullmatch(r"inf|[1-9][0-9]{0,5}", count):
            raise ValueError(f"fault {entry!r}: after * comes a number from 1 to 999999, or inf")
        plan.append(repeat(name) if count == "inf" else repeat(name, int(count or 1)))
    return chain(*plan, repeat("ok"))


# ---------------------------------------------------------------------------------------------------------------------
# Counting and limits
# ---------------------------------------------------------------------------------------------------------------------


class Ledger:
    """What happened, for GET /mock/stats: counters, the last requests, the last payloads. Never a key."""

    prefix = ""  # all paths that no other service claims: 404
    dialect = DASHSCOPE
    stats_path = "/mock/stats"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        names = ("generate_requests", "billed", "downloads", "model_queries", "status_queries")
        self._counts = Counter(dict.fromkeys(names, 0))
        self._due: list[float] = []  # a heap: when the pictures that are not finished yet will be
        self._errors: Counter[str] = Counter()
        self._requests: deque[dict[str, Any]] = deque(maxlen=REQUESTS_KEPT)
        self._payloads: deque[dict[str, Any]] = deque(maxlen=REQUESTS_KEPT)

    def count(self, name: str) -> None:
        """Add one to a counter."""
        with self._lock:
            self._counts[name] += 1

    def bill(self, pictures: int = 1, due: float = 0.0) -> None:
        """Count pictures as paid for: at once, or from that time of time.monotonic() on."""
        with self._lock:
            for _ in range(pictures):
                heapq.heappush(self._due, due)
            self._settle()

    def _settle(self) -> None:
        while self._due and self._due[0] <= time.monotonic():
            heapq.heappop(self._due)
            self._counts["billed"] += 1

    def payload(self, service: str, order: Order) -> None:
        """Note what a valid generation request asked for."""
        parameters = dict(order.parameters)
        entry = {"service": service, "model": order.model, "prompt": order.prompt[:2000], "parameters": parameters}
        with self._lock:
            self._payloads.append(entry)

    def record(self, request: Request, reply: Reply) -> None:
        """Note a request and how it ended. Called before the answer leaves, so that the client can ask at once."""
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "method": request.method,
            "path": request.path[:200],
            "status": reply.status or None,
            "code": reply.code,
            "billed": reply.billed,
            "authorization": "authorization" in request.headers,
        }
        with self._lock:
            self._requests.append(entry)
            if reply.code:
                self._errors[reply.code] += 1

    def answer(self, request: Request) -> Reply:
        """Answer the statistics."""
        return route({self.stats_path: {"GET": lambda _: json_reply(self.snapshot())}}, request, self.dialect)

    def snapshot(self) -> dict[str, Any]:
        """All of it as JSON-able values."""
        with self._lock:
            self._settle()
            return {
                **self._counts,
                "throttled": sum(self._errors[code] for code in RATE_CODES),
                "errors": dict(self._errors),
                "requests": list(self._requests),
                "payloads": list(self._payloads),
            }


class RateLimit:
    """The vendor's limit: so many a minute, and of these no more than a sixtieth (at least one) a second."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._clock = per_minute, clock
        self._per_second = max(1.0, per_minute / 60)
        # A bucket that refills steadily: calls evenly paced at the limit pass in spite of jitter, bursts do not.
        self._bucket, self._filled_at = self._per_second, clock()
        self._admitted: deque[float] = deque()
        self._lock = threading.Lock()

    def admit(self) -> int:
        """0 lets the call through; else the whole seconds to wait. No limit at all where per_minute is 0."""
        if not self._limit:
            return 0
        with self._lock:
            now = self._clock()
            while self._admitted and self._admitted[0] <= now - 60:
                self._admitted.popleft()
            refill = (now - self._filled_at) * self._per_second
            self._bucket, self._filled_at = min(self._per_second, self._bucket + refill), now
            wait = (1 - self._bucket) / self._per_second
            if len(self._admitted) >= self._limit:
                wait = max(wait, self._admitted[0] + 60 - now)
            if wait > 0:
                return math.ceil(wait)
            self._bucket -= 1
            self._admitted.append(now)
            return 0


Value = TypeVar("Value")


class Recent(OrderedDict[str, Value]):
    """A dictionary that forgets its oldest entry when it gets a further one beyond its limit."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit

    def __setitem__(self, key: str, value: Value) -> None:
        super().__setitem__(key, value)
        if len(self) > self._limit:
            self.popitem(last=False)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures behind signed links
# ---------------------------------------------------------------------------------------------------------------------


def delivered(picture: Picture, fault: Fault, link: str = "") -> Reply:
    """The picture as whoever follows the link gets it, with the fault's `image` part, if any."""
    return fault.image(picture, link) if fault.image else _drawn(picture)


class Gallery:
    """The file storage: a picture is drawn when its link is first followed, and no key is asked for."""

    prefix = "/files/"
    dialect = DASHSCOPE

    def __init__(self, root: str, ttl_s: float, ledger: Ledger) -> None:
        self._root, self._ttl_s, self._ledger = root, ttl_s, ledger
        self._secret = secrets.token_bytes(32)
        self._pictures: Recent[tuple[Picture, Fault]] = Recent(LINKS_KEPT)
        self._lock = threading.Lock()

    def issue(self, picture: Picture, fault: Fault) -> str:
        """A new signed link to the picture, which then suffers the fault's `image` part, if any."""
        path = f"{self.prefix}{secrets.token_hex(16)}.{picture.kind}"
        with self._lock:
            self._pictures[path] = (picture, fault)
        now = time.time()
        expires = str(math.ceil(now + self._ttl_s) if self._ttl_s else int(now))
        signature = quote(self._sign(path, expires), safe="")
        return f"{self._root}{path}?Expires={expires}&OSSAccessKeyId=mock&Signature={signature}"

    def answer(self, request: Request) -> Reply:
        """GET or HEAD of one link."""
        if request.method not in ("GET", "HEAD"):
            return xml_error(405, "MethodNotAllowed", "The specified method is not allowed against this resource.")
        with self._lock:
            known = self._pictures.get(request.path)
        if known is None:
            return NO_FILE
        expires = request.query.get("Expires", "")
        signature = request.query.get("Signature", "")
        if not hmac.compare_digest(signature.encode(), self._sign(request.path, expires).encode()):
            return NO_RIGHT
        if time.time() >= int(expires):
            return EXPIRED
        picture, fault = known
        if request.method == "GET" and fault.once:
            with self._lock:
                self._pictures[request.path] = (picture, FAULTS["ok"])
        reply = delivered(picture, fault, request.target)
        if request.method == "GET" and reply.status == 200:
            self._ledger.count("downloads")
        return reply

    def _sign(self, path: str, expires: str) -> str:
        # Base64 like the real signatures: a client that mangles "+" or "=" in a link is found out here.
        return base64.b64encode(hmac.digest(self._secret, f"{path}?{expires}".encode(), "sha1")).decode()


# ---------------------------------------------------------------------------------------------------------------------
# What the image services share
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Studio:
    """What all image services work with."""

    api_key: str
    faults: Iterator[str]
    rpm: int  # for each service, as each vendor counts for itself
    gallery: Gallery
    ledger: Ledger
    latency_s: float  # how long a picture is said to take
    pause: Callable[[], object]  # waits as long


Rule = tuple[Callable[[Any], bool], str]  # whether a value is right, and what is right in words


class Provider(ABC):
    """An image service: from the key to the fault all do the same, in their own dialect."""

    prefix: str
    dialect: Dialect
    limited = True
    _routes: Routes

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._rate = RateLimit(studio.rpm if self.limited else 0)

    def answer(self, request: Request) -> Reply:
        """Answer one request under the prefix."""
        try:
            return route(self._routes, request, self.dialect)
        except Refusal as refusal:
            return refusal.reply

    @abstractmethod
    def _order(self, body: object) -> Order:
        """The request's body, checked field by field like the service does it. Raises Refusal."""

    @abstractmethod
    def _make(self, order: Order, fault: str) -> Reply:
        """The good answer, and what it costs in the ledger. Of the faults it minds its own, and "no-image"."""

    def _generate(self, request: Request) -> Reply:
        ledger = self._studio.ledger
        ledger.count("generate_requests")
        self._authorize(request)
        if wait := self._rate.admit():
            raise self._refusal("429", retry_after_s=wait)
        name = next(self._studio.faults)
        if self.dialect.service not in FAULTS[name].services:
            name = "ok"
        if name in ERRORS and not ERRORS[name].made:
            raise self._refusal(name)
        if instead := FAULTS[name].instead:
            return replace(instead, code=name)
        order = self._order(self._body(request))
        ledger.payload(self.dialect.service, order)
        if "mock:blocked-empty" in order.prompt:
            name = "no-image"
        elif "mock:blocked" in order.prompt:
            raise self._refusal("blocked")
        reply = self._make(order, name)
        if name in ERRORS:
            return replace(self.dialect.refused(name), billed=reply.billed)
        if suffer := FAULTS[name].answer:
            reply = suffer(reply)
            return replace(reply, code=reply.code or name)
        return reply

    def _authorize(self, request: Request) -> None:
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self._studio.api_key}".encode()):
            raise self._refusal("401")

    def _refusal(self, name: str, message: str = "", retry_after_s: int = 0) -> Refusal:
        return Refusal(self.dialect.refused(name, message, retry_after_s))

    def _body(self, request: Request) -> object:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise self._refusal("400", "Content-Type must be application/json")
        try:
            return json.loads(request.body.decode(), parse_constant=_no_constant)
        except (ValueError, RecursionError):
            raise self._refusal("400", "the body must be one JSON object in UTF-8") from None

    def _object(self, value: object, where: str, required: set[str], *optional: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._refusal("400", f"{where} must be an object")
        if missing := sorted(required - value.keys()):
            raise self._refusal("400", f"{where} lacks {', '.join(missing)}")
        if unknown := sorted(value.keys() - required - set(optional)):
            raise self._refusal("400", f"{where} has unknown fields: {', '.join(unknown)[:200]}")
        return value

    def _fields(self, value: object, where: str, rules: Mapping[str, Rule], *required: str) -> dict[str, Any]:
        """An object whose fields all have a rule and keep to it."""
        fields = self._object(value, where, set(required), *rules)
        for name, item in fields.items():
            valid, rule = rules[name]
            if not valid(item):
                raise self._refusal("400", f"{where}.{name} must be {rule}")
        return fields


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _text(longest: float = math.inf) -> Rule:
    def valid(value: object) -> bool:
        if not isinstance(value, str) or re.search("[\ud800-\udfff]", value):
            return False
        return bool(value.strip()) and len(value) <= longest

    return valid, "a string that is not blank" + (f", of at most {longest} characters" if longest < math.inf else "")


def _integer(low: int, high: int) -> Rule:
    # type() and not isinstance(): true and false are no integers.
    return lambda value: type(value) is int and low <= value <= high, f"an integer from {low} to {high}"


def _one_of(*values: str) -> Rule:
    return lambda value: value in values, f"one of {', '.join(values)}"


def _size(times: str, multiple: int = 1) -> Rule:
    pattern = re.compile(rf"([1-9][0-9]{{2,3}}){re.escape(times)}([1-9][0-9]{{2,3}})")

    def valid(value: object) -> bool:
        sides = pattern.fullmatch(value) if isinstance(value, str) else None
        if not sides:
            return False
        width, height = map(int, sides.groups())
        fitting = MIN_PIXELS <= width * height <= MAX_PIXELS and min(width, height) >= MIN_SIDE
        return fitting and width % multiple == height % multiple == 0

    steps = f", both multiples of {multiple}" if multiple > 1 else ""
    return valid, f'"width{times}height"{steps}, in total from 512*512 to 2048*2048 pixels'


def _random_seed() -> int:
    return secrets.randbelow(MAX_SEED + 1)


# ---------------------------------------------------------------------------------------------------------------------
# DashScope
# ---------------------------------------------------------------------------------------------------------------------


class DashScope(Provider):
    """Alibaba Cloud Model Studio: generation in one synchronous call, and a free query of the models."""

    prefix = "/api/v1/"
    dialect = DASHSCOPE
    generation_path = f"{prefix}services/aigc/multimodal-generation/generation"
    model = "z-image-turbo"
    parameters: Mapping[str, Rule] = {
        "size": _size("*"),
        "seed": _integer(0, MAX_SEED),
        "prompt_extend": (lambda value: type(value) is bool, "true or false"),
    }

    def __init__(self, studio: Studio) -> None:
        super().__init__(studio)
        self._routes = {
            self.generation_path: {"POST": self._generate},
            f"{self.prefix}models": {"GET": self._models},
        }

    def _models(self, request: Request) -> Reply:
        self._authorize(request)
        self._studio.ledger.count("model_queries")
        page_no, page_size = (request.query.get(name, "1") for name in ("page_no", "page_size"))
        if not all(re.fullmatch("[1-9][0-9]{0,3}", number) for number in (page_no, page_size)):
            raise self._refusal("400", "page_no and page_size must be positive integers")
        listed = [{"model": self.model, "name": "Z-Image-Turbo"}]
        found = [model for model in listed if request.query.get("model", self.model) == model["model"]]
        output = {"models": found if page_no == "1" else [], "total": len(found)}
        return json_reply({"request_id": str(uuid.uuid4()), "output": output})

    def _order(self, body: object) -> Order:
        body = self._object(body, "body", {"model", "input"}, "parameters")
        if not isinstance(body["model"], str):
            raise self._refusal("400", "model must be a string")
        if body["model"] != self.model:
            raise self._refusal("404")
        messages = self._object(body["input"], "input", {"messages"})["messages"]
        message = self._object(self._single(messages, "input.messages"), "message", {"role", "content"})
        if message["role"] != "user":
            raise self._refusal("400", "the role of the message must be user")
        item = self._fields(self._single(message["content"], "content"), "content item", {"text": _text()}, "text")
        parameters = self._fields(body.get("parameters", {}), "parameters", self.parameters)
        return Order(self.model, item["text"], parameters)

    def _single(self, value: object, where: str) -> object:
        if not isinstance(value, list) or len(value) != 1:
            raise self._refusal("400", f"{where} must be a list of exactly one item")
        return value[0]

    def _make(self, order: Order, fault: str) -> Reply:
        prompt, parameters = order.prompt, order.parameters
        rewritten = _rewrite(prompt) if parameters.get("prompt_extend") else ""
        width, height = map(int, parameters.get("size", DEFAULT_SIZE).split("*"))
        picture = Picture(rewritten or prompt, parameters.get("seed", _random_seed()), width, height)
        if fault == "no-image":
            return self._success(picture, rewritten, None)
        self._studio.ledger.bill()  # before the pause: a client that gives up meanwhile has paid all the same
        link = self._studio.gallery.issue(picture, FAULTS[fault])
        self._studio.pause()
        return self._success(picture, rewritten, link)

    @staticmethod
    def _success(picture: Picture, rewritten: str, link: str | None) -> Reply:
        """The 200, billed where there is a picture. Without a link it is what a blocked picture can look like."""
        reasoning = f"The user gave a short prompt. I keep its subject and add light and detail: {rewritten}"
        message = {
            "role": "assistant",
            "content": [*([{"image": link}] if link else []), {"text": picture.prompt}],
            "reasoning_content": reasoning if rewritten else "",
        }
        no_tokens = dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), 0)
        body = {
            "request_id": str(uuid.uuid4()),
            "output": {"choices": [{"finish_reason": "stop", "message": message}]},
            "usage": {"width": picture.width, "height": picture.height, "image_count": int(bool(link)), **no_tokens},
        }
        return json_reply(body, billed=bool(link), code="" if link else "no-image")


REWRITES = (
    "in soft morning light, wide composition with a calm foreground, natural colors, fine detail",
    "at dusk, warm light from the side, layered depth from near to far, crisp textures",
    "under a clear sky, balanced composition, gentle contrast, rich but restrained colors",
)


def _rewrite(prompt: str) -> str:
    """The prompt with more words; the same prompt always gets the same ones."""
    return f"{prompt.strip().rstrip('.')}, {REWRITES[zlib.crc32(prompt.encode()) % len(REWRITES)]}"


# ---------------------------------------------------------------------------------------------------------------------
# zimageturbo.ai
# ---------------------------------------------------------------------------------------------------------------------

ASPECT_SIZES = {
    "1:1": (1024, 1024),
    "4:3": (1152, 864),
    "3:4": (864, 1152),
    "16:9": (1280, 720),
    "9:16": (720, 1280),
}
CREDITS = 15  # what a task costs that has a picture


@dataclass
class Task:
    """What a submission started. How it ends is settled then; the status queries only tell it."""

    id: str
    order: Order
    fault: str
    due: float  # of time.monotonic()
    created_at: str
    queries: int = 0
    links: list[str] = field(default_factory=list)  # signed when the task is first seen to be done


class ZImageTurbo(Provider):
    """Another vendor of the model: a submission is answered at once with a task, which is then asked for."""

    prefix = "/api/"
    dialect = ZIMAGETURBO
    fields: Mapping[str, Rule] = {"prompt": _text(longest=1000), "aspect_ratio": _one_of(*ASPECT_SIZES)}

    def __init__(self, studio: Studio) -> None:
        super().__init__(studio)
        self._routes = {
            f"{self.prefix}generate": {"POST": self._generate},
            f"{self.prefix}status": {"GET": self._status},
        }
        self._tasks: Recent[Task] = Recent(TASKS_KEPT)
        self._lock = threading.Lock()

    def _order(self, body: object) -> Order:
        fields = self._fields(body, "body", self.fields, *self.fields)
        return Order("z-image-turbo", fields["prompt"], {"aspect_ratio": fields["aspect_ratio"]})

    def _make(self, order: Order, fault: str) -> Reply:
        due = time.monotonic() + self._studio.latency_s
        created_at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        task = Task(f"task_{secrets.token_hex(8)}", order, fault, due, created_at)
        with self._lock:
            self._tasks[task.id] = task
        billed = FAULTS[fault].task.billed
        if billed:
            self._studio.ledger.bill(due=due)
        return self._envelope({"task_id": task.id, "status": "IN_PROGRESS"}, billed=billed)

    def _status(self, request: Request) -> Reply:
        self._authorize(request)
        self._studio.ledger.count("status_queries")
        task_id = request.query.get("task_id")
        if not task_id:
            raise self._refusal("400", "task_id is required")
        with self._lock:
            task = self._tasks.get(task_id)
            if task is None:
                raise self._refusal("404", "Task not found.")
            task.queries += 1
            return self._told(task)

    def _told(self, task: Task) -> Reply:
        fault = FAULTS[task.fault]
        course = fault.task
        status: str = course.end if time.monotonic() >= task.due else "IN_PROGRESS"
        if task.queries <= course.early_queries:
            if isinstance(course.early, Reply):
                return replace(course.early, code=course.early.code or task.fault)
            status = course.early
        done = status == "SUCCESS"
        width, height = ASPECT_SIZES[task.order.parameters["aspect_ratio"]]
        if done and not task.links:
            for _ in range(course.pictures):
                picture = Picture(task.order.prompt, _random_seed(), width, height, "jpeg")
                task.links.append(self._studio.gallery.issue(picture, fault))
        links = task.links if done else []
        data = {
            "status": status,
            "task_id": task.id,
            "request": {
                "prompt": task.order.prompt,
                "size": f"{width}*{height}",
                "seed": "-1",
                **task.order.parameters,
            },
            "response": links,
            "consumed_credits": CREDITS if links else 0,
            "created_at": task.created_at,
            "error_message": course.error_message if status == "FAILED" else None,
        }
        return self._envelope(data, code="" if links or status == "IN_PROGRESS" else task.fault)

    @staticmethod
    def _envelope(data: object, **fields: Any) -> Reply:
        return json_reply({"code": 200, "message": "success", "data": data}, **fields)


# ---------------------------------------------------------------------------------------------------------------------
# OpenAI's Images API, as vLLM-Omni and SGLang speak it
# ---------------------------------------------------------------------------------------------------------------------


class OpenAI(Provider):
    """A server of one's own: a key is optional, nothing limits the rate, and the picture is in the answer itself."""

    prefix = "/v1/"
    dialect = OPENAI
    limited = False
    model = "Tongyi-MAI/Z-Image-Turbo"
    fields: Mapping[str, Rule] = {
        "prompt": _text(),
        "n": _integer(1, 10),
        "size": _size("x", multiple=16),
        "response_format": _one_of("b64_json", "url"),
        "output_format": _one_of("png", "jpeg", "webp"),
        "seed": _integer(0, 2**64 - 1),
        "num_inference_steps": _integer(1, 200),
        "guidance_scale": (lambda value: type(value) in (int, float) and 0 <= value < math.inf, "a number from 0 on"),
        **dict.fromkeys(
            ("model", "negative_prompt", "user", "quality", "style", "background"),
            (lambda value: isinstance(value, str), "a string"),
        ),
    }

    def __init__(self, studio: Studio) -> None:
        super().__init__(studio)
        self._routes = {
            f"{self.prefix}images/generations": {"POST": self._generate},
            f"{self.prefix}models": {"GET": self._models},
        }

    def answer(self, request: Request) -> Reply:
        """Answer one request under /v1/, with an id to ask for it in the server's log."""
        reply = super().answer(request)
        return replace(reply, headers={**reply.headers, "x-request-id": f"req_{uuid.uuid4().hex}"})

    def _authorize(self, request: Request) -> None:
        if "authorization" in request.headers:
            super()._authorize(request)

    def _models(self, request: Request) -> Reply:
        self._authorize(request)
        self._studio.ledger.count("model_queries")
        model = {"id": self.model, "object": "model", "created": int(time.time()), "owned_by": "mock"}
        return json_reply({"object": "list", "data": [model]})

    def _order(self, body: object) -> Order:
        if isinstance(body, dict):  # null stands for what is left out
            body = {name: value for name, value in body.items() if value is not None or name not in self.fields}
        fields = self._fields(body, "body", self.fields, "prompt")
        return Order(fields.pop("model", self.model), fields.pop("prompt"), fields)

    def _make(self, order: Order, fault: str) -> Reply:
        wanted = order.parameters
        width, height = map(int, wanted.get("size", "1024x1024").split("x"))
        first = Picture(
            order.prompt, wanted.get("seed", _random_seed()), width, height, wanted.get("output_format", "png")
        )
        count = 0 if fault == "no-image" else wanted.get("n", 1)
        self._studio.ledger.bill(count)  # before the pause, as for DashScope
        form = fault if fault in OPENAI_FAULTS else wanted.get("response_format", "b64_json")
        pictures = (replace(first, seed=first.seed + i) for i in range(count))
        data = [self._item(picture, form, FAULTS[fault]) for picture in pictures]
        self._studio.pause()
        code = "" if data else "no-image"
        return json_reply({"created": int(time.time()), "data": data}, billed=bool(data), code=code)

    def _item(self, picture: Picture, form: str, fault: Fault) -> dict[str, str]:
        """One picture in the form asked for, or in that of the fault."""
        if form == "url":
            return {"url": self._studio.gallery.issue(picture, fault)}
        file = delivered(picture, fault)
        if file.status != 200 or file.delivery != "whole":  # what can only befall a link does not befall bytes
            file = delivered(picture, FAULTS["ok"])
        code = base64.b64encode(file.body).decode()
        if form == "data-url":
            return {"url": f"data:{file.content_type};base64,{code}"}
        # Neither its letters nor its length are those of base64: a decoder that forgives the one minds the other.
        return {"b64_json": f"*{code[:-3]}" if form == "bad-base64" else code}


# ---------------------------------------------------------------------------------------------------------------------
# The server
# ---------------------------------------------------------------------------------------------------------------------


class MockServer(ThreadingHTTPServer):
    """The services on a loopback port, served from background threads between `start` and `close`.

    Args: `latency` of a picture in seconds; `rpm` requests a minute to each vendor, 0 for no limit; `faults` as for
    --fault; `link_ttl` in seconds; `api_key` empty for a random one; `log` gets one short line for each request.
    Raises ValueError for a setting out of bounds, OSError when the port cannot be had.
    """

    daemon_threads = True
    request_queue_size = 128
    allow_reuse_address = os.name != "nt"  # on Windows it would share a port that another program serves

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
        plan = fault_plan(faults)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        super().__init__((_loopback(host), port), _Handler)
        root = f"http://{self.server_name}:{self.server_port}"
        self.base_url, self.zimageturbo_url, self.openai_url = (
            f"{root}{provider.prefix}".rstrip("/") for provider in (DashScope, ZImageTurbo, OpenAI)
        )
        self.endpoint = f"{root}{DashScope.generation_path}"
        self.stats_url = f"{root}{Ledger.stats_path}"
        self._ledger = Ledger()
        gallery = Gallery(root, link_ttl, self._ledger)
        pause = partial(self._stopping.wait, latency)
        studio = Studio(self.api_key, plan, rpm, gallery, self._ledger, latency, pause)
        # The first whose prefix fits answers: /api/v1/ before /api/.
        self._services: Sequence[Service] = (
            DashScope(studio), ZImageTurbo(studio), OpenAI(studio), gallery, self._ledger,
        )  # fmt: skip

    def start(self) -> MockServer:
        """Serve from a background thread."""
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
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
            self._send(DASHSCOPE.error(code, "BadRequest", message or "The request cannot be read."))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the server logs each request itself."""


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------

Color = tuple[int, int, int]
Point = tuple[float, float]

CAPTION = "MOCK PICTURE - not made by Z-Image Turbo"
GRAIN = 4  # gray levels; also hides the steps of the gradients


class Palette(NamedTuple):
    """Colors of one mood: the sky from top to horizon, the sun or moon, the nearest land."""

    sky: str
    light: str
    land: str
    night: bool = False


PALETTES = (
    Palette("#27306b #7b5a9c #ee8f88 #ffd9a8", "#fff3d6", "#1b1838"),
    Palette("#0b1030 #1c2f63 #3f6c9c #a9cfd6", "#f4f1de", "#070c1f", night=True),
    Palette("#3d7ea6 #79b4c9 #c6e2dc #fdf3dc", "#fffbea", "#12353f"),
    Palette("#3a0d3f #a3214f #f0633c #ffc765", "#ffe9a8", "#1f0a24"),
    Palette("#12122e #3b2463 #8a3d83 #e58a9d", "#ffe3d8", "#0d0a20", night=True),
    Palette("#0d3b3e #2f7d6d #8cc09a #f1e7b8", "#fff8da", "#082526"),
    Palette("#c25b3f #e58f5b #f3bf80 #fbe8c3", "#fffaf0", "#4b1d1b"),
    Palette("#5b6c9e #95a3c8 #d2cadd #f8e3dc", "#fffdf8", "#262b4a"),
    Palette("#04121f #0a3a4a #15706d #7fd0a5", "#eafff1", "#020a12", night=True),
    Palette("#7a4a6b #c77f8b #f0b7a0 #fde7cf", "#fff6ea", "#33203a"),
)

# The outline of a pine, left side upwards, in units of its half width and of its height.
PINE = (
    *((-0.12, 0.0), (-0.12, 0.1), (-1.0, 0.1), (-0.45, 0.36), (-0.75, 0.33)),
    *((-0.3, 0.6), (-0.5, 0.57), (-0.17, 0.8), (-0.27, 0.78)),
)


ENCODINGS = {"png": {"compress_level": 1}, "jpeg": {"quality": 90}, "webp": {"quality": 90}}


@lru_cache(maxsize=PICTURES_KEPT)
def draw_file(picture: Picture) -> bytes:
    """The picture as an image file of its kind."""
    file = io.BytesIO()
    draw(picture).save(file, picture.kind, **ENCODINGS[picture.kind])
    return file.getvalue()


def draw(picture: Picture) -> Image.Image:
    """A landscape over a caption. Palette and landscape follow from prompt and seed, the composition from the size."""
    rng = random.Random(hashlib.sha256(f"{picture.seed}\n{picture.prompt}".encode()).digest())
    palette = rng.choice(PALETTES)
    strip = _caption(picture, palette)
    scene = _grained(_landscape(rng, palette, picture.width, picture.height - strip.height), rng)
    image = Image.new("RGB", (picture.width, picture.height))
    image.paste(scene, (0, 0))
    image.paste(strip, (0, scene.height))
    return image


def _landscape(rng: random.Random, palette: Palette, width: int, height: int) -> Image.Image:
    kind = rng.choice(("peaks", "lake", "dunes"))
    sky = [_rgb(name) for name in palette.sky.split()]
    light, near, haze = _rgb(palette.light), _rgb(palette.land), sky[-1]
    unit, wide = min(width, height), width / height
    horizon = round(height * {"peaks": 0.72, "lake": rng.uniform(0.56, 0.64), "dunes": 0.62}[kind])
    image = Image.new("RGB", (width, height), near)
    image.paste(_gradient((width, horizon), sky), (0, 0))
    sun = (width * rng.uniform(0.25, 0.75), horizon * rng.uniform(0.36, 0.62))
    radius = unit * rng.uniform(0.06, 0.12)
    if palette.night:
        _stars(image, rng, horizon, _mix(sky[1], light, 0.75))
    _glow(image, sun, radius * 8, _mix(haze, light, 0.4), 0.6)
    _glow(image, sun, radius * 3.2, light, 0.55)
    _disc(image, sun, radius, light, crescent=palette.night)
    layers = {"peaks": 5, "lake": 3, "dunes": 6}[kind]
    for layer in range(layers):
        depth = (layer + 1) / layers
        color = _mix(_mix(haze, sky[1], 0.25), near, depth**1.2 * (0.8 if kind == "lake" else 0.97))
        mist = _mix(color, haze, 0.5 - 0.35 * depth)
        if kind == "lake":
            edge = _ridge(rng, width, 3.2 * wide, 6, horizon, unit * (0.30 - 0.09 * layer))
        elif kind == "peaks":
            base = min(horizon + (height - horizon) * (layer - 0.6) / 3, height + unit * 0.04)
            edge = _ridge(rng, width, (2.2 + layer * 0.5) * wide, 6, base, unit * (0.36 - 0.045 * layer))
        else:
            base = min(horizon + (height - horizon) * layer / (layers - 0.8), height + unit * 0.04)
            edge = _ridge(rng, width, 1.6 * wide, 2, base, unit * (0.13 + 0.022 * layer))
        trees = _pines(rng, edge, unit) if kind == "peaks" and layer == layers - 1 else []
        _land(image, edge, (color, mist), horizon if kind == "lake" else height, trees)
    if kind == "lake":
        _water(image, rng, horizon, _mix(sky[0], near, 0.4), light, sun[0])
        shore = _ridge(rng, width, 1.5 * wide, 2, height + unit * 0.01, unit * 0.09)
        _land(image, shore, (near, near), height, _pines(rng, shore, unit * 1.2))
    return image


def _rgb(name: str) -> Color:
    red, green, blue = ImageColor.getrgb(name)[:3]
    return red, green, blue


def _mix(a: Color, b: Color, part: float) -> Color:
    red, green, blue = (round(x + (y - x) * part) for x, y in zip(a, b, strict=True))
    return red, green, blue


def _gradient(size: tuple[int, int], colors: Sequence[Color]) -> Image.Image:
    strip = Image.new("RGB", (1, len(colors)))
    for row, color in enumerate(colors):
        strip.putpixel((0, row), color)
    return strip.resize((1, size[1]), Image.Resampling.BICUBIC).resize(size)  # one column first: many times faster


def _paint(image: Image.Image, color: Color, at: Point, mask: Image.Image) -> None:
    """Color through a mask whose upper left corner is `at`."""
    image.paste(Image.new("RGB", mask.size, color), (round(at[0]), round(at[1])), mask)


def _stars(image: Image.Image, rng: random.Random, horizon: int, color: Color) -> None:
    mask = Image.new("L", (image.width * 2, horizon * 2))
    pen = ImageDraw.Draw(mask)
    for _ in range(round(170 * image.width / image.height)):
        x, y = rng.random() * mask.width, rng.random() ** 1.5 * mask.height * 0.7
        size = min(image.size) * rng.choice((0.0009, 0.0012, 0.0012, 0.0028))
        pen.ellipse((x - size, y - size, x + size, y + size), fill=rng.randrange(90, 256))
    _paint(image, color, (0, 0), mask.reduce(2))


def _glow(image: Image.Image, center: Point, radius: float, color: Color, strength: float) -> None:
    side = round(2 * radius)
    # Pillow's radial gradient reaches 255 in the corners, 255/√2 where the circle touches the sides.
    fade = [round(255 * strength * max(0.0, 1 - value * 2**0.5 / 250) ** 2) for value in range(256)]
    mask = Image.radial_gradient("L").resize((side, side)).point(fade)
    _paint(image, color, (center[0] - radius, center[1] - radius), mask)


def _disc(image: Image.Image, center: Point, radius: float, color: Color, crescent: bool) -> None:
    side = round(2 * radius)
    mask = Image.new("L", (side * 4, side * 4))
    pen = ImageDraw.Draw(mask)
    pen.ellipse((0, 0, side * 4 - 1, side * 4 - 1), fill=255)
    if crescent:
        pen.ellipse((side * 1.2, -side * 0.6, side * 5.2, side * 3.4), fill=0)
    _paint(image, color, (center[0] - radius, center[1] - radius), mask.reduce(4))


def _ridge(rng: random.Random, width: int, span: float, octaves: int, base: float, tall: float) -> list[Point]:
    """The upper edge of a piece of land from left to right: noise in octaves, `span` hills wide, `tall` high."""
    count = max(160, width // 3)
    heights = [0.0] * count
    for octave in range(octaves):
        knots = [rng.random() for _ in range(math.ceil(span * 2**octave) + 2)]
        for i in range(count):
            left, part = divmod(i / (count - 1) * span * 2**octave, 1)
            if octave == 0 or octaves < 3:
                part = part * part * (3 - 2 * part)  # round hills; the finer octaves of rock stay angular
            knot = int(left)
            heights[i] += 0.47**octave * (knots[knot] + (knots[knot + 1] - knots[knot]) * part)
    low, high = min(heights), max(heights)
    return [(i * width / (count - 1), base - tall * (h - low) / (high - low)) for i, h in enumerate(heights)]


def _pines(rng: random.Random, edge: list[Point], unit: float) -> list[list[Point]]:
    """Outlines of pines along an edge, denser and taller in clumps."""
    width, step = edge[-1][0], edge[1][0]
    clumps = [rng.uniform(0.15, 1) for _ in range(int(width / unit * 5) + 2)]
    trees, x = [], 0.0
    while x < width:
        tall = unit * (0.025 + 0.065 * rng.random() * clumps[int(x / unit * 5)])
        half, foot = tall * 0.19, edge[int(x / step)][1] + tall * 0.1
        outline = [*PINE, (0.0, 1.0), *((-dx, dy) for dx, dy in reversed(PINE))]
        trees.append([(x + half * dx, foot - tall * dy) for dx, dy in outline])
        x += half * rng.uniform(0.9, 3)
    return trees


def _land(
    image: Image.Image, edge: list[Point], colors: tuple[Color, Color], bottom: int, trees: Sequence[list[Point]] = ()
) -> None:
    """All below the edge and the trees on it, drawn at twice the size for a smooth outline."""
    top = max(0, int(min(y for outline in (edge, *trees) for _, y in outline)))
    size = (image.width, bottom - top)
    mask = Image.new("L", (size[0] * 2, size[1] * 2))
    pen = ImageDraw.Draw(mask)
    for outline in ([(0, bottom), *edge, (image.width, bottom)], *trees):
        pen.polygon([(x * 2, (y - top) * 2) for x, y in outline], fill=255)
    image.paste(_gradient(size, colors), (0, top), mask.reduce(2))


def _water(image: Image.Image, rng: random.Random, horizon: int, tint: Color, light: Color, sun_x: float) -> None:
    """Fills all below the horizon with the mirror image of what is above, blurred, rippled and glittering."""
    width, deep = image.width, image.height - horizon
    mirror = ImageOps.flip(image.crop((0, max(0, horizon - round(deep * 1.15)), width, horizon)))
    margin = width // 60
    mirror = mirror.resize((width, max(2, deep // 12)), Image.Resampling.BOX).resize((width + 2 * margin, deep))
    mirror = Image.blend(mirror, _gradient(mirror.size, (_mix(tint, light, 0.25), tint)), 0.3)
    y = 0
    while y < deep:  # rows slide sideways, thicker and wider towards the viewer
        rows = 1 + y * 5 // deep
        left = margin + round(rng.uniform(-1, 1) * margin * y / deep * 0.7)
        image.paste(mirror.crop((left, y, left + width, min(deep, y + rows))), (0, horizon + y))
        y += rows
    unit = min(image.size)
    mask = Image.new("L", (width * 2, deep * 2))
    pen = ImageDraw.Draw(mask)
    for _ in range(240):
        down = rng.random() ** 1.7
        x, y_mid = 2 * (sun_x + rng.gauss(0, unit * (0.03 + 0.1 * down))), mask.height * down
        half, thick = unit * rng.uniform(0.006, 0.045) * (0.4 + down), max(1.0, unit * 0.0012 * (0.6 + 2 * down))
        shine = round(rng.uniform(70, 210) * (1 - 0.6 * down))
        pen.ellipse((x - half, y_mid - thick, x + half, y_mid + thick), fill=shine)
    _paint(image, light, (0, horizon), mask.reduce(2))


def _grained(image: Image.Image, rng: random.Random) -> Image.Image:
    noise = Image.frombytes("L", image.size, rng.randbytes(image.width * image.height))
    noise = noise.point([value * GRAIN // 256 for value in range(256)])
    return ImageChops.add(image, Image.merge("RGB", (noise, noise, noise)), offset=-(GRAIN // 2))


def _caption(picture: Picture, palette: Palette) -> Image.Image:
    """The strip below the landscape: that this is a mock, what was asked, seed and size."""
    wanted = max(12, 0.021 * math.sqrt(picture.width * picture.height))
    size = max(2, round(min(wanted, picture.width / 24, picture.height / 12)))
    pad, line = round(size * 0.9), round(size * 1.45)
    big, small = ImageFont.load_default(size), ImageFont.load_default(round(size * 0.82))
    paper, ink = _mix(_rgb(palette.land), (0, 0, 0), 0.35), _mix(_rgb(palette.light), (255, 255, 255), 0.4)
    strip = Image.new("RGB", (picture.width, 2 * line + round(pad * 1.3)), paper)
    pen = ImageDraw.Draw(strip)
    pen.rectangle((0, 0, strip.width, max(1, size // 9)), fill=_rgb(palette.sky.split()[-1]))
    facts = f"seed {picture.seed}   {picture.width}*{picture.height}"
    room = strip.width - 3 * pad - small.getlength(facts)
    middle = pad * 0.75 + line * 0.5
    pen.text((pad, middle), CAPTION, ink, big, anchor="lm")
    pen.text((pad, middle + line), _fitting(picture.prompt, small, room), _mix(ink, paper, 0.3), small, anchor="lm")
    pen.text((strip.width - pad, middle + line), facts, _mix(ink, paper, 0.3), small, anchor="rm")
    return strip


def _fitting(text: str, font: Any, room: float) -> str:
    """The text without letters that the font lacks (it has no Chinese), cut to the room."""
    missing = bytes(font.getmask("\uffff"))
    plain = unicodedata.normalize("NFKD", " ".join(text[:500].split()))
    drawn = " ".join("".join(c for c in plain if c.isprintable() and bytes(font.getmask(c)) != missing).split())
    if font.getlength(drawn) <= room:
        return drawn
    while drawn and font.getlength(drawn + "...") > room:
        drawn = drawn[:-1]
    return f"{drawn.rstrip()}..." if drawn else ""


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    about = "The image services on 127.0.0.1, offline and free. The first line on stdout says where, as JSON."
    fault = "how the next requests fail, NAME[*COUNT|*inf],... then normal service; 'list' names all faults"
    parser = _Parser(prog="mock_server.py", description=about, allow_abbrev=False)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="a loopback address (default: %(default)s)")
    add("--port", type=int, default=0, help="default: a free one")
    add("--latency", type=float, default=0.0, metavar="S", help="seconds that a picture takes")
    add(
        "--rpm",
        type=int,
        default=DEFAULT_RPM,
        metavar="N",
        help="requests a minute to each vendor, 0: no limit (default: %(default)s)",
    )
    add("--fault", dest="faults", default="", metavar="SPEC", help=fault)
    add("--link-ttl", type=float, default=DEFAULT_LINK_TTL_S, metavar="S", help="life of image links (default: 24 h)")
    add("--api-key", default="", metavar="KEY", help="the only key that is right (default: a random one)")
    return parser


def _log(line: str) -> None:
    try:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    except OSError:
        pass  # nobody reads the log any more


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.faults == "list":
        for name, fault in FAULTS.items():
            only = f" ({', '.join(fault.services)} only)" if len(fault.services) < len(SERVICES) else ""
            print(f"{name:20} {fault.help}{only}")
        return 0
    try:
        mock = MockServer(**vars(options), log=_log)
    except ValueError as problem:
        parser.error(str(problem))
    except OSError as problem:
        parser.error(f"cannot listen on {options.host}:{options.port}: {problem.strerror}; --port 0 picks a free port")
    done = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: done.set())
    with mock:
        where = {name: getattr(mock, name) for name in ("base_url", "endpoint", "api_key", "stats_url")}
        providers = {
            name: {"base_url": url, "api_key": mock.api_key}
            for name, url in (("zimageturbo", mock.zimageturbo_url), ("openai", mock.openai_url))
        }
        print(json.dumps(where | {"providers": providers, "pid": os.getpid()}), flush=True)
        while not done.wait(0.5):  # with a limit: on Windows an endless wait hears no Ctrl-C
            pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
