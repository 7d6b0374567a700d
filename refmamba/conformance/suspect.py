"""Which operation of a fused backend is wrong, where it shows only some values and offers few single operations.

The backend's own values at the sites that it shows cut its forward into pieces. Each piece is computed again by the reference,
from the backend's values at its beginning; so a piece is wrong only if something inside it is. Over several schemes every
operation is in many pieces. If one operation is wrong, it is in all wrong pieces: the suspect is the one of these that is in
the fewest right ones. Operations that always stand side by side are told apart by models in which one of them has nothing to
do.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from refmamba.backend import Backend
from refmamba.conformance.comparison import Difference, difference
from refmamba.conformance.locate import shown
from refmamba.spec.arith import F32Array
from refmamba.spec.codes import Codes, FixedPoint, Param
from refmamba.spec.mamba1 import Mamba
from refmamba.spec.parameters import QuantizedModel, linear_sites
from refmamba.spec.trace import Step, Tracer, last_site

PASSES = 32.0  # of what enters silu: silu(x) is x from 18 on
FAMILIES = {"absmax": ("code", "code_static", "fixed_point"), "quantize": ("code", "code_static")}  # what they share
NARROW = 8  # columns that no way of cutting rows up loses
Feature = tuple[str, ...]


def features(step: Step, result: int = 0) -> set[Feature]:
    """One result of an operation, and its way of being called: on which codes, at which widths."""
    kinds = [_kind(argument) for argument in step.arguments]
    name, site = step.operation, last_site(step.sites[result])
    which = (f"for {site}",) if len(step.sites) > 1 or name == "add" else ()
    families: set[Feature] = {(family,) for family, members in FAMILIES.items() if name in members}
    factors = [argument for argument in step.arguments if isinstance(argument, Codes | FixedPoint)]
    if any(isinstance(factor, Codes) for factor in factors):
        families.add((name, "with a scale"))
    if name == "integer_product":
        columns = factors[0].q.shape[-1]
        families |= {(name, f"of {columns} columns"), (name, f"of an {'odd' if columns % 2 else 'even'} number of columns")}
    return families | {(name,), (name, *which), (name, *which, *(kind for kind, _ in kinds if kind)),
            (name, *which, *(f"{kind} {detail}".strip() for kind, detail in kinds if kind or detail))}  # fmt: skip


def _kind(argument: Any) -> tuple[str, str]:
    """What an argument is, and in which form."""
    if isinstance(argument, Codes):
        return "codes", f"of {argument.bits} bits with {'one scale' if argument.scale.ndim == 0 else 'a scale a row'}"
    if isinstance(argument, FixedPoint):
        return "fixed point", ""
    plain = argument is None or isinstance(argument, int) or (isinstance(argument, str) and argument.startswith("per_"))
    return "", str(argument) if plain else ""


class Pieces(Tracer):
    """A tracer of the reference's forward that puts in a backend's values where there are any, and judges each piece between.

    idle: operations that have nothing to do in this model. verdicts: of each piece, what it ran, and whether it was wrong.
    """

    def __init__(self, values: Mapping[str, Any], idle: frozenset[str]) -> None:
        super().__init__()
        self.values, self.idle, self.verdicts = values, idle, list[tuple[set[Feature], bool]]()
        self._pending, self._wrong = set[Feature](), False

    def __call__(self, sites: str, operation: Callable[..., Any], *arguments: Any) -> Any:
        """See `Tracer`: the result, or the backend's."""
        step = Step(operation.__name__, arguments, tuple(sites.split()), operation(*arguments))
        idle = step.operation in self.idle and not step.sites[0].startswith("lm_head")
        before, after, results = set(self._pending), set[Feature](), []
        for i, (site, value) in enumerate(step.values()):
            ran = set() if idle else features(step, i)
            if hasattr(value, "q") or site not in self.values:
                results.append(value)
                after |= before | ran  # for the next piece
                continue
            self._pending = before | ran
            results.append(self._judged(site, value))
        self._pending = after
        return tuple(results) if len(results) > 1 else results[0]

    def see(self, site: str, value: Any) -> None:
        """The same for a value that has one more name."""
        if site in self.values and not hasattr(value, "q"):
            value[...] = self._judged(site, value)
            self._pending = set()

    def _judged(self, site: str, value: Any) -> Any:
        if site not in self.values:
            return value
        self._wrong = difference("", site, value, self.values[site])[0] is not None
        if self._pending:
            self.verdicts.append((set(self._pending), self._wrong))
        same_form = value.shape == self.values[site].shape and value.dtype == self.values[site].dtype
        return self.values[site].copy() if same_form else value


def pieces(backend: Backend, model: QuantizedModel, idle: frozenset[str], tokens: Any) -> list[tuple[set[Feature], bool]]:
    """The verdicts of one sequence's forward."""
    reference = Mamba(model)
    judge, state = Pieces(shown(backend.load(model), tokens), idle), reference.initial_state(1)
    with np.errstate(all="ignore"):
        reference.forward(tokens, state.conv[0], state.ssm[0], "all", judge)
    return judge.verdicts


def variants(model: QuantizedModel) -> Iterator[tuple[QuantizedModel, frozenset[str]]]:
    """A model, and some in which one operation has nothing to do: named beside each."""
    held = model.held()
    yield held, frozenset()
    weights = {f"{site}.weight": held.params[f"{site}.weight"] for site in linear_sites(held.config)}
    lone = {name: _coded(weight, _one_each_row) for name, weight in weights.items() if not name.startswith("lm_head")}
    yield _with(held, lone), frozenset({"integer_product"})  # sums of one term, which is a code times a power of two
    flat: dict[str, Param] = {name: _coded(weight, np.zeros_like) for name, weight in weights.items() if ".dt_proj." in name}
    biases = {name: held.value(name) for name in held.params if name.endswith("dt_proj.bias")}
    flat |= {name: np.zeros_like(bias) for name, bias in biases.items()}
    yield _with(held, flat), frozenset({"step_size"})  # of zeros
    if held.config.use_bias:
        e, open_gate = held.config.d_inner, dict[str, Param]()
        for i in range(held.config.n_layer):
            name = f"layers.{i}.in_proj"
            bias = held.value(f"{name}.bias").copy()
            bias[e:] = PASSES
            open_gate[f"{name}.bias"] = bias
            open_gate[f"{name}.weight"] = _coded(held.params[f"{name}.weight"], lambda q: _first_rows(q, e))
        yield _with(held, open_gate), frozenset({"gate"})


def _with(model: QuantizedModel, params: Mapping[str, Param]) -> QuantizedModel:
    return replace(model, params={**model.params, **params})


def _coded(param: Param, change: Callable[[Any], Any]) -> Param:
    """A parameter with its integers, or its numbers where it is not in codes, changed."""
    if isinstance(param, Codes | FixedPoint):
        return replace(param, q=change(param.q))
    values: F32Array = change(param)
    return values


def _one_each_row(q: Any) -> Any:
    columns = max(1, min(NARROW, q.shape[1] - 1))
    lone = np.zeros_like(q)
    lone[np.arange(len(q)), np.arange(len(q)) % columns] = 2**22 if q.dtype == np.int32 else 1
    return lone


def _first_rows(q: Any, rows: int) -> Any:
    return np.where(np.arange(len(q))[:, None] < rows, q, 0).astype(q.dtype)


def suspect(backend: Backend, models: Sequence[QuantizedModel], first: Difference) -> Difference:
    """The first difference, with the operation that is most likely wrong as its name; as it is where nothing can be said.

    Single operations that the backend offers have been tried on their vectors: they are not suspected.
    """
    tried, wrong, right, total = set(backend.operations()), Counter[Feature](), Counter[Feature](), 0
    alone: dict[str, None] = {}  # operations that a wrong piece has nothing besides
    for model in models:
        tokens = np.random.Generator(np.random.PCG64(1)).integers(0, model.config.vocab_size, TOKENS)
        for variant, idle in variants(model):
            for ran, failed in pieces(backend, variant, idle, tokens):
                (wrong if failed else right).update(feature for feature in ran if feature[0] not in tried)
                total += failed
                names = {name for name, *_ in ran} - FAMILIES.keys()
                if failed and len(names) == 1:
                    alone |= dict.fromkeys(names)
    if not wrong:
        return first
    candidates = [feature for feature in wrong if feature[0] in alone] or list(wrong)
    best = max(candidates, key=lambda feature: (wrong[feature], -right[feature], -_place(feature[0]), -len(feature)))
    evidence = f"in {wrong[best]} of the {total} pieces that are wrong, and in {right[best]} that are right"
    return replace(first, operation=best[0], where=f"{first.where}; {', '.join(best)} is {evidence}")


TOKENS = 100  # of the sequence
PLACES = ("embed", "rms_norm", "divide_channels", "quantize", "code", "code_static", "fixed_point", "absmax",
          "integer_product", "rescale", "dequantize", "conv1d", "silu", "step_size", "selective_scan", "gate",
          "add")  # fmt: skip


def _place(operation: str) -> int:
    """Of equals, the operation that comes first."""
    return PLACES.index(operation) if operation in PLACES else len(PLACES)
