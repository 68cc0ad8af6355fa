"""The cells of the torture: each way to a picture, at each of its stages, broken at each place in each manner.

What a cell must come to is said here from the outside, by what a client can know: a request that surely did not leave
is sent again; one that left and was not answered is unknown; a free question or download is repeated while there is
time. Where a picture costs nothing, a lost answer is simply asked for again, and the service may make two; where its
task was named before it left, it is looked up, and made once. What a server says of itself is not needed: that it is
broken changes nothing. A cell accepts one exit code.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torture.proxy import (
    BODY_PLACES,
    CHUNK_PLACES,
    GARBLES,
    HEAD_PLACES,
    REQUEST_PLACES,
    STILL_GOOD,
    TLS_PLACES,
    Break,
    Stage,
)

Certificate: TypeAlias = Literal["", "good", "foreign", "expired"]
ONCE, ALWAYS = 1, 1_000_000
NO_SIGNAL = 0
KILLED = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
ENDINGS = ("close", "reset", "half", "stall")


@dataclass(frozen=True)
class Way:
    """How a picture comes: the provider, what it is asked, and the stages until the picture is here."""

    id: str
    provider: str
    stages: tuple[Stage, ...]
    worth: Literal["picture", "link", "task"]  # what the answer to the paid call holds
    lost: Literal["unknown", "again", "found"] = "unknown"  # what is done about an answer to it that is lost
    begins_with_worth: bool = False  # the first half of that answer is all that counts
    asks_for_key: bool = False  # for a link to itself
    questions: int = 0  # by which a server of this kind is known
    pause: float = 1.0  # seconds before a question after a task
    settings: tuple[str, ...] = ()  # of the provider
    suffix: str = "png"
    faults: str = ""  # of the mock
    options: tuple[str, ...] = ("--seed", "7", "--size", "512x512")


AT_A_PRICE = ("--price", "0.01")
WAYS = (
    Way("dashscope", "dashscope", ("paid", "download"), "link"),
    Way("zimageturbo", "zimageturbo", ("paid", "poll", "download"), "task", suffix="jpg", options=()),
    Way("modelscope", "modelscope", ("paid", "poll", "download"), "task", begins_with_worth=True, pause=5.0),
    Way("openai", "openai", ("ask", "paid"), "picture", questions=1, settings=AT_A_PRICE),
    Way(
        "openai-link",
        "openai",
        ("paid", "download"),
        "link",
        asks_for_key=True,
        questions=1,
        settings=AT_A_PRICE,
        faults="url*inf",
    ),
    Way("openai-free", "openai", ("paid",), "picture", "again", questions=1),
    Way("sdapi", "sdapi", ("ask", "paid"), "picture", questions=2, settings=AT_A_PRICE),
    Way("comfyui", "comfyui", ("ask", "paid", "poll", "download"), "task", "found", questions=4),
)


@dataclass(frozen=True)
class Cell:
    """One command and its break. `tls`: the certificate of the server; `signum`: what hits the program there."""

    way: Way
    fault: Break
    tls: Certificate = ""
    signum: int = NO_SIGNAL

    def __str__(self) -> str:
        fault = self.fault
        manner = signal.Signals(self.signum).name if self.signum else fault.act
        words = [self.way.id, fault.stage, fault.place, manner, fault.framing if fault.framing != "length" else ""]
        words += ["once" if fault.times == ONCE else "", f"tls-{self.tls}" if self.tls else ""]
        return "/".join(filter(None, words))

    @property
    def is_before_the_request(self) -> bool:
        """Whether the program can know that its request has not left."""
        return self.fault.place in ("refuse", *TLS_PLACES) or bool(self.tls and self.fault.place == "connect")

    @property
    def has_left(self) -> bool:
        """Whether the service has got the whole request."""
        return self.fault.place not in ("refuse", "connect", *TLS_PLACES, *REQUEST_PLACES[:-1])

    @property
    def stalls(self) -> bool:
        return self.fault.act == "stall" or self.fault.place == "dribble"

    @property
    def is_whole(self) -> bool:
        """Whether what makes up the answer arrives, whatever befalls the rest."""
        place, stage = self.fault.place, self.fault.stage
        if stage == "paid" and self.way.lost == "found":  # what it would say is known
            return self.has_left
        if place == "body" and stage == "paid" and self.way.begins_with_worth:
            return True
        if place == "short-length":  # of an answer that is hardly longer
            return stage == "paid" and self.way.worth == "task"
        if place == "flip-status":  # a picture that is there was made, whatever stands beside it; a task's name not
            return stage == "poll" or (stage == "paid" and self.way.worth != "task")
        if place in ("link-end", "chunk-link", "body-last"):  # what it is worth has come; a question is asked again
            return stage == "paid"
        if place in ("last-chunk", "trailer"):  # how a JPEG ends, nobody looks at
            return self.fault.act == "close" or stage != "download" or self.way.suffix == "png"
        return place in ("end", *STILL_GOOD)

    @property
    def exit_code(self) -> int:
        """The one that is right, of the command that meets the break."""
        if self.signum:
            return KILLED[signal.Signals(self.signum)]
        if self.is_whole:
            # The time in which the task could be asked after went by with its answer.
            is_late = self.stalls and self.fault.place != "end" and self.fault.stage == "paid"
            return 7 if is_late and "poll" in self.way.stages else 0
        stages = {"ask": self._of_introduction, "paid": self._of_paid_call, "poll": self._of_question}
        return (stages | {"download": self._of_download})[self.fault.stage]()

    def _of_introduction(self) -> int:
        # A list of files in which the name of one is another: that one is missing, and nothing is queued.
        is_spoilt = (self.way.id, self.fault.place) == ("comfyui", "flip-body") and self.fault.times != ONCE
        return 2 if is_spoilt else 0

    def _of_paid_call(self) -> int:
        is_over = self.fault.times == ONCE and not self.stalls
        if self.is_before_the_request:
            return 0 if is_over else 6
        if self.fault.place == "flip-body":  # of what it is worth: the picture's bytes, its link, its task's name
            return 7 if self.way.worth == "task" else 8
        return 0 if is_over and self.way.lost != "unknown" else 7

    def _of_question(self) -> int:
        if self.fault.place == "flip-body":  # an entry is found by its key, and nobody looks at the name within it
            return 0 if self.way.lost == "found" else 8
        return 0 if self.fault.times == ONCE else 7

    def _of_download(self) -> int:
        if self.fault.place == "flip-status":
            return 8
        if self.fault.times == ONCE and not self.stalls:
            return 0
        # Without a length, what was cut by an orderly end is whole, and no picture.
        looks_whole = self.fault.framing == "close" and self.fault.act == "close"
        return 8 if self.fault.place in ("flip-body", "short-length") or looks_whole else 7

    @property
    def timeout(self) -> float:
        """Seconds of the command: short where it will use them up."""
        if self.signum:
            return 30
        if self.fault.stage == "ask" or (self.fault.place == "flip-body" and self.fault.stage == "paid"):
            return 20
        if not self.exit_code:
            return 7 + 2 * self.way.pause if self.stalls else 20
        return 7 if "poll" in self.way.stages else 4


def breaks_of(stage: Stage) -> Iterator[Break]:
    """All that can befall a stage, whatever the connection is made of."""
    places = [place for place in REQUEST_PLACES if place != "request-body" or stage == "paid"]
    has_worth = stage in ("paid", "poll")
    body = [place for place in BODY_PLACES if not place.startswith("link") or has_worth]
    for act in ENDINGS:
        yield from (Break(stage, place, act) for place in ("connect", *places, *HEAD_PLACES, *body, "end"))
        if act != "half":  # as close, but for the request that it goes on reading
            chunked = [place for place in CHUNK_PLACES if place != "chunk-link" or has_worth]
            yield from (Break(stage, place, act, "chunked") for place in (*chunked, "end"))
            yield from (Break(stage, place, act, "close") for place in ("body", "body-last"))
    for place in GARBLES:
        yield Break(stage, place, "spoil", "chunked" if place == "flip-size" else "length")


def plain() -> Iterator[Cell]:
    for way in WAYS:
        for stage in way.stages:
            if stage != "ask":
                yield Cell(way, Break(stage, "refuse", "close"))
            for fault in breaks_of(stage):
                yield Cell(way, fault)
                goes_again = stage != "paid" or way.lost != "unknown"
                if goes_again and fault.act in ("close", "spoil"):
                    yield Cell(way, fault._replace(times=ONCE))


def tls() -> Iterator[Cell]:
    for way in WAYS:
        for stage in way.stages:
            for place in ("connect", "hello", "handshake"):
                for act in ("close", "reset", "stall"):
                    yield Cell(way, Break(stage, place, act), "good")
                yield Cell(way, Break(stage, place, "reset", times=ONCE), "good")
            for place in ("request-headers", "made", "headers", "body", "body-last", "end"):
                for act in ("close", "notify"):
                    yield Cell(way, Break(stage, place, act), "good")
            for place in ("chunk", "trailer"):
                yield Cell(way, Break(stage, place, "close", "chunked"), "good")
            yield Cell(way, Break(stage, "body", "close", "close"), "good")
            yield Cell(way, Break(stage, "record", "close"), "good")
            yield Cell(way, Break(stage, "record", "flip-body"), "good")
            if stage == "download":
                yield Cell(way, Break(stage, "record", "flip-body", times=ONCE), "good")
        certificates: tuple[Certificate, ...] = ("foreign", "expired")
        for certificate in certificates:
            yield Cell(way, Break("paid", "handshake", "none"), certificate)


def killed() -> Iterator[Cell]:
    """The program is hit where the stream stands still."""
    for way in WAYS:
        for stage in way.stages:
            for place in ("connect", "request-line", "request", "made", "headers", "headers-end", "body", "end"):
                for signum in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
                    if place != "end" or signum == signal.SIGKILL:
                        yield Cell(way, Break(stage, place, "stall"), signum=signum)
            yield Cell(way, Break(stage, "chunk", "stall", "chunked"), signum=signal.SIGKILL)
            yield Cell(way, Break(stage, "handshake", "stall"), "good", signal.SIGKILL)
            yield Cell(way, Break(stage, "handshake", "stall"), "good", signal.SIGTERM)
            yield Cell(way, Break(stage, "body", "stall"), "good", signal.SIGKILL)


CELLS = [*plain(), *tls(), *killed()]
SLICE = (
    "modelscope/paid/link-end/close",
    "modelscope/paid/body/SIGTERM",
    "sdapi/ask/made/stall",
    "sdapi/paid/garbage/spoil",
    "comfyui/paid/made/close/once",
    "comfyui/paid/flip-body/spoil",
    "openai-free/paid/body/reset",
    "dashscope/paid/made/close",
    "dashscope/paid/link-end/close",
    "dashscope/paid/hints/spoil",
    "dashscope/paid/chunk-link/reset/chunked",
    "dashscope/paid/headers/SIGKILL",
    "dashscope/download/chunk/close/chunked/once",
    "dashscope/download/body/close/once",
    "dashscope/download/body/SIGTERM",
    "dashscope/download/flip-body/spoil/once",
    "dashscope/paid/hello/reset/once/tls-good",
    "dashscope/paid/handshake/none/tls-expired",
    "dashscope/paid/body/close/tls-good",
    "zimageturbo/paid/link-end/reset",
    "zimageturbo/poll/made/SIGKILL",
    "zimageturbo/download/made/SIGKILL",
    "openai/paid/body/SIGKILL",
    "openai/paid/body-last/close",
    "openai/paid/flip-body/spoil",
    "openai-link/paid/refuse/close",
    "openai-link/paid/made/SIGINT",
    "openai-link/paid/end/reset",
)
