"""Memory: one budget for everything that holds pixels, so that many pictures at once need no more than a few."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from zimage.contract import DECODER_BYTES
from zimage.waiting import TICK, Late

if TYPE_CHECKING:
    from zimage.waiting import Stop


class Memory:
    """A number of bytes that is shared out. Whoever waits is served before those who ask later."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = total
        self._changed = threading.Condition()
        self._turn = threading.Lock()  # of the one who is served next: small shares must not starve a large one

    def take(self, size: int, stop: Stop) -> Share:
        """A share of at most `total` bytes, once there is room for it.

        Raises:
            Late, Stopped.
        """
        while not self._turn.acquire(timeout=TICK):
            _check(stop)
        try:
            with self._changed:
                while self._free < size:
                    _check(stop)
                    self._changed.wait(TICK)
                self._free -= size
        finally:
            self._turn.release()
        return Share(self, size)

    def give_back(self, size: int) -> None:
        with self._changed:
            self._free += size
            self._changed.notify_all()


class Share:
    """A part of a memory, until it is closed, or until nobody holds it any more."""

    def __init__(self, memory: Memory, size: int) -> None:
        self._memory = memory
        self._size = size

    def close(self) -> None:
        size, self._size = self._size, 0
        self._memory.give_back(size)

    __del__ = close


def _check(stop: Stop) -> None:
    stop.check()
    if stop.until <= time.monotonic():
        raise Late


MEMORY = Memory(DECODER_BYTES)
