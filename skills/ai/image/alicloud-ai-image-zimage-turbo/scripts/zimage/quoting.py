"""Quoting: words as a shell takes them, so that a hint can be pasted whatever a folder is called."""

from __future__ import annotations

import functools
import os
import re
import shlex
import sys
from collections.abc import Sequence


@functools.lru_cache(maxsize=32)  # a gallery names the same program and script for every picture
def quoted(word: str, platform: str = sys.platform) -> str | None:
    """One word of a command on one line; None where no quoting carries it."""
    return _for_windows(word) if platform == "win32" else _for_posix(word)


def command_line(words: Sequence[str], platform: str = sys.platform) -> str | None:
    """A command on one line, for the shell of the platform; None where a word of it cannot be quoted."""
    parts = [quoted(word, platform) for word in words]
    return None if None in parts else " ".join(part for part in parts if part is not None)


def _for_posix(word: str) -> str | None:
    """For every shell of POSIX. What a terminal would obey, and bytes that are no text, are spelled out for printf."""
    if word.isprintable():
        return shlex.quote(word)
    try:
        content = os.fsencode(word)
    except UnicodeError:
        return None
    if content.endswith(b"\n") or b"\0" in content:  # the shell drops the one, no file name holds the other
        return None
    spelled = "".join(
        chr(byte) if re.match(rb"[A-Za-z0-9/._ -]", bytes([byte])) else f"\\0{byte:03o}" for byte in content
    )
    return f"\"$(printf %b '{spelled}')\""


def _for_windows(word: str) -> str | None:
    """For cmd and PowerShell alike: both take a word in double quotes, but each reads other signs in it.

    cmd replaces `%`, PowerShell `$` and the backtick, and takes curled quotes for straight ones. PowerShell wants `& `
    before a command that begins with a quote.
    """
    if not word.isprintable() or re.search('["%$`\u201c-\u201e]', word):
        return None
    if re.fullmatch(r"[A-Za-z0-9_.:/\\=+-]+", word):
        return word
    trailing = len(word) - len(word.rstrip("\\"))
    return f'"{word}{trailing * chr(92)}"'
