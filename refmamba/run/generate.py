"""Text generation: one call for the prompt, then one for each token."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from numbers import Integral, Real

import numpy as np

from refmamba.backend import Runner
from refmamba.errors import DataError
from refmamba.run.session import Session
from refmamba.spec.arith import F32Array, IntArray, f32
from refmamba.spec.ops import draws, sample

LARGEST = float(np.finfo(np.float32).max)  # temperature
Look = Callable[[F32Array, int], object]  # is shown the logits (vocabulary,) of a token, and the token


@dataclass(frozen=True)
class Sampler:
    """How a token is chosen from logits, eq. (26). temperature 0 takes the largest; top_k 0 and top_p 1 keep all.

    Raises DataError for a value outside the domain of eq. (26).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        t, p = self.temperature, self.top_p
        if not (isinstance(t, Real) and 0 <= t <= LARGEST and (t == 0 or f32(t) > 0)):
            raise DataError(f"temperature is {t!r}; it is 0, or a number above it that float32 holds")
        if not (isinstance(p, Real) and 0 < p <= 1):
            raise DataError(f"top_p is {p!r}; it is a number above 0 and up to 1")
        _count("top_k", self.top_k, 0)
        _count("seed", self.seed, 0)


def _count(name: str, value: int, least: int) -> None:
    if not (isinstance(value, Integral) and value >= least):
        raise DataError(f"{name} is {value!r}; it is a whole number from {least} on")


class Generation:
    """The text that follows a prompt, written while it is iterated, which gives a piece of text for each token.

    A piece is "" where the token ends inside a character, or ends the text; what is held back at the end comes as one more.

    prompt: tokens (L,), L >= 1. It ends after max_new_tokens, or with an end token. Padding rows of the head are never
    chosen. look: is shown each token, and the logits from which it was chosen. Raises DataError; while it is written, whatever
    the runner raises.
    """

    def __init__(
        self, session: Session, prompt: IntArray, sampler: Sampler, max_new_tokens: int, look: Look | None = None
    ) -> None:
        _count("max_new_tokens", max_new_tokens, 1)
        self.text: str = ""  # so far
        self.tokens: list[int] = []  # so far; an end token counts
        self._sha = hashlib.sha256()
        self._pieces = self._write(session, prompt, sampler, max_new_tokens, look)

    @property
    def logits_sha256(self) -> str:
        """SHA-256 of the float32 little-endian logits from which each token was chosen, in order, padding rows included."""
        return self._sha.hexdigest()

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Generation(text={self.text!r}, tokens={self.tokens}, logits_sha256={self.logits_sha256!r})"

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def finish(self) -> "Generation":
        """Write what is left of it."""
        for _ in self:
            pass
        return self

    def _write(
        self, session: Session, prompt: IntArray, sampler: Sampler, max_new_tokens: int, look: Look | None
    ) -> Iterator[str]:
        stream, ends = session.tokenizer.stream(), session.tokenizer.end_token_ids
        chosen = choose_tokens(session.runner, prompt, sampler, session.tokenizer.n_ids)
        for token, logits in islice(chosen, max_new_tokens):
            self._sha.update(np.ascontiguousarray(logits, "<f4").tobytes())
            if look:
                look(logits, token)
            self.tokens.append(token)
            piece = stream.put(token) if token not in ends else ""
            self.text += piece
            yield piece
            if token in ends:
                break
        if tail := stream.flush():
            self.text += tail
            yield tail


def choose_tokens(runner: Runner, prompt: IntArray, sampler: Sampler, n_ids: int) -> Iterator[tuple[int, F32Array]]:
    """The tokens that follow a prompt (L,), without end, each with the logits (vocabulary,) from which it was chosen.

    n_ids: rows of the head that may be chosen; the later ones are padding. One call for the prompt, then one for each token,
    made when the next token is asked for.
    """
    draw = draws(sampler.seed)
    (rows,), state = runner.prefill([prompt])
    logits = rows[-1]
    while True:
        uniform = draw() if sampler.temperature > 0 else 0.0
        token = sample(logits[:n_ids], uniform, sampler.temperature, sampler.top_k, sampler.top_p)
        yield token, logits
        step, state = runner.step(np.array([token]), state)
        logits = step[0]
