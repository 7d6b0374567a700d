"""Whole models: a backend beside the reference, in every way of calling, and frozen hashes."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from refmamba.backend import Backend
from refmamba.conformance.comparison import Difference, difference
from refmamba.conformance.locate import locate
from refmamba.conformance.operations import Row
from refmamba.conformance.vectors import decode, generated_model
from refmamba.formats.scheme import open_scheme
from refmamba.spec.arith import F32Array
from refmamba.spec.mamba1 import Mamba
from refmamba.spec.parameters import QuantizedModel, quantize_model

STEPS = 6  # tokens that are run one at a time


CHUNKS = (1, 2, 5, 3, 17)  # lengths of the chunks, over and over


def sha256_of(logits: Sequence[F32Array]) -> str:
    """SHA-256 of little-endian float32 logits, one sequence after the other."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(x, "<f4").tobytes() for x in logits)).hexdigest()


class ModelChecks:
    """One model under one scheme: the backend beside the reference."""

    def __init__(self, backend: Backend, model: QuantizedModel, sequences: Sequence[Any]) -> None:
        self.reference, self.runner, self.backend = Mamba(model), backend.load(model), backend
        self.sequences, self.whole = sequences, model.scheme.whole_sequence
        self.alone = [self.reference.prefill([s], logits="all") for s in sequences]
        self.logits = [rows[0] for rows, _ in self.alone]

    def same_state(self, where: str, expected: Any, found: Any) -> Difference | None:
        """Both parts of two states."""
        for name, e, f in zip(("conv_state", "ssm_state"), expected.arrays(), found.arrays(), strict=True):
            first, _ = difference("state", f"{where}, {name} [sequence, layer, channel, ...]", e, f)
            if first:
                return first
        return None

    def rows(self, operation: str, where: str, expected: Any, found: Any) -> Difference | None:
        """Logits."""
        return difference(operation, f"{where}, logits [token, row]", expected, found)[0]

    def prefill(self) -> Iterator[Difference | None]:
        """Each sequence alone, all positions, the last one and none."""
        for i, s in enumerate(self.sequences):
            found, state = self.runner.prefill([s], logits="all")
            first = self.rows("prefill", f"sequence {i}", self.logits[i], found[0])
            yield first or self.same_state(f"prefill of sequence {i}", self.alone[i][1], state)
        s = self.sequences[0]
        expected = self.reference.prefill([s], logits="last")[0][0]
        yield self.rows("prefill", "the last position alone", expected, self.runner.prefill([s], logits="last")[0][0])
        rows, state = self.runner.prefill([s], logits="none")
        empty = self.rows("prefill", "no position", np.empty((0, self.runner.config.vocab_size), np.float32), rows[0])
        yield empty or self.same_state("prefill without logits", self.alone[0][1], state)

    def batch(self) -> Iterator[Difference | None]:
        """All sequences at once, of their different lengths: each as if it were alone."""
        found, state = self.runner.prefill(self.sequences, logits="all")
        for i, rows in enumerate(found):
            yield self.rows("batch", f"sequence {i} of {len(found)}", self.logits[i], rows)
        for i in range(len(found)):
            yield self.same_state(f"batch, sequence {i}", self.alone[i][1], state.take([i]))

    def step(self) -> Iterator[Difference | None]:
        """One token at a time, every sequence at once; the state that goes in stays as it was."""
        long = [s for s in self.sequences if len(s) >= STEPS]
        state, kept = self.runner.initial_state(len(long)), self.reference.initial_state(len(long))
        for t in range(STEPS):
            tokens = np.array([s[t] for s in long])
            before = [x.copy() for x in state.arrays()]
            found, after = self.runner.step(tokens, state)
            expected, kept = self.reference.step(tokens, kept)
            yield self.rows("step", f"token {t} [sequence, row]", expected, found)
            for name, old, now in zip(("conv_state", "ssm_state"), before, state.arrays(), strict=True):
                yield difference("state", f"step {t} changed the {name} that it was given", old, now)[0]
            state = after
        yield self.same_state("steps", kept, state)

    def chunks(self) -> Iterator[Difference | None]:
        """A sequence in pieces: the bits of one call, unless the scheme's scale is the whole call's."""
        s, at, state, kept = self.sequences[0], 0, self.runner.initial_state(1), self.reference.initial_state(1)
        for i in range(len(s)):
            piece = s[at : at + CHUNKS[i % len(CHUNKS)]]
            if not len(piece):
                break
            found, state = self.runner.prefill([piece], state, logits="all")
            expected = self.logits[0][at : at + len(piece)]
            if self.whole:
                rows, kept = self.reference.prefill([piece], kept, logits="all")
                expected = rows[0]
            yield self.rows("chunks", f"chunk of {len(piece)} tokens from {at}", expected, found[0])
            at += len(piece)

    def fork(self) -> Iterator[Difference | None]:
        """States taken from a batch, more than once, and run on."""
        _, state = self.runner.prefill(self.sequences[:2], logits="none")
        _, kept = self.reference.prefill(self.sequences[:2], logits="none")
        order, tokens = [1, 0, 1], np.array([1, 2, 3]) % self.runner.config.vocab_size
        found, expected = self.runner.step(tokens, state.take(order))[0], self.reference.step(tokens, kept.take(order))[0]
        yield self.rows("fork", "a step after take [sequence, row]", expected, found)
        yield self.same_state("the forked state was changed", kept, state)

    def run(self) -> Iterator[tuple[Row, Difference | None]]:
        """Every check; the first difference of one sequence's forward is traced to its site."""
        scheme = self.reference.scheme.name
        for check in (self.prefill, self.batch, self.step, self.chunks, self.fork):
            row, first = Row(f"model: {check.__name__}", scheme), None
            try:
                for wrong in check():
                    row.cases += 1
                    row.exact += wrong is None
                    row.failed += wrong is not None
                    first = first or wrong
                if first and check == self.prefill:
                    located = (locate(self.reference, self.runner, self.backend, s) for s in self.sequences)
                    first = next(filter(None, located), first)
            except Exception as error:  # a stranger's backend may raise anything
                row.cases, row.failed = row.cases + 1, row.failed + 1
                first = first or Difference(check.__name__, f"raised {type(error).__name__}: {error}")
            yield row, first


def check_frozen(backend: Backend, models: Mapping[str, QuantizedModel], expected: Mapping[str, Any]) -> Iterator[
    tuple[Row, Difference | None]
]:  # fmt: skip
    """Hashes of logits that were frozen with the vectors, and transformers' float64 logits for `fp32`."""
    sequences = [np.array(s) for s in expected["sequences"]]
    for name, model in models.items():
        wanted = expected["logits_sha256"]["schemes"].get(name)
        if wanted is None:
            continue
        row, first = Row("model: frozen hash", name, 1), None
        runner = backend.load(model)
        logits = [runner.prefill([s], logits="all")[0][0] for s in sequences]
        found = sha256_of(logits)
        if found != wanted:
            first = Difference("whole model", "SHA-256 of the logits", [], wanted, found)
        row.exact, row.failed = int(first is None), int(first is not None)
        yield row, first
        if name == "fp32" and "fp32_last_8" in expected:
            theirs = expected["fp32_last_8"]
            ours = logits[theirs["sequence"]][-8:].astype(np.float64)
            first, _ = difference("whole model", "beside transformers", decode(theirs["result"]), ours, theirs["compare"])
            yield Row("model: transformers", name, 1, 0, int(first is not None)), first


def tiny_models(schemes: Sequence[str]) -> dict[str, QuantizedModel]:
    """The tiny model in the vectors, under each scheme."""
    source, calibration, _, _ = generated_model("tiny")
    return {name: quantize_model(source, open_scheme(name), calibration) for name in schemes}


def tiny_expected() -> dict[str, Any]:
    """What the tiny model gives."""
    return generated_model("tiny").expected


SCHEMES = (
    "fp32", "w8-mlp", "w8-all", "w4-mlp", "w4-all", "w2-all", "w8a8-mlp", "w8a8-all", "w8a4-mlp", "w4a16-all",
    "int8", "int8-static", "int8-smooth", "int4", "int4-all", "int8-hadamard", "llm-int8", "flatten-int8",
)  # fmt: skip
