"""Evidence files that a test writes by hand, as the command would write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zimage.contract import SKILL, VERSION

NAME = "20260101T000000Z-00000000.json"


def evidence_file(folder: Path, **changes: Any) -> Path:
    """One of a picture that is paid for, with some fields changed."""
    data = {
        "schema_version": 1,
        "tool": {"name": SKILL, "version": VERSION},
        "status": "generated",
        "provider": "dashscope",
        "region": "beijing",
        "endpoint": "https://dashscope.aliyuncs.com/api/v1/services/aigc/multimodal-generation/generation",
        "operation": "image.generate",
        "billable": True,
        "request": {"prompt": "a cat", "size": "512*512", "seed": 5, "prompt_extend": False},
        "payload": {},
        "output": str(folder / "cat.png"),
        "started_at": "2026-01-01T00:00:00.000Z",
        "attempts": [{"at": "2026-01-01T00:00:00.000Z"}],
        "cost": {"estimate": 0.01434, "currency": "USD", "basis": "list price", "price_list_date": "2026"},
    }
    path = folder / NAME
    path.write_text(json.dumps(data | changes))
    return path
