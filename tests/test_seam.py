"""Where evidence, row and file meet: whatever happens there, what is paid stays paid, once, and is told truly."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from batch_helpers import PRICE, SMALL, SMALL_PNG, Batch, Gate, assert_counts, by_prompt, prompt_of
from conftest import Result, Shell
from fault_server import GENERATE, PICTURE, Answer, Behaviour, FaultServer, Received, error, file, good, html, png

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals, links and mounts of POSIX")

INJECTION = Path(__file__).resolve().parent / "every_write"
RUN = ("--prompt", "a fox", "--size", SMALL, "--output", "out.png", "--print-response")
NO_WAIT = (("Retry-After", "0"),)


@pytest.fixture
def batch(shell: Shell, service: FaultServer) -> Batch:
    return Batch(shell, service)


def own_links(service: FaultServer) -> Callable[[Received], Answer]:
    """Every prompt gets a link of its own."""

    def answer(request: Received) -> Answer:
        link = link_of(prompt_of(request))
        service.play(link, file(SMALL_PNG))
        made = good(link)(request)
        assert isinstance(made, Answer)
        return made

    return answer


def link_of(prompt: str) -> str:
    return f"/img/{prompt.replace(' ', '-')}.png"


class Disk:
    """A disk that the script's processes find failing, below a folder, from `break_down` to `mend`."""

    def __init__(self, shell: Shell, below: Path) -> None:
        self._flag = shell.home / "disk-fails"
        shell.env["PYTHONPATH"] = str(INJECTION)
        shell.env["ZIMAGE_TEST_WRITE"] = f"fail-while:{self._flag}"
        shell.env["ZIMAGE_TEST_WRITE_BELOW"] = str(below)

    def break_down(self) -> None:
        self._flag.touch()

    def mend(self) -> None:
        self._flag.unlink(missing_ok=True)


def saved_in_the_end(batch: Batch, result: Result, *prompts: str) -> None:
    """All is saved, each paid once, and the same command says so again, alone."""
    assert result.code == 0, (result.stdout, result.stderr)
    assert_counts(result, saved=len(prompts))
    assert Counter(batch.sent) == dict.fromkeys(prompts, 1)
    assert result.json["estimated_cost"] == pytest.approx(len(prompts) * PRICE)
    paths = [Path(entry["image_path"]) for entry in batch.results()]
    assert len(set(paths)) == len(prompts) and all(path.is_file() for path in paths)
    again = batch.run()
    assert again.code == 0 and again.json["this_run"]["total"] == 0
    assert Counter(batch.sent) == dict.fromkeys(prompts, 1)


# ---------------------------------------------------------------------------------------------------------------------
# A1: another program holds the database
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [7, 13], ids=["for a while", "longer than anybody waits"])
@pytest.mark.parametrize("moment", ["the picture is fetched", "the link arrives", "one is saved and one is out"])
def test_what_is_paid_stays_paid_while_another_program_holds_the_database(
    batch: Batch, moment: str, seconds: float
) -> None:
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with contextlib.closing(sqlite3.connect(batch.out / "batch.sqlite3", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            held.set()
            over.wait(seconds)
            other.execute("ROLLBACK")

    holder = threading.Thread(target=hold)

    def take_it() -> None:
        if not held.is_set():
            holder.start()
            assert held.wait(5)

    def generate(request: Received) -> Answer:
        if moment == "the link arrives" or (moment.startswith("one is saved") and prompt_of(request) == "b"):
            take_it()
        made = good()(request)
        assert isinstance(made, Answer)
        return made

    def picture(_: Received) -> Answer:
        if moment == "the picture is fetched":
            take_it()
        return file(SMALL_PNG, delay_s=0.1)

    batch.service.play(GENERATE, generate)
    batch.service.play(PICTURE, picture)
    prompts = ("a", "b") if moment.startswith("one is saved") else ("a",)
    batch.rows(*prompts)
    first = batch.run("--concurrency", "1", timeout=60)
    over.set()
    holder.join(10)
    assert first.code in (0, 1, 9), first.stdout  # whichever write waits for the other program when it lets go
    paid = len(batch.sent)
    assert first.json["estimated_cost"] >= paid * PRICE - 1e-9
    assert first.json["pending"] <= len(prompts) - paid and first.json["failed"] == 0, first.stdout
    assert first.code == 0 or first.json["error"]["billed"] != "no" or first.json["saved"] == paid
    stored = batch.stored_states()
    assert all(stored[prompt] not in ("pending", "failed") for prompt in batch.sent), stored
    second = batch.run()
    assert "move these files away" not in second.stdout + second.stderr
    saved_in_the_end(batch, second, *prompts)


# ---------------------------------------------------------------------------------------------------------------------
# A2: downloads left from an earlier run
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left_by", ["downloads that fail", "a kill"])
def test_downloads_left_from_an_earlier_run_are_saved_once(batch: Batch, left_by: str) -> None:
    """Also while new ones join them, and lie in the database a moment before they are reported."""
    service = batch.service
    left, new = [f"left {number}" for number in range(20)], [f"new {number}" for number in range(60)]
    batch.rows(*left)
    service.play(GENERATE, good("/img/not-now.png"))
    service.play("/img/not-now.png", html(503) if left_by == "downloads that fail" else Answer(delay_s=60))
    if left_by == "a kill":
        process = batch.start()
        service.wait_until(lambda: list(batch.stored_states().values()).count("generated") == len(left))
        batch.kill(process)
    else:
        assert batch.run("--time-limit", "4").code != 0
    due = [prompt for prompt, state in batch.stored_states().items() if state == "generated"]
    assert len(due) >= 10
    service.play("/img/not-now.png", file(SMALL_PNG, delay_s=0.02))
    before = Counter(request.path for request in service.downloads)
    service.play(GENERATE, own_links(service))
    batch.rows(*left, *new)
    batch.shell.env |= {"PYTHONPATH": str(INJECTION), "ZIMAGE_TEST_WRITE": "slow-commit:50"}
    result = batch.run()
    assert "exists" not in result.stderr, result.stderr
    saved_in_the_end(batch, result, *left, *new)
    after = Counter(request.path for request in service.downloads)
    assert after["/img/not-now.png"] - before["/img/not-now.png"] == len(due)
    assert {prompt: after[link_of(prompt)] for prompt in new} == dict.fromkeys(new, 1)
    assert len(list((batch.out / "images").iterdir())) == len(left) + len(new)


# ---------------------------------------------------------------------------------------------------------------------
# A3: no attempt leaves before it is on disk
# ---------------------------------------------------------------------------------------------------------------------

REFUSED: dict[str, Answer] = {
    "busy": error(429, "Throttling", headers=NO_WAIT),
    "overloaded": error(503, "ServiceUnavailable"),
    "failing": error(500, "InternalError"),
}


def then_breaks(disk: Disk, refusal: Answer) -> Callable[[Received], Answer]:
    """The refusal, and from its arrival on nothing can be written."""

    def answer(_: Received) -> Answer:
        disk.break_down()
        return refusal

    return answer


@pytest.mark.smoke
@pytest.mark.parametrize("case", REFUSED)
def test_no_second_attempt_leaves_before_it_is_on_disk(shell: Shell, service: FaultServer, case: str) -> None:
    disk = Disk(shell, shell.folder)
    service.play(GENERATE, then_breaks(disk, REFUSED[case]), good())
    said = shell.run(*RUN).error
    assert (said["exit_code"], said["billed"]) == (9, "no")
    assert (len(service.posts), service.billed) == (1, 0)
    disk.mend()
    (evidence,) = shell.evidence_files()
    later = shell.run("--recover", str(evidence), "--print-response").error
    assert later["billed"] != "yes"
    assert len(service.posts) == 1
    assert shell.run(*RUN).code == 0
    assert service.billed == 1


@pytest.mark.parametrize("case", REFUSED)
def test_no_second_attempt_of_a_row_leaves_before_it_is_on_disk(batch: Batch, case: str) -> None:
    disk = Disk(batch.shell, batch.out)
    batch.service.play(GENERATE, then_breaks(disk, REFUSED[case]), good())
    batch.rows("a")
    result = batch.run()
    assert result.code == 9, result.stdout
    assert (batch.sent, batch.service.billed) == (["a"], 0)
    assert result.json["error"]["billed"] == "no"
    disk.mend()
    later = batch.run()
    if later.code == 1 and later.json["unknown"]:  # that it was refused could not be noted any more
        later = batch.run("--retry-unknown")
    assert later.code == 0, later.stdout
    assert batch.service.billed == 1 and batch.sent == ["a", "a"]


# ---------------------------------------------------------------------------------------------------------------------
# A4: names that collide
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", [("fox.png",), ("fox.png", "c.png")], ids=["one", "two"])
def test_a_name_that_collides_fails_no_other_row(batch: Batch, taken: tuple[str, ...]) -> None:
    """A foreign file takes a name meanwhile; the picture's other name is what another row asks for."""

    def rows(wanted: str) -> None:
        a, c = {"prompt": "a", "output": "fox.png"}, {"prompt": "c", "output": "c.png"}
        batch.rows(a, {"prompt": "b", "output": wanted}, c, "d")

    def intrude(_: Received) -> Answer:
        for name in taken:
            (batch.out / name).write_text("foreign", encoding="utf-8")
        return file(SMALL_PNG, delay_s=0.1)

    batch.service.play(PICTURE, intrude)
    place = batch.out
    batch.out = batch.shell.folder / "rehearsal"
    rows("other.png")
    assert batch.run().code == 0
    other_name = batch.picture("a")["output"]
    assert other_name != "fox.png"
    batch.out = place
    rows(other_name)
    paid_before = len(batch.sent)
    result = batch.run()
    assert result.code == 0, (result.stdout, result.stderr)
    assert_counts(result, saved=4)
    assert sorted(batch.sent[paid_before:]) == ["a", "b", "c", "d"]
    paths = [Path(entry["image_path"]) for entry in batch.results()]
    assert len(set(paths)) == 4 and all(path.read_bytes() == SMALL_PNG for path in paths)
    assert all((batch.out / name).read_text(encoding="utf-8") == "foreign" for name in taken)
    again = batch.run()
    assert again.code == 0 and len(batch.sent) == paid_before + 4


# ---------------------------------------------------------------------------------------------------------------------
# A5: a saved picture without evidence
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["could not be written", "could not be brought up to date", "was removed"])
def test_a_saved_row_can_be_changed_whatever_became_of_its_evidence(batch: Batch, how: str) -> None:
    disk = Disk(batch.shell, batch.out / "evidence")

    def picture(_: Received) -> Answer:
        if how != "was removed":
            disk.break_down()
        return file(SMALL_PNG)

    old, new = {"prompt": "old", "id": "one"}, {"prompt": "new", "id": "one"}
    batch.rows(old, "other")
    if how == "could not be brought up to date":
        batch.service.play(PICTURE, html(404))
        assert batch.run().json["generated"] == 2
        assert len(batch.evidence()) == 2
    batch.service.play(PICTURE, picture)
    first = batch.run()
    assert first.json["saved"] == 2, first.stdout
    disk.mend()
    if how == "was removed":
        shutil.rmtree(batch.out / "evidence")
    batch.service.play(PICTURE, file(png(512, 512, "crimson")))
    batch.rows(new, "other")
    changed = batch.run("--accept-changes")
    refused = changed.code == 2 and changed.json["error"]["code"] == "changed_rows"
    assert changed.code == 0 or refused, changed.stdout
    if refused:
        new = new | {"id": "another"}
        batch.rows(new, "other")
    for _ in range(2):
        later = batch.run()
        assert later.code == 0, later.stdout
        assert batch.states().items() >= {"new": "saved", "other": "saved"}.items()
    assert batch.status()["saved"] >= 2
    assert sorted(batch.sent) == ["new", "old", "other"]
    assert batch.call("--gallery-only", str(batch.out)).code == 0


# ---------------------------------------------------------------------------------------------------------------------
# A6: the lock
# ---------------------------------------------------------------------------------------------------------------------


def by_symlink(batch: Batch) -> str:
    link = batch.shell.folder / "another-name"
    link.symlink_to(batch.out, target_is_directory=True)
    return str(link)


def by_linked_parent(batch: Batch) -> str:
    (batch.shell.folder / "here").symlink_to(".", target_is_directory=True)
    return str(batch.shell.folder / "here" / "out")


OTHER_PATHS: dict[str, Callable[[Batch], str]] = {
    "the same": lambda batch: str(batch.out),
    "relative": lambda _: "out",
    "by way of another": lambda batch: f"{batch.out}/images/..",
    "a link to it": by_symlink,
    "below a link": by_linked_parent,
}


@pytest.mark.parametrize("path", OTHER_PATHS)
def test_no_second_run_gets_in_by_removing_the_lock(batch: Batch, path: str) -> None:
    gate = Gate()
    batch.service.play(GENERATE, gate)
    prompts = batch.prompts(6)
    process = batch.start("--concurrency", "2", "--max-cost", str(6 * PRICE))
    batch.service.wait_until(lambda: len(gate.arrived) == 2)
    try:
        for way in (OTHER_PATHS[path](batch), str(batch.out)):
            (batch.out / "batch.lock").unlink(missing_ok=True)
            second = batch.run("--output-dir", way, timeout=10)
            assert (second.code, second.json["error"]["code"]) == (2, "already_running"), second.stdout
        assert len(gate.arrived) == 2
    finally:
        gate.open()
    assert batch.finish(process).code == 0
    assert Counter(batch.sent) == dict.fromkeys(prompts, 1)
    saved_in_the_end(batch, batch.run(), *prompts)


def test_two_runs_of_which_the_first_lost_its_lock_file_pay_once(batch: Batch) -> None:
    """The lock goes in the middle of the run, and the same command is given at once, again and again."""
    batch.service.play(GENERATE, good(how=Answer(delay_s=0.4)))
    prompts = batch.prompts(24)
    processes = [batch.start("--concurrency", "2")]
    batch.service.wait_until(lambda: len(batch.sent) >= 4)
    for _ in range(3):
        (batch.out / "batch.lock").unlink(missing_ok=True)
        processes.append(batch.start("--concurrency", "2"))
        time.sleep(0.1)
    results = [batch.finish(process) for process in processes]
    assert Counter(batch.sent) == dict.fromkeys(prompts, 1)
    assert [result.code for result in results] == [0, 2, 2, 2]


# ---------------------------------------------------------------------------------------------------------------------
# A7: the disk fills while paid calls are out
# ---------------------------------------------------------------------------------------------------------------------


def assert_told_or_kept(batch: Batch, result: Result, prompts: list[str]) -> None:
    """Each link stands in what the run said, or in a file of the folder."""
    files = b"".join(path.read_bytes() for path in batch.out.rglob("*") if path.is_file())
    said = (result.stdout + result.stderr).encode() + files
    assert [prompt for prompt in prompts if link_of(prompt).encode() not in said] == []


def four_out(batch: Batch) -> tuple[list[str], Gate, subprocess.Popen[bytes]]:
    """A run with four paid calls out."""
    gate = Gate(own_links(batch.service))
    batch.service.play(GENERATE, gate)
    prompts = batch.prompts(4)
    process = batch.start("--concurrency", "4", "--timeout", "20")
    batch.service.wait_until(lambda: len(gate.arrived) == 4)
    return prompts, gate, process


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of 96 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path: Path) -> None:
    """Take all the room that is left on a disk."""
    for size in (1 << 20, 4096, 1):
        with contextlib.suppress(OSError), path.open("ab", buffering=0) as target:
            while target.write(bytes(size)) == size:
                pass


def test_links_that_come_while_the_disk_is_full_are_fetched_by_the_next_run(batch: Batch, small_disk: Path) -> None:
    batch.out = small_disk / "out"
    prompts, gate, process = four_out(batch)
    fill(small_disk / "filler")
    gate.open()
    result = batch.finish(process, timeout=60)
    assert result.code == 0, result.stdout  # the room that was kept is enough for these small pictures
    assert_told_or_kept(batch, result, prompts)
    (small_disk / "filler").unlink()
    saved_in_the_end(batch, batch.run(), *prompts)


def test_links_that_come_while_the_disk_fails_are_told(batch: Batch) -> None:
    """A disk that takes nothing at all until the run has ended."""
    disk = Disk(batch.shell, batch.out)
    prompts, gate, process = four_out(batch)
    disk.break_down()
    gate.open()
    result = batch.finish(process, timeout=60)
    disk.mend()
    assert result.code == 9, result.stdout
    assert_told_or_kept(batch, result, prompts)
    again = batch.run()
    assert again.code in (0, 1), again.stdout  # 1: the link of one that was out stands only in what was printed
    assert again.json["pending"] == again.json["failed"] == 0
    assert Counter(batch.sent) == dict.fromkeys(prompts, 1)


def test_links_that_come_while_the_disk_fails_for_a_moment_are_not_lost(batch: Batch) -> None:
    """Somebody makes room two seconds later."""
    disk = Disk(batch.shell, batch.out)
    prompts, gate, process = four_out(batch)
    disk.break_down()
    gate.open()
    time.sleep(2)
    disk.mend()
    result = batch.finish(process, timeout=60)
    assert result.code in (0, 9), result.stdout  # 0 where the disk came back within its second try
    assert_told_or_kept(batch, result, prompts)
    saved_in_the_end(batch, batch.run(), *prompts)


# ---------------------------------------------------------------------------------------------------------------------
# A8: paths that no disk takes
# ---------------------------------------------------------------------------------------------------------------------

IMPOSSIBLE: dict[str, str] = {
    "a folder name of 300 bytes": "x" * 300 + "/a.png",
    "a file name of 300 bytes": "x" * 296 + ".png",
    "100 signs of 3 bytes": "图" * 100 + "/a.png",
    "a path of 4,100 bytes": "d/" * 2047 + "ab.png",
    "a path that is too long in its place": "/".join(["e" * 200] * 20) + "/a.png",
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_a_row_with_an_impossible_path_is_refused_before_paying(batch: Batch, case: str) -> None:
    batch.rows("a", {"prompt": "bad", "output": IMPOSSIBLE[case]}, "c")
    for options in (("--dry-run",), ()):
        result = batch.run(*options)
        assert (result.code, result.json["error"]["code"]) == (2, "invalid_rows"), result.stdout
        assert "line 2" in str(result.json["error"]) and "line 1" not in str(result.json["error"])
        assert result.json["error"]["billed"] == "no"
    assert batch.service.connections == 0
    batch.rows("a", "c")
    saved_in_the_end(batch, batch.run(), "a", "c")


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_an_impossible_output_is_refused_before_paying(shell: Shell, service: FaultServer, case: str) -> None:
    output = IMPOSSIBLE[case]
    for options in (("--output", output), ("--output", str(shell.folder / output))):
        said = shell.run("--prompt", "a fox", "--print-response", *options).error
        assert (said["exit_code"], said["billed"]) == (2, "no")
    assert service.connections == 0
    assert shell.evidence_files() == []


@pytest.mark.parametrize("name", ["n" * 251 + ".png", "图" * 83 + "ab.png", "n" * 230 + ".png"])
def test_the_longest_names_are_saved_or_refused_before_paying(batch: Batch, name: str) -> None:
    """The name fits, and a temporary name made of it may not."""
    batch.rows({"prompt": "long", "output": name}, "b")
    result = batch.run()
    if result.code == 2:
        assert (result.json["error"]["code"], batch.sent) == ("invalid_rows", [])
    else:
        saved_in_the_end(batch, result, "long", "b")
    single = batch.single("--prompt", "a fox", "--output", name, "--print-response")
    assert single.code == 0 or (single.code, single.error["billed"]) == (2, "no"), single.stdout


def test_a_long_id_makes_no_impossible_name(batch: Batch) -> None:
    batch.rows({"prompt": "a", "id": "图" * 200}, {"prompt": "图" * 300, "id": "x" * 200})
    saved_in_the_end(batch, batch.run(), "a", "图" * 300)


# ---------------------------------------------------------------------------------------------------------------------
# A9: Retry-After
# ---------------------------------------------------------------------------------------------------------------------

FIRST_STEP_S = 0.37  # 0.5 with its jitter
AT_ONCE = ("0", "0.05", "Thu, 01 Jan 1970 00:00:00 GMT")


def gaps(requests: list[Received]) -> list[float]:
    times = [request.at for request in requests]
    return [later - earlier for earlier, later in pairwise(times)]


def assert_waits(requests: list[Received]) -> None:
    assert len(requests) == 5
    assert min(gaps(requests)) >= FIRST_STEP_S, gaps(requests)


@pytest.mark.parametrize(("status", "value"), [*((429, value) for value in AT_ONCE), (503, "0")])
def test_no_retry_is_sooner_than_the_first_step(shell: Shell, service: FaultServer, status: int, value: str) -> None:
    code = "Throttling" if status == 429 else "ServiceUnavailable"
    service.play(GENERATE, error(status, code, headers=(("Retry-After", value),)))
    assert shell.run(*RUN, "--max-retries", "4").error["exit_code"] == 6
    assert_waits(service.posts)


@pytest.mark.parametrize("value", AT_ONCE[:2])
def test_no_retry_of_a_row_is_sooner_than_the_first_step(batch: Batch, value: str) -> None:
    refusal: Behaviour = error(429, "Throttling", headers=(("Retry-After", value),))
    batch.service.play(GENERATE, by_prompt({"a": refusal}))
    batch.rows("a")
    result = batch.run("--max-retries", "4", timeout=60)
    assert result.code == 6, result.stdout
    assert_waits(batch.service.posts)


def test_no_download_is_tried_again_sooner_than_the_first_step(shell: Shell, service: FaultServer) -> None:
    service.play(PICTURE, html(503, headers=NO_WAIT), html(503, headers=NO_WAIT), file(SMALL_PNG))
    result: Any = shell.run(*RUN)
    assert result.code == 0, result.stdout
    assert len(service.posts) == 1 and len(service.downloads) == 3
    assert min(gaps(service.downloads)) >= FIRST_STEP_S, gaps(service.downloads)
