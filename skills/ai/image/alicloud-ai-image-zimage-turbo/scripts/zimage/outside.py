"""Outside: text and values that others wrote, made safe to keep and to show; what must never be shown."""

from __future__ import annotations

import json
import math
import re
from typing import Any
from urllib.parse import quote

from zimage.contract import OUTSIDE_TEXT

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
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


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


def shown(value: Any) -> str:
    """A value as JSON, short enough for one line of an error."""
    return outside_text(json.dumps(value, ensure_ascii=False, default=str), 60)


def json_kind(value: Any) -> str:
    """The JSON name of a Python value's type."""
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number"}
    return kinds.get(type(value), "null")


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
