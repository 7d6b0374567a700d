"""The first operation, layer, token and element where a backend's forward differs."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from refmamba.backend import Backend, Runner
from refmamba.conformance.comparison import Difference, difference
from refmamba.conformance.operations import check_vector
from refmamba.conformance.vectors import encode
from refmamba.spec.codes import ACTIVATION_BITS
from refmamba.spec.mamba1 import Mamba
from refmamba.spec.operations import OPERATIONS
from refmamba.spec.scheme import LINEAR_LAYERS, Scheme
from refmamba.spec.trace import last_site


def operation_of(site: str, scheme: Scheme) -> str:
    """The operation that makes a site's value."""
    last = last_site(site)
    layer, _, side = last.rpartition(".")
    if layer not in (*LINEAR_LAYERS, "lm_head"):
        return {"embedding": "embed", "norm": "rms_norm", "norm_f": "rms_norm", "u": "silu", "delta": "step_size",
                "scan": "selective_scan", "ssm_state": "selective_scan", "conv_state": "conv1d"}.get(last, last)  # fmt: skip
    quantizer = scheme.inputs.get(layer)
    coded = "fixed_point" if quantizer is None else "code_static" if quantizer.scale == "static" else "code"
    made = {"in_codes": coded, "acc": "integer_product", "result": "rescale", "out_codes": "code"}
    return made.get(side, "dequantize and bias" if side == "out" else "input")


def sites_of(runner: Runner, tokens: Any) -> dict[str, Any]:
    """Everything that a runner shows of one sequence."""
    seen: dict[str, Any] = {}
    runner.prefill([tokens], logits="all", hook=lambda site, value: seen.update({site: np.array(value)}))
    return seen


def replay(reference: Mamba, offered: Mapping[str, Callable[..., Any]], seen: Mapping[str, Any], at: str) -> Difference | None:
    """One layer's operations, one by one, on the reference's own values: the first that a backend gets wrong."""
    model, config, e = reference.model, reference.config, reference.config.d_inner
    r, n = config.dt_rank, config.d_state

    def site(name: str) -> Any:
        return seen[f"{at}.{name}"]

    def linear(layer: str) -> Iterator[tuple[str, tuple[Any, ...], Any]]:
        name, w = operation_of(f"{at}.{layer}.in_codes", reference.scheme), model.params[f"{at}.{layer}.weight"]
        x = site(f"{layer}.in")
        if f"{at}.{layer}.smooth" in model.params:
            x = np.ldexp(x, -model.value(f"{at}.{layer}.smooth"))
        quantizer = reference.scheme.inputs.get(layer)
        arguments: tuple[Any, ...] = (x, ACTIVATION_BITS, layer)
        if quantizer and quantizer.scale == "static":
            arguments = (x, model.value(f"{at}.{layer}.absmax"), quantizer.bits, layer)
        elif quantizer:
            arguments = (x, quantizer.bits, layer, "per_row" if quantizer.scale == "per_token" else "per_tensor")
        codes = OPERATIONS[name](*arguments)
        yield name, arguments, codes
        yield "integer_product", (codes, w), site(f"{layer}.acc")
        yield "rescale", (site(f"{layer}.acc"), codes, w), site(f"{layer}.result")

    def calls() -> Iterator[tuple[str, tuple[Any, ...], Any]]:
        yield "rms_norm", (site("residual_in"), model.value(f"{at}.norm.weight"), config.norm_eps), site("norm")
        yield from linear("in_proj")
        c, z = np.split(site("in_proj.out"), 2, axis=1)
        bias = model.value(f"{at}.conv1d.bias") if config.use_conv_bias else None
        before = np.zeros((e, config.d_conv - 1), np.float32)
        weight = model.value(f"{at}.conv1d.weight")
        yield "conv1d", (c, before, weight, bias), (site("conv1d"), site("conv_state"))
        yield "silu", (site("conv1d"),), site("u")
        yield from linear("x_proj")
        yield from linear("dt_proj")
        yield "step_size", (site("dt_proj.out"), model.value(f"{at}.dt_proj.bias")), site("delta")
        B, C = np.split(site("x_proj.out")[:, r:], 2, axis=1)
        A, h = reference.A[int(at.split(".")[1])], np.zeros((e, n), np.float32)
        arguments = (site("u"), site("delta"), A, B, C, model.value(f"{at}.D"), h)
        yield "selective_scan", arguments, (site("scan"), site("ssm_state"))
        yield "gate", (site("scan"), z), site("gate")
        yield from linear("out_proj")

    for name, arguments, expected in calls():
        vector = {"name": f"{at}, on the reference's inputs", "arguments": [encode(a) for a in arguments],
                  "result": encode(expected), "compare": "value" if name == "integer_product" else "exact"}  # fmt: skip
        first = check_vector(name, offered[name], vector)[0] if name in offered else None
        if first:
            return first
    return None


def locate(reference: Mamba, runner: Runner, backend: Backend, tokens: Any) -> Difference | None:
    """The first site whose values differ; None where all are equal (so it is not the forward of one sequence).

    Where a fused backend shows only some sites, its single operations are tried on the layer that differs.
    """
    seen, found, equal = sites_of(reference, tokens), sites_of(runner, tokens), "the tokens"
    for site, expected in seen.items():
        if backend.sites is not None and last_site(site) not in backend.sites:
            continue
        operation = operation_of(site, reference.scheme)
        if site not in found:
            return Difference(operation, f"{site} is not shown")
        first, _ = difference(operation, f"{site} (equal up to {equal})", expected, found[site])
        if first and backend.sites is not None and site.startswith("layers."):
            return replay(reference, backend.operations(), seen, ".".join(site.split(".")[:2])) or first
        if first:
            return first
        equal = site
    return None
