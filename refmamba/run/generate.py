"""Text generation: one call for the prompt, then one for each token."""

import hashlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from refmamba.backend import Runner
from refmamba.errors import DataError, SchemeError
from refmamba.formats.state import SavedState, open_state
from refmamba.run.session import Session
from refmamba.run.stops import Stops
from refmamba.spec.arith import F32Array, IntArray, f32
from refmamba.spec.mamba1 import check_tokens
from refmamba.spec.ops import draws, log_softmax, sample

LARGEST = float(np.finfo(np.float32).max)  # temperature
AT_ONCE = 16  # texts that are written together: more of them make a step hardly cheaper for each
T = TypeVar("T")
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


@dataclass(frozen=True)
class Extent:
    """How far a text is written, and what is told of it. Raises DataError.

    max_new_tokens: 0 only reads the prompt. stop: texts before the first of which it ends. logprobs: how many of the likeliest
    tokens are told beside each chosen one; None: nothing is told.
    """

    max_new_tokens: int = 100
    stop: str | Sequence[str] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _count("max_new_tokens", self.max_new_tokens, 0)
        if self.logprobs is not None:
            _count("logprobs", self.logprobs, 0)
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for stop in self.stop:
            if not isinstance(stop, str) or not stop:
                raise DataError(f"a stop string is {stop!r}; it is a text of at least one character")


def _count(name: str, value: int, least: int) -> None:
    if not (isinstance(value, Integral) and value >= least):
        raise DataError(f"{name} is {value!r}; it is a whole number from {least} on")


@dataclass(frozen=True)
class Likely:
    """A token, its own text, and the natural logarithm of its probability, eq. (25), whatever the sampler then did."""

    token: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Chosen(Likely):
    """The token that was chosen, and the likeliest ones, the likeliest first, equal ones by number."""

    top: tuple[Likely, ...]


@dataclass(frozen=True, eq=False)
class Context:
    """What was read and written so far, from which a text goes on.

    tokens: (L,) int64, L >= 1. state: the runner's, of one sequence, after all of them but the last: the next call reads that
    one, and then what is new. drawn: the uniform draws, eq. (26), that were taken for them; a text that goes on with the same
    seed takes the next ones.
    """

    tokens: IntArray
    state: Any
    drawn: int = 0


@dataclass
class Times:
    """Moments, `time.perf_counter`'s: the call for the prompt begins, the first and the last token is chosen."""

    began: float = 0.0
    first: float = 0.0
    last: float = 0.0


class Chooser:
    """Chooses the tokens of one sequence from their logits. n_ids: rows of the head that may be chosen; the rest is padding.

    drawn: uniform draws that were taken before. ended: set by whoever takes the tokens, when they need no more.
    """

    def __init__(self, sampler: Sampler, n_ids: int, drawn: int = 0) -> None:
        self.sampler, self.n_ids, self.drawn, self.ended = sampler, n_ids, drawn, False
        self._draw = draws(sampler.seed)
        for _ in range(drawn):
            self._draw()

    def choose(self, logits: F32Array) -> int:
        """The token that follows, of logits (vocabulary,)."""
        s, uniform = self.sampler, 0.0
        if s.temperature > 0:
            uniform, self.drawn = self._draw(), self.drawn + 1
        return sample(logits[: self.n_ids], uniform, s.temperature, s.top_k, s.top_p)


def choose_tokens(
    runner: Runner, logits: Sequence[F32Array], state: Any, choosers: Sequence[Chooser]
) -> Iterator[list[tuple[int, int, F32Array, Any]]]:
    """The tokens that follow some sequences, one of each at a time, until their choosers have ended.

    logits: of each, (vocabulary,), after the call for its prompt; state: after those calls. Gives, for each sequence that has
    not ended, its number, the token, the logits (vocabulary,) from which that was chosen, and the state before it, of all
    sequences that have not ended. One call for each token, made when the next is asked for.
    """
    going = list(range(len(choosers)))
    while going:
        tokens = [choosers[i].choose(row) for i, row in zip(going, logits, strict=True)]
        yield [(i, token, row, state) for i, token, row in zip(going, tokens, logits, strict=True)]
        left = [place for place, i in enumerate(going) if not choosers[i].ended]
        if len(left) < len(going):
            going, state = [going[place] for place in left], state.take(left)
        if going:
            rows, state = runner.step(np.array(tokens)[left], state)
            logits = list(rows)


class Generation:
    """The text that follows a prompt, written while it is iterated, which gives a piece of text for each token.

    A piece is "" where the token ends inside a character, may begin a stop string, or ends the text; what is held back at the
    end comes as one more.

    prompt: new tokens (L,), after those of the context `after`, if any; L >= 1 without one. It ends after
    `extent.max_new_tokens`, with an end token, or before a stop string, the tokens of which count as tokens and not as text.
    Padding rows of the head are never chosen. look: is shown each token, and the logits from which it was chosen. Raises
    DataError; while it is written, whatever the runner raises.
    """

    def __init__(
        self, session: Session, prompt: IntArray, sampler: Sampler, extent: Extent, look: Look | None = None,
        after: Context | None = None,
    ) -> None:  # fmt: skip
        self.text: str = ""  # so far
        self.tokens: list[int] = []  # so far; an end token counts
        self.logprobs: list[Chosen] = []  # of each token, where they are asked for
        self.times, self.sampler = Times(), sampler
        self._session, self._extent, self._look = session, extent, look
        if after is None or len(prompt) > 0:
            prompt = check_tokens(prompt, session.opened.checkpoint.config)
        self._before = prompt if after is None else np.concatenate([after.tokens, prompt])
        self._fed: IntArray = prompt if after is None else self._before[len(after.tokens) - 1 :]
        self._state: Any = None if after is None else after.state
        self._sha, self._stops = hashlib.sha256(), Stops(extent.stop)
        self._stream = session.tokenizer.stream()
        self._chooser = Chooser(sampler, session.tokenizer.n_ids, after.drawn if after else 0)
        self._pieces = self._write()

    @property
    def logits_sha256(self) -> str:
        """SHA-256 of the float32 little-endian logits from which each token was chosen, in order, padding rows included."""
        return self._sha.hexdigest()

    @property
    def context(self) -> Context:
        """What is read and written so far: `after` of a text that goes on. Raises DataError for one of a batch."""
        if self._state is None:
            raise DataError("this text has no state to go on from: it was written in a batch, or nothing of it was read yet")
        return Context(np.concatenate([self._before, np.array(self.tokens, np.int64)]), self._state, self._chooser.drawn)

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

    def _write(self) -> Iterator[str]:
        runner, self.times.began = self._session.runner, time.perf_counter()
        if self._extent.max_new_tokens == 0:
            if len(self._fed) > 1:
                _, self._state = runner.prefill([self._fed[:-1]], self._state, logits="none")
            self._state = self._state or runner.initial_state(1)
            return
        (rows,), state = runner.prefill([self._fed], self._state)
        for ((_, token, logits, before),) in choose_tokens(runner, [rows[-1]], state, [self._chooser]):
            self._state = before
            yield self._put(token, logits)
        if tail := self._close():
            yield tail

    def _put(self, token: int, logits: F32Array) -> str:
        """One more token, and the piece of text that it gives."""
        tokenizer, extent = self._session.tokenizer, self._extent
        self.times.last = time.perf_counter()
        self.times.first = self.times.first or self.times.last
        self._sha.update(np.ascontiguousarray(logits, "<f4").tobytes())
        if self._look:
            self._look(logits, token)
        self.tokens.append(token)
        if extent.logprobs is not None:
            values = log_softmax(logits[None])[0]
            likeliest = np.argsort(-values[: tokenizer.n_ids], kind="stable")[: extent.logprobs].tolist()
            own, *top = [(t, tokenizer.decode([t]), float(values[t])) for t in (token, *likeliest)]
            self.logprobs.append(Chosen(*own, tuple(Likely(*words) for words in top)))
        end = token in tokenizer.end_token_ids
        piece = "" if end else self._stops.put(self._stream.put(token))
        self._chooser.ended = end or self._stops.reached or len(self.tokens) == extent.max_new_tokens
        self.text += piece
        return piece

    def _close(self) -> str:
        """The text that was held back, when no more tokens come."""
        tail = "" if self._stops.reached else self._stops.put(self._stream.flush()) + self._stops.flush()
        self.text += tail
        return tail


def generate_batch(
    session: Session, prompts: Sequence[IntArray], sampler: Sampler, extent: Extent, n: int = 1, after: Context | None = None
) -> Iterator[Generation]:
    """Write n texts after each prompt, those of a prompt with the seeds seed, seed + 1, ..., seed + n - 1: in order.

    AT_ONCE texts are written together, each with the bits that it has alone. prompts, after: as Generation's. Raises DataError,
    and whatever the runner raises.
    """
    _count("n", n, 1)
    if extent.max_new_tokens == 0:
        raise DataError("max_new_tokens is 0, which only reads a prompt; of a batch nothing would be left")

    def made(prompt: IntArray, seed: int) -> Generation:
        return Generation(session, prompt, replace(sampler, seed=seed), extent, None, after)

    for group in _groups(prompts, max(1, AT_ONCE // n)):
        began, state = time.perf_counter(), None if after is None else after.state.take([0] * len(group))
        rows, state = session.runner.prefill([made(prompt, sampler.seed)._fed for prompt in group], state)
        every = ((place, made(prompt, sampler.seed + i)) for place, prompt in enumerate(group) for i in range(n))
        for part in _groups(every, AT_ONCE):
            places, texts = zip(*part, strict=True)
            logits, choosers = [rows[place][-1] for place in places], [text._chooser for text in texts]
            for step in choose_tokens(session.runner, logits, state.take(places), choosers):
                for i, token, row, _ in step:
                    texts[i]._put(token, row)
            for text in texts:
                text.times.began, text._pieces, text._state = began, iter(()), None
                text._close()
                yield text


def _groups(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """So many values at a time, taken when they are needed: `--n` may be any number."""
    rest = iter(values)
    while group := list(itertools.islice(rest, size)):
        yield group


def save_context(context: Context, session: Session, file: Path) -> None:
    """Save what a text can go on from on any backend (docs/FORMAT.md, section 8). Raises DataError."""
    session.check_exact("a saved state")
    conv, ssm = context.state.arrays()
    choice = session.opened.choice
    about = {"model": choice.model, "revision": choice.revision, "backend": session.backend.name}
    about = {key: value for key, value in about.items() if value is not None}
    SavedState(context.tokens, conv[0], ssm[0], context.drawn, session.model_sha256, session.scheme, about).save(file)


def load_context(file: Path, session: Session) -> Context:
    """Load what `save_context` saved of this model under this scheme.

    Raises FileError, CheckpointError, SchemeError, DataError.
    """
    session.check_exact("a saved state")
    saved = open_state(file, session.opened.checkpoint.config)
    if saved.scheme != session.scheme:
        raise SchemeError(
            f"{file}: saved under the scheme {saved.scheme.name}, and this model runs under {session.scheme.name}"
        )
    if saved.model_sha256 != session.model_sha256:
        name = saved.about.get("model", "another model")
        raise DataError(
            f"{file}: saved of {name}, and {session.opened.choice.model} has other content; name its own with --model"
        )
    return Context(saved.tokens, session.runner.restore_state(saved.conv[None], saved.ssm[None]), saved.drawn)
