"""Jobs: the pictures of a folder as work, and where it is done."""

from __future__ import annotations

import heapq
import json
import math
import sqlite3
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from zimage.batch.contract import DOWNLOADS_AT_ONCE, NO_SEED
from zimage.batch.folder import facts_in, facts_of, service_number
from zimage.batch.names import evidence_name
from zimage.endpoint import Endpoint, origin_of
from zimage.errors import Fault
from zimage.evidence import Evidence, utc_now
from zimage.keys import Key
from zimage.outside import outside_text
from zimage.plan import Plan
from zimage.provider import Provider
from zimage.registry import provider_named
from zimage.request import ImageRequest
from zimage.settle import DEAD_LINK
from zimage.task import Task
from zimage.trust import Own

if TYPE_CHECKING:
    from zimage.facts import Attempt, Facts, State

TO_SEND = ("pending", "failed", "unknown")  # states from which a picture may be sent, the latter two where asked for


class Job:
    """One picture at work: its plan, its evidence so far (in memory), what was paid, and when it is due."""

    def __init__(self, row: sqlite3.Row, facts: Facts, plan: Plan, asked: ImageRequest) -> None:
        self.number = int(row["number"])
        self.service = int(row["service"])  # the folder's number for where it is asked for, or was last
        self.line = row["line"]
        self.position = (row["position"], row["variant"])
        self.id = row["id"]
        self.state: State = row["state"]
        self.state_before: State = self.state  # pending; failed or unknown where it is to be made again
        self.paid = int(row["paid"])
        self.plan = plan
        self._asked = asked  # as the row says; what a server does not use is not in its plan
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

    def ask_at(self, service: int, place: Place) -> None:
        """Have it asked for there from now on. What went elsewhere says so."""
        if self.service == service and self.plan.provider is place.provider:
            return
        before, plan = self.evidence.data["endpoint"], self.plan
        self.service = service
        self.plan = Plan.of(
            place.provider,
            place.endpoint,
            self._asked,
            workspace=place.workspace,
            output=plan.output,
            overwrite=plan.overwrite,
            evidence_path=plan.evidence_path,
        )
        went: list[Attempt] = [{"endpoint": before, **attempt} for attempt in self.evidence.data["attempts"]]
        self.evidence.update(attempts=went, **self.plan.asked_at, **self.plan.sent)

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


class Feed:
    """The pictures to be sent, in the order of the input, and those to be sent again when their time has come."""

    def __init__(self, jobs: Jobs, states: Sequence[str]) -> None:
        self._jobs = jobs
        self._states = states
        self._ready: deque[Job] = deque()
        self._due: list[tuple[float, int, Job]] = []  # to be sent again
        self._fed = (-1, -1)  # position and variant of the last picture read
        # Tasks of earlier runs. Where one never came its picture is pending again, and sent by `again` alone: the
        # input, which may not have come to it yet, must not bring it once more.
        self._at_work = {job.number for job in jobs.submitted()}

    def next(self, now: float) -> Job | None:
        """The next picture to send: one whose retry is due, else the next of the input."""
        if self._due and self._due[0][0] <= now:
            return heapq.heappop(self._due)[2]
        while not self._ready and (found := self._jobs.to_send(self._states, self._fed)):
            self._fed = found[-1].position
            self._ready.extend(job for job in found if job.number not in self._at_work)
        return self._ready.popleft() if self._ready else None

    def back(self, job: Job) -> None:
        """Put a picture back to the front."""
        self._ready.appendleft(job)

    def again(self, job: Job, when: float) -> None:
        """Have a picture sent again, not before a moment of time.monotonic()."""
        heapq.heappush(self._due, (when, job.number, job))

    def anew(self, job: Job) -> None:
        """Have a picture sent that is pending again, where the input does not bring it."""
        if job.position <= self._fed or job.number in self._at_work:
            self.again(self._jobs.numbered(job.number), time.monotonic())

    @property
    def due_at(self) -> float | None:
        """When the next retry is due; None where there is none."""
        return self._due[0][0] if self._due else None


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
    return Job(row, facts, plan, request)


def services_alike(database: sqlite3.Connection, provider: Provider, named: Collection[int]) -> list[int]:
    """The services whose pictures those that are named could have made: where users name servers, any of theirs."""
    rows = database.execute("SELECT number, provider FROM services ORDER BY number").fetchall()
    others = provider.name if provider.asks_own_servers() else None
    return [number for number, name in rows if number in named or name == others]


def marks(values: Collection[object]) -> str:
    """Places for so many values in an SQL statement."""
    return f"({', '.join('?' * len(values))})"


class Jobs:
    """The pictures of a folder as work for a run; calls go to the places that are named, and no other gets their keys.

    `places`: all of one provider.
    """

    def __init__(self, database: sqlite3.Connection, folder: Path, places: Sequence[Place]) -> None:
        self._database = database
        self._folder = folder
        self._workspace = places[0].workspace
        services = read_services(database)
        self.places = {service_number(database, place.provider.name, place.endpoint): place for place in places}
        here = {number: (place.provider, place.endpoint) for number, place in self.places.items()}
        self._services = {**services, **here}  # set up, and loaded once
        self._alike = services_alike(database, places[0].provider, self.places)
        is_loopback = any(place.endpoint.is_loopback for place in places)
        # A link may lead to this machine, or to the server that was asked, only where the user names that one now.
        self._reached = [
            number
            for number, (who, there) in services.items()
            if number in self.places or (is_loopback if there.is_loopback else not who.links_to_itself)
        ]

    def to_send(self, states: Sequence[str], after: tuple[int, int]) -> list[Job]:
        """The next pictures of the input that may be sent, behind a position and variant."""
        where = f"state IN {marks(states)} AND service IN {marks(self._alike)} AND (position, variant) > (?, ?)"
        return self._where(f"{where} ORDER BY position, variant LIMIT 200", *states, *self._alike, *after)

    def numbered(self, number: int) -> Job:
        """A picture as the database has it now."""
        return self._where("number = ?", number)[0]

    def stranded(self) -> list[Job]:
        """Those of the input whose task or link only a server has that is not named any more, though others are."""
        gone = [number for number in self._alike if number not in self.places]
        where = f"state IN ('submitted', 'generated') AND service IN {marks(gone)} AND position IS NOT NULL"
        return [job for job in self._where(f"{where} ORDER BY number", *gone) if self.is_only_there(job)]

    def is_only_there(self, job: Job) -> bool:
        """Whether a task, or a picture that was made, can be had from the server alone that was asked for it."""
        is_link_to_it = origin_of(job.evidence.have.link) == origin_of(job.plan.endpoint.url)
        is_far = is_link_to_it or job.service not in self._reached
        return job.state == "submitted" or (job.state == "generated" and is_far)

    def submitted(self) -> list[Job]:
        """Those whose tasks earlier runs have submitted here."""
        return self._where(f"state = 'submitted' AND service IN {marks(self.places)} ORDER BY number", *self.places)

    def lost(self, *, with_dead_link: bool) -> list[Job]:
        """Those whose task the service did not know in an earlier run, or, where asked for, whose link was dead."""
        where = f"state IN ('unknown', 'failed') AND service IN {marks(self.places)} AND facts LIKE '%\"task_id\"%'"
        return [
            job
            for job in self._where(f"{where} ORDER BY number", *self.places)
            if "task_id" in job.facts_before
            and (
                job.state == "unknown"
                or (with_dead_link and job.facts_before.get("error", {}).get("code") in DEAD_LINK)
            )
        ]

    def paid(self, after: int) -> list[Job]:
        """The next pictures that are paid for and not downloaded, from wherever that may be, behind a number."""
        where = f"state = 'generated' AND service IN {marks(self._reached)} AND number > ? ORDER BY number LIMIT ?"
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
