"""Calls: what a provider has sent, and what came of it."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from zimage.contract import MAX_LINK_LENGTH, MAX_OTHER_LINKS, MAX_USAGE_BYTES
from zimage.errors import Failure


class HttpCall(NamedTuple):
    """One HTTP request, ready to be sent; `body` is JSON."""

    method: str
    url: str
    headers: dict[str, str]
    body: bytes | None = None

    def __repr__(self) -> str:  # without the headers: they hold the key
        return f"HttpCall({self.method} {self.url})"


class HttpAnswer(NamedTuple):
    """One HTTP answer; header names are lower case. `whole` is false where the body was cut off."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    whole: bool = True


class LocalCall(NamedTuple):
    """Work in this process, in place of an HTTP request; `work` gets the moment of time.monotonic() to end by."""

    work: Callable[[float], Any]


class Generated(NamedTuple):
    """A picture that was made, and billed: its link or its bytes, and what the service said of it."""

    image_url: str = ""
    content: bytes = b""  # where the provider hands the picture over
    expires_at: dt.datetime | None = None  # of the link
    request_id: str = ""
    rewritten_prompt: str = ""
    reasoning: str = ""
    usage: Mapping[str, Any] = {}
    other_urls: tuple[str, ...] = ()  # of further pictures in the same answer
    quota: Mapping[str, int] = {}  # `Quota.told`
    warnings: tuple[str, ...] = ()
    http_status: int | None = None  # of the answer to the paid call; None where it came by no answer of its own
    seed: int | None = None  # that the service says it was drawn from
    unused: tuple[str, ...] = ()  # what of seed, steps and guidance it was not, or not surely, made with

    def bounded(self) -> Generated:
        """The same with no more than an evidence file takes, so that what is written can be read again.

        Raises:
            Failure: answer_unusable.
        """
        if len(self.image_url) > MAX_LINK_LENGTH:
            reason = (
                f"the link to the picture has {len(self.image_url)} characters; at most {MAX_LINK_LENGTH} are taken"
            )
            raise Failure("answer_unusable", reason, request_id=self.request_id or None)
        others = [link for link in self.other_urls if len(link) <= MAX_LINK_LENGTH][:MAX_OTHER_LINKS]
        usage = self.usage if len(json.dumps(self.usage)) <= MAX_USAGE_BYTES else {}
        return self._replace(other_urls=tuple(others), usage=usage)


class Submitted(NamedTuple):
    """A task that the service works on; it is billed once it succeeds."""

    task_id: str  # empty: the one that it was given by `named`
    request_id: str = ""
    http_status: int | None = None
    is_sure: bool = True  # else its call was lost, and whether it has come is found out by asking after it


class Working(NamedTuple):
    """A task that is worked on, and how far it is, in words of ours."""

    told: str
