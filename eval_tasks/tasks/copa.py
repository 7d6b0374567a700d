"""COPA: the likelier cause or effect (Roemmele et al. 2011; SuperGLUE's form, or the original XML).

A raw row      {"premise": "The lamp went out.", "choice1": "The bulb was old.", "choice2": "It was noon.",
                "question": "cause", "label": 0}
The prompt     context: "The lamp went out because" (effect: therefore); continuations: "  the bulb was old.", "  it was
               noon.": two spaces, the delimiter's and the choice's own
The metric     acc: the likelier choice
"""

from refmamba.errors import DataError
from refmamba.eval_tasks.task import DataRow, Document, HubFile, Task, choices

CONNECTORS = {"cause": "because", "effect": "therefore"}


def document(row: DataRow) -> Document:
    """The premise without its full stop and a connector, and two choices."""
    question = row.text("question")
    if question not in CONNECTORS:
        raise DataError(f"{row.where}: field 'question' is '{question}'; it must be cause or effect")
    context = f"{row.text('premise').strip()[:-1]} {CONNECTORS[question]}"
    options = tuple(f" {text[0].lower()}{text[1:]}" for text in (row.text("choice1"), row.text("choice2")))
    return choices(row, context, options, row.label("label", {"0": 0, "1": 1}))


TASK = Task(
    name="copa",
    document=document,
    metrics=("acc",),
    hub=HubFile(
        repo="aps/super_glue",
        revision="3de24cf8022e94f4ee4b9d55a6f539891524d646",
        file="copa/validation-00000-of-00001.parquet",
        rows=100,
        sha256=None,
    ),
)
