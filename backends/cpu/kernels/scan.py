"""The selective scan, with the step size before it and the gate after it."""

from refmamba.backends.cpu.kernels.arithmetic import ZERO, exp_negative, silu, softplus
from refmamba.backends.cpu.kernels.instructions import LANES
from refmamba.backends.cpu.kernels.regions import meet, share
from refmamba.backends.cpu.kernels.tables import FLOATS, Layer, Run, at, inlined, kernel
from refmamba.backends.cpu.kernels.vectors import ask_read, ask_write, get, get_f, load_f, splat_f, store_f

SCAN_REGIONS = 1  # of `scan`
AHEAD = 8  # items before their turn that states are asked for
TOGETHER = 16  # items of one token each whose step sizes and gates are computed together


def scan_scratch(states: int) -> int:
    """A thread's own: a vector for each term of the tree sum, whose first level is added as the terms come."""
    return int(FLOATS) << (states - 1).bit_length()


@inlined
def lane_of(channel, step):
    """Where a channel lies in the first row of its strips."""
    return channel // LANES * step + channel % LANES * 4


@inlined
def scan_term(delta, delta_u, A, before, h, B, C):
    """Eq. (20, 21) for one state of 16 channels: the new state goes to h; C h."""
    v = exp_negative(delta * load_f(A)) * load_f(before) + delta_u * splat_f(get_f(B))
    store_f(h, v)
    return splat_f(get_f(C)) * v


@kernel()
def keep_inputs(run, index, sequence, s):
    """The last inputs of the convolution of 16 channels of a sequence, for the next call. In and out may be one memory."""
    step, taps, line = at(run, Run.STRIDE) * FLOATS, at(run, Run.TAPS), at(run, Run.INNER_STRIPS) * FLOATS
    start, end = get(at(run, Run.START) + 8 * sequence), get(at(run, Run.START) + 8 * sequence + 8)
    offset = index * (taps - 1) * line + s * FLOATS
    before = get(at(run, Run.CONV_IN) + 8 * sequence) + offset
    after = get(at(run, Run.CONV_OUT) + 8 * sequence) + offset
    for i in range(taps - 1):
        time = end - start - (taps - 1) + i
        if time < 0:
            v = load_f(before + (time + taps - 1) * line)
        else:
            v = load_f(at(run, Run.XZ) + (start + time) * FLOATS + s * step)
        store_f(after + i * line, v)


@kernel()
def step_sizes(run, layer, sequence, s):
    """Eq. (18) for 16 channels of a sequence, in place."""
    bias = load_f(at(layer, Layer.DT_BIAS) + s * FLOATS)
    strip = at(run, Run.DELTA) + s * at(run, Run.STRIDE) * FLOATS
    for row in range(get(at(run, Run.START) + 8 * sequence), get(at(run, Run.START) + 8 * sequence + 8)):
        store_f(strip + row * FLOATS, softplus(load_f(strip + row * FLOATS) + bias))


@kernel()
def scan_strip(rank, run, layer, index, sequence, s):
    """Eq. (20 to 22) for 16 channels of a sequence: scan and skip. The result replaces the step sizes in DELTA."""
    n, step, inner = at(run, Run.D_STATE), at(run, Run.STRIDE) * FLOATS, at(run, Run.INNER_STRIPS)
    offset = (index * inner + s) * n * FLOATS
    before, h = get(at(run, Run.SSM_IN) + 8 * sequence) + offset, get(at(run, Run.SSM_OUT) + 8 * sequence) + offset
    A, D = at(layer, Layer.A) + s * n * FLOATS, load_f(at(layer, Layer.D) + s * FLOATS)
    terms = at(run, Run.SCRATCH) + rank * at(run, Run.SCRATCH_BYTES)
    half = 1
    while 2 * half < n:
        half *= 2
    pairs = n - half  # states with one `half` further on, with which the tree adds them
    B = at(run, Run.XBC) + at(run, Run.RANK_STRIPS) * step
    C = B + at(run, Run.STATE_STRIPS) * step
    u_strip, dt_strip = at(run, Run.U) + s * step, at(run, Run.DELTA) + s * step
    for row in range(get(at(run, Run.START) + 8 * sequence), get(at(run, Run.START) + 8 * sequence + 8)):
        at_row = row * FLOATS
        u, delta = load_f(u_strip + at_row), load_f(dt_strip + at_row)
        delta_u = delta * u
        # The tree's first level as the terms come; states that fill up to a power of two are zeros.
        for i in range(pairs):
            j = (i + half) * FLOATS
            lane, other = lane_of(i, step) + at_row, lane_of(i + half, step) + at_row
            term = scan_term(delta, delta_u, A + i * FLOATS, before + i * FLOATS, h + i * FLOATS, B + lane, C + lane)
            term = term + scan_term(delta, delta_u, A + j, before + j, h + j, B + other, C + other)
            store_f(terms + i * FLOATS, term)
        for i in range(pairs, half):
            lane = lane_of(i, step) + at_row
            term = scan_term(delta, delta_u, A + i * FLOATS, before + i * FLOATS, h + i * FLOATS, B + lane, C + lane)
            store_f(terms + i * FLOATS, term + splat_f(ZERO) if n > 1 else term)
        width = half
        while width > 1:
            width //= 2
            for i in range(width):
                store_f(terms + i * FLOATS, load_f(terms + i * FLOATS) + load_f(terms + (i + width) * FLOATS))
        store_f(dt_strip + at_row, load_f(terms) + D * u)
        before = h


@kernel()
def ask_states(run, index, sequence, s):
    """Ask for the states of 16 channels of a sequence, and for where they go. In a step of many sequences they are more than
    the weights, and lie in no cache."""
    n = at(run, Run.D_STATE)
    offset = (index * at(run, Run.INNER_STRIPS) + s) * n * FLOATS
    before, h = get(at(run, Run.SSM_IN) + 8 * sequence) + offset, get(at(run, Run.SSM_OUT) + 8 * sequence) + offset
    for i in range(n):
        ask_read(before + i * FLOATS)
        ask_write(h + i * FLOATS)


@kernel()
def gate_strip(run, sequence, s):
    """Eq. (23) for 16 channels of a sequence, in place."""
    step, inner = at(run, Run.STRIDE) * FLOATS, at(run, Run.INNER_STRIPS)
    strip, z = at(run, Run.DELTA) + s * step, at(run, Run.XZ) + (inner + s) * step
    for row in range(get(at(run, Run.START) + 8 * sequence), get(at(run, Run.START) + 8 * sequence + 8)):
        store_f(strip + row * FLOATS, load_f(strip + row * FLOATS) * silu(load_f(z + row * FLOATS)))


@kernel()
def scan(rank, run, layer, index, counter):
    """Region: step sizes, scan and gate, 16 channels of one sequence an item, and both states. Returns the next region's
    counter.

    Step sizes and gates have loops of their own, of several items where these are of one token each: what does not wait for
    each other fills the processor better.
    """
    strips = at(run, Run.INNER_STRIPS)
    items, mine = strips * at(run, Run.SEQUENCES), 0
    together = TOGETHER if at(run, Run.ROWS) == at(run, Run.SEQUENCES) else 1
    first, last = share(run, counter, items)
    while first < items:
        for start in range(first, last, together):
            end = min(last, start + together)
            for i in range(start, end):
                keep_inputs(run, index, i // strips, i % strips)
                step_sizes(run, layer, i // strips, i % strips)
            for i in range(start, end):
                if i + AHEAD < last:
                    ask_states(run, index, (i + AHEAD) // strips, (i + AHEAD) % strips)
                scan_strip(rank, run, layer, index, i // strips, i % strips)
            for i in range(start, end):
                gate_strip(run, i // strips, i % strips)
        mine += last - first
        first, last = share(run, counter, items)
    return meet(counter, items, mine)
