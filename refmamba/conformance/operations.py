"""Single operations of a backend on their vectors."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmamba.backend import Backend
from refmamba.conformance.comparison import Difference, difference, parts
from refmamba.conformance.vectors import decode, encode, read_vectors
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


def check_vector(operation: str, function: Callable[..., Any], vector: Mapping[str, Any]) -> tuple[Difference | None, int]:
    """Run one vector. Whatever a backend raises is a difference."""
    where, wanted = f"vector '{vector['name']}'", vector["result"]
    raised = wanted.get("raises") if isinstance(wanted, dict) else None
    arguments = [decode(a) for a in vector["arguments"]]
    try:
        with np.errstate(all="ignore"):
            found = function(*arguments)
    except NonFiniteError as error:
        return (None if raised else Difference(operation, f"{where}: raised {error}")), 0
    except Exception as error:  # a stranger's backend may raise anything
        return Difference(operation, f"{where}: raised {type(error).__name__}: {error}"), 0
    if raised:
        return Difference(operation, f"{where}: a NaN or an infinity was not refused"), 0
    if [encode(a) for a in arguments] != vector["arguments"]:
        return Difference(operation, f"{where}: an argument was changed in place"), 0
    expected, results = parts(decode(wanted)), parts(found)
    if [name for name, _ in expected] != [name for name, _ in results]:
        return Difference(operation, f"{where}: the result is not of the form {[name for name, _ in expected]}"), 0
    largest = 0
    for (name, e), (_, f) in zip(expected, results, strict=True):
        first, distance = difference(operation, f"{where}, {name}", e, f, vector["compare"])
        if first:
            return first, distance
        largest = max(largest, distance)
    return None, largest


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
