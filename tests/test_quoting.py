"""Commands in hints can be pasted, whatever folders are called, and no word of a path is taken for a placeholder."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import Shell
from fault_server import PICTURE, FaultServer, file, html, png
from zimage.errors import KINDS, Failure
from zimage.evidence import Evidence
from zimage.quoting import command_line, quoted
from zimage.settle import Have, explained

NAMES = [
    "EVIDENCE",
    "{hint}",
    "{named}",
    "{}",
    "%s %(x)s",
    "OUTPUT_DIR",
    "FOLDER",
    "{script}",
    "back\\slash",
    "a'b",
    'a"b',
]
NAMES += ["a b", "$HOME", "`id`", "!x", "a&b", "^", "100%", "ü 雪", "--recover", "*", "~", "#x", ";", "\\0101"]
CONTROLS = ["new\nline", "\x1b[31mred", "tab\t", "turned\u202ename", "bell\x07 'quoted' \\n", "line\u2028end", "x\r"]


@pytest.mark.skipif(os.name == "nt", reason="quoted for a POSIX shell here")
def test_every_word_comes_out_of_a_posix_shell_as_it_went_in() -> None:
    words = [*NAMES, *CONTROLS, "", os.fsdecode(b"no\xfftext")]
    line = command_line([sys.executable, "-c", "import os, sys; print(list(map(os.fsencode, sys.argv[1:])))", *words])
    assert line is not None and line.encode("utf-8").decode().isprintable()
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout == f"{list(map(os.fsencode, words))}\n"


@pytest.mark.smoke
@pytest.mark.parametrize("word", ["ends in a line\n", "nul\0", "\udc00 \ud800"])
def test_what_no_posix_shell_can_be_given_is_left_out(word: str) -> None:
    assert quoted(word, "linux") is None
    assert command_line(["python3", word], "linux") is None


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (r"C:\Python\python.exe", r"C:\Python\python.exe"),
        ("--print-response", "--print-response"),
        (r"C:\My Pictures\a.json", r'"C:\My Pictures\a.json"'),
        (r"\\server\share\a & b.json", r'"\\server\share\a & b.json"'),
        (r"C:\a'b(1)^!;,@{}.json", r'''"C:\a'b(1)^!;,@{}.json"'''),
        ("C:\\my folder\\", '"C:\\my folder\\\\"'),
        ("雪.json", '"雪.json"'),
        ("", '""'),
        (r"C:\%PATH%\a.json", None),  # cmd would replace it
        (r"C:\100%\a.json", None),
        (r"C:\$x\a.json", None),  # PowerShell would
        ("C:\\`x\\a.json", None),
        ("C:\\\u201cx\u201d\\a.json", None),  # a quote to PowerShell
        ('a"b', None),
        ("a\nb", None),
        ("a\x1b[m", None),
        ("a\u202eb", None),
    ],
)
def test_on_windows_a_word_is_good_for_cmd_and_powershell_or_left_out(word: str, expected: str | None) -> None:
    assert quoted(word, "win32") == expected


def evidence_in(folder: Path) -> Evidence:
    data: Any = {
        "status": "unknown",
        "billable": True,
        "attempts": [{"at": "2026-01-01T00:00:00Z"}],
        "task_id": "t",
        "request": {"prompt": "x"},
        "cost": {},
    }
    return Evidence(folder / "20260101T000000Z-00000000.json", data)


@pytest.mark.parametrize("name", NAMES)
def test_no_name_of_a_folder_is_taken_for_a_placeholder(name: str) -> None:
    """And none of a failure's own hint, which may name a file."""
    path = f"/data/{name}"
    evidence = evidence_in(Path(path))
    haves = (
        Have("yes", "generated", task=False, link="https://x/1.png", held=False, billable=True),
        Have("unknown", "unknown", task=True, link="", held=False, billable=False),
        Have("no", "failed", task=False, link="", held=False, billable=True),
    )
    for code, have in itertools.product(KINDS, haves):
        told = explained(evidence, Failure(code, "x"), have=have).fault
        assert "EVIDENCE" not in told.hint.replace(path, "").replace(path.replace("'", "'\"'\"'"), "")
        if "--replay" in told.hint:
            assert f"--replay {quoted(str(evidence.path))}" in told.hint
        assert told.next_command is None or str(quoted(str(evidence.path))) in told.next_command
        own = f"{path} holds EVIDENCE and {{hint}} {{named}} %s"
        assert own in explained(evidence, Failure("disk", "x", hint=own), have=have).fault.hint


@pytest.mark.skipif(os.name == "nt", reason="quoted for a POSIX shell here")
@pytest.mark.parametrize("name", ["EVIDENCE", "{hint} %s", "it's $HOME\\", "sk-0123456789abcdef", "new\nline"])
def test_the_next_command_works_from_a_folder_of_any_name(shell: Shell, service: FaultServer, name: str) -> None:
    folder = shell.folder / name
    folder.mkdir()
    shell.env["OUTPUT_DIR"] = str(folder)
    output = str(shell.folder / "a.png")
    service.play(PICTURE, html(404))
    result = shell.run("--prompt", "x", "--print-response", "--output", output)
    assert result.code == 8
    assert not [sign for sign in result.stderr if not sign.isprintable() and sign != "\n"]
    assert all(
        re.match("(error|evidence|evidence_path|seed|estimated_cost|warning|next_command|next): ", line)
        for line in result.stderr.splitlines()
    )
    service.play(PICTURE, file(png(512, 512)))
    command = result.error["next_command"]
    done = subprocess.run(
        ["sh", "-c", command], cwd=shell.folder, env=shell.environment(), capture_output=True, check=False
    )
    assert json.loads(done.stdout)["image_path"] == output


def test_a_command_that_cannot_be_quoted_is_left_out_and_said_so() -> None:
    have = Have("yes", "generated", task=False, link="https://x/1.png", held=False, billable=True)
    told = explained(evidence_in(Path("/data")), Failure("disk", "x"), ["--output", "a\n"], have=have).fault
    assert told.next_command is None and "evidence_path" in told.hint and "next_command" not in told.hint
