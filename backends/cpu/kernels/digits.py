"""Products by digits: integer products of 8-bit digits, joined exactly."""

from refmamba.backends.cpu.kernels.instructions import LANES
from refmamba.backends.cpu.kernels.output import finish
from refmamba.backends.cpu.kernels.tables import (
    BYTES_OFFSET,
    DOUBLE_FLOATS,
    FIXED_OFFSET,
    FLOATS,
    LINE,
    UNIT,
    Kind,
    Run,
    Site,
    at,
    f32,
    inlined,
    kernel,
    offset_of,
    planes_of,
    steps_of,
    vector_bytes,
)
from refmamba.backends.cpu.kernels.tiles import VNNI, digits_times, grouped_tile, tile
from refmamba.backends.cpu.kernels.vectors import (
    REGISTERS_32,
    double,
    get,
    get_f,
    load_d,
    load_f,
    load_i,
    load_steps,
    single,
    splat_f,
    splat_i,
    splat_l,
    store_d,
    store_i,
    to_double,
    to_float,
    widen,
)
from refmamba.spec.codes import BLOCK

ROWS_OF_TILE = 64  # rows of one item of a product by digits
# Rows from which on codes in groups become bytes once for all rows of an item, and the rows of such an item. Without VNNI a
# product straight from the codes is faster than one of bytes: never.
SPREAD, ROWS_OF_SPREAD = (32, 128) if VNNI else (2**31, ROWS_OF_TILE)
COLUMNS = 16 if VNNI == LINE else 8  # slices of rows that are multiplied together, at most
PLANE_BYTES = COLUMNS * 2 * FLOATS  # of the sums of a pair of strips
# A thread's own: three planes of sums, and the float64 totals of one.
DIGITS_SCRATCH = int(3 * PLANE_BYTES + COLUMNS * 2 * DOUBLE_FLOATS)
AS_BYTES = int(Kind.BYTES)
UNROLL = 2 if REGISTERS_32 else 1  # sums that a tile of 4 columns keeps apart
# A tile of few columns is bound by memory, which is fastest as one stream: it has one strip. One of 8 columns shares what it
# reads of them between two strips, where there are registers for their sums; one of 16 need not, as VNNI reads them in passing.
BYTES_16, PACKED_16, GROUPED_16 = tile(False, 1, 16, 1), tile(True, 1, 16, 1), grouped_tile(1, 16, 1)
BYTES_8, BYTES_4, BYTES_1 = tile(False, 2, 8, 1), tile(False, 1, 4, UNROLL), tile(False, 1, 1, 4)
PACKED_8, PACKED_4, PACKED_1 = tile(True, 2, 8, 1), tile(True, 1, 4, UNROLL), tile(True, 1, 1, 2)
GROUPED_8, GROUPED_4, GROUPED_1 = grouped_tile(2, 8, 1), grouped_tile(1, 4, 1), grouped_tile(1, 1, 4 if VNNI else 1)


@kernel()
def grouped_tiles(run, site, pair, row, columns, start, k, out):
    """`tiles` of weights in groups, from column `start` on: all slices of some rows, together `columns`."""
    stride, kind, units, bits = at(site, Site.K), Kind.GROUPED, at(site, Site.UNITS), at(site, Site.GROUP_BITS)
    plane_bytes, step_bytes = vector_bytes(kind) * stride, at(site, Site.STEP_BYTES)
    x = at(run, Run.CODES) + row * at(site, Site.SLICES) * stride + start
    starts = at(run, Run.STARTS) + 4 * (row * at(site, Site.SLICES) * units + start // min(UNIT, 1 << bits))
    w = at(site, Site.CODES) + 2 * pair * plane_bytes + vector_bytes(kind) * start
    steps = steps_of(site, 2 * pair, start)
    if REGISTERS_32 and columns == 8:
        GROUPED_8(w, plane_bytes, steps, step_bytes, bits, x, stride, starts, 4 * units, k, out)
        return
    for strip in range(2):
        w_at, steps_at, out_at = w + strip * plane_bytes, steps + strip * step_bytes, out + strip * FLOATS
        if columns == 1:
            GROUPED_1(w_at, plane_bytes, steps_at, step_bytes, bits, x, stride, starts, 4 * units, k, out_at)
        if COLUMNS == 16 and columns == 16:
            GROUPED_16(w_at, plane_bytes, steps_at, step_bytes, bits, x, stride, starts, 4 * units, k, out_at)
            continue
        for column in range(0, columns - 3, 4):
            x_at, first, sums_at = x + column * stride, starts + column * 4 * units, out_at + column * 2 * FLOATS
            GROUPED_4(w_at, plane_bytes, steps_at, step_bytes, bits, x_at, stride, first, 4 * units, k, sums_at)


@kernel()
def tiles(packed, planes, columns, w, plane_bytes, x, x_stride, k, out):
    """The integer product of a pair of strips, each of some planes, with 1, 4, 8 or 16 slices of rows. Planes follow each other
    in memory, and strips too: what few columns multiply is read in that order."""
    w_stride = planes * plane_bytes
    if REGISTERS_32 and columns == 8:
        for plane in range(planes):
            w_at, out_at = w + plane * plane_bytes, out + plane * PLANE_BYTES
            if packed:
                PACKED_8(w_at, w_stride, x, x_stride, k, out_at)
            else:
                BYTES_8(w_at, w_stride, x, x_stride, k, out_at)
        return
    for strip in range(2):
        for plane in range(planes):
            w_at, out_at = w + strip * w_stride + plane * plane_bytes, out + strip * FLOATS + plane * PLANE_BYTES
            if columns == 1:
                if packed:
                    PACKED_1(w_at, w_stride, x, x_stride, k, out_at)
                else:
                    BYTES_1(w_at, w_stride, x, x_stride, k, out_at)
            if COLUMNS == 16 and columns == 16:
                if packed:
                    PACKED_16(w_at, w_stride, x, x_stride, k, out_at)
                else:
                    BYTES_16(w_at, w_stride, x, x_stride, k, out_at)
                continue
            for column in range(0, columns - 3, 4):
                x_at, sums_at = x + column * x_stride, out_at + column * 2 * FLOATS
                if packed:
                    PACKED_4(w_at, w_stride, x_at, x_stride, k, sums_at)
                else:
                    BYTES_4(w_at, w_stride, x_at, x_stride, k, sums_at)


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
def exact(kind, slices, sums, codes):
    """One block's product in float64, eq. (11, 12). codes: the sum of the row's codes."""
    if kind == Kind.FIXED:
        # The weight's three digits give a number of up to 65 bits. In two parts, high 2^16 + low, it is rounded once.
        low = joined(sums, slices) + (joined(sums + PLANE_BYTES, slices) << splat_l(8))
        high = joined(sums + 2 * PLANE_BYTES, slices) - splat_l((FIXED_OFFSET >> 16) * codes)
        high = high + (low >> splat_l(16))
        return to_double(high) * double(splat_f(f32(65536))) + to_double(low & splat_l(65535))
    return to_double(joined(sums, slices) - splat_l(offset_of(kind) * codes))


def spread_scratch(k: int) -> int:
    """A thread's own: a pair of strips of k columns as bytes, after what a product by digits needs."""
    return DIGITS_SCRATCH + 2 * LANES * k


@inlined
def spreads(site, rows):
    """Whether a product of so many rows makes bytes of a weight's codes in groups."""
    return at(site, Site.KIND) == Kind.GROUPED and rows >= SPREAD


@kernel()
def spread_bytes(site, strip, out):
    """The codes of 16 rows of a weight in groups, times their steps, as digits of `Kind.BYTES`: (q + 8) m + 128 - 8 m, of which
    the lowest byte counts."""
    k, width = at(site, Site.K), 1 << at(site, Site.GROUP_BITS)
    codes = at(site, Site.CODES) + strip * vector_bytes(Kind.GROUPED) * k
    for start in range(0, k, width):
        steps = load_steps(steps_of(site, strip, start))
        offset = (splat_i(BYTES_OFFSET) - (steps << splat_i(3))) & splat_i(255)
        for column in range(start, min(k, start + width), 8):
            v, place = load_i(codes + vector_bytes(Kind.GROUPED) * column), out + column * LANES
            store_i(place, digits_times(v, steps, offset))
            store_i(place + LINE, digits_times(v >> splat_i(4), steps, offset))


@kernel()
def product_item(rank, run, site, pair, first, last, out, strip_bytes, row_bytes, limit, residual):
    """Rows first to last of a pair of strips of a product: eq. (11, 12, 13), the bias and the residual. limit: rows of w."""
    kind, slices, k = at(site, Site.KIND), at(site, Site.SLICES), at(site, Site.K)
    packed, planes, plane_bytes = kind == Kind.PACKED, planes_of(kind), vector_bytes(kind) * k  # of a strip's digits
    weights = at(site, Site.CODES) + 2 * pair * planes * plane_bytes
    sums = at(run, Run.SCRATCH) + rank * at(run, Run.SCRATCH_BYTES)
    totals = sums + 3 * PLANE_BYTES
    if spreads(site, last - first):
        kind, weights = AS_BYTES, sums + DIGITS_SCRATCH
        plane_bytes = vector_bytes(kind) * k
        for s in range(2):
            spread_bytes(site, 2 * pair + s, weights + s * plane_bytes)
    blocks = (k + BLOCK - 1) // BLOCK
    row = first
    while row < last:
        count = COLUMNS // slices
        while count > last - row:
            count //= 2
        if slices * count == 2:
            count = 1
        if blocks == 1 and slices == 1 and kind != Kind.FIXED:
            # All in int32: |digits| |codes| k < 2^31, and its float32 is rounded once, as that of the float64 is.
            if kind == Kind.GROUPED:
                grouped_tiles(run, site, pair, row, count, 0, k, sums)
            else:
                tiles(packed, 1, count, weights, plane_bytes, at(run, Run.CODES) + row * k, k, k, sums)
            for j in range(count):
                offset = splat_i(offset_of(kind) * get(at(run, Run.SUMS) + 8 * (row + j) * at(run, Run.SUM_BLOCKS)))
                for s in range(2):
                    y = to_float(load_i(sums + (2 * j + s) * FLOATS) - offset)
                    finish(run, site, row + j, y, out, 2 * pair + s, strip_bytes, row_bytes, limit, residual)
            row += count
            continue
        for block in range(blocks):
            start, width = block * BLOCK, min(BLOCK, k - block * BLOCK)
            x = at(run, Run.CODES) + row * slices * k + start
            if kind == Kind.GROUPED:
                grouped_tiles(run, site, pair, row, count * slices, start, width, sums)
            else:
                w = weights + start * vector_bytes(kind)
                tiles(packed, planes, count * slices, w, plane_bytes, x, k, width, sums)
            for j in range(count):
                codes = get(at(run, Run.SUMS) + 8 * ((row + j) * at(run, Run.SUM_BLOCKS) + block))
                for s in range(2):
                    acc = exact(kind, slices, sums + (2 * j * slices + s) * FLOATS, codes)
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
