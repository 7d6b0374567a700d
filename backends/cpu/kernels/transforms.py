"""What becomes of a row of activations before it is coded: the rotation, and the outliers that are multiplied by themselves."""

from refmamba.backends.cpu.kernels.arithmetic import ZERO, magnitude
from refmamba.backends.cpu.kernels.instructions import LANES
from refmamba.backends.cpu.kernels.scales import factors, row_absmax
from refmamba.backends.cpu.kernels.tables import (
    DOUBLE_FLOATS,
    FLOATS,
    NO_OUTLIER,
    Mode,
    Run,
    Site,
    at,
    column_of,
    inlined,
    kernel,
)
from refmamba.backends.cpu.kernels.vectors import (
    BUTTERFLIES,
    double,
    float_of,
    get,
    get_f,
    largest,
    load_d,
    load_f,
    put,
    put_f,
    rint,
    rint_d,
    single,
    splat_d,
    splat_f,
    splat_i,
    store_d,
    store_f,
    to_int,
    where,
    whole_double,
)
from refmamba.spec.codes import BLOCK, LOW_PART

BUTTERFLY_1, BUTTERFLY_2, BUTTERFLY_4, BUTTERFLY_8 = BUTTERFLIES


def transform_scratch(channels: int) -> int:
    """A thread's own: a row of float64, and a vector."""
    return channels * 8 + int(FLOATS)


@inlined
def prepared_place(run, site, source, row):
    """Where a row lies that is to be coded."""
    if at(site, Site.BLOCK) != 0 or at(site, Site.OUTLIER) != NO_OUTLIER:
        return at(run, Run.PREPARED) + row * FLOATS
    return source + row * FLOATS


@kernel()
def rotate_row(run, site, source, target, sums, sequence):
    """Eq. (31): a row of strips to another. The sums are of whole numbers below 2^53, so float64 holds them. sums: room for a
    row of float64."""
    strips, block, step = at(site, Site.K) // LANES, at(site, Site.BLOCK), at(run, Run.STRIDE) * FLOATS
    m = row_absmax(run, source, strips, 0, 2 * at(site, Site.NUMBER), sequence)
    multiplier, _, power = factors(Mode.NONE, 0, m, ZERO)
    by, back = splat_f(multiplier), double(splat_f(power))
    for s in range(strips):
        v = whole_double(to_int(rint(load_f(source + s * step) * by)))
        if block > 1:
            v = BUTTERFLY_1(v)
        if block > 2:
            v = BUTTERFLY_2(v)
        if block > 4:
            v = BUTTERFLY_4(v)
        if block > 8:
            v = BUTTERFLY_8(v)
        store_d(sums + s * DOUBLE_FLOATS, v)
    half = 1  # strips
    while 2 * half * LANES <= block:
        for first in range(0, strips, 2 * half):
            for s in range(first, first + half):
                place, other = sums + s * DOUBLE_FLOATS, sums + (s + half) * DOUBLE_FLOATS
                a, b = load_d(place), load_d(other)
                store_d(place, a + b)
                store_d(other, a - b)
        half *= 2
    for s in range(strips):
        store_f(target + s * step, single(load_d(sums + s * DOUBLE_FLOATS) * back))


@kernel()
def part_row(run, site, source, target, codes, row, sequence):
    """Eq. (32): the outliers of a row to OUTLIERS, in fixed point, and the row without them to another; those may be one.
    codes: room for a vector."""
    strips, step, least = at(site, Site.K) // LANES, at(run, Run.STRIDE) * FLOATS, at(site, Site.OUTLIER)
    m = row_absmax(run, source, strips, 0, 2 * at(site, Site.NUMBER), sequence)
    multiplier, _, power = factors(Mode.NONE, 0, m, ZERO)  # the largest of all is an outlier, where there are any
    outliers, count = at(run, Run.OUTLIERS) + row * at(run, Run.OUTLIER_BYTES), 0
    for s in range(strips):
        v = load_f(source + s * step)
        if largest(magnitude(v)) >= least:
            store_f(codes, rint(v * splat_f(multiplier)))
            for lane in range(LANES):
                if abs(get_f(source + s * step + 4 * lane)) >= float_of(least):
                    count += 1
                    put(outliers + 16 * count, LANES * s + lane)
                    put_f(outliers + 16 * count + 8, get_f(codes + 4 * lane))
        store_f(target + s * step, where(magnitude(v) > splat_i(least - 1), splat_f(ZERO), v))
    put(outliers, count)
    put_f(outliers + 8, power)


@kernel()
def prepared_row(rank, run, site, source, row, sequence):
    """Transform a row and take its outliers out, where the site says so. Returns the place of what is to be coded."""
    scratch = at(run, Run.SCRATCH) + rank * at(run, Run.SCRATCH_BYTES)
    target = at(run, Run.PREPARED) + row * FLOATS
    if at(site, Site.BLOCK) != 0:
        rotate_row(run, site, source, target, scratch, sequence)
        source = target
    if at(site, Site.OUTLIER) != NO_OUTLIER:
        part_row(run, site, source, target, scratch, row, sequence)
        source = target
    return source


@kernel()
def outlier_values(run, site, strip, row):
    """The product of a row's outliers with 16 rows of the weight, eq. (11, 12, 13): few columns, so one after the other."""
    part, outliers = splat_d(float(LOW_PART)), at(run, Run.OUTLIERS) + row * at(run, Run.OUTLIER_BYTES)
    total, high, low, end = splat_d(0.0), splat_d(0.0), splat_d(0.0), BLOCK
    for i in range(1, get(outliers) + 1):
        column, q = get(outliers + 16 * i), double(splat_f(get_f(outliers + 16 * i + 8)))
        while column >= end:
            total = total + (high * part + low)
            high, low, end = splat_d(0.0), splat_d(0.0), end + BLOCK
        w = whole_double(column_of(site, strip, column))
        w_high = rint_d(w * splat_d(1 / LOW_PART))
        high, low = high + q * w_high, low + q * (w - w_high * part)
    total = total + (high * part + low)
    power = double(splat_f(get_f(outliers + 8)))
    y = single(total * power * double(load_f(at(site, Site.FACTOR) + strip * FLOATS)))
    return y / load_f(at(site, Site.SCALE) + strip * FLOATS)
