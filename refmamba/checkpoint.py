"""Model folders: Hugging Face's layout, that of the original state-spaces repositories, and our own of quantized models.

A weight file is a memory map. Its names and shapes are compared with config.json when it is opened, and a tensor becomes
float32 only when it is asked for, so a model can be quantized without ever being held in float32.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from refmamba import SPEC_VERSION
from refmamba.arith import F32Array
from refmamba.config import MambaConfig
from refmamba.errors import CheckpointError, DataError, SchemeError
from refmamba.model import ParameterSource, QuantizedModel, quantize_parameter
from refmamba.quantize import Codes, FixedPoint, Param, pack4, unpack4
from refmamba.scheme import LINEAR_WEIGHTS, scheme_from_json
from refmamba.smooth import FOLDED

# The types that are read, by their names in safetensors. NumPy has no bfloat16: its 16 bits are carried as an unsigned
# integer.
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "|i1", "U8": "|u1", "I32": "<i4"}
FLOAT32, FLOAT16, BFLOAT16 = np.dtype("<f4"), np.dtype("<f2"), np.dtype("<u2")
INT8, UINT8, INT32 = np.dtype("i1"), np.dtype("u1"), np.dtype("<i4")

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
HUGGING_FACE_ONLY: Only = {"model_type": ["mamba", "refmamba"], "hidden_act": ["silu"]}
STATE_SPACES_ONLY: Only = {"rms_norm": [True], "attn_layer_idx": [[], None], "d_intermediate": [0]}
STATE_SPACES_SSM_ONLY: Only = {"layer": ["Mamba1"]}


def open_checkpoint(folder: Path) -> ParameterSource | QuantizedModel:
    """The model in a folder: a QuantizedModel where `save_quantized` wrote it, else a float checkpoint.

    Raises CheckpointError, which names the file and says what to do, for a file that is missing, truncated or not what it
    should be, for a model that is not a Mamba of the first kind, and for a tensor that is missing, superfluous, or of
    another shape or type.
    """
    file = folder / "config.json"
    values = _read_json(file)
    if "refmamba" in values:
        return _open_quantized(folder, _config(file, values), values["refmamba"])
    return Checkpoint(folder, _config(file, values))


def open_float(folder: Path, refusal: str) -> ParameterSource:
    """The float checkpoint in a folder. Raises CheckpointError, and DataError with `refusal` where it was saved quantized."""
    opened = open_checkpoint(folder)
    if isinstance(opened, QuantizedModel):
        raise DataError(refusal)
    return opened


class Checkpoint:
    """A float model folder: a ParameterSource."""

    def __init__(self, folder: Path, config: MambaConfig) -> None:
        self._tensors = _open_weights(folder)
        embedding, head = self._tensors.get("embedding.weight"), self._tensors.get("lm_head.weight")
        if embedding is not None and embedding.array.ndim == 2 and len(embedding.array) > config.vocab_size:
            config = replace(config, vocab_size=len(embedding.array))  # the vocabulary is padded
        if head is not None and embedding is not None:  # a tied head may have been saved all the same
            config = replace(config, tie_embeddings=np.array_equal(head.array, embedding.array))
            if config.tie_embeddings:
                del self._tensors["lm_head.weight"]
        self.config = config
        for name, shape in self.config.shapes().items():
            _checked(folder, self._tensors, name, _file_shape(name, shape), FLOAT32, FLOAT16, BFLOAT16)
        _no_others(self._tensors, self.config.shapes())

    def read(self, name: str) -> F32Array:
        """One parameter, float32, read-only: a view of the memory map where the file holds that type. Nothing is kept."""
        array = self._tensors[name].array
        if array.dtype == BFLOAT16:  # the upper half of a float32
            array = (array.astype(np.uint32) << 16).view(np.float32)
        x = np.asarray(array, np.float32).reshape(self.config.shapes()[name])
        x.flags.writeable = False
        return x


def content_hash(model: ParameterSource | QuantizedModel) -> str:
    """SHA-256 of what a model is: the norm's epsilon, then each tensor's name, type, shape and little-endian values.

    Of a float checkpoint the float32 values count, so all layouts and types that hold the same give the same hash.
    """
    if isinstance(model, QuantizedModel):
        arrays: Iterator[tuple[str, NDArray[Any]]] = _arrays(model)
    else:
        arrays = ((name, model.read(name)) for name in model.config.shapes())
    digest = hashlib.sha256(f"norm_eps {model.config.norm_eps!r}\n".encode())
    for name, array in arrays:
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


# --- config.json ------------------------------------------------------------------------------------------------------


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; a model folder has a config.json and the weights") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: not a JSON object; download it again")
    return values


def _config(file: Path, values: dict[str, Any]) -> MambaConfig:
    """The model's shape as config.json states it."""
    # Hugging Face's published files carry the original keys as well, so theirs are looked for first.
    if "model_type" in values or "hidden_size" in values:
        fields = _fields(file, values, HUGGING_FACE, HUGGING_FACE_ONLY)
    else:
        ssm = values.get("ssm_cfg") or {}
        if not isinstance(ssm, dict):
            raise CheckpointError(f"{file}: ssm_cfg is not a JSON object; download it again")
        fields = _fields(file, values, STATE_SPACES, STATE_SPACES_ONLY)
        fields |= _fields(file, ssm, STATE_SPACES_SSM, STATE_SPACES_SSM_ONLY)
    try:
        return MambaConfig(**fields)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None


def _fields(file: Path, values: dict[str, Any], fields: Fields, only: Only) -> dict[str, Any]:
    for key, implemented in only.items():
        if values.get(key, implemented[0]) not in implemented:
            raise CheckpointError(f"{file}: {key} is {values[key]!r}; only Mamba-1 with RMS norms is implemented")
    found = {}
    for field, (key, kind, default) in fields.items():
        value = values.get(key, default)
        if value is None:
            raise CheckpointError(f"{file}: {key} is missing; this is not the config.json of a Mamba, or not all of it")
        if field == "dt_rank" and value == "auto":
            value = 0  # MambaConfig's word for it
        if type(value) is not kind:
            raise CheckpointError(f"{file}: {key} is {value!r}; it must be of type {kind.__name__}")
        found[field] = value
    return found


# --- weight files -----------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """A tensor in a file: a view of the memory map, in the file's own type."""

    file: Path
    array: NDArray[Any]


def _open_weights(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder by canonical name: in one file, or in shards with an index."""
    formats: dict[str, Callable[[Path], dict[str, Stored]]] = {
        "model.safetensors": _open_safetensors,
        "pytorch_model.bin": _open_torch,
    }
    for name, open_file in formats.items():
        file, index = folder / name, folder / f"{name}.index.json"
        if file.exists():
            shards = [name]
        elif index.exists():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
                raise CheckpointError(f"{index}: weight_map is missing or broken; download it again")
            shards = sorted(set(weight_map.values()))
        else:
            continue
        return {_canonical(key): tensor for shard in shards for key, tensor in open_file(folder / shard).items()}
    raise CheckpointError(f"{folder}: no weights; a model folder has a model.safetensors or a pytorch_model.bin")


def _canonical(name: str) -> str:
    """Our name of a parameter: `layers.0.D` for `backbone.layers.0.mixer.D`."""
    name = name.removeprefix("backbone.").replace(".mixer.", ".")
    return "embedding.weight" if name == "embeddings.weight" else name


def _file_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a parameter in a checkpoint: PyTorch's convolution has a middle axis, the channels of a group."""
    return (shape[0], 1, shape[1]) if name.endswith("conv1d.weight") else shape


def _open_safetensors(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file as views of a private memory map."""
    try:
        with safe_open(file, framework="numpy"):  # the library checks the header, each offset and the file's length
            pass
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; download it again") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: truncated, or not safetensors ({error}); download it again") from error
    data = np.memmap(file, np.uint8, "c")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header: dict[str, Any] = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"{file}: tensor {name} is {entry['dtype']}; only {', '.join(DTYPES)} are read")
        first, last = entry["data_offsets"]
        array = np.asarray(data[start + first : start + last]).view(DTYPES[entry["dtype"]])
        tensors[name] = Stored(file, array.reshape(entry["shape"]))
    return tensors


def _open_torch(file: Path) -> dict[str, Stored]:
    """The tensors of a file that torch saved, as views of a memory map."""
    try:
        import torch
    except ImportError:
        raise CheckpointError(f"{file}: to read this format install torch: pip install 'refmamba[torch]'") from None
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; download it again")
    try:
        # weights_only: a plain unpickle runs whatever program the file holds.
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        views = {key: t.view(torch.uint16) if t.dtype == torch.bfloat16 else t for key, t in tensors.items()}
        return {key: Stored(file, t.detach().numpy()) for key, t in views.items()}
    except Exception as error:  # what torch and its unpickler raise for a broken file is no closed list
        raise CheckpointError(
            f"{file}: truncated, or not plain tensors as torch 1.6 and later save them; download it again"
        ) from error


def _checked(
    where: Path, tensors: dict[str, Stored], name: str, shape: tuple[int, ...], *dtypes: np.dtype[Any]
) -> NDArray[Any]:
    """The named tensor, which must be there, of this shape and of one of these types."""
    if name not in tensors:
        raise CheckpointError(f"{where}: the weights have no tensor {name}; download or save the model again")
    file, array = tensors[name]
    if array.shape != shape:
        raise CheckpointError(
            f"{file}: tensor {name} has the shape {array.shape}, config.json asks for {shape}; they are of two models"
        )
    if array.dtype not in dtypes:
        raise CheckpointError(f"{file}: tensor {name} is {array.dtype}, not {' or '.join(map(str, dtypes))}")
    return array


def _no_others(tensors: dict[str, Stored], names: Iterable[str]) -> None:
    """A tensor that nothing reads means that the model is not what config.json makes of it."""
    for name in sorted(tensors.keys() - names):
        raise CheckpointError(f"{tensors[name].file}: tensor {name} has no place in the model of config.json")


# --- quantized models -------------------------------------------------------------------------------------------------
# config.json: as Hugging Face's, with "refmamba": {"spec_version", "scheme"}.
# model.safetensors: of a parameter X that is coded X.q (int8, or up to 4 bits two codes a byte) and X.scale; in fixed
# point X.q (int32) and X.exponent; else X itself, float32. Of a static input its .absmax and .smooth. A tied head is not
# saved: it is the embedding's codes, or follows from the embedding.


def save_quantized(model: QuantizedModel, folder: Path, tokenizer: Path) -> None:
    """Save a model, and its tokenizer.json with what lies beside that, in a new folder: whole or not at all.

    Raises CheckpointError for a folder that is there and not empty, or cannot be written.
    """
    config = {key: getattr(model.config, field) for field, (key, _, _) in HUGGING_FACE.items()}
    if tokenizer.with_name("config.json").is_file():  # names the end token where tokenizer_config.json does not
        source = _read_json(tokenizer.with_name("config.json"))
        config |= {key: source[key] for key in ("bos_token_id", "eos_token_id") if key in source}
    saved = {"spec_version": SPEC_VERSION, "scheme": model.scheme.to_json()}
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder}: is there already and not an empty folder; name another")
        aside.mkdir(parents=True)
        for file in (tokenizer, tokenizer.with_name("tokenizer_config.json")):
            if file.exists():
                shutil.copyfile(file, aside / file.name)
        text = json.dumps({"model_type": "refmamba", **config, "refmamba": saved}, indent=2)
        (aside / "config.json").write_text(text + "\n", "utf-8")
        save_file(dict(_arrays(model)), aside / "model.safetensors")
        shutil.copymode(aside / "config.json", aside / "model.safetensors")  # the library lets only its owner read it
        aside.replace(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _arrays(model: QuantizedModel) -> Iterator[tuple[str, NDArray[Any]]]:
    """What is saved of a model, by name."""
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


def _open_quantized(folder: Path, config: MambaConfig, saved: Any) -> QuantizedModel:
    """What `save_quantized` wrote. Codes of more than 4 bits stay in the memory map."""
    if not isinstance(saved, dict) or saved.get("spec_version") != SPEC_VERSION:
        raise CheckpointError(f"{folder}: not saved under specification {SPEC_VERSION}; quantize the model again")
    try:
        scheme = scheme_from_json(saved.get("scheme"))
    except SchemeError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}; quantize the model again") from error
    tensors = _open_safetensors(folder / "model.safetensors")
    shapes, taken, params = config.shapes(), set[str](), dict[str, Param]()

    def take(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        taken.add(name)
        return _checked(folder, tensors, name, shape, dtype)

    for name, shape in shapes.items():
        kind = name.split(".", 2)[2] if name.startswith("layers.") else name
        if quantizer := scheme.weights.get(kind):
            if quantizer.bits <= 4:
                rows, columns = (1, *shape)[-2:]
                q = unpack4(take(f"{name}.q", (rows, -(-columns // 2)), UINT8), columns).reshape(shape)
            else:
                q = take(f"{name}.q", shape, INT8)
            scale = take(f"{name}.scale", (*shape[:-1], 1) if quantizer.scale == "per_channel" else (), FLOAT32)
            params[name] = Codes(q, scale, quantizer.bits)
        elif kind in LINEAR_WEIGHTS or kind == "lm_head.weight":
            params[name] = FixedPoint(take(f"{name}.q", shape, INT32), take(f"{name}.exponent", shape[:1], INT32))
        else:
            params[name] = take(name, shape, FLOAT32)
    if config.tie_embeddings:
        embedding = params["embedding.weight"]
        if isinstance(embedding, np.ndarray):
            params["lm_head.weight"] = quantize_parameter(embedding, "lm_head.weight", "embedding.weight", scheme)
        else:
            params["lm_head.weight"] = embedding
    if scheme.needs_calibration:
        for name, shape in (shapes | {"lm_head.weight": (config.vocab_size, config.d_model)}).items():
            site = name.removesuffix(".weight")
            layer = site.rsplit(".", 1)[-1]
            if layer in scheme.inputs and name.endswith(".weight"):
                params[f"{site}.absmax"] = take(f"{site}.absmax", (), FLOAT32)
                if layer in scheme.smooth and layer not in FOLDED:
                    params[f"{site}.smooth"] = take(f"{site}.smooth", shape[1:], INT32)
    _no_others(tensors, taken)
    return QuantizedModel(config, scheme, params)
