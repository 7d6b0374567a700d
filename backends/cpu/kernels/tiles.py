"""The inner loops of the products, unrolled into registers: integer codes, those in groups, and float64 panels."""

import functools
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_name, llvm_version_info
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
from refmamba.backends.cpu.kernels.tables import PACKED_OFFSET, UNIT
from refmamba.backends.cpu.kernels.vectors import DOUBLES, ask

LLVM = llvm_version_info[0]
# Bytes that one VNNI instruction multiplies; 0: there is none.
VNNI = 64 if {"+avx512vnni", "+avx512bw", "+avx512vl"} <= FEATURES else 32 if "+avxvnni" in FEATURES else 0
# How far ahead a tile asks for codes, bytes, and for which cache. AMD's own prefetchers are faster where they are left alone;
# with VNNI tiles of bytes of 1 column, or 8 or more, outrun them, and tiles of groups of 4 or more.
AMD = get_host_cpu_name().startswith("znver")
AHEAD = (0, 0) if AMD else (2048, 3)
FAR_AHEAD = (4096, 2) if AMD and VNNI else AHEAD


def _prefetch(b: Any, address: Any, ahead: tuple[int, int]) -> None:
    """Ask for the cache line that lies so far ahead."""
    distance, cache = ahead
    if distance:
        ask(b, b.add(address, ir.Constant(i64, distance)), cache)


@machine(types.void, types.int64)
def ask_ahead(b: Any, address: Any) -> None:
    """What a tile of bytes of 1 column does beside each line that it reads."""
    _prefetch(b, address, FAR_AHEAD)


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
                _prefetch(b, address, AHEAD if packed or columns == 4 else FAR_AHEAD)
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


# Sums of a group's products are int32 with VNNI, else pairs of int16, of the columns 0, 1 and 2, 3 of each four.
SHORTS = ir.VectorType(i16, 2 * LANES)
SUM = I.llvm if VNNI else SHORTS
UNSIGNED_PAIRS = next(
    ((bits, name) for feature, bits, name in (
        ("+avx512bw", 512, "llvm.x86.avx512.pmaddubs.w.512"), ("+avx2", 256, "llvm.x86.avx2.pmadd.ub.sw"),
        ("+ssse3", 128, "llvm.x86.ssse3.pmadd.ub.sw.128"),
    ) if feature in FEATURES), None,
)  # fmt: skip


@machine(types.void, types.int64, I)
def store_start(b: Any, address: Any, codes: Any) -> Any:
    """What a sum of products of digits w + 8 with x starts from to be that of w with x: -8 times the sum of x.

    codes: the sums of x of the columns 0 to 15, and 16 to 31, and so on. Four bytes are stored: an int32, or the int16 of both
    pairs, modulo 2^16.
    """
    minus = ir.Constant(i32, -PACKED_OFFSET)
    sums = []
    for pairs in ((0, 1, 2, 3),) if VNNI else ((0, 1), (2, 3)):
        lanes = [lane for lane in range(LANES) if lane % 4 in pairs]
        chosen = b.shuffle_vector(codes, codes, ir.Constant(ir.VectorType(i32, len(lanes)), lanes))
        sums.append(b.mul(minus, call(b, f"llvm.vector.reduce.add.v{len(lanes)}i32", i32, chosen)))
    if not VNNI:
        sums = [b.or_(b.and_(sums[0], ir.Constant(i32, 0xFFFF)), b.shl(sums[1], ir.Constant(i32, 16)))]
    b.store(sums[0], to_pointer(b, address, i32), align=4)


def _dot_units(b: Any, total: Any, w: Any, x: Any) -> Any:
    """`_dot` for digits of 4 bits: total is a SUM, where an int16 is exact modulo 2^16."""
    if VNNI:
        return _dot(b, total, w, x)
    x = b.bitcast(x, w.type)
    if UNSIGNED_PAIRS:  # two products are at most 2 * 15 * 128, which does not saturate
        bits, name = UNSIGNED_PAIRS
        parts = []
        for start in range(0, 64, bits // 8):
            codes = range(start, start + bits // 8)
            parts.append(call(b, name, ir.VectorType(i16, bits // 16), pick(b, w, codes), pick(b, x, codes)))
        while len(parts) > 1:
            width = 2 * parts[0].type.count
            together = ir.Constant(ir.VectorType(i32, width), list(range(width)))
            parts = [b.shuffle_vector(*pair, together) for pair in zip(parts[::2], parts[1::2], strict=True)]
        return b.add(total, parts[0])
    w, x, eight = b.bitcast(w, SHORTS), b.bitcast(x, SHORTS), ir.Constant(SHORTS, [8] * 2 * LANES)
    evens = b.mul(b.and_(w, ir.Constant(SHORTS, [255] * 2 * LANES)), b.ashr(b.shl(x, eight), eight))
    return b.add(b.add(total, evens), b.mul(b.lshr(w, eight), b.ashr(x, eight)))


def _times_steps(b: Any, sums: Any, steps: Any) -> Any:
    """int32: a SUM times the steps of its 16 rows, int32."""
    if VNNI:
        return b.mul(sums, steps)
    wide = ir.VectorType(i32, 2 * LANES)
    steps = b.bitcast(b.or_(steps, b.shl(steps, ir.Constant(I.llvm, [16] * LANES))), SHORTS)
    product = b.mul(b.sext(sums, wide), b.sext(steps, wide))  # a pattern that LLVM knows as pmaddwd
    return b.add(pick(b, product, range(0, 2 * LANES, 2)), pick(b, product, range(1, 2 * LANES, 2)))


@machine(I, I, I, I)
def digits_times(b: Any, digits: Any, steps: Any, offset: Any) -> Any:
    """The low halves of 16 times 4 bytes, each times its lane's step, plus its lane's offset below 256; modulo 256.

    A lane's bytes 0 and 2, and 1 and 3, are multiplied as two numbers of 16 bits: bytes 1 and 3 where they are, as what leaves
    the 16 bits above does not count.
    """

    def shorts(x: Any) -> Any:
        return b.bitcast(b.or_(x, b.shl(x, ir.Constant(I.llvm, [16] * LANES))), SHORTS)

    def masked(x: Any, mask: int) -> Any:
        return b.and_(x, ir.Constant(SHORTS, [mask] * 2 * LANES))

    digits, by, bytes_of_a_vector = b.bitcast(digits, SHORTS), shorts(steps), ir.VectorType(i8, 64)
    evens = masked(b.mul(masked(digits, 0x000F), by), 0x00FF)
    odds = b.mul(masked(digits, 0x0F00), by)
    offset = shorts(b.or_(offset, b.shl(offset, ir.Constant(I.llvm, [8] * LANES))))
    total = b.add(b.bitcast(b.or_(evens, odds), bytes_of_a_vector), b.bitcast(offset, bytes_of_a_vector))
    return b.bitcast(total, I.llvm)


def grouped_tile(strips: int, columns: int, unroll: int) -> Any:
    """`tile` for codes in groups: (w, w_stride, steps, steps_stride, group_bits, x, x_stride, starts, starts_stride, k, out).

    w: two digits a byte, as `tile` has them packed. steps: uint8, [k >> group_bits][16 lanes]. starts: [column][unit], what
    `store_start` stored for each UNIT columns of a group, or fewer where the group or the row ends.
    """

    def build(
        b: Any, w: Any, w_stride: Any, steps: Any, steps_stride: Any, group_bits: Any, x: Any, x_stride: Any, starts: Any,
        starts_stride: Any, k: Any, out: Any,
    ) -> Any:  # fmt: skip
        def number(value: int) -> Any:
            return ir.Constant(i64, value)

        def times(value: Any, count: int) -> Any:
            return b.mul(value, number(count))

        code, low = ir.VectorType(i8, 64), ir.Constant(ir.VectorType(i8, 64), [15] * 64)
        before, unit = b.block, b.append_basic_block("unit")
        loop, unit_end, after = (b.append_basic_block(f"unit.{name}") for name in ("columns", "end", "after"))
        group = b.shl(number(1), group_bits)
        width = b.select(b.icmp_signed("<", group, number(UNIT)), group, number(UNIT))
        places = [(s, c) for s in range(strips) for c in range(columns)]
        parts = [(s, c, u) for s, c in places for u in range(unroll)]
        b.branch(unit)
        b.position_at_end(unit)
        first, start_at = b.phi(i64), b.phi(i64)
        totals = {place: b.phi(I.llvm) for place in places}
        first.add_incoming(number(0), before)
        start_at.add_incoming(starts, before)
        end = b.add(first, width)
        end = b.select(b.icmp_signed("<", end, k), end, k)
        begin = [b.bitcast(splat(b, load(b, b.add(start_at, times(starts_stride, c)), i32, 4)), SUM) for c in range(columns)]
        b.branch(loop)
        b.position_at_end(loop)
        at = b.phi(i64)
        at.add_incoming(first, unit)
        sums = {part: b.phi(SUM) for part in parts}
        new = dict(sums)
        w_at, x_at = b.add(w, times(at, 8)), b.add(x, at)
        for line in range(2):  # of 8 columns
            fours = [
                [
                    splat(b, load(b, b.add(x_at, b.add(times(x_stride, c), number(8 * line + 4 * half))), i32, 4))
                    for half in (0, 1)
                ]
                for c in range(columns)
            ]
            for s in range(strips):
                address = b.add(b.add(w_at, number(64 * line)), times(w_stride, s))
                raw = load(b, address, code, 64)
                _prefetch(b, address, AHEAD if columns == 1 else FAR_AHEAD)
                for half, digits in enumerate((b.and_(raw, low), b.lshr(raw, ir.Constant(code, [4] * 64)))):
                    for c in range(columns):
                        part = s, c, (2 * line + half) % unroll
                        new[part] = _dot_units(b, new[part], digits, fours[c][half])
        following = b.add(at, number(16))
        at.add_incoming(following, loop)
        for s, c, u in parts:
            sums[s, c, u].add_incoming(begin[c] if u == 0 else ir.Constant(SUM, [0] * SUM.count), unit)
            sums[s, c, u].add_incoming(new[s, c, u], loop)
        b.cbranch(b.icmp_signed("<", following, end), loop, unit_end)
        b.position_at_end(unit_end)
        steps_at = b.add(steps, times(b.ashr(first, group_bits), LANES))
        by = [
            b.zext(load(b, b.add(steps_at, times(steps_stride, s)), ir.VectorType(i8, LANES), 16), I.llvm)
            for s in range(strips)
        ]
        for s, c in places:
            totals[s, c].add_incoming(ir.Constant(I.llvm, [0] * LANES), before)
            unit_sum = functools.reduce(b.add, (new[s, c, u] for u in range(unroll)))
            together = b.add(totals[s, c], _times_steps(b, unit_sum, by[s]))
            totals[s, c].add_incoming(together, unit_end)
            b.store(together, to_pointer(b, b.add(out, number(64 * (2 * c + s))), I.llvm), align=64)
        first.add_incoming(end, unit_end)
        start_at.add_incoming(b.add(start_at, number(4)), unit_end)
        b.cbranch(b.icmp_signed("<", end, k), unit, after)
        b.position_at_end(after)

    return machine(types.void, *[types.int64] * 11)(build)


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
