"""The fast CPU backend: numba kernels on packed codes, the specification's bits (see cpu_kernels for how)."""

import collections
import functools
import hashlib
import itertools
import math
import os
import queue
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numba
import numpy as np
from numpy.typing import NDArray

from refmamba.backends.cpu.kernels.vectors import VNNI
from refmamba.errors import BackendError, NonFiniteError
from refmamba.spec import arith, codes
from refmamba.spec.arith import F32Array, IntArray, f32
from refmamba.spec.codes import ACTIVATION_BITS, Codes, FixedPoint, Param, dequantize, scale_of
from refmamba.spec.config import MambaConfig
from refmamba.spec.mamba1 import Positions, check_tokens
from refmamba.spec.ops import state_matrix
from refmamba.spec.parameters import QuantizedModel
from refmamba.spec.scheme import LINEAR_LAYERS
from refmamba.spec.trace import Hook

NUMBA: Any = numba.config
HERE = Path(__file__).resolve().parent


def _cache_folder() -> Path:
    """Where the compiled kernels lie: a folder for these very sources, as numba does not see an imported one change.

    Also for their place and time, and for the processor asked for, by which numba tells its files apart: so a folder that is
    there holds what is needed, and an empty one means that the user waits.
    """
    sources = [*sorted((HERE / "kernels").glob("*.py")), *(Path(str(module.__file__)) for module in (arith, codes))]
    total = hashlib.sha256(f"{NUMBA.CPU_NAME} {NUMBA.CPU_FEATURES}".encode())
    for source in sources:
        total.update(f"{source} {source.stat().st_mtime_ns}".encode() + source.read_bytes())
    digest = total.hexdigest()[:16]
    user = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(user) / "refmamba" / f"kernels-{digest}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="refmamba-kernels-"))


def _import_kernels() -> Any:
    # numba asks for its cache folder when a function is decorated.
    before, NUMBA.CACHE_DIR = NUMBA.CACHE_DIR, str(CACHE)
    try:
        from refmamba.backends.cpu.kernels import layers as cpu_kernels
    finally:
        NUMBA.CACHE_DIR = before
    return cpu_kernels


CACHE = _cache_folder()
kernels = _import_kernels()
Run, Site, Layer, Kind, Mode = kernels.Run, kernels.Site, kernels.Layer, kernels.Kind, kernels.Mode

LANES = 16
PASS_ROWS = 256  # tokens that go through the layers together, to bound memory; the bits do not depend on it
MOST_SPARE = 2**28  # bytes of memory that is kept to be used again
PACK_ROWS = 4096  # rows of a weight packed at a time, to bound memory
REGIONS = 21  # of a layer, at most
NEVER = 2**31  # more rows than a pass has
SCRATCH_BYTES = kernels.PANEL_BYTES + kernels.ROWS_OF_PANEL * (3 * 128 + 64)  # of a product
FIELDS = {field.name: int(field) for field in Run}
MODES = {"per_token": Mode.TOKEN, "per_tensor": Mode.TENSOR, "static": Mode.STATIC}
OFFSET = {Kind.PACKED: 8, Kind.BYTES: 128, Kind.FIXED: 1 << 23}  # makes the codes of a weight unsigned
Job = Callable[[int, int], None]


def aligned(shape: Sequence[int], dtype: Any = np.float32) -> NDArray[Any]:
    """An uninitialized array on a cache line's boundary, as the kernels' vectors need it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -address(memory) % 64
    array: NDArray[Any] = memory[start : start + size].view(dtype).reshape(shape)
    return array


def address(array: NDArray[Any]) -> int:
    """Where an array's values begin."""
    return int(array.__array_interface__["data"][0])


class Threads:
    """One kernel at a time on `count` threads, the caller's among them.

    numba's own pools are not used: one of them aborts on two callers, another dies in a forked child, and both take
    longer to start a region than a region takes.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._lock, self._process, self._jobs = threading.Lock(), 0, list[queue.SimpleQueue[Any]]()

    def _work(self, rank: int, jobs: "queue.SimpleQueue[Any]") -> None:
        while True:
            job, table, done = jobs.get()
            job(rank, address(table))
            done.put(rank)

    def _start(self) -> None:
        self._process, self._jobs = os.getpid(), [queue.SimpleQueue() for _ in range(self.count - 1)]
        for rank, jobs in enumerate(self._jobs, 1):
            threading.Thread(target=self._work, args=(rank, jobs), daemon=True).start()

    def run(self, job: Job, table: NDArray[np.int64]) -> None:
        """job(rank, address of table) on every thread."""
        if self._process != os.getpid():  # the first call, or a forked child, which has none of its parent's threads
            self._lock = threading.Lock()
            self._start()
        with self._lock:
            done: queue.SimpleQueue[int] = queue.SimpleQueue()
            for jobs in self._jobs:
                jobs.put((job, table, done))
            try:
                job(0, address(table))
            finally:  # an interrupt too waits for the others, who still write
                for _ in self._jobs:
                    done.get()


class Lease:
    """A pool's memory, given back when the last array on it is gone."""

    def __init__(self, pool: "Pool", memory: NDArray[np.uint8]) -> None:
        self._pool, self._memory = pool, memory
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        if self._memory.size <= MOST_SPARE:
            self._pool.spare.append(self._memory)


class Pool:
    """Memory of states, or of logits, to be used again: the system's new pages cost more than what fills them."""

    def __init__(self) -> None:
        self.spare: collections.deque[NDArray[np.uint8]] = collections.deque(maxlen=2)

    def take(self, size: int) -> NDArray[np.uint8]:
        """`size` bytes on a cache line's boundary, uninitialized."""
        if size == 0:
            return np.empty(0, np.uint8)
        try:
            memory = self.spare.pop()
        except IndexError:
            memory = np.empty(0, np.uint8)
        if not size <= memory.size <= 2 * size:
            memory = aligned((size,), np.uint8)
        return np.asarray(Lease(self, memory))[:size]


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


def strips_of(channels: int) -> int:
    """Strips of 16 that hold so many channels."""
    return -(-channels // LANES)


def padded_rows(*parts: int) -> IntArray:
    """Which row of a weight stands where, -1 for a row of zeros: each part begins a strip, and the strips are paired."""
    rows: list[IntArray] = []
    start = 0
    for part in parts:
        rows.append(np.r_[start : start + part, np.full(-part % LANES, -1)])
        start += part
    order = np.concatenate(rows)
    return np.concatenate([order, np.full(-len(order) % (2 * LANES), -1)]).astype(np.int64)


def kind_of(w: Codes | FixedPoint) -> int:
    """How a weight's codes are stored."""
    if isinstance(w, FixedPoint):
        return int(Kind.FIXED)
    return int(Kind.PACKED if w.bits <= 4 else Kind.BYTES)


def packed_bytes(w: Codes | FixedPoint, rows: int) -> int:
    """Bytes of a weight's digits, for so many rows."""
    k, kind = strips_of(w.q.shape[1]) * LANES, kind_of(w)
    return rows * k // 2 if kind == Kind.PACKED else rows * k * kind


def pack(w: Codes | FixedPoint, order: IntArray, out: NDArray[np.uint8]) -> None:
    """Write a weight's digits in the layout of `cpu_vectors.tile`: (strips, planes, groups of columns, 16, 4)."""
    kind, columns = kind_of(w), w.q.shape[1]
    k = strips_of(columns) * LANES
    done = 0
    for start in range(0, len(order), PACK_ROWS):
        rows = order[start : start + PACK_ROWS]
        q = np.zeros((len(rows), k), np.uint32 if kind == Kind.FIXED else np.uint8)
        q[rows >= 0, :columns] = w.q[rows[rows >= 0]].astype(q.dtype)
        q += q.dtype.type(OFFSET[Kind(kind)])
        strips = len(rows) // LANES
        if kind == Kind.PACKED:
            groups = q.reshape(strips, LANES, k // 8, 2, 4)
            digits = (groups[:, :, :, 0] | groups[:, :, :, 1] << 4).transpose(0, 2, 1, 3)
        elif kind == Kind.BYTES:
            digits = q.reshape(strips, LANES, k // 4, 4).transpose(0, 2, 1, 3)
        else:
            planes = q.astype("<u4").view(np.uint8).reshape(strips, LANES, k // 4, 4, 4)
            digits = planes[..., :3].transpose(0, 4, 2, 1, 3)
        out[done : done + digits.size].reshape(digits.shape)[...] = digits
        done += digits.size


def unpack(kind: int, k: int, digits: NDArray[np.uint8], places: IntArray) -> IntArray:
    """The codes that `pack` wrote at some places of its order, padding included: (len(places), k)."""
    planes = 1 if kind != Kind.FIXED else 3
    groups = digits.reshape(-1, planes, k // (8 if kind == Kind.PACKED else 4), LANES, 4)
    chosen = groups[places // LANES, :, :, places % LANES]
    if kind == Kind.FIXED:
        values = chosen.astype(np.int32) << np.array([0, 8, 16], np.int32)[:, None, None]
        fixed: IntArray = values.sum(axis=1, dtype=np.int32).reshape(len(places), k) - np.int32(OFFSET[Kind.FIXED])
        return fixed
    q = np.stack([chosen & 15, chosen >> 4], axis=3) if kind == Kind.PACKED else chosen
    codes: IntArray = (q.reshape(len(places), k) - np.uint8(OFFSET[Kind(kind)])).view(np.int8)
    return codes


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight whose codes lie packed in a runner's memory. scale: the weight's, or its exponents in fixed point."""

    digits: NDArray[np.uint8]
    places: IntArray  # of each row in the order of packing
    kind: int
    columns: int
    bits: int  # 0 in fixed point
    scale: NDArray[Any]
    norms: F32Array  # of the rows in fixed point, none too small; else 0: their products need no bound of an error

    @classmethod
    def of(cls, w: Codes | FixedPoint, order: IntArray) -> "Packed":
        """Pack a weight."""
        digits = aligned((packed_bytes(w, len(order)),), np.uint8)
        pack(w, order, digits)
        places = np.flatnonzero(order >= 0)  # the order keeps the rows' own
        columns = w.q.shape[1]
        if isinstance(w, FixedPoint):
            squares = np.einsum("ij,ij->i", w.q, w.q, dtype=np.float64)
            norms = (np.sqrt(squares) * 1.001).astype(np.float32)
            return cls(digits, places, kind_of(w), columns, 0, w.exponent, norms)
        return cls(digits, places, kind_of(w), columns, w.bits, w.scale, np.zeros((), np.float32))

    def rows(self, rows: IntArray) -> IntArray:
        """The codes of some rows: (len(rows), columns)."""
        return unpack(self.kind, strips_of(self.columns) * LANES, self.digits, self.places[rows])[:, : self.columns]

    def param(self) -> Codes | FixedPoint:
        """The weight again."""
        q = self.rows(np.arange(len(self.places)))
        return FixedPoint(q, self.scale) if self.kind == Kind.FIXED else Codes(q, self.scale, self.bits)


def sum_error(k: int) -> np.float32:
    """For a float64 sum of k products in panels: a bound on its error and on that of eq. (12), over sqrt(sum x^2 sum w^2).

    Products are exact, at most 2^52. Each addition, in a panel or of the panels' sums, is off by at most 2^-53 of the sum of
    |x w|, which the product of the norms bounds. Eq. (12) rounds less often; the rest is to spare.
    """
    return f32((kernels.PANEL + 2 * math.ceil(k / kernels.PANEL) + 16) * 2.0**-53)


class Params(Mapping[str, Param]):
    """A loaded model's parameters: the weights of products are unpacked when they are asked for, as they are held once."""

    def __init__(self, rest: Mapping[str, Param], packed: Mapping[str, Packed]) -> None:
        self._rest, self._packed = rest, packed

    def __getitem__(self, name: str) -> Param:
        return self._packed[name].param() if name in self._packed else self._rest[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._rest, *self._packed])

    def __len__(self) -> int:
        return len(self._rest) + len(self._packed)


class CpuRunner:
    """One model on the CPU backend: its codes packed once, its other parameters in strips, and a table of addresses."""

    def __init__(self, model: QuantizedModel, threads: Threads) -> None:
        self.config, self.scheme = model.config, model.scheme
        self._threads, self._kept, self._lock = threads, list[NDArray[Any]](), threading.Lock()
        self._pool, self._logits_pool = Pool(), Pool()
        self._code_bytes = 0  # of a row's codes, at most
        c = self.config
        e, r, n = c.d_inner, c.dt_rank, c.d_state
        orders = {"in_proj": padded_rows(e, e), "x_proj": padded_rows(r, n, n), "dt_proj": padded_rows(e),
                  "out_proj": padded_rows(c.d_model), "lm_head": padded_rows(c.vocab_size)}  # fmt: skip
        sites = [f"layers.{i}.{layer}" for i in range(c.n_layer) for layer in LINEAR_LAYERS] + ["lm_head"]
        products = {f"{site}.weight" for site in sites} | ({"embedding.weight"} if model.shares_codes else set())
        rest = {name: model.params[name] for name in model.params if name not in products}
        packed: dict[str, Packed] = {}
        self.model = QuantizedModel(c, model.scheme, Params(rest, packed))
        self._table = np.zeros((c.n_layer + 1, int(Layer.SIZE)), np.int64)
        # The head first: while its codes are held twice there is nothing else yet.
        for number, site in sorted(enumerate(sites), key=lambda item: item[1] != "lm_head"):
            kind = site.rsplit(".", 1)[-1]
            place = int(Layer.IN_PROJ) + number % 4 * len(Site)
            weight = Packed.of(cast("Codes | FixedPoint", model.params[f"{site}.weight"]), orders[kind])
            packed[f"{site}.weight"] = weight
            self._table[number // 4, place : place + len(Site)] = self._site(number + 1, site, kind, orders[kind], weight)
        if model.shares_codes:
            packed["embedding.weight"] = packed["lm_head.weight"]
        self._embedding = packed.get("embedding.weight") or cast("Codes | F32Array", rest["embedding.weight"])
        for i in range(c.n_layer):
            at = f"layers.{i}"
            conv = self._strips(self.model.value(f"{at}.conv1d.weight").T)
            conv_bias = self._strips(self.model.value(f"{at}.conv1d.bias")) if c.use_conv_bias else 0
            A = state_matrix(self.model.value(f"{at}.A_log")).T  # (n, e) -> (strips, n, 16)
            A = np.pad(A, ((0, 0), (0, -e % LANES))).reshape(n, -1, LANES).swapaxes(0, 1)
            self._table[i, : int(Layer.IN_PROJ)] = (
                self._strips(self.model.value(f"{at}.norm.weight")), conv, conv_bias, self._keep(A),
                self._strips(self.model.value(f"{at}.dt_proj.bias")), self._strips(self.model.value(f"{at}.D")),
            )  # fmt: skip
        self._table[c.n_layer, int(Layer.NORM)] = self._strips(self.model.value("norm_f.weight"))
        self._run = np.zeros(len(Run), np.int64)
        self._workspace, self._residual = np.empty(0, np.uint8), np.empty((0, 0, LANES), np.float32)
        self._errors = np.zeros(0, np.int64)
        self._counters = aligned((2 + REGIONS * (c.n_layer + 1), 8), np.int64)
        scratch = max(SCRATCH_BYTES, 64 << (n - 1).bit_length())
        self._set(
            THREADS=threads.count, COUNTERS=address(self._counters), LAYERS=c.n_layer, LAYER_TABLES=address(self._table),
            SCRATCH=self._keep(np.zeros(threads.count * scratch, np.uint8)), SCRATCH_BYTES=scratch,
            HEAD=address(self._table[c.n_layer]), EPSILON=self._keep(np.array([c.norm_eps], np.float32)),
            D_MODEL=c.d_model, MODEL_STRIPS=strips_of(c.d_model), INNER_STRIPS=strips_of(e), RANK_STRIPS=strips_of(r),
            STATE_STRIPS=strips_of(n), D_STATE=n, TAPS=c.d_conv, VOCABULARY=c.vocab_size,
            SUM_BLOCKS=-(-max(e, c.d_model, r) // kernels.BLOCK),
        )  # fmt: skip

    def _keep(self, array: NDArray[Any]) -> int:
        """Hold a copy of an array on a boundary of 64 bytes for the model's life; its address."""
        copy = aligned(array.shape, array.dtype)
        copy[...] = array
        self._kept.append(copy)
        return address(copy)

    def _strips(self, x: F32Array) -> int:
        """Keep x (..., channels) with its channels padded by zeros to whole strips."""
        return self._keep(np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % LANES)]))

    def _rows(self, x: F32Array, order: IntArray, missing: float) -> int:
        """Keep x (rows,) or () for the rows of a packed weight."""
        values = np.broadcast_to(x.reshape(-1) if x.ndim else x, order.max() + 1)
        return self._keep(np.where(order >= 0, values[order], f32(missing)))

    def _site(self, number: int, site: str, kind: str, order: IntArray, w: Packed) -> list[int]:
        """A linear layer's table: the fields of `cpu_kernels.Site`."""
        params, fixed, one = self.model.params, w.kind == Kind.FIXED, np.ones((), np.float32)
        into, out = self.scheme.inputs.get(kind), self.scheme.outputs.get(kind)
        mode = MODES[into.scale] if into else Mode.NONE
        static = np.zeros((), np.float32)
        if into and mode == Mode.STATIC and self.model.value(f"{site}.absmax") > 0:
            static = scale_of(self.model.value(f"{site}.absmax"), into.bits)
        smooth = bias = 0
        if f"{site}.smooth" in params:
            powers = np.ldexp(1.0, -cast(IntArray, params[f"{site}.smooth"]))
            smooth = self._keep(np.pad(powers, (0, -len(powers) % LANES)))
        if f"{site}.bias" in params and kind != "dt_proj":
            bias = self._rows(self.model.value(f"{site}.bias"), order, 0)
        slices, k = 1 if into and not fixed else 4, strips_of(w.columns) * LANES
        # Rows that are worth spreading a weight out for: measured with AVX2; VNNI makes the products by digits cheap.
        if fixed:
            panels = 32 if VNNI else 4
        else:
            panels = NEVER if VNNI or slices == 1 else 8
        self._code_bytes = max(self._code_bytes, slices * k, kernels.code_bytes.py_func(k) if panels < NEVER else 0)
        fields = {
            Site.CODES: address(w.digits), Site.KIND: w.kind, Site.PAIRS: len(order) // (2 * LANES),
            Site.K: k, Site.SLICES: slices, Site.PANELS: panels, Site.ERROR: self._rows(w.norms * sum_error(k), order, 0),
            Site.FACTOR: self._rows(np.ldexp(f32(1), -w.scale) if fixed else one, order, 1),
            Site.SCALE: self._rows(one if fixed else w.scale, order, 1), Site.BIAS: bias, Site.IN: mode,
            Site.IN_LARGEST: 2 ** (into.bits - 1) - 1 if into else 2**ACTIVATION_BITS, Site.IN_SCALE: self._keep(static),
            Site.SMOOTH: smooth, Site.OUT: MODES[out.scale] if out else Mode.NONE,
            Site.OUT_LARGEST: 2 ** (out.bits - 1) - 1 if out else 0, Site.NUMBER: number,
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
                  "XBC": int(get(Run.RANK_STRIPS) + 2 * get(Run.STATE_STRIPS))}  # fmt: skip
        sizes = {name: (count + count % 2) * stride * LANES * 4 for name, count in strips.items()}
        sizes |= {"CODES": rows * self._code_bytes, "FACTOR": rows * 4, "SCALE": rows * 4, "ABSMAX": rows * 8,
                  "SUMS": rows * 8 * int(get(Run.SUM_BLOCKS))}  # fmt: skip
        needed = sum(size + 64 for size in sizes.values())
        if len(self._workspace) < needed or len(self._workspace) > 4 * needed + 2**25:
            self._workspace = np.zeros(needed + 64, np.uint8)
        start = address(self._workspace)
        for name, size in sizes.items():
            start += -start % 64
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
        if isinstance(embedding, Packed):
            scale = embedding.scale[tokens] if embedding.scale.ndim else embedding.scale
            return cast(F32Array, embedding.rows(tokens).astype(np.float32) / scale)
        return dequantize(embedding.rows(tokens)) if isinstance(embedding, Codes) else embedding[tokens]

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
        self._threads.run(kernels.run_layers, self._run)
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
        hook(f"{at}.u", self._buffer("U", e))
        r, n = c.dt_rank, c.d_state
        r_end, n_width = strips_of(r) * LANES, strips_of(n) * LANES
        xbc = self._buffer("XBC", r_end + 2 * n_width)
        parts = (xbc[:, :r], xbc[:, r_end : r_end + n], xbc[:, r_end + n_width : r_end + n_width + n])
        hook(f"{at}.x_proj.out", np.concatenate(parts, axis=1))
        conv, ssm = after.arrays()
        hook(f"{at}.conv_state", conv[0, i])
        hook(f"{at}.ssm_state", ssm[0, i])
        hook(f"{at}.gate", self._buffer("DELTA", e))
        hook(f"{at}.residual_out", self._buffer("X", c.d_model))

    def initial_state(self, batch: int) -> State:
        """The state of `batch` sequences before their first token."""
        state = State.empty(self.config, self._pool, 1)
        state.conv.fill(0)
        state.ssm.fill(0)
        return state.take([0] * batch)

    def prefill(
        self,
        sequences: Sequence[IntArray],
        state: State | None = None,
        *,
        logits: Positions = "last",
        hook: Hook | None = None,
    ) -> tuple[list[F32Array], State]:
        """Run each sequence from its state on; see `refmamba.backend.Runner.prefill`."""
        sequences = [check_tokens(s, self.config) for s in sequences]
        if hook and len(sequences) != 1:
            raise ValueError("a hook looks at one sequence at a time")
        state = state or self.initial_state(len(sequences))
        counts = [{"all": len(s), "last": 1, "none": 0}[logits] for s in sequences]
        out = self._logits_pool.take(4 * sum(counts) * self.config.vocab_size).view(np.float32)
        out = out.reshape(sum(counts), self.config.vocab_size)
        # A scale over a whole sequence needs the sequence in one piece, and so does a hook.
        limit = sum(map(len, sequences)) if self.scheme.whole_sequence or hook else PASS_ROWS
        after = State.empty(self.config, self._pool, len(sequences))
        states = np.stack([state.conv_in, state.ssm_in, after.conv_in, after.ssm_in])
        done = 0
        for parts in passes([len(s) for s in sequences], limit):
            here = [b for b, _, _ in parts]
            positions: list[Positions] = [
                "none" if logits == "last" and stop < len(sequences[b]) else logits for b, _, stop in parts
            ]
            with self._lock:  # one workspace
                pieces = [sequences[b][start:stop] for b, start, stop in parts]
                self._pass(pieces, np.ascontiguousarray(states[:, here]), positions, out[done:], hook, after)
            states[:2, here] = states[2:, here]  # from where a later pass goes on
            done += sum({"all": z - a, "last": 1, "none": 0}[p] for (_, a, z), p in zip(parts, positions, strict=True))
        ends = list(itertools.accumulate(counts))
        return [out[end - count : end] for end, count in zip(ends, counts, strict=True)], after

    def step(self, tokens: IntArray, state: State, *, hook: Hook | None = None) -> tuple[F32Array, State]:
        """One token for each sequence; see `refmamba.backend.Runner.step`."""
        logits, state = self.prefill(list(np.asarray(tokens).reshape(-1, 1)), state, hook=hook)
        return (logits[0] if len(logits) == 1 else np.concatenate(logits)), state


def passes(lengths: Sequence[int], limit: int) -> list[list[tuple[int, int, int]]]:
    """Cut sequences into passes of at most `limit` tokens, in order: (sequence, first token, end) of each part."""
    result: list[list[tuple[int, int, int]]] = [[]]
    room = limit
    for b, length in enumerate(lengths):
        start = 0
        while start < length:
            if room == 0:
                result.append([])
                room = limit
            stop = min(length, start + room)
            result[-1].append((b, start, stop))
            room -= stop - start
            start = stop
    return result


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a pass: how many there are, of how many the logits are asked for, and the tables that the kernels read."""

    count: int
    out_count: int
    fields: dict[str, int]  # addresses of the tables
    tables: tuple[IntArray, ...]


@functools.lru_cache(8)
def plan(lengths: tuple[int, ...], positions: tuple[Positions, ...]) -> Rows:
    """First row of each sequence, sequence of each row; rows whose logits are asked for, and the same two of those. Kept, as
    every step of a decode has the same."""
    starts = np.cumsum([0, *lengths])
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    firsts = [{"all": 0, "last": n - 1, "none": n}[p] for n, p in zip(lengths, positions, strict=True)]
    wanted = [np.arange(start + first, start + n) for start, first, n in zip(starts, firsts, lengths, strict=False)]
    out_row = np.concatenate(wanted)
    out_starts, out_sequence = np.cumsum([0, *map(len, wanted)]), sequence[out_row]
    tables = {"START": starts, "SEQUENCE": sequence, "OUT_ROW": out_row, "OUT_START": out_starts,
              "OUT_SEQUENCE": out_sequence}  # fmt: skip
    return Rows(len(sequence), len(out_row), {name: address(t) for name, t in tables.items()}, tuple(tables.values()))


class Cpu:
    """numba kernels on every core, or on NUMBA_NUM_THREADS of them. The first load on a machine compiles the kernels."""

    name, device, exact = "cpu", "cpu", True
    sites: frozenset[str] | None = frozenset({
        "embedding", "residual_in", "in_proj.out", "u", "x_proj.out", "conv_state", "ssm_state", "gate", "residual_out",
        "lm_head.out",
    })  # fmt: skip

    def __init__(self, device: str | None = None) -> None:
        if device not in (None, "cpu"):
            raise BackendError(f"the cpu backend runs on 'cpu', not on '{device}'")
        self.threads = Threads(NUMBA.NUMBA_NUM_THREADS)

    def load(self, model: QuantizedModel) -> CpuRunner:
        """Pack a model's codes. Raises BackendError where the processor fails the probe of its exactness."""
        if not any(CACHE.rglob("*.nbi")):
            print("compiling the CPU kernels, once for this machine: about 20 seconds", file=sys.stderr)
        check_exact(self.threads)
        return CpuRunner(model, self.threads)

    def operations(self) -> Mapping[str, Callable[..., Any]]:
        """Those that stand alone in the kernels; the others are fused, and the whole model is what shows their bits."""
        alone = {name: functools.partial(elementwise, i) for i, name in enumerate(("exp", "softplus", "silu"))}
        return alone | {"log_softmax": functools.partial(log_softmax, self.threads)}


def log_softmax(threads: Threads, logits: F32Array) -> F32Array:
    """Eq. (25), a row at a time on each thread: (..., vocabulary) -> the same."""
    x, n = np.ascontiguousarray(logits), logits.shape[-1]
    y, terms = np.empty_like(x), aligned((threads.count, strips_of(n) * LANES))
    table = [0, x.size // n, n, address(x), address(y), address(terms), terms.strides[0]]
    threads.run(kernels.log_softmax, np.array(table))
    return y


def elementwise(which: int, x: F32Array) -> F32Array:
    """exp (0), softplus (1) or silu (2) by the kernels. Any shape."""
    vectors = strips_of(x.size)
    source, target = aligned((vectors * LANES,)), aligned((vectors * LANES,))
    source[: x.size], source[x.size :] = x.ravel(), 0
    table = np.array([which, vectors, address(source), address(target)])
    kernels.elementwise(address(table))
    return target[: x.size].reshape(x.shape)


def check_exact(threads: Threads) -> None:
    """Multiply the largest codes in the longest block, and a subnormal on every thread. Raises BackendError."""
    k = kernels.BLOCK
    w, x, out = aligned((2, k // 4, LANES, 4), np.uint8), aligned((8, k), np.int8), aligned((8, 2, LANES), np.int32)
    w.fill(255)
    x[...] = np.where(np.arange(8) % 2, 127, -128)[:, None]
    tiny, halves = np.array([2.0**-140], np.float32), np.zeros(threads.count, np.float32)
    threads.run(kernels.probe, np.array([address(a) for a in (w, x)] + [k] + [address(a) for a in (out, tiny, halves)]))
    if not np.array_equal(out, np.broadcast_to(255 * k * x[:, :1, None].astype(np.int32), out.shape)):
        raise BackendError("this processor's integer product is not exact; use --backend reference and report its model")
    if not np.all(halves == f32(2.0**-141)):
        raise BackendError("subnormal numbers are flushed to zero in this process, so bits would differ; switch that off")
