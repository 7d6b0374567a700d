"""Weight files: safetensors, or what torch saves, as memory maps."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from refmamba.errors import CheckpointError, TensorError, printable
from refmamba.formats.reading import read_json, there

# The types that are read, by their names in safetensors. NumPy has no bfloat16: its 16 bits are carried as an unsigned
# integer.
SAFETENSORS_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "|i1", "U8": "|u1", "I32": "<i4"}


FLOAT32, FLOAT16, BFLOAT16 = np.dtype("<f4"), np.dtype("<f2"), np.dtype("<u2")


INT8, UINT8, INT32 = np.dtype("i1"), np.dtype("u1"), np.dtype("<i4")


class Stored(NamedTuple):
    """A tensor in a file: a view of the memory map, in the file's own type."""

    file: Path
    array: NDArray[Any]


class WeightFiles(NamedTuple):
    """Which files of a folder hold its weights. list_file: the index that names the shards, where there are several."""

    list_file: Path | None
    shards: list[Path]
    open_file: Callable[[Path], dict[str, Stored]]

    def names(self) -> list[Path]:
        """All of them."""
        return [*([] if self.list_file is None else [self.list_file]), *self.shards]


def weight_files(folder: Path) -> WeightFiles:
    """The files that `open_weights` reads. Raises FileError, CheckpointError."""
    formats = {"model.safetensors": open_safetensors, "pytorch_model.bin": _open_torch}
    for name, open_file in formats.items():
        file, index = folder / name, folder / f"{name}.index.json"
        if there(file):
            return WeightFiles(None, [file], open_file)
        if there(index):
            return WeightFiles(index, [folder / shard for shard in _shards(index)], open_file)
    raise CheckpointError(f"{folder}: no weights; a model folder has a model.safetensors or a pytorch_model.bin")


def _shards(index: Path) -> list[str]:
    """The files that an index names, all of them in its own folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map is missing or broken; download it again")
    for shard in sorted(set(weight_map.values())):
        if shard in ("", ".", "..") or not shard.isprintable() or set(shard) & set("/\\:"):
            raise CheckpointError(f"{index}: '{printable(shard, 60)}' is not the plain name of a file beside it")
    return sorted(set(weight_map.values()))


def open_weights(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder by canonical name: in one file, or in shards with an index. Raises FileError, CheckpointError."""
    files, tensors = weight_files(folder), dict[str, Stored]()
    for shard in files.shards:
        for key, tensor in files.open_file(shard).items():
            name = _canonical(key)
            if name in tensors:
                raise TensorError(f"{shard}: tensor {printable(key, 60)} is there twice, here and in {tensors[name].file.name}")
            tensors[name] = tensor
    return tensors


def _canonical(name: str) -> str:
    """Our name of a parameter: `layers.0.D` for `backbone.layers.0.mixer.D`."""
    name = name.removeprefix("backbone.").replace(".mixer.", ".")
    return "embedding.weight" if name == "embeddings.weight" else name


def file_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a parameter in a checkpoint: PyTorch's convolution has a middle axis, the channels of a group."""
    return (shape[0], 1, shape[1]) if name.endswith("conv1d.weight") else shape


def open_safetensors(file: Path) -> dict[str, Stored]:
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
        if entry["dtype"] not in SAFETENSORS_TYPES:
            raise CheckpointError(f"{file}: tensor {name} is {entry['dtype']}; only {', '.join(SAFETENSORS_TYPES)} are read")
        first, last = entry["data_offsets"]
        array = np.asarray(data[start + first : start + last]).view(SAFETENSORS_TYPES[entry["dtype"]])
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
    except Exception as error:  # torch and its unpickler raise anything for a broken file
        raise CheckpointError(
            f"{file}: truncated, or not plain tensors as torch 1.6 and later save them; download it again"
        ) from error


def checked(where: Path, tensors: dict[str, Stored], name: str, shape: tuple[int, ...], *dtypes: np.dtype[Any]) -> NDArray[Any]:
    """The named tensor. Raises CheckpointError where it is missing, or not of this shape and one of these types."""
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


def refuse_others(tensors: dict[str, Stored], names: Iterable[str]) -> None:
    """Raise CheckpointError for a tensor beside `names`: the model is not the one that config.json describes."""
    for name in sorted(tensors.keys() - names):
        raise CheckpointError(f"{tensors[name].file}: tensor {name} has no place in the model of config.json")
