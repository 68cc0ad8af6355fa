"""Placement: where on this machine a model fits, and by which way of keeping it there.

All sizes are bytes. `torch` is the package, handed in by whoever loads it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from zimage.errors import Failure
from zimage.model import Model, Size, Sizes
from zimage.quoting import command_line
from zimage.weights import gguf_in, safetensors_in

GB = 1e9
# Measured on an H200 for 1024*1024 in bfloat16, where the last step, the VAE, takes most: 2.7 GB beside a whole model,
# and 0.05 to 0.12 GB for each further picture at once, of which the VAE takes one after the other.
WORKING = 2.7 * GB
WORKING_MORE = 0.2 * GB
BYTES = {"bfloat16": 2, "float32": 4}  # float16 is no choice: this model overflows in it (Tongyi-MAI/Z-Image#14)
DEVICES = ("cuda", "mps", "cpu")  # the best first


class Quantizer(NamedTuple):
    """A way to hold the linear layers of text encoder and transformer in coarser numbers."""

    packages: Mapping[str, str]  # module -> requirement
    devices: tuple[str, ...]
    bytes_each: float  # a number, with its share of the scales
    configs: Callable[[str], dict[str, Any]]  # of a dtype to compute in: part -> what the libraries are given
    capability: tuple[int, int] = (0, 0)  # the least that CUDA must tell of a card
    loads_on_device: bool = False  # every part is on the device while it is loaded, whatever is moved later

    def is_for(self, torch: Any, device: str) -> bool:
        """Whether this device can use it, as far as a card decides."""
        if device not in self.devices:
            return False
        return device != "cuda" or tuple(torch.cuda.get_device_capability()) >= self.capability


class Place(NamedTuple):
    """Where and how a model runs."""

    device: str
    dtype: str
    offload: str = "none"
    at_once: int = 1


class Need(NamedTuple):
    """What must be free on the device, pictures aside, and in the machine's own memory."""

    device: float
    machine: float = 0.0

    def told(self, device: str) -> str:
        machine = f" and {gb(self.machine)} in the machine" if self.machine else ""
        return f"{gb(self.device + WORKING)} on {device}{machine}"


class Free(NamedTuple):
    """What is free on the device and in the machine; the same memory where the device has none of its own."""

    device: float
    machine: float

    def fitting(self, needs: Mapping[str, Need]) -> str | None:
        """The first of these ways that fits; None where none does."""
        ways = (way for way, need in needs.items() if need.device + WORKING <= self.device)
        return next((way for way in ways if needs[way].machine <= self.machine), None)

    def pictures(self, need: Need, most: int) -> int:
        """How many can be drawn at once, of `most` that are wanted; one at the least."""
        return max(1, min(most, 1 + int((self.device - need.device - WORKING) // WORKING_MORE)))


def gb(size: float) -> str:
    return f"{size / GB:.1f} GB"


def _whole(sizes: Sizes) -> float:
    return sum(size.whole for size in sizes.values())


def _largest(sizes: Sizes) -> float:
    return max(size.whole for size in sizes.values())


def _layer(sizes: Sizes) -> float:
    return max(size.layer for size in sizes.values())


# What of a model is on the device while it draws, the quickest way first. The rest waits in the machine.
OFFLOADS: dict[str, Callable[[Sizes], Need]] = {
    "none": lambda sizes: Need(_whole(sizes)),
    "model": lambda sizes: Need(_largest(sizes), _whole(sizes)),  # text encoder, transformer, VAE: one at a time
    "group": lambda sizes: Need(2 * _layer(sizes), _whole(sizes)),  # a layer, and the next comes meanwhile
}

Quantizers = Mapping[str, Quantizer]
Settings = Mapping[str, Any]


def conflicts(settings: Settings, quantizers: Quantizers) -> list[str]:
    """Which options do not go together: sentences that begin with the name of one."""
    quantize, offload, device = settings["quantize"], settings["offload"], settings["device"]
    sentences = []
    if quantize and device and device not in quantizers[quantize].devices:
        there = [name for name, quantizer in quantizers.items() if device in quantizer.devices]
        sentences.append(f"quantize: {quantize} does not run on {device}, only {', '.join(there)}")
    if offload == "group":  # layers of plain numbers, moved one by one, cannot be compiled
        others = [f"--{name}" for name in ("quantize", "gguf", "compile") if settings[name]]
        sentences += [f"offload: {offload} does not go with {other}; use none or model" for other in others]
    if settings["compile"] and quantize and device not in (None, "cuda"):  # torch 2.13 ends the process on a CPU then
        sentences.append(f"compile: it does not go with --quantize on {device}; leave one of them out")
    if offload not in (None, "none") and device not in (None, "cuda"):
        sentences.append(f"offload: {offload} is for cuda; {device} has no memory of its own")
    return sentences


def choose_place(torch: Any, model: Model, settings: Settings, quantizers: Quantizers) -> Place:
    """The best way to run a model here.

    Raises:
        Failure: usage where what is wanted is not there; too_little_memory, naming what would fit.
    """
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = settings["device"] or next(name for name in DEVICES if has[name])
    if not has[device]:
        there = ", ".join(name for name in DEVICES if has[name])
        raise Failure("usage", f"--device: {device} cannot be used with torch {torch.__version__} here, only {there}")
    settings = {**settings, "device": device}
    if sentences := conflicts(settings, quantizers):
        raise Failure("usage", "; ".join(f"--{sentence}" for sentence in sentences))
    kind = settings["quantize"]
    if kind and not quantizers[kind].is_for(torch, device):
        least = ".".join(str(part) for part in quantizers[kind].capability)
        raise Failure("usage", f"--quantize: {kind} needs a card of compute capability {least} or newer")
    free = Free(free_memory(torch, device), free_memory(torch, "cpu"))
    for dtype in dtypes_for(torch, device):
        needs = needs_of(model, dtype, settings, quantizers)
        if way := free.fitting(needs):
            return Place(device, dtype, way, free.pictures(needs[way], settings["at_once"] or 1))
    ways = ", or ".join(need.told(device) for need in needs.values())
    machine = f", and {gb(free.machine)} in the machine" if device == "cuda" else ""
    message = f"the model needs {ways}; free are {gb(free.device)}{machine}"
    usable = {name: one for name, one in quantizers.items() if one.is_for(torch, device)}
    raise Failure("too_little_memory", message, hint=what_fits(model, dtype, settings, usable, free))


def needs_of(model: Model, dtype: str, settings: Settings, quantizers: Quantizers) -> dict[str, Need]:
    """What each way of keeping the model on its device needs, of those that the settings leave."""
    sizes = sizes_of(model, dtype, settings, quantizers)
    needs = {}
    for way, need_of in OFFLOADS.items():
        if settings["offload"] not in (None, way) or conflicts({**settings, "offload": way}, quantizers):
            continue
        need = need_of(sizes)
        if settings["quantize"] and quantizers[settings["quantize"]].loads_on_device:
            need = need._replace(device=max(need.device, _whole(sizes) - WORKING))
        if settings["gguf"] and settings["device"] == "cuda":  # it passes through the machine
            need = need._replace(machine=_whole(sizes))
        needs[way] = need
    return needs


def sizes_of(model: Model, dtype: str, settings: Settings, quantizers: Quantizers) -> Sizes:
    """What each part takes once it is loaded, by what its files hold and as what that is loaded."""
    width, kind = BYTES[dtype], settings["quantize"]
    coarse = dict.fromkeys(("transformer", "text_encoder"), quantizers[kind].bytes_each) if kind else {}
    parts = dict(model.parts)
    if settings["gguf"]:
        parts["transformer"] = gguf_in(Path(settings["gguf"]["file"]))
        coarse.pop("transformer", None)
    sizes = model._replace(parts=parts).sizes(width, coarse)
    loras = [safetensors_in(Path(file["file"])) for file in settings["lora"] or ()]
    added = sum(tensor.numbers * width for tensors in loras for tensor in tensors.values())
    transformer = sizes["transformer"]
    return {**sizes, "transformer": Size(transformer.whole + added, transformer.layer)}


LEAST_HINT = "end what else uses that memory, choose another --device, or use another --provider"
GGUF_HINT = "take a smaller transformer with --gguf FILE (Q4 is about 4 GB), or "


def what_fits(model: Model, dtype: str, settings: Settings, quantizers: Quantizers, free: Free) -> str:
    """The options with which a model would fit that does not as it is asked for."""
    for kind in dict.fromkeys((settings["quantize"], *quantizers)):
        changed = {**settings, "quantize": kind, "offload": None}
        needs = needs_of(model, dtype, changed, quantizers)
        if way := free.fitting(needs):
            wanted = {"quantize": kind, "offload": way}
            options = [f"--{name} {value}" for name, value in wanted.items() if value not in (settings[name], "none")]
            packages = quantizers[kind].packages if kind else {}
            absent = [text for name, text in packages.items() if importlib.util.find_spec(name) is None]
            install = f" (first: pip install {command_line(absent)})" if absent else ""
            said = " ".join(options) or "no --offload"
            return f"use {said}{install}: that needs {needs[way].told(settings['device'])}"
    return LEAST_HINT if settings["gguf"] else GGUF_HINT + LEAST_HINT


def what_spares(place: Place, settings: Settings, quantizers: Quantizers) -> str:
    """What takes less memory than a picture that could not be made."""
    ways = list(OFFLOADS) if place.device == "cuda" else []
    spared = [f"--offload {way}" for way in ways[ways.index(place.offload) + 1 :][:1]] if ways else []
    kinds = [name for name, quantizer in quantizers.items() if place.device in quantizer.devices]
    spared += [f"--quantize {kind}" for kind in kinds[:1] if not settings["quantize"]]
    return f"use {', or '.join(['a smaller --size', *spared])}"


def free_memory(torch: Any, device: str) -> float:
    """Bytes that a model may take on a device; on the CPU, of the machine's memory."""
    available = float(importlib.import_module("psutil").virtual_memory().available)
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    if device == "mps":  # one memory for both
        return min(available, float(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()))
    return available


def dtypes_for(torch: Any, device: str) -> tuple[str, ...]:
    """The number formats that a device takes, the best first.

    Measured on a CPU with bfloat16 instructions, one layer of the transformer: bfloat16 4 times as fast as float32;
    with them switched off, 3 times as slow, but it takes half the memory.
    """
    if device == "cuda":
        return ("bfloat16",) if torch.cuda.is_bf16_supported() else ("float32",)
    if device == "mps":
        return ("bfloat16",) if torch.backends.mps.is_macos_or_newer(14, 0) else ("float32",)
    try:
        is_fast = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a build without oneDNN
        is_fast = False
    return ("bfloat16",) if is_fast else ("float32", "bfloat16")
