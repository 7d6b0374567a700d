"""Kernels that stand alone: the probe of exactness, log-softmax, the polynomials for the conformance vectors, and a read."""

from refmamba.backends.cpu.kernels.arithmetic import INFINITY, exp, exp_negative, log_normal, silu, softplus
from refmamba.backends.cpu.kernels.digits import COLUMNS, tiles
from refmamba.backends.cpu.kernels.instructions import LANES
from refmamba.backends.cpu.kernels.tables import FLOATS, LINE, inlined, kernel
from refmamba.backends.cpu.kernels.tiles import ask_ahead
from refmamba.backends.cpu.kernels.vectors import (
    fetch_add,
    get,
    highest,
    lane_tree,
    load_any,
    load_f,
    load_first,
    load_i,
    splat_f,
    splat_i,
    store_any,
    store_f,
    store_first,
    store_i,
    where,
)


@kernel(cache=True)
def probe(rank, run):
    """What the exactness of products by digits rests on, for `check_exact` to look at: (w, x, k, out)."""
    w, x, k, out = get(run), get(run + 8), get(run + 16), get(run + 24)
    if rank == 0:
        tiles(False, 1, COLUMNS, w, LANES * k, x, k, k, out)


@inlined
def logit_vector(x, s, n):
    """Vector s of a row of n logits, filled up with -infinity."""
    return load_any(x + s * FLOATS) if LANES * s + LANES <= n else load_first(x + s * FLOATS, n - LANES * s)


@kernel()
def log_softmax_row(x, y, terms, n):
    """Eq. (25): n logits at x to log-probabilities at y. terms: room for n float32, up to whole vectors."""
    vectors = (n + LANES - 1) // LANES
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
    for s in range(n // LANES):
        store_any(y + s * FLOATS, load_any(x + s * FLOATS) - m - log)
    if n % LANES:
        store_first(y + n // LANES * FLOATS, logit_vector(x, n // LANES, n) - m - log, n % LANES)


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


@kernel(cache=True)
def read(rank, run):
    """Every thread reads its part of some memory once, as a product of one row reads a weight: (address, lines, threads, sums).
    sums: a vector for each thread, so that reading has a result."""
    place, lines, threads = get(run), get(run + 8), get(run + 16)
    total = splat_i(0)
    for line in range(rank * lines // threads, (rank + 1) * lines // threads):
        total = total + load_i(place + line * LINE)
        ask_ahead(place + line * LINE)
    store_i(get(run + 24) + rank * FLOATS, total)
