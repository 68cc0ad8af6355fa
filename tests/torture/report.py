"""The counts of a run of `make torture`: one JSON line, and a file that also has each cell."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

COUNTED = ("paid", "saved", "killed", "told_unknown")
# Each promise that can be broken has a name here; a run counts how often it was.
BROKEN = ("lost", "paid_twice", "leak", "hang", "traceback", "untrue", "image", "exit_code", "advice", "files")


def summed(records: list[dict[str, Any]], failed: int) -> dict[str, int]:
    """Of all cells: how many, what was paid and saved in them, and how often each promise was broken."""
    counts = {"cells": len(records), "commands": sum(record["commands"] for record in records), "failed": failed}
    return counts | {name: sum(int(record.get(name, 0)) for record in records) for name in (*COUNTED, *BROKEN)}


def write(path: Path, properties: Iterable[tuple[str, Any]], failed: int) -> str:
    """Write the file; returns the line."""
    records = [value for name, value in properties if name == "torture"]
    sums = summed(records, failed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(sums | {"each": records}, indent=1) + "\n", encoding="utf-8")
    return json.dumps(sums)
