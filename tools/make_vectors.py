"""Write tests/vectors: `python tools/make_vectors.py [operations | models | small]`; the same bytes on every run.

operations: one file an operation; results by hand, from rational arithmetic (tools/exact.py) or from mpmath.
models:     the generated models, and the SHA-256 of their logits under each scheme; transformers' float64 logits.
small:      the SHA-256 of the logits of the small model inside the package, to be written again when it is retrained.
"""

import json
import sys
from pathlib import Path

import code_vectors
import operation_vectors
from generated_models import write_models, write_small
from vector_rows import vectors

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "vectors"


def write_operations(folder: Path) -> None:
    """Write a file of vectors for each operation into a folder."""
    operation_vectors.functions()
    code_vectors.codes()
    code_vectors.groups()
    code_vectors.products()
    operation_vectors.block()
    folder.mkdir(parents=True, exist_ok=True)
    for operation, rows in vectors.items():
        lines = ",\n".join(json.dumps(row) for row in rows)
        head = f'{{"format": 1, "operation": "{operation}", "vectors": [\n'
        (folder / f"{operation}.json").write_text(f"{head}{lines}\n]}}\n", encoding="utf-8")


if __name__ == "__main__":
    for part in sys.argv[1:] or ["operations", "models"]:
        if part == "operations":
            write_operations(FOLDER / "operations")
        elif part == "models":
            write_models(FOLDER)
        elif part == "small":
            write_small(FOLDER)
        else:
            sys.exit(f"make_vectors.py: no part {part}; give operations, models or small")
