"""`refmamba generate`: writes text."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import click

from refmamba.commands.options import model_options

DEFAULT_PROMPT = "Once upon a time"


@click.command("generate")
@click.argument("prompt", default=DEFAULT_PROMPT)
@model_options
@click.option("--max-new-tokens", default=100, show_default=True, type=click.IntRange(1))
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="0: the likeliest token.")
@click.option("--top-k", default=0, show_default=True, type=click.IntRange(0), help="0: all.")
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1, min_open=True))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the text.")
def command(
    prompt: str, choose: Callable[[], Any], max_new_tokens: int, temperature: float, top_k: int, top_p: float, seed: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Write text after PROMPT."""
    from refmamba.run.generate import LogitsHash, Sampler
    from refmamba.run.generate import generate as tokens_of

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
