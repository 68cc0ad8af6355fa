"""The model in this process: diffusers' ZImagePipeline on your own GPU or, slowly, on the CPU.

Sources: references/providers.md of this skill. Nothing is downloaded, and no code of a model is run: the weights must
be here, as safetensors or GGUF. torch and diffusers are loaded only when a picture is made.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from zimage import contract
from zimage.calls import Generated, LocalCall
from zimage.endpoint import Endpoint
from zimage.errors import Failure, os_reason
from zimage.model import FILE_PATTERNS, FINE_LAYERS, MODEL, PIPELINE, Model, find_model, weights_failure
from zimage.outside import outside_text
from zimage.placement import DEVICES, OFFLOADS, Place, Quantizer, choose_place, conflicts, what_spares
from zimage.provider import OpenModel
from zimage.quoting import command_line
from zimage.request import ImageRequest
from zimage.settings import GUIDANCE, STEPS, Setting, is_on, number, one_of
from zimage.together import Together
from zimage.weights import gguf_in, named_file, safetensors_in, said_of, sha256_of

# The same bounds stand in requirements-local.txt; a test compares them. What else is imported comes with these.
REQUIREMENTS = {
    "torch": "torch>=2.6,<3",
    "diffusers": "diffusers>=0.36,<1",
    "transformers": "transformers>=4.57,<6",
    "accelerate": "accelerate>=1.0,<2",
}
# Of the options that need one more. bitsandbytes stands there as a remark: without a GPU it is of no use.
MORE_REQUIREMENTS = {
    "lora": {"peft": "peft>=0.17,<1"},
    "gguf": {"gguf": "gguf>=0.17.1,<1"},
}
MAX_TOKENS = 512  # of a prompt; the pipeline's own default
MOST_AT_ONCE = 64


# Quantization ---------------------------------------------------------------------------------------------------------


def torchao_configs(kind: str, **options: Any) -> dict[str, Any]:
    config = getattr(library("torchao.quantization"), kind)(**options)
    return {
        "transformer": library("diffusers").TorchAoConfig(config, modules_to_not_convert=list(FINE_LAYERS)),
        "text_encoder": library("transformers").TorchAoConfig(config),
    }


def int8_configs(dtype: str) -> dict[str, Any]:
    return torchao_configs("Int8WeightOnlyConfig", version=2)


def fp8_configs(dtype: str) -> dict[str, Any]:
    each_row = library("torchao.quantization").PerRow()
    return torchao_configs("Float8DynamicActivationFloat8WeightConfig", granularity=each_row)


def nf4_configs(dtype: str) -> dict[str, Any]:
    options = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",  # the default is fp4, computed in float32
        "bnb_4bit_compute_dtype": getattr(library("torch"), dtype),
    }
    return {
        "transformer": library("diffusers").BitsAndBytesConfig(**options, llm_int8_skip_modules=list(FINE_LAYERS)),
        "text_encoder": library("transformers").BitsAndBytesConfig(**options),
    }


TORCHAO = {"torchao": "torchao>=0.15,<1"}
# Those of diffusers that are kept up, under a licence that lets everybody use them: quanto is given up, SDNQ is GPL.
QUANTIZERS = {
    "int8": Quantizer(TORCHAO, ("cuda", "mps", "cpu"), 1.01, int8_configs),
    "fp8": Quantizer(TORCHAO, ("cuda",), 1.01, fp8_configs, capability=(8, 9)),  # also computes in it: faster
    "nf4": Quantizer({"bitsandbytes": "bitsandbytes>=0.46.1,<1"}, ("cuda",), 0.5625, nf4_configs, loads_on_device=True),
}


# Options --------------------------------------------------------------------------------------------------------------


def model_path(text: str) -> str:
    """A folder as an absolute path, so that evidence means the same folder everywhere; a hub name as it is."""
    if not text.strip() or not text.isprintable():
        raise ValueError(f"a folder, or a hub name such as {MODEL}")
    path = os.path.expanduser(text)
    return os.path.abspath(path) if os.path.isdir(path) else text


def lora_files(texts: Sequence[str]) -> list[dict[str, Any]]:
    return [named_file(text, "safetensors", with_weight=True) for text in texts]


def said_loras(files: Any) -> list[str]:
    if not isinstance(files, list):
        raise ValueError("a list of files")
    return [said_of(file) for file in files]


OPTIONS = (
    Setting("model_path", "PATH", "folder that holds the model, or its name in the hub's cache", MODEL, model_path),
    STEPS._replace(help="sampling steps, each one evaluation of the transformer"),
    GUIDANCE,
    Setting("device", "NAME", f"one of {', '.join(DEVICES)} (default the first that is there)", None, one_of(DEVICES)),
    Setting("quantize", "KIND", f"hold the weights coarser: {', '.join(QUANTIZERS)}", None, one_of(QUANTIZERS)),
    Setting(
        "gguf",
        "FILE",
        "take the transformer from this .gguf file",
        None,
        functools.partial(named_file, ending="gguf"),
        said=said_of,
    ),
    Setting(
        "lora",
        "FILE[:WEIGHT]",
        "add this LoRA, a .safetensors file (default weight 1); repeatable",
        None,
        lora_files,
        repeatable=True,
        said=said_loras,
    ),
    Setting(
        "offload",
        "WAY",
        f"keep parts off the card: {', '.join(OFFLOADS)} (default the first that fits)",
        None,
        one_of(OFFLOADS),
        shapes_picture=False,
    ),
    Setting(
        "compile",
        "",
        "compile the transformer: the first picture of each size waits for it, those after it are faster",
        None,
        is_on,
        said=is_on,
        shapes_picture=False,
        alone="--compile pays in a batch only: one picture takes longer with it",
    ),
    Setting(
        "at_once",
        "N",
        "draw up to N pictures of a batch at once, where memory allows (default 1)",
        None,
        number(int, 1, MOST_AT_ONCE, "a whole number"),
        shapes_picture=False,
        alone="--at-once is for a batch: one picture is drawn alone, and may differ a little from one among others",
    ),
)


# The provider ---------------------------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """A picture as the model made it, with what is told of it."""

    values: Any  # height, width and colour, from 0 to 1
    seconds: float  # of all that were drawn at once
    evaluations: int
    tokens: int
    at_once: int


class Diffusers(OpenModel):
    """Loads the pipeline once; draws one picture, or a few at once, and then the next."""

    name = "diffusers"
    roots: ClassVar = {"local": ""}
    default_region = "local"
    in_process = True
    long_prompt = sys.maxsize  # what is too long is known in tokens, and said when the picture is made
    own_settings = OPTIONS

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(settings)
        at_once = self.settings["at_once"] or 1
        self.calls_at_once = 1 if at_once == 1 else 2 * at_once  # as many wait as are drawn
        self._lock = threading.RLock()  # of the model
        self._together = Together(self._draw_at_once, self._lock)
        self._hashes: dict[str, str] = {}
        self._found: tuple[Model, Place] | None = None
        self._pipeline: Any = None

    # What is asked for

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

    def cannot(self, request: ImageRequest) -> list[str]:
        return super().cannot(request) + conflicts(self.settings, QUANTIZERS)

    @property
    def known_settings(self) -> dict[str, Any]:
        """Of files also the hash, once it is known."""

        def known(file: dict[str, Any]) -> dict[str, Any]:
            return file | ({"sha256": self._hashes[file["file"]]} if file["file"] in self._hashes else {})

        settings = super().known_settings
        files = {name: settings[name] for name in ("gguf", "lora") if name in settings}
        return settings | {
            name: [known(one) for one in file] if isinstance(file, list) else known(file)
            for name, file in files.items()
        }

    @property
    def shaping_settings(self) -> dict[str, Any]:
        """A file is another one where it holds something else, wherever it lies."""
        with contextlib.suppress(OSError, ValueError):  # `preflight` tells what is wrong with it
            for file in self._files:
                self._hash(file)

        def content(file: dict[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in file.items() if name != "file" or "sha256" not in file}

        shaping = super().shaping_settings
        if "gguf" in shaping:
            shaping["gguf"] = content(shaping["gguf"])
        if "lora" in shaping:
            shaping["lora"] = [content(file) for file in shaping["lora"]]
        return shaping

    # What must be here

    @property
    def _files(self) -> list[dict[str, Any]]:
        gguf, loras = self.settings["gguf"], self.settings["lora"]
        return [*([gguf] if gguf else []), *(loras or [])]

    def _hash(self, file: Mapping[str, Any]) -> str:
        path = file["file"]
        if path not in self._hashes:
            self._hashes[path] = sha256_of(path)
        return self._hashes[path]

    def preflight(self) -> None:
        with self._lock:
            if self._found is not None:
                return
            for file in self._files:
                check_file(file, self._hash)
            check_packages(self.settings)
            without = ("transformer",) if self.settings["gguf"] else ()
            model = find_model(self.settings["model_path"], cached_folder, ("diffusers", "transformers"), without)
            place = choose_place(library("torch"), model, self.settings, QUANTIZERS)
            self._found, self._together.most = (model, place), place.at_once

    def prepare(self) -> None:
        self.preflight()
        with self._lock:
            if self._pipeline is None and self._found is not None:
                self._pipeline = load(*self._found, self.settings)

    def submit(self, payload: dict[str, Any], endpoint: Endpoint, key: str, workspace: str | None) -> LocalCall:
        return LocalCall(functools.partial(self._draw, payload))

    def query(self, endpoint: Endpoint, key: str, workspace: str | None) -> LocalCall:
        return LocalCall(self._is_here)

    def _is_here(self, until: float) -> bool:
        self.preflight()
        return True

    # Drawing

    def _draw(self, payload: dict[str, Any], until: float) -> Generated:
        """Make one picture; it gives up between two steps when its time is over. The PNG is made while others draw."""
        drawn = self._together.picture(payload, until)
        assert self._found is not None
        return generated(payload, drawn, *self._found, self.settings)

    def _draw_at_once(self, payloads: Sequence[Mapping[str, Any]], until: float) -> list[Drawn]:
        self.prepare()
        assert self._found is not None
        return draw(self._pipeline, payloads, until, self._found[1], self.settings)


# What must be here ----------------------------------------------------------------------------------------------------


def check_file(file: Mapping[str, Any], hash_of: Callable[[Mapping[str, Any]], str]) -> None:
    """A file that --gguf or --lora names: whole, of its kind, and, where a record names it, the one it was.

    Raises:
        Failure: missing_weights.
    """
    path, is_lora = file["file"], "weight" in file
    option = "--lora" if is_lora else "--gguf"
    try:
        tensors = (safetensors_in if is_lora else gguf_in)(Path(path))
        if is_lora and not any(LORA_NAME.search(name) for name in tensors):
            raise ValueError("it holds no LoRA")
        if not tensors:
            raise ValueError("it holds no weights")
        now = hash_of(file)
    except FileNotFoundError:
        fault = "is not there"
    except OSError as error:
        fault = f"cannot be read: {os_reason(error)}"
    except ValueError as error:
        fault = f"cannot be used: {error}"
    else:
        then = file.get("sha256", now)
        if now == then:
            return
        fault = f"has changed: its SHA-256 was {then}, and is {now}"
    hint = f"name the right file with {option}; nothing has been loaded"
    raise Failure("missing_weights", f"{option}: {outside_text(path, 300)} {fault}", hint=hint)


LORA_NAME = re.compile(r"[._]lo(ra|kr)[_.]", re.IGNORECASE)


def required(settings: Mapping[str, Any]) -> dict[str, str]:
    """The packages that these settings need: module -> requirement."""
    packages = dict(REQUIREMENTS)
    for option, more in MORE_REQUIREMENTS.items():
        packages |= more if settings[option] else {}
    return packages | dict(QUANTIZERS[settings["quantize"]].packages if settings["quantize"] else {})


def check_packages(settings: Mapping[str, Any]) -> None:
    """Raises missing_package where one is not installed, or not in a release that will do."""
    packages = required(settings)
    absent = [text for name, text in packages.items() if importlib.util.find_spec(name) is None]
    if absent:
        raise packages_failure(f"missing Python package: {', '.join(absent)}", packages)
    requirements = importlib.import_module("packaging.requirements")
    unfit = []
    for name, text in packages.items():
        version = importlib.metadata.version(name)
        if not requirements.Requirement(text).specifier.contains(version, prereleases=True):
            unfit.append(f"{name} {version}, needed is {text}")
    if unfit:
        raise packages_failure(f"unfit Python package: {'; '.join(unfit)}", packages)


def packages_failure(message: str, packages: Mapping[str, str] = REQUIREMENTS) -> Failure:
    every = [*contract.REQUIREMENTS.values(), *packages.values()]
    hint = (
        f"make an environment: python3 -m venv .venv && .venv/bin/pip install {command_line(every)} (then call "
        ".venv/bin/python; torch from PyPI is built for CUDA on Linux, pytorch.org has the other builds)"
    )
    return Failure("missing_package", message, hint=hint)


def cached_folder(name: str) -> Path | None:
    """The folder of a model in the hub's cache, whole or not; None where there is none."""
    hub = library("huggingface_hub")
    try:
        found = hub.snapshot_download(name, local_files_only=True, allow_patterns=list(FILE_PATTERNS))
    except Exception as error:  # of a class that differs from release to release
        found = getattr(error, "snapshot_path", None)
    return Path(found) if found else None


# Where it can run -----------------------------------------------------------------------------------------------------


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
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# Loading and drawing --------------------------------------------------------------------------------------------------


def load(model: Model, place: Place, settings: Mapping[str, Any]) -> Any:
    """The pipeline, ready to draw.

    Raises:
        Failure: missing_package, missing_weights, too_little_memory, task_failed; usage for a LoRA that does not fit.
    """
    torch, diffusers = library("torch"), library("diffusers")
    for package in ("diffusers", "transformers"):
        library(f"{package}.utils.logging").disable_progress_bar()
    dtype, gguf = getattr(torch, place.dtype), settings["gguf"]
    options: dict[str, Any] = {}
    if place.device == "cuda" and place.offload == "none" and not gguf:
        # Straight to the card: the machine may have less memory than the card has.
        options["device_map"] = place.device

    def work() -> Any:
        configs = QUANTIZERS[settings["quantize"]].configs(place.dtype) if settings["quantize"] else {}
        if gguf:
            configs.pop("transformer", None)
            options["transformer"] = diffusers.ZImageTransformer2DModel.from_single_file(
                gguf["file"],
                quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=dtype),
                torch_dtype=dtype,
                config=str(model.folder),
                subfolder="transformer",
                local_files_only=True,
            )
        if configs:
            options["quantization_config"] = diffusers.PipelineQuantizationConfig(quant_mapping=configs)
        pipeline = getattr(diffusers, PIPELINE).from_pretrained(
            str(model.folder),
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            **options,
        )
        pipeline.set_progress_bar_config(disable=True)
        check_whole(pipeline, model, configs)
        add_loras(pipeline, settings["lora"] or ())
        pipeline.vae.enable_slicing()  # a picture is decoded as it would be alone, in the memory of one
        if settings["compile"]:
            # Block by block: they are all alike, so one is compiled in the time of one, and used for all.
            pipeline.transformer.compile_repeated_blocks()
        if "device_map" not in options:
            put(torch, pipeline, place)
        return pipeline

    return guarded(work, "the model cannot be loaded")


def check_whole(pipeline: Any, model: Model, coarse: Collection[str]) -> None:
    """Raise missing_weights where a part has more than its files hold: what a library does not find, it makes up."""
    for part, tensors in model.parts.items():
        parameters = list(getattr(pipeline, part).parameters())
        held, needed = sum(tensor.numbers for tensor in tensors.values()), sum(one.numel() for one in parameters)
        if part in coarse:  # of packed numbers nobody tells how many they are
            held, needed = len(tensors), len(parameters)
        if held < needed:
            what = "layers" if part in coarse else "numbers"
            text = f"the model in {model.folder} is not complete: {part} holds {held} of {needed} {what}"
            raise weights_failure(str(model.folder), text)


def add_loras(pipeline: Any, loras: Sequence[Mapping[str, Any]]) -> None:
    """Add LoRAs to a transformer, each by its weight. Raises usage where one does not fit this model."""
    names = [f"lora_{number}" for number, _ in enumerate(loras)]
    for name, lora in zip(names, loras, strict=True):
        folder, file = os.path.split(lora["file"])
        try:
            pipeline.load_lora_weights(
                folder, weight_name=file, adapter_name=name, use_safetensors=True, local_files_only=True
            )
            fault = "" if name in pipeline.get_list_adapters().get("transformer", ()) else "no layer has its names"
        except (ValueError, KeyError, RuntimeError) as error:
            if OUT_OF_MEMORY.search(str(error)):
                raise
            fault = f"{type(error).__name__}: {outside_text(error, 300)}"
        if fault:
            message = f"--lora: {outside_text(lora['file'], 300)} does not fit this model: {fault}"
            hint = "take a LoRA for Z-Image; some need a newer diffusers (pip install --upgrade diffusers)"
            raise Failure("usage", message, hint=hint)
    if names:
        pipeline.set_adapters(names, [lora["weight"] for lora in loras])


def put(torch: Any, pipeline: Any, place: Place) -> None:
    """Have a pipeline that is in the machine's memory run on its device."""
    device, has_streams = place.device, place.device == "cuda"
    ways: dict[str, Callable[[], Any]] = {
        "none": lambda: pipeline.to(device),
        "model": lambda: pipeline.enable_model_cpu_offload(device=device),
        "group": lambda: pipeline.enable_group_offload(
            onload_device=torch.device(device), offload_type="leaf_level", use_stream=has_streams
        ),
    }
    ways[place.offload]()


def draw(
    pipeline: Any, payloads: Sequence[Mapping[str, Any]], until: float, place: Place, settings: Mapping[str, Any]
) -> list[Drawn]:
    """Pictures of one form, drawn at once, each from its own seed.

    Raises:
        Failure: too_slow, too_little_memory, task_failed.
    """
    torch, first = library("torch"), payloads[0]
    steps = first["num_inference_steps"]
    done = 0

    def after_step(_pipeline: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal done
        done = index + 1
        if done < steps and time.monotonic() > until:
            raise Failure("too_slow", f"{done} of {steps} steps were done in time")
        return tensors

    def work() -> Any:
        return pipeline(
            prompt=[payload["prompt"] for payload in payloads],
            width=first["width"],
            height=first["height"],
            num_inference_steps=steps,
            # What releases of mid 2026 and later take on their own. Earlier ones add a step that changes nothing.
            sigmas=[1 - step / steps for step in range(steps)],
            guidance_scale=first["guidance_scale"],
            max_sequence_length=first["max_sequence_length"],
            # The same noise whatever the device, and whatever is drawn beside it.
            generator=[torch.Generator("cpu").manual_seed(payload["seed"]) for payload in payloads],
            callback_on_step_end=after_step,
            output_type="np",
        ).images

    start = time.monotonic()
    try:
        images = guarded(work, "the picture cannot be made")
    except Failure as failure:
        pipeline.maybe_free_model_hooks()
        free_unused(torch, place.device)
        if failure.code == "too_little_memory":
            raise failure.but(hint=what_spares(place, settings, QUANTIZERS)) from None
        raise
    seconds = time.monotonic() - start
    tokens = [tokens_of(pipeline.tokenizer, payload["prompt"]) for payload in payloads]
    return [Drawn(values, seconds, done, count, len(payloads)) for values, count in zip(images, tokens, strict=True)]


def generated(
    payload: Mapping[str, Any], drawn: Drawn, model: Model, place: Place, settings: Mapping[str, Any]
) -> Generated:
    """What was drawn as a PNG, with what it took.

    Raises:
        Failure: task_failed.
    """
    import PIL.Image

    torch, diffusers, values = library("torch"), library("diffusers"), drawn.values
    if not bool((values == values).all()):
        raise Failure("task_failed", "the model computed values that are not numbers", retryable=False, hint=REPORT)
    picture = io.BytesIO()
    PIL.Image.fromarray((values * 255).round().astype("uint8")).save(picture, "PNG")
    usage = {
        "model": payload["model"],
        "revision": model.revision,
        "evaluations": drawn.evaluations,
        "seconds": round(drawn.seconds, 3),
        "at_once": drawn.at_once,
        "device": torch.cuda.get_device_name() if place.device == "cuda" else place.device,
        "dtype": place.dtype,
        "offload": place.offload,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    notes = []
    if drawn.tokens > MAX_TOKENS:
        notes.append(f"the prompt has {drawn.tokens} tokens, and the model reads {MAX_TOKENS}: its end was left out")
    if drawn.at_once > 1 and (settings["compile"] or (place.device, place.dtype) not in SAME_AT_ONCE):
        notes.append(f"drawn with {drawn.at_once - 1} more at once: drawn alone it may differ in fine detail")
    if (wanted := settings["at_once"] or 1) > place.at_once:
        notes.append(f"--at-once {wanted}: memory allows {place.at_once}")
    return Generated(
        content=picture.getvalue(),
        usage={name: value for name, value in usage.items() if value is not None},
        warnings=tuple(notes),
    )


# Where pictures drawn at once have been seen to be, byte for byte, those drawn alone, as long as nothing is compiled.
# On an H200 they were not; on Apple's GPUs nobody has looked.
SAME_AT_ONCE = (("cpu", "bfloat16"),)
REPORT = "nothing was billed; report this message, or use another --device"
OUT_OF_MEMORY = re.compile("out of memory|allocate memory|enough memory")


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
        elif isinstance(error, MemoryError) or OUT_OF_MEMORY.search(reason):
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
