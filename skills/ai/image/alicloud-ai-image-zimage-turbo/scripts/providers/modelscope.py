"""ModelScope API-Inference: the model at its authors' own hub, by tasks, for quota in place of money.

Sources: references/providers.md and references/sources.md of this skill. The daily quota is treated as a price: a
submission whose answer is lost may have used it, and is not sent again unasked.
"""

from __future__ import annotations

import datetime as dt
import re
from typing import Any, ClassVar
from urllib.parse import quote, urlsplit

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
from zimage.codes import COMMON_CODES, Code, kind_of
from zimage.endpoint import Endpoint
from zimage.errors import KINDS, Failure
from zimage.keys import KeyPlaces
from zimage.outside import at, outside_json, outside_text, shown
from zimage.provider import Price, Provider
from zimage.quota import Quota
from zimage.request import ImageRequest
from zimage.task import is_task_id
from zimage.traces import ENDED_WELL, traces_in
from zimage.words import said_in

MODEL = "Tongyi-MAI/Z-Image-Turbo"
MAX_PROMPT = 1999  # characters
SIDES, SIDE_STEP = (512, 2048), 16  # pixels: of the service's table, of the model
LINK_LIFETIME = dt.timedelta(hours=24)  # not documented; a link that lives longer still works
FAILED = ("FAILED", "CANCELED", "CANCELLED")
PAUSE, LATER_PAUSE, PAUSES = 5.0, 15.0, 12  # seconds between questions: the vendor's sample; after a minute, longer
BUSY_PAUSE = 10.0  # seconds after a 429 that does not say how long: fewer tasks at once are taken, for a moment
HEADERS = {  # of submissions and of answers to questions; any may be absent
    "calls_left": "modelscope-ratelimit-requests-remaining",
    "calls_limit": "modelscope-ratelimit-requests-limit",
    "model_calls_left": "modelscope-ratelimit-model-requests-remaining",
    "model_calls_limit": "modelscope-ratelimit-model-requests-limit",
}
BALANCE_PATH = "/openapi/v1/magicubes/balance"
UNSAFE = r"inspection|sensitiv|inappropriate|nsfw|\brisk|违规|敏感|不当|风险"
CODES = (
    Code("balance", text="insufficient balance", statuses=[429]),
    Code("access_denied", text=r"bind your alibaba ?cloud account|real[- ]name", statuses=[401, 403]),
    Code("blocked", text=UNSAFE, statuses=[400]),
    Code("not_found", text=r"model\b.* (does not exist|not found|not supported)|no provider", statuses=[400, 404]),
    Code(
        "quota", text=r"\b(today|daily|per day)\b.*\bquota|quota.*\b(today|daily|per day)\b|今日|今天", statuses=[429]
    ),
    Code("service_failing", text="server is busy", statuses=[500, 503]),
    *COMMON_CODES,
)
HINTS = {
    "quota": "tell the user: today's quota is used up, and it comes back tomorrow (the vendor names no hour); do not "
    "retry before, and do not take another account for it",
    "balance": "tell the user: ModelScope answers so where the account's points are used up, and for a model that it "
    "has retired (--check says whether the model is listed); do not retry",
    "access_denied": "tell the user: no fault of the key; on ModelScope's site the account must be bound to an Alibaba "
    "Cloud account with real-name verification, and the terms of the model accepted; do not retry before",
    "not_found": "tell the user: ModelScope may have retired the model (--check says whether it is listed); another "
    "--provider may have it",
}


class ModelScope(Provider):
    """Submits a task, asks after it, and reads from the headers of each answer what is left of the quota."""

    name = "modelscope"
    key_places = KeyPlaces(
        variable="MODELSCOPE_API_KEY",
        aliases=("MODELSCOPE_SDK_TOKEN", "MODELSCOPE_API_TOKEN", "MODELSCOPE_TOKEN", "MODELSCOPE_ACCESS_TOKEN"),
    )
    roots: ClassVar = {
        "china": "https://api-inference.modelscope.cn/v1",
        "international": "https://api-inference.modelscope.ai/v1",
    }
    region_aliases: ClassVar = {"cn": "china", "ai": "international", "intl": "international"}
    default_region = "china"
    base_url_variables = ("MODELSCOPE_BASE_URL",)
    default_root = "/v1"
    generate_path = "/images/generations"
    requests_per_minute = 60.0  # no limit is published: a careful one
    calls_at_once = 1
    https_links_under = "aliyuncs.com"
    links_elsewhere = True
    costs_quota = True
    long_prompt = MAX_PROMPT

    def owns(self, host: str) -> bool:
        return self.region_of(host) is not None

    def region_of(self, host: str) -> str | None:
        return next((region for region, root in self.roots.items() if host == urlsplit(root).hostname), None)

    def cannot(self, request: ImageRequest) -> list[str]:
        sentences = []
        if len(request.prompt) > MAX_PROMPT:
            sentences.append(f"prompt: {len(request.prompt)} characters; {self.name} takes at most {MAX_PROMPT}")
        least, most = SIDES
        if any(side % SIDE_STEP or not least <= side <= most for side in request.width_height):
            rule = f"only sides from {least} to {most} that are multiples of {SIDE_STEP}"
            sentences.append(f"size: {request.size}; {self.name} draws {rule}")
        if request.prompt_extend:
            sentences.append(f"prompt_extend: {self.name} does not rewrite prompts; leave it out")
        return sentences

    def price(self, request: ImageRequest, region: str) -> Price:
        basis = "free within the account's daily quota: each call costs quota, and may cost points (Magicubes)"
        return Price(0.0, basis, "2026")

    def payload(self, request: ImageRequest) -> dict[str, Any]:
        """Steps and guidance are left to the service: its floor for guidance is above what this model is made for."""
        size = request.size.replace("*", "x")
        return {"model": MODEL, "prompt": request.prompt, "size": size, "seed": request.seed}

    def submit(self, payload: dict[str, Any], endpoint: Endpoint, key: str, workspace: str | None) -> HttpCall:
        return json_post(endpoint.url, payload, bearer(key) | {"X-ModelScope-Async-Mode": "true"})

    def read(self, answer: HttpAnswer, request: ImageRequest, now: dt.datetime) -> Generated | Submitted:
        self._note_quota(answer)
        begun = read_begun_json(answer) or {}
        said = begun.get("task_id")
        # A task that has a name exists, and may have used quota, whatever fault is told beside it.
        exists = said not in (None, "") and (answer.status < 300 or answer.status == 429 or answer.status >= 500)
        if not exists and (made := found_elsewhere(answer, begun, now + LINK_LIFETIME)):
            return made._replace(quota=self.quota.told)
        if not exists:
            failure = failure_of(answer)
            if failure.code == "no_image":
                message = f"the service took the request and named no task: {failure.message}"
                raise failure.but(code="answer_unusable", message=message, hint=KINDS["answer_unusable"].hint)
            raise failure
        task_id = str(said) if isinstance(said, int) and not isinstance(said, bool) else said
        if not isinstance(task_id, str) or not is_task_id(task_id):
            raise Failure("answer_unusable", f"the service named its task {shown(said)}, which is no usable name")
        if quota_in(answer).least_left is None:  # what was told before is true but for this call
            self.quota = self.quota.after_a_call()
        return Submitted(task_id, request_id(answer, begun) or task_id)

    def poll(self, task_id: str, endpoint: Endpoint, key: str) -> HttpCall:
        headers = bearer(key) | {"X-ModelScope-Task-Type": "image_generation"}
        return HttpCall("GET", f"{endpoint.root}/tasks/{quote(task_id, safe='')}", headers)

    def poll_pause(self, asked: int) -> float:
        return PAUSE if asked < PAUSES else LATER_PAUSE

    def read_poll(self, answer: HttpAnswer, request: ImageRequest, now: dt.datetime) -> Generated | None:
        self._note_quota(answer)
        body = read_json(answer) or {}
        status = str(body.get("task_status")).upper()
        links = links_in(body.get("output_images")) if status in ENDED_WELL else []
        if not links and (not body or not 200 <= answer.status < 300):  # a picture that is there was made
            raise failure_of(answer)
        said = outside_text(said_in(answer, body).message)
        if status in FAILED:
            kind = "blocked" if re.search(UNSAFE, said, re.IGNORECASE) else "task_failed"
            side = refused_side(said) if kind == "blocked" else None
            told = f"the task failed: {said or 'the service does not say why'}"
            raise Failure(kind, told, billed="no", refused=side)
        if status not in ENDED_WELL:
            return None  # a word that is not known does not end a task
        if not links and (made := found_elsewhere(answer, body, now + LINK_LIFETIME)):
            return made._replace(quota=self.quota.told)
        if not links:
            message = f"the task succeeded, and no picture is in the answer{said and f': {said}'}"
            raise Failure("no_image", message, answer=kept_answer(answer, traces_in(body)))
        return Generated(
            image_url=links[0],
            expires_at=link_expiry(links[0], now + LINK_LIFETIME),
            request_id=request_id(answer, body) or outside_text(body.get("task_id"), 200),
            usage={"time_taken": outside_json(body["time_taken"])} if body.get("time_taken") else {},
            other_urls=tuple(links[1:]),
            quota=self.quota.told,
        )

    def query(self, endpoint: Endpoint, key: str, workspace: str | None) -> HttpCall:
        """The list of models, which any key is shown."""
        return HttpCall("GET", f"{endpoint.root}/models", bearer(key))

    def read_query(self, answer: HttpAnswer) -> bool:
        self._note_quota(answer)
        listed = at(read_json(answer), "data")
        if answer.status != 200 or not isinstance(listed, list):
            raise failure_of(answer)
        return any(at(model, "id") == MODEL for model in listed)

    def key_query(self, endpoint: Endpoint, key: str) -> HttpCall:
        """The balance of points, which only the owner of a key is told, on the site that has given it out.

        A server of somebody else that the user trusts with the key is asked itself.
        """
        region = self.region_of(endpoint.host)
        site = (
            f"https://{endpoint.host.removeprefix('api-inference.')}" if region else endpoint.root.removesuffix("/v1")
        )
        return HttpCall("GET", site + BALANCE_PATH, bearer(key))

    def read_key_query(self, answer: HttpAnswer) -> dict[str, Any]:
        body = read_json(answer)
        if body is None:  # a page of whoever stands before the service says nothing of the key
            raise Failure("answer_unusable", "what came back is not the service's JSON")
        if answer.status != 200 or body.get("success") is False:
            raise failure_of(answer)
        balance = at(body, "data", "available_balance")
        return {"magicubes": balance} if type(balance) in (int, float) else {}

    def _note_quota(self, answer: HttpAnswer) -> None:
        self.quota = self.quota._replace(**quota_in(answer).told)


def quota_in(answer: HttpAnswer) -> Quota:
    """What the headers of an answer tell of the quota."""
    said = {name: answer.headers.get(header, "").strip() for name, header in HEADERS.items()}
    return Quota.of({name: int(text) for name, text in said.items() if re.fullmatch("[0-9]{1,9}", text)})


def failure_of(answer: HttpAnswer) -> Failure:
    """What an answer that is not a good one means.

    A 429 is the end of the quota where the headers tell that nothing is left of it, and tasks that are too many at once
    where they tell that something is; without them its words decide.
    """
    body, quota = read_json(answer), quota_in(answer)
    kind = kind_of(said_in(answer, body), answer.status, CODES)
    if answer.status == 429 and kind != "balance" and quota.least_left is not None:
        kind = "rate_limited" if quota.least_left else "quota"
    is_own_json = isinstance(at(body, "error") or at(body, "errors"), (dict, list))
    failure = service_failure(
        answer, kind=kind, is_own_json=is_own_json, request_id=request_id(answer, body or {}), codes=CODES
    )
    if failure.code == "rate_limited" and failure.fault.retry_after_s is None:
        return failure.but(retry_after_s=BUSY_PAUSE)
    told = f"{failure.message}; {quota}" if failure.code == "quota" and quota.told else failure.message
    return failure.but(message=told, hint=HINTS.get(failure.code, failure.fault.hint))


PROVIDER = ModelScope
