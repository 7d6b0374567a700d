"""`refmamba push`: a model's folder on the hub."""

from pathlib import Path

import click

from refmamba.commands.options import Command, TextFile, text_option
from refmamba.run.push import push


@click.command(
    "push", cls=Command, examples=["refmamba push small-int8 me/small-int8 --source state-spaces/mamba-130m-hf --text book.txt"]
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repository", metavar="OWNER/NAME")
@text_option("Whose bits per byte the card states.")
@click.option("--source", help="The model that was quantized, OWNER/NAME on the hub or any words, for the card.")
@click.option("--private", is_flag=True, help="Where the repository is made: for you alone.")
def command(folder: Path, repository: str, text: TextFile, source: str | None, private: bool) -> None:
    """Put a model's FOLDER on the hub, with a card that says what it is. HF_TOKEN says who you are.

    A README.md in FOLDER is the card; else it is written: scheme, specification, source, bits per byte.
    """
    name = text.file.name if text.file else str(text)
    click.echo(push(folder, repository, source, text.text, name, private=private))
