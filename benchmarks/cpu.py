"""refmamba beside transformers and llama.cpp on a CPU: `python benchmarks/cpu.py` writes benchmarks/results/cpu.{json,md,png}.

Models of the 130m and 370m shapes with random weights. A peer that is not installed is left out. Every contender has a process
of its own, so that its memory is its own; they take turns in every round, so that a slow moment of the machine hits all alike;
the fastest round counts.
"""

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from refmamba.formats.writing import write_text
from refmamba.run.peers import LLAMA_TYPES, LlamaCpp, Peer, Transformers, installed, write_for_llama_cpp
from refmamba.run.timing import Ours, peak_rss, read_bandwidth, seconds, weight_bytes
from refmamba.spec.arith import F32Array
from refmamba.spec.config import MambaConfig

SHAPES = {"130m": MambaConfig(768, 24, 50280), "370m": MambaConfig(1024, 48, 50280)}
OLDER = " without VNNI"  # the same kernels, compiled for a processor of 2013 with AVX2
OUR_SCHEMES = ("int8", "w8-all", "w4-all", "w8a8-all", "int4", "int4-all", "fp32", "int8" + OLDER, "int4" + OLDER,
               "int4-all" + OLDER)  # fmt: skip
HASWELL = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+popcnt"}
PEERS = [*(["transformers"] if installed("transformers") else []),
         *(LLAMA_TYPES if installed("gguf") and installed("llama_cpp") else [])]  # fmt: skip
ROUNDS, WARM_UP = 4, 4
RESULTS = Path(__file__).resolve().parent / "results"


class RandomSource:
    """A checkpoint of random weights, the same in every process."""

    def __init__(self, config: MambaConfig) -> None:
        self.config = config

    def read(self, name: str) -> F32Array:
        """One tensor, float32."""
        shape, rng = self.config.shapes()[name], np.random.default_rng(zlib.crc32(name.encode()))
        if name.endswith("A_log"):
            return np.log(np.tile(np.arange(1, shape[1] + 1, dtype=np.float32), (shape[0], 1)))
        if name.endswith(("norm.weight", "norm_f.weight", ".D")):
            return np.ones(shape, np.float32)
        if name.endswith("dt_proj.bias"):
            return rng.uniform(-6, -2, shape).astype(np.float32)
        return rng.standard_normal(shape, np.float32) * np.float32(0.05)


def contender(name: str, config: MambaConfig, folder: Path, threads: int) -> tuple[Peer, int]:
    """One of OUR_SCHEMES or PEERS, loaded, and the bytes of its weights that a token reads."""
    source = RandomSource(config)
    if name == "transformers":
        return Transformers(source, threads), 4 * sum(int(np.prod(s)) for s in config.shapes().values())
    if name in LLAMA_TYPES:
        file = folder / f"{name}.gguf"
        return LlamaCpp(file, name, threads), file.stat().st_size
    from refmamba.backends.cpu.backend import Cpu
    from refmamba.spec.parameters import quantize_model
    from refmamba.spec.scheme import parse_scheme

    runner = Cpu().load(quantize_model(source, parse_scheme(name.removesuffix(OLDER))))
    return Ours(runner, f"refmamba {name}"), weight_bytes(runner.model)


def work(name: str, shape: str, folder: Path, threads: int, prompt_len: int, gen_len: int) -> None:
    """A contender's process: a line of JSON for each line of stdin."""
    config = SHAPES[shape]
    rng = np.random.default_rng(0)
    prompt, tokens = rng.integers(0, config.vocab_size, prompt_len), rng.integers(0, config.vocab_size, gen_len)
    peer, size = contender(name, config, folder, threads)
    peer.prefill(prompt[:16])
    peer.decode(tokens[:WARM_UP])
    if sys.platform == "linux":  # from here on the peak is that of running: making random weights takes more
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    print(json.dumps({"name": peer.name, "weight_bytes": size}), flush=True)
    for _ in sys.stdin:
        prefill = prompt_len / seconds(peer.prefill, prompt)
        peer.decode(tokens[:WARM_UP])
        decode = gen_len / seconds(peer.decode, tokens)
        print(json.dumps({"prefill": prefill, "decode": decode, "peak_rss_bytes": peak_rss()}), flush=True)


def measure(shape: str, threads: int, prompt_len: int, gen_len: int, names: list[str]) -> list[dict[str, Any]]:
    """All contenders on one shape, in turns."""
    with tempfile.TemporaryDirectory() as scratch:
        for kind in [n for n in names if n in LLAMA_TYPES]:
            write_for_llama_cpp(RandomSource(SHAPES[shape]), Path(scratch) / f"{kind}.gguf", kind)
        environment = os.environ | {"NUMBA_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
        arguments = ["--folder", scratch, "--threads", str(threads), "--prompt-len", str(prompt_len), "--gen-len", str(gen_len)]
        processes, results = [], []
        for name in names:
            command = [sys.executable, __file__, "--worker", name, "--shapes", shape, *arguments]
            variables = environment | (HASWELL if name.endswith(OLDER) else {})
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables)
            assert process.stdin
            assert process.stdout
            ready = process.stdout.readline()
            if not ready:
                print(f"{shape}: {name} ended with status {process.wait()} and is left out", file=sys.stderr)
                continue
            processes.append(process)
            results.append(json.loads(ready) | {"prefill": 0.0, "decode": 0.0})
            print(f"{shape}: {results[-1]['name']} is ready", file=sys.stderr)
        for _ in range(ROUNDS):
            for process, result in zip(processes, results, strict=True):
                assert process.stdin
                assert process.stdout
                line = ""
                if process.poll() is None:
                    process.stdin.write("\n")
                    process.stdin.flush()
                    line = process.stdout.readline()
                if not line:  # a contender that did not finish is left out below
                    result["prefill"] = float("nan")
                    continue
                measured = json.loads(line)
                result.update({k: max(measured[k], result[k]) for k in ("prefill", "decode")})
                result["peak_rss_bytes"] = measured["peak_rss_bytes"]
        for process in processes:
            process.communicate()
    return [result for result in results if not math.isnan(result["prefill"])]


def machine() -> str:
    """The processor and the versions of the programs, for the table's head."""
    cpu = platform.processor() or platform.machine()
    if sys.platform == "linux":
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        flags = info.split("flags")[1].splitlines()[0].split()
        cpu = info.split("model name")[1].splitlines()[0].strip("\t :")
        cpu += f" ({', '.join(f for f in ('avx2', 'avx512f', 'avx512_vnni', 'amx_int8') if f in flags)})"
    versions = []
    for package in ("numba", "torch", "transformers", "llama_cpp_python", "lm_eval"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    return f"{cpu}; {', '.join(versions)}"


def save(name: str, text: str) -> None:
    """Write a table to RESULTS, and print it."""
    RESULTS.mkdir(exist_ok=True)
    write_text(RESULTS / name, text)
    print(text)


def bits_per_byte(names: list[str]) -> dict[str, float]:
    """Bits per byte of the small model on the passage, both inside the package: what each scheme pays for its speed."""
    from refmamba.run.session import ModelChoice, open_session
    from refmamba.spec.calibrate import passage
    from refmamba.spec.ops import log_softmax

    text, result = passage(), {}
    for name in names:
        session = open_session(ModelChoice(scheme=name.removesuffix(OLDER)))
        ids = session.tokenizer.encode_array(text)
        (logits,), _ = session.runner.prefill([ids[:-1]], logits="all")
        chosen = log_softmax(logits)[np.arange(len(ids) - 1), ids[1:]]
        size = len(session.tokenizer.decode(ids[1:].tolist()).encode())
        result[f"refmamba {name}"] = float(-np.sum(chosen, dtype=np.float64) / np.log(2) / size)
    return result


def table(shape: str, results: list[dict[str, Any]], bandwidth: float, quality: dict[str, float]) -> str:
    """A Markdown table of one shape."""
    columns = ("", "prefill, tokens/s", "decode, tokens/s", "weights, MB", "share of read bandwidth",
               "memory while running, MB", "bits per byte (small model)")  # fmt: skip
    lines = [f"### {shape}", "", f"| {' | '.join(columns)} |", "| --- |" + " ---: |" * (len(columns) - 1)]
    for r in results:
        share = r["decode"] * r["weight_bytes"] / bandwidth
        bits = f"{quality[r['name']]:.3f}" if r["name"] in quality else ""
        lines.append(f"| {r['name']} | {r['prefill']:.0f} | {r['decode']:.1f} | {r['weight_bytes'] / 1e6:.0f} | {share:.0%} "
                     f"| {r['peak_rss_bytes'] / 1e6:.0f} | {bits} |")  # fmt: skip
    return "\n".join([*lines, ""])


def plot(shapes: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Bars of prefill and decode for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(shapes), 2, figsize=(10, 3.6 * len(shapes)), squeeze=False, layout="constrained")
    for row, (shape, results) in zip(axes, shapes.items(), strict=True):
        for axis, what in zip(row, ("prefill", "decode"), strict=True):
            ordered = sorted(results, key=lambda r: float(r[what]))
            colors = ["#c2410c" if r["name"].startswith("refmamba") else "#94a3b8" for r in ordered]
            bars = axis.barh([r["name"] for r in ordered], [r[what] for r in ordered], color=colors)
            axis.bar_label(bars, fmt="%.0f", padding=3)
            axis.set_title(f"{shape}: {what}, tokens a second")
            axis.spines[["top", "right"]].set_visible(False)
            axis.margins(x=0.12)
    figure.savefig(file, dpi=130)


def main() -> None:
    """The whole comparison, or with --worker one contender's process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--names", nargs="+", default=[*OUR_SCHEMES, *PEERS], help="contenders: our schemes, and peers")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--gen-len", type=int, default=64)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.shapes[0], options.folder, options.threads, options.prompt_len, options.gen_len)
        return
    bandwidth = read_bandwidth(options.threads)
    quality = bits_per_byte([n for n in options.names if n not in PEERS])
    shapes = {s: measure(s, options.threads, options.prompt_len, options.gen_len, options.names) for s in options.shapes}
    # The faster of two reads: a sum over memory, and our own matrix-vector products.
    refmambas = [r for results in shapes.values() for r in results if r["name"].startswith("refmamba")]
    bandwidth = max([bandwidth, *(r["decode"] * r["weight_bytes"] for r in refmambas)])
    head = (f"{options.threads} threads, prefill of {options.prompt_len} tokens, decode of {options.gen_len}; memory reads "
            f"{bandwidth / 1e9:.1f} GB/s; {time.strftime('%Y-%m-%d')}. {machine()}.\n\n")  # fmt: skip
    text = head + "\n".join(table(s, results, bandwidth, quality) for s, results in shapes.items())
    values = {"machine": machine(), "threads": options.threads, "prompt_len": options.prompt_len, "gen_len": options.gen_len,
              "read_bandwidth_bytes_per_second": bandwidth, "bits_per_byte": quality, "shapes": shapes}  # fmt: skip
    save("cpu.md", text)
    write_text(RESULTS / "cpu.json", json.dumps(values, indent=1) + "\n")
    plot(shapes, RESULTS / "cpu.png")


if __name__ == "__main__":
    main()
