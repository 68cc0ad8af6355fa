"""Every write may be the one that fails, or the last one before the process dies: nothing is lost or paid twice.

A first pass counts the writes of a run (what one is: tests/every_write/sitecustomize.py). Then, for each of them, the
run is made anew with that write failing once, with it and all after it failing, or killed right behind it; and what its
advice says is done, on a disk that works again. What no write can break stands in `Single.judge` and `Many.judge`.

Those runs are forked off one that has loaded everything (tests/warm.py); the first pass is a process of its own, and
the writes that are seen in a fork are held against its.

    ZIMAGE_TEST_ONLY=17 pytest tests/test_every_write.py -k "batch and fail-from"    # one write alone
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import pytest

from batch_helpers import BATCH, PRICE, SMALL
from conftest import GENERATE, IS_WARM, Result, Shell
from fault_server import Answer, Behaviour, FaultServer, Received, file, good_body, json_answer, png
from provider_cases import DASHSCOPE, KEYS, OPENAI, ZIMAGETURBO, Case, TaskBook
from warm import Warm

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")

INJECTION = Path(__file__).resolve().parent / "every_write"
MODES = ("fail", "fail-from", "kill")
AT_ONCE = 8  # runs: much of each is waiting
PATIENCE = ("--timeout", "15")  # for a disk that stays full: the program may wait for it
CALL_S = 0.08  # of a paid call: what is saved meanwhile is mostly saved before the next answer, so that the order holds
COLOURS = ("teal", "crimson", "gold")


@functools.cache
def watched_process() -> Warm:
    """One whose writes are counted from its start on, as those of an interpreter with the injection are."""
    watched = {"PYTHONPATH": str(INJECTION), "ZIMAGE_TEST_WRITE": "fail:0", "ZIMAGE_TEST_WRITE_BELOW": "/nowhere"}
    process = Warm({"PATH": os.environ["PATH"]} | watched)
    atexit.register(process.close)
    return process


class Till:
    """A service of all protocols that makes a picture for every paid call, and knows how often each was paid."""

    def __init__(self, server: FaultServer) -> None:
        self.server = server
        self.book = TaskBook(course=self._task)
        self._notes: list[Callable[[], object]] = []
        self.fetches: dict[str, Behaviour] = {}  # by prompt, what its picture's download gets first
        for case in (DASHSCOPE, OPENAI, ZIMAGETURBO):
            server.play(case.paid_path, self._paid(case))
        server.play(ZIMAGETURBO.free_path, self.book.status)

    def environment(self) -> dict[str, str]:
        return KEYS | {case.url_variable: self.server.root + case.root for case in (DASHSCOPE, OPENAI, ZIMAGETURBO)}

    @staticmethod
    def picture(prompt: str) -> bytes:
        """What a prompt gets; rows of one batch get different ones."""
        return png(512, 512, COLOURS[sum(prompt.encode()) % len(COLOURS)])

    @staticmethod
    def link(prompt: str) -> str:
        return f"/img/{quote(prompt.replace(' ', '-'))}.png"

    def at_first_payment(self, note: Callable[[], object]) -> None:
        """Have something done when the next paid call arrives."""
        self._notes.append(note)

    def times(self, prompt: str) -> int:
        """How often a prompt was paid for."""
        return sum(prompt == self._prompt(request) for request in self.server.posts)

    @staticmethod
    def _prompt(request: Received) -> str:
        case = DASHSCOPE if request.path == DASHSCOPE.paid_path else OPENAI
        return case.prompt_in(json.loads(request.body))

    def _paid(self, case: Case) -> Any:
        def answer(request: Received) -> Answer:
            prompt = self._prompt(request)
            while self._notes:
                self._notes.pop()()
            self.server.play(self.link(prompt), self.fetches.pop(prompt, file(self.picture(prompt))))
            if case is ZIMAGETURBO:
                return self.book.submit(request)
            if case is DASHSCOPE:
                body = good_body(request.root + self.link(prompt))
                return json_answer(body, bills=True, delay_s=CALL_S)
            return json_answer(case.made(request, self.picture(prompt)), bills=True)

        return answer

    def _task(self, book: TaskBook, task_id: str, request: Received) -> Answer:
        return book.done(task_id, request, response=[request.root + self.link(book.tasks[task_id])])


@dataclass
class Story:
    """One run whose write number `number` fails as `mode` says, and what is done about it afterwards."""

    till: Till
    folder: Path  # for this story alone
    mode: str
    number: int
    prompt: str
    case: Case = DASHSCOPE
    said: str = ""  # both streams of the run whose disk failed
    problems: list[str] = field(default_factory=list)
    script: ClassVar[Path]

    def __post_init__(self) -> None:
        (self.folder / "project").mkdir(parents=True)
        (self.folder / "home").mkdir()
        self.shell = Shell(self.folder / "project", self.folder / "home", self.till.environment(), self.script)

    @property
    def log(self) -> Path:
        return self.folder / "writes.log"

    @property
    def arguments(self) -> tuple[str, ...]:
        raise NotImplementedError

    def check(self, holds: object, what: str) -> None:
        if not holds:
            self.problems.append(what)

    def was_reached(self) -> bool:
        """Whether there was a write of this number: where threads meet otherwise, commits are grouped."""
        return any(line.startswith(f"{self.number}\t") for line in self.writes())

    def first(self, *, cold: bool = not IS_WARM) -> Result:
        """The run whose disk fails."""
        steering = {
            "PYTHONPATH": str(INJECTION),
            "ZIMAGE_TEST_WRITE": f"{self.mode}:{self.number}",
            "ZIMAGE_TEST_WRITE_BELOW": str(self.shell.folder),
            "ZIMAGE_TEST_WRITE_LOG": str(self.log),
        }
        self.shell.env |= steering
        if cold:
            result = self.shell.run_cold(*self.arguments)
        else:
            result = self.shell.run_forked(watched_process(), *self.arguments)
        for name in steering:
            del self.shell.env[name]
        self.said = result.stdout + result.stderr
        self.well_said(result)
        return result

    def well_said(self, result: Result) -> None:
        """What holds for the answer of every run that was not killed."""
        if result.code == -signal.SIGKILL:
            return
        self.check("Traceback" not in result.stderr, f"traceback: {result.stderr[-800:]}")
        try:
            if result.code:
                result.assert_one_line_of_advice()
                assert result.json["error"]["exit_code"] == result.code
        except (AssertionError, ValueError, KeyError) as error:
            self.problems.append(f"badly told: {error!r:.300}")

    def told(self, prompt: str) -> bool:
        """Whether the run whose disk failed told where the picture, or its task, can be had."""
        tasks = [task for task, asked in self.till.book.tasks.items() if asked == prompt]
        return any(known in self.said for known in (self.till.link(prompt), *tasks))

    def leftovers(self) -> list[str]:
        """Temporary files, and what the database keeps beside itself while it is open."""
        names = [Path(name) for name in self.shell.files()]
        return [
            str(name)
            for name in names
            if (name.name.startswith(".") and name.name != ".gitignore")
            or name.suffix in (".part", ".tmp", ".picture")
            or name.name.endswith(("-wal", "-shm", "-journal"))
        ]

    def judge(self) -> None:
        raise NotImplementedError

    def writes(self) -> list[str]:
        """What the first run has written so far, a line each."""
        return self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []

    def report(self) -> str:
        """Everything that is wrong, under the name of the write."""
        write = next(
            (line for line in self.writes() if line.startswith(f"{self.number}\t")), f"{self.number}\t(not reached)"
        )
        told = dict.fromkeys(" ".join(problem.split())[:500] for problem in self.problems)
        return "\n    ".join([write.replace("\t", " "), *told])


class Single(Story):
    """One picture, and its recovery as its evidence and advice say."""

    script = GENERATE

    @property
    def arguments(self) -> tuple[str, ...]:
        asked = ("--provider", self.case.provider, "--prompt", self.prompt, "--output", "sub/fox.png")
        size = () if self.case is ZIMAGETURBO else ("--size", SMALL)
        return (*asked, *size, *PATIENCE, "--print-response")

    @property
    def times(self) -> int:
        return self.till.times(self.prompt)

    def honest(self, result: Result) -> dict[str, Any]:
        """The error that a run ended with, held against what the service knows; empty where it ended well."""
        if result.code <= 0:
            return {}
        try:
            error = dict(result.json["error"])
        except (ValueError, KeyError):
            return {}
        if self.times:
            self.check(error["billed"] != "no", f"billed, and told as not: {error}")
        return error

    def saved(self, result: Result) -> bool:
        if result.code != 0:
            return False
        path = Path(result.json["image_path"])
        whole = path.is_file() and path.read_bytes() == self.till.picture(self.prompt)
        self.check(whole, f"told as saved, and is not there: {path}")
        return whole

    def judge(self) -> None:
        """Paid at most once; what was paid is had in the end; what is told of it is true; nothing lies about."""
        result = self.first()
        if self.mode == "kill":
            killed = result.code == -signal.SIGKILL
            self.check(killed == self.was_reached(), f"exit {result.code} and not killed: {result.stdout[-600:]}")
        else:
            # 0 where the write that failed was of something the picture can do without
            self.check(result.code in (0, 9), f"exit {result.code}: {result.stdout[-600:]}")
            error = self.honest(result)
            if error and not self.times:
                self.check(error["billed"] == "no", f"nothing was sent, and billed: {error['billed']}")
        saved, answers = self.saved(result), [result]
        while not saved and len(answers) < 5:
            arguments = self.next_step(answers[-1])
            if arguments is None:
                break
            answers.append(self.shell.run(*arguments))
            self.well_said(answers[-1])
            self.honest(answers[-1])
            saved = self.saved(answers[-1])
        self.check(self.times <= 1, f"paid {self.times} times")
        self.check(saved or self.excused(), f"not had in the end: {[(a.code, a.stdout[-500:]) for a in answers]}")
        if saved and len(answers) == 1 and self.leftovers():  # its evidence may lead to them still
            evidence = str(self.shell.evidence_files()[-1])
            self.check(self.shell.run("--recover", evidence).code == 0, "saved, and cannot be recovered")
        self.check(not self.leftovers(), f"left lying: {self.leftovers()}")

    def next_step(self, last: Result) -> tuple[str, ...] | None:
        """What somebody does who follows the advice, and pays again only where nothing was billed."""
        error = self.honest(last)
        if "next_command" in error:
            return tuple(shlex.split(error["next_command"])[2:])
        evidence = self.shell.evidence_files()
        if error.get("billed") == "no" or (not error and not evidence):
            self.check(not self.times, "advised to pay again")
            return None if self.times else self.arguments
        if evidence and not (error and error.get("evidence_path") is None) and not self.asked_to_recover(last):
            return ("--recover", str(evidence[-1]), "--print-response")
        return None

    def asked_to_recover(self, last: Result) -> bool:
        """Whether the last answer is a recovery's own: it would say the same again."""
        return last.code not in (-signal.SIGKILL, 9)

    def excused(self) -> bool:
        """What may stay without a picture: killed with the request out; or the disk took nothing, and it was told."""
        if self.mode == "kill":
            (evidence,) = self.shell.evidence_files()
            return json.loads(evidence.read_text(encoding="utf-8"))["status"] in ("submitting", "unknown")
        if self.mode == "fail-from" and self.times:
            return self.told(self.prompt) or self.case is OPENAI
        return False


class Many(Story):
    """A batch of three rows, or of two where no more can happen, and the same command again."""

    script = BATCH

    def __post_init__(self) -> None:
        super().__post_init__()
        self.prompts = [f"{self.prompt} {row}" for row in ("abc" if self.mode == "fail" else "ab")]
        rows = [json.dumps({"prompt": prompt, "size": SMALL}) + "\n" for prompt in self.prompts]
        (self.shell.folder / "rows.jsonl").write_text("".join(rows), encoding="utf-8")

    @property
    def arguments(self) -> tuple[str, ...]:
        pace = ("--rpm", "0", "--concurrency", "1")
        return ("--input", "rows.jsonl", "--output-dir", "out", *pace, *PATIENCE)

    def billed(self) -> int:
        return sum(self.till.times(prompt) for prompt in self.prompts)

    def honest(self, result: Result) -> None:
        """The summary counts no billed row as one that was not, nor forgets its cost."""
        try:
            summary = result.json
        except ValueError:
            return
        if "saved" not in summary:
            self.check(not self.billed() or summary["error"]["billed"] != "no", f"told as not billed: {summary}")
            return
        kept = sum(summary.get(state, 0) for state in ("saved", "generated", "submitted", "unknown", "in_flight"))
        self.check(kept >= self.billed(), f"{self.billed()} billed, told of {kept}: {summary}")
        cost = summary["estimated_cost"]
        self.check(cost >= self.billed() * PRICE - 1e-9, f"{self.billed()} billed, cost {cost}")

    def judge(self) -> None:
        """Each row paid at most once; what was paid is had in the end, or was out at a kill; the record is true."""
        result = self.first()
        if self.mode == "kill":
            killed = result.code == -signal.SIGKILL
            self.check(killed == self.was_reached(), f"exit {result.code} and not killed: {result.stdout[-600:]}")
        else:
            # 0 as above; 1 where one row failed and the disk works for the others
            self.check(result.code in (0, 1, 9), f"exit {result.code}: {result.stdout[-600:]}")
            self.honest(result)
        for _ in range(3):
            result = self.shell.run(*self.arguments)
            self.well_said(result)
            self.honest(result)
            if result.code == 0:
                break
            self.check(result.code == 1, f"again: exit {result.code}: {result.stdout[-600:]} {result.stderr[-300:]}")
        entries = self.results()
        self.check(sorted(entries) == sorted(self.prompts), f"results tell of {sorted(entries)}")
        unknown = [prompt for prompt in self.prompts if entries.get(prompt, {}).get("state") == "unknown"]
        for prompt in self.prompts:
            times = self.till.times(prompt)
            self.check(times <= 1, f"{prompt!r} paid {times} times")
            state = entries.get(prompt, {}).get("state")
            if prompt not in unknown:
                self.check(state == "saved" and times == 1, f"{prompt!r} is {state}, paid {times} times")
            elif self.mode != "kill":
                excused = self.mode == "fail-from" and times and self.told(prompt)
                self.check(excused, f"{prompt!r} is unknown, paid {times} times; told: {self.told(prompt)}")
            if state == "saved":
                path = Path(entries[prompt]["image_path"])
                whole = path.is_file() and path.read_bytes() == self.till.picture(prompt)
                self.check(whole, f"{prompt!r} is told as saved, and is not there: {path}")
        self.check(len(unknown) <= 1, f"one request was out at a time, and unknown are {unknown}")
        self.check(result.code == (1 if unknown else 0), f"in the end exit {result.code}: {result.stdout[-600:]}")
        saved = len(self.prompts) - len(unknown)
        out = self.shell.folder / "out"
        for what, count in (("images/*.png", saved), ("thumbs/*/*.jpg", saved), ("index.html", 1)):
            self.check(len(list(out.glob(what))) == count, f"{what}: {len(list(out.glob(what)))} and not {count}")
        self.check(not self.leftovers(), f"left lying: {self.leftovers()}")

    def results(self) -> dict[str, dict[str, Any]]:
        """Prompt to result."""
        path = self.shell.folder / "out" / "results.jsonl"
        if not path.exists():
            return {}
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {entry["prompt"]: entry for entry in entries}


@pytest.fixture
def till() -> Iterator[Till]:
    with FaultServer() as server:
        yield Till(server)


def writes_of(story: Story, *, cold: bool) -> list[str]:
    """What a run wrote in which nothing failed."""
    result = story.first(cold=cold)
    assert result.code == 0, result
    assert not story.problems, story.problems
    return [line.split("\t")[1] for line in story.log.read_text(encoding="utf-8").splitlines()]


def numbers(till: Till, kind: type[Story], case: Case, mode: str, folder: Path) -> range:
    """The writes that a run makes when all goes well.

    Before the first payment all providers do the same, and that later writes fail too makes no difference: none follows
    the first. There, one provider and one kind of failure are enough.
    """
    never = 0 if mode != "fail-from" else sys.maxsize
    story = kind(till, folder / "counted", mode, never, f"{mode} none", case)
    before: list[int] = []
    till.at_first_payment(lambda: before.append(len(story.writes())))
    lines = writes_of(story, cold=True)
    assert before and before[0] >= 5 and len(lines) - before[0] >= 5, "the writes of this run are not seen"
    assert set(lines) >= {"open", "write", "mkdir"}, lines
    again = writes_of(kind(till, folder / "forked", mode, never, f"{mode} forked", case), cold=not IS_WARM)
    assert set(again) == set(lines), "a fork's writes are seen as those of a process are"
    assert kind is Many or again == lines  # threads commit in groups
    if "ZIMAGE_TEST_ONLY" in os.environ:
        only = int(os.environ["ZIMAGE_TEST_ONLY"])
        return range(only, only + 1)
    every = case is DASHSCOPE and mode != "fail-from"
    return range(1 if every else before[0], len(lines) + 1)


def run(story: Story) -> Story:
    try:
        story.judge()
    except (AssertionError, OSError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
        story.problems.append(f"{error!r:.600}")
    return story


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kind", "case"),
    [(Single, DASHSCOPE), (Single, OPENAI), (Single, ZIMAGETURBO), (Many, DASHSCOPE)],
    ids=["single-dashscope", "single-openai", "single-zimageturbo", "batch"],
)
def test_no_write_can_lose_a_picture_or_pay_it_twice(
    till: Till, tmp_path: Path, kind: type[Story], case: Case, mode: str
) -> None:
    """Whichever write fails, or is the last one: all that was paid is had, once, and told truly."""
    chosen = numbers(till, kind, case, mode, tmp_path)
    stories = [kind(till, tmp_path / str(n), mode, n, f"{mode} {n}", case) for n in chosen]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        wrong = [story.report() for story in pool.map(run, stories) if story.problems]
    assert not wrong, f"{len(wrong)} of {len(chosen)} writes\n" + "\n".join(wrong)
