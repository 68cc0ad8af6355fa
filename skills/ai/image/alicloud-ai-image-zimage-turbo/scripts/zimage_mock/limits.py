"""What is limited: how many calls a service takes, and how much is remembered."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import TypeVar


class RateLimit:
    """The vendor's limit: so many a minute, and of these no more than a sixtieth (at least one) a second."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._clock = per_minute, clock
        self._per_second = max(1.0, per_minute / 60)
        # A bucket that refills steadily: calls evenly paced at the limit pass in spite of jitter, bursts do not.
        self._bucket, self._filled_at = self._per_second, clock()
        self._admitted: deque[float] = deque()
        self._lock = threading.Lock()

    def admit(self) -> int:
        """0 lets the call through; else the whole seconds to wait. No limit at all where per_minute is 0."""
        if not self._limit:
            return 0
        with self._lock:
            now = self._clock()
            while self._admitted and self._admitted[0] <= now - 60:
                self._admitted.popleft()
            refill = (now - self._filled_at) * self._per_second
            self._bucket, self._filled_at = min(self._per_second, self._bucket + refill), now
            wait = (1 - self._bucket) / self._per_second
            if len(self._admitted) >= self._limit:
                wait = max(wait, self._admitted[0] + 60 - now)
            if wait > 0:
                return math.ceil(wait)
            self._bucket -= 1
            self._admitted.append(now)
            return 0


Value = TypeVar("Value")


class Recent(OrderedDict[str, Value]):
    """A dictionary that forgets its oldest entry when it gets a further one beyond its limit."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit

    def __setitem__(self, key: str, value: Value) -> None:
        super().__setitem__(key, value)
        if len(self) > self._limit:
            self.popitem(last=False)
