"""The backend protocol: what every implementation of the specification offers, and how one is found by name."""

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from refmamba.backends import BACKENDS
from refmamba.errors import BackendError, RefmambaError
from refmamba.spec.arith import F32Array, IntArray
from refmamba.spec.config import MambaConfig
from refmamba.spec.mamba1 import Positions
from refmamba.spec.parameters import QuantizedModel
from refmamba.spec.scheme import Scheme
from refmamba.spec.trace import Hook


class State(Protocol):
    """The recurrent state of a batch, a value: no call changes it."""

    @property
    def batch(self) -> int:
        """Number of sequences."""

    def take(self, indices: Sequence[int]) -> Self:
        """The state of the named sequences, in that order; an index may come more than once (a fork)."""

    def arrays(self) -> tuple[F32Array, F32Array]:
        """(conv, ssm): float32 (batch, n_layer, d_inner, d_conv - 1) and (batch, n_layer, d_inner, d_state)."""


class Runner(Protocol):
    """One model, ready to run on one backend. Its State type is its own: hand back only what it gave."""

    model: QuantizedModel
    config: MambaConfig
    scheme: Scheme

    def initial_state(self, batch: int) -> Any:
        """The state of `batch` sequences before their first token."""

    def restore_state(self, conv: F32Array, ssm: F32Array) -> Any:
        """The state whose `arrays` were these, on this backend or another: float32, in the shapes of `State.arrays`."""

    def prefill(
        self,
        sequences: Sequence[IntArray],
        state: Any | None = None,
        *,
        logits: Positions = "last",
        hook: Hook | None = None,
    ) -> tuple[list[F32Array], Any]:
        """Run each sequence (tokens, (L_i,), of any length from 1) from its state on (None: from the first token).

        Returns, for each, float32 logits of all positions (L_i, vocabulary), the last one (1, vocabulary) or none
        (0, vocabulary), and the state after its last token. A hook sees one sequence only (refmamba.spec.trace).
        Raises DataError for an empty sequence or an unknown token, NonFiniteError for a NaN or an infinity,
        ValueError for a hook with more than one sequence.
        """

    def step(self, tokens: IntArray, state: Any, *, hook: Hook | None = None) -> tuple[F32Array, Any]:
        """One more token (batch,) for each sequence: float32 logits (batch, vocabulary), and the new state."""


Targets = Sequence[Sequence[tuple[int, int]]]  # of each sequence: (row of its logits, token), sorted by row


class Scores(Protocol):
    """A runner's method `scores`, which only those on a device of their own have: logits stay where they are made."""

    def __call__(
        self, sequences: Sequence[IntArray], state: Any | None, logits: Positions, targets: Targets, /
    ) -> tuple[F32Array, NDArray[np.bool_], Any]:
        """`Runner.prefill`, and of its logits the targets: their log-softmax (25), float32 (n,), and whether each is the first
        largest of its row, (n,); and the state. Raises what prefill raises.
        """


class Backend(Protocol):
    """An implementation. exact: it claims the specification's bits, and `refmamba verify` holds it to that.

    One that is not exact may have two texts more, `dtype`, what it computes in, and `kernels`, the packages that compute, with
    their versions: see `numerics`.
    """

    name: str
    device: str
    exact: bool
    sites: frozenset[str] | None  # what its hooks show (trace.last_site names); None: every site

    def supports(self, scheme: Scheme) -> str | None:
        """None, or what of the scheme this backend does not know, in a few words: see `Scheme.unknown_to`."""

    def load(self, model: QuantizedModel) -> Runner:
        """Make a model ready to run. Raises BackendError where the backend does not support its scheme."""

    def operations(self) -> Mapping[str, Callable[..., Any]]:
        """Its single operations by the name of the specification's function, with that function's signature."""


PARTS = ("name", "device", "exact", "sites", "supports", "load", "operations")  # of Backend


def check_support(backend: Backend, scheme: Scheme) -> None:
    """Raise BackendError where the backend does not know a coder, a scale or a transform of the scheme."""
    if unknown := backend.supports(scheme):
        raise BackendError(f"backend '{backend.name}' does not know {unknown} (scheme {scheme.name}); use --backend reference")


def numerics(backend: Backend) -> dict[str, str]:
    """What the numbers of a backend that is not exact depend on besides, as far as it says: `dtype` and `kernels`."""
    if backend.exact:
        return {}
    return {part: str(getattr(backend, part)) for part in ("dtype", "kernels") if hasattr(backend, part)}


def load_backend(name: str, device: str | None = None) -> Backend:
    """A backend by its short name, or a stranger's as `package.module:Class`; the class is called with device=.

    Raises BackendError where it is unknown, cannot be imported, lacks a part of `Backend`, or does not know the device.
    """
    if name in BACKENDS:
        path, extra, _ = BACKENDS[name]
        module, _, attribute = path.partition(":")
        try:
            backend: Backend = getattr(importlib.import_module(module), attribute)(device=device)
        except ImportError as error:
            hint = f"; install it with: pip install 'refmamba[{extra}]'" if extra else ""
            raise BackendError(f"backend '{name}' cannot be imported: {error}{hint}") from error
        return backend
    if ":" not in name:
        raise BackendError(f"unknown backend '{name}'; there are {', '.join(BACKENDS)}, and package.module:Class")
    made = stranger(name)
    if not callable(made):
        raise BackendError(f"backend '{name}' is no class but {type(made).__name__}")
    try:
        inspect.signature(made).bind(device=device)
    except TypeError as error:
        raise BackendError(f"backend '{name}' cannot be called with device=, as {name}(device=None): {error}") from error
    except ValueError:  # compiled: it has no signature that can be read
        pass
    with strangers_error(name):
        backend = made(device=device)
    if missing := [part for part in PARTS if not hasattr(backend, part)]:
        operations = "" if "operations" in missing else f"; single operations are checked with --operations {name}"
        raise BackendError(f"backend '{name}' lacks {', '.join(missing)} of refmamba.backend.Backend{operations}")
    return backend


def stranger(path: str) -> Any:
    """What `package.module:attribute` names; the module may lie in the working directory. Raises BackendError."""
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise BackendError(f"'{path}' is not of the form package.module:Name")
    if os.getcwd() not in sys.path and "" not in sys.path:  # as with `python -m`
        sys.path.insert(0, os.getcwd())
    try:
        with strangers_error(module):
            value = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise BackendError(f"'{path}' cannot be imported: {error}") from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise BackendError(f"'{path}': {module} has no {attribute}")
        value = getattr(value, part)
    return value


@contextmanager
def strangers_error(path: str) -> Iterator[None]:
    """Whatever a stranger's code raises becomes a BackendError of one line that says where. Its own RefmambaError stays, and so
    does ModuleNotFoundError."""
    try:
        yield
    except (RefmambaError, ModuleNotFoundError):
        raise
    except Exception as error:
        raise BackendError(f"'{path}' {told(error)}") from error


def told(error: BaseException) -> str:
    """An error of a stranger's code in one line: its file and line, its kind and what it says."""
    where = ""
    if frames := traceback.extract_tb(error.__traceback__):
        where = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})"
    return f"raised {type(error).__name__}: {' '.join(str(error).split())}{where}"
