"""The API of A1111's web UI, as Forge Neo speaks it: /sdapi/v1."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from zimage_mock import rules
from zimage_mock.drawing import Picture
from zimage_mock.errors import RATE_NAMES, Dialect
from zimage_mock.exchange import Order, Reply, Request, json_reply
from zimage_mock.faults import OK, Fault
from zimage_mock.gallery import delivered
from zimage_mock.provider import Provider, Studio
from zimage_mock.rules import Rule

SAMPLERS = ("Euler", "Euler a", "DPM++ 2M", "Res Multistep", "LCM")
MODEL = "z_image_turbo"


def _error(status: int, code: str, message: str) -> object:
    """FastAPI's form; what broke inside is told in A1111's own."""
    if status == 500:
        return {"error": code, "detail": "", "body": "", "errors": message}
    return {"detail": message}


DIALECT = Dialect(
    "sdapi",
    _error,
    {
        "400": (422, "ValidationError"),
        "401": (401, "Unauthorized"),
        "404": (404, "NotFound"),
        **dict.fromkeys(RATE_NAMES, (429, "TooManyRequests")),
        "500": (500, "RuntimeError"),
        "503": (503, "Busy"),
        "timeout": (504, "Timeout"),
    },
)
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."
OWN_FAULTS = {
    "out-of-memory": Fault("500, the card is full", DIALECT.error(500, "OutOfMemoryError", FULL)),
    "no-api": Fault("404, started without --api", DIALECT.error(404, "NotFound", "Not Found")),
    "seed-lost": Fault("a picture of another seed than asked, and the answer says so"),
    "small": Fault("a picture of half the sides"),
}


class SdApi(Provider):
    """A server of one's own: a login is optional, and what it does not know is ignored."""

    prefix = "/sdapi/v1/"
    dialect = DIALECT
    own_faults = OWN_FAULTS
    limited = False
    fields: Mapping[str, Rule] = {
        "prompt": rules.string(),
        "width": rules.integer(64, 2048),
        "height": rules.integer(64, 2048),
        "steps": rules.integer(1, 150),
        "cfg_scale": (lambda value: type(value) in (int, float) and 1 <= value < math.inf, "a number from 1 on"),
        "seed": rules.integer(-1, 2**32 - 1),
        "batch_size": rules.integer(1, 8),
        "n_iter": rules.integer(1, 100),
        "sampler_name": rules.string(),
        "scheduler": rules.string(),
    }
    defaults: Mapping[str, Any] = {
        "prompt": "",
        "width": 512,
        "height": 512,
        "steps": 50,
        "cfg_scale": 7.0,
        "seed": -1,
        "sampler_name": "Euler",
        "scheduler": "Automatic",
    }

    def __init__(self, studio: Studio) -> None:
        super().__init__(studio)
        names = [{"name": name, "aliases": [], "options": {}} for name in SAMPLERS]
        model = {"title": f"{MODEL}.safetensors [abcdef1234]", "model_name": MODEL, "hash": "abcdef1234"}
        lists: Mapping[str, object] = {
            "sd-models": [model],
            "sd-modules": [{"model_name": "ae.safetensors"}, {"model_name": "qwen_3_4b.safetensors"}],
            "samplers": names,
            "schedulers": [{"name": name, "label": name} for name in ("Automatic", "Simple", "Beta")],
            "cmd-flags": {"api": True},
            "options": {"sd_model_checkpoint": model["title"]},
        }
        self._routes = {
            f"{self.prefix}txt2img": {"POST": self._generate},
            **{f"{self.prefix}{name}": {"GET": self._listing(value)} for name, value in lists.items()},
        }

    def _listing(self, value: object) -> Any:
        def listing(request: Request) -> Reply:
            self._authorize(request)
            self._studio.ledger.count("model_queries")
            return json_reply(value)

        return listing

    def _authorize(self, request: Request) -> None:
        given = request.headers.get("authorization", "")
        scheme, _, pair = given.partition(" ")
        if scheme == "Basic":
            try:
                _, _, password = base64.b64decode(pair, validate=True).decode().partition(":")
            except ValueError:
                password = ""
            request = replace(request, headers={**request.headers, "authorization": f"Bearer {password}"})
        if given:
            super()._authorize(request)

    def _order(self, body: object) -> Order:
        if isinstance(body, dict):  # what it does not know, and null, are as left out
            body = {name: value for name, value in body.items() if value is not None and name in self.fields}
        fields = {**self.defaults, **self._fields(body, "body", self.fields)}
        if fields["sampler_name"].lower() not in map(str.lower, SAMPLERS):
            raise self._refusal("404", "Sampler not found")
        return Order(MODEL, fields.pop("prompt"), fields)

    def _make(self, order: Order, fault: str) -> Reply:
        wanted = dict(order.parameters)
        echo = {"prompt": order.prompt, **wanted}
        if wanted["seed"] < 0 or fault == "seed-lost":
            wanted["seed"] = rules.random_seed()
        if fault == "small":
            wanted |= {"width": wanted["width"] // 2, "height": wanted["height"] // 2}
        self._studio.ledger.bill(0 if fault == "no-image" else 1)  # before the pause, as for DashScope
        told = {**wanted, "prompt": order.prompt, "all_seeds": [wanted["seed"]], "sd_model_name": MODEL}
        told |= {"index_of_first_image": 0, "infotexts": [_text_of(told)], "version": "neo"}
        self._studio.pause()
        images = [] if fault == "no-image" else [self._image(told, self._faults[fault])]
        return json_reply({"images": images, "parameters": echo, "info": json.dumps(told)}, billed=bool(images))

    def _image(self, told: Mapping[str, Any], fault: Fault) -> str:
        """The picture in base64, with A1111's text in it."""
        picture = Picture(told["prompt"], told["seed"], told["width"], told["height"])
        drawn = delivered(picture, fault)
        if drawn.status != 200 or drawn.delivery != "whole":  # what can only befall a link does not befall bytes
            drawn = delivered(picture, OK)
        content = drawn.body
        if not fault.image:
            text, file = PngInfo(), io.BytesIO()
            text.add_text("parameters", told["infotexts"][0])
            with Image.open(io.BytesIO(content)) as image:
                image.save(file, "png", pnginfo=text, compress_level=1)
            content = file.getvalue()
        return base64.b64encode(content).decode()


def _text_of(told: Mapping[str, Any]) -> str:
    """A1111's text of a picture, which others read."""
    settings = {
        "Steps": told["steps"],
        "Sampler": told["sampler_name"],
        "Schedule type": told["scheduler"],
        "CFG scale": told["cfg_scale"],
        "Seed": told["seed"],
        "Size": f"{told['width']}x{told['height']}",
        "Model": told["sd_model_name"],
    }
    return f"{told['prompt']}\n" + ", ".join(f"{name}: {value}" for name, value in settings.items())
