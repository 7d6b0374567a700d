"""The CPU backend's threads: errors reach the caller, flushed subnormals are refused, and so are impossible settings."""

import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from conftest import TINY, RandomSource
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from refmamba.backend import load_backend
from refmamba.backends.cpu.backend import Cpu
from refmamba.backends.cpu.threads import Threads
from refmamba.errors import BackendError, SchemeError
from refmamba.spec.config import MambaConfig
from refmamba.spec.parameters import quantize_model
from refmamba.spec.scheme import parse_scheme

ROOT = Path(__file__).resolve().parents[1]
TABLE = np.zeros(1, np.int64)
FLUSH = 1 << 15 | 1 << 6  # of results, and of arguments
USUAL = 0x1F80  # what a process starts with


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_an_error_reaches_the_caller(rank: int) -> None:
    threads, ran = Threads(3), list[int]()

    def fails(number: int, table: int) -> None:
        ran.append(number)
        if number == rank:
            raise ZeroDivisionError(f"thread {number}")

    for _ in range(2):  # the threads are still there
        with pytest.raises(ZeroDivisionError, match=f"thread {rank}"):
            threads.run(fails, TABLE)
    threads.run(lambda number, table: ran.append(number), TABLE)
    assert sorted(ran) == sorted([0, 1, 2] * 3)


def test_an_interrupt_waits_for_the_other_threads() -> None:
    """They write into the caller's arrays, which would be freed, or given to the next call, under their hands."""
    threads, ended, main = Threads(2), list[int](), threading.get_ident()

    def job(number: int, table: int) -> None:
        if number:
            time.sleep(0.2)  # by now the main thread waits
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.2)
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.2)
            ended.append(number)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a runner of the tests may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            threads.run(job, TABLE)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == [1]
    threads.run(lambda number, table: ended.append(number), TABLE)
    assert sorted(ended) == [0, 1, 1]


untyped: Any = cgutils  # numba's own functions have no types
untyped_njit: Any = numba.njit


@intrinsic
def _set_control(context: Any, value: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        place = untyped.alloca_once_value(builder, builder.trunc(arguments[0], ir.IntType(32)))
        function_type = ir.FunctionType(ir.VoidType(), [byte])
        function = untyped.get_or_insert_function(builder.module, function_type, "llvm.x86.sse.ldmxcsr")
        builder.call(function, [builder.bitcast(place, byte)])
        return context.get_dummy_value()

    return types.void(types.int64), build


@pytest.fixture
def set_control() -> Iterator[Callable[[int], None]]:
    """Sets the x86 register that says whether a thread flushes subnormals; at the end, this thread's as it was."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("the register is x86's")
    set_register: Any = _set_control
    function: Callable[[int], None] = untyped_njit(lambda value: set_register(value))
    yield function
    function(USUAL)


@pytest.mark.parametrize("rank", [0, 1], ids=["the calling thread", "a thread of the pool"])
def test_flushed_subnormals_are_refused(rank: int, set_control: Callable[[int], None]) -> None:
    """When a model is loaded, and at any later call."""
    model, backend = quantize_model(RandomSource(TINY), parse_scheme("int8")), Cpu()
    backend.threads = Threads(2)
    runner = backend.load(model)
    _, state = runner.prefill([np.arange(3)])
    backend.threads.run(lambda number, table: set_control(USUAL | FLUSH if number == rank else USUAL), TABLE)
    calls: list[Callable[[], Any]] = [
        lambda: backend.load(model),
        lambda: runner.prefill([np.arange(3)]),
        lambda: runner.step(np.arange(1), state),
        lambda: backend.operations()["log_softmax"](np.zeros((2, 5), np.float32)),
    ]
    if rank == 0:  # the others do not run on the pool
        calls += [lambda: backend.operations()["exp"](np.zeros(5, np.float32))]
    for call in calls:
        with pytest.raises(BackendError, match="subnormal numbers are flushed to zero"):
            call()


def command(**variables: str) -> "subprocess.CompletedProcess[str]":
    """`refmamba generate` in a process of its own."""
    words = [sys.executable, "-m", "refmamba", "generate", "hello", "--max-new-tokens", "1"]
    return subprocess.run(words, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5", ""])
def test_a_number_of_threads_that_is_none(value: str) -> None:
    done = command(NUMBA_NUM_THREADS=value)
    message = f"refmamba: NUMBA_NUM_THREADS is '{value}', and must be a number of threads from 1 to 1024: change or unset it\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def test_without_the_compiler() -> None:
    done = command(NUMBA_DISABLE_JIT="1")
    message = "refmamba: NUMBA_DISABLE_JIT is set, but this backend needs the compiler: use --backend reference\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


@pytest.mark.parametrize("backend", ["reference", "cpu", "torch"])
@pytest.mark.parametrize("scheme", ["w8-mlp", "int8"])
def test_rows_too_long_for_an_exact_product_are_refused(scheme: str, backend: str) -> None:
    """A product of N-bit and 31-bit codes is exact up to K = 65536: 2^7 2^30 2^16 = 2^53."""
    if backend == "torch":
        pytest.importorskip("torch")
    longest = MambaConfig(2, 1, 5, dt_rank=65536)
    load_backend(backend).load(quantize_model(RandomSource(longest), parse_scheme(scheme))).prefill([np.arange(2)])
    with pytest.raises(SchemeError, match="dt_proj has rows of 65537"):
        load_backend(backend).load(quantize_model(RandomSource(MambaConfig(2, 1, 5, dt_rank=65537)), parse_scheme(scheme)))
