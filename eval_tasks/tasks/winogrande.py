"""WinoGrande: which of two names fills the gap (Sakaguchi et al. 2019).

A raw row      {"sentence": "The cup fell off the shelf because the _ was slippery.", "option1": "cup",
                "option2": "shelf", "answer": "2"}
The prompt     contexts: "... because the cup", "... because the shelf"; one continuation: " was slippery."
The metric     acc: the context after which the continuation is likelier
"""

from refmamba.errors import DataError
from refmamba.eval_tasks.task import DataRow, Document, HubFile, Task


def document(row: DataRow) -> Document:
    """The sentence up to the gap with each option in it, and what follows the gap."""
    before, gap, after = row.text("sentence").partition("_")
    if not gap:
        raise DataError(f"{row.where}: field 'sentence' has no '_' for the options to fill")
    contexts = (before + row.text("option1"), before + row.text("option2"))
    return Document(row.where, contexts, (" " + after.strip(),) * 2, row.label("answer", {"1": 0, "2": 1}))


TASK = Task(
    name="winogrande",
    document=document,
    metrics=("acc",),
    hub=HubFile(
        repo="allenai/winogrande",
        revision="01e74176c63542e6b0bcb004dcdea22d94fb67b5",
        file="winogrande_xl/validation-00000-of-00001.parquet",
        rows=1267,
        sha256=None,
    ),
)
