"""The output folder of a batch in this process: rows are planned in it and pictures are work, as for a run.

    folder = Folder(tmp_path / "out")
    folder.plan("a fox", {"prompt": "an owl", "id": "owl"}, variants=2)   # what a start does before it sends anything
    folder.put(0, state="unknown", paid=1)                                # what an earlier run has left
    with folder.at_work() as work:
        outcome = work.worker().generate(work.job(0))

No call leaves; what the calls would have brought is scripted by the tests.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from conftest import TEST_KEY
from zimage.batch.contract import DATABASE
from zimage.batch.folder import create_database, open_database
from zimage.batch.inputs import Reading
from zimage.batch.jobs import Job, Jobs, Place, job_of, read_services
from zimage.batch.journal import Journal
from zimage.batch.moves import settle_moves
from zimage.batch.plan import Stage, Survey
from zimage.batch.rows import checked_row
from zimage.batch.work import Worker
from zimage.keys import Key
from zimage.registry import provider_named
from zimage.trust import Own, choose_endpoint
from zimage.waiting import Stop

SMALL = "512*512"


class Folder:
    """An output folder, and the place where its pictures are asked for."""

    def __init__(self, path: Path, provider: str = "dashscope", **how: Any) -> None:
        self.path = path
        self.at(provider, **how)

    def at(self, provider: str, *, url: str | None = None, settings: Mapping[str, Any] | None = None) -> Folder:
        """From now on pictures are asked for there."""
        set_up = provider_named(provider, settings)
        own = Own(url, frozenset(), {})
        endpoint = choose_endpoint(set_up, flag=url, request_url=None, region=None, env={}, trusted=own.trusted)
        self.place = Place(set_up, endpoint, None, Key(TEST_KEY, "x"), own)
        return self

    def stage(self, *rows: str | Mapping[str, Any], variants: int = 1, stop: Stop | None = None) -> Stage:
        """The rows, checked and not held against anything yet; a line each. Raises as `Stage.load`."""
        stage = Stage(self.place.provider, [self.place.endpoint], variants, self.path, stop or Stop(60))
        fields = [{"prompt": row} if isinstance(row, str) else dict(row) for row in rows]
        given = (checked_row(line, {"size": SMALL} | row) for line, row in enumerate(fields, 1) if row != BLANK)
        stage.load(given, Reading())
        return stage

    def survey(self, stage: Stage, *, failed: bool = False, unknown: bool = False, looks: bool = False) -> Survey:
        """What the rows mean for the folder; `looks`: it is only read."""
        if not looks and not (self.path / DATABASE).exists():
            self.path.mkdir(parents=True, exist_ok=True)
            create_database(self.path)
            settle_moves(self.path, Stop(60))
        return stage.survey(retry_failed=failed, retry_unknown=unknown, read_only=looks)

    def plan(self, *rows: str | Mapping[str, Any], variants: int = 1, **retried: bool) -> Survey:
        """What a start does with its rows before anything is sent; changes are accepted."""
        stage = self.stage(*rows, variants=variants)
        survey = self.survey(stage, **retried)
        stage.merge()
        return survey

    @contextlib.contextmanager
    def database(self) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(open_database(self.path)) as database:
            database.row_factory = sqlite3.Row
            yield database

    def pictures(self) -> list[dict[str, Any]]:
        """All that the database holds of each picture, by number."""
        with self.database() as database:
            return [dict(row) for row in database.execute("SELECT * FROM pictures ORDER BY number")]

    def picture(self, number: int) -> dict[str, Any]:
        (picture,) = (picture for picture in self.pictures() if picture["number"] == number)
        return picture

    def put(self, number: int, /, **columns: Any) -> None:
        """Change what the database holds of a picture; facts are given as an object."""
        if "facts" in columns:
            columns["facts"] = json.dumps(columns["facts"])
        values = {"number": number} | columns
        with self.database() as database:
            fields = ", ".join(f"{name} = ?" for name in values)
            database.execute(f"UPDATE pictures SET {fields} WHERE number = ?", (*values.values(), number))

    @contextlib.contextmanager
    def at_work(self) -> Iterator[AtWork]:
        """A run's ways into the folder."""
        with self.database() as database:
            journal = Journal(self.path)
            try:
                yield AtWork(self, database, Jobs(database, self.path, [self.place]), journal)
            finally:
                journal.close()


BLANK: dict[str, Any] = {}  # a line of the input that holds no row


class AtWork(NamedTuple):
    folder: Folder
    database: sqlite3.Connection
    jobs: Jobs
    journal: Journal

    def job(self, number: int) -> Job:
        place = self.folder.place
        (row,) = self.database.execute("SELECT * FROM pictures WHERE number = ?", (number,))
        services = dict(read_services(self.database))
        for known, (provider, endpoint) in services.items():
            if (provider.name, endpoint.url) == (place.provider.name, place.endpoint.url):
                services[known] = (place.provider, place.endpoint)
        return job_of(row, self.folder.path, services, place.workspace)

    def worker(self, *, timeout: float = 60.0, calls: Stop | None = None, thumbs: bool = False) -> Worker:
        return Worker(
            self.journal, [self.folder.place], timeout, calls or Stop(60), self.folder.path if thumbs else None
        )
