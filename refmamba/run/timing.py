"""`refmamba bench`: how fast a model runs here, beside what the machine's memory allows."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil

from refmamba.backend import Runner, load_backend
from refmamba.backends import DEFAULT_BACKEND
from refmamba.run.peers import LLAMA_TYPES, Apart, LlamaCpp, Peer, Transformers, installed, write_for_llama_cpp
from refmamba.run.progress import bar, say
from refmamba.run.session import ModelChoice, open_model
from refmamba.spec.arith import IntArray
from refmamba.spec.coders import ParameterGrouped
from refmamba.spec.config import ParameterSource, kind_of
from refmamba.spec.parameters import QuantizedModel, linear_sites, parameter_coder

REPEATS = 3  # the fastest counts: what else ran on the machine only ever slows
READ_BYTES, READS = 512 * 2**20, 8  # the first of which may compile
WARM_UP = 4  # tokens decoded before the clock starts


def weight_bytes(model: QuantizedModel) -> int:
    """Bytes of codes that one token reads: every matrix of a product, two codes a byte up to 4 bits, 3 bytes unquantized."""
    config, total = model.config, 0
    for site in linear_sites(config):
        shared = site == "lm_head" and config.tie_embeddings
        rows, columns = config.shapes()["embedding.weight" if shared else f"{site}.weight"]
        coder = parameter_coder(
            "embedding.weight" if model.shares_codes and shared else kind_of(f"{site}.weight"), model.scheme
        )
        assert coder is not None
        total += rows * ((columns + 1) // 2 if coder.bits <= 4 else columns * -(-coder.bits // 8))
        if isinstance(coder, ParameterGrouped):
            total += math.prod(coder.steps_shape((rows, columns)))
    return total


def read_bandwidth(threads: int) -> float:
    """Bytes a second of reading 512 MB as the cpu backend's kernels read weights, all threads, the fastest of a few."""
    read: Callable[[], None] = cast(Any, load_backend(DEFAULT_BACKEND)).reader(READ_BYTES, threads)
    return READ_BYTES / min(seconds(read) for _ in range(READS))


def peak_rss() -> int:
    """The largest resident size of this process so far, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":  # for which psutil has no peak, and where getrusage begins with what the parent had
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
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


def _seconds(peer: Ours | Apart, method: str, tokens: IntArray) -> float:
    return peer.seconds(method, tokens) if isinstance(peer, Apart) else seconds(getattr(peer, method), tokens)


def speeds(
    peers: Sequence[Ours | Apart], prompt: IntArray, generated: IntArray, repeats: int = REPEATS
) -> list[dict[str, Any]]:
    """Tokens a second of each, one after the other in every round, so that a slow moment of the machine hits all alike.

    A peer that fails, or whose process dies, is left out, with a line on stderr.
    """
    best = {peer: {"prefill": float("inf"), "decode": float("inf")} for peer in peers}
    with bar(repeats * len(peers), "measuring", "run") as measured:
        for peer in [peer for _ in range(repeats) for peer in peers]:
            measured.update()
            if peer not in best:
                continue
            times = best[peer]
            try:
                times["prefill"] = min(times["prefill"], _seconds(peer, "prefill", prompt))
                _seconds(peer, "decode", generated[:WARM_UP])
                times["decode"] = min(times["decode"], _seconds(peer, "decode", generated))
            except Exception as error:  # whatever another program raises
                if not isinstance(peer, Apart):
                    raise
                why = str(error).strip().splitlines() or [type(error).__name__]
                say(f"{peer.name} is left out: {why[0]}", error=True)
                del best[peer]
    return [
        {"name": peer.name, "prefill_tokens_per_second": len(prompt) / times["prefill"],
         "decode_tokens_per_second": len(generated) / times["decode"]}
        for peer, times in best.items()
    ]  # fmt: skip


def float_weights(folder: Path) -> ParameterSource:
    """A folder's own weights, in a process of another program."""
    return open_model(ModelChoice(str(folder))).float_checkpoint()


def transformers_of(folder: Path, threads: int) -> Peer:
    """transformers with a folder's weights."""
    return Transformers(float_weights(folder), threads)


def llama_cpp_of(folder: Path, file: Path, kind: str, threads: int) -> Peer:
    """llama.cpp with a folder's weights, through a file that is written first."""
    write_for_llama_cpp(float_weights(folder), file, kind)
    return LlamaCpp(file, kind, threads)


def other_programs(folder: Path, scratch: Path, threads: int) -> list[Apart]:
    """What is installed of transformers and llama.cpp, with the weights of a folder that holds a float checkpoint."""
    peers = []
    if installed("transformers") and installed("torch"):
        peers.append(Apart(Transformers.name, transformers_of, folder, threads))
    if installed("llama_cpp") and installed("gguf"):
        for kind in LLAMA_TYPES:
            (scratch / kind).mkdir()  # they are written at the same time
            file = scratch / kind / "model.gguf"
            peers.append(Apart(f"llama.cpp {kind}", llama_cpp_of, folder, file, kind, threads))
    return peers
