"""Files in the making: no link is followed, no name is a pattern, and what fails leaves the old file."""

from __future__ import annotations

import ast
import errno
import itertools
import os
import stat
from pathlib import Path

import pytest

from batch_helpers import BATCH, SMALL_PNG, Batch
from conftest import GENERATE, SCRIPTS, Shell
from fault_server import FaultServer
from zimage import files
from zimage.errors import Failure
from zimage.files import aside, leftovers_of, permissions_warning, place, remove_leftovers, write_gitignore, write_new
from zimage.paths import checked_output

DEAD = 999_999_999


# Mounts without permissions -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fchmod"), reason="permissions of POSIX")
@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_where_chmod_is_refused_all_goes_on_with_a_warning(
    batch: Batch, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """In the dry run, in the real one, and in the record; of one picture and of many."""

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fchmod", refuse)
    shell = batch.shell
    shell.is_first_row = False
    batch.rows("a")
    many = ("--input", str(batch.input), "--output-dir", "out", "--rpm", "0")
    one = ("--prompt", "a fox", "--size", "512x512", "--print-response")
    for script, arguments in ((BATCH, many), (GENERATE, one)):
        shell.script = script
        for result in (shell.call(*arguments, "--dry-run"), shell.call(*arguments)):
            assert result.code == 0, result.stdout
            assert result.stderr.count("refuses chmod") == ("payload" not in result.json)
            assert len([warning for warning in result.json["warnings"] if "refuses chmod" in warning]) == 1
    (warning,) = shell.evidence()["warnings"]
    assert "refuses chmod" in warning


@pytest.mark.skipif(not hasattr(os, "fchmod"), reason="permissions of POSIX")
def test_asking_for_permissions_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in (0o700, 0o755, 0o2770, 0o1777):
        tmp_path.chmod(mode)
        assert permissions_warning(tmp_path / "a" / "b") is None
        assert stat.S_IMODE(tmp_path.stat().st_mode) == mode
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(os, "fchmod", lambda *_: os.open("/nowhere/at/all", os.O_RDONLY))
    assert permissions_warning(tmp_path) is None, "another error says nothing of permissions"


@pytest.fixture
def batch(shell: Shell, service: FaultServer) -> Batch:
    return Batch(shell, service)


@pytest.mark.smoke
def test_only_the_disk_renames_and_links() -> None:
    found = set()
    for path in SCRIPTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in {"os.replace", "os.rename", "os.link"}:
                found.add(path.relative_to(SCRIPTS).as_posix())
    assert found == {"zimage/files.py"}


def test_links_at_temporary_names_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_serials", itertools.count())
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    for serial in range(50):
        (tmp_path / f".page.{os.getpid()}.{serial}.part").symlink_to(victim)
    with aside(tmp_path / "page") as temporary:
        temporary.write_bytes(b"new")
    assert ((tmp_path / "page").read_bytes(), victim.read_bytes()) == (b"new", b"mine")


def test_a_folder_full_of_links_has_its_gallery_and_thumbnails_written_beside_them(batch: Batch) -> None:
    batch.rows("a")
    assert batch.run().code == 0
    thumb = batch.out / "thumbs" / "0000" / "000000.jpg"
    thumb.unlink()
    victim = batch.shell.folder / "victim"
    victim.write_bytes(b"mine")
    pids = range(os.getpid(), os.getpid() + 2000)
    for path, pid in itertools.product((batch.out / "index.html", batch.out / "results.jsonl", thumb), pids):
        for name in (f"{pid}", f"{pid}.0", f"{pid}.1"):
            path.with_name(f".{path.name}.{name}.part").symlink_to(victim)
    assert batch.call("--gallery-only", str(batch.out)).code == 0
    assert thumb.is_file() and not thumb.is_symlink()
    thumb.unlink()
    assert batch.run().code == 0
    assert thumb.is_file() and victim.read_bytes() == b"mine"


@pytest.mark.parametrize("link", ["thumbs", "thumbs/0000"])
def test_thumbnails_do_not_leave_the_folder(batch: Batch, link: str) -> None:
    batch.rows("a")
    assert batch.run("--no-gallery").code == 0
    elsewhere = batch.shell.folder / "elsewhere"
    elsewhere.mkdir()
    for path in (batch.out / "thumbs" / "0000", batch.out / "thumbs"):
        if path.is_dir():
            path.rmdir()
    (batch.out / link).parent.mkdir(exist_ok=True)
    (batch.out / link).symlink_to(elsewhere)
    assert batch.call("--gallery-only", str(batch.out)).code == 0
    assert list(elsewhere.iterdir()) == []


def test_a_dangling_gitignore_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").symlink_to(tmp_path / "outside")
    write_gitignore(tmp_path, "*\n")
    assert os.listdir(tmp_path) == [".gitignore"]


def test_names_are_literal_and_both_forms_of_leftovers_go(tmp_path: Path) -> None:
    foreign = [f".other.json.{DEAD}.part", f".a.json.{DEAD}.part.txt", ".a.json.x.part"]
    mine = [f".*.json.{DEAD}.0.part", f".*.{DEAD}.part"]
    for name in foreign + mine:
        (tmp_path / name).write_bytes(b"")
    remove_leftovers(tmp_path, leftovers_of("*", "*.json"))
    assert sorted(os.listdir(tmp_path)) == sorted(foreign)


@pytest.mark.parametrize("call", ["create", "sync", "replace", "sync_folder"])
def test_a_disk_that_fails_leaves_the_old_file_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(files.DISK, call, fail)
    with pytest.raises(OSError, match="no space"), aside(target) as temporary:
        temporary.write_bytes(b"new")
    assert target.read_bytes() == (b"new" if call == "sync_folder" else b"old")
    assert os.listdir(tmp_path) == ["file"]


def test_without_hard_links_names_are_claimed_and_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    output = tmp_path / "a.png"
    assert place(SMALL_PNG, output, "1", overwrite=False, again=False) == (output, None)
    path, warning = place(b"other", output, "1", overwrite=False, again=False)
    assert (path.name, output.read_bytes()) == ("a-1.png", SMALL_PNG) and warning
    with pytest.raises(FileExistsError):
        write_new(output, b"third")
    assert sorted(os.listdir(tmp_path)) == ["a-1.png", "a.png"]


def test_a_name_of_255_bytes_can_be_written(tmp_path: Path) -> None:
    target = tmp_path / ("é" * 127 + "x")
    with aside(target) as temporary:
        temporary.write_bytes(b"new")
    assert target.read_bytes() == b"new"


def test_a_name_of_dots_and_an_ending_is_taken_only_where_it_was_paid_for(tmp_path: Path) -> None:
    """Its second variant would have no ending. Version 0.4.0 took it, and what that has paid for is recovered."""
    name = str(tmp_path / "..png")
    with pytest.raises(Failure, match="must end in"):
        checked_output(name, "output")
    if tmp_path.joinpath("..png").suffix:  # where this Python's pathlib calls it an ending, as 0.4.0 did
        assert checked_output(name, "output", recorded=True) == Path(name)
