"""Journal: every step of every picture on disk before the next one."""

from __future__ import annotations

import contextlib
import json
import queue
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage.batch.contract import DATABASE, SPACING, TICK
from zimage.batch.folder import Reserve, database_failures, open_database
from zimage.batch.jobs import Job
from zimage.batch.names import name_in, output_key
from zimage.errors import Failure, Fault, Left, internal_error
from zimage.evidence import EvidenceFile, moment_of, timestamp, utc_now
from zimage.outside import outside_text
from zimage.settle import STATES
from zimage.waiting import needing_threads

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from zimage.facts import Changes, State


DISK_PATIENCE = 5.0  # seconds


class Journal:
    """The one writer of the database: a thread that puts what many workers say into common commits."""

    GROUP = 500  # statements a commit

    def __init__(self, folder: Path) -> None:
        self._path = folder / DATABASE
        self._database = open_database(folder)
        self._reserve = Reserve(folder)
        self._inbox: queue.SimpleQueue[tuple[str, Sequence[Any], Future[None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        with needing_threads():
            self._thread.start()

    def write(self, statement: str, values: Sequence[Any]) -> Future[None]:
        """Have a statement executed and committed; the future ends when it is on disk.

        Its exception is a Failure: disk.
        """
        done: Future[None] = Future()
        self._inbox.put((statement, values, done))
        return done

    def keep(self, job: Job, state: State) -> Future[None]:
        """Have the state of a picture committed."""
        job.state = state
        if state == "saved":
            job.plan = job.plan._replace(output=Path(job.evidence.data["image"]["path"]))
        output = name_in(str(self._path.parent), str(job.plan.output))
        key = output_key(output)
        # Where its name was taken it has another one, which a row that has no picture yet may want too.
        return self.write(
            "UPDATE pictures SET state = ?, paid = ?, service = ?, output = ?, facts = ?, output_key = "
            "CASE WHEN EXISTS (SELECT * FROM pictures WHERE output_key = ? AND number <> ?) THEN ? ELSE ? END "
            "WHERE number = ?",
            (state, job.paid, job.service, output, job.facts, key, job.number, f"{key}//{job.number}", key, job.number),
        )

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join()
        self._reserve.release()
        with contextlib.suppress(sqlite3.Error):
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._database.close()

    def _work(self) -> None:
        closing = False
        while not closing:
            group = [self._inbox.get()]
            with contextlib.suppress(queue.Empty):
                while len(group) < self.GROUP:
                    group.append(self._inbox.get_nowait())
            closing = None in group
            entries = [entry for entry in group if entry is not None]
            ends: list[Failure | None]
            statements = [(statement, values) for statement, values, _ in entries]
            try:
                ends = self._commit_with_reserve(statements)
            except Exception as error:  # nobody who waits may wait for ever
                ends = [error if isinstance(error, Failure) else internal_error(error)] * len(entries)
            for (_, _, done), end in zip(entries, ends, strict=True):
                if end is None:
                    done.set_result(None)
                else:
                    done.set_exception(end)

    def _commit_with_reserve(self, statements: Sequence[tuple[str, Sequence[Any]]]) -> list[Failure | None]:
        """Commit; on a full disk with the room that was kept for that."""
        try:
            with database_failures(self._path):
                return self._commit(statements)
        except Failure as failure:
            if failure.code != "disk" or not self._reserve.release():
                raise
        with database_failures(self._path):
            return self._commit(statements)

    def _commit(self, statements: Sequence[tuple[str, Sequence[Any]]]) -> list[Failure | None]:
        """Commit all statements; returns what is wrong with each, None where it is on disk. One undoes no other."""
        ends: list[Failure | None] = []
        try:
            self._database.execute("BEGIN IMMEDIATE")
            for statement, values in statements:
                try:
                    with database_failures(self._path):
                        self._database.execute(statement, values)  # it undoes itself where it contradicts a rule
                    ends.append(None)
                except Failure as failure:
                    if failure.code == "disk":
                        raise
                    ends.append(failure)
            self._database.execute("COMMIT")
        except Exception:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise
        return ends


class RunRow:
    """What the database keeps of one start of a batch."""

    def __init__(self, database: sqlite3.Connection, journal: Journal) -> None:
        self._journal = journal
        question = "SELECT coalesce(max(number), 0) + 1, max(updated_at) FROM runs"
        self._number, self.last_before = database.execute(question).fetchone()
        question = "SELECT latency_s FROM runs WHERE latency_s IS NOT NULL ORDER BY number DESC"
        self.latency_before: float | None = (database.execute(question).fetchone() or (None,))[0]
        now = timestamp(utc_now())
        statement = "INSERT INTO runs (number, started_at, updated_at) VALUES (?, ?, ?)"
        journal.write(statement, (self._number, now, now)).result()

    def first_start(self, rpm: float) -> float:
        """Now, or a spacing after the last call of an earlier run: its minute counts at the service too."""
        if self.last_before is None or not rpm:
            return time.monotonic()
        age = max(0.0, (utc_now() - moment_of(self.last_before)).total_seconds())  # a clock may have been set back
        return time.monotonic() + min(max(0.0, SPACING * 60 / rpm - age), 60.0)

    def keep(self, progress: Mapping[str, Any]) -> None:
        """What --status tells of a running batch."""
        statement = "UPDATE runs SET updated_at = ?, progress = ? WHERE number = ?"
        self._journal.write(statement, (timestamp(utc_now()), json.dumps(progress), self._number))

    def close(self, exit_code: int, latency: float | None) -> None:
        now = timestamp(utc_now())
        statement = "UPDATE runs SET updated_at = ?, finished_at = ?, exit_code = ?, latency_s = ? WHERE number = ?"
        self._journal.write(statement, (now, now, exit_code, latency, self._number))


class JournalRow:
    """The record of one picture of a batch: its row in the database, and an evidence file once it is settled."""

    forgets_tries = True

    def __init__(self, job: Job, journal: Journal) -> None:
        self.evidence = job.evidence
        self.behind: Failure | None = None
        self._job = job
        self._journal = journal
        self._file = EvidenceFile(job.evidence)

    @property
    def leads_back(self) -> bool:
        return self.behind is None

    def begin(self, **named: Unpack[Changes]) -> None:
        job, evidence = self._job, self.evidence
        before = evidence.data
        job.tries += 1
        if job.tries == 1:
            evidence.update(started_at=timestamp(utc_now()))
        evidence.begin_attempt(**named)
        job.paid += 1
        try:
            self._journal.keep(job, "submitting").result()
        except Failure:
            job.paid -= 1
            evidence.data = before
            raise

    def ended(self, fault: Fault) -> None:
        self.evidence.end_failed_attempt(fault)
        self._job.paid -= fault.billed == "no" or not self.evidence.have.billable

    def keep(self) -> None:
        if self.evidence.status == "saved":
            self._file.keep()
        self._keep(self.evidence.status)

    def settled(self, left: Left, told: Fault) -> None:
        state = STATES[left][1]
        if state is None:
            state = self._job.take_back(told)
        else:
            self.evidence.settled(left, told)
            self._file.keep()
        self._keep(state)

    def forgotten(self, told: Fault) -> None:
        """Its task, or its link, leads nowhere any more, and cost nothing: it is to be made anew."""
        if self.evidence.data["attempts"]:  # a stranger's may have none
            self.ended(told)
        self.settled(Left.ANEW, told)
        if self.behind is None:
            self.evidence.drop_held()

    def catch_up(self) -> None:
        """Put on disk what it could not take before."""
        self._keep(self._job.state)

    def _keep(self, state: State) -> None:
        try:
            self._journal.keep(self._job, state).result()
            self.behind = None
        except Failure as failure:
            have, task = self.evidence.have, ""
            if have.is_task_open:
                task = f"; the service works on task {outside_text(self.evidence.task_id)}"
            message = failure.message + task
            self.behind = failure.but(message=message, billed=have.billed, image_url=have.link or None)
            self._file.keep()  # it may hold what the database could not take


class Backlog:
    """The pictures of which the disk does not know the last word: that is in memory only."""

    def __init__(self) -> None:
        self._records: dict[int, JournalRow] = {}

    def heard(self, number: int, record: JournalRow | None) -> None:
        """Take note of whether the last step of a picture is on disk; none was to be noted where there is no record."""
        self._records.pop(number, None)
        if record is not None and record.behind is not None:
            self._records[number] = record

    def catch_up(self, patience: float) -> None:
        """Give a disk that failed so many seconds, or DISK_PATIENCE, to take what came meanwhile."""
        until = time.monotonic() + min(DISK_PATIENCE, patience)
        while self._records and time.monotonic() < until:
            time.sleep(TICK)
            for number, record in list(self._records.items()):
                record.catch_up()
                if record.behind is None:
                    del self._records[number]
