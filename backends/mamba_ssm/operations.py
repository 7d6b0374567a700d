"""The block's operations by the official kernels, for a right-padded batch (B, T, channels). Called with keywords alone: the
order of their arguments differs between versions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from refmamba.backends.mamba_ssm.kernels import Kernels

TAPS, CHANNELS = (2, 3, 4), 8  # that causal_conv1d takes: these numbers of taps, and multiples of 8 channels
CHUNK = 64  # tokens of an earlier state's share at a time, to bound memory


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Eq. (16) in float32, rounded to a dtype."""
    return F.rms_norm(x, weight.shape, weight, eps).to(dtype)


def conv1d(
    kernels: Kernels, x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, lengths: Tensor, silu: bool
) -> tuple[Tensor, Tensor]:
    """Eq. (17), and silu where it is asked for. x (B, T, e), state (B, e, k-1) -> the same, the state after each length.

    Other numbers of taps and channels than the kernel takes, which no published model has, are computed by PyTorch.
    """
    length, taps, activation = x.shape[1], weight.shape[1], "silu" if silu else None
    if taps not in TAPS or weight.shape[0] % CHANNELS:
        padded = torch.cat([state.transpose(1, 2), x], 1).float()
        y = padded[:, :length] * weight[:, 0].float()
        for tap in range(1, taps):
            y = y + padded[:, tap : tap + length] * weight[:, tap].float()
        y = y if bias is None else y + bias.float()
        y = (F.silu(y) if silu else y).to(x.dtype)
    elif length == 1:
        window = F.pad(state, (1, 0))  # a copy, into which the kernel writes; k columns, as older versions have it
        y = kernels.conv_step(x=x[:, 0], conv_state=window, weight=weight, bias=bias, activation=activation)
        return y[:, None], window[..., 1:]
    else:
        rows = state.transpose(1, 2).contiguous().transpose(1, 2)  # the channels next to each other, as in x
        y = kernels.conv(x=x.transpose(1, 2), weight=weight, bias=bias, initial_states=rows, activation=activation)
        y = y.transpose(1, 2)
    at = lengths[:, None] + torch.arange(1 - taps, 0, device=x.device)  # (B, k-1), the last inputs
    now = x.gather(1, at.clamp(min=0)[..., None].expand(-1, -1, x.shape[2])).transpose(1, 2)
    earlier = state.gather(2, (at + taps - 1).clamp(max=taps - 2)[:, None].expand(-1, x.shape[2], -1))
    return y, torch.where((at >= 0)[:, None], now, earlier)


def selective_scan(
    kernels: Kernels, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h: Tensor | None, *,
    z: Tensor | None = None, bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Eq. (20, 21, 22): u, dt (B, T, e), B, C (B, T, n), h (B, e, n) float32 (None: zeros) -> y (B, T, e), h.

    z (B, T, e): gate the result, eq. (23). bias (e,): dt is before softplus, eq. (18), and needs it; None: it is delta.
    """
    softplus = bias is not None
    if u.shape[1] == 1:
        h = A.new_zeros(len(u), *A.shape) if h is None else h.clone()  # into which the kernel writes
        none = torch.zeros_like(D)  # its own code for no bias is broken
        y = kernels.scan_step(
            state=h, x=u[:, 0], dt=dt[:, 0], A=A, B=B[:, 0], C=C[:, 0], D=D, z=None if z is None else z[:, 0],
            dt_bias=bias if softplus else none, dt_softplus=softplus,
        )  # fmt: skip
        return y[:, None], h
    y, last = kernels.scan(
        u=u.transpose(1, 2), delta=dt.transpose(1, 2), A=A, B=B.transpose(1, 2), C=C.transpose(1, 2), D=D,
        z=None if z is None else z.transpose(1, 2), delta_bias=bias, delta_softplus=softplus, return_last_state=True,
    )  # fmt: skip
    y = y.transpose(1, 2)
    if h is None:
        return y, last
    delta = dt.float() if bias is None else F.softplus(dt.float() + bias)
    time = delta.cumsum(1)[..., None]  # the kernel begins with zeros: what h adds at t is C exp(A time) h
    parts = []
    for start in range(0, u.shape[1], CHUNK):
        now = slice(start, start + CHUNK)
        kept = torch.exp(time[:, now] * A) * h[:, None]
        parts.append((kept * C[:, now, None].float()).sum(-1))
    share = torch.cat(parts, 1)
    return (y + (share if z is None else share * F.silu(z.float()))).to(y.dtype), last + torch.exp(time[:, -1] * A) * h


def log_softmax(logits: Tensor) -> Tensor:
    """Eq. (25), float32 (..., vocabulary)."""
    return torch.log_softmax(logits, -1)


def on_one_sequence(kernels: Kernels, dtype: torch.dtype) -> dict[str, Callable[..., Any]]:
    """These operations with the specification's names and signatures, on float32 tensors; the kernels run in a dtype."""

    def one_conv1d(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        lengths, vector = torch.tensor([len(x)], device=x.device), None if bias is None else bias.to(dtype)
        y, after = conv1d(kernels, x[None].to(dtype), state[None].to(dtype), weight.to(dtype), vector, lengths, False)
        return y[0].float(), after[0].float()

    def one_scan(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h: Tensor
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        u, delta, B, C = (x[None].to(dtype) for x in (u, delta, B, C))
        y, after = selective_scan(kernels, u, delta, A, B, C, D, h[None])
        return y[0].float(), after[0]

    return {
        "rms_norm": lambda x, weight, eps: rms_norm(x, weight, eps, dtype).float(),
        "conv1d": one_conv1d,
        "selective_scan": one_scan,
        "log_softmax": log_softmax,
    }
