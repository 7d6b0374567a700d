"""Wrong backends: the reference with one fault each, of the kinds that fast implementations have."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refmamba.backends.reference import Reference
from refmamba.spec import arith, coders, linear, ops
from refmamba.spec import codes as quantize
from refmamba.spec import mamba1 as model
from refmamba.spec.arith import f32
from refmamba.spec.mamba1 import Mamba, State
from refmamba.spec.operations import OPERATIONS
from refmamba.spec.parameters import QuantizedModel

Faults = Mapping[str, Callable[..., Any]]
MODULES = (arith, ops, quantize, coders, linear, model)
ORIGINAL = {name: getattr(module, name) for module in MODULES for name in dir(module)}


@contextmanager
def planted(faults: Faults) -> Iterator[None]:
    """The specification's functions of these names are replaced, wherever they are called from."""
    places = [(module, name) for module in MODULES for name in faults if hasattr(module, name)]
    try:
        for module, name in places:
            setattr(module, name, faults[name])
        yield
    finally:
        for module, name in places:
            setattr(module, name, ORIGINAL[name])


class FaultyRunner(Mamba):
    """The reference's forward, with faults."""

    def __init__(self, quantized: QuantizedModel, faults: Faults) -> None:
        self.faults = faults
        with planted(faults):
            super().__init__(quantized)

    def prefill(self, *args: Any, **options: Any) -> Any:
        with planted(self.faults), np.errstate(all="ignore"):
            return super().prefill(*args, **options)


class Faulty(Reference):
    """A backend with faulty functions, or with a faulty runner."""

    def __init__(self, faults: Faults, runner: type[FaultyRunner] = FaultyRunner) -> None:
        super().__init__()
        self.faults, self.runner = faults, runner

    def load(self, model: QuantizedModel) -> Mamba:
        return self.runner(model, self.faults)

    def operations(self) -> Mapping[str, Callable[..., Any]]:
        def run(name: str) -> Callable[..., Any]:
            def operation(*args: Any) -> Any:
                with planted(self.faults):
                    return self.faults.get(name, OPERATIONS[name])(*args)

            return operation

        return {name: run(name) for name in OPERATIONS}


def half_away(x: Any, scale: Any, bits: int) -> Any:
    largest, y = f32(2 ** (bits - 1) - 1), x * scale
    q = np.clip(np.sign(y) * np.floor(np.abs(y) + f32(0.5)), -largest, largest)
    return q.astype(np.int8 if bits <= 8 else np.int16)


def unclamped(x: Any, scale: Any, bits: int) -> Any:
    y = np.rint(x * scale).astype(np.int64)
    return y.astype(np.int8 if bits <= 8 else np.int16)


def two_complement_range(x: Any, scale: Any, bits: int) -> Any:
    y = np.rint(np.clip(x * scale, f32(-(2 ** (bits - 1))), f32(2 ** (bits - 1) - 1)))
    return y.astype(np.int8 if bits <= 8 else np.int16)


def fused_scan(A_bar: Any, B_bar_u: Any, C: Any, h: Any) -> Any:
    y = np.empty(A_bar.shape[:2], np.float32)
    for t in range(len(A_bar)):  # one rounding for the product and the sum
        h = (A_bar[t].astype(np.float64) * h + B_bar_u[t]).astype(np.float32)
        y[t] = ORIGINAL["tree_sum"](C[t] * h)
    return y, h


def flushing_scan(A_bar: Any, B_bar_u: Any, C: Any, h: Any) -> Any:
    y = np.empty(A_bar.shape[:2], np.float32)
    for t in range(len(A_bar)):
        h = A_bar[t] * h + B_bar_u[t]
        h = np.where(np.abs(h) < f32(2.0**-126), f32(0), h)
        y[t] = ORIGINAL["tree_sum"](C[t] * h)
    return y, h


def library_softplus(x: Any) -> Any:
    return np.where(x > 20, x, np.log1p(np.exp(x)))


def library_silu(x: Any) -> Any:
    return x * (f32(1) / (f32(1) + ORIGINAL["exp"](-x)))  # a product with a reciprocal


def adjacent_tree(x: Any) -> Any:
    width = 1 << (x.shape[-1] - 1).bit_length()
    x = np.concatenate([x, np.zeros((*x.shape[:-1], width - x.shape[-1]), np.float32)], axis=-1)
    while x.shape[-1] > 1:
        x = x[..., 0::2] + x[..., 1::2]
    return x[..., 0]


def swapped_taps(x: Any, conv_state: Any, weight: Any, bias: Any) -> Any:
    return ORIGINAL["conv1d"](x, conv_state, np.ascontiguousarray(weight[:, ::-1]), bias)


def newest_tap_first(x: Any, conv_state: Any, weight: Any, bias: Any) -> Any:
    length, taps = x.shape[0], weight.shape[1]
    padded = np.concatenate([conv_state.T, x])
    y = padded[taps - 1 : taps - 1 + length] * weight[:, -1]
    for tap in range(taps - 2, -1, -1):
        y = y + padded[tap : tap + length] * weight[:, tap]
    return (y if bias is None else y + bias), padded[length:].T


def bias_first(x: Any, conv_state: Any, weight: Any, bias: Any) -> Any:
    length = len(x)
    padded = np.concatenate([conv_state.T, x])
    y = np.zeros_like(x) if bias is None else np.broadcast_to(bias, x.shape)
    for tap in range(weight.shape[1]):
        y = y + padded[tap : tap + length] * weight[:, tap]
    return y, padded[length:].T


def delta_B_first(delta: Any, A: Any, B: Any, u: Any) -> Any:
    return ORIGINAL["exp"](delta[:, :, None] * A), delta[:, :, None] * B[:, None, :] * u[:, :, None]


def bias_twice(dt: Any, bias: Any) -> Any:
    return ORIGINAL["softplus"](dt + bias + bias)


def float32_product(x: Any, w: Any) -> Any:
    both = isinstance(x, quantize.FixedPoint) and isinstance(w, quantize.FixedPoint)
    exact = ORIGINAL["integer_product"](x, w)
    if both:
        return exact
    total = np.zeros(exact.shape, np.float32)
    for k in range(x.q.shape[1]):
        total = total + x.q[:, k].astype(np.float32)[:, None] * w.q[:, k].astype(np.float32)
    return total.astype(np.float64)


def saturating_product(x: Any, w: Any) -> Any:
    """Pairs of products of 8 bits with and without a sign, summed in int16: processors before VNNI."""
    if x.q.dtype != np.int8 or w.q.dtype != np.int8:
        return ORIGINAL["integer_product"](x, w)
    pad = ((0, 0), (0, x.q.shape[1] % 2))
    products = np.pad(x.q.astype(np.int32) + 128, pad)[:, None] * np.pad(w.q, pad).astype(np.int32)
    pairs = np.clip(products[..., 0::2] + products[..., 1::2], -32768, 32767)
    return (pairs.sum(-1) - 128 * w.q.sum(-1, dtype=np.int64)).astype(np.float64)


def unsplit_product(x: Any, w: Any) -> Any:
    return x.q.astype(np.float64) @ w.q.T.astype(np.float64)


def scaled_in_float64(acc: Any, x: Any, w: Any) -> Any:
    scales = [c.scale if c is x or c.scale.ndim == 0 else c.scale[:, 0] for c in (x, w) if isinstance(c, quantize.Codes)]
    y = ORIGINAL["rescale"](acc, *(c if isinstance(c, quantize.FixedPoint) else unscaled(c) for c in (x, w)))
    for scale in scales:
        y = y / scale.astype(np.float64)
    return y.astype(np.float32)


def unscaled(c: quantize.Codes) -> quantize.Codes:
    return quantize.Codes(c.q, np.ones_like(c.scale), c.bits)


def reciprocal_root(x: Any, weight: Any, eps: float) -> Any:
    mean = ORIGINAL["tree_sum"](x * x) / f32(x.shape[-1])
    return x * (f32(1) / np.sqrt(mean + f32(eps)))[:, None] * weight


def plain_mean(x: Any, weight: Any, eps: float) -> Any:
    mean = np.mean(x * x, axis=-1, dtype=np.float64).astype(np.float32)
    return x / np.sqrt(mean + f32(eps))[:, None] * weight


def nan_blind_absmax(x: Any, site: str, granularity: str = "per_tensor") -> Any:
    return ORIGINAL["absmax"](np.nan_to_num(x), site, granularity)


def absmax_of_largest(x: Any, site: str, granularity: str = "per_tensor") -> Any:
    m = np.max(x) if granularity == "per_tensor" else np.max(x, axis=-1, keepdims=True)
    return ORIGINAL["absmax"](np.broadcast_to(m, m.shape), site) if granularity == "per_tensor" else np.abs(m)


class BiasTwice(FaultyRunner):
    """in_proj and out_proj add their bias once more."""

    def __init__(self, quantized: QuantizedModel, faults: Faults) -> None:
        super().__init__(quantized, faults)
        for site, layer in self.linear.items():
            if layer.bias is not None:
                self.linear[site] = replace(layer, bias=layer.bias + layer.bias)


class BatchScale(FaultyRunner):
    """One scale for the whole batch: what one sequence gets depends on the others."""

    def prefill(self, sequences: Sequence[Any], state: Any = None, **options: Any) -> Any:
        wide = len(sequences) > 1 and bool(self.scheme.outputs)
        original = ORIGINAL["scale_of"]
        faults = {"scale_of": lambda m, bits: original(m, bits) * f32(0.5)} if wide else {}
        with planted(faults):
            return Mamba.prefill(self, sequences, state, **options)


class InPlaceState(FaultyRunner):
    """The state that goes in is changed."""

    def prefill(self, sequences: Sequence[Any], state: Any = None, **options: Any) -> Any:
        rows, after = super().prefill(sequences, state, **options)
        if state is not None:
            state.conv[...], state.ssm[...] = after.conv, after.ssm
        return rows, after


class PaddingInState(FaultyRunner):
    """Shorter sequences of a batch run on through the padding."""

    def prefill(self, sequences: Sequence[Any], state: Any = None, **options: Any) -> Any:
        rows, after = super().prefill(sequences, state, **options)
        longest = max(len(s) for s in sequences)
        padded = [np.pad(s, (0, longest - len(s))) for s in sequences]
        return rows, after if len(sequences) == 1 else super().prefill(padded, state, **options)[1]


class ForgottenState(FaultyRunner):
    """The convolution starts from zeros in every call."""

    def prefill(self, sequences: Sequence[Any], state: Any = None, **options: Any) -> Any:
        state = state and State(np.zeros_like(state.conv), state.ssm)
        return super().prefill(sequences, state, **options)


@dataclass(frozen=True)
class Fault:
    """A wrong backend, and what verify has to name."""

    name: str
    operation: str
    faults: Faults
    runner: type[FaultyRunner] = FaultyRunner


FAULTS = (
    Fault("half away from zero", "quantize", {"quantize": half_away}),
    Fault("no clamp before the cast", "quantize", {"quantize": unclamped}),
    Fault("-2^(N-1) is a code", "quantize", {"quantize": two_complement_range}),
    Fault("the library's exp", "exp", {"exp": np.exp}),
    Fault("the library's log", "log", {"log": np.log}),
    Fault("the library's softplus", "softplus", {"softplus": library_softplus}),
    Fault("a reciprocal in silu", "silu", {"silu": library_silu}),
    Fault("neighbours summed first", "tree_sum", {"tree_sum": adjacent_tree}),
    Fault("a sum in float64", "tree_sum", {"tree_sum": lambda x: x.sum(-1, dtype=np.float64).astype(np.float32)}),
    Fault("NaN dropped by a maximum", "absmax", {"absmax": nan_blind_absmax}),
    Fault("the largest, not the largest magnitude", "absmax", {"absmax": absmax_of_largest}),
    Fault("float32 accumulation", "integer_product", {"integer_product": float32_product}),
    Fault("saturating int8 products", "integer_product", {"integer_product": saturating_product}),
    Fault("53 bits for two fixed-point factors", "integer_product", {"integer_product": unsplit_product}),
    Fault("scales divided in float64", "rescale", {"rescale": scaled_in_float64}),
    Fault("a reciprocal of the root", "rms_norm", {"rms_norm": reciprocal_root}),
    Fault("a mean in float64", "rms_norm", {"rms_norm": plain_mean}),
    Fault("swapped taps", "conv1d", {"conv1d": swapped_taps}),
    Fault("newest tap first", "conv1d", {"conv1d": newest_tap_first}),
    Fault("bias before the taps", "conv1d", {"conv1d": bias_first}),
    Fault("dt_proj's bias twice", "step_size", {"step_size": bias_twice}),
    Fault("(delta B) u", "discretize", {"discretize": delta_B_first}),
    Fault("a fused multiply-add in the scan", "selective_scan", {"scan": fused_scan}),
    Fault("subnormals flushed to zero", "selective_scan", {"scan": flushing_scan}),
    Fault("a linear layer's bias twice", "add", {}, BiasTwice),
    Fault("a scale over the batch", "batch", {}, BatchScale),
    Fault("the state changed in place", "state", {}, InPlaceState),
    Fault("padding runs into the state", "state", {}, PaddingInState),
    Fault("the convolution's state forgotten", "step", {}, ForgottenState),
)
