"""The specification as a backend: it runs the same conformance suite as the others."""

from collections.abc import Callable, Mapping
from typing import Any

from refmamba.errors import BackendError
from refmamba.spec.mamba1 import Mamba
from refmamba.spec.operations import OPERATIONS
from refmamba.spec.parameters import QuantizedModel
from refmamba.spec.scheme import Scheme


class Reference:
    """NumPy and a numba-jitted scan, one operation at a time."""

    name, device, exact = "reference", "cpu", True
    sites: frozenset[str] | None = None

    def __init__(self, device: str | None = None) -> None:
        if device not in (None, "cpu"):
            raise BackendError(f"the reference backend runs on 'cpu', not on '{device}'")

    def supports(self, scheme: Scheme) -> str | None:
        """Every scheme: the coders' classes are the specification."""
        return None

    def load(self, model: QuantizedModel) -> Mamba:
        """Make a model ready to run."""
        return Mamba(model)

    def operations(self) -> Mapping[str, Callable[..., Any]]:
        """The specification's functions by name."""
        return OPERATIONS
