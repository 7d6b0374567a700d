"""The largest magnitude of a row of activations, and the scale or the power of two that it gives."""

from refmamba.backends.cpu.kernels.arithmetic import BIAS, FRACTION_BITS, ONE, ZERO, magnitude
from refmamba.backends.cpu.kernels.tables import DOUBLE_FLOATS, FLOATS, Mode, Run, at, f32, inlined, kernel
from refmamba.backends.cpu.kernels.vectors import (
    double,
    float_of,
    get,
    largest,
    load_d,
    load_f,
    put,
    single,
    splat_i,
    where_i,
)
from refmamba.spec.codes import ABSMAX_ZERO, ACTIVATION_BITS

INFINITE = 0x7F800000  # bits of infinity: those of a NaN are more
ABSMAX_ZERO_BITS = int(ABSMAX_ZERO.view("int32"))


@inlined
def value(source, s, step, smooth):
    """A strip of a row, divided by SmoothQuant's factors where there are any: eq. (29)."""
    v = load_f(source + s * step)
    if smooth != 0:
        v = single(double(v) * load_d(smooth + s * DOUBLE_FLOATS))
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
def power_of_two(e):
    """2^e as a float32."""
    return float_of((e + BIAS) << FRACTION_BITS)


@inlined
def factors(mode, most, m, static):
    """For an absolute maximum: what to multiply by, what to divide the product by, and the power of two to take off."""
    if mode == Mode.NONE:  # eq. (10); for 2^(E-1) <= m < 2^E the bits of m hold E + BIAS - 1
        e = min(BIAS - 1, ACTIVATION_BITS - ((m >> FRACTION_BITS) - (BIAS - 1)))
        return (ZERO, ONE, ONE) if m == 0 else (power_of_two(e), ONE, power_of_two(-e))
    if mode == Mode.STATIC:
        return (ZERO, ONE, ONE) if static == ZERO else (static, static, ONE)
    if m == 0:
        return ZERO, ONE, ONE
    scale = f32(most) / float_of(m)
    return scale, scale, ONE


@kernel()
def tensor_absmax(run, starts, sequence):
    """Bits of the largest magnitude of all rows of a sequence."""
    m = 0
    for row in range(get(starts + 8 * sequence), get(starts + 8 * sequence + 8)):
        m = max(m, get(at(run, Run.ABSMAX) + 8 * row))
    return m
