"""The specification's functions in eager PyTorch, on tensors of one sequence; the adapter calls them with arrays."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from refmamba.backends.adapter import Codes, FixedPoint
from refmamba.backends.torch_eager import arithmetic
from refmamba.backends.torch_eager.arithmetic import Failures, exp, silu, softplus


def checked(function: Callable[..., Any], *arguments: Any) -> Any:
    """A function that makes codes, with a list of failures as its last argument. Raises NonFiniteError."""
    failures: Failures = []
    result = function(*arguments, failures)
    arithmetic.raise_first(failures)
    return result


def axes_of(x: Tensor, granularity: str) -> tuple[int, ...]:
    """The axes over which a scale is taken."""
    return (-1,) if granularity == "per_row" else tuple(range(x.ndim))


def absmax(x: Tensor, site: str, granularity: str = "per_tensor") -> Any:
    """codes.absmax."""
    m = checked(arithmetic.absmax, x, site, axes_of(x, granularity))
    return m if granularity == "per_row" else m.reshape(())


def code(x: Tensor, bits: int, site: str, granularity: str = "per_tensor") -> Codes:
    """codes.code."""
    codes = checked(arithmetic.code, x, bits, site, axes_of(x, granularity))
    return Codes(codes.q, codes.scale if granularity == "per_row" else codes.scale.reshape(()), bits)


def integer_product(x: Codes | FixedPoint, w: Codes | FixedPoint) -> Tensor:
    """codes.integer_product."""
    return arithmetic.integer_product(x, w, arithmetic.int8_product_is_exact(x.q.shape[1], x.q.device))


def conv1d(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """ops.conv1d."""
    y, state = arithmetic.conv1d(x[None], conv_state[None], weight, bias, torch.tensor([len(x)], device=x.device))
    return y[0], state[0]


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, ssm_state: Tensor
) -> tuple[Tensor, Tensor]:
    """ops.selective_scan."""
    lengths = torch.tensor([len(u)], device=u.device)
    y, h = arithmetic.selective_scan(u[None], delta[None], A, B[None], C[None], D, ssm_state[None], lengths)
    return y[0], h[0]


OPERATIONS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        exp, arithmetic.log, arithmetic.log1p, softplus, silu, arithmetic.tree_sum, absmax, arithmetic.scale_of, code,
        integer_product, arithmetic.rescale, arithmetic.embed, arithmetic.rms_norm, conv1d, arithmetic.discretize,
        selective_scan, arithmetic.log_softmax,
    )
} | {
    "quantize": arithmetic.to_codes,
    "code_static": lambda *arguments: checked(arithmetic.code_static, *arguments),
    "code_flattened": lambda *arguments: checked(arithmetic.code_flattened, *arguments),
    "fixed_point": lambda *arguments: checked(arithmetic.fixed_point, *arguments),
    "rotate": lambda *arguments: checked(arithmetic.rotate, *arguments),
    "step_size": lambda dt, bias: softplus(dt + bias),
    "state_matrix": lambda A_log: -exp(A_log),
    "gate": lambda y, z: y * silu(z),
}  # fmt: skip
