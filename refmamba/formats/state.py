"""Saved states: what `refmamba generate --save-state` writes, and any backend goes on from (docs/FORMAT.md, section 8)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from refmamba.errors import DataError, printable
from refmamba.formats.reading import parse_object
from refmamba.formats.scheme import scheme_in
from refmamba.formats.weights import FLOAT32, INT32, TYPE_NAMES, open_safetensors
from refmamba.formats.writing import write_file
from refmamba.spec import SPEC_VERSION
from refmamba.spec.arith import F32Array, IntArray
from refmamba.spec.config import MambaConfig
from refmamba.spec.scheme import Scheme

FORMAT = 1
ENTRY = "refmamba_state"  # of the file's metadata
BOUND = ("format", "spec_version", "model_sha256", "scheme", "drawn")


@dataclass(frozen=True, eq=False)
class SavedState:
    """What a state's file holds.

    tokens: (L,) int64, L >= 1, so far. conv: float32 (n_layer, d_inner, d_conv - 1), ssm: float32 (n_layer, d_inner,
    d_state), the state after all of them but the last. drawn: uniform draws, eq. (26), that were taken for them. model_sha256:
    the content hash of the model under the scheme. about: bound by nothing.
    """

    tokens: IntArray
    conv: F32Array
    ssm: F32Array
    drawn: int
    model_sha256: str
    scheme: Scheme
    about: Mapping[str, Any]

    def save(self, file: Path) -> None:
        """Write it, whole or not at all. Raises DataError."""
        values = (FORMAT, SPEC_VERSION, self.model_sha256, self.scheme.to_json(), self.drawn)
        entry = dict(zip(BOUND, values, strict=True)) | {"about": self.about}
        arrays = {"tokens": self.tokens.astype(INT32), "conv": self.conv, "ssm": self.ssm}
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        content = save(arrays, metadata={ENTRY: json.dumps(entry)})
        write_file(file, lambda stream: stream.write(content))


def read_entry(file: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """What a file says of itself, unchecked, and its arrays in a memory map.

    Raises FileError, CheckpointError for a file that is no whole safetensors; DataError for one that is no saved state.
    """
    tensors = {name: tensor.array for name, tensor in open_safetensors(file).items()}
    with safe_open(file, framework="numpy") as opened:
        text = (opened.metadata() or {}).get(ENTRY)
    if text is None:
        raise DataError(f"{file}: is no saved state: its metadata has no {ENTRY}")
    return parse_object(text.encode(), f"{file}: {ENTRY}"), tensors


def open_state(file: Path, config: MambaConfig) -> SavedState:
    """Read what `SavedState.save` wrote, of a model of these sizes; its arrays stay in a memory map.

    Raises FileError, CheckpointError for a file that is no whole safetensors; SchemeError, and DataError for one that no run
    under this specification has made.
    """
    entry, tensors = read_entry(file)
    if entry.get("format") != FORMAT:
        raise DataError(f"{file}: a state of format {printable(repr(entry.get('format')), 60)}; this program reads {FORMAT}")
    if entry.get("spec_version") != SPEC_VERSION:
        version = printable(repr(entry.get("spec_version")), 60)
        raise DataError(f"{file}: saved under specification {version}; this program computes {SPEC_VERSION}")
    if wrong := sorted({*BOUND} ^ (entry.keys() - {"about"})):
        name = printable(wrong[0], 60)
        raise DataError(f"{file}: {ENTRY} has {'no' if wrong[0] in BOUND else 'an'} entry {name}; save the state again")
    scheme = scheme_in(file, entry["scheme"])
    rows, about, drawn = (config.n_layer, config.d_inner), entry.get("about", {}), entry["drawn"]
    tokens = _checked(file, tensors, "tokens", None, INT32).astype(np.int64)
    conv = _checked(file, tensors, "conv", (*rows, config.d_conv - 1), FLOAT32)
    ssm = _checked(file, tensors, "ssm", (*rows, config.d_state), FLOAT32)
    right = {
        "tokens": len(tokens) > 0 and 0 <= tokens.min() <= tokens.max() < config.vocab_size,
        "drawn": type(drawn) is int and 0 <= drawn <= len(tokens),
        "model_sha256": isinstance(entry["model_sha256"], str),
        "about": isinstance(about, dict),
        "an array beside tokens, conv and ssm": len(tensors) == 3,
    }
    for name in (name for name, is_right in right.items() if not is_right):
        raise DataError(f"{file}: {name} is not what docs/FORMAT.md asks for; save the state again")
    return SavedState(tokens, conv, ssm, drawn, entry["model_sha256"], scheme, about)


def _checked(
    file: Path, tensors: Mapping[str, NDArray[Any]], name: str, shape: tuple[int, ...] | None, dtype: np.dtype[Any]
) -> NDArray[Any]:
    """An array of the file. shape: None for any of one axis. Raises DataError."""
    if name not in tensors:
        raise DataError(f"{file}: has no array {name}, so it is no saved state")
    array = tensors[name]
    if array.dtype != dtype or array.ndim != (1 if shape is None else len(shape)) or shape not in (None, array.shape):
        is_, needed = (printable(f"{TYPE_NAMES[x]} {y}", 60) for x, y in ((array.dtype, array.shape), (dtype, shape or "(L,)")))
        raise DataError(f"{file}: the array {name} is {is_}, and this model's state has {needed}; it is another model's")
    return array
