"""How a kernel is started."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refmamba.backends.triton.kernels import alone
from refmamba.backends.triton.table import power_of_two

Launch = Callable[..., None]


def launch(kernel: Any, grid: tuple[int, ...], warps: int, stages: int = 2, /, **arguments: Any) -> None:
    """Start a kernel. Without enable_fp_fusion=False Triton may fuse a multiplication and an addition: other bits."""
    with np.errstate(all="ignore"):  # the interpreter computes in NumPy
        kernel[grid](**arguments, num_warps=warps, num_stages=stages, enable_fp_fusion=False)


def log_softmax(logits: Tensor, launch: Launch) -> Tensor:
    """Eq. (25), (..., vocabulary)."""
    rows = logits.reshape(-1, logits.shape[-1]).contiguous()
    y, (n, k) = torch.empty_like(rows), rows.shape
    launch(alone.log_softmax_kernel, (n,), 16 if k > 8192 else 4, x_ptr=rows, y_ptr=y, N=k, WIDTH=power_of_two(k))
    return y.reshape(logits.shape)
