"""The generated models of tests/vectors: their weights, their schemes, and what comes out of them."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from vector_rows import HAND, array, generator, normal

from refmamba.conformance.models import SCHEMES, sha256_of
from refmamba.conformance.vectors import encode
from refmamba.formats.calibration import Calibration, save_calibration
from refmamba.formats.checkpoint import read_config
from refmamba.formats.folder import open_checkpoint
from refmamba.spec.arith import F32Array
from refmamba.spec.calibrate import calibrate
from refmamba.spec.config import ParameterSource
from refmamba.spec.mamba1 import Mamba
from refmamba.spec.parameters import QuantizedModel, linear_sites, quantize_model
from refmamba.spec.scheme import parse_scheme, scheme_from_json

# Longer than a chunk of the scan; shorter than the convolution's state; one token.
TINY_SEQUENCES = [[(7 * i * i + 3 * i + 1) % 67 for i in range(n)] for n in (70, 3, 1, 9)]


@dataclass(frozen=True)
class Generated:
    """A generated model: its config.json, the seed of its weights, its sequences, its schemes by name and as JSON values."""

    config: dict[str, Any]
    seed: int
    sequences: list[list[int]]
    schemes: tuple[str, ...]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


def hugging_face(hidden: int, layers: int, vocabulary: int, **others: Any) -> dict[str, Any]:
    """A config.json; the last entry is only for transformers."""
    sizes: dict[str, Any] = {
             "hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": vocabulary, "state_size": 16, "conv_kernel": 4,
             "expand": 2, "time_step_rank": 3, "layer_norm_epsilon": 1e-5, "use_bias": True, "use_conv_bias": True,
             "tie_word_embeddings": True, "hidden_act": "silu"}  # fmt: skip
    sizes |= others
    sizes["intermediate_size"] = sizes["expand"] * hidden
    return {"model_type": "mamba", "architectures": ["MambaForCausalLM"], **sizes}


def sequences_of(seed: int, vocabulary: int, *lengths: int) -> list[list[int]]:
    """Random sequences of these lengths."""
    r = generator(seed)
    return [r.integers(0, vocabulary, length).tolist() for length in lengths]


def chosen(scale: str, **bits: int) -> dict[str, Any]:
    """Sites of a scheme with one kind of scale; __ stands for the dot."""
    return {site.replace("__", "."): {"bits": n, "scale": scale} for site, n in bits.items()}


MIXED = {
    "name": "mixed",
    "weights": chosen("per_channel", embedding__weight=5, lm_head__weight=5, in_proj__weight=3, dt_proj__weight=7,
                      conv1d__weight=6, A_log=7)
    | chosen("per_tensor", x_proj__weight=5, out_proj__weight=6, D=5, norm__weight=7, norm_f__weight=6),
    "inputs": chosen("per_token", in_proj=7, dt_proj=6, lm_head=5) | chosen("static", x_proj=5, out_proj=3),
    "outputs": chosen("per_token", in_proj=9, x_proj=11, dt_proj=5, out_proj=7),
}  # fmt: skip
WHOLE = {
    "name": "whole",
    "weights": chosen("per_channel", x_proj__weight=3, out_proj__weight=5) | chosen("per_tensor", dt_proj__weight=6),
    "inputs": chosen("per_tensor", in_proj=6, x_proj=7, dt_proj=5, lm_head=3),
    "outputs": chosen("per_tensor", in_proj=10, dt_proj=3) | chosen("per_token", x_proj=12, out_proj=15),
}
METHODS = {
    "name": "methods",
    "weights": {
        "in_proj.weight": {"bits": 3, "scale": "grouped", "group": 16},
        "x_proj.weight": {"bits": 2, "scale": "grouped"},
        "out_proj.weight": {"bits": 4, "scale": "grouped", "group": 32},
        "lm_head.weight": {"bits": 4, "scale": "grouped", "group": 16},
    },
    "inputs": {
        "in_proj": {"bits": 6, "scale": "per_token_outliers", "threshold": 1.5},
        "x_proj": {"bits": 7, "scale": "static"},
        "dt_proj": {"bits": 8, "scale": "per_token_outliers"},
        "out_proj": {"bits": 5, "scale": "flattened", "quantile": 0.5},
    },
    "outputs": chosen("per_token", in_proj=9),
    "rotate": ["x_proj", "out_proj"],
}
GENERATED = {
    "tiny": Generated(hugging_face(20, 2, 67), 5, TINY_SEQUENCES, SCHEMES),
    # An untied head, no bias but dt_proj's, an odd number of states and of taps, six sequences at once, odd widths.
    "untied": Generated(
        hugging_face(18, 2, 71, state_size=5, conv_kernel=3, expand=3, time_step_rank=2, use_bias=False, use_conv_bias=False,
                     tie_word_embeddings=False),
        6, sequences_of(7, 71, 33, 1, 7, 2, 19, 66),
        ("fp32", "w3-mlp", "w5-all", "w6-mlp", "w7-all", "w8a8-all", "int8", "int8-static", "int8-smooth"),
        {"mixed": MIXED, "whole": WHOLE, "methods": METHODS},
    ),
    # More tokens than a kernel takes at a time; another epsilon; as many channels as the residual stream is wide.
    "long": Generated(
        hugging_face(16, 2, 53, state_size=3, conv_kernel=5, expand=1, layer_norm_epsilon=1e-3),
        8, sequences_of(9, 53, 300, 17, 1, 258, 64),
        ("fp32", "w8-all", "w8a8-mlp", "w4a16-all", "int8", "int8-static", "int8-smooth"),
    ),
}  # fmt: skip


def stored_name(name: str) -> str:
    """The name of a parameter in Hugging Face's layout."""
    if name.startswith("layers.") and ".norm." not in name:
        return "backbone.{}.{}.mixer.{}".format(*name.split(".", 2))
    return name if name == "lm_head.weight" else "backbone." + name.replace("embedding.", "embeddings.")


def save_model(folder: Path, config: dict[str, Any], parameter: Callable[[str, tuple[int, ...]], F32Array]) -> ParameterSource:
    """Write config.json and model.safetensors of random or given parameters, and open them."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    tensors = {}
    for name, shape in read_config(folder / "config.json", config).shapes().items():
        x = parameter(name, shape)
        tensors[stored_name(name)] = x[:, None] if name.endswith("conv1d.weight") else x
    save_file(tensors, folder / "model.safetensors")
    source = open_checkpoint(folder)
    assert not isinstance(source, QuantizedModel)
    return source


def write_expected(folder: Path, expected: dict[str, Any]) -> None:
    """Write expected.json."""
    (folder / "expected.json").write_text(json.dumps({"format": 1} | expected, indent=1) + "\n", encoding="utf-8")


def write_models(vectors: Path) -> None:
    """Write every generated model into a folder of its name there: weights, calibration, and what comes out."""
    for name, model in GENERATED.items():
        write_model(vectors / name, model)
    write_edges(vectors / "edges")


def write_weights(folder: Path, model: Generated) -> tuple[ParameterSource, dict[str, F32Array]]:
    """Write a generated model's weights and its calibration, and give both."""
    r = generator(model.seed)

    def parameter(name: str, shape: tuple[int, ...]) -> F32Array:
        x = normal(r, *shape) * array(0.4)
        if name.endswith("A_log"):
            x = np.log(np.arange(1, shape[1] + 1)).astype(np.float32) + x
        elif "norm" in name or name.endswith(".D"):
            x = 1 + x
        elif name.endswith("dt_proj.bias"):
            x = x * 4 - 2
        return x.astype(np.float32)

    source = save_model(folder, model.config, parameter)
    absmax = calibrate(source, np.array(max(model.sequences, key=len)))
    save_calibration(Calibration(absmax), folder / "calibration.json")
    return source, absmax


def write_model(folder: Path, model: Generated) -> None:
    """Write one of them; transformers computes its logits without a scheme."""
    import torch
    import transformers

    source, absmax = write_weights(folder, model)
    schemes = {name: parse_scheme(name) for name in model.schemes}
    for name, values in model.files.items():
        (folder / "schemes").mkdir(exist_ok=True)
        (folder / "schemes" / f"{name}.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        schemes[name] = scheme_from_json(values)
    hashes = {}
    for name, scheme in schemes.items():
        logits, _ = Mamba(quantize_model(source, scheme, absmax)).prefill(list(map(np.array, model.sequences)), logits="all")
        hashes[name] = sha256_of(logits)
    torch.set_default_dtype(torch.float64)
    peer: Any = transformers.MambaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    peer.eval()
    with torch.no_grad():
        logits64 = peer(torch.tensor([model.sequences[0]]), use_cache=False).logits[0, -8:].double().numpy()
    from_transformers = {
        "source": f"independent:transformers {transformers.__version__}, float64", "compare": "close:1e-5", "sequence": 0,
        "result": encode(logits64),
    }  # fmt: skip
    frozen = {"source": "spec", "compare": "exact", "schemes": hashes}
    write_expected(folder, {"sequences": model.sequences, "logits_sha256": frozen, "fp32_last_8": from_transformers})


def write_edges(folder: Path) -> None:
    """Write the model `edges`: finite weights whose logits are no numbers, and a calibrated maximum that counts as zero.

    `int8`: a row of the head is so large that the product of its scale and the token's is +0, and 0/0 no number.
    `int8-static`: lm_head's maximum is below 2^-100, so all its codes are 0, and all logits +0.0.
    """
    r, sequence = generator(10), [5, 6, 3, 7]
    head = np.where(np.arange(10)[:, None] > 2, normal(r, 10, 8) * array(1e22), array(0))
    head[1, :3] = array(1e22)
    special = {"norm_f.weight": array([0, 0, 0, 0, 1e30, 1e30, 1e30, 1e30]), "lm_head.weight": head}

    def parameter(name: str, shape: tuple[int, ...]) -> F32Array:
        return special.get(name, normal(r, *shape) * array(0.1))

    config = hugging_face(8, 1, 10, time_step_rank=1, use_bias=False, tie_word_embeddings=False)
    source = save_model(folder, config, parameter)
    shapes = {site: source.config.shapes()[f"{site}.weight"][1:] for site in linear_sites(source.config)}
    absmax = {site: np.full(shape, 1e-35 if site == "lm_head" else 1, np.float32) for site, shape in shapes.items()}
    save_calibration(Calibration(absmax), folder / "calibration.json")
    zeros = hashlib.sha256(bytes(4 * len(sequence) * 10)).hexdigest()
    frozen = {"source": HAND, "compare": "exact", "schemes": {"int8-static": zeros}}
    raised = dict.fromkeys(("int8", "fp32"), "NonFiniteError")
    write_expected(folder, {"sequences": [sequence], "logits_sha256": frozen, "raises": raised})


def write_small(vectors: Path) -> None:
    """Write small.json: the hashes of the small model inside the package."""
    from refmamba.run.session import ModelChoice, open_model

    tokens = [row[:24] for row in TINY_SEQUENCES]
    hashes = {}
    for name in SCHEMES:
        opened = open_model(ModelChoice("small", name))
        model = opened.quantized(opened.scheme)
        hashes[name] = sha256_of(Mamba(model).prefill([np.array(row) for row in tokens], logits="all")[0])
    weights = resources.files("refmamba") / "small_model" / "model.safetensors"
    value = {"format": 1, "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(), "sequences": tokens,
             "logits_sha256": {"source": "spec", "compare": "exact", "schemes": hashes}}  # fmt: skip
    (vectors / "small.json").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
