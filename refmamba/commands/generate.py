"""`refmamba generate`: writes text."""

import sys
import time
from pathlib import Path

import click

from refmamba.commands.options import MOST, SEEDS, Number, json_option, model_options, print_json, receipt_option
from refmamba.run.generate import Sampler
from refmamba.run.model import Model
from refmamba.run.receipt import Recorder
from refmamba.run.session import ModelChoice, open_session

DEFAULT_PROMPT = "Once upon a time"


@click.command("generate")
@click.argument("prompt", default=DEFAULT_PROMPT)
@model_options()
@click.option("--max-new-tokens", default=100, show_default=True, type=click.IntRange(1, MOST))
@click.option("--temperature", default=0.0, show_default=True, type=Number(0), help="0: the likeliest token.")
@click.option("--top-k", default=0, show_default=True, type=click.IntRange(0, MOST), help="0: all.")
@click.option("--top-p", default=1.0, show_default=True, type=Number(0, 1, min_open=True))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, SEEDS))
@receipt_option
@json_option
def command(
    prompt: str, choice: ModelChoice, max_new_tokens: int, temperature: float, top_k: int, top_p: float, seed: int,
    receipt: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Write text after PROMPT."""
    started = time.perf_counter()
    session = open_session(choice)
    model, sampler = Model(session), Sampler(temperature, top_k, top_p, seed)
    recorder = None if receipt is None else Recorder(session, session.tokenizer.encode_array(prompt), sampler)
    generation = model.stream(
        prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        look=recorder.look if recorder else None,
    )  # fmt: skip
    loaded_at, first_at = time.perf_counter(), 0.0
    if not as_json:
        click.echo(prompt, nl=False)
    for piece in generation:
        first_at = first_at or time.perf_counter()
        if not as_json and piece:
            click.echo(piece, nl=False)
            sys.stdout.flush()
    if recorder is not None and receipt is not None:
        recorder.save(receipt)
    ended, count = time.perf_counter(), len(generation.tokens)
    if not as_json:
        click.echo()
        return
    timings = {"load_seconds": loaded_at - started, "prefill_seconds": first_at - loaded_at, "seconds": ended - started,
               "decode_tokens_per_second": (count - 1) / (ended - first_at) if count > 1 else None}  # fmt: skip
    result = {"prompt": prompt, "text": generation.text, "tokens": generation.tokens,
              "logits_sha256": generation.logits_sha256}  # fmt: skip
    print_json(result | session.describe() | {"timings": timings})
