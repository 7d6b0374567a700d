"""The `refmamba verify` command, and what it says of a fused backend."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from faults import FAULTS, Faulty, Fused

from refmamba.backends.reference import Reference
from refmamba.commands.verify import command as verify
from refmamba.conformance.locate import locate
from refmamba.conformance.models import ModelChecks, tiny_expected, tiny_models
from refmamba.errors import RefmambaError

SEQUENCES = [np.array(s) for s in tiny_expected()["sequences"]]
ROOT = Path(__file__).resolve().parents[1]
BY_NAME = {fault.name: fault for fault in FAULTS}


class Rounding(Faulty):
    """A stranger's backend that rounds half away from zero."""

    def __init__(self, device: str | None = None) -> None:
        super().__init__(BY_NAME["half away from zero"].faults)


class Inexact(Reference):
    """A backend that claims nothing."""

    exact = False


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
    assert {row["check"] for row in result["rows"]} >= {
        "exp",
        "model: prefill",
        "model: frozen hash",
        "model: refused",
        "model: subnormals",
    }


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
    backend = Fused(BY_NAME["swapped taps"].faults)
    checks = ModelChecks(backend, tiny_models([scheme])[scheme], SEQUENCES)
    backend.operations = lambda: Faulty.operations(backend)  # type: ignore[method-assign]
    first = locate(checks.reference, checks.runner, backend, SEQUENCES[0])
    assert first is not None
    assert first.operation == "conv1d"
    assert first.where.startswith("layers.0.conv1d, on the reference's inputs")


def test_the_first_unequal_boundary_is_named_where_the_operations_are_right() -> None:
    backend = Fused(BY_NAME["swapped taps"].faults)
    backend.operations = Reference().operations  # type: ignore[method-assign]
    checks = ModelChecks(backend, tiny_models(["fp32"])["fp32"], SEQUENCES)
    first = locate(checks.reference, checks.runner, backend, SEQUENCES[0])
    assert first is not None
    assert first.where == "layers.0.u (equal up to layers.0.conv_state)"
    assert len(first.element) == 2


def command(*arguments: str, folder: Path = ROOT / "tests", flags: tuple[str, ...] = ("-P",)) -> tuple[int, str, str]:
    """A process of its own, in a folder whose modules it must find itself: status, stdout, stderr."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, *flags, "-m", "refmamba", "verify", *arguments], cwd=folder, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in process.stderr
    return process.returncode, process.stdout, process.stderr


QUICK = ("--quick", "--schemes", "fp32,int8-static")


def test_an_operation_that_is_off_by_a_bit_ends_with_1() -> None:
    status, out, _ = command(*QUICK, "--operations", "kernels:OnlyScan")
    assert status == 1
    assert "selective_scan" in out
    assert "model: prefill (selective_scan)" in out
    assert "first difference: selective_scan: vector '" in out
    assert "silu " not in out  # it offers none


def test_right_operations_end_with_0_and_nothing_is_ok_that_never_ran() -> None:
    status, out, _ = command(*QUICK, "--operations", "kernels:Right", "--json")
    result = json.loads(out)
    assert status == 0
    assert result["ok"]
    rows = {(row["check"], row["operation"], row["scheme"]): row for row in result["rows"]}
    assert rows["model: prefill", "gate", "fp32"]["calls"] > 0
    assert rows["model: prefill", "gate", "fp32"]["verdict"] == "ok"
    assert rows["model: prefill", "code_static", "int8-static"]["verdict"] == "ok"
    assert rows["model", "code_static", "fp32"]["verdict"] == "not run"
    assert {row["verdict"] for row in result["rows"] if row["operation"] == "pack4"} == {"not run"}
    assert all(row["verdict"] == "not run" for row in result["rows"] if row["operation"] and not row["calls"] and
               row["check"] != "model: transformers")  # fmt: skip
    _, out, _ = command(*QUICK, "--operations", "kernels:Right")
    assert out.endswith("every bit is the specification's; on its vectors alone, as no forward calls it: pack4\n")


@pytest.mark.parametrize("function", ["silu=kernels:library_silu", "rescale=kernels:Tensors.rescale"])
def test_a_single_function_is_taken_by_its_name(function: str) -> None:
    status, out, _ = command("--quick", "--schemes", "fp32", "--operations", function)
    assert status in (1, 2)
    assert out.splitlines()[2].split()[0] == function.split("=")[0]


def test_tensors_for_whoever_asks() -> None:
    pytest.importorskip("torch")
    status, out, _ = command("--quick", "--schemes", "fp32,int8", "--operations", "kernels:Tensors")
    assert status == 0, out
    status, out, _ = command("--quick", "--schemes", "fp32", "--operations", "silu=kernels:in_place")
    assert status == 1
    assert "an argument was changed in place" in out


def test_an_error_of_the_stranger_s_is_told_as_such_and_ends_with_2() -> None:
    status, out, _ = command(*QUICK, "--operations", "kernels:Breaks")
    assert status == 2
    assert "could not run: silu: vector " in out
    assert "raised ZeroDivisionError: division by zero (kernels.py, line " in out
    assert "FAILED" not in out
    status, out, _ = command("--quick", "--schemes", "fp32", "--backend", "kernels:BreaksInside")
    assert status == 2
    assert "raised ZeroDivisionError: not today (kernels.py, line " in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--operations", "kernels:Misspelled"), "there is no operation 'selectiv_scan'; the nearest is 'selective_scan'"),
        (("--operations", "silo=kernels:library_silu"), "there is no operation 'silo'; the nearest is 'silu'"),
        (("--operations", "kernels:Nothing"), "has no operations()"),
        (("--operations", "kernels:Absent"), "kernels has no Absent"),
        (("--operations", "absent:Kernels"), "No module named 'absent'"),
        (("--operations", "kernels"), "is not of the form package.module:Name"),
        (("--operations", "kernels:Right", "--backend", "cpu"), "leave out --backend"),
        (("--operations", "kernels:Right", "--device", "cuda"), "NumPy arrays, which lie on 'cpu'"),
        (("--operations", "kernels:Right", "--tolerance", "float8"), "unknown tolerance 'float8'"),
        (("--backend", "kernels:Nothing"), "cannot be called with device="),
        (("--backend", "kernels:NoDevice"), "cannot be called with device="),
        (("--backend", "kernels:Offers"), "lacks name, device, exact, sites, supports, load of"),
        (("--backend", "kernels:Offers"), "--operations kernels:Offers"),
        (("--backend", "kernels:BreaksAtStart"), "raised ValueError: no accelerator (kernels.py, line "),
        (("--backend", "kernels:Float"), "(exact = False): add --tolerance float32"),
    ],
)
def test_what_cannot_be_checked_is_one_line_and_2(arguments: tuple[str, ...], message: str) -> None:
    status, out, error = command(*arguments)
    assert (status, out) == (2, "")
    assert error.startswith("refmamba: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_module_in_the_working_directory_that_does_not_parse(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def f(:\n", "utf-8")
    status, _, error = command("--operations", "silu=broken:f", folder=tmp_path)
    assert status == 2
    assert "raised SyntaxError" in error
    assert "broken.py, line 1" in error


def test_a_float_kernel_within_its_tolerance_ends_with_0() -> None:
    status, out, _ = command("--quick", "--operations", "silu=kernels:library_silu", "--tolerance", "float32", "--json")
    result = json.loads(out)
    assert status == 0
    assert result["tolerance"] == "float32"
    vectors = next(row for row in result["rows"] if row["check"] == "silu")
    assert 0 < vectors["errors"]["relative"] < 1e-5
    assert vectors["errors"]["ulp"] > 0
    model = next(row for row in result["rows"] if row["check"] == "model: prefill")
    assert 0 < model["divergence"] < 1e-6
    assert model["agreement"] == 1
    assert {row["scheme"] for row in result["rows"] if row["check"] == "model: prefill"} >= {"fp32", "w4-all"}
    assert command("--quick", "--operations", "silu=kernels:library_silu", "--tolerance", "ulp:0")[0] == 1


def test_a_kernel_of_16_bits_is_within_its_own_tolerance_only() -> None:
    kernel = ("--quick", "--schemes", "fp32", "--operations", "silu=kernels:half_silu")
    status, out, _ = command(*kernel, "--tolerance", "float16")
    assert status == 0, out
    assert "within float16" in out
    status, out, _ = command(*kernel, "--tolerance", "float32")
    assert status == 1
    assert "mean Kullback-Leibler divergence" in out or "silu: vector" in out


def test_a_float_backend_is_measured() -> None:
    status, out, _ = command("--quick", "--schemes", "fp32", "--backend", "kernels:Float", "--tolerance", "float32")
    assert status == 0, out
    assert "within float32; not offered: exp, log" in out
