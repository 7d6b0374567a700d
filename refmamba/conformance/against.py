"""Numbers from elsewhere beside the specification's: a whole forward, or one operation. docs/DUMPS.md is for its user."""

import copy
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmamba.conformance.causes import distance, explain
from refmamba.conformance.comparison import Difference, Rule, Tolerance, difference, parse_tolerance, parts
from refmamba.conformance.dumps import Arrays, Dump, reference_values
from refmamba.errors import DataError, RefmambaError, TokenizerError
from refmamba.run.perplexity import divergence
from refmamba.run.session import Opened
from refmamba.spec.arith import IntArray
from refmamba.spec.codes import Codes, FixedPoint
from refmamba.spec.mamba1 import Mamba, check_tokens
from refmamba.spec.operations import OPERATIONS

IN_FLOAT64 = ("acc",)  # the sites that stay float64


@dataclass
class Line:
    """One array: the root mean square of its errors over that of its values, and whether it is as it must be."""

    name: str
    relative: float
    divergence: float | None
    ok: bool


@dataclass
class Verdict:
    """What became of a dump. notes: what was left out of the comparison. cause: why it differs, where that is known."""

    title: str
    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    first: Difference | None = None
    cause: str | None = None


def nearest(name: str, names: Iterable[str]) -> str:
    """`; the nearest is NAME`, where one is near."""
    close = difflib.get_close_matches(name, list(names), 1)
    return f"; the nearest is {close[0]}" if close else ""


def widened(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """Floats as float32, to which a float64 is rounded once; the integer product stays float64."""
    if array.dtype.kind != "f" or name.rsplit(".", 1)[-1].partition("_")[0] in IN_FLOAT64:
        return array.astype(np.float64) if array.dtype.kind == "f" else array
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def compare_model(dump: Dump, opened: Opened, tokens: IntArray | None, tolerance: Tolerance | None) -> Verdict:
    """A dump of one sequence's forward beside the reference's, in the order of computation.

    tokens: (L,), where the dump does not have them. Raises DataError, and what opening the model raises.
    """
    tokens = _tokens(dump, tokens)
    reference = Mamba(opened.quantized(opened.scheme))
    tokens = check_tokens(tokens, reference.config)
    expected = reference_values(reference, tokens)
    arrays = {name: widened(name, array) for name, array in dump.arrays.items() if name != "tokens"}
    for name in arrays:
        if name not in expected:
            raise DataError(f"{dump.file}: {name} is no site of {opened.choice.model} under {opened.scheme.name}"
                            f"{nearest(name, expected)}; `refmamba trace` writes all")  # fmt: skip
    if not arrays:
        raise DataError(f"{dump.file}: holds no logits and no site to compare")
    if "logits" in arrays and arrays["logits"].ndim == 3 and len(arrays["logits"]) == 1:
        arrays["logits"] = arrays["logits"][0]  # a batch of one
    verdict = Verdict(f"{len(tokens)} tokens, {opened.choice.model} under {opened.scheme.name}")
    fitted = fit(expected, arrays)
    verdict.notes += _padding(opened, expected["logits"], arrays.get("logits"))
    for name in expected:
        if name not in arrays:
            continue
        line, first = compare_site(name, fitted[name], arrays[name], tokens, tolerance)
        verdict.lines.append(line)
        verdict.first = verdict.first or first
    if verdict.first:
        verdict.cause = _cause(opened, reference, tokens, expected, fitted, arrays)
    return verdict


def _tokens(dump: Dump, tokens: IntArray | None) -> NDArray[Any]:
    dumped = dump.arrays.get("tokens")
    if dumped is not None and dumped.ndim == 2 and len(dumped) == 1:
        dumped = dumped[0]  # a batch of one
    if dumped is None and tokens is None:
        raise DataError(f"{dump.file}: has no tokens; name them with --tokens 1,2,3")
    if dumped is not None and tokens is not None and not np.array_equal(dumped, tokens):
        raise DataError(f"{dump.file}: has other tokens than --tokens; leave those out")
    chosen = dumped if tokens is None else tokens
    assert chosen is not None
    return chosen


def fit(expected: Arrays, arrays: Arrays) -> Arrays:
    """The expected values as far as a dump may have less: logits of the last position alone, and without rows at the end."""
    if "logits" not in arrays or arrays["logits"].ndim != 2 or "logits" not in expected:
        return expected
    rows, theirs = expected["logits"], arrays["logits"]
    return expected | {"logits": (rows[-1:] if len(theirs) == 1 else rows)[:, : theirs.shape[1]]}


def _padding(opened: Opened, expected: NDArray[Any], logits: NDArray[Any] | None) -> list[str]:
    """What is said of rows of the head that a dump lacks. Raises DataError where they are no padding."""
    if logits is None or logits.ndim != 2 or logits.shape[1] >= expected.shape[1]:
        return []
    rows, all_rows = logits.shape[1], expected.shape[1]
    try:
        n_ids = opened.tokenizer.n_ids
    except TokenizerError:
        n_ids = rows
    if rows < n_ids:
        raise DataError(f"the logits have {rows} rows, and the model {n_ids} tokens: they are of another model, or cut off")
    return [f"the padding rows {rows} to {all_rows - 1} of the logits are cut off; the others are compared"]


def compare_site(
    name: str, expected: NDArray[Any], array: NDArray[Any], tokens: IntArray, tolerance: Tolerance | None
) -> tuple[Line, Difference | None]:
    """One array. Logits within a tolerance are compared by the divergence of the next token's probabilities."""
    kl, rule = None, tolerance or "exact"
    first: Difference | None
    if name == "logits" and tolerance and tolerance.steps is None and expected.shape == array.shape:
        apart = divergence(expected, array)
        kl, far = float(np.max(apart)), np.flatnonzero(~(apart <= tolerance.divergence))
        first = None
        if len(far):
            at = int(far[0])
            element = difference("logits", "", expected[at], array[at], "exact")[0] or Difference("logits", "")
            where = f"Kullback-Leibler divergence {apart[at]:.3g} of the next token, at most {tolerance.divergence:g}"
            first = Difference("logits", where, [at, *element.element], element.expected, element.found)
    else:
        first = difference(name, "", expected, array, rule)[0]
    if first:
        place = ""
        if first.element and len(expected) == len(tokens) and name.rsplit(".", 1)[-1] not in ("conv_state", "ssm_state"):
            place = f"token {first.element[0]} (which is {tokens[first.element[0]]})"
        elif first.element and name == "logits":
            place = f"the last token (which is {tokens[-1]})"
        where = ", ".join(filter(None, (first.where.removeprefix(": "), place)))
        first = Difference(name, where or "after the last token", first.element, first.expected, first.found)
    return Line(name, distance({name: expected}, {name: array}), kl, first is None), first


def _cause(
    opened: Opened, reference: Mamba, tokens: IntArray, expected: Arrays, fitted: Arrays, arrays: Arrays
) -> str | None:  # fmt: skip
    logits, rows = arrays.get("logits"), expected["logits"].shape[1]
    if logits is not None and logits.ndim == 2 and logits.shape[1] > rows:
        cut = arrays | {"logits": logits[:, :rows]}
        if distance(fit(expected, cut), cut) <= 1e-4:
            return f"padding rows were added: the dump has {logits.shape[1]} rows, the model {rows}; the others agree"
    close = [difference(name, "", fitted[name], array, parse_tolerance("float32"))[0] for name, array in arrays.items()]
    if not any(close):
        return "the rounding of float32 in another order: all is within --tolerance float32"
    return explain(opened, reference, tokens, expected, arrays, fit)


def compare_operation(dump: Dump, tolerance: Tolerance | None) -> Verdict:
    """A dump of one operation: the specification's function on the dump's arguments beside the dump's result.

    Raises DataError for an unknown operation, and for arguments and results that are not its own.
    """
    operation = dump.text("operation") or ""
    if operation not in OPERATIONS:
        raise DataError(f"{dump.file}: no operation is called {operation}{nearest(operation, OPERATIONS)}")
    arguments = _arguments(dump, operation)
    try:
        with np.errstate(all="ignore"):
            expected = OPERATIONS[operation](*copy.deepcopy(arguments))
    except RefmambaError as error:
        raise DataError(f"{dump.file}: the specification refuses these arguments of {operation}: {error}") from error
    except Exception as error:  # whatever NumPy says of arrays that do not fit
        raise DataError(f"{dump.file}: these are no arguments of {operation} (docs/FORMAT.md, section 6): {error}") from error
    verdict = Verdict(f"the operation {operation}")
    names = _result_names(expected)
    if missing := [name for name in names if name not in dump.arrays]:
        raise DataError(f"{dump.file}: {operation} gives {', '.join(names)}, and {missing[0]} is not there")
    if more := [name for name in dump.arrays if not name.startswith("arguments.") and name not in names]:
        raise DataError(f"{dump.file}: {operation} gives {', '.join(names)}, not {more[0]}")
    rule: Rule = tolerance or ("value" if operation == "integer_product" else "exact")
    for name, (_, value) in zip(names, parts(expected), strict=True):
        array = dump.arrays[name]
        array = array.astype(value.dtype) if value.dtype.kind == "f" == array.dtype.kind else array
        first, _ = difference(operation, name, value, array, rule)
        verdict.lines.append(Line(name, distance({name: value}, {name: array}), None, first is None))
        verdict.first = verdict.first or first
        if first and first.element and not difference(operation, name, value, array, parse_tolerance("float32"))[0]:
            verdict.cause = verdict.cause or "the rounding of float32 in another order: it is within --tolerance float32"
    return verdict


def _result_names(expected: Any) -> list[str]:
    if isinstance(expected, tuple):
        return [f"result.{i}" for i in range(len(expected))]
    return ["result" if name == "result" else f"result.{'q' if name == 'codes' else name}" for name, _ in parts(expected)]


def _arguments(dump: Dump, operation: str) -> Sequence[Any]:
    """The arguments in order: arrays, codes, and what `about` has. Raises DataError for a gap."""
    told = dump.about.get("arguments", {})
    if not isinstance(told, dict):
        raise DataError(f"{dump.file}: arguments in `about` are an object, from the index as text to the value")
    fields: dict[str, Arrays] = {}
    for name, array in dump.arrays.items():
        start, _, rest = name.partition(".")
        if start == "arguments":
            index, _, part = rest.partition(".")
            fields.setdefault(index, {})[part] = array
    count = len(fields.keys() | told.keys())
    if gap := [str(i) for i in range(count) if str(i) not in fields.keys() | told.keys()]:
        raise DataError(f"{dump.file}: {operation} has {count} arguments in the dump, but no arguments.{gap[0]}")
    arguments: list[Any] = []
    for i in range(count):
        entries, value = fields.get(str(i)), told.get(str(i))
        if entries is None:
            arguments.append(value)
        elif "" in entries:
            arguments.append(_argument(operation, i, entries[""]))
        elif entries.keys() == {"q", "exponent"}:
            arguments.append(FixedPoint(entries["q"].astype(np.int32), entries["exponent"].astype(np.int32)))
        elif entries.keys() == {"q", "scale"} and isinstance(value, dict) and type(value.get("bits")) is int:
            bits = value["bits"]
            q: IntArray = entries["q"].astype(np.int8 if bits <= 8 else np.int16)
            arguments.append(Codes(q, entries["scale"].astype(np.float32), bits))
        else:
            raise DataError(
                f"{dump.file}: arguments.{i} is an array, or .q and .exponent, or .q and .scale with its bits in `about`"
            )
    return arguments


def _argument(operation: str, index: int, array: NDArray[Any]) -> NDArray[Any]:
    """An array as the specification's function takes it."""
    if array.dtype.kind == "f":
        return array.astype(np.float64 if (operation, index) == ("rescale", 0) else np.float32)
    codes = {"pack4": np.int8, "unpack4": np.uint8}
    return array.astype(codes.get(operation, np.int64))
