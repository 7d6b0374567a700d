"""Reading a model folder, tensor by tensor: Hugging Face's layout and that of the original state-spaces repositories.

A file is opened as a memory map, its names and shapes are compared with config.json at once, and a tensor becomes float32
only when it is asked for. So a model can be quantized without ever being held in float32.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from refmamba import SPEC_VERSION
from refmamba.arith import F32Array
from refmamba.config import MambaConfig
from refmamba.errors import CheckpointError, SchemeError
from refmamba.model import ParameterSource, QuantizedModel
from refmamba.quantize import Codes, FixedPoint, Param, pack4, unpack4
from refmamba.scheme import LINEAR_WEIGHTS, scheme_from_json

# safetensors' names of the types used here. NumPy has no bfloat16: its 16 bits are carried as an unsigned integer.
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "|i1", "U8": "|u1", "I16": "<i2", "I32": "<i4"}
BFLOAT16 = np.dtype("<u2")
FLOATS = (np.dtype("<f4"), np.dtype("<f2"), BFLOAT16)

# Field of MambaConfig: key in config.json, value where the key is absent (REQUIRED: it must not be).
REQUIRED = object()
HUGGING_FACE = {
    "d_model": ("hidden_size", REQUIRED),
    "n_layer": ("num_hidden_layers", REQUIRED),
    "vocab_size": ("vocab_size", REQUIRED),
    "d_state": ("state_size", 16),
    "d_conv": ("conv_kernel", 4),
    "expand": ("expand", 2),
    "dt_rank": ("time_step_rank", "auto"),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "use_bias": ("use_bias", False),
    "use_conv_bias": ("use_conv_bias", True),
}
STATE_SPACES = {key: (key, REQUIRED) for key in ("d_model", "n_layer", "vocab_size")}
STATE_SPACES_SSM = {
    "d_state": ("d_state", 16),
    "d_conv": ("d_conv", 4),
    "expand": ("expand", 2),
    "dt_rank": ("dt_rank", "auto"),
    "use_bias": ("bias", False),
    "use_conv_bias": ("conv_bias", True),
}


class Stored(NamedTuple):
    """A tensor in a file: a view of the memory map, in the file's own type."""

    file: Path
    array: NDArray[Any]


class Checkpoint:
    """A float model folder (a ParameterSource).

    Raises CheckpointError, with the file's name and what to do, for a file that is missing, truncated or not what it should
    be, a model that is not a Mamba of the first kind, and a tensor that is missing, superfluous or of another shape.
    """

    def __init__(self, folder: Path) -> None:
        config = read_config(folder)
        self._tensors = _tensors(folder)
        embedding, head = self._tensors.get("embedding.weight"), self._tensors.get("lm_head.weight")
        if embedding is not None and embedding.array.ndim == 2 and len(embedding.array) > config.vocab_size:
            config = replace(config, vocab_size=len(embedding.array))  # rows that pad the vocabulary
        if head is not None and embedding is not None and np.array_equal(head.array, embedding.array):
            del self._tensors["lm_head.weight"]
            head = None
        self.config = replace(config, tie_embeddings=head is None)
        self._check(folder)

    def _check(self, folder: Path) -> None:
        """The files hold what config.json promises: every tensor, of this shape, of a float type, and nothing else."""
        shapes = self.config.shapes()
        for name, expected in shapes.items():
            if name not in self._tensors:
                raise CheckpointError(f"{folder}: the weights have no tensor {name}; the download is not complete")
            file, array = self._tensors[name]
            if name.endswith("conv1d.weight"):
                expected = (expected[0], 1, expected[1])  # PyTorch's middle axis: input channels of a group
            if array.shape != expected:
                raise CheckpointError(
                    f"{file}: tensor {name} has the shape {array.shape}, config.json asks for {expected}; "
                    "the two are not of one model"
                )
            if array.dtype not in FLOATS:
                raise CheckpointError(f"{file}: tensor {name} is {array.dtype}; only float32, float16 and bfloat16 are read")
        for name in self._tensors.keys() - shapes.keys():
            raise CheckpointError(f"{self._tensors[name].file}: tensor {name} is not part of a Mamba of this config.json")

    def read(self, name: str) -> F32Array:
        """One parameter: a new float32 array, its shape that of MambaConfig.shapes()."""
        array = self._tensors[name].array
        if array.dtype == BFLOAT16:  # the upper half of a float32
            array = (array.astype(np.uint32) << 16).view(np.float32)
        return np.array(array, np.float32).reshape(self.config.shapes()[name])


def content_hash(source: ParameterSource) -> str:
    """SHA-256 of the model: the norm's epsilon, then each name, shape and little-endian float32 values, in order.

    The same for a checkpoint in every layout and, where the values are, in every float type.
    """
    digest = hashlib.sha256(f"norm_eps {source.config.norm_eps!r}\n".encode())
    for name in source.config.shapes():
        values = source.read(name)
        digest.update(f"{name} {values.shape}\n".encode())
        digest.update(values.astype("<f4", copy=False).data)
    return digest.hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError where there is none."""
    try:
        value = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; a model folder has a config.json and the weights") from None
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: a JSON object is expected; download it again")
    return value


def read_config(folder: Path) -> MambaConfig:
    """The shape of the model in a folder, as its config.json states it. Raises CheckpointError."""
    file = folder / "config.json"
    values = read_json(file)

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"{file}: {what}; only Mamba (the first, with RMS norms) is implemented")

    # Hugging Face's published files carry the original keys as well, so theirs are looked for first.
    if "model_type" in values or "hidden_size" in values:
        if values.get("model_type", "mamba") != "mamba":
            raise refuse(f"model_type is {values['model_type']!r}")
        if values.get("hidden_act", "silu") != "silu":
            raise refuse(f"hidden_act is {values['hidden_act']!r}")
        fields = _fields(file, values, HUGGING_FACE)
    elif "d_model" in values:
        ssm = values.get("ssm_cfg") or {}
        if ssm.get("layer", "Mamba1") != "Mamba1":
            raise refuse(f"ssm_cfg.layer is {ssm['layer']!r}")
        if values.get("attn_layer_idx"):
            raise refuse(f"attn_layer_idx is {values['attn_layer_idx']!r}")
        if values.get("d_intermediate"):
            raise refuse(f"d_intermediate is {values['d_intermediate']!r}")
        if not values.get("rms_norm", True):
            raise refuse("rms_norm is false")
        fields = _fields(file, values, STATE_SPACES) | _fields(file, ssm, STATE_SPACES_SSM)
    else:
        raise refuse("there is neither a model_type nor a d_model")
    try:
        return MambaConfig(**fields)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None


def _fields(file: Path, values: dict[str, Any], table: dict[str, tuple[str, Any]]) -> dict[str, Any]:
    """The fields of MambaConfig that a table finds in config.json, their types checked."""
    fields = {}
    for field, (key, default) in table.items():
        value = values.get(key, default)
        if value is REQUIRED:
            raise CheckpointError(f"{file}: the field {key} is missing; download it again")
        if field == "dt_rank" and value == "auto":
            value = 0  # MambaConfig's word for ceil(d_model / 16)
        elif field == "norm_eps":
            if not isinstance(value, float) or not value > 0:
                raise CheckpointError(f"{file}: {key} is {value!r}; it must be a positive number")
        elif field.startswith("use_"):
            if not isinstance(value, bool):
                raise CheckpointError(f"{file}: {key} is {value!r}; it must be true or false")
        elif type(value) is not int or value < 1:
            raise CheckpointError(f"{file}: {key} is {value!r}; it must be a whole number of at least 1")
        fields[field] = value
    return fields


def _tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder by canonical name, whatever the format; one file, or shards and their index."""
    formats: dict[str, Callable[[Path], dict[str, Stored]]] = {
        "model.safetensors": open_safetensors,
        "pytorch_model.bin": _open_torch,
    }
    for name, open_file in formats.items():
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            files = [folder / name]
        elif index.exists():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise CheckpointError(f"{index}: weight_map is missing or not a map of file names; download it again")
            files = [folder / shard for shard in sorted(set(shards.values()))]
        else:
            continue
        return {_canonical(key): tensor for file in files for key, tensor in open_file(file).items()}
    raise CheckpointError(f"{folder}: no weights; a model folder has a model.safetensors or a pytorch_model.bin")


def _canonical(name: str) -> str:
    """A checkpoint's name of a parameter without what differs: backbone.layers.0.mixer.D is layers.0.D."""
    name = name.removeprefix("backbone.").replace(".mixer.", ".")
    return "embedding.weight" if name == "embeddings.weight" else name


def open_safetensors(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file as views of its memory map. Raises CheckpointError."""
    try:
        with safe_open(file, framework="numpy"):  # the library checks the header, every offset and the file's length
            pass
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; the download is not complete") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: truncated or not a safetensors file ({error}); download it again") from None
    data = np.memmap(file, np.uint8, "r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header: dict[str, Any] = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"{file}: tensor {name} is {entry['dtype']}; only {', '.join(DTYPES)} are read")
        first, last = entry["data_offsets"]
        array = np.asarray(data[start + first : start + last]).view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
        tensors[name] = Stored(file, array)
    return tensors


def _open_torch(file: Path) -> dict[str, Stored]:
    """The tensors of a pytorch_model.bin as views of its memory map. Raises CheckpointError."""
    try:
        import torch
    except ImportError:
        raise CheckpointError(f"{file}: reading this format needs torch; pip install 'refmamba[torch]'") from None
    if not file.exists():
        raise CheckpointError(f"{file}: no such file; the download is not complete")
    try:
        # weights_only: an ordinary unpickle would run whatever program the file holds.
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        views = {name: t.view(torch.uint16) if t.dtype == torch.bfloat16 else t for name, t in tensors.items()}
        return {name: Stored(file, t.detach().numpy()) for name, t in views.items()}
    except Exception:  # what torch and its unpickler raise for a broken file is not a closed list
        raise CheckpointError(
            f"{file}: truncated, or not a file of plain tensors as torch 1.6 and later write it; download it again"
        ) from None


# ---------------------------------------------------------------------------------------------- quantized model folders

SAVED = "refmamba"  # the key of config.json that marks a quantized folder


def open_checkpoint(folder: Path) -> Checkpoint | QuantizedModel:
    """A model folder: float weights, or a model that `save_quantized` wrote. Raises CheckpointError."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    return load_quantized(folder) if SAVED in read_json(folder / "config.json") else Checkpoint(folder)


def save_quantized(model: QuantizedModel, folder: Path, tokenizer: Path) -> None:
    """Write a folder that `open_checkpoint` reads: config.json, model.safetensors, and the tokenizer's files.

    Codes are stored in their width (two a byte up to 4 bits), beside them `{name}.scale` or `{name}.exponent`. The folder
    is written aside and renamed. Raises CheckpointError where it exists and is not empty, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: is there already; name a folder that is new or empty")
    tensors: dict[str, NDArray[Any]] = {}
    for name, param in model.params.items():
        if name == "lm_head.weight" and param is model.params["embedding.weight"]:
            continue
        if isinstance(param, Codes):
            tensors[name] = pack4(param.q) if param.bits <= 4 and param.q.ndim == 2 else param.q
            tensors[f"{name}.scale"] = np.asarray(param.scale)
        elif isinstance(param, FixedPoint):
            tensors[name], tensors[f"{name}.exponent"] = param.q, param.exponent
        else:
            tensors[name] = np.asarray(param)
    saved = {"spec_version": SPEC_VERSION, "config": asdict(model.config), "scheme": model.scheme.to_json()}
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        try:
            aside.mkdir(parents=True)
            save_file({name: np.ascontiguousarray(t) if t.ndim else t for name, t in tensors.items()}, aside / "model.safetensors")
            for file in (tokenizer, tokenizer.with_name("tokenizer_config.json")):
                if file.is_file():
                    shutil.copyfile(file, aside / file.name)
            (aside / "config.json").write_text(json.dumps({SAVED: saved}, indent=2) + "\n", "utf-8")
            if folder.exists():
                folder.rmdir()
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error.strerror}") from error


def load_quantized(folder: Path) -> QuantizedModel:
    """Read what `save_quantized` wrote; the codes stay in the memory map. Raises CheckpointError."""
    file = folder / "config.json"
    saved = read_json(file)[SAVED]
    try:
        version, config, scheme = saved["spec_version"], MambaConfig(**saved["config"]), scheme_from_json(saved["scheme"])
    except (KeyError, TypeError, SchemeError, CheckpointError) as error:
        raise CheckpointError(f"{file}: not written by `refmamba quantize`, or changed since ({error})") from None
    if version != SPEC_VERSION:
        raise CheckpointError(f"{file}: of specification {version}, this is {SPEC_VERSION}: quantize the model again")
    tensors = {name: stored.array for name, stored in open_safetensors(folder / "model.safetensors").items()}
    shapes = config.shapes() | {"lm_head.weight": (config.vocab_size, config.d_model)}
    params: dict[str, Param] = {}
    try:
        for name, shape in shapes.items():
            if name == "lm_head.weight" and name not in tensors:
                params[name] = params["embedding.weight"]
                continue
            kind, array = name.split(".", 2)[2] if name.startswith("layers.") else name, tensors.pop(name)
            if quantizer := scheme.weights.get(kind):
                q = unpack4(array, shape[1]) if array.dtype == np.uint8 else array
                params[name] = Codes(q, tensors.pop(f"{name}.scale"), quantizer.bits)
            elif kind in LINEAR_WEIGHTS or kind == "lm_head.weight":
                q = array
                params[name] = FixedPoint(array, tensors.pop(f"{name}.exponent"))
            else:
                q = array
                params[name] = array
            if q.shape != shape:
                raise CheckpointError(f"{folder}: tensor {name} has the shape {q.shape}, not {shape}: quantize the model again")
    except KeyError as error:
        raise CheckpointError(f"{folder}: the weights have no tensor {error}: quantize the model again") from None
    return QuantizedModel(config, scheme, params | tensors)
