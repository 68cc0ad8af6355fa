"""Runs that end in the middle: by a signal, a kill, a full disk, a closed pipe, another run. What was paid is not lost.

Nothing here waits for a time to pass: a test waits until the server or the disk shows that the moment has come.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import zimage.download
from conftest import Result, Shell
from fault_server import (
    GENERATE,
    PICTURE,
    Answer,
    FaultServer,
    Received,
    error,
    file,
    good,
    html,
    noise_png,
    oss_error,
    png,
)
from providers.dashscope import DashScope
from zimage.calls import HttpAnswer
from zimage.errors import Failure
from zimage.trust import Home
from zimage.waiting import Stop, Stopped

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and limits of POSIX")

RUN = ("--prompt", "x", "--output", "out.png", "--print-response")
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
SIGNAL_NAMES = ["SIGINT", "SIGTERM"]
SILENT = good(how=Answer(delay_s=60))  # billed, and the answer does not come
DRIBBLING = Answer(body=png(), dribble_body_s=0.2)


def evidence_path(shell: Shell) -> str:
    (path,) = shell.evidence_files()
    return str(path)


def evidence_shows(shell: Shell, condition: Callable[[dict[str, Any]], object]) -> bool:
    try:
        return bool(shell.evidence_files()) and bool(condition(shell.evidence()))
    except ValueError:  # the file is being written for the first time
        return False


def recover(shell: Shell, *more: str) -> Result:
    """`--recover` of the only evidence, without a key: it must need none."""
    kept = dict(shell.env)
    shell.env.pop("DASHSCOPE_API_KEY", None)
    try:
        return shell.run("--recover", evidence_path(shell), "--print-response", *more)
    finally:
        shell.env = kept


def assert_nothing_else(shell: Shell, *pictures: str) -> None:
    """The folder holds the pictures named, one evidence file, and nothing hidden or half."""
    names = [name for name in shell.files() if not name.startswith("output/alicloud-ai-image-zimage-turbo/evidence/")]
    assert names == sorted(pictures)
    (path,) = shell.evidence_files()
    assert {entry.name for entry in path.parent.iterdir()} == {path.name, ".gitignore"}


def assert_recovers_free(shell: Shell, service: FaultServer, picture: bytes | None = None) -> None:
    """The picture that was paid for comes to its place, and nothing is paid again."""
    posts = len(service.posts)
    result = recover(shell)
    assert result.code == 0, (result.stdout, result.stderr)
    assert Path(result.json["image_path"]).read_bytes() == (picture or png())
    assert len(service.posts) == posts
    assert shell.evidence()["status"] == "saved"
    assert_nothing_else(shell, "out.png")


# ---------------------------------------------------------------------------------------------------------------------
# Signals that can be answered
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize(("signum", "exit"), SIGNALS, ids=SIGNAL_NAMES)
def test_a_signal_while_the_request_is_out_leaves_an_unknown_outcome(
    shell: Shell, service: FaultServer, signum: int, exit: int
) -> None:
    service.play(GENERATE, SILENT)
    process = shell.start(*RUN)
    service.wait_until(lambda: service.posts)
    process.send_signal(signum)
    result = shell.finish(process, timeout=10)
    assert result.code == exit
    said = result.error
    assert (said["code"], said["billed"], said["retryable"]) == ("interrupted", "unknown", False)
    assert said["evidence_path"] == evidence_path(shell)
    assert shell.evidence()["status"] == "unknown"
    assert_nothing_else(shell)
    assert recover(shell).error["exit_code"] == 7
    assert len(service.posts) == 1


@pytest.mark.parametrize(("signum", "exit"), SIGNALS, ids=SIGNAL_NAMES)
def test_a_signal_between_retries_ends_at_once_and_nothing_was_billed(
    shell: Shell, service: FaultServer, signum: int, exit: int
) -> None:
    service.play(GENERATE, error(429, "Throttling", headers=(("Retry-After", "50"),)))
    process = shell.start(*RUN)
    service.wait_until(lambda: evidence_shows(shell, lambda evidence: "wait_s" in evidence["attempts"][0]))
    process.send_signal(signum)
    result = shell.finish(process, timeout=10)
    assert result.code == exit
    assert (result.error["billed"], shell.evidence()["status"]) == ("no", "failed")
    assert_nothing_else(shell)
    assert recover(shell).error["exit_code"] == 2
    assert len(service.posts) == 1


@pytest.mark.parametrize(("signum", "exit"), SIGNALS, ids=SIGNAL_NAMES)
@pytest.mark.parametrize("play", [DRIBBLING, Answer(delay_s=60), html(503)], ids=["dribbled", "silent", "retried"])
def test_a_signal_while_the_picture_is_fetched_leaves_it_to_be_fetched_free(
    shell: Shell,
    service: FaultServer,
    signum: int,
    exit: int,
    play: Answer,
) -> None:
    service.play(PICTURE, play)
    process = shell.start(*RUN)
    service.wait_until(lambda: service.downloads)
    process.send_signal(signum)
    result = shell.finish(process, timeout=10)
    assert result.code == exit
    said = result.error
    assert (said["billed"], said["retryable"], shell.evidence()["status"]) == ("yes", False, "generated")
    assert evidence_path(shell) in said["next_command"]
    assert said["image_url"] == service.root + PICTURE
    assert_nothing_else(shell)
    service.play(PICTURE, file(png()))
    assert_recovers_free(shell, service)


@pytest.mark.parametrize(("status", "told"), [(503, "SIGTERM"), (429, "SIGTERM"), (404, "link_refused")])
@pytest.mark.parametrize("cuts", [True, False], ids=["one picture", "batch"])
def test_a_signal_that_comes_with_the_answer_about_the_picture_ends_the_download(
    monkeypatch: pytest.MonkeyPatch, status: int, told: str, cuts: bool
) -> None:
    """Between the answer and the wait for the next attempt; a batch keeps what was answered, as it ends by itself."""
    signals = Stop()
    asked: list[str] = []

    def answered(link: str, *_: object, **__: object) -> HttpAnswer:
        asked.append(link)
        signals.request("SIGTERM")
        return HttpAnswer(status, {}, b"")

    monkeypatch.setattr(zimage.download, "fetch", answered)
    stop = Stop(60, signals, cuts=cuts)
    try:
        zimage.download.download("http://x/", stop=stop, home=Home(), provider=DashScope(), is_last=False)
    except Failure as failure:
        reason = failure.code
    except Stopped as stopped:
        reason = stopped.reason
    assert reason == (told if cuts or status == 404 else "paid_not_downloaded")
    assert len(asked) == 1


def test_an_impatient_second_signal_changes_nothing(shell: Shell, service: FaultServer) -> None:
    service.play(GENERATE, SILENT)
    process = shell.start(*RUN)
    service.wait_until(lambda: service.posts)
    for _ in range(5):
        process.send_signal(signal.SIGINT)
    result = shell.finish(process, timeout=10)
    assert (result.code, result.error["billed"], shell.evidence()["status"]) == (130, "unknown", "unknown")


def test_a_signal_before_anything_is_sent_costs_nothing(shell: Shell, service: FaultServer) -> None:
    """Standard input is where a run can wait before it pays."""
    process = subprocess.Popen(
        shell.command("--file", "-", *RUN[2:]),
        cwd=shell.folder,
        env=shell.environment() | {"PYTHONUNBUFFERED": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(b'{"prompt":')
    process.stdin.flush()
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode in (143, -signal.SIGTERM)  # the second: before Python had started
    assert b"Traceback" not in stderr
    assert not service.connections
    assert shell.files() == []


def test_a_stopped_and_continued_run_ends_well(shell: Shell, service: FaultServer) -> None:
    """Ctrl-Z and fg, while the request is out."""
    release = threading.Event()

    def answer(request: Received) -> Answer:
        release.wait(30)
        return made(request)

    made = good()
    assert not isinstance(made, Answer)
    service.play(GENERATE, answer)
    process = shell.start(*RUN)
    service.wait_until(lambda: evidence_shows(shell, lambda evidence: evidence["status"] == "submitting"))
    service.wait_until(lambda: service.connections)
    process.send_signal(signal.SIGSTOP)
    release.set()
    service.wait_until(lambda: service.posts)
    process.send_signal(signal.SIGCONT)
    result = shell.finish(process)
    assert result.code == 0, result.stderr
    assert len(service.posts) == 1


# ---------------------------------------------------------------------------------------------------------------------
# SIGKILL: what is on disk must be enough
# ---------------------------------------------------------------------------------------------------------------------


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate(timeout=30)


def test_a_run_killed_while_the_request_is_out_is_unknown_when_recovered(shell: Shell, service: FaultServer) -> None:
    service.play(GENERATE, SILENT)
    process = shell.start(*RUN)
    service.wait_until(lambda: service.posts)
    kill(process)
    assert shell.evidence()["status"] == "submitting"
    assert_nothing_else(shell)
    said = recover(shell).error
    assert (said["exit_code"], said["code"], said["billed"]) == (7, "outcome_unknown", "unknown")
    assert (len(service.posts), len(service.downloads)) == (1, 0)


def test_a_run_killed_between_retries_was_not_billed(shell: Shell, service: FaultServer) -> None:
    service.play(GENERATE, error(429, "Throttling", headers=(("Retry-After", "50"),)))
    process = shell.start(*RUN)
    service.wait_until(lambda: evidence_shows(shell, lambda evidence: "wait_s" in evidence["attempts"][0]))
    kill(process)
    assert shell.evidence()["status"] in ("submitting", "failed")
    assert recover(shell).error["exit_code"] == 2


def test_a_run_killed_in_its_second_attempt_is_unknown(shell: Shell, service: FaultServer) -> None:
    """That the first attempt was refused says nothing of the second."""
    service.play(GENERATE, error(429, "Throttling"), SILENT)
    process = shell.start(*RUN)
    service.wait_until(lambda: len(service.posts) == 2)
    kill(process)
    assert shell.evidence()["status"] == "submitting"
    assert recover(shell).error["exit_code"] == 7


def test_a_run_killed_while_the_picture_is_fetched_is_recovered_free(shell: Shell, service: FaultServer) -> None:
    service.play(PICTURE, DRIBBLING)
    process = shell.start(*RUN)
    service.wait_until(lambda: service.downloads)
    kill(process)
    assert shell.evidence()["status"] == "generated"
    assert_nothing_else(shell)
    service.play(PICTURE, file(png()))
    assert_recovers_free(shell, service)


@pytest.mark.smoke
@pytest.mark.parametrize("moment", range(10))
def test_a_kill_at_any_moment_leaves_true_evidence_and_no_half_picture(
    shell: Shell, service: FaultServer, moment: int
) -> None:
    """The moments are counted from one that every run passes, and lie dense around all that it does."""
    service.play(PICTURE, file(noise_png()))
    process = shell.start(*RUN)
    service.wait_until(lambda: shell.evidence_files() or process.poll() is not None)
    threading.Event().wait(moment * 0.012)
    kill(process)
    if not evidence_shows(shell, lambda _: True):
        assert not service.connections, "the request left before the evidence was whole"
        return
    evidence = shell.evidence()
    picture = shell.folder / "out.png"
    if picture.exists():
        assert picture.read_bytes() == noise_png()
    if evidence["status"] == "saved":
        assert picture.exists()
    if service.billed:
        assert evidence["status"] in ("submitting", "generated", "saved")
    result = recover(shell)
    assert result.code == (7 if evidence["status"] == "submitting" else 0), (evidence, result)
    if result.code == 0:
        assert Path(result.json["image_path"]).read_bytes() == noise_png()
    assert len(service.posts) <= 1  # the server may read the killed run's request only now


def test_a_run_killed_between_picture_and_evidence_knows_its_picture_again(shell: Shell, service: FaultServer) -> None:
    """The worst moments, one after the other: the picture lies in its place, the evidence does not say so yet."""
    assert shell.run(*RUN).code == 0
    saved = evidence_path(shell)
    before = shell.evidence()
    fields = {name: value for name, value in before.items() if name not in ("image", "finished_at")}
    for _ in range(3):
        Path(saved).write_text(json.dumps(fields | {"status": "generated"}), encoding="utf-8")
        result = recover(shell)
        assert result.code == 0, (result.stdout, result.stderr)
        assert Path(result.json["image_path"]).read_bytes() == png()
    assert (shell.folder / "out.png").read_bytes() == png()
    assert len(service.posts) == 1


def two_at_once(*pictures: bytes) -> Callable[[Received], Answer]:
    """Two downloads, each held until the other is there too; the pictures are handed out in their order."""
    both, left = threading.Barrier(2), list(pictures)

    def answer(_: Received) -> Answer:
        content = left.pop() if len(left) > 1 else left[0]
        with contextlib.suppress(threading.BrokenBarrierError):  # the other run has failed: its own result tells
            both.wait(10)
        return file(content)

    return answer


# ---------------------------------------------------------------------------------------------------------------------
# --recover
# ---------------------------------------------------------------------------------------------------------------------


def paid_and_not_fetched(shell: Shell, service: FaultServer) -> None:
    """A run whose picture was made and billed, and could not be downloaded; by now it could."""
    service.play(PICTURE, oss_error(404, "NoSuchKey", "not there yet"))
    assert shell.run(*RUN).error["billed"] == "yes"
    assert shell.evidence()["status"] == "generated"
    service.play(PICTURE, file(png()))


def test_a_saved_picture_is_recovered_without_any_network(shell: Shell, service: FaultServer) -> None:
    first = shell.run(*RUN)
    assert first.code == 0
    service.close()
    written = evidence_path(shell), Path(evidence_path(shell)).read_bytes()
    result = recover(shell)
    assert result.code == 0
    assert result.json == first.json | {"paid_before": True}
    assert (evidence_path(shell), Path(evidence_path(shell)).read_bytes()) == written


def test_a_saved_picture_that_was_deleted_is_fetched_again_free(shell: Shell, service: FaultServer) -> None:
    assert shell.run(*RUN).code == 0
    (shell.folder / "out.png").unlink()
    assert_recovers_free(shell, service)


def test_a_saved_picture_that_was_changed_is_not_overwritten_by_a_recovery(shell: Shell, service: FaultServer) -> None:
    assert shell.run(*RUN).code == 0
    (shell.folder / "out.png").write_bytes(b"retouched")
    result = recover(shell)
    assert result.code == 0
    assert (shell.folder / "out.png").read_bytes() == b"retouched"
    assert Path(result.json["image_path"]).read_bytes() == png()
    assert result.json["warnings"]


def test_there_is_nothing_to_recover_of_a_failed_run(shell: Shell, service: FaultServer) -> None:
    service.play(GENERATE, error(400, "InvalidParameter"))
    assert shell.run(*RUN).code == 2
    connections = service.connections
    said = recover(shell).error
    assert (said["exit_code"], said["billed"]) == (2, "no")
    assert service.connections == connections


def test_an_unknown_outcome_stays_unknown(shell: Shell, service: FaultServer) -> None:
    service.play(GENERATE, good(how=Answer(hang_up="after-reading")))
    assert shell.run(*RUN).code == 7
    before = shell.evidence()
    said = recover(shell).error
    assert (said["exit_code"], said["code"], said["billed"]) == (7, "outcome_unknown", "unknown")
    assert shell.evidence()["status"] == before["status"] == "unknown"
    assert service.connections == 1


@pytest.mark.parametrize(
    "answer",
    [oss_error(403, "AccessDenied", "Request has expired."), oss_error(404, "NoSuchKey", "gone"), html(403)],
    ids=["expired", "deleted", "forbidden"],
)
def test_an_expired_link_ends_in_8_and_says_that_only_paying_helps(
    shell: Shell, service: FaultServer, answer: Answer
) -> None:
    service.play(GENERATE, good(f"{PICTURE}?Expires=1600000000&Signature=s"))
    service.play(PICTURE, answer)
    shell.run(*RUN, "--timeout", "1.5")
    said = recover(shell).error
    assert (said["exit_code"], said["code"], said["billed"]) == (8, "link_expired", "yes")
    assert "next_command" not in said
    assert shell.evidence()["status"] == "generated"
    assert len(service.posts) == 1


def test_a_recovery_may_be_told_another_place(shell: Shell, service: FaultServer) -> None:
    paid_and_not_fetched(shell, service)
    result = recover(shell, "--output", "other.jpg")
    assert result.code == 0
    with Image.open(shell.folder / "other.jpg") as image:
        assert image.format == "JPEG"
    assert_nothing_else(shell, "other.jpg")


def test_a_recovery_from_another_folder_saves_where_the_first_run_would_have(
    shell: Shell, service: FaultServer
) -> None:
    paid_and_not_fetched(shell, service)
    path = evidence_path(shell)
    project, shell.folder = shell.folder, shell.home
    assert shell.run("--recover", path).code == 0
    assert shell.files() == []
    assert (project / "out.png").read_bytes() == png()


def test_evidence_of_the_real_service_cannot_lead_a_recovery_to_this_machine(
    shell: Shell, service: FaultServer
) -> None:
    """Only services on loopback may link to loopback; an evidence file may come from anywhere."""
    paid_and_not_fetched(shell, service)
    asked = service.connections
    path = Path(evidence_path(shell))
    endpoint = {"endpoint": f"https://dashscope.aliyuncs.com{GENERATE}"}
    path.write_text(json.dumps(shell.evidence() | endpoint), encoding="utf-8")
    said = recover(shell).error
    assert (said["exit_code"], said["code"]) == (8, "hop_refused")
    assert service.connections == asked


def test_two_recoveries_at_once_damage_nothing(shell: Shell, service: FaultServer) -> None:
    paid_and_not_fetched(shell, service)
    service.play(PICTURE, two_at_once(png(), png()))
    processes = [shell.start("--recover", evidence_path(shell), "--print-response") for _ in range(2)]
    for result in [shell.finish(process) for process in processes]:
        assert result.code == 0, (result.stdout, result.stderr)
        assert Path(result.json["image_path"]).read_bytes() == png()
    assert (shell.folder / "out.png").read_bytes() == png()
    assert shell.evidence()["status"] == "saved"
    assert len(service.posts) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The place of the picture changes while it is made
# ---------------------------------------------------------------------------------------------------------------------


def meanwhile(act: Callable[[], object]) -> Callable[[Received], Answer]:
    """A picture is made, and something else happens while the request is out."""

    def answer(request: Received) -> Answer:
        act()
        made = good()
        return made(request)

    return answer


def second_name(shell: Shell) -> Path:
    return shell.folder / f"out-{shell.evidence_files()[0].stem}.png"


@pytest.mark.parametrize("kind", ["file", "folder", "link to nowhere"])
def test_a_name_taken_meanwhile_is_left_alone_and_the_picture_gets_another(
    shell: Shell, service: FaultServer, kind: str
) -> None:
    output = shell.folder / "out.png"
    takes: dict[str, Callable[[], object]] = {
        "file": lambda: output.write_bytes(b"mine"),
        "folder": output.mkdir,
        "link to nowhere": lambda: output.symlink_to(shell.folder / "nowhere"),
    }
    service.play(GENERATE, meanwhile(takes[kind]))
    result = shell.run(*RUN)
    assert result.code == 0, result.stderr
    assert result.json["image_path"] == str(second_name(shell)) == shell.evidence()["image"]["path"]
    assert second_name(shell).read_bytes() == png()
    assert len(result.json["warnings"]) == 1
    assert kind != "file" or output.read_bytes() == b"mine"
    assert kind != "folder" or output.is_dir()
    assert kind != "link to nowhere" or (output.is_symlink() and not output.exists())


def test_a_name_taken_before_a_recovery_is_left_alone(shell: Shell, service: FaultServer) -> None:
    paid_and_not_fetched(shell, service)
    (shell.folder / "out.png").write_bytes(b"mine")
    result = recover(shell)
    assert result.code == 0
    assert result.json["image_path"] == str(second_name(shell))
    assert len(result.json["warnings"]) == 1
    assert (shell.folder / "out.png").read_bytes() == b"mine"
    assert_nothing_else(shell, "out.png", second_name(shell).name)


def test_a_file_that_may_be_replaced_is_replaced_in_one_step(shell: Shell, service: FaultServer) -> None:
    output = shell.folder / "out.png"
    service.play(GENERATE, meanwhile(lambda: output.write_bytes(b"old")))
    result = shell.run(*RUN, "--overwrite")
    assert result.code == 0
    assert output.read_bytes() == png()
    assert_nothing_else(shell, "out.png")


def test_a_folder_taken_meanwhile_is_not_replaced_either(shell: Shell, service: FaultServer) -> None:
    service.play(GENERATE, meanwhile((shell.folder / "out.png").mkdir))
    result = shell.run(*RUN, "--overwrite")
    assert result.code == 0, result.stderr
    assert result.json["image_path"] == str(second_name(shell))


def test_a_folder_removed_meanwhile_is_made_again(shell: Shell, service: FaultServer) -> None:
    service.play(GENERATE, meanwhile(lambda: shutil.rmtree(shell.folder / "pictures")))
    result = shell.run(*RUN[:2], "--output", "pictures/out.png", "--print-response")
    assert result.code == 0, result.stderr
    assert (shell.folder / "pictures" / "out.png").read_bytes() == png()


def test_a_folder_that_became_a_file_is_exit_9_and_the_picture_is_recovered_later(
    shell: Shell, service: FaultServer
) -> None:
    pictures = shell.folder / "pictures"

    def spoil() -> None:
        shutil.rmtree(pictures)
        pictures.write_bytes(b"")

    service.play(GENERATE, meanwhile(spoil))
    said = shell.run(*RUN[:2], "--output", "pictures/out.png", "--print-response").error
    assert (said["exit_code"], said["billed"], shell.evidence()["status"]) == (9, "yes", "generated")
    assert evidence_path(shell) in said["next_command"]
    pictures.unlink()
    assert recover(shell).code == 0
    assert (pictures / "out.png").read_bytes() == png()
    assert len(service.posts) == 1


def test_evidence_removed_meanwhile_does_not_lose_the_picture(shell: Shell, service: FaultServer) -> None:
    service.play(GENERATE, meanwhile(lambda: shutil.rmtree(shell.folder / "output")))
    result = shell.run(*RUN)
    assert result.code == 0, result.stderr
    assert (shell.folder / "out.png").read_bytes() == png()
    if not shell.evidence_files():
        assert any("evidence" in warning for warning in result.json["warnings"])


@pytest.mark.parametrize("overwrite", [False, True], ids=["keep", "overwrite"])
def test_two_runs_at_once_to_the_same_name_never_damage_each_other(
    shell: Shell, service: FaultServer, overwrite: bool
) -> None:
    made = {png(colour="red"), png(colour="blue")}
    service.play(PICTURE, two_at_once(*made))
    flags = ["--overwrite"] if overwrite else []
    processes = [shell.start(*RUN, *flags) for _ in range(2)]
    results = [shell.finish(process) for process in processes]
    assert [result.code for result in results] == [0, 0], results
    assert (len(service.posts), service.billed) == (2, 2)
    paths = {result.json["image_path"] for result in results}
    assert len(paths) == (1 if overwrite else 2)
    assert str(shell.folder / "out.png") in paths
    saved = {Path(path).read_bytes() for path in paths}
    assert saved <= made if overwrite else saved == made
    assert sum("warnings" in result.json for result in results) == (0 if overwrite else 1)
    pictures = {name for name in shell.files() if not name.startswith("output/")}
    assert pictures == {Path(path).name for path in paths}
    assert len(shell.evidence_files()) == 2


# ---------------------------------------------------------------------------------------------------------------------
# The disk
# ---------------------------------------------------------------------------------------------------------------------


def run_with_files_up_to(shell: Shell, size: int, *arguments: str) -> Result:
    """The run on a disk that takes no file larger than `size` bytes."""
    import resource

    done = subprocess.run(
        shell.command(*arguments),
        cwd=shell.folder,
        env=shell.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


def test_a_disk_that_cannot_take_the_evidence_stops_the_run_before_it_pays(shell: Shell, service: FaultServer) -> None:
    said = run_with_files_up_to(shell, 100, *RUN).error
    assert (said["exit_code"], said["billed"]) == (9, "no")
    assert service.connections == 0
    assert [name for name in shell.files() if not name.endswith(".gitignore")] == []


@pytest.mark.parametrize("old", [None, b"old picture"], ids=["new", "overwrite"])
def test_a_disk_that_cannot_take_the_picture_keeps_what_leads_back_to_it(
    shell: Shell, service: FaultServer, old: bytes | None
) -> None:
    if old is not None:
        (shell.folder / "out.png").write_bytes(old)
    service.play(PICTURE, file(noise_png()))
    flags = ["--overwrite"] if old is not None else []
    said = run_with_files_up_to(shell, 100_000, *RUN, *flags).error
    assert (said["exit_code"], said["billed"], said["retryable"]) == (9, "yes", False)
    assert evidence_path(shell) in said["next_command"]
    assert shell.evidence()["status"] == "generated"
    assert_nothing_else(shell, *(["out.png"] if old is not None else []))
    if old is not None:
        assert (shell.folder / "out.png").read_bytes() == old
        (shell.folder / "out.png").unlink()
    assert_recovers_free(shell, service, noise_png())


LONG_THOUGHTS = good(reasoning_content="hm, " * 20_000)  # makes the evidence larger than its first version


def small_png() -> bytes:
    return png(256, 256)


def test_a_picture_counts_where_only_the_evidence_cannot_be_written_any_more(
    shell: Shell, service: FaultServer
) -> None:
    service.play(GENERATE, LONG_THOUGHTS)
    service.play(PICTURE, file(small_png()))
    result = run_with_files_up_to(shell, 40_000, *RUN)
    assert result.code == 0, (result.stdout, result.stderr)
    assert (shell.folder / "out.png").read_bytes() == small_png()
    assert any("evidence" in warning for warning in result.json["warnings"])
    assert shell.evidence()["status"] == "submitting"
    assert_nothing_else(shell, "out.png")


def test_a_link_that_is_not_in_the_evidence_is_in_the_error(shell: Shell, service: FaultServer) -> None:
    """Then no command can recover the picture, and none is named."""
    service.play(GENERATE, LONG_THOUGHTS)
    service.play(PICTURE, oss_error(404, "NoSuchKey", "not there yet"))
    said = run_with_files_up_to(shell, 40_000, *RUN).error
    assert (said["exit_code"], said["billed"]) == (8, "yes")
    assert said["image_url"] == service.root + PICTURE
    assert "next_command" not in said
    assert_nothing_else(shell)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder that takes no file even from root")
def test_a_folder_that_takes_no_file_is_found_out_before_paying(shell: Shell, service: FaultServer) -> None:
    said = shell.run(*RUN[:2], "--output", "/proc/out.png", "--print-response").error
    assert (said["exit_code"], said["billed"]) == (9, "no")
    assert service.connections == 0
    assert shell.files() == []


@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("place", ["picture", "evidence"])
def test_a_read_only_folder_is_found_out_before_paying(shell: Shell, service: FaultServer, place: str) -> None:
    folder = shell.folder / ("pictures" if place == "picture" else "output")
    folder.mkdir()
    folder.chmod(0o500)
    output = "pictures/out.png" if place == "picture" else "out.png"
    said = shell.run(*RUN[:2], "--output", output, "--print-response").error
    folder.chmod(0o700)
    assert (said["exit_code"], said["billed"]) == (9, "no")
    assert service.connections == 0


# ---------------------------------------------------------------------------------------------------------------------
# Streams that nobody reads
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full"])
def test_a_closed_or_full_stream_does_not_lose_the_picture(shell: Shell, service: FaultServer, streams: str) -> None:
    service.play(PICTURE, file(noise_png()))
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {streams}', "sh", *shell.command(*RUN)],
        cwd=shell.folder,
        env=shell.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
    )
    assert (shell.folder / "out.png").read_bytes() == noise_png()
    assert shell.evidence()["status"] == "saved"
    assert_nothing_else(shell, "out.png")
    assert done.returncode == 0
    for word in (b"Traceback", b"Exception ignored", b"BrokenPipe", b"Error"):
        assert word not in done.stderr


@pytest.mark.parametrize("failing", [False, True], ids=["saved", "failed"])
def test_a_pipe_closed_early_gives_no_traceback(shell: Shell, service: FaultServer, failing: bool) -> None:
    if failing:
        service.play(GENERATE, error(400, "InvalidParameter"))
    process = shell.start(*RUN)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait(timeout=30) == (2 if failing else 0)
    process.stderr.close()
    for word in (b"Traceback", b"Exception ignored", b"BrokenPipe"):
        assert word not in stderr
    assert shell.evidence()["status"] == ("failed" if failing else "saved")
