"""The counts of a run of `make torture`, kept with each of its cells."""

from __future__ import annotations

import json
from typing import Any

import figures

COUNTED = ("commands", "paid", "saved", "killed", "told_unknown")
# Each promise that can be broken has a name here; a run counts how often it was. Missed: the break was not come to.
BROKEN = (
    "missed",
    "lost",
    "paid_twice",
    "leak",
    "hang",
    "traceback",
    "untrue",
    "image",
    "exit_code",
    "advice",
    "files",
)


def torture_figures(terminalreporter: Any) -> str:
    """Keep the counts that the cells have left as properties of their tests; returns them as a line of JSON."""
    reports = [report for ended in ("passed", "failed") for report in terminalreporter.getreports(ended)]
    cells = [value for report in reports for name, value in report.user_properties if name == "torture"]
    counts = {"cells": len(cells), "failed": len(terminalreporter.getreports("failed"))}
    counts |= {name: sum(int(cell.get(name, 0)) for cell in cells) for name in (*COUNTED, *BROKEN)}
    figures.keep("torture", counts | {"each": cells})
    return json.dumps(counts)
