"""Numbers from elsewhere: transformers' logits, a float64 forward with planted faults, and refmamba's own traces."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_mamba import forward
from safetensors.numpy import load_file, save_file
from test_cli import run

from refmamba.conformance.dumps import read_dump
from refmamba.errors import DataError, SpecialFileError
from refmamba.formats.hub import resolve_model

ROOT = Path(__file__).parents[1]
VECTOR = Path(__file__).parent / "vectors" / "transformers.npz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model whose logits transformers computed, as transformers saved it."""
    place, vector = tmp_path_factory.mktemp("model"), np.load(VECTOR)
    (place / "config.json").write_bytes(vector["config"].tobytes())
    (place / "model.safetensors").write_bytes(vector["weights"].tobytes())
    return place


def dumped(file: Path, folder: Path, arrays: dict[str, Any], **about: Any) -> Path:
    text = json.dumps({"tool": "a test", "model": str(folder), **about})
    save_file({name: np.array(x, order="C") for name, x in arrays.items()}, file, metadata={"about": text})
    return file


def against(file: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return run("verify", "--against", str(file), *args)


def test_the_logits_of_transformers_are_within_float32(folder: Path, tmp_path: Path) -> None:
    vector, file = np.load(VECTOR), tmp_path / "logits.npy"
    np.save(file, vector["logits"])
    tokens = ",".join(map(str, vector["tokens"]))
    options = ("--model", str(folder), "--tokens", tokens)
    within = against(file, *options, "--tolerance", "float32")
    assert within.returncode == 0, within.stdout + within.stderr
    assert "within float32" in within.stdout
    exact = against(file, *options)
    assert exact.returncode == 1
    assert "first difference: logits: token 0 (which is 3), element [0, " in exact.stdout
    assert "cause: the rounding of float32 in another order" in exact.stdout
    np.save(file, vector["logits"][None, :, :200])  # a batch of one, and rows cut off
    cut = against(file, *options, "--tolerance", "float32")
    assert (cut.returncode, "padding rows 200 to 210 of the logits are cut off" in cut.stdout) == (0, True)


def bits(drop: int) -> Callable[[np.ndarray], np.ndarray]:
    def rounded(x: np.ndarray) -> np.ndarray:
        step = 2.0 ** (np.frexp(np.abs(x.astype(np.float64)))[1] - 24 + drop)
        return np.where(x == 0, x, np.rint(x / step) * step).astype(np.float32).astype(np.float64)

    return rounded


def weights_in(rounded: Callable[[np.ndarray], np.ndarray], weights: dict[str, Any]) -> dict[str, Any]:
    return {name: rounded(x) for name, x in weights.items()}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("right", None),
        ("bfloat16", "the weights were rounded to 16 bits, bfloat16"),
        ("float16", "the weights were rounded to 16 bits, float16"),
        ("tf32", "the products are computed in TF32"),
        ("twice", "the bias of dt_proj is added twice"),
        ("missing", "the bias of dt_proj is missing"),
        ("epsilon", "the norms' epsilon is near 1e-06, not 1e-05"),
        ("earlier", "each row is the position's before"),
        ("later", "each row is the next position's"),
        ("begin", "a begin token, 0, was put before the sequence"),
        ("first", "the first token was left out"),
        ("padded", "padding rows were added: the dump has 216 rows, the model 211"),
        ("another", None),
    ],
)
def test_a_planted_fault_is_named_and_no_other(folder: Path, tmp_path: Path, name: str, words: str | None) -> None:
    weights, tokens = load_file(folder / "model.safetensors"), np.arange(3, 40, 5)
    keep = ("logits", "layers.0.delta", "layers.2.ssm_state")
    sites = forward(weights, tokens)
    if name == "bfloat16":
        sites = forward(weights_in(bits(16), weights), tokens)
    elif name == "float16":
        sites = forward(weights_in(lambda x: x.astype(np.float16), weights), tokens)
    elif name == "tf32":
        sites = forward(weights, tokens, factor=bits(13))
    elif name in ("twice", "missing"):
        sites = forward(weights, tokens, bias=2.0 * (name == "twice"))
    elif name == "epsilon":
        sites = forward(weights, tokens, epsilon=1e-6)
    elif name == "begin":
        sites = {"logits": forward(weights, np.array([0, *tokens]))["logits"]}
    elif name == "first":
        sites = {"logits": forward(weights, tokens[1:])["logits"]}
    elif name in ("earlier", "later"):
        sites = {"logits": np.roll(sites["logits"], 1 if name == "earlier" else -1, axis=0)}
    elif name == "padded":
        sites = {"logits": np.pad(sites["logits"], ((0, 0), (0, 5)))}
    elif name == "another":  # a fault that is none of the common ones
        sites = {"logits": sites["logits"] * 1.5}
    file = dumped(tmp_path / "dump.safetensors", folder, {"tokens": tokens} | {k: v for k, v in sites.items() if k in keep})
    done = against(file, "--tolerance", "float32", "--json")
    told = json.loads(done.stdout)
    if name == "right":
        assert (done.returncode, told["ok"], told["first"]) == (0, True, None)
        return
    assert done.returncode == 1
    assert (told["cause"] is None) if words is None else words in told["cause"]


def test_the_first_wrong_site_is_named_with_both_bit_patterns(tmp_path: Path) -> None:
    trace = tmp_path / "trace.safetensors"
    assert run("trace", "--text", "The old man", "--scheme", "int8-smooth", "--out", str(trace)).returncode == 0
    arrays = load_file(trace)
    assert {"tokens", "logits", "embedding", "layers.7.ssm_state", "layers.0.in_proj.in_codes.scale"} <= arrays.keys()
    assert arrays["layers.0.in_proj.acc"].dtype == np.float64
    done = against(trace, "--scheme", "int8-smooth")
    assert done.returncode == 0, done.stdout
    assert "every bit is the specification's" in done.stdout
    wrong = arrays["layers.3.u"]
    wrong.view(np.uint32)[1, 5] ^= 1
    save_file({"tokens": arrays["tokens"], "logits": arrays["logits"], "layers.3.u": wrong}, trace)
    done = against(trace, "--scheme", "int8-smooth")
    assert done.returncode == 1
    line = next(line for line in done.stdout.splitlines() if line.startswith("first difference"))
    assert line.startswith(f"first difference: layers.3.u: token 1 (which is {arrays['tokens'][1]}), element [1, 5]: expected ")
    right = int(wrong.view(np.uint32)[1, 5]) ^ 1
    assert f"{right:08x}" in line
    assert f"{right ^ 1:08x}" in line


def test_a_trace_as_npz_holds_the_same(tmp_path: Path) -> None:
    out = tmp_path / "trace.npz"
    assert run("trace", "--tokens", "5,6", "--scheme", "w8a8-all", "--out", str(out)).returncode == 0
    assert json.loads(str(np.load(out)["about"]))["scheme"] == "w8a8-all"
    assert against(out).returncode == 0


def test_logits_need_no_tokenizer_and_are_a_dump(tmp_path: Path) -> None:
    bare, out = tmp_path / "bare", tmp_path / "logits.npy"
    shutil.copytree(resolve_model("small").folder, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    options = ("--model", str(bare), "--tokens", "1,2,3", "--scheme", "w8-all")
    assert run("logits", *options, "--out", str(out)).returncode == 0
    assert against(out, *options).returncode == 0


def operation_dump(file: Path, arrays: dict[str, Any], **about: Any) -> Path:
    np.savez(file, allow_pickle=False, about=np.array(json.dumps(about)), **arrays)
    return file


def test_one_operation_is_compared_alone(tmp_path: Path) -> None:
    x, weight = np.array([[3.0, 4.0]], np.float32), np.ones(2, np.float32)
    right = x / np.sqrt(np.float32(12.5))  # the mean of 9 and 16; the epsilon is below its last bit
    arrays = {"arguments.0": x, "arguments.1": weight, "result": right}
    file = operation_dump(tmp_path / "a.npz", arrays, operation="rms_norm", arguments={"2": 1e-12})
    assert against(file).returncode == 0
    file = operation_dump(tmp_path / "a.npz", arrays, operation="rms_norm", arguments={"2": 1.0})
    done = against(file)
    assert done.returncode == 1
    assert "first difference: rms_norm: result, element [0, 0]" in done.stdout


def test_an_operation_of_codes(tmp_path: Path) -> None:
    x = np.array([[1.0, -2.0, 0.25]], np.float32)
    scale = np.array([[63.5]], np.float32)
    arrays = {"arguments.0": x, "result.q": np.array([[64, -127, 16]]), "result.scale": scale}
    about = {"operation": "code", "arguments": {"1": 8, "2": "x", "3": "per_row"}, "bits": 8}
    assert against(operation_dump(tmp_path / "a.npz", arrays, **about)).returncode == 0  # 63.5 and 15.875, half to even
    arrays["result.q"] = np.array([[63, -127, 16]])
    assert against(operation_dump(tmp_path / "a.npz", arrays, **about)).returncode == 1
    one = np.array(1, np.float32)
    product = {"arguments.0.q": np.array([[2, -3]]), "arguments.0.scale": one, "arguments.1.q": np.array([[4, 5]])}
    product |= {"arguments.1.exponent": np.array([0]), "result": np.array([[-7.0]])}
    about = {"operation": "integer_product", "arguments": {"0": {"bits": 8}}}
    assert against(operation_dump(tmp_path / "b.npz", product, **about)).returncode == 0


@pytest.mark.parametrize(
    ("arrays", "about", "words"),
    [
        ({"logits": np.zeros((2, 4096), np.float32)}, {}, "has no tokens"),
        ({"tokens": np.array([1, 2])}, {}, "no logits and no site"),
        ({"tokens": np.array([1, 2]), "layers.0.in_prj.out": np.zeros(3)}, {}, "the nearest is layers.0.in_proj.out"),
        ({"tokens": np.array([1, 9999]), "embedding": np.zeros(3)}, {}, "9999"),
        ({"tokens": np.array([1, 2]), "logits": np.zeros((2, 4000))}, {}, "4000 rows"),
        ({"tokens": np.array(["a"])}, {}, "it is numbers"),
        ({"tokens": np.array([1]), "logits": np.array([np.datetime64("2026")])}, {}, "it is numbers"),
        ({"result": np.zeros(1)}, {"operation": "rms_nrm"}, "the nearest is rms_norm"),
        ({"result": np.zeros(1), "arguments.1": np.zeros(1)}, {"operation": "rms_norm"}, "no arguments.0"),
        ({"result": np.zeros(1), "arguments.0": np.zeros((1, 1))}, {"operation": "rms_norm"}, "no arguments of rms_norm"),
        ({"other": np.zeros(1), "arguments.0": np.zeros(1)}, {"operation": "exp"}, "result is not there"),
        ({"tokens": np.array([1])}, {"model": 7}, "model in `about`"),
    ],
)
def test_a_wrong_dump_is_one_line_and_status_2(
    tmp_path: Path, arrays: dict[str, Any], about: dict[str, Any], words: str
) -> None:
    done = against(operation_dump(tmp_path / "wrong.npz", arrays, **about))
    assert (done.returncode, done.stdout) == (2, ""), done.stdout
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.safetensors", "a.txt"])
def test_a_broken_file_is_one_line_and_status_2(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x93NUMPY nothing of the kind")
    for file in (tmp_path / name, tmp_path / f"no{name}"):
        done = against(file, "--tokens", "1")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr


def test_what_numpy_cannot_parse_is_a_data_error(tmp_path: Path) -> None:
    """A header that Python's tokenizer gives up, a .npz called .npy, a stream that zlib refuses; a pipe is not opened."""
    array, several, broken = tmp_path / "array.npy", tmp_path / "several.npy", tmp_path / "broken.npz"
    np.save(array, np.zeros(3, np.float32))
    array.write_bytes(array.read_bytes().replace(b"_order", b"[order"))
    with several.open("wb") as stream:
        np.savez(stream, a=np.zeros(3))
    np.savez_compressed(broken, a=np.arange(1000.0))
    content = bytearray(broken.read_bytes())
    content[60:90] = b"\xff" * 30
    broken.write_bytes(content)
    for file in (array, several, broken):
        with pytest.raises(DataError, match=f"{file.name}: not a whole"):
            read_dump(file)
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(SpecialFileError, match="is a pipe"):
        read_dump(tmp_path / "pipe.npz")


def test_a_number_where_a_table_is_due_differs(tmp_path: Path) -> None:
    done = against(operation_dump(tmp_path / "number.npz", {"tokens": np.array([1]), "logits": np.array(1.0)}))
    assert done.returncode == 1, done.stderr
    assert "first difference: logits: float32 (), not float32 (1, 4096)" in done.stdout


def test_options_that_go_with_a_dump_are_refused_without_one() -> None:
    done = run("verify", "--scheme", "fp32")
    assert done.returncode == 2
    assert "--schemes" in done.stderr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_the_dump_of_transformers(tmp_path: Path, dtype: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=211, hidden_size=40, num_hidden_layers=3, state_size=12, time_step_rank=5)
    transformers.MambaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model")
    out, tokens = tmp_path / "dump.safetensors", "3,10,17,24,31,38,45,52"
    script = [sys.executable, str(ROOT / "tools" / "dump_transformers.py"), str(tmp_path / "model"), "--tokens", tokens]
    script += ["--out", str(out), "--dtype", dtype]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if dtype == "float32":
        within = against(out, "--tolerance", "float32")
        assert within.returncode == 0, within.stdout
        assert "layers.2.out_proj.out" in within.stdout
    else:  # the stored type, which is also transformers' default
        told = against(out)
        assert told.returncode == 1
        assert "cause: computed in bfloat16: every value is such a 16-bit number" in told.stdout
