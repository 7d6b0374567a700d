"""The kernels of a call: a fixed sequence, with no synchronization before its results are read.

A step of few sequences is four kernels a layer where the scheme has no `out` side: norm, codes and in_proj; convolution,
codes and x_proj; codes, dt_proj, scan and gate; codes, out_proj and the residual. Any other call takes a kernel for the codes
and one for the product of each linear layer, one that makes bytes of a packed weight, and one for each `out` side.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from refmamba.backends.adapter import State, tensor
from refmamba.backends.triton.call import NO_FAILURE, Batch
from refmamba.backends.triton.kernels import layers
from refmamba.backends.triton.launch import Launch
from refmamba.backends.triton.parameters import Coding, Linear, Weight, linear_of, table_of
from refmamba.backends.triton.table import (
    power_of_two,
    product_blocks,
    row_blocks,
    scan_blocks,
    spread_block,
    step_blocks,
    step_tile,
)
from refmamba.errors import NonFiniteError
from refmamba.spec import transforms
from refmamba.spec.parameters import QuantizedModel, linear_sites


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


class Forward:
    """The kernels of a model on one device: the forward of refmamba.spec.mamba1.Mamba, for a batch."""

    def __init__(self, model: QuantizedModel, device: torch.device, launch: Launch) -> None:
        self.config, self.device, self.launch = model.config, device, launch
        sites = linear_sites(self.config)
        self.layers = {site: linear_of(model.linear(site), 2 * i, device) for i, site in enumerate(sites)}
        self.params = {
            # A convolution's taps each in a row, so that the channels of one lie side by side.
            name: tensor(model.value(name).T.copy() if name.endswith("conv1d.weight") else model.value(name), device)
            for name in self.config.shapes()
            if name.removesuffix(".weight") not in (*self.layers, "embedding") and not name.endswith("A_log")
        }
        self.table = self.layers["lm_head"].weight if model.shares_codes else table_of(model.params["embedding.weight"], device)
        A = [model.state_matrix(i) for i in range(self.config.n_layer)]
        # exp_of_decay needs exponents that are no NaN: A is finite, and so is delta, or its call fails.
        self.A, self.decays = [tensor(x, device) for x in A], all(np.isfinite(x).all() for x in A)

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
        if layer.weight.packed and not batch.stepwise:
            layer = replace(layer, weight=self.spread(layer.weight))
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

    def spread(self, weight: Weight) -> Weight:
        """A packed weight as bytes, its steps multiplied in: each block of a product would unpack its part once more."""
        n, k = weight.rows, weight.columns
        q, (columns, depth) = self.empty(1, n, k, dtype=torch.int8), spread_block(k)
        self.launch(layers.spread_kernel, (triton.cdiv(n, columns), triton.cdiv(k, depth)), 4, w_ptr=weight.digits,
                    steps_ptr=weight.steps, q_ptr=q, N=n, K=k, GROUP=weight.group, BN=columns, BK=depth)  # fmt: skip
        return Weight(q, weight.scale, n, k)

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
        blocks = product_blocks(rows, n, k, coding.digits, weight.planes)
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
        conv = Source("conv", xz[:, :e], 2 * e, value[f"{at}.conv1d.weight"], value.get(f"{at}.conv1d.bias"),
                      state=state.conv[:, i], new_state=new.conv[:, i], u=u, taps=c.d_conv)  # fmt: skip
        dtBC = self.linear(f"{at}.x_proj", conv, batch)
        see(f"{at}.conv_state", new.conv[0, i])
        see(f"{at}.u", u)
        see(f"{at}.x_proj.out", dtBC)
        dt = Source("plain", dtBC, r + 2 * n)
        scan: dict[str, Any] = {
            "u_ptr": u, "B_ptr": dtBC[:, r:], "C_ptr": dtBC[:, r + n :], "z_ptr": xz[:, e:],
            "A_ptr": self.A[i], "D_ptr": value[f"{at}.D"], "h_ptr": state.ssm[:, i], "new_h_ptr": new.ssm[:, i],
            "h_stride": state.ssm.stride(0), "DECAYS": self.decays, "STATES": n, "N": power_of_two(n),
        }  # fmt: skip
        gated = self.empty(rows, e)
        if batch.stepwise and self.layers[f"{at}.dt_proj"].plain:
            self.scan_step(self.layers[f"{at}.dt_proj"], dt, scan, value[f"{at}.dt_proj.bias"], gated, batch)
        else:
            delta = self.linear(f"{at}.dt_proj", dt, batch, dt_bias=value[f"{at}.dt_proj.bias"])
            blocks = scan_blocks(batch.sequences, e, n)
            grid = (triton.cdiv(e, blocks.channels), batch.sequences)
            self.launch(layers.scan_kernel, grid, 1, **scan, delta_ptr=delta, E=e, BC_STRIDE=r + 2 * n, Z_STRIDE=2 * e,
                        start_ptr=batch.start, length_ptr=batch.length, y_ptr=gated, TILE=blocks.tile,
                        LANES=blocks.lanes, BE=blocks.channels)  # fmt: skip
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
                    z_stride=2 * weight.rows, channels=weight.rows, x_ptr=dt.x, x_stride=dt.stride,
                    static_ptr=coding.static, failure_ptr=batch.failure, site=layer.number, w_ptr=weight.digits,
                    steps_ptr=weight.steps,
                    w_scale_ptr=weight.scale, y_bias_ptr=bias, y_ptr=gated, rows=batch.rows, K=weight.columns,
                    CODER=coding.of_a_step, largest=coding.largest, GROUP=weight.group,
                    DIGITS=coding.digits, PLACES=max(coding.digits, 16 // blocks.rows), PLANES=weight.planes,
                    PACKED=weight.packed, TILE=step_tile(self.config.d_state), M=blocks.rows, BN=n,
                    BK=min(blocks.depth, max(power_of_two(weight.columns), 32)))  # fmt: skip

    def body(self, batch: Batch, state: State, new: State) -> Tensor:
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

    def check(self, failure: int) -> None:
        """Raise NonFiniteError where a site was to make a code of a NaN or an infinity."""
        if failure != NO_FAILURE:
            site = next(layer.site for layer in self.layers.values() if layer.number == failure - failure % 2)
            side = "result" if failure % 2 else "in"
            raise NonFiniteError(
                f"{site}.{side}: a value is NaN or infinite, so it has no codes; check the weights and the input"
            )
