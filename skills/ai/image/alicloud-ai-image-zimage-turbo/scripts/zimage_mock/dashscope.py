"""DashScope, Alibaba Cloud Model Studio."""

from __future__ import annotations

import re
import uuid
import zlib
from collections.abc import Mapping

from zimage_mock import rules
from zimage_mock.drawing import Picture
from zimage_mock.errors import BALANCE_NAMES, RATE_NAMES, Dialect
from zimage_mock.exchange import Order, Reply, Request, json_reply
from zimage_mock.provider import Provider, Studio
from zimage_mock.rules import Rule

Entry = Mapping[str, object]
DEFAULT_SIZE = "1024*1536"
REWRITES = (
    "in soft morning light, wide composition with a calm foreground, natural colors, fine detail",
    "at dusk, warm light from the side, layered depth from near to far, crisp textures",
    "under a clear sky, balanced composition, gentle contrast, rich but restrained colors",
)
DIALECT = Dialect(
    "dashscope",
    lambda status, code, message: {"code": code, "message": message, "request_id": str(uuid.uuid4())},
    {
        "400": (400, "InvalidParameter"),
        "blocked": (400, "DataInspectionFailed"),
        **dict.fromkeys(BALANCE_NAMES, (400, "Arrearage")),
        "401": (401, "InvalidApiKey"),
        "403": (403, "Model.AccessDenied"),
        "quota": (403, "AllocationQuota.FreeTierOnly"),
        "quota-429": (429, "Throttling.AllocationQuota"),
        "404": (404, "ModelNotFound"),
        **dict.fromkeys(RATE_NAMES, (429, "Throttling.RateQuota")),
        "500": (500, "InternalError"),
        "503": (503, "ServiceUnavailable"),
        "timeout": (500, "RequestTimeOut"),
    },
)


class DashScope(Provider):
    """Alibaba Cloud Model Studio: generation in one synchronous call, and free queries of models and limits."""

    prefix = "/api/v1/"
    dialect = DIALECT
    generation_path = f"{prefix}services/aigc/multimodal-generation/generation"
    model = "z-image-turbo"
    parameters: Mapping[str, Rule] = {
        "size": rules.size("*"),
        "seed": rules.integer(0, rules.MAX_SEED),
        "prompt_extend": rules.boolean(),
        # What clients of the vendor's other image models send along: taken where it asks for nothing else.
        "n": rules.integer(1, 1),
        "max_images": rules.integer(1, 1),
        "watermark": rules.boolean(),
        "negative_prompt": rules.string(),
    }

    def __init__(self, studio: Studio) -> None:
        super().__init__(studio)
        self._routes = {
            self.generation_path: {"POST": self._generate},
            f"{self.prefix}models": {"GET": self._models},
            f"{self.prefix}quotas": {"GET": self._quotas},
        }

    def _models(self, request: Request) -> Reply:
        listed, page = self._page(request, "model_queries", {"model": self.model, "name": "Z-Image-Turbo"})
        return self._told({"models": listed, "total": page["total"]})

    def _quotas(self, request: Request) -> Reply:
        limit = {"request_limit": self._studio.rpm or None, "request_limit_period": 60, "usage_limit": None}
        quota = {"model": self.model, "workspace_id": "ws-mock", "model_limit": limit, "workspace_limit": None}
        listed, page = self._page(request, "quota_queries", quota)
        return self._told({**page, "quotas": listed})

    def _page(self, request: Request, counter: str, entry: Entry) -> tuple[list[Entry], dict[str, int]]:
        """The page that is asked for of a list of one entry, and what is said of it."""
        self._authorize(request)
        self._studio.ledger.count(counter)
        page_no, page_size = (request.query.get(name, "1") for name in ("page_no", "page_size"))
        if not all(re.fullmatch("[1-9][0-9]{0,3}", number) for number in (page_no, page_size)):
            raise self._refusal("400", "page_no and page_size must be positive integers")
        found = [entry] if request.query.get("model", self.model) == self.model else []
        page = {"page_no": int(page_no), "page_size": int(page_size), "total": len(found)}
        return found if page_no == "1" else [], page

    @staticmethod
    def _told(output: Mapping[str, object]) -> Reply:
        return json_reply({"request_id": str(uuid.uuid4()), "output": output})

    def _order(self, body: object) -> Order:
        body = self._object(body, "body", {"model", "input"}, "parameters")
        if not isinstance(body["model"], str):
            raise self._refusal("400", "model must be a string")
        if body["model"] != self.model:
            raise self._refusal("404")
        messages = self._object(body["input"], "input", {"messages"})["messages"]
        message = self._object(self._single(messages, "input.messages"), "message", {"role", "content"})
        if message["role"] != "user":
            raise self._refusal("400", "the role of the message must be user")
        item = self._fields(self._single(message["content"], "content"), "content item", {"text": rules.text()}, "text")
        parameters = self._fields(self._without_nulls(body.get("parameters", {})), "parameters", self.parameters)
        return Order(self.model, item["text"], parameters)

    def _without_nulls(self, value: object) -> object:
        """Null stands for what is left out: the official command line sends it for each option that is not given."""
        if not isinstance(value, dict):
            return value
        return {name: item for name, item in value.items() if item is not None or name not in self.parameters}

    def _single(self, value: object, where: str) -> object:
        if not isinstance(value, list) or len(value) != 1:
            raise self._refusal("400", f"{where} must be a list of exactly one item")
        return value[0]

    def _make(self, order: Order, fault: str) -> Reply:
        prompt, parameters = order.prompt, order.parameters
        rewritten = _rewrite(prompt) if parameters.get("prompt_extend") else ""
        width, height = map(int, parameters.get("size", DEFAULT_SIZE).split("*"))
        picture = Picture(rewritten or prompt, parameters.get("seed", rules.random_seed()), width, height)
        if fault == "no-image":
            return self._success(picture, rewritten, None)
        self._studio.ledger.bill()  # before the pause: a client that gives up meanwhile has paid all the same
        link = self._studio.gallery.issue(picture, self._faults[fault])
        self._studio.pause()
        return self._success(picture, rewritten, link)

    @staticmethod
    def _success(picture: Picture, rewritten: str, link: str | None) -> Reply:
        """The 200, billed where there is a picture. Without a link it is what a blocked picture can look like."""
        reasoning = f"The user gave a short prompt. I keep its subject and add light and detail: {rewritten}"
        message = {
            "role": "assistant",
            "content": [*([{"image": link}] if link else []), {"text": picture.prompt}],
            "reasoning_content": reasoning if rewritten else "",
        }
        no_tokens = dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), 0)
        body = {
            "request_id": str(uuid.uuid4()),
            "output": {"choices": [{"finish_reason": "stop", "message": message}]},
            "usage": {"width": picture.width, "height": picture.height, "image_count": int(bool(link)), **no_tokens},
        }
        return json_reply(body, billed=bool(link), code="" if link else "no-image")


def _rewrite(prompt: str) -> str:
    """The prompt with more words; the same prompt always gets the same ones."""
    return f"{prompt.strip().rstrip('.')}, {REWRITES[zlib.crc32(prompt.encode()) % len(REWRITES)]}"
