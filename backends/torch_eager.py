"""The specification in eager PyTorch: a batch at a time, on a CPU or a CUDA device by the same code, with the same bits.

Every function is the specification's of the same name, with a batch axis in front; the equations are docs/SPEC.md's.
Where PyTorch has an obvious way that gives other bits, a comment says so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, overload

import numpy as np
import torch
from torch import Tensor

from refmamba.backend import check_support
from refmamba.errors import BackendError, NonFiniteError
from refmamba.spec import arith, coders, linear
from refmamba.spec import codes as spec
from refmamba.spec.arith import F32Array, IntArray
from refmamba.spec.codes import BLOCK, LONGEST_ROW, LOW_PART
from refmamba.spec.mamba1 import Positions, check_tokens
from refmamba.spec.parameters import QuantizedModel, linear_sites
from refmamba.spec.scheme import Scheme
from refmamba.spec.trace import Hook

SCAN_CHUNK = 64  # tokens discretized at a time, to bound memory


@dataclass(frozen=True, eq=False)
class Codes:
    """quantize.Codes: q is int8 or int16 (..., K), the scale float32 and broadcasts against q."""

    q: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """q / scale, eq. (9)."""
        return self.q.float() / self.scale


@dataclass(frozen=True, eq=False)
class FixedPoint:
    """quantize.FixedPoint: q is int32 (..., K), the exponent int32 (..., 1)."""

    q: Tensor
    exponent: Tensor


def two_to(n: Tensor) -> Tensor:
    """2^n as float32, by its bits."""
    return ((n + 127) << 23).view(torch.float32)


def two_to_f64(n: Tensor) -> Tensor:
    """2^n as float64, by its bits: torch.ldexp computes a float32 pow."""
    return ((n.long() + 1023) << 52).view(torch.float64)


def exp(x: Tensor) -> Tensor:
    """Eq. (1)."""
    zero = torch.zeros((), device=x.device)
    inside = (x >= float(arith.EXP_LOW)) & (x <= float(arith.EXP_HIGH))
    a = torch.where(inside, x, zero)
    n = torch.round(a * float(arith.LOG2_E))
    r = (a - n * float(arith.LN2_HIGH)) - n * float(arith.LN2_LOW)
    p = torch.full_like(r, float(arith.EXP_TERMS[0]))
    for term in arith.EXP_TERMS[1:]:
        p = p * r + float(term)  # two kernels, so two roundings; addcmul would be free to fuse them
    p = (p * (r * r) + r) + 1.0
    whole = n.int()
    half = whole >> 1
    y = (p * two_to(half)) * two_to(whole - half)
    outside = torch.where(x > float(arith.EXP_HIGH), zero + torch.inf, torch.where(x < float(arith.EXP_LOW), zero, x))
    return torch.where(inside, y, outside)


def log(x: Tensor) -> Tensor:
    """Eq. (2)."""
    zero = torch.zeros((), device=x.device)
    usual = (x > 0) & (x < torch.inf)
    a = torch.where(usual, x, zero + 1.0)
    subnormal = a < 2.0**-126
    a = torch.where(subnormal, a * float(arith.TWO_25), a)
    bits = a.view(torch.int32)
    k = (bits - int(arith.SQRT_HALF_BITS)) >> 23
    f = (bits - (k << 23)).view(torch.float32) - 1.0
    n = torch.where(subnormal, k - 25, k).float()
    p = torch.full_like(f, float(arith.LOG_TERMS[0]))
    for term in arith.LOG_TERMS[1:]:
        p = p * f + float(term)
    square = f * f
    y = (((p * f) * square + n * float(arith.LN2_LOW)) - square * 0.5) + f
    y = y + n * float(arith.LN2_HIGH)
    special = torch.where(x == 0, zero - torch.inf, torch.where(x > 0, x, zero + torch.nan))
    return torch.where(usual, y, special)


def log1p(y: Tensor) -> Tensor:
    """Eq. (3)."""
    u = y + 1.0
    return log(u) + (y - (u - 1.0)) / u


def softplus(x: Tensor) -> Tensor:
    """Eq. (4)."""
    positive = torch.maximum(x, torch.zeros((), device=x.device))
    return torch.where(x > float(arith.SOFTPLUS_LINEAR), x, positive + log1p(exp(-x.abs())))


def silu(x: Tensor) -> Tensor:
    """Eq. (5)."""
    return x / (exp(-x) + 1.0)


def tree_sum(x: Tensor) -> Tensor:
    """Eq. (6), over the last axis."""
    width = 1 << (x.shape[-1] - 1).bit_length()
    x = torch.nn.functional.pad(x, (0, width - x.shape[-1]))
    while width > 1:
        width //= 2
        x = x[..., :width] + x[..., width:]
    return x[..., 0]


def absmax(x: Tensor, site: str, axes: tuple[int, ...]) -> Tensor:
    """Eq. (7), over the last or the last two axes, which stay with length 1. amax hands a NaN on, as it should."""
    m = x.abs().amax(axes, keepdim=True)
    if not bool(torch.isfinite(m).all()):
        raise NonFiniteError(f"{site}: a value is NaN or infinite, so it has no codes; check the weights and the input")
    return torch.where(m < float(spec.ABSMAX_ZERO), torch.zeros_like(m), m)


def scale_of(m: Tensor, bits: int) -> Tensor:
    """Eq. (7). The dividend is a tensor: `number / tensor` would be a multiplied reciprocal."""
    one = torch.ones((), device=m.device)
    return torch.where(m == 0, one, one * float(2 ** (bits - 1) - 1) / torch.where(m == 0, one, m))


def to_codes(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Eq. (8). torch.round is half to even; the clamp is before the cast."""
    largest = float(2 ** (bits - 1) - 1)
    return torch.round((x * scale).clamp(-largest, largest)).to(torch.int8 if bits <= 8 else torch.int16)


def code(x: Tensor, bits: int, site: str, axes: tuple[int, ...]) -> Codes:
    """Eq. (7, 8)."""
    m = absmax(x, site, axes)
    scale = scale_of(m, bits)
    return Codes(to_codes(torch.where(m == 0, torch.zeros_like(x), x), scale, bits), scale)


def code_static(x: Tensor, static_absmax: Tensor, bits: int, site: str) -> Codes:
    """Eq. (7, 8) with a calibrated absolute maximum, shape ()."""
    absmax(x, site, (-2, -1))
    scale = scale_of(static_absmax, bits)
    return Codes(to_codes(torch.where(static_absmax > 0, x, torch.zeros_like(x)), scale, bits), scale)


def fixed_point(x: Tensor, magnitude_bits: int, site: str) -> FixedPoint:
    """Eq. (10), a power of two for each row. An absmax that is not zero is a normal number: E is in its bits."""
    m = absmax(x, site, (-1,))
    exponent = (magnitude_bits - ((m.view(torch.int32) >> 23) - 126)).clamp(max=126)
    exponent = torch.where(m == 0, torch.zeros_like(exponent), exponent)
    x = torch.where(m == 0, torch.zeros_like(x), x)
    return FixedPoint(torch.round(x.double() * two_to_f64(exponent)).int(), exponent)


def int8_product(x: Tensor, w: Tensor) -> Tensor:
    """x @ w.T for int8 matrices, in int32. CUDA wants more than 16 rows and multiples of 8: zeros change no sum."""
    n, k = x.shape
    rows = len(w)
    x = torch.nn.functional.pad(x, (0, -k % 8, 0, max(32, n + -n % 8) - n))
    w = torch.nn.functional.pad(w, (0, -k % 8, 0, -rows % 8))
    product: Tensor = torch._int_mm(x, w.T)
    return product[:n, :rows]


def int8_product_is_exact(k: int, device: torch.device) -> bool:
    """Whether int8_product is exact for rows of k, on the extreme codes: before VNNI, oneDNN saturates in silence."""
    signs = torch.ones(32, k, dtype=torch.int8, device=device) * 127
    signs[1::2, ::2] = -127
    try:
        product = int8_product(signs, signs)
    except RuntimeError:  # not on this device
        return False
    return torch.equal(product.double(), signs.double() @ signs.double().T)


def integer_product(x: Codes | FixedPoint, w: Codes | FixedPoint, int8: bool) -> Tensor:
    """Exact x.q @ w.q.T as float64, eq. (11, 12): (..., K), (rows, K) -> (..., rows). int8: int8_product is exact."""
    if not (isinstance(x, FixedPoint) and isinstance(w, FixedPoint)):
        if x.q.shape[-1] > LONGEST_ROW:
            raise ValueError(f"rows of {x.q.shape[-1]} are longer than {LONGEST_ROW}, for which the product is exact")
        if int8 and x.q.dtype == w.q.dtype == torch.int8:
            return int8_product(x.q.flatten(0, -2), w.q).double().reshape(*x.q.shape[:-1], len(w.q))
        return x.q.double() @ w.q.double().T
    total = torch.zeros((), dtype=torch.float64, device=w.q.device)
    for start in range(0, w.q.shape[1], BLOCK):
        x_block = x.q[..., start : start + BLOCK].double()
        w_block = w.q[:, start : start + BLOCK]
        lo = ((w_block + LOW_PART // 2) & (LOW_PART - 1)) - LOW_PART // 2
        hi = (w_block - lo) >> 12
        total = total + ((x_block @ hi.double().T) * LOW_PART + x_block @ lo.double().T)
    return total


def rescale(acc: Tensor, x: Codes | FixedPoint, w: Codes | FixedPoint) -> Tensor:
    """Eq. (13). Adding 0.0 turns the -0.0 of a product of length 1 into +0.0."""
    if isinstance(x, FixedPoint):
        acc = acc * two_to_f64(-x.exponent)
    if isinstance(w, FixedPoint):
        acc = acc * two_to_f64(-w.exponent[:, 0])
    y = (acc + 0.0).float()
    if isinstance(w, Codes):
        w_scale = w.scale if w.scale.ndim == 0 else w.scale[:, 0]
        return y / (x.scale * w_scale if isinstance(x, Codes) else w_scale)
    return y / x.scale if isinstance(x, Codes) else y


def embed(tokens: Tensor, embedding: Tensor | Codes) -> Tensor:
    """Eq. (15)."""
    if isinstance(embedding, Tensor):
        return embedding[tokens]
    scale = embedding.scale if embedding.scale.ndim == 0 else embedding.scale[tokens]
    return embedding.q[tokens].float() / scale


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Eq. (16). The float32 square root of PyTorch on a CPU is not correctly rounded; through float64 it is."""
    mean = tree_sum(x * x) / torch.full((), float(x.shape[-1]), device=x.device)
    root = (mean + float(np.float32(eps))).double().sqrt().float()
    return x / root[..., None] * weight


def conv1d(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. (17). (B, T, e), (B, e, k-1) -> the same; the state ends at each sequence's own length."""
    length, taps = x.shape[1], weight.shape[1]
    padded = torch.cat([conv_state.transpose(1, 2), x], 1)
    y = padded[:, :length] * weight[:, 0]
    for tap in range(1, taps):
        y = y + padded[:, tap : tap + length] * weight[:, tap]
    if bias is not None:
        y = y + bias
    last = lengths[:, None] + torch.arange(taps - 1, device=x.device)
    state = padded.gather(1, last[:, :, None].expand(-1, -1, x.shape[2]))
    return y, state.transpose(1, 2).contiguous()


def discretize(delta: Tensor, A: Tensor, B: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. (20)."""
    return exp(delta[..., None] * A), (delta * u)[..., None] * B[..., None, :]


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Eq. (20, 21, 22). (B, T, e), h (B, e, n); past a sequence's length its state stays."""
    parts = []
    for start in range(0, u.shape[1], SCAN_CHUNK):
        now = slice(start, start + SCAN_CHUNK)
        A_bar, B_bar_u = discretize(delta[:, now], A, B[:, now], u[:, now])
        states = []
        for t in range(A_bar.shape[1]):
            following = A_bar[:, t] * h + B_bar_u[:, t]
            h = torch.where((start + t < lengths)[:, None, None], following, h)
            states.append(h)
        parts.append(tree_sum(C[:, now, None] * torch.stack(states, 1)))
    return torch.cat(parts, 1) + D * u, h


def log_softmax(logits: Tensor) -> Tensor:
    """Eq. (25)."""
    shifted = logits - logits.amax(-1, keepdim=True)
    return shifted - log(tree_sum(exp(shifted)))[..., None]


@dataclass(frozen=True, eq=False)
class State:
    """The recurrent state of a batch, a value: model.State as tensors on the device."""

    conv: Tensor
    ssm: Tensor

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.ssm)

    def take(self, indices: Sequence[int]) -> "State":
        """The state of the named sequences, in that order; an index may come more than once."""
        return State(self.conv[list(indices)], self.ssm[list(indices)])

    def arrays(self) -> tuple[F32Array, F32Array]:
        """(conv, ssm) as NumPy arrays."""
        return self.conv.cpu().numpy(), self.ssm.cpu().numpy()


@dataclass(frozen=True, eq=False)
class Batch:
    """What every operation needs to know of a right-padded batch."""

    lengths: Tensor  # (B,)
    real: Tensor | None  # (B, T, 1): not padding; None where there is none
    hook: Hook | None

    def see(self, site: str, value: Tensor) -> None:
        """Show the one sequence's value."""
        if self.hook:
            self.hook(site, value[0].cpu().numpy())

    def masked(self, x: Tensor) -> Tensor:
        """x (B, T, K) with zeros for padding, which takes no part in a scale and cannot overflow."""
        return x if self.real is None else torch.where(self.real, x, torch.zeros_like(x))


class Coder(Protocol):
    """Codes of a batch's activations (B, T, K)."""

    def __call__(self, x: Tensor, site: str, batch: Batch) -> Codes | FixedPoint:
        """Raises NonFiniteError, naming the site."""


def coder_of(coder: coders.Coder, device: torch.device) -> Coder:
    """This backend's form of one of the specification's coders."""
    if isinstance(coder, coders.PerToken | coders.PerTensor):
        bits, axes = coder.bits, (-1,) if isinstance(coder, coders.PerToken) else (-2, -1)
        return lambda x, site, batch: code(batch.masked(x), bits, site, axes)
    if isinstance(coder, coders.Static):
        static, bits = tensor(coder.absmax, device), coder.bits
        return lambda x, site, batch: code_static(batch.masked(x), static, bits, site)
    return lambda x, site, batch: fixed_point(batch.masked(x), spec.ACTIVATION_BITS, site)


KNOWN = frozenset({
    coders.ParameterPerTensor, coders.ParameterPerChannel, coders.PerToken, coders.PerTensor, coders.Static, coders.Smooth,
})  # fmt: skip


class Linear:
    """linear.Linear on the device."""

    def __init__(self, layer: linear.Linear, weight: Codes | FixedPoint, device: torch.device) -> None:
        self.site, self.weight = layer.site, weight
        smooth = [transform for transform in layer.transforms if isinstance(transform, coders.Smooth)]
        self.powers = [two_to_f64(-tensor(transform.exponents, device)) for transform in smooth]
        self.input = coder_of(layer.input, device)
        self.output = None if layer.output is None else coder_of(layer.output, device)
        self.bias = None if layer.bias is None else tensor(layer.bias, device)

    def __call__(self, x: Tensor, batch: Batch, int8: bool) -> Tensor:
        """Eq. (7) to (13). (B, T, K) -> (B, T, rows). int8: int8_product is exact."""
        site, see = self.site, batch.see
        see(f"{site}.in", x)
        for power in self.powers:
            x = (x.double() * power).float()  # eq. (29)
            see(f"{site}.transformed", x)
        codes = self.input(x, f"{site}.in", batch)
        see(f"{site}.in_codes", codes.q)
        acc = integer_product(codes, self.weight, int8)
        see(f"{site}.acc", acc)
        y = rescale(acc, codes, self.weight)
        see(f"{site}.result", y)
        if self.output is not None:
            out = self.output(y, f"{site}.result", batch)
            assert isinstance(out, Codes)
            see(f"{site}.out_codes", out.q)
            y = out.dequantize()
            see(f"{site}.out_value", y)
        if self.bias is not None:
            y = y + self.bias
        see(f"{site}.out", y)
        return y


class Mamba:
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
        self.A = [-exp(self.value(f"layers.{i}.A_log")) for i in range(self.config.n_layer)]
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
            return Codes(tensor(param.q, self.device), tensor(param.scale, self.device))
        if isinstance(param, spec.FixedPoint):
            return FixedPoint(tensor(param.q, self.device), tensor(param.exponent, self.device)[:, None])
        return tensor(param, self.device)

    def linear(self, site: str, x: Tensor, batch: Batch) -> Tensor:
        """One linear layer. (B, T, K) -> (B, T, rows)."""
        return self.layers[site](x, batch, self.int8)

    def value(self, name: str) -> Tensor:
        """A parameter that is not a matrix of a product, as float32."""
        param = self.params[name]
        return param.dequantize() if isinstance(param, Codes) else param

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

    @torch.inference_mode()
    def prefill(
        self,
        sequences: Sequence[IntArray],
        state: State | None = None,
        *,
        logits: Positions = "last",
        hook: Hook | None = None,
    ) -> tuple[list[F32Array], State]:
        """Run each sequence from its state on; see `refmamba.backend.Runner.prefill`."""
        arrays = [check_tokens(s, self.config) for s in sequences]
        if hook and len(arrays) != 1:
            raise ValueError("a hook looks at one sequence at a time")
        state = state or self.initial_state(len(arrays))
        n = [len(a) for a in arrays]
        padded = np.stack([np.pad(a, (0, max(n) - len(a))) for a in arrays])
        lengths = torch.tensor(n, device=self.device)
        real = torch.arange(max(n), device=self.device)[None, :, None] < lengths[:, None, None]
        batch = Batch(lengths, None if min(n) == max(n) else real, hook)
        x = embed(tensor(padded, self.device), self.params["embedding.weight"])
        batch.see("embedding", x)
        conv, ssm = [], []
        for i in range(self.config.n_layer):
            x, conv_state, ssm_state = self.block(i, x, state.conv[:, i], state.ssm[:, i], batch)
            conv.append(conv_state)
            ssm.append(ssm_state)
        state = State(torch.stack(conv, 1), torch.stack(ssm, 1))
        if logits == "none":
            return [np.empty((0, self.config.vocab_size), np.float32) for _ in arrays], state
        if logits == "last":
            x, n = x[torch.arange(len(n), device=self.device), lengths - 1][:, None], [1] * len(n)
            batch = replace(batch, real=None)
        x = rms_norm(x, self.value("norm_f.weight"), self.config.norm_eps)
        batch.see("norm_f", x)
        y = self.linear("lm_head", x, batch).cpu().numpy()
        return [row[:length] for row, length in zip(y, n, strict=True)], state

    def step(self, tokens: IntArray, state: State, *, hook: Hook | None = None) -> tuple[F32Array, State]:
        """One token for each sequence; see `refmamba.backend.Runner.step`."""
        logits, state = self.prefill(list(np.asarray(tokens)[:, None]), state, hook=hook)
        return np.concatenate(logits), state


def tensor(x: Any, device: torch.device) -> Tensor:
    """A NumPy array on the device; a copy, so that a model read from a file's memory map stays untouched."""
    return torch.tensor(np.asarray(x), device=device)


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

        Not sample, pack4 and unpack4: they choose a token or store codes and run on the host.
        """
        return Operations(self._device).by_name()


class Operations:
    """The functions above with the specification's signatures."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def by_name(self) -> dict[str, Callable[..., Any]]:
        """Each operation under its name."""
        plain = {f.__name__: self._plain(f) for f in (exp, log, log1p, softplus, silu, tree_sum, rms_norm, log_softmax)}
        own = (self.absmax, self.quantize, self.code, self.code_static, self.fixed_point, self.integer_product,
               self.rescale, self.embed, self.conv1d, self.discretize, self.selective_scan)  # fmt: skip
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
            return Codes(self._in(x.q), self._in(x.scale))
        return FixedPoint(self._in(x.q), self._in(x.exponent)[:, None])

    def _plain(self, f: Callable[..., Tensor]) -> Callable[..., Any]:
        def on_arrays(*values: Any) -> Any:
            return f(*(self._in(v) if isinstance(v, np.ndarray | np.generic) else v for v in values)).cpu().numpy()

        return on_arrays

    def absmax(self, x: F32Array, site: str, granularity: str = "per_tensor") -> Any:
        """quantize.absmax."""
        if granularity == "per_row":
            return absmax(self._in(x), site, (-1,)).cpu().numpy()
        return absmax(self._in(x), site, tuple(range(x.ndim))).reshape(()).cpu().numpy()

    def quantize(self, x: F32Array, scale: F32Array, bits: int) -> Any:
        """quantize.quantize."""
        return to_codes(self._in(x), self._in(scale), bits).cpu().numpy()

    def code(self, x: F32Array, bits: int, site: str, granularity: str = "per_tensor") -> spec.Codes:
        """quantize.code."""
        per_row = granularity == "per_row"
        codes = code(self._in(x), bits, site, (-1,) if per_row else tuple(range(x.ndim)))
        scale = codes.scale if per_row else codes.scale.reshape(())
        return spec.Codes(codes.q.cpu().numpy(), scale.cpu().numpy(), bits)

    def code_static(self, x: F32Array, static_absmax: F32Array, bits: int, site: str) -> spec.Codes:
        """quantize.code_static."""
        codes = code_static(self._in(x), self._in(static_absmax), bits, site)
        return spec.Codes(codes.q.cpu().numpy(), codes.scale.cpu().numpy(), bits)

    def fixed_point(self, x: F32Array, magnitude_bits: int, site: str) -> spec.FixedPoint:
        """quantize.fixed_point."""
        codes = fixed_point(self._in(x), magnitude_bits, site)
        return spec.FixedPoint(codes.q.cpu().numpy(), codes.exponent[:, 0].cpu().numpy())

    def integer_product(self, x: spec.Codes, w: spec.Codes) -> Any:
        """quantize.integer_product."""
        int8 = int8_product_is_exact(x.q.shape[1], self.device)
        return integer_product(self._codes(x), self._codes(w), int8).cpu().numpy()

    def rescale(self, acc: Any, x: spec.Codes, w: spec.Codes) -> Any:
        """quantize.rescale."""
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
