"""Services: a whole command against one that answers anything, and after it, its recovery."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from closed import assert_closed
from fuzz.conftest import cases
from fuzz.place import Done, Place
from fuzz.services import Service, services
from provider_cases import CASES


def evidence_in(place: Place) -> list[dict[str, Any]]:
    """What the commands have left of their pictures."""
    found = [json.loads(path.read_bytes()) for path in place.project.rglob("evidence/*.json")]
    for content in found:
        assert_closed("evidence", content)
    return found


def assert_told_truly(place: Place, done: Done) -> None:
    """Exit code, error, evidence and files say the same of the money and of the picture."""
    found = evidence_in(place)
    evidence = found[0] if found else None
    paid = [attempt.get("billed", "unknown") for attempt in evidence["attempts"]] if evidence else []
    costs = bool(evidence and evidence["billable"])
    assert not costs or all(billed == "no" for billed in paid[:-1]), "sent again only what surely was not billed"
    assert len(done.service.paid) == len(paid)
    pictures = [name for name in place.files() if name.endswith("fox.png")]
    if done.code == 0:
        assert evidence and evidence["status"] == "saved" and len(pictures) == 1
    else:
        assert not pictures and (evidence is None or evidence["status"] != "saved")
        error = done.error
        assert error is not None
        if evidence is not None:
            billed = {"failed": "no", "generated": "yes"}.get(evidence["status"], error["billed"])
            assert error["billed"] == billed
            assert evidence["error"]["code"] == error["code"]
        if error["retryable"]:
            assert error["billed"] == "no" or not costs
    left = [name for name in place.files() if name.endswith(".part")]
    assert left == []


@cases(
    40,
    2_000,
    provider=st.sampled_from([case.provider for case in CASES]),
    service=services,
    later=services,
    timeout=st.sampled_from(["1", "5", "100"]),
)
def test_whatever_a_service_answers_is_told_truly_and_paid_once(
    place: Place, provider: str, service: Service, later: Service, timeout: str
) -> None:
    place.clear()
    arguments = (
        "--provider",
        provider,
        "--prompt",
        "a fox",
        "--output",
        "fox.png",
        "--print-response",
        "--timeout",
        timeout,
    )
    done = place.run("generate_image.py", *arguments, service=service)
    assert_told_truly(place, done)
    paths = list(place.project.rglob("evidence/*.json"))
    if paths:
        again = place.run("generate_image.py", "--recover", str(paths[0]), "--print-response", service=later)
        assert not again.service.paid, "a recovery never pays"
        assert again.code == 0 or done.code != 0, "what is saved stays saved"
        evidence_in(place)
        if again.error and done.error and done.error["billed"] == "yes":
            assert again.error["billed"] == "yes", "what is paid stays paid"


@cases(25, 1_000, provider=st.sampled_from([case.provider for case in CASES]), service=services)
def test_a_check_costs_nothing_whatever_is_answered(place: Place, provider: str, service: Service) -> None:
    place.clear()
    done = place.run("generate_image.py", "--check", "--provider", provider, service=service)
    assert not service.paid and not service.fetched and place.files() == {}
    if done.code:
        assert done.error is not None and done.error["billed"] == "no"
