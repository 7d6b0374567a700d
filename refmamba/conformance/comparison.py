"""Comparison of arrays: by bits, by a vector's rule, or within a tolerance; and the first difference."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refmamba.errors import DataError
from refmamba.spec.arith import F32Array

CODED = ("quantize", "code", "code_static", "fixed_point")  # their codes: a value halfway between two may become either


@dataclass(frozen=True)
class Difference:
    """The first place where something is not as it must be.

    raised: the code that was checked ended with an error of its own, so that it could not be compared.
    """

    operation: str
    where: str
    element: list[int] = field(default_factory=list)
    expected: str = ""
    found: str = ""
    raised: bool = False

    def __str__(self) -> str:
        values = f", element {self.element}: expected {self.expected}, found {self.found}" if self.expected else ""
        return f"{self.operation}: {self.where}{values}"


@dataclass(frozen=True)
class Errors:
    """How far an array is from the expected one.

    absolute: the largest distance. relative: that over the largest magnitude expected. ulp: the largest distance in float32
    steps.
    """

    absolute: float = 0.0
    relative: float = 0.0
    ulp: int = 0


def largest(errors: Iterable[Errors]) -> Errors:
    """Each measure's largest."""
    rows = list(errors) or [Errors()]
    return Errors(max(e.absolute for e in rows), max(e.relative for e in rows), max(e.ulp for e in rows))


@dataclass(frozen=True)
class Format:
    """A floating-point format: bits of its fraction, its largest finite number, its smallest normal one."""

    fraction: int
    maximum: float
    smallest: float

    def rounded(self, x: F32Array) -> F32Array:
        """float32 numbers rounded to this format, half to even; they must be within its range."""
        drop = 23 - self.fraction
        if drop == 0:
            return x
        bits = x.view(np.uint32).astype(np.uint64)
        bits = (bits + (1 << (drop - 1)) - 1 + ((bits >> np.uint64(drop)) & np.uint64(1))) >> np.uint64(drop) << np.uint64(drop)
        return np.where(np.isfinite(x), bits.astype(np.uint32).view(np.float32), x)

    def holds(self, x: Any) -> bool:
        """Whether an array's finite values are within the range, and not all of them too small to be normal."""
        magnitudes = np.abs(x[np.isfinite(x)])
        top = float(magnitudes.max(initial=0))
        return top <= self.maximum and (top == 0 or top >= self.smallest)


FORMATS = {
    "float32": Format(23, 2.0**127 * (2 - 2.0**-23), 2.0**-126),
    "float16": Format(10, 65504.0, 2.0**-14),
    "bfloat16": Format(7, 2.0**127 * (2 - 2.0**-7), 2.0**-126),
}


@dataclass(frozen=True)
class Tolerance:
    """What a float kernel may be off by.

    name: as the user gives it. relative: to the largest magnitude of the tensor, or steps: of float32, for each element.
    divergence: Kullback-Leibler's of a whole model's next token, the mean over the
    positions of all calls. format: what the kernel computes in.
    """

    name: str
    relative: float | None
    steps: int | None
    divergence: float
    format: Format

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
        return Tolerance(text, limits[text][0], None, limits[text][1], FORMATS[text])
    if match := re.fullmatch(r"ulp:(\d+)", text):
        return Tolerance(text, None, int(match[1]), limits["float32"][1], FORMATS["float32"])
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


def errors(expected: Any, found: Any) -> Errors:
    """How far two arrays of one shape are apart, where both are finite."""
    usual = np.isfinite(expected) & np.isfinite(found)
    e, f = (np.where(usual, x, 0).astype(np.float64) for x in (expected, found))
    absolute, top = float(np.abs(e - f).max(initial=0)), float(np.abs(e).max(initial=0))
    steps = int(ulps(expected, found).max(initial=0)) if expected.dtype == np.float32 == found.dtype else 0
    return Errors(absolute, absolute / top if top else absolute, steps)


def unequal(expected: Any, found: Any, compare: Rule = "exact", *, codes: bool = False) -> Any:
    """Where two arrays of one shape differ under a rule. codes: integers that a tolerance lets be off too, by one at
    least."""
    if isinstance(compare, Tolerance):
        if expected.dtype.kind == "f":
            return compare.far(expected, found)
        room = max(1.0, (compare.relative or 0.0) * np.abs(expected.astype(np.int64)).max(initial=0)) if codes else 0.0
        return np.abs(expected.astype(np.int64) - found) > room
    rule, _, limit = compare.partition(":")
    if rule == "ulp":
        return ulps(expected, found) > int(limit)
    if rule == "close":
        far = np.abs(expected - found.astype(expected.dtype)) > float(limit) * np.abs(expected).max()
        return far | np.isnan(found)
    if rule == "value" or expected.dtype.kind != "f":
        return expected != found
    as_bits = f"u{expected.dtype.itemsize}"
    return (expected.view(as_bits) != found.view(as_bits)) & ~(np.isnan(expected) & np.isnan(found))


def difference(
    operation: str, where: str, expected: Any, found: Any, compare: Rule = "exact"
) -> tuple[Difference | None, Errors]:
    """The first difference of two arrays in C order, and how far they are apart."""
    expected, found = np.asarray(expected, order="C"), np.asarray(found, order="C")
    if isinstance(compare, Tolerance) and expected.dtype.kind == "f" == found.dtype.kind:
        found = found.astype(expected.dtype)  # a float kernel gives its own width
    same_kind = expected.dtype == found.dtype if expected.dtype.kind == "f" else found.dtype.kind in "iu"
    if expected.shape != found.shape or not same_kind:
        reason = f"{where}: {found.dtype} {found.shape}, not {expected.dtype} {expected.shape}"
        return Difference(operation, reason), Errors()
    with np.errstate(all="ignore"):
        wrong = unequal(expected, found, compare, codes=operation in CODED)
        apart = errors(expected, found) if compare != "exact" else Errors()
    if not np.any(wrong):
        return None, apart
    at = tuple(int(i) for i in np.argwhere(np.atleast_1d(wrong))[0])[: expected.ndim]
    return Difference(operation, where, list(at), _bits(expected[at]), _bits(found[at])), apart


def parts(value: Any) -> list[tuple[str, Any]]:
    """A result, or an argument, as arrays with names."""
    if isinstance(value, tuple):
        return [(f"result {i}", np.asarray(v)) for i, v in enumerate(value)]
    if hasattr(value, "q"):
        names = [name for name in ("scale", "exponent", "steps") if getattr(value, name, None) is not None]
        return [("codes", np.asarray(value.q)), *((name, np.asarray(getattr(value, name))) for name in names)]
    return [("result", np.asarray(value))]
