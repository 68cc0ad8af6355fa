"""Forecast: how long calls and downloads take here, and what that allows."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Iterable

from zimage.batch.contract import CONCURRENCY_RANGE, SPACING

UNPACED_CONCURRENCY = 16  # without a rate limit there is no rate to follow
ASSUMED_LATENCY = 10.0  # seconds, until one is measured
ASSUMED_REWRITING = 15.0  # seconds more where the service thinks about the prompt first; nobody documents it


class Forecast:
    """What the last calls took. All moments are of time.monotonic(), all times in seconds."""

    def __init__(self, latency_before: float | None, deadline: float) -> None:
        self.latency_before = latency_before  # that of an earlier run
        self.deadline = deadline
        self.ready_at = time.monotonic()
        self._latencies: deque[float] = deque(maxlen=20)
        self._saving_times: deque[float] = deque(maxlen=20)

    def answered(self, seconds: float) -> None:
        """Take note of how long a call took."""
        self._latencies.append(seconds)

    def saved(self, seconds: float) -> None:
        """Take note of how long a download took."""
        self._saving_times.append(seconds)

    @property
    def latency(self) -> float | None:
        """Seconds from request to answer, the longest of the last ones; None while none is known."""
        return max(self._latencies) if self._latencies else self.latency_before

    @property
    def typical_latency(self) -> float | None:
        return statistics.median(self._latencies) if self._latencies else None

    @property
    def last_start(self) -> float:
        """The last moment at which a request may leave and still end, downloaded, before the time limit."""
        if self.latency is not None:
            return self.last_save - 1.25 * self.latency
        # Nothing is known: leave twice the time that has passed since all was loaded.
        return self.ready_at + (self.deadline - self.ready_at) / 3

    @property
    def last_save(self) -> float:
        """The last moment at which a download may begin and still end before the time limit."""
        return self.deadline - 1.5 * max(self._saving_times, default=0.3)

    def concurrency(self, spacing: float, now: float, out: Iterable[float]) -> int:
        """How many requests may be out: as many as the rate needs at the latency that is seen.

        `spacing` is the seconds between two calls, 0 without a rate limit; `out` when those that are out have left.
        """
        if not spacing:
            return UNPACED_CONCURRENCY
        least, most = CONCURRENCY_RANGE
        if self.latency is None and self.deadline < math.inf:
            return least  # a call that the time limit cuts may be paid for and lost: first see how long one takes
        latency = max([*self._latencies, *(now - sent for sent in out)], default=ASSUMED_LATENCY)
        latency = latency if self._latencies else max(latency, ASSUMED_LATENCY)
        return min(most, max(least, math.ceil(1.25 * latency / spacing) + 2))


def duration(pictures: int, rpm: float, concurrency: int | None, extended: int = 0, *, servers: int = 1) -> float:
    """Seconds that so many pictures take, at the rate limit or else at the number of requests that are out at once.

    `extended` of them have their prompt rewritten first. Both limits are those of each server.
    """
    spacing = SPACING * 60 / rpm if rpm else 0.0
    at_once = concurrency or (CONCURRENCY_RANGE[1] if spacing else UNPACED_CONCURRENCY)
    work = pictures * ASSUMED_LATENCY + extended * ASSUMED_REWRITING
    last = ASSUMED_LATENCY + ASSUMED_REWRITING * (extended > 0) if pictures else 0.0
    return max(pictures * spacing, work / at_once) / servers + last
