"""The model in this process: diffusers' ZImagePipeline on your own GPU or, slowly, on the CPU.

Sources: references/providers.md of this skill. Nothing is downloaded, and no code of a model is run: the weights must
be here, as safetensors. torch and diffusers are loaded only when a picture is made.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import re
import struct
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from zimage import contract
from zimage.calls import Generated, LocalCall
from zimage.endpoint import Endpoint
from zimage.errors import Failure, os_reason
from zimage.outside import at, outside_text
from zimage.provider import OpenModel
from zimage.quoting import command_line, quoted
from zimage.request import ImageRequest
from zimage.settings import GUIDANCE, STEPS, Setting

# The same bounds stand in requirements-local.txt; a test compares them. What else is imported comes with these.
REQUIREMENTS = {
    "torch": "torch>=2.6,<3",
    "diffusers": "diffusers>=0.36,<1",
    "transformers": "transformers>=4.57,<6",
    "accelerate": "accelerate>=1.0,<2",
}
MODEL = "Tongyi-MAI/Z-Image-Turbo"
DOWNLOAD = "about 33 GB"  # the transformer is kept in float32
HUB_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
MAX_TOKENS = 512  # of a prompt; the pipeline's own default
GB = 1e9
WORKING_MEMORY = 2.2 * GB  # measured for 1024*1024 in bfloat16, where the last step, the VAE, takes most
BYTES = {"bfloat16": 2, "float32": 4}  # float16 is no choice: this model overflows in it (Tongyi-MAI/Z-Image#14)
DEVICES = ("cuda", "mps", "cpu")
PIPELINE = "ZImagePipeline"
MAX_HEADER = 100_000_000  # bytes; the format's own limit


class Component(NamedTuple):
    """What one folder of a model must hold: `config`, and weights in one file of that stem or in several."""

    config: str
    weights: str = ""


COMPONENTS = {
    "scheduler": Component("scheduler_config.json"),
    "tokenizer": Component("tokenizer_config.json"),
    "text_encoder": Component("config.json", "model"),
    "transformer": Component("config.json", "diffusion_pytorch_model"),
    "vae": Component("config.json", "diffusion_pytorch_model"),
}
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # one of these sets
SMALL_FILES = ("model_index.json", *(f"{part}/{component.config}" for part, component in COMPONENTS.items()))


def model_path(text: str) -> str:
    """A folder as an absolute path, so that evidence means the same folder everywhere; a hub name as it is."""
    if not text.strip() or not text.isprintable():
        raise ValueError(f"a folder, or a hub name such as {MODEL}")
    path = os.path.expanduser(text)
    return os.path.abspath(path) if os.path.isdir(path) else text


def device_name(text: str) -> str:
    if text not in DEVICES:
        raise ValueError(f"one of {', '.join(DEVICES)}")
    return text


class Weights(NamedTuple):
    """A model on this machine, complete as far as can be told without loading it."""

    folder: Path
    revision: str | None  # of the hub, where it comes from its cache
    values: Mapping[str, int]  # numbers in the weights of each component


class Place(NamedTuple):
    """Where and how a model runs. `offload`: it stays in the machine's memory, and one part at a time is moved."""

    device: str
    dtype: str
    offload: bool = False


class Diffusers(OpenModel):
    """Loads the pipeline once; draws one picture at a time."""

    name = "diffusers"
    roots: ClassVar = {"local": ""}
    default_region = "local"
    in_process = True
    long_prompt = sys.maxsize  # what is too long is known in tokens, and said when the picture is made
    calls_at_once = 1
    own_settings = (
        Setting("model_path", "PATH", "folder that holds the model, or its name in the hub's cache", MODEL, model_path),
        STEPS._replace(help="sampling steps, each one evaluation of the transformer"),
        GUIDANCE,
        Setting("device", "NAME", f"one of {', '.join(DEVICES)} (default the first that is there)", None, device_name),
    )

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(settings)
        self._lock = threading.RLock()
        self._found: tuple[Weights, Place] | None = None
        self._pipeline: Any = None

    def payload(self, request: ImageRequest) -> dict[str, Any]:
        width, height = request.width_height
        return {
            "model": self.settings["model_path"],
            "prompt": request.prompt,
            "width": width,
            "height": height,
            "num_inference_steps": self.settings["steps"],
            "guidance_scale": self.settings["guidance"],
            "seed": request.seed,
            "max_sequence_length": MAX_TOKENS,
        }

    def preflight(self) -> None:
        with self._lock:
            if self._found is None:
                check_packages()
                weights = find_weights(self.settings["model_path"])
                self._found = weights, choose_place(weights, self.settings["device"])

    def prepare(self) -> None:
        self.preflight()
        with self._lock:
            if self._pipeline is None and self._found is not None:
                self._pipeline = load(*self._found)

    def submit(self, payload: dict[str, Any], endpoint: Endpoint, key: str, workspace: str | None) -> LocalCall:
        return LocalCall(functools.partial(self._draw, payload))

    def query(self, endpoint: Endpoint, key: str, workspace: str | None) -> LocalCall:
        return LocalCall(self._is_here)

    def _is_here(self, until: float) -> bool:
        self.preflight()
        return True

    def _draw(self, payload: dict[str, Any], until: float) -> Generated:
        """Make one picture, once those before it are made; gives up between two steps when its time is over."""
        if not self._lock.acquire(timeout=max(0.0, until - time.monotonic())):
            raise Failure("too_slow", "another picture was being made all the time")
        try:
            self.prepare()
            assert self._found is not None
            return draw(self._pipeline, payload, until, *self._found)
        finally:
            self._lock.release()


# What must be here


def check_packages() -> None:
    """Raises missing_package where one is not installed, or not in a release that will do."""
    absent = [REQUIREMENTS[name] for name in REQUIREMENTS if importlib.util.find_spec(name) is None]
    if absent:
        raise packages_failure(f"missing Python package: {', '.join(absent)}")
    requirements = importlib.import_module("packaging.requirements")
    unfit = []
    for name, text in REQUIREMENTS.items():
        version = importlib.metadata.version(name)
        if not requirements.Requirement(text).specifier.contains(version, prereleases=True):
            unfit.append(f"{name} {version}, needed is {text}")
    if unfit:
        raise packages_failure(f"unfit Python package: {'; '.join(unfit)}")


def packages_failure(message: str) -> Failure:
    every = [*contract.REQUIREMENTS.values(), *REQUIREMENTS.values()]
    hint = (
        f"make an environment: python3 -m venv .venv && .venv/bin/pip install {command_line(every)} (then call "
        ".venv/bin/python; torch from PyPI is built for CUDA on Linux, pytorch.org has the other builds)"
    )
    return Failure("missing_package", message, hint=hint)


def find_weights(name: str) -> Weights:
    """The model of that name, a folder or in the hub's cache.

    Raises:
        Failure: missing_weights, naming what is missing.
    """
    folder, is_cached = Path(name), False
    if not folder.is_dir():
        cached = cached_folder(name) if re.fullmatch(HUB_NAME, name) else None
        if cached is None:
            where = "neither a folder nor in the hub's cache" if re.fullmatch(HUB_NAME, name) else "no such folder"
            raise weights_failure(name, f"{where}: {name}")
        folder, is_cached = cached, True
    faults = [f"{file} is missing" for file in missing_files(folder)] or damaged_files(folder) or strange_parts(folder)
    values: dict[str, int] = {}
    for part, component in COMPONENTS.items() if not faults else ():
        for path in weight_files(folder / part, component.weights):
            try:
                values[part] = values.get(part, 0) + values_in(path)
            except FileNotFoundError:
                faults.append(f"{part}/{path.name} is missing")
            except (OSError, ValueError) as error:
                reason = os_reason(error) if isinstance(error, OSError) else error
                faults.append(f"{part}/{path.name} is damaged: {reason}")
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise weights_failure(name, f"the model in {folder} is not complete: {', '.join(faults[:5])}{more}")
    return Weights(folder, folder.name if is_cached else None, values)


def weights_failure(name: str, message: str) -> Failure:
    if re.fullmatch(HUB_NAME, name) and not os.path.isdir(name):
        fetch = f"fetch it: hf download {name}" + (f" ({DOWNLOAD})" if name == MODEL else "")
    else:
        fetch = f"fetch it: hf download {MODEL} --local-dir {quoted(name) or name} ({DOWNLOAD})"
    return Failure("missing_weights", message, hint=f"{fetch}; or name the folder that holds it with --model-path")


def cached_folder(name: str) -> Path | None:
    """The folder of a model in the hub's cache, whole or not; None where there is none."""
    patterns = ["model_index.json", *(f"{part}/*" for part in COMPONENTS)]
    hub = library("huggingface_hub")
    try:
        found = hub.snapshot_download(name, local_files_only=True, allow_patterns=patterns)
    except Exception as error:  # of a class that differs from release to release
        found = getattr(error, "snapshot_path", None)
    return Path(found) if found else None


def missing_files(folder: Path) -> list[str]:
    """The files without which the model cannot be loaded, weights aside where an index names them."""
    missing = [file for file in SMALL_FILES if not (folder / file).is_file()]
    if not any(all((folder / "tokenizer" / file).is_file() for file in files) for files in TOKENIZER_FILES):
        missing.append(f"tokenizer/{TOKENIZER_FILES[0][0]}")
    for part, component in COMPONENTS.items():
        whole = f"{part}/{component.weights}.safetensors"
        if component.weights and not any((folder / name).is_file() for name in (whole, f"{whole}.index.json")):
            missing.append(whole)
    return missing


def damaged_files(folder: Path) -> list[str]:
    """What of the small files is not whole JSON."""
    tokenizers = [f"tokenizer/{name}" for files in TOKENIZER_FILES for name in files if name.endswith(".json")]
    faults = []
    for name in (*SMALL_FILES, *tokenizers):
        try:
            json.loads((folder / name).read_bytes())
        except FileNotFoundError:
            continue  # there may be another in its place
        except (OSError, ValueError, RecursionError):
            faults.append(f"{name} is damaged")
    return faults


def strange_parts(folder: Path) -> list[str]:
    """What in model_index.json is not this pipeline's: a model may name classes of any package, and they are loaded."""
    try:
        index = json.loads((folder / "model_index.json").read_bytes())
    except (OSError, ValueError):
        return ["model_index.json is damaged"]
    if not isinstance(index, dict) or index.get("_class_name") != PIPELINE:
        return [f"model_index.json is not that of a {PIPELINE}"]
    strange = [part for part in COMPONENTS if at(index, part, 0) not in ("diffusers", "transformers")]
    return [f"model_index.json names no known {', '.join(strange)}"] if strange else []


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The files that hold a component's weights, as its index names them where there are several; none without stem."""
    if not stem:
        return []
    index = folder / f"{stem}.safetensors.index.json"
    whole = folder / f"{stem}.safetensors"
    if not index.is_file():
        return [whole]
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        return [folder / os.path.basename(name) for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [index]  # which then is found to be no file of weights


def values_in(path: Path) -> int:
    """How many numbers a safetensors file holds, by its header, which also tells how long the file must be.

    Raises:
        OSError; ValueError where the file is damaged.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else MAX_HEADER + 1
        if length > min(size, MAX_HEADER):
            raise ValueError("it is cut off, or no safetensors file")
        header = json.loads(file.read(length))
    try:
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        end = 8 + length + max(entry["data_offsets"][1] for entry in tensors)
        values = sum(int(math.prod(entry["shape"])) for entry in tensors)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError("its header is damaged") from None
    if size != end:
        raise ValueError(f"it has {size} of {end} bytes")
    return values


# Where it can run


def library(name: str) -> Any:
    """A package, loaded now, quiet and off the network.

    Raises:
        Failure: missing_package where it is installed and broken.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is loaded; a model that is here needs no network
    # Threads that wait asleep. Measured on a busy machine: those that spin instead draw 20 to 70 times as slowly.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with quiet():
            return importlib.import_module(name)
    except Exception as error:  # a broken installation shows as ImportError, OSError, RuntimeError or AttributeError
        raise packages_failure(f"{name} cannot be loaded: {outside_text(error, 300)}") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def choose_place(weights: Weights, wanted: str | None) -> Place:
    """The best way to run a model here.

    Raises:
        Failure: usage where the wanted device is not there; too_little_memory.
    """
    torch = library("torch")
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = wanted or next(name for name in DEVICES if has[name])
    if not has[device]:
        there = ", ".join(name for name in DEVICES if has[name])
        raise Failure("usage", f"--device: {device} cannot be used with torch {torch.__version__} here, only {there}")
    whole, largest = sum(weights.values.values()), max(weights.values.values())
    on_device, on_machine = free_memory(device), free_memory("cpu")
    dtypes = fit_dtypes(device)
    for dtype in dtypes:
        if whole * BYTES[dtype] + WORKING_MEMORY <= on_device:
            return Place(device, dtype)
        is_roomy = largest * BYTES[dtype] + WORKING_MEMORY <= on_device and whole * BYTES[dtype] <= on_machine
        if device == "cuda" and is_roomy:
            return Place(device, dtype, offload=True)
    width = BYTES[dtypes[-1]]
    parts = f", or {gb(largest * width + WORKING_MEMORY)} there and {gb(whole * width)} in the machine"
    free = f"; free are {gb(on_device)}" + (f", and {gb(on_machine)} in the machine" if device == "cuda" else "")
    raise Failure(
        "too_little_memory",
        f"the model needs {gb(whole * width + WORKING_MEMORY)} on {device}{parts if device == 'cuda' else ''}{free}",
        hint="end what else uses that memory, choose another --device, or use another --provider",
    )


def gb(size: float) -> str:
    return f"{size / GB:.1f} GB"


def free_memory(device: str) -> float:
    """Bytes that a model may take on a device; on the CPU, of the machine's memory."""
    available = float(importlib.import_module("psutil").virtual_memory().available)
    torch = library("torch")
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    if device == "mps":  # one memory for both
        return min(available, float(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()))
    return available


def fit_dtypes(device: str) -> tuple[str, ...]:
    """The number formats that a device takes, the best first.

    Measured on a CPU with bfloat16 instructions, one layer of the transformer: bfloat16 4 times as fast as float32;
    with them switched off, 3 times as slow, but it takes half the memory.
    """
    torch = library("torch")
    if device == "cuda":
        return ("bfloat16",) if torch.cuda.is_bf16_supported() else ("float32",)
    if device == "mps":
        return ("bfloat16",) if torch.backends.mps.is_macos_or_newer(14, 0) else ("float32",)
    try:
        is_fast = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a build without oneDNN
        is_fast = False
    return ("bfloat16",) if is_fast else ("float32", "bfloat16")


# Loading and drawing


def load(weights: Weights, place: Place) -> Any:
    """The pipeline, ready to draw.

    Raises:
        Failure: missing_package, too_little_memory, task_failed.
    """
    torch, diffusers = library("torch"), library("diffusers")
    for package in ("diffusers", "transformers"):
        logging = library(f"{package}.utils.logging")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    # Straight to the card: the machine may have less memory than the card has.
    options = {"device_map": place.device} if place.device == "cuda" and not place.offload else {}

    def work() -> Any:
        pipeline = getattr(diffusers, PIPELINE).from_pretrained(
            str(weights.folder),
            torch_dtype=getattr(torch, place.dtype),
            use_safetensors=True,
            local_files_only=True,
            **options,
        )
        pipeline.set_progress_bar_config(disable=True)
        for part, held in weights.values.items():
            needed = sum(parameter.numel() for parameter in getattr(pipeline, part).parameters())
            if held < needed:  # what a library does not find, it makes up
                text = f"the model in {weights.folder} is not complete: {part} holds {held} of {needed} numbers"
                raise weights_failure(str(weights.folder), text)
        if place.offload:
            pipeline.enable_model_cpu_offload(device=place.device)
        elif not options:
            pipeline.to(place.device)
        return pipeline

    return guarded(work, "the model cannot be loaded")


def draw(pipeline: Any, payload: Mapping[str, Any], until: float, weights: Weights, place: Place) -> Generated:
    """One picture, and what it took.

    Raises:
        Failure: too_slow, too_little_memory, task_failed.
    """
    import PIL.Image

    torch, diffusers = library("torch"), library("diffusers")
    steps = payload["num_inference_steps"]
    done = 0

    def after_step(_pipeline: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal done
        done = index + 1
        if done < steps and time.monotonic() > until:
            raise Failure("too_slow", f"{done} of {steps} steps were done in time")
        return tensors

    def work() -> Any:
        return pipeline(
            prompt=payload["prompt"],
            width=payload["width"],
            height=payload["height"],
            num_inference_steps=steps,
            # What releases of mid 2026 and later take on their own. Earlier ones add a step that changes nothing.
            sigmas=[1 - step / steps for step in range(steps)],
            guidance_scale=payload["guidance_scale"],
            max_sequence_length=payload["max_sequence_length"],
            generator=torch.Generator("cpu").manual_seed(payload["seed"]),  # the same noise whatever the device
            callback_on_step_end=after_step,
            output_type="np",
        ).images[0]

    start = time.monotonic()
    try:
        values = guarded(work, "the picture cannot be made")
    except Failure:
        pipeline.maybe_free_model_hooks()
        free_unused(torch, place.device)
        raise
    seconds = time.monotonic() - start
    if not bool((values == values).all()):
        raise Failure("task_failed", "the model computed values that are not numbers", retryable=False, hint=REPORT)
    picture = io.BytesIO()
    PIL.Image.fromarray((values * 255).round().astype("uint8")).save(picture, "PNG")
    usage = {
        "model": payload["model"],
        "revision": weights.revision,
        "evaluations": done,
        "seconds": round(seconds, 3),
        "device": torch.cuda.get_device_name() if place.device == "cuda" else place.device,
        "dtype": place.dtype,
        "offload": place.offload,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    tokens = tokens_of(pipeline.tokenizer, payload["prompt"])
    cut = f"the prompt has {tokens} tokens, and the model reads {MAX_TOKENS}: its end was left out"
    return Generated(
        content=picture.getvalue(),
        usage={name: value for name, value in usage.items() if value is not None},
        warnings=(cut,) if tokens > MAX_TOKENS else (),
    )


REPORT = "nothing was billed; report this message, or use another --device"


def guarded(work: Callable[[], Any], what: str) -> Any:
    """What work returns; what the libraries raise becomes a Failure that holds on to nothing on the device."""
    try:
        with quiet():
            return work()
    except Failure as error:
        failure = error.with_traceback(None)
    except Exception as error:
        reason = f"{what}: {type(error).__name__}: {outside_text(error, 300)}"
        if "meta tensor" in reason:  # how diffusers says that weights are missing
            failure = Failure("missing_weights", f"{what}: weights are missing ({outside_text(error, 200)})")
        elif isinstance(error, MemoryError) or re.search("out of memory|allocate memory|enough memory", reason):
            failure = Failure("too_little_memory", reason)
        else:
            failure = Failure("task_failed", reason, retryable=False, hint=REPORT)
    raise failure


def free_unused(torch: Any, device: str) -> None:
    """Give the memory of a picture that came to nothing back to the device."""
    if device != "cpu":
        getattr(torch, device).empty_cache()


def tokens_of(tokenizer: Any, prompt: str) -> int:
    """How many tokens the pipeline makes of a prompt: it cuts what is too long, and does not say so."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    return len(tokenizer(text).input_ids)


PROVIDER = Diffusers
