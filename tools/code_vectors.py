"""Vectors of codes.py and of what transforms codes: made, packed, grouped, rotated, multiplied, read."""

from fractions import Fraction
from typing import Any

import exact
import numpy as np
from vector_rows import FRACTIONS, HAND, add, array, elementwise, generator, normal, raises

from refmamba.spec.arith import F32Array
from refmamba.spec.codes import Codes, FixedPoint

WIDTHS = range(2, 17)


def codes() -> None:
    """Vectors of absmax, scale_of, quantize, code, code_static, fixed_point, pack4, unpack4."""
    r, below = generator(2), float(np.nextafter(np.float32(2.0**-100), np.float32(0)))
    x = array([[1, -3, 2], [0, -0.0, 0], [below, -below, 0], [2.0**-100, 0, 0]])
    add("absmax", "per tensor", HAND, [x, "site"], array(3), "the largest magnitude is a negative value's")
    add("absmax", "per row", HAND, [x, "site", "per_row"], array([[3], [0], [0], [2.0**-100]]), "below 2^-100 is zero")
    for name, bad in (("NaN", np.nan), ("infinity", np.inf), ("-infinity", -np.inf)):
        for granularity in ("per_tensor", "per_row"):
            raises("absmax", f"{name} {granularity}", [array([[1, bad], [1, 2]]), "site", granularity], "no codes")
        raises("fixed_point", name, [array([[1, 2], [bad, 1]]), 30, "site"], "no codes")
        raises("code", name, [array([[1, bad]]), 8, "site", "per_tensor"], "no codes")
        raises("code_static", name, [array([[1, bad]]), array(1), 8, "site"], "no codes")
    m = np.concatenate([array([0, 2.0**-100, 1, 3, 127, 3.4e38]), np.abs(normal(r, 4))])
    for bits in WIDTHS:
        add("scale_of", f"{bits} bits", FRACTIONS, [m, bits], elementwise(lambda v, b=bits: exact.scale(v, b), m),
            "divided once; 1 where the maximum is zero")  # fmt: skip
        largest = 2 ** (bits - 1) - 1
        ties = array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49999997, 1e9, -1e9, -0.0, largest - 0.5, largest + 0.5, largest])
        kind: Any = np.int8 if bits <= 8 else np.int16
        near_top = (largest - 1) if largest % 2 else largest  # largest is odd: its half-way point below rounds to even
        by_hand = np.array([min(v, largest) for v in (0, 2, 2)] + [-min(v, largest) for v in (0, 2, 2)]
                           + [0, largest, -largest, 0, near_top, largest, largest], kind)  # fmt: skip
        add(
            "quantize",
            f"{bits} bits, ties",
            HAND,
            [ties, array(1), bits],
            by_hand,
            "half to even, then held in range: -2^(N-1) is no code",
        )
        rows = np.concatenate(
            [normal(r, 3, 7), np.zeros((1, 7), np.float32), array([[1e-40] * 7, [3e38, 1e38, -3e38, 0, 1, 2, 3]])]
        )
        scale = array([[exact.scale(exact.absmax(row.tolist()), bits)] for row in rows])
        q = np.array([[exact.quantize(v if exact.absmax(row.tolist()) else 0.0, s[0], bits) for v in row.tolist()]
                      for row, s in zip(rows, scale.tolist(), strict=True)], kind)  # fmt: skip
        add("code", f"{bits} bits, per row", FRACTIONS, [rows, bits, "site", "per_row"], Codes(q, scale, bits),
            "a row of zeros and one of subnormals have scale 1 and no other code than 0")  # fmt: skip
        matrix = normal(r, 3, 5)
        s = exact.scale(exact.absmax(matrix.ravel().tolist()), bits)
        q = np.array([[exact.quantize(v, s, bits) for v in row] for row in matrix.tolist()], kind)
        add(
            "code",
            f"{bits} bits, per tensor",
            FRACTIONS,
            [matrix, bits, "site", "per_tensor"],
            Codes(q, array(s), bits),
            "one scale",
        )
        s = exact.scale(1.25, bits)
        q = np.array([[exact.quantize(v, s, bits) for v in row] for row in matrix.tolist()], kind)
        add(
            "code_static",
            f"{bits} bits",
            FRACTIONS,
            [matrix, array(1.25), bits, "site"],
            Codes(q, array(s), bits),
            "larger values saturate",
        )
    add("code_static", "zero", HAND, [array([[1, -2]]), array(0), 8, "site"], Codes(np.zeros((1, 2), np.int8), array(1), 8),
        "a site that calibration saw only zeros at")  # fmt: skip
    for name, maximum in (("below 2^-100", 1e-35), ("subnormal", 1e-41)):
        add("code_static", f"zero, {name}", HAND, [array([[1e-35, -5e-36, 0, 1]]), array(maximum), 8, "site"],
            Codes(np.zeros((1, 4), np.int8), array(1), 8), "a calibrated absmax below 2^-100 counts as zero too")  # fmt: skip
    twice()
    rows = np.concatenate([normal(r, 3, 5), array([[1, 2, 4, -4, 0.5], [0] * 5, [below] * 5,
                           [2.0**-99, 2.0**-110, 0, 2.0**-140, 0],
                           [3e38, -1, 2.0**-149, 0, 1], [1, 2.0**-31, 3 * 2.0**-31, -(2.0**-31), 1 + 2.0**-23]])])  # fmt: skip
    for bits in (22, 30):
        pairs = [exact.fixed_point(row, bits) for row in rows.tolist()]
        fixed = FixedPoint(np.array([q for q, _ in pairs], np.int32), np.array([e for _, e in pairs], np.int32))
        add(
            "fixed_point",
            f"{bits} bits",
            FRACTIONS,
            [rows, bits, "site"],
            fixed,
            "powers of two, zeros, ties, the exponent's cap",
        )
    add("fixed_point", "by hand", HAND, [array([[1, -0.5, 1.5]]), 30, "site"], FixedPoint(
        np.array([[2**29, -(2**28), 3 * 2**28]], np.int32), np.array([29], np.int32)), "1 <= 1.5 < 2: e = 29")  # fmt: skip
    q4 = np.array([[1, -1, 7], [-8, 0, -7]], np.int8)
    packed = np.array([[0xF1, 0x07], [0x08, 0x09]], np.uint8)
    add("pack4", "odd columns", HAND, [q4], packed, "the even column in the low half, a half of zero at the end")
    add("unpack4", "odd columns", HAND, [packed, 3], q4, "the inverse, signs kept")
    all_codes = np.arange(-8, 8, dtype=np.int8)[None]
    packed = np.array([[0x98, 0xBA, 0xDC, 0xFE, 0x10, 0x32, 0x54, 0x76]], np.uint8)
    add("pack4", "every code", HAND, [all_codes], packed, "all sixteen")
    add("unpack4", "every code", HAND, [packed, 16], all_codes, "all sixteen")


def twice() -> None:
    """Vectors of quantize, code and code_static where x*s rounds to a half, which then rounds to an even integer."""
    comment = "x*s is rounded to float32 first: in float64, or fused, it is not the half that it becomes"
    step = 2.0**-23
    add("quantize", "rounded twice", HAND, [array([3.5 - 4 * step, 2.5 - 2 * step]), array(1 + step), 8],
        np.array([4, 2], np.int8), comment)  # fmt: skip
    for bits, codes_at in ((8, range(126)), (16, range(16384, 16500))):
        largest = 1.3
        s = exact.scale(exact.f32(largest), bits)
        near_halves = dict.fromkeys(exact.f32((i + 0.5) / s + sign * 2.0**-25) for i in codes_at for sign in (-1, 0, 1))
        x = [v for v in near_halves if exact.quantize(v, s, bits) != round(Fraction(v) * Fraction(s))][:16]
        kind: Any = np.int8 if bits == 8 else np.int16
        q = np.array([[exact.quantize(v, s, bits) for v in [*x, exact.f32(largest)]]], kind)
        row, coded = array([[*x, largest]]), Codes(q, array(s), bits)
        add("code_static", f"{bits} bits, rounded twice", FRACTIONS, [row, array(largest), bits, "site"], coded, comment)
        for granularity in ("per_tensor", "per_row"):
            shaped = coded if granularity == "per_tensor" else Codes(q, array([[s]]), bits)
            add(
                "code",
                f"{bits} bits, rounded twice, {granularity}",
                FRACTIONS,
                [row, bits, "site", granularity],
                shaped,
                comment,
            )


def groups() -> None:
    """code_grouped, code_flattened and rotate."""
    r = generator(30)

    def grouped(name: str, source: str, x: Any, bits: int, group: int, comment: str) -> None:
        rows = [exact.grouped(row, bits, group) for row in x.tolist()]
        q, steps = np.array([row[0] for row in rows], np.int8), np.array([row[1] for row in rows], np.uint8)
        result = Codes(q, array([[row[2]] for row in rows]), bits, steps, group)
        add("code_grouped", name, source, [x, bits, group, "w"], result, comment)

    by_hand = array([[126, 63, 7, -1]])
    add("code_grouped", "by hand", HAND, [by_hand, 4, 2, "w"],
        Codes(np.array([[7, 4, 7, -1]], np.int8), array([[1]]), 4, np.array([[17, 1]], np.uint8), 2),
        "18 would clamp nothing and is off by 81 in squares, 17 by 74")  # fmt: skip
    tie = array([[126] + [0] * 15 + [15, 2] + [0] * 14])
    add("code_grouped", "equal errors", HAND, [tie, 4, 16, "w"],
        Codes(np.array([[7] + [0] * 15 + [5, 1] + [0] * 14], np.int8), array([[1]]), 4, np.array([[18, 3]], np.uint8), 16),
        "the larger of two steps that are equally good")  # fmt: skip
    grouped(
        "zeros",
        FRACTIONS,
        array([[0, 0, 0], [1e-35, -1e-36, 0], [1, 0, -0.5]]),
        4,
        16,
        "a row of zeros, and one that counts as such",
    )
    for bits in (2, 3, 4):
        x = normal(r, 3, 40) * array([[0.02], [1], [300]])
        grouped(f"{bits} bits, groups of 16", FRACTIONS, x, bits, 16, "the last group is shorter")
    grouped("groups of 64", FRACTIONS, normal(r, 2, 130) * array([[1], [1e-20]]), 4, 64, "the last group has two columns")
    grouped(
        "one outlier",
        FRACTIONS,
        np.where(np.arange(64) == 5, array(900), normal(r, 1, 64)),
        4,
        16,
        "small groups keep their codes",
    )
    raises("code_grouped", "NaN", [array([[1, np.nan]]), 4, 16, "w"], "a maximum that drops NaN")

    def flattened(name: str, x: Any, threshold: float, bits: int, comment: str) -> None:
        limit = array(threshold)
        s = exact.scale(exact.absmax([float(limit)]), bits)
        held = [max(min(Fraction(exact.mul(v, s)), Fraction(2**30)), Fraction(-(2**30))) for v in x.ravel().tolist()]
        q = [0 if exact.absmax([float(limit)]) == 0 else round(v) for v in held]
        result = Codes(np.array(q, np.int32).reshape(x.shape), array(s), bits)
        add("code_flattened", name, FRACTIONS, [x, limit, bits, "x"], result, comment)

    flattened("beyond the threshold", array([[2, -1, 0.5, 100, -3.7]]), 1, 8, "held at 127")
    flattened("beyond 2^30", array([[1e30, -1e30, 1]]), 1, 8, "an integer that wraps around")
    flattened("a tiny threshold", array([[1, -1]]), 1e-35, 8, "counts as zero: every code is 0")
    flattened("random", normal(r, 3, 9) * array(5), 2.5, 8, "ordinary values")
    raises("code_flattened", "infinity", [array([[1, np.inf]]), array(1), 8, "x"], "an infinity that is held at 2^30")

    def turned(name: str, x: Any, comment: str) -> None:
        add("rotate", name, FRACTIONS, [x, "x"], array([exact.rotated(row) for row in x.tolist()]), comment)

    turned("whole numbers", array([[1, 2, 3, 4], [1, 0, 0, 0]]), "Sylvester's order of the signs")
    turned("blocks of four", normal(r, 2, 12), "12 channels are three blocks, not one of 16")
    turned("no block", normal(r, 2, 7), "an odd number of channels is left alone")
    turned("one outlier", np.where(np.arange(64) == 9, array(3e4), normal(r, 1, 64)), "sums in float32 lose the small ones")
    turned("large and small", normal(r, 2, 32) * array([[1e30], [1e-30]]), "the power of two is taken off exactly")
    raises("rotate", "NaN", [array([[np.nan, 1]]), "x"], "a NaN that becomes a code")


def products() -> None:
    """Vectors of integer_product and rescale."""
    r = generator(3)

    def codes_of(bits: int, rows: int, k: int, scale: Any = 1.0) -> Codes:
        largest = 2 ** (bits - 1) - 1
        return Codes(r.integers(-largest, largest + 1, (rows, k)).astype(np.int8), array(scale), bits)

    def fixed(bits: int, rows: int, k: int) -> FixedPoint:
        q = r.integers(-(2**bits), 2**bits + 1, (rows, k)).astype(np.int32)
        return FixedPoint(q, r.integers(-5, 40, rows).astype(np.int32))

    def integer(x: Any, w: Any) -> Any:
        rows = [[sum(a * b for a, b in zip(p, q, strict=True)) for q in w.q.tolist()] for p in x.q.tolist()]
        return np.array(rows, np.float64)

    def split(x: FixedPoint, w: FixedPoint) -> Any:
        return np.array([[exact.split_product(p, q) for q in w.q.tolist()] for p in x.q.tolist()], np.float64)

    def product(name: str, x: Any, w: Any, comment: str) -> None:
        fixed_by_fixed = isinstance(x, FixedPoint) and isinstance(w, FixedPoint)
        add("integer_product", name, FRACTIONS, [x, w], split(x, w) if fixed_by_fixed else integer(x, w), comment, "value")

    stepped = Codes(np.array([[1, -7, 3, 2, 7], [7, 7, 7, 7, 7]], np.int8), array([[4], [1]]), 4,
                    np.array([[2, 18], [18, 18]], np.uint8), 3)  # fmt: skip
    x = Codes(np.array([[1, 1, 1, 1, 1], [0, 0, 0, 0, -127]], np.int8), array(1), 8)
    by_step = np.array([[156, 630], [-16002, -16002]], np.float64)  # 2 - 14 + 6 + 36 + 126, and 5 times 126
    add("integer_product", "groups with steps", HAND, [x, stepped], by_step, "codes without their steps", "value")
    for k in (1, 3, 48, 97):
        product(f"8 by 8 bits, K = {k}", codes_of(8, 2, k), codes_of(8, 3, k), "any length; 48 is the largest dt_rank")
        product(f"fixed by 8 bits, K = {k}", fixed(30, 2, k), codes_of(8, 3, k), "unquantized activations")
        product(f"fixed by fixed, K = {k}", fixed(30, 2, k), fixed(22, 3, k), "neither is quantized")
        product(f"8 bits by fixed, K = {k}", codes_of(8, 2, k), fixed(22, 3, k), "unquantized weights")
    for bits in range(2, 9):
        product(f"{bits} by {bits} bits", codes_of(bits, 1, 33), codes_of(bits, 2, 33), "every width")
    top, signs = np.full((2, 2049), 127, np.int8), np.full((2, 2049), 127, np.int8)
    top[1, ::2], signs[1] = -127, -127
    product("largest codes", Codes(top, array(1), 8), Codes(signs, array(1), 8),
            "int16 pairs saturate, and float32 sums stop being exact at 2^24")  # fmt: skip
    big = np.full((1, 4099), 2**30, np.int32)
    zero = np.zeros(1, np.int32)
    product(
        "largest fixed by 8 bits", FixedPoint(big, zero), Codes(np.full((1, 4099), -127, np.int8), array(1), 8), "near 2^49"
    )
    product(
        "blocks",
        FixedPoint(big, zero),
        FixedPoint(np.full((1, 4099), 2**22 - 1, np.int32), zero),
        "two blocks, joined in order",
    )
    other = generator(32)  # the first seed whose sum tells every other length of the blocks
    long_x = other.integers(-(2**30), 2**30 + 1, (1, 4200)).astype(np.int32)
    long_w = other.integers(-(2**22), 2**22 + 1, (1, 4200)).astype(np.int32)
    product("blocks of 4096", FixedPoint(long_x, zero), FixedPoint(long_w, zero),
            "one sum over all 4200 columns, or blocks of another length, rounds to another integer")  # fmt: skip
    product(
        "a zero of length 1",
        Codes(np.array([[-3]], np.int8), array(1), 8),
        Codes(np.array([[0]], np.int8), array(1), 8),
        "-3 * 0",
    )

    def value(acc: Any, x: Any, w: Any) -> F32Array:
        out = np.empty(acc.shape, np.float32)
        for i in range(acc.shape[0]):
            for j in range(acc.shape[1]):
                e = sum(int(c.exponent[row]) for c, row in ((x, i), (w, j)) if isinstance(c, FixedPoint))
                y = exact.rounded(Fraction(float(acc[i, j])) / Fraction(2) ** e)
                scales = [
                    float(c.scale if c.scale.ndim == 0 else c.scale[row, 0])
                    for c, row in ((x, i), (w, j))
                    if isinstance(c, Codes)
                ]
                if scales:
                    y = exact.div(y, exact.mul(*scales) if len(scales) == 2 else scales[0])
                out[i, j] = y
        return out

    acc = r.integers(-(2**52), 2**52, (2, 3)).astype(np.float64)
    small = np.array([[2**24 + 1, 2**24 + 3, -(2**25) - 2], [0, 1, -1]], np.float64)
    single, of_tokens, of_rows = array(37.43), array([[3.7], [0.11]]), array([[12.7], [0.9], [55.5]])
    e2, e3 = np.array([29, -98], np.int32), np.array([21, 126, 3], np.int32)
    q2, q3 = np.zeros((2, 1), np.int32), np.zeros((3, 1), np.int32)
    b2, b3 = q2.astype(np.int8), q3.astype(np.int8)
    sides: dict[str, tuple[Any, Any]] = {
        "fixed, fixed": (FixedPoint(q2, e2), FixedPoint(q3, e3)),
        "fixed, one scale": (FixedPoint(q2, e2), Codes(b3, single, 8)),
        "fixed, a scale a row": (FixedPoint(q2, e2), Codes(b3, of_rows, 8)),
        "one scale, one scale": (Codes(b2, array(0.3), 8), Codes(b3, single, 8)),
        "a scale a token, a scale a row": (Codes(b2, of_tokens, 8), Codes(b3, of_rows, 8)),
        "one scale, fixed": (Codes(b2, single, 8), FixedPoint(q3, e3)),
    }
    for name, (x, w) in sides.items():
        for size, a in (("large", acc), ("small", small)):
            add("rescale", f"{name}, {size}", FRACTIONS, [a, x, w], value(a, x, w), "round to float32 before the one division")
    zero_scale = Codes(np.zeros((1, 1), np.int8), array(2), 8)
    add("rescale", "negative zero", HAND, [np.array([[-0.0]]), zero_scale, zero_scale], array([[0.0]]), "a BLAS library's -0.0")
    sub = FixedPoint(np.zeros((1, 1), np.int32), np.array([126], np.int32))
    a = np.array([[3, 2**20 + 1]], np.float64)
    w = FixedPoint(np.zeros((2, 1), np.int32), np.array([23, 22], np.int32))
    add(
        "rescale",
        "subnormal",
        FRACTIONS,
        [a, sub, w],
        value(a, sub, w),
        "3 * 2^-149 and a tie: subnormals are kept, rounded once",
    )
