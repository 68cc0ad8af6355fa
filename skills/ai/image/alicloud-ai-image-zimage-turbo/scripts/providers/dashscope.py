"""Alibaba Cloud Model Studio (DashScope), the vendor of the model: one synchronous call, a signed link."""

from __future__ import annotations

import datetime as dt
import re
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote, urlsplit

from zimage.answers import (
    bearer,
    found_elsewhere,
    json_post,
    link_expiry,
    read_begun_json,
    read_json,
    request_id,
    service_failure,
)
from zimage.calls import Generated, HttpCall, Submitted
from zimage.codes import COMMON_CODES, Code
from zimage.endpoint import _LABEL, UNKNOWN_REGION
from zimage.errors import Failure
from zimage.keys import KeyPlaces
from zimage.outside import at, kept_text, outside_json
from zimage.provider import ConfigFile, Price, Provider, RateLimit
from zimage.task import is_task_id
from zimage.traces import ENDED_BADLY, ENDED_WELL, traces_in

if TYPE_CHECKING:
    from zimage.calls import HttpAnswer
    from zimage.endpoint import Endpoint
    from zimage.request import ImageRequest


# The service's codes, native and in OpenAI's form, of the vendor's error pages (references/sources.md). The allocated
# quota is the use of a second or a minute; only the free one comes to an end.
CODES = (
    Code("quota", "Throttling.AllocationQuota insufficient_quota", text="free allocated quota exceeded"),
    Code("quota", "Throttling.AllocationQuota insufficient_quota", statuses=[403]),
    Code("rate_limited", "Throttling LimitRequests limit_burst_rate insufficient_quota"),
    Code("quota", "AllocationQuota FreeTierOnly"),
    Code("balance", "Arrearage CommodityNotPurchased PrepaidBillOverdue PostpaidBillOverdue"),
    Code("blocked", "DataInspectionFailed IPInfringementSuspect FaqRuleBlocked CustomRoleBlocked"),
    Code("key_rejected", "InvalidApiKey NotAuthorized"),
    Code("rejected_by_service", "AccessDenied", text="asynchronous"),
    Code("quota", "AccessDenied", text="free (allocated )?quota|free tier"),
    Code("access_denied", "AccessDenied NotAuthorised"),
    Code("not_found", "ModelNotFound model_not_supported WorkSpaceNotFound NotFound"),
    Code("outcome_unknown", "RequestTimeOut ResponseTimeout InternalError.Timeout GatewayTimeoutError"),
    Code("outcome_unknown", "ClientDisconnect APIConnectionError"),
    Code("rejected_by_service", "InvalidParameter invalid_parameter_error invalid_value BadRequest* InvalidURL*"),
    Code("rejected_by_service", "invalid_request_error", statuses=[200, 400, 409, 413, 422]),
    Code("rejected_by_service", "UnsupportedOperation InvalidSchema Conflict RequestTooLargeError"),
    Code("rejected_by_service", "ServiceUnavailableError"),  # an empty input, or a wrong role
    Code("rejected_by_service", "InternalError.Algo", statuses=range(400, 500)),
    Code("service_failing", "InternalError SystemError ModelServiceFailed RewriteFailed"),
    Code("service_failing", "ModelServingError ModelUnavailable ServiceUnavailable"),
    Code("balance", text="account is in good standing|bill is overdue"),
    Code("blocked", text="inappropriate content", statuses=[400]),
    *COMMON_CODES,
)


class DashScope(Provider):
    """Alibaba Cloud Model Studio, multimodal-generation API.

    Sources: references/api_reference.md and references/sources.md of this skill.
    """

    name = "dashscope"
    config_file = ConfigFile("DASHSCOPE_CONFIG", ".dashscope/config.toml")
    key_places = KeyPlaces(
        variable="DASHSCOPE_API_KEY",
        ini_file=".alibabacloud/credentials",
        ini_option="dashscope_api_key",
        ini_profile_variables=("ALIBABA_CLOUD_PROFILE", "ALICLOUD_PROFILE"),
        file_variable="DASHSCOPE_API_KEY_FILE_PATH",
        config_file=config_file,
        file=".dashscope/api_key",
        unfit={
            "sk-sp-": "is one of a Coding Plan or Token Plan (sk-sp-…): these plans have other hosts, not this model, "
            "and are for coding tools alone; a pay-as-you-go key is needed"
        },
    )
    roots: ClassVar = {
        "beijing": "https://dashscope.aliyuncs.com/api/v1",
        "singapore": "https://dashscope-intl.aliyuncs.com/api/v1",
    }
    region_aliases: ClassVar = {"cn-beijing": "beijing", "ap-southeast-1": "singapore", "intl": "singapore"}
    # Of the official client 2.0.2; the model's page of 2026-10 names the two above.
    other_regions = ("cn-hongkong", "us-east-1", "eu-central-1", "ap-northeast-1")
    default_region = "beijing"
    base_url_variables = ("DASHSCOPE_BASE_URL", "DASHSCOPE_HTTP_BASE_URL")
    region_variables = ("DASHSCOPE_REGION", "DASHSCOPE_API_REGION")
    workspace_variable = "DASHSCOPE_WORKSPACE"
    workspace_id_variable = "DASHSCOPE_WORKSPACE_ID"
    default_root = "/api/v1"
    generate_path = "/services/aigc/multimodal-generation/generation"
    requests_per_minute = 120.0
    https_links_under = "aliyuncs.com"

    model = "z-image-turbo"
    link_lifetime = dt.timedelta(hours=24)
    price_list_date = "2026"
    prices: ClassVar = {"beijing": (0.01434, 0.02868), "singapore": (0.015, 0.03)}  # US$: plain, prompt_extend
    own_hosts = re.compile(
        rf"dashscope\.aliyuncs\.com|dashscope-[a-z0-9]+\.aliyuncs\.com|(?:{_LABEL}\.)+(?:dashscope|maas)\.aliyuncs\.com"
    )

    def region_of(self, host: str) -> str | None:
        for region, root in self.roots.items():
            if host == urlsplit(root).hostname:
                return region
        word = re.fullmatch(r"dashscope-([a-z0-9]+)\.aliyuncs\.com", host)
        label = word or re.fullmatch(rf"(?:.*\.)?({_LABEL})\.(?:dashscope|maas)\.aliyuncs\.com", host)
        return self.region_aliases.get(label[1], label[1]) if label else None

    def workspace_root(self, workspace: str, region: str) -> str:
        name = next(name for name, own in self.region_aliases.items() if own == region)  # the first is the host's
        return f"https://{workspace}.{name}.maas.aliyuncs.com{self.default_root}"

    def owns(self, host: str) -> bool:
        return self.own_hosts.fullmatch(host) is not None

    def price(self, request: ImageRequest, region: str) -> Price:
        if region == UNKNOWN_REGION:
            listed = self.prices[self.default_region]
            basis = f"{self.default_region} list price of the vendor, what this server charges is not known"
        else:
            listed = self.prices.get(region) or max(self.prices.values())
            known = region in self.prices
            basis = f"{region} list price" if known else f"highest list price; none is known for {region}"
        extended = " with prompt_extend" if request.prompt_extend else ""
        return Price(listed[request.prompt_extend], f"{basis}, one picture{extended}", self.price_list_date)

    def payload(self, request: ImageRequest) -> dict[str, Any]:
        return {
            "model": self.model,
            "input": {"messages": [{"role": "user", "content": [{"text": request.prompt}]}]},
            "parameters": {"size": request.size, "prompt_extend": request.prompt_extend, "seed": request.seed},
        }

    def submit(self, payload: dict[str, Any], endpoint: Endpoint, key: str, workspace: str | None) -> HttpCall:
        return json_post(endpoint.url, payload, self._headers(key, workspace))

    def query(self, endpoint: Endpoint, key: str, workspace: str | None) -> HttpCall:
        url = f"{endpoint.root}/models?model={self.model}&page_no=1&page_size=1"
        return HttpCall("GET", url, self._headers(key, workspace))

    def _headers(self, key: str, workspace: str | None) -> dict[str, str]:
        return bearer(key) | ({"X-DashScope-WorkSpace": workspace} if workspace else {})

    def read(self, answer: HttpAnswer, request: ImageRequest, now: dt.datetime) -> Generated | Submitted:
        body = read_begun_json(answer)
        if made := self._picture(answer, body, request, now):
            return made
        traces = traces_in(body)
        task_id = str(at(body, "output", "task_id") or at(body, "task_id") or "")
        is_open = 200 <= answer.status < 300 and traces.task_status not in (*ENDED_WELL, *ENDED_BADLY)
        if is_open and task_id in traces.task_ids and is_task_id(task_id):  # a gateway may have asked for one
            return Submitted(task_id, request_id(answer, body or {}))
        raise self._failure(answer, read_json(answer), request.prompt)

    def poll(self, task_id: str, endpoint: Endpoint, key: str) -> HttpCall:
        """The free question of the vendor's services that work by tasks; this model's own calls name none."""
        return HttpCall("GET", f"{endpoint.root}/tasks/{quote(task_id, safe='')}", bearer(key))

    def read_poll(self, answer: HttpAnswer, request: ImageRequest, now: dt.datetime) -> Generated | None:
        body = read_json(answer)
        if made := self._picture(answer, body, request, now):
            return made
        status = traces_in(body).task_status
        failure = self._failure(answer, body, request.prompt)
        if body is None or not 200 <= answer.status < 300 or status == "UNKNOWN":
            raise failure if status != "UNKNOWN" else Failure("not_found", failure.message)
        if status in (*ENDED_WELL, *ENDED_BADLY):
            raise failure
        return None

    def _picture(
        self, answer: HttpAnswer, body: dict[str, Any] | None, request: ImageRequest, now: dt.datetime
    ) -> Generated | None:
        """The picture in an answer: one that is there was made, whatever status stands beside it."""
        choice = at(body, "output", "choices", 0) or {}
        items = at(choice, "message", "content")
        items = [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []
        links = [item["image"] for item in items if isinstance(item.get("image"), str) and item["image"].strip()]
        if body is None or not links:
            return found_elsewhere(answer, body, now + self.link_lifetime)
        text = next((item["text"] for item in items if isinstance(item.get("text"), str)), "")
        reasoning = at(choice, "message", "reasoning_content") or next(
            (item["reasoning_content"] for item in items if item.get("reasoning_content")), ""
        )
        usage = outside_json(body.get("usage"))
        return Generated(
            image_url=links[0].strip(),
            expires_at=link_expiry(links[0], now + self.link_lifetime),
            request_id=request_id(answer, body),
            rewritten_prompt=kept_text(text) if request.prompt_extend or text != request.prompt else "",
            reasoning=kept_text(reasoning),
            usage=usage if isinstance(usage, dict) else {},
            other_urls=tuple(links[1:]),
        )

    def read_query(self, answer: HttpAnswer) -> bool:
        body = read_json(answer)
        if body is None or answer.status != 200 or body.get("code"):
            raise self._failure(answer, body)
        models = at(body, "output", "models")
        return isinstance(models, list) and any(isinstance(m, dict) and self.model in m.values() for m in models)

    def limits(self, endpoint: Endpoint, key: str, workspace: str | None) -> HttpCall:
        url = f"{endpoint.root}/quotas?model={self.model}&page_no=1&page_size=20"
        return HttpCall("GET", url, self._headers(key, workspace))

    def read_limits(self, answer: HttpAnswer, workspace: str | None) -> RateLimit | None:
        """The strictest limit of the workspace, where it is listed, else of all that are."""
        quotas = at(read_json(answer), "output", "quotas") if answer.status == 200 else None
        listed = [q for q in quotas if at(q, "model") == self.model] if isinstance(quotas, list) else []
        listed = [q for q in listed if workspace and at(q, "workspace_id") == workspace] or listed
        said = [at(quota, name) for quota in listed for name in ("model_limit", "workspace_limit")]
        numbers = [(at(limit, "request_limit"), at(limit, "request_limit_period")) for limit in said]
        limits = [RateLimit(*pair) for pair in numbers if all(type(n) in (int, float) and 0 < n < 10**6 for n in pair)]
        return min(limits, key=lambda limit: limit.per_minute, default=None)

    def _failure(self, answer: HttpAnswer, body: dict[str, Any] | None, prompt: str = "") -> Failure:
        """What an answer without a picture means, by the service's code and else by the HTTP status."""
        body = body or {}
        failure = service_failure(
            answer,
            is_own_json=isinstance(body.get("code"), str) and re.search("[A-Za-z]", body["code"]) is not None,
            request_id=request_id(answer, body),
            codes=CODES,
            prompt=prompt,
        )
        has_failed = traces_in(body).task_status in ENDED_BADLY
        if has_failed and failure.code != "blocked" and 200 <= answer.status < 300:  # a task, which is not charged then
            return Failure("task_failed", failure.message, service_code=failure.fault.service_code)
        return failure


PROVIDER = DashScope
