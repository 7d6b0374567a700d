"""Writes GGUF files of Mamba-1 for llama.cpp, as its converter does, through the gguf library."""

from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from refmamba.errors import CheckpointError, DataError
from refmamba.formats import gguf_tokenizer as keys
from refmamba.formats.gguf import file_name, gguf_library
from refmamba.formats.writing import is_special, write_file
from refmamba.spec.config import MambaConfig, ParameterSource, kind_of
from refmamba.spec.ops import state_matrix

TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7}  # general.file_type by name
CONTEXT = 2**20  # tokens; llama.cpp's converter writes this for every Mamba
# The matrices, whose type is chosen. llama.cpp takes every other tensor as float32 alone.
MATRICES = ("embedding.weight", "lm_head.weight", "in_proj.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight")
LARGEST_HALF = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file has of a tokenizer.json (None: it lies beside the file). begin, end: tokens, where there are such."""

    tokenizer: dict[str, Any] | None
    begin: int | None
    end: int | None
    add_begin: bool


def write_gguf(source: ParameterSource, file: Path, kind: str, name: str, vocabulary: Vocabulary | None = None) -> None:
    """Write a float model, one tensor at a time, whole or not at all. kind: one of TYPES; name: the model's.

    A matrix whose rows are no whole number of Q8_0's blocks becomes F16, as llama.cpp's converter has it. A is (19) of
    A_log, or as the source states it. Raises CheckpointError for a model that llama.cpp cannot run, DataError where the file
    cannot be written.
    """
    check_gguf(source.config, file)

    def write(stream: Any) -> None:
        _write(source, Path(stream.name), kind, name, vocabulary)

    if is_special(file):
        raise DataError(f"{file}: is no regular file, which a GGUF file has to be")
    write_file(file, write)


def check_gguf(config: MambaConfig, what: Path) -> None:
    """Raise CheckpointError where llama.cpp cannot run a model of this shape, or the library is missing."""
    gguf_library(str(what))
    if config.expand != 2:
        raise CheckpointError(f"{what}: llama.cpp runs Mamba with expand 2 alone; this model's is {config.expand}")
    if config.use_bias:
        raise CheckpointError(f"{what}: llama.cpp's Mamba has no biases of in_proj and out_proj, and this model has")


def _write(source: ParameterSource, file: Path, kind: str, name: str, vocabulary: Vocabulary | None) -> None:
    gguf = gguf_library(str(file))
    with closing(gguf.GGUFWriter(file, "mamba")) as writer:
        _add_keys(writer, source.config, kind, name)
        _add_vocabulary(writer, vocabulary, source.config.vocab_size)
        _add_tensors(gguf, writer, source, kind)


def _add_keys(writer: Any, c: MambaConfig, kind: str, name: str) -> None:
    writer.add_name(name)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(c.d_model)
    writer.add_feed_forward_length(0)  # there is none, and llama.cpp asks for it
    writer.add_head_count(0)
    writer.add_block_count(c.n_layer)
    writer.add_ssm_conv_kernel(c.d_conv)
    writer.add_ssm_inner_size(c.d_inner)
    writer.add_ssm_state_size(c.d_state)
    writer.add_ssm_time_step_rank(c.dt_rank)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_ssm_dt_b_c_rms(False)
    writer.add_vocab_size(c.vocab_size)
    writer.add_file_type(TYPES[kind])


def _add_tensors(gguf: Any, writer: Any, source: ParameterSource, kind: str) -> None:
    """The table of all tensors, and then one after the other."""
    c = source.config
    shapes = c.shapes()
    if not c.use_conv_bias:  # llama.cpp has no convolution without
        shapes |= {f"layers.{i}.conv1d.bias": (c.d_inner,) for i in range(c.n_layer)}
    types = {parameter: _type(gguf, parameter, shape, kind) for parameter, shape in shapes.items()}
    for parameter, shape in shapes.items():
        block, size = gguf.GGML_QUANT_SIZES[types[parameter]]
        # The shape is given in values, whatever the type: float32 is named, and the type behind it counts.
        writer.add_tensor_info(
            file_name(parameter), shape, np.dtype(np.float32), prod(shape) // block * size, raw_dtype=types[parameter]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for parameter, shape in shapes.items():
        if parameter.endswith("conv1d.bias") and not c.use_conv_bias:
            x = np.zeros(shape, np.float32)
        elif kind_of(parameter) == "A_log":
            x = source.read(parameter[: -len("_log")]) if c.states_A else state_matrix(source.read(parameter))
        else:
            x = source.read(parameter)
        if types[parameter] == gguf.GGMLQuantizationType.F16 and np.max(np.abs(x)) > LARGEST_HALF:
            raise DataError(f"{parameter} has values beyond float16; write BF16 or F32")
        writer.write_tensor_data(np.ascontiguousarray(gguf.quantize(np.ascontiguousarray(x), types[parameter])))


def _add_vocabulary(writer: Any, vocabulary: Vocabulary | None, rows: int) -> None:
    if vocabulary is None or vocabulary.tokenizer is None:
        writer.add_tokenizer_model(keys.NONE)
    else:
        tokens, types, merges = keys.vocabulary(vocabulary.tokenizer, rows)
        writer.add_tokenizer_model(keys.BPE)
        writer.add_tokenizer_pre(keys.GPT_2[0])
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
        writer.add_add_bos_token(vocabulary.add_begin)
    if vocabulary is not None and vocabulary.begin is not None:
        writer.add_bos_token_id(vocabulary.begin)
    if vocabulary is not None and vocabulary.end is not None:
        writer.add_eos_token_id(vocabulary.end)


def _type(gguf: Any, parameter: str, shape: tuple[int, ...], kind: str) -> Any:
    """The type of a parameter in a file of a kind."""
    types = gguf.GGMLQuantizationType
    if kind_of(parameter) not in MATRICES:
        return types.F32
    block, _ = gguf.GGML_QUANT_SIZES[types[kind]]
    return types.F16 if shape[-1] % block else types[kind]
