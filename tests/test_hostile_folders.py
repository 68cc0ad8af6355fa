"""Batch folders of strangers: they may waste their reader's time, and touch, read and buy nothing beyond the input.

Each row is a folder that this tool made, and what somebody has done to it since. Every command is run on it, beside
files of the user's that must stay as they are. What a command is to answer stands in the row: the code of its error,
or nothing where it does its work.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pytest

from batch_helpers import PRICE, SMALL, Batch, by_prompt, locked_by_another, prompt_of
from conftest import GENERATE as SINGLE
from conftest import TEST_KEY, Result, Shell
from fault_server import GENERATE, PICTURE, Answer, FaultServer, error, file, good, png
from zimage.batch import examine
from zimage.batch.contract import DATABASE_SCHEMA
from zimage.batch.examine import FACTS_SCHEMA, fits_facts
from zimage.batch.folder import database_failures, open_database
from zimage.waiting import Stop, Stopped

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links and pipes of POSIX")

PROMPTS = ("saved", "also saved", "failed", "unknown", "pending")  # numbers 0 to 4, and their states
SECRET = b"SECRET of the user"
COMMANDS = ("status", "gallery", "dry run", "make")
IN_TIME = 10.0  # seconds for a command, on a busy machine


class Mine(NamedTuple):
    """Files of the user's beside the folder."""

    folder: Path

    @property
    def text(self) -> Path:
        return self.folder / "notes.txt"

    @property
    def picture(self) -> Path:
        return self.folder / "photo.png"

    @property
    def nowhere(self) -> Path:
        return self.folder / "nowhere"


class Hostile(NamedTuple):
    """What was done to a folder, and the error codes of the commands; "" where one does its work."""

    name: str
    do: Callable[[Path, Mine], object]
    status: str = "batch_unreadable"
    gallery: str = "batch_unreadable"
    dry_run: str = "batch_unreadable"
    make: str = "batch_unreadable"


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        yield server


@pytest.fixture(scope="module")
def original(server: FaultServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a picture in every state that a run leaves."""
    place = tmp_path_factory.mktemp("original")
    (place / "home").mkdir()
    batch = on_server(Shell(place, place / "home"), server)
    assert batch.run("--limit", "4", "--concurrency", "1").code == 1
    assert [batch.stored_states()[prompt].removeprefix("also ") for prompt in PROMPTS] == [
        "saved",
        "saved",
        "failed",
        "unknown",
        "pending",
    ]
    return batch.out


def on_server(shell: Shell, server: FaultServer) -> Batch:
    shell.env |= {"DASHSCOPE_API_KEY": TEST_KEY, "DASHSCOPE_BASE_URL": server.base_url}
    batch = Batch(shell, server)
    lost = good(how=Answer(hang_up="after-reading"))
    server.play(GENERATE, by_prompt({"failed": error(400, "DataInspectionFailed"), "unknown": lost}))
    server.play(PICTURE, file(png(512, 512)))
    batch.rows(*PROMPTS)
    return batch


@pytest.fixture
def batch(shell: Shell, server: FaultServer, original: Path) -> Iterator[Batch]:
    """A copy of that folder, and the same input."""
    batch = on_server(shell, server)
    batch.is_in_tables = True
    shutil.copytree(original, batch.out, symlinks=True)
    server.requests.clear()
    yield batch
    for path in shell.folder.iterdir():  # nobody is to read a pipe
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


@pytest.fixture
def mine(shell: Shell) -> Mine:
    folder = shell.folder / "mine"
    folder.mkdir()
    mine = Mine(folder)
    mine.text.write_bytes(SECRET)
    mine.text.chmod(0o640)
    mine.picture.write_bytes(png(512, 512, "crimson"))
    (shell.home / ".bashrc").write_bytes(SECRET)
    return mine


def state_of(*folders: Path) -> dict[str, tuple[Any, ...]]:
    """Every name below the folders, with its mode and content; a link's is where it leads."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in sorted(path for folder in folders for path in folder.rglob("*")):
        mode = path.lstat().st_mode
        content = path.read_bytes() if stat.S_ISREG(mode) else os.readlink(path) if stat.S_ISLNK(mode) else None
        found[str(path)] = (mode, content)
    return found


def command(batch: Batch, name: str) -> Result:
    arguments = {
        "status": ("--status", str(batch.out)),
        "gallery": ("--gallery-only", str(batch.out)),
        "dry run": batch.arguments("--dry-run"),
        "make": batch.arguments(),
    }
    began = time.monotonic()
    result = batch.call(*arguments[name])
    assert time.monotonic() - began < IN_TIME
    return result


def holds_secret(folder: Path) -> list[str]:
    """Files of the folder itself that hold what is the user's."""
    plain = [path for path in folder.rglob("*") if stat.S_ISREG(path.lstat().st_mode) and path.lstat().st_nlink == 1]
    return [str(path) for path in plain if SECRET in path.read_bytes()]


def attack(batch: Batch, mine: Mine, hostile: Hostile) -> None:
    """Run every command on the folder, and hold each to what must stand after all of them."""
    hostile.do(batch.out, mine)
    before = state_of(mine.folder, batch.shell.home)
    for name in COMMANDS:
        expected = getattr(hostile, name.replace(" ", "_"))
        result = command(batch, name)
        assert result.json.get("error", {}).get("code", "") == expected, (name, result.stdout)
        assert result.code == {"": 0, "incomplete": 1}.get(expected, 9 if expected == "disk" else 2), name
        assert state_of(mine.folder, batch.shell.home) == before, name
        assert not holds_secret(batch.out), name
    assert set(batch.sent) <= {"pending"} and len(batch.sent) <= 1
    assert hostile.make == "incomplete" or not batch.sent


# The database ---------------------------------------------------------------------------------------------------------


def does(*statements: str) -> Callable[[Path, Mine], None]:
    """Executed by somebody whom no rule of the database stops."""

    def do(out: Path, mine: Mine) -> None:
        with contextlib.closing(sqlite3.connect(out / "batch.sqlite3", isolation_level=None)) as database:
            for pragma in ("journal_mode = DELETE", "ignore_check_constraints = ON", "writable_schema = ON"):
                database.execute(f"PRAGMA {pragma}")
            for statement in statements:
                database.execute(statement.replace("{mine}", str(mine.folder)))

    return do


def rebuilt(old: str, new: str) -> Callable[[Path, Mine], None]:
    """The same rows in a database whose schema is another in one place."""

    def do(out: Path, mine: Mine) -> None:
        path = out / "batch.sqlite3"
        schema = DATABASE_SCHEMA.replace(old, new)
        assert schema != DATABASE_SCHEMA
        with contextlib.closing(sqlite3.connect(path)) as database:
            dump = [line for line in database.iterdump() if line.startswith('INSERT INTO "') and '"about"' not in line]
        path.unlink()
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.executescript(schema + ";".join(dump) + "; PRAGMA user_version = 1")

    return do


def file_is(change: Callable[[bytes], bytes]) -> Callable[[Path, Mine], None]:
    def do(out: Path, mine: Mine) -> None:
        path = out / "batch.sqlite3"
        path.write_bytes(change(path.read_bytes()))

    return do


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT {} FROM n"
ALL_COLUMNS = (
    "i number, 'x' || i identity, 0 variant, i position, i line, NULL id, 'f' fingerprint, 1 service, 'p' prompt, "
    "'512*512' size, 1 seed, 0 prompt_extend, 'o' output, 'o' || i output_key, 0.0 price, 0 paid, 'pending' state, "
    "'{}' facts, NULL moved_from"
)
SCHEMAS = {
    "a trigger": does(
        "CREATE TRIGGER t AFTER UPDATE ON pictures BEGIN UPDATE pictures SET state = 'pending', paid = 0; END"
    ),
    "endless pictures": does(
        "DROP TABLE pictures", f"CREATE VIEW pictures AS {ENDLESS}".replace("SELECT {}", f"SELECT {ALL_COLUMNS}")
    ),
    "endless runs": does("DROP TABLE runs", f"CREATE VIEW runs AS {ENDLESS.format('i number')}"),
    "another view": does("CREATE VIEW more AS SELECT * FROM pictures"),
    "our view, endless": does("DROP VIEW progress", f"CREATE VIEW progress AS {ENDLESS.format('i')}"),
    "another table": does("CREATE TABLE more (x)"),
    "a virtual table": does("CREATE VIRTUAL TABLE more USING fts5(x)"),
    "an index over an expression": does("CREATE INDEX more ON pictures (upper(prompt))"),
    "a missing index": does("DROP INDEX pictures_to_do"),
    "a generated column": rebuilt(
        "prompt        TEXT NOT NULL,", "prompt TEXT AS ('bought') VIRTUAL, prompt_ TEXT NOT NULL DEFAULT '',"
    ),
    "other types": rebuilt("price         REAL NOT NULL", "price BLOB NOT NULL"),
    "rows that are not unique": rebuilt("UNIQUE (identity, variant)", "CHECK (1)"),
    "a foreign key that deletes": rebuilt(
        "REFERENCES services (number)", "REFERENCES services (number) ON DELETE CASCADE"
    ),
    "a comment that hides": rebuilt("'pending' CHECK", "'pen--\nding' CHECK"),
    "statistics": does("ANALYZE"),
    "of another version": does("PRAGMA user_version = 2"),
    "no table": does("DROP TABLE pictures"),
    "an index of another table's pages": does(
        "UPDATE sqlite_master SET rootpage = (SELECT rootpage FROM sqlite_master WHERE name = 'runs') "
        "WHERE name = 'pictures_to_do'"
    ),
    "an index without its rows": does(
        "DELETE FROM sqlite_master WHERE name = 'pictures_to_do'",
        "INSERT INTO pictures SELECT 9, 'x', 0, 9, 9, NULL, 'f', service, 'p', size, 1, 0, 'o.png', 'o.png', 1, 0, "
        "'pending', '{}', NULL FROM pictures WHERE number = 0",
        "VACUUM",
    ),
    "broken schema": does("UPDATE sqlite_master SET sql = 'CREATE TABLE' WHERE name = 'runs'"),
    "a row that is there twice": rebuilt("UNIQUE (identity, variant)", "UNIQUE (identity, variant, number)"),
    "not a database": file_is(lambda content: b"these are no pages" * 1000),
    "empty": file_is(lambda content: b""),
    "cut": file_is(lambda content: content[: len(content) // 2]),
    "overwritten": file_is(lambda content: content[:4096] + bytes(4096) + content[8192:]),
    "of garbage": file_is(lambda content: content[:100] + os.urandom(len(content) - 100)),
}


def in_pictures(column: str, value: str, number: int = 0) -> Callable[[Path, Mine], None]:
    return does(f"UPDATE pictures SET {column} = {value} WHERE number = {number}")


VALUES = {
    "number": ("-1", "1 << 62"),
    "identity": ("x'00ff'", "hex(zeroblob(2000000))"),
    "variant": ("'first'", "-1"),
    "position": ("-1", "'first'", "1e30"),
    "line": ("0", "x'01'"),
    "id": ("x'00'", "CAST(x'ff' AS TEXT)"),
    "fingerprint": ("zeroblob(100)",),
    "service": ("99", "-1"),
    "prompt": ("CAST(x'ff' AS TEXT)", "zeroblob(20000000)", "'a' || char(0) || 'b'", "hex(zeroblob(1000000))"),
    "size": ("'abc'", "'99999*9'", "'512*512' || char(10)", "512"),
    "seed": ("'many'", "-2", "1 << 40", "1.5"),
    "prompt_extend": ("7", "'yes'"),
    "output": (
        "'../mine/new.png'",
        "'{mine}/new.png'",
        "'images/../../mine/new.png'",
        "'index.html'",
        "'evidence/0000/x.png'",
        "'BATCH.sqlite3.png'",
        "'images/a' || char(10) || '.png'",
        "'C:/mine/new.png'",
        "'..\\mine\\new.png'",
        "''",
        "x'00'",
    ),
    "output_key": ("x'00'",),
    "price": ("-1", "1e999", "'cheap'", "1e9"),
    "paid": ("-5", "'often'", "1 << 40"),
    "state": ("'bought'", "'submitted'"),
    "moved_from": ("'../mine/photo.png'", "'{mine}/photo.png'", "'index.html'", "'batch.lock'", "5"),
}
FACTS: tuple[object, ...] = (
    [],
    5,
    {"attempts": 5},
    {"attempts": [5]},
    {"attempts": [{"at": 5}]},
    {"attempts": [{"at": "2026-01-01T00:00:00Z", "billed": "perhaps"}]},
    {"response": []},
    {"response": {"image_url": 5}},
    {"response": {"image_url": "https://x.example/", "expires_at": "tomorrow"}},
    {"response": {"expires_at": 5}},
    {"response": {"seed": -1}},
    {"response": {"seed": 2**31}},
    {"image": "photo.png"},
    {"image": {"path": "/etc/passwd"}},
    {"image": {"path": 5, "sha256": "", "bytes": 1, "format": "PNG", "width": 1, "height": 1}},
    {"image": {"path": "/", "sha256": "", "bytes": True, "format": "PNG", "width": 1, "height": 1}},
    {"settings": {"model": 5}},
    {"settings": []},
    {"task_id": ""},
    {"warnings": [[]]},
    {"error": {"code": "x"}},
    {"timings_ms": {"total": "long"}},
    {"finished_at": "2026-01-01\x1b00:00:00Z"},
)
BAD_JSON = (
    "{",
    "'",
    '{"timings_ms": {"total": NaN}}',
    '{"timings_ms": {"total": 1e999}}',
    '{"task_id": "a", "task_id": "b"}',
    "[" * 5000,
    '{"response": {"usage": ' + '{"a":' * 5000 + "1" + "}" * 5000 + "}}",
)
RUNS = {
    "started_at": ("'yesterday'", "5", "''", "'2026-01-01' || char(27) || '00:00:00Z'"),
    "updated_at": ("'9'", "x'00'"),
    "finished_at": ("'never'",),
    "exit_code": ("'good'", "-1"),
    "latency_s": ("1e999", "-1", "'slow'"),
    "progress": ("'[]'", "'{'", "'null'", "5"),
    "number": ("1 << 62", "-1"),
}
SERVICES = {
    "provider": ("'nosuch'", "'../dashscope'", "x'00'"),
    "region": ("x'00'",),
    "endpoint": (
        "'file:///etc/passwd'",
        "'https://user@dashscope.aliyuncs.com/api/v1/services/aigc/multimodal-generation/generation'",
        "'http://127.0.0.1:1/'",
        "''",
        "5",
    ),
}


def quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


DATABASES = [
    *(Hostile(name, do) for name, do in SCHEMAS.items()),
    *(Hostile(f"{name} = {v:.40}", in_pictures(name, v)) for name, values in VALUES.items() for v in values),
    *(Hostile(f"facts = {v!s:.40}", in_pictures("facts", quoted(json.dumps(v)), 3)) for v in FACTS),
    *(Hostile(f"facts = {v:.30}", in_pictures("facts", quoted(v), 0)) for v in BAD_JSON),
    *(Hostile(f"runs.{n} = {v}", does(f"UPDATE runs SET {n} = {v}")) for n, values in RUNS.items() for v in values),
    *(
        Hostile(f"services.{n} = {v:.30}", does(f"UPDATE services SET {n} = {v}"))
        for n, values in SERVICES.items()
        for v in values
    ),
]


@pytest.mark.smoke
@pytest.mark.parametrize("hostile", DATABASES, ids=lambda hostile: hostile.name)
def test_a_database_that_this_tool_did_not_write_is_one_clear_error(batch: Batch, mine: Mine, hostile: Hostile) -> None:
    attack(batch, mine, hostile)


# Links, pipes and folders in every place ------------------------------------------------------------------------------


def gone(path: Path) -> Path:
    """The place of what lay there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    return path


def link(name: str, to: str = "notes.txt") -> Callable[[Path, Mine], None]:
    return lambda out, mine: gone(out / name).symlink_to(mine.folder / to)


def pipe(name: str) -> Callable[[Path, Mine], None]:
    return lambda out, mine: os.mkfifo(gone(out / name))


def folder(name: str) -> Callable[[Path, Mine], None]:
    return lambda out, mine: gone(out / name).mkdir()


def device(name: str) -> Callable[[Path, Mine], None]:
    return lambda out, mine: gone(out / name).symlink_to("/dev/zero")


def hard_link(name: str) -> Callable[[Path, Mine], None]:
    return lambda out, mine: os.link(mine.text, gone(out / name))


def both(*steps: Callable[[Path, Mine], object]) -> Callable[[Path, Mine], None]:
    def do(out: Path, mine: Mine) -> None:
        for step in steps:
            step(out, mine)

    return do


def moved_out(name: str) -> Callable[[Path, Mine], None]:
    """It lies among the user's files, and a link leads there."""

    def do(out: Path, mine: Mine) -> None:
        shutil.move(out / name, mine.folder / "moved")
        (out / name).symlink_to(mine.folder / "moved")

    return do


def linked_twice(out: Path, mine: Mine) -> None:
    os.link(out / "batch.sqlite3", mine.folder / "other.sqlite3")


def journal_that_deletes(out: Path, mine: Mine) -> None:
    """SQLite plays such a journal back, and then deletes the file that its end names."""
    journal = mine.folder / "journal"
    with contextlib.closing(sqlite3.connect(out / "batch.sqlite3", isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = DELETE")
        database.execute("PRAGMA synchronous = OFF")
        database.execute("BEGIN EXCLUSIVE")
        database.execute("PRAGMA cache_size = 1")
        database.execute("UPDATE pictures SET prompt = prompt || ' '")
        shutil.copy(out / "batch.sqlite3-journal", journal)
        database.execute("ROLLBACK")
    name = str(mine.text).encode()
    end = b"\0\0\0\0" + name + len(name).to_bytes(4, "big") + (sum(name) & 0xFFFFFFFF).to_bytes(4, "big")
    (out / "batch.sqlite3-journal").write_bytes(journal.read_bytes() + end + bytes.fromhex("d9d505f920a163d7"))
    journal.unlink()


WORKS = ("", "", "", "incomplete")
LOOKS = ("", "", "", "invalid_output")  # only a run writes there
PLACES = [
    Hostile("the database is a link", moved_out("batch.sqlite3")),
    Hostile("the database is a link to nowhere", link("batch.sqlite3", "nowhere")),
    Hostile("the database is a pipe", pipe("batch.sqlite3")),
    Hostile("the database is a folder", folder("batch.sqlite3")),
    Hostile("the database is a device", device("batch.sqlite3")),
    Hostile("the database has a second name", linked_twice),
    *(
        Hostile(f"{name} is {what}", how(f"batch.sqlite3-{name}"))
        for name in ("wal", "shm", "journal")
        for what, how in {"a link": link, "a pipe": pipe, "a folder": folder, "a hard link": hard_link}.items()
    ),
    Hostile("a journal that has a file deleted", journal_that_deletes),
    Hostile("index.html is a link", link("index.html"), *WORKS),
    Hostile("index.html is a link to nowhere", link("index.html", "nowhere"), *WORKS),
    Hostile("index.html is a hard link", hard_link("index.html"), *WORKS),
    Hostile("index.html is a pipe", pipe("index.html"), *WORKS),
    Hostile("index.html is a folder", folder("index.html"), "", "disk", "", "incomplete"),
    Hostile("results.jsonl is a link", link("results.jsonl"), *WORKS),
    Hostile("results.jsonl is a link to nowhere", link("results.jsonl", "nowhere"), *WORKS),
    Hostile("results.jsonl is a hard link", hard_link("results.jsonl"), *WORKS),
    Hostile("results.jsonl is a pipe", pipe("results.jsonl"), *WORKS),
    Hostile("results.jsonl is a folder", folder("results.jsonl"), *WORKS),
    Hostile("thumbs leads out", link("thumbs", "."), *LOOKS),
    Hostile("thumbs leads nowhere", link("thumbs", "nowhere"), *LOOKS),
    Hostile("thumbs/0000 leads out", link("thumbs/0000", "."), *LOOKS),
    Hostile("thumbs/0000 leads nowhere", link("thumbs/0000", "nowhere"), *LOOKS),
    Hostile("a thumbnail is a link", link("thumbs/0000/000000.jpg"), *WORKS),
    Hostile("a thumbnail to come is a link to nowhere", link("thumbs/0000/000004.jpg", "nowhere"), *WORKS),
    Hostile("images leads out", moved_out("images"), make="invalid_output"),
    Hostile("images leads nowhere", link("images", "nowhere"), make="invalid_output"),
    Hostile("evidence leads out", moved_out("evidence"), *LOOKS),
    Hostile("evidence leads nowhere", link("evidence", "nowhere"), *LOOKS),
    Hostile("evidence/0000 leads out", moved_out("evidence/0000"), *LOOKS),
    Hostile("evidence/0000 leads nowhere", link("evidence/0000", "nowhere"), *LOOKS),
    Hostile("an evidence file is a link", link("evidence/0000/000003.json"), *WORKS),
    Hostile("an evidence file is a pipe", pipe("evidence/0000/000003.json"), *WORKS),
    Hostile("an evidence file is a device", device("evidence/0000/000003.json"), *WORKS),
    Hostile("an evidence file is a folder", folder("evidence/0000/000003.json"), *WORKS),
    Hostile("an evidence file to come is a link", link("evidence/0000/000004.json"), *WORKS),
    Hostile("bytes that were handed over are a pipe", pipe("evidence/0000/000003.picture"), *WORKS),
    Hostile("bytes that were handed over are a folder", folder("evidence/0000/000000.picture"), *WORKS),
    Hostile("bytes of a number too large", link(f"evidence/0000/{'9' * 40}.picture"), *WORKS),
    Hostile("replaced leads out", link("replaced", "."), *LOOKS),
    Hostile("replaced leads nowhere", link("replaced", "nowhere"), *LOOKS),
    Hostile("batch.lock is a link", link("batch.lock"), *WORKS),
    Hostile("batch.lock is a link to nowhere", link("batch.lock", "nowhere"), *WORKS),
    Hostile("batch.lock is a pipe", pipe("batch.lock"), *WORKS),
    Hostile("batch.lock is a folder", folder("batch.lock"), *WORKS),
    Hostile("batch.lock is a hard link", hard_link("batch.lock"), *WORKS),
    Hostile("the reserve is a link", link(".batch.reserve"), *WORKS),
    Hostile("the reserve is a link to nowhere", link(".batch.reserve", "nowhere"), *WORKS),
    Hostile("the reserve is a hard link", hard_link(".batch.reserve"), *WORKS),
    Hostile("the reserve is a folder", folder(".batch.reserve"), *WORKS),
    Hostile(".gitignore is a link", link(".gitignore"), *WORKS),
    Hostile(".gitignore is a link to nowhere", link(".gitignore", "nowhere"), *WORKS),
    Hostile(
        "a name to come is a link to nowhere",
        link("images/000004-pending.png", "nowhere"),
        *("", "", "", "output_exists"),
    ),
    Hostile(
        "an output behind a link",
        both(link("more", "."), in_pictures("output", "'more/new.png'", 4)),
    ),
]


@pytest.mark.smoke
@pytest.mark.parametrize("hostile", PLACES, ids=lambda hostile: hostile.name)
def test_a_link_in_any_place_leads_nobody_out_of_the_folder(batch: Batch, mine: Mine, hostile: Hostile) -> None:
    attack(batch, mine, hostile)


@pytest.mark.parametrize("how", [link, pipe, device], ids=["link", "pipe", "device"])
def test_no_thumbnail_is_made_of_what_lies_outside(
    batch: Batch, mine: Mine, how: Callable[[str], Callable[[Path, Mine], None]]
) -> None:
    """A picture that is a link to one of the user's is no file of this folder."""
    steps = link("images/000000-saved.png", "photo.png") if how is link else how("images/000000-saved.png")
    thumb = batch.out / "thumbs" / "0000" / "000000.jpg"
    thumb.unlink()
    attack(batch, mine, Hostile("", steps, *WORKS))
    assert not thumb.exists()


def test_the_folder_itself_may_be_a_link_of_the_user(batch: Batch, mine: Mine) -> None:
    real = batch.out.rename(batch.shell.folder / "on another disk")
    batch.out.symlink_to(real)
    attack(batch, mine, Hostile("", lambda out, mine: None, *WORKS))
    assert batch.sent == ["pending"]


# What is bought -------------------------------------------------------------------------------------------------------

ROWS_OF_A_STRANGER = """
WITH RECURSIVE n(i) AS (SELECT 100 UNION ALL SELECT i + 1 FROM n WHERE i < 745)
INSERT INTO pictures SELECT i, 'row:' || i || ':1', 0, i, i, NULL, 'f' || i, 1, 'of a stranger', '512*512', 1, 0,
  'images/' || i || '.png', 'images/' || i || '.png', 0.0, {paid}, '{state}', '{{}}', NULL FROM n
"""


@pytest.mark.parametrize("state", ["pending", "failed", "unknown", "submitting"])
@pytest.mark.parametrize("paid", [0, 1])
def test_rows_of_a_stranger_are_not_bought(batch: Batch, mine: Mine, state: str, paid: int) -> None:
    does(ROWS_OF_A_STRANGER.format(state=state, paid=paid))(batch.out, mine)
    result = batch.run("--retry-failed", "--retry-unknown")
    assert result.code in (1, 7), result.stdout  # whether the row of the input that ends unknown comes last or not
    assert sorted(batch.sent) == ["failed", "pending", "unknown"]


@pytest.mark.parametrize(
    ("column", "value"), [("prompt", "'other'"), ("size", "'2048*2048'"), ("prompt_extend", "1"), ("price", "0.0")]
)
def test_a_row_is_sent_as_the_input_says(batch: Batch, mine: Mine, column: str, value: str) -> None:
    """A stranger has kept its fingerprint and changed what would be sent."""
    in_pictures(column, value, 4)(batch.out, mine)
    assert batch.run().code == 1
    (sent,) = batch.service.posts
    assert (prompt_of(sent), json.loads(sent.body)["parameters"]["size"]) == ("pending", SMALL)
    assert json.loads(sent.body)["parameters"]["prompt_extend"] is False
    assert batch.query("SELECT price FROM pictures WHERE prompt = 'pending'") == [(PRICE,)]


@pytest.mark.parametrize("column", ["prompt", "size", "prompt_extend"])
def test_a_row_that_may_have_been_paid_is_not_sent_as_another(batch: Batch, mine: Mine, column: str) -> None:
    value = {"prompt": "'other'", "size": "'2048*2048'", "prompt_extend": "1"}[column]
    in_pictures(column, value, 3)(batch.out, mine)
    result = batch.run("--retry-unknown")
    assert (result.code, result.error["code"], batch.sent) == (2, "changed_rows", [])


def test_a_seed_of_the_input_is_sent(batch: Batch, mine: Mine) -> None:
    batch.rows(*PROMPTS[:4], {"prompt": "pending", "seed": 7})
    assert batch.run("--limit", "0").code == 1
    does("UPDATE pictures SET seed = 8 WHERE prompt = 'pending'")(batch.out, mine)
    assert batch.run().code == 1
    (sent,) = batch.service.posts
    assert json.loads(sent.body)["parameters"]["seed"] == 7


def test_a_price_of_nothing_does_not_get_past_the_ceiling(batch: Batch, mine: Mine) -> None:
    does("UPDATE pictures SET price = 0.0")(batch.out, mine)
    assert batch.run("--retry-failed", "--retry-unknown", "--max-cost", str(1.5 * PRICE)).code == 1
    assert len(batch.sent) <= 2  # one that is refused costs nothing
    paid = batch.status().get("estimated_cost", 1.5 * PRICE)  # what was paid at no price is told as not known
    sent = len(batch.sent)
    assert batch.run("--retry-unknown", "--max-cost", str(paid)).code == 1
    assert len(batch.sent) == sent


@pytest.mark.parametrize("provider", ["dashscope", "openai"])
def test_links_to_this_machine_are_fetched_only_where_the_user_names_one(
    batch: Batch, mine: Mine, provider: str
) -> None:
    """The folder names a service here; the user's own is elsewhere."""
    path = {"dashscope": "/api/v1/services/aigc/multimodal-generation/generation", "openai": "/v1/images/generations"}
    facts = json.dumps({"response": {"image_url": f"{batch.service.root}/img/secret.png"}})
    where = f"{batch.service.root}{path[provider]}"
    does(
        f"INSERT INTO services VALUES (7, '{provider}', '{'' if provider == 'openai' else 'beijing'}x', '{where}')",
        f"UPDATE pictures SET service = 7, state = 'generated', facts = {quoted(facts)} WHERE number = 3",
    )(batch.out, mine)
    batch.shell.env["DASHSCOPE_BASE_URL"] = "https://dashscope.aliyuncs.com"
    batch.shell.env["HTTPS_PROXY"] = "http://127.0.0.1:9"
    batch.input.write_text('{"prompt": "of another folder"}\n')
    result = batch.run("--limit", "0")
    assert f"wait at {where}" in result.stderr
    assert batch.service.requests == []


# Evidence files of a folder -------------------------------------------------------------------------------------------


def test_an_evidence_file_names_no_picture_outside(batch: Batch, mine: Mine) -> None:
    """What it says is taken over only of a picture in the folder."""
    path = batch.out / "evidence" / "0000" / "000003.json"
    written = json.loads(path.read_bytes())
    digest = hashlib.sha256(mine.picture.read_bytes()).hexdigest()
    for target in (mine.picture, Path("/dev/zero"), Path("/proc/self/environ")):
        image = {"path": str(target), "sha256": digest, "bytes": 1, "format": "PNG", "width": 1, "height": 1}
        path.write_text(json.dumps(written | {"status": "saved", "image": image}))
        assert batch.run("--limit", "0").code == 1
        assert batch.stored_states()["unknown"] == "unknown"


NAMES = ("*.json", "a**b.json", "[a-z]+.json", "(.json", "a\nb.json", "?.json", "{x}.json")


@pytest.mark.parametrize("name", NAMES)
def test_evidence_names_are_literal(batch: Batch, mine: Mine, name: str) -> None:
    """A recovery removes what was in the making under its own name, and nothing that only looks like it."""
    place = batch.shell.folder / "given"
    place.mkdir()
    shutil.copy(batch.out / "evidence" / "0000" / "000000.json", place / name)
    foreign = [place / f".{stem}.999999999.0.part" for stem in ("other.json", "aXb.json", "x.json", "other.picture")]
    own = place / f".{name}.999999999.0.part"
    for path in (*foreign, own):
        path.write_bytes(b"")
    batch.shell.script = SINGLE
    result = batch.shell.call("--recover", str(place / name), "--print-response")
    assert result.code == 0, result.stdout
    assert all(path.exists() for path in foreign) and not own.exists()


RECOVERIES: dict[str, tuple[Callable[[Path, Mine], object], str]] = {
    "bytes that are a link": (lambda held, mine: held.symlink_to(mine.picture), "disk_after_paying"),
    "bytes that are a pipe": (lambda held, mine: os.mkfifo(held), "disk_after_paying"),
    "bytes that are a device": (lambda held, mine: held.symlink_to("/dev/zero"), "disk_after_paying"),
    "bytes that are a folder": (lambda held, mine: held.mkdir(), "disk_after_paying"),
}


@pytest.mark.parametrize("what", RECOVERIES)
def test_a_recovery_reads_no_bytes_through_a_link(batch: Batch, mine: Mine, what: str) -> None:
    place = batch.shell.folder / "given"
    place.mkdir()
    evidence = json.loads((batch.out / "evidence" / "0000" / "000003.json").read_bytes())
    evidence |= {"output": str(batch.shell.folder / "new.png"), "status": "submitting"}
    evidence.pop("error")
    (place / "given.json").write_text(json.dumps(evidence))
    (place / ".gitignore").symlink_to(mine.nowhere)
    do, code = RECOVERIES[what]
    do(place / "given.picture", mine)
    before = state_of(mine.folder)
    batch.shell.script = SINGLE
    result = batch.shell.call("--recover", str(place / "given.json"), "--print-response")
    assert (result.error["code"], state_of(mine.folder)) == (code, before)
    assert not (batch.shell.folder / "new.png").exists() and not batch.service.requests


@pytest.mark.parametrize("option", ["--recover", "--replay"])
@pytest.mark.parametrize("to", ["nowhere", "photo.png"])
def test_an_output_that_is_a_link_is_not_written_through(batch: Batch, mine: Mine, option: str, to: str) -> None:
    place = batch.shell.folder / "given"
    place.mkdir()
    output = place / "new.png"
    evidence = json.loads((batch.out / "evidence" / "0000" / "000000.json").read_bytes()) | {"output": str(output)}
    evidence |= {"status": "generated"}
    evidence.pop("image")
    (place / "given.json").write_text(json.dumps(evidence))
    output.symlink_to(mine.folder / to)
    before = state_of(mine.folder)
    batch.shell.script = SINGLE
    result = batch.shell.call(option, str(place / "given.json"), "--print-response")
    assert (result.code, state_of(mine.folder)) == (0, before)
    assert Path(result.json["image_path"]) != output and output.is_symlink()


# In time --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checking never ends, and SQLite is at it all the time."""
    monkeypatch.setattr(examine, "RULES", {"runs": {"number": f"({ENDLESS.format('count(*)')}) AND {{0}}"}})


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_every_command_in_time(batch: Batch, endless: None, name: str, number: signal.Signals) -> None:
    batch.shell.is_first_row = False  # it is this process that knows the endless check
    moments: list[float] = []

    def send() -> None:
        moments.append(time.monotonic())
        os.kill(os.getpid(), number)

    timer = threading.Timer(0.3, send)
    timer.start()
    result = command(batch, name)
    timer.join()
    assert (result.code, result.error["code"]) == (128 + number, "interrupted")
    assert time.monotonic() - moments[0] < 2


def test_a_database_that_takes_too_long_is_left(batch: Batch, endless: None) -> None:
    batch.shell.is_first_row = False
    for more in ((), ("--dry-run",)):
        began = time.monotonic()
        result = batch.run("--timeout", "1", *more)
        assert (result.code, result.error["code"]) == (2, "batch_unreadable")
        assert time.monotonic() - began < 3


@pytest.mark.parametrize("name", ["status", "gallery", "dry run"])
def test_who_only_looks_does_not_wait_long_for_a_lock(batch: Batch, mine: Mine, name: str) -> None:
    does()(batch.out, mine)
    with locked_by_another(batch.out / "batch.sqlite3", "BEGIN EXCLUSIVE"):
        (batch.out / "batch.sqlite3-wal").write_bytes(b"")  # else nobody asks for a lock
        began = time.monotonic()
        result = command(batch, name)
        assert result.error["code"] == "disk", result.stdout
        assert time.monotonic() - began < 3


def test_a_query_breaks_off_where_nothing_is_left_to_check(batch: Batch) -> None:
    """Also after the check: in a folder that is only large."""
    stop = Stop()
    with (
        pytest.raises(Stopped),
        database_failures(batch.out, stop),
        contextlib.closing(open_database(batch.out, read_only=True, stop=stop)) as database,
    ):
        threading.Timer(0.1, stop.request, ["SIGINT"]).start()
        database.execute(ENDLESS.format("count(*)"))


# The check of facts ---------------------------------------------------------------------------------------------------

GOOD_FACTS: tuple[object, ...] = (
    {},
    {"attempts": []},
    {"timings_ms": {"total": 1}},
    {"response": {"usage": {"a": [{}]}}},
    {"response": {"seed": 5}},
)


@pytest.mark.parametrize("facts", [*FACTS, *GOOD_FACTS], ids=lambda facts: f"{facts!s:.40}")
def test_facts_are_checked_as_jsonschema_would(facts: object) -> None:
    checker = jsonschema.FormatChecker()
    checker.checks("date-time")(examine.is_moment)
    expected = jsonschema.Draft202012Validator(FACTS_SCHEMA, format_checker=checker).is_valid(facts)
    settings = isinstance(facts, dict) and "settings" in facts and isinstance(facts["settings"], dict)
    assert fits_facts(facts) == expected == (facts in GOOD_FACTS or settings)
