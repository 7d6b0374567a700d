"""The inner loops of the two kinds of product, unrolled into registers: integer codes, and float64 panels."""

from typing import Any

from llvmlite import ir
from llvmlite.binding import llvm_version_info
from numba import types

from refmamba.backends.cpu.kernels.instructions import (
    FEATURES,
    LANES,
    I,
    call,
    f64,
    i8,
    i16,
    i32,
    i64,
    load,
    machine,
    pick,
    splat,
    to_pointer,
)
from refmamba.backends.cpu.kernels.vectors import DOUBLES

AHEAD = 4096  # bytes from the codes being read to those asked for
LLVM = llvm_version_info[0]
# Bytes that one VNNI instruction multiplies; 0: there is none.
VNNI = 64 if {"+avx512vnni", "+avx512bw", "+avx512vl"} <= FEATURES else 32 if "+avxvnni" in FEATURES else 0


def _prefetch(builder: Any, address: Any) -> None:
    """Ask for a cache line that is read soon. No address is a fault."""
    read, keep, data = (ir.Constant(i32, value) for value in (0, 3, 1))
    call(builder, "llvm.prefetch.p0", ir.VoidType(), to_pointer(builder, address, i8), read, keep, data)


def _dot(b: Any, total: Any, w: Any, x: Any) -> Any:
    """total + the four products of each lane: w <64 x u8>, x <16 x i32> of four signed bytes. Exact."""
    if VNNI:
        x = b.bitcast(x, w.type)
        parts = []
        for start in range(0, 64, VNNI):
            lanes, codes = range(start // 4, (start + VNNI) // 4), range(start, start + VNNI)
            arguments = pick(b, total, lanes), pick(b, w, codes), pick(b, x, codes)
            if LLVM < 22:  # whose instruction takes the bytes in fours
                arguments = arguments[0], *(b.bitcast(four, arguments[0].type) for four in arguments[1:])
            parts.append(call(b, f"llvm.x86.avx512.vpdpbusd.{8 * VNNI}", arguments[0].type, *arguments))
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
        pairs = b.add(pick(b, product, range(0, 32, 2)), pick(b, product, range(1, 32, 2)))
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
                raw = load(b, address, code, 64)
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
                    four = splat(b, load(b, b.add(x_at, offset), i32, 4))
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
                b.store(value, to_pointer(b, b.add(out, ir.Constant(i64, 64 * (2 * c + s))), I.llvm), align=64)

    return machine(types.void, *[types.int64] * 6)(build)


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
            codes = load(b, b.add(w_at, ir.Constant(i64, 8 * DOUBLES * u)), kind, 64)
            for c in range(columns):
                offset = b.add(b.mul(x_stride, ir.Constant(i64, c)), ir.Constant(i64, 8 * u))
                code_of_column = splat(b, load(b, b.add(x_at, offset), f64, 8), DOUBLES)
                new[c] = call(b, f"llvm.fmuladd.v{DOUBLES}f64", kind, codes, code_of_column, new[c])
        for c in range(columns):
            sums[c].add_incoming(ir.Constant(kind, [0.0] * DOUBLES), before)
            sums[c].add_incoming(new[c], loop)
        following = b.add(at, ir.Constant(i64, 2))
        at.add_incoming(following, loop)
        b.cbranch(b.icmp_signed("<", following, k), loop, after)
        b.position_at_end(after)
        for c in range(columns):
            place = b.add(out, ir.Constant(i64, 8 * LANES * c))
            b.store(b.fadd(load(b, place, kind, 64), new[c]), to_pointer(b, place, kind), align=64)

    return machine(types.void, *[types.int64] * 5)(build)
