"""Text to tokens and back: a thin wrapper on `tokenizers`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as HubTokenizer
from tokenizers.decoders import DecodeStream

from refmamba.errors import TokenizerError
from refmamba.formats.hub import ModelFiles
from refmamba.spec.config import MambaConfig

END = "<|endoftext|>"  # GPT-NeoX's begin and end token


class Stream:
    """Decodes a growing sequence of tokens piece by piece. A token may end inside a character; no piece does."""

    def __init__(self, tokenizer: HubTokenizer) -> None:
        self._tokenizer, self._decoder = tokenizer, DecodeStream(skip_special_tokens=False)
        self._tokens: list[int] = []
        self._returned = 0  # characters

    def put(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self._tokens.append(token)
        piece: str = self._decoder.step(self._tokenizer, token) or ""
        self._returned += len(piece)
        return piece

    def flush(self) -> str:
        """The text that was held back: all pieces together are `Tokenizer.decode` of all tokens."""
        text: str = self._tokenizer.decode(self._tokens, skip_special_tokens=False)
        tail = text[self._returned :]
        self._returned = len(text)
        return tail


class Tokenizer:
    """The tokenizer of a model. Tokens from n_ids on are padding rows of the embedding, which mean nothing."""

    def __init__(self, tokenizer: HubTokenizer, eos_token_id: int | None, bos_token_id: int | None) -> None:
        self._tokenizer = tokenizer
        self.n_ids: int = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self.eos_token_id, self.bos_token_id = eos_token_id, bos_token_id

    @property
    def prefix_token_id(self) -> int | None:
        """What stands for an empty text: the begin token, else the end token."""
        return self.eos_token_id if self.bos_token_id is None else self.bos_token_id

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; no begin or end token is added. Raises TokenizerError for a text that is not Unicode."""
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError as error:  # the library's word for a string with half of a surrogate pair
            raise TokenizerError("the text has bytes that are not UTF-8, or half of a character; give valid text") from error
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
        """The text of some tokens, special ones included."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def stream(self) -> Stream:
        """A decoder for tokens that come one by one."""
        return Stream(self._tokenizer)


def load_tokenizer(files: ModelFiles, config: MambaConfig) -> Tokenizer:
    """The tokenizer of a model. Its begin and end tokens are those of tokenizer_config.json, else of the model's
    config.json, else <|endoftext|>.

    Raises TokenizerError where it is missing or broken, or has tokens for which the model has no row.
    """
    file = files.tokenizer
    if not file.is_file():
        raise TokenizerError(f"{file}: no such file; put the model's tokenizer.json there")
    try:
        inner = HubTokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower, whatever is wrong
        raise TokenizerError(f"{file}: cannot be read as a tokenizer ({error}); download it again") from error
    names, ids = _json_object(file.with_name("tokenizer_config.json")), _json_object(files.folder / "config.json")

    def special(kind: str) -> int | None:
        token, index = names.get(f"{kind}_token"), ids.get(f"{kind}_token_id")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            return inner.token_to_id(text)
        return index if isinstance(index, int) else inner.token_to_id(END)

    tokenizer = Tokenizer(inner, special("eos"), special("bos"))
    if tokenizer.n_ids > config.vocab_size:
        raise TokenizerError(
            f"{file}: has {tokenizer.n_ids} tokens, and the model in {files.folder} only {config.vocab_size} rows for them; "
            "it is another model's"
        )
    return tokenizer


def _json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file, or no object in it."""
    try:
        values = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{file}: not JSON ({error}); download it again") from error
    return values if isinstance(values, dict) else {}
