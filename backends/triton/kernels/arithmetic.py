"""SPEC section 1 as device functions: float32, one rounding for each operation.

What Triton would do otherwise, and what is written instead: a quotient is `div_rn`, a root `sqrt_rn`; a float maximum is a
comparison, or a maximum of the bits; a sum is the tree. Multiplications and additions stay apart because every kernel is
compiled with enable_fp_fusion=False.
"""

import triton
import triton.language as tl

from refmamba.spec import arith

EXP_LOW, EXP_HIGH = tl.constexpr(float(arith.EXP_LOW)), tl.constexpr(float(arith.EXP_HIGH))
LOG2_E = tl.constexpr(float(arith.LOG2_E))
LN2_HIGH, LN2_LOW = tl.constexpr(float(arith.LN2_HIGH)), tl.constexpr(float(arith.LN2_LOW))
E0, E1, E2, E3, E4 = (tl.constexpr(float(term)) for term in arith.EXP_TERMS)
L0, L1, L2, L3, L4, L5, L6, L7 = (tl.constexpr(float(term)) for term in arith.LOG_TERMS)
SQRT_HALF_BITS = tl.constexpr(int(arith.SQRT_HALF_BITS))
SOFTPLUS_LINEAR = tl.constexpr(float(arith.SOFTPLUS_LINEAR))
SMALLEST_NORMAL, TWO_25 = tl.constexpr(2.0**-126), tl.constexpr(float(arith.TWO_25))
TWO_23 = tl.constexpr(2.0**23)  # from here on every float32 is a whole number
WHOLE = tl.constexpr(1.5 * 2.0**23)  # x + WHOLE has x, rounded to a whole number, in its low bits for |x| < 2^22
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def divide(x, y):
    """x / y for y of a shape that broadcasts to x's."""
    return tl.div_rn(x, tl.broadcast_to(y, x.shape))


@triton.jit
def rint(x):
    """The nearest whole number, half to even, for any finite x. A zero has no sign: what follows is a cast."""
    magnitude = tl.abs(x)
    whole = tl.where(magnitude < TWO_23, (magnitude + TWO_23) - TWO_23, magnitude)
    return tl.where(x < 0.0, -whole, whole)


@triton.jit
def two_to(n):
    """2^n as float32, -126 <= n <= 127."""
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def two_to_f64(n):
    """2^n as float64, -1022 <= n <= 1023."""
    return ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def exp_polynomial(r):
    """The polynomial in eq. (1)."""
    p = r * E0 + E1
    p = p * r + E2
    p = p * r + E3
    p = p * r + E4
    return (p * (r * r) + r) + 1.0


@triton.jit
def exp_inside(x):
    """Eq. (1) for EXP_LOW <= x <= EXP_HIGH; any value elsewhere.

    x * LOG2_E + WHOLE has n in its low bits. The two factors of eq. (1) are one addition to the exponent's bits, since no
    result is subnormal or infinite: -126 <= n <= 128 and 0.7 <= p < 1.42, where p >= 1 for n = -126 and p < 1 for n = 128.
    """
    s = x * LOG2_E + WHOLE
    n = s - WHOLE
    p = exp_polynomial((x - n * LN2_HIGH) - n * LN2_LOW)
    return (p.to(tl.int32, bitcast=True) + (s.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def exp(x):
    """Eq. (1)."""
    y = tl.where(x > EXP_HIGH, INFINITY, tl.where(x < EXP_LOW, 0.0, exp_inside(x)))
    return tl.where(x == x, y, x)


@triton.jit
def exp_of_decay(x):
    """Eq. (1) for x <= 0, -infinity included; any value for a NaN."""
    return tl.where(x < EXP_LOW, 0.0, exp_inside(x))


@triton.jit
def log_scaled(a, shift):
    """Eq. (2) of a * 2^-shift, for a normal, positive and finite a; any value for another."""
    bits = a.to(tl.int32, bitcast=True)
    k = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (k << 23)).to(tl.float32, bitcast=True) - 1.0
    n = (k - shift).to(tl.float32)
    p = f * L0 + L1
    p = p * f + L2
    p = p * f + L3
    p = p * f + L4
    p = p * f + L5
    p = p * f + L6
    p = p * f + L7
    square = f * f
    y = (((p * f) * square + n * LN2_LOW) - 0.5 * square) + f
    return y + n * LN2_HIGH


@triton.jit
def log(x):
    """Eq. (2)."""
    usual = (x > 0.0) & (x < INFINITY)
    a = tl.where(usual, x, 1.0)
    subnormal = a < SMALLEST_NORMAL
    y = log_scaled(a * tl.where(subnormal, TWO_25, 1.0), tl.where(subnormal, 25, 0))
    return tl.where(usual, y, tl.where(x == 0.0, -INFINITY, tl.where(x > 0.0, x, float("nan"))))


@triton.jit
def log1p(y):
    """Eq. (3), 0 <= y <= 1, so that its logarithm is of a number from 1 to 2; any value for another y."""
    u = 1.0 + y
    return log_scaled(u, 0) + divide(y - (u - 1.0), u)


@triton.jit
def softplus(x):
    """Eq. (4). A NaN is not below zero, and so stays what it is, whatever is added to it."""
    return tl.where(x > SOFTPLUS_LINEAR, x, tl.where(x < 0.0, 0.0, x) + log1p(exp_of_decay(-tl.abs(x))))


@triton.jit
def silu(x):
    """Eq. (5)."""
    return divide(x, 1.0 + exp(-x))


@triton.jit
def tree(x, ROWS: tl.constexpr, N: tl.constexpr):
    """Eq. (6) over the last axis of (ROWS, N), N a power of two: reshape and split name both addends of every sum."""
    half: tl.constexpr = N // 2
    if half > 0:
        first, second = tl.split(tl.permute(tl.reshape(x, [ROWS, 2, half]), (0, 2, 1)))
        return tree(first + second, ROWS, half)
    else:
        return tl.reshape(x, [ROWS])


@triton.jit
def magnitude_bits(x):
    """|x| as the bits of a float32, an integer: their order is the order of floats, and above infinity's are NaN's."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
