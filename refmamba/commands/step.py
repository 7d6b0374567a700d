"""`refmamba step`: one forward, number by number."""

from pathlib import Path

import click

from refmamba.commands.generate import DEFAULT_PROMPT
from refmamba.commands.options import OutputFile, calibrate_option, model_option, names_option, revision_option
from refmamba.run.session import ModelChoice, open_model
from refmamba.spec.scheme import parse_scheme
from refmamba.teach.pages import write_page


@click.command("step")
@click.argument("prompt", default=DEFAULT_PROMPT)
@model_option
@revision_option
@names_option("--scheme", default=None, help="Schemes with commas between.  [default: every built-in one]")
@calibrate_option
@click.option("--html", type=OutputFile(), required=True, help="Write the page to this file.")
def command(
    prompt: str, model: str, revision: str | None, scheme: tuple[str, ...] | None, calibrate: Path | None, html: Path
) -> None:
    """Write a page that runs the model in a browser, and shows how every number comes about."""
    opened = open_model(ModelChoice(model, revision=revision, calibrate=calibrate))
    schemes = None if scheme is None else [parse_scheme(name) for name in scheme]
    if reason := write_page(opened, schemes, prompt, html):
        click.echo(f"{html}: holds the recorded prompt, and not {model}: {reason}", err=True)
