"""Mamba inference with bit-exact integer quantization: a NumPy specification, and backends that give the same bits.

>>> import refmamba
>>> model = refmamba.load("small", scheme="int8")
>>> print(f"It was a{model.generate('It was a', max_new_tokens=8, temperature=0.7, seed=1)}")
It was a long way
along. At last
"""

import sys
from typing import TYPE_CHECKING

from refmamba.errors import (
    BackendError,
    CheckpointError,
    DataError,
    FileError,
    HubError,
    NonFiniteError,
    RefmambaError,
    SchemeError,
    TokenizerError,
)  # fmt: skip
from refmamba.spec import SPEC_VERSION

if TYPE_CHECKING:
    from refmamba.run.model import Model, load, quantize
    from refmamba.spec.scheme import Scheme

__version__ = "0.1.0"
__all__ = [
    "SPEC_VERSION",
    "BackendError",
    "CheckpointError",
    "DataError",
    "FileError",
    "HubError",
    "Model",
    "NonFiniteError",
    "RefmambaError",
    "Scheme",
    "SchemeError",
    "TokenizerError",
    "__version__",
    "load",
    "quantize",
]

if not TYPE_CHECKING:  # where a type checker would take it for any name

    def __getattr__(name: str) -> object:
        """What needs NumPy, imported when it is asked for first."""
        import importlib

        places = dict.fromkeys(("Model", "load", "quantize"), "refmamba.run.model") | {"Scheme": "refmamba.spec.scheme"}
        if name not in places:
            raise AttributeError(f"module 'refmamba' has no attribute '{name}'")
        return getattr(importlib.import_module(places[name]), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


if "IPython" in sys.modules:  # a notebook: it shows schemes, codes and traces as tables
    from refmamba.teach.ipython import register

    register()
    del register
