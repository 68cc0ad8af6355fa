"""Fleet: the servers that a batch asks, how much is out at each, and which takes the next call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from zimage.batch.ending import Storms
from zimage.batch.forecast import Forecast
from zimage.batch.jobs import Job, Place
from zimage.batch.options import BatchOptions
from zimage.batch.pacer import Pacer, window_for
from zimage.batch.tasks import OpenTasks
from zimage.batch.work import Outcome
from zimage.contract import GENERATE_SHARE


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
        self._concurrency = options.concurrency
        self._window = window_for(place.provider, options.concurrency, GENERATE_SHARE * options.timeout)

    def is_full(self, forecast: Forecast, now: float) -> bool:
        """Whether as many calls, and tasks that count as such, are out as may be."""
        most = self._window.limit if self._window else self._concurrency
        most = most or forecast.concurrency(self.pacer.base, now, self.out.values())
        return len(self.out) + self.tasks.out >= most

    def take(self, job: Job, now: float) -> None:
        """Note that a picture is asked for."""
        self.pacer.take(now)
        self.out[job.number] = now

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


class Fleet:
    """All servers of a batch, by the folder's numbers of their services."""

    def __init__(self, places: Mapping[int, Place], options: BatchOptions, start: float) -> None:
        self._servers = {number: Server(number, place, options, start) for number, place in places.items()}

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
        """The server that has a picture; the first for one of a service that is not asked any more."""
        return self._servers.get(job.service) or next(iter(self))

    def next(self, forecast: Forecast, now: float) -> Server:
        """The server that takes a call soonest."""
        return min(self, key=lambda server: (server.is_full(forecast, now), max(now, server.pacer.next_start)))

    def due(self, now: float) -> Iterator[Job]:
        """The tasks to be asked after now."""
        for server in self:
            while job := server.tasks.due(now):
                yield job

    def next_look(self, now: float) -> float | None:
        """Seconds until a task is to be asked after; None where none is open."""
        looks = (server.tasks.next_look(now) for server in self)
        return min((look for look in looks if look is not None), default=None)
