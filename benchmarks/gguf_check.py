"""refmamba beside llama.cpp on the same GGUF files and tokens: `python benchmarks/gguf_check.py` writes results/gguf.{json,md}.

For each type: llama.cpp on the file, refmamba under fp32 on the same file, and refmamba under fp32 on the model that the file
was made of. Perplexity over a text's tokens in one context, and tokens chosen greedily after its beginning. In F32 all three
must choose the same tokens, with perplexities within 0.1 %: the exit status is 1 where they do not.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import refmamba
from refmamba.formats.text import read_text
from refmamba.formats.writing import write_text
from refmamba.run.peers import LLAMA_TYPES, quiet, write_for_llama_cpp
from refmamba.run.session import ModelChoice, open_model
from refmamba.spec.arith import F32Array, IntArray
from refmamba.spec.calibrate import passage
from refmamba.spec.ops import log_softmax

RESULTS = Path(__file__).resolve().parent / "results"
ALLOWED = 1e-3  # of F32's perplexities, relative


class LlamaCpp:
    """llama.cpp on a file, in one context of at most `longest` tokens."""

    def __init__(self, file: Path, longest: int, threads: int) -> None:
        import llama_cpp

        with quiet():
            self._model: Any = llama_cpp.Llama(
                str(file), n_ctx=longest, n_batch=512, n_threads=threads, n_threads_batch=threads, logits_all=True,
                verbose=False,
            )  # fmt: skip

    def start(self, tokens: IntArray) -> F32Array:
        """Logits of every position, (L, vocabulary), of tokens (L,) from the start."""
        self._model.reset()
        self._model._ctx.kv_cache_clear()
        self._model.eval([int(token) for token in tokens])
        return np.array(self._model.scores[: len(tokens)], np.float32)

    def step(self, token: int) -> F32Array:
        """Logits (vocabulary,) of one more token."""
        self._model.eval([token])
        return np.array(self._model.scores[self._model.n_tokens - 1], np.float32)


class Refmamba:
    """The same of a model under fp32."""

    def __init__(self, model: str | Path) -> None:
        self._model, self._state = refmamba.load(model, scheme="fp32"), None

    def start(self, tokens: IntArray) -> F32Array:
        """See LlamaCpp."""
        (logits,), self._state = self._model.prefill([tokens], logits="all")
        return logits

    def step(self, token: int) -> F32Array:
        """See LlamaCpp."""
        logits, self._state = self._model.step([token], self._state)
        return logits.reshape(-1)


Program = LlamaCpp | Refmamba


def perplexity(program: Program, tokens: IntArray) -> float:
    """exp of the mean negative log-likelihood of tokens[1:]."""
    chosen = log_softmax(program.start(tokens[:-1]))[np.arange(len(tokens) - 1), tokens[1:]]
    return float(np.exp(-np.mean(chosen, dtype=np.float64)))


def greedy(program: Program, prompt: IntArray, count: int) -> list[int]:
    """The likeliest token after a prompt, again and again."""
    tokens = [int(np.argmax(program.start(prompt)[-1]))]
    while len(tokens) < count:
        tokens.append(int(np.argmax(program.step(tokens[-1]))))
    return tokens


def agreement(ours: list[int], others: list[int]) -> int:
    """How many tokens are the same before the first that differs."""
    return next((n for n, pair in enumerate(zip(ours, others, strict=True)) if pair[0] != pair[1]), len(ours))


def compare(model: str, text: str, kinds: list[str], length: int, count: int, threads: int) -> list[dict[str, Any]]:
    """A row for each type."""
    opened = open_model(ModelChoice(model, "fp32"))
    tokens = opened.tokenizer.encode_array(text)[: length + 1]
    prompt, source = tokens[:32], Refmamba(model)
    expected, chosen, rows = perplexity(source, tokens), greedy(source, prompt, count), []
    for kind in kinds:
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / f"{kind}.gguf"
            write_for_llama_cpp(opened.float_checkpoint(), file, kind)
            theirs, ours = LlamaCpp(file, len(tokens) + count, threads), Refmamba(file)
            found = greedy(theirs, prompt, count)
            rows.append({
                "type": kind, "bytes": file.stat().st_size, "source_perplexity": expected,
                "refmamba_perplexity": perplexity(ours, tokens), "llama_cpp_perplexity": perplexity(theirs, tokens),
                "llama_cpp_same_tokens": agreement(greedy(ours, prompt, count), found),
                "source_same_tokens": agreement(chosen, found), "tokens": count,
            })  # fmt: skip
            print(rows[-1], file=sys.stderr)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = ["| type | MB | perplexity, llama.cpp | refmamba, the same file | refmamba, the source | first tokens the same |",
             "| --- |" + " ---: |" * 5]  # fmt: skip
    lines += [
        f"| {r['type']} | {r['bytes'] / 1e6:.1f} | {r['llama_cpp_perplexity']:.4f} | {r['refmamba_perplexity']:.4f} "
        f"| {r['source_perplexity']:.4f} | {r['llama_cpp_same_tokens']} of {r['tokens']} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """All types; exit status 1 where F32 is not the same."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="small")
    parser.add_argument("--text", type=Path, help="a text file; the passage inside the package")
    parser.add_argument("--types", nargs="+", default=list(LLAMA_TYPES), choices=list(LLAMA_TYPES))
    parser.add_argument("--length", type=int, default=1024, help="tokens of the text that are scored")
    parser.add_argument("--tokens", type=int, default=64, help="tokens that are chosen")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    text = passage() if options.text is None else read_text(options.text)
    rows = compare(options.model, text, options.types, options.length, options.tokens, options.threads)
    RESULTS.mkdir(exist_ok=True)
    write_text(
        RESULTS / "gguf.json", json.dumps({"model": options.model, "length": options.length, "rows": rows}, indent=1) + "\n"
    )
    head = f"{options.model}; perplexity of {options.length} tokens in one context, tokens chosen greedily after 32.\n\n"
    write_text(RESULTS / "gguf.md", head + table(rows))
    print(head + table(rows))
    wrong = [
        row for row in rows if row["type"] == "F32" and (
            row["source_same_tokens"] < row["tokens"]
            or abs(row["llama_cpp_perplexity"] / row["source_perplexity"] - 1) > ALLOWED
        )
    ]  # fmt: skip
    sys.exit(len(wrong))


if __name__ == "__main__":
    main()
