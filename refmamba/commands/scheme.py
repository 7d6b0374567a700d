"""`refmamba scheme`: what a scheme quantizes, and how."""

import json

import click

from refmamba.commands.options import Command, json_option
from refmamba.formats.scheme import open_scheme


@click.command("scheme", cls=Command, examples=["refmamba scheme int4", "refmamba scheme int8 --json"])
@click.argument("scheme")
@json_option
def command(scheme: str, as_json: bool) -> None:
    """Show what SCHEME, a name or a FILE.json, quantizes and how; with --json as a file to start from."""
    chosen = open_scheme(scheme)
    click.echo(json.dumps(chosen.to_json(), indent=1) if as_json else chosen.table())
