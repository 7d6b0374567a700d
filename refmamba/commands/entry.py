"""The `refmamba` command as a process: whatever happens in a command ends here, in one line and a status.

0: done. 1: verify found a difference, or the reader of stdout went away. 2: an error. 130: Ctrl-C. 143: SIGTERM.
Nothing heavy is imported before the handlers stand.
"""

import io
import os
import signal
import sys
import traceback
from types import FrameType
from typing import Any, NoReturn

from refmamba.errors import RefmambaError, printable

DEBUG = "REFMAMBA_DEBUG"  # set: the whole traceback before the line
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


class OutputError(RefmambaError):
    """Standard output cannot be written."""


class _Output(io.FileIO):
    """Standard output. A reader that went away, as in `| head`, is no error; everything else is ours, unlike a file's."""

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(f"standard output cannot be written: {error.strerror}") from error


class _Messages(io.FileIO):
    """Standard error. Where it cannot be written nobody reads it, and the work goes on."""

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except OSError:
            return len(content)


def main() -> None:
    """The `refmamba` command."""
    signal.signal(signal.SIGINT, _at_once)
    signal.signal(signal.SIGTERM, _terminate)
    status = 2
    try:
        _open_streams()
        from refmamba.commands.main import refmamba

        refmamba.main(standalone_mode=False, obj=_imported)
        sys.stdout.flush()
        status = 0
    except BaseException as error:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C does not wait for what is being tidied up
        status = _status(error)
    if status == 0:
        return
    try:
        sys.stdout.flush()
    except BaseException:  # said already; and Python would say it once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(status)


def _status(error: BaseException) -> int:
    """The exit status of what a command raised, after its line on stderr."""
    import click

    if os.environ.get(DEBUG) and not isinstance(error, SystemExit | click.exceptions.Exit):
        traceback.print_exception(error)
    match error:
        case SystemExit():
            return error.code if isinstance(error.code, int) else 2
        case click.exceptions.Exit():
            return error.exit_code
        case click.Abort() | KeyboardInterrupt():
            _say("interrupted")
            return INTERRUPTED
        case click.ClickException():
            _show(error)
        case BrokenPipeError():
            return 1
        case RefmambaError():
            _say(str(error))
        case UnicodeEncodeError():
            letters = error.object[error.start : error.end]
            _say(f"{letters!r} cannot be written in {error.encoding}; set PYTHONIOENCODING=utf-8")
        case MemoryError():
            _say(f"not enough memory{f': {error}' if str(error) else ''}")
        case OSError():
            file = f"{error.filename}: " if error.filename else ""
            _say(f"{file}{error.strerror or error}")
        case _:
            _say(f"this is a bug: {_last_line(error)}; please report it with this command, as SECURITY.md says; "
                 f"{DEBUG}=1 shows all of it")  # fmt: skip
    return 2


def _last_line(error: BaseException) -> str:
    """What was raised, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return printable(f"{type(error).__name__}: {error}", 150) + place


def _show(error: Any) -> None:
    """click's usage, if it has any, then its message in one line."""
    shown = io.StringIO()
    error.show(shown)
    usage, label, message = shown.getvalue().partition("Error: ")
    print(usage, end="", file=sys.stderr)
    if label:
        _say(message.strip())


def _say(message: str) -> None:
    print(f"refmamba: {printable(message)}", file=sys.stderr, flush=True)


def _open_streams() -> None:
    """stdout and stderr as this command needs them. Raises OutputError where stdout is closed."""
    closed = sys.stdout is None
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # else a file that is opened gets their number, and their output
        os.set_inheritable(number, True)
    os.close(number)
    sys.stderr = _stream(_Messages(2, "w", closefd=False), sys.stderr)
    if closed:
        sys.stdout = _stream(_Output(1, "w", closefd=False), None)
        raise OutputError("standard output is closed; send it to a file, or to /dev/null")
    sys.stdout = _stream(_Output(1, "w", closefd=False), sys.stdout)


def _stream(raw: io.FileIO, before: Any) -> io.TextIOWrapper:
    """A text stream on `raw`, with the encoding of the stream before."""
    encoding, errors = ("utf-8", "backslashreplace") if before is None else (before.encoding, before.errors)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=raw.isatty() or raw.fileno() == 2)


def _at_once(number: int, frame: FrameType | None) -> NoReturn:
    """Ctrl-C while modules are imported: nothing is half done, and an import would turn the exception into another."""
    os.write(2, b"refmamba: interrupted\n")
    os._exit(INTERRUPTED)


def _imported() -> None:
    """The command is imported: from here on Ctrl-C is an exception, so that what is half written is removed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(TERMINATED)
