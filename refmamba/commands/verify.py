"""`refmamba verify`: a backend beside the specification."""

import json
import sys
from dataclasses import asdict

import click

from refmamba.backend import load_backend
from refmamba.commands.against import against_option
from refmamba.commands.options import backend_option, device_option, json_option, names_option
from refmamba.conformance.models import SCHEMES
from refmamba.conformance.operations import Row
from refmamba.conformance.verify import count_checks, run_checks
from refmamba.errors import DataError
from refmamba.formats.scheme import open_scheme
from refmamba.run.progress import bar, say
from refmamba.spec import SPEC_VERSION


def table_line(row: Row) -> str:
    """One line of the table."""
    verdict = "not offered" if not row.offered else "FAILED" if row.failed else "ok"
    ulp = f"{row.max_ulp} ulp" if row.max_ulp else ""
    return f"{row.check:<20} {row.scheme:<12} {row.cases:>5} {row.exact:>5}  {ulp:<6} {verdict}"


@click.command("verify")
@click.option("--model", help="Check this model too: `small`, a folder, or OWNER/NAME on the hub.")
@backend_option
@device_option
@names_option("--schemes", default=",".join(SCHEMES), help="With commas.")
@click.option("--tolerance", "tolerance_name", help="With --against: float32, float16, bfloat16, or ulp:N.")
@json_option
@against_option
def command(
    model: str | None, backend: str, device: str | None, schemes: tuple[str, ...], tolerance_name: str | None, as_json: bool
) -> None:  # fmt: skip
    """Compare a backend with the specification, bit by bit; exit status 1 if it differs."""
    if tolerance_name is not None:
        raise DataError("--tolerance goes with --against")
    for scheme in schemes:
        open_scheme(scheme)
    implementation = load_backend(backend, device)
    if not implementation.exact:
        raise DataError(f"backend '{backend}' does not claim the specification's bits, so there is nothing to verify")
    rows, first = [], None
    if not as_json:
        click.echo(
            f"{backend} on {implementation.device}, specification {SPEC_VERSION}\n{'check':<20} {'scheme':<12} cases exact"
        )
    with bar(count_checks(schemes, model), "verifying", "check") as checked:
        for row, wrong in run_checks(implementation, schemes, model):
            rows.append(row)
            first = first or wrong
            checked.update()
            if not as_json:
                say(table_line(row))
    ok = first is None
    if as_json:
        result = {"backend": backend, "device": implementation.device, "specification": SPEC_VERSION, "ok": ok,
                  "rows": [asdict(row) for row in rows], "first_difference": asdict(first) if first else None}  # fmt: skip
        click.echo(json.dumps(result))
    elif first:
        click.echo(f"first difference: {first}")
    else:
        missing = [row.check for row in rows if not row.offered]
        click.echo("every bit is the specification's" + (f"; not offered: {', '.join(missing)}" if missing else ""))
    if not ok:
        sys.exit(1)
