"""Receipts as a user meets them: real processes, and the chain worked out beside them with hashlib (docs/FORMAT.md)."""

import hashlib
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli import run

from refmamba.errors import DataError
from refmamba.formats.hub import resolve_model
from refmamba.run.generate import Sampler
from refmamba.run.receipt import Recorder
from refmamba.run.session import ModelChoice, open_session

HEADER = ("format", "command", "spec_version", "model_sha256", "scheme", "sampling", "n_ids", "prompt_tokens")


def made(folder: Path, *args: str) -> tuple[Path, dict[str, Any]]:
    file = folder / "receipt.json"
    done = run(*args, "--receipt", str(file))
    assert done.returncode == 0, done.stderr
    return file, json.loads(file.read_text("utf-8"))


def chain_of(receipt: dict[str, Any], rows: np.ndarray, tokens: list[int]) -> list[str]:
    text = json.dumps({key: receipt[key] for key in HEADER}, sort_keys=True, separators=(",", ":"))
    links = [hashlib.sha256(text.encode("ascii")).digest()]
    for row, token in zip(rows, tokens, strict=True):
        links.append(hashlib.sha256(links[-1] + row.astype("<f4").tobytes() + struct.pack("<q", token)).digest())
    return [link.hex() for link in links]


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A receipt of the cpu backend."""
    folder = tmp_path_factory.mktemp("receipt")
    options = ("--max-new-tokens", "6", "--temperature", "0.9", "--top-k", "40", "--top-p", "0.95", "--seed", "3")
    return made(folder, "generate", "The old man", "--scheme", "int8-static", "--backend", "cpu", *options)[0]


def test_a_receipt_of_generate_says_what_was_computed(generated: Path) -> None:
    receipt = json.loads(generated.read_text("utf-8"))
    assert list(receipt) == [*HEADER, "tokens", "chain", "about"]
    assert receipt["sampling"] == {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 3}
    assert all(type(token) is int for token in receipt["prompt_tokens"] + receipt["tokens"])
    assert len(receipt["tokens"]) == 6
    assert len(receipt["chain"]) == 7
    assert receipt["scheme"]["inputs"]["in_proj"] == {"bits": 8, "scale": "static"}
    assert receipt["about"] == {"model": "small", "backend": "cpu", "device": "cpu"}


def test_the_chain_of_generate_is_that_of_the_documented_formula(generated: Path, tmp_path: Path) -> None:
    receipt = json.loads(generated.read_text("utf-8"))
    whole, out = receipt["prompt_tokens"] + receipt["tokens"], tmp_path / "logits.npy"
    text = ",".join(map(str, whole))
    assert run("logits", "--tokens", text, "--scheme", "int8-static", "--out", str(out)).returncode == 0
    rows = np.load(out)[len(receipt["prompt_tokens"]) - 1 : -1]
    assert receipt["chain"] == chain_of(receipt, rows, receipt["tokens"])


@pytest.mark.parametrize("backend", ["cpu", "reference", "torch"])
def test_a_receipt_of_the_cpu_backend_is_the_same_on_every_backend(generated: Path, backend: str) -> None:
    done = run("replay", str(generated), "--backend", backend)
    assert done.returncode == 0, done.stderr
    last = json.loads(generated.read_text("utf-8"))["chain"][-1]
    assert done.stdout == f"the same: 6 tokens, small under int8-static on {backend}, chain {last}\n"


def test_a_receipt_of_logits_binds_every_position(tmp_path: Path) -> None:
    out = tmp_path / "logits.npy"
    options = ("--tokens", "5,6,7", "--scheme", "w8a8-all", "--out", str(out))
    file, receipt = made(tmp_path, "logits", *options)
    assert receipt["tokens"] == []
    assert receipt["sampling"] is receipt["n_ids"] is None
    assert receipt["chain"] == chain_of(receipt, np.load(out), [5, 6, 7])
    assert run("replay", str(file), "--backend", "reference").returncode == 0


@pytest.mark.parametrize("entry", ["chain", "tokens"])
@pytest.mark.parametrize("index", [1, 4])
def test_one_changed_entry_names_its_token(generated: Path, tmp_path: Path, entry: str, index: int) -> None:
    receipt = json.loads(generated.read_text("utf-8"))
    if entry == "chain":
        receipt["chain"][index] = "0" * 64
    else:
        receipt["tokens"][index - 1] += 1
    file = tmp_path / "changed.json"
    file.write_text(json.dumps(receipt), "utf-8")
    done = run("replay", str(file), "--backend", "reference")
    assert done.returncode == 1
    assert done.stdout.startswith(f"differs at token {index} of 6: tokens[{index - 1}] is ")
    told = json.loads(run("replay", str(file), "--json").stdout)
    assert told["same"] is False
    assert told["first_difference"]["number"] == index


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt_tokens": [1, 2]}, "chain[0] is not the hash"),
        ({"sampling": {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 4}}, "chain[0] is not the hash"),
        ({"spec_version": "0.9"}, "specification '0.9'"),
        ({"format": 2}, "format 2"),
        ({"more": 1}, "no entry more"),
        ({"chain": ["0" * 64]}, "1 hashes"),
        ({"chain": ["A" * 64]}, "chain is not"),
        ({"tokens": [True] * 6}, "tokens is not"),
        ({"tokens": [2**63] * 6}, "tokens is not"),
        ({"tokens": [2**70] * 6}, "more than 19 digits"),
        ({"n_ids": 0}, "n_ids is not"),
        ({"command": "judge"}, "command is not"),
        ({"scheme": {"name": "x", "weights": {"nothing": {"bits": 8, "scale": "static"}}}}, "nothing"),
        ({"about": []}, "about is not"),
    ],
)
def test_a_receipt_that_no_run_has_made_is_one_line_and_status_2(
    generated: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    file = tmp_path / "wrong.json"
    file.write_text(json.dumps(json.loads(generated.read_text("utf-8")) | change), "utf-8")
    done = run("replay", str(file))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


@pytest.mark.parametrize("text", ["", "[]", "[" * 100000, "{}", '{"format": 1}'])
def test_what_is_no_receipt_is_one_line_and_status_2(tmp_path: Path, text: str) -> None:
    file = tmp_path / "wrong.json"
    file.write_text(text, "utf-8")
    done = run("replay", str(file))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert run("replay", str(tmp_path / "nowhere.json")).returncode == 2


def test_a_seed_that_could_not_be_read_again_is_refused() -> None:
    session, prompt = open_session(ModelChoice("small", "fp32")), np.array([1])
    Recorder(session, prompt, Sampler(seed=2**63 - 1))
    with pytest.raises(DataError, match="up to 9223372036854775807"):
        Recorder(session, prompt, Sampler(seed=2**63))


def test_another_model_and_another_calibration_are_told(generated: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(resolve_model("small").folder, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-6}), "utf-8")
    done = run("replay", str(generated), "--model", str(folder))
    assert done.returncode == 2
    assert "not the receipt's model" in done.stderr
    text = tmp_path / "other.txt"
    text.write_text("Another text gives other scales. " * 20, "utf-8")
    done = run("replay", str(generated), "--calibrate", str(text))
    assert done.returncode == 2
    assert "--calibrate" in done.stderr.splitlines()[-1]


def test_a_receipt_finds_its_calibration_and_the_saved_model_is_the_same(tmp_path: Path) -> None:
    text, folder = tmp_path / "mine.txt", tmp_path / "saved"
    text.write_text("The wolf went down to the river, and the fox went after him. " * 8, "utf-8")
    options = ("--scheme", "int8-smooth", "--calibrate", str(text), "--percentile", "0.99")
    file, receipt = made(tmp_path, "generate", "She", "--max-new-tokens", "3", *options)
    assert (receipt["about"]["calibrate"], receipt["about"]["percentile"]) == (str(text), 0.99)
    assert run("replay", str(file), "--backend", "reference").returncode == 0
    assert run("quantize", "small", str(folder), *options).returncode == 0
    assert run("replay", str(file), "--model", str(folder)).returncode == 0
    text.unlink()
    assert run("replay", str(file)).returncode == 2
    assert run("replay", str(file), "--model", str(folder), "--backend", "torch").returncode == 0


def test_tokens_as_numbers_need_no_tokenizer(tmp_path: Path) -> None:
    folder, out = tmp_path / "bare", tmp_path / "logits.npy"
    shutil.copytree(resolve_model("small").folder, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    file, _ = made(tmp_path, "logits", "--model", str(folder), "--tokens", "1,2", "--scheme", "int8", "--out", str(out))
    assert run("replay", str(file), "--backend", "reference").returncode == 0
    done = run("generate", "--model", str(folder))
    assert done.returncode == 2
    assert "tokenizer.json" in done.stderr


def test_a_replay_of_generate_needs_no_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    file, _ = made(tmp_path, "generate", "--scheme", "int8", "--max-new-tokens", "2")
    shutil.copytree(resolve_model("small").folder, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    assert run("replay", str(file), "--model", str(folder)).returncode == 0


def test_the_receipt_s_file_ends_in_json(tmp_path: Path) -> None:
    done = run("generate", "--receipt", str(tmp_path / "receipt.txt"))
    assert done.returncode == 2
    assert "receipt.txt" in done.stderr
    assert list(tmp_path.iterdir()) == []
