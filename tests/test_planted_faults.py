"""`refmamba verify` finds every planted fault, and names the operation; docs/VERIFY.md has the table of them."""

from pathlib import Path

import numpy as np
import pytest
from faults import FAULTS, FUSED_SCHEMES, Fault, Faulty, Fused, table

from refmamba.backend import load_backend
from refmamba.conformance.comparison import Difference
from refmamba.conformance.verify import run_checks

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "VERIFY.md"


def first_difference(backend: Faulty, schemes: tuple[str, ...] | None = None) -> Difference | None:
    return next((wrong for _, wrong in run_checks(backend, schemes) if wrong), None)


@pytest.mark.ci
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_verify_names_the_operation(fault: Fault) -> None:
    first = first_difference(Faulty(fault.faults, fault.runner))
    assert first is not None
    assert first.operation == (fault.called or fault.operation), str(first)


@pytest.mark.ci
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.shows], ids=lambda fault: fault.name)
def test_verify_names_the_operation_of_a_fused_backend(fault: Fault) -> None:
    first = first_difference(Fused(fault.faults, fault.runner), FUSED_SCHEMES)
    assert first is not None
    assert first.operation in ((fault.called_fused,) if fault.called_fused else fault.names), str(first)


def test_nine_of_ten_are_named_right() -> None:
    shown = [fault for fault in FAULTS if fault.shows]
    assert len(FAULTS) >= 60
    assert sum(fault.called is None for fault in FAULTS) >= 0.9 * len(FAULTS)
    assert sum(fault.called_fused is None for fault in shown) >= 0.9 * len(shown)


@pytest.mark.parametrize("kind", [Faulty, Fused])
def test_no_fault_is_found_in_the_reference_itself(kind: type[Faulty]) -> None:
    assert not [str(wrong) for _, wrong in run_checks(kind({})) if wrong]


def test_the_document_has_the_table() -> None:
    assert table() in DOCUMENT.read_text("utf-8"), "python tests/faults.py prints the table"


def test_sums_without_their_bound_are_found_in_the_cpu_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = pytest.importorskip("refmamba.backends.cpu.runner")
    monkeypatch.setattr(runner, "sum_error", lambda k: np.float32(0))
    wrong = [wrong for _, wrong in run_checks(load_backend("cpu"), ("fp32",)) if wrong]
    assert [first.operation for first in wrong] == ["integer_product"]


def test_a_token_lost_between_passes_is_found_in_the_cpu_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = pytest.importorskip("refmamba.backends.cpu.runner")
    cut = runner.passes

    def loses(lengths: list[int], limit: int) -> list[list[tuple[int, int, int]]]:
        return [[(b, start + (start > 0), stop) for b, start, stop in part] for part in cut(lengths, limit)]

    monkeypatch.setattr(runner, "passes", loses)
    wrong = [wrong for _, wrong in run_checks(load_backend("cpu"), ("fp32",)) if wrong]
    assert wrong[0].operation == "long prefill"
