"""Ending: why a run ends other than with every picture saved."""

from __future__ import annotations

import math
import signal
import sqlite3
from collections import Counter
from collections.abc import Mapping

from zimage.batch.contract import RESULTS
from zimage.contract import EXIT_SIGNAL, EXIT_UNAVAILABLE, EXIT_UNKNOWN
from zimage.errors import Billed, Failure

UNKNOWN_IN_A_ROW, FAILURES_IN_A_ROW = 5, 10
STRIKES = 3  # failures in a row of one server, where others can do its work


def incomplete(database: sqlite3.Connection, bound: str | None, *, costs: bool = True) -> Failure | None:
    """The failure of a run that ended by itself and left pictures of the input unsaved; None where all are saved.

    `costs`: a picture of the service that is asked now can cost something.
    """
    rows = database.execute(
        "SELECT state, count(*) FROM pictures WHERE position IS NOT NULL OR state IN ('submitted', 'generated') "
        "GROUP BY state"
    )
    left = Counter({state: count for state, count in rows if state != "saved"})
    if not left:
        return None
    why = {
        "failed": f"failed ones: {RESULTS} says why; --retry-failed makes them again" + " (costs)" * costs,
        "unknown": ASK_ABOUT_UNKNOWN,
        "submitted": "submitted ones are being made: run the same command again to wait for them, free",
        "generated": "generated ones are paid: run the same command again to download them, free",
        "pending": {
            "cost": "the rest waits for a higher --max-cost: ask the user first",
            "limit": "the rest waits: look at what was made; if it is right, the same command without --limit makes it",
        }.get(bound or "", "the rest waits: run the same command again"),
    }
    counts = ", ".join(f"{count} {state}" for state, count in sorted(left.items()))
    hints = [text for state, text in why.items() if left[state]]
    if bound == "cost" and not left["pending"]:
        hints.append("--max-cost keeps them from being made again")
    retryable = left["generated"] + left["submitted"] > 0 or (left["pending"] > 0 and bound != "cost")
    return Failure("incomplete", f"not every picture is saved: {counts}", hint="; ".join(hints), retryable=retryable)


# Failures that tell what is left of the whole folder, not what befell one call.
OF_THE_FOLDER = ("incomplete", "time_limit", "interrupted")


def billed_in(states: Mapping[str, int]) -> Billed:
    """What is known of the money for the pictures that are not saved."""
    if states.get("unknown", 0) or states.get("submitted", 0):
        return "unknown"
    return "yes" if states.get("generated", 0) else "no"


ASK_ABOUT_UNKNOWN = (
    "unknown ones may have been billed (--dry-run tells lines and price): ask the user before "
    "--retry-unknown, which pays for them again"
)


def after_all(states: Mapping[str, int], cut_off: int) -> str:
    """What to do about a folder on which nobody works."""
    steps = [f"requests that were out when the run was cut off: {cut_off}"] if cut_off else []
    steps += [ASK_ABOUT_UNKNOWN] if states.get("unknown", 0) else []
    if any(states.get(state, 0) for state in ("pending", "submitted", "generated")):
        steps.insert(0, "nobody works on it: the same command goes on")
    elif states.get("failed", 0):
        steps.append(f"{RESULTS} says why some have failed")
    return "; ".join(steps) or "every picture is saved"


class Storms:
    """What fails again and again, or ends unknown again and again, is not tried on and on."""

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()  # in a row, by the step of the work
        self._unknown = 0

    def calm(self, step: str, *, is_known: bool = True) -> None:
        """A step went well. `is_known`: so the service is known to make pictures."""
        self.failures[step] = 0
        if is_known:
            self._unknown = 0

    def count(self, step: str, failure: Failure, most: int = FAILURES_IN_A_ROW) -> Failure | None:
        """Take note of a failure; returns that of the run where it is one too many."""
        self.failures[step] += 1
        self._unknown += failure.fault.billed == "unknown"
        if self._unknown >= UNKNOWN_IN_A_ROW:
            unfinished = failure.code == "paid_not_downloaded"
            what = "tasks in a row are not finished in time" if unfinished else "outcomes in a row are unknown"
            return storm(failure, f"{UNKNOWN_IN_A_ROW} {what}", EXIT_UNKNOWN)
        if self.failures[step] >= most:
            what = {"generate": "calls", "ask": "tasks", "save": "downloads"}[step]
            return storm(failure, f"{most} {what} in a row failed", EXIT_UNAVAILABLE)
        return None


def storm(failure: Failure, what: str, exit_code: int) -> Failure:
    """The failure of a run that stops because the last one came again and again."""
    unknown = exit_code == EXIT_UNKNOWN
    known = failure.fault.exit_code == exit_code
    return Failure(
        failure.code if known else "outcome_unknown" if unknown else "service_failing",
        f"{what}; the last: {failure.message}",
        exit_code=exit_code,
        billed="unknown" if unknown else "no",
        retryable=not unknown or failure.code == "paid_not_downloaded",
        http_status=failure.fault.http_status,
        service_code=failure.fault.service_code,
        retry_after_s=failure.fault.retry_after_s,
        hint=failure.fault.hint
        if failure.code == "too_slow"
        else "what was not sent stays pending; "
        + (
            "run the same command again: it goes on waiting for what was submitted, free; or give a longer --timeout"
            if failure.code == "paid_not_downloaded"
            else "find out what is wrong with the service or the network before the same command goes on with it"
            if unknown
            else "wait a minute, then run the same command again"
        ),
    )


def interrupted_run(reason: str, how: str = "requests that were out were waited for") -> Failure:
    return Failure(
        "interrupted",
        f"interrupted by {reason}; {how}",
        exit_code=EXIT_SIGNAL + signal.Signals[reason],
        retryable=True,
        hint="run the same command again: it goes on where it stopped",
    )


def out_of_time(limit: float, latency: float | None, needed: float, *, has_progress: bool) -> Failure:
    """The failure of a run that --time-limit ends.

    `latency`: seconds that a picture takes here, where none was sent for lack of them; `needed`: seconds beside them.
    """
    least = 1.25 * latency + 0.5 + needed if latency else 0.0
    if latency and 0 < limit < least:
        text = f"--time-limit: {limit:g} s is too short, a picture takes {latency:.0f} s here"
        return Failure("usage", text, hint=f"give at least --time-limit {math.ceil(least)}")
    text = f"the time limit of {limit:g} s ends this run; what is left stays as it is"
    hint = None if has_progress else "give a longer --time-limit: nothing could be done in this one"
    return Failure("time_limit", text, hint=hint)
