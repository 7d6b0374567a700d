"""Comparison of arrays, and the first difference."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np


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


def _bits(x: Any) -> str:
    if x.dtype.kind != "f":
        return str(x)
    return f"{int(x.view(f'u{x.dtype.itemsize}')):0{2 * x.dtype.itemsize}x} ({x})"


def ulps(a: Any, b: Any) -> Any:
    """Steps between two float32 arrays, 0 for two NaN; both zeros are one number."""
    a_at, b_at = (np.where(v < 0, -(v & 0x7FFFFFFF), v) for v in (x.view(np.int32).astype(np.int64) for x in (a, b)))
    return np.where(np.isnan(a) & np.isnan(b), 0, np.abs(a_at - b_at))


def unequal(expected: Any, found: Any, compare: str = "exact") -> tuple[Any, int]:
    """Where two arrays of one shape differ under a rule, and the largest distance in float32 steps."""
    distance = int(ulps(expected, found).max(initial=0)) if expected.dtype == np.float32 == found.dtype else 0
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


def difference(operation: str, where: str, expected: Any, found: Any, compare: str = "exact") -> tuple[Difference | None, int]:
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
