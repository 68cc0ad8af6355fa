"""Ending: why a run ends other than with every picture saved."""

from __future__ import annotations

import signal
import sqlite3
from collections import Counter

from zimage.batch.contract import RESULTS
from zimage.contract import EXIT_SIGNAL, EXIT_UNAVAILABLE, EXIT_UNKNOWN
from zimage.errors import Failure

UNKNOWN_IN_A_ROW, FAILURES_IN_A_ROW = 5, 10


def incomplete(database: sqlite3.Connection, bound: str | None) -> Failure | None:
    """The failure of a run that ended by itself and left pictures of the input unsaved; None where all are saved."""
    rows = database.execute(
        "SELECT state, count(*) FROM pictures WHERE position IS NOT NULL OR state IN ('submitted', 'generated') "
        "GROUP BY state"
    )
    left = Counter({state: count for state, count in rows if state != "saved"})
    if not left:
        return None
    why = {
        "failed": f"failed ones: {RESULTS} says why; --retry-failed makes them again (costs)",
        "unknown": "unknown ones may have been billed: ask the user, then --retry-unknown (costs again)",
        "submitted": "submitted ones are being made: run the same command again to wait for them, free",
        "generated": "generated ones are paid: run the same command again to download them, free",
        "pending": {
            "cost": "the rest waits for a higher --max-cost: ask the user first",
            "limit": "the rest waits: run the same command again",
        }.get(bound or "", "the rest waits: run the same command again"),
    }
    counts = ", ".join(f"{count} {state}" for state, count in sorted(left.items()))
    hints = [text for state, text in why.items() if left[state]]
    if bound == "cost" and not left["pending"]:
        hints.append("--max-cost keeps them from being made again")
    retryable = left["generated"] + left["submitted"] > 0 or (left["pending"] > 0 and bound != "cost")
    return Failure("incomplete", f"not every picture is saved: {counts}", hint="; ".join(hints), retryable=retryable)


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

    def count(self, step: str, failure: Failure) -> Failure | None:
        """Take note of a failure; returns that of the run where it is one too many."""
        self.failures[step] += 1
        self._unknown += failure.fault.billed == "unknown"
        if self._unknown >= UNKNOWN_IN_A_ROW:
            unfinished = failure.code == "paid_not_downloaded"
            what = "tasks in a row are not finished in time" if unfinished else "outcomes in a row are unknown"
            return storm(failure, f"{UNKNOWN_IN_A_ROW} {what}", EXIT_UNKNOWN)
        if self.failures[step] >= FAILURES_IN_A_ROW:
            what = {"generate": "calls", "ask": "tasks", "save": "downloads"}[step]
            return storm(failure, f"{FAILURES_IN_A_ROW} {what} in a row failed", EXIT_UNAVAILABLE)
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
