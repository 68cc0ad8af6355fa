"""A batch that is killed again and again: is every picture saved, failed or unknown truthfully, and none paid twice?

Run `python tests/benchmarks/batch_kills.py` (about a minute), or smaller with `--rows 60 --kills 6`. A service in
this process answers rows with distinct prompts, one call in ten with a fault: hung up before and after the picture
was made, cut answers, gateways, 429, 500, 503, refusals, answers and links without a picture, damaged and half
pictures. The batch is ended with SIGKILL at random moments, some of them while it starts, most when the service has
seen a random number of calls, and is started again with the same command until it ends by itself with nothing left
to do. A run that stops because of too many failures in a row is simply started again too.

Then what the service has on record is held against the folder. Printed are the counts; every broken promise is
named, and the exit code is 1. `--seed` repeats the moments and faults of a run, as far as threads let them repeat.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import figures
from benchmarks.common import (
    BEGUN,
    FAULTS,
    GOOD,
    NOT_BILLED,
    REFUSED,
    UNKNOWABLE,
    UNUSABLE,
    Call,
    Ended,
    Service,
    batch_command,
    flats,
    mark_of,
    run,
    table,
    working_folder,
    write_rows,
)

LATENCY_S = 0.12
STARTING_S = 1.0  # within which a kill hits a batch that is starting
KILLS_AT_START = 0.2  # of all
ENDS = {0, 1, 6, 7}  # exit codes with which a batch may end here
MOST_IDLE_RUNS = 30  # runs beyond the kills, before it is said that the batch does not come to an end
SLOW_JOURNAL_S = 2.0  # an answer that arrived so long before a kill must have been on disk
LAST_STATES = {"saved", "failed", "unknown"}


@dataclass
class Report:
    """What happened, and what should not have."""

    rows: int
    kills: int = 0
    runs: int = 0
    seconds: float = 0.0
    exit_codes: Counter[int] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    faults: int = 0
    billed: int = 0
    paid_twice: int = 0
    lost: int = 0
    out_at_kills: int = 0  # pictures of which the folder said after a kill that their request was out
    unknowable: int = 0  # calls whose outcome no client could know
    broken: list[str] = field(default_factory=list)

    def check(self, holds: bool, what: str) -> None:
        if not holds:
            self.broken.append(what)


def one_in(many: int, chance: random.Random) -> Callable[[], str]:
    """A fault in one call of every so many, each kind as often as the others."""

    def outcomes() -> Iterator[str]:
        kinds: list[str] = []
        while True:
            kinds = kinds or chance.sample(FAULTS, len(FAULTS))
            turn = ["ok"] * many
            turn[chance.randrange(many)] = kinds.pop()
            yield from turn

    source = outcomes()
    return lambda: next(source)


def prompts(rows: int) -> Iterator[dict[str, Any]]:
    """Rows with and without an id, with and without a seed."""
    for number in range(rows):
        row = {"prompt": f"picture {number} of a catalogue", "size": "512*512"}
        if number % 2:
            row["id"] = f"article-{number}"
        yield row | ({"seed": number} if number % 3 else {})


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def kill_at(process: subprocess.Popen[bytes], moment: Callable[[], bool], then: float) -> bool:
    """Kill a process `then` seconds after a moment has come; False where it ended by itself."""
    while not moment():
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    time.sleep(then)
    if process.poll() is not None:
        return False
    process.kill()
    process.wait()
    return True


def submitting(folder: Path) -> set[str]:
    """The prompts whose request is out, as a dead batch left them; read from a copy, nothing is mended on the way."""
    if not (folder / "batch.sqlite3").exists():
        return set()
    with tempfile.TemporaryDirectory() as copy:
        for path in folder.glob("batch.sqlite3*"):
            if not path.name.endswith("-shm"):
                shutil.copy(path, copy)
        with closing(sqlite3.connect(Path(copy, "batch.sqlite3"))) as database:
            return {prompt for (prompt,) in database.execute("SELECT prompt FROM pictures WHERE state = 'submitting'")}


def storm_of_kills(
    service: Service, command: list[str], env: dict[str, str], folder: Path, report: Report, chance: random.Random
) -> list[tuple[float, set[str]]]:
    """Kill and start again; returns the moments of the kills, and which requests were out then."""
    output, kills = folder / "out", report.kills
    report.kills = 0
    counts = sorted(chance.sample(range(1, max(kills + 1, int(report.rows * 0.9))), kills))
    at_start = set(chance.sample(range(kills), round(kills * KILLS_AT_START)))
    killed = []
    with open(folder / "stderr.txt", "ab") as log:
        for number, count in enumerate(counts):
            while report.runs <= kills + MOST_IDLE_RUNS:
                report.runs += 1
                process = subprocess.Popen(
                    command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log
                )
                try:
                    if number in at_start:
                        hit = kill_at(process, lambda: True, chance.uniform(0, STARTING_S))
                    else:
                        hit = kill_at(process, partial(service.has_seen, count), chance.uniform(0, 2 * LATENCY_S))
                finally:
                    if process.poll() is None:
                        process.kill()
                        process.wait()
                if hit:
                    killed.append((time.monotonic(), submitting(output)))
                    report.kills += 1
                    break
                report.exit_codes[process.returncode] += 1
                if process.returncode in (0, 1) and nothing_left(output):
                    return killed
    return killed


def nothing_left(folder: Path) -> bool:
    return {state for state, *_ in pictures(folder)} <= LAST_STATES


def pictures(folder: Path) -> list[tuple[Any, ...]]:
    columns = "state, number, prompt, seed, output, price, paid, facts"
    with closing(sqlite3.connect(folder / "batch.sqlite3")) as database:
        return database.execute(f"SELECT {columns} FROM pictures ORDER BY number").fetchall()


def to_the_end(
    command: list[str], env: dict[str, str], folder: Path, report: Report, most: int
) -> tuple[Ended | None, bool]:
    """Start the batch until nothing is left to do; returns how the last run ended, and whether that was reached."""
    ended = None
    while report.runs < most:
        report.runs += 1
        ended = run(command, env, folder)
        report.exit_codes[ended.code] += 1
        if ended.code not in ENDS:
            report.check(False, f"a run ended with {ended.code}: {ended.stderr[-500:]}")
            return ended, False
        if ended.code in (0, 1) and nothing_left(folder / "out"):
            return ended, True
    return ended, False


def measure(
    rows: int, kills: int, seed: int = 1, concurrency: int = 4, faults: int = 10, parent: str | None = None
) -> Report:
    """Kill a batch of so many rows so many times, and report."""
    chance = random.Random(seed)
    report = Report(rows, kills)
    jitter = random.Random(seed + 1)
    service = Service(
        flats(), latency_s=lambda: LATENCY_S * jitter.uniform(0.5, 1.5), fault=one_in(faults, random.Random(seed + 2))
    )
    start = time.perf_counter()
    with working_folder(parent) as folder, service:
        write_rows(folder / "rows.jsonl", prompts(rows))
        options = ("--rpm", "0", "--concurrency", str(concurrency))
        command = batch_command("--input", "rows.jsonl", "--output-dir", "out", *options)
        env = service.environment(folder)
        killed = storm_of_kills(service, command, env, folder, report, chance)
        last, ended = to_the_end(command, env, folder, report, kills + 2 * MOST_IDLE_RUNS)
        report.check(ended, f"the batch does not come to an end; the last run: {last.stderr[-500:] if last else ''}")
        report.seconds = time.perf_counter() - start
        calls = len(service.calls)
        again = run(command, env, folder)
        report.check(len(service.calls) == calls, "a run of a batch that had ended sent something")
        report.check(last is None or again.code == last.code, f"the same command ended with {again.code} after that")
        audit(folder / "out", service, killed, concurrency, report)
    return report


# ---------------------------------------------------------------------------------------------------------------------
# The audit
# ---------------------------------------------------------------------------------------------------------------------


def audit(
    folder: Path, service: Service, killed: list[tuple[float, set[str]]], concurrency: int, report: Report
) -> None:
    """Hold the folder against what the service has on record."""
    by_prompt: dict[str, list[Call]] = {}
    for call in service.calls:
        by_prompt.setdefault(call.prompt, []).append(call)
    billed = service.billed()
    cut_off = {prompt for _, prompts in killed for prompt in prompts}
    report.calls = len(service.calls)
    report.faults = sum(call.outcome != "ok" for call in service.calls)
    report.billed = sum(billed.values())
    report.out_at_kills = sum(len(prompts) for _, prompts in killed)
    report.unknowable = sum(call.outcome in UNKNOWABLE for call in service.calls)
    twice = [prompt for prompt, count in billed.items() if count > 1]
    report.paid_twice = len(twice)
    report.check(not twice, f"paid twice: {some(twice)}")
    crowds = [len(prompts) for _, prompts in killed if len(prompts) > concurrency]
    report.check(not crowds, f"more requests out at a kill than --concurrency {concurrency}: {some(crowds)}")
    for moment, prompts in killed:
        for prompt in prompts:
            answers = [c.answered for c in by_prompt.get(prompt, []) if c.answered and c.outcome in GOOD]
            late = bool(answers) and max(answers) < moment - SLOW_JOURNAL_S
            report.check(not late, f"answered long before a kill, and not on disk: {prompt}")
    rows = pictures(folder)
    report.states = Counter(row[0] for row in rows)
    report.check(len(rows) == report.rows, f"{len(rows)} pictures in the folder for {report.rows} rows")
    report.check(set(report.states) <= LAST_STATES, f"left in another state: {dict(report.states)}")
    unknown, most = report.states["unknown"], report.out_at_kills + report.unknowable
    report.check(unknown <= most, f"{unknown} unknown, but only {most} requests whose outcome could not be known")
    for row in rows:
        audit_picture(row, by_prompt.get(row[2], []), row[2] in cut_off, report)
    audit_files(folder, rows, report)


def audit_picture(row: tuple[Any, ...], calls: list[Call], cut_off: bool, report: Report) -> None:
    """Whether the state of one picture is true, and its calls were those that may be sent."""
    state, number, _, seed, _, _, paid, said = row
    outcomes = [call.outcome for call in calls]
    facts = json.loads(said)
    name = f"picture {number} is {state} after {outcomes or 'no call'}"
    last = outcomes[-1] if outcomes else ""
    report.check(all(outcome in NOT_BILLED for outcome in outcomes[:-1]), f"{name}: sent again after it may be billed")
    report.check(all(call.seed == seed for call in calls), f"{name}: sent with another seed than {seed}")
    report.check(len(facts.get("attempts", ())) >= len(calls), f"{name}: {facts.get('attempts')} are its attempts")
    code = facts.get("error", {}).get("code")
    if state == "saved":
        report.check(last in (*GOOD, *BEGUN) and paid == 1, f"{name}, paid {paid}")
    elif state == "unknown":
        report.check((cut_off or last in UNKNOWABLE) and paid == 1, f"{name}, out at a kill: {cut_off}, paid {paid}")
        report.check(facts.get("error", {}).get("billed") == "unknown", f"{name}: its error is {facts.get('error')}")
    elif state == "failed":
        fits = (last in REFUSED and code == "blocked" and not paid) or (
            last in UNUSABLE and code == "image_unusable" and paid == 1
        )
        report.check(fits, f"{name}: {code}, paid {paid}")
    lost = state != "saved" and last in GOOD and not cut_off
    report.lost += lost
    report.check(not lost, f"{name}: made, billed and answered, and lost")


def audit_files(folder: Path, rows: list[tuple[Any, ...]], report: Report) -> None:
    """Whether images, evidence and results.jsonl say what the database says."""
    with closing(sqlite3.connect(folder / "batch.sqlite3")) as database:
        (health,) = database.execute("PRAGMA integrity_check").fetchone()
    report.check(health == "ok", f"the database is damaged: {health}")
    results = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    report.check([r["line"] for r in results] == list(range(1, report.rows + 1)), "results.jsonl is not in input order")
    by_number = {result["number"]: result for result in results}
    saved = set()
    for state, number, prompt, seed, output, price, paid, _ in rows:
        result, path = by_number.get(number, {}), folder / output
        name = f"picture {number}, {state}"
        said = (result.get("state"), result.get("prompt"), result.get("seed"), result.get("estimated_cost"))
        report.check(said == (state, prompt, seed, round(price * paid, 6)), f"{name}: results.jsonl says {said}")
        if state not in LAST_STATES:
            continue
        evidence = json.loads(Path(result["evidence_path"]).read_text(encoding="utf-8"))
        found = (evidence["status"], evidence["request"]["prompt"], evidence["request"]["seed"])
        # Evidence of a picture that was paid for and cannot be used stays "generated", with an error.
        error = result.get("error", {}).get("code")
        status = "generated" if error == "image_unusable" else state
        report.check(found == (status, prompt, seed), f"{name}: its evidence says {found}")
        if state != "saved":
            report.check(not path.exists(), f"{name}: {path} is there")
            same = error == evidence.get("error", {}).get("code")
            report.check(same, f"{name}: results and evidence name different errors")
            continue
        saved.add(path)
        content = path.read_bytes() if path.exists() else b""
        hashes = {hashlib.sha256(content).hexdigest(), result.get("sha256"), evidence["image"]["sha256"]}
        report.check(len(hashes) == 1, f"{name}: file, evidence and results differ in their hash")
        report.check(mark_of(prompt) in content, f"{name}: {path} is not the picture of its prompt")
        report.check(decodes(content), f"{name}: {path} does not decode")
    report.check({path for path in (folder / "images").rglob("*") if path.is_file()} == saved, "images/ holds others")
    left = [path.name for path in folder.rglob(".*.part")]
    report.check(not left, f"temporary files are left: {some(left)}")


def decodes(content: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return bool(image.size == (512, 512))
    except (OSError, ValueError, SyntaxError):
        return False


def some(things: Iterable[object]) -> str:
    texts = [str(thing) for thing in things]
    return ", ".join(texts[:5]) + (f" and {len(texts) - 5} more" if len(texts) > 5 else "")


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def show(report: Report) -> None:
    table(
        ("rows", "kills", "runs", "saved", "unknown", "failed", "billed", "paid twice", "lost"),
        [
            (
                report.rows,
                report.kills,
                report.runs,
                *(report.states[state] for state in ("saved", "unknown", "failed")),
                report.billed,
                report.paid_twice,
                report.lost,
            )
        ],
    )
    codes = ", ".join(f"{code}: {count}" for code, count in sorted(report.exit_codes.items()))
    print(
        f"{report.calls} calls, {report.faults} with a fault, {report.unknowable} of an outcome that cannot be known; "
        f"{report.out_at_kills} requests out at the kills; runs that ended by themselves, by exit code: {codes}; "
        f"{report.seconds:.0f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--concurrency", type=int, default=4, help="requests out at once, all of which a kill may hit")
    parser.add_argument("--faults", type=int, default=10, help="one call in so many has a fault")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", help="where to work (default: the folder for temporary files)")
    arguments = parser.parse_args()
    given = (arguments.seed, arguments.concurrency, arguments.faults, arguments.folder)
    report = measure(arguments.rows, arguments.kills, *given)
    show(report)
    figures.keep("kills", vars(report))
    for what in report.broken[:50]:
        print(f"BROKEN: {what}", file=sys.stderr)
    return 1 if report.broken else 0


if __name__ == "__main__":
    sys.exit(main())
