"""What version 0.4.0 left on disk is read, recovered and finished, and nothing of it is paid for twice.

Each state is one file in tests/fixtures/v040, made by that version itself. Only the command line is used here, and
all of it holds for 0.4.0 too.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from batch_helpers import BATCH, PRICE
from conftest import Result, Shell
from fault_server import FaultServer
from restored import Restored, fixture_names, sha256

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the fixtures hold POSIX paths")


def recover(restored: Restored, *more: str) -> Result:
    return restored.shell.run("--recover", str(restored.evidence_path), "--print-response", *more)


def assert_saved(restored: Restored, response: dict[str, Any]) -> None:
    """The picture that was paid for is in its file, and the evidence says so."""
    evidence = restored.evidence
    content = Path(response["image_path"]).read_bytes()
    assert evidence["status"] == "saved"
    assert evidence["image"]["path"] == response["image_path"] == evidence["output"]
    assert evidence["image"]["sha256"] == sha256(content)
    assert restored.picture == content or evidence["image"]["source_sha256"] == sha256(restored.picture)
    with Image.open(response["image_path"]) as image:
        image.load()
        assert image.size == (response["width"], response["height"])
    assert "error" not in evidence
    assert not [name for name in restored.shell.files() if name.endswith((".part", ".picture"))]


# One picture ---------------------------------------------------------------------------------------------------------

# Of each evidence file: exit code and error of a recovery while its link is alive, and when it is dead.
SAVED = (0, "")
NOTHING = (2, "nothing_to_recover")
UNKNOWN = (7, "outcome_unknown")
EXPIRED = (8, "link_expired")
RECOVERIES = {
    "dashscope-failed-balance": (NOTHING, NOTHING),
    "dashscope-failed-blocked": (NOTHING, NOTHING),
    "dashscope-generated": (SAVED, EXPIRED),
    "dashscope-generated-expired": (SAVED, EXPIRED),
    "dashscope-generated-half-placed": (SAVED, EXPIRED),
    "dashscope-generated-placed": (SAVED, EXPIRED),
    "dashscope-generated-refused": (SAVED, EXPIRED),
    "dashscope-saved": (SAVED, SAVED),
    "dashscope-saved-converted": (SAVED, SAVED),
    "dashscope-submitting": (UNKNOWN, UNKNOWN),
    "dashscope-submitting-again": (UNKNOWN, UNKNOWN),
    "dashscope-submitting-refused": (NOTHING, NOTHING),
    "dashscope-unknown": (UNKNOWN, UNKNOWN),
    "dashscope-unknown-no-image": (UNKNOWN, UNKNOWN),
    "openai-failed": (NOTHING, NOTHING),
    "openai-generated-held": (SAVED, SAVED),
    "openai-generated-link": (SAVED, EXPIRED),
    "openai-saved": (SAVED, SAVED),
    "openai-saved-held": (SAVED, SAVED),
    "openai-submitting": (UNKNOWN, UNKNOWN),
    "openai-submitting-held": (SAVED, SAVED),
    "openai-unknown": (UNKNOWN, UNKNOWN),
    "zimageturbo-failed": (NOTHING, NOTHING),
    "zimageturbo-generated": (SAVED, SAVED),  # the task names a new link
    "zimageturbo-generated-expired": (SAVED, SAVED),
    "zimageturbo-saved": (SAVED, SAVED),
    "zimageturbo-submitted": (SAVED, SAVED),
    "zimageturbo-submitted-given-up": (SAVED, SAVED),
    "zimageturbo-submitting": (UNKNOWN, UNKNOWN),
    "zimageturbo-unknown": (UNKNOWN, UNKNOWN),
    "zimageturbo-unknown-lost": (SAVED, SAVED),
}
HAVE_A_LINK = sorted(name for name, (alive, dead) in RECOVERIES.items() if alive != dead)


def test_every_fixture_of_one_picture_is_tested() -> None:
    assert sorted(RECOVERIES) == [name for name in fixture_names("") if not name.startswith("batch-")]


@pytest.mark.smoke
@pytest.mark.parametrize("name", RECOVERIES)
def test_a_recovery_ends_as_the_evidence_tells_and_pays_nothing(shell: Shell, service: FaultServer, name: str) -> None:
    restored = Restored(shell, service, name)
    code, error = RECOVERIES[name][0]
    before = restored.evidence
    result = recover(restored)
    assert (result.code, restored.paid) == (code, [])
    if error:
        assert result.error["code"] == error
        assert "--replay" not in result.error.get("next_command", "")
        assert restored.evidence == before
        assert not service.requests
        return
    response = result.json
    assert response["evidence_path"] == str(restored.evidence_path)
    assert response["prompt"] == "a red fox"
    assert response.get("seed") == before["request"].get("seed")
    if before["status"] == "saved":
        assert not service.requests
    else:
        assert_saved(restored, response)


@pytest.mark.parametrize("name", HAVE_A_LINK)
def test_a_recovery_by_a_dead_link_says_so_and_pays_nothing(shell: Shell, service: FaultServer, name: str) -> None:
    restored = Restored(shell, service, name, links="dead")
    for _ in range(2):
        result = recover(restored)
        assert (result.code, result.error["code"]) == EXPIRED
        assert result.error["billed"] == "yes"
        assert restored.evidence["status"] == "generated"
    assert restored.paid == []


@pytest.mark.parametrize("name", ["zimageturbo-generated-expired", "zimageturbo-saved"])
def test_a_task_names_a_new_link_for_one_that_is_dead(shell: Shell, service: FaultServer, name: str) -> None:
    restored = Restored(shell, service, name, links="dead")
    for path in shell.folder.rglob("*.png"):
        path.unlink()
    assert_saved(restored, recover(restored).json)
    assert restored.paid == []


def test_a_task_that_the_service_does_not_know_stays_open_and_pays_nothing(shell: Shell, service: FaultServer) -> None:
    restored = Restored(shell, service, "zimageturbo-unknown-lost")
    restored.tasks.clear()
    result = recover(restored, "--timeout", "2")
    assert (result.code, restored.paid) == (7, [])
    assert result.error["billed"] == "unknown"


@pytest.mark.parametrize("name", ["dashscope-generated", "openai-generated-held", "zimageturbo-generated"])
def test_a_recovered_picture_is_recovered_no_second_time(shell: Shell, service: FaultServer, name: str) -> None:
    restored = Restored(shell, service, name)
    first = recover(restored).json
    asked = len(service.requests)
    assert recover(restored).json == first
    assert (len(service.requests), restored.paid) == (asked, [])


@pytest.mark.parametrize("links", ["alive", "dead"])
@pytest.mark.parametrize("name", ["dashscope-saved", "dashscope-saved-converted", "openai-saved"])
def test_a_saved_picture_that_vanished_is_fetched_again_while_its_link_lives(
    shell: Shell, service: FaultServer, name: str, links: Any
) -> None:
    restored = Restored(shell, service, name, links=links)
    Path(restored.evidence["image"]["path"]).unlink()
    result = recover(restored)
    if links == "alive" and restored.pictures:
        assert_saved(restored, result.json)
    else:
        assert (result.code, result.error["code"]) == EXPIRED
    assert restored.paid == []


def test_a_saved_picture_whose_bytes_are_still_held_is_fetched_from_them(shell: Shell, service: FaultServer) -> None:
    restored = Restored(shell, service, "openai-saved-held")
    Path(restored.evidence["image"]["path"]).unlink()
    content = restored.picture
    assert Path(recover(restored).json["image_path"]).read_bytes() == content
    assert not service.requests


@pytest.mark.parametrize("name", ["dashscope-saved", "openai-saved", "zimageturbo-saved", "dashscope-unknown"])
def test_a_replay_asks_for_the_same_picture_and_pays_once(shell: Shell, service: FaultServer, name: str) -> None:
    restored = Restored(shell, service, name)
    path, before = restored.evidence_path, restored.evidence
    response = shell.run("--replay", str(path), "--print-response").json
    assert restored.paid == ["a red fox"]
    (sent,) = service.posts
    assert json.loads(sent.body) == before["payload"]
    assert response.get("seed") == before["request"].get("seed")
    assert json.loads(path.read_text(encoding="utf-8")) == before
    assert response["image_path"] != before["output"]
    assert response["evidence_path"] != str(path)


# Batches -------------------------------------------------------------------------------------------------------------


class Folder(NamedTuple):
    """What a folder of 0.4.0 is, and what the same command makes of it."""

    before: dict[str, int]  # states, as --status counts them
    paid_before: int  # prices that were, or may have been, billed
    pays: tuple[str, ...]  # prompts that the same command pays for
    after: dict[str, int]
    price: float = PRICE
    rewritten: int = 0  # of `pays`: those cost the price twice

    @property
    def spent(self) -> float:
        return self.price * self.paid_before

    @property
    def costs(self) -> float:
        return self.price * (len(self.pays) + self.rewritten)


def pictures(*numbers: int) -> tuple[str, ...]:
    return tuple(f"picture {number}" for number in numbers)


CHANGED = ("one, changed", "two, changed")
FOLDERS = {
    "batch-changed": Folder({"saved": 5}, 5, (), {"saved": 5}),
    "batch-changed-half-moved": Folder({"saved": 3, "pending": 2}, 3, CHANGED, {"saved": 5}),
    "batch-changed-not-moved": Folder({"saved": 3, "pending": 2}, 3, CHANGED, {"saved": 5}),
    "batch-finished": Folder({"saved": 3}, 3, (), {"saved": 3}),
    "batch-half-placed": Folder({"saved": 1, "generated": 1, "pending": 2}, 2, pictures(2, 3), {"saved": 4}),
    "batch-half-run": Folder(
        {"saved": 2, "generated": 2, "unknown": 1, "pending": 3}, 5, pictures(5, 6, 7), {"saved": 7, "unknown": 1}
    ),
    "batch-held": Folder({"generated": 2, "pending": 1}, 2, pictures(2), {"saved": 3}, price=0.0),
    "batch-named": Folder({"saved": 3, "pending": 3}, 4, ("an owl", "a hare", "a hare"), {"saved": 6}, rewritten=1),
    "batch-no-results": Folder({"saved": 2}, 2, (), {"saved": 2}),
    "batch-tasks": Folder(
        {"unknown": 2, "submitted": 2, "pending": 1},
        4,
        pictures(4),
        {"saved": 4, "unknown": 1},
        price=0.02,
    ),
    "batch-unsettled": Folder(
        {"saved": 1, "failed": 2, "unknown": 2, "generated": 1}, 5, (), {"saved": 2, "failed": 2, "unknown": 2}
    ),
}
STATES = ("saved", "failed", "unknown", "generated", "pending", "submitted", "in_flight")


def test_every_fixture_of_a_batch_is_tested() -> None:
    assert sorted(FOLDERS) == fixture_names("batch-")


class RestoredBatch(Restored):
    """A folder of 0.4.0, and the batch run on it by the command of then."""

    def __init__(self, shell: Shell, service: FaultServer, name: str, **more: Any) -> None:
        super().__init__(shell, service, name, **more)
        shell.script = BATCH
        self.out = shell.folder / "out"

    def run(self, *more: str) -> Result:
        result = self.shell.run(*self.command, *more)
        assert "Traceback" not in result.stderr, result.stderr
        return result

    def results(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "results.jsonl").read_text(encoding="utf-8").splitlines()]

    def contents(self) -> dict[str, bytes]:
        """What is in the files, without those in which SQLite notes who reads."""
        kept = (name for name in self.shell.files() if not name.endswith(("-wal", "-shm")))
        return {name: (self.shell.folder / name).read_bytes() for name in kept}


def states_in(said: dict[str, Any]) -> dict[str, int]:
    return {name: said[name] for name in STATES if said.get(name)}


def assert_results_are_true(restored: RestoredBatch, states: dict[str, int]) -> None:
    """A line a picture; what is called saved is there, each in its own file, with evidence that says the same."""
    results = restored.results()
    assert dict(Counter(entry["state"] for entry in results)) == states
    saved = [entry for entry in results if entry["state"] == "saved"]
    for entry in saved:
        path = restored.out / entry["output"]
        assert str(path) == entry["image_path"]
        assert sha256(path.read_bytes()) == entry["sha256"]
        evidence = json.loads(Path(entry["evidence_path"]).read_text(encoding="utf-8"))
        assert (evidence["status"], evidence["request"]["prompt"]) == ("saved", entry["prompt"])
        assert (evidence["image"]["path"], evidence["image"]["sha256"]) == (str(path), entry["sha256"])
    assert len({entry["sha256"] for entry in saved}) == len(saved)
    assert len({entry["number"] for entry in results}) == len(results)
    images = {path for path in restored.out.rglob("*") if path.suffix in (".png", ".webp", ".jpg")}
    thumbs = {path for path in images if path.is_relative_to(restored.out / "thumbs")}
    assert images - thumbs == {restored.out / entry["output"] for entry in saved}
    assert not [name for name in restored.shell.files() if name.endswith((".part", ".picture"))]


@pytest.mark.parametrize("name", FOLDERS)
def test_the_same_command_finishes_the_folder_and_pays_only_what_was_not_paid(
    shell: Shell, service: FaultServer, name: str
) -> None:
    folder = FOLDERS[name]
    restored = RestoredBatch(shell, service, name)
    saved_before = {}
    if (restored.out / "results.jsonl").exists() and "changed" not in name:
        saved_before = {entry["number"]: entry for entry in restored.results() if entry["state"] == "saved"}
    result = restored.run()
    assert sorted(restored.paid) == sorted(folder.pays)
    assert states_in(result.json) == folder.after
    assert result.code == (0 if set(folder.after) == {"saved"} else 1)
    assert result.json["this_run"]["estimated_cost"] == pytest.approx(folder.costs, abs=1e-5)
    assert result.json["estimated_cost"] == pytest.approx(folder.spent + folder.costs, abs=1e-5)
    assert_results_are_true(restored, folder.after)
    after = {entry["number"]: entry for entry in restored.results()}
    for number, entry in saved_before.items():
        assert after[number] == entry | {"endpoint": after[number]["endpoint"]}  # which 0.4.0 did not tell
    again = restored.run()
    assert (again.code, len(restored.paid)) == (result.code, len(folder.pays))
    assert states_in(again.json) == folder.after


@pytest.mark.parametrize("name", FOLDERS)
def test_looking_at_a_folder_changes_nothing_and_tells_the_truth(shell: Shell, service: FaultServer, name: str) -> None:
    folder = FOLDERS[name]
    restored = RestoredBatch(shell, service, name)
    before = restored.contents()
    status = shell.run("--status", "out")
    assert status.code == 0, status.stderr
    assert states_in(status.json) == folder.before
    assert status.json["running"] is False
    assert status.json["estimated_cost"] == pytest.approx(folder.spent, abs=1e-5)
    plan = restored.run("--dry-run").json
    assert (plan["ok"], plan["problems"], plan["to_make"]) == (True, [], len(folder.pays))
    assert plan["estimated_cost"] == pytest.approx(folder.costs, abs=1e-5)
    assert plan["spent_before"] == pytest.approx(folder.spent, abs=1e-5)
    assert restored.contents() == before
    gallery = shell.run("--gallery-only", "out")
    assert gallery.code == 0, gallery.stderr
    assert states_in(gallery.json) == folder.before
    assert (restored.out / "index.html").is_file()
    assert {name: content for name, content in restored.contents().items() if name in before} == before
    assert not service.requests


@pytest.mark.parametrize(("name", "failed"), [("batch-half-run", 2), ("batch-half-placed", 1), ("batch-unsettled", 3)])
def test_paid_pictures_whose_links_are_dead_are_failed_and_not_paid_for_again(
    shell: Shell, service: FaultServer, name: str, failed: int
) -> None:
    restored = RestoredBatch(shell, service, name, links="dead")
    result = restored.run()
    assert sorted(restored.paid) == sorted(FOLDERS[name].pays)
    assert result.json["failed"] == failed
    assert result.json["generated"] == 0
    errors = [entry["error"]["code"] for entry in restored.results() if entry["state"] == "failed"]
    assert errors.count("link_expired") == FOLDERS[name].before["generated"] + (name == "batch-unsettled")


@pytest.mark.parametrize(
    ("option", "paid", "after"),
    [
        ("--retry-failed", pictures(1, 4), {"saved": 4, "unknown": 2}),
        ("--retry-unknown", pictures(2, 3), {"saved": 4, "failed": 2}),
    ],
)
def test_failed_and_unknown_rows_are_paid_for_again_only_when_asked(
    shell: Shell, service: FaultServer, option: str, paid: tuple[str, ...], after: dict[str, int]
) -> None:
    restored = RestoredBatch(shell, service, "batch-unsettled")
    result = restored.run(option)
    assert sorted(restored.paid) == list(paid)
    assert states_in(result.json) == after
    assert_results_are_true(restored, after)


def test_the_row_that_was_out_at_the_kill_is_paid_for_again_only_when_asked(shell: Shell, service: FaultServer) -> None:
    restored = RestoredBatch(shell, service, "batch-half-run")
    result = restored.run("--retry-unknown")
    assert sorted(restored.paid) == sorted(pictures(4, 5, 6, 7))
    assert states_in(result.json) == {"saved": 8}
    assert result.code == 0


def test_what_was_spent_counts_against_the_ceiling(shell: Shell, service: FaultServer) -> None:
    restored = RestoredBatch(shell, service, "batch-half-run")
    restored.run("--max-cost", f"{6 * PRICE:.5f}")
    assert restored.paid == ["picture 5"]


def test_a_picture_recovered_by_its_evidence_is_taken_over_by_the_batch(shell: Shell, service: FaultServer) -> None:
    restored = RestoredBatch(shell, service, "batch-unsettled")
    single = Shell(shell.folder, shell.home, shell.env)
    path = restored.out / "evidence" / "0000" / "000005.json"
    response = single.run("--recover", str(path), "--print-response").json
    downloads = len(service.downloads)
    result = restored.run()
    assert states_in(result.json) == FOLDERS["batch-unsettled"].after
    assert (len(service.downloads), restored.paid) == (downloads, [])
    (entry,) = (entry for entry in restored.results() if entry["number"] == 5)
    assert entry["image_path"] == response["image_path"]


def test_a_saved_file_that_vanished_is_downloaded_again_and_not_paid_for(shell: Shell, service: FaultServer) -> None:
    restored = RestoredBatch(shell, service, "batch-finished")
    (restored.out / restored.results()[1]["output"]).unlink()
    result = restored.run()
    assert (result.code, restored.paid, len(service.downloads)) == (0, [], 1)
    assert_results_are_true(restored, {"saved": 3})


@pytest.mark.parametrize("name", ["batch-changed-not-moved", "batch-changed-half-moved"])
def test_changed_rows_keep_the_pictures_that_were_paid_for_before(
    shell: Shell, service: FaultServer, name: str
) -> None:
    restored = RestoredBatch(shell, service, name)
    evidence = json.loads((restored.out / "evidence/0000/000001.json").read_text(encoding="utf-8"))
    restored.run()
    results = {entry["output"]: entry for entry in restored.results()}
    assert results["cats/two-before-000001.png"]["sha256"] == evidence["image"]["sha256"]
    assert results["cats/two-before-000001.png"]["in_input"] is False
    assert results["images/000000-one-before-000000.png"]["prompt"] == "one"
    assert results["cats/two.png"]["prompt"] == "two, changed"


def test_a_row_that_is_new_is_the_only_one_that_is_paid_for(shell: Shell, service: FaultServer) -> None:
    restored = RestoredBatch(shell, service, "batch-finished")
    (shell.folder / "prompts.txt").write_text("a buoy\na lighthouse\na pier\na harbour\n", encoding="utf-8")
    assert restored.run().code == 0
    assert restored.paid == ["a buoy"]


def test_a_row_that_is_changed_is_not_made_again_unasked(shell: Shell, service: FaultServer) -> None:
    restored = RestoredBatch(shell, service, "batch-named")
    table = shell.folder / "rows.csv"
    table.write_text(table.read_text(encoding="utf-8").replace("a fox, red", "a fox, grey"), encoding="utf-8")
    result = restored.run()
    assert (result.code, result.json["error"]["code"]) == (2, "changed_rows")
    assert restored.paid == []
