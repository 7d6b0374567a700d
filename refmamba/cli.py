"""The command line. Text for the user goes to stdout, progress and warnings to stderr; wrong input ends with one line
on stderr and exit status 2, an interrupted run with 130."""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from refmamba import __version__
from refmamba.errors import DataError, RefmambaError
from refmamba.options import model_options

DEFAULT_PROMPT = "Once upon a time"
LATER = {  # commands in files of their own, loaded when they are called
    "ablate": "refmamba.ablate:command",
    "bench": "refmamba.bench:bench",
    "eval": "refmamba.eval_command:evaluate",
    "outliers": "refmamba.outliers:command",
    "perplexity": "refmamba.perplexity:command",
    "reproduce": "refmamba.reproduce:command",
    "smooth-search": "refmamba.smooth_search:command",
    "verify": "refmamba.verify:verify",
}


class Commands(click.Group):
    """The commands of this file, and those that are imported only when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *LATER])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in LATER:
            return super().get_command(ctx, cmd_name)
        module, attribute = LATER[cmd_name].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


@click.group(cls=Commands)
@click.version_option(__version__)
def refmamba() -> None:
    """Mamba inference with bit-exact integer quantization."""


@refmamba.command()
@click.argument("prompt", default=DEFAULT_PROMPT)
@model_options
@click.option("--max-new-tokens", default=100, show_default=True, type=click.IntRange(1))
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="0: the likeliest token.")
@click.option("--top-k", default=0, show_default=True, type=click.IntRange(0), help="0: all.")
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1, min_open=True))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the text.")
def generate(
    prompt: str, choose: Callable[[], Any], max_new_tokens: int, temperature: float, top_k: int, top_p: float, seed: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Write text after PROMPT."""
    from refmamba.generate import LogitsHash, Sampler
    from refmamba.generate import generate as tokens_of

    started = time.perf_counter()
    loaded = choose()
    tokenizer = loaded.tokenizer
    ids = tokenizer.encode_array(prompt)
    loaded_at = time.perf_counter()
    sampler, seen = Sampler(temperature, top_k, top_p, seed), LogitsHash()
    text, stream, new, first_at = "", tokenizer.stream(), [], 0.0
    if not as_json:
        click.echo(prompt, nl=False)
    eos = tokenizer.eos_token_id
    for token in tokens_of(loaded.runner, ids, sampler, max_new_tokens, tokenizer.n_ids, eos, seen):
        first_at = first_at or time.perf_counter()
        new.append(token)
        piece = stream.put(token) if token != eos else ""
        text += piece
        if not as_json and piece:
            click.echo(piece, nl=False)
            sys.stdout.flush()
    tail = stream.flush()
    ended = time.perf_counter()
    if not as_json:
        click.echo(tail)
        return
    timings = {"load_seconds": loaded_at - started, "prefill_seconds": first_at - loaded_at, "seconds": ended - started,
               "decode_tokens_per_second": (len(new) - 1) / (ended - first_at) if len(new) > 1 else None}  # fmt: skip
    result = {"prompt": prompt, "text": text + tail, "tokens": new, "logits_sha256": seen.hexdigest()}
    click.echo(json.dumps(result | loaded.describe() | {"timings": timings}, ensure_ascii=False))


def parse_tokens(text: str) -> list[int]:
    """`1,2,3` as tokens. Raises DataError."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise DataError(f"--tokens {text}: give whole numbers with commas between, like 1,2,3") from None


@refmamba.command()
@model_options
@click.option("--text", help="A text, or")
@click.option("--tokens", help="its tokens, 1,2,3.")
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The .npy file to write.")
def logits(choose: Callable[[], Any], text: str | None, tokens: str | None, out: Path) -> None:
    """Write the logits of every position: float32 (length, vocabulary)."""
    from refmamba.files import write_file

    if (text is None) == (tokens is None):
        raise DataError("give either --text or --tokens")
    given = parse_tokens(tokens) if tokens is not None else None
    loaded = choose()
    ids = loaded.tokenizer.encode_array(text) if given is None else np.array(given)
    rows, _ = loaded.runner.prefill([ids], logits="all")
    write_file(out, lambda stream: np.save(stream, rows[0]))


@refmamba.command()
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--scheme", required=True, help="The scheme to save the model under.")
@click.option("--revision", help="Branch, tag or commit of a model on the hub.")
@click.option("--calibrate", type=click.Path(path_type=Path), help="A text, or maxima saved before (.json).")
@click.option("--save-calibration", type=click.Path(path_type=Path), help="Write the maxima to this .json.")
def quantize(
    model: str, folder: Path, scheme: str, revision: str | None, calibrate: Path | None, save_calibration: Path | None
) -> None:
    """Save MODEL quantized in FOLDER, which every command loads."""
    from refmamba import calibrate as calibration
    from refmamba.checkpoint import open_checkpoint, save_quantized
    from refmamba.hub import resolve_model
    from refmamba.load import calibration_for, progress
    from refmamba.model import QuantizedModel, quantize_model
    from refmamba.scheme import parse_scheme
    from refmamba.tokenizer import load_tokenizer

    parsed = parse_scheme(scheme)
    files = resolve_model(model, revision)
    opened = open_checkpoint(files.folder)
    if isinstance(opened, QuantizedModel):
        raise DataError(f"{model}: is quantized already, as {opened.scheme.name}")
    tokenizer = load_tokenizer(files, opened.config)
    absmax = calibration_for(opened, tokenizer, calibrate) if parsed.needs_calibration or save_calibration else None
    if save_calibration and absmax is not None:
        calibration.save_calibration(absmax, save_calibration)
    with progress(quantize_model(opened, parsed, absmax)) as quantized:
        save_quantized(quantized, folder, files.tokenizer)
    click.echo(f"{folder}: {model} as {parsed.name}")


def main() -> None:
    """The `refmamba` command."""
    try:
        refmamba.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code if error.exit_code != 1 else 2)
    except RefmambaError as error:
        click.echo(f"refmamba: {error}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        click.echo("refmamba: interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:  # the reader went away, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
