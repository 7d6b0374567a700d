r"""PIQA: which of two ways reaches a goal (Bisk et al. 2020).

A raw row      {"goal": "To dry wet boots,", "sol1": "fill them with paper.", "sol2": "fill them with water."}, and its
               label, 0 or 1, in the same line of valid-labels.lst (the hub's rows hold it: "label")
The prompt     context: "Question: To dry wet boots,\nAnswer:"; continuations: " " + sol1, " " + sol2
The metrics    acc: the likelier solution; acc_norm: the likelier for its length in characters
"""

from refmamba.eval_tasks.task import DataRow, Document, HubFile, Task, choices


def document(row: DataRow) -> Document:
    """The goal as a question, and two solutions."""
    solutions = (row.maybe_empty("sol1"), row.maybe_empty("sol2"))
    return choices(row, f"Question: {row.text('goal')}\nAnswer:", solutions, row.label("label", {"0": 0, "1": 1}))


TASK = Task(
    name="piqa",
    document=document,
    metrics=("acc", "acc_norm"),
    labels="label",
    also="physicaliqa",
    hub=HubFile(
        repo="baber/piqa",
        revision="142f6d7367fd9877f0fb3b5734ea6a545f54cdd1",
        file="piqa_validation.parquet",
        rows=1838,
        sha256="2b17ee1215b1ceb2ddabf4c90a05c5a8b833bef9d207960f57d111c43a2080f3",
    ),
)
