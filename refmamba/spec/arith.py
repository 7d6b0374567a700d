"""Float32 arithmetic with one result on every machine (docs/SPEC.md, section 1).

Only + - * / sqrt and rint are used, each rounded once to float32, in the order written here: no fused multiply-add and
no library exp or log, whose last bits differ between processors. Subnormals are kept.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

F32Array = NDArray[np.float32]
F64Array = NDArray[np.float64]
IntArray = NDArray[np.signedinteger[Any]]

f32 = np.float32

# exp: above EXP_HIGH infinity, below EXP_LOW zero, so that no result is subnormal.
EXP_LOW, EXP_HIGH = f32(-87.336), f32(88.722)
LOG2_E = f32(1.442695)
LN2_HIGH, LN2_LOW = f32(0.693145751953125), f32(1.4286068e-06)  # LN2_HIGH has 15 bits, so that n * LN2_HIGH is exact
# (exp(r) - 1 - r) / r^2 on |r| <= ln(2)/2, a minimax fit: highest power first.
EXP_TERMS = (f32(0.0013814599), f32(0.008368717), f32(0.04166839), f32(0.16666521), f32(0.49999994))
# (log(1+f) - f + f^2/2) / f^3 on sqrt(1/2) <= 1+f < sqrt(2), a minimax fit: highest power first.
LOG_TERMS = (
    f32(-0.07634609), f32(0.12761751), f32(-0.13160223), f32(0.14201738),
    f32(-0.16623351), f32(0.20001228), f32(-0.25000823), f32(0.3333333),
)  # fmt: skip
SQRT_HALF_BITS = np.int32(0x3F3504F3)
SOFTPLUS_LINEAR = f32(20.0)
ZERO, HALF, ONE, TWO_25 = f32(0.0), f32(0.5), f32(1.0), f32(2.0**25)


def two_to(n: NDArray[np.int32]) -> F32Array:
    """2^n as float32, -126 <= n <= 127, by writing the exponent bits."""
    power: F32Array = ((n + np.int32(127)) << np.int32(23)).view(np.float32)
    return power


def exp(x: F32Array) -> F32Array:
    """e^x, eq. (1), within 1 ulp. Any shape. +0 below EXP_LOW, infinity above EXP_HIGH, NaN for NaN."""
    inside = (x >= EXP_LOW) & (x <= EXP_HIGH)
    a = np.where(inside, x, ZERO)
    n = np.rint(a * LOG2_E)
    r = (a - n * LN2_HIGH) - n * LN2_LOW
    p = np.full_like(r, EXP_TERMS[0])
    for term in EXP_TERMS[1:]:
        p = p * r + term
    p = (p * (r * r) + r) + ONE
    # n is -126 to 128: two factors, since 2^128 is no float32. Both products are exact.
    whole = n.astype(np.int32)
    half = whole >> np.int32(1)
    y = (p * two_to(half)) * two_to(whole - half)
    return np.where(inside, y, np.where(x > EXP_HIGH, f32(np.inf), np.where(x < EXP_LOW, ZERO, x)))


def log(x: F32Array) -> F32Array:
    """Natural logarithm, eq. (2), within 1 ulp. Any shape. -infinity for a zero, NaN below zero and for NaN."""
    usual = (x > ZERO) & (x < f32(np.inf))
    a = np.where(usual, x, ONE)
    subnormal = a < f32(2.0**-126)
    a = a * np.where(subnormal, TWO_25, ONE)  # not where(..., a * TWO_25, a): that overflows on the large ones
    bits = a.view(np.int32)
    k = (bits - SQRT_HALF_BITS) >> np.int32(23)  # x = m 2^k with sqrt(1/2) <= m < sqrt(2)
    f = (bits - (k << np.int32(23))).view(np.float32) - ONE
    n = np.where(subnormal, k - np.int32(25), k).astype(np.float32)
    p = np.full_like(f, LOG_TERMS[0])
    for term in LOG_TERMS[1:]:
        p = p * f + term
    square = f * f
    y = (((p * f) * square + n * LN2_LOW) - HALF * square) + f
    y = y + n * LN2_HIGH
    special = np.where(x == ZERO, f32(-np.inf), np.where(x > ZERO, x, f32(np.nan)))
    return np.where(usual, y, special)


def log1p(y: F32Array) -> F32Array:
    """log(1 + y) for 0 <= y <= 1, eq. (3): the rounding of 1 + y is put back, so that small y keep their bits."""
    u = ONE + y
    corrected: F32Array = log(u) + (y - (u - ONE)) / u
    return corrected


def softplus(x: F32Array) -> F32Array:
    """log(1 + e^x), eq. (4). Any shape. x itself above 20."""
    return np.where(x > SOFTPLUS_LINEAR, x, np.maximum(x, ZERO) + log1p(exp(-np.abs(x))))


def silu(x: F32Array) -> F32Array:
    """x / (1 + e^-x), eq. (5). Any shape."""
    y: F32Array = x / (ONE + exp(-x))
    return y


def tree_sum(x: F32Array) -> F32Array:
    """Sum over the last axis in one order for every length, eq. (6). (..., n) -> (...).

    Pad with +0.0 to a power of two, then add the second half to the first until one is left.
    """
    n = x.shape[-1]
    width = 1 << (n - 1).bit_length()
    x = np.concatenate([x, np.zeros((*x.shape[:-1], width - n), np.float32)], axis=-1)
    while width > 1:
        width //= 2
        x = x[..., :width] + x[..., width:]
    return x[..., 0]
