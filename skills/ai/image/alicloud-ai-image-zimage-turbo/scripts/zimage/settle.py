"""Settle: what every end of the work leaves behind, and what is told of it. Tables, in the order they are asked."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from zimage.contract import (
    DEFAULT_MAX_RETRIES,
    EXIT_SIGNAL,
    EXIT_UNKNOWN,
    GENERATE_IMAGE,
    LONG_PROMPT,
    UNREACHABLE_RETRIES,
)
from zimage.errors import (
    ASK_BEFORE_PAYING,
    BILLED,
    GO_ON_FREE,
    KINDS,
    PICTURE_BLOCKED,
    RECOVER_FREE,
    Billed,
    Failure,
    Fault,
    Left,
    Side,
    internal_error,
)
from zimage.outside import outside_text
from zimage.quota import in_quota_words
from zimage.quoting import command_line
from zimage.waiting import Stopped, wait_before

if TYPE_CHECKING:
    from zimage.evidence import Evidence, Record
    from zimage.facts import State
    from zimage.waiting import Stop

# What is left of a picture, as its evidence file and as its row of a batch say it. None: as it was before this run,
# `pending`, or `failed` and `unknown` where it was sent again. `failed` means unbilled in a file; in a row that only
# --retry-failed helps.
STATES: dict[Left, tuple[State, State | None]] = {
    Left.AGAIN: ("failed", None),
    Left.REFUSED: ("failed", "failed"),
    Left.OPEN: ("submitted", "submitted"),
    Left.PAID: ("generated", "generated"),
    Left.SPENT: ("generated", "failed"),
    Left.UNKNOWN: ("unknown", "unknown"),
    Left.ANEW: ("unknown", None),
}

# Failures that say how a task has ended. All others say something of the question, and the task goes on.
TASK_IS_DONE = ("task_failed", "blocked", "no_image", "too_little_memory")
TASK_ENDS = (*TASK_IS_DONE, "outcome_unknown")  # what was lost may be found again
DEAD_LINK = ("link_expired", "link_refused")
GATEWAY_STATUSES = (502, 503, 504)
NO_SECOND_TRY = ("link_expired", "hop_refused", "image_too_large")


class Have(NamedTuple):
    """What is known of one picture before its work ended."""

    billed: Billed
    status: State  # of the evidence
    task: bool  # it has a name to ask after
    link: str
    held: bool  # its bytes lie beside the evidence
    billable: bool
    lead: str = ""  # a link in an answer that was not understood: it may be the picture's
    in_quota: bool = False  # it costs quota, and no money

    @property
    def is_task_open(self) -> bool:
        """Whether the service may still be working on a task: one that was submitted, or may have been."""
        return self.status in ("submitting", "submitted") and self.task


class Way(Enum):
    """How the picture can be had without paying."""

    ASK = "ask"  # after its task
    FETCH = "fetch"  # by its link, or from the bytes that are here
    NONE = "none"


def most_billed(*known: Billed) -> Billed:
    """State only moves forward: what is known to be paid outranks whatever fails later."""
    return max(known, key=BILLED.index)


def left_by(fault: Fault, have: Have) -> Left:
    """What a failure leaves of a picture of which so much is known."""
    if have.is_task_open and fault.code not in TASK_ENDS:
        return Left.OPEN
    kind = KINDS[fault.code]
    if kind.leaves is Left.SPENT:
        return Left.SPENT
    known = most_billed(fault.billed, have.billed)
    if known == "unknown" and not have.billable and (not have.task or fault.code == "outcome_unknown"):
        return Left.ANEW
    return {"yes": Left.PAID, "unknown": Left.UNKNOWN, "no": kind.leaves}[known]


def way_back(fault: Fault, have: Have) -> Way:
    """How a picture can be had after a failure, free."""
    if fault.code == "host_not_trusted":
        return Way.NONE  # as long as the user does not name the host
    link_is_dead = fault.code in DEAD_LINK and not fault.lasting
    if have.task and fault.code not in TASK_IS_DONE and (link_is_dead or not have.link):
        return Way.ASK
    if (have.link or have.held or have.lead) and fault.code not in NO_SECOND_TRY and not fault.lasting:
        return Way.FETCH
    return Way.NONE


class Advice(NamedTuple):
    """A row of advice: it is given where all its conditions hold; None is no condition.

    {hint} stands for the failure's own. EVIDENCE, in these hints and in those of KINDS, stands for the evidence file.
    """

    hint: str
    code: str | None = None
    way: Way | None = None
    has_link: bool | None = None
    billable: bool | None = None
    written: bool | None = None
    left: Left | None = None
    refused: Side | None = None

    def fits(self, fault: Fault, way: Way, have: Have, left: Left, written: bool) -> bool:
        conditions = (
            (self.code, fault.code),
            (self.way, way),
            (self.has_link, bool(have.link)),
            (self.billable, have.billable),
            (self.written, written),
            (self.left, left),
            (self.refused, fault.refused),
        )
        return all(wanted is None or wanted == found for wanted, found in conditions)


MAKE_ANEW = "the picture may have been made; --replay EVIDENCE makes it once more, which costs only time"
ADVICE = (  # the first that fits
    Advice("tell the user the name of the task: no evidence could be written; do not pay again",
           written=False, left=Left.OPEN),
    Advice("fetch image_url within 24 hours by other means: the evidence file could not be written",
           written=False, has_link=True),
    Advice("run next_command once, free: it asks after the task again; else " + MAKE_ANEW,
           code="outcome_unknown", way=Way.ASK, billable=False),
    Advice("run next_command once, free: it asks after the task again; else {hint}",
           code="outcome_unknown", way=Way.ASK),
    Advice("run next_command once, free: the service may name a new link for its task", way=Way.ASK, has_link=True),
    Advice("run next_command once, free: it tries the link that came in the answer; else {hint}",
           way=Way.FETCH, left=Left.UNKNOWN),
    Advice(MAKE_ANEW, code="outcome_unknown", billable=False),
    Advice(f"the picture is lost: no disk took it; free space, then {ASK_BEFORE_PAYING}",
           code="disk_after_paying", way=Way.NONE),
    Advice(PICTURE_BLOCKED, code="blocked", refused="output"),
    Advice(f"{{hint}}; {RECOVER_FREE}", code="internal_error", way=Way.FETCH),
    Advice(f"{{hint}}; then {RECOVER_FREE}", code="disk", way=Way.FETCH),
    Advice(f"{RECOVER_FREE}, once there is more to be had: {{hint}}", code="machine_limit", way=Way.FETCH),
)  # fmt: skip


OWN_HINTS = {kind.hint for kind in KINDS.values()}
BY_HAND = "give --recover the file that evidence_path names, quoted for your shell: it does not pay again"


def settle(
    record: Record,
    failure: Failure,
    flags: Sequence[str] = (),
    place: Sequence[str] = (),
    hints: Mapping[str, str] | None = None,
) -> tuple[Left, Failure]:
    """Put on record what a failure leaves of a picture; returns that, and what is told of it.

    `flags` are those that a recovery needs to do what was asked for, `place` those that name where it was asked for;
    `hints` stand in for those of KINDS.
    """
    have = record.evidence.have
    left = left_by(failure.fault, have)
    if left in (Left.AGAIN, Left.ANEW) and record.forgets_tries:
        record.settled(left, failure.fault)
        return left, failure
    told = explained(record.evidence, failure, flags, place, hints)
    record.settled(left, told.fault)
    if not record.leads_back:
        told = explained(record.evidence, failure, flags, place, hints, have=have, written=False)
    return left, told


def explained(
    evidence: Evidence,
    failure: Failure,
    flags: Sequence[str] = (),
    place: Sequence[str] = (),
    hints: Mapping[str, str] | None = None,
    *,
    have: Have | None = None,
    written: bool = True,
) -> Failure:
    """The failure with what leads back to its picture. `written`: what leads there is on disk too."""
    have = have or evidence.have
    fault, path = failure.fault, str(evidence.path)
    way, left = way_back(fault, have), left_by(fault, have)
    if not written and (have.link or have.lead or left is Left.OPEN):
        way = Way.NONE  # what leads there is in memory alone
    words = in_quota_words if have.in_quota else str
    own = words((hints or {}).get(fault.code, fault.hint))
    named = command_line([path, *place]) or "EVIDENCE"
    hint = words(next((row.hint for row in ADVICE if row.fits(fault, way, have, left, written)), "{hint}"))
    # Only words of this file are filled in, in one step: what stands in a path or an answer is never taken for one.
    ours = next((text for text in map(words, OWN_HINTS) if own.endswith(text)), "")  # the rest may repeat an answer
    own = own.removesuffix(ours) + ours.replace("EVIDENCE", named)
    hint = hint.replace("EVIDENCE", "{named}").format(named=named, hint=own)
    reachable = way is not Way.NONE
    command = own_command("--recover", path, *place, *flags, "--print-response") if reachable else None
    request, billed = evidence.data["request"], most_billed(fault.billed, have.billed)
    return failure.but(
        billed=billed,
        retryable=fault.retryable or (left is Left.ANEW and may_go_again(fault, billable=False)),
        hint=BY_HAND if reachable and command is None else hint,
        evidence_path=path,
        image_url=have.link or fault.image_url,
        request_id=fault.request_id or evidence.said.get("request_id") or None,
        next_command=command,
        seed=request.get("seed"),
        estimated_cost=evidence.data["cost"].get("estimate") if have.billable and billed != "no" else None,
        prompt=outside_text(request["prompt"], LONG_PROMPT) if fault.code == "blocked" else None,
    )


def ended_early(error: BaseException, evidence: Evidence) -> Failure:
    """The failure that a signal, or a fault of this tool, means for a picture of which so much is known."""
    have = evidence.have
    if isinstance(error, Exception):  # it must not lose what was paid for
        return internal_error(error, billed=have.billed, exit_code=EXIT_UNKNOWN)
    assert isinstance(error, Stopped)
    return interrupted(error, have)


def before_anything(stopped: Stopped) -> Failure:
    """The failure of a command that a signal ended before a picture was begun."""
    exit_code = EXIT_SIGNAL + signal.Signals[stopped.reason]
    return Failure("interrupted", f"interrupted by {stopped.reason} before anything was sent", exit_code=exit_code)


def interrupted(stopped: Stopped, have: Have) -> Failure:
    """The failure of a command that a signal ended, with what is known of the money."""
    messages = {
        "no": ("nothing was billed", KINDS["interrupted"].hint),
        "unknown": ("the request was out; whether it was billed is not known", ASK_BEFORE_PAYING),
        "free": ("the request was out; whether the picture was made is not known", MAKE_ANEW),
        "yes": ("the picture is paid for and not saved yet", RECOVER_FREE),
        "open": ("the service works on the picture", GO_ON_FREE),
    }
    is_free = have.billed == "unknown" and not have.billable
    message, hint = messages["open" if have.is_task_open else "free" if is_free else have.billed]
    exit_code = EXIT_SIGNAL + signal.Signals[stopped.reason]
    return Failure(
        "interrupted", f"interrupted by {stopped.reason}; {message}", exit_code=exit_code, billed=have.billed, hint=hint
    )


def is_gateway_page(fault: Fault) -> bool:
    """Whether a gateway has answered whose server is away: it may be back in a while."""
    return fault.http_status in GATEWAY_STATUSES and (fault.code == "outcome_unknown" or KINDS[fault.code].retryable)


def may_go_again(fault: Fault, *, billable: bool, elsewhere: bool = False) -> bool:
    """Whether the same call may be sent again unasked: it was surely not billed, or there is nothing to be billed.

    `elsewhere`: to another server, which may well take what this one would refuse again.
    """
    if elsewhere and fault.billed == "no" and fault.concerns == "server":
        return True
    is_redirect = 300 <= (fault.http_status or 0) < 400
    if not billable and (is_gateway_page(fault) or (fault.code == "outcome_unknown" and not is_redirect)):
        return True
    return fault.retryable and fault.code not in TASK_ENDS  # which may have been billed, or would fail again


def most_retries(fault: Fault, max_retries: int | None, *, billable: bool) -> float:
    """How often a call may be sent again. `max_retries` is the user's word; None leaves it to this table."""
    most: float = DEFAULT_MAX_RETRIES if max_retries is None else max_retries
    if fault.code == "unreachable":
        return min(most, UNREACHABLE_RETRIES)
    if max_retries is None and not billable and is_gateway_page(fault):
        return math.inf  # as long as there is time
    return most


def retry_wait(
    failure: Failure, attempt: int, max_retries: int | None, stop: Stop, *, billable: bool = True
) -> float | None:
    """Seconds to wait before the call is sent again; None where it must not be."""
    fault = failure.fault
    if not may_go_again(fault, billable=billable) or attempt >= most_retries(fault, max_retries, billable=billable):
        return None
    wait = wait_before(attempt, fault.retry_after_s)
    return wait if stop.room_for_attempt_after(wait) else None  # else it might be paid for in vain


def own_command(*arguments: str) -> str | None:
    """The script for one picture with other arguments, quoted for the shell of this system; None where it cannot be."""
    return command_line([sys.executable or "python3", str(GENERATE_IMAGE), *arguments])


def table() -> str:
    """What each error code means and leaves, as the Markdown table of references/errors.md."""
    lines = [
        "| code | exit | billed | same command again | leaves | evidence | row |",
        "|---|---|---|---|---|---|---|",
    ]
    for code, kind in KINDS.items():
        nothing = Have("no", "submitting", False, "", False, True)
        left = left_by(Fault.of(code, ""), nothing)
        status, state = STATES[left]
        again = "yes" if kind.retryable else "no"
        exit_code = "130, 143" if code == "interrupted" else str(kind.exit_code)
        cells = (f"`{code}`", exit_code, kind.billed, again, left.value, status, state or "as before")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
