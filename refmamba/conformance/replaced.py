"""The reference with some of its operations replaced: how a stranger's single operation runs inside whole models."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from refmamba.spec import arith, coders, codes, linear, mamba1, ops, parameters, transforms
from refmamba.spec.mamba1 import Mamba
from refmamba.spec.operations import OPERATIONS
from refmamba.spec.parameters import QuantizedModel
from refmamba.spec.scheme import Scheme

Functions = Mapping[str, Callable[..., Any]]
MODULES = (arith, codes, coders, linear, ops, mamba1, parameters, transforms)


@contextmanager
def replaced(functions: Functions) -> Iterator[None]:
    """The specification's functions of these names are others, wherever they are called from. For one thread."""
    places = [(module, name, getattr(module, name)) for module in MODULES for name in functions if hasattr(module, name)]
    try:
        for module, name, _ in places:
            setattr(module, name, functions[name])
        yield
    finally:
        for module, name, original in places:
            setattr(module, name, original)


class ReplacedRunner(Mamba):
    """The reference's forward with functions replaced."""

    def __init__(self, quantized: QuantizedModel, functions: Functions) -> None:
        self.functions = functions
        parameters_as_they_are = quantized.held()  # a replaced operation runs in the forward: the parameters are given
        with replaced(functions), np.errstate(all="ignore"):
            super().__init__(parameters_as_they_are)

    def prefill(self, *arguments: Any, **options: Any) -> Any:
        """See `refmamba.backend.Runner.prefill`."""
        with replaced(self.functions), np.errstate(all="ignore"):
            return super().prefill(*arguments, **options)


class Replaced:
    """A backend: the reference's forward with functions replaced.

    calls: how often each has been called. offers: what `operations` gives, by default the replaced ones alone.
    """

    name, device, exact = "reference", "cpu", True
    sites: frozenset[str] | None = None

    def __init__(self, functions: Functions, runner: type[ReplacedRunner] = ReplacedRunner) -> None:
        self.calls: Counter[str] = Counter()
        self.functions = {name: self._counted(name, function) for name, function in functions.items()}
        self.runner = runner

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function, assigned=(), updated=())
        def operation(*arguments: Any, **named: Any) -> Any:
            self.calls[name] += 1
            with replaced({replacement: OPERATIONS[replacement] for replacement in self.functions}):
                return function(*arguments, **named)  # which may call the specification's own

        operation.__name__ = name  # what a trace calls it
        return operation

    def supports(self, scheme: Scheme) -> str | None:
        """Every scheme, as the reference does."""
        return None

    def load(self, model: QuantizedModel) -> Mamba:
        """Make a model ready to run."""
        return self.runner(model, self.functions)

    def operations(self) -> Functions:
        """The replaced operations."""
        return {name: self.functions[name] for name in OPERATIONS if name in self.functions}
