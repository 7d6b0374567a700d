"""What the backends that compute on tensors share: a batch's state and its tokens, what a model gives and takes beside its
forward, and operations called with arrays."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from refmamba.backend import Targets
from refmamba.spec import codes as spec
from refmamba.spec.arith import F32Array, IntArray
from refmamba.spec.config import MambaConfig
from refmamba.spec.mamba1 import Positions, check_call, check_logits, one_each
from refmamba.spec.trace import Hook

SCORED_ROWS = 512  # of logits at a time, to bound memory


@dataclass(frozen=True, eq=False)
class Codes:
    """codes.Codes as tensors: q is int8 or int16 (..., K), the scale float32 and broadcasts against q."""

    q: Tensor
    scale: Tensor
    bits: int


@dataclass(frozen=True, eq=False)
class FixedPoint:
    """codes.FixedPoint as tensors: q is int32 (..., K), the exponent int32 (..., 1)."""

    q: Tensor
    exponent: Tensor


@dataclass(frozen=True, eq=False)
class State:
    """The recurrent state of a batch, a value: mamba1.State as tensors on the device."""

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
        return self.conv.float().cpu().numpy(), self.ssm.float().cpu().numpy()


def right_padded(sequences: Sequence[IntArray], device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sequences of tokens (L_i,) as one batch: tokens (B, T), lengths (B,), and what is no padding (B, T, 1), None for all."""
    n = [len(tokens) for tokens in sequences]
    lengths, padded = torch.tensor(n, device=device), [np.pad(tokens, (0, max(n) - len(tokens))) for tokens in sequences]
    real = torch.arange(max(n), device=device)[None, :, None] < lengths[:, None, None]
    return tensor(np.stack(padded), device), lengths, None if min(n) == max(n) else real


def unpadded(x: Tensor, real: Tensor | None) -> Tensor:
    """The rows of a right-padded batch (B, T, K) that are no padding, sequence after sequence: (rows, K). real: as above."""
    return x.flatten(0, 1) if real is None else x[real[..., 0]]


def tensor(x: Any, device: torch.device) -> Tensor:
    """A NumPy array on the device; a copy, so that a model read from a file's memory map stays untouched."""
    return torch.tensor(np.asarray(x), device=device)


def to_device(value: Any, device: torch.device) -> Any:
    """An argument of the specification on the device; what is no array stays as it is."""
    if isinstance(value, spec.Codes):
        return Codes(tensor(value.integers(), device), tensor(value.scale, device), value.bits)
    if isinstance(value, spec.FixedPoint):
        return FixedPoint(tensor(value.q, device), tensor(value.exponent, device)[:, None])
    return tensor(value, device) if isinstance(value, np.ndarray | np.generic) else value


def to_arrays(value: Any) -> Any:
    """A result on the device as the specification gives it."""
    if isinstance(value, tuple):
        return tuple(to_arrays(v) for v in value)
    if isinstance(value, Codes):
        return spec.Codes(value.q.cpu().numpy(), value.scale.cpu().numpy(), value.bits)
    if isinstance(value, FixedPoint):
        return spec.FixedPoint(value.q.cpu().numpy(), value.exponent[:, 0].cpu().numpy())
    return value.cpu().numpy()


def on_arrays(functions: Mapping[str, Callable[..., Any]], device: torch.device) -> dict[str, Callable[..., Any]]:
    """Functions on tensors, with the specification's names and signatures, as functions on arrays."""

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *values: to_arrays(function(*(to_device(value, device) for value in values)))

    return {name: wrapped(function) for name, function in functions.items()}


def scores_of(
    logits: Tensor,
    rows_of_each: Sequence[int],
    targets: Targets,
    log_softmax: Callable[[Tensor], Tensor],
) -> tuple[F32Array, NDArray[np.bool_]]:
    """refmamba.backend.Scores of logits (rows, vocabulary) on a device, some rows for each sequence. Raises NonFiniteError."""
    starts = [0, *np.cumsum(rows_of_each).tolist()][: len(targets)]
    flat = [(first + row, token) for first, pairs in zip(starts, targets, strict=True) for row, token in pairs]
    at = torch.tensor(flat, dtype=torch.int64).reshape(-1, 2).to(logits.device)
    column = torch.arange(logits.shape[1], device=logits.device)
    finite = torch.ones((), dtype=torch.bool, device=logits.device)
    values, greedy, begin = [logits.new_empty(0)], [finite.new_empty(0)], 0
    for start in range(0, len(logits), SCORED_ROWS):
        part = logits[start : start + SCORED_ROWS]
        end = begin + sum(start <= row < start + SCORED_ROWS for row, _ in flat[begin:])
        rows, tokens = at[begin:end, 0] - start, at[begin:end, 1]
        values.append(log_softmax(part)[rows, tokens])
        first = torch.where(part == part.amax(-1, keepdim=True), column, len(column)).amin(-1)  # argmax may take any of equals
        greedy.append(first[rows] == tokens)
        finite = finite & torch.isfinite(part).all()
        begin = end
    if not bool(finite):
        check_logits(logits.cpu().numpy())
    return torch.cat(values).cpu().numpy(), torch.cat(greedy).cpu().numpy()


class TensorRunner(ABC):
    """refmamba.backend.Runner's `prefill` and `step`, and its `scores`, of a model whose `run` gives logits on a device."""

    config: MambaConfig

    @abstractmethod
    def run(
        self, sequences: Sequence[IntArray], state: State | None, logits: Positions, hook: Hook | None = None
    ) -> tuple[Tensor, list[int], State]:
        """The forward of a call that `check_call` has passed; state: None for the first token's.

        Returns float32 logits on the device (rows, vocabulary), those of a sequence together; how many rows are each
        sequence's; and the new state. Raises NonFiniteError for a NaN or an infinity that has no codes.
        """

    @abstractmethod
    def log_softmax(self, logits: Tensor) -> Tensor:
        """The backend's own, eq. (25): float32 (rows, vocabulary)."""

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
        y, rows, after = self.run(check_call(sequences, state, logits, hook, self.config), state, logits, hook)
        arrays = y.cpu().numpy()
        check_logits(arrays)
        return np.split(arrays, np.cumsum(rows)[:-1]), after

    @torch.inference_mode()
    def scores(
        self, sequences: Sequence[IntArray], state: State | None, logits: Positions, targets: Targets
    ) -> tuple[F32Array, NDArray[np.bool_], State]:
        """See `refmamba.backend.Scores`."""
        y, rows, after = self.run(check_call(sequences, state, logits, None, self.config), state, logits)
        values, greedy = scores_of(y, rows, targets, self.log_softmax)
        return values, greedy, after

    def step(self, tokens: IntArray, state: State, *, hook: Hook | None = None) -> tuple[F32Array, State]:
        """One token for each sequence; see `refmamba.backend.Runner.step`."""
        logits, state = self.prefill(one_each(tokens), state, hook=hook)
        return np.concatenate(logits), state
