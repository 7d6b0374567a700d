"""One layer as kernels: what a linear layer reads, its codes, its product, and what follows it.

A call's sequences lie one after the other without padding: row r of every activation is one token, `sequence_ptr` says of
which sequence, `position_ptr` which of its tokens in this call. A pointer that a use does not need is None.

What a linear layer reads (SOURCE): "plain", a row as it is; "norm", eq. (16) of it; "conv", eq. (17) and (5) of it. Where it
is not kept it is computed again, which costs less than a pass through memory. How it is coded
(CODER): "per_token", "per_sequence", "static" (eq. 7, 8), "fixed_point" (eq. 10), or "flattened" (eq. 33).
"""

import triton
import triton.language as tl

from refmamba.backends.triton.kernels.arithmetic import (
    divide,
    exp,
    exp_of_decay,
    magnitude_bits,
    silu,
    softplus,
    tree,
    two_to_f64,
)
from refmamba.backends.triton.kernels.codes import (
    EXACT_ROW,
    INFINITY_BITS,
    digit,
    exponent_of,
    joined,
    quantize,
    quantize_wide,
    rescale,
    scale_of,
    to_fixed_point,
)
from refmamba.spec import codes

ACTIVATION_BITS = tl.constexpr(codes.ACTIVATION_BITS)


@triton.jit
def rms_root(x_ptr, x_stride, eps, row, row_ok, K, M: tl.constexpr, WIDTH: tl.constexpr):
    """The divisor in eq. (16), (M,): the whole row at once, WIDTH the power of two from K on."""
    k = tl.arange(0, WIDTH)
    x = tl.load(x_ptr + row[:, None] * x_stride + k[None, :], mask=row_ok[:, None] & (k < K)[None, :], other=0.0)
    mean = divide(tree(x * x, M, WIDTH), tl.zeros([M], tl.float32) + K)
    return tl.sqrt_rn(mean + eps)


@triton.jit
def convolution(
    x_ptr, x_stride, weight_ptr, bias_ptr, state_ptr, state_stride, row, sequence, position, k, ok, K, TAPS: tl.constexpr
):  # fmt: skip
    """Eq. (17) for some rows (M,) and channels k (BK,), weight (TAPS, K)."""
    first = tl.min(position, 0)
    for tap in tl.static_range(TAPS):
        at = position - (TAPS - 1 - tap)
        x = tl.load(x_ptr + (row - (TAPS - 1 - tap))[:, None] * x_stride + k[None, :], mask=ok & (at >= 0)[:, None], other=0.0)
        if first < TAPS - 1 - tap:
            before = state_ptr + (sequence * state_stride + TAPS - 1 + at)[:, None] + k[None, :] * (TAPS - 1)
            x = tl.where((at >= 0)[:, None], x, tl.load(before, mask=ok & (at < 0)[:, None], other=0.0))
        term = x * tl.load(weight_ptr + tap * K + k[None, :], mask=ok, other=0.0)
        if tap == 0:
            y = term
        else:
            y = y + term
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + k[None, :], mask=ok, other=0.0)
    return y


@triton.jit
def store_conv_state(
    x_ptr, x_stride, state_ptr, new_state_ptr, state_stride, row, sequence, position, length, k, ok, TAPS: tl.constexpr
):  # fmt: skip
    """The inputs that eq. (17) keeps for the next call: a row near the end of its sequence stores itself, and the first row
    what is left of the old state where the call is shorter than it."""
    x = tl.load(x_ptr + row[:, None] * x_stride + k[None, :], mask=ok, other=0.0)
    place = position - length + TAPS - 1
    target = new_state_ptr + (sequence * state_stride)[:, None] + k[None, :] * (TAPS - 1)
    tl.store(target + place[:, None], x, mask=ok & (place >= 0)[:, None])
    for left in tl.static_range(TAPS - 1):
        stays = (position == 0) & (left + length < TAPS - 1)
        old = state_ptr + (sequence * state_stride + left + length)[:, None] + k[None, :] * (TAPS - 1)
        tl.store(target + left, tl.load(old, mask=ok & stays[:, None], other=0.0), mask=ok & stays[:, None])


@triton.jit
def source(
    x_ptr, x_stride, weight_ptr, bias_ptr, state_ptr, state_stride, root, row, sequence, position, k, ok, K,
    SOURCE: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """What a linear layer reads, (M, BK), 0.0 where not ok."""
    if SOURCE == "conv":
        return silu(
            convolution(x_ptr, x_stride, weight_ptr, bias_ptr, state_ptr, state_stride, row, sequence, position, k, ok, K, TAPS)
        )
    else:
        x = tl.load(x_ptr + row[:, None] * x_stride + k[None, :], mask=ok, other=0.0)
        if SOURCE == "norm":
            return divide(x, root[:, None]) * tl.load(weight_ptr + k[None, :], mask=ok, other=0.0)
        else:
            return x


@triton.jit
def transformed(x, power_ptr, k, ok):
    """Eq. (29) where the layer divides its input: x (M, BK), the exponents (K,). Through float64, so rounded once."""
    if power_ptr is not None:
        power = two_to_f64(-tl.load(power_ptr + k[None, :], mask=ok, other=0))
        return (x.to(tl.float64) * power).to(tl.float32)
    else:
        return x


@triton.jit
def selected(x, threshold, PART: tl.constexpr):
    """Eq. (32): the values below the threshold, or the others, NaN among them; zeros instead of the rest."""
    if PART == "all":
        return x
    else:
        inside = tl.abs(x) < threshold
        return tl.where(inside, x, 0.0) if PART == "below" else tl.where(inside, 0.0, x)


@triton.jit
def row_maximum(
    x_ptr, x_stride, weight_ptr, bias_ptr, state_ptr, state_stride, power_ptr, threshold, root, row, row_ok, sequence,
    position, K, SOURCE: tl.constexpr, TAPS: tl.constexpr, PART: tl.constexpr, M: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The bits of the largest magnitude in each row (M,), before eq. (7) counts small ones as zero."""
    bits = tl.zeros([M], tl.int32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        ok = row_ok[:, None] & (k < K)[None, :]
        x = source(x_ptr, x_stride, weight_ptr, bias_ptr, state_ptr, state_stride, root, row, sequence, position, k, ok, K,
                   SOURCE, TAPS)  # fmt: skip
        x = selected(tl.where(ok, transformed(x, power_ptr, k, ok), 0.0), threshold, PART)
        bits = tl.maximum(bits, tl.max(magnitude_bits(x), 1))
    return bits


@triton.jit
def report(bits, failure_ptr, site):
    """Keep the number of the first site that is to make a code of a NaN or an infinity."""
    tl.atomic_min(failure_ptr, site, mask=tl.max(bits, 0) >= INFINITY_BITS)


@triton.jit
def factors(bits, sequence, peak_ptr, static_ptr, row_ok, largest, CODER: tl.constexpr):
    """What each row is multiplied by to make its codes, and its scale (M,): both are the exponent for fixed point.

    They differ where a static scale is of an absolute maximum of zero: every code is then 0 and the scale 1.
    """
    if CODER == "fixed_point":
        exponent = exponent_of(bits, ACTIVATION_BITS)
        return exponent, exponent
    else:
        if CODER == "static" or CODER == "flattened":
            one = tl.zeros(bits.shape, tl.float32)
            return one + tl.load(static_ptr), one + tl.load(static_ptr + 1)
        else:
            if CODER == "per_sequence":
                bits = tl.load(peak_ptr + sequence, mask=row_ok, other=0)
            scale = scale_of(bits, largest)
            return scale, scale


@triton.jit
def encode(x, factor, largest, CODER: tl.constexpr):
    """Codes (M, BK) int32, eq. (8) or (10)."""
    if CODER == "fixed_point":
        return to_fixed_point(x, factor[:, None])
    elif CODER == "flattened":
        return quantize_wide(x, factor[:, None])
    else:
        return quantize(x, factor[:, None], largest)


@triton.jit(do_not_specialize=["rows"])
def peak_kernel(
    x_ptr, x_stride, weight_ptr, bias_ptr, eps, state_ptr, state_stride, sequence_ptr, position_ptr, power_ptr, threshold,
    peak_ptr, rows,
    K: tl.constexpr, SOURCE: tl.constexpr, TAPS: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr, M: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """The bits of the largest magnitude of each sequence, peak (sequences,) int32, zeros before."""
    row = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)
    row_ok = row < rows
    sequence = tl.load(sequence_ptr + row, mask=row_ok, other=0).to(tl.int64)
    position = tl.load(position_ptr + row, mask=row_ok, other=0)
    root = tl.zeros([M], tl.float32)
    if SOURCE == "norm":
        root = rms_root(x_ptr, x_stride, eps, row, row_ok, K, M, WIDTH)
    bits = row_maximum(x_ptr, x_stride, weight_ptr, bias_ptr, state_ptr, state_stride, power_ptr, threshold, root, row, row_ok,
                       sequence, position, K, SOURCE, TAPS, PART, M, BK)  # fmt: skip
    tl.atomic_max(peak_ptr + sequence, bits, mask=row_ok)


@triton.jit(do_not_specialize=["rows", "site"])
def code_kernel(
    x_ptr, x_stride, weight_ptr, bias_ptr, eps, state_ptr, new_state_ptr, state_stride, sequence_ptr, position_ptr,
    length_ptr, power_ptr, threshold, u_ptr, peak_ptr, static_ptr, failure_ptr, site, q_ptr, scale_ptr, rows, largest,
    K: tl.constexpr, SOURCE: tl.constexpr, TAPS: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr, CODER: tl.constexpr,
    DIGITS: tl.constexpr, M: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The codes of what a linear layer reads: digits q (rows, DIGITS, K) int8, scale or exponent (rows,). Prefill only.

    A row is computed once, and kept in registers until its maximum is known: as tiles, since K need not be a power of two.
    """
    row = tl.minimum(tl.program_id(0) * M + tl.arange(0, M), rows - 1).to(tl.int64)  # past the last row: it again
    row_ok = tl.full([M], True, tl.int1)
    sequence = tl.load(sequence_ptr + row, mask=row_ok, other=0).to(tl.int64)
    position = tl.load(position_ptr + row, mask=row_ok, other=0)
    root = tl.zeros([M], tl.float32)
    if SOURCE == "norm":
        root = rms_root(x_ptr, x_stride, eps, row, row_ok, K, M, WIDTH)
    tiles, largest_bits = (), tl.zeros([M, BK], tl.int32)
    for i in tl.static_range((K + BK - 1) // BK):
        k = i * BK + tl.arange(0, BK)
        ok = row_ok[:, None] & (k < K)[None, :]
        x = source(x_ptr, x_stride, weight_ptr, bias_ptr, state_ptr, state_stride, root, row, sequence, position, k, ok, K,
                   SOURCE, TAPS)  # fmt: skip
        if SOURCE == "conv":
            tl.store(u_ptr + row[:, None] * K + k[None, :], x, mask=ok)
        x = selected(tl.where(ok, transformed(x, power_ptr, k, ok), 0.0), threshold, PART)
        tiles, largest_bits = tiles + (x,), tl.maximum(largest_bits, magnitude_bits(x))  # noqa: RUF005
    bits = tl.max(largest_bits, 1)
    report(bits, failure_ptr, site)
    factor, scale = factors(bits, sequence, peak_ptr, static_ptr, row_ok, largest, CODER)
    tl.store(scale_ptr + row, scale, mask=row_ok)
    for i in tl.static_range((K + BK - 1) // BK):
        k = i * BK + tl.arange(0, BK)
        ok = row_ok[:, None] & (k < K)[None, :]
        q = encode(tiles[i], factor, largest, CODER)
        for place in tl.static_range(DIGITS):
            value = q.to(tl.int8) if DIGITS == 1 else digit(q, place)
            tl.store(q_ptr + (row * DIGITS + place)[:, None] * K + k[None, :], value, mask=ok)
    if SOURCE == "conv":
        length = tl.load(length_ptr + sequence, mask=row_ok, other=0)
        if (tl.min(position, 0) == 0) | (tl.max(position - length, 0) >= 1 - TAPS):
            for start in range(0, K, BK):
                k = start + tl.arange(0, BK)
                ok = row_ok[:, None] & (k < K)[None, :]
                store_conv_state(x_ptr, x_stride, state_ptr, new_state_ptr, state_stride, row, sequence, position, length, k,
                                 ok, TAPS)  # fmt: skip


@triton.jit
def butterfly(q, ROWS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Eq. (31) on whole numbers (ROWS, BLOCK), the pairs at a distance of HALF and those at larger ones."""
    if HALF < BLOCK:
        groups: tl.constexpr = ROWS * BLOCK // (2 * HALF)
        a, b = tl.split(tl.permute(tl.reshape(q, [groups, 2, HALF]), (0, 2, 1)))
        q = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), [ROWS, BLOCK])
        return butterfly(q, ROWS, 2 * HALF, BLOCK)
    else:
        return q


@triton.jit(do_not_specialize=["rows", "site"])
def rotate_kernel(
    x_ptr, x_stride, weight_ptr, bias_ptr, eps, state_ptr, new_state_ptr, state_stride, sequence_ptr, position_ptr,
    length_ptr, power_ptr, u_ptr, failure_ptr, site, y_ptr, rows,
    K: tl.constexpr, SOURCE: tl.constexpr, TAPS: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Eq. (31) of what a linear layer reads: y (rows, K) float32, K a multiple of BLOCK."""
    row = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)
    row_ok = row < rows
    sequence = tl.load(sequence_ptr + row, mask=row_ok, other=0).to(tl.int64)
    position = tl.load(position_ptr + row, mask=row_ok, other=0)
    root = tl.zeros([M], tl.float32)
    if SOURCE == "norm":
        root = rms_root(x_ptr, x_stride, eps, row, row_ok, K, M, WIDTH)
    bits = row_maximum(x_ptr, x_stride, weight_ptr, bias_ptr, state_ptr, state_stride, power_ptr, 0.0, root, row, row_ok,
                       sequence, position, K, SOURCE, TAPS, "all", M, BLOCK)  # fmt: skip
    report(bits, failure_ptr, site)
    exponent = exponent_of(bits, ACTIVATION_BITS)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        ok = row_ok[:, None] & (k < K)[None, :]
        x = source(x_ptr, x_stride, weight_ptr, bias_ptr, state_ptr, state_stride, root, row, sequence, position, k, ok, K,
                   SOURCE, TAPS)  # fmt: skip
        if SOURCE == "conv":
            length = tl.load(length_ptr + sequence, mask=row_ok, other=0)
            tl.store(u_ptr + row[:, None] * K + k[None, :], x, mask=ok)
            store_conv_state(x_ptr, x_stride, state_ptr, new_state_ptr, state_stride, row, sequence, position, length, k, ok,
                             TAPS)  # fmt: skip
        q = to_fixed_point(transformed(x, power_ptr, k, ok), exponent[:, None]).to(tl.int64)
        y = butterfly(q, M, 1, BLOCK).to(tl.float64) * two_to_f64(-exponent)[:, None]
        tl.store(y_ptr + row[:, None] * K + k[None, :], y.to(tl.float32), mask=ok)


@triton.jit
def weight_tile(
    w_ptr, steps_ptr, plane, c, k, N, K, PACKED: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Weight codes (BN, BK) int8 of digit `plane`, from (N, K), or from the packed bytes of eq. (14), times their steps where
    a group of columns has its own, eq. (30)."""
    if PACKED:
        half = tl.min(k, 0) // 2 + tl.arange(0, BK // 2)
        at = w_ptr + c[:, None] * ((K + 1) // 2) + half[None, :]
        byte = tl.load(at, mask=(c < N)[:, None] & (2 * half < K)[None, :], other=0)
        even = ((byte & 15) ^ 8).to(tl.int8) - 8
        odd = byte.to(tl.int8, bitcast=True) >> 4
        w = tl.interleave(even, odd)
    else:
        at = w_ptr + plane * N * K + c[:, None] * K + k[None, :]
        w = tl.load(at, mask=(c < N)[:, None] & (k < K)[None, :], other=0)
    if steps_ptr is not None:
        at = steps_ptr + c[:, None] * ((K + GROUP - 1) // GROUP) + (k // GROUP)[None, :]
        w = w * tl.load(at, mask=(c < N)[:, None] & (k < K)[None, :], other=1).to(tl.int8)
    return w


@triton.jit
def spread_kernel(w_ptr, steps_ptr, q_ptr, N, K: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """The packed codes of a weight, times their steps where there are some: q (N, K) int8. Prefill only."""
    c = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    q = weight_tile(w_ptr, steps_ptr, 0, c, k, N, K, True, GROUP, BN, BK)
    tl.store(q_ptr + c[:, None] * K + k[None, :], q, mask=(c < N)[:, None] & (k < K)[None, :])


@triton.jit
def digit_tile(
    x_ptr, x_stride, weight_ptr, bias_ptr, state_ptr, state_stride, power_ptr, threshold, q_ptr, root, factor, row, row_ok,
    sequence, position, k, K, largest,
    SOURCE: tl.constexpr, TAPS: tl.constexpr, PART: tl.constexpr, CODER: tl.constexpr, DIGITS: tl.constexpr,
    PLACES: tl.constexpr, M: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Activation digits (M * PLACES, BK) int8: the digits of row 0 first. Stored ones have PLACES = DIGITS; others may have
    places that are always 0, since a tensor core wants 16 rows."""
    if SOURCE == "codes":
        place = tl.arange(0, M * PLACES)
        first = tl.min(row, 0) * PLACES
        last = first + tl.sum(row_ok.to(tl.int32), 0) * PLACES
        at = first + place
        return tl.load(q_ptr + at[:, None] * K + k[None, :], mask=(at < last)[:, None] & (k < K)[None, :], other=0)
    else:
        ok = row_ok[:, None] & (k < K)[None, :]
        x = source(x_ptr, x_stride, weight_ptr, bias_ptr, state_ptr, state_stride, root, row, sequence, position, k, ok, K,
                   SOURCE, TAPS)  # fmt: skip
        q = tl.where(ok, encode(selected(transformed(x, power_ptr, k, ok), threshold, PART), factor, largest, CODER), 0)
        place = tl.arange(0, PLACES)[None, :, None]
        if DIGITS == 1:
            digits = tl.where(place == 0, q[:, None, :], 0).to(tl.int8)
        else:
            digits = digit(q[:, None, :], place)
        return tl.reshape(digits, [M * PLACES, BK])


@triton.jit
def product(
    x_ptr, x_stride, weight_ptr, bias_ptr, state_ptr, state_stride, power_ptr, threshold, q_ptr, root, factor, row, row_ok,
    sequence, position, w_ptr, steps_ptr, c, N, K, largest,
    SOURCE: tl.constexpr, TAPS: tl.constexpr, PART: tl.constexpr, CODER: tl.constexpr, DIGITS: tl.constexpr,
    PLACES: tl.constexpr, PLANES: tl.constexpr, PACKED: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """The integer product, eq. (11, 12): (M, BN), int32 for two factors of one digit each, else float64.

    Digits of eight bits are what tensor cores multiply. The products of one place are added in int32, which holds them for
    EXACT_ROW columns and more; then those of a place below 3, and those of the others, in int64; then the two in float64,
    with one rounding, as eq. (12) has it.
    """
    if DIGITS == 1 and PLANES == 1:
        acc = tl.zeros([M * PLACES, BN], tl.int32)
        for start in range(0, K, BK):
            k = start + tl.arange(0, BK)
            digits = digit_tile(x_ptr, x_stride, weight_ptr, bias_ptr, state_ptr, state_stride, power_ptr, threshold, q_ptr,
                                root, factor, row, row_ok, sequence, position, k, K, largest, SOURCE, TAPS, PART, CODER,
                                DIGITS, PLACES, M, BK)  # fmt: skip
            w = weight_tile(w_ptr, steps_ptr, 0, c, k, N, K, PACKED, GROUP, BN, BK)
            acc = tl.dot(digits, tl.trans(w), acc, out_dtype=tl.int32)
        return acc if PLACES == 1 else tl.sum(tl.reshape(acc, [M, PLACES, BN]), 1)
    else:
        total = tl.zeros([M, BN], tl.float64)
        for block in range(0, K, EXACT_ROW):
            low, high = tl.zeros([M, BN], tl.int64), tl.zeros([M, BN], tl.int64)
            for plane in tl.static_range(PLANES):
                acc = tl.zeros([M * PLACES, BN], tl.int32)
                for start in range(block, block + EXACT_ROW if block + EXACT_ROW < K else K, BK):
                    k = start + tl.arange(0, BK)
                    digits = digit_tile(x_ptr, x_stride, weight_ptr, bias_ptr, state_ptr, state_stride, power_ptr, threshold,
                                        q_ptr, root, factor, row, row_ok, sequence, position, k, K, largest, SOURCE, TAPS,
                                        PART, CODER, DIGITS, PLACES, M, BK)  # fmt: skip
                    w = weight_tile(w_ptr, steps_ptr, plane, c, k, N, K, PACKED, GROUP, BN, BK)
                    acc = tl.dot(digits, tl.trans(w), acc, out_dtype=tl.int32)
                low = joined(low, acc, plane, M, PLACES, True)
                high = joined(high, acc, plane, M, PLACES, False)
            total = total + (high.to(tl.float64) * 16777216.0 + low.to(tl.float64))
        return total


@triton.jit
def linear(
    x_ptr, x_stride, weight_ptr, bias_ptr, eps, state_ptr, state_stride, power_ptr, threshold, peak_ptr, static_ptr,
    failure_ptr, site, q_ptr, scale_ptr, row, row_ok, sequence, position, w_ptr, steps_ptr, w_scale_ptr, c, N, K, largest,
    SOURCE: tl.constexpr, TAPS: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr, CODER: tl.constexpr,
    DIGITS: tl.constexpr, PLACES: tl.constexpr, PLANES: tl.constexpr, PACKED: tl.constexpr, GROUP: tl.constexpr,
    M: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A linear layer up to eq. (13), (M, BN) float32: codes its input, or takes stored codes (SOURCE "codes")."""
    root = tl.zeros([M], tl.float32)
    if SOURCE == "codes":
        factor = root
        scale = tl.load(scale_ptr + row, mask=row_ok, other=0 if CODER == "fixed_point" else 1.0)
    else:
        if SOURCE == "norm":
            root = rms_root(x_ptr, x_stride, eps, row, row_ok, K, M, WIDTH)
        bits = row_maximum(x_ptr, x_stride, weight_ptr, bias_ptr, state_ptr, state_stride, power_ptr, threshold, root, row,
                           row_ok, sequence, position, K, SOURCE, TAPS, PART, M, BK)  # fmt: skip
        report(bits, failure_ptr, site)
        factor, scale = factors(bits, sequence, peak_ptr, static_ptr, row_ok, largest, CODER)
    acc = product(x_ptr, x_stride, weight_ptr, bias_ptr, state_ptr, state_stride, power_ptr, threshold, q_ptr, root, factor,
                  row, row_ok, sequence, position, w_ptr, steps_ptr, c, N, K, largest, SOURCE, TAPS, PART, CODER, DIGITS,
                  PLACES, PLANES, PACKED, GROUP, M, BN, BK)  # fmt: skip
    w_scale = tl.load(w_scale_ptr + c, mask=c < N, other=0 if PLANES == 3 else 1.0)
    return rescale(acc, scale, w_scale, CODER == "fixed_point", PLANES == 3)


@triton.jit
def finished(y, sum_ptr, bias_ptr, residual_ptr, row, c, ok, N, SOFTPLUS: tl.constexpr):
    """What follows a product: the part before it, the bias, eq. (18) after dt_proj, eq. (24)'s sum after out_proj."""
    if sum_ptr is not None:
        y = tl.load(sum_ptr + row[:, None] * N + c[None, :], mask=ok, other=0.0) + y
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + c[None, :], mask=ok, other=0.0)
    if SOFTPLUS:
        y = softplus(y)
    if residual_ptr is not None:
        y = tl.load(residual_ptr + row[:, None] * N + c[None, :], mask=ok, other=0.0) + y
    return y


@triton.jit(do_not_specialize=["rows", "site"])
def linear_kernel(
    x_ptr, x_stride, weight_ptr, bias_ptr, eps, state_ptr, new_state_ptr, state_stride, sequence_ptr, position_ptr,
    length_ptr, power_ptr, threshold, u_ptr, peak_ptr, static_ptr, failure_ptr, site, q_ptr, scale_ptr,
    w_ptr, steps_ptr, w_scale_ptr, sum_ptr, y_bias_ptr, residual_ptr, y_ptr, rows, N, largest,
    K: tl.constexpr, SOURCE: tl.constexpr, TAPS: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr, CODER: tl.constexpr,
    DIGITS: tl.constexpr, PLACES: tl.constexpr, PLANES: tl.constexpr, PACKED: tl.constexpr, GROUP: tl.constexpr,
    SOFTPLUS: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A linear layer and what follows it: y (rows, N). In decode it is fused with what comes before: see SOURCE."""
    row = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)
    row_ok = row < rows
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    sequence, position = row * 0, tl.zeros([M], tl.int32)
    if SOURCE != "codes":
        sequence = tl.load(sequence_ptr + row, mask=row_ok, other=0).to(tl.int64)
        position = tl.load(position_ptr + row, mask=row_ok, other=0)
    y = linear(x_ptr, x_stride, weight_ptr, bias_ptr, eps, state_ptr, state_stride, power_ptr, threshold, peak_ptr, static_ptr,
               failure_ptr, site, q_ptr, scale_ptr, row, row_ok, sequence, position, w_ptr, steps_ptr, w_scale_ptr, c, N, K,
               largest, SOURCE, TAPS, WIDTH, PART, CODER, DIGITS, PLACES, PLANES, PACKED, GROUP, M, BN, BK)  # fmt: skip
    ok = row_ok[:, None] & (c < N)[None, :]
    tl.store(
        y_ptr + row[:, None] * N + c[None, :], finished(y, sum_ptr, y_bias_ptr, residual_ptr, row, c, ok, N, SOFTPLUS), mask=ok
    )
    # The first condition is known to the compiler, the second is not.
    if SOURCE == "conv":  # noqa: SIM102
        if tl.program_id(1) == 0:
            length = tl.load(length_ptr + sequence, mask=row_ok, other=0)
            for start in range(0, K, BK):
                k = start + tl.arange(0, BK)
                k_ok = row_ok[:, None] & (k < K)[None, :]
                u = source(x_ptr, x_stride, weight_ptr, bias_ptr, state_ptr, state_stride, row * 0.0, row, sequence, position,
                           k, k_ok, K, SOURCE, TAPS)  # fmt: skip
                tl.store(u_ptr + row[:, None] * K + k[None, :], u, mask=k_ok)
                store_conv_state(x_ptr, x_stride, state_ptr, new_state_ptr, state_stride, row, sequence, position, length, k,
                                 k_ok, TAPS)  # fmt: skip


@triton.jit(do_not_specialize=["rows", "site"])
def read_back_kernel(
    y_ptr, sequence_ptr, peak_ptr, failure_ptr, site, bias_ptr, residual_ptr, out_ptr, rows, largest,
    N: tl.constexpr, CODER: tl.constexpr, SOFTPLUS: tl.constexpr, M: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The `out` side, eq. (7, 8, 9), and what follows it: y (rows, N) -> (rows, N)."""
    row = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)
    row_ok = row < rows
    sequence = tl.load(sequence_ptr + row, mask=row_ok, other=0).to(tl.int64)
    bits = row_maximum(y_ptr, N, None, None, None, 0, None, 0.0, row, row, row_ok, sequence, row, N, "plain", 1, "all", M, BK)
    report(bits, failure_ptr, site)
    factor, scale = factors(bits, sequence, peak_ptr, None, row_ok, largest, CODER)
    for start in range(0, N, BK):
        c = start + tl.arange(0, BK)
        ok = row_ok[:, None] & (c < N)[None, :]
        q = encode(tl.load(y_ptr + row[:, None] * N + c[None, :], mask=ok, other=0.0), factor, largest, CODER)
        y = finished(divide(q.to(tl.float32), scale[:, None]), None, bias_ptr, residual_ptr, row, c, ok, N, SOFTPLUS)
        tl.store(out_ptr + row[:, None] * N + c[None, :], y, mask=ok)


@triton.jit
def states(ptr, at, STATES: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr):
    """A channel's values for each state, as a tuple of N / TILE tiles (channels, TILE): states i * TILE to + TILE."""
    tiles = ()
    for i in tl.static_range(N // TILE):
        n = i * TILE + tl.arange(0, TILE)
        tiles = tiles + (tl.load(ptr + at[:, None] + n[None, :], mask=(n < STATES)[None, :], other=0.0),)  # noqa: RUF005
    return tiles


@triton.jit
def tuple_tree(tiles, COUNT: tl.constexpr):
    """Eq. (6) over tiles: the second half is added to the first until one is left."""
    half: tl.constexpr = COUNT // 2
    if half > 0:
        sums = ()
        for i in tl.static_range(half):
            sums = sums + (tiles[i] + tiles[i + half],)  # noqa: RUF005
        return tuple_tree(sums, half)
    else:
        return tiles[0]


@triton.jit
def advance(
    u, delta, A, h, B_at, C_at,
    DECAYS: tl.constexpr, STATES: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One token, eq. (20, 21) and the first sums of (22): u, delta (channels, TILE or 1), A and h as `states` has them -> sums
    (channels, TILE), h. B and C of the token begin at the pointers, (channels,) or (1,)."""
    following, terms = (), ()
    for i in tl.static_range(N // TILE):
        n = i * TILE + tl.arange(0, TILE)
        real = (n < STATES)[None, :]
        B = tl.load(B_at[:, None] + n[None, :], mask=real, other=0.0)
        C = tl.load(C_at[:, None] + n[None, :], mask=real, other=0.0)
        exponent = delta * A[i]
        A_bar = exp_of_decay(exponent) if DECAYS else exp(exponent)
        now = A_bar * h[i] + (delta * u) * B
        following = following + (now,)  # noqa: RUF005
        terms = terms + (tl.where(real, C * now, 0.0),)  # noqa: RUF005
    return tuple_tree(terms, N // TILE), following


@triton.jit
def store_states(ptr, at, h, STATES: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr):
    """The inverse of `states`."""
    for i in tl.static_range(N // TILE):
        n = i * TILE + tl.arange(0, TILE)
        tl.store(ptr + at[:, None] + n[None, :], h[i], mask=(n < STATES)[None, :])


@triton.jit
def side_by_side(tiles, COUNT: tl.constexpr):
    """A tuple of COUNT tiles as one with an axis more, the last, COUNT a power of two."""
    half: tl.constexpr = COUNT // 2
    if half > 0:
        pairs = ()
        for i in tl.static_range(half):
            pairs = pairs + (tl.join(tiles[i], tiles[i + half]),)  # noqa: RUF005
        return side_by_side(pairs, half)
    else:
        return tiles[0]


@triton.jit
def scan_kernel(
    u_ptr, delta_ptr, B_ptr, C_ptr, z_ptr, A_ptr, D_ptr, h_ptr, new_h_ptr, h_stride, start_ptr, length_ptr, y_ptr,
    E: tl.constexpr, BC_STRIDE: tl.constexpr, Z_STRIDE: tl.constexpr,
    DECAYS: tl.constexpr, STATES: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """The scan and, where z is there, the gate, eq. (20) to (23), of one sequence and BE of E channels: y (rows, E).

    LANES threads share a channel: LANES is 1, or TILE, of which each has one state. Then the last sums of (22), and the gate,
    are those of LANES tokens at once, one for each of them; the last few tokens of a sequence go one by one.
    """
    sequence = tl.program_id(1).to(tl.int64)
    start, length = tl.load(start_ptr + sequence).to(tl.int64), tl.load(length_ptr + sequence)
    c = tl.minimum(tl.program_id(0) * BE + tl.arange(0, BE), E - 1)  # past the last channel: it again
    A = states(A_ptr, c * STATES, STATES, N, TILE)
    D = tl.load(D_ptr + c)
    h = states(h_ptr + sequence * h_stride, c * STATES, STATES, N, TILE)
    at = start * E + c[:, None] + tl.zeros([1, LANES], tl.int32)  # each lane loads what it needs
    u_at, delta_at = u_ptr + at, delta_ptr + at
    at = start * BC_STRIDE + tl.arange(0, 1)
    B_at, C_at = B_ptr + at, C_ptr + at
    t = 0
    while t + LANES <= length:
        sums = ()
        for i in tl.static_range(LANES):
            u, delta = tl.load(u_at + i * E), tl.load(delta_at + i * E)
            part, h = advance(u, delta, A, h, B_at + i * BC_STRIDE, C_at + i * BC_STRIDE, DECAYS, STATES, N, TILE)
            sums = sums + (part,)  # noqa: RUF005
        sums = tl.reshape(side_by_side(sums, LANES), [BE, TILE, LANES])
        y = tl.reshape(tree(tl.reshape(tl.permute(sums, (0, 2, 1)), [BE * LANES, TILE]), BE * LANES, TILE), [BE, LANES])
        row = (start + t + tl.arange(0, LANES))[None, :]
        y = y + D[:, None] * tl.load(u_ptr + row * E + c[:, None])
        if z_ptr is not None:
            y = y * silu(tl.load(z_ptr + row * Z_STRIDE + c[:, None]))
        tl.store(y_ptr + row * E + c[:, None], y)
        u_at, delta_at = u_at + LANES * E, delta_at + LANES * E
        B_at, C_at = B_at + LANES * BC_STRIDE, C_at + LANES * BC_STRIDE
        t += LANES
    while t < length:
        sums, h = advance(tl.load(u_at), tl.load(delta_at), A, h, B_at, C_at, DECAYS, STATES, N, TILE)
        row = start + t
        y = tree(sums, BE, TILE) + D * tl.load(u_ptr + row * E + c)
        if z_ptr is not None:
            y = y * silu(tl.load(z_ptr + row * Z_STRIDE + c))
        tl.store(y_ptr + row * E + c, y)
        u_at, delta_at, B_at, C_at = u_at + E, delta_at + E, B_at + BC_STRIDE, C_at + BC_STRIDE
        t += 1
    store_states(new_h_ptr + sequence * h_stride, c * STATES, h, STATES, N, TILE)


@triton.jit(do_not_specialize=["rows", "site"])
def scan_step_kernel(
    x_ptr, x_stride, static_ptr, failure_ptr, site, w_ptr, steps_ptr, w_scale_ptr, y_bias_ptr,
    u_ptr, B_ptr, C_ptr, z_ptr, z_stride, A_ptr, D_ptr, h_ptr, new_h_ptr, h_stride, y_ptr, rows, channels, largest,
    K: tl.constexpr, CODER: tl.constexpr, DIGITS: tl.constexpr, PLACES: tl.constexpr, PLANES: tl.constexpr,
    PACKED: tl.constexpr, GROUP: tl.constexpr, DECAYS: tl.constexpr, STATES: tl.constexpr, N: tl.constexpr,
    TILE: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dt_proj, eq. (18), the scan and the gate for one token of each sequence: y (rows, channels). Decode only."""
    row = tl.minimum(tl.program_id(0) * M + tl.arange(0, M), rows - 1).to(tl.int64)  # past the last row: it again
    row_ok = tl.full([M], True, tl.int1)
    c = tl.minimum(tl.program_id(1) * BN + tl.arange(0, BN), channels - 1)
    y = linear(x_ptr, x_stride, None, None, 0.0, None, 0, None, 0.0, None, static_ptr, failure_ptr, site, None, None, row,
               row_ok, row, row, w_ptr, steps_ptr, w_scale_ptr, c, channels, K, largest, "plain", 1, 1, "all", CODER, DIGITS,
               PLACES, PLANES, PACKED, GROUP, M, BN, BK)  # fmt: skip
    ok = tl.full([M, BN], True, tl.int1)
    delta = tl.reshape(finished(y, None, y_bias_ptr, None, row, c, ok, channels, True), [M * BN])
    row = tl.reshape(tl.broadcast_to(row[:, None], [M, BN]), [M * BN])
    c = tl.reshape(tl.broadcast_to(c[None, :], [M, BN]), [M * BN])
    u = tl.load(u_ptr + row * channels + c)
    A = states(A_ptr, c * STATES, STATES, N, TILE)
    h = states(h_ptr, row * h_stride + c * STATES, STATES, N, TILE)
    sums, h = advance(u[:, None], delta[:, None], A, h, B_ptr + row * x_stride, C_ptr + row * x_stride, DECAYS, STATES, N, TILE)
    y = tree(sums, M * BN, TILE) + tl.load(D_ptr + c) * u
    y = y * silu(tl.load(z_ptr + row * z_stride + c))
    tl.store(y_ptr + row * channels + c, y)
    store_states(new_h_ptr, row * h_stride + c * STATES, h, STATES, N, TILE)


@triton.jit
def embed_kernel(
    token_ptr, table_ptr, steps_ptr, scale_ptr, y_ptr,
    K: tl.constexpr, PACKED: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Eq. (15): row `token` of a float32 table, or of codes with a scale for each row -> y (rows, K)."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ptr + row).to(tl.int64)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        if scale_ptr is None:
            y = tl.load(table_ptr + token * K + k, mask=k < K, other=0.0)
        else:
            if PACKED:
                byte = tl.load(table_ptr + token * ((K + 1) // 2) + k // 2, mask=k < K, other=0).to(tl.int32)
                nibble = tl.where(k % 2 == 0, byte, byte >> 4) & 15
                q = (nibble ^ 8) - 8
            else:
                q = tl.load(table_ptr + token * K + k, mask=k < K, other=0)
            q = q.to(tl.int32)
            if steps_ptr is not None:
                at = steps_ptr + token * ((K + GROUP - 1) // GROUP) + k // GROUP
                q = q * tl.load(at, mask=k < K, other=1).to(tl.int32)
            y = divide(q.to(tl.float32), tl.load(scale_ptr + token) + tl.zeros([BK], tl.float32))
        tl.store(y_ptr + row * K + k, y, mask=k < K)
