"""Folders that hold something else than a Mamba-1 of floats: what it is, and what to do about it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refmamba.errors import CheckpointError, ForeignModelError, printable
from refmamba.formats.reading import folder_exists, listed

ONLY = "only Mamba-1 with RMS norms is implemented"
# What Hugging Face's words for other models, model_type, stand for.
ARCHITECTURES = {
    "mamba2": "Mamba-2", "falcon_mamba": "Falcon-Mamba, which norms B, C and the step too",
    "jamba": "Jamba, which has attention",
    "bamba": "Bamba, which is of Mamba-2 and attention", "zamba": "Zamba, which has attention",
    "zamba2": "Zamba2, which is of Mamba-2 and attention", "nemotron_h": "Nemotron-H, which is of Mamba-2 and attention",
}  # fmt: skip
QUANTIZERS = {"bitsandbytes": "bitsandbytes", "gptq": "GPTQ", "awq": "AWQ"}


def refuse_foreign(file: Path, values: Mapping[str, Any]) -> None:
    """Raise ForeignModelError where config.json says that the weights are of another kind, and must not run as plain Mamba."""
    if "peft_type" in values:
        raise ForeignModelError(_adapter(file, values.get("base_model_name_or_path")))
    if saved := values.get("quantization_config"):
        method = saved.get("quant_method") if isinstance(saved, dict) else None
        name = QUANTIZERS.get(method, _short(method)) if isinstance(method, str) else "another program"
        raise ForeignModelError(
            f"{file}: the weights are quantized by {name} (quantization_config); take the model as it was before, in floats, "
            "and quantize it here: refmamba quantize"
        )
    kind = values.get("model_type")
    if isinstance(kind, str) and kind in ARCHITECTURES:
        raise ForeignModelError(f"{file}: model_type is '{kind}': this is {ARCHITECTURES[kind]}; {ONLY}")
    named = values.get("architectures")
    falcon = isinstance(named, list) and any(isinstance(name, str) and name.startswith("FalconMamba") for name in named)
    if falcon or "mixer_rms_eps" in values or values.get("use_bcdt_rms"):
        why = "use_bcdt_rms is set" if values.get("use_bcdt_rms") else "it has the settings of one"
        raise ForeignModelError(f"{file}: this is {ARCHITECTURES['falcon_mamba']} ({why}); {ONLY}")


def what_is_there(folder: Path) -> CheckpointError:
    """The error for a folder without a config.json, or without weights of a known name: what it holds instead.

    Raises UnreadableFileError for a folder that cannot be read.
    """
    names = sorted(file.name for file in listed(folder)) if folder_exists(folder) else []
    if adapters := [name for name in names if name.startswith("adapter_")]:
        return ForeignModelError(_adapter(folder / adapters[0], None))
    for ending, advice in {
        ".gguf": "a GGUF file; name the file itself, and not its folder",
        ".ckpt": "a checkpoint of Lightning; rename it to pytorch_model.bin, beside the model's config.json",
        ".safetensors": "weights of another name; rename them to model.safetensors, beside the model's config.json",
        ".pth": "weights of another name; rename them to pytorch_model.bin, beside the model's config.json",
        ".pt": "weights of another name; rename them to pytorch_model.bin, beside the model's config.json",
    }.items():
        if others := [name for name in names if name.endswith(ending) and name != "model.safetensors"]:
            return ForeignModelError(f"{folder}: holds {_short(others[0])}: {advice}")
    return CheckpointError(f"{folder}: no weights; a model folder has a model.safetensors or a pytorch_model.bin")


def _adapter(file: Path, base: object) -> str:
    model = f" of {_short(base)}" if isinstance(base, str) else ""
    return f"{file}: a LoRA adapter{model}, not a model; merge it into its model (PEFT's merge_and_unload) and save that"


def _short(text: object) -> str:
    return printable(str(text), 60)
