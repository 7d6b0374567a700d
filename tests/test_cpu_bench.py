"""`refmamba bench`, and the files that the other programs are given."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import TINY, RandomSource

from refmamba.backends.cpu.backend import read
from refmamba.backends.cpu.memory import aligned
from refmamba.backends.cpu.threads import Threads
from refmamba.commands.bench import command as bench
from refmamba.run.peers import Apart, LlamaCpp, write_for_llama_cpp
from refmamba.run.timing import speeds, weight_bytes
from refmamba.spec.parameters import quantize_model
from refmamba.spec.scheme import parse_scheme

ROOT = Path(__file__).resolve().parents[1]
KEYS = {"prefill_tokens_per_second", "decode_tokens_per_second", "weight_bytes", "peak_rss_bytes",
        "read_bandwidth_bytes_per_second"}  # fmt: skip


def test_bench_prints_one_json_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refmamba.run.timing.READ_BYTES", 2**20)
    result = CliRunner().invoke(bench, ["--scheme", "w4-all", "--prompt-len", "20", "--gen-len", "5", "--json"])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert set(values) > KEYS
    assert all(values[key] > 0 for key in KEYS)
    assert (values["scheme"], values["prompt_len"], values["gen_len"]) == ("w4-all", 20, 5)


def test_the_read_kernel_reads_every_byte_once() -> None:
    """Lane i of line n is 16 n + i: what is summed of all lines is known."""
    lines, threads = 1001, 3
    data, sums = aligned((lines, 16), np.int32), aligned((threads, 16), np.int32)
    data[...] = np.arange(lines * 16).reshape(lines, 16)
    read(Threads(threads), data.view(np.uint8), sums)
    np.testing.assert_array_equal(sums.sum(axis=0), 16 * (lines * (lines - 1) // 2) + lines * np.arange(16))


def test_weight_bytes_worked_out(tiny: RandomSource) -> None:
    """TINY: two layers of 96x24, 19x48, 48x3 and 24x48 weights, and a head of 50x24."""
    eight_bit = 2 * (96 * 24 + 19 * 48 + 48 * 3 + 24 * 48) + 50 * 24
    assert weight_bytes(quantize_model(tiny, parse_scheme("w8-all"))) == eight_bit
    assert weight_bytes(quantize_model(tiny, parse_scheme("fp32"))) == 3 * eight_bit
    # A row of three codes takes two bytes.
    assert weight_bytes(quantize_model(tiny, parse_scheme("w4-all"))) == (eight_bit + 2 * 48) // 2


def test_peak_memory_is_that_of_the_largest_moment() -> None:
    """400 MB that were there and are gone; a parent's peak is not counted."""
    held = np.ones(900 * 2**20 // 8)
    del held
    code = (
        "import numpy as np, psutil\nfrom refmamba.run.timing import peak_rss\nbefore = peak_rss()\n"
        "x = np.ones(400 * 2**20 // 8)\ndel x\nprint(before, peak_rss(), psutil.Process().memory_info().rss)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    before, peak, now = map(int, done.stdout.split())
    assert before < 400 * 2**20 < peak < before + 500 * 2**20
    assert now < peak - 300 * 2**20


def test_llama_cpp_runs_the_file_we_write(tmp_path: Path, tiny: RandomSource) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    write_for_llama_cpp(tiny, tmp_path / "F32.gguf", "F32")
    peer = LlamaCpp(tmp_path / "F32.gguf", "F32", 1)
    tokens = np.arange(5)
    peer.prefill(tokens)
    peer.decode(tokens)
    assert TINY.vocab_size == peer._model.n_vocab()


class Crashes:
    """A peer whose prefill ends its process."""

    name = "crashes"

    def prefill(self, tokens: np.ndarray) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def decode(self, tokens: np.ndarray) -> None:
        pass


class Sleeps:
    """A peer whose speed is known: a hundredth of a second a call."""

    name = "sleeps"

    def prefill(self, tokens: np.ndarray) -> None:
        time.sleep(0.01)

    decode = prefill


def fails() -> Sleeps:
    raise OSError("no such library")


def test_a_peer_that_fails_or_crashes_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    peers = [Apart("sleeps", Sleeps), Apart("crashes", Crashes), Apart("fails", fails)]
    (result,) = speeds(peers, np.arange(10), np.arange(5))
    crashed, failed = capsys.readouterr().err.splitlines()
    assert crashed.startswith("crashes is left out: A process in the process pool was terminated")
    assert failed == "fails is left out: no such library"
    assert result["name"] == "sleeps"
    assert 0 < result["prefill_tokens_per_second"] <= 1000
    for peer in peers:
        peer.close()
