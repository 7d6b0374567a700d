"""Quantized folders: what `refmamba quantize` saves and every command loads.

config.json: as Hugging Face's, with "refmamba": {"spec_version", "scheme"}.
model.safetensors: of a parameter X that is coded X.q (int8, or up to 4 bits two codes a byte) and X.scale; in fixed point
X.q (int32) and X.exponent; else X itself, float32. Of a static input its .absmax and .smooth. A tied head is not saved: it
is the embedding's codes, or follows from the embedding.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from refmamba.errors import CheckpointError, SchemeError
from refmamba.formats.checkpoint import HUGGING_FACE
from refmamba.formats.files import read_json
from refmamba.formats.weights import FLOAT32, INT8, INT32, UINT8, checked, open_safetensors, refuse_others
from refmamba.formats.writing import new_folder
from refmamba.spec import SPEC_VERSION
from refmamba.spec.coders import UnquantizedMatrix
from refmamba.spec.codes import Codes, FixedPoint, Param, pack4, unpack4
from refmamba.spec.config import MambaConfig
from refmamba.spec.parameters import QuantizedModel, kind_of, parameter_coder, quantize_parameter, site_values
from refmamba.spec.scheme import scheme_from_json


def save_quantized(model: QuantizedModel, folder: Path, tokenizer: Path) -> None:
    """Save a model, and its tokenizer.json with what lies beside that, in a new folder: whole or not at all.

    Raises CheckpointError for a folder that exists and is not empty, or that cannot be written.
    """
    config = {key: getattr(model.config, field) for field, (key, _, _) in HUGGING_FACE.items()}
    if tokenizer.with_name("config.json").is_file():  # it names the end token where tokenizer_config.json does not
        source = read_json(tokenizer.with_name("config.json"))
        config |= {key: source[key] for key in ("bos_token_id", "eos_token_id") if key in source}
    saved = {"spec_version": SPEC_VERSION, "scheme": model.scheme.to_json()}
    with new_folder(folder) as aside:
        for file in (tokenizer, tokenizer.with_name("tokenizer_config.json")):
            if file.exists():
                shutil.copyfile(file, aside / file.name)
        text = json.dumps({"model_type": "refmamba", **config, "refmamba": saved}, indent=2)
        (aside / "config.json").write_text(text + "\n", "utf-8")
        try:
            save_file(dict(arrays(model)), aside / "model.safetensors")
        except SafetensorError as error:
            raise OSError(str(error)) from error
        shutil.copymode(aside / "config.json", aside / "model.safetensors")  # the library makes it readable by its owner only


def arrays(model: QuantizedModel) -> Iterator[tuple[str, NDArray[Any]]]:
    """The arrays that are saved of a model, by name."""
    for name in sorted(model.params):
        if name == "lm_head.weight" and model.config.tie_embeddings:
            continue
        param = model.params[name]
        if isinstance(param, Codes):
            yield f"{name}.q", pack4(np.atleast_2d(param.q)) if param.bits <= 4 else param.q
            yield f"{name}.scale", np.asarray(param.scale)
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

    def take(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        taken.add(name)
        return checked(folder, tensors, name, shape, dtype)

    for name, shape in shapes.items():
        coder = parameter_coder(kind_of(name), scheme)
        if coder is None:
            params[name] = take(name, shape, FLOAT32)
        elif isinstance(coder, UnquantizedMatrix):
            exponent = take(f"{name}.exponent", coder.scale_shape(shape), INT32)
            params[name] = FixedPoint(take(f"{name}.q", shape, INT32), exponent)
        else:
            if coder.bits <= 4:
                rows, columns = (1, *shape)[-2:]
                q = unpack4(take(f"{name}.q", (rows, -(-columns // 2)), UINT8), columns).reshape(shape)
            else:
                q = take(f"{name}.q", shape, INT8)
            params[name] = Codes(q, take(f"{name}.scale", coder.scale_shape(shape), FLOAT32), coder.bits)
    if config.tie_embeddings:
        embedding = params["embedding.weight"]
        if isinstance(embedding, np.ndarray):
            params["lm_head.weight"] = quantize_parameter(embedding, "lm_head.weight", "embedding.weight", scheme)
        else:
            params["lm_head.weight"] = embedding
    for name, (shape, dtype) in site_values(config, scheme).items():
        params[name] = take(name, shape, np.dtype(dtype))
    refuse_others(tensors, taken)
    return QuantizedModel(config, scheme, params)
