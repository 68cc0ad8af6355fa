"""The table of the tests of all providers: how a service answers success and each fault in its own protocol.

    for case in CASES: ...                       # one row a provider; OpenAI's protocol has one more, with links
    lab = Lab(case, shell, server)               # the script pointed at a server that speaks the case's protocol
    lab.answers(case.refusal("busy"), lab.good)  # what paid calls get, one after the other, the last one for ever
    result = lab.make("--timeout", "5")          # one picture, by the real command line
    lab.assert_keys_kept()                       # over every file, stream and request of the test

It wraps `fault_server.FaultServer` and changes nothing of it. A new provider is one more class here.
"""

from __future__ import annotations

import base64
import json
import subprocess
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

from conftest import GENERATE as SCRIPT
from conftest import Result, Shell
from fault_server import PICTURE, Answer, Behaviour, FaultServer, Received, file, good_body, json_answer, png

# None begins with sk-: what masks them must know them, not guess them.
KEYS = {
    "DASHSCOPE_API_KEY": "ds-key-4c1f0a9e7b2d8365",
    "ZIMAGETURBO_API_KEY": "zt-key-9d27e5b0a3c8f146",
    "OPENAI_API_KEY": "oa-key-6b80f2d4c91e7a35",
    "COMFYUI_TOKEN": "cu-key-83a5d0c6f1b9e247",
    "MODELSCOPE_API_KEY": "ms-1e6f03b8-test-4d2a-9c57-a0b1c2d3e4f5",
    "SDAPI_API_KEY": "sa-key-e17c3b9f5d20a684",
}
NO_WAIT = (("Retry-After", "0"),)
NOT_NOW = (("Retry-After", "600"),)  # longer than any command here: no reason to wait for it

# What a service can refuse, by the exit code that the contract gives it.
REFUSALS = {"invalid": 2, "key": 3, "balance": 4, "blocked": 5, "busy": 6, "failing": 6, "overloaded": 6, "teapot": 8}
RETRIED = ("busy", "failing", "overloaded")


def changed(behaviour: Behaviour, **changes: Any) -> Callable[[Received], Answer]:
    """The same answer, sent in another way."""

    def answer(request: Received) -> Answer:
        return replace(behaviour if isinstance(behaviour, Answer) else behaviour(request), **changes)

    return answer


class Case(ABC):
    """One provider's protocol, seen from the service's side."""

    id: ClassVar[str]
    provider: ClassVar[str]
    root: ClassVar[str]  # path of the API root
    paid: ClassVar[str]  # below it
    free: ClassVar[str]  # what --check asks, below it
    says: ClassVar[dict[str, object]] = {}  # what it is, to whom asks: whole paths, and the bodies of answers
    limits: ClassVar[str] = ""  # what it asks then, below it; nothing where that is all
    picture: ClassVar[str] = PICTURE  # where links lead
    key_variable: ClassVar[str]
    url_variable: ClassVar[str]
    cost: ClassVar[float]
    is_billed: ClassVar[bool] = True  # a picture costs money or quota
    lists_models: ClassVar[bool] = True
    first_task: ClassVar[str] = ""  # how the service of `TaskBook` calls it
    names_tasks: ClassVar[bool] = False  # the caller does: what was lost is looked up, and not unknown
    key_is_optional: ClassVar[bool] = False
    takes_seed: ClassVar[bool] = True
    by_task: ClassVar[bool] = False
    by_link: ClassVar[bool] = True  # else the picture itself is in the answer
    exact_size: ClassVar[bool] = True
    refused_as: ClassVar[dict[str, tuple[int, str]]]  # refusal -> HTTP status and the service's own code

    @property
    def key(self) -> str:
        return KEYS[self.key_variable]

    @property
    def paid_path(self) -> str:
        return self.root + self.paid

    @property
    def picture_path(self) -> str:
        return urlsplit(self.picture).path

    @property
    def free_path(self) -> str:
        return self.root + self.free

    @property
    def free_paths(self) -> list[str]:
        """All that --check asks."""
        return [self.free_path, *([self.root + self.limits] if self.limits else [])]

    def is_free_path(self, path: str) -> bool:
        """Whether that is asked without cost: questions after tasks too."""
        return path in self.free_paths

    @abstractmethod
    def said(self, status: int, code: str, message: str) -> object:
        """The body of an error in the service's own form."""

    @abstractmethod
    def made(self, request: Received, content: bytes) -> object:
        """The body that answers the paid call where all is well."""

    @abstractmethod
    def empty(self) -> object:
        """The body of a good answer that has no picture in it."""

    @abstractmethod
    def expected_payload(self, prompt: str, seed: int | None) -> dict[str, Any]:
        """The body of a paid call for a square picture of about 1024*1024."""

    def unasked_payload(self, prompt: str, seed: int | None) -> dict[str, Any]:
        """The same where nobody has asked yet what the server is."""
        return self.expected_payload(prompt, seed)

    def listed(self) -> object:
        """The body that answers --check where the key is good."""
        return {"object": "list", "data": [{"id": "Tongyi-MAI/Z-Image-Turbo", "object": "model"}]}

    def told(self) -> object:
        """The body that answers what --check asks then."""
        return {"success": True, "data": {}}

    def prompt_in(self, body: dict[str, Any]) -> str:
        return str(body["prompt"])

    def without_name(self, body: dict[str, Any]) -> dict[str, Any]:
        """The body of a paid call without the name that its task was given."""
        return body

    def refusal(self, name: str, message: str = "it did not work", **fields: Any) -> Answer:
        """A refusal of REFUSALS; `fields` as in `json_answer`."""
        status, code = self.refused_as[name]
        return json_answer(self.said(status, code, message), status, **fields)

    def __repr__(self) -> str:
        return self.id


class DashScopeCase(Case):
    id = provider = "dashscope"
    root = "/api/v1"
    paid = "/services/aigc/multimodal-generation/generation"
    free = "/models"
    limits = "/quotas"
    key_variable = "DASHSCOPE_API_KEY"
    url_variable = "DASHSCOPE_BASE_URL"
    cost = 0.01434
    refused_as: ClassVar = {
        "invalid": (400, "InvalidParameter"),
        "key": (401, "InvalidApiKey"),
        "balance": (400, "Arrearage"),
        "blocked": (400, "DataInspectionFailed"),
        "busy": (429, "Throttling.RateQuota"),
        "failing": (500, "InternalError"),
        "overloaded": (503, "ServiceUnavailable"),
        "teapot": (418, "Teapot"),
    }

    def said(self, status: int, code: str, message: str) -> object:
        return {"code": code, "message": message, "request_id": "req-0002"}

    def made(self, request: Received, content: bytes) -> object:
        return good_body(request.root + PICTURE)

    def empty(self) -> object:
        return good_body("", content=[{"text": "x"}])

    def listed(self) -> object:
        return {"request_id": "r", "output": {"models": [{"model": "z-image-turbo"}], "total": 1}}

    def prompt_in(self, body: dict[str, Any]) -> str:
        return str(body["input"]["messages"][0]["content"][0]["text"])

    def expected_payload(self, prompt: str, seed: int | None) -> dict[str, Any]:
        return {
            "model": "z-image-turbo",
            "input": {"messages": [{"role": "user", "content": [{"text": prompt}]}]},
            "parameters": {"size": "1024*1024", "prompt_extend": False, "seed": seed},
        }


class ZImageTurboCase(Case):
    id = provider = "zimageturbo"
    root = "/api"
    paid = "/generate"
    free = "/status"
    key_variable = "ZIMAGETURBO_API_KEY"
    url_variable = "ZIMAGETURBO_BASE_URL"
    cost = 0.02
    takes_seed = False
    by_task = True
    first_task = "task_0000"
    lists_models = False
    exact_size = False
    refused_as: ClassVar = {
        "invalid": (400, ""),
        "key": (401, ""),
        "balance": (402, ""),
        "blocked": (400, "sensitive"),
        "busy": (429, ""),
        "failing": (500, ""),
        "overloaded": (503, ""),
        "teapot": (418, ""),
    }

    def said(self, status: int, code: str, message: str) -> object:
        return {"code": status, "message": f"{message}: {code} content" if code else message, "data": None}

    def made(self, request: Received, content: bytes) -> object:
        raise NotImplementedError  # TaskBook answers

    def empty(self) -> object:
        return {"code": 200, "message": "success", "data": None}

    def listed(self) -> object:
        return self.said(404, "", "task not found")

    def expected_payload(self, prompt: str, seed: int | None) -> dict[str, Any]:
        return {"prompt": prompt, "aspect_ratio": "1:1"}


class ModelScopeCase(Case):
    id = provider = "modelscope"
    root = "/v1"
    paid = "/images/generations"
    free = "/models"
    key_variable = "MODELSCOPE_API_KEY"
    url_variable = "MODELSCOPE_BASE_URL"
    cost = 0.0
    by_task = True
    first_task = "5075000"
    refused_as: ClassVar = {
        "invalid": (400, "invalid size"),
        "key": (401, "Authentication failed, please make sure that a valid ModelScope token is supplied"),
        "balance": (429, "insufficient balance (1008)"),
        "blocked": (400, "data inspection failed"),
        "busy": (429, "Too many requests, rate limit exceeded for this model"),
        "failing": (500, "oops"),
        "overloaded": (503, "Server is busy, please try again later"),
        "teapot": (418, "teapot"),
    }

    @property
    def free_paths(self) -> list[str]:
        return [self.free_path, "/openapi/v1/magicubes/balance"]

    def is_free_path(self, path: str) -> bool:
        return super().is_free_path(path) or path.startswith("/v1/tasks/")

    def said(self, status: int, code: str, message: str) -> object:
        return {"errors": {"message": f"{message}: {code}"}, "request_id": "req-0003"}

    def made(self, request: Received, content: bytes) -> object:
        raise NotImplementedError  # TaskBook answers

    def empty(self) -> object:
        return {"request_id": "req-0003"}

    def expected_payload(self, prompt: str, seed: int | None) -> dict[str, Any]:
        return {"model": "Tongyi-MAI/Z-Image-Turbo", "prompt": prompt, "size": "1024x1024", "seed": seed}


class OpenAICase(Case):
    id = provider = "openai"
    root = "/v1"
    paid = "/images/generations"
    free = "/models"
    key_variable = "OPENAI_API_KEY"
    url_variable = "OPENAI_BASE_URL"
    cost = 0.0
    is_billed = False
    key_is_optional = True
    by_link = False
    refused_as: ClassVar = {
        "invalid": (400, "invalid_size"),
        "key": (401, "invalid_api_key"),
        "balance": (429, "insufficient_quota"),
        "blocked": (400, "content_policy_violation"),
        "busy": (429, "rate_limit_exceeded"),
        "failing": (500, "server_error"),
        "overloaded": (503, "engine_overloaded"),
        "teapot": (418, "teapot"),
    }

    def is_free_path(self, path: str) -> bool:
        signs = ("/health/liveliness", "/sdcpp/v1/capabilities", "/readyz")  # asked where no list of models tells
        return super().is_free_path(path) or path in signs

    def said(self, status: int, code: str, message: str) -> object:
        return {"error": {"message": message, "type": "some_error", "param": None, "code": code}}

    def made(self, request: Received, content: bytes) -> object:
        return {"created": 1767000000, "data": [{"b64_json": base64.b64encode(content).decode()}]}

    def listed(self) -> object:
        """It says that it is vLLM-Omni."""
        model = {"id": "Tongyi-MAI/Z-Image-Turbo", "object": "model", "owned_by": "vllm"}
        return {"object": "list", "data": [model]}

    def empty(self) -> object:
        return {"created": 1767000000, "data": []}

    def expected_payload(self, prompt: str, seed: int | None) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "size": "1024x1024",
            "n": 1,
            "response_format": "b64_json",
            "seed": seed,
            "num_inference_steps": 9,
            "guidance_scale": 0.0,
        }

    def unasked_payload(self, prompt: str, seed: int | None) -> dict[str, Any]:
        return self.expected_payload(prompt, seed) | {"num_inference_steps": 8}


class OpenAILinkCase(OpenAICase):
    """A server that answers with a link although bytes were asked for: some do."""

    id = "openai-link"
    by_link = True

    def made(self, request: Received, content: bytes) -> object:
        return {"created": 1767000000, "data": [{"url": request.root + PICTURE}]}


class SdApiCase(Case):
    """A server that says that it is Forge."""

    id = provider = "sdapi"
    root = "/sdapi/v1"
    paid = "/txt2img"
    free = "/sd-models"
    says: ClassVar = {"/sdapi/v1/sd-modules": [{"model_name": "ae.safetensors"}]}
    key_variable = "SDAPI_API_KEY"
    url_variable = "SDAPI_BASE_URL"
    cost = 0.0
    is_billed = False
    key_is_optional = True
    by_link = False
    refused_as: ClassVar = {
        "invalid": (422, ""),
        "key": (401, ""),
        "balance": (402, ""),
        "blocked": (400, "content_policy_violation"),
        "busy": (429, ""),
        "failing": (500, "RuntimeError"),
        "overloaded": (503, ""),
        "teapot": (418, ""),
    }

    def said(self, status: int, code: str, message: str) -> object:
        if status == 500:
            return {"error": code, "detail": "", "body": "", "errors": message}
        return {"detail": {"msg": message, "type": code}} if code else {"detail": message}

    def made(self, request: Received, content: bytes) -> object:
        asked = json.loads(request.body)
        told = {name: asked.get(name) for name in ("prompt", "seed", "steps", "cfg_scale", "sampler_name")}
        image = base64.b64encode(content).decode()
        return {"images": [image], "parameters": asked, "info": json.dumps(told)}

    def listed(self) -> object:
        return [{"title": "z_image_turbo.safetensors [abcdef1234]", "model_name": "z_image_turbo"}]

    def empty(self) -> object:
        return {"images": [], "parameters": {}, "info": ""}

    def expected_payload(self, prompt: str, seed: int | None) -> dict[str, Any]:
        return self.unasked_payload(prompt, seed) | {"scheduler": "Simple"}

    def unasked_payload(self, prompt: str, seed: int | None) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "negative_prompt": "",
            "width": 1024,
            "height": 1024,
            "steps": 8,
            "cfg_scale": 1.0,
            "seed": seed,
            "sampler_name": "Euler",
            "batch_size": 1,
            "n_iter": 1,
            "send_images": True,
            "save_images": False,
        }


class ComfyUICase(Case):
    """It may be asked for the picture only after these questions; that its nodes are free and its files there."""

    id = provider = "comfyui"
    root = ""
    paid = "/prompt"
    free = "/system_stats"
    key_variable = "COMFYUI_TOKEN"
    url_variable = "COMFYUI_BASE_URL"
    cost = 0.0
    is_billed = False
    key_is_optional = True
    by_task = True
    names_tasks = True
    picture = "/view?filename=z.png&subfolder=&type=output"
    refused_as: ClassVar = {
        "invalid": (400, "prompt_outputs_failed_validation"),
        "key": (401, "unauthorized"),
        "balance": (402, "payment_required"),
        "blocked": (400, "content_policy_violation"),
        "busy": (429, "too_many_requests"),
        "failing": (500, "server_error"),
        "overloaded": (503, "overloaded"),
        "teapot": (418, "teapot"),
    }
    files: ClassVar = {
        "UNETLoader": {"unet_name": "z_image_turbo_bf16.safetensors"},
        "CLIPLoader": {"clip_name": "qwen_3_4b.safetensors"},
        "VAELoader": {"vae_name": "ae.safetensors"},
    }

    @property
    def free_paths(self) -> list[str]:
        return [self.free_path, *(f"/object_info/{kind}" for kind in self.files)]

    def is_free_path(self, path: str) -> bool:
        return super().is_free_path(path) or path == "/queue" or path.startswith("/history/")

    def said(self, status: int, code: str, message: str) -> object:
        return {"error": {"type": code, "message": message, "details": "", "extra_info": {}}, "node_errors": {}}

    def made(self, request: Received, content: bytes) -> object:
        raise NotImplementedError  # TaskBook answers

    def empty(self) -> object:
        return {"number": 1, "node_errors": {}}

    def listed(self) -> object:
        return {"system": {"comfyui_version": "0.36.0"}, "devices": [{"name": "cuda:0"}]}

    def told(self) -> object:
        return {
            kind: {"input": {"required": {field: [[name], {}] for field, name in fields.items()}}}
            for kind, fields in self.files.items()
        }

    def prompt_in(self, body: dict[str, Any]) -> str:
        return str(body["prompt"]["27"]["inputs"]["text"])

    def without_name(self, body: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in body.items() if name != "prompt_id"}

    def expected_payload(self, prompt: str, seed: int | None) -> dict[str, Any]:
        nodes: dict[str, tuple[str, dict[str, Any]]] = {
            "28": ("UNETLoader", {"unet_name": "z_image_turbo_bf16.safetensors", "weight_dtype": "default"}),
            "30": ("CLIPLoader", {"clip_name": "qwen_3_4b.safetensors", "type": "lumina2", "device": "default"}),
            "29": ("VAELoader", {"vae_name": "ae.safetensors"}),
            "11": ("ModelSamplingAuraFlow", {"model": ["28", 0], "shift": 3.0}),
            "27": ("CLIPTextEncode", {"clip": ["30", 0], "text": prompt}),
            "33": ("ConditioningZeroOut", {"conditioning": ["27", 0]}),
            "13": ("EmptySD3LatentImage", {"width": 1024, "height": 1024, "batch_size": 1}),
            "3": (
                "KSampler",
                {
                    "model": ["11", 0],
                    "positive": ["27", 0],
                    "negative": ["33", 0],
                    "latent_image": ["13", 0],
                    "seed": seed,
                    "steps": 8,
                    "cfg": 1.0,
                    "sampler_name": "res_multistep",
                    "scheduler": "simple",
                    "denoise": 1.0,
                },
            ),
            "8": ("VAEDecode", {"samples": ["3", 0], "vae": ["29", 0]}),
            "9": ("SaveImage", {"images": ["8", 0], "filename_prefix": "z-image-turbo"}),
        }
        return {"prompt": {node: {"class_type": kind, "inputs": inputs} for node, (kind, inputs) in nodes.items()}}


DASHSCOPE, ZIMAGETURBO, OPENAI, OPENAI_LINK = DashScopeCase(), ZImageTurboCase(), OpenAICase(), OpenAILinkCase()
MODELSCOPE, SDAPI, COMFYUI = ModelScopeCase(), SdApiCase(), ComfyUICase()
CASES: tuple[Case, ...] = (DASHSCOPE, ZIMAGETURBO, MODELSCOPE, OPENAI, SDAPI, COMFYUI)
LINKED_CASES: tuple[Case, ...] = (DASHSCOPE, ZIMAGETURBO, OPENAI_LINK, MODELSCOPE, COMFYUI)
OTHER_TABLES = {"diffusers"}  # in this process, no protocol: tests/test_diffusers.py


def envelope(data: object, code: object = 200, **fields: Any) -> Answer:
    """An answer of zimageturbo.ai."""
    return json_answer({"code": code, "message": "success", "data": data}, **fields)


@dataclass
class TaskBook:
    """The tasks of a service that works by them; what is told of one is decided by `course`."""

    tasks: dict[str, str] = field(default_factory=dict)  # id -> prompt
    asked: Counter[str] = field(default_factory=Counter)  # id -> questions so far
    course: Callable[[TaskBook, str, Received], Answer] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def submit(self, request: Received) -> Answer:
        with self._lock:
            task_id = f"task_{len(self.tasks):04d}"
            self.tasks[task_id] = json.loads(request.body)["prompt"]
        return envelope({"task_id": task_id, "status": "IN_PROGRESS"}, bills=True)

    def status(self, request: Received) -> Answer:
        task_id = self.asked_for(request)
        with self._lock:
            self.asked[task_id] += 1
        if task_id not in self.tasks:
            return self.unknown()
        return self.course(self, task_id, request) if self.course else self.done(task_id, request)

    def asked_for(self, request: Received) -> str:
        """The name of the task that a question is after."""
        return parse_qs(urlsplit(request.target).query)["task_id"][0]

    def unknown(self) -> Answer:
        return json_answer({"code": 404, "message": "task not found", "data": None}, 404)

    def done(self, task_id: str, request: Received, **changes: Any) -> Answer:
        """The task has succeeded; `changes` replace fields of its data."""
        return envelope(self.data(task_id, "SUCCESS", request.root + PICTURE) | changes)

    def working(self, task_id: str, status: str = "IN_PROGRESS") -> Answer:
        return envelope(self.data(task_id, status))

    def failed(self, task_id: str, message: str) -> Answer:
        return envelope(self.data(task_id, "FAILED") | {"error_message": message})

    def data(self, task_id: str, status: str, *links: str) -> dict[str, Any]:
        return {
            "status": status,
            "task_id": task_id,
            "request": {"prompt": self.tasks[task_id], "size": "1024*1024", "seed": "-1"},
            "response": list(links),
            "consumed_credits": 15,
            "created_at": "2025-12-05 13:05:09",
            "error_message": None,
        }

    def play(self, *steps: Callable[[str, Received], Answer]) -> None:
        """What the questions after each task get, one after the other, the last one for ever."""

        def course(book: TaskBook, task_id: str, request: Received) -> Answer:
            return steps[min(book.asked[task_id], len(steps)) - 1](task_id, request)

        self.course = course


class ScopeBook(TaskBook):
    """The tasks of ModelScope: named by numbers, which answers tell as a number or as a text."""

    def submit(self, request: Received) -> Answer:
        with self._lock:
            number = 5075000 + len(self.tasks)
            self.tasks[str(number)] = json.loads(request.body)["prompt"]
        return json_answer({"task_id": number, "request_id": "req-0003"}, bills=True)

    def asked_for(self, request: Received) -> str:
        return request.path.rpartition("/")[2]

    def unknown(self) -> Answer:
        return json_answer({"errors": {"message": "task not found"}, "request_id": "req-0003"}, 404)

    def done(self, task_id: str, request: Received, **changes: Any) -> Answer:
        return json_answer(self.data(task_id, "SUCCEED", request.root + PICTURE) | changes)

    def working(self, task_id: str, status: str = "RUNNING") -> Answer:
        return json_answer(self.data(task_id, status))

    def failed(self, task_id: str, message: str) -> Answer:
        return json_answer(self.data(task_id, "FAILED") | {"errors": {"message": message}})

    def data(self, task_id: str, status: str, *links: str) -> dict[str, Any]:
        told = {"task_status": status, "task_id": task_id, "request_id": "req-0003"}
        return told | ({"output_images": list(links), "time_taken": 18812.86} if links else {})


class GraphBook(TaskBook):
    """The queue and the history of ComfyUI: tasks are named by whoever sends them."""

    def submit(self, request: Received) -> Answer:
        body = json.loads(request.body)
        with self._lock:
            self.tasks[body["prompt_id"]] = COMFYUI.prompt_in(body)
        return json_answer({"prompt_id": body["prompt_id"], "number": 1, "node_errors": {}}, bills=True)

    def asked_for(self, request: Received) -> str:
        return request.path.rpartition("/")[2]

    def unknown(self) -> Answer:
        return json_answer({})

    def queue(self, request: Received) -> Answer:
        """Nothing is there: what is not in the history is not known."""
        return json_answer({"queue_running": [], "queue_pending": []})

    def done(self, task_id: str, request: Received, **changes: Any) -> Answer:
        return self.entry(
            task_id, "success", {"9": {"images": [{"filename": "z.png", "subfolder": "", "type": "output"}]}}
        )

    def working(self, task_id: str, status: str = "RUNNING") -> Answer:
        return json_answer({})

    def failed(self, task_id: str, message: str) -> Answer:
        facts = {"node_id": "3", "node_type": "KSampler", "exception_type": "Error", "exception_message": message}
        return self.entry(task_id, "error", {}, ["execution_error", facts])

    def entry(self, task_id: str, status: str, outputs: object, *messages: object) -> Answer:
        said = {"status_str": status, "completed": status == "success", "messages": list(messages)}
        return json_answer({task_id: {"outputs": outputs, "status": said}})


BOOKS: dict[str, type[TaskBook]] = {"modelscope": ScopeBook, "comfyui": GraphBook}


class Lab:
    """The script pointed at a server that speaks a case's protocol, with the keys of all providers at hand."""

    def __init__(self, case: Case, shell: Shell, server: FaultServer) -> None:
        self.case = case
        self.shell = shell
        self.server = server
        self.book = BOOKS.get(case.provider, TaskBook)()
        self.streams: list[str] = []
        shell.env |= {**KEYS, case.url_variable: server.root + case.root}
        self.picture(png())
        for path, body in case.says.items():
            server.play(path, json_answer(body))
        self.about_tasks(self.book.status)
        if case is not ZIMAGETURBO:  # where that is the same
            server.play(case.free_path, json_answer(case.listed()))
        for path in case.free_paths[1:]:
            server.play(path, json_answer(case.told()))

    # What the service does

    def good(self, request: Received) -> Answer:
        """A picture is made and billed, or its task is."""
        if self.case.by_task:
            return self.book.submit(request)
        return json_answer(self.case.made(request, self._content), bills=True)

    def picture(self, content: bytes, **fields: Any) -> None:
        """The picture that the service makes from now on, by link or in its answer."""
        self._content = content
        self.server.play(self.case.picture_path, file(content, **fields))
        self.server.play(self.case.paid_path, self.good)

    def answers(self, *behaviours: Behaviour) -> None:
        """What paid calls get, one after the other; the last one holds for all that follow."""
        self.server.play(self.case.paid_path, *behaviours)

    def about_tasks(self, *behaviours: Behaviour) -> None:
        """What questions after tasks get."""
        if self.case is ZIMAGETURBO:
            self.server.play(self.case.free_path, *behaviours)
        if self.case is MODELSCOPE:
            self.server.play("/v1/tasks/", *behaviours)
        if isinstance(self.book, GraphBook):
            self.server.play("/history/", *behaviours)
            self.server.play("/queue", self.book.queue)

    # What the script does

    @property
    def request(self) -> tuple[str, ...]:
        return ("--provider", self.case.provider, "--prompt", "a fox", "--output", "out.png", "--print-response")

    def make(self, *more: str) -> Result:
        return self.call(*self.request, *more)

    def call(self, *arguments: str) -> Result:
        return self.noted(self.shell.call(*arguments))

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        return self.shell.start(*self.request, *more)

    def finish(self, process: subprocess.Popen[bytes]) -> Result:
        return self.noted(self.shell.finish(process))

    def recover(self, *more: str) -> Result:
        (path,) = self.shell.evidence_files()
        self.shell.script = SCRIPT
        return self.call("--recover", str(path), "--print-response", *more)

    def noted(self, result: Result) -> Result:
        self.streams += [result.stdout, result.stderr]
        return result

    # What can be seen afterwards

    @property
    def paid(self) -> list[Received]:
        """The paid calls that reached the server."""
        return [request for request in self.server.posts if request.path == self.case.paid_path]

    @property
    def payloads(self) -> list[dict[str, Any]]:
        return [self.case.without_name(json.loads(request.body)) for request in self.paid]

    @property
    def prompts(self) -> list[str]:
        """Those of all paid calls, in the order of their arrival."""
        return [self.case.prompt_in(payload) for payload in self.payloads]

    @property
    def questions(self) -> list[Received]:
        """Those after tasks, and of what the server is."""
        return [request for request in self.server.downloads if self.case.is_free_path(request.path)]

    def status(self) -> str:
        return str(self.shell.evidence()["status"])

    def assert_keys_kept(self) -> None:
        """The key is in no file and no stream, and in requests only where it belongs; no other key is anywhere."""
        files = {
            path: path.read_bytes()
            for folder in (self.shell.folder, self.shell.home)
            for path in folder.rglob("*")
            if path.is_file() and not path.is_symlink()
        }
        for name, key in KEYS.items():
            assert not any(key in stream for stream in self.streams), f"{name} is in a stream"
            assert [str(path) for path, content in files.items() if key.encode() in content] == [], name
        assert_keys_at(self.server, self.case)


def assert_keys_at(server: FaultServer, case: Case | None) -> None:
    """A server has seen the key of the case, in the one header of service calls, and no other key anywhere."""
    for request in server.requests:
        pays = case is not None and request.path == case.paid_path
        calls = case is not None and (pays or case.is_free_path(request.path) or request.path in case.says)
        sent = f"{request.target} {request.body.decode('utf-8', 'replace')}"
        for name, value in request.headers:
            if name == "authorization" and calls and case is not None and value == f"Bearer {case.key}":
                continue
            sent += f" {name}: {value}"
        assert not any(key in sent for key in KEYS.values()), (request.method, request.target, request.headers)
