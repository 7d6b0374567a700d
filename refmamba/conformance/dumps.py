"""Dumps: numbers that were computed elsewhere, or that the reference shows, by name (docs/FORMAT.md, section 6)."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import deserialize, safe_open
from safetensors.numpy import save

from refmamba.errors import DataError, RefmambaError
from refmamba.formats.reading import parse_object, regular
from refmamba.formats.writing import write_file
from refmamba.spec.arith import IntArray
from refmamba.spec.mamba1 import Mamba, check_tokens
from refmamba.spec.trace import Step, Tracer

Arrays = dict[str, NDArray[Any]]
SUFFIXES = (".npy", ".npz", ".safetensors")
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
          "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1"}  # fmt: skip


@dataclass(frozen=True)
class Dump:
    """Arrays by name: floats as float32 (float64 where the file has it), integers as they are. about: what is told of them."""

    file: Path
    arrays: Arrays
    about: dict[str, Any] = field(default_factory=dict)

    def text(self, entry: str) -> str | None:
        """An entry of `about` that is a text. Raises DataError for anything else."""
        value = self.about.get(entry)
        if not isinstance(value, str | None):
            raise DataError(f"{self.file}: {entry} in `about` is {value!r}; it is a text")
        return value


def read_dump(file: Path) -> Dump:
    """Read a dump. Raises FileError, and DataError for a file that is none."""
    readers: dict[str, Callable[[Path], tuple[Arrays, str]]] = {".npy": _npy, ".npz": _npz, ".safetensors": _safetensors}
    if file.suffix not in readers:
        raise DataError(f"{file}: a dump's name ends with {', '.join(SUFFIXES)}")
    try:
        arrays, text = readers[file.suffix](regular(file))
        about = parse_object(text.encode(), f"{file}: `about`")
    except (RefmambaError, MemoryError):
        raise
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # whatever NumPy, zipfile, tokenize and safetensors say of a broken file
        raise DataError(f"{file}: not a whole {file.suffix} file of numbers: {error}") from error
    for name, array in arrays.items():
        if array.dtype.kind not in "fiu" or array.size == 0:
            raise DataError(f"{file}: {name} is {array.dtype} of the shape {array.shape}; it is numbers, at least one")
    wide = {name: array.astype(np.float32) if array.dtype == np.float16 else array for name, array in arrays.items()}
    return Dump(file, wide, about)


def _npy(file: Path) -> tuple[Arrays, str]:
    array = np.load(file, allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise ValueError("it holds several arrays, as a .npz does")
    return {"logits": array}, "{}"


def _npz(file: Path) -> tuple[Arrays, str]:
    with np.load(file, allow_pickle=False) as entries:
        if isinstance(entries, np.ndarray):
            raise ValueError("it holds one array, as a .npy does")
        arrays = {name: entries[name] for name in entries.files}
    return arrays, str(arrays.pop("about", "{}"))


def _safetensors(file: Path) -> tuple[Arrays, str]:
    arrays = {}
    for name, entry in deserialize(file.read_bytes()):  # type: ignore[no-untyped-call]
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name} is {entry['dtype']}; only {', '.join(DTYPES)} are read")
        array = np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":  # the upper half of a float32
            array = (array.astype(np.uint32) << 16).view(np.float32)
        arrays[name] = array
    with safe_open(file, framework="numpy") as opened:
        return arrays, (opened.metadata() or {}).get("about", "{}")


def write_dump(file: Path, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> None:
    """Write a .safetensors or a .npz. Raises DataError for another name, and where it cannot be written."""
    text = json.dumps(about)
    if file.suffix == ".safetensors":
        data = save(dict(arrays), metadata={"about": text})
        write_file(file, lambda stream: stream.write(data))
    elif file.suffix == ".npz":
        write_file(file, lambda stream: np.savez(stream, allow_pickle=False, about=np.array(text), **arrays))
    else:
        raise DataError(f"{file}: give a name that ends with .safetensors or .npz")


def reference_values(reference: Mamba, tokens: IntArray, tracer: type[Tracer] = Tracer) -> Arrays:
    """Everything that the reference computes for a sequence (L,), in order, by name: each site, of codes also `SITE.scale`
    or `SITE.exponent`, and `logits` (L, vocabulary). Raises DataError, NonFiniteError."""
    values: Arrays = {}

    def look(site: str, value: NDArray[Any]) -> None:
        values[site] = np.array(value, order="C")

    def record(step: Step) -> None:
        for site, value in step.values():
            for part in ("scale", "exponent"):
                if hasattr(value, part):
                    values[f"{site}.{part}"] = np.array(getattr(value, part), order="C")

    state = reference.initial_state(1)
    tokens = check_tokens(tokens, reference.config)
    logits, _, _ = reference.forward(tokens, state.conv[0], state.ssm[0], "all", tracer(look, record))
    return values | {"logits": logits}
