"""ComfyUI: a graph is queued once under a name of ours, looked up until its picture is there, and told of truly.

The server here keeps a queue and a history as ComfyUI does; what one of its routes says can be replaced by `play`.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit
from uuid import UUID, uuid4

import pytest
from PIL import Image, PngImagePlugin

from conftest import GENERATE, Result, Shell
from fault_server import Answer, FaultServer, Received, file, html, json_answer, png, typed
from mock_server import MockServer
from zimage.batch.contract import DATABASE
from zimage.provider import Provider
from zimage.registry import provider_class, provider_named
from zimage.request import ImageRequest
from zimage.workflow import Workflow, workflow_in

PNG = png(512, 512)
BATCH = GENERATE.with_name("generate_batch.py")
FILES = {
    "UNETLoader": {"unet_name": ["z_image_turbo_bf16.safetensors", "flux1-dev.safetensors"]},
    "CLIPLoader": {"clip_name": ["t5xxl.safetensors", "qwen_3_4b.safetensors"], "type": ["lumina2"]},
    "VAELoader": {"vae_name": ["ae.safetensors", "sdxl.safetensors"]},
}
PLAIN = ("KSampler", "CLIPTextEncode", "EmptySD3LatentImage", "VAEDecode", "SaveImage", "CheckpointLoaderSimple")
needs_kill = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


class Comfy(FaultServer):
    """A ComfyUI on loopback. `ends` says what becomes of a task; until then it stands in the queue."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, dict[str, list[str]]] = json.loads(json.dumps(FILES))
        self.nodes: dict[str, dict[str, Any]] = {kind: {} for kind in PLAIN}
        self.system: dict[str, Any] = {"comfyui_version": "0.36.0"}
        self.device = "cuda:0 NVIDIA"
        self.jobs: dict[str, dict[str, Any]] = {}
        self.refuses_doubles = False
        self.waits = 0  # questions for which a task stays in the queue
        self.before = 0  # others in the queue
        self.entry: Callable[[str], dict[str, Any]] = saved
        self.picture = PNG
        self.view = file(PNG)
        self.newer_form = False

    def take(self, request: Received) -> Answer:
        """What POST /prompt does where nothing goes wrong."""
        body = json.loads(request.body)
        name = body["prompt_id"]
        if name in self.jobs and self.refuses_doubles:
            return json_answer({"error": "prompt_id already exists"}, 409)
        self.jobs[name] = {"graph": body["prompt"], "asked": 0, "posts": self.jobs.get(name, {}).get("posts", 0) + 1}
        return json_answer({"prompt_id": name, "number": len(self.jobs), "node_errors": {}}, bills=True)

    def _answer_to(self, request: Received) -> Answer:
        with self._lock:
            is_scripted = request.path in self._scripts
        if not is_scripted and (answer := self._own(request)) is not None:
            with self._lock:
                self.requests.append(request)
            return answer
        return super()._answer_to(request)

    def _own(self, request: Received) -> Answer | None:
        path = request.path
        if path == "/prompt":
            return self.take(request)
        if path == "/system_stats":
            return json_answer({"system": self.system, "devices": [{"name": self.device, "type": "cuda"}]})
        if path.startswith("/object_info/"):
            return json_answer(self._info(path.removeprefix("/object_info/")))
        if path.startswith("/history/"):
            name = path.removeprefix("/history/")
            job = self.jobs.get(name)
            return json_answer({name: self.entry(name)} if job and job["asked"] >= self.waits else {})
        if path == "/queue" and request.method == "GET":
            for job in self.jobs.values():
                job["asked"] += 1
            others = [[n, f"other-{n}", {}, {}, []] for n in range(self.before)]
            own = [[99, name, job["graph"], {}, ["9"]] for name, job in self.jobs.items() if job["asked"] <= self.waits]
            listed = [*others, *own]
            return json_answer({"queue_running": listed[:1], "queue_pending": listed[1:]})
        if path == "/view":
            return self.view
        return Answer() if request.method == "POST" else None

    def _info(self, kind: str) -> dict[str, Any]:
        if kind not in self.files and kind not in self.nodes:
            return {}
        fields = self.files.get(kind, {})
        listed = {name: (["COMBO", {"options": of}] if self.newer_form else [of, {}]) for name, of in fields.items()}
        return {kind: {"input": {"required": listed}, "python_module": "nodes"} | self.nodes.get(kind, {})}

    @property
    def queued(self) -> list[dict[str, Any]]:
        """The bodies of what was asked for."""
        return [json.loads(request.body) for request in self.posts if request.path == "/prompt"]

    def paths(self, method: str = "GET") -> list[str]:
        return [request.path for request in self.requests if request.method == method]


def saved(name: str, **images: Any) -> dict[str, Any]:
    """The entry of a task that has made one picture."""
    image = {"filename": "z-image-turbo_00001_.png", "subfolder": "", "type": "output"} | images
    messages = [["execution_start", {"prompt_id": name, "timestamp": 1000}]]
    messages += [["execution_success", {"prompt_id": name, "timestamp": 3500}]]
    status = {"status_str": "success", "completed": True, "messages": messages}
    return {"prompt": [1, name, {}, {}, ["9"]], "outputs": {"9": {"images": [image]}}, "status": status, "meta": {}}


def ended(*messages: Any, status: str = "error", outputs: Any = None) -> Callable[[str], dict[str, Any]]:
    def entry(name: str) -> dict[str, Any]:
        said = {"status_str": status, "completed": status == "success", "messages": list(messages)}
        return {"outputs": outputs or {}, "status": said}

    return entry


@pytest.fixture
def comfy(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> Iterator[Comfy]:
    monkeypatch.setattr(provider_class("comfyui"), "poll_pause", lambda provider, asked: 0.05)
    with Comfy() as comfy:
        shell.env["COMFYUI_BASE_URL"] = comfy.root
        yield comfy


def command(*more: str) -> tuple[str, ...]:
    given = () if "--prompt" in more or "--replay" in more else ("--prompt", "a fox")
    return ("--provider", "comfyui", *given, "--size", "512x512", "--output", "out.png", "--print-response", *more)


def make(shell: Shell, *more: str) -> Result:
    return shell.call(*command(*more))


def recover(shell: Shell, *more: str) -> Result:
    (path,) = shell.evidence_files()
    return shell.call("--recover", str(path), "--print-response", *more)


def error_of(result: Result, exit_code: int, code: str) -> dict[str, Any]:
    error = result.error
    assert (error["exit_code"], error["code"]) == (exit_code, code), error
    assert "Traceback" not in result.stderr
    return error


def assert_saved(shell: Shell, result: Result) -> dict[str, Any]:
    assert result.code == 0, (result.stdout, result.stderr)
    assert (shell.folder / "out.png").read_bytes() == PNG
    assert shell.evidence()["status"] == "saved"
    return dict(result.json)


# The graph of this model ----------------------------------------------------------------------------------------------

TEMPLATE = {  # the official template `image_z_image_turbo` in API format
    "28": ("UNETLoader", {"unet_name": "z_image_turbo_bf16.safetensors", "weight_dtype": "default"}),
    "30": ("CLIPLoader", {"clip_name": "qwen_3_4b.safetensors", "type": "lumina2", "device": "default"}),
    "29": ("VAELoader", {"vae_name": "ae.safetensors"}),
    "11": ("ModelSamplingAuraFlow", {"model": ["28", 0], "shift": 3}),
    "27": ("CLIPTextEncode", {"clip": ["30", 0], "text": "a fox"}),
    "33": ("ConditioningZeroOut", {"conditioning": ["27", 0]}),
    "13": ("EmptySD3LatentImage", {"width": 512, "height": 512, "batch_size": 1}),
    "3": (
        "KSampler",
        {
            "model": ["11", 0],
            "positive": ["27", 0],
            "negative": ["33", 0],
            "latent_image": ["13", 0],
            "seed": 7,
            "steps": 8,
            "cfg": 1,
            "sampler_name": "res_multistep",
            "scheduler": "simple",
            "denoise": 1,
        },
    ),
    "8": ("VAEDecode", {"samples": ["3", 0], "vae": ["29", 0]}),
    "9": ("SaveImage", {"images": ["8", 0], "filename_prefix": "z-image-turbo"}),
}


@pytest.mark.smoke
def test_the_official_graph_is_queued_once_and_its_picture_saved(shell: Shell, comfy: Comfy) -> None:
    response = assert_saved(shell, make(shell, "--seed", "7"))
    (body,) = comfy.queued
    assert {node: (said["class_type"], said["inputs"]) for node, said in body["prompt"].items()} == TEMPLATE
    assert UUID(body["prompt_id"]).version == 4 and set(body) == {"prompt", "prompt_id"}
    evidence = shell.evidence()
    assert (evidence["task_id"], evidence["payload"], evidence["billable"]) == (body["prompt_id"], body, False)
    assert evidence["response"]["usage"]["seconds"] == 2.5
    assert (response["seed"], response["estimated_cost"]) == (7, 0.0)
    assert "z-image-turbo_00001_.png" in response["image_url"] and response["image_url"].startswith(comfy.root)
    assert not any(request.header("origin") for request in comfy.requests)  # which a server on loopback refuses


def test_steps_and_guidance_are_counted_as_there(shell: Shell, comfy: Comfy) -> None:
    assert_saved(shell, make(shell, "--steps", "5", "--guidance", "2.5"))
    sampler = comfy.queued[0]["prompt"]["3"]["inputs"]
    assert (sampler["steps"], sampler["cfg"]) == (5, 2.5)
    assert shell.evidence()["settings"] == {"steps": 5, "guidance": 2.5}


@pytest.mark.parametrize("path", ["", "/", "/api", "/prompt", "/api/prompt"])
def test_an_address_is_understood_in_any_form(shell: Shell, comfy: Comfy, path: str) -> None:
    shell.env["COMFYUI_BASE_URL"] = comfy.root + path
    plan = make(shell, "--dry-run").json
    assert plan["endpoint"] == f"{comfy.root}/prompt" and plan["billable"] is False
    assert comfy.connections == 0


def test_without_an_address_the_usual_one_is_advised(shell: Shell) -> None:
    error = error_of(make(shell), 2, "invalid_base_url")
    assert "COMFYUI_BASE_URL" in error["hint"] and "http://127.0.0.1:8188" in error["hint"]


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize(
    ("loader", "field", "left", "told"),
    [
        ("UNETLoader", "unet_name", ["z_image_bf16.safetensors"], "models/diffusion_models/z_image_turbo_bf16"),
        ("CLIPLoader", "clip_name", [], "models/text_encoders/qwen_3_4b.safetensors"),
        ("VAELoader", "vae_name", ["sdxl_vae.safetensors"], "models/vae/ae.safetensors"),
    ],
)
@pytest.mark.parametrize("mode", ["make", "check"])
def test_a_missing_file_is_told_with_its_folder_and_nothing_is_queued(
    shell: Shell, comfy: Comfy, loader: str, field: str, left: list[str], told: str, mode: str, newer: bool
) -> None:
    comfy.files[loader][field] = left
    comfy.newer_form = newer
    result = make(shell) if mode == "make" else shell.call("--check", "--provider", "comfyui")
    error = error_of(result, 2, "missing_weights") if mode == "make" else result.json["error"]
    assert told in error["message"] and "huggingface.co/Comfy-Org/z_image_turbo" in error["message"]
    assert error["billed"] == "no" and comfy.posts == [] and shell.files() == []


def test_all_that_is_missing_is_told_at_once(shell: Shell, comfy: Comfy) -> None:
    comfy.files = {name: {field: [] for field in fields} for name, fields in comfy.files.items()}
    message = error_of(make(shell), 2, "missing_weights")["message"]
    assert all(folder in message for folder in ("diffusion_models", "text_encoders", "models/vae"))


@pytest.mark.parametrize(
    ("listed", "used"),
    [
        (["z_image_turbo_int8_convrot.safetensors"], "z_image_turbo_int8_convrot.safetensors"),
        (["zit/z_image_turbo_bf16.safetensors"], "zit/z_image_turbo_bf16.safetensors"),
        (["zit\\Z-Image-Turbo-fp8.safetensors", "x.safetensors"], "zit\\Z-Image-Turbo-fp8.safetensors"),
        (["z_image_turbo_fp8.safetensors", "z_image_turbo_fp16.safetensors"], "z_image_turbo_fp16.safetensors"),
    ],
)
def test_another_build_that_is_there_is_used_and_told(shell: Shell, comfy: Comfy, listed: list[str], used: str) -> None:
    comfy.files["UNETLoader"]["unet_name"] = listed
    response = assert_saved(shell, make(shell))
    assert comfy.queued[0]["prompt"]["28"]["inputs"]["unet_name"] == used
    warnings = " ".join(response.get("warnings", []))
    assert (used in warnings) == (not used.endswith("z_image_turbo_bf16.safetensors"))


def test_gguf_files_are_loaded_by_their_own_nodes(shell: Shell, comfy: Comfy) -> None:
    comfy.files["UNETLoader"]["unet_name"] = []
    comfy.files["CLIPLoader"]["clip_name"] = []
    comfy.files["UnetLoaderGGUF"] = {"unet_name": ["z-image-turbo-Q4_0.gguf", "z-image-turbo-Q8_0.gguf"]}
    comfy.files["CLIPLoaderGGUF"] = {"clip_name": ["Qwen3-4B-Q6_K.gguf"]}
    assert_saved(shell, make(shell))
    graph = comfy.queued[0]["prompt"]
    assert graph["28"] == {"class_type": "UnetLoaderGGUF", "inputs": {"unet_name": "z-image-turbo-Q8_0.gguf"}}
    assert graph["30"]["class_type"] == "CLIPLoaderGGUF"
    assert graph["30"]["inputs"] == {"clip_name": "Qwen3-4B-Q6_K.gguf", "type": "lumina2"}


@pytest.mark.parametrize(
    ("option", "name", "loader", "field"),
    [
        ("--model", "my_zit.safetensors", "UNETLoader", "unet_name"),
        ("--vae", "sdxl.safetensors", "VAELoader", "vae_name"),
    ],
)
def test_a_file_that_is_named_is_taken_or_missed(
    shell: Shell, comfy: Comfy, option: str, name: str, loader: str, field: str
) -> None:
    comfy.files[loader][field] = ["other.safetensors"]
    error = error_of(make(shell, option, name), 2, "missing_weights")
    assert name in error["message"] and option in error["message"] and comfy.posts == []
    comfy.files[loader][field].append(name)
    assert_saved(shell, make(shell, option, name))
    assert shell.evidence()["settings"][option[2:]] == name


def test_a_gguf_file_needs_its_nodes(shell: Shell, comfy: Comfy) -> None:
    error = error_of(make(shell, "--model", "z-image-turbo-Q4_0.gguf"), 2, "missing_weights")
    assert "ComfyUI-GGUF" in error["message"] and comfy.posts == []


def test_a_server_that_answers_no_questions_is_asked_for_the_picture_all_the_same(shell: Shell, comfy: Comfy) -> None:
    for path in ("/system_stats", *(f"/object_info/{name}" for name in FILES)):
        comfy.play(path, html(404))
    assert_saved(shell, make(shell))


def node_error(kind: str, field: str, value: object, node: str = "28", of: str = "UNETLoader") -> Answer:
    facts = {"input_name": field, "input_config": [[], {}], "received_value": value}
    said = {
        "type": kind,
        "message": "Value not in list",
        "details": f"{field}: {value!r} not in []",
        "extra_info": facts,
    }
    errors = {node: {"errors": [said], "dependent_outputs": ["9"], "class_type": of}}
    top = {"type": "prompt_outputs_failed_validation", "message": "Prompt outputs failed validation", "details": ""}
    return json_answer({"error": top, "node_errors": errors}, 400)


@pytest.mark.parametrize(
    ("answer", "code", "words"),
    [
        (node_error("value_not_in_list", "unet_name", "zit.safetensors"), "missing_weights", "diffusion_models/zit"),
        (node_error("value_not_in_list", "lora_name", "l.safetensors"), "missing_weights", "lora_name"),
        (node_error("value_not_in_list", "scheduler", "x", "3", "KSampler"), "rejected_by_service", "node 3 (KS"),
        (node_error("value_smaller_than_min", "width", 8, "13", "Empty"), "rejected_by_service", "node 13"),
        (
            json_answer({"error": {"type": "missing_node_type", "message": "Node 'X' not found", "details": ""}}, 400),
            "rejected_by_service",
            "Node 'X' not found",
        ),
        (json_answer({"error": {"type": "prompt_no_outputs", "message": "Prompt has no outputs"}}, 400),
         "rejected_by_service", "no outputs"),
        (html(413, "too large"), "rejected_by_service", "413"),
    ],
)  # fmt: skip
def test_a_refused_graph_is_told_by_its_node(shell: Shell, comfy: Comfy, answer: Answer, code: str, words: str) -> None:
    comfy.play("/prompt", answer)
    error = error_of(make(shell), 2, code)
    assert words in error["message"] and error["billed"] == "no" and len(comfy.queued) == 1
    assert shell.evidence()["status"] == "failed" and "task_id" not in shell.evidence()


@pytest.mark.parametrize(
    ("answer", "exit_code"),
    [(Answer(status=401), 3), (Answer(status=403), 3), (html(429, headers=(("Retry-After", "600"),)), 6)],
)
def test_a_proxy_before_it_is_understood(shell: Shell, comfy: Comfy, answer: Answer, exit_code: int) -> None:
    comfy.play("/prompt", answer)
    result = make(shell)
    assert result.code == exit_code and result.error["billed"] == "no" and len(comfy.queued) == 1


# What it is -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["make", "check"])
def test_koboldcpp_is_recognised_and_refused(shell: Shell, comfy: Comfy, mode: str) -> None:
    comfy.device = "koboldcpp"
    result = make(shell) if mode == "make" else shell.call("--check", "--provider", "comfyui")
    error = result.json["error"]
    assert (result.code, error["code"]) == (2, "invalid_base_url")
    assert "koboldcpp" in error["message"] and "sdapi" in error["hint"] and comfy.posts == []


@pytest.mark.parametrize(
    "url", ["https://cloud.comfy.org", "https://cloud.comfy.org/api", "comfy.org", "https://x.comfy.org"]
)
def test_comfy_cloud_is_refused_before_anything_is_asked(shell: Shell, url: str) -> None:
    error = error_of(make(shell, "--base-url", url, "--dry-run"), 2, "invalid_base_url")
    assert "Comfy Cloud" in error["message"]


@pytest.mark.parametrize("url", ["https://comfy.org.example.com", "https://mycomfy.org"])
def test_hosts_that_only_look_like_it_are_not(shell: Shell, url: str) -> None:
    assert make(shell, "--base-url", url, "--dry-run").json["endpoint"].startswith(url)


def test_a_check_of_another_server_fails(shell: Shell, comfy: Comfy) -> None:
    comfy.play("/system_stats", json_answer({"hello": 1}))
    assert shell.call("--check", "--provider", "comfyui").code == 8
    comfy.play("/system_stats", html(404))
    assert shell.call("--check", "--provider", "comfyui").code == 2


def test_a_check_is_free(shell: Shell, comfy: Comfy) -> None:
    assert shell.call("--check", "--provider", "comfyui").json["model_listed"] is True
    assert comfy.posts == [] and shell.files() == []


# Lost answers ---------------------------------------------------------------------------------------------------------


def losing(comfy: Comfy, how: str) -> Callable[[Received], Answer]:
    """The graph is queued, and its answer does not come as it should."""
    ways: dict[str, Callable[[Answer], Answer]] = {
        "hangup": lambda good: Answer(hang_up="after-reading"),
        "cut": lambda good: typed(good.body, "application/json", cut_after=9),
        "502": lambda good: html(502),
        "500-text": lambda good: typed(b"500 Internal Server Error\n\nServer got itself in trouble", "text/plain", 500),
        "empty": lambda good: Answer(),
        "html": lambda good: html(200, "Please sign in"),
        "no-id": lambda good: json_answer({"number": 1}),
    }
    return lambda request: ways[how](comfy.take(request))


LOSSES = ("hangup", "cut", "502", "500-text", "empty", "html", "no-id")


@pytest.mark.parametrize("how", LOSSES)
def test_a_lost_answer_is_looked_up_and_never_queued_twice(shell: Shell, comfy: Comfy, how: str) -> None:
    comfy.play("/prompt", losing(comfy, how))
    comfy.waits = 2
    assert_saved(shell, make(shell))
    assert len(comfy.queued) == 1
    name = comfy.queued[0]["prompt_id"]
    asked = [path for path in comfy.paths() if path.startswith(("/history", "/queue"))]
    assert asked[:2] == [f"/history/{name}", "/queue"]  # and, where it is in neither, the history again
    assert shell.evidence()["task_id"] == name


@pytest.mark.parametrize("doubles", ["refused", "overwritten"])
@pytest.mark.parametrize("how", [Answer(hang_up="after-reading"), html(502)], ids=["hangup", "502"])
def test_what_never_came_is_queued_again_under_the_same_name(
    shell: Shell, comfy: Comfy, how: Answer, doubles: str
) -> None:
    comfy.refuses_doubles = doubles == "refused"
    comfy.play("/prompt", how, comfy.take)
    assert_saved(shell, make(shell))
    first, second = comfy.queued
    assert first["prompt_id"] == second["prompt_id"] and len(comfy.jobs) == 1
    name = first["prompt_id"]
    assert comfy.paths().count(f"/history/{name}") >= 3 * 2  # three times in none of history, queue, history


def test_that_it_is_there_already_is_no_fault(shell: Shell, comfy: Comfy) -> None:
    """A double of the request arrived before it: a proxy may have sent it twice."""
    comfy.refuses_doubles = True

    def twice(request: Received) -> Answer:
        comfy.take(request)
        return comfy.take(request)

    comfy.play("/prompt", twice)
    assert_saved(shell, make(shell))
    assert len(comfy.queued) == 1


def test_a_task_that_moves_between_two_questions_is_found(shell: Shell, comfy: Comfy) -> None:
    """It ends after the history was asked, and before the queue is."""
    comfy.play("/queue", json_answer({"queue_running": [], "queue_pending": []}))

    def queued(request: Received) -> Answer:
        name = json.loads(request.body)["prompt_id"]
        comfy.play(f"/history/{name}", json_answer({}), json_answer({name: saved(name)}))
        return comfy.take(request)

    comfy.play("/prompt", queued)
    assert_saved(shell, make(shell))
    assert len(comfy.queued) == 1


@pytest.mark.heavy
def test_a_server_that_was_restarted_is_asked_anew(shell: Shell, comfy: Comfy) -> None:
    """It took the task, and has forgotten it."""

    def forget(request: Received) -> Answer:
        answer = comfy.take(request)
        if len(comfy.queued) == 0:
            comfy.jobs.clear()
        return answer

    comfy.play("/prompt", forget, comfy.take)
    assert_saved(shell, make(shell))
    assert len(comfy.queued) == 2


@needs_kill
@pytest.mark.parametrize("moment", ["out", "queued"])
def test_a_kill_loses_nothing_and_queues_nothing_twice(shell: Shell, comfy: Comfy, moment: str) -> None:
    """While the request is out, whose answer never comes; and while its task waits in the queue."""
    if moment == "out":
        comfy.play("/prompt", lambda request: typed(comfy.take(request).body, "application/json", delay_s=60))
    comfy.waits = 10_000
    process = shell.start(*command())
    comfy.wait_until(lambda: "/queue" in comfy.paths() if moment == "queued" else comfy.queued)
    process.kill()
    shell.finish(process)
    evidence = shell.evidence()
    assert evidence["status"] == ("submitting" if moment == "out" else "submitted")
    assert evidence["task_id"] == comfy.queued[0]["prompt_id"]
    comfy.waits = 0
    assert_saved(shell, recover(shell))
    assert len(comfy.queued) == 1
    requests = len(comfy.requests)
    assert_saved(shell, recover(shell))
    assert len(comfy.requests) == requests


@pytest.mark.heavy
def test_a_recovery_never_asks_for_a_new_picture(shell: Shell, comfy: Comfy) -> None:
    comfy.waits = 10_000
    error_of(make(shell, "--timeout", "2"), 7, "paid_not_downloaded")
    comfy.jobs.clear()
    error = error_of(recover(shell), 7, "outcome_unknown")
    assert "costs only time" in error["hint"] and len(comfy.queued) == 1


def test_where_it_stands_in_the_queue_is_told(shell: Shell, comfy: Comfy) -> None:
    comfy.before, comfy.waits = 3, 2
    result = make(shell)
    assert_saved(shell, result)
    assert re.search(r"(?m)^task [0-9a-f-]{36}: it waits in the queue, 3 before it$", result.stderr)
    assert "queue" not in make(shell, "--quiet", "--overwrite").stderr


@pytest.mark.heavy
def test_what_is_not_done_in_time_is_had_later(shell: Shell, comfy: Comfy) -> None:
    comfy.before, comfy.waits = 1, 10_000
    error = error_of(make(shell, "--timeout", "2"), 7, "paid_not_downloaded")
    assert "1 before it" in error["message"] and "--recover" in error["next_command"]
    comfy.waits = 0
    assert_saved(shell, recover(shell))
    assert len(comfy.queued) == 1


# How a task ends ------------------------------------------------------------------------------------------------------

OOM: dict[str, Any] = {
    "node_id": "3",
    "node_type": "KSampler",
    "exception_type": "torch.OutOfMemoryError",
    "exception_message": "x",
}
OOM_TOO = OOM | {"exception_type": "RuntimeError", "exception_message": "CUDA out of memory. Tried to allocate"}
BROKEN = OOM | {"exception_type": "ValueError", "exception_message": "no such", "traceback": ["SECRET-TRACE"]}
BROKEN |= {"current_inputs": {"text": "SECRET-PROMPT"}}
PREVIEW: dict[str, Any] = {"9": {"images": [{"filename": "a.png", "subfolder": "", "type": "temp"}]}}
CACHED = ["execution_cached", {"nodes": ["3", "9"], "prompt_id": "x"}]


@pytest.mark.parametrize(
    ("entry", "exit_code", "code", "words"),
    [
        (ended(["execution_error", OOM]), 2, "too_little_memory", "node 3 (KSampler)"),
        (ended(["execution_error", OOM_TOO]), 2, "too_little_memory", "CUDA out of memory"),
        (ended(["execution_error", BROKEN]), 6, "task_failed", "ValueError: no such"),
        (ended(["execution_interrupted", {"node_id": "3"}]), 6, "task_failed", "stopped on the server"),
        (ended(), 6, "task_failed", "does not say why"),
        (ended(status="success"), 8, "no_image", "saved no picture"),
        (ended(status="success", outputs=PREVIEW), 8, "no_image", "SaveImage"),
        (ended(CACHED, status="success"), 8, "no_image", "another seed"),
    ],
)
def test_an_end_without_a_picture_is_told(
    shell: Shell, comfy: Comfy, entry: Any, exit_code: int, code: str, words: str
) -> None:
    comfy.entry = entry
    result = make(shell)
    error = error_of(result, exit_code, code)
    assert words in error["message"] and error["billed"] == "no"
    assert "SECRET" not in result.stdout + result.stderr + json.dumps(shell.evidence())
    assert len(comfy.queued) == 1 and shell.evidence()["status"] == "failed"


def test_an_entry_without_a_status_is_judged_by_what_it_saved(shell: Shell, comfy: Comfy) -> None:
    comfy.entry = lambda name: saved(name) | {"status": None}
    assert_saved(shell, make(shell))


def test_a_part_that_was_refused_ends_the_whole_and_is_cancelled(shell: Shell, comfy: Comfy) -> None:
    def partly(request: Received) -> Answer:
        answer = json.loads(comfy.take(request).body)
        refused = json.loads(node_error("value_not_in_list", "unet_name", "x").body)["node_errors"]
        return json_answer(answer | {"node_errors": refused})

    comfy.play("/prompt", partly)
    error = error_of(make(shell), 2, "task_failed")
    assert "node 28" in error["message"] and not error["retryable"]
    name = comfy.queued[0]["prompt_id"]
    assert f"/api/jobs/{name}/cancel" in comfy.paths("POST")


def test_several_pictures_are_told_and_the_first_is_saved(shell: Shell, comfy: Comfy) -> None:
    image = {"filename": "b.png", "subfolder": "", "type": "output"}
    comfy.entry = lambda name: saved(name) | {"outputs": {"10": {"images": [image]}, "9": saved(name)["outputs"]["9"]}}
    response = assert_saved(shell, make(shell))
    assert "z-image-turbo_00001_" in response["image_url"] and "2 pictures" in response["warnings"][0]


@pytest.mark.parametrize(
    ("name", "folder"), [("a b&type=temp#.png", "x/ü"), ("../../etc/passwd", ""), ("http://192.0.2.1/x.png", "//h")]
)
def test_a_picture_is_fetched_from_the_same_server_whatever_it_is_called(
    shell: Shell, comfy: Comfy, name: str, folder: str
) -> None:
    comfy.entry = lambda task: saved(task, filename=name, subfolder=folder)
    assert_saved(shell, make(shell))
    (view,) = [request for request in comfy.requests if request.path == "/view"]
    asked = parse_qs(urlsplit(view.target).query, keep_blank_values=True)
    assert asked == {"filename": [name], "subfolder": [folder], "type": ["output"]}


# The user's own workflow ----------------------------------------------------------------------------------------------


def graph(**texts: Any) -> dict[str, Any]:
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "z.safetensors"}},
        "5": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 1024, "height": 768, "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "an old prompt"}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "ugly"}},
        "57:3": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0],
                "positive": ["6", 0],
                "negative": ["7", 0],
                "latent_image": ["5", 0],
                "seed": 1,
                "steps": 20,
                "cfg": 1.5,
            },
        },
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["57:3", 0], "vae": ["1", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "mine"}},
    } | texts


def with_marks() -> dict[str, Any]:
    own = graph()
    own["6"]["inputs"]["text"] = "masterpiece, {{prompt}} ({{width}}x{{ height }})"
    own["57:3"]["inputs"] |= {"seed": "{{seed}}", "steps": "{{steps}}"}
    own["5"]["inputs"] |= {"width": "{{width}}", "height": "{{height}}"}
    return own


def write(shell: Shell, content: Any, name: str = "flow.json") -> str:
    path = shell.folder / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return str(path)


def in_png(own: dict[str, Any]) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", json.dumps(own))
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


PROMPT = 'a "fox" {{seed}} \\ in\nsnow'


@pytest.mark.smoke
@pytest.mark.parametrize("form", ["plain", "wrapped", "png"])
def test_a_workflow_with_marks_is_filled_in(shell: Shell, comfy: Comfy, form: str) -> None:
    own = with_marks()
    content: Any = {"plain": own, "wrapped": {"prompt": own}, "png": in_png(own)}[form]
    result = make(shell, "--workflow", write(shell, content), "--prompt", PROMPT, "--seed", "77")
    assert_saved(shell, result)
    sent = comfy.queued[0]["prompt"]
    assert sent["6"]["inputs"]["text"] == f"masterpiece, {PROMPT} (512x512)"
    assert (sent["57:3"]["inputs"]["seed"], sent["57:3"]["inputs"]["steps"]) == (77, 8)
    assert sent["5"]["inputs"] == {"width": 512, "height": 512, "batch_size": 1}
    assert sent["57:3"]["inputs"]["cfg"] == 1.5 and sent["9"]["inputs"]["filename_prefix"] == "mine"
    evidence = shell.evidence()
    assert set(evidence["settings"]) == {"workflow", "steps"} and len(evidence["settings"]["workflow"]) == 64


def test_a_workflow_without_marks_is_understood_by_its_shape(shell: Shell, comfy: Comfy) -> None:
    assert_saved(shell, make(shell, "--workflow", write(shell, graph()), "--seed", "5"))
    sent = comfy.queued[0]["prompt"]
    assert (sent["6"]["inputs"]["text"], sent["7"]["inputs"]["text"]) == ("a fox", "ugly")
    assert sent["57:3"]["inputs"]["seed"] == 5 and sent["5"]["inputs"]["width"] == 512
    assert (sent["57:3"]["inputs"]["steps"], sent["57:3"]["inputs"]["cfg"]) == (20, 1.5)  # its own
    assert set(shell.evidence()["settings"]) == {"workflow"}


def test_steps_that_are_given_go_into_a_workflow_without_marks(shell: Shell, comfy: Comfy) -> None:
    assert_saved(shell, make(shell, "--workflow", write(shell, graph()), "--steps", "6"))
    assert comfy.queued[0]["prompt"]["57:3"]["inputs"]["steps"] == 6
    assert shell.evidence()["settings"]["steps"] == 6


def shaped(**changes: Any) -> dict[str, Any]:
    own = graph()
    for node, inputs in changes.items():
        own[node.replace("_", ":")]["inputs"] |= inputs
    return own


def test_values_are_found_behind_nodes_that_only_hand_them_on() -> None:
    own = shaped(**{"6": {"text": ["40", 0]}, "57_3": {"seed": ["41", 0], "positive": ["42", 0]}})
    own["40"] = {"class_type": "PrimitiveStringMultiline", "inputs": {"value": "x"}}
    own["41"] = {"class_type": "PrimitiveInt", "inputs": {"value": 3}}
    own["42"] = {"class_type": "FluxGuidance", "inputs": {"conditioning": ["6", 0], "guidance": 3.5}}
    flow = workflow_in(json.dumps(own).encode())
    assert isinstance(flow, Workflow)
    assert flow.holes["prompt"] == ("40", "value") and flow.holes["seed"] == ("41", "value")


def test_a_sampler_of_the_advanced_kind_is_understood() -> None:
    own = graph()
    own["57:3"] = {
        "class_type": "SamplerCustomAdvanced",
        "inputs": {"noise": ["50", 0], "guider": ["51", 0], "latent_image": ["5", 0]},
    }
    own["50"] = {"class_type": "RandomNoise", "inputs": {"noise_seed": 9}}
    own["51"] = {"class_type": "CFGGuider", "inputs": {"positive": ["6", 0], "negative": ["7", 0], "cfg": 1}}
    flow = workflow_in(json.dumps(own).encode())
    assert isinstance(flow, Workflow)
    assert (flow.holes["prompt"], flow.holes["seed"]) == (("6", "text"), ("50", "noise_seed"))


def test_a_workflow_without_a_place_for_the_seed_records_none(shell: Shell, comfy: Comfy) -> None:
    own = with_marks()
    own["57:3"]["inputs"]["seed"] = 4
    response = assert_saved(shell, make(shell, "--workflow", write(shell, own)))
    assert "seed" not in response and shell.evidence()["unused"] == ["seed"]
    assert any("seed" in warning for warning in response["warnings"])


EDITOR = {"nodes": [{"id": 1}], "links": [], "version": 0.4}
TWO_SAMPLERS = graph(**{"20": {"class_type": "KSampler", "inputs": {"seed": 1}}})
NO_TEXT = graph(**{"6": {"class_type": "LoadConditioning", "inputs": {}}})
DANGLING = graph(**{"8": {"class_type": "VAEDecode", "inputs": {"samples": ["404", 0]}}})
SECRET = graph(**{"30": {"class_type": "Api", "inputs": {"api_key": "test-not-real"}}})
SEED_ONLY = shaped(**{"57_3": {"seed": "{{seed}}"}})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (EDITOR, "Export (API)"),
        ({"prompt": EDITOR}, "Export (API)"),
        (b"no json", "API format"),
        (b"", "API format"),
        ([], "API format"),
        ({}, "API format"),
        ({"1": {"class_type": "X"}}, "API format"),
        (in_png({}), "API format"),
        (png(8, 8), "holds none"),
        (TWO_SAMPLERS, "{{prompt}}"),
        (NO_TEXT, "{{prompt}}"),
        (SEED_ONLY, "{{prompt}}"),
        (DANGLING, "node 8"),
        (SECRET, "api_key"),
    ],
)
@pytest.mark.parametrize("script", [GENERATE, BATCH], ids=["one", "batch"])
def test_what_is_no_workflow_is_refused_before_anything_is_asked(
    shell: Shell, comfy: Comfy, content: Any, words: str, script: Path
) -> None:
    shell.script = script
    where = ("--output", "out.png", "--print-response") if script == GENERATE else ("--output-dir", "out")
    path = write(shell, content)
    error = error_of(shell.call("--provider", "comfyui", "--prompt", "x", *where, "--workflow", path), 2, "usage")
    assert words in error["message"] and "--workflow" in error["message"] and "test-not-real" not in error["message"]
    assert comfy.connections == 0


@pytest.mark.parametrize("name", ["gone.json", "folder"])
def test_a_workflow_that_cannot_be_read_is_told(shell: Shell, comfy: Comfy, name: str) -> None:
    (shell.folder / "folder").mkdir()
    assert name in error_of(make(shell, "--workflow", name), 2, "usage")["message"]


@pytest.mark.parametrize(
    "info",
    [
        {"api_node": True},
        {"python_module": "comfy_api_nodes.nodes_kling"},
        {"category": "api node/image/BFL"},
        {"input": {"required": {}, "hidden": {"auth_token": "AUTH_TOKEN_COMFY_ORG"}}},
    ],
)
def test_a_workflow_that_others_are_paid_for_is_refused(shell: Shell, comfy: Comfy, info: dict[str, Any]) -> None:
    own = with_marks() | {"60": {"class_type": "FluxPro/1.1", "inputs": {"images": ["8", 0]}}}
    comfy.play(f"/object_info/{quote('FluxPro/1.1', safe='')}", json_answer({"FluxPro/1.1": {"input": {}} | info}))
    error = error_of(make(shell, "--workflow", write(shell, own)), 2, "usage")
    assert "node 60 (FluxPro/1.1)" in error["message"] and "money" in error["message"]
    assert comfy.posts == []


@pytest.mark.parametrize(
    ("answer", "exit_code"), [(json_answer({}), 2), (html(500), 6), (Answer(hang_up="after-reading"), 6)]
)
def test_a_workflow_whose_nodes_are_not_known_is_not_queued(
    shell: Shell, comfy: Comfy, answer: Answer, exit_code: int
) -> None:
    comfy.play("/object_info/SaveImage", answer)
    result = make(shell, "--workflow", write(shell, with_marks()))
    assert result.code == exit_code and "SaveImage" in result.error["message"] and comfy.posts == []


def test_a_replay_says_which_workflow_it_needs(shell: Shell, comfy: Comfy) -> None:
    flow = write(shell, with_marks())
    assert_saved(shell, make(shell, "--workflow", flow))
    (path,) = shell.evidence_files()
    first = shell.evidence()
    result = shell.call("--replay", str(path), "--output", "again.png", "--print-response")
    message = error_of(result, 2, "invalid_request")["message"]
    assert first["settings"]["workflow"] in message and "--workflow FILE" in message and len(comfy.queued) == 1
    result = shell.call("--replay", str(path), "--output", "again.png", "--print-response", "--workflow", flow)
    assert result.code == 0 and comfy.queued[0]["prompt"] == comfy.queued[1]["prompt"]


@pytest.mark.parametrize("value", ["flow.json", "0" * 64, {"1": {}}])
def test_an_evidence_file_cannot_bring_a_workflow(shell: Shell, comfy: Comfy, value: Any) -> None:
    write(shell, with_marks())
    assert_saved(shell, make(shell))
    (path,) = shell.evidence_files()
    path.write_text(json.dumps(shell.evidence() | {"settings": {"workflow": value}}))
    result = shell.call("--replay", str(path), "--output", "again.png", "--print-response")
    assert result.code == 2 and len(comfy.queued) == 1


def test_a_workflow_names_its_own_files(shell: Shell, comfy: Comfy) -> None:
    flow = write(shell, with_marks())
    result = make(shell, "--workflow", flow, "--model", "x.safetensors")
    assert "model" in error_of(result, 2, "invalid_request")["message"] and comfy.connections == 0


# The login ------------------------------------------------------------------------------------------------------------

LOGIN = "Basic " + base64.b64encode(b"me:pass-word-1234").decode()


def guarded(answer: Answer) -> Callable[[Received], Answer]:
    return lambda request: answer if request.header("authorization") == LOGIN else Answer(status=401)


def test_a_login_goes_along_to_all_that_asks_for_it(shell: Shell, comfy: Comfy) -> None:
    shell.env |= {"COMFYUI_USER": "me", "COMFYUI_PASSWORD": "pass-word-1234"}
    comfy.play("/view", guarded(file(PNG)))
    assert_saved(shell, make(shell))
    calls = [request for request in comfy.requests if request.path != "/view"]
    assert {request.header("authorization") for request in calls} == {LOGIN}
    told = "".join(path.read_text("latin-1") for path in shell.evidence_files())
    assert "pass-word-1234" not in told and LOGIN[6:] not in told


def test_a_login_stays_away_from_a_server_that_a_request_names(shell: Shell, comfy: Comfy) -> None:
    shell.env |= {"COMFYUI_USER": "me", "COMFYUI_PASSWORD": "pass-word-1234"}
    plan = make(shell, "--base-url", "http://192.0.2.7:8188", "--dry-run").json
    assert plan["key_source"] is None and any("192.0.2.7" in warning for warning in plan["warnings"])


# A batch --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(shell: Shell) -> Callable[..., Result]:
    shell.script = BATCH

    def run(*more: str, count: int = 6) -> Result:
        lines = [json.dumps({"prompt": f"fox {number}", "size": "512x512"}) for number in range(count)]
        (shell.folder / "rows.jsonl").write_text("\n".join(lines))
        words = ("--provider", "comfyui", "--input", "rows.jsonl", "--output-dir", "out", "--no-gallery", *more)
        return shell.call(*words)

    return run


@pytest.mark.heavy
def test_a_batch_keeps_the_queue_short_and_queues_nothing_twice(
    shell: Shell, comfy: Comfy, rows: Callable[..., Result]
) -> None:
    most = 0
    comfy.waits = 3
    real = comfy.take

    def watched(request: Received) -> Answer:
        nonlocal most
        answer = real(request)
        most = max(most, sum(job["asked"] < comfy.waits for job in comfy.jobs.values()))
        return answer

    comfy.play("/prompt", watched)
    result = rows()
    assert result.code == 0 and result.json["saved"] == 6, result.stdout
    assert len(comfy.queued) == 6 == len(comfy.jobs) and most <= 3


def test_lost_answers_of_a_batch_are_looked_up(shell: Shell, comfy: Comfy, rows: Callable[..., Result]) -> None:
    comfy.play("/prompt", losing(comfy, "hangup"))
    result = rows()
    assert result.code == 0 and result.json["saved"] == 6, result.stdout
    assert len(comfy.queued) == 6


@pytest.mark.heavy
def test_rows_that_never_came_are_queued_again_in_the_same_run(
    shell: Shell, comfy: Comfy, rows: Callable[..., Result]
) -> None:
    comfy.play("/prompt", Answer(hang_up="after-reading"), html(502), comfy.take)
    result = rows(count=3)
    assert result.code == 0 and result.json["saved"] == 3, result.stdout
    assert len(comfy.jobs) == 3 and len(comfy.queued) == 5


@pytest.mark.heavy
@pytest.mark.parametrize("lost", [0, 2], ids=["first", "last"])
def test_a_row_of_a_run_that_was_cut_off_before_it_came_is_queued_once(
    shell: Shell, comfy: Comfy, rows: Callable[..., Result], lost: int
) -> None:
    """Also the last one, to which the input comes when it is pending again."""
    assert rows(count=3).code == 0
    with contextlib.closing(sqlite3.connect(shell.folder / "out" / DATABASE)) as database:
        facts = json.dumps({"task_id": str(uuid4())})
        (name,) = database.execute("SELECT output FROM pictures WHERE line = ?", (lost + 1,)).fetchone()
        (shell.folder / "out" / name).unlink()
        database.execute("UPDATE pictures SET state = 'submitted', facts = ? WHERE line = ?", (facts, lost + 1))
        database.commit()
    before = len(comfy.queued)
    result = rows(count=3)
    assert (result.code, result.json["pending"]) == (0, 0), result.stdout
    assert len(comfy.queued) - before == 1


@pytest.mark.heavy
@needs_kill
def test_a_batch_that_is_killed_three_times_makes_every_row_once(
    shell: Shell, comfy: Comfy, rows: Callable[..., Result]
) -> None:
    """While a request is out, while a task is asked after, and while a picture is fetched."""
    rows("--dry-run", count=12)
    words = ("--provider", "comfyui", "--input", "rows.jsonl", "--output-dir", "out", "--no-gallery")

    def killed_when(condition: Callable[[], object]) -> None:
        process = shell.start(*words)
        comfy.wait_until(condition)
        process.send_signal(signal.SIGKILL)
        shell.finish(process)

    slow = [lambda request: comfy.take(request)] * 3
    comfy.play("/prompt", *slow, lambda request: typed(comfy.take(request).body, "application/json", delay_s=60))
    killed_when(lambda: len(comfy.queued) >= 4)
    comfy.play("/prompt", comfy.take)
    comfy.waits = 10_000
    questions = comfy.paths().count("/queue")
    killed_when(lambda: comfy.paths().count("/queue") > questions + 1)
    comfy.waits = 0
    comfy.view = Answer(delay_s=60)
    fetched = comfy.paths().count("/view")
    killed_when(lambda: comfy.paths().count("/view") > fetched)
    comfy.view = file(PNG)
    result = rows(count=12)
    assert result.code == 0 and result.json["saved"] == 12, result.stdout
    assert [job["posts"] for job in comfy.jobs.values()] == [1] * 12 and len(comfy.queued) == 12


@pytest.mark.heavy
def test_a_batch_takes_a_workflow_from_the_command_line_only(
    shell: Shell, comfy: Comfy, rows: Callable[..., Result]
) -> None:
    flow = write(shell, with_marks())
    result = rows("--workflow", flow, count=2)
    assert result.code == 0 and result.json["saved"] == 2, result.stdout
    assert comfy.queued[0]["prompt"]["9"]["inputs"]["filename_prefix"] == "mine"
    assert rows("--workflow", flow, count=2).code == 0 and len(comfy.queued) == 2
    (shell.folder / "own.jsonl").write_text(json.dumps({"prompt": "x", "workflow": flow}))
    result = shell.call("--provider", "comfyui", "--input", "own.jsonl", "--output-dir", "other")
    assert "workflow" in error_of(result, 2, "invalid_rows")["message"] and len(comfy.queued) == 2


@pytest.mark.heavy
def test_another_workflow_is_another_picture(shell: Shell, comfy: Comfy, rows: Callable[..., Result]) -> None:
    assert rows("--workflow", write(shell, with_marks()), count=1).code == 0
    other = write(shell, graph(), "other.json")
    assert error_of(rows("--workflow", other, count=1), 2, "changed_rows")["changes"]["made_again"] == 1


# The mock service ----------------------------------------------------------------------------------------------------

MOCK_FAULTS = [
    ("ok", 0, ""),
    ("hangup-after", 0, ""),
    ("502,ok", 0, ""),
    ("out-of-memory", 2, "too_little_memory"),
    ("stopped", 6, "task_failed"),
    ("preview", 8, "no_image"),
    ("node-error", 2, "task_failed"),
    ("400", 2, "rejected_by_service"),
    ("image-corrupt", 8, "image_unusable"),
]


@pytest.mark.parametrize(("fault", "exit_code", "code"), MOCK_FAULTS)
def test_the_mock_speaks_the_protocol(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, fault: str, exit_code: int, code: str
) -> None:
    monkeypatch.setattr(provider_class("comfyui"), "poll_pause", lambda provider, asked: 0.05)
    with MockServer(faults=fault, latency=0.1) as mock:
        shell.env["COMFYUI_BASE_URL"] = mock.comfyui_url
        result = make(shell)
        assert result.code == exit_code, result.stdout
        if exit_code:
            assert result.error["code"] == code
        assert mock.stats()["generate_requests"] == 1


def test_the_mock_forgets_and_refuses_as_the_server_does(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider_class("comfyui"), "poll_pause", lambda provider, asked: 0.05)
    with MockServer(faults="restarted") as mock:
        shell.env["COMFYUI_BASE_URL"] = mock.comfyui_url
        assert make(shell).code == 0
        assert mock.stats()["generate_requests"] == 2
        own = with_marks() | {"60": {"class_type": "NoSuchNode", "inputs": {}}}
        result = make(shell, "--overwrite", "--workflow", write(shell, own))
        assert result.code == 2 and mock.stats()["generate_requests"] == 2


# The provider itself --------------------------------------------------------------------------------------------------


def test_a_workflow_of_an_earlier_run_is_only_known_by_its_hash() -> None:
    provider = provider_named("comfyui", {"workflow": "0" * 64})
    assert provider.payload(ImageRequest("x", "512*512", 1)) == {"prompt": {}}
    assert provider.known_settings["workflow"] == "0" * 64
    assert any("--workflow FILE" in text for text in provider.cannot(ImageRequest("x", "512*512", 1)))


def test_it_says_what_it_is() -> None:
    kind: type[Provider] = provider_class("comfyui")
    assert kind.names_tasks and kind.has_tasks() and not kind.billable
