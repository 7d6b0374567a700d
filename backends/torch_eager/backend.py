"""The torch backend."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refmamba.backend import check_support
from refmamba.backends.torch_eager.arithmetic import (
    Codes,
    FixedPoint,
    absmax,
    code,
    code_flattened,
    code_static,
    conv1d,
    discretize,
    embed,
    exp,
    fixed_point,
    int8_product_is_exact,
    integer_product,
    log,
    log1p,
    log_softmax,
    rescale,
    rms_norm,
    rotate,
    scale_of,
    selective_scan,
    silu,
    softplus,
    tensor,
    to_codes,
    tree_sum,
)
from refmamba.backends.torch_eager.model import KNOWN, Mamba
from refmamba.errors import BackendError
from refmamba.spec import codes as spec
from refmamba.spec.arith import F32Array, IntArray
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
        return Operations(self._device).by_name()


class Operations:
    """The functions above with the specification's signatures."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def by_name(self) -> dict[str, Callable[..., Any]]:
        """Each operation under its name."""
        plain = {f.__name__: self._plain(f) for f in (exp, log, log1p, softplus, silu, tree_sum, rms_norm, log_softmax)}
        own = (self.absmax, self.quantize, self.code, self.code_static, self.code_flattened, self.rotate, self.fixed_point,
               self.integer_product, self.rescale, self.embed, self.conv1d, self.discretize, self.selective_scan)  # fmt: skip
        return (
            plain
            | {f.__name__: f for f in own}
            | {
                "scale_of": self._plain(scale_of),
                "step_size": self._plain(lambda dt, bias: softplus(dt + bias)),
                "state_matrix": self._plain(lambda A_log: -exp(A_log)),
                "gate": self._plain(lambda y, z: y * silu(z)),
            }
        )

    def _in(self, x: Any) -> Tensor:
        return tensor(x, self.device)

    def _codes(self, x: spec.Codes | spec.FixedPoint) -> Codes | FixedPoint:
        if isinstance(x, spec.Codes):
            return Codes(self._in(x.integers()), self._in(x.scale))
        return FixedPoint(self._in(x.q), self._in(x.exponent)[:, None])

    def _plain(self, f: Callable[..., Tensor]) -> Callable[..., Any]:
        def on_arrays(*values: Any) -> Any:
            return f(*(self._in(v) if isinstance(v, np.ndarray | np.generic) else v for v in values)).cpu().numpy()

        return on_arrays

    def absmax(self, x: F32Array, site: str, granularity: str = "per_tensor") -> Any:
        """codes.absmax."""
        if granularity == "per_row":
            return absmax(self._in(x), site, (-1,)).cpu().numpy()
        return absmax(self._in(x), site, tuple(range(x.ndim))).reshape(()).cpu().numpy()

    def quantize(self, x: F32Array, scale: F32Array, bits: int) -> Any:
        """codes.quantize."""
        return to_codes(self._in(x), self._in(scale), bits).cpu().numpy()

    def code(self, x: F32Array, bits: int, site: str, granularity: str = "per_tensor") -> spec.Codes:
        """codes.code."""
        per_row = granularity == "per_row"
        codes = code(self._in(x), bits, site, (-1,) if per_row else tuple(range(x.ndim)))
        scale = codes.scale if per_row else codes.scale.reshape(())
        return spec.Codes(codes.q.cpu().numpy(), scale.cpu().numpy(), bits)

    def code_static(self, x: F32Array, static_absmax: F32Array, bits: int, site: str) -> spec.Codes:
        """codes.code_static."""
        codes = code_static(self._in(x), self._in(static_absmax), bits, site)
        return spec.Codes(codes.q.cpu().numpy(), codes.scale.cpu().numpy(), bits)

    def code_flattened(self, x: F32Array, threshold: F32Array, bits: int, site: str) -> spec.Codes:
        """codes.code_flattened."""
        codes = code_flattened(self._in(x), self._in(threshold), bits, site)
        return spec.Codes(codes.q.cpu().numpy(), codes.scale.cpu().numpy(), bits)

    def rotate(self, x: F32Array, site: str) -> Any:
        """transforms.rotate."""
        return rotate(self._in(x), site).cpu().numpy()

    def fixed_point(self, x: F32Array, magnitude_bits: int, site: str) -> spec.FixedPoint:
        """codes.fixed_point."""
        codes = fixed_point(self._in(x), magnitude_bits, site)
        return spec.FixedPoint(codes.q.cpu().numpy(), codes.exponent[:, 0].cpu().numpy())

    def integer_product(self, x: spec.Codes, w: spec.Codes) -> Any:
        """codes.integer_product."""
        int8 = int8_product_is_exact(x.q.shape[1], self.device)
        return integer_product(self._codes(x), self._codes(w), int8).cpu().numpy()

    def rescale(self, acc: Any, x: spec.Codes, w: spec.Codes) -> Any:
        """codes.rescale."""
        return rescale(self._in(acc), self._codes(x), self._codes(w)).cpu().numpy()

    def embed(self, tokens: IntArray, embedding: F32Array | spec.Codes) -> Any:
        """ops.embed."""
        table = self._codes(embedding) if isinstance(embedding, spec.Codes) else self._in(embedding)
        assert not isinstance(table, FixedPoint)
        return embed(self._in(tokens), table).cpu().numpy()

    def conv1d(self, x: F32Array, conv_state: F32Array, weight: F32Array, bias: F32Array | None) -> Any:
        """ops.conv1d."""
        lengths = torch.tensor([len(x)], device=self.device)
        b = None if bias is None else self._in(bias)
        y, state = conv1d(self._in(x)[None], self._in(conv_state)[None], self._in(weight), b, lengths)
        return y[0].cpu().numpy(), state[0].cpu().numpy()

    def discretize(self, delta: F32Array, A: F32Array, B: F32Array, u: F32Array) -> Any:
        """ops.discretize."""
        A_bar, B_bar_u = discretize(self._in(delta), self._in(A), self._in(B), self._in(u))
        return A_bar.cpu().numpy(), B_bar_u.cpu().numpy()

    def selective_scan(
        self, u: F32Array, delta: F32Array, A: F32Array, B: F32Array, C: F32Array, D: F32Array, ssm_state: F32Array
    ) -> Any:
        """ops.selective_scan."""
        b_u, b_delta, b_B, b_C, h = (self._in(v)[None] for v in (u, delta, B, C, ssm_state))
        lengths = torch.tensor([len(u)], device=self.device)
        y, h = selective_scan(b_u, b_delta, self._in(A), b_B, b_C, self._in(D), h, lengths)
        return y[0].cpu().numpy(), h[0].cpu().numpy()
