"""The specification as a backend: it runs the same conformance suite as the others."""

from collections.abc import Callable, Mapping
from typing import Any

from refmamba import arith, ops, quantize
from refmamba.errors import BackendError
from refmamba.model import Mamba, QuantizedModel

OPERATIONS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        arith.exp, arith.log, arith.log1p, arith.softplus, arith.silu, arith.tree_sum,
        quantize.absmax, quantize.scale_of, quantize.quantize, quantize.code, quantize.code_static,
        quantize.fixed_point, quantize.integer_product, quantize.rescale, quantize.pack4, quantize.unpack4,
        ops.embed, ops.rms_norm, ops.conv1d, ops.step_size, ops.state_matrix, ops.discretize, ops.selective_scan,
        ops.gate, ops.log_softmax, ops.sample,
    )
}  # fmt: skip


class Reference:
    """NumPy and a numba-jitted scan, one operation at a time."""

    name, device, exact = "reference", "cpu", True
    sites: frozenset[str] | None = None

    def __init__(self, device: str | None = None) -> None:
        if device not in (None, "cpu"):
            raise BackendError(f"the reference backend runs on 'cpu', not on '{device}'")

    def load(self, model: QuantizedModel) -> Mamba:
        """Make a model ready to run."""
        return Mamba(model)

    def operations(self) -> Mapping[str, Callable[..., Any]]:
        """The specification's functions by name."""
        return OPERATIONS
