"""Fleet: the servers that a batch asks, how much is out at each, and which takes the next call."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from zimage.batch.contract import CONCURRENCY_RANGE
from zimage.batch.ending import STRIKES, Storms, storm
from zimage.batch.forecast import Forecast
from zimage.batch.jobs import Job, Place
from zimage.batch.options import BatchOptions
from zimage.batch.pacer import Pacer, window_for
from zimage.batch.tasks import OpenTasks
from zimage.batch.work import Outcome
from zimage.contract import EXIT_UNAVAILABLE, GENERATE_SHARE
from zimage.errors import Failure
from zimage.transport import get_to_know
from zimage.waiting import Stop, needing_threads

MOST_THREADS = 256  # that wait for calls


class Server:
    """One address that pictures are asked for at. All moments are of time.monotonic().

    `number`: the folder's of the service; `start`: when the first call may leave.
    """

    def __init__(self, number: int, place: Place, options: BatchOptions, start: float) -> None:
        self.number = number
        self.place = place
        self.out: dict[int, float] = {}  # number -> when its request left
        self.tasks = OpenTasks(options.timeout, as_calls=place.provider.calls_at_once is not None)
        self.pacer = Pacer(options.rpm, start=start)
        self.storms = Storms()
        self.pictures = 0  # that this run has got from it
        self.left_out: Failure | None = None  # why it is not asked any more
        self.trouble: Failure | None = None  # the last failure for which it is left alone for a while
        self._concurrency = options.concurrency
        self._window = window_for(place.provider, options.concurrency, GENERATE_SHARE * options.timeout)

    def is_full(self, forecast: Forecast, now: float) -> bool:
        """Whether as many calls, and tasks that count as such, are out as may be."""
        return self.load(forecast, now) >= 1

    def _most_out(self, forecast: Forecast, now: float) -> int:
        most = self._window.limit if self._window else self._concurrency
        return most or forecast.concurrency(self.pacer.base, now, self.out.values())

    def load(self, forecast: Forecast, now: float) -> float:
        """What is out, of what may be."""
        return (len(self.out) + self.tasks.out) / self._most_out(forecast, now)

    def take(self, job: Job, now: float) -> None:
        """Have a picture asked for here."""
        job.ask_at(self.number, self.place)
        self.pacer.take(now)
        self.out[job.number] = now

    def calm(self, step: str, *, is_known: bool = True) -> None:
        """A step went well, as of `Storms`."""
        self.storms.calm(step, is_known=is_known)
        if step == "generate":
            self.trouble = None

    def answered(self, outcome: Outcome, now: float) -> float:
        """Take note of how a call ended; returns when it left."""
        job, failure = outcome.job, outcome.failure
        if self._window is not None:
            code, kind = failure.code if failure else None, job.plan.request.size
            self._window.heard(code, now, self.out[job.number], kind=kind, out=len(self.out))
        sent = self.out.pop(job.number)
        if not outcome.holds:
            self.pacer.accepted(now, sent)
        return sent

    @property
    def told(self) -> dict[str, Any]:
        """What the summary says of it."""
        out = self.left_out or self.trouble
        why = {"left_out": out.fault.as_json()} if out else {}
        at_once = {"at_once": self._window.limit} if self._window else {}
        return {"endpoint": self.place.endpoint.url, "pictures": self.pictures, **at_once, **why}


class Fleet:
    """All servers of a batch, by the folder's numbers of their services."""

    def __init__(self, places: Mapping[int, Place], options: BatchOptions, start: float) -> None:
        self._servers = {number: Server(number, place, options, start) for number, place in places.items()}
        self.most_at_once = min(MOST_THREADS, len(places) * (options.concurrency or CONCURRENCY_RANGE[1]))  # calls

    def __iter__(self) -> Iterator[Server]:
        return iter(self._servers.values())

    @property
    def out(self) -> int:
        """How many requests are out."""
        return sum(len(server.out) for server in self)

    @property
    def open_tasks(self) -> int:
        return sum(len(server.tasks) for server in self)

    def at(self, job: Job) -> Server:
        """The server that has a picture; the first for one of a service that is not named any more."""
        return self._servers.get(job.service) or next(iter(self))

    @property
    def up(self) -> list[Server]:
        """Those that are asked."""
        return [server for server in self if server.left_out is None]

    def has_others(self, server: Server) -> bool:
        """Whether pictures can be asked for elsewhere."""
        return any(other is not server for other in self.up)

    def is_to_rest(self, server: Server, outcome: Outcome) -> bool:
        """Whether all calls to a server are to wait after this one; also where others do its work meanwhile."""
        is_its_fault = outcome.failure is not None and outcome.failure.fault.concerns == "service"
        return outcome.holds or (outcome.step == "generate" and is_its_fault and self.has_others(server))

    def count(self, server: Server, step: str, failure: Failure) -> Failure | None:
        """Take note of a failure, as of `Storms`: of a server that others can stand in for fewer are borne."""
        if step != "generate" or failure.code == "rate_limited" or not self.has_others(server):
            return server.storms.count(step, failure)
        server.trouble = storm(failure, "its last call failed", EXIT_UNAVAILABLE)
        return server.storms.count(step, failure, STRIKES)

    def leave_out(self, server: Server, failure: Failure) -> bool:
        """Ask a server no more; False where it is the last one."""
        if not self.has_others(server):
            return False
        server.left_out = server.left_out or failure
        return True

    def next(self, job: Job | None, forecast: Forecast, now: float) -> Server:
        """The server that takes a call soonest; of those that take it now, the least busy that has not failed at it."""

        def place(server: Server) -> tuple[bool, float, bool, float]:
            has_failed = job is not None and job.tries > 0 and job.service == server.number
            soonest = max(now, server.pacer.next_start)
            return server.is_full(forecast, now), soonest, has_failed, server.load(forecast, now)

        return min(self.up, key=place)

    def due(self, now: float) -> Iterator[Job]:
        """The tasks to be asked after now."""
        for server in self:
            while job := server.tasks.due(now):
                yield job

    def next_look(self, now: float) -> float | None:
        """Seconds until a task is to be asked after; None where none is open."""
        looks = (server.tasks.next_look(now) for server in self)
        return min((look for look in looks if look is not None), default=None)


def meet(places: Sequence[Place], stop: Stop) -> dict[int, Failure]:
    """Let each server say what it is, all at the same time; returns those that cannot be asked (index, why).

    None is left out where all are away: then the calls themselves say what is wrong. One alone is asked as ever.

    Raises:
        Failure: of the first server, where none can be asked, or of the only one. Stopped.
    """
    if len(places) == 1:
        get_to_know(places[0].provider, places[0].endpoint, places[0].key, stop)
        return {}
    ends: dict[int, BaseException | None] = {}

    def ask(number: int, place: Place) -> None:
        try:
            ends[number] = get_to_know(place.provider, place.endpoint, place.key, stop)
        except BaseException as error:
            ends[number] = error

    threads = [threading.Thread(target=ask, args=pair, name="meet", daemon=True) for pair in enumerate(places)]
    with needing_threads():
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join()
    for end in ends.values():
        if end is not None and not isinstance(end, Failure):
            raise end
    unfit = {number: end for number, end in sorted(ends.items()) if isinstance(end, Failure)}
    if len(unfit) < len(places):
        return unfit
    for failure in unfit.values():
        if failure.code != "unreachable":
            raise failure
    return {}


def unlike(places: Sequence[Place]) -> list[str]:
    """What is to be told of servers that draw with different models, as far as they say."""
    told = {place.endpoint.url: place.provider.draws_with for place in places if place.provider.draws_with}
    if len(set(told.values())) < 2:
        return []
    named = "; ".join(f"{url} with {model}" for url, model in told.items())
    return [f"the servers do not draw with the same model: {named}; the results name the endpoint of each picture"]
