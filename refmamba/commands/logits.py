"""`refmamba logits`: the logits of every position."""

from pathlib import Path

import click
import numpy as np

from refmamba.commands.options import Command, OutputFile, model_options, receipt_option, text_or_tokens
from refmamba.formats.writing import write_file
from refmamba.run.model import Model
from refmamba.run.receipt import Recorder
from refmamba.run.session import ModelChoice, open_session


@click.command(
    "logits",
    cls=Command,
    examples=[
        'refmamba logits --text "The old man" --scheme int8 --out logits.npy',
        "refmamba logits --tokens 1,2,3 --out logits.npy",
    ],
)
@model_options()
@click.option("--text", help="A text, or")
@click.option("--tokens", help="its tokens, 1,2,3.")
@receipt_option
@click.option("--out", required=True, type=OutputFile(), help="The .npy file to write.")
def command(choice: ModelChoice, text: str | None, tokens: str | None, receipt: Path | None, out: Path) -> None:
    """Write the logits of every position: float32 (length, vocabulary)."""
    words, session = text_or_tokens(text, tokens), open_session(choice)
    sequence = session.tokenizer.encode_array(words) if isinstance(words, str) else np.array(words)
    logits = Model(session).logits(sequence)
    write_file(out, lambda stream: np.save(stream, logits))
    if receipt is not None:
        recorder = Recorder(session, sequence)
        for row, token in zip(logits, sequence, strict=True):
            recorder.look(row, int(token))
        recorder.save(receipt)
