"""Products by panels: float64 sums with a bound on their error, and the exact sum where that leaves a bit open."""

from refmamba.backends.cpu.kernels.bound import PANEL
from refmamba.backends.cpu.kernels.codes import code_bytes
from refmamba.backends.cpu.kernels.instructions import LANES
from refmamba.backends.cpu.kernels.output import finish
from refmamba.backends.cpu.kernels.tables import (
    DOUBLE_FLOATS,
    FLOATS,
    Run,
    Site,
    at,
    column_of,
    inlined,
    kernel,
)
from refmamba.backends.cpu.kernels.tiles import panel_tile
from refmamba.backends.cpu.kernels.vectors import (
    DOUBLES,
    REGISTERS_32,
    differ,
    double,
    get,
    get_d,
    get_f,
    load_apart,
    load_d,
    load_f,
    put,
    rint_d,
    single,
    splat_d,
    splat_f,
    store_apart,
    store_d,
    whole_double,
)
from refmamba.spec.codes import BLOCK, LOW_PART

ROWS_OF_PANEL = 96  # and by panels
PANEL_BYTES = PANEL * int(DOUBLE_FLOATS)
# A thread's own: a panel, and of each row a sum, its high and its low part, and the place of one in doubt.
PANELS_SCRATCH = PANEL_BYTES + ROWS_OF_PANEL * (3 * int(DOUBLE_FLOATS) + 8)
PANEL_12, PANEL_6, PANEL_2, PANEL_1 = panel_tile(12), panel_tile(6), panel_tile(2), panel_tile(1)


@kernel()
def spread(site, strip, start, width, out):
    """The codes of 16 rows of a weight, `width` columns from `start` on, as `panel_tile` takes them."""
    apart = 8 * DOUBLES * width
    for group in range(width // 4):  # of four columns, whose digits lie in one vector
        for column in range(4 * group, 4 * group + 4):
            store_apart(out + column * 8 * DOUBLES, apart, whole_double(column_of(site, strip, start + column)))


@inlined
def multiply(w, width, x, step, rows, sums):
    """Add the product of a panel with rows of codes to their sums."""
    for part in range(LANES // DOUBLES):
        panel, out = w + part * 8 * DOUBLES * width, sums + part * 8 * DOUBLES
        row = 0
        while row < rows:
            left, codes, out_row = rows - row, x + row * step, out + row * DOUBLE_FLOATS
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
    k, stride = at(site, Site.K), ROWS_OF_PANEL * DOUBLE_FLOATS  # from the sums to those of the high parts and of the low parts
    zero, part = splat_d(0.0), splat_d(float(LOW_PART))
    for i in range(count):
        at_sum = sums + get(doubtful + 8 * i) * DOUBLE_FLOATS
        for place in range(3):
            store_d(at_sum + place * stride, zero)
    start = 0
    while start < k:
        width = min(PANEL, k - start)
        spread(site, strip, start, width, w)
        ends = start + width == k or (start + width) % BLOCK == 0
        for i in range(count):
            row = get(doubtful + 8 * i)
            at_sum, codes = sums + row * DOUBLE_FLOATS, x + row * step + 8 * start
            high, low = load_d(at_sum + stride), load_d(at_sum + 2 * stride)
            for column in range(width):
                v, q = load_apart(w + column * 8 * DOUBLES, 8 * DOUBLES * width), splat_d(get_d(codes + 8 * column))
                v_high = rint_d(v * splat_d(1 / LOW_PART))
                high = high + q * v_high
                low = low + q * (v - v_high * part)
            if ends:
                store_d(at_sum, load_d(at_sum) + (high * part + low))
                high, low = zero, zero
            store_d(at_sum + stride, high)
            store_d(at_sum + 2 * stride, low)
        start += width


@kernel()
def panel_item(rank, run, site, strip, first, last, out, strip_bytes, row_bytes, limit, residual):
    """Rows first to last of a strip of a product by panels: eq. (11, 12, 13), the bias and the residual. limit: rows of w."""
    k, rows = at(site, Site.K), last - first
    w = at(run, Run.SCRATCH) + rank * at(run, Run.SCRATCH_BYTES)
    sums, step = w + PANEL_BYTES, code_bytes(k)
    doubtful, count = sums + 3 * ROWS_OF_PANEL * DOUBLE_FLOATS, 0
    x = at(run, Run.CODES) + first * step
    for i in range(rows):
        store_d(sums + i * DOUBLE_FLOATS, splat_d(0.0))
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
        acc = load_d(sums + i * DOUBLE_FLOATS)
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
        y = single(load_d(sums + i * DOUBLE_FLOATS) * by)
        finish(run, site, row, y, out, strip, strip_bytes, row_bytes, limit, residual)
