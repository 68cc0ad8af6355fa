"""Tables: rows under a header of column names, as CSV files and workbooks have them, and the habits of spreadsheets."""

from __future__ import annotations

import csv
import itertools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from zimage.batch.contract import MAX_LINE_BYTES, NAMES_A_HOST, OWN_COLUMNS, ROW_SCHEMA
from zimage.outside import shown
from zimage.request import ratio_in, seed_in

Rows = Iterator[tuple[int, Any]]  # where a row stands, from 1, and its object; what is wrong with it, as an exception

SEPARATOR_LINE = re.compile(r'"?sep=(.)"?[\r\n]*', re.IGNORECASE)  # of Excel: it is told so, and takes it away again
YES = {
    "true",
    "yes",
    "1",
    "wahr",
    "ja",
    "vrai",
    "oui",
    "verdadero",
    "sí",
    "是",
    "真",
}  # Excel writes the user's language
NO = {"false", "no", "0", "falsch", "nein", "faux", "non", "falso", "否", "假"}
ERRORS = {"#null!", "#div/0!", "#value!", "#ref!", "#name?", "#num!", "#n/a", "#nv", "#wert!", "#bezug!", "#spill!"}
WHOLE_NUMBER = re.compile(r"(-?[0-9]{1,300})[.,]0+")  # 1024.0
ROUNDED_NUMBER = re.compile(r"([0-9]{1,10})(?:[.,]([0-9]+))?e\+?([0-9]{1,2})", re.IGNORECASE)  # 1E+05, 1.23457E+09
MIDNIGHT = re.compile(r":00$")  # the seconds of 16:09:00


def csv_rows(texts: Iterator[str]) -> Rows:
    """The rows of CSV; the separator may also be ; or a tab, or what a line `sep=` before the header says."""
    csv.field_size_limit(MAX_LINE_BYTES)
    start = 1

    def numbered() -> Iterator[tuple[int, Sequence[str]]]:
        nonlocal start
        separator, header = "", ""
        for header in texts:
            if found := SEPARATOR_LINE.fullmatch(header):
                separator = found[1]
            elif header.strip():
                break
            start += 1
        separator, before = separator or max(",;\t", key=header.count), start
        reader = csv.reader(itertools.chain([header], texts), delimiter=separator, strict=True)
        for cells in reader:
            yield start, cells
            start = before + reader.line_num

    try:
        yield from table_rows(numbered())
    except csv.Error as error:
        yield start, ValueError(f"is not valid CSV: {error}")
    except ValueError as error:
        yield start, error


def table_rows(lines: Iterable[tuple[int, Sequence[str]]], known: Collection[str] = ROW_SCHEMA["properties"]) -> Rows:
    """The rows below the first line that holds anything, which names the columns; lines of empty cells are none."""
    names: list[str] = []
    for number, cells in lines:
        if not any(cell.strip() for cell in cells):
            continue
        if names:
            yield number, row_of(names, cells)
            continue
        names = [re.sub(r"[\s-]+", "_", cell.strip().lower()) for cell in cells]
        if faults := header_faults(names, known):
            yield number, ValueError(f"the header: {'; '.join(faults)}")
            return
    if not names:
        yield 1, ValueError("the header: prompt: required")


def header_faults(names: Sequence[str], known: Collection[str]) -> list[str]:
    """What is wrong with the column names of a table; a column without a name is no fault while it is empty."""
    own = [shown(name) for name in names if name and name not in {*known, "base_url"}]
    faults = [f"{', '.join(own[:5])}: unknown; known are {', '.join(known)}; {OWN_COLUMNS}"] if own else []
    faults += [NAMES_A_HOST] * ("base_url" in names)
    faults += [f"{name}: stands in it twice" for name, count in Counter(names).items() if count > 1 and name in known]
    return faults + ([] if "prompt" in names else ["prompt: required"])


def row_of(names: Sequence[str], cells: Sequence[str]) -> Any:
    """The row that the cells of a line mean, typed as in JSON; an empty cell is a field not given."""
    row: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        text = cell.strip()
        if not text:
            continue
        if number >= len(names):
            return ValueError(
                f"has {len(cells)} cells, the header names {len(names)}; a prompt with commas needs quotes"
            )
        if not names[number]:
            return ValueError(f"has {shown(text)} in column {number + 1}, which has no name in the header")
        if text.lower() in ERRORS:
            return ValueError(f"{names[number]}: holds an error of the spreadsheet, {text}")
        row[names[number]] = cell if names[number] == "prompt" else text
    try:
        return row | {name: read(row[name]) for name, read in READ.items() if name in row}
    except ValueError as error:
        return error


def seed_of(text: str) -> int | str:
    """A seed as spreadsheets write it. Raises ValueError where they have rounded it."""
    if found := WHOLE_NUMBER.fullmatch(text):
        return int(found[1])
    if not (found := ROUNDED_NUMBER.fullmatch(text)):
        return seed_in(text)
    if found[2] and found[2].strip("0"):
        raise ValueError(
            f"seed: {text} has lost its last digits; show the column as a number, or as text, and save again"
        )
    return int(found[1] + "0" * int(found[3]))


def truth_of(text: str) -> bool | str:
    said = text.lower()
    return said in YES if said in YES | NO else text


def ratio_of(text: str) -> str:
    """A ratio that a spreadsheet may have taken for a time of day: 16:9 is then 16:09, or 16:09:00."""
    return ratio_in(MIDNIGHT.sub("", text) if text.count(":") > 1 else text) or text


READ: dict[str, Callable[[str], Any]] = {
    "seed": seed_of,
    "prompt_extend": truth_of,
    "aspect_ratio": ratio_of,
    "size": ratio_of,
}
