"""Settle: how a run that ends early leaves its evidence."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from zimage.contract import EXIT_SIGNAL, EXIT_UNKNOWN, UNREACHABLE_RETRIES
from zimage.download import DEAD_LINK
from zimage.errors import (
    ASK_BEFORE_PAYING,
    GENERATE_IMAGE,
    GO_ON_FREE,
    KINDS,
    MAKE_ANEW,
    RECOVER_FREE,
    Failure,
    internal_error,
)
from zimage.evidence import held_path, timestamp, utc_now
from zimage.outside import outside_text
from zimage.registry import provider_named
from zimage.task import TASK_ENDS, TASK_IS_DONE
from zimage.waiting import Interrupted, wait_before

if TYPE_CHECKING:
    from zimage.evidence import Evidence
    from zimage.waiting import Clock


def retry_wait(failure: Failure, attempt: int, max_retries: int, clock: Clock, until: float) -> float | None:
    """Seconds to wait before the call is sent again; None where it must not be."""
    if not failure.fact("retryable") or failure.code in TASK_ENDS:
        return None  # it may have been billed, or would fail again
    if attempt >= (min(max_retries, UNREACHABLE_RETRIES) if failure.code == "unreachable" else max_retries):
        return None
    wait = wait_before(attempt, failure.facts.get("retry_after_s"))
    if not clock.room_for_attempt_after(wait, until):
        return None  # an attempt that could not end in time might be paid for in vain
    return wait


@contextlib.contextmanager
def settling(evidence: Evidence, *, flags: Sequence[str], saved: bool = False) -> Iterator[None]:
    """Whatever ends the work, the evidence says how, and the error says where the evidence is.

    `flags` are those that a recovery needs to do what was asked for. `saved`: the picture is safe already; a copy
    that fails changes nothing about that.
    """
    try:
        yield
        return
    except Failure as error:
        failure = error
    except Interrupted as interruption:
        failure = interrupted(interruption, evidence)
    except Exception as error:  # a fault of this tool must not lose what was paid for
        failure = internal_error(error, billed=billed_so_far(evidence), exit_code=EXIT_UNKNOWN)
    explain(evidence, failure, flags)
    if not saved:
        settle(evidence, failure)
    raise failure


def billed_so_far(evidence: Evidence) -> str:
    if evidence.is_paid:
        return "yes"
    return "no" if evidence.nothing_outstanding else "unknown"


def interrupted(interruption: Interrupted, evidence: Evidence) -> Failure:
    """The failure of a command that a signal ended, with what is known of the money."""
    billed = billed_so_far(evidence)
    messages = {
        "no": "interrupted by {name}; nothing was billed",
        "unknown": "interrupted by {name} while the request was out; whether it was billed is not known",
        "yes": "interrupted by {name}; the picture is paid for and not saved yet",
    }
    hints = {"no": KINDS["interrupted"].hint, "unknown": ASK_BEFORE_PAYING, "yes": RECOVER_FREE}
    if is_task_open(evidence):
        messages["unknown"] = "interrupted by {name} while the service works on the picture"
        hints["unknown"] = GO_ON_FREE
    name = signal.Signals(interruption.signum).name
    return Failure(
        "interrupted",
        messages[billed].format(name=name),
        exit_code=EXIT_SIGNAL + interruption.signum,
        billed=billed,
        hint=hints[billed],
    )


def is_task_open(evidence: Evidence) -> bool:
    """Whether the service may still be working on a task that was submitted."""
    return evidence.data["status"] == "submitted" and "task_id" in evidence.data


def outlives(evidence: Evidence, failure: Failure) -> bool:
    """Whether a task goes on after a failure: what failed was a question, and it can be asked again."""
    return is_task_open(evidence) and failure.code not in TASK_ENDS


def explain(evidence: Evidence, failure: Failure, flags: Sequence[str]) -> None:
    """Add to a failure what leads back to the picture."""
    link = evidence.data.get("response", {}).get("image_url")
    path = str(evidence.path)
    failure.facts["evidence_path"] = path
    if failure.code == "outcome_unknown" and not evidence.data["billable"]:
        failure.facts["hint"] = MAKE_ANEW
    failure.facts["hint"] = failure.fact("hint").replace("EVIDENCE", shlex.quote(path))
    if link:
        failure.facts["image_url"] = link
    if evidence.data.get("response", {}).get("request_id"):
        failure.facts.setdefault("request_id", evidence.data["response"]["request_id"])
    link_is_dead = failure.code in DEAD_LINK and "lasting" not in failure.facts
    goes_on = "task_id" in evidence.data and failure.code not in TASK_IS_DONE and (link_is_dead or not link)
    if goes_on and failure.code == "outcome_unknown":
        failure.facts["hint"] = (
            f"run next_command once, free: it asks after the task again; else {failure.fact('hint')}"
        )
    if goes_on and link:
        failure.facts["hint"] = "run next_command once, free: the service may name a new link for its task"
    is_here = link or held_path(evidence.path).exists()
    if goes_on or (is_here and failure.code not in NO_SECOND_TRY and "lasting" not in failure.facts):
        failure.facts["next_command"] = own_command("--recover", path, *flags, "--print-response")


NO_SECOND_TRY = ("link_expired", "hop_refused", "image_too_large")


def settle(evidence: Evidence, failure: Failure) -> None:
    """Write a failure into the evidence."""
    if failure.code == "disk_after_paying" and "next_command" not in failure.facts:
        failure.facts["hint"] = f"the picture is lost: no disk took it; free space, then {ASK_BEFORE_PAYING}".replace(
            "EVIDENCE", shlex.quote(str(evidence.path))
        )
    status = {"no": "failed", "unknown": "unknown", "yes": "generated"}[failure.billed]
    if outlives(evidence, failure):
        status = "submitted"
    evidence.record(status=status, finished_at=timestamp(utc_now()), error=failure.object())
    if evidence.unwritten and is_task_open(evidence):
        failure.facts.pop("next_command", None)
        failure.facts["hint"] = "tell the user the name of the task: no evidence could be written; do not pay again"
    if evidence.unwritten and "image_url" in failure.facts:
        # The file on disk does not hold the link: only the error does.
        failure.facts.pop("next_command", None)
        failure.facts["hint"] = "fetch image_url within 24 hours by other means: the evidence file could not be written"


def own_command(*arguments: str) -> str:
    """The script for one picture with other arguments, quoted for the shell of this system."""
    words = [sys.executable or "python3", str(GENERATE_IMAGE), *arguments]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def unrecoverable(evidence: Evidence) -> Failure:
    """Why there is nothing to fetch for an evidence file without a link."""
    provider = provider_named(evidence.data["provider"])
    failed = evidence.data["status"] == "failed" or provider.in_process  # which has left nothing anywhere else
    error = evidence.data.get("error", {"message": "it ended before the service made a picture"})
    if failed or (evidence.data["status"] == "submitting" and evidence.nothing_outstanding):
        kind = KINDS.get(error.get("code", ""))
        hint = kind.hint if kind and not kind.retryable else None
        message = f"this request was not billed: {outside_text(error['message'])}"
        return Failure("nothing_to_recover", message, hint=hint)
    return Failure(
        "outcome_unknown",
        "the request left and no link came back: whether a picture was made and billed is not known",
        request_id=error.get("request_id"),
    )
