"""GPTQ (Frantar and others, arXiv 2210.17323): how the codes of a linear layer's weight are chosen from a text.

A scheme rounds each weight by itself. GPTQ rounds column by column, and lets the columns that are left make up for the error
on the inputs that a text gives: of all codes, it looks for those whose product is near the product of the weight. It is a
choice of codes and not a scheme: the codes are what is saved, so its float64 arithmetic is no part of what must agree.
"""

import sys
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmamba.backend import Backend
from refmamba.errors import DataError
from refmamba.run.progress import bar
from refmamba.spec.arith import F32Array, F64Array, IntArray
from refmamba.spec.calibrate import WEIGHTS_ONLY
from refmamba.spec.coders import ParameterGrouped
from refmamba.spec.codes import STEPPED, Codes, absmax, choose_steps, scale_of
from refmamba.spec.config import MambaConfig, ParameterSource, kind_of
from refmamba.spec.ops import rms_norm
from refmamba.spec.parameters import QuantizedModel, parameter_coder, quantize_model
from refmamba.spec.scheme import LINEAR_LAYERS, Scheme
from refmamba.spec.transforms import rotate, rotated

MOST_TOKENS, CALL = 16384, 512  # of the text; a call
ENOUGH_TOKENS = 2048  # fewer see too few directions of the inputs
DAMPING = 0.01  # of the mean of the diagonal, which is added to it
COLUMNS = 128  # whose errors are carried to the columns behind them together
MEMORY = 2**31  # bytes for the sums of the layers that one pass over the text collects


def round_by_gptq(
    source: ParameterSource, scheme: Scheme, tokens: IntArray, calibration: Mapping[str, F32Array] | None, backend: Backend
) -> QuantizedModel:
    """A checkpoint under a scheme, the weights of its linear layers rounded by GPTQ.

    tokens: (L,) of a text; the first MOST_TOKENS are read, in calls of CALL with the state carried, by a forward with `int8`'s
    weights and no activation in codes, as in calibration. The embedding and the head keep the scheme's own rounding. Raises
    DataError for a scheme that codes none of these weights or smooths; NonFiniteError.
    """
    layers = [layer for layer in LINEAR_LAYERS if f"{layer}.weight" in scheme.weights]
    if not layers:
        raise DataError(f"scheme {scheme.name} codes no weight of a linear layer, so there is nothing to round by GPTQ")
    if scheme.smooth:
        raise DataError(f"scheme {scheme.name} smooths, which GPTQ does not go with; choose int8-static or int8-hadamard")
    if len(tokens) < ENOUGH_TOKENS:
        print(f"GPTQ on {len(tokens)} tokens is too little: give a text of thousands with --calibrate", file=sys.stderr)
    config, turned = source.config, rotated(source, scheme.rotate)
    runner, codes = backend.load(quantize_model(source, WEIGHTS_ONLY)), dict[str, Any]()
    groups = list(passes(config, layers))
    with bar(config.n_layer * len(layers), "rounding by GPTQ", "matrix") as done:
        for indices in groups:
            sums = squares(runner, source, indices, layers, scheme, tokens[:MOST_TOKENS])
            for site in list(sums):
                name = f"{site}.weight"
                quantizer = scheme.weights[kind_of(name)]
                grouped = parameter_coder(kind_of(name), scheme)
                group = grouped.group if isinstance(grouped, ParameterGrouped) else 0
                whole = quantizer.scale == "per_tensor"
                codes[name] = gptq(turned.read(name), sums.pop(site), quantizer.bits, name, group, per_tensor=whole)
                done.update()
    model = quantize_model(source, scheme, calibration)
    return replace(model, params=ChainMap(codes, model.params))  # type: ignore[arg-type]  # it reads, and changes nothing


def passes(config: MambaConfig, layers: Sequence[str]) -> Iterator[range]:
    """The layers of the model, as many at a time as MEMORY holds the sums of."""
    shapes = config.shapes()
    size = sum(8 * shapes[f"layers.0.{layer}.weight"][1] ** 2 for layer in layers)
    count = max(1, MEMORY // size)
    for first in range(0, config.n_layer, count):
        yield range(first, min(config.n_layer, first + count))


def squares(
    runner: Any, source: ParameterSource, indices: range, layers: Sequence[str], scheme: Scheme, tokens: IntArray
) -> dict[str, F64Array]:
    """X^T X of the inputs of some layers' linear layers, (K, K) float64 a site, over all tokens."""
    config, sums = source.config, dict[str, F64Array]()
    norms = {i: source.read(f"layers.{i}.norm.weight") for i in indices}

    def add(site: str, x: F32Array) -> None:
        layer = kind_of(site)
        if layer in layers:
            wide = (rotate(x, site) if layer in scheme.rotate else x).astype(np.float64)
            sums[site] = sums[site] + wide.T @ wide if site in sums else wide.T @ wide

    def look(site: str, value: NDArray[Any]) -> None:
        """Every backend shows these sites, from which all inputs are known."""
        if not site.startswith("layers."):
            return
        i, name = int(site.split(".")[1]), kind_of(site)
        if i not in norms:
            return
        if name == "residual_in":
            add(f"layers.{i}.in_proj", rms_norm(value, norms[i], config.norm_eps))
        elif name == "u":
            add(f"layers.{i}.x_proj", value)
        elif name == "x_proj.out":
            add(f"layers.{i}.dt_proj", value[:, : config.dt_rank])
        elif name == "gate":
            add(f"layers.{i}.out_proj", value)

    state = None
    for start in range(0, len(tokens), CALL):
        _, state = runner.prefill([tokens[start : start + CALL]], state, logits="none", hook=look)
    return sums


def gptq(weight: F32Array, inputs: F64Array, bits: int, name: str, group: int = 0, *, per_tensor: bool = False) -> Codes:
    """Codes of a weight (rows, K) for inputs with the sums X^T X (K, K). Raises NonFiniteError, naming the weight.

    group: columns that share a whole step, which is chosen when the group begins, from the weights as they are then; 0: none.
    per_tensor: one scale for the weight, else one a row.
    """
    largest = 2 ** (bits - 1) - 1
    m = absmax(weight, name, "per_tensor" if per_tensor else "per_row")
    scale = (
        np.where(m == 0, np.float32(1), np.float32(STEPPED) / np.where(m == 0, np.float32(1), m))
        if group
        else scale_of(m, bits)
    )
    left = np.where(m == 0, 0.0, weight.astype(np.float64) * scale)  # in units of the codes: what is still to be rounded
    rows, columns = left.shape
    U = inverse_factor(inputs)
    q, steps = np.zeros((rows, columns), np.int8), np.ones((rows, -(-columns // (group or columns))), np.uint8)
    step = np.ones((rows, 1))
    for start in range(0, columns, COLUMNS):
        stop = min(columns, start + COLUMNS)
        errors = np.zeros((rows, stop - start))
        for j in range(start, stop):
            if group and j % group == 0:
                last = min(columns, j + group)
                # What the errors of this block of columns still owe to the group's columns behind the block.
                now = left[:, j:last] - errors[:, : j - start] @ U[start:j, j:last] * (np.arange(j, last) >= stop)
                part = steps[:, j // group : j // group + 1].copy()
                choose_steps(now, group, largest, np.zeros(now.shape, np.int8), part)
                steps[:, j // group : j // group + 1], step = part, part.astype(np.float64)
            code = np.clip(np.rint(left[:, j] / step[:, 0]), -largest, largest)
            q[:, j] = code
            errors[:, j - start] = (left[:, j] - code * step[:, 0]) / U[j, j]
            left[:, j + 1 : stop] -= errors[:, j - start, None] * U[j, j + 1 : stop]
        left[:, stop:] -= errors @ U[start:stop, stop:]
    return Codes(q, scale, bits, steps, group) if group else Codes(q, scale, bits)


def inverse_factor(inputs: F64Array) -> F64Array:
    """The upper Cholesky factor U of (X^T X + damping)^-1, so that U^T U is the inverse. (K, K) -> (K, K)."""
    diagonal = np.diag(inputs)
    damped = inputs + np.diag(np.full(len(inputs), DAMPING * max(float(diagonal.mean()), np.finfo(np.float64).tiny)))
    upper: F64Array = np.linalg.cholesky(np.linalg.inv(damped)).T
    return upper
