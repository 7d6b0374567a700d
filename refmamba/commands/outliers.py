"""`refmamba outliers`: outlier channels, figure 1."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import click

from refmamba.commands.options import model_options
from refmamba.errors import DataError
from refmamba.formats.calibration import SUFFIX, save_calibration
from refmamba.formats.text import read_text
from refmamba.paper.outliers import HEAD, SIGMA, Over, Report, observe
from refmamba.paper.plots import plot
from refmamba.run.session import Loaded
from refmamba.spec.calibrate import passage


@click.command("outliers")
@model_options
@click.option("--text", "file", type=click.Path(path_type=Path), help="A UTF-8 text file.  [default: the package's passage]")
@click.option("--sigma", default=SIGMA, show_default=True, type=click.FloatRange(0), help="Standard deviations.")
@click.option("--over", default="channels", show_default=True, type=click.Choice(get_args(Over)),
              help="Mean and deviation of the channels' maxima, or of all values.")  # fmt: skip
@click.option("--plot", "plot_file", type=click.Path(path_type=Path, dir_okay=False), help="F.png or F.svg.")
@click.option("--save-calibration", "saved", type=click.Path(path_type=Path, dir_okay=False),
              help="Write every channel's maximum to this .json, for --calibrate.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def command(
    choose: Callable[[str], Loaded], file: Path | None, sigma: float, over: Over, plot_file: Path | None, saved: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Where the outlier channels sit (figure 1); fp32 unless a scheme is named."""
    text = passage() if file is None else read_text(file)
    if saved is not None and saved.suffix != SUFFIX:
        raise DataError(f"--save-calibration {saved}: the name must end in {SUFFIX}")
    loaded = choose("fp32")
    sites = observe(loaded.runner, loaded.tokenizer.encode_array(text), head=saved is not None)
    if saved is not None:
        save_calibration({name: site.maxima for name, site in sites.items()}, saved)
    sites.pop(HEAD, None)
    report = Report(sites, sigma, over)
    if plot_file is not None:
        plot(report, f"{loaded.choice.model}, {loaded.runner.scheme.name}", plot_file)
    if as_json:
        click.echo(json.dumps(loaded.describe() | {"text": str(file or "the package's passage")} | report.to_json()))
    else:
        click.echo(report.table())
