"""Text generation: one call for the prompt, then one for each token."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from refmamba.backend import Runner
from refmamba.spec.arith import IntArray
from refmamba.spec.ops import sample


@dataclass(frozen=True)
class Sampler:
    """How a token is chosen from logits, eq. (26). temperature 0 takes the largest; top_k 0 and top_p 1 keep all."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def stream(self) -> Callable[[], float]:
        """The uniform draws of the seed: PCG64, one for each token."""
        return np.random.Generator(np.random.PCG64(self.seed)).random


class LogitsHash:
    """SHA-256 of the float32 little-endian logits from which each token was chosen, in order, padding rows included."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def update(self, logits: "np.ndarray[tuple[int, ...], np.dtype[np.float32]]") -> None:
        """Add the logits (vocabulary,) of one token."""
        self._sha.update(np.ascontiguousarray(logits, "<f4").tobytes())

    def hexdigest(self) -> str:
        """The digest so far."""
        return self._sha.hexdigest()


def generate(
    runner: Runner, prompt: IntArray, sampler: Sampler, max_new_tokens: int, n_ids: int, eos: int | None,
    seen: LogitsHash,
) -> Iterator[int]:  # fmt: skip
    """New tokens, one at a time, up to max_new_tokens or the end token, which is given too.

    prompt: (L,) tokens, L >= 1. n_ids: tokens from here on are padding rows and never chosen. Every row of logits that
    a token is chosen from goes into `seen`.
    """
    draw = sampler.stream()
    rows, state = runner.prefill([prompt])
    logits = rows[0][-1]
    for remaining in range(max_new_tokens, 0, -1):
        seen.update(logits)
        uniform = draw() if sampler.temperature > 0 else 0.0
        token = sample(logits[:n_ids], uniform, sampler.temperature, sampler.top_k, sampler.top_p)
        yield token
        if token == eos or remaining == 1:
            return
        step, state = runner.step(np.array([token]), state)
        logits = step[0]
