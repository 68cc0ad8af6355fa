"""Rows: lines of any bytes are valid rows, or are told by their number; nothing is asked for that was not written."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from closed import assert_closed
from fuzz.conftest import cases
from fuzz.promises import assert_failure, assert_one_line, plain_json
from fuzz.strategies import (
    changed,
    changed_bytes,
    integers,
    json_values,
    near_requests,
    nested,
    prompts,
    texts,
    valid_requests,
)
from zimage.batch.contract import ROW_SCHEMA
from zimage.batch.inputs import Reading
from zimage.batch.names import Names, output_key, variant_output
from zimage.batch.rows import Row, WrongRow, checked_row, read_rows
from zimage.errors import Failure
from zimage.request import normalize
from zimage.waiting import Stop

COLUMNS = list(ROW_SCHEMA["properties"])
SAMPLE = {"prompt": "a fox", "size": "1280x720", "seed": 7, "prompt_extend": True, "id": "fox", "output": "a/fox.png"}
own_fields = {"id": texts | integers, "output": texts}
rows = st.one_of(
    st.builds(lambda request, own: request | own, near_requests, st.fixed_dictionaries({}, optional=own_fields)),
    changed(SAMPLE),
    json_values(),
)
cells = st.one_of(texts, prompts, st.sampled_from(["1024x1024", "16:9", "7", "-1", "true", "NO", "fox.png", "", " "]))


def written(table: list[list[str]], separator: str = ",", end: str = "\r\n") -> bytes:
    target = io.StringIO()
    csv.writer(target, delimiter=separator, lineterminator=end).writerows(table)
    return target.getvalue().encode("utf-8", "surrogatepass")


tables = st.builds(
    written,
    st.builds(
        lambda header, body: [header, *body],
        st.lists(st.sampled_from(COLUMNS) | texts, max_size=5),
        st.lists(st.lists(cells, max_size=5), max_size=4),
    ),
    st.sampled_from([",", ";", "\t"]),
    st.sampled_from(["\r\n", "\n", "\r", "\n\n"]),
)
sheets = st.one_of(tables, changed_bytes(written([COLUMNS, ["a fox, red", "", "16:9", "7", "yes", "fox", "fox.png"]])))
listed = st.one_of(
    st.lists(rows, max_size=4).map(lambda found: "\n".join(json.dumps(row) for row in found).encode()),
    changed_bytes((json.dumps(SAMPLE) + "\n").encode() * 2),
    nested,
)
plain = st.lists(texts, max_size=4).map(lambda found: "\n".join(found).encode("utf-8", "surrogatepass"))
anything = st.one_of(
    st.binary(max_size=100),
    st.builds(lambda text, encoding: text.encode(encoding, "replace"), texts, st.sampled_from(["utf-16", "latin-1"])),
    st.builds(lambda line: b"x" * line, st.sampled_from([2**20 - 1, 2**20, 2**20 + 1])),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder, before = tmp_path_factory.mktemp("rows"), os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def assert_row(row: Row | WrongRow) -> None:
    """A row that is right can be asked for; one that is wrong says why, on one line each."""
    assert row.line >= 1
    if isinstance(row, WrongRow):
        assert row.sentences
        for sentence in row.sentences:
            assert_one_line(sentence)
        return
    assert_closed("request", plain_json(row.request.as_dict()))
    assert row.request.base_url is None
    assert normalize(row.request.as_dict(), with_seed=False) == row.request
    if row.id is not None:
        assert_one_line(row.id)
    plain_json([row.id, row.output])


def found_in(folder: Path, name: str, content: bytes) -> list[Row | WrongRow]:
    (folder / name).write_bytes(content)
    found = []
    try:
        for row in read_rows(name, 5.0, Stop(30), Reading()):
            assert_row(row)
            found.append(row)
    except Failure as failure:
        assert failure.code in ("file_unreadable", "missing_package")
        assert_failure(failure)
    assert sorted(row.line for row in found) == [row.line for row in found]
    return found


@cases(100, 3_000, content=st.one_of(sheets, sheets, anything))
def test_a_sheet_of_any_bytes_is_rows_or_told(folder: Path, content: bytes) -> None:
    found_in(folder, "rows.csv", content)


@cases(100, 3_000, content=st.one_of(listed, listed, anything))
def test_json_lines_of_any_bytes_are_rows_or_told(folder: Path, content: bytes) -> None:
    found_in(folder, "rows.jsonl", content)


@cases(100, 1_500, content=st.one_of(plain, anything))
def test_a_list_of_prompts_of_any_bytes_is_rows_or_told(folder: Path, content: bytes) -> None:
    in_utf_8 = json.detect_encoding(content[:4]).startswith("utf-8")
    for row in found_in(folder, "rows.txt", content):
        if isinstance(row, Row) and in_utf_8:
            assert row.request.prompt.encode() in content


@cases(100, 1_500, content=st.one_of(listed, anything))
def test_json_of_any_bytes_is_rows_or_told(folder: Path, content: bytes) -> None:
    found_in(folder, "rows.json", b"[" + content.replace(b"\n", b",\n") + b"]")
    found_in(folder, "rows.json", content)


@cases(100, 3_000, raw=rows)
def test_a_row_is_refused_by_name_or_taken(raw: Any) -> None:
    assert_row(checked_row(1, raw))


# What a spreadsheet can hold: it knows no zero byte, and turns every end of a line inside a cell into its own.
cell_prompts = prompts.filter(lambda text: not set(text) & set("\0\r"))


@cases(100, 1_500, found=st.lists(cell_prompts, min_size=1, max_size=5), separator=st.sampled_from([",", ";", "\t"]))
def test_prompts_come_back_from_a_sheet_as_they_were_put_in(folder: Path, found: list[str], separator: str) -> None:
    table = [["id", "prompt", "seed"], *([str(number), text, ""] for number, text in enumerate(found))]
    read = found_in(folder, "rows.csv", written(table, separator))
    assert [row.request.prompt for row in read if isinstance(row, Row)] == found
    assert [row.id for row in read if isinstance(row, Row)] == [str(number) for number in range(len(found))]


@cases(100, 1_500, found=st.lists(valid_requests, max_size=4))
def test_a_row_is_known_again_by_what_is_written_in_it(folder: Path, found: list[dict[str, Any]]) -> None:
    """In whatever order and spacing: else its picture would be paid for twice."""
    objects = [{name: value for name, value in row.items() if name != "base_url"} for row in found]
    one = found_in(folder, "rows.jsonl", "\n".join(json.dumps(row) for row in objects).encode())
    turned = [dict(reversed(row.items())) for row in objects]
    other = found_in(
        folder,
        "rows.jsonl",
        "\n\n".join(
            json.dumps(row, indent=None, separators=(" , ", " : "), ensure_ascii=False) for row in turned
        ).encode(),
    )
    assert [row.fingerprint for row in one if isinstance(row, Row)] == [
        row.fingerprint for row in other if isinstance(row, Row)
    ]


parts = st.one_of(
    texts,
    st.sampled_from(["a", "..", ".", "", "images", "thumbs", "EVIDENCE", "batch.sqlite3", "inside", "out", "fox.png"]),
)
outputs = st.one_of(
    st.builds(
        lambda found, end: "/".join(found) + end,
        st.lists(parts, max_size=4),
        st.sampled_from([".png", ".JPG", ".webp", "", "/"]),
    ),
    texts,
)


@cases(100, 3_000, output=outputs, variant=st.integers(0, 3))
def test_a_picture_of_a_row_lies_in_the_folder(folder: Path, output: str, variant: int) -> None:
    names = Names(folder)
    if not (folder / "out").is_symlink():
        (folder / "out").symlink_to(folder.parent)
        (folder / "inside").mkdir()
    try:
        name = names.checked(output, normalize({"prompt": "x"}))
    except Failure as failure:
        assert failure.code == "invalid_output"
        assert_failure(failure)
        return
    path = Path(os.path.realpath(folder / variant_output(name, variant)))
    assert folder in path.parents
    assert path.parent.name not in ("evidence", "thumbs") or path.parent.parent != folder
    assert path.parent != folder or not path.name.startswith("batch.sqlite3")
    assert output_key(output_key(name)) == output_key(name)
    assert names.holds(name)
