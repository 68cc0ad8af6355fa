#!/usr/bin/env python3
"""Turn a list of prompts into verified pictures with Z-Image Turbo, and lose nothing on the way.

All rows are validated before the first is paid for. The state of every picture lies in a SQLite database in the
output folder, on disk before a request leaves and when its link arrives, so that the run can be killed at any
moment and started again with the same command. One pacer keeps all workers just under the account's rate limit.

This file is the command line. Beside it lie generate_image.py, which knows how one picture is asked for, paid,
verified and saved, and zimage_batch/, a module a concern:

    contract -> rows -> plan      the input, validated and held against the folder, before anything is paid
    folder, names, resume         the output folder: its database and lock, its files, what a dead run has left
    run -> pacer, work, journal   one decision loop, many workers, one writer
    results, gallery, progress    what is told
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
import sys


def _leave_early(number: int, _frame: object) -> None:
    """Until main() installs its handlers nothing has been done: a signal ends the process at once."""
    os.write(2, b"error: interrupted: before anything was sent\nnext: nothing was billed; run it again when you like\n")
    error = (
        '{"error": {"code": "interrupted", "message": "interrupted before anything was sent", "hint": "run it again", '
        f'"exit_code": {128 + number}, "retryable": true, "billed": "no"}}}}\n'
    )
    os.write(1, error.encode())
    os._exit(128 + number)


if __name__ == "__main__":
    for _signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_signum, _leave_early)
    _folder = os.path.dirname(os.path.realpath(__file__))
    if not all(os.path.exists(os.path.join(_folder, _name)) for _name in ("generate_image.py", "zimage_batch")):
        os.write(2, b"error: this script needs generate_image.py and zimage_batch/ beside it\n")
        os.write(2, b"next: copy the whole folder of the skill\n")
        raise SystemExit(2)
    if _folder not in sys.path:  # PYTHONSAFEPATH leaves it out
        sys.path.insert(0, _folder)

import argparse
import contextlib
import json
import math
import sqlite3
import stat
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from generate_image import (
    DEFAULT_MAX_RETRIES,
    DEFAULT_PROVIDER,
    DEFAULT_TIMEOUT,
    EXIT_OK,
    EXIT_SIGNAL,
    MAX_RETRIES_RANGE,
    PROVIDERS,
    TIMEOUT_RANGE,
    VERSION,
    Clock,
    Console,
    Failure,
    Interrupted,
    Parser,
    Problem,
    Provider,
    add_service_options,
    check_space,
    check_working_folder,
    check_writable,
    choose_endpoint,
    chosen_mode,
    flag,
    get_ready,
    import_libraries,
    internal_error,
    key_for,
    leave,
    missing_package,
    missing_packages,
    moment_of,
    noting,
    number_option,
    os_reason,
    outside_text,
    prepare_output,
    provider_class,
    provider_in,
    raise_problems,
    read_settings,
    region_option,
    to_json,
    trusted_hosts,
    unknown_sentences,
    utc_now,
    without_surrogates,
    workspace_of,
)
from zimage_batch.contract import (
    ASSUMED_LATENCY,
    BATCH_REQUIREMENTS,
    CONCURRENCY_RANGE,
    DATABASE,
    EVIDENCE,
    GALLERY,
    IMAGES,
    LOCK,
    LONGEST_LOADING,
    RESULTS,
    SPACING,
    THUMBS,
    UNPACED_CONCURRENCY,
)
from zimage_batch.folder import FolderLock, create_database, database_failures, open_database
from zimage_batch.gallery import write_gallery
from zimage_batch.journal import Place
from zimage_batch.names import Names
from zimage_batch.plan import Stage
from zimage_batch.results import counts, totals, write_results
from zimage_batch.resume import check_outputs_are_free, clean_up
from zimage_batch.rows import checked_row, read_rows
from zimage_batch.run import BatchOptions, Run, interrupted_run

# ═══════════════════════════════════════════════════════════════════════════════════════════════════
# Commands: make, dry run, status, gallery
# ═══════════════════════════════════════════════════════════════════════════════════════════════════


def make(options: BatchOptions, console: Console, env: Mapping[str, str], began: float) -> Failure | None:
    """Make the pictures of an input; prints the summary and returns why not every picture is saved."""
    folder = options.folder
    lock = FolderLock(folder)
    locked = (folder / LOCK).exists() and not options.dry_run
    if locked:
        take_lock(lock, folder)
    stage, workspace = staged(options, env, began)
    if options.dry_run:
        console.answer(dry_run(options, stage, env))
        return None
    key = key_for(options.provider, stage.endpoint, options.trusted, env)
    if key.warning:
        console.note(f"warning: {key.warning}")
    prepare_folder(folder)
    if not locked:
        take_lock(lock, folder)
    if not (folder / DATABASE).exists():
        if any((folder / EVIDENCE).glob("*/*.json")):
            raise Failure(
                "batch_unreadable",
                f"{folder} holds pictures that were paid for, but no {DATABASE}: they would be paid for again",
                hint=f"put {DATABASE} back, or use another --output-dir",
            )
        create_database(folder)
    clean_up(folder, console)
    survey = stage.survey(retry_failed=options.retry_failed, retry_unknown=options.retry_unknown, read_only=False)
    changed = stage.changed_rows(survey)
    if changed and not options.accept_changes:
        raise changed
    stage.merge()
    check_outputs_are_free(folder, options.sends)
    import_libraries()
    if is_anything_to_send(options):
        get_ready(options.provider, Clock(options.time_limit or LONGEST_LOADING))
    with database_failures(folder / DATABASE):
        run = Run(options, Place(options.provider, stage.endpoint, workspace, key), began, console)
        INTERRUPTIONS.pass_to(run)
        failure = run()
        conclude(run, failure, console)
    lock.release()
    return failure


def is_anything_to_send(options: BatchOptions) -> bool:
    """Whether a model must be loaded for this run."""
    with contextlib.closing(open_database(options.folder, read_only=True)) as database:
        states = ", ".join("?" * len(options.sends))
        query = f"SELECT 1 FROM pictures WHERE state IN ({states}) AND position IS NOT NULL LIMIT 1"
        return database.execute(query, options.sends).fetchone() is not None


def staged(options: BatchOptions, env: Mapping[str, str], began: float) -> tuple[Stage, str | None]:
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
        stage.load(read_rows(options.input or "", options.timeout, began + (options.time_limit or math.inf)))
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
        links = [] if names.stays_inside(name) else [folder / name]
        for link in [*links, *(names.linked_folders(name) if name else [])]:
            raise Failure("invalid_output", f"{link} is a symbolic link; the batch writes only into its own folder")
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
    this_run = counts(ends) | {"estimated_cost": max(0.0, round(run.tally.spent - run.tally.spent_before, 6))}
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
        lambda: key_for(options.provider, stage.endpoint, options.trusted, env),
        options.provider.preflight,
        lambda: check_space(options.folder),
    ):
        try:
            check()
        except Failure as failure:
            problems.append(failure.object())
    if changed and not options.accept_changes:
        problems.append(changed.object())
    limit = sys.maxsize if options.limit is None else options.limit
    budget = math.inf if options.max_cost is None else options.max_cost - survey.spent
    pictures, cost = stage.first(limit, budget, with_changed=options.accept_changes)
    plan = {
        "ok": not problems,
        "rows": survey.rows,
        "variants": options.variants,
        "pictures": survey.rows * options.variants,
        "to_make": pictures,
        "estimated_cost": cost,
        "estimated_duration_s": round(duration(options, pictures)),
        "left_pending": survey.made(with_changed=options.accept_changes)[0] - pictures,
        "spent_before": survey.spent,
        "max_cost": options.max_cost,
        "rpm": options.rpm,
        "provider": options.provider.name,
        "region": stage.endpoint.region,
        "endpoint": stage.endpoint.url,
        "settings": options.provider.known_settings or None,
        "output_dir": str(options.folder),
        "billable": options.provider.billable and pictures > 0,
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
        result["started_at"] = run["started_at"]
        if not running:  # else they are those of an earlier run, until this one has begun
            result |= {"finished_at": run["finished_at"], "exit_code": run["exit_code"]}
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
# Command line: options, streams and exit codes
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


def build_parser(provider: type[Provider] | None = None) -> Parser:
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
    service.add_argument("--base-url", metavar="URL", help="whole endpoint, API root or bare host")
    add_service_options(service, provider)

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
    chosen = provider_in(argv)
    arguments, unknown = build_parser(chosen).parse_known_args(argv)
    given = {name: value for name, value in vars(arguments).items() if value is not None and value is not False}
    problems = [Problem("usage", text) for text in unknown_sentences(unknown)]
    mode = chosen_mode(given, MODES, problems)
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

    kind, region = PROVIDERS[DEFAULT_PROVIDER], None
    with noting(problems):
        kind = provider_class(DEFAULT_PROVIDER if arguments.provider is None else arguments.provider)
    with noting(problems):
        region = region_option(arguments.region, kind)
    provider = kind(read_settings(kind, given, problems))
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
    with noting(problems):
        if name is not None:
            check_folder_name(flag(mode) if looking else "--output-dir", name, folder)
    raise_problems(problems)
    return BatchOptions(
        mode={"status": "status", "gallery_only": "gallery"}.get(mode, "make"),
        input=arguments.input,
        prompt=arguments.prompt,
        folder=folder,
        variants=int(variants or 1),
        concurrency=provider.calls_at_once if concurrency is None else int(concurrency),
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


def check_folder_name(option: str, name: str, folder: Path) -> None:
    """Raise `usage` for what cannot be a folder here, or would make paths that no JSON and no database can hold."""
    if not name or name != outside_text(name, len(name) + 1) or str(folder) != without_surrogates(str(folder)):
        hint = "use a name in UTF-8 without control characters, or set PYTHONUTF8=1"
        raise Failure("usage", f"{option}: must be the path of a folder, in plain text", hint=hint)
    try:
        if stat.S_ISDIR(os.stat(folder).st_mode):
            return
    except FileNotFoundError:
        return
    except OSError as error:
        raise Failure("usage", f"{option}: {outside_text(name, 200)}: {os_reason(error)}") from None
    raise Failure("usage", f"{option}: {folder} is not a folder")


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
            failure = interrupted_run(signum, "stopped at once")
            os.write(2, f"error: interrupted: {failure.message}\nnext: {failure.fact('hint')}\n".encode())
            with contextlib.suppress(OSError):
                os.write(1, to_json({"error": failure.object()}))
            os._exit(failure.exit_code)


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
    prepare_output(env)
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
    leave(main())
