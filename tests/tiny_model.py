"""A Z-Image pipeline of random weights, less than 2 MB: everything of the real one but its size and its sense.

    python tests/tiny_model.py FOLDER

Needs what requirements-local.txt lists, and no network. The same weights every time.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

SEED = 7
WIDTH = 16  # of what the text encoder hands to the transformer
TRANSFORMER = {
    "dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": WIDTH,
    "axes_dims": [8, 4, 4],
    "axes_lens": [1024, 128, 128],
}
TEXT_ENCODER = {
    "hidden_size": WIDTH,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 260,
    "max_position_embeddings": 1024,
}
VAE = {  # four blocks, as the real one: 8 pixels a side for each value
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [4, 4, 4, 4],
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 2,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
SCHEDULER = {"shift": 3.0}
CHAT = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer() -> Any:
    """One token for every byte."""
    transformers = importlib.import_module("transformers")
    alphabet = importlib.import_module("tokenizers.pre_tokenizers").ByteLevel.alphabet()
    vocabulary = {character: number for number, character in enumerate(sorted(alphabet))}
    made = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[])
    made.chat_template = CHAT
    return made


def pipeline() -> Any:
    """The pipeline, in float32 on the CPU."""
    torch = importlib.import_module("torch")
    diffusers = importlib.import_module("diffusers")
    transformers = importlib.import_module("transformers")
    torch.manual_seed(SEED)
    transformer = diffusers.ZImageTransformer2DModel(**TRANSFORMER)
    with torch.no_grad():  # these two are left uninitialized, to be read from a file
        transformer.x_pad_token.fill_(1.0)
        transformer.cap_pad_token.fill_(1.0)
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=diffusers.AutoencoderKL(**VAE),
        text_encoder=transformers.Qwen3Model(transformers.Qwen3Config(**TEXT_ENCODER)).eval(),
        tokenizer=tokenizer(),
        transformer=transformer.eval(),
    )


def save(folder: Path) -> None:
    """Write the model as the hub has it: safetensors, the transformer's in several files."""
    made = pipeline()
    made.save_pretrained(folder, safe_serialization=True)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    made.transformer.save_pretrained(folder / "transformer", max_shard_size="80KB")


def layers() -> dict[str, Any]:
    """The linear layers of the transformer's blocks, by their names."""
    torch = importlib.import_module("torch")
    modules = pipeline().transformer.named_modules()
    return {name: part for name, part in modules if isinstance(part, torch.nn.Linear) and "layers." in name}


def save_lora(file: Path, *, prefix: str = "transformer.", seed: int = 1) -> None:
    """Write a LoRA of rank 4 that changes the picture much; `prefix` as diffusers and ComfyUI write the names."""
    torch = importlib.import_module("torch")
    noise = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, layer in layers().items():
        if "attention" in name:
            tensors[f"{prefix}{name}.lora_A.weight"] = torch.randn(4, layer.in_features, generator=noise) / 2
            tensors[f"{prefix}{name}.lora_B.weight"] = torch.randn(layer.out_features, 4, generator=noise) / 2
    importlib.import_module("safetensors.torch").save_file(tensors, file)


def save_gguf(file: Path) -> None:
    """Write the transformer as GGUF: the layers of its blocks in 8 bits, what does not fit their blocks as it is."""
    gguf = importlib.import_module("gguf")
    quantized = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(str(file), "lumina2")
    for name, tensor in pipeline().transformer.state_dict().items():
        numbers = tensor.float().numpy()
        if numbers.ndim == 2 and "layers." in name and numbers.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(numbers, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a tiny Z-Image model of random weights.")
    parser.add_argument("folder", type=Path)
    save(parser.parse_args().folder)
