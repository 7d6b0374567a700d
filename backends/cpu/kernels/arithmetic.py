"""The polynomials of `refmamba.spec.arith` on 16 lanes: see there for the reasons."""

import numpy as np

from refmamba.backends.cpu.kernels.tables import f32, inlined
from refmamba.backends.cpu.kernels.vectors import (
    bits,
    from_bits,
    negative,
    rint,
    splat_f,
    splat_i,
    to_float,
    to_int,
    where,
    where_i,
)
from refmamba.spec import arith

LOG2_E, LN2_HIGH, LN2_LOW, EXP_LOW, EXP_HIGH = arith.LOG2_E, arith.LN2_HIGH, arith.LN2_LOW, arith.EXP_LOW, arith.EXP_HIGH
E0, E1, E2, E3, E4 = arith.EXP_TERMS
G0, G1, G2, G3, G4, G5, G6, G7 = arith.LOG_TERMS
SQRT_HALF_BITS, SOFTPLUS_LINEAR = int(arith.SQRT_HALF_BITS), arith.SOFTPLUS_LINEAR
FRACTION_BITS, BIAS = 23, 127  # of a float32: its fraction, and what is added to its exponent
ZERO, HALF, ONE, INFINITY = f32(0), f32(0.5), f32(1), f32(np.inf)


@inlined
def exp_parts(a):
    """n and p of e^a = p 2^n."""
    n = rint(a * splat_f(LOG2_E))
    r = (a - n * splat_f(LN2_HIGH)) - n * splat_f(LN2_LOW)
    p = splat_f(E0) * r + splat_f(E1)
    p = p * r + splat_f(E2)
    p = p * r + splat_f(E3)
    p = p * r + splat_f(E4)
    return to_int(n), (p * (r * r) + r) + splat_f(ONE)


@inlined
def two_to(n):
    return from_bits((n + splat_i(BIAS)) << splat_i(FRACTION_BITS))


@inlined
def exp(x):
    """Eq. (1)."""
    inside = (x >= splat_f(EXP_LOW)) & (x <= splat_f(EXP_HIGH))
    n, p = exp_parts(where(inside, x, splat_f(ZERO)))
    half = n >> splat_i(1)
    y = (p * two_to(half)) * two_to(n - half)
    outside = where(x > splat_f(EXP_HIGH), splat_f(INFINITY), where(x < splat_f(EXP_LOW), splat_f(ZERO), x))
    return where(inside, y, outside)


@inlined
def exp_negative(x):
    """Eq. (1) where no x is above zero. What is computed below EXP_LOW is thrown away, and a NaN stays one.

    No result is subnormal, so that the exact product by 2^n is an addition to the exponent's bits.
    """
    n, p = exp_parts(x)
    return from_bits(where_i(x < splat_f(EXP_LOW), splat_i(0), bits(p) + (n << splat_i(FRACTION_BITS))))


@inlined
def log_normal(u):
    """Eq. (2) of normal numbers above zero, which are none of its special cases."""
    whole = bits(u)
    k = (whole - splat_i(SQRT_HALF_BITS)) >> splat_i(FRACTION_BITS)
    f = from_bits(whole - (k << splat_i(FRACTION_BITS))) - splat_f(ONE)
    n = to_float(k)
    p = splat_f(G0) * f + splat_f(G1)
    p = p * f + splat_f(G2)
    p = p * f + splat_f(G3)
    p = p * f + splat_f(G4)
    p = p * f + splat_f(G5)
    p = p * f + splat_f(G6)
    p = p * f + splat_f(G7)
    square = f * f
    log_u = (((p * f) * square + n * splat_f(LN2_LOW)) - splat_f(HALF) * square) + f
    return log_u + n * splat_f(LN2_HIGH)


@inlined
def log1p(y):
    """Eq. (3) for 0 <= y <= 1; NaN for NaN."""
    u = splat_f(ONE) + y
    return log_normal(u) + (y - (u - splat_f(ONE))) / u


@inlined
def magnitude(x):
    """The bits of |x|. As integers they have the order of the magnitudes, and a NaN is above infinity."""
    return bits(x) & splat_i(0x7FFFFFFF)


@inlined
def softplus(x):
    """Eq. (4)."""
    log = log1p(exp_negative(negative(from_bits(magnitude(x)))))
    above = where(x < splat_f(ZERO), splat_f(ZERO), x)
    return where(x > splat_f(SOFTPLUS_LINEAR), x, above + log)


@inlined
def silu(x):
    """Eq. (5)."""
    return x / (splat_f(ONE) + exp(negative(x)))
