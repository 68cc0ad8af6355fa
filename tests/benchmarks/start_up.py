"""What the commands cost whatever they are asked for: start-up, one picture, a signal while they start, a long input.

Run `python tests/benchmarks/start_up.py` (some five minutes), or parts of it with `--part dry-run`. CPU seconds are
those of a whole process, user and system, the best of several runs after one that is not counted, so that compiled
modules are cached. All contestants of a part take turns.

- dry-run: `--dry-run` of one picture, beside a Python that imports requests and jsonschema and does nothing;
- picture: one picture from the mock service, beside the official client's library with a download;
- signal: SIGINT 30, 60 and 90 ms after the start: how many runs end as promised, with exit code 130, the advice as
  the last line of stderr and, where JSON is promised, one object on stdout;
- batch: `--dry-run` of 200,000 JSON lines, beside a loop that only reads, hashes and inserts them.

`--beside FOLDER` measures another checkout of this repository in the same turns. A measurement, not a test: a bad
figure fails nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import SCRIPTS, TEST_KEY, Ended, fail, run, table, working_folder, write_rows
from benchmarks.one_picture import OFFICIAL_CLIENT, PROMPT, SEED, SIZE

PARTS = ("dry-run", "picture", "signal", "batch")
GOALS = {"dry-run": 0.40, "picture": 0.28, "batch": 8.0}  # CPU, of that of the reference
MOMENTS_MS = (30, 60, 90)
REQUEST = json.dumps({"prompt": PROMPT, "size": SIZE, "seed": SEED})

ONLY_IMPORTS = "import requests, jsonschema"

ONLY_STORES = """
import hashlib, sqlite3, sys
database = sqlite3.connect("", isolation_level=None)
database.execute("CREATE TABLE rows (position INTEGER PRIMARY KEY, hash TEXT, line BLOB)")
database.execute("BEGIN")
with open(sys.argv[1], "rb") as source:
    for position, line in enumerate(source):
        values = (position, hashlib.sha256(line).hexdigest(), line)
        database.execute("INSERT INTO rows VALUES (?, ?, ?)", values)
database.execute("COMMIT")
"""


class Line(NamedTuple):
    """One line of the table: what was measured, its goal, and the figure of each checkout."""

    what: str
    goal: str
    figures: Sequence[str]


class Checkout(NamedTuple):
    """The scripts of a checkout."""

    name: str
    scripts: Path

    def image(self, *arguments: str) -> list[str]:
        return [sys.executable, str(self.scripts / "generate_image.py"), *arguments]

    def batch(self, *arguments: str) -> list[str]:
        return [sys.executable, str(self.scripts / "generate_batch.py"), *arguments]


def other_checkout(folder: str) -> Checkout:
    scripts = Path(folder).resolve() / SCRIPTS.relative_to(Path(__file__).resolve().parents[2])
    if not (scripts / "generate_image.py").is_file():
        sys.exit(f"{folder} is no checkout of this repository")
    return Checkout(Path(folder).resolve().name, scripts)


def environment(home: Path, **more: str) -> dict[str, str]:
    """An empty home and a key, and nothing else of this machine: above all nothing that keeps caches from filling."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return kept | {"HOME": str(home), "DASHSCOPE_API_KEY": TEST_KEY} | more


@contextlib.contextmanager
def mock_service(home: Path, latency_s: float = 0.0) -> Iterator[dict[str, str]]:
    """The mock in a process of its own; gives what a client needs in its environment."""
    command = [sys.executable, str(SCRIPTS / "mock_server.py"), "--rpm", "0", "--latency", str(latency_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        try:
            assert server.stdout is not None
            said = json.loads(server.stdout.readline())
            addresses = dict.fromkeys(("DASHSCOPE_BASE_URL", "DASHSCOPE_HTTP_BASE_URL"), said["base_url"])
            yield environment(home, **addresses) | {"DASHSCOPE_API_KEY": said["api_key"]}
        finally:
            server.terminate()


# ---------------------------------------------------------------------------------------------------------------------
# Whole processes
# ---------------------------------------------------------------------------------------------------------------------


class Best(NamedTuple):
    """The best CPU and the best wall time of several runs, in seconds."""

    cpu: float
    wall: float


def in_turns(commands: Mapping[str, list[str]], env: dict[str, str], folder: Path, runs: int) -> dict[str, Best]:
    """The best of several runs of each command, by name; one before them is not counted."""
    ends: dict[str, list[Ended]] = {name: [] for name in commands}
    for _ in range(runs + 1):
        for name, command in commands.items():
            ended = run(command, env, folder)
            if ended.code:
                fail(f"{name} ended with {ended.code}: {ended.stderr[-2000:]}")
            ends[name].append(ended)
    return {
        name: Best(min(one.cpu_s for one in counted), min(one.seconds for one in counted))
        for name, (_, *counted) in ends.items()
    }


def compared(part: str, what: str, reference: str, best: dict[str, Best], checkouts: Sequence[Checkout]) -> list[Line]:
    """The lines of a part that is held against a reference: CPU and wall time, and their ratios."""
    base = best[reference]
    ours = [best[checkout.name] for checkout in checkouts]
    return [
        Line(f"{what}: CPU / {reference}", f"{GOALS[part]:.2f}", [f"{one.cpu / base.cpu:.2f}" for one in ours]),
        Line("  wall time / the same", "", [f"{one.wall / base.wall:.2f}" for one in ours]),
        Line(f"  CPU, ms (reference {base.cpu * 1000:.0f})", "", [f"{one.cpu * 1000:.0f}" for one in ours]),
        Line(f"  wall time, ms (reference {base.wall * 1000:.0f})", "", [f"{one.wall * 1000:.0f}" for one in ours]),
    ]


def dry_runs(checkouts: Sequence[Checkout], runs: int, folder: Path) -> list[Line]:
    commands = {each.name: each.image("--dry-run", "--prompt", PROMPT) for each in checkouts}
    commands["two imports"] = [sys.executable, "-c", ONLY_IMPORTS]
    best = in_turns(commands, environment(folder), folder, runs)
    return compared("dry-run", "--dry-run of a picture", "two imports", best, checkouts)


def pictures(checkouts: Sequence[Checkout], runs: int, folder: Path) -> list[Line]:
    how = ("--output", "ours.png", "--overwrite", "--request", REQUEST, "--print-response")
    commands = {each.name: each.image(*how) for each in checkouts}
    commands["official client"] = [sys.executable, "-c", OFFICIAL_CLIENT, PROMPT, SIZE, str(SEED)]
    with mock_service(folder) as env:
        best = in_turns(commands, env, folder, runs)
    return compared("picture", "a picture", "official client", best, checkouts)


def long_inputs(checkouts: Sequence[Checkout], count: int, runs: int, folder: Path) -> list[Line]:
    write_rows(folder / "rows.jsonl", rows(count))
    how = ("--input", "rows.jsonl", "--output-dir", "out", "--dry-run")
    commands = {each.name: each.batch(*how) for each in checkouts}
    commands["a loop"] = [sys.executable, "-c", ONLY_STORES, "rows.jsonl"]
    best = in_turns(commands, environment(folder), folder, runs)
    return compared("batch", f"--dry-run of {count:,} rows", "a loop", best, checkouts)


def rows(count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        prompt = f"picture {number} of a catalogue, on white, soft light, no shadow"
        yield {"id": f"item-{number:06d}", "prompt": prompt, "size": "512*512", "seed": number}


# ---------------------------------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------------------------------


def interrupted(command: list[str], env: dict[str, str], folder: Path, after_ms: int) -> tuple[int, str, str]:
    """How a command ends that gets SIGINT so long after its start: exit code, stdout, stderr."""
    with subprocess.Popen(
        command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        time.sleep(after_ms / 1000)
        process.send_signal(signal.SIGINT)
        try:
            stdout, stderr = process.communicate(timeout=60)
        except BaseException:
            process.kill()
            raise
    return process.returncode, stdout.decode(), stderr.decode()


def ends_as_promised(end: tuple[int, str, str], promises_json: bool) -> bool:
    code, stdout, stderr = end
    advice = stderr.splitlines()[-1:]
    return code == 130 and bool(advice) and advice[0].startswith("next: ") and (is_object(stdout) or not promises_json)


def is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def signals(checkouts: Sequence[Checkout], runs: int, folder: Path) -> list[Line]:
    write_rows(folder / "few.jsonl", rows(100))
    lines = []
    with mock_service(folder, latency_s=0.5) as env:
        for checkout in checkouts:
            warm_up(checkout, env, folder)
        for what, promises_json in (("--prompt", False), ("--prompt --print-response", True), ("a batch", True)):
            for moment in MOMENTS_MS:
                good = dict.fromkeys(checkouts, 0)
                for number in range(runs):
                    for checkout in checkouts:
                        fresh = f"{checkout.name}-{moment}-{number}"
                        image = checkout.image("--prompt", PROMPT, "--output", f"{fresh}-{promises_json}.png")
                        batch = checkout.batch("--input", "few.jsonl", "--output-dir", fresh, "--rpm", "0")
                        command = batch if what == "a batch" else image + ["--print-response"] * promises_json
                        good[checkout] += ends_as_promised(interrupted(command, env, folder, moment), promises_json)
                figures = [f"{good[checkout]}/{runs}" for checkout in checkouts]
                lines.append(Line(f"SIGINT after {moment} ms, {what}", f"{runs}/{runs}", figures))
    return lines


def warm_up(checkout: Checkout, env: dict[str, str], folder: Path) -> None:
    """Run both commands once, so that what they import is compiled."""
    for command in (
        checkout.image("--prompt", PROMPT, "--output", f"{checkout.name}-warm.png"),
        checkout.batch("--prompt", PROMPT, "--output-dir", f"{checkout.name}-warm"),
    ):
        ended = run(command, env, folder)
        if ended.code:
            fail(f"{checkout.name} ended with {ended.code}: {ended.stderr[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="repeatable (default: all)")
    parser.add_argument("--beside", metavar="FOLDER", help="another checkout, measured in the same turns")
    parser.add_argument("--runs", type=int, default=10, help="counted runs of each (of the part batch: a third)")
    parser.add_argument("--rows", type=int, default=200_000, help="lines of the part batch")
    parser.add_argument("--folder", help="where to work (default: the folder for temporary files)")
    arguments = parser.parse_args()
    parts, runs = arguments.part or list(PARTS), arguments.runs
    checkouts = [Checkout("here", SCRIPTS)] + ([other_checkout(arguments.beside)] if arguments.beside else [])
    lines: list[Line] = []
    with working_folder(arguments.folder) as folder:
        if "dry-run" in parts:
            lines += dry_runs(checkouts, runs, folder)
        if "picture" in parts:
            lines += pictures(checkouts, runs, folder)
        if "signal" in parts:
            lines += signals(checkouts, runs, folder)
        if "batch" in parts:
            lines += long_inputs(checkouts, arguments.rows, max(1, runs // 3), folder)
    header = ("", "goal", *(checkout.name for checkout in checkouts))
    table(header, [(line.what, line.goal, *line.figures) for line in lines])


if __name__ == "__main__":
    main()
