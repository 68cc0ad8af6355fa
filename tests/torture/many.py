"""One cell of a batch: a few rows through a break, mostly killed there, then the same command again without one."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from typing import Any, ClassVar

from batch_helpers import BATCH
from conftest import Result
from mock_server import MockServer
from torture.cells import ONCE, WAYS, Cell
from torture.proxy import WORTH_WHOLE, Break, Proxy
from torture.story import LATE_S, SEED, Story, is_drawn

PROMPTS = tuple(f"picture {name} of a catalogue" for name in ("one", "two", "three"))
TIMEOUT_S = 20.0
# Exit codes with which a batch may end here: all saved, some not, a signal.
DONE, INCOMPLETE = 0, 1


def cells() -> Iterator[Cell]:
    for way in WAYS:
        for stage in way.stages:
            for place in ("request-headers", "made", "headers", "body", "end"):
                for signum in (signal.SIGKILL, signal.SIGTERM):
                    yield Cell(way, Break(stage, place, "stall", times=ONCE), signum=signum)
            for place, act in (("made", "close"), ("body", "reset"), ("garbage", "spoil"), ("request", "half")):
                yield Cell(way, Break(stage, place, act, times=ONCE))
            yield Cell(way, Break(stage, "chunk-gap", "close", "chunked", times=ONCE))
        yield Cell(way, Break("paid", "handshake", "reset", times=ONCE), "good")
        yield Cell(way, Break("paid", "body", "close", times=ONCE), "good")
        yield Cell(way, Break("paid", "body", "stall", times=ONCE), "good", signal.SIGKILL)


BATCHES = [*cells()]


class ManyStory(Story):
    """The rows differ in their prompts only; each is held against what the mock counted of its own."""

    script: ClassVar = BATCH

    def __str__(self) -> str:
        return f"batch/{self.cell}"

    def strike(self) -> None:
        """The first signal lets what is out come to its end, the second one does not."""
        struck = self.pid
        super().strike()
        if self.cell.signum == signal.SIGTERM:
            time.sleep(0.1)
            if self.pid == struck:  # else it has ended, and the next run is on its way
                super().strike()

    def first(self, mock: MockServer, proxy: Proxy) -> None:
        fields = {"seed": SEED, "size": "512*512"} if self.cell.way.options else {}
        rows = [
            json.dumps({"prompt": prompt, "output": f"{number}.{self.cell.way.suffix}"} | fields) + "\n"
            for number, prompt in enumerate(PROMPTS)
        ]
        (self.shell.folder / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
        result = self.run_batch()
        self.note(proxy.reached.is_set(), "missed", "the break was not met")
        if self.cell.signum:
            late = time.monotonic() - proxy.reached_at - LATE_S
            self.note(late <= 0, "hang", f"{late:.1f} s too late")
            expected = {signal.SIGKILL: -9, signal.SIGTERM: 143}[signal.Signals(self.cell.signum)]
            self.note(result.code == expected, "exit_code", (result.code, result.stdout))
        self.judge_rows(mock, proxy, result)

    def run_batch(self) -> Result:
        options = (
            "--provider",
            self.cell.way.provider,
            *self.cell.way.settings,
            "--rpm",
            "0",
            "--timeout",
            f"{TIMEOUT_S:g}",
        )
        return self.run("--input", "rows.jsonl", "--output-dir", "out", *options)

    def then(self, mock: MockServer, proxy: Proxy) -> None:
        result = self.run_batch()
        states = self.judge_rows(mock, proxy, result)
        for prompt in PROMPTS:
            state = states.get(prompt, {"state": "none"})["state"]
            in_doubt = state == "unknown" and self.cell.way.lost == "unknown" and not self.reached_of(proxy, prompt)
            self.note(state == "saved" or in_doubt, "lost", (prompt, state))
        expected = DONE if all(result["state"] == "saved" for result in states.values()) else INCOMPLETE
        self.note(result.code == expected, "exit_code", (result.code, result.stdout, result.stderr))
        doubtful = [prompt for prompt, result in states.items() if result["state"] == "unknown"]
        most = len(PROMPTS) if self.cell.signum else 1
        self.note(len(doubtful) <= most, "untrue", f"{doubtful} unknown, and {most} were broken off")
        self.saved = not doubtful

    def reached_of(self, proxy: Proxy, prompt: str) -> bool:
        """Whether what was paid for a row had come whole; a run that is ended at once may not have read it yet."""
        return not self.cell.signum and any(
            prompt.encode() in request and WORTH_WHOLE.search(sent) for request, sent in proxy.sent
        )

    def judge_rows(self, mock: MockServer, proxy: Proxy, result: Result) -> dict[str, dict[str, Any]]:
        """What holds at the end of every run; the rows' results by their prompts."""
        self.note("Traceback" not in result.stderr, "traceback", result.stderr)
        if result.code > 0:
            try:
                assert isinstance(result.json, dict)
                result.assert_one_line_of_advice()
            except (AssertionError, ValueError) as problem:
                self.note(False, "advice", problem)
        paid = [entry["prompt"] for entry in mock.stats()["payloads"]]
        self.paid = mock.stats()["billed"]
        self.note(self.paid == len(set(paid)) or self.cell.way.lost == "again", "paid_twice", paid)
        listed = self.shell.folder / "out" / "results.jsonl"
        lines = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
        states = {row["prompt"]: row for row in map(json.loads, lines)}
        self.note(
            result.code not in (DONE, INCOMPLETE) or len(states) == len(PROMPTS),
            "untrue",
            f"{len(states)} rows are listed",
        )
        for prompt, row in states.items():
            self.judge_row(prompt, row, paid.count(prompt))
        for path in (self.shell.folder / "out" / "images").glob("*"):
            whole = any(is_drawn(self.cell.way, path.read_bytes(), prompt) for prompt in PROMPTS)
            hidden = path.name.startswith(".") and result.code < 0  # what a killed run was writing
            self.note(whole or hidden, "image", path.name)
        return states

    def judge_row(self, prompt: str, row: dict[str, Any], paid: int) -> None:
        state = row["state"]
        if state == "saved":
            path = self.shell.folder / "out" / row["image_path"]
            self.note(path.exists() and is_drawn(self.cell.way, path.read_bytes(), prompt), "image", (prompt, row))
        if state in ("saved", "generated"):
            self.note(paid == 1 or (paid and self.cell.way.lost == "again"), "untrue", (prompt, state, paid))
        if state == "failed":
            self.note(not paid, "untrue", (prompt, state, paid, row))
