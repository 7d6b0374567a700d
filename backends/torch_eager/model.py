"""One model in eager PyTorch: a batch at a time, on a CPU or a CUDA device by the same code, with the same bits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, overload

import numpy as np
import torch
from torch import Tensor

from refmamba.backends.adapter import Codes, FixedPoint, State, TensorRunner, right_padded, tensor, unpadded
from refmamba.backends.torch_eager.arithmetic import (
    Failures,
    code,
    code_flattened,
    code_static,
    conv1d,
    dequantize,
    embed,
    exp,
    fixed_point,
    int8_product_is_exact,
    integer_product,
    log_softmax,
    raise_first,
    rescale,
    rms_norm,
    rotate,
    selective_scan,
    silu,
    softplus,
    two_to_f64,
)
from refmamba.spec import coders, linear, transforms
from refmamba.spec import codes as spec
from refmamba.spec.arith import F32Array, IntArray
from refmamba.spec.linear import numbered
from refmamba.spec.mamba1 import Positions
from refmamba.spec.parameters import QuantizedModel, linear_sites
from refmamba.spec.trace import Hook


@dataclass(frozen=True, eq=False)
class Batch:
    """What every operation needs to know of a right-padded batch."""

    lengths: Tensor  # (B,)
    real: Tensor | None  # (B, T, 1): not padding; None where there is none
    hook: Hook | None
    failures: Failures = field(default_factory=list)

    def see(self, site: str, value: Tensor) -> None:
        """Show the one sequence's value."""
        if self.hook:
            self.hook(site, value[0].cpu().numpy())

    def masked(self, x: Tensor) -> Tensor:
        """x (B, T, K) with zeros for padding, which takes no part in a scale and cannot overflow."""
        return x if self.real is None else torch.where(self.real, x, torch.zeros_like(x))


class Coder(Protocol):
    """Codes of a batch's activations (B, T, K): one factor for each part."""

    def __call__(self, x: Tensor, site: str, batch: Batch) -> Sequence[Codes | FixedPoint]:
        """A NaN or an infinity is kept in batch.failures."""


def coder_of(coder: coders.Coder, device: torch.device) -> Coder:
    """This backend's form of one of the specification's coders."""
    match coder:
        case coders.PerToken(bits=bits):
            return lambda x, site, batch: [code(batch.masked(x), bits, site, (-1,), batch.failures)]
        case coders.PerTensor(bits=bits):
            return lambda x, site, batch: [code(batch.masked(x), bits, site, (-2, -1), batch.failures)]
        case coders.Static(bits=bits, absmax=absmax):
            static = tensor(absmax, device)
            return lambda x, site, batch: [code_static(batch.masked(x), static, bits, site, batch.failures)]
        case coders.Flattened(bits=bits, absmax=absmax):
            limit = tensor(absmax, device)
            return lambda x, site, batch: [code_flattened(batch.masked(x), limit, bits, site, batch.failures)]
        case coders.PerTokenOutliers(bits=bits, threshold=threshold):
            return lambda x, site, batch: outliers_apart(batch.masked(x), bits, threshold, site, batch.failures)
        case _:
            return lambda x, site, batch: [fixed_point(batch.masked(x), spec.ACTIVATION_BITS, site, batch.failures)]


def outliers_apart(x: Tensor, bits: int, threshold: float, site: str, failures: Failures) -> Sequence[Codes | FixedPoint]:
    """Eq. (32): the values below the threshold in codes, the others, NaN among them, in fixed point."""
    inside, zero = x.abs() < float(np.float32(threshold)), torch.zeros_like(x)
    below, outliers = torch.where(inside, x, zero), torch.where(inside, zero, x)
    return [code(below, bits, site, (-1,), failures), fixed_point(outliers, spec.ACTIVATION_BITS, site, failures)]


KNOWN = frozenset({
    coders.ParameterPerTensor, coders.ParameterPerChannel, coders.ParameterGrouped, coders.PerToken, coders.PerTensor,
    coders.Static, coders.Flattened, coders.PerTokenOutliers, transforms.Smooth, transforms.Hadamard,
})  # fmt: skip


def transform_of(transform: transforms.Transform, device: torch.device) -> Callable[[Tensor, str, Failures], Tensor]:
    """This backend's form of one of the specification's transforms of an input."""
    if isinstance(transform, transforms.Smooth):
        power = two_to_f64(-tensor(transform.exponents, device))
        return lambda x, site, failures: (x.double() * power).float()  # eq. (29)
    return rotate


class Linear:
    """linear.Linear on the device."""

    def __init__(self, layer: linear.Linear, weight: Codes | FixedPoint, device: torch.device) -> None:
        self.site, self.weight = layer.site, weight
        self.transforms = [transform_of(transform, device) for transform in layer.transforms]
        self.input = coder_of(layer.input, device)
        self.output = None if layer.output is None else coder_of(layer.output, device)
        self.bias = None if layer.bias is None else tensor(layer.bias, device)

    def __call__(self, x: Tensor, batch: Batch, int8: bool) -> Tensor:
        """Eq. (7) to (13). (B, T, K) -> (B, T, rows). int8: int8_product is exact."""
        site, see = self.site, batch.see
        see(f"{site}.in", x)
        for n, transform in enumerate(self.transforms):
            x = transform(batch.masked(x), f"{site}.in", batch.failures)
            see(numbered(f"{site}.transformed", n), x)
        y: Tensor | None = None
        for n, codes in enumerate(self.input(x, f"{site}.in", batch)):
            see(numbered(f"{site}.in_codes", n), codes.q)
            acc = integer_product(codes, self.weight, int8)
            see(numbered(f"{site}.acc", n), acc)
            value = rescale(acc, codes, self.weight)
            see(numbered(f"{site}.result", n), value)
            if y is None:
                y = value
            else:
                y = y + value
                see(numbered(f"{site}.sum", n - 1), y)
        assert y is not None
        if self.output is not None:
            (out,) = self.output(y, f"{site}.result", batch)
            assert isinstance(out, Codes)
            see(f"{site}.out_codes", out.q)
            y = dequantize(out)
            see(f"{site}.out_value", y)
        if self.bias is not None:
            y = y + self.bias
        see(f"{site}.out", y)
        return y


class Mamba(TensorRunner):
    """One model on one device: the forward of refmamba.spec.mamba1.Mamba, for a batch."""

    def __init__(self, model: QuantizedModel, device: torch.device) -> None:
        self.model, self.config, self.scheme, self.device = model, model.config, model.scheme, device
        self.layers: dict[str, Linear] = {}
        for site in linear_sites(self.config):
            layer = model.linear(site)
            self.layers[site] = Linear(layer, self._moved(layer.weight), device)
        self.params: dict[str, Tensor | Codes] = {}
        for name in self.config.shapes():
            if name == "embedding.weight" and model.shares_codes:
                shared = self.layers["lm_head"].weight
                assert isinstance(shared, Codes)
                self.params[name] = shared
            elif name.removesuffix(".weight") not in self.layers:
                param = model.params[name]
                assert not isinstance(param, spec.FixedPoint)
                self.params[name] = self._moved(param)
        self.A = [self._state_matrix(f"layers.{i}.A") for i in range(self.config.n_layer)]
        longest = max(layer.weight.q.shape[1] for layer in self.layers.values())
        self.int8 = bool(self.scheme.inputs) and int8_product_is_exact(longest, device)

    @overload
    def _moved(self, param: F32Array) -> Tensor: ...
    @overload
    def _moved(self, param: spec.Codes) -> Codes: ...
    @overload
    def _moved(self, param: spec.FixedPoint) -> FixedPoint: ...
    def _moved(self, param: spec.Param) -> Tensor | Codes | FixedPoint:
        if isinstance(param, spec.Codes):
            return Codes(tensor(param.integers(), self.device), tensor(param.scale, self.device), param.bits)
        if isinstance(param, spec.FixedPoint):
            return FixedPoint(tensor(param.q, self.device), tensor(param.exponent, self.device)[:, None])
        return tensor(param, self.device)

    def linear(self, site: str, x: Tensor, batch: Batch) -> Tensor:
        """One linear layer. (B, T, K) -> (B, T, rows)."""
        return self.layers[site](x, batch, self.int8)

    def _state_matrix(self, name: str) -> Tensor:
        """A as the checkpoint states it, else eq. (19)."""
        return self._moved(self.model.value(name)) if name in self.model.params else -exp(self.value(f"{name}_log"))

    def value(self, name: str) -> Tensor:
        """A parameter that is not a matrix of a product, as float32."""
        param = self.params[name]
        return dequantize(param) if isinstance(param, Codes) else param

    def block(self, i: int, x: Tensor, conv_state: Tensor, ssm_state: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """One block, eq. (24)."""
        at, value, see = f"layers.{i}", self.value, batch.see
        r, n = self.config.dt_rank, self.config.d_state
        see(f"{at}.residual_in", x)
        normed = rms_norm(x, value(f"{at}.norm.weight"), self.config.norm_eps)
        see(f"{at}.norm", normed)
        conv_in, z = self.linear(f"{at}.in_proj", normed, batch).chunk(2, -1)
        bias = value(f"{at}.conv1d.bias") if self.config.use_conv_bias else None
        conv, conv_state = conv1d(conv_in, conv_state, value(f"{at}.conv1d.weight"), bias, batch.lengths)
        see(f"{at}.conv1d", conv)
        see(f"{at}.conv_state", conv_state)
        u = silu(conv)
        see(f"{at}.u", u)
        dtBC = self.linear(f"{at}.x_proj", u, batch)
        dt, B, C = dtBC[..., :r], dtBC[..., r : r + n], dtBC[..., r + n :]
        delta = softplus(self.linear(f"{at}.dt_proj", dt, batch) + value(f"{at}.dt_proj.bias"))
        see(f"{at}.delta", delta)
        y, ssm_state = selective_scan(u, delta, self.A[i], B, C, value(f"{at}.D"), ssm_state, batch.lengths)
        see(f"{at}.scan", y)
        see(f"{at}.ssm_state", ssm_state)
        gated = y * silu(z)
        see(f"{at}.gate", gated)
        x = x + self.linear(f"{at}.out_proj", gated, batch)
        see(f"{at}.residual_out", x)
        return x, conv_state, ssm_state

    def initial_state(self, batch: int) -> State:
        """The state of `batch` sequences before their first token."""
        shape = (batch, self.config.n_layer, self.config.d_inner)
        conv = torch.zeros((*shape, self.config.d_conv - 1), device=self.device)
        return State(conv, torch.zeros((*shape, self.config.d_state), device=self.device))

    def restore_state(self, conv: F32Array, ssm: F32Array) -> State:
        """The state whose `arrays` were these."""
        return State(tensor(conv, self.device), tensor(ssm, self.device))

    def run(
        self, sequences: Sequence[IntArray], state: State | None, logits: Positions, hook: Hook | None = None
    ) -> tuple[Tensor, list[int], State]:
        """See `TensorRunner.run`."""
        state = state or self.initial_state(len(sequences))
        tokens, lengths, real = right_padded(sequences, self.device)
        n, batch = [len(a) for a in sequences], Batch(lengths, real, hook)
        x = embed(tokens, self.params["embedding.weight"])
        batch.see("embedding", x)
        conv, ssm = [], []
        for i in range(self.config.n_layer):
            x, conv_state, ssm_state = self.block(i, x, state.conv[:, i], state.ssm[:, i], batch)
            conv.append(conv_state)
            ssm.append(ssm_state)
        state = State(torch.stack(conv, 1), torch.stack(ssm, 1))
        if logits == "none":
            raise_first(batch.failures)
            return torch.empty(0, self.config.vocab_size, device=self.device), [0] * len(n), state
        if logits == "last":
            x, n = x[torch.arange(len(n), device=self.device), lengths - 1][:, None], [1] * len(n)
            batch = replace(batch, real=None)
        x = rms_norm(x, self.value("norm_f.weight"), self.config.norm_eps)
        batch.see("norm_f", x)
        y = self.linear("lm_head", x, batch)
        raise_first(batch.failures)
        return unpadded(y, batch.real), n, state

    def log_softmax(self, logits: Tensor) -> Tensor:
        """See `TensorRunner.log_softmax`."""
        return log_softmax(logits)
