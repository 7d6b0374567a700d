"""Cost over sequences: `python benchmarks/batch.py` writes benchmarks/results/batch.md.

A step of many sequences reads the weights once. Time of a step of 1 to 32 sequences, as `refmamba generate --batch` makes it,
at the 130m shape with random weights on the cpu backend, all numbers of sequences in turn.
"""

import argparse
import itertools
import time

import numpy as np
from cpu import SHAPES, RandomSource, save

from refmamba.backends.cpu.backend import Cpu
from refmamba.run.generate import Chooser, Sampler, choose_tokens
from refmamba.spec.parameters import quantize_model
from refmamba.spec.scheme import parse_scheme

SEQUENCES = (1, 2, 4, 8, 16, 32)
SCHEMES = ("int8", "int4")
ROUNDS, STEPS = 8, 20
PROMPT = 8  # tokens


def main() -> None:
    """Measure, and write a table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    config, rng = SHAPES["130m"], np.random.default_rng(0)
    backend = Cpu()
    lines = ["| scheme | sequences | ms a step | times that of one | tokens/s |", "| --- | ---: | ---: | ---: | ---: |"]
    for scheme in SCHEMES:
        runner = backend.load(quantize_model(RandomSource(config), parse_scheme(scheme)))
        times: dict[int, list[float]] = {count: [] for count in SEQUENCES}
        for _, count in itertools.product(range(ROUNDS), SEQUENCES):
            rows, state = runner.prefill(list(rng.integers(0, config.vocab_size, (count, PROMPT))))
            choosers = [Chooser(Sampler(), config.vocab_size) for _ in range(count)]
            steps = choose_tokens(runner, [row[-1] for row in rows], state, choosers)
            next(steps)  # chosen from the prompt alone
            for _ in range(STEPS):
                start = time.perf_counter()
                next(steps)
                times[count].append(time.perf_counter() - start)
        medians = {count: float(np.median(times[count])) for count in SEQUENCES}
        for count, median in medians.items():
            ratio = median / medians[1]
            lines.append(f"| {scheme} | {count} | {1e3 * median:.2f} | {ratio:.2f} | {count / median:.0f} |")
    save("batch.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
