"""Reading JSON."""

import json
from pathlib import Path
from typing import Any

from refmamba.errors import CheckpointError


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a model's file. Raises CheckpointError."""
    try:
        values = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; a model folder has a config.json and the weights") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: not a JSON object; download it again")
    return values
