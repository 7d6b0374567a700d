"""`refmamba verify` finds every planted fault, and names the operation."""

import pytest
from faults import FAULTS, Fault, Faulty

from refmamba.conformance.verify import run_checks

SCHEMES = ("w8a8-all",)  # has every kind of site


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_verify_names_the_operation(fault: Fault) -> None:
    first = next((wrong for _, wrong in run_checks(Faulty(fault.faults, fault.runner), SCHEMES) if wrong), None)
    assert first is not None
    assert first.operation == fault.operation, str(first)


def test_no_fault_is_found_in_the_reference_itself() -> None:
    assert not [str(wrong) for _, wrong in run_checks(Faulty({}), SCHEMES) if wrong]
