"""Where a batch could pay for something that nobody asked for, or lose what was paid: found by outside examiners."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import time

import pytest

from batch_helpers import SMALL_PNG, Batch, Gate, by_prompt, locked_by_another
from benchmarks.batch_kills import measure
from conftest import Shell
from fault_server import GENERATE, PICTURE, FaultServer, error, file, good, html, oss_error

LOST = html(502)


@pytest.fixture
def batch(shell: Shell, service: FaultServer) -> Batch:
    return Batch(shell, service)


def test_a_batch_that_is_killed_again_and_again_neither_loses_nor_pays_twice() -> None:
    """The small form of `tests/benchmarks/batch_kills.py`: faults in one call of ten, kills at random moments."""
    report = measure(rows=80, kills=8, seed=5)
    assert report.broken == []
    assert (report.paid_twice, report.lost) == (0, 0)
    assert report.billed > 40


@pytest.mark.parametrize(
    ("bound", "state"),
    [(["--limit", "1"], "unknown"), (["--max-cost", "0.044"], "unknown"), (["--limit", "1"], "failed")],
)
def test_what_a_retry_does_not_reach_keeps_its_state_and_is_not_paid_by_a_plain_run(
    batch: Batch, bound: list[str], state: str
) -> None:
    bad = LOST if state == "unknown" else error(400, "DataInspectionFailed")
    batch.service.play(GENERATE, bad)
    batch.prompts(3)
    batch.run("--concurrency", "1")
    assert set(batch.states().values()) == {state}
    batch.service.play(GENERATE, good())
    batch.run(f"--retry-{state}", *bound)
    left = sorted(batch.states().values())
    assert left in (sorted(["saved", state, state]), [state, state, state])
    before = len(batch.sent)
    batch.run()
    assert len(batch.sent) == before
    assert sorted(batch.states().values()) == left


def test_an_unknown_picture_stays_unknown_where_its_retry_surely_was_not_billed(batch: Batch) -> None:
    batch.service.play(GENERATE, LOST)
    batch.prompts(2)
    batch.run("--concurrency", "1")
    batch.service.play(GENERATE, error(401, "InvalidApiKey"))
    assert batch.run("--retry-unknown").code == 3
    assert set(batch.states().values()) == {"unknown"}
    batch.service.play(GENERATE, good())
    sent = len(batch.sent)
    assert batch.run().code == 1
    assert len(batch.sent) == sent
    assert batch.run("--retry-unknown").code == 0


def test_a_folder_that_lost_its_database_is_not_paid_for_again(batch: Batch) -> None:
    batch.prompts(2)
    assert batch.run().code == 0
    (batch.out / "batch.sqlite3").unlink()
    batch.rows("picture 1", "picture 0")
    result = batch.run()
    assert result.code == 2
    assert result.error["code"] == "batch_unreadable"
    assert len(batch.sent) == 2


def test_a_folder_whose_name_is_no_text_is_refused_before_paying(batch: Batch) -> None:
    batch.prompts(1)
    for name in ("out\udcff", "out\nput", "x" * 300):
        result = batch.call("--input", str(batch.input), "--output-dir", name, "--rpm", "0")
        assert (result.code, result.error["code"]) == (2, "usage"), name
    assert batch.sent == []


def test_downloads_that_the_time_limit_cuts_are_no_storm(batch: Batch) -> None:
    batch.service.play(PICTURE, file(SMALL_PNG, delay_s=30))
    batch.prompts(14)
    start = time.monotonic()
    result = batch.run("--time-limit", "4", "--concurrency", "14")
    assert time.monotonic() - start < 5
    assert result.code == 11
    batch.service.play(PICTURE, file(SMALL_PNG))
    assert batch.run().code == 0
    assert len(batch.sent) == 14


def test_a_429_with_retry_after_zero_starts_no_storm(batch: Batch) -> None:
    batch.service.play(GENERATE, error(429, "Throttling", headers=(("Retry-After", "0"),)))
    batch.prompts(60)
    result = batch.run("--time-limit", "4")
    assert result.code in (6, 11)  # ten refusals in a row, or the time limit: whichever comes first
    assert len(batch.sent) < 120


def test_a_retry_after_beyond_the_timeout_ends_the_run_and_is_told(batch: Batch) -> None:
    batch.service.play(GENERATE, error(503, "ServiceUnavailable", headers=(("Retry-After", "3600"),)))
    batch.prompts(1)
    result = batch.run()
    assert result.code == 6
    assert result.json["error"]["retry_after_s"] == 3600


def test_the_results_hold_no_signed_link(batch: Batch) -> None:
    batch.service.play("/img/gone.png", oss_error(403, "AccessDenied", "no"))
    batch.service.play(GENERATE, by_prompt({"picture 0": good("/img/gone.png?Signature=abc")}))
    batch.prompts(2)
    batch.run()
    assert batch.picture("picture 0")["state"] == "generated"
    for name in ("results.jsonl", "index.html"):
        assert "Signature" not in (batch.out / name).read_text(encoding="utf-8")


def test_a_second_signal_still_prints_one_object(batch: Batch) -> None:
    gate = Gate()
    batch.service.play(GENERATE, gate)
    batch.prompts(1)
    process = batch.start()
    batch.service.wait_until(lambda: len(gate.arrived) == 1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    result = batch.finish(process)
    gate.open()
    assert result.code == 130
    assert result.error["code"] == "interrupted"


@pytest.mark.smoke
def test_damaged_state_is_one_clear_error(batch: Batch) -> None:
    batch.prompts(1)
    assert batch.run().code == 0
    for statement in ("DROP TABLE runs", "DROP TABLE pictures"):
        with sqlite3.connect(batch.out / "batch.sqlite3") as database:
            database.execute(statement)
        database.close()
        result = batch.run()
        assert (result.code, result.json["error"]["code"]) == (2, "batch_unreadable"), statement
    assert len(batch.sent) == 1


def test_damaged_facts_of_a_saved_picture_are_one_clear_error_and_touch_nothing(batch: Batch) -> None:
    batch.prompts(1)
    assert batch.run().code == 0
    with sqlite3.connect(batch.out / "batch.sqlite3") as database:
        database.execute("UPDATE pictures SET facts = '{'")
    database.close()
    before = (batch.out / "results.jsonl").read_bytes()
    result = batch.run()
    assert (result.code, result.error["code"]) == (2, "batch_unreadable")
    assert "facts" in result.error["message"]
    assert (batch.out / "results.jsonl").read_bytes() == before
    assert len(batch.sent) == 1


def test_a_linked_subfolder_is_refused_before_paying(batch: Batch) -> None:
    batch.prompts(1)
    other = batch.shell.folder / "elsewhere"
    other.mkdir()
    (batch.out / "evidence").mkdir(parents=True)
    (batch.out / "evidence" / "0000").symlink_to(other)
    result = batch.run()
    assert (result.code, result.error["code"]) == (2, "invalid_output")
    assert batch.sent == []


def test_it_runs_where_python_leaves_out_the_scripts_folder(batch: Batch) -> None:
    batch.shell.env["PYTHONSAFEPATH"] = "1"
    batch.prompts(1)
    assert batch.run().code == 0


def test_the_script_alone_says_what_it_needs(batch: Batch) -> None:
    copy = batch.shell.folder / "generate_batch.py"
    shutil.copyfile(batch.shell.script, copy)
    batch.shell.script = copy
    result = batch.shell.run("--prompt", "x", "--output-dir", "out")
    assert result.code == 2
    result.assert_one_line_of_advice()


def test_temporary_files_of_a_dead_first_start_are_removed(batch: Batch) -> None:
    batch.prompts(1)
    assert batch.run().code == 0
    left = [".batch.sqlite3.999999.part-journal", ".results.jsonl.999999.part", "images/.000000.999999.part"]
    kept = [".other.999999.part", ".batch.sqlite3.999999.part.txt"]
    for name in left + kept:
        (batch.out / name).write_bytes(b"")
    assert batch.run().code == 0
    assert [name for name in left if (batch.out / name).exists()] == []
    assert all((batch.out / name).exists() for name in kept)


def test_a_batch_under_another_programs_lock_ends_with_one_error(batch: Batch) -> None:
    batch.prompts(1)
    assert batch.run("--limit", "0").code == 1
    with locked_by_another(batch.out / "batch.sqlite3", "BEGIN IMMEDIATE"):
        result = batch.run()
    assert result.code == 9
    assert "locked" in json.dumps(result.json)
    assert batch.sent == []
    assert os.path.exists(batch.out / "batch.sqlite3")
