"""Lists as spreadsheets, editors and scripts write them: CSV of Excel in any country, workbooks, JSON, lists of notes.

Each is read as what it plainly is, or refused with what would be read, before anything is paid.
"""

from __future__ import annotations

import datetime as dt
import io
import json
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from batch_helpers import BATCH
from conftest import ROOT, TEST_KEY, Result, Shell
from zimage.batch import workbook
from zimage.batch.contract import OPENPYXL
from zimage.batch.inputs import Reading
from zimage.batch.rows import Row, WrongRow, read_rows
from zimage.errors import Failure
from zimage.waiting import Stop

BOM = b"\xef\xbb\xbf"
FOXES = ["Füchse, im Schnee", 'ein "roter" Fuchs', "狐狸\nund Eule"]
Read = Callable[..., tuple[list[Any], Reading]]


@pytest.fixture
def reader(tmp_path: Path) -> Read:
    def read(name: str, content: bytes, sheet: str | None = None) -> tuple[list[Any], Reading]:
        (tmp_path / name).write_bytes(content)
        reading = Reading()
        rows = list(read_rows(str(tmp_path / name), 5.0, Stop(30), reading, sheet))
        return rows, reading

    return read


def prompts(rows: list[Any]) -> list[str]:
    assert all(isinstance(row, Row) for row in rows), rows
    return [row.request.prompt for row in rows]


def told(rows: list[Any]) -> str:
    """The one problem of an input."""
    (row,) = [row for row in rows if isinstance(row, WrongRow)]
    return "; ".join(row.sentences)


def book(*rows: tuple[Any, ...], **sheets: list[tuple[Any, ...]]) -> bytes:
    """A workbook with these rows in its first sheet, and further sheets."""
    made = openpyxl.Workbook()
    made.remove(made["Sheet"])
    for title, lines in {"Tabelle1": list(rows), **sheets}.items():
        sheet = made.create_sheet(title)
        for line in lines:
            sheet.append(line)
    made.save(out := io.BytesIO())
    return out.getvalue()


def excel(separator: str, *rows: tuple[str, ...], end: str = "\r\n") -> str:
    """CSV as Excel writes it: a cell is quoted where it must be."""
    must = re.compile(f'["\r\n{separator}]')

    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"' if must.search(text) else text

    return "".join(separator.join(map(cell, row)) + end for row in rows)


# CSV ------------------------------------------------------------------------------------------------------------------

TABLE = [("prompt", "size", ""), *((fox, "512*512", "") for fox in FOXES), ("", "", ""), ("", "", "")]
CSV: dict[str, bytes] = {
    "sep= and a mark": BOM + ("sep=;\r\n" + excel(";", *TABLE)).encode(),
    "sep= that is a comma": ("sep=,\r\n" + excel(",", *TABLE)).encode(),
    "sep= that is a bar": ("SEP=|\n" + excel("|", *TABLE)).encode(),
    "sep= in quotes, behind a blank line": ('\r\n"sep=;"\r\n' + excel(";", *TABLE)).encode(),
    "sep= that is a tab": ("sep=\t\r\n" + excel("\t", *TABLE)).encode(),
    "tabs in UTF-16, as Excel's Unicode text": excel("\t", *TABLE).encode("utf-16"),
    "UTF-16 of the other order": b"\xfe\xff" + excel(";", *TABLE).encode("utf-16-be"),
    "UTF-16 without a mark": excel(",", *TABLE).encode("utf-16-le"),
    "UTF-32": excel(",", *TABLE).encode("utf-32"),
    "lines of old Macs": BOM + excel(";", *TABLE, end="\r").encode(),
    "blank lines before the header": b"\n;;\n" + excel(";", *TABLE).encode(),
    "names in capitals and with blanks": excel(",", ("Prompt ", "SIZE", ""), *TABLE[1:]).encode(),
    "more cells than names, all empty": excel(",", ("prompt",), *((fox, "", "") for fox in FOXES)).encode(),
}


@pytest.mark.smoke
@pytest.mark.parametrize("case", CSV)
@pytest.mark.parametrize("name", ["list.csv", "list.tsv"])
def test_csv_is_read_however_excel_has_written_it(reader: Read, case: str, name: str) -> None:
    rows, reading = reader(name, CSV[case])
    assert prompts(rows) == FOXES
    assert reading.remarks == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("prompt;size\r\nFüchse;512*512\r\n".encode("cp1252"), 'in Windows-1252 it would be "Füchse;512*512"'),
        ("prompt,size\r\nun café à Nîmes,\r\n".encode("cp1252"), 'Windows-1252 it would be "un café à Nîmes,"'),
        ("prompt,size\r\n雪地里的狐狸,512*512\r\n".encode("gbk"), 'in GBK it would be "雪地里的狐狸,512*512"'),
        (b"prompt\r\n\x81\x8d\xff\r\n", "is not text in UTF-8: save"),
    ],
)
def test_another_encoding_is_told_with_what_it_would_be(reader: Read, content: bytes, said: str) -> None:
    for name in ("list.csv", "list.txt"):
        rows, _ = reader(name, content if name == "list.csv" else content.split(b"\n", 1)[1])
        assert said in told(rows)
        assert "CSV UTF-8" in told(rows)


CELLS: list[tuple[str, str, object]] = [
    ("seed", "1E+05", 100_000),
    ("seed", "2e9", 2_000_000_000),
    ("seed", "1024.0", 1024),
    ("seed", "1024,00", 1024),
    ("seed", "-1", None),
    ("seed", "7", 7),
    ("aspect_ratio", "16:09", "1280*720"),
    ("aspect_ratio", "16:09:00", "1280*720"),
    ("aspect_ratio", "01:01", "1024*1024"),
    ("aspect_ratio", "21:9", "1344*576"),
    ("size", "03:02:00", "1248*832"),
    ("size", "16:9", "1280*720"),
    ("size", " 640 x 512 ", "640*512"),
    ("prompt_extend", "WAHR", True),
    ("prompt_extend", "FAUX", False),
    ("prompt_extend", "是", True),
    ("id", "1E+05", "1E+05"),
]


@pytest.mark.parametrize(("field", "cell", "value"), CELLS)
def test_a_cell_means_what_was_typed(reader: Read, field: str, cell: str, value: object) -> None:
    (row,), _ = reader("list.csv", excel(";", ("prompt", field), ("a fox", cell)).encode())
    assert isinstance(row, Row), row
    found = row.id if field == "id" else row.request._asdict()["size" if field == "aspect_ratio" else field]
    assert found == value


@pytest.mark.parametrize(
    ("field", "cell", "said"),
    [
        ("seed", "1.23457E+09", "lost its last digits"),
        ("seed", "1,5e+3", "lost its last digits"),
        ("seed", "1.024", "seed"),
        ("seed", "9E+99", "2147483647"),
        ("aspect_ratio", "16:10", "aspect_ratio"),
        ("prompt_extend", "peut-être", "prompt_extend"),
        ("prompt", "#REF!", "error of the spreadsheet"),
        ("id", "#NV", "error of the spreadsheet"),
    ],
)
def test_a_cell_that_lost_its_meaning_is_told(reader: Read, field: str, cell: str, said: str) -> None:
    row = {"prompt": "a fox", field: cell}
    rows, _ = reader("list.csv", excel(";", tuple(row), tuple(row.values())).encode())
    assert said in told(rows)


def test_a_cell_without_a_column_is_told_with_its_row(reader: Read) -> None:
    rows, _ = reader("list.csv", b"prompt;;size\na;;\nb;note;\n")
    assert told(rows) == 'has "note" in column 2, which has no name in the header'
    assert [row.line for row in rows] == [2, 3]


# Workbooks ------------------------------------------------------------------------------------------------------------

Parts = dict[str, bytes]
SHEET = "xl/worksheets/sheet1.xml"
EXCEL = book(
    ("Prompt", "Size", None, "Seed", "Aspect ratio", "prompt_extend", "id"),
    ("Füchse, im Schnee", "640x512", None, 1024.0, None, True, 7),
    (None, None, None, None, None, None, None),
    ("狐狸\nund Eule", None, None, 1e5, dt.time(16, 9), None, "owl"),
    ("  ", None),
)


def repacked(change: Callable[[Parts], object]) -> bytes:
    """The workbook with its parts changed."""
    with zipfile.ZipFile(io.BytesIO(EXCEL)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    change(parts)
    with zipfile.ZipFile(out := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return out.getvalue()


def test_a_workbook_is_rows_under_its_header(reader: Read) -> None:
    rows, reading = reader("list.xlsx", EXCEL)
    assert prompts(rows) == ["Füchse, im Schnee", "狐狸\nund Eule"]
    asked = [(row.line, row.id, row.request.size, row.request.seed, row.request.prompt_extend) for row in rows]
    assert asked == [(2, "7", "640*512", 1024, True), (4, "owl", "1280*720", 100_000, False)]
    assert (reading.unit, reading.remarks) == ("row", [])


def as_excel_saves_it(parts: Parts) -> None:
    """Texts in a part of their own, each once; formulas with the value that they had."""
    texts: list[bytes] = []

    def shared(found: re.Match[bytes]) -> bytes:
        if found[2] not in texts:
            texts.append(found[2])
        return b'<c r="%b" t="s"><v>%d</v></c>' % (found[1], texts.index(found[2]))

    sheet = re.sub(rb'<c r="(\w+)" t="inlineStr"><is><t[^>]*>(.*?)</t></is></c>', shared, parts[SHEET], flags=re.DOTALL)
    assert texts
    formula = b'<c r="D2" t="str"><f>"1"&amp;"024"</f><v>1024</v></c>'
    parts[SHEET] = re.sub(rb'<c r="D2".*?</c>', formula, sheet)
    items = b"".join(b"<si><t>%b</t></si>" % text for text in texts[1:])
    rich = b"<si><r><t>%b</t></r><r><rPr><b/></rPr><t>%b</t></r></si>" % (texts[0][:2], texts[0][2:])
    main = b"http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    parts["xl/sharedStrings.xml"] = b'<sst xmlns="%b">%b%b</sst>' % (main, rich, items)
    kind = b"application/vnd.openxmlformats-officedocument.spreadsheetml.sharedStrings+xml"
    types = b'<Override PartName="/xl/sharedStrings.xml" ContentType="%b"/></Types>' % kind
    parts["[Content_Types].xml"] = parts["[Content_Types].xml"].replace(b"</Types>", types)


def test_a_workbook_is_read_as_excel_saves_it(reader: Read) -> None:
    rows, _ = reader("list.xlsx", repacked(as_excel_saves_it))
    assert prompts(rows) == ["Füchse, im Schnee", "狐狸\nund Eule"]
    assert [(row.request.size, row.request.seed) for row in rows] == [("640*512", 1024), ("1280*720", 100_000)]


@pytest.mark.parametrize("name", ["list.csv", "list.txt", "list.jsonl", "list.json", "list.tsv"])
def test_a_workbook_is_one_under_any_name(reader: Read, name: str) -> None:
    assert len(prompts(reader(name, EXCEL)[0])) == 2


def test_a_sheet_is_chosen_by_its_name(reader: Read) -> None:
    content = book(("prompt",), ("first",), Zweite=[("prompt",), ("second",)])
    rows, reading = reader("list.xlsx", content)
    assert prompts(rows) == ["first"]
    (remark,) = reading.remarks
    assert "--sheet" in remark and "Zweite" in remark
    rows, reading = reader("list.xlsx", content, "zweite")
    assert (prompts(rows), reading.remarks) == (["second"], [])
    with pytest.raises(Failure, match='no sheet "Dritte"; it has "Tabelle1", "Zweite"'):
        reader("list.xlsx", content, "Dritte")
    with pytest.raises(Failure, match="--sheet"):
        reader("list.csv", b"prompt\na\n", "Zweite")


def test_a_hidden_sheet_is_not_the_first(reader: Read) -> None:
    made = openpyxl.load_workbook(io.BytesIO(book(("prompt",), ("hidden",), Zweite=[("prompt",), ("seen",)])))
    made["Tabelle1"].sheet_state = "hidden"
    made.active = 1
    made.save(out := io.BytesIO())
    assert prompts(reader("list.xlsx", out.getvalue())[0]) == ["seen"]


def test_a_formula_counts_by_the_value_that_is_stored_and_is_never_worked_out(reader: Read) -> None:
    """openpyxl stores none: an empty cell."""
    rows, _ = reader("list.xlsx", book(("prompt", "id"), ("a fox", '=HYPERLINK("http://127.0.0.1:9/x")')))
    assert (prompts(rows), rows[0].id) == (["a fox"], None)
    rows, _ = reader("list.xlsx", book(("prompt", "id"), ('="a " & "fox"', "one")))
    assert "prompt: required" in told(rows)


BOMB = b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]>'
STRANGE: dict[str, Callable[[Parts], object]] = {
    "unpacks to very much": lambda parts: parts.update({SHEET: b" " * (workbook.MOST_UNPACKED + 1)}),
    "very many cells": lambda parts: parts.update({SHEET: b"<c/>" * (workbook.MOST_TAGS + 1)}),
    "very many in a part that is not used": lambda parts: parts.update({"a.bin": b"<" * (workbook.MOST_TAGS + 1)}),
    "entities": lambda parts: parts.update({SHEET: BOMB + parts[SHEET]}),
    "entities behind a long comment": lambda parts: parts.update(
        {SHEET: b"<!--" + b"x" * (workbook.BLOCK - 9) + b"-->" + BOMB + parts[SHEET]}
    ),
    "XML in UTF-16": lambda parts: parts.update({SHEET: parts[SHEET].decode().encode("utf-16")}),
    "XML in a strange encoding": lambda parts: parts.update({SHEET: b'<?xml version="1.0" encoding="cp037"?><a/>'}),
    "no sheet": lambda parts: parts.pop(SHEET),
    "half a sheet": lambda parts: parts.update({SHEET: parts[SHEET][:-300]}),
    "a text that is missing": lambda parts: parts.update({SHEET: parts[SHEET].replace(b't="n"', b't="s"')}),
    "no workbook": lambda parts: parts.pop("xl/workbook.xml"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_a_workbook_of_a_stranger_is_bounded(reader: Read, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr(workbook, "MOST_UNPACKED", 8 * 1024 * 1024)  # the same sooner
    monkeypatch.setattr(workbook, "MOST_TAGS", 400_000)
    with pytest.raises(Failure) as failure:
        reader("list.xlsx", repacked(STRANGE[case]))
    assert failure.value.code == "file_unreadable"
    assert "CSV" in failure.value.fault.hint


@pytest.mark.parametrize("number", [b"1048577", b"9" * 18])
def test_a_row_beyond_the_last_one_of_a_sheet_is_not_waited_for(
    reader: Read, monkeypatch: pytest.MonkeyPatch, number: bytes
) -> None:
    monkeypatch.setattr(workbook, "LAST_ROW", 1000)
    content = repacked(lambda parts: parts.update({SHEET: parts[SHEET].replace(b'r="4"', b'r="' + number + b'"')}))
    assert prompts(reader("list.xlsx", content)[0]) == ["Füchse, im Schnee"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("list.xlsx", b"prompt\na\n", "no workbook"),
        ("list.xlsx", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "password"),
        ("list.csv", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "old Excel"),
        ("list.xlsx", EXCEL[: len(EXCEL) // 2], "cannot be read as a workbook"),
        ("list.xlsx", b"PK\x03\x04" + bytes(100), "cannot be read as a workbook"),
    ],
)
def test_what_is_no_workbook_is_told(reader: Read, name: str, content: bytes, said: str) -> None:
    with pytest.raises(Failure, match=said):
        reader(name, content)


def test_the_package_for_workbooks_is_named_where_it_is_missing(reader: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(Failure) as failure:
        reader("list.xlsx", EXCEL)
    fault = failure.value.fault
    assert (fault.code, fault.exit_code) == ("missing_package", 2)
    assert "openpyxl" in fault.message
    uv, pip = fault.hint.split(", or ")
    assert re.search(r"uv run --with .?openpyxl>=\S+ --script \S*generate_batch\.py", uv), uv
    for name in ("requests", "jsonschema", "Pillow", "tqdm", "openpyxl"):
        assert name in pip
    assert len(reader("list.csv", b"prompt\na\n")[0]) == 1, "nothing else needs it"


def test_its_bounds_are_those_of_the_requirements() -> None:
    assert OPENPYXL in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()


# JSON -----------------------------------------------------------------------------------------------------------------

TWO = [{"prompt": "a", "id": "1"}, {"prompt": "b", "size": "16:9"}]
LINES = "\n".join(map(json.dumps, TWO))
JSON: dict[str, str] = {
    "an array": json.dumps(TWO),
    "an array on many lines": "\n\n" + json.dumps(TWO, indent=2),
    "rows": json.dumps({"rows": TWO}),
    "rows on many lines": json.dumps({"rows": TWO}, indent=2),
    "an object a line": LINES,
    "an object a line, behind blank lines": "\n \n" + LINES + "\n",
    "texts": '["a", {"prompt": "b"}]',
}


@pytest.mark.parametrize("case", JSON)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_is_read_in_each_of_its_forms(reader: Read, case: str, encoding: str) -> None:
    assert prompts(reader("list.json", JSON[case].encode(encoding))[0]) == ["a", "b"]


@pytest.mark.parametrize("case", [case for case in JSON if case.startswith(("an", "texts"))])
@pytest.mark.parametrize("name", ["list.jsonl", "list.ndjson"])
def test_an_array_is_read_where_lines_are_expected(reader: Read, case: str, name: str) -> None:
    assert prompts(reader(name, JSON[case].encode())[0]) == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[{]", "the file is not valid JSON"),
        ('[{"prompt": "a"}, 7]', "must be a JSON object, got integer"),
        ('{"prompts": ["a"]}', "prompts"),
        ('{"rows": {"prompt": "a"}}', "rows"),
        ("null", "must be a JSON object, got null"),
        ('[{"prompt": "caf\udce9"}]', "in Windows-1252"),
    ],
)
def test_json_that_is_no_list_is_told(reader: Read, content: str, said: str) -> None:
    assert said in told(reader("list.json", content.encode("utf-8", "surrogateescape"))[0])


def test_json_that_is_too_long_leads_to_lines(reader: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zimage.batch.inputs.MAX_JSON_BYTES", 100)
    with pytest.raises(Failure) as failure:
        reader("list.json", json.dumps(TWO * 3, indent=1).encode())
    assert ".jsonl" in failure.value.fault.hint


# Lists of prompts -----------------------------------------------------------------------------------------------------

NOTES = "# animals\n\na fox\n  # birds\nan owl # at night\n\\# 1 fan, a poster\n\\a\n"


def test_a_list_has_comments(reader: Read) -> None:
    rows, reading = reader("list.txt", NOTES.encode())
    assert prompts(rows) == ["a fox", "an owl # at night", "# 1 fan, a poster", "\\a"]
    assert [row.line for row in rows] == [3, 5, 6, 7]
    (remark,) = reading.remarks
    assert remark.startswith("2 line(s)") and "\\#" in remark


@pytest.mark.parametrize("mark", ["- ", "* ", "1. ", "12) ", "(3) ", "• ", "– ", "2、"])
def test_the_mark_of_a_list_is_warned_about(reader: Read, mark: str) -> None:
    rows, reading = reader("list.txt", f"{mark}a fox\nan owl\n{mark}a hare\n".encode())
    assert prompts(rows) == [f"{mark}a fox", "an owl", f"{mark}a hare"]
    (remark,) = reading.remarks
    assert "2 prompt(s)" in remark and f'line 1: "{mark}a fox"' in remark


@pytest.mark.parametrize(
    "prompt", ["-5 degrees", "3d render", "1.5 m of snow", "*stars*", "a - b", "1girl", "1,2 owls"]
)
def test_what_only_looks_like_a_mark_is_not(reader: Read, prompt: str) -> None:
    rows, reading = reader("list.txt", prompt.encode())
    assert (prompts(rows), reading.remarks) == ([prompt], [])


@pytest.mark.parametrize(
    ("name", "content", "ending"),
    [
        ("list.txt", LINES, ".jsonl"),
        ("list.txt", json.dumps(TWO), ".json"),
        ("list.txt", json.dumps(TWO, indent=2), ".json"),
        ("list.txt", json.dumps({"rows": TWO}, indent=2), ".json"),
        ("list.txt", "a fox\n" + LINES.splitlines()[0], ".jsonl"),
        ("list.txt", "prompt;size\na fox;512*512\n", ".csv"),
        ("list.txt", "Prompt\na fox\n", ".csv"),
        ("list.txt", "id\tprompt\n1\ta fox\n", ".csv"),
        ("list.csv", LINES, ".jsonl"),
        ("list.csv", json.dumps(TWO, indent=2), ".json"),
        ("list.tsv", json.dumps(TWO), ".json"),
    ],
)
def test_a_file_under_a_wrong_name_is_not_paid_for(reader: Read, name: str, content: str, ending: str) -> None:
    rows, _ = reader(name, content.encode())
    assert ending in told(rows)
    assert not any(isinstance(row, Row) for row in rows[1:])


# As it is used --------------------------------------------------------------------------------------------------------


def dry_run(shell: Shell, name: str, content: bytes, *options: str) -> Result:
    shell.script = BATCH
    shell.env["DASHSCOPE_API_KEY"] = TEST_KEY
    (shell.folder / name).write_bytes(content)
    return shell.run("--input", name, "--output-dir", "out", "--dry-run", *options)


def test_a_dry_run_shows_the_first_prompts_as_they_are_sent(shell: Shell) -> None:
    result = dry_run(shell, "list.txt", (NOTES + "- x\n" + "é" * 3000 + "\n").encode())
    assert result.code == 0
    assert result.json["first_prompts"] == ["a fox", "an owl # at night", "# 1 fan, a poster"]
    assert len(result.json["warnings"]) == 2
    assert all(f"warning: {text}" in result.stderr for text in result.json["warnings"])
    result = dry_run(shell, "list.txt", ("é" * 3000 + "\nb").encode(), "--variants", "3")
    long, short = result.json["first_prompts"]
    assert (long, short) == ("é" * 2000 + "…", "b")
    assert "warnings" not in result.json


def test_a_workbook_is_a_batch(shell: Shell) -> None:
    result = dry_run(shell, "Bilder 2026.xlsx", EXCEL)
    assert result.json["rows"] == 2
    assert result.json["first_prompts"] == ["Füchse, im Schnee", "狐狸\nund Eule"]
    wrong = dry_run(shell, "list.xlsx", book(("prompt", "seed"), ("a", 1), (None, None), ("b", "x")))
    assert wrong.error["problems"][0].startswith("row 4: seed")


def test_rows_of_json_are_counted_as_rows(shell: Shell) -> None:
    error = dry_run(shell, "list.json", b'[{"prompt": "a"},\n\n\n{"seed": 1}]').error
    assert error["problems"] == ["row 2: prompt: required"]
