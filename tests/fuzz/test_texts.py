"""Texts and values of others: safe to show, safe to keep, and the same when read again."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fuzz.conftest import cases
from fuzz.promises import assert_keyless, assert_one_line, plain_json
from fuzz.strategies import json_values, scalars, texts
from zimage.files import LONGEST_REPEATED, leftovers_of, to_json
from zimage.outside import kept_text, outside_json, outside_text, shown
from zimage.paths import LONGEST_NAME, is_file_name, slug_of
from zimage.settle import own_command


@cases(150, 3_000, value=scalars | texts, limit=st.integers(1, 600))
def test_a_shown_text_is_one_short_line_without_a_key(value: object, limit: int) -> None:
    text = outside_text(value, limit)
    assert_one_line(text)
    assert_keyless(text)
    assert len(text) <= limit
    assert outside_text(text, limit) == text


@cases(100, 2_000, value=json_values())
def test_a_shown_value_is_one_short_line_without_a_key(value: Any) -> None:
    text = shown(value)
    assert_one_line(text)
    assert_keyless(text)
    assert len(text) <= 60


@cases(100, 2_000, value=texts | scalars)
def test_a_kept_text_is_text(value: object) -> None:
    text = kept_text(value)
    assert text.encode().decode() == text
    assert not set(text) & set(map(chr, [*range(9), *range(11, 32), *range(127, 160)]))
    assert_keyless(text)
    assert kept_text(text) == text.strip()


@cases(100, 2_000, value=json_values(max_leaves=30))
def test_a_kept_value_is_json_of_bounded_size(value: Any) -> None:
    kept = outside_json(value)
    assert plain_json(kept) == kept
    assert_keyless(json.dumps(kept, ensure_ascii=False))
    assert outside_json(kept) == kept


@cases(100, 2_000, value=json_values())
def test_what_is_written_is_read_again(value: Any) -> None:
    """And holds nothing that a terminal obeys: people look into these files."""
    content = to_json(value)
    assert not set(content.decode()) & set(map(chr, [*range(10), *range(11, 32), *range(127, 160)]))
    assert json.dumps(json.loads(content, parse_int=int)) == json.dumps(value)


@cases(100, 2_000, prompt=texts)
def test_a_slug_is_part_of_a_file_name(prompt: str) -> None:
    slug = slug_of(prompt)
    assert_one_line(slug)
    assert is_file_name(slug) and len(slug) <= 40 < LONGEST_NAME
    assert slug == "" or (Path(slug).name == slug and slug not in (".", "..") and not slug.startswith("-"))


file_names = texts.filter(is_file_name)


@cases(100, 1_000, names=st.lists(file_names, min_size=1, max_size=3), other=file_names)
def test_a_name_that_is_removed_is_literal(names: list[str], other: str) -> None:
    made = re.compile(leftovers_of(*names))
    assert [name for name in names if made.fullmatch(name)] == [
        n for n in names if len(os.fsencode(n)) <= LONGEST_REPEATED
    ]
    assert not made.fullmatch(other) or any(name.startswith(other) for name in names)


@cases(30, 500, words=st.lists(texts.filter(lambda text: "\0" not in text), max_size=3))
def test_a_command_of_ours_is_read_by_a_shell_as_it_was_meant(words: list[str]) -> None:
    """By the system's own shell: a process each, as nothing else reads what it reads."""
    command = own_command(*words)
    if command is None:  # only what no shell can hand over, or no file name hold
        assert any(word.endswith("\n") or not is_file_name(word[:20]) for word in words)
        return
    assert_one_line(command)
    told = subprocess.run(["sh", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True).stdout
    assert told.split(b"\0")[2:-1] == [os.fsencode(word) for word in words]
