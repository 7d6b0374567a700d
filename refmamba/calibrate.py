"""Calibration: absolute maxima of every linear layer's input over a text (docs/SPEC.md, section 5)."""

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np

from refmamba.arith import F32Array, IntArray
from refmamba.errors import DataError
from refmamba.files import write_text
from refmamba.model import Mamba, ParameterSource, quantize_model
from refmamba.scheme import parse_scheme

MAX_TOKENS = 512  # of the text, from its start
SUFFIX = ".json"
# Those of the schemes that are calibrated. One scale a tensor, as in w8-all, would let one large channel drown the rest.
WEIGHTS_ONLY = replace(parse_scheme("int8"), name="int8 weights", inputs={})


def passage() -> str:
    """The fixed passage inside the package."""
    return resources.files("refmamba").joinpath("data/passage.txt").read_text(encoding="utf-8")


def read_text(file: Path) -> str:
    """A user's text file. Raises DataError where it is missing, empty or not UTF-8."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise DataError(f"{file}: there is no text in it")
    return text


def calibrate(source: ParameterSource, tokens: IntArray) -> dict[str, F32Array]:
    """Run the forward with `int8`'s weights and no activation in codes on the tokens (L,), eq. (27).

    Returns, for each site (`layers.{i}.in_proj`, ..., `lm_head`), the absolute maximum of each input channel, float32
    (K,), over all positions.
    """
    absmax: dict[str, F32Array] = {}

    def look(site: str, value: F32Array) -> None:
        if site.endswith(".in"):
            absmax[site.removesuffix(".in")] = np.max(np.abs(value), axis=0)

    Mamba(quantize_model(source, WEIGHTS_ONLY)).prefill([tokens[:MAX_TOKENS]], logits="all", hook=look)
    return absmax


def save_calibration(absmax: Mapping[str, F32Array], file: Path) -> None:
    """Write the maxima as JSON, a list of numbers a site; float32 values survive exactly."""
    write_text(file, json.dumps({site: m.astype(float).tolist() for site, m in absmax.items()}))


def load_calibration(file: Path) -> dict[str, F32Array]:
    """Read what `save_calibration` wrote. Raises DataError."""
    try:
        values = json.loads(read_text(file))
        absmax = {str(site): np.array(m, np.float32) for site, m in values.items()}
    except (json.JSONDecodeError, AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{file}: not a calibration file of refmamba: {error}") from error
    if any(m.ndim != 1 or not np.all(np.isfinite(m)) or np.any(m < 0) for m in absmax.values()):
        raise DataError(f"{file}: each site needs a list of finite numbers that are not negative")
    return absmax
