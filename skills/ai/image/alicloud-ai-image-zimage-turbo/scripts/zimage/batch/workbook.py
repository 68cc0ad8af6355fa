"""Workbook: the rows of an .xlsx file, which is a zip archive of XML, and may be a stranger's."""

from __future__ import annotations

import datetime as dt
import importlib
import io
import re
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO

from zimage.batch.contract import BATCH_REQUIREMENTS, MAX_WORKBOOK_BYTES, OPENPYXL
from zimage.contract import MIB, SCRIPTS
from zimage.errors import Failure, missing_package
from zimage.outside import outside_text, shown

Cells = tuple[str, ...]

SIGNATURE = b"PK\x03\x04"
MOST_UNPACKED = 128 * MIB  # of all parts
MOST_TAGS = 4_000_000  # `<`: each element takes 130 bytes of memory while its row, or its part, is read
MOST_PARTS = 10_000
LAST_ROW, LAST_COLUMN = 1_048_576, 200  # of Excel's own; here
BLOCK = 1 * MIB
# XML in another encoding than UTF-8, in which tags could not be counted, and what an entity needs.
FOREIGN = re.compile(
    rb"""<\?xml[^>]*encoding\s*=\s*["'](?!utf-8|us-ascii)|\A(?:\xff\xfe|\xfe\xff|.{0,3}\0)""", re.I | re.S
)
ENTITY = re.compile(rb"<!(?:DOCTYPE|ENTITY)")
HINT = "save the sheet as CSV in UTF-8 and give that"


def sheet_rows(source: BinaryIO, sheet: str | None, remarks: list[str]) -> Iterator[Cells]:
    """The rows of a sheet, from the first; by default of the first that is not hidden. Formulas count by their values.

    Raises:
        Failure: file_unreadable, missing_package; usage for a sheet that is not there.
    """
    content = source.read(MAX_WORKBOOK_BYTES + 1)
    if len(content) > MAX_WORKBOOK_BYTES:
        raise Failure("file_unreadable", f"--input: is larger than {MAX_WORKBOOK_BYTES // MIB} MiB", hint=HINT)
    try:
        check_archive(content)
        openpyxl = _openpyxl()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it does not read: colours, validations
            book = openpyxl.load_workbook(io.BytesIO(content), read_only=True, data_only=True, keep_links=False)
            for values in chosen_sheet(book.worksheets, sheet, remarks).iter_rows(
                max_row=LAST_ROW, max_col=LAST_COLUMN + 1, values_only=True
            ):
                yield tuple(map(cell_text, values))
    except Failure:
        raise
    except Exception as error:  # any: the library reads what others wrote, and promises none
        reason = outside_text(f"{type(error).__name__}: {error}", 200)
        raise Failure("file_unreadable", f"--input: cannot be read as a workbook: {reason}", hint=HINT) from None


def _openpyxl() -> Any:
    try:
        return importlib.import_module("openpyxl")
    except ImportError:
        script = SCRIPTS / "generate_batch.py"
        raise missing_package(
            OPENPYXL, BATCH_REQUIREMENTS | {"openpyxl": OPENPYXL}, script, beyond=[OPENPYXL]
        ) from None


def check_archive(content: bytes) -> None:
    """See that the archive is a workbook, and what its parts unpack to, before anything of them is made.

    Raises:
        Failure: file_unreadable. zipfile.BadZipFile, and what damaged archives bring else.
    """

    import zipfile

    def refuse(what: str) -> Failure:
        return Failure("file_unreadable", f"--input: {what}", hint=HINT)

    unpacked = tags = 0
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = archive.infolist()
        if "xl/workbook.xml" not in archive.namelist():
            raise refuse("is a zip archive, but not an .xlsx workbook")
        if len(parts) > MOST_PARTS or sum(part.file_size for part in parts) > MOST_UNPACKED:
            raise refuse(f"unpacks to more than {MOST_UNPACKED // MIB} MiB")
        for part in parts:
            with archive.open(part) as stream:
                block, last = stream.read(BLOCK), b""
                is_xml = (
                    part.filename.endswith((".xml", ".rels")) or block[:10].lstrip(b"\xef\xbb\xbf \r\n\t")[:1] == b"<"
                )
                is_foreign = is_xml and FOREIGN.search(block[:200])
                while block:
                    unpacked += len(block)
                    tags += block.count(b"<")
                    if unpacked > MOST_UNPACKED or tags > MOST_TAGS:
                        raise refuse("is larger, unpacked, than a list of prompts can be")
                    if is_foreign or (is_xml and ENTITY.search(last + block)):
                        raise refuse("holds XML that no spreadsheet program writes")
                    block, last = stream.read(BLOCK), block[-10:]


def chosen_sheet(sheets: list[Any], name: str | None, remarks: list[str]) -> Any:
    titles = [sheet.title for sheet in sheets]
    told = ", ".join(shown(title) for title in titles[:20])
    if name is not None:
        for sheet in sheets:
            if sheet.title.strip().casefold() == name.strip().casefold():
                return sheet
        raise Failure("usage", f"--sheet: the workbook has no sheet {shown(name)}; it has {told}")
    shown_sheets = [sheet for sheet in sheets if sheet.sheet_state == "visible"] or sheets
    if not shown_sheets:
        raise Failure("file_unreadable", "--input: the workbook has no sheet with cells", hint=HINT)
    if len(shown_sheets) > 1:
        remarks.append(f"the sheet {shown(shown_sheets[0].title)} of {told} is read; --sheet NAME reads another")
    return shown_sheets[0]


def cell_text(value: Any) -> str:
    """The value of a cell as CSV would hold it."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value if "_x" not in value else re.sub(r"_x([0-9A-F]{4})_", lambda code: chr(int(code[1], 16)), value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, dt.time):
        return value.isoformat("minutes")
    return str(value)
