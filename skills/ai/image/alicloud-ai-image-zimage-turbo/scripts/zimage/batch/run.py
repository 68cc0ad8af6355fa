"""Run: which picture goes next, and when to stop."""

from __future__ import annotations

import contextlib
import heapq
import math
import os
import queue
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Sequence

from zimage.batch.contract import CONCURRENCY_RANGE, DATABASE, DOWNLOADS_AT_ONCE, RESULTS, TICK
from zimage.batch.ending import incomplete, interrupted_run, storm
from zimage.batch.fleet import Fleet, Server
from zimage.batch.folder import check_same_database, open_database
from zimage.batch.forecast import Forecast
from zimage.batch.jobs import Job, Jobs, Place
from zimage.batch.journal import Journal, JournalRow, RunRow
from zimage.batch.options import BatchOptions
from zimage.batch.progress import Progress, Tally
from zimage.batch.results import totals
from zimage.batch.work import Outcome, Worker, own_fault
from zimage.console import Console
from zimage.contract import EXIT_DISK, EXIT_UNAVAILABLE, MIB, MIN_FREE_BYTES
from zimage.errors import Failure, Left
from zimage.files import check_space
from zimage.settle import may_go_again, most_retries
from zimage.waiting import Crew, Stop, wait_before

POLLS_AT_ONCE = 8
MOST_THREADS = 256  # that wait for calls
MOST_OPEN_TASKS = 200  # tasks that a service works on; with more, nothing new is sent
MOST_WAITING_DOWNLOADS = 200  # pictures paid and not yet downloaded; with more, nothing new is sent
ROOM_FOR_ONE = 4 * MIB  # bytes on the disk, for a picture that is out
DISK_PATIENCE = 5.0  # seconds for a disk that failed to take what came meanwhile
FAILURES_TOLD = 20  # lines on stderr; the rest stands in the results


class Run:
    """One start of a batch: sends what is pending, downloads what is paid, stops when it must.

    All decisions are taken in the main thread, from what workers report. `calls` is what their calls and waits are held
    to: the time limit cuts both; a signal, or whatever else halts the run, ends the waits only.
    """

    def __init__(
        self, options: BatchOptions, places: Sequence[Place], stop: Stop, began: float, console: Console
    ) -> None:
        self.options = options
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
        at_once = (options.concurrency or CONCURRENCY_RANGE[1]) * len(places)
        self._generators = Crew(min(at_once, MOST_THREADS), "generate")
        self._askers = Crew(POLLS_AT_ONCE, "ask")
        self._savers = Crew(DOWNLOADS_AT_ONCE, "save")
        self.fleet = Fleet(self._jobs.places, options, start=self._row.first_start(options.rpm))
        self._forecast = Forecast(self._row.latency_before, self.deadline)
        self._saving: set[int] = set()
        self._looking_for: set[int] = set()  # tasks that were lost
        self._queued: set[int] = set()  # all that this run saves, or has saved
        self._due: list[tuple[float, int, Job]] = []  # to be sent again
        self._feed: deque[Job] = deque()
        self._fed = (-1, -1)  # position and variant of the last pending picture read
        self._last_fed_save = -1
        self._saves_are_fed = False
        self._gave_up: Failure | None = None  # why pictures were left pending after their retries
        self._stop: Failure | None = None
        self._bound: str | None = None  # what keeps the rest from being sent: limit | cost
        self._told = 0
        self._behind: dict[int, JournalRow] = {}  # pictures of which the disk does not know the last word
        self.progress = Progress(self.tally, self._row, console, options.provider)
        console.warn(self._jobs.out_of_reach())

    # The loop

    def __call__(self) -> Failure | None:
        """Work until everything is done or something stops it; returns why not every picture is saved."""
        for job in self._jobs.submitted():
            job.task = self._worker.task(job, job.evidence.task_id)
            self.fleet.at(job).tasks.add(job)
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
            self._catch_up()
            self.progress.close()
        return self._ending()

    def _catch_up(self) -> None:
        """Give a disk that failed a moment to take what came meanwhile: it is in memory only."""
        until = time.monotonic() + min(DISK_PATIENCE, self.options.timeout / 4)
        while self._behind and time.monotonic() < until:
            time.sleep(TICK)
            for number, record in list(self._behind.items()):
                record.catch_up()
                if record.behind is None:
                    del self._behind[number]

    def _heed_signals(self) -> None:
        """At the first signal nothing new is sent, and what is out is waited for."""
        if self._signals.reason and self._stop is None:
            waiting = "waiting for requests that are out (again: stop at once)"
            self.progress.note(f"interrupted: nothing new is sent; {waiting}")
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
            job = self._next(now)
            waiting = job is None or self._is_out_of_bounds(job)
            if waiting and not self._due:
                return self._later(job, None)
            server = self.fleet.next(self._forecast, now)
            start = max(now, self._due[0][0] if waiting else server.pacer.next_start)
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
            self._feed.appendleft(job)
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

    def _next(self, now: float) -> Job | None:
        """The next picture to send: one whose retry is due, else the next of the input."""
        if self._due and self._due[0][0] <= now:
            return heapq.heappop(self._due)[2]
        if not self._feed:
            self._feed.extend(self._jobs.to_send(self.options.sends, self._fed))
            if self._feed:
                self._fed = self._feed[-1].position
        return self._feed.popleft() if self._feed else None

    def _halt_for_time(self) -> None:
        limit = self.options.time_limit or 0.0
        if not self.tally.sent and self._forecast.latency_before and self.options.time_limit:
            least = 1.25 * self._forecast.latency_before + 0.5 + self.reserve + self._forecast.ready_at - self.began
            text = f"--time-limit: {limit:g} s is too short, a picture takes {self._forecast.latency_before:.0f} s here"
            if limit < least:
                self._halt(Failure("usage", text, hint=f"give at least --time-limit {math.ceil(least)}"))
        text = f"the time limit of {limit:g} s ends this run; what is left stays as it is"
        progress = {"saved", "generated", "submitted"} & set(self.tally.ends.values())
        hint = None if progress else "give a longer --time-limit: nothing could be done in this one"
        self._halt(Failure("time_limit", text, hint=hint))

    # Reports

    def _take(self, outcome: Outcome) -> None:
        job, failure, server = outcome.job, outcome.failure, self.fleet.at(outcome.job)
        self._behind.pop(job.number, None)
        if outcome.record is not None and outcome.record.behind is not None:
            self._behind[job.number] = outcome.record
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
            if outcome.step in ("find", "generate"):
                server.tasks.add(job)
            elif failure is None:
                server.tasks.again(job)
        if failure is None:
            is_picture = outcome.step in ("generate", "ask") and job.state == "generated"  # a task taken is none yet
            server.storms.calm(outcome.step, is_known=is_picture)
            return
        self._tell(job, failure)
        if outcome.step == "find":
            return  # of an earlier run: says nothing of this one
        if now >= self.deadline:  # it was cut, which says nothing of service or network
            self._halt_for_time()
        elif failure.fault.concerns == "run":
            self._halt(failure)
        elif outcome.holds:
            self._hold(server, failure, now, sent)
        elif failure.fault.billed == "unknown" or failure.fault.concerns == "service" or job.state == "generated":
            self._count_failure(server, outcome.step, failure)
        else:  # the row's own fault: the service works
            server.storms.calm(outcome.step)
        if outcome.step in ("generate", "ask") and outcome.left in (Left.AGAIN, Left.ANEW) and self._stop is None:
            self._plan_retry(job, failure, now)

    def _hold(self, server: Server, failure: Failure, now: float, sent: float) -> None:
        wait = failure.fault.retry_after_s
        note = server.pacer.refused if failure.code == "rate_limited" else server.pacer.held
        if wait is not None and wait > self.options.timeout:
            self._halt(failure)
        elif note(now, sent, wait):
            self._count_failure(server, "generate", failure.but(billed="no"))

    def _count_failure(self, server: Server, step: str, failure: Failure) -> None:
        if too_many := server.storms.count(step, failure):
            self._halt(too_many)

    def _plan_retry(self, job: Job, failure: Failure, now: float) -> None:
        """Send a picture again after a wait, where its call surely was not billed and it has tries left."""
        fault, billable = failure.fault, job.plan.billable
        most = most_retries(fault, self.options.max_retries, billable=billable)
        if not may_go_again(fault, billable=billable) or job.tries > most:
            self._gave_up = failure
            return
        wait = wait_before(job.tries - 1, failure.fault.retry_after_s)
        if wait > self.options.timeout:
            self._halt(failure)
            return
        heapq.heappush(self._due, (now + wait, job.number, job))

    def _tell(self, job: Job, failure: Failure) -> None:
        """A line on stderr for a picture that will not come by itself, or whose link may stand nowhere else."""
        if failure.fault.image_url and failure.fault.exit_code == EXIT_DISK:
            self.progress.note(f"paid, and not on disk: {job.name}: {failure.fault.image_url}")
        if job.state in ("failed", "unknown") and self._told < FAILURES_TOLD:
            self._told += 1
            more = f" (further ones: {RESULTS})" if self._told == FAILURES_TOLD else ""
            self.progress.note(f"{job.state}: {job.name}: {failure.code}: {failure.message}{more}")

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
        if self._gave_up is not None and any(server.storms.failures["generate"] for server in self.fleet):
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
