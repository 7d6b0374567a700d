"""Text files of the user."""

from pathlib import Path

from refmamba.errors import DataError


def read_text(file: Path) -> str:
    """A user's text file. Raises DataError where it is missing, empty or not UTF-8."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise DataError(f"{file}: there is no text in it")
    return text
