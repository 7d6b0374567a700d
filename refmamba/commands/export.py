"""`refmamba export`: a model for llama.cpp or transformers."""

from pathlib import Path

import click

from refmamba.commands.options import Command, model_options, revision_option
from refmamba.errors import DataError
from refmamba.formats.gguf_writing import TYPES
from refmamba.run.export import export_gguf, export_hugging_face
from refmamba.run.session import ModelChoice


@click.command(
    "export",
    cls=Command,
    examples=["refmamba export small out --format gguf --type Q8_0", "refmamba export small-int8 floats --format hf"],
)
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path))
@model_options(revision_option)
@click.option("--format", "form", type=click.Choice(["gguf", "hf"]), required=True, help="gguf: llama.cpp. hf: transformers.")
@click.option("--type", "kind", type=click.Choice(list(TYPES)), help="Of a GGUF file's matrices.  [default: F32]")
def command(choice: ModelChoice, folder: Path, form: str, kind: str | None) -> None:
    """Write MODEL, or the values of its codes, for another program.

    gguf: FOLDER/MODEL-TYPE.gguf. hf: FOLDER, which must be new, in float32.
    """
    if form == "hf" and kind is not None:
        raise DataError(f"--type {kind} is of a GGUF file; leave it out, since transformers gets float32")
    click.echo(export_hugging_face(choice, folder) if form == "hf" else export_gguf(choice, folder, kind or "F32"))
