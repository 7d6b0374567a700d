"""`refmamba info`: of everything that has a name."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from eval_model import write_small
from safetensors.numpy import save_file

import refmamba
from refmamba.commands.main import refmamba as command_line
from refmamba.errors import DataError, JSONError, RefmambaError, SchemeError
from refmamba.formats.folder import open_checkpoint

RECEIPT = Path(__file__).parent / "fuzz" / "seeds" / "receipt.json"
SMALL = Path(refmamba.__file__).parent / "small_model"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refmamba.run.timing.READ_BYTES", 2**20)


def info(*words: str) -> tuple[dict[str, Any], list[str]]:
    """The JSON object, and the lines of the text, which fit 80 columns."""
    done = [CliRunner().invoke(command_line, ["info", *words, *more]) for more in (["--json"], [])]
    assert [one.exit_code for one in done] == [0, 0], done[0].output
    lines = done[1].stdout.splitlines()
    assert max(map(len, lines)) <= 80
    return json.loads(done[0].stdout), lines


def test_the_small_model() -> None:
    """8 layers of 1024x256, 48x512, 512x16 and 256x512 matrices and a head of 4096x256; of each layer beside them 256 of the
    norm, 512x5 of the convolution, 512 of the step, 512x16 of A, 512 of D; at last 256 of the last norm."""
    values, lines = info("small", "--scheme", "int8")
    linear, rest = 1024 * 256 + 48 * 512 + 512 * 16 + 256 * 512, 256 + 512 * 5 + 512 + 512 * 16 + 512
    assert values["parameters"] == 8 * (linear + rest) + 4096 * 256 + 256
    assert values["token_bytes"] == 8 * linear + 4096 * 256
    assert values["state_bytes"] == 4 * 8 * 512 * (3 + 16)
    assert values["memory_bytes"] == values["token_bytes"] + 4 * (8 * rest + 256) + values["state_bytes"]
    assert values["most_tokens_per_second"] == values["read_bandwidth_bytes_per_second"] / values["token_bytes"] > 0
    assert values["disk_bytes"] == sum((SMALL / name).stat().st_size for name in values["files"])
    assert values["types"] == {"float16": 82}
    assert values["tokenizer"] == {"tokens": 4096, "begin": 0, "end": [0], "added": []}
    assert values["backends"]["cpu"] is values["backends"]["reference"] is None
    assert (values["kind"], values["spec_version"]) == ("folder of floats", refmamba.SPEC_VERSION)
    assert values["config"]["d_inner"] == 512
    text = "\n".join(lines)
    assert f"content sha256 {values['content_sha256']}\n" in text
    assert "  weight in_proj.weight        8 bits, per channel\n" in text
    assert "Mamba-1, 4.55 M parameters: 8 layers" in text


def test_the_content_hash_is_docs_formats(tmp_path: Path) -> None:
    """Of a checkpoint of zeros and ones, from the text of docs/FORMAT.md, section 7."""
    folder = write_small(tmp_path / "m")
    source = open_checkpoint(folder)
    digest = hashlib.sha256(b"norm_eps 1e-05\n")
    for name, shape in source.config.shapes().items():
        x = source.read(name)  # type: ignore[union-attr]
        digest.update(f"{name} float32 {tuple(shape)}\n".encode() + x.astype("<f4").tobytes())
    assert info(str(folder))[0]["content_sha256"] == digest.hexdigest()


def test_a_quantized_folder_has_its_scheme_and_its_calibration(tmp_path: Path) -> None:
    refmamba.quantize(write_small(tmp_path / "m"), tmp_path / "q", scheme="int8-static")
    values, lines = info(str(tmp_path / "q"))
    assert values["kind"] == "quantized folder, rounding search"
    assert values["saved_quantized"]
    assert values["scheme"]["name"] == "int8-static"
    assert values["calibration"] == "its maxima are in the folder"
    assert values["types"]["int8"] > 4
    assert "scheme int8-static" in lines
    done = CliRunner().invoke(command_line, ["info", str(tmp_path / "q"), "--bits", "4"])
    assert isinstance(done.exception, RefmambaError)
    assert "leave out the scheme w4-all" in str(done.exception)


def test_a_model_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    values, _ = info(str(folder))
    assert values["tokenizer"] == {"error": f"{folder / 'tokenizer.json'}: no such file; put the model's tokenizer.json there"}
    assert values["files"] == ["config.json", "model.safetensors"]


def test_a_GGUF_file(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    done = CliRunner().invoke(command_line, ["export", "small", str(tmp_path), "--format", "gguf", "--type", "Q8_0"])
    assert done.exit_code == 0, done.output
    values, _ = info(str(tmp_path / "small-Q8_0.gguf"))
    assert values["kind"] == "GGUF file"
    assert values["types"] == {"Q8_0": 25, "F16": 8, "F32": 49}
    assert values["files"] == ["small-Q8_0.gguf", "tokenizer.json"]


def test_a_receipt() -> None:
    values, lines = info(str(RECEIPT))
    receipt = json.loads(RECEIPT.read_text())
    assert (values["kind"], values["command"]) == ("receipt", "generate")
    assert values["model_sha256"] == receipt["model_sha256"]
    assert (values["prompt_tokens"], values["tokens"]) == (len(receipt["prompt_tokens"]), 2)
    assert f"model sha256   {receipt['model_sha256']}" in lines


def test_a_saved_state(tmp_path: Path) -> None:
    file, entry = tmp_path / "s.safetensors", {"format": 1, "model_sha256": "a" * 64, "about": {"model": "small"}}
    arrays = {"tokens": np.arange(3, dtype=np.int32), "ssm": np.zeros((8, 512, 16), np.float32)}
    save_file(arrays, file, {"refmamba_state": json.dumps(entry)})
    values, _ = info(str(file))
    assert values["kind"] == "saved state"
    assert values["arrays"] == {"ssm": [8, 512, 16], "tokens": [3]}
    assert {key: values[key] for key in entry} == entry


@pytest.mark.parametrize("about", ['{"model": "\\ud800"}', '{"n": ' + "[" * 100 + "]" * 100 + "}", '{"n": ' + "9" * 30 + "}"])
def test_a_receipt_is_read_within_the_bounds_of_all_JSON(about: str, tmp_path: Path) -> None:
    file = tmp_path / "receipt.json"
    file.write_text(RECEIPT.read_text().replace('"about": {}', f'"about": {about}'))
    assert about in file.read_text()
    done = CliRunner().invoke(command_line, ["info", str(file)])
    assert isinstance(done.exception, JSONError)
    assert done.stdout == ""


def state_with(file: Path, **entry: Any) -> str:
    save_file({"tokens": np.zeros(1, np.int32)}, file, {"refmamba_state": json.dumps(entry)})
    return str(file)


def test_a_state_tells_nothing_but_what_a_state_has(tmp_path: Path) -> None:
    file = state_with(tmp_path / "s.safetensors", config={"n_layer": 1}, name=3, kind=[1], arrays=None, drawn=5)
    values, lines = info(file)
    assert values == {
        "name": file, "kind": "saved state", "disk_bytes": Path(file).stat().st_size, "arrays": {"tokens": [1]}, "drawn": 5
    }  # fmt: skip
    assert "drawn          5" in lines


def test_what_cannot_be_printed_is_escaped(tmp_path: Path) -> None:
    _, lines = info(state_with(tmp_path / "s.safetensors", model_sha256="\x1b[31m"))
    assert "model sha256   \\x1b[31m" in lines


def test_a_broken_scheme_is_told_before_anything_is_printed(tmp_path: Path) -> None:
    file = state_with(tmp_path / "s.safetensors", scheme={})
    done = CliRunner().invoke(command_line, ["info", file])
    assert isinstance(done.exception, SchemeError)
    assert (str(done.exception), done.stdout) == (f"{file}: scheme: the scheme has no name; it must have name", "")


@pytest.mark.parametrize(("name", "words"), [("x.txt", "is no model, receipt"), ("x.safetensors", "is no saved state")])
def test_what_is_nothing_of_these_is_told(name: str, words: str, tmp_path: Path) -> None:
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / name)
    done = CliRunner().invoke(command_line, ["info", str(tmp_path / name)])
    assert isinstance(done.exception, DataError)
    assert words in str(done.exception)


def test_as_a_process() -> None:
    done = subprocess.run([sys.executable, "-m", "refmamba", "info", "small"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("name           small\nkind           folder of floats\n")
