"""No key in anything that the program leaves: all output and all files of every run of the suite are searched.

A key is what an environment gives the program (`…_API_KEY`), or a test has put into a file; it is looked for as it
is, percent-encoded, in hex, and in base64 wherever its first byte falls in a group of three. `SEARCHED` counts what
was searched, for the last line of a run of pytest.
"""

from __future__ import annotations

import base64
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import quote

SHORTEST = 12  # characters: shorter ones are words that tests use to say that there is no key
SEARCHED: Counter[str] = Counter(runs=0, files=0, bytes=0)


def keys_in(env: Mapping[str, str]) -> list[str]:
    values = (value.strip() for name, value in env.items() if name.endswith("_API_KEY"))
    return [value for value in values if len(value) >= SHORTEST]


def forms(key: str) -> set[bytes]:
    """How a key could stand in a text."""
    plain = os.fsencode(key)
    shifted = (base64.b64encode(bytes(shift) + plain)[(shift * 8 + 5) // 6 :].rstrip(b"=")[:-1] for shift in range(3))
    hexed = plain.hex().encode()
    return {plain, quote(plain, safe="").encode(), hexed, hexed.upper(), *shifted}


class Search:
    """Looks through what one run leaves below its folders; what lay there with a key in it before is the test's own."""

    def __init__(self, keys: Iterable[str], folders: Iterable[Path]) -> None:
        self._forms = {form for key in keys for form in forms(key)}
        self._folders = tuple(folders)
        self._given = {path: stat for path, stat, content in self._files() if self._found(content)}

    def __call__(self, *streams: str) -> None:
        """Raise AssertionError where a key is in a stream, in a file, or in the name of one."""
        SEARCHED["runs"] += 1
        for text in streams:
            content = text.encode("utf-8", "surrogateescape")
            SEARCHED["bytes"] += len(content)
            assert not self._found(content), f"the key is in the output: {text[:2000]}"
        for path, stat, content in self._files():
            SEARCHED["files"] += 1
            SEARCHED["bytes"] += len(content)
            assert not self._found(bytes(path)), f"the key is in a name: {path}"
            assert self._given.get(path) == stat or not self._found(content), f"the key is in {path}"

    def _found(self, content: bytes) -> bool:
        return any(form in content for form in self._forms)

    def _files(self) -> Iterable[tuple[Path, tuple[int, int], bytes]]:
        for path in (path for folder in self._folders for path in folder.rglob("*")):
            try:
                if path.is_file() and not path.is_symlink():
                    stat = path.stat()
                    yield path, (stat.st_size, stat.st_mtime_ns), path.read_bytes()
            except OSError:
                continue  # gone, or not for this user
