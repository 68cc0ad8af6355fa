"""No key in anything that the program leaves: all output and all files of every run of the suite are searched.

A key is what an environment gives the program (`…_API_KEY`, `…_PASSWORD`), or a test has put into a file; it is
looked for as it is, percent-encoded, in hex, and in base64 wherever its first byte falls in a group of three.
`SEARCHED` counts what was searched, for the last line of a run of pytest.
"""

from __future__ import annotations

import base64
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

SHORTEST = 12  # characters: shorter ones are words that tests use to say that there is no key
LARGEST = 64 << 20  # bytes of a file that are searched: larger ones are bombs of the tests
SEARCHED: Counter[str] = Counter(runs=0, files=0, bytes=0)


def keys_in(env: Mapping[str, str]) -> list[str]:
    values = (value.strip() for name, value in env.items() if name.endswith(("_API_KEY", "_PASSWORD")))
    return [value for value in values if len(value) >= SHORTEST]


def forms(key: str) -> set[bytes]:
    """How a key could stand in a text."""
    plain = os.fsencode(key)
    shifted = (base64.b64encode(bytes(shift) + plain)[(shift * 8 + 5) // 6 :].rstrip(b"=")[:-1] for shift in range(3))
    hexed = plain.hex().encode()
    return {plain, quote(plain, safe="").encode(), hexed, hexed.upper(), *shifted}


class Search:
    """Looks through what one run leaves below its folders: what is new, or not as it was before the run."""

    def __init__(self, keys: Iterable[str], folders: Iterable[Path]) -> None:
        self._forms = {form for key in keys for form in forms(key)}
        self._folders = tuple(map(str, folders))
        self._before = dict(self._files())

    def __call__(self, *streams: str) -> None:
        """Raise AssertionError where a key is in a stream, in a file, or in the name of one."""
        SEARCHED["runs"] += 1
        for text in streams:
            content = text.encode("utf-8", "surrogateescape")
            SEARCHED["bytes"] += len(content)
            assert not self._found(content), f"the key is in the output: {text[:2000]}"
        for path, mark in self._files():
            if self._before.get(path) == mark:
                continue
            content = _content(path)
            SEARCHED["files"] += 1
            SEARCHED["bytes"] += len(content)
            assert not self._found(os.fsencode(path)), f"the key is in a name: {path}"
            assert not self._found(content), f"the key is in {path}"

    def _found(self, content: bytes) -> bool:
        return any(form in content for form in self._forms)

    def _files(self) -> Iterator[tuple[str, tuple[int, int, int]]]:
        """Regular files, and what changes with their content."""
        left = list(self._folders)
        while left:
            try:
                with os.scandir(left.pop()) as entries:
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False):
                            left.append(entry.path)
                        elif entry.is_file(follow_symlinks=False):
                            stat = entry.stat(follow_symlinks=False)
                            yield entry.path, (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            except OSError:
                continue  # gone, or not for this user


def _content(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(LARGEST)
    except OSError:
        return b""
