"""No regular expression takes more than its text's length: what matches text from outside must not hang on it.

All patterns of the skill are tried, wherever they stand, not only those that a stranger's text gets to today.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import time
from collections.abc import Callable, Iterator

import pytest

from conftest import SCRIPTS
from zimage.answers import link_expiry, read_json, retry_after, service_failure
from zimage.calls import HttpAnswer
from zimage.evidence import utc_now
from zimage.files import to_json
from zimage.outside import kept_text, outside_json, outside_text, remember_secret, told_line
from zimage.paths import slug_of
from zimage.request import request_problems

pytestmark = pytest.mark.heavy  # by its time

SIZE, LONGEST_S = 20_000, 0.2  # characters, and seconds of the processor: a pattern that looks back takes 1 or more
PIECES = [
    " ",
    "\t",
    "a",
    "A",
    "0",
    "-",
    "_",
    ".",
    "/",
    ":",
    "@",
    "=",
    "#",
    '"',
    "'",
    "\\",
    "\n",
    "<",
    "{",
    "[",
    "雪",
    "\x1b",
]
PIECES += [
    "a ",
    " a",
    "a.",
    "-a",
    "a-",
    "0.",
    "://",
    "sk-",
    "sk-a",
    "a@",
    "%41",
    "\\u0041",
    "a\n",
    " \n",
    "1*",
    ".part",
]
PIECES += ["<script>", "{a}", "CREATE TABLE a (", "https://", "data:", ",", "unsafe ", "nsfw", "export ", "x.y/"]
READS = {
    f"re.{name}" for name in ("compile", "match", "fullmatch", "search", "findall", "finditer", "sub", "subn", "split")
}
SOURCES = [path for path in sorted(SCRIPTS.rglob("*.py")) if "zimage_mock" not in path.parts]


def patterns() -> dict[str, re.Pattern[str]]:
    """Those that modules hold compiled, and those that stand as text in a call of `re`; by where they stand."""
    found: dict[str, re.Pattern[str]] = {}
    for path in SOURCES:
        name = ".".join(path.relative_to(SCRIPTS).with_suffix("").parts)
        if path.parent.name != "providers":  # which are loaded from their files
            held = vars(importlib.import_module(name)).items()
            found |= {f"{name}.{key}": value for key, value in held if isinstance(value, re.Pattern)}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in READS and node.args:
                said = node.args[0]
                if isinstance(said, ast.Constant) and isinstance(said.value, str):
                    begins = r"\A" if ast.unparse(node.func) == "re.match" else ""
                    found[f"{name}:{node.lineno}"] = re.compile(begins + said.value)
    return {name: pattern for name, pattern in found.items() if isinstance(pattern.pattern, str)}


def hostile() -> Iterator[str]:
    for piece in PIECES:
        bulk = piece * (SIZE // len(piece))
        yield from (f"a{bulk}\x00b", f"https://{bulk}?")


def test_no_pattern_looks_back_at_what_it_has_seen() -> None:
    slow = {}
    found = patterns()
    for name, pattern in found.items():
        for text in hostile():
            began = time.process_time()
            pattern.fullmatch(text)
            pattern.sub("", text)
            if time.process_time() - began > LONGEST_S:
                slow[name] = text[:20]
    assert len(found) > 40
    assert slow == {}


def test_this_test_finds_the_pattern_that_was_slow() -> None:
    pattern = re.compile(r"(?m)^[ \t]*KEY[ \t]*=[ \t]*(.*?)[ \t\r]*$")
    began = time.process_time()
    pattern.search(f"KEY=a{' ' * SIZE}b")
    assert time.process_time() - began > LONGEST_S


def answer(text: str) -> HttpAnswer:
    return HttpAnswer(200, {"retry-after": text}, text.encode())


READERS: dict[str, Callable[[str], object]] = {
    "outside_text": outside_text,
    "outside_json": lambda text: outside_json({text: [text, {text: text}]}),
    "kept_text": kept_text,
    "told_line": told_line,
    "slug_of": slug_of,
    "to_json": to_json,
    "retry_after": lambda text: retry_after(answer(text)),
    "a failure in text": lambda text: service_failure(answer(text), is_own_json=False),
    "a failure in a page": lambda text: service_failure(answer(f"<html>{text}"), is_own_json=False),
    "a failure in XML": lambda text: service_failure(answer(f"<?xml{text}"), is_own_json=False),
    "a failure in events": lambda text: service_failure(answer(f"data:{text}\ndata:{{}}"), is_own_json=False),
    "a failure in JSON": lambda text: service_failure(
        answer(json.dumps({"code": text, "message": text, "output": {"text": text, "url": text}})), is_own_json=False
    ),
    "read_json": lambda text: read_json(answer(text)),
    "link_expiry": lambda text: link_expiry(f"https://x/?{text}", utc_now()),
    "request": lambda text: request_problems({"prompt": text, "size": text, "base_url": text, text: 1}),
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", READERS)
def test_no_reader_of_outside_text_takes_longer_than_its_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zimage.outside._secrets", set())
    remember_secret("sk-0123456789abcdef")
    slowest = ("", 0.0)
    for text in [*hostile(), "SK-0123456789ABCDEF " * 10_000, "sk-0123456789abcde" * 10_000]:
        began = time.process_time()
        READERS[name](text)
        slowest = max(slowest, (text[:10], time.process_time() - began), key=lambda pair: pair[1])
    assert slowest[1] < 0.5, (name, slowest)
