"""Perplexity and bits per byte of a text: small effects of quantization that accuracy does not show."""

import math
from dataclasses import dataclass

import numpy as np

from refmamba.backend import Runner
from refmamba.errors import DataError
from refmamba.run.progress import bar
from refmamba.run.session import Session
from refmamba.spec.arith import IntArray
from refmamba.spec.ops import log_softmax

CALL = 512  # tokens a call; where a scheme takes a scale over a call, that is what it is taken over
LARGEST_DECIMAL = 1e9  # that is written with all of its digits


def decimal(x: float, digits: int = 4) -> str:
    """A number with so many decimals; a huge one, as a model that is broken gives, in powers of ten."""
    return f"{x:.{digits}{'f' if abs(x) < LARGEST_DECIMAL else 'e'}}"


@dataclass(frozen=True)
class Perplexity:
    """tokens: scored ones; nats: their negative log-likelihood in all; n_bytes: of the text, as its file has them."""

    tokens: int
    nats: float
    n_bytes: int

    @property
    def per_token(self) -> float:
        """exp of the mean negative log-likelihood of a token; infinite where that is beyond float64."""
        try:
            return math.exp(self.nats / self.tokens)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits of the whole text over its bytes: comparable between tokenizers."""
        return self.nats / math.log(2) / self.n_bytes


def perplexity(runner: Runner, tokens: IntArray, n_bytes: int) -> Perplexity:
    """Score tokens[1:] given all before them, the state carried from the first to the last.

    tokens: (L,), L >= 2, the first one only read. Raises DataError, NonFiniteError.
    """
    if len(tokens) < 2:
        raise DataError("the text is too short to score: it needs a token to read and one to score")
    nats, state = 0.0, None
    with bar(len(tokens) - 1, "scoring the text", "token") as scored:
        for start in range(0, len(tokens) - 1, CALL):
            targets = tokens[start + 1 : start + 1 + CALL]
            rows, state = runner.prefill([tokens[start : start + len(targets)]], state, logits="all")
            for row, target in zip(rows[0], targets, strict=True):  # one by one: of a large vocabulary, 512 rows are a gigabyte
                nats -= float(log_softmax(row[None])[0, target])
            scored.update(len(targets))
    return Perplexity(len(tokens) - 1, nats, n_bytes)


def text_perplexity(session: Session, text: str) -> Perplexity:
    """Score a text from its first token on, given the token that begins a text, which is not scored.

    A byte order mark is no part of a text that was read from a file, and is not counted. Raises DataError, NonFiniteError.
    """
    if not text:
        raise DataError("the text is empty, so that there is nothing to score")
    tokens, prefix = session.tokenizer.encode_array(text), session.tokenizer.prefix
    if tokens[0] != prefix:
        tokens = np.concatenate([[prefix], tokens])
    return perplexity(session.runner, tokens, len(text.encode()))
