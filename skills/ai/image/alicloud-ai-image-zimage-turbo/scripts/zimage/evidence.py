"""Evidence: what was asked, what was paid and how to get it again, always on disk before the next step."""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from zimage.contract import EVIDENCE_SCHEMA, MAX_EVIDENCE_BYTES, SKILL
from zimage.errors import Billed, Failure, Fault, Left, os_reason
from zimage.files import OWNER_ONLY, replace_private, to_json, write_gitignore, write_new
from zimage.outside import outside_text
from zimage.paths import user_path
from zimage.request import decode_json_file, read_input
from zimage.settle import STATES, Have
from zimage.waiting import Late

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from zimage.calls import Generated, Submitted
    from zimage.facts import AttemptEnd, Changes, Content, Image, Response, State, Timings, Unread
    from zimage.waiting import Stop


class Folders(NamedTuple):
    """Where results go: below $OUTPUT_DIR, by default `output` in the working folder. Absolute paths.

    `of` raises Failure: usage.
    """

    images: Path
    evidence: Path

    @classmethod
    def of(cls, env: Mapping[str, str]) -> Folders:
        base = Path(os.path.abspath(user_path("OUTPUT_DIR", env.get("OUTPUT_DIR") or "output")))
        return cls(base / "ai-image-zimage-turbo" / "images", base / SKILL / "evidence")


def utc_now() -> dt.datetime:
    return dt.datetime.now(dt.timezone.utc)


def timestamp(moment: dt.datetime) -> str:
    """RFC 3339 in UTC, with milliseconds."""
    return moment.astimezone(dt.timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


EVIDENCE_ID = r"\d{8}T\d{6}Z-[0-9a-f]{8}"  # what `new_evidence_id` makes, as a regular expression
MADE = rf"\.gitignore|{EVIDENCE_ID}\.(?:json|picture)"  # what this tool writes into the folder of evidence files


def new_evidence_id(now: dt.datetime) -> str:
    return f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"


class Evidence:
    """One evidence file. `data` is its content (EVIDENCE_SCHEMA), as types in `facts`.

    All changes are in memory; a `Record` puts them on disk.
    """

    def __init__(self, path: Path, data: Content) -> None:
        self.path = path
        self.data = data
        self.content = b""  # a picture that was handed over and could not be put on disk yet

    @property
    def id(self) -> str:
        return self.path.stem

    @property
    def status(self) -> State:
        return self.data["status"]

    @property
    def task_id(self) -> str:
        """Of the task that the service works on; empty where there is none."""
        return self.data.get("task_id", "")

    @property
    def said(self) -> Response:
        """What the service said of the picture, as far as it has."""
        return self.data.get("response", {})

    @property
    def have(self) -> Have:
        """What is known of the picture: the side of the record in the tables of `settle`."""
        status, attempts = self.status, self.data["attempts"]
        billed: Billed = "no" if status == "failed" or (status == "submitting" and not attempts) else "unknown"
        if attempts and status != "failed":  # a further one follows only on one that was not billed
            billed = attempts[-1].get("billed", "unknown")
        return Have(
            billed="yes" if status in ("generated", "saved") else billed,
            status=status,
            task=bool(self.task_id),
            link=self.said.get("image_url", ""),
            held=self.held.exists(),
            billable=self.data["billable"],
            lead=next(iter(self.data.get("answer", {}).get("links", [])), ""),
            in_quota=self.data["billable"] and self.data["cost"].get("estimate") == 0,
        )

    @property
    def held(self) -> Path:
        """Where bytes that a provider handed over lie until the picture is saved: no link leads to them."""
        return self.path.with_suffix(".picture")

    @classmethod
    def load(cls, option: str, name: str, stop: Stop) -> Evidence:
        """Read and check an evidence file.

        Raises:
            Failure: file_unreadable, invalid_evidence.
        """
        path = Path(os.path.abspath(name))
        content = read_input(option, str(path) if name else "", MAX_EVIDENCE_BYTES, stop)
        try:
            return cls(path, stop.in_thread(lambda: _checked(name, content)))
        except Late:
            raise Failure("file_unreadable", f"{option} {outside_text(name, 200)}: was not read in time") from None

    def update(self, **changes: Unpack[Changes]) -> None:
        """Merge changes; None removes a field."""
        merged = {**self.data, **changes}
        self.data = cast("Content", {name: value for name, value in merged.items() if value is not None})

    def begin_attempt(self, **named: Unpack[Changes]) -> None:
        """`named`: what is new of it, where its task has a name already."""
        self.update(**named)
        self.update(attempts=[*self.data["attempts"], {"at": timestamp(utc_now())}], status="submitting", error=None)

    def end_attempt(self, **facts: Unpack[AttemptEnd]) -> None:
        """Add to the last attempt how it ended."""
        if not self.data["attempts"]:
            return  # a file or folder from elsewhere may tell of none
        *earlier, last = self.data["attempts"]
        known = cast("AttemptEnd", {name: value for name, value in facts.items() if value is not None})
        self.data["attempts"] = [*earlier, {**last, **known}]

    def end_failed_attempt(self, fault: Fault) -> None:
        """Add to the last attempt how it failed."""
        self.end_attempt(
            http_status=fault.http_status, service_code=fault.service_code, billed=fault.billed, outcome=fault.code
        )
        self.update(answer=cast("Unread | None", fault.answer))
        if fault.billed == "no":
            self.never_left()

    def never_left(self) -> None:
        """A name that was given to a task of which nothing will come is of nobody's use."""
        if self.status == "submitting":
            self.data.pop("task_id", None)

    def submitted(self, submitted: Submitted) -> None:
        """The id of a task is known."""
        self.end_attempt(http_status=submitted.http_status, outcome="submitted")
        response: Response | None = {"request_id": submitted.request_id} if submitted.request_id else None
        self.update(status="submitted", task_id=submitted.task_id, response=response)

    def generated(self, generated: Generated, warnings: Sequence[str], generate_ms: float) -> None:
        """A picture is known to be made. Bytes that were handed over go to disk first, else they stay in `content`."""
        self.end_attempt(http_status=generated.http_status, outcome="generated", billed="yes")
        if generated.content:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                replace_private(self.held, generated.content)
            except OSError:  # the picture may yet be saved
                self.content = generated.content
        more = len(generated.other_urls)
        several = (
            [f"the service sent {more + 1} pictures; the first is saved, the evidence has the links"] if more else []
        )
        self.update(
            status="generated",
            generated_at=timestamp(utc_now()),
            response=said_of(generated),
            timings_ms={"generate": generate_ms},
            warnings=[*warnings, *several, *generated.warnings] or None,
            error=None,
        )
        if generated.unused:
            settings = self.data.get("settings", {})
            used = {name: value for name, value in settings.items() if name not in generated.unused}
            unused = [*self.data.get("unused", ()), *generated.unused]
            self.update(settings=used or None, unused=list(dict.fromkeys(unused)))

    @property
    def seed(self) -> int | None:
        """That the picture was drawn from, as far as is known: the service's word goes before ours."""
        asked = None if "seed" in self.data.get("unused", ()) else self.data["request"].get("seed")
        return self.said.get("seed", asked)

    def saved(self, image: Image, download_ms: float, total_ms: float) -> None:
        """The picture lies in its place. `timings_ms` is of the command that saved it, but for `generate`."""
        timings: Timings = {**self.data.get("timings_ms", {}), "download": download_ms, "total": total_ms}
        self.update(status="saved", finished_at=timestamp(utc_now()), timings_ms=timings, image=image, error=None)

    def settled(self, left: Left, told: Fault) -> None:
        """The work has ended without a saved picture."""
        self.update(status=STATES[left][0], finished_at=timestamp(utc_now()), error=told.as_json())

    def drop_held(self) -> None:
        """Remove the bytes that were handed over, once the saved picture is on record."""
        with contextlib.suppress(OSError):
            self.held.unlink(missing_ok=True)


def _checked(name: str, content: bytes) -> Content:
    """What the bytes of an evidence file say.

    Raises:
        Failure: invalid_evidence, with the first faults.
    """
    import jsonschema

    try:
        data = decode_json_file(name, content)
    except Failure as failure:
        raise Failure("invalid_evidence", failure.message) from None
    found = jsonschema.Draft202012Validator(EVIDENCE_SCHEMA).iter_errors(data)
    faults = sorted(itertools.islice(found, 100), key=lambda fault: fault.json_path)
    if faults:
        paths = [fault.json_path.removeprefix("$").removeprefix(".") or "the file" for fault in faults]
        texts = [outside_text(f"{path}: {fault.message}", 200) for path, fault in zip(paths, faults, strict=True)]
        raise Failure("invalid_evidence", f"{outside_text(name)} is not an evidence file: {'; '.join(texts[:5])}")
    return cast("Content", data)


def said_of(generated: Generated) -> Response:
    """What the service said of a picture, as the evidence holds it."""
    response = {
        "request_id": generated.request_id,
        "usage": dict(generated.usage),
        "quota": dict(generated.quota) or None,
        "image_url": generated.image_url or None,
        "other_image_urls": list(generated.other_urls) or None,
        "expires_at": timestamp(generated.expires_at) if generated.expires_at else None,
        "rewritten_prompt": generated.rewritten_prompt or None,
        "reasoning": generated.reasoning or None,
        "seed": generated.seed,
    }
    return cast("Response", {name: value for name, value in response.items() if value is not None})


class Record(Protocol):
    """Where one picture is remembered: an evidence file, or a row of a batch.

    Before money is spent, a record that cannot be written raises. After that it never does: `behind` says what is
    wrong with it, None where all that is known is on disk.
    """

    evidence: Evidence
    behind: Failure | None
    forgets_tries: bool  # one that was not billed leaves nothing to look at

    @property
    def leads_back(self) -> bool:
        """Whether the disk knows as well as the memory where the picture, or its task, is to be had."""

    def begin(self, **named: Unpack[Changes]) -> None:
        """One more attempt is on disk. `named`: as of `Evidence.begin_attempt`.

        Raises:
            Failure: disk; then nothing may be sent.
        """

    def ended(self, fault: Fault) -> None:
        """The attempt has failed."""

    def keep(self) -> None:
        """Put the evidence on disk as it is now."""

    def settled(self, left: Left, told: Fault) -> None:
        """Put on disk what the end of the work has left."""


class EvidenceFile:
    """The record of one picture in a file of its own, readable for its owner only: it will hold a signed link."""

    forgets_tries = False

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.behind: Failure | None = None
        self._known = self._places  # to the disk

    @property
    def leads_back(self) -> bool:
        return self.behind is None or self._known == self._places

    @property
    def _places(self) -> tuple[str, str, bool]:
        have = self.evidence.have
        return have.link or have.lead, self.evidence.task_id, have.held

    def begin(self, **named: Unpack[Changes]) -> None:
        evidence = self.evidence
        before = evidence.data
        evidence.begin_attempt(**named)
        try:
            evidence.path.parent.mkdir(parents=True, exist_ok=True)
            if before["attempts"]:
                replace_private(evidence.path, to_json(evidence.data))
            else:
                write_gitignore(evidence.path.parent, "*\n")
                write_new(evidence.path, to_json(evidence.data), mode=OWNER_ONLY)
        except OSError as error:
            evidence.data = before
            raise self._unwritten(error) from None
        self._known = self._places

    def ended(self, fault: Fault) -> None:
        self.evidence.end_failed_attempt(fault)

    def keep(self) -> None:
        for _ in range(2):  # what fails may be a moment's
            try:
                self.evidence.path.parent.mkdir(parents=True, exist_ok=True)
                replace_private(self.evidence.path, to_json(self.evidence.data))
                self.behind, self._known = None, self._places
                return
            except OSError as error:
                self.behind = self._unwritten(error)
        if self.evidence.status == "saved":
            warning = f"the evidence file {self.evidence.path} could not be brought up to date"
            self.evidence.data["image"].setdefault("warnings", []).append(warning)

    def settled(self, left: Left, told: Fault) -> None:
        self.evidence.settled(left, told)
        self.keep()

    def _unwritten(self, error: OSError) -> Failure:
        return Failure("disk", f"the evidence file {self.evidence.path} cannot be written: {os_reason(error)}")


def elapsed_ms(start: float) -> float:
    return round((time.monotonic() - start) * 1000, 1)


def response_of(evidence: Evidence, image: Image) -> dict[str, Any]:
    """The response of the contract (RESPONSE_SCHEMA) for a saved image of this evidence."""
    data, said = evidence.data, evidence.said
    request = data["request"]
    response = {
        "image_url": said.get("image_url"),
        "width": image["width"],
        "height": image["height"],
        "prompt": request["prompt"],
        "rewritten_prompt": said.get("rewritten_prompt"),
        "reasoning": said.get("reasoning"),
        "request_id": said.get("request_id", ""),
        "seed": evidence.seed,
        "size": request["size"],
        "provider": data["provider"],
        "region": data["region"],
        "image_path": image["path"],
        "evidence_path": str(evidence.path),
        "estimated_cost": data["cost"].get("estimate"),
        "quota": said.get("quota"),
        "warnings": [*data.get("warnings", ()), *image.get("warnings", ())] or None,
    }
    return {name: value for name, value in response.items() if value is not None}


def moment_of(text: str | None) -> dt.datetime:
    """The moment that an evidence file names; long ago where it names none."""
    try:
        moment = dt.datetime.fromisoformat((text or "").replace("Z", "+00:00"))
        return moment if moment.tzinfo else moment.replace(tzinfo=dt.timezone.utc)
    except ValueError:
        return dt.datetime.min.replace(tzinfo=dt.timezone.utc)
