"""One model by the official kernels: matrices, embedding, convolution and what runs between them in 16 or 32 bits; the small
vectors, the residual stream and the scan's state in float32."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from refmamba.backends.adapter import State, TensorRunner, right_padded, tensor, unpadded
from refmamba.backends.mamba_ssm.kernels import Kernels
from refmamba.backends.mamba_ssm.operations import conv1d, log_softmax, rms_norm, selective_scan
from refmamba.spec import coders
from refmamba.spec.arith import F32Array, IntArray
from refmamba.spec.codes import Param, dequantize
from refmamba.spec.mamba1 import Positions
from refmamba.spec.parameters import QuantizedModel, linear_sites
from refmamba.spec.trace import Hook

KNOWN = frozenset({coders.ParameterPerTensor, coders.ParameterPerChannel, coders.ParameterGrouped})  # of weights, read back
NEVER = -30000.0  # before softplus: a step of 0 in each dtype, which leaves the state as it is


def value(param: Param) -> F32Array:
    """A parameter as float32, read back where it is in codes or in fixed point."""
    return param if isinstance(param, np.ndarray) else dequantize(param)


@dataclass(frozen=True, eq=False)
class Batch:
    """What a layer needs to know of a right-padded batch."""

    lengths: Tensor  # (B,)
    real: Tensor | None  # (B, T, 1): not padding; None where there is none
    hook: Hook | None

    def see(self, site: str, x: Tensor) -> None:
        """Show the one sequence's value."""
        if self.hook:
            self.hook(site, x[0].float().cpu().numpy())

    def masked(self, x: Tensor, padding: float) -> Tensor:
        """x (B, T, K) with a number for padding, which may have become a NaN."""
        return x if self.real is None else x.masked_fill(~self.real, padding)


class Mamba(TensorRunner):
    """One model on one device: the forward of refmamba.spec.mamba1.Mamba, for a batch."""

    def __init__(self, model: QuantizedModel, kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.config, self.scheme = model, model.config, model.scheme
        self.kernels, self.device, self.dtype = kernels, device, dtype
        self.weights: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor | None] = {}
        for site in linear_sites(self.config):
            layer = model.linear(site)
            self.weights[site] = tensor(value(layer.weight), device).to(dtype)
            self.biases[site] = None if layer.bias is None else tensor(layer.bias, device).to(dtype)
        self.params: dict[str, Tensor] = {}
        for name in self.config.shapes():
            if name.removesuffix(".weight") not in self.weights:
                param = value(model.params[name])
                rounded = name == "embedding.weight" or ".conv1d." in name
                held = tensor(model.state_matrix(int(name.split(".")[1])) if name.endswith("A_log") else param, device)
                self.params[name] = held.to(dtype) if rounded else held

    def linear(self, site: str, x: Tensor) -> Tensor:
        """One linear layer. (B, T, K) -> (B, T, rows)."""
        return F.linear(x, self.weights[site], self.biases[site])

    def block(
        self, i: int, x: Tensor, conv_state: Tensor, ssm_state: Tensor | None, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """One block, eq. (24). x float32 (B, T, d); ssm_state: None for zeros."""
        at, params, see = f"layers.{i}", self.params, batch.see
        r, n = self.config.dt_rank, self.config.d_state
        see(f"{at}.residual_in", x)
        normed = rms_norm(x, params[f"{at}.norm.weight"], self.config.norm_eps, self.dtype)
        xz = self.linear(f"{at}.in_proj", normed)
        see(f"{at}.in_proj.out", xz)
        conv_in, z = xz.chunk(2, -1)
        weight, bias = params[f"{at}.conv1d.weight"], params.get(f"{at}.conv1d.bias")
        u, conv_state = conv1d(self.kernels, conv_in, conv_state, weight, bias, batch.lengths, True)
        see(f"{at}.conv_state", conv_state)
        u = batch.masked(u, 0.0)
        see(f"{at}.u", u)
        dtBC = self.linear(f"{at}.x_proj", u)
        see(f"{at}.x_proj.out", dtBC)
        dt, B, C = dtBC[..., :r], dtBC[..., r : r + n], dtBC[..., r + n :]
        dt = batch.masked(self.linear(f"{at}.dt_proj", dt), NEVER)
        A, D, dt_bias = params[f"{at}.A_log"], params[f"{at}.D"], params[f"{at}.dt_proj.bias"]
        y, ssm_state = selective_scan(self.kernels, u, dt, A, B, C, D, ssm_state, z=z, bias=dt_bias)
        see(f"{at}.ssm_state", ssm_state)
        see(f"{at}.gate", y)
        x = x + self.linear(f"{at}.out_proj", y)
        see(f"{at}.residual_out", x)
        return x, conv_state, ssm_state

    def initial_state(self, batch: int) -> State:
        """The state of `batch` sequences before their first token."""
        shape = (batch, self.config.n_layer, self.config.d_inner)
        conv = torch.zeros((*shape, self.config.d_conv - 1), device=self.device, dtype=self.dtype)
        return State(conv, torch.zeros((*shape, self.config.d_state), device=self.device))

    def restore_state(self, conv: F32Array, ssm: F32Array) -> State:
        """The state whose `arrays` were these."""
        return State(tensor(conv, self.device).to(self.dtype), tensor(ssm, self.device))

    def run(
        self, sequences: Sequence[IntArray], state: State | None, logits: Positions, hook: Hook | None = None
    ) -> tuple[Tensor, list[int], State]:
        """See `TensorRunner.run`."""
        before, n = state or self.initial_state(len(sequences)), [len(a) for a in sequences]
        tokens, lengths, real = right_padded(sequences, self.device)
        batch = Batch(lengths, real, hook)
        x = self.params["embedding.weight"][tokens].float()
        batch.see("embedding", x)
        conv, ssm = [], []
        for i in range(self.config.n_layer):
            x, conv_state, ssm_state = self.block(i, x, before.conv[:, i], None if state is None else before.ssm[:, i], batch)
            conv.append(conv_state)
            ssm.append(ssm_state)
        after = State(torch.stack(conv, 1), torch.stack(ssm, 1))
        if logits == "none":
            return torch.empty(0, self.config.vocab_size, device=self.device), [0] * len(n), after
        if logits == "last":
            x, n = x[torch.arange(len(n), device=self.device), lengths - 1][:, None], [1] * len(n)
            real = None
        y = self.linear("lm_head", rms_norm(x, self.params["norm_f.weight"], self.config.norm_eps, self.dtype))
        batch.see("lm_head.out", y)
        return unpadded(y, real).float(), n, after

    def log_softmax(self, logits: Tensor) -> Tensor:
        """See `TensorRunner.log_softmax`."""
        return log_softmax(logits)
