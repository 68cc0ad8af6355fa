"""Pacer: when the next request may leave, and how many may be out."""

from __future__ import annotations

import math

from zimage.batch.contract import CONCURRENCY_RANGE, SPACING
from zimage.provider import Provider

REFUSED_STEP, QUIET_STEP = 1.02, 0.99  # of the spacing: wider with each 429, closer again with each quiet second
WIDEST_SPACING = 60.0  # seconds
HOLD_WITHOUT_WORD = 1.0  # seconds to hold all calls after a 429 without Retry-After; doubles up to the next
LONGEST_HOLD_WITHOUT_WORD = 20.0
OVERLOAD = ("rate_limited", "service_failing", "outcome_unknown")  # how a server may fail that has too much to do


class Pacer:
    """Evenly spaced starts, just under a rate limit, fitted to what the service answers.

    The spacing begins at SPACING times that of the limit. Each 429 holds all calls for as long as the service says
    and widens the spacing; quiet time closes it again, at once down to where the last 429 came, and beyond that
    point only in trials, one after a long quiet time, then faster while they go well. All moments are in seconds of
    time.monotonic().
    """

    STREAK = 5.0  # seconds; a 429 so soon after the last one is a sign that the limit is far off
    WIDEST_STEP = 1.25
    CHANCE = 30.0  # seconds of calls without a 429 after which the next one is taken for chance
    FIRST_TRIAL, LAST_TRIAL = 60.0, 1.0  # quiet seconds before the first step beyond a known limit, and at the fastest

    def __init__(self, per_minute: float, *, start: float) -> None:
        self.base = SPACING * 60 / per_minute if per_minute else 0.0
        self.spacing = self.base
        self.held_until = -math.inf
        self._next = start
        self._quiet_since = start
        self._closest = 0.0  # the spacing that is known to hold
        self._trial = self.FIRST_TRIAL
        self._step = REFUSED_STEP
        self._last_news = -math.inf
        self._holds_in_a_row = 0

    @property
    def next_start(self) -> float:
        return max(self._next, self.held_until)

    def take(self, now: float) -> None:
        """Use the next start. One that was missed is not made up for: that would be a burst."""
        start = self.next_start if now - self.next_start < self.spacing / 2 else now
        self._next = start + self.spacing

    def held(self, now: float, sent: float, wait: float | None = None) -> bool:
        """Hold all calls after one that came to nothing; true unless that call left before they were last held.

        `wait`: seconds, where the answer says how long; else longer each time, until a call is accepted.
        """
        news = sent >= self._last_news
        if news:
            self._holds_in_a_row += 1
            self._last_news = now
        if not wait:  # not even "0" is a reason to send the same again at once
            wait = min(HOLD_WITHOUT_WORD * 2.0 ** max(0, self._holds_in_a_row - 1), LONGEST_HOLD_WITHOUT_WORD)
        self.held_until = max(self.held_until, now + wait)
        self._quiet_since = self.held_until
        return news

    def refused(self, now: float, sent: float, wait: float | None) -> bool:
        """Take note of a 429 to a call sent at `sent`; returns as `held`."""
        quiet = now - self.held_until
        news = self.held(now, sent, wait)
        if news:
            self._step = min(self._step**2, self.WIDEST_STEP) if quiet < self.STREAK else REFUSED_STEP
            # One 429 may be chance; one that comes soon after another says that the limit is here.
            self._closest = self.spacing * REFUSED_STEP if quiet < self.CHANCE else 0.0
            self._trial = self.FIRST_TRIAL
        self.spacing = min(self.spacing * (self._step if news else REFUSED_STEP), WIDEST_SPACING)
        return news

    def accepted(self, now: float, sent: float) -> None:
        """Take note of an answer that is no 429: after each quiet second calls come a step closer again."""
        self._holds_in_a_row = 0
        while self.spacing > self.base:
            closer = max(self.base, self.spacing * QUIET_STEP)
            known = closer >= self._closest
            if sent - self._quiet_since < (1.0 if known else self._trial):
                return
            self._quiet_since = now  # the next step waits for answers to calls that were sent at this one
            self.spacing = closer
            if not known:
                self._closest = closer
                self._trial = max(self.LAST_TRIAL, self._trial / 2)


class Window:
    """How many calls a server works on at once, learnt from how long they take: congestion control, as of TCP.

    The limit doubles while calls take as long as one alone does. At the first that takes longer it is halved, goes back
    to what was known to do, and from there grows by one after a whole round of good answers; to where it was too much
    only after many rounds. All times are in seconds, moments of time.monotonic().
    """

    SLOW, SLACK = 1.5, 0.1  # times as long as one call alone, and seconds more than it, is too slow
    ROUNDS = 10  # good rounds before a limit that was too much is tried again
    ROOM = 1.25  # one call more, on a server that is full, takes twice as long as one alone: is that in time?

    def __init__(self, most: int, patience: float) -> None:
        self.limit = 1
        self._most = most
        self._patience = patience  # of one call
        self._alone: dict[str, float] = {}  # what the quickest call took, by the kind of picture
        self._good = 0  # answers since the limit was changed
        self._before = 0  # the limit that was raised to this one
        self._will_do: float = math.inf  # up to here the limit doubles
        self._too_much: float = math.inf
        self._changed_at = -math.inf

    def heard(self, code: str | None, now: float, sent: float, *, kind: str, out: int) -> None:
        """Take note of what became of a call sent at `sent`: an error's code, None for a picture.

        `kind`: pictures of one kind take equally long; `out`: so many were out, with it.
        """
        if code in OVERLOAD:
            self._overloaded(now, sent)
        if code is None:
            self._answered(now, sent, kind, out)

    def _answered(self, now: float, sent: float, kind: str, out: int) -> None:
        took = now - sent
        alone = self._alone[kind] = min(took, self._alone.get(kind, took))
        if took > max(self.SLOW * alone, alone + self.SLACK):
            self._overloaded(now, sent)
        elif out >= self.limit and sent >= self._changed_at:
            self._good += 1
            rounds = self.ROUNDS if self.limit + 1 >= self._too_much else 1
            if self._good >= rounds * self.limit and self.ROOM * 2 * max(self._alone.values()) < self._patience:
                self._before = self.limit
                if self.limit >= self._too_much:  # not any more
                    self._too_much = math.inf
                self._change(now, self.limit + 1 if self.limit >= self._will_do else min(2 * self.limit, self._will_do))

    def _overloaded(self, now: float, sent: float) -> None:
        """A call was too much: halve the limit, once for all that were out with it. Of one alone it says nothing."""
        if sent >= self._changed_at and self.limit > 1:
            self._too_much = self.limit
            self._will_do = self._before or self.limit // 2
            self._before = 0
            self._change(now, self.limit // 2)

    def _change(self, now: float, limit: float) -> None:
        self.limit = int(min(self._most, max(1, limit)))
        self._good = 0
        self._changed_at = now


def window_for(provider: Provider, concurrency: int | None, patience: float) -> Window | None:
    """What learns how many calls a server works on at once; None where that is known.

    A service with a published rate works on as many as come in it. The model in this process draws as many as were
    asked for: they take longer together than one alone, and all are done sooner. Anything else may be one card.
    """
    if provider.requests_per_minute or provider.in_process:
        return None
    return Window(concurrency or CONCURRENCY_RANGE[1], patience)
