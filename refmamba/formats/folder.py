"""A model of any kind: a float checkpoint in either layout, a quantized folder, or a GGUF file."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from refmamba.errors import CheckpointError, ForeignModelError, TokenizerError
from refmamba.formats.checkpoint import Checkpoint, read_config
from refmamba.formats.foreign import what_is_there
from refmamba.formats.gguf import is_gguf, open_gguf
from refmamba.formats.hub import ModelFiles
from refmamba.formats.quantized import arrays, open_quantized
from refmamba.formats.reading import exists, read_json
from refmamba.formats.tokenizer import read_parts
from refmamba.formats.weights import weight_files
from refmamba.spec.config import ParameterSource
from refmamba.spec.parameters import QuantizedModel


def open_checkpoint(folder: Path) -> ParameterSource | QuantizedModel:
    """The model in a folder or a GGUF file: a QuantizedModel where `save_quantized` wrote it, else a float checkpoint.

    Raises FileError or CheckpointError, which names the file and says what to do, for a file that is missing, truncated or not
    what it should be, for a model that is not a Mamba-1, and for a tensor that is missing, superfluous, or of another shape or
    type.
    """
    if is_gguf(folder):
        return open_gguf(folder)
    file = folder / "config.json"
    if not exists(file):
        foreign = what_is_there(folder)
        if isinstance(foreign, ForeignModelError):
            raise foreign
        raise CheckpointError(f"{file}: no such file; a model folder has a config.json and the weights")
    values = read_json(file)
    if "refmamba" in values:
        return open_quantized(folder, read_config(file, values), values["refmamba"])
    return Checkpoint(folder, read_config(file, values))


def opened_files(files: ModelFiles) -> list[Path]:
    """Every file that is read of a model: what it is, and so its results, depend on these alone. Raises RefmambaError."""
    return [*_weights(files), *read_parts(files).files]


def model_files(files: ModelFiles) -> list[Path]:
    """Every file that is read of a model; of one without a tokenizer those of the weights alone. Raises RefmambaError."""
    try:
        return opened_files(files)
    except TokenizerError:
        return _weights(files)


def _weights(files: ModelFiles) -> list[Path]:
    """The files that hold a model's sizes and weights."""
    if is_gguf(files.folder):
        return [files.folder]
    return [files.folder / "config.json", *weight_files(files.folder).names()]


def content_hash(model: ParameterSource | QuantizedModel) -> str:
    """SHA-256 of what a model is: the norm's epsilon, then each tensor's name, type, shape and little-endian values.

    Of a float checkpoint the float32 values count, so all layouts and types that hold the same give the same hash.
    """
    if isinstance(model, QuantizedModel):
        tensors: Iterator[tuple[str, NDArray[Any]]] = arrays(model)
    else:
        tensors = ((name, model.read(name)) for name in (*model.config.shapes(), *model.config.state_matrices()))
    digest = hashlib.sha256(f"norm_eps {model.config.norm_eps!r}\n".encode())
    for name, array in tensors:
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()
