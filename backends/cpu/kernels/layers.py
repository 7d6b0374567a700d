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

docs/CPU.md has all of this as a picture, and derives what makes it exact.
"""

from refmamba.backends.cpu.kernels.codes import CODE_REGIONS, CONV_ROW, LAST_NORM_ROW, NORM_ROW, NOTHING, code_rows
from refmamba.backends.cpu.kernels.output import ADD, OUTPUT_REGIONS, SET, requantize_rows
from refmamba.backends.cpu.kernels.products import PRODUCT_REGIONS, linear, product
from refmamba.backends.cpu.kernels.scan import SCAN_REGIONS, scan
from refmamba.backends.cpu.kernels.tables import FLOATS, LINE, Layer, Mode, Run, Site, at, kernel
from refmamba.backends.cpu.kernels.vectors import put
from refmamba.spec.scheme import LINEAR_LAYERS

# Of a layer, at most: its four products, and the scan. The head's is one product.
REGIONS = len(LINEAR_LAYERS) * (CODE_REGIONS + PRODUCT_REGIONS + OUTPUT_REGIONS) + SCAN_REGIONS


@kernel(cache=True)
def run_layers(rank, run):
    """The layers FIRST to LAST - 1, eq. (24), on the rows of X; then the head for OUT_ROWS rows of it."""
    step = at(run, Run.STRIDE) * FLOATS
    rows, x, normed, xz = at(run, Run.ROWS), at(run, Run.X), at(run, Run.NORMED), at(run, Run.XZ)
    u, xbc, delta = at(run, Run.U), at(run, Run.XBC), at(run, Run.DELTA)
    counter = at(run, Run.COUNTERS)
    first, lines = at(run, Run.FIRST), at(run, Run.REGIONS)
    for index in range(first, at(run, Run.LAST)):
        layer = at(run, Run.LAYER_TABLES) + 8 * index * Layer.SIZE
        in_proj, x_proj = layer + 8 * Layer.IN_PROJ, layer + 8 * Layer.X_PROJ
        dt_proj, out_proj = layer + 8 * Layer.DT_PROJ, layer + 8 * Layer.OUT_PROJ
        counter = code_rows(rank, run, NORM_ROW, layer, index, in_proj, normed, counter)
        counter = linear(rank, run, in_proj, xz, counter)
        counter = code_rows(rank, run, CONV_ROW, layer, index, x_proj, u, counter)
        counter = linear(rank, run, x_proj, xbc, counter)
        counter = code_rows(rank, run, NOTHING, layer, index, dt_proj, xbc, counter)
        counter = linear(rank, run, dt_proj, delta, counter)
        counter = scan(rank, run, layer, index, counter)
        counter = code_rows(rank, run, NOTHING, layer, index, out_proj, delta, counter)
        if at(out_proj, Site.OUT) == Mode.NONE:
            counter = product(rank, run, out_proj, rows, x, step, FLOATS, SET, ADD, counter)
        else:
            counter = product(rank, run, out_proj, rows, normed, step, FLOATS, SET, SET, counter)
            counter = requantize_rows(run, out_proj, normed, x, ADD, counter)
        if counter > at(run, Run.COUNTERS) + (index + 1 - first) * lines * LINE:
            put(at(run, Run.OVERRUN), 1)
            return
    out_rows = at(run, Run.OUT_ROWS)
    if out_rows > 0:
        head = at(run, Run.HEAD)
        site, vocabulary = head + 8 * Layer.IN_PROJ, at(run, Run.VOCABULARY)
        counter = code_rows(rank, run, LAST_NORM_ROW, head, at(run, Run.LAYERS), site, normed, counter)
        product(rank, run, site, out_rows, at(run, Run.LOGITS), FLOATS, 4 * vocabulary, vocabulary, SET, counter)
