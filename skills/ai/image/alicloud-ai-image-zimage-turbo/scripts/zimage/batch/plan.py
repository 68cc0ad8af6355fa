"""Plan: the input held against the folder, and what that would cost, before anything is changed."""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zimage.batch.contract import DATABASE, DATABASE_SCHEMA, NO_SEED, PROBLEMS_TOLD
from zimage.batch.folder import database_failures, database_uri, harden, heed, service_number
from zimage.batch.inputs import Reading
from zimage.batch.jobs import services_alike
from zimage.batch.moves import settle_moves
from zimage.batch.names import (
    LONGEST_DEFAULT_NAME,
    Names,
    default_output_name,
    is_held,
    output_key,
    replaced_name,
    variant_output,
)
from zimage.batch.rows import Row, WrongRow
from zimage.contract import MAX_SEED
from zimage.endpoint import Endpoint
from zimage.errors import Failure, Problem
from zimage.outside import outside_text, shown
from zimage.paths import checked_output
from zimage.provider import Provider
from zimage.request import ImageRequest, pick_seed
from zimage.waiting import Stop

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
INSERT_ROW = "INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
# What becomes of a picture of the input. Displaced ones are not in it, but a row wants their file name.
TO_MAKE = ("new", "edited", "pending", "retried")
CHANGED = ("changed", "displaced")


class Survey(NamedTuple):
    """What an input means for a folder: pictures by kind, and the US$ they would cost."""

    rows: int
    pictures: Counter[str]
    cost: Counter[str]
    spent: float  # US$ that were, or may have been, billed for this folder before

    def made(self, *, with_changed: bool) -> tuple[int, float]:
        """How many pictures would be made, and for how many US$."""
        kinds = made_kinds(with_changed=with_changed)
        return sum(self.pictures[kind] for kind in kinds), round(sum(self.cost[kind] for kind in kinds), 6)


def made_kinds(*, with_changed: bool) -> tuple[str, ...]:
    return (*TO_MAKE, "changed") if with_changed else TO_MAKE


class Stage:
    """All rows of an input in a temporary database: not in memory, and before the folder is touched."""

    def __init__(
        self, provider: Provider, endpoints: Sequence[Endpoint], variants: int, folder: Path, stop: Stop
    ) -> None:
        self.provider = provider
        self.endpoints = endpoints
        self.is_billable = any(map(provider.is_billable_at, endpoints))
        self.variants = variants
        self.folder = folder
        self.names = Names(folder)
        settings = provider.shaping_settings
        self._settings = json.dumps(settings, sort_keys=True) if settings else ""
        self._prices: dict[tuple[str, bool], float] = {}
        self.unit = "line"  # what rows are counted in
        self.count = 0
        self.wrong = 0
        self.problems: list[Problem] = []
        self._stop = stop
        self.db = sqlite3.connect("", uri=True, isolation_level=None)
        harden(self.db)
        heed(self.db, stop)
        self.db.create_function("pick_seed", 0, pick_seed if provider.takes_seed else lambda: NO_SEED)
        self.db.create_function("replaced_name", 2, replaced_name)
        self.db.create_function("output_key", 1, output_key)
        self.db.create_function("is_held", 1, lambda number: is_held(folder, number))
        self.db.create_function("variant_output", 2, lambda output, k: output and variant_output(output, k))
        self.db.executescript(STAGE_SCHEMA)
        self.db.executemany("INSERT INTO variants VALUES (?)", [(variant,) for variant in range(variants)])

    def load(self, rows: Iterable[Row | WrongRow], reading: Reading) -> None:
        """Take all rows, as they are read.

        Raises:
            Failure: invalid_rows, with the first problems and their count.
        """
        with database_failures(Path("temporary database"), self._stop):
            self.db.execute("BEGIN")
            for row in rows:
                self.unit = reading.unit
                if sentences := row.sentences if isinstance(row, WrongRow) else self._add(row):
                    self.wrong += 1
                    room = PROBLEMS_TOLD - len(self.problems)
                    texts = [f"{self.unit} {row.line}: {text}" for text in sentences[: max(0, room)]]
                    self.problems += [Problem("invalid_rows", text) for text in texts]
            self._check_folders()
            self.db.execute("COMMIT")
            self._identify()
            (unnamed,) = self.db.execute("SELECT count(*) FROM rows WHERE output IS NULL").fetchone()
        if unnamed:
            checked_output(str(self.folder / LONGEST_DEFAULT_NAME), "--output-dir")
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
        request, output = row.request, None
        if row.output is not None:
            try:
                output = self.names.checked(row.output, request)
            except Failure as failure:
                return [failure.message]
            for variant in range(self.variants):
                sentences += self._claim(variant_output(output, variant), row.line)
        sentences += self.provider.cannot(request)
        identity = row.fingerprint if row.id is None else f"id:{row.id}"  # more in `_identify`
        fingerprint = self._fingerprint(row.fingerprint)
        fields = (request.prompt, request.size, request.seed, request.prompt_extend, output, self._price(request))
        try:
            self.db.execute(INSERT_ROW, (self.count, row.line, row.id, identity, fingerprint, *fields))
            self.count += 1
        except sqlite3.IntegrityError:
            (line,) = self.db.execute("SELECT line FROM rows WHERE id = ?", (row.id,)).fetchone()
            sentences.append(f"id: {shown(row.id)} is that of {self.unit} {line} too")
        return sentences

    def _price(self, request: ImageRequest) -> float:
        """US$ for a picture, worked out once for all that are alike."""
        kind = (request.size, request.prompt_extend)
        if kind not in self._prices:
            prices = (self.provider.price_at(request, endpoint).counted for endpoint in self.endpoints)
            self._prices[kind] = max(prices)
        return self._prices[kind]

    def _fingerprint(self, of_row: str) -> str:
        """Tells whether a picture would be the same: that of the row, and the settings of the provider."""
        if not self._settings:
            return of_row
        return hashlib.sha256(f"{of_row} {self._settings}".encode()).hexdigest()[:32]

    def _claim(self, output: str, line: int) -> list[str]:
        key = output_key(output)
        taken = self.db.execute("SELECT line FROM outputs WHERE key = ?", (key,)).fetchone()
        if taken:
            return [f"output: {outside_text(output, 100)} is that of {self.unit} {taken[0]} too"]
        self.db.execute("INSERT INTO outputs VALUES (?, ?)", (key, line))
        while key := posixpath.dirname(key):
            self.db.execute("INSERT OR IGNORE INTO parents VALUES (?, ?)", (key, line))
        return []

    def _check_folders(self) -> None:
        """A name cannot be a file for one row and a folder for another."""
        both = "SELECT parents.line, outputs.line FROM parents JOIN outputs USING (key) LIMIT ?"
        for line, other in self.db.execute(both, (PROBLEMS_TOLD,)).fetchall():
            self.wrong += 1
            text = f"{self.unit} {line}: output: its folder is a file of {self.unit} {other}"
            self.problems += [Problem("invalid_rows", text)] * (len(self.problems) < PROBLEMS_TOLD)

    def _identify(self) -> None:
        """A row is its id, else its own fingerprint and which one of its like it is: moving rows changes neither."""
        self.db.executescript("""
            INSERT INTO occurrences SELECT position, row_number() OVER (PARTITION BY identity ORDER BY position)
              FROM rows WHERE id IS NULL;
            UPDATE rows SET identity = 'row:' || identity || ':' ||
              (SELECT occurrence FROM occurrences WHERE occurrences.position = rows.position) WHERE id IS NULL;
        """)

    def survey(self, *, retry_failed: bool, retry_unknown: bool, read_only: bool) -> Survey:
        """Hold the rows against the folder's database; without one, against an empty one.

        What a picture is sent with must be what its row says now: in a stranger's database only the row's fingerprint
        may be right.
        """
        path = self.folder / DATABASE
        with database_failures(path, self._stop):
            if path.exists():
                self.db.execute("ATTACH ? AS folder", (database_uri(path, read_only=read_only),))
            else:
                self.db.execute("ATTACH ':memory:' AS folder")
                for statement in re.findall(r"CREATE TABLE \w+ \(.*?\);", DATABASE_SCHEMA, re.DOTALL):
                    self.db.execute(statement.replace("CREATE TABLE ", "CREATE TABLE folder."))
            here = ", ".join(map(str, self._alike())) or "-1"
            self.db.execute(
                f"""
                INSERT INTO plan SELECT r.position, v.variant, p.number,
                  CASE WHEN p.number IS NULL THEN 'new'
                       WHEN p.fingerprint <> r.fingerprint OR p.service NOT IN ({here}) OR p.prompt <> r.prompt
                         OR p.size <> r.size OR p.prompt_extend <> r.prompt_extend
                         OR p.seed <> (r.seed + v.variant) % 2147483648
                         THEN CASE WHEN p.state = 'pending' AND p.paid = 0 THEN 'edited' ELSE 'changed' END
                       WHEN p.state = 'pending' AND p.paid = 0 AND p.output <> variant_output(r.output, v.variant)
                         THEN 'edited'
                       WHEN p.state = 'pending' THEN 'pending'
                       WHEN p.state = 'failed' AND ? THEN 'retried'
                       WHEN p.state IN ('unknown', 'submitting') AND ? AND NOT is_held(p.number) THEN 'retried'
                       ELSE 'settled' END, r.price
                FROM rows r CROSS JOIN variants v
                LEFT JOIN folder.pictures p ON p.identity = r.identity AND p.variant = v.variant
                """,
                (retry_failed, retry_unknown or not self.is_billable),
            )
            self.db.execute("CREATE INDEX plan_numbers ON plan (number) WHERE number IS NOT NULL")
            self.db.execute("""
                INSERT INTO plan SELECT NULL, NULL, p.number, 'displaced', 0
                FROM outputs o JOIN folder.pictures p ON p.output_key = o.key
                WHERE NOT (p.state = 'pending' AND p.paid = 0)
                  AND NOT EXISTS (SELECT * FROM plan WHERE plan.number = p.number)
            """)
            kinds = self.db.execute("SELECT kind, count(*), sum(price) FROM plan GROUP BY kind").fetchall()
            (spent,) = self.db.execute("SELECT coalesce(sum(price * paid), 0.0) FROM folder.pictures").fetchone()
        pictures, cost = {kind: n for kind, n, _ in kinds}, {kind: price for kind, _, price in kinds}
        return Survey(self.count, Counter(pictures), Counter(cost), round(spent, 6))

    def _service(self, endpoint: Endpoint) -> int:
        """The folder's number for a place where pictures are asked for now; -1 where none have been."""
        return service_number(self.db, self.provider.name, endpoint)

    def _alike(self) -> list[int]:
        """Its numbers for the services whose pictures are not made again here."""
        return services_alike(self.db, self.provider, list(map(self._service, self.endpoints)))

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
            f"{f'({self.unit} {where}) ' if lines else ''}or provider, region or endpoint are not those of before: "
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
        with database_failures(self.folder / DATABASE, self._stop):
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
        self.db.close()
        settle_moves(self.folder, self._stop)

    def _merge(self) -> None:
        for endpoint in self.endpoints:
            if self._service(endpoint) < 0:
                self.db.execute(
                    "INSERT INTO folder.services (provider, region, endpoint) VALUES (?, ?, ?)",
                    (self.provider.name, endpoint.region, endpoint.url),
                )
        service = self._service(self.endpoints[0])
        # The seed of a row that names none: that of its other variants, else one is picked, for all of them.
        # Where none can be sent, pick_seed() is NO_SEED, which no other variant can lend.
        self.db.execute("""
            UPDATE rows SET seed = coalesce((SELECT (p.seed - p.variant + 2147483648) % 2147483648
              FROM folder.pictures p WHERE p.identity = rows.identity AND p.seed >= 0 AND pick_seed() >= 0),
              pick_seed())
            WHERE seed IS NULL
        """)
        kept = "SELECT {} FROM plan JOIN rows USING (position) WHERE plan.number = pictures.number AND kind IN {}"
        kinds = "('pending', 'retried', 'settled')"
        position, line = kept.format("rows.position", kinds), kept.format("rows.line", kinds)
        self.db.execute(
            f"UPDATE folder.pictures SET position = ({position}), line = ({line}) "
            f"WHERE position IS NOT ({position}) OR line IS NOT ({line})"
        )
        # What --max-cost sums up is never less than what is paid now.
        self.db.execute(
            """
            UPDATE folder.pictures SET price = (SELECT price FROM plan WHERE plan.number = pictures.number)
            WHERE price < (SELECT price FROM plan
              WHERE plan.number = pictures.number AND kind IN ('pending', 'retried'))
            """
        )
        self.db.execute("DELETE FROM folder.pictures WHERE position IS NULL AND state = 'pending' AND paid = 0")
        # Another identity and file name for a picture whose row was changed, so that the new one can have them.
        self.db.execute(f"""
            UPDATE folder.pictures SET identity = identity || '@' || number, position = NULL, line = NULL,
              moved_from = output, output = replaced_name(number, output),
              output_key = output_key(replaced_name(number, output))
            WHERE number IN (SELECT number FROM plan WHERE kind IN {CHANGED})
        """)
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
        self, number: int, service: int | None, variant: int, position: int, line: int, name: str | None, *rest: Any
    ) -> tuple[Any, ...]:
        identity, fingerprint, prompt, size, seed, extend, given, price = rest
        output = variant_output(given, variant) if given else default_output_name(number, name or prompt)
        seed = seed if seed == NO_SEED else (seed + variant) % (MAX_SEED + 1)
        row = (number, identity, variant, position, line, name, fingerprint, service)
        return (*row, prompt, size, seed, extend, output, output_key(output), price)
