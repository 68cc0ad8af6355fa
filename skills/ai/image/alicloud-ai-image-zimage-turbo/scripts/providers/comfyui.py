"""ComfyUI: a graph of nodes is queued on the user's own server, under a name that is known before it leaves.

Sources: references/providers.md of this skill. The graph is the official template of this model, or one of the user's
own. Only its /prompt makes pictures; the name of a task is looked up in history and queue, so that a lost answer is
never queued twice.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple
from urllib.parse import quote, urlencode

from zimage.answers import bearer, json_post, kept_answer, read_json, request_id, service_failure
from zimage.calls import Generated, HttpAnswer, HttpCall, Submitted, Working
from zimage.contract import EXIT_INVALID, MIB
from zimage.endpoint import Endpoint
from zimage.errors import Failure
from zimage.keys import KeyPlaces
from zimage.outside import at, outside_text
from zimage.provider import OpenModel
from zimage.request import ImageRequest
from zimage.settings import GUIDANCE, STEPS, Setting
from zimage.traces import traces_in
from zimage.workflow import Workflow, marks_in, shown_id, workflow_in

NO_GUIDANCE = 1.0  # as this server counts: the unconditioned half is then not worked out at all
MAX_WORKFLOW = 16 * MIB  # bytes of a file: a picture that holds one is larger than the graph
STATUS_KINDS = {402: "balance", 413: "rejected_by_service"}


# The graph for this model ---------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A file of the model: what loads it, and by what names it goes."""

    setting: str
    node: str
    loader: str
    field: str
    gguf_loader: str  # of the custom nodes ComfyUI-GGUF; empty where none is needed
    folder: str  # below models/ of the server
    usual: str  # as the official template names it
    size: str
    other: re.Pattern[str]  # further names of the same part


# Other builds of the same file, the most exact first.
BUILDS = ("bf16", "fp16", "q8", "int8", "fp8", "q6", "q5", "q4", "q3", "q2")
PARTS = (
    Part(
        setting="model",
        node="28",
        loader="UNETLoader",
        field="unet_name",
        gguf_loader="UnetLoaderGGUF",
        folder="diffusion_models",
        usual="z_image_turbo_bf16.safetensors",
        size="11.5 GB",
        other=re.compile("z[-_ ]?image[-_ ]?turbo(?!.*(control|lora))", re.IGNORECASE),
    ),
    Part(
        setting="text_encoder",
        node="30",
        loader="CLIPLoader",
        field="clip_name",
        gguf_loader="CLIPLoaderGGUF",
        folder="text_encoders",
        usual="qwen_3_4b.safetensors",
        size="7.5 GB",
        other=re.compile("qwen[-_ ]?3[-_ ]?4b", re.IGNORECASE),
    ),
    Part(
        setting="vae",
        node="29",
        loader="VAELoader",
        field="vae_name",
        gguf_loader="",
        folder="vae",
        usual="ae.safetensors",
        size="320 MB",
        other=re.compile(r"(^|[/\\])(ae|flux[-_ ]?1?[-_ ]?(vae|ae))[^/\\]*$", re.IGNORECASE),
    ),
)
SOURCE = "https://huggingface.co/Comfy-Org/z_image_turbo (also on modelscope.cn), below split_files/"
GGUF_PACK = "the custom nodes ComfyUI-GGUF (github.com/city96/ComfyUI-GGUF)"
FILE_FIELDS = re.compile("(unet|clip|vae|ckpt|lora|model|control_net|style_model|upscale_model)_name[0-9]*")


def own_workflow(files: Mapping[str, str]) -> Workflow:
    """The official template of this model in API format, with these files (setting -> name)."""
    nodes: dict[str, tuple[str, dict[str, Any]]] = {
        "11": ("ModelSamplingAuraFlow", {"model": ["28", 0], "shift": 3.0}),
        "27": ("CLIPTextEncode", {"clip": ["30", 0], "text": "{{prompt}}"}),
        "33": ("ConditioningZeroOut", {"conditioning": ["27", 0]}),
        "13": ("EmptySD3LatentImage", {"width": "{{width}}", "height": "{{height}}", "batch_size": 1}),
        "3": (
            "KSampler",
            {
                "model": ["11", 0],
                "positive": ["27", 0],
                "negative": ["33", 0],
                "latent_image": ["13", 0],
                "seed": "{{seed}}",
                "steps": "{{steps}}",
                "cfg": "{{guidance}}",
                "sampler_name": "res_multistep",
                "scheduler": "simple",
                "denoise": 1.0,
            },
        ),
        "8": ("VAEDecode", {"samples": ["3", 0], "vae": ["29", 0]}),
        "9": ("SaveImage", {"images": ["8", 0], "filename_prefix": "z-image-turbo"}),
    }
    more = {
        "model": {"weight_dtype": "default"},
        "text_encoder": {"type": "lumina2", "device": "default"},
        "vae": {},
    }
    for part in PARTS:
        name = files.get(part.setting, part.usual)
        is_gguf = part.gguf_loader != "" and name.lower().endswith(".gguf")
        beside = (
            {"type": "lumina2"} if is_gguf and part.setting == "text_encoder" else {} if is_gguf else more[part.setting]
        )
        nodes[part.node] = (part.gguf_loader if is_gguf else part.loader, {part.field: name, **beside})
    graph = {node: {"class_type": kind, "inputs": inputs} for node, (kind, inputs) in sorted(nodes.items())}
    marks = frozenset(marks_in([node["inputs"] for node in graph.values()]))
    return Workflow(graph, "", {}, marks)


def choices_of(info: Mapping[str, Any], field: str) -> list[str]:
    """What a node's input may be, in the older form of /object_info or the newer; empty where it is no choice."""
    said = at(info, "input", "required", field) or at(info, "input", "optional", field)
    if not isinstance(said, list) or not said:
        return []
    listed = said[0] if isinstance(said[0], list) else at(said[1], "options") if len(said) > 1 else None
    return [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []


def basename(name: str) -> str:
    return re.split(r"[/\\]", name)[-1].lower()


def best_of(part: Part, names: list[str], wanted: str | None) -> str | None:
    """The file to take of those that a server has: the one that is named, the usual one, else another build of it."""
    for name in (wanted,) if wanted else (part.usual,):
        if name in names:
            return name
        alike = [known for known in names if basename(known) == basename(name)]
        if alike:
            return alike[0]
    if wanted:
        return None
    others = [name for name in names if part.other.search(name)]
    ranks = {build: rank for rank, build in enumerate(BUILDS)}

    def rank(name: str) -> int:
        return next((ranks[build] for build in BUILDS if build in name.lower()), len(BUILDS))

    return min(others, key=rank, default=None)


# Options --------------------------------------------------------------------------------------------------------------


def file_name(text: str) -> str:
    if not re.fullmatch(r"[^\x00-\x1f\x7f]{1,300}\.(safetensors|sft|gguf|ckpt|pt|pth|bin)", text, re.IGNORECASE):
        raise ValueError("the name of a model file, as the server lists it")
    return text


OPTIONS = (
    Setting(
        "workflow",
        "FILE",
        "a workflow of the user's own in API format, in place of the one for this model; {{prompt}}, {{seed}}, "
        "{{width}}, {{height}}, {{steps}} in it are filled in",
        None,
        workflow_in,
        max_bytes=MAX_WORKFLOW,
    ),
    *(
        Setting(
            part.setting,
            "NAME",
            f"file in models/{part.folder} of the server; else {part.usual}, or what is there",
            None,
            file_name,
        )
        for part in PARTS
    ),
    STEPS,
    GUIDANCE,
)


# The provider ---------------------------------------------------------------------------------------------------------

Ask = Callable[[str], HttpCall]


class ComfyUI(OpenModel):
    """Queues a graph under a name of ours, and looks that up until its picture is there."""

    name = "comfyui"
    key_places = KeyPlaces(variable="COMFYUI_TOKEN", optional=True)  # the server asks for none: a proxy before it may
    user_variable, password_variable = "COMFYUI_USER", "COMFYUI_PASSWORD"
    roots: ClassVar = {"self-hosted": ""}
    default_region = "self-hosted"
    base_url_variables = ("COMFYUI_BASE_URL",)
    generate_path = "/prompt"
    usual_port = "8188"
    calls_at_once = 2  # one is drawn, the next waits: more would only stand in the queue
    links_to_itself = True
    names_tasks = True
    own_settings = OPTIONS

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(settings)
        self._given = frozenset(settings or {})
        self._files = {part.setting: self.settings[part.setting] for part in PARTS if self.settings[part.setting]}
        self._notes: tuple[str, ...] = ()
        self._is_met = False  # the server has said which files it has
        self._usage: dict[str, Any] = {}
        self._faulty: dict[str, str] = {}  # tasks of which a part was refused, and why
        self.takes_seed = "seed" in self.workflow.takes if self.workflow else True

    @property
    def workflow(self) -> Workflow | None:
        """What is queued; None where only a record tells of it."""
        own = self.settings["workflow"]
        return own_workflow(self._files) if own is None else own if isinstance(own, Workflow) else None

    # Where

    def root_of(self, path: str) -> str:
        """Every route exists below /api too, most of them only by that name as well."""
        return path.removesuffix(self.generate_path).removesuffix("/api")

    def unfit(self, host: str) -> str:
        is_cloud = host == "comfy.org" or host.endswith(".comfy.org")
        return "is Comfy Cloud, which has another API, and takes money" if is_cloud else ""

    def poll_pause(self, asked: int) -> float:
        return 1.0

    # What is asked for

    def _value_of(self, name: str) -> Any:
        """Steps or guidance to send; None leaves it to a workflow of the user's that has none of our marks."""
        flow = self.workflow
        if flow is not None and name not in flow.marks and name not in self._given:
            return None
        value = self.settings[name]
        return (value or NO_GUIDANCE) if name == "guidance" else value

    def payload(self, request: ImageRequest) -> dict[str, Any]:
        flow = self.workflow
        if flow is None:  # of an earlier run: its picture is only fetched
            return {"prompt": {}}
        width, height = request.width_height
        values = {
            "prompt": request.prompt,
            "negative": "",
            "seed": request.seed,
            "width": width,
            "height": height,
            "steps": self._value_of("steps"),
            "guidance": self._value_of("guidance"),
        }
        return {"prompt": flow.filled(values)}

    def named(self, payload: dict[str, Any], task_id: str) -> dict[str, Any]:
        return payload | {"prompt_id": task_id}

    def unused(self) -> tuple[str, ...]:
        flow = self.workflow
        if flow is None:
            return ()
        asked = ("seed", *(name for name in ("steps", "guidance") if name in self._given))
        return tuple(name for name in asked if name not in flow.takes)

    @property
    def known_settings(self) -> dict[str, Any]:
        """Of a workflow its hash; of steps and guidance what is sent."""
        known = super().known_settings
        if (own := known.get("workflow")) is None:
            return known
        unsent = [name for name in ("steps", "guidance") if self._value_of(name) is None or name in self.unused()]
        sent = {name: value for name, value in known.items() if name not in unsent}
        return sent | {"workflow": own.sha256 if isinstance(own, Workflow) else own}

    def cannot(self, request: ImageRequest) -> list[str]:
        sentences = super().cannot(request)
        own = self.settings["workflow"]
        if isinstance(own, str):
            sentences.append(f"workflow: it was made by a workflow of SHA-256 {own}; give that file by --workflow FILE")
        named = [part.setting for part in PARTS if own is not None and part.setting in self._given]
        sentences += [f"{name}: a workflow names its own files; leave one of the two out" for name in named]
        return sentences

    def notes(self, request: ImageRequest) -> tuple[str, ...]:
        flow, notes = self.workflow, list(self._notes)
        if flow is None or self.settings["workflow"] is None:
            return tuple(notes)
        if unused := self.unused():
            notes.append(f"not used, so not recorded: {', '.join(unused)}; the workflow has no place for it")
        if not {"width", "height"} <= flow.takes:
            notes.append("size: the workflow has no place for it, and draws its own")
        return tuple(notes)

    @property
    def draws_with(self) -> str:
        return ", ".join(self._files.get(part.setting, part.usual) for part in PARTS) if self._is_met else ""

    # What the server is, and has

    def introduction(self, endpoint: Endpoint, key: str) -> Generator[HttpCall, HttpAnswer | None, None]:
        yield from self._met(endpoint, key, is_sure=False)

    def query(self, endpoint: Endpoint, key: str, workspace: str | None) -> Generator[HttpCall, HttpAnswer, bool]:
        yield from self._met(endpoint, key, is_sure=True)
        return True

    def _met(self, endpoint: Endpoint, key: str, *, is_sure: bool) -> Generator[HttpCall, Any, None]:
        """Ask what the server is, and for the nodes and files that the graph needs.

        `is_sure`: an answer that tells nothing is a failure. Without, it is only where money may hang on it.

        Raises:
            Failure: invalid_base_url, missing_weights, usage; as `failure_of`.
        """

        def asking(path: str) -> HttpCall:
            return HttpCall("GET", endpoint.root + path, bearer(key))

        stats: HttpAnswer | None = yield asking("/system_stats")
        body = read_json(stats) if stats and stats.status == 200 else None
        system, devices = at(body, "system"), at(body, "devices")
        if is_sure and not isinstance(system, dict):
            raise failure_of(stats or HttpAnswer(0, {}, b""))
        if str(at(devices, 0, "name")).lower() == "koboldcpp":
            raise Failure(
                "invalid_base_url",
                f"{endpoint.host} is koboldcpp, which only imitates ComfyUI: it forgets which picture was asked for",
                hint="use --provider sdapi with its address, which it speaks truly",
            )
        facts = {"comfyui_version": at(system, "comfyui_version"), "device": at(devices, 0, "name")}
        self._usage = {name: outside_text(value, 100) for name, value in facts.items() if isinstance(value, str)}
        own = self.settings["workflow"]
        if isinstance(own, Workflow):
            yield from self._nodes_are_free(own, asking)
        elif stats is not None and own is None:
            yield from self._files_are_there(asking, is_sure=is_sure)

    def _info(
        self, kind: str, asking: Ask, *, is_sure: bool = False
    ) -> Generator[HttpCall, Any, dict[str, Any] | None]:
        """What a server says of a class of nodes; empty where it has none, None where it does not say."""
        answer: HttpAnswer | None = yield asking(f"/object_info/{quote(kind, safe='')}")
        body = read_json(answer) if answer and answer.status == 200 else None
        if body is None:
            if is_sure:
                raise failure_of(answer or HttpAnswer(0, {}, b""))
            return None
        info = body.get(kind)
        return info if isinstance(info, dict) else {}

    def _files_are_there(self, asking: Ask, *, is_sure: bool) -> Generator[HttpCall, Any, None]:
        missing, notes = [], []
        for part in PARTS:
            wanted = self.settings[part.setting]
            is_gguf = bool(wanted and part.gguf_loader and wanted.lower().endswith(".gguf"))
            loaders = [part.gguf_loader] if is_gguf else [part.loader, *([part.gguf_loader] if not wanted else [])]
            found, is_known = None, True
            for loader in filter(None, loaders):
                info = yield from self._info(loader, asking, is_sure=is_sure)
                is_known = is_known and info is not None
                found = best_of(part, choices_of(info or {}, part.field), wanted)
                if found:
                    break
            if found:
                self._files[part.setting] = found
                if not wanted and basename(found) != part.usual:
                    notes.append(f"{part.usual} is not on the server: {found} is used; --{flag_of(part)} names another")
            elif is_known:
                missing.append(missing_part(part, wanted, needs_pack=is_gguf and info == {}))
        self._notes, self._is_met = tuple(notes), True
        if missing:
            raise Failure("missing_weights", f"the server lacks {'; '.join(missing)}", hint=MISSING_HINT)

    def _nodes_are_free(self, flow: Workflow, asking: Ask) -> Generator[HttpCall, Any, None]:
        """No node of a user's workflow may be one that a third party is paid for."""
        for kind in sorted({node["class_type"] for node in flow.graph.values()}):
            info = yield from self._info(kind, asking)
            nodes = [shown_id(name) for name, node in flow.graph.items() if node["class_type"] == kind]
            named = f"node {', '.join(nodes[:3])} ({outside_text(kind, 100)})"
            if info is None:
                message = f"the server does not say what {named} is: it may be one that costs money"
                raise Failure("service_failing", message)
            if not info:
                hint = "install the custom nodes that bring it, or update ComfyUI; or take another workflow"
                raise Failure("rejected_by_service", f"the server does not know {named}", hint=hint)
            if is_paid(info):
                message = f"--workflow: {named} has others draw for money, from the account of the server's owner"
                raise Failure("usage", message, hint="take that node out: this tool cannot tell what it would cost")

    # The call

    def submit(self, payload: dict[str, Any], endpoint: Endpoint, key: str, workspace: str | None) -> HttpCall:
        return json_post(endpoint.url, payload, bearer(key))

    def read(self, answer: HttpAnswer, request: ImageRequest, now: dt.datetime) -> Submitted:
        body = read_json(answer) or {}
        if answer.status == 409:  # it came before, and its answer was lost
            return Submitted("")
        task_id = body.get("prompt_id")
        if answer.status != 200 or not isinstance(task_id, str):
            raise failure_of(answer)
        if faults := node_faults(body):
            self._faulty[task_id] = "; ".join(faults)
        return Submitted("")  # the name is ours, whatever is said of it: every version takes it

    def look_up(
        self, task_id: str, endpoint: Endpoint, key: str, request: ImageRequest, now: dt.datetime
    ) -> Generator[HttpCall, HttpAnswer, Generated | Working | None]:
        """History, queue, and history again: the task may move from one to the other between two questions."""
        name, root, headers = quote(task_id, safe=""), endpoint.root, bearer(key)
        if faults := self._faulty.pop(task_id, ""):  # the rest of it is being drawn, and is not what was asked for
            yield json_post(f"{root}/api/jobs/{name}/cancel", {}, headers)
            yield json_post(f"{root}/queue", {"delete": [task_id]}, headers)
            raise Failure(
                "task_failed", f"the server refused a part of the workflow: {faults}", exit_code=EXIT_INVALID,
                retryable=False, hint="correct the workflow as the message says",
            )  # fmt: skip
        history = HttpCall("GET", f"{root}/history/{name}", headers)
        entry = entry_of((yield history), task_id)
        if entry is None:
            place = place_in((yield HttpCall("GET", f"{root}/queue", headers)), task_id)
            if place is not None:
                return Working(place)
            entry = entry_of((yield history), task_id)
        if entry is None:
            raise Failure("not_found", "neither its queue nor its history has it")
        return self._made(entry, task_id, root)

    def _made(self, entry: Mapping[str, Any], task_id: str, root: str) -> Generated:
        """The pictures of an entry in the history.

        Raises:
            Failure: task_failed, too_little_memory, no_image.
        """
        if at(entry, "status", "status_str") == "error":
            raise end_of(entry)
        links = [f"{root}/view?{urlencode(picture)}" for picture in pictures_in(entry)]
        if not links:
            raise nothing_in(entry)
        usage = self._usage | ({"seconds": seconds} if (seconds := seconds_of(entry)) is not None else {})
        return Generated(image_url=links[0], request_id=task_id, usage=usage, other_urls=tuple(links[1:]))


# What comes back ------------------------------------------------------------------------------------------------------

MISSING_HINT = f"tell the user which files go where; they are at {SOURCE}; then refresh or restart the server"


def flag_of(part: Part) -> str:
    return part.setting.replace("_", "-")


def missing_part(part: Part, wanted: str | None, *, needs_pack: bool) -> str:
    """What is missing, the folder for it, and where to get it."""
    if needs_pack:
        return f"{GGUF_PACK}, without which it reads no {wanted}"
    place = f"models/{part.folder}/{wanted or part.usual}"
    if wanted:
        return f"{place} (--{flag_of(part)})"
    return f"{place} ({part.size}; split_files/{part.folder}/{part.usual} at {SOURCE.split()[0]})"


def is_paid(info: Mapping[str, Any]) -> bool:
    """Whether a class of nodes asks a service of others, on the account of the server's owner."""
    hidden = json.dumps(at(info, "input", "hidden"))
    is_named = "api_key_comfy_org" in hidden.lower() or "auth_token_comfy_org" in hidden.lower()
    module, category = str(info.get("python_module")), str(info.get("category"))
    return (
        info.get("api_node") is True
        or is_named
        or module.startswith("comfy_api_nodes")
        or category.startswith("api node")
    )


def node_faults(body: Mapping[str, Any]) -> list[str]:
    """What a server says of each node that it refused, in words."""
    errors = body.get("node_errors")
    found = []
    for node, said in errors.items() if isinstance(errors, dict) else ():
        listed = at(said, "errors")
        for error in listed if isinstance(listed, list) else ():
            words = ": ".join(filter(None, (text_of(at(error, "message")), text_of(at(error, "details")))))
            found.append(f"node {shown_id(node)} ({outside_text(at(said, 'class_type'), 60)}): {words}")
    return found


def text_of(value: Any) -> str:
    return outside_text(value, 300) if isinstance(value, str) else ""


def missing_files(body: Mapping[str, Any]) -> list[str]:
    """The files that a graph names and a server does not have: to it, values that are not in its list."""
    errors = body.get("node_errors")
    found = []
    for said in errors.values() if isinstance(errors, dict) else ():
        listed = at(said, "errors")
        for error in listed if isinstance(listed, list) else ():
            field, value = at(error, "extra_info", "input_name"), at(error, "extra_info", "received_value")
            if at(error, "type") == "value_not_in_list" and isinstance(field, str) and FILE_FIELDS.fullmatch(field):
                part = next((part for part in PARTS if part.field == field), None)
                where = f"models/{part.folder}/" if part else f"{field} "
                found.append(where + text_of(value))
    return found


def failure_of(answer: HttpAnswer) -> Failure:
    """What an answer without a task means: the server's error object, or what a proxy before it says."""
    body = read_json(answer) or {}
    error = body.get("error")
    faults, missing = node_faults(body), missing_files(body)
    words = [text_of(at(error, "message")), text_of(at(error, "details"))] if isinstance(error, dict) else []
    said = "; ".join(faults) or ": ".join(filter(None, words))
    kind, hint = None, None
    if 400 <= answer.status < 500 and missing:
        kind, hint = "missing_weights", MISSING_HINT
        said = f"the server lacks {', '.join(missing)}; {said}"
    elif answer.status == 403:
        hint = "tell the user: the server, or a proxy before it, refuses this client; ComfyUI alone asks for no login"
    elif at(error, "type") in ("missing_node_type", "invalid_prompt"):
        hint = "install the custom nodes that bring it, or update ComfyUI; or take another workflow"
    failure = service_failure(
        answer,
        message=said or None,
        code=text_of(at(error, "type")) if faults or words else "",
        kind=kind,
        is_own_json=bool(error),
        statuses=STATUS_KINDS,
        request_id=request_id(answer, body),
    )
    return failure.but(hint=hint) if hint and failure.fault.billed == "no" else failure


def entry_of(answer: HttpAnswer, task_id: str) -> Mapping[str, Any] | None:
    """What the history has of a task; None where it has nothing.

    Raises:
        Failure: where it is not the history that answers.
    """
    body = read_json(answer)
    entry = at(body, task_id)
    if isinstance(entry, dict):  # whatever status stands beside it: the task has ended
        return entry
    if answer.status != 200 or body is None:
        raise failure_of(answer)
    return None


def place_in(answer: HttpAnswer, task_id: str) -> str | None:
    """How far a task in the queue is, in words; None where it is not there. Raises as `entry_of`."""
    body = read_json(answer)
    running, pending = at(body, "queue_running"), at(body, "queue_pending")
    if answer.status != 200 or not isinstance(running, list) or not isinstance(pending, list):
        raise failure_of(answer)
    if task_id in [at(item, 1) for item in running]:
        return "it is being drawn"
    first = sorted((item for item in pending if isinstance(item, list)), key=lambda item: _number(at(item, 0)))
    names = [at(item, 1) for item in first]
    if task_id not in names:
        return None
    before = len(running) + names.index(task_id)
    return f"it waits in the queue, {before} before it"


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def messages_in(entry: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    said = at(entry, "status", "messages")
    for message in said if isinstance(said, list) else ():
        if isinstance(at(message, 0), str) and isinstance(at(message, 1), dict):
            yield message[0], message[1]


def end_of(entry: Mapping[str, Any]) -> Failure:
    """Why a task has ended without a picture. Prompts and traces that stand beside it are not told."""
    ends = dict(messages_in(entry))
    if "execution_interrupted" in ends:
        return Failure("task_failed", "the task was stopped on the server", hint="run it again if the user wants it")
    facts = ends.get("execution_error", {})
    where = f"node {text_of(facts.get('node_id')) or '?'} ({text_of(facts.get('node_type')) or 'unknown'})"
    kind, message = text_of(facts.get("exception_type")), text_of(facts.get("exception_message")).strip()
    said = f"{where}: {kind}: {message}" if facts else "the server does not say why"
    if re.search("OutOfMemory|out of memory|Allocation on device", f"{kind} {message}", re.IGNORECASE):
        hint = (
            "take a smaller size, or smaller files (--model with an fp8, int8 or GGUF build); or free the card's memory"
        )
        return Failure("too_little_memory", f"the card of the server has too little memory: {said}", hint=hint)
    return Failure("task_failed", f"the task failed: {said}")


def pictures_in(entry: Mapping[str, Any]) -> list[dict[str, str]]:
    """The pictures that a task has saved, by the number of their node. Previews are none."""
    outputs = at(entry, "outputs")
    nodes = outputs.items() if isinstance(outputs, dict) else ()
    found = []
    for _, output in sorted(nodes, key=lambda item: [part.zfill(12) for part in item[0].split(":")]):
        listed = at(output, "images")
        for image in listed if isinstance(listed, list) else ():
            name, folder = at(image, "filename"), at(image, "subfolder")
            if at(image, "type") == "output" and isinstance(name, str) and name:
                found.append(
                    {"filename": name, "subfolder": folder if isinstance(folder, str) else "", "type": "output"}
                )
    return found


def nothing_in(entry: Mapping[str, Any]) -> Failure:
    """That a task has ended well, and saved no picture."""
    is_cached = any(kind == "execution_cached" and facts.get("nodes") for kind, facts in messages_in(entry))
    outputs = json.dumps(at(entry, "outputs"))
    why = "it made a preview only: its workflow needs a SaveImage node" if '"temp"' in outputs else ""
    why = why or ("all of it came from the server's cache: another seed makes a new one" if is_cached else "")
    message = "the task has ended, and saved no picture" + (f"; {why}" if why else "")
    answer = HttpAnswer(200, {}, json.dumps(at(entry, "outputs")).encode())
    hint = "tell the user; --seed -1 makes another one" if is_cached else "tell the user: the workflow saves nothing"
    return Failure("no_image", message, billed="no", hint=hint, answer=kept_answer(answer, traces_in(None)))


def seconds_of(entry: Mapping[str, Any]) -> float | None:
    """How long the server has worked on it, by its own clock."""
    times = {kind: facts.get("timestamp") for kind, facts in messages_in(entry)}
    start, end = times.get("execution_start"), times.get("execution_success")
    if isinstance(start, (int, float)) and isinstance(end, (int, float)) and end >= start:
        return round((end - start) / 1000, 3)
    return None


PROVIDER = ComfyUI
