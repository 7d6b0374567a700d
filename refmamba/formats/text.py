"""Text files of the user."""

from collections.abc import Iterator
from pathlib import Path

from refmamba.errors import DataError
from refmamba.formats.reading import TEXT_BYTES, parse_object, read_standard_input, read_utf8

STANDARD_INPUT = Path("-")


def read_text(file: Path) -> str:
    """A user's text, its lines' ends as they are in the file; a byte order mark at the start is no part of it.

    Raises FileError, and DataError where there is no text.
    """
    text = read_utf8(file, TEXT_BYTES)
    if not text.strip():
        raise DataError(f"{file}: there is no text in it")
    return text


def read_prompt(file: Path) -> str:
    """The prompt in a file, or in STANDARD_INPUT: as it is, but for one end of a line at its end. Raises FileError."""
    text = read_standard_input(TEXT_BYTES) if file == STANDARD_INPUT else read_utf8(file, TEXT_BYTES)
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text


def read_prompts(file: Path) -> Iterator[str]:
    """The prompts of a JSON Lines file, {"prompt": TEXT} a line; blank lines are none. Raises FileError, DataError."""
    for number, line in enumerate(read_utf8(file, TEXT_BYTES).split("\n"), 1):
        if line.strip():
            where = f"{file}, line {number}"
            values = parse_object(line.encode(), where)
            if values.keys() != {"prompt"} or not isinstance(values["prompt"], str):
                raise DataError(f'{where}: is not of the form {{"prompt": "a text"}}')
            yield values["prompt"]
