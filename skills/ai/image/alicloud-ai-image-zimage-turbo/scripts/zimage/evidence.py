"""Evidence: what was asked, what was paid and how to get it again, always on disk before the next step."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from zimage.contract import EVIDENCE_SCHEMA, MAX_EVIDENCE_BYTES, SKILL
from zimage.errors import Failure, os_reason
from zimage.files import OWNER_ONLY, replace_private, to_json, write_gitignore, write_new
from zimage.outside import outside_text
from zimage.request import decode_json_file, read_input

if TYPE_CHECKING:
    from zimage.provider import Generated, Provider, Submitted
    from zimage.waiting import Clock


class Folders(NamedTuple):
    """Where results go: below $OUTPUT_DIR, by default `output` in the working folder. Absolute paths."""

    images: Path
    evidence: Path

    @classmethod
    def of(cls, env: Mapping[str, str]) -> Folders:
        base = Path(os.path.abspath(env.get("OUTPUT_DIR") or "output"))
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
    """One evidence file. `data` is its content (EVIDENCE_SCHEMA).

    `update` changes the content in memory, `record` replaces the file too.
    """

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path = path
        self.data = data
        self.unwritten = False  # the last state is not on disk

    @property
    def id(self) -> str:
        return self.path.stem

    @classmethod
    def create(cls, path: Path, data: dict[str, Any]) -> Evidence:
        """Write the file for the first time, readable for its owner only: it will hold a signed link.

        Raises:
            Failure: disk.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_gitignore(path.parent, "*\n")
            write_new(path, to_json(data), mode=OWNER_ONLY)
        except OSError as error:
            raise Failure("disk", f"the evidence file {path} cannot be written: {os_reason(error)}") from None
        return cls(path, data)

    @classmethod
    def load(cls, option: str, name: str, wait: float) -> Evidence:
        """Read and check an evidence file.

        Raises:
            Failure: file_unreadable, invalid_evidence.
        """
        import jsonschema

        path = Path(os.path.abspath(name))
        content = read_input(option, str(path) if name else "", MAX_EVIDENCE_BYTES, wait)
        try:
            data = decode_json_file(name, content)
        except Failure as failure:
            raise Failure("invalid_evidence", failure.message) from None
        faults = sorted(jsonschema.Draft202012Validator(EVIDENCE_SCHEMA).iter_errors(data), key=lambda e: e.json_path)
        if faults:
            paths = [fault.json_path.removeprefix("$").removeprefix(".") or "the file" for fault in faults]
            texts = [outside_text(f"{path}: {fault.message}", 200) for path, fault in zip(paths, faults, strict=True)]
            raise Failure("invalid_evidence", f"{outside_text(name)} is not an evidence file: {'; '.join(texts[:5])}")
        return cls(path, data)

    def update(self, **changes: Any) -> None:
        """Merge changes; None removes a field."""
        self.data = {name: value for name, value in (self.data | changes).items() if value is not None}

    def record(self, **changes: Any) -> None:
        """Merge changes and replace the file in one step.

        A disk that fails now must not lose a paid picture: `unwritten` tells, the command goes on.
        """
        self.update(**changes)
        try:
            replace_private(self.path, to_json(self.data))
            self.unwritten = False
        except OSError:
            self.unwritten = True

    def begin_attempt(self) -> None:
        """Put one more attempt on disk, before its request leaves.

        Raises:
            Failure: disk. Then nothing may be sent.
        """
        earlier = self.data["attempts"]
        self.record(attempts=[*earlier, {"at": timestamp(utc_now())}])
        if self.unwritten:
            self.update(attempts=earlier)
            raise Failure("disk", f"the evidence file {self.path} cannot be written: nothing more was sent")

    def end_attempt(self, **facts: Any) -> None:
        """Add to the last attempt how it ended."""
        *earlier, last = self.data["attempts"]
        known = {name: value for name, value in facts.items() if value is not None}
        self.data["attempts"] = [*earlier, last | known]

    def end_failed_attempt(self, failure: Failure, wait: float | None) -> None:
        """Add to the last attempt how it failed, and how many seconds the next one waits, if there is one."""
        self.end_attempt(
            http_status=failure.facts.get("http_status"),
            service_code=failure.facts.get("service_code"),
            outcome=failure.code,
            billed=failure.billed,
            wait_s=wait and round(wait, 3),
        )

    @property
    def is_paid(self) -> bool:
        """Whether a picture is known to have been made."""
        return self.data["status"] in ("generated", "saved")

    @property
    def nothing_outstanding(self) -> bool:
        """Whether every attempt is known to have ended unbilled."""
        return all(attempt.get("billed") == "no" for attempt in self.data["attempts"])


def keep_generated(evidence: Evidence, generated: Generated, warnings: Sequence[str], clock: Clock) -> None:
    """Put what has been paid for on disk: bytes that were handed over, then the evidence."""
    if generated.content:
        with contextlib.suppress(OSError):  # then they are in memory still, and the picture may yet be saved
            hold(evidence.path, generated.content)
    evidence.record(**generated_facts(generated, warnings, clock))


def held_path(evidence_path: Path) -> Path:
    """Where bytes that a provider handed over lie until the picture is saved: there is no link to get them again."""
    return evidence_path.with_suffix(".picture")


def hold(evidence_path: Path, content: bytes) -> None:
    """Raises OSError."""
    evidence_path.parent.mkdir(parents=True, exist_ok=True)
    replace_private(held_path(evidence_path), content)


def drop_held(evidence: Evidence) -> None:
    """Remove the bytes that were handed over, once the saved picture is on record."""
    if not evidence.unwritten:
        with contextlib.suppress(OSError):
            held_path(evidence.path).unlink(missing_ok=True)


def generated_facts(generated: Generated, warnings: Sequence[str], clock: Clock) -> dict[str, Any]:
    """What an evidence file says of a picture from the moment when it is known to be made."""
    more = len(generated.other_urls)
    several = [f"the service sent {more + 1} pictures; the first is saved, the evidence has the links"] if more else []
    response = {
        "request_id": generated.request_id,
        "usage": dict(generated.usage),
        "image_url": generated.image_url or None,
        "other_image_urls": list(generated.other_urls) or None,
        "expires_at": timestamp(generated.expires_at) if generated.expires_at else None,
        "rewritten_prompt": generated.rewritten_prompt or None,
        "reasoning": generated.reasoning or None,
    }
    return {
        "status": "generated",
        "generated_at": timestamp(utc_now()),
        "response": {name: value for name, value in response.items() if value is not None},
        "timings_ms": {"generate": elapsed_ms(clock.start)},
        "warnings": [*warnings, *several, *generated.warnings] or None,
    }


def end_generated_attempt(evidence: Evidence, provider: Provider) -> None:
    """Note that the last attempt has made a picture."""
    evidence.end_attempt(http_status=None if provider.in_process else 200, outcome="generated", billed="yes")


def submitted_facts(submitted: Submitted, evidence: Evidence) -> dict[str, Any]:
    """What an evidence file says of a task from the moment when its id is known."""
    evidence.end_attempt(http_status=200, outcome="submitted")
    response = {"request_id": submitted.request_id} if submitted.request_id else None
    return {"status": "submitted", "task_id": submitted.task_id, "response": response}


def elapsed_ms(start: float) -> float:
    return round((time.monotonic() - start) * 1000, 1)


def response_of(evidence: Evidence, image: dict[str, Any]) -> dict[str, Any]:
    """The response of the contract (RESPONSE_SCHEMA) for a saved image of this evidence."""
    data = evidence.data
    request, said = data["request"], data.get("response", {})
    response = {
        "image_url": said.get("image_url"),
        "width": image["width"],
        "height": image["height"],
        "prompt": request["prompt"],
        "rewritten_prompt": said.get("rewritten_prompt"),
        "reasoning": said.get("reasoning"),
        "request_id": said.get("request_id", ""),
        "seed": request.get("seed"),
        "size": request["size"],
        "provider": data["provider"],
        "region": data["region"],
        "image_path": image["path"],
        "evidence_path": str(evidence.path),
        "estimated_cost": data["cost"]["estimate"],
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
