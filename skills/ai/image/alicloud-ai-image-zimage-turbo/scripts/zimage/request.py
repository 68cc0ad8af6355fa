"""Request: what the user asks for, validated and normalized."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import re
import secrets
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn, TypeVar, cast

from zimage.contract import (
    DEFAULT_SIZE,
    MAX_PIXELS,
    MAX_SEED,
    MIB,
    MIN_PIXELS,
    RATIO_FORM,
    RATIO_SIZES,
    REQUEST_SCHEMA,
    SIZE_FORM,
)
from zimage.errors import Failure, Problem, os_reason
from zimage.files import open_regular
from zimage.outside import json_kind, json_of, outside_text, shown, without_surrogates
from zimage.waiting import TICK, Late, Stop, needing_threads

if TYPE_CHECKING:
    from zimage.facts import Request


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

    def as_dict(self) -> Request:
        """The request as JSON; itself valid, and normalizing it changes nothing."""
        return cast("Request", {name: value for name, value in self._asdict().items() if value is not None})


@functools.lru_cache(1000)  # most rows of a long list ask for the same few
def parse_size(text: str) -> tuple[int, int]:
    """Width and height, in pixels, of a size that `size_sentences` finds no fault with."""
    width, height = cast("re.Match[str]", SIZE.fullmatch(RATIO_SIZES.get(ratio_in(text), text))).groups()
    return int(width), int(height)


@functools.lru_cache(1000)
def normal_size(text: str) -> str:
    return "{}*{}".format(*parse_size(text))


def ratio_in(text: str) -> str:
    """The ratio that a text gives, in lowest digits (`16 : 09` is 16:9); empty where it gives none."""
    found = RATIO.fullmatch(text)
    return "" if found is None else "{}:{}".format(*map(int, found.groups()))


def pick_seed() -> int:
    return secrets.randbelow(MAX_SEED + 1)


def seed_in(text: str) -> int | str:
    """The number that a text gives; one that gives none stays text: the schema refuses it."""
    return int(text) if re.fullmatch(r"-?[0-9]{1,300}", text) else text


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


PLAIN_CHECKS: dict[str, Callable[[Any], bool]] = {
    "prompt": lambda value: isinstance(value, str) and value.strip() != "",
    "size": lambda value: isinstance(value, str),
    "aspect_ratio": lambda value: isinstance(value, str) and value in RATIO_SIZES,
    "seed": lambda value: type(value) is int and -1 <= value <= MAX_SEED,
    "prompt_extend": lambda value: isinstance(value, bool),
    "base_url": lambda value: isinstance(value, str) and value != "",
}


def is_plainly_valid(raw: Any) -> bool:
    """Whether a request surely is valid, told without jsonschema, whose import is a fifth of a whole run.

    It may say no to a valid request, never yes to another: then the schema has the word, and names what is wrong.
    """
    if not isinstance(raw, dict) or "prompt" not in raw or ("size" in raw and "aspect_ratio" in raw):
        return False
    for name, value in raw.items():
        if name not in PLAIN_CHECKS or not PLAIN_CHECKS[name](value):
            return False
    return not rule_sentences(raw)


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
        return [f"{name}: must be from {rule['minimum']} to {rule['maximum']}, got {given}; without it one is picked"]
    if error.validator == "enum":
        where = (
            "; width*height goes into size"
            if isinstance(error.instance, str) and SIZE.fullmatch(error.instance)
            else ""
        )
        return [f"{name}: must be one of {' '.join(rule['enum'])}, got {given}{where}"]
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


SIZE, RATIO = re.compile(SIZE_FORM), re.compile(RATIO_FORM)


@functools.lru_cache(1000)
def size_sentences(size: str) -> tuple[str, ...]:
    """What is wrong with a size."""
    ratio = ratio_in(size)
    if not (ratio or SIZE.fullmatch(size)):
        return (f"size: must be width*height such as 1024*1024, got {shown(size)}; for a ratio take aspect_ratio",)
    if ratio and ratio not in RATIO_SIZES:
        return (f"size: {shown(size)} is none of the ratios {' '.join(RATIO_SIZES)}; else give width*height",)
    width, height = parse_size(size)
    if MIN_PIXELS <= width * height <= MAX_PIXELS:
        return ()
    ratio = f"{width}:{height}"
    return (
        f"size: {width}*{height} is {width * height} pixels; "
        f"the total must be from {MIN_PIXELS} (512*512) to {MAX_PIXELS} (2048*2048)"
        + (f"; for a ratio take aspect_ratio {ratio}" if ratio in RATIO_SIZES else ""),
    )


def normalize(raw: Mapping[str, Any], *, with_seed: bool = True) -> ImageRequest:
    """The normalized form of a request that has no problems; `with_seed`: one is picked where none is given."""
    ratio = raw.get("aspect_ratio")
    size = RATIO_SIZES[ratio] if ratio else normal_size(raw.get("size", DEFAULT_SIZE))
    seed = int(raw.get("seed", -1))
    return ImageRequest(
        prompt=raw["prompt"],
        size=size,
        seed=seed if seed != -1 else pick_seed() if with_seed else None,
        prompt_extend=raw.get("prompt_extend", False),
        base_url=raw.get("base_url"),
    )


def parse_json(text: str) -> Any:
    """Strict JSON: no repeated fields, no NaN.

    Raises:
        ValueError: with a sentence that says what is wrong and where.
    """
    try:
        if text.startswith("\ufeff"):
            raise json.JSONDecodeError("Unexpected UTF-8 BOM (decode using utf-8-sig)", text, 0)
        return json_of(text, _STRICT)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at line {error.lineno}, column {error.colno}") from None


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{shown(name)} stands in it twice")
            seen.add(name)
    return fields


def _bounded(digits: str) -> int:
    return int(digits[:300])  # out of every range all the same, and Python takes no longer ones


def _no_constants(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


_STRICT = json.JSONDecoder(object_pairs_hook=_no_repeats, parse_constant=_no_constants, parse_int=_bounded)


Piece = TypeVar("Piece")  # of what is read: its bytes, a line, a row


def read_input(option: str, name: str, limit: int, stop: Stop) -> bytes:
    """The bytes of the file that an option names; what does not arrive in time is an error.

    Raises:
        Failure: file_unreadable.
    """
    label = f"{option} {outside_text(name, 200)}".strip()
    (content,) = incoming(label, name, lambda source: iter([source.read(limit + 1)]), stop)
    if len(content) > limit:
        raise Failure("file_unreadable", f"{label}: is larger than {limit // MIB} MiB")
    return content


def incoming(
    label: str,
    name: str,
    read: Callable[[BinaryIO], Iterator[Piece]],
    stop: Stop,
    wait: float | None = None,
    *,
    hint: str | None = None,
) -> Iterator[Piece]:
    """The pieces that `read` makes of a file, `-` for standard input; a pipe may take `wait` seconds for each.

    Raises:
        Failure: file_unreadable, time_limit.
    """
    try:
        if name == "-":
            if sys.stdin is None or sys.stdin.isatty():
                raise Failure("file_unreadable", f"{label}: nothing is piped into standard input")
            # Not sys.stdin itself: a thread that still reads it would hang or crash the interpreter's end.
            pieces = _piped(sys.stdin.fileno(), read)
        elif stat.S_ISREG(os.stat(name).st_mode):
            with open_regular(name) as source:
                for piece in read(source):
                    stop.check()
                    if stop.left_s <= 0:
                        raise Late
                    yield piece
            return
        elif os.path.isdir(name):
            raise Failure("file_unreadable", f"{label}: is a folder")
        else:
            pieces = _piped(name, read)
        while (next_piece := _in_time(pieces, stop.part(wait) if wait else stop)) is not None:
            yield next_piece
    except Late:
        if wait and stop.left_s <= 0:
            raise Failure("time_limit", f"{label}: not at its end before the time limit") from None
        awaited, seconds = ("nothing more", wait) if wait else ("nothing complete", stop.timeout)
        text = f"{label}: cannot be read: {awaited} arrived within {seconds:g} s"
        raise Failure("file_unreadable", text, hint=hint) from None
    except (OSError, ValueError) as error:
        raise Failure("file_unreadable", f"{label}: cannot be read: {os_reason(error)}", hint=hint) from None


def _piped(source: str | int, read: Callable[[BinaryIO], Iterator[Piece]]) -> queue.Queue[Piece | Exception | None]:
    """Read a descriptor, or the file of that name, in a thread: one that nobody writes to must not hang the command."""
    pieces: queue.Queue[Piece | Exception | None] = queue.Queue(maxsize=1000)

    def work() -> None:
        try:
            with open(source, "rb", closefd=isinstance(source, str)) as stream:
                for piece in read(stream):
                    pieces.put(piece)
            pieces.put(None)
        except Exception as error:
            pieces.put(error)

    with needing_threads():
        threading.Thread(target=work, daemon=True).start()
    return pieces


def _in_time(pieces: queue.Queue[Piece | Exception | None], stop: Stop) -> Piece | None:
    """The next piece, None at the end. Raises Late, Stopped, and what reading raised."""
    while True:
        with contextlib.suppress(queue.Empty):
            piece = pieces.get(timeout=max(0.0, min(TICK, stop.left_s)))
            if isinstance(piece, Exception):
                raise piece
            return piece
        stop.check()
        if stop.left_s <= 0:
            raise Late


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
