"""Journal: every step of every picture on disk before the next one."""

from __future__ import annotations

import contextlib
import json
import math
import queue
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from zimage.batch.contract import DATABASE, DOWNLOADS_AT_ONCE, NO_SEED, SPACING
from zimage.batch.folder import Reserve, database_failures, facts_in, facts_of, open_database, service_number
from zimage.batch.names import evidence_name, name_in, output_key
from zimage.endpoint import Endpoint
from zimage.errors import Failure, Fault, Left, internal_error
from zimage.evidence import Evidence, EvidenceFile, moment_of, timestamp, utc_now
from zimage.keys import Key
from zimage.outside import outside_text
from zimage.plan import Plan
from zimage.provider import Provider
from zimage.registry import provider_named
from zimage.request import ImageRequest
from zimage.settle import DEAD_LINK, STATES
from zimage.task import Task
from zimage.trust import Own
from zimage.waiting import needing_threads

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from zimage.facts import Changes, Facts, State

TO_SEND = ("pending", "failed", "unknown")  # states from which a picture may be sent, the latter two where asked for


class Job:
    """One picture at work: its plan, its evidence so far (in memory), what was paid, and when it is due."""

    def __init__(self, row: sqlite3.Row, facts: Facts, plan: Plan) -> None:
        self.number = int(row["number"])
        self.line = row["line"]
        self.position = (row["position"], row["variant"])
        self.id = row["id"]
        self.state: State = row["state"]
        self.state_before: State = self.state  # pending; failed or unknown where it is to be made again
        self.paid = int(row["paid"])
        self.plan = plan
        self.tries = 0  # of this run
        self.task: Task | None = None  # that the service works on
        self.give_up_at = math.inf  # moment of time.monotonic() after which it is left to the next run
        self.began = 0.0  # when its request left, a moment of time.monotonic()
        self.facts_before = facts
        self.evidence = Evidence(plan.evidence_path, plan.evidence(utc_now()))
        if self.state in TO_SEND:  # of earlier tries only the attempts are true of the next one
            facts = {"attempts": facts.get("attempts", [])}
        self.evidence.update(status=self.state, **facts)
        if plan.provider.names_tasks and self.evidence.task_id:
            self.evidence.update(payload=plan.provider.named(plan.payload, self.evidence.task_id))

    def renew(self) -> None:
        """Take what the provider has learnt of the server since the plan was made."""
        renewed = self.plan.anew()
        if renewed.payload != self.plan.payload:
            self.plan = renewed
            self.evidence.update(**renewed.sent)

    @property
    def name(self) -> str:
        """How messages call it."""
        row = f"line {self.line}" if self.line else f"picture {self.number}"
        return f"{row} ({outside_text(self.id)})" if self.line and self.id else row

    def take_back(self, fault: Fault) -> State:
        """Forget a try that cost nothing; returns the state from before it, which stays true.

        That of an earlier run, whose task was lost, is over too.
        """
        if self.state_before not in ("failed", "unknown"):
            self.evidence.update(error=fault.as_json())
            return "pending"
        attempts = self.evidence.data["attempts"]
        self.evidence.update(**self.facts_before)
        self.evidence.update(attempts=attempts)
        return self.state_before

    @property
    def facts(self) -> str:
        return json.dumps(facts_in(self.evidence.data), ensure_ascii=False)


class Place(NamedTuple):
    """Where pictures are asked for, and with what key."""

    provider: Provider
    endpoint: Endpoint
    workspace: str | None
    key: Key
    own: Own


Services = Mapping[int, tuple[Provider, Endpoint]]


def read_services(database: sqlite3.Connection) -> Services:
    """The places that pictures of this folder come from, by number."""
    services = {}
    for number, name, region, url in database.execute("SELECT number, provider, region, endpoint FROM services"):
        provider = provider_named(name)
        root = url.removesuffix(provider.generate_path)
        services[number] = (provider, Endpoint(root, url, host_of(url), region))
    return services


def host_of(url: str) -> str:
    return urlsplit(url).hostname or ""


def job_of(row: sqlite3.Row, folder: Path, services: Services, workspace: str | None) -> Job:
    """The work that a row of the database means."""
    provider, endpoint = services[row["service"]]
    facts = facts_of(row["facts"])
    if row["state"] not in TO_SEND and facts.get("settings", provider.known_settings) != provider.known_settings:
        provider = type(provider)(facts["settings"])  # those of the run that sent it
    seed = row["seed"] if row["seed"] != NO_SEED else None
    request = ImageRequest(row["prompt"], row["size"], seed, bool(row["prompt_extend"]))
    plan = Plan.of(
        provider,
        endpoint,
        request,
        workspace=workspace,
        output=folder / row["output"],
        overwrite=False,
        evidence_path=folder / evidence_name(row["number"]),
    )
    return Job(row, facts, plan)


class Jobs:
    """The pictures of a folder as work for a run; calls go to one place, and no other gets its key."""

    def __init__(self, database: sqlite3.Connection, folder: Path, place: Place) -> None:
        self._database = database
        self._folder = folder
        self._workspace = place.workspace
        services = read_services(database)
        self._here = service_number(database, place.provider.name, place.endpoint)
        self._services = {**services, self._here: (place.provider, place.endpoint)}  # set up, and loaded once
        # A link may lead to this machine, or to the server that was asked, only where the user names that one now.
        self._reached = [
            number
            for number, (who, there) in services.items()
            if number == self._here or (place.endpoint.is_loopback if there.is_loopback else not who.links_to_itself)
        ]

    def to_send(self, states: Sequence[str], after: tuple[int, int]) -> list[Job]:
        """The next pictures of the input that may be sent, behind a position and variant."""
        marks = ", ".join("?" * len(states))
        where = f"state IN ({marks}) AND service = ? AND (position, variant) > (?, ?) ORDER BY position, variant"
        return self._where(f"{where} LIMIT 200", *states, self._here, *after)

    def submitted(self) -> list[Job]:
        """Those whose tasks earlier runs have submitted here."""
        return self._where("state = 'submitted' AND service = ? ORDER BY number", self._here)

    def lost(self, *, with_dead_link: bool) -> list[Job]:
        """Those whose task the service did not know in an earlier run, or, where asked for, whose link was dead."""
        where = "state IN ('unknown', 'failed') AND service = ? AND facts LIKE '%\"task_id\"%' ORDER BY number"
        return [
            job
            for job in self._where(where, self._here)
            if "task_id" in job.facts_before
            and (
                job.state == "unknown"
                or (with_dead_link and job.facts_before.get("error", {}).get("code") in DEAD_LINK)
            )
        ]

    def paid(self, after: int) -> list[Job]:
        """The next pictures that are paid for and not downloaded, from wherever that may be, behind a number."""
        marks = ", ".join("?" * len(self._reached))
        where = f"state = 'generated' AND service IN ({marks}) AND number > ? ORDER BY number LIMIT ?"
        return self._where(where, *self._reached, after, DOWNLOADS_AT_ONCE)

    def out_of_reach(self) -> list[str]:
        """What is to be told of pictures that are paid for and not downloaded by this run."""
        rows = self._database.execute("SELECT service, count(*) FROM pictures WHERE state = 'generated' GROUP BY 1")
        return [
            f"{count} paid pictures wait at {self._services[number][1].url}: only a run that names it fetches them"
            for number, count in rows.fetchall()
            if number not in self._reached
        ]

    def _where(self, condition: str, *values: object) -> list[Job]:
        rows = self._database.execute(f"SELECT * FROM pictures WHERE {condition}", values).fetchall()
        return [job_of(row, self._folder, self._services, self._workspace) for row in rows]


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
            "UPDATE pictures SET state = ?, paid = ?, output = ?, facts = ?, output_key = CASE WHEN EXISTS "
            "(SELECT * FROM pictures WHERE output_key = ? AND number <> ?) THEN ? ELSE ? END WHERE number = ?",
            (state, job.paid, output, job.facts, key, job.number, f"{key}//{job.number}", key, job.number),
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
