"""The mamba-ssm backends, one for each dtype."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from refmamba.backend import check_support, told
from refmamba.backends.adapter import on_arrays
from refmamba.backends.mamba_ssm.kernels import Kernels, load_kernels
from refmamba.backends.mamba_ssm.model import KNOWN, Mamba
from refmamba.backends.mamba_ssm.operations import conv1d, on_one_sequence, selective_scan
from refmamba.errors import BackendError
from refmamba.spec.parameters import QuantizedModel
from refmamba.spec.scheme import Scheme


def device_of(name: str) -> torch.device:
    """The device of a name. Raises BackendError for a CUDA device where there is none, or for a name that is none's."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise BackendError(f"PyTorch {torch.__version__} finds no CUDA device, which the kernels of mamba_ssm need: install a "
                           "driver and a PyTorch for CUDA, or use --backend cpu")  # fmt: skip
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except RuntimeError as error:
        raise BackendError(f"the mamba-ssm backend cannot use the device '{name}': {str(error).splitlines()[0]}") from error
    return device


def try_kernels(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    """Call each kernel once. Raises BackendError where it does not run: on this device, or in this version."""
    e, n, taps = 8, 16, 4
    vector, matrix = torch.ones(e, device=device), torch.ones(e, n, device=device)
    try:
        for length in (1, 2):
            x, BC = (torch.ones(1, length, size, device=device, dtype=dtype) for size in (e, n))
            state, weight = (torch.ones(*shape, device=device, dtype=dtype) for shape in ((1, e, taps - 1), (e, taps)))
            lengths = torch.tensor([length], device=device)
            u, _ = conv1d(kernels, x, state, weight, None, lengths, True)
            y, _ = selective_scan(kernels, u, x, -matrix, BC, BC, vector, None, z=x, bias=vector)
            y.cpu()
    except Exception as error:  # of whatever kind a compiled package raises
        raise BackendError(f"the kernels of {kernels.packages} do not run on '{device}': {told(error)}") from error


class MambaSsm:
    """The kernels of mamba_ssm and causal_conv1d in bfloat16. device: "cuda" (None), "cuda:1".

    Raises BackendError where there is no such device, or a piece of the packages is missing.
    """

    name, dtype, exact = "mamba-ssm", "bfloat16", False
    sites: frozenset[str] | None = frozenset({
        "embedding", "residual_in", "in_proj.out", "conv_state", "u", "x_proj.out", "ssm_state", "gate", "residual_out",
        "lm_head.out",
    })  # fmt: skip

    def __init__(self, device: str | None = None) -> None:
        self._device, self._dtype = device_of(device or "cuda"), getattr(torch, self.dtype)
        self._kernels = load_kernels()
        try_kernels(self._kernels, self._device, self._dtype)
        self.device, self.kernels = str(self._device), self._kernels.packages

    def supports(self, scheme: Scheme) -> str | None:
        """See `refmamba.backend.Backend`. Schemes of weights alone: they are read back, and rounded to the dtype."""
        return scheme.unknown_to(KNOWN)

    def load(self, model: QuantizedModel) -> Mamba:
        """Make a model ready to run. Raises BackendError for a scheme that it does not support."""
        check_support(self, model.scheme)
        return Mamba(model, self._kernels, self._device, self._dtype)

    def operations(self) -> Mapping[str, Callable[..., Any]]:
        """Those that run by themselves: the others are fused, or PyTorch's products."""
        return on_arrays(on_one_sequence(self._kernels, self._dtype), self._device)


class MambaSsmFloat16(MambaSsm):
    """The same in float16."""

    name, dtype = "mamba-ssm-float16", "float16"


class MambaSsmFloat32(MambaSsm):
    """The same in float32."""

    name, dtype = "mamba-ssm-float32", "float32"
