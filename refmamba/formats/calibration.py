"""Calibration files: absolute maxima of each input channel, as JSON."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from refmamba.errors import DataError
from refmamba.formats.text import read_text
from refmamba.formats.writing import write_text
from refmamba.spec.arith import F32Array

SUFFIX = ".json"


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
