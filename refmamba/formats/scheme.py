"""Schemes by name, or from a JSON file of the user."""

from pathlib import Path

from refmamba.errors import SchemeError
from refmamba.formats.reading import read_json
from refmamba.spec.scheme import Scheme, parse_scheme, scheme_from_json

SUFFIX = ".json"


def open_scheme(name: str) -> Scheme:
    """The scheme of a name, or of a file whose name ends in .json. Raises FileError, SchemeError."""
    if not name.endswith(SUFFIX):
        return parse_scheme(name)
    try:
        return scheme_from_json(read_json(Path(name)))
    except SchemeError as error:
        raise SchemeError(f"{name}: {error}") from None
