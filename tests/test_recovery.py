"""What happens after the payment: where a link may be fetched from how, what a recovery does, and what it leaves."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from conftest import Result, Shell
from fault_server import (
    BLOCK,
    GENERATE,
    PICTURE,
    Answer,
    FaultServer,
    error,
    file,
    good,
    json_answer,
    noise_png,
    oss_error,
    png,
)
from zimage.calls import HttpCall
from zimage.contract import SKILL
from zimage.transport import exchange
from zimage.waiting import Stop, Stopped
from zimage.wire import request_target

RUN = ("--prompt", "x", "--output", "out.png", "--print-response")


def recover(shell: Shell, *more: str) -> Result:
    (path,) = shell.evidence_files()
    return shell.run("--recover", str(path), "--print-response", *more)


def pay_without_fetching(shell: Shell, service: FaultServer, *more: str) -> Result:
    """A run whose picture is paid for and not fetched; from then on it can be fetched."""
    service.play(PICTURE, oss_error(404, "NoSuchKey", "not there yet"))
    result = shell.run(*RUN, *more)
    assert result.error["billed"] == "yes"
    service.play(PICTURE, file(png()))
    return result


def jpeg(width: int, height: int, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    target = io.BytesIO()
    image = Image.new("RGB", (width, height), "red")
    image.paste("blue", (0, 0, width // 2, height))
    image.save(target, "JPEG", exif=exif)
    return target.getvalue()


# The download --------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize(
    "target",
    [
        "/img/a.png?Expires=9999999999&OSSAccessKeyId=k&Signature=a%2Bb%2fc%3D",
        "/img/a.png?sig=%7E%5f&x=%2b",
        "/img/./b/../a.png?x=[1]&y={2}&z=|",
        "/img/a.png?bad=%zz&good=%2F",
        "/img//a.png?&&a=;b=~",
        "/img/a.png?",
    ],
)
def test_a_link_is_fetched_byte_by_byte(shell: Shell, service: FaultServer, target: str) -> None:
    service.play(GENERATE, good(target))
    service.play(target.partition("?")[0], file(png()))
    shell.run(*RUN)
    assert [received.target for received in service.downloads] == [target]


def test_a_link_with_letters_beyond_ascii_is_encoded() -> None:
    assert request_target("https://h/画/a.png?q=é%2F#part") == "/%E7%94%BB/a.png?q=%C3%A9%2F"


def test_retry_after_is_obeyed_by_downloads(shell: Shell, service: FaultServer) -> None:
    service.play(PICTURE, Answer(status=503, headers=(("Retry-After", "2"),)), file(png()))
    assert shell.run(*RUN).code == 0
    first, second = service.downloads
    assert second.at - first.at >= 2


def test_a_download_that_must_wait_too_long_is_left_for_later(shell: Shell, service: FaultServer) -> None:
    service.play(PICTURE, Answer(status=503, headers=(("Retry-After", "600"),)))
    error = shell.run(*RUN).error
    assert (error["code"], error["retry_after_s"]) == ("paid_not_downloaded", 600)
    assert len(service.downloads) == 1


def test_a_picture_that_is_announced_as_too_large_is_not_waited_for(shell: Shell, service: FaultServer) -> None:
    service.play(PICTURE, Answer(claimed_length=65 * 2**20, body=b"x", delay_s=0, dribble_body_s=30))
    start = time.monotonic()
    assert shell.run(*RUN, "--timeout", "30").error["code"] == "image_too_large"
    assert time.monotonic() - start < 10


def test_a_photo_that_lies_on_its_side_is_turned_when_converted(shell: Shell, service: FaultServer) -> None:
    service.play(PICTURE, file(jpeg(768, 512, 6), "image/jpeg"))
    response = shell.run(*RUN, "--size", "512x768").json
    assert (response["width"], response["height"]) == (512, 768)
    assert "warnings" not in response
    with Image.open(response["image_path"]) as image:
        assert image.size == (512, 768)


@pytest.mark.parametrize("body", [BLOCK * 3000, BLOCK[:1]], ids=["huge", "hanging"])
def test_the_body_of_a_redirect_is_not_read(shell: Shell, service: FaultServer, body: bytes) -> None:
    headers = (("Location", "/img/there.png"),)
    service.play(PICTURE, Answer(status=302, headers=headers, body=body, claimed_length=len(BLOCK) * 3000, delay_s=0))
    service.play("/img/there.png", file(png()))
    start = time.monotonic()
    assert shell.run(*RUN, "--timeout", "30").code == 0
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("location", ["http://[", "http://h]x/", "/\xff"])
def test_a_redirect_to_what_is_no_link_is_refused_at_once(shell: Shell, service: FaultServer, location: str) -> None:
    service.play(PICTURE, Answer(status=302, headers=(("Location", location),)))
    assert shell.run(*RUN).error["code"] == "hop_refused"
    assert len(service.downloads) == 1


def test_a_whole_png_counts_whatever_length_was_announced(shell: Shell, service: FaultServer) -> None:
    service.play(PICTURE, file(png(), claimed_length=len(png()) + 100))
    assert shell.run(*RUN).code == 0


# The answer ----------------------------------------------------------------------------------------------------------


def test_an_empty_object_is_an_answer_without_a_picture(shell: Shell, service: FaultServer) -> None:
    service.play(GENERATE, json_answer({}))
    error = shell.run(*RUN).error
    assert (error["exit_code"], error["code"]) == (8, "no_image")
    assert "picture" in error["message"]


def test_a_cut_500_is_not_sent_again_even_if_its_code_can_be_read(shell: Shell, service: FaultServer) -> None:
    service.play(GENERATE, error(500, "InternalError", claimed_length=10_000))
    assert shell.run(*RUN).error["code"] == "outcome_unknown"
    assert len(service.posts) == 1


@pytest.mark.parametrize("status", [502, 504])
def test_a_gateways_status_is_never_sent_again_whatever_its_body_says(
    shell: Shell, service: FaultServer, status: int
) -> None:
    service.play(GENERATE, error(status, "InternalError"))
    said = shell.run(*RUN).error
    assert (said["exit_code"], said["retryable"]) == (6, False)
    assert len(service.posts) == 1


# Recovery ------------------------------------------------------------------------------------------------------------


def test_the_next_command_of_a_run_that_may_overwrite_does_overwrite(shell: Shell, service: FaultServer) -> None:
    (shell.folder / "out.png").write_bytes(b"old")
    failed = pay_without_fetching(shell, service, "--overwrite")
    command = failed.error["next_command"]
    assert "--overwrite" in shlex.split(command)
    done = subprocess.run(command, shell=True, cwd="/", env=shell.environment(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (shell.folder / "out.png").read_bytes() == png()


def test_the_next_command_of_a_recovery_goes_on_to_the_same_file(shell: Shell, service: FaultServer) -> None:
    pay_without_fetching(shell, service)
    (shell.folder / "n.webp").write_bytes(b"old")
    service.play(PICTURE, oss_error(404, "NoSuchKey", "not there yet"))
    command = recover(shell, "--output", "n.webp", "--overwrite").error["next_command"]
    service.play(PICTURE, file(png()))
    done = subprocess.run(command, shell=True, cwd="/", env=shell.environment(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    with Image.open(shell.folder / "n.webp") as image:
        assert image.format == "WEBP"


def test_a_recovery_alone_never_overwrites(shell: Shell, service: FaultServer) -> None:
    (shell.folder / "out.png").write_bytes(b"old")
    pay_without_fetching(shell, service, "--overwrite")
    response = recover(shell).json
    assert (shell.folder / "out.png").read_bytes() == b"old"
    assert response["image_path"] != str(shell.folder / "out.png")
    assert response["image_path"] in response["warnings"][0]


def test_a_warning_about_a_file_that_is_gone_does_not_come_back(shell: Shell, service: FaultServer) -> None:
    pay_without_fetching(shell, service)
    (shell.folder / "out.png").write_bytes(b"another")
    first = recover(shell).json
    assert first["warnings"]
    Path(first["image_path"]).unlink()
    assert "warnings" not in recover(shell, "--output", "new.png").json


def test_what_a_killed_recovery_leaves_does_not_stand_in_the_way(shell: Shell, service: FaultServer) -> None:
    pay_without_fetching(shell, service)
    (path,) = shell.evidence_files()
    gone = subprocess.Popen(["true"])
    gone.wait()
    leftovers = [
        shell.folder / f".{SKILL}-{path.stem}.{gone.pid}.part",
        path.parent / f".{path.stem}.{gone.pid}.part",
    ]
    for leftover in leftovers:
        leftover.write_bytes(b"half")
    assert recover(shell).code == 0
    assert not any(leftover.exists() for leftover in leftovers)


def test_a_saved_picture_is_had_in_another_format_without_network_and_without_touching_its_evidence(
    shell: Shell, service: FaultServer
) -> None:
    service.play(PICTURE, file(noise_png()))
    assert shell.run(*RUN).code == 0
    (path,) = shell.evidence_files()
    before = path.read_bytes()
    service.close()
    response = recover(shell, "--output", "copy.jpg").json
    with Image.open(response["image_path"]) as image:
        assert image.format == "JPEG"
    assert path.read_bytes() == before
    assert (shell.folder / "out.png").read_bytes() == noise_png()


def test_a_copy_that_fails_leaves_the_saved_picture_saved(shell: Shell, service: FaultServer) -> None:
    service.play(PICTURE, file(jpeg(1024, 1024, 1), "image/jpeg"))
    assert shell.run(*RUN).code == 0
    (path,) = shell.evidence_files()
    before = path.read_bytes()
    service.play(PICTURE, oss_error(404, "NoSuchKey", "gone"))
    assert recover(shell, "--output", "copy.webp").code == 8
    assert path.read_bytes() == before
    assert recover(shell).code == 0


def test_advice_names_the_evidence_and_not_a_placeholder(shell: Shell, service: FaultServer) -> None:
    service.play(GENERATE, Answer(hang_up="after-reading"))
    hint = shell.run(*RUN).error["hint"]
    (path,) = shell.evidence_files()
    assert f"--replay {shlex.quote(str(path))}" in hint
    assert str(path) in recover(shell).error["hint"]


def test_a_refused_prompt_is_not_advised_to_be_sent_again(shell: Shell, service: FaultServer) -> None:
    service.play(GENERATE, error(400, "DataInspectionFailed"))
    assert shell.run(*RUN).code == 5
    said = recover(shell).error
    assert said["code"] == "nothing_to_recover"
    assert "--replay" not in said["hint"]
    assert "consent" in said["hint"]


# Streams, signals, modes ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_picture_whose_path_cannot_be_told_on_stdout_is_told_on_stderr(shell: Shell, service: FaultServer) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            shell.command(*RUN),
            cwd=shell.folder,
            env=shell.environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert done.returncode == 0
    assert str(shell.folder / "out.png") in done.stderr.decode()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(("mode", "code"), [("--schema=request", 9), ("--help", 0), ("--version", 0)])
def test_data_that_nobody_takes_is_no_success(shell: Shell, mode: str, code: int) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            shell.command(mode),
            cwd=shell.folder,
            env=shell.environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert done.returncode == code
    assert b"Exception" not in done.stderr


def test_a_warning_is_told_once(shell: Shell, service: FaultServer) -> None:
    result = shell.run("--prompt", "x" * 900, "--output", "out.png")
    assert result.stderr.count("characters") == 1


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
def test_evidence_is_its_owners_whatever_the_umask(shell: Shell, service: FaultServer) -> None:
    for umask in (0o000, 0o077, 0o177):
        command = ["sh", "-c", f"umask {umask:o}; exec " + shlex.join(shell.command("--prompt", "x"))]
        done = subprocess.run(command, cwd=shell.folder, env=shell.environment(), capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
    assert {path.stat().st_mode & 0o777 for path in shell.evidence_files()} == {0o600}


def test_a_signal_before_the_request_leaves_is_known_not_to_be_billed() -> None:
    stop = Stop(5)
    stop.request("SIGTERM")
    call = HttpCall("POST", "http://127.0.0.1:9/", {}, b"{}")
    with pytest.raises(Stopped) as caught:
        exchange(call, stop, limit=1000, reach="loopback")
    assert caught.value.request_left is False


def test_null_never_stands_in_evidence(shell: Shell, service: FaultServer) -> None:
    service.play(GENERATE, good(usage={"width": None, "image_count": 1}))
    assert shell.run(*RUN).code == 0

    def values(value: Any) -> Iterator[Any]:
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        yield value
        for child in children:
            yield from values(child)

    assert None not in list(values(shell.evidence()))
    assert shell.evidence()["response"]["usage"] == {"image_count": 1}
    assert json.dumps(shell.evidence())
