"""The backend protocol: what every implementation of the specification offers, and how one is found by name."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

from refmamba.backends import BACKENDS
from refmamba.errors import BackendError
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


class Backend(Protocol):
    """An implementation. exact: it claims the specification's bits, and `refmamba verify` holds it to that."""

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


def check_support(backend: Backend, scheme: Scheme) -> None:
    """Raise BackendError where the backend does not know a coder, a scale or a transform of the scheme."""
    if unknown := backend.supports(scheme):
        raise BackendError(f"backend '{backend.name}' does not know {unknown} (scheme {scheme.name}); use --backend reference")


def load_backend(name: str, device: str | None = None) -> Backend:
    """A backend by its short name, or a stranger's as `package.module:Class`; the class is called with device=.

    Raises BackendError where it is unknown, cannot be imported, or does not know the device.
    """
    module, _, attribute = (BACKENDS[name].path if name in BACKENDS else name).partition(":")
    if not attribute:
        raise BackendError(f"unknown backend '{name}'; there are {', '.join(BACKENDS)}, and package.module:Class")
    try:
        backend: Backend = getattr(importlib.import_module(module), attribute)(device=device)
    except ImportError as error:
        extra = BACKENDS[name].extra if name in BACKENDS else ""
        hint = f"; install it with: pip install 'refmamba[{extra}]'" if extra else ""
        raise BackendError(f"backend '{name}' cannot be imported: {error}{hint}") from error
    except AttributeError as error:
        raise BackendError(f"backend '{name}': {module} has no {attribute}") from error
    except (TypeError, ValueError) as error:  # no name of a module, or nothing that is made with device=
        raise BackendError(f"backend '{name}' is no backend: {error}") from error
    parts = ("name", "device", "exact", "supports", "load", "operations")
    if missing := [part for part in parts if not hasattr(backend, part)]:
        raise BackendError(f"backend '{name}' is no backend: it has no {', '.join(missing)}")
    return backend
