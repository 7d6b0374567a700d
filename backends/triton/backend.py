"""The triton backend."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from refmamba.backend import check_support
from refmamba.backends.adapter import on_arrays
from refmamba.backends.triton.model import KNOWN, Mamba
from refmamba.backends.triton.operations import OPERATIONS
from refmamba.backends.triton.table import INTERPRETED
from refmamba.errors import BackendError
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
