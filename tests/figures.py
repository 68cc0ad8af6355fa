"""Figures: what long runs have counted, as JSON below `output/`. `tests/reliability.py` makes a document of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "output" / "alicloud-ai-image-zimage-turbo"


def keep(name: str, counts: Mapping[str, Any]) -> Path:
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    return path


def kept(name: str) -> dict[str, Any]:
    """What the last such run has counted. Raises FileNotFoundError where there was none."""
    counts = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert isinstance(counts, dict)
    return counts
