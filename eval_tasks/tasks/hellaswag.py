"""HellaSwag: which of four endings goes on (Zellers et al. 2019).

A raw row      {"activity_label": "Baking", "ctx_a": "A man opens an oven.", "ctx_b": "he", "endings": [four],
                "label": 2, ...}
The prompt     context: "Baking: A man opens an oven. He", cleaned; continuations: " " + each ending, cleaned
The metrics    acc: the likeliest ending; acc_norm: the likeliest for its length in characters
"""

import re

from refmamba.eval_tasks.task import DataRow, Document, HubFile, Task, choices

LABELS = {str(i): i for i in range(4)}


def clean(text: str) -> str:
    """Take out what WikiHow's mark-up left behind, in the harness's order; nothing is stripped after that."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def document(row: DataRow) -> Document:
    """The activity and the beginning, and four endings."""
    beginning = f"{row.maybe_empty('ctx_a')} {row.maybe_empty('ctx_b').capitalize()}"
    context = clean(f"{row.text('activity_label')}: {beginning}")
    return choices(row, context, tuple(clean(ending) for ending in row.texts("endings", 4)), row.label("label", LABELS))


TASK = Task(
    name="hellaswag",
    document=document,
    metrics=("acc", "acc_norm"),
    hub=HubFile(
        repo="Rowan/hellaswag",
        revision="218ec52e09a7e7462a5400043bb9a69a41d06b76",
        file="data/validation-00000-of-00001.parquet",
        rows=10042,
        sha256="899813071e1e95efafec90f856e1987d2150fa4d020fc005df6962c259f660cd",
    ),
)
