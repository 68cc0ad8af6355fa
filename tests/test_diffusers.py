"""The model in this process, with a tiny one of random weights on the CPU.

Tests that draw need the packages of requirements-local.txt, and are heavy. Without these they are skipped, or, where
CI is set, they fail. All others run everywhere: what must hold without the packages is tested by hiding them.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
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

from conftest import ROOT, SCRIPTS, Result, Shell, cannot
from zimage import contract
from zimage.calls import Generated, LocalCall
from zimage.endpoint import Endpoint
from zimage.errors import Failure
from zimage.registry import provider_class
from zimage.request import ImageRequest

KIND = provider_class("diffusers")
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
    assert [line for line in lines if not line.startswith("#")] == list(REQUIREMENTS.values())


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
    "option", ["--steps=0", "--steps=201", "--guidance=-1", "--device=tpu", "--model-path=", "--model-path=a\nb"]
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


# Where it runs -------------------------------------------------------------------------------------------------------

SIZES = {"transformer": int(6e9), "text_encoder": int(4e9), "vae": int(1e8)}  # 20.2 GB in bfloat16, 12 the largest
GB = 1e9


def fake_torch(**has: bool) -> Any:
    return SimpleNamespace(
        __version__="2.13.0",
        cuda=SimpleNamespace(
            is_available=lambda: has.get("cuda", False),
            is_bf16_supported=lambda: has.get("bfloat16", True),
            empty_cache=lambda: None,
            get_device_name=lambda: "a card",
        ),
        backends=SimpleNamespace(
            mps=SimpleNamespace(
                is_available=lambda: has.get("mps", False),
                is_macos_or_newer=lambda *_version: has.get("bfloat16", True),
            )
        ),
        ops=SimpleNamespace(
            mkldnn=SimpleNamespace(_is_mkldnn_bf16_supported=lambda: has.get("bfloat16", True)),
        ),
        bfloat16="bfloat16",
        float32="float32",
    )


def place(monkeypatch: pytest.MonkeyPatch, wanted: str | None, free: dict[str, float], **has: bool) -> tuple[Any, ...]:
    monkeypatch.setitem(MODULE, "library", lambda name: fake_torch(**has))
    monkeypatch.setitem(MODULE, "free_memory", lambda device: free[device] * GB)
    chosen = MODULE["choose_place"](MODULE["Weights"](Path(), None, SIZES), wanted)
    return tuple(chosen)


@pytest.mark.parametrize(
    ("wanted", "free", "has", "chosen"),
    [
        (None, {"cuda": 24, "cpu": 8}, {"cuda": True, "mps": True}, ("cuda", "bfloat16", False)),
        (None, {"cuda": 16, "cpu": 24}, {"cuda": True}, ("cuda", "bfloat16", True)),
        ("cuda", {"cuda": 48, "cpu": 8}, {"cuda": True, "bfloat16": False}, ("cuda", "float32", False)),
        ("cpu", {"cuda": 48, "cpu": 24}, {"cuda": True}, ("cpu", "bfloat16", False)),
        (None, {"mps": 24, "cpu": 24}, {"mps": True}, ("mps", "bfloat16", False)),
        (None, {"cpu": 64}, {}, ("cpu", "bfloat16", False)),
        (None, {"cpu": 64}, {"bfloat16": False}, ("cpu", "float32", False)),
        (None, {"cpu": 32}, {"bfloat16": False}, ("cpu", "bfloat16", False)),
    ],
)
def test_the_best_place_that_is_large_enough_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
    wanted: str | None,
    free: dict[str, float],
    has: dict[str, bool],
    chosen: tuple[str, str, bool],
) -> None:
    assert place(monkeypatch, wanted, free, **has) == chosen


@pytest.mark.parametrize(
    ("free", "has", "words"),
    [
        ({"cuda": 16, "cpu": 12}, {"cuda": True}, "needs 22.4 GB on cuda, or 14.2 GB there and 20.2 GB in the machine"),
        ({"cuda": 16, "cpu": 12}, {"cuda": True}, "; free are 16.0 GB, and 12.0 GB in the machine"),
        ({"cuda": 8, "cpu": 64}, {"cuda": True}, "; free are 8.0 GB, and 64.0 GB in the machine"),
        ({"mps": 16, "cpu": 20}, {"mps": True}, "needs 22.4 GB on mps; free are 16.0 GB"),
        ({"cpu": 16}, {}, "needs 22.4 GB on cpu; free are 16.0 GB"),
    ],
)
def test_too_little_memory_is_told_with_numbers(
    monkeypatch: pytest.MonkeyPatch, free: dict[str, float], has: dict[str, bool], words: str
) -> None:
    failure = failure_of(lambda: place(monkeypatch, None, free, **has))
    assert failure.code == "too_little_memory" and failure.fault.exit_code == 2
    assert words in failure.message


def size_of(numbers: int) -> Any:
    """A tensor of so many numbers."""
    return SimpleNamespace(numel=lambda: numbers)


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = failure_of(lambda: place(monkeypatch, "cuda", {"cpu": 64}))
    assert failure.fault.exit_code == 2
    assert "cuda cannot be used with torch 2.13.0 here, only cpu" in failure.message


@pytest.mark.parametrize(
    ("chosen", "calls"),
    [
        (("cuda", "bfloat16", False), ["load device_map=cuda"]),
        (("cuda", "bfloat16", True), ["load", "offload cuda"]),
        (("mps", "float32", False), ["load", "to mps"]),
        (("cpu", "float32", False), ["load", "to cpu"]),
    ],
)
def test_the_pipeline_is_put_where_it_runs(
    monkeypatch: pytest.MonkeyPatch, chosen: tuple[str, str, bool], calls: list[str]
) -> None:
    seen: list[str] = []
    parts = {part: SimpleNamespace(parameters=lambda size=size: [size_of(size)]) for part, size in SIZES.items()}
    pipeline = SimpleNamespace(
        **parts,
        set_progress_bar_config=lambda disable: None,
        enable_model_cpu_offload=lambda device: seen.append(f"offload {device}"),
        to=lambda device: seen.append(f"to {device}"),
    )

    def from_pretrained(folder: str, **options: Any) -> Any:
        assert options.pop("local_files_only") and options.pop("use_safetensors")
        assert options.pop("torch_dtype") == chosen[1]
        seen.append(" ".join(["load", *(f"{name}={value}" for name, value in options.items())]))
        return pipeline

    logging = SimpleNamespace(set_verbosity_error=lambda: None, disable_progress_bar=lambda: None)
    diffusers = SimpleNamespace(ZImagePipeline=SimpleNamespace(from_pretrained=from_pretrained))
    fakes = {"torch": fake_torch(), "diffusers": diffusers}
    monkeypatch.setitem(MODULE, "library", lambda name: fakes.get(name, logging))
    assert MODULE["load"](MODULE["Weights"](Path("model"), None, SIZES), MODULE["Place"](*chosen)) is pipeline
    assert seen == calls


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
    assert usage["evaluations"] == 8 and usage["device"] == "cpu" and usage["offload"] is False
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


# The benchmark -------------------------------------------------------------------------------------------------------


def test_the_benchmark_runs_on_a_cpu_with_a_tiny_model(whole_model: Path) -> None:
    script = ROOT / "tests" / "benchmarks" / "local_gpu.py"
    command = [sys.executable, str(script), "--tiny", "--runs", "2", "--no-compile"]
    done = subprocess.run(command, check=True, capture_output=True, timeout=300)
    report = json.loads(done.stdout)
    assert report["evaluations"] == 8 and report["runs"] == 2
    assert report["eager"]["median_s"] >= report["eager"]["min_s"] > 0


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
