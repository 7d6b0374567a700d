"""The command line. Text for the user goes to stdout, progress and warnings to stderr; refmamba.commands.entry
decides how a command ends."""

import importlib
from collections.abc import Callable

import click

from refmamba import __version__

COMMANDS = (
    "ablate", "bench", "eval", "export", "generate", "info", "logits", "outliers", "perplexity", "push", "quantize",
    "replay", "reproduce", "scheme", "smooth-search", "step", "trace", "verify",
)  # fmt: skip


class Commands(click.Group):
    """Each command is `command` in the file of its name, which is imported only when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"refmamba.commands.{cmd_name.replace('-', '_')}").command
        return command


@click.group(cls=Commands)
@click.version_option(__version__)
@click.pass_obj
def refmamba(imported: Callable[[], None] | None) -> None:
    """Mamba inference with bit-exact integer quantization."""
    if imported is not None:  # whoever starts this as a process wants to know that the command's modules are there
        imported()
