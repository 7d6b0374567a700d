"""`refmamba smooth-search`: SmoothQuant's alpha, searched on a text."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from refmamba.commands.options import Command, TextFile, json_file_option, json_option, model_options, print_json, text_option
from refmamba.formats.writing import write_text
from refmamba.paper.smoothing import Alphas, describe, most_tries, search
from refmamba.run.perplexity import decimal, text_perplexity
from refmamba.run.progress import bar, say
from refmamba.run.session import ModelChoice, open_session


@click.command("smooth-search", cls=Command, examples=["refmamba smooth-search --text book.txt --per-site --out best.json"])
@model_options()
@text_option("Scores, and calibrates where --calibrate names nothing.")
@click.option("--per-site", is_flag=True, help="Then an alpha for each linear layer, one after the other.")
@json_file_option("--out", help="Write the best to this .json, for --scheme.")
@json_option
def command(choice: ModelChoice, text: TextFile, per_site: bool, out: Path | None, as_json: bool) -> None:
    """Search SmoothQuant's alpha on a text; int8-smooth unless a scheme is named."""
    session = open_session(replace(choice, calibrate=choice.calibrate or text.file), "int8-smooth")
    session.opened.float_checkpoint()
    scheme = session.scheme

    def bits(alphas: Alphas) -> float:
        tried = replace(session, scheme=replace(scheme, smooth=alphas))
        return text_perplexity(tried, text.text).bits_per_byte

    rows: list[dict[str, Any]] = []
    with bar(most_tries(per_site), "searching", "alpha") as tries:
        for alphas, value in search(bits, per_site):
            rows.append({"alpha": alphas, "bits_per_byte": value})
            tries.update()
            if not as_json:
                say(f"{decimal(value)} bits a byte: {describe(alphas)}")
    best = min(rows, key=lambda row: row["bits_per_byte"])
    if out is not None:
        write_text(out, json.dumps(replace(scheme, name=out.stem, smooth=best["alpha"]).to_json(), indent=1) + "\n")
    if as_json:
        print_json(session.describe() | {"text": str(text), "tried": rows, "best": best})
    else:
        click.echo(f"best, {decimal(best['bits_per_byte'])}: {describe(best['alpha'])}")
