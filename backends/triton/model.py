"""One model on one device: a call is a fixed sequence of kernels, with no synchronization before its results are read.

A step of few sequences is four kernels a layer where the scheme has no `out` side: norm, codes and in_proj; convolution,
codes and x_proj; codes, dt_proj, scan and gate; codes, out_proj and the residual. Any other call takes a kernel for the codes
and one for the product of each linear layer, and one for each `out` side.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from refmamba.backend import Targets
from refmamba.backends.adapter import State, scores_of, tensor
from refmamba.backends.triton.kernels import alone, layers
from refmamba.backends.triton.table import (
    FEW,
    power_of_two,
    product_blocks,
    row_blocks,
    scan_blocks,
    step_blocks,
    step_lanes,
)
from refmamba.errors import NonFiniteError
from refmamba.spec import coders, linear, transforms
from refmamba.spec import codes as spec
from refmamba.spec.arith import F32Array, IntArray
from refmamba.spec.mamba1 import Positions, check_call, check_logits, one_each
from refmamba.spec.parameters import QuantizedModel, linear_sites
from refmamba.spec.trace import Hook

NO_FAILURE = 1 << 30
ALIGNED = 64  # numbers of int32: Triton compiles a kernel again for a pointer that is less aligned
KNOWN = frozenset({
    coders.ParameterPerTensor, coders.ParameterPerChannel, coders.ParameterGrouped, coders.PerToken, coders.PerTensor,
    coders.Static, coders.Flattened, coders.PerTokenOutliers, transforms.Smooth, transforms.Hadamard,
})  # fmt: skip
Launch = Callable[..., None]


def launch(kernel: Any, grid: tuple[int, ...], warps: int, stages: int = 2, /, **arguments: Any) -> None:
    """Start a kernel. Without enable_fp_fusion=False Triton may fuse a multiplication and an addition: other bits."""
    with np.errstate(all="ignore"):  # the interpreter computes in NumPy
        kernel[grid](**arguments, num_warps=warps, num_stages=stages, enable_fp_fusion=False)


def log_softmax(logits: Tensor, launch: Launch) -> Tensor:
    """Eq. (25), (..., vocabulary)."""
    rows = logits.reshape(-1, logits.shape[-1]).contiguous()
    y, (n, k) = torch.empty_like(rows), rows.shape
    launch(alone.log_softmax_kernel, (n,), 16 if k > 8192 else 4, x_ptr=rows, y_ptr=y, N=k, WIDTH=power_of_two(k))
    return y.reshape(logits.shape)


@dataclass(frozen=True, eq=False)
class Coding:
    """How the kernels code one part of one side of a linear layer: CODER and PART, and what they need."""

    coder: str
    largest: float = 0.0
    static: Tensor | None = None  # (2,): the factor of the codes, and the scale
    part: str = "all"
    threshold: float = 0.0

    @property
    def digits(self) -> int:
        """Eight-bit digits of a code."""
        return 4 if self.coder in ("fixed_point", "flattened") else 1

    @property
    def of_a_step(self) -> str:
        """CODER where a sequence is one token."""
        return "per_token" if self.coder == "per_sequence" else self.coder


def codings_of(coder: coders.Coder, device: torch.device) -> list[Coding]:
    """This backend's form of one of the specification's coders: a Coding for each part."""

    def largest(bits: int) -> float:
        return float(2 ** (bits - 1) - 1)

    def static(absmax: F32Array, bits: int) -> Tensor:
        zero = absmax < spec.ABSMAX_ZERO
        scale = spec.scale_of(np.where(zero, np.float32(0), absmax), bits)
        return tensor(np.array([0 if zero else scale, scale], np.float32), device)

    match coder:
        case coders.PerToken(bits=bits):
            return [Coding("per_token", largest(bits))]
        case coders.PerTensor(bits=bits):
            return [Coding("per_sequence", largest(bits))]
        case coders.Static(bits=bits, absmax=absmax):
            return [Coding("static", largest(bits), static(absmax, bits))]
        case coders.Flattened(bits=bits, absmax=absmax):
            return [Coding("flattened", static=static(absmax, bits))]
        case coders.PerTokenOutliers(bits=bits, threshold=threshold):
            limit = float(np.float32(threshold))
            below = Coding("per_token", largest(bits), part="below", threshold=limit)
            return [below, Coding("fixed_point", part="outliers", threshold=limit)]
        case _:
            return [Coding("fixed_point")]


@dataclass(frozen=True, eq=False)
class Weight:
    """The codes of a matrix: digits int8 (planes, rows, columns), or eq. (14)'s bytes; a scale or exponent for each row."""

    digits: Tensor
    scale: Tensor
    rows: int
    columns: int
    packed: bool = False
    steps: Tensor | None = None  # uint8 (rows, ceil(columns / group)), eq. (30)
    group: int = 0

    @property
    def planes(self) -> int:
        """Eight-bit digits of a code."""
        return 1 if self.packed else len(self.digits)


def weight_of(codes: spec.Codes | spec.FixedPoint, device: torch.device) -> Weight:
    """A matrix's codes on the device."""
    rows, columns = codes.q.shape
    if isinstance(codes, spec.FixedPoint):
        shifted = tensor(codes.q, device) + 0x8080  # the balanced digits, the two low ones each 128 too large
        digits = torch.stack([*(((shifted >> at) & 255) - 128 for at in (0, 8)), shifted >> 16]).to(torch.int8)
        return Weight(digits, tensor(codes.exponent, device), rows, columns)
    scale = tensor(np.broadcast_to(codes.scale.reshape(-1), rows), device)
    steps = None if codes.steps is None else tensor(codes.steps, device)
    q = spec.pack4(codes.q) if codes.bits <= 4 else codes.q[None]
    return Weight(tensor(q, device), scale, rows, columns, codes.bits <= 4, steps, codes.group)


@dataclass(frozen=True, eq=False)
class Table:
    """An embedding that stays float32, (rows, columns), as a Weight of which only rows are read."""

    digits: Tensor
    scale: None = None
    packed: bool = False
    steps: None = None
    group: int = 0


def table_of(embedding: spec.Param, device: torch.device) -> Weight | Table:
    """The embedding on the device."""
    if isinstance(embedding, spec.Codes | spec.FixedPoint):
        return weight_of(embedding, device)
    return Table(tensor(embedding, device))


@dataclass(frozen=True, eq=False)
class Linear:
    """linear.Linear on the device. number: of its `in` side among all sites that make codes; its `out` side has the next."""

    site: str
    number: int
    weight: Weight
    transforms: list[Tensor | None]  # exponents of a division, eq. (29); None: a rotation, eq. (31)
    input: list[Coding]
    output: Coding | None
    bias: Tensor | None

    @property
    def plain(self) -> bool:
        """Nothing but the codes of one part: what scan_step_kernel takes."""
        return not self.transforms and len(self.input) == 1 and self.output is None


def linear_of(layer: linear.Linear, number: int, device: torch.device) -> Linear:
    """A linear layer on the device."""
    changes = [tensor(t.exponents, device) if isinstance(t, transforms.Smooth) else None for t in layer.transforms]
    (output,) = [None] if layer.output is None else codings_of(layer.output, device)
    bias = None if layer.bias is None else tensor(layer.bias, device)
    return Linear(layer.site, number, weight_of(layer.weight, device), changes, codings_of(layer.input, device), output, bias)


@dataclass(frozen=True, eq=False)
class Batch:
    """The rows of a call: every token of every sequence, one after the other."""

    tokens: Tensor  # (rows,) int32
    sequence: Tensor  # (rows,) int32
    position: Tensor  # (rows,) int32, in this call
    start: Tensor  # (sequences,) int32, the first row
    length: Tensor  # (sequences,) int32
    rows: int
    sequences: int
    failure: Tensor  # (1,) int32: the number of the first site with a NaN or an infinity
    hook: Hook | None

    @property
    def stepwise(self) -> bool:
        """One token for each of few sequences: what the fused kernels take."""
        return self.rows == self.sequences <= FEW

    def see(self, site: str, value: Tensor) -> None:
        """Show the one sequence's value."""
        if self.hook:
            self.hook(site, value.cpu().numpy())


@dataclass(frozen=True, eq=False)
class Source:
    """What a linear layer reads: SOURCE, and where it is (see kernels/layers.py)."""

    kind: str
    x: Tensor
    stride: int
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0
    state: Tensor | None = None  # (sequences, d_inner, d_conv - 1), a view into all layers
    new_state: Tensor | None = None
    u: Tensor | None = None
    taps: int = 1

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """The kernels' arguments."""
        return {"x_ptr": self.x, "x_stride": self.stride, "weight_ptr": self.weight, "bias_ptr": self.bias, "eps": self.eps,
                "state_ptr": self.state, "state_stride": 0 if self.state is None else self.state.stride(0),
                "sequence_ptr": batch.sequence, "position_ptr": batch.position,
                "SOURCE": self.kind, "TAPS": self.taps}  # fmt: skip

    def results(self, batch: Batch) -> dict[str, Any]:
        """The arguments of those kernels that also store u and the convolution's state."""
        return {"new_state_ptr": self.new_state, "length_ptr": batch.length, "u_ptr": self.u}


class Mamba:
    """One model on one device: the forward of refmamba.spec.mamba1.Mamba, for a batch."""

    def __init__(self, model: QuantizedModel, device: torch.device, launch: Launch = launch) -> None:
        self.model, self.config, self.scheme, self.device, self.launch = model, model.config, model.scheme, device, launch
        sites = linear_sites(self.config)
        self.layers = {site: linear_of(model.linear(site), 2 * i, device) for i, site in enumerate(sites)}
        self.params = {
            name: tensor(model.value(name), device)
            for name in self.config.shapes()
            if name.removesuffix(".weight") not in (*self.layers, "embedding") and not name.endswith("A_log")
        }
        self.table = self.layers["lm_head"].weight if model.shares_codes else table_of(model.params["embedding.weight"], device)
        A = [model.state_matrix(i) for i in range(self.config.n_layer)]
        # exp_of_decay needs exponents that are no NaN: A is finite, and so is delta, or its call fails.
        self.A, self.decays = [tensor(x, device) for x in A], all(np.isfinite(x).all() for x in A)
        self.graphs: dict[int, Graph] = {}

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory on the device, to be written."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def peaks(self, source: Source, power: Tensor | None, coding: Coding, width: int, batch: Batch) -> Tensor | None:
        """The bits of each sequence's absolute maximum, for a coder that needs them."""
        if coding.coder != "per_sequence":
            return None
        peak = torch.zeros(batch.sequences, dtype=torch.int32, device=self.device)
        blocks = row_blocks(batch.rows, width)
        self.launch(layers.peak_kernel, (triton.cdiv(batch.rows, blocks.rows),), blocks.warps, **source.arguments(batch),
                    power_ptr=power, threshold=coding.threshold, peak_ptr=peak, rows=batch.rows, K=width,
                    WIDTH=blocks.columns if source.kind == "norm" else 1, PART=coding.part, M=blocks.rows,
                    BK=blocks.depth)  # fmt: skip
        return peak

    def rotated(self, layer: Linear, source: Source, power: Tensor | None, batch: Batch) -> Source:
        """Eq. (31) of what a linear layer reads."""
        k, blocks = layer.weight.columns, row_blocks(batch.rows, layer.weight.columns)
        y = self.empty(batch.rows, k)
        self.launch(layers.rotate_kernel, (triton.cdiv(batch.rows, blocks.rows),), blocks.warps, **source.arguments(batch),
                    **source.results(batch), power_ptr=power, failure_ptr=batch.failure, site=layer.number, y_ptr=y,
                    rows=batch.rows, K=k, WIDTH=blocks.columns if source.kind == "norm" else 1, M=blocks.rows,
                    BLOCK=transforms.hadamard_block(k))  # fmt: skip
        return Source("plain", y, k)

    def linear(
        self, site: str, source: Source, batch: Batch, residual: Tensor | None = None, dt_bias: Tensor | None = None
    ) -> Tensor:
        """A linear layer, with eq. (18) after it for dt_proj and the residual's sum for out_proj: (rows, N)."""
        layer = self.layers[site]
        bias = layer.bias if dt_bias is None else dt_bias
        power: Tensor | None = None
        for exponents in layer.transforms:
            if exponents is None:
                source, power = self.rotated(layer, source, power, batch), None
            else:
                power = exponents
        nothing: dict[str, Any] = {"y_bias_ptr": None, "residual_ptr": None, "SOFTPLUS": False}
        after = {"y_bias_ptr": bias, "residual_ptr": residual, "SOFTPLUS": dt_bias is not None}
        y: Tensor | None = None
        for coding in layer.input:
            last = coding is layer.input[-1] and layer.output is None
            y = self.product(layer, coding, source, power, batch, y, after if last else nothing)
        assert y is not None
        if layer.output is None:
            return y
        rows, n = y.shape
        peak = self.peaks(Source("plain", y, n), None, layer.output, n, batch)
        out, blocks = self.empty(rows, n), row_blocks(rows, n)
        self.launch(layers.read_back_kernel, (triton.cdiv(rows, blocks.rows),), blocks.warps, y_ptr=y,
                    sequence_ptr=batch.sequence, peak_ptr=peak, failure_ptr=batch.failure, site=layer.number + 1,
                    bias_ptr=bias, residual_ptr=residual, out_ptr=out, rows=rows, N=n, largest=layer.output.largest,
                    CODER=layer.output.coder, SOFTPLUS=dt_bias is not None, M=blocks.rows, BK=blocks.depth)  # fmt: skip
        return out

    def product(
        self, layer: Linear, coding: Coding, source: Source, power: Tensor | None, batch: Batch, before: Tensor | None,
        after: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """One part of a linear layer, added to the part before it, and what follows: (rows, N)."""
        weight, rows = layer.weight, batch.rows
        n, k = weight.rows, weight.columns
        y = self.empty(rows, n)
        arguments: dict[str, Any] = {
            "failure_ptr": batch.failure, "site": layer.number, "w_ptr": weight.digits, "steps_ptr": weight.steps,
            "w_scale_ptr": weight.scale, "sum_ptr": before, "y_ptr": y, "rows": rows, "N": n, "K": k,
            "DIGITS": coding.digits, "PLANES": weight.planes, "PACKED": weight.packed, "GROUP": weight.group,
        } | after  # fmt: skip
        if batch.stepwise:
            blocks = step_blocks(rows, n)
            grid = (1, triton.cdiv(n, blocks.columns))
            self.launch(layers.linear_kernel, grid, blocks.warps, blocks.stages, **source.arguments(batch),
                        **source.results(batch), **arguments, power_ptr=power, peak_ptr=None, q_ptr=None, scale_ptr=None,
                        largest=coding.largest, threshold=coding.threshold, static_ptr=coding.static, PART=coding.part,
                        WIDTH=power_of_two(k) if source.kind == "norm" else 1, CODER=coding.of_a_step,
                        PLACES=max(coding.digits, 16 // blocks.rows), M=blocks.rows, BN=blocks.columns,
                        BK=min(blocks.depth, max(power_of_two(k), 32)))  # fmt: skip
            return y
        q, scale = self.codes(layer, coding, source, power, batch)
        blocks = product_blocks(rows, n, coding.digits, weight.planes)
        grid = (triton.cdiv(rows, blocks.rows), triton.cdiv(n, blocks.columns))
        stored = Source("codes", q, 0)  # of codes that are there only this counts: whether an exponent goes with them
        self.launch(layers.linear_kernel, grid, blocks.warps, blocks.stages, **stored.arguments(batch),
                    **stored.results(batch), **arguments, power_ptr=None, peak_ptr=None, q_ptr=q, scale_ptr=scale,
                    largest=0.0, threshold=0.0, static_ptr=None, PART="all", WIDTH=1,
                    CODER="fixed_point" if coding.coder == "fixed_point" else "per_token", PLACES=coding.digits,
                    M=blocks.rows, BN=blocks.columns, BK=min(blocks.depth, max(power_of_two(k), 32)))  # fmt: skip
        return y

    def codes(self, layer: Linear, coding: Coding, source: Source, power: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor]:
        """The codes of one part of a linear layer's input: digits (rows, digits, K) int8, scale or exponent (rows,)."""
        k, rows = layer.weight.columns, batch.rows
        q = self.empty(rows, coding.digits, k, dtype=torch.int8)
        scale = self.empty(rows, dtype=torch.int32 if coding.coder == "fixed_point" else torch.float32)
        peak = self.peaks(source, power, coding, k, batch)
        blocks = row_blocks(rows, k)
        self.launch(layers.code_kernel, (triton.cdiv(rows, blocks.rows),), blocks.warps, **source.arguments(batch),
                    **source.results(batch), power_ptr=power, threshold=coding.threshold, peak_ptr=peak,
                    static_ptr=coding.static, failure_ptr=batch.failure, site=layer.number, q_ptr=q, scale_ptr=scale,
                    rows=rows, K=k, largest=coding.largest, WIDTH=blocks.columns if source.kind == "norm" else 1,
                    PART=coding.part, CODER=coding.coder, DIGITS=coding.digits, M=blocks.rows, BK=blocks.depth)  # fmt: skip
        return q, scale

    def block(self, i: int, x: Tensor, state: State, new: State, batch: Batch) -> Tensor:
        """One block, eq. (24)."""
        at, value, see = f"layers.{i}", self.params, batch.see
        c, rows = self.config, batch.rows
        e, r, n = c.d_inner, c.dt_rank, c.d_state
        see(f"{at}.residual_in", x)
        norm = Source("norm", x, c.d_model, value[f"{at}.norm.weight"], eps=float(np.float32(c.norm_eps)))
        xz = self.linear(f"{at}.in_proj", norm, batch)
        see(f"{at}.in_proj.out", xz)
        u = self.empty(rows, e)
        conv = Source("conv", xz, 2 * e, value[f"{at}.conv1d.weight"], value.get(f"{at}.conv1d.bias"), state=state.conv[:, i],
                      new_state=new.conv[:, i], u=u, taps=c.d_conv)  # fmt: skip
        dtBC = self.linear(f"{at}.x_proj", conv, batch)
        see(f"{at}.conv_state", new.conv[0, i])
        see(f"{at}.u", u)
        see(f"{at}.x_proj.out", dtBC)
        dt = Source("plain", dtBC, r + 2 * n)
        scan: dict[str, Any] = {
            "u_ptr": u, "B_ptr": dtBC[:, r:], "C_ptr": dtBC[:, r + n :], "z_ptr": xz[:, e:], "z_stride": 2 * e,
            "A_ptr": self.A[i], "D_ptr": value[f"{at}.D"], "h_ptr": state.ssm[:, i], "new_h_ptr": new.ssm[:, i],
            "h_stride": state.ssm.stride(0), "channels": e, "DECAYS": self.decays, "STATES": n, "N": power_of_two(n),
        }  # fmt: skip
        gated = self.empty(rows, e)
        if batch.stepwise and self.layers[f"{at}.dt_proj"].plain:
            self.scan_step(self.layers[f"{at}.dt_proj"], dt, scan, value[f"{at}.dt_proj.bias"], gated, batch)
        else:
            delta = self.linear(f"{at}.dt_proj", dt, batch, dt_bias=value[f"{at}.dt_proj.bias"])
            blocks = scan_blocks(batch.sequences, e, n)
            grid = (triton.cdiv(e, blocks.channels), batch.sequences)
            self.launch(layers.scan_kernel, grid, blocks.warps, **scan, delta_ptr=delta, bc_stride=r + 2 * n,
                        start_ptr=batch.start, length_ptr=batch.length, y_ptr=gated, LANES=blocks.lanes,
                        BE=blocks.channels)  # fmt: skip
        see(f"{at}.ssm_state", new.ssm[0, i])
        see(f"{at}.gate", gated)
        x = self.linear(f"{at}.out_proj", Source("plain", gated, e), batch, residual=x)
        see(f"{at}.residual_out", x)
        return x

    def scan_step(self, layer: Linear, dt: Source, scan: dict[str, Any], bias: Tensor, gated: Tensor, batch: Batch) -> None:
        """dt_proj, scan and gate of one token for each sequence."""
        weight, (coding,) = layer.weight, layer.input
        blocks = step_blocks(batch.rows, 1)
        n = blocks.columns
        self.launch(layers.scan_step_kernel, (1, triton.cdiv(weight.rows, n)), blocks.warps, blocks.stages, **scan,
                    x_ptr=dt.x, x_stride=dt.stride, static_ptr=coding.static,
                    failure_ptr=batch.failure, site=layer.number, w_ptr=weight.digits, steps_ptr=weight.steps,
                    w_scale_ptr=weight.scale, y_bias_ptr=bias, y_ptr=gated, rows=batch.rows, K=weight.columns,
                    CODER=coding.of_a_step, largest=coding.largest, GROUP=weight.group,
                    DIGITS=coding.digits, PLACES=max(coding.digits, 16 // blocks.rows), PLANES=weight.planes,
                    PACKED=weight.packed, LANES=step_lanes(self.config.d_state), M=blocks.rows, BN=n,
                    BK=min(blocks.depth, max(power_of_two(weight.columns), 32)))  # fmt: skip

    def initial_state(self, batch: int) -> State:
        """The state of `batch` sequences before their first token."""
        shape = (batch, self.config.n_layer, self.config.d_inner)
        conv = torch.zeros((*shape, self.config.d_conv - 1), device=self.device)
        return State(conv, torch.zeros((*shape, self.config.d_state), device=self.device))

    def restore_state(self, conv: F32Array, ssm: F32Array) -> State:
        """The state whose `arrays` were these."""
        return State(tensor(conv, self.device), tensor(ssm, self.device))

    def forward(self, batch: Batch, state: State, new: State) -> Tensor:
        """The residual stream after the last layer, (rows, d_model); the state is written into `new`."""
        d = self.config.d_model
        x = self.empty(batch.rows, d)
        self.launch(layers.embed_kernel, (batch.rows,), 4, token_ptr=batch.tokens, table_ptr=self.table.digits,
                    steps_ptr=self.table.steps, scale_ptr=self.table.scale, y_ptr=x, K=d, PACKED=self.table.packed,
                    GROUP=self.table.group, BK=min(power_of_two(d), 1024))  # fmt: skip
        batch.see("embedding", x)
        for i in range(self.config.n_layer):
            x = self.block(i, x, state, new, batch)
        return x

    def head(self, x: Tensor, batch: Batch) -> Tensor:
        """The logits of some rows (rows, vocabulary)."""
        eps = float(np.float32(self.config.norm_eps))
        y = self.linear("lm_head", Source("norm", x, self.config.d_model, self.params["norm_f.weight"], eps=eps), batch)
        batch.see("lm_head.out", y)
        return y

    def batch_of(self, sequences: Sequence[IntArray], hook: Hook | None = None) -> Batch:
        """The rows of some sequences, in one transfer."""
        lengths = np.array([len(s) for s in sequences])
        position = np.concatenate([np.arange(n) for n in lengths])
        sequence = np.repeat(np.arange(len(lengths)), lengths)
        parts = [np.concatenate(sequences), sequence, position, np.cumsum(lengths) - lengths, lengths, np.array([NO_FAILURE])]
        padded = [np.pad(part, (0, -len(part) % ALIGNED)) for part in parts]
        moved = torch.split(tensor(np.concatenate(padded).astype(np.int32), self.device), [len(part) for part in padded])
        tokens, of, at, start, length, failure = (x[: len(part)] for x, part in zip(moved, parts, strict=True))
        return Batch(tokens, of, at, start, length, len(position), len(lengths), failure, hook)

    def last_batch(self, batch: Batch) -> Batch:
        """The last row of each sequence as a call of one token each. A transfer waits for kernels, so it comes before them."""
        if batch.rows == batch.sequences:
            return batch
        return replace(self.batch_of([np.zeros(1, np.int64)] * batch.sequences, batch.hook), failure=batch.failure)

    def last_rows(self, x: Tensor, batch: Batch) -> Tensor:
        """The last row of each sequence."""
        return x if batch.rows == batch.sequences else x.index_select(0, batch.start + batch.length - 1)

    def check(self, failure: int) -> None:
        """Raise NonFiniteError where a site was to make a code of a NaN or an infinity."""
        if failure != NO_FAILURE:
            site = next(layer.site for layer in self.layers.values() if layer.number == failure - failure % 2)
            side = "result" if failure % 2 else "in"
            raise NonFiniteError(
                f"{site}.{side}: a value is NaN or infinite, so it has no codes; check the weights and the input"
            )

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
        y, rows, new = self.run(check_call(sequences, state, logits, hook, self.config), state, logits, hook)
        arrays = y.cpu().numpy()
        check_logits(arrays)
        return np.split(arrays, np.cumsum(rows)[:-1]), new

    def run(
        self, arrays: Sequence[IntArray], state: State | None, logits: Positions, hook: Hook | None = None
    ) -> tuple[Tensor, list[int], State]:
        """Logits on the device, their rows for each sequence, and the new state. Raises NonFiniteError for a code of a NaN."""
        state = state or self.initial_state(len(arrays))
        batch = self.batch_of(arrays, hook)
        new = State(torch.empty_like(state.conv), torch.empty_like(state.ssm))
        scored = self.last_batch(batch) if logits == "last" else batch
        x = self.forward(batch, state, new)
        rows = {"all": [len(a) for a in arrays], "last": [1] * len(arrays), "none": [0] * len(arrays)}[logits]
        if logits == "none":
            y = self.empty(0, self.config.vocab_size)
        else:
            y = self.head(self.last_rows(x, batch) if logits == "last" else x, scored)
        self.check(int(batch.failure))
        return y, rows, new

    @torch.inference_mode()
    def scores(
        self, sequences: Sequence[IntArray], state: State | None, logits: Positions, targets: Targets
    ) -> tuple[F32Array, NDArray[np.bool_], State]:
        """See `refmamba.backend.Scores`."""
        y, rows, new = self.run(check_call(sequences, state, logits, None, self.config), state, logits)
        values, greedy = scores_of(y, rows, targets, lambda part: log_softmax(part, self.launch))
        return values, greedy, new

    def step(self, tokens: IntArray, state: State, *, hook: Hook | None = None) -> tuple[F32Array, State]:
        """One token for each sequence; see `refmamba.backend.Runner.step`."""
        arrays = check_call(one_each(tokens), state, "last", hook, self.config)
        if self.device.type != "cuda" or hook or len(arrays) > FEW:
            logits, state = self.prefill(arrays, state, hook=hook)
            return np.concatenate(logits), state
        if len(arrays) not in self.graphs:
            self.graphs[len(arrays)] = Graph(self, len(arrays))
        return self.graphs[len(arrays)].step(np.concatenate(arrays), state)


class Graph:
    """A step of a number of sequences as one CUDA graph: tokens and state are copied in, and the new state out."""

    @torch.inference_mode()
    def __init__(self, model: Mamba, sequences: int) -> None:
        self.model = model
        self.batch = model.batch_of([np.zeros(1, np.int64)] * sequences)
        self.state, self.new = model.initial_state(sequences), model.initial_state(sequences)
        self.run()  # compiles the kernels, which no capture allows
        torch.cuda.synchronize(model.device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.run()

    def run(self) -> Tensor:
        """The kernels of a step."""
        self.batch.failure.fill_(NO_FAILURE)
        return self.model.head(self.model.forward(self.batch, self.state, self.new), self.batch)

    @torch.inference_mode()
    def step(self, tokens: IntArray, state: State) -> tuple[F32Array, State]:
        """See Mamba.step."""
        self.batch.tokens.copy_(torch.from_numpy(tokens))
        self.state.conv.copy_(state.conv)
        self.state.ssm.copy_(state.ssm)
        self.graph.replay()
        new = State(self.new.conv.clone(), self.new.ssm.clone())
        logits = self.logits.cpu().numpy()
        self.model.check(int(self.batch.failure))
        check_logits(logits)
        return logits, new
