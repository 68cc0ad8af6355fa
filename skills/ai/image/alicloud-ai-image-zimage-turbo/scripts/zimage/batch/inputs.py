"""Inputs: the kinds of file that rows come in, and what stands in them, row by row."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

from zimage.batch.contract import MAX_JSON_BYTES, MAX_LINE_BYTES, ROW_SCHEMA
from zimage.batch.tables import Rows, csv_rows, table_rows
from zimage.batch.workbook import SIGNATURE, Cells, sheet_rows
from zimage.contract import MIB
from zimage.errors import Failure
from zimage.outside import outside_text, shown
from zimage.request import incoming, parse_json
from zimage.waiting import Stop

OLD_WORKBOOK = b"\xd0\xcf\x11\xe0"  # of Excel before 2007, and of any workbook with a password
LIST_MARK = re.compile(r"(?:[-*+•‣◦·–—]|\(?[0-9]{1,4}[.)]|[0-9]{1,4}、)\s*(?<=[\s、])\S")


class Reading:
    """What is learnt of an input while it is read."""

    def __init__(self) -> None:
        self.unit = "line"  # what its rows are counted in
        self.remarks: list[str] = []  # warnings


class NotText(ValueError):
    """A line that is not in UTF-8."""


def raw_rows(name: str, stop: Stop, wait: float, reading: Reading, sheet: str | None = None) -> Rows:
    """The rows of a file, by its extension and its first bytes; `-` is JSON lines on standard input.

    `sheet` is that of a workbook. The rest: see `incoming`.

    Raises:
        Failure: file_unreadable, missing_package, time_limit; usage for another extension or sheet.
    """
    kind = ".jsonl" if name == "-" else os.path.splitext(name)[1].lower()
    if kind not in READERS:
        raise Failure("usage", f"--input: must end in one of {', '.join(READERS)} or be -, got {shown(name)}")
    label = "--input" if name == "-" else f"--input {outside_text(name, 200)}"
    hint = f"give the path of a readable {', '.join(READERS)} file, or - for JSON lines on standard input"
    pieces = incoming(label, name, lambda source: pieces_of(source, sheet, reading.remarks), stop, wait, hint=hint)
    first = next(pieces, "")
    is_workbook = isinstance(first, tuple)
    if sheet is not None and not is_workbook:
        raise Failure("usage", "--sheet: goes with a workbook, .xlsx")
    if is_workbook:
        kind = ".xlsx"
    elif kind == ".xlsx":
        raise Failure("file_unreadable", f"{label}: is no workbook but text; name it after its kind", hint=hint)
    return READERS[kind](itertools.chain([first], pieces), reading)


def pieces_of(source: BinaryIO, sheet: str | None, remarks: list[str]) -> Iterator[str | Cells]:
    """The lines of a text, or the rows of a workbook, whatever the file is called.

    Bytes that are no text become lone surrogates (`checked`).

    Raises:
        ValueError, Failure: file_unreadable.
    """
    head = cast(io.BufferedReader, source).peek(4)[:4]
    if head == SIGNATURE:
        yield from sheet_rows(source, sheet, remarks)
        return
    if head == OLD_WORKBOOK:
        what = "is a workbook of an old Excel (.xls), or one with a password"
        raise Failure(
            "file_unreadable", f"--input: {what}", hint="save it as .xlsx without a password, or as CSV UTF-8"
        )
    encoding = json.detect_encoding(head)  # by its mark, or by where zeros stand
    encoding = "utf-8-sig" if encoding == "utf-8" else encoding
    with io.TextIOWrapper(source, encoding, errors="surrogateescape", newline="") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE_BYTES + 1), ""), 1):
            if 4 * len(line) > MAX_LINE_BYTES and len(line.encode("utf-8", "surrogateescape")) > MAX_LINE_BYTES:
                raise ValueError(f"line {number} is longer than {MAX_LINE_BYTES // MIB} MiB")
            yield line


def checked(line: str) -> str:
    """A line that is text.

    Raises:
        NotText: with the encoding that it seems to be in.
    """
    if not line.isascii():
        try:
            line.encode()
        except UnicodeEncodeError:
            raise NotText(f"is not text in UTF-8{guess(line)}: save the file in UTF-8 (Excel: CSV UTF-8)") from None
    return line


def guess(line: str) -> str:
    """What a line would be in the encoding that spreadsheets of other countries write."""
    content = line.encode("utf-8", "surrogateescape").strip()
    for name, codec in (
        ("GBK", "gb2312"),
        ("Windows-1252", "cp1252"),
    ):  # the first takes few texts that are not its own
        try:
            return f"; in {name} it would be {shown(content.decode(codec))}"
        except ValueError:
            continue
    return ""


def peeked(lines: Iterator[str]) -> tuple[str, Iterator[str]]:
    """The first line that is not blank, and all lines."""
    for blank, line in enumerate(lines):
        if line.strip():
            return line, itertools.chain(itertools.repeat("\n", blank), [line], lines)
    return "", iter(())


def json_lines(lines: Iterator[str], reading: Reading) -> Rows:
    """An object a line. An array, on one line or many, is what a .json file holds."""
    first, lines = peeked(lines)
    if first.lstrip().startswith("["):
        yield from json_values(lines, reading)
        return
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text:
            continue
        try:
            yield number, parse_json(checked(text))
        except NotText as error:
            yield number, error
        except ValueError as error:
            yield number, ValueError(f"is not valid JSON: {error}")


def json_values(lines: Iterator[str], reading: Reading) -> Rows:
    """An array of rows, or one below `rows`; a text is a prompt. Objects one a line are JSON lines."""
    first, lines = peeked(lines)
    if is_object(first) and '"rows"' not in first:
        yield from json_lines(lines, reading)
        return
    if not first:
        return
    reading.unit = "row"
    text, size = [], 0
    for line in lines:
        text.append(line)
        size += len(line)
        if size > MAX_JSON_BYTES:
            hint = "write it as .jsonl, an object a line: that may be of any size"
            raise Failure("file_unreadable", f"--input: is JSON of more than {MAX_JSON_BYTES // MIB} MiB", hint=hint)
    try:
        value = parse_json(checked("".join(text)))
    except NotText as error:
        yield 1, error
        return
    except ValueError as error:
        yield 1, ValueError(f"the file is not valid JSON: {error}")
        return
    if isinstance(value, dict):
        value = value["rows"] if list(value) == ["rows"] and isinstance(value["rows"], list) else [value]
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        yield number, {"prompt": row} if isinstance(row, str) else row


def is_object(text: str) -> bool:
    """Whether a text is a JSON object."""
    text = text.strip()
    if not (text.startswith("{") and text.endswith("}")):
        return False
    try:
        return isinstance(parse_json(text), dict)
    except ValueError:
        return False


def is_json(line: str) -> bool:
    """Whether a file that begins with this line is JSON."""
    return is_object(line) or re.match(r'(\[\s*\{?|\{)\Z|\[\s*["{]|\{\s*"[^"]*"\s*:', line.strip()) is not None


def is_header(line: str) -> bool:
    """Whether a line names columns of a table, and nothing else."""
    names = [name.strip().strip('"').lower() for name in re.split("[,;\t]", line.strip())]
    return "prompt" in names and all(name in ROW_SCHEMA["properties"] or not name for name in names)


def prompts(lines: Iterator[str], reading: Reading) -> Rows:
    r"""A prompt a line. One that begins with # is a comment, and \# is a # that the prompt begins with."""
    comments, marked, example = 0, 0, ""
    first, lines = peeked(lines)
    if other := ".jsonl or .json" if is_json(first) else ".csv" if is_header(first) else "":
        yield 1, ValueError(f"is no prompt: the file seems to be {other}; give it that ending")
        return
    for number, line in enumerate(lines, 1):
        try:
            text = checked(line).strip()
        except NotText as error:
            yield number, error
            continue
        if not text:
            continue
        if is_object(text):
            yield number, ValueError("is no prompt but a JSON object: write them into a .jsonl file")
            continue
        if text.startswith("#"):
            comments += 1
            continue
        if LIST_MARK.match(text):
            marked += 1
            example = example or f"line {number}: {shown(text)}"
        yield number, {"prompt": text[1:] if text.startswith("\\#") else text}
    if comments:
        reading.remarks.append(
            f"{comments} line(s) that begin with # are left out as comments; \\# begins a prompt with #"
        )
    if marked:
        reading.remarks.append(f"{marked} prompt(s) begin with the mark of a list, which is sent with them ({example})")


def table(lines: Iterator[str], _: Reading) -> Rows:
    """CSV, told from JSON under a wrong name."""
    first, lines = peeked(lines)
    if is_json(first):
        return iter([(1, ValueError("is no header: the file seems to be .jsonl or .json; give it that ending"))])
    return csv_rows(map(checked, lines))


def workbook(rows: Iterator[Cells], reading: Reading) -> Rows:
    reading.unit = "row"
    return table_rows(enumerate(rows, 1))


READERS: dict[str, Callable[[Iterator[Any], Reading], Rows]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_values,
    ".csv": table,
    ".tsv": table,
    ".txt": prompts,
    ".xlsx": workbook,
}
