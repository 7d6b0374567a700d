"""`refmamba verify`: does a backend give the specification's bits? Test vectors first, then whole models.

The vectors (tests/vectors, inside the package as `vectors`) are data with a source; tests/vectors/README.md tells their
format. Whole models are compared with the reference, which runs beside, and with frozen hashes.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence

import numpy as np

from refmamba.backend import Backend
from refmamba.conformance.comparison import Difference
from refmamba.conformance.models import ModelChecks, check_frozen, tiny_expected, tiny_models
from refmamba.conformance.operations import Row, check_operations
from refmamba.conformance.vectors import vectors_folder
from refmamba.spec.operations import OPERATIONS


def count_checks(schemes: Sequence[str], model: str | None = None) -> int:
    """About how many rows `run_checks` gives: five checks of a model, and a hash where it is frozen."""
    return len(OPERATIONS) + 6 * len(schemes) * (1 if model is None else 2)


def run_checks(backend: Backend, schemes: Sequence[str], model: str | None = None) -> Iterator[tuple[Row, Difference | None]]:
    """All of it: the operations' vectors, the tiny model, and a model of the user's."""
    yield from check_operations(backend)
    expected, models = tiny_expected(), tiny_models(schemes)
    sequences = [np.array(s) for s in expected["sequences"]]
    for quantized in models.values():
        yield from ModelChecks(backend, quantized, sequences).run()
    yield from check_frozen(backend, models, expected)
    if model is None:
        return
    from refmamba.run.session import ModelChoice, load_model

    file = vectors_folder() / "small.json"
    frozen = json.loads(file.read_text("utf-8")) if model == "small" and file.exists() else None
    for name in schemes:
        files, _, quantized = load_model(ModelChoice(model, name))
        vocabulary = quantized.config.vocab_size
        yield from ModelChecks(backend, quantized, [s[:24] % vocabulary for s in sequences]).run()
        weights = files.folder / "model.safetensors"
        if frozen and hashlib.sha256(weights.read_bytes()).hexdigest() == frozen["weights_sha256"]:
            yield from check_frozen(backend, {name: quantized}, frozen)
