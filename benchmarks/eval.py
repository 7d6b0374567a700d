"""Documents a second: refmamba's evaluation beside lm-evaluation-harness with transformers, on the same documents.

    python benchmarks/eval.py --tokenizer 20B_tokenizer.json --data FOLDER [--out FILE.md]

A model of the 130m shape with random weights, saved as transformers saves one; PIQA's first 60 rows of the folder,
HellaSwag's first 40, LAMBADA's first 60. Each contestant has a process of its own and loads the model before the clock
starts; the clock covers encoding and scoring. Needs the extras `torch`, `lm_eval`, and transformers.
"""
# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-call, unused-ignore"

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LIMITS = {"piqa": 60, "hellaswag": 40, "lambada": 60}
CONTESTANTS = ("lm_eval", "int8", "fp32")
TITLES = {"lm_eval": "lm_eval + transformers, float32", "int8": "refmamba cpu int8", "fp32": "refmamba cpu fp32 (exact)"}


def write_model(folder: Path, tokenizer: Path) -> None:
    """A random model of the 130m shape, with a tokenizer."""
    import torch
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    MambaForCausalLM(MambaConfig(vocab_size=50280, hidden_size=768, num_hidden_layers=24)).save_pretrained(folder)
    shutil.copy(tokenizer, folder / "tokenizer.json")


def with_refmamba(model: str, data: list[str], scheme: str) -> dict[str, Any]:
    """Seconds a task, and every log-likelihood."""
    from refmamba.eval_tasks.evaluate import BLOCK, score_block, subject
    from refmamba.eval_tasks.load import load_tasks
    from refmamba.load import ModelChoice

    job = subject(ModelChoice(model, scheme), 2048).job
    found: dict[str, Any] = {}
    for dataset in load_tasks(tuple(LIMITS), data):
        documents = list(enumerate(dataset.documents[: LIMITS[dataset.task.name]]))
        documents.sort(key=lambda item: len(item[1].contexts[0]) + sum(map(len, item[1].continuations)), reverse=True)
        score_block(job, documents[-1:])  # the model is loaded, the kernels are compiled
        started = time.perf_counter()
        results = [r for i in range(0, len(documents), BLOCK) for r in score_block(job, documents[i : i + BLOCK])]
        seconds = time.perf_counter() - started
        values = [[s.loglikelihood for s in r.scores] for r in sorted(results, key=lambda r: r.doc_id)]
        found[dataset.task.name] = {"seconds": seconds, "values": values}
    return found


def with_harness(model: str, data: list[str]) -> dict[str, Any]:
    """The same from the harness's Hugging Face model, given the same contexts and continuations."""
    import torch
    import transformers
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from refmamba.eval_tasks.load import load_tasks

    torch.set_num_threads(os.cpu_count() or 1)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=f"{model}/tokenizer.json", bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    network = transformers.MambaForCausalLM.from_pretrained(model, dtype=torch.float32)
    harness = HFLM(pretrained=network, tokenizer=tokenizer, backend="causal", max_length=2048, batch_size=1)
    found: dict[str, Any] = {}
    for dataset in load_tasks(tuple(LIMITS), data):
        documents = dataset.documents[: LIMITS[dataset.task.name]]
        pairs = [pair for d in documents for pair in zip(d.contexts, d.continuations, strict=True)]
        asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        harness.loglikelihood(asked[:1], disable_tqdm=True)
        started = time.perf_counter()
        answers = iter(harness.loglikelihood(asked, disable_tqdm=True))
        seconds = time.perf_counter() - started
        found[dataset.task.name] = {"seconds": seconds, "values": [[next(answers)[0] for _ in d.contexts] for d in documents]}
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: documents/s, the factor over the harness, and the largest difference of a log-likelihood in full precision.

    Random weights are no model to say what quantization costs on, so `int8` has no difference here.
    """
    lines = ["| | " + " | ".join(f"{task}, documents/s" for task in LIMITS) + " | largest difference |"]
    lines.append("|---" * (len(LIMITS) + 2) + "|")
    for name in found:
        cells, largest = [], 0.0
        for task, count in LIMITS.items():
            base, mine = found["lm_eval"][task], found[name][task]
            cells.append(f"{count / mine['seconds']:.2f} ({base['seconds'] / mine['seconds']:.1f} x)")
            for one, other in zip(mine["values"], base["values"], strict=True):
                largest = max(largest, *(abs(a - b) for a, b in zip(one, other, strict=True)))
        difference = f"{largest:.2g}" if name == "fp32" else ""
        lines.append(f"| {TITLES[name]} | " + " | ".join(cells) + f" | {difference} |")
    return "\n".join(lines)


def main() -> None:
    """Run the contestants, each in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="the GPT-NeoX tokenizer's file")
    parser.add_argument("--data", action="append", required=True, help="as refmamba eval takes it")
    parser.add_argument("--out", type=Path, help="write the table here too")
    parser.add_argument("--one", choices=CONTESTANTS, help=argparse.SUPPRESS)  # this process is a contestant
    parser.add_argument("--model", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        one = (
            with_harness(given.model, given.data)
            if given.one == "lm_eval"
            else with_refmamba(given.model, given.data, given.one)
        )
        print(json.dumps(one))
        return
    if given.tokenizer is None:
        parser.error("--tokenizer is needed")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), given.tokenizer)
        for name in CONTESTANTS:
            words = [sys.executable, __file__, "--one", name, "--model", folder, *(f"--data={word}" for word in given.data)]
            done = subprocess.run(words, stdout=subprocess.PIPE, check=True)
            found[name] = json.loads(done.stdout.splitlines()[-1])
    text = f"{os.cpu_count()} cores\n\n{table(found)}\n"
    print(text)
    if given.out:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
