"""The pacer against services that limit in the ways that services do, in simulated time."""

from __future__ import annotations

import heapq
import random
from collections import deque
from typing import NamedTuple

import pytest

from zimage.batch.pacer import Pacer, Window


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


# How many at once -----------------------------------------------------------------------------------------------------


class Served(NamedTuple):
    """How a simulated batch went, all times in its own seconds."""

    seconds: float
    lost: int  # calls given up after their patience: the server has worked for nothing
    used: float  # of the server's capacity


def serve(slots: int, service: float, pictures: int, *, most: int = 64, patience: float = 80.0) -> Served:
    """A batch on a server that works on `slots` calls at once; the others wait in line, also where nobody waits."""
    window, now = Window(most, patience), 0.0
    free = [0.0] * slots  # when each slot is free again
    out: list[tuple[float, float, bool]] = []  # when the call ends, when it left, whether with a picture
    done = lost = 0
    while done < pictures:
        while done + len(out) < pictures and len(out) < window.limit:
            ready = max(now, heapq.heappop(free)) + service
            heapq.heappush(free, ready)
            heapq.heappush(out, (min(ready, now + patience), now, ready <= now + patience))
        at_once = len(out)
        now, sent, good = heapq.heappop(out)
        window.heard(None if good else "outcome_unknown", now, sent, kind="1024*1024", out=at_once)
        done += good
        lost += not good
    return Served(now, lost, pictures * service / slots / now)


@pytest.mark.smoke
@pytest.mark.parametrize("slots", [1, 2, 3, 4, 8, 16, 32])
@pytest.mark.parametrize("service", [0.5, 10.0, 30.0])
def test_a_server_is_filled_and_never_given_more_than_it_answers_in_time(slots: int, service: float) -> None:
    served = serve(slots, service, 100 * slots)
    assert served.lost == 0
    assert served.used >= 0.85


@pytest.mark.parametrize(("service", "patience"), [(10, 80), (20, 80), (35, 80), (60, 80), (79, 80), (0.1, 0.8)])
def test_thirty_pictures_one_by_one_lose_none(service: float, patience: float) -> None:
    served = serve(1, service, 30, patience=patience)
    assert served.lost == 0
    assert served.seconds == pytest.approx(30 * service)


def test_no_more_are_out_than_the_user_allows() -> None:
    assert serve(8, 1.0, 80, most=3).seconds == pytest.approx(80 / 3, rel=0.1)


def test_pictures_of_another_size_are_measured_by_their_own() -> None:
    window = Window(64, 80.0)
    for number in range(8):
        window.heard(None, 10.0 * number + 1, 10.0 * number, kind="512*512", out=1)
    known = window.limit
    window.heard(None, 104.0, 100.0, kind="2048*2048", out=1)
    assert window.limit >= known > 0
    window.heard(None, 114.0, 110.0, kind="512*512", out=1)
    assert window.limit < known


def test_what_was_out_together_halves_once() -> None:
    window = Window(64, 80.0)
    for number in range(7):
        window.heard(None, 2.0 * number + 1, 2.0 * number, kind="x", out=64)
    before = window.limit
    for late in range(5):
        window.heard("outcome_unknown", 100.0 + late, 90.0, kind="x", out=5)
    assert window.limit == before // 2
