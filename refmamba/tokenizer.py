"""Text to tokens and back: a thin wrapper on `tokenizers`."""

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as HubTokenizer

from refmamba.config import MambaConfig
from refmamba.errors import TokenizerError
from refmamba.hub import ModelFiles

END = "<|endoftext|>"
HALF_CHARACTER = "\ufffd"  # what an unfinished UTF-8 sequence decodes to
LONGEST_CHARACTER = 4  # bytes of UTF-8, and so the most tokens one character can take


class Stream:
    """Decodes a growing sequence of tokens piece by piece, never in the middle of a character."""

    def __init__(self, tokenizer: HubTokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._context = 0  # tokens before this were printed a piece ago; those from here on are decoded again
        self._printed = 0  # tokens before this are printed

    def _text(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=False)
        return text

    def put(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self._tokens.append(token)
        old = self._text(self._tokens[self._context : self._printed])
        new = self._text(self._tokens[self._context :])
        unfinished = len(self._tokens) - self._printed < LONGEST_CHARACTER and new.endswith(HALF_CHARACTER)
        if unfinished or len(new) <= len(old):
            return ""
        self._context, self._printed = self._printed, len(self._tokens)
        return new[len(old) :]

    def flush(self) -> str:
        """What was held back."""
        old = self._text(self._tokens[self._context : self._printed])
        new = self._text(self._tokens[self._context :])
        self._context = self._printed = len(self._tokens)
        return new[len(old) :]


class Tokenizer:
    """The tokenizer of a model. Tokens from n_ids on are padding rows of the embedding, which mean nothing."""

    def __init__(self, tokenizer: HubTokenizer, eos: str | None, bos: str | None) -> None:
        self._tokenizer = tokenizer
        self.n_ids: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self.eos_token_id: int | None = tokenizer.token_to_id(eos) if eos else None
        self.bos_token_id: int | None = tokenizer.token_to_id(bos) if bos else None

    @property
    def prefix_token_id(self) -> int | None:
        """What stands for an empty text: the begin token, else the end token."""
        return self.eos_token_id if self.bos_token_id is None else self.bos_token_id

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; no begin or end token is added. Raises TokenizerError for a text that is not Unicode."""
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise TokenizerError("the text has a lone surrogate, which is no Unicode character: give valid UTF-8") from error
        return ids

    def encode_array(self, text: str) -> NDArray[np.int64]:
        """Tokens of a text, (L,) with L >= 1: an empty text becomes the prefix token. Raises TokenizerError."""
        ids = self.encode(text)
        if not ids:
            if self.prefix_token_id is None:
                raise TokenizerError("the text is empty, and this tokenizer has no begin or end token to stand for it")
            ids = [self.prefix_token_id]
        return np.array(ids, np.int64)

    def decode(self, ids: list[int]) -> str:
        """The text of some tokens."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def stream(self) -> Stream:
        """A decoder for tokens that come one by one."""
        return Stream(self._tokenizer)


def _special(values: dict[str, Any], name: str) -> str | None:
    value = values.get(name)
    return value.get("content") if isinstance(value, dict) else value


def load_tokenizer(files: ModelFiles, config: MambaConfig) -> Tokenizer:
    """The tokenizer of a model. Raises TokenizerError where it is missing, broken, or has tokens without a row."""
    file = files.tokenizer
    if not file.is_file():
        raise TokenizerError(f"{file}: no such file; the model folder needs its tokenizer.json")
    try:
        inner = HubTokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for whatever is wrong
        raise TokenizerError(f"{file}: not a tokenizer that this library reads: {error}") from error
    names: dict[str, Any] = {}
    beside = file.with_name("tokenizer_config.json")
    if beside.is_file():
        try:
            names = json.loads(beside.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise TokenizerError(f"{beside}: not JSON: {error}") from error
    tokenizer = Tokenizer(inner, _special(names, "eos_token") or END, _special(names, "bos_token") or END)
    largest = max(inner.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= config.vocab_size:
        raise TokenizerError(f"{file}: has tokens up to {largest}, the model only {config.vocab_size} rows: it is another model's")
    return tokenizer
