"""Pacer: when the next request may leave."""

from __future__ import annotations

import math

from zimage.batch.contract import SPACING

REFUSED_STEP, QUIET_STEP = 1.02, 0.99  # of the spacing: wider with each 429, closer again with each quiet second
WIDEST_SPACING = 60.0  # seconds
HOLD_WITHOUT_WORD = 1.0  # seconds to hold all calls after a 429 without Retry-After; doubles up to the next
LONGEST_HOLD_WITHOUT_WORD = 20.0


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

    def refused(self, now: float, sent: float, wait: float | None) -> bool:
        """Take note of a 429 to a call sent at `sent`; true unless that call left before calls were last held."""
        news = sent >= self._last_news
        if news:
            quiet = now - self.held_until
            self._holds_in_a_row += 1
            self._step = min(self._step**2, self.WIDEST_STEP) if quiet < self.STREAK else REFUSED_STEP
            # One 429 may be chance; one that comes soon after another says that the limit is here.
            self._closest = self.spacing * REFUSED_STEP if quiet < self.CHANCE else 0.0
            self._trial = self.FIRST_TRIAL
            self._last_news = now
        self.spacing = min(self.spacing * (self._step if news else REFUSED_STEP), WIDEST_SPACING)
        if not wait:  # not even "0" is a reason to send the same again at once
            wait = min(HOLD_WITHOUT_WORD * 2.0 ** (self._holds_in_a_row - 1), LONGEST_HOLD_WITHOUT_WORD)
        self.held_until = max(self.held_until, now + wait)
        self._quiet_since = self.held_until
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
