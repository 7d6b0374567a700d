"""A test vector, and the numbers that vectors are made of (tests/vectors/README.md): what the files of cases share."""

import platform
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np

from refmamba.conformance.vectors import encode
from refmamba.spec.arith import F32Array

FRACTIONS = f"independent:fractions, Python {platform.python_version()}"
MPMATH = f"independent:mpmath {mpmath.__version__}"
HAND = "hand"
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
