"""zimageturbo.ai: another vendor of the same model, asked by a task that is submitted and then asked after.

Sources: references/providers.md of this skill. The service takes a prompt and one of five aspect ratios; seed, exact
size and rewriting are its own affair. Its envelope repeats an HTTP status, and where the two disagree the worse one
counts.
"""

from __future__ import annotations

import datetime as dt
import math
import re
from typing import Any, ClassVar
from urllib.parse import quote

from zimage.answers import (
    bearer,
    found_elsewhere,
    json_post,
    kept_answer,
    link_expiry,
    links_in,
    read_begun_json,
    read_json,
    refused_side,
    request_id,
    service_failure,
)
from zimage.calls import Generated, HttpAnswer, HttpCall, Submitted
from zimage.endpoint import Endpoint
from zimage.errors import KINDS, Failure
from zimage.keys import KeyPlaces
from zimage.outside import at, kept_text, outside_json, outside_text, shown
from zimage.provider import Price, Provider
from zimage.request import ImageRequest
from zimage.task import is_task_id
from zimage.traces import traces_in
from zimage.words import said_in

RATIOS = ("1:1", "4:3", "3:4", "16:9", "9:16")
MAX_PROMPT = 1000  # characters
LINK_LIFETIME = dt.timedelta(hours=24)  # not documented; a link that lives longer still works
DONE, WORKING, FAILED = "SUCCESS", "IN_PROGRESS", "FAILED"
UNSAFE = re.compile(
    r"sensitiv|nsfw|safety|moderat|inappropriate|prohibited|content polic|违规|敏感|不当", re.IGNORECASE
)


class ZImageTurbo(Provider):
    """Submits a task, asks after it, and takes the first picture of its answer."""

    name = "zimageturbo"
    key_places = KeyPlaces(variable="ZIMAGETURBO_API_KEY")
    roots: ClassVar = {"global": "https://zimageturbo.ai/api"}
    default_region = "global"
    base_url_variables = ("ZIMAGETURBO_BASE_URL",)
    default_root = "/api"
    generate_path = "/generate"
    requests_per_minute = 60.0  # no limit is published: a careful one
    links_elsewhere = True
    takes_seed = False
    sizes_are_ratios = True
    long_prompt = MAX_PROMPT

    def owns(self, host: str) -> bool:
        return host == "zimageturbo.ai"

    def cannot(self, request: ImageRequest) -> list[str]:
        sentences = []
        if len(request.prompt) > MAX_PROMPT:
            sentences.append(f"prompt: {len(request.prompt)} characters; {self.name} takes at most {MAX_PROMPT}")
        if ratio_of(request) not in RATIOS:
            sentences.append(f"size: {request.size} is {ratio_of(request)}; {self.name} draws only {' '.join(RATIOS)}")
        if request.seed is not None:
            sentences.append(f"seed: {self.name} takes none; leave it out, or give -1")
        if request.prompt_extend:
            sentences.append(f"prompt_extend: {self.name} does not rewrite prompts; leave it out")
        return sentences

    def price(self, request: ImageRequest, region: str) -> Price:
        return Price(0.02, "list price, one picture; failed tasks are not charged", "2025-12")

    def payload(self, request: ImageRequest) -> dict[str, Any]:
        return {"prompt": request.prompt, "aspect_ratio": ratio_of(request)}

    def submit(self, payload: dict[str, Any], endpoint: Endpoint, key: str, workspace: str | None) -> HttpCall:
        return json_post(endpoint.url, payload, bearer(key))

    def read(self, answer: HttpAnswer, request: ImageRequest, now: dt.datetime) -> Generated | Submitted:
        begun = read_begun_json(answer) or {}
        said = at(begun, "data", "task_id")
        status = status_of(answer, begun)
        # A task that has a name exists, and may be charged, whatever fault is told beside it.
        exists = said not in (None, "") and (status < 300 or status == 429 or status >= 500)
        body = begun if exists else read_json(answer) or {}
        if not exists and (made := found_elsewhere(answer, begun, now + LINK_LIFETIME)):
            return made
        if not exists:
            failure = failure_of(answer, body)
            if body and is_good(answer, body):
                message = f"the service took the request and named no task: {failure.message}"
                raise failure.but(code="answer_unusable", message=message, hint=KINDS["answer_unusable"].hint)
            raise failure
        task_id = str(said) if isinstance(said, int) and not isinstance(said, bool) else said
        if not isinstance(task_id, str) or not is_task_id(task_id):
            raise Failure("answer_unusable", f"the service named its task {shown(said)}, which is no usable name")
        return Submitted(task_id, request_id(answer, body) or task_id)

    def poll(self, task_id: str, endpoint: Endpoint, key: str) -> HttpCall:
        return HttpCall("GET", f"{endpoint.root}/status?task_id={quote(task_id, safe='')}", bearer(key))

    def read_poll(self, answer: HttpAnswer, request: ImageRequest, now: dt.datetime) -> Generated | None:
        body = read_json(answer) or {}
        data = body.get("data")
        status = str(at(data, "status")).upper()
        links = links_in(at(data, "response")) if status == DONE else []
        if not links and (not is_good(answer, body) or not body):  # a picture that is there was made
            raise failure_of(answer, body)
        if not isinstance(data, dict):
            return None  # an answer that says nothing of the task does not end it
        said = outside_text(data.get("error_message"))
        if status == FAILED or (said and status not in (DONE, WORKING)):
            kind = "blocked" if UNSAFE.search(said) else "task_failed"
            side = refused_side(said) if kind == "blocked" else None
            told = f"the task failed: {said or 'the service does not say why'}"
            raise Failure(kind, told, billed="no", refused=side)
        if status != DONE:
            return None
        if not links and (made := found_elsewhere(answer, body, now + LINK_LIFETIME)):
            return made
        if not links:
            message = f"the task succeeded, and no picture is in the answer{said and f': {said}'}"
            raise Failure("no_image", message, answer=kept_answer(answer, traces_in(body)))
        drawn = at(data, "request", "prompt")
        usage = {name: outside_json(data[name]) for name in ("consumed_credits", "created_at") if data.get(name)}
        return Generated(
            image_url=links[0],
            expires_at=link_expiry(links[0], now + LINK_LIFETIME),
            request_id=request_id(answer, body) or outside_text(data.get("task_id"), 200),
            rewritten_prompt=kept_text(drawn) if drawn != request.prompt else "",
            usage=usage,
            other_urls=tuple(links[1:]),
        )

    def query(self, endpoint: Endpoint, key: str, workspace: str | None) -> HttpCall:
        """There is no list of models: a question after a task that does not exist shows whether the key is good."""
        return self.poll("check", endpoint, key)

    def read_query(self, answer: HttpAnswer) -> bool:
        body = read_json(answer) or {}
        if code_of(body) is None or not (is_good(answer, body) or status_of(answer, body) in (400, 404)):
            raise failure_of(answer, body)
        return False


def ratio_of(request: ImageRequest) -> str:
    """The aspect ratio of a size, in lowest terms."""
    width, height = request.width_height
    divisor = math.gcd(width, height)
    return f"{width // divisor}:{height // divisor}"


def code_of(body: dict[str, Any]) -> int | None:
    """The HTTP status that the envelope repeats, as a number or as text; None where there is no envelope."""
    code = body.get("code")
    if isinstance(code, str) and re.fullmatch("[1-5][0-9]{2}", code):
        return int(code)
    return code if isinstance(code, int) and 100 <= code <= 599 else None


def status_of(answer: HttpAnswer, body: dict[str, Any]) -> int:
    return max(answer.status, code_of(body) or 0)


def is_good(answer: HttpAnswer, body: dict[str, Any]) -> bool:
    return 200 <= status_of(answer, body) < 300


def failure_of(answer: HttpAnswer, body: dict[str, Any]) -> Failure:
    """What an answer that is not a good one means."""
    status = status_of(answer, body)
    unsafe = status == 400 and UNSAFE.search(said_in(answer, body or None).message)
    return service_failure(
        answer,
        kind="blocked" if unsafe else None,
        is_own_json=code_of(body) is not None,
        status=status,
        statuses={402: "balance"},
        request_id=request_id(answer, body),
    )


PROVIDER = ZImageTurbo
