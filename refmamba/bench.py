"""`refmamba bench`: how fast a model runs here, beside what the machine's memory allows."""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np

from refmamba.arith import IntArray
from refmamba.backend import Runner
from refmamba.errors import DataError
from refmamba.model import QuantizedModel
from refmamba.options import model_options
from refmamba.peers import LLAMA_TYPES, LlamaCpp, Peer, Transformers, installed, write_gguf
from refmamba.quantize import Codes, FixedPoint
from refmamba.scheme import LINEAR_LAYERS

REPEATS = 3  # the fastest counts: what else ran on the machine only ever slows
READ_BYTES = 512 * 2**20
WARM_UP = 4  # tokens decoded before the clock starts


def weight_bytes(model: QuantizedModel) -> int:
    """Bytes of codes that one token reads: every matrix of a product, two codes a byte up to 4 bits, 3 bytes unquantized."""

    def size(name: str) -> int:
        w = model.params[name]
        if isinstance(w, FixedPoint):
            return 3 * w.q.size
        assert isinstance(w, Codes)
        return int(w.q.size) if w.bits > 4 else len(w.q) * ((w.q.shape[1] + 1) // 2)

    layers = [f"layers.{i}.{layer}.weight" for i in range(model.config.n_layer) for layer in LINEAR_LAYERS]
    return sum(map(size, [*layers, "lm_head.weight"]))


def read_bandwidth(threads: int) -> float:
    """Bytes a second of an int64 sum over 512 MB, all threads, the fastest of a few."""
    data = np.ones(READ_BYTES // 8, np.int64)
    parts = np.array_split(data, 4 * threads)
    with ThreadPoolExecutor(threads) as pool:
        return READ_BYTES / min(seconds(lambda: list(pool.map(np.sum, parts))) for _ in range(REPEATS))


def peak_rss() -> int:
    """The largest resident size of this process so far, in bytes; 0 where the system does not tell (Windows)."""
    if sys.platform == "linux":  # where getrusage begins with what the parent had
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def seconds(work: Callable[..., Any], *arguments: Any) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


class Ours:
    """A Runner as something that can be timed."""

    def __init__(self, runner: Runner, name: str) -> None:
        self.name, self._runner, self._state = name, runner, runner.initial_state(1)

    def prefill(self, tokens: IntArray) -> None:
        """See Peer."""
        _, self._state = self._runner.prefill([tokens])

    def decode(self, tokens: IntArray) -> None:
        """See Peer."""
        for token in tokens:
            _, self._state = self._runner.step(np.array([token]), self._state)


def speeds(peers: list[Peer], prompt: IntArray, generated: IntArray, repeats: int = REPEATS) -> list[dict[str, Any]]:
    """Tokens a second of each, one after the other in every round, so that a slow moment of the machine hits all alike."""
    best = [{"prefill": float("inf"), "decode": float("inf")} for _ in peers]
    for _ in range(repeats):
        for peer, times in zip(peers, best, strict=True):
            times["prefill"] = min(times["prefill"], seconds(peer.prefill, prompt))
            peer.decode(generated[:WARM_UP])
            times["decode"] = min(times["decode"], seconds(peer.decode, generated))
    return [
        {"name": peer.name, "prefill_tokens_per_second": len(prompt) / times["prefill"],
         "decode_tokens_per_second": len(generated) / times["decode"]}
        for peer, times in zip(peers, best, strict=True)
    ]  # fmt: skip


def other_programs(folder: Path, scratch: Path, threads: int) -> list[Peer]:
    """What is installed of transformers and llama.cpp, with the same weights. Raises DataError for a quantized folder."""
    from refmamba.checkpoint import open_checkpoint

    source = open_checkpoint(folder)
    if isinstance(source, QuantizedModel):
        raise DataError(f"{folder}: --compare needs the model's own weights, and these are codes")
    peers: list[Peer] = [Transformers(source, threads)] if installed("transformers") and installed("torch") else []
    if installed("llama_cpp") and installed("gguf"):
        for kind in LLAMA_TYPES:
            file = scratch / f"{kind}.gguf"
            write_gguf(source, file, kind)
            peers.append(LlamaCpp(file, kind, threads))
    return peers


@click.command()
@model_options
@click.option("--prompt-len", default=512, show_default=True, type=click.IntRange(1), help="Tokens of the prefill.")
@click.option("--gen-len", default=64, show_default=True, type=click.IntRange(1), help="Tokens of the decode.")
@click.option("--compare", is_flag=True, help="Also transformers and llama.cpp (llama-cpp-python, gguf), if installed.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the lines.")
def bench(choose: Callable[[], Any], prompt_len: int, gen_len: int, compare: bool, as_json: bool) -> None:
    """Measure tokens a second, memory, and the machine's read bandwidth."""
    import numba

    numba_config: Any = numba.config
    loaded = choose()
    runner, config, threads = loaded.runner, loaded.runner.config, int(numba_config.NUMBA_NUM_THREADS)
    rng = np.random.default_rng(0)
    prompt, generated = rng.integers(0, config.vocab_size, prompt_len), rng.integers(0, config.vocab_size, gen_len)
    ours: Peer = Ours(runner, loaded.describe()["scheme"])
    # Ours alone first, before another program's memory counts.
    speeds([ours], prompt[:16], generated[:4], repeats=1)
    (result,) = speeds([ours], prompt, generated)
    peak = peak_rss()
    others: list[dict[str, Any]] = []
    if compare:
        with tempfile.TemporaryDirectory() as scratch:
            peers = other_programs(loaded.files.folder, Path(scratch), threads)
            result, *others = speeds([ours, *peers], prompt, generated)
    result |= loaded.describe() | {
        "weight_bytes": weight_bytes(runner.model), "peak_rss_bytes": peak, "threads": threads,
        "read_bandwidth_bytes_per_second": read_bandwidth(threads), "prompt_len": prompt_len, "gen_len": gen_len,
    }  # fmt: skip
    if as_json:
        click.echo(json.dumps(result | ({"compare": others} if compare else {})))
        return
    for line in [result, *others]:
        click.echo(
            f"{line['name']:<24} prefill {line['prefill_tokens_per_second']:8.1f} tokens/s"
            f"   decode {line['decode_tokens_per_second']:7.1f} tokens/s"
        )
    click.echo(f"weights {result['weight_bytes'] / 1e6:.1f} MB, peak memory {peak / 1e6:.0f} MB, "
               f"memory reads {result['read_bandwidth_bytes_per_second'] / 1e9:.1f} GB/s, {threads} threads")  # fmt: skip
