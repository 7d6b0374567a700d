"""The forward of Mamba-1 for one sequence, and its state (docs/SPEC.md, sections 3 and 6)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np

from refmamba.errors import DataError, NonFiniteError
from refmamba.spec.arith import F32Array, IntArray, f32, silu
from refmamba.spec.codes import FixedPoint
from refmamba.spec.config import MambaConfig
from refmamba.spec.ops import add, conv1d, embed, gate, rms_norm, selective_scan, step_size
from refmamba.spec.parameters import QuantizedModel, linear_sites
from refmamba.spec.trace import Hook, Step, Trace, Tracer

Positions = Literal["all", "last", "none"]


@dataclass(frozen=True, eq=False)
class State:
    """The recurrent state of a batch, a value: no call changes it. Float32, the batch axis first.

    conv: (batch, n_layer, d_inner, d_conv - 1), the last inputs of each convolution, oldest first.
    ssm: (batch, n_layer, d_inner, d_state), h of each scan.
    """

    conv: F32Array
    ssm: F32Array

    @classmethod
    def zeros(cls, config: MambaConfig, batch: int) -> "State":
        """The state before the first token: +0.0 everywhere."""
        shape = (batch, config.n_layer, config.d_inner)
        return cls(np.zeros((*shape, config.d_conv - 1), np.float32), np.zeros((*shape, config.d_state), np.float32))

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.ssm)

    def take(self, indices: Sequence[int]) -> "State":
        """The state of the named sequences, in that order; an index may come more than once (a fork)."""
        return State(self.conv[list(indices)], self.ssm[list(indices)])

    def arrays(self) -> tuple[F32Array, F32Array]:
        """(conv, ssm) as NumPy arrays."""
        return self.conv, self.ssm


class Mamba:
    """The reference forward of one QuantizedModel. A batch is its sequences one after the other."""

    def __init__(self, model: QuantizedModel) -> None:
        self.model, self.config, self.scheme = model.held(), model.config, model.scheme
        self.A = [self.model.state_matrix(i) for i in range(self.config.n_layer)]
        embedding = self.model.params["embedding.weight"]
        assert not isinstance(embedding, FixedPoint)
        self.embedding = embedding
        self.linear = {site: self.model.linear(site) for site in linear_sites(self.config)}

    def block(
        self, i: int, x: F32Array, conv_state: F32Array, ssm_state: F32Array, do: Tracer
    ) -> tuple[F32Array, F32Array, F32Array]:
        """One block, eq. (24): the Mamba paper's figure 3.

        # SHAPES   x (L, d), conv_state (e, k-1), ssm_state (e, n) -> the same
        # COMPUTE  norm, in_proj, convolution, silu, x_proj, dt_proj, scan, gate, out_proj, residual
        # OUTPUT   the residual stream, and both states after the last token
        """
        at, value = f"layers.{i}", self.model.value
        r, n = self.config.dt_rank, self.config.d_state
        do.see(f"{at}.residual_in", x)
        normed = do(f"{at}.norm", rms_norm, x, value(f"{at}.norm.weight"), self.config.norm_eps)
        xz = self.linear[f"{at}.in_proj"](normed, do)  # (L, d) -> (L, 2e)
        conv_in, z = np.split(xz, 2, axis=1)
        weight, bias = value(f"{at}.conv1d.weight"), value(f"{at}.conv1d.bias") if self.config.use_conv_bias else None
        conv, conv_state = do(f"{at}.conv1d {at}.conv_state", conv1d, conv_in, conv_state, weight, bias)
        u = do(f"{at}.u", silu, conv)
        dtBC = self.linear[f"{at}.x_proj"](u, do)  # (L, e) -> (L, r + 2n)
        dt, B, C = dtBC[:, :r], dtBC[:, r : r + n], dtBC[:, r + n :]
        dt = self.linear[f"{at}.dt_proj"](dt, do)  # (L, r) -> (L, e)
        delta = do(f"{at}.delta", step_size, dt, value(f"{at}.dt_proj.bias"))
        D = value(f"{at}.D")
        y, ssm_state = do(f"{at}.scan {at}.ssm_state", selective_scan, u, delta, self.A[i], B, C, D, ssm_state)
        gated = do(f"{at}.gate", gate, y, z)
        x = do(f"{at}.residual_out", add, x, self.linear[f"{at}.out_proj"](gated, do))  # (L, e) -> (L, d)
        return x, conv_state, ssm_state

    def forward(
        self, tokens: IntArray, conv: F32Array, ssm: F32Array, positions: Positions, do: Tracer
    ) -> tuple[F32Array, F32Array, F32Array]:
        """One sequence through the model.

        # SHAPES   tokens (L,), conv (n_layer, e, k-1), ssm (n_layer, e, n) -> (L, 1 or 0, vocabulary), conv, ssm
        # COMPUTE  embedding, the blocks, the last norm, the head at the positions asked for
        # OUTPUT   logits, and the states after the last token
        """
        x = do("embedding", embed, tokens, self.embedding)
        conv_out, ssm_out = np.empty_like(conv), np.empty_like(ssm)
        for i in range(self.config.n_layer):
            x, conv_out[i], ssm_out[i] = self.block(i, x, conv[i], ssm[i], do)
        if positions == "none":
            return np.empty((0, self.config.vocab_size), f32), conv_out, ssm_out
        x = x if positions == "all" else x[-1:]
        x = do("norm_f", rms_norm, x, self.model.value("norm_f.weight"), self.config.norm_eps)
        logits = self.linear["lm_head"](x, do)
        check_logits(logits)
        return logits, conv_out, ssm_out

    def trace(self, tokens: IntArray, state: State | None = None) -> Trace:
        """Every operation of one sequence's forward, with its arguments and its result. tokens: (L,). Raises DataError."""
        steps: list[Step] = []
        state = state or self.initial_state(1)
        self.forward(check_tokens(tokens, self.config), state.conv[0], state.ssm[0], "all", Tracer(record=steps.append))
        return Trace(steps)

    def initial_state(self, batch: int) -> State:
        """The state of `batch` sequences before their first token."""
        return State.zeros(self.config, batch)

    def restore_state(self, conv: F32Array, ssm: F32Array) -> State:
        """The state whose `arrays` were these."""
        return State(conv.copy(), ssm.copy())

    def prefill(
        self,
        sequences: Sequence[IntArray],
        state: State | None = None,
        *,
        logits: Positions = "last",
        hook: Hook | None = None,
    ) -> tuple[list[F32Array], State]:
        """Run each sequence from its state on; see `refmamba.backend.Runner.prefill`."""
        sequences = check_call(sequences, state, logits, hook, self.config)
        state = state or self.initial_state(len(sequences))
        do = Tracer(hook)
        results = [self.forward(tokens, state.conv[b], state.ssm[b], logits, do) for b, tokens in enumerate(sequences)]
        return [r[0] for r in results], State(np.stack([r[1] for r in results]), np.stack([r[2] for r in results]))

    def step(self, tokens: IntArray, state: State, *, hook: Hook | None = None) -> tuple[F32Array, State]:
        """One token for each sequence; see `refmamba.backend.Runner.step`."""
        logits, state = self.prefill(one_each(tokens), state, hook=hook)
        return np.concatenate(logits), state


def check_tokens(tokens: IntArray, config: MambaConfig) -> IntArray:
    """The tokens of one sequence as int64 (L,). Raises DataError for none, for what is no whole number, or for one outside the
    vocabulary."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or len(tokens) == 0 or tokens.dtype.kind not in "iu":
        raise DataError(
            f"a sequence is whole numbers in one row, at least one; it is {tokens.dtype} of the shape {tokens.shape}"
        )
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise DataError(f"tokens are 0 to {config.vocab_size - 1}; the sequence has {tokens.min()} to {tokens.max()}")
    return tokens.astype(np.int64)


class HasBatch(Protocol):
    """A state, as far as a call is checked."""

    @property
    def batch(self) -> int:
        """Number of sequences."""


def check_call(
    sequences: Sequence[IntArray], state: HasBatch | None, positions: str, hook: Hook | None, config: MambaConfig
) -> list[IntArray]:
    """What every backend's prefill checks: the sequences as int64. Raises DataError for arguments that do not fit."""
    if len(sequences) == 0:
        raise DataError("a call needs at least one sequence")
    if state is not None and state.batch != len(sequences):
        raise DataError(f"{len(sequences)} sequences need as many states; there are {state.batch}")
    if positions not in get_args(Positions):
        raise DataError(f"logits are asked for as {', '.join(get_args(Positions))}, not as {positions!r}")
    if hook and len(sequences) != 1:
        raise DataError("a hook looks at one sequence at a time")
    return [check_tokens(tokens, config) for tokens in sequences]


def one_each(tokens: IntArray) -> list[IntArray]:
    """The tokens of a step (batch,) as sequences of one each. Raises DataError for another shape."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 1:
        raise DataError(f"a step takes one token for each sequence, (batch,); the tokens have the shape {tokens.shape}")
    return [tokens[b : b + 1] for b in range(len(tokens))]


def check_logits(logits: F32Array) -> None:
    """Raise NonFiniteError for logits that hold a NaN or an infinity: no such call has a result (SPEC section 6)."""
    for row in logits:  # one by one: of a large vocabulary, many rows fill a cache
        if not np.isfinite(row).all():
            raise NonFiniteError("lm_head: a logit is NaN or infinite; check the weights and the input")
