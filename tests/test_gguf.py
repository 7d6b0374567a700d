"""GGUF files: written for llama.cpp, read like any other model, and never trusted."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from click.testing import CliRunner
from conftest import TINY, RandomSource, assert_bits
from eval_model import write_small
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

import refmamba
from refmamba import errors
from refmamba.commands.main import refmamba as command_line
from refmamba.formats.checkpoint import Checkpoint
from refmamba.formats.dequantized import Dequantized
from refmamba.formats.folder import content_hash, open_checkpoint
from refmamba.formats.gguf import GGUF, GGUFCheckpoint, file_name, open_gguf, read_gguf
from refmamba.formats.gguf_tokenizer import ADD_BOS, BEGIN, MERGES, MODEL, PRE, TOKENS, tokenizer_json
from refmamba.formats.gguf_tokenizer import TYPES as TOKEN_TYPES
from refmamba.formats.gguf_writing import TYPES, write_gguf
from refmamba.formats.hub import resolve_model
from refmamba.formats.quantized import save_quantized
from refmamba.formats.tokenizer import load_tokenizer
from refmamba.run.export import export_gguf, export_hugging_face
from refmamba.run.session import ModelChoice, open_model
from refmamba.spec.arith import log
from refmamba.spec.calibrate import calibrate
from refmamba.spec.config import MambaConfig
from refmamba.spec.ops import state_matrix
from refmamba.spec.parameters import quantize_model
from refmamba.spec.scheme import parse_scheme
from refmamba.teach.payload import why_not

gguf = pytest.importorskip("gguf")
WIDE = MambaConfig(d_model=256, n_layer=1, vocab_size=64, d_state=8, dt_rank=16)  # rows of whole blocks, but dt_proj's


@pytest.fixture(scope="module")
def wide() -> RandomSource:
    return RandomSource(WIDE)


def written(source: Any, file: Path, kind: str = "F32") -> GGUFCheckpoint:
    write_gguf(source, file, kind, "test")
    return open_gguf(file)


# --- what is written --------------------------------------------------------------------------------------------------


def test_the_file_has_what_llama_cpp_s_converter_writes(tiny: RandomSource, tmp_path: Path) -> None:
    """Read by the gguf library: the keys by name, A itself, each tensor's type, and no head where it is tied."""
    write_gguf(tiny, tmp_path / "m.gguf", "F32", "test")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    values = {name: field.contents() for name, field in reader.fields.items()}
    assert values["general.architecture"] == "mamba"
    assert values["general.file_type"] == 0
    assert values["tokenizer.ggml.model"] == "none"
    sizes = {"context_length": 2**20, "embedding_length": 24, "feed_forward_length": 0, "attention.head_count": 0,
             "block_count": 2, "ssm.conv_kernel": 4, "ssm.inner_size": 48, "ssm.state_size": 8, "ssm.time_step_rank": 3,
             "vocab_size": 50, "ssm.dt_b_c_rms": False}  # fmt: skip
    assert {name: values[f"mamba.{name}"] for name in sizes} == sizes
    assert np.float32(values["mamba.attention.layer_norm_rms_epsilon"]) == np.float32(1e-5)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    layer = ["attn_norm.weight", "ssm_in.weight", "ssm_conv1d.weight", "ssm_conv1d.bias", "ssm_x.weight", "ssm_dt.weight",
             "ssm_dt.bias", "ssm_a", "ssm_d", "ssm_out.weight"]  # fmt: skip
    assert list(tensors) == [
        "token_embd.weight", *(f"blk.{i}.{name}" for i in range(2) for name in layer), "output_norm.weight"
    ]  # fmt: skip
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32"}
    assert_bits(tensors["blk.1.ssm_a"].data, state_matrix(tiny.read("layers.1.A_log")))
    assert_bits(tensors["blk.1.ssm_conv1d.weight"].data, tiny.read("layers.1.conv1d.weight"))
    assert_bits(tensors["token_embd.weight"].data, tiny.read("embedding.weight"))


@pytest.mark.parametrize("kind", TYPES)
def test_types_of_the_tensors(kind: str, wide: RandomSource, tmp_path: Path) -> None:
    """As llama.cpp's converter: matrices alone, F16 where Q8_0's blocks of 32 do not fit (dt_proj's rows have 16)."""
    checkpoint = written(wide, tmp_path / "m.gguf", kind)
    by_name = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for name in ("token_embd.weight", "blk.0.ssm_in.weight", "blk.0.ssm_x.weight", "blk.0.ssm_out.weight"):
        assert by_name.pop(name) == kind
    assert by_name.pop("blk.0.ssm_dt.weight") == ("F16" if kind == "Q8_0" else kind)
    assert set(by_name.values()) == {"F32"}
    assert sum(checkpoint.types().values()) == len(by_name) + 5


def test_what_llama_cpp_cannot_run_is_not_written(tmp_path: Path) -> None:
    for config, words in ((MambaConfig(8, 1, 10, expand=3), "expand 2"), (MambaConfig(8, 1, 10, use_bias=True), "no biases")):
        with pytest.raises(errors.CheckpointError, match=words):
            write_gguf(RandomSource(config), tmp_path / "m.gguf", "F32", "test")
    large = RandomSource(MambaConfig(8, 1, 10))
    large.read = lambda name: np.full(large.config.shapes()[name], 1e5, np.float32)  # type: ignore[method-assign]
    with pytest.raises(errors.DataError, match="beyond float16"):
        write_gguf(large, tmp_path / "m.gguf", "F16", "test")
    assert list(tmp_path.iterdir()) == []


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, MambaConfig(24, 1, 50, d_state=8, tie_embeddings=False)])
@pytest.mark.parametrize("scheme", ["fp32", "int8", "w4-mlp"])
@pytest.mark.parametrize("backend", ["reference", "cpu", "torch"])
def test_where_A_is_not_coded_the_bits_are_those_of_the_source(
    backend: str, scheme: str, config: MambaConfig, tmp_path: Path
) -> None:
    from refmamba.backend import load_backend

    source = RandomSource(config)
    checkpoint, tokens = written(source, tmp_path / "m.gguf"), [np.arange(20)]
    assert checkpoint.config.tie_embeddings == config.tie_embeddings
    expected, logits = (
        load_backend(backend).load(quantize_model(model, parse_scheme(scheme))).prefill(tokens, logits="all")[0][0]
        for model in (source, checkpoint)
    )
    assert_bits(expected, logits)


def test_A_is_taken_as_it_stands_and_A_log_is_its_logarithm(tmp_path: Path) -> None:
    """Of A = -3.3 no float32 A_log gives it back: eq. (19) of log(3.3) is one ulp away."""
    source = RandomSource(MambaConfig(8, 1, 10))
    write_gguf(source, tmp_path / "m.gguf", "F32", "test")
    content = bytearray((tmp_path / "m.gguf").read_bytes())
    (tensor,) = (tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors if tensor.name == "blk.0.ssm_a")
    A = np.full((16, 16), np.float32(-3.3))
    content[tensor.data_offset : tensor.data_offset + A.nbytes] = A.tobytes()
    (tmp_path / "m.gguf").write_bytes(content)
    checkpoint = open_gguf(tmp_path / "m.gguf")
    assert_bits(A, quantize_model(checkpoint, parse_scheme("int8")).state_matrix(0))
    assert_bits(log(-A), checkpoint.read("layers.0.A_log"))
    assert state_matrix(log(-A))[0, 0] != A[0, 0]
    coded = quantize_model(checkpoint, parse_scheme("w8-all"))
    assert "layers.0.A" not in coded.params
    assert_bits(state_matrix(coded.value("layers.0.A_log")), coded.state_matrix(0))


@pytest.mark.parametrize("scheme", ["int8", "w8-all"])
def test_a_quantized_folder_of_a_GGUF_file_gives_its_bits(scheme: str, tmp_path: Path) -> None:
    export_gguf(ModelChoice(str(write_small(tmp_path / "m"))), tmp_path / "g")
    file = tmp_path / "g" / "m-F32.gguf"
    refmamba.quantize(file, tmp_path / "q", scheme=scheme)
    direct, saved = refmamba.load(file, scheme=scheme), refmamba.load(tmp_path / "q")
    assert_bits(direct.logits([1, 2, 3]), saved.logits([1, 2, 3]))
    hashes = [content_hash(open_model(ModelChoice(str(name), scheme)).quantized(parse_scheme(scheme)))
              for name in (file, tmp_path / "q")]  # fmt: skip
    assert hashes[0] == hashes[1]
    assert direct.tokenizer.encode("The old man") == saved.tokenizer.encode("The old man")


def test_the_page_which_has_no_A_does_not_run_it(folder: Path, tmp_path: Path) -> None:
    file = export_gguf(ModelChoice(str(folder)), tmp_path / "g")
    assert why_not(open_model(ModelChoice(str(file), "fp32"))) == "its file states A, where the page has A_log"


def names_of_types() -> list[str]:
    """Every type that the gguf library dequantizes, and those that it takes as they are."""
    names = ["F32", "F16", "F64", "BF16"]
    for kind in gguf.GGMLQuantizationType:
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except (NotImplementedError, KeyError):
            continue
        names += [kind.name] * (kind.name not in names)
    return names


@pytest.mark.parametrize("name", names_of_types())
def test_every_type_is_read(name: str, wide: RandomSource, tmp_path: Path) -> None:
    """A matrix of any bytes of the type, beside what the library's own reader and dequantize say."""
    kind, shape = gguf.GGMLQuantizationType[name], WIDE.shapes()["layers.0.in_proj.weight"]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (shape[0], shape[1] // block * size), np.uint8)
    if name in ("F32", "F16", "F64", "BF16"):  # no NaN
        values = rng.normal(size=shape).astype({"F64": np.float64, "F16": np.float16}.get(name, np.float32))
        values = gguf.quantize(values, kind) if name == "BF16" else values
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    for key, value in {"embedding_length": 256, "block_count": 1, "ssm.inner_size": 512, "ssm.state_size": 8,
                       "ssm.conv_kernel": 4, "ssm.time_step_rank": 16}.items():  # fmt: skip
        writer.add_uint32(f"mamba.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    for parameter in WIDE.shapes():
        x = wide.read(parameter)
        if parameter == "layers.0.in_proj.weight":
            writer.add_tensor("blk.0.ssm_in.weight", values, raw_dtype=None if values.dtype != np.uint8 else kind)
        else:
            writer.add_tensor(file_name(parameter), -np.exp(x) if parameter.endswith("A_log") else x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tensor,) = (tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors if tensor.name == "blk.0.ssm_in.weight")
    assert tensor.tensor_type is kind
    with np.errstate(all="ignore"):
        expected = tensor.data.astype(np.float32) if name == "F64" else gguf.dequantize(tensor.data, kind)
    checkpoint = open_gguf(tmp_path / "m.gguf")
    assert_bits(expected, checkpoint.read("layers.0.in_proj.weight"))
    assert checkpoint.types()[name] >= 1


def test_the_file_is_mapped_and_not_read(tiny: RandomSource, tmp_path: Path) -> None:
    checkpoint = written(tiny, tmp_path / "m.gguf")
    x = checkpoint.read("layers.0.in_proj.weight")
    assert not x.flags.writeable
    assert not x.flags.owndata


# --- tokenizers -------------------------------------------------------------------------------------------------------

TEXTS = ["The old man,\n\n  went  out.", "naïve 中文 🙂\u200d🙂 it's 1234 <|endoftext|> x", "   three\t\ttabs  ", "", "a\u0301"]


def byte_level(begin: bool = False, normalizer: Any = None) -> tokenizers.Tokenizer:
    """GPT-2's way, with a few merges, an end token and a token that was added for spaces."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("Ġ", "Ġ")]
    vocabulary = ["<|endoftext|>", *letters, "th", "he", "Ġt", "Ġthe", "ĠĠ"]
    tokenizer = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    tokenizer.add_tokens([AddedToken("   ", normalized=False)])
    if normalizer:
        tokenizer.normalizer = normalizer
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    return tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with 4096 rows, whose tokenizer a test may replace."""
    return write_small(tmp_path / "model")


@pytest.mark.parametrize("begin", [False, True])
def test_a_tokenizer_goes_there_and_back(begin: bool, folder: Path, tmp_path: Path) -> None:
    byte_level(begin).save(str(folder / "tokenizer.json"))
    done = CliRunner().invoke(command_line, ["export", str(folder), str(tmp_path / "out"), "--format", "gguf"])
    assert done.exit_code == 0, done.output
    file = tmp_path / "out" / "model-F32.gguf"
    assert (done.stdout, done.stderr, list(file.parent.iterdir())) == (f"{file}\n", "", [file])
    before, after = (open_model(ModelChoice(str(model), "fp32")).tokenizer for model in (folder, file))
    assert before.encode("The the") == after.encode("The the") != []
    for text in TEXTS:
        assert before.encode(text) == after.encode(text)
        assert after.decode(after.encode(text)) == before.decode(before.encode(text))
    assert (after.n_ids, after.eos_token_id, after.bos_token_id) == (before.n_ids, 0, 0)
    assert after.end_token_ids == before.end_token_ids
    assert after.added == ([0] if begin else [])


@pytest.mark.parametrize(
    ("change", "words"),
    [(None, "llama.cpp does not have its pre-tokenizer"), (normalizers.Lowercase(), "does not have its normalizer, Lowercase")],
)
def test_a_tokenizer_that_llama_cpp_lacks_lies_beside_the_file(
    change: Any, words: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if change:
        byte_level(normalizer=change).save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    file = export_gguf(ModelChoice(str(folder)), tmp_path / "out", "F16")
    message = capsys.readouterr().err
    assert message.startswith(f"{file}: without a tokenizer: ")
    assert words in message
    assert message.count("\n") == 1
    assert sorted(path.name for path in file.parent.iterdir()) == ["model-F16.gguf", "tokenizer.json"]
    before, after = (open_model(ModelChoice(str(model), "fp32")).tokenizer for model in (folder, file))
    assert before.encode(TEXTS[0]) == after.encode(TEXTS[0])
    assert after.eos_token_id == before.eos_token_id == 7  # which the file says
    (tmp_path / "out" / "tokenizer.json").unlink()
    model = refmamba.load(file, scheme="fp32")
    assert model.logits([1, 2]).shape == (2, 4096)  # tokens as numbers need none
    with pytest.raises(errors.TokenizerError, match=r"m.*gguf: has no tokenizer; put the model's tokenizer.json beside it"):
        model.logits("The")


def test_a_file_is_called_after_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_small(tmp_path / "my:model"))
    for name in (".", "../my:model/", str(tmp_path / "out" / "my:model-F32.gguf")):
        file = export_gguf(ModelChoice(name), tmp_path / "out")
        assert read_gguf(file).scalar("general.name") == file.name.removesuffix("-F32.gguf")
    assert sorted(path.name for path in file.parent.glob("*.gguf")) == ["my:model-F32-F32.gguf", "my:model-F32.gguf"]


def test_a_pre_tokenizer_that_is_not_known_is_told(folder: Path, tmp_path: Path) -> None:
    byte_level().save(str(folder / "tokenizer.json"))
    file = export_gguf(ModelChoice(str(folder)), tmp_path / "out")
    file.write_bytes(file.read_bytes().replace(b"gpt-2", b"dbrx2"))
    with pytest.raises(errors.TokenizerError, match="with the pre-tokenizer 'dbrx2'; gpt2 with gpt-2, mpt, olmo is read"):
        _ = open_model(ModelChoice(str(file), "fp32")).tokenizer


TOKENIZER: dict[str, Any] = {
    MODEL: "gpt2", PRE: "gpt-2", TOKENS: ["b", "a", "aa", "x"], MERGES: ["a a"], BEGIN: 0, ADD_BOS: True,
    TOKEN_TYPES: np.array([3, 1, 1, 5], np.int32),
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({TOKENS: ["b", "a", "aa", "aa"], TOKEN_TYPES: np.ones(4, np.int32)}, "tokenizer.ggml.tokens has 'aa' twice"),
        ({TOKEN_TYPES: np.ones(4, np.float32)}, "tokenizer.ggml.token_type is not one number a token"),
        ({TOKEN_TYPES: np.ones(3, np.int32)}, "tokenizer.ggml.token_type is not one number a token"),
        ({ADD_BOS: "true"}, "tokenizer.ggml.add_bos_token is 'true', and tokenizer.ggml.bos_token_id 0"),
        ({ADD_BOS: 1}, "tokenizer.ggml.add_bos_token is 1, and"),
        ({BEGIN: 3}, "tokenizer.ggml.add_bos_token is True, and tokenizer.ggml.bos_token_id 3"),  # which is not used
        ({BEGIN: None}, "tokenizer.ggml.add_bos_token is True, and tokenizer.ggml.bos_token_id None"),
        ({MERGES: ["aa"]}, "tokenizer.ggml.merges has 'aa', which is no pair"),
    ],
)  # fmt: skip
def test_keys_of_a_tokenizer_that_cannot_be_are_told(change: dict[str, Any], words: str) -> None:
    template = tokenizer_json(GGUF(Path("m.gguf"), TOKENIZER, {}))["post_processor"]
    assert template["single"][0] == {"SpecialToken": {"id": "b", "type_id": 0}}
    assert tokenizer_json(GGUF(Path("m.gguf"), TOKENIZER | {TOKENS: ["b", "a", "aa", "aa"]}, {}))  # the last is not used
    with pytest.raises(errors.TokenizerError, match=words):
        tokenizer_json(GGUF(Path("m.gguf"), TOKENIZER | change, {}))


# --- exported codes ---------------------------------------------------------------------------------------------------


def effective(checkpoint: Any, name: str) -> Any:
    """A parameter; of one that smoothing divides or multiplies, its product with the other."""
    at, rank = name.rpartition(".")[0].rpartition(".")[0], checkpoint.config.dt_rank
    if name.endswith((".norm.weight", ".in_proj.weight")):
        return checkpoint.read(f"{at}.in_proj.weight") * checkpoint.read(f"{at}.norm.weight")
    if name.endswith((".dt_proj.weight", ".x_proj.weight")):
        x_proj = checkpoint.read(f"{at}.x_proj.weight")
        return np.concatenate([checkpoint.read(f"{at}.dt_proj.weight") @ x_proj[:rank], x_proj[rank:]])
    return checkpoint.read(name)


@pytest.mark.parametrize("scheme", ["w8-all", "int4-all", "int8-smooth", "int8-hadamard"])
def test_codes_are_exported_as_their_values(scheme: str, tmp_path: Path) -> None:
    """Every parameter is within its coder's rounding of the source, with room for what a rotation spreads. Smoothing moves
    factors from one to the next, so there the products are compared. A plain matrix is its codes over their scale."""
    folder = write_small(tmp_path / "m")
    source = open_checkpoint(folder)
    assert isinstance(source, Checkpoint)
    model = quantize_model(source, parse_scheme(scheme), calibrate(source, np.arange(200)))
    save_quantized(model, tmp_path / "q", resolve_model(str(folder)))
    export_hugging_face(ModelChoice(str(tmp_path / "q")), tmp_path / "hf")
    exported = open_checkpoint(tmp_path / "hf")
    bits = 4 if scheme == "int4-all" else 8
    for name in source.config.shapes():
        x, y = (effective(checkpoint, name) for checkpoint in (source, exported))
        assert np.abs(x - y).max() <= 4 * np.abs(x).max() / 2 ** (bits - 1), name
    weight = model.params["layers.0.x_proj.weight"]
    if scheme in ("w8-all", "int8-hadamard"):
        assert_bits((weight.q / weight.scale).astype(np.float32), exported.read("layers.0.x_proj.weight"))  # type: ignore[union-attr]


def test_a_float_folder_is_exported_with_its_bits(folder: Path, tmp_path: Path) -> None:
    export_hugging_face(ModelChoice(str(folder)), tmp_path / "hf")
    assert content_hash(open_checkpoint(tmp_path / "hf")) == content_hash(open_checkpoint(folder))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == ["MambaForCausalLM"]
    assert refmamba.load(tmp_path / "hf").tokenizer.encode("The old") == refmamba.load(folder).tokenizer.encode("The old")


def test_a_tokenizer_that_is_missing_or_broken_is_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "tokenizer.json").unlink()
    export_hugging_face(ModelChoice(str(folder)), tmp_path / "without")
    assert capsys.readouterr().err == f"{tmp_path / 'without'}: without a tokenizer: the model has none\n"
    (folder / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(errors.TokenizerError, match="cannot be read as a tokenizer"):
        export_hugging_face(ModelChoice(str(folder)), tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


def test_a_head_with_codes_of_its_own_is_exported_apart(tiny: RandomSource) -> None:
    scheme = refmamba.Scheme("head", {"lm_head.weight": parse_scheme("int8").weights["lm_head.weight"]})
    source = Dequantized(quantize_model(tiny, scheme))
    assert not source.config.tie_embeddings
    assert_bits(tiny.read("embedding.weight"), source.read("embedding.weight"))
    assert np.any(source.read("lm_head.weight") != source.read("embedding.weight"))


def test_export_as_a_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "refmamba", "export", "small", str(tmp_path), "--format", "gguf", "--type", "Q8_0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'small-Q8_0.gguf'}\n"), done.stderr
    assert done.stderr.endswith("does not have its pre-tokenizer; llama.cpp takes it with tokens as numbers\n")


# --- hostile files ----------------------------------------------------------------------------------------------------


def refused(file: Path, kind: type[errors.RefmambaError], *words: str) -> None:
    with pytest.raises(errors.RefmambaError) as raised:
        open_gguf(file)
    message = str(raised.value)
    assert raised.type is kind, message
    assert message.isprintable()
    assert str(file) in message
    for word in words:
        assert word in message


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(RandomSource(MambaConfig(8, 1, 10, d_state=4)), file, "F32", "test")
    return file.read_bytes()


def key(content: bytes, name: str) -> int:
    """Where the type of a key's value begins."""
    return content.index(name.encode()) + len(name)


def put(at: int, form: str, value: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:at] + struct.pack(form, value) + content[at + struct.calcsize(form) :]


def changes(good: bytes) -> Iterator[tuple[bytes, type[errors.RefmambaError], str]]:
    first = good.index(b"token_embd.weight") + len("token_embd.weight")  # axes u32, sizes u64 x 2, type u32, offset u64
    yield good[:3], errors.WeightFileError, "not a GGUF file"
    yield b"GGML" + good[4:], errors.WeightFileError, "not a GGUF file"
    for version in (1, 4, 3 << 24):
        yield put(4, "<I", version)(good), errors.WeightFileError, "versions 2 and 3"
    for count in (2**63, 2**64 - 1, 10**6):
        yield put(8, "<Q", count)(good), errors.WeightFileError, ""
        yield put(16, "<Q", count)(good), errors.WeightFileError, ""
        yield put(24, "<Q", count)(good), errors.WeightFileError, "truncated"  # the first key's length
    for length in (30, 100, len(good) // 2, len(good) - 100):
        yield good[:length], errors.WeightFileError, "truncated"
    yield put(key(good, "general.name"), "<I", 77)(good), errors.WeightFileError, "of the type 77"
    yield put(key(good, "general.name"), "<I", 9)(good), errors.WeightFileError, ""
    yield good.replace(b"general.name", b"general.type").replace(b"general.file_type", b"general.alignment"), \
        errors.WeightFileError, "no power of two"  # fmt: skip
    yield put(first, "<I", 9)(good), errors.WeightFileError, "has 9 axes"
    yield put(first + 4, "<Q", 2**62)(good), errors.WeightFileError, "not where the file's table says"
    yield put(first + 4, "<Q", 16)(good), errors.TensorError, "has the shape"
    yield put(first + 20, "<I", 12)(good), errors.TensorError, "has blocks of 256 columns"
    for kind in (16, 24, 99):
        yield put(first + 20, "<I", kind)(good), errors.TensorError, ""
    yield put(first + 24, "<Q", 2**63)(good), errors.WeightFileError, "not where the file's table says"
    yield put(first + 24, "<Q", 1)(good), errors.WeightFileError, "not where the file's table says"
    yield good.replace(b"blk.0.ssm_d", b"blk.0.ssm_a"), errors.WeightFileError, "there twice"
    yield good.replace(b"blk.0.ssm_d", b"blk.0.ssm_q"), errors.TensorError, "there is no tensor blk.0.ssm_d"
    yield good.replace(b"mamba.context_length", b"mamba.contexx_length"), errors.WeightFileError, ""
    for architecture, what in ((b"bamba", "Bamba"), (b"llama", "of the architecture 'llama'")):
        yield good.replace(b"mamba", architecture, 1), errors.ForeignModelError, what
    yield put(key(good, "mamba.ssm.dt_b_c_rms") + 4, "<B", 1)(good), errors.ForeignModelError, "Falcon-Mamba"
    for name in ("mamba.embedding_length", "mamba.block_count", "mamba.ssm.inner_size", "mamba.ssm.time_step_rank"):
        for size in (0, 7, 2**32 - 1):
            yield put(key(good, name) + 4, "<I", size)(good), errors.CheckpointError, ""
        yield put(key(good, name), "<I", 6)(good), errors.ConfigError, "must be of type int"


def test_a_broken_file_ends_in_one_line(good: bytes, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(good)
    open_gguf(file)
    cases = [case for case in changes(good) if case[2] != "" or case[1] is not errors.WeightFileError]
    for content, kind, words in cases:
        file.write_bytes(content)
        if kind is errors.CheckpointError:  # of any kind
            with pytest.raises(kind):
                open_gguf(file)
        else:
            refused(file, kind, words)


def test_an_array_longer_than_the_file_allocates_nothing(good: bytes, tmp_path: Path) -> None:
    at = key(good, "general.name")
    for element in range(14):
        array = struct.pack("<IIQ", 9, element, 2**60)
        (tmp_path / "m.gguf").write_bytes(good[:at] + array + good[at:])
        with pytest.raises(errors.WeightFileError):
            open_gguf(tmp_path / "m.gguf")


KEYS_OF_ONE_VALUE = (
    "general.architecture", "split.count", "mamba.ssm.dt_b_c_rms", "tokenizer.ggml.model", "tokenizer.ggml.pre",
    "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id",
)  # fmt: skip


@pytest.mark.parametrize("name", KEYS_OF_ONE_VALUE)
def test_an_array_in_the_place_of_one_value_is_refused(name: str, good: bytes, tmp_path: Path) -> None:
    file, word = tmp_path / "m.gguf", name.encode()
    length = 32 + -(len(word) + 24) % 32  # so that the tensors stay aligned
    array = struct.pack("<Q", len(word)) + word + struct.pack("<IIQ", 9, 0, length) + bytes(length)
    (count,) = struct.unpack("<Q", good[16:24])
    renamed = good.replace(word, word[:-1] + b"_")
    file.write_bytes(put(16, "<Q", count + 1)(renamed)[:24] + array + renamed[24:])
    with pytest.raises(errors.ConfigError, match=f"{name} is an array, and must be one value"):
        load_tokenizer(resolve_model(str(file)), open_gguf(file).config)


def test_an_A_above_zero_is_refused(good: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(good)
    (tensor,) = (tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors if tensor.name == "blk.0.ssm_a")
    for value in (1.0, float("nan")):
        (tmp_path / "m.gguf").write_bytes(put(tensor.data_offset, "<f", value)(good))  # type: ignore[arg-type]
        with pytest.raises(errors.TensorError, match=r"blk\.0\.ssm_a has values above zero"):
            open_gguf(tmp_path / "m.gguf").read("layers.0.A")


def test_names_that_are_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("m.gguf", "owner/m.gguf"):
        with pytest.raises(errors.HubError, match="no such folder; give `small`, a folder, a GGUF file"):
            resolve_model(name)
    Path("m.gguf").write_bytes(b"")
    with pytest.raises(errors.HubError, match="is a file and has no revision main"):
        resolve_model("m.gguf", "main")
    refused(Path("m.gguf"), errors.WeightFileError, "not a GGUF file")
