"""Mutants: small faults in the rooms that hold money and trust, one at a time. The tests must notice each.

    make mutants                                                  # all of them: hours
    python tests/mutation/mutants.py --room make --sample 40      # a part, always the same one
    python tests/mutation/mutants.py --room make --again          # those that nobody noticed, once more

Each is put into a copy of the working tree, and the tests of its room run there until one fails (rooms.py). What was
found is kept from run to run, in output/: a mutant is judged again only when its function is another.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import figures
from mutation.operators import Mutant, mutants_of
from mutation.rooms import EXPLAINED, ROOMS

SKILL = "skills/ai/image/alicloud-ai-image-zimage-turbo"
SESSION = figures.FOLDER / "mutants.jsonl"
KILLED, TIMEOUT, SURVIVED = "killed", "timeout", "survived"
LONGEST_S = 60.0  # of a stage that takes no time
SLOWER = 6  # than it was with the room as it is: then it hangs


class Verdict(NamedTuple):
    outcome: str
    by: str  # the test that noticed
    seconds: float


class Copy:
    """A copy of the working tree, in which one room at a time is another."""

    def __init__(self, folder: Path, python: str) -> None:
        self._root = folder / "tree"
        self._temporary = folder / "tmp"
        self._python = python
        self._moment = int(time.time())
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, check=True,
        )  # fmt: skip
        for name in listed.stdout.decode().split("\0"):
            if name and (ROOT / name).is_file():
                (self._root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self._root / name)

    def write(self, room: str, source: str) -> None:
        """Each time with another moment, of whole seconds: by it Python knows that a cached compilation is stale."""
        path = self._root / path_of(room)
        path.write_text(source, encoding="utf-8")
        self._moment += 2
        os.utime(path, (self._moment, self._moment))

    def test(self, words: Sequence[str], limit_s: float) -> Verdict:
        options = ("-x", "--quiet", "--no-header", "-m", "not heavy", f"--basetemp={self._temporary}")
        without = ("-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:hypothesispytest")
        command = [self._python, "-m", "pytest", *options, *without, *words]
        began = time.monotonic()
        process = subprocess.Popen(
            command, cwd=self._root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            said, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return Verdict(TIMEOUT, "", time.monotonic() - began)
        finally:
            with contextlib.suppress(ProcessLookupError):  # whatever it has started, too
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        seconds = time.monotonic() - began
        if process.returncode == 0:
            return Verdict(SURVIVED, "", seconds)
        text = said.decode(errors="replace")
        failed = re.search(r"(?m)^(?:FAILED|ERROR) (.+?)(?: - .*)?$", text)
        return Verdict(KILLED, failed[1] if failed else text[-300:], seconds)


def path_of(room: str) -> str:
    return f"{SKILL}/scripts/zimage/{room}.py"


class Stages:
    """The tests of a room, stage by stage. A stage is looked at before it counts."""

    def __init__(self, room: str, source: str, most: int | None) -> None:
        self._room = room
        self._source = source
        self._words = ROOMS[room][:most]
        self._lock = threading.Lock()
        self._limits: dict[tuple[str, ...], float] = {}

    def judge(self, copy: Copy, mutant: Mutant) -> Verdict:
        seconds = 0.0
        for words in self._words:
            limit = self._limit(copy, words)
            copy.write(self._room, mutant.source)
            verdict = copy.test(words, limit)
            seconds += verdict.seconds
            if verdict.outcome == KILLED and not self._fails_alone(copy, verdict.by, limit):
                verdict = copy.test(words, limit)  # on a busy machine a test may fail by itself
                seconds += verdict.seconds
            if verdict.outcome != SURVIVED:
                break
        return verdict._replace(seconds=round(seconds, 1))

    def _fails_alone(self, copy: Copy, test: str, limit_s: float) -> bool:
        again = copy.test([test], limit_s)
        return again.outcome != SURVIVED and "not found: " not in again.by

    def _limit(self, copy: Copy, words: tuple[str, ...]) -> float:
        """How long it may take. It passes with the room as it is, and notices a room that is not there."""
        with self._lock:
            if words not in self._limits:
                copy.write(self._room, self._source)
                sound = copy.test(words, 1800)
                copy.write(self._room, "raise SystemError\n")
                broken = copy.test(words, 1800)
                if (sound.outcome, broken.outcome) != (SURVIVED, KILLED):
                    raise SystemExit(f"{' '.join(words)}: {sound} with {self._room}, {broken} without")
                self._limits[words] = LONGEST_S + SLOWER * sound.seconds
            return self._limits[words]


# What is known already ------------------------------------------------------------------------------------------------


class Session:
    """Verdicts by room and mutant, one JSON line each; the last one counts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], Verdict] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                said = json.loads(line)
                self._known[said["room"], said["mutant"]] = Verdict(said["outcome"], said["by"], said["seconds"])

    def of(self, room: str, mutant: Mutant) -> Verdict | None:
        return self._known.get((room, mutant.name))

    def asks_for(self, room: str, mutant: Mutant, *, again: bool) -> bool:
        verdict = self.of(room, mutant)
        return verdict is None or (again and verdict.outcome == SURVIVED)

    def keep(self, room: str, mutant: Mutant, verdict: Verdict) -> None:
        facts = {"room": room, "mutant": mutant.name, "operator": mutant.operator, "line": mutant.line,
                 "was": mutant.was, "became": mutant.became} | verdict._asdict()  # fmt: skip
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            self._known[room, mutant.name] = verdict
            file.write(json.dumps(facts, ensure_ascii=False) + "\n")


def chosen(mutants: list[Mutant], sample: int | None, seed: int) -> list[Mutant]:
    """A part that depends on the seed alone: a larger one holds the smaller, whatever else is changed."""
    return sorted(mutants, key=lambda m: hashlib.sha256(f"{seed} {m.name}".encode()).hexdigest())[:sample]


def why_none(room: str, mutant: Mutant) -> str | None:
    """Why it is no fault, where that has been found out."""
    for row in EXPLAINED:
        if (row.room, row.was) == (room, mutant.was) and row.became in (None, mutant.became):
            return row.why
    return None


# A run ----------------------------------------------------------------------------------------------------------------


def judge_all(
    room: str, source: str, mutants: list[Mutant], session: Session, copies: queue.Queue[Copy], most: int | None
) -> None:
    stages = Stages(room, source, most)

    def judge_one(mutant: Mutant) -> None:
        copy = copies.get()
        try:
            verdict = stages.judge(copy, mutant)
        finally:
            copy.write(room, source)
            copies.put(copy)
        session.keep(room, mutant, verdict)
        print(f"{room}:{mutant.line} {mutant.operator}: {verdict.outcome} {verdict.by} {verdict.seconds} s", flush=True)
        if verdict.outcome == SURVIVED:
            print(diff_of(mutant.was, mutant.became), flush=True)

    with ThreadPoolExecutor(copies.qsize()) as pool:
        list(pool.map(judge_one, mutants))


def counted(room: str, mutants: list[Mutant], judged: list[tuple[Mutant, Verdict]]) -> dict[str, Any]:
    outcomes = [verdict.outcome for _, verdict in judged]
    survivors = [mutant for mutant, verdict in judged if verdict.outcome == SURVIVED]
    explained = [mutant for mutant in survivors if why_none(room, mutant)]
    killed = len(judged) - len(survivors)
    faults = len(judged) - len(explained)
    return {
        "mutants": len(mutants),
        "judged": len(judged),
        "killed": killed,
        "of_them_by_time": outcomes.count(TIMEOUT),
        "survived": len(survivors),
        "of_them_explained": len(explained),
        "score": round(killed / faults, 4) if faults else None,
    }


def in_all(rooms: Sequence[dict[str, Any]]) -> dict[str, Any]:
    total = {name: sum(room[name] for room in rooms) for name in rooms[0] if name != "score"}
    faults = total["judged"] - total["of_them_explained"]
    return total | {"score": round(total["killed"] / faults, 4) if faults else None}


def diff_of(was: str, became: str) -> str:
    signs = [*(f"  - {line}" for line in was.splitlines()), *(f"  + {line}" for line in became.splitlines())]
    return "\n".join(signs)


def as_text(rooms: dict[str, dict[str, Any]]) -> Iterator[str]:
    heads = next(iter(rooms.values())).keys()
    yield " | ".join(["room".ljust(14), *(head.replace("_", " ") for head in heads)])
    for name, facts in rooms.items():
        yield " | ".join([name.ljust(14), *(str(facts[head]).rjust(len(head)) for head in heads)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--room", action="append", choices=ROOMS, help="again for more; all, unless given")
    parser.add_argument("--sample", type=int, help="so many of each room; all, unless given")
    parser.add_argument("--stages", type=int, help="only so many, the quickest: what they miss others may notice")
    parser.add_argument("--seed", type=int, default=0, help="which sample (%(default)s)")
    parser.add_argument("--again", action="store_true", help="judge those that survived once more")
    parser.add_argument("--report", action="store_true", help="judge nothing, tell what is known")
    parser.add_argument("--workers", type=int, default=1, help="each runs tests, one after another (%(default)s)")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has what the tests need")
    options = parser.parse_args()

    session = Session(SESSION)
    rooms: dict[str, dict[str, Any]] = {}
    survivors: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies: queue.Queue[Copy] = queue.Queue()
        for number in range(0 if options.report else options.workers):
            copies.put(Copy(Path(folder, str(number)), os.path.abspath(options.python)))
        for room in options.room or ROOMS:
            source = (ROOT / path_of(room)).read_text(encoding="utf-8")
            mutants = mutants_of(source)
            part = chosen(mutants, options.sample, options.seed)
            if not options.report:
                left = [mutant for mutant in part if session.asks_for(room, mutant, again=options.again)]
                judge_all(room, source, left, session, copies, options.stages)
            judged = [(mutant, verdict) for mutant in part if (verdict := session.of(room, mutant))]
            rooms[room] = counted(room, mutants, judged)
            survivors += [
                {"room": room, "line": mutant.line, "operator": mutant.operator, "was": mutant.was,
                 "became": mutant.became, "explained": why_none(room, mutant)}
                for mutant, verdict in judged if verdict.outcome == SURVIVED
            ]  # fmt: skip
    total = in_all(list(rooms.values()))
    facts = {
        "sample": options.sample,
        "seed": options.seed,
        "stages": options.stages,
        "rooms": rooms,
        "all": total,
        "survivors": survivors,
    }
    path = figures.keep("mutants", facts)
    for survivor in survivors:
        if not survivor["explained"]:
            print("survived: {room}:{line} {operator}".format(**survivor))
            print(diff_of(survivor["was"], survivor["became"]))
    print("\n".join(as_text(rooms | {"all": total})))
    print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
