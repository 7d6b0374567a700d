r"""ARC: questions of school science with three to five answers (Clark et al. 2018), in an easy and a challenging part.

A raw row      {"question": "What makes a shadow?", "answerKey": "B",
                "choices": {"text": ["wind", "light", "sound"], "label": ["A", "B", "C"]}}; the labels may be digits.
                In the original files the choices are inside the question:
                {"question": {"stem": "What makes a shadow?", "choices": [{"text": "wind", "label": "A"}, ...]}, ...}
The prompt     context: "Question: What makes a shadow?\nAnswer:"; continuations: " " + each answer
The metrics    acc: the likeliest answer; acc_norm: the likeliest for its length in characters
"""

from refmamba.errors import DataError
from refmamba.eval_tasks.task import DataRow, Document, HubFile, Task, choices

REPO, REVISION = "allenai/ai2_arc", "210d026faf9955653af8916fad021475a3f00453"
FEWEST, MOST = 3, 5  # answers


def document(row: DataRow) -> Document:
    """The question, and its answers."""
    if isinstance(row.values.get("question"), dict):
        inner = row.inner("question")
        stem, pairs = inner.text("stem"), inner.rows("choices")
        texts, labels = tuple(pair.maybe_empty("text") for pair in pairs), tuple(pair.text("label") for pair in pairs)
    else:
        inner = row.inner("choices")
        stem, texts = row.text("question"), inner.texts("text", FEWEST, MOST)
        labels = inner.texts("label", FEWEST, MOST)
    if not FEWEST <= len(texts) <= MOST or len(set(labels)) != len(texts):
        count = f"{len(texts)} answers with {len(set(labels))} labels"
        raise DataError(f"{row.where}: {count}; there are {FEWEST} to {MOST}, each with its own")
    gold = row.label("answerKey", {label: index for index, label in enumerate(labels)})
    return choices(row, f"Question: {stem}\nAnswer:", texts, gold)


def task(name: str, folder: str, rows: int, sha256: str) -> Task:
    """One of the two parts."""
    hub = HubFile(repo=REPO, revision=REVISION, file=f"{folder}/test-00000-of-00001.parquet", rows=rows, sha256=sha256)
    return Task(name=name, document=document, metrics=("acc", "acc_norm"), split=("test",), hub=hub)


EASY = task("arc_easy", "ARC-Easy", 2376, "4160597d618ae851c7eb04e281574f3f654776216ac6b6641588d64527b47177")
CHALLENGE = task("arc_challenge", "ARC-Challenge", 1172, "62f03257e737aed263f55c6abf87c7bb0028a44a6bdd2a26eb1279eb42c1d1e9")
