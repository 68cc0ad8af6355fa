"""The byte stream broken at every kind of position, and the program killed there: nothing is lost or paid twice.

A thin slice is played by `make check-all`, all of it by `make torture`, which counts. The cells are in
tests/torture/cells.py, the proxy that breaks in proxy.py, what must hold in story.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from conftest import IS_WARM, Shell
from torture.cells import CELLS, SLICE, Cell
from torture.many import BATCHES, ManyStory
from torture.story import Story
from zimage.answers import read_begun_json
from zimage.calls import HttpAnswer
from zimage.outside import at

pytestmark = pytest.mark.skipif(not IS_WARM, reason="a process each, forked; what a socket still holds is Linux's")

BY_NAME = {str(cell): cell for cell in CELLS}


def play(cell: Cell, shell: Shell, record: Callable[[str, Any], None], how: type[Story] = Story) -> None:
    story = how(cell, shell)
    story.play()
    if {name for name, _ in story.broken} in ({"hang"}, {"missed"}):  # a busy machine is late, too: once more
        folder, home = shell.folder.with_name("again"), shell.home.with_name("home again")
        folder.mkdir()
        home.mkdir()
        story = how(cell, Shell(folder, home))
        story.play()
    record("torture", story.record())
    assert not story.broken, story.broken


@pytest.mark.smoke
@pytest.mark.heavy  # by its time
@pytest.mark.parametrize("name", SLICE)
def test_a_break_costs_nothing_that_was_paid_for(
    shell: Shell, name: str, record_property: Callable[[str, Any], None]
) -> None:
    play(BY_NAME[name], shell, record_property)


@pytest.mark.torture
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_no_break_costs_anything_that_was_paid_for(
    shell: Shell, cell: Cell, record_property: Callable[[str, Any], None]
) -> None:
    play(cell, shell, record_property)


@pytest.mark.torture
@pytest.mark.parametrize("cell", BATCHES, ids=str)
def test_no_break_costs_a_batch_anything(shell: Shell, cell: Cell, record_property: Callable[[str, Any], None]) -> None:
    play(cell, shell, record_property, ManyStory)


ANSWER = {
    "request_id": "r\\1",
    "output": {"choices": [{"message": {"content": [{"image": 'http://x/a?b="c"&d=\\'}, {"text": "a, [b]: {c}"}]}}]},
    "usage": {"width": 512, "none": None, "list": [1, 2.5, True, "x"]},
}


def begun(text: str, status: int = 200) -> Any:
    return read_begun_json(HttpAnswer(status, {}, text.encode(), False))


def is_part(part: Any, whole: Any) -> bool:
    """Whether nothing stands in it that is not in the whole."""
    if isinstance(part, dict):
        return all(name in whole and is_part(value, whole[name]) for name, value in part.items())
    if isinstance(part, list):
        return len(part) <= len(whole) and all(map(is_part, part, whole))
    return bool(part == whole)


def test_of_an_answer_that_breaks_off_what_had_come_whole_is_read() -> None:
    text = json.dumps(ANSWER)
    assert begun(text) == ANSWER
    link_ends = text.index('"}, {"text') + 1
    for end in range(1, len(text)):
        part = begun(text[:end])
        assert is_part(part or {}, ANSWER), (text[:end], part)
        content = at(part, "output", "choices", 0, "message", "content", 0, "image")
        assert (content is not None) == (end >= link_ends), (text[:end], part)


@pytest.mark.parametrize("text", ['{"a": 1]', "[1, 2", "x", "", '{"a": "b" "c": "d"', '{"code": "Throttl'])
def test_what_is_no_beginning_of_an_answer_is_none(text: str) -> None:
    assert not begun(text)


def test_an_error_that_breaks_off_says_nothing() -> None:
    assert begun('{"code": "Throttling", "message": "wa', status=429) is None


@pytest.mark.parametrize(
    "start, unit", [("{", '"a":['), ('{"a": "', '\\"'), ('{"a": [', "[1,"), ("{", '"'), ('{"', "\\")]
)
def test_an_answer_made_to_be_slow_is_read_in_time(start: str, unit: str) -> None:
    began = time.process_time()
    begun(start + unit * (2_000_000 // len(unit)))
    assert time.process_time() - began < 5


def test_every_cell_is_another(shell: Shell) -> None:
    assert len(BY_NAME) == len(CELLS) >= 500
