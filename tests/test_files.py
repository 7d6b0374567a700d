"""Files that are not what they say: each ends in one printable line of at most 300 characters, of its own type of error."""

import contextlib
import json
import os
import random
import shutil
import sqlite3
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_model import trained_tokenizer, write_small
from safetensors.numpy import load_file, save_file

import refmamba
from refmamba import errors
from refmamba.eval_tasks.formats import read_rows
from refmamba.eval_tasks.results import Results
from refmamba.eval_tasks.tasks import TASKS
from refmamba.formats import reading
from refmamba.formats.calibration import Calibration, load_calibration, save_calibration
from refmamba.formats.folder import open_checkpoint
from refmamba.formats.scheme import open_scheme
from refmamba.formats.text import read_text
from refmamba.spec.calibrate import calibrate
from refmamba.spec.parameters import QuantizedModel
from refmamba.spec.scheme import parse_scheme

ROOT = Path(__file__).parents[1]
DEEP, LONG_NUMBER = "[" * 100_000, '{"a": ' + "9" * 5000 + "}"
Prepare = Callable[[Path], object]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete folder, to be copied."""
    return write_small(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """One to be broken."""
    return Path(shutil.copytree(model, tmp_path / "model"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def load(folder: Path) -> refmamba.Model:
    """A model, and its tokenizer, which is read only when a text is."""
    model = refmamba.load(folder)
    assert model.tokenizer
    return model


def refused(kind: type[errors.RefmambaError], do: Callable[[], object], *words: str) -> None:
    """It ends in this very type, and in one line."""
    with pytest.raises(errors.RefmambaError) as raised:
        do()
    message = str(raised.value)
    assert raised.type is kind, message
    assert message.isprintable()
    assert len(message) <= errors.LONGEST
    for word in words:
        assert word in message


# --- messages ---------------------------------------------------------------------------------------------------------


def test_a_message_is_one_printable_line_with_its_beginning_and_its_end() -> None:
    message = str(errors.DataError("a\nb\x1b[31m\udce9\u202e" + "x" * 5000 + "; do that"))
    assert message.startswith("a\\nb\\x1b[31m\\udce9\\u202exxx")
    assert message.endswith("xxx; do that")
    assert (len(message), message.isprintable()) == (errors.LONGEST, True)
    assert str(errors.DataError(message)) == message
    assert str(errors.DataError("naïve 中文 🙂")) == "naïve 中文 🙂"


def test_the_name_of_a_file_is_cut_at_its_start_and_what_is_wrong_with_it_is_whole() -> None:
    message = str(errors.DataError("/home/" + "x" * 400 + "/text.txt: is empty: " + "w" * 100 + "; give another"))
    assert message.startswith("...xxx")
    assert message.endswith("xxx/text.txt: is empty: " + "w" * 100 + "; give another")
    assert len(message) == errors.LONGEST


def test_the_tree_of_errors_is_the_one_that_is_written() -> None:
    written = [line.split("── ")[1].split()[0] for line in str(errors.__doc__).splitlines() if "── " in line]
    kinds = [name for name, value in vars(errors).items() if isinstance(value, type) and name != "RefmambaError"]
    assert written == kinds
    assert all(issubclass(getattr(errors, name), errors.RefmambaError) for name in kinds)


# --- opening ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
def test_pipes_and_devices_and_folders_are_not_opened(name: str, folder: Path) -> None:
    file = folder / name
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    refused(errors.SpecialFileError, lambda: load(folder), name, "is a pipe")
    for target, what in (("/dev/zero", "a device"), ("/", "a folder")):
        file.unlink()
        file.symlink_to(target)
        refused(errors.SpecialFileError, lambda: load(folder), name, f"is {what}")


def test_texts_schemes_calibrations_and_results_are_files_too(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.json")
    config = open_checkpoint(ROOT / "refmamba" / "small_model").config
    for do in (read_text, lambda file: open_scheme(str(file)), lambda file: load_calibration(file, config), Results, read_rows):
        refused(errors.SpecialFileError, lambda do=do: do(tmp_path / "x.json"), "x.json: is a pipe")  # type: ignore[misc]


def test_a_file_that_may_not_be_read_is_not_called_missing(folder: Path) -> None:
    """As another user, since the system lets root read anything."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    code = (
        "import os, sys; from pathlib import Path; from refmamba.formats.folder import open_checkpoint\n"
        "os.seteuid(65534)\n"
        "try: open_checkpoint(Path(sys.argv[1]))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    for path in (folder, *folder.parents):
        if Path(tempfile.gettempdir()) in path.parents:
            path.chmod(0o755)
    for name in ("config.json", "model.safetensors"):
        for file in folder.iterdir():
            file.chmod(0o000 if file.name == name else 0o644)
        done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, cwd=ROOT)
        assert done.stdout.startswith("UnreadableFileError"), done.stdout + done.stderr
        assert f"{name}: cannot be read: Permission denied" in done.stdout


def test_sizes_are_bounded_before_anything_is_read(folder: Path) -> None:
    for name, size in (("config.json", reading.CONFIG_BYTES), ("tokenizer.json", reading.TABLE_BYTES)):
        kept = (folder / name).read_bytes()
        os.truncate(folder / name, size + 1)  # with zeros that take no room
        refused(errors.FileTooLargeError, lambda: load(folder), name, "MB")
        (folder / name).write_bytes(kept)


def test_names_that_are_too_long_or_no_names() -> None:
    for name in ("x" * 300, "a\0b"):
        refused(errors.UnreadableFileError, lambda name=name: load(name), "cannot be read")  # type: ignore[misc]


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (DEEP, "brackets stand more than 64 deep"),
        ('{"a": ' * 65 + "1" + "}" * 65, "brackets stand more than 64 deep"),
        (LONG_NUMBER, "has more than 19 digits"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ("[]", "not a JSON object"),
        ("{", "not JSON at column 2"),
        ('{"a":\n1,}', "not JSON at line 2, column 3"),
    ],
)
def test_json_is_read_with_limits(name: str, content: str, words: str, folder: Path) -> None:
    (folder / name).write_text(content)
    refused(errors.JSONError, lambda: load(folder), name, words)


def test_json_up_to_the_limits_is_read() -> None:
    assert reading.parse_json(b"[" * 64 + b"]" * 64, "here") is not None
    assert reading.parse_json(b'{"a": -9223372036854775808}', "here") == {"a": -(2**63)}
    assert reading.parse_json(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00"}', "here") == {"a": "😀"}


# --- config.json and weights ------------------------------------------------------------------------------------------


def test_a_billion_layers_are_refused_at_once(folder: Path) -> None:
    for key in ("num_hidden_layers", "hidden_size", "vocab_size", "state_size", "conv_kernel", "expand", "time_step_rank"):
        kept = (folder / "config.json").read_text()
        edit(folder / "config.json", **{key: 10**9})
        refused(errors.ConfigError, lambda: load(folder), "config.json", f"{key} is 1000000000")
        (folder / "config.json").write_text(kept)
    for number in (-1e-5, float("nan"), float("inf")):
        edit(folder / "config.json", layer_norm_epsilon=number)
        refused(errors.ConfigError, lambda: load(folder), "layer_norm_epsilon")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "quantized by bitsandbytes"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized by GPTQ"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized by AWQ"),
        ({"quantization_config": {"quant_method": "new\n"}}, "quantized by new\\n"),
        ({"model_type": "falcon_mamba"}, "this is Falcon-Mamba"),
        ({"model_type": "mamba2"}, "this is Mamba-2"),
        ({"model_type": "jamba"}, "this is Jamba"),
        ({"model_type": ["x"]}, "model_type is ['x']"),
        ({"use_bcdt_rms": True}, "use_bcdt_rms is set"),
        ({"mixer_rms_eps": 1e-6}, "this is Falcon-Mamba"),
        ({"architectures": ["FalconMambaForCausalLM"]}, "this is Falcon-Mamba"),
        ({"peft_type": "LORA", "base_model_name_or_path": "a/b"}, "a LoRA adapter of a/b"),
    ],
)
def test_another_model_is_named(changes: dict[str, Any], words: str, folder: Path) -> None:
    edit(folder / "config.json", **changes)
    refused(errors.ForeignModelError, lambda: load(folder), "config.json", words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adapter_model.safetensors", "LoRA adapter"),
        ("model.gguf", "a GGUF file"),
        ("last.ckpt", "Lightning; rename it to pytorch_model.bin"),
        ("model.fp16.safetensors", "rename them to model.safetensors"),
        ("model.pth", "rename them to pytorch_model.bin"),
    ],
)
@pytest.mark.parametrize("config", [True, False])
def test_a_folder_of_something_else_is_named(name: str, words: str, config: bool, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / name)
    if not config:
        (folder / "config.json").unlink()
    refused(errors.ForeignModelError, lambda: open_checkpoint(folder), words)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.model.backbone.", ""])
def test_what_wrapped_a_model_when_it_was_saved_is_left_out(prefix: str, folder: Path) -> None:
    expected = load(folder).logits([1, 2, 3])
    tensors = load_file(folder / "model.safetensors")
    save_file({prefix + name.removeprefix("backbone."): x for name, x in tensors.items()}, folder / "model.safetensors")
    assert load(folder).logits([1, 2, 3]).tobytes() == expected.tobytes()


@pytest.mark.parametrize("changes", [{"hidden_act": "swish"}, {"layer_norm_epsilon": 1}, {"eos_token_id": [0, 5]}])
def test_other_words_for_the_same_are_read(changes: dict[str, Any], folder: Path) -> None:
    edit(folder / "config.json", **changes)
    assert load(folder).config.n_layer == 1


def test_a_state_dict_inside_a_checkpoint_is_read(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    expected = load(folder).logits([1, 2, 3])
    tensors = {name: torch.from_numpy(x).double() for name, x in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": {f"model.{name}": x for name, x in tensors.items()}, "epoch": 3}, folder / "pytorch_model.bin")
    assert load(folder).logits([1, 2, 3]).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        ({1: 2.0}, errors.WeightFileError, "1 is no tensor with a name"),
        ([1], errors.WeightFileError, "holds no dictionary of tensors"),
        ({"state_dict": {"a\n": 1}}, errors.WeightFileError, "'a\\n' is no tensor"),
        ("uint16", errors.TensorError, "is uint16; only float32"),
        ("expanded", errors.TensorError, "not stored value by value"),
    ],
)
def test_torch_files_of_other_things(content: Any, kind: type[errors.RefmambaError], words: str, folder: Path) -> None:
    torch = pytest.importorskip("torch")
    if content == "uint16":
        content = {"a": torch.zeros(3).to(torch.uint16)}
    if content == "expanded":
        content = {"a": torch.zeros(1).expand(10**12)}
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    refused(kind, lambda: load(folder), words)


def write_header(file: Path, header: object, data: bytes = b"") -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    ("header", "kind", "words"),
    [
        ({"z": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}, errors.TensorError, "which no array has"),
        ({"z": {"dtype": "F32", "shape": [0, 2**62, 4], "data_offsets": [0, 0]}}, errors.TensorError, "which no array has"),
        ({"z": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}, errors.WeightFileError, "not safetensors"),
        ({"z": {"dtype": "F32", "shape": [0] * 70, "data_offsets": [0, 0]}}, errors.TensorError, "which no array has"),
        ({"z\n" * 500: {"dtype": "U16", "shape": [0], "data_offsets": [0, 0]}}, errors.TensorError, "is U16; only F32"),
        ({"z": 1}, errors.WeightFileError, "not safetensors"),
        ([], errors.WeightFileError, "not safetensors"),
    ],
)
def test_safetensors_headers(header: object, kind: type[errors.RefmambaError], words: str, folder: Path) -> None:
    write_header(folder / "model.safetensors", header)
    refused(kind, lambda: load(folder), "model.safetensors", words)


def test_a_header_of_any_length_is_not_read(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.write(struct.pack("<Q", 90_000_000))
        stream.truncate(100_000_000)
    refused(errors.WeightFileError, lambda: load(folder), "would begin with 90000000 bytes")


def test_two_tensors_that_are_one_parameter(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["backbone.embedding.weight"] = tensors["backbone.embeddings.weight"] + 1
    save_file(tensors, folder / "model.safetensors")
    refused(errors.TensorError, lambda: load(folder), "is there twice")


# --- tokenizers -------------------------------------------------------------------------------------------------------

TRAINED = json.loads(trained_tokenizer(adds=False))
PADDING = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
TEMPLATE = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "B", "type_id": 0}}], "pair": [], "special_tokens": {}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"post_processor": TEMPLATE}, "cannot be read as a tokenizer"),  # the library panics
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "cannot be read as a tokenizer"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}, "has no tokens"),
        ({"model": {"type": "x\n"}}, "cannot be read as a tokenizer"),
    ],
)
def test_broken_tokenizers_are_one_line_and_a_panic_of_the_library_too(
    changes: dict[str, Any], words: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(TRAINED | changes))
    refused(errors.TokenizerError, lambda: load(folder), "tokenizer.json", words)
    assert "panicked" not in capfd.readouterr().err


def test_padding_that_would_fill_the_memory_is_never_done(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(TRAINED | {"padding": PADDING | {"strategy": {"Fixed": 2 * 10**8}}}))
    assert len(load(folder).tokenizer.encode("The old man")) == 3


def test_a_text_without_tokens_is_one_line(folder: Path) -> None:
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
    (folder / "tokenizer.json").write_text(json.dumps(TRAINED | {"model": words, "pre_tokenizer": None, "added_tokens": []}))
    refused(errors.TokenizerError, lambda: load(folder).tokenizer.encode("The old man"), "this text has no tokens")


def test_a_padding_token_beyond_the_rows_is_allowed_and_no_other(folder: Path) -> None:
    special = {"id": 4096, "content": "[PAD]", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for count, is_special, allowed in ((1, True, True), (1, False, False), (2, True, False)):
        added = [special | {"id": 4096 + i, "content": f"[PAD{i}]", "special": is_special} for i in range(count)]
        (folder / "tokenizer.json").write_text(json.dumps(TRAINED | {"added_tokens": TRAINED["added_tokens"] + added}))
        if allowed:
            assert load(folder).generate("The", max_new_tokens=3).tokens
        else:
            refused(errors.TokenizerError, lambda: load(folder), "only 4096 rows")


# --- calibrations and schemes -----------------------------------------------------------------------------------------


def test_a_calibration_is_of_this_model(tmp_path: Path, folder: Path) -> None:
    source = open_checkpoint(folder)
    assert not isinstance(source, QuantizedModel)
    maxima = calibrate(source, np.arange(9))
    save_calibration(Calibration(maxima), tmp_path / "c.json")
    assert {s: m.tobytes() for s, m in load_calibration(tmp_path / "c.json", source.config).absmax.items()} == {
        s: m.tobytes() for s, m in maxima.items()
    }
    good = json.loads((tmp_path / "c.json").read_text())
    assert "percentile" not in good
    save_calibration(Calibration(maxima, 0.99), tmp_path / "cut.json")
    assert json.loads((tmp_path / "cut.json").read_text()) == {"percentile": 0.99} | good
    assert load_calibration(tmp_path / "cut.json", source.config).percentile == 0.99
    for site, values, words in [
        *[("percentile", value, "percentile is above 0 and at most 1") for value in (0, 1.5, float("nan"), True, "1", None)],
        ("layers.0.in_proj", good["layers.0.in_proj"][:-1], "has 7 channels"),
        ("layers.0.in_proj", [], "has 0 channels"),
        ("layers.0.in_proj", "8", "has no list"),
        ("layers.7.in_proj", [1.0], "which is not this model's"),
        ("layers.0.norm", [1.0] * 8, "which is not this model's"),
        ("x\n" * 300, [1.0], "which is not this model's"),
        *[("lm_head", [value] * 8, "needs finite numbers") for value in (-1.0, float("nan"), 1e39, "1", True, None, [1.0])],
    ]:
        (tmp_path / "c.json").write_text(json.dumps(good | {site: values}))
        refused(errors.DataError, lambda: load_calibration(tmp_path / "c.json", source.config), words)
    for content in (DEEP, LONG_NUMBER, '{"lm_head": [1' + "0" * 400 + "]}"):
        (tmp_path / "c.json").write_text(content)
        refused(errors.JSONError, lambda: load_calibration(tmp_path / "c.json", source.config))


def test_scheme_files(tmp_path: Path) -> None:
    file, good = tmp_path / "s.json", parse_scheme("int8").to_json()
    file.write_text(json.dumps(good))
    assert open_scheme(str(file)) == parse_scheme("int8")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"name": "a\nb"}, "printable characters"),
        ({"name": "x" * 101}, "printable characters"),
        ({"name": 3}, "printable characters"),
        ({"weights": {"D": {"bits": 10**18, "scale": "per_tensor"}}}, "bits"),
        (
            {"weights": {"D": {"bits": 8, "scale": []}}},
            "weights.D has a scale that is no text; it may be per_tensor, per_channel",
        ),
        ({"weights": []}, "weights is no JSON object; its entries may be embedding.weight"),
        ({"weights": {"D": 8}}, "weights.D is no JSON object; its entries may be bits, scale, group"),
        ({"weights": {"D": {"bits": 8}}}, "weights.D has no scale; it must have bits, scale"),
        (
            {"weights": {"D": {"bits": 8, "scale": "per_tensor", "width": 1}}},
            "weights.D has the unknown entry 'width'; there are",
        ),
        (
            {"inputs": {"conv1d": {"bits": 8, "scale": "static"}}},
            "inputs has the unknown entry 'conv1d'; there are in_proj, x_proj",
        ),
        ({"inputs": {"x_proj": {"bits": 8, "scale": "dynamic"}}}, "x_proj has the scale 'dynamic'; inputs take per_tensor"),
        ({"outputs": {"x_proj": {"bits": "8", "scale": "per_token"}}}, "x_proj has '8' bits; outputs take 2 to 16"),
        ({"smooth": [1]}, "smooth is no JSON object; its entries may be in_proj"),
        ({"rotate": "in_proj"}, "rotate is a list of in_proj"),
        ({"rotate": [["in_proj"]]}, "rotate is a list of in_proj"),
        ({"\x1b" * 400: 1}, "unknown entry"),
    ]
    for changes, words in cases:
        file.write_text(json.dumps(good | changes))
        refused(errors.SchemeError, lambda: open_scheme(str(file)), f"{file}: scheme", words)
    for content in (DEEP, LONG_NUMBER):
        file.write_text(content)
        refused(errors.JSONError, lambda: open_scheme(str(file)))
    refused(errors.MissingFileError, lambda: open_scheme(str(tmp_path / "nowhere.json")), "no such file")
    for name in ("w" + "9" * 5000 + "-all", "w٤-all"):
        refused(errors.SchemeError, lambda name=name: open_scheme(name), "unknown scheme")  # type: ignore[misc]


# --- rows of tasks ----------------------------------------------------------------------------------------------------

ITEM = '<c><item asks-for="cause" most-plausible-alternative="1"><p>{}</p><a1>x</a1><a2>y</a2></item></c>'


def test_entities_of_xml_are_never_expanded(tmp_path: Path) -> None:
    entities = "".join(f'<!ENTITY a{i} "{(f"&a{i - 1};" if i else "x") * 10}">' for i in range(12))
    (tmp_path / "a.xml").write_text(f"<!DOCTYPE c [{entities}]>\n{ITEM.format('&a11;')}")
    refused(errors.DataError, lambda: read_rows(tmp_path / "a.xml"), "a.xml:1: a DOCTYPE is not read")


@pytest.mark.parametrize("encoding", ["gbk", "base64", "idna", "utf-16", "iso-8859-1", "nonsense"])
def test_xml_is_utf_8(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text(f'<?xml version="1.0" encoding="{encoding}"?>\n{ITEM.format("é")}', "utf-8")
    refused(errors.EncodingError, lambda: read_rows(tmp_path / "a.xml"), f"its encoding is {encoding}")


def test_a_text_of_many_lines_in_xml_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text('<?xml version="1.0" encoding="UTF-8"?>' + ITEM.format("a\n" * 200_000), "utf-8")
    (row,) = read_rows(tmp_path / "a.xml")
    assert row.values == {"premise": "a\n" * 200_000, "choice1": "x", "choice2": "y", "question": "cause", "label": 0}


def test_values_of_any_type_in_parquet(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    not_utf8 = pyarrow.array([b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
    columns = [
        not_utf8, pyarrow.array([2**31 - 1], pyarrow.date32()), pyarrow.array([2**62], pyarrow.duration("ns")),
        pyarrow.array([[1]]), pyarrow.array([b"a"]), pyarrow.array([None], pyarrow.string()),
    ]  # fmt: skip
    file = tmp_path / "copa_val.parquet"
    for column in columns:
        names = dict.fromkeys(("premise", "choice1", "choice2", "question", "label"), column)
        parquet.write_table(pyarrow.table(names), file)
        refused(errors.DataError, lambda: [TASKS["copa"].document(row) for row in read_rows(file)], "copa_val.parquet")
    parquet.write_table(pyarrow.table({"text": pyarrow.array(["x"] * 1_000_001).dictionary_encode()}), file)
    refused(errors.FileTooLargeError, lambda: read_rows(file), "1000001 rows")


# --- results ----------------------------------------------------------------------------------------------------------

BROKEN = [
    {"doc_id": "'x'"}, {"doc_id": "-1"}, {"doc_id": "99"}, {"loglikelihoods": "'[1.0]'"}, {"loglikelihoods": "NULL"},
    {"loglikelihoods": "x'ff'"}, {"loglikelihoods": "'[NaN, 1.0]'"}, {"loglikelihoods": "'{}'"},
    {"loglikelihoods": f"'{DEEP}'"}, {"loglikelihoods": "'[\"a\", 1.0]'"}, {"greedy": "'[1, 0]'"},
    {"greedy": "'[true]'"}, {"greedy": "7"},
    {"loglikelihoods": "CAST(x'ff' AS TEXT)"},
]  # fmt: skip


@pytest.mark.parametrize("change", BROKEN, ids=lambda change: str(change)[:40])
def test_broken_results_are_one_line(change: dict[str, str], tmp_path: Path) -> None:
    from refmamba.eval_tasks.evaluate import finished_results, subject
    from refmamba.eval_tasks.load import load_sample
    from refmamba.run.session import ModelChoice

    data = load_sample(TASKS["copa"])
    key = subject(ModelChoice("small", "int8"), 2048).key(data)
    Results(tmp_path / "r.sqlite").__exit__(None, None, None)
    database = sqlite3.connect(tmp_path / "r.sqlite", isolation_level=None)
    database.execute("PRAGMA ignore_check_constraints = 1")
    values = {"doc_id": "0", "loglikelihoods": "'[-1.0, -2.0]'", "greedy": "'[true, false]'"} | change
    database.execute("INSERT INTO run VALUES (1, ?)", [json.dumps(asdict(key), sort_keys=True)])
    database.execute("DROP TABLE result")
    database.execute("CREATE TABLE result (run, doc_id, loglikelihoods, greedy)")
    database.execute(f"INSERT INTO result VALUES (1, {', '.join(values.values())})")
    database.close()
    with Results(tmp_path / "r.sqlite") as results, pytest.raises((errors.DataError, errors.JSONError)) as raised:
        finished_results(results, key, data)
    assert str(raised.value).isprintable()


def test_a_database_whose_names_are_no_text_is_one_line(tmp_path: Path) -> None:
    Results(tmp_path / "r.sqlite").__exit__(None, None, None)
    database = sqlite3.connect(tmp_path / "r.sqlite", isolation_level=None)
    database.execute("PRAGMA writable_schema = ON")
    database.execute("UPDATE sqlite_master SET name = CAST(x'ff' AS TEXT), sql = 'CREATE' WHERE name = 'run'")
    database.close()
    refused(errors.DataError, lambda: Results(tmp_path / "r.sqlite"), "cannot be used as a results file")


# --- at random --------------------------------------------------------------------------------------------------------


def test_bytes_changed_at_random_end_in_a_line_or_work(folder: Path) -> None:
    """Seeded changes of each file of a folder: no error but ours."""
    rng = random.Random(0)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"):
        if not (folder / name).exists():
            (folder / name).write_text('{"eos_token": "<|endoftext|>", "eos_token_id": [0, 5]}')
        kept = (folder / name).read_bytes()
        for _ in range(20 if name == "tokenizer.json" else 60):
            content = bytearray(kept)
            for _ in range(rng.randint(1, 4)):
                content[rng.randrange(min(len(content), 1200))] = rng.choice(b'0123456789{}[]",:\x00\xffen-')
            (folder / name).write_bytes(content)
            with contextlib.suppress(errors.RefmambaError):
                refmamba.load(folder, scheme="fp32", backend="reference").tokenizer.encode("The old man")
        (folder / name).write_bytes(kept)
