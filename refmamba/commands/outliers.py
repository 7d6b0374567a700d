"""`refmamba outliers`: outlier channels, figure 1."""

from pathlib import Path
from typing import get_args

import click

from refmamba.commands.options import (
    Command,
    Number,
    OutputFile,
    TextFile,
    json_option,
    model_options,
    print_json,
    save_calibration_option,
    text_option,
)  # fmt: skip
from refmamba.formats.calibration import Calibration, save_calibration
from refmamba.paper.outliers import HEAD, SIGMA, Over, Report, observe
from refmamba.paper.plots import check_plot, plot
from refmamba.run.session import ModelChoice, open_session


@click.command(
    "outliers",
    cls=Command,
    examples=["refmamba outliers --plot figure1.png", "refmamba outliers --text book.txt --save-calibration maxima.json"],
)
@model_options()
@text_option("A UTF-8 text file.")
@click.option("--sigma", default=SIGMA, show_default=True, type=Number(0), help="Standard deviations.")
@click.option("--over", default="channels", show_default=True, type=click.Choice(get_args(Over)),
              help="Mean and deviation of the channels' maxima, or of all values.")  # fmt: skip
@click.option("--plot", "plot_file", type=OutputFile(), help="F.png or F.svg.")
@save_calibration_option
@json_option
def command(
    choice: ModelChoice, text: TextFile, sigma: float, over: Over, plot_file: Path | None, calibration_file: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Where the outlier channels sit (figure 1); fp32 unless a scheme is named."""
    if plot_file is not None:
        check_plot(plot_file)
    session = open_session(choice, "fp32")
    sites = observe(session.runner, session.tokenizer.encode_array(text.text), head=calibration_file is not None)
    if calibration_file is not None:
        save_calibration(Calibration({name: site.maxima for name, site in sites.items()}), calibration_file)
    sites.pop(HEAD, None)
    report = Report(sites, sigma, over)
    if plot_file is not None:
        plot(report, f"{choice.model}, {session.scheme.name}", plot_file)
    if as_json:
        print_json(session.describe() | {"text": str(text)} | report.to_json())
    else:
        click.echo(report.table())
