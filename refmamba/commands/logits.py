"""`refmamba logits`: the logits of every position."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from refmamba.commands.options import model_options
from refmamba.errors import DataError


def parse_tokens(text: str) -> list[int]:
    """`1,2,3` as tokens. Raises DataError."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise DataError(f"--tokens {text}: give whole numbers with commas between, like 1,2,3") from None


@click.command("logits")
@model_options
@click.option("--text", help="A text, or")
@click.option("--tokens", help="its tokens, 1,2,3.")
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The .npy file to write.")
def command(choose: Callable[[], Any], text: str | None, tokens: str | None, out: Path) -> None:
    """Write the logits of every position: float32 (length, vocabulary)."""
    from refmamba.formats.files import write_file

    if (text is None) == (tokens is None):
        raise DataError("give either --text or --tokens")
    given = parse_tokens(tokens) if tokens is not None else None
    loaded = choose()
    ids = loaded.tokenizer.encode_array(text) if given is None else np.array(given)
    rows, _ = loaded.runner.prefill([ids], logits="all")
    write_file(out, lambda stream: np.save(stream, rows[0]))
