"""Progress: what is told while it runs."""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

from zimage.batch.contract import RESULTS
from zimage.batch.jobs import Job
from zimage.batch.journal import RunRow
from zimage.console import Console
from zimage.contract import EXIT_DISK
from zimage.errors import Failure
from zimage.outside import told_line
from zimage.provider import Provider

FAILURES_TOLD = 20  # lines on stderr; the rest stands in the results
REPORT_EVERY = 5.0  # seconds between progress lines where stderr is no terminal


class Tally:
    """How many pictures are in which state, what they cost, and what this run has changed."""

    def __init__(self, states: Mapping[str, int], spent: float) -> None:
        self.states = Counter(states)
        self.spent = spent  # US$ that were, or may have been, billed, or are reserved for requests that are out
        self.spent_before = spent
        self.sent: set[int] = set()
        self.ends: dict[int, str] = {}  # the state in which this run has left a picture

    def move(self, job: Job, before: str, after: str) -> None:
        self.states[before] -= 1
        self.states[after] += 1
        self.ends[job.number] = after


class Progress:
    """A bar on a terminal, a line every few seconds elsewhere, nothing with --quiet; and a row for --status."""

    WINDOW = 60.0  # seconds over which the rate is taken

    def __init__(self, tally: Tally, row: RunRow, console: Console, provider: Provider) -> None:
        self._tally = tally
        self._row = row
        self._console = console
        self._provider = provider
        self._next_report = time.monotonic() + REPORT_EVERY
        self._done: deque[tuple[float, int]] = deque([(time.monotonic(), self._saved)])
        self._told = 0  # failures
        self._bar: Any = None
        if not console.quiet and sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            tqdm.monitor_interval = 0
            total = sum(tally.states.values())
            self._bar = tqdm(total=total, initial=self._saved, unit="picture", dynamic_ncols=True, smoothing=0.05)

    @property
    def _saved(self) -> int:
        return self._tally.states["saved"]

    def tick(self) -> None:
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(self._rest(), refresh=False)
            self._bar.update(self._saved - self._bar.n)
        if now >= self._next_report:
            self._next_report = now + REPORT_EVERY
            self._done.append((now, self._saved))
            while now - self._done[0][0] > self.WINDOW and len(self._done) > 2:
                self._done.popleft()
            self.keep()
            if self._bar is None:
                self._console.note(self._line())

    def note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(told_line(text), file=sys.stderr)
        else:
            self._console.note(text)

    def tell(self, job: Job, failure: Failure) -> None:
        """A line for a picture that will not come by itself, or whose link may stand nowhere else."""
        if failure.fault.image_url and failure.fault.exit_code == EXIT_DISK:
            self.note(f"paid, and not on disk: {job.name}: {failure.fault.image_url}")
        if job.state in ("failed", "unknown") and self._told < FAILURES_TOLD:
            self._told += 1
            more = f" (further ones: {RESULTS})" if self._told == FAILURES_TOLD else ""
            self.note(f"{job.state}: {job.name}: {failure.code}: {failure.message}{more}")

    def keep(self) -> None:
        """What --status tells of a running batch."""
        quota = self._provider.quota.told
        facts = {"per_minute": round(self.per_minute, 1), "remaining_s": self.remaining, "quota": quota or None}
        self._row.keep({name: value for name, value in facts.items() if value is not None})

    def close(self) -> None:
        if self._provider.quota.told:  # the next dry run asks for it
            self.keep()
        if self._bar is not None:
            self.tick()
            self._bar.close()

    @property
    def per_minute(self) -> float:
        (then, before), (now, after) = self._done[0], self._done[-1]
        return 60 * (after - before) / (now - then) if now > then else 0.0

    @property
    def remaining(self) -> float | None:
        """Seconds until everything that can be made is saved, at the rate of the last minute."""
        states = self._tally.states
        left = sum(states[state] for state in ("pending", "submitting", "submitted", "generated"))
        return round(60 * left / self.per_minute) if self.per_minute else None

    def _line(self) -> str:
        total = sum(self._tally.states.values())
        remaining = self.remaining
        left = (
            ""
            if remaining is None
            else f", about {remaining / 60:.0f} min left"
            if remaining > 90
            else (f", about {remaining:.0f} s left")
        )
        return f"progress: {self._saved}/{total} saved, {self._rest()}, {self.per_minute:.0f} a minute{left}"

    def _rest(self) -> str:
        states = self._tally.states
        spent = str(self._provider.quota) if self._provider.costs_quota else f"US${self._tally.spent:.4g}"
        return ", ".join(filter(None, (f"{states['failed']} failed", f"{states['unknown']} unknown", spent)))
