"""The mamba-ssm backends on packages that stand in for the official ones (tests/stand_ins), and what they say where a piece is
missing."""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import RandomSource
from eval_model import write_small
from test_eval_command import run as run_eval
from test_eval_command import saved, scheduler_with_workers
from test_eval_score import questions

torch = pytest.importorskip("torch")

from refmamba.backend import Backend, load_backend  # noqa: E402
from refmamba.commands.main import refmamba  # noqa: E402
from refmamba.conformance.comparison import parse_tolerance  # noqa: E402
from refmamba.conformance.operations import check_operations  # noqa: E402
from refmamba.conformance.verify import run_models  # noqa: E402
from refmamba.errors import BackendError, DataError  # noqa: E402
from refmamba.eval_tasks.cluster import _inputs, _on_worker  # noqa: E402
from refmamba.eval_tasks.evaluate import subject  # noqa: E402
from refmamba.eval_tasks.score import score  # noqa: E402
from refmamba.run.session import ModelChoice  # noqa: E402
from refmamba.spec.parameters import quantize_model  # noqa: E402
from refmamba.spec.scheme import Quantizer, Scheme, parse_scheme  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
STAND_INS = ROOT / "tests" / "stand_ins"
PACKAGES = ("mamba_ssm", "causal_conv1d", "selective_scan_cuda", "causal_conv1d_cuda")
NAMES = {"bfloat16": "mamba-ssm", "float16": "mamba-ssm-float16", "float32": "mamba-ssm-float32"}
KERNELS = "mamba_ssm 0.0+standin, causal_conv1d 0.0+standin"
GROUPED = Scheme("grouped", {"in_proj.weight": Quantizer(4, "grouped", group=16), "x_proj.weight": Quantizer(8, "per_channel")})


def forget() -> None:
    """Import the packages anew."""
    for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
        del sys.modules[name]


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(STAND_INS))
    forget()
    yield
    forget()


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest, stand_ins: None) -> Backend:
    return load_backend(NAMES[request.param], "cpu")


def failed(results: Any) -> list[str]:
    return [str(wrong) for _, wrong in results if wrong]


def test_each_says_what_it_is(backend: Any) -> None:
    assert NAMES[backend.dtype] == backend.name
    assert (backend.device, backend.exact, backend.kernels) == ("cpu", False, KERNELS)


def test_the_operations_are_within_the_tolerance_of_their_dtype(backend: Any) -> None:
    results = list(check_operations(backend.operations(), parse_tolerance(backend.dtype)))
    assert failed(results) == []
    assert {row.check for row, _ in results if row.offered} == {"rms_norm", "conv1d", "selective_scan", "log_softmax"}
    assert all(row.cases for row, _ in results)


def test_whole_models_in_every_way_of_calling(backend: Any) -> None:
    """In 16 bits of the generated models under `fp32`, which is all that is asked where no scheme is named."""
    results = list(run_models(backend, None, None, quick=True, tolerance=parse_tolerance(backend.dtype)))
    assert failed(results) == []
    offered = {row.scheme for row, _ in results if row.offered}
    assert offered == ({"fp32"} if backend.dtype != "float32" else {"fp32", "w8-mlp", "w8-all", "w4-mlp", "w4-all", "w2-all"})
    assert {row.check for row, _ in results} >= {f"model: {way}" for way in ("batch", "states", "step", "chunks", "fork")}


def test_other_models(stand_ins: None) -> None:
    """Channels and taps that the kernel does not take, an untied head, no biases, 300 tokens; in float32, which sees most."""
    results = list(
        run_models(load_backend("mamba-ssm-float32", "cpu"), ["fp32", "w5-all"], None, quick=False,
                   tolerance=parse_tolerance("float32"))
    )  # fmt: skip
    assert failed(results) == []
    assert sum(row.check == "model: all calls" for row, _ in results) == 4


def test_weights_in_codes_are_read_back(stand_ins: None, tiny: RandomSource) -> None:
    model = quantize_model(tiny, GROUPED)
    expected, _ = load_backend("reference").load(model).prefill([np.arange(9)], logits="all")
    found, _ = load_backend("mamba-ssm-float32", "cpu").load(model).prefill([np.arange(9)], logits="all")
    assert np.abs(found[0] - expected[0]).max() < 1e-4 * np.abs(expected[0]).max()


def test_the_kernels_do_the_work(backend: Any, tiny: RandomSource) -> None:
    runner, calls = backend.load(quantize_model(tiny, parse_scheme("fp32"))), Counter[str]()

    def counted(name: str) -> Any:
        function = getattr(runner.kernels, name)

        def call(**keywords: Any) -> Any:
            calls[name] += 1
            return function(**keywords)

        return call

    names = [field.name for field in fields(runner.kernels) if field.name != "packages"]
    runner.kernels = replace(runner.kernels, **{name: counted(name) for name in names})
    _, state = runner.prefill([np.array([1, 2, 3]), np.array([4])])
    assert calls == {"scan": 2, "conv": 2}  # of two layers
    runner.step(np.array([5, 6]), state)
    assert calls == {"scan": 2, "conv": 2, "scan_step": 2, "conv_step": 2}


def test_padding_that_is_no_number_reaches_nothing(stand_ins: None, tiny: RandomSource) -> None:
    runner: Any = load_backend("mamba-ssm", "cpu").load(quantize_model(tiny, parse_scheme("fp32")))
    tokens = [np.array([1, 2, 3, 4, 5]), np.array([6, 7])]
    expected, state = runner.prefill(tokens, logits="all")
    runner.params["embedding.weight"][0] = torch.nan  # of the token that fills up
    found, after = runner.prefill(tokens, logits="all")
    assert [x.tobytes() for x in (*found, *after.arrays())] == [x.tobytes() for x in (*expected, *state.arrays())]


def test_activations_in_codes_are_refused(stand_ins: None, tiny: RandomSource) -> None:
    with pytest.raises(BackendError, match=r"'mamba-ssm' does not know the input scale per_token of in_proj \(scheme int8\)"):
        load_backend("mamba-ssm", "cpu").load(quantize_model(tiny, parse_scheme("int8")))


# Pieces that are there, as folders or modules with their text, and the line that is told.
MISSING: dict[str, tuple[dict[str, str], str]] = {
    "mamba_ssm": ({}, r"mamba_ssm is not installed: MAMBA_KEEP_CUDA_BUILD=TRUE pip install mamba-ssm causal-conv1d"),
    "its scan": ({"mamba_ssm/__init__": ""}, r"mamba_ssm was installed without its CUDA kernels \(selective_scan_cuda\): .*"
                 r"--force-reinstall"),
    "causal_conv1d": ({"mamba_ssm/__init__": "", "selective_scan_cuda": ""}, r"causal_conv1d is not installed: MAMBA_KEEP"),
    "its kernels": ({"mamba_ssm/__init__": "", "selective_scan_cuda": "", "causal_conv1d/__init__": ""},
                    r"causal_conv1d was installed without its CUDA kernels \(causal_conv1d_cuda\)"),
    "a library": ({"mamba_ssm/__init__": "", "selective_scan_cuda": "raise ImportError('libcudart.so.12: cannot open')"},
                  r"selective_scan_cuda of mamba_ssm cannot be loaded \(libcudart.so.12: cannot open\)"),
    "a package that it imports": ({"mamba_ssm/__init__": "import a_package_of_another_version", "selective_scan_cuda": "",
                                   "causal_conv1d/__init__": "causal_conv1d_fn = causal_conv1d_update = None",
                                   "causal_conv1d_cuda": ""},
                                  r"mamba_ssm, causal_conv1d cannot be imported: raised ModuleNotFoundError: No module named"),
}  # fmt: skip


@pytest.mark.parametrize("piece", MISSING)
def test_each_missing_piece_is_told_apart(piece: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("mamba_ssm") is not None:
        pytest.skip("the packages are installed here")
    present, line = MISSING[piece]
    for name, text in present.items():
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    forget()
    with pytest.raises(BackendError, match=line) as caught:
        load_backend("mamba-ssm", "cpu")
    assert "\n" not in str(caught.value)
    forget()


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_an_extension_for_another_pytorch_is_told(stand_ins: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled module that needs a symbol which no library here has."""
    (tmp_path / "m.c").write_text(
        "void missing_in_torch(void);\nvoid *PyInit_selective_scan_cuda(void) { missing_in_torch(); return 0; }\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "selective_scan_cuda.so", tmp_path / "m.c"], check=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BackendError) as caught:
        load_backend("mamba-ssm", "cpu")
    told = str(caught.value)
    assert told.startswith(
        f"selective_scan_cuda of mamba_ssm 0.0+standin is for another PyTorch than the {torch.__version__} here "
    )
    assert "(undefined symbol: missing_in_torch): MAMBA_KEEP_CUDA_BUILD=TRUE pip install" in told


def test_kernels_that_do_not_run_are_told(stand_ins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import causal_conv1d

    def fails(**keywords: Any) -> None:
        raise RuntimeError("CUDA error: no kernel image is available\nfor execution on the device")

    monkeypatch.setattr(causal_conv1d, "causal_conv1d_fn", fails)
    with pytest.raises(
        BackendError, match=r"causal_conv1d 0.0\+standin do not run on 'cpu': raised RuntimeError: CUDA error"
    ) as e:
        load_backend("mamba-ssm", "cpu")
    assert "\n" not in str(e.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", [None, "cuda:1"])
def test_no_cuda_is_told(device: str | None) -> None:
    with pytest.raises(BackendError, match="finds no CUDA device, which the kernels of mamba_ssm need"):
        load_backend("mamba-ssm", device)


def test_a_name_that_is_no_device_is_told(stand_ins: None) -> None:
    with pytest.raises(BackendError, match="the mamba-ssm backend cannot use the device 'gpu'"):
        load_backend("mamba-ssm", "gpu")


def test_verify_as_a_process() -> None:
    command = [sys.executable, "-m", "refmamba", "verify", "--quick", "--backend", "mamba-ssm", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": f"{STAND_INS}{os.pathsep}{ROOT}"}
    done = subprocess.run([*command, "--tolerance", "bfloat16"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"mamba-ssm on cpu, bfloat16, {KERNELS}, specification")
    assert "within bfloat16" in done.stdout


def run(*words: str) -> Any:
    done = CliRunner().invoke(refmamba, [*words, "--json"])
    if isinstance(done.exception, Exception):
        raise done.exception
    return json.loads(done.stdout)


def test_it_must_be_asked_for_a_tolerance(stand_ins: None) -> None:
    with pytest.raises(DataError, match="add --tolerance bfloat16"):
        run("verify", "--backend", "mamba-ssm", "--device", "cpu")


def test_text_is_generated(stand_ins: None) -> None:
    words = ("generate", "The old man", "--max-new-tokens", "8", "--scheme", "w8-all")
    made = run(*words, "--backend", "mamba-ssm-float32", "--device", "cpu")
    assert made["text"] == run(*words)["text"]
    assert (made["backend"], made["dtype"], made["kernels"]) == ("mamba-ssm-float32", "float32", KERNELS)


def test_no_receipt_is_made(stand_ins: None, tmp_path: Path) -> None:
    words = ("generate", "The old man", "--max-new-tokens", "2", "--receipt", str(tmp_path / "r.json"))
    with pytest.raises(DataError, match="backend 'mamba-ssm' is not exact, and a receipt is of the specification's bits"):
        run(*words, "--backend", "mamba-ssm", "--device", "cpu")
    assert list(tmp_path.iterdir()) == []
    run(*words)
    with pytest.raises(DataError, match="is not exact"):
        run("replay", str(tmp_path / "r.json"), "--backend", "mamba-ssm", "--device", "cpu")


def test_no_state_is_saved(stand_ins: None, tmp_path: Path) -> None:
    words = ("generate", "The old man", "--max-new-tokens", "2", "--save-state", str(tmp_path / "s.safetensors"))
    with pytest.raises(DataError, match="backend 'mamba-ssm' is not exact, and a saved state is of the specification's bits"):
        run(*words, "--backend", "mamba-ssm", "--device", "cpu")
    assert list(tmp_path.iterdir()) == []


def test_scores_on_the_device_are_those_of_its_logits(backend: Any, tiny: RandomSource) -> None:
    runner = backend.load(quantize_model(tiny, parse_scheme("fp32")))
    on_the_host = SimpleNamespace(prefill=runner.prefill, scheme=runner.scheme)  # it has no `scores`
    found, expected = (score(r, backend, questions(1)) for r in (runner, on_the_host))
    assert [s.greedy for s in found] == [s.greedy for s in expected]
    assert np.allclose([s.loglikelihood for s in found], [s.loglikelihood for s in expected], rtol=1e-5)


def test_tasks_are_scored_and_the_results_say_by_what(stand_ins: None, tmp_path: Path) -> None:
    words = ("eval", "--scheme", "fp32", "--tasks", "lambada,copa", "--limit", "4", "--results", str(tmp_path / "r.sqlite"))
    exact, found = run(*words), run(*words, "--backend", "mamba-ssm", "--device", "cpu")
    again = run(*words, "--backend", "mamba-ssm-float32", "--device", "cpu")
    assert found != exact  # not taken for its results
    text = json.dumps(found)
    assert '"dtype": "bfloat16"' in text
    assert KERNELS in text
    perplexity = [result["results"]["lambada"]["perplexity,none"] for result in (exact, found, again)]
    assert perplexity[0] != perplexity[1]
    assert abs(perplexity[1] / perplexity[0] - 1) < 0.05
    assert abs(perplexity[2] / perplexity[0] - 1) < 1e-4


@pytest.mark.ci
@pytest.mark.parametrize("spread", ["--workers", "--dask"])
def test_workers_have_the_results_of_one_process(spread: str, tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    path = {"PYTHONPATH": f"{STAND_INS}{os.pathsep}{ROOT}"}
    words = ("--model", str(write_small(tmp_path / "model")), "--scheme", "fp32", "--tasks", "lambada,copa", "--limit", "2",
             "--backend", "mamba-ssm", "--device", "cpu")  # fmt: skip
    folders = [tmp_path / name for name in ("alone", "spread", "scheduler")]
    for folder in folders:
        folder.mkdir()
    with ExitStack() as stack:
        where = "2"
        if spread == "--dask":
            where, _ = stack.enter_context(scheduler_with_workers(folders[2], 1, **path))
        for folder, more in ((folders[0], ()), (folders[1], (spread, where))):
            done = run_eval(folder, *words, *more, **path)
            assert done.returncode == 0, done.stderr
    alone = saved(folders[0])
    assert len(alone) == 4
    assert all(KERNELS in key for key, *_ in alone)
    assert saved(folders[1]) == alone


def test_a_worker_with_other_packages_is_refused(stand_ins: None, tmp_path: Path) -> None:
    job = subject(ModelChoice(str(write_small(tmp_path / "m")), "fp32", "mamba-ssm", device="cpu"), 2048).job
    assert _on_worker(job, _inputs(job), []) == []
    other = replace(job, numerics="bfloat16, mamba_ssm 9")
    line = f"on {socket.gethostname()}: its kernels are bfloat16, {KERNELS}, and those of the command bfloat16, mamba_ssm 9;"
    with pytest.raises(BackendError, match=re.escape(line)):
        _on_worker(other, _inputs(other), [])


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("mamba_ssm") is None, reason="no GPU, or no mamba_ssm"
)
@pytest.mark.parametrize("dtype", NAMES)
def test_on_a_card(dtype: str) -> None:
    """The packages themselves."""
    command = [sys.executable, "-m", "refmamba", "verify", "--backend", NAMES[dtype], "--tolerance", dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
