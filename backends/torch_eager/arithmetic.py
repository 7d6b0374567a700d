"""The specification's functions in eager PyTorch, with a batch axis in front; the equations are docs/SPEC.md's.

Where PyTorch has an obvious way that gives other bits, a comment says so.
"""

import numpy as np
import torch
from torch import Tensor

from refmamba.backends.adapter import Codes, FixedPoint
from refmamba.errors import NonFiniteError
from refmamba.spec import arith
from refmamba.spec import codes as spec
from refmamba.spec.codes import BLOCK, LOW_PART
from refmamba.spec.transforms import hadamard_block

SCAN_CHUNK = 64  # tokens discretized at a time, to bound memory


Failures = list[tuple[str, Tensor]]  # sites where codes are made, and whether a value was NaN or infinite there


def raise_first(failures: Failures) -> None:
    """Raise NonFiniteError for the first site that failed: the one synchronization of a call. Empties the list."""
    sites, flags = [site for site, _ in failures], [flag for _, flag in failures]
    failures.clear()
    for site, failed in zip(sites, torch.stack(flags).tolist() if flags else [], strict=True):
        if failed:
            raise NonFiniteError(f"{site}: a value is NaN or infinite, so it has no codes; check the weights and the input")


def dequantize(codes: Codes) -> Tensor:
    """q / scale, eq. (9)."""
    return codes.q.float() / codes.scale


def two_to(n: Tensor) -> Tensor:
    """2^n as float32, by its bits."""
    return ((n + 127) << 23).view(torch.float32)


def two_to_f64(n: Tensor) -> Tensor:
    """2^n as float64, by its bits: torch.ldexp computes a float32 pow."""
    return ((n.long() + 1023) << 52).view(torch.float64)


def exp(x: Tensor) -> Tensor:
    """Eq. (1)."""
    zero = torch.zeros((), device=x.device)
    inside = (x >= float(arith.EXP_LOW)) & (x <= float(arith.EXP_HIGH))
    a = torch.where(inside, x, zero)
    n = torch.round(a * float(arith.LOG2_E))
    r = (a - n * float(arith.LN2_HIGH)) - n * float(arith.LN2_LOW)
    p = torch.full_like(r, float(arith.EXP_TERMS[0]))
    for term in arith.EXP_TERMS[1:]:
        p = p * r + float(term)  # two kernels, so two roundings; addcmul would be free to fuse them
    p = (p * (r * r) + r) + 1.0
    whole = n.int()
    half = whole >> 1
    y = (p * two_to(half)) * two_to(whole - half)
    outside = torch.where(x > float(arith.EXP_HIGH), zero + torch.inf, torch.where(x < float(arith.EXP_LOW), zero, x))
    return torch.where(inside, y, outside)


def log(x: Tensor) -> Tensor:
    """Eq. (2)."""
    zero = torch.zeros((), device=x.device)
    usual = (x > 0) & (x < torch.inf)
    a = torch.where(usual, x, zero + 1.0)
    subnormal = a < 2.0**-126
    a = torch.where(subnormal, a * float(arith.TWO_25), a)
    bits = a.view(torch.int32)
    k = (bits - int(arith.SQRT_HALF_BITS)) >> 23
    f = (bits - (k << 23)).view(torch.float32) - 1.0
    n = torch.where(subnormal, k - 25, k).float()
    p = torch.full_like(f, float(arith.LOG_TERMS[0]))
    for term in arith.LOG_TERMS[1:]:
        p = p * f + float(term)
    square = f * f
    y = (((p * f) * square + n * float(arith.LN2_LOW)) - square * 0.5) + f
    y = y + n * float(arith.LN2_HIGH)
    special = torch.where(x == 0, zero - torch.inf, torch.where(x > 0, x, zero + torch.nan))
    return torch.where(usual, y, special)


def log1p(y: Tensor) -> Tensor:
    """Eq. (3)."""
    u = y + 1.0
    return log(u) + (y - (u - 1.0)) / u


def softplus(x: Tensor) -> Tensor:
    """Eq. (4)."""
    positive = torch.maximum(x, torch.zeros((), device=x.device))
    return torch.where(x > float(arith.SOFTPLUS_LINEAR), x, positive + log1p(exp(-x.abs())))


def silu(x: Tensor) -> Tensor:
    """Eq. (5)."""
    return x / (exp(-x) + 1.0)


def tree_sum(x: Tensor) -> Tensor:
    """Eq. (6), over the last axis."""
    width = 1 << (x.shape[-1] - 1).bit_length()
    x = torch.nn.functional.pad(x, (0, width - x.shape[-1]))
    while width > 1:
        width //= 2
        x = x[..., :width] + x[..., width:]
    return x[..., 0]


def absmax(x: Tensor, site: str, axes: tuple[int, ...], failures: Failures) -> Tensor:
    """Eq. (7), over the last or the last two axes, which stay with length 1. amax hands a NaN on, as it should."""
    m = x.abs().amax(axes, keepdim=True)
    failures.append((site, ~torch.isfinite(m).all()))
    return torch.where(m < float(spec.ABSMAX_ZERO), torch.zeros_like(m), m)


def scale_of(m: Tensor, bits: int) -> Tensor:
    """Eq. (7). The dividend is a tensor: `number / tensor` would be a multiplied reciprocal."""
    one = torch.ones((), device=m.device)
    return torch.where(m == 0, one, one * float(2 ** (bits - 1) - 1) / torch.where(m == 0, one, m))


def to_codes(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Eq. (8). torch.round is half to even; the clamp is before the cast."""
    largest = float(2 ** (bits - 1) - 1)
    return torch.round((x * scale).clamp(-largest, largest)).to(torch.int8 if bits <= 8 else torch.int16)


def code(x: Tensor, bits: int, site: str, axes: tuple[int, ...], failures: Failures) -> Codes:
    """Eq. (7, 8)."""
    m = absmax(x, site, axes, failures)
    scale = scale_of(m, bits)
    return Codes(to_codes(torch.where(m == 0, torch.zeros_like(x), x), scale, bits), scale, bits)


def code_static(x: Tensor, static_absmax: Tensor, bits: int, site: str, failures: Failures) -> Codes:
    """Eq. (7, 8) with a calibrated absolute maximum, shape ()."""
    absmax(x, site, (-2, -1), failures)
    m = torch.where(static_absmax < float(spec.ABSMAX_ZERO), torch.zeros_like(static_absmax), static_absmax)
    scale = scale_of(m, bits)
    return Codes(to_codes(torch.where(m == 0, torch.zeros_like(x), x), scale, bits), scale, bits)


def code_flattened(x: Tensor, threshold: Tensor, bits: int, site: str, failures: Failures) -> Codes:
    """Eq. (33). threshold: shape ()."""
    absmax(x, site, (-2, -1), failures)
    m = torch.where(threshold < float(spec.ABSMAX_ZERO), torch.zeros_like(threshold), threshold)
    scale, most = scale_of(m, bits), 2.0**spec.ACTIVATION_BITS
    scaled = (torch.where(m == 0, torch.zeros_like(x), x) * scale).clamp(-most, most)
    return Codes(torch.round(scaled).int(), scale, bits)


def rotate(x: Tensor, site: str, failures: Failures) -> Tensor:
    """Eq. (31): sums of integers, then one rounding to float32."""
    codes, block, half = fixed_point(x, spec.ACTIVATION_BITS, site, failures), hadamard_block(x.shape[-1]), 1
    q = codes.q.long()
    while half < block:
        pairs = q.reshape(*q.shape[:-1], -1, 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        q = torch.stack([a + b, a - b], -2).reshape(q.shape)
        half *= 2
    return (q.double() * two_to_f64(-codes.exponent)).float()


def fixed_point(x: Tensor, magnitude_bits: int, site: str, failures: Failures) -> FixedPoint:
    """Eq. (10), a power of two for each row. An absmax that is not zero is a normal number: E is in its bits."""
    m = absmax(x, site, (-1,), failures)
    exponent = (magnitude_bits - ((m.view(torch.int32) >> 23) - 126)).clamp(max=126)
    exponent = torch.where(m == 0, torch.zeros_like(exponent), exponent)
    x = torch.where(m == 0, torch.zeros_like(x), x)
    return FixedPoint(torch.round(x.double() * two_to_f64(exponent)).int(), exponent)


def int8_product(x: Tensor, w: Tensor) -> Tensor:
    """x @ w.T for int8 matrices, in int32. CUDA wants more than 16 rows and multiples of 8: zeros change no sum."""
    n, k = x.shape
    rows = len(w)
    x = torch.nn.functional.pad(x, (0, -k % 8, 0, max(32, n + -n % 8) - n))
    w = torch.nn.functional.pad(w, (0, -k % 8, 0, -rows % 8))
    product: Tensor = torch._int_mm(x, w.T)
    return product[:n, :rows]


def int8_product_is_exact(k: int, device: torch.device) -> bool:
    """Whether int8_product is exact for rows of k, on the extreme codes: before VNNI, oneDNN saturates in silence."""
    signs = torch.ones(32, k, dtype=torch.int8, device=device) * 127
    signs[1::2, ::2] = -127
    try:
        product = int8_product(signs, signs)
    except RuntimeError:  # not on this device
        return False
    return torch.equal(product.double(), signs.double() @ signs.double().T)


PART = 1 << 22  # elements of a weight that are widened to float64 at a time


def integer_product(x: Codes | FixedPoint, w: Codes | FixedPoint, int8: bool) -> Tensor:
    """Exact x.q @ w.q.T as float64, eq. (11, 12): (..., K), (rows, K) -> (..., rows). int8: int8_product is exact."""
    if int8 and x.q.dtype == w.q.dtype == torch.int8:
        return int8_product(x.q.flatten(0, -2), w.q).double().reshape(*x.q.shape[:-1], len(w.q))
    both_fixed, wide = isinstance(x, FixedPoint) and isinstance(w, FixedPoint), x.q.double()
    parts = torch.split(w.q, max(PART // w.q.shape[1], 1))
    return torch.cat([fixed_product(wide, rows) if both_fixed else wide @ rows.double().T for rows in parts], -1)


def fixed_product(x: Tensor, w: Tensor) -> Tensor:
    """Eq. (12): x float64 (..., K), w int32 (rows, K)."""
    total = torch.zeros((), dtype=torch.float64, device=w.device)
    for start in range(0, w.shape[1], BLOCK):
        x_block, w_block = x[..., start : start + BLOCK], w[:, start : start + BLOCK]
        lo = ((w_block + LOW_PART // 2) & (LOW_PART - 1)) - LOW_PART // 2
        hi = (w_block - lo) >> 12
        total = total + ((x_block @ hi.double().T) * LOW_PART + x_block @ lo.double().T)
    return total


def rescale(acc: Tensor, x: Codes | FixedPoint, w: Codes | FixedPoint) -> Tensor:
    """Eq. (13). Adding 0.0 turns the -0.0 of a product of length 1 into +0.0."""
    if isinstance(x, FixedPoint):
        acc = acc * two_to_f64(-x.exponent)
    if isinstance(w, FixedPoint):
        acc = acc * two_to_f64(-w.exponent[:, 0])
    y = (acc + 0.0).float()
    if isinstance(w, Codes):
        w_scale = w.scale if w.scale.ndim == 0 else w.scale[:, 0]
        return y / (x.scale * w_scale if isinstance(x, Codes) else w_scale)
    return y / x.scale if isinstance(x, Codes) else y


def embed(tokens: Tensor, embedding: Tensor | Codes) -> Tensor:
    """Eq. (15)."""
    if isinstance(embedding, Tensor):
        return embedding[tokens]
    scale = embedding.scale if embedding.scale.ndim == 0 else embedding.scale[tokens]
    return embedding.q[tokens].float() / scale


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Eq. (16). The float32 square root of PyTorch on a CPU is not correctly rounded; through float64 it is."""
    mean = tree_sum(x * x) / torch.full((), float(x.shape[-1]), device=x.device)
    root = (mean + float(np.float32(eps))).double().sqrt().float()
    return x / root[..., None] * weight


def conv1d(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. (17). (B, T, e), (B, e, k-1) -> the same; the state ends at each sequence's own length."""
    length, taps = x.shape[1], weight.shape[1]
    padded = torch.cat([conv_state.transpose(1, 2), x], 1)
    y = padded[:, :length] * weight[:, 0]
    for tap in range(1, taps):
        y = y + padded[:, tap : tap + length] * weight[:, tap]
    if bias is not None:
        y = y + bias
    last = lengths[:, None] + torch.arange(taps - 1, device=x.device)
    state = padded.gather(1, last[:, :, None].expand(-1, -1, x.shape[2]))
    return y, state.transpose(1, 2).contiguous()


def discretize(delta: Tensor, A: Tensor, B: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. (20)."""
    return exp(delta[..., None] * A), (delta * u)[..., None] * B[..., None, :]


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Eq. (20, 21, 22). (B, T, e), h (B, e, n); past a sequence's length its state stays."""
    parts = []
    for start in range(0, u.shape[1], SCAN_CHUNK):
        now = slice(start, start + SCAN_CHUNK)
        A_bar, B_bar_u = discretize(delta[:, now], A, B[:, now], u[:, now])
        states = []
        for t in range(A_bar.shape[1]):
            following = A_bar[:, t] * h + B_bar_u[:, t]
            h = torch.where((start + t < lengths)[:, None, None], following, h)
            states.append(h)
        parts.append(tree_sum(C[:, now, None] * torch.stack(states, 1)))
    return torch.cat(parts, 1) + D * u, h


def log_softmax(logits: Tensor) -> Tensor:
    """Eq. (25)."""
    shifted = logits - logits.amax(-1, keepdim=True)
    return shifted - log(tree_sum(exp(shifted)))[..., None]
