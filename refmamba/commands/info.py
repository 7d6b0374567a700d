"""`refmamba info`: what a model, a receipt or a saved state is."""

import textwrap
from collections.abc import Iterator
from typing import Any

import click

from refmamba.commands.options import (
    Command,
    act_bits_option,
    bits_option,
    json_option,
    model_options,
    print_json,
    revision_option,
    scheme_option,
)  # fmt: skip
from refmamba.errors import printable
from refmamba.formats.writing import json_text
from refmamba.run.info import describe
from refmamba.run.session import ModelChoice
from refmamba.spec.scheme import WIDTH, scheme_from_json

LABEL = 15  # columns


@click.command("info", cls=Command, examples=["refmamba info small --scheme int8", "refmamba info model-Q4_0.gguf --json"])
@click.argument("model")
@model_options(revision_option, scheme_option, bits_option, act_bits_option)
@json_option
def command(choice: ModelChoice, as_json: bool) -> None:
    """Tell what MODEL is: a folder, `small`, OWNER/NAME, a GGUF file, a receipt or a saved state.

    What it takes, and what runs it, is told for its scheme: the saved one, the one that is named, or w8-all.
    """
    values = describe(choice)
    if as_json:
        print_json(values)
        return
    for label, text in _lines(values):
        indent = " " * LABEL
        click.echo("\n".join(textwrap.wrap(f"{label:<{LABEL}}{text}", WIDTH, subsequent_indent=indent, break_on_hyphens=False)))
    if "scheme" in values:
        click.echo(scheme_from_json(values["scheme"]).table())


def _lines(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Labels and texts."""
    yield "name", printable(values["name"])
    yield "kind", values["kind"]
    if "config" not in values:
        shown = {key: value for key, value in values.items() if key not in ("name", "kind", "scheme")}
        for key, value in shown.items():
            yield key.replace("_", " "), printable(value if isinstance(value, str) else json_text(value))
        return
    c, tokenizer = values["config"], values["tokenizer"]
    yield (
        "model",
        (
            f"{values['architecture']}, {values['parameters'] / 1e6:.2f} M parameters: {c['n_layer']} layers, "
            f"d_model {c['d_model']}, d_inner {c['d_inner']}, d_state {c['d_state']}, d_conv {c['d_conv']}, "
            f"dt_rank {c['dt_rank']}, vocabulary {c['vocab_size']}, {'tied' if c['tie_embeddings'] else 'own'} head"
        ),
    )
    types = ", ".join(f"{count} {name}" for name, count in values["types"].items())
    yield "on disk", f"{_megabytes(values['disk_bytes'])} in {', '.join(values['files'])}; tensors: {types}"
    yield "content sha256", values["content_sha256"]
    if "error" in tokenizer:
        yield "tokenizer", tokenizer["error"]
    else:
        yield (
            "tokenizer",
            (
                f"{tokenizer['tokens']} tokens; begin {tokenizer['begin']}, end {tokenizer['end']}, "
                f"added to a text {tokenizer['added']}"
            ),
        )
    yield "computed", f"under specification {values['spec_version']}; calibration: {values['calibration']}"
    for name, reason in values["backends"].items():
        yield f"  {name}", reason or "runs it"
    yield "memory", f"{_megabytes(values['memory_bytes'])}, {_megabytes(values['state_bytes'])} of it a sequence's state"
    yield (
        "speed",
        (
            f"a token reads {_megabytes(values['token_bytes'])}; this machine's memory reads "
            f"{values['read_bandwidth_bytes_per_second'] / 1e9:.1f} GB/s, measured now: at most "
            f"{values['most_tokens_per_second']:.0f} tokens/s, unless the weights fit its cache"
        ),
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
