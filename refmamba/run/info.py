"""`refmamba info`: what a model, a receipt or a saved state is, and what a model takes on this machine."""

import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from refmamba.backend import load_backend
from refmamba.backends import BACKENDS
from refmamba.errors import BackendError, DataError, FileError, TokenizerError, printable
from refmamba.formats.folder import content_hash, model_files
from refmamba.formats.gguf import GGUFCheckpoint, is_gguf
from refmamba.formats.hub import SMALL
from refmamba.formats.reading import exists, read_json
from refmamba.formats.scheme import scheme_in
from refmamba.formats.state import BOUND, read_entry
from refmamba.formats.weights import TYPE_NAMES, open_weights
from refmamba.run.receipt import read_receipt
from refmamba.run.session import ModelChoice, Opened, open_model
from refmamba.run.timing import read_bandwidth, weight_bytes
from refmamba.spec import SPEC_VERSION
from refmamba.spec.config import MambaConfig
from refmamba.spec.parameters import QuantizedModel
from refmamba.spec.scheme import Scheme

FLOAT_BYTES = 4


def describe(choice: ModelChoice) -> dict[str, Any]:
    """What a model's name or a file of `refmamba` stands for, as JSON values. Raises RefmambaError."""
    file = Path(choice.model)
    if choice.model != SMALL and not is_gguf(file) and exists(file) and not file.is_dir():
        if file.suffix == ".json":
            return describe_receipt(file)
        if file.suffix == ".safetensors":
            return describe_state(file)
        raise DataError(f"{file}: is no model, receipt (.json) or saved state (.safetensors); of a model name the folder")
    return describe_model(open_model(choice))


def describe_receipt(file: Path) -> dict[str, Any]:
    """What a receipt binds, without its chain. Raises FileError, DataError, SchemeError."""
    receipt, scheme = read_receipt(file)
    return {
        "name": str(file), "kind": "receipt", "command": receipt.command, "spec_version": SPEC_VERSION,
        "model_sha256": receipt.model_sha256, "scheme": scheme.to_json(),
        "sampling": None if receipt.sampler is None else asdict(receipt.sampler),
        "prompt_tokens": len(receipt.prompt_tokens), "tokens": len(receipt.tokens), "about": receipt.about,
    }  # fmt: skip


def describe_state(file: Path) -> dict[str, Any]:
    """What a saved state says of itself, and the shapes of its arrays.

    Raises FileError, CheckpointError, DataError, SchemeError.
    """
    entry, tensors = read_entry(file)
    words = {name: entry[name] for name in (*BOUND, "about") if name in entry}
    if "scheme" in words:
        words["scheme"] = scheme_in(file, words["scheme"]).to_json()
    shapes = {name: list(array.shape) for name, array in tensors.items()}
    return {"name": str(file), "kind": "saved state", "disk_bytes": file.stat().st_size, "arrays": shapes} | words


def describe_model(opened: Opened) -> dict[str, Any]:
    """A model's sizes, files, scheme, hash, tokenizer, and what it takes here. Raises RefmambaError."""
    checkpoint, scheme = opened.checkpoint, opened.scheme
    config, saved = checkpoint.config, isinstance(checkpoint, QuantizedModel)
    files = model_files(opened.files)
    words = {
        "name": opened.choice.model, "kind": kind_of_model(opened), "architecture": "Mamba-1",
        "config": asdict(config) | {"d_inner": config.d_inner},
        "parameters": sum(math.prod(shape) for shape in config.shapes().values()),
        "types": stored_types(opened), "files": [file.name for file in files],
        "disk_bytes": sum(file.stat().st_size for file in files), "content_sha256": content_hash(checkpoint),
        "spec_version": SPEC_VERSION, "scheme": scheme.to_json(), "saved_quantized": saved,
        "calibration": calibration_of(scheme, saved=saved), "tokenizer": tokenizer_of(opened),
    }  # fmt: skip
    return words | {"backends": backends_for(scheme)} | needs(config, scheme)


def kind_of_model(opened: Opened) -> str:
    """What the model's files are, in words."""
    if isinstance(opened.checkpoint, QuantizedModel):
        saved = read_json(opened.files.folder / "config.json")["refmamba"]
        return f"quantized folder, rounding {printable(str(saved.get('rounding', 'search')), 40)}"
    return "GGUF file" if isinstance(opened.checkpoint, GGUFCheckpoint) else "folder of floats"


def stored_types(opened: Opened) -> dict[str, int]:
    """The types of the tensors in the files, and how many have each."""
    if isinstance(opened.checkpoint, GGUFCheckpoint):
        return opened.checkpoint.types()
    return dict(Counter(TYPE_NAMES[tensor.array.dtype] for tensor in open_weights(opened.files.folder).values()))


def calibration_of(scheme: Scheme, *, saved: bool) -> str:
    """Where the scheme's static scales come from, in words."""
    if not scheme.needs_calibration:
        return "none, the scheme needs none"
    return "its maxima are in the folder" if saved else "by --calibrate, else on the passage inside the package"


def tokenizer_of(opened: Opened) -> dict[str, Any]:
    """The tokenizer's size and special tokens, or what is wrong with it."""
    try:
        tokenizer = opened.tokenizer
    except (TokenizerError, FileError) as error:
        return {"error": str(error)}
    return {"tokens": tokenizer.n_ids, "begin": tokenizer.bos_token_id, "end": sorted(tokenizer.end_token_ids),
            "added": tokenizer.added}  # fmt: skip


def backends_for(scheme: Scheme) -> dict[str, str | None]:
    """Each backend: None where it runs the scheme on this machine, else why not."""
    reasons = dict[str, str | None]()
    for name in BACKENDS:
        try:
            unknown = load_backend(name).supports(scheme)
            reasons[name] = unknown and f"does not know {unknown}"
        except BackendError as error:
            reasons[name] = str(error)
    return reasons


def needs(config: MambaConfig, scheme: Scheme) -> dict[str, Any]:
    """What a model takes on the backend cpu of this machine, whose read bandwidth is measured now.

    token_bytes: of codes that a token reads. memory_bytes: those, what stays float32, and the state of a sequence; the program
    comes on top. most_tokens_per_second: at which reading the codes alone fills the time.
    """
    from refmamba.spec.jit import SETTINGS

    model = QuantizedModel(config, scheme, {})  # its sizes alone
    codes = weight_bytes(model)
    matrices = ("in_proj.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight", "lm_head.weight")
    floats = sum(
        math.prod(shape) for name, shape in config.shapes().items()
        if not name.endswith(matrices) and not (model.shares_codes and name == "embedding.weight")
    )  # fmt: skip
    state = config.n_layer * config.d_inner * (config.d_conv - 1 + config.d_state)
    bandwidth = read_bandwidth(int(SETTINGS.NUMBA_NUM_THREADS))
    return {
        "token_bytes": codes, "state_bytes": FLOAT_BYTES * state, "memory_bytes": codes + FLOAT_BYTES * (floats + state),
        "read_bandwidth_bytes_per_second": bandwidth, "most_tokens_per_second": bandwidth / codes,
    }  # fmt: skip
