"""`refmamba step`: one forward, number by number."""

import sys
from pathlib import Path

import click

from refmamba.commands.generate import DEFAULT_PROMPT
from refmamba.commands.options import (
    Command,
    OutputFile,
    calibrate_option,
    json_option,
    model_option,
    names_option,
    percentile_option,
    print_json,
    revision_option,
)  # fmt: skip
from refmamba.errors import DataError, SchemeError
from refmamba.formats.scheme import open_scheme
from refmamba.run.session import ModelChoice, open_model
from refmamba.teach.follow import as_text, as_values
from refmamba.teach.forwards import follow, named_sites
from refmamba.teach.pages import write_page

DEFAULT_SCHEME = "int8"


@click.command(
    "step", cls=Command, examples=['refmamba step "The old man" --op in_proj --channel 239', "refmamba step --html page.html"]
)
@click.argument("prompt", default=DEFAULT_PROMPT)
@model_option
@revision_option
@names_option(
    "--scheme", group="Model", help=f"{DEFAULT_SCHEME} by default; with --html several, by default every built-in one."
)
@calibrate_option
@percentile_option
@click.option("--layer", type=click.IntRange(0), default=0, show_default=True)
@click.option("--op", help="in_proj, in_proj.acc, conv1d, scan, ...; embedding, norm_f, lm_head.  [default: all of the layer]")
@click.option("--token", type=click.IntRange(0), help="Place in the prompt.  [default: the last]")
@click.option("--channel", type=click.IntRange(0), default=0, show_default=True)
@click.option("--html", type=OutputFile(), help="Write a page that runs the model in a browser.")
@json_option
def command(
    prompt: str, model: str, revision: str | None, scheme: tuple[str, ...] | None, calibrate: Path | None,
    percentile: float, layer: int, op: str | None, token: int | None, channel: int, html: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Show how the numbers of one forward come about: each operation with its formula, rounding and error."""
    opened = open_model(ModelChoice(model, revision=revision, calibrate=calibrate, percentile=percentile))
    if html is not None:
        if op is not None or as_json:
            raise DataError("--html writes the whole page; leave out --op and --json")
        schemes = None if scheme is None else [open_scheme(name) for name in scheme]
        if reason := write_page(opened, schemes, prompt, html):
            click.echo(f"{html}: holds the recorded prompt, and not {model}: {reason}", err=True)
        return
    if scheme is not None and len(scheme) > 1:
        raise SchemeError("several schemes are for --html; name one")
    follower = follow(opened, open_scheme(scheme[0] if scheme else DEFAULT_SCHEME), opened.tokenizer.encode_array(prompt))
    sites = named_sites(follower, layer, op)
    token = follower.shape(sites[0])[0] - 1 if token is None else token
    if op is None and not as_json and sys.stdin.isatty() and sys.stdout.isatty():
        try:
            from refmamba.teach.terminal import Walk, walk
        except ImportError:
            click.echo("refmamba: to step with keys install prompt_toolkit: pip install 'refmamba[teach]'", err=True)
        else:
            walk(Walk(follower, sites[0], token, channel))
            return
    elements = [follower.at(site, token, channel) for site in sites]
    if as_json:
        print_json({"prompt": prompt, "elements": [as_values(element) for element in elements]})
        return
    places = [follower.sites.index(site) + 1 for site in sites]
    count = len(follower.sites)
    click.echo("\n\n".join(as_text(element, place, count) for element, place in zip(elements, places, strict=True)))
