"""The end of a product: its scale, the `out` side, the bias and the residual."""

import numpy as np

from refmamba.backends.cpu.kernels.arithmetic import ONE
from refmamba.backends.cpu.kernels.instructions import LANES
from refmamba.backends.cpu.kernels.regions import meet, share
from refmamba.backends.cpu.kernels.scales import factors, row_absmax, tensor_absmax
from refmamba.backends.cpu.kernels.tables import FLOATS, NO_OUTLIER, Mode, Run, Site, at, f32, inlined, kernel
from refmamba.backends.cpu.kernels.transforms import outlier_values
from refmamba.backends.cpu.kernels.vectors import (
    get,
    get_f,
    load_f,
    put,
    rint,
    splat_f,
    store_any,
    store_f,
    store_first,
    to_float,
    to_int,
    where,
)

SET, ADD = np.arange(2)  # whether a result is added to what is there: the residual
OUTPUT_REGIONS = 2  # of `requantize_rows`


@inlined
def finish(run, site, row, y, out, strip, strip_bytes, row_bytes, limit, residual):
    """Eq. (13)'s division for 16 values of a row, its outliers, the bias and the residual. Of logits those below `limit` are
    stored."""
    y = y / (splat_f(get_f(at(run, Run.SCALE) + 4 * row)) * load_f(at(site, Site.SCALE) + strip * FLOATS))
    if at(site, Site.OUTLIER) != NO_OUTLIER:
        y = y + outlier_values(run, site, strip, row)
    bias = 0 if at(site, Site.OUT) != Mode.NONE else at(site, Site.BIAS)
    if bias != 0:
        y = y + load_f(bias + strip * FLOATS)
    place = out + strip * strip_bytes + row * row_bytes
    if limit:
        if LANES * strip + LANES <= limit:
            store_any(place, y)
        else:
            store_first(place, y, limit - LANES * strip)
    else:
        store_f(place, load_f(place) + y if residual else y)


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
                place = target + s * step + row * FLOATS
                store_f(place, load_f(place) + y if residual else y)
        mine += last - first
        first, last = share(run, counter, rows)
    return meet(counter, rows, mine)
