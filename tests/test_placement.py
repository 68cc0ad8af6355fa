"""Files of weights, what of them fits where, and pictures that are drawn at once: without torch, and without a card."""

from __future__ import annotations

import json
import os
import struct
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import Shell
from zimage import placement
from zimage.errors import Failure
from zimage.model import Model
from zimage.placement import Place, choose_place
from zimage.registry import provider_class
from zimage.together import Together
from zimage.weights import GGML_TYPES, Tensor, gguf_in, named_file, safetensors_in, said_of, sha256_of

KIND = provider_class("diffusers")
QUANTIZERS = KIND.preflight.__globals__["QUANTIZERS"]
GB = 1e9


def failure_of(work: Callable[[], object]) -> Failure:
    with pytest.raises(Failure) as caught:
        work()
    return caught.value


# Files of weights -----------------------------------------------------------------------------------------------------


def safetensors_file(path: Path, tensors: dict[str, tuple[str, list[int], int]]) -> Path:
    """A file of zeros: name -> format, shape, bytes."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (kind, shape, size) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}  # type: ignore[dict-item]
        at += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))
    return path


def gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def gguf_file(
    path: Path, tensors: Sequence[tuple[str, list[int], int, int]], *, cut: int = 0, version: int = 3
) -> Path:
    """A file of zeros: name, shape, number of the type, bytes."""
    names = [gguf_text("general.architecture") + struct.pack("<I", 8) + gguf_text("lumina2")]
    names.append(gguf_text("a.list") + struct.pack("<IIQ", 9, 8, 2) + gguf_text("x") + gguf_text("yy"))
    names.append(gguf_text("another") + struct.pack("<IIQ", 9, 6, 3) + bytes(12))
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(names)) + b"".join(names)
    at = 0
    for name, shape, kind, size in tensors:
        head += gguf_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, at)
        at += -(-size // 32) * 32
    content = head + bytes(-len(head) % 32) + bytes(at)
    path.write_bytes(content[: len(content) - cut])
    return path


@pytest.mark.smoke
def test_what_a_safetensors_file_holds_is_read_from_its_header(tmp_path: Path) -> None:
    file = safetensors_file(tmp_path / "a.safetensors", {"x": ("BF16", [3, 4], 24), "y": ("U8", [5], 5)})
    assert safetensors_in(file) == {"x": Tensor("BF16", (3, 4), 24), "y": Tensor("U8", (5,), 5)}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cut off, or no safetensors file"),
        (b"\x80\x04pickle of old days", "cut off, or no safetensors file"),
        (struct.pack("<Q", 2) + b"[]", "header is damaged"),
        (struct.pack("<Q", 15) + b'{"x": {"a": 1}}', "header is damaged"),
        (struct.pack("<Q", 4) + b'{"x"', "header is damaged"),
    ],
)
def test_what_is_no_safetensors_file_is_told(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        safetensors_in(tmp_path / "a")


def test_what_a_gguf_file_holds_is_read_from_its_header(tmp_path: Path) -> None:
    file = gguf_file(tmp_path / "a.gguf", [("x", [256, 2], 12, 288), ("norm", [7], 0, 28)])
    assert gguf_in(file) == {"x": Tensor("Q4_K", (256, 2), 288), "norm": Tensor("F32", (7,), 28)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tensors": [("x", [256], 19, 50)]}, "numbers of type 19, which cannot be read back; those can: F32, .*Q4_K"),
        ({"tensors": [("x", [32], 8, 34)], "cut": 40}, r"it has \d+ of \d+ bytes"),
        ({"tensors": [("x", [32], 8, 34)], "cut": 150}, "cut off, or no GGUF file"),
        ({"tensors": [("x", [2] * 9, 0, 4)]}, "header is damaged"),
        ({"tensors": [], "version": 1}, "no GGUF file of version 2 or 3"),
    ],
)
def test_a_gguf_file_that_cannot_be_used_is_told(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        gguf_in(gguf_file(tmp_path / "a.gguf", **change))


@pytest.mark.parametrize("values", [2**62, 3])
def test_a_hostile_gguf_file_ends_soon(tmp_path: Path, values: int) -> None:
    endless = gguf_text("k") + struct.pack("<IIQ", 9, 0, 2**62)
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**62, values) + endless + bytes(100))
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"cut off|damaged"):
        gguf_in(tmp_path / "a.gguf")
    assert time.monotonic() - start < 5


def test_the_sizes_of_ggml_types_are_those_of_the_library() -> None:
    gguf = pytest.importorskip("gguf")
    for number, (name, *sizes) in GGML_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert kind.name == name and list(gguf.GGML_QUANT_SIZES[kind]) == sizes


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("/l/a.safetensors", {"file": "/l/a.safetensors", "weight": 1.0}),
        ("/l/a.safetensors:0.75", {"file": "/l/a.safetensors", "weight": 0.75}),
        ("/l/a b:c.SafeTensors:-2", {"file": "/l/a b:c.SafeTensors", "weight": -2.0}),
        ("C:\\l\\a.safetensors", {"file": "C:\\l\\a.safetensors", "weight": 1.0}),
        ("D:/l/a.safetensors:0.5", {"file": "D:/l/a.safetensors", "weight": 0.5}),
        (f"/a.safetensors:1#sha256={'0a' * 32}", {"file": "/a.safetensors", "weight": 1.0, "sha256": "0a" * 32}),
    ],
)
def test_a_lora_is_named_with_its_weight(text: str, file: dict[str, Any]) -> None:
    named = named_file(text, "safetensors", with_weight=True)
    assert named == file
    assert named_file(said_of(json.loads(json.dumps(named))), "safetensors", with_weight=True) == file


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert named_file("q4.gguf", "gguf") == {"file": str(tmp_path / "q4.gguf")}


@pytest.mark.parametrize(
    "value", [None, "a.gguf", {}, {"path": "x"}, ["a.gguf"], {"file": 3}, {"file": "/a.gguf", "sha256": 3}]
)
def test_what_a_record_names_wrongly_is_no_file(value: Any) -> None:
    with pytest.raises(ValueError):
        named_file(said_of(value), "gguf")


# Where a model fits ---------------------------------------------------------------------------------------------------


def model_of(kind: str = "F32", **billions: float) -> Model:
    """A model whose parts hold so many numbers, a hundred layers each; a sixth of the text encoder is embeddings."""
    parts = {}
    for part, count in billions.items():
        each = int(count * 1e9 / 100)
        parts[part] = {f"layers.{number}.weight": Tensor(kind, (each // 1000, 1000), 4 * each) for number in range(100)}
    return Model(Path("model"), None, parts)


REAL = model_of(transformer=6, text_encoder=4, vae=0.1)  # 20.2 GB in bfloat16, 12 the largest part, 0.12 a layer


def fake_torch(**has: Any) -> Any:
    return SimpleNamespace(
        __version__="2.13.0",
        cuda=SimpleNamespace(
            is_available=lambda: has.get("cuda", False),
            is_bf16_supported=lambda: has.get("bfloat16", True),
            get_device_capability=lambda: has.get("capability", (9, 0)),
        ),
        backends=SimpleNamespace(
            mps=SimpleNamespace(
                is_available=lambda: has.get("mps", False),
                is_macos_or_newer=lambda *_version: has.get("bfloat16", True),
            )
        ),
        ops=SimpleNamespace(mkldnn=SimpleNamespace(_is_mkldnn_bf16_supported=lambda: has.get("bfloat16", True))),
    )


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Place]:
    """Choose a place with so much free (GB), and these settings."""

    def choose(free: dict[str, float], has: dict[str, Any], model: Model = REAL, **settings: Any) -> Place:
        monkeypatch.setattr(placement, "free_memory", lambda torch, device: free[device] * GB)
        return choose_place(fake_torch(**has), model, KIND(settings).settings, QUANTIZERS)

    return choose


CUDA: dict[str, Any] = {"cuda": True}


@pytest.mark.parametrize(
    ("free", "has", "settings", "chosen"),
    [
        ({"cuda": 24, "cpu": 8}, {"cuda": True, "mps": True}, {}, ("cuda", "bfloat16", "none", 1)),
        ({"cuda": 16, "cpu": 24}, CUDA, {}, ("cuda", "bfloat16", "model", 1)),
        ({"cuda": 8, "cpu": 24}, CUDA, {}, ("cuda", "bfloat16", "group", 1)),
        ({"cuda": 24, "cpu": 24}, CUDA, {"offload": "group"}, ("cuda", "bfloat16", "group", 1)),
        ({"cuda": 48, "cpu": 8}, CUDA | {"bfloat16": False}, {"device": "cuda"}, ("cuda", "float32", "none", 1)),
        ({"cuda": 48, "cpu": 24}, CUDA, {"device": "cpu"}, ("cpu", "bfloat16", "none", 1)),
        ({"mps": 24, "cpu": 24}, {"mps": True}, {}, ("mps", "bfloat16", "none", 1)),
        ({"cpu": 64}, {}, {}, ("cpu", "bfloat16", "none", 1)),
        ({"cpu": 64}, {"bfloat16": False}, {}, ("cpu", "float32", "none", 1)),
        ({"cpu": 32}, {"bfloat16": False}, {}, ("cpu", "bfloat16", "none", 1)),
        ({"cuda": 13, "cpu": 8}, CUDA, {"quantize": "int8"}, ("cuda", "bfloat16", "none", 1)),
        ({"cuda": 9, "cpu": 12}, CUDA, {"quantize": "int8"}, ("cuda", "bfloat16", "model", 1)),
        ({"cuda": 8.6, "cpu": 8}, CUDA, {"quantize": "nf4"}, ("cuda", "bfloat16", "none", 1)),
        ({"cuda": 6.5, "cpu": 8}, CUDA, {"quantize": "nf4"}, ("cuda", "bfloat16", "model", 1)),
        ({"cuda": 24, "cpu": 8}, CUDA, {"at_once": 8}, ("cuda", "bfloat16", "none", 6)),
        ({"cuda": 80, "cpu": 8}, CUDA, {"at_once": 8}, ("cuda", "bfloat16", "none", 8)),
        ({"cuda": 23, "cpu": 8}, CUDA, {"at_once": 8}, ("cuda", "bfloat16", "none", 1)),
    ],
)
def test_the_best_place_that_is_large_enough_is_chosen(
    place: Callable[..., Place],
    free: dict[str, float],
    has: dict[str, Any],
    settings: dict[str, Any],
    chosen: tuple[str, str, str, int],
) -> None:
    assert tuple(place(free, has, **settings)) == chosen


@pytest.mark.parametrize(
    ("free", "has", "settings", "words"),
    [
        (
            {"cuda": 16, "cpu": 12},
            CUDA,
            {},
            "needs 22.9 GB on cuda, or 14.7 GB on cuda and 20.2 GB in the machine, or 2.9 GB",
        ),
        ({"cuda": 16, "cpu": 12}, CUDA, {}, "; free are 16.0 GB, and 12.0 GB in the machine"),
        (
            {"cuda": 8, "cpu": 64},
            CUDA,
            {"offload": "model"},
            "needs 14.7 GB on cuda and 20.2 GB in the machine; free are 8.0",
        ),
        ({"mps": 16, "cpu": 20}, {"mps": True}, {}, "needs 22.9 GB on mps; free are 16.0 GB"),
        ({"cpu": 16}, {}, {}, "needs 22.9 GB on cpu; free are 16.0 GB"),
        ({"cpu": 8}, {}, {"quantize": "int8"}, "needs 13.0 GB on cpu; free are 8.0 GB"),
    ],
)
def test_too_little_memory_is_told_with_numbers(
    place: Callable[..., Place], free: dict[str, float], has: dict[str, Any], settings: dict[str, Any], words: str
) -> None:
    failure = failure_of(lambda: place(free, has, **settings))
    assert failure.code == "too_little_memory" and failure.fault.exit_code == 2
    assert words in failure.message


@pytest.mark.parametrize(
    ("free", "has", "settings", "words"),
    [
        ({"cuda": 16, "cpu": 12}, CUDA, {}, "use --quantize int8"),
        ({"cuda": 9, "cpu": 16}, CUDA, {"offload": "none"}, "use --quantize int8 --offload model"),
        ({"cuda": 9, "cpu": 9}, CUDA | {"capability": (7, 5)}, {}, "use --quantize nf4"),
        ({"cuda": 8, "cpu": 64}, CUDA, {"offload": "model"}, "use --offload group"),
        ({"cuda": 8, "cpu": 64}, CUDA, {"offload": "model"}, "that needs 2.9 GB on cuda and 20.2 GB in the machine"),
        ({"mps": 16, "cpu": 20}, {"mps": True}, {}, "use --quantize int8"),
        ({"cpu": 4}, {}, {}, "take a smaller transformer with --gguf FILE"),
    ],
)
def test_too_little_memory_names_the_setting_that_fits(
    place: Callable[..., Place], free: dict[str, float], has: dict[str, Any], settings: dict[str, Any], words: str
) -> None:
    hint = failure_of(lambda: place(free, has, **settings)).fault.hint
    assert words in hint
    said = hint.removeprefix("use ").partition(" (")[0].partition(":")[0].split()
    if said[0].startswith("--"):  # it fits indeed
        named = dict(zip((name.removeprefix("--") for name in said[::2]), said[1::2], strict=True))
        place(free, has, **(settings | {"offload": None} | named))


@pytest.mark.parametrize(
    ("kind", "size"),
    [("F32", 22.9), ("BF16", 22.9), ("F8_E4M3", 22.9), ("I8", 43.1), ("U8", 43.1)],  # integers stay as they lie there
)
def test_memory_is_counted_by_what_the_files_hold_and_as_what_it_is_loaded(
    place: Callable[..., Place], kind: str, size: float
) -> None:
    model = model_of(kind, transformer=6, text_encoder=4, vae=0.1)
    message = failure_of(lambda: place({"cpu": 1}, {}, model)).message
    assert f"needs {size} GB" in message


def test_a_kind_that_is_loaded_on_the_card_needs_all_of_it_there_at_first(place: Callable[..., Place]) -> None:
    """In nf4 a part of 3.4 GB draws in 6.1 GB, and the whole of 7.0 GB must once be there."""
    model = model_of(transformer=6, text_encoder=6, vae=0.1)
    words = "or 7.0 GB on cuda and 7.0 GB in the machine; free are 6.5 GB"
    assert words in failure_of(lambda: place({"cuda": 6.5, "cpu": 64}, CUDA, model, quantize="nf4")).message


def test_small_and_first_layers_are_not_quantized() -> None:
    names = ("x.weight", "t_embedder.mlp.weight", "embed_tokens.weight", "all_final_layer.linear.weight", "norm.weight")
    tensors = {name: Tensor("F32", (100, 10), 4000) for name in names} | {"norm.weight": Tensor("F32", (10,), 40)}
    sizes = Model(Path(), None, {"transformer": tensors}).sizes(2, {"transformer": 1})
    assert sizes["transformer"].whole == 1000 + 3 * 2000 + 20 and sizes["transformer"].layer == 2000


def test_a_gguf_file_and_a_lora_count_by_their_files(place: Callable[..., Place], tmp_path: Path) -> None:
    gguf = gguf_file(tmp_path / "q8.gguf", [("x", [32, 1_000_000], 8, 34_000_000)])
    lora = safetensors_file(tmp_path / "l.safetensors", {"a.lora_A.weight": ("F32", [1_000_000, 25], 100_000_000)})
    settings = {"gguf": {"file": str(gguf)}, "lora": [{"file": str(lora), "weight": 1.0}]}
    model = model_of(text_encoder=4, vae=0.1)
    message = failure_of(lambda: place({"cuda": 4, "cpu": 64}, CUDA, model, **settings)).message
    assert "needs 11.0 GB on cuda and 8.3 GB in the machine, or 10.7 GB on cuda" in message  # 8.2 + 0.034 + 0.05 + 2.7


@pytest.mark.parametrize(
    ("wanted", "has", "words"),
    [
        ({"device": "cuda"}, {}, "cuda cannot be used with torch 2.13.0 here, only cpu"),
        ({"quantize": "nf4"}, {}, "nf4 does not run on cpu, only int8"),
        ({"quantize": "fp8"}, CUDA | {"capability": (8, 6)}, "fp8 needs a card of compute capability 8.9 or newer"),
        ({"offload": "model"}, {"mps": True}, "model is for cuda; mps has no memory of its own"),
        ({"quantize": "int8", "compile": True}, {}, "compile: it does not go with --quantize on cpu"),
    ],
)
def test_what_this_machine_cannot_do_is_refused(
    place: Callable[..., Place], wanted: dict[str, Any], has: dict[str, Any], words: str
) -> None:
    failure = failure_of(lambda: place({"cuda": 64, "mps": 64, "cpu": 64}, has, **wanted))
    assert failure.code == "usage" and words in failure.message


@pytest.mark.parametrize(
    "options",
    [
        ("--offload", "group", "--quantize", "int8"),
        ("--offload", "group", "--gguf", "q4.gguf"),
        ("--offload", "group", "--compile"),
        ("--offload", "model", "--device", "mps"),
        ("--quantize", "fp8", "--device", "cpu"),
        ("--compile", "--quantize", "int8", "--device", "cpu"),
    ],
)
def test_options_that_do_not_go_together_are_refused_at_once(shell: Shell, options: tuple[str, ...]) -> None:
    result = shell.call("--provider", "diffusers", "--prompt", "a fox", *options, "--print-response")
    assert result.code == 2 and result.error["code"] == "invalid_request"
    assert result.error["message"].startswith(options[0].removeprefix("--"))


def test_a_named_file_is_checked_before_anything_is_loaded(shell: Shell) -> None:
    for name, content, words in (
        ("a.safetensors", None, "is not there"),
        ("b.safetensors", b"PK\x03\x04 a zip", "no safetensors file"),
        ("c.gguf", b"GGML", "no GGUF file"),
    ):
        if content is not None:
            (shell.folder / name).write_bytes(content)
        option = "--gguf" if name.endswith("gguf") else "--lora"
        error = shell.call("--provider", "diffusers", "--prompt", "a fox", option, name, "--print-response").error
        assert error["code"] == "missing_weights" and error["exit_code"] == 2
        assert error["message"].startswith(f"{option}: {shell.folder / name} ") and words in error["message"]


@pytest.mark.skipif(os.name == "nt", reason="FIFOs of POSIX")
@pytest.mark.parametrize(("option", "name"), [("--lora", "a.safetensors"), ("--gguf", "a.gguf")])
def test_what_never_ends_is_not_read(shell: Shell, option: str, name: str) -> None:
    os.mkfifo(shell.folder / name)
    error = shell.call("--provider", "diffusers", "--prompt", "a fox", option, name, "--print-response").error
    assert error["code"] == "missing_weights" and "it is no file" in error["message"]
    key, file = option.removeprefix("--"), {"file": str(shell.folder / name), "weight": 1.0}
    assert KIND({key: [file] if key == "lora" else file}).shaping_settings[key]


def test_a_row_is_another_one_where_a_file_holds_something_else(tmp_path: Path) -> None:
    first = safetensors_file(tmp_path / "a.safetensors", {"x.lora_A.weight": ("F32", [1], 4)})
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(first.read_bytes())

    def shape(path: Path, weight: float = 1.0) -> dict[str, Any]:
        return KIND({"lora": [{"file": str(path), "weight": weight}], "at_once": 3, "compile": True}).shaping_settings

    assert shape(first) == shape(moved) != shape(first, 0.5)
    assert shape(first)["lora"] == [{"weight": 1.0, "sha256": sha256_of(first)}]
    assert not {"at_once", "compile"} & set(shape(first))
    moved.write_bytes(first.read_bytes()[:-1] + b"x")
    assert shape(first) != shape(moved)
    assert shape(tmp_path / "gone.safetensors")["lora"][0]["file"]


# At once --------------------------------------------------------------------------------------------------------------


class Artist:
    """Draws a picture as its seed, and notes which were drawn together."""

    def __init__(self, most: int, *, takes: int = 99) -> None:
        self.rounds: list[list[int]] = []
        self.takes = takes
        self.begun, self.goes_on = threading.Event(), threading.Event()
        self.goes_on.set()
        self.together: Together[int] = Together(self.draw, threading.RLock())
        self.together.most = most

    def draw(self, payloads: Sequence[Any], until: float) -> list[int]:
        self.begun.set()
        assert self.goes_on.wait(30)
        seeds = [payload["seed"] for payload in payloads]
        self.rounds.append(seeds)
        if len(seeds) > self.takes:
            raise Failure("too_little_memory", "out of memory")
        if 13 in seeds:
            raise Failure("task_failed", "no")
        return seeds

    def picture(self, seed: int, *, size: int = 512, seconds: float = 30) -> int:
        payload = {"width": size, "height": size, "num_inference_steps": 8, "guidance_scale": 0.0, "seed": seed}
        return self.together.picture(payload, time.monotonic() + seconds)


def test_what_waits_is_drawn_at_once_and_no_more_than_may_be() -> None:
    artist = Artist(3)
    with ThreadPoolExecutor(9) as threads:
        assert list(threads.map(artist.picture, range(9))) == list(range(9))
    assert sorted(seed for seeds in artist.rounds for seed in seeds) == list(range(9))
    assert max(len(seeds) for seeds in artist.rounds) == 3


def test_pictures_of_another_size_are_drawn_apart() -> None:
    artist = Artist(4)
    with ThreadPoolExecutor(4) as threads:
        sizes = (512, 1024, 512, 1024)
        list(threads.map(lambda seed: artist.picture(seed, size=sizes[seed]), range(4)))
    assert sorted(sorted(seeds) for seeds in artist.rounds) == [[0, 2], [1, 3]]


def test_fewer_are_drawn_at_once_where_memory_does_not_do() -> None:
    artist = Artist(4, takes=2)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(artist.picture, range(4))) == list(range(4))
    assert [len(seeds) for seeds in artist.rounds] == [4, 2, 2]
    assert artist.together.most == 2
    alone = Artist(1, takes=0)
    assert failure_of(lambda: alone.picture(1)).code == "too_little_memory"


def test_a_failure_is_that_of_all_that_were_drawn_with_it_and_of_no_other() -> None:
    artist = Artist(2)
    with ThreadPoolExecutor(2) as threads:
        both = [threads.submit(artist.picture, seed) for seed in (13, 14)]
        errors = [one.exception() for one in both]
    assert [error.code for error in errors if isinstance(error, Failure)] == ["task_failed"] * 2
    assert errors[0] is not errors[1]
    assert artist.picture(15) == 15


def test_a_picture_waits_no_longer_than_it_may_and_is_not_drawn_then() -> None:
    artist = Artist(1)
    artist.goes_on.clear()
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(artist.picture, 1)
        assert artist.begun.wait(30)
        assert failure_of(lambda: artist.picture(2, seconds=0.05)).code == "too_slow"
        artist.goes_on.set()
        assert first.result() == 1
    assert artist.picture(3) == 3
    assert artist.rounds == [[1], [3]]


def test_as_many_calls_wait_as_are_drawn() -> None:
    assert KIND({}).calls_at_once == 1
    assert KIND({"at_once": 4}).calls_at_once == 8
