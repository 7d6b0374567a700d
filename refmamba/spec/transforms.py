"""SmoothQuant for Mamba (Mamba-PTQ eq. 10, 11; docs/SPEC.md, section 5): move outliers from activations into weights.

An input channel's activation is divided by a factor and its weights are multiplied by it. The factors are powers of
two, so that both are exact and the function before quantization keeps its bits' values. Where a linear layer's input comes
straight from a weight (norm, or x_proj for dt_proj) the division is folded into that weight; after silu and after the gate
there is none to fold it into, so the product divides its input itself, by subtracting from the exponent.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from refmamba.spec.arith import F32Array
from refmamba.spec.coders import Call
from refmamba.spec.codes import ACTIVATION_BITS, fixed_point
from refmamba.spec.config import MambaConfig, ParameterSource, kind_of

if TYPE_CHECKING:
    from refmamba.spec.config import ParameterSource

FOLDED = ("in_proj", "dt_proj")  # divided in the weight that makes the input


def exponents(activation_absmax: F32Array, weight_absmax: F32Array, alpha: float) -> F32Array:
    """Exponents k of the factors 2^k, eq. (28): (K,), (K,) -> int32 (K,).

    s = activation_absmax^alpha / weight_absmax^(1 - alpha) (Mamba-PTQ eq. 11) in float64, rounded to a power of two;
    1 where either maximum is zero.
    """
    x, w = activation_absmax.astype(np.float64), weight_absmax.astype(np.float64)
    used = (x > 0) & (w > 0)
    s = np.where(used, x, 1.0) ** alpha / np.where(used, w, 1.0) ** (1 - alpha)
    fraction, k = np.frexp(s)  # s = fraction * 2^k with 1/2 <= fraction < 1
    return np.where(used, k - (fraction < math.sqrt(0.5)), 0).astype(np.int32)


@dataclass(frozen=True)
class _Smoothed:
    """A checkpoint with the factors folded in: eq. (29)."""

    source: "ParameterSource"
    factors: Mapping[str, F32Array]  # site -> exponents

    @property
    def config(self) -> MambaConfig:
        return self.source.config

    def read(self, name: str) -> F32Array:
        x = self.source.read(name)
        site, _, last = name.rpartition(".")
        if last == "weight" and site in self.factors:
            x = np.ldexp(x, self.factors[site])
        in_proj, dt_proj = (site.rpartition(".")[0] + f".{layer}" for layer in FOLDED)
        if last == "weight" and site.endswith(".norm") and in_proj in self.factors:
            x = np.ldexp(x, -self.factors[in_proj])
        if last == "weight" and site.endswith(".x_proj") and dt_proj in self.factors:
            rank = self.config.dt_rank
            x = np.concatenate([np.ldexp(x[:rank], -self.factors[dt_proj][:, None]), x[rank:]])
        return x


def smoothed(
    source: "ParameterSource", absmax: Mapping[str, F32Array], alpha: Mapping[str, float]
) -> tuple["ParameterSource", dict[str, F32Array], dict[str, F32Array]]:
    """The checkpoint, the calibration and the remaining exponents after smoothing, eq. (28, 29).

    absmax: calibrated absolute maximum of each input channel, (K,) a site. alpha: of each linear layer to smooth, by
    `in_proj` and so on. The head is never smoothed: its weight is the embedding's. The third result holds
    `{site}.smooth` for the inputs that no weight could be divided for.
    """
    factors = {
        site: exponents(m, np.max(np.abs(source.read(f"{site}.weight")), axis=0), alpha[layer])
        for site, m in absmax.items()
        if (layer := site.rpartition(".")[2]) in alpha
    }
    divided = {site: np.ldexp(m, -factors[site]) if site in factors else m for site, m in absmax.items()}
    inner = {f"{site}.smooth": k for site, k in factors.items() if not site.endswith(FOLDED)}
    return _Smoothed(source, factors), divided, inner


class Transform(Protocol):
    """What a linear layer does to its input before it codes it."""

    def call(self, x: F32Array, site: str) -> Call:
        """The operation on x (L, K) and its arguments; it gives float32 (L, K). site: for an error."""


def divide_channels(x: F32Array, exponents: NDArray[np.int32]) -> F32Array:
    """x_j 2^-k_j, eq. (29): exact short of overflow and underflow. (L, K), (K,) -> (L, K)."""
    return np.ldexp(x, -exponents)


def hadamard_block(channels: int) -> int:
    """The size of the blocks in which channels are rotated: the largest power of two that divides their number."""
    return channels & -channels


def rotate(x: F32Array, site: str) -> F32Array:
    """Each block of channels times the Hadamard matrix of +-1, eq. (31): (L, K) -> (L, K).

    In fixed point (10) the sums are sums of integers, exact in any order; then one rounding to float32. Raises NonFiniteError,
    naming the site.
    """
    codes, block = fixed_point(x, ACTIVATION_BITS, site), hadamard_block(x.shape[-1])
    q = butterfly(codes.q.astype(np.int64), block)
    return np.ldexp(q.astype(np.float64), -codes.exponent[:, None]).astype(np.float32)


def butterfly(x: NDArray[Any], block: int) -> NDArray[Any]:
    """Hadamard's matrix (Sylvester's) times each block of columns, stage by stage: (a, b) -> (a + b, a - b). (rows, K)."""
    half = 1
    while half < block:
        pairs = x.reshape(len(x), -1, 2, half)
        x = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2).reshape(x.shape)
        half *= 2
    return x


@dataclass(frozen=True)
class Hadamard:
    """A rotation that spreads outliers over the channels of a block; the weight is rotated back: eq. (31)."""

    def call(self, x: F32Array, site: str) -> Call:
        """See `Transform`."""
        return rotate, (x, site)


@dataclass(frozen=True, eq=False)
class Smooth:
    """SmoothQuant's division where no weight before it could take it: eq. (29). exponents: int32 (K,)."""

    exponents: NDArray[np.int32]

    def call(self, x: F32Array, site: str) -> Call:
        """See `Transform`."""
        return divide_channels, (x, self.exponents)


@dataclass(frozen=True)
class _Rotated:
    """A checkpoint whose matrices undo the rotation of their inputs: eq. (31)."""

    source: ParameterSource
    layers: Collection[str]

    @property
    def config(self) -> MambaConfig:
        return self.source.config

    def read(self, name: str) -> F32Array:
        x = self.source.read(name)
        if name.endswith(".weight") and kind_of(name).removesuffix(".weight") in self.layers:
            block = hadamard_block(x.shape[1])
            with np.errstate(over="ignore"):
                x = (butterfly(x.astype(np.float64), block) / block).astype(np.float32)
        return x


def rotated(source: ParameterSource, layers: Collection[str]) -> ParameterSource:
    """The checkpoint with these linear layers' matrices times H / n: eq. (31), in float64 stage by stage, then float32."""
    return _Rotated(source, layers) if layers else source
