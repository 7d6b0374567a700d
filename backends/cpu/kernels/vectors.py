"""Vectors of 16 lanes as numba types, and the few machine operations that the CPU kernels are written in.

numba's own vectorizer decides anew for every loop; here each vector operation is one LLVM instruction on <16 x T>, which
LLVM cuts to whatever registers the machine has. No operation carries a fast-math flag, so none is fused or reordered.
Memory is named by address (int64): the kernels see no arrays, so nothing is bounds-checked, aliased or counted.
"""

import operator
import platform
import sys
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

LANES = 16
AHEAD = 4096  # bytes from the codes being read to those asked for
X86 = platform.machine().lower() in ("x86_64", "amd64")
# What numba compiles for: the host's features unless NUMBA_CPU_NAME or NUMBA_CPU_FEATURES say otherwise.
FEATURES = set(cpu_target.target_context.codegen().magic_tuple()[2].split(","))
# Bytes that one VNNI instruction multiplies; 0: there is none.
VNNI = 64 if {"+avx512vnni", "+avx512bw", "+avx512vl"} <= FEATURES else 32 if "+avxvnni" in FEATURES else 0
REGISTERS_32 = not X86 or "+avx512vl" in FEATURES  # else 16
DOUBLES = 16 if REGISTERS_32 else 8  # channels of one tile of float64

i8, i16, i32, i64, f32, f64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()


class Vector(types.Type):  # type: ignore[misc]
    """16 lanes of one LLVM type."""

    def __init__(self, name: str, lane: ir.Type) -> None:
        super().__init__(name)
        self.lane, self.llvm = lane, ir.VectorType(lane, LANES)


@register_model(Vector)
class VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    """A vector is an LLVM value."""

    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.llvm)


F, D = Vector("F", f32), Vector("D", f64)  # float32, float64
I, L = Vector("I", i32), Vector("L", i64)  # int32, int64  # noqa: E741
M = Vector("M", ir.IntType(1))  # the result of a comparison


def _operator(symbol: Any, instructions: dict[Vector, str], result: Vector | None = None) -> None:
    @type_callable(symbol)
    def typing(context: Any) -> Callable[..., Any]:
        return lambda a, b: (result or a) if isinstance(a, Vector) and a == b and a in instructions else None

    @lower_builtin(symbol, Vector, Vector)
    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        name, *comparison = instructions[signature.args[0]].split()
        return getattr(builder, name)(*comparison, *arguments)


_operator(operator.add, {F: "fadd", D: "fadd", I: "add", L: "add"})
_operator(operator.sub, {F: "fsub", D: "fsub", I: "sub", L: "sub"})
_operator(operator.mul, {F: "fmul", D: "fmul", I: "mul", L: "mul"})
_operator(operator.truediv, {F: "fdiv"})
_operator(operator.and_, {I: "and_", L: "and_", M: "and_"})
_operator(operator.xor, {I: "xor"})
_operator(operator.lshift, {I: "shl", L: "shl"})
_operator(operator.rshift, {I: "ashr", L: "ashr"})
_operator(operator.gt, {F: "fcmp_ordered >", I: "icmp_signed >"}, M)
_operator(operator.ge, {F: "fcmp_ordered >="}, M)
_operator(operator.le, {F: "fcmp_ordered <="}, M)
_operator(operator.lt, {F: "fcmp_ordered <"}, M)


def _intrinsic(result: types.Type, *parameters: types.Type) -> Callable[[Callable[..., Any]], Any]:
    """An intrinsic of fixed types from a function (builder, *values) -> value."""

    def wrap(build: Callable[..., Any]) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value = build(builder, *arguments)
            return context.get_dummy_value() if result is types.void else value

        names = [f"a{i}" for i in range(len(parameters))]
        scope = {"signature": result(*parameters), "codegen": codegen}
        # numba wants an intrinsic's parameters by name.
        exec(f"def {build.__name__}(typingctx, {', '.join(names)}): return signature, codegen", scope)
        return intrinsic(scope[build.__name__])

    return wrap


def _pointer(builder: Any, address: Any, to: ir.Type) -> Any:
    return builder.inttoptr(address, to.as_pointer())


def _load(builder: Any, address: Any, of: ir.Type, align: int) -> Any:
    return builder.load(_pointer(builder, address, of), align=align)


def _call(builder: Any, name: str, result: ir.Type, *arguments: Any) -> Any:
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [a.type for a in arguments]), name)
    return builder.call(function, arguments)


def _prefetch(builder: Any, address: Any) -> None:
    """Ask for a cache line that is read soon. No address is a fault."""
    read, keep, data = (ir.Constant(i32, value) for value in (0, 3, 1))
    _call(builder, "llvm.prefetch.p0", ir.VoidType(), _pointer(builder, address, i8), read, keep, data)


def _splat(builder: Any, scalar: Any, lanes: int = LANES) -> Any:
    vector = ir.VectorType(scalar.type, lanes)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(i32, 0))
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(i32, lanes), [0] * lanes))


def _pick(builder: Any, vector: Any, lanes: range) -> Any:
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(i32, len(lanes)), list(lanes)))


# Memory: every vector is aligned to its own size, but for rows of logits: the four that say so.


@_intrinsic(F, types.int64)
def load_f(b: Any, address: Any) -> Any:
    return _load(b, address, F.llvm, 64)


@_intrinsic(F, types.int64)
def load_any(b: Any, address: Any) -> Any:
    """At any address."""
    return _load(b, address, F.llvm, 4)


def _first(b: Any, count: Any) -> Any:
    return b.icmp_signed("<", ir.Constant(I.llvm, list(range(LANES))), _splat(b, b.trunc(count, i32)))


@_intrinsic(F, types.int64, types.int64)
def load_first(b: Any, address: Any, count: Any) -> Any:
    """The first `count` lanes, at any address, and -infinity in the others."""
    rest, pointer = ir.Constant(F.llvm, [float("-inf")] * LANES), _pointer(b, address, F.llvm)
    return _call(b, "llvm.masked.load.v16f32.p0", F.llvm, pointer, ir.Constant(i32, 4), _first(b, count), rest)


@_intrinsic(I, types.int64)
def load_i(b: Any, address: Any) -> Any:
    return _load(b, address, I.llvm, 64)


@_intrinsic(D, types.int64)
def load_d(b: Any, address: Any) -> Any:
    return _load(b, address, D.llvm, 64)


@_intrinsic(types.void, types.int64, F)
def store_f(b: Any, address: Any, value: Any) -> Any:
    b.store(value, _pointer(b, address, F.llvm), align=64)


@_intrinsic(types.void, types.int64, D)
def store_d(b: Any, address: Any, value: Any) -> Any:
    b.store(value, _pointer(b, address, D.llvm), align=64)


@_intrinsic(D, types.int64, types.int64)
def load_apart(b: Any, address: Any, stride: Any) -> Any:
    """What `store_apart` stored."""
    if DOUBLES == LANES:
        return _load(b, address, D.llvm, 64)
    parts = [_load(b, at, ir.VectorType(f64, DOUBLES), 64) for at in (address, b.add(address, stride))]
    return b.shuffle_vector(*parts, ir.Constant(I.llvm, list(range(LANES))))


@_intrinsic(types.void, types.int64, types.int64, D)
def store_apart(b: Any, address: Any, stride: Any, value: Any) -> Any:
    """DOUBLES lanes here, and where those are not all, the others `stride` bytes on."""
    for start in range(0, LANES, DOUBLES):
        b.store(_pick(b, value, range(start, start + DOUBLES)), _pointer(b, address, ir.VectorType(f64, DOUBLES)), align=64)
        address = b.add(address, stride)


@_intrinsic(types.void, types.int64, F)
def store_any(b: Any, address: Any, value: Any) -> Any:
    """At any address."""
    b.store(value, _pointer(b, address, F.llvm), align=4)


@_intrinsic(types.void, types.int64, F, types.int64)
def store_first(b: Any, address: Any, value: Any, count: Any) -> Any:
    """The first `count` lanes, at any address."""
    pointer = _pointer(b, address, F.llvm)
    _call(b, "llvm.masked.store.v16f32.p0", ir.VoidType(), value, pointer, ir.Constant(i32, 4), _first(b, count))


@_intrinsic(types.void, types.int64, I)
def store_bytes(b: Any, address: Any, value: Any) -> Any:
    """The low byte of every lane."""
    b.store(b.trunc(value, ir.VectorType(i8, LANES)), _pointer(b, address, ir.VectorType(i8, LANES)), align=16)


@_intrinsic(types.int64, types.int64)
def get(b: Any, address: Any) -> Any:
    return _load(b, address, i64, 8)


@_intrinsic(types.void, types.int64, types.int64)
def put(b: Any, address: Any, value: Any) -> Any:
    b.store(value, _pointer(b, address, i64), align=8)


@_intrinsic(types.float32, types.int64)
def get_f(b: Any, address: Any) -> Any:
    return _load(b, address, f32, 4)


@_intrinsic(types.void, types.int64, types.float32)
def put_f(b: Any, address: Any, value: Any) -> Any:
    b.store(value, _pointer(b, address, f32), align=4)


@_intrinsic(types.float32, types.int64)
def float_of(b: Any, bits: Any) -> Any:
    """The float32 of these bits."""
    return b.bitcast(b.trunc(bits, i32), f32)


# Lanes.
@_intrinsic(F, types.float32)
def splat_f(b: Any, x: Any) -> Any:
    return _splat(b, x)


@_intrinsic(I, types.int64)
def splat_i(b: Any, x: Any) -> Any:
    return _splat(b, b.trunc(x, i32))


@_intrinsic(L, types.int64)
def splat_l(b: Any, x: Any) -> Any:
    return _splat(b, x)


@_intrinsic(F, M, F, F)
def where(b: Any, mask: Any, yes: Any, no: Any) -> Any:
    return b.select(mask, yes, no)


@_intrinsic(I, M, I, I)
def where_i(b: Any, mask: Any, yes: Any, no: Any) -> Any:
    return b.select(mask, yes, no)


@_intrinsic(F, F)
def rint(b: Any, x: Any) -> Any:
    return _call(b, "llvm.roundeven.v16f32", F.llvm, x)


@_intrinsic(F, F)
def negative(b: Any, x: Any) -> Any:
    return b.fneg(x)


@_intrinsic(I, F)
def bits(b: Any, x: Any) -> Any:
    return b.bitcast(x, I.llvm)


@_intrinsic(F, I)
def from_bits(b: Any, x: Any) -> Any:
    return b.bitcast(x, F.llvm)


@_intrinsic(I, F)
def to_int(b: Any, x: Any) -> Any:
    return b.fptosi(x, I.llvm)


@_intrinsic(F, I)
def to_float(b: Any, x: Any) -> Any:
    return b.sitofp(x, F.llvm)


@_intrinsic(L, I)
def widen(b: Any, x: Any) -> Any:
    return b.sext(x, L.llvm)


@_intrinsic(D, L)
def to_double(b: Any, x: Any) -> Any:
    return b.sitofp(x, D.llvm)


@_intrinsic(D, I)
def whole_double(b: Any, x: Any) -> Any:
    return b.sitofp(x, D.llvm)


@_intrinsic(D, D)
def rint_d(b: Any, x: Any) -> Any:
    return _call(b, "llvm.roundeven.v16f64", D.llvm, x)


@_intrinsic(D, types.float64)
def splat_d(b: Any, x: Any) -> Any:
    return _splat(b, x)


@_intrinsic(types.float64, types.int64)
def get_d(b: Any, address: Any) -> Any:
    return _load(b, address, f64, 8)


@_intrinsic(D, F)
def double(b: Any, x: Any) -> Any:
    return b.fpext(x, D.llvm)


@_intrinsic(F, D)
def single(b: Any, x: Any) -> Any:
    return b.fptrunc(x, F.llvm)


@_intrinsic(types.int64, I)
def largest(b: Any, x: Any) -> Any:
    return b.sext(_call(b, "llvm.vector.reduce.smax.v16i32", i32, x), i64)


@_intrinsic(types.float32, F)
def highest(b: Any, x: Any) -> Any:
    """The largest of 16 lanes, none of them NaN."""
    return _call(b, "llvm.vector.reduce.fmax.v16f32", f32, x)


@_intrinsic(types.int64, F, F)
def differ(b: Any, x: Any, y: Any) -> Any:
    """1 where a lane's bits are not the same in both, else 0."""
    unequal = b.icmp_signed("!=", b.bitcast(x, I.llvm), b.bitcast(y, I.llvm))
    return b.zext(_call(b, "llvm.vector.reduce.or.v16i1", ir.IntType(1), unequal), i64)


@_intrinsic(types.int64, L)
def total(b: Any, x: Any) -> Any:
    return _call(b, "llvm.vector.reduce.add.v16i64", i64, x)


@_intrinsic(types.float32, F)
def lane_tree(b: Any, x: Any) -> Any:
    """The tree sum of 16 lanes, eq. (6)."""
    width = LANES
    while width > 1:
        width //= 2
        x = b.fadd(_pick(b, x, range(width)), _pick(b, x, range(width, 2 * width)))
    return b.extract_element(x, ir.Constant(i32, 0))


# Integer products.
def _dot(b: Any, total: Any, w: Any, x: Any) -> Any:
    """total + the four products of each lane: w <64 x u8>, x <16 x i32> of four signed bytes. Exact."""
    if VNNI:
        x = b.bitcast(x, w.type)
        parts = []
        for start in range(0, 64, VNNI):
            lanes, codes = range(start // 4, (start + VNNI) // 4), range(start, start + VNNI)
            arguments = _pick(b, total, lanes), _pick(b, w, codes), _pick(b, x, codes)
            parts.append(_call(b, f"llvm.x86.avx512.vpdpbusd.{8 * VNNI}", arguments[0].type, *arguments))
        together = ir.Constant(ir.VectorType(i32, LANES), list(range(LANES)))
        return parts[0] if len(parts) == 1 else b.shuffle_vector(*parts, together)
    # Pairs of 16-bit products, a pattern that LLVM knows as one instruction (pmaddwd): no saturation, unlike pmaddubsw.
    short = ir.VectorType(i16, 32)
    eight = ir.Constant(short, [8] * 32)
    w, x = b.bitcast(w, short), b.bitcast(x, short)
    evens = b.and_(w, ir.Constant(short, [255] * 32)), b.ashr(b.shl(x, eight), eight)
    odds = b.lshr(w, eight), b.ashr(x, eight)
    for a, c in (evens, odds):
        product = b.mul(b.sext(a, ir.VectorType(i32, 32)), b.sext(c, ir.VectorType(i32, 32)))
        pairs = b.add(_pick(b, product, range(0, 32, 2)), _pick(b, product, range(1, 32, 2)))
        total = b.add(total, pairs)
    return total


def tile(packed: bool, strips: int, columns: int, unroll: int) -> Any:
    """A register-blocked integer product, as an intrinsic (w, w_stride, x, x_stride, k, out).

    Sums over k of w[strip][k][lane] x[column][k], for `strips` strips of 16 rows and `columns` rows of x: exact, int32,
    to out[column][strip][lane], where a column has room for two strips. w holds unsigned digits, [k/4][16 lanes][4], or
    packed, two digits a byte, [k/8][16][4] with the first four k in the low halves. x holds int8. `unroll` sums are kept
    apart, to hide the latency.
    k is a multiple of 16.
    """

    def build(b: Any, w: Any, w_stride: Any, x: Any, x_stride: Any, k: Any, out: Any) -> Any:
        code = ir.VectorType(i8, 64)
        groups = 2 if packed else 1  # of four k in 64 bytes
        step = 4 * groups * unroll
        before, loop = b.block, b.append_basic_block("tile")
        after = b.append_basic_block("tile.end")
        b.branch(loop)
        b.position_at_end(loop)
        at = b.phi(i64)
        at.add_incoming(ir.Constant(i64, 0), before)
        sums = [[[b.phi(I.llvm) for _ in range(columns)] for _ in range(strips)] for _ in range(unroll)]
        new = [[list(row) for row in part] for part in sums]
        w_at = b.add(w, b.mul(at, ir.Constant(i64, 16 // groups)))
        x_at = b.add(x, at)
        for u in range(unroll):
            digits = []
            for s in range(strips):
                address = b.add(b.add(w_at, ir.Constant(i64, 64 * u)), b.mul(w_stride, ir.Constant(i64, s)))
                raw = _load(b, address, code, 64)
                if columns <= 4:  # bound by memory, which the machine's own prefetchers read only to the end of a page
                    _prefetch(b, b.add(address, ir.Constant(i64, AHEAD)))
                if packed:
                    low = ir.Constant(code, [15] * 64)
                    digits.append([b.and_(raw, low), b.lshr(raw, ir.Constant(code, [4] * 64))])
                else:
                    digits.append([raw])
            for g in range(groups):
                for c in range(columns):
                    offset = b.add(b.mul(x_stride, ir.Constant(i64, c)), ir.Constant(i64, 4 * (u * groups + g)))
                    four = _splat(b, _load(b, b.add(x_at, offset), i32, 4))
                    for s in range(strips):
                        new[u][s][c] = _dot(b, new[u][s][c], digits[s][g], four)
        for u in range(unroll):
            for s in range(strips):
                for c in range(columns):
                    sums[u][s][c].add_incoming(ir.Constant(I.llvm, [0] * LANES), before)
                    sums[u][s][c].add_incoming(new[u][s][c], loop)
        following = b.add(at, ir.Constant(i64, step))
        at.add_incoming(following, loop)
        b.cbranch(b.icmp_signed("<", following, k), loop, after)
        b.position_at_end(after)
        for s in range(strips):
            for c in range(columns):
                value = new[0][s][c]
                for u in range(1, unroll):
                    value = b.add(value, new[u][s][c])
                b.store(value, _pointer(b, b.add(out, ir.Constant(i64, 64 * (2 * c + s))), I.llvm), align=64)

    return _intrinsic(types.void, *[types.int64] * 6)(build)


def panel_tile(columns: int) -> Any:
    """A register-blocked float64 product, as an intrinsic (w, x, x_stride, k, out): out[column][lane] += the sum over k.

    w: [k][DOUBLES lanes]; x: [column][k]; a column of `out` has 16 lanes. Products must be exact in float64, so that it does
    not matter whether one is fused with its addition. k is a multiple of 16.
    """
    kind = ir.VectorType(f64, DOUBLES)

    def build(b: Any, w: Any, x: Any, x_stride: Any, k: Any, out: Any) -> Any:
        before, loop = b.block, b.append_basic_block("panel")
        after = b.append_basic_block("panel.end")
        b.branch(loop)
        b.position_at_end(loop)
        at = b.phi(i64)
        at.add_incoming(ir.Constant(i64, 0), before)
        sums = [b.phi(kind) for _ in range(columns)]
        new = list(sums)
        w_at, x_at = b.add(w, b.mul(at, ir.Constant(i64, 8 * DOUBLES))), b.add(x, b.mul(at, ir.Constant(i64, 8)))
        for u in range(2):
            codes = _load(b, b.add(w_at, ir.Constant(i64, 8 * DOUBLES * u)), kind, 64)
            for c in range(columns):
                offset = b.add(b.mul(x_stride, ir.Constant(i64, c)), ir.Constant(i64, 8 * u))
                one = _splat(b, _load(b, b.add(x_at, offset), f64, 8), DOUBLES)
                new[c] = _call(b, f"llvm.fmuladd.v{DOUBLES}f64", kind, codes, one, new[c])
        for c in range(columns):
            sums[c].add_incoming(ir.Constant(kind, [0.0] * DOUBLES), before)
            sums[c].add_incoming(new[c], loop)
        following = b.add(at, ir.Constant(i64, 2))
        at.add_incoming(following, loop)
        b.cbranch(b.icmp_signed("<", following, k), loop, after)
        b.position_at_end(after)
        for c in range(columns):
            place = b.add(out, ir.Constant(i64, 8 * LANES * c))
            b.store(b.fadd(_load(b, place, kind, 64), new[c]), _pointer(b, place, kind), align=64)

    return _intrinsic(types.void, *[types.int64] * 5)(build)


# Threads.
@_intrinsic(types.int64, types.int64, types.int64)
def fetch_add(b: Any, address: Any, amount: Any) -> Any:
    return b.atomic_rmw("add", _pointer(b, address, i64), amount, "seq_cst")


@_intrinsic(types.int64, types.int64)
def fetch(b: Any, address: Any) -> Any:
    return b.load_atomic(_pointer(b, address, i64), "seq_cst", 8)


@_intrinsic(types.void, types.int64)
def pause(b: Any, _: Any) -> Any:
    """Tell the core that it waits in a loop."""
    if X86:
        _call(b, "llvm.x86.sse2.pause", ir.VoidType())


@_intrinsic(types.void, types.int64)
def give_way(b: Any, _: Any) -> Any:
    """Let another thread have the core."""
    _call(b, "SwitchToThread" if sys.platform == "win32" else "sched_yield", i32)
