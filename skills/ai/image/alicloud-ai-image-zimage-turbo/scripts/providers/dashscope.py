"""Alibaba Cloud Model Studio (DashScope), the vendor of the model: one synchronous call, a signed link."""

from __future__ import annotations

import datetime as dt
import re
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

from zimage.answers import bearer, json_post, link_expiry, read_begun_json, read_json, request_id, service_failure
from zimage.endpoint import _LABEL
from zimage.keys import KeyPlaces
from zimage.outside import at, kept_text, outside_json
from zimage.provider import Generated, HttpCall, Price, Provider

if TYPE_CHECKING:
    from zimage.endpoint import Endpoint
    from zimage.errors import Failure
    from zimage.provider import HttpAnswer
    from zimage.request import ImageRequest


class DashScope(Provider):
    """Alibaba Cloud Model Studio, multimodal-generation API.

    Sources: references/api_reference.md and references/sources.md of this skill.
    """

    name = "dashscope"
    key_places = KeyPlaces(
        variable="DASHSCOPE_API_KEY",
        ini_file=".alibabacloud/credentials",
        ini_option="dashscope_api_key",
        ini_profile_variables=("ALIBABA_CLOUD_PROFILE", "ALICLOUD_PROFILE"),
        file_variable="DASHSCOPE_API_KEY_FILE_PATH",
        file=".dashscope/api_key",
    )
    roots: ClassVar = {
        "beijing": "https://dashscope.aliyuncs.com/api/v1",
        "singapore": "https://dashscope-intl.aliyuncs.com/api/v1",
    }
    region_aliases: ClassVar = {"cn-beijing": "beijing", "ap-southeast-1": "singapore"}
    default_region = "beijing"
    base_url_variables = ("DASHSCOPE_BASE_URL", "DASHSCOPE_HTTP_BASE_URL")
    workspace_variable = "DASHSCOPE_WORKSPACE"
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
    # Prefixes of the service's codes, folded to lower case without _ and -; the longest that fits counts,
    # and outranks the HTTP status.
    code_kinds: ClassVar = {
        "invalidparameter": "rejected_by_service",
        "badrequest": "rejected_by_service",
        "invalidurl": "rejected_by_service",
        "datainspectionfailed": "blocked",
        "arrearage": "balance",
        "invalidapikey": "key_rejected",
        "accessdenied": "access_denied",
        "model.accessdenied": "access_denied",
        "allocationquota": "quota",
        "throttling.allocationquota": "quota",
        "insufficientquota": "quota",
        "modelnotfound": "not_found",
        "notfound": "not_found",
        "throttling": "rate_limited",
        "internalerror": "service_failing",
        "serviceunavailable": "service_failing",
        "modelservingerror": "service_failing",
        "requesttimeout": "outcome_unknown",
    }

    def region_of(self, host: str) -> str | None:
        for region, root in self.roots.items():
            if host == urlsplit(root).hostname:
                return region
        word = re.fullmatch(r"dashscope-([a-z0-9]+)\.aliyuncs\.com", host)
        label = word or re.fullmatch(rf"(?:.*\.)?({_LABEL})\.(?:dashscope|maas)\.aliyuncs\.com", host)
        return self.region_aliases.get(label[1], label[1]) if label else None

    def owns(self, host: str) -> bool:
        return self.own_hosts.fullmatch(host) is not None

    def price(self, request: ImageRequest, region: str) -> Price:
        listed = self.prices.get(region) or max(self.prices.values())
        basis = f"{region} list price" if region in self.prices else f"highest list price; none is known for {region}"
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

    def read(self, answer: HttpAnswer, request: ImageRequest, now: dt.datetime) -> Generated:
        body = read_begun_json(answer)
        choice = at(body, "output", "choices", 0) or {}
        items = at(choice, "message", "content")
        items = [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []
        links = [item["image"] for item in items if isinstance(item.get("image"), str) and item["image"].strip()]
        if body is None or not links:  # a picture that is there was made, whatever status stands beside it
            raise self._failure(answer, read_json(answer))
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

    def _failure(self, answer: HttpAnswer, body: dict[str, Any] | None) -> Failure:
        """What an answer without a picture means, by the service's code and else by the HTTP status."""
        said = {name: value for name, value in (body or {}).items() if isinstance(value, str)}
        code = said.get("code", "")
        folded = re.sub("[_-]", "", code.lower())
        prefixes = [prefix for prefix in self.code_kinds if folded.startswith(prefix)]
        return service_failure(
            answer,
            message=said.get("message"),
            code=code,
            kind=self.code_kinds[max(prefixes, key=len)] if prefixes else None,
            is_own_json=bool(code),
            request_id=request_id(answer, body or {}),
        )


PROVIDER = DashScope
