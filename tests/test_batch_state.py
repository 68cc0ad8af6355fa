"""The state of a batch: killed at any moment, started again, and nothing is lost or paid twice."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shlex
import signal
import sqlite3
import stat
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from batch_helpers import (
    PRICE,
    SMALL,
    SMALL_PNG,
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
    drawn,
    error,
    file,
    good,
    html,
    noise_png,
    oss_error,
    png,
)
from zimage.batch.contract import DATABASE_SCHEMA, DATABASE_VERSION
from zimage.batch.folder import FolderLock
from zimage.errors import Failure

SILENT = good(how=Answer(delay_s=60))  # billed, and the answer does not come
LOST = good(how=Answer(hang_up="after-reading"))  # billed, and the connection closed
BLOCKED = error(400, "DataInspectionFailed")
EXPIRED = oss_error(403, "AccessDenied", "Request has expired.")
OTHER_PNG = png(512, 512, "crimson")


@pytest.fixture
def batch(shell: Shell, service: FaultServer) -> Batch:
    return Batch(shell, service)


@pytest.fixture
def elsewhere() -> Iterator[FaultServer]:
    """Another service."""
    with FaultServer() as server:
        server.play(PICTURE, file(SMALL_PNG))
        yield server


def seeds(batch: Batch) -> list[int]:
    return [entry["seed"] for entry in batch.results()]


def kill_with(batch: Batch, out: int, *options: str) -> None:
    """Start, and kill when so many requests are out."""
    process = batch.start(*options)
    batch.service.wait_until(lambda: len(batch.service.posts) >= out)
    batch.kill(process)


# ---------------------------------------------------------------------------------------------------------------------
# States
# ---------------------------------------------------------------------------------------------------------------------


def test_every_step_is_on_disk_before_the_next(batch: Batch) -> None:
    """The server looks into the database at the moment when a request reaches it."""
    seen: dict[str, dict[str, str]] = {}
    links: list[bool] = []

    def generate(request: Received) -> Answer:
        seen["post"] = batch.stored_states()
        answer = good()(request)
        assert isinstance(answer, Answer)
        return answer

    def picture(request: Received) -> Answer:
        seen["download"] = batch.stored_states()
        links.append(any(batch.service.root + PICTURE in str(row) for row in batch.query("SELECT * FROM pictures")))
        return file(SMALL_PNG)

    batch.service.play(GENERATE, generate)
    batch.service.play(PICTURE, picture)
    batch.rows("a")
    assert batch.run().code == 0
    assert seen == {"post": {"a": "submitting"}, "download": {"a": "generated"}}
    assert links == [True]
    assert batch.stored_states() == {"a": "saved"}


def test_what_is_not_sent_yet_is_pending(batch: Batch) -> None:
    gate = Gate()
    batch.service.play(GENERATE, gate)
    batch.rows("a", "b", "c")
    process = batch.start("--concurrency", "1")
    batch.service.wait_until(lambda: gate.arrived)
    assert batch.stored_states() == {"a": "submitting", "b": "pending", "c": "pending"}
    gate.open()
    assert batch.finish(process).code == 0


OWN_FAULTS: dict[str, Behaviour] = {
    "refused by safety": BLOCKED,
    "invalid for the service": error(400, "InvalidParameter"),
    "a picture that is none": good("/img/garbage.png"),
    "a picture that is cut": good("/img/half.png"),
    "a page in place of a picture": good("/img/page.png"),
    "a link that has expired": good("/img/expired.png"),
}


@pytest.mark.parametrize("case", OWN_FAULTS)
def test_a_row_that_fails_by_its_own_fault_waits_for_retry_failed(batch: Batch, case: str) -> None:
    service = batch.service
    service.play("/img/garbage.png", file(b"garbage" * 100))
    service.play("/img/half.png", file(SMALL_PNG[: len(SMALL_PNG) // 2]))
    service.play("/img/page.png", html(200, "please sign in"))
    service.play("/img/expired.png", EXPIRED)
    service.play(GENERATE, by_prompt({"bad": [OWN_FAULTS[case], good()]}))
    batch.rows("a", "bad", "c")
    result = batch.run()
    assert result.code == 1
    assert_counts(result, saved=2, failed=1)
    assert batch.states() == {"a": "saved", "bad": "failed", "c": "saved"}
    entry = batch.picture("bad")
    assert entry["error"]["message"] and entry["error"]["code"]
    again = batch.run("--retry-unknown")
    assert again.code == 1
    assert len(batch.sent) == 3
    assert_counts(again, saved=2, failed=1)
    last = batch.run("--retry-failed")
    assert last.code == 0, last.stdout
    assert_counts(last, saved=3)
    assert batch.sent.count("bad") == 2 and len(batch.sent) == 4
    assert batch.picture("bad")["seed"] == entry["seed"]
    bad = [request for request in service.posts if prompt_of(request) == "bad"]
    assert parameters_of(bad[0]) == parameters_of(bad[1])


def test_what_was_billed_and_failed_still_counts_as_spent(batch: Batch) -> None:
    batch.service.play("/img/expired.png", EXPIRED)
    batch.service.play(GENERATE, by_prompt({"paid": good("/img/expired.png"), "unpaid": BLOCKED}))
    batch.rows("paid", "unpaid", "c")
    assert batch.run().json["estimated_cost"] == pytest.approx(2 * PRICE)


def test_a_picture_that_cannot_be_had_now_stays_generated_and_is_free_later(batch: Batch) -> None:
    batch.service.play(PICTURE, html(503))
    batch.rows("a")
    result = batch.run("--time-limit", "2")
    assert result.code in (1, 11), result.stdout  # the last try may fail a moment before the limit
    assert_counts(result, generated=1)
    batch.service.play(PICTURE, file(SMALL_PNG))
    result = batch.run()
    assert result.code == 0, result.stdout
    assert batch.sent == ["a"]


# ---------------------------------------------------------------------------------------------------------------------
# Killed and started again
# ---------------------------------------------------------------------------------------------------------------------


def test_requests_that_were_out_at_a_kill_are_unknown_and_not_sent_again(batch: Batch) -> None:
    batch.service.play(GENERATE, by_prompt({"b": SILENT, "c": SILENT}))
    batch.rows("a", "b", "c", "d", "e")
    process = batch.start("--concurrency", "2")
    batch.service.wait_until(lambda: len(batch.service.posts) == 3 and batch.stored_states()["a"] == "saved")
    batch.kill(process)
    batch.service.play(GENERATE, good())
    result = batch.run()
    assert result.code == 1, result.stdout
    assert_counts(result, saved=3, unknown=2)
    assert batch.states() == {"a": "saved", "b": "unknown", "c": "unknown", "d": "saved", "e": "saved"}
    assert max(Counter(batch.sent).values()) == 1
    assert result.json["estimated_cost"] == pytest.approx(5 * PRICE)
    assert "unknown" in result.stderr
    assert batch.run("--retry-failed").code == 1
    assert len(batch.sent) == 5
    result = batch.run("--retry-unknown")
    assert result.code == 0, result.stdout
    assert Counter(batch.sent) == {"a": 1, "b": 2, "c": 2, "d": 1, "e": 1}
    assert result.json["estimated_cost"] == pytest.approx(7 * PRICE)


def test_a_picture_that_was_paid_for_at_a_kill_is_downloaded_free(batch: Batch) -> None:
    batch.service.play(PICTURE, Answer(body=SMALL_PNG, dribble_body_s=0.2, quick=100))
    batch.rows("a", "b")
    process = batch.start()
    batch.service.wait_until(lambda: len(batch.service.downloads) == 2)
    batch.kill(process)
    assert batch.stored_states() == {"a": "generated", "b": "generated"}
    batch.service.play(PICTURE, file(SMALL_PNG))
    result = batch.run()
    assert result.code == 0, result.stdout
    assert_counts(result, saved=2)
    assert sorted(batch.sent) == ["a", "b"]
    assert all(Path(entry["image_path"]).read_bytes() == SMALL_PNG for entry in batch.results())
    assert not [
        name for name in batch.shell.files() if name.endswith(".part") or "/." in name.replace("/.gitignore", "")
    ]


def test_paid_pictures_are_fetched_even_where_nothing_may_be_sent(batch: Batch) -> None:
    """Free work needs no budget."""
    batch.service.play(PICTURE, Answer(delay_s=60))
    batch.rows("a", "b")
    process = batch.start("--limit", "1")
    batch.service.wait_until(lambda: batch.service.downloads)
    batch.kill(process)
    batch.service.play(PICTURE, file(SMALL_PNG))
    for bound in (("--max-cost", "0.001"), ("--limit", "0")):
        result = batch.run(*bound)
        assert result.code == 1
        assert_counts(result, saved=1, pending=1)
    assert batch.sent == ["a"]


def test_temporary_files_of_a_dead_run_go_and_those_of_others_stay(batch: Batch) -> None:
    batch.service.play("/img/slow.png", Answer(body=noise_png(), dribble_body_s=0.5, quick=900_000))
    batch.service.play(GENERATE, by_prompt({"b": good("/img/slow.png")}))
    batch.rows("a", {"prompt": "b", "output": "sub/b.png"})
    process = batch.start()
    batch.service.wait_until(lambda: len(batch.service.downloads) == 2 and batch.stored_states()["a"] == "saved")
    batch.kill(process)
    mine = [batch.out / name for name in (".mine.part", "notes.txt", "images/.thing.png.part", "sub/.b.png.old")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine", encoding="utf-8")
    batch.service.play("/img/slow.png", file(SMALL_PNG))
    assert batch.run().code == 0
    hidden = {str(path.relative_to(batch.out)) for path in batch.out.rglob(".*")}
    assert hidden <= {".mine.part", "images/.thing.png.part", "sub/.b.png.old", ".gitignore"}
    assert all(path.read_text(encoding="utf-8") == "mine" for path in mine)


@pytest.mark.smoke
def test_a_finished_batch_starts_again_without_any_network(batch: Batch) -> None:
    batch.rows("a", "b")
    assert batch.run().code == 0
    requests, pictures = (
        len(batch.service.requests),
        {e["output"]: (batch.out / e["output"]).stat() for e in batch.results()},
    )
    result = batch.run()
    assert result.code == 0
    assert_counts(result, saved=2)
    assert result.json["this_run"]["total"] == 0
    assert len(batch.service.requests) == requests
    for name, before in pictures.items():
        assert (batch.out / name).stat().st_mtime_ns == before.st_mtime_ns


def wait_for_requests(batch: Batch, count: int) -> None:
    batch.service.wait_until(lambda: len(batch.service.requests) >= count)


def test_killed_again_and_again_nothing_is_lost_or_paid_twice(batch: Batch) -> None:
    """The small form of the figure in the contract: faults in one call of ten, kills at random moments."""
    chance = random.Random(20260)
    out = 4
    prompts = batch.prompts(60)
    faults: list[Behaviour] = [LOST, html(502)]
    faults += [error(429, "Throttling"), error(503, "ServiceUnavailable"), error(500, "InternalError")]
    chosen = {prompt: chance.choice(faults) for prompt in prompts if chance.random() < 0.1}
    lost = {prompt for prompt, fault in chosen.items() if fault in faults[:2]}
    scripts: dict[str, list[Behaviour]] = {prompt: [fault, good()] for prompt, fault in chosen.items()}
    answer = by_prompt(scripts)

    def slowly(request: Received) -> Answer:
        time.sleep(0.03)
        return answer(request)

    batch.service.play(GENERATE, slowly)
    kills = 6
    for _ in range(kills):
        enough = len(batch.service.requests) + chance.randint(4, 18)
        process = batch.start("--concurrency", str(out))
        wait_for_requests(batch, enough)
        time.sleep(chance.random() * 0.03)
        batch.kill(process)
    result = batch.run("--concurrency", str(out))
    while result.code == 1 and result.json["pending"]:
        result = batch.run("--concurrency", str(out))
    assert result.code in (0, 1), result.stdout  # 1: a kill hit a request, whose outcome is unknown
    states = batch.states()
    assert set(states.values()) <= {"saved", "unknown"}, Counter(states.values())
    unknown = {prompt for prompt, state in states.items() if state == "unknown"}
    assert lost <= unknown
    assert len(unknown - lost) <= kills * out
    made = Counter(prompt_of(request) for request in batch.service.posts)
    assert [prompt for prompt in prompts if made[prompt] > 1 and prompt not in scripts] == []
    assert [prompt for prompt in lost if made[prompt] > 1] == []
    saved = [entry for entry in batch.results() if entry["state"] == "saved"]
    assert all(Path(entry["image_path"]).read_bytes() == SMALL_PNG for entry in saved)
    assert batch.service.billed <= len(prompts)


# ---------------------------------------------------------------------------------------------------------------------
# Identity: which picture belongs to which row
# ---------------------------------------------------------------------------------------------------------------------

X: dict[str, Any] = {"prompt": "x"}
Y: dict[str, Any] = {"prompt": "y", "id": "why"}
Z: dict[str, Any] = {"prompt": "z", "seed": 5}
SAME_PICTURES: dict[str, list[dict[str, Any]]] = {
    "the same": [X, Y, Z, X],
    "turned round": [X, Z, Y, X][::-1],
    "some removed": [Y],
    "only one of two equal ones": [Z, X],
}


@pytest.mark.parametrize("case", SAME_PICTURES)
def test_rows_that_are_moved_or_removed_are_not_paid_again(batch: Batch, case: str) -> None:
    batch.rows(X, Y, Z, X)
    assert batch.run().code == 0
    before = {(entry["prompt"], entry["output"]): entry["seed"] for entry in batch.results()}
    batch.rows(*SAME_PICTURES[case])
    result = batch.run()
    assert result.code == 0, result.stdout
    assert result.json["this_run"]["total"] == 0
    batch.rows(X, Y, Z, X)
    assert batch.run().code == 0
    assert len(batch.sent) == 4
    assert {(entry["prompt"], entry["output"]): entry["seed"] for entry in batch.results()} == before


@pytest.mark.smoke
def test_only_what_is_added_is_paid(batch: Batch) -> None:
    batch.rows("x", "x", "y")
    assert batch.run().code == 0
    batch.rows("new", "x", {"prompt": "named", "id": "n"}, "y", "x", "x")
    result = batch.run()
    assert result.code == 0, result.stdout
    assert Counter(batch.sent) == {"x": 3, "y": 1, "new": 1, "named": 1}
    assert result.json["this_run"]["saved"] == 3
    assert [entry["prompt"] for entry in batch.results()] == ["new", "x", "named", "y", "x", "x"]


def test_unsent_rows_that_are_removed_are_not_sent(batch: Batch) -> None:
    batch.rows("a", "b", "c")
    assert batch.run("--limit", "1").code == 1
    batch.rows("a", "c")
    result = batch.run()
    assert result.code == 0, result.stdout
    assert batch.sent == ["a", "c"]
    assert_counts(result, saved=2)


def test_a_row_with_an_id_may_be_named_anew_without_one_only_as_a_new_row(batch: Batch) -> None:
    """Ids of two rows swapped: both have other content now, and neither is made without consent."""
    batch.rows({"prompt": "a", "id": "1"}, {"prompt": "b", "id": "2"})
    assert batch.run().code == 0
    batch.rows({"prompt": "a", "id": "2"}, {"prompt": "b", "id": "1"})
    result = batch.run()
    assert (result.code, result.error["code"]) == (2, "changed_rows")
    assert len(batch.sent) == 2


def changed(result: Result, pictures: int, price: float = PRICE) -> None:
    """The run was refused, told what it would make and for how much, and changed nothing."""
    assert result.code == 2, result.stdout
    assert result.error["code"] == "changed_rows"
    assert result.error["billed"] == "no"
    told = json.dumps(result.error)
    assert f"{pictures * price:.5g}" in told or f"{round(pictures * price, 6)}" in told, told
    assert str(pictures) in result.error["message"]
    assert "--accept-changes" in result.stderr


@pytest.mark.parametrize(
    "change",
    [{"prompt": "other"}, {"size": "640*512"}, {"seed": 8}, {"prompt_extend": True}, {"aspect_ratio": "1:1"}],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_row_is_not_made_again_without_consent(batch: Batch, change: dict[str, Any]) -> None:
    batch.rows({"prompt": "a", "id": "one", "seed": 7}, "b")
    assert batch.run().code == 0
    before = {name: content for name, content in batch.files().items() if ".png" in name or ".json" in name}
    batch.rows({"prompt": "a", "id": "one", "seed": 7} | change, "b")
    result = batch.run()
    changed(result, 1, price=2 * PRICE if "prompt_extend" in change else PRICE)
    assert len(batch.sent) == 2
    assert {name: batch.files()[name] for name in before} == before
    batch.rows({"prompt": "a", "id": "one", "seed": 7}, "b")
    assert batch.run().code == 0
    assert len(batch.sent) == 2


def test_accepted_changes_make_a_new_picture_and_keep_the_old_one(batch: Batch) -> None:
    batch.service.play("/img/new.png", file(OTHER_PNG))
    batch.service.play(GENERATE, by_prompt({"new": good("/img/new.png")}))
    batch.rows({"prompt": "old", "id": "one", "output": "one.png"}, "b")
    assert batch.run().code == 0
    batch.rows({"prompt": "new", "id": "one", "output": "one.png"}, "b")
    changed(batch.run(), 1)
    result = batch.run("--accept-changes")
    assert result.code == 0, result.stdout
    assert sorted(batch.sent) == ["b", "new", "old"]
    assert (batch.out / "one.png").read_bytes() == OTHER_PNG
    replaced = batch.out / "replaced" / "000000-one.png"
    assert replaced.read_bytes() == SMALL_PNG
    evidence = batch.evidence()
    assert evidence["old"]["image"]["path"] == evidence["old"]["output"] == str(replaced)
    old = batch.picture("old")
    assert (old["state"], old["image_path"], old["in_input"]) == ("saved", str(replaced), False)
    assert evidence["new"]["image"]["path"] == str(batch.out / "one.png")
    assert result.json["estimated_cost"] == pytest.approx(3 * PRICE)
    assert batch.run().code == 0
    assert len(batch.sent) == 3


def test_accepted_changes_are_made_once(batch: Batch) -> None:
    """And back again: the first picture's row is a change once more."""
    for number, prompt in enumerate(["old", "new", "old"]):
        batch.rows({"prompt": prompt, "id": "one", "output": "one.png"})
        assert batch.run("--accept-changes").code == 0
        assert batch.run("--accept-changes").code == 0
        assert len(batch.sent) == number + 1
    assert sorted(path.name for path in batch.out.rglob("*one.png")) == ["000000-one.png", "000001-one.png", "one.png"]


def test_changes_accepted_in_a_run_that_is_killed_lose_nothing(batch: Batch) -> None:
    batch.rows({"prompt": "old", "id": "one", "output": "one.png"})
    assert batch.run().code == 0
    batch.service.play(GENERATE, SILENT)
    batch.rows({"prompt": "new", "id": "one", "output": "one.png"})
    kill_with(batch, 2, "--accept-changes")
    batch.service.play(GENERATE, good())
    result = batch.run("--retry-unknown")
    assert result.code == 0, result.stdout
    assert batch.sent == ["old", "new", "new"]
    assert (batch.out / "one.png").exists() and (batch.out / "replaced" / "000000-one.png").exists()


def killed_while_it_moved(batch: Batch, moved: bool) -> Path:
    """A folder as a kill leaves it between the database, which has the change, and the old file; returns that one."""
    batch.rows({"prompt": "old", "id": "one", "output": "a/one.png"})
    assert batch.run().code == 0
    evidence = batch.out / "evidence" / "0000" / "000000.json"
    before, facts = evidence.read_bytes(), batch.query("SELECT facts FROM pictures")[0]
    batch.rows({"prompt": "new", "id": "one", "output": "a/one.png"})
    assert batch.run("--accept-changes", "--limit", "0").code == 1
    evidence.write_bytes(before)
    replaced = batch.out / "replaced" / "000000-one.png"
    if not moved:
        replaced.rename(batch.out / "a" / "one.png")
        replaced.parent.rmdir()
    with contextlib.closing(sqlite3.connect(batch.out / "batch.sqlite3")) as database, database:
        database.execute("UPDATE pictures SET moved_from = 'a/one.png', facts = ? WHERE number = 0", facts)
    return replaced


@pytest.mark.parametrize("moved", [False, True], ids=["not moved", "moved"])
def test_a_kill_while_an_old_picture_moves_loses_nothing(batch: Batch, moved: bool) -> None:
    replaced = killed_while_it_moved(batch, moved)
    assert batch.run("--dry-run").json["to_make"] == 1
    assert batch.run().code == 0
    assert batch.sent == ["old", "new"]
    assert (replaced.exists(), (batch.out / "a" / "one.png").exists()) == (True, True)
    old = batch.picture("old")
    assert (old["state"], old["image_path"]) == ("saved", str(replaced))
    assert batch.evidence()["old"]["image"]["path"] == str(replaced)


BAD_EVIDENCE = {
    "missing": None,
    "no JSON": b"{",
    "no text": b"\xff",
    "no object": b"[]",
    "nested": b"[" * 100_000,
    "without image": b'{"status": "generated"}',
    "image is none": b'{"image": 5}',
}


@pytest.mark.parametrize("case", BAD_EVIDENCE)
def test_an_old_picture_moves_whatever_its_evidence_is(batch: Batch, case: str) -> None:
    replaced = killed_while_it_moved(batch, False)
    evidence, content = batch.out / "evidence" / "0000" / "000000.json", BAD_EVIDENCE[case]
    evidence.unlink() if content is None else evidence.write_bytes(content)
    for _ in range(2):
        assert batch.run().code == 0
        assert (batch.picture("old")["image_path"], batch.sent) == (str(replaced), ["old", "new"])
    evidence.unlink(missing_ok=True)  # what is left at the end is held to the schema


@pytest.mark.parametrize("foreign", ["replaced/000000-one.png", "a/one.png"])
def test_a_foreign_file_is_not_overwritten_by_a_picture_that_moves(batch: Batch, foreign: str) -> None:
    replaced = killed_while_it_moved(batch, foreign == "a/one.png")
    (batch.out / foreign).parent.mkdir(exist_ok=True)
    (batch.out / foreign).write_bytes(b"foreign")
    assert batch.run().error["code"] == "output_exists"
    assert (batch.out / foreign).read_bytes() == b"foreign"
    assert replaced.exists() and (batch.out / "a" / "one.png").exists()
    assert batch.sent == ["old"]


@posix
@pytest.mark.parametrize("name", ["moved_from", "output"])
@pytest.mark.parametrize("path", ["../elsewhere/one.png", "/elsewhere/one.png", "link/one.png"])
def test_a_strangers_database_moves_nothing_outside_the_folder(batch: Batch, name: str, path: str) -> None:
    killed_while_it_moved(batch, False)
    elsewhere = batch.shell.folder / "elsewhere"
    elsewhere.mkdir()
    (batch.out / "link").symlink_to(elsewhere)
    if name == "moved_from":
        (elsewhere / "one.png").write_bytes(b"foreign")
    before = {path: path.read_bytes() for path in elsewhere.iterdir()}
    with contextlib.closing(sqlite3.connect(batch.out / "batch.sqlite3")) as database, database:
        database.execute(
            f"UPDATE pictures SET {name} = ? WHERE number = 0",
            (path.replace("/elsewhere", str(elsewhere)) if path.startswith("/") else path,),
        )
    batch.run()
    assert {path: path.read_bytes() for path in elsewhere.iterdir()} == before


@pytest.mark.parametrize("how", [good("/img/slow.png"), LOST], ids=["generated", "unknown"])
def test_a_changed_row_whose_old_picture_is_not_saved_yet(batch: Batch, how: Behaviour) -> None:
    """What was paid for is fetched into the folder of replaced ones; the name is free for the new picture."""
    batch.service.play("/img/slow.png", html(503))
    batch.service.play(GENERATE, by_prompt({"old": how}))
    batch.rows({"prompt": "old", "id": "one", "output": "one.png"})
    assert batch.run("--time-limit", "2").code != 0
    batch.service.play("/img/slow.png", file(OTHER_PNG))
    batch.rows({"prompt": "new", "id": "one", "output": "one.png"})
    batch.run("--accept-changes")
    assert (batch.out / "one.png").read_bytes() == SMALL_PNG
    old = batch.picture("old")
    assert old["output"] == "replaced/000000-one.png"
    if how is not LOST:
        assert (batch.out / old["output"]).read_bytes() == OTHER_PNG
    assert batch.sent == ["old", "new"]


def test_a_row_may_not_name_a_file_as_the_batch_names_replaced_ones(batch: Batch) -> None:
    batch.rows({"prompt": "a", "output": "replaced/000000-a.png"})
    assert batch.run().error["code"] == "invalid_rows"
    batch.rows({"prompt": "a", "output": "replaced/a.png"})
    assert batch.run().code == 0


def test_a_new_row_may_not_take_the_file_of_another_picture(batch: Batch) -> None:
    """Without an id a row with another prompt is another row; the name it wants is taken."""
    batch.rows({"prompt": "old", "output": "one.png"})
    assert batch.run().code == 0
    batch.rows({"prompt": "new", "output": "ONE.png"})
    assert batch.run().code == 2
    assert batch.sent == ["old"]
    assert (batch.out / "one.png").read_bytes() == SMALL_PNG


def test_rows_that_swap_their_outputs_lose_no_picture(batch: Batch) -> None:
    batch.service.play("/img/b.png", file(OTHER_PNG))
    batch.service.play(GENERATE, by_prompt({"b": good("/img/b.png")}))
    batch.rows({"prompt": "a", "id": "a", "output": "1.png"}, {"prompt": "b", "id": "b", "output": "2.png"})
    assert batch.run().code == 0
    batch.rows({"prompt": "a", "id": "a", "output": "2.png"}, {"prompt": "b", "id": "b", "output": "1.png"})
    assert batch.run().code == 2
    assert len(batch.sent) == 2
    assert batch.run("--accept-changes").code == 0
    assert (batch.out / "2.png").read_bytes() == SMALL_PNG
    assert (batch.out / "1.png").read_bytes() == OTHER_PNG
    kept = Counter(path.read_bytes() for path in batch.out.rglob("*.png"))
    assert kept == {SMALL_PNG: 2, OTHER_PNG: 2}


def test_another_endpoint_is_a_change_of_every_row(batch: Batch, elsewhere: FaultServer) -> None:
    batch.rows("a", "b")
    assert batch.run().code == 0
    result = batch.run("--base-url", elsewhere.base_url)
    changed(result, 2)
    assert not elsewhere.connections and len(batch.sent) == 2
    result = batch.run("--base-url", elsewhere.base_url, "--accept-changes")
    assert result.code == 0, result.stdout
    assert len(elsewhere.posts) == 2 and len(batch.sent) == 2
    assert len({entry["output"] for entry in batch.results()}) == len(batch.results())


def test_another_region_is_a_change_of_every_row(batch: Batch, elsewhere: FaultServer) -> None:
    """No request may leave: the proxy would see it."""
    batch.rows("a")
    assert batch.run().code == 0
    batch.shell.env["HTTPS_PROXY"] = elsewhere.root
    result = batch.run("--region", "singapore")
    assert (result.code, result.error["code"]) == (2, "changed_rows")
    assert "0.015" in json.dumps(result.error)
    assert not elsewhere.connections


def test_new_rows_do_not_leave_before_changed_ones_are_accepted(batch: Batch) -> None:
    batch.rows({"prompt": "a", "id": "one"})
    assert batch.run().code == 0
    batch.rows({"prompt": "changed", "id": "one"}, "new")
    changed(batch.run(), 2)
    assert batch.sent == ["a"]


# ---------------------------------------------------------------------------------------------------------------------
# Seeds and variants
# ---------------------------------------------------------------------------------------------------------------------


def test_variants_have_the_seeds_that_follow_and_wrap_around(batch: Batch) -> None:
    batch.rows({"prompt": "a", "seed": 2**31 - 2}, {"prompt": "b", "seed": 0})
    assert batch.run("--variants", "3").code == 0
    assert seeds(batch) == [2**31 - 2, 2**31 - 1, 0, 0, 1, 2]
    sent = sorted(parameters_of(request)["seed"] for request in batch.service.posts)
    assert sent == sorted(seeds(batch))


@pytest.mark.parametrize("fields", [{}, {"seed": -1}], ids=["none", "minus one"])
def test_a_row_without_a_seed_gets_one_that_stays(batch: Batch, fields: dict[str, Any]) -> None:
    batch.service.play(GENERATE, LOST)
    batch.rows(*({"prompt": name} | fields for name in "abc"))
    assert batch.run("--concurrency", "1").code == 1
    before = seeds(batch)
    assert len(set(before)) == 3 and all(0 <= seed < 2**31 for seed in before)
    batch.service.play(GENERATE, good())
    assert batch.run("--retry-unknown").code == 0
    assert seeds(batch) == before
    sent = [(prompt_of(request), parameters_of(request)["seed"]) for request in batch.service.posts]
    assert sorted(sent[:3]) == sorted(sent[3:]) == sorted(zip("abc", before, strict=True))


def test_equal_rows_without_a_seed_are_different_pictures(batch: Batch) -> None:
    batch.rows("a", "a")
    assert batch.run().code == 0
    assert len(set(seeds(batch))) == 2


def test_more_variants_keep_those_that_are_there(batch: Batch) -> None:
    batch.rows("a", {"prompt": "b", "id": "b"})
    assert batch.run().code == 0
    a, b = seeds(batch)
    result = batch.run("--variants", "3")
    assert result.code == 0, result.stdout
    assert Counter(batch.sent) == {"a": 3, "b": 3}
    assert seeds(batch) == [(base + k) % 2**31 for base in (a, b) for k in range(3)]
    result = batch.run("--variants", "1")
    assert result.code == 0, result.stdout
    assert result.json["this_run"]["total"] == 0
    assert batch.run("--variants", "3").code == 0
    assert len(batch.sent) == 6
    assert all((batch.out / entry["output"]).is_file() for entry in batch.results())


# ---------------------------------------------------------------------------------------------------------------------
# Files that vanish, files in the way
# ---------------------------------------------------------------------------------------------------------------------


def test_a_saved_file_that_vanished_is_told_and_fetched_again_free(batch: Batch) -> None:
    batch.rows("a", "b")
    assert batch.run().code == 0
    gone = Path(batch.picture("a")["image_path"])
    gone.unlink()
    result = batch.run()
    assert result.code == 0, result.stdout
    assert "vanished" in result.stderr or "missing" in result.stderr
    assert gone.read_bytes() == SMALL_PNG
    assert len(batch.sent) == 2
    assert_counts(result, saved=2)


def test_a_vanished_file_whose_link_is_dead_is_told_and_not_paid_again(batch: Batch) -> None:
    batch.rows("a", "b")
    assert batch.run().code == 0
    batch.service.play(PICTURE, EXPIRED)
    Path(batch.picture("a")["image_path"]).unlink()
    result = batch.run()
    assert result.code == 1, result.stdout
    assert_counts(result, saved=1, failed=1)
    assert len(batch.sent) == 2
    batch.service.play(PICTURE, file(SMALL_PNG))
    assert batch.run("--retry-failed").code == 0
    assert len(batch.sent) == 3


@posix
@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_a_foreign_file_in_the_way_is_refused_before_paying(batch: Batch, kind: str) -> None:
    batch.out.mkdir()
    path = batch.out / "b.png"
    if kind == "file":
        path.write_bytes(b"mine")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("no")
    batch.rows("a", {"prompt": "b", "output": "b.png"})
    result = batch.run()
    assert result.code == 2, result.stdout
    assert "b.png" in result.error["message"]
    assert batch.sent == []
    assert kind != "file" or path.read_bytes() == b"mine"
    path.rmdir() if kind == "folder" else path.unlink()
    assert batch.run().code == 0


def test_a_file_that_takes_the_name_meanwhile_is_not_overwritten(batch: Batch) -> None:
    gate = Gate()
    batch.service.play(GENERATE, gate)
    batch.rows({"prompt": "a", "output": "a.png"})
    process = batch.start()
    batch.service.wait_until(lambda: gate.arrived)
    (batch.out / "a.png").write_bytes(b"mine")
    gate.open()
    result = batch.finish(process)
    assert result.code == 0, result.stdout
    assert (batch.out / "a.png").read_bytes() == b"mine"
    entry = batch.picture("a")
    assert Path(entry["image_path"]).read_bytes() == SMALL_PNG and entry["output"] != "a.png"
    assert batch.run().code == 0
    assert batch.sent == ["a"]


# ---------------------------------------------------------------------------------------------------------------------
# Two processes
# ---------------------------------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_with_the_progress_of_the_first(batch: Batch) -> None:
    gate = Gate()
    batch.service.play(GENERATE, by_prompt({"b": gate, "c": gate}))
    batch.rows("a", "b", "c")
    process = batch.start("--concurrency", "1")
    batch.service.wait_until(lambda: gate.arrived)
    batch.rows("d")
    second = batch.run()
    assert (second.code, second.error["code"]) == (2, "already_running")
    assert second.error["progress"]["saved"] == 1
    assert second.error["progress"]["total"] == 3
    assert "--status" in second.stderr
    batch.rows("a", "b", "c")
    gate.open()
    assert batch.finish(process).code == 0
    assert batch.run().code == 0
    assert sorted(batch.sent) == ["a", "b", "c"]


def test_two_processes_started_together_pay_once(batch: Batch) -> None:
    batch.service.play(GENERATE, good(how=Answer(delay_s=0.2)))
    batch.rows("a", "b", "c")
    results = [batch.finish(process) for process in [batch.start() for _ in range(3)]]
    assert sorted({result.code for result in results}) in ([0], [0, 2]), [result.stdout for result in results]
    assert sorted(batch.sent) == ["a", "b", "c"]
    assert batch.run().code == 0


def running(batch: Batch) -> tuple[Gate, subprocess.Popen[bytes]]:
    """A run of one row whose request is out."""
    gate = Gate()
    batch.service.play(GENERATE, gate)
    batch.rows("a")
    process = batch.start()
    batch.service.wait_until(lambda: gate.arrived)
    return gate, process


@posix
@pytest.mark.parametrize("way", ["the lock file removed", "a link to the folder", "the folder renamed"])
def test_a_running_batch_is_noticed_whatever_is_done_to_the_folder(batch: Batch, way: str) -> None:
    gate, process = running(batch)
    out = batch.out
    if way == "the lock file removed":
        (batch.out / "batch.lock").unlink(missing_ok=True)
    else:
        batch.out = batch.shell.folder / "other"
        batch.out.symlink_to(out) if way == "a link to the folder" else out.rename(batch.out)
    assert batch.run().error["code"] == "already_running"
    assert batch.status()["running"] is True
    if way == "the folder renamed":
        batch.out = batch.out.rename(out)
    gate.open()
    assert batch.finish(process).code == 0
    assert batch.status()["running"] is False
    assert batch.sent == ["a"]


def test_nothing_is_read_or_changed_while_another_runs(batch: Batch) -> None:
    gate, process = running(batch)
    before = set(batch.shell.files())
    batch.input.write_text("no rows", encoding="utf-8")
    assert batch.run().error["code"] == "already_running"
    assert set(batch.shell.files()) == before
    gate.open()
    assert batch.finish(process).code == 0


@posix
def test_a_run_of_040_that_holds_its_lock_file_is_noticed(batch: Batch) -> None:
    import fcntl

    batch.rows("a")
    assert batch.run("--limit", "0").code == 1
    with open(batch.out / "batch.lock", "wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert batch.run().error["code"] == "already_running"
        assert batch.status()["running"] is True
    assert batch.status()["running"] is False
    assert batch.run().code == 0


@posix
def test_a_lock_file_that_leads_elsewhere_is_not_followed(batch: Batch) -> None:
    batch.out.mkdir()
    (batch.out / "batch.lock").symlink_to(batch.shell.folder / "elsewhere")
    batch.rows("a")
    assert batch.run().code == 0
    assert not (batch.shell.folder / "elsewhere").exists()


@posix
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EBADF])
def test_a_folder_that_cannot_be_locked_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(Failure, match="this folder cannot be locked") as caught:
        FolderLock(tmp_path).take()
    assert caught.value.code == "disk"
    assert "--output-dir" in caught.value.fault.hint


@posix
@pytest.mark.parametrize("number", [errno.EACCES, errno.EAGAIN])
def test_a_mount_that_calls_everything_taken_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """No other batch works there: not even a file that nobody knows can be locked."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(FolderLock, "PATIENCE", 0.1)
    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(Failure, match="this folder cannot be locked"):
        FolderLock(tmp_path).take()
    assert os.listdir(tmp_path) == []


@posix
def test_a_folder_that_another_has_locked_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FolderLock, "PATIENCE", 0.1)
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    assert first.take()
    assert not second.take()
    second.check()
    first.release()
    assert second.take()
    second.release()


@posix
@pytest.mark.parametrize("name", ["out", "new/out"])
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_dry_run_tells_that_a_folder_cannot_be_locked(
    batch: Batch, monkeypatch: pytest.MonkeyPatch, number: int, name: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    batch.shell.is_first_row = False
    (batch.shell.folder / "out").mkdir()
    batch.rows("a")
    plan = batch.shell.call("--input", str(batch.input), "--output-dir", name, "--dry-run").json
    (problem,) = plan["problems"]
    assert (plan["ok"], problem["code"]) == (False, "disk")
    assert "this folder cannot be locked" in problem["message"]
    assert os.listdir(batch.shell.folder / "out") == []


@posix
def test_those_who_only_look_do_not_see_each_other(tmp_path: Path) -> None:
    import fcntl

    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    assert not FolderLock(tmp_path).is_taken()
    os.close(descriptor)


def test_the_lock_of_a_dead_process_holds_nobody_up(batch: Batch) -> None:
    batch.service.play(GENERATE, SILENT)
    batch.rows("a")
    kill_with(batch, 1)
    began = time.monotonic()
    assert batch.run().code == 1
    assert time.monotonic() - began < 2


# ---------------------------------------------------------------------------------------------------------------------
# The database, for whoever opens it
# ---------------------------------------------------------------------------------------------------------------------


@posix
def test_the_database_is_private_journaled_and_versioned(batch: Batch) -> None:
    gate = Gate()
    batch.service.play(GENERATE, gate)
    batch.rows("a")
    mask = os.umask(0)
    try:
        process = batch.start()
    finally:
        os.umask(mask)
    batch.service.wait_until(lambda: gate.arrived)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in batch.out.glob("batch.sqlite3*")}
    assert modes["batch.sqlite3"] == 0o600
    assert set(modes.values()) == {0o600}, modes
    assert batch.query("PRAGMA journal_mode") == [("wal",)]
    assert batch.query("PRAGMA user_version")[0][0] > 0
    gate.open()
    assert batch.finish(process).code == 0
    assert {path.name for path in batch.out.glob("batch.sqlite3*")} == {"batch.sqlite3"}
    evidence = list(batch.out.glob("evidence/*/*.json"))
    assert [stat.S_IMODE(path.stat().st_mode) for path in evidence] == [0o600]


def test_the_database_explains_itself(batch: Batch) -> None:
    batch.service.play(GENERATE, by_prompt({"b": BLOCKED}))
    batch.rows("a", "b")
    assert batch.run().code == 1
    about = " ".join(text for row in batch.query("SELECT * FROM about") for text in map(str, row))
    for state in ("pending", "submitting", "submitted", "generated", "saved", "failed", "unknown"):
        assert state in about
    with batch.database() as database:
        database.row_factory = sqlite3.Row
        progress = {row["state"]: row["pictures"] for row in database.execute("SELECT * FROM progress")}
    assert progress == {"saved": 1, "failed": 1}
    assert len(batch.query("SELECT * FROM pictures")) == 2
    assert batch.query("PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize(
    "content", [b"", b"not a database at all, but long enough to look at" * 50], ids=["empty", "text"]
)
def test_a_file_that_is_no_database_of_a_batch_is_left_alone(batch: Batch, content: bytes) -> None:
    batch.out.mkdir()
    path = batch.out / "batch.sqlite3"
    path.write_bytes(content)
    batch.rows("a")
    assert batch.run().code == 2
    assert batch.call("--status", str(batch.out)).code == 2
    assert batch.call("--gallery-only", str(batch.out)).code == 2
    assert path.read_bytes() == content
    assert not batch.service.connections


def test_a_database_of_a_later_version_is_left_alone(batch: Batch) -> None:
    batch.rows("a")
    assert batch.run().code == 0
    with sqlite3.connect(batch.out / "batch.sqlite3") as database:
        database.execute("PRAGMA user_version = 999")
    database.close()
    batch.rows("a", "b")
    assert batch.run().code == 2
    assert batch.sent == ["a"]


# ---------------------------------------------------------------------------------------------------------------------
# Evidence
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(batch: Batch) -> Batch:
    """A finished run with a saved, a failed and an unknown picture."""
    batch.service.play(GENERATE, by_prompt({"bad": BLOCKED, "lost": LOST}))
    batch.rows({"prompt": "good", "seed": 11, "output": "good.png"}, "bad", "lost")
    assert batch.run().code == 1
    return batch


def test_evidence_is_that_of_the_single_script_and_spread_over_folders(mixed: Batch) -> None:
    schema = json.loads(mixed.single("--schema", "evidence").stdout)
    paths = sorted(str(path.relative_to(mixed.out)) for path in mixed.out.glob("evidence/**/*.json"))
    assert paths == [f"evidence/0000/00000{number}.json" for number in range(3)]
    evidence = mixed.evidence()
    for content in evidence.values():
        jsonschema.validate(content, schema)
    assert {prompt: content["status"] for prompt, content in evidence.items()} == {
        "good": "saved",
        "bad": "failed",
        "lost": "unknown",
    }
    assert evidence["good"]["request"]["seed"] == 11
    assert evidence["good"]["image"]["path"] == str(mixed.out / "good.png")
    assert evidence["bad"]["error"]["code"] and evidence["lost"]["error"]["code"]
    assert all(result["evidence_path"].endswith(path) for result, path in zip(mixed.results(), paths, strict=True))


def test_evidence_of_a_batch_is_recovered_by_the_single_script(mixed: Batch) -> None:
    paths = {result["prompt"]: result["evidence_path"] for result in mixed.results()}
    sent = len(mixed.sent)
    good = mixed.single("--recover", paths["good"], "--print-response")
    assert good.code == 0, good.stdout
    assert good.json["image_path"] == str(mixed.out / "good.png")
    (mixed.out / "good.png").unlink()
    assert mixed.single("--recover", paths["good"], "--print-response").code == 0
    assert (mixed.out / "good.png").read_bytes() == SMALL_PNG
    assert mixed.single("--recover", paths["bad"], "--print-response").error["exit_code"] == 2
    assert mixed.single("--recover", paths["lost"], "--print-response").error["exit_code"] == 7
    assert len(mixed.sent) == sent


def test_evidence_of_a_batch_is_replayed_by_the_single_script(mixed: Batch) -> None:
    path = next(result["evidence_path"] for result in mixed.results() if result["prompt"] == "good")
    again = mixed.single("--replay", path, "--print-response")
    assert again.code == 0, again.stdout
    assert (again.json["prompt"], again.json["seed"], again.json["size"]) == ("good", 11, SMALL)
    assert again.json["image_path"] != str(mixed.out / "good.png")
    first, *_, last = mixed.service.posts
    assert json.loads(last.body) in [json.loads(request.body) for request in mixed.service.posts[:-1]]
    assert first.header("authorization") == last.header("authorization")


def test_what_the_single_script_recovers_the_batch_finds_saved(batch: Batch) -> None:
    """The advice for a picture that is paid and not saved must not make the batch stumble later."""
    batch.service.play(PICTURE, oss_error(404, "NoSuchKey", "not yet"))
    batch.rows("a")
    result = batch.run()
    assert result.code != 0
    if batch.states() != {"a": "generated"}:
        pytest.skip("settled otherwise")
    batch.service.play(PICTURE, file(SMALL_PNG))
    for path in batch.out.glob("evidence/*/*.json"):
        assert batch.single("--recover", str(path), "--print-response").code == 0
    result = batch.run()
    assert result.code == 0, result.stdout
    assert batch.sent == ["a"]


def test_unknown_of_a_killed_run_has_evidence_too(batch: Batch) -> None:
    batch.service.play(GENERATE, SILENT)
    batch.rows("a")
    kill_with(batch, 1)
    assert batch.run().code == 1
    evidence = batch.evidence()["a"]
    jsonschema.validate(evidence, json.loads(batch.single("--schema", "evidence").stdout))
    assert evidence["status"] == "unknown"


def test_images_and_evidence_of_many_rows_are_spread_over_folders(batch: Batch) -> None:
    batch.prompts(2100)
    assert batch.run("--max-cost", "0.001", "--no-gallery").code == 1
    outputs = [entry["output"] for entry in batch.results()]
    assert len(set(outputs)) == 2100
    assert max(Counter(os.path.dirname(output) for output in outputs).values()) <= 1000


def test_a_jpeg_is_made_of_the_services_png_where_the_row_wants_one(batch: Batch) -> None:
    batch.rows({"prompt": "a", "output": "a.jpg"}, {"prompt": "b", "output": "b.webp"})
    assert batch.run().code == 0
    assert (batch.out / "a.jpg").read_bytes()[:3] == b"\xff\xd8\xff"
    assert (batch.out / "b.webp").read_bytes()[8:12] == b"WEBP"
    assert batch.evidence()["a"]["image"]["format"] == "JPEG"


def test_a_picture_of_another_size_is_saved_with_a_warning(batch: Batch) -> None:
    batch.service.play(PICTURE, file(drawn("PNG", 640, 512)))
    batch.rows("a")
    assert batch.run().code == 0
    entry = batch.picture("a")
    assert (entry["width"], entry["height"]) == (640, 512)
    assert entry["warnings"]


# ---------------------------------------------------------------------------------------------------------------------
# Disk
# ---------------------------------------------------------------------------------------------------------------------


@posix
def test_a_disk_that_fails_after_paying_loses_no_picture(batch: Batch) -> None:
    """No file may grow beyond 512 KiB: the database can, the picture cannot."""
    import resource

    size = 512 * 1024
    batch.service.play(PICTURE, file(noise_png()))
    batch.rows(*({"prompt": name, "size": "1024*1024"} for name in "abc"))
    process = subprocess.Popen(
        batch.shell.command(*batch.arguments("--concurrency", "1")),
        cwd=batch.shell.folder,
        env=batch.shell.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )
    batch.shell.keep(process)
    result = batch.finish(process)
    assert result.code == 9, result.stdout
    paid = len(batch.sent)
    assert result.json["generated"] == paid and result.json["pending"] == 3 - paid
    result = batch.run()
    assert result.code == 0, result.stdout
    assert sorted(batch.sent) == ["a", "b", "c"]


@posix
@pytest.mark.parametrize(
    ("folder", "code"),
    [
        pytest.param("/proc/batch", 9, marks=pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")),
        ("/dev/null/batch", 2),
        ("rows.jsonl/batch", 2),
    ],
)
def test_a_folder_that_cannot_be_made_stops_before_paying(batch: Batch, folder: str, code: int) -> None:
    batch.rows("a")
    result = batch.run("--output-dir", folder)
    assert result.code == code, result.stdout
    assert batch.sent == []


@pytest.mark.parametrize("victim", ["results.jsonl", "index.html", "thumbs"])
def test_what_stands_in_the_way_of_a_report_costs_no_picture(batch: Batch, victim: str) -> None:
    batch.out.mkdir()
    if victim == "thumbs":
        (batch.out / victim).write_text("in the way", encoding="utf-8")
    else:
        (batch.out / victim).mkdir()
    batch.rows("a")
    result = batch.run()
    assert batch.sent == ["a"]
    assert batch.stored_states() == {"a": "saved"}
    assert_counts(result, saved=1)


def test_the_next_command_of_a_failure_works_in_a_shell(batch: Batch) -> None:
    """Where an error names a command, it is one; here in a folder with a name that a shell would read."""
    batch.out = batch.shell.folder / "it's $(touch pwned) & more"
    batch.service.play(PICTURE, oss_error(404, "NoSuchKey", "not yet"))
    batch.rows("a")
    assert batch.run().code != 0
    batch.service.play(PICTURE, file(SMALL_PNG))
    commands = [e["error"]["next_command"] for e in batch.results() if "next_command" in e.get("error", {})]
    for command in commands:
        subprocess.run(
            ["sh", "-c", command],
            cwd=batch.shell.folder,
            env=batch.shell.environment(),
            check=True,
            capture_output=True,
            timeout=20,
        )
        assert shlex.split(command)
    assert batch.run().code == 0
    assert not (batch.shell.folder / "pwned").exists()
    assert batch.sent == ["a"]


@posix
def test_a_signal_in_the_middle_of_the_start_leaves_a_folder_that_works(batch: Batch) -> None:
    batch.prompts(3)
    for moment in range(8):
        process = batch.start()
        time.sleep(0.02 + 0.012 * moment)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=10)
    result = batch.run()
    assert result.code == (1 if result.json["unknown"] else 0), result.stdout
    assert result.json["saved"] + result.json["unknown"] == 3
    assert max(Counter(batch.sent).values(), default=0) <= 1  # none may have got as far as the service
    assert TEST_KEY not in result.stdout


@pytest.mark.parametrize(
    "broken", [b"CREATE \xffABLE runs", b"CREATE TABLE \xff\xfe\xfds", b"C\x80\x80\x80\x80E TABLE runs"]
)
def test_a_schema_that_is_no_text_is_no_fault_of_the_tool(batch: Batch, broken: bytes) -> None:
    """SQLite repeats what it cannot read of it, and Python cannot read that."""
    batch.out.mkdir()
    path = batch.out / "batch.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(f"{DATABASE_SCHEMA}; PRAGMA user_version = {DATABASE_VERSION}")
    path.write_bytes(path.read_bytes().replace(b"CREATE TABLE runs", broken))
    batch.rows("a fox")
    for result in (batch.call("--status", str(batch.out)), batch.run("--dry-run"), batch.run()):
        assert (result.code, result.error["code"]) == (2, "batch_unreadable")
    assert not batch.service.connections
