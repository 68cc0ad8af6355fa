#!/usr/bin/env python3
"""Turn a list of prompts into verified pictures with Z-Image Turbo, and lose nothing on the way.

All rows are validated before the first is paid for. The state of every picture lies in a SQLite database in the
output folder, on disk before a request leaves and when its link arrives, so that the run can be killed at any
moment and started again with the same command. One pacer keeps all workers just under the account's rate limit.

This file needs generate_image.py beside it, which knows how one picture is asked for, paid, verified and saved.
Chapters: contract, rows, names in the folder, the folder's database, plan, journal, pacer, work, run, results,
progress, free commands, command line.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "requests>=2.32.3,<3",
#   "jsonschema>=4.18,<5",
#   "Pillow>=10.3,<14",
#   "tqdm>=4.66,<5",
# ]
# ///
from __future__ import annotations

import os
import signal


def _leave_early(number: int, _frame: object) -> None:
    """Until main() installs its handlers nothing has been done: a signal ends the process at once."""
    os.write(2, b"error: interrupted: before anything was sent\nnext: nothing was billed; run it again when you like\n")
    os._exit(128 + number)


if __name__ == "__main__":
    for _signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_signum, _leave_early)

import argparse
import base64
import codecs
import contextlib
import csv
import hashlib
import heapq
import importlib
import json
import math
import posixpath
import queue
import re
import shutil
import sqlite3
import stat
import statistics
import sys
import threading
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn
from urllib.parse import urlsplit

from generate_image import (
    DEFAULT_MAX_RETRIES,
    DEFAULT_PROVIDER,
    DEFAULT_TIMEOUT,
    EXIT_BALANCE,
    EXIT_DISK,
    EXIT_INVALID,
    EXIT_KEY,
    EXIT_OK,
    EXIT_SIGNAL,
    EXIT_UNAVAILABLE,
    EXIT_UNKNOWN,
    KINDS,
    MAX_RETRIES_RANGE,
    MAX_SEED,
    MIB,
    MIN_FREE_BYTES,
    OWNER_ONLY,
    PROVIDERS,
    REQUEST_SCHEMA,
    REQUIREMENTS,
    SKILL,
    TIMEOUT_RANGE,
    VERSION,
    Clock,
    Console,
    Endpoint,
    Evidence,
    Failure,
    ImageRequest,
    Interrupted,
    Key,
    Kind,
    Parser,
    Picture,
    Plan,
    Problem,
    Provider,
    ask,
    backoff,
    check_space,
    check_working_folder,
    check_writable,
    checked_output,
    choose_endpoint,
    collect,
    explain,
    fetch_source,
    find_key,
    finish,
    flag,
    flattened,
    format_problems,
    generated_facts,
    import_libraries,
    internal_error,
    is_plainly_valid,
    json_kind,
    missing_package,
    missing_packages,
    moment_of,
    no_more_waiting,
    normalize,
    noting,
    number_option,
    os_reason,
    outside_text,
    own_command,
    parse_json,
    pick_seed,
    provider_named,
    raise_problems,
    region_option,
    remember_secret,
    remove_if_left_over,
    request_problems,
    request_warnings,
    settle,
    shown,
    slug_of,
    timestamp,
    trusted_hosts,
    unknown_sentences,
    utc_now,
    verified,
    workspace_of,
    write_exclusively,
)

if TYPE_CHECKING:
    import PIL.Image

# ═══════════════════════════════════════════════════════════════════════════════════════════════════
# 1. Contract: the numbers, names and errors that users and their scripts rely on
# ═══════════════════════════════════════════════════════════════════════════════════════════════════

BATCH_REQUIREMENTS = REQUIREMENTS | {"tqdm": "tqdm>=4.66,<5"}

DATABASE, LOCK, RESULTS, GALLERY = "batch.sqlite3", "batch.lock", "results.jsonl", "index.html"
IMAGES, THUMBS, EVIDENCE = "images", "thumbs", "evidence"
DATABASE_VERSION = 1
FOLDER_SIZE = 1000  # files a folder: more make listings slow
PRIVATE_FILES = f"{DATABASE}*\n{LOCK}\n{EVIDENCE}/\n"  # for .gitignore: they hold signed links

MAX_LINE_BYTES = 1 * MIB
MAX_ID_LENGTH = 200
PROBLEMS_TOLD = 50
FAILURES_TOLD = 20  # lines on stderr; the rest stands in the results
INPUTS = (".jsonl", ".csv", ".txt")

SPACING = 1.035  # of the published limit: services count in sliding windows, and calls arrive a little unevenly
REFUSED_STEP, QUIET_STEP = 1.02, 0.99  # of the spacing: wider with each 429, closer again with each quiet second
WIDEST_SPACING = 60.0  # seconds
HOLD_WITHOUT_WORD = 1.0  # seconds to hold all calls after a 429 without Retry-After; doubles up to the next
LONGEST_HOLD_WITHOUT_WORD = 20.0

CONCURRENCY_RANGE = (4, 64)  # by default, for rate times latency
UNPACED_CONCURRENCY = 16  # without a rate limit there is no rate to follow
ASSUMED_LATENCY = 10.0  # seconds, until one is measured
DOWNLOADS_AT_ONCE = 8
MOST_WAITING_DOWNLOADS = 200  # pictures paid and not yet downloaded; with more, nothing new is sent
UNKNOWN_IN_A_ROW, FAILURES_IN_A_ROW = 5, 10

THUMB_SIDE = 384  # pixels
TICK = 0.25  # seconds between looks at the clock while nothing happens
REPORT_EVERY = 5.0  # seconds between progress lines where stderr is no terminal

EXIT_INCOMPLETE = 1
EXIT_TIME_LIMIT = 11

BATCH_KINDS: dict[str, Kind] = {
    "invalid_rows": Kind(EXIT_INVALID, False, "no", "correct the rows named above; nothing has been sent"),
    "changed_rows": Kind(
        EXIT_INVALID,
        False,
        "no",
        "undo the change, use another --output-dir, or, if the user agrees to the cost, add --accept-changes",
    ),
    "already_running": Kind(
        EXIT_INVALID, True, "no", "wait for it: --status DIR tells how far it is; never start a second one"
    ),
    "no_batch": Kind(EXIT_INVALID, False, "no", "give the --output-dir of a batch that has been started"),
    "batch_unreadable": Kind(
        EXIT_INVALID, False, "no", "use another --output-dir; pictures and evidence in this one stay as they are"
    ),
    "incomplete": Kind(EXIT_INCOMPLETE, True, "no", "run the same command again"),
    "time_limit": Kind(EXIT_TIME_LIMIT, True, "no", "run the same command again, until it ends with another exit code"),
}
KINDS.update(BATCH_KINDS)

_row_fields = {name: rule for name, rule in REQUEST_SCHEMA["properties"].items() if name != "base_url"}
ROW_SCHEMA: dict[str, Any] = REQUEST_SCHEMA | {
    "title": "row of a batch",
    "properties": _row_fields
    | {
        "id": {"type": "string", "pattern": r"\S", "description": "Names the row, whatever becomes of its content."},
        "output": {"type": "string", "pattern": r"\S", "description": "File in the output folder: .png, .jpg, .webp."},
    },
}

DATABASE_SCHEMA = f"""
CREATE TABLE about (topic TEXT PRIMARY KEY, text TEXT NOT NULL);
INSERT INTO about VALUES
 ('what', 'The state of a batch of pictures, written by generate_batch.py of {SKILL}.'),
 ('pictures', 'A row a picture. Prompt, seed and size are what is sent; output is the file in this folder.'),
 ('states', 'pending: not sent. submitting: the request is out. submitted: the service works on it (task_id in facts). '
  || 'generated: paid, the link is in facts. saved: the verified image is in output. failed: refused or unusable, '
  || 'facts say why. unknown: the request left and no answer came; it may have been billed.'),
 ('go on', 'Run the same command again. --retry-failed and --retry-unknown send those rows once more (costs).'),
 ('careful', 'Do not edit while a batch runs. facts hold signed links: they open the pictures for a day.');

CREATE TABLE services (  -- where pictures were asked for
  number   INTEGER PRIMARY KEY,
  provider TEXT NOT NULL,
  region   TEXT NOT NULL,
  endpoint TEXT NOT NULL,
  UNIQUE (provider, region, endpoint)
);

CREATE TABLE pictures (
  number        INTEGER PRIMARY KEY,         -- given once; names image, thumbnail and evidence
  identity      TEXT NOT NULL,               -- of the row: 'id:...', or 'row:' fingerprint ':' occurrence
  variant       INTEGER NOT NULL,            -- from 0
  position      INTEGER,                     -- of the row in the last input, from 0; NULL: not in it any more
  line          INTEGER,                     -- of the row in the last input, from 1
  id            TEXT,
  fingerprint   TEXT NOT NULL,               -- of the row as written
  service       INTEGER NOT NULL REFERENCES services (number),
  prompt        TEXT NOT NULL,
  size          TEXT NOT NULL,               -- width*height in pixels
  seed          INTEGER NOT NULL,            -- variant k has the row's seed + k, modulo 2^31
  prompt_extend INTEGER NOT NULL,            -- 0 or 1
  output        TEXT NOT NULL,               -- file in this folder
  output_key    TEXT NOT NULL UNIQUE,        -- the same, folded: file systems may ignore case and Unicode form
  price         REAL NOT NULL,               -- US$ a try
  paid          INTEGER NOT NULL DEFAULT 0,  -- tries that were, or may have been, billed
  state         TEXT NOT NULL DEFAULT 'pending' CHECK (state IN
                ('pending', 'submitting', 'submitted', 'generated', 'saved', 'failed', 'unknown')),
  facts         TEXT NOT NULL DEFAULT '{{}}',  -- JSON, fields of the evidence file: attempts, response, image, error
  moved_from    TEXT,                        -- where the file lay before a changed row took its name
  UNIQUE (identity, variant)
);
CREATE INDEX pictures_to_do ON pictures (state, position, variant);

CREATE TABLE runs (
  number      INTEGER PRIMARY KEY,
  started_at  TEXT NOT NULL,
  updated_at  TEXT NOT NULL,
  finished_at TEXT,
  exit_code   INTEGER,
  latency_s   REAL,                          -- seconds from request to answer
  progress    TEXT NOT NULL DEFAULT '{{}}'     -- JSON
);

CREATE VIEW progress AS
  SELECT state, count(*) AS pictures, round(sum(price * paid), 5) AS usd FROM pictures GROUP BY state;
"""

# Pictures that a summary, the results and the gallery speak of: those of the input, and those that were paid for.
LISTED = "(position IS NOT NULL OR state IN ('submitting', 'submitted', 'generated', 'saved', 'unknown'))"
KEPT_FACTS = (
    "started_at",
    "generated_at",
    "finished_at",
    "timings_ms",
    "attempts",
    "task_id",
    "response",
    "image",
    "warnings",
    "error",
)


# ═══════════════════════════════════════════════════════════════════════════════════════════════════
# 2. Rows: what the user asks for, a line at a time
# ═══════════════════════════════════════════════════════════════════════════════════════════════════


class Row(NamedTuple):
    """One valid row. `seed` is None where the row names none: one is picked when the row is first planned."""

    line: int
    id: str | None
    output: str | None
    request: ImageRequest
    seed: int | None
    fingerprint: str


class WrongRow(NamedTuple):
    line: int
    sentences: list[str]


class Lines:
    """The lines of an input as bytes, never waiting longer than `wait` seconds for the next one.

    Raises:
        Failure: file_unreadable.
    """

    def __init__(self, name: str, wait: float) -> None:
        self.label = "--input" if name == "-" else f"--input {outside_text(name, 200)}"
        self.name = name
        self.wait = wait

    def __iter__(self) -> Iterator[bytes]:
        try:
            if self.name == "-":
                if sys.stdin is None or sys.stdin.isatty():
                    raise Failure("file_unreadable", f"{self.label}: nothing is piped into standard input")
                yield from self._in_time(sys.stdin.buffer)
            elif stat.S_ISREG(os.stat(self.name).st_mode):
                with open(self.name, "rb") as source:
                    yield from self._read(source)
            elif os.path.isdir(self.name):
                raise Failure("file_unreadable", f"{self.label}: is a folder")
            else:
                yield from self._in_time(self.name)
        except (OSError, ValueError) as error:
            hint = f"give the path of a readable {', '.join(INPUTS)} file, or - for JSON lines on standard input"
            raise Failure("file_unreadable", f"{self.label}: cannot be read: {os_reason(error)}", hint=hint) from None

    def _read(self, source: Any) -> Iterator[bytes]:
        for number, line in enumerate(iter(lambda: source.readline(MAX_LINE_BYTES + 1), b""), 1):
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"line {number} is longer than {MAX_LINE_BYTES // MIB} MiB")
            yield line.removeprefix(codecs.BOM_UTF8) if number == 1 else line

    def _in_time(self, source: Any) -> Iterator[bytes]:
        """Read a pipe in a thread: one that nobody writes to must not hang the command."""
        lines: queue.Queue[bytes | Exception | None] = queue.Queue(maxsize=1000)

        def read() -> None:
            try:
                with contextlib.nullcontext(source) if hasattr(source, "read") else open(source, "rb") as stream:
                    for line in self._read(stream):
                        lines.put(line)
                lines.put(None)
            except Exception as error:
                lines.put(error)

        threading.Thread(target=read, daemon=True).start()
        while True:
            try:
                item = lines.get(timeout=self.wait)
            except queue.Empty:
                raise OSError(f"nothing more arrived within {self.wait:g} s") from None
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item


def read_rows(name: str, wait: float) -> Iterator[Row | WrongRow]:
    """The rows of an input file, by its extension; `-` is JSON lines on standard input.

    Raises:
        Failure: file_unreadable; usage for another extension.
    """
    kind = ".jsonl" if name == "-" else os.path.splitext(name)[1].lower()
    if kind not in INPUTS:
        raise Failure("usage", f"--input: must end in one of {', '.join(INPUTS)} or be -, got {shown(name)}")
    lines = Lines(name, wait)
    reader = {".jsonl": json_rows, ".csv": csv_rows, ".txt": text_rows}[kind]
    return (checked_row(line, raw) for line, raw in reader(lines))


def json_rows(lines: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    """A JSON object a line; what is wrong with a line stands in place of its object, as an exception."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, parse_json(line.decode())
        except UnicodeDecodeError:
            yield number, ValueError("is not text in UTF-8")
        except ValueError as error:
            yield number, ValueError(f"is not valid JSON: {error}")


def text_rows(lines: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    """A prompt a line."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, {"prompt": line.decode().strip()}
        except UnicodeDecodeError:
            yield number, ValueError("is not text in UTF-8")


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
        if not {"prompt"} <= set(names) <= set(ROW_SCHEMA["properties"]) or len(set(names)) < len(names):
            known = ", ".join(ROW_SCHEMA["properties"])
            yield blank + 1, ValueError(f"the header must name columns of {known}, each once, prompt among them")
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


def csv_object(names: Sequence[str], cells: Sequence[str]) -> Any:
    """The row that the cells of a line mean, typed as in JSON."""
    if len(cells) > len(names):
        return ValueError(f"has {len(cells)} cells, the header names {len(names)}; a prompt with commas needs quotes")
    row: dict[str, Any] = {name: cell for name, cell in zip(names, cells, strict=False) if cell.strip()}
    for name in row.keys() - {"prompt"}:
        row[name] = row[name].strip()
    if re.fullmatch(r"-?[0-9]{1,18}", row.get("seed", "")):
        row["seed"] = int(row["seed"])
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
    own = {name: raw[name] for name in ("id", "output") if name in raw}
    request = {name: value for name, value in raw.items() if name not in own}
    sentences = []
    if "base_url" in raw or not is_plainly_valid(request) or not all(is_text(value) for value in own.values()):
        sentences = [problem.text for problem in request_problems(raw, ROW_SCHEMA)]
    if not sentences and len(own.get("id", "")) > MAX_ID_LENGTH:
        sentences.append(f"id: longer than {MAX_ID_LENGTH} characters")
    if not sentences and "id" in own and own["id"] != outside_text(own["id"], MAX_ID_LENGTH):
        sentences.append("id: has control characters, blanks around it, or what looks like a key in it")
    if sentences:
        return WrongRow(line, sentences)
    normalized = normalize(request | {"seed": max(0, int(request.get("seed", 0)))})
    seed = int(request.get("seed", -1))
    written = json.dumps(raw, sort_keys=True, ensure_ascii=False)
    fingerprint = hashlib.sha256(written.encode()).hexdigest()[:32]
    return Row(line, own.get("id"), own.get("output"), normalized, None if seed == -1 else seed, fingerprint)


def is_text(value: object) -> bool:
    return isinstance(value, str) and value.strip() != ""


# ═══════════════════════════════════════════════════════════════════════════════════════════════════
# 3. Names in the folder: where images, thumbnails and evidence lie
# ═══════════════════════════════════════════════════════════════════════════════════════════════════


def numbered(number: int) -> str:
    return f"{number:06d}"


def spread(number: int) -> str:
    """The folder of a file with that number, among many."""
    return f"{number // FOLDER_SIZE:04d}"


def default_output_name(number: int, name: str) -> str:
    """Path in the folder of an image that its row gives none: its number, and a slug of the row's id or prompt."""
    file = "-".join(filter(None, (numbered(number), slug_of(name)))) + ".png"
    folder = IMAGES if number < FOLDER_SIZE else f"{IMAGES}/{spread(number)}"
    return f"{folder}/{file}"


def evidence_name(number: int) -> str:
    return f"{EVIDENCE}/{spread(number)}/{numbered(number)}.json"


def thumb_name(number: int) -> str:
    return f"{THUMBS}/{spread(number)}/{numbered(number)}.jpg"


def variant_output(output: str, variant: int) -> str:
    """The file of a variant: the row's own name for the first, with a number behind it for the others."""
    stem, suffix = posixpath.splitext(output)
    return f"{stem}-{variant + 1}{suffix}" if variant else output


def output_key(output: str) -> str:
    """The same for all names that some file system takes for one: case and Unicode form are folded."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", output).casefold())


class Names:
    """Checks the outputs that rows name. Folders are examined once each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._real = os.path.realpath(folder)
        self._inside: dict[str, bool] = {}

    def checked(self, output: str, request: ImageRequest) -> str:
        """The output as a path in the folder, with `/`.

        Raises:
            Failure: invalid_output.
        """

        def refuse(what: str) -> NoReturn:
            raise Failure("invalid_output", f"output: {what}")

        if "\\" in output or output != output.strip():
            refuse("must not hold backslashes or begin or end with blanks")
        if output.startswith("/") or re.match("[A-Za-z]:", output) or ".." in output.split("/"):
            refuse("must be a path in the output folder, without .. and not absolute")
        path = checked_output(str(self.folder / output), "output")
        raise_problems([Problem(p.code, p.text.replace("--output", "output")) for p in format_problems(request, path)])
        name = posixpath.normpath(output)
        if name.split("/")[0].casefold() in (THUMBS, EVIDENCE) or re.match(rf"(?i){IMAGES}/(\d{{4,}}/)?\d{{6,}}", name):
            refuse(f"{outside_text(name, 100)} is a name that the batch gives itself")
        if not self.stays_inside(posixpath.dirname(name)):
            refuse(f"{outside_text(name, 100)} leaves the output folder through a symbolic link")
        return name

    def stays_inside(self, parent: str) -> bool:
        """Whether a folder below the output folder really lies there."""
        if parent not in self._inside:
            real = os.path.realpath(self.folder / parent)
            self._inside[parent] = os.path.commonpath([real, self._real]) == self._real
        return self._inside[parent]


# ═══════════════════════════════════════════════════════════════════════════════════════════════════
# 4. The folder's database: one process at a time writes it, anyone may read it
# ═══════════════════════════════════════════════════════════════════════════════════════════════════


class FolderLock:
    """One batch a folder, by a lock that the system drops with the process. A lock file that is left means nothing."""

    PATIENCE = 1.0  # seconds: somebody who only looks holds it for a moment

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._descriptor: int | None = None

    def take(self) -> bool:
        """Take the lock, until `release` or the end of the process; False where another process has it."""
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, OWNER_ONLY)
        until = time.monotonic() + self.PATIENCE
        while not self._try():
            if time.monotonic() > until:
                self.release()
                return False
            time.sleep(0.05)
        return True

    def is_taken(self) -> bool:
        """Whether some process has it now."""
        try:
            self._descriptor = os.open(self._path, os.O_RDWR)
        except OSError:
            return False
        try:
            return not self._try()
        finally:
            self.release()

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _try(self) -> bool:
        assert self._descriptor is not None
        try:
            if os.name == "nt":
                msvcrt: Any = importlib.import_module("msvcrt")
                msvcrt.locking(self._descriptor, msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


@contextlib.contextmanager
def database_failures(path: Path) -> Iterator[None]:
    """What the database says of the disk, or of itself, as a Failure."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if type(error) is sqlite3.DatabaseError:  # "file is not a database", "disk image is malformed"
            raise Failure("batch_unreadable", f"{path}: {outside_text(error)}") from None
        raise Failure("disk", f"{path}: {outside_text(error)}") from None


def database_uri(path: Path, *, read_only: bool) -> str:
    """Opening it to read must write nothing, not even the files beside it that a running batch keeps."""
    beside = path.with_name(path.name + "-wal").exists()
    mode = "mode=rw" if not read_only else "mode=ro" if beside else "immutable=1"
    return f"{path.as_uri()}?{mode}"


def open_database(folder: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """The database of an output folder.

    Raises:
        Failure: batch_unreadable, disk.
    """
    path = folder / DATABASE
    with database_failures(path):
        uri = database_uri(path, read_only=read_only)
        database = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=30, check_same_thread=False)
        check_version(database, path)
        if not read_only:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
    return database


def check_version(database: sqlite3.Connection, path: Path, schema: str = "main") -> None:
    (version,) = database.execute(f"PRAGMA {schema}.user_version").fetchone()
    if version != DATABASE_VERSION:
        raise Failure("batch_unreadable", f"{path}: written by another version of this tool ({version})")


def create_database(folder: Path) -> None:
    """Make the database and what lies beside it, all at once or not at all.

    Raises:
        Failure: disk.
    """
    path = folder / DATABASE
    temporary = folder / f".{DATABASE}.{os.getpid()}.part"
    with database_failures(path):
        try:
            ignore = folder / ".gitignore"
            if not ignore.exists():
                ignore.write_text(PRIVATE_FILES, encoding="utf-8")
            write_exclusively(temporary, b"", mode=OWNER_ONLY)
            database = sqlite3.connect(temporary)
            database.executescript(DATABASE_SCHEMA)
            database.execute(f"PRAGMA user_version = {DATABASE_VERSION}")
            database.commit()
            database.close()
            os.replace(temporary, path)
        except OSError as error:
            raise Failure("disk", f"{path} cannot be written: {os_reason(error)}") from None
        finally:
            temporary.unlink(missing_ok=True)


# ═══════════════════════════════════════════════════════════════════════════════════════════════════
# 5. Plan: the input held against the folder, and what that would cost, before anything is changed
# ═══════════════════════════════════════════════════════════════════════════════════════════════════

STAGE_SCHEMA = """
CREATE TABLE rows (
  position INTEGER PRIMARY KEY, line INTEGER, id TEXT UNIQUE, identity TEXT, fingerprint TEXT,
  prompt TEXT, size TEXT, seed INTEGER, prompt_extend INTEGER, output TEXT, price REAL
);
CREATE TABLE variants (variant INTEGER PRIMARY KEY);
CREATE TABLE outputs (key TEXT PRIMARY KEY, line INTEGER) WITHOUT ROWID;
CREATE TABLE parents (key TEXT PRIMARY KEY, line INTEGER) WITHOUT ROWID;
CREATE TABLE occurrences (position INTEGER PRIMARY KEY, occurrence INTEGER);
CREATE TABLE plan (position INTEGER, variant INTEGER, number INTEGER, kind TEXT, price REAL);
"""
# What becomes of a picture of the input. Displaced ones are not in it, but a row wants their file name.
TO_MAKE = ("new", "edited", "pending", "retried")
CHANGED = ("changed", "displaced")


class Survey(NamedTuple):
    """What an input means for a folder: pictures by kind, and the US$ they would cost."""

    rows: int
    pictures: Counter[str]
    cost: Counter[str]

    def made(self, *, with_changed: bool) -> tuple[int, float]:
        """How many pictures would be made, and for how many US$."""
        kinds = [*TO_MAKE, *(["changed"] if with_changed else [])]
        return sum(self.pictures[kind] for kind in kinds), round(sum(self.cost[kind] for kind in kinds), 6)


class Stage:
    """All rows of an input in a temporary database: not in memory, and before the folder is touched."""

    def __init__(self, provider: Provider, endpoint: Endpoint, variants: int, folder: Path) -> None:
        self.provider = provider
        self.endpoint = endpoint
        self.variants = variants
        self.folder = folder
        self.names = Names(folder)
        self.count = 0
        self.wrong = 0
        self.problems: list[Problem] = []
        self.db = sqlite3.connect("", uri=True, isolation_level=None)
        self.db.create_function("pick_seed", 0, pick_seed)
        self.db.executescript(STAGE_SCHEMA)
        self.db.executemany("INSERT INTO variants VALUES (?)", [(variant,) for variant in range(variants)])

    def load(self, rows: Iterable[Row | WrongRow]) -> None:
        """Take all rows.

        Raises:
            Failure: invalid_rows, with the first problems and their count.
        """
        with database_failures(Path("temporary database")):
            self.db.execute("BEGIN")
            for row in rows:
                sentences = row.sentences if isinstance(row, WrongRow) else self._add(row)
                self.wrong += bool(sentences)
                room = PROBLEMS_TOLD - len(self.problems)
                texts = [f"line {row.line}: {text}" for text in sentences[: max(0, room)]]
                self.problems += [Problem("invalid_rows", text) for text in texts]
            self._check_folders()
            self.db.execute("COMMIT")
            self._identify()
        if self.problems:
            texts = [problem.text for problem in self.problems]
            more = f"; the first {len(texts)} problems:" if self.wrong > len(texts) else ":"
            count = f"{self.wrong} wrong row{'s' * (self.wrong != 1)}{more}"
            more_facts = {"problem_count": self.wrong} if self.wrong > len(texts) else {}
            raise Failure("invalid_rows", f"{count} {'; '.join(texts)}", problems=texts, **more_facts)
        if not self.count:
            raise Failure("invalid_rows", "--input: has no rows", hint="give a file with at least one prompt")

    def _add(self, row: Row) -> list[str]:
        """Stage a row; returns what is wrong with it beside the others."""
        sentences = []
        output = None
        if row.output is not None:
            try:
                output = self.names.checked(row.output, row.request)
            except Failure as failure:
                return [failure.message]
            for variant in range(self.variants):
                sentences += self._claim(variant_output(output, variant), row.line)
        request = row.request
        price = self.provider.price(request, self.endpoint.region).estimate
        fields = (request.prompt, request.size, row.seed, request.prompt_extend, output, price)
        values = (self.count, row.line, row.id, None, row.fingerprint, *fields)
        try:
            self.db.execute(f"INSERT INTO rows VALUES ({', '.join('?' * len(values))})", values)
            self.count += 1
        except sqlite3.IntegrityError:
            (line,) = self.db.execute("SELECT line FROM rows WHERE id = ?", (row.id,)).fetchone()
            sentences.append(f"id: {shown(row.id)} is that of line {line} too")
        return sentences

    def _claim(self, output: str, line: int) -> list[str]:
        key = output_key(output)
        taken = self.db.execute("SELECT line FROM outputs WHERE key = ?", (key,)).fetchone()
        if taken:
            return [f"output: {outside_text(output, 100)} is that of line {taken[0]} too"]
        self.db.execute("INSERT INTO outputs VALUES (?, ?)", (key, line))
        while key := posixpath.dirname(key):
            self.db.execute("INSERT OR IGNORE INTO parents VALUES (?, ?)", (key, line))
        return []

    def _check_folders(self) -> None:
        """A name cannot be a file for one row and a folder for another."""
        both = "SELECT parents.line, outputs.line FROM parents JOIN outputs USING (key) LIMIT ?"
        for line, other in self.db.execute(both, (PROBLEMS_TOLD,)).fetchall():
            self.wrong += 1
            text = f"line {line}: output: its folder is a file of line {other}"
            self.problems += [Problem("invalid_rows", text)] * (len(self.problems) < PROBLEMS_TOLD)

    def _identify(self) -> None:
        """A row is its id, else its fingerprint and which one of its like it is: moving rows changes neither."""
        self.db.executescript("""
            INSERT INTO occurrences SELECT position, row_number() OVER (PARTITION BY fingerprint ORDER BY position)
              FROM rows WHERE id IS NULL;
            UPDATE rows SET identity = CASE WHEN id IS NOT NULL THEN 'id:' || id ELSE 'row:' || fingerprint || ':' ||
              (SELECT occurrence FROM occurrences WHERE occurrences.position = rows.position) END;
        """)

    def survey(self, *, retry_failed: bool, retry_unknown: bool, read_only: bool) -> Survey:
        """Hold the rows against the folder's database; without one, against an empty one."""
        path = self.folder / DATABASE
        with database_failures(path):
            if path.exists():
                self.db.execute("ATTACH ? AS folder", (database_uri(path, read_only=read_only),))
                check_version(self.db, path, "folder")
            else:
                self.db.execute("ATTACH ':memory:' AS folder")
                for statement in re.findall(r"CREATE TABLE \w+ \(.*?\);", DATABASE_SCHEMA, re.DOTALL):
                    self.db.execute(statement.replace("CREATE TABLE ", "CREATE TABLE folder."))
            place = (self.provider.name, self.endpoint.region, self.endpoint.url)
            match = "SELECT number FROM folder.services WHERE provider = ? AND region = ? AND endpoint = ?"
            (service,) = self.db.execute(match, place).fetchone() or (-1,)
            self.db.execute(
                """
                INSERT INTO plan SELECT r.position, v.variant, p.number,
                  CASE WHEN p.number IS NULL THEN 'new'
                       WHEN p.fingerprint <> r.fingerprint OR p.service <> ?
                         THEN CASE WHEN p.state = 'pending' AND p.paid = 0 THEN 'edited' ELSE 'changed' END
                       WHEN p.state = 'pending' THEN 'pending'
                       WHEN p.state = 'failed' AND ? THEN 'retried'
                       WHEN p.state IN ('unknown', 'submitting') AND ? THEN 'retried'
                       ELSE 'settled' END, r.price
                FROM rows r CROSS JOIN variants v
                LEFT JOIN folder.pictures p ON p.identity = r.identity AND p.variant = v.variant
                """,
                (service, retry_failed, retry_unknown),
            )
            self.db.execute("CREATE INDEX plan_numbers ON plan (number)")
            self.db.execute("""
                INSERT INTO plan SELECT NULL, NULL, p.number, 'displaced', 0
                FROM outputs o JOIN folder.pictures p ON p.output_key = o.key
                WHERE NOT (p.state = 'pending' AND p.paid = 0)
                  AND NOT EXISTS (SELECT 1 FROM plan WHERE plan.number = p.number)
            """)
            kinds = self.db.execute("SELECT kind, count(*), sum(price) FROM plan GROUP BY kind").fetchall()
        pictures, cost = {kind: n for kind, n, _ in kinds}, {kind: price for kind, _, price in kinds}
        return Survey(self.count, Counter(pictures), Counter(cost))

    def changed_rows(self, survey: Survey) -> Failure | None:
        """The failure that asks before pictures are made again for rows that were changed; None where none were."""
        changed = sum(survey.pictures[kind] for kind in CHANGED)
        if not changed:
            return None
        lines = self.db.execute(
            "SELECT DISTINCT line FROM plan JOIN rows USING (position) WHERE kind = 'changed' ORDER BY line LIMIT 6"
        ).fetchall()
        where = ", ".join(str(line) for (line,) in lines[:5]) + (", …" if len(lines) > 5 else "")
        count, cost = survey.made(with_changed=True)
        again = survey.pictures["changed"]
        return Failure(
            "changed_rows",
            f"{changed} picture{'s' * (changed != 1)} of this folder would be replaced, because rows "
            f"{f'(line {where}) ' if lines else ''}or provider, region or endpoint are not those of before: "
            f"{again} would be made again for US${survey.cost['changed']:.5g}, {count} in all for US${cost:.5g}",
            changes={
                "replaced": changed,
                "made_again": again,
                "made_again_cost": round(survey.cost["changed"], 6),
                "to_make": count,
                "to_make_cost": cost,
            },
        )

    def merge(self) -> None:
        """Write the plan into the folder's database, in one step; what was paid for before keeps its file.

        Raises:
            Failure: output_exists, disk.
        """
        with database_failures(self.folder / DATABASE):
            self.db.execute("PRAGMA folder.synchronous = FULL")
            self.db.execute("BEGIN IMMEDIATE")
            try:
                self._merge()
                self.db.execute("COMMIT")
            except sqlite3.IntegrityError:
                self.db.execute("ROLLBACK")
                raise Failure(
                    "output_exists", "output: a row wants a name that another picture of this folder has"
                ) from None
            except BaseException:
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")
                raise
            self.db.execute("DETACH folder")
        self.db.close()
        settle_moves(self.folder)

    def _merge(self) -> None:
        place = (self.provider.name, self.endpoint.region, self.endpoint.url)
        self.db.execute("INSERT OR IGNORE INTO folder.services (provider, region, endpoint) VALUES (?, ?, ?)", place)
        match = "SELECT number FROM folder.services WHERE provider = ? AND region = ? AND endpoint = ?"
        (service,) = self.db.execute(match, place).fetchone()
        # The seed of a row that names none: that of its other variants, else one is picked, for all of them.
        self.db.execute("""
            UPDATE rows SET seed = coalesce((SELECT (p.seed - p.variant + 2147483648) % 2147483648
              FROM folder.pictures p WHERE p.identity = rows.identity ORDER BY p.variant LIMIT 1), pick_seed())
            WHERE seed IS NULL
        """)
        kept = "SELECT {} FROM plan JOIN rows USING (position) WHERE plan.number = pictures.number AND kind IN {}"
        kinds = "('pending', 'retried', 'settled')"
        position, line = kept.format("rows.position", kinds), kept.format("rows.line", kinds)
        self.db.execute(
            f"UPDATE folder.pictures SET position = ({position}), line = ({line}) "
            f"WHERE position IS NOT ({position}) OR line IS NOT ({line})"
        )
        self.db.execute("DELETE FROM folder.pictures WHERE position IS NULL AND state = 'pending' AND paid = 0")
        numbers = self.db.execute(f"SELECT number FROM plan WHERE kind IN {CHANGED}").fetchall()
        for (number,) in numbers:
            self._set_aside(number)
        self.db.execute(
            "UPDATE folder.pictures SET state = 'pending' "
            "WHERE number IN (SELECT number FROM plan WHERE kind = 'retried')"
        )
        (first,) = self.db.execute("SELECT coalesce(max(number) + 1, 0) FROM folder.pictures").fetchone()
        new = self.db.execute("""
            SELECT variant, rows.* FROM plan JOIN rows USING (position)
            WHERE kind IN ('new', 'edited', 'changed') ORDER BY rows.position, variant
        """)
        self.db.executemany(
            """
            INSERT INTO folder.pictures (number, identity, variant, position, line, id, fingerprint, service,
              prompt, size, seed, prompt_extend, output, output_key, price)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
            """,
            (self._picture(number, service, *values) for number, values in enumerate(new, first)),
        )

    def _picture(
        self, number: int, service: int, variant: int, position: int, line: int, name: str | None, *rest: Any
    ) -> tuple[Any, ...]:
        identity, fingerprint, prompt, size, seed, extend, given, price = rest
        output = variant_output(given, variant) if given else default_output_name(number, name or prompt)
        seed = (seed + variant) % (MAX_SEED + 1)
        row = (number, identity, variant, position, line, name, fingerprint, service)
        return (*row, prompt, size, seed, extend, output, output_key(output), price)

    def _set_aside(self, number: int) -> None:
        """Give a picture whose row was changed another identity and file name, so that the new one can have them."""
        find = "SELECT output, moved_from, state FROM folder.pictures WHERE number = ?"
        output, moved_from, state = self.db.execute(find, (number,)).fetchone()
        stem, suffix = posixpath.splitext(output)
        name = f"{stem}-before-{numbered(number)}{suffix}"
        if state == "saved" and moved_from is None:
            with contextlib.suppress(FileNotFoundError, FileExistsError):
                link_or_copy(self.folder / output, self.folder / name)
            moved_from = output
        self.db.execute(
            "UPDATE folder.pictures SET identity = identity || '@' || number, position = NULL, line = NULL, "
            "output = ?, output_key = ?, moved_from = ? WHERE number = ?",
            (name, output_key(name), moved_from, number),
        )


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file, or where the file system has none, a copy."""
    try:
        os.link(source, target)
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError:
        shutil.copyfile(source, target)


def settle_moves(folder: Path) -> None:
    """Finish what `Stage.merge` began: a picture that got another name loses the old one, also after a kill."""
    database = open_database(folder)
    with contextlib.closing(database), database_failures(folder / DATABASE):
        moved = "SELECT number, output, moved_from, facts FROM pictures WHERE moved_from IS NOT NULL"
        for number, output, moved_from, said in database.execute(moved).fetchall():
            facts = json.loads(said)
            image = facts.get("image", {})
            old, new = folder / moved_from, folder / output
            with contextlib.suppress(OSError):
                if new.exists() and file_hash(old) == image.get("sha256"):
                    old.unlink()
            if image:
                image["path"] = str(new)
            evidence = folder / evidence_name(number)
            with contextlib.suppress(OSError, ValueError):
                content = json.loads(evidence.read_bytes())
                Evidence(evidence, content).record(output=str(new), image=content["image"] | {"path": str(new)})
            database.execute(
                "UPDATE pictures SET moved_from = NULL, facts = ? WHERE number = ?", (json.dumps(facts), number)
            )


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ═══════════════════════════════════════════════════════════════════════════════════════════════════
# 6. Journal: every step of every picture on disk before the next one
# ═══════════════════════════════════════════════════════════════════════════════════════════════════


class Job:
    """One picture at work: its plan, its evidence so far (in memory), what was paid, and when it is due."""

    def __init__(self, row: sqlite3.Row, plan: Plan) -> None:
        facts = json.loads(row["facts"])
        self.number = int(row["number"])
        self.line = row["line"]
        self.id = row["id"]
        self.state = str(row["state"])
        self.paid = int(row["paid"])
        self.plan = plan
        self.tries = 0  # of this run
        self.was_unknown = False
        self.evidence = Evidence(plan.evidence_path, plan.evidence(utc_now()) | {"attempts": []})
        if self.state == "pending":  # of earlier tries only the attempts are true of the next one
            facts = {"attempts": facts.get("attempts", [])}
        self.evidence.update(status=self.state, **facts)

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"line {self.line}" + (f" ({self.id})" if self.id else "") if self.line else f"picture {self.number}"

    @property
    def facts(self) -> str:
        data = self.evidence.data
        return json.dumps({name: data[name] for name in KEPT_FACTS if name in data}, ensure_ascii=False)


class Place(NamedTuple):
    """Where pictures are asked for, and with what key."""

    provider: Provider
    endpoint: Endpoint
    workspace: str | None
    key: Key


Services = Mapping[int, tuple[Provider, Endpoint]]


def read_services(database: sqlite3.Connection) -> Services:
    """The places that pictures of this folder come from, by number."""
    services = {}
    for number, name, region, url in database.execute("SELECT number, provider, region, endpoint FROM services"):
        provider = provider_named(name)
        root = url.removesuffix(provider.generate_path)
        services[number] = (provider, Endpoint(root, url, host_of(url), region))
    return services


def job_of(row: sqlite3.Row, folder: Path, services: Services, workspace: str | None) -> Job:
    """The work that a row of the database means."""
    provider, endpoint = services[row["service"]]
    request = ImageRequest(row["prompt"], row["size"], row["seed"], bool(row["prompt_extend"]))
    plan = Plan(
        provider=provider,
        endpoint=endpoint,
        request=request,
        payload=provider.payload(request),
        price=provider.price(request, endpoint.region),
        workspace=workspace,
        output=folder / row["output"],
        overwrite=False,
        evidence_path=folder / evidence_name(row["number"]),
        warnings=request_warnings(request),
    )
    return Job(row, plan)


class Journal:
    """The one writer of the database: a thread that puts what many workers say into common commits."""

    GROUP = 500  # statements a commit

    def __init__(self, folder: Path) -> None:
        self._path = folder / DATABASE
        self._database = open_database(folder)
        self._inbox: queue.SimpleQueue[tuple[str, Sequence[Any], Future[None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()

    def write(self, statement: str, values: Sequence[Any]) -> Future[None]:
        """Have a statement executed and committed; the future ends when it is on disk.

        Its exception is a Failure: disk.
        """
        done: Future[None] = Future()
        self._inbox.put((statement, values, done))
        return done

    def keep(self, job: Job, state: str) -> Future[None]:
        """Have the state of a picture committed."""
        job.state = state
        output = os.path.relpath(job.plan.output, self._path.parent).replace(os.sep, "/")
        return self.write(
            "UPDATE pictures SET state = ?, paid = ?, output = ?, output_key = ?, facts = ? WHERE number = ?",
            (state, job.paid, output, output_key(output), job.facts, job.number),
        )

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join()
        with contextlib.suppress(sqlite3.Error):
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._database.close()

    def _work(self) -> None:
        closing = False
        while not closing:
            group = [self._inbox.get()]
            with contextlib.suppress(queue.Empty):
                while len(group) < self.GROUP:
                    group.append(self._inbox.get_nowait())
            closing = None in group
            entries = [entry for entry in group if entry is not None]
            try:
                with database_failures(self._path):
                    self._commit([(statement, values) for statement, values, _ in entries])
            except Failure as failure:
                for _, _, done in entries:
                    done.set_exception(failure)
            else:
                for _, _, done in entries:
                    done.set_result(None)

    def _commit(self, statements: Iterable[tuple[str, Sequence[Any]]]) -> None:
        try:
            self._database.execute("BEGIN IMMEDIATE")
            for statement, values in statements:
                self._database.execute(statement, values)
            self._database.execute("COMMIT")
        except sqlite3.Error:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise


# ═══════════════════════════════════════════════════════════════════════════════════════════════════
# 7. Pacer: when the next request may leave
# ═══════════════════════════════════════════════════════════════════════════════════════════════════


class Pacer:
    """Evenly spaced starts, just under a rate limit, fitted to what the service answers.

    The spacing begins at SPACING times that of the limit. Each 429 holds all calls for as long as the service says
    and widens the spacing; quiet time closes it again, at once down to where the last 429 came, and beyond that
    point only in trials, one after a long quiet time, then faster while they go well. All moments are in seconds of
    time.monotonic().
    """

    STREAK = 5.0  # seconds; a 429 so soon after the last one is a sign that the limit is far off
    WIDEST_STEP = 1.25
    FIRST_TRIAL, LAST_TRIAL = 60.0, 1.0  # quiet seconds before the first step beyond a known limit, and at the fastest

    def __init__(self, per_minute: float, *, start: float) -> None:
        self.base = SPACING * 60 / per_minute if per_minute else 0.0
        self.spacing = self.base
        self.held_until = start
        self.refusals = 0
        self._next = start
        self._quiet_since = start
        self._closest = 0.0  # the spacing that is known to hold
        self._trial = self.FIRST_TRIAL
        self._step = REFUSED_STEP
        self._holds_in_a_row = 0

    @property
    def next_start(self) -> float:
        return max(self._next, self.held_until)

    def take(self, now: float) -> None:
        """Use the next start. One that was missed is not made up for: that would be a burst."""
        start = self.next_start if now - self.next_start < self.spacing / 2 else now
        self._next = start + self.spacing

    def refused(self, now: float, sent: float, wait: float | None) -> bool:
        """Take note of a 429 to a call sent at `sent`; true unless that call left before calls were last held."""
        news = sent >= self.held_until
        self.refusals += 1
        if news:
            self._holds_in_a_row += 1
            soon = self._closest > 0 and now - self.held_until < self.STREAK
            self._step = min(self._step**2, self.WIDEST_STEP) if soon else REFUSED_STEP
            self._closest = self.spacing * REFUSED_STEP
            self._trial = self.FIRST_TRIAL
        self.spacing = min(self.spacing * (self._step if news else REFUSED_STEP), WIDEST_SPACING)
        if wait is None:
            wait = min(HOLD_WITHOUT_WORD * 2.0 ** (self._holds_in_a_row - 1), LONGEST_HOLD_WITHOUT_WORD)
        self.held_until = max(self.held_until, now + wait)
        self._quiet_since = self.held_until
        return news

    def accepted(self, now: float, sent: float) -> None:
        """Take note of an answer that is no 429: after each quiet second calls come a step closer again."""
        self._holds_in_a_row = 0
        while self.spacing > self.base:
            closer = max(self.base, self.spacing * QUIET_STEP)
            known = closer >= self._closest
            if sent - self._quiet_since < (1.0 if known else self._trial):
                return
            self._quiet_since = now  # the next step waits for answers to calls that were sent at this one
            self.spacing = closer
            if not known:
                self._closest = closer
                self._trial = max(self.LAST_TRIAL, self._trial / 2)


# ═══════════════════════════════════════════════════════════════════════════════════════════════════
# 8. Work: what worker threads do with one picture, and what becomes of it
# ═══════════════════════════════════════════════════════════════════════════════════════════════════


class Outcome(NamedTuple):
    """What a worker reports. `failure` is None where the step went well; moments are of time.monotonic()."""

    step: str  # generate | save
    job: Job
    failure: Failure | None
    began: float
    seconds: float


def stops_the_run(failure: Failure) -> bool:
    """Whether every other picture would fail in the same way: key, balance, region, network set-up, disk."""
    return (
        failure.exit_code in (EXIT_KEY, EXIT_BALANCE, EXIT_DISK)
        or failure.code in ("not_found", "internal_error")
        or (failure.code == "unreachable" and not failure.fact("retryable"))
    )


def state_after(failure: Failure) -> str:
    """The state in which a failure leaves a picture."""
    if failure.code in ("link_expired", "image_unusable", "image_too_large", "hop_refused"):
        return "failed"
    if failure.billed == "yes":
        return "generated"
    if failure.billed == "unknown":
        return "unknown"
    return "pending" if stops_the_run(failure) or failure.exit_code == EXIT_UNAVAILABLE else "failed"


class Worker:
    """Takes one picture from one state to the next. Every method may run in many threads at once."""

    def __init__(self, journal: Journal, key: Key, timeout: float, until: float, thumbs: Path | None) -> None:
        self._journal = journal
        self._key = key
        self._timeout = timeout
        self._until = until  # no call lasts longer
        self._thumbs = thumbs

    def generate(self, job: Job) -> Outcome:
        """Send the paid request; on disk before it leaves and as soon as the link arrives."""
        plan, evidence, began = job.plan, job.evidence, time.monotonic()
        job.tries += 1
        evidence.update(status="submitting", started_at=evidence.data["started_at"])
        evidence.data["attempts"] = [*evidence.data["attempts"], {"at": timestamp(utc_now())}]
        job.paid += 1
        try:
            self._journal.keep(job, "submitting").result()
        except Failure as failure:
            job.paid -= 1
            return Outcome("generate", job, failure, began, 0.0)
        clock = self._clock()
        began = clock.start
        try:
            call = plan.provider.submit(plan.payload, plan.endpoint, self._key.value, plan.workspace)
            until = min(clock.generate_until, clock.end)
            generated = ask(
                call, lambda answer: plan.provider.read(answer, plan.request, utc_now()), until, plan.endpoint
            )
        except Failure as failure:
            return self._not_generated(job, failure, began)
        except Exception as error:  # a fault of this tool: the request may have left
            return self._not_generated(job, internal_error(error, billed="unknown", exit_code=EXIT_UNKNOWN), began)
        seconds = time.monotonic() - began
        evidence.end_attempt(http_status=200, outcome="generated", billed="yes")
        evidence.update(**generated_facts(generated, plan.warnings, clock))
        try:
            self._journal.keep(job, "generated").result()
        except Failure as failure:
            failure.facts |= {"billed": "yes", "image_url": generated.image_url}
            return Outcome("generate", job, failure, began, seconds)
        return Outcome("generate", job, None, began, seconds)

    def _not_generated(self, job: Job, failure: Failure, began: float) -> Outcome:
        seconds = time.monotonic() - began
        job.evidence.end_failed_attempt(failure, None)
        job.paid -= failure.billed == "no"
        return self._settled("generate", job, failure, began, seconds)

    def save(self, job: Job) -> Outcome:
        """Download, verify and save a picture that has been paid for, with its thumbnail and its evidence."""
        clock = self._clock()
        evidence, output = job.evidence, job.plan.output
        try:
            evidence.path.parent.mkdir(parents=True, exist_ok=True)
            source = fetch_source(evidence, job.plan.provider, clock)
            image = collect(evidence, source, output, overwrite=False, again=True)
            if self._thumbs:
                write_thumb(source, self._thumbs, job.number)
            finish(evidence, image, clock, clock.start)
            job.plan = job.plan._replace(output=Path(image["path"]))
            self._journal.keep(job, "saved").result()
            return Outcome("save", job, None, clock.start, time.monotonic() - clock.start)
        except Failure as error:
            failure = error
        except OSError as error:
            failure = Failure("disk_after_paying", f"{evidence.path} cannot be written: {os_reason(error)}")
        except Exception as error:
            failure = internal_error(error, billed="yes", exit_code=EXIT_UNKNOWN)
        return self._settled("save", job, failure, clock.start, time.monotonic() - clock.start)

    def _settled(self, step: str, job: Job, failure: Failure, began: float, seconds: float) -> Outcome:
        """Keep what became of a picture; where it is not simply sent again, its evidence file says so too."""
        state = state_after(failure)
        if state == "pending":
            job.evidence.update(error=failure.object())
        else:
            with contextlib.suppress(OSError):
                job.evidence.path.parent.mkdir(parents=True, exist_ok=True)
            explain(job.evidence, failure, [])
            settle(job.evidence, failure)
        try:
            self._journal.keep(job, state).result()
        except Failure as disk:
            disk.facts["billed"] = failure.billed
            return Outcome(step, job, disk, began, seconds)
        return Outcome(step, job, failure, began, seconds)

    def _clock(self) -> Clock:
        clock = Clock(self._timeout)
        clock.end = min(clock.end, self._until)
        return clock


def write_thumb(picture: Picture, folder: Path, number: int) -> None:
    """A small JPEG of a picture. The gallery does without one that cannot be written."""
    target = folder / thumb_name(number)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    with contextlib.suppress(OSError, ValueError):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            thumb(picture.image).save(temporary, "JPEG", quality=80)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def thumb(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image, at most THUMB_SIDE pixels wide and high."""
    small = image.reduce(max(1, max(image.size) // THUMB_SIDE)) if image.mode in ("RGB", "L") else image
    small = flattened(small)
    small.thumbnail((THUMB_SIDE, THUMB_SIDE))
    return small


# ═══════════════════════════════════════════════════════════════════════════════════════════════════
# 9. Run: which picture goes next, and when to stop
# ═══════════════════════════════════════════════════════════════════════════════════════════════════


class BatchOptions(NamedTuple):
    """The command line after checking: typed, defaults filled in. US$ and seconds; None is no bound."""

    mode: str  # make | status | gallery
    input: str | None
    prompt: str | None
    folder: Path
    variants: int
    concurrency: int | None
    rpm: float
    max_cost: float | None
    time_limit: float | None
    limit: int | None
    provider: Provider
    region: str | None
    base_url: str | None
    trusted: frozenset[str]
    timeout: float
    max_retries: int
    retry_failed: bool
    retry_unknown: bool
    accept_changes: bool
    dry_run: bool
    gallery: bool


class Tally:
    """How many pictures are in which state, what they cost, and what this run has changed."""

    def __init__(self, states: Mapping[str, int], spent: float) -> None:
        self.states = Counter(states)
        self.spent = spent  # US$ that were, or may have been, billed, or are reserved for requests that are out
        self.spent_before = spent
        self.sent: set[int] = set()
        self.ends: dict[int, str] = {}  # the state in which this run has left a picture

    def move(self, job: Job, before: str, after: str) -> None:
        self.states[before] -= 1
        self.states[after] += 1
        self.ends[job.number] = after


class Run:
    """One start of a batch: sends what is pending, downloads what is paid, stops when it must.

    All decisions are taken in the main thread, from what workers report; only `interrupt` is called from elsewhere
    (a signal handler).
    """

    def __init__(self, options: BatchOptions, place: Place, began: float, console: Console) -> None:
        self.options = options
        self.folder = options.folder
        self.console = console
        self.began = began
        self.database = open_database(self.folder)
        self.database.row_factory = sqlite3.Row
        self._workspace = place.workspace
        self._services = read_services(self.database)
        self._service = next(n for n, (_, there) in self._services.items() if there == place.endpoint)
        self._journal = Journal(self.folder)
        states, spent = totals(self.database)
        self.tally = Tally(states, spent)
        self.reserve = 0.5 + 4e-5 * sum(states.values())  # seconds to write results and gallery
        self.deadline = math.inf if options.time_limit is None else began + options.time_limit - self.reserve
        thumbs = self.folder if options.gallery else None
        self._worker = Worker(self._journal, place.key, options.timeout, self.deadline, thumbs)
        self._events: queue.SimpleQueue[Outcome | int] = queue.SimpleQueue()
        self._generators = ThreadPoolExecutor(options.concurrency or CONCURRENCY_RANGE[1], "generate")
        self._savers = ThreadPoolExecutor(DOWNLOADS_AT_ONCE, "save")
        self._pacer = Pacer(options.rpm, start=self._first_start())
        self._latencies: deque[float] = deque(maxlen=20)
        self._saving_times: deque[float] = deque(maxlen=20)
        self._known_latency = self._latency_before()
        self._out: dict[int, float] = {}  # number -> when its request left
        self._saving: set[int] = set()
        self._due: list[tuple[float, int, Job]] = []  # to be sent again
        self._feed: deque[Job] = deque()
        self._fed = (-1, -1)  # position and variant of the last pending picture read
        self._last_fed_save = -1
        self._saves_are_fed = False
        self._unknown_in_a_row = 0
        self._failures_in_a_row = {"generate": 0, "save": 0}
        self._gave_up: Failure | None = None  # why pictures were left pending after their retries
        self._stop: Failure | None = None
        self._bound: str | None = None  # what keeps the rest from being sent: limit | cost
        self._told = 0
        self.number = self._begin_run()
        self.progress = Progress(self.tally, self._journal, self.number, console)

    # What is known from before

    def _first_start(self) -> float:
        """Now, or a spacing after the last call of an earlier run: its minute counts at the service too."""
        (last,) = self.database.execute("SELECT max(updated_at) FROM runs").fetchone()
        if last is None or not self.options.rpm:
            return time.monotonic()
        age = (utc_now() - moment_of(last)).total_seconds()
        return time.monotonic() + min(max(0.0, SPACING * 60 / self.options.rpm - age), 60.0)

    def _latency_before(self) -> float | None:
        query = "SELECT latency_s FROM runs WHERE latency_s IS NOT NULL ORDER BY number DESC LIMIT 1"
        row = self.database.execute(query).fetchone()
        return float(row[0]) if row else None

    def _begin_run(self) -> int:
        (number,) = self.database.execute("SELECT coalesce(max(number), 0) + 1 FROM runs").fetchone()
        now = timestamp(utc_now())
        statement = "INSERT INTO runs (number, started_at, updated_at) VALUES (?, ?, ?)"
        self._journal.write(statement, (number, now, now)).result()
        return int(number)

    def job(self, row: sqlite3.Row) -> Job:
        return job_of(row, self.folder, self._services, self._workspace)

    # The loop

    def __call__(self) -> Failure | None:
        """Work until everything is done or something stops it; returns why not every picture is saved."""
        try:
            while True:
                now = time.monotonic()
                self._feed_savers()
                wait = self._send(now)
                if not self._out and not self._saving and wait is None:
                    break
                self._take_events(min(TICK, wait) if wait is not None else TICK)
                self.progress.tick()
        finally:
            self._generators.shutdown(wait=True, cancel_futures=True)
            self._savers.shutdown(wait=True, cancel_futures=True)
            self.progress.close()
        return self._ending()

    def interrupt(self, signum: int) -> None:
        """Send nothing new; what is out is waited for."""
        self._events.put(signum)

    def _take_events(self, wait: float) -> None:
        """Wait for a report, then take all that are there."""
        with contextlib.suppress(queue.Empty):
            event = self._events.get(timeout=max(0.0, wait))
            while True:
                if isinstance(event, Outcome):
                    self._take(event)
                else:
                    self._halt(interrupted_run(event))
                event = self._events.get_nowait()

    def _halt(self, failure: Failure) -> None:
        """Nothing new from now on; the first reason is the one that is told."""
        if self._stop is None:
            self._stop = failure
        no_more_waiting.set()

    # Sending

    def _send(self, now: float) -> float | None:
        """Send what may be sent now; returns the seconds until it is worth another look, None where nothing is left.

        The order of the questions matters: whatever ends the run comes before what only delays the next call.
        """
        while self._stop is None:
            job = self._next(now)
            if job is None or self._is_out_of_bounds(job):
                return self._later(job, now, self._due[0][0] - now if self._due else None)
            start = max(now, self._pacer.next_start)
            if start > self._last_start():
                self._halt_for_time()
                return self._later(job, now, None)
            crowded = len(self._out) >= self._concurrency(now) or len(self._saving) >= MOST_WAITING_DOWNLOADS
            if crowded or start > now:
                return self._later(job, now, TICK if crowded else start - now)
            try:
                check_space(self.folder, MIN_FREE_BYTES * (1 + len(self._out) + len(self._saving)))
            except Failure as failure:
                self._halt(failure)
                return self._later(job, now, None)
            self._pacer.take(now)
            self._start(job, now)
            now = time.monotonic()
        return None

    def _is_out_of_bounds(self, job: Job) -> bool:
        """Whether --limit or --max-cost keeps a picture from being sent in this run."""
        limit, ceiling = self.options.limit, self.options.max_cost
        if limit is not None and len(self.tally.sent | {job.number}) > limit:
            self._bound = "limit"
        elif ceiling is not None and self.tally.spent + job.plan.price.estimate > ceiling + 1e-9:
            self._bound = "cost"
        else:
            self._bound = None
        return self._bound is not None

    def _later(self, job: Job | None, now: float, wait: float | None) -> float | None:
        """Put a picture back to the front, and say when to look again."""
        if job is not None:
            self._feed.appendleft(job)
        return None if wait is None else max(0.0, wait)

    def _start(self, job: Job, now: float) -> None:
        self._out[job.number] = now
        self.tally.sent.add(job.number)
        self.tally.spent += job.plan.price.estimate
        self.tally.move(job, "pending", "submitting")
        self._generators.submit(self._work, self._worker.generate, job)

    def _work(self, step: Any, job: Job) -> None:
        self._events.put(step(job))

    def _next(self, now: float) -> Job | None:
        """The next picture to send: one whose retry is due, else the next of the input."""
        if self._due and self._due[0][0] <= now:
            return heapq.heappop(self._due)[2]
        if not self._feed:
            rows = self.database.execute(
                "SELECT * FROM pictures WHERE state = 'pending' AND (position, variant) > (?, ?) AND service = ? "
                "ORDER BY position, variant LIMIT 200",
                (*self._fed, self._service),
            ).fetchall()
            self._feed.extend(self.job(row) for row in rows)
            if rows:
                self._fed = (rows[-1]["position"], rows[-1]["variant"])
        return self._feed.popleft() if self._feed else None

    def _concurrency(self, now: float) -> int:
        """How many requests may be out: as many as the rate needs at the latency that is seen."""
        if self.options.concurrency:
            return self.options.concurrency
        if not self._pacer.base:
            return UNPACED_CONCURRENCY
        least, most = CONCURRENCY_RANGE
        latency = max(self._latencies, default=ASSUMED_LATENCY)
        latency = max([latency, *(now - sent for sent in self._out.values())])
        return min(most, max(least, math.ceil(1.25 * latency / self._pacer.base) + 2))

    @property
    def latency(self) -> float | None:
        """Seconds from request to answer, the longest of the last ones; None while none is known."""
        return max(self._latencies) if self._latencies else self._known_latency

    def _last_start(self) -> float:
        """The last moment at which a request may leave and still end, downloaded, before the time limit."""
        if self.latency is not None:
            return self._last_save() - 1.25 * self.latency
        return self.began + (self.deadline - self.began) / 3  # nothing is known: leave twice the time that has passed

    def _last_save(self) -> float:
        """The last moment at which a download may begin and still end before the time limit."""
        return self.deadline - 1.5 * max(self._saving_times, default=0.3)

    def _halt_for_time(self) -> None:
        limit = self.options.time_limit or 0.0
        if not self.tally.sent and self._known_latency and self.options.time_limit:
            least = 1.25 * self._known_latency + self.reserve + 1
            text = f"--time-limit: {limit:g} s is too short, a picture takes {self._known_latency:.0f} s here"
            if limit < least:
                self._halt(Failure("usage", text, hint=f"give at least --time-limit {math.ceil(least)}"))
        self._halt(Failure("time_limit", f"the time limit of {limit:g} s ends this run; what is left stays as it is"))

    # Reports

    def _take(self, outcome: Outcome) -> None:
        job, failure = outcome.job, outcome.failure
        now = time.monotonic()
        if outcome.step == "generate":
            sent = self._out.pop(job.number)
            self.tally.spent -= job.plan.price.estimate * (failure is not None and failure.billed == "no")
            if outcome.seconds and (failure is None or failure.billed != "no"):
                self._latencies.append(outcome.seconds)
            if failure is None or failure.code != "rate_limited":
                self._pacer.accepted(now, sent)
            before = "submitting"
        else:
            self._saving.discard(job.number)
            sent, before = outcome.began, "generated"
            if failure is None:
                self._saving_times.append(outcome.seconds)
        self.tally.move(job, before, job.state)
        if failure is None:
            self._failures_in_a_row[outcome.step] = 0
            if outcome.step == "generate":
                self._unknown_in_a_row = 0
                self._queue_save(job)
            return
        self._tell(job, failure)
        if failure.code == "rate_limited":
            self._hold(job, failure, now, sent)
        elif stops_the_run(failure):
            self._halt(failure)
        elif failure.billed == "unknown" or failure.exit_code == EXIT_UNAVAILABLE or job.state == "generated":
            self._count_failure(outcome.step, failure)
        else:  # the row's own fault: the service works
            self._failures_in_a_row[outcome.step] = 0
            self._unknown_in_a_row = 0
        if job.state == "pending" and self._stop is None:
            self._plan_retry(job, failure, now)

    def _hold(self, job: Job, failure: Failure, now: float, sent: float) -> None:
        wait = failure.facts.get("retry_after_s")
        if wait is not None and wait > self.options.timeout:
            self._halt(failure)
        elif self._pacer.refused(now, sent, wait):
            self._count_failure("generate", failure)

    def _count_failure(self, step: str, failure: Failure) -> None:
        """No storms: what fails again and again, or ends unknown again and again, is not tried on and on."""
        self._failures_in_a_row[step] += 1
        self._unknown_in_a_row += failure.billed == "unknown"
        if self._unknown_in_a_row >= UNKNOWN_IN_A_ROW:
            self._halt(storm(failure, f"{UNKNOWN_IN_A_ROW} outcomes in a row are unknown", EXIT_UNKNOWN))
        elif self._failures_in_a_row[step] >= FAILURES_IN_A_ROW:
            what = "calls" if step == "generate" else "downloads"
            self._halt(storm(failure, f"{FAILURES_IN_A_ROW} {what} in a row failed", EXIT_UNAVAILABLE))

    def _plan_retry(self, job: Job, failure: Failure, now: float) -> None:
        """Send a picture again after a wait, where its call surely was not billed and it has tries left."""
        if not failure.fact("retryable") or job.tries > self.options.max_retries:
            self._gave_up = failure
            return
        wait = failure.facts.get("retry_after_s", backoff(job.tries - 1))
        if wait > self.options.timeout:
            self._gave_up = failure
            return
        heapq.heappush(self._due, (now + wait, job.number, job))

    def _tell(self, job: Job, failure: Failure) -> None:
        """A line on stderr for a picture that will not come by itself."""
        if job.state in ("failed", "unknown") and self._told < FAILURES_TOLD:
            self._told += 1
            more = f" (further ones: {RESULTS})" if self._told == FAILURES_TOLD else ""
            self.progress.note(f"{job.state}: {job.name}: {failure.code}: {failure.message}{more}")

    # Saving

    def _queue_save(self, job: Job) -> None:
        self._saving.add(job.number)
        self._savers.submit(self._work, self._worker.save, job)

    def _feed_savers(self) -> None:
        """Hand on what earlier runs have paid for and not downloaded."""
        while self._stop is None and len(self._saving) < 2 * DOWNLOADS_AT_ONCE and not self._saves_are_fed:
            if time.monotonic() > self._last_save():
                return self._halt_for_time()
            rows = self.database.execute(
                "SELECT * FROM pictures WHERE state = 'generated' AND number > ? ORDER BY number LIMIT ?",
                (self._last_fed_save, DOWNLOADS_AT_ONCE),
            ).fetchall()
            for row in rows:
                if row["number"] not in self.tally.sent:
                    self._queue_save(self.job(row))
                self._last_fed_save = row["number"]
            self._saves_are_fed = not rows

    # The end

    def _ending(self) -> Failure | None:
        """Why the run ends other than with every picture saved; None where they are."""
        if self._stop is not None:
            return self._stop
        if self._gave_up is not None and self._failures_in_a_row["generate"]:
            return storm(self._gave_up, "pictures are left after their retries", EXIT_UNAVAILABLE)
        return incomplete(self.database, self._bound)

    def close(self, exit_code: int) -> None:
        """Note the end of the run and close the database."""
        now = timestamp(utc_now())
        latency = statistics.median(self._latencies) if self._latencies else None
        statement = "UPDATE runs SET updated_at = ?, finished_at = ?, exit_code = ?, latency_s = ? WHERE number = ?"
        self._journal.write(statement, (now, now, exit_code, latency, self.number))
        self._journal.close()
        self.database.close()


def incomplete(database: sqlite3.Connection, bound: str | None) -> Failure | None:
    """The failure of a run that ended by itself and left pictures of the input unsaved; None where all are saved."""
    rows = database.execute(
        "SELECT state, count(*) FROM pictures WHERE position IS NOT NULL OR state = 'generated' GROUP BY state"
    )
    left = Counter({state: count for state, count in rows if state != "saved"})
    if not left:
        return None
    why = {
        "failed": f"failed ones: {RESULTS} says why; --retry-failed makes them again (costs)",
        "unknown": "unknown ones may have been billed: ask the user, then --retry-unknown (costs again)",
        "generated": "generated ones are paid: run the same command again to download them, free",
        "pending": {
            "cost": "the rest waits for a higher --max-cost",
            "limit": "the rest waits: run the same command again",
        }.get(bound or "", "the rest waits: run the same command again"),
    }
    counts = ", ".join(f"{count} {state}" for state, count in sorted(left.items()))
    hints = [text for state, text in why.items() if left[state]]
    retryable = left["generated"] > 0 or (left["pending"] > 0 and bound != "cost")
    return Failure("incomplete", f"not every picture is saved: {counts}", hint="; ".join(hints), retryable=retryable)


def storm(failure: Failure, what: str, exit_code: int) -> Failure:
    """The failure of a run that stops because the last one came again and again."""
    unknown = exit_code == EXIT_UNKNOWN
    known = failure.exit_code == exit_code
    return Failure(
        failure.code if known else "outcome_unknown" if unknown else "service_failing",
        f"{what}; the last: {failure.message}",
        exit_code=exit_code,
        billed="unknown" if unknown else "no",
        retryable=not unknown,
        http_status=failure.facts.get("http_status"),
        service_code=failure.facts.get("service_code"),
        retry_after_s=failure.facts.get("retry_after_s"),
        hint="the rest stays pending; "
        + (
            "find out what is wrong with the service or the network before the same command goes on with it"
            if unknown
            else "wait a minute, then run the same command again"
        ),
    )


def interrupted_run(signum: int) -> Failure:
    return Failure(
        "interrupted",
        f"interrupted by {signal.Signals(signum).name}; requests that were out were waited for",
        exit_code=EXIT_SIGNAL + signum,
        retryable=True,
        hint="run the same command again: it goes on where it stopped",
    )


def host_of(url: str) -> str:
    return urlsplit(url).hostname or ""


# ═══════════════════════════════════════════════════════════════════════════════════════════════════
# 10. Before a run: what a dead one has left, and what has happened to the folder since
# ═══════════════════════════════════════════════════════════════════════════════════════════════════


def clean_up(folder: Path, console: Console) -> None:
    """Bring the folder to a state from which a run can start, and tell what was found.

    Requests that were out when a process died become unknown, its temporary files go, saved pictures whose file has
    vanished are downloaded again while their link lives.
    """
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.startswith(".") and name.endswith(".part"):
                remove_if_left_over(Path(parent, name))
    settle_moves(folder)
    database = open_database(folder)
    database.row_factory = sqlite3.Row
    with contextlib.closing(database), database_failures(folder / DATABASE):
        database.execute("BEGIN IMMEDIATE")
        lost = close_submitting(database, folder)
        again, gone = find_vanished(database, folder)
        database.execute("COMMIT")
    if lost:
        console.note(
            f"warning: {lost} request{'s' * (lost != 1)} of a run that was cut off may have been billed: unknown; "
            "--retry-unknown sends them again (costs)"
        )
    if again:
        console.note(f"warning: {again} saved pictures have vanished from the folder; they are downloaded again, free")
    if gone:
        console.note(
            f"warning: {gone} saved pictures have vanished from the folder and their links have expired; "
            "--retry-failed makes them again (costs)"
        )


def close_submitting(database: sqlite3.Connection, folder: Path) -> int:
    """Settle the requests that were out when their process died; returns how many are unknown now."""
    services = read_services(database)
    unknown = 0
    for row in database.execute("SELECT * FROM pictures WHERE state = 'submitting'").fetchall():
        job = job_of(row, folder, services, None)
        if not adopt(job):
            failure = Failure("outcome_unknown", "the run was cut off while the request was out")
            job.evidence.path.parent.mkdir(parents=True, exist_ok=True)
            explain(job.evidence, failure, [])
            settle(job.evidence, failure)
            unknown += 1
        database.execute(
            "UPDATE pictures SET state = ?, facts = ? WHERE number = ?",
            (job.evidence.data["status"], job.facts, job.number),
        )
    return unknown


def adopt(job: Job) -> bool:
    """Take over what the evidence file knows of the same attempt, where it got further than the database.

    That is so only where the disk failed under the database while it still took the picture or its evidence.
    """
    try:
        written = json.loads(job.evidence.path.read_bytes())
        same = len(written["attempts"]) == len(job.evidence.data["attempts"])
        link, image = written.get("response", {}).get("image_url"), written.get("image")
        if not same or written["status"] not in ("generated", "saved") or not link:
            return False
        saved = image is not None and file_hash(Path(image["path"])) == image["sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    job.evidence.update(**{name: written[name] for name in KEPT_FACTS if name in written})
    job.evidence.update(status="saved" if saved else "generated")
    return True


def find_vanished(database: sqlite3.Connection, folder: Path) -> tuple[int, int]:
    """Find saved pictures without a file; returns how many can be downloaded again, and how many cannot."""
    again = gone = 0
    rows = database.execute("SELECT number, output, position FROM pictures WHERE state = 'saved'")
    missing = [row for row in rows if not os.path.lexists(folder / row["output"])]
    for number, _, position in missing:
        (said,) = database.execute("SELECT facts FROM pictures WHERE number = ?", (number,)).fetchone()
        facts = json.loads(said)
        response = facts.get("response", {})
        alive = position is not None and moment_of(response.get("expires_at")) > utc_now()
        if not alive:
            failure = Failure("link_expired", "the saved file has vanished, and its link is not good any more")
            facts["error"] = failure.object()
        facts.pop("image", None)
        database.execute(
            "UPDATE pictures SET state = ?, facts = ? WHERE number = ?",
            ("generated" if alive else "failed", json.dumps(facts, ensure_ascii=False), number),
        )
        again += alive
        gone += not alive
    return again, gone


def check_outputs_are_free(folder: Path) -> None:
    """No picture may be paid for whose name is taken by a file that is not of this batch.

    Raises:
        Failure: output_exists, disk.
    """
    database = open_database(folder, read_only=True)
    taken: list[str] = []
    count = 0
    folders: set[Path] = set()
    with contextlib.closing(database), database_failures(folder / DATABASE):
        rows = database.execute(
            "SELECT line, output FROM pictures WHERE state = 'pending' AND position IS NOT NULL ORDER BY position"
        )
        for line, output in rows:
            path = folder / output
            if path.parent not in folders:
                folders.add(path.parent)
                check_space(path.parent)
            if os.path.lexists(path):
                count += 1
                taken += [f"line {line}: {path} exists already"] * (len(taken) < PROBLEMS_TOLD)
    if taken:
        raise Failure(
            "output_exists",
            "; ".join(taken),
            problems=taken,
            problem_count=count if count > len(taken) else None,
            hint="move these files away or give the rows another output; nothing is overwritten",
        )


# ═══════════════════════════════════════════════════════════════════════════════════════════════════
# 11. Results: a line a picture for programs, a page for people
# ═══════════════════════════════════════════════════════════════════════════════════════════════════


def totals(database: sqlite3.Connection) -> tuple[dict[str, int], float]:
    """Pictures by state, of those that are listed, and the US$ that were, or may have been, billed in all."""
    states = database.execute(f"SELECT state, count(*) FROM pictures WHERE {LISTED} GROUP BY state")
    (spent,) = database.execute("SELECT coalesce(sum(price * paid), 0.0) FROM pictures").fetchone()
    return dict(states.fetchall()), round(spent, 6)


def counts(states: Mapping[str, int]) -> dict[str, int]:
    """The counts of a summary; what is out counts as in_flight, where there is any."""
    in_flight = states.get("submitting", 0) + states.get("submitted", 0)
    known = {name: states.get(name, 0) for name in ("saved", "failed", "unknown", "generated", "pending")}
    return {"total": sum(known.values()) + in_flight, **known, **({"in_flight": in_flight} if in_flight else {})}


def listed_pictures(database: sqlite3.Connection, folder: Path) -> Iterator[dict[str, Any]]:
    """What results and gallery say of each picture, in the order of the input; earlier inputs' pictures last."""
    several = {identity for (identity,) in database.execute("SELECT DISTINCT identity FROM pictures WHERE variant > 0")}
    rows = database.execute(
        f"SELECT * FROM pictures WHERE {LISTED} ORDER BY position IS NULL, position, variant, number"
    )
    for row in rows:
        facts = json.loads(row["facts"])
        image = facts.get("image", {}) if row["state"] == "saved" else {}
        said = facts.get("response", {})
        evidence = folder / evidence_name(row["number"])
        failed = row["state"] in ("failed", "unknown", "generated")
        entry = {
            "number": row["number"],
            "id": row["id"],
            "line": row["line"],
            "variant": row["variant"] if row["identity"] in several else None,
            "state": row["state"],
            "prompt": row["prompt"],
            "rewritten_prompt": said.get("rewritten_prompt"),
            "size": row["size"],
            "seed": row["seed"],
            "prompt_extend": bool(row["prompt_extend"]),
            "output": row["output"],
            "image_path": str(folder / row["output"]) if image else None,
            "width": image.get("width"),
            "height": image.get("height"),
            "bytes": image.get("bytes"),
            "sha256": image.get("sha256"),
            "evidence_path": str(evidence) if row["state"] == "saved" or failed else None,
            "request_id": said.get("request_id"),
            "estimated_cost": round(row["price"] * row["paid"], 6),
            "attempts": len(facts.get("attempts", [])),
            "finished_at": facts.get("finished_at") if row["state"] != "pending" else None,
            "warnings": [*facts.get("warnings", ()), *image.get("warnings", ())] or None,
            "error": facts.get("error") if row["state"] != "saved" else None,
            "in_input": None if row["position"] is not None else False,
        }
        yield {name: value for name, value in entry.items() if value is not None}


def write_results(database: sqlite3.Connection, folder: Path) -> Path:
    """Write results.jsonl in one step; returns its path.

    Raises:
        Failure: disk.
    """
    path = folder / RESULTS
    lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in listed_pictures(database, folder))
    replace_file(path, lines)
    return path


def replace_file(path: Path, parts: Iterable[str]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as target:
            target.writelines(parts)
            target.flush()
            os.fsync(target.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise Failure("disk", f"{path} cannot be written: {os_reason(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


TEMPLATE = Path(__file__).resolve().parent.parent / "assets" / "gallery.html"
SHOWN_FIELDS = (
    "number",
    "id",
    "variant",
    "state",
    "prompt",
    "rewritten_prompt",
    "size",
    "width",
    "height",
    "bytes",
    "seed",
    "finished_at",
    "warnings",
    "in_input",
)


def write_gallery(database: sqlite3.Connection, folder: Path, until: float) -> Path:
    """Write index.html in one step, and thumbnails that are missing while there is time; returns its path.

    Raises:
        Failure: disk.
    """
    try:
        page = TEMPLATE.read_text(encoding="utf-8")
    except OSError as error:
        raise Failure("disk", f"the gallery's page {TEMPLATE} cannot be read: {os_reason(error)}") from None
    make_missing_thumbs(database, folder, until)
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)[0]
    page = page.replace("__SCRIPT_HASH__", base64.b64encode(hashlib.sha256(script.encode()).digest()).decode())
    before, after = page.split("__BATCH_DATA__")
    path = folder / GALLERY
    replace_file(path, [before, *gallery_data(database, folder), after])
    return path


def gallery_data(database: sqlite3.Connection, folder: Path) -> Iterator[str]:
    """The page's data as JSON, in parts; safe inside a script element whatever the prompts are."""
    states, spent = totals(database)
    head: dict[str, Any] = {"title": folder.name, "made_at": timestamp(utc_now()), "version": VERSION}
    head |= counts(states) | {"estimated_cost": spent}
    yield inline_json(head)[:-1] + ',"pictures":['
    separator = ""
    for entry in listed_pictures(database, folder):
        shown_entry = {name: entry[name] for name in SHOWN_FIELDS if name in entry}
        shown_entry["cost"] = entry["estimated_cost"]
        evidence = evidence_name(entry["number"])
        if entry["state"] == "saved":
            shown_entry |= {"image": entry["output"], "thumb": thumb_name(entry["number"])}
        if "evidence_path" in entry:
            shown_entry["evidence"] = evidence
            shown_entry["replay"] = own_command("--replay", entry["evidence_path"])
        if "error" in entry:
            error = entry["error"]
            shown_entry["error"] = {name: error[name] for name in ("code", "message", "hint") if name in error}
        yield separator + inline_json(shown_entry)
        separator = ",\n"
    yield "]}"


def inline_json(value: Any) -> str:
    """JSON that no HTML parser can take for markup."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace").decode()
    return re.sub("[<>&\u2028\u2029\x7f-\x9f]", lambda sign: f"\\u{ord(sign[0]):04x}", text)


def make_missing_thumbs(database: sqlite3.Connection, folder: Path, until: float) -> None:
    """Make the thumbnails that a kill or --no-gallery has left out, from the saved files."""
    rows = database.execute("SELECT number, output FROM pictures WHERE state = 'saved'")
    missing = [tuple(row) for row in rows if not os.path.lexists(folder / thumb_name(row[0]))]

    def make(number: int, output: str) -> None:
        if time.monotonic() < until and not no_more_waiting.is_set():
            with contextlib.suppress(Failure, OSError):
                write_thumb(verified((folder / output).read_bytes()), folder, number)

    with ThreadPoolExecutor(os.cpu_count() or 2) as pool:
        list(pool.map(lambda entry: make(*entry), missing))


# ═══════════════════════════════════════════════════════════════════════════════════════════════════
# 12. Progress: what is told while it runs
# ═══════════════════════════════════════════════════════════════════════════════════════════════════


class Progress:
    """A bar on a terminal, a line every few seconds elsewhere, nothing with --quiet; and a row for --status."""

    WINDOW = 60.0  # seconds over which the rate is taken

    def __init__(self, tally: Tally, journal: Journal, run: int, console: Console) -> None:
        self._tally = tally
        self._journal = journal
        self._run = run
        self._console = console
        self._next_report = time.monotonic() + REPORT_EVERY
        self._done: deque[tuple[float, int]] = deque([(time.monotonic(), self._saved)])
        self._bar: Any = None
        if not console.quiet and sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            tqdm.monitor_interval = 0
            total = sum(tally.states.values())
            self._bar = tqdm(total=total, initial=self._saved, unit="picture", dynamic_ncols=True, smoothing=0.05)

    @property
    def _saved(self) -> int:
        return self._tally.states["saved"]

    def tick(self) -> None:
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(self._rest(), refresh=False)
            self._bar.update(self._saved - self._bar.n)
        if now >= self._next_report:
            self._next_report = now + REPORT_EVERY
            self._done.append((now, self._saved))
            while now - self._done[0][0] > self.WINDOW and len(self._done) > 2:
                self._done.popleft()
            self.keep()
            if self._bar is None:
                self._console.note(self._line())

    def note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            self._console.note(text)

    def keep(self) -> None:
        """What --status tells of a running batch."""
        facts = {"per_minute": round(self.per_minute, 1), "remaining_s": self.remaining}
        known = {name: value for name, value in facts.items() if value is not None}
        statement = "UPDATE runs SET updated_at = ?, progress = ? WHERE number = ?"
        self._journal.write(statement, (timestamp(utc_now()), json.dumps(known), self._run))

    def close(self) -> None:
        if self._bar is not None:
            self.tick()
            self._bar.close()

    @property
    def per_minute(self) -> float:
        (then, before), (now, after) = self._done[0], self._done[-1]
        return 60 * (after - before) / (now - then) if now > then else 0.0

    @property
    def remaining(self) -> float | None:
        """Seconds until everything that can be made is saved, at the rate of the last minute."""
        states = self._tally.states
        left = states["pending"] + states["submitting"] + states["generated"]
        return round(60 * left / self.per_minute) if self.per_minute else None

    def _line(self) -> str:
        total = sum(self._tally.states.values())
        remaining = self.remaining
        left = (
            ""
            if remaining is None
            else f", about {remaining / 60:.0f} min left"
            if remaining > 90
            else (f", about {remaining:.0f} s left")
        )
        return f"progress: {self._saved}/{total} saved, {self._rest()}, {self.per_minute:.0f} a minute{left}"

    def _rest(self) -> str:
        states = self._tally.states
        return f"{states['failed']} failed, {states['unknown']} unknown, US${self._tally.spent:.4g}"


# ═══════════════════════════════════════════════════════════════════════════════════════════════════
# 13. Commands: make, dry run, status, gallery
# ═══════════════════════════════════════════════════════════════════════════════════════════════════


def make(options: BatchOptions, console: Console, env: Mapping[str, str], began: float) -> Failure | None:
    """Make the pictures of an input; prints the summary and returns why not every picture is saved."""
    folder = options.folder
    lock = FolderLock(folder)
    locked = (folder / LOCK).exists() and not options.dry_run
    if locked:
        take_lock(lock, folder)
    stage, workspace = staged(options, env)
    if options.dry_run:
        console.answer(dry_run(options, stage, env))
        return None
    key = find_key(options.provider.key_places, env)
    prepare_folder(folder)
    if not locked:
        take_lock(lock, folder)
    if not (folder / DATABASE).exists():
        create_database(folder)
    clean_up(folder, console)
    survey = stage.survey(retry_failed=options.retry_failed, retry_unknown=options.retry_unknown, read_only=False)
    changed = stage.changed_rows(survey)
    if changed and not options.accept_changes:
        raise changed
    stage.merge()
    check_outputs_are_free(folder)
    import_libraries()
    run = Run(options, Place(options.provider, stage.endpoint, workspace, key), began, console)
    INTERRUPTIONS.pass_to(run)
    failure = run()
    conclude(run, failure, console)
    lock.release()
    return failure


def staged(options: BatchOptions, env: Mapping[str, str]) -> tuple[Stage, str | None]:
    """The input, validated as a whole, and the workspace.

    Raises:
        Failure: of exit code 2.
    """
    workspace, problems = workspace_of(options.provider, env)
    raise_problems(problems)
    endpoint = choose_endpoint(
        options.provider,
        flag=options.base_url,
        request_url=None,
        region=options.region,
        env=env,
        trusted=options.trusted,
    )
    stage = Stage(options.provider, endpoint, options.variants, options.folder)
    if options.prompt is not None:
        stage.load([checked_row(1, {"prompt": options.prompt})])
    else:
        stage.load(read_rows(options.input or "", options.timeout))
    return stage, workspace


def take_lock(lock: FolderLock, folder: Path) -> None:
    """Raise already_running, with its progress, where another process works on the folder."""
    try:
        taken = lock.take()
    except OSError as error:
        raise Failure("disk", f"{folder / LOCK} cannot be written: {os_reason(error)}") from None
    if not taken:
        progress = None
        with contextlib.suppress(Failure):
            progress = status(folder)
        raise Failure("already_running", f"another batch works on {folder}", progress=progress)


def prepare_folder(folder: Path) -> None:
    """Make the folder and its own subfolders, and see that they can be written.

    Raises:
        Failure: invalid_output, disk.
    """
    names = Names(folder)
    for name in ("", IMAGES, EVIDENCE, THUMBS):
        if not names.stays_inside(name):
            raise Failure("invalid_output", f"{folder / name} is a symbolic link that leaves the output folder")
    for name in ("", IMAGES, EVIDENCE):
        check_writable(folder / name, "batch")


def conclude(run: Run, failure: Failure | None, console: Console) -> None:
    """Write the results and print the summary; what cannot be written now does not undo what is saved."""
    folder, database = run.folder, run.database
    warnings = []
    files: dict[str, str] = {}
    writers: dict[str, Any] = {"results": lambda: write_results(database, folder)}
    if run.options.gallery:
        writers["gallery"] = lambda: write_gallery(database, folder, run.deadline)
    for name, write in writers.items():
        try:
            files[name] = str(write())
        except Failure as trouble:
            warnings.append(trouble.message)
    for text in warnings:
        console.note(f"warning: {text}")
    states, spent = totals(database)
    ends = Counter(run.tally.ends.values())
    this_run = counts(ends) | {"estimated_cost": round(run.tally.spent - run.tally.spent_before, 6)}
    summary = counts(states) | {
        "estimated_cost": spent,
        "elapsed_s": round(time.monotonic() - run.began, 3),
        **files,
        "this_run": this_run,
    }
    if warnings:
        summary["warnings"] = warnings
    if failure is not None:
        console.tell(failure)
        summary["error"] = failure.object()
    run.close(failure.exit_code if failure else EXIT_OK)
    if not console.data(summary):
        console.note(f"warning: standard output cannot be written; --status {folder} gives the counts")


def dry_run(options: BatchOptions, stage: Stage, env: Mapping[str, str]) -> dict[str, Any]:
    """What a run would make and cost, and everything that would stop it; nothing is sent, asked for or written."""
    survey = stage.survey(retry_failed=options.retry_failed, retry_unknown=options.retry_unknown, read_only=True)
    changed = stage.changed_rows(survey)
    problems = []
    for check in (
        lambda: find_key(options.provider.key_places, env).source,
        lambda: check_space(options.folder),
    ):
        try:
            check()
        except Failure as failure:
            problems.append(failure.object())
    if changed and not options.accept_changes:
        problems.append(changed.object())
    pictures, cost = survey.made(with_changed=options.accept_changes)
    if options.limit is not None:
        cost = round(cost * min(1.0, options.limit / pictures), 6) if pictures else 0.0
        pictures = min(pictures, options.limit)
    plan = {
        "ok": not problems,
        "rows": survey.rows,
        "variants": options.variants,
        "pictures": survey.rows * options.variants,
        "to_make": pictures,
        "estimated_cost": cost,
        "estimated_duration_s": round(duration(options, pictures)),
        "max_cost": options.max_cost,
        "rpm": options.rpm,
        "provider": options.provider.name,
        "region": stage.endpoint.region,
        "endpoint": stage.endpoint.url,
        "output_dir": str(options.folder),
        "billable": pictures > 0,
        "problems": problems,
    }
    return {name: value for name, value in plan.items() if value is not None}


def duration(options: BatchOptions, pictures: int) -> float:
    """Seconds that so many pictures take, at the rate limit or else at the number of requests that are out at once."""
    spacing = SPACING * 60 / options.rpm if options.rpm else 0.0
    at_once = options.concurrency or (CONCURRENCY_RANGE[1] if spacing else UNPACED_CONCURRENCY)
    return pictures * max(spacing, ASSUMED_LATENCY / at_once) + (ASSUMED_LATENCY if pictures else 0.0)


def existing_batch(folder: Path) -> sqlite3.Connection:
    """The database of a batch that has been started, to read.

    Raises:
        Failure: no_batch, batch_unreadable.
    """
    if not (folder / DATABASE).is_file():
        raise Failure("no_batch", f"{folder} holds no {DATABASE}")
    database = open_database(folder, read_only=True)
    database.row_factory = sqlite3.Row
    return database


def status(folder: Path) -> dict[str, Any]:
    """How far a batch is, read beside the process that works on it; nothing is written."""
    with contextlib.closing(existing_batch(folder)) as database, database_failures(folder / DATABASE):
        states, spent = totals(database)
        run = database.execute("SELECT * FROM runs ORDER BY number DESC LIMIT 1").fetchone()
    running = FolderLock(folder).is_taken()
    result: dict[str, Any] = {"running": running, **counts(states), "estimated_cost": spent}
    if run is not None:
        end = (
            utc_now() if running and run["finished_at"] is None else moment_of(run["finished_at"] or run["updated_at"])
        )
        result["elapsed_s"] = round((end - moment_of(run["started_at"])).total_seconds(), 1)
        result |= {"started_at": run["started_at"], "finished_at": run["finished_at"], "exit_code": run["exit_code"]}
        result |= json.loads(run["progress"]) if running else {}
    for name, file in (("results", RESULTS), ("gallery", GALLERY)):
        result[name] = str(folder / file) if (folder / file).exists() else None
    return {name: value for name, value in result.items() if value is not None}


def gallery_only(folder: Path) -> dict[str, Any]:
    """Write the gallery of a folder as it is now."""
    with contextlib.closing(existing_batch(folder)) as database, database_failures(folder / DATABASE):
        path = write_gallery(database, folder, math.inf)
        states, spent = totals(database)
    return counts(states) | {"estimated_cost": spent, "gallery": str(path)}


# ═══════════════════════════════════════════════════════════════════════════════════════════════════
# 14. Command line: options, streams and exit codes
# ═══════════════════════════════════════════════════════════════════════════════════════════════════

DESCRIPTION = "Turn a list of prompts into pictures with Z-Image Turbo. Run it again to go on; --dry-run costs nothing."
EPILOG = """\
input: .jsonl (an object a line: prompt, size or aspect_ratio, seed, prompt_extend, id, output), .csv (the same
names as columns), .txt (a prompt a line), or - for JSON lines on standard input.

exit codes:
  0  every picture saved                 6  rate limited, failing or not reachable
  1  some are not; run it again          7  too many unknown outcomes in a row
  2  invalid rows, usage or folder       9  the local disk
  3  key missing, wrong, no permission   11 time limit reached: run the same command again
  4  balance or quota used up            130, 143  interrupted: run the same command again

stdout carries one JSON object, the summary or the error. Progress and warnings go to stderr; after an error its
last line says what to do next.
"""


def build_parser() -> Parser:
    """The command line of the contract. Values stay text here: `read_options` checks them all at once."""
    parser = Parser(
        prog="generate_batch.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    mode = parser.add_argument_group("what to do (exactly one)")
    mode.add_argument("--input", metavar="FILE", help="the rows: .jsonl, .csv or .txt; - for JSON lines on stdin")
    mode.add_argument("--prompt", metavar="TEXT", help="one row: this prompt (see --variants)")
    mode.add_argument("--status", metavar="DIR", help="how far the batch in this folder is; also while it runs")
    mode.add_argument("--gallery-only", metavar="DIR", help="write the gallery of this folder again")

    what = parser.add_argument_group("pictures")
    what.add_argument("--output-dir", metavar="DIR", help="folder for state, images, results and gallery")
    what.add_argument("--variants", metavar="N", help="pictures of each row, with seed, seed+1, … (default 1)")
    what.add_argument("--limit", metavar="N", help="send at most N pictures in this run")
    what.add_argument("--max-cost", metavar="USD", help="never spend more on this folder, over all its runs")
    what.add_argument("--retry-failed", action="store_true", help="make failed pictures again (costs)")
    what.add_argument("--retry-unknown", action="store_true", help="pay again for pictures whose outcome is unknown")
    what.add_argument("--accept-changes", action="store_true", help="make pictures of changed rows again (costs)")

    pace = parser.add_argument_group("pace")
    pace.add_argument("--rpm", metavar="N", help="requests a minute; 0: no limit (default: the account's limit)")
    pace.add_argument("--concurrency", metavar="N", help="requests out at once (default: as the rate needs)")
    pace.add_argument("--time-limit", metavar="S", help="end within S seconds, exit 11; the same command goes on")
    pace.add_argument("--timeout", metavar="S", help=f"seconds for one picture (default {DEFAULT_TIMEOUT:g})")
    pace.add_argument("--max-retries", metavar="N", help=f"of a call surely not billed (default {DEFAULT_MAX_RETRIES})")

    service = parser.add_argument_group("service")
    service.add_argument("--base-url", metavar="URL", help="endpoint, …/api/v1 root or bare host")
    service.add_argument("--region", metavar="REGION", help="beijing (default) or singapore; the key belongs to one")
    service.add_argument(
        "--provider", metavar="NAME", help=f"one of {', '.join(PROVIDERS)} (default {DEFAULT_PROVIDER})"
    )
    service.add_argument(
        "--trust-host", metavar="HOST", action="append", help="send the key to this host too; repeatable"
    )

    result = parser.add_argument_group("result")
    result.add_argument("--dry-run", action="store_true", help="count, cost and duration; send and write nothing")
    result.add_argument("--no-gallery", action="store_true", help="no index.html and no thumbnails")
    result.add_argument("--quiet", action="store_true", help="no progress and no warnings on stderr")
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    return parser


MODES = ("input", "prompt", "status", "gallery_only")


def read_options(argv: Sequence[str], env: Mapping[str, str]) -> BatchOptions:
    """Check the command line as a whole.

    Raises:
        Failure: usage, naming every problem.
    """
    arguments, unknown = build_parser().parse_known_args(argv)
    given = {name: value for name, value in vars(arguments).items() if value is not None and value is not False}
    problems = [Problem("usage", text) for text in unknown_sentences(unknown)]
    modes = [name for name in MODES if name in given]
    if len(modes) != 1:
        names = " ".join(flag(name) for name in modes or MODES)
        text = f"give only one of {names}" if modes else f"give one of {names}"
        raise_problems([*problems, Problem("usage", text)])
    mode = modes[0]
    looking = mode in ("status", "gallery_only")
    if looking:
        strange = [name for name in given if name not in (mode, "quiet")]
        problems += [Problem("usage", f"{flag(name)} does not go with {flag(mode)}") for name in strange]
    elif not arguments.output_dir:
        problems.append(Problem("usage", "--output-dir: required, the folder for state, images, results and gallery"))

    def number(name: str, default: float, bounds: tuple[float, float]) -> float | None:
        """The number of an option; None where it is not given."""
        text = getattr(arguments, name)
        if text is None:
            return None
        with noting(problems):
            return number_option(flag(name), text, default, bounds)
        return None

    provider, region = provider_named(DEFAULT_PROVIDER), None
    with noting(problems):
        provider = provider_named(arguments.provider or DEFAULT_PROVIDER)
    with noting(problems):
        region = region_option(arguments.region, provider)
    trusted, more = trusted_hosts(arguments.trust_host or [], env)
    problems += more
    variants = number("variants", 1, (1, 10_000))
    concurrency = number("concurrency", 1, (1, 256))
    limit = number("limit", 1, (0, 10**9 - 1))
    rpm = number("rpm", 0.0, (0, 1_000_000))
    max_cost = number("max_cost", 0.0, (0, 1_000_000))
    time_limit = number("time_limit", 0.0, (1, 10_000_000))
    timeout = number("timeout", DEFAULT_TIMEOUT, TIMEOUT_RANGE)
    max_retries = number("max_retries", DEFAULT_MAX_RETRIES, MAX_RETRIES_RANGE)
    name = getattr(arguments, mode) if looking else arguments.output_dir
    folder = Path(os.path.abspath(name or "."))
    if name is not None and (not name or "\0" in name):
        problems.append(Problem("usage", "--output-dir: must be the path of a folder"))
    elif folder.exists() and not folder.is_dir():
        problems.append(Problem("usage", f"{flag(mode) if looking else '--output-dir'}: {folder} is not a folder"))
    raise_problems(problems)
    return BatchOptions(
        mode={"status": "status", "gallery_only": "gallery"}.get(mode, "make"),
        input=arguments.input,
        prompt=arguments.prompt,
        folder=folder,
        variants=int(variants or 1),
        concurrency=None if concurrency is None else int(concurrency),
        rpm=provider.requests_per_minute if rpm is None else rpm,
        max_cost=max_cost,
        time_limit=time_limit,
        limit=None if limit is None else int(limit),
        provider=provider,
        region=region,
        base_url=arguments.base_url,
        trusted=trusted,
        timeout=DEFAULT_TIMEOUT if timeout is None else timeout,
        max_retries=DEFAULT_MAX_RETRIES if max_retries is None else int(max_retries),
        retry_failed=arguments.retry_failed,
        retry_unknown=arguments.retry_unknown,
        accept_changes=arguments.accept_changes,
        dry_run=arguments.dry_run,
        gallery=not arguments.no_gallery,
    )


class Interruptions:
    """SIGINT and SIGTERM. Before a run they end the command; a run ends in order at the first, then at once."""

    def __init__(self) -> None:
        self._run: Run | None = None
        self._count = 0

    def install(self) -> None:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._handle)

    def pass_to(self, run: Run) -> None:
        self._run = run

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        self._count += 1
        if self._run is None:
            raise Interrupted(signum)
        if self._count == 1:
            self._run.interrupt(signum)
            os.write(2, b"interrupted: nothing new is sent; waiting for requests that are out (again: stop at once)\n")
        else:
            os.write(
                2, b"error: interrupted: stopped at once\nnext: run the same command again: it goes on from here\n"
            )
            os._exit(EXIT_SIGNAL + signum)


INTERRUPTIONS = Interruptions()


def run_command(options: BatchOptions, console: Console, env: Mapping[str, str], began: float) -> Failure | None:
    """Do what the options say and print its answer."""
    missing_packages(BATCH_REQUIREMENTS, __file__)
    check_working_folder()
    if options.mode == "status":
        console.answer(status(options.folder))
    elif options.mode == "gallery":
        console.answer(gallery_only(options.folder))
    else:
        return make(options, console, env, began)
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code of the contract."""
    began = time.monotonic()
    arguments = list(sys.argv[1:] if argv is None else argv)
    env = os.environ
    INTERRUPTIONS.install()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    for provider in PROVIDERS.values():
        remember_secret(env.get(provider.key_places.variable, "").strip())
    console = Console(json_mode=True, quiet="--quiet" in arguments)
    try:
        ending = run_command(read_options(arguments, env), console, env, began)
        return ending.exit_code if ending else EXIT_OK
    except SystemExit:  # argparse has printed help or version
        console.flush()
        return EXIT_OK
    except Failure as error:
        failure = error
    except Interrupted as interruption:
        failure = Failure(
            "interrupted",
            f"interrupted by {signal.Signals(interruption.signum).name} before anything was sent",
            exit_code=EXIT_SIGNAL + interruption.signum,
        )
    except ImportError as error:
        failure = missing_package(outside_text(error.name or error, 100), BATCH_REQUIREMENTS, __file__)
    except Exception as error:
        failure = internal_error(error)
    console.failure(failure)
    return failure.exit_code


if __name__ == "__main__":
    exit_code = main()
    for _signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_signum, signal.SIG_IGN)
    sys.exit(exit_code)
