"""`refmamba quantize`: saves a quantized folder."""

from pathlib import Path

import click

from refmamba.commands.options import (
    Command,
    act_bits_option,
    add_bos_option,
    bits_option,
    calibrate_option,
    model_options,
    percentile_option,
    revision_option,
    save_calibration_option,
    scheme_option,
)  # fmt: skip
from refmamba.run.session import ROUNDINGS, ModelChoice, quantize_folder


@click.command(
    "quantize",
    cls=Command,
    examples=[
        "refmamba quantize small small-int8 --scheme int8",
        "refmamba quantize small small-int4 --scheme int4 --rounding gptq --calibrate book.txt",
    ],
)
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path))
@model_options(revision_option, scheme_option, bits_option, act_bits_option, calibrate_option, percentile_option,
               add_bos_option)  # fmt: skip
@save_calibration_option
@click.option("--rounding", default="search", show_default=True, type=click.Choice(ROUNDINGS),
              help="search: each weight by itself. gptq: by the errors on 16,384 tokens of --calibrate FILE.")  # fmt: skip
def command(choice: ModelChoice, folder: Path, calibration_file: Path | None, rounding: str) -> None:
    """Save MODEL quantized in FOLDER, which every command loads."""
    opened = quantize_folder(choice, folder, calibration_file, rounding)
    click.echo(f"{folder}: {choice.model} as {opened.scheme.name}")
