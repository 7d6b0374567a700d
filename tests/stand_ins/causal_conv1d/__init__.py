"""Stands in for causal_conv1d (tests/stand_ins/README.md)."""

import torch
from torch import Tensor


def check(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    """What both kernels ask for."""
    types = (torch.float32, torch.float16, torch.bfloat16)
    assert activation in (None, "silu", "swish")
    assert x.dtype in types
    assert weight.dtype in types
    assert state.dtype == x.dtype
    assert weight.shape[0] == x.shape[1]
    assert 2 <= weight.shape[1] <= 4
    assert bias is None or (bias.dtype == weight.dtype and bias.shape == (x.shape[1],))


def convolved(padded: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """(batch, dim, L + width - 1) -> (batch, dim, L) in float32."""
    width = weight.shape[1]
    length = padded.shape[2] - width + 1
    out = torch.zeros_like(padded[:, :, :length], dtype=torch.float32)
    if bias is not None:
        out = out + bias.float()[:, None]
    for tap in range(width):
        out = out + weight[:, tap, None].float() * padded[:, :, tap : tap + length].float()
    return out if activation is None else out * torch.sigmoid(out)


def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: None = None, initial_states: Tensor | None = None,
    return_final_states: bool = False, final_states_out: None = None, activation: str | None = None,
) -> Tensor:  # fmt: skip
    """x (batch, dim, L), weight (dim, width), bias (dim,), initial_states (batch, dim, width - 1) -> (batch, dim, L) of x's
    type.

    With initial states the channels must lie next to each other in x and in them, and be a multiple of 8.
    """
    assert initial_states is not None, "refmamba always gives them"
    assert not return_final_states, "refmamba takes them itself"
    check(x, initial_states, weight, bias, activation)
    assert x.stride(1) == 1
    assert x.stride(2) > 1
    assert all(size % 8 == 0 for size in (x.shape[1], x.stride(0), x.stride(2)))
    assert initial_states.shape == (len(x), x.shape[1], weight.shape[1] - 1)
    assert initial_states.stride(1) == 1
    out = torch.empty_like(x)
    out.copy_(convolved(torch.cat([initial_states, x], -1), weight, bias, activation))
    return out


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """x (batch, dim), conv_state (batch, dim, length), which it writes into -> (batch, dim) of x's type.

    length: at least width - 1; before causal_conv1d 1.4 width, which all versions take.
    """
    check(x, conv_state, weight, bias, activation)
    assert conv_state.shape == (*x.shape, weight.shape[1])
    conv_state.copy_(torch.cat([conv_state[..., 1:], x[..., None]], -1))
    return convolved(conv_state, weight, bias, activation)[..., 0].to(x.dtype)
