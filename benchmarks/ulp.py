"""Errors of the specification's exp, log, softplus and silu over every float32 input (docs/SPEC.md, section 1).

Run as `python benchmarks/ulp.py [FUNCTION ...]`; each function takes some minutes on one core. Written for each:

- how far the result is from the exact value, in units in the last place of the exact value;
- how far from the correctly rounded one, in float32 steps, and how many results are not the correctly rounded one.

The exact value is float64's, whose own error is below 2^-28 of these units; the worst input is computed again with mpmath.
"""

import sys
from collections.abc import Callable

import mpmath
import numpy as np
from numpy.typing import NDArray

from refmamba.spec import arith

CHUNK = 1 << 18
F64 = NDArray[np.float64]


def softplus64(x: F64) -> F64:
    """log(1 + e^x) in float64."""
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def silu64(x: F64) -> F64:
    """x / (1 + e^-x) in float64."""
    y: F64 = x / (1 + np.exp(-x))
    return y


# Name: the function, float64's, mpmath's, and where it is approximated; outside, the special values of the SPEC hold.
FUNCTIONS: dict[str, tuple[Callable[[arith.F32Array], arith.F32Array], Callable[[F64], F64], str, float, float]] = {
    "exp": (arith.exp, np.exp, "exp(x)", -87.336, 88.722),
    "log": (arith.log, np.log, "log(x)", 2.0**-149, 3.4028235e38),
    "softplus": (arith.softplus, softplus64, "log1p(exp(x))", -87.336, 3.4028235e38),
    "silu": (arith.silu, silu64, "x/(1+exp(-x))", -88.722, 3.4028235e38),
}


def measure(name: str) -> str:
    """One function over all its float32 inputs: a line of the table."""
    function, exact, in_mpmath, low, high = FUNCTIONS[name]
    worst, worst_x, steps, misrounded, count = 0.0, np.float32(0), 0, 0, 0
    with np.errstate(all="ignore"):
        for start in range(0, 1 << 32, CHUNK):
            x = np.arange(start, start + CHUNK, dtype=np.int64).astype(np.uint32).view(np.float32)
            x = x[(x >= np.float32(low)) & (x <= np.float32(high))]
            if not len(x):
                continue
            y, true = function(x), exact(x.astype(np.float64))
            _, e = np.frexp(true)
            error = np.abs(y - true) * np.ldexp(1.0, 24 - np.maximum(e, -125))
            nearest = true.astype(np.float32)
            # Neighbours of one sign differ by one as integers.
            apart = np.abs(y.view(np.int32).astype(np.int64) - nearest.view(np.int32))
            apart[(y == 0) & (nearest == 0)] = 0
            if error.max() > worst:
                worst, worst_x = float(error.max()), x[error.argmax()]
            steps, misrounded = max(steps, int(apart.max())), misrounded + int((apart > 0).sum())
            count += len(x)
    mpmath.mp.prec = 120
    scope = {"exp": mpmath.exp, "log": mpmath.log, "log1p": mpmath.log1p, "x": mpmath.mpf(float(worst_x))}
    value = eval(in_mpmath, scope)
    unit = mpmath.mpf(2) ** (max(mpmath.frexp(value)[1], -125) - 24)
    in_ulp = abs(mpmath.mpf(float(function(np.array([worst_x]))[0])) - value) / unit
    return (f"{name}: {count} inputs, {low} to {high}: at most {worst:.4f} ulp (mpmath: {float(in_ulp):.4f}) "
            f"at {float(worst_x).hex()}; at most {steps} from the correctly rounded, "
            f"{misrounded / count:.4%} are not it")  # fmt: skip


if __name__ == "__main__":
    for chosen in sys.argv[1:] or FUNCTIONS:
        print(measure(chosen), flush=True)
