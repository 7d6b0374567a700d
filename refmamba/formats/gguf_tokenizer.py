"""The tokenizer of a GGUF file: byte-level BPE with GPT-2's pre-tokenizer, from and to a tokenizer.json."""

from collections import Counter
from typing import Any

import numpy as np

from refmamba.errors import TokenizerError, printable
from refmamba.formats.gguf import GGUF

MODEL, PRE, TOKENS = "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens"
TYPES, MERGES, ADD_BOS = "tokenizer.ggml.token_type", "tokenizer.ggml.merges", "tokenizer.ggml.add_bos_token"
BEGIN, END = "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"
BPE, NONE = "gpt2", "none"  # values of MODEL
# llama.cpp's names of pre-tokenizers that cut a text as GPT-2's does. GPT-NeoX's is written as any of them.
GPT_2 = ("gpt-2", "mpt", "olmo")
CUT = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # values of TYPES
PAD = "[PAD{}]"  # how llama.cpp's converter names a row of padding


def tokenizer_json(gguf: GGUF) -> dict[str, Any]:
    """The tokenizer of a file as a tokenizer.json. Nothing is normalized, as in llama.cpp.

    Raises TokenizerError where the file has none, or another kind than byte-level BPE with GPT-2's pre-tokenizer; ConfigError
    for a key that is an array and must not be.
    """
    values, file = gguf.values, gguf.file
    model, pre = gguf.scalar(MODEL, NONE), gguf.scalar(PRE)
    tokens, merges, types = values.get(TOKENS), values.get(MERGES), values.get(TYPES)
    if model == NONE:
        raise TokenizerError(f"{file}: has no tokenizer; put the model's tokenizer.json beside it, or give tokens as numbers")
    if model != BPE or pre not in GPT_2:
        what = f"the tokenizer {printable(repr(model), 40)} with the pre-tokenizer {printable(repr(pre), 40)}"
        raise TokenizerError(
            f"{file}: has {what}; {BPE} with {', '.join(GPT_2)} is read: put the model's tokenizer.json beside the file"
        )
    if not isinstance(tokens, list) or not isinstance(merges, list):
        raise TokenizerError(f"{file}: {TOKENS} or {MERGES} is missing or no list of texts; download it again")
    if types is None:
        types = np.full(len(tokens), NORMAL)
    if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu" or len(types) != len(tokens):
        raise TokenizerError(f"{file}: {TYPES} is not one number a token; download it again")
    pairs = [merge[:1] + merge[1:].replace(" ", "\0", 1) for merge in merges]  # a token may begin with a space
    if bad := [merge for merge, pair in zip(merges, pairs, strict=True) if "\0" not in pair[1:]]:
        raise TokenizerError(f"{file}: {MERGES} has {printable(repr(bad[0]), 40)}, which is no pair; download it again")
    used = {i: token for i, token in enumerate(tokens) if types[i] != UNUSED}
    if len(set(used.values())) < len(used):
        twice = next(token for token, count in Counter(used.values()).items() if count > 1)
        raise TokenizerError(f"{file}: {TOKENS} has {printable(repr(twice), 40)} twice; download it again")
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": bool(types[i] == CONTROL)}
        for i, token in used.items() if types[i] in (CONTROL, USER_DEFINED)
    ]  # fmt: skip
    bpe = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": {token: i for i, token in used.items()}, "merges": [pair.split("\0", 1) for pair in pairs],
    }  # fmt: skip
    begin, adds = values.get(BEGIN), values.get(ADD_BOS, False)
    token = used.get(begin) if type(begin) is int else None
    if not isinstance(adds, bool) or (adds and token is None):
        told = f"{ADD_BOS} is {printable(repr(adds), 40)}, and {BEGIN} {printable(repr(begin), 40)}"
        raise TokenizerError(f"{file}: {told}: the first must be true or false, and true only with a token; download it again")
    template = None
    if adds:
        special = {"SpecialToken": {"id": token, "type_id": 0}}
        template = {
            "type": "TemplateProcessing", "single": [special, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [special, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {token: {"id": token, "ids": [begin], "tokens": [token]}},
        }  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": CUT, "post_processor": template, "decoder": CUT, "model": bpe,
    }  # fmt: skip


def token_ids(gguf: GGUF) -> dict[str, Any]:
    """The begin and end token of a file under config.json's keys; missing where the file has none. Raises ConfigError."""
    keys = {"bos_token_id": BEGIN, "eos_token_id": END}
    return {key: gguf.scalar(name) for key, name in keys.items() if name in gguf.values}


def why_not(tokenizer: dict[str, Any], added: list[int], begin: int | None) -> str | None:
    """Why llama.cpp has no such tokenizer, in words; None where it has.

    tokenizer: a tokenizer.json. added: the tokens that it puts around every text. begin: its begin token.
    """
    model, pre, normalizer = (tokenizer.get(part) or {} for part in ("model", "pre_tokenizer", "normalizer"))
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or model.get("ignore_merges"):
        return f"its model is {model.get('type')}, and not byte-level BPE"
    if CUT | pre | {"trim_offsets": True} != CUT:
        return "llama.cpp does not have its pre-tokenizer"
    if normalizer.get("type", "NFC") != "NFC":
        return f"llama.cpp does not have its normalizer, {normalizer.get('type')}"
    return None if added in ([], [begin]) else "it puts more than the begin token around a text"


def vocabulary(tokenizer: dict[str, Any], rows: int) -> tuple[list[str], list[int], list[str]]:
    """A tokenizer.json's tokens, their types and the merges, as a GGUF file has them: a token for each row of the embedding."""
    tokens, types = [PAD.format(i) for i in range(rows)], [UNUSED] * rows
    for token, i in tokenizer["model"]["vocab"].items():
        if i < rows:
            tokens[i], types[i] = token, NORMAL
    for entry in tokenizer.get("added_tokens", []):
        if entry["id"] < rows:
            tokens[entry["id"]], types[entry["id"]] = entry["content"], CONTROL if entry["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    return tokens, types, merges
