"""What holds for every answer, whatever came in."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

from closed import assert_closed
from fuzz.strategies import KEY
from provider_cases import KEYS
from zimage.errors import KINDS, Failure

# Of one picture and of a batch: README, "exit codes".
EXITS = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 130, 143}


def assert_one_line(text: str) -> None:
    """Nothing that a terminal obeys, that turns text around, or that begins another line."""
    strange = [sign for sign in text if unicodedata.category(sign) in ("Cc", "Zl", "Zp", "Cs")]
    strange += re.findall("[\u202a-\u202e\u2066-\u2069]", text)
    assert not strange, (strange, text[:500])


def assert_keyless(text: str) -> None:
    assert not [key for key in {KEY, *KEYS.values()} if key in text], text[:500]


def assert_failure(failure: Failure) -> None:
    """A failure as the contract has it: a row of the table, one line, and never paid twice for a second try."""
    fault = failure.fault
    assert_error(json.loads(json.dumps(fault.as_json())))
    assert not (fault.retryable and fault.billed != "no"), fault


def assert_error(error: dict[str, Any]) -> None:
    """An error object, read back from JSON."""
    assert_closed("error", error)
    assert error["code"] in KINDS and error["code"] != "internal_error", error
    assert error["exit_code"] in EXITS - {0}, error
    for text in (error["message"], error["hint"], *error.get("problems", ())):
        assert_one_line(text)
    told = {name: value for name, value in error.items() if name != "image_url"}  # links stay whole
    assert_keyless(json.dumps(told, ensure_ascii=False))


def plain_json(value: Any) -> Any:
    """The value after a way through a file: no NaN, and text that UTF-8 can carry."""
    return json.loads(json.dumps(value, ensure_ascii=False, allow_nan=False).encode())
