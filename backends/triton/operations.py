"""The specification's functions, one by one, as Triton kernels on tensors; the adapter calls them with arrays."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from refmamba.backends.adapter import Codes, FixedPoint
from refmamba.backends.triton.kernels import alone, layers
from refmamba.backends.triton.launch import launch, log_softmax
from refmamba.backends.triton.table import power_of_two, product_blocks, row_blocks, scan_blocks
from refmamba.errors import NonFiniteError
from refmamba.spec.codes import WEIGHT_BITS
from refmamba.spec.transforms import hadamard_block

BLOCK = 1024
INFINITY_BITS = 0x7F800000


def elementwise(
    op: str, x: Tensor, z: Tensor | None = None, largest: float = 0.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """One of elementwise_kernel's operations; z broadcasts to x."""
    x = x.contiguous()
    y = torch.empty_like(x, dtype=dtype)
    if x.numel():
        launch(alone.elementwise_kernel, (triton.cdiv(x.numel(), BLOCK),), 4, x_ptr=x,
               z_ptr=None if z is None else z.expand(x.shape).contiguous(), y_ptr=y, n=x.numel(), largest=largest, OP=op,
               BLOCK=BLOCK)  # fmt: skip
    return y


def unary(op: str) -> Callable[[Tensor], Tensor]:
    """An operation of one float32 tensor."""
    return lambda x: elementwise(op, x)


def rows_of(x: Tensor) -> Tensor:
    """x (..., K) as (rows, K)."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def tree_sum(x: Tensor) -> Tensor:
    """Eq. (6)."""
    rows = rows_of(x)
    n, k = rows.shape
    y, blocks = torch.empty(n, device=x.device), row_blocks(n, k)
    launch(alone.tree_sum_kernel, (triton.cdiv(n, blocks.rows),), blocks.warps, x_ptr=rows, y_ptr=y, rows=n, K=k, M=blocks.rows,
           WIDTH=blocks.columns)  # fmt: skip
    return y.reshape(x.shape[:-1])


def largest_bits(x: Tensor, site: str, granularity: str) -> Tensor:
    """The bits of eq. (7)'s maxima, (rows, 1) or (). Raises NonFiniteError."""
    rows = rows_of(x) if granularity == "per_row" else x.reshape(1, -1).contiguous()
    n, k = rows.shape
    peak, blocks = torch.zeros(n, dtype=torch.int32, device=x.device), row_blocks(n, k)
    each = torch.arange(n, dtype=torch.int32, device=x.device)
    launch(layers.peak_kernel, (triton.cdiv(n, blocks.rows),), blocks.warps, x_ptr=rows, x_stride=k, weight_ptr=None,
           bias_ptr=None, eps=0.0, state_ptr=None, state_stride=0, sequence_ptr=each, position_ptr=each, power_ptr=None,
           threshold=0.0, peak_ptr=peak, rows=n, K=k, SOURCE="plain", TAPS=1, WIDTH=1, PART="all", M=blocks.rows,
           BK=blocks.depth)  # fmt: skip
    if bool((peak >= INFINITY_BITS).any()):
        raise NonFiniteError(f"{site}: a value is NaN or infinite, so it has no codes; check the weights and the input")
    return peak.reshape(-1, 1) if granularity == "per_row" else peak.reshape(())


def absmax(x: Tensor, site: str, granularity: str = "per_tensor") -> Tensor:
    """Eq. (7)."""
    m = largest_bits(x, site, granularity).view(torch.float32)
    return torch.where(m < 2.0**-100, torch.zeros_like(m), m)


def largest_code(bits: int) -> float:
    """2^(bits - 1) - 1."""
    return float(2 ** (bits - 1) - 1)


def quantize(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Eq. (8)."""
    q = elementwise("quantize", x, scale, largest_code(bits), torch.int32)
    return q.to(torch.int8 if bits <= 8 else torch.int16)


def scale_of(m: Tensor, bits: int) -> Tensor:
    """Eq. (7)."""
    return elementwise("scale_of", m, largest=largest_code(bits))


def code(x: Tensor, bits: int, site: str, granularity: str = "per_tensor") -> Codes:
    """Eq. (7, 8)."""
    scale = scale_of(absmax(x, site, granularity), bits)
    return Codes(quantize(x, scale, bits), scale, bits)


def code_static(x: Tensor, static_absmax: Tensor, bits: int, site: str) -> Codes:
    """Eq. (7, 8) with a calibrated absolute maximum."""
    absmax(x, site)
    scale = scale_of(static_absmax, bits)
    return Codes(quantize(x, factor_of(static_absmax, scale), bits), scale, bits)


def factor_of(static_absmax: Tensor, scale: Tensor) -> Tensor:
    """What codes are made with: 0 where a static absolute maximum counts as zero."""
    return torch.where(static_absmax < 2.0**-100, torch.zeros_like(scale), scale)


def code_flattened(x: Tensor, threshold: Tensor, bits: int, site: str) -> Codes:
    """Eq. (33)."""
    absmax(x, site)
    scale = scale_of(threshold, bits)
    return Codes(elementwise("quantize_wide", x, factor_of(threshold, scale), dtype=torch.int32), scale, bits)


def rotate(x: Tensor, site: str) -> Tensor:
    """Eq. (31)."""
    largest_bits(x, site, "per_row")
    (n, k), y = x.shape, torch.empty_like(x)
    blocks, each = row_blocks(n, k), torch.arange(n, dtype=torch.int32, device=x.device)
    launch(layers.rotate_kernel, (triton.cdiv(n, blocks.rows),), blocks.warps, x_ptr=x, x_stride=k, weight_ptr=None,
           bias_ptr=None, eps=0.0, state_ptr=None, new_state_ptr=None, state_stride=0, sequence_ptr=each, position_ptr=each,
           length_ptr=None, power_ptr=None, u_ptr=None, failure_ptr=torch.zeros_like(each), site=0, y_ptr=y, rows=n, K=k,
           SOURCE="plain", TAPS=1, WIDTH=1, M=blocks.rows, BLOCK=hadamard_block(k))  # fmt: skip
    return y


def fixed_point(x: Tensor, magnitude_bits: int, site: str) -> FixedPoint:
    """Eq. (10)."""
    m = absmax(x, site, "per_row")
    op = "weight_exponent" if magnitude_bits == WEIGHT_BITS else "activation_exponent"
    exponent = elementwise(op, m, dtype=torch.int32)
    return FixedPoint(elementwise("fixed_point", x, exponent, dtype=torch.int32), exponent)


def digits_of(codes: Codes | FixedPoint, places: int) -> Tensor:
    """The balanced digits of codes (n, K), the lowest first: int8 (n, places, K)."""
    if codes.q.dtype == torch.int8:
        return codes.q[:, None].contiguous()
    shifted = codes.q + sum(128 << (8 * place) for place in range(places - 1))
    low = [((shifted >> (8 * place)) & 255) - 128 for place in range(places - 1)]
    return torch.stack([*low, shifted >> (8 * (places - 1))], 1).to(torch.int8)


def integer_product(x: Codes | FixedPoint, w: Codes | FixedPoint) -> Tensor:
    """Eq. (11, 12)."""
    digits, planes = digits_of(x, 4), digits_of(w, 3).transpose(0, 1).contiguous()
    (n, places, k), rows = digits.shape, planes.shape[1]
    y, blocks = torch.empty(n, rows, dtype=torch.float64, device=digits.device), product_blocks(n, rows, k, places, len(planes))
    launch(alone.product_kernel, (triton.cdiv(n, blocks.rows), triton.cdiv(rows, blocks.columns)), blocks.warps, blocks.stages,
           q_ptr=digits, w_ptr=planes, y_ptr=y, rows=n, N=rows, K=k,
           CODER="fixed_point" if isinstance(x, FixedPoint) else "per_token", DIGITS=places, PLANES=len(planes), M=blocks.rows,
           BN=blocks.columns, BK=min(blocks.depth, max(power_of_two(k), 32)))  # fmt: skip
    return y


def of_rows(codes: Codes | FixedPoint, n: int) -> Tensor:
    """The scale, or the exponent, of each of n rows."""
    values = codes.exponent if isinstance(codes, FixedPoint) else codes.scale
    return values.reshape(-1).expand(n).contiguous()


def rescale(acc: Tensor, x: Codes | FixedPoint, w: Codes | FixedPoint) -> Tensor:
    """Eq. (13)."""
    n, rows = acc.shape
    y = torch.empty(n, rows, device=acc.device)
    launch(alone.rescale_kernel, (triton.cdiv(n, 16), triton.cdiv(rows, 64)), 4, acc_ptr=acc, x_ptr=of_rows(x, n),
           w_ptr=of_rows(w, rows), y_ptr=y, rows=n, N=rows, X_FIXED=isinstance(x, FixedPoint),
           W_FIXED=isinstance(w, FixedPoint), M=16, BN=64)  # fmt: skip
    return y


def embed(tokens: Tensor, table: Tensor | Codes) -> Tensor:
    """Eq. (15)."""
    scale = of_rows(table, len(table.q)) if isinstance(table, Codes) else None
    values = table.q if isinstance(table, Codes) else table
    y = torch.empty(len(tokens), values.shape[1], device=values.device)
    launch(layers.embed_kernel, (len(tokens),), 4, token_ptr=tokens.int(), table_ptr=values, steps_ptr=None, scale_ptr=scale,
           y_ptr=y, K=values.shape[1], PACKED=False, GROUP=0, BK=BLOCK)  # fmt: skip
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Eq. (16)."""
    (n, k), y = x.shape, torch.empty_like(x)
    blocks = row_blocks(n, k)
    launch(alone.rms_norm_kernel, (triton.cdiv(n, blocks.rows),), blocks.warps, x_ptr=x, weight_ptr=weight,
           eps=float(np.float32(eps)), y_ptr=y, rows=n, K=k, M=blocks.rows, WIDTH=blocks.columns)  # fmt: skip
    return y


def conv1d(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Eq. (17)."""
    (n, k), y, new_state = x.shape, torch.empty_like(x), torch.empty_like(conv_state)
    launch(alone.conv1d_kernel, (triton.cdiv(n, 16), triton.cdiv(k, 64)), 4, x_ptr=x, weight_ptr=weight.T.contiguous(),
           bias_ptr=bias, state_ptr=conv_state, new_state_ptr=new_state, y_ptr=y, rows=n, K=k, TAPS=weight.shape[1], M=16,
           BK=64)  # fmt: skip
    return y, new_state


def discretize(delta: Tensor, A: Tensor, B: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. (20)."""
    shape = (*delta.shape, A.shape[1])
    exponent = elementwise("multiply", delta[..., None].expand(shape), A)
    du = elementwise("multiply", delta, u)
    return elementwise("exp", exponent), elementwise("multiply", du[..., None].expand(shape), B[:, None])


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, ssm_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Eq. (20, 21, 22)."""
    (length, e), n = u.shape, A.shape[1]
    y, new, blocks = torch.empty_like(u), torch.empty_like(ssm_state), scan_blocks(1, e, n)
    bounds = torch.tensor([[0], [length]], dtype=torch.int32, device=u.device)
    decays = bool((torch.isfinite(A) & (A <= 0)).all()) and bool((torch.isfinite(delta) & (delta >= 0)).all())
    launch(layers.scan_kernel, (triton.cdiv(e, blocks.channels), 1), 1, u_ptr=u, delta_ptr=delta, B_ptr=B, C_ptr=C,
           z_ptr=None, A_ptr=A, D_ptr=D, h_ptr=ssm_state, new_h_ptr=new, h_stride=0, start_ptr=bounds[0],
           length_ptr=bounds[1], y_ptr=y, E=e, BC_STRIDE=n, Z_STRIDE=0, DECAYS=decays, STATES=n, N=power_of_two(n),
           TILE=blocks.tile, LANES=blocks.lanes, BE=blocks.channels)  # fmt: skip
    return y, new


UNARY = ("exp", "log", "log1p", "softplus", "silu", "state_matrix")
OPERATIONS: dict[str, Callable[..., Any]] = {name: unary(name) for name in UNARY} | {
    f.__name__: f
    for f in (
        tree_sum, absmax, scale_of, quantize, code, code_static, code_flattened, rotate, fixed_point, integer_product,
        rescale, embed, rms_norm, conv1d, discretize, selective_scan,
    )
} | {
    "step_size": lambda dt, bias: elementwise("step_size", dt, bias),
    "gate": lambda y, z: elementwise("gate", y, z),
    "log_softmax": lambda logits: log_softmax(logits, launch),
}  # fmt: skip
