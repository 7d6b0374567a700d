"""One call on a device: the rows of its sequences, and the states that they go on from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from refmamba.backends.adapter import State, tensor
from refmamba.backends.triton.table import FEW
from refmamba.spec.arith import IntArray
from refmamba.spec.config import MambaConfig
from refmamba.spec.trace import Hook

NO_FAILURE = 1 << 30
ALIGNED = 64  # numbers of int32: Triton compiles a kernel again for a pointer that is less aligned


def initial_state(config: MambaConfig, batch: int, device: torch.device) -> State:
    """The state of `batch` sequences before their first token."""
    shape = (batch, config.n_layer, config.d_inner)
    conv = torch.zeros((*shape, config.d_conv - 1), device=device)
    return State(conv, torch.zeros((*shape, config.d_state), device=device))


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


def batch_of(sequences: Sequence[IntArray], device: torch.device, hook: Hook | None = None) -> Batch:
    """The rows of some sequences, in one transfer."""
    lengths = np.array([len(s) for s in sequences])
    position = np.concatenate([np.arange(n) for n in lengths])
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    parts = [np.concatenate(sequences), sequence, position, np.cumsum(lengths) - lengths, lengths, np.array([NO_FAILURE])]
    padded = [np.pad(part, (0, -len(part) % ALIGNED)) for part in parts]
    moved = torch.split(tensor(np.concatenate(padded).astype(np.int32), device), [len(part) for part in padded])
    tokens, of, at, start, length, failure = (x[: len(part)] for x, part in zip(moved, parts, strict=True))
    return Batch(tokens, of, at, start, length, len(position), len(lengths), failure, hook)


def last_batch(batch: Batch) -> Batch:
    """The last row of each sequence as a call of one token each. A transfer waits for kernels, so it comes before them."""
    if batch.rows == batch.sequences:
        return batch
    return replace(batch_of([np.zeros(1, np.int64)] * batch.sequences, batch.tokens.device, batch.hook), failure=batch.failure)


def last_rows(x: Tensor, batch: Batch) -> Tensor:
    """The last row of each sequence."""
    return x if batch.rows == batch.sequences else x.index_select(0, batch.start + batch.length - 1)
