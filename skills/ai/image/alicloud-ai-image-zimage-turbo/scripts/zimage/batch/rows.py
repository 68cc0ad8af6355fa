"""Rows: what the user asks for, a line at a time."""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from zimage.batch.contract import INPUTS, MAX_ID_LENGTH, MAX_LINE_BYTES, ROW_SCHEMA
from zimage.contract import MIB
from zimage.errors import Failure
from zimage.outside import json_kind, outside_text, shown, without_surrogates
from zimage.request import ImageRequest, incoming, is_plainly_valid, normalize, parse_json, request_problems, seed_in
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


def lines_of(source: BinaryIO) -> Iterator[bytes]:
    """The lines of an input. Raises ValueError for one that is too long."""
    for number, line in enumerate(iter(lambda: source.readline(MAX_LINE_BYTES + 1), b""), 1):
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"line {number} is longer than {MAX_LINE_BYTES // MIB} MiB")
        yield line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def read_rows(name: str, wait: float, stop: Stop) -> Iterator[Row | WrongRow]:
    """The rows of an input file, by its extension; `-` is JSON lines on standard input. The rest: see `incoming`.

    Raises:
        Failure: file_unreadable, time_limit; usage for another extension.
    """
    kind = ".jsonl" if name == "-" else os.path.splitext(name)[1].lower()
    if kind not in INPUTS:
        raise Failure("usage", f"--input: must end in one of {', '.join(INPUTS)} or be -, got {shown(name)}")
    label = "--input" if name == "-" else f"--input {outside_text(name, 200)}"
    hint = f"give the path of a readable {', '.join(INPUTS)} file, or - for JSON lines on standard input"
    lines = incoming(label, name, lines_of, stop, wait, hint=hint)
    reading: dict[str, Callable[[str], Any]] = {".jsonl": parse_json, ".txt": lambda text: {"prompt": text}}
    rows = line_rows(lines, reading[kind]) if kind in reading else csv_rows(lines)
    return (checked_row(line, raw) for line, raw in rows)


def line_rows(lines: Iterable[bytes], read: Callable[[str], Any]) -> Iterator[tuple[int, Any]]:
    """A row a line; what is wrong with a line stands in place of its object, as an exception."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, read(line.decode().strip())
        except UnicodeDecodeError:
            yield number, ValueError("is not text in UTF-8")
        except ValueError as error:
            yield number, ValueError(f"is not valid JSON: {error}")


def csv_rows(lines: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    """Named columns under a header; an empty cell is a field not given. The separator may also be ; or a tab."""
    csv.field_size_limit(MAX_LINE_BYTES)
    texts = (line.decode() for line in lines)
    blank, start = 0, 1
    try:
        header = ""
        for header in texts:
            if header.strip():
                break
            blank += 1
        separator = max(",;\t", key=header.count)
        names = [name.strip().lower() for name in next(csv.reader([header], delimiter=separator, strict=True), [])]
        if faults := header_faults(names):
            yield blank + 1, ValueError(f"the header: {'; '.join(faults)}")
            return
        start = blank + 2
        reader = csv.reader(texts, delimiter=separator, strict=True)
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield start, csv_object(names, cells)
            start = blank + reader.line_num + 2
    except UnicodeDecodeError:
        yield start, ValueError("is not text in UTF-8: save the file as CSV in UTF-8")
    except csv.Error as error:
        yield start, ValueError(f"is not valid CSV: {error}")


NAMES_A_HOST = "base_url: leave it out, rows do not say where they go; tell the user that the file names a host"


OWN_COLUMNS = "to make prompts of columns of your own, write rows into a new file: references/batch.md shows how"


def header_faults(names: Sequence[str]) -> list[str]:
    """What is wrong with the column names of a CSV file."""
    known = ROW_SCHEMA["properties"]
    own = [shown(name) for name in names if name not in {*known, "base_url"}]
    faults = [f"{', '.join(own[:5])}: unknown; known are {', '.join(known)}; {OWN_COLUMNS}"] if own else []
    faults += [NAMES_A_HOST] * ("base_url" in names)
    faults += [f"{name}: stands in it twice" for name, count in Counter(names).items() if count > 1 and name in known]
    return faults + ([] if "prompt" in names else ["prompt: required"])


def csv_object(names: Sequence[str], cells: Sequence[str]) -> Any:
    """The row that the cells of a line mean, typed as in JSON."""
    if len(cells) > len(names):
        return ValueError(f"has {len(cells)} cells, the header names {len(names)}; a prompt with commas needs quotes")
    row: dict[str, Any] = {name: cell for name, cell in zip(names, cells, strict=False) if cell.strip()}
    for name in row.keys() - {"prompt"}:
        row[name] = row[name].strip()
    if "seed" in row:
        row["seed"] = seed_in(row["seed"])
    said = row.get("prompt_extend", "").lower()
    if said in ("true", "yes", "1"):
        row["prompt_extend"] = True
    elif said in ("false", "no", "0"):
        row["prompt_extend"] = False
    return row


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
