"""Arithmetic and codes on values that hypothesis finds, against Python's fractions and float64."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refmamba.errors import NonFiniteError
from refmamba.spec.arith import exp, log, silu, softplus, tree_sum
from refmamba.spec.codes import FixedPoint, code, dequantize, fixed_point, integer_product, pack4, quantize, rescale, unpack4

floats = st.floats(-(2.0**60), 2.0**60, width=32)
bits = st.integers(2, 16)


def ulp(x: float) -> float:
    """The unit in the last place of a float32."""
    return math.ldexp(1.0, max(math.frexp(x)[1], -125) - 24)


@given(st.floats(-87.25, 88.5, width=32))
def test_exp_is_within_an_ulp(x: float) -> None:
    assert abs(float(exp(np.array([x], np.float32))[0]) - math.exp(x)) <= 0.98 * ulp(math.exp(x))


@given(st.floats(2.0**-149, 3.4028234663852886e38, width=32))
def test_log_is_within_an_ulp(x: float) -> None:
    assert abs(float(log(np.array([x], np.float32))[0]) - math.log(x)) <= 0.86 * ulp(math.log(x))


@given(st.floats(-87.25, 2.0**100, width=32))
def test_softplus_is_within_its_bound(x: float) -> None:
    true = max(x, 0.0) + math.log1p(math.exp(-abs(x)))
    assert abs(float(softplus(np.array([x], np.float32))[0]) - true) <= 2.12 * ulp(true)


@given(st.floats(-88.5, 2.0**100, width=32))
def test_silu_is_within_its_bound(x: float) -> None:
    true = x / (1 + math.exp(-x))
    assert abs(float(silu(np.array([x], np.float32))[0]) - true) <= 2.45 * ulp(true)


@given(st.lists(st.integers(-(2**16), 2**16), min_size=1, max_size=100))
def test_tree_sum_of_small_integers_is_exact(values: list[int]) -> None:
    assert tree_sum(np.array(values, np.float32)) == sum(values)


@given(floats, st.floats(2.0**-20, 2.0**20, width=32), bits)
def test_quantize_rounds_half_to_even_and_holds_the_range(x: float, scale: float, n: int) -> None:
    product = Fraction(float(np.float32(x) * np.float32(scale)))
    largest = 2 ** (n - 1) - 1
    q = int(quantize(np.array([x], np.float32), np.array(scale, np.float32), n)[0])
    assert q == round(max(-Fraction(largest), min(product, Fraction(largest))))


@given(st.lists(floats, min_size=1, max_size=20), bits)
def test_codes_read_back_within_half_a_step(values: list[float], n: int) -> None:
    x = np.array(values, np.float32)
    codes = code(x, n, "x")
    step = float(np.max(np.abs(x))) / (2 ** (n - 1) - 1)
    assert np.all(np.abs(dequantize(codes).astype(np.float64) - x) <= step * (0.5 + 2.0**-6) + 2.0**-100)


@given(st.lists(floats, min_size=1, max_size=20), st.sampled_from([22, 30]))
def test_fixed_point_is_within_half_a_unit(values: list[float], magnitude: int) -> None:
    fixed = fixed_point(np.array([values], np.float32), magnitude, "x")
    for q, x in zip(fixed.q[0].tolist(), np.array(values, np.float32).tolist(), strict=True):
        assert abs(q) <= 2**magnitude
        assert abs(Fraction(q) / Fraction(2) ** int(fixed.exponent[0]) - Fraction(x)) <= max(
            Fraction(1, 2) / Fraction(2) ** int(fixed.exponent[0]), Fraction(1, 2**100)
        )


def test_fixed_point_reads_back_with_one_rounding() -> None:
    """Below 2^24 exactly; above it by hand, half to even."""
    q = np.array([[2**22, -3, 0], [2**24 + 1, 2**24 + 3, 2**30 - 1], [5, -(2**22), 1]], np.int32)
    values = dequantize(FixedPoint(q, np.array([22, 0, -100], np.int32)))
    assert values.dtype == np.float32
    assert values.tolist() == [[1, -3 * 2.0**-22, 0], [2.0**24, 2.0**24 + 4, 2.0**30], [5 * 2.0**100, -(2.0**122), 2.0**100]]


@given(st.lists(st.tuples(floats, floats), min_size=1, max_size=50))
def test_an_unquantized_product_is_as_exact_as_float32_s(pairs: list[tuple[float, float]]) -> None:
    x, w = (np.array([column], np.float32) for column in zip(*pairs, strict=True))
    a, b = fixed_point(x, 30, "x"), fixed_point(w, 22, "w")
    got = Fraction(float(rescale(integer_product(a, b), a, b)[0, 0]))
    true = sum(Fraction(p) * Fraction(q) for p, q in zip(x[0].tolist(), w[0].tolist(), strict=True))
    largest = Fraction(float(np.abs(x).max())) * Fraction(float(np.abs(w).max()))
    assert abs(got - true) <= len(pairs) * largest * Fraction(1, 2**21) + Fraction(1, 2**38)


@given(st.integers(1, 4), st.integers(1, 9), st.randoms())
def test_packing_is_undone(rows: int, columns: int, random: "np.random.Generator") -> None:
    q = np.array([[random.choice(range(-8, 8)) for _ in range(columns)] for _ in range(rows)], np.int8)
    assert np.array_equal(unpack4(pack4(q), columns), q)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_by_name(bad: float) -> None:
    with pytest.raises(NonFiniteError, match=r"layers\.0\.x: "):
        code(np.array([1, bad], np.float32), 8, "layers.0.x")
