"""Whole models: a backend beside the reference, in every way of calling, and frozen hashes."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from refmamba.backend import Backend, told
from refmamba.conformance.comparison import Difference, difference
from refmamba.conformance.locate import locate
from refmamba.conformance.operations import Row
from refmamba.conformance.vectors import decode, generated_model
from refmamba.errors import NonFiniteError
from refmamba.formats.scheme import open_scheme
from refmamba.spec.arith import F32Array, f32
from refmamba.spec.codes import Codes, FixedPoint, Param
from refmamba.spec.config import MambaConfig
from refmamba.spec.mamba1 import Mamba
from refmamba.spec.parameters import QuantizedModel, quantize_model

STEPS = 6  # tokens that are run one at a time
CHUNKS = (1, 2, 5, 3, 17)  # lengths of the chunks, over and over
BATCH = (9, 3, 1, 12, 7, 5)  # lengths of a batch's sequences, more than a register, or a warp's share, holds of them
LONG = 300  # tokens of a call that a backend may cut into pieces
EDGE_SCHEMES = ("fp32", "int8", "int8-static", "w8a8-all")  # under which values at the edges are tried
LONG_SCHEMES = ("fp32", "int8")  # under which there is one
SCHEMES = (
    "fp32", "w8-mlp", "w8-all", "w4-mlp", "w4-all", "w2-all", "w8a8-mlp", "w8a8-all", "w8a4-mlp", "w4a16-all",
    "int8", "int8-static", "int8-smooth", "int4", "int4-all", "int8-hadamard", "llm-int8", "flatten-int8",
)  # fmt: skip
Check = Callable[[], Iterator[Difference | None]]
Results = Iterator[tuple[Row, Difference | None]]


def sha256_of(logits: Sequence[F32Array]) -> str:
    """SHA-256 of little-endian float32 logits, one sequence after the other."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(x, "<f4").tobytes() for x in logits)).hexdigest()


class ModelChecks:
    """One model under one scheme: the backend beside the reference.

    quick: short sequences, each way of calling once. long: the long sequence too, under LONG_SCHEMES.
    """

    def __init__(
        self,
        backend: Backend,
        model: QuantizedModel,
        sequences: Sequence[Any],
        *,
        quick: bool = False,
        long: bool = False,
    ) -> None:
        self.reference, self.runner, self.backend = Mamba(model), backend.load(model), backend
        self.whole, self.vocabulary = model.scheme.whole_sequence, model.config.vocab_size
        source = np.asarray(max(sequences, key=len))
        self.batch_of = [np.resize(np.roll(source, -5 * i), length) for i, length in enumerate(BATCH)]
        self.sequences = [self.batch_of[0]] if quick else list(sequences)
        self.long = np.resize(source, LONG) if long and model.scheme.name in LONG_SCHEMES else None

    def same_state(self, where: str, expected: Any, state: Any) -> Difference | None:
        """Both parts of two states."""
        for name, e, f in zip(("conv_state", "ssm_state"), expected.arrays(), state.arrays(), strict=True):
            first, _ = difference("state", f"{where}, {name} [sequence, layer, channel, ...]", e, f)
            if first:
                return first
        return None

    def rows(self, operation: str, where: str, expected: Any, rows: Any) -> Difference | None:
        """Logits."""
        return difference(operation, f"{where}, logits [token, row]", expected, rows)[0]

    def call(
        self, operation: str, where: str, sequences: Sequence[Any], positions: Any, state: Any = None, kept: Any = None
    ) -> Iterator[Difference | None]:
        """One prefill: each sequence's logits, the states after it, and that the state that was given is what it was.

        kept: the reference's own state.
        """
        before = None if state is None else [x.copy() for x in state.arrays()]
        expected, after = self.reference.prefill(sequences, kept, logits=positions)
        rows, reached = self.runner.prefill(sequences, state, logits=positions)
        if len(rows) != len(expected):
            yield Difference(operation, f"{where}: logits of {len(rows)} sequences, not of {len(expected)}")
            return
        for i, (e, f) in enumerate(zip(expected, rows, strict=True)):
            yield self.rows(operation, f"{where}, sequence {i} of {len(rows)}", e, f)
        wrong = self.same_state(f"{operation}, {where}", after, reached)
        yield replace(wrong, operation=operation) if wrong else None
        if before is not None:
            yield self.unchanged(operation, before, state)

    def unchanged(self, operation: str, before: Sequence[Any], state: Any) -> Difference | None:
        """A state is a value."""
        for name, old, now in zip(("conv_state", "ssm_state"), before, state.arrays(), strict=True):
            first, _ = difference("state", f"{operation} changed the {name} that it was given", old, now)
            if first:
                return first
        return None

    def prefill(self) -> Iterator[Difference | None]:
        """Each sequence alone, all positions."""
        for i, s in enumerate(self.sequences):
            yield from self.call("prefill", f"sequence {i} alone", [s], "all")

    def long_prefill(self) -> Iterator[Difference | None]:
        """A sequence longer than what a backend may run in one piece."""
        yield from self.call("long prefill", f"{LONG} tokens", [self.long], "all")

    def positions(self) -> Iterator[Difference | None]:
        """The last position alone, and none; of a batch, whose last positions are at different places."""
        for positions in ("last", "none"):
            yield from self.call("positions", f'logits="{positions}"', [self.batch_of[0]], positions)
            yield from self.call("positions", f'logits="{positions}" of a batch', self.batch_of, positions)

    def batch(self) -> Iterator[Difference | None]:
        """Sequences at once, of different lengths: each as if it were alone."""
        yield from self.call("batch", "different lengths", self.batch_of, "all")
        if self.long is not None:
            yield from self.call("batch", f"one of {LONG} tokens", [self.batch_of[0], self.long, self.batch_of[1]], "all")

    def states(self) -> Iterator[Difference | None]:
        """Batches, and a sequence alone, that go on from states: each from its own."""
        _, state = self.runner.prefill(self.batch_of, logits="none")
        _, kept = self.reference.prefill(self.batch_of, logits="none")
        turned = [*self.batch_of[1:], self.batch_of[0]]
        for positions in ("all", "last"):
            yield from self.call("states", f'a batch that goes on, logits="{positions}"', turned, positions, state, kept)
        yield from self.call("states", "a sequence that goes on", turned[:1], "all", state.take([1]), kept.take([1]))
        restored, saved = self.runner.restore_state(*kept.arrays()), self.reference.restore_state(*kept.arrays())
        yield from self.call("states", "a batch that goes on from a restored state", turned, "last", restored, saved)

    def step(self) -> Iterator[Difference | None]:
        """One token at a time, every sequence at once; the state that goes in stays as it was."""
        state, kept = self.runner.initial_state(len(BATCH)), self.reference.initial_state(len(BATCH))
        for t in range(STEPS):
            tokens = np.array([s[t % len(s)] for s in self.batch_of])
            before = [x.copy() for x in state.arrays()]
            rows, after = self.runner.step(tokens, state)
            expected, kept = self.reference.step(tokens, kept)
            yield self.rows("step", f"token {t} [sequence, row]", expected, rows)
            yield self.unchanged("step", before, state)
            state = after
        yield self.same_state("steps", kept, state)

    def chunks(self) -> Iterator[Difference | None]:
        """A sequence in pieces: the bits of one call, unless the scheme's scale is the whole call's."""
        s = self.sequences[0]
        (whole,), _ = self.reference.prefill([s], logits="all")
        at, state, kept = 0, self.runner.initial_state(1), self.reference.initial_state(1)
        for i in range(len(s)):
            piece = s[at : at + CHUNKS[i % len(CHUNKS)]]
            if not len(piece):
                break
            (rows,), state = self.runner.prefill([piece], state, logits="all")
            expected = whole[at : at + len(piece)]
            if self.whole:
                (expected,), kept = self.reference.prefill([piece], kept, logits="all")
            yield self.rows("chunks", f"chunk of {len(piece)} tokens from {at}", expected, rows)
            at += len(piece)

    def fork(self) -> Iterator[Difference | None]:
        """States taken from a batch, more than once, and run on."""
        _, state = self.runner.prefill(self.batch_of[:2], logits="none")
        _, kept = self.reference.prefill(self.batch_of[:2], logits="none")
        order, tokens = [1, 0, 1], np.array([1, 2, 3]) % self.vocabulary
        rows, expected = self.runner.step(tokens, state.take(order))[0], self.reference.step(tokens, kept.take(order))[0]
        yield self.rows("fork", "a step after take [sequence, row]", expected, rows)
        wrong = self.same_state("the forked state was changed", kept, state)
        yield replace(wrong, operation="fork") if wrong else None

    def locate(self, sequences: Sequence[Any], first: Difference) -> Difference:
        """The first difference inside the forward of one of the sequences; as it is where there is none."""
        try:
            located = (locate(self.reference, self.runner, self.backend, s) for s in sequences)
            return next(filter(None, located), first)
        except Exception:  # a stranger's hooks may raise anything; what differs is known without them
            return first

    def run(self) -> Results:
        """Every check; the first difference of one sequence's forward is traced to its site."""
        checks: list[Check] = [self.prefill, *([] if self.long is None else [self.long_prefill])]
        checks += [self.batch, self.positions, self.states, self.step, self.chunks, self.fork]
        for check in checks:
            row = Row(f"model: {check.__name__.replace('_', ' ')}", self.reference.scheme.name)
            first = watch(row, check)
            if first and not first.raised and check in (self.prefill, self.long_prefill):
                first = self.locate(self.sequences if check == self.prefill else [self.long], first)
            yield row, first


def watch(row: Row, check: Check) -> Difference | None:
    """Run a check, and count in a row. Gives the first difference; whatever the backend raises is one."""
    first = None
    try:
        for wrong in check():
            row.cases += 1
            row.exact += wrong is None
            row.failed += wrong is not None
            first = first or wrong
    except Exception as error:  # a stranger's backend may raise anything
        raised = not isinstance(error, NonFiniteError)  # which it means: it refuses what is right
        row.cases, row.failed, row.raised = row.cases + 1, row.failed + 1, row.raised + raised
        first = first or Difference(row.check.removeprefix("model: "), told(error), raised=raised)
    return first


def changed(model: QuantizedModel, params: Mapping[str, Param]) -> QuantizedModel:
    """A model with some parameters of its own."""
    held = model.held()
    return replace(held, params={**held.params, **params})


def first_nan(x: F32Array, value: float) -> F32Array:
    """A copy of x with one value in its first row."""
    x = x.copy()
    x.reshape(len(x), -1)[0, 0] = value
    return x


def small_values(model: QuantizedModel) -> QuantizedModel:
    """A model whose tokens 0 and 2 have an embedding of zeros, and whose token 4 one so small that what is to be coded of it
    counts as zero (where one scale is the whole embedding's there is none so small)."""
    table = model.params["embedding.weight"]
    assert not isinstance(table, FixedPoint)
    if isinstance(table, Codes):
        q, scale = table.q.copy(), table.scale.copy()
        q[[0, 2]] = 0
        if scale.ndim:
            scale[4] = f32(2.0**118)
        small: Param = replace(table, q=q, scale=scale)
        return changed(model, {"embedding.weight": small} | ({"lm_head.weight": small} if model.shares_codes else {}))
    rows = table.copy()
    rows[[0, 2]] = 0
    rows[4] *= f32(2.0**-112)
    return changed(model, {"embedding.weight": rows})


def check_refused(backend: Backend, models: Mapping[str, QuantizedModel], tokens: Any) -> Results:
    """A NaN or an infinity must end a call with NonFiniteError: in a parameter, in one token's embedding, in the logits."""
    fp32, int8, static = models["fp32"], models["int8"], models["int8-static"]
    embedding, D, norm_f = fp32.value("embedding.weight"), fp32.value("layers.0.D"), fp32.value("norm_f.weight")
    at, rows = int(tokens[-1]), embedding.copy()
    rows[at, 1] = np.nan
    head = fp32.params["lm_head.weight"]
    assert isinstance(head, FixedPoint)
    codes = int8.params["lm_head.weight"]
    assert isinstance(codes, Codes)
    large = {"norm_f.weight": norm_f * f32(2.0**110)}
    steep = Codes(codes.q, np.ldexp(codes.scale, -56).astype(np.float32), codes.bits)
    cases = {
        "fp32, NaN in a token's embedding": (changed(fp32, {"embedding.weight": rows}), tokens),
        "fp32, infinity in D": (changed(fp32, {"layers.0.D": first_nan(D, np.inf)}), tokens),
        "int8, NaN in D": (changed(int8, {"layers.0.D": first_nan(D, np.nan)}), tokens),
        "int8-static, NaN in D": (changed(static, {"layers.0.D": first_nan(D, np.nan)}), tokens),
        "int8, infinity in a norm": (changed(int8, {"norm_f.weight": first_nan(norm_f, -np.inf)}), tokens),
        "fp32, logits overflow": (
            changed(fp32, large | {"lm_head.weight": FixedPoint(head.q, head.exponent - 60)}), tokens
        ),
        "int8, logits are NaN": (changed(int8, large | {"lm_head.weight": steep, "embedding.weight": steep}), tokens),
    }  # fmt: skip
    row, first = Row("model: refused", "fp32, int8"), None
    for where, (model, sequence) in cases.items():

        def check(where: str = where, model: QuantizedModel = model, sequence: Any = sequence) -> Iterator[Difference | None]:
            try:
                with np.errstate(all="ignore"):
                    rows, _ = backend.load(model).prefill([sequence[:3], sequence], logits="all")
            except NonFiniteError:
                yield None
            else:
                kinds = "finite" if all(np.isfinite(r).all() for r in rows) else "not finite"
                yield Difference("refused", f"{where}: not refused with NonFiniteError; the logits are {kinds}")

        wrong = watch(row, check)
        first = first or wrong
    yield row, first


def check_subnormals(backend: Backend, fp32: QuantizedModel, tokens: Any) -> Results:
    """States of subnormal numbers are kept, and so are this process's own, whatever libraries a backend loads.

    The convolution is made so small that what enters the scan is about 2^-130.
    """
    names = [name for name in fp32.params if name.endswith(("conv1d.weight", "conv1d.bias"))]
    model = changed(fp32, {name: fp32.value(name) * f32(2.0**-64) for name in names})
    reference, row = Mamba(model), Row("model: subnormals", "fp32")

    def check() -> Iterator[Difference | None]:
        runner = backend.load(model)
        state, kept = runner.initial_state(1), reference.initial_state(1)
        for piece in (tokens, tokens[:1]):  # from zero, and from subnormal states
            _, state = runner.prefill([piece], state, logits="none")
            _, kept = reference.prefill([piece], kept, logits="none")
            where = "ssm_state of subnormal numbers [sequence, layer, channel, state]"
            yield difference("subnormals", where, kept.arrays()[1], state.arrays()[1])[0]
        yield flushed()

    first = watch(row, check)
    yield row, first


class Cancelling:
    """A checkpoint. Every output of in_proj is 300 products of 2^51 to 2^52, the same with the other sign, and a rest of 2^30.

    On the way a sum is near 2^60, where float64 is off by 2^7 at each step: about the last bit of the float32 result. All else
    is zero, so that in_proj's result is what the convolution's state holds.
    """

    config = MambaConfig(600, 1, 50)

    def read(self, name: str) -> F32Array:
        """See `refmamba.spec.config.ParameterSource`."""
        rng, half = np.random.Generator(np.random.PCG64(3)), self.config.d_model // 2
        if name == "layers.0.in_proj.weight":
            codes = rng.integers(2**21, 2**22, (2 * self.config.d_inner, half))
            rest = rng.integers(-1, 2, codes.shape) * (np.arange(half) < 4)
            weight: F32Array = np.ldexp(np.concatenate([codes, rest - codes], axis=1), -22).astype(np.float32)
            return weight
        if name == "embedding.weight":
            return np.tile(rng.uniform(0.5, 1, (self.config.vocab_size, half)).astype(np.float32), 2)
        shape = self.config.shapes()[name]
        return np.ones(shape, np.float32) if name.endswith("norm.weight") else np.zeros(shape, np.float32)


def check_large_sums(backend: Backend) -> Results:
    """A product of fixed-point codes whose sums outgrow float64 on the way, for one token and for many."""
    row, model = Row("model: large sums", "fp32"), quantize_model(Cancelling(), open_scheme("fp32"))

    def check() -> Iterator[Difference | None]:
        reference, runner = Mamba(model), backend.load(model)
        for length in (1, 40):
            sequence = [np.arange(length) % model.config.vocab_size]
            expected, conv = reference.prefill(sequence)[1].arrays()[0], runner.prefill(sequence)[1].arrays()[0]
            where = f"large sums of {length} tokens, in conv_state [sequence, layer, channel, token]"
            yield difference("integer_product", where, expected, conv)[0]

    first = watch(row, check)
    yield row, first


def flushed() -> Difference | None:
    """Whether this thread flushes subnormal numbers to zero, as libraries built with -ffast-math make it: compared as bits."""
    half = (np.full(64, 1 << 19, np.int32).view(np.float32) * f32(0.5)).view(np.int32)  # of 2^-130
    if (half == 1 << 18).all():
        return None
    return Difference("subnormals", "this process flushes subnormal numbers to zero since the backend was loaded")


def check_frozen(backend: Backend, models: Mapping[str, QuantizedModel], expected: Mapping[str, Any]) -> Results:
    """Hashes of logits that were frozen with the vectors, and transformers' float64 logits for `fp32`."""
    sequences = [np.array(s) for s in expected["sequences"]]
    for name, model in models.items():
        frozen = expected["logits_sha256"]["schemes"].get(name)
        if frozen is None:
            continue
        logits: list[F32Array] = []

        def check(model: QuantizedModel = model, logits: list[F32Array] = logits, frozen: str = frozen) -> Iterator[
            Difference | None
        ]:  # fmt: skip
            runner = backend.load(model)
            logits += [runner.prefill([s], logits="all")[0][0] for s in sequences]
            digest = sha256_of(logits)
            same = digest == frozen
            yield None if same else Difference("whole model", "SHA-256 of the logits", [], frozen, digest)

        row = Row("model: frozen hash", name)
        first = watch(row, check)
        yield row, first
        if name == "fp32" and "fp32_last_8" in expected and len(logits) == len(sequences):
            theirs = expected["fp32_last_8"]
            ours = logits[theirs["sequence"]][-8:].astype(np.float64)
            first, _ = difference("whole model", "beside transformers", decode(theirs["result"]), ours, theirs["compare"])
            yield Row("model: transformers", name, 1, 0, int(first is not None)), first


def tiny_models(schemes: Sequence[str]) -> dict[str, QuantizedModel]:
    """The tiny model in the vectors, under each scheme."""
    tiny = generated_model("tiny")
    return {name: quantize_model(tiny.source, open_scheme(name), tiny.calibration) for name in schemes}


def tiny_expected() -> dict[str, Any]:
    """What the tiny model gives."""
    return generated_model("tiny").expected
