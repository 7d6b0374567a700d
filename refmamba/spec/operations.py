"""Every operation of the specification by name, in reading order: the vectors are of these, and a backend may offer any."""

from collections.abc import Callable
from typing import Any

from refmamba.spec import arith, ops, transforms
from refmamba.spec import codes as quantize

OPERATIONS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        arith.exp, arith.log, arith.log1p, arith.softplus, arith.silu, arith.tree_sum,
        quantize.absmax, quantize.scale_of, quantize.quantize, quantize.code, quantize.code_static,
        quantize.code_grouped, quantize.code_flattened, quantize.fixed_point, transforms.rotate, quantize.integer_product,
        quantize.rescale, quantize.pack4, quantize.unpack4,
        ops.embed, ops.rms_norm, ops.conv1d, ops.step_size, ops.state_matrix, ops.discretize, ops.selective_scan,
        ops.gate, ops.log_softmax, ops.sample,
    )
}  # fmt: skip
