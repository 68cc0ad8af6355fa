"""Servers of one's own and gateways in front of them: what costs nothing is made again, and the record is true."""

from __future__ import annotations

import base64
import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from batch_helpers import BATCH, Batch, Gate, assert_counts
from conftest import Result, Shell
from fault_server import Answer, Behaviour, FaultServer, Received, drawn, html, json_answer, typed

POST, MODELS = "/v1/images/generations", "/v1/models"
COST_WORDS = ("cost", "paid", "pay", "bill", "US$")


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        server.play(POST, picture)
        yield server


@pytest.fixture
def own(shell: Shell, server: FaultServer) -> Own:
    shell.env["OPENAI_BASE_URL"] = f"{server.root}/v1"
    return Own(shell, server)


def picture_of(seed: int) -> bytes:
    return drawn("PNG", 512, 512, f"#{seed % 2**24:06x}")


def picture(request: Received) -> Answer:
    """What an honest server answers: another seed, another picture."""
    content = picture_of(json.loads(request.body).get("seed", 0))
    return json_answer({"created": 1, "data": [{"b64_json": base64.b64encode(content).decode()}]})


@dataclass
class Own:
    """The command for one picture, and that for many, at a server of one's own."""

    shell: Shell
    server: FaultServer
    count: int = 0

    def make(self, *options: str, prompt: str = "a fox") -> Result:
        self.count += 1
        name = f"{self.count}.png"
        size = ("--size", "512x512")
        return self.shell.run(
            "--provider", "openai", "--prompt", prompt, *size, "--output", name, "--print-response", *options
        )

    def batch(self, *options: str, variants: int = 3) -> Result:
        batch = Batch(self.shell, self.server)
        batch.rows({"prompt": "a fox", "id": "fox"})
        return batch.run("--provider", "openai", "--variants", str(variants), *options)

    @property
    def results(self) -> list[dict[str, Any]]:
        return Batch(self.shell, self.server).results()

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(request.body) for request in self.server.posts]


@dataclass
class OneByOne:
    """A server that works on so many calls at once and lets all others wait; it goes on where nobody waits any more."""

    seconds: float
    slots: int = 1
    line: threading.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        self.line = threading.Semaphore(self.slots)

    def __call__(self, request: Received) -> Answer:
        with self.line:
            time.sleep(self.seconds)
        return picture(request)


# What costs nothing is made again -------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("slots", [1, 3])
def test_a_server_that_works_one_by_one_loses_none_of_thirty(own: Own, slots: int) -> None:
    """Ten seconds a picture and the usual 100 s of time-out, a hundred and twenty times as fast."""
    own.server.play(POST, OneByOne(0.08, slots))
    result = own.batch("--timeout", "1", "--no-gallery", variants=30)
    assert_counts(result, saved=30)
    assert (result.code, len(own.server.posts)) == (0, 30)


LOST: dict[str, Behaviour] = {
    "hang-up": Answer(hang_up="after-reading"),
    "502": html(502),
    "503": html(503, "Service Temporarily Unavailable"),
    "504": typed(b"upstream request timeout", "text/plain", 504),
    "500 of no server": html(500),
    "cut": Answer(body=b'{"created": 1, "da', claimed_length=500),
}


@pytest.mark.parametrize("name", LOST)
def test_an_answer_that_is_lost_is_asked_for_again_where_that_is_free(own: Own, name: str) -> None:
    own.server.play(POST, LOST[name], picture)
    result = own.make("--timeout", "20")
    assert (result.code, len(own.server.posts)) == (0, 2)
    evidence = own.shell.evidence()
    assert [attempt["outcome"] for attempt in evidence["attempts"]] == ["outcome_unknown", "generated"]
    assert not any(word in result.stderr.lower() for word in COST_WORDS)


@pytest.mark.parametrize("name", ["hang-up", "503"])
def test_a_row_that_is_lost_is_sent_again_in_the_same_run(own: Own, name: str) -> None:
    own.server.play(POST, LOST[name], LOST[name], picture)
    result = own.batch("--timeout", "20")
    assert_counts(result, saved=3)
    assert (result.code, len(own.server.posts)) == (0, 5)


def test_more_gateway_pages_than_there_are_retries_are_waited_out(own: Own) -> None:
    own.server.play(POST, *[html(502, headers=(("Retry-After", "0"),))] * 7, picture)
    assert own.make("--timeout", "60").code == 0
    assert len(own.server.posts) == 8


@pytest.mark.parametrize(("retries", "calls"), [("0", 1), ("1", 2)])
def test_the_users_number_of_retries_holds_for_them_too(own: Own, retries: str, calls: int) -> None:
    own.server.play(POST, html(502))
    error = own.make("--max-retries", retries, "--timeout", "20").error
    assert (error["exit_code"], error["code"], error["retryable"]) == (7, "outcome_unknown", True)
    assert not any(word in error["hint"] + error["message"] for word in ("US$", "pay", "bill"))
    assert len(own.server.posts) == calls
    assert own.shell.evidence()["status"] == "unknown"


def test_a_run_against_a_server_that_stays_away_leaves_all_to_the_next(own: Own) -> None:
    own.server.play(POST, html(502))
    result = own.batch("--time-limit", "5", "--timeout", "4")
    assert result.code == 11
    assert_counts(result, pending=3)
    own.server.play(POST, picture)
    assert_counts(own.batch(), saved=3)


def test_a_run_that_was_killed_makes_what_was_out_again_without_a_question(own: Own) -> None:
    gate = Gate(picture)
    own.server.play(POST, gate)
    batch = Batch(own.shell, own.server)
    batch.rows({"prompt": "a fox", "id": "fox"})
    options = ("--provider", "openai", "--variants", "3")
    process = batch.start(*options)
    own.server.wait_until(lambda: gate.arrived)
    batch.kill(process)
    gate.open()
    own.server.play(POST, picture)
    result = batch.run(*options)
    assert_counts(result, saved=3)
    assert not any(word in result.stderr for word in ("billed", "costs", "unknown;"))


def test_rows_that_an_older_version_left_unknown_are_made_again(own: Own) -> None:
    own.server.play(POST, LOST["hang-up"])
    own.batch("--max-retries", "0", "--timeout", "3")
    own.shell.script = BATCH
    with sqlite(own) as database:
        database.execute("UPDATE pictures SET state = 'unknown', paid = 1, facts = '{}'")
    own.server.play(POST, picture)
    assert_counts(own.batch(), saved=3)


def sqlite(own: Own) -> Any:

    return contextlib.closing(sqlite3.connect(own.shell.folder / "out" / "batch.sqlite3", isolation_level=None))


@pytest.mark.parametrize("answer", [json_answer({"created": 1, "data": []}), typed(b"<html>hello</html>", "text/html")])
def test_what_would_be_answered_so_again_is_not_sent_again(own: Own, answer: Answer) -> None:
    own.server.play(POST, answer)
    assert own.make("--timeout", "10").error["exit_code"] == 8
    assert len(own.server.posts) == 1
