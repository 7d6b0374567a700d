"""One model on one device, as `refmamba.backend.Runner` asks for it; a step on CUDA is one graph."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from refmamba.backends.adapter import State, TensorRunner, tensor
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


class Mamba(TensorRunner):
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

    def run(
        self, sequences: Sequence[IntArray], state: State | None, logits: Positions, hook: Hook | None = None
    ) -> tuple[Tensor, list[int], State]:
        """See `TensorRunner.run`."""
        state = state or initial_state(self.config, len(sequences), self.device)
        batch = batch_of(sequences, self.device, hook)
        new = State(torch.empty_like(state.conv), torch.empty_like(state.ssm))
        scored = last_batch(batch) if logits == "last" else batch
        x = self.forward.body(batch, state, new)
        rows = [{"all": len(tokens), "last": 1, "none": 0}[logits] for tokens in sequences]
        if logits == "none":
            y = self.forward.empty(0, self.config.vocab_size)
        else:
            y = self.forward.head(last_rows(x, batch) if logits == "last" else x, scored)
        self.forward.check(int(batch.failure))
        return y, rows, new

    def log_softmax(self, logits: Tensor) -> Tensor:
        """Eq. (25): float32 (rows, vocabulary)."""
        return log_softmax(logits, self.forward.launch)

    def step(self, tokens: IntArray, state: State, *, hook: Hook | None = None) -> tuple[F32Array, State]:
        """One token for each sequence; see `refmamba.backend.Runner.step`."""
        arrays = check_call(one_each(tokens), state, "last", hook, self.config)
        if self.device.type != "cuda" or hook or len(arrays) > FEW:
            return super().step(tokens, state, hook=hook)
        if len(arrays) not in self.graphs:
            self.graphs[len(arrays)] = Graph(self.forward, len(arrays))
        return self.graphs[len(arrays)].step(np.concatenate(arrays), state)
