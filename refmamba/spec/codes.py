"""Codes: integers that stand for the two factors of every matrix product (docs/SPEC.md, section 2).

A factor is either quantized to N bits with a scale (`Codes`, eq. 1 of Mamba-PTQ), or, where the scheme leaves it alone,
written in fixed point with so many bits that nothing a float32 product keeps is lost (`FixedPoint`). Either way the sums
are sums of integers: exact, whatever their order. Each function below is one equation.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from refmamba.errors import NonFiniteError
from refmamba.spec.arith import F32Array, F64Array, IntArray, f32
from refmamba.spec.jit import compiled

ABSMAX_ZERO = f32(2.0**-100)  # an absolute maximum below this counts as zero
ACTIVATION_BITS, WEIGHT_BITS = 30, 22  # magnitudes of the fixed-point codes are at most 2^30 and 2^22
STEPPED = 126  # the most that a code times its step may be: 7 * 18, 3 * 42 and 1 * 126
LOW_PART = 4096  # a weight's fixed-point code is hi * 4096 + lo
BLOCK = 4096  # longest row whose fixed-point product is exact in float64
ROWS = 4096  # rows coded at a time
LONGEST_ROW = 65536  # longest row of an 8-bit by 31-bit product that is exact in float64

Granularity = Literal["per_tensor", "per_row"]


@dataclass(frozen=True, eq=False)
class Codes:
    """N-bit codes q of a tensor x: x is about q / scale.

    q: int8 (int16 above 8 bits), the shape of x. scale: float32, shape () for one scale, or (rows, 1) for one a row.
    steps: where groups of columns have steps of their own, the whole numbers by which a group's codes are multiplied: uint8
    (rows, ceil(columns / group)). Then x is about q * step / scale.
    """

    q: IntArray
    scale: F32Array
    bits: int
    steps: NDArray[np.uint8] | None = None
    group: int = 0

    def integers(self) -> IntArray:
        """What the product is of: q, times its group's step where there are steps (int8: |q| * step is at most 127)."""
        if self.steps is None:
            return self.q
        columns = np.repeat(self.steps.astype(np.int8), self.group, axis=1)[:, : self.q.shape[1]]
        return self.q * columns

    def rows(self, indices: IntArray) -> "Codes":
        """The codes of the named rows. (n,) -> (n, columns)."""
        steps = None if self.steps is None else self.steps[indices]
        return Codes(self.q[indices], self.scale if self.scale.ndim == 0 else self.scale[indices], self.bits, steps, self.group)


@dataclass(frozen=True, eq=False)
class FixedPoint:
    """Fixed-point codes of an unquantized matrix, a power of two for each row: x is q * 2^-exponent.

    q: int32 (rows, columns). exponent: int32 (rows,).
    """

    q: NDArray[np.int32]
    exponent: NDArray[np.int32]


def absmax(x: F32Array, site: str, granularity: Granularity = "per_tensor") -> F32Array:
    """Largest magnitude, eq. (7): shape () per tensor, or (rows, 1) per row. Below 2^-100 it is given as zero.

    Raises NonFiniteError, naming the site, for a NaN or an infinity.
    """
    axis = None if granularity == "per_tensor" else -1
    m = np.maximum(np.max(x, axis, keepdims=axis is not None), -np.min(x, axis, keepdims=axis is not None))
    if not np.all(np.isfinite(m)):
        raise NonFiniteError(f"{site}: a value is NaN or infinite, so it has no codes; check the weights and the input")
    return np.where(m < ABSMAX_ZERO, f32(0), m)


def scale_of(m: F32Array, bits: int) -> F32Array:
    """Scale for an absolute maximum, eq. (7): (2^(bits-1) - 1) / absmax, or 1 where that is zero. Any shape."""
    return np.where(m == 0, f32(1), f32(2 ** (bits - 1) - 1) / np.where(m == 0, f32(1), m))


def quantize(x: F32Array, scale: F32Array, bits: int) -> IntArray:
    """Codes rint(x * scale), half to even, held within +-(2^(bits-1) - 1): eq. (8), eq. 1 of Mamba-PTQ. Shape of x.

    The clamp is before the cast: what an out-of-range cast gives differs between processors.
    """
    largest = f32(2 ** (bits - 1) - 1)
    with np.errstate(over="ignore"):  # a value that is far above a calibrated maximum saturates
        q: IntArray = np.rint(np.clip(x * scale, -largest, largest)).astype(np.int8 if bits <= 8 else np.int16)
    return q


def dequantize(x: Codes | FixedPoint) -> F32Array:
    """Codes read back, float32, the shape of q: q / scale, eq. (9), with q times its step where there are steps; or
    q * 2^-exponent, eq. (10)."""
    if isinstance(x, FixedPoint):
        return np.ldexp(x.q, -x.exponent[:, None], out=np.empty(x.q.shape, np.float32))  # rounds once
    return x.integers().astype(np.float32) / x.scale


def _parts(x: F32Array) -> list[slice]:
    """The rows of x, some at a time: a large matrix is coded with little memory beside it."""
    return [slice(i, i + ROWS) for i in range(0, len(x), ROWS)]


def code(x: F32Array, bits: int, site: str, granularity: Granularity = "per_tensor") -> Codes:
    """Quantize with the scale that the values themselves give, eq. (7, 8). Raises NonFiniteError."""
    scale = scale_of(absmax(x, site, granularity), bits)
    rowwise = scale.ndim > 1
    q = np.concatenate([quantize(x[part], scale[part] if rowwise else scale, bits) for part in _parts(x)])
    return Codes(q, scale, bits)


def code_grouped(x: F32Array, bits: int, group: int, site: str) -> Codes:
    """Codes with whole steps for groups of columns, eq. (30): x is about q * step / scale. (rows, columns).

    The scale makes a row's absolute maximum 126, the most that a code times its step may be. Of a group, `choose_steps`
    takes the step with the least squared error. Raises NonFiniteError.
    """
    m = absmax(x, site, "per_row")
    scale = np.where(m == 0, f32(1), f32(STEPPED) / np.where(m == 0, f32(1), m))
    rows, columns = x.shape
    q, steps = np.zeros((rows, columns), np.int8), np.ones((rows, -(-columns // group)), np.uint8)
    for part in _parts(x):
        scaled = np.where(m[part] == 0, 0.0, x[part].astype(np.float64) * scale[part])  # exact
        choose_steps(scaled, group, 2 ** (bits - 1) - 1, q[part], steps[part])
    return Codes(q, scale, bits, steps, group)


@compiled
def choose_steps(scaled: F64Array, group: int, largest: int, q: NDArray[np.int8], steps: NDArray[np.uint8]) -> None:
    """A step for each group of columns of each row, and the codes, eq. (30): written to q and steps.

    # SHAPES   scaled (rows, columns), q (rows, columns), steps (rows, ceil(columns / group))
    # COMPUTE  the smallest step that clamps nothing, and five smaller ones; the least squared error, summed in column order,
    #          wins, the larger step where two are equal
    # OUTPUT   float64 in, whole numbers out: |q| <= largest, 1 <= step <= 126 // largest
    """
    rows, columns = scaled.shape
    most = STEPPED // largest
    for row in range(rows):
        for g in range(steps.shape[1]):
            first, last = g * group, min(columns, (g + 1) * group)
            top = 0.0
            for j in range(first, last):
                top = max(top, abs(scaled[row, j]))
            step = min(most, max(1, math.ceil(top / largest)))
            least, best = math.inf, step
            for candidate in range(step, max(1, step - 5) - 1, -1):
                error = 0.0
                for j in range(first, last):
                    code = min(float(largest), max(-float(largest), np.rint(scaled[row, j] / candidate)))
                    off = scaled[row, j] - code * candidate
                    error += off * off
                if error < least:
                    least, best = error, candidate
            steps[row, g] = best
            for j in range(first, last):
                q[row, j] = int(min(float(largest), max(-float(largest), np.rint(scaled[row, j] / best))))


def code_static(x: F32Array, static_absmax: F32Array, bits: int, site: str) -> Codes:
    """Quantize with the scale of a calibrated absolute maximum, eq. (7, 8): larger values saturate.

    static_absmax: float32, shape (); below 2^-100 it counts as zero. Raises NonFiniteError for a NaN or an infinity in x.
    """
    absmax(x, site)
    m = np.where(static_absmax < ABSMAX_ZERO, f32(0), static_absmax)
    scale = scale_of(m, bits)
    return Codes(quantize(np.where(m == 0, f32(0), x), scale, bits), scale, bits)


def code_flattened(x: F32Array, threshold: F32Array, bits: int, site: str) -> Codes:
    """Codes rint(x * scale) with the scale that makes the threshold the largest code, eq. (33): larger values are not held.

    A channel beyond the threshold is, in these codes, as many pieces of the threshold and a rest. threshold: float32, shape ();
    below 2^-100 it counts as zero, and every code is 0. q: int32, held within +-2^30. Raises NonFiniteError.
    """
    absmax(x, site)
    m = np.where(threshold < ABSMAX_ZERO, f32(0), threshold)
    scale, most = scale_of(m, bits), f32(2.0**ACTIVATION_BITS)
    with np.errstate(over="ignore"):
        scaled = np.clip(np.where(m == 0, f32(0), x) * scale, -most, most)
    return Codes(np.rint(scaled).astype(np.int32), scale, bits)


def fixed_point(x: F32Array, magnitude_bits: int, site: str) -> FixedPoint:
    """Fixed-point codes rint(x * 2^e) of each row, eq. (10): |q| <= 2^magnitude_bits. (rows, columns).

    e = min(126, magnitude_bits - E) where 2^(E-1) <= absmax < 2^E. The product is exact but for values so small that
    they round to zero. Raises NonFiniteError.
    """
    m = absmax(x, site, "per_row")
    _, e = np.frexp(m)  # absmax = fraction * 2^E with 1/2 <= fraction < 1
    exponent = np.where(m == 0, 0, np.minimum(126, magnitude_bits - e)).astype(np.int32)
    q = np.concatenate([np.rint(np.ldexp(x[part], exponent[part])).astype(np.int32) for part in _parts(x)])
    return FixedPoint(q, exponent[:, 0])


def integer_product(x: Codes | FixedPoint, w: Codes | FixedPoint) -> F64Array:
    """Exact x.q @ w.q.T, eq. (11, 12): (n, K), (rows, K) -> (n, rows), integers held in float64.

    float64 holds every integer to 2^53. Two fixed-point factors are too wide for that: the weight is split, w = hi * 4096 + lo
    with -2048 <= lo <= 2047, and both products joined with one rounding; rows longer than 4096 in blocks, added in order.
    """
    if not (isinstance(x, FixedPoint) and isinstance(w, FixedPoint)):
        x_q, w_q = (c.q if isinstance(c, FixedPoint) else c.integers() for c in (x, w))
        return x_q.astype(np.float64) @ w_q.T.astype(np.float64)
    total: F64Array = np.zeros((len(x.q), len(w.q)))
    for start in range(0, x.q.shape[1], BLOCK):
        x_block = x.q[:, start : start + BLOCK].astype(np.float64)
        w_block = w.q[:, start : start + BLOCK]
        lo = ((w_block + LOW_PART // 2) & (LOW_PART - 1)) - LOW_PART // 2
        hi = (w_block - lo) // LOW_PART
        high, low = x_block @ hi.T.astype(np.float64), x_block @ lo.T.astype(np.float64)
        total = total + (high * LOW_PART + low)
    return total


def rescale(acc: F64Array, x: Codes | FixedPoint, w: Codes | FixedPoint) -> F32Array:
    """The product's value from its integer, eq. (13): (n, rows) float64 -> float32.

    Powers of two go first, in float64, where they round nothing; then one rounding to float32; then one division by the
    scale, or by the product of both. Adding 0.0 turns a BLAS library's -0.0 into +0.0.
    """
    if isinstance(x, FixedPoint):
        acc = np.ldexp(acc, -x.exponent[:, None])
    if isinstance(w, FixedPoint):
        acc = np.ldexp(acc, -w.exponent)
    # A row's scale belongs to a row of the result for x, to a column for w.
    scales = [c.scale if c is x or c.scale.ndim == 0 else c.scale[:, 0] for c in (x, w) if isinstance(c, Codes)]
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # what is not finite fails where it is coded next
        y = (acc + 0.0).astype(np.float32)
        return y / (scales[0] * scales[1] if len(scales) == 2 else scales[0]) if scales else y


def pack4(q: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Two codes a byte, eq. (14): the even column in the low half. (rows, columns) -> (rows, ceil(columns / 2))."""
    even = np.pad(q, ((0, 0), (0, q.shape[1] % 2))).view(np.uint8)
    packed: NDArray[np.uint8] = np.bitwise_or(even[:, 0::2] & 15, even[:, 1::2] << 4)
    return packed


def unpack4(packed: NDArray[np.uint8], columns: int) -> NDArray[np.int8]:
    """The codes of `pack4`, eq. (14): (rows, ceil(columns / 2)) -> int8 (rows, columns)."""
    q: NDArray[np.int8] = np.empty((packed.shape[0], 2 * packed.shape[1]), np.int8)
    q[:, 0::2] = ((packed & 15) ^ 8).astype(np.int8) - np.int8(8)
    q[:, 1::2] = packed.view(np.int8) >> 4
    return q[:, :columns]


Param = F32Array | Codes | FixedPoint
