"""Any server with OpenAI's Images API, such as vLLM-Omni and SGLang: your own, on one GPU or many.

Sources: references/providers.md of this skill. Beyond OpenAI's own fields these engines take seed, steps and guidance.
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import re
from typing import Any, ClassVar
from urllib.parse import unquote_to_bytes

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
from zimage.contract import MAX_IMAGE_BYTES, MIB
from zimage.endpoint import Endpoint
from zimage.errors import Failure
from zimage.keys import KeyPlaces
from zimage.outside import at, kept_text, outside_json
from zimage.provider import GUIDANCE, STEPS, Generated, HttpAnswer, HttpCall, OpenModel, Setting
from zimage.request import ImageRequest

STATUS_KINDS = {402: "balance", 413: "rejected_by_service", 422: "rejected_by_service"}
LINK_LIFETIME = dt.timedelta(hours=1)  # OpenAI's own; engines that link to themselves say nothing
THIS_MODEL = re.compile("z-?image", re.IGNORECASE)


def image_format(text: str) -> str:
    if text not in ("png", "jpeg", "webp"):
        raise ValueError("png, jpeg or webp")
    return text


def model_name(text: str) -> str:
    if not re.fullmatch("[!-~]{1,300}", text):
        raise ValueError("a name without blanks")
    return text


class OpenAI(OpenModel):
    """One POST, answered with the picture in base64, or with a link to it."""

    name = "openai"
    key_places = KeyPlaces(variable="OPENAI_API_KEY", optional=True)
    roots: ClassVar = {"self-hosted": ""}
    default_region = "self-hosted"
    base_url_variables = ("OPENAI_BASE_URL",)
    default_root = "/v1"
    generate_path = "/images/generations"
    max_answer_bytes = MAX_IMAGE_BYTES * 4 // 3 + MIB  # base64 of the largest picture
    links_to_itself = True
    own_settings = (
        STEPS,
        GUIDANCE,
        Setting("image_format", "FORMAT", "png, jpeg or webp to ask for; else the server chooses", None, image_format),
        Setting("model", "NAME", "model name to send, where the server serves several", None, model_name),
    )

    def root_of(self, path: str) -> str | None:
        return path.removesuffix(self.generate_path) or self.default_root

    def payload(self, request: ImageRequest) -> dict[str, Any]:
        fields = {
            "model": self.settings["model"],
            "prompt": request.prompt,
            "size": "{}x{}".format(*request.width_height),
            "n": 1,
            "response_format": "b64_json",
            "seed": request.seed,
            "num_inference_steps": self.settings["steps"],
            "guidance_scale": self.settings["guidance"],
            "output_format": self.settings["image_format"],
        }
        return {name: value for name, value in fields.items() if value is not None}

    def submit(self, payload: dict[str, Any], endpoint: Endpoint, key: str, workspace: str | None) -> HttpCall:
        return json_post(endpoint.url, payload, bearer(key))

    def read(self, answer: HttpAnswer, request: ImageRequest, now: dt.datetime) -> Generated:
        body = read_begun_json(answer)
        pictures = at(body, "data")
        pictures = [p for p in pictures if isinstance(p, dict)] if isinstance(pictures, list) else []
        pictures = [p for p in pictures if is_text(p.get("b64_json")) or is_text(p.get("url"))]
        if body is None or not pictures:  # a picture that is there was made, whatever status stands beside it
            elsewhere = found_elsewhere(answer, body, now + LINK_LIFETIME)
            if elsewhere is None:
                raise failure_of(answer, read_json(answer), request.prompt)
            return elsewhere
        picture, *more = pictures
        content = bytes_in(picture)
        link = "" if content else str(picture["url"]).strip()
        said = kept_text(picture.get("revised_prompt"))
        others = tuple(p["url"] for p in more if is_text(p.get("url")) and not is_data(p["url"]))
        usage = outside_json(body.get("usage"))
        return Generated(
            image_url=link,
            content=content,
            expires_at=link_expiry(link, now + LINK_LIFETIME) if link else None,
            request_id=request_id(answer, body),
            rewritten_prompt=said if said != request.prompt else "",
            usage=usage if isinstance(usage, dict) else {},
            other_urls=others,
            warnings=(f"the server sent {len(pictures)} pictures; only the first is kept",)
            if more and not others
            else (),
        )

    def query(self, endpoint: Endpoint, key: str, workspace: str | None) -> HttpCall:
        return HttpCall("GET", f"{endpoint.root}/models", bearer(key))

    def read_query(self, answer: HttpAnswer) -> bool:
        body = read_json(answer)
        models = at(body, "data")
        if answer.status != 200 or not isinstance(models, list):
            raise failure_of(answer, body)
        names = [str(at(model, "id")) for model in models]
        wanted = self.settings["model"]
        return any(name == wanted if wanted else THIS_MODEL.search(name) for name in names)


URL_SAFE = str.maketrans("-_", "+/")  # some servers write base64 so


def is_text(value: object) -> bool:
    return isinstance(value, str) and value.strip() != ""


def is_data(link: str) -> bool:
    return link.lstrip()[:5].lower() == "data:"


def bytes_in(picture: dict[str, Any]) -> bytes:
    """The bytes that an answer hands over, in base64 or as a data: link; none where it holds a link.

    Raises:
        Failure: answer_unusable.
    """
    text = picture.get("b64_json")
    if not is_text(text):
        text = picture.get("url")
        if not is_data(str(text)):
            return b""
    try:
        head, comma, data = str(text).partition(",")
        if comma and is_data(head) and not head.lower().endswith(";base64"):
            return unquote_to_bytes(data) or b"\0"  # none of it is a picture
        plain = re.sub(r"\s", "", data if comma else head).rstrip("=").translate(URL_SAFE)
        content = base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
        if not content:
            raise ValueError("empty")
        return content
    except (binascii.Error, ValueError):
        link = picture.get("url")
        if text is not link and is_text(link) and not is_data(str(link)):
            return b""
        raise Failure("answer_unusable", "the picture in the answer is not whole base64") from None


def failure_of(answer: HttpAnswer, body: dict[str, Any] | None, prompt: str = "") -> Failure:
    """What an answer without a picture means: OpenAI's error object, or what the engines' web framework says."""
    body = body or {}
    is_own_json = any(body.get(name) for name in ("error", "errors", "detail", "message"))
    return service_failure(
        answer,
        is_own_json=is_own_json,
        statuses=STATUS_KINDS,
        request_id=request_id(answer, body),
        prompt=prompt,
    )


PROVIDER = OpenAI
