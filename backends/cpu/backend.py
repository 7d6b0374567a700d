"""The fast CPU backend: numba kernels on packed codes, the specification's bits (see kernels/layers.py for how)."""

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmamba.backend import check_support
from refmamba.backends.cpu.cache import CACHE, alone
from refmamba.backends.cpu.kernels.digits import COLUMNS
from refmamba.backends.cpu.kernels.instructions import LANES
from refmamba.backends.cpu.kernels.tables import LINE
from refmamba.backends.cpu.memory import address, aligned, strips_of
from refmamba.backends.cpu.runner import KNOWN, CpuRunner
from refmamba.backends.cpu.threads import Threads, check_subnormals
from refmamba.errors import BackendError
from refmamba.spec.arith import F32Array, IntArray
from refmamba.spec.codes import BLOCK
from refmamba.spec.jit import SETTINGS
from refmamba.spec.parameters import QuantizedModel
from refmamba.spec.scheme import Scheme


class Cpu:
    """numba kernels on every core, or on NUMBA_NUM_THREADS of them. The first load on a machine compiles the kernels."""

    name, device, exact = "cpu", "cpu", True
    sites: frozenset[str] | None = frozenset({
        "embedding", "residual_in", "in_proj.out", "u", "x_proj.out", "conv_state", "ssm_state", "gate", "residual_out",
        "lm_head.out",
    })  # fmt: skip

    def __init__(self, device: str | None = None) -> None:
        if device not in (None, "cpu"):
            raise BackendError(f"the cpu backend runs on 'cpu', not on '{device}'")
        if SETTINGS.DISABLE_JIT:
            raise BackendError("NUMBA_DISABLE_JIT is set, but this backend needs the compiler: use --backend reference")
        self.threads = Threads(SETTINGS.NUMBA_NUM_THREADS)

    def supports(self, scheme: Scheme) -> str | None:
        """See `refmamba.backend.Backend`."""
        return scheme.unknown_to(KNOWN)

    def load(self, model: QuantizedModel) -> CpuRunner:
        """Pack a model's codes. Raises BackendError for a scheme that it does not support, and where this processor or a thread
        is not exact."""
        check_support(self, model.scheme)
        if not any(CACHE.rglob("*.nbi")):
            print("compiling the CPU kernels, once for this machine: about 20 seconds", file=sys.stderr)
        check_exact(self.threads)
        return CpuRunner(model, self.threads)

    def operations(self) -> Mapping[str, Callable[..., Any]]:
        """Those that stand alone in the kernels; the others are fused, and the whole model is what shows their bits."""
        polynomials = {name: functools.partial(elementwise, i) for i, name in enumerate(("exp", "softplus", "silu"))}
        return polynomials | {"log_softmax": functools.partial(log_softmax, self.threads)}

    def reader(self, size: int, threads: int) -> Callable[[], None]:
        """What reads so many bytes once, on some threads, as the kernels read a weight: for `refmamba bench`."""
        data, sums = np.ones(size + LINE, np.uint8), aligned((threads, LANES), np.int32)
        return functools.partial(read, Threads(threads), data[-address(data) % LINE :][:size], sums)


def read(threads: Threads, data: NDArray[np.uint8], sums: IntArray) -> None:
    """Read some memory, whole lines of it. sums: a vector for each thread."""
    threads.run(alone.read, np.array([address(data), data.size // LINE, threads.count, address(sums)]))


def log_softmax(threads: Threads, logits: F32Array) -> F32Array:
    """Eq. (25), a row at a time on each thread: (..., vocabulary) -> the same."""
    x, n = np.ascontiguousarray(logits), logits.shape[-1]
    y, terms = np.empty_like(x), aligned((threads.count, strips_of(n) * LANES))
    table = [0, x.size // n, n, address(x), address(y), address(terms), terms.strides[0]]
    threads.run(alone.log_softmax, np.array(table))
    return y


def elementwise(which: int, x: F32Array) -> F32Array:
    """exp (0), softplus (1) or silu (2) by the kernels. Any shape."""
    check_subnormals()
    vectors = strips_of(x.size)
    source, target = aligned((vectors * LANES,)), aligned((vectors * LANES,))
    source[: x.size], source[x.size :] = x.ravel(), 0
    table = np.array([which, vectors, address(source), address(target)])
    alone.elementwise(address(table))
    return target[: x.size].reshape(x.shape)


def check_exact(threads: Threads) -> None:
    """Multiply the largest codes in the longest block. Raises BackendError."""
    k, n = BLOCK, COLUMNS
    w, x, out = aligned((2, k // 4, LANES, 4), np.uint8), aligned((n, k), np.int8), aligned((n, 2, LANES), np.int32)
    w.fill(255)
    x[...] = np.where(np.arange(n) % 2, 127, -128)[:, None]
    threads.run(alone.probe, np.array([address(w), address(x), k, address(out)]))
    if not np.array_equal(out, np.broadcast_to(255 * k * x[:, :1, None].astype(np.int32), out.shape)):
        raise BackendError("this processor's integer product is not exact; use --backend reference and report its model")
