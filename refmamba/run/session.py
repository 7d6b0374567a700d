"""From words to a running model: the one way that every command, the evaluation and the Python face take.

`open_model` finds and opens a model's files under a scheme; `open_session` also takes a backend that can run it. Nothing is
read in full, calibrated or quantized before it is asked for.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from refmamba.backend import Backend, Runner, check_support, load_backend, numerics
from refmamba.backends import DEFAULT_BACKEND
from refmamba.errors import DataError, SchemeError
from refmamba.formats.calibration import SUFFIX, Calibration, load_calibration, save_calibration
from refmamba.formats.folder import content_hash, open_checkpoint
from refmamba.formats.hub import SMALL, ModelFiles, resolve_model
from refmamba.formats.quantized import save_quantized
from refmamba.formats.scheme import open_scheme
from refmamba.formats.text import read_text
from refmamba.formats.tokenizer import Tokenizer, load_tokenizer
from refmamba.formats.writing import check_folder
from refmamba.run.progress import bar
from refmamba.spec.arith import F32Array
from refmamba.spec.calibrate import calibrate, passage
from refmamba.spec.codes import Param
from refmamba.spec.config import MambaConfig, ParameterSource
from refmamba.spec.parameters import QuantizedModel, quantize_model
from refmamba.spec.scheme import Scheme

ROUNDINGS = ("search", "gptq")
DEFAULT_MODEL, DEFAULT_SCHEME = SMALL, "w8-all"


@dataclass(frozen=True)
class ModelChoice:
    """Which model, under which scheme, on which backend, in words.

    scheme: a name, a file or a Scheme; None: the one that the model was saved under, or else the caller's default.
    calibrate: a text, or maxima in a .json; None: the passage inside the package. add_bos: whether a text's tokens begin with
    the begin token; None: as the tokenizer says. percentile: at which share of a site's magnitudes on a text the maxima are
    cut, above 0 and at most 1; 1: not at all. Raises DataError for another, and for one beside maxima, whose file has its own.
    """

    model: str = DEFAULT_MODEL
    scheme: str | Scheme | None = None
    backend: str = DEFAULT_BACKEND
    device: str | None = None
    revision: str | None = None
    calibrate: Path | None = None
    add_bos: bool | None = None
    percentile: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a percentile that makes no sense."""
        if not (isinstance(self.percentile, int | float) and 0 < self.percentile <= 1):
            raise DataError(f"--percentile {self.percentile}: give a share above 0 and at most 1, such as 0.99999")
        if self.percentile != 1 and self.holds_maxima:
            raise DataError(f"--percentile goes with a text; the maxima in {self.calibrate} are cut already, or not at all")

    @property
    def holds_maxima(self) -> bool:
        """Whether `calibrate` is a file of maxima, and not a text."""
        return self.calibrate is not None and self.calibrate.suffix == SUFFIX


def choose_scheme(scheme: str | Scheme | None, bits: int | None, act_bits: int | None) -> str | Scheme | None:
    """--bits N is wN-all, --bits N --act-bits M is wNaM-all, --scheme NAME any. Raises SchemeError for a mixture."""
    if scheme is not None and (bits is not None or act_bits is not None):
        raise SchemeError("--scheme names the whole scheme; leave out --bits and --act-bits")
    if act_bits is not None and bits is None:
        raise SchemeError("--act-bits needs --bits")
    if bits is not None and bits not in range(2, 9):
        raise SchemeError(f"--bits {bits}: weights have 2 to 8 bits")
    if act_bits is not None and act_bits not in range(2, 17):
        raise SchemeError(f"--act-bits {act_bits}: activations have 2 to 16 bits")
    if bits is not None:
        if bits < 8:
            print(f"--bits {bits}: one scale a tensor ruins large models; for use there is --scheme int4", file=sys.stderr)
        return f"w{bits}-all" if act_bits is None else f"w{bits}a{act_bits}-all"
    return scheme


@dataclass(frozen=True, eq=False)
class Opened:
    """A model whose files are open, under a scheme. Its tensors are read and quantized one by one, when asked for."""

    choice: ModelChoice
    files: ModelFiles
    checkpoint: ParameterSource | QuantizedModel
    scheme: Scheme

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, which tokens as numbers do not need. Raises TokenizerError."""
        return load_tokenizer(self.files, self.checkpoint.config, self.choice.add_bos)

    def float_checkpoint(self) -> ParameterSource:
        """The checkpoint, to be quantized or changed. Raises DataError for a model that was saved quantized."""
        if isinstance(self.checkpoint, QuantizedModel):
            saved = self.checkpoint.scheme.name
            raise DataError(f"{self.choice.model}: is saved quantized, as {saved}; this needs the float checkpoint")
        return self.checkpoint

    @cached_property
    def calibrated(self) -> Calibration:
        """What static scales are made of. Raises RefmambaError."""
        file, percentile = self.choice.calibrate, self.choice.percentile
        if file is not None and self.choice.holds_maxima:
            return load_calibration(file, self.checkpoint.config)
        text = passage() if file is None else read_text(file)
        print(f"calibrating on {file or 'the passage inside the package'}", file=sys.stderr)
        source = self.float_checkpoint()
        with bar(len(source.config.shapes()), "calibrating", "tensor") as used:
            maxima = calibrate(_Watched(source, used), self.tokenizer.encode_array(text), percentile)
        return Calibration(maxima, percentile)

    @property
    def calibration(self) -> Mapping[str, F32Array]:
        """Absolute maxima of each linear layer's input channels, (K,) float32 a site. Raises RefmambaError."""
        return self.calibrated.absmax

    def rounded_by_gptq(self) -> QuantizedModel:
        """The model under its scheme, its linear layers' weights rounded by GPTQ on the text that is calibrated on."""
        from refmamba.run.rounding import round_by_gptq

        file = self.choice.calibrate
        if self.choice.holds_maxima:
            raise DataError(f"{file}: GPTQ needs a text, not the maxima of one; give a text file")
        tokens = self.tokenizer.encode_array(passage() if file is None else read_text(file))
        calibration = self.calibration if self.scheme.needs_calibration else None
        return round_by_gptq(self.float_checkpoint(), self.scheme, tokens, calibration, load_backend(DEFAULT_BACKEND))

    def quantized(self, scheme: Scheme) -> QuantizedModel:
        """The model under a scheme. Raises DataError where it was saved under another one, or calibration lacks a site."""
        if isinstance(self.checkpoint, QuantizedModel) and self.checkpoint.scheme == scheme:
            return self.checkpoint
        return quantize_model(self.float_checkpoint(), scheme, self.calibration if scheme.needs_calibration else None)


def open_model(choice: ModelChoice, default_scheme: str = DEFAULT_SCHEME) -> Opened:
    """Find and open a model's files. Raises RefmambaError, so SchemeError where it was saved under another scheme."""
    named = choice.scheme if isinstance(choice.scheme, Scheme | None) else open_scheme(choice.scheme)
    files = resolve_model(choice.model, choice.revision)
    checkpoint = open_checkpoint(files.folder)
    saved = checkpoint.scheme if isinstance(checkpoint, QuantizedModel) else None
    if saved is not None and named is not None and named != saved:
        raise SchemeError(f"{choice.model} is saved as {saved.name}; leave out the scheme {named.name}")
    return Opened(choice, files, checkpoint, named or saved or open_scheme(default_scheme))


@dataclass(frozen=True, eq=False)
class Session:
    """An opened model on a backend, under the model's scheme or, by `dataclasses.replace`, under another one.

    Raises BackendError where the backend cannot run the scheme.
    """

    opened: Opened
    backend: Backend
    scheme: Scheme

    def __post_init__(self) -> None:
        """Refuse before anything is calibrated or quantized."""
        check_support(self.backend, self.scheme)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises TokenizerError."""
        return self.opened.tokenizer

    @property
    def percentile(self) -> float | None:
        """At which the maxima behind static scales are cut; None where nothing is calibrated here. Raises RefmambaError."""
        if not self.scheme.needs_calibration or isinstance(self.opened.checkpoint, QuantizedModel):
            return None
        return self.opened.calibrated.percentile if self.opened.choice.holds_maxima else self.opened.choice.percentile

    @cached_property
    def runner(self) -> Runner:
        """The model, quantized and loaded, with a bar on stderr meanwhile. Raises RefmambaError."""
        with progress(self.opened.quantized(self.scheme)) as model:
            return self.backend.load(model)

    @cached_property
    def model_sha256(self) -> str:
        """The content hash of the model under the scheme (docs/FORMAT.md, section 7). Raises RefmambaError."""
        return content_hash(self.opened.quantized(self.scheme))

    def check_exact(self, what: str) -> None:
        """Raise DataError for a backend whose bits nobody else has; `what` would hold them."""
        if not self.backend.exact:
            raise DataError(f"backend '{self.backend.name}' is not exact, and {what} is of the specification's bits: use "
                            "--backend cpu")  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """What every result names."""
        return {"model": self.opened.choice.model, "scheme": self.scheme.name, "backend": self.backend.name,
                "device": self.backend.device, "added_tokens": self.tokenizer.added,
                "percentile": self.percentile} | numerics(self.backend)  # fmt: skip


def open_session(choice: ModelChoice, default_scheme: str = DEFAULT_SCHEME) -> Session:
    """Everything that is needed to run the model, which `Session.runner` then does. Raises RefmambaError."""
    backend = load_backend(choice.backend, choice.device)  # first: a name that is wrong is told before any download
    opened = open_model(choice, default_scheme)
    return Session(opened, backend, opened.scheme)


def quantize_folder(
    choice: ModelChoice, folder: Path, calibration_file: Path | None = None, rounding: str = ROUNDINGS[0]
) -> Opened:
    """Save a model quantized in a new folder; with a calibration file, also the maxima of its calibration.

    rounding: one of ROUNDINGS; `gptq` rounds the linear layers' weights by the text that is calibrated on. Raises
    RefmambaError, so SchemeError where no scheme is named.
    """
    if choice.scheme is None:
        raise SchemeError("name what to save the model as: --scheme NAME, or --bits N")
    check_folder(folder)
    opened = open_model(choice)
    _ = opened.tokenizer  # it is saved too, and what is wrong with it is said before the work
    if calibration_file is not None:
        save_calibration(opened.calibrated, calibration_file)
    quantized = opened.rounded_by_gptq() if rounding == "gptq" else opened.quantized(opened.scheme)
    with progress(quantized) as model:
        save_quantized(model, folder, opened.files, rounding)
    return opened


@dataclass(frozen=True)
class _Watched:
    """A checkpoint; each tensor that is read moves a progress bar."""

    source: ParameterSource
    bar: "tqdm[Any]"

    @property
    def config(self) -> MambaConfig:
        return self.source.config

    def read(self, name: str) -> F32Array:
        self.bar.update()
        return self.source.read(name)


class _Counted(Mapping[str, Param]):
    """A model's parameters; each one taken moves a progress bar."""

    def __init__(self, params: Mapping[str, Param], bar: "tqdm[Any]") -> None:
        self._params, self._bar = params, bar

    def __getitem__(self, name: str) -> Param:
        param = self._params[name]
        self._bar.update()
        return param

    def __contains__(self, name: object) -> bool:
        return name in self._params

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)


@contextmanager
def progress(model: QuantizedModel) -> Iterator[QuantizedModel]:
    """The model, with a bar on stderr while its parameters are quantized and taken."""
    what, total = f"quantizing {model.scheme.name}", len(model.params) - model.shares_codes  # which are taken once
    with bar(total, what, "tensor") as taken:
        yield replace(model, params=_Counted(model.params, taken))
