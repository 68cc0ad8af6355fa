"""Commands: make, dry run, status, gallery."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from zimage.batch.contract import BATCH_REQUIREMENTS, DATABASE, EVIDENCE, GALLERY, RESULTS
from zimage.batch.ending import OF_THE_FOLDER, after_all, billed_in, interrupted_run
from zimage.batch.examine import examine
from zimage.batch.fleet import meet, unlike
from zimage.batch.folder import FolderLock, create_database, database_failures, facts_of, open_database
from zimage.batch.gallery import write_gallery
from zimage.batch.inputs import Reading
from zimage.batch.jobs import Place
from zimage.batch.names import is_held
from zimage.batch.options import BatchOptions
from zimage.batch.plan import Stage
from zimage.batch.quote import check_price, dry_run
from zimage.batch.results import (
    counts,
    known_cost,
    totals,
    twin_warning,
    twins,
    unpriced_pictures,
    write_results,
)
from zimage.batch.resume import check_outputs_are_free, clean_up, prepare_folder
from zimage.batch.rows import Row, WrongRow, checked_row, read_rows
from zimage.batch.run import Run
from zimage.check import rate_limit
from zimage.console import Console
from zimage.contract import EXIT_OK, SCRIPTS
from zimage.endpoint import Endpoint, origin_of
from zimage.errors import Failure, Problem, missing_packages, noting, raise_problems
from zimage.evidence import moment_of, utc_now
from zimage.files import check_working_folder, check_writable, permissions_warning, to_json
from zimage.make import get_ready, import_libraries
from zimage.plan import workspace_of
from zimage.quota import in_quota_words
from zimage.registry import provider_class, provider_names
from zimage.trust import Own, choose_endpoint, key_for
from zimage.waiting import Stop

LONGEST_LOADING = 3600.0  # seconds for a model that runs in this process


def make(options: BatchOptions, stop: Stop, console: Console, env: Mapping[str, str], began: float) -> Failure | None:
    """Make the pictures of an input; prints the summary and returns why not every picture is saved."""
    folder = options.folder
    lock = FolderLock(folder)
    locked = folder.is_dir() and not options.dry_run
    if locked:
        take_lock(lock, folder, stop)
    reading = Reading()
    stage, workspace = staged(options, reading, stop, env, began)
    if warning := permissions_warning(folder):
        reading.remarks.append(warning)
    for text in reading.remarks:
        console.note(f"warning: {text}")
    if options.dry_run:
        if os.path.lexists(folder / DATABASE):
            examine(folder, stop.part(options.timeout))
        console.answer(dry_run(options, stage, reading, env))
        return None
    places = places_of(options, stage.endpoints, workspace, env)
    for place in places:
        console.warn([*place.endpoint.warnings, *filter(None, [place.key.warning])])
    if not locked:
        check_writable(folder, "batch")
        take_lock(lock, folder, stop)
    prepare_folder(folder)
    if os.path.lexists(folder / DATABASE):
        examine(folder, stop.part(options.timeout))
    else:
        if any((folder / EVIDENCE).glob("*/*.json")):
            raise Failure(
                "batch_unreadable",
                f"{folder} holds pictures that were paid for, but no {DATABASE}: they would be paid for again",
                hint=f"put {DATABASE} back, or use another --output-dir",
            )
        create_database(folder)
    clean_up(folder, console, stop)
    stop.check()
    survey = stage.survey(retry_failed=options.retry_failed, retry_unknown=options.retry_unknown, read_only=False)
    changed = stage.changed_rows(survey)
    if changed and not options.accept_changes:
        raise changed
    stop.check()
    stage.merge()
    check_outputs_are_free(folder, options.sends)
    import_libraries()
    unfit: Mapping[int, Failure] = {}
    if is_anything_to_send(options):
        get_ready(options.provider, stop.part(options.time_limit or LONGEST_LOADING))
        options = at_the_accounts_rate(options, places[0], stop)
        unfit = meet(places, stop.part(options.timeout))
        console.warn(unlike(places))
        check_price(options, stage.endpoints)
    with database_failures(folder / DATABASE):
        stop.check()
        run = Run(options, places, unfit, stop, began, console)
        failure = run()
        conclude(run, failure, console, reading.remarks)
    lock.release()
    return failure


def places_of(
    options: BatchOptions, endpoints: Sequence[Endpoint], workspace: str | None, env: Mapping[str, str]
) -> list[Place]:
    """The servers with what each may be sent, and a provider that learns what it is.

    Raises:
        Failure: as `key_for`.
    """
    return [
        Place(
            copy.deepcopy(options.provider) if number else options.provider,
            endpoint,
            workspace,
            key_for(options.provider, endpoint, options.trusted, env),
            Own(endpoint.root if options.base_urls else None, options.trusted, env),
        )
        for number, endpoint in enumerate(endpoints)
    ]


def at_the_accounts_rate(options: BatchOptions, place: Place, stop: Stop) -> BatchOptions:
    """The options with the rate that the service says is the account's; as they are where it does not, or one is given.

    Raises:
        Stopped.
    """
    if options.rpm_is_given:
        return options
    patience = stop.part((options.time_limit or math.inf) / 10)
    limit = rate_limit(place.provider, place.endpoint, place.key, place.workspace, patience)
    return options._replace(rpm=limit.per_minute) if limit else options


def is_anything_to_send(options: BatchOptions) -> bool:
    """Whether a model must be loaded for this run."""
    with contextlib.closing(open_database(options.folder, read_only=True)) as database:
        states = ", ".join("?" * len(options.sends))
        query = f"SELECT 1 FROM pictures WHERE state IN ({states}) AND position IS NOT NULL LIMIT 1"
        return database.execute(query, options.sends).fetchone() is not None


def staged(
    options: BatchOptions, reading: Reading, stop: Stop, env: Mapping[str, str], began: float
) -> tuple[Stage, str | None]:
    """The input, validated as a whole, and the workspace.

    Raises:
        Failure: of exit code 2.
    """
    workspace, problems = workspace_of(options.provider, env)
    raise_problems(problems)
    endpoints = endpoints_of(options, env)
    check_price(options, endpoints)
    stage = Stage(options.provider, endpoints, options.variants, options.folder, stop)
    rows: Iterable[Row | WrongRow] = [checked_row(1, {"prompt": options.prompt})]
    if options.prompt is None:
        seconds = began + (options.time_limit or math.inf) - time.monotonic()
        rows = read_rows(options.input or "", options.timeout, stop.part(seconds), reading, options.sheet)
    stage.load((with_flags(row, options.prompt_extend) for row in rows), reading)
    return stage, workspace


def endpoints_of(options: BatchOptions, env: Mapping[str, str]) -> list[Endpoint]:
    """The addresses to ask, each judged by itself; one that is written twice counts once.

    Raises:
        Failure: usage; as `choose_endpoint`.
    """
    problems: list[Problem] = []
    found: dict[tuple[str, str], Endpoint] = {}
    for flag in options.base_urls or (None,):
        with noting(problems):
            endpoint = choose_endpoint(
                options.provider,
                flag=flag,
                request_url=None,
                region=options.region,
                env=env,
                trusted=options.trusted,
            )
            found.setdefault((origin_of(endpoint.url), urlsplit(endpoint.url).path), endpoint)
    raise_problems(problems)
    if len(found) > 1 and not options.provider.asks_own_servers():
        fit = ", ".join(name for name in provider_names() if provider_class(name).asks_own_servers())
        what = f"--base-url: {len(found)} addresses, and {options.provider.name} is one service, with one"
        raise Failure("usage", what, hint=f"name one; several are for servers of the user's own: --provider {fit}")
    return [*found.values()]


def with_flags(row: Row | WrongRow, prompt_extend: bool | None) -> Row | WrongRow:
    """The row as the command line has it: its flags win over the fields of the rows."""
    if prompt_extend is None or isinstance(row, WrongRow):
        return row
    return row._replace(request=row.request._replace(prompt_extend=prompt_extend))


def take_lock(lock: FolderLock, folder: Path, stop: Stop) -> None:
    """Raise already_running, with its progress, where another process works on the folder; disk where none can tell."""
    if not lock.take():
        progress = None
        with contextlib.suppress(Failure):
            progress = status(folder, stop)
        raise Failure("already_running", f"another batch works on {folder}", progress=progress)


def conclude(run: Run, failure: Failure | None, console: Console, remarks: Sequence[str]) -> None:
    """Write the results and print the summary; what cannot be written now does not undo what is saved."""
    folder, database, provider = run.folder, run.database, run.options.provider
    warnings = []
    files: dict[str, str] = {}
    writers: dict[str, Any] = {"results": lambda: write_results(database, folder)}
    if run.options.gallery:
        writers["gallery"] = lambda: write_gallery(database, folder, run.calls)
    for name, write in writers.items():
        try:
            files[name] = str(write())
        except Failure as trouble:
            warnings.append(trouble.message)
    # What the run knows outranks the database, which a full disk may have left behind.
    states, spent = run.tally.states, max(totals(database)[1], round(run.tally.spent, 6))
    ends = Counter(run.tally.ends.values())
    this_run: dict[str, Any] = counts(ends)
    warnings += [twin_warning(count) for count in twins(database).values()][:1]
    if unpriced := unpriced_pictures(database):
        warnings.append(f"{unpriced} pictures were asked for at a price that is not known: --price USD names it")
    this_run |= known_cost(database, max(0.0, round(run.tally.spent - run.tally.spent_before, 6)))
    for text in warnings:
        console.note(f"warning: {text}")
    summary = counts(states) | {
        **known_cost(database, spent),
        "elapsed_s": round(time.monotonic() - run.began, 3),
        **files,
        "this_run": this_run,
    }
    if len(servers := [*run.fleet]) > 1:
        summary["servers"] = [server.told for server in servers]
    if quota := provider.quota.told:
        summary["quota"] = quota
    if remarks or warnings:
        summary["warnings"] = [*remarks, *warnings]
    if failure is not None:
        failure = failure.but(billed=billed_in(states)) if failure.code in OF_THE_FOLDER else failure
        failure = failure.but(hint=in_quota_words(failure.fault.hint)) if provider.costs_quota else failure
        console.tell(failure)
        summary["error"] = failure.fault.as_json()
    run.close(failure.fault.exit_code if failure else EXIT_OK)
    if not console.data(summary):
        console.note(f"warning: standard output cannot be written; --status {folder} gives the counts")


@contextlib.contextmanager
def existing_batch(folder: Path, stop: Stop) -> Iterator[sqlite3.Connection]:
    """The database of a batch that has been started, to read.

    Raises:
        Failure: no_batch, batch_unreadable, disk. Stopped.
    """
    if not os.path.lexists(folder / DATABASE):
        raise Failure("no_batch", f"{folder} holds no {DATABASE}")
    examine(folder, stop)
    database = open_database(folder, read_only=True, stop=stop)
    database.row_factory = sqlite3.Row
    with contextlib.closing(database), database_failures(folder / DATABASE, stop):
        yield database


def states_now(database: sqlite3.Connection, folder: Path, *, running: bool) -> tuple[Counter[str], float, int]:
    """Pictures by state, US$ billed in all, and how many requests were out when the run died that nobody waits for.

    Those are counted as what the next run will call them: what cost nothing is simply made again.
    """
    counted, spent = totals(database)
    states = Counter(counted)
    cut_off = 0 if running else states.pop("submitting", 0)
    if cut_off:
        rows = database.execute(
            "SELECT pictures.number, provider, facts FROM pictures JOIN services ON services.number = service "
            "WHERE state = 'submitting'"
        )
        for number, provider, facts in rows:
            known = facts_of(facts)
            state = "unknown" if known.get("billable", provider_class(provider).billable) else "pending"
            states["generated" if is_held(folder, number) else "submitted" if known.get("task_id") else state] += 1
    return states, spent, cut_off


def status(folder: Path, stop: Stop) -> dict[str, Any]:
    """How far a batch is, read beside the process that works on it; nothing is written."""
    running = FolderLock(folder).is_taken()
    with existing_batch(folder, stop) as database:
        states, spent, cut_off = states_now(database, folder, running=running)
        cost = known_cost(database, spent)
        run = database.execute("SELECT * FROM runs ORDER BY number DESC LIMIT 1").fetchone()
    result: dict[str, Any] = {"running": running, **counts(states), **cost}
    if run is not None:
        end = (
            utc_now() if running and run["finished_at"] is None else moment_of(run["finished_at"] or run["updated_at"])
        )
        result["elapsed_s"] = round((end - moment_of(run["started_at"])).total_seconds(), 1)
        result["started_at"] = run["started_at"]
        if not running:  # else they are those of an earlier run, until this one has begun
            result |= {"finished_at": run["finished_at"], "exit_code": run["exit_code"]}
        result |= json.loads(run["progress"]) if running else {"next": after_all(states, cut_off)}
    for name, file in (("results", RESULTS), ("gallery", GALLERY)):
        result[name] = str(folder / file) if (folder / file).exists() else None
    return {name: value for name, value in result.items() if value is not None}


def gallery_only(folder: Path, stop: Stop) -> dict[str, Any]:
    """Write the gallery of a folder as it is now."""
    running = FolderLock(folder).is_taken()
    with existing_batch(folder, stop) as database:
        path = write_gallery(database, folder, stop)
        stop.check()
        states, spent, _ = states_now(database, folder, running=running)
        return counts(states) | known_cost(database, spent) | {"gallery": str(path)}


def leave_at_once(signum: int) -> None:
    """A second signal, in its handler: end the process now; what is out is told by the next run."""
    how = "stopped at once: what was out may have been billed, and is unknown then"
    fault = interrupted_run(signal.Signals(signum).name, how).but(billed="unknown").fault
    os.write(2, f"error: interrupted: {fault.message}\nnext: {fault.hint}\n".encode())
    with contextlib.suppress(OSError):
        os.write(1, to_json({"error": fault.as_json()}))
    os._exit(fault.exit_code)


def run_command(
    options: BatchOptions, stop: Stop, console: Console, env: Mapping[str, str], began: float
) -> Failure | None:
    """Do what the options say and print its answer."""
    missing_packages(BATCH_REQUIREMENTS, SCRIPTS / "generate_batch.py")
    check_working_folder()
    if options.mode == "status":
        console.answer(status(options.folder, stop.part(options.timeout)))
    elif options.mode == "gallery":
        console.answer(gallery_only(options.folder, stop))
    else:
        return make(options, stop, console, env, began)
    return None
