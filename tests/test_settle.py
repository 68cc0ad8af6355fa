"""The one table of states: what every end leaves of a picture, what is told of it; state only moves forward."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from conftest import SKILL
from zimage.errors import BILLED, KINDS, Failure, Fault, Left
from zimage.evidence import Evidence, EvidenceFile
from zimage.settle import (
    DEAD_LINK,
    NO_SECOND_TRY,
    STATES,
    TASK_ENDS,
    TASK_IS_DONE,
    Have,
    Way,
    left_by,
    most_billed,
    settle,
    table,
    way_back,
)

ERRORS_MD = (SKILL / "references" / "errors.md").read_text(encoding="utf-8")
STATUSES = ("submitting", "submitted", "generated", "saved", "failed", "unknown")
LINK = "https://x.aliyuncs.com/1.png"
NOTHING = Have("no", "submitting", task=False, link="", held=False, billable=True)


def every_have() -> list[Have]:
    """All that can be known of a picture, possible or not."""
    parts: Any = (BILLED, STATUSES, (False, True), ("", LINK), (False, True), (False, True))
    return [Have(*combination) for combination in itertools.product(*parts)]


def evidence(tmp_path: Path, status: str, **facts: Any) -> Evidence:
    data: Any = {"status": status, "billable": True, "attempts": [{"at": "2026-01-01T00:00:00.000Z"}]}
    return Evidence(tmp_path / "20260101T000000Z-00000000.json", data | facts)


@pytest.mark.smoke
@pytest.mark.parametrize("code", KINDS)
def test_what_is_paid_never_becomes_unpaid(code: str) -> None:
    for billed, have in itertools.product(BILLED, every_have()):
        left = left_by(Fault.of(code, "x", billed=billed), have)
        known = most_billed(billed, have.billed)
        if known == "yes":
            assert left in (Left.PAID, Left.SPENT, Left.OPEN), (billed, have)
        if known == "unknown":
            assert left in (Left.UNKNOWN, Left.SPENT, Left.OPEN), (billed, have)
        assert (left is Left.OPEN) == (have.is_task_open and code not in TASK_ENDS), (billed, have)


ROWS = [  # code, what is known before, what is left, how it can be had
    ("rate_limited", NOTHING, Left.AGAIN, Way.NONE),
    ("disk", NOTHING, Left.AGAIN, Way.NONE),
    ("balance", NOTHING, Left.AGAIN, Way.NONE),
    ("blocked", NOTHING, Left.REFUSED, Way.NONE),
    ("rejected_by_service", NOTHING, Left.REFUSED, Way.NONE),
    ("outcome_unknown", NOTHING, Left.UNKNOWN, Way.NONE),
    ("no_image", NOTHING, Left.UNKNOWN, Way.NONE),
    ("disk", NOTHING._replace(billed="yes", status="generated", link=LINK), Left.PAID, Way.FETCH),
    ("disk", NOTHING._replace(billed="yes", status="generated", held=True), Left.PAID, Way.FETCH),
    ("paid_not_downloaded", NOTHING._replace(billed="yes", status="generated", link=LINK), Left.PAID, Way.FETCH),
    ("link_expired", NOTHING._replace(billed="yes", status="generated", link=LINK), Left.SPENT, Way.NONE),
    ("link_expired", NOTHING._replace(billed="yes", status="generated", link=LINK, task=True), Left.SPENT, Way.ASK),
    ("link_refused", NOTHING._replace(billed="yes", status="generated", link=LINK), Left.PAID, Way.FETCH),
    ("image_unusable", NOTHING._replace(billed="yes", status="generated", link=LINK), Left.SPENT, Way.FETCH),
    ("hop_refused", NOTHING._replace(billed="yes", status="generated", link=LINK), Left.SPENT, Way.NONE),
    ("unreachable", NOTHING._replace(billed="unknown", status="submitted", task=True), Left.OPEN, Way.ASK),
    ("key_rejected", NOTHING._replace(billed="unknown", status="submitted", task=True), Left.OPEN, Way.ASK),
    ("outcome_unknown", NOTHING._replace(billed="unknown", status="submitted", task=True), Left.UNKNOWN, Way.ASK),
    ("task_failed", NOTHING._replace(billed="no", status="submitted", task=True), Left.REFUSED, Way.NONE),
    ("interrupted", NOTHING._replace(billed="unknown"), Left.UNKNOWN, Way.NONE),
    ("internal_error", NOTHING._replace(billed="unknown"), Left.UNKNOWN, Way.NONE),
]


@pytest.mark.parametrize(("code", "have", "left", "way"), ROWS, ids=lambda value: getattr(value, "value", None))
def test_a_failure_leaves_what_the_table_says(code: str, have: Have, left: Left, way: Way) -> None:
    fault = Fault.of(code, "x")
    assert (left_by(fault, have), way_back(fault, have)) == (left, way)


@pytest.mark.parametrize("code", KINDS)
def test_a_way_back_is_named_only_where_there_is_one(code: str) -> None:
    for lasting, have in itertools.product((False, True), every_have()):
        way = way_back(Fault.of(code, "x", lasting=lasting), have)
        if way is Way.ASK:
            assert have.task and code not in TASK_IS_DONE
            assert not have.link or (code in DEAD_LINK and not lasting)
        if way is Way.FETCH:
            assert (have.link or have.held) and code not in NO_SECOND_TRY and not lasting


@pytest.mark.parametrize("code", KINDS)
def test_nothing_that_may_be_billed_is_told_as_not_billed(tmp_path: Path, code: str) -> None:
    """And the evidence on disk says what was told."""
    for status in ("generated", "unknown", "submitted"):
        paid = evidence(tmp_path, status, response={"image_url": LINK} if status == "generated" else {})
        record = EvidenceFile(paid)
        left, told = settle(record, Failure(code, "x", billed="no"))
        assert told.fault.billed == ("yes" if status == "generated" else "unknown")
        assert paid.data["status"] == STATES[left][0]
        assert paid.data["error"] == told.fault.as_json()
        assert paid.path.exists() and record.behind is None


def test_a_failure_is_never_changed() -> None:
    failure = Failure("disk", "x")
    other = failure.but(billed="yes", hint="y")
    assert (failure.fault.billed, other.fault.billed, other.fault.hint, other.message) == ("no", "yes", "y", "x")
    with pytest.raises(AttributeError):
        failure.fault.billed = "yes"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        failure.fault = other.fault  # type: ignore[misc]
    with pytest.raises(TypeError):
        Failure("disk", "x", colour="red")


def test_the_reference_has_the_table_of_the_code() -> None:
    """Where it has not: python -c "from zimage.settle import table; print(table())" in scripts/."""
    (printed,) = re.findall(r"(?ms)^\| code \| exit \| billed \| same command again.*?\n(?=\n)", ERRORS_MD + "\n")
    assert printed == table()
