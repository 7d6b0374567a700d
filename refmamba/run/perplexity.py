"""Perplexity and bits per byte of a text: small effects of quantization that accuracy does not show."""

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from refmamba.backend import Runner
from refmamba.errors import DataError
from refmamba.run.progress import bar
from refmamba.run.session import Session
from refmamba.spec.arith import F32Array, IntArray
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


Look = Callable[[F32Array], None]  # is shown the logits (positions, vocabulary) of each call, in order


def divergence(expected: NDArray[Any], logits: NDArray[Any]) -> NDArray[Any]:
    """Kullback-Leibler divergence of the next token's probabilities at each position: (L, vocabulary) -> (L,) float64, nats."""
    p, q = (x.astype(np.float64) - np.max(x, -1, keepdims=True) for x in (expected, logits))
    P, Q = np.exp(p), np.exp(q)
    sums, others = P.sum(-1), Q.sum(-1)
    kl: NDArray[Any] = np.maximum(0.0, (P * (p - q)).sum(-1) / sums - np.log(sums / others))
    return kl


@dataclass
class Baseline:
    """A text's logits under one model, with which those of others are compared; float32 in a file of `kept_baseline`."""

    folder: Path
    _file: IO[bytes]

    def keep(self, logits: F32Array) -> None:
        """The Look of the model that others are compared with. Raises DataError where the disk is full."""
        try:
            self._file.write(logits.tobytes())
        except OSError as error:
            raise DataError(f"{self.folder}: a text's logits cannot be kept: {error.strerror}") from error

    def comparison(self) -> "Comparison":
        """What is shown the logits of one other model."""
        self._file.seek(0)
        return Comparison(self._file)


@contextmanager
def kept_baseline(folder: Path) -> Iterator[Baseline]:
    """A baseline, with a temporary file in the folder: 4 bytes for each token and entry of the vocabulary. Raises DataError."""
    try:
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed below, where an error is another
    except OSError as error:
        raise DataError(f"{folder}: no temporary file can be made: {error.strerror}") from error
    with file:
        yield Baseline(folder, file)


@dataclass
class Comparison:
    """The divergence of a model from the baseline over the same text: the mean of KL(baseline || model), nats a token."""

    _file: IO[bytes]
    _nats: float = 0.0
    _tokens: int = 0

    def look(self, logits: F32Array) -> None:
        """The Look of the model."""
        for row in logits:  # one by one, as in `perplexity`
            expected = np.frombuffer(self._file.read(row.nbytes), np.float32)
            self._nats += float(divergence(expected[None], row[None])[0])
        self._tokens += len(logits)

    @property
    def mean(self) -> float:
        """Of the tokens so far; NaN before the first."""
        return self._nats / self._tokens if self._tokens else math.nan


def perplexity(runner: Runner, tokens: IntArray, n_bytes: int, look: Look | None = None) -> Perplexity:
    """Score tokens[1:] given all before them, the state carried from the first to the last.

    tokens: (L,), L >= 2, the first one only read. look: is shown the logits. Raises DataError, NonFiniteError.
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
            if look is not None:
                look(rows[0])
            scored.update(len(targets))
    return Perplexity(len(tokens) - 1, nats, n_bytes)


def text_perplexity(session: Session, text: str, look: Look | None = None) -> Perplexity:
    """Score a text from its first token on, given the token that begins a text, which is not scored.

    A byte order mark is no part of a text that was read from a file, and is not counted. look: is shown the logits. Raises
    DataError, NonFiniteError.
    """
    if not text:
        raise DataError("the text is empty, so that there is nothing to score")
    tokens, prefix = session.tokenizer.encode_array(text), session.tokenizer.prefix
    if tokens[0] != prefix:
        tokens = np.concatenate([[prefix], tokens])
    return perplexity(session.runner, tokens, len(text.encode()), look)
