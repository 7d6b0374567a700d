"""What the kernels are told: tables of int64 that the runner fills in, and how a kernel reads them."""

from enum import IntEnum, auto

import numba
import numpy as np

from refmamba.backends.cpu.kernels.instructions import LANES
from refmamba.backends.cpu.kernels.vectors import get, load_i, load_steps, splat_i

f32 = np.float32
LINE = 64  # bytes of a cache line, and of the longest vector register
# numpy's integers where they are arguments: numba compiles a function anew for each of Python's.
FLOATS = np.int64(4 * LANES)  # bytes of a vector of float32
DOUBLE_FLOATS = np.int64(8 * LANES)  # and of float64


class Table(IntEnum):
    """Places in a table of int64, from 0. A place that says `address` holds that of an array."""

    @staticmethod
    def _generate_next_value_(name: str, start: int, count: int, last_values: list[int]) -> int:
        return count


class Run(Table):
    """The arguments of `run_layers`: the model's for its life, then those of a pass."""

    THREADS = auto()  # how many there are
    COUNTERS = auto()  # address: a line for each region of a pass, zeros when it begins
    REGIONS = auto()  # lines of COUNTERS that a layer, or the head, may use
    OVERRUN = auto()  # address: set to 1 by a layer that needs more
    SCRATCH = auto()  # address: each thread's own memory
    SCRATCH_BYTES = auto()  # bytes of it for each thread
    LAYERS = auto()  # how many the model has
    LAYER_TABLES = auto()  # address: the tables `Layer`, one after the other
    HEAD = auto()  # address: the head's
    EPSILON = auto()  # address: of eq. (16), float32
    D_MODEL = auto()  # channels of the residual stream
    MODEL_STRIPS = auto()  # strips of d_model channels
    INNER_STRIPS = auto()  # strips of d_inner channels
    RANK_STRIPS = auto()  # strips of dt_rank channels
    STATE_STRIPS = auto()  # strips of d_state channels
    D_STATE = auto()  # states of a channel
    TAPS = auto()  # of the convolution
    VOCABULARY = auto()  # rows of the head
    SUM_BLOCKS = auto()  # places in SUMS for a row: the blocks of eq. (12) in the longest row of codes

    FIRST = auto()  # the first layer to run
    LAST = auto()  # the layer to stop before
    ROWS = auto()  # tokens of the pass, all sequences together
    STRIDE = auto()  # rows that are reserved for a strip
    SEQUENCES = auto()  # how many there are
    START = auto()  # address: the first row of each sequence, and ROWS
    SEQUENCE = auto()  # address: the sequence of each row
    OUT_ROWS = auto()  # rows that the head sees; 0: no head
    OUT_ROW = auto()  # address: which rows those are
    OUT_START = auto()  # address: START of those
    OUT_SEQUENCE = auto()  # address: SEQUENCE of those
    CONV_IN = auto()  # address: of each sequence, the address of the inputs that the convolution kept
    SSM_IN = auto()  # address: of each sequence, the address of its ssm_state
    CONV_OUT = auto()  # address: the same for the states that are written; they may be those that are read
    SSM_OUT = auto()  # address: likewise
    ERRORS = auto()  # address: for each sequence, the first site with a value that has no codes; 0: none
    LOGITS = auto()  # address: float32, (OUT_ROWS, VOCABULARY)

    X = auto()  # address, strips: the residual stream
    NORMED = auto()  # address, strips: normalized rows; out_proj's result before its codes
    XZ = auto()  # address, strips: in_proj's result, x and z
    U = auto()  # address, strips: the convolution's result
    XBC = auto()  # address, strips: x_proj's result, dt, B and C
    DELTA = auto()  # address, strips: dt_proj's result, then the scan's, then the gate's
    PREPARED = auto()  # address, strips: rows after their rotation and without their outliers, where a site has either
    OUTLIERS = auto()  # address: of each row, how many outliers; their power of two to take off, float32; columns and codes
    OUTLIER_BYTES = auto()  # bytes of them for each row
    CODES = auto()  # address: rows of codes that go into a product, by digits or by panels
    FACTOR = auto()  # address: of each row of codes, the power of two to take off, float32
    SCALE = auto()  # address: and the scale to divide by, float32
    SUMS = auto()  # address: and its sum of codes in each block, int64; by panels, a bound on its norm, float32
    STARTS = auto()  # address: of each slice of a row, what each sum of UNITS starts from, 4 bytes
    ABSMAX = auto()  # address: of each row, the bits of its absolute maximum, int64


class Site(Table):
    """One linear layer."""

    CODES = auto()  # address: the weight's digits
    KIND = auto()  # how they are stored, a `Kind`
    STEPS = auto()  # address: of weights in groups, a byte for each row of a strip and each group
    STEP_BYTES = auto()  # bytes of them for a strip
    GROUP_BITS = auto()  # columns of a group, as a power of two
    UNITS = auto()  # sums of columns that steps multiply; 0: there are no groups
    PAIRS = auto()  # pairs of strips of its rows
    K = auto()  # columns, with padding to whole vectors
    SLICES = auto()  # int8 slices of a row of codes: 1 for N-bit codes, 4 for fixed point
    PANELS = auto()  # rows from which on the product is made by panels
    ERROR = auto()  # address: of each row of the weight, its norm times `sum_error`, float32; 0 where sums are exact
    FACTOR = auto()  # address: of each row of the weight, the power of two to take off, float32
    SCALE = auto()  # address: and the scale to divide by, float32
    BIAS = auto()  # address: float32; 0: none
    IN = auto()  # where the input's scale comes from, a `Mode`
    IN_LARGEST = auto()  # the input's largest code
    IN_SCALE = auto()  # address: the input's static scale, float32; 0: all codes are 0
    SMOOTH = auto()  # address: what to multiply the input's channels by, float64; 0: nothing
    BLOCK = auto()  # channels that are rotated together; 0: none are
    OUTLIER = auto()  # bits of the magnitude from which on a value of the input is an outlier; NO_OUTLIER: none is
    OUT = auto()  # where the output's scale comes from, a `Mode`
    OUT_LARGEST = auto()  # the output's largest code
    NUMBER = auto()  # of this site, from 1, for ERRORS: 2 NUMBER for its input, 2 NUMBER + 1 for its output


class Layer(IntEnum):
    """One block, and its four sites. The head is a table like it: NORM, and IN_PROJ for the head's own product."""

    NORM = 0  # address, a strip after the other: weight of the norm
    CONV = 1  # address, (TAPS, strips, 16): weight of the convolution
    CONV_BIAS = 2  # address: its bias; 0: none
    A = 3  # address, (strips, D_STATE, 16): A of eq. (19)
    DT_BIAS = 4  # address: bias of eq. (18)
    D = 5  # address: D of eq. (22)
    IN_PROJ = 6  # from here on a `Site`
    X_PROJ = IN_PROJ + len(Site)  # and so on
    DT_PROJ = X_PROJ + len(Site)
    OUT_PROJ = DT_PROJ + len(Site)
    SIZE = OUT_PROJ + len(Site)  # of a table


class Kind(IntEnum):
    """Digits of a weight: two codes a byte, one code a byte, three bytes of a fixed-point code, a plane each; or two codes
    a byte that are multiplied by their group's step."""

    PACKED, BYTES, FIXED, GROUPED = range(4)


UNIT = 64  # columns of a group that are summed before their step multiplies the sum, at most
# What makes the codes of each kind unsigned.
PACKED_OFFSET, BYTES_OFFSET, FIXED_OFFSET = 1 << 3, 1 << 7, 1 << 23


NO_OUTLIER = -1  # no magnitude's bits


class Mode(IntEnum):
    """Where a site's scale comes from; NONE: not quantized, which on the `in` side is fixed point."""

    NONE, TOKEN, TENSOR, STATIC = range(4)


def kernel(**options):  # type: ignore[no-untyped-def]
    """A function compiled into `run_layers`. A division by zero is an infinity, as in the specification."""
    return numba.njit(error_model="numpy", nogil=True, **options)


inlined = kernel(forceinline=True)


@inlined
def offset_of(kind):
    """What a product's digits are off by, of the kinds that are no fixed point. GROUPED: nothing, as `STARTS` take it off."""
    return PACKED_OFFSET if kind == Kind.PACKED else (0 if kind == Kind.GROUPED else BYTES_OFFSET)


@inlined
def halves(kind):
    """Whether a byte holds two codes."""
    return kind == Kind.PACKED or kind == Kind.GROUPED


@inlined
def planes_of(kind):
    """Planes of a weight's digits."""
    return 3 if kind == Kind.FIXED else 1


@inlined
def vector_bytes(kind):
    """Bytes of the digits of 16 rows in one column: a plane of a strip has as many for each column."""
    return LANES // 2 if halves(kind) else LANES


@inlined
def steps_of(site, strip, column):
    """Where the steps of 16 rows lie that multiply a column and its group: bytes, a vector for each group."""
    return at(site, Site.STEPS) + strip * at(site, Site.STEP_BYTES) + (column >> at(site, Site.GROUP_BITS)) * LANES


@inlined
def column_of(site, strip, column):
    """The integers of the 16 rows of a strip of a weight in one column, int32."""
    kind, group = at(site, Site.KIND), column // 4
    plane_bytes = vector_bytes(kind) * at(site, Site.K)
    digits = at(site, Site.CODES) + strip * planes_of(kind) * plane_bytes
    place = digits + (group // 2 if halves(kind) else group) * LINE
    shift = splat_i(8 * (column % 4))
    q = load_i(place) >> shift
    if halves(kind):
        q = (q >> splat_i(4 * (group % 2))) & splat_i(15)
    else:
        q = q & splat_i(255)
    if kind == Kind.FIXED:
        q = q + (((load_i(place + plane_bytes) >> shift) & splat_i(255)) << splat_i(8))
        q = q + (((load_i(place + 2 * plane_bytes) >> shift) & splat_i(255)) << splat_i(16))
        return q - splat_i(FIXED_OFFSET)
    if kind == Kind.GROUPED:
        return (q - splat_i(PACKED_OFFSET)) * load_steps(steps_of(site, strip, column))
    return q - splat_i(offset_of(kind))


@inlined
def at(table, field):
    """One int64 of a table."""
    return get(table + 8 * field)
