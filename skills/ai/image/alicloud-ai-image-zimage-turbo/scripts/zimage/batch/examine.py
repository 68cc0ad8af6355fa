"""Examine: whether a folder's database is what this tool wrote. It may be a stranger's, who can put anything into it.

All of it is looked at once, before anything else reads it: what it is made of, and every value of every row.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage.batch.contract import DATABASE, DATABASE_SCHEMA, KEPT_FACTS, MAX_LINE_BYTES
from zimage.batch.folder import database_failures, open_database
from zimage.batch.names import Names
from zimage.contract import EVIDENCE_SCHEMA, MAX_EVIDENCE_BYTES, MAX_SEED, STATUSES
from zimage.endpoint import IN_PROCESS
from zimage.errors import Failure
from zimage.plan import checked_settings
from zimage.provider import Provider
from zimage.registry import provider_class
from zimage.request import parse_json
from zimage.task import is_task_id
from zimage.trust import parse_base_url
from zimage.waiting import Late, Stopped

if TYPE_CHECKING:
    from zimage.waiting import Stop


def examine(folder: Path, stop: Stop) -> None:
    """See that the database of a folder is one that this tool wrote.

    In a thread of its own: whatever the database does, the command ends in time.

    Raises:
        Failure: batch_unreadable, disk. Stopped.
    """
    try:
        stop.in_thread(lambda: _examine(folder, stop))
    except (Late, Stopped) as ended:
        stop.abandon()
        if isinstance(ended, Stopped):
            raise
        raise Failure("batch_unreadable", f"{folder / DATABASE}: could not be read in {stop.timeout:g} s") from None


def _examine(folder: Path, stop: Stop) -> None:
    path = folder / DATABASE
    for is_last in (False, True):
        before = _state_of(path)
        try:
            database = open_database(folder, read_only=True, stop=stop)
            with contextlib.closing(database), database_failures(path, stop):
                return _check_database(database, path, Names(folder))
        except Failure:
            if is_last or _state_of(path) == before:
                raise  # else a run has begun meanwhile, and changed under our eyes what lay still


def _state_of(path: Path) -> tuple[int, int, bool]:
    found = os.lstat(path)
    return found.st_mtime_ns, found.st_size, os.path.lexists(f"{path}-wal")


def _check_database(database: sqlite3.Connection, path: Path, names: Names) -> None:
    def refuse(what: str) -> None:
        raise Failure("batch_unreadable", f"{path}: not as this tool writes it: {what}")

    with contextlib.closing(sqlite3.connect(":memory:")) as ours:
        ours.executescript(DATABASE_SCHEMA)
        if parts_of(database) != parts_of(ours):
            refuse("its tables, indexes and views are others")
    if database.execute("PRAGMA encoding").fetchone() != ("UTF-8",):
        refuse("its text is not in UTF-8")
    for (fault,) in database.execute("PRAGMA integrity_check(1)"):
        if fault != "ok":
            refuse("its pages or indexes contradict each other")
    facts = FactsOfPictures()
    functions: Mapping[str, Callable[..., bool]] = {
        "is_text": is_text,
        "is_moment": is_moment,
        "is_object": is_object,
        "is_size": is_size,
        "is_output": names.holds,
        "is_service": facts.is_service,
        "is_facts": facts.are_right,
    }
    for name, function in functions.items():
        database.create_function(name, -1, function)
    for table, columns in RULES.items():
        wrong = " ".join(f"WHEN NOT ({rule.format(name)}) THEN '{name}'" for name, rule in columns.items())
        found = database.execute(f"SELECT number, CASE {wrong} END AS wrong FROM {table} WHERE wrong IS NOT NULL")
        if row := found.fetchone():
            refuse(f"{table}: row {row[0]!r:.20}: {row[1]}")


def parts_of(database: sqlite3.Connection) -> set[tuple[str, ...]]:
    """What a database is made of, without the comments, which differ between versions."""
    parts = database.execute("SELECT type, name, tbl_name, substr(sql, 1, 10000) FROM sqlite_master LIMIT 100")
    return {
        (str(kind), str(name), str(table), " ".join(re.sub("--.*", "", str(sql)).split()))
        for kind, name, table, sql in parts
    }


# What a column may hold, as SQL; {0} is its name.


def whole(least: int, most: int = 10**9) -> str:
    return f"typeof({{0}}) = 'integer' AND {{0}} BETWEEN {least} AND {most}"


def real(most: float) -> str:
    return f"typeof({{0}}) = 'real' AND {{0}} BETWEEN 0 AND {most}"


def text(longest: int) -> str:
    return f"is_text({{0}}, {longest})"


def perhaps(rule: str) -> str:
    return f"{{0}} IS NULL OR {rule}"


MOMENT = "is_moment({0})"
RULES: Mapping[str, Mapping[str, str]] = {
    "services": {
        "number": whole(0),
        "provider": text(100),
        "region": text(100),
        "endpoint": f"{text(2000)} AND is_service(number, provider, {{0}})",
    },
    "pictures": {
        "number": whole(0),
        "identity": text(2000),
        "variant": whole(0),
        "position": perhaps(whole(0)),
        "line": perhaps(whole(1)),
        "id": perhaps(text(MAX_LINE_BYTES)),
        "fingerprint": text(100),
        "service": f"{whole(0)} AND {{0}} IN (SELECT number FROM services)",
        "prompt": text(MAX_LINE_BYTES),
        "size": "is_size({0})",
        "seed": whole(-1, MAX_SEED),
        "prompt_extend": whole(0, 1),
        "output": f"{text(4000)} AND is_output({{0}})",
        "output_key": text(12_000),
        "price": real(10_000),
        "paid": whole(0, 10**6),
        "state": f"{{0}} IN {('pending', *STATUSES)}",
        "facts": f"({{0}} = '{{{{}}}}' AND state <> 'submitted') OR "
        f"({text(MAX_EVIDENCE_BYTES)} AND is_facts({{0}}, service, state))",
        "moved_from": perhaps(f"{text(4000)} AND is_output({{0}})"),
    },
    "runs": {
        "number": whole(1),
        "started_at": MOMENT,
        "updated_at": MOMENT,
        "finished_at": perhaps(MOMENT),
        "exit_code": perhaps(whole(0, 255)),
        "latency_s": perhaps(real(10_000_000)),
        "progress": f"{text(100_000)} AND is_object({{0}})",
    },
}
_MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,6})?(?:Z|[+-]\d\d:\d\d)", re.ASCII)


def is_text(value: object, longest: int) -> bool:
    return isinstance(value, str) and len(value) <= longest and "\0" not in value


def is_moment(value: object) -> bool:
    return isinstance(value, str) and _MOMENT.fullmatch(value) is not None


def is_size(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[1-9]\d{1,3}\*[1-9]\d{1,3}", value, re.ASCII) is not None


def is_object(value: str) -> bool:
    try:
        return isinstance(parse_json(value), dict)
    except ValueError:
        return False


class FactsOfPictures:
    """Whether facts are those of a picture of some service, of which the folder has several."""

    def __init__(self) -> None:
        self._providers: dict[int, type[Provider]] = {}

    def is_service(self, number: int, name: str, url: str) -> bool:
        """Whether a place is one where pictures are asked for; its provider is noted."""
        try:
            self._providers[number] = provider = provider_class(name)
            return url == (IN_PROCESS if provider.in_process else parse_base_url(url, "", provider(None)).url)
        except Failure:
            return False

    def are_right(self, value: str, service: int, state: str) -> bool:
        try:
            facts = parse_json(value)
            if not fits_facts(facts):
                return False
            provider = self._providers[service]
            checked_settings(provider, facts.get("settings", {}))
        except (ValueError, Failure):
            return False
        has_task = provider.has_tasks() and is_task_id(facts.get("task_id", ""))
        return has_task or state != "submitted"


Check = Callable[[Any], bool]


def checker(schema: Mapping[str, Any]) -> Check:
    """What says whether a JSON value is what a schema of the contract describes.

    jsonschema, which must be loaded for it, takes half a minute for the facts of a large folder. A test holds this to
    it: what it does not know of a schema is not in those of the facts.
    """
    fits = CHECKERS[schema.get("type", "any")](schema)
    allowed = schema.get("enum")
    return fits if allowed is None else lambda value: fits(value) and value in allowed


def object_checker(schema: Mapping[str, Any]) -> Check:
    fields = {name: checker(field) for name, field in schema.get("properties", {}).items()}
    others = checker(schema.get("additionalProperties", {}))
    required = frozenset(schema.get("required", ()))

    def fits(value: Any) -> bool:
        return (
            type(value) is dict
            and value.keys() >= required
            and all(fields.get(name, others)(item) for name, item in value.items())
        )

    return fits


def array_checker(schema: Mapping[str, Any]) -> Check:
    items = checker(schema.get("items", {}))
    return lambda value: type(value) is list and all(map(items, value))


def string_checker(schema: Mapping[str, Any]) -> Check:
    if schema.get("format") == "date-time":
        return is_moment
    shortest = schema.get("minLength", 0)
    if "pattern" not in schema:
        return lambda value: type(value) is str and len(value) >= shortest
    found = re.compile(schema["pattern"]).search
    return lambda value: type(value) is str and len(value) >= shortest and found(value) is not None


def integer_checker(schema: Mapping[str, Any]) -> Check:
    least, most = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    return lambda value: type(value) is int and least <= value <= most


def is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def is_json(value: Any) -> bool:
    """Whether a value that no schema describes is JSON, which has finite numbers only."""
    if type(value) is dict:
        return all(map(is_json, value.values()))
    if type(value) is list:
        return all(map(is_json, value))
    return type(value) is not float or math.isfinite(value)


CHECKERS: Mapping[str, Callable[[Mapping[str, Any]], Check]] = {
    "object": object_checker,
    "array": array_checker,
    "string": string_checker,
    "boolean": lambda _: lambda value: type(value) is bool,
    "integer": integer_checker,
    "number": lambda _: is_number,
    "any": lambda _: is_json,
}
FACTS_SCHEMA = {"type": "object", "properties": {name: EVIDENCE_SCHEMA["properties"][name] for name in KEPT_FACTS}}
fits_facts = checker(FACTS_SCHEMA)
