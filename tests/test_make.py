"""What people and CI run: the demo, the compile step, and the files that every clone must have."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from conftest import KEPT_VARIABLES, ROOT, SCRIPTS, SMOKE_ROWS

pytestmark = pytest.mark.skipif(os.name == "nt", reason="make and sh")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The tracked part of the project that the demo needs, in an empty folder."""
    folder = tmp_path / "clone"
    for name in ("skills", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "output").mkdir()
    return folder


def run(clone: Path, *command: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command with an empty home and nothing of this machine's settings."""
    env = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ} | {"HOME": str(clone)}
    if path:
        env["PATH"] = f"{path}{os.pathsep}{env['PATH']}"
    return subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True, timeout=60, check=False)


def python_folder(clone: Path) -> str:
    """A folder in which `python` is this interpreter, as .venv/bin is for `make demo`."""
    folder = clone / "bin"
    folder.mkdir(exist_ok=True)
    launcher = folder / "python"
    launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    launcher.chmod(0o755)
    return str(folder)


def test_the_demo_makes_a_picture_without_a_key_and_says_that_it_is_a_mock(clone: Path) -> None:
    for _ in range(2):  # it can be run again
        done = run(clone, "sh", "tests/demo.sh", path=python_folder(clone))
        assert done.returncode == 0, done.stderr
        assert "MOCK" in done.stdout
        image = Path(re.search(r"(?m)^image: +(.*)$", done.stdout)[1])  # type: ignore[index]
        evidence = Path(re.search(r"(?m)^evidence: +(.*)$", done.stdout)[1])  # type: ignore[index]
        assert image == clone / "output/ai-image-zimage-turbo/images/fishing.png"
        with Image.open(image) as picture:
            assert picture.size == (1024, 1024)
        said = json.loads(evidence.read_text(encoding="utf-8"))
        assert said["status"] == "saved"
        assert said["request"]["prompt"] == "a fishing scene at dawn, cinematic, realistic"


def test_the_demo_never_replaces_a_picture_that_was_perhaps_paid_for(clone: Path) -> None:
    images = clone / "output/ai-image-zimage-turbo/images"
    images.mkdir(parents=True)
    (images / "fishing.png").write_bytes(b"paid for")
    assert run(clone, "sh", "tests/demo.sh", path=python_folder(clone)).returncode == 0
    (kept,) = images.glob("fishing-kept-*.png")
    assert kept.read_bytes() == b"paid for"


def test_the_demo_leaves_no_server_behind(clone: Path) -> None:
    done = run(clone, "sh", "tests/demo.sh", path=python_folder(clone))
    link = json.loads(done.stdout[: done.stdout.index("\n}\n") + 2])["image_url"]
    gone = run(clone, "curl", "-sS", "-m", "5", link)
    assert gone.returncode == 7, "something still listens"


@pytest.mark.smoke
def test_the_compile_step_needs_nothing_but_python3(clone: Path) -> None:
    done = run(clone, "make", "validate")
    assert done.returncode == 0, done.stderr
    marker = clone / "output/alicloud-ai-image-zimage-turbo/validate.txt"
    assert marker.read_text(encoding="utf-8") == "py_compile_ok\n"
    assert not (clone / ".venv").exists()
    assert not list((clone / "skills").rglob("__pycache__"))


def test_the_compile_step_fails_on_a_script_that_does_not_compile(clone: Path) -> None:
    (clone / SCRIPTS.relative_to(ROOT) / "broken.py").write_text("def :\n", encoding="utf-8")
    assert run(clone, "make", "validate").returncode != 0
    assert not (clone / "output/alicloud-ai-image-zimage-turbo/validate.txt").exists()


def test_ci_runs_both_checks_and_may_skip_nothing() -> None:
    runner = ROOT / ".ci" / "run"
    assert os.access(runner, os.X_OK)
    assert re.search(r"(?ms)^export CI=1\b.*^make check\n^exec make check-all$", runner.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("target", "selected", "heavy"),
    [("check", '"not heavy and not torture"', False), ("check-all", "heavy", True), ("smoke", "smoke", False)],
)
def test_only_check_all_installs_what_is_heavy(clone: Path, target: str, selected: str, heavy: bool) -> None:
    for path in ROOT.glob("requirements*.txt"):
        shutil.copy(path, clone)
    planned = run(clone, "make", "--dry-run", target).stdout
    assert re.findall(r"pytest .*-m (.*)", planned) == [selected]
    assert heavy or "ruff check" in planned
    for name in ("torch", "requirements-local.txt", "requirements-browser.txt", "npm install", "chromium"):
        assert (name in planned) == heavy, name


def test_smoke_has_a_few_rows_of_every_file() -> None:
    words = [sys.executable, "-m", "pytest", "--collect-only", "--quiet", "-p", "no:cacheprovider", "-m", "smoke"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout
    tests = [line for line in listed.splitlines() if "::" in line]
    files = {path.relative_to(ROOT).as_posix() for path in Path(__file__).parent.glob("test_*.py")}
    assert files - {test.partition("::")[0] for test in tests} == {
        "tests/test_gallery.py",  # all of it is heavy
        "tests/test_comfyui_template.py",  # and of this one
        "tests/test_engines.py",  # and of this one
        "tests/test_mounts.py",  # and of this one
        "tests/test_peers.py",  # and of this one
        "tests/test_real_network.py",  # and of this one
        "tests/test_every_write.py",  # each of its tests runs hundreds of commands
    }
    assert max(Counter(test.partition("[")[0] for test in tests).values()) == SMOKE_ROWS
    assert len(tests) <= 160


def test_every_requirement_has_an_upper_bound() -> None:
    for path in ROOT.glob("requirements*.txt"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line and not line.startswith("#"):
                assert re.fullmatch(r"[\w-]+>=[\d.]+,<[\d.]+(; python_version .+)?", line), line
