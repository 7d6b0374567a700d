"""What the page carries: a model's weights, its tokenizer, calibration, schemes, and the vectors that it must pass."""

import base64
import gzip
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from refmamba.conformance.vectors import read_vectors, vectors_folder
from refmamba.formats.calibration import load_calibration
from refmamba.formats.folder import open_checkpoint
from refmamba.formats.hub import SMALL
from refmamba.formats.reading import TABLE_BYTES, read_json
from refmamba.run.session import Opened
from refmamba.spec.arith import F32Array
from refmamba.spec.config import MambaConfig, ParameterSource, kind_of
from refmamba.spec.mamba1 import Mamba
from refmamba.spec.operations import OPERATIONS
from refmamba.spec.parameters import QuantizedModel, linear_sites
from refmamba.spec.scheme import Scheme, parse_scheme
from refmamba.spec.transforms import exponents
from refmamba.teach.recording import Blob

LEVEL = 9  # of gzip
MOST_BYTES = 40_000_000  # of weights in float16 that a page carries
RECORDED = 8  # tokens of a prompt that are recorded for a larger model
# What tokenizer.js knows of a tokenizer.json: how a text is cut before its bytes are merged.
CUT = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {"Regex": r"'(?:s|t|re|ve|m|ll|d)\b| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\n+|[^\S\n]+(?!\S)|\s+"},
            "behavior": "Isolated",
            "invert": False,
        },
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}


def packed(data: bytes) -> str:
    """gzip, then base64: text that a page can hold. The same bytes give the same text."""
    return base64.b64encode(gzip.compress(data, LEVEL, mtime=0)).decode("ascii")


def planes(source: ParameterSource) -> bytes:
    """All parameters one after the other in little-endian order, their first bytes together, then their second, and so on.

    float16 where that holds every value exactly, else float32. Bytes of one weight's exponent resemble those of the next,
    so planes compress better than numbers.
    """
    values = np.concatenate([source.read(name).ravel() for name in source.config.shapes()])
    with np.errstate(over="ignore"):
        halves = values.astype("<f2")
    exact = np.array_equal(halves.astype(np.float32).view(np.uint32), values.view(np.uint32))
    numbers = halves if exact else values.astype("<f4")
    return np.ascontiguousarray(numbers.view(np.uint8).reshape(len(values), -1).T).tobytes()


def shape_of(config: MambaConfig) -> dict[str, Any]:
    """The model's sizes as JSON values."""
    return asdict(config) | {"d_inner": config.d_inner}


def exponents_of(source: ParameterSource, absmax: Mapping[str, F32Array], scheme: Scheme) -> dict[str, list[int]]:
    """The exponents k of each linear layer that a scheme smooths, one for each input channel: eq. (28)."""
    sites = [site for site in linear_sites(source.config) if kind_of(site) in scheme.smooth]
    largest = {site: np.max(np.abs(source.read(f"{site}.weight")), axis=0) for site in sites}
    return {site: exponents(absmax[site], largest[site], scheme.smooth[kind_of(site)]).tolist() for site in sites}


def calibration_of(source: ParameterSource, absmax: Mapping[str, F32Array], schemes: Sequence[Scheme]) -> dict[str, Any]:
    """The maxima of each site, and each scheme's exponents k."""
    return {
        "absmax": {site: m.astype(float).tolist() for site, m in absmax.items()},
        "exponents": {scheme.name: exponents_of(source, absmax, scheme) for scheme in schemes if scheme.smooth},
    }


def model_data(
    source: ParameterSource, absmax: Mapping[str, F32Array], schemes: Sequence[Scheme], expected: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A model, without its weights. expected: sequences and the frozen hashes of their logits."""
    return {
        "config": shape_of(source.config),
        "tensors": [[name, list(shape)] for name, shape in source.config.shapes().items()],
        "calibration": calibration_of(source, absmax, schemes),
        "expected": expected,
    }


def tiny_data() -> dict[str, Any]:
    """The tiny model of the vectors, weights and all."""
    folder = vectors_folder() / "tiny"
    source, expected = open_checkpoint(folder), json.loads((folder / "expected.json").read_text("utf-8"))
    assert not isinstance(source, QuantizedModel)
    schemes = [parse_scheme(name) for name in expected["logits_sha256"]["schemes"]]
    data = model_data(source, load_calibration(folder / "calibration.json", source.config).absmax, schemes, expected)
    return data | {"weights": base64.b64encode(planes(source)).decode("ascii")}


def why_not(opened: Opened) -> str | None:
    """Why the page cannot run the model itself, in words; None where it can."""
    size = 2 * sum(math.prod(shape) for shape in opened.float_checkpoint().config.shapes().values())
    if size > MOST_BYTES:
        return f"its weights have {size / 1e6:.0f} MB in float16, more than the {MOST_BYTES / 1e6:.0f} MB that a page may hold"
    if opened.checkpoint.config.states_A:
        return "its file states A, where the page has A_log"
    file = read_json(opened.files.tokenizer, TABLE_BYTES)
    known = {"normalizer": None, "post_processor": None, "pre_tokenizer": CUT}
    if opened.tokenizer.add_bos or any(file.get(part) != value for part, value in known.items()):
        return "its tokenizer is not of the kind that the page has"
    return None


def recorded_data(opened: Opened, schemes: Sequence[Scheme], prompt: str) -> tuple[dict[str, Any], bytes]:
    """What stands for a model that the page cannot run: its forwards over the beginning of a prompt, and their arrays."""
    source, blob = opened.float_checkpoint(), Blob()
    tokens = opened.tokenizer.encode_array(prompt)[:RECORDED]
    absmax = opened.calibration if any(scheme.needs_calibration for scheme in schemes) else {}
    forwards = {scheme.name: blob.trace(Mamba(opened.quantized(scheme)).trace(tokens)) for scheme in schemes}
    ids = tokens.tolist()
    return {
        "name": opened.choice.model,
        "model": model_data(source, absmax, schemes, None),
        "schemes": [scheme.to_json() for scheme in schemes],
        "recorded": {"tokens": ids, "pieces": [opened.tokenizer.decode([token]) for token in ids], "forwards": forwards},
        **vectors_data(),
    }, bytes(blob.data)


def vectors_data() -> dict[str, Any]:
    """The vectors that every page carries."""
    return {"tiny": tiny_data(), "vectors": {operation: read_vectors(operation) for operation in OPERATIONS}}


def page_data(opened: Opened, schemes: Sequence[Scheme]) -> dict[str, Any]:
    """Everything but the weights of the opened model, which the page runs."""
    source, tokenizer = opened.float_checkpoint(), opened.tokenizer
    absmax = opened.calibration if any(scheme.needs_calibration for scheme in schemes) else {}
    expected = None
    if opened.choice.model == SMALL:
        expected = json.loads((vectors_folder() / "small.json").read_text("utf-8"))
    return {
        "name": opened.choice.model,
        "model": model_data(source, absmax, schemes, expected),
        "schemes": [scheme.to_json() for scheme in schemes],
        "tokenizer": read_json(opened.files.tokenizer, TABLE_BYTES),
        "special": {
            "n_ids": tokenizer.n_ids, "ends": sorted(tokenizer.end_token_ids), "prefix": tokenizer.prefix_token_id,
        },
        **vectors_data(),
    }  # fmt: skip
