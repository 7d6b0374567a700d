"""`refmamba smooth-search`: SmoothQuant's alpha, searched on a text."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from refmamba.commands.options import model_options
from refmamba.errors import DataError
from refmamba.formats.files import write_text
from refmamba.formats.folder import open_float
from refmamba.formats.text import read_text
from refmamba.paper.smoothing import Alphas, describe, search
from refmamba.run.perplexity import text_perplexity
from refmamba.run.session import Loaded
from refmamba.spec.calibrate import calibrate, passage
from refmamba.spec.parameters import quantize_model


@click.command("smooth-search")
@model_options
@click.option("--text", "file", type=click.Path(path_type=Path),
              help="Calibrates and scores.  [default: the package's passage]")  # fmt: skip
@click.option("--per-site", is_flag=True, help="Then an alpha for each linear layer, one after the other.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the best as a scheme file, for --scheme.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def command(choose: Callable[[str], Loaded], file: Path | None, per_site: bool, out: Path | None, as_json: bool) -> None:
    """Search SmoothQuant's alpha on a text; int8-smooth unless a scheme is named."""
    text = passage() if file is None else read_text(file)
    if out is not None and out.suffix != ".json":
        raise DataError(f"--out {out}: a scheme file's name ends in .json")
    loaded = choose("int8-smooth")
    refusal = f"{loaded.choice.model}: is saved quantized; the search needs the float checkpoint"
    scheme, source = loaded.runner.scheme, open_float(loaded.files.folder, refusal)
    calibration = calibrate(source, loaded.tokenizer.encode_array(text))

    def bits(alphas: Alphas) -> float:
        model = quantize_model(source, replace(scheme, smooth=alphas), calibration)
        return text_perplexity(replace(loaded, runner=loaded.backend.load(model)), text).bits_per_byte

    found: list[dict[str, Any]] = []
    for alphas, value in search(bits, per_site):
        found.append({"alpha": alphas, "bits_per_byte": value})
        if not as_json:
            click.echo(f"{value:.4f} bits a byte: {describe(alphas)}")
    best = min(found, key=lambda one: one["bits_per_byte"])
    if out is not None:
        write_text(out, json.dumps(replace(scheme, name=out.stem, smooth=best["alpha"]).to_json(), indent=1) + "\n")
    if as_json:
        click.echo(json.dumps(loaded.describe() | {"text": str(file or "the package's passage"), "tried": found, "best": best}))
    else:
        click.echo(f"best, {best['bits_per_byte']:.4f}: {describe(best['alpha'])}")
