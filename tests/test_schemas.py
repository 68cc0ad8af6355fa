"""The schemas: the types that the program is checked with name the same fields."""

from __future__ import annotations

from typing import Any

import pytest

from zimage import facts
from zimage.batch.contract import KEPT_FACTS
from zimage.contract import ERROR_SCHEMA, EVIDENCE_SCHEMA, REQUEST_SCHEMA
from zimage.errors import Fault

PARTS = EVIDENCE_SCHEMA["properties"]


@pytest.mark.parametrize(
    ("kind", "schema"),
    [
        (facts.Content, EVIDENCE_SCHEMA),
        (facts.Attempt, PARTS["attempts"]["items"]),
        (facts.Response, PARTS["response"]),
        (facts.Image, PARTS["image"]),
        (facts.Cost, PARTS["cost"]),
        (facts.Error, ERROR_SCHEMA),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_type_has_the_fields_of_its_schema(kind: Any, schema: dict[str, Any]) -> None:
    assert set(kind.__annotations__) == set(schema["properties"])
    always = {"started_at", "attempts"} if kind is facts.Content else set()
    assert {*kind.__required_keys__, *always} == set(schema.get("required", ()))


def test_a_normalized_request_has_fields_of_the_request() -> None:
    assert set(facts.Request.__annotations__) == set(REQUEST_SCHEMA["properties"]) - {"aspect_ratio"}


def test_a_row_remembers_what_its_type_says() -> None:
    assert set(KEPT_FACTS) == set(facts.Facts.__annotations__) == set(facts.Changes.__annotations__) - {"status"}


def test_an_error_tells_all_facts_of_a_fault() -> None:
    assert set(facts.Error.__annotations__) == set(Fault._fields) - {"lasting"}
