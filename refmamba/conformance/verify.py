"""`refmamba verify`: does a backend, or an operation, give the specification's bits? Test vectors first, then whole models.

The vectors (tests/vectors, inside the package as `vectors`) are data with a source; tests/vectors/README.md tells their
format. Whole models are compared with the reference, which runs beside, and with frozen hashes.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from refmamba.backend import Backend, told
from refmamba.conformance.comparison import FORMATS, Difference, Tolerance
from refmamba.conformance.models import (
    EDGE_SCHEMES,
    LONG_SCHEMES,
    ModelChecks,
    Results,
    check_frozen,
    check_large_sums,
    check_refused,
    check_subnormals,
    small_values,
    watch,
)
from refmamba.conformance.operations import Row, check_operations
from refmamba.conformance.replaced import Functions, Replaced
from refmamba.conformance.strangers import widened
from refmamba.conformance.suspect import suspect
from refmamba.conformance.tolerant import TolerantChecks
from refmamba.conformance.vectors import GeneratedModel, generated_model, generated_models, vectors_folder
from refmamba.errors import RefmambaError
from refmamba.formats.hub import SMALL
from refmamba.run.session import ModelChoice, open_model
from refmamba.spec.operations import OPERATIONS
from refmamba.spec.parameters import QuantizedModel, quantize_model
from refmamba.spec.scheme import Scheme, parse_scheme


def run_checks(
    backend: Backend, schemes: Sequence[str] | None = None, model: str | None = None, *, quick: bool = False,
    tolerance: Tolerance | None = None,
) -> Results:  # fmt: skip
    """All of it: the operations' vectors, the generated models, and a model of the user's.

    schemes: None for those that the vectors have. quick: the tiny model alone, with short sequences; see `ModelChecks`.
    """
    yield from check_operations(backend.operations(), tolerance)
    yield from run_models(backend, schemes, model, quick=quick, tolerance=tolerance)


def count_checks(schemes: Sequence[str] | None, model: str | None = None) -> int:
    """About how many rows `run_checks` gives: nine checks of a model under a scheme, and a hash where it is frozen."""
    named = len(schemes) if schemes else sum(len(generated_model(name).schemes) for name in generated_models())
    return len(OPERATIONS) + 9 * named * (1 if model is None else 2)


def run_operations(
    functions: Functions, schemes: Sequence[str] | None = None, model: str | None = None, *, quick: bool = False,
    tolerance: Tolerance | None = None,
) -> Results:  # fmt: skip
    """Single operations on their vectors, then each alone inside whole models on the reference."""
    if tolerance is not None:
        functions = {name: widened(function) for name, function in functions.items()}
    for row, first in check_operations(functions, tolerance):
        if row.offered:
            yield row, first
    for name, function in functions.items():
        backend = Replaced({name: function})
        results = run_models(backend, schemes, model, quick=quick, tolerance=tolerance, operation=name)
        while True:
            before = backend.calls[name]
            try:
                row, first = next(results)
            except StopIteration:
                break
            row.operation = name
            if row.check != "model: transformers":  # it looks at the logits of the frozen hash
                row.calls = backend.calls[name] - before
            yield row, first


def runs(name: str, model: QuantizedModel) -> bool:
    """Whether a forward of the model calls the operation."""
    counting = Replaced({name: OPERATIONS[name]})
    counting.load(model).prefill([np.zeros(1, np.int64)])
    return counting.calls[name] > 0


def run_models(
    backend: Backend, schemes: Sequence[str] | None, model: str | None, *, quick: bool, tolerance: Tolerance | None,
    operation: str | None = None,
) -> Results:  # fmt: skip
    """Whole models under each scheme, in every way of calling. operation: leave out the models that never call it."""
    for name in ["tiny"] if quick else sorted(generated_models(), key=_order):
        generated = generated_model(name)
        selected = _schemes(generated, schemes, name)
        if schemes is None:
            selected = [scheme for scheme in selected if _by_default(scheme, tolerance)]
        expected = generated.expected
        refused = expected.get("raises", {})
        for scheme in selected:
            if backend.supports(scheme):
                yield Row("model", scheme.name, offered=False), None
        selected = [scheme for scheme in selected if not backend.supports(scheme)]
        runnable = [scheme for scheme in selected if scheme.name not in refused]
        models = {s.name: quantize_model(generated.source, s, generated.calibration) for s in runnable}
        sequences = [np.array(s) for s in expected["sequences"]]
        yield from _named(backend, models, _checks(backend, models, sequences, quick, tolerance, operation=operation))
        if tolerance is not None:
            continue
        frozen = {n: m for n, m in models.items() if not quick or n in LONG_SCHEMES}
        if operation is not None:
            frozen = {n: m for n, m in frozen.items() if runs(operation, m)}
        yield from check_frozen(backend, frozen, expected)
        yield from check_errors(backend, generated, [s for s in selected if s.name in refused])
        if name == "tiny":
            edges = {n: quantize_model(generated.source, parse_scheme(n), generated.calibration) for n in EDGE_SCHEMES}
            yield from check_refused(backend, edges, sequences[-1])
            yield from check_subnormals(backend, edges["fp32"], sequences[-1])
            yield from check_large_sums(backend)
        if name == "untied" and not quick:  # which has no bias that would hide them
            small = {n: small_values(m) for n, m in models.items() if n in EDGE_SCHEMES}
            tokens = [np.arange(9)]
            yield from _named(backend, small, _checks(backend, small, tokens, True, None, False, operation))
    if model is not None:
        yield from run_model(backend, schemes, model, quick, tolerance, operation)


def _by_default(scheme: Scheme, tolerance: Tolerance | None) -> bool:
    """Whether a scheme runs although none is named: within a tolerance those without coded activations, where a last bit may
    turn a code over, and that any number of others; in 16 bits not those with coded weights either, which make of the small
    random models some that any rounding changes much."""
    if tolerance is None:
        return True
    return not (scheme.inputs or scheme.outputs or (scheme.weights and tolerance.format.fraction < FORMATS["float32"].fraction))


def _order(name: str) -> tuple[bool, bool, str]:
    """The tiny model first, what must be refused last."""
    return name != "tiny", "raises" in generated_model(name).expected, name


def _schemes(generated: GeneratedModel, schemes: Sequence[str] | None, name: str) -> list[Scheme]:
    """What a generated model is run under: of the schemes that are asked for those that it has; the tiny one under any."""
    if schemes is None:
        return list(generated.schemes.values())
    known = {n: s for n, s in generated.schemes.items() if n in schemes}
    own = {n for other in generated_models() for n in generated_model(other).schemes}  # some are files, known by no name
    return (
        [known.get(n) or parse_scheme(n) for n in schemes if n in known or n not in own]
        if name == "tiny"
        else [*known.values()]
    )


def _checks(
    backend: Backend, models: Mapping[str, QuantizedModel], sequences: Sequence[object], quick: bool,
    tolerance: Tolerance | None, long: bool = True, operation: str | None = None,
) -> Results:  # fmt: skip
    for model in models.values():
        if operation is not None and not runs(operation, model):
            yield Row("model", model.scheme.name, calls=0), None
            continue
        checks: ModelChecks | TolerantChecks
        try:
            if tolerance is None:
                checks = ModelChecks(backend, model, sequences, quick=quick, long=long)
            else:
                checks = TolerantChecks(backend, model, sequences, tolerance, quick=quick, long=long)
        except Exception as error:  # a stranger's backend may raise anything when it is given a model
            yield Row("model: load", model.scheme.name, 1, failed=1, raised=1), Difference("load", told(error), raised=True)
            continue
        yield from checks.run()


def _named(backend: Backend, models: Mapping[str, QuantizedModel], results: Results) -> Results:
    """The same, with the operation of a fused backend that is most likely wrong named in the first difference."""
    tried = backend.sites is None or not backend.exact  # of which every piece is wrong
    for row, first in results:
        if first and not first.raised and not tried:
            tried = True
            with contextlib.suppress(Exception):  # a stranger's hooks may raise anything; what differs is known without them
                first = suspect(backend, list(models.values()), first)
        yield row, first


def check_errors(backend: Backend, generated: GeneratedModel, schemes: Sequence[Scheme]) -> Results:
    """Schemes under which the model must be refused: when it is loaded, or when it is run."""
    for scheme in schemes:

        def check(scheme: Scheme = scheme) -> Iterator[Difference | None]:
            sequences = [np.array(s) for s in generated.expected["sequences"]]
            try:
                runner = backend.load(quantize_model(generated.source, scheme, generated.calibration))
                runner.prefill(sequences, logits="all")
            except RefmambaError:
                yield None
            else:
                yield Difference("refused", f"scheme {scheme.name}: the call gave logits, and must fail")

        row = Row("model: refused", scheme.name)
        first = watch(row, check)
        yield row, first


def run_model(
    backend: Backend, schemes: Sequence[str] | None, model: str, quick: bool, tolerance: Tolerance | None,
    operation: str | None = None,
) -> Results:  # fmt: skip
    """A model of the user's."""
    file = vectors_folder() / "small.json"
    frozen = json.loads(file.read_text("utf-8")) if model == SMALL and file.exists() else None
    sequences = [np.array(s) for s in generated_model("tiny").expected["sequences"]]
    default = [name for name, scheme in generated_model("tiny").schemes.items() if _by_default(scheme, tolerance)]
    for name in schemes or default:
        opened = open_model(ModelChoice(model, name))
        if backend.supports(opened.scheme):
            yield Row("model", name, offered=False), None
            continue
        quantized = opened.quantized(opened.scheme)
        short = [s[:24] % quantized.config.vocab_size for s in sequences]
        models = {name: quantized}
        yield from _named(backend, models, _checks(backend, models, short, quick, tolerance, operation=operation))
        weights = opened.files.folder / "model.safetensors"
        if frozen and not tolerance and hashlib.sha256(weights.read_bytes()).hexdigest() == frozen["weights_sha256"]:
            yield from check_frozen(backend, {name: quantized}, frozen)
