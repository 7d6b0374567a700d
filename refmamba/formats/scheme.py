"""Schemes by name, or from a JSON file of the user."""

from pathlib import Path
from typing import Any

from refmamba.errors import SchemeError
from refmamba.formats.reading import read_json
from refmamba.spec.scheme import Scheme, parse_scheme, scheme_from_json

SUFFIX = ".json"


def open_scheme(name: str) -> Scheme:
    """The scheme of a name, or of a file whose name ends in .json. Raises FileError, SchemeError."""
    if not name.endswith(SUFFIX):
        return parse_scheme(name)
    return scheme_in(Path(name), read_json(Path(name)))


def scheme_in(file: Path, values: Any) -> Scheme:
    """The scheme that a file has as JSON. Raises SchemeError, which names the file."""
    try:
        return scheme_from_json(values)
    except SchemeError as error:
        raise SchemeError(f"{file}: {error}") from None
