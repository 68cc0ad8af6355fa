"""Traces: what an answer holds of a picture in no place that was agreed on: links, bytes, names of tasks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from zimage.outside import mask_known, without_surrogates

# Names of fields, folded. Under the first a picture is handed over as a link, under the second as base64.
PICTURE_FIELDS = frozenset(
    [
        *("url", "image", "images", "imageurl", "imageurls", "img", "imgurl", "resulturl", "resultimage", "outputurl"),
        *("outputimage", "outputimages", "outputimageurl"),
    ]
)
BASE64_FIELDS = ("b64json", "imagebase64", "base64", "b64")
SPOKEN_FIELDS = ("text", "content")  # in which a model may name links
TASK_FIELDS = ("taskid", "jobid", "promptid")
CONTAINERS = ("output", "outputs", "result", "results", "data", "response", "choices", "message", "content", "events")
APART = frozenset(("error", "errors", "detail", "details", "request", "input", "parameters", "usage"))
A_LINK = re.compile(r"https?://[^\s\"'<>\\]+")
OF_A_PICTURE = re.compile(r"\.(?:png|jpe?g|webp)\b", re.IGNORECASE)
ENDED_BADLY = ("FAILED", "FAIL", "CANCELED", "CANCELLED", "UNKNOWN")
ENDED_WELL = ("SUCCEEDED", "SUCCEED", "SUCCESS")
SHORTEST_PICTURE = 100  # characters of base64
DEEPEST, MOST_NODES = 12, 5000


class Traces(NamedTuple):
    """What was found, each once, in the order of the answer."""

    pictures: tuple[str, ...] = ()  # links under names that pictures have
    contents: tuple[str, ...] = ()  # base64 under such names
    links: tuple[str, ...] = ()  # all links, those of pictures first
    task_ids: tuple[str, ...] = ()
    task_status: str = ""  # in capitals
    counts_picture: bool = False  # the service says that it made one

    @property
    def of_work(self) -> bool:
        """Whether a picture may have been made, whatever else is told: then nothing proves that none was billed."""
        is_open = bool(self.task_ids) and self.task_status not in ENDED_BADLY
        return bool(self.pictures or self.contents or is_open or self.counts_picture)


def traces_in(body: dict[str, Any] | None) -> Traces:
    """What the JSON of an answer holds of a picture."""
    leaves = [(path[-1], path, value) for path, value in _leaves(body) if path]
    texts = [(name, path, v.strip()) for name, path, v in leaves if isinstance(v, str) and APART.isdisjoint(path)]
    links = [(name, path, text) for name, path, text in texts if A_LINK.fullmatch(text)]
    places = PICTURE_FIELDS.union(CONTAINERS)
    pictures = [link for name, path, link in links if name in PICTURE_FIELDS and places.issuperset(path)]
    spoken = [
        found.rstrip(".,;)") for name, _, text in texts if name in SPOKEN_FIELDS for found in A_LINK.findall(text)
    ]
    tasks = [str(v).strip() for name, _, v in leaves if name in TASK_FIELDS and type(v) in (str, int)]
    statuses = [text.upper() for name, _, text in texts if name in ("taskstatus", "status")]
    return Traces(
        pictures=_each_once(pictures),
        contents=tuple(text for name, _, text in texts if name in BASE64_FIELDS and len(text) > SHORTEST_PICTURE),
        links=_each_once([*pictures, *(link for _, _, link in links), *spoken]),
        task_ids=tuple(dict.fromkeys(filter(None, tasks))),
        task_status=statuses[0] if statuses and tasks else "",
        counts_picture=any(name == "imagecount" and type(v) is int and v > 0 for name, _, v in leaves),
    )


def _each_once(links: list[str]) -> tuple[str, ...]:
    """Those that can be kept: a key in one must not be."""
    return tuple(link for link in dict.fromkeys(links) if link == mask_known(without_surrogates(link)))


def _leaves(body: dict[str, Any] | None) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What stands in JSON, with the folded names that lead there; in its order, bounded."""
    open_: list[tuple[tuple[str, ...], Any]] = [((), body)]
    for _ in range(MOST_NODES):
        if not open_:
            return
        path, value = open_.pop()
        if isinstance(value, dict) and len(path) < DEEPEST:
            inner = [((*path, re.sub("[_-]", "", str(name)).lower()), item) for name, item in value.items()]
            open_.extend(reversed(inner[:MOST_NODES]))
        elif isinstance(value, list):
            open_.extend((path, item) for item in reversed(value[:MOST_NODES]))
        else:
            yield path, value
