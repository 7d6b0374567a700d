"""What the kernels are told: tables of int64 that the runner fills in, and how a kernel reads them."""

from enum import IntEnum

import numba
import numpy as np

from refmamba.backends.cpu.kernels.vectors import get

f32 = np.float32
# numpy's integers where they are arguments: numba compiles a function anew for each of Python's.
FLOATS = np.int64(64)  # bytes of 16 float32
BLOCK = 4096  # columns whose integer product is joined in one piece, eq. (12)
LINE = 64  # bytes between two threads' counters


class Run(IntEnum):
    """The int64 arguments of `run_layers`. Names of buffers stand for their addresses; CONV_IN to SSM_OUT for those of tables
    with the address of each sequence's state."""

    (THREADS, COUNTERS, SCRATCH, SCRATCH_BYTES, FIRST, LAST, LAYERS, LAYER_TABLES, HEAD, EPSILON, D_MODEL, MODEL_STRIPS,
     INNER_STRIPS, RANK_STRIPS, STATE_STRIPS, D_STATE, TAPS, VOCABULARY, ROWS, STRIDE, SEQUENCES, START, SEQUENCE, OUT_ROWS,
     OUT_ROW, OUT_START, OUT_SEQUENCE, X, NORMED, XZ, U, XBC, DELTA, CODES, FACTOR, SCALE, SUMS, SUM_BLOCKS, ABSMAX, ERRORS,
     CONV_IN, CONV_OUT, SSM_IN, SSM_OUT, LOGITS) = range(45)  # fmt: skip


class Site(IntEnum):
    """One linear layer: int64 each."""

    (CODES, KIND, PAIRS, K, SLICES, PANELS, ERROR, FACTOR, SCALE, BIAS, IN, IN_LARGEST, IN_SCALE, SMOOTH, OUT, OUT_LARGEST,
     NUMBER) = range(17)  # fmt: skip


class Layer(IntEnum):
    """One block: int64 each, then its four sites. The head is a table like it: NORM, and IN_PROJ for the head's own product."""

    NORM, CONV, CONV_BIAS, A, DT_BIAS, D = range(6)
    IN_PROJ, X_PROJ, DT_PROJ, OUT_PROJ, SIZE = range(6, 6 + 5 * len(Site), len(Site))


class Kind(IntEnum):
    """Digits of a weight: two codes a byte, one code a byte, or three bytes of a fixed-point code, a plane each."""

    PACKED, BYTES, FIXED = 0, 1, 3


class Mode(IntEnum):
    """Where a site's scale comes from; NONE: not quantized, which on the `in` side is fixed point."""

    NONE, TOKEN, TENSOR, STATIC = range(4)


def kernel(**options):  # type: ignore[no-untyped-def]
    """A function compiled into `run_layers`. A division by zero is an infinity, as in the specification."""
    return numba.njit(error_model="numpy", nogil=True, **options)


inlined = kernel(forceinline=True)


@inlined
def at(table, field):
    """One int64 of a table."""
    return get(table + 8 * field)
