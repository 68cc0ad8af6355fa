"""Databases: of a batch that somebody hands over, broken or forged, and what the commands make of them, in time."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fuzz.conftest import cases
from fuzz.place import Place, in_memory
from fuzz.services import GOOD_ANSWER, LINK, SMALL, Service
from fuzz.strategies import changed, changed_bytes, texts
from restored import FIXTURES, fixture_names
from zimage.batch.contract import DATABASE

NAMES = fixture_names("batch")
IN_TIME = 5.0  # seconds of processor time for a command that only looks


@functools.cache
def sql(name: str) -> str:
    """The database of a fixture, as statements."""
    text = (FIXTURES / f"{name}.sql").read_text(encoding="utf-8")
    text = text.replace("{{SERVER}}", "http://127.0.0.1:9").replace("{{EXPIRES_AT}}", "2099-01-01T00:00:00.000Z")
    return re.sub(r"\{\{[A-Z_]+\}\}", "4070908800", text.replace("{{FOLDER}}", "/nowhere"))


@functools.cache
def built(name: str) -> bytes:
    with tempfile.TemporaryDirectory(dir=in_memory()) as folder:
        path = Path(folder) / DATABASE
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
            database.executescript(sql(name))
        return path.read_bytes()


@functools.cache
def columns() -> list[tuple[str, str]]:
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.executescript(sql(NAMES[0]))
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return [(table, row[1]) for table in tables for row in database.execute(f"PRAGMA table_info({table})")]


FACTS = {
    "attempts": [{"at": "2026-10-01T12:00:00.000Z", "billed": "yes"}],
    "response": {"request_id": "r", "image_url": LINK, "expires_at": "2099-01-01T00:00:00Z"},
    "image": {"path": "x.png", "sha256": "0" * 64, "bytes": 1, "format": "PNG", "width": 1, "height": 1},
    "warnings": ["x"],
    "error": {"code": "blocked", "message": "x", "hint": "y", "exit_code": 5, "retryable": False, "billed": "no"},
    "task_id": "task_1",
}
values = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    texts.map(lambda text: text.encode("utf-8", "replace").decode()),
    st.binary(max_size=20),
    changed(FACTS).map(json.dumps),
    st.sampled_from(
        ["../../fox.png", "/etc/x.png", "images/../../x.png", "index.html", "saved", "generated", "pending"]
    ),
    st.sampled_from(
        ["submitting", "submitted", "zimageturbo", "diffusers", "https://evil.example/", "{}", "[]", "[" * 5000]
    ),
)
ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n)"
forgeries = st.one_of(
    st.tuples(st.sampled_from(columns()), values).map(
        lambda of: (f'UPDATE OR IGNORE {of[0][0]} SET "{of[0][1]}" = ?', [of[1]])
    ),
    st.tuples(st.sampled_from(columns()), values).map(
        lambda of: (f'UPDATE OR IGNORE {of[0][0]} SET "{of[0][1]}" = ? WHERE rowid = 1', [of[1]])
    ),
    st.sampled_from(columns()).map(lambda of: (f'ALTER TABLE {of[0]} DROP COLUMN "{of[1]}"', [])),
    st.sampled_from(columns()).map(lambda of: (f'ALTER TABLE {of[0]} RENAME COLUMN "{of[1]}" TO other', [])),
    st.sampled_from(columns()).map(lambda of: (f"DROP TABLE {of[0]}", [])),
    st.sampled_from(columns()).map(lambda of: (f"DELETE FROM {of[0]}", [])),
    st.integers(-(2**31), 2**31 - 1).map(lambda version: (f"PRAGMA user_version = {version}", [])),
    st.sampled_from(
        [
            ("CREATE TRIGGER t AFTER UPDATE ON runs BEGIN UPDATE pictures SET state = 'pending'; END", []),
            (f"ALTER TABLE runs RENAME TO old; CREATE VIEW runs AS {ENDLESS} SELECT x AS number FROM n", []),
            (f"ALTER TABLE pictures RENAME TO old; CREATE VIEW pictures AS {ENDLESS} SELECT x AS number FROM n", []),
            (f"ALTER TABLE pictures RENAME TO o; CREATE VIEW pictures AS {ENDLESS} SELECT o.* FROM o, n", []),
        ]
    ),
)


def put(place: Place, content: bytes, picture: bytes | None = None) -> Path:
    """A batch's folder with this database, and perhaps a picture; rows of its own beside it."""
    place.clear()
    folder = place.project / "out"
    (folder / "images").mkdir(parents=True)
    (folder / DATABASE).write_bytes(content)
    if picture is not None:
        (folder / "images" / "000000-a-fox.png").write_bytes(picture)
    (place.project / "rows.jsonl").write_text('{"prompt": "a fox", "size": "512x512"}\n{"prompt": "picture 1"}\n')
    return folder


LOOKS: dict[str, list[str]] = {
    "status": ["--status", "out"],
    "gallery": ["--gallery-only", "out"],
    "dry run": ["--input", "rows.jsonl", "--output-dir", "out", "--dry-run"],
}


def assert_looked_at(place: Place, content: bytes, look: str) -> None:
    """Told or refused, in time; nothing is sent, and nothing is written but the gallery and its thumbnails."""
    put(place, content, SMALL)
    before = place.files()
    done = place.run("generate_batch.py", *LOOKS[look])
    assert done.seconds < IN_TIME
    assert not (done.service.paid or done.service.asked or done.service.fetched)
    after = place.files()
    new = {name for name in after if after[name] != before.get(name)}
    allowed = r"deep/project/out/(index\.html|thumbs/\d{4,}/\d{6,}\.jpg)" if look == "gallery" else "(?!)"
    assert all(re.fullmatch(allowed, name) for name in new), new
    assert before.keys() <= after.keys()
    if done.code:
        assert done.error is not None and done.error["code"] in ("batch_unreadable", "disk", "no_batch", "changed_rows")


@cases(25, 1_500, name=st.sampled_from(NAMES), data=st.data(), look=st.sampled_from(list(LOOKS)))
def test_a_broken_database_is_told_or_refused(place: Place, name: str, data: st.DataObject, look: str) -> None:
    content = data.draw(changed_bytes(built(name), most=8) | st.binary(max_size=60) | st.just(built(name)))
    assert_looked_at(place, content, look)


def forged(name: str, statements: list[tuple[str, list[Any]]]) -> bytes:
    """The database of a fixture after these statements, those that it takes."""
    with tempfile.TemporaryDirectory(dir=in_memory()) as folder:
        path = Path(folder) / DATABASE
        path.write_bytes(built(name))
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
            for setting in ("ignore_check_constraints = 1", "synchronous = OFF", "journal_mode = MEMORY"):
                database.execute(f"PRAGMA {setting}")
            for statement, given in statements:
                with contextlib.suppress(sqlite3.Error):
                    database.executescript(statement) if ";" in statement and not given else database.execute(
                        statement, given
                    )
        return path.read_bytes()


@cases(
    25,
    1_000,
    name=st.sampled_from(NAMES),
    statements=st.lists(forgeries, min_size=1, max_size=3),
    look=st.sampled_from(list(LOOKS)),
)
def test_a_forged_database_is_told_or_refused(
    place: Place, name: str, statements: list[tuple[str, list[Any]]], look: str
) -> None:
    assert_looked_at(place, forged(name, statements), look)


@cases(10, 400, name=st.sampled_from(NAMES), statements=st.lists(forgeries, max_size=2))
def test_a_run_on_a_forged_database_buys_only_what_is_in_its_input(
    place: Place, name: str, statements: list[tuple[str, list[Any]]]
) -> None:
    folder = put(place, forged(name, statements))
    service = Service([GOOD_ANSWER])
    arguments = [
        "--input",
        "rows.jsonl",
        "--output-dir",
        "out",
        "--rpm",
        "0",
        "--retry-unknown",
        "--accept-changes",
        "--quiet",
    ]
    done = place.run("generate_batch.py", *arguments, service=service)
    prompts = [json.loads(call.body or b"")["input"]["messages"][0]["content"][0]["text"] for call in service.paid]
    assert set(prompts) <= {"a fox", "picture 1"} and len(prompts) == len(set(prompts))
    assert all(
        name.startswith(f"deep/project/{folder.name}/") for name in place.files() if not name.endswith("rows.jsonl")
    )
    assert done.seconds < 2 * IN_TIME
