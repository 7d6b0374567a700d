"""Writes tests/fuzz/seeds: small files of every kind that refmamba reads, which the fuzzer changes.

Needs torch, pyarrow and gguf.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from click.testing import CliRunner
from fuzz import KEY
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from refmamba.commands.main import refmamba
from refmamba.conformance.dumps import reference_values, write_dump
from refmamba.eval_tasks.results import Result, Results
from refmamba.eval_tasks.score import Score
from refmamba.formats.calibration import Calibration, save_calibration
from refmamba.formats.checkpoint import HUGGING_FACE
from refmamba.formats.folder import open_checkpoint
from refmamba.formats.gguf_writing import Vocabulary, write_gguf
from refmamba.formats.hub import ModelFiles
from refmamba.formats.quantized import save_quantized
from refmamba.formats.state import open_state
from refmamba.formats.weights import file_shape
from refmamba.spec.calibrate import calibrate
from refmamba.spec.config import MambaConfig
from refmamba.spec.mamba1 import Mamba
from refmamba.spec.parameters import quantize_model
from refmamba.spec.scheme import parse_scheme

SEEDS = Path(__file__).parent / "seeds"
SAMPLES = Path(__file__).resolve().parents[2] / "eval_tasks" / "samples"


class Source:
    """Random weights."""

    def __init__(self, config: MambaConfig) -> None:
        self.config, self._rng = config, np.random.default_rng(0)

    def read(self, name: str) -> Any:
        """One tensor."""
        values = self._rng.normal(0, 0.3, self.config.shapes()[name]).astype(np.float32)
        return np.log(np.abs(values) + 0.5) if name.endswith("A_log") else values


def bpe(byte_fallback: bool = False) -> Tokenizer:
    """Byte-level, or with a token for each byte that has no letter, as Llama's."""
    if byte_fallback:
        vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)} | {"▁": 257, "a": 258, "b": 259}
        tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        return tokenizer
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("h", "e"), ("Ġ", "t")]
    names = ["<|endoftext|>", *letters, *("".join(merge) for merge in merges)]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    return tokenizer


def wordpiece() -> Tokenizer:
    """With BERT's parts, and a post-processor."""
    names = ["[UNK]", "[CLS]", "[SEP]", "the", "old", "##s", "man", "a", "##n"]
    tokenizer = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", 1)])
    return tokenizer


def unigram() -> Tokenizer:
    """With scores, as SentencePiece's."""
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -2.0), ("the", -1.0), ("a", -3.0)], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def make_state(file: Path) -> None:
    """Of the model in `hf`; where that lay is left out."""
    words = ["generate", "The old", "--model", str(SEEDS / "hf"), "--max-new-tokens", "2", "--save-state", str(file)]
    done = CliRunner().invoke(refmamba, words)
    assert done.exit_code == 0, done.output
    replace(open_state(file, open_checkpoint(SEEDS / "hf").config), about={}).save(file)


def make_receipt(file: Path) -> None:
    """Of two tokens by the model in `hf`; where that lay is left out."""
    words = ["generate", "The old", "--model", str(SEEDS / "hf"), "--max-new-tokens", "2", "--receipt", str(file)]
    done = CliRunner().invoke(refmamba, words)
    assert done.exit_code == 0, done.output
    file.write_text(json.dumps(json.loads(file.read_text()) | {"about": {}}, indent=1))


def main() -> None:
    """All of them anew."""
    shutil.rmtree(SEEDS, ignore_errors=True)
    tokenizers = {"bpe": bpe(), "bytes": bpe(byte_fallback=True), "wordpiece": wordpiece(), "unigram": unigram()}
    config = MambaConfig(8, 1, tokenizers["bpe"].get_vocab_size() + 3, d_state=4, d_conv=4, expand=2)
    source = Source(config)
    tensors = {name: source.read(name) for name in config.shapes()}
    source.read = tensors.__getitem__  # type: ignore[assignment,method-assign]
    files = {}
    for name, values in tensors.items():
        if name == "lm_head.weight":
            continue
        parts = name.split(".")
        if parts[0] == "layers" and parts[2] != "norm":
            parts.insert(2, "mixer")
        name = ".".join(["backbone", *parts]).replace("embedding.weight", "embeddings.weight")
        files[name] = values.reshape(file_shape(name, values.shape)).copy()
    words = {key: getattr(config, field) for field, (key, *_) in HUGGING_FACE.items()}
    words |= {"model_type": "mamba", "eos_token_id": 0, "bos_token_id": 0}
    for kind in ("hf", "bin", "shards"):
        folder = SEEDS / kind
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(words, indent=1))
        tokenizers["bpe"].save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}')
        (folder / "generation_config.json").write_text('{"eos_token_id": [0]}')
    save_file(files, SEEDS / "hf" / "model.safetensors")
    torch.save({name: torch.from_numpy(values) for name, values in files.items()}, SEEDS / "bin" / "pytorch_model.bin")
    names = sorted(files)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({name: files[name] for name in part}, SEEDS / "shards" / shard)
    index = {"metadata": {}, "weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (SEEDS / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    (SEEDS / "gguf").mkdir()
    write_gguf(
        source, SEEDS / "gguf" / "model.gguf", "Q8_0", "seed", Vocabulary(json.loads(tokenizers["bpe"].to_str()), 0, 0, True)
    )
    maxima = calibrate(source, np.arange(40))
    save_calibration(Calibration(maxima), SEEDS / "calibration.json")
    for scheme in ("w8-all", "w4-all", "int8-smooth", "int4-all", "int8-hadamard", "llm-int8", "flatten-int8"):
        (SEEDS / f"{scheme}.json").write_text(json.dumps(parse_scheme(scheme).to_json()))
        model = quantize_model(source, parse_scheme(scheme), maxima)
        save_quantized(model, SEEDS / scheme, ModelFiles(SEEDS / "hf", SEEDS / "hf" / "tokenizer.json"))
    for name, tokenizer in tokenizers.items():
        tokenizer.save(str(SEEDS / f"tokenizer-{name}.json"))
    make_receipt(SEEDS / "receipt.json")
    make_state(SEEDS / "state.safetensors")
    reference, tokens = Mamba(quantize_model(source, parse_scheme("int8"))), np.arange(3)
    values = {"tokens": tokens, **reference_values(reference, tokens)}
    for name in ("forward.npz", "forward.safetensors"):
        write_dump(SEEDS / name, values, {"scheme": "int8"})
    np.save(SEEDS / "logits.npy", values["logits"])
    x, weight = np.ones((2, 4), np.float32), np.ones(4, np.float32)
    about = {"operation": "rms_norm", "arguments": {"2": 1e-5}}
    write_dump(SEEDS / "operation.npz", {"arguments.0": x, "arguments.1": weight, "result": x}, about)
    (SEEDS / "text.txt").write_text("The old man went out.\nNaïve 中文 🙂\n", "utf-8")
    with Results(SEEDS / "results.sqlite") as results:
        results.save(KEY, [Result(i, (Score(-1.5 * i, True), Score(-2.5, False))) for i in range(3)])
        results._database.execute("PRAGMA journal_mode = DELETE")  # into the one file
    for file in sorted(SAMPLES.glob("*.jsonl")):
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()[:3]]
        (SEEDS / file.name).write_text("\n".join(map(json.dumps, rows)) + "\n")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), SEEDS / f"{file.stem}.parquet")
    items = "".join(
        f'<item id="{i}" asks-for="cause" most-plausible-alternative="1"><p>It rained.</p><a1>Cloud.</a1><a2>Sun.</a2></item>'
        for i in range(3)
    )
    (SEEDS / "copa.xml").write_text(
        f'<?xml version="1.0" encoding="UTF-8"?>\n<copa-corpus version="1.0">{items}</copa-corpus>\n'
    )
    (SEEDS / "rte.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\tIt rained.\tIt was wet.\tentailment\n")


if __name__ == "__main__":
    main()
