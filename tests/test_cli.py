"""The command line as a user meets it: real processes, whole outputs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import forks
import numpy as np
import pytest


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    if not env:
        return forks.run(args)
    command = [sys.executable, "-m", "refmamba", *args]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=os.environ | env, check=False)


def generated(*args: str, **env: str) -> dict[str, object]:
    done = run("generate", "--json", "--max-new-tokens", "6", *args, **env)
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout)
    return result


def test_generate_needs_no_arguments_and_prints_prompt_and_text() -> None:
    done = run("generate", "--max-new-tokens", "5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time")
    assert len(done.stdout) > len("Once upon a time\n")


def test_generate_twice_gives_the_same_tokens_and_logits() -> None:
    first, second = generated("--bits", "8"), generated("--bits", "8")
    for key in ("tokens", "logits_sha256", "text"):
        assert first[key] == second[key]
    assert {"prompt", "model", "scheme", "backend", "timings"} <= first.keys()


SCHEMES = ["fp32", "w8-all", "w4-mlp", "w8a8-mlp", "w8a8-all", "int8", "int8-static", "int8-smooth"]
EACH_SCHEME = """
import sys
from refmamba.commands.main import refmamba
for scheme in sys.argv[2:]:
    words = ["generate", "--json", "--max-new-tokens", "6", "--scheme", scheme, "--backend", sys.argv[1]]
    refmamba.main(words, standalone_mode=False)
"""


def test_every_backend_gives_the_same_logits_with_and_without_jit() -> None:
    def under_each(backend: str, **env: str) -> list[tuple[object, object]]:
        command = [sys.executable, "-c", EACH_SCHEME, backend, *SCHEMES]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env, check=True)
        results = [json.loads(line) for line in done.stdout.splitlines()]
        assert [result["scheme"] for result in results] == SCHEMES
        return [(result["logits_sha256"], result["tokens"]) for result in results]

    reference = under_each("reference")
    assert len({logits for logits, _ in reference}) == len(SCHEMES)
    assert under_each("reference", NUMBA_DISABLE_JIT="1") == reference
    for name in ("cpu", "torch"):
        assert under_each(name) == reference


def test_a_seed_repeats_its_sample_and_another_differs() -> None:
    options = ("--temperature", "1", "--top-k", "50", "--top-p", "0.95")
    same = [generated(*options, "--seed", "1")["tokens"] for _ in range(2)]
    assert same[0] == same[1]
    assert generated(*options, "--seed", "2")["tokens"] != same[0]


@pytest.mark.parametrize("prompt", ["", " ", "naïve 中文 🙂\u200d🙂", "a\nb\t\u0000", "<|endoftext|>"])
def test_any_prompt_is_continued(prompt: str) -> None:
    if "\0" in prompt:
        prompt = prompt.replace("\0", "")  # no argument of a process can hold it
    assert generated("--", prompt)["prompt"] == prompt


def test_logits_are_written_for_every_position(tmp_path: Path) -> None:
    out = tmp_path / "logits.npy"
    assert run("logits", "--tokens", "1,2,3", "--out", str(out)).returncode == 0
    values = np.load(out)
    assert values.dtype == np.float32
    assert values.shape[0] == 3
    assert sorted(tmp_path.iterdir()) == [out]


def test_a_quantized_folder_gives_the_bits_of_its_scheme(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    assert run("quantize", "small", str(folder), "--scheme", "w4-all").returncode == 0
    saved, direct = generated("--model", str(folder)), generated("--scheme", "w4-all")
    assert saved["logits_sha256"] == direct["logits_sha256"]
    assert saved["scheme"] == "w4-all"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["generate", "--bits", "9"], "2 to 8 bits"),
        (["generate", "--bits", "8", "--act-bits", "40"], "2 to 16 bits"),
        (["generate", "--act-bits", "8"], "--act-bits needs --bits"),
        (["generate", "--bits", "8", "--scheme", "fp32"], "leave out --bits"),
        (["generate", "--scheme", "w9-all"], "9 bits"),
        (["generate", "--scheme", "nonsense"], "unknown scheme 'nonsense'"),
        (["generate", "--model", "nowhere"], "nowhere"),
        (["generate", "--backend", "nonsense"], "unknown backend 'nonsense'"),
        (["generate", "--backend", "reference", "--device", "cuda"], "'cuda'"),
        (["generate", "--scheme", "int8-static", "--calibrate", "missing.txt"], "missing.txt"),
        (["logits", "--out", "x.npy"], "either --text or --tokens"),
        (["logits", "--tokens", "1,x", "--out", "x.npy"], "1,x"),
        (["logits", "--tokens", "1,999999", "--out", "x.npy"], "999999"),
        (["logits", "--tokens", "1", "--out", "no/such/folder/x.npy"], "no/such/folder"),
    ],
)
def test_wrong_input_is_one_clear_line_and_status_2(args: list[str], words: str) -> None:
    done = run(*args)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert len([line for line in done.stderr.splitlines() if line.startswith("refmamba:")]) == 1


def test_another_scheme_than_the_saved_one_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    assert run("quantize", "small", str(folder), "--scheme", "w8-all").returncode == 0
    done = run("generate", "--model", str(folder), "--scheme", "w4-all")
    assert done.returncode == 2
    assert "w8-all" in done.stderr
