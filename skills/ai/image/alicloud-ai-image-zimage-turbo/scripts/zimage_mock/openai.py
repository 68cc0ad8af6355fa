"""OpenAI's Images API, as vLLM-Omni and SGLang speak it."""

from __future__ import annotations

import base64
import math
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace

from zimage_mock import rules
from zimage_mock.drawing import Picture
from zimage_mock.errors import BALANCE_NAMES, RATE_NAMES, Dialect
from zimage_mock.exchange import Order, Reply, Request, json_reply
from zimage_mock.faults import OK, Fault
from zimage_mock.gallery import delivered
from zimage_mock.provider import Provider, Studio
from zimage_mock.rules import Rule


def _openai_error(status: int, code: str, message: str) -> object:
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


DIALECT = Dialect(
    "openai",
    _openai_error,
    {
        "400": (400, "invalid_value"),
        "blocked": (400, "moderation_blocked"),
        **dict.fromkeys(BALANCE_NAMES, (402, "insufficient_balance")),
        "401": (401, "invalid_api_key"),
        "403": (403, "insufficient_permissions"),
        "quota-429": (429, "insufficient_quota"),
        "404": (404, "model_not_found"),
        **dict.fromkeys(RATE_NAMES, (429, "rate_limit_exceeded")),
        "500": (500, "server_error"),
        "503": (503, "overloaded"),
        "timeout": (504, "timeout"),
    },
)
FORM_FAULTS = {
    "url": Fault("a link where base64 was asked for"),
    "data-url": Fault("a link that is the picture, as data:image/...;base64,..."),
    "bad-base64": Fault("base64 that cannot be decoded"),
}


class OpenAI(Provider):
    """A server of one's own: a key is optional, nothing limits the rate, and the picture is in the answer itself."""

    prefix = "/v1/"
    dialect = DIALECT
    own_faults = FORM_FAULTS
    limited = False
    model = "Tongyi-MAI/Z-Image-Turbo"
    fields: Mapping[str, Rule] = {
        "prompt": rules.text(),
        "n": rules.integer(1, 10),
        "size": rules.size("x", multiple=16),
        "response_format": rules.one_of("b64_json", "url"),
        "output_format": rules.one_of("png", "jpeg", "webp"),
        "seed": rules.integer(0, 2**64 - 1),
        "num_inference_steps": rules.integer(1, 200),
        "guidance_scale": (lambda value: type(value) in (int, float) and 0 <= value < math.inf, "a number from 0 on"),
        **dict.fromkeys(
            ("model", "negative_prompt", "user", "quality", "style", "background"),
            rules.string(),
        ),
    }

    def __init__(self, studio: Studio) -> None:
        super().__init__(studio)
        self._routes = {
            f"{self.prefix}images/generations": {"POST": self._generate},
            f"{self.prefix}models": {"GET": self._models},
        }

    def answer(self, request: Request) -> Reply:
        """Answer one request under /v1/, with an id to ask for it in the server's log."""
        reply = super().answer(request)
        return replace(reply, headers={**reply.headers, "x-request-id": f"req_{uuid.uuid4().hex}"})

    def _authorize(self, request: Request) -> None:
        if "authorization" in request.headers:
            super()._authorize(request)

    def _models(self, request: Request) -> Reply:
        self._authorize(request)
        self._studio.ledger.count("model_queries")
        model = {"id": self.model, "object": "model", "created": int(time.time()), "owned_by": "vllm"}
        return json_reply({"object": "list", "data": [model]})

    def _order(self, body: object) -> Order:
        if isinstance(body, dict):  # null stands for what is left out
            body = {name: value for name, value in body.items() if value is not None or name not in self.fields}
        fields = self._fields(body, "body", self.fields, "prompt")
        return Order(fields.pop("model", self.model), fields.pop("prompt"), fields)

    def _make(self, order: Order, fault: str) -> Reply:
        wanted = order.parameters
        width, height = map(int, wanted.get("size", "1024x1024").split("x"))
        first = Picture(
            order.prompt, wanted.get("seed", rules.random_seed()), width, height, wanted.get("output_format", "png")
        )
        count = 0 if fault == "no-image" else wanted.get("n", 1)
        self._studio.ledger.bill(count)  # before the pause, as for DashScope
        form = fault if fault in FORM_FAULTS else wanted.get("response_format", "b64_json")
        pictures = (replace(first, seed=first.seed + i) for i in range(count))
        data = [self._item(picture, form, self._faults[fault]) for picture in pictures]
        self._studio.pause()
        code = "" if data else "no-image"
        return json_reply({"created": int(time.time()), "data": data}, billed=bool(data), code=code)

    def _item(self, picture: Picture, form: str, fault: Fault) -> dict[str, str]:
        """One picture in the form asked for, or in that of the fault."""
        if form == "url":
            return {"url": self._studio.gallery.issue(picture, fault)}
        file = delivered(picture, fault)
        if file.status != 200 or file.delivery != "whole":  # what can only befall a link does not befall bytes
            file = delivered(picture, OK)
        code = base64.b64encode(file.body).decode()
        if form == "data-url":
            return {"url": f"data:{file.content_type};base64,{code}"}
        # Neither its letters nor its length are those of base64: a decoder that forgives the one minds the other.
        return {"b64_json": f"*{code[:-3]}" if form == "bad-base64" else code}
