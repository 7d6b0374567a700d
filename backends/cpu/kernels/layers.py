"""The CPU backend's kernels: a pass through any range of layers in one call, by all threads (docs/SPEC.md, 1 to 6).

Every thread calls `run_layers` with its rank. A pass is a sequence of regions; in a region the threads take shares of the items
from a common counter until none is left, and all are done before the next. Which thread computes an item never changes a
bit.

Activations lie in strips: [strip of 16 channels][row][16 lanes], float32, where a row is one token of one sequence and
`stride` rows are reserved a strip. So one vector is 16 channels of one token, and sizes that are no multiple of 16 are
padded with zeros. Codes of weights are unsigned digits in the layout of `tile`: a weight is its digits' sum less an offset.

A product is made in one of two ways. By digits: codes of activations lie in rows [row][slice][K], int8, one slice where they
have 8 bits or fewer, else four, the balanced base-256 digits of a 31-bit code; the weights' offset is taken off with the sum
of the row's codes. By panels, where enough rows share the work: a strip of weights is spread out once to float64, and
multiplied with rows [row][K] of the same. What 31-bit and 23-bit codes give does not fit float64, but its error has a bound,
and where that leaves the rounding to float32 open, which is rare, the exact sum decides: eq. (12) either way.
"""

import math
from enum import IntEnum

import numba
import numpy as np

from refmamba.backends.cpu.kernels.vectors import (
    DOUBLES,
    REGISTERS_32,
    bits,
    differ,
    double,
    fetch,
    fetch_add,
    float_of,
    from_bits,
    get,
    get_d,
    get_f,
    give_way,
    highest,
    lane_tree,
    largest,
    load_any,
    load_apart,
    load_d,
    load_f,
    load_first,
    load_i,
    negative,
    panel_tile,
    pause,
    put,
    put_f,
    rint,
    rint_d,
    single,
    splat_d,
    splat_f,
    splat_i,
    splat_l,
    store_any,
    store_apart,
    store_bytes,
    store_d,
    store_f,
    store_first,
    tile,
    to_double,
    to_float,
    to_int,
    total,
    where,
    where_i,
    whole_double,
    widen,
)  # fmt: skip
from refmamba.spec import arith
from refmamba.spec.codes import ABSMAX_ZERO

f32 = np.float32
# numpy's integers where they are arguments: numba compiles a function anew for each of Python's.
FLOATS = np.int64(64)  # bytes of 16 float32
BLOCK = 4096  # columns whose integer product is joined in one piece, eq. (12)
ROWS_OF_TILE = 64  # rows of one item of a product by digits
ROWS_OF_PANEL = 96  # and by panels
PANEL = 256  # columns of a panel
PANEL_BYTES = 8 * 16 * PANEL
CONV_ROWS = 16  # rows convolved strip by strip: a strip's rows are neighbours, a row's strips are pages apart
LINE = 64  # bytes between two threads' counters
INFINITE = 0x7F800000


class Run(IntEnum):
    """The int64 arguments of `run_layers`. Names of buffers stand for their addresses; CONV_IN to SSM_OUT for those of tables
    with the address of each sequence's state."""

    (THREADS, COUNTERS, SCRATCH, SCRATCH_BYTES, FIRST, LAST, LAYERS, LAYER_TABLES, HEAD, EPSILON, D_MODEL, MODEL_STRIPS,
     INNER_STRIPS, RANK_STRIPS, STATE_STRIPS, D_STATE, TAPS, VOCABULARY, ROWS, STRIDE, SEQUENCES, START, SEQUENCE, OUT_ROWS,
     OUT_ROW, OUT_START, OUT_SEQUENCE, X, NORMED, XZ, U, XBC, DELTA, CODES, FACTOR, SCALE, SUMS, SUM_BLOCKS, ABSMAX, ERRORS,
     CONV_IN, CONV_OUT, SSM_IN, SSM_OUT, LOGITS) = range(45)  # fmt: skip


class Site(IntEnum):
    """One linear layer: int64 each."""

    (CODES, KIND, PAIRS, K, SLICES, PANELS, ERROR, FACTOR, SCALE, BIAS, IN, IN_LARGEST, IN_SCALE, SMOOTH, OUT, OUT_LARGEST,
     NUMBER) = range(17)  # fmt: skip


class Layer(IntEnum):
    """One block: int64 each, then its four sites. The head is a table like it: NORM, and IN_PROJ for the head's own product."""

    NORM, CONV, CONV_BIAS, A, DT_BIAS, D = range(6)
    IN_PROJ, X_PROJ, DT_PROJ, OUT_PROJ, SIZE = range(6, 6 + 5 * len(Site), len(Site))


class Kind(IntEnum):
    """Digits of a weight: two codes a byte, one code a byte, or three bytes of a fixed-point code, a plane each."""

    PACKED, BYTES, FIXED = 0, 1, 3


class Mode(IntEnum):
    """Where a site's scale comes from; NONE: not quantized, which on the `in` side is fixed point."""

    NONE, TOKEN, TENSOR, STATIC = range(4)


def kernel(**options):  # type: ignore[no-untyped-def]
    """A function compiled into `run_layers`. A division by zero is an infinity, as in the specification."""
    return numba.njit(error_model="numpy", nogil=True, **options)


inlined = kernel(forceinline=True)


@inlined
def at(table, field):
    """One int64 of a table."""
    return get(table + 8 * field)


PANEL_12, PANEL_6, PANEL_2, PANEL_1 = panel_tile(12), panel_tile(6), panel_tile(2), panel_tile(1)
STRIPS = 2 if REGISTERS_32 else 1  # of a tile
BYTES_8, BYTES_4, BYTES_1 = tile(False, STRIPS, 8, 1), tile(False, STRIPS, 4, 1), tile(False, STRIPS, 1, 4)
PACKED_8, PACKED_4, PACKED_1 = tile(True, STRIPS, 8, 1), tile(True, STRIPS, 4, 1), tile(True, STRIPS, 1, 2)

LOG2_E, LN2_HIGH, LN2_LOW, EXP_LOW, EXP_HIGH = arith.LOG2_E, arith.LN2_HIGH, arith.LN2_LOW, arith.EXP_LOW, arith.EXP_HIGH
E0, E1, E2, E3, E4 = arith.EXP_TERMS
G0, G1, G2, G3, G4, G5, G6, G7 = arith.LOG_TERMS
SQRT_HALF_BITS, SOFTPLUS_LINEAR = int(arith.SQRT_HALF_BITS), arith.SOFTPLUS_LINEAR
ABSMAX_ZERO_BITS = int(ABSMAX_ZERO.view(np.int32))
ZERO, HALF, ONE, INFINITY = f32(0), f32(0.5), f32(1), f32(np.inf)


# Arithmetic, the polynomials of refmamba.spec.arith on 16 lanes: see there for the reasons.
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
    return from_bits((n + splat_i(127)) << splat_i(23))


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
    return from_bits(where_i(x < splat_f(EXP_LOW), splat_i(0), bits(p) + (n << splat_i(23))))


@inlined
def log_normal(u):
    """Eq. (2) of normal numbers above zero, which are none of its special cases."""
    whole = bits(u)
    k = (whole - splat_i(SQRT_HALF_BITS)) >> splat_i(23)
    f = from_bits(whole - (k << splat_i(23))) - splat_f(ONE)
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


# Threads.
@inlined
def share(run, counter, items):
    """The next share of a region's items, first to last - 1; from `items` on there is none.

    Every thread's first share is a part of one half of the items, its next of one half of the rest, and so on: few calls,
    each a line that travels between cores, neighbours that the machine's prefetchers know, and small shares at the end.
    """
    threads, n = at(run, Run.THREADS), fetch_add(counter, 1)
    left = items >> (n // threads)
    half = left - (left >> 1)
    first = items - left
    return first + n % threads * half // threads, first + (n % threads + 1) * half // threads


@kernel()
def meet(counter, items, mine):
    """Wait until a region's items are done, `mine` of them by this thread. Returns the next region's counter.

    A thread is not waited for, only its items: one that the system has put aside holds nobody up, and passes the regions
    that went on without it. Waiting spins, as a region is shorter than a sleep, and gives way when it is long.
    """
    done = counter + 8
    fetch_add(done, mine)
    spins = 0
    while fetch(done) < items:
        spins += 1
        if spins < 2000:
            pause(0)
        else:
            give_way(0)
    return counter + LINE


# Rows: everything that sees a whole token.
@kernel()
def norm_row(run, weight, source, target):
    """Eq. (16): row `source` of the residual stream to row `target` of NORMED."""
    strips, step = at(run, Run.MODEL_STRIPS), at(run, Run.STRIDE) * FLOATS
    x, y = at(run, Run.X) + source * FLOATS, at(run, Run.NORMED) + target * FLOATS
    width = 1
    while width < strips:
        width *= 2
    # The tree's first levels add strips; where it is wider than the strips are, the rest is zeros.
    if width == 1:
        v = load_f(x)
        squares = lane_tree(v * v)
    else:
        width //= 2
        for s in range(width):
            v = load_f(x + s * step)
            v = v * v
            if s + width < strips:
                other = load_f(x + (s + width) * step)
                v = v + other * other
            store_f(y + s * step, v)
        while width > 1:
            width //= 2
            for s in range(width):
                store_f(y + s * step, load_f(y + s * step) + load_f(y + (s + width) * step))
        squares = lane_tree(load_f(y))
    root = splat_f(math.sqrt(squares / f32(at(run, Run.D_MODEL)) + get_f(at(run, Run.EPSILON))))
    for s in range(strips):
        store_f(y + s * step, load_f(x + s * step) / root * load_f(weight + s * FLOATS))


@kernel()
def conv_rows(run, layer, index, first, last):
    """Eq. (17) and silu: rows of XZ to rows of U."""
    strips, step, taps = at(run, Run.INNER_STRIPS), at(run, Run.STRIDE) * FLOATS, at(run, Run.TAPS)
    line = strips * FLOATS  # bytes of one kept input
    weight, bias = at(layer, Layer.CONV), at(layer, Layer.CONV_BIAS)
    for s in range(strips):
        for row in range(first, last):
            sequence = get(at(run, Run.SEQUENCE) + 8 * row)
            time = row - get(at(run, Run.START) + 8 * sequence)
            before = get(at(run, Run.CONV_IN) + 8 * sequence) + index * (taps - 1) * line + s * FLOATS
            x = at(run, Run.XZ) + s * step + row * FLOATS
            kept = min(taps - 1, max(0, taps - 1 - time))  # taps that reach back to the last call
            y = splat_f(ZERO)
            for tap in range(taps):
                if tap < kept:
                    v = load_f(before + (time + tap) * line)
                else:
                    v = load_f(x - (taps - 1 - tap) * FLOATS)
                v = v * load_f(weight + tap * line + s * FLOATS)
                y = v if tap == 0 else y + v
            if bias != 0:
                y = y + load_f(bias + s * FLOATS)
            store_f(at(run, Run.U) + s * step + row * FLOATS, silu(y))


@inlined
def value(source, s, step, smooth):
    """A strip of a row, divided by SmoothQuant's factors where there are any: eq. (29)."""
    v = load_f(source + s * step)
    if smooth != 0:
        v = single(double(v) * load_d(smooth + 2 * s * FLOATS))
    return v


@kernel()
def row_absmax(run, source, strips, smooth, number, sequence):
    """Bits of a row's largest magnitude, eq. (7): zero where it counts as zero. Notes the site of a NaN or infinity."""
    step = at(run, Run.STRIDE) * FLOATS
    m = splat_i(0)
    for s in range(strips):
        v = magnitude(value(source, s, step, smooth))
        m = where_i(v > m, v, m)
    m = largest(m)
    if m >= INFINITE:
        errors = at(run, Run.ERRORS) + 8 * sequence
        if get(errors) == 0:
            put(errors, number)
        return 0
    return m if m >= ABSMAX_ZERO_BITS else 0


@inlined
def factors(mode, most, m, static):
    """For an absolute maximum: what to multiply by, what to divide the product by, and the power of two to take off."""
    if mode == Mode.NONE:  # eq. (10); for 2^(E-1) <= m < 2^E the bits of m hold E + 126
        e = min(126, 30 - ((m >> 23) - 126))
        return (ZERO, ONE, ONE) if m == 0 else (float_of((e + 127) << 23), ONE, float_of((127 - e) << 23))
    if mode == Mode.STATIC:
        return (ZERO, ONE, ONE) if static == ZERO else (static, static, ONE)
    if m == 0:
        return ZERO, ONE, ONE
    scale = f32(most) / float_of(m)
    return scale, scale, ONE


@inlined
def by_panels(site, rows):
    """Whether a product of so many rows is made by panels."""
    return rows >= at(site, Site.PANELS)


@inlined
def code_bytes(k):
    """Bytes of a row of codes for panels: an odd number of lines, so that rows do not share their cache sets."""
    return 8 * k + LINE


@kernel()
def code_row(run, site, source, row, m, panels):
    """Codes of a row, eq. (8) or (10), and its factors. By digits: slices, and the codes' sum, a block of K at a time. By
    panels: float64, and what is not below the square root of the sum of their squares."""
    slices, k, step = at(site, Site.SLICES), at(site, Site.K), at(run, Run.STRIDE) * FLOATS
    smooth, most = at(site, Site.SMOOTH), at(site, Site.IN_LARGEST)
    multiplier, scale, power = factors(at(site, Site.IN), most, m, get_f(at(site, Site.IN_SCALE)))
    put_f(at(run, Run.SCALE) + 4 * row, scale)
    put_f(at(run, Run.FACTOR) + 4 * row, power)
    codes = at(run, Run.CODES) + row * slices * k
    by, high, low = splat_f(multiplier), splat_f(f32(most)), splat_f(-f32(most))
    sums = at(run, Run.SUMS) + 8 * row * at(run, Run.SUM_BLOCKS)
    if panels:
        codes = at(run, Run.CODES) + row * code_bytes(k)
        squares = splat_f(ZERO)
        for s in range(k // 16):
            v = value(source, s, step, smooth) * by
            v = rint(where(v > high, high, where(v < low, low, v)))
            squares = squares + v * v
            store_d(codes + 2 * s * FLOATS, double(v))
        put_f(sums, f32(1.01) * math.sqrt(lane_tree(squares)))
        return
    block = 0
    while block * BLOCK < k:
        s_sum = splat_l(0)
        for s in range(block * BLOCK // 16, min(k, (block + 1) * BLOCK) // 16):
            v = value(source, s, step, smooth) * by
            v = where(v > high, high, where(v < low, low, v))
            q = to_int(rint(v))
            s_sum = s_sum + widen(q)
            if slices == 1:
                store_bytes(codes + 16 * s, q)
            else:
                # Adding 128 to the three lower bytes carries what a balanced digit borrows; ^ 128 takes it off again.
                digits = (q + splat_i(0x00808080)) ^ splat_i(0x00808080)
                store_bytes(codes + 16 * s, digits)
                store_bytes(codes + k + 16 * s, digits >> splat_i(8))
                store_bytes(codes + 2 * k + 16 * s, digits >> splat_i(16))
                store_bytes(codes + 3 * k + 16 * s, digits >> splat_i(24))
        put(sums + 8 * block, total(s_sum))
        block += 1


@kernel()
def tensor_absmax(run, starts, sequence):
    """Bits of the largest magnitude of all rows of a sequence."""
    m = 0
    for row in range(get(starts + 8 * sequence), get(starts + 8 * sequence + 8)):
        m = max(m, get(at(run, Run.ABSMAX) + 8 * row))
    return m


# What makes the rows that are coded, and whether a product is added to the residual.
NORM_ROW, LAST_NORM_ROW, CONV_ROW, NOTHING = np.arange(4)
SET, ADD = np.arange(2)


@kernel()
def code_rows(run, work, layer, index, site, source, counter):
    """Regions: make the rows that go into a product, and their codes. Returns the next region's counter."""
    head = work == LAST_NORM_ROW
    rows = at(run, Run.OUT_ROWS) if head else at(run, Run.ROWS)
    sequences = at(run, Run.OUT_SEQUENCE) if head else at(run, Run.SEQUENCE)
    starts = at(run, Run.OUT_START) if head else at(run, Run.START)
    strips, whole = at(site, Site.K) // 16, at(site, Site.IN) == Mode.TENSOR
    panels = by_panels(site, rows)
    mine = 0
    first, last = share(run, counter, rows)
    while first < rows:
        for row in range(first, last):
            if work == NORM_ROW:
                norm_row(run, at(layer, Layer.NORM), row, row)
            elif work == LAST_NORM_ROW:
                norm_row(run, at(layer, Layer.NORM), get(at(run, Run.OUT_ROW) + 8 * row), row)
            elif work == CONV_ROW and (row - first) % CONV_ROWS == 0:
                conv_rows(run, layer, index, row, min(last, row + CONV_ROWS))
            here = source + row * FLOATS
            sequence = get(sequences + 8 * row)
            m = row_absmax(run, here, strips, at(site, Site.SMOOTH), 2 * at(site, Site.NUMBER), sequence)
            if whole:
                put(at(run, Run.ABSMAX) + 8 * row, m)
            else:
                code_row(run, site, here, row, m, panels)
        mine += last - first
        first, last = share(run, counter, rows)
    counter = meet(counter, rows, mine)
    if whole:
        mine = 0
        first, last = share(run, counter, rows)
        while first < rows:
            for row in range(first, last):
                m = tensor_absmax(run, starts, get(sequences + 8 * row))
                code_row(run, site, source + row * FLOATS, row, m, panels)
            mine += last - first
            first, last = share(run, counter, rows)
        counter = meet(counter, rows, mine)
    return counter


@kernel()
def requantize_rows(run, site, source, target, residual, counter):
    """Regions: the `out` side of a product, eq. (8, 9), its bias, and the residual. Returns the next region's counter."""
    rows, step, mode = at(run, Run.ROWS), at(run, Run.STRIDE) * FLOATS, at(site, Site.OUT)
    strips, most, bias = 2 * at(site, Site.PAIRS), at(site, Site.OUT_LARGEST), at(site, Site.BIAS)
    high, low = splat_f(f32(most)), splat_f(-f32(most))
    mine = 0
    first, last = share(run, counter, rows)
    while first < rows:
        for row in range(first, last):
            sequence = get(at(run, Run.SEQUENCE) + 8 * row)
            m = row_absmax(run, source + row * FLOATS, strips, 0, 2 * at(site, Site.NUMBER) + 1, sequence)
            put(at(run, Run.ABSMAX) + 8 * row, m)
        mine += last - first
        first, last = share(run, counter, rows)
    counter = meet(counter, rows, mine)
    mine = 0
    first, last = share(run, counter, rows)
    while first < rows:
        for row in range(first, last):
            if mode == Mode.TENSOR:
                m = tensor_absmax(run, at(run, Run.START), get(at(run, Run.SEQUENCE) + 8 * row))
            else:
                m = get(at(run, Run.ABSMAX) + 8 * row)
            multiplier, scale, _ = factors(mode, most, m, ONE)
            by, over = splat_f(multiplier), splat_f(scale)
            for s in range(strips):
                v = load_f(source + s * step + row * FLOATS) * by
                y = to_float(to_int(rint(where(v > high, high, where(v < low, low, v))))) / over
                if bias != 0:
                    y = y + load_f(bias + s * FLOATS)
                here = target + s * step + row * FLOATS
                store_f(here, load_f(here) + y if residual else y)
        mine += last - first
        first, last = share(run, counter, rows)
    return meet(counter, rows, mine)


# Products.
@kernel()
def tiles(packed, slices, count, w, w_stride, x, x_stride, k, out):
    """The integer product of a pair of strips with `count` rows of `slices` slices."""
    columns, strip = count * slices, 0
    while strip < 2:
        w_at, out_at = w + strip * w_stride, out + strip * FLOATS
        column = 0
        while column < columns:
            x_at, here, left = x + column * x_stride, out_at + column * 2 * FLOATS, columns - column
            if packed:
                if REGISTERS_32 and left >= 8:
                    PACKED_8(w_at, w_stride, x_at, x_stride, k, here)
                elif left >= 4:
                    PACKED_4(w_at, w_stride, x_at, x_stride, k, here)
                else:
                    PACKED_1(w_at, w_stride, x_at, x_stride, k, here)
            elif REGISTERS_32 and left >= 8:
                BYTES_8(w_at, w_stride, x_at, x_stride, k, here)
            elif left >= 4:
                BYTES_4(w_at, w_stride, x_at, x_stride, k, here)
            else:
                BYTES_1(w_at, w_stride, x_at, x_stride, k, here)
            column += 8 if REGISTERS_32 and left >= 8 else (4 if left >= 4 else 1)
        strip += STRIPS


@inlined
def joined(sums, slices):
    """The integer of a product from those of its slices."""
    q = widen(load_i(sums))
    if slices == 4:
        q = q + (widen(load_i(sums + 2 * FLOATS)) << splat_l(8))
        q = q + (widen(load_i(sums + 4 * FLOATS)) << splat_l(16))
        q = q + (widen(load_i(sums + 6 * FLOATS)) << splat_l(24))
    return q


@inlined
def exact(kind, slices, sums, plane, codes):
    """One block's product in float64, eq. (11, 12). codes: the sum of the row's codes."""
    if kind == Kind.FIXED:
        # The weight's three digits give a number of up to 65 bits. In two parts it is rounded once, as high * 4096 + low is.
        low = joined(sums, slices) + (joined(sums + plane, slices) << splat_l(8))
        high = joined(sums + 2 * plane, slices) - splat_l(codes << 7)
        high = high + (low >> splat_l(16))
        return to_double(high) * double(splat_f(f32(65536))) + to_double(low & splat_l(65535))
    offset = 8 if kind == Kind.PACKED else 128
    return to_double(joined(sums, slices) - splat_l(offset * codes))


@inlined
def finish(run, site, row, y, out, strip, strip_bytes, row_bytes, limit, residual):
    """Eq. (13)'s division for 16 values of a row, the bias and the residual. Of logits those below `limit` are stored."""
    y = y / (splat_f(get_f(at(run, Run.SCALE) + 4 * row)) * load_f(at(site, Site.SCALE) + strip * FLOATS))
    bias = 0 if at(site, Site.OUT) != Mode.NONE else at(site, Site.BIAS)
    if bias != 0:
        y = y + load_f(bias + strip * FLOATS)
    here = out + strip * strip_bytes + row * row_bytes
    if limit:
        if 16 * strip + 16 <= limit:
            store_any(here, y)
        else:
            store_first(here, y, limit - 16 * strip)
    else:
        store_f(here, load_f(here) + y if residual else y)


@kernel()
def product_item(rank, run, site, pair, first, last, out, strip_bytes, row_bytes, limit, residual):
    """Rows first to last of a pair of strips of a product: eq. (11, 12, 13), the bias and the residual. limit: rows of w."""
    kind, slices, k = at(site, Site.KIND), at(site, Site.SLICES), at(site, Site.K)
    packed, planes = kind == Kind.PACKED, max(1, kind)
    plane_bytes = 8 * k if packed else 16 * k  # of one strip's digits
    weights = at(site, Site.CODES) + 2 * pair * planes * plane_bytes
    sums = at(run, Run.SCRATCH) + rank * at(run, Run.SCRATCH_BYTES)
    plane = 16 * FLOATS  # of sums
    totals = sums + 3 * plane
    blocks = (k + BLOCK - 1) // BLOCK
    row = first
    while row < last:
        left = last - row
        if slices == 1:
            count = 8 if left >= 8 else (4 if left >= 4 else 1)
        else:
            count = 2 if left >= 2 else 1
        if blocks == 1 and slices == 1 and kind != Kind.FIXED:
            # All in int32: |digits| |codes| k < 2^31, and its float32 is rounded once, as that of the float64 is.
            x = at(run, Run.CODES) + row * k
            tiles(packed, slices, count, weights, plane_bytes, x, k, k, sums)
            for j in range(count):
                offset = splat_i((8 if packed else 128) * get(at(run, Run.SUMS) + 8 * (row + j) * at(run, Run.SUM_BLOCKS)))
                for s in range(2):
                    y = to_float(load_i(sums + (2 * j + s) * FLOATS) - offset)
                    finish(run, site, row + j, y, out, 2 * pair + s, strip_bytes, row_bytes, limit, residual)
            row += count
            continue
        for block in range(blocks):
            start, width = block * BLOCK, min(BLOCK, k - block * BLOCK)
            x = at(run, Run.CODES) + row * slices * k + start
            for p in range(planes):
                w = weights + p * plane_bytes + (start * 8 if packed else start * 16)
                tiles(packed, slices, count, w, planes * plane_bytes, x, k, width, sums + p * plane)
            for j in range(count):
                codes = get(at(run, Run.SUMS) + 8 * ((row + j) * at(run, Run.SUM_BLOCKS) + block))
                for s in range(2):
                    acc = exact(kind, slices, sums + (2 * j * slices + s) * FLOATS, plane, codes)
                    total_at = totals + (2 * j + s) * 2 * FLOATS
                    store_d(total_at, acc if block == 0 else load_d(total_at) + acc)
        for j in range(count):
            power = double(splat_f(get_f(at(run, Run.FACTOR) + 4 * (row + j))))
            for s in range(2):
                strip = 2 * pair + s
                acc = load_d(totals + (2 * j + s) * 2 * FLOATS) * power
                y = single(acc * double(load_f(at(site, Site.FACTOR) + strip * FLOATS)))
                finish(run, site, row + j, y, out, strip, strip_bytes, row_bytes, limit, residual)
        row += count


@kernel()
def spread(site, strip, start, width, out):
    """The codes of 16 rows of a weight, `width` columns from `start` on, as `panel_tile` takes them."""
    kind, k = at(site, Site.KIND), at(site, Site.K)
    packed, planes = kind == Kind.PACKED, max(1, kind)
    plane_bytes = 8 * k if packed else 16 * k
    digits = at(site, Site.CODES) + strip * planes * plane_bytes + (8 if packed else 16) * start
    low, apart = splat_i(255), 8 * DOUBLES * width
    for group in range(width // 4):  # of four columns
        here = digits + (group // 2 if packed else group) * LINE
        v = load_i(here)
        if packed:
            v = (v >> splat_i(group % 2 * 4)) & splat_i(0x0F0F0F0F)
        for j in range(4):
            place, shift = out + (4 * group + j) * 8 * DOUBLES, splat_i(8 * j)
            q = (v >> shift) & low
            if kind == Kind.FIXED:
                q = q + (((load_i(here + plane_bytes) >> shift) & low) << splat_i(8))
                q = q + (((load_i(here + 2 * plane_bytes) >> shift) & low) << splat_i(16))
                store_apart(place, apart, whole_double(q - splat_i(1 << 23)))
            else:
                store_apart(place, apart, whole_double(q - splat_i(8 if packed else 128)))


@inlined
def multiply(w, width, x, step, rows, sums):
    """Add the product of a panel with rows of codes to their sums."""
    for part in range(16 // DOUBLES):
        panel, out = w + part * 8 * DOUBLES * width, sums + part * 8 * DOUBLES
        row = 0
        while row < rows:
            left, codes, out_row = rows - row, x + row * step, out + row * 2 * FLOATS
            if REGISTERS_32 and left >= 12:
                PANEL_12(panel, codes, step, width, out_row)
                row += 12
            elif left >= 6:
                PANEL_6(panel, codes, step, width, out_row)
                row += 6
            elif left >= 2:
                PANEL_2(panel, codes, step, width, out_row)
                row += 2
            else:
                PANEL_1(panel, codes, step, width, out_row)
                row += 1


@kernel()
def exact_sums(site, strip, x, step, w, sums, doubtful, count):
    """The exact float64 product of `count` rows, eq. (12), where it was in doubt. doubtful: their places in x and in `sums`."""
    k, stride = at(site, Site.K), ROWS_OF_PANEL * 2 * FLOATS  # from the sums to those of the high parts and of the low parts
    nothing, part = splat_d(0.0), splat_d(4096.0)
    for i in range(count):
        at_sum = sums + get(doubtful + 8 * i) * 2 * FLOATS
        for place in range(3):
            store_d(at_sum + place * stride, nothing)
    start = 0
    while start < k:
        width = min(PANEL, k - start)
        spread(site, strip, start, width, w)
        ends = start + width == k or (start + width) % BLOCK == 0
        for i in range(count):
            row = get(doubtful + 8 * i)
            at_sum, codes = sums + row * 2 * FLOATS, x + row * step + 8 * start
            high, low = load_d(at_sum + stride), load_d(at_sum + 2 * stride)
            for column in range(width):
                v, q = load_apart(w + column * 8 * DOUBLES, 8 * DOUBLES * width), splat_d(get_d(codes + 8 * column))
                v_high = rint_d(v * splat_d(1 / 4096))
                high = high + q * v_high
                low = low + q * (v - v_high * part)
            if ends:
                store_d(at_sum, load_d(at_sum) + (high * part + low))
                high, low = nothing, nothing
            store_d(at_sum + stride, high)
            store_d(at_sum + 2 * stride, low)
        start += width


@kernel()
def panel_item(rank, run, site, strip, first, last, out, strip_bytes, row_bytes, limit, residual):
    """Rows first to last of a strip of a product by panels: eq. (11, 12, 13), the bias and the residual. limit: rows of w."""
    k, rows = at(site, Site.K), last - first
    w = at(run, Run.SCRATCH) + rank * at(run, Run.SCRATCH_BYTES)
    sums, step = w + PANEL_BYTES, code_bytes(k)
    doubtful, count = sums + 3 * ROWS_OF_PANEL * 2 * FLOATS, 0
    x = at(run, Run.CODES) + first * step
    for i in range(rows):
        store_d(sums + i * 2 * FLOATS, splat_d(0.0))
    start = 0
    while start < k:
        width = min(PANEL, k - start)
        spread(site, strip, start, width, w)
        multiply(w, width, x + 8 * start, step, rows, sums)
        start += width
    factor = double(load_f(at(site, Site.FACTOR) + strip * FLOATS))
    bound = double(load_f(at(site, Site.ERROR) + strip * FLOATS))
    for i in range(rows):
        row = first + i
        by = double(splat_f(get_f(at(run, Run.FACTOR) + 4 * row))) * factor
        error = double(splat_f(get_f(at(run, Run.SUMS) + 8 * row * at(run, Run.SUM_BLOCKS)))) * bound
        acc = load_d(sums + i * 2 * FLOATS)
        y = single((acc - error) * by)
        if differ(y, single((acc + error) * by)):
            put(doubtful + 8 * count, i)
            count += 1
        else:
            finish(run, site, row, y, out, strip, strip_bytes, row_bytes, limit, residual)
    if count:
        exact_sums(site, strip, x, step, w, sums, doubtful, count)
    for n in range(count):
        i = get(doubtful + 8 * n)
        row = first + i
        by = double(splat_f(get_f(at(run, Run.FACTOR) + 4 * row))) * factor
        y = single(load_d(sums + i * 2 * FLOATS) * by)
        finish(run, site, row, y, out, strip, strip_bytes, row_bytes, limit, residual)


@kernel()
def product(rank, run, site, rows, out, strip_bytes, row_bytes, limit, residual, counter):
    """Region: a product, one or two strips and some rows an item. Returns the next region's counter."""
    panels = by_panels(site, rows)
    pieces, height = (2 * at(site, Site.PAIRS), ROWS_OF_PANEL) if panels else (at(site, Site.PAIRS), ROWS_OF_TILE)
    items, mine = pieces * ((rows + height - 1) // height), 0
    first, last = share(run, counter, items)
    while first < items:
        for i in range(first, last):
            row = i // pieces * height
            end = min(rows, row + height)
            if panels:
                panel_item(rank, run, site, i % pieces, row, end, out, strip_bytes, row_bytes, limit, residual)
            else:
                product_item(rank, run, site, i % pieces, row, end, out, strip_bytes, row_bytes, limit, residual)
        mine += last - first
        first, last = share(run, counter, items)
    return meet(counter, items, mine)


@kernel()
def linear(rank, run, site, out, counter):
    """Regions: a linear layer from its codes to its `out` side, in strips. Returns the next region's counter."""
    step = at(run, Run.STRIDE) * FLOATS
    counter = product(rank, run, site, at(run, Run.ROWS), out, step, FLOATS, SET, SET, counter)
    if at(site, Site.OUT) != Mode.NONE:
        counter = requantize_rows(run, site, out, out, SET, counter)
    return counter


@inlined
def scan_term(delta, delta_u, A, h, B, C):
    """Eq. (20, 21) for one state of 16 channels: the new state goes to h; C h."""
    v = exp_negative(delta * load_f(A)) * load_f(h) + delta_u * splat_f(get_f(B))
    store_f(h, v)
    return splat_f(get_f(C)) * v


@kernel()
def keep_inputs(run, index, sequence, s):
    """The last inputs of the convolution of 16 channels of a sequence, for the next call. In and out may be one memory."""
    step, taps, line = at(run, Run.STRIDE) * FLOATS, at(run, Run.TAPS), at(run, Run.INNER_STRIPS) * FLOATS
    start, end = get(at(run, Run.START) + 8 * sequence), get(at(run, Run.START) + 8 * sequence + 8)
    offset = index * (taps - 1) * line + s * FLOATS
    before = get(at(run, Run.CONV_IN) + 8 * sequence) + offset
    after = get(at(run, Run.CONV_OUT) + 8 * sequence) + offset
    for i in range(taps - 1):
        time = end - start - (taps - 1) + i
        if time < 0:
            v = load_f(before + (time + taps - 1) * line)
        else:
            v = load_f(at(run, Run.XZ) + (start + time) * FLOATS + s * step)
        store_f(after + i * line, v)


@kernel()
def scan_strip(rank, run, layer, index, sequence, s):
    """Eq. (18, 20 to 23) for 16 channels of a sequence: step, scan, skip and gate. The result replaces DELTA."""
    n, step, inner = at(run, Run.D_STATE), at(run, Run.STRIDE) * FLOATS, at(run, Run.INNER_STRIPS)
    offset = (index * inner + s) * n * FLOATS
    h_in, h = get(at(run, Run.SSM_IN) + 8 * sequence) + offset, get(at(run, Run.SSM_OUT) + 8 * sequence) + offset
    A = at(layer, Layer.A) + s * n * FLOATS
    for i in range(n):
        store_f(h + i * FLOATS, load_f(h_in + i * FLOATS))
    bias, D = load_f(at(layer, Layer.DT_BIAS) + s * FLOATS), load_f(at(layer, Layer.D) + s * FLOATS)
    terms = at(run, Run.SCRATCH) + rank * at(run, Run.SCRATCH_BYTES)
    half = 1
    while 2 * half < n:
        half *= 2
    pairs = n - half  # states with one `half` further on, with which the tree adds them
    B = at(run, Run.XBC) + at(run, Run.RANK_STRIPS) * step
    C = B + at(run, Run.STATE_STRIPS) * step
    u_strip, dt_strip, z_strip = at(run, Run.U) + s * step, at(run, Run.DELTA) + s * step, at(run, Run.XZ) + (inner + s) * step
    first, last = get(at(run, Run.START) + 8 * sequence), get(at(run, Run.START) + 8 * sequence + 8)
    # Step sizes and gates in loops of their own: rows that do not wait for each other fill the processor better.
    for row in range(first, last):
        here = row * FLOATS
        store_f(dt_strip + here, softplus(load_f(dt_strip + here) + bias))
    for row in range(first, last):
        here = row * FLOATS
        u, delta = load_f(u_strip + here), load_f(dt_strip + here)
        delta_u = delta * u
        # The tree's first level as the terms come; states that fill up to a power of two are zeros.
        for i in range(pairs):
            j = i + half
            lane, other = i // 16 * step + i % 16 * 4 + here, j // 16 * step + j % 16 * 4 + here
            term = scan_term(delta, delta_u, A + i * FLOATS, h + i * FLOATS, B + lane, C + lane)
            term = term + scan_term(delta, delta_u, A + j * FLOATS, h + j * FLOATS, B + other, C + other)
            store_f(terms + i * FLOATS, term)
        for i in range(pairs, half):
            lane = i // 16 * step + i % 16 * 4 + here
            term = scan_term(delta, delta_u, A + i * FLOATS, h + i * FLOATS, B + lane, C + lane)
            store_f(terms + i * FLOATS, term + splat_f(ZERO) if n > 1 else term)
        width = half
        while width > 1:
            width //= 2
            for i in range(width):
                store_f(terms + i * FLOATS, load_f(terms + i * FLOATS) + load_f(terms + (i + width) * FLOATS))
        store_f(dt_strip + here, load_f(terms) + D * u)
    for row in range(first, last):
        here = row * FLOATS
        store_f(dt_strip + here, load_f(dt_strip + here) * silu(load_f(z_strip + here)))


@kernel()
def scan(rank, run, layer, index, counter):
    """Region: the scan, 16 channels of one sequence an item, and both states. Returns the next region's counter."""
    strips = at(run, Run.INNER_STRIPS)
    items, mine = strips * at(run, Run.SEQUENCES), 0
    first, last = share(run, counter, items)
    while first < items:
        for i in range(first, last):
            keep_inputs(run, index, i // strips, i % strips)
            scan_strip(rank, run, layer, index, i // strips, i % strips)
        mine += last - first
        first, last = share(run, counter, items)
    return meet(counter, items, mine)


@kernel(cache=True)
def run_layers(rank, run):
    """The layers FIRST to LAST - 1, eq. (24), on the rows of X; then the head for OUT_ROWS rows of it."""
    step = at(run, Run.STRIDE) * FLOATS
    rows, x, normed, xz = at(run, Run.ROWS), at(run, Run.X), at(run, Run.NORMED), at(run, Run.XZ)
    u, xbc, delta = at(run, Run.U), at(run, Run.XBC), at(run, Run.DELTA)
    counter = at(run, Run.COUNTERS)
    for index in range(at(run, Run.FIRST), at(run, Run.LAST)):
        layer = at(run, Run.LAYER_TABLES) + 8 * index * Layer.SIZE
        in_proj, x_proj = layer + 8 * Layer.IN_PROJ, layer + 8 * Layer.X_PROJ
        dt_proj, out_proj = layer + 8 * Layer.DT_PROJ, layer + 8 * Layer.OUT_PROJ
        counter = code_rows(run, NORM_ROW, layer, index, in_proj, normed, counter)
        counter = linear(rank, run, in_proj, xz, counter)
        counter = code_rows(run, CONV_ROW, layer, index, x_proj, u, counter)
        counter = linear(rank, run, x_proj, xbc, counter)
        counter = code_rows(run, NOTHING, layer, index, dt_proj, xbc, counter)
        counter = linear(rank, run, dt_proj, delta, counter)
        counter = scan(rank, run, layer, index, counter)
        counter = code_rows(run, NOTHING, layer, index, out_proj, delta, counter)
        if at(out_proj, Site.OUT) == Mode.NONE:
            counter = product(rank, run, out_proj, rows, x, step, FLOATS, SET, ADD, counter)
        else:
            counter = product(rank, run, out_proj, rows, normed, step, FLOATS, SET, SET, counter)
            counter = requantize_rows(run, out_proj, normed, x, ADD, counter)
    out_rows = at(run, Run.OUT_ROWS)
    if out_rows > 0:
        head = at(run, Run.HEAD)
        site, vocabulary = head + 8 * Layer.IN_PROJ, at(run, Run.VOCABULARY)
        counter = code_rows(run, LAST_NORM_ROW, head, at(run, Run.LAYERS), site, normed, counter)
        product(rank, run, site, out_rows, at(run, Run.LOGITS), FLOATS, 4 * vocabulary, vocabulary, SET, counter)


@kernel(cache=True)
def probe(rank, run):
    """What the exactness rests on, for `Cpu` to check: a product, and a subnormal that this thread does not flush to zero."""
    w, x, k, out = get(run), get(run + 8), get(run + 16), get(run + 24)
    if rank == 0:
        tiles(False, 1, 8, w, 16 * k, x, k, k, out)
    tiny = get_f(get(run + 32))
    put_f(get(run + 40) + 4 * rank, tiny * HALF)


@inlined
def logit_vector(x, s, n):
    """Vector s of a row of n logits, filled up with -infinity."""
    return load_any(x + s * FLOATS) if 16 * s + 16 <= n else load_first(x + s * FLOATS, n - 16 * s)


@kernel()
def log_softmax_row(x, y, terms, n):
    """Eq. (25): n logits at x to log-probabilities at y. terms: room for n float32, up to whole vectors."""
    vectors = (n + 15) // 16
    m = splat_f(-INFINITY)
    for s in range(vectors):
        v = logit_vector(x, s, n)
        m = where(v > m, v, m)
    m = splat_f(highest(m))
    for s in range(vectors):
        store_f(terms + s * FLOATS, exp_negative(logit_vector(x, s, n) - m))
    width, filled = 1, vectors
    while width < vectors:
        width *= 2
    while width > 1:  # the tree; where it adds +0.0 to what is no -0.0, nothing is done
        width //= 2
        for s in range(filled - width):
            store_f(terms + s * FLOATS, load_f(terms + s * FLOATS) + load_f(terms + (s + width) * FLOATS))
        filled = min(filled, width)
    total_of_terms = splat_f(lane_tree(load_f(terms)))
    log = log_normal(total_of_terms) + (total_of_terms - total_of_terms)  # a NaN stays one
    for s in range(n // 16):
        store_any(y + s * FLOATS, load_any(x + s * FLOATS) - m - log)
    if n % 16:
        store_first(y + n // 16 * FLOATS, logit_vector(x, n // 16, n) - m - log, n % 16)


@kernel(cache=True)
def log_softmax(rank, run):
    """Rows of logits: (counter, rows, n, source, target, room for the terms, its bytes for each thread)."""
    rows, n, terms = get(run + 8), get(run + 16), get(run + 40) + rank * get(run + 48)
    row = fetch_add(run, 1)
    while row < rows:
        log_softmax_row(get(run + 24) + 4 * n * row, get(run + 32) + 4 * n * row, terms, n)
        row = fetch_add(run, 1)


@kernel(cache=True)
def elementwise(run):
    """exp, softplus or silu of whole vectors, for the conformance vectors: (which, vectors, source, target)."""
    which, source, target = get(run), get(run + 16), get(run + 24)
    for i in range(get(run + 8)):
        x = load_f(source + i * FLOATS)
        if which == 0:
            y = exp(x)
        elif which == 1:
            y = softplus(x)
        else:
            y = silu(x)
        store_f(target + i * FLOATS, y)
