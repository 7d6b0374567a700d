"""From the words of a command line to a model that is ready to run."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from refmamba.backend import Backend, Runner, load_backend
from refmamba.errors import SchemeError
from refmamba.formats.calibration import SUFFIX, load_calibration
from refmamba.formats.folder import open_checkpoint
from refmamba.formats.hub import ModelFiles, resolve_model
from refmamba.formats.text import read_text
from refmamba.formats.tokenizer import Tokenizer, load_tokenizer
from refmamba.spec.arith import F32Array
from refmamba.spec.calibrate import calibrate, passage
from refmamba.spec.codes import Param
from refmamba.spec.config import ParameterSource
from refmamba.spec.parameters import QuantizedModel, quantize_model
from refmamba.spec.scheme import parse_scheme

DEFAULT_MODEL, DEFAULT_SCHEME = "small", "w8-all"


@dataclass(frozen=True)
class ModelChoice:
    """Which model, under which scheme, on which backend: the options that every command shares."""

    model: str = DEFAULT_MODEL
    scheme: str | None = None  # None: the saved one, or the command's default
    backend: str = "cpu"
    device: str | None = None
    revision: str | None = None
    calibrate: Path | None = None


@dataclass(frozen=True)
class Loaded:
    """What a ModelChoice became."""

    choice: ModelChoice
    files: ModelFiles
    tokenizer: Tokenizer
    backend: Backend
    runner: Runner

    def describe(self) -> dict[str, Any]:
        """What every result names."""
        return {"model": self.choice.model, "scheme": self.runner.scheme.name, "backend": self.backend.name,
                "device": self.backend.device}  # fmt: skip


def choose_scheme(scheme: str | None, bits: int | None, act_bits: int | None) -> str | None:
    """--bits N is wN-all, --bits N --act-bits M is wNaM-all, --scheme NAME any. Raises SchemeError for a mixture."""
    if scheme is not None and (bits is not None or act_bits is not None):
        raise SchemeError("--scheme names the whole scheme; leave out --bits and --act-bits")
    if act_bits is not None and bits is None:
        raise SchemeError("--act-bits needs --bits")
    if bits is not None and not 2 <= bits <= 8:
        raise SchemeError(f"--bits {bits}: weights have 2 to 8 bits")
    if act_bits is not None and not 2 <= act_bits <= 16:
        raise SchemeError(f"--act-bits {act_bits}: activations have 2 to 16 bits")
    if bits is not None:
        return f"w{bits}-all" if act_bits is None else f"w{bits}a{act_bits}-all"
    return scheme


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
    """The model, with a bar on a terminal's stderr while its parameters are quantized and taken."""
    what, total = f"quantizing {model.scheme.name}", len(model.params) - model.shares_codes  # which are taken once
    with tqdm(total=total, desc=what, unit="tensor", leave=False, disable=not sys.stderr.isatty()) as bar:
        yield replace(model, params=_Counted(model.params, bar))


def calibration_for(source: ParameterSource, tokenizer: Tokenizer, file: Path | None) -> Mapping[str, F32Array]:
    """Absolute maxima from a text, from a saved .json, or (None) from the passage inside the package."""
    if file is not None and file.suffix == SUFFIX:
        return load_calibration(file)
    text = passage() if file is None else read_text(file)
    print(f"calibrating on {file or 'the passage inside the package'}", file=sys.stderr)
    return calibrate(source, tokenizer.encode_array(text))


def load_model(choice: ModelChoice, default_scheme: str = DEFAULT_SCHEME) -> tuple[ModelFiles, Tokenizer, QuantizedModel]:
    """Find the model's files, read its tokenizer, and quantize it unless it was saved quantized. Raises RefmambaError."""
    scheme = parse_scheme(choice.scheme or default_scheme)
    files = resolve_model(choice.model, choice.revision)
    opened = open_checkpoint(files.folder)
    tokenizer = load_tokenizer(files, opened.config)
    if isinstance(opened, QuantizedModel):
        if choice.scheme is not None and scheme != opened.scheme:
            raise SchemeError(f"{choice.model} is saved as {opened.scheme.name}; leave out --scheme {scheme.name}")
        return files, tokenizer, opened
    calibration = calibration_for(opened, tokenizer, choice.calibrate) if scheme.needs_calibration else None
    return files, tokenizer, quantize_model(opened, scheme, calibration)


def load(choice: ModelChoice, default_scheme: str = DEFAULT_SCHEME) -> Loaded:
    """Everything that a command needs to run the model. Raises RefmambaError."""
    backend = load_backend(choice.backend, choice.device)
    files, tokenizer, model = load_model(choice, default_scheme)
    with progress(model) as counted:
        return Loaded(choice, files, tokenizer, backend, backend.load(counted))
