"""Calibration files: absolute maxima of each input channel, as JSON."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refmamba.errors import DataError, printable
from refmamba.formats.reading import TABLE_BYTES, read_json
from refmamba.formats.writing import write_text
from refmamba.spec.arith import F32Array
from refmamba.spec.config import MambaConfig
from refmamba.spec.parameters import linear_sites

SUFFIX = ".json"
PERCENTILE = "percentile"  # at which the maxima were cut
LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Calibration:
    """The absolute maxima of each site's input channels, (K,) float32, and the share of all magnitudes at which they are cut.

    percentile: above 0, at most 1; 1: not cut.
    """

    absmax: Mapping[str, F32Array]
    percentile: float = 1.0


def save_calibration(calibration: Calibration, file: Path) -> None:
    """Write the maxima as JSON, a list of numbers a site, and the percentile if they are cut; float32 survives exactly."""
    cut = {} if calibration.percentile == 1 else {PERCENTILE: calibration.percentile}
    write_text(file, json.dumps(cut | {site: m.astype(float).tolist() for site, m in calibration.absmax.items()}))


def load_calibration(file: Path, config: MambaConfig) -> Calibration:
    """Read what `save_calibration` wrote for a model of these sizes. Raises FileError, and DataError for anything else."""
    values, shapes = read_json(file, TABLE_BYTES), config.shapes() | {"lm_head.weight": (config.vocab_size, config.d_model)}
    absmax = dict[str, F32Array]()
    sites = {name for site in linear_sites(config) for name in (site, f"{site}.rotated")}
    percentile = values.pop(PERCENTILE, 1)
    if type(percentile) not in (int, float) or not 0 < percentile <= 1:
        raise DataError(f"{file}: {PERCENTILE} is above 0 and at most 1; calibrate on this model")
    for site, maxima in values.items():
        columns = shapes.get(f"{site.removesuffix('.rotated')}.weight", ())[1:]
        if site not in sites or not isinstance(maxima, list) or (len(maxima),) != columns:
            what = f"{len(maxima)} channels" if isinstance(maxima, list) else "no list"
            name = printable(site, 60)
            raise DataError(f"{file}: site {name} has {what}, which is not this model's; calibrate on this model")
        if not all(type(value) in (int, float) and 0 <= value <= LARGEST for value in maxima):
            raise DataError(f"{file}: site {site} needs finite numbers that are not negative; calibrate on this model")
        absmax[site] = np.array(maxima, np.float32)
    return Calibration(absmax, float(percentile))
