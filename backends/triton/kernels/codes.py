"""SPEC section 2 as device functions: scales, codes, digits, and the joining of digit products."""

import numpy as np
import triton
import triton.language as tl

from refmamba.backends.triton.kernels.arithmetic import WHOLE, divide, rint, two_to, two_to_f64
from refmamba.spec import codes

ABSMAX_ZERO_BITS = tl.constexpr(int(codes.ABSMAX_ZERO.view("int32")))
INFINITY_BITS = tl.constexpr(0x7F800000)
WHOLE_BITS = tl.constexpr(int(np.float32(WHOLE.value).view(np.int32)))
LARGEST_FIXED_POINT = tl.constexpr(2.0**codes.ACTIVATION_BITS)
EXACT_ROW = tl.constexpr(codes.BLOCK)  # columns whose digit products are joined with one rounding, eq. (12)
CARRIES = tl.constexpr(0x808080)  # q + CARRIES has the balanced digits of q, the three low ones each 128 too large


@triton.jit
def scale_of(bits, largest):
    """Eq. (7) from the bits of an absolute maximum."""
    zero = bits < ABSMAX_ZERO_BITS
    m = tl.where(zero, 1.0, bits.to(tl.float32, bitcast=True))
    return tl.where(zero, 1.0, divide(tl.zeros(m.shape, tl.float32) + largest, m))


@triton.jit
def exponent_of(bits, MAGNITUDE: tl.constexpr):
    """Eq. (10) from the bits of an absolute maximum, for codes up to 2^MAGNITUDE."""
    e = tl.minimum(MAGNITUDE - ((bits >> 23) - 126), 126)
    return tl.where(bits < ABSMAX_ZERO_BITS, 0, e)


@triton.jit
def clamped(x, scale, largest):
    """x * scale, held within +-largest by comparisons. A NaN stays one."""
    y = x * scale
    return tl.where(y > largest, largest, tl.where(y < -largest, -largest, y))


@triton.jit
def quantize(x, scale, largest):
    """Eq. (8) as int32, largest < 2^22: the low bits of a sum. A NaN gives any code: its call fails."""
    return (clamped(x, scale, largest) + WHOLE).to(tl.int32, bitcast=True) - WHOLE_BITS


@triton.jit
def quantize_wide(x, scale):
    """Eq. (33) as int32: held within +-2^30 only. A NaN gives any code: its call fails."""
    y = clamped(x, scale, LARGEST_FIXED_POINT)
    return rint(tl.where(y == y, y, 0.0)).to(tl.int32)


@triton.jit
def to_fixed_point(x, exponent):
    """Eq. (10) as int32: x * 2^exponent rounds only where it is too small for any code but 0."""
    y = x * two_to(exponent)
    return rint(tl.where(tl.abs(y) <= LARGEST_FIXED_POINT, y, 0.0)).to(tl.int32)


@triton.jit
def digit(q, place):
    """The balanced digit of a code q at a place, q = sum of digit * 256^place: int8. Place 3 is the last that is not zero."""
    shifted = (q + CARRIES) >> (8 * tl.minimum(place, 3))
    return tl.where(place < 3, (shifted & 255) - 128, tl.where(place == 3, shifted, 0)).to(tl.int8)


@triton.jit
def joined(total, products, PLANE: tl.constexpr, M: tl.constexpr, DIGITS: tl.constexpr, LOW: tl.constexpr):
    """Adds to `total` (M, BN) int64 the products (M * DIGITS, BN) of every activation digit with the weight digit PLANE.

    Those whose place is below 3 (LOW), or those from 3 on, in units of 256^3.
    """
    place = PLANE + tl.arange(0, DIGITS)[None, :, None]
    chosen = (place < 3) if LOW else (place >= 3)
    units = tl.where(chosen, place if LOW else place - 3, 0)
    parts = tl.reshape(products, [M, DIGITS, products.shape[1]]).to(tl.int64)
    return total + tl.sum(tl.where(chosen, parts << (8 * units), 0), 1)


@triton.jit
def rescale(acc, x, w, X_FIXED: tl.constexpr, W_FIXED: tl.constexpr):
    """Eq. (13): acc (M, BN) int32 or float64; x (M,) and w (BN,) are int32 exponents where FIXED, else float32 scales.

    Adding 0.0 turns a -0.0 into +0.0.
    """
    if X_FIXED:
        acc = acc * two_to_f64(-x)[:, None]
    if W_FIXED:
        acc = acc * two_to_f64(-w)[None, :]
    y = acc.to(tl.float32) + 0.0
    if X_FIXED:
        return y if W_FIXED else divide(y, w[None, :])
    else:
        return divide(y, x[:, None] if W_FIXED else x[:, None] * w[None, :])
