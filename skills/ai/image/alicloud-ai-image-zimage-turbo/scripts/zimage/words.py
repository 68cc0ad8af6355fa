"""Words: what an answer says, whoever wrote it and in whatever form."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from zimage.outside import at, json_of
from zimage.page import first_words

if TYPE_CHECKING:
    from zimage.calls import HttpAnswer

Form = Literal["json", "html", "xml", "text", "none"]

# Fields, folded, in the order in which they are read; what stands in several is told once.
CODE_FIELDS = ("code", "errorcode", "errcode")
ERROR_FIELDS = ("error", "errors", "detail", "details")  # sentences, or objects that hold the others
WORD_FIELDS = ("message", "msg", "errormessage", "errormsg", *ERROR_FIELDS, "reason")
AROUND_ERRORS = ("output", "data")  # where the words of a task stand
EMPTY_WORDS = ("success", "ok", "null", "none")
MOST_ITEMS = 5  # of a list of faults
DEEPEST = 4
LONGEST_READ = 64 * 1024  # characters of a page or a text
# What other services have wrapped: `<400> InternalError.Algo.NAME: …`, `litellm.NAME: …`, `{'code': 'NAME', …`.
NAMED_IN_WORDS = re.compile(
    r"<[1-5][0-9]{2}>\s{0,3}([A-Za-z]+(?:\.[A-Za-z]+)*)\s{0,3}:"
    r"|\b(litellm\.[A-Za-z]+):"
    r"""|["']code["']:\s{0,3}["']([A-Za-z][\w.-]{2,100})["']"""
)
A_STATUS = re.compile("[1-5][0-9]{2}")
A_NAME = re.compile(r"[A-Za-z][\w.-]{2,100}")


class Said(NamedTuple):
    """What an answer says: raw, to be made safe before it is kept or shown.

    `code` is the service's name for what is wrong, `names` are all such names, the most telling first.
    """

    form: Form
    message: str = ""
    code: str = ""
    names: tuple[str, ...] = ()


def said_in(answer: HttpAnswer, body: dict[str, Any] | None) -> Said:
    """The words of an answer. `body` is the JSON object in it, None where there is none."""
    if body is not None:
        return _said_in_json(body)
    text = answer.body[: 4 * LONGEST_READ].decode("utf-8-sig", "replace")[:LONGEST_READ].strip()
    if not text or text.count("\ufffd") > len(text) / 10 or "\0" in text:
        return Said("none")
    start = text[:1000].lower()
    if "<html" in start or start.startswith("<!doctype html"):
        return Said("html", first_words(answer.body) or "a page with nothing to read")
    if text.startswith(("<?xml", "<Error")):
        return _said_in_xml(text)
    if text[0] in '"[':
        try:
            value = json_of(text)
        except ValueError:
            value = text
        words = next((item for item in value if isinstance(item, dict)), value) if isinstance(value, list) else value
        if isinstance(words, dict):
            return _said_in_json(words)
        text = _words_in(words) or text
    return Said("text", text, names=_names_in_words(text))


def _said_in_json(body: dict[str, Any]) -> Said:
    message = _words_in(body)
    codes, types = list(_codes_in(body)), list(_types_in(body))
    inner = _names_in_words(message)
    code = next(iter([*codes, *inner, *types]), "")
    return Said("json", message or _spoken_in(body), code, tuple(dict.fromkeys([*inner, *codes, *types])))


def _fields(value: Any) -> dict[str, Any]:
    """The fields of an object, or of the first one in a list, by their folded names."""
    if isinstance(value, list):
        value = next((item for item in value if isinstance(item, dict)), None)
    items = value.items() if isinstance(value, dict) else ()
    return {re.sub("[_-]", "", str(name)).lower(): item for name, item in items}


def _words_in(value: Any, depth: int = DEEPEST) -> str:
    """The sentences of an error, in whatever fields and lists they stand."""
    if isinstance(value, str):
        return value.strip() if value.strip().lower() not in EMPTY_WORDS else ""
    if isinstance(value, list) and depth:
        return "; ".join(filter(None, (_words_in(item, depth - 1) for item in value[:MOST_ITEMS])))
    if not isinstance(value, dict) or not depth:
        return ""
    fields = _fields(value)
    found = dict.fromkeys(filter(None, (_words_in(fields.get(name), depth - 1) for name in WORD_FIELDS)))
    if not found and depth == DEEPEST:
        inner = [fields[name] for name in AROUND_ERRORS if isinstance(fields.get(name), dict)]
        found = dict.fromkeys(filter(None, (_words_in(item, depth - 1) for item in inner)))
    sentences = [text for text in found if not A_NAME.fullmatch(text)] or list(found)
    place = fields.get("loc")  # of FastAPI: which field of the request is meant
    where = ".".join(map(str, place[:8])) + ": " if sentences and isinstance(place, list) else ""
    return where + ": ".join(sentences)


def _codes_in(value: Any, depth: int = DEEPEST) -> Iterator[str]:
    """The names that stand as a code. A number is none: it repeats a status."""
    fields = _fields(value)
    said = [fields.get(name) for name in CODE_FIELDS]
    yield from (
        code.strip() for code in said if isinstance(code, str) and code.strip() and not A_STATUS.fullmatch(code)
    )
    for name in (*ERROR_FIELDS, *AROUND_ERRORS):
        if name in fields and depth:
            yield from _codes_in(fields[name], depth - 1)


def _types_in(body: dict[str, Any]) -> Iterator[str]:
    """The names that stand as the type of an error, or in the place of its words."""
    fields = _fields(body)
    for error in [fields, *(_fields(fields.get(name)) for name in ERROR_FIELDS)]:
        if any(name in error for name in WORD_FIELDS):
            said = (error.get("type"), error.get("error"))
            yield from (name for name in said if isinstance(name, str) and A_NAME.fullmatch(name))


def _names_in_words(text: str) -> tuple[str, ...]:
    """The names that words hold, the innermost first: they come last."""
    return tuple("".join(found) for found in reversed(NAMED_IN_WORDS.findall(text[:LONGEST_READ])))


def _spoken_in(body: dict[str, Any]) -> str:
    """What a model says where a picture was to come."""
    for choices in (at(body, "output", "choices"), at(body, "choices")):
        content = at(choices, 0, "message", "content")
        items = content if isinstance(content, list) else [content]
        texts = [at(item, "text") if isinstance(item, dict) else item for item in items[:MOST_ITEMS]]
        if spoken := "; ".join(text.strip() for text in texts if isinstance(text, str) and text.strip()):
            return spoken
    spoken = at(body, "output", "text") or at(body, "text")
    return spoken.strip() if isinstance(spoken, str) else ""


def _said_in_xml(text: str) -> Said:
    """An error of the vendor's file storage, and of others who write it so."""
    code, message = (
        (found[1].strip() if (found := re.search(f"<{name}>([^<]*)</{name}>", text)) else "")
        for name in ("Code", "Message")
    )
    return Said("xml", _plain(message or text), code)


def _plain(text: str) -> str:
    import html  # it loads all entities that there are

    return " ".join(html.unescape(re.sub("<[^<>]*>", " ", text)).split())
