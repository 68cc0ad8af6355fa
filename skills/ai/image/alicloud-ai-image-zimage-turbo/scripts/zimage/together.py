"""Together: pictures that many threads ask for, drawn in this process one after the other, or a few at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Generic, TypeVar

from zimage.errors import Failure

GATHERING = 0.25  # seconds to wait for pictures to draw at once: much less than one takes
FORM = ("width", "height", "num_inference_steps", "guidance_scale")  # what they must have in common

Payload = Mapping[str, Any]
Picture = TypeVar("Picture")


class _Ticket(Generic[Picture]):
    """A picture that a thread waits for."""

    def __init__(self, payload: Payload, until: float) -> None:
        self.payload, self.until = payload, until
        self.form = tuple(payload[name] for name in FORM)
        self.picture: Picture | None = None
        self.failure: Failure | None = None

    @property
    def is_done(self) -> bool:
        return self.picture is not None or self.failure is not None


class Together(Generic[Picture]):
    """Draws with one model. Whoever has the model draws with its own picture those of its form that wait.

    `draw` makes pictures of one form, by the moment of time.monotonic() that it gets. `most`: how many at once; fewer
    from when memory has not done for so many. `model`: held while one draws.
    """

    def __init__(self, draw: Callable[[Sequence[Payload], float], Sequence[Picture]], model: threading.RLock) -> None:
        self.most = 1
        self._draw = draw
        self._model = model
        self._arrived = threading.Condition()
        self._waiting: list[_Ticket[Picture]] = []

    def picture(self, payload: Payload, until: float) -> Picture:
        """One picture, once those before it are made.

        Raises:
            Failure: too_slow, and what `draw` raises.
        """
        ticket: _Ticket[Picture] = _Ticket(payload, until)
        with self._arrived:
            self._waiting.append(ticket)
            self._arrived.notify_all()
        try:
            if not self._model.acquire(timeout=max(0.0, until - time.monotonic())):
                raise Failure("too_slow", "another picture was being made all the time")
            try:
                if not ticket.is_done:  # else it was drawn with another
                    self._draw_with(ticket)
            finally:
                self._model.release()
        finally:
            self._leave([ticket])
        if ticket.failure is not None:
            raise ticket.failure
        assert ticket.picture is not None
        return ticket.picture

    def _draw_with(self, ticket: _Ticket[Picture]) -> None:
        tickets = self._gather(ticket)
        while tickets:
            some = tickets[: self.most]
            try:
                made = self._draw([one.payload for one in some], max(one.until for one in some))
                for one, picture in zip(some, made, strict=True):
                    one.picture = picture
            except Failure as failure:
                if failure.code == "too_little_memory" and len(some) > 1:
                    self.most = len(some) // 2
                    continue
                for one in some:
                    one.failure = failure.but()
            tickets = tickets[len(some) :]

    def _gather(self, ticket: _Ticket[Picture]) -> list[_Ticket[Picture]]:
        """The picture, and those like it that wait, or come in a moment."""

        def alike() -> list[_Ticket[Picture]]:
            return [ticket, *(one for one in self._waiting if one is not ticket and one.form == ticket.form)]

        with self._arrived:
            self._arrived.wait_for(lambda: len(alike()) >= self.most, GATHERING)
            some = alike()[: self.most]
        self._leave(some)
        return some

    def _leave(self, tickets: Collection[_Ticket[Picture]]) -> None:
        with self._arrived:
            self._waiting = [one for one in self._waiting if one not in tickets]
