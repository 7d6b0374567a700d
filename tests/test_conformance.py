"""Every backend gives the specification's bits: operations and whole models, for every scheme, threads and processor."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from refmamba.backend import Backend, load_backend
from refmamba.conformance.models import LONG_SCHEMES, SCHEMES, ModelChecks, check_frozen, tiny_expected, tiny_models
from refmamba.conformance.operations import Row, check_operations
from refmamba.conformance.verify import run_models
from refmamba.errors import BackendError
from refmamba.spec.operations import OPERATIONS

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("reference", "torch", "cpu")
NOT_OFFERED = {
    "torch": {"sample", "pack4", "unpack4", "code_grouped"},  # they run on the host
    "cpu": set(OPERATIONS) - {"exp", "softplus", "silu", "log_softmax"},  # the others are fused: whole models show their bits
}
EDGES = ("int8", "int8-static", "w8a8-all", "mixed", "whole")
MODELS = tiny_models(SCHEMES)
SEQUENCES = [np.array(s) for s in tiny_expected()["sequences"]]


@pytest.fixture(params=NAMES, scope="module")
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend on the CPU. PyTorch with one thread, which is faster on small tensors; FROZEN runs it with all."""
    if request.param != "torch":
        yield load_backend(request.param)
        return
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_backend("torch")
    torch.set_num_threads(threads)


def assert_right(results: list[tuple[Row, object]]) -> None:
    """Nothing differs."""
    assert [str(wrong) for _, wrong in results if wrong] == []
    assert all(row.failed == 0 for row, _ in results)


def test_operations(backend: Backend) -> None:
    results = list(check_operations(backend.operations()))
    assert_right(list(results))
    assert {row.check for row, _ in results} == set(OPERATIONS)
    assert {row.check for row, _ in results if not row.offered} == NOT_OFFERED.get(backend.name, set())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_prefill_steps_chunks_batches_and_forks(backend: Backend, scheme: str) -> None:
    results = list(ModelChecks(backend, MODELS[scheme], SEQUENCES, long=True).run())
    ways = {"prefill", "positions", "batch", "states", "step", "chunks", "fork"}
    ways |= {"long prefill"} if scheme in LONG_SCHEMES else set()
    assert {row.check for row, _ in results} == {f"model: {way}" for way in ways}
    assert_right(list(results))


def test_other_models_and_what_must_be_refused(backend: Backend) -> None:
    """Untied heads, odd sizes, sequences over 256, schemes from files, NaN, subnormal numbers, sums beyond float64."""
    results = list(run_models(backend, EDGES, None, quick=False, tolerance=None))
    assert {row.check for row, _ in results} >= {f"model: {c}" for c in ("refused", "subnormals", "large sums")}
    assert_right(list(results))


def test_frozen_hashes(backend: Backend) -> None:
    results = list(check_frozen(backend, MODELS, tiny_expected()))
    assert len(results) == len(SCHEMES) + 1  # and transformers
    assert_right(list(results))


@pytest.mark.parametrize("scheme", ["fp32", "w8-all", "int8"])
def test_random_chunks(backend: Backend, scheme: str) -> None:
    runner, s = backend.load(MODELS[scheme]), SEQUENCES[0]
    whole, last = runner.prefill([s], logits="all")
    for seed in range(3):
        cuts = np.sort(np.random.default_rng(seed).choice(np.arange(1, len(s)), 4, replace=False))
        state, parts = None, []
        for piece in np.split(s, cuts):
            rows, state = runner.prefill([piece], state, logits="all")
            parts.append(rows[0])
        assert np.concatenate(parts).tobytes() == whole[0].tobytes()
        assert state is not None
        assert [x.tobytes() for x in state.arrays()] == [x.tobytes() for x in last.arrays()]


def test_threads_that_run_at_once_do_not_disturb_each_other(backend: Backend) -> None:
    runner = backend.load(MODELS["w8-all"])
    expected = [runner.prefill([s], logits="all")[0][0].tobytes() for s in SEQUENCES]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda s: runner.prefill([s], logits="all")[0][0].tobytes(), SEQUENCES * 3))
    assert together == expected * 3


FROZEN = """
import sys
from refmamba.backend import load_backend
from refmamba.conformance.models import check_frozen, tiny_expected, tiny_models
from refmamba.conformance.operations import check_operations
expected, backend = tiny_expected(), load_backend(sys.argv[1])
models = tiny_models(("fp32", "w4-mlp", "w8a8-all", "int8", "int8-static"))
wrong = [str(w) for _, w in [*check_operations(backend.operations()), *check_frozen(backend, models, expected)] if w]
sys.exit("\\n".join(wrong) or 0)
"""
AVX2 = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "OPENBLAS_CORETYPE": "Haswell",
    "NUMBA_CPU_NAME": "haswell",
}
ENVIRONMENTS = {
    "uncompiled": ("reference", {"NUMBA_DISABLE_JIT": "1"}),
    "reference with AVX2": ("reference", AVX2),
    "torch with AVX2": ("torch", AVX2),
    "torch without vectors, one thread": ("torch", {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_the_same_bits_in_another_environment(name: str, tmp_path: Path) -> None:
    backend, settings = ENVIRONMENTS[name]
    if backend == "torch":
        pytest.importorskip("torch")
    if settings is AVX2:
        features = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
        settings = settings | {"NPY_DISABLE_CPU_FEATURES": " ".join(f for f in features if f.startswith(("AVX512", "X86_V4")))}
    environment = os.environ | settings | {"NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", FROZEN, backend], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


FLUSHED = """
import sys, torch
from refmamba.backend import load_backend
from refmamba.errors import BackendError
if not torch.set_flush_denormal(True):
    sys.exit(77)
try:
    load_backend("torch")
except BackendError as error:
    sys.exit(0 if "subnormal" in str(error) else 1)
sys.exit(2)
"""


def test_flushed_subnormals_are_refused() -> None:
    """In a process of its own: threads that PyTorch's pool begins meanwhile would flush for good."""
    pytest.importorskip("torch")
    status = subprocess.run([sys.executable, "-c", FLUSHED], cwd=ROOT, check=False).returncode
    if status == 77:
        pytest.skip("this processor cannot flush subnormals")
    assert status == 0


def test_torch_on_cuda() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="device 'cuda'"):
            load_backend("torch", "cuda")
        return
    cuda = load_backend("torch", "cuda")
    assert_right(list(check_operations(cuda.operations())))
    for scheme in SCHEMES:
        assert_right(list(ModelChecks(cuda, MODELS[scheme], SEQUENCES).run()))
