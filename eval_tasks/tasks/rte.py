r"""RTE: does the first text entail the second (GLUE's and SuperGLUE's form of the PASCAL challenges).

A raw row      {"premise": "Ann sold her boat in May.", "hypothesis": "Ann owned a boat.", "label": "entailment"}
               (SuperGLUE), or sentence1, sentence2 (GLUE); the hub's labels are 0 (entailment) and 1
The prompt     context: "Ann sold her boat in May.\nQuestion: Ann owned a boat. True or False?\nAnswer:";
               continuations: " True", " False"
The metric     acc: the likelier answer
"""

from refmamba.eval_tasks.task import DataRow, Document, HubFile, Task, choices

LABELS = {"entailment": 0, "not_entailment": 1, "0": 0, "1": 1}


def document(row: DataRow) -> Document:
    """The two texts as a question, and two answers."""
    first, second = row.text("premise", "sentence1"), row.text("hypothesis", "sentence2")
    context = f"{first}\nQuestion: {second} True or False?\nAnswer:"
    return choices(row, context, ("True", "False"), row.label("label", LABELS))


TASK = Task(
    name="rte",
    document=document,
    metrics=("acc",),
    hub=HubFile(
        repo="nyu-mll/glue",
        revision="bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c",
        file="rte/validation-00000-of-00001.parquet",
        rows=277,
        sha256="fb2aa2e04f551133ba663617a15ae133dc22b0f6a969bc0629b5ea6003ee9cf8",
    ),
)
