"""Single operations of the specification as kernels of their own: what the vectors are run on, and what no layer needs."""

import triton
import triton.language as tl

from refmamba.backends.triton.kernels.arithmetic import (
    divide,
    exp,
    exp_of_decay,
    log,
    log1p,
    magnitude_bits,
    silu,
    softplus,
    tree,
)
from refmamba.backends.triton.kernels.codes import exponent_of, quantize, quantize_wide, rescale, scale_of, to_fixed_point
from refmamba.backends.triton.kernels.layers import ACTIVATION_BITS, convolution, product, rms_root, store_conv_state
from refmamba.spec import codes

WEIGHT_BITS = tl.constexpr(codes.WEIGHT_BITS)


@triton.jit
def elementwise_kernel(x_ptr, z_ptr, y_ptr, n, largest, OP: tl.constexpr, BLOCK: tl.constexpr):
    """y (n,) of x and, where the operation has two operands, z: equations by their names."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < n
    x = tl.load(x_ptr + i, mask=ok, other=0.0)
    if OP == "exp":
        y = exp(x)
    elif OP == "exp_of_decay":
        y = exp_of_decay(x)
    elif OP == "log":
        y = log(x)
    elif OP == "log1p":
        y = log1p(x)
    elif OP == "softplus":
        y = softplus(x)
    elif OP == "silu":
        y = silu(x)
    elif OP == "state_matrix":
        y = exp(x) * -1.0  # some versions of Triton make -x of 0.0 - x
    elif OP == "scale_of":
        y = scale_of(magnitude_bits(x), largest)
    elif OP == "activation_exponent":
        y = exponent_of(magnitude_bits(x), ACTIVATION_BITS)
    elif OP == "weight_exponent":
        y = exponent_of(magnitude_bits(x), WEIGHT_BITS)
    else:
        z = tl.load(z_ptr + i, mask=ok, other=0)
        if OP == "step_size":
            y = softplus(x + z)
        elif OP == "gate":
            y = x * silu(z)
        elif OP == "multiply":
            y = x * z
        elif OP == "quantize":
            y = quantize(x, z, largest)
        elif OP == "quantize_wide":
            y = quantize_wide(x, z)
        elif OP == "fixed_point":
            y = to_fixed_point(x, z)
    tl.store(y_ptr + i, y, mask=ok)


@triton.jit
def tree_sum_kernel(x_ptr, y_ptr, rows, K, M: tl.constexpr, WIDTH: tl.constexpr):
    """Eq. (6): x (rows, K) -> y (rows,)."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    k = tl.arange(0, WIDTH)
    x = tl.load(x_ptr + row[:, None] * K + k[None, :], mask=(row < rows)[:, None] & (k < K)[None, :], other=0.0)
    tl.store(y_ptr + row, tree(x, M, WIDTH), mask=row < rows)


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, eps, y_ptr, rows, K, M: tl.constexpr, WIDTH: tl.constexpr):
    """Eq. (16): (rows, K) -> (rows, K)."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    k = tl.arange(0, WIDTH)
    ok = (row < rows)[:, None] & (k < K)[None, :]
    root = rms_root(x_ptr, K, eps, row, row < rows, K, M, WIDTH)
    x = tl.load(x_ptr + row[:, None] * K + k[None, :], mask=ok, other=0.0)
    y = divide(x, root[:, None]) * tl.load(weight_ptr + k[None, :], mask=k[None, :] < K, other=0.0)
    tl.store(y_ptr + row[:, None] * K + k[None, :], y, mask=ok)


@triton.jit
def conv1d_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, new_state_ptr, y_ptr, rows, K, TAPS: tl.constexpr, M: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Eq. (17) of one sequence: (rows, K), weight (TAPS, K), state (K, TAPS - 1) -> (rows, K), (K, TAPS - 1)."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    ok = (row < rows)[:, None] & (k < K)[None, :]
    zero = tl.zeros([M], tl.int32)
    y = convolution(x_ptr, K, weight_ptr, bias_ptr, state_ptr, 0, row, zero, row, k, ok, K, TAPS)
    tl.store(y_ptr + row[:, None] * K + k[None, :], y, mask=ok)
    store_conv_state(x_ptr, K, state_ptr, new_state_ptr, 0, row, zero, row, zero + rows, k, ok, TAPS)


@triton.jit
def product_kernel(
    q_ptr, w_ptr, y_ptr, rows, N,
    K: tl.constexpr, CODER: tl.constexpr, DIGITS: tl.constexpr, PLANES: tl.constexpr, M: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Eq. (11, 12) of stored digits: q (rows, DIGITS, K), w (PLANES, N, K) -> y (rows, N) float64."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    row_ok = row < rows
    acc = product(None, 0, None, None, None, 0, None, 0.0, q_ptr, row, row, row, row_ok, row, row, w_ptr, None, c, N, K, 0.0,
                  "codes", 1, "all", CODER, DIGITS, DIGITS, PLANES, False, 0, M, BN, BK)  # fmt: skip
    tl.store(y_ptr + row[:, None] * N + c[None, :], acc.to(tl.float64), mask=row_ok[:, None] & (c < N)[None, :])


@triton.jit
def rescale_kernel(
    acc_ptr, x_ptr, w_ptr, y_ptr, rows, N, X_FIXED: tl.constexpr, W_FIXED: tl.constexpr, M: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Eq. (13): acc (rows, N) float64, x (rows,), w (N,) scales or exponents -> y (rows, N)."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    ok = (row < rows)[:, None] & (c < N)[None, :]
    x = tl.load(x_ptr + row, mask=row < rows, other=0 if X_FIXED else 1.0)
    w = tl.load(w_ptr + c, mask=c < N, other=0 if W_FIXED else 1.0)
    acc = tl.load(acc_ptr + row[:, None] * N + c[None, :], mask=ok, other=0.0)
    tl.store(y_ptr + row[:, None] * N + c[None, :], rescale(acc, x, w, X_FIXED, W_FIXED), mask=ok)


@triton.jit
def log_softmax_kernel(x_ptr, y_ptr, N, WIDTH: tl.constexpr):
    """Eq. (25), a row in each program: (rows, N) -> (rows, N).

    The maximum is one of integers in the order of the floats; where it misses a NaN, the sum does not.
    """
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, WIDTH)
    ok = c < N
    x = tl.load(x_ptr + row * N + c, mask=ok, other=0.0)
    bits = x.to(tl.int32, bitcast=True)
    largest = tl.max(tl.where(ok, bits ^ ((bits >> 31) & 0x7FFFFFFF), -2147483648), 0)
    m = (largest ^ ((largest >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    shifted = x - m
    total = tree(tl.reshape(tl.where(ok, exp(shifted), 0.0), [1, WIDTH]), 1, WIDTH)
    tl.store(y_ptr + row * N + c, shifted - tl.broadcast_to(log(total), [WIDTH]), mask=ok)
