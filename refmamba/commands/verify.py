"""`refmamba verify`: a backend beside the specification."""

import json
import sys
from dataclasses import asdict

import click

from refmamba.backend import load_backend
from refmamba.backends import DEFAULT_BACKEND
from refmamba.conformance.models import SCHEMES
from refmamba.conformance.operations import Row
from refmamba.conformance.verify import run_checks
from refmamba.errors import DataError
from refmamba.spec import SPEC_VERSION
from refmamba.spec.scheme import parse_scheme


def table_line(row: Row) -> str:
    """One line of the table."""
    verdict = "not offered" if not row.offered else "FAILED" if row.failed else "ok"
    ulp = f"{row.max_ulp} ulp" if row.max_ulp else ""
    return f"{row.check:<20} {row.scheme:<12} {row.cases:>5} {row.exact:>5}  {ulp:<6} {verdict}"


@click.command("verify")
@click.option("--backend", "name", default=DEFAULT_BACKEND, show_default=True, help="reference, cpu, torch, module:Class.")
@click.option("--device", help="cpu, cuda, cuda:1: where the backend offers it.")
@click.option("--model", help="Check this model too: `small`, a folder, or OWNER/NAME on the hub.")
@click.option("--schemes", default=",".join(SCHEMES), help="Schemes, with commas between.  [default: all kinds]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the table.")
def command(name: str, device: str | None, model: str | None, schemes: str, as_json: bool) -> None:
    """Compare a backend with the specification, bit by bit; exit status 1 if it differs."""
    chosen = schemes.split(",")
    for scheme in chosen:
        parse_scheme(scheme)
    backend = load_backend(name, device)
    if not backend.exact:
        raise DataError(f"backend '{name}' does not claim the specification's bits, so there is nothing to verify")
    rows, first = [], None
    if not as_json:
        click.echo(f"{name} on {backend.device}, specification {SPEC_VERSION}\n{'check':<20} {'scheme':<12} cases exact")
    for row, wrong in run_checks(backend, chosen, model):
        rows.append(row)
        first = first or wrong
        if not as_json:
            click.echo(table_line(row))
    ok = first is None
    if as_json:
        result = {"backend": name, "device": backend.device, "specification": SPEC_VERSION, "ok": ok,
                  "rows": [asdict(row) for row in rows], "first_difference": asdict(first) if first else None}  # fmt: skip
        click.echo(json.dumps(result))
    elif first:
        click.echo(f"first difference: {first}")
    else:
        missing = [row.check for row in rows if not row.offered]
        click.echo("every bit is the specification's" + (f"; not offered: {', '.join(missing)}" if missing else ""))
    if not ok:
        sys.exit(1)
