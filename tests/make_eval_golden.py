"""Make vectors/eval_golden.json: what lm-evaluation-harness gives for our 20 sample rows a task on a small random Mamba.

    python tests/make_eval_golden.py 20B_tokenizer.json     # the GPT-NeoX tokenizer; needs lm_eval 0.4.13, torch, transformers

The harness's own task definitions and its own Hugging Face model run, float32, on a CPU. Only its downloads are replaced:
`datasets.load_dataset` returns our rows in the hub's form. Kept: each document's log-likelihoods, greedy flags and
metrics, the tasks' metrics, for max_length 2048 and for one that cuts, single requests at the edges, and the tokens of
every text, so that the test needs neither the harness nor the tokenizer.
"""

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import datasets
import lm_eval
import torch
import transformers
from eval_model import write_model
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

HERE = Path(__file__).parent
SAMPLES = HERE.parent / "eval_tasks" / "samples"
NAMES = {"lambada": "lambada_openai"}
HUB = {"EleutherAI/lambada_openai": "lambada", "Rowan/hellaswag": "hellaswag", "baber/piqa": "piqa",
       "allenai/winogrande": "winogrande", "nyu-mll/glue": "rte", "aps/super_glue": "copa",
       "ARC-Easy": "arc_easy", "ARC-Challenge": "arc_challenge"}  # fmt: skip
SHORT = 28  # tokens: cuts most contexts
EDGES = [
    ("", " hello"), ("", "hello world"), ("", "<|endoftext|>hello"), ("The cat sat on the ", "mat."),
    ("The cat sat on the\n\n", "mat."), ("Two  spaces ", "  here"), ("piano piano piano", " piano"), ("a ", " b"),
    ("caf", "é au lait"), ("naïve — ", "“quoted”"), ("1 2 3", " 4 5 6"), ("so so so so", " so so"),
]  # fmt: skip


def rows(task: str) -> list[dict[str, Any]]:
    """Our rows in the form that the hub has."""
    found = [json.loads(line) for line in (SAMPLES / f"{task}.jsonl").read_text("utf-8").splitlines()]
    if task == "rte":
        return [
            {"sentence1": r["premise"], "sentence2": r["hypothesis"], "label": int(r["label"] != "entailment")} for r in found
        ]
    if task == "arc_challenge":  # the original files' form
        return [
            {"id": r["id"], "question": r["question"]["stem"], "answerKey": r["answerKey"],
             "choices": {part: [choice[part] for choice in r["question"]["choices"]] for part in ("text", "label")}}
            for r in found
        ]  # fmt: skip
    return [r | {"label": str(r["label"])} for r in found] if task == "hellaswag" else found


def load_dataset(path: str, name: str | None = None, **_: Any) -> datasets.DatasetDict:
    """Instead of a download."""
    split = datasets.Dataset.from_list(rows(HUB[name or "" if path == "allenai/ai2_arc" else path]))
    return datasets.DatasetDict({"train": split, "validation": split, "test": split})


class Recorder(HFLM):  # type: ignore[misc]  # a class without types where the harness is not installed
    """The harness's model, with a note of the tokens of every text that it encodes."""

    seen: ClassVar[dict[str, list[int]]] = {}

    def tok_encode(self, string: str, *args: Any, **options: Any) -> list[int]:
        ids = super().tok_encode(string, *args, **options)
        self.seen[string] = list(ids)
        return list(ids)


def run(model: Recorder) -> dict[str, Any]:
    """All tasks: documents and metrics."""
    names = [NAMES.get(task, task) for task in HUB.values()]
    out = lm_eval.simple_evaluate(model=model, tasks=names, log_samples=True, bootstrap_iters=1000, verbosity="ERROR")
    found = {}
    for task in HUB.values():
        name = NAMES.get(task, task)
        documents = [
            {
                "loglikelihoods": [r[0][0] for r in sample["resps"]], "greedy": [r[0][1] for r in sample["resps"]],
                "arguments": [list(a.values()) if isinstance(a, dict) else list(a) for a in _arguments(sample)],
            } | {m: float(sample[m]) for m in ("acc", "acc_norm") if m in sample}
            for sample in sorted(out["samples"][name], key=lambda s: s["doc_id"])
        ]  # fmt: skip
        metrics = {k: v for k, v in out["results"][name].items() if "," in k and v != "N/A"}
        found[task] = {"version": out["versions"][name], "metrics": metrics, "documents": documents}
    return found


def _arguments(sample: dict[str, Any]) -> list[Any]:
    given = sample["arguments"]
    return list(given.values()) if isinstance(given, dict) else given


def main(tokenizer_file: str) -> None:
    """Write the table."""
    datasets.load_dataset = load_dataset
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        network = transformers.MambaForCausalLM.from_pretrained(write_model(Path(temporary)), dtype=torch.float32)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=tokenizer_file, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    table: dict[str, Any] = {
        "source": "independent:"
        + ", ".join(f"{library.__name__} {library.__version__}" for library in (lm_eval, transformers, torch)),
        "command": "python tests/make_eval_golden.py 20B_tokenizer.json",
    }
    for name, length in (("full", 2048), ("short", SHORT)):
        model = Recorder(pretrained=network, tokenizer=tokenizer, backend="causal", max_length=length, batch_size=4)
        table[name] = {"max_length": length, "tasks": run(model)}
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(EDGES)]
    model = Recorder(pretrained=network, tokenizer=tokenizer, backend="causal", max_length=2048, batch_size=1)
    table["edges"] = [[*pair, *answer] for pair, answer in zip(EDGES, model.loglikelihood(asked), strict=True)]
    table["tokens"] = Recorder.seen
    greedy = Counter(flag for task in table["full"]["tasks"].values() for d in task["documents"] for flag in d["greedy"])
    print(greedy, [answer[3] for answer in table["edges"]])
    (HERE / "vectors" / "eval_golden.json").write_text(json.dumps(table, ensure_ascii=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
