"""The command line: its help, its streams, its modes, its files and its exit codes."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image

import mock_server
import zimage.batch.contract
from conftest import GENERATE, ROOT, SCRIPTS, SKILL, TEST_KEY, Result, Shell
from mock_server import MockServer
from zimage.contract import REQUIREMENTS, SCHEMAS, VERSION
from zimage.paths import excess_of

SMALL = ("--prompt", "a cat", "--size", "512x512")
IMAGES = "output/ai-image-zimage-turbo/images"
EVIDENCE = "output/alicloud-ai-image-zimage-turbo/evidence"
OPTIONS = [
    *("--request", "--file", "--prompt", "--replay", "--recover", "--check", "--deep", "--schema"),
    *("--size", "--aspect-ratio", "--seed", "--prompt-extend", "--no-prompt-extend", "--base-url"),
    *("--region", "--provider", "--output", "--overwrite", "--print-response", "--dry-run", "--timeout"),
    *("--max-retries", "--trust-host", "--accept-cost", "--quiet", "--version"),
]
MEANINGS = {  # exit code: a word that the help must say of it
    "0": "saved",
    "2": "invalid",
    "3": "key",
    "4": "balance",
    "5": "safety",
    "6": "rate",
    "7": "unknown",
    "8": "cannot be used",
    "9": "disk",
    "130": "interrupted",
    "143": "interrupted",
}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def saved_path(result: Result) -> Path:
    """The path on stdout, which must be all that stands there."""
    assert result.code == 0, result.stderr
    (line,) = result.stdout.splitlines()
    assert result.stdout == line + "\n"
    path = Path(line)
    assert path.is_absolute()
    assert path.is_file()
    return path


def posted(mock: MockServer) -> int:
    count: int = mock.stats()["generate_requests"]
    return count


# -- Help, version, usage ----------------------------------------------------------------------------------------------


def test_help_names_every_option_of_the_contract_and_no_other(shell: Shell) -> None:
    result = shell.run("--help")
    assert (result.code, result.stderr) == (0, "")
    assert set(re.findall(r"--[a-z][a-z-]*[a-z]", result.stdout)) == {*OPTIONS, "--help"}


def test_help_has_the_table_of_exit_codes(shell: Shell) -> None:
    text = shell.run("--help").stdout.partition("exit codes:")[2].partition("\n\n")[0]
    cells = [cell.strip() for line in text.splitlines() for cell in re.split(r" {2,}(?=\d)", line.strip())]
    found: dict[str, str] = {}
    for cell in filter(None, cells):
        codes, meaning = re.split(r" {2,}", cell, maxsplit=1)
        found |= dict.fromkeys(codes.split(", "), meaning)
    assert set(found) == set(MEANINGS)
    for code, word in MEANINGS.items():
        assert word in found[code], code


def test_help_fits_a_terminal_and_says_what_costs_money(shell: Shell) -> None:
    text = shell.run("--help").stdout
    assert max(len(line) for line in text.splitlines()) <= 120
    assert "cost" in text
    assert "DASHSCOPE_API_KEY" in text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_streams_are_utf8_whatever_the_terminal_is_set_to(shell: Shell, mock: MockServer, encoding: str) -> None:
    shell.use(mock)
    shell.env["PYTHONIOENCODING"] = encoding
    assert shell.run("--help").code == 0
    request = json.dumps({"prompt": "一只猫 ×", "size": "512*512"})
    result = shell.run("--request", request, "--print-response")
    assert result.code == 0, result.stderr
    assert result.json["prompt"] == "一只猫 ×"
    assert "一只猫" in Path(result.json["image_path"]).name
    refused = shell.run("--request", json.dumps({"prompt": "x", "一只猫": 1}), "--print-response")
    assert "一只猫" in refused.error["message"]
    assert "一只猫" in refused.stderr


def test_a_locale_without_utf8_costs_at_most_the_slug(shell: Shell, mock: MockServer) -> None:
    """Where the system cannot write the prompt into a file name the picture goes without, and stdout is UTF-8 still."""
    shell.use(mock)
    shell.env |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    request = json.dumps({"prompt": "一只猫 ×", "size": "512*512"})
    result = shell.run("--request", request, "--print-response")
    assert result.code == 0, result.stderr
    assert result.json["prompt"] == "一只猫 ×"
    assert Path(result.json["image_path"]).is_file()
    assert shell.evidence()["request"]["prompt"] == "一只猫 ×"
    assert shell.run("--help").code == 0


def test_version_is_one_line(shell: Shell) -> None:
    result = shell.run("--version")
    assert (result.code, result.stderr) == (0, "")
    assert re.fullmatch(r"generate_image\.py \d+\.\d+\.\d+\n", result.stdout)
    assert VERSION in result.stdout


@pytest.mark.parametrize("option", [o for o in OPTIONS if len(o) > len("--file")])
def test_no_option_can_be_abbreviated(shell: Shell, mock: MockServer, option: str) -> None:
    shell.use(mock)
    result = shell.call("--prompt", "a cat", option[:-1], "--print-response")
    assert result.code == 2
    assert result.error["code"] == "usage"
    assert option[:-1] in result.error["message"]
    assert mock.stats()["requests"] == []


VALUED = [
    "request",
    "prompt",
    "file",
    "replay",
    "recover",
    "schema",
    "size",
    "seed",
    "output",
    "provider",
    "trust-host",
]


@pytest.mark.parametrize("option", VALUED)
def test_a_value_may_be_two_dashes(shell: Shell, option: str) -> None:
    """Python's own reader of command lines drops it before 3.13; a prompt may be that."""
    mode = [] if option in ("request", "prompt", "file", "replay", "recover", "schema") else ["--prompt", "x"]
    result = shell.call(*mode, f"--{option}=--", "--dry-run")
    if option == "prompt":
        assert result.json["request"]["prompt"] == "--"
    else:
        assert result.code == 2 and result.error["code"] != "internal_error"
    assert shell.call("--prompt", "--", "--dry-run").error["code"] == "usage"


@pytest.mark.parametrize("arguments", [[], ["--bogus"], ["--prompt"], ["--prompt", "x", "--check"], ["--schema", "x"]])
def test_a_usage_error_is_json_only_where_json_was_asked_for(shell: Shell, arguments: list[str]) -> None:
    plain = shell.call(*arguments)
    assert plain.code == 2
    if not {"--check", "--schema"} & set(arguments):
        assert plain.stdout == ""
    plain.assert_one_line_of_advice()
    error = shell.call(*arguments, "--print-response").error
    assert (error["code"], error["billed"], error["retryable"]) == ("usage", "no", False)


# -- Streams -----------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_stdout_carries_the_path_alone(shell: Shell, mock: MockServer) -> None:
    shell.use(mock)
    result = shell.run(*SMALL)
    assert saved_path(result).parent == shell.folder / IMAGES
    assert result.stderr.splitlines()[1:] == [f"evidence: {shell.evidence_files()[0]}"]  # the first is of the mock


def test_stdout_carries_one_json_object_where_asked(shell: Shell, mock: MockServer) -> None:
    shell.use(mock)
    result = shell.run(*SMALL, "--print-response")
    assert result.code == 0
    assert Path(result.json["image_path"]).is_file()


@pytest.mark.parametrize("arguments", [["--check"], [*SMALL, "--dry-run"], ["--schema", "request"]])
def test_some_modes_always_print_json(shell: Shell, mock: MockServer, arguments: list[str]) -> None:
    shell.use(mock)
    plain = shell.call(*arguments, "--seed", "5") if "--dry-run" in arguments else shell.call(*arguments)
    assert plain.code == 0
    assert plain.json
    assert plain.stderr == ""
    assert shell.call(*arguments, "--print-response").json.keys() == plain.json.keys()
    assert shell.files() == []


def test_errors_of_these_modes_are_json_too(shell: Shell) -> None:
    assert shell.run("--check").error["code"] == "key_missing"
    assert shell.run("--schema", "x").error["code"] == "usage"
    assert shell.run("--prompt", "", "--dry-run").error["code"] == "invalid_request"


def test_an_error_without_json_leaves_stdout_empty(shell: Shell) -> None:
    with MockServer(rpm=0, faults="400") as mock:
        shell.use(mock)
        result = shell.run(*SMALL)
    assert (result.code, result.stdout) == (2, "")
    result.assert_one_line_of_advice()
    assert str(shell.evidence_files()[0]) in result.stderr


class Waiting(MockServer):
    """The mock service; it answers no generation request before `go` is set."""

    def __init__(self, evidence: Path) -> None:
        super().__init__(rpm=0)
        self.go = threading.Event()
        self.found: list[dict[str, Any]] = []
        self._evidence = evidence

    def __enter__(self) -> Waiting:
        self.start()
        return self

    def answer(self, request: mock_server.Request) -> mock_server.Reply:
        if request.method == "POST":
            self.found = [json.loads(path.read_text()) for path in self._evidence.glob("*.json")]
            self.go.wait(20)
        return super().answer(request)


def test_the_evidence_is_on_disk_and_named_before_the_request_leaves(shell: Shell) -> None:
    with Waiting(shell.folder / EVIDENCE) as mock:
        shell.use(mock)
        process = shell.start(*SMALL)
        assert process.stderr is not None
        assert process.stderr.readline().startswith(b"warning: DASHSCOPE_BASE_URL leads to 127.0.0.1")
        line = process.stderr.readline().decode()
        (path,) = shell.evidence_files()
        assert line == f"evidence: {path}\n"
        assert not list(shell.folder.glob(f"{IMAGES}/*.png"))
        mock.go.set()
        assert shell.finish(process).code == 0
    (evidence,) = mock.found
    assert evidence["status"] == "submitting"
    assert evidence["payload"]["input"]["messages"][0]["content"] == [{"text": "a cat"}]


def test_quiet_keeps_warnings_and_evidence_off_stderr_but_not_errors(shell: Shell) -> None:
    with MockServer(rpm=0, faults="image-big-size,400") as mock:
        shell.use(mock)
        result = shell.run("--prompt", "x" * 900, "--size", "512x512", "--quiet", "--print-response")
        assert (result.code, result.stderr) == (0, "")
        assert len(result.json["warnings"]) == 2
        failed = shell.run(*SMALL, "--quiet")
    assert (failed.code, failed.stdout) == (2, "")
    failed.assert_one_line_of_advice()


def test_no_terminal_and_no_stdin_are_needed(shell: Shell, mock: MockServer) -> None:
    shell.use(mock)
    done = subprocess.run(
        shell.command(*SMALL),
        cwd=shell.folder,
        env=shell.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
        start_new_session=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_stdout_that_takes_nothing_loses_no_picture(shell: Shell, mock: MockServer) -> None:
    shell.use(mock)
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            shell.command(*SMALL),
            cwd=shell.folder,
            env=shell.environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    assert shell.evidence()["status"] == "saved"
    assert Path(shell.evidence()["image"]["path"]).is_file()


# -- --dry-run ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_tells_the_whole_plan_and_does_nothing(shell: Shell, mock: MockServer) -> None:
    shell.use(mock)
    plan = shell.run(*SMALL, "--seed", "5", "--output", "out/cat.webp", "--dry-run").json
    assert plan["request"] == {"prompt": "a cat", "size": "512*512", "seed": 5, "prompt_extend": False}
    assert plan["endpoint"] == mock.endpoint
    assert plan["payload"] == {
        "model": "z-image-turbo",
        "input": {"messages": [{"role": "user", "content": [{"text": "a cat"}]}]},
        "parameters": {"size": "512*512", "prompt_extend": False, "seed": 5},
    }
    assert plan["output"] == str(shell.folder / "out" / "cat.webp")
    assert plan["billable"] is True
    assert plan["estimated_cost"] == 0.01434
    assert plan["key_source"] == "environment DASHSCOPE_API_KEY"
    assert mock.api_key not in json.dumps(plan)
    assert plan["problems"] == []
    assert mock.stats()["requests"] == []
    assert shell.files() == []
    assert list(shell.folder.iterdir()) == []


def test_a_dry_run_lists_all_that_would_stop_it(shell: Shell) -> None:
    (shell.folder / "cat.png").write_text("mine")
    plan = shell.run(*SMALL, "--output", "cat.png", "--dry-run").json
    assert {problem["code"] for problem in plan["problems"]} == {"key_missing", "output_exists"}
    assert {problem["exit_code"] for problem in plan["problems"]} == {2, 3}
    assert plan["key_source"] is None
    assert shell.files() == ["cat.png"]
    (shell.folder / "file").write_text("no folder")
    plan = shell.run(*SMALL, "--output", "file/cat.png", "--dry-run").json
    assert {problem["code"] for problem in plan["problems"]} == {"key_missing", "disk"}


def test_what_a_dry_run_promises_is_what_is_sent(shell: Shell, mock: MockServer) -> None:
    shell.use(mock)
    arguments = ("--prompt", "a cat", "--aspect-ratio", "9:21", "--seed", "5", "--output", "cat.png")
    plan = shell.run(*arguments, "--dry-run").json
    assert shell.run(*arguments).code == 0
    evidence = shell.evidence()
    for name in ("request", "payload", "output", "endpoint", "provider", "region", "billable"):
        assert evidence[name] == plan[name], name
    assert evidence["cost"]["estimate"] == plan["estimated_cost"]


# -- --check -----------------------------------------------------------------------------------------------------------


def test_a_check_is_free_queries_only(shell: Shell, mock: MockServer) -> None:
    shell.use(mock)
    found = shell.run("--check").json
    assert len(found.pop("warnings")) == 1  # of the mock
    assert found == {
        "ok": True,
        "provider": "dashscope",
        "region": "unknown",
        "endpoint": mock.endpoint,
        "endpoint_source": "DASHSCOPE_BASE_URL",
        "key_source": "environment DASHSCOPE_API_KEY",
        "model_listed": True,
    }
    asked = [(request["method"], request["path"]) for request in mock.stats()["requests"]]
    assert asked == [("GET", "/api/v1/models"), ("GET", "/api/v1/quotas")]
    assert shell.files() == []


class Unlisting(MockServer):
    """The mock service of an account whose list of models is empty."""

    def answer(self, request: mock_server.Request) -> mock_server.Reply:
        super().answer(request)
        return mock_server.json_reply({"request_id": "r", "output": {"models": [], "total": 0}})


def test_a_model_that_is_not_listed_is_no_error(shell: Shell) -> None:
    with Unlisting(rpm=0) as mock:
        shell.use(mock)
        answer = shell.run("--check").json
    assert (answer["ok"], answer["model_listed"]) == (True, False)


def test_a_check_tells_a_wrong_key(shell: Shell, mock: MockServer) -> None:
    shell.use(mock)
    shell.env["DASHSCOPE_API_KEY"] = TEST_KEY
    result = shell.run("--check")
    assert result.code == 3
    error = result.error
    assert (error["code"], error["service_code"], error["billed"]) == ("key_rejected", "InvalidApiKey", "no")
    assert shell.files() == []


def test_a_check_tells_in_seconds_that_nobody_is_there(shell: Shell) -> None:
    with MockServer(rpm=0) as mock:
        shell.use(mock)
    start = time.monotonic()
    result = shell.run("--check")
    assert result.code == 6
    assert time.monotonic() - start < 10
    assert (result.error["code"], result.error["billed"]) == ("unreachable", "no")
    assert shell.files() == []


# -- --replay ----------------------------------------------------------------------------------------------------------


def test_a_replay_makes_the_same_request_again_under_a_new_name(shell: Shell, mock: MockServer) -> None:
    shell.use(mock)
    first = saved_path(shell.run(*SMALL, "--prompt-extend"))
    (evidence,) = shell.evidence_files()
    before = evidence.read_bytes()
    shell.env |= {"DASHSCOPE_BASE_URL": "https://dashscope.aliyuncs.com", "DASHSCOPE_HTTP_BASE_URL": mock.base_url}
    second = saved_path(shell.run("--replay", str(evidence)))
    assert second != first
    assert second.read_bytes() == first.read_bytes(), "the mock draws the same for the same request"
    assert evidence.read_bytes() == before
    assert posted(mock) == 2
    payloads = mock.stats()["payloads"]
    assert payloads[0] == payloads[1]
    old, new = (json.loads(path.read_text()) for path in shell.evidence_files())
    for name in ("request", "payload", "endpoint", "provider", "region"):
        assert old[name] == new[name]


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        (["--seed", "6"], {"seed": 6}),
        (["--seed", "-1"], {}),
        (["--size", "640x640"], {"size": "640*640"}),
        (["--prompt-extend"], {"prompt_extend": True}),
    ],
)
def test_flags_win_over_the_replayed_request(
    shell: Shell, mock: MockServer, flags: list[str], changed: dict[str, Any]
) -> None:
    shell.use(mock)
    assert shell.call(*SMALL, "--seed", "5").code == 0
    plan = shell.call("--replay", str(shell.evidence_files()[0]), *flags, "--dry-run").json
    expected = {"prompt": "a cat", "size": "512*512", "seed": 5, "prompt_extend": False} | changed
    if flags == ["--seed", "-1"]:
        expected["seed"] = plan["request"]["seed"]
        assert plan["request"]["seed"] != 5, "one in two thousand million times this is chance"
    assert plan["request"] == expected


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b"\xff", b'{"schema_version": 1}', b'{"schema_version": 99}', b"\x89PNG\r\n\x1a\n"],
)
@pytest.mark.parametrize("mode", ["--replay", "--recover"])
def test_what_is_no_evidence_file_is_refused(shell: Shell, mock: MockServer, mode: str, content: bytes) -> None:
    shell.use(mock)
    (shell.folder / "evidence.json").write_bytes(content)
    result = shell.call(mode, "evidence.json", "--print-response")
    assert result.code == 2
    assert result.error["code"] == "invalid_evidence"
    assert "evidence.json" in result.error["message"]
    assert mock.stats()["requests"] == []


# -- Output ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "faults", "kind", "converted_from"),
    [
        ("cat.png", "", "PNG", None),
        ("cat.PNG", "", "PNG", None),
        ("cat.jpg", "", "JPEG", "PNG"),
        ("cat.JPG", "", "JPEG", "PNG"),
        ("cat.webp", "", "WEBP", "PNG"),
        ("cat.jpg", "image-jpeg", "JPEG", None),
        ("cat.JPEG", "image-jpeg", "JPEG", None),
        ("cat.png", "image-jpeg", "PNG", "JPEG"),
    ],
)
def test_the_services_bytes_are_kept_or_converted_with_both_hashes(
    shell: Shell, name: str, faults: str, kind: str, converted_from: str | None
) -> None:
    with MockServer(rpm=0, faults=faults) as mock:
        shell.use(mock)
        path = saved_path(shell.call(*SMALL, "--output", f"new folder/猫/{name}"))
        evidence = shell.evidence()
        served = requests.get(evidence["response"]["image_url"], timeout=10).content
    assert path == shell.folder / "new folder" / "猫" / name
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        assert (image.format, image.size) == (kind, (512, 512))
    record = evidence["image"]
    assert (record["path"], record["format"], record["bytes"]) == (str(path), kind, len(content))
    assert (record["width"], record["height"]) == (512, 512)
    assert record["sha256"] == sha256(content)
    assert record.get("source_format") == converted_from
    assert record.get("source_sha256") == (sha256(served) if converted_from else None)
    assert (content == served) is (converted_from is None)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "cat.gif",
            "cat.jfif",
            "cat.bmp",
            "cat",
            "cat.",
            "cat.png.txt",
            ".png",
            "..png",
            "folder",
            "folder.png",
            "new/",
        ),
        *(".", "..", "", "cat.png/", "cat\n.png", "x" * 300 + ".png"),
        pytest.param("new/" + "é" * 150 + "/cat.png", id="long folder"),
        pytest.param(("x" * 240 + "/") * 17 + "cat.png", id="long path"),
        pytest.param("x/" * 2100 + "cat.png", id="many folders"),
    ],
)
def test_refuses_an_output_that_cannot_be_before_paying(shell: Shell, mock: MockServer, name: str) -> None:
    shell.use(mock)
    for folder in ("folder", "folder.png"):
        (shell.folder / folder).mkdir()
    result = shell.call(*SMALL, "--output", name, "--print-response")
    assert result.code == 2
    assert "--output" in result.error["message"]
    assert mock.stats()["requests"] == []
    assert shell.files() == []


@pytest.mark.parametrize(("platform", "longest"), [("linux", 4095), ("darwin", 1023), ("win32", 259), ("aix", 1023)])
@pytest.mark.parametrize(("name", "beside"), [("a.png", 80), ("a" * 100 + ".png", 130), ("a" * 250 + ".png", 255)])
def test_a_path_has_room_for_what_lies_beside_the_picture(platform: str, longest: int, name: str, beside: int) -> None:
    assert excess_of(Path("/" + "x" * 99, name), platform) == 100 + 1 + beside - longest


def test_windows_counts_characters() -> None:
    assert excess_of(Path("/" + "猫" * 100, "a.png"), "win32") == 101 + 1 + 80 - 259
    assert excess_of(Path("/" + "猫" * 100, "a.png"), "linux") == 301 + 1 + 80 - 4095


@pytest.mark.parametrize("target", ["file", "link", "dangling link"])
def test_refuses_to_overwrite_before_paying(shell: Shell, mock: MockServer, target: str) -> None:
    shell.use(mock)
    taken = shell.folder / "cat.png"
    if target == "file":
        taken.write_text("mine")
    else:
        taken.symlink_to(shell.folder / "elsewhere")
        if target == "link":
            taken.write_text("mine")
    before = shell.files()
    result = shell.call(*SMALL, "--output", "cat.png", "--print-response")
    assert result.code == 2
    assert result.error["code"] == "output_exists"
    assert str(taken) in result.error["message"]
    assert mock.stats()["requests"] == []
    assert shell.files() == before
    if target != "dangling link":
        assert taken.read_text() == "mine"


def test_overwrites_where_it_is_told_to(shell: Shell, mock: MockServer) -> None:
    shell.use(mock)
    (shell.folder / "cat.png").write_text("mine")
    assert saved_path(shell.run(*SMALL, "--output", "cat.png", "--overwrite")) == shell.folder / "cat.png"
    assert (shell.folder / "cat.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_run_leaves_the_file_that_it_may_overwrite(shell: Shell) -> None:
    with MockServer(rpm=0, faults="400,image-corrupt") as mock:
        shell.use(mock)
        (shell.folder / "cat.png").write_text("mine")
        for code in (2, 8):
            assert shell.run(*SMALL, "--output", "cat.png", "--overwrite").code == code
            assert (shell.folder / "cat.png").read_text() == "mine"


def test_a_name_taken_meanwhile_is_not_replaced_and_the_picture_is_not_lost(shell: Shell) -> None:
    with Waiting(shell.folder / EVIDENCE) as mock:
        shell.use(mock)
        process = shell.start(*SMALL, "--output", "cat.png", "--print-response")
        assert process.stderr is not None
        assert any(line.startswith(b"evidence: ") for line in process.stderr)
        (shell.folder / "cat.png").write_text("mine")
        mock.go.set()
        result = shell.finish(process)
    assert result.code == 0
    assert (shell.folder / "cat.png").read_text() == "mine"
    path = Path(result.json["image_path"])
    assert path == shell.folder / f"cat-{shell.evidence_files()[0].stem}.png"
    assert path.is_file()
    assert any(str(path) in warning for warning in result.json["warnings"])


def test_refuses_an_unwritable_place_before_paying(shell: Shell, mock: MockServer) -> None:
    shell.use(mock)
    (shell.folder / "file").write_text("no folder")
    result = shell.run(*SMALL, "--output", "file/cat.png", "--print-response")
    assert result.code == 9
    assert (result.error["code"], result.error["billed"]) == ("disk", "no")
    shell.env["OUTPUT_DIR"] = "file"
    assert shell.run(*SMALL, "--output", "cat.png", "--print-response").error["code"] == "disk"
    assert mock.stats()["requests"] == []
    assert shell.files() == ["file"]


@pytest.mark.parametrize("where", ["results", "../results", "{absolute}/a/b"])
def test_output_dir_moves_images_and_evidence(shell: Shell, mock: MockServer, where: str) -> None:
    shell.use(mock)
    shell.env["OUTPUT_DIR"] = where.format(absolute=shell.home)
    base = Path(os.path.abspath(shell.folder / shell.env["OUTPUT_DIR"]))
    response = shell.run(*SMALL, "--print-response").json
    assert Path(response["image_path"]).parent == base / "ai-image-zimage-turbo" / "images"
    assert Path(response["evidence_path"]).parent == base / "alicloud-ai-image-zimage-turbo" / "evidence"
    assert not (shell.folder / "output").exists()


def test_an_output_dir_that_cannot_be_is_named(shell: Shell, mock: MockServer) -> None:
    shell.use(mock)
    shell.env["OUTPUT_DIR"] = "two\nlines"
    result = shell.run(*SMALL, "--print-response")
    assert result.code == 2
    assert "OUTPUT_DIR" in result.error["message"]
    assert mock.stats()["requests"] == []


@pytest.mark.skipif(os.name == "nt", reason="needs sh")
@pytest.mark.parametrize("mode", ["--print-response", "--dry-run"])
def test_a_working_folder_that_is_gone_is_no_fault_of_the_tool(shell: Shell, mock: MockServer, mode: str) -> None:
    shell.use(mock)
    command = shlex.join(shell.command(*SMALL, mode))
    (shell.folder / "gone").mkdir()
    done = subprocess.run(
        ["sh", "-c", f"cd gone && rmdir ../gone && exec {command}"],
        cwd=shell.folder,
        env=shell.environment(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    result = Result(done.returncode, done.stdout.decode(), done.stderr.decode())
    assert result.code == 9
    assert (result.error["code"], result.error["billed"]) == ("disk", "no")
    assert mock.stats()["requests"] == []


@pytest.mark.parametrize(
    ("prompt", "slug"),
    [
        ("a cat", "a-cat"),
        ("A  Cat, in: the/Rain!", "a-cat-in-the-rain"),
        ("一只猫，在雨里", "一只猫-在雨里"),
        ("../../etc/passwd", "etc-passwd"),
        ("C:\\Windows\\con", "c-windows-con"),
        ("🐈🐈", ""),
        ("-rf *", "rf"),
        ("x" * 500, None),
        ("猫" * 500, None),
    ],
)
def test_a_picture_is_named_as_its_evidence_and_by_its_prompt(
    shell: Shell, mock: MockServer, prompt: str, slug: str | None
) -> None:
    shell.use(mock)
    path = saved_path(shell.call(f"--prompt={prompt}", "--size", "512x512"))
    (evidence,) = shell.evidence_files()
    assert path.parent == shell.folder / IMAGES
    if slug is None:
        assert path.name.startswith(f"{evidence.stem}-{prompt[:5]}")
        assert len(os.fsencode(path.name)) < 200
    else:
        assert path.name == "-".join(filter(None, [evidence.stem, slug])) + ".png"


def test_a_picture_of_another_size_is_saved_with_a_warning(shell: Shell) -> None:
    with MockServer(rpm=0, faults="image-big-size") as mock:
        shell.use(mock)
        result = shell.run(*SMALL, "--print-response")
    assert result.code == 0
    response = result.json
    assert (response["width"], response["height"], response["size"]) == (576, 576, "512*512")
    (warning,) = response["warnings"]
    assert "576*576" in warning
    assert "512*512" in warning
    assert f"warning: {warning}" in result.stderr


# -- Evidence ----------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_the_evidence_holds_what_was_asked_paid_and_saved(shell: Shell, mock: MockServer) -> None:
    shell.use(mock)
    before = datetime.now(timezone.utc)
    response = shell.run(*SMALL, "--seed", "5", "--prompt-extend", "--print-response").json
    (path,) = shell.evidence_files()
    assert re.fullmatch(r"\d{8}T\d{6}Z-[0-9a-f]{8}\.json", path.name)
    evidence = shell.evidence()
    assert evidence["schema_version"] == 1
    assert evidence["tool"] == {"name": "alicloud-ai-image-zimage-turbo", "version": VERSION}
    assert evidence["status"] == "saved"
    assert (evidence["provider"], evidence["region"], evidence["endpoint"]) == ("dashscope", "unknown", mock.endpoint)
    assert (evidence["operation"], evidence["billable"]) == ("image.generate", True)
    assert evidence["request"] == {"prompt": "a cat", "size": "512*512", "seed": 5, "prompt_extend": True}
    assert evidence["payload"]["parameters"] == {"size": "512*512", "prompt_extend": True, "seed": 5}
    assert Path(evidence["output"]).is_absolute()
    moments = [datetime.fromisoformat(evidence[f"{n}_at"].replace("Z", "+00:00")) for n in STEPS]
    assert moments == sorted(moments)
    assert abs((moments[0] - before).total_seconds()) < 30
    assert set(evidence["timings_ms"]) >= {"generate", "download", "total"}
    assert all(0 <= value < 60_000 for value in evidence["timings_ms"].values())
    (attempt,) = evidence["attempts"]
    assert attempt["http_status"] == 200
    said = evidence["response"]
    assert said["request_id"] == response["request_id"]
    assert said["image_url"] == response["image_url"]
    assert said["usage"]["image_count"] == 1
    assert said["rewritten_prompt"] == response["rewritten_prompt"]
    assert said["reasoning"] == response["reasoning"]
    expires = datetime.fromisoformat(said["expires_at"].replace("Z", "+00:00"))
    assert 23.9 * 3600 < (expires - before).total_seconds() < 24.1 * 3600
    assert evidence["image"]["path"] == response["image_path"]
    assert evidence["image"]["sha256"] == sha256(Path(response["image_path"]).read_bytes())
    cost = evidence["cost"]
    assert (cost["estimate"], cost["currency"]) == (0.02868, "USD")
    assert cost["basis"]
    assert re.match(r"20\d\d", cost["price_list_date"])
    assert "error" not in evidence


STEPS = ("started", "generated", "finished")


def test_the_evidence_of_a_retried_run_holds_every_attempt(shell: Shell) -> None:
    with MockServer(rpm=0, faults="429,503") as mock:
        shell.use(mock)
        assert shell.run(*SMALL).code == 0
    attempts = shell.evidence()["attempts"]
    assert [attempt["http_status"] for attempt in attempts] == [429, 503, 200]
    assert [attempt.get("service_code") for attempt in attempts] == [
        "Throttling.RateQuota",
        "ServiceUnavailable",
        None,
    ]
    assert [attempt.get("wait_s", 0) > 0 for attempt in attempts] == [True, True, False]
    assert len({attempt["at"] for attempt in attempts}) == 3


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
@pytest.mark.parametrize(("umask", "image_mode"), [(0o000, 0o666), (0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_the_evidence_is_its_owners_alone_and_the_image_as_the_umask_says(
    shell: Shell, mock: MockServer, umask: int, image_mode: int
) -> None:
    shell.use(mock)
    before = os.umask(umask)
    try:
        path = saved_path(shell.run(*SMALL))
        converted = saved_path(shell.run(*SMALL, "--output", "cat.jpg"))
    finally:
        os.umask(before)
    for evidence in shell.evidence_files():
        assert stat.S_IMODE(evidence.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.stat().st_mode) == image_mode
    assert stat.S_IMODE(converted.stat().st_mode) == image_mode


def test_git_ignores_the_evidence(shell: Shell, mock: MockServer) -> None:
    shell.use(mock)
    assert shell.run(*SMALL, "--output", "cat.png").code == 0
    assert (shell.folder / EVIDENCE / ".gitignore").read_text() == "*\n"
    assert set(shell.files()) == {
        "cat.png",
        f"{EVIDENCE}/.gitignore",
        f"{EVIDENCE}/{shell.evidence_files()[0].name}",
    }


# -- Exit codes --------------------------------------------------------------------------------------------------------

OUTCOMES = [  # faults of the mock, exit code, error code, billed, status of the evidence, paid calls made
    ("400", 2, "rejected_by_service", "no", "failed", 1),
    ("404", 2, "not_found", "no", "failed", 1),
    ("401", 3, "key_rejected", "no", "failed", 1),
    ("403", 3, "access_denied", "no", "failed", 1),
    ("arrearage", 4, "balance", "no", "failed", 1),
    ("quota", 4, "quota", "no", "failed", 1),
    ("quota-429", 4, "quota", "no", "failed", 1),
    ("blocked", 5, "blocked", "no", "failed", 1),
    ("429-long", 6, "rate_limited", "no", "failed", 1),
    ("429*inf", 6, "rate_limited", "no", "failed", 2),
    ("500*inf", 6, "service_failing", "no", "failed", 2),
    ("503*inf", 6, "service_failing", "no", "failed", 2),
    ("502", 7, "outcome_unknown", "unknown", "unknown", 1),
    ("504", 7, "outcome_unknown", "unknown", "unknown", 1),
    ("500-html", 7, "outcome_unknown", "unknown", "unknown", 1),
    ("timeout", 7, "outcome_unknown", "unknown", "unknown", 1),
    ("hangup-after", 7, "outcome_unknown", "unknown", "unknown", 1),
    ("cut-answer", 7, "outcome_unknown", "unknown", "unknown", 1),
    ("redirect", 7, "outcome_unknown", "unknown", "unknown", 1),
    ("no-image", 8, "no_image", "unknown", "unknown", 1),
    ("image-corrupt", 8, "image_unusable", "yes", "generated", 1),
    ("image-html", 8, "image_unusable", "yes", "generated", 1),
    ("image-bomb", 8, "image_unusable", "yes", "generated", 1),
    ("image-expired", 8, "link_expired", "yes", "generated", 1),
    ("image-redirect-loop", 8, "hop_refused", "yes", "generated", 1),
]


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("faults", "code", "name", "billed", "status", "calls"), OUTCOMES, ids=[outcome[0] for outcome in OUTCOMES]
)
def test_every_outcome_has_its_exit_code(
    shell: Shell, faults: str, code: int, name: str, billed: str, status: str, calls: int
) -> None:
    with MockServer(rpm=0, faults=faults) as mock:
        shell.use(mock)
        result = shell.call(*SMALL, "--max-retries", "1", "--print-response")
        assert posted(mock) == calls
    assert result.code == code, result.stdout
    error = result.error
    assert (error["code"], error["billed"]) == (name, billed)
    assert error["retryable"] is (code == 6), "only what surely was not billed may be run again unasked"
    assert error["evidence_path"] == str(shell.evidence_files()[0])
    assert shell.evidence()["status"] == status
    assert not list(shell.folder.glob(f"{IMAGES}/*"))


def test_an_outcome_tells_what_the_service_said(shell: Shell) -> None:
    with MockServer(rpm=0, faults="429-long") as mock:
        shell.use(mock)
        start = time.monotonic()
        error = shell.run(*SMALL, "--print-response").error
        assert time.monotonic() - start < 5, "at once"
    assert (error["http_status"], error["service_code"]) == (429, "Throttling.RateQuota")
    assert error["retry_after_s"] == 3600
    assert error["request_id"]


@pytest.mark.parametrize("faults", ["429", "429-wait", "500", "503", "image-500", "image-cut"])
def test_what_surely_was_not_billed_is_tried_again_by_itself(shell: Shell, faults: str) -> None:
    with MockServer(rpm=0, faults=faults) as mock:
        shell.use(mock)
        saved_path(shell.call(*SMALL))
        assert mock.stats()["billed"] == 1


def test_a_paid_picture_that_is_not_down_yet_is_fetched_by_the_next_command(shell: Shell) -> None:
    with MockServer(rpm=0, faults="image-404") as mock:
        shell.use(mock)
        error = shell.run(*SMALL, "--print-response").error
        assert error["image_url"].startswith("http://127.0.0.1")
        evidence = json.loads(shell.evidence_files()[0].read_text())
        assert evidence["response"]["image_url"] == error["image_url"]
        command = error["next_command"]
        assert shell.run("--check").code == 0
        mock_calls = posted(mock)
        done = subprocess.run(
            ["sh", "-c", command], cwd=shell.home, env=shell.environment(), capture_output=True, check=False
        )
        assert done.returncode == 8, "the link still is not there"
        assert json.loads(done.stdout)["error"]["billed"] == "yes"
        assert posted(mock) == mock_calls


# -- The script as it is handed on -------------------------------------------------------------------------------------

SEED_COMMAND = """\
python skills/ai/image/alicloud-ai-image-zimage-turbo/scripts/generate_image.py \\
  --request '{"prompt":"a fishing scene at dawn, cinematic, realistic","size":"1024*1024"}' \\
  --output output/ai-image-zimage-turbo/images/fishing.png \\
  --print-response
"""


@pytest.mark.skipif(os.name == "nt", reason="needs sh")
def test_the_command_of_the_seeds_works_to_the_letter_from_a_clone(shell: Shell, mock: MockServer) -> None:
    shell.use(mock)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(SKILL, shell.folder / "skills/ai/image/alicloud-ai-image-zimage-turbo", ignore=ignore)
    commands = shell.home / "bin"
    commands.mkdir()
    python = commands / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    env = shell.environment() | {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", "-c", SEED_COMMAND], cwd=shell.folder, env=env, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    response = json.loads(done.stdout)
    assert response["image_path"] == str(shell.folder / "output/ai-image-zimage-turbo/images/fishing.png")
    assert (response["width"], response["height"]) == (1024, 1024)
    (sent,) = mock.stats()["payloads"]
    assert sent["prompt"] == "a fishing scene at dawn, cinematic, realistic"
    assert sent["parameters"]["size"] == "1024*1024"


def test_the_copied_scripts_work_in_an_empty_folder(shell: Shell, mock: MockServer) -> None:
    shell.use(mock)
    shutil.copytree(SCRIPTS, shell.home / "alone", ignore=shutil.ignore_patterns("__pycache__"))
    shell.script = shell.home / "alone" / "generate_image.py"
    saved_path(shell.run(*SMALL))
    for arguments in (["--help"], ["--version"], ["--check"], ["--schema", "evidence"], [*SMALL, "--dry-run"]):
        assert shell.run(*arguments).code == 0


def test_the_script_without_its_modules_says_what_it_needs(shell: Shell) -> None:
    shell.script = Path(shutil.copy(GENERATE, shell.home))
    result = shell.run(*SMALL)
    result.assert_one_line_of_advice()
    assert result.code == 2
    assert "zimage/" in result.stderr


PACKAGES = tuple(REQUIREMENTS.values())
BLOCKER = """\
import sys


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)


sys.meta_path.insert(0, Blocker())
"""


def block(shell: Shell, *names: str) -> None:
    """Have the script's interpreter find none of these packages."""
    folder = shell.home / "blocker"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BLOCKER.format(names=names))
    shell.env["PYTHONPATH"] = str(folder)


def assert_says_how_to_install(result: Result) -> None:
    assert result.code == 2, result.stderr
    error = result.error
    assert (error["code"], error["billed"]) == ("missing_package", "no")
    advice = result.stderr.strip().splitlines()[-1]
    for requirement in PACKAGES:
        assert requirement in advice
    assert "uv run --script" in advice
    assert "venv" in advice
    assert "pip install" in advice


@pytest.mark.parametrize("arguments", [[*SMALL, "--print-response"], ["--check"], [*SMALL, "--dry-run"]])
def test_an_interpreter_without_packages_is_told_how_to_install_all(shell: Shell, arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(GENERATE), *arguments],
        cwd=shell.folder,
        env=shell.environment() | {"DASHSCOPE_API_KEY": TEST_KEY},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    assert_says_how_to_install(Result(done.returncode, done.stdout, done.stderr))
    assert shell.files() == []


@pytest.mark.parametrize("names", [("requests",), ("jsonschema",), ("PIL",), ("urllib3",), ("PIL", "requests")])
def test_one_missing_package_is_found_before_paying(shell: Shell, mock: MockServer, names: tuple[str, ...]) -> None:
    shell.use(mock)
    block(shell, *names)
    assert_says_how_to_install(shell.run(*SMALL, "--print-response"))
    assert mock.stats()["requests"] == []
    assert shell.files() == []


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("PIL", SMALL),
        ("requests", SMALL),
        ("requests", ("--check",)),
        ("jsonschema", ("--prompt", "a cat", "--size", "1x1")),
    ],
)
def test_a_broken_package_is_found_before_paying(
    shell: Shell, mock: MockServer, name: str, arguments: tuple[str, ...]
) -> None:
    shell.use(mock)
    (shell.home / "broken" / name).mkdir(parents=True)
    (shell.home / "broken" / name / "__init__.py").write_text("raise ImportError('built for another machine')\n")
    shell.env["PYTHONPATH"] = str(shell.home / "broken")
    assert_says_how_to_install(shell.run(*arguments, "--print-response"))
    assert mock.stats()["requests"] == []
    assert shell.files() == []


@pytest.mark.smoke
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *(["--schema", n] for n in SCHEMAS)])
def test_what_needs_no_package_imports_none(shell: Shell, arguments: list[str]) -> None:
    block(shell, "requests", "jsonschema", "PIL", "urllib3")
    result = shell.run(*arguments)
    assert result.code == 0, result.stderr
    assert result.stderr == ""
    del shell.env["PYTHONPATH"]
    shell.env["PYTHONPROFILEIMPORTTIME"] = "1"
    imported = {line.rpartition("|")[2].strip() for line in shell.run(*arguments).stderr.splitlines()}
    assert "argparse" in imported
    assert not {"requests", "jsonschema", "PIL", "urllib3", "http.client", "ssl", "sqlite3"} & imported


def test_a_dry_run_does_not_load_what_it_does_not_need(shell: Shell) -> None:
    shell.env["PYTHONPROFILEIMPORTTIME"] = "1"
    done = subprocess.run(
        shell.command(*SMALL, "--dry-run"), cwd=shell.folder, env=shell.environment(), capture_output=True, check=True
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.decode().splitlines()}
    assert "argparse" in imported
    assert not {"requests", "urllib3", "PIL.Image"} & imported


def test_old_pythons_can_read_the_script_and_are_told_which_one_they_need(shell: Shell) -> None:
    ast.parse(GENERATE.read_text(encoding="utf-8"), feature_version=(3, 8))
    pretend = "import runpy, sys; sys.version_info = (3, 9, 18, 'final', 0); sys.argv = sys.argv[1:]"
    done = subprocess.run(
        [sys.executable, "-c", f"{pretend}; runpy.run_path(sys.argv[0], run_name='__main__')", str(GENERATE), *SMALL],
        cwd=shell.folder,
        env=shell.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    result = Result(done.returncode, done.stdout, done.stderr)
    result.assert_one_line_of_advice()
    assert "3.10" in result.stderr
    assert result.stdout == ""
    assert result.code == 2
    assert shell.files() == []


@pytest.mark.parametrize(
    ("script", "requirements"),
    [
        (GENERATE, REQUIREMENTS),
        (SCRIPTS / "generate_batch.py", zimage.batch.contract.BATCH_REQUIREMENTS),
    ],
    ids=["image", "batch"],
)
def test_the_inline_metadata_names_the_same_requirements(script: Path, requirements: dict[str, str]) -> None:
    """PEP 723, read with the expression of that document."""
    expression = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
    (block_,) = re.finditer(expression, script.read_text(encoding="utf-8"))
    assert block_["type"] == "script"
    content = "".join(line[2:] for line in block_["content"].splitlines(keepends=True))
    assert re.findall(r'^requires-python = "(.*)"$', content, re.M) == [">=3.10"]
    (listed,) = re.findall(r"^dependencies = (\[.*\])", content, re.M | re.S)
    assert ast.literal_eval(listed) == list(requirements.values())
    assert set(requirements.values()) <= set((ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines())


def test_a_pipe_that_nobody_feeds_ends_in_time_with_one_error(shell: Shell) -> None:
    """Python aborts where a thread still reads standard input at the interpreter's end."""
    process = subprocess.Popen(
        shell.command("--file", "-", "--timeout", "1", "--print-response"),
        cwd=shell.folder,
        env=shell.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    shell.keep(process)
    assert process.wait(timeout=30) == 2
    assert shell.finish(process).error["code"] == "file_unreadable"


def test_an_import_of_the_script_does_nothing(shell: Shell) -> None:
    code = "import signal; before = signal.getsignal(signal.SIGINT); import generate_image"
    done = subprocess.run(
        [sys.executable, "-B", "-c", f"{code}; assert signal.getsignal(signal.SIGINT) is before"],
        cwd=shell.folder,
        env=shell.environment() | {"PYTHONPATH": str(GENERATE.parent)},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
