"""`refmamba perplexity`: bits per byte of a text."""

import click

from refmamba.commands.options import Command, TextFile, json_option, model_options, print_json, text_option
from refmamba.run.model import Model
from refmamba.run.perplexity import decimal
from refmamba.run.session import ModelChoice, open_session


@click.command("perplexity", cls=Command, examples=["refmamba perplexity --text book.txt --scheme int8"])
@model_options()
@text_option("A UTF-8 text file.", required=True)
@json_option
def command(choice: ModelChoice, text: TextFile, as_json: bool) -> None:
    """Perplexity and bits per byte of a text, the state carried through."""
    session = open_session(choice)
    result = Model(session).perplexity(text.text)
    values = {"tokens": result.tokens, "bytes": result.n_bytes, "perplexity": result.per_token,
              "bits_per_byte": result.bits_per_byte}  # fmt: skip
    if as_json:
        print_json(session.describe() | {"text": str(text)} | values)
    else:
        click.echo(
            f"{session.scheme.name}: {decimal(result.bits_per_byte)} bits a byte, perplexity {decimal(result.per_token, 3)} "
            f"({result.tokens} tokens, {result.n_bytes} bytes)"
        )
