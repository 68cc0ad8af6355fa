"""The results: a line a picture for programs, and the counts of a summary."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage.batch.contract import LISTED, NO_SEED, RESULTS
from zimage.batch.folder import facts_of
from zimage.batch.names import evidence_name, path_in
from zimage.errors import Failure, os_reason
from zimage.files import aside
from zimage.registry import provider_class

if TYPE_CHECKING:
    from zimage.facts import Error, Facts


def totals(database: sqlite3.Connection) -> tuple[dict[str, int], float]:
    """Pictures by state, of those that are listed, and the US$ that were, or may have been, billed in all."""
    states = database.execute(f"SELECT state, count(*) FROM pictures WHERE {LISTED} GROUP BY state")
    (spent,) = database.execute("SELECT coalesce(sum(price * paid), 0.0) FROM pictures").fetchone()
    return dict(states.fetchall()), round(spent, 6)


def known_cost(database: sqlite3.Connection, spent: float) -> dict[str, float]:
    """The `estimated_cost` of a summary; nothing where a price was not known."""
    return {} if unpriced_pictures(database) else {"estimated_cost": spent}


def twins(database: sqlite3.Connection) -> dict[str, int]:
    """Pictures of different seeds that are the same to the byte: their SHA-256, and how many there are."""
    rows = database.execute("""
        SELECT json_extract(facts, '$.image.sha256') AS sha256, count(*) FROM pictures
        WHERE state = 'saved' AND seed >= 0 GROUP BY sha256 HAVING count(DISTINCT seed) > 1
    """)
    return {sha256: count for sha256, count in rows if sha256 is not None}


def twin_warning(count: int) -> str:
    return f"{count} pictures of different seeds are the same to the byte: this server does not use the seed"


def unpriced_pictures(database: sqlite3.Connection) -> int:
    """How many pictures were asked for at a price that nobody knew."""
    where = "paid > 0 AND price = 0 AND facts LIKE '%\"billable\": true%'"
    rows = database.execute(f"SELECT service, count(*) FROM pictures WHERE {where} GROUP BY service")
    in_quota = services_in_quota(database)
    return sum(count for service, count in rows if service not in in_quota)


def services_in_quota(database: sqlite3.Connection) -> set[int]:
    """The services that take quota, and no money: the price of 0 is known."""
    rows = database.execute("SELECT number, provider FROM services")
    return {number for number, provider in rows if provider_class(provider).costs_quota}


def counts(states: Mapping[str, int]) -> dict[str, int]:
    """The counts of a summary; requests that are out, and tasks that are worked on, where there are any."""
    known = {name: states.get(name, 0) for name in ("saved", "failed", "unknown", "generated", "pending")}
    rare = {"submitted": states.get("submitted", 0), "in_flight": states.get("submitting", 0)}
    rare = {name: count for name, count in rare.items() if count}
    return {"total": sum(known.values()) + sum(rare.values()), **known, **rare}


def listed_pictures(database: sqlite3.Connection, folder: Path) -> Iterator[dict[str, Any]]:
    """What results and gallery say of each picture, in the order of the input; earlier inputs' pictures last."""
    several = {identity for (identity,) in database.execute("SELECT DISTINCT identity FROM pictures WHERE variant > 0")}
    alike, in_quota = twins(database), services_in_quota(database)
    endpoints = dict(database.execute("SELECT number, endpoint FROM services").fetchall())
    rows = database.execute(
        f"SELECT * FROM pictures WHERE {LISTED} ORDER BY position IS NULL, position, variant, number"
    )
    names = [column[0] for column in rows.description]
    for values in rows:
        row = dict(zip(names, values, strict=True))  # sqlite3.Row looks through all of its columns each time
        facts = facts_of(row["facts"])
        image = facts.get("image", {}) if row["state"] == "saved" else {}
        said = facts.get("response", {})
        same = [twin_warning(alike[image["sha256"]])] if image.get("sha256") in alike else []
        has_evidence = row["state"] in ("saved", "failed", "unknown", "generated")
        entry = {
            "number": row["number"],
            "id": row["id"],
            "line": row["line"],
            "variant": row["variant"] if row["identity"] in several else None,
            "state": row["state"],
            "prompt": row["prompt"],
            "rewritten_prompt": said.get("rewritten_prompt"),
            "size": row["size"],
            "seed": said.get("seed", row["seed"] if is_seeded(row, facts) else None),
            "prompt_extend": bool(row["prompt_extend"]),
            "output": row["output"],
            "image_path": path_in(folder, row["output"]) if image else None,
            "width": image.get("width"),
            "height": image.get("height"),
            "bytes": image.get("bytes"),
            "sha256": image.get("sha256"),
            "evidence_path": path_in(folder, evidence_name(row["number"])) if has_evidence else None,
            "request_id": said.get("request_id"),
            "endpoint": endpoints[row["service"]] if facts.get("attempts") else None,
            "estimated_cost": None if is_unpriced(row, facts, in_quota) else round(row["price"] * row["paid"], 6),
            "attempts": len(facts.get("attempts", [])),
            "finished_at": facts.get("finished_at") if row["state"] != "pending" else None,
            "warnings": [*facts.get("warnings", ()), *image.get("warnings", ()), *same] or None,
            "error": without_link(facts.get("error")) if row["state"] != "saved" else None,
            "in_input": None if row["position"] is not None else False,
        }
        yield {name: value for name, value in entry.items() if value is not None}


def is_seeded(row: Mapping[str, Any], facts: Facts) -> bool:
    """Whether a picture has been, or will be, drawn from the seed of its row, as far as is known."""
    return row["seed"] != NO_SEED and "seed" not in facts.get("unused", ())


def is_unpriced(row: Mapping[str, Any], facts: Facts, in_quota: Collection[int]) -> bool:
    """Whether a picture was asked for at a price that nobody knew. `in_quota`: as of `services_in_quota`."""
    is_free = row["price"] == 0 and row["service"] not in in_quota
    return row["paid"] > 0 and is_free and facts.get("billable", False)


def without_link(error: Error | None) -> dict[str, Any] | None:
    """An error without the signed link, which opens the picture to whoever reads it."""
    return {name: value for name, value in error.items() if name != "image_url"} if error else None


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
    try:
        with (
            aside(path) as temporary,
            open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as target,
        ):
            target.writelines(parts)
    except OSError as error:
        raise Failure("disk", f"{path} cannot be written: {os_reason(error)}") from None
