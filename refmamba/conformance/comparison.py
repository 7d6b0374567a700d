"""Comparison of arrays: by bits, by a vector's rule, or within a tolerance; and the first difference."""

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refmamba.errors import DataError


@dataclass(frozen=True)
class Difference:
    """The first place where something is not as it must be."""

    operation: str
    where: str
    element: list[int] = field(default_factory=list)
    expected: str = ""
    found: str = ""

    def __str__(self) -> str:
        values = f", element {self.element}: expected {self.expected}, found {self.found}" if self.expected else ""
        return f"{self.operation}: {self.where}{values}"


@dataclass(frozen=True)
class Tolerance:
    """What a float kernel may be off by.

    name: as the user gives it. relative: to the largest magnitude of the tensor, or steps: of float32, for each element.
    divergence: Kullback-Leibler, of a whole model's next token, at any position.
    """

    name: str
    relative: float | None
    steps: int | None
    divergence: float

    def far(self, expected: Any, found: Any) -> Any:
        """Where an array is off by more. A NaN must be one, an infinity the same."""
        special = ~np.isfinite(expected) | ~np.isfinite(found)
        if self.steps is not None and expected.dtype == np.float32:
            off = ulps(expected, found) > self.steps
        else:
            e, f = (np.where(special, 0, x).astype(np.float64) for x in (expected, found))
            off = np.abs(e - f) > (self.relative or 0.0) * np.abs(e).max(initial=0)
        return np.where(special, (expected != found) & ~(np.isnan(expected) & np.isnan(found)), off)


def parse_tolerance(text: str) -> Tolerance:
    """`float32`, `float16`, `bfloat16` or `ulp:N`. Raises DataError."""
    limits = {"float32": (1e-5, 1e-6), "float16": (4e-3, 1e-4), "bfloat16": (3e-2, 1e-2)}
    if text in limits:
        return Tolerance(text, limits[text][0], None, limits[text][1])
    if match := re.fullmatch(r"ulp:(\d+)", text):
        return Tolerance(text, None, int(match[1]), limits["float32"][1])
    raise DataError(f"unknown tolerance '{text}'; there are float32, float16, bfloat16, and ulp:N, as ulp:4")


Rule = str | Tolerance  # a vector's `compare` (tests/vectors/README.md), or a tolerance


def _bits(x: Any) -> str:
    if x.dtype.kind != "f":
        return str(x)
    return f"{int(x.view(f'u{x.dtype.itemsize}')):0{2 * x.dtype.itemsize}x} ({x})"


def ulps(a: Any, b: Any) -> Any:
    """Steps between two float32 arrays, 0 for two NaN; both zeros are one number."""
    a_at, b_at = (np.where(v < 0, -(v & 0x7FFFFFFF), v) for v in (x.view(np.int32).astype(np.int64) for x in (a, b)))
    return np.where(np.isnan(a) & np.isnan(b), 0, np.abs(a_at - b_at))


def unequal(expected: Any, found: Any, compare: Rule = "exact") -> tuple[Any, int]:
    """Where two arrays of one shape differ under a rule, and the largest distance in float32 steps."""
    distance = int(ulps(expected, found).max(initial=0)) if expected.dtype == np.float32 == found.dtype else 0
    if isinstance(compare, Tolerance):
        return compare.far(expected, found) if expected.dtype.kind == "f" else expected != found, distance
    rule, _, limit = compare.partition(":")
    if rule == "ulp":
        return ulps(expected, found) > int(limit), distance
    if rule == "close":
        far = np.abs(expected - found.astype(expected.dtype)) > float(limit) * np.abs(expected).max()
        return far | np.isnan(found), distance
    if rule == "value" or expected.dtype.kind != "f":
        return expected != found, distance
    as_bits = f"u{expected.dtype.itemsize}"
    return (expected.view(as_bits) != found.view(as_bits)) & ~(np.isnan(expected) & np.isnan(found)), distance


def difference(operation: str, where: str, expected: Any, found: Any, compare: Rule = "exact") -> tuple[Difference | None, int]:
    """The first difference of two arrays in C order, and the largest distance in float32 steps."""
    expected, found = np.asarray(expected, order="C"), np.asarray(found, order="C")
    same_kind = expected.dtype == found.dtype if expected.dtype.kind == "f" else found.dtype.kind in "iu"
    if expected.shape != found.shape or not same_kind:
        return Difference(operation, f"{where}: {found.dtype} {found.shape}, not {expected.dtype} {expected.shape}"), 0
    wrong, distance = unequal(expected, found, compare)
    if not np.any(wrong):
        return None, distance
    at = tuple(int(i) for i in np.argwhere(np.atleast_1d(wrong))[0])[: expected.ndim]
    return Difference(operation, where, list(at), _bits(expected[at]), _bits(found[at])), distance


def parts(value: Any) -> list[tuple[str, Any]]:
    """A result, or an argument, as arrays with names."""
    if isinstance(value, tuple):
        return [(f"result {i}", np.asarray(v)) for i, v in enumerate(value)]
    if hasattr(value, "q"):
        names = [name for name in ("scale", "exponent", "steps") if getattr(value, name, None) is not None]
        return [("codes", np.asarray(value.q)), *((name, np.asarray(getattr(value, name))) for name in names)]
    return [("result", np.asarray(value))]
