"""The torch backend."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from refmamba.backend import check_support
from refmamba.backends.adapter import on_arrays
from refmamba.backends.torch_eager.model import KNOWN, Mamba
from refmamba.backends.torch_eager.operations import OPERATIONS
from refmamba.errors import BackendError
from refmamba.spec.parameters import QuantizedModel
from refmamba.spec.scheme import Scheme


def check_subnormals(device: torch.device) -> None:
    """Raise BackendError where subnormals are flushed to zero: the decaying state needs them.

    As many as it takes to occupy every thread of the pool, whose settings are their own; as bits, since a processor that
    flushes also compares a subnormal as a zero.
    """
    small = torch.full((1 << 21,), 1 << 19, dtype=torch.int32, device=device)  # 2^-130, and half of it
    if not bool(((small.view(torch.float32) * 0.5).view(torch.int32) == 1 << 18).all()):
        raise BackendError("PyTorch flushes subnormal numbers to zero here; call torch.set_flush_denormal(False)")


class Torch:
    """PyTorch, eager. device: "cpu" (None), "cuda", "cuda:1". Raises BackendError for one that is not there."""

    name, exact = "torch", True
    sites: frozenset[str] | None = None

    def __init__(self, device: str | None = None) -> None:
        try:
            self._device = torch.device(device or "cpu")
            torch.zeros(1, device=self._device).cpu()
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise BackendError(f"the torch backend cannot use the device '{device}': {reason}") from error
        self.device = str(self._device)
        check_subnormals(self._device)

    def supports(self, scheme: Scheme) -> str | None:
        """See `refmamba.backend.Backend`."""
        return scheme.unknown_to(KNOWN)

    def load(self, model: QuantizedModel) -> Mamba:
        """Make a model ready to run. Raises BackendError for a scheme that it does not support."""
        check_support(self, model.scheme)
        return Mamba(model, self._device)

    def operations(self) -> Mapping[str, Callable[..., Any]]:
        """The operations that run on the device, on NumPy arrays and one sequence.

        Not sample, pack4, unpack4 and code_grouped: they choose a token, store codes or make weights, and run on the host.
        """
        return on_arrays(OPERATIONS, self._device)
