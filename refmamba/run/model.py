"""The Python face: what `refmamba.load` gives, and `refmamba.quantize`. The commands call the same functions."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmamba.backends import DEFAULT_BACKEND
from refmamba.errors import DataError
from refmamba.formats.tokenizer import Tokenizer
from refmamba.run.generate import (
    Context,
    Extent,
    Generation,
    Look,
    Sampler,
    generate_batch,
    load_context,
    save_context,
)  # fmt: skip
from refmamba.run.perplexity import Perplexity, text_perplexity
from refmamba.run.session import (
    DEFAULT_MODEL,
    ModelChoice,
    Session,
    choose_scheme,
    open_session,
    quantize_folder,
)  # fmt: skip
from refmamba.spec.arith import F32Array, IntArray
from refmamba.spec.config import MambaConfig
from refmamba.spec.mamba1 import Mamba, Positions
from refmamba.spec.scheme import Scheme
from refmamba.spec.trace import Trace

StrPath = str | os.PathLike[str]
Tokens = Sequence[int] | NDArray[np.integer[Any]]
Text = str | Tokens


class Model:
    """A model that is ready to run on a backend. `refmamba.load` makes one.

    Where a method takes a text it also takes its tokens, whole numbers (L,) with L >= 1. An empty text stands for the token
    that begins one.
    """

    def __init__(self, session: Session) -> None:
        self._session, self._runner = session, session.runner  # loaded now: what is wrong with it is said here

    def __repr__(self) -> str:
        words = self._session.describe()
        return f"<refmamba.Model {words['model']} under {words['scheme']} on {words['backend']}, {words['device']}>"

    @property
    def scheme(self) -> Scheme:
        """What is quantized, and how.

        >>> print(refmamba.load(bits=4).scheme.name)
        w4-all
        """
        return self._session.scheme

    @property
    def config(self) -> MambaConfig:
        """The model's sizes.

        >>> refmamba.load().config.n_layer
        8
        """
        return self._runner.config

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to tokens and back.

        >>> tokenizer = refmamba.load().tokenizer
        >>> tokenizer.decode(tokenizer.encode("The old man"))
        'The old man'
        """
        return self._session.tokenizer

    def generate(
        self, text: Text, *, max_new_tokens: int = 100, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
        seed: int = 0, stop: str | Sequence[str] = (), logprobs: int | None = None, after: Context | None = None,
    ) -> Generation:  # fmt: skip
        """Write what follows a text: its `text`, `tokens`, `logits_sha256` and `context`. `str` of it is the text.

        temperature 0 takes the likeliest token; else tokens are drawn, of the top_k likeliest (0: of all), and of the fewest
        that hold a share top_p of the probability. The same seed draws the same tokens. An end token ends it early, and so does
        a stop string, before which the text ends. logprobs: also tell, of each token, its log-probability and those of so many
        of the likeliest. after: a context to go on from; the text, which may be empty, is then tokenized as it stands, with
        nothing added. max_new_tokens 0 only reads. Raises DataError, TokenizerError, NonFiniteError.

        >>> model = refmamba.load("small", scheme="int8")
        >>> written = model.generate("She said", max_new_tokens=8)
        >>> written.text
        ' to her\\nmother, "I will'
        >>> print(model.generate("It was a", max_new_tokens=8, temperature=0.7, seed=1))
         long way
        along. At last
        >>> more = model.generate(" come", max_new_tokens=4, after=written.context)
        >>> more.text
        ' and see you,'
        >>> model.generate("She said", stop=["mother", "father"]).text
        ' to her\\n'
        >>> model.generate("She said", max_new_tokens=1, logprobs=1).logprobs[0].text
        ' to'
        """
        return self.stream(
            text, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop,
            logprobs=logprobs, after=after,
        ).finish()  # fmt: skip

    def stream(
        self, text: Text, *, max_new_tokens: int = 100, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
        seed: int = 0, stop: str | Sequence[str] = (), logprobs: int | None = None, after: Context | None = None,
        look: Look | None = None,
    ) -> Generation:  # fmt: skip
        """The same piece by piece: iterate what it gives, a piece of text for each token as soon as it is chosen.

        A piece is empty where a token ends inside a character or may begin a stop string. look: is called with the logits
        (vocabulary,) from which each token was chosen, and the token.

        >>> model = refmamba.load("small", scheme="int8")
        >>> for piece in model.stream("She said", max_new_tokens=3):
        ...     print(repr(piece))
        ' to'
        ' her'
        '\\n'
        """
        sampler, extent = Sampler(temperature, top_k, top_p, seed), Extent(max_new_tokens, stop, logprobs)
        return Generation(self._session, self._tokens(text, after), sampler, extent, look, after)

    def generate_batch(
        self, texts: Sequence[Text], *, n: int = 1, max_new_tokens: int = 100, temperature: float = 0.0, top_k: int = 0,
        top_p: float = 1.0, seed: int = 0, stop: str | Sequence[str] = (), logprobs: int | None = None,
        after: Context | None = None,
    ) -> Iterator[Generation]:  # fmt: skip
        """Write what follows each of some texts, 16 at a time: what `generate` gives for each alone, in order, bit for bit.

        n: so many samples of each text, with the seeds seed, seed + 1, ..., seed + n - 1. They have no `context`. The other
        arguments are those of `generate`. Raises DataError, TokenizerError, NonFiniteError.

        >>> model = refmamba.load("small", scheme="int8")
        >>> [written.text for written in model.generate_batch(["She said", "The old man"], max_new_tokens=3)]
        [' to her\\n', '\\nwho was']
        >>> samples = model.generate_batch(["It was a"], n=3, max_new_tokens=8, temperature=0.7)
        >>> list(samples)[1].text == model.generate("It was a", max_new_tokens=8, temperature=0.7, seed=1).text
        True
        """
        sampler, extent = Sampler(temperature, top_k, top_p, seed), Extent(max_new_tokens, stop, logprobs)
        return generate_batch(self._session, [self._tokens(text, after) for text in texts], sampler, extent, n, after)

    def save_state(self, context: Context, file: StrPath) -> None:
        """Save a context, as .safetensors, for `load_state` on any backend and `refmamba generate --load-state`.

        Raises DataError.

        >>> import tempfile
        >>> model = refmamba.load("small", scheme="int8")
        >>> with tempfile.TemporaryDirectory() as place:
        ...     model.save_state(model.generate("She said", max_new_tokens=0).context, f"{place}/state.safetensors")
        ...     model.generate("", max_new_tokens=2, after=model.load_state(f"{place}/state.safetensors")).text
        ' to her'
        """
        save_context(context, self._session, Path(file))

    def load_state(self, file: StrPath) -> Context:
        """Load what `save_state` or `refmamba generate --save-state` saved of this model under this scheme, on any backend.

        Raises FileError, CheckpointError, SchemeError for the state of another scheme, DataError for that of another model.

        >>> import tempfile
        >>> model = refmamba.load("small", scheme="int8")
        >>> with tempfile.TemporaryDirectory() as place:
        ...     model.save_state(model.generate("She said", max_new_tokens=2).context, f"{place}/state.safetensors")
        ...     context = model.load_state(f"{place}/state.safetensors")
        >>> model.generate("", max_new_tokens=2, after=context).text == model.generate("She said", max_new_tokens=4).text[7:]
        True
        """
        return load_context(Path(file), self._session)

    def logits(self, text: Text) -> F32Array:
        """Float32 logits of every position, (L, vocabulary); those of a token are for the one after it.

        Raises DataError, TokenizerError, NonFiniteError.

        >>> model = refmamba.load("small", scheme="int8")
        >>> logits = model.logits("The old man")
        >>> logits.shape, logits.dtype
        ((3, 4096), dtype('float32'))
        >>> int(logits[-1].argmax()) == model.generate("The old man", max_new_tokens=1).tokens[0]
        True
        """
        (rows,), _ = self._runner.prefill([self._tokens(text)], logits="all")
        return rows

    def perplexity(self, text: str) -> Perplexity:
        """How well the model foretells a text: `bits_per_byte`, and `per_token`, the perplexity in the narrow sense.

        Raises DataError, TokenizerError, NonFiniteError.

        >>> result = refmamba.load("small", scheme="int8").perplexity("The old man went out of the house.")
        >>> round(result.bits_per_byte, 2)
        1.22
        """
        return text_perplexity(self._session, text)

    def prefill(
        self, sequences: Sequence[Tokens], state: Any | None = None, *, logits: Positions = "last"
    ) -> tuple[list[F32Array], Any]:
        """Run sequences of tokens, each (L,), from their state on (None: from the first token).

        Gives float32 logits of each, at "all" of its positions (L, vocabulary), the "last" (1, vocabulary) or "none"
        (0, vocabulary), and the state after it. A state is a value: no call changes it, and `state.take([0, 0])` forks it.
        Raises DataError, NonFiniteError.

        >>> model = refmamba.load("small", scheme="int8")
        >>> logits, state = model.prefill([[1, 2, 3], [4]])
        >>> [rows.shape for rows in logits]
        [(1, 4096), (1, 4096)]
        """
        return self._runner.prefill([self._tokens(tokens) for tokens in sequences], state, logits=logits)

    def step(self, tokens: Tokens, state: Any) -> tuple[F32Array, Any]:
        """One more token for each sequence (batch,): float32 logits (batch, vocabulary), and the new state.

        Raises DataError, NonFiniteError.

        >>> model = refmamba.load("small", scheme="int8")
        >>> _, state = model.prefill([[1, 2, 3], [4]])
        >>> logits, state = model.step([5, 6], state)
        >>> bool((logits[0] == model.logits([1, 2, 3, 5])[-1]).all())
        True
        """
        return self._runner.step(self._tokens(tokens), state)

    def trace(self, text: Text) -> Trace:
        """Every operation of the reference's forward over a text, with its arguments and its result, whatever the backend.

        Raises DataError, TokenizerError, NonFiniteError.

        >>> trace = refmamba.load("small", scheme="int8").trace("The old man")
        >>> [step.operation for step in trace.layer(0)[:5]]
        ['rms_norm', 'code', 'integer_product', 'rescale', 'conv1d']
        >>> trace["layers.0.in_proj.acc"].shape
        (3, 1024)
        """
        return Mamba(self._runner.model).trace(self._tokens(text))

    def _tokens(self, text: Text, after: Context | None = None) -> IntArray:
        """A text's tokens, or tokens as an array, which the runner checks. Raises DataError, TokenizerError.

        after: the context that they go on from, so that there may be none.
        """
        if isinstance(text, str):
            if after is not None:
                return np.array(self.tokenizer.encode(text, special=False), np.int64)
            return self.tokenizer.encode_array(text)
        try:
            return np.asarray(text)
        except ValueError as error:
            raise DataError("a sequence is whole numbers in one row; it is rows of different lengths") from error


def load(
    model: StrPath = DEFAULT_MODEL, *, revision: str | None = None, scheme: StrPath | Scheme | None = None,
    bits: int | None = None, act_bits: int | None = None, calibrate: StrPath | None = None,
    percentile: float = 1.0, backend: str = DEFAULT_BACKEND, device: str | None = None, add_bos: bool | None = None,
) -> Model:  # fmt: skip
    """Load a model: `small` (inside the package), a folder, a GGUF file, or OWNER/NAME or OWNER/NAME:FILE.gguf on the hub.

    revision: branch, tag or commit on the hub. scheme: a name (`int8`), a file (`mine.json`) or a Scheme; else bits=N for
    `wN-all`, and with act_bits=M for `wNaM-all`; else the one that the folder was saved under; else `w8-all`. calibrate: a
    text, or maxima in a .json, for static scales (None: the passage inside the package); percentile: the share of all
    magnitudes on the text at which the maxima are cut (1: not). backend: a name of `refmamba.backends.BACKENDS`, or
    `package.module:Class`; device: where that has several, as `cuda`. add_bos: whether a text's tokens begin with the begin
    token (None: as the tokenizer's file says). Raises RefmambaError.

    >>> import refmamba
    >>> refmamba.load("small", scheme="int8")
    <refmamba.Model small under int8 on cpu, cpu>
    """
    chosen = _choice(model, revision, scheme, bits, act_bits, calibrate, percentile, backend, device, add_bos)
    return Model(open_session(chosen))


def quantize(
    model: StrPath, folder: StrPath, *, revision: str | None = None, scheme: StrPath | Scheme | None = None,
    bits: int | None = None, act_bits: int | None = None, calibrate: StrPath | None = None, percentile: float = 1.0,
) -> Path:  # fmt: skip
    """Save a model quantized in a new folder, which `load` and every command take, and give the folder back.

    The arguments are those of `load`; a scheme or bits must be named. Raises RefmambaError, and then there is no folder.

    >>> import refmamba, tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     folder = refmamba.quantize("small", f"{place}/small-int8", scheme="int8")
    ...     print(refmamba.load(folder).scheme.name)
    int8
    """
    quantize_folder(_choice(model, revision, scheme, bits, act_bits, calibrate, percentile), Path(folder))
    return Path(folder)


def _choice(
    model: StrPath, revision: str | None, scheme: StrPath | Scheme | None, bits: int | None, act_bits: int | None,
    calibrate: StrPath | None, percentile: float, backend: str = DEFAULT_BACKEND, device: str | None = None,
    add_bos: bool | None = None,
) -> ModelChoice:  # fmt: skip
    """The words in `str`: a wrong one of another type is then an unknown name."""
    scheme = scheme if scheme is None or isinstance(scheme, Scheme) else str(scheme)
    chosen, file = choose_scheme(scheme, bits, act_bits), None if calibrate is None else Path(calibrate)
    device = None if device is None else str(device)
    return ModelChoice(str(model), chosen, str(backend), device, revision, file, add_bos, percentile)
