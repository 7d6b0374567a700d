"""Quality and speed beside llama.cpp, of the same weights on the same token ids: writes benchmarks/results/quality.{json,md}.

    python benchmarks/quality.py --text FILE --calibrate FILE [--tokens N] [--models small 130m]

The small model reads a text; GPTQ sees another one. A model of the 130m shape with random weights reads random tokens, of which
only the divergence says anything. Every contender has a process of its own, and they take turns where speed is measured. The
divergence is that of a contender's probabilities from those of `fp32`: the mean over tokens of sum p log(p / q), in nats. Needs
llama-cpp-python and gguf; without them, what is ours is measured alone.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from cpu import SHAPES, RandomSource, machine, save
from safetensors.numpy import save_file

from refmamba.backends.cpu.backend import Cpu
from refmamba.formats.quantized import arrays
from refmamba.formats.text import read_text
from refmamba.formats.writing import write_text
from refmamba.run.peers import Apart, LlamaCpp, installed, quiet, write_for_llama_cpp
from refmamba.run.perplexity import CALL, divergence
from refmamba.run.rounding import round_by_gptq
from refmamba.run.session import ModelChoice, open_model
from refmamba.run.timing import Ours, speeds
from refmamba.spec.arith import F32Array, IntArray
from refmamba.spec.config import ParameterSource
from refmamba.spec.parameters import quantize_model
from refmamba.spec.scheme import parse_scheme

REFERENCE, GPTQ = "fp32", ", GPTQ"
OUR_SCHEMES = (REFERENCE, "int8", "w8-all", "int4", "int4-all")
ROUNDED = ("int4" + GPTQ, "int4-all" + GPTQ)  # where there is a text to round by
KINDS = ("F32", "Q8_0", "Q4_0", "Q4_K_M")
RESULTS = Path(__file__).resolve().parent / "results"
PROMPT, GENERATED, RANDOM_TOKENS = 512, 64, 1024


def source_of(model: str) -> ParameterSource:
    """The float weights of the small model, or random ones of one of SHAPES."""
    return RandomSource(SHAPES[model]) if model in SHAPES else open_model(ModelChoice(model)).float_checkpoint()


def log_probabilities(logits: F32Array) -> Any:
    """(L, vocabulary) -> the same, float64: the same arithmetic for every program."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


class Judge:
    """What a contender's logits are compared with, in files that all processes share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def judge(self, name: str, pieces: Iterator[F32Array], tokens: IntArray) -> None:
        """Write nats and divergence of a contender, summed over tokens; of REFERENCE its logits too.

        pieces: logits of tokens[:-1], some rows (L, vocabulary) after the other.
        """
        reference, row, nats, total = self._folder / "reference", 0, 0.0, 0.0
        with reference.open("wb" if name == REFERENCE else "rb") as file:
            for logits in pieces:
                targets = tokens[row + 1 : row + 1 + len(logits)]
                nats -= float(log_probabilities(logits)[np.arange(len(targets)), targets].sum())
                if name == REFERENCE:
                    file.write(logits.tobytes())
                else:
                    expected = np.fromfile(file, np.float32, logits.size).reshape(logits.shape)
                    total += float(divergence(expected, logits).sum())
                row += len(logits)
        (self._folder / f"{name}.json").write_text(json.dumps({"nats": nats, "divergence": total}), "utf-8")

    def verdict(self, name: str) -> dict[str, float]:
        """What `judge` wrote."""
        values: dict[str, float] = json.loads((self._folder / f"{name}.json").read_text("utf-8"))
        return values


class OursJudged(Ours):
    """A scheme of ours on the cpu backend, saved to know the file's size."""

    def __init__(self, model: str, name: str, folder: Path, calibration: IntArray) -> None:
        source, backend, scheme = source_of(model), Cpu(), parse_scheme(name.removesuffix(GPTQ))
        gptq = name.endswith(GPTQ)
        quantized = round_by_gptq(source, scheme, calibration, None, backend) if gptq else quantize_model(source, scheme)
        save_file(dict(arrays(quantized)), folder / f"{name}.file")
        super().__init__(backend.load(quantized), name)
        self._judge = Judge(folder)

    def score(self, tokens: IntArray) -> None:
        """Hand the logits of a text to the judge."""

        def pieces() -> Iterator[F32Array]:
            state = None
            for start in range(0, len(tokens) - 1, CALL):
                (rows,), state = self._runner.prefill([tokens[start : min(start + CALL, len(tokens) - 1)]], state, logits="all")
                yield rows

        self._judge.judge(self.name, pieces(), tokens)


class LlamaJudged(LlamaCpp):
    """llama.cpp with one of KINDS."""

    def __init__(self, model: str, name: str, folder: Path, threads: int) -> None:
        aside = folder / f"of {name}"
        aside.mkdir()
        write_for_llama_cpp(source_of(model), aside / "model.gguf", name)
        self._file = (aside / "model.gguf").rename(folder / f"{name}.file")
        super().__init__(self._file, name, threads)
        self._judge, self._threads, self._kind = Judge(folder), threads, name

    def score(self, tokens: IntArray) -> None:
        """Hand the logits of a text to the judge."""
        import llama_cpp

        with quiet():
            model: Any = llama_cpp.Llama(
                str(self._file), n_ctx=len(tokens), n_batch=CALL, n_ubatch=CALL, n_threads=self._threads,
                n_threads_batch=self._threads, logits_all=True, verbose=False,
            )  # fmt: skip

        def pieces() -> Iterator[F32Array]:
            for start in range(0, len(tokens) - 1, CALL):
                end = min(start + CALL, len(tokens) - 1)
                model.eval(tokens[start:end].tolist())
                yield model.scores[start:end]

        self._judge.judge(self._kind, pieces(), tokens)


def measure(model: str, tokens: IntArray, n_bytes: int, calibration: IntArray, threads: int) -> list[dict[str, Any]]:
    """Every contender with one model. n_bytes: of the text that the tokens after the first are; 0: they are no text."""
    ours = [*OUR_SCHEMES, *(ROUNDED if len(calibration) else ())]
    kinds = KINDS if installed("gguf") and installed("llama_cpp") else ()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        peers = list[Apart]()
        try:
            for name in [*ours, *kinds]:  # the reference first; one after the other, as each takes all cores
                if name in kinds:
                    peers.append(Apart(name, LlamaJudged, model, name, folder, threads))
                else:
                    peers.append(Apart(name, OursJudged, model, name, folder, calibration))
                peers[-1].seconds("score", tokens)
            rng, vocabulary = np.random.default_rng(0), source_of(model).config.vocab_size
            times = speeds(peers, rng.integers(0, vocabulary, PROMPT), rng.integers(0, vocabulary, GENERATED))
        finally:
            for peer in peers:
                peer.close()
        results = []
        for speed in times:
            name, count = speed["name"], len(tokens) - 1
            verdict, prefix = Judge(folder).verdict(name), "llama.cpp " if name in KINDS else "refmamba "
            results.append(speed | {
                "name": prefix + name, "file_bytes": (folder / f"{name}.file").stat().st_size,
                "bits_per_byte": verdict["nats"] / np.log(2) / n_bytes if n_bytes else None,
                "divergence_nats_per_token": verdict["divergence"] / count if name != REFERENCE else 0.0,
            })  # fmt: skip
    return results


def table(title: str, results: list[dict[str, Any]]) -> str:
    """A Markdown table of one model."""
    columns = ("", "bits per byte", "over fp32", "KL divergence, nats a token", "file, MB", "prefill, tokens/s",
               "decode, tokens/s")  # fmt: skip
    lines = [f"### {title}", "", f"| {' | '.join(columns)} |", "| --- |" + " ---: |" * (len(columns) - 1)]
    for r in results:
        bits, first = r["bits_per_byte"], results[0]["bits_per_byte"]
        quality = f"{bits:.4f} | {bits - first:+.4f}" if bits is not None else " | "
        lines.append(f"| {r['name']} | {quality} | {r['divergence_nats_per_token']:.6f} | {r['file_bytes'] / 1e6:.2f} "
                     f"| {r['prefill_tokens_per_second']:.0f} | {r['decode_tokens_per_second']:.1f} |")  # fmt: skip
    return "\n".join([*lines, ""])


def main() -> None:
    """The whole comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="what the small model reads")
    parser.add_argument("--calibrate", type=Path, help="what GPTQ sees; without it there is none")
    parser.add_argument("--tokens", type=int, default=32768, help="of the text, at most")
    parser.add_argument("--models", nargs="+", default=["small", "130m"], choices=["small", *SHAPES])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    os.environ |= {"NUMBA_NUM_THREADS": str(options.threads), "OMP_NUM_THREADS": str(options.threads)}
    head = (f"{options.threads} threads, prefill of {PROMPT} tokens, decode of {GENERATED}; {time.strftime('%Y-%m-%d')}. "
            f"{machine()}.\n")  # fmt: skip
    models, tables = {}, [head]
    for model in options.models:
        none, n_bytes = np.zeros(0, np.int64), 0
        if model in SHAPES:
            tokens, calibration = np.random.default_rng(1).integers(0, SHAPES[model].vocab_size, RANDOM_TOKENS + 1), none
            title = f"The {model} shape, random weights, {RANDOM_TOKENS} random tokens"
        else:
            tokenizer = open_model(ModelChoice(model)).tokenizer
            tokens = np.concatenate([[tokenizer.prefix], tokenizer.encode_array(read_text(options.text))])[: options.tokens + 1]
            calibration = none if options.calibrate is None else tokenizer.encode_array(read_text(options.calibrate))
            n_bytes = len(tokenizer.decode(tokens[1:].tolist()).encode())
            title = f"The small model, {len(tokens) - 1} tokens of {options.text.name}"
        models[model] = measure(model, tokens, n_bytes, calibration, options.threads)
        tables.append(table(title, models[model]))
    save("quality.md", "\n".join(tables))
    values = {"machine": machine(), "threads": options.threads, "prompt_len": PROMPT, "gen_len": GENERATED, "models": models}
    write_text(RESULTS / "quality.json", json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
