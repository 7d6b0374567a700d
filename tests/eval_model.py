"""A small Mamba whose weights follow from a written rule, so that other libraries can build the very same one."""

import json
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import processors

from refmamba.spec.arith import F32Array
from refmamba.spec.config import MambaConfig

SMALL_TOKENIZER = Path(__file__).parents[1] / "refmamba" / "small_model" / "tokenizer.json"
END = "<|endoftext|>"  # its token 0
NEOX = MambaConfig(d_model=32, n_layer=2, vocab_size=50280)  # the published models' vocabulary


def uniform(shape: tuple[int, ...], seed: int) -> F32Array:
    """Values in -1 to 1, exact in float32: the top bits of a multiplicative hash of the index (no library's generator)."""
    i = np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(seed * 1_000_003 + 1)
    mixed = (i * np.uint64(0x9E3779B97F4A7C15)) ^ ((i * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(29))
    bits = (mixed * np.uint64(0xBF58476D1CE4E5B9)) >> np.uint64(44)  # 20 bits
    return (bits.astype(np.float32) / np.float32(2**19) - np.float32(1)).reshape(shape)


def tensor(name: str, shape: tuple[int, ...], seed: int) -> F32Array:
    """One parameter, by its canonical name."""
    x = uniform(shape, seed)
    if name.endswith("dt_proj.bias"):
        return x - np.float32(3)
    if name.endswith(("norm.weight", "norm_f.weight", ".D")):
        return x * np.float32(0.25) + np.float32(1)
    return x * np.float32(1 if name.startswith("embedding") else 0.2)


def hub_name(name: str) -> str:
    """`backbone.layers.0.mixer.D` for `layers.0.D`."""
    if not name.startswith("layers."):
        return "backbone." + name.replace("embedding.", "embeddings.")
    _, layer, rest = name.split(".", 2)
    return f"backbone.layers.{layer}." + (rest if rest.startswith("norm.") else f"mixer.{rest}")


def write_model(folder: Path, config: MambaConfig = NEOX) -> Path:
    """The model as transformers saves one: config.json and model.safetensors."""
    tensors = {}
    for seed, (name, shape) in enumerate(config.shapes().items()):
        x = tensor(name, shape, seed)
        tensors[hub_name(name)] = x[:, None, :] if name.endswith("conv1d.weight") else x
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    values = {
        "architectures": ["MambaForCausalLM"], "model_type": "mamba", "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layer, "vocab_size": config.vocab_size, "state_size": config.d_state,
        "conv_kernel": config.d_conv, "expand": config.expand, "intermediate_size": config.expand * config.d_model,
        "time_step_rank": config.dt_rank, "use_bias": False, "use_conv_bias": True, "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": True, "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 0, "dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def write_small(folder: Path, adds: bool = False) -> Path:
    """A complete folder of small random weights, with the tokenizer of the small model as training would leave it."""
    folder.mkdir(exist_ok=True)
    write_model(folder, MambaConfig(d_model=8, n_layer=1, vocab_size=4096))
    (folder / "tokenizer.json").write_text(trained_tokenizer(adds), "utf-8")
    return folder


def trained_tokenizer(adds: bool) -> str:
    """The small model's tokenizer as training would leave it; `adds`: with a begin token before every text."""
    tokenizer = tokenizers.Tokenizer.from_file(str(SMALL_TOKENIZER))
    if adds:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{END} $A", pair=f"{END} $A $B", special_tokens=[(END, 0)]
        )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=16)
    return tokenizer.to_str()
