"""Recover: finish a picture that has been paid for, without paying."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage.calls import Generated
from zimage.contract import MAX_SAVED_BYTES, SKILL
from zimage.download import fetch_source
from zimage.errors import KINDS, Failure, Problem, noting, raise_problems
from zimage.evidence import MADE, Evidence, EvidenceFile, elapsed_ms, response_of
from zimage.files import check_free_name, check_writable, file_hash, leftovers_of, read_file, remove_leftovers
from zimage.make import collect, import_libraries, save, settling
from zimage.outside import outside_text
from zimage.paths import checked_output
from zimage.picture import verified
from zimage.provider import Provider
from zimage.registry import provider_named
from zimage.request import normalize, request_problems
from zimage.settle import explained
from zimage.task import Task, is_task_id
from zimage.trust import Own, home_of, home_of_record, key_for, recorded_endpoint
from zimage.waiting import Late

if TYPE_CHECKING:
    from zimage.console import Console
    from zimage.facts import Image
    from zimage.plan import Options
    from zimage.trust import Home
    from zimage.waiting import Stop


def recover(options: Options, stop: Stop, console: Console, env: Mapping[str, str]) -> dict[str, Any]:
    """Finish a picture that has been paid for, without paying; returns the response.

    Raises:
        Failure: 2 where nothing was billed, 7 where the outcome is unknown, 8 where the link has died.
    """
    evidence = Evidence.load("--recover", options.source, stop)
    provider = provider_named(evidence.data["provider"])
    output = recovery_output(evidence, options)
    remove_leftovers(
        evidence.path.parent, f"{MADE}|{leftovers_of(evidence.id, evidence.path.name, evidence.held.name)}"
    )
    remove_leftovers(output.parent, leftovers_of(f"{SKILL}-{evidence.id}"))
    saved, have = is_saved(evidence, stop), evidence.have
    if saved:
        evidence.drop_held()  # a run that was killed may have left it
    if saved and options.output is None:
        return recovered(evidence, evidence.data["image"])
    here = bool(have.link) or have.held or have.billed == "yes"
    task_is_open = not here and have.task and have.status != "failed"
    is_led = not here and not task_is_open and bool(have.lead) and have.billed == "unknown"
    if not here and not task_is_open and not is_led:
        failure = unrecoverable(evidence, provider)
        raise explained(evidence, failure, have=have._replace(billed=failure.fault.billed))
    flags = ["--output", str(output)] if options.output else []
    own = Own(options.base_url, options.trusted, env)
    place = [word for host in sorted(options.trusted) for word in ("--trust-host", host)] if task_is_open else []
    place += ["--base-url", options.base_url] if options.base_url else []
    try:
        check_writable(output.parent, evidence.id)
    except Failure as failure:
        raise explained(evidence, failure, flags, place) from None
    try:
        task = task_of(evidence, provider, own, console) if task_is_open else None
    except Failure as failure:
        raise explained(evidence, failure.but(billed="unknown"), flags, place) from None
    # Only an answer that comes now, from a place that the user names, may lead where a file alone may not.
    endpoint = evidence.data["endpoint"]
    home = home_of(endpoint, provider) if task else home_of_record(have.link or have.lead, endpoint, provider, own)
    if home.origin:
        with contextlib.suppress(Failure):  # without a key it may do as well
            named = recorded_endpoint(endpoint, provider, own)
            home = home._replace(key=key_for(provider, named, own.trusted, own.env).value)
    import_libraries()
    record = EvidenceFile(evidence)
    if is_led:
        follow_lead(evidence, provider, stop, home, flags, place)
        record.keep()
    warnings = evidence.data.get("warnings", ())
    with settling(record, flags=[*flags, *["--overwrite"] * options.overwrite], place=place, saved=saved):
        if task is not None:
            evidence.update(status="submitted", error=None)
            generated = task.wait_for(stop.generating)
            evidence.generated(generated, warnings, elapsed_ms(stop.start))
            record.keep()
        elif "response" not in evidence.data:  # killed between the bytes and the evidence
            evidence.generated(Generated(), warnings, 0.0)
        if saved:
            return recovered(evidence, one_more_copy(evidence, provider, output, stop, home, options))
        image = save(
            record,
            provider,
            output,
            stop,
            home,
            task=lambda: task_of(evidence, provider, own, console),
            overwrite=options.overwrite,
            again=True,
        )
    return recovered(evidence, image)


def recovered(evidence: Evidence, image: Image) -> dict[str, Any]:
    """The response of a recovery, whose cost must not be taken for a second payment."""
    return response_of(evidence, image) | ({"paid_before": True} if evidence.data["billable"] else {})


def follow_lead(
    evidence: Evidence, provider: Provider, stop: Stop, home: Home, flags: Sequence[str], place: Sequence[str]
) -> None:
    """Take the link of an answer that was not understood for the picture's, once a picture has come from it.

    Raises:
        Failure: outcome_unknown, host_not_trusted; nothing is on record then.
    """
    lead = evidence.have.lead
    found = Evidence(evidence.path, {**evidence.data, "response": {"image_url": lead}})
    try:
        fetch_source(found, provider, stop, home).close()
    except Failure as failure:
        if failure.code != "host_not_trusted":
            message = f"the link in the answer leads to no picture: {failure.message}"
            is_final = failure.code != "paid_not_downloaded"
            failure = Failure("outcome_unknown", message, image_url=lead, lasting=is_final)
        raise explained(evidence, failure.but(billed="unknown"), flags, place) from None
    others = evidence.data["answer"]["links"][1:]
    evidence.generated(Generated(image_url=lead, other_urls=tuple(others)), evidence.data.get("warnings", ()), 0.0)


def one_more_copy(
    evidence: Evidence, provider: Provider, output: Path, stop: Stop, home: Home, options: Options
) -> Image:
    """Save a picture under another name too; the evidence goes on naming the first.

    A converted one is fetched again: its file may have lost something.
    """
    if "source_format" in evidence.data["image"] and evidence.have.link:
        source = fetch_source(evidence, provider, stop, home)
    else:
        source = verified(read_file(Path(evidence.data["image"]["path"]), MAX_SAVED_BYTES), stop)
    with contextlib.closing(source):
        return collect(evidence, source, output, provider, stop, overwrite=options.overwrite, again=True)


def task_of(evidence: Evidence, provider: Provider, own: Own, console: Console) -> Task:
    """The submitted task of an evidence file, to be asked after where it was submitted.

    Raises:
        Failure: invalid_evidence, key_missing, key_malformed; as `recorded_endpoint`.
    """
    if not provider.has_tasks() or not is_task_id(evidence.task_id):
        raise Failure("invalid_evidence", f"{evidence.path.name}: task_id: not one of {provider.name}")
    endpoint = recorded_endpoint(evidence.data["endpoint"], provider, own)
    key = key_for(provider, endpoint, own.trusted, own.env)
    request = normalize(evidence.data["request"], with_seed=provider.takes_seed)
    is_sure = evidence.status != "submitting"
    return Task(provider, endpoint, key, request, evidence.task_id, is_sure=is_sure, tell=console.note)


def recovery_output(evidence: Evidence, options: Options) -> Path:
    """Where a recovered picture goes; the evidence is checked as far as it will be used."""
    said = evidence.data["request"]
    problems = request_problems(said)
    if not problems and said != normalize(said, with_seed="seed" in said).as_dict():
        problems = [Problem("invalid_request", "request: is not normalized")]
    recorded = None
    with noting(problems):
        recorded = checked_output(evidence.data["output"], "output", recorded=True)
        if "image" in evidence.data:
            checked_output(evidence.data["image"]["path"], "image.path", recorded=True)
    if problems or recorded is None or not os.path.isabs(evidence.data["output"]):
        texts = [problem.text for problem in problems] or ["output: is not an absolute path"]
        raise Failure("invalid_evidence", f"{evidence.path.name}: {'; '.join(texts)}", problems=texts)
    if options.output is None:
        return recorded
    with noting(problems):
        recorded = checked_output(options.output, "--output")
    raise_problems(problems)
    check_free_name(recorded, options.overwrite)
    return recorded


def is_saved(evidence: Evidence, stop: Stop) -> bool:
    """Whether the picture of this evidence lies, unchanged, where the evidence says. Raises Stopped."""
    image = evidence.data.get("image")
    if not image or evidence.status != "saved":
        return False
    try:
        return stop.in_thread(lambda: file_hash(Path(image["path"]))) == str(image["sha256"])
    except (OSError, ValueError, Late):
        return False


def unrecoverable(evidence: Evidence, provider: Provider) -> Failure:
    """Why there is nothing to fetch for an evidence file without a link."""
    have = evidence.have
    error = evidence.data.get("error")
    if have.status == "failed" or have.billed == "no" or provider.in_process:  # which has left nothing elsewhere
        kind = KINDS.get(error["code"]) if error else None
        hint = kind.hint if kind and not kind.retryable else None
        told = error["message"] if error else "it ended before the service made a picture"
        return Failure("nothing_to_recover", f"this request was not billed: {outside_text(told)}", hint=hint)
    made = "made and billed" if have.billable else "made"
    message = f"the request left and no link came back: whether a picture was {made} is not known"
    tasks = ", ".join(outside_text(name, 100) for name in evidence.data.get("answer", {}).get("task_ids", [])[:3])
    message += f"; the answer, which the evidence holds, names task {tasks}" if tasks else ""
    return Failure("outcome_unknown", message, request_id=error.get("request_id") if error else None)
