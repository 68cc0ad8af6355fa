"""Between the answer that costs money and the record of it: faults of 0.4.0 that were proven, and their kind."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from batch_helpers import SMALL, SMALL_PNG, Batch, prompt_of
from conftest import Shell
from fault_server import GENERATE, PICTURE, Answer, FaultServer, Received, error, file, good

FIRST_STEP_S = 0.5  # of the wait before a call is sent again; `waiting.backoff` takes up to a quarter off


@pytest.fixture
def batch(shell: Shell, service: FaultServer) -> Batch:
    return Batch(shell, service)


def paid(service: FaultServer) -> Counter[str]:
    """How often each prompt was paid for."""
    return Counter(prompt_of(request) for request in service.posts)


@contextlib.contextmanager
def locked(batch: Batch, seconds: float) -> Iterator[Callable[[Received], Answer]]:
    """A download at whose answer another program takes the database's write lock, for so many seconds."""
    threads: list[threading.Thread] = []

    def hold(taken: threading.Event) -> None:
        with contextlib.closing(sqlite3.connect(batch.out / "batch.sqlite3", isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            taken.set()
            time.sleep(seconds)
            database.execute("ROLLBACK")

    def answer(request: Received) -> Answer:
        if not threads:
            taken = threading.Event()
            threads.append(threading.Thread(target=hold, args=(taken,)))
            threads[0].start()
            taken.wait(10)
        return file(SMALL_PNG)

    yield answer
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("seconds", [2.0, 7.0], ids=["a moment", "longer than the run waits"])
def test_a_locked_database_makes_nothing_unpaid(batch: Batch, service: FaultServer, seconds: float) -> None:
    """A1. What is paid is told as paid, its cost stays, and the next run fetches it free."""
    batch.rows("a fox", "an owl")
    with locked(batch, seconds) as answer:
        service.play(PICTURE, answer)
        result = batch.run("--concurrency", "1")
    summary = result.json
    made = sum(paid(service).values())
    assert summary["estimated_cost"] == pytest.approx(0.01434 * made)
    assert summary["saved"] + summary["generated"] == made, summary
    assert "move these files away" not in result.stdout
    assert batch.run().code == 0
    assert paid(service) == {"a fox": 1, "an owl": 1}


@pytest.mark.smoke
def test_downloads_of_an_earlier_run_are_saved_once_each(batch: Batch, service: FaultServer) -> None:
    """A2. Whether the run's own report or the database tells of a picture first."""
    prompts = batch.prompts(12)
    service.play(PICTURE, error(500, "InternalError"))
    assert batch.run("--timeout", "2").code == 6
    service.play(PICTURE, file(SMALL_PNG))
    assert batch.run().code == 0
    assert paid(service) == dict.fromkeys(prompts, 1)
    assert not [entry for entry in batch.results() if entry.get("warnings")]


def test_a_name_that_two_pictures_want_fails_neither(batch: Batch, service: FaultServer) -> None:
    """A4. A foreign file takes the first name while its picture is out; the second name is another row's."""
    batch.rows({"prompt": "a fox", "output": "a.png"}, {"prompt": "an owl", "output": "a-000000.png"})

    def meanwhile(request: Received) -> Answer:
        if prompt_of(request) == "a fox":
            (batch.out / "a.png").write_bytes(b"somebody else's")
        return good()(request)

    service.play(GENERATE, meanwhile)
    result = batch.run("--concurrency", "1")
    assert result.json["saved"] == 2, result.stdout
    assert (batch.out / "a.png").read_bytes() == b"somebody else's"
    assert batch.run().json["saved"] == 2
    assert paid(service) == {"a fox": 1, "an owl": 1}


@pytest.mark.parametrize("said", ["0", "0.05"])
def test_a_call_is_not_sent_again_before_the_first_step(shell: Shell, service: FaultServer, said: str) -> None:
    """A9. Whatever Retry-After allows."""
    moments: list[float] = []

    def refuse(request: Received) -> Answer:
        moments.append(time.monotonic())
        return error(429, "Throttling.RateQuota", headers=(("Retry-After", said),))

    service.play(GENERATE, refuse)
    assert shell.run("--prompt", "a fox", "--size", SMALL, "--max-retries", "2", "--print-response").code == 6
    assert len(moments) == 3
    assert min(later - earlier for earlier, later in itertools.pairwise(moments)) >= FIRST_STEP_S * 0.75
