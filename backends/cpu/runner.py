"""One model on the CPU backend."""

import itertools
import threading
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from refmamba.backends.cpu.cache import layers
from refmamba.backends.cpu.kernels.bound import sum_error
from refmamba.backends.cpu.kernels.codes import code_bytes
from refmamba.backends.cpu.kernels.digits import DIGITS_SCRATCH, spread_scratch
from refmamba.backends.cpu.kernels.instructions import LANES
from refmamba.backends.cpu.kernels.panels import PANELS_SCRATCH
from refmamba.backends.cpu.kernels.scan import scan_scratch
from refmamba.backends.cpu.kernels.tables import LINE, NO_OUTLIER, UNIT, Kind, Layer, Mode, Run, Site
from refmamba.backends.cpu.kernels.tiles import VNNI
from refmamba.backends.cpu.kernels.transforms import transform_scratch
from refmamba.backends.cpu.memory import Arena, Pool, address, aligned, strips_of
from refmamba.backends.cpu.pack import Packed, Params, padded_rows
from refmamba.backends.cpu.passes import passes, plan
from refmamba.backends.cpu.state import State
from refmamba.backends.cpu.threads import Threads
from refmamba.errors import BackendError, NonFiniteError
from refmamba.spec.arith import F32Array, IntArray, f32
from refmamba.spec.coders import (
    Coder,
    Flattened,
    ParameterGrouped,
    ParameterPerChannel,
    ParameterPerTensor,
    PerTensor,
    PerToken,
    PerTokenOutliers,
    Static,
    Unquantized,
)
from refmamba.spec.codes import ABSMAX_ZERO, ACTIVATION_BITS, BLOCK, Codes, dequantize, scale_of
from refmamba.spec.config import kind_of
from refmamba.spec.linear import Linear
from refmamba.spec.mamba1 import Positions, check_call, check_logits, one_each
from refmamba.spec.parameters import QuantizedModel, linear_sites
from refmamba.spec.scheme import LINEAR_LAYERS
from refmamba.spec.trace import Hook
from refmamba.spec.transforms import Hadamard, Smooth, hadamard_block

PASS_ROWS = 256  # tokens that go through the layers together, to bound memory; the bits do not depend on it
NEVER = 2**31  # more rows than a pass has
FIELDS = {field.name: int(field) for field in Run}
MODES = {PerToken: Mode.TOKEN, PerTokenOutliers: Mode.TOKEN, PerTensor: Mode.TENSOR, Static: Mode.STATIC,
         Flattened: Mode.STATIC, Unquantized: Mode.NONE}  # fmt: skip
# The coders and transforms that the kernels know.
KNOWN = frozenset({ParameterPerTensor, ParameterPerChannel, ParameterGrouped, Smooth, Hadamard, *MODES})


def largest_code(coder: Coder) -> int:
    """The largest magnitude of a coder's codes."""
    if isinstance(coder, PerToken | PerTokenOutliers | PerTensor | Static):
        return int(2 ** (coder.bits - 1) - 1)
    return int(2**ACTIVATION_BITS)


class CpuRunner:
    """One model on the CPU backend: its codes packed once, its other parameters in strips, and a table of addresses."""

    def __init__(self, model: QuantizedModel, threads: Threads) -> None:
        self.config, self.scheme = model.config, model.scheme
        self._threads, self._kept, self._lock = threads, list[NDArray[Any]](), threading.Lock()
        self._arena, self._pool, self._logits_pool = Arena(), Pool(), Pool()
        self._code_bytes, self._outlier_bytes, self._start_bytes = 0, 0, 0  # of a row's, at most
        self._spread = 0  # columns of a weight in groups, at most
        self._prepared = 0  # strips of rows that are rotated or have outliers, at most
        c = self.config
        e, r, n = c.d_inner, c.dt_rank, c.d_state
        orders = {"in_proj": padded_rows(e, e), "x_proj": padded_rows(r, n, n), "dt_proj": padded_rows(e),
                  "out_proj": padded_rows(c.d_model), "lm_head": padded_rows(c.vocab_size)}  # fmt: skip
        sites = linear_sites(c)
        products = {f"{site}.weight" for site in sites} | ({"embedding.weight"} if model.shares_codes else set())
        rest = {name: model.params[name] for name in model.params if name not in products}
        packed: dict[str, Packed] = {}
        self.model = QuantizedModel(c, model.scheme, Params(rest, packed))
        self._table = np.zeros((c.n_layer + 1, int(Layer.SIZE)), np.int64)
        # The head first: while its codes are held twice there is nothing else yet.
        for number, site in sorted(enumerate(sites), key=lambda item: item[1] != "lm_head"):
            linear, order = model.linear(site), orders[kind_of(site)]
            place = int(Layer.IN_PROJ) + number % 4 * len(Site)
            packed[f"{site}.weight"] = weight = Packed.of(linear.weight, order, self._arena)
            self._table[number // 4, place : place + len(Site)] = self._site(number + 1, linear, order, weight)
        if model.shares_codes:
            packed["embedding.weight"] = packed["lm_head.weight"]
        self._embedding = packed.get("embedding.weight") or cast("Codes | F32Array", rest["embedding.weight"])
        for i in range(c.n_layer):
            at = f"layers.{i}"
            conv = self._strips(self.model.value(f"{at}.conv1d.weight").T)
            conv_bias = self._strips(self.model.value(f"{at}.conv1d.bias")) if c.use_conv_bias else 0
            A = self.model.state_matrix(i).T  # (n, e) -> (strips, n, 16)
            A = np.pad(A, ((0, 0), (0, -e % LANES))).reshape(n, -1, LANES).swapaxes(0, 1)
            self._table[i, : int(Layer.IN_PROJ)] = (
                self._strips(self.model.value(f"{at}.norm.weight")), conv, conv_bias, self._keep(A),
                self._strips(self.model.value(f"{at}.dt_proj.bias")), self._strips(self.model.value(f"{at}.D")),
            )  # fmt: skip
        self._table[c.n_layer, int(Layer.NORM)] = self._strips(self.model.value("norm_f.weight"))
        self._run = np.zeros(len(Run), np.int64)
        self._workspace, self._residual = np.empty(0, np.uint8), np.empty((0, 0, LANES), np.float32)
        self._errors, self._overrun = np.zeros(0, np.int64), np.zeros(1, np.int64)
        self._counters = aligned((layers.REGIONS * (c.n_layer + 1), LINE // 8), np.int64)
        scratch = max(
            DIGITS_SCRATCH,
            PANELS_SCRATCH,
            scan_scratch(n),
            transform_scratch(self._prepared * LANES),
            spread_scratch(self._spread),
        )
        scratch += -scratch % LINE
        self._set(
            THREADS=threads.count, COUNTERS=address(self._counters), REGIONS=layers.REGIONS,
            OVERRUN=address(self._overrun), LAYERS=c.n_layer, LAYER_TABLES=address(self._table),
            SCRATCH=self._keep(np.zeros(threads.count * scratch, np.uint8)), SCRATCH_BYTES=scratch,
            HEAD=address(self._table[c.n_layer]), EPSILON=self._keep(np.array([c.norm_eps], np.float32)),
            D_MODEL=c.d_model, MODEL_STRIPS=strips_of(c.d_model), INNER_STRIPS=strips_of(e), RANK_STRIPS=strips_of(r),
            STATE_STRIPS=strips_of(n), OUTLIER_BYTES=self._outlier_bytes,
 D_STATE=n, TAPS=c.d_conv, VOCABULARY=c.vocab_size,
            SUM_BLOCKS=-(-max(e, c.d_model, r) // BLOCK),
        )  # fmt: skip

    def _keep(self, array: NDArray[Any]) -> int:
        """Hold a copy of an array on a boundary of 64 bytes for the model's life; its address."""
        copy = self._arena.copy(array)
        self._kept.append(copy)
        return address(copy)

    def _strips(self, x: F32Array) -> int:
        """Keep x (..., channels) with its channels padded by zeros to whole strips."""
        return self._keep(np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % LANES)]))

    def _rows(self, x: F32Array, order: IntArray, missing: float) -> int:
        """Keep x (rows,) or () for the rows of a packed weight."""
        values = np.broadcast_to(x.reshape(-1) if x.ndim else x, order.max() + 1)
        return self._keep(np.where(order >= 0, values[order], f32(missing)))

    def _site(self, number: int, linear: Linear, order: IntArray, w: Packed) -> list[int]:
        """A linear layer's table: the fields of `kernels.tables.Site`."""
        fixed, unit, into, out = w.kind == Kind.FIXED, np.ones((), np.float32), linear.input, linear.output
        mode = MODES[type(into)]
        static = np.zeros((), np.float32)
        if isinstance(into, Static | Flattened) and into.absmax >= ABSMAX_ZERO:
            static = scale_of(into.absmax, into.bits)
        smooth, block, k = 0, 0, strips_of(w.columns) * LANES
        for transform in linear.transforms:
            if isinstance(transform, Hadamard):
                block = hadamard_block(w.columns)
            else:
                assert isinstance(transform, Smooth)
                powers = np.ldexp(1.0, -transform.exponents)
                smooth = self._keep(np.pad(powers, (0, -len(powers) % LANES)))
        outlier = int(f32(into.threshold).view(np.int32)) if isinstance(into, PerTokenOutliers) else NO_OUTLIER
        bias = 0 if linear.bias is None else self._rows(linear.bias, order, 0)
        slices = 4 if fixed or mode == Mode.NONE or isinstance(into, Flattened) else 1
        steps = bits = units = step_bytes = 0
        if w.steps is not None:
            steps, step_bytes, bits = address(w.steps), w.steps[0].size, w.group.bit_length() - 1
            units = -(-k // min(UNIT, w.group))
            self._spread = max(self._spread, k)
            self._start_bytes = max(self._start_bytes, 4 * slices * units)
        if outlier != NO_OUTLIER:
            self._outlier_bytes = max(self._outlier_bytes, 16 * (k + 1))
        if block or outlier != NO_OUTLIER:
            self._prepared = max(self._prepared, k // LANES)
        # Rows that are worth spreading a weight out for: measured with AVX2; VNNI makes the products by digits cheap.
        if fixed:
            panels = 32 if VNNI else 4
        else:
            panels = NEVER if VNNI or slices == 1 else 8
        self._code_bytes = max(self._code_bytes, slices * k, code_bytes.py_func(k) if panels < NEVER else 0)
        fields = {
            Site.CODES: address(w.digits), Site.KIND: w.kind, Site.STEPS: steps, Site.STEP_BYTES: step_bytes,
            Site.GROUP_BITS: bits, Site.UNITS: units, Site.PAIRS: len(order) // (2 * LANES),
            Site.K: k, Site.SLICES: slices, Site.PANELS: panels, Site.ERROR: self._rows(w.norms * sum_error(k), order, 0),
            Site.FACTOR: self._rows(np.ldexp(f32(1), -w.scale) if fixed else unit, order, 1),
            Site.SCALE: self._rows(unit if fixed else w.scale, order, 1), Site.BIAS: bias, Site.IN: mode,
            Site.IN_LARGEST: largest_code(into), Site.IN_SCALE: self._keep(static),
            Site.SMOOTH: smooth, Site.BLOCK: block, Site.OUTLIER: outlier, Site.OUT: MODES[type(out)] if out else Mode.NONE,
            Site.OUT_LARGEST: largest_code(out) if out else 0, Site.NUMBER: number,
        }  # fmt: skip
        return [int(fields[field]) for field in Site]

    def _set(self, **values: int) -> None:
        for name, value in values.items():
            self._run[FIELDS[name]] = value

    def _reserve(self, rows: int) -> None:
        """Lay out the buffers of a pass of so many rows."""
        if self._run[Run.ROWS] == rows:
            return
        c, get = self.config, self._run.__getitem__
        stride = rows | 1  # odd, so that the strips of a row do not all fall into the same cache sets
        model, inner = strips_of(c.d_model), strips_of(c.d_inner)
        strips = {"X": model, "NORMED": model, "XZ": 2 * inner, "U": inner, "DELTA": inner,
                  "PREPARED": self._prepared, "XBC": int(get(Run.RANK_STRIPS) + 2 * get(Run.STATE_STRIPS))}  # fmt: skip
        sizes = {name: (count + count % 2) * stride * LANES * 4 for name, count in strips.items()}
        sizes |= {"OUTLIERS": rows * self._outlier_bytes, "STARTS": rows * self._start_bytes,
                  "CODES": rows * self._code_bytes, "FACTOR": rows * 4, "SCALE": rows * 4, "ABSMAX": rows * 8,
                  "SUMS": rows * 8 * int(get(Run.SUM_BLOCKS))}  # fmt: skip
        needed = sum(size + LINE for size in sizes.values())
        if len(self._workspace) < needed or len(self._workspace) > 4 * needed + 2**25:
            self._workspace = np.zeros(needed + LINE, np.uint8)
        start = address(self._workspace)
        for name, size in sizes.items():
            start += -start % LINE
            self._set(**{name: start})
            start += size
        self._errors = np.zeros(rows, np.int64)  # of each sequence
        self._set(ROWS=rows, STRIDE=stride, ERRORS=address(self._errors))
        residual = self._workspace[int(get(Run.X)) - address(self._workspace) :][: model * stride * LANES * 4]
        self._residual = residual.view(np.float32).reshape(model, stride, LANES)

    def _buffer(self, name: str, channels: int) -> F32Array:
        """A buffer's values after a pass: (rows, channels)."""
        rows, stride = int(self._run[Run.ROWS]), int(self._run[Run.STRIDE])
        start = int(self._run[Run[name]]) - address(self._workspace)
        strips = strips_of(channels)
        values = self._workspace[start : start + strips * stride * LANES * 4].view(np.float32).reshape(strips, stride, LANES)
        return values[:, :rows].swapaxes(0, 1).reshape(rows, -1)[:, :channels]

    def _embed(self, tokens: IntArray) -> F32Array:
        """Eq. (15): (L,) -> (L, d_model); from the head's codes where the head is the embedding."""
        embedding = self._embedding
        rows = embedding[tokens] if isinstance(embedding, np.ndarray) else embedding.rows(tokens)
        return dequantize(rows) if isinstance(rows, Codes) else cast(F32Array, rows)

    def _pass(
        self, sequences: Sequence[IntArray], states: IntArray, positions: Sequence[Positions], out: F32Array,
        hook: Hook | None, after: State,
    ) -> None:  # fmt: skip
        """All layers for a few sequences; the logits of the positions asked for into `out`.

        states: each sequence's addresses, (4, sequences): of conv and ssm before, and of those after, which may be the same.
        after: what the hook is shown.
        """
        rows = plan(tuple(map(len, sequences)), tuple(positions))
        self._reserve(rows.count)
        x = self._embed(np.concatenate(sequences))
        padded = np.pad(x, ((0, 0), (0, -x.shape[1] % LANES))) if x.shape[1] % LANES else x
        table, row = address(states), 8 * len(sequences)
        self._residual[:, : rows.count] = padded.reshape(rows.count, -1, LANES).swapaxes(0, 1)
        self._set(
            SEQUENCES=len(sequences), CONV_IN=table, SSM_IN=table + row, CONV_OUT=table + 2 * row, SSM_OUT=table + 3 * row,
            LOGITS=address(out), **rows.fields,
        )  # fmt: skip
        if hook is None:
            self._layers(0, self.config.n_layer, rows.out_count)
            return
        hook("embedding", x)
        for i in range(self.config.n_layer):
            self._show_layer(i, after, hook)
        self._layers(self.config.n_layer, self.config.n_layer, rows.out_count)
        if rows.out_count:
            hook("lm_head.out", out.copy())

    def _layers(self, first: int, last: int, out_rows: int) -> None:
        self._set(FIRST=first, LAST=last, OUT_ROWS=out_rows)
        self._counters.fill(0)
        self._errors.fill(0)
        self._threads.run(layers.run_layers, self._run)
        if self._overrun[0]:
            raise BackendError("a layer has more regions than the kernels reserve counters for; report this")
        if self._errors.any():
            number, side = divmod(int(self._errors[np.flatnonzero(self._errors)[0]]), 2)
            layer, place = divmod(number - 1, 4)
            name = "lm_head" if layer == self.config.n_layer else f"layers.{layer}.{LINEAR_LAYERS[place]}"
            site = f"{name}.{('in', 'result')[side]}"
            raise NonFiniteError(f"{site}: a value is NaN or infinite, so it has no codes; check the weights and the input")

    def _show_layer(self, i: int, after: State, hook: Hook) -> None:
        """One layer, and what its buffers hold when it is done: SITES."""
        c, at = self.config, f"layers.{i}"
        e, strips = c.d_inner, LANES
        hook(f"{at}.residual_in", self._buffer("X", c.d_model))
        self._layers(i, i + 1, 0)
        xz = self._buffer("XZ", 2 * strips_of(e) * strips)
        half = strips_of(e) * strips
        hook(f"{at}.in_proj.out", np.concatenate([xz[:, :e], xz[:, half : half + e]], axis=1))
        conv, ssm = after.arrays()
        hook(f"{at}.conv_state", conv[0, i])
        hook(f"{at}.u", self._buffer("U", e))
        r, n = c.dt_rank, c.d_state
        r_end, n_width = strips_of(r) * LANES, strips_of(n) * LANES
        xbc = self._buffer("XBC", r_end + 2 * n_width)
        parts = (xbc[:, :r], xbc[:, r_end : r_end + n], xbc[:, r_end + n_width : r_end + n_width + n])
        hook(f"{at}.x_proj.out", np.concatenate(parts, axis=1))
        hook(f"{at}.ssm_state", ssm[0, i])
        hook(f"{at}.gate", self._buffer("DELTA", e))
        hook(f"{at}.residual_out", self._buffer("X", c.d_model))

    def initial_state(self, batch: int) -> State:
        """The state of `batch` sequences before their first token."""
        state = State.empty(self.config, self._pool, 1)
        state.conv.fill(0)
        state.ssm.fill(0)
        return state.take([0] * batch)

    def restore_state(self, conv: F32Array, ssm: F32Array) -> State:
        """The state whose `arrays` were these."""
        return State.of(self.config, self._pool, conv, ssm)

    def prefill(
        self,
        sequences: Sequence[IntArray],
        state: State | None = None,
        *,
        logits: Positions = "last",
        hook: Hook | None = None,
    ) -> tuple[list[F32Array], State]:
        """Run each sequence from its state on; see `refmamba.backend.Runner.prefill`."""
        out, counts, after = self._call(sequences, state, logits, hook)
        ends = list(itertools.accumulate(counts))
        return [out[end - count : end] for end, count in zip(ends, counts, strict=True)], after

    def step(self, tokens: IntArray, state: State, *, hook: Hook | None = None) -> tuple[F32Array, State]:
        """One token for each sequence; see `refmamba.backend.Runner.step`."""
        out, _, after = self._call(one_each(tokens), state, "last", hook)
        return out, after

    def _call(
        self, sequences: Sequence[IntArray], state: State | None, logits: Positions, hook: Hook | None
    ) -> tuple[F32Array, list[int], State]:
        """`prefill`, with the logits of all sequences in one array, and how many rows of it each has."""
        sequences = check_call(sequences, state, logits, hook, self.config)
        state = state or self.initial_state(len(sequences))
        counts = [{"all": len(s), "last": 1, "none": 0}[logits] for s in sequences]
        out = self._logits_pool.take(4 * sum(counts) * self.config.vocab_size).view(np.float32)
        out = out.reshape(sum(counts), self.config.vocab_size)
        # A scale over a whole sequence needs the sequence in one piece, and so does a hook.
        limit = sum(map(len, sequences)) if self.scheme.whole_sequence or hook else PASS_ROWS
        after = State.empty(self.config, self._pool, len(sequences))
        states = np.array([state.conv_in, state.ssm_in, after.conv_in, after.ssm_in])
        done = 0
        for parts in passes([len(s) for s in sequences], limit):
            members = [b for b, _, _ in parts]
            positions: list[Positions] = [
                "none" if logits == "last" and stop < len(sequences[b]) else logits for b, _, stop in parts
            ]
            with self._lock:  # one workspace
                pieces = [sequences[b][start:stop] for b, start, stop in parts]
                self._pass(pieces, np.ascontiguousarray(states[:, members]), positions, out[done:], hook, after)
            states[:2, members] = states[2:, members]  # from where a later pass goes on
            done += sum({"all": z - a, "last": 1, "none": 0}[p] for (_, a, z), p in zip(parts, positions, strict=True))
        check_logits(out)
        return out, counts, after
