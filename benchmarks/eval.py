"""Documents a second: refmamba's evaluation beside lm-evaluation-harness with transformers, on the same documents.

    python benchmarks/eval.py --tokenizer 20B_tokenizer.json --data FOLDER [--rounds N] [--out FILE.md]

A model of the 130m shape with random weights, saved as transformers saves one; PIQA's first 60 rows of the folder,
HellaSwag's first 40, LAMBADA's first 60. Each contestant has a process of its own and loads the model before the clock
starts; the clock covers encoding and scoring. They take turns, task by task, so that a machine's good and bad moments
meet all of them; the best round of each counts. Needs the extras `torch`, `lm_eval`, and transformers.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cpu import machine

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


Answer = tuple[float, list[list[float]]]  # seconds, and each document's log-likelihoods


def with_refmamba(model: str, data: list[str], scheme: str) -> Callable[[str], Answer]:
    """What scores a task with refmamba: a function from the task's name to its Answer."""
    from refmamba.eval_tasks.evaluate import score_block, subject
    from refmamba.eval_tasks.load import load_tasks
    from refmamba.eval_tasks.score import HOST
    from refmamba.run.session import ModelChoice

    job = subject(ModelChoice(model, scheme), 2048).job

    def run(task: str) -> Answer:
        documents = list(enumerate(load_tasks([task], data)[0].documents[: LIMITS[task]]))
        documents.sort(key=lambda item: len(item[1].contexts[0]) + sum(map(len, item[1].continuations)), reverse=True)
        score_block(job, documents[-1:])  # the model is loaded, the kernels are compiled
        started = time.perf_counter()
        size = HOST.documents
        blocks = [r for i in range(0, len(documents), size) for r in score_block(job, documents[i : i + size])]
        seconds = time.perf_counter() - started
        return seconds, [[s.loglikelihood for s in r.scores] for r in sorted(blocks, key=lambda r: r.doc_id)]

    return run


def with_harness(model: str, data: list[str]) -> Callable[[str], Answer]:
    """What scores a task with the harness's Hugging Face model, given the same contexts and continuations."""
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

    def run(task: str) -> Answer:
        documents = load_tasks([task], data)[0].documents[: LIMITS[task]]
        pairs = [pair for d in documents for pair in zip(d.contexts, d.continuations, strict=True)]
        asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        harness.loglikelihood(asked[:1], disable_tqdm=True)
        started = time.perf_counter()
        answers = iter(harness.loglikelihood(asked, disable_tqdm=True))
        seconds = time.perf_counter() - started
        return seconds, [[next(answers)[0] for _ in d.contexts] for d in documents]

    return run


def contest(model: str, data: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Every contestant's best seconds a task, and its log-likelihoods."""
    processes, results = {}, {name: dict[str, Any]() for name in CONTESTANTS}
    for name in CONTESTANTS:
        words = [sys.executable, __file__, "--contestant", name, "--model", model, *(f"--data={word}" for word in data)]
        processes[name] = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for task in [task for _ in range(rounds) for task in LIMITS]:
        for name, process in processes.items():
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"{task}\n")
            process.stdin.flush()
            while not (line := process.stdout.readline()).startswith("["):  # a library may print too
                if not line:
                    raise SystemExit(f"{name} has stopped")
            seconds, values = json.loads(line)
            print(f"{name} {task}: {LIMITS[task] / seconds:.2f} documents/s", file=sys.stderr)
            best = min(seconds, results[name].get(task, {"seconds": seconds})["seconds"])
            results[name][task] = {"seconds": best, "values": values}
    for process in processes.values():
        process.communicate()
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: documents/s, the factor over the harness, and the largest difference of a log-likelihood in full precision.

    Random weights are no model to say what quantization costs on, so `int8` has no difference here.
    """
    lines = ["| | " + " | ".join(f"{task}, documents/s" for task in LIMITS) + " | all | largest difference |"]
    lines.append("|---" * (len(LIMITS) + 3) + "|")
    for name in results:
        cells, largest = [], 0.0
        for task, count in LIMITS.items():
            base, row = results["lm_eval"][task], results[name][task]
            cells.append(f"{count / row['seconds']:.2f} ({base['seconds'] / row['seconds']:.1f} x)")
            for document in zip(row["values"], base["values"], strict=True):
                largest = max(largest, *(abs(a - b) for a, b in zip(*document, strict=True)))
        base_seconds, seconds = (sum(results[key][task]["seconds"] for task in LIMITS) for key in ("lm_eval", name))
        cells.append(f"{base_seconds / seconds:.1f} x")
        difference = f"{largest:.2g}" if name == "fp32" else ""
        lines.append(f"| {TITLES[name]} | " + " | ".join(cells) + f" | {difference} |")
    return "\n".join(lines)


def main() -> None:
    """Run the contestants, each in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="the GPT-NeoX tokenizer's file")
    parser.add_argument("--data", action="append", required=True, help="as refmamba eval takes it")
    parser.add_argument("--out", type=Path, help="write the table here too")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)  # this process is one
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        harness = options.contestant == "lm_eval"
        model, data = options.model, options.data
        run = with_harness(model, data) if harness else with_refmamba(model, data, options.contestant)
        for line in sys.stdin:
            print(json.dumps(run(line.strip())), flush=True)
        return
    if options.tokenizer is None:
        parser.error("--tokenizer is needed")
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), options.tokenizer)
        results = contest(folder, options.data, options.rounds)
    text = f"{os.cpu_count()} cores, {machine()}; the best of {options.rounds} rounds\n\n{table(results)}\n"
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
