"""Any server with OpenAI's Images API: your own, such as vLLM-Omni, SGLang and LocalAI, a gateway, or a paid host.

Sources: references/providers.md of this skill. What goes beyond OpenAI's own fields each of these servers takes in its
own way, and some of it some of them drop without a word: DIALECTS says what is known.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Callable, Generator, Mapping
from typing import Any, ClassVar, NamedTuple

from zimage.answers import (
    base64_picture,
    bearer,
    found_elsewhere,
    is_data,
    json_post,
    link_expiry,
    read_begun_json,
    read_json,
    request_id,
    service_failure,
)
from zimage.calls import Generated, HttpAnswer, HttpCall
from zimage.contract import MAX_IMAGE_BYTES, MIB
from zimage.endpoint import Endpoint, is_own_machine
from zimage.errors import Failure
from zimage.keys import KeyPlaces
from zimage.outside import at, kept_text, outside_json, outside_text
from zimage.request import ImageRequest
from zimage.servers import PRICE, THIS_MODEL, OpenServer, Sign, first_sign, only_fitting
from zimage.settings import GUIDANCE, STEPS, Setting, added_fields, left_out_fields

LINK_LIFETIME = dt.timedelta(hours=1)  # OpenAI's own; engines that link to themselves say nothing
STATUS_KINDS = {402: "balance", 413: "rejected_by_service", 422: "rejected_by_service"}
# Calls of the same API whose addresses people paste: none of them makes pictures from words.
OTHER_CALLS = re.compile(
    "/(chat/completions|completions|responses|embeddings|messages|models|images/edits|images/variations|audio/[a-z]+)$"
)

# How servers differ ---------------------------------------------------------------------------------------------------

Put = Callable[[dict[str, Any], dict[str, Any]], None]


def beside(payload: dict[str, Any], extras: dict[str, Any]) -> None:
    payload |= extras


def in_kwargs(payload: dict[str, Any], extras: dict[str, Any]) -> None:
    payload["kwargs"] = json.dumps(extras)


def in_tag_of_prompt(payload: dict[str, Any], extras: dict[str, Any]) -> None:
    """A tag that stable-diffusion.cpp cuts out of the prompt; one that the user wrote would be read as ours."""
    nested: dict[str, Any] = {}
    for path, value in extras.items():
        *parents, name = path.split(".")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = value
    prompt = str(payload["prompt"]).replace(f"<{TAG}>", TAG).replace(f"</{TAG}>", TAG)
    payload["prompt"] = f"{prompt}<{TAG}>{json.dumps(nested)}</{TAG}>"


def as_size(width: int, height: int) -> dict[str, Any]:
    return {"size": f"{width}x{height}"}


def as_image_size(width: int, height: int) -> dict[str, Any]:
    return {"image_size": f"{width}x{height}"}


def as_sides(width: int, height: int) -> dict[str, Any]:
    return {"width": width, "height": height}


TAG = "sd_cpp_extra_args"
FIELDS = {"seed": "seed", "steps": "num_inference_steps", "guidance": "guidance_scale"}


class Dialect(NamedTuple):
    """How a server takes what goes beyond OpenAI's own fields; sources in facts of references/providers.md.

    `fields`: what of seed, steps and guidance it uses, and by what name. `own`: fields that it must get, None where it
    must not. `steps`: what makes 8 evaluations of the model; `no_guidance`: what switches guidance off.
    """

    name: str
    fields: Mapping[str, str] = FIELDS
    put: Put = beside
    own: Mapping[str, Any] = {}
    steps: int = 8
    no_guidance: float = 0.0
    size: Callable[[int, int], dict[str, Any]] = as_size
    needs_model: bool = False
    splits_prompt_at: str = ""  # what stands behind it is taken for something else
    is_known: bool = True  # what it does with these fields
    passes_on: bool = False  # to others, who may be paid
    headers: Mapping[str, str] = {}
    better: str = ""  # another way to the same server, and why


UNKNOWN = Dialect("this server, which does not say what it is,", is_known=False)
LITELLM = Dialect("LiteLLM", needs_model=True, is_known=False, passes_on=True, headers={"x-litellm-num-retries": "0"})
SD_SERVER = Dialect(
    "stable-diffusion.cpp",
    fields={"seed": "seed", "steps": "sample_params.sample_steps", "guidance": "sample_params.guidance.txt_cfg"},
    put=in_tag_of_prompt,
    no_guidance=1.0,
    better="--provider sdapi asks it by fields of its own, and is told the true seed",
)
LOCALAI = Dialect("LocalAI", fields={"seed": "seed", "steps": "step"}, needs_model=True, splits_prompt_at="|")
OWNERS = {  # `owned_by` in GET /v1/models
    "vllm": Dialect("vLLM-Omni", steps=9),
    "sglang": Dialect("SGLang", own={"output_format": "png"}, steps=9),
    "xinference": Dialect("Xinference", put=in_kwargs, steps=9, needs_model=True),
    "mfluxible": Dialect("mfluxible", fields={}, needs_model=True),
    "koboldcpp": Dialect(
        "koboldcpp", fields={"seed": "seed", "steps": "steps", "guidance": "cfg_scale"}, no_guidance=1.0
    ),
}
MODELS = {"sd-cpp-local": SD_SERVER}  # an id in GET /v1/models
HOSTS = {
    "api.siliconflow.cn": Dialect("SiliconFlow", own={"n": None, "response_format": None}, size=as_image_size),
    "api.together.ai": Dialect(
        "Together", fields={**FIELDS, "steps": "steps"}, own={"response_format": "base64"}, size=as_sides
    ),
    "api.aimlapi.com": Dialect(
        "AIML",
        fields={"seed": "seed", "steps": "num_inference_steps"},
        own={"n": None, "response_format": None, "enable_prompt_expansion": False},
        size=lambda width, height: {"image_size": as_sides(width, height)},
    ),
}
HOSTS |= {"api.siliconflow.com": HOSTS["api.siliconflow.cn"], "api.together.xyz": HOSTS["api.together.ai"]}


def is_ready_word(answer: HttpAnswer) -> bool:
    """LocalAI's /readyz answers with no JSON; a server that answers every path alike does not speak of itself."""
    return len(answer.body) < 100 and read_json(answer) is None


SIGNS = (
    Sign("/health/liveliness", LITELLM, lambda answer: b"I'm alive!" in answer.body[:100], anywhere=True),
    Sign("/sdcpp/v1/capabilities", SD_SERVER, lambda answer: "limits" in (read_json(answer) or {})),
    Sign("/readyz", LOCALAI, is_ready_word),
)


# Options --------------------------------------------------------------------------------------------------------------

OWN_OPTIONS = {
    "prompt": "it is the request's",
    "model": "use --model",
    "n": "one picture is asked for at a time",
    "size": "use --size",
    "seed": "use --seed",
    "num_inference_steps": "use --steps",
    "guidance_scale": "use --guidance",
    "output_format": "use --image-format",
}


def image_format(text: str) -> str:
    if text not in ("png", "jpeg", "webp"):
        raise ValueError("png, jpeg or webp")
    return text


def model_name(text: str) -> str:
    if not re.fullmatch("[!-~]{1,300}", text):
        raise ValueError("a name without blanks")
    return text


OPTIONS = (
    STEPS,
    GUIDANCE,
    Setting("image_format", "FORMAT", "png, jpeg or webp to ask for; else the server chooses", None, image_format),
    Setting("model", "NAME", "model name to send, where the server serves several", None, model_name),
    added_fields(OWN_OPTIONS),
    left_out_fields({"prompt": "no picture can be asked for without it"}),
    PRICE,
)

# Words of servers that do not know a field, beside the field's name.
REFUSES_FIELDS = re.compile(
    "(extra|unknown|unrecognized|unexpected|unsupported|additional) ?(field|input|param|argument|request arg|prop)"
    "|not permitted",
    re.IGNORECASE,
)


class OpenAI(OpenServer):
    """One POST, answered with the picture in base64, or with a link to it."""

    name = "openai"
    key_places = KeyPlaces(variable="OPENAI_API_KEY", optional=True)
    user_variable, password_variable = "OPENAI_USER", "OPENAI_PASSWORD"
    roots: ClassVar = {"self-hosted": ""}
    default_region = "self-hosted"
    base_url_variables = ("OPENAI_BASE_URL",)
    default_root = "/v1"
    generate_path = "/images/generations"
    max_answer_bytes = MAX_IMAGE_BYTES * 4 // 3 + MIB  # base64 of the largest picture
    links_to_itself = True
    own_settings = OPTIONS

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(settings)
        self._given = frozenset(settings or {})
        self._dialect: Dialect | None = None  # nobody has asked yet
        self._models: list[str] = []  # that the server lists
        self._refused: frozenset[str] = frozenset()  # fields
        self._note_seed()

    @property
    def dialect(self) -> Dialect:
        return self._dialect or UNKNOWN

    def _note_seed(self) -> None:
        self.takes_seed = "seed" not in self.unused()

    def root_of(self, path: str) -> str | None:
        return None if OTHER_CALLS.search(path) else path.removesuffix(self.generate_path) or self.default_root

    def unfit(self, host: str) -> str:
        is_modelscope = re.fullmatch(r"api-inference\.modelscope\.(cn|ai)", host)
        return "is ModelScope, which answers with tasks: --provider modelscope asks it" if is_modelscope else ""

    def likely_root(self, path: str) -> str:
        return OTHER_CALLS.sub("", path) or self.default_root

    @property
    def passes_on(self) -> bool:
        return self.dialect.passes_on

    # What the server is

    def introduction(self, endpoint: Endpoint, key: str) -> Generator[HttpCall, HttpAnswer | None, None]:
        self._dialect = HOSTS.get(endpoint.host)
        if self._dialect is None:
            models = yield self.query(endpoint, key, None)
            self._dialect = self._dialect_of(models) if models is not None else UNKNOWN
            signs = [sign for sign in SIGNS if sign.anywhere or is_own_machine(endpoint.host)]
            if models is not None and self._dialect is UNKNOWN:
                found = yield from first_sign(signs, endpoint.root, key)
                self._dialect = found[0] if found else UNKNOWN
        if "steps" not in self._given:
            self.settings["steps"] = self.dialect.steps
        self._note_seed()

    def _dialect_of(self, answer: HttpAnswer) -> Dialect:
        """What the list of models says of who serves them."""
        listed = at(read_json(answer), "data") if answer.status == 200 else None
        models = listed if isinstance(listed, list) else []
        self._models = [outside_text(at(model, "id"), 300) for model in models if is_text(at(model, "id"))]
        if any(name.startswith("x-litellm-") for name in answer.headers):
            return LITELLM
        known = [MODELS.get(name) for name in self._models]
        known += [OWNERS.get(str(at(model, "owned_by")).lower()) for model in models]
        return next(filter(None, known), UNKNOWN)

    @property
    def _model(self) -> str | None:
        """The model to name: the user's, else, where one must be named, the only one that it can be."""
        if self.settings["model"] or not self.dialect.needs_model:
            named: str | None = self.settings["model"]
            return named
        return only_fitting(self._models)

    @property
    def draws_with(self) -> str:
        return "" if self.settings["model"] else only_fitting(self._models) or ""

    # What is sent

    def _extras(self, seed: int | None) -> dict[str, Any]:
        """Seed, steps and guidance by the names that this server has for them."""
        dialect = self.dialect
        guidance = self.settings["guidance"] or dialect.no_guidance
        values = {"seed": seed, "steps": self.settings["steps"], "guidance": guidance}
        fields = {dialect.fields[name]: value for name, value in values.items() if name in dialect.fields}
        gone = self._refused.union(self.settings["omit"] or ())
        return {name: value for name, value in fields.items() if value is not None and name not in gone}

    def unused(self) -> tuple[str, ...]:
        fields, extras = self.dialect.fields, self._extras(0)
        users = {*(self.settings["body"] or {}), *(self.settings["omit"] or ())}
        if self.dialect.put is in_kwargs and "kwargs" in users:
            return tuple(FIELDS)
        return tuple(name for name in FIELDS if fields.get(name) not in extras or fields[name] in users)

    def payload(self, request: ImageRequest) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "model": self._model,
            "prompt": self._prompt(request),
            **self.dialect.size(*request.width_height),
            "n": 1,
            "response_format": "b64_json",
            **self.dialect.own,
        }
        if self.settings["image_format"] is not None:
            fields["output_format"] = self.settings["image_format"]
        if extras := self._extras(request.seed):
            self.dialect.put(fields, extras)
        gone = self._refused.union(self.settings["omit"] or ())
        fields = {name: value for name, value in fields.items() if value is not None and name not in gone}
        return fields | (self.settings["body"] or {})

    def _prompt(self, request: ImageRequest) -> str:
        sign = self.dialect.splits_prompt_at
        return request.prompt.replace(sign, ",") if sign else request.prompt

    def notes(self, request: ImageRequest) -> tuple[str, ...]:
        notes = []
        if self._prompt(request) != request.prompt:
            sign = self.dialect.splits_prompt_at
            notes.append(f"prompt: {self.dialect.name} would split it at {sign}: sent with commas in its place")
        unused = self.unused()
        if self._dialect is not None and "seed" in unused:
            notes.append(f"not used, so not recorded: {', '.join(unused)}; the same request may give another picture")
        elif self._dialect is not None and not self.dialect.is_known:
            names = ", ".join(name for name in FIELDS if name not in unused)
            notes.append(f"not confirmed: {self.dialect.name} may ignore {names}")
        if self.dialect.better:
            notes.append(f"{self.dialect.name}: {self.dialect.better}")
        return tuple(notes)

    def learns_from(self, failure: Failure) -> bool:
        if failure.code != "rejected_by_service":
            return False
        asked = {"steps": "num_inference_steps", "guidance": "guidance_scale", "image_format": "output_format"}
        explicit = {asked[name] for name in self._given & asked.keys()}
        extras = {*self._extras(0), "output_format"}
        named = {name for name in (*extras, "response_format") if re.search(rf"\b{re.escape(name)}\b", failure.message)}
        if named & explicit and not REFUSES_FIELDS.search(failure.message):
            return False  # the value that the user gave is wrong
        if named - {"response_format"} or (not named and REFUSES_FIELDS.search(failure.message)):
            named |= extras
        self._refused |= named
        self._note_seed()
        return bool(named)

    def submit(self, payload: dict[str, Any], endpoint: Endpoint, key: str, workspace: str | None) -> HttpCall:
        return json_post(endpoint.url, payload, {**bearer(key), **self.dialect.headers})

    # What comes back

    def read(self, answer: HttpAnswer, request: ImageRequest, now: dt.datetime) -> Generated:
        body = read_begun_json(answer)
        pictures = at(body, "data") or at(body, "images")
        pictures = [p for p in pictures if isinstance(p, dict)] if isinstance(pictures, list) else []
        pictures = [p for p in pictures if is_text(p.get("b64_json")) or is_text(p.get("url"))]
        if body is None or not pictures:  # a picture that is there was made, whatever status stands beside it
            elsewhere = found_elsewhere(answer, body, now + LINK_LIFETIME)
            if elsewhere is None:
                raise self._hinted(failure_of(answer, read_json(answer), request.prompt))
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

    def _hinted(self, failure: Failure) -> Failure:
        """The failure, with the way to name a model where one is missing or not served."""
        about_model = failure.fault.service_code == "model_not_found" or re.search(r"\bmodel\b", failure.message, re.I)
        if failure.code not in ("not_found", "rejected_by_service") or not about_model:
            return failure
        named = [name for name in self._models if THIS_MODEL.search(name)] or self._models
        listed = f"; it lists {', '.join(named[:5])}" if named else ""
        return failure.but(hint=f"name a model that this server serves: --model NAME{listed}")

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


def is_text(value: object) -> bool:
    return isinstance(value, str) and value.strip() != ""


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
        return base64_picture(str(text))
    except ValueError:
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
