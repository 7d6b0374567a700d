"""The vectors themselves: their form and their sources. tests/test_conformance.py runs them on every backend."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refmamba.conformance.models import SCHEMES, tiny_expected
from refmamba.conformance.operations import check_vector
from refmamba.conformance.vectors import decode, encode, read_vectors, vectors_folder
from refmamba.spec import arith, codes
from refmamba.spec.codes import Codes
from refmamba.spec.operations import OPERATIONS

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "vectors"


def test_the_package_holds_them() -> None:
    assert vectors_folder().resolve() == FOLDER


def test_every_operation_has_a_file_and_every_file_an_operation() -> None:
    assert {file.stem for file in (FOLDER / "operations").iterdir()} == set(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_vectors_have_a_source_and_a_rule(operation: str) -> None:
    vectors = read_vectors(operation)
    assert len({v["name"] for v in vectors}) == len(vectors)
    assert any(v["source"] == "hand" or v["source"].startswith("independent:") for v in vectors)
    for vector in vectors:
        assert set(vector) == {"name", "source", "comment", "compare", "arguments", "result"}
        assert vector["compare"].partition(":")[0] in ("exact", "value", "ulp")
        assert vector["comment"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_values_survive_reading_and_writing(operation: str) -> None:
    for vector in read_vectors(operation):
        values = [*vector["arguments"], *([] if "raises" in str(vector["result"]) else [vector["result"]])]
        assert [encode(decode(v)) for v in values] == values


def test_every_width_is_there() -> None:
    for operation in ("quantize", "code", "code_static"):
        assert {v["arguments"][2 if operation != "code" else 1] for v in read_vectors(operation)} >= set(range(2, 17))


def test_the_tiny_model_is_small_and_has_every_scheme() -> None:
    assert sum(file.stat().st_size for file in (FOLDER / "tiny").iterdir()) < 1_000_000
    assert set(tiny_expected()["logits_sha256"]["schemes"]) == set(SCHEMES)


@pytest.mark.skipif(importlib.util.find_spec("mpmath") is None, reason="the generator needs mpmath")
def test_the_generator_writes_the_same_operations(tmp_path: Path) -> None:
    code = f"import sys, pathlib; sys.path.insert(0, {str(ROOT / 'tools')!r}); import make_vectors as m; " \
           f"m.FOLDER = pathlib.Path({str(tmp_path)!r}); m.write_operations()"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    for file in (tmp_path / "operations").iterdir():
        ours = [v | {"source": ""} for v in json.loads(file.read_text("utf-8"))["vectors"]]  # sources name versions
        assert ours == [v | {"source": ""} for v in read_vectors(file.stem)]


def product_in_blocks_of(block: int) -> Callable[..., Any]:
    """Eq. (12) with blocks of another length, in Python's integers."""

    def integer_product(x: Any, w: Any) -> Any:
        if isinstance(x, Codes) or isinstance(w, Codes):
            return codes.integer_product(x, w)
        p, q = x.q[:1].tolist()[0], w.q.tolist()
        starts = range(0, len(p), block)
        return np.array([[sum(float(sum(a * b for a, b in zip(p[i : i + block], row[i : i + block], strict=True)))
                              for i in starts) for row in q]])  # fmt: skip

    return integer_product


def quantize_in_float64(x: Any, scale: Any, bits: int) -> Any:
    """Eq. (8) without the rounding of x·s to float32."""
    largest = 2 ** (bits - 1) - 1
    q = np.rint(np.clip(np.float64(x) * np.float64(scale), -largest, largest))
    return q.astype(np.int8 if bits <= 8 else np.int16)


def code_in_float64(x: Any, bits: int, site: str, granularity: Any = "per_tensor") -> Any:
    scale = codes.scale_of(codes.absmax(x, site, granularity), bits)
    return Codes(quantize_in_float64(x, scale, bits), scale, bits)


def code_static_in_float64(x: Any, absmax: Any, bits: int, site: str) -> Any:
    scale = codes.scale_of(absmax, bits)
    return Codes(quantize_in_float64(x, scale, bits), scale, bits)


def code_static_above_zero(x: Any, absmax: Any, bits: int, site: str) -> Any:
    """Eq. (7) with a calibrated absmax that counts as zero only where it is zero."""
    scale = codes.scale_of(absmax, bits)
    return Codes(codes.quantize(x, scale, bits), scale, bits)


def log_softmax_from_zero(logits: Any) -> Any:
    """Eq. (25) with m = max(x, 0)."""
    shifted = logits - np.maximum(np.max(logits, axis=-1, keepdims=True), np.float32(0))
    return shifted - arith.log(arith.tree_sum(arith.exp(shifted)))[..., None]


def sample_read_wrongly(
    total_before_cut: bool = False, top_p_first: bool = False, sums: Any = np.float64, wide_temperature: bool = False
) -> Callable[..., Any]:
    """Eq. (26) with one thing read wrongly."""

    def sample(logits: Any, draw: float, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> int:
        if np.float32(temperature) == 0:
            return int(np.argmax(logits))
        shifted = logits - np.max(logits)
        if wide_temperature:
            weights = arith.exp((shifted.astype(np.float64) / temperature).astype(np.float32))
        else:
            weights = arith.exp(shifted / np.float32(temperature))
        order = np.argsort(-weights, kind="stable")
        order = order if top_p_first else order[: top_k or None]
        running = np.cumsum(weights[order], dtype=sums)
        total = running[-1]
        if top_p < 1:
            running = running[: int(np.searchsorted(running, top_p * running[-1])) + 1]
        if top_p_first:
            running = running[: top_k or None]
        total = total if total_before_cut else running[-1]
        return int(order[min(np.searchsorted(running, draw * total, side="right"), len(running) - 1)])

    return sample


WRONG_READINGS: dict[str, tuple[str, Callable[..., Any], set[str]]] = {
    "one sum over all of K": ("integer_product", product_in_blocks_of(10**6), {"blocks of 4096"}),
    "blocks of 1024": ("integer_product", product_in_blocks_of(1024), {"blocks of 4096"}),
    "blocks of 2048": ("integer_product", product_in_blocks_of(2048), {"blocks of 4096"}),
    "blocks of 4095": ("integer_product", product_in_blocks_of(4095), {"blocks of 4096"}),
    "blocks of 8192": ("integer_product", product_in_blocks_of(8192), {"blocks of 4096"}),
    "x·s in float64, quantize": ("quantize", quantize_in_float64, {"rounded twice"}),
    "x·s in float64, code": (
        "code", code_in_float64,
        {f"{bits} bits, rounded twice, {granularity}" for bits in (8, 16) for granularity in ("per_tensor", "per_row")},
    ),
    "x·s in float64, code_static": (
        "code_static", code_static_in_float64, {"8 bits, rounded twice", "16 bits, rounded twice"},
    ),
    "static absmax above 0": ("code_static", code_static_above_zero, {"zero, below 2^-100", "zero, subnormal"}),
    "maximum from 0": ("log_softmax", log_softmax_from_zero, {"all negative"}),
    "draw of the total before the cut": (
        "sample", sample_read_wrongly(total_before_cut=True), {"the draw is of what is kept"},
    ),
    "top_p before top_k": ("sample", sample_read_wrongly(top_p_first=True), {"top_k before top_p"}),
    "running sums in float32": ("sample", sample_read_wrongly(sums=np.float32), {"running sums in float64"}),
    "temperature in float64": ("sample", sample_read_wrongly(wide_temperature=True), {"temperature in float32"}),
}  # fmt: skip


@pytest.mark.parametrize("reading", WRONG_READINGS)
def test_a_vector_tells_the_wrong_reading(reading: str) -> None:
    operation, function, telling = WRONG_READINGS[reading]
    named = {vector["name"]: vector for vector in read_vectors(operation)}
    assert [name for name in telling if check_vector(operation, function, named[name])[0] is None] == []


def test_the_right_reading_passes_beside_the_wrong_ones() -> None:
    for operation, function in (("sample", sample_read_wrongly()), ("integer_product", product_in_blocks_of(4096))):
        for vector in read_vectors(operation):
            if operation == "sample" or vector["name"] == "blocks of 4096":
                assert check_vector(operation, function, vector)[0] is None
