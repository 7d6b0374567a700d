"""The command line. Text for the user goes to stdout, progress and warnings to stderr; wrong input ends with one line
on stderr and exit status 2, an interrupted run with 130."""

import importlib
import os
import sys

import click

from refmamba import __version__
from refmamba.errors import RefmambaError

COMMANDS = (
    "ablate", "bench", "eval", "generate", "logits", "outliers", "perplexity", "quantize", "replay", "reproduce",
    "smooth-search", "step", "trace", "verify",
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
def refmamba() -> None:
    """Mamba inference with bit-exact integer quantization."""


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
