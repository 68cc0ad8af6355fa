"""Run: which picture goes next, and when to stop."""

from __future__ import annotations

import contextlib
import math
import os
import queue
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence

from zimage.batch.contract import DATABASE, DOWNLOADS_AT_ONCE, TICK
from zimage.batch.ending import incomplete, interrupted_run, out_of_time, storm
from zimage.batch.fleet import Fleet, Server
from zimage.batch.folder import check_same_database, open_database
from zimage.batch.forecast import Forecast
from zimage.batch.jobs import Feed, Job, Jobs, Place
from zimage.batch.journal import Backlog, Journal, JournalRow, RunRow
from zimage.batch.options import BatchOptions
from zimage.batch.progress import Progress, Tally
from zimage.batch.results import totals
from zimage.batch.work import Outcome, Worker, own_fault
from zimage.console import Console
from zimage.contract import EXIT_UNAVAILABLE, MIB, MIN_FREE_BYTES
from zimage.errors import Failure, Left
from zimage.files import check_space
from zimage.settle import may_go_again, most_retries
from zimage.waiting import Crew, Stop, wait_before

POLLS_AT_ONCE = 8
MOST_OPEN_TASKS = 200  # tasks that a service works on; with more, nothing new is sent
MOST_WAITING_DOWNLOADS = 200  # pictures paid and not yet downloaded; with more, nothing new is sent
ROOM_FOR_ONE = 4 * MIB  # bytes on the disk, for a picture that is out


class Run:
    """One start of a batch: sends what is pending, downloads what is paid, stops when it must.

    All decisions are taken in the main thread, from what workers report. `calls` is what their calls and waits are held
    to: the time limit cuts both; a signal, or whatever else halts the run, ends the waits only.
    """

    def __init__(
        self,
        options: BatchOptions,
        places: Sequence[Place],
        unfit: Mapping[int, Failure],
        stop: Stop,
        began: float,
        console: Console,
    ) -> None:
        self.options = options
        self._unfit = unfit  # places that cannot be asked: index, and why
        self.folder = options.folder
        self.began = began
        self.database = open_database(self.folder)
        self._database_file = os.stat(self.folder / DATABASE).st_ino
        self.database.row_factory = sqlite3.Row
        self._jobs = Jobs(self.database, self.folder, places)
        self._costs = any(place.provider.is_billable_at(place.endpoint) for place in places)
        self._journal = Journal(self.folder)
        self._row = RunRow(self.database, self._journal)
        states, spent = totals(self.database)
        self.tally = Tally(states, spent)
        self.reserve = 0.5 + 4e-5 * sum(states.values())  # seconds to write results and gallery
        self.deadline = math.inf if options.time_limit is None else began + options.time_limit - self.reserve
        self._signals = stop
        self.calls = Stop(self.deadline - time.monotonic(), stop)
        thumbs = self.folder if options.gallery else None
        self._worker = Worker(self._journal, places, options.timeout, self.calls, thumbs)
        self._events: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self.fleet = Fleet(self._jobs.places, options, start=self._row.first_start(options.rpm))
        self._generators = Crew(self.fleet.most_at_once, "generate")
        self._askers = Crew(POLLS_AT_ONCE, "ask")
        self._savers = Crew(DOWNLOADS_AT_ONCE, "save")
        self._forecast = Forecast(self._row.latency_before, self.deadline)
        self._saving: set[int] = set()
        self._looking_for: set[int] = set()  # tasks that were lost
        self._queued: set[int] = set()  # all that this run saves, or has saved
        self._feed = Feed(self._jobs, options.sends)
        self._last_fed_save = -1
        self._saves_are_fed = False
        self._gave_up: Failure | None = None  # why pictures were left pending after their retries
        self._stop: Failure | None = None
        self._bound: str | None = None  # what keeps the rest from being sent: limit | cost
        self._backlog = Backlog()
        self.progress = Progress(self.tally, self._row, console, options.provider)

    # The loop

    def __call__(self) -> Failure | None:
        """Work until everything is done or something stops it; returns why not every picture is saved."""
        for job in self._jobs.submitted():
            job.task = self._worker.task(job, job.evidence.task_id)
            self.fleet.at(job).tasks.add(job)
        for number, failure in self._unfit.items():
            self._do_without([*self.fleet][number], failure)
        for job in self._jobs.stranded():
            self._make_elsewhere(None, job)
        for text in self._jobs.out_of_reach():
            self.progress.note(f"warning: {text}")
        for job in self._jobs.lost(with_dead_link=self.options.retry_failed):  # asked after once, free
            self._looking_for.add(job.number)
            self._askers.do(self._work, self._worker.find, "find", job)
        try:
            while True:
                now = time.monotonic()
                self._heed_signals()
                self._feed_savers()
                waits = [wait for wait in (self._send(now), self._ask(now)) if wait is not None]
                if not self.fleet.out and not self._saving and not waits:
                    break
                self._take_events(min([TICK, *waits]))
                self.progress.tick()
        finally:
            for crew in (self._generators, self._askers, self._savers):
                crew.end(drop=True)
            self._backlog.catch_up(self.options.timeout / 4)
            self.progress.close()
        return self._ending()

    def _heed_signals(self) -> None:
        """At the first signal nothing new is sent, and what is out is waited for."""
        if self._signals.reason and self._stop is None:
            self.progress.note(
                "interrupted: nothing new is sent; waiting for requests that are out (again: stop at once)"
            )
            self._halt(interrupted_run(self._signals.reason))

    def _take_events(self, wait: float) -> None:
        """Wait for a report, then take all that are there."""
        with contextlib.suppress(queue.Empty):
            event = self._events.get(timeout=max(0.0, wait))
            while True:
                self._take(event)
                event = self._events.get_nowait()

    def _halt(self, failure: Failure) -> None:
        """Nothing new from now on; the first reason is the one that is told."""
        if self._stop is None:
            self._stop = failure
        self.calls.request(failure.code)

    # Sending

    def _send(self, now: float) -> float | None:
        """Send what may be sent now; returns the seconds until it is worth another look, None where nothing is left.

        The order of the questions matters: whatever ends the run comes before what only delays the next call.
        """
        if len(self.options.sends) > 1 and self._looking_for and self._stop is None:
            return TICK  # what is found need not be paid for again
        while self._stop is None:
            job = self._feed.next(now)
            waiting = job is None or self._is_out_of_bounds(job)
            due_at = self._feed.due_at
            if waiting and due_at is None:
                return self._later(job, None)
            server = self.fleet.next(job, self._forecast, now)
            start = max(now, due_at if waiting and due_at is not None else server.pacer.next_start)
            if start > self._forecast.last_start:
                self._halt_for_time()
                return self._later(job, None)
            if job is None or waiting:
                return self._later(job, start - now)
            crowded = (
                server.is_full(self._forecast, now)
                or len(self._saving) >= MOST_WAITING_DOWNLOADS
                or self.fleet.open_tasks >= MOST_OPEN_TASKS
            )
            if crowded or start > now:
                return self._later(job, TICK if crowded else start - now)
            try:
                check_space(self.folder, MIN_FREE_BYTES + ROOM_FOR_ONE * (self.fleet.out + len(self._saving)))
                check_same_database(self.folder, self._database_file)
            except Failure as failure:
                self._halt(failure)
                return self._later(job, None)
            server.take(job, now)
            self._start(job)
            now = time.monotonic()
        return None

    def _is_out_of_bounds(self, job: Job) -> bool:
        """Whether --limit or --max-cost keeps a picture from being sent in this run."""
        limit, ceiling = self.options.limit, self.options.max_cost
        if limit is not None and job.number not in self.tally.sent and len(self.tally.sent) >= limit:
            self._bound = "limit"
        elif ceiling is not None and self.tally.spent + job.plan.price.counted > ceiling + 1e-9:
            self._bound = "cost"
        else:
            self._bound = None
        return self._bound is not None

    def _later(self, job: Job | None, wait: float | None) -> float | None:
        """Put a picture back to the front, and say in how many seconds to look again."""
        if job is not None:
            self._feed.back(job)
        return wait

    def _start(self, job: Job) -> None:
        self.tally.sent.add(job.number)
        self.tally.spent += job.plan.price.counted
        self.tally.move(job, job.state, "submitting")
        self._generators.do(self._work, self._worker.generate, "generate", job)

    def _work(self, step: Callable[[Job], Outcome], name: str, job: Job) -> None:
        """In a worker thread: report how the step went, whatever happens."""
        began = time.monotonic()
        if name in ("find", "ask") and self._stop is not None:  # a question can be asked in the next run
            self._events.put(Outcome(name, job, None, began, 0.0))
            return
        try:
            outcome = step(job)
        except Exception as error:
            failure = own_fault(error, "yes" if name == "save" else "unknown")
            outcome = Outcome(name, job, failure, began, time.monotonic() - began)
        self._events.put(outcome)

    def _halt_for_time(self) -> None:
        needed = self._forecast.ready_at - self.began + self.reserve  # beside the pictures themselves
        latency = None if self.tally.sent else self._forecast.latency_before
        has_progress = not {"saved", "generated", "submitted"}.isdisjoint(self.tally.ends.values())
        self._halt(out_of_time(self.options.time_limit or 0.0, latency, needed, has_progress=has_progress))

    # Reports

    def _take(self, outcome: Outcome) -> None:
        job, failure, server = outcome.job, outcome.failure, self.fleet.at(outcome.job)
        self._backlog.heard(job.number, outcome.record)
        now = time.monotonic()
        if outcome.step == "generate":
            sent, before = server.answered(outcome, now), "submitting"
            if failure is not None and failure.code == "too_slow":
                self._forecast.answered(2 * outcome.seconds)  # at least: the next run needs more time than this one
            elif outcome.seconds and (failure is None or failure.fault.billed != "no"):
                self._forecast.answered(outcome.seconds)
        elif outcome.step == "find":
            self._looking_for.discard(job.number)
            sent, before = outcome.began, job.state_before
        elif outcome.step == "ask":
            server.tasks.answered(job)
            sent, before = outcome.began, "submitted"
        else:
            self._saving.discard(job.number)
            sent, before = outcome.began, "generated"
            if failure is None:
                self._forecast.saved(outcome.seconds)
        self.tally.spent -= job.plan.price.counted * (failure is not None and failure.fault.billed == "no")
        if outcome.step != "find" or job.state != before:
            self.tally.move(job, before, job.state)
        # Also where the database could not take it; once, whether this report or `_feed_savers` comes first.
        if outcome.step != "save" and job.state == "generated" and job.number not in self._queued:
            self._queue_save(job)
        if job.state == "submitted" and self._stop is None:
            if server.left_out is not None:
                self._make_elsewhere(server, job)
            elif outcome.step in ("find", "generate"):
                server.tasks.add(job)
            elif failure is None:
                server.tasks.again(job)
        if failure is None:
            is_picture = outcome.step in ("generate", "ask") and job.state == "generated"  # a task taken is none yet
            server.pictures += is_picture
            unanswered = job.task.unanswered if outcome.step == "ask" and job.task else None
            if unanswered is None:
                server.calm(outcome.step, is_known=is_picture)
            elif self.fleet.has_others(server):
                self._hold(server, unanswered, now, sent)
            return
        self.progress.tell(job, failure)
        if outcome.step == "find":
            return  # of an earlier run: says nothing of this one
        if now >= self.deadline:  # it was cut, which says nothing of service or network
            self._halt_for_time()
        elif failure.fault.concerns == "run":
            self._halt(failure)
        elif server.left_out is not None:
            pass  # it was out when that was found
        elif failure.fault.concerns == "server":
            self._do_without(server, failure)
        elif self.fleet.is_to_rest(server, outcome):
            self._hold(server, failure, now, sent)
        elif failure.fault.billed == "unknown" or failure.fault.concerns == "service" or job.state == "generated":
            self._count_failure(server, outcome.step, failure)
        else:  # the row's own fault: the service works
            server.calm(outcome.step)
        if outcome.step in ("generate", "ask") and outcome.left in (Left.AGAIN, Left.ANEW) and self._stop is None:
            self._plan_retry(server, job, failure, now)
        if outcome.step == "save" and server.left_out is not None and self._stop is None:
            self._make_elsewhere(server, job)

    def _do_without(self, server: Server, failure: Failure) -> None:
        """Leave out a server that makes no more pictures; without any other the run ends."""
        if not self.fleet.leave_out(server, failure):
            return self._halt(failure)
        self.progress.note(f"left out: {server.place.endpoint.url}: {failure.code}: {failure.message}")
        for job in server.tasks.leave():
            self._make_elsewhere(server, job)

    def _make_elsewhere(self, server: Server | None, job: Job) -> None:
        """Have a picture made anew whose task or link a server has that is not asked any more, where that is free."""
        lost = Failure("outcome_unknown", "the server that has it is not asked any more").fault
        has_it = server is None or (job.service == server.number and self._jobs.is_only_there(job))
        if not has_it or job.position[0] is None or not may_go_again(lost, billable=job.evidence.have.billable):
            return
        before, record = job.state, JournalRow(job, self._journal)
        record.forgotten(lost)
        self._backlog.heard(job.number, record)
        if record.behind is not None:
            return
        self.tally.move(job, before, job.state)
        self._queued.discard(job.number)
        if job.state in self.options.sends and self._stop is None:
            self._feed.anew(job)

    def _hold(self, server: Server, failure: Failure, now: float, sent: float) -> None:
        wait = failure.fault.retry_after_s
        note = server.pacer.refused if failure.code == "rate_limited" else server.pacer.held
        if wait is not None and wait > self.options.timeout:
            self._do_without(server, failure)
        elif note(now, sent, wait):
            self._count_failure(server, "generate", failure.but(billed="no"))

    def _count_failure(self, server: Server, step: str, failure: Failure) -> None:
        was_well, too_many = server.trouble is None, self.fleet.count(server, step, failure)
        if was_well and server.trouble is not None:
            self.progress.note(f"left out for now: {server.place.endpoint.url}: {failure.code}: {failure.message}")
        if too_many:
            self._do_without(server, too_many)

    def _plan_retry(self, server: Server, job: Job, failure: Failure, now: float) -> None:
        """Send a picture again after a wait, where its call surely was not billed and it has tries left.

        At once, and not counted, where it says nothing of the picture that one server is away.
        """
        fault, billable = failure.fault, job.plan.billable
        is_gone = server.left_out is not None
        elsewhere = is_gone or (fault.code == "unreachable" and self.fleet.has_others(server))
        most = math.inf if elsewhere else most_retries(fault, self.options.max_retries, billable=billable)
        if not may_go_again(fault, billable=billable, elsewhere=is_gone) or job.tries > most:
            self._gave_up = failure
            return
        wait = 0.0 if elsewhere else wait_before(job.tries - 1, failure.fault.retry_after_s)
        if wait > self.options.timeout:
            return self._halt(failure)
        self._feed.again(job, now + wait)

    # Asking after tasks

    def _ask(self, now: float) -> float | None:
        """Ask after the tasks whose time has come; returns the seconds to the next, None where none is open."""
        if self._stop is None and self.fleet.open_tasks and now > self._forecast.last_save:
            self._halt_for_time()
        if self._stop is not None:
            for server in self.fleet:
                server.tasks.leave()
        for job in self.fleet.due(now):
            self._askers.do(self._work, self._worker.ask, "ask", job)
        return TICK if self._looking_for else self.fleet.next_look(now)

    # Saving

    def _queue_save(self, job: Job) -> None:
        self._saving.add(job.number)
        self._queued.add(job.number)
        self._savers.do(self._work, self._worker.save, "save", job)

    def _feed_savers(self) -> None:
        """Hand on what earlier runs have paid for and not downloaded."""
        while self._stop is None and len(self._saving) < 2 * DOWNLOADS_AT_ONCE and not self._saves_are_fed:
            if time.monotonic() > self._forecast.last_save:
                return self._halt_for_time()
            jobs = self._jobs.paid(self._last_fed_save)
            for job in jobs:
                if job.number not in self._queued:
                    self._queue_save(job)
                self._last_fed_save = job.number
            self._saves_are_fed = not jobs

    # The end

    def _ending(self) -> Failure | None:
        """Why the run ends other than with every picture saved; None where they are."""
        if self._stop is not None:
            return self._stop
        if self._gave_up is not None and any(server.storms.failures["generate"] for server in self.fleet.up):
            return storm(self._gave_up, "pictures are left after their retries", EXIT_UNAVAILABLE)
        ending = incomplete(self.database, self._bound, costs=self._costs)
        if ending is not None and time.monotonic() > self._forecast.last_save:  # it cut what was left to download
            self._halt_for_time()
            return self._stop
        return ending

    def close(self, exit_code: int) -> None:
        """Note the end of the run and close the database."""
        self._row.close(exit_code, self._forecast.typical_latency)
        self._journal.close()
        self.database.close()
