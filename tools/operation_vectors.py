"""Vectors of arith.py and ops.py: the functions, the operations of a block, the head and the choice of a token."""

from collections.abc import Callable
from typing import Any

import exact
import mpmath
import numpy as np
from vector_rows import FRACTIONS, HAND, MPMATH, add, array, elementwise, generator, near, normal

from refmamba.spec.arith import F32Array
from refmamba.spec.codes import Codes


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
