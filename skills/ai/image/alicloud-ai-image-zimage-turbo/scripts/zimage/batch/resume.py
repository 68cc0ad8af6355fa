"""Before a run: what a dead one has left, and what has happened to the folder since."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from zimage.batch.contract import (
    DATABASE,
    EVIDENCE,
    GALLERY,
    IMAGES,
    PROBLEMS_TOLD,
    REPLACED,
    RESERVE,
    RESULTS,
    THUMBS,
)
from zimage.batch.folder import database_failures, facts_in, facts_of, open_database
from zimage.batch.jobs import Job, job_of, read_services
from zimage.batch.moves import settle_moves
from zimage.batch.names import Names, path_in
from zimage.batch.work import ROW_HINTS
from zimage.calls import Generated
from zimage.console import Console
from zimage.contract import MAX_EVIDENCE_BYTES, SKILL
from zimage.errors import Failure
from zimage.evidence import EvidenceFile
from zimage.files import check_space, check_writable, file_hash, leftovers_of, read_file, remove_leftovers
from zimage.outside import json_of
from zimage.settle import settle
from zimage.waiting import Stop


def prepare_folder(folder: Path) -> None:
    """Make the folder and its own subfolders, and see that they can be written.

    Raises:
        Failure: invalid_output, disk.
    """
    names = Names(folder)
    for name in ("", IMAGES, EVIDENCE, THUMBS, REPLACED):
        links = [] if names.stays_inside(name) else [folder / name]
        for link in [*links, *(names.linked_folders(name) if name else [])]:
            raise Failure("invalid_output", f"{link} is a symbolic link; the batch writes only into its own folder")
    for name in ("", IMAGES, EVIDENCE):
        check_writable(folder / name, "batch")


def clean_up(folder: Path, console: Console, stop: Stop) -> None:
    """Bring the folder to a state from which a run can start, and tell what was found.

    Requests that were out when a process died become unknown, its temporary files go, saved pictures whose file has
    vanished are downloaded again while their link lives.
    """
    settle_moves(folder, stop)
    database = open_database(folder, stop=stop)
    database.row_factory = sqlite3.Row
    with contextlib.closing(database), database_failures(folder / DATABASE, stop):
        remove_temporary_files(database, folder, stop)
        database.execute("BEGIN IMMEDIATE")
        lost = close_submitting(database, folder, stop)
        again, gone = find_vanished(database, folder)
        database.execute("COMMIT")
        remove_held_of_saved(database, folder)
    if lost:
        console.note(
            f"warning: {lost} request{'s' * (lost != 1)} of a run that was cut off may have been billed: unknown; "
            "ask the user before --retry-unknown, which pays for them again"
        )
    if again:
        console.note(
            f"warning: {again} saved pictures have vanished from the folder; they are downloaded again, free, "
            "where their links live"
        )
    if gone:
        console.note(
            f"warning: {gone} saved pictures have vanished from the folder and have no links; "
            "--retry-failed makes them again (costs)"
        )


# What this tool makes under temporary names, here and in generate_image.py: nothing else is removed.
MADE = rf"{SKILL}-(?:\d{{6,}}|batch)|\d{{6,}}(?:\.(?:jpg|json|picture))?|" + leftovers_of(
    DATABASE, RESERVE, RESULTS, GALLERY, ".gitignore"
)


def remove_temporary_files(database: sqlite3.Connection, folder: Path, stop: Stop) -> None:
    """Remove what a dead run was writing: in the folder, below its own subfolders, and where paid pictures go."""
    outputs = database.execute("SELECT output FROM pictures WHERE state IN ('generated', 'submitting')")
    parents = {folder} | {(folder / output).parent for (output,) in outputs}
    for own in (IMAGES, EVIDENCE, THUMBS):
        parents |= {Path(parent) for parent, _, _ in os.walk(folder / own)}
    for parent in parents:
        stop.check()
        remove_leftovers(parent, MADE)


def close_submitting(database: sqlite3.Connection, folder: Path, stop: Stop) -> int:
    """Settle the requests that were out when their process died; returns how many are unknown now.

    Whatever else was not saved is taken over too, where somebody has recovered it by its evidence file meanwhile, or
    where the process died between that file and the database.
    """
    services = read_services(database)
    unknown = 0
    rows = database.execute("SELECT * FROM pictures WHERE state NOT IN ('pending', 'saved')").fetchall()
    for row in rows:
        stop.check()
        job = job_of(row, folder, services, None)
        adopted = adopt(job, folder)
        if row["state"] == "unknown" and not adopted and is_free(job):
            database.execute("UPDATE pictures SET state = 'pending' WHERE number = ?", (job.number,))
        if row["state"] != "submitting" and not adopted:
            continue
        if not adopted and job.evidence.task_id:  # it may have come: the run asks after it
            database.execute("UPDATE pictures SET state = 'submitted' WHERE number = ?", (job.number,))
            continue
        if not adopted and is_free(job):  # what it was making cost nothing
            job.paid -= 1
            database.execute("UPDATE pictures SET state = 'pending', paid = ? WHERE number = ?", (job.paid, job.number))
            continue
        if not adopted:
            failure = Failure("outcome_unknown", "the run was cut off while the request was out")
            settle(EvidenceFile(job.evidence), failure, hints=ROW_HINTS)
            unknown += 1
        database.execute(
            "UPDATE pictures SET state = ?, facts = ? WHERE number = ?",
            (job.evidence.status, job.facts, job.number),
        )
    return unknown


def is_free(job: Job) -> bool:
    """Whether a picture cost nothing when it was asked for."""
    return not job.facts_before.get("billable", job.plan.billable)


def adopt(job: Job, folder: Path) -> bool:
    """Take over what the evidence file knows of the same attempt, where it got further than the database.

    That is so only where the disk failed under the database while it still took the picture or its evidence, or
    where the process died between the picture that was handed over and the database.
    """
    if not adopt_written(job, folder) and job.state == "submitting" and job.evidence.held.exists():
        job.evidence.generated(Generated(), job.plan.warnings, 0.0)
    return job.evidence.status != job.state


def adopt_written(job: Job, folder: Path) -> bool:
    """Take over what the evidence file says; False where it says no more than the database."""
    try:
        written = json_of(read_file(job.evidence.path, MAX_EVIDENCE_BYTES, follow=False).decode())
        same = len(written["attempts"]) == len(job.evidence.data["attempts"])
        link, image = written.get("response", {}).get("image_url"), written.get("image")
        if not same or written["status"] not in ("generated", "saved"):
            return False
        saved = image is not None and hash_of_own(Path(image["path"]), folder) == image["sha256"]
        if not saved and (not link or job.state in ("generated", "failed")):
            return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    job.evidence.update(**facts_in(written))
    job.evidence.update(status="saved" if saved else "generated")
    return True


def hash_of_own(path: Path, folder: Path) -> str:
    """SHA-256 of a picture that an evidence file names, in hex; empty where it does not lie in the folder.

    Raises OSError.
    """
    name = os.path.relpath(os.path.join(os.path.realpath(path.parent), path.name), os.path.realpath(folder))
    if not Names(folder).holds(name.replace(os.sep, "/")):
        return ""
    return file_hash(path, follow=False)


def remove_held_of_saved(database: sqlite3.Connection, folder: Path) -> None:
    """Remove bytes that were handed over and whose picture is saved: the process died before it could."""
    for path in (folder / EVIDENCE).glob("*/*.picture"):
        if re.fullmatch(r"[0-9]{6,10}", path.stem):
            state = database.execute("SELECT state FROM pictures WHERE number = ?", (int(path.stem),)).fetchone()
            if state is not None and state[0] == "saved":
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)


def find_vanished(database: sqlite3.Connection, folder: Path) -> tuple[int, int]:
    """Find saved pictures without a file; returns how many can be downloaded again, and how many cannot."""
    again = gone = 0
    rows = database.execute("SELECT number, output, position FROM pictures WHERE state = 'saved'")
    missing = [row for row in rows if not os.path.lexists(path_in(folder, row["output"]))]
    for number, _, position in missing:
        (said,) = database.execute("SELECT facts FROM pictures WHERE number = ?", (number,)).fetchone()
        facts = facts_of(said)
        response = facts.get("response", {})
        alive = position is not None and bool(response.get("image_url"))  # as far as is known: the service will tell
        if not alive:
            failure = Failure("link_expired", "the saved file has vanished, and there is no link to fetch it again")
            facts["error"] = failure.fault.as_json()
        facts.pop("image", None)
        database.execute(
            "UPDATE pictures SET state = ?, facts = ? WHERE number = ?",
            ("generated" if alive else "failed", json.dumps(facts, ensure_ascii=False), number),
        )
        again += alive
        gone += not alive
    return again, gone


def check_outputs_are_free(folder: Path, states: Sequence[str]) -> None:
    """No picture in one of these states may be paid for whose name is taken by a file that is not of this batch.

    Raises:
        Failure: output_exists, disk.
    """
    database = open_database(folder, read_only=True)
    taken: list[str] = []
    count = 0
    folders: set[Path] = set()
    with contextlib.closing(database), database_failures(folder / DATABASE):
        rows = database.execute(
            f"SELECT line, output FROM pictures WHERE state IN ({', '.join('?' * len(states))}) "
            "AND position IS NOT NULL ORDER BY position",
            states,
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
