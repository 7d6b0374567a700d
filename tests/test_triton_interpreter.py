"""The Triton backend in Triton's interpreter: the specification's bits, without a GPU.

Triton decides at its import whether it interprets, so these tests run in a process of their own: the last one here starts it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, RandomSource, assert_bits
from eval_model import write_small
from test_eval_command import run as run_eval
from test_eval_command import saved

pytest.importorskip("torch")
pytest.importorskip("triton")

import torch
from triton_faults import FAULTS, SHAPE, elementwise, planted

from refmamba.backend import load_backend
from refmamba.backends.triton import backend, operations
from refmamba.backends.triton.kernels import alone
from refmamba.backends.triton.launch import launch
from refmamba.backends.triton.model import Mamba as Runner
from refmamba.errors import BackendError, NonFiniteError
from refmamba.eval_tasks.score import score, token_request
from refmamba.spec.arith import F32Array
from refmamba.spec.mamba1 import Mamba
from refmamba.spec.parameters import QuantizedModel, quantize_model
from refmamba.spec.scheme import parse_scheme

pytestmark = pytest.mark.ci
ROOT = Path(__file__).resolve().parents[1]
EVAL = ("--scheme", "int8", "--tasks", "lambada,copa", "--limit", "2", "--samples", "s.jsonl")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that the last test starts")
SEQUENCES = [np.array([3, 1, 4, 1, 5, 9, 2, 6, 5]), np.array([9]), np.array([2, 6])]


def assert_same(model: QuantizedModel, sequences: Sequence[Any] = SEQUENCES) -> None:
    """Prefill of a batch, two steps and a chunk: logits and states of the reference."""
    reference, runner = Mamba(model), load_backend("triton").load(model)
    expected, kept = reference.prefill(sequences, logits="all")
    logits, state = runner.prefill(sequences, logits="all")
    for tokens in (np.arange(len(sequences)) + 7, np.arange(len(sequences)) + 11):
        rows, kept = reference.step(tokens, kept)
        found, state = runner.step(tokens, state)
        expected, logits = [*expected, rows], [*logits, found]
    rows_, kept = reference.prefill(sequences, kept)
    found_, state = runner.prefill(sequences, state)
    for e, f in zip([*expected, *rows_], [*logits, *found_], strict=True):
        assert_bits(e, f)
    for e, f in zip(kept.arrays(), state.arrays(), strict=True):
        assert_bits(e, f)


@interpreted
@pytest.mark.parametrize("scheme", ["int8", "w3-all", "fp32", "w8a8-mlp"])
def test_odd_sizes(scheme: str) -> None:
    config = replace(TINY, n_layer=1, use_bias=True, use_conv_bias=False, d_model=21, d_state=5, d_conv=1)
    assert_same(quantize_model(RandomSource(config), parse_scheme(scheme)))


@interpreted
@pytest.mark.parametrize("scheme", ["int4-all", "w3-all"])
def test_a_packed_weight_is_unpacked_once_for_a_call_and_in_a_step_by_its_products(scheme: str) -> None:
    config = replace(TINY, n_layer=1, d_model=75)  # rows of 75 and 150 columns: the last group of 64 is not whole
    model = quantize_model(RandomSource(config), parse_scheme(scheme))
    started: list[tuple[str, bool | None]] = []

    def recorded(kernel: Any, *words: Any, **arguments: Any) -> None:
        started.append((kernel.__name__, arguments.get("PACKED")))
        launch(kernel, *words, **arguments)

    runner, reference = Runner(model, torch.device("cpu"), recorded), Mamba(model)
    expected, kept = reference.prefill([np.array([3, 1, 4])], logits="all")
    found, state = runner.prefill([np.array([3, 1, 4])], logits="all")
    assert_bits(expected[0], found[0])
    products = [packed for name, packed in started if name == "linear_kernel"]
    assert products == [False] * 5
    assert [name for name, _ in started].count("spread_kernel") == 5
    started.clear()
    assert_bits(reference.step(np.array([1]), kept)[0], runner.step(np.array([1]), state)[0])
    assert ("linear_kernel", True) in started
    assert not any(name == "spread_kernel" for name, _ in started)


@interpreted
def test_rows_longer_than_what_one_rounding_joins() -> None:
    config = replace(TINY, n_layer=1, d_model=20, expand=206, d_conv=2)  # 4,120 columns: eq. (12) has two blocks
    model = quantize_model(RandomSource(config), parse_scheme("fp32"))
    reference, runner = Mamba(model), load_backend("triton").load(model)
    for tokens in ([3], [3, 1]):  # fused, and not
        expected, found = (r.prefill([np.array(tokens)], logits="all")[0][0] for r in (reference, runner))
        assert_bits(expected, found)


@interpreted
def test_more_sequences_than_the_fused_kernels_take(tiny: RandomSource) -> None:
    assert_same(quantize_model(tiny, parse_scheme("int8")), [np.array([i]) for i in range(17)])


class Changed(RandomSource):
    """The tiny model with one element of one tensor changed."""

    def __init__(self, name: str, value: float) -> None:
        super().__init__(TINY)
        self.name, self.value = name, value

    def read(self, name: str) -> F32Array:
        x = super().read(name)
        if name == self.name:
            x.reshape(-1)[1] = self.value
        return x


@interpreted
def test_a_state_matrix_with_an_infinity_keeps_exp_s_bits() -> None:
    assert_same(quantize_model(Changed("layers.1.A_log", 100), parse_scheme("int8")))


@interpreted
@pytest.mark.parametrize("scheme", ["int8", "w8-mlp", "w8a8-mlp"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("layers.0.norm.weight", 3e38), ("layers.0.conv1d.weight", np.inf), ("layers.1.dt_proj.bias", np.inf),
     ("layers.1.D", np.nan), ("norm_f.weight", np.inf)],
)  # fmt: skip
def test_the_first_site_with_a_nan_is_named(name: str, value: float, scheme: str) -> None:
    model = quantize_model(Changed(name, value), parse_scheme(scheme))
    reference, runner = Mamba(model), load_backend("triton").load(model)
    for tokens in ([3], [3, 1, 4]):
        with pytest.raises(NonFiniteError) as expected, np.errstate(all="ignore"):
            reference.prefill([np.array(tokens)])
        with pytest.raises(NonFiniteError) as found:
            runner.prefill([np.array(tokens)])
        assert str(found.value) == str(expected.value)


@interpreted
def test_a_call_changes_neither_its_state_nor_its_fork(tiny: RandomSource) -> None:
    runner = load_backend("triton").load(quantize_model(tiny, parse_scheme("int8")))
    _, state = runner.prefill(SEQUENCES[:2])
    before = [x.copy() for x in state.arrays()]
    fork = state.take([1, 1, 0])
    logits, _ = runner.step(np.array([5, 5, 5]), fork)
    assert_bits(logits[0], logits[1])
    for kept, now in zip(before, state.arrays(), strict=True):
        assert_bits(kept, now)


@interpreted
@pytest.mark.parametrize("scheme", ["int8", "w8a8-mlp"])
def test_scores_are_those_of_the_reference(scheme: str, tiny: RandomSource) -> None:
    model, triton, reference = quantize_model(tiny, parse_scheme(scheme)), load_backend("triton"), load_backend("reference")
    wanted = [
        token_request([3, 1, *context], choice, 2048, "") for context in ([4], [4, 1]) for choice in ([5], [9, 2], [9, 6])
    ]
    runner = triton.load(model)
    assert hasattr(runner, "scores")
    assert score(runner, triton, wanted) == score(reference.load(model), reference, wanted)


@interpreted
@pytest.mark.parametrize("name", FAULTS)
def test_what_the_interpreter_sees_of_a_planted_fault(name: str, tmp_path: Path) -> None:
    fault, x = FAULTS[name], torch.from_numpy(np.random.default_rng(14).standard_normal(SHAPE).astype(np.float32) * 30)
    x[0, 3] = np.nan
    right, wrong = torch.zeros(SHAPE), torch.zeros(SHAPE)
    for kernel, y in ((getattr(alone, fault.kernel), right), (planted(tmp_path, fault), wrong)):
        launch(kernel, fault.grid, 4, x_ptr=x, y_ptr=y, **fault.arguments)
    assert bool(torch.any(right.view(torch.int32) != wrong.view(torch.int32))) == fault.interpreter


@interpreted
def test_the_interpreter_does_not_see_fusion() -> None:
    x, y, fused = torch.linspace(-9, 9, 600), torch.zeros(600), torch.zeros(600)
    launch(alone.elementwise_kernel, (1,), 4, x_ptr=x, y_ptr=y, **elementwise("exp"))
    alone.elementwise_kernel[(1,)](x_ptr=x, y_ptr=fused, **elementwise("exp"), num_warps=4, enable_fp_fusion=True)
    assert torch.equal(y.view(torch.int32), fused.view(torch.int32))


@interpreted
@pytest.mark.parametrize(("operation", "message"), [("multiply", "flushes subnormal"), ("product", "other products")])
def test_a_device_that_is_not_exact_is_refused(operation: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def elementwise(op: str, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)

    def product(x: Any, w: Any) -> torch.Tensor:
        return operations.integer_product(x, w) + 1

    if operation == "multiply":
        monkeypatch.setattr(operations, "elementwise", elementwise)
    else:
        monkeypatch.setitem(operations.OPERATIONS, "integer_product", product)
    with pytest.raises(BackendError, match=message):
        backend.check_device.__wrapped__(torch.device("cpu"))


@interpreted
def test_no_other_device_while_interpreting() -> None:
    with pytest.raises(BackendError, match="TRITON_INTERPRET is set"):
        load_backend("triton", "cuda")


@pytest.mark.skipif(INTERPRETED, reason="what is said without the interpreter")
@pytest.mark.parametrize(
    ("device", "message"), [("cpu", "TRITON_INTERPRET=1"), (None, "no CUDA device"), ("cuda:1", "--backend torch")]
)
def test_without_a_gpu_a_line_says_what_to_do(device: str | None, message: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(BackendError, match=message) as error:
        load_backend("triton", device)
    assert "\n" not in str(error.value)


def in_interpreter(*words: str) -> subprocess.CompletedProcess[str]:
    """A Python process that interprets Triton kernels."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(INTERPRETED, reason="starts this file in the interpreter")
def test_this_file_in_the_interpreter() -> None:
    result = in_interpreter("-m", "pytest", "-q", __file__)
    assert result.returncode == 0, result.stdout


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_verify_in_the_interpreter() -> None:
    result = in_interpreter("-m", "refmamba", "verify", "--quick", "--backend", "triton", "--schemes", "int8,w8-all")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "every bit is the specification's" in result.stdout


@pytest.fixture(scope="module")
def on_the_cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and with the results that the cpu backend has of four documents."""
    folder = tmp_path_factory.mktemp("eval")
    write_small(folder / "model")
    done = run_eval(folder, *EVAL, "--model", "model", "--backend", "cpu")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
@pytest.mark.parametrize("spread", [(), ("--workers", "2")], ids=["alone", "workers"])
def test_eval_has_the_cpu_s_results(spread: tuple[str, ...], on_the_cpu: Path, tmp_path: Path) -> None:
    if spread:
        pytest.importorskip("distributed")
    words = ("--model", str(on_the_cpu / "model"), "--backend", "triton", "--device", "cpu", *spread)
    done = run_eval(tmp_path, *EVAL, *words, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert len(saved(tmp_path)) == 4
    assert saved(tmp_path) == saved(on_the_cpu)
    samples, expected = ((folder / "s.jsonl").read_text("utf-8") for folder in (tmp_path, on_the_cpu))
    assert samples.count('"backend": "triton"') == 4
    names = {'"triton"': '"cpu"', f'"model": {json.dumps(str(on_the_cpu / "model"))}': '"model": "model"'}
    for name, other in names.items():
        samples = samples.replace(name, other)
    assert samples == expected
