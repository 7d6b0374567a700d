"""Test vectors: data with a source; tests/vectors/README.md tells their format. They lie in the package as `vectors`."""

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refmamba.formats.calibration import load_calibration
from refmamba.formats.folder import open_checkpoint
from refmamba.formats.scheme import open_scheme
from refmamba.spec.arith import F32Array
from refmamba.spec.codes import Codes, FixedPoint
from refmamba.spec.config import ParameterSource
from refmamba.spec.parameters import QuantizedModel
from refmamba.spec.scheme import Scheme

DTYPES = {"f32": "<f4", "f64": "<f8", "i8": "i1", "i16": "<i2", "i32": "<i4", "i64": "<i8", "u8": "u1"}


def vectors_folder() -> Path:
    """Where the vectors lie, in the package as in the clone."""
    return Path(str(resources.files("refmamba") / "vectors"))


def encode(value: Any) -> Any:
    """A value as JSON: arrays with a dtype, a shape and, for floats, the hexadecimal digits of their bits."""
    if isinstance(value, Codes):
        steps = {} if value.steps is None else {"steps": encode(value.steps), "group": value.group}
        return {"codes": {"q": encode(value.q), "scale": encode(value.scale), "bits": value.bits} | steps}
    if isinstance(value, FixedPoint):
        return {"fixed_point": {"q": encode(value.q), "exponent": encode(value.exponent)}}
    if isinstance(value, tuple):
        return {"tuple": [encode(v) for v in value]}
    if isinstance(value, np.ndarray | np.generic):
        x = np.asarray(value)
        name = {"f": "f", "i": "i", "u": "u"}[x.dtype.kind] + str(8 * x.dtype.itemsize)
        if x.dtype.kind == "f":
            unsigned = np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}").ravel().tolist()
            return {name: " ".join(f"{v:0{2 * x.dtype.itemsize}x}" for v in unsigned), "shape": list(x.shape)}
        return {name: x.ravel().tolist(), "shape": list(x.shape)}
    return {"float": value.hex()} if isinstance(value, float) else value


def decode(value: Any) -> Any:
    """What `encode` encoded, in new arrays."""
    if not isinstance(value, dict):
        return value
    if "codes" in value:
        return Codes(**{name: decode(field) for name, field in value["codes"].items()})
    if "fixed_point" in value:
        return FixedPoint(decode(value["fixed_point"]["q"]), decode(value["fixed_point"]["exponent"]))
    if "tuple" in value:
        return tuple(decode(v) for v in value["tuple"])
    if "float" in value:
        return float.fromhex(value["float"])
    name = next(key for key in value if key != "shape")
    values, dtype = value[name], np.dtype(DTYPES[name])
    if dtype.kind == "f":
        bits = np.array([int(v, 16) for v in values.split()], f"<u{dtype.itemsize}")
        return bits.view(dtype).reshape(value["shape"])
    return np.array(values, dtype).reshape(value["shape"])


def read_vectors(operation: str) -> list[dict[str, Any]]:
    """The vectors of an operation."""
    data = json.loads((vectors_folder() / "operations" / f"{operation}.json").read_text("utf-8"))
    vectors: list[dict[str, Any]] = data["vectors"]
    return vectors


class GeneratedModel(NamedTuple):
    """A generated model of the vectors.

    source: its checkpoint. calibration: of each site the absolute maxima of the input channels, float32 (K,). expected: what
    is in expected.json. schemes: by name, those that expected.json has a result for.
    """

    source: ParameterSource
    calibration: Mapping[str, F32Array]
    expected: dict[str, Any]
    schemes: dict[str, Scheme]


def generated_models() -> list[str]:
    """The names of the generated models, which are the folders that hold them."""
    return sorted(file.parent.name for file in vectors_folder().glob("*/expected.json"))


def generated_model(name: str) -> GeneratedModel:
    """A generated model with its calibration, its expected results and its schemes, those of its own files included."""
    folder = vectors_folder() / name
    source = open_checkpoint(folder)
    assert not isinstance(source, QuantizedModel)
    expected: dict[str, Any] = json.loads((folder / "expected.json").read_text("utf-8"))
    files = {file.stem: file for file in sorted((folder / "schemes").glob("*.json"))}
    names = [*expected["logits_sha256"]["schemes"], *expected.get("raises", {})]
    schemes = {name: open_scheme(str(files.get(name, name))) for name in names}
    return GeneratedModel(source, load_calibration(folder / "calibration.json", source.config).absmax, expected, schemes)
