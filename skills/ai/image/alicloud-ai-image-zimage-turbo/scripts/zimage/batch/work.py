"""Work: what worker threads do with one picture, and what becomes of it."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import NamedTuple

from zimage.batch.gallery import write_thumb
from zimage.batch.journal import Job, Journal, Place
from zimage.contract import EXIT_BALANCE, EXIT_DISK, EXIT_KEY, EXIT_UNAVAILABLE, EXIT_UNKNOWN
from zimage.download import fetch_anew, fetch_source
from zimage.errors import Failure, internal_error, os_reason
from zimage.evidence import drop_held, end_generated_attempt, generated_facts, hold, submitted_facts, timestamp, utc_now
from zimage.make import collect, finish, send
from zimage.outside import outside_text
from zimage.picture import Picture
from zimage.provider import Generated, Submitted
from zimage.settle import explain, outlives, settle
from zimage.task import TASK_ENDS, Task
from zimage.waiting import Clock


class Outcome(NamedTuple):
    """What a worker reports. `failure` is None where the step went well; moments are of time.monotonic()."""

    step: str  # find | generate | ask | save
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
    if failure.code in TASK_ENDS:
        return "failed"  # a task that failed once mostly fails again
    return "pending" if stops_the_run(failure) or failure.exit_code == EXIT_UNAVAILABLE else "failed"


def own_fault(error: Exception, billed: str) -> Failure:
    """A fault of this tool, after the request may have left."""
    return internal_error(error, billed=billed, exit_code=EXIT_UNKNOWN)


# What a row's user is told to do: the same batch, not a single picture beside it, which it would pay for once more.
ROW_HINTS = {
    "outcome_unknown": "ask the user before paying again: the batch with --retry-unknown sends this row once more",
    "link_expired": "the picture can only be made again: ask the user, then the batch with --retry-failed (costs)",
}


def explain_row(job: Job, failure: Failure) -> None:
    """Add to a failure what leads back to the picture of a row."""
    if failure.code in ROW_HINTS:
        failure.facts["hint"] = ROW_HINTS[failure.code]
    explain(job.evidence, failure, [])


class Worker:
    """Takes one picture from one state to the next. Every method may run in many threads at once."""

    def __init__(self, journal: Journal, place: Place, timeout: float, until: float, thumbs: Path | None) -> None:
        self._journal = journal
        self._key = place.key
        self._endpoint = place.endpoint
        self._timeout = timeout
        self._until = until  # no call lasts longer
        self._thumbs = thumbs

    def generate(self, job: Job) -> Outcome:
        """Send the paid request; on disk before it leaves and as soon as the link, picture or task id arrives."""
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
        clock = job.clock = self._clock()
        try:
            made = send(plan, self._key, min(clock.generate_until, clock.end))
        except Failure as failure:
            return self._not_generated("generate", job, failure, clock.start)
        except Exception as error:  # the request may have left
            return self._not_generated("generate", job, own_fault(error, "unknown"), clock.start)
        if isinstance(made, Generated):
            return self._generated("generate", job, made, clock.start)
        return self._submitted(job, made, clock.start)

    def find(self, job: Job) -> Outcome:
        """Ask once after a task that was lost in an earlier run; where it is not found, nothing changes."""
        clock = self._clock()
        job.task = self.task(job, job.facts_before["task_id"])
        made, failed = None, None
        try:
            made = job.task.ask(clock.end)
        except Failure as failure:
            failed = failure
        if job.task.is_strange or (failed and failed.code not in TASK_ENDS):
            return Outcome("find", job, None, clock.start, 0.0)
        job.evidence.update(**job.facts_before | {"status": "submitted", "error": None})
        if failed is not None:
            return self._not_generated("find", job, failed, clock.start)
        if made is not None:
            return self._generated("find", job, made, clock.start)
        return self._taken("find", job, clock.start)

    def task(self, job: Job, task_id: str) -> Task:
        """A task of this service, to be asked after."""
        plan = job.plan
        return Task(plan.provider, plan.endpoint, self._key, plan.request, task_id)

    def ask(self, job: Job) -> Outcome:
        """Ask once after a task that the service works on; it stays `submitted` until it has ended."""
        assert job.task is not None
        clock = self._clock()
        try:
            is_over = time.monotonic() >= job.give_up_at
            made = None if is_over and job.task.is_held else job.task.ask(min(clock.generate_until, clock.end))
            if made is None and time.monotonic() >= job.give_up_at:
                raise job.task.unfinished()
        except Failure as failure:
            return self._not_generated("ask", job, failure, clock.start)
        except Exception as error:
            return self._not_generated("ask", job, own_fault(error, "unknown"), clock.start)
        if made is None:
            return Outcome("ask", job, None, clock.start, time.monotonic() - clock.start)
        return self._generated("ask", job, made, clock.start)

    def _submitted(self, job: Job, submitted: Submitted, began: float) -> Outcome:
        job.evidence.update(**submitted_facts(submitted, job.evidence))
        job.task = self.task(job, submitted.task_id)
        return self._taken("generate", job, began)

    def _taken(self, step: str, job: Job, began: float) -> Outcome:
        """Keep that the service works on a task."""
        seconds = time.monotonic() - began
        try:
            self._journal.keep(job, "submitted").result()
        except Failure as failure:
            failure.facts["billed"] = "unknown"
            failure.message += f"; the service works on task {outside_text(job.evidence.data['task_id'], 100)}"
            return Outcome(step, job, failure, began, seconds)
        return Outcome(step, job, None, began, seconds)

    def _generated(self, step: str, job: Job, generated: Generated, began: float) -> Outcome:
        seconds = time.monotonic() - began
        evidence = job.evidence
        end_generated_attempt(evidence, job.plan.provider)
        evidence.update(**generated_facts(generated, job.plan.warnings, job.clock or self._clock()), error=None)
        if generated.content:
            try:
                hold(evidence.path, generated.content)
            except OSError:  # then it is in memory still, and the picture may yet be saved
                job.content = generated.content
        try:
            self._journal.keep(job, "generated").result()
        except Failure as failure:
            failure.facts["billed"] = "yes"
            with contextlib.suppress(OSError):  # its evidence file may hold what the database could not take
                evidence.path.parent.mkdir(parents=True, exist_ok=True)
            evidence.record()
            if generated.image_url:
                failure.facts["image_url"] = generated.image_url
            return Outcome(step, job, failure, began, seconds)
        return Outcome(step, job, None, began, seconds)

    def _not_generated(self, step: str, job: Job, failure: Failure, began: float) -> Outcome:
        seconds = time.monotonic() - began
        if step == "generate" or failure.code in TASK_ENDS:
            job.evidence.end_failed_attempt(failure, None)
        job.paid -= failure.billed == "no"
        return self._settled(step, job, failure, began, seconds)

    def save(self, job: Job) -> Outcome:
        """Download, verify and save a picture that has been paid for, with its thumbnail and its evidence."""
        clock = self._clock()
        evidence, output = job.evidence, job.plan.output
        try:
            evidence.path.parent.mkdir(parents=True, exist_ok=True)
            provider = job.plan.provider
            source = self._source(job, clock)
            image = collect(evidence, source, output, provider, overwrite=False, again=True)
            if self._thumbs:
                write_thumb(source, self._thumbs, job.number)
            finish(evidence, image, clock, clock.start)
            job.plan = job.plan._replace(output=Path(image["path"]))
            self._journal.keep(job, "saved").result()
            drop_held(evidence)
            return Outcome("save", job, None, clock.start, time.monotonic() - clock.start)
        except Failure as error:
            failure = error
        except OSError as error:
            failure = Failure("disk_after_paying", f"{evidence.path} cannot be written: {os_reason(error)}")
        except Exception as error:
            failure = own_fault(error, "yes")
        return self._settled("save", job, failure, clock.start, time.monotonic() - clock.start)

    def _source(self, job: Job, clock: Clock) -> Picture:
        evidence, provider = job.evidence, job.plan.provider
        if job.content or job.plan.endpoint != self._endpoint:  # another service must not get this one's key
            return fetch_source(evidence, provider, clock, job.content)
        return fetch_anew(evidence, provider, clock, lambda: self.task(job, evidence.data["task_id"]))

    def _settled(self, step: str, job: Job, failure: Failure, began: float, seconds: float) -> Outcome:
        """Keep what became of a picture; where it is not simply sent again, its evidence file says so too."""
        if job.evidence.is_paid and failure.billed != "yes":  # whatever fails later: it is not unpaid again
            failure.facts |= {"billed": "yes"}
        state = "submitted" if outlives(job.evidence, failure) else state_after(failure)
        if state == "pending":
            state = job.take_back(failure)
        else:
            with contextlib.suppress(OSError):
                job.evidence.path.parent.mkdir(parents=True, exist_ok=True)
            explain_row(job, failure)
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
