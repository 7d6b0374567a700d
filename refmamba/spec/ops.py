"""The operations of one Mamba block, for one sequence (docs/SPEC.md, section 3; Mamba paper, sections 2 and 3).

L is the number of tokens, d = d_model, e = d_inner, n = d_state, k = d_conv. Everything is float32 unless said otherwise.
Each function has the same paragraphs: its shapes, what it computes, what it gives. The code runs a line at a time in
NumPy; the scan alone is compiled, and gives the same bits uncompiled (NUMBA_DISABLE_JIT=1).
"""

from collections.abc import Callable

import numpy as np

from refmamba.spec.arith import F32Array, IntArray, exp, f32, log, silu, softplus, tree_sum
from refmamba.spec.codes import Codes, dequantize
from refmamba.spec.jit import compiled

SCAN_CHUNK = 64  # tokens discretized at a time, to bound memory; the bits do not depend on it


def embed(tokens: IntArray, embedding: F32Array | Codes) -> F32Array:
    """Rows of the embedding, eq. (15).

    # SHAPES   tokens (L,), embedding (vocabulary, d) -> (L, d)
    # COMPUTE  look up; read codes back where the scheme quantizes the embedding
    # OUTPUT   the residual stream's first value
    """
    return dequantize(embedding.rows(tokens)) if isinstance(embedding, Codes) else embedding[tokens]


def rms_norm(x: F32Array, weight: F32Array, eps: float) -> F32Array:
    """Root-mean-square normalization, eq. (16).

    # SHAPES   x (L, d), weight (d,) -> (L, d)
    # COMPUTE  x / sqrt(mean(x^2) + eps) * weight
    # OUTPUT   the normalized residual
    """
    mean = tree_sum(x * x) / f32(x.shape[-1])
    root: F32Array = np.sqrt(mean + f32(eps))
    y: F32Array = x / root[:, None] * weight
    return y


def conv1d(x: F32Array, conv_state: F32Array, weight: F32Array, bias: F32Array | None) -> tuple[F32Array, F32Array]:
    """Causal depthwise convolution, eq. (17).

    # SHAPES   x (L, e), conv_state (e, k-1), weight (e, k), bias (e,) -> (L, e), (e, k-1)
    # COMPUTE  taps in order, oldest first; then the bias
    # OUTPUT   the convolution, and the last k-1 inputs for the next call
    """
    length, taps = x.shape[0], weight.shape[1]
    padded = np.concatenate([conv_state.T, x])
    y: F32Array = padded[:length] * weight[:, 0]
    for tap in range(1, taps):
        y += padded[tap : tap + length] * weight[:, tap]
    if bias is not None:
        y = y + bias
    return y, padded[length:].T


def step_size(dt: F32Array, bias: F32Array) -> F32Array:
    """The step delta of every channel, eq. (18). The paper's eq. 5 leaves out the bias.

    # SHAPES   dt (L, e) out of dt_proj, bias (e,) -> (L, e)
    # COMPUTE  softplus(dt + bias)
    # OUTPUT   delta, never negative
    """
    return softplus(dt + bias)


def state_matrix(A_log: F32Array) -> F32Array:
    """The state matrix's diagonal, eq. (19), once for each model.

    # SHAPES   A_log (e, n) -> (e, n)
    # COMPUTE  -exp(A_log)
    # OUTPUT   A, negative
    """
    return -exp(A_log)


def discretize(delta: F32Array, A: F32Array, B: F32Array, u: F32Array) -> tuple[F32Array, F32Array]:
    """The recurrence's factors, eq. (20): zero-order hold for A, Euler for B, as in Mamba's code.

    # SHAPES   delta (L, e), A (e, n), B (L, n), u (L, e) -> (L, e, n), (L, e, n)
    # COMPUTE  exp(delta A) and (delta u) B, in this order of products
    # OUTPUT   A_bar and B_bar u
    """
    A_bar = exp(delta[:, :, None] * A)
    B_bar_u = (delta * u)[:, :, None] * B[:, None, :]
    return A_bar, B_bar_u


@compiled
def scan(A_bar: F32Array, B_bar_u: F32Array, C: F32Array, h: F32Array) -> tuple[F32Array, F32Array]:
    """The selective scan, eq. (21).

    # SHAPES   A_bar (L, e, n), B_bar_u (L, e, n), C (L, n), h (e, n) -> (L, e), (e, n); n a power of two
    # COMPUTE  time in order: h = A_bar h + B_bar u, then the tree sum of C h
    # OUTPUT   C h for every token, and the last state
    """
    y = np.empty(A_bar.shape[:2], np.float32)
    for t in range(A_bar.shape[0]):
        h = A_bar[t] * h + B_bar_u[t]
        terms = C[t] * h
        width = terms.shape[1]
        while width > 1:
            width //= 2
            terms = terms[:, :width] + terms[:, width:]
        y[t] = terms[:, 0]
    return y, h


def selective_scan(
    u: F32Array, delta: F32Array, A: F32Array, B: F32Array, C: F32Array, D: F32Array, ssm_state: F32Array
) -> tuple[F32Array, F32Array]:
    """The state space model, eq. (20, 21, 22).

    # SHAPES   u (L, e), delta (L, e), A (e, n), B (L, n), C (L, n), D (e,), ssm_state (e, n) -> (L, e), (e, n)
    # COMPUTE  discretize and scan some tokens at a time; then add the skip D u
    # OUTPUT   y = C h + D u, and the last state
    """
    n = A.shape[1]
    pad = (1 << (n - 1).bit_length()) - n  # columns of zeros up to a power of two, as the tree sum has them
    h = np.pad(ssm_state, ((0, 0), (0, pad)))
    parts = []
    for start in range(0, len(u), SCAN_CHUNK):
        now = slice(start, start + SCAN_CHUNK)
        A_bar, B_bar_u = (np.pad(x, ((0, 0), (0, 0), (0, pad))) for x in discretize(delta[now], A, B[now], u[now]))
        part, h = scan(A_bar, B_bar_u, np.pad(C[now], ((0, 0), (0, pad))), h)
        parts.append(part)
    return np.concatenate(parts) + D * u, h[:, :n].copy()


def gate(y: F32Array, z: F32Array) -> F32Array:
    """The gate, eq. (23).

    # SHAPES   y (L, e), z (L, e) -> (L, e)
    # COMPUTE  y * silu(z)
    # OUTPUT   the input of out_proj
    """
    return y * silu(z)


def add(x: F32Array, y: F32Array) -> F32Array:
    """The residual's sum, eq. (24); a linear layer's bias; the sum of its parts.

    # SHAPES   (L, n), and (L, n) or (n,) -> (L, n)
    # COMPUTE  x + y
    # OUTPUT   float32
    """
    return x + y


def log_softmax(logits: F32Array) -> F32Array:
    """Log-probabilities, eq. (25).

    # SHAPES   logits (..., vocabulary) -> the same
    # COMPUTE  (x - max) - log(sum(exp(x - max))), the sum by the tree, all rows of the head
    # OUTPUT   natural logarithms
    """
    shifted = logits - np.max(logits, axis=-1, keepdims=True)
    y: F32Array = shifted - log(tree_sum(exp(shifted)))[..., None]
    return y


def sample(logits: F32Array, draw: float, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> int:
    """The token that a uniform draw picks, eq. (26).

    # SHAPES   logits (vocabulary,), draw in [0, 1) -> a token
    # COMPUTE  weights exp((x - max) / temperature); largest first, equal ones by index; the first top_k (0: all); the
    #          fewest that hold top_p of those; then the first whose running sum (float64, in order) exceeds draw * sum
    # OUTPUT   its index. Temperature 0 gives the first largest logit and uses no draw
    """
    if f32(temperature) == 0:
        return int(np.argmax(logits))
    weights = exp((logits - np.max(logits)) / f32(temperature))
    order = np.argsort(-weights, kind="stable")[: top_k or None]
    running = np.cumsum(weights[order], dtype=np.float64)
    if top_p < 1:
        running = running[: int(np.searchsorted(running, top_p * running[-1])) + 1]
    return int(order[np.searchsorted(running, draw * running[-1], side="right")])


def draws(seed: int) -> Callable[[], float]:
    """The uniform draws of a seed, eq. (26): each call gives the next one, and sampling takes one for each token.

    # SHAPES   seed from 0 on -> a function without arguments
    # COMPUTE  PCG64, seeded and read as NumPy's Generator does
    # OUTPUT   its calls give float64 in [0, 1)
    """
    return np.random.Generator(np.random.PCG64(seed)).random
