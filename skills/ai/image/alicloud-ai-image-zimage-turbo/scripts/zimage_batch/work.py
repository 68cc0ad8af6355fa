"""Work: what worker threads do with one picture, and what becomes of it."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import NamedTuple

from generate_image import (
    EXIT_BALANCE,
    EXIT_DISK,
    EXIT_KEY,
    EXIT_UNAVAILABLE,
    EXIT_UNKNOWN,
    Clock,
    Failure,
    Key,
    ask,
    collect,
    explain,
    fetch_source,
    finish,
    generated_facts,
    internal_error,
    os_reason,
    settle,
    timestamp,
    utc_now,
)
from zimage_batch.gallery import write_thumb
from zimage_batch.journal import Job, Journal


class Outcome(NamedTuple):
    """What a worker reports. `failure` is None where the step went well; moments are of time.monotonic()."""

    step: str  # generate | save
    job: Job
    failure: Failure | None
    began: float
    seconds: float


def stops_the_run(failure: Failure) -> bool:
    """Whether every other picture would fail in the same way: key, balance, region, network set-up, disk."""
    return (
        failure.exit_code in (EXIT_KEY, EXIT_BALANCE, EXIT_DISK)
        or failure.code in ("not_found", "internal_error")
        or (failure.code == "unreachable" and not failure.fact("retryable"))
    )


def state_after(failure: Failure) -> str:
    """The state in which a failure leaves a picture."""
    if failure.code in ("link_expired", "image_unusable", "image_too_large", "hop_refused"):
        return "failed"
    if failure.billed == "yes":
        return "generated"
    if failure.billed == "unknown":
        return "unknown"
    return "pending" if stops_the_run(failure) or failure.exit_code == EXIT_UNAVAILABLE else "failed"


class Worker:
    """Takes one picture from one state to the next. Every method may run in many threads at once."""

    def __init__(self, journal: Journal, key: Key, timeout: float, until: float, thumbs: Path | None) -> None:
        self._journal = journal
        self._key = key
        self._timeout = timeout
        self._until = until  # no call lasts longer
        self._thumbs = thumbs

    def generate(self, job: Job) -> Outcome:
        """Send the paid request; on disk before it leaves and as soon as the link arrives."""
        plan, evidence, began = job.plan, job.evidence, time.monotonic()
        job.tries += 1
        now = timestamp(utc_now())
        started = now if job.tries == 1 else evidence.data["started_at"]
        attempts = [*evidence.data["attempts"], {"at": now}]
        evidence.update(status="submitting", started_at=started, attempts=attempts, error=None)
        job.paid += 1
        try:
            self._journal.keep(job, "submitting").result()
        except Failure as failure:
            job.paid -= 1
            return Outcome("generate", job, failure, began, 0.0)
        clock = self._clock()
        began = clock.start
        try:
            call = plan.provider.submit(plan.payload, plan.endpoint, self._key.value, plan.workspace)
            until = min(clock.generate_until, clock.end)
            generated = ask(
                call, lambda answer: plan.provider.read(answer, plan.request, utc_now()), until, plan.endpoint
            )
        except Failure as failure:
            return self._not_generated(job, failure, began)
        except Exception as error:  # a fault of this tool: the request may have left
            return self._not_generated(job, internal_error(error, billed="unknown", exit_code=EXIT_UNKNOWN), began)
        seconds = time.monotonic() - began
        evidence.end_attempt(http_status=200, outcome="generated", billed="yes")
        evidence.update(**generated_facts(generated, plan.warnings, clock))
        try:
            self._journal.keep(job, "generated").result()
        except Failure as failure:
            failure.facts |= {"billed": "yes", "image_url": generated.image_url}
            return Outcome("generate", job, failure, began, seconds)
        return Outcome("generate", job, None, began, seconds)

    def _not_generated(self, job: Job, failure: Failure, began: float) -> Outcome:
        seconds = time.monotonic() - began
        job.evidence.end_failed_attempt(failure, None)
        job.paid -= failure.billed == "no"
        return self._settled("generate", job, failure, began, seconds)

    def save(self, job: Job) -> Outcome:
        """Download, verify and save a picture that has been paid for, with its thumbnail and its evidence."""
        clock = self._clock()
        evidence, output = job.evidence, job.plan.output
        try:
            evidence.path.parent.mkdir(parents=True, exist_ok=True)
            source = fetch_source(evidence, job.plan.provider, clock)
            image = collect(evidence, source, output, overwrite=False, again=True)
            if self._thumbs:
                write_thumb(source, self._thumbs, job.number)
            finish(evidence, image, clock, clock.start)
            job.plan = job.plan._replace(output=Path(image["path"]))
            self._journal.keep(job, "saved").result()
            return Outcome("save", job, None, clock.start, time.monotonic() - clock.start)
        except Failure as error:
            failure = error
        except OSError as error:
            failure = Failure("disk_after_paying", f"{evidence.path} cannot be written: {os_reason(error)}")
        except Exception as error:
            failure = internal_error(error, billed="yes", exit_code=EXIT_UNKNOWN)
        return self._settled("save", job, failure, clock.start, time.monotonic() - clock.start)

    def _settled(self, step: str, job: Job, failure: Failure, began: float, seconds: float) -> Outcome:
        """Keep what became of a picture; where it is not simply sent again, its evidence file says so too."""
        state = state_after(failure)
        if state == "pending":
            state = job.take_back(failure)
        else:
            with contextlib.suppress(OSError):
                job.evidence.path.parent.mkdir(parents=True, exist_ok=True)
            explain(job.evidence, failure, [])
            settle(job.evidence, failure)
        try:
            self._journal.keep(job, state).result()
        except Failure as disk:
            disk.facts["billed"] = failure.billed
            return Outcome(step, job, disk, began, seconds)
        return Outcome(step, job, failure, began, seconds)

    def _clock(self) -> Clock:
        clock = Clock(self._timeout)
        clock.end = min(clock.end, self._until)
        return clock
