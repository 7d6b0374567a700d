"""Files that are never half written: the content goes to a file beside the target, which is then renamed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from refmamba.errors import DataError


def write_file(file: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file beside `file`, then rename that to `file`. Raises DataError where it cannot be written."""
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        try:
            with aside.open("wb") as stream:
                write(stream)
            aside.replace(file)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{file}: cannot be written: {error.strerror}") from error


def write_text(file: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all. Raises DataError."""
    write_file(file, lambda stream: stream.write(text.encode("utf-8")))
