"""Work: what worker threads do with one picture, and what becomes of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from zimage.batch.gallery import write_thumb
from zimage.batch.jobs import Job, Place
from zimage.batch.journal import Journal, JournalRow
from zimage.calls import Generated, Submitted
from zimage.contract import EXIT_UNKNOWN
from zimage.errors import Billed, Failure, Left, internal_error
from zimage.make import attempt, came, save
from zimage.picture import Picture
from zimage.settle import TASK_ENDS, is_gateway_page, settle
from zimage.task import Task
from zimage.trust import home_of, home_of_record, naming_flags
from zimage.waiting import Stop


class Outcome(NamedTuple):
    """What a worker reports. `failure` is None where the step went well; moments are of time.monotonic()."""

    step: str  # find | generate | ask | save
    job: Job
    failure: Failure | None
    began: float
    seconds: float = 0.0  # that a picture took to be made, or to be saved
    left: Left | None = None  # what the failure has left of the picture
    record: JournalRow | None = None  # where the step was noted, or could not be

    @property
    def holds(self) -> bool:
        """Whether all calls are to wait: at a rate limit, or where a server that costs nothing is away."""
        if self.failure is None or self.failure.code == "rate_limited":
            return self.failure is not None
        is_away = self.left is Left.ANEW or is_gateway_page(self.failure.fault)
        return self.step == "generate" and is_away and not self.job.plan.billable


def own_fault(error: Exception, billed: Billed) -> Failure:
    """A fault of this tool, after the request may have left."""
    return internal_error(error, billed=billed, exit_code=EXIT_UNKNOWN)


# What a row's user is told to do: the same batch, not a single picture beside it, which it would pay for once more.
ROW_HINTS = {
    "outcome_unknown": "ask the user before paying again: the batch with --retry-unknown sends this row once more",
    "link_expired": "the picture can only be made again: ask the user, then the batch with --retry-failed (costs)",
}


class Worker:
    """Takes one picture from one state to the next. Every method may run in many threads at once."""

    def __init__(
        self, journal: Journal, places: Sequence[Place], timeout: float, calls: Stop, thumbs: Path | None
    ) -> None:
        self._journal = journal
        self._places = {place.endpoint: place for place in places}
        self._own = places[0].own
        self._timeout = timeout
        self._calls = calls  # what all calls are held to
        self._thumbs = thumbs

    def _place_of(self, job: Job) -> Place:
        return self._places[job.plan.endpoint]

    def generate(self, job: Job) -> Outcome:
        """Send the paid request; on record before it leaves and as soon as the link, picture or task id arrives."""
        job.renew()
        stop, record = self._stop(), JournalRow(job, self._journal)
        job.began = began = stop.start
        try:
            made = attempt(job.plan, self._place_of(job).key, record, stop.generating)
        except Failure as failure:
            return self._settled("generate", job, record, failure, began)
        except Exception as error:  # the request may have left
            return self._settled("generate", job, record, own_fault(error, "unknown"), began)
        return self._came("generate", job, record, made, stop)

    def find(self, job: Job) -> Outcome:
        """Ask once after a task that was lost in an earlier run; where it is not found, nothing changes."""
        stop, record = self._stop(), JournalRow(job, self._journal)
        job.task = self.task(job, job.facts_before["task_id"])
        made, failed = None, None
        try:
            made = job.task.ask(stop)
        except Failure as failure:
            failed = failure
        if job.task.is_strange or (failed and failed.code not in TASK_ENDS):
            return Outcome("find", job, None, stop.start)
        job.evidence.update(**job.facts_before)
        job.evidence.update(status="submitted", error=None)
        if failed is not None:
            record.ended(failed.fault)
            return self._settled("find", job, record, failed, stop.start)
        if made is None:
            record.keep()
            return Outcome("find", job, record.behind, stop.start)
        return self._came("find", job, record, made, stop)

    def task(self, job: Job, task_id: str, *, is_sure: bool = True) -> Task:
        """A task of this service, to be asked after."""
        plan = job.plan
        key = self._place_of(job).key
        return Task(plan.provider, plan.endpoint, key, plan.request, task_id, is_sure=is_sure)

    def ask(self, job: Job) -> Outcome:
        """Ask once after a task that the service works on; it stays `submitted` until it has ended."""
        assert job.task is not None
        stop, record = self._stop(), JournalRow(job, self._journal)
        try:
            is_over = time.monotonic() >= job.give_up_at
            made = None if is_over and job.task.is_held else job.task.ask(stop.generating)
            if made is None and time.monotonic() >= job.give_up_at:
                raise job.task.unfinished()
        except Failure as failure:
            if failure.code in TASK_ENDS:
                record.ended(failure.fault)
            return self._settled("ask", job, record, failure, stop.start)
        except Exception as error:
            return self._settled("ask", job, record, own_fault(error, "unknown"), stop.start)
        if made is None:
            return Outcome("ask", job, None, stop.start)
        return self._came("ask", job, record, made, stop)

    def save(self, job: Job) -> Outcome:
        """Download, verify and save a picture that has been paid for, with its thumbnail and its evidence."""
        stop, record = self._stop(), JournalRow(job, self._journal)
        here = self._places.get(job.plan.endpoint)  # another service must not get this one's key
        is_new = here and job.state_before != "generated"  # else the link comes from the database
        link, provider, url = job.evidence.have.link, job.plan.provider, job.plan.endpoint.url
        own = here.own if here else self._own
        home = home_of(url, provider) if is_new else home_of_record(link, url, provider, own)
        try:
            save(
                record,
                provider,
                job.plan.output,
                stop,
                home._replace(key=here.key.value) if here else home,
                task=(lambda: self.task(job, job.evidence.task_id)) if here else None,
                again=job.state_before == "generated",  # else a file like it is another row's
                also=lambda picture: self._add_thumb(picture, job, stop),
            )
        except Failure as failure:
            return self._settled("save", job, record, failure, stop.start)
        except Exception as error:
            return self._settled("save", job, record, own_fault(error, "yes"), stop.start)
        return Outcome("save", job, record.behind, stop.start, time.monotonic() - stop.start, record=record)

    def _add_thumb(self, picture: Picture, job: Job, stop: Stop) -> None:
        if self._thumbs:
            write_thumb(picture, self._thumbs, job.number, stop)

    def _came(self, step: str, job: Job, record: JournalRow, made: Generated | Submitted, stop: Stop) -> Outcome:
        seconds = time.monotonic() - stop.start
        if isinstance(made, Submitted):
            job.task = self.task(job, made.task_id, is_sure=made.is_sure)
        came(job.plan, record, made, job.began or stop.start)
        return Outcome(step, job, record.behind, stop.start, seconds, record=record)

    def _settled(self, step: str, job: Job, record: JournalRow, failure: Failure, began: float) -> Outcome:
        """Keep what became of a picture; where it is not simply sent again, its evidence file says so too."""
        seconds = time.monotonic() - began
        here = self._places.get(job.plan.endpoint)
        naming = naming_flags(here.endpoint, here.provider, here.own) if here else ()
        left, told = settle(record, failure, place=naming, hints=ROW_HINTS)
        return Outcome(step, job, record.behind or told, began, seconds, left, record)

    def _stop(self) -> Stop:
        """What one step is held to. A halt of the run ends its waits, not its calls."""
        return Stop(self._timeout, self._calls, cuts=False)
