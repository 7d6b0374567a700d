"""Text to tokens and back: a thin wrapper on `tokenizers`."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as HubTokenizer

from refmamba.errors import TokenizerError, printable
from refmamba.formats.gguf import is_gguf, read_gguf
from refmamba.formats.gguf_tokenizer import token_ids, tokenizer_json
from refmamba.formats.hub import ModelFiles
from refmamba.formats.reading import TABLE_BYTES, exists, read_json
from refmamba.spec.config import MambaConfig

END = "<|endoftext|>"  # GPT-NeoX's begin and end token
CONTEXT = 4  # tokens that a stream keeps of what it has given: a character has at most four bytes


class Stream:
    """Decodes a growing sequence of tokens piece by piece. A token may end inside a character; no piece does.

    A piece is given once no later token can change it. Two things can be changed: a replacement character at the end, which
    may be the beginning of a character, and a run of byte tokens (`<0xE2>`), which is decoded as a whole once it has ended.
    """

    def __init__(self, tokenizer: HubTokenizer, byte_tokens: frozenset[int]) -> None:
        self._tokenizer, self._byte_tokens = tokenizer, byte_tokens
        self._tokens: list[int] = []  # the last ones; what is before them is given and can change nothing any more
        self._given = 0  # characters of their text

    def put(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        if self._tokenizer.id_to_token(token) is None:
            return ""  # a padding row, which is no token
        self._tokens.append(token)
        if token in self._byte_tokens:
            return ""
        text = self._text()
        held = text.endswith("\ufffd")
        piece = text[self._given : len(text) - held]
        self._tokens = self._tokens[-CONTEXT:]
        self._given = len(self._text()) - held
        return piece

    def flush(self) -> str:
        """The text that was held back: all pieces together are `Tokenizer.decode` of all tokens."""
        text = self._text()
        tail, self._given = text[self._given :], len(text)
        return tail

    def _text(self) -> str:
        with _library_errors("these tokens have no text"):
            text: str = self._tokenizer.decode(self._tokens, skip_special_tokens=False)
        return text


class Tokenizer:
    """The tokenizer of a model. Tokens from n_ids on are padding rows of the embedding, which mean nothing.

    end_token_ids: those that end what is generated. add_bos: whether a text's tokens begin with the begin token; None: as the
    tokenizer's file says.
    """

    def __init__(
        self, tokenizer: HubTokenizer, eos_token_id: int | None, bos_token_id: int | None,
        end_token_ids: frozenset[int] = frozenset(), add_bos: bool | None = None,
    ) -> None:  # fmt: skip
        self._tokenizer = tokenizer
        self.n_ids: int = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self.eos_token_id, self.bos_token_id = eos_token_id, bos_token_id
        self.end_token_ids, self.add_bos = end_token_ids, add_bos
        if add_bos and bos_token_id is None:
            raise TokenizerError("this tokenizer has no begin token that could be added; leave out --add-bos")

    @property
    def prefix_token_id(self) -> int | None:
        """What stands for an empty text: the begin token, else the end token."""
        return self.eos_token_id if self.bos_token_id is None else self.bos_token_id

    @property
    def prefix(self) -> int:
        """The same. Raises TokenizerError where there is none."""
        if self.prefix_token_id is None:
            raise TokenizerError(
                "this tokenizer has no begin or end token for an empty text, or to stand before one that is scored"
            )
        return self.prefix_token_id

    @property
    def added(self) -> list[int]:
        """The tokens that are put around every text."""
        return self.encode("")

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Tokens of a text, with what the tokenizer puts around it, by `add_bos`; without that where `special` is False.

        Nothing is added to a text that begins with the begin token. Raises TokenizerError for a text that is not Unicode, or
        has what the tokenizer has no token for.
        """
        prefix = self.prefix_token_id
        begun = prefix is not None and text.startswith(self.decode([prefix]))
        add = special and self.add_bos is not False and not begun
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError("the text has bytes that are not UTF-8, or half of a character; give valid text") from error
        with _library_errors("this text has no tokens"):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add and self.add_bos is None).ids
        return [self.bos_token_id, *ids] if add and self.add_bos and self.bos_token_id is not None else ids

    def encode_array(self, text: str) -> NDArray[np.int64]:
        """Tokens of a text, (L,) with L >= 1: an empty text becomes the prefix token. Raises TokenizerError."""
        return np.array(self.encode(text) or [self.prefix], np.int64)

    def decode(self, ids: list[int]) -> str:
        """The text of some tokens, special ones included."""
        with _library_errors("these tokens have no text"):
            text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def stream(self) -> Stream:
        """A decoder for tokens that come one by one."""
        named = {f"<0x{byte:02X}>": self._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
        return Stream(self._tokenizer, frozenset(i for name, i in named.items() if i is not None and self.decode([i]) != name))


class TokenizerParts(NamedTuple):
    """What the files of a model say of its tokenizer.

    tokenizer: as tokenizer.json; names: as tokenizer_config.json; ids: config.json's, in the file `ids_file`; generation: as
    generation_config.json, in the file `generation_file`. files: those that were read for it alone, tokenizer.json first.
    """

    tokenizer: dict[str, Any]
    names: dict[str, Any]
    ids: dict[str, Any]
    ids_file: Path
    generation: dict[str, Any]
    generation_file: Path
    files: list[Path]


def read_parts(files: ModelFiles) -> TokenizerParts:
    """What a model's files say of its tokenizer: a GGUF file's own where it is known, else tokenizer.json.

    Raises FileError, and TokenizerError where there is none.
    """
    config, ids = files.folder / "config.json", dict[str, Any]()
    if is_gguf(files.folder):
        gguf = read_gguf(files.folder)
        config, ids = files.folder, token_ids(gguf)
        try:
            return TokenizerParts(tokenizer_json(gguf), {}, ids, config, {}, config, [])
        except TokenizerError:
            if not exists(files.tokenizer):
                raise
    elif not exists(files.tokenizer):
        raise TokenizerError(f"{files.tokenizer}: no such file; put the model's tokenizer.json there")
    else:
        ids = _object(config)
    beside, generation = files.tokenizer.with_name("tokenizer_config.json"), config.with_name("generation_config.json")
    return TokenizerParts(
        as_it_works(read_json(files.tokenizer, TABLE_BYTES)), _object(beside), ids, config, _object(generation), generation,
        [file for file in (files.tokenizer, beside, generation) if exists(file)],
    )  # fmt: skip


def save_parts(parts: TokenizerParts, folder: Path) -> dict[str, Any]:
    """Write a tokenizer's files into a folder, and give what config.json has to say of it: its begin and end tokens.

    The tokenizer is saved as it works here, without truncation and padding.
    """
    (folder / "tokenizer.json").write_text(json.dumps(parts.tokenizer, ensure_ascii=False), "utf-8")
    for file in parts.files[1:]:
        shutil.copyfile(file, folder / file.name)
    return {key: parts.ids[key] for key in ("bos_token_id", "eos_token_id") if key in parts.ids}


def load_tokenizer(files: ModelFiles, config: MambaConfig, add_bos: bool | None = None) -> Tokenizer:
    """The tokenizer of a model, without what training left in its file: no text is cut, padded or split at random.

    Its begin and end tokens are those of tokenizer_config.json, else of the model's config.json, else <|endoftext|>. What is
    generated ends with those of generation_config.json, else with the end tokens of the other two. Raises FileError, and
    TokenizerError where it is missing or broken, or has tokens for which the model has no row.
    """
    parts = read_parts(files)
    file, names = next(iter(parts.files), files.folder), parts.names
    with _library_errors(f"{file}: cannot be read as a tokenizer", quiet=True):
        inner = HubTokenizer.from_str(json.dumps(parts.tokenizer, ensure_ascii=False))
        inner.decode(inner.encode("a").ids)  # what is broken in it may be seen only when it works

    def by_id(where: Path, values: dict[str, Any], key: str) -> list[int]:
        value = values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for index in ids:
            if type(index) is not int or not 0 <= index < config.vocab_size:
                name = printable(repr(index), 40)
                raise TokenizerError(f"{where}: {key} has {name}, which is no token of the model; correct it")
        return ids

    def special(kind: str) -> list[int]:
        token = names.get(f"{kind}_token")
        content = token.get("content") if isinstance(token, dict) else token
        index = inner.token_to_id(content) if isinstance(content, str) else None
        ids_there = [index] if index is not None else by_id(parts.ids_file, parts.ids, f"{kind}_token_id")
        default = inner.token_to_id(END)
        return ids_there or ([] if default is None else [default])

    eos, bos = special("eos"), special("bos")
    ends = by_id(parts.generation_file, parts.generation, "eos_token_id") or eos
    tokenizer = Tokenizer(inner, next(iter(eos), None), next(iter(bos), None), frozenset(ends), add_bos)
    if tokenizer.n_ids == 0:
        raise TokenizerError(f"{file}: has no tokens; download it again")
    last = inner.get_added_tokens_decoder().get(config.vocab_size)
    padded = tokenizer.n_ids == config.vocab_size + 1 and last is not None and last.special  # added for training in batches
    if tokenizer.n_ids > config.vocab_size and not padded:
        raise TokenizerError(
            f"{file}: has {tokenizer.n_ids} tokens, and the model in {files.folder} only {config.vocab_size} rows for them; "
            "it is another model's"
        )
    return tokenizer


def as_it_works(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """What a tokenizer.json holds, without truncation, padding and dropout, which training leaves in it."""
    model = tokenizer.get("model")
    if isinstance(model, dict) and model.get("dropout") is not None:
        tokenizer = tokenizer | {"model": model | {"dropout": None}}
    return tokenizer | {"truncation": None, "padding": None}


def _object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file."""
    return read_json(file) if exists(file) else {}


@contextmanager
def _library_errors(what: str, *, quiet: bool = False) -> Iterator[None]:
    """Turn what the library raises into a TokenizerError, a panic too, which is no Exception.

    quiet: keep from stderr what the library itself writes there of a panic.
    """
    with ExitStack() as stack:
        if quiet:
            stack.enter_context(_no_stderr())
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise TokenizerError(f"{what}: {printable(str(error), 120)}") from error


@contextmanager
def _no_stderr() -> Iterator[None]:
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
