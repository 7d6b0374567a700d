"""`refmamba verify`: a backend, or single operations, beside the specification."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict

import click

from refmamba.backend import load_backend, numerics
from refmamba.commands.against import against_option
from refmamba.commands.options import Command, backend_option, device_option, json_option, names_option, option, print_json
from refmamba.conformance.comparison import Difference, Tolerance, parse_tolerance
from refmamba.conformance.models import SCHEMES
from refmamba.conformance.operations import Row
from refmamba.conformance.strangers import load_operations
from refmamba.conformance.verify import count_checks, run_checks, run_operations
from refmamba.errors import DataError
from refmamba.formats.scheme import open_scheme
from refmamba.run.progress import bar, say
from refmamba.spec import SPEC_VERSION

SAME, DIFFERS, NOT_RUN = 0, 1, 2  # exit statuses


def heading(tolerance: Tolerance | None) -> str:
    """What stands over the table."""
    measures = "absolute  relative  ulp         KL       same choice" if tolerance else "exact"
    return f"{'check':<36} {'scheme':<12} cases {measures}"


def table_line(row: Row, tolerance: Tolerance | None) -> str:
    """One line of the table."""
    check = f"{row.check} ({row.operation})" if row.operation else row.check
    start = f"{check:<36} {row.scheme:<12} {row.cases:>5}"
    if tolerance is None:
        ulp = f"{row.max_ulp} ulp" if row.max_ulp else ""
        return f"{start} {row.exact:>5}  {ulp:<6} {row.verdict}"
    if row.errors is None:
        return f"{start} {'':<49} {row.verdict}"
    e, whole = row.errors, ""
    if row.divergence is not None:
        share = "" if row.agreement is None else f"{row.agreement:.2%}"
        whole = f"{row.divergence:<8.1e} {share}"
    change = f"; the choice changes first at {row.first_change}" if row.first_change else ""
    return f"{start} {e.absolute:<9.1e} {e.relative:<9.1e} {e.ulp:<11} {whole:<17} {row.verdict}{change}"


def status_of(rows: Iterable[Row]) -> int:
    """Whether all is the same, something differs, or something could not run. What differs goes before."""
    rows = list(rows)
    if any(row.failed > row.raised for row in rows):
        return DIFFERS
    return NOT_RUN if any(row.failed for row in rows) else SAME


def summary(rows: Sequence[Row], tolerance: Tolerance | None) -> str:
    """The last line where nothing differs: what has been run, and what has not."""
    verdict = f"within {tolerance.name}" if tolerance else "every bit is the specification's"
    missing = [row.scheme or row.check for row in rows if not row.offered]
    idle = []
    for operation in dict.fromkeys(row.operation for row in rows if row.operation):
        if not any(row.calls for row in rows if row.operation == operation):
            idle.append(operation)
    return (
        verdict
        + (f"; not offered: {', '.join(missing)}" if missing else "")
        + (f"; on its vectors alone, as no forward calls it: {', '.join(idle)}" if idle else "")
    )


@click.command(
    "verify",
    cls=Command,
    examples=[
        "refmamba verify --backend cpu --schemes int8,w4-all",
        "refmamba verify --operations mykernels:Mine",
        "refmamba verify --against theirs.npz --model small --tolerance float32",
    ],
)
@option("Model", "--model", help="Check this model too: `small`, a folder, a GGUF file, or OWNER/NAME[:FILE.gguf] on the hub.")
@against_option
@backend_option
@click.option("--operations", help="Single operations instead of a backend: module:Class, or NAME=module:function.")
@device_option
@names_option("--schemes", help=f"With commas.  [default: all, as {', '.join(SCHEMES[:3])}]")
@click.option("--tolerance", "tolerance_name", help="For float kernels and numbers: float32, float16, bfloat16, ulp:N.")
@click.option("--quick", is_flag=True, help="The vectors and the tiny model, each way of calling once.")
@click.option("--tokens", help="With --against: the sequence, 1,2,3, where the file lacks it.")
@json_option
@click.pass_context
def command(
    context: click.Context, model: str | None, backend: str, operations: str | None, device: str | None,
    schemes: tuple[str, ...] | None,
    tolerance_name: str | None, quick: bool, as_json: bool,
) -> None:  # fmt: skip
    """Compare a backend, or single operations, with the specification, bit by bit or within a tolerance.

    Exit status: 0 the same, 1 it differs, 2 it could not run. docs/VERIFY.md tells how to check your own.
    """
    for scheme in schemes or ():
        open_scheme(scheme)
    tolerance = None if tolerance_name is None else parse_tolerance(tolerance_name)
    if operations is not None:
        if context.get_parameter_source("backend") != click.core.ParameterSource.DEFAULT:
            raise DataError("--operations run on the reference: leave out --backend")
        subject, place, numbers = operations, device or "cpu", dict[str, str]()
        results = run_operations(load_operations(operations, device), schemes, model, quick=quick, tolerance=tolerance)
    else:
        implementation = load_backend(backend, device)
        if not implementation.exact and tolerance is None:
            dtype = numerics(implementation).get("dtype", "float32")
            raise DataError(
                f"backend '{backend}' does not claim the specification's bits (exact = False): add --tolerance {dtype}"
            )
        subject, place, numbers = backend, implementation.device, numerics(implementation)
        results = run_checks(implementation, schemes, model, quick=quick, tolerance=tolerance)
    rows, first = list[Row](), None
    if not as_json:
        click.echo(
            f"{', '.join([f'{subject} on {place}', *numbers.values()])}, specification {SPEC_VERSION}\n{heading(tolerance)}"
        )
    with bar(count_checks(schemes, model), "verifying", "check") as checked:
        for row, wrong in results:
            rows.append(row)
            first = _first(first, wrong)
            checked.update()
            if not as_json:
                say(table_line(row, tolerance))
    status = status_of(rows)
    if as_json:
        result = {"backend": subject, "device": place, "specification": SPEC_VERSION, "tolerance": tolerance_name, **numbers,
                  "ok": status == SAME, "rows": [asdict(row) | {"verdict": row.verdict} for row in rows],
                  "first_difference": asdict(first) if first else None}  # fmt: skip
        print_json(result)
    elif first:
        click.echo(f"{'could not run' if first.raised else 'first difference'}: {first}")
    else:
        click.echo(summary(rows, tolerance))
    sys.exit(status)


def _first(first: Difference | None, wrong: Difference | None) -> Difference | None:
    """The first difference; where there is none, the first error."""
    return wrong if first is None or (wrong and first.raised and not wrong.raised) else first
