"""Waiting: deadlines, signals, and work that may be left behind."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from zimage.contract import BACKOFF_BASE, BACKOFF_CAP, GENERATE_SHARE, SHORTEST_ATTEMPT_SHARE
from zimage.errors import Failure


class Interrupted(BaseException):
    """SIGINT or SIGTERM, raised only where waiting can be broken off without losing what is known."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum
        self.request_left = True  # or may have


class Signals:
    """Turns SIGINT and SIGTERM into Interrupted, but only inside `breakable` sections.

    Everywhere else they wait: an answer that has arrived is on disk before the command gives way. Python runs
    signal handlers in the main thread only: in every other thread a section is never broken off.
    """

    def __init__(self) -> None:
        self._pending: int | None = None
        self._breakable = False

    def install(self) -> None:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, _frame: object) -> None:
        self._pending = signum
        self._check()

    def _check(self) -> None:
        if self._breakable and self._pending is not None:
            self._breakable = False
            raise Interrupted(self._pending)

    @contextlib.contextmanager
    def breakable(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._breakable = True
        try:
            self._check()
            yield
        finally:
            self._breakable = False


SIGNALS = Signals()

Result = TypeVar("Result")

TICK = 0.1  # seconds; a signal that comes just before a wait is seen only when the wait is over


class Late(Exception):
    """What was waited for is not at its end."""


def in_thread(work: Callable[[], Result], seconds: float) -> Result:
    """What work returns or raises; after so many seconds it is left to itself.

    Raises:
        Late.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    until = time.monotonic() + max(0.001, seconds)
    while thread.is_alive() and (left := until - time.monotonic()) > 0:
        thread.join(min(left, TICK))
    if errors:
        raise errors[0]
    if not results:
        raise Late
    return results[0]


class Clock:
    """The time of one command. All moments are in seconds of time.monotonic()."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.start = time.monotonic()
        self.end = self.start + timeout
        self.generate_until = self.start + timeout * GENERATE_SHARE
        self.shortest_attempt = timeout * SHORTEST_ATTEMPT_SHARE

    def room_for_attempt_after(self, wait: float, until: float) -> bool:
        return time.monotonic() + wait + self.shortest_attempt <= until


def backoff(attempt: int) -> float:
    """Seconds to wait after the given attempt (from 0): exponential, with jitter, capped."""
    return min(BACKOFF_CAP, BACKOFF_BASE * 2.0 ** min(attempt, 16)) * random.uniform(0.75, 1.0)


def wait_before(attempt: int, said: float | None) -> float:
    """Seconds to wait after an attempt (from 0): what the service asks for, but never less than the first step."""
    return backoff(attempt) if said is None else max(said, BACKOFF_BASE)


def pause(seconds: float) -> None:
    """Wait; not at all once `no_more_waiting` is set."""
    until = time.monotonic() + seconds
    with SIGNALS.breakable():
        while (left := until - time.monotonic()) > 0 and not no_more_waiting.wait(min(left, TICK)):
            pass


no_more_waiting = threading.Event()  # for a command with threads that has been told to end


def in_time(work: Callable[[float], Result], until: float) -> Result:
    """Do work that cannot be broken off in a thread of its own, so that a deadline and a signal hold all the same.

    Raises:
        Failure: too_slow, and what the work raises. Interrupted.
    """
    try:
        with SIGNALS.breakable():
            return in_thread(lambda: work(until), until - time.monotonic())
    except Late:
        abandoned_work.set()
        raise Failure("too_slow", "the picture was not made in time on this machine") from None
    except Interrupted as interruption:
        abandoned_work.set()
        interruption.request_left = False
        raise


abandoned_work = threading.Event()  # the process must end without waiting for its threads
