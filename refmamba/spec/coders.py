"""Coders: how a parameter, or one side of a linear layer, becomes integers (docs/SPEC.md, sections 2 and 4).

A scheme names a coder and its bits; `CODERS` has the class of each name. A class is all that the specification needs to know
of a way to code: a new one, entered there, runs on the reference at once, and other backends refuse it by its name until
they know it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from refmamba.spec.arith import F32Array
from refmamba.spec.codes import ACTIVATION_BITS, WEIGHT_BITS, Codes, FixedPoint, code, code_static, fixed_point

Factor = Codes | FixedPoint  # of a product
Call = tuple[Callable[..., Any], tuple[Any, ...]]  # an operation of the specification, and its arguments


class Coder(Protocol):
    """How the activations of one side of a linear layer are coded.

    whole_sequence: a scale is taken over all tokens of a call, so that a later token changes an earlier one's codes.
    calibrated: it is made with the site's calibrated absolute maximum, float32, shape ().
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

    def calls(self, x: F32Array, site: str) -> Sequence[Call]:
        """One part."""
        return [(code_static, (x, self.absmax, self.bits, site))]


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
    "per_tensor": ParameterPerTensor, "per_channel": ParameterPerChannel,
}  # fmt: skip
INPUT_CODERS: dict[str, type[Any]] = {"per_tensor": PerTensor, "per_token": PerToken, "static": Static}
OUTPUT_CODERS: dict[str, type[Any]] = {"per_tensor": PerTensor, "per_token": PerToken}
CODERS: Mapping[str, Mapping[str, type[Any]]] = {"weights": PARAMETER_CODERS, "inputs": INPUT_CODERS, "outputs": OUTPUT_CODERS}


class Transform(Protocol):
    """What a linear layer does to its input before it codes it."""

    def call(self, x: F32Array) -> Call:
        """The operation on x (L, K) and its arguments; it gives float32 (L, K)."""


def divide_channels(x: F32Array, exponents: NDArray[np.int32]) -> F32Array:
    """x_j 2^-k_j, eq. (29): exact short of overflow and underflow. (L, K), (K,) -> (L, K)."""
    return np.ldexp(x, -exponents)


@dataclass(frozen=True, eq=False)
class Smooth:
    """SmoothQuant's division where no weight before it could take it: eq. (29). exponents: int32 (K,)."""

    exponents: NDArray[np.int32]

    def call(self, x: F32Array) -> Call:
        """See `Transform`."""
        return divide_channels, (x, self.exponents)
