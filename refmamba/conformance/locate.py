"""The first operation, layer, token and element where a backend's forward differs."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from refmamba.backend import Backend, Runner
from refmamba.conformance.comparison import Difference, difference
from refmamba.conformance.operations import check_call
from refmamba.spec.mamba1 import Mamba
from refmamba.spec.trace import Trace, last_site


def shown(runner: Runner, tokens: Any) -> dict[str, Any]:
    """Every value that a runner shows of one sequence, by its site."""
    values: dict[str, Any] = {}
    with np.errstate(all="ignore"):
        runner.prefill([tokens], logits="all", hook=lambda site, value: values.update({site: np.array(value)}))
    return values


def replay(layer: Trace, operations: Mapping[str, Callable[..., Any]]) -> Difference | None:
    """The recorded operations of the reference, one by one with the same arguments: the first that a backend gets wrong."""
    for step in layer:
        if step.operation in operations:
            where = f"{step.sites[0]}, on the reference's inputs"
            compare = "value" if step.operation == "integer_product" else "exact"
            first, _ = check_call(step.operation, operations[step.operation], where, step.arguments, step.result, compare)
            if first:
                return first
    return None


def locate(reference: Mamba, runner: Runner, backend: Backend, tokens: Any) -> Difference | None:
    """The first site whose values differ; None where all are equal (so it is not the forward of one sequence).

    Where a fused backend shows only some sites, its single operations are tried on the layer that differs.
    """
    trace, expected, computed = reference.trace(tokens), shown(reference, tokens), shown(runner, tokens)
    made = {site: step.operation for step in trace for site in step.sites}
    equal = "the tokens"
    for site, value in expected.items():
        if backend.sites is not None and last_site(site) not in backend.sites:
            continue
        operation = made.get(site, "input")
        if site not in computed:
            return Difference(operation, f"{site} is not shown")
        first, _ = difference(operation, f"{site} (equal up to {equal})", value, computed[site])
        if first and backend.sites is not None and site.startswith("layers."):
            return replay(trace.layer(int(site.split(".")[1])), backend.operations()) or first
        if first:
            return first
        equal = site
    return None
