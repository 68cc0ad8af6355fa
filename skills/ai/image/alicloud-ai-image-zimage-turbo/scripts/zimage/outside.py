"""Outside: text and values that others wrote, made safe to keep and to show; what must never be shown."""

from __future__ import annotations

import base64
import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, quote_plus, unquote

from zimage.contract import MAX_JSON_DEPTH, MAX_JSON_VALUES, OUTSIDE_TEXT

# What must never be printed or written: each secret in every form that it may come back in. Filled where keys are read.
_secrets: set[str] = set()
# As html.escape, whose module loads all entities that there are at every start.
_AS_HTML = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#x27;"})
SHORTEST_SECRET = 6  # characters
LONGEST_WORDS = 20  # characters; what is longer may be a pass phrase
# Given where a server wants no key: `none`, `EMPTY`, `lm-studio`, `sk-no-key-required`. Masking words garbles texts.
_WORD = "(?:[a-z]{1,12}|[A-Z]{1,12}|[A-Z][a-z]{1,11})"
_WORDS = re.compile(rf"{_WORD}(?:[-_. ]{_WORD}){{0,4}}|[0-9]{{1,9}}")
_KEY_LIKE = re.compile(r"\bsk-[A-Za-z0-9_\-]{6,}")
_USER_INFO = re.compile(r"(?<=://)[^/\s@]+@")  # of a URL: a proxy's user and password
# What a terminal obeys: controls, line ends, and what turns the direction of writing.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]+")
LONGEST_LINE = 20_000  # characters that a terminal is told at once: a command with three paths


def is_secret(value: str) -> bool:
    """Whether a value that stands in the place of a key can be one: not a short one, plain words, or dashes."""
    is_word = len(value) <= LONGEST_WORDS and _WORDS.fullmatch(value) is not None
    return len(value) >= SHORTEST_SECRET and len(set(value)) > 3 and not is_word


def remember_secret(value: str) -> None:
    """Have this value masked, in whatever form it comes back, in every text from outside and every message."""
    if is_secret(value):
        _secrets.update(form.lower() for form in forms_of(value))


def remember_environment(env: Mapping[str, str]) -> None:
    """Have what environment variables hold masked: keys, and what proxies are logged in with."""
    for name, value in env.items():
        if name.endswith(("_API_KEY", "_TOKEN", "_SECRET", "_PASSWORD")):
            remember_secret(value.strip())
        elif name.lower().endswith("_proxy"):
            login = value.rpartition("://")[2].partition("/")[0].rpartition("@")[0]
            for part in (login, *login.split(":")):
                remember_secret(part)
                remember_secret(unquote(part))


def forms_of(value: str) -> set[str]:
    """A secret as it may stand in a URL, in JSON, in HTML, and in Base64 (of HTTP's basic authentication, too).

    A variable of the environment need not be text: what is none arrives as lone surrogates.
    """
    quotes = (quote(value, safe="/", errors="surrogatepass"), quote(value, safe="", errors="surrogatepass"))
    forms = {value, *quotes, quote_plus(value, errors="surrogatepass"), value.translate(_AS_HTML)}
    forms |= {json.dumps(value)[1:-1], json.dumps(value)[1:-1].replace("/", "\\/"), repr(value)[1:-1]}
    forms.add("".join(f"\\u{ord(sign):04x}" for sign in value))
    content = value.encode("utf-8", "replace")
    for before in range(3):  # bytes that stand before it in a group of three: the signs that it decides alone
        coded = base64.b64encode(bytes(before) + content)[(8 * before + 5) // 6 : 8 * (before + len(content)) // 6]
        forms |= {coded.decode(), coded.translate(bytes.maketrans(b"+/", b"-_")).decode()}
    return forms


def mask_known(text: str) -> str:
    """The text with every known key replaced."""
    folded = text.lower()
    found = [secret for secret in _secrets if secret in folded]
    if not found:
        return text
    alternatives = "|".join(map(re.escape, sorted(found, key=len, reverse=True)))
    return re.sub(alternatives, "***", text, flags=re.IGNORECASE)


def mask(text: str) -> str:
    """The text with every known key, and everything that looks like one, replaced."""
    text = _USER_INFO.sub("***@", mask_known(text))
    return _KEY_LIKE.sub(lambda found: "sk-***" if re.search("[0-9]", found[0]) else found[0], text)


def told_line(text: str) -> str:
    """A line for a terminal: without a known key, bounded, and what a terminal would obey as escapes.

    Paths, links and commands stay as they are otherwise.
    """
    text = mask_known(text)
    text = text if len(text) <= LONGEST_LINE else text[: LONGEST_LINE - 1] + "…"
    text = CONTROL.sub(lambda signs: signs[0].encode("unicode_escape").decode(), text)
    return text.encode("utf-8", "backslashreplace").decode()


def outside_text(value: object, limit: int = OUTSIDE_TEXT) -> str:
    """A text from a service, made safe to show: one line, no key, no control characters, at most `limit` long."""
    text = value if isinstance(value, str) else "" if value is None else str(value)
    text = CONTROL.sub(" ", without_surrogates(mask(text))).strip()
    return text if len(text) <= limit else text[: limit - 1] + "…"


def without_surrogates(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def argument_text(text: str) -> str:
    """A text of the command line, which may be in UTF-8 though Python was told to read it in a lesser encoding."""
    return text if text == without_surrogates(text) else os.fsencode(text).decode("utf-8", "surrogateescape")


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


_PLAIN = json.JSONDecoder()


def json_of(text: str, decoder: json.JSONDecoder = _PLAIN) -> Any:
    """The value of JSON that somebody else wrote: bounded in memory and depth, whatever it is.

    Raises:
        ValueError: with a sentence.
    """
    if sum(map(text.count, ",[{")) > MAX_JSON_VALUES and _has_too_many_values(text):
        raise ValueError(f"it holds more than {MAX_JSON_VALUES} values")
    try:
        value = decoder.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if text.count("[") + text.count("{") > MAX_JSON_DEPTH:
        level = [value]
        for _ in range(MAX_JSON_DEPTH):
            lists = [
                item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list))
            ]
            level = [item for items in lists for item in items]
        if level:
            raise ValueError("it is nested too deeply")
    return value


def _has_too_many_values(text: str) -> bool:
    """Whether JSON holds too many values, told before any is made, and without those signs that stand in a text."""
    plain = text.replace("\\\\", "").replace('\\"', "")
    if plain.count('"') > 4 * MAX_JSON_VALUES:
        return True
    outside_texts = plain.split('"')[::2]
    return sum(part.count(sign) for part in outside_texts for sign in ",[{") > MAX_JSON_VALUES


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
