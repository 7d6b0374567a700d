"""Coders: how a parameter, or one side of a linear layer, becomes integers (docs/SPEC.md, sections 2 and 4).

A scheme names a coder and its bits; `CODERS` has the class of each name. A class is all that the specification needs to know
of a way to code: a new one, entered there, runs on the reference at once, and other backends refuse it by its name until
they know it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from refmamba.spec.arith import F32Array, f32
from refmamba.spec.codes import (
    ACTIVATION_BITS,
    WEIGHT_BITS,
    Codes,
    FixedPoint,
    code,
    code_flattened,
    code_grouped,
    code_static,
    fixed_point,
)

Factor = Codes | FixedPoint  # of a product
Call = tuple[Callable[..., Any], tuple[Any, ...]]  # an operation of the specification, and its arguments


class Coder(Protocol):
    """How the activations of one side of a linear layer are coded.

    whole_sequence: a scale is taken over all tokens of a call, so that a later token changes an earlier one's codes.
    calibrated: it is made with an absolute maximum from calibration, float32, shape (), which `reduce` takes from those of the
    channels. A class may have `options`: the names of what else a scheme says, with their defaults (`build`).
    """

    whole_sequence: ClassVar[bool]
    calibrated: ClassVar[bool]

    def calls(self, x: F32Array, site: str) -> Sequence[Call]:
        """The operations that code x (L, K), one for each part of it, and their arguments.

        Each part is a factor of a product of its own; the products' values are added in this order.
        """


@dataclass(frozen=True)
class PerToken:
    """N-bit codes, one scale a token: eq. (7, 8)."""

    bits: int
    whole_sequence: ClassVar[bool] = False
    calibrated: ClassVar[bool] = False

    def calls(self, x: F32Array, site: str) -> Sequence[Call]:
        """One part."""
        return [(code, (x, self.bits, site, "per_row"))]


@dataclass(frozen=True)
class PerTensor:
    """N-bit codes, one scale for what a call computes for a sequence: eq. (7, 8)."""

    bits: int
    whole_sequence: ClassVar[bool] = True
    calibrated: ClassVar[bool] = False

    def calls(self, x: F32Array, site: str) -> Sequence[Call]:
        """One part."""
        return [(code, (x, self.bits, site, "per_tensor"))]


@dataclass(frozen=True, eq=False)
class Static:
    """N-bit codes, the scale from calibration: eq. (7, 8). Larger values saturate. absmax: float32, shape ()."""

    bits: int
    absmax: F32Array
    whole_sequence: ClassVar[bool] = False
    calibrated: ClassVar[bool] = True

    @staticmethod
    def reduce(maxima: F32Array) -> F32Array:
        """The largest of the channels' absolute maxima (K,)."""
        return np.asarray(np.max(maxima))

    def calls(self, x: F32Array, site: str) -> Sequence[Call]:
        """One part."""
        return [(code_static, (x, self.absmax, self.bits, site))]


@dataclass(frozen=True, eq=False)
class Flattened:
    """FlattenQuant (arXiv 2402.17985) in one line: codes that are not held at the largest one, eq. (33).

    The paper splits a channel above a threshold into several of at most the threshold; the sum of their products is the
    product of the unheld code. absmax: the threshold, float32, shape (): a quantile of the channels' absolute maxima.
    """

    bits: int
    absmax: F32Array
    quantile: float
    whole_sequence: ClassVar[bool] = False
    calibrated: ClassVar[bool] = True
    options: ClassVar[Mapping[str, float]] = {"quantile": 0.98}
    coded_weight: ClassVar[bool] = True  # 31 bits by 23 would not be exact in one product, eq. (11)

    @staticmethod
    def reduce(maxima: F32Array, quantile: float) -> F32Array:
        """The smallest of the channels' absolute maxima (K,) that is not below so many of them."""
        return np.asarray(np.quantile(maxima, quantile, method="higher"), np.float32)

    def calls(self, x: F32Array, site: str) -> Sequence[Call]:
        """One part."""
        return [(code_flattened, (x, self.absmax, self.bits, site))]


@dataclass(frozen=True)
class PerTokenOutliers:
    """LLM.int8() (arXiv 2208.07339), the outliers of each token by themselves: eq. (32).

    Values below the threshold are in N-bit codes with their own scale, the others in fixed point.
    """

    bits: int
    threshold: float
    whole_sequence: ClassVar[bool] = False
    calibrated: ClassVar[bool] = False
    options: ClassVar[Mapping[str, float]] = {"threshold": 6.0}

    def calls(self, x: F32Array, site: str) -> Sequence[Call]:
        """Two parts. A NaN is an outlier, and is refused there."""
        inside = np.abs(x) < f32(self.threshold)
        below, outliers = np.where(inside, x, f32(0)), np.where(inside, f32(0), x)
        return [(code, (below, self.bits, site, "per_row")), (fixed_point, (outliers, ACTIVATION_BITS, site))]


@dataclass(frozen=True)
class Unquantized:
    """Fixed-point codes of 31 bits, a power of two for each token: eq. (10). What the scheme leaves alone."""

    whole_sequence: ClassVar[bool] = False
    calibrated: ClassVar[bool] = False

    def calls(self, x: F32Array, site: str) -> Sequence[Call]:
        """One part."""
        return [(fixed_point, (x, ACTIVATION_BITS, site))]


class ParameterCoder(Protocol):
    """How a parameter is coded. bits: of a code."""

    @property
    def bits(self) -> int: ...

    def code(self, x: F32Array, name: str) -> Factor:
        """The codes of a parameter. Raises NonFiniteError, naming it, for a NaN or an infinity."""

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scale, or of the exponent, of a parameter of this shape."""


@dataclass(frozen=True)
class ParameterPerTensor:
    """N-bit codes, one scale for the parameter: eq. (7, 8)."""

    bits: int

    def code(self, x: F32Array, name: str) -> Codes:
        """See `ParameterCoder`."""
        return code(x, self.bits, name, "per_tensor")

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """See `ParameterCoder`."""
        return ()


@dataclass(frozen=True)
class ParameterPerChannel:
    """N-bit codes, one scale for each row of the parameter: eq. (7, 8)."""

    bits: int

    def code(self, x: F32Array, name: str) -> Codes:
        """See `ParameterCoder`."""
        return code(x, self.bits, name, "per_row")

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """See `ParameterCoder`."""
        return (*shape[:-1], 1)


@dataclass(frozen=True)
class ParameterGrouped:
    """N-bit codes, one scale a row and a whole step for each group of columns: eq. (30). For matrices, 2 to 4 bits."""

    bits: int
    group: int
    options: ClassVar[Mapping[str, float]] = {"group": 64}
    bits_range: ClassVar[tuple[int, int]] = (2, 4)
    matrices_only: ClassVar[bool] = True

    def code(self, x: F32Array, name: str) -> Codes:
        """See `ParameterCoder`."""
        return code_grouped(x, self.bits, self.group, name)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """See `ParameterCoder`."""
        return (*shape[:-1], 1)

    def steps_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the steps of a matrix of this shape."""
        return (shape[0], -(-shape[1] // self.group))


@dataclass(frozen=True)
class UnquantizedMatrix:
    """Fixed-point codes of 23 bits, a power of two for each row: eq. (10). A product's matrix that the scheme leaves alone."""

    bits: ClassVar[int] = WEIGHT_BITS + 1

    def code(self, x: F32Array, name: str) -> FixedPoint:
        """See `ParameterCoder`."""
        return fixed_point(x, WEIGHT_BITS, name)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """See `ParameterCoder`."""
        return shape[:1]


# The classes by the names that schemes use: of a ParameterCoder, called with its bits; of a Coder, called with its bits, and
# with the absolute maximum where it is calibrated.
PARAMETER_CODERS: dict[str, type[Any]] = {
    "per_tensor": ParameterPerTensor, "per_channel": ParameterPerChannel, "grouped": ParameterGrouped,
}  # fmt: skip
INPUT_CODERS: dict[str, type[Any]] = {
    "per_tensor": PerTensor, "per_token": PerToken, "static": Static, "per_token_outliers": PerTokenOutliers,
    "flattened": Flattened,
}  # fmt: skip
OUTPUT_CODERS: dict[str, type[Any]] = {"per_tensor": PerTensor, "per_token": PerToken}
CODERS: Mapping[str, Mapping[str, type[Any]]] = {"weights": PARAMETER_CODERS, "inputs": INPUT_CODERS, "outputs": OUTPUT_CODERS}


def options_of(coder: type[Any], chosen: Mapping[str, float]) -> dict[str, float]:
    """What a class is made with beside its bits: its options' defaults, and what a scheme chose instead."""
    return dict(getattr(coder, "options", {})) | dict(chosen)
