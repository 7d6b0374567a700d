"""A model under a scheme as floats again, and float checkpoints in Hugging Face's layout."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from refmamba.formats.checkpoint import HUGGING_FACE
from refmamba.formats.tokenizer import TokenizerParts, save_parts
from refmamba.formats.weights import file_shape
from refmamba.formats.writing import new_folder, save_tensors
from refmamba.spec.arith import F32Array
from refmamba.spec.codes import dequantize
from refmamba.spec.config import MambaConfig, ParameterSource
from refmamba.spec.linear import Linear
from refmamba.spec.parameters import QuantizedModel, linear_sites


@dataclass(frozen=True, eq=False)
class Dequantized:
    """The values of a model's codes: a ParameterSource. What the scheme does to activations is not in it.

    A matrix whose input is smoothed or rotated is that of the input before. A head with codes of its own is not tied.
    """

    model: QuantizedModel

    @property
    def config(self) -> MambaConfig:
        """The model's sizes."""
        scheme, config = self.model.scheme, self.model.config
        own = "lm_head.weight" in scheme.weights and "embedding.weight" not in scheme.weights
        return replace(config, tie_embeddings=False) if own else config

    def read(self, name: str) -> F32Array:
        """One parameter, float32. FixedPoint gives its value too, which float32 holds exactly."""
        site = name.removesuffix(".weight")
        if site == name or site not in linear_sites(self.model.config):
            return self.model.value(name)
        return _matrix(self.model.linear(site))


def _matrix(linear: Linear) -> F32Array:
    """The matrix (rows, K) that a linear layer multiplies its input by, before the input is transformed."""
    x = dequantize(linear.weight)
    for transform in reversed(linear.transforms):  # the transforms' matrices are symmetric: on a row they do as on an input
        operation, arguments = transform.call(x, linear.site)
        x = operation(*arguments)
    return x


def hugging_face_name(name: str) -> str:
    """`backbone.layers.0.mixer.D` for `layers.0.D`."""
    if not name.startswith("layers."):
        return name if name.startswith("lm_head.") else "backbone." + name.replace("embedding.", "embeddings.")
    _, layer, rest = name.split(".", 2)
    return f"backbone.layers.{layer}." + (rest if rest.startswith("norm.") else f"mixer.{rest}")


def save_hugging_face(source: ParameterSource, folder: Path, parts: TokenizerParts | None) -> None:
    """Save a float model for transformers in a new folder, with its tokenizer's files: whole or not at all.

    Raises CheckpointError for a folder that exists and is not empty, or that cannot be written.
    """
    c = source.config
    config = {
        "architectures": ["MambaForCausalLM"], "model_type": "mamba", "dtype": "float32", "torch_dtype": "float32",
        "intermediate_size": c.d_inner, "hidden_act": "silu", "residual_in_fp32": True,
    } | {key: getattr(c, field) for field, (key, _, _) in HUGGING_FACE.items()}  # fmt: skip
    with new_folder(folder) as aside:
        config |= save_parts(parts, aside) if parts else {}
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        tensors = {
            hugging_face_name(name): source.read(name).reshape(file_shape(name, shape)) for name, shape in c.shapes().items()
        }
        save_tensors(tensors, aside / "model.safetensors", {"format": "pt"})
