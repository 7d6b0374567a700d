"""What only a GPU can settle; skipped where there is none."""

import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from conftest import TINY, RandomSource, assert_bits

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

VERIFY = [sys.executable, "-m", "refmamba", "verify", "--backend", "triton", "--device", "cuda"]


def run(*command: str) -> None:
    """A command that ends with 0."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]


def test_every_scheme_has_the_specification_s_bits() -> None:
    run(*VERIFY)


def test_the_small_model_has_the_specification_s_bits() -> None:
    run(*VERIFY, "--model", "small", "--schemes", "int8,w8-all,w4-all,fp32")


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_the_kernels_are_clean(tool: str) -> None:
    run("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *VERIFY, "--quick", "--schemes", "int8,fp32")


@pytest.fixture(params=["int8", "w8-all", "int4", "fp32"])
def runner(request: pytest.FixtureRequest) -> Any:
    """The tiny model on the card."""
    from refmamba.backend import load_backend
    from refmamba.spec.parameters import quantize_model
    from refmamba.spec.scheme import parse_scheme

    return load_backend("triton", "cuda").load(quantize_model(RandomSource(TINY), parse_scheme(request.param)))


def test_a_graph_has_the_bits_of_single_launches(runner: Any) -> None:
    tokens = [np.array([3, 1, 4]), np.array([2])]
    _, state = runner.prefill(tokens)
    eager = state
    for step in range(4):
        now = np.array([5, 9]) + step
        logits, state = runner.step(now, state)
        expected, eager = runner.prefill([now[:1], now[1:]], eager)
        assert_bits(np.concatenate(expected), logits)
        for a, b in zip(eager.arrays(), state.arrays(), strict=True):
            assert_bits(a, b)
    assert len(runner.graphs) == 1


def test_a_sequence_has_the_same_bits_in_any_batch(runner: Any) -> None:
    states = [runner.prefill([np.arange(1 + i % 5)])[1] for i in range(16)]
    _, together = runner.prefill([np.arange(1 + i % 5) for i in range(16)])
    logits, after = runner.step(np.arange(16), together)
    for i, state in enumerate(states):
        alone, later = runner.step(np.array([i]), state)
        assert_bits(alone, logits[i : i + 1])
        for a, b in zip(later.arrays(), after.take([i]).arrays(), strict=True):
            assert_bits(a, b)


def test_a_call_does_not_synchronize(runner: Any) -> None:
    sequences = [np.arange(5), np.arange(3)]
    state, new = runner.initial_state(2), runner.initial_state(2)
    runner.prefill(sequences)  # compiles
    batch = runner.batch_of(sequences)
    last = runner.last_batch(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            runner.head(runner.last_rows(runner.forward(batch, state, new), batch), last)
    finally:
        torch.cuda.set_sync_debug_mode("default")
