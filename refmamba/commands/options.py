"""The options of every command that runs a model: --model --scheme --bits --act-bits --backend --device ..."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from refmamba.backends import DEFAULT_BACKEND

MODEL_OPTIONS = (
    click.option("--model", default="small", show_default=True, help="`small`, a folder, or OWNER/NAME on the hub."),
    click.option("--revision", help="Branch, tag or commit of a model on the hub."),
    click.option("--scheme", help="fp32, wN-mlp, wN-all, wNaM-mlp, wNaM-all, int8, int8-static, int8-smooth, FILE.json."),
    click.option("--bits", type=int, help="N: the scheme wN-all."),
    click.option("--act-bits", type=int, help="M, with --bits N: the scheme wNaM-all."),
    click.option("--calibrate", type=click.Path(path_type=Path), help="Text or .json for static scales."),
    click.option("--backend", default=DEFAULT_BACKEND, show_default=True, help="reference, cpu, torch, or module:Class."),
    click.option("--device", help="cpu, cuda, cuda:1: where the backend offers it."),
)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options, and one argument `choose`: a function that loads what they name.

    choose(default_scheme) where the command's default is not w8-all.
    """

    @functools.wraps(command)
    def with_choice(
        *, model: str, revision: str | None, scheme: str | None, bits: int | None, act_bits: int | None,
        calibrate: Path | None, backend: str, device: str | None, **rest: Any,
    ) -> Any:  # fmt: skip
        from refmamba.run.session import ModelChoice, choose_scheme, load

        chosen = choose_scheme(scheme, bits, act_bits)
        choice = ModelChoice(model, chosen, backend, device, revision, calibrate)
        return command(choose=functools.partial(load, choice), **rest)

    for option in reversed(MODEL_OPTIONS):
        with_choice = option(with_choice)
    return with_choice
