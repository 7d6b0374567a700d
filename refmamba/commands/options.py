"""The options that several commands have, each of them once. They stand in this order in every --help."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from refmamba.backends import DEFAULT_BACKEND
from refmamba.errors import DataError

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _names(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """`a, b` -> ("a", "b"), none of them twice."""
    if value is None:
        return None
    names = tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))
    if not names:
        raise DataError(f"{param.opts[0]} '{value}': names nothing; leave it out, or give names with commas between")
    return names


def _tasks(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """The same; `all` is the empty tuple, as `load_tasks` takes it."""
    names = _names(ctx, param, value)
    return () if names == ("all",) else names


def names_option(name: str, *, default: str | None = None, help: str) -> Decorator:
    """An option that takes names with commas between: a tuple. Raises DataError where it is given none."""
    return click.option(name, default=default, show_default=True, callback=_names, help=help)


@dataclass(frozen=True)
class TextFile:
    """What --text names. file: None for the passage inside the package."""

    file: Path | None
    text: str

    def __str__(self) -> str:
        return str(self.file or "the package's passage")


def _read(ctx: click.Context, param: click.Parameter, file: Path | None) -> TextFile:
    from refmamba.formats.text import read_text
    from refmamba.spec.calibrate import passage

    return TextFile(file, passage() if file is None else read_text(file))


def _json_name(ctx: click.Context, param: click.Parameter, file: Path | None) -> Path | None:
    if file is not None and file.suffix != ".json":
        raise DataError(f"{param.opts[0]} {file}: the name must end in .json")
    return file


def json_file_option(name: str, *parameter: str, help: str) -> Decorator:
    """An option for a .json to write. Raises DataError for another ending, by which it would not be known again."""
    path = click.Path(path_type=Path, dir_okay=False)
    return click.option(name, *parameter, type=path, callback=_json_name, help=help)


model_option = click.option("--model", default="small", show_default=True, help="`small`, a folder, or OWNER/NAME on the hub.")
revision_option = click.option("--revision", help="Branch, tag or commit of a model on the hub.")
scheme_option = click.option(
    "--scheme", help="fp32, wN-mlp, wN-all, wNaM-mlp, wNaM-all, int8, int8-static, int8-smooth, FILE.json."
)
bits_option = click.option("--bits", type=int, help="N: the scheme wN-all.")
act_bits_option = click.option("--act-bits", type=int, help="M, with --bits N: the scheme wNaM-all.")
calibrate_option = click.option("--calibrate", type=click.Path(path_type=Path), help="Text or .json for static scales.")
save_calibration_option = json_file_option(
    "--save-calibration", "calibration_file", help="Write the maxima of every channel to this .json, for --calibrate."
)
receipt_option = json_file_option("--receipt", help="Write what was computed to this .json, for `refmamba replay`.")
backend_option = click.option(
    "--backend", default=DEFAULT_BACKEND, show_default=True, help="reference, cpu, torch, or module:Class."
)
add_bos_option = click.option(
    "--add-bos/--no-add-bos", default=None, help="Begin texts with the begin token, or not.  [default: as the tokenizer says]"
)
device_option = click.option("--device", help="cpu, cuda, cuda:1: where the backend offers it.")


def parse_tokens(text: str) -> list[int]:
    """`1,2,3` as tokens. Raises DataError."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise DataError(f"--tokens {text}: give whole numbers with commas between, like 1,2,3") from None


def text_or_tokens(text: str | None, tokens: str | None) -> str | list[int]:
    """What --text or --tokens names, where a command takes either. Raises DataError for both, and for none."""
    words = text if tokens is None else parse_tokens(tokens)
    if words is None or None not in (text, tokens):
        raise DataError("give either --text or --tokens")
    return words


def text_option(help: str, *, required: bool = False) -> Decorator:
    """--text FILE, read: a TextFile. Where it may be left out it is the passage inside the package."""
    words = help if required else f"{help}  [default: the package's passage]"
    return click.option("--text", type=click.Path(path_type=Path), required=required, callback=_read, help=words)


def tasks_option(default: str | None) -> Decorator:
    """--tasks, as names: () for all that have data, None where it is left out without a default."""
    words = f"lambada,hellaswag,piqa,winogrande,rte,copa, or `all` that have data.  [default: {default or 'none'}]"
    return click.option("--tasks", default=default, callback=_tasks, help=words)


data_option = click.option("--data", multiple=True, help="A folder, TASK=FILE, `hub` or `sample` (default); repeatable.")
limit_option = click.option("--limit", type=click.IntRange(1), help="Only the first N documents of each task.")
results_option = click.option(
    "--results", type=click.Path(path_type=Path, dir_okay=False), default="refmamba-results.sqlite", show_default=True,
    help="Keeps every document's result; a run goes on where the last one stopped.",
)  # fmt: skip
workers_option = click.option(
    "--workers", type=click.IntRange(1), help="Score in N processes of this machine (extra `cluster`)."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")

MODEL_OPTIONS = (
    model_option, revision_option, scheme_option, bits_option, act_bits_option, calibrate_option, backend_option,
    device_option, add_bos_option,
)  # fmt: skip


def model_options(*options: Decorator) -> Decorator:
    """Give a command these of MODEL_OPTIONS (none named: all), and one argument `choice`: the ModelChoice that they make."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def with_choice(
            scheme: str | None = None, bits: int | None = None, act_bits: int | None = None, **rest: Any
        ) -> Any:  # fmt: skip
            from refmamba.run.session import ModelChoice, choose_scheme

            words = {name: rest.pop(name) for name in ModelChoice.__dataclass_fields__ if name in rest}
            return command(choice=ModelChoice(scheme=choose_scheme(scheme, bits, act_bits), **words), **rest)

        decorated: Callable[..., Any] = with_choice
        for option in reversed(options or MODEL_OPTIONS):
            decorated = option(decorated)
        return decorated

    return decorate
