"""Write tests/vectors: `python tools/make_vectors.py [operations | models | small]`; the same bytes on every run.

operations: one file an operation; results by hand, from rational arithmetic (tools/exact.py) or from mpmath.
models:     the generated models, and the SHA-256 of their logits under each scheme; transformers' float64 logits.
small:      the SHA-256 of the logits of the small model inside the package, to be written again when it is retrained.
"""

import hashlib
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Any

import exact
import mpmath
import numpy as np

from refmamba.conformance.models import SCHEMES, sha256_of
from refmamba.conformance.vectors import encode
from refmamba.formats.calibration import Calibration, save_calibration
from refmamba.formats.checkpoint import read_config
from refmamba.formats.folder import open_checkpoint
from refmamba.spec.arith import F32Array
from refmamba.spec.calibrate import calibrate
from refmamba.spec.codes import Codes, FixedPoint
from refmamba.spec.config import ParameterSource
from refmamba.spec.mamba1 import Mamba
from refmamba.spec.parameters import QuantizedModel, linear_sites, quantize_model
from refmamba.spec.scheme import parse_scheme, scheme_from_json

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "vectors"
FRACTIONS = f"independent:fractions, Python {platform.python_version()}"
MPMATH = f"independent:mpmath {mpmath.__version__}"
HAND = "hand"
WIDTHS = range(2, 17)
# Longer than a chunk of the scan; shorter than the convolution's state; one token.
TINY_SEQUENCES = [[(7 * i * i + 3 * i + 1) % 67 for i in range(n)] for n in (70, 3, 1, 9)]
vectors: dict[str, list[dict[str, Any]]] = {}


def array(x: Any) -> F32Array:
    """A float32 array; a Python float is rounded once."""
    return np.array(x, np.float32)


def add(
    operation: str, name: str, source: str, arguments: list[Any], result: Any, comment: str, compare: str = "exact"
) -> None:
    """Add a vector to those of its operation."""
    vectors.setdefault(operation, []).append({
        "name": name, "source": source, "comment": comment, "compare": compare,
        "arguments": [encode(a) for a in arguments], "result": encode(result),
    })  # fmt: skip


def raises(operation: str, name: str, arguments: list[Any], comment: str) -> None:
    """Add a vector whose result is a NonFiniteError."""
    add(operation, name, HAND, arguments, None, comment)
    vectors[operation][-1]["result"] = {"raises": "NonFiniteError"}


def elementwise(f: Callable[..., float], *xs: F32Array) -> F32Array:
    """A scalar function of exact.py over arrays."""
    values = [f(*(float(v) for v in row)) for row in zip(*(x.ravel() for x in xs), strict=True)]
    return array(values).reshape(xs[0].shape)


def generator(seed: int) -> np.random.Generator:
    """The random numbers of the inputs."""
    return np.random.Generator(np.random.PCG64(seed))


def normal(r: np.random.Generator, *shape: int) -> F32Array:
    """Standard normal float32."""
    return r.standard_normal(shape).astype(np.float32)


def near(*points: float) -> F32Array:
    """Each point and its float32 neighbours."""
    x = array(points)
    return np.stack([np.nextafter(x, np.float32(-np.inf)), x, np.nextafter(x, np.float32(np.inf))], -1).ravel()


def functions() -> None:
    """Vectors of exp, log, log1p, softplus, silu, tree_sum."""
    r, inf, nan = generator(1), np.inf, np.nan
    tiny = [2.0**-149, 2.0**-126, -(2.0**-149), -(2.0**-130)]
    specials = array([0.0, -0.0, *tiny, 1.0, -1.0, 128.0, -128.0, inf, -inf, nan])
    cases: dict[str, tuple[Callable[[float], float], Callable[[Any], Any], F32Array, F32Array, int]] = {
        "exp": (exact.exp, mpmath.exp, np.concatenate([specials, near(-87.336, 88.722, 88.3763, 0.34657359, -5.86065)]),
                r.uniform(-87, 88.7, 100).astype(np.float32), 1),
        "log": (exact.log, mpmath.log, np.concatenate([specials, near(1.0, 2.0**0.5, 0.5**0.5, 2.0**-126, 3.4e38)]),
                np.exp2(r.uniform(-149, 128, 100)).astype(np.float32), 1),
        "log1p": (exact.log1p, mpmath.log1p, near(2.0**-149, 2.0**-24, 2.0**-23, 0.41421356, 0.99999994),
                  np.exp2(r.uniform(-60, 0, 100)).astype(np.float32), 2),
        "softplus": (exact.softplus, lambda x: mpmath.log1p(mpmath.exp(x)),
                     np.concatenate([specials, near(20.0, -87.336, -103.0, -2.0159)]),
                     r.uniform(-80, 30, 100).astype(np.float32), 3),
        "silu": (exact.silu, lambda x: x / (1 + mpmath.exp(-x)), np.concatenate([specials, near(-88.722, 87.336, -16.675)]),
                 r.uniform(-88, 90, 100).astype(np.float32), 3),
    }  # fmt: skip
    mpmath.mp.prec = 120
    for name, (f, true, edges, ordinary, ulp) in cases.items():
        add(name, "edges", FRACTIONS, [edges], elementwise(f, edges), "specials, thresholds and their neighbours")
        add(
            name,
            "usual",
            FRACTIONS,
            [ordinary],
            elementwise(f, ordinary),
            "a library's function or a fused multiply-add differs here",
        )
        add(name, "accuracy", MPMATH, [ordinary], array([float(true(mpmath.mpf(float(x)))) for x in ordinary]),
            "the correctly rounded value, within the SPEC's bound", f"ulp:{ulp}")  # fmt: skip
    add(
        "exp",
        "by hand",
        HAND,
        [array([0, -0.0, 89, -88, inf, -inf, nan])],
        array([1, 1, inf, 0, inf, 0, nan]),
        "special values",
    )
    add("log", "by hand", HAND, [array([1, 0, -0.0, -1, inf, nan])], array([0, -inf, -inf, nan, inf, nan]), "special values")
    add("silu", "by hand", HAND, [array([0, -0.0, -90, inf, 100])], array([0, -0.0, -0.0, inf, 100]), "special values")
    for n in (1, 2, 3, 5, 6, 16, 24, 48, 100):
        x = normal(r, 2, n) * array(2.0) ** r.integers(-12, 12, (2, n)).astype(np.float32)
        add("tree_sum", f"length {n}", FRACTIONS, [x], array([exact.tree([float(v) for v in row]) for row in x]),
            "an order other than the folded tree, or more precision, differs")  # fmt: skip
    big = 2.0**24
    add("tree_sum", "folded", HAND, [array([big, 1, -big, 1])], array(2), "(a+c)+(b+d) = 0+2; neighbours first give 1 or 0")
    add("tree_sum", "padding", HAND, [array([-0.0, -0.0, -0.0])], array(0), "the pad of +0.0 makes a sum of -0.0 positive")
    add("tree_sum", "one", HAND, [array([-0.0])], array(-0.0), "a single value is its own sum")


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


def block() -> None:
    """Vectors of the operations of a block and of the head."""
    r = generator(4)
    table = normal(r, 5, 3)
    tokens = np.array([4, 0, 4], np.int64)
    add("embed", "float32", HAND, [tokens, table], table[[4, 0, 4]], "look up")
    q = np.array([[127, -3, 0], [1, 2, 3], [-127, 5, 7]], np.int8)
    for name, scale in (("one scale", array(37.43)), ("a scale a row", array([[3.7], [1], [0.11]]))):
        of = [float(scale)] * 3 if scale.ndim == 0 else scale[:, 0].tolist()
        rows = array([[exact.div(float(v), of[t]) for v in q[t].tolist()] for t in (2, 0)])
        add(
            "embed",
            name,
            FRACTIONS,
            [np.array([2, 0], np.int64), Codes(q, scale, 8)],
            rows,
            "divided, not multiplied by 1/scale",
        )
    for d in (1, 3, 20, 48, 100):
        x, w = normal(r, 2, d) * array(30), normal(r, d)
        result = array([exact.rms_norm(row, w.tolist(), 1e-5) for row in x.tolist()])
        add(
            "rms_norm",
            f"width {d}",
            FRACTIONS,
            [x, w, 1e-5],
            result,
            "the square root correctly rounded, then one division each",
        )
    x = array([[0, -0.0, 0, 0], [1e-30, 2e-30, -3e-30, 0], [4, 0, 0, 0]])
    w = array([1, 2, 3, 4])
    add(
        "rms_norm",
        "zeros",
        FRACTIONS,
        [x, w, 1e-5],
        array([exact.rms_norm(row, w.tolist(), 1e-5) for row in x.tolist()]),
        "eps alone",
    )
    for length, k, bias in (
        (1, 4, True),
        (2, 4, False),
        (3, 4, True),
        (7, 4, True),
        (7, 4, False),
        (5, 2, True),
        (2, 1, False),
    ):
        x, state, taps, b = normal(r, length, 3), normal(r, 3, k - 1), normal(r, 3, k), normal(r, 3) if bias else None
        out = [
            exact.conv1d(x[:, c].tolist(), state[c].tolist(), taps[c].tolist(), None if b is None else float(b[c]))
            for c in range(3)
        ]
        y, last = array([y for y, _ in out]).T, array([s for _, s in out]).reshape(3, k - 1)
        add("conv1d", f"length {length}, {k} taps, {'a' if bias else 'no'} bias", FRACTIONS, [x, state, taps, b], (y, last),
            "oldest tap first; shorter than the state")  # fmt: skip
    add("conv1d", "order of taps", HAND, [array([[3], [5]]), array([[1, 2]]), array([[100, 10, 1]]), None],
        (array([[123], [235]]), array([[3, 5]])), "digits show which tap met which input")  # fmt: skip
    big = 2.0**24
    add("conv1d", "order of sums", HAND, [array([[1]]), array([[big, 1, -big]]), array([[1, 1, 1, 1]]), array([0.5])],
        (array([[1.5]]), array([[1, -big, 1]])), "2^24 + 1 = 2^24, - 2^24 = 0, + 1, + 0.5")  # fmt: skip
    dt, bias_row = normal(r, 4, 6) * array(8), normal(r, 6)
    result = array(
        [[exact.softplus(exact.add(v, b)) for v, b in zip(row, bias_row.tolist(), strict=True)] for row in dt.tolist()]
    )
    add("step_size", "usual", FRACTIONS, [dt, bias_row], result, "the bias once, before softplus")
    A_log = normal(r, 4, 5)
    add("state_matrix", "usual", FRACTIONS, [A_log], elementwise(lambda v: -exact.exp(v), A_log), "-exp(A_log)")
    add("state_matrix", "by hand", HAND, [array([[0, -0.0, -100]])], array([[-1, -1, -0.0]]), "-e^0 = -1")
    for length, e, n in ((1, 3, 16), (5, 2, 6), (3, 2, 1)):
        delta, A, B, C, u = (
            np.abs(normal(r, length, e)),
            -np.abs(normal(r, e, n)),
            *(normal(r, length, n) for _ in "BC"),
            normal(r, length, e),
        )
        A_bar = array(
            [
                [[exact.exp(exact.mul(float(delta[t, c]), float(A[c, s]))) for s in range(n)] for c in range(e)]
                for t in range(length)
            ]
        )
        du = elementwise(exact.mul, delta, u)
        Bu = array([[[exact.mul(float(du[t, c]), float(B[t, s])) for s in range(n)] for c in range(e)] for t in range(length)])
        add(
            "discretize",
            f"length {length}, {n} states",
            FRACTIONS,
            [delta, A, B, u],
            (A_bar, Bu),
            "(delta u) B, not (delta B) u",
        )
        scan_case(f"length {length}, {n} states", u, delta, A, B, C, normal(r, e), normal(r, e, n))
    length, e, n = 70, 1, 2
    scan_case("length 70", normal(r, length, e), np.abs(normal(r, length, e)), -np.abs(normal(r, e, n)), normal(r, length, n),
              normal(r, length, n), normal(r, e), normal(r, e, n))  # fmt: skip
    slow, ones = np.full((5, 1), 20, np.float32), np.ones((5, 2), np.float32)
    scan_case(
        "decay", np.zeros((5, 1), np.float32), slow, array([[-1, -1.0625]]), ones, ones, array([1]), array([[1, -(2.0**10)]])
    )
    y, z = normal(r, 3, 5), normal(r, 3, 5) * array(6)
    add("gate", "usual", FRACTIONS, [y, z], elementwise(lambda a, b: exact.mul(a, exact.silu(b)), y, z), "y silu(z)")
    add("gate", "by hand", HAND, [array([[3, 2]]), array([[0, 100]])], array([[0, 200]]), "silu(0) = 0, silu(100) = 100")
    logits = normal(r, 3, 50) * array(5)
    add(
        "log_softmax",
        "usual",
        FRACTIONS,
        [logits],
        array([exact.log_softmax(row) for row in logits.tolist()]),
        "shift, tree, log",
    )
    add(
        "log_softmax",
        "far apart",
        HAND,
        [array([[0, -200], [1e30, -1e30]])],
        array([[0, -200], [0, -2e30]]),
        "the small ones are exp's +0",
    )
    add("log_softmax", "all negative", FRACTIONS, [array([[-1, -2, -3]])], array([exact.log_softmax([-1.0, -2.0, -3.0])]),
        "the maximum is -1, not 0")  # fmt: skip
    four = array([5, 5, 5, 5, -1e9])
    for draw, token in ((0.0, 0), (0.2499, 0), (0.25, 1), (0.5, 2), (0.9999, 3)):
        add("sample", f"draw {draw}", HAND, [four, draw], token, "a running sum that equals the draw is passed over")
    add("sample", "temperature 0", HAND, [array([1, 3, 2, 3]), 0.9, 0.0], 1, "the first largest")
    add("sample", "top 2", HAND, [four, 0.75, 1.0, 2], 1, "equal ones by index: 0 and 1 are left")
    add("sample", "top half", HAND, [four, 0.75, 1.0, 0, 0.5], 1, "two hold half exactly, so no third is taken")
    add("sample", "the draw is of what is kept", HAND, [four, 0.3, 1.0, 0, 0.5], 0,
        "0.3 of 2, not of the 4 before the cut")  # fmt: skip
    add("sample", "top_k before top_p", HAND, [four, 0.75, 1.0, 2, 0.5], 0, "half of the 2 that top_k keeps is one")
    add("sample", "temperature below float32", HAND, [array([1, 3, 2, 3]), 0.9, 1e-50], 1, "as float32 it is 0")
    warm = array([1.3, 0.2, -0.5, 0.9, 2.1])
    tail = array([0, *[-18] * 40])
    for name, logits, draw, t, comment in (
        ("temperature in float32", warm, 0.580450985, 0.8, "0.8 in float64 moves the border past the draw"),
        ("running sums in float64", tail, 0.9999999, 1.0, "in float32 the 40 small weights add nothing"),
    ):
        add("sample", name, FRACTIONS, [logits, draw, t], exact.sample(logits.tolist(), draw, t, 0, 1.0), comment)
    add("sample", "cold", HAND, [array([0, 1]), 0.0, 0.01], 1, "e^-100 is +0: only the largest is left, and it comes first")


def scan_case(
    name: str, u: F32Array, delta: F32Array, A: F32Array, B: F32Array, C: F32Array, D: F32Array, h: F32Array
) -> None:  # fmt: skip
    """Add a vector of selective_scan."""
    channels = [
        exact.scan(u[:, c].tolist(), delta[:, c].tolist(), A[c].tolist(), B.tolist(), C.tolist(), float(D[c]), h[c].tolist())
        for c in range(len(A))
    ]
    y, last = array([y for y, _ in channels]).T, array([h for _, h in channels])
    add(
        "selective_scan",
        name,
        FRACTIONS,
        [u, delta, A, B, C, D, h],
        (y, last),
        "every product and sum rounded; subnormals kept",
    )


def write_operations() -> None:
    """Write tests/vectors/operations."""
    functions()
    codes()
    groups()
    products()
    block()
    folder = FOLDER / "operations"
    folder.mkdir(parents=True, exist_ok=True)
    for operation, rows in vectors.items():
        lines = ",\n".join(json.dumps(row) for row in rows)
        head = f'{{"format": 1, "operation": "{operation}", "vectors": [\n'
        (folder / f"{operation}.json").write_text(f"{head}{lines}\n]}}\n", encoding="utf-8")


@dataclass(frozen=True)
class Generated:
    """A generated model: its config.json, the seed of its weights, its sequences, its schemes by name and as JSON values."""

    config: dict[str, Any]
    seed: int
    sequences: list[list[int]]
    schemes: tuple[str, ...]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


def hugging_face(hidden: int, layers: int, vocabulary: int, **others: Any) -> dict[str, Any]:
    """A config.json; the last entry is only for transformers."""
    sizes: dict[str, Any] = {
             "hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": vocabulary, "state_size": 16, "conv_kernel": 4,
             "expand": 2, "time_step_rank": 3, "layer_norm_epsilon": 1e-5, "use_bias": True, "use_conv_bias": True,
             "tie_word_embeddings": True, "hidden_act": "silu"}  # fmt: skip
    sizes |= others
    sizes["intermediate_size"] = sizes["expand"] * hidden
    return {"model_type": "mamba", "architectures": ["MambaForCausalLM"], **sizes}


def sequences_of(seed: int, vocabulary: int, *lengths: int) -> list[list[int]]:
    """Random sequences of these lengths."""
    r = generator(seed)
    return [r.integers(0, vocabulary, length).tolist() for length in lengths]


def chosen(scale: str, **bits: int) -> dict[str, Any]:
    """Sites of a scheme with one kind of scale; __ stands for the dot."""
    return {site.replace("__", "."): {"bits": n, "scale": scale} for site, n in bits.items()}


MIXED = {
    "name": "mixed",
    "weights": chosen("per_channel", embedding__weight=5, lm_head__weight=5, in_proj__weight=3, dt_proj__weight=7,
                      conv1d__weight=6, A_log=7)
    | chosen("per_tensor", x_proj__weight=5, out_proj__weight=6, D=5, norm__weight=7, norm_f__weight=6),
    "inputs": chosen("per_token", in_proj=7, dt_proj=6, lm_head=5) | chosen("static", x_proj=5, out_proj=3),
    "outputs": chosen("per_token", in_proj=9, x_proj=11, dt_proj=5, out_proj=7),
}  # fmt: skip
WHOLE = {
    "name": "whole",
    "weights": chosen("per_channel", x_proj__weight=3, out_proj__weight=5) | chosen("per_tensor", dt_proj__weight=6),
    "inputs": chosen("per_tensor", in_proj=6, x_proj=7, dt_proj=5, lm_head=3),
    "outputs": chosen("per_tensor", in_proj=10, dt_proj=3) | chosen("per_token", x_proj=12, out_proj=15),
}
METHODS = {
    "name": "methods",
    "weights": {
        "in_proj.weight": {"bits": 3, "scale": "grouped", "group": 16},
        "x_proj.weight": {"bits": 2, "scale": "grouped"},
        "out_proj.weight": {"bits": 4, "scale": "grouped", "group": 32},
        "lm_head.weight": {"bits": 4, "scale": "grouped", "group": 16},
    },
    "inputs": {
        "in_proj": {"bits": 6, "scale": "per_token_outliers", "threshold": 1.5},
        "x_proj": {"bits": 7, "scale": "static"},
        "dt_proj": {"bits": 8, "scale": "per_token_outliers"},
        "out_proj": {"bits": 5, "scale": "flattened", "quantile": 0.5},
    },
    "outputs": chosen("per_token", in_proj=9),
    "rotate": ["x_proj", "out_proj"],
}
GENERATED = {
    "tiny": Generated(hugging_face(20, 2, 67), 5, TINY_SEQUENCES, SCHEMES),
    # An untied head, no bias but dt_proj's, an odd number of states and of taps, six sequences at once, odd widths.
    "untied": Generated(
        hugging_face(18, 2, 71, state_size=5, conv_kernel=3, expand=3, time_step_rank=2, use_bias=False, use_conv_bias=False,
                     tie_word_embeddings=False),
        6, sequences_of(7, 71, 33, 1, 7, 2, 19, 66),
        ("fp32", "w3-mlp", "w5-all", "w6-mlp", "w7-all", "w8a8-all", "int8", "int8-static", "int8-smooth"),
        {"mixed": MIXED, "whole": WHOLE, "methods": METHODS},
    ),
    # More tokens than a kernel takes at a time; another epsilon; as many channels as the residual stream is wide.
    "long": Generated(
        hugging_face(16, 2, 53, state_size=3, conv_kernel=5, expand=1, layer_norm_epsilon=1e-3),
        8, sequences_of(9, 53, 300, 17, 1, 258, 64),
        ("fp32", "w8-all", "w8a8-mlp", "w4a16-all", "int8", "int8-static", "int8-smooth"),
    ),
}  # fmt: skip


def stored_name(name: str) -> str:
    """The name of a parameter in Hugging Face's layout."""
    if name.startswith("layers.") and ".norm." not in name:
        return "backbone.{}.{}.mixer.{}".format(*name.split(".", 2))
    return name if name == "lm_head.weight" else "backbone." + name.replace("embedding.", "embeddings.")


def save_model(folder: Path, config: dict[str, Any], parameter: Callable[[str, tuple[int, ...]], F32Array]) -> ParameterSource:
    """Write config.json and model.safetensors of random or given parameters, and open them."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    tensors = {}
    for name, shape in read_config(folder / "config.json", config).shapes().items():
        x = parameter(name, shape)
        tensors[stored_name(name)] = x[:, None] if name.endswith("conv1d.weight") else x
    save_file(tensors, folder / "model.safetensors")
    source = open_checkpoint(folder)
    assert not isinstance(source, QuantizedModel)
    return source


def write_expected(folder: Path, expected: dict[str, Any]) -> None:
    """Write expected.json."""
    (folder / "expected.json").write_text(json.dumps({"format": 1} | expected, indent=1) + "\n", encoding="utf-8")


def write_models() -> None:
    """Write the generated models of tests/vectors: weights, calibration, and what comes out."""
    for name, model in GENERATED.items():
        write_model(FOLDER / name, model)
    write_edges()


def write_weights(folder: Path, model: Generated) -> tuple[ParameterSource, dict[str, F32Array]]:
    """Write a generated model's weights and its calibration, and give both."""
    r = generator(model.seed)

    def parameter(name: str, shape: tuple[int, ...]) -> F32Array:
        x = normal(r, *shape) * array(0.4)
        if name.endswith("A_log"):
            x = np.log(np.arange(1, shape[1] + 1)).astype(np.float32) + x
        elif "norm" in name or name.endswith(".D"):
            x = 1 + x
        elif name.endswith("dt_proj.bias"):
            x = x * 4 - 2
        return x.astype(np.float32)

    source = save_model(folder, model.config, parameter)
    absmax = calibrate(source, np.array(max(model.sequences, key=len)))
    save_calibration(Calibration(absmax), folder / "calibration.json")
    return source, absmax


def write_model(folder: Path, model: Generated) -> None:
    """Write one of them; transformers computes its logits without a scheme."""
    import torch
    import transformers

    source, absmax = write_weights(folder, model)
    schemes = {name: parse_scheme(name) for name in model.schemes}
    for name, values in model.files.items():
        (folder / "schemes").mkdir(exist_ok=True)
        (folder / "schemes" / f"{name}.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        schemes[name] = scheme_from_json(values)
    hashes = {}
    for name, scheme in schemes.items():
        logits, _ = Mamba(quantize_model(source, scheme, absmax)).prefill(list(map(np.array, model.sequences)), logits="all")
        hashes[name] = sha256_of(logits)
    torch.set_default_dtype(torch.float64)
    peer: Any = transformers.MambaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    peer.eval()
    with torch.no_grad():
        logits64 = peer(torch.tensor([model.sequences[0]]), use_cache=False).logits[0, -8:].double().numpy()
    from_transformers = {
        "source": f"independent:transformers {transformers.__version__}, float64", "compare": "close:1e-5", "sequence": 0,
        "result": encode(logits64),
    }  # fmt: skip
    frozen = {"source": "spec", "compare": "exact", "schemes": hashes}
    write_expected(folder, {"sequences": model.sequences, "logits_sha256": frozen, "fp32_last_8": from_transformers})


def write_edges() -> None:
    """Write tests/vectors/edges: finite weights whose logits are no numbers, and a calibrated maximum that counts as zero.

    `int8`: a row of the head is so large that the product of its scale and the token's is +0, and 0/0 no number.
    `int8-static`: lm_head's maximum is below 2^-100, so all its codes are 0, and all logits +0.0.
    """
    r, folder, sequence = generator(10), FOLDER / "edges", [5, 6, 3, 7]
    head = np.where(np.arange(10)[:, None] > 2, normal(r, 10, 8) * array(1e22), array(0))
    head[1, :3] = array(1e22)
    special = {"norm_f.weight": array([0, 0, 0, 0, 1e30, 1e30, 1e30, 1e30]), "lm_head.weight": head}

    def parameter(name: str, shape: tuple[int, ...]) -> F32Array:
        return special.get(name, normal(r, *shape) * array(0.1))

    config = hugging_face(8, 1, 10, time_step_rank=1, use_bias=False, tie_word_embeddings=False)
    source = save_model(folder, config, parameter)
    shapes = {site: source.config.shapes()[f"{site}.weight"][1:] for site in linear_sites(source.config)}
    absmax = {site: np.full(shape, 1e-35 if site == "lm_head" else 1, np.float32) for site, shape in shapes.items()}
    save_calibration(Calibration(absmax), folder / "calibration.json")
    zeros = hashlib.sha256(bytes(4 * len(sequence) * 10)).hexdigest()
    frozen = {"source": HAND, "compare": "exact", "schemes": {"int8-static": zeros}}
    raised = dict.fromkeys(("int8", "fp32"), "NonFiniteError")
    write_expected(folder, {"sequences": [sequence], "logits_sha256": frozen, "raises": raised})


def write_small() -> None:
    """Write tests/vectors/small.json."""
    from refmamba.run.session import ModelChoice, open_model

    tokens = [row[:24] for row in TINY_SEQUENCES]
    hashes = {}
    for name in SCHEMES:
        opened = open_model(ModelChoice("small", name))
        model = opened.quantized(opened.scheme)
        hashes[name] = sha256_of(Mamba(model).prefill([np.array(row) for row in tokens], logits="all")[0])
    weights = resources.files("refmamba") / "small_model" / "model.safetensors"
    value = {"format": 1, "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(), "sequences": tokens,
             "logits_sha256": {"source": "spec", "compare": "exact", "schemes": hashes}}  # fmt: skip
    (FOLDER / "small.json").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parts = {"operations": write_operations, "models": write_models, "small": write_small}
    for part in sys.argv[1:] or ["operations", "models"]:
        parts[part]()
