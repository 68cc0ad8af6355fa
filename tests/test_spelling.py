"""What users write in their own way: paths with `~` or of Windows, ratios as sizes, seeds of other tools.

Understood where it is plain what is meant; else the right option is named, before anything is paid.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from batch_helpers import BATCH, Batch
from conftest import SCRIPTS, Shell
from fault_server import FaultServer
from mock_server import MockServer
from zimage.errors import Failure
from zimage.paths import user_path

ASK = ("--prompt", "a cat", "--size", "512x512", "--print-response")


@pytest.fixture
def batch(shell: Shell, service: FaultServer) -> Batch:
    return Batch(shell, service)


# Paths ----------------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_a_tilde_is_the_home_folder_in_every_option_of_one_picture(shell: Shell, mock: MockServer) -> None:
    shell.use(mock)
    (shell.home / "request.json").write_text('{"prompt": "a fox", "size": "512*512"}', encoding="utf-8")
    shell.env["OUTPUT_DIR"] = "~/results"
    first = shell.run("--file=~/request.json", "--output=~/pictures/fox.jpeg", "--print-response").json
    assert first["image_path"] == str(shell.home / "pictures" / "fox.jpeg")
    evidence = Path(first["evidence_path"])
    assert shell.home / "results" in evidence.parents
    name = f"~/{evidence.relative_to(shell.home)}"
    assert shell.run("--recover", name, "--output", "~/again.png", "--print-response").code == 0
    assert shell.run("--replay", name, "--print-response").code == 0
    assert (shell.home / "again.png").is_file()
    assert shell.files() == [], "no folder of that name"


def test_a_tilde_is_the_home_folder_in_every_option_of_a_batch(batch: Batch) -> None:
    home = batch.shell.home
    (home / "rows.txt").write_text("a fox\n", encoding="utf-8")
    result = batch.call("--input", "~/rows.txt", "--output-dir=~/out", "--rpm", "0")
    assert result.code == 0, result.stdout
    assert (home / "out" / "index.html").is_file()
    assert batch.call("--status", "~/out").json["saved"] == 1
    assert batch.call("--gallery-only=~/out").json["gallery"] == str(home / "out" / "index.html")
    assert batch.shell.files() == []


def test_a_row_leads_to_no_home_folder(batch: Batch) -> None:
    batch.rows({"prompt": "a", "output": "~/a.png"})
    result = batch.run("--dry-run")
    assert (result.code, "output" in result.error["message"]) == (2, True)


def test_a_template_is_filled_from_the_home_folder(shell: Shell) -> None:
    shell.script = SCRIPTS / "fill_template.py"
    (shell.home / "values.json").write_text("{}", encoding="utf-8")
    name = next(iter(json.loads(shell.run("--list").stdout)))
    result = shell.run(name, "--file", "~/values.json")
    assert (result.code, "missing" in result.stderr) == (2, True), result.stderr


@pytest.mark.skipif(os.name == "nt", reason="users of POSIX")
def test_the_home_of_another_user_is_found_where_the_system_knows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pwd = pytest.importorskip("pwd")
    monkeypatch.setenv("HOME", "/home/me")
    root = pwd.getpwuid(0)
    assert user_path("--output", f"~{root.pw_name}/fox.png") == f"{root.pw_dir}/fox.png"
    assert user_path("--output-dir", "~") == "/home/me"
    assert user_path("--output", "a/~/fox~.png") == "a/~/fox~.png"


@pytest.mark.skipif(os.name == "nt", reason="where HOME says it")
@pytest.mark.parametrize(
    ("home", "text"),
    [("", "~/fox.png"), ("", "~"), ("relative", "~/fox.png"), ("/home/me", "~nobody-here/x"), ("/home/me", "~$a.json")],
)
def test_a_home_folder_that_is_not_known_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str, text: str
) -> None:
    monkeypatch.setenv("HOME", home)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Failure, match="home folder that is not known") as told:
        user_path("--output", text)
    assert "--output" in told.value.message
    if text.startswith("~$"):  # a file of that very name is one: such names lie beside every open document
        (tmp_path / text).touch()
        assert user_path("--file", text) == text


WINDOWS_PATHS = {
    r"C:\Users\me\fox.png": "/mnt/c/Users/me/fox.png",
    "d:/pictures/fox.png": "/mnt/d/pictures/fox.png",
    r"\\wsl.localhost\Debian\home\me\fox.png": "/home/me/fox.png",
    r"\\wsl$\Debian\srv\fox.png": "/srv/fox.png",
    r"\\nas\pictures\fox.png": "//nas/pictures",
}


@pytest.mark.skipif(os.name == "nt", reason="there they are paths")
@pytest.mark.parametrize(("path", "here"), WINDOWS_PATHS.items())
def test_a_path_of_windows_is_refused_with_what_it_is_under_wsl(
    shell: Shell, service: FaultServer, path: str, here: str
) -> None:
    error = shell.call(*ASK, "--output", path).error
    assert (error["code"], error["billed"]) == ("usage", "no")
    assert "--output" in error["message"] and here in error["message"]
    shell.script = BATCH
    for arguments in (("--input", path, "--output-dir", "out"), ("--status", path)):
        assert here in shell.call(*arguments).error["message"]
    assert shell.files() == [] and service.connections == 0


@pytest.mark.skipif(os.name == "nt", reason="no such name there")
def test_a_file_that_has_the_name_of_such_a_path_is_read(shell: Shell) -> None:
    (shell.folder / r"C:\request.json").write_text('{"prompt": "a fox"}', encoding="utf-8")
    assert shell.run("--file", r"C:\request.json", "--dry-run").json["request"]["prompt"] == "a fox"


# Sizes, ratios and seeds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        (["--size", "16:9"], "1280*720"),
        (["--size", "3 : 2"], "1248*832"),
        (["--size", "1280 x 720"], "1280*720"),
        (["--size", "640,512"], "640*512"),
        (["--aspect-ratio", "21/9"], "1344*576"),
        (["--aspect-ratio", "９：１６"], "720*1280"),
    ],
)
def test_a_size_is_understood_as_people_write_it(shell: Shell, flags: list[str], size: str) -> None:
    assert shell.call("--prompt", "a cat", *flags, "--dry-run").json["request"]["size"] == size


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--size", "16x9"], "aspect_ratio 16:9"),
        (["--size", "5:4"], "16:9"),
        (["--size", "landscape"], "aspect_ratio"),
        (["--size", "4K"], "aspect_ratio"),
        (["--aspect-ratio", "1280x720"], "size"),
        (["--seed", str(2**64)], "without it one is picked"),
        (["--seed", str(2**31)], "2147483647"),
        (["--prompt-extend", "--seed", "1" * 400], "seed"),
    ],
)
def test_where_it_is_not_plain_the_right_option_is_named(shell: Shell, flags: list[str], named: str) -> None:
    error = shell.call("--prompt", "a cat", *flags, "--dry-run").error
    assert (error["code"], error["exit_code"]) == ("invalid_request", 2)
    assert named in error["message"]


def test_a_row_asks_for_a_size_in_any_of_these_ways(batch: Batch) -> None:
    sizes = ["16:9", "1280 x 720", "1280，720", "1280*720"]
    batch.rows(*({"prompt": f"{number}", "size": size} for number, size in enumerate(sizes)))
    plan = batch.run("--dry-run").json
    assert (plan["ok"], plan["rows"]) == (True, 4)


# Prompts that are none ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["-", "@-", "prompt.txt", "@rows.csv", "request.JSON"])
def test_a_prompt_that_names_an_input_is_not_paid_for(shell: Shell, service: FaultServer, name: str) -> None:
    if name[-1] != "-":
        (shell.folder / name.removeprefix("@")).write_text("a fox", encoding="utf-8")
    error = shell.call("--prompt", name, "--print-response").error
    assert (error["code"], "--file" in error["message"]) == ("usage", True)
    shell.script = BATCH
    error = shell.call("--prompt", name, "--output-dir", "out").error
    assert (error["code"], "--input" in error["message"]) == ("usage", True)
    assert service.connections == 0


@pytest.mark.parametrize("prompt", ["- a fox", "prompt.txt", "fox", "@home"])
def test_a_prompt_that_only_looks_so_is_one(shell: Shell, prompt: str) -> None:
    (shell.folder / "fox").mkdir()
    assert shell.call(f"--prompt={prompt}", "--dry-run").json["request"]["prompt"] == prompt


def test_the_other_ending_of_a_jpeg_is_one(batch: Batch) -> None:
    batch.rows({"prompt": "a", "output": "a.jpeg", "size": "512*512"}, {"prompt": "b", "output": "b.JPEG"})
    assert batch.run("--limit", "1").json["saved"] == 1
    assert (batch.out / "a.jpeg").read_bytes()[:2] == b"\xff\xd8"
