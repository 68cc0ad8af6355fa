"""The schemas: the types of the program name the same fields, and the tests let no other field pass."""

from __future__ import annotations

from typing import Any

import pytest

from closed import CLOSED, assert_answer_closed
from zimage import facts
from zimage.batch.contract import KEPT_FACTS
from zimage.contract import ERROR_SCHEMA, EVIDENCE_SCHEMA, REQUEST_SCHEMA
from zimage.errors import NOT_TOLD, Fault

PARTS = EVIDENCE_SCHEMA["properties"]


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("kind", "schema"),
    [
        (facts.Content, EVIDENCE_SCHEMA),
        (facts.Attempt, PARTS["attempts"]["items"]),
        (facts.Response, PARTS["response"]),
        (facts.Unread, PARTS["answer"]),
        (facts.Image, PARTS["image"]),
        (facts.Cost, PARTS["cost"]),
        (facts.Error, ERROR_SCHEMA),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_type_has_the_fields_of_its_schema(kind: Any, schema: dict[str, Any]) -> None:
    assert set(kind.__annotations__) == set(schema["properties"])
    always = {"started_at", "attempts", "billable", "request", "payload"} if kind is facts.Content else set()
    assert {*kind.__required_keys__, *always} == set(schema.get("required", ()))


def test_a_normalized_request_has_fields_of_the_request() -> None:
    assert set(facts.Request.__annotations__) == set(REQUEST_SCHEMA["properties"]) - {"aspect_ratio"}


def test_a_row_remembers_what_its_type_says() -> None:
    changed = {"status", "request", "payload", *facts.AskedAt.__annotations__}  # of the evidence alone
    assert set(KEPT_FACTS) == set(facts.Facts.__annotations__) == set(facts.Changes.__annotations__) - changed


def test_an_error_tells_all_facts_of_a_fault() -> None:
    assert set(facts.Error.__annotations__) == set(Fault._fields) - set(NOT_TOLD)


ERROR = Fault.of("disk", "x").as_json()
RESULT = {
    "number": 0,
    "state": "failed",
    "prompt": "x",
    "size": "512*512",
    "prompt_extend": False,
    "output": "images/0.png",
    "estimated_cost": 0,
    "attempts": 1,
}


@pytest.mark.parametrize(
    ("name", "value", "extra"),
    [
        ("error", ERROR, {"lasting": True}),
        ("result", RESULT, {"service": 1}),
        ("result", RESULT, {"error": {**ERROR, "image_url": "https://x.aliyuncs.com/1.png"}}),
        ("request", {"prompt": "x"}, {"steps": 8}),
    ],
)
def test_a_field_that_no_schema_names_is_found(name: str, value: dict[str, Any], extra: dict[str, Any]) -> None:
    assert CLOSED[name].is_valid(value)
    assert not CLOSED[name].is_valid({**value, **extra})


@pytest.mark.parametrize("part", ["tool", "attempts", "request", "response", "image", "cost", "error"])
def test_it_is_found_in_every_part_of_an_evidence(part: str) -> None:
    value = [{"at": "x", "lasting": True}] if part == "attempts" else {"lasting": True}
    (found,) = [
        fault for fault in CLOSED["evidence"].iter_errors({part: value}) if fault.validator == "additionalProperties"
    ]
    assert "lasting" in found.message


@pytest.mark.parametrize("answer", [{"error": ERROR}, {"problems": [ERROR]}, {"saved": 1, "error": ERROR}])
def test_errors_are_found_in_every_answer(answer: dict[str, Any]) -> None:
    assert_answer_closed(answer)
    more = {**ERROR, "lasting": True}
    worse = {"problems": [more], "error": more}
    with pytest.raises(AssertionError, match="lasting"):
        assert_answer_closed({**answer, **{name: worse[name] for name in answer if name in worse}})
