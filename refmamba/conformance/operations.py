"""Single operations of a backend on their vectors."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmamba.backend import Backend
from refmamba.conformance.comparison import Difference, difference, parts
from refmamba.conformance.vectors import decode, read_vectors
from refmamba.errors import NonFiniteError
from refmamba.spec.operations import OPERATIONS


@dataclass
class Row:
    """One line of the table: an operation, or a scheme's check on a whole model."""

    check: str
    scheme: str
    cases: int = 0
    exact: int = 0
    failed: int = 0
    max_ulp: int = 0
    offered: bool = True


def check_call(
    operation: str, function: Callable[..., Any], where: str, arguments: Sequence[Any], expected: Any, compare: str
) -> tuple[Difference | None, int]:
    """Call a function on copies of the arguments. expected: the result, or NonFiniteError where it must be raised.

    Whatever a backend raises is a difference, and so is an argument that the call changes. Returns the first difference, and
    the largest distance in float32 steps.
    """
    given = copy.deepcopy(list(arguments))
    try:
        with np.errstate(all="ignore"):
            found = function(*given)
    except NonFiniteError as error:
        return (None if expected is NonFiniteError else Difference(operation, f"{where}: raised {error}")), 0
    except Exception as error:  # a stranger's backend may raise anything
        return Difference(operation, f"{where}: raised {type(error).__name__}: {error}"), 0
    if expected is NonFiniteError:
        return Difference(operation, f"{where}: a NaN or an infinity was not refused"), 0
    for before, after in zip(arguments, given, strict=True):
        if any(x.tobytes() != y.tobytes() for (_, x), (_, y) in zip(parts(before), parts(after), strict=True)):
            return Difference(operation, f"{where}: an argument was changed in place"), 0
    wanted, results = parts(expected), parts(found)
    if [name for name, _ in wanted] != [name for name, _ in results]:
        return Difference(operation, f"{where}: the result is not of the form {[name for name, _ in wanted]}"), 0
    largest = 0
    for (name, value), (_, result) in zip(wanted, results, strict=True):
        first, distance = difference(operation, f"{where}, {name}", value, result, compare)
        if first:
            return first, distance
        largest = max(largest, distance)
    return None, largest


def check_vector(operation: str, function: Callable[..., Any], vector: Mapping[str, Any]) -> tuple[Difference | None, int]:
    """Run one vector; see `check_call`."""
    result = vector["result"]
    raises = isinstance(result, dict) and "raises" in result
    arguments = [decode(argument) for argument in vector["arguments"]]
    where, expected = f"vector '{vector['name']}'", NonFiniteError if raises else decode(result)
    return check_call(operation, function, where, arguments, expected, vector["compare"])


def check_operations(backend: Backend) -> Iterator[tuple[Row, Difference | None]]:
    """Every operation of the specification on its vectors, in reading order."""
    offered = backend.operations()
    for operation in OPERATIONS:
        row, first = Row(operation, ""), None
        for vector in read_vectors(operation):
            row.cases += 1
            if operation not in offered:
                row.offered = False
                continue
            wrong, distance = check_vector(operation, offered[operation], vector)
            row.failed += wrong is not None
            row.exact += wrong is None and distance == 0
            row.max_ulp = max(row.max_ulp, distance if vector["compare"].startswith("ulp") else 0)
            first = first or wrong
        yield row, first
