"""The triton backend."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from refmamba.backend import check_support
from refmamba.backends.adapter import on_arrays
from refmamba.backends.triton import operations
from refmamba.backends.triton.model import Mamba
from refmamba.backends.triton.operations import OPERATIONS
from refmamba.backends.triton.parameters import KNOWN
from refmamba.backends.triton.table import INTERPRETED
from refmamba.errors import BackendError
from refmamba.spec import codes
from refmamba.spec.parameters import QuantizedModel
from refmamba.spec.scheme import Scheme


def device_of(name: str | None) -> torch.device:
    """ "cuda" (None) or "cuda:1"; "cpu", and that by itself, where Triton interprets its kernels. Raises BackendError."""
    if INTERPRETED:
        if name not in (None, "cpu"):
            raise BackendError(f"TRITON_INTERPRET is set, so the triton backend runs on 'cpu', not on '{name}'")
        return torch.device("cpu")
    if name == "cpu":
        raise BackendError("the triton backend needs a CUDA device, or TRITON_INTERPRET=1 to interpret its kernels; on a CPU "
                           "use --backend cpu")  # fmt: skip
    if not torch.cuda.is_available():
        raise BackendError(f"PyTorch {torch.__version__} finds no CUDA device: install a driver and a PyTorch for CUDA, or use "
                           "--backend torch")  # fmt: skip
    try:
        device = torch.device(name or "cuda")
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        raise BackendError(f"the triton backend cannot use the device '{name}': {str(error).splitlines()[0]}") from error
    if device.type != "cuda":
        raise BackendError(f"the triton backend runs on 'cuda', not on '{name}'")
    return device


@functools.cache
def check_device(device: torch.device) -> None:
    """Raise BackendError where a device flushes subnormals, or joins the largest digits to another integer; once for each.

    No text of a kernel shows that. The codes reach their limits with every pair of signs, and the sums need 53 bits.
    """
    small = torch.tensor([1 << 19, 3], dtype=torch.int32, device=device).view(torch.float32)  # 2^-130, 3 * 2^-149
    half = operations.elementwise("multiply", small, torch.full((2,), 0.5, device=device)).view(torch.int32).tolist()
    if half != [1 << 18, 2]:
        raise BackendError(f"the device '{device}' flushes subnormal numbers to zero; use --backend cpu")
    signs = np.where(np.random.default_rng(0).random((2, 16, 64)) < 0.5, -1, 1).astype(np.int32)
    exponent = np.zeros(16, np.int32)
    wide = codes.FixedPoint(2**codes.ACTIVATION_BITS * signs[0], exponent)
    weight = codes.FixedPoint((2**codes.WEIGHT_BITS - 1) * signs[1], exponent)
    product = on_arrays(OPERATIONS, device)["integer_product"](wide, weight)
    if not np.array_equal(product, codes.integer_product(wide, weight)):
        raise BackendError(f"the device '{device}' makes other products of int8 or sums; use --backend cpu")


class Triton:
    """Triton kernels. device: "cuda" (None), "cuda:1"; "cpu" in Triton's interpreter. Raises BackendError for another one."""

    name, exact = "triton", True
    sites: frozenset[str] | None = frozenset({
        "embedding", "residual_in", "in_proj.out", "conv_state", "u", "x_proj.out", "ssm_state", "gate", "residual_out",
        "lm_head.out",
    })  # fmt: skip

    def __init__(self, device: str | None = None) -> None:
        self._device = device_of(device)
        self.device = str(self._device)
        check_device(self._device)

    def supports(self, scheme: Scheme) -> str | None:
        """See `refmamba.backend.Backend`."""
        return scheme.unknown_to(KNOWN)

    def load(self, model: QuantizedModel) -> Mamba:
        """Make a model ready to run. Raises BackendError for a scheme that it does not support."""
        check_support(self, model.scheme)
        return Mamba(model, self._device)

    def operations(self) -> Mapping[str, Callable[..., Any]]:
        """Each operation that runs on the device. Not sample, pack4 and unpack4, which run on the host."""
        return on_arrays(OPERATIONS, self._device)
