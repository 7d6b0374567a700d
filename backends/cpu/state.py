"""The recurrent state of a batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refmamba.backends.cpu.kernels.instructions import LANES
from refmamba.backends.cpu.memory import Pool, address, strips_of
from refmamba.spec.arith import F32Array, IntArray
from refmamba.spec.config import MambaConfig


@dataclass(frozen=True, eq=False)
class State:
    """The recurrent state of a batch in strips of 16 channels, a value: no call changes it.

    conv: float32 (stored, n_layer, d_conv - 1, padded d_inner). ssm: float32 (stored, n_layer, strips, d_state, 16).
    rows: which of the stored states each sequence of the batch has; a fork shares them. conv_in and ssm_in: their addresses.
    """

    config: MambaConfig
    conv: F32Array
    ssm: F32Array
    rows: IntArray
    conv_in: IntArray
    ssm_in: IntArray

    @classmethod
    def empty(cls, config: MambaConfig, pool: Pool, batch: int) -> "State":
        """A state that is still to be written."""
        strips = strips_of(config.d_inner)
        conv = (batch, config.n_layer, config.d_conv - 1, strips * LANES)
        ssm = (batch, config.n_layer, strips, config.d_state, LANES)
        size = math.prod(conv)  # whole vectors, so that what follows is aligned too
        memory = pool.take(4 * (size + math.prod(ssm))).view(np.float32)
        start, rows = address(memory), np.arange(batch)
        conv_in = start + rows * (4 * math.prod(conv[1:]))
        ssm_in = start + 4 * size + rows * (4 * math.prod(ssm[1:]))
        return cls(config, memory[:size].reshape(conv), memory[size:].reshape(ssm), rows, conv_in, ssm_in)

    @classmethod
    def of(cls, config: MambaConfig, pool: Pool, conv: F32Array, ssm: F32Array) -> "State":
        """A state of values in the specification's layout."""
        state, pad = cls.empty(config, pool, len(ssm)), ((0, 0), (0, 0), (0, -config.d_inner % LANES), (0, 0))
        state.conv[...] = np.pad(conv, pad).swapaxes(2, 3)
        strips = np.pad(ssm, pad).reshape(*ssm.shape[:2], -1, LANES, config.d_state)
        state.ssm[...] = strips.swapaxes(3, 4)
        return state

    def __reduce__(self) -> tuple[Any, ...]:
        """A deep or pickled copy has memory, and so addresses, of its own."""
        return restored, (self.config, self.conv[self.rows], self.ssm[self.rows])

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.rows)

    def take(self, indices: Sequence[int]) -> "State":
        """The state of the named sequences, in that order; an index may come more than once (a fork).

        Nothing is copied: the whole stored batch stays in memory as long as one of its forks does.
        """
        chosen = list(indices)
        return replace(self, rows=self.rows[chosen], conv_in=self.conv_in[chosen], ssm_in=self.ssm_in[chosen])

    def arrays(self) -> tuple[F32Array, F32Array]:
        """(conv, ssm) in the specification's layout."""
        e = self.config.d_inner
        conv = np.ascontiguousarray(self.conv[self.rows].swapaxes(2, 3)[:, :, :e])
        ssm = self.ssm[self.rows].swapaxes(3, 4).reshape(self.batch, self.config.n_layer, -1, self.config.d_state)
        return conv, np.ascontiguousarray(ssm[:, :, :e])


def restored(config: MambaConfig, conv: F32Array, ssm: F32Array) -> State:
    """A state of these values."""
    state = State.empty(config, Pool(), len(conv))
    state.conv[...], state.ssm[...] = conv, ssm
    return state
