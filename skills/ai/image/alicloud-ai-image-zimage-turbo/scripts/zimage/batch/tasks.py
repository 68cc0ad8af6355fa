"""Tasks: pictures that a service works on, asked after now and then; they keep no worker and no place in the rate."""

from __future__ import annotations

import heapq
import time

from zimage.batch.contract import TICK
from zimage.batch.jobs import Job


class OpenTasks:
    """Which task is asked after when. All moments are in seconds of time.monotonic().

    `patience`: seconds for one task, then it is left to the next run; `as_calls`: the service counts them as calls.
    """

    def __init__(self, patience: float, *, as_calls: bool = False) -> None:
        self._patience = patience
        self._as_calls = as_calls
        self._waiting: list[tuple[float, int, Job]] = []
        self._asked: set[int] = set()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._asked)

    @property
    def out(self) -> int:
        """How many of the calls that may be out they take up."""
        return len(self) if self._as_calls else 0

    def add(self, job: Job) -> None:
        """Take a task that was submitted."""
        job.give_up_at = time.monotonic() + self._patience
        self.again(job)

    def again(self, job: Job) -> None:
        """Ask after it once more, in a while."""
        assert job.task is not None
        due = min(time.monotonic() + job.task.pause_s, job.give_up_at)
        heapq.heappush(self._waiting, (due, job.number, job))

    def due(self, now: float) -> Job | None:
        """A task to be asked after now; `answered` tells of its answer."""
        if not self._waiting or self._waiting[0][0] > now:
            return None
        job = heapq.heappop(self._waiting)[2]
        self._asked.add(job.number)
        return job

    def answered(self, job: Job) -> None:
        self._asked.discard(job.number)

    def leave(self) -> list[Job]:
        """Ask after none of them any more: the next run does. Returns those that wait."""
        left = [job for _, _, job in self._waiting]
        self._waiting.clear()
        return left

    def next_look(self, now: float) -> float | None:
        """Seconds until there is something to do; None where no task is open."""
        if self._waiting:
            return max(0.0, self._waiting[0][0] - now)
        return TICK if self._asked else None
