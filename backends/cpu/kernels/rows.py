"""What sees a whole token: normalization and convolution."""

import math

from refmamba.backends.cpu.kernels.arithmetic import ZERO, silu
from refmamba.backends.cpu.kernels.tables import FLOATS, Layer, Run, at, f32, kernel
from refmamba.backends.cpu.kernels.vectors import get, get_f, lane_tree, load_f, splat_f, store_f

CONV_ROWS = 16  # rows convolved strip by strip: a strip's rows are neighbours, a row's strips are pages apart


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
