#!/usr/bin/env python3
"""Turn words into one verified picture with Z-Image Turbo, and prove what was asked and paid.

A request (flags or JSON) is validated and normalized, sent once to the provider, and the picture is
downloaded, verified and saved beside an evidence file from which it can be recovered or made again.
Only one call in this file costs money (`obtain`); everything that can be checked is checked before it,
and everything that is known after it is on disk before the next step.

This file stands alone: it needs requests, jsonschema and Pillow, and nothing else of the repository.
Other ways to the same model lie in providers/ beside it, a file each, loaded when they are named.
Chapters: contract, errors, request, credentials, endpoint and trust, provider, transport, evidence,
picture, plan, local checks, making a picture, settling, free commands, command line.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "requests>=2.32.3,<3",
#   "jsonschema>=4.18,<5",
#   "Pillow>=10.3,<14",
# ]
# ///
from __future__ import annotations

import gc
import os
import signal


def _leave_early(number: int, _frame: object) -> None:
    """Until main() installs its handlers nothing has been done: a signal ends the process at once."""
    os.write(2, b"error: interrupted: before anything was sent\nnext: nothing was billed; run it again when you like\n")
    os._exit(128 + number)


if __name__ == "__main__":
    for _signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_signum, _leave_early)
    gc.disable()  # one short run leaves nothing worth collecting, and imports are faster without

import argparse
import calendar
import contextlib
import datetime as dt
import functools
import hashlib
import importlib.util
import io
import ipaddress
import json
import math
import random
import re
import secrets
import shlex
import shutil
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn, TypeVar
from urllib.parse import parse_qs, quote, urljoin, urlsplit, urlunsplit

if TYPE_CHECKING:
    import PIL.Image

if sys.version_info < (3, 10):
    sys.stderr.write("error: Python 3.10 or newer is needed\nnext: run it with `uv run --script`, or a newer python3\n")
    sys.exit(2)

# ═══════════════════════════════════════════════════════════════════════════════════════════════════
# 1. Contract: the numbers and schemas that users and their scripts rely on
# ═══════════════════════════════════════════════════════════════════════════════════════════════════

VERSION = "0.4.0"
SKILL = "alicloud-ai-image-zimage-turbo"
REQUIREMENTS = {"requests": "requests>=2.32.3,<3", "jsonschema": "jsonschema>=4.18,<5", "PIL": "Pillow>=10.3,<14"}

MIN_PIXELS = 512 * 512
MAX_PIXELS = 2048 * 2048
DEFAULT_SIZE = "1024*1024"
MAX_SEED = 2**31 - 1
LONG_PROMPT = 800  # characters; sibling models of the vendor cut there
RATIO_SIZES = {  # the vendor's recommended size of about 1024*1024 pixels for each ratio
    "1:1": "1024*1024",
    "2:3": "832*1248",
    "3:2": "1248*832",
    "3:4": "864*1152",
    "4:3": "1152*864",
    "7:9": "896*1152",
    "9:7": "1152*896",
    "9:16": "720*1280",
    "16:9": "1280*720",
    "9:21": "576*1344",
    "21:9": "1344*576",
}

MIB = 1024 * 1024
MAX_REQUEST_BYTES = 1 * MIB
MAX_ANSWER_BYTES = 4 * MIB
MAX_IMAGE_BYTES = 64 * MIB
MAX_EVIDENCE_BYTES = 8 * MIB
MAX_DECODED_PIXELS = 50_000_000  # ten times the largest picture the model makes: more is a bomb
MIN_FREE_BYTES = 16 * MIB  # the largest picture, uncompressed, is 12 MiB
MAX_HOPS = 5
OUTSIDE_TEXT = 500  # characters of a text from outside that an error repeats

DEFAULT_TIMEOUT = 100.0  # seconds; agents' shells cut a command at 120 s
TIMEOUT_RANGE = (1.0, 86_400.0)
GENERATE_SHARE = 0.8  # of the timeout; the last fifth is kept for the download
SHORTEST_ATTEMPT_SHARE = 0.1  # of the timeout; with less time than that left, no paid attempt starts
CONNECT_TIMEOUT = 10.0  # seconds for one address
DEFAULT_MAX_RETRIES = 4
MAX_RETRIES_RANGE = (0, 100)
UNREACHABLE_RETRIES = 2  # a refused connection or a missing name fails in seconds
BACKOFF_BASE, BACKOFF_CAP = 0.5, 20.0  # seconds
DOWNLOAD_RETRIES = 4  # free, so --max-retries does not count them
CORRUPT_DOWNLOAD_RETRIES = 1  # the same bytes twice will not get better
POLL_FIRST, POLL_GROWTH, POLL_LONGEST = 1.0, 1.5, 5.0  # seconds between questions after a task
LAST_POLL = 0.5  # seconds before the end, in which no further question is worth it
POLL_TIMEOUT, POLL_SHARE = 10.0, 0.3  # seconds for one question, and of the time left: the next may be answered
LOST_AFTER = 3  # questions in a row to which the service does not know the task: it may learn of it a moment late
RATIO_TOLERANCE = 0.02  # where only the ratio of a size can be asked for

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}
MAX_SIDE = {"PNG": 2**31 - 1, "JPEG": 65_500, "WEBP": 16_383}  # pixels; limits of the file formats
READABLE_FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP"]  # others start programs or are not worth the risk
SAVE_OPTIONS: dict[str, dict[str, Any]] = {"PNG": {}, "JPEG": {"quality": 95}, "WEBP": {"quality": 95}}

EXIT_OK = 0
EXIT_INVALID = 2
EXIT_KEY = 3
EXIT_BALANCE = 4
EXIT_BLOCKED = 5
EXIT_UNAVAILABLE = 6
EXIT_UNKNOWN = 7
EXIT_UNUSABLE = 8
EXIT_DISK = 9
EXIT_SIGNAL = 128  # plus the number of the signal

REQUEST_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "image.generate request",
    "type": "object",
    "additionalProperties": False,
    "required": ["prompt"],
    "properties": {
        "prompt": {
            "type": "string",
            "pattern": r"\S",
            "description": "What to draw, in English or Chinese. Over 800 characters gives a warning.",
        },
        "size": {
            "type": "string",
            "pattern": "^[1-9][0-9]{0,6}[*xX×][1-9][0-9]{0,6}$",
            "default": DEFAULT_SIZE,
            "description": "width*height in pixels; total pixels from 512*512 to 2048*2048.",
        },
        "aspect_ratio": {
            "enum": list(RATIO_SIZES),
            "description": "Instead of size: picks the recommended size of about 1024*1024 pixels.",
        },
        "seed": {
            "type": "integer",
            "minimum": -1,
            "maximum": MAX_SEED,
            "description": "-1 or left out: one is picked, sent and recorded.",
        },
        "prompt_extend": {
            "type": "boolean",
            "default": False,
            "description": "Let the service rewrite the prompt first: slower, billed at about twice the price.",
        },
        "base_url": {
            "type": "string",
            "minLength": 1,
            "description": "Whole endpoint, API root or bare host; the key goes to trusted hosts only.",
        },
    },
    "not": {"required": ["size", "aspect_ratio"]},
}

ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["code", "message", "hint", "exit_code", "retryable", "billed"],
    "properties": {
        "code": {"type": "string", "pattern": "^[a-z][a-z0-9_]*$"},
        "message": {"type": "string"},
        "hint": {"type": "string", "description": "What to do next, one line."},
        "exit_code": {"type": "integer"},
        "retryable": {"type": "boolean", "description": "The same command may be run again without paying twice."},
        "billed": {"enum": ["no", "yes", "unknown"]},
        "problems": {"type": "array", "items": {"type": "string"}},
        "problem_count": {"type": "integer", "description": "Where problems holds only the first of many (batch)."},
        "changes": {"type": "object", "description": "What would be made again, and for how many US$ (batch)."},
        "progress": {"type": "object", "description": "How far the running batch is."},
        "next_command": {"type": "string", "description": "Free of charge, shell-quoted, absolute paths."},
        "retry_after_s": {"type": "number", "minimum": 0},
        "http_status": {"type": "integer"},
        "service_code": {"type": "string"},
        "request_id": {"type": "string"},
        "evidence_path": {"type": "string"},
        "image_url": {"type": "string"},
    },
}

RESPONSE_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "image.generate response",
    "description": 'What --print-response prints; on failure {"error": …} with the shape of $defs/error.',
    "type": "object",
    "required": [
        "width",
        "height",
        "prompt",
        "request_id",
        "size",
        "provider",
        "region",
        "image_path",
        "evidence_path",
        "estimated_cost",
    ],
    "properties": {
        "image_url": {"type": "string", "description": "Signed link, dies soon. None where bytes are handed over."},
        "width": {"type": "integer", "description": "Pixels of the saved file."},
        "height": {"type": "integer", "description": "Pixels of the saved file."},
        "prompt": {"type": "string"},
        "rewritten_prompt": {"type": "string"},
        "reasoning": {"type": "string"},
        "request_id": {"type": "string"},
        "seed": {"type": "integer", "minimum": 0, "maximum": MAX_SEED, "description": "None where none can be sent."},
        "size": {"type": "string", "description": "As asked, width*height."},
        "provider": {"type": "string"},
        "region": {"type": "string"},
        "image_path": {"type": "string", "description": "Absolute."},
        "evidence_path": {"type": "string", "description": "Absolute."},
        "estimated_cost": {"type": "number", "description": "US$ by the price list."},
        "warnings": {"type": "array", "items": {"type": "string"}, "minItems": 1},
    },
    "$defs": {"error": ERROR_SCHEMA},
}

EVIDENCE_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "evidence of one picture",
    "type": "object",
    "required": [
        "schema_version",
        "tool",
        "status",
        "provider",
        "region",
        "endpoint",
        "operation",
        "billable",
        "request",
        "payload",
        "output",
        "started_at",
        "attempts",
        "cost",
    ],
    "properties": {
        "schema_version": {"const": 1},
        "tool": {"type": "object", "required": ["name", "version"]},
        "status": {"enum": ["submitting", "submitted", "generated", "saved", "failed", "unknown"]},
        "provider": {"type": "string", "pattern": "^[a-z][a-z0-9_]*$"},
        "region": {"type": "string"},
        "endpoint": {"type": "string"},
        "operation": {"const": "image.generate"},
        "billable": {"type": "boolean"},
        "request": {"type": "object", "description": "Normalized: itself a valid request."},
        "payload": {"type": "object", "description": "The body that was sent."},
        "settings": {"type": "object", "description": "The provider's own options."},
        "output": {"type": "string", "description": "Absolute path that was asked for."},
        "started_at": {"type": "string", "format": "date-time"},
        "generated_at": {"type": "string", "format": "date-time"},
        "finished_at": {"type": "string", "format": "date-time"},
        "timings_ms": {"type": "object", "additionalProperties": {"type": "number"}},
        "attempts": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["at"],
                "properties": {
                    "at": {"type": "string", "format": "date-time"},
                    "http_status": {"type": "integer"},
                    "service_code": {"type": "string"},
                    "outcome": {"type": "string", "description": "generated, submitted, or the code of the error."},
                    "billed": {"enum": ["no", "yes", "unknown"]},
                    "wait_s": {"type": "number", "description": "Pause before the next attempt, in seconds."},
                },
            },
        },
        "task_id": {"type": "string", "minLength": 1},
        "response": {
            "type": "object",
            "properties": {
                "request_id": {"type": "string"},
                "usage": {"type": "object"},
                "image_url": {"type": "string"},
                "other_image_urls": {"type": "array", "items": {"type": "string"}},
                "expires_at": {"type": "string", "format": "date-time"},
                "rewritten_prompt": {"type": "string"},
                "reasoning": {"type": "string"},
            },
        },
        "image": {
            "type": "object",
            "required": ["path", "sha256", "bytes", "format", "width", "height"],
            "properties": {
                "path": {"type": "string"},
                "sha256": {"type": "string"},
                "bytes": {"type": "integer"},
                "format": {"enum": list(FORMATS.values())},
                "width": {"type": "integer"},
                "height": {"type": "integer"},
                "source_format": {"type": "string", "description": "Where the picture was converted."},
                "source_sha256": {"type": "string", "description": "Where the picture was converted."},
                "warnings": {"type": "array", "items": {"type": "string"}},
            },
        },
        "cost": {
            "type": "object",
            "required": ["estimate", "currency", "basis", "price_list_date"],
            "properties": {
                "estimate": {"type": "number"},
                "currency": {"const": "USD"},
                "basis": {"type": "string"},
                "price_list_date": {"type": "string"},
            },
        },
        "warnings": {"type": "array", "items": {"type": "string"}},
        "error": ERROR_SCHEMA,
    },
}

SCHEMAS = {"request": REQUEST_SCHEMA, "response": RESPONSE_SCHEMA, "evidence": EVIDENCE_SCHEMA}

# ═══════════════════════════════════════════════════════════════════════════════════════════════════
# 2. Errors: every way in which a command can end other than well, signals, and text that must be safe to show
# ═══════════════════════════════════════════════════════════════════════════════════════════════════


class Kind(NamedTuple):
    """What one error code means: exit code, whether the same command may run again, billing, advice."""

    exit_code: int
    retryable: bool
    billed: str  # no | yes | unknown
    hint: str


INSTALL_HINT = (
    "run it with `uv run --script {script} …`, or make an environment: python3 -m venv .venv && "
    ".venv/bin/pip install {packages} (then call .venv/bin/python)"
)
ASK_BEFORE_PAYING = (
    "ask the user before paying again: --replay EVIDENCE makes the same request once more and costs again"
)
MAKE_ANEW = "the picture may have been made; --replay EVIDENCE makes it once more, which costs only time"
RECOVER_FREE = "run next_command: it fetches the picture without paying again"
GO_ON_FREE = "run next_command: it goes on waiting for the picture without paying again"

KINDS: dict[str, Kind] = {
    # Refused here, before anything is sent.
    "usage": Kind(EXIT_INVALID, False, "no", "correct the arguments named above; --help lists them all"),
    "invalid_request": Kind(
        EXIT_INVALID, False, "no", "correct every field named above; --schema request has the rules"
    ),
    "file_unreadable": Kind(EXIT_INVALID, False, "no", "give the path of a readable JSON file in UTF-8 or UTF-16"),
    "invalid_output": Kind(EXIT_INVALID, False, "no", "give --output a file name that ends in .png, .jpg or .webp"),
    "output_exists": Kind(EXIT_INVALID, False, "no", "choose another --output, or add --overwrite to replace the file"),
    "invalid_base_url": Kind(
        EXIT_INVALID, False, "no", "give the whole endpoint, the API root or the bare host, over https"
    ),
    "host_not_trusted": Kind(
        EXIT_INVALID,
        False,
        "no",
        "use the provider's own host; --trust-host is only for a host that the user owns and names: ask them first",
    ),
    "region_mismatch": Kind(EXIT_INVALID, False, "no", "leave out --region, or give the base URL of that region"),
    "missing_package": Kind(EXIT_INVALID, False, "no", INSTALL_HINT),
    "invalid_evidence": Kind(EXIT_INVALID, False, "no", "give the path of an evidence file that this tool wrote"),
    "nothing_to_recover": Kind(
        EXIT_INVALID, False, "no", "nothing was billed; make the request again (--replay EVIDENCE), which costs"
    ),
    "missing_weights": Kind(EXIT_INVALID, False, "no", "fetch the model first, or name the folder that holds it"),
    "too_little_memory": Kind(EXIT_INVALID, False, "no", "free memory, take a smaller size, or use another provider"),
    "internal_error": Kind(EXIT_INVALID, False, "no", "this is a fault of the tool: report it with this message"),
    "key_missing": Kind(EXIT_KEY, False, "no", "tell the user; a key never belongs in the chat or on a command line"),
    "key_malformed": Kind(EXIT_KEY, False, "no", "tell the user to store the key again, alone and without spaces"),
    "disk": Kind(EXIT_DISK, False, "no", "make the folder writable and free some space, then run it again"),
    # Answered by the service, and not billed.
    "rejected_by_service": Kind(EXIT_INVALID, False, "no", "correct the request as the service's message says"),
    "not_found": Kind(EXIT_INVALID, False, "no", "check region and base URL: the model or path is not there"),
    "key_rejected": Kind(
        EXIT_KEY, False, "no", "tell the user; it may be the key of another region (--region) or another account"
    ),
    "access_denied": Kind(
        EXIT_KEY, False, "no", "tell the user to activate the model and check permissions in the provider's console"
    ),
    "balance": Kind(EXIT_BALANCE, False, "no", "tell the user to settle the account; do not retry"),
    "quota": Kind(EXIT_BALANCE, False, "no", "tell the user that the quota is used up; do not retry"),
    "blocked": Kind(EXIT_BLOCKED, False, "no", "tell the user; reword the prompt only with their consent"),
    "rate_limited": Kind(
        EXIT_UNAVAILABLE, True, "no", "wait retry_after_s, or a minute where it is not given, then run it once more"
    ),
    "service_failing": Kind(EXIT_UNAVAILABLE, True, "no", "wait a minute, then run it once more"),
    "unreachable": Kind(
        EXIT_UNAVAILABLE, True, "no", "check network, proxy, certificates and base URL, then run it once more"
    ),
    "task_failed": Kind(EXIT_UNAVAILABLE, True, "no", "nothing was billed; run it once more, then tell the user"),
    "too_slow": Kind(EXIT_UNAVAILABLE, False, "no", "give a longer --timeout or a smaller size; nothing was billed"),
    "refused_by_service": Kind(EXIT_UNUSABLE, False, "no", "report the status and message; do not rerun unasked"),
    # After the request has left.
    "outcome_unknown": Kind(EXIT_UNKNOWN, False, "unknown", ASK_BEFORE_PAYING),
    "paid_not_downloaded": Kind(EXIT_UNKNOWN, False, "yes", RECOVER_FREE),
    "no_image": Kind(
        EXIT_UNUSABLE,
        False,
        "unknown",
        "tell the user: no picture came back (often content safety); do not rerun unasked",
    ),
    "answer_unusable": Kind(EXIT_UNUSABLE, False, "unknown", "report it; do not rerun unasked, it may cost again"),
    "image_unusable": Kind(
        EXIT_UNUSABLE,
        False,
        "yes",
        "run next_command once, free; then report it, and do not pay again unasked",
    ),
    "image_too_large": Kind(EXIT_UNUSABLE, False, "yes", "report it; do not pay again unasked"),
    "hop_refused": Kind(
        EXIT_UNUSABLE, False, "yes", "report it: the link leads where no picture should be fetched from"
    ),
    "link_expired": Kind(
        EXIT_UNUSABLE, False, "yes", "the picture can only be made again: ask the user, then --replay EVIDENCE (costs)"
    ),
    "link_refused": Kind(
        EXIT_UNUSABLE, False, "yes", "run next_command once, free; then report it, and do not pay again unasked"
    ),
    "disk_after_paying": Kind(EXIT_DISK, False, "yes", "free space or mend the folder, then run next_command, free"),
    "interrupted": Kind(EXIT_SIGNAL, False, "no", "nothing was billed; run it again when you like"),
}


class Failure(Exception):
    """An end of a command that its user must know about.

    `code` is a key of KINDS, which gives exit code, retryable, billed and hint unless `facts` overrides them;
    the other facts are fields of the error object (ERROR_SCHEMA).
    """

    def __init__(self, code: str, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.facts = {name: value for name, value in facts.items() if value is not None}

    def fact(self, name: str) -> Any:
        """The named fact, from this failure or else from its kind."""
        return self.facts.get(name, getattr(KINDS[self.code], name, None))

    @property
    def exit_code(self) -> int:
        return int(self.fact("exit_code"))

    @property
    def billed(self) -> str:
        return str(self.fact("billed"))

    def object(self) -> dict[str, Any]:
        """The error object of the contract. Key-like text is masked; paths, links and commands stay whole."""
        result = {
            "code": self.code,
            "message": mask(self.message),
            "hint": mask(self.fact("hint")),
            "exit_code": self.exit_code,
            "retryable": self.fact("retryable"),
            "billed": self.billed,
        }
        for name in ERROR_SCHEMA["properties"]:
            if name not in result and name in self.facts:
                result[name] = self.facts[name]
        if "problems" in result:
            result["problems"] = [mask(problem) for problem in result["problems"]]
        return result


class Problem(NamedTuple):
    """One thing wrong with what the user gave: its error code, a sentence naming the field, special advice."""

    code: str
    text: str
    hint: str | None = None


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raise all problems as one Failure; none raises nothing."""
    if not problems:
        return
    if len(problems) == 1:
        code, text, hint = problems[0]
        raise Failure(code, text, hint=hint, problems=[text])
    codes = {problem.code for problem in problems}
    texts = [problem.text for problem in problems]
    code = codes.pop() if len(codes) == 1 else "invalid_request"
    raise Failure(code, f"{len(texts)} problems: {'; '.join(texts)}", problems=texts)


@contextlib.contextmanager
def noting(problems: list[Problem]) -> Iterator[None]:
    """Add a failure to the problems instead of stopping at it, so that all are told at once."""
    try:
        yield
    except Failure as failure:
        problems.append(Problem(failure.code, failure.message, failure.facts.get("hint")))


class Interrupted(BaseException):
    """SIGINT or SIGTERM, raised only where waiting can be broken off without losing what is known."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum
        self.request_left = True  # or may have


class Signals:
    """Turns SIGINT and SIGTERM into Interrupted, but only inside `breakable` sections.

    Everywhere else they wait: an answer that has arrived is on disk before the command gives way. Python runs
    signal handlers in the main thread only: in every other thread a section is never broken off.
    """

    def __init__(self) -> None:
        self._pending: int | None = None
        self._breakable = False

    def install(self) -> None:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, _frame: object) -> None:
        self._pending = signum
        self._check()

    def _check(self) -> None:
        if self._breakable and self._pending is not None:
            self._breakable = False
            raise Interrupted(self._pending)

    @contextlib.contextmanager
    def breakable(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._breakable = True
        try:
            self._check()
            yield
        finally:
            self._breakable = False


SIGNALS = Signals()

# What must never be printed or written. Filled where keys are read, consulted where text leaves or enters.
_secrets: set[str] = set()
SHORTEST_SECRET = 6  # characters; shorter values of other programs' variables, such as "none", are words
_KEY_LIKE = re.compile(r"\bsk-[A-Za-z0-9_\-]{6,}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")


def remember_secret(value: str) -> None:
    """Have this value, and its percent-encoded form, masked in every text from outside and every message."""
    _secrets.update({value, quote(value, safe="")} - {""})


def mask(text: str) -> str:
    """The text with every known key, and everything that looks like one, replaced."""
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _KEY_LIKE.sub("sk-***", text)


def outside_text(value: object, limit: int = OUTSIDE_TEXT) -> str:
    """A text from a service, made safe to show: one line, no key, no control characters, at most `limit` long."""
    text = value if isinstance(value, str) else "" if value is None else str(value)
    text = _CONTROL.sub(" ", without_surrogates(mask(text))).strip()
    return text if len(text) <= limit else text[: limit - 1] + "…"


def without_surrogates(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def outside_json(value: Any, depth: int = 4) -> Any:
    """A JSON value from a service, made safe to keep: bounded in depth and length, finite, without the key."""
    if isinstance(value, str):
        return outside_text(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        items = list(value.items())[:50] if depth else []
        kept = {outside_text(name, 100): outside_json(item, depth - 1) for name, item in items}
        return {name: item for name, item in kept.items() if item is not None}
    if isinstance(value, list):
        kept_items = [outside_json(item, depth - 1) for item in value[:50]] if depth else []
        return [item for item in kept_items if item is not None]
    return value


# ═══════════════════════════════════════════════════════════════════════════════════════════════════
# 3. Request: what the user asks for, validated and normalized
# ═══════════════════════════════════════════════════════════════════════════════════════════════════


class ImageRequest(NamedTuple):
    """A normalized request: size `width*height` in pixels is filled in, and the seed where one can be sent."""

    prompt: str
    size: str
    seed: int | None
    prompt_extend: bool = False
    base_url: str | None = None

    @property
    def width_height(self) -> tuple[int, int]:
        return parse_size(self.size)

    def as_dict(self) -> dict[str, Any]:
        """The request as JSON; itself valid, and normalizing it changes nothing."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def parse_size(text: str) -> tuple[int, int]:
    """Width and height, in pixels, of a size that has passed the schema."""
    width, height = re.split("[*xX×]", text)
    return int(width), int(height)


def pick_seed() -> int:
    return secrets.randbelow(MAX_SEED + 1)


_validators: dict[str, Any] = {}  # by the title of their schema: building one costs as much as ten checks


def request_problems(raw: Any, schema: Mapping[str, Any] = REQUEST_SCHEMA) -> list[Problem]:
    """Everything wrong with a request as written; an empty list means that `normalize` takes it.

    `schema` may be one that adds to REQUEST_SCHEMA or takes from it, under a title of its own.
    """
    if schema is REQUEST_SCHEMA and is_plainly_valid(raw):
        return []
    import jsonschema

    if not isinstance(raw, dict):
        return [Problem("invalid_request", f"request: must be a JSON object, got {json_kind(raw)}")]
    title = schema["title"]
    if title not in _validators:
        _validators[title] = jsonschema.Draft202012Validator(schema)
    texts = [text for error in _validators[title].iter_errors(raw) for text in schema_sentences(error, raw)]
    return [Problem("invalid_request", text) for text in sorted(texts) + rule_sentences(raw)]


def is_plainly_valid(raw: Any) -> bool:
    """Whether a request surely is valid, told without jsonschema, whose import is a fifth of a whole run.

    It may say no to a valid request, never yes to another: then the schema has the word, and names what is wrong.
    """
    checks: dict[str, Callable[[Any], bool]] = {
        "prompt": lambda value: isinstance(value, str) and value.strip() != "",
        "size": lambda value: isinstance(value, str) and "aspect_ratio" not in raw,
        "aspect_ratio": lambda value: isinstance(value, str) and value in RATIO_SIZES,
        "seed": lambda value: type(value) is int and -1 <= value <= MAX_SEED,
        "prompt_extend": lambda value: isinstance(value, bool),
        "base_url": lambda value: isinstance(value, str) and value != "",
    }
    return (
        isinstance(raw, dict)
        and "prompt" in raw
        and all(name in checks and checks[name](value) for name, value in raw.items())
        and not rule_sentences(raw)
    )


def schema_sentences(error: Any, raw: dict[str, Any]) -> list[str]:
    """One schema error as sentences that name the field, what was expected and what was given."""
    name = ".".join(str(part) for part in error.absolute_path)
    given = shown(error.instance)
    rule = error.schema
    if error.validator == "additionalProperties":
        known = rule["properties"]
        return [f"{shown(field)}: unknown field; known are {', '.join(known)}" for field in raw if field not in known]
    if error.validator == "required":
        return [f"{field}: required" for field in rule["required"] if field not in raw]
    if error.validator == "not":
        return ["size, aspect_ratio: give one of the two, not both"]
    if error.validator == "type":
        kind = json_kind(error.instance)
        return [f"{name}: must be of type {rule['type']}, got {kind if kind == given else f'{kind} {given}'}"]
    if error.validator in ("minimum", "maximum"):
        return [f"{name}: must be from {rule['minimum']} to {rule['maximum']}, got {given}"]
    if error.validator == "enum":
        return [f"{name}: must be one of {' '.join(rule['enum'])}, got {given}"]
    if name == "size":
        return []  # size_sentences checks its form, to the last character
    return [f"{name}: must not be blank"]


def rule_sentences(raw: dict[str, Any]) -> list[str]:
    """What a schema cannot say (or says too loosely): text that no encoding can carry, and the size."""
    sentences = []
    for name in ("prompt", "base_url"):
        if isinstance(raw.get(name), str) and raw[name] != without_surrogates(raw[name]):
            sentences.append(f"{name}: holds a lone surrogate, which is not text; write it again in UTF-8")
    size = raw.get("size")
    if isinstance(size, str):
        sentences += size_sentences(size)
    return sentences


def size_sentences(size: str) -> list[str]:
    """What is wrong with a size, checked to its last character (`$` in a pattern lets a newline pass)."""
    if not re.fullmatch("[1-9][0-9]{0,6}[*xX×][1-9][0-9]{0,6}", size):
        return [f"size: must be width*height such as 1024*1024, got {shown(size)}"]
    width, height = parse_size(size)
    if MIN_PIXELS <= width * height <= MAX_PIXELS:
        return []
    return [
        f"size: {width}*{height} is {width * height} pixels; "
        f"the total must be from {MIN_PIXELS} (512*512) to {MAX_PIXELS} (2048*2048)"
    ]


def normalize(raw: dict[str, Any], *, with_seed: bool = True) -> ImageRequest:
    """The normalized form of a request that has no problems; `with_seed`: one is picked where none is given."""
    if "aspect_ratio" in raw:
        size = RATIO_SIZES[raw["aspect_ratio"]]
    else:
        size = "{}*{}".format(*parse_size(raw.get("size", DEFAULT_SIZE)))
    seed = int(raw.get("seed", -1))
    return ImageRequest(
        prompt=raw["prompt"],
        size=size,
        seed=seed if seed != -1 else pick_seed() if with_seed else None,
        prompt_extend=raw.get("prompt_extend", False),
        base_url=raw.get("base_url"),
    )


def shown(value: Any) -> str:
    """A value as JSON, short enough for one line of an error."""
    return outside_text(json.dumps(value, ensure_ascii=False, default=str), 60)


def json_kind(value: Any) -> str:
    """The JSON name of a Python value's type."""
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number"}
    return kinds.get(type(value), "null")


def parse_json(text: str) -> Any:
    """Strict JSON: no repeated fields, no NaN.

    Raises:
        ValueError: with a sentence that says what is wrong and where.
    """

    def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, value in pairs:
            if name in fields:
                raise ValueError(f"{shown(name)} stands in it twice")
            fields[name] = value
        return fields

    def bounded(digits: str) -> int:
        return int(digits[:300])  # out of every range all the same, and Python takes no longer ones

    def no_constants(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a JSON value")

    try:
        return json.loads(text, object_pairs_hook=no_repeats, parse_constant=no_constants, parse_int=bounded)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_input(option: str, name: str, limit: int, wait: float) -> bytes:
    """The bytes of the file that an option names; what does not arrive within `wait` seconds is an error.

    Raises:
        Failure: file_unreadable.
    """
    label = f"{option} {outside_text(name, 200)}".strip()
    try:
        if name == "-":
            if sys.stdin is None or sys.stdin.isatty():
                raise Failure("file_unreadable", f"{label}: nothing is piped into standard input")
            # Not sys.stdin itself: a thread that still reads it would crash the interpreter's end.
            content = _read_in_time(sys.stdin.fileno(), limit, wait)
        elif stat.S_ISREG(os.stat(name).st_mode):
            with open(name, "rb") as source:
                content = source.read(limit + 1)
        elif os.path.isdir(name):
            raise Failure("file_unreadable", f"{label}: is a folder")
        else:
            content = _read_in_time(name, limit, wait)
    except (OSError, ValueError) as error:
        raise Failure("file_unreadable", f"{label}: cannot be read: {os_reason(error)}") from None
    if len(content) > limit:
        raise Failure("file_unreadable", f"{label}: is larger than {limit // MIB} MiB")
    return content


def _read_in_time(source: str | int, limit: int, wait: float) -> bytes:
    """Read a descriptor, or the file of that name: one that nobody writes to must not hang the command."""

    def read() -> bytes:
        with open(source, "rb", closefd=isinstance(source, str)) as stream:
            return stream.read(limit + 1)

    try:
        with SIGNALS.breakable():
            return in_thread(read, wait)
    except Late:
        raise OSError(f"nothing complete arrived within {wait:g} s") from None


Result = TypeVar("Result")


TICK = 0.1  # seconds; a signal that comes just before a wait is seen only when the wait is over


class Late(Exception):
    """What was waited for is not at its end."""


def in_thread(work: Callable[[], Result], seconds: float) -> Result:
    """What work returns or raises; after so many seconds it is left to itself.

    Raises:
        Late.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    until = time.monotonic() + max(0.001, seconds)
    while thread.is_alive() and (left := until - time.monotonic()) > 0:
        thread.join(min(left, TICK))
    if errors:
        raise errors[0]
    if not results:
        raise Late
    return results[0]


def os_reason(error: Exception) -> str:
    """The plain reason of an OSError or ValueError, without the path."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()


def decode_json_file(label: str, data: bytes) -> Any:
    """Parse JSON in UTF-8 (with or without BOM) or UTF-16.

    Raises:
        Failure: invalid_request, with the position of the fault.
    """
    try:
        return parse_json(data.decode(json.detect_encoding(data)))
    except UnicodeDecodeError:
        raise Failure("invalid_request", f"{outside_text(label)}: is not text in UTF-8 or UTF-16") from None
    except ValueError as error:
        raise Failure("invalid_request", f"{outside_text(label)}: is not valid JSON: {outside_text(error)}") from None


# ═══════════════════════════════════════════════════════════════════════════════════════════════════
# 4. Credentials: where the user keeps the key
# ═══════════════════════════════════════════════════════════════════════════════════════════════════


class KeyPlaces(NamedTuple):
    """The places of one provider's key, in the order in which they are looked at."""

    variable: str  # environment, and `.env` in the working folder
    optional: bool = False  # calls may go without, and do so wherever the key must not go
    ini_file: str | None = None  # below the home folder, INI
    ini_option: str | None = None
    ini_profile_variables: tuple[str, ...] = ()
    file_variable: str | None = None  # names a file that holds the key alone
    file: str | None = None  # below the home folder, holds the key alone


class Key(NamedTuple):
    """A key and the place it came from; only `source` is ever shown. An empty one is not sent."""

    value: str
    source: str
    warning: str = ""

    def __repr__(self) -> str:
        return f"Key(source={self.source!r})"


NO_KEY = Key("", "")


def find_key(places: KeyPlaces, env: Mapping[str, str]) -> Key:
    """The first key found, environment first.

    Raises:
        Failure: key_missing, naming every place looked at; key_malformed.
    """
    notes: list[str] = []
    for look in (_key_in_environment, _key_in_dotenv, _key_in_ini, _key_in_named_file, _key_in_own_file):
        key = look(places, env, notes)
        if key is not None:
            remember_secret(key.value)
            _check_key(key)
            return key
    options = [f"the environment variable {places.variable}"]
    if places.ini_file:
        options.append(f"{places.ini_option} in ~/{places.ini_file}")
    trouble = f" ({'; '.join(notes)})" if notes else ""
    raise Failure(
        "key_missing",
        f"no API key found{trouble}",
        hint=f"have the user set {' or '.join(options)}; a key never belongs in the chat or on a command line",
    )


def _key_in_environment(places: KeyPlaces, env: Mapping[str, str], notes: list[str]) -> Key | None:
    return _key(env.get(places.variable, ""), f"environment {places.variable}")


def _key_in_dotenv(places: KeyPlaces, env: Mapping[str, str], notes: list[str]) -> Key | None:
    """`.env` in the working folder. Only the key is taken: a checked-out project must not steer the rest."""
    text = _read_text(Path(".env"), notes)
    lines = re.findall(rf"(?m)^[ \t]*(?:export[ \t]+)?{places.variable}[ \t]*=[ \t]*(.*?)[ \t\r]*$", text)
    if not lines:
        return None
    value = str(lines[-1])
    quoted = re.match(r"""(["'])(.*?)\1""", value)
    return _key(quoted[2] if quoted else re.split(r"(?:^|\s)#", value)[0], ".env in the working folder")


def _key_in_ini(places: KeyPlaces, env: Mapping[str, str], notes: list[str]) -> Key | None:
    if places.ini_file is None or places.ini_option is None:
        return None
    import configparser

    path = _home(places.ini_file, env)
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        parser.read_string(_read_text(path, notes))
    except configparser.Error:
        notes.append(f"~/{places.ini_file} is not a valid INI file")
        return None
    profile = next((env[name] for name in places.ini_profile_variables if env.get(name)), "default")
    if not parser.has_section(profile):
        return None
    value = parser.get(profile, places.ini_option, fallback="").strip("\"'")
    return _key(value, f"~/{places.ini_file} [{outside_text(profile, 60)}]")


def _key_in_named_file(places: KeyPlaces, env: Mapping[str, str], notes: list[str]) -> Key | None:
    name = env.get(places.file_variable or "")
    if not name:
        return None
    key = _key(_read_text(Path(name), notes), f"file that {places.file_variable} names")
    if key is None:
        # The user chose this file: another account's key must not step in for it.
        raise Failure("key_missing", f"{places.file_variable} names a file that holds no readable key")
    return key


def _key_in_own_file(places: KeyPlaces, env: Mapping[str, str], notes: list[str]) -> Key | None:
    if places.file is None:
        return None
    return _key(_read_text(_home(places.file, env), notes), f"~/{places.file}")


def _key(value: str, source: str) -> Key | None:
    return Key(value.strip(), source) if value.strip() else None


def _check_key(key: Key) -> None:
    """Refuse what no header can carry and what is plainly a placeholder."""
    if len(key.value) > 512:
        raise Failure("key_malformed", f"the API key from {key.source} is longer than any key: 512 characters")
    if not re.fullmatch(r"[!-~]+", key.value) or re.search("[\"'<>]", key.value):
        raise Failure(
            "key_malformed",
            f"the API key from {key.source} has blanks, quotes, brackets or characters beyond ASCII in it",
        )


def _home(relative: str, env: Mapping[str, str]) -> Path:
    try:
        return Path(env.get("HOME") or Path.home()) / relative
    except RuntimeError:  # no home folder is known
        return Path(os.devnull)


def _read_text(path: Path, notes: list[str]) -> str:
    """The text of a small file; empty where there is none. A file that cannot be read is noted."""
    try:
        if not path.is_file():
            return ""
        with path.open(encoding="utf-8-sig") as source:
            return source.read(64 * 1024)
    except (OSError, ValueError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else os_reason(error)
        notes.append(f"{outside_text(str(path), 200)} cannot be read: {reason}")
        return ""


# ═══════════════════════════════════════════════════════════════════════════════════════════════════
# 5. Endpoint and trust: where the request goes, and whether the key may go there
# ═══════════════════════════════════════════════════════════════════════════════════════════════════

_LABEL = r"[a-z0-9](?:[a-z0-9_-]{0,61}[a-z0-9])?"
_HOST_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_NETLOC = re.compile(r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\])(?::(?P<port>[0-9]{1,5}))?")
_BASE_URL = re.compile(r"(?P<scheme>https?)://(?P<netloc>[^/]*)(?P<path>(?:/[A-Za-z0-9._~-]+)*)/?")
LOOPBACK_NAME = "localhost"
IN_PROCESS = "in-process"  # the endpoint of a provider that makes no calls


class Endpoint(NamedTuple):
    """Where a provider is called: `root` is the API root, `url` the call that makes pictures."""

    root: str
    url: str
    host: str
    region: str

    @property
    def is_loopback(self) -> bool:
        return is_loopback_host(self.host)


def is_loopback_host(host: str) -> bool:
    """True for localhost, 127.0.0.0/8 and ::1 in their usual spelling; nothing is resolved."""
    try:
        return is_loopback_address(ipaddress.ip_address(host))
    except ValueError:
        return host == LOOPBACK_NAME


def is_loopback_address(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """True for 127.0.0.0/8 and ::1, not for ::ffff:127.0.0.1, on which versions of Python disagree."""
    return address.is_loopback and getattr(address, "ipv4_mapped", None) is None


def split_netloc(netloc: str) -> tuple[str, int | None]:
    """Host (lower case, brackets off) and port of a network location that is exactly `host[:port]`.

    Raises:
        ValueError: with what is wrong.
    """
    match = _NETLOC.fullmatch(netloc)
    if not match:
        raise ValueError("its network location must be exactly host or host:port")
    host = match["host"].lower()
    port = int(match["port"]) if match["port"] else None
    if port is not None and not 0 < port < 65536:
        raise ValueError("its port must be from 1 to 65535")
    if host.startswith("["):
        return str(ipaddress.IPv6Address(host[1:-1])), port
    if not is_host_name(host):
        raise ValueError("its host is not a host name")
    return host, port


def is_host_name(text: str) -> bool:
    """True for a name or a plain IPv4 address in lower case; not for 127.1, 0x7f.1 and their like."""
    if len(text) > 253 or not _HOST_NAME.fullmatch(text):
        return False
    return _is_address(text) or not re.fullmatch(r"[0-9]+|0x[0-9a-f]*", text.rpartition(".")[2])


def trusted_hosts(flags: Sequence[str], env: Mapping[str, str]) -> tuple[frozenset[str], list[Problem]]:
    """The exact host names that the user trusts with the key, by --trust-host or ZIMAGE_TRUSTED_HOSTS."""
    named = [("--trust-host", name) for name in flags]
    named += [
        ("ZIMAGE_TRUSTED_HOSTS", name) for name in re.split(r"[,\s]+", env.get("ZIMAGE_TRUSTED_HOSTS", "")) if name
    ]
    hosts, problems = set(), []
    for source, name in named:
        if is_host_name(name.lower()):
            hosts.add(name.lower())
        else:
            problems.append(
                Problem("usage", f"{source}: must be a bare host name such as proxy.example.com, got {shown(name)}")
            )
    return frozenset(hosts), problems


def parse_base_url(text: str, source: str, provider: Provider) -> Endpoint:
    """The endpoint that a base URL means: the whole endpoint, the API root or the bare host.

    Raises:
        Failure: invalid_base_url. The URL itself is not repeated: it may hold a password.
    """

    def refuse(what: str, hint: str | None = None) -> NoReturn:
        raise Failure("invalid_base_url", f"{source}: {what}", hint=hint)

    if re.search(r"[^!-~]", text):
        refuse("has blanks, control characters or characters beyond ASCII in it")
    for sign, name in (
        ("@", "user info"),
        ("\\", "a backslash"),
        ("?", "a query"),
        ("#", "a fragment"),
        ("%", "percent-encoding"),
    ):
        if sign in text:
            refuse(f"has {name} in it, which a base URL must not have")
    scheme, separator, rest = text.partition("://")
    if not separator:
        bare_host = text.partition("/")[0]
        scheme, rest = ("http" if _is_loopback_netloc(bare_host) else "https"), text
    match = _BASE_URL.fullmatch(f"{scheme.lower()}://{rest}")
    if not match or {".", ".."} & set(match["path"].split("/")):
        refuse("is not a URL of the form https://host[:port]/path")
    try:
        host, port = split_netloc(match["netloc"])
    except ValueError as error:
        refuse(str(error))
    netloc = (f"[{host}]" if ":" in host else host) + (f":{port}" if port else "")
    root = provider.root_of(match["path"])
    if root is None:
        forms = " or ".join(f"{match['scheme']}://{netloc}{form}" for form in (provider.default_root, ""))
        refuse(f"its path {outside_text(match['path'], 100)} is not one of this provider's", f"use {forms}")
    root = f"{match['scheme']}://{netloc}{root}"
    return Endpoint(root, root + provider.generate_path, host, provider.region_of(host) or "")


def _is_loopback_netloc(netloc: str) -> bool:
    try:
        return is_loopback_host(split_netloc(netloc)[0])
    except ValueError:
        return False


def check_trust(endpoint: Endpoint, source: str, provider: Provider, trusted: frozenset[str]) -> None:
    """Let the key go only to its owner, to loopback, or to a host that the user trusts by name.

    Where calls may go without a key any host may be asked: `key_for` decides whether the key goes along.

    Raises:
        Failure: host_not_trusted.
    """
    if endpoint.is_loopback or provider.key_places is None or provider.key_places.optional:
        return
    if endpoint.root.startswith("http://"):
        raise Failure("invalid_base_url", f"{source}: http would send the key in the clear; only loopback may use it")
    if not provider.owns(endpoint.host) and endpoint.host not in trusted:
        raise Failure(
            "host_not_trusted",
            f"{source}: {endpoint.host} is not a host of {provider.name}, so the key is not sent there",
        )


def key_for(provider: Provider, endpoint: Endpoint, trusted: frozenset[str], env: Mapping[str, str]) -> Key:
    """The key that calls to an endpoint carry; an empty one where they carry none.

    Raises:
        Failure: key_missing, key_malformed.
    """
    places = provider.key_places
    if places is None:
        return NO_KEY
    if not places.optional:
        return find_key(places, env)
    entitled = may_have_optional_key(endpoint, provider, trusted, env)
    try:
        key = find_key(places, env)
    except Failure as failure:
        if entitled and failure.code != "key_missing":
            raise
        return NO_KEY
    if entitled:
        return key
    how = f"--trust-host {endpoint.host}" if endpoint.root.startswith("https://") else "https, or a tunnel to loopback"
    return NO_KEY._replace(warning=f"{places.variable} is not sent to {endpoint.host}; if that host needs it: {how}")


def may_have_optional_key(
    endpoint: Endpoint, provider: Provider, trusted: frozenset[str], env: Mapping[str, str]
) -> bool:
    """Whether a host is loopback, or over https the one that the user's environment names, or trusted by name."""
    if endpoint.is_loopback:
        return True
    hosts = set(trusted)
    for text in filter(None, (env.get(name) for name in provider.base_url_variables)):
        with contextlib.suppress(Failure):
            hosts.add(parse_base_url(text, "environment", provider).host)
            break
    return endpoint.root.startswith("https://") and endpoint.host in hosts


def choose_endpoint(
    provider: Provider,
    *,
    flag: str | None,
    request_url: str | None,
    region: str | None,
    env: Mapping[str, str],
    trusted: frozenset[str],
) -> Endpoint:
    """The endpoint by precedence: flag, request, region, environment, the provider's default region.

    Raises:
        Failure: invalid_base_url, host_not_trusted, region_mismatch.
    """
    candidates = [("--base-url", flag), ("base_url", request_url)]
    if provider.in_process:
        for source, text in candidates:
            if text not in (None, IN_PROCESS):
                what = f"{provider.name} works in this process and is called at no URL"
                raise Failure("invalid_base_url", f"{source}: {what}", hint="leave it out")
        return Endpoint("", IN_PROCESS, "", provider.default_region)
    if region is None:
        candidates += [(name, env.get(name) or None) for name in provider.base_url_variables]
    candidates.append(("--region", provider.roots[region or provider.default_region]))
    source, text = next((source, text) for source, text in candidates if text is not None)
    if not text and source == "--region":
        variables = " or ".join(provider.base_url_variables)
        hint = f"set {variables}, or give --base-url http://127.0.0.1:PORT{provider.default_root}"
        raise Failure("invalid_base_url", f"no server is named for {provider.name}: {hint}", hint=hint)
    endpoint = parse_base_url(text, source, provider)
    check_trust(endpoint, source, provider, trusted)
    if region and endpoint.region and endpoint.region != region:
        raise Failure(
            "region_mismatch",
            f"--region {region} contradicts {source}, whose host {endpoint.host} is {endpoint.region}",
        )
    known = endpoint.region or region or provider.default_region
    return Endpoint(endpoint.root, endpoint.url, endpoint.host, known)


# ═══════════════════════════════════════════════════════════════════════════════════════════════════
# 6. Provider: how one service is asked and understood
# ═══════════════════════════════════════════════════════════════════════════════════════════════════


class HttpCall(NamedTuple):
    """One HTTP request, ready to be sent; `body` is JSON."""

    method: str
    url: str
    headers: dict[str, str]
    body: bytes | None = None

    def __repr__(self) -> str:  # without the headers: they hold the key
        return f"HttpCall({self.method} {self.url})"


class HttpAnswer(NamedTuple):
    """One HTTP answer; header names are lower case. `whole` is false where the body was cut off."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    whole: bool = True


class LocalCall(NamedTuple):
    """Work in this process, in place of an HTTP request; `work` gets the moment of time.monotonic() to end by."""

    work: Callable[[float], Any]


class Generated(NamedTuple):
    """A picture that was made, and billed: its link or its bytes, and what the service said of it."""

    image_url: str = ""
    content: bytes = b""  # where the provider hands the picture over
    expires_at: dt.datetime | None = None  # of the link
    request_id: str = ""
    rewritten_prompt: str = ""
    reasoning: str = ""
    usage: Mapping[str, Any] = {}
    other_urls: tuple[str, ...] = ()  # of further pictures in the same answer
    warnings: tuple[str, ...] = ()


class Submitted(NamedTuple):
    """A task that the service works on; it is billed once it succeeds."""

    task_id: str
    request_id: str = ""


class Price(NamedTuple):
    """US$ for one picture, and what the number rests on."""

    estimate: float
    basis: str
    price_list_date: str


OWN_HARDWARE = Price(0.0, "own hardware", "none")


class Setting(NamedTuple):
    """A command line option of one provider alone: `model_path` is --model-path."""

    name: str
    metavar: str
    help: str
    default: Any
    read: Callable[[str], Any]  # the value that a text means; raises ValueError with what it must be


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """A reader of settings: a whole number within bounds."""

    def read(text: str) -> int:
        if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
            raise ValueError(f"a whole number from {least} to {most}")
        return int(text)

    return read


def real_number(least: float, most: float) -> Callable[[str], float]:
    """A reader of settings: a decimal number within bounds."""

    def read(text: str) -> float:
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) or not least <= float(text) <= most:
            raise ValueError(f"a number from {least:g} to {most:g}")
        return float(text)

    return read


SIDE_STEP = 16  # pixels; the open model's card and pipeline: both sides are multiples of it


def what_the_model_cannot(request: ImageRequest, name: str) -> list[str]:
    """What a valid request asks for that the open model, without a service around it, cannot do."""
    sentences = []
    if any(side % SIDE_STEP for side in request.width_height):
        sentences.append(f"size: {request.size}; {name} draws only sides that are multiples of {SIDE_STEP}")
    if request.prompt_extend:
        sentences.append(f"prompt_extend: {name} does not rewrite prompts; leave it out")
    return sentences


class Provider:
    """One way to the model: its key places, hosts, prices, limits, one call and what its answer means.

    A provider never sleeps, retries, opens files or reads the environment: it only builds and reads. What it cannot
    do is said by the class attributes. references/providers.md tells how to add one.
    """

    name: ClassVar[str]
    key_places: ClassVar[KeyPlaces | None] = None  # None: there is no key
    roots: ClassVar[dict[str, str]]  # region -> API root; empty text where only the user can name one
    region_aliases: ClassVar[dict[str, str]] = {}
    default_region: ClassVar[str]
    base_url_variables: ClassVar[tuple[str, ...]] = ()
    workspace_variable: ClassVar[str | None] = None
    default_root: ClassVar[str] = ""  # path of the API root
    generate_path: ClassVar[str] = ""  # below the root
    in_process: ClassVar[bool] = False  # there is no endpoint: calls are LocalCalls
    requests_per_minute: ClassVar[float] = 0.0  # the account's published limit; 0 where there is none
    calls_at_once: ClassVar[int | None] = None  # more than that wait for each other
    max_answer_bytes: ClassVar[int] = MAX_ANSWER_BYTES
    https_links_under: ClassVar[str | None] = None  # http links below this domain work over https too
    links_to_itself: ClassVar[bool] = False  # a link may lead to the server that is asked, and name only its path
    billable: ClassVar[bool] = True
    takes_seed: ClassVar[bool] = True
    sizes_are_ratios: ClassVar[bool] = False  # of a size only the ratio can be asked for
    long_prompt: ClassVar[int] = LONG_PROMPT  # characters; longer ones may be cut
    own_settings: ClassVar[tuple[Setting, ...]] = ()

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        self.settings = {setting.name: setting.default for setting in self.own_settings} | dict(settings or {})

    @property
    def known_settings(self) -> dict[str, Any]:
        """The settings that have a value, as JSON."""
        return {name: value for name, value in self.settings.items() if value is not None}

    @classmethod
    def key_hint(cls) -> str:
        """Where users keep the key, in words."""
        places = cls.key_places
        if places is None:
            return "none"
        return places.variable + (f", or {places.ini_option} in ~/{places.ini_file}" if places.ini_file else "")

    def root_of(self, path: str) -> str | None:
        """The path of the API root that a base URL's path means; None where it means none."""
        if path in ("", self.default_root):
            return self.default_root
        root = path.removesuffix(self.generate_path)
        return root if root.endswith(self.default_root) else None

    def region_of(self, host: str) -> str | None:
        """The region that a host belongs to; None where the host does not tell."""
        return None

    def owns(self, host: str) -> bool:
        """Whether the host belongs to the owner of the key."""
        return False

    def cannot(self, request: ImageRequest) -> list[str]:
        """What a valid request asks for that this provider cannot do: sentences that begin with the field."""
        return []

    def preflight(self) -> None:
        """What must be there on this machine, found out without loading it.

        Raises:
            Failure: missing_package, missing_weights, too_little_memory.
        """

    def prepare(self) -> None:
        """Load what the call needs, so that nothing breaks after it began.

        Raises:
            Failure: as `preflight`.
        """

    def price(self, request: ImageRequest, region: str) -> Price:
        """What one picture costs."""
        raise NotImplementedError

    def payload(self, request: ImageRequest) -> dict[str, Any]:
        """The JSON body that asks for the picture."""
        raise NotImplementedError

    def submit(
        self, payload: dict[str, Any], endpoint: Endpoint, key: str, workspace: str | None
    ) -> HttpCall | LocalCall:
        """The one call that costs money. An empty key is not sent. A LocalCall's work returns a Generated."""
        raise NotImplementedError

    def read(self, answer: HttpAnswer, request: ImageRequest, now: dt.datetime) -> Generated | Submitted:
        """What the answer to `submit` means.

        Raises:
            Failure: by the provider's error table.
        """
        raise NotImplementedError

    def poll(self, task_id: str, endpoint: Endpoint, key: str) -> HttpCall:
        """A free question after a submitted task."""
        raise NotImplementedError

    def read_poll(self, answer: HttpAnswer, request: ImageRequest, now: dt.datetime) -> Generated | None:
        """What the answer to `poll` means; None where the service still works on the task.

        Raises:
            Failure: task_failed, blocked or no_image where the task has ended so; not_found where it is not known;
                else by the provider's error table.
        """
        raise NotImplementedError

    def query(self, endpoint: Endpoint, key: str, workspace: str | None) -> HttpCall | LocalCall:
        """A read-only call that costs nothing, to check connection and permission. Local work returns a bool."""
        raise NotImplementedError

    def read_query(self, answer: HttpAnswer) -> bool:
        """Whether the answer to `query` lists the model.

        Raises:
            Failure: by the provider's error table.
        """
        raise NotImplementedError


class DashScope(Provider):
    """Alibaba Cloud Model Studio, multimodal-generation API.

    Sources: references/api_reference.md and references/sources.md of this skill.
    """

    name = "dashscope"
    key_places = KeyPlaces(
        variable="DASHSCOPE_API_KEY",
        ini_file=".alibabacloud/credentials",
        ini_option="dashscope_api_key",
        ini_profile_variables=("ALIBABA_CLOUD_PROFILE", "ALICLOUD_PROFILE"),
        file_variable="DASHSCOPE_API_KEY_FILE_PATH",
        file=".dashscope/api_key",
    )
    roots: ClassVar = {
        "beijing": "https://dashscope.aliyuncs.com/api/v1",
        "singapore": "https://dashscope-intl.aliyuncs.com/api/v1",
    }
    region_aliases: ClassVar = {"cn-beijing": "beijing", "ap-southeast-1": "singapore"}
    default_region = "beijing"
    base_url_variables = ("DASHSCOPE_BASE_URL", "DASHSCOPE_HTTP_BASE_URL")
    workspace_variable = "DASHSCOPE_WORKSPACE"
    default_root = "/api/v1"
    generate_path = "/services/aigc/multimodal-generation/generation"
    requests_per_minute = 120.0
    https_links_under = "aliyuncs.com"

    model = "z-image-turbo"
    link_lifetime = dt.timedelta(hours=24)
    price_list_date = "2026"
    prices: ClassVar = {"beijing": (0.01434, 0.02868), "singapore": (0.015, 0.03)}  # US$: plain, prompt_extend
    own_hosts = re.compile(
        rf"dashscope\.aliyuncs\.com|dashscope-[a-z0-9]+\.aliyuncs\.com|(?:{_LABEL}\.)+(?:dashscope|maas)\.aliyuncs\.com"
    )
    # Prefixes of the service's codes, folded to lower case without _ and -; the longest that fits counts,
    # and outranks the HTTP status.
    code_kinds: ClassVar = {
        "invalidparameter": "rejected_by_service",
        "badrequest": "rejected_by_service",
        "invalidurl": "rejected_by_service",
        "datainspectionfailed": "blocked",
        "arrearage": "balance",
        "invalidapikey": "key_rejected",
        "accessdenied": "access_denied",
        "model.accessdenied": "access_denied",
        "allocationquota": "quota",
        "throttling.allocationquota": "quota",
        "insufficientquota": "quota",
        "modelnotfound": "not_found",
        "notfound": "not_found",
        "throttling": "rate_limited",
        "internalerror": "service_failing",
        "serviceunavailable": "service_failing",
        "modelservingerror": "service_failing",
        "requesttimeout": "outcome_unknown",
    }

    def region_of(self, host: str) -> str | None:
        for region, root in self.roots.items():
            if host == urlsplit(root).hostname:
                return region
        word = re.fullmatch(r"dashscope-([a-z0-9]+)\.aliyuncs\.com", host)
        label = word or re.fullmatch(rf"(?:.*\.)?({_LABEL})\.(?:dashscope|maas)\.aliyuncs\.com", host)
        return self.region_aliases.get(label[1], label[1]) if label else None

    def owns(self, host: str) -> bool:
        return self.own_hosts.fullmatch(host) is not None

    def price(self, request: ImageRequest, region: str) -> Price:
        listed = self.prices.get(region) or max(self.prices.values())
        basis = f"{region} list price" if region in self.prices else f"highest list price; none is known for {region}"
        extended = " with prompt_extend" if request.prompt_extend else ""
        return Price(listed[request.prompt_extend], f"{basis}, one picture{extended}", self.price_list_date)

    def payload(self, request: ImageRequest) -> dict[str, Any]:
        return {
            "model": self.model,
            "input": {"messages": [{"role": "user", "content": [{"text": request.prompt}]}]},
            "parameters": {"size": request.size, "prompt_extend": request.prompt_extend, "seed": request.seed},
        }

    def submit(self, payload: dict[str, Any], endpoint: Endpoint, key: str, workspace: str | None) -> HttpCall:
        return json_post(endpoint.url, payload, self._headers(key, workspace))

    def query(self, endpoint: Endpoint, key: str, workspace: str | None) -> HttpCall:
        url = f"{endpoint.root}/models?model={self.model}&page_no=1&page_size=1"
        return HttpCall("GET", url, self._headers(key, workspace))

    def _headers(self, key: str, workspace: str | None) -> dict[str, str]:
        return bearer(key) | ({"X-DashScope-WorkSpace": workspace} if workspace else {})

    def read(self, answer: HttpAnswer, request: ImageRequest, now: dt.datetime) -> Generated:
        body = read_json(answer)
        choice = at(body, "output", "choices", 0) or {}
        items = at(choice, "message", "content")
        items = [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []
        links = [item["image"] for item in items if isinstance(item.get("image"), str) and item["image"].strip()]
        if body is None or not links or not 200 <= answer.status < 300:
            raise self._failure(answer, body)
        text = next((item["text"] for item in items if isinstance(item.get("text"), str)), "")
        reasoning = at(choice, "message", "reasoning_content") or next(
            (item["reasoning_content"] for item in items if item.get("reasoning_content")), ""
        )
        usage = outside_json(body.get("usage"))
        return Generated(
            image_url=links[0].strip(),
            expires_at=link_expiry(links[0], now + self.link_lifetime),
            request_id=request_id(answer, body),
            rewritten_prompt=kept_text(text) if request.prompt_extend or text != request.prompt else "",
            reasoning=kept_text(reasoning),
            usage=usage if isinstance(usage, dict) else {},
            other_urls=tuple(links[1:]),
        )

    def read_query(self, answer: HttpAnswer) -> bool:
        body = read_json(answer)
        if body is None or answer.status != 200 or body.get("code"):
            raise self._failure(answer, body)
        models = at(body, "output", "models")
        return isinstance(models, list) and any(isinstance(m, dict) and self.model in m.values() for m in models)

    def _failure(self, answer: HttpAnswer, body: dict[str, Any] | None) -> Failure:
        """What an answer without a picture means, by the service's code and else by the HTTP status."""
        said = {name: value for name, value in (body or {}).items() if isinstance(value, str)}
        code = said.get("code", "")
        folded = re.sub("[_-]", "", code.lower())
        prefixes = [prefix for prefix in self.code_kinds if folded.startswith(prefix)]
        return service_failure(
            answer,
            message=said.get("message"),
            code=code,
            kind=self.code_kinds[max(prefixes, key=len)] if prefixes else None,
            is_own_json=bool(code),
            request_id=request_id(answer, body or {}),
        )


# What HTTP statuses mean where the service's own code does not say more.
STATUS_KINDS = {
    400: "rejected_by_service",
    401: "key_rejected",
    403: "access_denied",
    404: "not_found",
    429: "rate_limited",
}
GATEWAY_STATUSES = (502, 504)  # whatever their body says, the call is not sent again on its own
OWN_FAULT_STATUSES = (500, 503)  # not billed, but only where the service itself says so in its JSON
UNSAID = {  # what an answer without a message lacks
    "no_image": "no picture is in the answer",
    "answer_unusable": "what came back is not the service's JSON",
    "outcome_unknown": "no answer from which the outcome can be told",
}


def service_failure(
    answer: HttpAnswer,
    *,
    message: object,
    code: str = "",
    kind: str | None = None,
    is_own_json: bool,
    status: int | None = None,
    request_id: str = "",
) -> Failure:
    """What an answer without a picture means: one error table for all services.

    `kind` is what the service's own code means, and outranks the status; `is_own_json`: the body is what this service
    says, not a gateway. `status`: where the service names another one than HTTP did.
    """
    status = status or answer.status
    kind = _kind_of(answer, status, kind, is_own_json)
    code = outside_text(code, 100)
    redirect = "a redirect, which is not followed with the key" if 300 <= status < 400 else ""
    what = outside_text(message) or redirect or UNSAID.get(kind, "")
    doubtful = answer.status in GATEWAY_STATUSES and KINDS[kind].retryable
    return Failure(
        kind,
        " ".join(filter(None, ("the service answered", str(status), code))) + (f": {what}" if what else ""),
        http_status=answer.status,
        service_code=code or None,
        request_id=request_id or None,
        retry_after_s=retry_after(answer),
        retryable=False if doubtful else None,
    )


def _kind_of(answer: HttpAnswer, status: int, kind: str | None, is_own_json: bool) -> str:
    if not answer.whole and not 400 <= status < 500:
        return "outcome_unknown"
    if kind:
        return kind
    if status in STATUS_KINDS:
        return STATUS_KINDS[status]
    if status in OWN_FAULT_STATUSES and is_own_json:
        return "service_failing"
    if 400 <= status < 500:
        return "refused_by_service"
    if 200 <= status < 300:
        if read_json(answer) is not None:
            return "no_image"
        # What breaks off may have been the answer with the picture; what is of another kind is no answer at all.
        return "outcome_unknown" if looks_cut(answer.body) else "answer_unusable"
    return "outcome_unknown"


def bearer(key: str) -> dict[str, str]:
    """The headers of a call whose answer is JSON; without a key, none of it."""
    return {"Accept": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


def json_post(url: str, payload: Mapping[str, Any], headers: dict[str, str]) -> HttpCall:
    """A POST of a JSON body in UTF-8."""
    body = json.dumps(payload, ensure_ascii=False).encode()
    return HttpCall("POST", url, headers | {"Content-Type": "application/json"}, body)


def read_json(answer: HttpAnswer) -> dict[str, Any] | None:
    """The JSON object in an answer; None where there is none, whatever stands there instead.

    Small faults of form are forgiven: behind them may be the link to a picture that has been paid for.
    """
    try:
        text = answer.body.decode("utf-8-sig", "replace")
        body = json.loads(text, strict=False, parse_int=lambda digits: int(digits) if len(digits) < 20 else None)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def looks_cut(body: bytes) -> bool:
    """Whether a body that is not JSON may be the beginning of some."""
    return not body.strip() or body.lstrip()[:1] == b"{"


def at(value: Any, *path: str | int) -> Any:
    """What stands at a path of an untrusted JSON value; None where the path leads nowhere."""
    for step in path:
        if isinstance(step, str) and isinstance(value, dict):
            value = value.get(step)
        elif isinstance(step, int) and isinstance(value, list) and len(value) > step:
            value = value[step]
        else:
            return None
    return value


def kept_text(value: object) -> str:
    """A long text from outside (rewritten prompt, reasoning): kept with its lines, without key and broken text."""
    if not isinstance(value, str):
        return ""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", mask(without_surrogates(value)).strip())[:100_000]


def request_id(answer: HttpAnswer, body: dict[str, Any]) -> str:
    said = body.get("request_id")
    return outside_text(said if isinstance(said, str) and said else answer.headers.get("x-request-id"), 200)


def retry_after(answer: HttpAnswer) -> float | None:
    """Seconds that the answer's Retry-After asks to wait (a number or an HTTP date); None where it says nothing."""
    import email.utils

    said = answer.headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,15}(\.[0-9]{1,9})?", said):
        return float(said)
    try:
        moment = email.utils.parsedate_to_datetime(said)
        return max(0.0, round(moment.timestamp() - time.time(), 1))
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def link_expiry(link: str, default: dt.datetime) -> dt.datetime:
    """When a signed OSS link dies, by its own parameters in the older or newer signature."""
    try:
        query = {name.lower(): values[0] for name, values in parse_qs(urlsplit(link).query).items()}
        if "expires" in query:
            seconds = int(query["expires"])
        else:
            signed = calendar.timegm(time.strptime(query["x-oss-date"], "%Y%m%dT%H%M%SZ"))
            seconds = signed + int(query["x-oss-expires"])
        return dt.datetime.fromtimestamp(seconds, dt.timezone.utc)
    except (KeyError, ValueError, OverflowError, OSError):
        return default


PROVIDERS: dict[str, type[Provider]] = {DashScope.name: DashScope}  # those that are loaded
DEFAULT_PROVIDER = DashScope.name
PROVIDER_NAME = "[a-z][a-z0-9_]*"


def provider_names() -> list[str]:
    """Every provider that there is: those of this file, and a file each in providers/ beside it."""
    files = {path.stem for path in _providers_folder().glob("*.py") if re.fullmatch(PROVIDER_NAME, path.stem)}
    return [DEFAULT_PROVIDER, *sorted(files | PROVIDERS.keys() - {DEFAULT_PROVIDER})]


def _providers_folder() -> Path:
    return Path(os.path.realpath(__file__)).parent / "providers"


def provider_class(name: str) -> type[Provider]:
    """The provider of that name, its file loaded where that has not been done.

    Raises:
        Failure: usage, naming those that exist.
    """
    if name in PROVIDERS:
        return PROVIDERS[name]
    if name not in provider_names():
        raise Failure("usage", f"--provider: must be one of {', '.join(provider_names())}, got {shown(name)}")
    # Run as a program this file is __main__: what a provider imports from it must be these very classes.
    sys.modules.setdefault(Path(__file__).stem, sys.modules[__name__])
    spec = importlib.util.spec_from_file_location(f"providers.{name}", _providers_folder() / f"{name}.py")
    try:
        if spec is None or spec.loader is None:
            raise ImportError(name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        loaded = module.PROVIDER
        if loaded.name != name:
            raise AttributeError(f"its PROVIDER is named {loaded.name}")
    except (Exception, SystemExit) as error:  # one that ends the process is no provider
        reason = f"{type(error).__name__}: {outside_text(error, 200)}"
        raise Failure("usage", f"--provider: providers/{name}.py cannot be loaded: {reason}") from None
    PROVIDERS[name] = loaded
    return PROVIDERS[name]


def provider_named(name: str, settings: Mapping[str, Any] | None = None) -> Provider:
    """The provider of that name, set up. Raises as `provider_class`."""
    return provider_class(name)(settings)


# ═══════════════════════════════════════════════════════════════════════════════════════════════════
# 7. Transport: one HTTP exchange, with a deadline that holds and a sure word on whether it left
# ═══════════════════════════════════════════════════════════════════════════════════════════════════


class Clock:
    """The time of one command. All moments are in seconds of time.monotonic()."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.start = time.monotonic()
        self.end = self.start + timeout
        self.generate_until = self.start + timeout * GENERATE_SHARE
        self.shortest_attempt = timeout * SHORTEST_ATTEMPT_SHARE

    def room_for_attempt_after(self, wait: float, until: float) -> bool:
        return time.monotonic() + wait + self.shortest_attempt <= until


class NotSent(Exception):
    """The request surely did not reach the service. `lasting`: trying again at once will not help."""

    def __init__(self, reason: str, *, lasting: bool = False, refused: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.lasting = lasting
        self.refused = refused  # by our own rules, not by the network


class AnswerLost(Exception):
    """The request left, and no whole answer came back."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class AnswerTooLarge(Exception):
    """The answer is larger than this tool takes."""


REACH: dict[str, Callable[[ipaddress.IPv4Address | ipaddress.IPv6Address], bool]] = {
    # Which resolved addresses a call may connect to.
    "service": lambda address: True,  # the host was checked by name; private service endpoints exist
    "public": lambda address: is_public_address(address),
    "loopback": is_loopback_address,
}
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def is_public_address(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is on the open internet, also where IPv6 wraps an IPv4 address."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public_address(inner)
    return address.is_global and not address.is_multicast


class Wire:
    """The connection of one exchange: opens it, knows whether the request left, and cuts it at the deadline.

    Connections are never reused: one that idled for seconds may be closed by the service just as a paid
    request leaves on it.
    """

    def __init__(self, call: HttpCall, until: float, reach: str) -> None:
        self.target = request_target(call.url)
        self.until = until
        self.reach = reach
        self.connecting = False
        self.connected = False
        self.expired = False
        self.failure: BaseException | None = None
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()

    @property
    def remaining(self) -> float:
        return max(0.001, self.until - time.monotonic())

    def open(self, host: str, port: int, *, by_proxy: bool) -> socket.socket:
        """Resolve, check and connect; what goes wrong is kept in `failure` and raised as OSError."""
        self.connecting = True
        try:
            connection = self._connect(self._resolve(host, port), by_proxy)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(self.remaining)
            with self._lock:
                self._socket = connection.dup()  # stays valid when TLS takes the original over
            return connection
        except Exception as error:
            self.failure = error
            raise OSError(str(error)) from error

    def _resolve(self, host: str, port: int) -> list[tuple[Any, ...]]:
        """Addresses of a host; a name server that does not answer must not hold the command."""

        def look_up() -> list[tuple[Any, ...]]:
            return list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))

        try:
            return look_up() if _is_address(host) else in_thread(look_up, self.remaining)
        except Late:
            raise NotSent("its name was not resolved in time") from None
        except (OSError, UnicodeError):
            raise NotSent("its name cannot be resolved") from None

    def _connect(self, addresses: list[tuple[Any, ...]], by_proxy: bool) -> socket.socket:
        reason = "no address"
        for family, kind, protocol, _, address in addresses:
            if not by_proxy and not REACH[self.reach](ipaddress.ip_address(address[0].partition("%")[0])):
                raise NotSent(f"{address[0]} is not an address that may be fetched from", lasting=True, refused=True)
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(min(CONNECT_TIMEOUT, self.remaining))
                connection.connect(address)
                return connection
            except OSError as error:
                connection.close()
                reason = "connection timed out" if isinstance(error, TimeoutError) else os_reason(error)
            except BaseException:
                connection.close()
                raise
        raise NotSent(reason)

    def cut(self) -> None:
        """End the exchange at the deadline, whatever the other side still dribbles."""
        self.expired = True
        with self._lock, contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None


class Deadlines:
    """Cuts wires at their deadlines, from one thread for all that are open."""

    def __init__(self) -> None:
        self._wires: list[Wire] = []
        self._next = math.inf  # when the thread looks again
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def add(self, wire: Wire) -> None:
        with self._changed:
            self._wires.append(wire)
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="deadlines", daemon=True)
                self._thread.start()
            elif wire.until < self._next:
                self._changed.notify()

    def remove(self, wire: Wire) -> None:
        with self._changed, contextlib.suppress(ValueError):
            self._wires.remove(wire)

    def _watch(self) -> None:
        with self._changed:
            while True:
                now = time.monotonic()
                for wire in [wire for wire in self._wires if wire.until <= now]:
                    self._wires.remove(wire)
                    wire.cut()
                self._next = min((wire.until for wire in self._wires), default=math.inf)
                self._changed.wait(None if self._next == math.inf else max(0.0, self._next - now))


DEADLINES = Deadlines()


def request_target(url: str) -> str:
    """Path and query of a URL, byte by byte as they stand; only what is beyond ASCII is encoded."""
    target = url.partition("#")[0].partition("://")[2][len(urlsplit(url).netloc) :]
    target = target if target.startswith("/") else f"/{target}"
    return "".join(sign if sign.isascii() else quote(sign) for sign in target)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
        return True
    except ValueError:
        return False


@functools.cache
def wired_adapter() -> Any:
    """The class of requests' adapter for one exchange, `WiredAdapter(wire)`: all its connections go through the wire.

    An adapter without a session: no cookies, no environment, no .netrc, no redirects whose bodies are read.
    """
    from requests.adapters import HTTPAdapter
    from urllib3.connection import HTTPConnection, HTTPSConnection
    from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

    class Wired:
        def __init__(self, *args: Any, wire: Wire, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._wire = wire

        def _new_conn(self) -> socket.socket:
            host: Any = self
            return self._wire.open(host._dns_host, host.port, by_proxy=getattr(host, "proxy", None) is not None)

        def connect(self) -> None:
            super().connect()  # type: ignore[misc]
            if self._wire.expired:
                raise OSError("the deadline passed while connecting")
            self._wire.connected = True  # from here on the service may have seen the request

        def putrequest(
            self, method: str, url: str, skip_host: bool = False, skip_accept_encoding: bool = False
        ) -> None:
            # The libraries rewrite a URL on its way here; a signature may hold for its very bytes only.
            super().putrequest(method, self._wire.target, skip_host, skip_accept_encoding)  # type: ignore[misc]

    class PlainConnection(Wired, HTTPConnection):
        pass

    class TlsConnection(Wired, HTTPSConnection):
        pass

    def pools(wire: Wire) -> dict[str, Any]:
        """What makes connection pools, by scheme."""

        def plain(*args: Any, **kwargs: Any) -> HTTPConnectionPool:
            pool = HTTPConnectionPool(*args, **kwargs)
            pool.ConnectionCls = functools.partial(PlainConnection, wire=wire)  # type: ignore[assignment]
            return pool

        def tls(*args: Any, **kwargs: Any) -> HTTPSConnectionPool:
            pool = HTTPSConnectionPool(*args, **kwargs)
            pool.ConnectionCls = functools.partial(TlsConnection, wire=wire)  # type: ignore[assignment]
            return pool

        return {"http": plain, "https": tls}

    class WiredAdapter(HTTPAdapter):
        def __init__(self, wire: Wire) -> None:
            self._wire = wire
            super().__init__()

        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, **kwargs)
            self.poolmanager.pool_classes_by_scheme = pools(self._wire)

        def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
            manager = super().proxy_manager_for(*args, **kwargs)
            manager.pool_classes_by_scheme = pools(self._wire)
            return manager

    return WiredAdapter


def exchange(call: HttpCall, *, until: float, limit: int, reach: str) -> HttpAnswer:
    """Send one request and read its whole answer. No redirect is followed, nothing is sent twice.

    `until` is a moment of time.monotonic(), `limit` a number of bytes, `reach` a key of REACH.

    Raises:
        NotSent, AnswerLost, AnswerTooLarge, Interrupted.
    """
    import requests
    import urllib3

    wire = Wire(call, until, reach)
    DEADLINES.add(wire)
    host = urlsplit(call.url).hostname or ""
    proxies = {} if is_loopback_host(host) else requests.utils.get_environ_proxies(call.url)
    headers = {"User-Agent": f"{SKILL}/{VERSION}", "Accept-Encoding": "identity", "Connection": "close"} | call.headers
    answer: HttpAnswer | None = None
    try:
        request = requests.Request(call.method, call.url, headers=headers, data=call.body).prepare()
        adapter = wired_adapter()(wire)
        with contextlib.closing(adapter), SIGNALS.breakable():
            response = adapter.send(request, stream=True, timeout=wire.remaining, proxies=proxies, verify=ca_bundle())
            answer = _read_answer(response, limit)
    except Interrupted as interruption:
        if answer is None:
            interruption.request_left = wire.connected
            raise
        # The signal came with the answer: what was paid for is put on disk first, the next wait gives way.
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        raise _transport_failure(wire, error) from None
    finally:
        DEADLINES.remove(wire)
        wire.close()
    return answer._replace(whole=answer.whole and not wire.expired)  # cut by us looks like an end


def ca_bundle() -> str | bool:
    """The certificates to trust: those the user's environment names, else the ones requests brings."""
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        if os.environ.get(name):
            return os.environ[name]
    return True


def _read_answer(response: Any, limit: int) -> HttpAnswer:
    import requests
    import urllib3

    headers = {name.lower(): value for name, value in response.headers.items()}
    if 300 <= response.status_code < 400 and "location" in headers:
        return HttpAnswer(response.status_code, headers, b"")  # all that a redirect says is said
    chunks: list[bytes] = []
    size, whole = 0, True
    # Left to itself, urllib3 throws away the beginning of a body that breaks off: it may hold the link.
    response.raw.enforce_content_length = False
    announced = headers.get("content-length", "")
    if response.status_code < 300 and announced.isdecimal() and len(announced) < 19 and int(announced) > limit:
        raise AnswerTooLarge
    try:
        for chunk in response.iter_content(64 * 1024):
            chunks.append(chunk)
            size += len(chunk)
            if size > limit and response.status_code < 300:
                raise AnswerTooLarge
            if size > limit:
                break  # the status alone says enough
        whole = not response.raw.length_remaining
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError):
        whole = False
    if not size and not {"content-length", "transfer-encoding"} & headers.keys():
        whole = False  # nothing announced and nothing sent: the headers broke off
    return HttpAnswer(response.status_code, headers, b"".join(chunks), whole)


def _transport_failure(wire: Wire, error: Exception) -> Exception:
    """What an exception of the HTTP library means. Texts of the library may hold a proxy's password: left out."""
    import requests

    if isinstance(wire.failure, NotSent):
        return wire.failure
    if not wire.connecting and isinstance(error, (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema)):
        return NotSent("the URL, or that of the proxy, cannot be used", lasting=True)
    if not wire.connecting and isinstance(error, OSError) and not isinstance(error, requests.RequestException):
        return NotSent("the certificate bundle that the environment names cannot be read", lasting=True)
    if wire.connecting and not wire.connected:
        if wire.expired:
            return NotSent("no connection was made in time")
        certificate = "certificate" in str(error).lower()
        if isinstance(error, requests.exceptions.ProxyError):
            return NotSent("the proxy refused the connection", lasting=True)
        if isinstance(error, requests.exceptions.SSLError):
            return NotSent("the certificate is not valid" if certificate else "TLS failed", lasting=certificate)
        return NotSent("the connection was closed before the request left")
    if wire.expired or isinstance(error, requests.exceptions.Timeout):
        return AnswerLost("no answer came in time")
    return AnswerLost("the connection broke before the answer was complete")


# ═══════════════════════════════════════════════════════════════════════════════════════════════════
# 8. Evidence: what was asked, what was paid and how to get it again, always on disk before the next step
# ═══════════════════════════════════════════════════════════════════════════════════════════════════


class Folders(NamedTuple):
    """Where results go: below $OUTPUT_DIR, by default `output` in the working folder. Absolute paths."""

    images: Path
    evidence: Path

    @classmethod
    def of(cls, env: Mapping[str, str]) -> Folders:
        base = Path(os.path.abspath(env.get("OUTPUT_DIR") or "output"))
        return cls(base / "ai-image-zimage-turbo" / "images", base / SKILL / "evidence")


def utc_now() -> dt.datetime:
    return dt.datetime.now(dt.timezone.utc)


def timestamp(moment: dt.datetime) -> str:
    """RFC 3339 in UTC, with milliseconds."""
    return moment.astimezone(dt.timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def new_evidence_id(now: dt.datetime) -> str:
    return f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"


class Evidence:
    """One evidence file. `data` is its content (EVIDENCE_SCHEMA).

    `update` changes the content in memory, `record` replaces the file too.
    """

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path = path
        self.data = data
        self.unwritten = False  # the last state is not on disk

    @property
    def id(self) -> str:
        return self.path.stem

    @classmethod
    def create(cls, path: Path, data: dict[str, Any]) -> Evidence:
        """Write the file for the first time, readable for its owner only: it will hold a signed link.

        Raises:
            Failure: disk.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            ignore = path.parent / ".gitignore"
            if not ignore.exists():
                ignore.write_text("*\n", encoding="utf-8")
            write_exclusively(path, to_json(data), mode=OWNER_ONLY)
        except OSError as error:
            raise Failure("disk", f"the evidence file {path} cannot be written: {os_reason(error)}") from None
        return cls(path, data)

    @classmethod
    def load(cls, option: str, name: str, wait: float) -> Evidence:
        """Read and check an evidence file.

        Raises:
            Failure: file_unreadable, invalid_evidence.
        """
        import jsonschema

        path = Path(os.path.abspath(name))
        content = read_input(option, str(path) if name else "", MAX_EVIDENCE_BYTES, wait)
        try:
            data = decode_json_file(name, content)
        except Failure as failure:
            raise Failure("invalid_evidence", failure.message) from None
        faults = sorted(jsonschema.Draft202012Validator(EVIDENCE_SCHEMA).iter_errors(data), key=lambda e: e.json_path)
        if faults:
            paths = [fault.json_path.removeprefix("$").removeprefix(".") or "the file" for fault in faults]
            texts = [outside_text(f"{path}: {fault.message}", 200) for path, fault in zip(paths, faults, strict=True)]
            raise Failure("invalid_evidence", f"{outside_text(name)} is not an evidence file: {'; '.join(texts[:5])}")
        return cls(path, data)

    def update(self, **changes: Any) -> None:
        """Merge changes; None removes a field."""
        self.data = {name: value for name, value in (self.data | changes).items() if value is not None}

    def record(self, **changes: Any) -> None:
        """Merge changes and replace the file in one step.

        A disk that fails now must not lose a paid picture: `unwritten` tells, the command goes on.
        """
        self.update(**changes)
        try:
            replace_private(self.path, to_json(self.data))
            self.unwritten = False
        except OSError:
            self.unwritten = True

    def begin_attempt(self) -> None:
        self.record(attempts=[*self.data["attempts"], {"at": timestamp(utc_now())}])

    def end_attempt(self, **facts: Any) -> None:
        """Add to the last attempt how it ended."""
        *earlier, last = self.data["attempts"]
        known = {name: value for name, value in facts.items() if value is not None}
        self.data["attempts"] = [*earlier, last | known]

    def end_failed_attempt(self, failure: Failure, wait: float | None) -> None:
        """Add to the last attempt how it failed, and how many seconds the next one waits, if there is one."""
        self.end_attempt(
            http_status=failure.facts.get("http_status"),
            service_code=failure.facts.get("service_code"),
            outcome=failure.code,
            billed=failure.billed,
            wait_s=wait and round(wait, 3),
        )

    @property
    def nothing_outstanding(self) -> bool:
        """Whether every attempt is known to have ended unbilled."""
        return all(attempt.get("billed") == "no" for attempt in self.data["attempts"])


OWNER_ONLY = 0o600


def to_json(value: Any) -> bytes:
    """Readable JSON in UTF-8; file names that are not text, and what a terminal would obey, become escapes."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    text = re.sub("[\x7f-\x9f]", lambda sign: f"\\u{ord(sign[0]):04x}", text)
    return (text + "\n").encode("utf-8", "backslashreplace")


def temporary_name(folder: Path, stem: str) -> Path:
    """A hidden name for a file in the making."""
    return folder / f".{stem}.{os.getpid()}.part"


def replace_private(path: Path, content: bytes) -> None:
    """Write a file for its owner only, in one step, whether it exists or not. Raises OSError."""
    temporary = temporary_name(path.parent, path.stem)
    try:
        temporary.unlink(missing_ok=True)  # of a dead process that had this one's number
        write_exclusively(temporary, content, mode=OWNER_ONLY)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, stem: str) -> None:
    """Remove what a killed process has left under temporary names of this stem."""
    with contextlib.suppress(OSError):
        for path in folder.glob(f".{stem}.*.part"):
            remove_if_left_over(path)


def remove_if_left_over(path: Path) -> None:
    """Remove a file with a temporary name, unless the process that writes it is alive."""
    with contextlib.suppress(OSError, ValueError):
        if not is_alive(int(path.name.split(".")[-2])):
            path.unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    """Whether a process may still be at work. Windows keeps open files from being removed: there, none needs to be."""
    if os.name == "nt":
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def write_exclusively(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a file that must not exist yet, down to the disk. A failed one is removed.

    Raises:
        OSError: FileExistsError and whatever the disk says.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, mode)
    try:
        with os.fdopen(descriptor, "wb") as target:
            if mode == OWNER_ONLY and hasattr(os, "fchmod"):
                os.fchmod(descriptor, mode)  # whatever the umask
            target.write(content)
            target.flush()
            os.fsync(target.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


# ═══════════════════════════════════════════════════════════════════════════════════════════════════
# 9. Picture: downloaded without the key, verified, and saved under its name only when whole
# ═══════════════════════════════════════════════════════════════════════════════════════════════════


class Picture(NamedTuple):
    """A verified image: the bytes, their format (PNG, JPEG or WEBP where it can be kept), width, height, pixels."""

    content: bytes
    format: str
    width: int
    height: int
    image: PIL.Image.Image  # as decoded to verify it: whatever needs the pixels need not decode them again

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


def checked_link(link: str, *, loopback: bool, provider: Provider, origin: str = "") -> tuple[str, str]:
    """A link that a picture may be fetched from, and the reach (key of REACH) that holds for it.

    `origin` is the `scheme://host:port` of a server that may link to itself, even where it is not public.

    Raises:
        Failure: hop_refused.
    """

    def refuse(what: str) -> NoReturn:
        raise Failure("hop_refused", f"the link to the picture {what}")

    if re.search(r"[\x00-\x20\x7f\\]", link) or link != without_surrogates(link):
        refuse("has blanks, backslashes or control characters in it")
    try:
        parts = urlsplit(link)
        host, port = split_netloc(parts.netloc)
    except ValueError:
        refuse("does not name a plain host")
    if is_loopback_host(host):
        if not loopback or parts.scheme not in ("http", "https"):
            refuse("leads to this machine")
        return link, "loopback"
    if origin and origin_of(link) == origin:
        return link, "service"
    if _is_address(host) and not is_public_address(ipaddress.ip_address(host)):
        refuse("leads to a private address")
    domain = provider.https_links_under
    if parts.scheme == "http" and domain and (host == domain or host.endswith(f".{domain}")):
        netloc = host if port in (None, 80) else f"{host}:{port}"
        parts = parts._replace(scheme="https", netloc=netloc)
    if parts.scheme != "https":
        refuse("is not an https link")
    return urlunsplit(parts), "public"


def origin_of(url: str) -> str:
    """Scheme and network location of a URL, in lower case."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}".lower()


def fetch(link: str, *, until: float, loopback: bool, provider: Provider, origin: str = "") -> HttpAnswer:
    """Follow a link, over checked hops, to an answer that is not a redirect. The key is never sent.

    Raises:
        Failure: hop_refused. NotSent, AnswerLost, AnswerTooLarge, Interrupted.
    """
    for _ in range(MAX_HOPS + 1):
        link, reach = checked_link(link, loopback=loopback, provider=provider, origin=origin)
        loopback = reach == "loopback"  # once on the open internet, there is no way back
        origin = origin if reach == "service" else ""
        answer = exchange(HttpCall("GET", link, {"Accept": "image/*"}), until=until, limit=MAX_IMAGE_BYTES, reach=reach)
        target = answer.headers.get("location", "").strip()
        if not (300 <= answer.status < 400 and target):
            return answer
        try:  # header bytes come as Latin-1; what is not UTF-8 becomes surrogates, which no link may hold
            link = urljoin(link, target.encode("latin-1").decode("utf-8", "surrogateescape"))
        except ValueError:
            raise Failure("hop_refused", "the link to the picture is redirected to what is no link") from None
    raise Failure("hop_refused", f"the link to the picture was redirected more than {MAX_HOPS} times")


def download(link: str, *, clock: Clock, endpoint: str, provider: Provider, expires_at: dt.datetime) -> Picture:
    """The verified picture behind a link, tried again (it is free) while time is left.

    `endpoint` is the URL that was asked for the picture.

    Raises:
        Failure: paid_not_downloaded, link_expired, link_refused, hop_refused, image_unusable, image_too_large.
    """
    loopback = is_loopback_url(endpoint)
    origin = origin_of(endpoint) if provider.links_to_itself else ""
    for attempt in range(DOWNLOAD_RETRIES + 1):
        try:
            answer = fetch(link, until=clock.end, loopback=loopback, provider=provider, origin=origin)
            return verified(picture_bytes(answer, expires_at))
        except AnswerTooLarge:
            raise Failure("image_too_large", f"the picture is larger than {MAX_IMAGE_BYTES // MIB} MiB") from None
        except (NotSent, AnswerLost) as error:
            failure = Failure("paid_not_downloaded", f"the picture was not downloaded: {error.reason}")
            if isinstance(error, NotSent) and error.refused:
                raise Failure("hop_refused", f"the link to the picture is refused: {error.reason}") from None
        except Failure as refused:
            failure = refused
        final = failure.code not in ("paid_not_downloaded", "image_unusable")
        spent = failure.code == "image_unusable" and attempt >= CORRUPT_DOWNLOAD_RETRIES
        wait = failure.facts.get("retry_after_s", backoff(attempt))
        if final or spent or attempt == DOWNLOAD_RETRIES or time.monotonic() + wait >= clock.end:
            break
        pause(wait)
    raise failure


def picture_bytes(answer: HttpAnswer, expires_at: dt.datetime) -> bytes:
    """The body of a successful download.

    Raises:
        Failure: paid_not_downloaded where trying again may help, else link_expired or link_refused.
    """
    status = answer.status
    if 200 <= status < 300:
        if answer.whole or ends_as_it_should("PNG", answer.body):  # a whole PNG, whatever length was announced
            return answer.body
        raise Failure("paid_not_downloaded", "the picture was not downloaded: it broke off", http_status=status)
    if status in (408, 425, 429) or status >= 500:
        message = f"the picture was not downloaded: HTTP {status}"
        raise Failure("paid_not_downloaded", message, http_status=status, retry_after_s=retry_after(answer))
    said_expired = status in (403, 410) and b"expired" in answer.body[:4096].lower()
    if said_expired or (status in (401, 403, 404, 410) and expires_at <= utc_now()):
        raise Failure("link_expired", f"the link to the picture has expired (HTTP {status})", http_status=status)
    raise Failure("link_refused", f"the link to the picture is answered with HTTP {status}", http_status=status)


# Where many pictures arrive at once: decoders beyond the number of cores only push each other out of the caches.
_decoders = threading.BoundedSemaphore(os.cpu_count() or 1)


def verified(content: bytes) -> Picture:
    """Decode the whole image, so that nothing broken, cut or hostile is called a picture.

    Raises:
        Failure: image_unusable.
    """
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # the check below is stricter, and does not print a warning

    def unusable(what: str) -> Failure:
        return Failure("image_unusable", f"what came as the picture ({len(content)} bytes) {what}")

    if not content:
        raise unusable("is empty")
    try:
        with _decoders, Image.open(io.BytesIO(content), formats=READABLE_FORMATS) as image:
            if image.width * image.height > MAX_DECODED_PIXELS:
                raise unusable(f"claims {image.width}*{image.height} pixels, which no picture of this model has")
            kind = image.format or ""
            image.load()
            last_row_is_empty = image.crop((0, image.height - 1, image.width, image.height)).getbbox() is None
        if kind == "PNG":
            with Image.open(io.BytesIO(content), formats=["PNG"]) as chunks:
                chunks.verify()  # checksums of all chunks, to the last
    except Failure:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for bytes they cannot read
        raise unusable(f"is not a whole image ({type(error).__name__})") from None
    if not ends_as_it_should(kind, content) or (kind == "PNG" and last_row_is_empty and png_lacks_rows(content)):
        raise unusable(f"is a {kind} image that breaks off")
    return Picture(content, kind, image.width, image.height, image)


def ends_as_it_should(kind: str, content: bytes) -> bool:
    """Whether a format whose decoder forgives a missing end has its end."""
    if kind == "PNG":
        return b"IEND\xaeB`\x82" in content[-1024:]
    if kind == "JPEG":
        return b"\xff\xd9" in content.rstrip(b"\0")[-1024:]
    if kind == "WEBP":
        return len(content) >= 8 + int.from_bytes(content[4:8], "little")
    return True


def png_lacks_rows(content: bytes) -> bool:
    """Whether a PNG's data ends before its last row: Pillow leaves such rows empty and says nothing.

    Chunk layout and sizes: PNG specification (W3C), sections 5 and 7. Interlaced pictures are taken as they are.
    """
    width, height, bits, color, _, _, interlaced = struct.unpack(">IIBBBBB", content[16:29])
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    expected = height * (1 + (width * bits * samples + 7) // 8)
    data, position = bytearray(), 8
    while position + 8 <= len(content):
        length, kind = struct.unpack(">I4s", content[position : position + 8])
        data += content[position + 8 : position + 8 + length] if kind == b"IDAT" else b""
        position += 12 + length
    return not interlaced and len(zlib.decompressobj().decompress(bytes(data), expected)) < expected


def converted(picture: Picture, wanted: str) -> Picture:
    """The picture in the wanted format; the service's bytes are kept where they are of that format.

    Raises:
        Failure: image_unusable.
    """
    if picture.format == wanted:
        return picture
    from PIL import ImageOps

    target = io.BytesIO()
    try:
        image = ImageOps.exif_transpose(picture.image)
        plain = flattened(image) if wanted == "JPEG" else image.convert("RGBA" if has_alpha(image) else "RGB")
        plain.save(target, wanted, **SAVE_OPTIONS[wanted])
    except (OSError, ValueError) as error:
        reason = f"the picture cannot be converted to {wanted} ({type(error).__name__})"
        raise Failure(
            "image_unusable", reason, hint="run next_command with another --output, such as one ending in .png"
        ) from None
    return Picture(target.getvalue(), wanted, image.width, image.height, image)


def has_alpha(image: PIL.Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


def flattened(image: PIL.Image.Image) -> PIL.Image.Image:
    """The picture without transparency, on white, as JPEG needs it."""
    from PIL import Image

    if not has_alpha(image):
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGB", layer.size, "white")
    white.paste(layer, mask=layer.getchannel("A"))
    return white


def place(content: bytes, output: Path, evidence_id: str, *, overwrite: bool, again: bool) -> tuple[Path, str | None]:
    """Put the bytes under the output's name in one step; returns the path used, and a warning if it is another.

    `again`: a run that was killed may have put them there already; then its file is the one.

    Raises:
        Failure: disk_after_paying.
    """
    other = _second_name(output, evidence_id)
    warning = f"{output} is taken by another file; the picture is saved as {other}"
    temporary = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(output.parent, f"{SKILL}-{evidence_id}")
        write_exclusively(temporary, content)
        if overwrite and not output.is_dir():
            os.replace(temporary, output)
            return output, None
        for path, said in ((output, None), (other, warning)):
            if _take_name(temporary, path) or (again and _holds(path, content)):
                return path, said
        raise FileExistsError(f"{other} is taken too")
    except OSError as error:
        raise Failure("disk_after_paying", f"the picture cannot be saved at {output}: {os_reason(error)}") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _second_name(output: Path, evidence_id: str) -> Path:
    """`<stem>-<evidence id>`, the stem shortened where a file system's 255 bytes would not hold it."""
    stem = output.stem
    while stem and len(os.fsencode(f"{stem}-{evidence_id}{output.suffix}")) > 255:
        stem = stem[:-1]
    return output.with_name(f"{stem}-{evidence_id}{output.suffix}")


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


def _take_name(temporary: Path, target: Path) -> bool:
    """Give a finished file its name; False where another file has it."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: claim the name first
        try:
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        os.replace(temporary, target)
    return True


def backoff(attempt: int) -> float:
    """Seconds to wait after the given attempt (from 0): exponential, with jitter, capped."""
    return min(BACKOFF_CAP, BACKOFF_BASE * 2.0 ** min(attempt, 16)) * random.uniform(0.75, 1.0)


def pause(seconds: float) -> None:
    """Wait; not at all once `no_more_waiting` is set."""
    until = time.monotonic() + seconds
    with SIGNALS.breakable():
        while (left := until - time.monotonic()) > 0 and not no_more_waiting.wait(min(left, TICK)):
            pass


no_more_waiting = threading.Event()  # for a command with threads that has been told to end


# ═══════════════════════════════════════════════════════════════════════════════════════════════════
# 10. Plan: everything that is decided before money is spent
# ═══════════════════════════════════════════════════════════════════════════════════════════════════


class Options(NamedTuple):
    """The command line after checking: typed, defaults filled in."""

    mode: str  # request | file | prompt | replay | recover | check | schema
    source: str  # the mode's argument
    overrides: dict[str, Any]  # request fields that flags set
    base_url: str | None
    region: str | None
    provider: type[Provider] | None
    settings: dict[str, Any]  # the provider's own options that are given
    output: str | None
    overwrite: bool
    dry_run: bool
    timeout: float
    max_retries: int
    trusted: frozenset[str]
    problems: tuple[Problem, ...]  # of the arguments, to be told together with those of the request


class Plan(NamedTuple):
    """Everything about one paid call that is decided before it is made."""

    provider: Provider
    endpoint: Endpoint
    request: ImageRequest
    payload: dict[str, Any]
    price: Price
    workspace: str | None
    output: Path
    overwrite: bool
    evidence_path: Path
    warnings: tuple[str, ...]

    def evidence(self, now: dt.datetime) -> dict[str, Any]:
        """The content of the evidence file at the moment when the request leaves."""
        content = {
            "schema_version": 1,
            "tool": {"name": SKILL, "version": VERSION},
            "status": "submitting",
            "provider": self.provider.name,
            "region": self.endpoint.region,
            "endpoint": self.endpoint.url,
            "operation": "image.generate",
            "billable": self.provider.billable,
            "request": self.request.as_dict(),
            "payload": self.payload,
            "settings": self.provider.known_settings,
            "output": str(self.output),
            "started_at": timestamp(now),
            "attempts": [{"at": timestamp(now)}],
            "cost": {
                "estimate": self.price.estimate,
                "currency": "USD",
                "basis": self.price.basis,
                "price_list_date": self.price.price_list_date,
            },
        }
        return {name: value for name, value in content.items() if value != {}}


def make_plan(options: Options, clock: Clock, env: Mapping[str, str]) -> Plan:
    """Validate everything about a request, name every problem at once, and decide what would be sent where.

    Raises:
        Failure: of exit code 2.
    """
    problems = list(options.problems)
    raw, recorded = None, None
    with noting(problems):
        raw, recorded = read_request(options, clock)
    if raw is None:
        raise_problems(problems)
    provider = planned_provider(options, recorded)
    problems += problems_for(provider, raw)
    workspace, more = workspace_of(provider, env)
    problems += more
    evidence_id = new_evidence_id(utc_now())
    output, endpoint = None, None
    with noting(problems):
        if options.output is not None:
            output = checked_output(options.output, "--output")
        else:
            hint = "set OUTPUT_DIR to the path of a folder, or unset it"
            output = checked_output(str(default_output(raw, evidence_id, env)), "OUTPUT_DIR", hint)
    with noting(problems):
        endpoint = planned_endpoint(options, raw, recorded, provider, env)
    if problems and output:
        with noting(problems):  # told with the others; alone, it is a local check
            check_free_name(output, options.overwrite)
    raise_problems(problems)
    if endpoint is None or output is None:  # each of them has left a problem
        raise AssertionError
    request = normalize(raw, with_seed=provider.takes_seed)
    raise_problems(format_problems(request, output))
    return Plan(
        provider=provider,
        endpoint=endpoint,
        request=request,
        payload=provider.payload(request),
        price=provider.price(request, endpoint.region),
        workspace=workspace,
        output=output,
        overwrite=options.overwrite,
        evidence_path=Folders.of(env).evidence / f"{evidence_id}.json",
        warnings=request_warnings(request, provider),
    )


def read_request(options: Options, clock: Clock) -> tuple[Any, dict[str, Any] | None]:
    """The request as written, flags applied; and, for --replay, the evidence that it comes from."""
    recorded = None
    if options.mode == "replay":
        recorded = Evidence.load("--replay", options.source, clock.timeout).data
        raw: Any = {name: value for name, value in recorded["request"].items() if name != "base_url"}
    elif options.mode == "prompt":
        raw = {"prompt": options.source}
    elif options.mode == "file":
        raw = decode_json_file(options.source, read_input("--file", options.source, MAX_REQUEST_BYTES, clock.timeout))
    else:
        if len(options.source) > MAX_REQUEST_BYTES:
            raise Failure("invalid_request", f"--request: larger than {MAX_REQUEST_BYTES // MIB} MiB")
        try:
            raw = parse_json(options.source)
        except ValueError as error:
            hint = "quote the JSON for your shell, or write it to a file and use --file FILE"
            raise Failure(
                "invalid_request", f"--request: is not valid JSON: {outside_text(error)}", hint=hint
            ) from None
    if not isinstance(raw, dict):
        return raw, recorded
    if {"size", "aspect_ratio"} & set(options.overrides):
        raw = {name: value for name, value in raw.items() if name not in ("size", "aspect_ratio")}
    return raw | options.overrides, recorded


def problems_for(provider: Provider, raw: Any) -> list[Problem]:
    """Everything wrong with a request for this provider: with the request as such, and with what is sound of it."""
    problems = request_problems(raw)
    if not isinstance(raw, dict):
        return problems
    wrong = {name for problem in problems for name in problem.text.partition(":")[0].split(", ")}
    sound = {name: raw[name] for name in REQUEST_SCHEMA["properties"] if name in raw and name not in wrong}
    sentences = provider.cannot(normalize({"prompt": "x"} | sound, with_seed=provider.takes_seed))
    return problems + [Problem("invalid_request", text) for text in sentences]


def planned_provider(options: Options, recorded: dict[str, Any] | None) -> Provider:
    """The provider that a flag names, else that of the evidence that is replayed, set up as it was then."""
    name = options.provider.name if options.provider else recorded["provider"] if recorded else DEFAULT_PROVIDER
    earlier = recorded.get("settings", {}) if recorded and recorded["provider"] == name else {}
    return provider_named(name, checked_settings(provider_class(name), earlier) | options.settings)


def checked_settings(provider: type[Provider], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that an evidence file holds, each read as the command line would.

    Raises:
        Failure: invalid_evidence.
    """
    known = {setting.name: setting for setting in provider.own_settings}
    settings = {}
    for name, value in recorded.items():
        try:
            settings[name] = known[name].read(str(value))
            if settings[name] != value or type(settings[name]) is not type(value):
                raise ValueError(f"as the command line reads it: {shown(settings[name])}")
        except (KeyError, ValueError) as error:
            what = "is not known" if isinstance(error, KeyError) else f"must be {error}"
            raise Failure("invalid_evidence", f"settings.{outside_text(name, 60)}: {what}") from None
    return settings


def planned_endpoint(
    options: Options, raw: Any, recorded: dict[str, Any] | None, provider: Provider, env: Mapping[str, str]
) -> Endpoint:
    """The endpoint of a request; a replayed one goes where the first one went unless a flag says otherwise."""
    request_url = raw.get("base_url") if isinstance(raw, dict) else None
    if not isinstance(request_url, str) or not request_url:
        request_url = None  # where it is of another type or empty, the schema says so
    region = options.region
    if recorded and recorded["provider"] == provider.name and region is None:
        request_url = recorded["endpoint"]
        region = recorded["region"] if recorded["region"] in provider.roots and not options.base_url else None
    return choose_endpoint(
        provider,
        flag=options.base_url,
        request_url=request_url,
        region=region,
        env=env,
        trusted=options.trusted,
    )


def workspace_of(provider: Provider, env: Mapping[str, str]) -> tuple[str | None, list[Problem]]:
    name = env.get(provider.workspace_variable or "")
    if not name:
        return None, []
    if re.fullmatch(r"[A-Za-z0-9._-]{1,128}", name):
        return name, []
    return None, [Problem("usage", f"{provider.workspace_variable}: must be a workspace id, letters, digits, . _ -")]


def default_output(raw: Any, evidence_id: str, env: Mapping[str, str]) -> Path:
    """Where a picture goes that was given no name: named as its evidence, plus a slug of the prompt."""
    prompt = raw.get("prompt") if isinstance(raw, dict) else None
    slug = slug_of(prompt) if isinstance(prompt, str) else ""
    return Folders.of(env).images / ("-".join(filter(None, (evidence_id, slug))) + ".png")


def checked_output(name: str, source: str, hint: str | None = None) -> Path:
    """The absolute path of the picture; `source` is where its name was given.

    Raises:
        Failure: invalid_output.
    """

    def refuse(what: str, hint: str | None = None) -> NoReturn:
        raise Failure("invalid_output", f"{source}: {what}", hint=hint)

    if not name or _CONTROL.search(name):
        refuse("must not be empty or hold control characters", hint)
    if name.endswith(("/", os.sep)) or os.path.isdir(name):
        refuse(f"{outside_text(name, 200)} is a folder; give a file name in it")
    path = Path(os.path.abspath(name))
    if path.suffix.lower() not in FORMATS:
        refuse(f"must end in one of {', '.join(FORMATS)}, got {shown(path.name)}")
    if not is_file_name(path.name):
        refuse("not a file name here, or longer than 255 bytes")
    return path


def slug_of(prompt: str) -> str:
    """The beginning of a prompt as part of a file name: letters and digits of any script, joined by `-`."""
    words = re.findall(r"\w+", unicodedata.normalize("NFC", without_surrogates(prompt[:400])).replace("_", " ").lower())
    slug = "-".join(words)[:40].strip("-")
    return slug if is_file_name(slug) else ""


def is_file_name(text: str) -> bool:
    """Whether this system can write the text as a file name."""
    try:
        return len(os.fsencode(text)) <= 255
    except UnicodeError:
        return False


def format_problems(request: ImageRequest, output: Path) -> list[Problem]:
    """A picture that the output's format cannot hold is refused before it is paid for."""
    limit = MAX_SIDE[FORMATS[output.suffix.lower()]]
    if max(request.width_height) <= limit:
        return []
    return [Problem("invalid_output", f"--output: {output.suffix} holds sides up to {limit} pixels; use .png")]


def request_warnings(request: ImageRequest, provider: Provider) -> tuple[str, ...]:
    if len(request.prompt) <= provider.long_prompt:
        return ()
    return (f"prompt: {len(request.prompt)} characters; the service may cut it at {provider.long_prompt}",)


# ═══════════════════════════════════════════════════════════════════════════════════════════════════
# 11. Local checks: whatever can fail on this machine fails before the request leaves
# ═══════════════════════════════════════════════════════════════════════════════════════════════════


def missing_packages(requirements: Mapping[str, str] = REQUIREMENTS, script: str = __file__) -> None:
    """Stop before anything else where a package is missing.

    Raises:
        Failure: missing_package, with how to install all of them.
    """
    missing = [name for name in requirements if importlib.util.find_spec(name) is None]
    if missing:
        raise missing_package(", ".join(requirements[name] for name in missing), requirements, script)


def missing_package(what: str, requirements: Mapping[str, str] = REQUIREMENTS, script: str = __file__) -> Failure:
    packages = " ".join(f"'{requirement}'" for requirement in requirements.values())
    hint = INSTALL_HINT.format(script=shlex.quote(os.path.abspath(script)), packages=packages)
    return Failure("missing_package", f"missing Python package: {what}", hint=hint)


def import_libraries() -> None:
    """Load what the paid call and its picture need, so that a broken package shows before money is spent."""
    import PIL.Image

    wired_adapter()
    del PIL


def check_working_folder() -> None:
    """Raise `disk` where the folder that the command was started in is gone."""
    try:
        os.getcwd()
    except OSError as error:
        raise Failure("disk", f"the working folder cannot be used: {os_reason(error)}") from None


def check_free_name(output: Path, overwrite: bool) -> None:
    """Raise `output_exists` where the name is taken and may not be."""
    if os.path.lexists(output) and not overwrite:
        raise Failure("output_exists", f"--output: {output} exists already")


def check_space(folder: Path, needed: int = MIN_FREE_BYTES) -> None:
    """Raise `disk` where a folder, or the nearest one above it that exists, cannot take `needed` bytes."""
    existing = folder
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise Failure("disk", f"{existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise Failure("disk", f"the folder {existing} is not writable")
    try:
        free = shutil.disk_usage(existing).free
    except OSError as error:
        raise Failure("disk", f"the folder {existing} cannot be examined: {os_reason(error)}") from None
    if free < needed:
        raise Failure("disk", f"only {free // 1024} KiB are free in {existing}; {needed // MIB} MiB are needed")


def check_writable(folder: Path, evidence_id: str) -> None:
    """Raise `disk` unless a file can really be written into the folder; leaves none behind."""
    check_space(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = temporary_name(folder, f"{SKILL}-{evidence_id}")
        write_exclusively(probe, b"")
        probe.unlink()
    except OSError as error:
        raise Failure("disk", f"the folder {folder} is not writable: {os_reason(error)}") from None


# ═══════════════════════════════════════════════════════════════════════════════════════════════════
# 12. Making a picture: the one paid call, and the way from its answer to a saved file
# ═══════════════════════════════════════════════════════════════════════════════════════════════════


def generate(plan: Plan, options: Options, clock: Clock, console: Console, env: Mapping[str, str]) -> dict[str, Any]:
    """Make, verify and save one picture; returns the response. All local checks come before the paid call."""
    check_free_name(plan.output, plan.overwrite)
    key = key_for(plan.provider, plan.endpoint, options.trusted, env)
    check_space(plan.evidence_path.parent)
    check_writable(plan.output.parent, plan.evidence_path.stem)
    import_libraries()
    get_ready(plan.provider, clock)
    if key.warning:
        plan = plan._replace(warnings=(*plan.warnings, key.warning))
    console.warn(plan.warnings)
    evidence = Evidence.create(plan.evidence_path, plan.evidence(utc_now()))
    console.note(f"evidence: {evidence.path}")
    with settling(evidence, flags=recovery_flags(plan, options)):
        generated = obtain(plan, key, evidence, clock, options.max_retries)
        keep_generated(evidence, generated, plan.warnings, clock)
        start = time.monotonic()
        source = fetch_source(evidence, plan.provider, clock, generated.content)
        image = collect(evidence, source, plan.output, plan.provider, overwrite=plan.overwrite, again=False)
        finish(evidence, image, clock, start)
        drop_held(evidence)
    return response_of(evidence, image)


def get_ready(provider: Provider, clock: Clock) -> None:
    """Have a provider load what its calls need. Raises as `Provider.prepare` and `in_time`."""
    provider.preflight()
    if provider.in_process:
        in_time(lambda until: provider.prepare(), clock.generate_until)


def recovery_flags(plan: Plan, options: Options) -> list[str]:
    """The flags without which a recovery would not do what this command was asked to."""
    asks_again = plan.endpoint.host in options.trusted  # a task is asked after where it was submitted
    trust = ["--trust-host", plan.endpoint.host] if asks_again else []
    return [*trust, *["--overwrite"] * plan.overwrite]


def keep_generated(evidence: Evidence, generated: Generated, warnings: Sequence[str], clock: Clock) -> None:
    """Put what has been paid for on disk: bytes that were handed over, then the evidence."""
    if generated.content:
        with contextlib.suppress(OSError):  # then they are in memory still, and the picture may yet be saved
            hold(evidence.path, generated.content)
    evidence.record(**generated_facts(generated, warnings, clock))


def held_path(evidence_path: Path) -> Path:
    """Where bytes that a provider handed over lie until the picture is saved: there is no link to get them again."""
    return evidence_path.with_suffix(".picture")


def hold(evidence_path: Path, content: bytes) -> None:
    """Raises OSError."""
    evidence_path.parent.mkdir(parents=True, exist_ok=True)
    replace_private(held_path(evidence_path), content)


def drop_held(evidence: Evidence) -> None:
    """Remove the bytes that were handed over, once the saved picture is on record."""
    if not evidence.unwritten:
        with contextlib.suppress(OSError):
            held_path(evidence.path).unlink(missing_ok=True)


def generated_facts(generated: Generated, warnings: Sequence[str], clock: Clock) -> dict[str, Any]:
    """What an evidence file says of a picture from the moment when it is known to be made."""
    more = len(generated.other_urls)
    several = [f"the service sent {more + 1} pictures; the first is saved, the evidence has the links"] if more else []
    response = {
        "request_id": generated.request_id,
        "usage": dict(generated.usage),
        "image_url": generated.image_url or None,
        "other_image_urls": list(generated.other_urls) or None,
        "expires_at": timestamp(generated.expires_at) if generated.expires_at else None,
        "rewritten_prompt": generated.rewritten_prompt or None,
        "reasoning": generated.reasoning or None,
    }
    return {
        "status": "generated",
        "generated_at": timestamp(utc_now()),
        "response": {name: value for name, value in response.items() if value is not None},
        "timings_ms": {"generate": elapsed_ms(clock.start)},
        "warnings": [*warnings, *several, *generated.warnings] or None,
    }


def obtain(plan: Plan, key: Key, evidence: Evidence, clock: Clock, max_retries: int) -> Generated:
    """The one step that costs money: sends the request until it is answered, and never twice for one picture.

    Raises:
        Failure: with `billed` as far as it is known. Interrupted.
    """
    provider = plan.provider
    attempt = 0
    while True:
        try:
            made = send(plan, key, clock.generate_until)
        except Failure as failure:
            wait = retry_wait(failure, attempt, max_retries, clock, clock.generate_until)
            evidence.end_failed_attempt(failure, wait)
            if wait is None:
                if attempt:
                    failure.message += f" (tried {attempt + 1} times)"
                raise
        except Interrupted as interruption:
            if not interruption.request_left:
                evidence.end_attempt(outcome="interrupted", billed="no")
            raise
        else:
            break
        evidence.record()
        pause(wait)
        attempt += 1
        evidence.begin_attempt()
    if isinstance(made, Submitted):
        evidence.record(**submitted_facts(made, evidence))
        task = Task(provider, plan.endpoint, key, plan.request, made.task_id)
        try:
            made = task.wait_for(clock.generate_until)
        except Failure as failure:
            if failure.code in TASK_ENDS:
                evidence.end_failed_attempt(failure, None)
            raise
    end_generated_attempt(evidence, provider)
    return made


def end_generated_attempt(evidence: Evidence, provider: Provider) -> None:
    """Note that the last attempt has made a picture."""
    evidence.end_attempt(http_status=None if provider.in_process else 200, outcome="generated", billed="yes")


@contextlib.contextmanager
def telling_of_withheld(key: Key) -> Iterator[None]:
    """A service that misses a key which was kept from it is not refusing the key."""
    try:
        yield
    except Failure as failure:
        if key.warning and failure.exit_code == EXIT_KEY:
            failure.facts["hint"] = key.warning
        raise


def send(plan: Plan, key: Key, until: float) -> Generated | Submitted:
    """The paid call, sent once. Raises as `ask`."""
    call = plan.provider.submit(plan.payload, plan.endpoint, key.value, plan.workspace)
    provider = plan.provider
    limit = provider.max_answer_bytes
    with telling_of_withheld(key):
        made = ask(call, lambda answer: provider.read(answer, plan.request, utc_now()), until, plan.endpoint, limit)
    if isinstance(made, Generated) and provider.links_to_itself and made.image_url.startswith("/"):
        made = made._replace(image_url=urljoin(plan.endpoint.url, made.image_url))
    return made


def submitted_facts(submitted: Submitted, evidence: Evidence) -> dict[str, Any]:
    """What an evidence file says of a task from the moment when its id is known."""
    evidence.end_attempt(http_status=200, outcome="submitted")
    response = {"request_id": submitted.request_id} if submitted.request_id else None
    return {"status": "submitted", "task_id": submitted.task_id, "response": response}


# Failures that say how a task has ended. All others say something of the question, and the task goes on.
TASK_IS_DONE = ("task_failed", "blocked", "no_image")
TASK_ENDS = (*TASK_IS_DONE, "outcome_unknown")  # what was lost may be found again


class Task:
    """A submitted task, asked after at growing intervals. `pause_s` is the time to the next question, in seconds."""

    def __init__(self, provider: Provider, endpoint: Endpoint, key: Key, request: ImageRequest, task_id: str) -> None:
        self.id = task_id
        self.pause_s = POLL_FIRST
        self._provider = provider
        self._endpoint = endpoint
        self._key = key
        self._request = request
        self._interval = POLL_FIRST
        self._strange_in_a_row = 0
        self._trouble = ""
        self._retry_after_s: float | None = None

    def ask(self, until: float) -> Generated | None:
        """One free question, answered before `until`; None where the task is still worked on, as far as is known.

        Raises:
            Failure: one of TASK_ENDS, or that the key is not good any more.
        """
        provider, now = self._provider, time.monotonic()
        self._interval = min(self._interval * POLL_GROWTH, POLL_LONGEST)
        self.pause_s = self._interval
        call = provider.poll(self.id, self._endpoint, self._key.value)
        try:
            found = ask(
                call,
                lambda answer: provider.read_poll(answer, self._request, utc_now()),
                now + min(POLL_TIMEOUT, max(LAST_POLL, POLL_SHARE * (until - now))),
                self._endpoint,
                provider.max_answer_bytes,
            )
        except Failure as failure:
            if failure.code in TASK_IS_DONE:
                raise
            if failure.exit_code == EXIT_KEY:
                failure.facts |= {"billed": "unknown", "hint": f"{failure.fact('hint')}; then run next_command, free"}
                raise
            self._strange_in_a_row = self._strange_in_a_row + 1 if failure.code in TASK_IS_STRANGE else 0
            if self._strange_in_a_row >= LOST_AFTER:
                message = f"the service does not know task {outside_text(self.id, 100)} any more: {failure.message}"
                raise Failure("outcome_unknown", message, http_status=failure.facts.get("http_status")) from None
            self._retry_after_s = failure.facts.get("retry_after_s")
            self.pause_s = max(self._interval, self._retry_after_s or 0.0)
            self._trouble = f"; the last question failed: {failure.message}"
            return None
        self._strange_in_a_row, self._trouble, self._retry_after_s = 0, "", None
        return found

    @property
    def is_held(self) -> bool:
        """Whether the service has asked not to be asked so soon."""
        return self._retry_after_s is not None

    @property
    def is_strange(self) -> bool:
        """Whether the service did not know the task when it was asked last."""
        return self._strange_in_a_row > 0

    def wait_for(self, until: float) -> Generated:
        """The picture, once the task has succeeded.

        Raises:
            Failure: as `ask`; paid_not_downloaded where it is not at its end in time. Interrupted.
        """
        while (left := until - time.monotonic()) > self.pause_s or (left > LAST_POLL and not self._trouble):
            pause(min(self.pause_s, left - LAST_POLL / 2))
            found = self.ask(until)
            if found is not None:
                return found
        raise self.unfinished()

    def unfinished(self) -> Failure:
        what = f"the service still works on task {outside_text(self.id, 100)}{self._trouble}"
        return Failure(
            "paid_not_downloaded", what, billed="unknown", hint=GO_ON_FREE, retry_after_s=self._retry_after_s
        )


def is_task_id(text: str) -> bool:
    """Whether a name that a service gave to its task can be kept and sent back; a key in it must not be kept."""
    return 0 < len(text) <= 500 and text == without_surrogates(text) == mask(text)


TASK_IS_STRANGE = ("not_found", "rejected_by_service", "refused_by_service")

Read = TypeVar("Read")


def ask(
    call: HttpCall | LocalCall,
    read: Callable[[HttpAnswer], Read],
    until: float,
    endpoint: Endpoint,
    limit: int = MAX_ANSWER_BYTES,
) -> Read:
    """Send one call to the service and read its answer; what the network does becomes a Failure."""
    if isinstance(call, LocalCall):
        result: Read = in_time(call.work, until)
        return result
    reach = "loopback" if endpoint.is_loopback else "service"
    try:
        return read(exchange(call, until=until, limit=limit, reach=reach))
    except NotSent as error:
        raise Failure("unreachable", f"{endpoint.host}: {error.reason}", retryable=not error.lasting) from None
    except AnswerLost as error:
        raise Failure("outcome_unknown", f"{endpoint.host}: {error.reason}") from None
    except AnswerTooLarge:
        raise Failure("answer_unusable", f"the answer is larger than {limit // MIB} MiB") from None


def in_time(work: Callable[[float], Result], until: float) -> Result:
    """Do work that cannot be broken off in a thread of its own, so that a deadline and a signal hold all the same.

    Raises:
        Failure: too_slow, and what the work raises. Interrupted.
    """
    try:
        with SIGNALS.breakable():
            return in_thread(lambda: work(until), until - time.monotonic())
    except Late:
        abandoned_work.set()
        raise Failure("too_slow", "the picture was not made in time on this machine") from None
    except Interrupted as interruption:
        abandoned_work.set()
        interruption.request_left = False
        raise


abandoned_work = threading.Event()  # the process must end without waiting for its threads


def retry_wait(failure: Failure, attempt: int, max_retries: int, clock: Clock, until: float) -> float | None:
    """Seconds to wait before the call is sent again; None where it must not be."""
    if not failure.fact("retryable") or failure.code in TASK_ENDS:
        return None  # it may have been billed, or would fail again
    if attempt >= (min(max_retries, UNREACHABLE_RETRIES) if failure.code == "unreachable" else max_retries):
        return None
    wait = failure.facts.get("retry_after_s", backoff(attempt))
    if not clock.room_for_attempt_after(wait, until):
        return None  # an attempt that could not end in time might be paid for in vain
    return float(wait)


def collect(
    evidence: Evidence, source: Picture, output: Path, provider: Provider, *, overwrite: bool, again: bool
) -> dict[str, Any]:
    """Put a downloaded picture in its place; returns the `image` of the evidence.

    `again`: an earlier run may have got as far as this.

    Raises:
        Failure: image_unusable, disk_after_paying.
    """
    picture = converted(source, FORMATS[output.suffix.lower()])
    path, warning = place(picture.content, output, evidence.id, overwrite=overwrite, again=again)
    unlike = size_warning(evidence.data["request"]["size"], picture, provider)
    warnings = [text for text in (warning, unlike) if text]
    image = {
        "path": str(path),
        "sha256": picture.sha256,
        "bytes": len(picture.content),
        "format": picture.format,
        "width": picture.width,
        "height": picture.height,
    }
    origin = {"source_format": source.format, "source_sha256": source.sha256} if picture is not source else {}
    return image | origin | ({"warnings": warnings} if warnings else {})


def fetch_source(evidence: Evidence, provider: Provider, clock: Clock, content: bytes = b"") -> Picture:
    """The picture as the service made it: `content`, else what was handed over earlier, else by its link.

    Raises:
        Failure: as `verified` and `download`; disk_after_paying.
    """
    link = evidence.data["response"].get("image_url")
    held = held_path(evidence.path)
    if content or not link:
        try:
            return verified(content or held.read_bytes())
        except FileNotFoundError:
            if evidence.data["status"] == "saved":
                message = "the saved file has vanished, and there is no link to fetch the picture again"
                raise Failure("link_expired", message, lasting=True) from None
            hint = "report it: the picture was handed over, and no disk took it; do not pay again unasked"
            raise Failure("image_unusable", f"{held} is not there", hint=hint, lasting=True) from None
        except OSError as error:
            raise Failure("disk_after_paying", f"{held} cannot be read: {os_reason(error)}") from None
        except Failure as failure:  # the same bytes will not get better
            failure.facts |= {"lasting": True, "hint": f"report it, do not rerun unasked; what came is kept as {held}"}
            raise
    return download(
        link,
        clock=clock,
        endpoint=evidence.data["endpoint"],
        provider=provider,
        expires_at=moment_of(evidence.data["response"].get("expires_at")),
    )


def finish(evidence: Evidence, image: dict[str, Any], clock: Clock, start: float) -> None:
    """Bring the evidence to `saved`; `start` is when the download began, in seconds of time.monotonic().

    `timings_ms` is of the command that saved the picture; `generate` stays that of the one that made it.
    """
    now = {"download": elapsed_ms(start), "total": elapsed_ms(clock.start)}
    timings = evidence.data.get("timings_ms", {}) | now
    evidence.record(status="saved", finished_at=timestamp(utc_now()), timings_ms=timings, image=image, error=None)
    if evidence.unwritten:
        image.setdefault("warnings", []).append(f"the evidence file {evidence.path} could not be brought up to date")


def size_warning(asked: str, picture: Picture, provider: Provider) -> str | None:
    """A sentence where the picture is not what was asked for, as far as the provider lets that be asked."""
    width, height = parse_size(asked)
    if (picture.width, picture.height) == (width, height):
        return None
    if provider.sizes_are_ratios and math.isclose(
        picture.width * height, picture.height * width, rel_tol=RATIO_TOLERANCE
    ):
        return None
    return f"the picture is {picture.width}*{picture.height}, asked was {asked}"


def elapsed_ms(start: float) -> float:
    return round((time.monotonic() - start) * 1000, 1)


def response_of(evidence: Evidence, image: dict[str, Any]) -> dict[str, Any]:
    """The response of the contract (RESPONSE_SCHEMA) for a saved image of this evidence."""
    data = evidence.data
    request, said = data["request"], data.get("response", {})
    response = {
        "image_url": said.get("image_url"),
        "width": image["width"],
        "height": image["height"],
        "prompt": request["prompt"],
        "rewritten_prompt": said.get("rewritten_prompt"),
        "reasoning": said.get("reasoning"),
        "request_id": said.get("request_id", ""),
        "seed": request.get("seed"),
        "size": request["size"],
        "provider": data["provider"],
        "region": data["region"],
        "image_path": image["path"],
        "evidence_path": str(evidence.path),
        "estimated_cost": data["cost"]["estimate"],
        "warnings": [*data.get("warnings", ()), *image.get("warnings", ())] or None,
    }
    return {name: value for name, value in response.items() if value is not None}


# ═══════════════════════════════════════════════════════════════════════════════════════════════════
# 13. Settling: how a run that ends early leaves its evidence
# ═══════════════════════════════════════════════════════════════════════════════════════════════════


@contextlib.contextmanager
def settling(evidence: Evidence, *, flags: Sequence[str], saved: bool = False) -> Iterator[None]:
    """Whatever ends the work, the evidence says how, and the error says where the evidence is.

    `flags` are those that a recovery needs to do what was asked for. `saved`: the picture is safe already; a copy
    that fails changes nothing about that.
    """
    try:
        yield
        return
    except Failure as error:
        failure = error
    except Interrupted as interruption:
        failure = interrupted(interruption, evidence)
    except Exception as error:  # a fault of this tool must not lose what was paid for
        failure = internal_error(error, billed=billed_so_far(evidence), exit_code=EXIT_UNKNOWN)
    explain(evidence, failure, flags)
    if not saved:
        settle(evidence, failure)
    raise failure


def billed_so_far(evidence: Evidence) -> str:
    if evidence.data["status"] in ("generated", "saved"):
        return "yes"
    return "no" if evidence.nothing_outstanding else "unknown"


def interrupted(interruption: Interrupted, evidence: Evidence) -> Failure:
    """The failure of a command that a signal ended, with what is known of the money."""
    billed = billed_so_far(evidence)
    messages = {
        "no": "interrupted by {name}; nothing was billed",
        "unknown": "interrupted by {name} while the request was out; whether it was billed is not known",
        "yes": "interrupted by {name}; the picture is paid for and not saved yet",
    }
    hints = {"no": KINDS["interrupted"].hint, "unknown": ASK_BEFORE_PAYING, "yes": RECOVER_FREE}
    if is_task_open(evidence):
        messages["unknown"] = "interrupted by {name} while the service works on the picture"
        hints["unknown"] = GO_ON_FREE
    name = signal.Signals(interruption.signum).name
    return Failure(
        "interrupted",
        messages[billed].format(name=name),
        exit_code=EXIT_SIGNAL + interruption.signum,
        billed=billed,
        hint=hints[billed],
    )


def internal_error(error: Exception, **facts: Any) -> Failure:
    """A fault of this tool: named with its place, without a traceback (its values could hold the key)."""
    frame = error.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    place_of = f" at line {frame.tb_lineno} of {Path(frame.tb_frame.f_code.co_filename).name}" if frame else ""
    return Failure("internal_error", f"{type(error).__name__}{place_of}", **facts)


def is_task_open(evidence: Evidence) -> bool:
    """Whether the service may still be working on a task that was submitted."""
    return evidence.data["status"] == "submitted" and "task_id" in evidence.data


def outlives(evidence: Evidence, failure: Failure) -> bool:
    """Whether a task goes on after a failure: what failed was a question, and it can be asked again."""
    return is_task_open(evidence) and failure.code not in TASK_ENDS


def explain(evidence: Evidence, failure: Failure, flags: Sequence[str]) -> None:
    """Add to a failure what leads back to the picture."""
    link = evidence.data.get("response", {}).get("image_url")
    path = str(evidence.path)
    failure.facts["evidence_path"] = path
    if failure.code == "outcome_unknown" and not evidence.data["billable"]:
        failure.facts["hint"] = MAKE_ANEW
    failure.facts["hint"] = failure.fact("hint").replace("EVIDENCE", shlex.quote(path))
    if link:
        failure.facts["image_url"] = link
    if evidence.data.get("response", {}).get("request_id"):
        failure.facts.setdefault("request_id", evidence.data["response"]["request_id"])
    link_is_dead = failure.code in DEAD_LINK and "lasting" not in failure.facts
    goes_on = "task_id" in evidence.data and failure.code not in TASK_IS_DONE and (link_is_dead or not link)
    if goes_on and failure.code == "outcome_unknown":
        failure.facts["hint"] = (
            f"run next_command once, free: it asks after the task again; else {failure.fact('hint')}"
        )
    if goes_on and link:
        failure.facts["hint"] = "run next_command once, free: the service may name a new link for its task"
    is_here = link or held_path(evidence.path).exists()
    if goes_on or (is_here and failure.code not in NO_SECOND_TRY and "lasting" not in failure.facts):
        failure.facts["next_command"] = own_command("--recover", path, *flags, "--print-response")


DEAD_LINK = ("link_expired", "link_refused")
NO_SECOND_TRY = ("link_expired", "hop_refused", "image_too_large")


def settle(evidence: Evidence, failure: Failure) -> None:
    """Write a failure into the evidence."""
    if failure.code == "disk_after_paying" and "next_command" not in failure.facts:
        failure.facts["hint"] = f"the picture is lost: no disk took it; free space, then {ASK_BEFORE_PAYING}".replace(
            "EVIDENCE", shlex.quote(str(evidence.path))
        )
    status = {"no": "failed", "unknown": "unknown", "yes": "generated"}[failure.billed]
    if outlives(evidence, failure):
        status = "submitted"
    evidence.record(status=status, finished_at=timestamp(utc_now()), error=failure.object())
    if evidence.unwritten and is_task_open(evidence):
        failure.facts.pop("next_command", None)
        failure.facts["hint"] = "tell the user the name of the task: no evidence could be written; do not pay again"
    if evidence.unwritten and "image_url" in failure.facts:
        # The file on disk does not hold the link: only the error does.
        failure.facts.pop("next_command", None)
        failure.facts["hint"] = "fetch image_url within 24 hours by other means: the evidence file could not be written"


def own_command(*arguments: str) -> str:
    """This script with other arguments, quoted for the shell of this system."""
    words = [sys.executable or "python3", os.path.abspath(__file__), *arguments]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


# ═══════════════════════════════════════════════════════════════════════════════════════════════════
# 14. Free commands: dry run, recovery, check
# ═══════════════════════════════════════════════════════════════════════════════════════════════════


def dry_run(plan: Plan, trusted: frozenset[str], env: Mapping[str, str]) -> dict[str, Any]:
    """The whole plan, and everything that would stop it; nothing is sent, asked for or written."""
    checks: list[Callable[[], object]] = [
        lambda: key_for(plan.provider, plan.endpoint, trusted, env),
        plan.provider.preflight,
        lambda: check_free_name(plan.output, plan.overwrite),
        lambda: check_space(plan.output.parent),
        lambda: check_space(plan.evidence_path.parent),
    ]
    found: list[object] = []
    problems: list[Failure] = []
    for local_check in checks:
        try:
            found.append(local_check())
        except Failure as failure:
            if failure.message not in [problem.message for problem in problems]:
                problems.append(failure)
    key = next((result for result in found if isinstance(result, Key)), NO_KEY)
    plan_of_it = {
        "ok": not problems,
        "request": plan.request.as_dict(),
        "provider": plan.provider.name,
        "region": plan.endpoint.region,
        "endpoint": plan.endpoint.url,
        "payload": plan.payload,
        "settings": plan.provider.known_settings,
        "output": str(plan.output),
        "billable": plan.provider.billable,
        "estimated_cost": plan.price.estimate,
        "cost_basis": plan.price.basis,
        "key_source": key.source or None,
        "warnings": [*plan.warnings, *filter(None, [key.warning])],
        "problems": [failure.object() for failure in problems],
    }
    return {name: value for name, value in plan_of_it.items() if value != {}}


def recover(options: Options, clock: Clock, env: Mapping[str, str]) -> dict[str, Any]:
    """Finish a picture that has been paid for, without paying; returns the response.

    Raises:
        Failure: 2 where nothing was billed, 7 where the outcome is unknown, 8 where the link has died.
    """
    evidence = Evidence.load("--recover", options.source, clock.timeout)
    provider = provider_named(evidence.data["provider"])
    output = recovery_output(evidence, options)
    saved = is_saved(evidence)
    if saved and options.output is None:
        return response_of(evidence, evidence.data["image"])
    has_link = bool(evidence.data.get("response", {}).get("image_url"))
    here = has_link or held_path(evidence.path).exists() or evidence.data["status"] in ("generated", "saved")
    task_is_open = not here and "task_id" in evidence.data and evidence.data["status"] != "failed"
    if not here and not task_is_open:
        failure = unrecoverable(evidence)
        explain(evidence, failure, [])
        raise failure
    remove_leftovers(evidence.path.parent, evidence.id)
    remove_leftovers(output.parent, f"{SKILL}-{evidence.id}")
    check_writable(output.parent, evidence.id)
    flags = ["--output", str(output)] if options.output else []
    flags += [word for host in sorted(options.trusted) for word in ("--trust-host", host)] if task_is_open else []
    try:
        task = task_of(evidence, provider, options, env) if task_is_open else None
    except Failure as failure:
        failure.facts["billed"] = "unknown"
        explain(evidence, failure, flags)
        raise
    import_libraries()
    with settling(evidence, flags=[*flags, *["--overwrite"] * options.overwrite], saved=saved):
        if task is not None:
            evidence.update(status="submitted", error=None)
            generated = task.wait_for(clock.generate_until)
            end_generated_attempt(evidence, provider)
            keep_generated(evidence, generated, evidence.data.get("warnings", ()), clock)
        elif "response" not in evidence.data:  # killed between the bytes and the evidence
            evidence.update(**generated_facts(Generated(), (), clock))
        start = time.monotonic()
        if saved and not ("source_format" in evidence.data["image"] and has_link):  # the bytes, or all there is of them
            source = verified(Path(evidence.data["image"]["path"]).read_bytes())
        else:
            source = fetch_anew(evidence, provider, clock, lambda: task_of(evidence, provider, options, env))
        image = collect(evidence, source, output, provider, overwrite=options.overwrite, again=True)
        if not saved:  # else this is one more copy, and the evidence goes on naming the first
            finish(evidence, image, clock, start)
            drop_held(evidence)
    return response_of(evidence, image)


def fetch_anew(evidence: Evidence, provider: Provider, clock: Clock, task: Callable[[], Task]) -> Picture:
    """The picture of an evidence file; where its link has died and there is a task, the service names a new one, free.

    Raises:
        Failure: as `fetch_source`.
    """
    try:
        return fetch_source(evidence, provider, clock)
    except Failure as failure:
        if failure.code not in DEAD_LINK or "task_id" not in evidence.data:
            raise
        try:
            generated = task().ask(clock.end)
        except Failure:
            generated = None
        if generated is None:
            raise
    evidence.update(response=generated_facts(generated, (), clock)["response"])
    try:
        return fetch_source(evidence, provider, clock)
    except Failure as failure:
        failure.facts["lasting"] = failure.code in DEAD_LINK or None
        raise


def task_of(evidence: Evidence, provider: Provider, options: Options, env: Mapping[str, str]) -> Task:
    """The submitted task of an evidence file, to be asked after where it was submitted.

    Raises:
        Failure: invalid_evidence, host_not_trusted, key_missing, key_malformed.
    """
    if type(provider).poll is Provider.poll or not is_task_id(evidence.data["task_id"]):
        raise Failure("invalid_evidence", f"{evidence.path.name}: task_id: not one of {provider.name}")
    endpoint = parse_base_url(evidence.data["endpoint"], "endpoint", provider)
    check_trust(endpoint, "endpoint", provider, options.trusted)
    key = key_for(provider, endpoint, options.trusted, env)
    request = normalize(evidence.data["request"], with_seed=provider.takes_seed)
    return Task(provider, endpoint, key, request, evidence.data["task_id"])


def recovery_output(evidence: Evidence, options: Options) -> Path:
    """Where a recovered picture goes; the evidence is checked as far as it will be used."""
    said = evidence.data["request"]
    problems = request_problems(said)
    if not problems and said != normalize(said, with_seed="seed" in said).as_dict():
        problems = [Problem("invalid_request", "request: is not normalized")]
    recorded = None
    with noting(problems):
        recorded = checked_output(evidence.data["output"], "output")
    if problems or recorded is None or not os.path.isabs(evidence.data["output"]):
        texts = [problem.text for problem in problems] or ["output: is not an absolute path"]
        raise Failure("invalid_evidence", f"{evidence.path.name}: {'; '.join(texts)}", problems=texts)
    if options.output is None:
        return recorded
    with noting(problems):
        recorded = checked_output(options.output, "--output")
    raise_problems(problems)
    check_free_name(recorded, options.overwrite)
    return recorded


def is_saved(evidence: Evidence) -> bool:
    """Whether the picture of this evidence lies, unchanged, where the evidence says."""
    image = evidence.data.get("image")
    if not image or evidence.data["status"] != "saved":
        return False
    try:
        return file_hash(Path(image["path"])) == str(image["sha256"])
    except (OSError, ValueError):
        return False


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def unrecoverable(evidence: Evidence) -> Failure:
    """Why there is nothing to fetch for an evidence file without a link."""
    provider = provider_named(evidence.data["provider"])
    failed = evidence.data["status"] == "failed" or provider.in_process  # which has left nothing anywhere else
    error = evidence.data.get("error", {"message": "it ended before the service made a picture"})
    if failed or (evidence.data["status"] == "submitting" and evidence.nothing_outstanding):
        kind = KINDS.get(error.get("code", ""))
        hint = kind.hint if kind and not kind.retryable else None
        message = f"this request was not billed: {outside_text(error['message'])}"
        return Failure("nothing_to_recover", message, hint=hint)
    return Failure(
        "outcome_unknown",
        "the request left and no link came back: whether a picture was made and billed is not known",
        request_id=error.get("request_id"),
    )


def is_loopback_url(url: str) -> bool:
    try:
        return is_loopback_host(split_netloc(urlsplit(url).netloc)[0])
    except ValueError:
        return False


def moment_of(text: str | None) -> dt.datetime:
    """The moment that an evidence file names; long ago where it names none."""
    try:
        moment = dt.datetime.fromisoformat((text or "").replace("Z", "+00:00"))
        return moment if moment.tzinfo else moment.replace(tzinfo=dt.timezone.utc)
    except ValueError:
        return dt.datetime.min.replace(tzinfo=dt.timezone.utc)


def check(options: Options, clock: Clock, env: Mapping[str, str]) -> dict[str, Any]:
    """One free, read-only query that shows whether host, key and permission work.

    Raises:
        Failure: never billed, so what would be unknown for a paid call is only a failing service here.
    """
    provider = planned_provider(options, None)
    workspace, problems = workspace_of(provider, env)
    raise_problems(problems)
    endpoint = planned_endpoint(options, None, None, provider, env)
    key = key_for(provider, endpoint, options.trusted, env)
    provider.preflight()
    call = provider.query(endpoint, key.value, workspace)
    attempt = 0
    while True:
        try:
            with telling_of_withheld(key):
                listed = ask(call, provider.read_query, clock.end, endpoint)
            break
        except Failure as error:
            failure = free_of_charge(error)
            wait = retry_wait(failure, attempt, options.max_retries, clock, clock.end)
            if wait is None:
                raise failure from None
        pause(wait)
        attempt += 1
    return {
        "ok": True,
        "provider": provider.name,
        "region": endpoint.region,
        "endpoint": endpoint.url,
        "key_source": key.source or None,
        "model_listed": listed,
        **({"warnings": [key.warning]} if key.warning else {}),
    }


def free_of_charge(failure: Failure) -> Failure:
    """The failure of a call that costs nothing: what would be unknown for a paid one is only a fault here."""
    failure.facts["billed"] = "no"
    if failure.code == "outcome_unknown" and 300 <= failure.facts.get("http_status", 0) < 400:
        failure.code = "answer_unusable"
    if failure.code == "outcome_unknown":
        failure.code = "service_failing"
    if failure.code == "service_failing":
        failure.facts.pop("retryable", None)
    if failure.code in ("answer_unusable", "no_image"):
        failure.facts["hint"] = "check the base URL: what answers there is not the service"
    return failure


# ═══════════════════════════════════════════════════════════════════════════════════════════════════
# 15. Command line: options, streams and exit codes
# ═══════════════════════════════════════════════════════════════════════════════════════════════════

MODES = ("request", "file", "prompt", "replay", "recover", "check", "schema")
REQUEST_FLAGS = ("size", "aspect_ratio", "seed", "prompt_extend", "base_url")
ALWAYS_ALLOWED = {"print_response", "quiet"}
ALLOWED: dict[str, set[str]] = {  # the flags that mean something in a mode; those not named here allow all
    "recover": ALWAYS_ALLOWED | {"output", "overwrite", "timeout", "trust_host"},
    "check": ALWAYS_ALLOWED | {"base_url", "region", "provider", "timeout", "max_retries", "trust_host"},
    "schema": ALWAYS_ALLOWED,
}

DESCRIPTION = (
    "Turn words into one picture with Z-Image Turbo. Only --request, --file, --prompt and --replay cost money."
)
EPILOG = """\
exit codes:
  0  image saved                        6  rate limited, failing or not reachable
  2  invalid request, usage or file     7  outcome unknown, or paid and not downloaded yet
  3  key missing, wrong, no permission  8  the answer or the image cannot be used
  4  balance or quota used up           9  the local disk
  5  refused by content safety          130, 143  interrupted

stdout carries data only: the path of the saved image, or one JSON object. The last line on stderr
of every error says what to do next. Key: {key}.
"""


class Console:
    """stdout carries data only, in UTF-8; everything else goes to stderr. A closed stream never ends a command."""

    def __init__(self, *, json_mode: bool, quiet: bool = False) -> None:
        self.json_mode = json_mode
        self.quiet = quiet
        self._warned: set[str] = set()

    def warn(self, warnings: Sequence[str]) -> None:
        """Tell each warning once."""
        for text in warnings:
            if text not in self._warned:
                self._warned.add(text)
                self.note(f"warning: {text}")

    def note(self, text: str) -> None:
        if not self.quiet:
            self._write("stderr", text.encode("utf-8", "backslashreplace") + b"\n")

    def answer(self, value: dict[str, Any]) -> None:
        """Data that is all that a command has to give: if nobody takes it, the command has failed."""
        if not self.data(value):
            raise Failure("disk", "standard output cannot be written", hint="give the command a place to write to")

    def data(self, value: dict[str, Any]) -> bool:
        return self._write("stdout", to_json(value))

    def path(self, path: str) -> bool:
        return self._write("stdout", os.fsencode(path) + b"\n")

    def failure(self, failure: Failure) -> None:
        """The error for a person on stderr, its advice on the last line; as JSON on stdout where asked for."""
        self.tell(failure)
        if self.json_mode:
            self.data({"error": failure.object()})

    def tell(self, failure: Failure) -> None:
        """The error for a person on stderr."""
        error = failure.object()
        lines = [f"error: {error['code']}: {error['message']}"]
        if len(error.get("problems", [])) > 1:
            shown_of = f", the first {len(error['problems'])} are" if "problem_count" in error else ""
            lines = [f"error: {error['code']}: {error.get('problem_count', len(error['problems']))} problems{shown_of}"]
            lines += [f"  {problem}" for problem in error["problems"]]
        lines += [
            f"{name}: {error[name]}" for name in ("evidence_path", "next_command", "retry_after_s") if name in error
        ]
        lines.append(f"next: {error['hint']}")
        self._write("stderr", ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace"))

    def flush(self) -> bool:
        return self._write("stdout", b"")

    def _write(self, name: str, content: bytes) -> bool:
        """Whether the stream took the content."""
        stream = getattr(sys, name)
        if stream is None:
            return False
        try:
            stream.flush()
            stream.buffer.write(content)
            stream.buffer.flush()
        except OSError:  # nobody reads it any more; keep the interpreter from complaining at its end
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            return False
        return True


class Parser(argparse.ArgumentParser):
    """argparse whose errors are failures like all others."""

    def error(self, message: str) -> NoReturn:
        hint = None
        if "expected one argument" in message:
            hint = "give it a value; one that begins with - goes behind an equals sign: --prompt=-text"
        raise Failure("usage", outside_text(message), hint=hint)


def build_parser(provider: type[Provider] | None = None) -> Parser:
    """The command line of the contract. Values stay text here: `read_options` checks them all at once."""
    parser = Parser(
        prog="generate_image.py",
        description=DESCRIPTION,
        epilog=EPILOG.format(key=(provider or PROVIDERS[DEFAULT_PROVIDER]).key_hint()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    mode = parser.add_argument_group("what to do (exactly one)")
    mode.add_argument("--request", metavar="JSON", help="the request as a JSON object")
    mode.add_argument("--file", metavar="PATH", help="the request in a JSON file, - for standard input")
    mode.add_argument("--prompt", metavar="TEXT", help="the request's prompt alone")
    mode.add_argument("--replay", metavar="EVIDENCE", help="make the picture of an evidence file again (paid again)")
    mode.add_argument("--recover", metavar="EVIDENCE", help="finish a paid picture without paying")
    mode.add_argument("--check", action="store_true", help="one free query: does host, key and permission work?")
    mode.add_argument("--schema", metavar="WHAT", help="print a JSON Schema: request, response or evidence")

    request = parser.add_argument_group("request (wins over the request's own fields)")
    request.add_argument("--size", metavar="W*H", help="pixels, such as 1280x720; 512*512 to 2048*2048 in total")
    request.add_argument("--aspect-ratio", metavar="R", help=f"one of {' '.join(RATIO_SIZES)}")
    request.add_argument("--seed", metavar="N", help=f"0 to {MAX_SEED}; -1 or left out: one is picked and recorded")
    request.add_argument(
        "--prompt-extend",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="let the service rewrite the prompt: slower, about twice the price",
    )
    request.add_argument("--base-url", metavar="URL", help="whole endpoint, API root or bare host")

    service = parser.add_argument_group("service")
    add_service_options(service, provider)
    service.add_argument("--timeout", metavar="S", help=f"seconds for the whole command (default {DEFAULT_TIMEOUT:g})")
    service.add_argument(
        "--max-retries", metavar="N", help=f"of calls surely not billed (default {DEFAULT_MAX_RETRIES})"
    )

    result = parser.add_argument_group("result")
    result.add_argument("--output", metavar="PATH", help="file to save: .png, .jpg or .webp")
    result.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    result.add_argument("--print-response", action="store_true", help="print the response as JSON instead of the path")
    result.add_argument(
        "--dry-run", action="store_true", help="print the whole plan and its cost; send and write nothing"
    )
    result.add_argument("--quiet", action="store_true", help="no warnings and no evidence path on stderr")
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    return parser


def add_service_options(group: Any, provider: type[Provider] | None) -> None:
    """The options that say which service is asked, the same for one picture and for many."""
    group.add_argument(
        "--provider",
        metavar="NAME",
        help=f"one of {', '.join(provider_names())} (default {DEFAULT_PROVIDER}); with --help, its own options too",
    )
    regions = list((provider or PROVIDERS[DEFAULT_PROVIDER]).roots)
    default = f"{regions[0]} (default)" + "".join(f" or {region}" for region in regions[1:])
    one = "; a key belongs to one" if regions[1:] else ""
    group.add_argument("--region", metavar="REGION", help=default + one)
    group.add_argument(
        "--trust-host", metavar="HOST", action="append", help="send the key to this host too; repeatable"
    )
    for setting in provider.own_settings if provider else ():
        default = "" if setting.default is None else f" (default {setting.default})"
        group.add_argument(flag(setting.name), metavar=setting.metavar, help=f"{setting.help}{default}")


def provider_in(argv: Sequence[str]) -> type[Provider] | None:
    """The provider that arguments name, or that of a replayed evidence file, so that its own options are known.

    What is wrong with name or file is told later.
    """
    named = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in ("--provider", "--replay"):
        named.add_argument(option)
    with contextlib.suppress(argparse.ArgumentError, Failure, SystemExit, OSError, ValueError, RecursionError):
        said = named.parse_known_args(argv)[0]
        if said.provider is None and said.replay is not None and os.path.isfile(said.replay):
            with open(said.replay, "rb") as source:
                said.provider = at(json.loads(source.read(MAX_EVIDENCE_BYTES)), "provider")
        return None if said.provider is None else provider_class(str(said.provider))
    return None


def read_settings(provider: type[Provider], given: Mapping[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """The provider's own options that are given, as values."""
    settings = {}
    for setting in provider.own_settings:
        if setting.name in given:
            try:
                settings[setting.name] = setting.read(given[setting.name])
            except ValueError as error:
                text = f"{flag(setting.name)}: must be {error}, got {shown(given[setting.name])}"
                problems.append(Problem("usage", text))
    return settings


def chosen_mode(given: Mapping[str, Any], modes: Sequence[str], problems: Sequence[Problem]) -> str:
    """The one mode that is given.

    Raises:
        Failure: usage where it is none or several, with the problems found before.
    """
    named = [name for name in modes if name in given]
    if len(named) != 1:
        names = " ".join(flag(name) for name in named or modes)
        text = f"give only one of {names}" if named else f"give one of {names}"
        raise_problems([*problems, Problem("usage", text)])
    return named[0]


def read_options(argv: Sequence[str], env: Mapping[str, str]) -> Options:
    """Check the command line as a whole; what is wrong with it is raised now, or with what is wrong with the request.

    Raises:
        Failure: usage, naming every problem.
    """
    provider: type[Provider] | None = provider_in(argv)
    arguments, unknown = build_parser(provider).parse_known_args(argv)
    given = {
        name: value
        for name, value in vars(arguments).items()
        if value is not None and (value is not False or name == "prompt_extend")  # which can be switched off
    }
    problems = [Problem("usage", text) for text in unknown_sentences(unknown)]
    mode = chosen_mode(given, MODES, problems)
    allowed = ALLOWED.get(mode)
    if allowed is not None:
        allowed = allowed | ({setting.name for setting in provider.own_settings} if provider else set())
        strange = [name for name in given if name not in allowed and name not in MODES]
        problems += [Problem("usage", f"{flag(name)} does not go with {flag(mode)}") for name in strange]
    if mode == "schema" and arguments.schema not in SCHEMAS:
        problems.append(
            Problem("usage", f"--schema: must be one of {', '.join(SCHEMAS)}, got {shown(arguments.schema)}")
        )
    timeout, max_retries, region = DEFAULT_TIMEOUT, float(DEFAULT_MAX_RETRIES), None
    with noting(problems):
        timeout = number_option("--timeout", arguments.timeout, DEFAULT_TIMEOUT, TIMEOUT_RANGE)
    with noting(problems):
        max_retries = number_option("--max-retries", arguments.max_retries, DEFAULT_MAX_RETRIES, MAX_RETRIES_RANGE)
    settings = read_settings(provider, given, problems) if provider else {}
    with noting(problems):
        provider = None if arguments.provider is None else provider_class(arguments.provider)
    with noting(problems):
        region = region_option(arguments.region, provider or PROVIDERS[DEFAULT_PROVIDER])
    trusted, more = trusted_hosts(arguments.trust_host or [], env)
    problems += more
    if mode in ALLOWED:
        raise_problems(problems)
    return Options(
        mode=mode,
        source="" if mode == "check" else getattr(arguments, mode),
        overrides=request_overrides(given),
        base_url=arguments.base_url,
        region=region,
        provider=provider,
        settings=settings,
        output=arguments.output,
        overwrite=arguments.overwrite,
        dry_run=arguments.dry_run,
        timeout=timeout,
        max_retries=int(max_retries),
        trusted=trusted,
        problems=tuple(problems),
    )


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def unknown_sentences(unknown: Sequence[str]) -> list[str]:
    """Arguments that are not known. What may be an unknown option's value could be a key: it is not repeated."""
    sentences = []
    previous = ""
    for text in unknown:
        if text.startswith("-"):
            sentences.append(f"{outside_text(text.partition('=')[0], 60)}: unknown option")
        elif not previous.startswith("-") or "=" in previous:
            advice = "a prompt must be quoted; shells expand *, use x in sizes"
            sentences.append(f"{shown(text)}: stray argument ({advice})")
        previous = text
    return sentences


def number_option(name: str, text: str | None, default: float, bounds: tuple[float, float]) -> float:
    """The number that an option gives.

    Raises:
        Failure: usage.
    """
    if text is None:
        return default
    least, most = bounds
    form = r"[0-9]{1,9}(\.[0-9]{1,9})?" if isinstance(default, float) else "[0-9]{1,9}"
    if not re.fullmatch(form, text) or not least <= float(text) <= most:
        raise Failure("usage", f"{name}: must be a number from {least:g} to {most:g}, got {shown(text)}")
    return float(text)


def region_option(name: str | None, provider: type[Provider]) -> str | None:
    """The provider's own name for the region that --region gives.

    Raises:
        Failure: usage.
    """
    if name is None:
        return None
    region = provider.region_aliases.get(name.lower(), name.lower())
    if region not in provider.roots:
        known = ", ".join([*provider.roots, *provider.region_aliases])
        raise Failure("usage", f"--region: must be one of {known}, got {shown(name)}")
    return region


def request_overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """The request fields that flags set. A seed that is no number stays text: the schema refuses it."""
    overrides = {name: given[name] for name in REQUEST_FLAGS if name in given}
    seed = overrides.get("seed")
    if isinstance(seed, str) and re.fullmatch(r"-?[0-9]{1,18}", seed):
        overrides["seed"] = int(seed)
    return overrides


def run(options: Options, console: Console, env: Mapping[str, str]) -> None:
    """Do what the options say and print its answer."""
    if options.mode == "schema":
        console.answer(SCHEMAS[options.source])
        return
    clock = Clock(options.timeout)
    missing_packages()
    check_working_folder()
    if options.mode == "check":
        console.answer(check(options, clock, env))
        return
    if options.mode == "recover":
        response = recover(options, clock, env)
    else:
        plan = make_plan(options, clock, env)
        if options.dry_run:
            console.answer(dry_run(plan, options.trusted, env))
            return
        response = generate(plan, options, clock, console, env)
    console.warn(response.get("warnings", ()))
    told = console.data(response) if console.json_mode else console.path(response["image_path"])
    if not told:
        console.note(f"warning: standard output cannot be written; the image is {response['image_path']}")


def prepare_output(env: Mapping[str, str]) -> None:
    """Before anything is printed: both streams take every text, and no key of the environment gets into one."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    for name, value in env.items():
        if name.endswith("_API_KEY") and len(value.strip()) >= SHORTEST_SECRET:
            remember_secret(value.strip())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code of the contract."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    env = os.environ
    SIGNALS.install()
    prepare_output(env)
    json_flags = ("--print-response", "--check", "--dry-run", "--schema")
    console = Console(
        json_mode=any(text.partition("=")[0] in json_flags for text in arguments), quiet="--quiet" in arguments
    )
    try:
        run(read_options(arguments, env), console, env)
        return EXIT_OK
    except SystemExit:  # argparse has printed help or version
        console.flush()
        return EXIT_OK
    except Failure as error:
        failure = error
    except Interrupted as interruption:
        failure = Failure(
            "interrupted",
            f"interrupted by {signal.Signals(interruption.signum).name} before anything was sent",
            exit_code=EXIT_SIGNAL + interruption.signum,
        )
    except ImportError as error:
        failure = missing_package(outside_text(error.name or error, 100))
    except Exception as error:
        failure = internal_error(error)
    console.failure(failure)
    return failure.exit_code


def leave(exit_code: int) -> NoReturn:
    """End the process; at once where a thread still works at what nobody waits for any more."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)  # a late signal must not make a success look like an interruption
    if abandoned_work.is_set():
        os._exit(exit_code)  # both streams are flushed; the interpreter's end would wait for, or break, that work
    sys.exit(exit_code)


if __name__ == "__main__":
    leave(main())
