"""Task: what a service works on, asked after until it is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zimage.calls import Working
from zimage.contract import (
    EXIT_KEY,
    LAST_POLL,
    LOST_AFTER,
    MAX_TASK_ID,
    POLL_SHARE,
    POLL_TIMEOUT,
)
from zimage.errors import GO_ON_FREE, Failure
from zimage.evidence import utc_now
from zimage.outside import mask, outside_text, without_surrogates
from zimage.settle import TASK_IS_DONE
from zimage.transport import ask_all

if TYPE_CHECKING:
    from collections.abc import Callable

    from zimage.calls import Generated
    from zimage.endpoint import Endpoint
    from zimage.keys import Key
    from zimage.provider import Provider
    from zimage.request import ImageRequest
    from zimage.waiting import Stop


class Task:
    """A submitted task, asked after at growing intervals. `pause_s` is the time to the next question, in seconds.

    `is_sure`: as of `Submitted`. `told` is how far it is, in words, as far as the service says; `tell` is given what is
    new of that while it is waited for.
    """

    def __init__(
        self,
        provider: Provider,
        endpoint: Endpoint,
        key: Key,
        request: ImageRequest,
        task_id: str,
        *,
        is_sure: bool = True,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.id = task_id
        self.pause_s = provider.poll_pause(0)
        self.told = ""
        self._is_sure = is_sure
        self._tell = tell
        self._provider = provider
        self._endpoint = endpoint
        self._key = key
        self._request = request
        self._asked = 0  # times
        self._strange_in_a_row = 0
        self._trouble = ""
        self._retry_after_s: float | None = None
        self.unanswered: Failure | None = None  # where the last question did not even reach the server

    def ask(self, stop: Stop) -> Generated | None:
        """One free question, answered in time; None where the task is still worked on, as far as is known.

        Raises:
            Failure: one of TASK_ENDS, or that the key is not good any more.
        """
        provider = self._provider
        self._asked += 1
        pause_s = self.pause_s = provider.poll_pause(self._asked)
        questions = provider.look_up(self.id, self._endpoint, self._key.value, self._request, utc_now())
        try:
            found = ask_all(
                questions,
                stop.part(min(POLL_TIMEOUT, max(LAST_POLL, POLL_SHARE * stop.left_s))),
                self._endpoint,
                provider.max_answer_bytes,
            )
        except Failure as failure:
            if failure.code in TASK_IS_DONE:
                raise
            if failure.fault.exit_code == EXIT_KEY:
                raise failure.but(billed="unknown", hint=f"{failure.fault.hint}; then run next_command, free") from None
            self._strange_in_a_row = self._strange_in_a_row + 1 if failure.code in TASK_IS_STRANGE else 0
            if self._strange_in_a_row >= LOST_AFTER:
                message = f"the service does not know task {outside_text(self.id, 100)} any more: {failure.message}"
                raise Failure("outcome_unknown", message, http_status=failure.fault.http_status) from None
            self._retry_after_s = failure.fault.retry_after_s
            self.pause_s = max(pause_s, self._retry_after_s or 0.0)
            self._trouble = f"; the last question failed: {failure.message}"
            self.unanswered = failure if failure.code == "unreachable" else None
            return None
        self._strange_in_a_row, self._trouble, self._retry_after_s, self.unanswered = 0, "", None, None
        self._is_sure = True
        if isinstance(found, Working):
            self.told = found.told
            return None
        return found and found.bounded()

    @property
    def is_held(self) -> bool:
        """Whether the service has asked not to be asked so soon."""
        return self._retry_after_s is not None

    @property
    def is_strange(self) -> bool:
        """Whether the service did not know the task when it was asked last."""
        return self._strange_in_a_row > 0

    def wait_for(self, stop: Stop) -> Generated:
        """The picture, once the task has succeeded.

        Raises:
            Failure: as `ask`; paid_not_downloaded where it is not at its end in time. Stopped.
        """
        told = ""
        while (left := stop.left_s) > self.pause_s or (left > LAST_POLL and not self._trouble):
            stop.wait(min(self.pause_s, left - LAST_POLL / 2))
            found = self.ask(stop)
            if found is not None:
                return found
            if self._tell and self.told != told:
                told = self.told
                self._tell(f"task {outside_text(self.id, 100)}: {told}")
        raise self.unfinished()

    def unfinished(self) -> Failure:
        how = "the service still works on" if self._is_sure else "whether the service has got it is not known yet:"
        far = f" ({self.told})" if self.told else ""
        what = f"{how} task {outside_text(self.id, 100)}{far}{self._trouble}"
        return Failure(
            "paid_not_downloaded", what, billed="unknown", hint=GO_ON_FREE, retry_after_s=self._retry_after_s
        )


def is_task_id(text: str) -> bool:
    """Whether a name that a service gave to its task can be kept and sent back; a key in it must not be kept."""
    return 0 < len(text) <= MAX_TASK_ID and text == without_surrogates(text) == mask(text)


TASK_IS_STRANGE = ("not_found", "rejected_by_service", "refused_by_service")
