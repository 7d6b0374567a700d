"""The machine operations that the CPU kernels are written in: memory, lanes and atomic counters."""

import sys
from typing import Any

from llvmlite import ir
from numba import types

from refmamba.backends.cpu.kernels.instructions import (
    FEATURES,
    LANES,
    X86,
    D,
    F,
    I,
    L,
    M,
    call,
    f32,
    f64,
    i8,
    i32,
    i64,
    load,
    machine,
    pick,
    splat,
    to_pointer,
)

REGISTERS_32 = not X86 or "+avx512vl" in FEATURES  # else 16
DOUBLES = 16 if REGISTERS_32 else 8  # channels of one tile of float64


@machine(F, types.int64)
def load_f(b: Any, address: Any) -> Any:
    return load(b, address, F.llvm, 64)


@machine(F, types.int64)
def load_any(b: Any, address: Any) -> Any:
    """At any address."""
    return load(b, address, F.llvm, 4)


def _first(b: Any, count: Any) -> Any:
    return b.icmp_signed("<", ir.Constant(I.llvm, list(range(LANES))), splat(b, b.trunc(count, i32)))


@machine(F, types.int64, types.int64)
def load_first(b: Any, address: Any, count: Any) -> Any:
    """The first `count` lanes, at any address, and -infinity in the others."""
    rest, pointer = ir.Constant(F.llvm, [float("-inf")] * LANES), to_pointer(b, address, F.llvm)
    return call(b, "llvm.masked.load.v16f32.p0", F.llvm, pointer, ir.Constant(i32, 4), _first(b, count), rest)


@machine(I, types.int64)
def load_i(b: Any, address: Any) -> Any:
    return load(b, address, I.llvm, 64)


@machine(I, types.int64)
def load_bytes(b: Any, address: Any) -> Any:
    """16 int8."""
    return b.sext(load(b, address, ir.VectorType(i8, LANES), 16), I.llvm)


@machine(I, types.int64)
def load_steps(b: Any, address: Any) -> Any:
    """16 uint8."""
    return b.zext(load(b, address, ir.VectorType(i8, LANES), 16), I.llvm)


@machine(D, types.int64)
def load_d(b: Any, address: Any) -> Any:
    return load(b, address, D.llvm, 64)


@machine(types.void, types.int64, F)
def store_f(b: Any, address: Any, value: Any) -> Any:
    b.store(value, to_pointer(b, address, F.llvm), align=64)


@machine(types.void, types.int64, I)
def store_i(b: Any, address: Any, value: Any) -> Any:
    b.store(value, to_pointer(b, address, I.llvm), align=64)


@machine(types.void, types.int64, D)
def store_d(b: Any, address: Any, value: Any) -> Any:
    b.store(value, to_pointer(b, address, D.llvm), align=64)


@machine(D, types.int64, types.int64)
def load_apart(b: Any, address: Any, stride: Any) -> Any:
    """What `store_apart` stored."""
    if DOUBLES == LANES:
        return load(b, address, D.llvm, 64)
    parts = [load(b, at, ir.VectorType(f64, DOUBLES), 64) for at in (address, b.add(address, stride))]
    return b.shuffle_vector(*parts, ir.Constant(I.llvm, list(range(LANES))))


@machine(types.void, types.int64, types.int64, D)
def store_apart(b: Any, address: Any, stride: Any, value: Any) -> Any:
    """DOUBLES lanes here, and where those are not all, the others `stride` bytes on."""
    for start in range(0, LANES, DOUBLES):
        b.store(pick(b, value, range(start, start + DOUBLES)), to_pointer(b, address, ir.VectorType(f64, DOUBLES)), align=64)
        address = b.add(address, stride)


@machine(types.void, types.int64, F)
def store_any(b: Any, address: Any, value: Any) -> Any:
    """At any address."""
    b.store(value, to_pointer(b, address, F.llvm), align=4)


@machine(types.void, types.int64, F, types.int64)
def store_first(b: Any, address: Any, value: Any, count: Any) -> Any:
    """The first `count` lanes, at any address."""
    pointer = to_pointer(b, address, F.llvm)
    call(b, "llvm.masked.store.v16f32.p0", ir.VoidType(), value, pointer, ir.Constant(i32, 4), _first(b, count))


@machine(types.void, types.int64, I)
def store_bytes(b: Any, address: Any, value: Any) -> Any:
    """The low byte of every lane."""
    b.store(b.trunc(value, ir.VectorType(i8, LANES)), to_pointer(b, address, ir.VectorType(i8, LANES)), align=16)


@machine(types.int64, types.int64)
def get(b: Any, address: Any) -> Any:
    return load(b, address, i64, 8)


@machine(types.void, types.int64, types.int64)
def put(b: Any, address: Any, value: Any) -> Any:
    b.store(value, to_pointer(b, address, i64), align=8)


@machine(types.float32, types.int64)
def get_f(b: Any, address: Any) -> Any:
    return load(b, address, f32, 4)


@machine(types.void, types.int64, types.float32)
def put_f(b: Any, address: Any, value: Any) -> Any:
    b.store(value, to_pointer(b, address, f32), align=4)


@machine(types.float32, types.int64)
def float_of(b: Any, bits: Any) -> Any:
    """The float32 of these bits."""
    return b.bitcast(b.trunc(bits, i32), f32)


# Lanes.
@machine(F, types.float32)
def splat_f(b: Any, x: Any) -> Any:
    return splat(b, x)


@machine(I, types.int64)
def splat_i(b: Any, x: Any) -> Any:
    return splat(b, b.trunc(x, i32))


@machine(L, types.int64)
def splat_l(b: Any, x: Any) -> Any:
    return splat(b, x)


@machine(F, M, F, F)
def where(b: Any, mask: Any, yes: Any, no: Any) -> Any:
    return b.select(mask, yes, no)


@machine(I, M, I, I)
def where_i(b: Any, mask: Any, yes: Any, no: Any) -> Any:
    return b.select(mask, yes, no)


@machine(F, F)
def rint(b: Any, x: Any) -> Any:
    return call(b, "llvm.roundeven.v16f32", F.llvm, x)


@machine(F, F)
def negative(b: Any, x: Any) -> Any:
    return b.fneg(x)


@machine(I, F)
def bits(b: Any, x: Any) -> Any:
    return b.bitcast(x, I.llvm)


@machine(F, I)
def from_bits(b: Any, x: Any) -> Any:
    return b.bitcast(x, F.llvm)


@machine(I, F)
def to_int(b: Any, x: Any) -> Any:
    return b.fptosi(x, I.llvm)


@machine(F, I)
def to_float(b: Any, x: Any) -> Any:
    return b.sitofp(x, F.llvm)


@machine(L, I)
def widen(b: Any, x: Any) -> Any:
    return b.sext(x, L.llvm)


@machine(D, L)
def to_double(b: Any, x: Any) -> Any:
    return b.sitofp(x, D.llvm)


@machine(D, I)
def whole_double(b: Any, x: Any) -> Any:
    return b.sitofp(x, D.llvm)


@machine(D, D)
def rint_d(b: Any, x: Any) -> Any:
    return call(b, "llvm.roundeven.v16f64", D.llvm, x)


@machine(D, types.float64)
def splat_d(b: Any, x: Any) -> Any:
    return splat(b, x)


@machine(types.float64, types.int64)
def get_d(b: Any, address: Any) -> Any:
    return load(b, address, f64, 8)


@machine(D, F)
def double(b: Any, x: Any) -> Any:
    return b.fpext(x, D.llvm)


@machine(F, D)
def single(b: Any, x: Any) -> Any:
    return b.fptrunc(x, F.llvm)


@machine(types.int64, I)
def largest(b: Any, x: Any) -> Any:
    return b.sext(call(b, "llvm.vector.reduce.smax.v16i32", i32, x), i64)


@machine(types.float32, F)
def highest(b: Any, x: Any) -> Any:
    """The largest of 16 lanes, none of them NaN."""
    return call(b, "llvm.vector.reduce.fmax.v16f32", f32, x)


@machine(types.int64, F, F)
def differ(b: Any, x: Any, y: Any) -> Any:
    """1 where a lane's bits are not the same in both, else 0."""
    unequal = b.icmp_signed("!=", b.bitcast(x, I.llvm), b.bitcast(y, I.llvm))
    return b.zext(call(b, "llvm.vector.reduce.or.v16i1", ir.IntType(1), unequal), i64)


@machine(types.int64, L)
def total(b: Any, x: Any) -> Any:
    return call(b, "llvm.vector.reduce.add.v16i64", i64, x)


@machine(types.float32, F)
def lane_tree(b: Any, x: Any) -> Any:
    """The tree sum of 16 lanes, eq. (6)."""
    width = LANES
    while width > 1:
        width //= 2
        x = b.fadd(pick(b, x, range(width)), pick(b, x, range(width, 2 * width)))
    return b.extract_element(x, ir.Constant(i32, 0))


def butterfly(half: int) -> Any:
    """An intrinsic: of the lanes l with no bit `half`, lane l + half is added to them, and taken off from them there."""

    def build(b: Any, x: Any) -> Any:
        other = b.shuffle_vector(x, x, ir.Constant(I.llvm, [lane ^ half for lane in range(LANES)]))
        chosen = [lane + LANES if lane & half else lane for lane in range(LANES)]
        return b.shuffle_vector(b.fadd(x, other), b.fsub(other, x), ir.Constant(I.llvm, chosen))

    return machine(D, D)(build)


BUTTERFLIES = tuple(butterfly(half) for half in (1, 2, 4, 8))


@machine(types.int64, types.int64, types.int64)
def fetch_add(b: Any, address: Any, amount: Any) -> Any:
    return b.atomic_rmw("add", to_pointer(b, address, i64), amount, "seq_cst")


@machine(types.int64, types.int64)
def fetch(b: Any, address: Any) -> Any:
    return b.load_atomic(to_pointer(b, address, i64), "seq_cst", 8)


def ask(b: Any, address: Any, cache: int, *, write: bool = False) -> None:
    """Ask for a cache line that is read, or written, soon: into the first cache, 3, or the second, 2. No address is a fault."""
    arguments = (ir.Constant(i32, value) for value in (int(write), cache, 1))  # 1: of data
    call(b, "llvm.prefetch.p0", ir.VoidType(), to_pointer(b, address, i8), *arguments)


@machine(types.void, types.int64)
def ask_read(b: Any, address: Any) -> None:
    """Ask for a cache line that is read soon."""
    ask(b, address, 2)


@machine(types.void, types.int64)
def ask_write(b: Any, address: Any) -> None:
    """Ask for a cache line that is written soon."""
    ask(b, address, 2, write=True)


@machine(types.void, types.int64)
def pause(b: Any, _: Any) -> Any:
    """Tell the core that it waits in a loop."""
    if X86:
        call(b, "llvm.x86.sse2.pause", ir.VoidType())


@machine(types.void, types.int64)
def give_way(b: Any, _: Any) -> Any:
    """Let another thread have the core."""
    call(b, "SwitchToThread" if sys.platform == "win32" else "sched_yield", i32)
