"""Quantized folders: what `refmamba quantize` saves and every command loads.

config.json: as Hugging Face's, with "refmamba": {"spec_version", "scheme"}.
model.safetensors: of a parameter X that is coded X.q (int8, or up to 4 bits two codes a byte) and X.scale; in fixed point
X.q (int32) and X.exponent; else X itself, float32. Of a static input its .absmax and .smooth. A tied head is not saved: it
is the embedding's codes, or follows from the embedding.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmamba.errors import CheckpointError, SchemeError, TensorError
from refmamba.formats.checkpoint import HUGGING_FACE
from refmamba.formats.hub import ModelFiles
from refmamba.formats.tokenizer import read_parts, save_parts
from refmamba.formats.weights import FLOAT32, INT8, INT32, UINT8, checked, open_safetensors, refuse_others
from refmamba.formats.writing import new_folder, save_tensors
from refmamba.spec import SPEC_VERSION
from refmamba.spec.coders import ParameterGrouped, UnquantizedMatrix
from refmamba.spec.codes import STEPPED, WEIGHT_BITS, Codes, FixedPoint, Param, pack4, unpack4
from refmamba.spec.config import MambaConfig, kind_of
from refmamba.spec.parameters import QuantizedModel, parameter_coder, quantize_parameter, site_values
from refmamba.spec.scheme import scheme_from_json

# What the values of a model that was saved can be: positive scales; exponents of eq. (10), of a float32's row; of eq. (28).
SCALES = (float(np.finfo(np.float32).smallest_subnormal), float(np.finfo(np.float32).max))
EXPONENTS = (WEIGHT_BITS - 128, 126)
FARTHEST = 150


def save_quantized(model: QuantizedModel, folder: Path, files: ModelFiles, rounding: str = "search") -> None:
    """Save a model, with the tokenizer and the end tokens of its files, in a new folder: whole or not at all.

    rounding: how the codes were chosen, for whoever reads the folder. Raises CheckpointError for a
    folder that exists and is not empty, or that cannot be written.
    """
    config = {key: getattr(model.config, field) for field, (key, _, _) in HUGGING_FACE.items()}
    parts = read_parts(files)
    saved = {"spec_version": SPEC_VERSION, "scheme": model.scheme.to_json(), "rounding": rounding}
    with new_folder(folder) as aside:
        config |= save_parts(parts, aside)
        text = json.dumps({"model_type": "refmamba", **config, "refmamba": saved}, indent=2)
        (aside / "config.json").write_text(text + "\n", "utf-8")
        save_tensors(dict(arrays(model)), aside / "model.safetensors")


def arrays(model: QuantizedModel) -> Iterator[tuple[str, NDArray[Any]]]:
    """The arrays that are saved of a model, by name."""
    for name in sorted(model.params):
        if name == "lm_head.weight" and model.config.tie_embeddings:
            continue
        param = model.params[name]
        if isinstance(param, Codes):
            yield f"{name}.q", pack4(np.atleast_2d(param.q)) if param.bits <= 4 else param.q
            yield f"{name}.scale", np.asarray(param.scale)
            if param.steps is not None:
                yield f"{name}.steps", param.steps
        elif isinstance(param, FixedPoint):
            yield f"{name}.q", param.q
            yield f"{name}.exponent", param.exponent
        else:
            yield name, np.asarray(param)


def open_quantized(folder: Path, config: MambaConfig, saved: Any) -> QuantizedModel:
    """Read what `save_quantized` wrote. Codes of more than 4 bits stay in the memory map. Raises CheckpointError."""
    if not isinstance(saved, dict) or saved.get("spec_version") != SPEC_VERSION:
        raise CheckpointError(f"{folder}: not saved under specification {SPEC_VERSION}; quantize the model again")
    try:
        scheme = scheme_from_json(saved.get("scheme"))
    except SchemeError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}; quantize the model again") from error
    tensors = open_safetensors(folder / "model.safetensors")
    shapes, taken, params = config.shapes(), set[str](), dict[str, Param]()

    def take(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], low: float, high: float) -> NDArray[Any]:
        taken.add(name)
        return within(name, checked(folder, tensors, name, shape, dtype), low, high)

    def within(name: str, array: NDArray[Any], low: float, high: float) -> NDArray[Any]:
        if not (array.min() >= low and array.max() <= high):  # a NaN is neither
            raise TensorError(
                f"{tensors[name].file}: tensor {name} has values outside {low:g} to {high:g}, as no saved model has; "
                "quantize the model again"
            )
        return array

    config = replace(config, states_A="layers.0.A" in tensors and "A_log" not in scheme.weights)
    for name, shape in config.state_matrices().items():
        taken.add(name)
        params[name] = checked(folder, tensors, name, shape, FLOAT32)
    for name, shape in shapes.items():
        coder = parameter_coder(kind_of(name), scheme)
        if coder is None:
            taken.add(name)
            params[name] = checked(folder, tensors, name, shape, FLOAT32)
            continue
        largest = 2**WEIGHT_BITS if isinstance(coder, UnquantizedMatrix) else 2 ** (coder.bits - 1) - 1
        if isinstance(coder, UnquantizedMatrix):
            q = take(f"{name}.q", shape, INT32, -largest, largest)
            params[name] = FixedPoint(q, take(f"{name}.exponent", coder.scale_shape(shape), INT32, *EXPONENTS))
            continue
        if coder.bits <= 4:
            rows, columns = (1, *shape)[-2:]
            packed = take(f"{name}.q", (rows, -(-columns // 2)), UINT8, 0, 255)
            q = within(f"{name}.q", unpack4(packed, columns).reshape(shape), -largest, largest)
        else:
            q = take(f"{name}.q", shape, INT8, -largest, largest)
        scale = take(f"{name}.scale", coder.scale_shape(shape), FLOAT32, *SCALES)
        params[name] = Codes(q, scale, coder.bits)
        if isinstance(coder, ParameterGrouped):
            steps = take(f"{name}.steps", coder.steps_shape(shape), UINT8, 1, STEPPED // largest)
            params[name] = Codes(q, scale, coder.bits, steps, coder.group)
    if config.tie_embeddings:
        embedding = params["embedding.weight"]
        if isinstance(embedding, np.ndarray):
            params["lm_head.weight"] = quantize_parameter(embedding, "lm_head.weight", "embedding.weight", scheme)
        else:
            params["lm_head.weight"] = embedding
    for name, (shape, dtype) in site_values(config, scheme).items():
        low, high = (0, SCALES[1]) if dtype is np.float32 else (-FARTHEST, FARTHEST)
        params[name] = take(name, shape, np.dtype(dtype), low, high)
    refuse_others(tensors, taken)
    return QuantizedModel(config, scheme, params)
