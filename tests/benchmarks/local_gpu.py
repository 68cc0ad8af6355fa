"""How long pictures take on this machine's GPU, with the real model's architecture and random weights.

    python tests/benchmarks/local_gpu.py             # full size, on a card with 24 GB or more
    python tests/benchmarks/local_gpu.py --tiny      # the same code with a tiny model on the CPU, in a minute

Needs requirements-local.txt (nf4: bitsandbytes too), and no network and no weights: what numbers a layer holds does
not change how long it takes. The pictures are noise. The model is written to a folder once, 21 GB, and drawn through
the provider, so what is measured is what its users get. Prints a table; without a GPU it says so and exits 2.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "skills/ai/image/alicloud-ai-image-zimage-turbo/scripts"), str(ROOT / "tests")]

import tiny_model
from zimage.endpoint import Endpoint
from zimage.errors import Failure
from zimage.registry import provider_class
from zimage.request import ImageRequest

KIND: Any = provider_class("diffusers")
library = KIND.preflight.__globals__["library"]
HERE = Endpoint("in-process", "in-process", "", "local")
PROMPT = "A red fox in fresh snow at dawn, low sun behind birches, its breath a small cloud, photograph, 85 mm"
PUBLISHED = "to beat in a batch: 0.906 s a picture on an H100; the authors say under 1 s on an H800"
LONGEST_S = 3600.0  # one picture, compiling included
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "compiled": {"compile": True},
    "int8": {"quantize": "int8"},
    "int8 compiled": {"quantize": "int8", "compile": True},
    "fp8": {"quantize": "fp8"},
    "fp8 compiled": {"quantize": "fp8", "compile": True},
    "nf4": {"quantize": "nf4"},
    "model": {"offload": "model"},
    "group": {"offload": "group"},
    "nf4 model": {"quantize": "nf4", "offload": "model"},
}
COLUMNS = ("", "loading s", "first s", "alone s", "at once s a picture", "same at once", "peak GB alone", "peak GB")

# The configuration files of Tongyi-MAI/Z-Image-Turbo. What is not named is the default of the class.
TRANSFORMER = {
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "cap_feat_dim": 2560,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}
TEXT_ENCODER = {  # Qwen3 4B
    "vocab_size": 151_936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
}
VAE = {  # that of FLUX.1
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


@contextlib.contextmanager
def made_on(torch: Any, device: str) -> Iterator[None]:
    """Weights that are made in here are made on the device, in bfloat16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)


def save_full_size(folder: Path) -> None:
    """Write a pipeline with the real model's shapes: 10.3 thousand million numbers, 20.5 GB."""
    torch, diffusers, transformers = library("torch"), library("diffusers"), library("transformers")
    torch.manual_seed(tiny_model.SEED)
    with made_on(torch, "cuda"):
        transformer = diffusers.ZImageTransformer2DModel(**TRANSFORMER).eval()
        transformer.x_pad_token.fill_(1.0)  # these two are left uninitialized, to be read from a file
        transformer.cap_pad_token.fill_(1.0)
        text_encoder = transformers.Qwen3Model(transformers.Qwen3Config(**TEXT_ENCODER)).eval()
        vae = diffusers.AutoencoderKL(**VAE).eval()
    diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**tiny_model.SCHEDULER),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tiny_model.tokenizer(),
        transformer=transformer,
    ).save_pretrained(folder, safe_serialization=True)


class Made(NamedTuple):
    """A picture up to its PNG."""

    seconds: float
    sha256: str


def make(provider: Any, size: str, seed: int) -> Made:
    start = time.perf_counter()
    payload = provider.payload(ImageRequest(prompt=PROMPT, size=size, seed=seed))
    picture = provider.submit(payload, HERE, "", None).work(time.monotonic() + LONGEST_S)
    return Made(time.perf_counter() - start, hashlib.sha256(picture.content).hexdigest())


def measure(settings: dict[str, Any], options: argparse.Namespace, size: str) -> list[float | str | None]:
    """The cells of one line of the table. Raises Failure where it cannot be run here."""
    torch, is_cuda = library("torch"), not options.tiny

    def peak() -> float | None:
        return torch.cuda.max_memory_allocated() / 1e9 if is_cuda else None

    library("torch._dynamo").reset()
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    provider = KIND({**settings, "at_once": options.at_once})
    provider.prepare()
    loading = time.perf_counter() - start
    first = make(provider, size, 0).seconds
    alone = [make(provider, size, seed) for seed in range(options.runs)]
    peak_alone = peak()
    count = options.at_once * options.runs
    with ThreadPoolExecutor(provider.calls_at_once) as threads:
        for rounds in (options.at_once, count):  # the first of that form may be compiled
            start = time.perf_counter()
            together = list(threads.map(lambda seed: make(provider, size, seed), range(rounds)))
    at_once = (time.perf_counter() - start) / count
    same = sum(one.sha256 == other.sha256 for one, other in zip(alone, together, strict=False))
    seconds = statistics.median(made.seconds for made in alone)
    return [loading, first, seconds, at_once, f"{same} of {len(alone)}", peak_alone, peak()]


def said(cell: float | str | None) -> str:
    return "-" if cell is None else cell if isinstance(cell, str) else f"{cell:.3f}"


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure pictures on this machine's GPU. Prints a table.")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: does this script work?")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--size", default="1024*1024")
    parser.add_argument("--only", metavar="NAME", action="append", choices=VARIANTS, help="one line; repeatable")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a model that is there, or where to write one")
    options = parser.parse_args()
    torch = library("torch")
    if not options.tiny and not torch.cuda.is_available():
        parser.error(f"there is no GPU that torch {torch.__version__} can use here; --tiny runs on the CPU")
    size = "512*512" if options.tiny else options.size
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or Path(scratch) / "model"
        if not folder.exists():
            (tiny_model.save if options.tiny else save_full_size)(folder)
            gc.collect()
        device = "cpu" if options.tiny else torch.cuda.get_device_name()
        print(f"{device}, torch {torch.__version__}, {size}, {options.steps} evaluations, {options.at_once} at once\n")
        print(line(list(COLUMNS)), line(["---"] * len(COLUMNS)), sep="\n")
        for name in options.only or VARIANTS:
            settings = {"model_path": str(folder), "steps": options.steps, **VARIANTS[name]}
            try:
                cells = [said(cell) for cell in measure(settings, options, size)]
            except Failure as failure:
                cells = [f"{failure.code}: {failure.message}"]
            print(line([name, *cells]), flush=True)
            gc.collect()
    print(f"\n{PUBLISHED}")


if __name__ == "__main__":
    main()
