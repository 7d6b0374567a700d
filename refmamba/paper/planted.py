"""Outlier channels planted in a model, to see which scheme withstands them: one channel of every layer, 2^k times larger.

At in_proj the function stays: the channel is multiplied in the norm's weight and divided out of in_proj's, both by 2^k. At
out_proj no parameter scales a channel, since it comes from silu and from the gate; D does so for its own share, and out_proj's
column is divided. The channel's share that comes through the state so becomes 2^k times smaller: another model, against whose
own fp32 each scheme is measured.
"""

from dataclasses import dataclass

import numpy as np

from refmamba.spec.arith import F32Array
from refmamba.spec.config import MambaConfig, ParameterSource

SITES = ("in_proj", "out_proj")
CHANNEL = 5


@dataclass(frozen=True)
class Planted:
    """A checkpoint whose channel CHANNEL at a site, one of SITES, is 2^power times larger in every layer."""

    source: ParameterSource
    site: str
    power: int

    @property
    def config(self) -> MambaConfig:
        """The model's sizes."""
        return self.source.config

    def read(self, name: str) -> F32Array:
        """One tensor, float32."""
        x, factor = self.source.read(name), np.float32(2.0**self.power)
        if name.endswith({"in_proj": ".norm.weight", "out_proj": ".D"}[self.site]):
            x = x.copy()
            x[CHANNEL] *= factor
        elif name.endswith(f".{self.site}.weight"):
            x = x.copy()
            x[:, CHANNEL] /= factor
        return x
