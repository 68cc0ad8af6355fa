"""The pacer against services that limit in the ways that services do, in simulated time."""

from __future__ import annotations

import heapq
import random
from collections import deque

import pytest

from zimage.batch.pacer import Pacer


class Limit:
    """At most `rate` calls in any second."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._accepted: deque[float] = deque()

    def admits(self, now: float) -> bool:
        while self._accepted and now - self._accepted[0] >= 1.0:
            self._accepted.popleft()
        if len(self._accepted) >= self.rate:
            return False
        self._accepted.append(now)
        return True


def simulate(told: float, true: float, seconds: float, latency: float = 0.5) -> tuple[float, float, float]:
    """Accepted calls a second over the whole run and over its second half, and the share of calls refused."""
    chance = random.Random(7)
    pacer, limit = Pacer(told * 60, start=0.0), Limit(true)
    accepted: list[float] = []
    refused = 0
    now = 0.0
    out: list[tuple[float, float, bool]] = []
    while now < seconds:
        if out and out[0][0] <= pacer.next_start:
            arrived, sent, good = heapq.heappop(out)
            now = max(now, arrived)
            if good:
                pacer.accepted(now, sent)
            else:
                pacer.refused(now, sent, 1.0)
            continue
        now = max(now, pacer.next_start)
        pacer.take(now)
        at = now + chance.uniform(0.0, 0.01)
        good = limit.admits(at)
        accepted += [at] * good
        refused += not good
        heapq.heappush(out, (at + latency, now, good))
    late = [moment for moment in accepted if moment >= seconds / 2]
    calls = len(accepted) + refused
    return len(accepted) / seconds, len(late) / (seconds / 2), refused / calls


@pytest.mark.parametrize("rate", [2, 10, 20])
def test_the_told_limit_is_used_to_95_percent_with_hardly_a_refusal(rate: float) -> None:
    overall, _, refused = simulate(rate, rate, 120)
    assert overall >= 0.95 * rate
    assert refused <= 0.01


@pytest.mark.smoke
@pytest.mark.parametrize(("told", "true"), [(20, 10), (20, 16), (10, 9), (20, 5)])
def test_it_settles_within_5_percent_under_a_limit_lower_than_told(told: float, true: float) -> None:
    _, settled, _ = simulate(told, true, 400)
    assert 0.95 * true <= settled <= true


def test_one_chance_refusal_is_forgotten_in_seconds() -> None:
    pacer = Pacer(600, start=0.0)
    assert pacer.refused(100.0, 99.9, 1.0)
    assert pacer.spacing > pacer.base
    for second in range(1, 5):
        pacer.accepted(101.0 + second * 1.1, 101.0 + second * 1.1)
    assert pacer.spacing == pacer.base


def test_a_refusal_holds_all_calls_as_long_as_it_says() -> None:
    pacer = Pacer(600, start=0.0)
    pacer.refused(10.0, 9.9, 7.5)
    assert pacer.next_start == 17.5


def test_refusals_of_calls_that_were_out_already_count_as_one() -> None:
    pacer = Pacer(600, start=0.0)
    news = [pacer.refused(10.0 + n / 100, 9.5 + n / 100, 1.0) for n in range(5)]
    assert news == [True, False, False, False, False]


def test_starts_that_were_missed_are_not_made_up_for() -> None:
    pacer = Pacer(60, start=0.0)
    pacer.take(0.0)
    pacer.take(50.0)
    assert pacer.next_start == pytest.approx(50.0 + pacer.spacing)
