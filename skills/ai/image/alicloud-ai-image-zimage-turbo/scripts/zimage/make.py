"""Make: the one paid call, and the way from its answer to a saved file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

from zimage.contract import FORMATS, SKILL
from zimage.download import fetch_source
from zimage.errors import Failure
from zimage.evidence import (
    EVIDENCE_ID,
    MADE,
    Evidence,
    drop_held,
    elapsed_ms,
    end_generated_attempt,
    keep_generated,
    response_of,
    submitted_facts,
    timestamp,
    utc_now,
)
from zimage.files import check_free_name, check_space, check_writable, place, remove_leftovers
from zimage.picture import converted, size_warning
from zimage.provider import Generated, Submitted
from zimage.settle import retry_wait, settling
from zimage.task import TASK_ENDS, Task
from zimage.transport import ask, wired_adapter
from zimage.trust import key_for, telling_of_withheld
from zimage.waiting import Interrupted, in_time, pause

if TYPE_CHECKING:
    from zimage.console import Console
    from zimage.keys import Key
    from zimage.picture import Picture
    from zimage.plan import Options, Plan
    from zimage.provider import Provider
    from zimage.waiting import Clock


def import_libraries() -> None:
    """Load what the paid call and its picture need, so that a broken package shows before money is spent."""
    import PIL.Image

    wired_adapter()
    del PIL


def generate(plan: Plan, options: Options, clock: Clock, console: Console, env: Mapping[str, str]) -> dict[str, Any]:
    """Make, verify and save one picture; returns the response. All local checks come before the paid call."""
    check_free_name(plan.output, plan.overwrite)
    key = key_for(plan.provider, plan.endpoint, options.trusted, env)
    check_space(plan.evidence_path.parent)
    check_writable(plan.output.parent, plan.evidence_path.stem)
    remove_leftovers(plan.evidence_path.parent, MADE)  # of runs that were killed
    remove_leftovers(plan.output.parent, f"{SKILL}-{EVIDENCE_ID}")
    import_libraries()
    get_ready(plan.provider, clock)
    if key.warning:
        plan = plan._replace(warnings=(*plan.warnings, key.warning))
    console.warn(plan.warnings)
    evidence = Evidence.create(plan.evidence_path, plan.evidence(utc_now()))
    console.note(f"evidence: {evidence.path}")
    with settling(evidence, flags=recovery_flags(plan, options)):
        generated = obtain(plan, key, evidence, clock, options.max_retries)
        keep_generated(evidence, generated, plan.warnings, clock)
        start = time.monotonic()
        source = fetch_source(evidence, plan.provider, clock, generated.content)
        image = collect(evidence, source, plan.output, plan.provider, overwrite=plan.overwrite, again=False)
        finish(evidence, image, clock, start)
        drop_held(evidence)
    return response_of(evidence, image)


def get_ready(provider: Provider, clock: Clock) -> None:
    """Have a provider load what its calls need. Raises as `Provider.prepare` and `in_time`."""
    provider.preflight()
    if provider.in_process:
        in_time(lambda until: provider.prepare(), clock.generate_until)


def recovery_flags(plan: Plan, options: Options) -> list[str]:
    """The flags without which a recovery would not do what this command was asked to."""
    asks_again = plan.endpoint.host in options.trusted  # a task is asked after where it was submitted
    trust = ["--trust-host", plan.endpoint.host] if asks_again else []
    return [*trust, *["--overwrite"] * plan.overwrite]


def obtain(plan: Plan, key: Key, evidence: Evidence, clock: Clock, max_retries: int) -> Generated:
    """The one step that costs money: sends the request until it is answered, and never twice for one picture.

    Raises:
        Failure: with `billed` as far as it is known. Interrupted.
    """
    provider = plan.provider
    attempt = 0
    while True:
        try:
            made = send(plan, key, clock.generate_until)
        except Failure as failure:
            wait = retry_wait(failure, attempt, max_retries, clock, clock.generate_until)
            evidence.end_failed_attempt(failure, wait)
            if wait is None:
                if attempt:
                    failure.message += f" (tried {attempt + 1} times)"
                raise
        except Interrupted as interruption:
            if not interruption.request_left:
                evidence.end_attempt(outcome="interrupted", billed="no")
            raise
        else:
            break
        evidence.record()
        pause(wait)
        attempt += 1
        evidence.begin_attempt()
    if isinstance(made, Submitted):
        evidence.record(**submitted_facts(made, evidence))
        task = Task(provider, plan.endpoint, key, plan.request, made.task_id)
        try:
            made = task.wait_for(clock.generate_until)
        except Failure as failure:
            if failure.code in TASK_ENDS:
                evidence.end_failed_attempt(failure, None)
            raise
    end_generated_attempt(evidence, provider)
    return made


def send(plan: Plan, key: Key, until: float) -> Generated | Submitted:
    """The paid call, sent once. Raises as `ask`."""
    call = plan.provider.submit(plan.payload, plan.endpoint, key.value, plan.workspace)
    provider = plan.provider
    limit = provider.max_answer_bytes
    with telling_of_withheld(key):
        made = ask(call, lambda answer: provider.read(answer, plan.request, utc_now()), until, plan.endpoint, limit)
    if isinstance(made, Generated) and provider.links_to_itself and made.image_url.startswith("/"):
        made = made._replace(image_url=urljoin(plan.endpoint.url, made.image_url))
    return made


def collect(
    evidence: Evidence, source: Picture, output: Path, provider: Provider, *, overwrite: bool, again: bool
) -> dict[str, Any]:
    """Put a downloaded picture in its place; returns the `image` of the evidence.

    `again`: an earlier run may have got as far as this.

    Raises:
        Failure: image_unusable, disk_after_paying.
    """
    picture = converted(source, FORMATS[output.suffix.lower()])
    path, warning = place(picture.content, output, evidence.id, overwrite=overwrite, again=again)
    unlike = size_warning(evidence.data["request"]["size"], picture, provider)
    warnings = [text for text in (warning, unlike) if text]
    image = {
        "path": str(path),
        "sha256": picture.sha256,
        "bytes": len(picture.content),
        "format": picture.format,
        "width": picture.width,
        "height": picture.height,
    }
    origin = {"source_format": source.format, "source_sha256": source.sha256} if picture is not source else {}
    return image | origin | ({"warnings": warnings} if warnings else {})


def finish(evidence: Evidence, image: dict[str, Any], clock: Clock, start: float) -> None:
    """Bring the evidence to `saved`; `start` is when the download began, in seconds of time.monotonic().

    `timings_ms` is of the command that saved the picture; `generate` stays that of the one that made it.
    """
    now = {"download": elapsed_ms(start), "total": elapsed_ms(clock.start)}
    timings = evidence.data.get("timings_ms", {}) | now
    evidence.record(status="saved", finished_at=timestamp(utc_now()), timings_ms=timings, image=image, error=None)
    if evidence.unwritten:
        evidence.record()  # what failed may have been a moment's
    if evidence.unwritten:
        image.setdefault("warnings", []).append(f"the evidence file {evidence.path} could not be brought up to date")
