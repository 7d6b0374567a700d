"""Products by panels: float64 sums with a bound on their error, and the exact sum where that leaves a bit open."""

from refmamba.backends.cpu.kernels.codes import code_bytes
from refmamba.backends.cpu.kernels.output import finish
from refmamba.backends.cpu.kernels.tables import BLOCK, FLOATS, LINE, Kind, Run, Site, at, inlined, kernel
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
    load_i,
    put,
    rint_d,
    single,
    splat_d,
    splat_f,
    splat_i,
    store_apart,
    store_d,
    whole_double,
)

ROWS_OF_PANEL = 96  # and by panels
PANEL = 256  # columns of a panel
PANEL_BYTES = 8 * 16 * PANEL
PANEL_12, PANEL_6, PANEL_2, PANEL_1 = panel_tile(12), panel_tile(6), panel_tile(2), panel_tile(1)


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
