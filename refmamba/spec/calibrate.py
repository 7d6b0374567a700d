"""Calibration: absolute maxima of every linear layer's input over a text (docs/SPEC.md, section 5)."""

from dataclasses import replace
from importlib import resources

import numpy as np

from refmamba.spec.arith import F32Array, IntArray
from refmamba.spec.config import ParameterSource
from refmamba.spec.mamba1 import Mamba
from refmamba.spec.parameters import quantize_model
from refmamba.spec.scheme import parse_scheme
from refmamba.spec.transforms import rotate

MAX_TOKENS = 512  # of the text, from its start
# Those of the schemes that are calibrated. One scale a tensor, as in w8-all, would let one large channel drown the rest.
WEIGHTS_ONLY = replace(parse_scheme("int8"), name="int8 weights", inputs={})


def passage() -> str:
    """The fixed passage inside the package."""
    return resources.files("refmamba").joinpath("spec/passage.txt").read_text(encoding="utf-8")


def calibrate(source: ParameterSource, tokens: IntArray, quantile: float = 1.0) -> dict[str, F32Array]:
    """Run the forward with `int8`'s weights and no activation in codes on the tokens (L,), eq. (27).

    Returns, for each site (`layers.{i}.in_proj`, ..., `lm_head`), the absolute maximum of each input channel, float32
    (K,), over all positions, and under `{site}.rotated` that after the rotation of eq. (31). quantile: maxima above so many of
    the site's magnitudes, over tokens and channels, are cut to the smallest of the rest (Quamba's percentile).
    """
    absmax: dict[str, F32Array] = {}

    def maxima(x: F32Array) -> F32Array:
        magnitudes = np.abs(x)
        largest: F32Array = np.minimum(np.max(magnitudes, axis=0), np.quantile(magnitudes, quantile, method="higher"))
        return largest.astype(np.float32)

    def look(site: str, value: F32Array) -> None:
        if site.endswith(".in"):
            name = site.removesuffix(".in")
            absmax[name] = maxima(value)
            if name != "lm_head":
                absmax[f"{name}.rotated"] = maxima(rotate(value, site))

    Mamba(quantize_model(source, WEIGHTS_ONLY)).prefill([tokens[:MAX_TOKENS]], logits="all", hook=look)
    return absmax
