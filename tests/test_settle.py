"""The one table of states: what every end leaves of a picture, what is told of it; state only moves forward."""

from __future__ import annotations

import itertools
import re
import shlex
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from conftest import SKILL
from zimage.contract import DEFAULT_MAX_RETRIES, GENERATE_IMAGE
from zimage.errors import ASK_BEFORE_PAYING, BILLED, KINDS, PICTURE_BLOCKED, RECOVER_FREE, Failure, Fault, Left
from zimage.evidence import Evidence, EvidenceFile
from zimage.facts import State
from zimage.settle import (
    BY_HAND,
    DEAD_LINK,
    NO_SECOND_TRY,
    STATES,
    TASK_ENDS,
    TASK_IS_DONE,
    Have,
    Way,
    before_anything,
    ended_early,
    explained,
    left_by,
    may_go_again,
    most_billed,
    own_command,
    retry_wait,
    settle,
    table,
    way_back,
)
from zimage.waiting import Stop, Stopped

ERRORS_MD = (SKILL / "references" / "errors.md").read_text(encoding="utf-8")
STATUSES = ("submitting", "submitted", "generated", "saved", "failed", "unknown")
LINK = "https://x.aliyuncs.com/1.png"
NOTHING = Have("no", "submitting", task=False, link="", held=False, billable=True)
FREE = NOTHING._replace(billable=False)


def every_have() -> list[Have]:
    """All that can be known of a picture, possible or not."""
    parts: Any = (BILLED, STATUSES, (False, True), ("", LINK), (False, True), (False, True))
    return [Have(*combination) for combination in itertools.product(*parts)]


def evidence(tmp_path: Path, status: str, **facts: Any) -> Evidence:
    data: Any = {"status": status, "billable": True, "attempts": [{"at": "2026-01-01T00:00:00.000Z"}]}
    data |= {"request": {"prompt": "a fox", "seed": 7}, "cost": {"estimate": 0.01434}}
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
            is_free = not have.billable and (not have.task or code == "outcome_unknown")
            assert left in (Left.ANEW if is_free else Left.UNKNOWN, Left.SPENT, Left.OPEN), (billed, have)
        assert (left is Left.OPEN) == (have.is_task_open and code not in TASK_ENDS), (billed, have)


ROWS = [  # code, what is known before, what is left, how it can be had
    ("rate_limited", NOTHING, Left.AGAIN, Way.NONE),
    ("disk", NOTHING, Left.AGAIN, Way.NONE),
    ("balance", NOTHING, Left.AGAIN, Way.NONE),
    ("blocked", NOTHING, Left.REFUSED, Way.NONE),
    ("rejected_by_service", NOTHING, Left.REFUSED, Way.NONE),
    ("outcome_unknown", NOTHING, Left.UNKNOWN, Way.NONE),
    ("no_image", NOTHING, Left.UNKNOWN, Way.NONE),
    ("outcome_unknown", FREE, Left.ANEW, Way.NONE),
    ("no_image", FREE, Left.ANEW, Way.NONE),
    ("rejected_by_service", FREE, Left.REFUSED, Way.NONE),
    ("outcome_unknown", FREE._replace(billed="unknown", status="submitted", task=True), Left.ANEW, Way.ASK),
    ("disk", NOTHING._replace(billed="yes", status="generated", link=LINK), Left.PAID, Way.FETCH),
    ("disk", NOTHING._replace(billed="yes", status="generated", held=True), Left.PAID, Way.FETCH),
    ("paid_not_downloaded", NOTHING._replace(billed="yes", status="generated", link=LINK), Left.PAID, Way.FETCH),
    ("link_expired", NOTHING._replace(billed="yes", status="generated", link=LINK), Left.SPENT, Way.NONE),
    ("link_expired", NOTHING._replace(billed="yes", status="generated", link=LINK, task=True), Left.SPENT, Way.ASK),
    ("link_refused", NOTHING._replace(billed="yes", status="generated", link=LINK), Left.PAID, Way.FETCH),
    ("image_unusable", NOTHING._replace(billed="yes", status="generated", link=LINK), Left.SPENT, Way.FETCH),
    ("link_refused", NOTHING._replace(billed="yes", status="generated", link=LINK, task=True), Left.PAID, Way.ASK),
    ("outcome_unknown", NOTHING._replace(billed="unknown", lead=LINK), Left.UNKNOWN, Way.FETCH),
    ("hop_refused", NOTHING._replace(billed="yes", status="generated", link=LINK), Left.SPENT, Way.NONE),
    ("unreachable", NOTHING._replace(billed="unknown", status="submitted", task=True), Left.OPEN, Way.ASK),
    ("key_rejected", NOTHING._replace(billed="unknown", status="submitted", task=True), Left.OPEN, Way.ASK),
    ("outcome_unknown", NOTHING._replace(billed="unknown", status="submitted", task=True), Left.UNKNOWN, Way.ASK),
    ("task_failed", NOTHING._replace(billed="no", status="submitted", task=True), Left.REFUSED, Way.NONE),
    ("blocked", NOTHING._replace(status="submitted", task=True), Left.REFUSED, Way.NONE),
    ("no_image", NOTHING._replace(status="submitted", task=True), Left.UNKNOWN, Way.NONE),
    ("too_little_memory", NOTHING._replace(status="submitted", task=True), Left.REFUSED, Way.NONE),
    ("unreachable", NOTHING._replace(billed="unknown", status="submitted"), Left.UNKNOWN, Way.NONE),
    ("image_too_large", NOTHING._replace(billed="yes", status="generated", link=LINK), Left.SPENT, Way.NONE),
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


# What is told --------------------------------------------------------------------------------------------------------

OUT = NOTHING._replace(billed="unknown")
PAID = NOTHING._replace(billed="yes", status="generated", link=LINK)
TASK = OUT._replace(status="submitted", task=True)
BY_NAME = "tell the user the name of the task: no evidence could be written; do not pay again"
BY_LINK = "fetch image_url within 24 hours by other means: the evidence file could not be written"
ASKED_AGAIN = "run next_command once, free: it asks after the task again; else "
TRIED = "run next_command once, free: it tries the link that came in the answer; else "
ONLY_TIME = "the picture may have been made; --replay PATH makes it once more, which costs only time"
MAY_COST = ASK_BEFORE_PAYING.replace("EVIDENCE", "PATH")
LOST = f"the picture is lost: no disk took it; free space, then {MAY_COST}"
NEW_LINK = "run next_command once, free: the service may name a new link for its task"

MACHINE = KINDS["machine_limit"].hint
TOLD = [  # code, what is known before, whether that is on disk, the advice, whether a command leads back
    ("rate_limited", NOTHING, True, KINDS["rate_limited"].hint, False),
    ("rate_limited", NOTHING, False, KINDS["rate_limited"].hint, False),
    ("rate_limited", FREE, True, KINDS["rate_limited"].hint, False),
    ("unreachable", TASK, False, BY_NAME, False),
    ("unreachable", TASK, True, KINDS["unreachable"].hint, True),
    ("unreachable", TASK._replace(billable=False), True, KINDS["unreachable"].hint, True),
    ("task_failed", TASK, False, KINDS["task_failed"].hint, False),
    ("blocked", NOTHING, True, KINDS["blocked"].hint, False),
    ("paid_not_downloaded", PAID, False, BY_LINK, False),
    ("paid_not_downloaded", PAID, True, RECOVER_FREE, True),
    ("paid_not_downloaded", PAID._replace(link="", held=True), False, RECOVER_FREE, True),
    ("outcome_unknown", TASK, True, ASKED_AGAIN + MAY_COST, True),
    ("outcome_unknown", TASK._replace(billable=False), True, ASKED_AGAIN + ONLY_TIME, True),
    ("outcome_unknown", OUT, True, MAY_COST, False),
    ("outcome_unknown", OUT._replace(billable=False), True, ONLY_TIME, False),
    ("outcome_unknown", OUT, False, MAY_COST, False),
    ("outcome_unknown", OUT._replace(lead=LINK), True, TRIED + MAY_COST, True),
    ("outcome_unknown", OUT._replace(lead=LINK), False, MAY_COST, False),
    ("link_expired", PAID._replace(task=True), True, NEW_LINK, True),
    ("link_expired", PAID, True, KINDS["link_expired"].hint.replace("EVIDENCE", "PATH"), False),
    ("disk_after_paying", PAID, True, KINDS["disk_after_paying"].hint, True),
    ("disk_after_paying", PAID._replace(link=""), True, LOST, False),
    ("internal_error", PAID, True, f"{KINDS['internal_error'].hint}; {RECOVER_FREE}", True),
    ("internal_error", OUT, True, KINDS["internal_error"].hint, False),
    ("disk", PAID, True, f"{KINDS['disk'].hint}; then {RECOVER_FREE}", True),
    ("disk", NOTHING, True, KINDS["disk"].hint, False),
    ("hop_refused", PAID, True, KINDS["hop_refused"].hint, False),
    ("host_not_trusted", PAID, True, KINDS["host_not_trusted"].hint, False),
    ("machine_limit", PAID, True, f"{RECOVER_FREE}, once there is more to be had: {MACHINE}", True),
    ("machine_limit", NOTHING, True, MACHINE, False),
]


@pytest.mark.parametrize(("code", "have", "written", "advice", "leads_back"), TOLD, ids=[row[0] for row in TOLD])
def test_every_end_is_told_with_its_advice(
    tmp_path: Path, code: str, have: Have, written: bool, advice: str, leads_back: bool
) -> None:
    paid = evidence(tmp_path, have.status)
    place = ("--region", "beijing")
    told = explained(paid, Failure(code, "x"), ("--overwrite",), place, have=have, written=written).fault
    path = shlex.quote(str(paid.path))
    assert told.hint == advice.replace("PATH", f"{path} --region beijing")
    if leads_back:
        assert told.next_command is not None
        assert told.next_command.endswith(f" --recover {path} --region beijing --overwrite --print-response")
    else:
        assert told.next_command is None
    assert (told.evidence_path, told.image_url) == (str(paid.path), have.link or None)
    assert (told.billed, told.seed) == (most_billed(KINDS[code].billed, have.billed), 7)
    assert ("next_command" in told.hint) <= leads_back  # no advice leads to a command that is not told


def test_a_batch_has_advice_of_its_own(tmp_path: Path) -> None:
    told = explained(evidence(tmp_path, "unknown"), Failure("outcome_unknown", "x"), hints={"outcome_unknown": "so"})
    assert told.fault.hint == "so"
    told = explained(evidence(tmp_path, "unknown"), Failure("no_image", "x"), hints={"outcome_unknown": "so"})
    assert told.fault.hint == KINDS["no_image"].hint


def test_of_what_is_blocked_it_is_told_what_was_refused(tmp_path: Path) -> None:
    """A picture that was refused says nothing against its prompt."""
    asked = evidence(tmp_path, "submitting")
    for side, hint in (("output", PICTURE_BLOCKED), ("input", KINDS["blocked"].hint)):
        told = explained(asked, Failure("blocked", "x", refused=side)).fault
        assert (told.hint, told.prompt) == (hint, "a fox")
    assert explained(asked, Failure("rate_limited", "x")).fault.prompt is None


@pytest.mark.parametrize(
    ("code", "facts", "cost"),
    [
        ("outcome_unknown", {}, 0.01434),
        ("outcome_unknown", {"billable": False}, None),
        ("outcome_unknown", {"cost": {"basis": "unknown"}}, None),
        ("rate_limited", {"attempts": []}, None),
    ],
)
def test_what_may_have_been_paid_is_told(tmp_path: Path, code: str, facts: dict[str, Any], cost: float | None) -> None:
    assert explained(evidence(tmp_path, "submitting", **facts), Failure(code, "x")).fault.estimated_cost == cost


def test_no_state_is_told_that_a_record_cannot_have() -> None:
    said = {state for states in STATES.values() for state in states if state is not None}
    assert said == set(get_args(State)) - {"pending", "submitting", "saved"}


def test_what_the_service_has_said_is_told(tmp_path: Path) -> None:
    silent = explained(evidence(tmp_path, "unknown"), Failure("no_image", "x")).fault
    assert silent.request_id is None and not silent.image_url
    nameless = evidence(tmp_path, "generated", response={"request_id": ""})
    assert explained(nameless, Failure("disk", "x")).fault.request_id is None
    known = evidence(tmp_path, "generated", response={"request_id": "of the picture", "image_url": LINK})
    told = explained(known, Failure("disk", "x")).fault
    assert (told.request_id, told.image_url) == ("of the picture", LINK)
    later = explained(known, Failure("disk", "x", request_id="of the failure", image_url="https://other")).fault
    assert (later.request_id, later.image_url) == ("of the failure", LINK)
    only = explained(evidence(tmp_path, "unknown"), Failure("answer_unusable", "x", image_url="https://other")).fault
    assert only.image_url == "https://other"


def test_unless_said_otherwise_the_evidence_is_on_disk(tmp_path: Path) -> None:
    known = evidence(tmp_path, "generated", response={"image_url": LINK})
    assert explained(known, Failure("disk", "x")).fault.next_command


def test_where_no_shell_takes_the_way_back_its_place_is_left_open(tmp_path: Path) -> None:
    """A word that ends in a line break cannot be quoted."""
    place = ("--base-url", "http://127.0.0.1\n")
    lost = explained(evidence(tmp_path, "unknown"), Failure("outcome_unknown", "x"), place=place).fault
    assert (lost.hint, lost.next_command) == (ASK_BEFORE_PAYING, None)
    known = evidence(tmp_path, "generated", response={"image_url": LINK})
    paid = explained(known, Failure("disk", "x"), place=place).fault
    assert (paid.hint, paid.next_command) == (BY_HAND, None)


def test_a_command_names_the_interpreter_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shlex.split(own_command("--check") or "") == [sys.executable, str(GENERATE_IMAGE), "--check"]
    monkeypatch.setattr(sys, "executable", "")  # an embedded one may not know where it lies
    assert shlex.split(own_command("--check") or "")[0] == "python3"


class Behind(EvidenceFile):
    """A record whose disk takes nothing."""

    def keep(self) -> None:
        self.behind = Failure("disk", "full")
        self._known = ("", "", False)


@pytest.mark.parametrize(
    ("status", "facts", "advice"),
    [
        ("submitted", {"task_id": "t"}, BY_NAME),
        ("generated", {"response": {"image_url": LINK}}, BY_LINK),
        ("unknown", {"task_id": "t"}, KINDS["unreachable"].hint),
    ],
)
def test_advice_is_for_what_is_on_disk(tmp_path: Path, status: str, facts: dict[str, Any], advice: str) -> None:
    """The evidence says in memory already how it has ended."""
    record = Behind(evidence(tmp_path, status, **facts))
    assert settle(record, Failure("unreachable", "x"))[1].fault.hint == advice


def test_an_unpaid_try_leaves_nothing_to_look_at_in_a_batch(tmp_path: Path) -> None:
    failure = Failure("rate_limited", "x")
    record = EvidenceFile(evidence(tmp_path, "submitting", attempts=[]))
    assert settle(record, failure)[1].fault.evidence_path
    record.forgets_tries = True
    record.evidence.data["status"] = "submitting"
    assert settle(record, failure) == (Left.AGAIN, failure)
    assert record.evidence.status == "failed"  # and it is kept
    assert settle(record, Failure("blocked", "x"))[1].fault.evidence_path


@pytest.mark.parametrize(
    ("status", "facts", "message", "hint", "billed"),
    [
        ("submitting", {"attempts": []}, "nothing was billed", KINDS["interrupted"].hint, "no"),
        ("submitting", {"attempts": [], "billable": False}, "nothing was billed", KINDS["interrupted"].hint, "no"),
        ("submitting", {}, "the request was out; whether it was billed is not known", ASK_BEFORE_PAYING, "unknown"),
        (
            *("submitting", {"billable": False}, "the request was out; whether the picture was made is not known"),
            *("the picture may have been made; --replay EVIDENCE makes it once more", "unknown"),
        ),
        ("generated", {}, "the picture is paid for and not saved yet", RECOVER_FREE, "yes"),
        ("submitted", {"task_id": "t"}, "the service works on the picture", "run next_command: it goes on", "unknown"),
    ],
)
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_is_told_with_what_is_known_of_the_money(
    tmp_path: Path, status: str, facts: dict[str, Any], message: str, hint: str, billed: str, name: str, code: int
) -> None:
    fault = ended_early(Stopped(name), evidence(tmp_path, status, **facts)).fault
    assert (fault.code, fault.exit_code, fault.billed) == ("interrupted", code, billed)
    assert fault.message == f"interrupted by {name}; {message}"
    assert fault.hint.startswith(hint)
    early = before_anything(Stopped(name)).fault
    assert (early.code, early.exit_code, early.billed) == ("interrupted", code, "no")
    assert early.message == f"interrupted by {name} before anything was sent"


@pytest.mark.parametrize(("status", "billed"), [("generated", "yes"), ("submitting", "unknown")])
def test_a_fault_of_this_tool_loses_nothing_that_was_paid_for(tmp_path: Path, status: str, billed: str) -> None:
    fault = ended_early(ValueError(), evidence(tmp_path, status)).fault
    assert (fault.code, fault.exit_code, fault.billed) == ("internal_error", 7, billed)


# When a call is sent again -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "facts", "attempt", "retries", "seconds", "waits"),
    [
        ("rate_limited", {}, 0, 1, 60, True),
        ("rate_limited", {}, 1, 1, 60, False),
        ("rate_limited", {}, 9, 10, 6000, True),
        ("rate_limited", {}, 0, 0, 60, False),
        ("rate_limited", {"retryable": False}, 0, 1, 60, False),
        ("rate_limited", {"retry_after_s": 50}, 0, 1, 60, True),
        ("rate_limited", {"retry_after_s": 59}, 0, 1, 60, False),  # the answer would come too late
        ("rate_limited", {}, 0, 1, 0, False),
        ("unreachable", {}, 1, 10, 60, True),
        ("unreachable", {}, 2, 10, 60, False),
        ("unreachable", {}, 1, 1, 60, False),
        ("task_failed", {}, 0, 1, 60, False),  # the task is known
        ("outcome_unknown", {"retryable": True}, 0, 1, 60, False),
        ("blocked", {}, 0, 1, 60, False),
    ],
)
def test_a_call_is_sent_again_only_where_that_is_free_and_may_help(
    code: str, facts: dict[str, Any], attempt: int, retries: int, seconds: float, waits: bool
) -> None:
    stop = Stop(seconds)
    stop.shortest_attempt_s = min(seconds, 5)
    wait = retry_wait(Failure(code, "x", **facts), attempt, retries, stop)
    assert (wait is not None) == waits
    assert wait is None or wait >= facts.get("retry_after_s", 0.1)


PAGE = {"http_status": 503}


@pytest.mark.parametrize(
    ("code", "facts", "attempt", "retries", "waits"),
    [
        ("outcome_unknown", {}, 0, None, True),
        ("outcome_unknown", {}, 3, None, True),
        ("outcome_unknown", {}, 4, None, False),
        ("outcome_unknown", {}, 0, 0, False),
        ("outcome_unknown", PAGE, 30, None, True),  # as long as there is time
        ("outcome_unknown", {"http_status": 504}, 30, None, True),
        ("outcome_unknown", {"http_status": 505}, 30, None, False),
        ("outcome_unknown", PAGE, 2, 2, False),  # but where the user says how often
        ("service_failing", {"http_status": 502, "retryable": False}, 30, None, True),  # its JSON in a gateway's page
        ("outcome_unknown", {"http_status": 299}, 0, None, True),
        ("outcome_unknown", {"http_status": 300}, 0, None, False),  # what redirects would do so again
        ("outcome_unknown", {"http_status": 399}, 0, None, False),
        ("outcome_unknown", {"http_status": 400}, 0, None, True),
        ("no_image", {"http_status": 200}, 0, None, False),
        ("key_rejected", {"http_status": 401}, 0, None, False),
        ("blocked", PAGE, 0, None, False),
        ("unreachable", {"retryable": False}, 0, None, False),
    ],
)
def test_where_nothing_costs_what_is_lost_is_sent_again(
    code: str, facts: dict[str, Any], attempt: int, retries: int | None, waits: bool
) -> None:
    failure = Failure(code, "x", **facts)
    assert (retry_wait(failure, attempt, retries, Stop(600), billable=False) is not None) == waits
    assert retry_wait(failure, attempt, retries, Stop(600)) is None or failure.fault.retryable


@pytest.mark.parametrize(
    ("code", "facts", "billable", "retryable"),
    [
        ("outcome_unknown", PAGE, False, True),
        ("outcome_unknown", PAGE, True, False),
        ("outcome_unknown", {"http_status": 302}, False, False),
        ("no_image", {"http_status": 200}, False, False),
        ("rate_limited", {}, True, True),
    ],
)
def test_it_is_told_whether_the_same_command_may_help(
    tmp_path: Path, code: str, facts: dict[str, Any], billable: bool, retryable: bool
) -> None:
    lost = evidence(tmp_path, "unknown", billable=billable)
    assert explained(lost, Failure(code, "x", **facts)).fault.retryable is retryable


def test_only_where_nothing_costs_is_a_gateway_waited_out() -> None:
    page = Failure("service_failing", "x", http_status=503)
    assert page.fault.retryable
    tries = [attempt for attempt in range(50) if retry_wait(page, attempt, None, Stop(600)) is not None]
    assert tries == list(range(DEFAULT_MAX_RETRIES))


@pytest.mark.parametrize(
    ("code", "facts", "elsewhere", "goes"),
    [
        ("key_rejected", {}, True, True),
        ("key_rejected", {}, False, False),
        ("key_rejected", {"billed": "unknown"}, True, False),
        ("rejected_by_service", {}, True, False),  # it is the request
        ("outcome_unknown", {"everywhere": True}, True, False),
    ],
)
def test_another_server_is_asked_where_this_one_surely_took_nothing(
    code: str, facts: dict[str, Any], elsewhere: bool, goes: bool
) -> None:
    assert may_go_again(Fault.of(code, "x", **facts), billable=True, elsewhere=elsewhere) is goes


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
