"""`refmamba generate`: writes text."""

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from refmamba.commands.options import (
    MOST,
    SEEDS,
    Command,
    InputFile,
    Number,
    OutputFile,
    json_option,
    model_options,
    option,
    print_json,
    receipt_option,
)  # fmt: skip
from refmamba.errors import DataError
from refmamba.formats.reading import unread_standard_input
from refmamba.formats.text import STANDARD_INPUT, read_prompt, read_prompts
from refmamba.run.generate import Generation, Sampler, load_context
from refmamba.run.model import Model
from refmamba.run.receipt import Recorder
from refmamba.run.session import ModelChoice, Session, open_session

DEFAULT_PROMPT = "Once upon a time"
EXAMPLES = (
    'refmamba generate "The old man" --scheme int8 --max-new-tokens 40',
    "refmamba generate --file book.txt --stop Chapter --no-echo",
    'refmamba generate "It was a" --n 3 --temperature 0.8 --top-p 0.9',
    "refmamba generate --batch prompts.jsonl --max-new-tokens 20",
    "refmamba generate --file book.txt --max-new-tokens 0 --save-state book.safetensors",
    'refmamba generate " And then" --load-state book.safetensors',
)


@click.command("generate", cls=Command, examples=EXAMPLES)
@click.argument("prompt", required=False)
@option("Prompt", "--file", type=InputFile(), help="The prompt is this text file, without the end of its last line.")
@option("Prompt", "--batch", type=InputFile(), help='Prompts, {"prompt": "..."} a line; of each, what --json prints, a line.')
@option("Prompt", "--load-state", type=click.Path(path_type=Path), help="Go on from what --save-state saved.")
@option("Length", "--max-new-tokens", default=100, type=click.IntRange(0, MOST), help="0: only read the prompt.")
@option("Length", "--stop", multiple=True, help="End before this text; repeatable.")
@option("Sampling", "--temperature", default=0.0, type=Number(0), help="0: the likeliest token.")
@option("Sampling", "--top-k", default=0, type=click.IntRange(0, MOST), help="Of the K likeliest; 0: of all.")
@option("Sampling", "--top-p", default=1.0, type=Number(0, 1, min_open=True), help="Of the fewest that hold this share.")
@option("Sampling", "--seed", default=0, type=click.IntRange(0, SEEDS), help="The same seed draws the same tokens.")
@option("Sampling", "--n", default=1, type=click.IntRange(1, MOST), help="Samples, with the seeds SEED, SEED + 1, ...")
@model_options()
@option("Output", "--no-echo", is_flag=True, help="Print what is written without the prompt.")
@option("Output", "--logprobs", type=click.IntRange(0, MOST), help="In the JSON, each token's and those of so many likeliest.")
@option("Output", "--save-state", type=OutputFile(), help="Save what --load-state goes on from, as safetensors.")
@receipt_option
@json_option
def command(
    prompt: str | None, file: Path | None, batch: Path | None, load_state: Path | None, max_new_tokens: int,
    stop: tuple[str, ...], temperature: float, top_k: int, top_p: float, seed: int, n: int, choice: ModelChoice,
    no_echo: bool, logprobs: int | None, save_state: Path | None, receipt: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Write text after PROMPT; `-` reads that from standard input.

    Left out it is "Once upon a time", and after --load-state nothing, so that the text simply goes on.
    """
    several, as_json = batch is not None or n > 1, as_json or batch is not None
    for wrong, words in (
        (sum(source is not None for source in (prompt, file, batch)) > 1, "give one of PROMPT, --file and --batch"),
        (logprobs is not None and not as_json, "--logprobs are told in JSON: give --json too"),
        (several and save_state is not None, "--save-state is of one text; leave out --batch and --n"),
        (several and receipt is not None, "--receipt is of one text; leave out --batch and --n"),
        (load_state is not None and receipt is not None, "--receipt is of a whole text; leave out --load-state"),
        (max_new_tokens == 0 and (several or save_state is None), "--max-new-tokens 0 only reads a prompt, for --save-state"),
        (max_new_tokens == 0 and receipt is not None, "--receipt is of tokens that are written; --max-new-tokens 0 has none"),
    ):
        if wrong:
            raise DataError(words)
    if prompt != str(STANDARD_INPUT) and (what := unread_standard_input()):
        click.echo(f"refmamba: standard input is {what}, and is not read; to read it give - as the prompt", err=True)
    started = time.perf_counter()
    if batch is not None:
        prompts = list(read_prompts(batch))
    elif file is not None or prompt == str(STANDARD_INPUT):
        prompts = [read_prompt(file or STANDARD_INPUT)]
    else:
        prompts = [prompt or ("" if prompt == "" or load_state else DEFAULT_PROMPT)]
    session = open_session(choice)
    if save_state is not None:
        session.check_exact("a saved state")
    context = None if load_state is None else load_context(load_state, session)
    model = Model(session)
    words_of_all: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed,
        "stop": stop, "logprobs": logprobs, "after": context,
    }  # fmt: skip
    recorder = None
    if receipt is not None:
        sampler = Sampler(temperature, top_k, top_p, seed)
        recorder = Recorder(session, session.tokenizer.encode_array(prompts[0]), sampler)
    if several:
        written = zip(_repeated(prompts, n), model.generate_batch(prompts, n=n, **words_of_all), strict=True)
    else:
        look = recorder.look if recorder else None
        written = zip(prompts, [model.stream(prompts[0], look=look, **words_of_all)], strict=True)
    loaded = time.perf_counter()
    for number, (text, generation) in enumerate(written):
        if as_json:
            print_json(_as_json(text, generation.finish(), session, loaded - started, time.perf_counter() - started))
        else:
            _print(("\n" if number else "") + ("" if no_echo else text))
            for piece in [generation.text] if several else generation:
                _print(piece)
            click.echo()
        sys.stdout.flush()
        if save_state is not None:
            model.save_state(generation.context, save_state)
    if recorder is not None and receipt is not None:
        recorder.save(receipt)


def _repeated(prompts: list[str], n: int) -> Iterator[str]:
    return (prompt for prompt in prompts for _ in range(n))


def _print(text: str) -> None:
    if text:
        click.echo(text, nl=False)
        sys.stdout.flush()


def _as_json(prompt: str, generation: Generation, session: Session, load_seconds: float, seconds: float) -> dict[str, Any]:
    """The object of --json. seconds: since the start of the command."""
    count, times = len(generation.tokens), generation.times
    result = {"prompt": prompt, "text": generation.text, "tokens": generation.tokens,
              "logits_sha256": generation.logits_sha256, "seed": generation.sampler.seed}  # fmt: skip
    if generation.logprobs:
        result["logprobs"] = [asdict(chosen) for chosen in generation.logprobs]
    timings = {"load_seconds": load_seconds, "prefill_seconds": times.first - times.began if count else None,
               "seconds": seconds,
               "decode_tokens_per_second": (count - 1) / (times.last - times.first) if count > 1 else None}  # fmt: skip
    return result | session.describe() | {"timings": timings}
