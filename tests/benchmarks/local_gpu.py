"""How long a picture takes on this machine's GPU, with the real model's architecture and random weights.

    python tests/benchmarks/local_gpu.py             # full size, on a card with 24 GB or more
    python tests/benchmarks/local_gpu.py --tiny      # the same code with a tiny model on the CPU, in seconds

Needs requirements-local.txt, and no network and no weights: what numbers a layer holds does not change how long it
takes. The pictures are noise. Draws through the provider, so what is measured is what its users get. Prints JSON.
The model's authors publish "under one second" on an H800 for 1024*1024 in 8 evaluations, in bfloat16.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "skills/ai/image/alicloud-ai-image-zimage-turbo/scripts"), str(ROOT / "tests")]

import tiny_model
from zimage.registry import provider_class
from zimage.request import ImageRequest

MODULE: dict[str, Any] = provider_class("diffusers").preflight.__globals__
PROMPT = "A red fox in fresh snow at dawn, low sun behind birches, its breath a small cloud, photograph, 85 mm"
PARTS = ("text_encoder", "transformer", "vae")
PUBLISHED_S = 1.0
LONGEST_S = 3600.0  # one picture, compiling included

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


def libraries() -> tuple[Any, Any, Any]:
    """torch, diffusers and transformers, loaded as the provider loads them."""
    load: Callable[[str], Any] = MODULE["library"]
    return load("torch"), load("diffusers"), load("transformers")


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


def full_size(device: str) -> Any:
    """The pipeline with the real model's shapes: 10.3 thousand million numbers, 20.5 GB."""
    torch, diffusers, transformers = libraries()
    torch.manual_seed(tiny_model.SEED)
    with made_on(torch, device):
        transformer = diffusers.ZImageTransformer2DModel(**TRANSFORMER).eval()
        transformer.x_pad_token.fill_(1.0)  # these two are left uninitialized, to be read from a file
        transformer.cap_pad_token.fill_(1.0)
        text_encoder = transformers.Qwen3Model(transformers.Qwen3Config(**TEXT_ENCODER)).eval()
        vae = diffusers.AutoencoderKL(**VAE).eval()
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**tiny_model.SCHEDULER),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tiny_model.tokenizer(),
        transformer=transformer,
    )


class Subject:
    """A pipeline on a device, and the picture that is asked of it."""

    def __init__(self, pipeline: Any, device: str, size: str, steps: int) -> None:
        self.pipeline = pipeline
        self.torch, *_ = libraries()
        self.is_cuda = device == "cuda"
        provider = provider_class("diffusers")({"steps": steps})
        self._payload = provider.payload(ImageRequest(prompt=PROMPT, size=size, seed=1))
        dtype = str(pipeline.transformer.dtype).removeprefix("torch.")
        self._where = MODULE["Weights"](Path(), None, {}), MODULE["Place"](device, dtype)

    def draw(self) -> dict[str, Any]:
        """One picture: seconds of the pipeline, and of everything up to the PNG."""
        self.synchronize()
        start = time.perf_counter()
        made = MODULE["draw"](self.pipeline, self._payload, time.monotonic() + LONGEST_S, *self._where)
        return {**made.usage, "with_png_s": time.perf_counter() - start}

    def measure(self, runs: int, warmup: int) -> dict[str, Any]:
        """Seconds of `runs` pictures, after `warmup` others of which the first shows what starting costs."""
        if self.is_cuda:
            self.torch.cuda.reset_peak_memory_stats()
        first, *_ = [self.draw()["with_png_s"] for _ in range(warmup)]
        drawn = [self.draw() for _ in range(runs)]
        seconds = [usage["seconds"] for usage in drawn]
        median = statistics.median(seconds)
        report = {
            "median_s": median,
            "min_s": min(seconds),
            "max_s": max(seconds),
            "median_with_png_s": round(statistics.median(usage["with_png_s"] for usage in drawn), 3),
            "first_s": round(first, 3),
            "times_published": round(median / PUBLISHED_S, 3),
        }
        if self.is_cuda:
            report["peak_gb"] = round(self.torch.cuda.max_memory_allocated() / 1e9, 2)
        return report

    def parts(self) -> dict[str, float]:
        """Seconds of one picture by part. Each part is waited for, which on a GPU costs a little by itself."""
        spent = dict.fromkeys(PARTS, 0.0)
        with contextlib.ExitStack() as stack:
            for name in ("text_encoder", "transformer"):
                module = getattr(self.pipeline, name)
                stack.enter_context(self.timed(module, "forward", spent, name))
            stack.enter_context(self.timed(self.pipeline.vae, "decode", spent, "vae"))
            spent["pipeline"] = self.draw()["seconds"]
        return {name: round(seconds, 4) for name, seconds in spent.items()}

    @contextlib.contextmanager
    def timed(self, module: Any, method: str, spent: dict[str, float], name: str) -> Iterator[None]:
        """Add the time of every call of a method to what is spent."""
        original: Callable[..., Any] = getattr(module, method)

        def call(*arguments: Any, **named: Any) -> Any:
            self.synchronize()
            start = time.perf_counter()
            result = original(*arguments, **named)
            self.synchronize()
            spent[name] += time.perf_counter() - start
            return result

        setattr(module, method, call)
        try:
            yield
        finally:
            delattr(module, method)  # the class's own is in force again

    def synchronize(self) -> None:
        if self.is_cuda:
            self.torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a picture on this machine's GPU. Prints JSON.")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: does this script work?")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--size", default="1024*1024")
    parser.add_argument("--no-compile", action="store_true", help="measure only without torch.compile")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write the model there too")
    options = parser.parse_args()
    if options.runs < 1 or options.warmup < 1:
        parser.error("--runs and --warmup must be 1 or more")
    torch, diffusers, transformers = libraries()
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    device, size = ("cpu", "512*512") if options.tiny else ("cuda", options.size)
    if device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} has no CUDA here; --tiny runs on the CPU")
    start = time.perf_counter()
    pipeline = tiny_model.pipeline().to(torch.bfloat16) if options.tiny else full_size(device)
    pipeline.set_progress_bar_config(disable=True)
    if options.save:
        pipeline.save_pretrained(options.save)
    subject = Subject(pipeline, device, size, options.steps)
    numbers = sum(part.numel() for name in PARTS for part in getattr(pipeline, name).parameters())
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "dtype": "bfloat16",
        "billions": round(numbers / 1e9, 4),
        "size": size,
        "runs": options.runs,
        "building_s": round(time.perf_counter() - start, 1),
        "evaluations": subject.draw()["evaluations"],
        "published_s": PUBLISHED_S,
        "eager": subject.measure(options.runs, options.warmup),
        "parts_s": subject.parts(),
    }
    if not options.no_compile:
        try:
            # Block by block: they are all alike, so one is compiled in the time of one, and used for all.
            pipeline.transformer.compile_repeated_blocks(fullgraph=True)
            report["compiled"] = subject.measure(options.runs, options.warmup)
        except Exception as error:
            report["compiled"] = {"error": f"{type(error).__name__}: {error}"[:1000]}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
