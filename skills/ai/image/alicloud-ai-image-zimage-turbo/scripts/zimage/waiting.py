"""Waiting: one way to end early. A `Stop` is handed in and asked; nothing else says when to give up.

Signal handlers only note. Whatever waits looks at its stop every tick, and one thread cuts the connections that block.
"""

from __future__ import annotations

import contextlib
import math
import random
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from zimage.contract import BACKOFF_BASE, BACKOFF_CAP, GENERATE_SHARE, SHORTEST_ATTEMPT_SHARE
from zimage.errors import Failure, os_reason

Result = TypeVar("Result")

TICK = 0.1  # seconds between two looks at a stop
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """Work was told to end while it could be broken off without losing what is known. `reason`: see Stop."""

    def __init__(self, reason: str, *, request_left: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.request_left = request_left  # or may have


class Late(Exception):
    """What was waited for is not at its end."""


class Stop:
    """When and why work has to end: its own time, and whatever ends its parent.

    `reason` is the name of a signal, or a word of whoever has ended it; None while nobody has. The deadline is none:
    what it does to a call is for the call to say. `start` and `until` are moments of time.monotonic().
    """

    def __init__(self, seconds: float = math.inf, parent: Stop | None = None, *, cuts: bool = True) -> None:
        self.timeout = seconds
        self.shortest_attempt_s = seconds * SHORTEST_ATTEMPT_SHARE  # with less time left, no paid attempt starts
        self.start = time.monotonic()
        self.until: float = min(self.start + seconds, parent.until if parent else math.inf)
        self._parent = parent
        self._cuts = cuts  # else the end of the parent ends only waits, not calls that are out
        self._reason: str | None = None
        self._abandoned = False

    def request(self, reason: str) -> None:
        """End it; the first reason stays. Takes no lock: a signal handler may call it."""
        self._reason = self._reason or reason

    @property
    def reason(self) -> str | None:
        return self._reason or (self._parent.reason if self._parent and self._cuts else None)

    @property
    def left_s(self) -> float:
        return self.until - time.monotonic()

    def part(self, seconds: float) -> Stop:
        """A shorter one: never longer than this, and it ends with this."""
        part = Stop(seconds, self)
        part.shortest_attempt_s = self.shortest_attempt_s
        return part

    @property
    def generating(self) -> Stop:
        """The part of a command in which the picture must be made: the rest is kept for the download."""
        return self.part(max(0.0, self.start + self.timeout * GENERATE_SHARE - time.monotonic()))

    def room_for_attempt_after(self, wait: float) -> bool:
        """Whether an attempt that begins after a wait can end in time."""
        return wait + self.shortest_attempt_s <= self.left_s

    def check(self) -> None:
        """Raises Stopped where it has been told to end."""
        if self.reason:
            raise Stopped(self.reason)

    def wait(self, seconds: float) -> None:
        """Wait; less where only waits are to end. Raises Stopped."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._ends_waits:
            time.sleep(min(left, TICK))
        self.check()

    @property
    def _ends_waits(self) -> bool:
        return bool(self._reason) or (self._parent is not None and self._parent._ends_waits)

    @property
    def is_signalled(self) -> bool:
        """Whether a signal has come, whatever this one is held to."""
        return self._parent.is_signalled if self._parent else bool(self._reason)

    def in_thread(self, work: Callable[[], Result], last: float = math.inf, grace: float = 0.0) -> Result:
        """What work returns or raises; at the end of its time it is left to itself, and the process ends without it.

        `last`: the seconds that it has after a signal which would end waits only; `grace`: those beyond its time.

        Raises:
            Late, Stopped.
        """
        results: list[Result] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(work())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # this machine starts no more: better late than lost
            run()
        until = max(self.until + grace, time.monotonic() + 0.001)
        while thread.is_alive() and (left := until - time.monotonic()) > 0:
            if self.reason:
                self.abandon()
            self.check()
            if self.is_signalled:
                until, last = min(until, time.monotonic() + last), math.inf
            thread.join(min(left, TICK))
        if errors:
            raise errors[0]
        if not results:
            self.abandon()
            raise Late
        return results[0]

    def abandon(self) -> None:
        """Work goes on that nobody waits for: the process must end without waiting for its threads."""
        self._abandoned = True
        if self._parent:
            self._parent.abandon()

    @property
    def has_abandoned(self) -> bool:
        return self._abandoned


@contextlib.contextmanager
def needing_threads() -> Iterator[None]:
    """Around the start of threads without which no work should begin.

    Raises:
        Failure: machine_limit, where the machine starts none.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise Failure("machine_limit", f"this machine starts no thread for it: {os_reason(error)}") from None


class Crew:
    """Threads that share work: as many as the machine starts. Where it starts none, whoever hands work on does it."""

    def __init__(self, most: int, name: str) -> None:
        from concurrent.futures import ThreadPoolExecutor  # it loads logging, which one picture does without

        self._pool: ThreadPoolExecutor | None = ThreadPoolExecutor(most, name)
        try:
            self._pool.submit(int).result()
        except RuntimeError:
            self._pool = None

    def do(self, work: Callable[..., object], *values: object) -> None:
        """Have work done, which reports by itself."""
        if self._pool is None:
            work(*values)
            return
        with contextlib.suppress(RuntimeError):  # no further thread starts: it is in line for those that have
            self._pool.submit(work, *values)

    def end(self, *, drop: bool = False) -> None:
        """Wait until all is done; `drop`: but for what nobody has begun."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=drop)


class Watcher:
    """Cuts what blocks, when its stop ends or its time is over: one thread for all, started with the first."""

    def __init__(self) -> None:
        self._watched: dict[object, tuple[Stop, Callable[[], None]]] = {}
        self._lock = threading.Lock()
        self._ears: tuple[socket.socket, socket.socket] | None = None
        self._heard: Stop | None = None  # what signals end
        self._next = math.inf  # when the thread looks again

    def listen(self, stop: Stop, again: Callable[[int], None] | None = None) -> None:
        """Have SIGINT and SIGTERM end a stop, from the main thread; `again` is called at further ones.

        Raises:
            Failure: as `needing_threads`.
        """

        count = 0

        def note(number: int, _frame: object) -> None:
            nonlocal count
            count += 1
            stop.request(signal.Signals(number).name)
            if again is not None and count > 1:
                again(number)

        self._heard = stop
        for number in SIGNALS:
            signal.signal(number, note)
        # The handler waits for the main thread, which may block: the thread hears of the signal at once.
        signal.set_wakeup_fd(self._start(), warn_on_full_buffer=False)

    @contextlib.contextmanager
    def cutting(self, stop: Stop, cut: Callable[[], None]) -> Iterator[None]:
        """Have `cut` called, once, when a stop ends or its time is over."""
        mark = object()
        with self._lock:
            self._watched[mark] = (stop, cut)
            ear = self._start()
            is_first = stop.until < self._next
        if is_first:
            self._wake(ear)
        try:
            yield
        finally:
            with self._lock:
                self._watched.pop(mark, None)

    def _start(self) -> int:
        """The descriptor that the thread listens to."""
        if self._ears is None:
            with needing_threads():
                ears = socket.socketpair()
                for ear in ears:
                    ear.setblocking(False)
                threading.Thread(target=self._watch, args=(ears[0],), name="watcher", daemon=True).start()
            self._ears = ears
        return self._ears[1].fileno()

    def _wake(self, _ear: int) -> None:
        assert self._ears is not None
        with contextlib.suppress(OSError):
            self._ears[1].send(b"\0")

    def _watch(self, ear: socket.socket) -> None:
        while True:
            with self._lock:
                now = time.monotonic()
                over = [mark for mark, (stop, _) in self._watched.items() if stop.reason or stop.until <= now]
                cuts = [self._watched.pop(mark)[1] for mark in over]
                self._next = min((stop.until for stop, _ in self._watched.values()), default=math.inf)
                wait = None if self._next == math.inf else max(0.0, self._next - now)
            for cut in cuts:
                cut()
            if cuts:
                continue
            select.select([ear], [], [], wait)
            with contextlib.suppress(OSError):
                for number in ear.recv(64):
                    if number in SIGNALS and self._heard is not None:
                        self._heard.request(signal.Signals(number).name)


WATCHER = Watcher()


def backoff(attempt: int) -> float:
    """Seconds to wait after the given attempt (from 0): exponential, with jitter, capped."""
    return min(BACKOFF_CAP, BACKOFF_BASE * 2.0 ** min(attempt, 16)) * random.uniform(0.75, 1.0)


def wait_before(attempt: int, said: float | None) -> float:
    """Seconds to wait after an attempt (from 0): what the service asks for, but never less than the first step."""
    return backoff(attempt) if said is None else max(said, BACKOFF_BASE)


def in_time(work: Callable[[float], Result], stop: Stop) -> Result:
    """Do work that cannot be broken off in a thread of its own, so that a deadline and a signal hold all the same.

    `work` gets the moment to end by.

    Raises:
        Failure: too_slow, and what the work raises. Stopped.
    """
    try:
        return stop.in_thread(lambda: work(stop.until))
    except Late:
        raise Failure("too_slow", "the picture was not made in time on this machine") from None
