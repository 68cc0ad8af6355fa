"""Model: the folder that holds the open model's files, whole as far as can be told without loading them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from zimage.errors import Failure, os_reason
from zimage.outside import at
from zimage.quoting import quoted
from zimage.weights import FLOATS, Tensor, Tensors, safetensors_in

MODEL = "Tongyi-MAI/Z-Image-Turbo"
DOWNLOAD = "about 33 GB"  # the transformer is kept in float32
HUB_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
PIPELINE = "ZImagePipeline"


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
FILE_PATTERNS = ("model_index.json", *(f"{part}/*" for part in COMPONENTS))

# Layers that are small, and that a picture suffers from most when their numbers get coarser.
FINE_LAYERS = ("t_embedder", "cap_embedder", "all_x_embedder", "all_final_layer")


class Size(NamedTuple):
    """What a part of a model takes once it is loaded, in bytes: all of it, and the largest of its layers."""

    whole: float
    layer: float


Sizes = Mapping[str, Size]


class Model(NamedTuple):
    """A model on this machine, and what the files of each part hold."""

    folder: Path
    revision: str | None  # of the hub, where it comes from its cache
    parts: Mapping[str, Tensors]

    def sizes(self, width: int, coarse: Mapping[str, float]) -> Sizes:
        """What each part takes once it is loaded.

        `width`: bytes of a number that the libraries convert. Numbers of other kinds stay as the file has them.
        `coarse`: the parts that are quantized as they are loaded, and the bytes that a number then takes.
        """

        def loaded(part: str, name: str, tensor: Tensor) -> float:
            if part in coarse and is_linear(name, tensor):
                return tensor.numbers * coarse[part]
            return float(tensor.numbers * width if tensor.kind in FLOATS else tensor.size)

        sizes = {}
        for part, tensors in self.parts.items():
            each = [loaded(part, name, tensor) for name, tensor in tensors.items()]
            sizes[part] = Size(sum(each), max(each, default=0.0))
        return sizes


def is_linear(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is the weight of a linear layer, by its name and shape: what libraries quantize."""
    is_matrix = len(tensor.shape) == 2 and name.endswith("weight") and tensor.kind in FLOATS
    return is_matrix and "embed" not in name and not any(fine in name for fine in FINE_LAYERS)


def find_model(
    name: str, cached: Callable[[str], Path | None], packages: Collection[str], without: Collection[str] = ()
) -> Model:
    """The model of that name, a folder or in the hub's cache.

    `cached`: the folder of a model in that cache, whole or not. `packages`: those that a model may name classes of.
    `without`: parts whose weights come from elsewhere, and need not be there.

    Raises:
        Failure: missing_weights, naming what is missing.
    """
    folder, is_cached = Path(name), False
    if not folder.is_dir():
        in_cache = cached(name) if re.fullmatch(HUB_NAME, name) else None
        if in_cache is None:
            where = "neither a folder nor in the hub's cache" if re.fullmatch(HUB_NAME, name) else "no such folder"
            raise weights_failure(name, f"{where}: {name}")
        folder, is_cached = in_cache, True
    faults = [f"{file} is missing" for file in missing_files(folder, without)]
    faults = faults or damaged_files(folder) or strange_parts(folder, packages)
    parts: dict[str, dict[str, Tensor]] = {}
    for part, component in COMPONENTS.items() if not faults else ():
        for path in weight_files(folder / part, "" if part in without else component.weights):
            try:
                parts.setdefault(part, {}).update(safetensors_in(path))
            except FileNotFoundError:
                faults.append(f"{part}/{path.name} is missing")
            except (OSError, ValueError) as error:
                reason = os_reason(error) if isinstance(error, OSError) else error
                faults.append(f"{part}/{path.name} is damaged: {reason}")
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise weights_failure(name, f"the model in {folder} is not complete: {', '.join(faults[:5])}{more}")
    return Model(folder, folder.name if is_cached else None, parts)


def weights_failure(name: str, message: str) -> Failure:
    if re.fullmatch(HUB_NAME, name) and not os.path.isdir(name):
        fetch = f"fetch it: hf download {name}" + (f" ({DOWNLOAD})" if name == MODEL else "")
    else:
        fetch = f"fetch it: hf download {MODEL} --local-dir {quoted(name) or name} ({DOWNLOAD})"
    return Failure("missing_weights", message, hint=f"{fetch}; or name the folder that holds it with --model-path")


def missing_files(folder: Path, without: Collection[str] = ()) -> list[str]:
    """The files without which the model cannot be loaded, weights aside where an index names them."""
    missing = [file for file in SMALL_FILES if not (folder / file).is_file()]
    if not any(all((folder / "tokenizer" / file).is_file() for file in files) for files in TOKENIZER_FILES):
        missing.append(f"tokenizer/{TOKENIZER_FILES[0][0]}")
    for part, component in COMPONENTS.items():
        whole = f"{part}/{component.weights}.safetensors"
        is_there = any((folder / name).is_file() for name in (whole, f"{whole}.index.json"))
        if component.weights and part not in without and not is_there:
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


def strange_parts(folder: Path, packages: Collection[str]) -> list[str]:
    """What in model_index.json is not this pipeline's: a model may name classes of any package, and they are loaded."""
    try:
        index = json.loads((folder / "model_index.json").read_bytes())
    except (OSError, ValueError):
        return ["model_index.json is damaged"]
    if not isinstance(index, dict) or index.get("_class_name") != PIPELINE:
        return [f"model_index.json is not that of a {PIPELINE}"]
    strange = [part for part in COMPONENTS if at(index, part, 0) not in packages]
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
