"""Text to tokens and back, for every text; and streams that never end inside a character."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_model import END, SMALL_TOKENIZER, trained_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HubTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from refmamba.errors import JSONError, TokenizerError
from refmamba.eval_tasks.score import encode_pair
from refmamba.formats.hub import ModelFiles
from refmamba.formats.tokenizer import Tokenizer, load_tokenizer
from refmamba.spec.config import MambaConfig

MODEL = MambaConfig(d_model=8, n_layer=1, vocab_size=320)


@pytest.fixture(scope="session")
def trained() -> HubTokenizer:
    """A byte-level BPE: <|endoftext|> is 0, then the 256 bytes, then pairs and more, some ending inside a character."""
    tokenizer = HubTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on the mat; €€€, 日本語 and 日本人 😀😁😂, Übermut, naïve"] * 9, trainer)
    return tokenizer


def write(tokenizer: HubTokenizer, folder: Path, **beside: object) -> ModelFiles:
    """A model folder without weights. beside: the contents of config and tokenizer_config."""
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, values in beside.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return ModelFiles(folder, folder / "tokenizer.json")


@pytest.fixture(scope="session")
def tokenizer(trained: HubTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write(trained, tmp_path_factory.mktemp("model")), MODEL)


def id_of(trained: HubTokenizer, letter: str) -> int:
    index = trained.token_to_id(letter)
    assert index is not None
    return index


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.put(i) for i in ids), stream.flush()]


@given(st.text())
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(streamed(tokenizer, ids)) == text


@pytest.mark.parametrize("text", [f"a{END}b", "\0", "\ufffd", "e\u0301", "👩‍👩‍👧", "\r\n\t  ", "\ufeffa", "\U0010ffff"])
def test_unusual_texts_come_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(streamed(tokenizer, ids)) == text


@given(st.text())
def test_gpt_neox_normalizes_first(trained: HubTokenizer, text: str) -> None:
    composing = HubTokenizer.from_str(trained.to_str())
    composing.normalizer = normalizers.NFC()  # as in its tokenizer.json
    neox = Tokenizer(composing, 0, 0)
    assert neox.decode(neox.encode(text)) == normalizers.NFC().normalize_str(text)


@given(st.lists(st.integers(0, 299), max_size=30))
@settings(max_examples=500)
def test_stream_of_any_tokens_is_what_decode_gives(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@given(st.text(st.characters(min_codepoint=0x80, exclude_categories=["Cs"], exclude_characters="\ufffd"), min_size=1))
def test_pieces_hold_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    assert not any("\ufffd" in piece for piece in streamed(tokenizer, tokenizer.encode(text)))


def test_character_comes_with_its_last_byte(trained: HubTokenizer, tokenizer: Tokenizer) -> None:
    ids = [id_of(trained, letter) for letter in "âĤ¬"]  # the bytes E2 82 AC of the euro sign, in byte-level letters
    assert streamed(tokenizer, [*ids, *ids[:2]]) == ["", "", "€", "", "", "\ufffd"]


def test_flush_gives_nothing_twice(trained: HubTokenizer, tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    assert stream.put(id_of(trained, "â")) == ""
    assert (stream.flush(), stream.flush()) == ("\ufffd", "")


@pytest.mark.parametrize("text", ["\ud800", "caf\udce9"])  # half of a pair; what Python makes of the byte E9 in an argument
def test_text_that_is_not_unicode(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(TokenizerError, match="not UTF-8"):
        tokenizer.encode(text)


def test_empty_text_is_the_prefix_token(trained: HubTokenizer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert tokenizer.encode("") == []
    array = tokenizer.encode_array("")
    assert array.dtype == np.int64
    assert array.tolist() == [0]
    assert tokenizer.encode_array("cat").tolist() == tokenizer.encode("cat")
    nameless = HubTokenizer.from_str(trained.to_str().replace(END, "<pad>"))
    without = load_tokenizer(write(nameless, tmp_path), MODEL)
    assert (without.eos_token_id, without.bos_token_id, without.prefix_token_id) == (None, None, None)
    with pytest.raises(TokenizerError, match="no begin or end token"):
        without.encode_array("")


@pytest.mark.parametrize(
    ("tokenizer_config", "config", "eos", "bos"),
    [
        ({}, {}, END, END),
        ({"eos_token": "t", "bos_token": {"content": "h", "special": True}}, {"eos_token_id": 9}, "t", "h"),
        ({"eos_token": None}, {"eos_token_id": 9, "bos_token_id": 8}, 9, 8),
        ({"eos_token": "t"}, {"eos_token_id": [9, 10], "bos_token_id": None}, "t", END),
    ],
)
def test_end_and_begin_tokens(
    tokenizer_config: object, config: object, eos: str | int, bos: str | int, trained: HubTokenizer, tmp_path: Path
) -> None:
    loaded = load_tokenizer(write(trained, tmp_path, tokenizer_config=tokenizer_config, config=config), MODEL)
    expected = [trained.token_to_id(token) if isinstance(token, str) else token for token in (eos, bos)]
    assert [loaded.eos_token_id, loaded.bos_token_id] == expected
    assert loaded.prefix_token_id == expected[1]


def test_n_ids_counts_to_the_largest_token_and_must_fit(trained: HubTokenizer, tmp_path: Path) -> None:
    files, size = write(trained, tmp_path), trained.get_vocab_size()
    fits = MambaConfig(d_model=8, n_layer=1, vocab_size=size)
    assert load_tokenizer(files, fits).n_ids == size
    with pytest.raises(TokenizerError, match=f"has {size} tokens") as raised:
        load_tokenizer(files, MambaConfig(d_model=8, n_layer=1, vocab_size=size - 1))
    assert str(files.tokenizer) in str(raised.value)


def test_missing_and_broken_files(trained: HubTokenizer, tmp_path: Path) -> None:
    files = ModelFiles(tmp_path, tmp_path / "tokenizer.json")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: no such file"):
        load_tokenizer(files, MODEL)
    for text in ("", '{"version": "1.0", "model"', "[]", "\xff"):
        files.tokenizer.write_bytes(text.encode("latin-1"))
        with pytest.raises(JSONError, match=r"tokenizer\.json: not (JSON|a JSON object)"):
            load_tokenizer(files, MODEL)
    for text in ("{}", '{"version": "1.0", "model": {"type": "BPE"}}'):
        files.tokenizer.write_text(text)
        with pytest.raises(TokenizerError, match=r"tokenizer\.json: cannot be read as a tokenizer"):
            load_tokenizer(files, MODEL)
    write(trained, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(JSONError, match=r"tokenizer_config\.json: not JSON"):
        load_tokenizer(files, MODEL)


# --- what the files beside it and its own settings say ----------------------------------------------------------------

GOLDEN = json.loads((Path(__file__).parent / "vectors" / "begin_golden.json").read_text("utf-8"))
SMALL = MambaConfig(d_model=8, n_layer=1, vocab_size=4096)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"adds={case['adds']},add_bos={case['add_bos']}")
def test_tokens_are_the_harness_s_whatever_training_left_in_the_file(case: dict[str, Any], tmp_path: Path) -> None:
    """Truncation to 8 and padding to 16 tokens are in the file; vectors/begin_golden.json has the harness's tokens."""
    (tmp_path / "tokenizer.json").write_text(trained_tokenizer(case["adds"]), "utf-8")
    loaded = load_tokenizer(ModelFiles(tmp_path, tmp_path / "tokenizer.json"), SMALL, case["add_bos"])
    for text, ids in case["texts"]:
        assert loaded.encode(text) == ids, text
    for context, continuation, *both in case["pairs"]:
        assert list(encode_pair(loaded, context, continuation)) == both, (context, continuation)
    assert loaded.added == ([0] if case["adds"] and case["add_bos"] is None else [])


def test_a_begin_token_can_be_asked_for(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(trained_tokenizer(adds=False), "utf-8")
    files = ModelFiles(tmp_path, tmp_path / "tokenizer.json")
    asked, plain = load_tokenizer(files, SMALL, add_bos=True), load_tokenizer(files, SMALL)
    assert asked.encode("The old man") == [0, *plain.encode("The old man")]
    assert asked.encode(f"{END}The old man") == plain.encode(f"{END}The old man")
    assert asked.added == [0]
    (tmp_path / "tokenizer.json").write_text(trained_tokenizer(adds=False).replace(END, "<pad>"), "utf-8")
    with pytest.raises(TokenizerError, match="no begin token"):
        load_tokenizer(files, SMALL, add_bos=True)


def test_dropout_of_merges_is_for_training(trained: HubTokenizer, tmp_path: Path) -> None:
    values = json.loads(trained.to_str())
    values["model"]["dropout"] = 1.0
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    loaded = load_tokenizer(ModelFiles(tmp_path, tmp_path / "tokenizer.json"), MODEL)
    assert loaded.encode("the cat sat on the mat") == trained.encode("the cat sat on the mat").ids


@pytest.mark.parametrize(
    ("beside", "ends"),
    [
        ({"generation_config": {"eos_token_id": [0, 223]}, "config": {"eos_token_id": 9}}, {0, 223}),
        ({"generation_config": {"eos_token_id": 223}, "tokenizer_config": {"eos_token": "t"}}, {223}),
        ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": 9}}, {9}),
        ({"generation_config": {}, "config": {"eos_token_id": [9, 10]}}, {9, 10}),
        ({"tokenizer_config": {"eos_token": "</s>"}, "config": {"eos_token_id": 9}}, {9}),
        ({}, {0}),
    ],
)
def test_what_ends_a_text(beside: dict[str, Any], ends: set[int], trained: HubTokenizer, tmp_path: Path) -> None:
    assert load_tokenizer(write(trained, tmp_path, **beside), MODEL).end_token_ids == ends


@pytest.mark.parametrize("index", [True, "0", -1, 320, 10**15, [0, None], 1.5])
@pytest.mark.parametrize("name", ["config", "generation_config"])
def test_end_tokens_that_are_none(name: str, index: Any, trained: HubTokenizer, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=rf"{name}\.json: eos_token_id has .*no token of the model"):
        load_tokenizer(write(trained, tmp_path, **{name: {"eos_token_id": index}}), MODEL)


# --- every kind of tokenizer ------------------------------------------------------------------------------------------

CORPUS = [
    "The old man went out of the house, and there he sat; it wasn't raining.",
    "naïve café — €5, 日本語 😀 don't, can't!",
] * 9
SEQUENCES = 400  # of tokens, of each kind


def llama() -> HubTokenizer:
    """Byte fallback: a character without a token is a run of byte tokens, decoded as one."""
    tokenizer = HubTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def word_piece() -> HubTokenizer:
    """BERT's: a space before a token unless it begins with ##, and none before punctuation."""
    tokenizer = HubTokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[CLS]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return tokenizer


def metaspace() -> HubTokenizer:
    """SentencePiece's unigrams: the first token's space is none."""
    tokenizer = HubTokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def characters() -> HubTokenizer:
    """No decoder: a space between all tokens."""
    words = {letter: i for i, letter in enumerate(["[UNK]", *sorted(set("".join(CORPUS)))])}
    return HubTokenizer(models.WordLevel(words, unk_token="[UNK]"))


def fused() -> HubTokenizer:
    """No space between them."""
    tokenizer = characters()
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def suffix() -> HubTokenizer:
    """GPT-1's: a word's last token ends in </w>, which is a space unless it is the last token of all."""
    tokenizer = HubTokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return tokenizer


def byte_level() -> HubTokenizer:
    """GPT-2's and GPT-NeoX's."""
    return HubTokenizer.from_file(str(SMALL_TOKENIZER))


@pytest.mark.parametrize("kind", [byte_level, llama, word_piece, metaspace, characters, fused, suffix])
def test_every_kind_streams_what_it_decodes(kind: Callable[[], HubTokenizer]) -> None:
    """Random tokens, half of them of the lowest 300, where bytes and special tokens are; some have no text, like padding."""
    tokenizer, rng = Tokenizer(kind(), None, None), random.Random(0)
    for _ in range(SEQUENCES):
        largest = rng.choice([min(300, tokenizer.n_ids), tokenizer.n_ids + 3])
        ids = [rng.randrange(largest) for _ in range(rng.randint(1, 40))]
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids), ids


def test_bytes_are_given_once_no_later_one_can_change_them() -> None:
    tokenizer = Tokenizer(llama(), None, None)
    euro = [tokenizer.encode(f"<0x{byte:02X}>")[-1] for byte in "€".encode()]
    letter = tokenizer.encode("<0x41>")[-1]
    word = tokenizer.encode("man")[-1]
    assert streamed(tokenizer, [word, *euro, word])[1:4] == ["", "", ""]
    assert "".join(streamed(tokenizer, [letter, *euro, word])).startswith("A€")
    assert "".join(streamed(tokenizer, [letter, *euro[:2], word])).startswith("\ufffd" * 3)


def test_a_long_stream_costs_no_more_than_a_short_one(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    for token in [*tokenizer.encode("the cat sat on the mat") * 20, *[tokenizer.encode("€")[0]] * 100]:
        stream.put(token)
    assert len(stream._tokens) <= 4
