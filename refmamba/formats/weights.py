"""Weight files: safetensors, or what torch saves, as memory maps."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from refmamba.errors import CheckpointError, TensorError, WeightFileError, printable
from refmamba.formats.foreign import what_is_there
from refmamba.formats.reading import MEGABYTE, exists, parse_object, read_json, read_start

FLOAT32, FLOAT16, FLOAT64, BFLOAT16 = np.dtype("<f4"), np.dtype("<f2"), np.dtype("<f8"), np.dtype("<u2")
INT8, UINT8, INT32 = np.dtype("i1"), np.dtype("u1"), np.dtype("<i4")
FLOATS: tuple[np.dtype[Any], ...] = (FLOAT32, FLOAT16, BFLOAT16, FLOAT64)
# The types that are read, by their names in safetensors, and by what messages call them. NumPy has no bfloat16: its 16 bits
# are carried as an unsigned integer.
SAFETENSORS_TYPES: dict[str, np.dtype[Any]] = {
    "F32": FLOAT32, "F16": FLOAT16, "BF16": BFLOAT16, "F64": FLOAT64, "I8": INT8, "U8": UINT8, "I32": INT32
}  # fmt: skip
TYPE_NAMES = {dtype: dtype.name for dtype in SAFETENSORS_TYPES.values()} | {BFLOAT16: "bfloat16"}
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")  # of what wraps a model when it is saved
HEADER_BYTES = 8 * MEGABYTE  # of a safetensors file


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
        if exists(file):
            return WeightFiles(None, [file], open_file)
        if exists(index):
            return WeightFiles(index, [folder / shard for shard in _shards(index)], open_file)
    raise what_is_there(folder)


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
    """Our name of a parameter: `layers.0.D` for `backbone.layers.0.mixer.D`, whatever wrapped the model."""
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    name = name.replace(".mixer.", ".")
    return "embedding.weight" if name == "embeddings.weight" else name


def file_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a parameter in a checkpoint: PyTorch's convolution has a middle axis, the channels of a group."""
    return (shape[0], 1, shape[1]) if name.endswith("conv1d.weight") else shape


def widened(array: NDArray[Any]) -> NDArray[np.float32]:
    """Floats of a file's type as float32 in C order, and a view where they are: float64 is rounded, to nearest."""
    if array.dtype == BFLOAT16:  # the upper half of a float32
        array = (array.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # of a float64: an infinity, which is refused where a code is made of it
        return np.require(array, np.float32, ["C", "A"])


def open_safetensors(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file as views of a private memory map. Raises FileError, WeightFileError, TensorError."""
    length = int.from_bytes(read_start(file, 8), "little")
    if length > HEADER_BYTES:
        raise WeightFileError(f"{file}: truncated, or not safetensors: it would begin with {length} bytes of names")
    try:
        with safe_open(file, framework="numpy"):  # the library checks the header, each offset and the file's length
            pass
    except (SafetensorError, OSError) as error:
        reason = printable(str(error), 100)
        raise WeightFileError(f"{file}: truncated, or not safetensors ({reason}); download it again") from error
    data = np.memmap(file, np.uint8, "c")
    start = 8 + length
    header = parse_object(data[8:start].tobytes(), str(file))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in SAFETENSORS_TYPES:
            types = ", ".join(SAFETENSORS_TYPES)
            raise TensorError(f"{file}: tensor {printable(name, 60)} is {entry['dtype']}; only {types} are read")
        first, last = entry["data_offsets"]
        array = np.asarray(data[start + first : start + last]).view(SAFETENSORS_TYPES[entry["dtype"]])
        try:
            tensors[name] = Stored(file, array.reshape(entry["shape"]))
        except (ValueError, OverflowError):
            shape = printable(str(entry["shape"]), 60)
            raise TensorError(f"{file}: tensor {printable(name, 60)} has the shape {shape}, which no array has") from None
    return tensors


def _open_torch(file: Path) -> dict[str, Stored]:
    """The tensors of a file that torch saved, as views of a memory map; of a checkpoint with a state_dict, that one's.

    Raises FileError, WeightFileError, TensorError; CheckpointError where torch is not installed.
    """
    read_start(file, 1)
    try:
        import torch
    except ImportError:
        raise CheckpointError(f"{file}: to read this format install torch: pip install 'refmamba[torch]'") from None
    try:
        # weights_only: a plain unpickle runs whatever program the file holds.
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch and its unpickler raise anything for a broken file
        raise WeightFileError(
            f"{file}: truncated, or not plain tensors as torch 1.6 and later save them; download it again"
        ) from error
    if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):
        tensors = tensors["state_dict"]
    if not isinstance(tensors, dict):
        raise WeightFileError(f"{file}: holds no dictionary of tensors; save the model's state_dict")
    stored = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise WeightFileError(f"{file}: {printable(repr(name), 60)} is no tensor with a name; save the model's state_dict")
        held = tensor.layout == torch.strided and tensor.numel() <= tensor.untyped_storage().nbytes() // tensor.element_size()
        if not held:
            raise TensorError(f"{file}: tensor {printable(name, 60)} is not stored value by value; save it as a plain tensor")
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise TensorError(f"{file}: tensor {printable(name, 60)} is {kind}; only {_names(FLOATS)} are read")
        bits = tensor.detach().view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor.detach().resolve_neg()
        stored[name] = Stored(file, bits.numpy())
    return stored


def _names(types: Iterable[np.dtype[Any]]) -> str:
    return ", ".join(TYPE_NAMES[dtype] for dtype in types)


def checked(where: Path, tensors: dict[str, Stored], name: str, shape: tuple[int, ...], *dtypes: np.dtype[Any]) -> NDArray[Any]:
    """The named tensor. Raises TensorError where it is missing, or not of this shape and one of these types."""
    if name not in tensors:
        raise TensorError(f"{where}: the weights have no tensor {name}; download or save the model again")
    file, array = tensors[name]
    if array.shape != shape:
        actual = printable(str(array.shape), 60)
        raise TensorError(f"{file}: tensor {name} has the shape {actual}, config.json asks for {shape}; they are of two models")
    if array.dtype not in dtypes:
        raise TensorError(f"{file}: tensor {name} is {TYPE_NAMES[array.dtype]}, not {_names(dtypes)}")
    return array


def refuse_others(tensors: dict[str, Stored], names: Iterable[str]) -> None:
    """Raise TensorError for a tensor beside `names`: the model is not the one that config.json describes."""
    for name in sorted(tensors.keys() - names):
        raise TensorError(f"{tensors[name].file}: tensor {printable(name, 60)} has no place in the model of config.json")
