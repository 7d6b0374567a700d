"""GGUF files of Mamba-1, as llama.cpp reads and writes them: the container, and the model in it (docs/FORMAT.md, section 1).

The table of keys and tensors is read here, within bounds, and not by the gguf library, whose reader makes an object of every
number and takes any length for true. The library dequantizes; float32, float16, bfloat16 and float64 need no library.
"""

import struct
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refmamba.errors import CheckpointError, ConfigError, ForeignModelError, TensorError, WeightFileError, printable
from refmamba.formats.checkpoint import LARGEST
from refmamba.formats.foreign import ARCHITECTURES, ONLY
from refmamba.formats.reading import TABLE_BYTES, read_start, regular
from refmamba.formats.weights import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, widened
from refmamba.spec.arith import F32Array, log
from refmamba.spec.config import MambaConfig, kind_of

SUFFIX = ".gguf"
MAGIC, VERSIONS = b"GGUF", (2, 3)
# The types of a key's value that have one length, by their number in the file; 8 is a text, 9 an array.
NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"), 1: np.dtype("i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"), 4: np.dtype("<u4"), 5: np.dtype("<i4"),
    6: np.dtype("<f4"), 7: np.dtype("?"), 10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8"),
}  # fmt: skip
TEXT, ARRAY = 8, 9
# The types of a tensor whose numbers stand one by one.
PLAIN: dict[int, np.dtype[Any]] = {0: FLOAT32, 1: FLOAT16, 28: FLOAT64, 30: BFLOAT16}
PLAIN_NAMES = {0: "F32", 1: "F16", 28: "F64", 30: "BF16"}
MOST_AXES = 4
# Where each parameter stands. A stands there itself, where other files have A_log.
NAMES = {"embedding.weight": "token_embd.weight", "norm_f.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
LAYER_NAMES = {
    "norm.weight": "attn_norm.weight", "in_proj.weight": "ssm_in.weight", "conv1d.weight": "ssm_conv1d.weight",
    "conv1d.bias": "ssm_conv1d.bias", "x_proj.weight": "ssm_x.weight", "dt_proj.weight": "ssm_dt.weight",
    "dt_proj.bias": "ssm_dt.bias", "A_log": "ssm_a", "A": "ssm_a", "D": "ssm_d", "out_proj.weight": "ssm_out.weight",
}  # fmt: skip
SIZES = {
    "d_model": "mamba.embedding_length", "n_layer": "mamba.block_count", "d_state": "mamba.ssm.state_size",
    "d_conv": "mamba.ssm.conv_kernel", "dt_rank": "mamba.ssm.time_step_rank",
}  # fmt: skip
INNER, EPS = "mamba.ssm.inner_size", "mamba.attention.layer_norm_rms_epsilon"


def is_gguf(path: Path) -> bool:
    """Whether a name is that of a GGUF file."""
    return path.suffix == SUFFIX


def file_name(name: str) -> str:
    """`blk.0.ssm_d` for `layers.0.D`: a parameter's name in the file."""
    kind = kind_of(name)
    return NAMES[name] if kind == name else f"blk.{name.split('.')[1]}.{LAYER_NAMES[kind]}"


class Tensor(NamedTuple):
    """A tensor in the file. kind: its type there, by number. data: its bytes, a view of the memory map."""

    kind: int
    shape: tuple[int, ...]
    data: NDArray[np.uint8]


class _Bytes:
    """The beginning of a file, read from front to back. Raises WeightFileError where it ends too early."""

    def __init__(self, file: Path, data: NDArray[np.uint8]) -> None:
        self.file, self.data, self.at, self.end = file, data, 0, min(len(data), TABLE_BYTES)

    def take(self, count: int) -> bytes:
        if count > self.end - self.at:
            raise WeightFileError(f"{self.file}: truncated, or not a GGUF file: its keys go on past byte {self.end}")
        self.at += count
        return self.data[self.at - count : self.at].tobytes()

    def number(self, form: str) -> int:
        (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return int(value)

    def text(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8", "backslashreplace")

    def value(self, kind: int) -> Any:
        if kind in NUMBERS:
            return np.frombuffer(self.take(NUMBERS[kind].itemsize), NUMBERS[kind])[0].item()
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            raise WeightFileError(f"{self.file}: has a key of the type {kind}, which no GGUF file has; download it again")
        element, count = self.number("<I"), self.number("<Q")
        if element in NUMBERS:
            content = self.take(count * NUMBERS[element].itemsize)
            return np.frombuffer(content, NUMBERS[element]) if content else np.zeros(0, NUMBERS[element])
        if element != TEXT:
            raise WeightFileError(f"{self.file}: has an array of the type {element}, which is not read")
        if count > self.end - self.at:  # each text has a length at least
            raise WeightFileError(f"{self.file}: truncated, or not a GGUF file: an array of {count} texts")
        return [self.text() for _ in range(count)]


class GGUF(NamedTuple):
    """What a GGUF file holds: values by key (an array of numbers is a NumPy array, one of texts a list), tensors by name."""

    file: Path
    values: dict[str, Any]
    tensors: dict[str, Tensor]

    def scalar(self, key: str, default: Any = None) -> Any:
        """The value of a key that has one number or text; the default where it is missing. Raises ConfigError for an array."""
        value = self.values.get(key, default)
        if isinstance(value, np.ndarray | list):
            raise ConfigError(f"{self.file}: {key} is an array, and must be one value; download it again")
        return value


def read_gguf(file: Path) -> GGUF:
    """The table of a GGUF file; the tensors are views of a private memory map. Raises FileError, CheckpointError."""
    if read_start(file, 4) != MAGIC:
        raise WeightFileError(f"{file}: not a GGUF file, though its name ends in {SUFFIX}; download it again")
    start = _Bytes(file, np.memmap(regular(file), np.uint8, "c"))
    start.take(len(MAGIC))
    version = start.number("<I")
    if version not in VERSIONS:
        order = " of the other byte order" if version & 0xFFFF == 0 else f" of version {version}"
        raise WeightFileError(f"{file}: a GGUF file{order}; versions 2 and 3 in little-endian order are read")
    n_tensors, n_keys = start.number("<Q"), start.number("<Q")
    values = dict[str, Any]()
    for _ in range(n_keys):
        key = start.text()
        if key in values:
            raise WeightFileError(f"{file}: the key {printable(key, 60)} is there twice; download it again")
        values[key] = start.value(start.number("<I"))
    entries = [_entry(start) for _ in range(n_tensors)]
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise WeightFileError(f"{file}: general.alignment is {printable(repr(alignment), 40)}, and no power of two")
    first = -(-start.at // alignment) * alignment
    tensors = dict[str, Tensor]()
    for name, kind, shape, offset in entries:
        size = _size(file, name, kind, shape)
        begin = first + offset
        if name in tensors or offset % alignment or begin + size > len(start.data):
            wrong = "there twice" if name in tensors else "not where the file's table says: it is truncated, or broken"
            raise WeightFileError(f"{file}: tensor {printable(name, 60)} is {wrong}; download it again")
        tensors[name] = Tensor(kind, shape, np.asarray(start.data[begin : begin + size]))
    return GGUF(file, values, tensors)


def _entry(start: _Bytes) -> tuple[str, int, tuple[int, ...], int]:
    """A tensor's name, type, shape (the file has the last axis first) and offset."""
    name, axes = start.text(), start.number("<I")
    if axes > MOST_AXES:
        raise WeightFileError(
            f"{start.file}: tensor {printable(name, 60)} has {axes} axes; a GGUF file has at most {MOST_AXES}"
        )
    shape = tuple(start.number("<Q") for _ in range(axes))[::-1]
    return name, start.number("<I"), shape, start.number("<Q")


def _size(file: Path, name: str, kind: int, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor. Raises TensorError for a type that is not read, or a row that is no whole number of blocks."""
    if kind in PLAIN:
        return prod(shape) * PLAIN[kind].itemsize
    what = f"{file}: tensor {printable(name, 60)}"
    block, size = _quantized(kind, what)
    if not shape or shape[-1] % block:
        raise TensorError(f"{what} has the shape {shape}, and its type has blocks of {block} columns; download it again")
    return prod(shape) // block * size


def _quantized(kind: int, what: str) -> tuple[int, int]:
    """Values and bytes of a block of a type that the gguf library dequantizes. Raises CheckpointError, TensorError."""
    library = gguf_library(what)
    try:
        name = library.GGMLQuantizationType(kind)
        block, size = library.GGML_QUANT_SIZES[name]
        library.dequantize(np.zeros((1, size), np.uint8), name)
    except (ValueError, KeyError, NotImplementedError):
        raise TensorError(f"{what} is of the type {kind}, which the gguf library does not dequantize") from None
    return int(block), int(size)


def gguf_library(what: str) -> Any:
    """The gguf library. Raises CheckpointError, which begins with `what`, where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise CheckpointError(f"{what}: to read or write this install gguf: pip install 'refmamba[gguf]'") from None
    return gguf


@dataclass(frozen=True, eq=False)
class GGUFCheckpoint:
    """The float model in a GGUF file: a ParameterSource. A is taken as it stands there, and A_log := log(-A), eq. (2)."""

    gguf: GGUF
    config: MambaConfig

    def read(self, name: str) -> F32Array:
        """One parameter, float32 and read-only; where the file holds float32, a view of its memory map. Nothing is cached.

        Raises TensorError for an A that is not negative.
        """
        tensor = self.gguf.tensors[file_name(name)]
        if tensor.kind in PLAIN:
            x = widened(tensor.data.view(PLAIN[tensor.kind]))
        else:
            library = gguf_library(str(self.gguf.file))
            with np.errstate(all="ignore"):  # of what broken blocks hold; a NaN is refused where a code is made of it
                x = library.dequantize(tensor.data, library.GGMLQuantizationType(tensor.kind))
        x = x.reshape(tensor.shape)
        if kind_of(name) in ("A", "A_log"):
            if not np.all(x <= 0):
                raise TensorError(f"{self.gguf.file}: tensor {file_name(name)} has values above zero, as no A has")
            x = log(-x) if kind_of(name) == "A_log" else x
        x.flags.writeable = False
        return x

    def types(self) -> dict[str, int]:
        """The types of the tensors by name, and how many have each."""
        counts = dict[str, int]()
        for tensor in self.gguf.tensors.values():
            name = PLAIN_NAMES.get(tensor.kind) or gguf_library("").GGMLQuantizationType(tensor.kind).name
            counts[name] = counts.get(name, 0) + 1
        return counts


def open_gguf(file: Path) -> GGUFCheckpoint:
    """The model in a GGUF file. Its tensors are read when they are asked for. Raises FileError, CheckpointError."""
    gguf = read_gguf(file)
    _refuse_foreign(gguf)
    config = _config(gguf)
    expected = {file_name(name): shape for name, shape in config.shapes().items()}
    for name, shape in expected.items():
        if name not in gguf.tensors:
            raise TensorError(f"{file}: there is no tensor {name}; download or write the file again")
        if gguf.tensors[name].shape != shape:
            actual = gguf.tensors[name].shape
            raise TensorError(f"{file}: tensor {name} has the shape {actual}, and the file's keys ask for {shape}")
    if others := sorted(gguf.tensors.keys() - expected.keys()):
        raise TensorError(f"{file}: tensor {printable(others[0], 60)} has no place in the Mamba-1 of the file's keys")
    return GGUFCheckpoint(gguf, config)


def _refuse_foreign(gguf: GGUF) -> None:
    """Raise ForeignModelError for a model that is no Mamba-1, or for one of several parts."""
    architecture = gguf.scalar("general.architecture")
    if architecture != "mamba":
        name = ARCHITECTURES.get(str(architecture), f"of the architecture {printable(repr(architecture), 60)}")
        raise ForeignModelError(f"{gguf.file}: this is {name}; {ONLY}")
    if gguf.scalar("mamba.ssm.dt_b_c_rms"):
        raise ForeignModelError(f"{gguf.file}: this is {ARCHITECTURES['falcon_mamba']} (ssm.dt_b_c_rms is set); {ONLY}")
    if gguf.scalar("split.count", 1) not in (0, 1):
        raise ForeignModelError(f"{gguf.file}: is a part of a model; join the parts first: llama-gguf-split --merge")


def _config(gguf: GGUF) -> MambaConfig:
    """The model's shape as the keys and the embedding state it. Raises ConfigError, TensorError."""

    def entry(key: str, kind: type[Any], largest: float) -> Any:
        value: Any = gguf.values.get(key)
        typed: bool = type(value) is kind
        if not typed or not 0 < value <= largest:
            told = printable(repr(value), 60) if key in gguf.values else "missing"
            raise ConfigError(f"{gguf.file}: {key} is {told}; it must be of type {kind.__name__}, above 0, at most {largest:g}")
        return value

    sizes = {field: entry(key, int, LARGEST[field]) for field, key in SIZES.items()}
    inner = entry(INNER, int, LARGEST["d_model"] * LARGEST["expand"])
    if inner % sizes["d_model"]:
        raise ConfigError(f"{gguf.file}: {INNER} is {inner}, and no multiple of {SIZES['d_model']}, {sizes['d_model']}")
    embedding, head = (gguf.tensors.get(NAMES[name]) for name in ("embedding.weight", "lm_head.weight"))
    if embedding is None or len(embedding.shape) != 2 or not 0 < embedding.shape[0] <= LARGEST["vocab_size"]:
        raise TensorError(f"{gguf.file}: there is no tensor {NAMES['embedding.weight']} of two axes; download it again")
    # The shortest decimal of the float32: of 1e-5 as every other format has it.
    config = MambaConfig(
        **sizes, vocab_size=embedding.shape[0], expand=inner // sizes["d_model"],
        norm_eps=float(str(np.float32(entry(EPS, float, 1)))), states_A=True,
        use_conv_bias=file_name("layers.0.conv1d.bias") in gguf.tensors, tie_embeddings=head is None,
    )  # fmt: skip
    # A tied head may have been written all the same, with the embedding's type and shape.
    if head is not None and head[:2] == embedding[:2] and np.array_equal(head.data, embedding.data):
        del gguf.tensors[NAMES["lm_head.weight"]]
        return replace(config, tie_embeddings=True)
    return config
