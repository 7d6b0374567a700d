"""Peak memory of `refmamba generate`: `python benchmarks/memory.py --tokenizer 20B_tokenizer.json` writes results/memory.md.

A float32 checkpoint of random weights, and the same saved by `refmamba quantize`; each is run as a user runs it, in a new
process whose anonymous memory (what the system cannot drop and read again from a file) is read every millisecond.
Linux only.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from cpu import SHAPES, RandomSource, save
from safetensors.numpy import save_file

from refmamba.formats.checkpoint import HUGGING_FACE

TARGET = 250  # MB, and 1.3 times the codes: the aim


def write_checkpoint(folder: Path, tokenizer: Path, shape: str) -> None:
    """Random weights as Hugging Face lays them out, float32."""
    source = RandomSource(SHAPES[shape])
    folder.mkdir()
    config = {key: getattr(source.config, field) for field, (key, _, _) in HUGGING_FACE.items()}
    (folder / "config.json").write_text(json.dumps({"model_type": "mamba", **config}), encoding="utf-8")
    tensors = {}
    for name in source.config.shapes():
        x = source.read(name)
        layer = name.removeprefix("layers.").partition(".")[0]
        stored = {"embedding.weight": "backbone.embeddings.weight", "norm_f.weight": "backbone.norm_f.weight"}.get(name)
        if stored is None:
            inner = name.removeprefix(f"layers.{layer}.")
            stored = f"backbone.layers.{layer}." + (inner if inner.startswith("norm.") else f"mixer.{inner}")
        tensors[stored] = x[:, None] if name.endswith("conv1d.weight") else x
    save_file(tensors, folder / "model.safetensors")
    shutil.copy(tokenizer, folder / "tokenizer.json")


def peak(words: list[str]) -> tuple[float, float, float]:
    """Peaks of anonymous and of all resident memory in MB, and seconds, of a command."""
    anonymous = resident = 0
    started = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            memory = psutil.Process(process.pid).memory_info()
        except psutil.NoSuchProcess:  # it has ended meanwhile
            break
        anonymous, resident = max(anonymous, memory.rss - memory.shared), max(resident, memory.rss)
        time.sleep(0.001)
    if process.wait():
        raise SystemExit(f"{' '.join(words)} failed")
    return anonymous / 1e6, resident / 1e6, time.perf_counter() - started


def main() -> None:
    """Measure, and write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="the GPT-NeoX tokenizer's file")
    parser.add_argument("--shape", default="130m", choices=list(SHAPES))
    options = parser.parse_args()
    refmamba = [sys.executable, "-m", "refmamba"]
    config = SHAPES[options.shape]
    matrices = [s for n, s in config.shapes().items() if n.endswith(("proj.weight", "embedding.weight"))]
    codes = sum(int(np.prod(s)) for s in matrices) / 1e6
    aim = f"the aim is {1.3 * codes + TARGET:.0f} MB anonymous."
    lines = [f"`w8-all`, {options.shape} shape: {codes:.0f} MB of codes; {aim}", "",
             "| | anonymous, MB | with mapped files, MB | whole command, s |", "| --- | ---: | ---: | ---: |"]  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        plain, saved = Path(scratch) / "float", Path(scratch) / "saved"
        write_checkpoint(plain, options.tokenizer, options.shape)
        subprocess.run([*refmamba, "quantize", plain, saved, "--scheme", "w8-all"], check=True, stdout=subprocess.DEVNULL)
        for title, folder, scheme in (
            ("float32 checkpoint", plain, ["--scheme", "w8-all"]),
            ("saved by `quantize`", saved, []),
        ):
            words = [*refmamba, "generate", "The old man", "--model", str(folder), "--max-new-tokens", "16", *scheme]
            peak(words)  # the first run compiles
            lines.append("| {} | {:.0f} | {:.0f} | {:.2f} |".format(title, *peak(words)))
    save("memory.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
