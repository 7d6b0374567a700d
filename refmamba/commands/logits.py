"""`refmamba logits`: the logits of every position."""

from pathlib import Path

import click
import numpy as np

from refmamba.commands.options import OutputFile, model_options
from refmamba.errors import DataError
from refmamba.formats.writing import write_file
from refmamba.run.model import Model
from refmamba.run.session import ModelChoice, open_session


def parse_tokens(text: str) -> list[int]:
    """`1,2,3` as tokens. Raises DataError."""
    try:
        return [int(np.int64(int(part))) for part in text.split(",")]
    except (ValueError, OverflowError):
        raise DataError(f"--tokens {text}: give whole numbers with commas between, like 1,2,3") from None


@click.command("logits")
@model_options()
@click.option("--text", help="A text, or")
@click.option("--tokens", help="its tokens, 1,2,3.")
@click.option("--out", required=True, type=OutputFile(), help="The .npy file to write.")
def command(choice: ModelChoice, text: str | None, tokens: str | None, out: Path) -> None:
    """Write the logits of every position: float32 (length, vocabulary)."""
    given = text if tokens is None else parse_tokens(tokens)
    if given is None or None not in (text, tokens):
        raise DataError("give either --text or --tokens")
    logits = Model(open_session(choice)).logits(given)
    write_file(out, lambda stream: np.save(stream, logits))
