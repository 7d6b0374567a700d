"""Float checkpoints: Hugging Face's layout, and that of the original state-spaces repositories.

A weight file is a memory map. Its names and shapes are compared with config.json when it is opened, and a tensor becomes
float32 only when it is asked for, so a model can be quantized without ever being held in float32.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from refmamba.errors import CheckpointError, ConfigError, ForeignModelError, printable
from refmamba.formats.foreign import ONLY, refuse_foreign
from refmamba.formats.weights import FLOATS, checked, file_shape, open_weights, refuse_others, widened
from refmamba.spec.arith import F32Array
from refmamba.spec.config import MambaConfig

# MambaConfig's fields: the key in config.json, the type there, and the default (None: the key must be there).
Fields = dict[str, tuple[str, type, Any]]
Only = dict[str, list[Any]]
HUGGING_FACE: Fields = {
    "d_model": ("hidden_size", int, None),
    "n_layer": ("num_hidden_layers", int, None),
    "vocab_size": ("vocab_size", int, None),
    "d_state": ("state_size", int, 16),
    "d_conv": ("conv_kernel", int, 4),
    "expand": ("expand", int, 2),
    "dt_rank": ("time_step_rank", int, "auto"),
    "norm_eps": ("layer_norm_epsilon", float, 1e-5),
    "use_bias": ("use_bias", bool, False),
    "use_conv_bias": ("use_conv_bias", bool, True),
    "tie_embeddings": ("tie_word_embeddings", bool, True),
}
STATE_SPACES: Fields = {
    "d_model": ("d_model", int, None),
    "n_layer": ("n_layer", int, None),
    "vocab_size": ("vocab_size", int, None),
    "tie_embeddings": ("tie_embeddings", bool, True),
}
STATE_SPACES_SSM: Fields = {
    "d_state": ("d_state", int, 16),
    "d_conv": ("d_conv", int, 4),
    "expand": ("expand", int, 2),
    "dt_rank": ("dt_rank", int, "auto"),
    "use_bias": ("bias", bool, False),
    "use_conv_bias": ("conv_bias", bool, True),
}
# Keys that tell other models apart: the values that are implemented, the first of them the default.
HUGGING_FACE_ONLY: Only = {"model_type": ["mamba", "refmamba"], "hidden_act": ["silu", "swish"]}
STATE_SPACES_ONLY: Only = {
    "model_type": ["mamba"], "rms_norm": [True], "attn_layer_idx": [[], None], "d_intermediate": [0], "norm_epsilon": [1e-5],
}  # fmt: skip
STATE_SPACES_SSM_ONLY: Only = {"layer": ["Mamba1"]}
# What else ssm_cfg may have: how weights are initialized, and which code computes them.
STATE_SPACES_SSM_OTHERS = {"dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path", "layer"}
# Larger than any model, and small enough that the names of its parameters are made in a moment.
LARGEST = {
    "d_model": 2**20, "n_layer": 2**13, "vocab_size": 2**24, "d_state": 2**16, "d_conv": 2**10, "expand": 2**10,
    "dt_rank": 2**20,
}  # fmt: skip


class Checkpoint:
    """A float model folder: a ParameterSource. Raises FileError, CheckpointError."""

    def __init__(self, folder: Path, config: MambaConfig) -> None:
        self._tensors = open_weights(folder)
        embedding, head = self._tensors.get("embedding.weight"), self._tensors.get("lm_head.weight")
        if embedding is not None and embedding.array.ndim == 2 and len(embedding.array) > config.vocab_size:
            config = replace(config, vocab_size=len(embedding.array))  # the vocabulary is padded
        if head is not None and embedding is not None:  # a tied head may have been saved all the same
            config = replace(config, tie_embeddings=np.array_equal(head.array, embedding.array))
            if config.tie_embeddings:
                del self._tensors["lm_head.weight"]
        self.config = config
        for name, shape in self.config.shapes().items():
            checked(folder, self._tensors, name, file_shape(name, shape), *FLOATS)
        refuse_others(self._tensors, self.config.shapes())

    def read(self, name: str) -> F32Array:
        """One parameter, float32 and read-only; where the file holds float32, a view of its memory map. Nothing is cached.

        float64 is rounded to float32, to nearest.
        """
        x = widened(self._tensors[name].array).reshape(self.config.shapes()[name])
        x.flags.writeable = False
        return x


def read_config(file: Path, values: dict[str, Any]) -> MambaConfig:
    """The model's shape as config.json states it. Raises ForeignModelError, ConfigError."""
    refuse_foreign(file, values)
    # Hugging Face's published files carry the original keys as well, so theirs are looked for first. Other people's files have
    # the original keys and a model_type.
    if {"hidden_size", "num_hidden_layers"} & values.keys() or ("model_type" in values and "d_model" not in values):
        fields = _fields(file, values, HUGGING_FACE, HUGGING_FACE_ONLY)
    else:
        ssm = values.get("ssm_cfg") or {}
        if not isinstance(ssm, dict):
            raise ConfigError(f"{file}: ssm_cfg is not a JSON object; download it again")
        fields = _fields(file, values, STATE_SPACES, STATE_SPACES_ONLY)
        fields |= _fields(file, values | ssm, STATE_SPACES_SSM, STATE_SPACES_SSM_ONLY)
        known = {key for key, _, _ in STATE_SPACES_SSM.values()} | STATE_SPACES_SSM_OTHERS
        if unknown := sorted(ssm.keys() - known):
            raise ForeignModelError(f"{file}: ssm_cfg has {printable(unknown[0], 60)}, which no Mamba-1 has; {ONLY}")
    try:
        return MambaConfig(**fields)
    except CheckpointError as error:
        raise ConfigError(f"{file}: {error}") from None


def _fields(file: Path, values: dict[str, Any], fields: Fields, only: Only) -> dict[str, Any]:
    for key, implemented in only.items():
        if values.get(key, implemented[0]) not in implemented:
            raise ForeignModelError(f"{file}: {key} is {printable(repr(values[key]), 60)}; {ONLY}")
    arguments = {}
    for field, (key, kind, default) in fields.items():
        value: Any = values.get(key, default)
        if value is None:
            raise ConfigError(f"{file}: {key} is missing; this is not the config.json of a Mamba, or not all of it")
        if field == "dt_rank" and value == "auto":
            value = 0  # what MambaConfig takes for `auto`
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ConfigError(f"{file}: {key} is {printable(repr(value), 60)}; it must be of type {kind.__name__}")
        _check_range(file, key, value, LARGEST.get(field, math.inf))
        arguments[field] = value
    return arguments


def _check_range(file: Path, key: str, value: Any, largest: float) -> None:
    if value > largest:
        raise ConfigError(f"{file}: {key} is {value}; no Mamba has more than {largest}")
    if type(value) is float and not 0 <= value < math.inf:
        raise ConfigError(f"{file}: {key} is {value}; it must be a number from 0 on")
