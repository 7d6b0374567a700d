"""The options that several commands have, each of them once. They stand in this order in every --help."""

import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from refmamba.backends import DEFAULT_BACKEND
from refmamba.errors import DataError

SEEDS = 2**63 - 1  # the largest seed
MOST = 2**31 - 1  # of what is counted; no machine holds more
GROUPS = ("Model", "", "Data", "Output")  # in every --help; where "" stands, a command's own ones, and its own groups
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


class Option(click.Option):
    """An option that stands under the name of a group in --help."""

    def __init__(self, *args: Any, group: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


def option(group: str, *names: str, **kwargs: Any) -> Decorator:
    """click.option in a group."""
    return click.option(*names, cls=Option, group=group, **kwargs)


class Command(click.Command):
    """A command whose --help has its options in GROUPS, with their defaults; then examples, which are whole command lines."""

    def __init__(self, name: str, *, examples: Sequence[str], **kwargs: Any) -> None:
        super().__init__(name, **kwargs)
        self.context_settings = {"show_default": True}
        self.examples = examples

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The groups, and then what is in none."""
        groups: dict[str, list[tuple[str, str]]] = {}
        *params, its_help = (param for param in self.get_params(ctx) if isinstance(param, click.Option))
        for param in params:
            if record := param.get_help_record(ctx):
                groups.setdefault(getattr(param, "group", ""), []).append(record)
        titles = sorted(groups, key=lambda title: GROUPS.index(title) if title in GROUPS else GROUPS.index(""))
        for title in titles:
            last = [its_help.get_help_record(ctx) or ("", "")] if title == titles[-1] else []
            with formatter.section(f"{title} options" if title else "Options"):
                formatter.write_dl(groups[title] + last)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples, each in a line of its own that can be copied."""
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"{'':>{formatter.current_indent}}{example}\n")


def names_option(name: str, *, default: str | None = None, help: str, group: str = "") -> Decorator:
    """An option that takes names with commas between: a tuple. Raises DataError where it is given none."""
    return option(group, name, default=default, callback=_names, help=help)


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


class OutputFile(click.Path):
    """A file to write. It is checked before the work whether it can be, and that no other option of the command names it.

    Raises DataError. ending: what the name must end in, by which it is known again. database: a file that is checked by what
    opens it.
    """

    def __init__(self, ending: str = "", database: bool = False) -> None:
        super().__init__(path_type=Path)
        self.ending, self.database = ending, database

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        from refmamba.formats.writing import check_file

        file, name = Path(value), param.opts[0] if param else ""
        if not str(value):
            raise DataError(f"{name} '': names nothing; leave it out, or give the name of a file")
        if self.ending and file.suffix != self.ending:
            raise DataError(f"{name} {file}: the name must end in {self.ending}")
        claim(ctx, name, file, written=True)
        if not self.database:
            check_file(file)
        return file


def claim(ctx: click.Context | None, option: str, file: Path | None, *, written: bool) -> None:
    """Raise DataError where two options of a command name one file, which it would write for one of them."""
    from refmamba.formats.reading import reason

    if ctx is None or file is None:
        return
    try:
        place, device = os.path.realpath(file), file.exists() and not file.is_file()
    except (OSError, ValueError) as error:  # a folder that is closed to us; a name that is too long, or with a zero byte
        raise DataError(f"{option} {file}: cannot be used: {reason(error)}") from None
    if device:  # into which several may write
        return
    others: dict[str, tuple[str, bool]] = ctx.meta.setdefault("refmamba.files", {})
    other, other_written = others.setdefault(place, (option, written))
    if other != option and (written or other_written):
        raise DataError(f"{other} and {option} name one file, {file}; give each its own")


class InputFile(click.Path):
    """A file to read, which no other option of the command may write. Raises DataError."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        claim(ctx, param.opts[0] if param else "", Path(value), written=False)
        return Path(value)


class Number(click.FloatRange):
    """A number of a range, and not the one float that is in every range: NaN; nor an infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def json_file_option(name: str, *parameter: str, help: str) -> Decorator:
    """An option for a .json to write. Raises DataError for another ending, by which it would not be known again."""
    return option("Output", name, *parameter, type=OutputFile(".json"), help=help)


model_option = option(
    "Model",
    "--model",
    default="small",
    show_default=True,
    help="`small`, a folder, a GGUF file, or OWNER/NAME[:FILE.gguf] on the hub.",
)
revision_option = option("Model", "--revision", help="Branch, tag or commit of a model on the hub.")
scheme_option = option(
    "Model", "--scheme", help="fp32, int8, int4, wN-all, wNaM-all, ..., FILE.json: docs/SPEC.md, section 4, has them all."
)
bits_option = option("Model", "--bits", type=int, help="N: the scheme wN-all.")
act_bits_option = option("Model", "--act-bits", type=int, help="M, with --bits N: the scheme wNaM-all.")
calibrate_option = option("Model", "--calibrate", type=InputFile(), help="Text or .json for static scales.")
percentile_option = option(
    "Model", "--percentile", type=float, default=1.0, show_default=True,
    help="Cut the maxima of --calibrate's text at this share of all magnitudes, as 0.99999.",
)  # fmt: skip
save_calibration_option = json_file_option(
    "--save-calibration", "calibration_file", help="Write the maxima of every channel to this .json, for --calibrate."
)
receipt_option = json_file_option("--receipt", help="Write what was computed to this .json, for `refmamba replay`.")
backend_option = option(
    "Model",
    "--backend",
    default=DEFAULT_BACKEND,
    show_default=True,
    help="reference, cpu, torch, triton, mamba-ssm, or module:Class.",
)
add_bos_option = option(
    "Model",
    "--add-bos/--no-add-bos",
    default=None,
    help="Begin texts with the begin token, or not.  [default: as the tokenizer says]",
)
device_option = option("Model", "--device", help="cpu, cuda, cuda:1: where the backend offers it.")


def parse_tokens(text: str) -> list[int]:
    """`1,2,3` as tokens. Raises DataError."""
    try:
        tokens = [int(part) for part in text.split(",")]
    except ValueError:
        raise DataError(f"--tokens {text}: give whole numbers with commas between, like 1,2,3") from None
    if any(abs(token) > MOST for token in tokens):
        raise DataError(f"--tokens {text}: no model has so large a token")
    return tokens


def text_or_tokens(text: str | None, tokens: str | None) -> str | list[int]:
    """What --text or --tokens names, where a command takes either. Raises DataError for both, and for none."""
    words = text if tokens is None else parse_tokens(tokens)
    if words is None or None not in (text, tokens):
        raise DataError("give either --text or --tokens")
    return words


def text_option(help: str, *, required: bool = False) -> Decorator:
    """--text FILE, read: a TextFile. Where it may be left out it is the passage inside the package."""
    words = help if required else f"{help}  [default: the package's passage]"
    return click.option("--text", type=InputFile(), required=required, callback=_read, help=words)


def tasks_option(default: str | None) -> Decorator:
    """--tasks, as names: () for all that have data, None where it is left out without a default."""
    names = "lambada,hellaswag,piqa,winogrande,rte,copa,arc_easy,arc_challenge"
    return option("Data", "--tasks", default=default, callback=_tasks, help=f"{names}, or `all` that have data.")


data_option = option("Data", "--data", multiple=True, help="A folder, TASK=FILE, `hub` or `sample` (default); repeatable.")
limit_option = option("Data", "--limit", type=click.IntRange(1, MOST), help="Only the first N documents of each task.")
results_option = option(
    "Data", "--results", type=OutputFile(database=True), default="refmamba-results.sqlite", show_default=True,
    help="Keeps every document's result; a run goes on where the last one stopped.",
)  # fmt: skip
workers_option = option(
    "Data", "--workers", type=click.IntRange(1, 1024), help="Score in N processes of this machine (extra `cluster`)."
)
json_option = option("Output", "--json", "as_json", is_flag=True, help="Print one JSON object instead.")


def print_json(values: Any) -> None:
    """Print what --json asks for, in one line."""
    from refmamba.formats.writing import json_text

    click.echo(json_text(values))


MODEL_OPTIONS = (
    model_option, revision_option, scheme_option, bits_option, act_bits_option, calibrate_option, percentile_option,
    backend_option, device_option, add_bos_option,
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
