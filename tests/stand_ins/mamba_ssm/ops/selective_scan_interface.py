"""The selective scan over many tokens."""

from typing import Any

import torch
from torch import Tensor


def selective_scan_fn(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False,
) -> Any:  # fmt: skip
    """u, delta, z (batch, dim, L), A (dim, n) float32, B, C (batch, n, L), D, delta_bias (dim,) float32 -> out (batch, dim, L)
    of u's type, and with return_last_state also (batch, dim, n) float32. The first state is zero."""
    batch, dim, length = u.shape
    n = A.shape[1]
    assert u.dtype in (torch.float32, torch.float16, torch.bfloat16)
    assert all(x.dtype == u.dtype for x in (delta, B, C, *(() if z is None else (z,))))
    assert all(x.dtype == torch.float32 for x in (A, D, delta_bias) if x is not None)
    assert n <= 256
    assert A.shape == (dim, n)
    assert delta.shape == u.shape
    assert B.shape == C.shape == (batch, n, length)
    assert z is None or z.shape == u.shape
    assert all(x is None or x.shape == (dim,) for x in (D, delta_bias))
    step = delta.float() if delta_bias is None else delta.float() + delta_bias[:, None]
    if delta_softplus:
        step = torch.where(step <= 20, torch.log1p(torch.exp(step)), step)
    state, columns = torch.zeros(batch, dim, n, device=u.device), []
    for t in range(length):
        now, x = step[:, :, t, None], u[:, :, t, None].float()
        state = torch.exp(now * A) * state + now * x * B[:, None, :, t].float()
        columns.append((state * C[:, None, :, t].float()).sum(-1))
    out = torch.stack(columns, -1)
    out = out if D is None else out + D[:, None] * u.float()
    if z is not None:
        out = out * z.float() * torch.sigmoid(z.float())
    out = out.to(u.dtype)
    return (out, state) if return_last_state else out
