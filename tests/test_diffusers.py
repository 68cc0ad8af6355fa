"""The model in this process, with a tiny one of random weights on the CPU.

Tests that draw need the packages of requirements-local.txt, and are heavy. Without these they are skipped, or, where
CI is set, they fail. All others run everywhere: what must hold without the packages is tested by hiding them.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import tiny_model
from conftest import ROOT, SCRIPTS, Result, Shell, cannot
from zimage import contract
from zimage.calls import Generated, LocalCall
from zimage.endpoint import Endpoint
from zimage.errors import Failure
from zimage.model import Model
from zimage.placement import Place, needs_of
from zimage.registry import provider_class
from zimage.request import ImageRequest
from zimage.weights import Tensor, sha256_of

KIND: Any = provider_class("diffusers")
MODULE: dict[str, Any] = KIND.preflight.__globals__  # the file is loaded by its path, and is no module of the system's
REQUIREMENTS: dict[str, str] = MODULE["REQUIREMENTS"]
HERE = Endpoint("in-process", "in-process", "", "local")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARD = "transformer/diffusion_pytorch_model-00002-of-00006.safetensors"
LONG = ("--size", "2048*2048", "--steps", "200")  # minutes, even for the tiny model

# Loaded by every Python that a test starts: notes what it does in the file that WATCH_LOG names, lets it have no
# network, and hides the packages that WATCH_HIDE names.
WATCH = """
import importlib.machinery
import os
import sys

NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")

def note(text):
    log = os.open(os.environ["WATCH_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, (text + "\\n").encode())
    os.close(log)

def watch(event, arguments):
    if event in NETWORK:
        note(f"network {event} {arguments}")
        raise OSError("no network here")
    if event == "import" and arguments[0] in ("torch", "diffusers"):
        note(f"import {arguments[0]}")
    if event == "open" and str(arguments[0]).endswith("scheduler_config.json") and not checks(sys._getframe()):
        note("load")

def checks(frame):
    while frame is not None and frame.f_code.co_name != "damaged_files":
        frame = frame.f_back
    return frame is not None

sys.addaudithook(watch)
hidden = os.environ.get("WATCH_HIDE", "").split()
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name.partition(".")[0] in hidden else find(name, *rest)
)
"""


class Local:
    """The command line with this provider, watched."""

    def __init__(self, shell: Shell, folder: Path) -> None:
        self.shell = shell
        self._log = folder / "log"
        (folder / "sitecustomize.py").write_text(WATCH, encoding="utf-8")
        shell.env |= {"PYTHONPATH": str(folder), "WATCH_LOG": str(self._log)}

    def hide(self, *packages: str) -> None:
        self.shell.env["WATCH_HIDE"] = " ".join(packages)

    def arguments(self, *more: str) -> tuple[str, ...]:
        size = () if "--size" in more else ("--size", "512*512")
        return ("--provider", "diffusers", "--prompt", "a fox", *size, "--seed", "3", *more)

    def run(self, *more: str) -> Result:
        return self.checked(self.shell.run(*self.arguments(*more), timeout=120))

    def call(self, *arguments: str) -> Result:
        return self.checked(self.shell.run("--provider", "diffusers", *arguments, timeout=120))

    def checked(self, result: Result) -> Result:
        assert not [line for line in self.log() if line.startswith("network")]
        assert "Traceback" not in result.stderr
        return result

    def log(self) -> list[str]:
        return self._log.read_text(encoding="utf-8").splitlines() if self._log.exists() else []


@pytest.fixture
def local(shell: Shell, tmp_path: Path) -> Local:
    folder = tmp_path / "watch"
    folder.mkdir()
    return Local(shell, folder)


@pytest.fixture(scope="session")
def whole_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete model, not to be changed."""
    absent = [name for name in REQUIREMENTS if importlib.util.find_spec(name) is None]
    if absent:
        cannot(f"run the model: `make local` installs {', '.join(absent)}")
    folder = tmp_path_factory.mktemp("model")
    script = ROOT / "tests" / "tiny_model.py"
    subprocess.run([sys.executable, script, folder], check=True, capture_output=True, timeout=120)
    return folder


@pytest.fixture
def model(whole_model: Path, tmp_path: Path) -> Path:
    """A complete model to break."""
    return Path(shutil.copytree(whole_model, tmp_path / "model"))


@pytest.fixture
def provider(whole_model: Path) -> Iterator[Any]:
    yield KIND({"model_path": str(whole_model)})
    gc.collect()


def payload(provider: Any, **fields: Any) -> dict[str, Any]:
    request = ImageRequest(prompt="a fox", size="512*512", seed=3)._replace(**fields)
    asked = provider.payload(request)
    assert asked == json.loads(json.dumps(asked))
    assert isinstance(asked, dict)
    return asked


def make(provider: Any, seconds: float = 60, **fields: Any) -> Generated:
    call = provider.submit(payload(provider, **fields), HERE, "", None)
    assert isinstance(call, LocalCall)
    made = call.work(time.monotonic() + seconds)
    assert isinstance(made, Generated)
    return made


def failure_of(work: Callable[[], object]) -> Failure:
    with pytest.raises(Failure) as caught:
        work()
    return caught.value


# Without the packages ------------------------------------------------------------------------------------------------


def test_requirements_are_those_of_the_provider() -> None:
    lines = (ROOT / "requirements-local.txt").read_text(encoding="utf-8").splitlines()
    packages = {name: text for more in MODULE["MORE_REQUIREMENTS"].values() for name, text in more.items()}
    packages |= {name: text for one in MODULE["QUANTIZERS"].values() for name, text in one.packages.items()}
    of_cards = packages.pop("bitsandbytes")
    assert [line for line in lines if not line.startswith("#")] == [*REQUIREMENTS.values(), *packages.values()]
    assert f"#   {of_cards}" in lines


@pytest.mark.parametrize("hidden", [("torch",), ("diffusers", "accelerate"), tuple(REQUIREMENTS)])
def test_missing_packages_are_all_named_with_a_line_that_installs_them(local: Local, hidden: tuple[str, ...]) -> None:
    need = set(REQUIREMENTS) - set(hidden)
    if any(importlib.util.find_spec(name) is None for name in need):
        hidden = tuple(REQUIREMENTS)
    local.hide(*hidden)
    result = local.run("--print-response")
    assert result.code == 2
    error = result.error
    assert error["code"] == "missing_package"
    for name in hidden:
        assert REQUIREMENTS[name] in error["message"]
    (line,) = re.findall(r"\.venv/bin/pip install (.*?) \(", error["hint"])
    assert shlex.split(line) == [*contract.REQUIREMENTS.values(), *REQUIREMENTS.values()]
    assert "uv run" not in error["hint"]  # it installs what the script names, and torch is not among that
    assert local.shell.files() == [] and local.log() == []


@pytest.mark.smoke
def test_help_and_dry_run_need_no_package(local: Local) -> None:
    local.hide(*REQUIREMENTS)
    help_text = local.call("--help")
    assert help_text.code == 0
    assert all(option in help_text.stdout for option in ("--model-path", "--steps", "--guidance", "--device"))
    plan = local.run("--dry-run").json
    assert not plan["ok"]
    assert [problem["code"] for problem in plan["problems"]] == ["missing_package"]
    assert plan["payload"]["num_inference_steps"] == 8 and plan["payload"]["guidance_scale"] == 0
    assert plan["endpoint"] == "in-process" and plan["estimated_cost"] == 0 and not plan["billable"]
    assert local.shell.files() == [] and local.log() == []


@pytest.mark.parametrize(
    ("options", "field"), [(("--size", "1000*1000"), "size: "), (("--prompt-extend",), "prompt_extend: ")]
)
def test_what_the_model_cannot_do_is_refused(local: Local, options: tuple[str, ...], field: str) -> None:
    result = local.run(*options, "--print-response")
    assert result.code == 2
    assert result.error["message"].startswith(field)
    assert local.log() == []


@pytest.mark.parametrize(
    "option",
    [
        "--steps=0",
        "--steps=201",
        "--guidance=-1",
        "--device=tpu",
        "--model-path=",
        "--model-path=a\nb",
        "--quantize=int3",
        "--offload=disk",
        "--at-once=0",
        "--at-once=2.5",
        "--compile=yes",
        "--gguf=model.safetensors",
        "--lora=style.pt",
        "--lora=style.safetensors:much",
        "--lora=style.safetensors:11",
    ],
)
def test_settings_out_of_bounds_are_refused(local: Local, option: str) -> None:
    result = local.run(option, "--print-response")
    assert result.code == 2
    assert option.partition("=")[0] in result.error["message"]


# What must be here ---------------------------------------------------------------------------------------------------


def refused(local: Local, model: Path | str) -> dict[str, Any]:
    """The error of a run with a model that is not whole, found before anything heavy is loaded."""
    result = local.run("--model-path", str(model), "--print-response")
    assert result.code == 2
    assert result.error["code"] == "missing_weights"
    assert "import torch" not in local.log()
    assert local.shell.files() == []
    return result.error


def test_a_missing_folder_is_refused(local: Local, whole_model: Path, tmp_path: Path) -> None:
    error = refused(local, tmp_path / "nowhere")
    assert "no such folder" in error["message"]
    assert f"--local-dir {tmp_path / 'nowhere'}" in error["hint"]


def test_a_hub_name_that_is_not_in_the_cache_is_refused(local: Local, whole_model: Path) -> None:
    result = local.run("--print-response")
    assert result.code == 2 and result.error["code"] == "missing_weights"
    assert "hf download Tongyi-MAI/Z-Image-Turbo (about 33 GB)" in result.error["hint"]
    assert "neither a folder nor in the hub's cache" in refused(local, "someone/something")["message"]


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
        "text_encoder/model.safetensors",
        "transformer/config.json",
        SHARD,
    ],
)
def test_a_missing_file_is_named(local: Local, model: Path, file: str) -> None:
    (model / file).unlink()
    assert f"{file} is missing" in refused(local, model)["message"]


def test_a_file_that_was_not_fetched_to_its_end_is_named(local: Local, model: Path) -> None:
    content = (model / SHARD).read_bytes()
    (model / SHARD).write_bytes(content[:-1])
    assert f"{SHARD} is damaged: it has {len(content) - 1} of {len(content)} bytes" in refused(local, model)["message"]
    (model / SHARD).write_bytes(content[:100])
    assert f"{SHARD} is damaged: it is cut off" in refused(local, model)["message"]


def test_only_this_pipeline_of_known_packages_is_loaded(local: Local, model: Path) -> None:
    index = json.loads((model / "model_index.json").read_text(encoding="utf-8"))
    changes: list[dict[str, Any]] = [{"_class_name": "Flux"}, {"vae": ["os", "system"]}, {"vae": []}, {"vae": None}]
    for change in changes:
        (model / "model_index.json").write_text(json.dumps(index | change), encoding="utf-8")
        assert "model_index.json" in refused(local, model)["message"]


def test_a_model_in_the_hubs_cache_is_found_by_its_name(local: Local, whole_model: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hf" / "hub" / "models--Tongyi-MAI--Z-Image-Turbo"
    shutil.copytree(whole_model, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    local.shell.env["HF_HOME"] = str(tmp_path / "hf")
    result = local.run("--print-response")
    assert result.code == 0, result.stderr
    evidence = local.shell.evidence()
    assert evidence["settings"]["model_path"] == "Tongyi-MAI/Z-Image-Turbo"
    assert evidence["response"]["usage"]["revision"] == COMMIT


def test_an_unfit_release_is_refused(whole_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REQUIREMENTS, "diffusers", "diffusers>=99,<100")
    failure = failure_of(KIND({"model_path": str(whole_model)}).preflight)
    assert failure.code == "missing_package"
    assert re.search(r"diffusers [0-9.]+, needed is diffusers>=99,<100", failure.message)


# Loading --------------------------------------------------------------------------------------------------------------


def tensors_of(numbers: int) -> dict[str, Tensor]:
    return {"layer.weight": Tensor("F32", (numbers,), 4 * numbers)}


PARTS = {part: tensors_of(100) for part in ("transformer", "text_encoder", "vae")}


def fake_pipeline(seen: list[str]) -> Any:
    """One whose calls are noted, of the parts above."""
    parameters = [SimpleNamespace(numel=lambda: 100)]
    parts = {part: SimpleNamespace(parameters=lambda: parameters) for part in PARTS}
    parts["vae"].enable_slicing = lambda: seen.append("slicing")
    parts["transformer"].compile_repeated_blocks = lambda: seen.append("compile")
    return SimpleNamespace(
        **parts,
        set_progress_bar_config=lambda disable: None,
        load_lora_weights=lambda folder, weight_name, adapter_name, **_: seen.append(f"lora {weight_name}"),
        get_list_adapters=lambda: {"transformer": ["lora_0", "lora_1"]},
        set_adapters=lambda names, weights: seen.append(f"weights {weights}"),
        enable_model_cpu_offload=lambda device: seen.append(f"model {device}"),
        enable_group_offload=lambda onload_device, offload_type, use_stream: seen.append(
            f"group {onload_device} {offload_type} {use_stream}"
        ),
        to=lambda device: seen.append(f"to {device}"),
    )


@pytest.mark.parametrize(
    ("place", "settings", "calls"),
    [
        (("cuda", "bfloat16"), {}, ["load device_map=cuda", "slicing"]),
        (("cuda", "bfloat16", "model"), {}, ["load", "slicing", "model cuda"]),
        (("cuda", "bfloat16", "group"), {}, ["load", "slicing", "group cuda leaf_level True"]),
        (("mps", "float32"), {}, ["load", "slicing", "to mps"]),
        (("cpu", "float32"), {"compile": True}, ["load", "slicing", "compile", "to cpu"]),
        (
            ("cuda", "bfloat16"),
            {"quantize": "nf4"},
            ["load device_map=cuda quantization_config=transformer nf4, text_encoder nf4", "slicing"],
        ),
        (
            ("cuda", "bfloat16", "model"),
            {"quantize": "fp8"},
            ["load quantization_config=transformer fp8, text_encoder fp8", "slicing", "model cuda"],
        ),
        (
            ("cuda", "bfloat16"),  # its transformer passes through the machine
            {"gguf": {"file": "/models/q4.gguf"}, "quantize": "int8"},
            ["gguf /models/q4.gguf", "load quantization_config=text_encoder int8 transformer=it", "slicing", "to cuda"],
        ),
        (
            ("cuda", "bfloat16", "model"),  # before it is compiled, and before it is moved
            {"lora": [{"file": "/l/a.safetensors", "weight": 0.5}, {"file": "/l/b.safetensors", "weight": 1.0}]}
            | {"compile": True},
            [
                "load",
                "lora a.safetensors",
                "lora b.safetensors",
                "weights [0.5, 1.0]",
                "slicing",
                "compile",
                "model cuda",
            ],
        ),
    ],
)
def test_the_pipeline_is_loaded_as_it_is_asked_for_and_put_where_it_runs(
    monkeypatch: pytest.MonkeyPatch, place: tuple[Any, ...], settings: dict[str, Any], calls: list[str]
) -> None:
    """With fakes: no machine of ours has such a device."""
    seen: list[str] = []
    pipeline = fake_pipeline(seen)

    def from_pretrained(folder: str, **options: Any) -> Any:
        assert options.pop("local_files_only") and options.pop("use_safetensors")
        assert options.pop("torch_dtype") == place[1]
        seen.append(" ".join(["load", *(f"{name}={options[name]}" for name in sorted(options))]))
        return pipeline

    def from_single_file(file: str, **options: Any) -> str:
        assert options["local_files_only"] and options["quantization_config"] == options["torch_dtype"] == place[1]
        seen.append(f"gguf {file}")
        return "it"

    diffusers = SimpleNamespace(
        ZImagePipeline=SimpleNamespace(from_pretrained=from_pretrained),
        ZImageTransformer2DModel=SimpleNamespace(from_single_file=from_single_file),
        GGUFQuantizationConfig=lambda compute_dtype: compute_dtype,
        PipelineQuantizationConfig=lambda quant_mapping: ", ".join(
            f"{part} {kind}" for part, kind in quant_mapping.items()
        ),
    )
    torch = SimpleNamespace(bfloat16="bfloat16", float32="float32", device=lambda name: name)
    fakes = {"torch": torch, "diffusers": diffusers}
    bars = SimpleNamespace(disable_progress_bar=lambda: None)
    monkeypatch.setitem(MODULE, "library", lambda name: fakes.get(name, bars))
    quantizers = {
        name: one._replace(configs=lambda dtype, name=name: dict.fromkeys(("transformer", "text_encoder"), name))
        for name, one in MODULE["QUANTIZERS"].items()
    }
    monkeypatch.setitem(MODULE, "QUANTIZERS", quantizers)
    asked = KIND(settings).settings
    assert MODULE["load"](Model(Path("model"), None, PARTS), Place(*place), asked) is pipeline
    assert seen == calls


def test_the_document_has_the_memory_that_the_real_model_needs(whole_model: Path) -> None:
    """By the shapes of the real model, of which nothing is made."""
    spec = importlib.util.spec_from_file_location("local_gpu", ROOT / "tests" / "benchmarks" / "local_gpu.py")
    assert spec is not None and spec.loader is not None
    local_gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(local_gpu)
    torch, diffusers, transformers = (importlib.import_module(name) for name in ("torch", "diffusers", "transformers"))
    with torch.device("meta"):
        modules = {
            "transformer": diffusers.ZImageTransformer2DModel(**local_gpu.TRANSFORMER),
            "text_encoder": transformers.Qwen3Model(transformers.Qwen3Config(**local_gpu.TEXT_ENCODER)),
            "vae": diffusers.AutoencoderKL(**local_gpu.VAE),
        }
    parts = {
        part: {name: Tensor("F32", tuple(one.shape), 4 * one.numel()) for name, one in module.named_parameters()}
        for part, module in modules.items()
    }
    model = Model(Path(), None, parts)

    def card(kind: str | None, way: str) -> str:
        settings = KIND({"quantize": kind, "device": "cuda"}).settings
        return needs_of(model, "bfloat16", settings, MODULE["QUANTIZERS"])[way].told("cuda").partition(" on ")[0]

    text = (SCRIPTS.parent / "references" / "providers.md").read_text(encoding="utf-8")
    for way in ("none", "model", "group"):
        assert re.search(rf"^\| `{way}` \|.*\| {re.escape(card(None, way))} \|", text, re.MULTILINE), card(None, way)
    for kind in MODULE["QUANTIZERS"]:
        row = f"| {card(kind, 'none')} | {card(kind, 'model')} |"
        assert re.search(rf"^\| `{kind}`.*{re.escape(row)}", text, re.MULTILINE), row


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_the_configurations_for_cards_say_what_they_must(whole_model: Path, kind: str) -> None:
    """Made with the real libraries; what they do with them needs a card."""
    if importlib.util.find_spec(next(iter(MODULE["QUANTIZERS"][kind].packages))) is None:
        pytest.skip("its package is not installed")
    configs = MODULE["QUANTIZERS"][kind].configs("bfloat16")
    assert set(configs) == {"transformer", "text_encoder"}
    if kind == "nf4":
        torch = importlib.import_module("torch")
        for config in configs.values():
            assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4"
            assert config.bnb_4bit_compute_dtype is torch.bfloat16


# Drawing, by the command line ----------------------------------------------------------------------------------------


def test_a_picture_is_saved_with_evidence(local: Local, whole_model: Path) -> None:
    result = local.run("--model-path", str(whole_model), "--output", "fox.png", "--print-response")
    assert result.code == 0, result.stderr
    assert re.fullmatch(r"evidence: \S+\n", result.stderr)
    with Image.open(local.shell.folder / "fox.png") as picture:
        assert picture.size == (512, 512) and picture.format == "PNG"
        assert len(picture.getcolors(512 * 512) or []) > 100
    response, evidence = result.json, local.shell.evidence()
    assert response["provider"] == "diffusers" and response["region"] == "local" and response["estimated_cost"] == 0
    assert "image_url" not in response and "image_url" not in evidence["response"]
    assert evidence["endpoint"] == "in-process" and evidence["billable"] is False
    assert evidence["cost"]["estimate"] == 0
    assert evidence["settings"] == {"model_path": str(whole_model), "steps": 8, "guidance": 0.0}
    usage = evidence["response"]["usage"]
    assert usage["evaluations"] == 8 and usage["device"] == "cpu"
    assert usage["offload"] == "none" and usage["at_once"] == 1
    assert {"model", "seconds", "dtype", "torch", "diffusers"} <= set(usage)
    assert local.log().count("load") == 1


def test_the_seed_decides_the_bytes_and_replay_repeats_them(local: Local, whole_model: Path) -> None:
    at = ("--model-path", str(whole_model))
    assert local.run(*at, "--output", "first.png").code == 0
    (evidence,) = local.shell.evidence_files()
    assert local.shell.run("--replay", str(evidence), "--output", "again.png", timeout=120).code == 0
    assert local.run(*at, "--seed", "4", "--output", "other.png").code == 0
    first, again, other = ((local.shell.folder / f"{name}.png").read_bytes() for name in ("first", "again", "other"))
    assert first == again != other


def test_check_and_dry_run_load_no_weights(local: Local, whole_model: Path) -> None:
    checked = local.call("--check", "--model-path", str(whole_model))
    assert checked.code == 0
    assert checked.json["model_listed"] is True and checked.json["endpoint"] == "in-process"
    plan = local.run("--dry-run", "--model-path", str(whole_model)).json
    assert plan["ok"] and plan["problems"] == []
    assert "load" not in local.log() and "import diffusers" not in local.log()
    assert local.shell.files() == []


@pytest.mark.parametrize("seconds", ["1", "12"])  # while it is loaded, and while it draws
def test_a_picture_that_takes_too_long_ends_promptly(local: Local, whole_model: Path, seconds: str) -> None:
    start = time.monotonic()
    result = local.run("--model-path", str(whole_model), *LONG, "--timeout", seconds, "--print-response")
    assert result.code == 6
    assert result.error["code"] == "too_slow" and result.error["billed"] == "no"
    assert time.monotonic() - start < float(seconds) + 10
    assert not list(local.shell.folder.rglob("*.png"))


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_signal_ends_it_while_it_draws(local: Local, whole_model: Path) -> None:
    process = local.shell.start(*local.arguments("--model-path", str(whole_model), *LONG, "--print-response"))
    deadline = time.monotonic() + 60
    while not local.shell.evidence_files() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    result = local.checked(local.shell.finish(process))
    assert result.code == 143
    assert result.error["code"] == "interrupted" and result.error["billed"] == "no"
    assert local.shell.evidence()["status"] == "failed"


def test_a_batch_loads_the_model_once(local: Local, whole_model: Path) -> None:
    rows = [{"prompt": name, "size": "512*512"} for name in ("a fox", "an owl", "a hare")]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (local.shell.folder / "rows.jsonl").write_text(text, encoding="utf-8")
    local.shell.script = SCRIPTS / "generate_batch.py"
    options = ("--model-path", str(whole_model), "--input", "rows.jsonl", "--output-dir", "out", "--no-gallery")
    result = local.call(*options)
    assert result.code == 0, result.stderr
    assert result.json["saved"] == 3
    assert len(list((local.shell.folder / "out" / "images").rglob("*.png"))) == 3
    assert local.log().count("load") == 1
    assert local.call(*options).code == 0
    assert local.log().count("load") == 1, "a finished batch needs no model"


# Drawing, by the provider --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "guidance", "widths"), [(8, 0.0, {1}), (3, 0.0, {1}), (2, 2.5, {2})])
def test_every_step_is_one_evaluation_of_the_transformer(
    provider: Any, steps: int, guidance: float, widths: set[int]
) -> None:
    provider.settings |= {"steps": steps, "guidance": guidance}
    provider.prepare()
    seen: list[int] = []
    provider._pipeline.transformer.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    made = make(provider)
    assert len(seen) == steps == made.usage["evaluations"]
    assert set(seen) == widths  # with guidance a step draws two: with the prompt, and without


def test_a_prompt_that_is_cut_is_told(provider: Any) -> None:
    (warning,) = make(provider, prompt="x" * 600).warnings
    assert re.fullmatch(r"the prompt has 6[0-9]{2} tokens, and the model reads 512: .*", warning)
    assert make(provider, prompt="x" * 400).warnings == ()


def test_threads_draw_one_after_the_other_with_one_pipeline(provider: Any) -> None:
    with ThreadPoolExecutor(3) as threads:
        made = list(threads.map(lambda seed: make(provider, seed=seed), [1, 2, 1]))
    assert made[0].content == made[2].content != made[1].content


def test_a_picture_that_gives_up_leaves_the_pipeline_usable(provider: Any) -> None:
    before = make(provider)
    provider.settings["steps"] = 200
    failure = failure_of(lambda: make(provider, seconds=0.3))
    assert failure.code == "too_slow"
    assert re.fullmatch("[0-9]+ of 200 steps were done in time", failure.message)
    provider.settings["steps"] = 8
    assert make(provider).content == before.content


def test_a_picture_waits_no_longer_than_it_may_for_another(provider: Any) -> None:
    provider.prepare()
    begun = threading.Event()
    provider._pipeline.transformer.register_forward_pre_hook(lambda *_: begun.set())
    provider.settings["steps"] = 200
    slow = threading.Thread(target=lambda: failure_of(lambda: make(provider, seconds=3, size="1024*1024")))
    slow.start()
    assert begun.wait(30)
    assert failure_of(lambda: make(provider, seconds=0.1)).code == "too_slow"
    slow.join(30)
    assert not slow.is_alive()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "too_little_memory"),
        ("RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate", "too_little_memory"),
        ("RuntimeError: CUDA error: an illegal memory access was encountered", "task_failed"),
    ],
)
def test_what_the_libraries_raise_becomes_a_failure(provider: Any, error: str, code: str) -> None:
    provider.prepare()
    torch = importlib.import_module("torch")
    name, _, text = error.partition(": ")

    def broken(*_: Any) -> None:
        raise getattr(torch, name, RuntimeError)(text)

    hook = provider._pipeline.transformer.register_forward_pre_hook(broken)
    failure = failure_of(lambda: make(provider))
    assert failure.code == code and failure.fault.billed == "no"
    assert text in failure.message
    hook.remove()
    assert make(provider).content


def test_values_that_are_no_numbers_are_no_picture(provider: Any) -> None:
    provider.prepare()
    provider._pipeline.vae.decoder.conv_out.bias.data.fill_(float("nan"))
    failure = failure_of(lambda: make(provider))
    assert failure.code == "task_failed" and "not numbers" in failure.message


# Coarser numbers, LoRAs, parts that are moved, and several at once ---------------------------------------------------


def extras(whole_model: Path) -> None:
    absent = [name for more in MODULE["MORE_REQUIREMENTS"].values() for name in more]
    absent = [name for name in [*absent, "torchao"] if importlib.util.find_spec(name) is None]
    if absent:
        cannot(f"run the model so: `make local` installs {', '.join(absent)}")


@pytest.fixture(scope="session")
def files(whole_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA and a transformer in GGUF, for the tiny model."""
    extras(whole_model)
    folder = tmp_path_factory.mktemp("files")
    made = {"lora": folder / "style.safetensors", "gguf": folder / "tiny-Q8_0.gguf"}
    tiny_model.save_lora(made["lora"])
    tiny_model.save_gguf(made["gguf"])
    return made


def lora_of(file: Path, weight: float = 1.0) -> list[dict[str, Any]]:
    return [{"file": str(file), "weight": weight}]


def pixels(made: Generated) -> Any:
    numpy = importlib.import_module("numpy")
    with Image.open(io.BytesIO(made.content)) as picture:
        return numpy.asarray(picture).astype(int)


def distance(one: Generated, other: Generated) -> int:
    """The largest difference of two pictures, of 255."""
    return int(abs(pixels(one) - pixels(other)).max())


def drawn(whole_model: Path, **settings: Any) -> Generated:
    return make(KIND({"model_path": str(whole_model)} | settings))


@pytest.mark.parametrize(
    "more", [("quantize",), ("gguf",), ("gguf", "quantize"), ("lora", "quantize"), ("lora", "gguf")]
)
def test_coarser_numbers_draw_nearly_the_same_picture(
    whole_model: Path, files: dict[str, Path], more: tuple[str, ...]
) -> None:
    given = {"quantize": "int8", "gguf": {"file": str(files["gguf"])}, "lora": lora_of(files["lora"])}
    settings = {name: given[name] for name in more}
    as_it_is = drawn(whole_model, **({"lora": given["lora"]} if "lora" in more else {}))
    coarse = drawn(whole_model, **settings)
    assert 0 < distance(as_it_is, coarse) < 40
    assert drawn(whole_model, **settings).content == coarse.content


@pytest.mark.parametrize("more", [{}, {"gguf": True}])
def test_the_layers_are_held_in_few_bytes(whole_model: Path, files: dict[str, Path], more: dict[str, Any]) -> None:
    gguf = {"gguf": {"file": str(files["gguf"])}} if more else {}
    provider = KIND({"model_path": str(whole_model), "quantize": "int8"} | gguf)
    provider.prepare()
    kinds = {
        "transformer": type(provider._pipeline.transformer.layers[0].attention.to_q.weight).__name__,
        "text_encoder": type(provider._pipeline.text_encoder.layers[0].mlp.up_proj.weight).__name__,
        "fine": type(provider._pipeline.transformer.t_embedder.mlp[0].weight).__name__,
    }
    assert kinds["text_encoder"] == "Int8Tensor" and kinds["transformer"] == ("GGUFParameter" if more else "Int8Tensor")
    assert more or kinds["fine"] == "Parameter"


def test_a_gguf_file_needs_no_other_transformer(local: Local, model: Path, files: dict[str, Path]) -> None:
    for file in (model / "transformer").glob("*.safetensors*"):
        file.unlink()
    refused(local, model)
    result = local.run("--model-path", str(model), "--gguf", str(files["gguf"]), "--output", "fox.png")
    assert result.code == 0, result.stderr
    assert re.fullmatch(r"evidence: \S+\n", result.stderr)
    evidence = local.shell.evidence()
    assert evidence["settings"]["gguf"] == {"file": str(files["gguf"]), "sha256": sha256_of(files["gguf"])}


def test_a_gguf_file_that_lacks_tensors_makes_no_picture(local: Local, whole_model: Path, tmp_path: Path) -> None:
    extras(whole_model)
    gguf = importlib.import_module("gguf")
    writer = gguf.GGUFWriter(str(tmp_path / "few.gguf"), "lumina2")
    writer.add_tensor("x_pad_token", importlib.import_module("numpy").zeros((1, 32), "float32"))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    error = local.run("--model-path", str(whole_model), "--gguf", str(tmp_path / "few.gguf"), "--print-response").error
    assert error["billed"] == "no" and error["code"] in ("missing_weights", "task_failed")


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model."])
def test_a_lora_changes_the_picture_by_its_weight(whole_model: Path, tmp_path: Path, prefix: str) -> None:
    extras(whole_model)
    tiny_model.save_lora(tmp_path / "a.safetensors", prefix=prefix)
    plain, none = drawn(whole_model), drawn(whole_model, lora=lora_of(tmp_path / "a.safetensors", 0.0))
    half, whole = (drawn(whole_model, lora=lora_of(tmp_path / "a.safetensors", weight)) for weight in (0.5, 1.0))
    assert distance(plain, none) == 0
    assert distance(plain, half) > 10 and distance(half, whole) > 10


def test_two_loras_are_added(whole_model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    tiny_model.save_lora(tmp_path / "b.safetensors", seed=2)
    one, other = lora_of(files["lora"]), lora_of(tmp_path / "b.safetensors", -0.5)
    pictures = [drawn(whole_model, lora=loras) for loras in (one, other, one + other)]
    assert len({made.content for made in pictures}) == 3


def test_replay_adds_the_same_lora_and_refuses_another(local: Local, whole_model: Path, tmp_path: Path) -> None:
    extras(whole_model)
    lora = local.shell.folder / "style.safetensors"
    tiny_model.save_lora(lora)
    first = local.run("--model-path", str(whole_model), "--lora", "style.safetensors:-0.75", "--output", "first.png")
    assert first.code == 0, first.stderr
    (evidence,) = local.shell.evidence_files()
    recorded = {"file": str(lora), "weight": -0.75, "sha256": sha256_of(lora)}
    assert local.shell.evidence()["settings"]["lora"] == [recorded]
    assert local.shell.run("--replay", str(evidence), "--output", "again.png", timeout=120).code == 0
    assert (local.shell.folder / "again.png").read_bytes() == (local.shell.folder / "first.png").read_bytes()
    tiny_model.save_lora(lora, seed=5)
    for more in ((), ("--dry-run",)):
        told = local.shell.run("--replay", str(evidence), *more, "--print-response", timeout=120).json
        error = told["problems"][0] if more else told["error"]
        assert error["code"] == "missing_weights"
        assert f"has changed: its SHA-256 was {recorded['sha256']}, and is {sha256_of(lora)}" in error["message"]
    lora.unlink()
    assert "is not there" in local.shell.run("--replay", str(evidence), "--print-response").error["message"]
    assert local.shell.run("--recover", str(evidence)).code == 0  # the picture is here


@pytest.mark.parametrize("fault", ["shape", "names"])
def test_a_lora_for_another_model_is_refused(local: Local, whole_model: Path, tmp_path: Path, fault: str) -> None:
    extras(whole_model)
    torch = importlib.import_module("torch")
    layer = "transformer.layers.0.attention.to_q" if fault == "shape" else "unet.down.0"
    tensors = {f"{layer}.lora_A.weight": torch.zeros(4, 77), f"{layer}.lora_B.weight": torch.zeros(99, 4)}
    importlib.import_module("safetensors.torch").save_file(tensors, tmp_path / "other.safetensors")
    error = local.run(
        "--model-path", str(whole_model), "--lora", str(tmp_path / "other.safetensors"), "--print-response"
    ).error
    assert (error["code"], error["exit_code"], error["billed"]) == ("usage", 2, "no")
    assert f"--lora: {tmp_path / 'other.safetensors'} does not fit this model" in error["message"]
    assert local.shell.evidence_files() == []


@pytest.mark.parametrize("way", ["model", "group"])
def test_parts_that_are_moved_draw_the_same_picture(whole_model: Path, files: dict[str, Path], way: str) -> None:
    """From the CPU to the CPU: what moves, and when, is the same as on a card."""
    settings = KIND({"model_path": str(whole_model), "lora": lora_of(files["lora"])})
    settings.preflight()
    model, place = settings._found
    asked = [payload(settings)]
    pictures = []
    for one in (place, place._replace(offload=way)):
        pipeline = MODULE["load"](model, one, settings.settings)
        pictures.append(MODULE["draw"](pipeline, asked, time.monotonic() + 60, one, settings.settings)[0].values)
    assert (pictures[0] == pictures[1]).all()


def test_pictures_drawn_at_once_are_those_drawn_alone(whole_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte for byte on a CPU in bfloat16, for prompts of any length; where nobody has looked, a warning says so."""
    prompts = {1: "a fox", 2: "an owl " * 9, 3: "a hare", 4: "a long word " * 30}
    alone = KIND({"model_path": str(whole_model)})
    single = {seed: make(alone, seed=seed, prompt=prompt) for seed, prompt in prompts.items()}
    together = KIND({"model_path": str(whole_model), "at_once": 4})
    together.prepare()
    for is_known in (True, False):
        if not is_known:
            monkeypatch.setitem(MODULE, "SAME_AT_ONCE", ())
        with ThreadPoolExecutor(4) as threads:
            made = dict(
                zip(
                    prompts,
                    threads.map(lambda seed: make(together, seed=seed, prompt=prompts[seed]), prompts),
                    strict=True,
                )
            )
        for seed, picture in made.items():
            assert picture.usage["at_once"] == 4
            assert len(picture.warnings) == (0 if is_known else 1)
            if single[seed].usage["dtype"] == "bfloat16":
                assert picture.content == single[seed].content
    assert single[1].usage["at_once"] == 1


def test_compiled_pictures_drawn_at_once_are_told_to_differ(whole_model: Path) -> None:
    together = KIND({"model_path": str(whole_model), "at_once": 2, "compile": True})
    together.prepare()
    with ThreadPoolExecutor(2) as threads:
        for picture in threads.map(lambda seed: make(together, seed=seed), (1, 2)):
            assert picture.usage["at_once"] == 2
            assert [warning for warning in picture.warnings if "may differ in fine detail" in warning]


def test_values_that_are_no_numbers_spoil_one_picture_alone(whole_model: Path) -> None:
    provider = KIND({"model_path": str(whole_model), "at_once": 2})
    provider.prepare()
    decode = provider._pipeline.vae._decode
    count = iter(range(9))

    def first_is_spoilt(*given: Any, **named: Any) -> Any:
        result = decode(*given, **named)
        if next(count) == 0:
            result.sample.fill_(float("nan"))
        return result

    provider._pipeline.vae._decode = first_is_spoilt
    with ThreadPoolExecutor(2) as threads:
        both = [threads.submit(make, provider, seed=seed) for seed in (1, 2)]
        errors = [one.exception() for one in both]
    assert sorted(type(error).__name__ for error in errors) == ["Failure", "NoneType"]


def test_a_batch_draws_several_at_once(local: Local, whole_model: Path) -> None:
    rows = [{"prompt": f"a fox, {number}", "size": "512*512" if number % 4 else "256*1024"} for number in range(10)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (local.shell.folder / "rows.jsonl").write_text(text, encoding="utf-8")
    local.shell.script = SCRIPTS / "generate_batch.py"
    options = ("--model-path", str(whole_model), "--input", "rows.jsonl", "--output-dir", "out", "--no-gallery")
    result = local.call(*options, "--at-once", "3")
    assert result.code == 0, result.stderr
    assert result.json["saved"] == 10
    records = [json.loads(file.read_text()) for file in (local.shell.folder / "out" / "evidence").rglob("*.json")]
    assert {record["response"]["usage"]["at_once"] for record in records} >= {3}
    assert all(record["settings"]["at_once"] == 3 for record in records)
    assert local.log().count("load") == 1
    done = local.call(*options, "--at-once", "2").json  # of no meaning for what is saved
    assert done["saved"] == 10 and done["this_run"]["total"] == 0


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_batch_that_is_killed_thrice_makes_every_picture_once(local: Local, whole_model: Path) -> None:
    rows = [{"prompt": f"a fox, {number}", "size": "512*512", "seed": number} for number in range(50)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (local.shell.folder / "rows.jsonl").write_text(text, encoding="utf-8")
    local.shell.script = SCRIPTS / "generate_batch.py"
    options = ("--provider", "diffusers", "--model-path", str(whole_model), "--at-once", "4", "--no-gallery")
    command = (*options, "--input", "rows.jsonl", "--output-dir", "out")
    images = local.shell.folder / "out" / "images"
    for saved in (5, 13, 30):
        process = local.shell.start(*command)
        while len(list(images.glob("*.png"))) < saved and process.poll() is None:
            time.sleep(0.02)
        process.kill()
        process.communicate(timeout=30)
    result = local.shell.run(*command, timeout=300)
    assert result.code == 0, result.stderr
    assert result.json["saved"] == 50 and result.json["this_run"]["total"] < 50
    lines = (local.shell.folder / "out" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert len({json.loads(line)["sha256"] for line in lines}) == len(list(images.glob("*.png"))) == 50


def test_compiling_pays_in_a_batch_and_one_picture_is_told_so(local: Local, whole_model: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("compiling for a CPU needs a C++ compiler")
    result = local.run("--model-path", str(whole_model), "--compile", "--output", "fox.png", "--timeout", "300")
    assert result.code == 0, result.stderr
    assert result.stderr.splitlines()[0] == "warning: --compile pays in a batch only: one picture takes longer with it"
    assert local.shell.evidence()["settings"]["compile"] is True


# The benchmark -------------------------------------------------------------------------------------------------------


def benchmark(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / "local_gpu.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_the_benchmark_runs_on_a_cpu_with_a_tiny_model(whole_model: Path) -> None:
    extras(whole_model)
    done = benchmark("--tiny", "--runs", "2", "--only", "plain", "--only", "int8", "--only", "int8 compiled")
    assert done.returncode == 0, done.stderr
    lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    assert [cells[0] for cells in lines[2:]] == ["plain", "int8", "int8 compiled"]
    for cells in lines[2:4]:
        loading, first, alone, at_once = (float(cell) for cell in cells[1:5])
        assert min(loading, first, alone, at_once) > 0 and cells[5:] == ["2 of 2", "-", "-"]
    assert lines[4][1].startswith("usage: --compile: ")  # what is only for cards is told


def test_the_benchmark_says_that_there_is_no_gpu(whole_model: Path) -> None:
    if importlib.import_module("torch").cuda.is_available():
        pytest.skip("there is one")
    done = benchmark()
    assert done.returncode == 2 and "there is no GPU" in done.stderr


# What an outside audit found -----------------------------------------------------------------------------------------


def drop_tensors(file: Path, count: int) -> None:
    """Take the largest tensors out of a file of weights; what is left is a whole file."""
    files = importlib.import_module("safetensors.torch")
    tensors = files.load_file(file)
    for name in sorted(tensors, key=lambda name: -tensors[name].numel())[:count]:
        del tensors[name]
    files.save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("part", ["text_encoder/model", "transformer/diffusion_pytorch_model"])
def test_weights_that_lack_tensors_make_no_picture(local: Local, model: Path, part: str) -> None:
    drop_tensors(next((model / part).parent.glob("*.safetensors")), 2)
    error = local.run("--model-path", str(model), "--print-response").error
    assert (error["code"], error["exit_code"], error["billed"]) == ("missing_weights", 2, "no")


@pytest.mark.parametrize("name", ["vae/config.json", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"])
def test_a_cut_file_is_named_before_anything_is_loaded(local: Local, model: Path, name: str) -> None:
    os.truncate(model / name, 20)
    said = local.run("--model-path", str(model), "--dry-run").json
    assert f"{name} is damaged" in said["problems"][0]["message"]


def test_a_saved_picture_is_had_in_another_format_and_missed_where_it_is_gone(local: Local, whole_model: Path) -> None:
    response = local.run("--model-path", str(whole_model), "--output", "fox.png", "--print-response").json
    recover = ("--recover", response["evidence_path"])
    assert local.shell.run(*recover, "--output", "fox.webp").code == 0
    with Image.open(local.shell.folder / "fox.webp") as picture:
        assert picture.size == (512, 512)
    (local.shell.folder / "fox.png").unlink()
    error = local.shell.run(*recover, "--print-response").error
    assert (error["code"], error["exit_code"]) == ("link_expired", 8)
    assert "vanished" in error["message"] and "next_command" not in error


def test_killed_work_was_nowhere_else(local: Local, whole_model: Path) -> None:
    process = local.shell.start(*local.arguments("--model-path", str(whole_model), *LONG))
    while not local.shell.evidence_files():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=30)
    error = local.shell.run("--recover", str(local.shell.evidence_files()[0]), "--print-response").error
    assert (error["code"], error["exit_code"], error["billed"]) == ("nothing_to_recover", 2, "no")
