"""What holds on Windows, found out everywhere: its names, drives and modules."""

from __future__ import annotations

import ntpath
import os
import posixpath
import subprocess
import sys
from pathlib import Path

import pytest

from batch_helpers import Batch
from conftest import SCRIPTS, Shell
from fault_server import FaultServer
from zimage.batch.names import is_inside, name_in
from zimage.errors import Failure
from zimage.paths import checked_output, is_windows_name, slug_of, windows_problem

RESERVED = ["nul.png", "NUL", "con", "Con.tar.png", "aux .png", "prn.webp", "com1.txt", "COM9", "lpt0.png", "COM¹.png"]
RESERVED += ["LPT³", "conin$", "CONOUT$.png", "pic:1.png", "a<b.png", "a>b", 'a"b', "a|b", "a?b", "a*b", "a/b", "a\\b"]
RESERVED += ["ends in a dot.", "ends in a blank ", "bell\x07.png", "line\n.png"]
GOOD = ["a.png", "null.png", "console.png", "com.png", "com10.png", "lpt.png", "auxiliary", ".nul", "a b.png", "雪.png"]
GOOD += ["a'b&c^d!e%f.png", "{}.png", "x.nul", "conin.png", "ⅽon.png"]


@pytest.mark.smoke
@pytest.mark.parametrize("name", RESERVED)
def test_what_windows_keeps_for_itself_is_no_name_of_a_picture(name: str) -> None:
    assert not is_windows_name(name)


@pytest.mark.parametrize("name", GOOD)
def test_all_other_names_are(name: str) -> None:
    assert is_windows_name(name)


@pytest.mark.parametrize(
    ("path", "good"),
    [
        (r"C:\pictures\a.png", True),
        ("C:/pictures/a.png", True),
        (r"pictures\a.png", True),
        (r"..\a.png", True),
        (r"\pictures\a.png", True),
        (r"\\server\share\a.png", True),
        (r"\\server\share\folder\a.png", True),
        (r"\\?\C:\very\long\a.png", True),
        (r"\\?\UNC\server\share\a.png", True),
        ("C:a.png", False),
        ("c:pictures/a.png", False),
        (r"C:\nul\a.png", False),
        (r"C:\pictures\com1.png", False),
        (r"\\server\share\aux.png", False),
        (r"\\?\C:\x\a:b.png", False),
        (r"C:\x.\a.png", False),
        ("pic:1.png", False),
        ("a.png:stream.png", False),
        ("a|b.png", False),
    ],
)
def test_a_path_of_windows_is_judged_by_its_drive_and_its_names(path: str, good: bool) -> None:
    assert (windows_problem(path) is None) == good


@pytest.mark.skipif(os.name == "nt", reason="a name of Windows is one of POSIX")
@pytest.mark.parametrize("name", ["nul.png", "pic:1.png", "a?.png"])
def test_where_windows_is_not_pictures_and_rows_may_have_such_names(
    shell: Shell, service: FaultServer, name: str
) -> None:
    """Folders of earlier versions hold them."""
    assert shell.call("--prompt", "x", "--output", name, "--dry-run").code == 0
    batch = Batch(shell, service)
    batch.rows({"prompt": "x", "output": name})
    assert batch.run("--dry-run").code == 0


@pytest.mark.parametrize("name", ["nul.png", "a?.png", "C:a.png"])
def test_on_windows_they_are_refused_before_paying(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("zimage.paths.sys.platform", "win32")
    with pytest.raises(Failure, match=r"Windows|drive"):
        checked_output(name, "--output")


@pytest.mark.parametrize("prompt", ["NUL", "con", "Com1", "aux"])
def test_no_slug_is_the_name_of_a_device(prompt: str) -> None:
    assert slug_of(prompt) == ""
    assert slug_of(f"{prompt} cat") == f"{prompt.lower()}-cat"


@pytest.mark.parametrize(
    ("path", "folder", "inside"),
    [
        (r"C:\out\images", r"C:\out", True),
        (r"C:\out", r"C:\out", True),
        (r"c:\OUT\images", r"C:\out", True),
        (r"C:\output", r"C:\out", False),
        (r"D:\images", r"C:\out", False),  # a junction to another drive
        (r"\\server\share\x", r"C:\out", False),
        (r"\\server\share\out\x", r"\\server\share\out", True),
        (r"\\server\other\x", r"\\server\share", False),
    ],
)
def test_a_folder_behind_a_junction_is_outside(path: str, folder: str, inside: bool) -> None:
    assert is_inside(path, folder, ntpath) == inside


def test_a_folder_behind_a_link_is_outside() -> None:
    assert is_inside("/out/images", "/out", posixpath) and not is_inside("/output", "/out", posixpath)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (r"C:\out\images\a.png", "images/a.png"),
        (r"c:\OUT\a.png", "a.png"),
        (r"C:\else\a.png", "../else/a.png"),
        (r"D:\else\a.png", "D:/else/a.png"),
        (r"\\server\share\a.png", "//server/share/a.png"),
    ],
)
def test_a_picture_on_another_drive_keeps_its_whole_path(path: str, name: str) -> None:
    assert name_in(r"C:\out", path, ntpath) == name


POSIX_ONLY = ["fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"]
WITHOUT_POSIX = f"""
import os, signal, sys
sys.path[:0] = {[str(SCRIPTS), str(Path(__file__).parent)]!r}
import pytest, subprocess, multiprocessing  # of the standard library: they know what to do
for name in {POSIX_ONLY}:
    sys.modules[name] = None
for name in ("fork", "geteuid", "getuid", "fchmod", "mkfifo", "statvfs", "openpty", "killpg", "O_NOFOLLOW", "setsid"):
    delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGSTOP", "SIGALRM", "SIGPIPE", "setitimer", "pthread_sigmask"):
    delattr(signal, name)
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


@pytest.mark.skipif(os.name == "nt", reason="takes away what is not there")
def test_every_module_can_be_imported_without_what_only_posix_has() -> None:
    """So Windows collects the tests of batches too."""
    rooms = [path.relative_to(SCRIPTS).with_suffix("") for path in sorted((SCRIPTS / "zimage").rglob("*.py"))]
    names = ["generate_image", "generate_batch", *(".".join(room.parts) for room in rooms)]
    names += ["batch_helpers", "fault_server", "test_batch_input", "test_batch_money", "test_batch_results"]
    names += ["test_batch_run", "test_batch_state"]
    done = subprocess.run([sys.executable, "-c", WITHOUT_POSIX, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
