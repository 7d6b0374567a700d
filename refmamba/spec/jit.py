"""numba, looked after: what the specification compiles, and the compiler's settings for a backend that compiles more."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

from refmamba.errors import BackendError

MOST_THREADS = 1024  # which a process may have; numba itself starts as many as it is told to
Function = TypeVar("Function", bound=Callable[..., Any])


def _import_numba() -> Any:
    """numba. Its import ends in a traceback for some values of this variable, and passes over the others with a warning."""
    threads = os.environ.get("NUMBA_NUM_THREADS")
    if threads is not None and not (threads.strip().isdecimal() and len(threads) < 9 and 0 < int(threads) <= MOST_THREADS):
        words = f"a number of threads from 1 to {MOST_THREADS}"
        raise BackendError(f"NUMBA_NUM_THREADS is '{threads}', and must be {words}: change or unset it")
    import numba

    return numba


numba = _import_numba()
SETTINGS = numba.config


def compiled(function: Function) -> Function:
    """A function that is compiled when it is first called, and kept on disk for the next process.

    Where numba finds no folder that it can write, every process compiles it anew.
    """
    try:
        result: Function = numba.njit(cache=True)(function)
    except RuntimeError:
        result = numba.njit(function)
    return result
