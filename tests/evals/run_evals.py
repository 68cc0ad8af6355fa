#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "requests>=2.32.3,<3",
#   "urllib3>=2.6.3,<3",
#   "jsonschema>=4.18,<5",
#   "Pillow>=10.3,<14",
#   "truststore>=0.10,<1",
#   "tqdm>=4.66,<5",
# ]
# ///
"""Grade what somebody did with this skill: plays it against the mock service, then looks at what is left.

    run_evals.py                                  every task with its reference solution
    run_evals.py --task blog-header               one of them, by name or number
    run_evals.py --task 1 --commands FILE         the commands of a transcript, or your own solution
    run_evals.py --task 1 --live FOLDER           set the scene for an agent, wait for the end of stdin, then grade
    run_evals.py --after FOLDER                   grade such a folder (again)
    run_evals.py --list                           the tasks

FILE is a JSON list, its steps played in order: a string is a line for sh, a list an argv ($SKILL_DIR is replaced),
{"file": NAME, "text": TEXT} a file that was written. --keep FOLDER keeps what --commands left, for --after.
--live prints the scene first (prompt, working folder, environment, a copy of the skill without these evals): start the
agent there. The verdict is JSON on stdout; exit 0 when all checks pass, 1 when one fails, 2 for a mistake in the call.

The tasks are in evals.json of the skill, which has nothing but the fields of the format, so that other tools read it
too; what only this program understands is in checks.json beside it, and never installed: `setup` (the scene) and
`checks`, each one function of `CHECKS` below.
A check sees the project folder and the statistics of the mock service, never what anybody said or how a command ended.
Needs sh. What is played has an empty home, a mock key, and a dead proxy in place of the network.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
SKILL = HERE.parents[1] / "skills" / "ai" / "image" / "alicloud-ai-image-zimage-turbo"
sys.path.insert(0, str(SKILL / "scripts"))

from PIL import Image

from mock_server import MockServer

STEP_LIMIT_S = 120
KEPT_VARIABLES = ("PATH", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV")
DEFAULT_ENV = {"DASHSCOPE_API_KEY": "{key}", "DASHSCOPE_BASE_URL": "{dashscope}"}
NO_NETWORK = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
PAID = ("generated", "saved")

Json = dict[str, Any]
Step = Any  # a shell line, an argv, or {"file": …, "text": …}


class Task(NamedTuple):
    """One task: what the user says, the scene it plays in, and what must be true afterwards."""

    id: int
    name: str
    prompt: str
    files: list[Path]
    setup: Json
    checks: Json


def load_tasks() -> dict[str, Task]:
    """All tasks by name, from the two files."""
    told = {task["id"]: task for task in read_json(SKILL / "evals" / "evals.json")["evals"]}
    return {
        extra["name"]: Task(
            extra["id"],
            extra["name"],
            told[extra["id"]]["prompt"],
            [SKILL / file for file in told[extra["id"]]["files"]],
            extra["setup"],
            extra["checks"],
        )
        for extra in read_json(HERE / "checks.json")["tasks"]
    }


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# The scene, and what is played in it
# ---------------------------------------------------------------------------------------------------------------------


class Stage:
    """A working folder, an empty home and a mock service of one's own, all as the task says.

    Below `folder`: project/ is where the work is done, scene.json says how it looked before, stats.json what the
    service saw when it is over.
    """

    def __init__(self, task: Task, folder: Path, skill: Path = SKILL) -> None:
        self.task, self.folder = task, folder.resolve()
        self.project, home, programs = (self.folder / name for name in ("project", "home", "bin"))
        for path in (self.project, home, programs):
            path.mkdir(parents=True)
        for name in ("python", "python3"):
            launcher = programs / name
            launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
            launcher.chmod(0o755)
        self._mock = MockServer(**{"rpm": 0, **task.setup.get("mock", {})}).start()
        self._groups: list[int] = []
        self._words = {
            "key": self._mock.api_key,
            "dashscope": self._mock.base_url,
            "zimageturbo": self._mock.zimageturbo_url,
            "openai": self._mock.openai_url,
        }
        given = {name: text.format(**self._words) for name, text in task.setup.get("env", DEFAULT_ENV).items()}
        self.own_env = {"SKILL_DIR": str(skill), **given}
        self._env = {
            **{name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ},
            **{"HOME": str(home), "LANG": "C.UTF-8"},
            **NO_NETWORK,
            **self.own_env,
        }
        self._env["PATH"] = f"{programs}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        self._set_scene()

    def _set_scene(self) -> None:
        setup = self.task.setup
        for file in self.task.files:
            shutil.copyfile(file, self.project / file.name)
        for name, text in setup.get("write", {}).items():
            (self.project / name).write_text(text.format(**self._words), encoding="utf-8")
        given = files_below(self.project)
        for line in setup.get("before", []):
            self.play(line, STEP_LIMIT_S)
        secrets = {value for name, value in self.own_env.items() if name.endswith("_KEY")} | {self._mock.api_key}
        scene = {
            "task": self.task.name,
            "keys": sorted(secrets),
            "given": given,
            "files": files_below(self.project),
            "stats": self._mock.stats(),
        }
        write_json(self.folder / "scene.json", scene)

    def play(self, step: Step, limit_s: float) -> Json:
        """Play one step; says how it ended, for people. It gets no terminal and no input."""
        if isinstance(step, dict):
            path = self.project / step["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(step["text"], encoding="utf-8")
            return {"command": f"write {step['file']}", "exit_code": 0}
        argv = ["sh", "-c", step]
        if isinstance(step, list):
            argv = [word.replace("$SKILL_DIR", self.own_env["SKILL_DIR"]) for word in step]
        with tempfile.TemporaryFile() as log:  # not a pipe: what runs on in the background would hold it open
            try:
                process = subprocess.Popen(
                    argv,
                    cwd=self.project,
                    env=self._env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            except OSError as problem:
                return {"command": step, "exit_code": 127, "said": str(problem)}
            self._groups.append(process.pid)
            try:
                process.wait(limit_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            log.seek(0)
            said = log.read().decode(errors="replace")[-600:]
        return {"command": step, "exit_code": process.returncode, "said": said}

    def close(self) -> None:
        """End what still runs, and keep the statistics."""
        for group in self._groups:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
        self._mock.close()
        write_json(self.folder / "stats.json", self._mock.stats())

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


def files_below(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file, by its path below the folder."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with contextlib.suppress(FileNotFoundError):  # something in the background has removed it meanwhile
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What is left
# ---------------------------------------------------------------------------------------------------------------------


class Aftermath:
    """All that a check may look at, read from the folder of a stage."""

    def __init__(self, folder: Path) -> None:
        self.project = folder.resolve() / "project"
        self.scene: Json = read_json(folder / "scene.json")
        self.stats: Json = read_json(folder / "stats.json")
        self.files = files_below(self.project)

    def counted(self, name: str) -> int:
        """How far a counter of the service went up during the task."""
        return int(self.stats[name]) - int(self.scene["stats"][name])

    @property
    def payloads(self) -> list[Json]:
        """What the valid requests of the task asked for, flat."""
        return [flat(payload) for payload in self.stats["payloads"][len(self.scene["stats"]["payloads"]) :]]

    @cached_property
    def evidence(self) -> list[Json]:
        """All evidence, of single pictures and batches, of the task and before it."""
        found = [read_json(self.project / name) for name in self.files if fnmatch(name, "*evidence/*.json")]
        return [data for data in found if isinstance(data, dict) and {"schema_version", "status"} <= data.keys()]

    @property
    def new_files(self) -> list[str]:
        """What was not there before, or is another file now."""
        return [name for name, sha256 in self.files.items() if self.scene["files"].get(name) != sha256]

    @cached_property
    def new_pictures(self) -> list[Picture]:
        """The new picture files, opened."""
        return [opened(self.project, name) for name in self.new_files if is_picture(name)]


class Picture(NamedTuple):
    file: str
    format: str  # as Pillow names it; "broken" if it does not decode
    width: int
    height: int


def is_picture(name: str) -> bool:
    """Whether it is named like a picture, and is no thumbnail of a gallery and not half written (hidden)."""
    return name.lower().endswith(PICTURE_SUFFIXES) and "thumbs/" not in name and "/." not in f"/{name}"


def opened(project: Path, name: str) -> Picture:
    try:
        with Image.open(project / name) as image:
            image.load()
            return Picture(name, image.format or "", image.width, image.height)
    except (OSError, SyntaxError, ValueError):
        return Picture(name, "broken", 0, 0)


def flat(payload: Json) -> Json:
    """A payload as the checks speak of it: the parameters beside service and prompt."""
    return {"service": payload["service"], "prompt": payload["prompt"], **payload["parameters"]}


# ---------------------------------------------------------------------------------------------------------------------
# The checks
# ---------------------------------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    passed: bool
    found: object


def within(number: float, wanted: Any) -> bool:
    """Whether it is the number, or in the range [least, most]."""
    least, most = wanted if isinstance(wanted, list) else (wanted, wanted)
    return bool(least <= number <= most)


def fits(value: object, wanted: object) -> bool:
    """A list wants all its patterns found in the text; a text is compared but for blanks around it."""
    if isinstance(wanted, list):
        return all(re.search(pattern, str(value), re.IGNORECASE) for pattern in wanted)
    if isinstance(wanted, str):
        return str(value).strip() == wanted.strip()
    return value == wanted


def counter(name: str) -> Callable[[Aftermath, Any], Verdict]:
    """A counter of the service. billed: pictures that cost money. generate_requests: tries to get one."""

    def check(after: Aftermath, wanted: Any) -> Verdict:
        return Verdict(within(after.counted(name), wanted), after.counted(name))

    return check


def tallied(found: Counter[str], wanted: Json) -> Verdict:
    """Each name as often as wanted; what is not named not at all."""
    return Verdict(all(within(found[name], wanted.get(name, 0)) for name in found.keys() | wanted.keys()), dict(found))


def errors(after: Aftermath, wanted: Json) -> Verdict:
    """Refusals of the service, by its own codes: how often somebody ran against the same wall."""
    found: Counter[str] = Counter(after.stats["errors"])
    found.subtract(after.scene["stats"]["errors"])
    return tallied(+found, wanted)


def sent(after: Aftermath, wanted: list[Json]) -> Verdict:
    """Every valid request was one of these, and each of these was sent `times` (1) times."""
    counts = [
        (sum(all(fits(payload.get(name), value) for name, value in row.items()) for payload in after.payloads), times)
        for row, times in ((row, row.pop("times", 1)) for row in map(dict, wanted))
    ]
    passed = all(count == times for count, times in counts) and len(after.payloads) == sum(t for _, t in counts)
    return Verdict(passed, after.payloads)


def sent_once(after: Aftermath, wanted: bool) -> Verdict:
    """Before and during the task together, no prompt was sent twice."""
    prompts = Counter(payload["prompt"] for payload in after.stats["payloads"])
    again = {prompt: count for prompt, count in prompts.items() if count > 1}
    return Verdict(bool(again) != wanted, again)


def seeds(after: Aftermath, wanted: int) -> Verdict:
    """So many different seeds were sent."""
    found = {payload.get("seed") for payload in after.payloads}
    return Verdict(len(found) == wanted, sorted(map(str, found)))


def pictures(after: Aftermath, wanted: list[Json]) -> Verdict:
    """Each of these is among the new pictures, `count` (1) times at least; an empty list wants no new picture."""

    def like(picture: Picture, row: Json) -> bool:
        fields = picture._asdict()
        plain = {name: value for name, value in row.items() if name in fields and name != "file"}
        ratio = float(row.get("ratio", 0))
        return (
            fnmatch(picture.file, row.get("file", "*"))
            and picture.format != "broken"
            and all(fields[name] == value for name, value in plain.items())
            and (not ratio or abs(picture.width / picture.height / ratio - 1) < 0.01)
        )

    found = after.new_pictures
    passed = all(sum(like(picture, row) for picture in found) >= row.get("count", 1) for row in wanted)
    return Verdict(passed and bool(found) == bool(wanted), [picture._asdict() for picture in found])


def evidence(after: Aftermath, wanted: Json) -> Verdict:
    """All evidence of the project by status."""
    return tallied(Counter(data["status"] for data in after.evidence), wanted)


def endpoints(after: Aftermath, wanted: list[str]) -> Verdict:
    """Whatever left, left for a place that one of these patterns matches."""
    found = sorted({str(data["endpoint"]) for data in after.evidence})
    return Verdict(all(any(re.search(pattern, place) for pattern in wanted) for place in found), found)


def cost(after: Aftermath, wanted: Any) -> Verdict:
    """What the evidence of the project says was paid, in US$."""
    found = round(sum(data["cost"]["estimate"] for data in after.evidence if data["status"] in PAID), 6)
    return Verdict(within(found, wanted), found)


def rows(after: Aftermath, wanted: Json) -> Verdict:
    """The rows of all batches by state, from their results.jsonl."""
    results = [after.project / name for name in after.files if name.endswith("results.jsonl")]
    lines = [line for path in results for line in path.read_text(encoding="utf-8").splitlines()]
    return tallied(Counter(json.loads(line)["state"] for line in lines), wanted)


def files(after: Aftermath, wanted: list[str]) -> Verdict:
    """These are there."""
    missing = [pattern for pattern in wanted if not any(fnmatch(name, pattern) for name in after.files)]
    return Verdict(not missing, {"missing": missing})


def new_files(after: Aftermath, wanted: list[str]) -> Verdict:
    """Nothing but these was written."""
    found = [name for name in after.new_files if not any(fnmatch(name, pattern) for pattern in wanted)]
    return Verdict(not found, found)


def json_files(after: Aftermath, wanted: Json) -> Verdict:
    """These files are JSON with these values; a dotted name leads into objects."""

    def value(data: Any, name: str) -> object:
        for part in name.split("."):
            data = data.get(part) if isinstance(data, dict) else None
        return data

    found: Json = {}
    for file, fields in wanted.items():
        try:
            data = read_json(after.project / file)
        except (OSError, ValueError) as problem:
            return Verdict(False, {file: str(problem)})
        found[file] = {name: value(data, name) for name in fields}
    return Verdict(all(fits(found[f][name], v) for f, fields in wanted.items() for name, v in fields.items()), found)


def untouched(after: Aftermath, may_change: list[str]) -> Verdict:
    """The user's files and the pictures that were there are what they were."""
    before = after.scene["files"]
    old_pictures = {name for name in before if is_picture(name)}
    kept = (old_pictures | set(after.scene["given"])) - set(may_change)
    lost = [name for name in sorted(kept) if after.files.get(name) != before[name]]
    return Verdict(not lost, lost)


def key_kept(after: Aftermath, wanted: bool) -> Verdict:
    """The key is in no file but those that held it before."""
    keys = [key.encode() for key in after.scene["keys"]]
    changed = [name for name in after.files if after.files[name] != after.scene["given"].get(name)]
    found = [name for name in changed if any(key in (after.project / name).read_bytes() for key in keys)]
    return Verdict(bool(found) != wanted, found)


def whole(after: Aftermath, wanted: bool) -> Verdict:
    """Every picture that an evidence file calls saved is there, byte for byte."""
    have = set(after.files.values())
    lost = [d["image"]["path"] for d in after.evidence if d["status"] == "saved" and d["image"]["sha256"] not in have]
    return Verdict(bool(lost) != wanted, lost)


CHECKS: dict[str, Callable[[Aftermath, Any], Verdict]] = {
    **{
        name: counter(name)
        for name in ("billed", "generate_requests", "model_queries", "status_queries", "downloads", "throttled")
    },
    **{check.__name__: check for check in (errors, sent, sent_once, seeds, pictures, evidence, endpoints, cost, rows)},
    **{check.__name__: check for check in (files, new_files, untouched, key_kept, whole)},
    "json": json_files,
}
FOR_ALL: Json = {"untouched": [], "key_kept": True, "whole": True}  # unless the task says otherwise


def grade(task: Task, folder: Path) -> Json:
    """The verdict on what is left in the folder of a stage."""
    after = Aftermath(folder)
    results = []
    for name, wanted in (FOR_ALL | task.checks).items():
        verdict = CHECKS[name](after, wanted)
        results.append({"check": name, "passed": verdict.passed, "wanted": wanted, "found": verdict.found})
    return {
        "task": task.name,
        "id": task.id,
        "passed": all(result["passed"] for result in results),
        "failed": [result["check"] for result in results if not result["passed"]],
        "checks": results,
    }


def played(task: Task, steps: Sequence[Step], keep: Path | None = None) -> Json:
    """The verdict on some commands."""
    with contextlib.ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="eval-"))) / task.name
        with Stage(task, folder) as stage:
            limit_s = task.setup.get("step_limit_s", STEP_LIMIT_S)
            commands = [stage.play(step, limit_s) for step in steps]
        return {**grade(task, folder), "commands": commands}


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def live(task: Task, folder: Path) -> Json:
    """Set the scene, say where it is, and wait for whoever plays in it to close stdin."""
    skill = folder / "skill" / SKILL.name
    shutil.copytree(SKILL, skill, ignore=shutil.ignore_patterns("evals", "__pycache__"))
    with Stage(task, folder, skill) as stage:
        scene = {"task": task.name, "prompt": task.prompt, "cwd": str(stage.project), "env": stage.own_env}
        print(json.dumps(scene, ensure_ascii=False), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            sys.stdin.read()
    return grade(task, folder)


def solution(task: Task) -> list[Step]:
    """The reference solution."""
    return list(read_json(HERE / "solutions" / f"{task.name}.json"))


def verdicts(options: argparse.Namespace, tasks: dict[str, Task]) -> Iterator[Json]:
    if options.after:
        yield grade(tasks[read_json(options.after / "scene.json")["task"]], options.after)
    elif options.live:
        yield live(options.task, options.live)
    elif options.task:
        steps = read_json(options.commands) if options.commands else solution(options.task)
        yield played(options.task, steps, options.keep)
    else:
        with ThreadPoolExecutor(options.jobs) as pool:
            yield from pool.map(lambda task: played(task, solution(task)), tasks.values())


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--task", metavar="NAME|ID")
    parser.add_argument("--commands", type=Path, metavar="FILE", help="the steps; default: the reference solution")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="play in this new folder and leave it")
    parser.add_argument("--live", type=Path, metavar="FOLDER", help="set the scene in this new folder and wait")
    parser.add_argument("--after", type=Path, metavar="FOLDER", help="grade what --live or --keep left")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="tasks at once (default: %(default)s)")
    parser.add_argument("--list", action="store_true")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    tasks = load_tasks()
    if options.list:
        for task in tasks.values():
            print(f"{task.id:3} {task.name:22} {task.prompt}")
        return 0
    if options.task:
        by_id = {str(task.id): task for task in tasks.values()}
        if options.task not in tasks.keys() | by_id.keys():
            parser.error(f"no task {options.task!r}: --list names them")
        options.task = tasks.get(options.task) or by_id[options.task]
    elif options.commands or options.live or options.keep:
        parser.error("--commands, --keep and --live need --task")
    for folder in (options.keep, options.live):
        if folder and folder.exists():
            parser.error(f"{folder} exists: every play needs a new folder")
    results = list(verdicts(options, tasks))
    if len(results) > 1:
        ended = Counter(result["passed"] for result in results)
        print(
            json.dumps({"passed": ended[True], "failed": ended[False], "tasks": results}, ensure_ascii=False, indent=1)
        )
    else:
        print(json.dumps(results[0], ensure_ascii=False, indent=1))
    return 0 if all(result["passed"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
