"""What the tests of generate_batch.py share: a list of rows, an output folder, and the script run on them.

    batch = Batch(shell, service)
    batch.rows("a fox", {"prompt": "an owl", "id": "owl"})
    result = batch.run("--variants", "2")     # --input rows.jsonl --output-dir out --rpm 0 --variants 2

Every run is held to what holds for all: one JSON object on stdout, no traceback, one line of advice after an error.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from closed import assert_closed
from conftest import GENERATE as SINGLE
from conftest import SCRIPTS, Result, Shell
from fault_server import GENERATE, PICTURE, Answer, Behaviour, FaultServer, Received, file, good, png

BATCH = SCRIPTS / "generate_batch.py"
PRICE = 0.01434
STATES = ("saved", "failed", "unknown", "generated", "pending")
SMALL = "512*512"
SMALL_PNG = png(512, 512)

posix = pytest.mark.skipif(os.name == "nt", reason="what only POSIX has: signals, modes, links, terminals, limits")

Row: TypeAlias = "str | Mapping[str, Any]"


def prompt_of(request: Received) -> str:
    """The prompt that a paid request asks for."""
    return str(json.loads(request.body)["input"]["messages"][0]["content"][0]["text"])


def parameters_of(request: Received) -> dict[str, Any]:
    parameters = json.loads(request.body)["parameters"]
    assert isinstance(parameters, dict)
    return parameters


def answered(behaviour: Behaviour, request: Received) -> Answer:
    return behaviour if isinstance(behaviour, Answer) else behaviour(request)


def by_prompt(table: Mapping[str, Behaviour | Sequence[Behaviour]]) -> Callable[[Received], Answer]:
    """Answers by prompt, one after the other, the last one for ever; a prompt that is not named gets its picture."""
    lock = threading.Lock()
    scripts = {
        prompt: [said] if isinstance(said, Answer) or callable(said) else list(said) for prompt, said in table.items()
    }

    def answer(request: Received) -> Answer:
        with lock:
            script = scripts.get(prompt_of(request), [good()])
            behaviour = script.pop(0) if len(script) > 1 else script[0]
        return answered(behaviour, request)

    return answer


class Gate:
    """Holds all requests until it is opened, then answers them; knows which have arrived."""

    def __init__(self, behaviour: Behaviour | None = None) -> None:
        self.arrived: list[Received] = []
        self._behaviour = behaviour or good()
        self._open = threading.Event()

    def open(self) -> None:
        self._open.set()

    def __call__(self, request: Received) -> Answer:
        self.arrived.append(request)
        self._open.wait(30)
        return answered(self._behaviour, request)


class Batch:
    """`out` is the output folder, `input` the file of rows. Rows that name no size ask for a small one."""

    is_in_tables = False  # a run holds its folder's lock to the end of its process

    def __init__(self, shell: Shell, service: FaultServer) -> None:
        shell.script = BATCH
        self.shell = shell
        self.service = service
        self.input = shell.folder / "rows.jsonl"
        self.out = shell.folder / "out"
        service.play(PICTURE, file(SMALL_PNG))

    def rows(self, *rows: Row) -> None:
        """Write the input."""
        objects = [{"prompt": row} if isinstance(row, str) else dict(row) for row in rows]
        lines = [json.dumps(o if "aspect_ratio" in o else {"size": SMALL} | o) + "\n" for o in objects]
        self.input.write_text("".join(lines), encoding="utf-8")

    def prompts(self, count: int) -> list[str]:
        """Write an input of so many rows; returns their prompts."""
        names = [f"picture {number}" for number in range(count)]
        self.rows(*names)
        return names

    def arguments(self, *options: str) -> tuple[str, ...]:
        return ("--input", str(self.input), "--output-dir", str(self.out), "--rpm", "0", *options)

    def run(self, *options: str, stdin: bytes | None = None, timeout: float = 30) -> Result:
        return self.call(*self.arguments(*options), stdin=stdin, timeout=timeout)

    def call(self, *arguments: str, stdin: bytes | None = None, timeout: float = 30) -> Result:
        """Run with exactly these arguments."""
        run = self.shell.call if self.is_in_tables else self.shell.run
        return self.checked(run(*arguments, stdin=stdin, timeout=timeout))

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        return self.shell.start(*self.arguments(*options))

    def finish(self, process: subprocess.Popen[bytes], timeout: float = 30) -> Result:
        return self.checked(self.shell.finish(process, timeout))

    @staticmethod
    def checked(result: Result) -> Result:
        assert isinstance(result.json, dict)
        assert "Traceback" not in result.stderr, result.stderr
        if result.code:
            result.assert_one_line_of_advice()
        return result

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.communicate(timeout=30)

    def single(self, *arguments: str) -> Result:
        """Run generate_image.py in the same place."""
        self.shell.script = SINGLE
        try:
            return self.shell.run(*arguments)
        finally:
            self.shell.script = BATCH

    def status(self) -> dict[str, Any]:
        result = self.call("--status", str(self.out))
        assert result.code == 0, result.stdout
        return result.json

    @property
    def sent(self) -> list[str]:
        """The prompts of all paid requests, in the order of their arrival."""
        return [prompt_of(request) for request in self.service.posts]

    def results(self) -> list[dict[str, Any]]:
        text = (self.out / "results.jsonl").read_text(encoding="utf-8")
        assert text.endswith("\n") or not text
        results = [json.loads(line) for line in text.split("\n")[:-1]]
        for result in results:
            assert_closed("result", result)
        return results

    def states(self) -> dict[str, str]:
        """Prompt to state, of inputs whose prompts differ."""
        return {result["prompt"]: result["state"] for result in self.results()}

    def picture(self, prompt: str) -> dict[str, Any]:
        """The result of the only picture of a prompt."""
        (result,) = (result for result in self.results() if result["prompt"] == prompt)
        return result

    @contextlib.contextmanager
    def database(self) -> Iterator[sqlite3.Connection]:
        """The database as somebody who looks into it opens it."""
        with contextlib.closing(
            sqlite3.connect(f"{(self.out / 'batch.sqlite3').as_uri()}?mode=ro", uri=True)
        ) as opened:
            yield opened

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        with self.database() as database:
            return database.execute(statement).fetchall()

    def stored_states(self) -> dict[str, str]:
        """Prompt to state as the database has it now; empty where there is none yet."""
        if not (self.out / "batch.sqlite3").exists():
            return {}
        return dict(self.query("SELECT prompt, state FROM pictures"))

    def evidence(self) -> dict[str, dict[str, Any]]:
        """Prompt to evidence."""
        contents = [json.loads(path.read_text(encoding="utf-8")) for path in self.out.glob("evidence/*/*.json")]
        for content in contents:
            assert_closed("evidence", content)
        return {content["request"]["prompt"]: content for content in contents}

    def files(self) -> dict[str, bytes]:
        """Every file of the working folder but the input, and what is in it."""
        return {
            name: (self.shell.folder / name).read_bytes()
            for name in self.shell.files()
            if name != self.input.name and (self.shell.folder / name).is_file()
        }


LOCKER = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute(sys.argv[2])
print("locked", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def locked_by_another(path: Path, begin: str) -> Iterator[None]:
    """Another program has locked a database. In this process a lock would go with whoever reads the file."""
    command = [sys.executable, "-c", LOCKER, str(path), begin]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout and process.stdout.readline() == b"locked\n"
        try:
            yield
        finally:
            process.stdin.close()


def assert_counts(result: Result, **counts: int) -> None:
    """The summary has these counts, 0 for those not named, and its total is their sum."""
    expected = dict.fromkeys(STATES, 0) | counts
    assert {name: result.json[name] for name in STATES} == expected
    assert result.json["total"] == sum(expected.values())


__all__ = [
    "BATCH",
    "GENERATE",
    "PICTURE",
    "PRICE",
    "SMALL",
    "SMALL_PNG",
    "STATES",
    "Batch",
    "Gate",
    "assert_counts",
    "by_prompt",
    "locked_by_another",
    "parameters_of",
    "posix",
    "prompt_of",
]
