"""`make standalone`: one file that makes a picture alone, in an empty folder."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, SCRIPTS, Shell
from fault_server import PICTURE, FaultServer, file, oss_error, png
from mock_server import MockServer
from standalone import build
from zimage.registry import provider_names

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
SMALL = ("--prompt", "a fox", "--size", "512x512", "--seed", "7")


@pytest.fixture
def alone(shell: Shell, tmp_path: Path) -> Shell:
    """A shell in an empty folder, whose script is the one file in another that holds nothing else."""
    shell.script = tmp_path / "my tools" / "generate_image.pyz"
    build(SCRIPTS, shell.script)
    return shell


@pytest.mark.smoke
def test_it_makes_a_picture_alone(alone: Shell, mock: MockServer) -> None:
    alone.use(mock)
    response = alone.run(*SMALL, "--output", "fox.png", "--print-response").json
    assert response["image_path"] == str(alone.folder / "fox.png")
    assert mock.stats()["billed"] == 1
    assert alone.run("--check").json["ok"] is True
    assert alone.run("--replay", response["evidence_path"], "--output", "again.png").code == 0
    assert alone.run("--recover", response["evidence_path"]).code == 0
    assert [path.name for path in alone.script.parent.iterdir()] == [alone.script.name]


@pytest.mark.parametrize("name", provider_names())
def test_every_provider_is_inside(alone: Shell, mock: MockServer, name: str) -> None:
    alone.use(mock)
    shown = alone.run("--provider", name, "--help")
    assert (shown.code, name in shown.stdout) == (0, True)
    planned = alone.run("--provider", name, "--prompt", "a fox", "--dry-run")
    assert planned.json["provider"] == name if planned.code == 0 else planned.error["code"] == "missing_package"


def test_a_name_that_is_no_provider_is_told_with_those_inside(alone: Shell) -> None:
    error = alone.run("--provider", "pigeon", "--prompt", "x", "--print-response").error
    assert all(name in error["message"] for name in provider_names())


@pytest.mark.skipif(os.name == "nt", reason="quoted for a POSIX shell here")
def test_the_next_command_of_a_failure_runs_the_file_itself(alone: Shell, service: FaultServer) -> None:
    service.play(PICTURE, oss_error(404, "NoSuchKey", "not there yet"))
    error = alone.run(*SMALL, "--output", "fox.png", "--print-response").error
    service.play(PICTURE, file(png(512, 512)))
    words = shlex.split(error["next_command"])
    assert words[1] == str(alone.script)
    done = subprocess.run(words, cwd=alone.home, env=alone.environment(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (alone.folder / "fox.png").read_bytes() == png(512, 512)
    assert len(service.posts) == 1


@pytest.mark.parametrize(("content", "told"), [("def (:\n", "SyntaxError"), ("raise SystemExit(0)\n", "SystemExit")])
def test_a_provider_inside_that_cannot_be_loaded_is_named(
    alone: Shell, tmp_path: Path, content: str, told: str
) -> None:
    scripts = tmp_path / "changed"
    shutil.copytree(SCRIPTS, scripts, ignore=shutil.ignore_patterns("__pycache__"))
    (scripts / "providers" / "broken.py").write_text(content)
    build(scripts, alone.script)
    error = alone.run("--provider", "broken", "--prompt", "x", "--print-response").error
    assert f"providers/broken.py cannot be loaded: {told}" in error["message"]
    assert alone.run("--help").code == 0


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_it_runs_by_itself_through_a_link_and_among_decoys(alone: Shell) -> None:
    for name in ("zimage", "providers"):
        (alone.folder / name).mkdir()
        (alone.folder / name / "__init__.py").write_text("raise SystemExit('the decoy was loaded')")
    alone.env["PYTHONPATH"] = str(alone.folder)
    link = alone.home / "draw"
    link.symlink_to(alone.script)
    alone.env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    words = [str(link), "--prompt", "x", "--dry-run"]
    done = subprocess.run(words, cwd=alone.folder, env=alone.environment(), capture_output=True, check=False)
    assert done.returncode == 0 and not done.stderr.count(b"decoy"), done.stderr


def test_the_same_sources_give_the_same_bytes(tmp_path: Path) -> None:
    shutil.copytree(SCRIPTS, tmp_path / "copy")
    for number, path in enumerate(sorted((tmp_path / "copy").rglob("*"), reverse=True)):
        os.utime(path, (number, number + 1_000_000_000))
    build(SCRIPTS, tmp_path / "one.pyz")
    build(tmp_path / "copy", tmp_path / "other.pyz")
    assert (tmp_path / "one.pyz").read_bytes() == (tmp_path / "other.pyz").read_bytes()


def test_make_builds_it() -> None:
    """What `make standalone` calls."""
    words = re.search(r"(?m)^standalone:\n\t@\$\(PYTHON\) (\S+) \$\(SKILL\)/scripts (\S+)$", MAKEFILE)
    assert words and words.groups() == ("tests/standalone.py", "dist/generate_image.pyz")
