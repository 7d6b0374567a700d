"""Wrong backends: the reference with one fault each, of the kinds that fast implementations have.

Each comes twice: as a backend that offers every operation and shows every value, and as a fused one, which shows and offers
only what the fast CPU backend does. docs/VERIFY.md has the table of them: `python tests/faults.py` prints it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refmamba.conformance.replaced import MODULES, Replaced, ReplacedRunner, replaced
from refmamba.spec import codes as quantize
from refmamba.spec.arith import f32
from refmamba.spec.mamba1 import Mamba, State
from refmamba.spec.operations import OPERATIONS
from refmamba.spec.parameters import QuantizedModel
from refmamba.spec.trace import last_site

Faults = Mapping[str, Callable[..., Any]]
ORIGINAL = {name: getattr(module, name) for module in MODULES for name in dir(module)}


class Faulty(Replaced):
    """A backend with faulty functions, or with a faulty runner."""

    def __init__(self, faults: Faults, runner: type[ReplacedRunner] = ReplacedRunner) -> None:
        super().__init__(faults, runner)
        del self.calls  # it is a backend like any other

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any) -> Any:
            return function(*args)

        operation.__name__ = name  # what a trace calls it
        return operation

    def operations(self) -> Mapping[str, Callable[..., Any]]:
        def run(name: str) -> Callable[..., Any]:
            def operation(*args: Any) -> Any:
                with replaced(self.functions):
                    return self.functions.get(name, OPERATIONS[name])(*args)

            return operation

        return {name: run(name) for name in OPERATIONS}


SITES = frozenset({
    "embedding", "residual_in", "in_proj.out", "u", "x_proj.out", "conv_state", "ssm_state", "gate", "residual_out",
    "lm_head.out",
})  # fmt: skip


class Fused(Faulty):
    """The same, showing and offering what a fused backend does."""

    sites: frozenset[str] | None = SITES

    def load(self, model: QuantizedModel) -> Mamba:
        runner = super().load(model)
        prefill = runner.prefill

        def shows_less(sequences: Any, state: Any = None, *, logits: Any = "last", hook: Any = None) -> Any:
            def look(site: str, value: Any) -> None:
                if last_site(site) in SITES:
                    hook(site, value)

            return prefill(sequences, state, logits=logits, hook=look if hook else None)

        runner.prefill = shows_less  # type: ignore[method-assign]
        return runner

    def operations(self) -> Mapping[str, Callable[..., Any]]:
        offered = super().operations()
        return {name: offered[name] for name in ("exp", "softplus", "silu", "log_softmax")}


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


class BiasTwice(ReplacedRunner):
    """in_proj and out_proj add their bias once more."""

    def __init__(self, quantized: QuantizedModel, functions: Faults) -> None:
        super().__init__(quantized, functions)
        for site, layer in self.linear.items():
            if layer.bias is not None:
                self.linear[site] = replace(layer, bias=layer.bias + layer.bias)


class BatchScale(ReplacedRunner):
    """One scale for the whole batch: what one sequence gets depends on the others."""

    def prefill(self, sequences: Sequence[Any], state: Any = None, **options: Any) -> Any:
        wide = len(sequences) > 1 and bool(self.scheme.outputs)
        original = ORIGINAL["scale_of"]
        faults = {"scale_of": lambda m, bits: original(m, bits) * f32(0.5)} if wide else {}
        with replaced(faults):
            return Mamba.prefill(self, sequences, state, **options)


class InPlaceState(ReplacedRunner):
    """The state that goes in is changed."""

    def prefill(self, sequences: Sequence[Any], state: Any = None, **options: Any) -> Any:
        rows, after = super().prefill(sequences, state, **options)
        if state is not None:
            state.conv[...], state.ssm[...] = after.conv, after.ssm
        return rows, after


class PaddingInState(ReplacedRunner):
    """Shorter sequences of a batch run on through the padding."""

    def prefill(self, sequences: Sequence[Any], state: Any = None, **options: Any) -> Any:
        rows, after = super().prefill(sequences, state, **options)
        longest = max(len(s) for s in sequences)
        padded = [np.pad(s, (0, longest - len(s))) for s in sequences]
        return rows, after if len(sequences) == 1 else super().prefill(padded, state, **options)[1]


class ForgottenState(ReplacedRunner):
    """The convolution starts from zeros in every call."""

    def prefill(self, sequences: Sequence[Any], state: Any = None, **options: Any) -> Any:
        state = state and State(np.zeros_like(state.conv), state.ssm)
        return super().prefill(sequences, state, **options)


# Section 1: polynomials and sums.
def subnormal_exp(x: Any) -> Any:
    return np.where(x < f32(-87.336), np.exp(x.astype(np.float64)).astype(np.float32), ORIGINAL["exp"](x))


def exp_by_powers_of_two(x: Any) -> Any:
    return np.exp2(x * f32(1.4426950408889634))


def log_without_subnormals(x: Any) -> Any:
    return np.where((x > 0) & (x < f32(2.0**-126)), f32(-np.inf), ORIGINAL["log"](x))


def early_softplus(x: Any) -> Any:
    return np.where(x > 10, x, ORIGINAL["softplus"](x))


def tanh_silu(x: Any) -> Any:
    return f32(0.5) * x * (f32(1) + np.tanh(f32(0.5) * x))


def halves_rounded_up(x: Any) -> Any:
    """The second half of what is left is added to the first, without a power of two."""
    while x.shape[-1] > 1:
        half = (x.shape[-1] + 1) // 2
        x = np.concatenate([x[..., : x.shape[-1] - half] + x[..., half:], x[..., x.shape[-1] - half : half]], axis=-1)
    return x[..., 0]


def one_by_one(x: Any) -> Any:
    total = np.zeros(x.shape[:-1], np.float32)
    for k in range(x.shape[-1]):
        total = total + x[..., k]
    return total


# Section 2: codes and products.
def absmax_of_whole_vectors(x: Any, site: str, granularity: str = "per_tensor") -> Any:
    """The columns after the last whole vector of eight are forgotten."""
    width = x.shape[-1] // 8 * 8
    return ORIGINAL["absmax"](x[..., :width] if width else x, site, granularity)


def absmax_that_lets_infinity_pass(x: Any, site: str, granularity: str = "per_tensor") -> Any:
    return ORIGINAL["absmax"](np.nan_to_num(x, nan=np.nan, posinf=3e38, neginf=-3e38), site, granularity)


def tiny_absmax_kept(x: Any, site: str, granularity: str = "per_tensor") -> Any:
    ORIGINAL["absmax"](x, site, granularity)
    return np.max(np.abs(x)) if granularity == "per_tensor" else np.max(np.abs(x), axis=-1, keepdims=True)


def scale_of_128(m: Any, bits: int) -> Any:
    return np.where(m == 0, f32(1), f32(2 ** (bits - 1)) / np.where(m == 0, f32(1), m))


def scale_by_reciprocal(m: Any, bits: int) -> Any:
    return np.where(m == 0, f32(1), f32(2 ** (bits - 1) - 1) * (f32(1) / np.where(m == 0, f32(1), m)))


def scale_of_zero(m: Any, bits: int) -> Any:
    return f32(2 ** (bits - 1) - 1) / m


def scale_in_float16(m: Any, bits: int) -> Any:
    return ORIGINAL["scale_of"](m, bits).astype(np.float16).astype(np.float32)


def clamped_at(change: Callable[[int], int]) -> Callable[..., Any]:
    def quantize_codes(x: Any, scale: Any, bits: int) -> Any:
        largest = f32(change(bits))
        return np.rint(np.clip(x * scale, -largest, largest)).astype(np.int8 if bits <= 8 else np.int16)

    return quantize_codes


def toward_zero(x: Any, scale: Any, bits: int) -> Any:
    largest = f32(2 ** (bits - 1) - 1)
    return np.trunc(np.clip(x * scale, -largest, largest)).astype(np.int8 if bits <= 8 else np.int16)


def half_up(x: Any, scale: Any, bits: int) -> Any:
    largest = f32(2 ** (bits - 1) - 1)
    return np.floor(np.clip(x * scale, -largest, largest) + f32(0.5)).astype(np.int8 if bits <= 8 else np.int16)


def wrapped_to_int8(x: Any, scale: Any, bits: int) -> Any:
    q = ORIGINAL["quantize"](x, scale, bits)
    return q.astype(np.int8).astype(q.dtype)


def wide_product_with_the_scale(x: Any, scale: Any, bits: int) -> Any:
    largest = 2.0 ** (bits - 1) - 1
    y = np.clip(x.astype(np.float64) * scale, -largest, largest)
    return np.rint(y).astype(np.int8 if bits <= 8 else np.int16)


def one_scale_for_all_rows(x: Any, bits: int, site: str, granularity: str = "per_tensor") -> Any:
    coded = ORIGINAL["code"](x, bits, site, "per_tensor")
    scale = np.broadcast_to(coded.scale, (len(x), 1)).copy() if granularity == "per_row" else coded.scale
    return quantize.Codes(coded.q, scale, bits)


def swapped_granularity(x: Any, bits: int, site: str, granularity: str = "per_tensor") -> Any:
    """One scale a token for what leaves a linear layer, one for all tokens for what enters it."""
    return ORIGINAL["code"](x, bits, site, "per_row" if site.endswith(".result") else "per_tensor")


def static_scale_from_the_values(x: Any, static_absmax: Any, bits: int, site: str) -> Any:
    return ORIGINAL["code"](x, bits, site, "per_tensor")


def static_nan(x: Any, static_absmax: Any, bits: int, site: str) -> Any:
    return ORIGINAL["code_static"](np.nan_to_num(x), static_absmax, bits, site)


def static_wraps(x: Any, static_absmax: Any, bits: int, site: str) -> Any:
    coded = ORIGINAL["code_static"](x, static_absmax, bits, site)
    q = np.rint(x * coded.scale).astype(np.int64).astype(coded.q.dtype)
    return quantize.Codes(q, coded.scale, bits)


def one_exponent(x: Any, magnitude_bits: int, site: str) -> Any:
    """A power of two for the tensor, not for each row."""
    exponent = ORIGINAL["fixed_point"](x, magnitude_bits, site).exponent
    exponent = np.full_like(exponent, exponent.min(initial=126))
    return quantize.FixedPoint(np.rint(np.ldexp(x, exponent[:, None])).astype(np.int32), exponent)


def fixed_point_truncated(x: Any, magnitude_bits: int, site: str) -> Any:
    exponent = ORIGINAL["fixed_point"](x, magnitude_bits, site).exponent
    return quantize.FixedPoint(np.trunc(np.ldexp(x, exponent[:, None])).astype(np.int32), exponent)


def fixed_point_of_16_bits(x: Any, magnitude_bits: int, site: str) -> Any:
    return ORIGINAL["fixed_point"](x, min(magnitude_bits, 15), site)


def high_part_alone(x: Any, w: Any) -> Any:
    if isinstance(x, quantize.Codes) or isinstance(w, quantize.Codes):
        return ORIGINAL["integer_product"](x, w)
    lo = ((w.q + 2048) & 4095) - 2048
    return ORIGINAL["integer_product"](x, quantize.FixedPoint(w.q - lo, w.exponent))


def wrapping(bits: int) -> Callable[..., Any]:
    def product(x: Any, w: Any) -> Any:
        acc = ORIGINAL["integer_product"](x, w)
        if isinstance(x, quantize.FixedPoint) and isinstance(w, quantize.FixedPoint):
            return acc
        return ((acc.astype(np.int64) + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)).astype(np.float64)

    return product


def without_the_last_column(multiple: int) -> Callable[..., Any]:
    """Columns after the last whole group are forgotten, where there is a group."""

    def product(x: Any, w: Any) -> Any:
        q = w.q.copy()
        q[:, q.shape[1] // multiple * multiple or multiple :] = 0
        return ORIGINAL["integer_product"](x, replace(w, q=q))

    return product


def products_in_float32(x: Any, w: Any) -> Any:
    """A BLAS product of what the codes stand for."""
    x_q, w_q = (c.q.astype(np.float32) for c in (x, w))
    return (x_q @ w_q.T).astype(np.float64)


def multiplied(acc: Any, x: Any, w: Any) -> Any:
    y = ORIGINAL["rescale"](acc, *(c if isinstance(c, quantize.FixedPoint) else unscaled(c) for c in (x, w)))
    for c in (x, w):
        if isinstance(c, quantize.Codes):
            y = y * (f32(1) / (c.scale if c is x or c.scale.ndim == 0 else c.scale[:, 0]))
    return y


def divided_twice(acc: Any, x: Any, w: Any) -> Any:
    y = ORIGINAL["rescale"](acc, *(c if isinstance(c, quantize.FixedPoint) else unscaled(c) for c in (x, w)))
    for c in (x, w):
        if isinstance(c, quantize.Codes):
            y = y / (c.scale if c is x or c.scale.ndim == 0 else c.scale[:, 0])
    return y


def first_token_s_scale(acc: Any, x: Any, w: Any) -> Any:
    if isinstance(x, quantize.Codes) and x.scale.ndim:
        x = quantize.Codes(x.q, np.broadcast_to(x.scale[:1], x.scale.shape), x.bits)
    return ORIGINAL["rescale"](acc, x, w)


def rounded_before_the_scale(acc: Any, x: Any, w: Any) -> Any:
    return ORIGINAL["rescale"](acc.astype(np.float16).astype(np.float64) if np.abs(acc).max() < 6e4 else acc, x, w)


def dequantized_by_reciprocal(x: Any) -> Any:
    return x.integers().astype(np.float32) * (f32(1) / x.scale)


# Section 3: operations.
def next_row(tokens: Any, embedding: Any) -> Any:
    rows = len(embedding.q) if isinstance(embedding, quantize.Codes) else len(embedding)
    return ORIGINAL["embed"](np.minimum(tokens + 1, rows - 1), embedding)


def eps_outside(x: Any, weight: Any, eps: float) -> Any:
    mean = ORIGINAL["tree_sum"](x * x) / f32(x.shape[-1])
    return x / (np.sqrt(mean) + f32(eps))[:, None] * weight


def weight_first(x: Any, weight: Any, eps: float) -> Any:
    mean = ORIGINAL["tree_sum"](x * x) / f32(x.shape[-1])
    return x * weight / np.sqrt(mean + f32(eps))[:, None]


def layer_norm(x: Any, weight: Any, eps: float) -> Any:
    centred = x - (ORIGINAL["tree_sum"](x) / f32(x.shape[-1]))[:, None]
    return ORIGINAL["rms_norm"](centred, weight, eps)


def bias_that_is_not_there(x: Any, conv_state: Any, weight: Any, bias: Any) -> Any:
    """A kernel that always adds a bias adds what it finds."""
    return ORIGINAL["conv1d"](x, conv_state, weight, weight[:, -1] if bias is None else bias)


def always_four_taps(x: Any, conv_state: Any, weight: Any, bias: Any) -> Any:
    if weight.shape[1] == 4:
        return ORIGINAL["conv1d"](x, conv_state, weight, bias)
    return ORIGINAL["conv1d"](x, conv_state, np.roll(weight, 1, axis=1), bias)


def newest_state_first(x: Any, conv_state: Any, weight: Any, bias: Any) -> Any:
    y, after = ORIGINAL["conv1d"](x, conv_state[:, ::-1], weight, bias)
    return y, after[:, ::-1]


def short_call_forgets(x: Any, conv_state: Any, weight: Any, bias: Any) -> Any:
    """The inputs before a call shorter than the kernel are lost."""
    y, after = ORIGINAL["conv1d"](x, conv_state, weight, bias)
    return y, after if len(x) >= weight.shape[1] - 1 else np.concatenate([np.zeros_like(conv_state), x.T], 1)[:, len(x) :]


def fused_taps(x: Any, conv_state: Any, weight: Any, bias: Any) -> Any:
    padded = np.concatenate([conv_state.T, x])
    y = padded[: len(x)] * weight[:, 0]
    for tap in range(1, weight.shape[1]):
        y = (y + padded[tap : tap + len(x)].astype(np.float64) * weight[:, tap]).astype(np.float32)
    return (y if bias is None else y + bias), padded[len(x) :].T


def silu_in_the_convolution_s_state(x: Any, conv_state: Any, weight: Any, bias: Any) -> Any:
    y, after = ORIGINAL["conv1d"](x, conv_state, weight, bias)
    return y, ORIGINAL["silu"](after)


def without_bias(dt: Any, bias: Any) -> Any:
    return ORIGINAL["softplus"](dt)


def clamped_step(dt: Any, bias: Any) -> Any:
    return np.clip(ORIGINAL["step_size"](dt, bias), f32(1e-3), f32(0.1))


def positive_A(A_log: Any) -> Any:
    return ORIGINAL["exp"](A_log)


def library_A(A_log: Any) -> Any:
    return -np.exp(A_log)


def exact_hold(delta: Any, A: Any, B: Any, u: Any) -> Any:
    """Zero-order hold for B too, as the paper's equation has it."""
    A_bar = ORIGINAL["exp"](delta[:, :, None] * A)
    return A_bar, (A_bar - f32(1)) / A * B[:, None, :] * u[:, :, None]


def u_B_first(delta: Any, A: Any, B: Any, u: Any) -> Any:
    return ORIGINAL["discretize"](delta, A, B, u)[0], (u[:, :, None] * B[:, None, :]) * delta[:, :, None]


def scan_with(
    change: Callable[..., Any],
) -> Callable[..., Any]:
    """The selective scan with u, delta, A, B, C, D, h changed before it."""

    def selective_scan(*args: Any) -> Any:
        return ORIGINAL["selective_scan"](*change(*args))

    return selective_scan


def state_lost_after_256(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, h: Any) -> Any:
    parts = []
    for at in range(0, len(u), 256):
        now = slice(at, at + 256)
        y, h = ORIGINAL["selective_scan"](u[now], delta[now], A, B[now], C[now], D, h if at == 0 else np.zeros_like(h))
        parts.append(y)
    return np.concatenate(parts), h


def odd_states_in_another_tree(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, h: Any) -> Any:
    """Right where the number of states is a power of two."""
    if A.shape[1] & (A.shape[1] - 1) == 0:
        return ORIGINAL["selective_scan"](u, delta, A, B, C, D, h)
    A_bar, B_bar_u = ORIGINAL["discretize"](delta, A, B, u)
    y = np.empty_like(u)
    for t in range(len(u)):
        h = A_bar[t] * h + B_bar_u[t]
        y[t] = halves_rounded_up(C[t] * h)
    return y + D * u, h


def skip_in_the_tree(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, h: Any) -> Any:
    A_bar, B_bar_u = ORIGINAL["discretize"](delta, A, B, u)
    y = np.empty_like(u)
    for t in range(len(u)):
        h = A_bar[t] * h + B_bar_u[t]
        terms = C[t] * h
        terms[:, 0] = terms[:, 0] + D * u[t]
        y[t] = ORIGINAL["tree_sum"](terms)
    return y, h


def output_before_the_update(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, h: Any) -> Any:
    A_bar, B_bar_u = ORIGINAL["discretize"](delta, A, B, u)
    y = np.empty_like(u)
    for t in range(len(u)):
        y[t] = ORIGINAL["tree_sum"](C[t] * h)
        h = A_bar[t] * h + B_bar_u[t]
    return y + D * u, h


def state_of_16_bits(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, h: Any) -> Any:
    y, h = ORIGINAL["selective_scan"](u, delta, A, B, C, D, h)
    return y, h.astype(np.float16).astype(np.float32)


def parallel_scan(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, h: Any) -> Any:
    """Pairs of (A, B u) composed, as an associative scan does it: the same up to rounding."""
    a, b = (x.copy() for x in ORIGINAL["discretize"](delta, A, B, u))
    b[0] = a[0] * h + b[0]
    step = 1
    while step < len(u):
        a_before, b_before = a.copy(), b.copy()
        b[step:] = a_before[step:] * b_before[:-step] + b_before[step:]
        a[step:] = a_before[step:] * a_before[:-step]
        step *= 2
    return ORIGINAL["tree_sum"](C[:, None, :] * b) + D * u, b[-1]


def gate_in_one_quotient(y: Any, z: Any) -> Any:
    return (y * z) / (f32(1) + ORIGINAL["exp"](-z))


def gate_swapped(y: Any, z: Any) -> Any:
    return ORIGINAL["silu"](y) * z


# Linear layers, and the model.
class UntiedTakenForTied(ReplacedRunner):
    """The head is the embedding even where the model has its own."""

    def __init__(self, quantized: QuantizedModel, functions: Faults) -> None:
        super().__init__(quantized, functions)
        if not self.config.tie_embeddings:
            head, table = self.linear["lm_head"], self.model.params["embedding.weight"]
            if isinstance(table, np.ndarray):
                table = ORIGINAL["fixed_point"](table, quantize.WEIGHT_BITS, "embedding")
            self.linear["lm_head"] = replace(head, weight=table)


class Unsmoothed(ReplacedRunner):
    """What SmoothQuant leaves to the linear layer is forgotten."""

    def __init__(self, quantized: QuantizedModel, functions: Faults) -> None:
        super().__init__(quantized, functions)
        self.linear = {site: replace(layer, transforms=()) for site, layer in self.linear.items()}


class OutputNotCoded(ReplacedRunner):
    """out_proj's result is not coded."""

    def __init__(self, quantized: QuantizedModel, functions: Faults) -> None:
        super().__init__(quantized, functions)
        self.linear = {
            site: replace(layer, output=None) if site.endswith("out_proj") else layer for site, layer in self.linear.items()
        }


class BiasForgotten(ReplacedRunner):
    """in_proj's bias is forgotten."""

    def __init__(self, quantized: QuantizedModel, functions: Faults) -> None:
        super().__init__(quantized, functions)
        self.linear = {
            site: replace(layer, bias=None) if site.endswith("in_proj") else layer for site, layer in self.linear.items()
        }


# Ways of calling.
class LastOfTheLongest(ReplacedRunner):
    """The last position is the longest sequence's, in shorter ones too (the last one there is, there)."""

    def prefill(self, sequences: Sequence[Any], state: Any = None, **options: Any) -> Any:
        if options.get("logits", "last") != "last" or len(sequences) == 1:
            return super().prefill(sequences, state, **options)
        rows, after = super().prefill(sequences, state, **options | {"logits": "all"})
        shortest = min(len(s) for s in sequences)
        return [r[shortest - 1 : shortest] for r in rows], after


class FirstState(ReplacedRunner):
    """Every sequence of a batch goes on from the first one's state."""

    def prefill(self, sequences: Sequence[Any], state: Any = None, **options: Any) -> Any:
        several = state is not None and len(sequences) > 1 and max(len(s) for s in sequences) > 1
        return super().prefill(sequences, state.take([0] * len(sequences)) if several else state, **options)


class FifthOfABatch(ReplacedRunner):
    """A batch is made for four: the fifth sequence gets the first one's result."""

    def prefill(self, sequences: Sequence[Any], state: Any = None, **options: Any) -> Any:
        rows, after = super().prefill(sequences, state, **options)
        if len(rows) > 4 and len(rows[4]) == len(rows[0]):
            rows[4] = rows[0]
        return rows, after if len(rows) < 5 else after.take([*range(4), 0, *range(5, len(rows))])


class LostToken(ReplacedRunner):
    """A call is cut into passes of 256 tokens, and a later pass loses its first one."""

    def prefill(self, sequences: Sequence[Any], state: Any = None, **options: Any) -> Any:
        if len(sequences) > 1 or len(sequences[0]) <= 256 or options.get("hook"):
            return super().prefill(sequences, state, **options)
        s = sequences[0]
        (a,), middle = super().prefill([s[:256]], state, **options)
        (b,), after = super().prefill([s[257:]], middle, **options)
        return [np.concatenate([a, b[:1], b]) if options.get("logits") == "all" else b], after


class NoneKeepsTheState(ReplacedRunner):
    """Without logits nothing is computed, the state included."""

    def prefill(self, sequences: Sequence[Any], state: Any = None, **options: Any) -> Any:
        rows, after = super().prefill(sequences, state, **options)
        if options.get("logits") == "none":
            after = state or self.initial_state(len(sequences))
        return rows, after


class StepInPlace(ReplacedRunner):
    """A step writes into the state that it was given."""

    def step(self, tokens: Any, state: Any, **options: Any) -> Any:
        logits, after = super().step(tokens, state, **options)
        state.conv[...], state.ssm[...] = after.conv, after.ssm
        return logits, after


class PrefillInPlaceOfABatch(ReplacedRunner):
    """The same of a prefill, where there are several sequences."""

    def prefill(self, sequences: Sequence[Any], state: Any = None, **options: Any) -> Any:
        rows, after = super().prefill(sequences, state, **options)
        if state is not None and len(sequences) > 1 and len(sequences[0]) > 1:
            state.ssm[...] = after.ssm
        return rows, after


class StepOfOneSequence(ReplacedRunner):
    """A step takes every sequence's token from the first."""

    def step(self, tokens: Any, state: Any, **options: Any) -> Any:
        return super().step(np.full_like(tokens, tokens[0]), state, **options)


class FirstTokenDropped(ReplacedRunner):
    """A call that goes on runs its first token as if there were no state of the scan."""

    def prefill(self, sequences: Sequence[Any], state: Any = None, **options: Any) -> Any:
        if state is not None and len(sequences) == 1 and len(sequences[0]) > 1:
            state = State(state.conv, np.zeros_like(state.ssm))
        return super().prefill(sequences, state, **options)


class TakenInOrder(State):
    """A state whose `take` forgets the order."""

    def take(self, indices: Sequence[int]) -> State:
        return State(*(x[np.sort(list(indices))] for x in (self.conv, self.ssm)))


class ForkInOrder(ReplacedRunner):
    """A fork gives the states in the batch's order, not in the one that was asked for."""

    def prefill(self, sequences: Sequence[Any], state: Any = None, **options: Any) -> Any:
        rows, after = super().prefill(sequences, state, **options)
        return rows, TakenInOrder(after.conv, after.ssm)


class LengthsOfTheFirst(ReplacedRunner):
    """All states of a batch are taken after as many tokens as the first sequence has."""

    def prefill(self, sequences: Sequence[Any], state: Any = None, **options: Any) -> Any:
        rows, after = super().prefill(sequences, state, **options)
        if len(sequences) == 1 or state is not None:
            return rows, after
        return rows, super().prefill([np.resize(s, len(sequences[0])) for s in sequences], state, logits="none")[1]


def scan_flushes_its_inputs(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, h: Any) -> Any:
    """Denormals are zeros: of a state that is read, not of one that is written."""
    return ORIGINAL["selective_scan"](u, delta, A, B, C, D, np.where(np.abs(h) < f32(2.0**-126), h * f32(0), h))


def no_check(logits: Any) -> None:
    """A logit may be anything."""


@dataclass(frozen=True)
class Fault:
    """A wrong backend, and what verify has to name.

    fused: names that are right for the fused backend, whose steps hold several operations; None: the operation alone; (): no
    model's output depends on it. called, called_fused: what verify names where it is misled.
    """

    name: str
    operation: str
    faults: Faults
    runner: type[ReplacedRunner] = ReplacedRunner
    fused: tuple[str, ...] | None = None
    called: str | None = None
    called_fused: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What is right for the fused backend."""
        return (self.operation,) if self.fused is None else self.fused

    @property
    def shows(self) -> bool:
        """Whether a model's output depends on it."""
        return self.names != ()


# The fewest under which every fault shows.
FUSED_SCHEMES = ("fp32", "w4-all", "w4a16-all", "w8a8-all", "int8", "int8-static", "int8-smooth", "mixed", "whole")
CODES = ("quantize", "code", "code_static")  # a fused backend's coding is one step
SCAN = ("selective_scan",)  # as is its scan
FAULTS = (
    Fault("half away from zero", "quantize", {"quantize": half_away}, fused=CODES),
    Fault("no clamp before the cast", "quantize", {"quantize": unclamped}, fused=CODES),
    Fault("-2^(N-1) is a code", "quantize", {"quantize": two_complement_range}, fused=CODES),
    Fault("half rounded up", "quantize", {"quantize": half_up}, fused=CODES),
    Fault("truncated toward zero", "quantize", {"quantize": toward_zero}, fused=CODES),
    Fault("x times scale in float64", "quantize", {"quantize": wide_product_with_the_scale}, fused=CODES),
    Fault("clamped at 127 whatever the bits", "quantize", {"quantize": clamped_at(lambda bits: max(127, 2 ** (bits - 1) - 1))},
          fused=CODES,
          called_fused="integer_product"),
    Fault("clamped one too low at 3, 5, 6 and 7 bits", "quantize",
          {"quantize": clamped_at(lambda bits: 2 ** (bits - 1) - 1 - (bits in (3, 5, 6, 7)))}, fused=CODES),
    Fault("codes over 8 bits wrap to int8", "quantize", {"quantize": wrapped_to_int8}, fused=CODES),
    Fault("NaN dropped by a maximum", "absmax", {"absmax": nan_blind_absmax}, fused=("refused",)),
    Fault("infinity let pass by a maximum", "absmax", {"absmax": absmax_that_lets_infinity_pass}, fused=("refused",)),
    Fault("the largest, not the largest magnitude", "absmax", {"absmax": absmax_of_largest},
          fused=("absmax", *CODES, "fixed_point")),
    Fault("columns after whole vectors not in the maximum", "absmax", {"absmax": absmax_of_whole_vectors},
          fused=("absmax", *CODES, "fixed_point"), called="code"),
    Fault("a tiny maximum is not zero", "absmax", {"absmax": tiny_absmax_kept}, fused=("absmax", *CODES, "fixed_point")),
    Fault("scale 2^(N-1) over the maximum", "scale_of", {"scale_of": scale_of_128}, fused=CODES),
    Fault("scale by a reciprocal", "scale_of", {"scale_of": scale_by_reciprocal}, fused=CODES),
    Fault("a maximum of zero divides", "scale_of", {"scale_of": scale_of_zero}, fused=()),
    Fault("scale in float16", "scale_of", {"scale_of": scale_in_float16}, fused=CODES),
    Fault("one scale for all tokens", "code", {"code": one_scale_for_all_rows}),
    Fault("per token and per tensor mixed up", "code", {"code": swapped_granularity}),
    Fault("a static scale taken from the values", "code_static", {"code_static": static_scale_from_the_values}),
    Fault("a static scale lets NaN pass", "code_static", {"code_static": static_nan}, fused=("refused",)),
    Fault("beyond a static scale the codes wrap", "code_static", {"code_static": static_wraps}),
    Fault("one exponent for all rows", "fixed_point", {"fixed_point": one_exponent}),
    Fault("fixed point truncated", "fixed_point", {"fixed_point": fixed_point_truncated}),
    Fault("fixed point of 16 bits", "fixed_point", {"fixed_point": fixed_point_of_16_bits}),
    Fault("float32 accumulation", "integer_product", {"integer_product": float32_product}),
    Fault("a float32 product of the codes", "integer_product", {"integer_product": products_in_float32},
          called_fused="fixed_point"),
    Fault("saturating int8 products", "integer_product", {"integer_product": saturating_product}),
    Fault("53 bits for two fixed-point factors", "integer_product", {"integer_product": unsplit_product}),
    Fault("the weights' high part alone", "integer_product", {"integer_product": high_part_alone}),
    Fault("an accumulator of 16 bits", "integer_product", {"integer_product": wrapping(16)},
          called_fused="rescale"),
    Fault("an accumulator of 32 bits", "integer_product", {"integer_product": wrapping(32)}),
    Fault("the last column of an odd number lost", "integer_product", {"integer_product": without_the_last_column(2)}),
    Fault("columns after groups of 8 lost", "integer_product", {"integer_product": without_the_last_column(8)}),
    Fault("scales divided in float64", "rescale", {"rescale": scaled_in_float64}),
    Fault("multiplied by reciprocals of the scales", "rescale", {"rescale": multiplied}),
    Fault("divided by one scale after the other", "rescale", {"rescale": divided_twice}),
    Fault("every token gets the first one's scale", "rescale", {"rescale": first_token_s_scale},
          called_fused="code"),
    Fault("an accumulator rounded to 16 bits", "rescale", {"rescale": rounded_before_the_scale},
          called_fused="integer_product"),
    Fault("codes read back by a reciprocal", "embed", {"dequantize": dequantized_by_reciprocal}, fused=("embed", "dequantize")),
    Fault("the library's exp", "exp", {"exp": np.exp}),
    Fault("exp by powers of two", "exp", {"exp": exp_by_powers_of_two}),
    Fault("exp with subnormal results", "exp", {"exp": subnormal_exp}),
    Fault("the library's log", "log", {"log": np.log}, fused=("log", "log_softmax", "softplus")),
    Fault("log of a subnormal is infinite", "log", {"log": log_without_subnormals}, fused=()),
    Fault("log1p without its correction", "log1p", {"log1p": lambda y: ORIGINAL["log"](f32(1) + y)}, fused=("softplus",)),
    Fault("the library's softplus", "softplus", {"softplus": library_softplus}),
    Fault("softplus is x from 10 on", "softplus", {"softplus": early_softplus}),
    Fault("a reciprocal in silu", "silu", {"silu": library_silu}),
    Fault("silu by tanh", "silu", {"silu": tanh_silu}),
    Fault("silu without the zero's sign", "silu", {"silu": lambda x: ORIGINAL["silu"](x) + f32(0)}),
    Fault("neighbours summed first", "tree_sum", {"tree_sum": adjacent_tree}, fused=("rms_norm", "log_softmax")),
    Fault("a sum in float64", "tree_sum", {"tree_sum": lambda x: x.sum(-1, dtype=np.float64).astype(np.float32)},
          fused=("rms_norm", "log_softmax")),
    Fault("a sum without a power of two", "tree_sum", {"tree_sum": halves_rounded_up}, fused=("rms_norm", "log_softmax")),
    Fault("a sum from left to right", "tree_sum", {"tree_sum": one_by_one}, fused=("rms_norm", "log_softmax")),
    Fault("the next token's embedding", "embed", {"embed": next_row}),
    Fault("a reciprocal of the root", "rms_norm", {"rms_norm": reciprocal_root}),
    Fault("a mean in float64", "rms_norm", {"rms_norm": plain_mean}),
    Fault("epsilon outside the root", "rms_norm", {"rms_norm": eps_outside}),
    Fault("the weight before the root", "rms_norm", {"rms_norm": weight_first}),
    Fault("a layer norm", "rms_norm", {"rms_norm": layer_norm}),
    Fault("swapped taps", "conv1d", {"conv1d": swapped_taps}),
    Fault("newest tap first", "conv1d", {"conv1d": newest_tap_first}),
    Fault("bias before the taps", "conv1d", {"conv1d": bias_first}),
    Fault("a bias where there is none", "conv1d", {"conv1d": bias_that_is_not_there}),
    Fault("always four taps", "conv1d", {"conv1d": always_four_taps}),
    Fault("newest input first in the state", "conv1d", {"conv1d": newest_state_first}),
    Fault("a short call forgets older inputs", "conv1d", {"conv1d": short_call_forgets},
          called_fused="states"),
    Fault("fused multiply-add over the taps", "conv1d", {"conv1d": fused_taps}),
    Fault("silu in the convolution's state", "conv1d", {"conv1d": silu_in_the_convolution_s_state}),
    Fault("dt_proj's bias twice", "step_size", {"step_size": bias_twice}),
    Fault("dt_proj's bias missing", "step_size", {"step_size": without_bias}),
    Fault("the step clamped", "step_size", {"step_size": clamped_step},
          called_fused="selective_scan"),
    Fault("A without its sign", "state_matrix", {"state_matrix": positive_A}, fused=SCAN,
          called_fused="prefill"),
    Fault("A by the library's exp", "state_matrix", {"state_matrix": library_A}, fused=SCAN),
    Fault("(delta B) u", "discretize", {"discretize": delta_B_first}, fused=SCAN),
    Fault("(u B) delta", "discretize", {"discretize": u_B_first}, fused=SCAN),
    Fault("zero-order hold for B", "discretize", {"discretize": exact_hold}, fused=SCAN),
    Fault("a fused multiply-add in the scan", "selective_scan", {"scan": fused_scan}),
    Fault("subnormals flushed to zero", "selective_scan", {"scan": flushing_scan}, fused=("selective_scan", "subnormals")),
    Fault("subnormal states read as zeros", "subnormals", {"selective_scan": scan_flushes_its_inputs}),
    Fault("state lost after 256 tokens", "selective_scan", {"selective_scan": state_lost_after_256}),
    Fault("another tree where states are no power of two", "selective_scan", {"selective_scan": odd_states_in_another_tree}),
    Fault("D u inside the tree", "selective_scan", {"selective_scan": skip_in_the_tree}),
    Fault("D u missing", "selective_scan", {"selective_scan": scan_with(lambda *a: (*a[:5], a[5] * f32(0), a[6]))}),
    Fault("B and C swapped", "selective_scan", {"selective_scan": scan_with(lambda *a: (*a[:3], a[4], a[3], *a[5:]))}),
    Fault("the output before the update", "selective_scan", {"selective_scan": output_before_the_update}),
    Fault("a state of 16 bits", "selective_scan", {"selective_scan": state_of_16_bits}),
    Fault("a parallel scan", "selective_scan", {"selective_scan": parallel_scan}),
    Fault("the gate as one quotient", "gate", {"gate": gate_in_one_quotient}),
    Fault("silu of the wrong side", "gate", {"gate": gate_swapped},
          called_fused="selective_scan"),
    Fault("pack4's halves swapped", "pack4", {"pack4": lambda q: (p := ORIGINAL["pack4"](q)) >> 4 | (p & 15) << 4}, fused=()),
    Fault("unpack4 without a sign", "unpack4", {"unpack4": lambda p, n: ORIGINAL["unpack4"](p, n) & 15}, fused=()),
    Fault("log-softmax from zero", "log_softmax",
          {"log_softmax": lambda x: x - ORIGINAL["log"](ORIGINAL["tree_sum"](ORIGINAL["exp"](x)))[..., None]}),
    Fault("top_p before top_k", "sample",
          {"sample": lambda x, v, t, k, p: ORIGINAL["sample"](x, v, t, 0, p)}, fused=()),
    Fault("a linear layer's bias twice", "add", {}, BiasTwice),
    Fault("in_proj's bias forgotten", "add", {}, BiasForgotten),
    Fault("out_proj's result not coded", "code", {}, OutputNotCoded, fused=("code", "dequantize"), called_fused="add"),
    Fault("an untied head taken for tied", "integer_product", {}, UntiedTakenForTied),
    Fault("smoothing forgotten", "divide_channels", {}, Unsmoothed),
    Fault("logits not checked", "refused", {"check_logits": no_check}),
    Fault("a scale over the batch", "batch", {}, BatchScale, fused=None),
    Fault("the fifth sequence of a batch", "batch", {}, FifthOfABatch, fused=None),
    Fault("padding runs into the state", "batch", {}, PaddingInState, fused=None),
    Fault("all states after the first one's length", "batch", {}, LengthsOfTheFirst, fused=None),
    Fault("the last position of another length", "positions", {}, LastOfTheLongest),
    Fault("no logits, no new state", "positions", {}, NoneKeepsTheState),
    Fault("a batch goes on from the first state", "states", {}, FirstState),
    Fault("the convolution's state forgotten", "states", {}, ForgottenState),
    Fault("the scan's state forgotten", "states", {}, FirstTokenDropped),
    Fault("a later pass loses its first token", "long prefill", {}, LostToken),
    Fault("the state changed in place", "state", {}, InPlaceState),
    Fault("a batch's states changed in place", "state", {}, PrefillInPlaceOfABatch),
    Fault("a step changes the state in place", "state", {}, StepInPlace),
    Fault("a step takes the first token for all", "step", {}, StepOfOneSequence),
    Fault("a fork in another order", "fork", {}, ForkInOrder, fused=("fork", "states")),
)  # fmt: skip


def table() -> str:
    """The faults for docs/VERIFY.md. What misleads verify is in parentheses."""
    lines = ["| fault | an operation each | fused |", "| --- | --- | --- |"]
    for fault in FAULTS:
        fused = " or ".join(fault.names) if fault.shows else "no output depends on it"
        plain = f"({fault.called})" if fault.called else fault.operation
        lines.append(f"| {fault.name} | {plain} | {f'({fault.called_fused})' if fault.called_fused else fused} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
