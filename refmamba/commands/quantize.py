"""`refmamba quantize`: saves a quantized folder."""

from pathlib import Path

import click

from refmamba.errors import DataError


@click.command("quantize")
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--scheme", required=True, help="The scheme to save the model under.")
@click.option("--revision", help="Branch, tag or commit of a model on the hub.")
@click.option("--calibrate", type=click.Path(path_type=Path), help="A text, or maxima saved before (.json).")
@click.option("--save-calibration", type=click.Path(path_type=Path), help="Write the maxima to this .json.")
def command(
    model: str, folder: Path, scheme: str, revision: str | None, calibrate: Path | None, save_calibration: Path | None
) -> None:
    """Save MODEL quantized in FOLDER, which every command loads."""
    from refmamba.formats.calibration import save_calibration as write_calibration
    from refmamba.formats.folder import open_checkpoint
    from refmamba.formats.hub import resolve_model
    from refmamba.formats.quantized import save_quantized
    from refmamba.formats.tokenizer import load_tokenizer
    from refmamba.run.session import calibration_for, progress
    from refmamba.spec.parameters import QuantizedModel, quantize_model
    from refmamba.spec.scheme import parse_scheme

    parsed = parse_scheme(scheme)
    files = resolve_model(model, revision)
    opened = open_checkpoint(files.folder)
    if isinstance(opened, QuantizedModel):
        raise DataError(f"{model}: is quantized already, as {opened.scheme.name}")
    tokenizer = load_tokenizer(files, opened.config)
    absmax = calibration_for(opened, tokenizer, calibrate) if parsed.needs_calibration or save_calibration else None
    if save_calibration and absmax is not None:
        write_calibration(absmax, save_calibration)
    with progress(quantize_model(opened, parsed, absmax)) as quantized:
        save_quantized(quantized, folder, files.tokenizer)
    click.echo(f"{folder}: {model} as {parsed.name}")
