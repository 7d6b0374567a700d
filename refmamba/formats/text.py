"""Text files of the user."""

from pathlib import Path

from refmamba.errors import DataError
from refmamba.formats.reading import TEXT_BYTES, read_utf8


def read_text(file: Path) -> str:
    """A user's text, its lines' ends as they are in the file; a byte order mark at the start is no part of it.

    Raises FileError, and DataError where there is no text.
    """
    text = read_utf8(file, TEXT_BYTES)
    if not text.strip():
        raise DataError(f"{file}: there is no text in it")
    return text
