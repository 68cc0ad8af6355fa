"""Paths: what may be the path of a picture, here and on Windows."""

from __future__ import annotations

import ntpath
import os
import re
import sys
import unicodedata
from pathlib import Path
from typing import NoReturn

from zimage.contract import FORMATS
from zimage.errors import Failure
from zimage.outside import CONTROL, outside_text, shown, without_surrogates

LONGEST_NAME = 255  # bytes
LONGEST_PATH = {"linux": 4096, "darwin": 1024, "win32": 260}  # with the zero at its end: bytes, on Windows characters
# What may lie beside a picture: it in the making, and it under its second name, `<stem>-<evidence id>`.
TEMPORARY_ROOM, SECOND_NAME_ROOM = 80, 26
# What Windows does not take as the name of a file, or takes for something else than a file.
DEVICES = {"con", "prn", "aux", "nul", "conin$", "conout$"} | {
    f"{port}{digit}" for port in ("com", "lpt") for digit in "0123456789¹²³"
}


WINDOWS_PATH = re.compile(r"([A-Za-z]):[\\/](.*)|\\\\([^\\/]+)[\\/]+([^\\/]+)(.*)", re.DOTALL)  # of a drive, or UNC
WSL_HOSTS = ("wsl$", "wsl.localhost")  # by which Windows reaches the files of a Linux beside it


def user_path(source: str, text: str) -> str:
    """A path as its user means it, whether or not a shell has seen it: `~` and `~user` are home folders.

    `source` is where it was given. What lies there under that very name is taken as it is.

    Raises:
        Failure: usage, for a home that is not known, and for a path of Windows where there are none.
    """
    if os.name != "nt" and (found := WINDOWS_PATH.match(text)) and not os.path.lexists(text):
        here = f"under WSL it is {shown(_under_wsl(found))}"
        raise Failure(
            "usage", f"{source}: {shown(text)} is a path of Windows; {here}", hint=f"give {source} a path here"
        )
    if not text.startswith("~"):
        return text
    has_no_home = os.name != "nt" and re.match("~(/|$)", text) and os.environ.get("HOME") == ""
    path = text if has_no_home else os.path.expanduser(text)
    if os.path.isabs(path):
        return path
    if os.path.lexists(text):
        return text
    hint = f"give {source} the whole path; a name that begins with ~ goes behind ./"
    raise Failure("usage", f"{source}: {shown(text)} is below a home folder that is not known here", hint=hint)


def _under_wsl(found: re.Match[str]) -> str:
    """Where a path of Windows is in a Linux beside it."""
    drive, rest, host, share, more = found.groups()
    if drive:
        return f"/mnt/{drive.lower()}/" + rest.replace("\\", "/")
    if host.lower() in WSL_HOSTS:
        return more.replace("\\", "/") or "/"
    return f"where you mount //{host}/{share}"


def is_windows_name(name: str) -> bool:
    """Whether Windows makes a plain file, or folder, of just this name.

    Not of `nul.png` or `AUX .x` (devices), `pic:1.png` (a stream of another file), `a.` and `a ` (the end is cut off).
    """
    device = name.partition(".")[0].rstrip(" ").casefold()
    return not (re.search(r'[<>:"/\\|?*\x00-\x1f]', name) or name.endswith((" ", ".")) or device in DEVICES)


def windows_problem(path: str) -> str | None:
    r"""What is wrong with the path of a file on Windows; None where nothing is. Drives, UNC and `\\?\` are taken."""
    drive, root, rest = _split_windows(path)
    if drive and not root:
        return "is relative to the working folder of its drive; give it with a backslash behind the drive"
    for part in re.split(r"[\\/]+", rest):
        if part not in ("", ".", "..") and not is_windows_name(part):
            return "has a name in it that Windows keeps for itself, or cannot write"
    return None


def _split_windows(path: str) -> tuple[str, str, str]:
    drive, rest = ntpath.splitdrive(path)
    return drive, rest[:1] if rest[:1] in ("\\", "/") else "", rest


def checked_output(name: str, source: str, hint: str | None = None, *, recorded: bool = False) -> Path:
    """The absolute path of the picture; `source` is where its name was given.

    `recorded`: an earlier version has paid for it, perhaps under a path that cannot be.

    Raises:
        Failure: invalid_output.
    """

    def refuse(what: str, hint: str | None = None) -> NoReturn:
        raise Failure("invalid_output", f"{source}: {what}", hint=hint)

    if not name or CONTROL.search(name):
        refuse("must not be empty or hold control characters", hint)
    if name.endswith(("/", os.sep)) or (not recorded and os.path.isdir(name)):
        refuse(f"{outside_text(name, 200)} is a folder; give a file name in it")
    if sys.platform == "win32" and (problem := windows_problem(name)):  # before Python makes another path of it
        refuse(problem, hint)
    path = Path(os.path.abspath(name))
    has_ending = recorded or os.path.splitext(path.name)[1]  # `..png` has none, whatever this Python's pathlib says
    if not has_ending or path.suffix.lower() not in FORMATS:
        refuse(f"must end in one of {', '.join(FORMATS)}, got {shown(path.name)}")
    if not is_file_name(path.name):
        refuse("not a file name here, or longer than 255 bytes")
    if not recorded and not all(map(is_file_name, path.parts)):
        refuse("a folder in it is not a file name here, or longer than 255 bytes", hint)
    if not recorded and (excess := excess_of(path, sys.platform)) > 0:
        refuse(f"the path is longer by {excess} than this system takes for a picture", hint)
    return path


def excess_of(path: Path, platform: str) -> int:
    """By how much an absolute path is too long for a picture and what may lie beside it; 0 or less where it is not."""
    parent, name = len(os.fsencode(path.parent)), len(os.fsencode(path.name))
    if platform == "win32":
        parent, name = (len(str(part).encode("utf-16-le")) // 2 for part in (path.parent, path.name))
    longest = max(TEMPORARY_ROOM, min(LONGEST_NAME, name + SECOND_NAME_ROOM))
    return parent + 1 + longest + 1 - LONGEST_PATH.get(platform, LONGEST_PATH["darwin"])


def slug_of(prompt: str) -> str:
    """The beginning of a prompt as part of a file name: letters and digits of any script, joined by `-`."""
    words = re.findall(r"\w+", unicodedata.normalize("NFC", without_surrogates(prompt[:400])).replace("_", " ").lower())
    slug = "-".join(words)[:40].strip("-")
    return slug if is_file_name(slug) and is_windows_name(slug) else ""


def is_file_name(text: str) -> bool:
    """Whether this system can write the text as a file name."""
    try:
        return len(os.fsencode(text)) <= LONGEST_NAME
    except UnicodeError:
        return False
