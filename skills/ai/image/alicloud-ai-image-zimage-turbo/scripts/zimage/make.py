"""Make: the one paid call, and the way from its answer to a saved file."""

from __future__ import annotations

import contextlib
import hashlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

from zimage.calls import Generated, Submitted
from zimage.contract import FORMATS, SKILL
from zimage.download import fetch_anew, fetch_source
from zimage.errors import Failure
from zimage.evidence import EVIDENCE_ID, MADE, Evidence, EvidenceFile, elapsed_ms, response_of, utc_now
from zimage.files import check_free_name, check_space, check_writable, place, remove_leftovers
from zimage.picture import converted, size_warning
from zimage.settle import TASK_ENDS, ended_early, explained, retry_wait, settle
from zimage.task import Task
from zimage.transport import ask, get_to_know
from zimage.trust import Own, home_of, key_for, naming_flags, telling_of_refused, telling_of_withheld
from zimage.waiting import Stopped, in_time
from zimage.wire import wired_adapter

if TYPE_CHECKING:
    from zimage.calls import HttpAnswer
    from zimage.console import Console
    from zimage.evidence import Record
    from zimage.facts import Image
    from zimage.keys import Key
    from zimage.picture import Picture
    from zimage.plan import Options, Plan
    from zimage.provider import Provider
    from zimage.trust import Home
    from zimage.waiting import Stop


def import_libraries() -> None:
    """Load what the paid call and its picture need, so that a broken package shows before money is spent."""
    import PIL.Image

    wired_adapter()
    del PIL


def generate(plan: Plan, options: Options, stop: Stop, console: Console, env: Mapping[str, str]) -> dict[str, Any]:
    """Make, verify and save one picture; returns the response. All local checks come before the paid call."""
    check_free_name(plan.output, plan.overwrite)
    key = key_for(plan.provider, plan.endpoint, options.trusted, env)
    check_space(plan.evidence_path.parent)
    check_writable(plan.output.parent, plan.evidence_path.stem)
    remove_leftovers(plan.evidence_path.parent, MADE)  # of runs that were killed
    remove_leftovers(plan.output.parent, f"{SKILL}-{EVIDENCE_ID}")
    import_libraries()
    get_ready(plan.provider, stop)
    get_to_know(plan.provider, plan.endpoint, key, stop)
    plan = plan.anew()
    if key.warning:
        plan = plan._replace(warnings=(*plan.warnings, key.warning))
    console.warn((*plan.endpoint.warnings, *plan.warnings))
    if not stop.generating.room_for_attempt_after(0):  # the machine slept, or a model took long to load
        raise Failure("too_slow", "too little time was left for the paid call")
    record = EvidenceFile(Evidence(plan.evidence_path, plan.evidence(utc_now())))
    place = naming_flags(plan.endpoint, plan.provider, Own(options.base_url, options.trusted, env))
    with settling(record, flags=["--overwrite"] * plan.overwrite, place=place):
        image = make(plan, key, record, stop, options.max_retries, console)
    return response_of(record.evidence, image)


def get_ready(provider: Provider, stop: Stop) -> None:
    """Have a provider load what its calls need. Raises as `Provider.prepare` and `in_time`."""
    if provider.in_process:
        in_time(lambda until: provider.prepare(), stop.generating)
    else:
        provider.preflight()


def make(
    plan: Plan, key: Key, record: Record, stop: Stop, max_retries: int | None, console: Console | None = None
) -> Image:
    """One picture, from the paid call to the saved file; returns the `image` of the evidence.

    Raises:
        Failure: with `billed` as far as it is known. Stopped.
    """
    tries = 0
    while True:
        try:
            made = attempt(plan, key, record, stop.generating, console if not tries else None)
            came(plan, record, made, stop.start)
            if isinstance(made, Submitted):
                tell = console.note if console else None
                where = (plan.provider, plan.endpoint, key, plan.request)
                follow(Task(*where, made.task_id, is_sure=made.is_sure, tell=tell), plan, record, stop)
            break
        except Failure as failure:
            wait = retry_wait(failure, tries, max_retries, stop.generating, billable=plan.billable)
            tries += 1
            if wait is None:
                raise failure.but(message=failure.message + f" (tried {tries} times)" * (tries > 1)) from None
            record.evidence.end_attempt(wait_s=round(wait, 3))
            record.keep()
            stop.wait(wait)
    home = home_of(plan.endpoint.url, plan.provider)._replace(key=key.value)
    return save(record, plan.provider, plan.output, stop, home, overwrite=plan.overwrite)


def attempt(plan: Plan, key: Key, record: Record, stop: Stop, console: Console | None = None) -> Generated | Submitted:
    """The one step that costs money: the attempt is on record, then the request is sent, once.

    What was refused, and so not billed, is sent once more where the refusal says how it would be taken. A task that has
    a name before its call leaves is on the service, as far as is known, if the answer is lost: it is asked after by it.

    Raises:
        Failure: with `billed` as far as it is known. Stopped.
    """
    evidence, task_id, out = record.evidence, "", plan
    if plan.provider.names_tasks:
        task_id = evidence.task_id or str(uuid.uuid4())  # of a try that was lost: then it cannot be made twice
        out = plan._replace(payload=plan.provider.named(plan.payload, task_id))
        record.begin(task_id=task_id, payload=out.payload)
    else:
        record.begin()
    if console is not None:
        console.note(f"evidence: {evidence.path}")
    try:
        made = send(out, key, stop)
        return made._replace(task_id=made.task_id or task_id) if isinstance(made, Submitted) else made
    except Failure as failure:
        if task_id and failure.fault.billed != "no":
            evidence.end_failed_attempt(failure.fault)
            return Submitted(task_id, is_sure=False)
        record.ended(failure.fault)
        plainer = plan.anew() if plan.provider.learns_from(failure) else plan
        if plainer.payload == plan.payload:
            raise
    except Stopped as stopped:
        if not stopped.request_left:
            evidence.end_attempt(outcome="interrupted", billed="no")
            evidence.never_left()
        raise
    evidence.update(**plainer.sent)
    made = attempt(plainer, key, record, stop)
    news = tuple(text for text in plainer.warnings if text not in plan.warnings)
    return made._replace(warnings=(*news, *made.warnings)) if isinstance(made, Generated) else made


def came(plan: Plan, record: Record, made: Generated | Submitted, began: float) -> None:
    """Put on record what the service answered; `began` is when the request left, a moment of time.monotonic()."""
    if isinstance(made, Submitted):
        record.evidence.submitted(made)
    else:
        record.evidence.generated(made, plan.warnings, elapsed_ms(began))
    record.keep()


def follow(task: Task, plan: Plan, record: Record, stop: Stop) -> None:
    """Wait for a task and put on record what came of it. Raises as `Task.wait_for`."""
    try:
        made = task.wait_for(stop.generating)
    except Failure as failure:
        if failure.code in TASK_ENDS:
            record.ended(failure.fault)
        raise
    came(plan, record, made, stop.start)


def send(plan: Plan, key: Key, stop: Stop) -> Generated | Submitted:
    """The paid call, sent once. Raises as `ask`."""
    call = plan.provider.submit(plan.payload, plan.endpoint, key.value, plan.workspace)
    provider = plan.provider

    def read(answer: HttpAnswer) -> Generated | Submitted:
        return provider.read(answer, plan.request, utc_now())._replace(http_status=answer.status)

    with telling_of_withheld(key), telling_of_refused(key, plan.endpoint, provider):
        links = provider.links_elsewhere
        made = ask(call, read, stop, plan.endpoint, provider.max_answer_bytes, links_elsewhere=links)
    if isinstance(made, Generated) and provider.links_to_itself and made.image_url.startswith("/"):
        made = made._replace(image_url=urljoin(plan.endpoint.url, made.image_url))
    return made.bounded() if isinstance(made, Generated) else made


def collect(
    evidence: Evidence, source: Picture, output: Path, provider: Provider, stop: Stop, *, overwrite: bool, again: bool
) -> Image:
    """Put a downloaded picture in its place; returns the `image` of the evidence.

    `again`: an earlier run may have got as far as this.

    Raises:
        Failure: as `converted`; disk_after_paying. Stopped.
    """
    wanted = FORMATS[output.suffix.lower()]
    content, width, height = converted(source, wanted, stop)
    path, warning = place(content, output, evidence.id, overwrite=overwrite, again=again)
    unlike = size_warning(evidence.data["request"]["size"], (width, height), provider)
    warnings = [text for text in (warning, unlike) if text]
    image: Image = {
        "path": str(path),
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "format": wanted,
        "width": width,
        "height": height,
    }
    if wanted != source.format:
        image |= {"source_format": source.format, "source_sha256": source.sha256}
    if warnings:
        image["warnings"] = warnings
    return image


def save(
    record: Record,
    provider: Provider,
    output: Path,
    stop: Stop,
    home: Home,
    *,
    task: Callable[[], Task] | None = None,
    overwrite: bool = False,
    again: bool = False,
    also: Callable[[Picture], None] = lambda picture: None,
) -> Image:
    """Fetch, verify and save a picture that has been paid for; returns the `image` of the evidence.

    `task` is asked for a new link where the old one is dead; `also` is done with the picture before it is on record.

    Raises:
        Failure: as `fetch_anew` and `collect`.
    """
    evidence, start = record.evidence, time.monotonic()
    source = fetch_anew(evidence, provider, stop, home, task) if task else fetch_source(evidence, provider, stop, home)
    with contextlib.closing(source):
        image = collect(evidence, source, output, provider, stop, overwrite=overwrite, again=again)
        also(source)
    evidence.saved(image, elapsed_ms(start), elapsed_ms(stop.start))
    record.keep()
    if record.behind is None:
        evidence.drop_held()
    return image


@contextlib.contextmanager
def settling(record: Record, *, flags: Sequence[str], place: Sequence[str], saved: bool = False) -> Iterator[None]:
    """Whatever ends the work, the record says how, and the error says where it is.

    `flags` and `place`: see `settle`. `saved`: the picture is safe already; a copy
    that fails changes nothing about that.
    """
    try:
        yield
    except (Exception, Stopped) as error:
        failure = error if isinstance(error, Failure) else ended_early(error, record.evidence)
        if saved:
            raise explained(record.evidence, failure, flags, place) from None
        raise settle(record, failure, flags, place)[1] from None
