"""The `refmamba verify` command, and what it says of a fused backend."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from faults import FAULTS, Faulty

from refmamba.backends.reference import Reference
from refmamba.commands.verify import command as verify
from refmamba.conformance.locate import locate
from refmamba.conformance.models import ModelChecks, tiny_expected, tiny_models
from refmamba.errors import RefmambaError

SEQUENCES = [np.array(s) for s in tiny_expected()["sequences"]]
BY_NAME = {fault.name: fault for fault in FAULTS}


class Rounding(Faulty):
    """A stranger's backend that rounds half away from zero."""

    def __init__(self, device: str | None = None) -> None:
        super().__init__(BY_NAME["half away from zero"].faults)


class Inexact(Reference):
    """A backend that claims nothing."""

    exact = False


class Fused(Faulty):
    """A backend that shows the ends of its blocks only, and swaps the convolution's taps."""

    sites: frozenset[str] | None = frozenset({"embedding", "residual_out"})

    def __init__(self) -> None:
        super().__init__(BY_NAME["swapped taps"].faults)


def run(*arguments: str) -> tuple[int, str]:
    """Exit status and stdout."""
    result = CliRunner().invoke(verify, list(arguments))
    if isinstance(result.exception, RefmambaError):
        raise result.exception
    return result.exit_code, result.stdout


def test_a_right_backend_ends_with_0() -> None:
    status, out = run("--backend", "reference", "--schemes", "fp32,int8-static")
    assert status == 0
    assert "every bit is the specification's" in out
    assert "FAILED" not in out


def test_a_stranger_s_wrong_backend_ends_with_1_and_both_bit_patterns() -> None:
    status, out = run("--backend", "test_verify:Rounding", "--schemes", "w8-mlp")
    assert status == 1
    assert "first difference: quantize: vector '2 bits, ties', result, element [0]: expected 0, found 1" in out


def test_json_is_one_object() -> None:
    status, out = run("--backend", "test_verify:Rounding", "--schemes", "w8-mlp", "--json")
    result = json.loads(out)
    assert status == 1
    assert result["ok"] is False
    assert result["first_difference"]["operation"] == "quantize"
    assert {row["check"] for row in result["rows"]} >= {"exp", "model: prefill", "model: frozen hash"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schemes", "w9-all"], "w9-all"),
        (["--backend", "nothing"], "unknown backend"),
        (["--backend", "test_verify:Inexact"], "does not claim"),
        (["--backend", "reference", "--device", "cuda"], "runs on 'cpu'"),
    ],
)
def test_wrong_input_is_an_error_of_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(RefmambaError, match=message):
        run(*arguments)


@pytest.mark.parametrize("scheme", ["fp32", "w8a8-all", "int8", "int8-smooth"])
def test_a_fused_backend_s_single_operation_is_named(scheme: str) -> None:
    backend = Fused()
    checks = ModelChecks(backend, tiny_models([scheme])[scheme], SEQUENCES)
    found = locate(checks.reference, checks.runner, backend, SEQUENCES[0])
    assert found is not None
    assert found.operation == "conv1d"
    assert found.where.startswith("layers.0.conv1d, on the reference's inputs")


def test_the_first_unequal_boundary_is_named_where_the_operations_are_right() -> None:
    backend = Fused()
    backend.operations = Reference().operations  # type: ignore[method-assign]
    checks = ModelChecks(backend, tiny_models(["fp32"])["fp32"], SEQUENCES)
    found = locate(checks.reference, checks.runner, backend, SEQUENCES[0])
    assert found is not None
    assert found.where == "layers.0.residual_out (equal up to embedding)"
    assert len(found.element) == 2
