"""`refmamba bench`: tokens a second."""

import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np

from refmamba.commands.options import Command, json_option, model_options, print_json
from refmamba.run.session import ModelChoice, open_session
from refmamba.run.timing import Ours, other_programs, peak_rss, read_bandwidth, speeds, weight_bytes

LONGEST = 2**20  # tokens


@click.command("bench", cls=Command, examples=["refmamba bench --scheme int8", "refmamba bench --scheme int8 --compare --json"])
@model_options()
@click.option("--prompt-len", default=512, show_default=True, type=click.IntRange(1, LONGEST), help="Tokens of the prefill.")
@click.option("--gen-len", default=64, show_default=True, type=click.IntRange(1, LONGEST), help="Tokens of the decode.")
@click.option("--compare", is_flag=True, help="Also transformers and llama.cpp (llama-cpp-python, gguf), if installed.")
@json_option
def command(choice: ModelChoice, prompt_len: int, gen_len: int, compare: bool, as_json: bool) -> None:
    """Measure tokens a second, memory, and the machine's read bandwidth."""
    from refmamba.spec.jit import SETTINGS

    session = open_session(choice)
    if compare:
        session.opened.float_checkpoint()  # which the others run
    runner, config, threads = session.runner, session.runner.config, int(SETTINGS.NUMBA_NUM_THREADS)
    rng = np.random.default_rng(0)
    prompt, generated = rng.integers(0, config.vocab_size, prompt_len), rng.integers(0, config.vocab_size, gen_len)
    ours = Ours(runner, session.scheme.name)
    # Ours alone first, before another program's memory counts.
    speeds([ours], prompt[:16], generated[:4], repeats=1)
    (result,) = speeds([ours], prompt, generated)
    peak = peak_rss()
    others: list[dict[str, Any]] = []
    if compare:
        with tempfile.TemporaryDirectory() as scratch:
            peers = other_programs(session.opened.files.folder, Path(scratch), threads)
            try:
                result, *others = speeds([ours, *peers], prompt, generated)
            finally:
                for peer in peers:
                    peer.close()
    result |= session.describe() | {
        "weight_bytes": weight_bytes(runner.model), "peak_rss_bytes": peak, "threads": threads,
        "read_bandwidth_bytes_per_second": read_bandwidth(threads), "prompt_len": prompt_len, "gen_len": gen_len,
    }  # fmt: skip
    if as_json:
        print_json(result | ({"compare": others} if compare else {}))
        return
    for line in [result, *others]:
        click.echo(
            f"{line['name']:<24} prefill {line['prefill_tokens_per_second']:8.1f} tokens/s"
            f"   decode {line['decode_tokens_per_second']:7.1f} tokens/s"
        )
    click.echo(f"weights {result['weight_bytes'] / 1e6:.1f} MB, peak memory {peak / 1e6:.0f} MB, "
               f"memory reads {result['read_bandwidth_bytes_per_second'] / 1e9:.1f} GB/s, {threads} threads")  # fmt: skip
