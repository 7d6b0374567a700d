"""Models for other programs: GGUF for llama.cpp, and floats in Hugging Face's layout for transformers."""

import json
import os
import sys
from operator import methodcaller
from pathlib import Path

from refmamba.errors import TokenizerError
from refmamba.formats.dequantized import Dequantized, save_hugging_face
from refmamba.formats.gguf import SUFFIX, is_gguf
from refmamba.formats.gguf_tokenizer import why_not
from refmamba.formats.gguf_writing import Vocabulary, check_gguf, write_gguf
from refmamba.formats.tokenizer import TokenizerParts, read_parts
from refmamba.formats.writing import check_folder, make_folder, write_file, write_text
from refmamba.run.session import ModelChoice, Opened, open_model
from refmamba.spec.config import ParameterSource
from refmamba.spec.parameters import QuantizedModel


def floats(opened: Opened) -> ParameterSource:
    """A model's parameters as floats; of one that was saved quantized, the values of its codes."""
    model = opened.checkpoint
    return Dequantized(model) if isinstance(model, QuantizedModel) else model


def export_hugging_face(choice: ModelChoice, folder: Path) -> Path:
    """Save a model for transformers in a new folder, float32, with its tokenizer; where there is none a line on stderr says so.

    Raises RefmambaError.
    """
    check_folder(folder)
    opened = open_model(choice)
    parts = _parts(opened)
    if parts is not None:
        _ = opened.tokenizer  # one that is broken, or of another model, is not passed on
    save_hugging_face(floats(opened), folder, parts)
    if parts is None:
        print(f"{folder}: without a tokenizer: the model has none", file=sys.stderr)
    return folder


def export_gguf(choice: ModelChoice, folder: Path, kind: str = "F32") -> Path:
    """Write a model for llama.cpp into a folder, which may be there, as NAME-KIND.gguf. Gives the file.

    kind: one of `gguf_writing.TYPES`. Where llama.cpp lacks the tokenizer a line on stderr says so, the file holds none, and
    the tokenizer's files lie beside it. Raises RefmambaError.
    """
    opened = open_model(choice)
    model = opened.files.folder
    name = model.stem if is_gguf(model) else Path(os.path.abspath(choice.model)).name
    file = folder / f"{name}-{kind}{SUFFIX}"
    source, parts = floats(opened), _parts(opened)
    check_gguf(source.config, file)
    vocabulary: Vocabulary | None = None
    reason: str | None = "the model has none"
    if parts is not None:
        begin, end, added = opened.tokenizer.bos_token_id, opened.tokenizer.eos_token_id, opened.tokenizer.added
        reason = why_not(parts.tokenizer, added, begin)
        vocabulary = Vocabulary(None if reason else parts.tokenizer, begin, end, bool(added))
    with make_folder(folder):
        write_gguf(source, file, kind, name, vocabulary)
        if parts is not None and reason:
            write_text(folder / "tokenizer.json", json.dumps(parts.tokenizer, ensure_ascii=False))
            for beside in parts.files[1:]:
                write_file(folder / beside.name, methodcaller("write", beside.read_bytes()))
    if reason:
        print(f"{file}: without a tokenizer: {reason}; llama.cpp takes it with tokens as numbers", file=sys.stderr)
    return file


def _parts(opened: Opened) -> TokenizerParts | None:
    """What the model's files say of its tokenizer; None where there is none."""
    try:
        return read_parts(opened.files)
    except TokenizerError:
        return None
