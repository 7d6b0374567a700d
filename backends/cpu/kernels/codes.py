"""The `in` side of a product: rows of activations become codes."""

import math

import numpy as np

from refmamba.backends.cpu.kernels.arithmetic import ZERO
from refmamba.backends.cpu.kernels.bound import ROW_NORM_ROOM
from refmamba.backends.cpu.kernels.instructions import LANES
from refmamba.backends.cpu.kernels.regions import meet, share
from refmamba.backends.cpu.kernels.rows import CONV_ROWS, conv_rows, norm_row
from refmamba.backends.cpu.kernels.scales import factors, row_absmax, tensor_absmax, value
from refmamba.backends.cpu.kernels.tables import (
    DOUBLE_FLOATS,
    FLOATS,
    LINE,
    UNIT,
    Layer,
    Mode,
    Run,
    Site,
    at,
    f32,
    inlined,
    kernel,
)
from refmamba.backends.cpu.kernels.tiles import store_start
from refmamba.backends.cpu.kernels.transforms import prepared_place, prepared_row
from refmamba.backends.cpu.kernels.vectors import (
    double,
    get,
    get_f,
    lane_tree,
    load_bytes,
    put,
    put_f,
    rint,
    splat_f,
    splat_i,
    splat_l,
    store_bytes,
    store_d,
    to_int,
    total,
    where,
    widen,
)
from refmamba.spec.codes import BLOCK

BORROWS = 0x00808080  # 128 in each of the three lower bytes of an int32
CODE_REGIONS = 2  # of `code_rows`, at most


@inlined
def by_panels(site, rows):
    """Whether a product of so many rows is made by panels."""
    return rows >= at(site, Site.PANELS)


@inlined
def code_bytes(k):
    """Bytes of a row of k codes for panels: an odd number of lines, so that rows do not share their cache sets."""
    return 8 * k + LINE


@kernel()
def code_row(run, site, source, row, m, panels):
    """Codes of a row, eq. (8) or (10), and its factors. By digits: slices, and the codes' sum, a block of K at a time. By
    panels: float64, and a bound on the norm of the row (see bound.py)."""
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
        for s in range(k // LANES):
            v = value(source, s, step, smooth) * by
            v = rint(where(v > high, high, where(v < low, low, v)))
            squares = squares + v * v
            store_d(codes + s * DOUBLE_FLOATS, double(v))
        put_f(sums, ROW_NORM_ROOM * math.sqrt(lane_tree(squares)))
        return
    block = 0
    while block * BLOCK < k:
        s_sum = splat_l(0)
        for s in range(block * BLOCK // LANES, min(k, (block + 1) * BLOCK) // LANES):
            v = value(source, s, step, smooth) * by
            v = where(v > high, high, where(v < low, low, v))
            q = to_int(rint(v))
            s_sum = s_sum + widen(q)
            if slices == 1:
                store_bytes(codes + LANES * s, q)
            else:
                # The sum carries what a byte of 128 or more borrows from the next; the xor takes the 128 off each byte again.
                digits = (q + splat_i(BORROWS)) ^ splat_i(BORROWS)
                store_bytes(codes + LANES * s, digits)
                store_bytes(codes + k + LANES * s, digits >> splat_i(8))
                store_bytes(codes + 2 * k + LANES * s, digits >> splat_i(16))
                store_bytes(codes + 3 * k + LANES * s, digits >> splat_i(24))
        put(sums + 8 * block, total(s_sum))
        block += 1
    if at(site, Site.UNITS) != 0:
        start_units(run, site, codes, row)


@kernel()
def start_units(run, site, codes, row):
    """What the sums of a row's products start from where a weight's codes are in groups: see `tiles.store_start`."""
    units, k, width = at(site, Site.UNITS), at(site, Site.K), min(UNIT, 1 << at(site, Site.GROUP_BITS))
    slices = at(site, Site.SLICES)
    starts = at(run, Run.STARTS) + row * slices * units * 4
    for piece in range(slices):
        for unit in range(units):
            together = splat_i(0)
            for column in range(unit * width, min(k, unit * width + width), LANES):
                together = together + load_bytes(codes + piece * k + column)
            store_start(starts + 4 * (piece * units + unit), together)


# What makes the rows that are coded, and whether a product is added to the residual.
NORM_ROW, LAST_NORM_ROW, CONV_ROW, NOTHING = np.arange(4)


@kernel()
def code_rows(rank, run, work, layer, index, site, source, counter):
    """Regions: make the rows that go into a product, and their codes. Returns the next region's counter."""
    head = work == LAST_NORM_ROW
    rows = at(run, Run.OUT_ROWS) if head else at(run, Run.ROWS)
    sequences = at(run, Run.OUT_SEQUENCE) if head else at(run, Run.SEQUENCE)
    starts = at(run, Run.OUT_START) if head else at(run, Run.START)
    strips, whole = at(site, Site.K) // LANES, at(site, Site.IN) == Mode.TENSOR
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
            sequence = get(sequences + 8 * row)
            row_at = prepared_row(rank, run, site, source + row * FLOATS, row, sequence)
            m = row_absmax(run, row_at, strips, at(site, Site.SMOOTH), 2 * at(site, Site.NUMBER), sequence)
            if whole:
                put(at(run, Run.ABSMAX) + 8 * row, m)
            else:
                code_row(run, site, row_at, row, m, panels)
        mine += last - first
        first, last = share(run, counter, rows)
    counter = meet(counter, rows, mine)
    if whole:
        mine = 0
        first, last = share(run, counter, rows)
        while first < rows:
            for row in range(first, last):
                m = tensor_absmax(run, starts, get(sequences + 8 * row))
                code_row(run, site, prepared_place(run, site, source, row), row, m, panels)
            mine += last - first
            first, last = share(run, counter, rows)
        counter = meet(counter, rows, mine)
    return counter
