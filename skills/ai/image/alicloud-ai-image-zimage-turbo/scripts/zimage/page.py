"""Page: what an answer that is not the service's own says: a redirect, a page of a gateway, a stream of events."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from zimage.outside import outside_text

if TYPE_CHECKING:
    from zimage.calls import HttpAnswer

READ_BYTES = 8192  # of a page: its first words are enough
FIRST_WORDS = 200  # characters
_UNSEEN = re.compile(r"<(script|style|svg)\b[^<>]*>[^<]*(?:</\1\s*>)?|<[^<>]*>?", re.IGNORECASE)
_ENTITY = re.compile(r"&(nbsp|amp|lt|gt|quot|#\d{1,6});")
# How servers answer http on their port for https: nginx, Go's, Apache.
_TLS_WANTED = re.compile(
    rb"plain http request was sent to https|http request to an https|speaking plain http to an ssl", re.IGNORECASE
)


def redirect_words(answer: HttpAnswer) -> str:
    """Where a redirect leads."""
    target = outside_text(answer.headers.get("location"), 300)
    return f"a redirect{' to ' * bool(target)}{target}, which is not followed with the key"


def media_type(answer: HttpAnswer) -> str:
    """What an answer says that its body is."""
    return outside_text(answer.headers.get("content-type", "").partition(";")[0].strip(), 60) or "no type"


def first_words(body: bytes) -> str:
    """What a reader would see first of a page or text."""
    text = body[:READ_BYTES].decode("utf-8", "replace")
    if text.lstrip().startswith("<"):
        text = _ENTITY.sub(" ", _UNSEEN.sub(" ", text))
    return outside_text(" ".join(text.split()), FIRST_WORDS)


def base_url_advice(answer: HttpAnswer, root: str) -> str:
    """What to try with a base URL that is answered by what is no API's; empty where the answer does not say."""
    body, target = answer.body[:READ_BYTES], answer.headers.get("location", "")
    over_tls = f"https{root.removeprefix('http')}"
    if root.startswith("http:") and (
        (answer.status == 400 and _TLS_WANTED.search(body)) or target.startswith("https:")
    ):
        return f"this server wants https: give the base URL {over_tls}"
    if 300 <= answer.status < 400:
        return f"{root} has moved, or a login stands before it: check the base URL"
    if answer.status in (200, 404, 405) and body.lstrip().startswith(b"<"):
        return f"a web page is there and no API: check the base URL {root}"
    return ""
