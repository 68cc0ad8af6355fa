"""Keys: whatever lies in the places where keys are kept, a key is found, or told to be missing, at once."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from hypothesis import strategies as st

from fuzz.conftest import cases
from fuzz.promises import assert_failure, assert_one_line
from fuzz.strategies import HOSTILE, KEY, changed_bytes, texts
from zimage import outside
from zimage.errors import Failure
from zimage.keys import PLACEHOLDER, KeyPlaces, find_key
from zimage.registry import provider_class

PLACES = cast("KeyPlaces", provider_class("dashscope").key_places)
VARIABLE, INI_OPTION, FILE_VARIABLE = PLACES.variable, str(PLACES.ini_option), str(PLACES.file_variable)
DOTENV_FILE, INI_FILE, KEY_FILE = ".env", str(PLACES.ini_file), str(PLACES.file)
FILES = (DOTENV_FILE, INI_FILE, KEY_FILE)
DOTENV = f"# mine\nexport OTHER=1\n{VARIABLE}='{KEY}' # the key\n".encode()
INI = f"[default]\n{INI_OPTION} = {KEY}\n[other]\nx = y\n".encode()
ALONE = f"{KEY}\n".encode()
LONG = 64 * 1024

long_lines = st.builds(
    lambda begin, fill, end: (begin + fill * (LONG // len(fill)) + end).encode(),
    st.sampled_from(["", f"{VARIABLE}=", f"{VARIABLE}='", "export ", "[", "[default]\n", "a = 1\n a"]),
    st.sampled_from([" ", "\t", "=", "#", "'", '"', "\\", "\r", "\n", "export ", "a", " #", "' ", "[", ";", "雪"]),
    st.sampled_from(["", "x", "'", "\n", " x"]),
)
some_bytes = st.one_of(st.binary(max_size=200), texts.map(lambda text: text.encode("utf-8", "surrogatepass")))
lines = st.lists(
    st.one_of(
        st.builds(
            lambda *parts: "".join(parts),
            st.sampled_from(["", " ", "export ", "export\t", "#", "\ufeff"]),
            st.sampled_from([VARIABLE, VARIABLE.lower(), INI_OPTION, "[default]", "[x]", "x"]),
            st.sampled_from(["=", " = ", ":", "", "=="]),
            st.sampled_from(["", "'", '"', "`"]),
            st.sampled_from([KEY, "sk-0123456789", "", *HOSTILE]),
            st.sampled_from(["", "'", '"', " # x", " ", "\r"]),
        ),
        texts,
    ),
    max_size=5,
).map(lambda found: "\n".join(found).encode("utf-8", "surrogatepass"))


def contents(good: bytes) -> st.SearchStrategy[bytes]:
    return st.one_of(st.just(b""), st.just(good), changed_bytes(good), lines, some_bytes)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty home, which is the working folder too."""
    folder, before = tmp_path_factory.mktemp("home"), os.getcwd()
    for name in FILES[1:]:
        (folder / name).parent.mkdir()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def assert_found_or_told(home: Path, env: dict[str, str]) -> None:
    began = time.process_time()
    try:
        key = find_key(PLACES, {"HOME": str(home)} | env)
    except Failure as failure:
        assert failure.code in ("key_missing", "key_malformed")
        assert_failure(failure)
    else:
        assert re.fullmatch("[!-~]{1,512}", key.value)
        if key.value == KEY:
            assert outside.outside_text(f"no: {key.value}.") == "no: ***."
            assert key.value not in repr(key)
        assert_one_line(key.source)
    assert time.process_time() - began < 1  # seconds; a file of 64 KiB is nothing


@cases(
    75,
    2_000,
    dotenv=contents(DOTENV),
    ini=contents(INI),
    alone=contents(ALONE),
    named=contents(ALONE),
    places=st.sets(st.integers(0, 3)),
    profile=texts.filter(lambda text: "\0" not in text),
)
def test_the_files_of_keys_may_hold_anything(
    home: Path, dotenv: bytes, ini: bytes, alone: bytes, named: bytes, places: set[int], profile: str
) -> None:
    paths = [home / DOTENV_FILE, home / INI_FILE, home / KEY_FILE, home / "named"]
    env: dict[str, str] = {}
    for number, (path, content) in enumerate(zip(paths, (dotenv, ini, alone, named), strict=True)):
        path.unlink(missing_ok=True)
        if number in places:
            path.write_bytes(content)
    if 3 in places:
        env[FILE_VARIABLE] = str(paths[3])
    if len(profile) > 5:
        env[PLACES.ini_profile_variables[0]] = profile
    assert_found_or_told(home, env)


@cases(40, 200, content=long_lines, place=st.sampled_from(FILES))
def test_a_long_line_is_read_at_once(home: Path, content: bytes, place: str) -> None:
    for name in FILES:
        (home / name).unlink(missing_ok=True)
    (home / place).write_bytes(content)
    assert_found_or_told(home, {})


@cases(100, 1_500, text=texts)
def test_a_variable_may_hold_anything(home: Path, text: str) -> None:
    for name in FILES:
        (home / name).unlink(missing_ok=True)
    assert_found_or_told(home, {VARIABLE: text})


plain_keys = st.text(
    st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="\"'<>#\\"), min_size=6, max_size=60
).filter(lambda text: not PLACEHOLDER.search(text))


@cases(
    100,
    1_500,
    value=plain_keys,
    begin=st.sampled_from(["", "export ", "  ", "\texport  "]),
    quote=st.sampled_from(["", "'", '"']),
    end=st.sampled_from(["\n", " # mine\n", "\r\n", ""]),
    more=st.sampled_from(["", "A=1\n", "# DASHSCOPE_API_KEY=no\n"]),
)
def test_a_key_in_a_dotenv_file_is_that_key(
    home: Path, value: str, begin: str, quote: str, end: str, more: str
) -> None:
    for name in FILES[1:]:
        (home / name).unlink(missing_ok=True)
    (home / DOTENV_FILE).write_bytes(f"{more}{begin}{VARIABLE}={quote}{value}{quote}{end}".encode())
    assert find_key(PLACES, {"HOME": str(home)}).value == value
