"""The faults that can be asked for, as one table, and the order in which they come.

Here those that every service can suffer. What befalls one protocol alone stands in its file.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import replace
from itertools import chain, repeat
from typing import Literal, NamedTuple

from zimage_mock.drawing import Picture, draw_file
from zimage_mock.errors import ERRORS
from zimage_mock.exchange import Reply, html_page, xml_error


class Course(NamedTuple):
    """How a task goes on, as the status queries tell it."""

    end: Literal["SUCCESS", "FAILED", "IN_PROGRESS"] = "SUCCESS"
    error_message: str | None = None
    pictures: int = 1
    early: str | Reply = "IN_PROGRESS"  # a status, or an error, that the first queries are told, however it stands
    early_queries: float = 0

    @property
    def billed(self) -> bool:
        """Whether the task will be paid for: only a picture is."""
        return self.end == "SUCCESS" and self.pictures > 0


class Fault(NamedTuple):
    """One way to fail on purpose. Where nothing but `help` is set, the service itself knows the name."""

    help: str
    instead: Reply | None = None  # answered at once, nothing is made or billed
    answer: Callable[[Reply], Reply] | None = None  # the picture is made and billed, the answer suffers
    image: Callable[[Picture, str], Reply] | None = None  # the answer is good, its link (the second argument) is not
    once: bool = False  # of an image fault: the first download only
    task: Course = Course()


def _billed(page: Reply) -> Callable[[Reply], Reply]:
    return lambda good: replace(page, billed=True)


def _hangup(good: Reply) -> Reply:
    return replace(good, status=0, delivery="hangup")


def _damaged(picture: Picture, link: str) -> Reply:
    good = drawn(picture)
    # The decoders forgive much: to JPEG, zeros would be pixels, and this is a table that cannot be; WebP minds only
    # its header.
    start = 20 if picture.kind == "webp" else len(good.body) // 2
    return replace(good, body=good.body[:start] + b"\xff\xc4\x00\x03" * 16 + good.body[start + 64 :])


def _bomb() -> bytes:
    """A valid PNG of some 90 bytes whose header claims 50000 * 50000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(999))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def drawn(picture: Picture) -> Reply:
    """The picture as it should be."""
    return Reply(200, draw_file(picture), f"image/{picture.kind}")


def _bigger(picture: Picture, link: str) -> Reply:
    return drawn(replace(picture, width=picture.width + 64, height=picture.height + 64))


def _halved(picture: Picture, link: str) -> Reply:
    return replace(drawn(picture), delivery="half")


def _to_itself(picture: Picture, link: str) -> Reply:
    return Reply(302, headers={"Location": link})


NO_RIGHT = xml_error(403, "AccessDenied", "You have no right to access this object because of bucket acl.")
EXPIRED = xml_error(403, "AccessDenied", "Request has expired.")
NO_FILE = xml_error(404, "NoSuchKey", "The specified key does not exist.")
STORE_DOWN = xml_error(500, "InternalError", "We encountered an internal error. Please try again.")
ELSEWHERE = Reply(307, headers={"Location": "/mock/elsewhere"})

OK = Fault("normal service")
COMMON_FAULTS: Mapping[str, Fault] = {
    "ok": OK,
    **{name: Fault(row.help) for name, row in ERRORS.items()},
    "hangup-before": Fault("connection closed without an answer, nothing made", Reply(0, delivery="hangup")),
    "redirect": Fault("307 to another path, nothing made", ELSEWHERE),
    "no-image": Fault("200 (or SUCCESS) without an image, not billed", task=Course(pictures=0)),
    "hangup-after": Fault("picture made and billed, connection closed", answer=_hangup),
    "cut-answer": Fault("picture made and billed, half the JSON", answer=lambda r: replace(r, delivery="half")),
    "slow": Fault("picture made and billed, answer byte by byte", answer=lambda r: replace(r, delivery="dribble")),
    "not-json": Fault("200 that is not JSON, billed", answer=_billed(Reply(200, b"OK, done."))),
    "500-html": Fault("500 HTML of a gateway, billed", answer=_billed(html_page(500, "Internal Server Error"))),
    "502": Fault("502 HTML of a gateway, billed", answer=_billed(html_page(502, "Bad Gateway"))),
    "504": Fault("504 HTML of a gateway, billed", answer=_billed(html_page(504, "Gateway Time-out"))),
    "image-403": Fault("link: 403 AccessDenied", image=lambda p, link: NO_RIGHT),
    "image-expired": Fault("link: 403 Request has expired", image=lambda p, link: EXPIRED),
    "image-404": Fault("link: 404 NoSuchKey", image=lambda p, link: NO_FILE),
    "image-500": Fault("link: 500, first download only", image=lambda p, link: STORE_DOWN, once=True),
    "image-cut": Fault("link: half, first download only", image=_halved, once=True),
    "image-corrupt": Fault("link: whole length, damaged bytes", image=_damaged),
    "image-html": Fault("link: 200 with an HTML page", image=lambda p, link: html_page(200, "Please sign in")),
    "image-bomb": Fault(
        "link: a tiny PNG that claims 50000*50000", image=lambda p, link: Reply(200, _bomb(), "image/png")
    ),
    "image-big-size": Fault("link: a picture of another size than asked", image=_bigger),
    "image-redirect": Fault("link: 302 to itself, first download only", image=_to_itself, once=True),
    "image-redirect-loop": Fault("link: 302 to itself", image=_to_itself),
    "image-jpeg": Fault("link: a JPEG", image=lambda p, link: drawn(replace(p, kind="jpeg"))),
}


def fault_plan(spec: str, known: Container[str]) -> Iterator[str]:
    """The faults of SPEC in order, then "ok" for ever.

    SPEC is "NAME[*COUNT],...", COUNT a number or "inf". Raises ValueError.
    """
    plan: list[Iterator[str]] = []
    for entry in filter(None, (part.strip() for part in spec.split(","))):
        name, star, count = entry.partition("*")
        if name not in known:
            raise ValueError(f"unknown fault {name!r}: --fault list names them all")
        if star and not re.fullmatch(r"inf|[1-9][0-9]{0,5}", count):
            raise ValueError(f"fault {entry!r}: after * comes a number from 1 to 999999, or inf")
        plan.append(repeat(name) if count == "inf" else repeat(name, int(count or 1)))
    return chain(*plan, repeat("ok"))
