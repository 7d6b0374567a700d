"""The selective scan for one token."""

import torch
from torch import Tensor


def selective_state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False,
) -> Tensor:  # fmt: skip
    """state (batch, dim, n), which it writes into; x, dt, z (batch, dim), A (dim, n), B, C (batch, n), D, dt_bias (dim,) -> out
    (batch, dim) of x's type. Without D or dt_bias the package's own code fails, so here too."""
    batch, dim, n = state.shape
    assert D is not None
    assert dt_bias is not None
    assert x.shape == dt.shape == (batch, dim)
    assert A.shape == (dim, n)
    assert B.shape == C.shape == (batch, n)
    assert D.shape == dt_bias.shape == (dim,)
    assert z is None or z.shape == x.shape
    step = dt.float() + dt_bias.float()
    if dt_softplus:
        step = torch.where(step <= 20, torch.log1p(torch.exp(step)), step)
    kept = state.float() * torch.exp(A.float() * step[:, :, None])
    after = kept + step[:, :, None] * B[:, None].float() * x[:, :, None].float()
    state.copy_(after)
    out = (after * C[:, None].float()).sum(-1) + x.float() * D.float()
    if z is not None:
        out = out * z.float() * torch.sigmoid(z.float())
    return out.to(x.dtype)
