"""What a file says beside the weights, and would change a number in silence: each with the value that is right."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from eval_model import END, SMALL_TOKENIZER, write_small
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer as HubTokenizer

import refmamba
from refmamba.commands.main import refmamba as command_line
from refmamba.errors import CheckpointError, TensorError
from refmamba.eval_tasks.evaluate import model_sha256, subject
from refmamba.eval_tasks.load import load_file as load_rows
from refmamba.eval_tasks.tasks import TASKS
from refmamba.formats.hub import resolve_model
from refmamba.formats.text import read_text
from refmamba.run.session import ModelChoice

PARAGRAPH = "The old man went out of the house, and there he sat for a long while.\r\nThen it rained.\r\n"


def run_json(*words: str) -> dict[str, Any]:
    """What a command prints with --json."""
    done = CliRunner().invoke(command_line, [*words, "--json"], catch_exceptions=False)
    values: dict[str, Any] = json.loads(done.stdout)
    return values


# --- the tokenizer's settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("adds", [False, True])
def test_perplexity_is_of_the_whole_text(adds: bool, tmp_path: Path) -> None:
    """From the definition, on the tokens of the tokenizers library: training left truncation to 8 and padding to 16."""
    folder = write_small(tmp_path / "model", adds)
    (tmp_path / "text.txt").write_bytes(PARAGRAPH.encode())
    ids = [0, *HubTokenizer.from_file(str(SMALL_TOKENIZER)).encode(PARAGRAPH, add_special_tokens=False).ids]
    model = refmamba.load(folder, scheme="fp32")
    rows = model.logits(ids[:-1]).astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    nats = float(np.sum(np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(len(rows)), ids[1:]]))
    found = run_json("perplexity", "--model", str(folder), "--scheme", "fp32", "--text", str(tmp_path / "text.txt"))
    assert found["tokens"] == len(ids) - 1
    assert found["bytes"] == len(PARAGRAPH.encode())
    assert found["added_tokens"] == ([0] if adds else [])
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(PARAGRAPH.encode()), rel=1e-5)


def test_a_quantized_folder_has_the_tokenizer_as_it_works_and_the_end_tokens(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "model", adds=True)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 223]}')
    saved = refmamba.load(refmamba.quantize(folder, tmp_path / "saved", bits=8))
    kept = HubTokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    assert (kept.truncation, kept.padding) == (None, None)
    assert saved.tokenizer.encode(PARAGRAPH) == refmamba.load(folder, bits=8).tokenizer.encode(PARAGRAPH)
    assert saved.tokenizer.end_token_ids == {0, 223}


def test_the_begin_token_can_be_left_out_and_is_told(tmp_path: Path) -> None:
    folder = str(write_small(tmp_path / "model", adds=True))
    begun = run_json("generate", "The", "--model", folder, "--max-new-tokens", "1")
    left = run_json("generate", "The", "--model", folder, "--max-new-tokens", "1", "--no-add-bos")
    written = run_json("generate", f"{END}The", "--model", folder, "--max-new-tokens", "1", "--no-add-bos")
    assert (begun["added_tokens"], left["added_tokens"]) == ([0], [])
    assert begun["logits_sha256"] == written["logits_sha256"] != left["logits_sha256"]
    keys = {subject(ModelChoice(folder, "fp32", add_bos=add), 99).key(load_rows(TASKS["copa"], COPA)) for add in (None, False)}
    assert len(keys) == 2


COPA = Path(__file__).parents[1] / "eval_tasks" / "samples" / "copa.jsonl"


# --- end tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_list", [False, True])
def test_the_end_tokens_of_generation_config_end_a_text(as_list: bool, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SMALL_TOKENIZER.parent, tmp_path / "model"))
    free = refmamba.load(folder).generate("The old man", max_new_tokens=12).tokens
    end = next(token for token in free[3:] if token not in free[:3] and token != 0)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [4000, end] if as_list else end}))
    ended = refmamba.load(folder).generate("The old man", max_new_tokens=12)
    assert ended.tokens == free[: free.index(end) + 1]
    assert ended.text == refmamba.load(folder).tokenizer.decode(ended.tokens[:-1])


# --- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_a_text_is_the_file_s_bytes_but_for_a_mark_at_its_start(ends: str, tmp_path: Path) -> None:
    text = f"naïve{ends}€{ends}{ends}\ufeffend"
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "text.txt").write_bytes(mark + text.encode())
        assert read_text(tmp_path / "text.txt") == text


def test_bytes_are_those_of_the_file_without_the_mark(tmp_path: Path) -> None:
    folder, found = str(write_small(tmp_path / "model")), []
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "text.txt").write_bytes(mark + b"one two three\r\nfour five six\r\nseven eight")
        values = run_json("perplexity", "--model", folder, "--text", str(tmp_path / "text.txt"))
        found.append([values[name] for name in ("bytes", "tokens", "bits_per_byte")])
    assert found[0][0] == 41
    assert found[0] == found[1]


# --- the results of other weights -------------------------------------------------------------------------------------


def in_shards(folder: Path) -> Path:
    """The same model, its weights in one shard that an index names."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "a.weights")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "a.weights")}))
    return folder


def test_results_are_kept_under_the_weights_that_were_read(tmp_path: Path) -> None:
    folder = in_shards(write_small(tmp_path / "model"))
    before = model_sha256(resolve_model(str(folder)))
    save_file({"unused": np.zeros(1)}, folder / "other.safetensors")
    assert model_sha256(resolve_model(str(folder))) == before  # it is not read
    tensors = load_file(folder / "a.weights")
    tensors["backbone.norm_f.weight"] = tensors["backbone.norm_f.weight"] * 2
    save_file(tensors, folder / "a.weights")
    assert model_sha256(resolve_model(str(folder))) != before


@pytest.mark.parametrize("shard", ["../a.weights", "sub/a.weights", "/etc/passwd", "", ".", "..", "a\0b", "a\nb", "..\\a"])
def test_a_shard_is_a_plain_name_in_the_folder(shard: str, tmp_path: Path) -> None:
    folder = in_shards(write_small(tmp_path / "model"))
    for place in (tmp_path, folder / "sub"):
        place.mkdir(exist_ok=True)
        shutil.copy(folder / "a.weights", place)
    tensors = load_file(folder / "a.weights")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard)}))
    with pytest.raises(CheckpointError, match="is not the plain name of a file beside it"):
        refmamba.load(folder)


# --- values that no quantized model has -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "tensor", "value"),
    [
        *[("int8-static", "layers.0.in_proj.absmax", value) for value in (-1.0, np.nan, np.inf, -np.inf)],
        *[("int8", "layers.0.in_proj.weight.scale", value) for value in (0.0, -1.0, np.nan, np.inf)],
        ("int8", "layers.0.in_proj.weight.q", -128),
        ("w5-mlp", "layers.0.x_proj.weight.q", 16),
        ("w4-mlp", "layers.0.x_proj.weight.q", 0x88),  # two codes of -8
        ("fp32", "layers.0.x_proj.weight.q", 2**22 + 1),
        *[("fp32", "layers.0.x_proj.weight.exponent", value) for value in (127, -107)],
        *[("int8-smooth", "layers.0.out_proj.smooth", value) for value in (151, -151, -(2**31))],
    ],
)
def test_values_that_no_quantized_model_has_are_refused(scheme: str, tensor: str, value: float, tmp_path: Path) -> None:
    folder = refmamba.quantize(write_small(tmp_path / "model"), tmp_path / "saved", scheme=scheme)
    tensors = load_file(folder / "model.safetensors")
    changed = tensors[tensor].copy()
    changed.reshape(-1)[-1] = value
    save_file(tensors | {tensor: changed}, folder / "model.safetensors")
    with pytest.raises(TensorError, match=rf"model\.safetensors: tensor {tensor} has values outside"):
        refmamba.load(folder)
