"""One model on one device, as `refmamba.backend.Runner` asks for it; a step on CUDA is one graph."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from refmamba.backend import Targets
from refmamba.backends.adapter import State, scores_of, tensor
from refmamba.backends.triton.call import NO_FAILURE, batch_of, initial_state, last_batch, last_rows
from refmamba.backends.triton.forward import Forward
from refmamba.backends.triton.launch import Launch, launch, log_softmax
from refmamba.backends.triton.table import FEW
from refmamba.spec.arith import F32Array, IntArray
from refmamba.spec.mamba1 import Positions, check_call, check_logits, one_each
from refmamba.spec.parameters import QuantizedModel
from refmamba.spec.trace import Hook


class Graph:
    """A step of a number of sequences as one CUDA graph: tokens and state are copied in, and the new state out."""

    @torch.inference_mode()
    def __init__(self, forward: Forward, sequences: int) -> None:
        self.forward = forward
        self.batch = batch_of([np.zeros(1, np.int64)] * sequences, forward.device)
        self.state, self.new = (initial_state(forward.config, sequences, forward.device) for _ in range(2))
        self.run()  # compiles the kernels, which no capture allows
        torch.cuda.synchronize(forward.device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.run()

    def run(self) -> Tensor:
        """The kernels of a step."""
        self.batch.failure.fill_(NO_FAILURE)
        return self.forward.head(self.forward.body(self.batch, self.state, self.new), self.batch)

    @torch.inference_mode()
    def step(self, tokens: IntArray, state: State) -> tuple[F32Array, State]:
        """See Mamba.step."""
        self.batch.tokens.copy_(torch.from_numpy(tokens))
        self.state.conv.copy_(state.conv)
        self.state.ssm.copy_(state.ssm)
        self.graph.replay()
        new = State(self.new.conv.clone(), self.new.ssm.clone())
        logits = self.logits.cpu().numpy()
        self.forward.check(int(self.batch.failure))
        check_logits(logits)
        return logits, new


class Mamba:
    """One model on one device."""

    def __init__(self, model: QuantizedModel, device: torch.device, launch: Launch = launch) -> None:
        self.model, self.config, self.scheme, self.device = model, model.config, model.scheme, device
        self.forward = Forward(model, device, launch)
        self.graphs: dict[int, Graph] = {}

    def initial_state(self, batch: int) -> State:
        """The state of `batch` sequences before their first token."""
        return initial_state(self.config, batch, self.device)

    def restore_state(self, conv: F32Array, ssm: F32Array) -> State:
        """The state whose `arrays` were these."""
        return State(tensor(conv, self.device), tensor(ssm, self.device))

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
        state = state or initial_state(self.config, len(arrays), self.device)
        batch = batch_of(arrays, self.device, hook)
        new = State(torch.empty_like(state.conv), torch.empty_like(state.ssm))
        scored = last_batch(batch) if logits == "last" else batch
        x = self.forward.body(batch, state, new)
        rows = {"all": [len(a) for a in arrays], "last": [1] * len(arrays), "none": [0] * len(arrays)}[logits]
        if logits == "none":
            y = self.forward.empty(0, self.config.vocab_size)
        else:
            y = self.forward.head(last_rows(x, batch) if logits == "last" else x, scored)
        self.forward.check(int(batch.failure))
        return y, rows, new

    @torch.inference_mode()
    def scores(
        self, sequences: Sequence[IntArray], state: State | None, logits: Positions, targets: Targets
    ) -> tuple[F32Array, NDArray[np.bool_], State]:
        """See `refmamba.backend.Scores`."""
        y, rows, new = self.run(check_call(sequences, state, logits, None, self.config), state, logits)
        values, greedy = scores_of(y, rows, targets, lambda part: log_softmax(part, self.forward.launch))
        return values, greedy, new

    def step(self, tokens: IntArray, state: State, *, hook: Hook | None = None) -> tuple[F32Array, State]:
        """One token for each sequence; see `refmamba.backend.Runner.step`."""
        arrays = check_call(one_each(tokens), state, "last", hook, self.config)
        if self.device.type != "cuda" or hook or len(arrays) > FEW:
            logits, state = self.prefill(arrays, state, hook=hook)
            return np.concatenate(logits), state
        if len(arrays) not in self.graphs:
            self.graphs[len(arrays)] = Graph(self.forward, len(arrays))
        return self.graphs[len(arrays)].step(np.concatenate(arrays), state)
