"""The gallery: a page for people that needs no network, and its thumbnails."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage.batch.contract import GALLERY
from zimage.batch.names import Names, evidence_name, path_in, thumb_name
from zimage.batch.results import counts, known_cost, listed_pictures, replace_file, totals
from zimage.contract import MAX_SAVED_BYTES, SCRIPTS, VERSION
from zimage.errors import Failure, os_reason
from zimage.evidence import timestamp, utc_now
from zimage.files import aside, read_file
from zimage.picture import Picture, flattened, in_its_time, verified
from zimage.settle import own_command
from zimage.waiting import Crew, Stop, Stopped

if TYPE_CHECKING:
    import PIL.Image

THUMB_SIDE = 384  # pixels
PENDING_SHOWN = 1000  # pictures still to come that the gallery lists; the results list all of them

TEMPLATE = SCRIPTS.parent / "assets" / "gallery.html"
SHOWN_FIELDS = (
    "number",
    "id",
    "variant",
    "state",
    "prompt",
    "rewritten_prompt",
    "size",
    "width",
    "height",
    "bytes",
    "seed",
    "finished_at",
    "warnings",
    "in_input",
)


def write_gallery(database: sqlite3.Connection, folder: Path, stop: Stop) -> Path:
    """Write index.html in one step, and thumbnails that are missing while there is time; returns its path.

    Raises:
        Failure: disk.
    """
    try:
        page = TEMPLATE.read_text(encoding="utf-8")
    except OSError as error:
        raise Failure("disk", f"the gallery's page {TEMPLATE} cannot be read: {os_reason(error)}") from None
    make_missing_thumbs(database, folder, stop)
    script = page.partition("<script>")[2].partition("</script>")[0]
    page = page.replace("__SCRIPT_HASH__", base64.b64encode(hashlib.sha256(script.encode()).digest()).decode())
    before, after = page.split("__BATCH_DATA__")
    path = folder / GALLERY
    replace_file(path, [before, *gallery_data(database, folder), after])
    return path


def gallery_data(database: sqlite3.Connection, folder: Path) -> Iterator[str]:
    """The page's data as JSON, in parts; safe inside a script element whatever the prompts are."""
    states, spent = totals(database)
    head: dict[str, Any] = {"title": folder.name, "made_at": timestamp(utc_now()), "version": VERSION}
    head |= counts(states) | known_cost(database, spent)
    yield inline_json(head)[:-1] + ',"pictures":['
    separator = ""
    pending = 0
    for entry in listed_pictures(database, folder):
        pending += entry["state"] == "pending"
        if entry["state"] == "pending" and pending > PENDING_SHOWN:
            continue
        shown_entry = {name: entry[name] for name in SHOWN_FIELDS if name in entry}
        shown_entry |= {"cost": entry["estimated_cost"]} if "estimated_cost" in entry else {}
        evidence = evidence_name(entry["number"])
        if entry["state"] == "saved":
            shown_entry |= {"image": entry["output"], "thumb": thumb_name(entry["number"])}
        if "evidence_path" in entry:
            shown_entry["evidence"] = evidence
            shown_entry["replay"] = own_command("--replay", entry["evidence_path"]) or ""
        if "error" in entry:
            error = entry["error"]
            shown_entry["error"] = {name: error[name] for name in ("code", "message", "hint") if name in error}
        yield separator + inline_json(shown_entry)
        separator = ",\n"
    yield "]}"


def inline_json(value: Any) -> str:
    """JSON that no HTML parser can take for markup."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace").decode()
    return re.sub("[<>&\u2028\u2029\x7f-\x9f]", lambda sign: f"\\u{ord(sign[0]):04x}", text)


def make_missing_thumbs(database: sqlite3.Connection, folder: Path, stop: Stop) -> None:
    """Make the thumbnails that a kill or --no-gallery has left out, from the saved files."""
    rows = database.execute("SELECT number, output FROM pictures WHERE state = 'saved'")
    missing = [tuple(row) for row in rows if not os.path.lexists(path_in(folder, thumb_name(row[0])))]

    def make(number: int, output: str) -> None:
        if stop.left_s > 0 and not stop.reason:
            with contextlib.suppress(Failure, OSError, Stopped):
                picture = verified(read_file(folder / output, MAX_SAVED_BYTES, follow=False), stop)
                with contextlib.closing(picture):
                    write_thumb(picture, folder, number, stop)

    crew = Crew(os.cpu_count() or 2, "thumbs")
    for number, output in missing:
        crew.do(make, number, output)
    crew.end()


def write_thumb(picture: Picture, folder: Path, number: int, stop: Stop) -> None:
    """A small JPEG of a picture.

    The gallery does without one that cannot be made in time or written, or only outside the folder.
    """
    target = folder / thumb_name(number)
    with contextlib.suppress(OSError, ValueError, Failure):
        small = in_its_time("made small", lambda: thumb(picture.image), stop)
        if Names(folder).stays_inside(str(target.parent.relative_to(folder))):
            target.parent.mkdir(parents=True, exist_ok=True)
            with aside(target, durable=False) as temporary:
                small.save(temporary, "JPEG", quality=80)


def thumb(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image, at most THUMB_SIDE pixels wide and high. Averaging whole blocks costs a quarter of resampling."""
    plain = image if image.mode == "RGB" else flattened(image)
    return plain.reduce(max(1, math.ceil(max(plain.size) / THUMB_SIDE)))
