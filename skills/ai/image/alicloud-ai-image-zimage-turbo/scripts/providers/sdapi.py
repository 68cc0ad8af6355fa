"""A server with the API of A1111's web UI: sd-server, Forge, SD.Next, koboldcpp, Draw Things, mfluxible, Xinference.

Sources: references/providers.md of this skill. All take one POST and answer with the picture in base64; what they make
of a field, and what they tell of the picture, differs: DIALECTS, as told apart by SIGNS.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Generator, Mapping
from typing import Any, ClassVar, NamedTuple

from zimage.answers import (
    base64_picture,
    bearer,
    found_elsewhere,
    json_post,
    read_begun_json,
    read_json,
    request_id,
    service_failure,
)
from zimage.calls import Generated, HttpAnswer, HttpCall
from zimage.codes import COMMON_CODES, Code
from zimage.contract import MAX_IMAGE_BYTES, MAX_SEED, MIB
from zimage.endpoint import Endpoint
from zimage.errors import Failure
from zimage.formats import png_text
from zimage.keys import KeyPlaces
from zimage.outside import at, json_of, kept_text, outside_json, outside_text
from zimage.request import ImageRequest
from zimage.servers import PRICE, THIS_MODEL, OpenServer, Sign, first_sign, only_fitting
from zimage.settings import GUIDANCE, STEPS, Setting, added_fields, left_out_fields

LINK_LIFETIME = dt.timedelta(hours=1)  # none of them answers with a link; a gateway might
STATUS_KINDS = {402: "balance", 413: "rejected_by_service", 422: "rejected_by_service"}
CODES = (
    Code("too_little_memory", "OutOfMemoryError *.OutOfMemoryError"),
    Code("too_little_memory", text=r"out of (gpu |video )?memory|not enough (gpu |video )?memory", statuses=(500, 503)),
    Code("rejected_by_service", text=r"(sampler|scheduler) not found", statuses=(400, 404)),
    *COMMON_CODES,
)

# How servers differ ---------------------------------------------------------------------------------------------------

FIELDS = {"seed": "seed", "steps": "steps", "guidance": "cfg_scale"}
SAMPLING = {"sampler": "sampler_name", "scheduler": "scheduler"}
NO_PROJECT = "tell the user to open a project in Draw Things: without one the picture is made and not handed over"
NO_MODEL = "tell the user to look at the server: is the model loaded, or was the picture given up there?"


class Dialect(NamedTuple):
    """What is so of one kind of server; sources in facts of references/providers.md.

    `sampler`: None where its own choice is right, or its names are not known. `steps`: what makes 8 evaluations of the
    model. `no_guidance`: what switches guidance off. `seed`: the sent one is used, also where the answer does not name
    it. `unused`: what it drops. `lists`: a free path below the server's root that names the model. `model`: how a
    request names one; None where it cannot. `own`: further fields that it must get, made of the payload. `empty`: what
    to do where an answer has no picture.
    """

    name: str
    sampler: str | None = None
    scheduler: str | None = None
    steps: int = 8
    no_guidance: float = 1.0
    seed: bool = True
    unused: tuple[str, ...] = ()
    lists: str = "sdapi/v1/sd-models"
    model: Callable[[str], dict[str, Any]] | None = None
    needs_model: bool = False
    own: Callable[[dict[str, Any]], dict[str, Any]] = lambda payload: {}
    empty: str = NO_MODEL


def by_setting(name: str) -> dict[str, Any]:
    """For this request alone: the server goes back to its own model afterwards."""
    return {"override_settings": {"sd_model_checkpoint": name}}


UNKNOWN = Dialect("this server, which does not say what it is,", "Euler", seed=False, model=by_setting)
A1111 = Dialect("A1111", "Euler", model=by_setting)
FORGE = A1111._replace(name="Forge", scheduler="Simple")
SD_NEXT = A1111._replace(name="SD.Next", sampler="Default")
SD_SERVER = Dialect("stable-diffusion.cpp", "euler", "simple")
KOBOLDCPP = Dialect("koboldcpp", "euler", "default")
MFLUXIBLE = Dialect("mfluxible", unused=("guidance", "sampler", "scheduler"), lists="health")
XINFERENCE = Dialect(  # hands the number to diffusers as it is
    "Xinference", steps=9, no_guidance=0.0, lists="v1/models", model=lambda name: {"model": name}, needs_model=True
)
DRAW_THINGS = Dialect(
    "Draw Things",
    seed=False,
    lists="",
    own=lambda payload: {"guidance_scale": payload["cfg_scale"]},  # its name for it; the other is not read
    empty=NO_PROJECT,
)


def json_in(answer: HttpAnswer) -> Any:
    """The JSON of an answer, a list too; None where it is none."""
    try:
        return json_of(answer.body.decode("utf-8-sig"))
    except ValueError:
        return None


def has(*names: str) -> Callable[[HttpAnswer], bool]:
    """Whether an answer is an object with these fields."""

    def says_so(answer: HttpAnswer) -> bool:
        body = json_in(answer)
        return isinstance(body, dict) and body.keys() >= set(names)

    return says_so


def lists_model(field: str, value: str) -> Callable[[HttpAnswer], bool]:
    """Whether one of the models in OpenAI's list has a field of this value."""

    def says_so(answer: HttpAnswer) -> bool:
        models = at(json_in(answer), "data")
        return isinstance(models, list) and any(str(at(model, field)).lower() == value for model in models)

    return says_so


SIGNS = (  # A1111's own path is the last of its family's: the others have it too
    Sign("sdapi/v1/sd-modules", FORGE, lambda answer: isinstance(json_in(answer), list)),
    Sign("sdapi/v1/version", SD_NEXT, has()),
    Sign("sdapi/v2/jobs?limit=1", SD_NEXT, lambda answer: isinstance(json_in(answer), (list, dict))),
    Sign("sdapi/v1/cmd-flags", A1111, has()),
    Sign("sdcpp/v1/capabilities", SD_SERVER, has("limits")),
    Sign(
        ".well-known/serviceinfo",
        KOBOLDCPP,
        lambda answer: str(at(json_in(answer), "software", "name")).lower() == "koboldcpp",
    ),
    Sign("health", MFLUXIBLE, lambda answer: at(json_in(answer), "model", "name") is not None),
    Sign("v1/models", XINFERENCE, lists_model("owned_by", "xinference")),
    Sign("v1/models", SD_SERVER, lists_model("id", "sd-cpp-local")),
    Sign("", DRAW_THINGS, has("guidance_scale", "model")),
)


# Options --------------------------------------------------------------------------------------------------------------

OWN_OPTIONS = {
    "prompt": "it is the request's",
    "width": "use --size",
    "height": "use --size",
    "seed": "use --seed",
    "steps": "use --steps",
    "cfg_scale": "use --guidance",
    "guidance_scale": "use --guidance",
    "sampler_name": "use --sampler",
    "scheduler": "use --scheduler",
    "batch_size": "one picture is asked for at a time",
    "n_iter": "one picture is asked for at a time",
}


def name_of(text: str) -> str:
    if not re.fullmatch(r"[^\x00-\x1f\x7f]{1,300}", text) or text != text.strip():
        raise ValueError("a name")
    return text


OPTIONS = (
    STEPS,
    GUIDANCE._replace(help="guidance scale; this model is made for 0, which is sent as what the server calls off"),
    Setting("sampler", "NAME", "sampler by the server's own name; else one that fits the model", None, name_of),
    Setting("scheduler", "NAME", "scheduler by the server's own name", None, name_of),
    Setting("model", "NAME", "model to draw with, where the server has several", None, name_of),
    added_fields(OWN_OPTIONS),
    left_out_fields(dict.fromkeys(("prompt", "width", "height"), "no picture can be asked for without it")),
    PRICE,
)

# What stands in a prompt and is no word of it -------------------------------------------------------------------------

PARAMETERS_IN_PROMPT = re.compile(r"<\s*sd_cpp_extra_args", re.IGNORECASE)
COMMANDS_IN_PROMPT = {  # of A1111, Forge and SD.Next
    "<lora:…>": re.compile(r"<\s*(?:lora|lyco|hypernet)\s*:[^<>]*>", re.IGNORECASE),
    "brackets": re.compile(r"(?<!\\)[()\[\]]"),
    "BREAK": re.compile(r"\bBREAK\b"),
    "AND": re.compile(r"\bAND\b"),
}

# What an answer tells -------------------------------------------------------------------------------------------------

TOLD = {"Seed": "seed", "Steps": "steps", "CFG scale": "cfg_scale", "Sampler": "sampler_name", "Model": "sd_model_name"}
A_PAIR = re.compile(r'([A-Z][\w /-]{0,60}): ("(?:[^"\\]|\\.){0,2000}"|[^,]{0,2000})(?:, |$)')
KEPT = ("seed", "steps", "cfg_scale", "sampler_name", "scheduler", "sd_model_name", "version")


def info_in(body: Mapping[str, Any]) -> dict[str, Any]:
    """What `info` says of the picture: an object, or the JSON of one."""
    info = body.get("info")
    try:
        info = json_of(info) if isinstance(info, str) else info
    except ValueError:
        return {}
    return info if isinstance(info, dict) else {}


def told_in(info: dict[str, Any], content: bytes) -> dict[str, Any]:
    """What is told of a picture: by the server, else, where that names no seed, by the picture's own text."""
    seeds = (info.get("seed"), at(info, "all_seeds", 0))
    seed = next(filter(is_seed, seeds), None)
    return info | (parameters_in(png_text(content, "parameters")) if seed is None else {"seed": seed})


def parameters_in(text: str) -> dict[str, Any]:
    """The settings in the last line of A1111's text, which counts as that from three on; else it is prompt."""
    line = text.strip().rpartition("\n")[2].partition(", SDCPP: ")[0]  # what follows there is JSON, unquoted
    pairs = dict(A_PAIR.findall(line))
    if len(pairs) < 3:
        return {}
    return {name: number_in(pairs[key]) for key, name in TOLD.items() if key in pairs}


def number_in(text: str) -> int | float | str:
    for kind, form in ((int, "[0-9]{1,15}"), (float, r"[0-9]{1,9}\.[0-9]{1,9}")):
        if re.fullmatch(form, text):
            number: int | float = kind(text)
            return number
    return text


def is_seed(value: object) -> bool:
    return type(value) is int and value >= 0


def folded(name: object) -> str:
    """The name of a sampler as servers compare it: `Euler a`, `euler_a` and `k_euler_a` are one."""
    return re.sub("[ _-]", "", str(name).lower().removeprefix("k_"))


# ----------------------------------------------------------------------------------------------------------------------


class SdApi(OpenServer):
    """One POST, answered with the picture in base64."""

    name = "sdapi"
    key_places = KeyPlaces(variable="SDAPI_API_KEY", optional=True)
    user_variable, password_variable = "SDAPI_USER", "SDAPI_PASSWORD"
    roots: ClassVar = {"self-hosted": ""}
    default_region = "self-hosted"
    base_url_variables = ("SDAPI_BASE_URL",)
    default_root = "/sdapi/v1"
    generate_path = "/txt2img"
    max_answer_bytes = MAX_IMAGE_BYTES * 4 // 3 + MIB  # base64 of the largest picture
    own_settings = OPTIONS

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(settings)
        self._given = frozenset(settings or {})
        self._dialect: Dialect | None = None  # nobody has asked yet
        self._models: list[str] = []  # that the server lists
        self._samplers: list[str] = []  # likewise, asked for where the user names one
        self._refused: frozenset[str] = frozenset()  # fields
        self.takes_seed = "seed" not in self.unused()

    @property
    def dialect(self) -> Dialect:
        return self._dialect or UNKNOWN

    def likely_root(self, path: str) -> str:
        return re.sub("/(v1|sdapi)(/.*)?$", "", path) + self.default_root

    # What the server is

    def introduction(self, endpoint: Endpoint, key: str) -> Generator[HttpCall, HttpAnswer | None, None]:
        base = self._base(endpoint)
        self._dialect = UNKNOWN
        models = yield self.query(endpoint, key, None)
        if models is None or models.status in (401, 403):
            return  # nobody is there, or nobody for us
        self._models = names_in(models)
        found = yield from first_sign(SIGNS, base, key)
        if found:
            self._dialect, said = found
            if self.dialect.lists in ("health", "v1/models"):
                self._models = names_in(said)
            self._take_steps(at(json_in(said), "model", "default_steps"))
        if "sampler" in self._given:
            samplers = yield HttpCall("GET", f"{base}sdapi/v1/samplers", bearer(key))
            self._samplers = names_in(samplers) if samplers is not None else []

    def _take_steps(self, said: object) -> None:
        """Steps that the server names as those of its model; else those that are known of its kind."""
        if "steps" not in self._given:
            known = type(said) is int and 1 <= said <= 200
            self.settings["steps"] = said if known else self.dialect.steps

    def _base(self, endpoint: Endpoint) -> str:
        return endpoint.root.removesuffix(self.default_root) + "/"

    # What is sent

    def cannot(self, request: ImageRequest) -> list[str]:
        sentences = super().cannot(request)
        if PARAMETERS_IN_PROMPT.search(request.prompt):
            what = "stable-diffusion.cpp would take what follows for parameters that win over all others"
            sentences.append(f"prompt: holds <sd_cpp_extra_args; {what}: take it out")
        return sentences

    def unused(self) -> tuple[str, ...]:
        users = {*(self.settings["body"] or {}), *(self.settings["omit"] or ())}
        named = {name: field for name, field in SAMPLING.items() if self.settings[name]}
        asked = FIELDS | named
        return tuple(name for name, field in asked.items() if name in self.dialect.unused or field in users)

    @property
    def known_settings(self) -> dict[str, Any]:
        known = super().known_settings
        return known if self.dialect.model else {name: value for name, value in known.items() if name != "model"}

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

    def payload(self, request: ImageRequest) -> dict[str, Any]:
        dialect, model = self.dialect, self._model
        width, height = request.width_height
        fields: dict[str, Any] = {
            "prompt": request.prompt,
            "negative_prompt": "",  # without effect on this model; left out, it is what stands in the app
            "width": width,
            "height": height,
            "steps": self.settings["steps"],
            "cfg_scale": self.settings["guidance"] or self.dialect.no_guidance,
            "seed": request.seed,
            "sampler_name": self.settings["sampler"] or dialect.sampler,
            "scheduler": self.settings["scheduler"] or (None if self.settings["sampler"] else dialect.scheduler),
            "batch_size": 1,
            "n_iter": 1,
            "send_images": True,
            "save_images": False,
        }
        fields |= dialect.own(fields) | (dialect.model(model) if dialect.model and model else {})
        gone = self._refused.union(self.settings["omit"] or ())
        fields = {name: value for name, value in fields.items() if value is not None and name not in gone}
        return fields | (self.settings["body"] or {})

    def notes(self, request: ImageRequest) -> tuple[str, ...]:
        notes = []
        if found := [name for name, form in COMMANDS_IN_PROMPT.items() if form.search(request.prompt)]:
            plain = r"; \( and \[ are plain brackets there" if "brackets" in found else ""
            notes.append(f"prompt: A1111, Forge and SD.Next execute {', '.join(found)} and do not draw it{plain}")
        if self._dialect is None:
            return tuple(notes)
        if self.dialect is UNKNOWN:
            notes.append("not confirmed: this server does not say what it is, and may ignore steps and guidance")
        if self.settings["model"] and not self.dialect.model:
            notes.append(f"--model is not sent: {self.dialect.name} draws with the one model that it has loaded")
        if dropped := sorted(self._given.intersection(self.dialect.unused)):
            notes.append(
                f"not used, so not recorded: {', '.join(dropped)}; {self.dialect.name} drops it for this model"
            )
        sampler = self.settings["sampler"]
        if self._samplers and sampler and folded(sampler) not in map(folded, self._samplers):
            what = "it may take another one without a word"
            notes.append(f"sampler: this server does not list {sampler}, and {what}; it has {self._listed_samplers()}")
        return tuple(notes)

    def _listed_samplers(self) -> str:
        return ", ".join(self._samplers[:20])

    def learns_from(self, failure: Failure) -> bool:
        """Of what only makes sure, a field that is refused by name is left out; what the user gave is not."""
        if failure.code != "rejected_by_service":
            return False
        said = failure.message.lower()
        doubtful = {"negative_prompt", "batch_size", "n_iter", "send_images", "save_images", "guidance_scale"}
        named = {name for name in doubtful if name in said}
        if re.search("sampler|scheduler", said) and not self._given & SAMPLING.keys():
            named |= {*SAMPLING.values()}
        self._refused |= named
        return bool(named)

    def submit(self, payload: dict[str, Any], endpoint: Endpoint, key: str, workspace: str | None) -> HttpCall:
        return json_post(endpoint.url, payload, bearer(key))

    # What comes back

    def read(self, answer: HttpAnswer, request: ImageRequest, now: dt.datetime) -> Generated:
        body = read_begun_json(answer) or {}
        images = body.get("images")
        images = [text for text in images if isinstance(text, str) and text] if isinstance(images, list) else []
        if not images:
            elsewhere = found_elsewhere(answer, body or None, now + LINK_LIFETIME)
            if elsewhere is None:
                raise self._failure_of(answer, request.prompt)
            return elsewhere if self.dialect.seed else elsewhere._replace(unused=("seed",))
        info = info_in(body)
        first = info.get("index_of_first_image")  # before it A1111 puts all of them in one
        try:
            content = base64_picture(images[first if type(first) is int and 0 <= first < len(images) else 0])
        except ValueError:
            raise Failure("answer_unusable", "the picture in the answer is not whole base64") from None
        told = told_in(info, content)
        seed, unused, warnings = self._held_against(told, request)
        if len(images) > 1:
            warnings.append(f"the server sent {len(images)} pictures; only one is kept")
        said = kept_text(told.get("prompt"))
        usage = body.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        return Generated(
            content=content,
            request_id=request_id(answer, body),
            rewritten_prompt=said if said != request.prompt.strip() else "",
            usage=outside_json(usage | {name: told[name] for name in KEPT if name in told}),
            warnings=tuple(warnings),
            seed=seed,
            unused=tuple(unused),
        )

    def _held_against(self, told: Mapping[str, Any], request: ImageRequest) -> tuple[int | None, list[str], list[str]]:
        """What is told of a picture against what was asked for: the true seed, what was not used, warnings."""
        guidance = self.settings["guidance"] or self.dialect.no_guidance
        asked = {"seed": request.seed, "steps": self.settings["steps"], "guidance": guidance}
        if "cfg_scale" in told and told["cfg_scale"] is None:  # it drew without
            told = {**told, "cfg_scale": self.dialect.no_guidance}
        unused, warnings = [], []
        for name in FIELDS.keys() - set(self.unused()):
            value = told.get(FIELDS[name])
            if value is None or (name == "seed" and not is_seed(value)):
                if name == "seed" and not self.dialect.seed:
                    unused.append(name)
                    warnings.append("seed: not confirmed by the server, so not recorded")
            elif value != asked[name]:
                unused.append(name)
                said = outside_text(value, 60)
                warnings.append(f"{name}: the server says that it drew with {said}, not with {asked[name]}")
        sampler = self.settings["sampler"]
        if sampler and "sampler_name" in told and folded(told["sampler_name"]) != folded(sampler):
            unused.append("sampler")
            said = outside_text(told["sampler_name"], 60)
            warnings.append(f"sampler: the server says that it drew with {said}, not with {sampler}")
        seed = told["seed"] if is_seed(told.get("seed")) and told["seed"] <= MAX_SEED else None
        return seed, sorted(unused), sorted(warnings)

    def _failure_of(self, answer: HttpAnswer, prompt: str = "") -> Failure:
        """What an answer without a picture means, with what helps."""
        body = read_json(answer) or {}
        is_own_json = any(body.get(name) for name in ("error", "errors", "detail", "message"))
        failure = service_failure(
            answer,
            is_own_json=is_own_json,
            statuses=STATUS_KINDS,
            request_id=request_id(answer, body),
            codes=CODES,
            prompt=prompt,
        )
        return failure.but(**self._help(failure))

    def _help(self, failure: Failure) -> dict[str, Any]:
        """Facts of a failure that are better known here: rows of codes, words of the message, and what helps then."""
        dialect, asked = self.dialect, self._given & SAMPLING.keys()
        samplers = f"; it has {self._listed_samplers()}" if self._samplers else ""
        way_out = f"--sampler NAME{samplers}" if asked else "--sampler NAME, or --omit sampler_name --omit scheduler"
        models = f"; it lists {', '.join(self._models[:5])}" if self._models else ""
        empty = dialect.empty if dialect is not UNKNOWN else f"{NO_MODEL} Of Draw Things: {NO_PROJECT}"
        rows = (
            (("no_image",), "", empty),
            (("too_little_memory",), "", TOO_LARGE),
            (("rejected_by_service",), "sampler|scheduler", f"name one that this server has: {way_out}"),
            (("rejected_by_service", "not_found"), r"\bmodel\b", f"name one of its models: --model NAME{models}"),
            (("not_found",), "", API_IS_OFF),
        )
        said = failure.message.lower()
        fits = (hint for codes, words, hint in rows if failure.code in codes and re.search(words, said))
        hint = next(fits, failure.fault.hint)
        return {"hint": hint, "everywhere": failure.code == "no_image" and dialect is DRAW_THINGS}

    def query(self, endpoint: Endpoint, key: str, workspace: str | None) -> HttpCall:
        return HttpCall("GET", self._base(endpoint) + self.dialect.lists, bearer(key))

    def read_query(self, answer: HttpAnswer) -> bool:
        if answer.status != 200 or not isinstance(json_in(answer), (list, dict)):
            raise self._failure_of(answer)
        return THIS_MODEL.search(answer.body.decode("utf-8", "replace")) is not None


TOO_LARGE = (
    "tell the user: that server's memory does not hold it: a smaller --size, other programs ended there, or the server "
    "started with its options for small cards; then run it again"
)
API_IS_OFF = (
    "tell the user: nothing answers there as this API; A1111 and Forge are started with --api, in Draw Things the HTTP "
    "server is switched on, and a server with /v1/images/generations alone wants --provider openai"
)


def names_in(answer: HttpAnswer) -> list[str]:
    """The names in a list of models or samplers, whichever server's it is."""
    body = json_in(answer) if answer.status == 200 else None
    listed = body if isinstance(body, list) else at(body, "data") or [at(body, "model")]
    items = listed[:200] if isinstance(listed, list) else []
    named = [at(item, "title") or at(item, "name") or at(item, "id") for item in items]
    return [outside_text(name, 300) for name in named if isinstance(name, str) and name]


PROVIDER = SdApi
