"""ComfyUI: a queue of graphs, a history of what became of them, and the pictures in its output folder."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID, uuid4

from zimage_mock import rules
from zimage_mock.drawing import Picture
from zimage_mock.errors import BALANCE_NAMES, RATE_NAMES, Dialect
from zimage_mock.exchange import Order, Reply, Request, json_reply
from zimage_mock.faults import Fault
from zimage_mock.gallery import delivered
from zimage_mock.limits import Recent
from zimage_mock.provider import Provider, Studio

HISTORY_KEPT = 10_000  # as the server itself
# What its nodes may be given, as GET /object_info says it: the choices of an input, where it is one.
FILES: Mapping[str, Mapping[str, list[str]]] = {
    "UNETLoader": {"unet_name": ["z_image_turbo_bf16.safetensors"], "weight_dtype": ["default", "fp8_e4m3fn"]},
    "CLIPLoader": {"clip_name": ["qwen_3_4b.safetensors"], "type": ["lumina2", "qwen_image"], "device": ["default"]},
    "VAELoader": {"vae_name": ["ae.safetensors"]},
    "KSampler": {"sampler_name": ["euler", "res_multistep"], "scheduler": ["simple", "normal"]},
}
PLAIN = (
    "ModelSamplingAuraFlow",
    "CLIPTextEncode",
    "ConditioningZeroOut",
    "EmptySD3LatentImage",
    "VAEDecode",
    "PrimitiveStringMultiline",
)
OUTPUTS = ("SaveImage", "PreviewImage")


def _error(status: int, code: str, message: str) -> object:
    """As for the graph itself; what concerns one node stands in `node_errors`."""
    return {"error": {"type": code, "message": message, "details": "", "extra_info": {}}, "node_errors": {}}


DIALECT = Dialect(
    "comfyui",
    _error,
    {
        **{name: (int(name), name) for name in ("401", "403", "404", "500", "503")},
        "400": (400, "invalid_prompt"),
        "blocked": (400, "content_policy_violation"),
        **dict.fromkeys(BALANCE_NAMES, (402, "insufficient_balance")),
        **dict.fromkeys(RATE_NAMES, (429, "rate_limit_exceeded")),
        "timeout": (504, "timeout"),
    },
)
TASK_FAULTS = {
    "node-error": Fault("200, though a part of the graph is refused; the rest is queued"),
    "out-of-memory": Fault("the task ends in an error: the card has too little memory"),
    "stopped": Fault("the task was stopped on the server"),
    "preview": Fault("the task ends well, and has saved previews only"),
    "restarted": Fault("the task is taken, and forgotten: no queue or history has it"),
}


@dataclass
class Job:
    """A graph in the queue; how it ends is settled when it comes."""

    id: str
    number: int
    graph: dict[str, Any]
    picture: Picture
    fault: str
    starts: float  # of time.monotonic()
    due: float
    file: str


class ComfyUI(Provider):
    """A server of one's own: it draws one graph after the other, and a key is only what a proxy before it asks for."""

    prefix = "/comfyui/"
    dialect = DIALECT
    own_faults = TASK_FAULTS
    limited = False

    def __init__(self, studio: Studio) -> None:
        super().__init__(studio)
        self._routes = {
            f"{self.prefix}prompt": {"POST": self._generate},
            f"{self.prefix}queue": {"GET": self._queue, "POST": lambda request: Reply(200)},
            f"{self.prefix}system_stats": {"GET": self._stats},
            f"{self.prefix}view": {"GET": self._view},
        }
        self._jobs: Recent[Job] = Recent(HISTORY_KEPT)
        self._files: Recent[Job] = Recent(HISTORY_KEPT)
        self._count = 0
        self._free_at = 0.0
        self._lock = threading.Lock()

    def answer(self, request: Request) -> Reply:
        """Answer one request; every route exists below /api too."""
        path = request.path.removeprefix(f"{self.prefix}api/").removeprefix(self.prefix)
        request = replace(request, path=self.prefix + path)
        for start, answer in (("object_info/", self._info), ("history/", self._history)):
            if path.startswith(start) and request.method == "GET":
                return answer(path.removeprefix(start))
        return super().answer(request)

    def _authorize(self, request: Request) -> None:
        if "authorization" in request.headers:
            super()._authorize(request)

    def _stats(self, request: Request) -> Reply:
        system = {"os": "posix", "comfyui_version": "0.36.0", "python_version": "3.12", "argv": ["main.py"]}
        device = {"name": "cuda:0 mock", "type": "cuda", "index": 0, "vram_total": 2**34, "vram_free": 2**33}
        return json_reply({"system": system, "devices": [device]})

    def _info(self, name: str) -> Reply:
        """Of a class of nodes; an unknown one is no error here."""
        self._studio.ledger.count("model_queries")
        if name not in (*FILES, *PLAIN, *OUTPUTS):
            return json_reply({})
        inputs = {field: [choices, {}] for field, choices in FILES.get(name, {}).items()}
        facts = {"input": {"required": inputs}, "output_node": name in OUTPUTS, "python_module": "nodes"}
        return json_reply({name: facts})

    def _order(self, body: object) -> Order:
        fields = self._object(body, "body", {"prompt"}, "prompt_id", "client_id", "extra_data", "number", "front")
        graph, name = fields["prompt"], fields.get("prompt_id") or str(uuid4())
        if not isinstance(name, str) or not _is_uuid(name):
            raise self._refused("invalid_prompt_id", "prompt_id must be a UUID")
        with self._lock:
            if name in self._jobs:
                raise self._refused("", "prompt_id already exists", 409)
        if not isinstance(graph, dict):
            raise self._refused("no_prompt", "No prompt provided")
        for node, said in graph.items():
            kind = said.get("class_type") if isinstance(said, dict) else None
            if kind not in (*FILES, *PLAIN, *OUTPUTS):
                raise self._refused("missing_node_type", f"Node '{kind}' not found", node=node)
        if not any(said["class_type"] in OUTPUTS for said in graph.values()):
            raise self._refused("prompt_no_outputs", "Prompt has no outputs")
        if wrong := {node: found for node, said in graph.items() if (found := _node_errors(said))}:
            raise self._refused("prompt_outputs_failed_validation", "Prompt outputs failed validation", wrong=wrong)
        sampler: dict[str, Any] = next(
            (said["inputs"] for said in graph.values() if said["class_type"] == "KSampler"), {}
        )
        text = next((said["inputs"].get("text") for said in graph.values() if "text" in said["inputs"]), "")
        sides: dict[str, Any] = next(
            (said["inputs"] for said in graph.values() if said["class_type"] == "EmptySD3LatentImage"), {}
        )
        wanted = {
            "seed": sampler.get("seed", rules.random_seed()),
            "width": sides.get("width", 1024),
            "height": sides.get("height", 1024),
            "graph": graph,
            "prompt_id": name,
        }
        return Order("z-image-turbo", str(text), wanted)

    def _refused(
        self, code: str, message: str, status: int = 400, node: str = "", wrong: Mapping[str, Any] | None = None
    ) -> Exception:
        refusal = self._refusal("400")
        error: object = {
            "type": code,
            "message": message,
            "details": "",
            "extra_info": {"node_id": node} if node else {},
        }
        body: object = {"error": error, "node_errors": wrong or {}} if code else {"error": message}
        refusal.reply = replace(json_reply(body), status=status, code=code or "409")
        return refusal

    def _make(self, order: Order, fault: str) -> Reply:
        wanted, now = order.parameters, time.monotonic()
        picture = Picture(order.prompt, wanted["seed"], wanted["width"], wanted["height"], "png")
        with self._lock:
            self._count += 1
            starts = max(now, self._free_at)
            self._free_at = starts + self._studio.latency_s
            file = f"z-image-turbo_{self._count:05d}_.png"
            name = wanted["prompt_id"]
            job = Job(name, self._count, wanted["graph"], picture, fault, starts, self._free_at, file)
            if fault != "restarted":
                self._jobs[name] = self._files[file] = job
        is_made = fault in ("ok", "no-image") or fault not in (*TASK_FAULTS, "no-image")
        if is_made:
            self._studio.ledger.bill(due=job.due)
        errors = {"9": _one_error("images", "required_input_missing")} if fault == "node-error" else {}
        return json_reply({"prompt_id": name, "number": job.number, "node_errors": errors}, billed=is_made)

    def _queue(self, request: Request) -> Reply:
        self._studio.ledger.count("status_queries")
        now = time.monotonic()
        with self._lock:
            open_jobs = [job for job in self._jobs.values() if job.due > now]
        items = [(job.starts <= now, [job.number, job.id, job.graph, {}, ["9"]]) for job in open_jobs]
        running, pending = ([item for runs, item in items if runs is state] for state in (True, False))
        return json_reply({"queue_running": running, "queue_pending": pending})

    def _history(self, name: str) -> Reply:
        """Empty while a task is in the queue, and where it is not known."""
        self._studio.ledger.count("status_queries")
        with self._lock:
            job = self._jobs.get(name)
        return json_reply({} if job is None or job.due > time.monotonic() else {name: _entry(job)})

    def _view(self, request: Request) -> Reply:
        with self._lock:
            job = self._files.get(request.query.get("filename", ""))
        if job is None or request.query.get("type") != "output":
            return Reply(404)
        fault = self._faults[job.fault]
        if fault.once:
            job.fault = "ok"
        reply = delivered(job.picture, fault, request.target)
        self._studio.ledger.count("downloads")
        return reply


def _is_uuid(text: str) -> bool:
    try:
        return str(UUID(text)) == text
    except ValueError:
        return False


def _one_error(field: str, kind: str, value: object = None, details: str = "") -> dict[str, Any]:
    facts = {"input_name": field, "input_config": [[], {}], "received_value": value}
    error = {"type": kind, "message": kind.replace("_", " ").capitalize(), "details": details, "extra_info": facts}
    return {"errors": [error], "dependent_outputs": ["9"], "class_type": "SaveImage"}


def _node_errors(said: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is wrong with one node: an input that is none of its choices."""
    for field, choices in FILES.get(said["class_type"], {}).items():
        value = said["inputs"].get(field)
        if value not in choices:
            found = _one_error(field, "value_not_in_list", value, f"{field}: {value!r} not in {choices}")
            return {**found, "class_type": said["class_type"]}
    return None


def _entry(job: Job) -> dict[str, Any]:
    images = [{"filename": job.file, "subfolder": "", "type": "temp" if job.fault == "preview" else "output"}]
    outputs = {} if job.fault in ("no-image", "out-of-memory", "stopped") else {"9": {"images": images}}
    start, end = (int(1000 * moment) for moment in (job.starts, job.due))
    facts: dict[str, Any] = {"prompt_id": job.id, "timestamp": end}
    last = "execution_success"
    if job.fault == "out-of-memory":
        last = "execution_error"
        facts |= {"node_id": "3", "node_type": "KSampler", "exception_type": "torch.OutOfMemoryError"}
        facts |= {"exception_message": "Allocation on device", "traceback": ["…"], "current_inputs": {"text": "…"}}
    elif job.fault == "stopped":
        last = "execution_interrupted"
        facts |= {"node_id": "3", "node_type": "KSampler", "executed": []}
    is_good = last == "execution_success"
    messages = [["execution_start", {"prompt_id": job.id, "timestamp": start}], [last, facts]]
    return {
        "prompt": [job.number, job.id, job.graph, {}, ["9"]],
        "outputs": outputs,
        "status": {"status_str": "success" if is_good else "error", "completed": is_good, "messages": messages},
        "meta": {},
    }
