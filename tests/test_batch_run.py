"""How a batch runs: when it stops, what it tells while it runs, and what it never does."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import struct
import subprocess
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import linear_regression

import pytest

from batch_helpers import (
    PRICE,
    SMALL_PNG,
    STATES,
    Batch,
    Gate,
    assert_counts,
    by_prompt,
    parameters_of,
    posix,
    prompt_of,
)
from conftest import TEST_KEY, Result, Shell
from fault_server import (
    GENERATE,
    PICTURE,
    Answer,
    Behaviour,
    FaultServer,
    Received,
    error,
    file,
    good,
    html,
)

LOST = good(how=Answer(hang_up="after-reading"))  # billed, and the connection closed
SILENT = good(how=Answer(delay_s=60))
BLOCKED = error(400, "DataInspectionFailed")
BUSY = error(503, "ServiceUnavailable")
ONE_BY_ONE = ("--concurrency", "1")


@pytest.fixture
def batch(shell: Shell, service: FaultServer) -> Batch:
    return Batch(shell, service)


# ---------------------------------------------------------------------------------------------------------------------
# Storms
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [LOST, html(502), good(how=Answer(cut_after=20))], ids=["lost", "502", "cut"])
def test_five_unknown_outcomes_in_a_row_stop_the_run(batch: Batch, answer: Behaviour) -> None:
    batch.service.play(GENERATE, answer)
    batch.prompts(9)
    result = batch.run(*ONE_BY_ONE)
    assert result.code == 7, result.stdout
    assert_counts(result, unknown=5, pending=4)
    assert len(batch.sent) == 5
    batch.service.play(GENERATE, good())
    result = batch.run()
    assert result.code == 1
    assert_counts(result, unknown=5, saved=4)
    assert max(Counter(batch.sent).values()) == 1


def test_a_storm_is_seen_over_all_workers(batch: Batch) -> None:
    """Only what was out when the fifth was known may be unknown too."""
    batch.service.play(GENERATE, LOST)
    batch.prompts(40)
    result = batch.run("--concurrency", "4")
    assert result.code == 7
    assert 5 <= result.json["unknown"] <= 5 + 4
    assert result.json["unknown"] == len(batch.sent)


def test_unknown_outcomes_with_pictures_between_are_no_storm(batch: Batch) -> None:
    batch.service.play(GENERATE, *[LOST] * 4, good(), *[LOST] * 4, good(), *[LOST] * 2, good())
    batch.prompts(13)
    result = batch.run(*ONE_BY_ONE)
    assert result.code == 1, result.stdout
    assert_counts(result, saved=3, unknown=10)


def test_ten_failures_in_a_row_stop_the_run_and_leave_the_rows_pending(batch: Batch) -> None:
    batch.service.play(GENERATE, BUSY)
    batch.prompts(14)
    result = batch.run(*ONE_BY_ONE, "--max-retries", "0")
    assert result.code == 6, result.stdout
    assert_counts(result, pending=14)
    assert result.json["estimated_cost"] == 0
    assert len(batch.sent) == 10
    batch.service.play(GENERATE, good())
    assert batch.run().code == 0


def test_failures_with_pictures_between_are_no_storm(batch: Batch) -> None:
    batch.service.play(GENERATE, *[BUSY] * 9, good(), *[BUSY] * 9, good())
    batch.prompts(20)
    result = batch.run(*ONE_BY_ONE, "--max-retries", "0")
    assert result.code == 1, result.stdout
    assert_counts(result, saved=2, pending=18)


def test_rows_that_fail_by_their_own_fault_are_no_storm(batch: Batch) -> None:
    batch.service.play(GENERATE, *[BLOCKED] * 15, good())
    batch.prompts(16)
    result = batch.run(*ONE_BY_ONE)
    assert result.code == 1
    assert_counts(result, failed=15, saved=1)


def test_a_service_that_is_not_there_stops_the_run_in_seconds(batch: Batch) -> None:
    batch.service.close()
    batch.prompts(14)
    began = time.monotonic()
    result = batch.run()
    assert result.code == 6, result.stdout
    assert time.monotonic() - began < 5
    assert_counts(result, pending=14)


def test_a_certificate_that_is_none_stops_the_run(batch: Batch) -> None:
    """https to a server that speaks http; nothing was sent."""
    batch.service.at_connection(Answer(status=400))
    batch.prompts(2)
    result = batch.run("--base-url", batch.service.base_url.replace("http:", "https:"), "--max-retries", "0")
    assert result.code == 6, result.stdout
    assert_counts(result, pending=2)


# ---------------------------------------------------------------------------------------------------------------------
# Causes that stop everything, and faults of one row
# ---------------------------------------------------------------------------------------------------------------------

STOPS: dict[str, tuple[Answer, int]] = {
    "a wrong key": (error(401, "InvalidApiKey"), 3),
    "no permission": (error(403, "AccessDenied.Unpurchased"), 3),
    "no permission for the model": (error(403, "Model.AccessDenied"), 3),
    "an account overdue": (error(400, "Arrearage"), 4),
    "the free tier used up": (error(403, "AllocationQuota.FreeTierOnly"), 4),
    "the quota used up": (error(429, "Throttling.AllocationQuota", "Free allocated quota exceeded."), 4),
    "a model that is not in this region": (error(404, "ModelNotFound"), 2),
}


@pytest.mark.parametrize("case", STOPS)
def test_what_every_row_would_meet_stops_the_run_and_spends_no_row(batch: Batch, case: str) -> None:
    answer, code = STOPS[case]
    batch.service.play(GENERATE, good(), answer)
    batch.prompts(6)
    result = batch.run(*ONE_BY_ONE)
    assert result.code == code, result.stdout
    assert len(batch.sent) == 2
    assert_counts(result, saved=1, pending=5)
    assert result.json["estimated_cost"] == pytest.approx(PRICE)
    batch.service.play(GENERATE, good())
    result = batch.run()
    assert result.code == 0, result.stdout
    assert_counts(result, saved=6)
    assert batch.service.billed == 6


def test_what_is_out_when_the_run_stops_is_not_lost(batch: Batch) -> None:
    gate = Gate()
    batch.service.play(GENERATE, by_prompt({"a": gate, "b": error(401, "InvalidApiKey")}))
    batch.rows("a", "b", "c", "d")
    process = batch.start("--concurrency", "2")
    batch.service.wait_until(lambda: gate.arrived and "b" in batch.sent)
    time.sleep(0.2)
    gate.open()
    result = batch.finish(process)
    assert result.code == 3
    assert_counts(result, saved=1, pending=3)
    assert sorted(batch.sent) == ["a", "b"]


def test_the_wrong_rows_of_a_list_fail_and_the_others_are_saved(batch: Batch) -> None:
    batch.service.play(GENERATE, by_prompt({"bad": BLOCKED, "worse": error(400, "InvalidParameter", "no such size")}))
    batch.rows("a", "bad", "b", "worse", "c")
    result = batch.run()
    assert result.code == 1, result.stdout
    assert_counts(result, saved=3, failed=2)
    assert len(batch.sent) == 5
    assert "no such size" in json.dumps(batch.picture("worse")["error"])
    assert result.json["estimated_cost"] == pytest.approx(3 * PRICE)


# ---------------------------------------------------------------------------------------------------------------------
# Trying again
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [error(429, "Throttling", headers=(("Retry-After", "0"),)), error(500, "InternalError"), BUSY],
    ids=["429", "500", "503"],
)
def test_what_surely_was_not_billed_is_sent_again(batch: Batch, fault: Answer) -> None:
    batch.service.play(GENERATE, by_prompt({"b": [fault, good()]}))
    batch.rows("a", "b", "c")
    result = batch.run()
    assert result.code == 0, result.stdout
    assert Counter(batch.sent) == {"a": 1, "b": 2, "c": 1}
    assert result.json["estimated_cost"] == pytest.approx(3 * PRICE)
    assert len(batch.evidence()["b"]["attempts"]) == 2


@pytest.mark.parametrize("fault", [LOST, html(502), html(504), html(500), good(how=Answer(cut_after=10))])
def test_what_may_have_been_billed_is_not_sent_again(batch: Batch, fault: Behaviour) -> None:
    batch.service.play(GENERATE, by_prompt({"b": [fault, good()]}))
    batch.rows("a", "b", "c")
    result = batch.run()
    assert result.code == 1, result.stdout
    assert_counts(result, saved=2, unknown=1)
    assert batch.run().code == 1
    assert len(batch.sent) == 3


@pytest.mark.parametrize("fault", [BUSY, error(429, "Throttling", headers=(("Retry-After", "0"),))], ids=["503", "429"])
def test_without_retries_a_call_is_sent_once(batch: Batch, fault: Answer) -> None:
    batch.service.play(GENERATE, by_prompt({"b": fault}))
    batch.rows("a", "b", "c")
    result = batch.run("--max-retries", "0")
    assert result.code in (1, 6), result.stdout  # 6 where the call that failed was the last of three to be answered
    assert_counts(result, saved=2, pending=1)
    assert Counter(batch.sent) == {"a": 1, "b": 1, "c": 1}


def test_retries_end(batch: Batch) -> None:
    batch.service.play(GENERATE, by_prompt({"b": BUSY}))
    batch.rows("b", "c")
    result = batch.run("--max-retries", "2")
    assert result.code == 6, result.stdout
    assert Counter(batch.sent) == {"b": 3, "c": 1}


def test_one_429_holds_all_workers_for_as_long_as_it_says(batch: Batch) -> None:
    limited = error(429, "Throttling.RateQuota", headers=(("Retry-After", "1"),))
    batch.service.play(GENERATE, limited, good())
    batch.prompts(6)
    result = batch.run("--rpm", "1200")
    assert result.code == 0, result.stdout
    times = [request.at for request in batch.service.posts]
    gaps = [later - times[0] for later in times[1:]]
    assert [gap for gap in gaps if 0.1 < gap < 0.97] == []
    assert max(gaps) < 3


def test_a_wait_longer_than_the_timeout_ends_the_run(batch: Batch) -> None:
    batch.service.play(GENERATE, error(429, "Throttling", headers=(("Retry-After", "3600"),)))
    batch.prompts(3)
    began = time.monotonic()
    result = batch.run()
    assert result.code == 6, result.stdout
    assert time.monotonic() - began < 5
    assert_counts(result, pending=3)


def test_calls_are_spaced_evenly_a_little_wider_than_the_limit(batch: Batch) -> None:
    batch.prompts(30)
    assert batch.run("--rpm", "1200", "--no-gallery").code == 0
    times = sorted(request.at for request in batch.service.posts)
    spacing, _ = linear_regression(range(30), times)  # of all: one that arrives late on a busy machine counts little
    assert 0.05 * 1.01 < spacing < 0.05 * 1.2
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert sorted(gaps)[3] > 0.025  # no bursts; a few may arrive unevenly on a busy machine


def test_a_second_run_does_not_begin_with_a_burst(batch: Batch) -> None:
    """The service's minute does not end with the process."""
    batch.rows("a")
    assert batch.run("--rpm", "60").code == 0
    batch.rows("a", "b")
    assert batch.run("--rpm", "60").code == 0
    first, second = (request.at for request in batch.service.posts)
    assert second - first > 0.95


def test_the_rate_of_the_account_is_kept_without_being_asked(batch: Batch) -> None:
    """120 a minute is a steady 2 a second."""
    batch.prompts(4)
    assert batch.call("--input", str(batch.input), "--output-dir", str(batch.out)).code == 0
    times = sorted(request.at for request in batch.service.posts)
    assert all(later - earlier > 0.48 for earlier, later in pairwise(times))


def test_no_more_requests_are_out_than_told(batch: Batch) -> None:
    out, most, lock = 0, 0, threading.Lock()

    def answer(request: Received) -> Answer:
        nonlocal out, most
        with lock:
            out += 1
            most = max(most, out)
        time.sleep(0.05)
        with lock:
            out -= 1
        return good()(request)

    batch.service.play(GENERATE, answer)
    batch.prompts(12)
    assert batch.run("--concurrency", "3").code == 0
    assert most == 3


def test_downloads_hold_no_place_of_a_request(batch: Batch) -> None:
    """With one request at a time, and downloads that do not end, the next requests leave nevertheless."""
    gate = Gate(file(SMALL_PNG))
    batch.service.play(PICTURE, gate)
    batch.prompts(3)
    process = batch.start(*ONE_BY_ONE)
    batch.service.wait_until(lambda: len(batch.sent) == 3, timeout=5)
    gate.open()
    assert batch.finish(process).code == 0


# ---------------------------------------------------------------------------------------------------------------------
# Bounds: money, number, time
# ---------------------------------------------------------------------------------------------------------------------


def ceiling(pictures: float) -> tuple[str, str]:
    return ("--max-cost", f"{pictures * PRICE + 0.00001:.5f}")


def test_the_ceiling_is_for_the_life_of_the_folder(batch: Batch) -> None:
    batch.prompts(6)
    for _ in range(2):
        result = batch.run(*ceiling(3))
        assert result.code == 1, result.stdout
        assert_counts(result, saved=3, pending=3)
    assert len(batch.sent) == 3
    assert batch.run(*ceiling(4.9)).json["saved"] == 4
    assert batch.run(*ceiling(6)).code == 0


def test_a_price_is_reserved_before_a_request_leaves(batch: Batch) -> None:
    gate = Gate()
    batch.service.play(GENERATE, gate)
    batch.prompts(8)
    process = batch.start("--concurrency", "8", *ceiling(2))
    batch.service.wait_until(lambda: len(gate.arrived) == 2)
    time.sleep(0.4)
    assert len(gate.arrived) == 2
    gate.open()
    result = batch.finish(process)
    assert result.code == 1
    assert_counts(result, saved=2, pending=6)


def test_a_price_is_released_where_surely_nothing_was_billed(batch: Batch) -> None:
    batch.service.play(GENERATE, BLOCKED, BUSY, good())
    batch.prompts(4)
    result = batch.run(*ONE_BY_ONE, *ceiling(2))
    assert result.code == 1
    assert (result.json["saved"], result.json["failed"], result.json["pending"]) == (2, 1, 1)


def test_unknown_outcomes_count_against_the_ceiling(batch: Batch) -> None:
    batch.service.play(GENERATE, LOST, good())
    batch.prompts(4)
    result = batch.run(*ONE_BY_ONE, *ceiling(2))
    assert_counts(result, saved=1, unknown=1, pending=2)
    assert result.json["estimated_cost"] == pytest.approx(2 * PRICE)
    assert batch.run("--retry-unknown", *ceiling(2)).code == 1
    assert len(batch.sent) == 2
    result = batch.run("--retry-unknown", *ceiling(5))
    assert result.code == 0, result.stdout
    assert result.json["estimated_cost"] == pytest.approx(5 * PRICE)


def test_requests_that_were_out_at_a_kill_count_against_the_ceiling(batch: Batch) -> None:
    batch.service.play(GENERATE, SILENT)
    batch.prompts(4)
    process = batch.start("--concurrency", "2")
    batch.service.wait_until(lambda: len(batch.sent) == 2)
    batch.kill(process)
    batch.service.play(GENERATE, good())
    result = batch.run(*ceiling(3))
    assert_counts(result, unknown=2, saved=1, pending=1)


def test_a_picture_that_costs_double_is_reserved_at_its_price(batch: Batch) -> None:
    batch.rows({"prompt": "a", "prompt_extend": True}, {"prompt": "b", "prompt_extend": True})
    result = batch.run(*ceiling(3))
    assert result.code == 1
    assert_counts(result, saved=1, pending=1)
    assert result.json["estimated_cost"] == pytest.approx(2 * PRICE)


@pytest.mark.smoke
def test_a_ceiling_of_nothing_sends_nothing(batch: Batch) -> None:
    batch.prompts(2)
    assert batch.run("--max-cost", "0").code == 1
    assert batch.sent == []


def test_a_limit_is_of_pictures_sent_in_this_run(batch: Batch) -> None:
    batch.prompts(5)
    for saved in (2, 4):
        result = batch.run("--limit", "2")
        assert result.code == 1
        assert_counts(result, saved=saved, pending=5 - saved)
        assert result.json["this_run"]["saved"] == 2
    assert batch.run("--limit", "2").code == 0
    assert sorted(batch.sent) == [f"picture {number}" for number in range(5)]


def slowly(seconds: float) -> Behaviour:
    return good(how=Answer(delay_s=seconds))


def test_a_time_limit_ends_in_time_and_repeated_calls_finish(batch: Batch) -> None:
    batch.service.play(GENERATE, slowly(0.25))
    batch.prompts(8)
    codes = []
    for _ in range(10):
        began = time.monotonic()
        result = batch.run(*ONE_BY_ONE, "--time-limit", "2")
        assert time.monotonic() - began < 2.2
        codes.append(result.code)
        assert result.json["unknown"] == 0
        if result.code == 0:
            break
        assert "same command again" in result.stderr
    assert codes[-1] == 0 and set(codes[:-1]) == {11}, codes
    assert Counter(batch.sent) == dict.fromkeys((f"picture {number}" for number in range(8)), 1)


# What the service does, and the exit codes: 11 where the same command goes on, 1 where all that is left is unknown.
TROUBLES: dict[str, tuple[Behaviour, Behaviour, set[int]]] = {
    "an answer that does not come": (SILENT, file(SMALL_PNG), {1, 11}),
    "an answer byte by byte": (good(how=Answer(dribble_body_s=0.3)), file(SMALL_PNG), {1, 11}),
    "a picture that does not come": (good(), Answer(delay_s=60), {11}),
    "a picture byte by byte": (good(), Answer(body=SMALL_PNG, dribble_body_s=0.3), {11}),
    "a link that fails": (good(), html(503), {1, 11}),  # the last try may fail a moment before the limit
    "calls that are held": (error(429, "Throttling", headers=(("Retry-After", "50"),)), file(SMALL_PNG), {6, 11}),
    "calls that fail": (BUSY, file(SMALL_PNG), {6, 11}),
}


@pytest.mark.parametrize("case", TROUBLES)
def test_a_time_limit_holds_whatever_the_service_does(batch: Batch, case: str) -> None:
    generate, picture, codes = TROUBLES[case]
    batch.service.play(GENERATE, generate)
    batch.service.play(PICTURE, picture)
    batch.prompts(3)
    began = time.monotonic()
    result = batch.run("--time-limit", "2", timeout=4)
    assert time.monotonic() - began < 2.2
    assert result.code in codes, result.stdout
    assert result.json["total"] == 3
    billed = batch.service.billed
    assert result.json["unknown"] + result.json["generated"] + result.json["saved"] >= billed
    batch.service.play(GENERATE, good())
    batch.service.play(PICTURE, file(SMALL_PNG))
    batch.run()
    assert max(Counter(batch.sent).values()) == 1 or billed == 0


# ---------------------------------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"])
def test_the_first_signal_lets_what_is_out_finish_and_sends_nothing_new(batch: Batch, signum: int, code: int) -> None:
    gate, pictures = Gate(), Gate(file(SMALL_PNG))
    batch.service.play(GENERATE, by_prompt({"picture 1": gate, "picture 2": gate}))
    batch.service.play(PICTURE, pictures)
    batch.prompts(9)
    process = batch.start("--concurrency", "2")
    batch.service.wait_until(lambda: len(gate.arrived) == 2 and pictures.arrived)
    process.send_signal(signum)
    time.sleep(0.3)
    assert process.poll() is None
    gate.open()
    time.sleep(0.1)
    pictures.open()
    result = batch.finish(process)
    assert result.code == code, result.stdout
    assert_counts(result, saved=3, pending=6)
    assert len(batch.sent) == 3
    assert [entry["state"] for entry in batch.results()] == ["saved"] * 3 + ["pending"] * 6
    batch.service.play(GENERATE, good())
    assert batch.run().code == 0
    assert len(batch.sent) == 9


@posix
@pytest.mark.parametrize(
    "answer", [error(429, "Throttling", headers=(("Retry-After", "50"),)), BUSY], ids=["held", "failing"]
)
def test_a_signal_ends_all_waits(batch: Batch, answer: Answer) -> None:
    batch.service.play(GENERATE, answer)
    batch.prompts(2)
    process = batch.start("--max-retries", "50")
    batch.service.wait_until(lambda: batch.sent)
    time.sleep(0.2)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    result = batch.finish(process)
    assert result.code == 143
    assert time.monotonic() - began < 1
    assert_counts(result, pending=2)


@posix
def test_a_signal_ends_the_wait_between_two_calls(batch: Batch) -> None:
    batch.prompts(3)
    process = batch.start("--rpm", "1")
    batch.service.wait_until(lambda: batch.stored_states().get("picture 0") == "saved")
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    result = batch.finish(process)
    assert (result.code, len(batch.sent)) == (130, 1)
    assert time.monotonic() - began < 1


@posix
def test_the_second_signal_stops_at_once_and_what_was_out_is_unknown(batch: Batch) -> None:
    batch.service.play(GENERATE, by_prompt({"picture 1": SILENT}))
    batch.prompts(3)
    process = batch.start(*ONE_BY_ONE)
    batch.service.wait_until(lambda: len(batch.sent) == 2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    result = batch.shell.finish(process)
    assert result.code == 130
    assert time.monotonic() - began < 1
    assert "Traceback" not in result.stderr
    batch.service.play(GENERATE, good())
    result = batch.run()
    assert result.code == 1
    assert_counts(result, saved=2, unknown=1)


@posix
def test_a_signal_before_anything_is_sent_writes_nothing(batch: Batch) -> None:
    process = subprocess.Popen(
        batch.shell.command("--input", "-", "--output-dir", "out"),
        cwd=batch.shell.folder,
        env=batch.shell.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    batch.shell.keep(process)
    time.sleep(0.4)
    process.send_signal(signal.SIGTERM)
    process.wait(5)
    stdout, stderr = process.communicate(timeout=5)
    result = batch.checked(Result(process.returncode, stdout.decode(), stderr.decode()))
    assert result.code == 143, stderr
    assert batch.files() == {} and not batch.service.connections


# ---------------------------------------------------------------------------------------------------------------------
# Status and summary
# ---------------------------------------------------------------------------------------------------------------------


def test_status_tells_the_progress_beside_a_running_process(batch: Batch) -> None:
    gate = Gate()
    batch.service.play(GENERATE, by_prompt({"picture 2": gate, "picture 1": BLOCKED}))
    batch.prompts(5)
    process = batch.start(*ONE_BY_ONE)
    batch.service.wait_until(lambda: gate.arrived and batch.stored_states()["picture 0"] == "saved")
    files = sorted(batch.files())
    status = batch.status()
    assert status["running"] is True
    assert (status["total"], status["saved"], status["failed"], status["pending"]) == (5, 1, 1, 2)
    assert status["estimated_cost"] == pytest.approx(2 * PRICE)
    assert sorted(batch.files()) == files
    gate.open()
    result = batch.finish(process)
    assert result.code == 1
    status = batch.status()
    assert status["running"] is False
    assert {name: status[name] for name in (*STATES, "total")} == {n: result.json[n] for n in (*STATES, "total")}
    assert status["estimated_cost"] == result.json["estimated_cost"]


def test_status_of_a_killed_run_is_not_running(batch: Batch) -> None:
    batch.service.play(GENERATE, SILENT)
    batch.prompts(2)
    process = batch.start()
    batch.service.wait_until(lambda: len(batch.sent) == 2)
    batch.kill(process)
    before = batch.files()
    status = batch.status()
    assert (status["running"], status["total"], status["saved"]) == (False, 2, 0)
    after = batch.files()
    assert sorted(after) == sorted(before)
    assert [name for name in before if before[name] != after[name] and not name.endswith("-shm")] == []


@pytest.mark.parametrize("option", ["--status", "--gallery-only"])
def test_there_is_nothing_to_see_where_no_batch_was(batch: Batch, option: str) -> None:
    (batch.shell.folder / "empty").mkdir()
    for name in ("empty", "missing"):
        result = batch.call(option, name)
        assert result.code == 2
        assert list((batch.shell.folder / "empty").iterdir()) == []
        assert not (batch.shell.folder / "missing").exists()


def test_status_needs_no_key_and_no_network(batch: Batch) -> None:
    batch.rows("a")
    assert batch.run().code == 0
    connections = batch.service.connections
    batch.shell.env.clear()
    assert batch.status()["saved"] == 1
    assert batch.call("--gallery-only", str(batch.out)).code == 0
    assert batch.service.connections == connections


def test_the_summary_speaks_of_the_folder_and_of_this_run(batch: Batch) -> None:
    batch.service.play(GENERATE, by_prompt({"picture 1": LOST, "picture 2": BLOCKED}))
    batch.prompts(6)
    first = batch.run(*ONE_BY_ONE, "--limit", "4")
    assert first.code == 1
    assert_counts(first, saved=2, unknown=1, failed=1, pending=2)
    second = batch.run()
    assert second.code == 1
    assert_counts(second, saved=4, unknown=1, failed=1)
    summary, run = second.json, second.json["this_run"]
    assert {"total", *STATES, "estimated_cost", "elapsed_s", "results", "gallery", "this_run"} <= set(summary)
    assert {name: run[name] for name in ("saved", "failed", "unknown", "generated")} == {
        "saved": 2,
        "failed": 0,
        "unknown": 0,
        "generated": 0,
    }
    assert run["estimated_cost"] == pytest.approx(2 * PRICE)
    assert summary["estimated_cost"] == pytest.approx(5 * PRICE)
    assert summary["elapsed_s"] > 0
    assert summary["results"] == str(batch.out / "results.jsonl") and summary["gallery"] == str(
        batch.out / "index.html"
    )
    assert Path(summary["results"]).is_file() and Path(summary["gallery"]).is_file()
    assert sum(entry["estimated_cost"] for entry in batch.results()) == pytest.approx(5 * PRICE)


def test_stdout_is_json_in_utf_8_whatever_the_locale(batch: Batch) -> None:
    batch.shell.env |= {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    batch.out = batch.shell.folder / "bilder-für-雪"
    batch.rows("雪")
    result = batch.run()
    assert result.code == 0, result.stderr
    assert result.json["results"] == str(batch.out / "results.jsonl")


# ---------------------------------------------------------------------------------------------------------------------
# What is told while it runs
# ---------------------------------------------------------------------------------------------------------------------


def test_quiet_is_quiet(batch: Batch) -> None:
    batch.rows("a", "x" * 900)
    result = batch.run("--quiet")
    assert (result.code, result.stderr) == (0, "")


def test_quiet_still_tells_why_it_failed(batch: Batch) -> None:
    batch.service.play(GENERATE, error(401, "InvalidApiKey"))
    batch.rows("a")
    result = batch.run("--quiet")
    assert result.code == 3
    result.assert_one_line_of_advice()
    assert len(result.stderr.splitlines()) == 2


@posix
def test_without_a_terminal_a_line_comes_every_few_seconds(batch: Batch) -> None:
    gate = Gate()
    batch.service.play(GENERATE, by_prompt({"b": gate}))
    batch.rows("a", "b")
    process = batch.start()
    assert process.stderr
    ready, _, _ = select.select([process.stderr], [], [], 7)
    assert ready, "nothing was told in seven seconds"
    line = os.read(process.stderr.fileno(), 1000).decode()
    assert "1" in line and "2" in line and line.endswith("\n") and "\r" not in line and "\x1b" not in line
    gate.open()
    assert batch.finish(process).code == 0


@posix
def test_on_a_terminal_there_is_a_bar(batch: Batch) -> None:
    import fcntl
    import termios

    batch.service.play(GENERATE, slowly(0.1))
    batch.prompts(6)
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    try:
        process = subprocess.Popen(
            batch.shell.command(*batch.arguments(*ONE_BY_ONE)),
            cwd=batch.shell.folder,
            env=batch.shell.environment() | {"TERM": "xterm"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=follower,
        )
        batch.shell.keep(process)
        stdout, _ = process.communicate(timeout=20)
        shown = b""
        while select.select([leader], [], [], 0.2)[0]:
            shown += os.read(leader, 65536)
    finally:
        os.close(follower)
        os.close(leader)
    assert process.returncode == 0
    assert json.loads(stdout)["saved"] == 6
    text = shown.decode()
    assert "\r" in text and re.search(r"\b6/6\b", text) and "US$" in text and "failed" in text


@posix
def test_a_terminal_shows_no_bar_when_quiet(batch: Batch) -> None:
    batch.prompts(2)
    leader, follower = os.openpty()
    try:
        done = subprocess.run(
            batch.shell.command(*batch.arguments("--quiet")),
            cwd=batch.shell.folder,
            env=batch.shell.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=follower,
            timeout=20,
            check=False,
        )
        assert done.returncode == 0
        assert not select.select([leader], [], [], 0.1)[0]
    finally:
        os.close(follower)
        os.close(leader)


def test_control_characters_of_the_service_do_not_reach_the_terminal(batch: Batch) -> None:
    batch.service.play(GENERATE, error(400, "InvalidParameter", "\x1b[31mred\x07\x1b]0;title\x07"))
    batch.rows({"prompt": "a", "id": "row"})
    result = batch.run()
    assert result.code == 1
    assert "\x1b" not in result.stderr and "\x07" not in result.stderr


@posix
@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&-", "<&-", ">/dev/full", "2>/dev/full"])
def test_streams_that_are_closed_cost_no_picture(batch: Batch, streams: str) -> None:
    batch.rows("a", "b")
    quoted = " ".join(f"'{word}'" for word in batch.shell.command(*batch.arguments()))
    done = subprocess.run(
        ["sh", "-c", f"{quoted} {streams}"],
        cwd=batch.shell.folder,
        env=batch.shell.environment(),
        capture_output=True,
        timeout=20,
        check=False,
    )
    assert b"Traceback" not in done.stdout + done.stderr
    assert batch.stored_states() == {"a": "saved", "b": "saved"}
    assert sorted(batch.sent) == ["a", "b"]


# ---------------------------------------------------------------------------------------------------------------------
# The key
# ---------------------------------------------------------------------------------------------------------------------


def test_the_key_is_in_no_file_and_no_stream(batch: Batch) -> None:
    """Also where the service says it again, at every place where it may say something."""
    said = f"the key {TEST_KEY} is"
    batch.service.play(
        GENERATE,
        by_prompt(
            {
                "refused": error(400, "InvalidParameter", said),
                "coded": error(400, f"InvalidParameter.{TEST_KEY}", said),
                "extended": good(reasoning_content=said, content=[{"image": "IMAGE"}, {"text": said}]),
                "thought": good(reasoning_content=said, request_id=TEST_KEY),
                "busy": [error(503, "ServiceUnavailable", said), good()],
                "strange": html(200, said),
            }
        ),
    )
    batch.rows("refused", "coded", {"prompt": "extended", "prompt_extend": True}, "thought", "busy", "strange", "good")
    result = batch.run(*ONE_BY_ONE)
    assert result.code == 1, result.stdout
    assert TEST_KEY not in result.stdout + result.stderr
    assert [name for name, content in batch.files().items() if TEST_KEY.encode() in content] == []
    batch.service.play(GENERATE, error(401, "InvalidApiKey", said))
    last = batch.run("--retry-failed")
    assert last.code == 3
    assert TEST_KEY not in last.stdout + last.stderr
    assert [name for name, content in batch.files().items() if TEST_KEY.encode() in content] == []


@posix
def test_the_key_goes_to_the_service_only(batch: Batch) -> None:
    """No proxy for loopback, no .netrc, no key on downloads."""
    with FaultServer() as proxy:
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            batch.shell.env[name] = proxy.root
        (batch.shell.home / ".netrc").write_text("machine 127.0.0.1 login l password p\n", encoding="utf-8")
        (batch.shell.home / ".netrc").chmod(0o600)
        batch.prompts(2)
        assert batch.run().code == 0
        assert not proxy.connections
    assert {request.header("authorization") for request in batch.service.posts} == {f"Bearer {TEST_KEY}"}
    assert {request.header("authorization") for request in batch.service.downloads} == {None}


def test_a_redirect_is_not_followed_with_the_key(batch: Batch) -> None:
    with FaultServer() as thief:
        batch.service.play(GENERATE, Answer(status=307, headers=(("Location", thief.root + GENERATE),)))
        batch.prompts(1)
        assert batch.run().code != 0
        assert not thief.connections


def test_a_row_cannot_send_the_key_elsewhere(batch: Batch) -> None:
    with FaultServer() as thief:
        batch.rows({"prompt": "a", "base_url": thief.base_url})
        assert batch.run().code == 2
        assert not thief.connections and not batch.service.connections


def test_a_host_that_is_not_trusted_gets_nothing(batch: Batch) -> None:
    batch.prompts(1)
    result = batch.run("--base-url", "https://dashscope.aliyuncs.com.example.com/api/v1")
    assert result.code == 2
    assert not batch.out.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------


@posix
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_stops_before_paying(batch: Batch) -> None:
    batch.out.mkdir(mode=0o500)
    batch.prompts(1)
    assert batch.run().code == 9
    assert batch.sent == []


@pytest.mark.parametrize("stays", [False, True], ids=["all of it", "what is in it"])
def test_a_folder_that_vanishes_meanwhile_stops_the_run(batch: Batch, stays: bool) -> None:
    gate = Gate()
    batch.service.play(GENERATE, gate)
    batch.prompts(8)
    process = batch.start("--concurrency", "2")
    batch.service.wait_until(lambda: len(gate.arrived) == 2)
    shutil.rmtree(batch.out)
    if stays:
        batch.out.mkdir()
    gate.open()
    result = batch.finish(process, timeout=10)
    assert result.code == 9, result.stdout
    assert len(batch.sent) <= 4


def test_a_relative_folder_is_that_of_the_working_folder(batch: Batch) -> None:
    batch.rows("a")
    assert batch.run("--output-dir", "deep/er").code == 0
    assert (batch.shell.folder / "deep/er/results.jsonl").is_file()
    assert [name for name in batch.shell.files() if not name.startswith("deep/er/")] == ["rows.jsonl"]


# ---------------------------------------------------------------------------------------------------------------------
# Gallery options
# ---------------------------------------------------------------------------------------------------------------------


def test_without_a_gallery_there_is_no_page_until_it_is_asked_for(batch: Batch) -> None:
    batch.rows("a")
    result = batch.run("--no-gallery")
    assert result.code == 0
    assert not result.json.get("gallery")
    assert not (batch.out / "index.html").exists()
    assert list(batch.out.glob("thumbs/**/*.jpg")) == []
    made = batch.call("--gallery-only", str(batch.out))
    assert made.code == 0, made.stdout
    assert made.json["gallery"] == str(batch.out / "index.html")
    assert (batch.out / "index.html").is_file()
    assert len(list(batch.out.glob("thumbs/**/*.jpg"))) == 1
    assert len(batch.sent) == 1


def test_a_gallery_may_be_written_beside_a_running_batch(batch: Batch) -> None:
    gate = Gate()
    batch.service.play(GENERATE, by_prompt({"b": gate}))
    batch.rows("a", "b")
    process = batch.start()
    batch.service.wait_until(lambda: gate.arrived and batch.stored_states()["a"] == "saved")
    result = batch.call("--gallery-only", str(batch.out))
    assert result.code == 0, result.stdout
    gate.open()
    assert batch.finish(process).code == 0
    assert batch.states() == {"a": "saved", "b": "saved"}


@pytest.mark.smoke
def test_what_is_sent_is_exactly_what_the_row_says(batch: Batch) -> None:
    batch.rows({"prompt": "  a\tb ", "size": "640x512", "seed": 0}, {"prompt": "c", "aspect_ratio": "16:9"})
    assert batch.run().code == 0
    sent = {prompt_of(request).strip(): (prompt_of(request), parameters_of(request)) for request in batch.service.posts}
    assert sent["a\tb"] == ("  a\tb ", {"size": "640*512", "prompt_extend": False, "seed": 0})
    assert sent["c"][1]["size"] == "1280*720"
