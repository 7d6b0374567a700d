"""Cost over length: `python benchmarks/length.py` writes benchmarks/results/length.md.

A recurrent model's token costs the same whatever came before it. Decode time and resident memory at positions 10 to 20,000
of one sequence, and prefill of 512 to 32,768 tokens, at the 130m shape with random weights under int8 on the cpu backend.
"""

import argparse
import time

import numpy as np
import psutil
from cpu import SHAPES, RandomSource, save

from refmamba.backends.cpu.backend import Cpu
from refmamba.run.timing import seconds
from refmamba.spec.parameters import quantize_model
from refmamba.spec.scheme import parse_scheme

POSITIONS = (10, 100, 1000, 5000, 10000, 20000)
LENGTHS = (512, 2048, 8192, 32768)
WINDOW = 50  # tokens whose median counts


def resident() -> float:
    """MB of this process in memory."""
    return float(psutil.Process().memory_info().rss / 1e6)


def main() -> None:
    """Measure, and write two tables."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    config = SHAPES["130m"]
    runner = Cpu().load(quantize_model(RandomSource(config), parse_scheme("int8")))
    rng = np.random.default_rng(0)
    lines = ["| decode at position | ms a token (median of 50) | resident, MB |", "| ---: | ---: | ---: |"]
    tokens = rng.integers(0, config.vocab_size, POSITIONS[-1] + WINDOW + 1)
    _, state = runner.prefill([tokens[:1]])
    times = []
    for position, token in enumerate(tokens[1:], 1):
        start = time.perf_counter()
        _, state = runner.step(np.array([token]), state)
        times.append(time.perf_counter() - start)
        if position - WINDOW in POSITIONS:
            lines.append(f"| {position - WINDOW} | {1e3 * np.median(times[-WINDOW:]):.2f} | {resident():.0f} |")
    lines += ["", "| prefill of | ms a token | resident, MB |", "| ---: | ---: | ---: |"]
    for length in LENGTHS:
        prompt = rng.integers(0, config.vocab_size, length)
        best = min(seconds(runner.prefill, [prompt]) for _ in range(3))
        lines.append(f"| {length} | {1e3 * best / length:.3f} | {resident():.0f} |")
    save("length.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
