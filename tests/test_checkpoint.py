"""Model folders: what is read is what was written, in every layout and type, and what is broken is refused with one line."""

import json
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import assert_bits
from numpy.typing import NDArray

from refmamba.errors import CheckpointError, FileError, SpecialFileError
from refmamba.formats.checkpoint import Checkpoint
from refmamba.formats.folder import content_hash, open_checkpoint
from refmamba.formats.hub import ModelFiles
from refmamba.formats.quantized import save_quantized
from refmamba.spec.codes import Codes, FixedPoint
from refmamba.spec.config import MambaConfig
from refmamba.spec.mamba1 import Mamba
from refmamba.spec.parameters import QuantizedModel, quantize_model
from refmamba.spec.scheme import Quantizer, Scheme, parse_scheme

Arrays = dict[str, NDArray[Any]]
CONFIG = MambaConfig(d_model=8, n_layer=2, vocab_size=20, d_state=3, dt_rank=2)
# The keys of the published state-spaces/mamba-130m-hf, which has those of both layouts.
HF_CONFIG = {
    "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": 16, "d_model": 8,
    "eos_token_id": 0, "expand": 2, "fused_add_norm": True, "hidden_act": "silu", "hidden_size": 8,
    "initializer_range": 0.1, "intermediate_size": 16, "layer_norm_epsilon": 1e-05, "model_type": "mamba", "n_layer": 2,
    "num_hidden_layers": 2, "pad_token_id": 0, "pad_vocab_size_multiple": 8, "residual_in_fp32": True, "rms_norm": True,
    "ssm_cfg": {}, "state_size": 3, "time_step_rank": 2, "use_bias": False, "use_conv_bias": True, "vocab_size": 20,
}  # fmt: skip
# state-spaces/mamba-130m: 17 tokens, which its multiple of 4 pads to 20 rows.
ORIGINAL_CONFIG = {
    "d_model": 8, "n_layer": 2, "vocab_size": 17, "ssm_cfg": {"d_state": 3, "dt_rank": 2}, "rms_norm": True,
    "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 4,
}  # fmt: skip


def parameters(config: MambaConfig = CONFIG) -> Arrays:
    """Multiples of 1/8 up to 4, which float16 and bfloat16 hold exactly."""
    rng = np.random.default_rng(0)
    return {name: (rng.integers(-32, 33, shape) / 8).astype(np.float32) for name, shape in config.shapes().items()}


def as_published(params: Mapping[str, NDArray[Any]], embedding: str) -> Arrays:
    """The names and shapes of a checkpoint."""
    published = {}
    for name, value in params.items():
        parts = name.split(".")
        if parts[0] == "layers" and parts[2] != "norm":
            parts.insert(2, "mixer")
        name = ".".join(parts).replace("embedding", embedding)
        published[name if name.startswith("lm_head") else f"backbone.{name}"] = (
            value[:, None, :] if name.endswith("conv1d.weight") else value
        )
    return published


def write_safetensors(file: Path, tensors: Arrays, dtype: str = "F32") -> None:
    """The format, written out by hand: 8 bytes of length, a JSON header, the values."""
    header, data = {}, b""
    for name, value in tensors.items():
        raw = value.astype({"F16": "<f2", "F64": "<f8"}.get(dtype, "<f4")).tobytes()
        if dtype == "BF16":  # the upper two of a float32's four bytes
            raw = np.frombuffer(raw, np.uint8).reshape(-1, 4)[:, 2:].tobytes()
        header[name] = {"dtype": dtype, "shape": value.shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the values are aligned
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_hf(folder: Path, params: Arrays | None = None, dtype: str = "F32", **config: Any) -> Path:
    """A folder in Hugging Face's layout."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(HF_CONFIG | config))
    write_safetensors(folder / "model.safetensors", as_published(params or parameters(), "embeddings"), dtype)
    return folder


def write_sharded(folder: Path) -> Path:
    """The same in two files with an index."""
    write_hf(folder).joinpath("model.safetensors").unlink()
    names = list(tensors := as_published(parameters(), "embeddings"))
    shards = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for file, part in shards.items():
        write_safetensors(folder / file, {name: tensors[name] for name in part})
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_original(folder: Path, dtype: str = "float32", **config: Any) -> Path:
    """A folder in the layout of state-spaces, where the head is saved too and shares the embedding's memory."""
    torch = pytest.importorskip("torch")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(ORIGINAL_CONFIG | config))
    published = as_published(parameters(), "embedding")
    tensors = {name: torch.from_numpy(value).to(getattr(torch, dtype)) for name, value in published.items()}
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


WRITERS: dict[str, Callable[[Path], Path]] = {
    "float32": write_hf,
    "float16": lambda folder: write_hf(folder, dtype="F16"),
    "bfloat16": lambda folder: write_hf(folder, dtype="BF16"),
    "float64": lambda folder: write_hf(folder, dtype="F64"),
    "sharded": write_sharded,
    "original": write_original,
    "original_bfloat16": lambda folder: write_original(folder, "bfloat16"),
}


def open_float(folder: Path) -> Checkpoint:
    opened = open_checkpoint(folder)
    assert isinstance(opened, Checkpoint)
    return opened


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_and_type_gives_the_same_parameters(layout: str, tmp_path: Path) -> None:
    source = open_float(WRITERS[layout](tmp_path / "model"))
    assert source.config == CONFIG
    for name, value in parameters().items():
        read = source.read(name)
        assert read.dtype == np.float32
        assert read.flags.c_contiguous
        assert_bits(value, read, name)


def test_original_layout_pads_the_vocabulary_to_the_rows_of_the_file(tmp_path: Path) -> None:
    assert open_float(write_original(tmp_path / "model")).config.vocab_size == 20


def test_what_is_read_cannot_be_changed(tmp_path: Path) -> None:
    for dtype in ("F32", "F16"):
        source = open_float(write_hf(tmp_path / dtype, dtype=dtype))
        with pytest.raises(ValueError, match="read-only"):
            source.read("norm_f.weight")[:] = 7
        assert_bits(parameters()["norm_f.weight"], source.read("norm_f.weight"))


def test_float32_is_read_from_the_memory_map(tmp_path: Path) -> None:
    source = open_float(write_hf(tmp_path / "model"))
    assert np.shares_memory(source.read("norm_f.weight"), source.read("norm_f.weight"))


def test_absent_keys_have_the_defaults_of_transformers(tmp_path: Path) -> None:
    config = MambaConfig(d_model=8, n_layer=1, vocab_size=20)
    folder = write_hf(tmp_path / "model", parameters(config))
    minimal = {"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 20}
    (folder / "config.json").write_text(json.dumps(minimal))
    assert asdict(open_float(folder).config) == asdict(config) | {
        "d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": 1, "norm_eps": 1e-5, "use_bias": False, "use_conv_bias": True
    }  # fmt: skip


def test_head_is_tied_unless_it_differs_from_the_embedding(tmp_path: Path) -> None:
    params = parameters()
    same = write_hf(tmp_path / "same", params | {"lm_head.weight": params["embedding.weight"]}, tie_word_embeddings=False)
    assert open_float(same).config.tie_embeddings
    other = write_hf(tmp_path / "other", params | {"lm_head.weight": params["embedding.weight"] + 1})
    source = open_float(other)
    assert not source.config.tie_embeddings
    assert_bits(params["embedding.weight"] + 1, source.read("lm_head.weight"))


def test_biases_are_read_where_the_config_has_them(tmp_path: Path) -> None:
    config = MambaConfig(d_model=8, n_layer=2, vocab_size=20, d_state=3, dt_rank=2, use_bias=True, use_conv_bias=False)
    source = open_float(write_hf(tmp_path / "model", parameters(config), use_bias=True, use_conv_bias=False))
    assert source.config == config
    assert_bits(parameters(config)["layers.1.out_proj.bias"], source.read("layers.1.out_proj.bias"))


def test_transformers_folder(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=40))
    model.save_pretrained(tmp_path)
    source, layer = open_float(tmp_path), model.backbone.layers[1]
    assert source.config == MambaConfig(d_model=32, n_layer=2, vocab_size=40)
    for name, value in {
        "embedding.weight": model.backbone.embeddings.weight, "layers.1.norm.weight": layer.norm.weight,
        "layers.1.conv1d.weight": layer.mixer.conv1d.weight[:, 0], "layers.1.dt_proj.bias": layer.mixer.dt_proj.bias,
        "layers.1.A_log": layer.mixer.A_log, "norm_f.weight": model.backbone.norm_f.weight,
    }.items():  # fmt: skip
        assert_bits(value.detach().numpy(), source.read(name), name)


def test_quantizing_never_holds_the_model_in_float32(tmp_path: Path) -> None:
    config = MambaConfig(d_model=64, n_layer=12, vocab_size=256)
    sizes = {"hidden_size": 64, "num_hidden_layers": 12, "vocab_size": 256, "state_size": 16, "time_step_rank": 4}
    folder = write_hf(tmp_path / "model", parameters(config), "F16", **sizes)
    whole = 4 * sum(value.size for value in parameters(config).values())
    tracemalloc.start()
    try:
        model = quantize_model(open_float(folder), parse_scheme("w8-all")).held()
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert model.config == config
    assert whole / 4 < held < whole / 3  # one byte a value
    assert peak < whole / 2  # and one tensor in float32 at a time, with what its coding needs


# --- content_hash -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", WRITERS)
def test_content_hash_is_of_the_values_not_of_the_files(layout: str, tmp_path: Path) -> None:
    hf = open_float(write_hf(tmp_path / "hf"))
    assert content_hash(open_float(WRITERS[layout](tmp_path / "model"))) == content_hash(hf)


def test_content_hash_changes_with_one_value_and_with_epsilon(tmp_path: Path) -> None:
    params = parameters()
    hashes = {content_hash(open_float(write_hf(tmp_path / "a", params)))}
    hashes.add(content_hash(open_float(write_hf(tmp_path / "b", params, layer_norm_epsilon=1e-6))))
    params["layers.1.D"] = params["layers.1.D"] + np.eye(1, 16, 3, np.float32)[0]
    hashes.add(content_hash(open_float(write_hf(tmp_path / "c", params))))
    assert len(hashes) == 3


# --- what is refused --------------------------------------------------------------------------------------------------


def refuses(folder: Path, *words: str) -> None:
    """Opening ends with one line that has the words."""
    with pytest.raises((CheckpointError, FileError)) as raised:
        open_checkpoint(folder)
    message = str(raised.value)
    assert "\n" not in message
    for word in (str(folder), *words):
        assert word in message


def edit_json(file: Path, **changes: Any) -> None:
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mamba2"}, ["config.json", "model_type is 'mamba2'"]),
        ({"model_type": "falcon_mamba"}, ["falcon_mamba"]),
        ({"hidden_act": "gelu"}, ["hidden_act"]),
        ({"hidden_size": ...}, ["config.json", "hidden_size is missing"]),
        ({"hidden_size": "8"}, ["hidden_size is '8'", "int"]),
        ({"num_hidden_layers": 0}, ["config.json", "n_layer"]),
        ({"use_bias": "no"}, ["use_bias is 'no'", "bool"]),
        ({"layer_norm_epsilon": None}, ["layer_norm_epsilon"]),
        ({"state_size": 4}, ["model.safetensors", "layers.0.x_proj.weight", "(8, 16)", "(10, 16)"]),
        ({"vocab_size": 24}, ["embedding.weight", "(20, 8)", "(24, 8)"]),
        ({"num_hidden_layers": 3}, ["no tensor layers.2.norm.weight"]),
        ({"num_hidden_layers": 1}, ["model.safetensors", "tensor layers.1."]),
        ({"tie_word_embeddings": False}, ["no tensor lm_head.weight"]),
    ],
)
def test_config_that_is_not_of_these_weights(changes: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "model")
    edit_json(folder / "config.json", **changes)
    refuses(folder, *words)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"ssm_cfg": {"layer": "Mamba2"}}, "layer is 'Mamba2'"),
        ({"ssm_cfg": [1]}, "ssm_cfg"),
        ({"attn_layer_idx": [1]}, "attn_layer_idx"),
        ({"d_intermediate": 64}, "d_intermediate"),
        ({"rms_norm": False}, "rms_norm"),
        ({"d_model": ...}, "d_model is missing"),
    ],
)
def test_original_config_that_is_not_mamba_1(changes: dict[str, Any], word: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(ORIGINAL_CONFIG))
    edit_json(tmp_path / "config.json", **changes)
    refuses(tmp_path, "config.json", word)


def test_missing_and_broken_json(tmp_path: Path) -> None:
    refuses(tmp_path / "nowhere", "config.json", "no such file")
    (tmp_path / "config.json").mkdir()
    refuses(tmp_path, "config.json", "is a folder")
    (tmp_path / "config.json").rmdir()
    for text in (b'{"model_type": "mam', b"\xff\xfe\x00", b""):
        (tmp_path / "config.json").write_bytes(text)
        refuses(tmp_path, "config.json", "not JSON")
    (tmp_path / "config.json").write_text("[1, 2]")
    refuses(tmp_path, "config.json", "not a JSON object")


def test_no_weights(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    refuses(folder, "no weights", "model.safetensors")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_safetensors(keep: int, tmp_path: Path) -> None:
    file = write_hf(tmp_path / "model") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refuses(tmp_path / "model", "model.safetensors", "truncated")


def test_file_that_git_lfs_did_not_fetch(tmp_path: Path) -> None:
    file = write_hf(tmp_path / "model") / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 516567560\n")
    refuses(tmp_path / "model", "model.safetensors", "not safetensors")


def test_types_that_are_not_read(tmp_path: Path) -> None:
    file = write_hf(tmp_path / "model") / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"U32"'))
    refuses(tmp_path / "model", "model.safetensors", "U32")


def test_codes_where_floats_are_expected(tmp_path: Path) -> None:
    file = write_hf(tmp_path / "model") / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"I32"', 1))
    refuses(tmp_path / "model", "model.safetensors", "embedding.weight is int32")


def test_superfluous_tensor(tmp_path: Path) -> None:
    refuses(write_hf(tmp_path / "model", parameters() | {"layers.0.extra": np.zeros(3)}), "layers.0.extra")


def test_missing_shard_and_broken_index(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "model")
    (folder / "model-00002-of-00002.safetensors").unlink()
    refuses(folder, "model-00002-of-00002.safetensors", "no such file")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')
    refuses(folder, "model.safetensors.index.json", "weight_map")


@pytest.mark.parametrize("keep", [0, 1000, -300])
def test_truncated_torch_file(keep: int, tmp_path: Path) -> None:
    file = write_original(tmp_path / "model") / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:keep])
    refuses(tmp_path / "model", "pytorch_model.bin", "truncated")


class Trap:
    """Its unpickling touches a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.file,)


def test_torch_file_runs_no_program(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    folder, sprung = write_original(tmp_path / "model"), tmp_path / "sprung"
    torch.save({"backbone.embedding.weight": Trap(sprung)}, folder / "pytorch_model.bin")
    refuses(folder, "pytorch_model.bin", "not plain tensors")
    assert not sprung.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)  # the trap works
    assert sprung.exists()


def test_torch_file_without_torch_names_the_extra(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path; from refmamba.formats.folder import open_checkpoint\n"
        "from refmamba.errors import CheckpointError\n"
        "try: open_checkpoint(Path(sys.argv[1]))\n"
        "except CheckpointError as error: print(error)\n"
    )
    folder = write_original(tmp_path / "model")
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    assert "pytorch_model.bin" in done.stdout
    assert "pip install 'refmamba[torch]'" in done.stdout


# --- quantized folders ------------------------------------------------------------------------------------------------

MIXED = Scheme(
    "mixed",
    weights={
        "conv1d.weight": Quantizer(3, "per_channel"),
        "D": Quantizer(4, "per_tensor"),
        "lm_head.weight": Quantizer(8, "per_channel"),
    },
    inputs={"x_proj": Quantizer(8, "static"), "dt_proj": Quantizer(8, "per_token")},
)
NAMES = ["fp32", "w2-all", "w4-all", "w5-mlp", "w8-all", "w4a8-all", "int8", "int8-static", "int8-smooth"]
SCHEMES = {name: parse_scheme(name) for name in NAMES} | {"mixed": MIXED}


def quantized(scheme: Scheme, tmp_path: Path, tied: bool = True) -> QuantizedModel:
    params = parameters()
    if not tied:
        params["lm_head.weight"] = params["embedding.weight"][::-1] / 4
    source = open_float(write_hf(tmp_path / "float", params))
    (tmp_path / "float" / "tokenizer.json").write_text("{}")
    layers = {f"layers.{i}.{site}": width for i in range(2) for site, width in
              {"in_proj": 8, "x_proj": 16, "dt_proj": 2, "out_proj": 16}.items()}  # fmt: skip
    absmax = {site: np.linspace(0.5, 3, width).astype(np.float32) for site, width in (layers | {"lm_head": 8}).items()}
    return quantize_model(source, scheme, absmax)


def save(model: QuantizedModel, folder: Path) -> Path:
    float_folder = folder.parent / "float"
    save_quantized(model, folder, ModelFiles(float_folder, float_folder / "tokenizer.json"))
    return folder


def reopen(folder: Path) -> QuantizedModel:
    opened = open_checkpoint(folder)
    assert isinstance(opened, QuantizedModel)
    return opened


def bits(*arrays: Any) -> list[tuple[str, tuple[int, ...], bytes]]:
    return [(np.asarray(array).dtype.str, np.asarray(array).shape, np.asarray(array).tobytes()) for array in arrays]


def param_bits(model: QuantizedModel, name: str) -> tuple[Any, ...]:
    """All that a parameter is."""
    match model.params[name]:
        case Codes() as codes:
            return (codes.bits, *bits(codes.q, codes.scale))
        case FixedPoint() as fixed:
            return (*bits(fixed.q, fixed.exponent),)
        case array:
            return (*bits(array),)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", SCHEMES)
def test_saved_model_has_the_same_bits(name: str, tied: bool, tmp_path: Path) -> None:
    model = quantized(SCHEMES[name], tmp_path, tied)
    loaded = reopen(save(model, tmp_path / "saved"))
    assert (loaded.config, loaded.scheme) == (model.config, model.scheme)
    assert loaded.params.keys() == model.params.keys()
    for key in model.params:
        assert param_bits(loaded, key) == param_bits(model, key), key
    logits = [Mamba(m).prefill([np.arange(11)], logits="all")[0][0] for m in (model, loaded)]
    assert bits(logits[0]) == bits(logits[1])
    assert content_hash(loaded) == content_hash(model)


def test_saved_twice_is_the_same_file(tmp_path: Path) -> None:
    model = quantized(SCHEMES["int8-smooth"], tmp_path)
    files = [save(model, tmp_path / folder) / "model.safetensors" for folder in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_whoever_may_read_the_config_may_read_the_weights(tmp_path: Path) -> None:
    folder = save(quantized(SCHEMES["w8-all"], tmp_path), tmp_path / "saved")
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_codes_of_four_bits_are_two_a_byte(tmp_path: Path) -> None:
    sizes = {}
    for name in ("w4-all", "w8-all"):
        model = quantized(SCHEMES[name], tmp_path)
        file = save(model, tmp_path / name) / "model.safetensors"
        sizes[name] = file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
    values = sum(value.size for value in parameters().values())
    scales = 4 * len(parameters())
    assert sizes["w8-all"] == values + scales
    assert values / 2 <= sizes["w4-all"] - scales < values / 2 + 40  # a row of odd length has half a byte to spare


def test_codes_stay_in_the_memory_map(tmp_path: Path) -> None:
    param = reopen(save(quantized(SCHEMES["w8-all"], tmp_path), tmp_path / "saved")).params["layers.0.in_proj.weight"]
    assert isinstance(param, Codes)
    base: Any = param.q
    while not isinstance(base, np.memmap):
        base = base.base
        assert base is not None


def test_tokenizer_and_end_token_are_saved_too(tmp_path: Path) -> None:
    model = quantized(SCHEMES["w8-all"], tmp_path)
    edit_json(tmp_path / "float" / "config.json", eos_token_id=5)
    tokenizer = {"model": {"type": "BPE", "dropout": 0.5, "vocab": {"é": 0}}, "truncation": {"max_length": 8}, "padding": {}}
    (tmp_path / "float" / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name in ("tokenizer_config.json", "generation_config.json"):
        (tmp_path / "float" / name).write_text(f'{{"name": "{name}"}}')
    folder = save(model, tmp_path / "saved")
    for name in ("tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_text() == f'{{"name": "{name}"}}'
    works = {"model": {"type": "BPE", "dropout": None, "vocab": {"é": 0}}, "truncation": None, "padding": None}
    assert json.loads((folder / "tokenizer.json").read_text("utf-8")) == works
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 5


def test_folder_with_files_is_refused_and_an_empty_one_used(tmp_path: Path) -> None:
    model = quantized(SCHEMES["w8-all"], tmp_path)
    (tmp_path / "saved").mkdir()
    save(model, tmp_path / "saved")
    (tmp_path / "saved.txt").write_text("a file")
    before = sorted((file.name, file.read_bytes()) for file in (tmp_path / "saved").iterdir())
    for target in (tmp_path / "saved", tmp_path / "saved.txt"):
        with pytest.raises(CheckpointError, match="is there already"):
            save(model, target)
    assert sorted((file.name, file.read_bytes()) for file in (tmp_path / "saved").iterdir()) == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["float", "saved", "saved.txt"]


def test_save_that_fails_leaves_nothing(tmp_path: Path) -> None:
    model = quantized(SCHEMES["w8-all"], tmp_path)
    (tmp_path / "float" / "tokenizer_config.json").mkdir()  # cannot be copied
    with pytest.raises(SpecialFileError, match="is a folder, and a file is needed"):
        save(model, tmp_path / "saved")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["float"]


def test_quantized_folder_that_is_truncated(tmp_path: Path) -> None:
    folder = save(quantized(SCHEMES["w8-all"], tmp_path), tmp_path / "saved")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refuses(folder, "model.safetensors", "truncated")


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({"spec_version": "0.0"}, ["specification", "quantize the model again"]),
        ({"spec_version": ...}, ["specification"]),
        ({"scheme": ...}, ["config.json", "scheme"]),
        ({"scheme": {"name": "x", "weights": {"D": {"bits": 9, "scale": "per_tensor"}}}}, ["config.json", "bits"]),
        ({"scheme": parse_scheme("w4-all").to_json()}, ["embedding.weight.q", "(20, 8)", "(20, 4)"]),
        ({"scheme": parse_scheme("fp32").to_json()}, ["no tensor embedding.weight"]),
        ({"scheme": parse_scheme("int8").to_json()}, ["embedding.weight.scale", "(20, 1)"]),
        ({"scheme": parse_scheme("w8a8-all").to_json()}, []),
    ],
)
def test_quantized_folder_of_another_version_or_scheme(saved: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    folder = save(quantized(SCHEMES["w8-all"], tmp_path), tmp_path / "saved")
    values = json.loads((folder / "config.json").read_text())
    changed = {key: value for key, value in {**values["refmamba"], **saved}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(values | {"refmamba": changed}))
    if words:
        refuses(folder, *words)
    else:  # w8a8-all has the same weights
        assert reopen(folder).scheme.outputs


def test_quantized_folder_with_a_superfluous_tensor(tmp_path: Path) -> None:
    folder = save(quantized(SCHEMES["int8-static"], tmp_path), tmp_path / "saved")
    values = json.loads((folder / "config.json").read_text())
    values["refmamba"]["scheme"] = parse_scheme("int8").to_json()
    (folder / "config.json").write_text(json.dumps(values))
    refuses(folder, "model.safetensors", ".absmax")
