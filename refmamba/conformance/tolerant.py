"""Whole models of float kernels: how much they change the next token's probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refmamba.backend import Backend
from refmamba.conformance.comparison import Difference, Errors, Tolerance, difference, errors, largest
from refmamba.conformance.models import ModelChecks, Results
from refmamba.conformance.operations import Row
from refmamba.run.perplexity import divergence
from refmamba.spec.parameters import QuantizedModel


@dataclass
class Measures:
    """What the logits of some calls are off by."""

    divergence: float = 0.0  # the sum over all positions
    positions: int = 0
    same: int = 0
    errors: Errors = field(default_factory=Errors)
    most: float = -1.0
    place: str = ""
    change: str | None = None

    def add(self, where: str, apart: Any, changes: Any, off: Errors) -> None:
        """One sequence's: the divergence at each position, the positions where the likeliest token is another."""
        self.divergence, self.positions = self.divergence + float(apart.sum()), self.positions + len(apart)
        self.same, self.errors = self.same + len(apart) - len(changes), largest((self.errors, off))
        if apart.max() > self.most:
            self.most, self.place = float(apart.max()), f"{where}, position {apart.argmax()}"
        if len(changes) and self.change is None:
            self.change = f"{where}, position {changes[0]}"

    @property
    def mean(self) -> float:
        """The divergence of a position."""
        return self.divergence / max(1, self.positions)

    def show(self, row: Row) -> None:
        """Enter it in a row."""
        row.errors, row.divergence, row.first_change = self.errors, self.mean, self.change
        row.agreement = self.same / self.positions if self.positions else None


class TolerantChecks(ModelChecks):
    """`ModelChecks`, within a tolerance: logits by divergence; of states only that a call leaves the one it was given."""

    def __init__(self, backend: Backend, model: QuantizedModel, sequences: Sequence[Any], tolerance: Tolerance, **options: Any):
        super().__init__(backend, model, sequences, **options)
        self.tolerance = tolerance
        self.measured = [Measures()]  # of each check; those of all calls first

    def same_state(self, where: str, expected: Any, state: Any) -> Difference | None:
        """What a state is off by shows in the logits after it."""
        return None

    def rows(self, operation: str, where: str, expected: Any, rows: Any) -> Difference | None:
        """Logits: the divergence at each position, and whether the likeliest token is the same."""
        expected, rows = np.asarray(expected), np.asarray(rows)
        if expected.shape != rows.shape or not np.isfinite(rows).all():
            first, _ = difference(operation, where, expected, rows, self.tolerance)
            return first or Difference(operation, f"{where}: a logit is NaN or infinite")
        if not len(rows):
            return None
        apart = divergence(expected, rows)
        changes = np.flatnonzero(expected.argmax(-1) != rows.argmax(-1))
        for measures in (self.measured[0], self.measured[-1]):
            measures.add(where, apart, changes, errors(expected, rows))
        return None

    def run(self) -> Results:
        """Every check, with its measures; then those of all calls, whose mean divergence is what the tolerance limits.

        A check alone may have few positions, and one unlucky one among them.
        """
        self.measured.append(Measures())
        for row, first in super().run():
            self.measured[-1].show(row)
            self.measured.append(Measures())
            yield row, first
        row, total = Row("model: all calls", self.reference.scheme.name, 1), self.measured[0]
        total.show(row)
        far = None
        if not total.mean <= self.tolerance.divergence:
            where = f"mean Kullback-Leibler divergence of the next token, scheme {row.scheme}, most at {total.place}"
            far = Difference("whole model", where, [], f"at most {self.tolerance.divergence:g}", f"{total.mean:.3g}")
            row.failed = 1
        yield row, far

    def locate(self, sequences: Sequence[Any], first: Difference) -> Difference:
        """A float kernel differs at its first operation already: there is nothing to be traced."""
        return first
