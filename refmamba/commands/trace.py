"""`refmamba trace`: every intermediate of a forward, by name."""

from pathlib import Path

import click
import numpy as np

from refmamba.commands.options import (
    MODEL_OPTIONS,
    Command,
    OutputFile,
    backend_option,
    device_option,
    model_options,
    text_or_tokens,
)
from refmamba.conformance.dumps import reference_values, write_dump
from refmamba.run.session import ModelChoice, open_model
from refmamba.spec import SPEC_VERSION
from refmamba.spec.mamba1 import Mamba


@click.command("trace", cls=Command, examples=['refmamba trace --text "The old man" --scheme int8 --out ours.safetensors'])
@model_options(*(option for option in MODEL_OPTIONS if option not in (backend_option, device_option)))
@click.option("--text", help="A text, or")
@click.option("--tokens", help="its tokens, 1,2,3.")
@click.option("--out", required=True, type=OutputFile(), help="The .safetensors or .npz to write.")
def command(choice: ModelChoice, text: str | None, tokens: str | None, out: Path) -> None:
    """Write everything that the reference computes for a text: each site of the trace, the tokens and the logits."""
    words, opened = text_or_tokens(text, tokens), open_model(choice)
    sequence = opened.tokenizer.encode_array(words) if isinstance(words, str) else np.array(words)
    values = reference_values(Mamba(opened.quantized(opened.scheme)), sequence)
    about = {"tool": f"refmamba, specification {SPEC_VERSION}", "model": choice.model, "scheme": opened.scheme.name,
             "dtype": "float32"}  # fmt: skip
    write_dump(out, {"tokens": sequence.astype(np.int64), **values}, about)
