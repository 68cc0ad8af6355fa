"""The contract's schemas, closed: what a command writes has no field that its schema does not name.

Users get them open, so that a later version may add one; here a field that slips out, or is spelt wrong, fails.
"""

from __future__ import annotations

from typing import Any

import jsonschema

from zimage.contract import ERROR_SCHEMA, EVIDENCE_SCHEMA, REQUEST_SCHEMA, RESPONSE_SCHEMA, RESULT_SCHEMA

# What a service, a provider or a batch fills as it likes.
OPEN = ("payload", "usage", "settings", "timings_ms", "changes", "progress")


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with no unknown field in any object but those named in OPEN."""
    fields = {
        name: rule if name in OPEN else closed(REQUEST_SCHEMA if name == "request" else rule)
        for name, rule in schema.get("properties", {}).items()
    }
    changes: dict[str, Any] = {"properties": fields} if fields else {}
    if schema.get("type") == "object":
        changes["additionalProperties"] = False
    if "items" in schema:
        changes["items"] = closed(schema["items"])
    return schema | changes


CLOSED = {
    name: jsonschema.Draft202012Validator(closed(schema))
    for name, schema in {
        "request": REQUEST_SCHEMA,
        "response": RESPONSE_SCHEMA,
        "evidence": EVIDENCE_SCHEMA,
        "error": ERROR_SCHEMA,
        "result": RESULT_SCHEMA,
    }.items()
}


def assert_closed(name: str, value: object) -> None:
    """The value is what the schema of this name describes, and nothing more."""
    faults = [f"{fault.json_path}: {fault.message[:500]}" for fault in CLOSED[name].iter_errors(value)]
    assert not faults, (name, faults)


def assert_answer_closed(answer: dict[str, Any]) -> None:
    """What a command has printed as JSON: a response, a plan, or a summary; each with errors in it."""
    for error in (answer.get("error"), *answer.get("problems", ())):
        if error is not None:
            assert_closed("error", error)
    if "image_path" in answer:
        assert_closed("response", answer)
    if "payload" in answer:
        assert_closed("request", answer["request"])
