"""Rows: what the user asks for, a line at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from zimage.batch.contract import MAX_ID_LENGTH, NAMES_A_HOST, ROW_SCHEMA
from zimage.batch.inputs import Reading, raw_rows
from zimage.outside import json_kind, outside_text, shown, without_surrogates
from zimage.request import ImageRequest, is_plainly_valid, normalize, request_problems
from zimage.waiting import Stop


class Row(NamedTuple):
    """One valid row. Its request has no seed where it names none: one is picked when the row is first planned."""

    line: int
    id: str | None
    output: str | None
    request: ImageRequest
    fingerprint: str


class WrongRow(NamedTuple):
    line: int
    sentences: list[str]


def read_rows(
    name: str, wait: float, stop: Stop, reading: Reading, sheet: str | None = None
) -> Iterator[Row | WrongRow]:
    """The rows of an input file. The rest, and what is raised: see `raw_rows`."""
    return (checked_row(line, raw) for line, raw in raw_rows(name, stop, wait, reading, sheet))


def checked_row(line: int, raw: Any) -> Row | WrongRow:
    """A row as written, validated and normalized."""
    if isinstance(raw, Exception):
        return WrongRow(line, [outside_text(raw)])
    if not isinstance(raw, dict):
        return WrongRow(line, [f"must be a JSON object, got {json_kind(raw)}"])
    if type(raw.get("id")) is int:
        raw["id"] = str(raw["id"])
    request = raw.copy()
    own = {name: request.pop(name) for name in ("id", "output") if name in request}
    if sentences := row_sentences(raw, own, request):
        return WrongRow(line, sentences)
    written = _SORTED.encode(raw)
    fingerprint = hashlib.sha256(written.encode()).hexdigest()[:32]
    return Row(line, own.get("id"), own.get("output"), normalize(request, with_seed=False), fingerprint)


_SORTED = json.JSONEncoder(sort_keys=True, ensure_ascii=False)


def row_sentences(raw: dict[str, Any], own: dict[str, Any], request: dict[str, Any]) -> list[str]:
    """What is wrong with a row; `own` is what only rows have, `request` the rest of it."""
    if "base_url" in raw:
        rest = {name: value for name, value in raw.items() if name != "base_url"}
        named = f"{NAMES_A_HOST} ({shown(raw['base_url'])})"
        return [named, *row_sentences(rest, own, {name: rest[name] for name in rest if name not in own})]
    if not is_plainly_valid(request) or not all(map(is_whole_text, own.values())):
        broken = [f"{name}: holds a lone surrogate, which is not text" for name in own if not is_unbroken(own[name])]
        if sentences := broken or [problem.text for problem in request_problems(raw, ROW_SCHEMA)]:
            return sentences
    name = own.get("id")
    if name is None:
        return []
    if len(name) > MAX_ID_LENGTH:
        return [f"id: longer than {MAX_ID_LENGTH} characters"]
    if name != outside_text(name, MAX_ID_LENGTH):
        return ["id: has control characters, blanks around it, or what looks like a key in it"]
    return []


def is_whole_text(value: object) -> bool:
    return isinstance(value, str) and value.strip() != "" and is_unbroken(value)


def is_unbroken(value: object) -> bool:
    return not isinstance(value, str) or value == without_surrogates(value)
