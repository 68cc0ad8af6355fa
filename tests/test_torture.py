"""The byte stream broken at every kind of position, and the program killed there: nothing is lost or paid twice.

A thin slice is played with the other tests, all of it by `make torture`, which counts. The cells are in
tests/torture/cells.py, the proxy that breaks in proxy.py, what must hold in story.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from conftest import IS_WARM, Shell
from torture.cells import CELLS, SLICE, Cell
from torture.many import BATCHES, ManyStory
from torture.story import Story

pytestmark = pytest.mark.skipif(not IS_WARM, reason="a process each, forked; what a socket still holds is Linux's")

BY_NAME = {str(cell): cell for cell in CELLS}


def play(cell: Cell, shell: Shell, record: Callable[[str, Any], None], how: type[Story] = Story) -> None:
    story = how(cell, shell)
    story.play()
    record("torture", story.record())
    assert not story.broken, story.broken


@pytest.mark.smoke
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


def test_every_cell_is_another(shell: Shell) -> None:
    assert len(BY_NAME) == len(CELLS) >= 500
