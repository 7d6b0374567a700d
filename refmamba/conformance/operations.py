"""Single operations on their vectors: a backend's, or a stranger's."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmamba.backend import told
from refmamba.conformance.comparison import Difference, Errors, Rule, Tolerance, difference, largest, parts
from refmamba.conformance.vectors import decode, read_vectors
from refmamba.errors import NonFiniteError
from refmamba.spec.operations import OPERATIONS


@dataclass
class Row:
    """One line of the table: an operation on its vectors, or a scheme's check on a whole model.

    cases: what was compared. exact: without a difference in a bit. calls: of the operation that is tried
    inside a model, where one is.
    errors: the largest. divergence, agreement: of whole models within a tolerance (`refmamba.conformance.tolerant`).
    """

    check: str
    scheme: str
    cases: int = 0
    exact: int = 0
    failed: int = 0
    raised: int = 0
    max_ulp: int = 0
    offered: bool = True
    calls: int | None = None
    errors: Errors | None = None
    divergence: float | None = None
    agreement: float | None = None
    first_change: str | None = None
    operation: str | None = None

    @property
    def verdict(self) -> str:
        """One or two words."""
        if not self.offered:
            return "not offered"
        if self.failed:
            return "ERROR" if self.raised == self.failed else "FAILED"
        return "not run" if self.cases == 0 or self.calls == 0 else "ok"


def check_call(
    operation: str, function: Callable[..., Any], where: str, arguments: Sequence[Any], expected: Any, compare: Rule
) -> tuple[Difference | None, Errors]:
    """Call a function on copies of the arguments. expected: the result, or NonFiniteError where it must be raised.

    Whatever the function raises is a difference, and so is an argument that the call changes. Returns the first difference, and
    how far the results are apart.
    """
    copies = copy.deepcopy(list(arguments))
    try:
        with np.errstate(all="ignore"):
            result = function(*copies)
    except NonFiniteError as error:
        return (None if expected is NonFiniteError else Difference(operation, f"{where}: raised {error}")), Errors()
    except Exception as error:  # a stranger's function may raise anything
        return Difference(operation, f"{where}: {told(error)}", raised=True), Errors()
    if expected is NonFiniteError:
        return Difference(operation, f"{where}: a NaN or an infinity was not refused"), Errors()
    for before, after in zip(arguments, copies, strict=True):
        if any(x.tobytes() != y.tobytes() for (_, x), (_, y) in zip(parts(before), parts(after), strict=True)):
            return Difference(operation, f"{where}: an argument was changed in place"), Errors()
    names, results = [name for name, _ in parts(expected)], parts(result)
    if [name for name, _ in results] != names:
        return Difference(operation, f"{where}: the result is not of the form {names}"), Errors()
    apart = []
    for (name, value), (_, other) in zip(parts(expected), results, strict=True):
        first, errors = difference(operation, f"{where}, {name}", value, other, compare)
        apart.append(errors)
        if first:
            return first, largest(apart)
    return None, largest(apart)


def rounded(value: Any, tolerance: Tolerance) -> Any:
    """An argument in the format of a tolerance, so that a kernel is not blamed for what its input lost; as it is where it holds
    integers. None where the format does not hold it."""
    if not isinstance(value, np.ndarray) or value.dtype != np.float32:
        return value
    return tolerance.format.rounded(value) if tolerance.format.holds(value) else None


def within(vector: Mapping[str, Any], operation: str, tolerance: Tolerance) -> tuple[list[Any], Any] | None:
    """A vector's arguments in the format of a tolerance, and what the specification makes of them. None where the format has no
    room for them, or where the operation must refuse: what a float kernel does then is not asked."""
    arguments = [decode(argument) for argument in vector["arguments"]]
    values = [rounded(argument, tolerance) for argument in arguments]
    if any(value is None and argument is not None for value, argument in zip(values, arguments, strict=True)):
        return None
    try:
        with np.errstate(all="ignore"):
            expected = OPERATIONS[operation](*copy.deepcopy(values))
    except NonFiniteError:
        return None
    floats = [x for _, x in parts(expected) if x.dtype.kind == "f"]
    return (values, expected) if all(tolerance.format.holds(x) for x in floats) else None


def check_vector(operation: str, function: Callable[..., Any], vector: Mapping[str, Any]) -> tuple[Difference | None, Errors]:
    """Run one vector; see `check_call`."""
    result = vector["result"]
    raises = isinstance(result, dict) and "raises" in result
    arguments = [decode(argument) for argument in vector["arguments"]]
    where, expected = f"vector '{vector['name']}'", NonFiniteError if raises else decode(result)
    return check_call(operation, function, where, arguments, expected, vector["compare"])


def check_operations(
    offered: Mapping[str, Callable[..., Any]], tolerance: Tolerance | None = None
) -> Iterator[tuple[Row, Difference | None]]:
    """Every operation of the specification on its vectors, in reading order."""
    for operation in OPERATIONS:
        row, first, apart = Row(operation, "", offered=operation in offered), None, []
        for vector in read_vectors(operation):
            if operation not in offered:
                row.cases += 1
                continue
            if tolerance is None:
                wrong, errors = check_vector(operation, offered[operation], vector)
            elif (kept := within(vector, operation, tolerance)) is None:
                continue
            else:
                where = f"vector '{vector['name']}'"
                wrong, errors = check_call(operation, offered[operation], where, *kept, tolerance)
            row.cases += 1
            row.failed += wrong is not None
            row.raised += wrong is not None and wrong.raised
            row.exact += wrong is None and errors == Errors()
            apart.append(errors)
            row.max_ulp = max(row.max_ulp, errors.ulp if tolerance or vector["compare"].startswith("ulp") else 0)
            first = first or wrong
        row.errors = largest(apart) if tolerance and row.offered else None
        yield row, first
