r"""LAMBADA, OpenAI's version: the last word of a passage (Paperno et al. 2016).

A raw row      {"text": "... He looked at the old gate. \"It is locked,\" said Ann, and gave him the key"}
The prompt     context: all but the last piece of the text, split on single spaces; continuation: " key"
The metrics    acc: every token of the continuation is the likeliest; perplexity: exp(-mean log-likelihood)
"""

from refmamba.eval_tasks.task import DataRow, Document, HubFile, Task


def document(row: DataRow) -> Document:
    """The passage without its last piece, and a space and that piece."""
    *before, last = row.text("text").split(" ")
    return Document(row.where, (" ".join(before),), (" " + last,), 0)


TASK = Task(
    name="lambada",
    document=document,
    metrics=("perplexity", "acc"),
    split=("test",),
    hub=HubFile(
        repo="EleutherAI/lambada_openai",
        revision="900124bf3b8235c6daf21033af9948b3f07346c4",
        file="data/lambada_test.jsonl",
        rows=5153,
        sha256="4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
    ),
)
