"""`refmamba perplexity`: bits per byte of a text."""

import json
from collections.abc import Callable
from pathlib import Path

import click

from refmamba.commands.options import model_options
from refmamba.formats.text import read_text
from refmamba.run.perplexity import text_perplexity
from refmamba.run.session import Loaded


@click.command("perplexity")
@model_options
@click.option("--text", "file", required=True, type=click.Path(path_type=Path), help="A UTF-8 text file.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a line.")
def command(choose: Callable[[], Loaded], file: Path, as_json: bool) -> None:
    """Perplexity and bits per byte of a text, the state carried through."""
    text = read_text(file)
    loaded = choose()
    result = text_perplexity(loaded, text)
    values = {"tokens": result.tokens, "bytes": result.n_bytes, "perplexity": result.per_token,
              "bits_per_byte": result.bits_per_byte}  # fmt: skip
    if as_json:
        click.echo(json.dumps(loaded.describe() | {"text": str(file)} | values))
    else:
        click.echo(
            f"{loaded.runner.scheme.name}: {result.bits_per_byte:.4f} bits a byte, perplexity {result.per_token:.3f} "
            f"({result.tokens} tokens, {result.n_bytes} bytes)"
        )
