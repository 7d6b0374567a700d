"""The vectors themselves: their form and their sources. tests/test_conformance.py runs them on every backend."""

import configparser
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refmamba.backend import load_backend
from refmamba.conformance.models import SCHEMES, check_frozen, tiny_expected
from refmamba.conformance.operations import check_vector
from refmamba.conformance.vectors import decode, encode, generated_model, generated_models, read_vectors, vectors_folder
from refmamba.errors import DataError, NonFiniteError
from refmamba.spec import arith, coders, codes, parameters, transforms
from refmamba.spec.codes import Codes
from refmamba.spec.mamba1 import Positions
from refmamba.spec.operations import OPERATIONS
from refmamba.spec.parameters import quantize_model

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


def test_the_readme_has_every_signature() -> None:
    readme = (FOLDER / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| .* \| \([\d, ]+\) \|$", readme, re.MULTILINE)
    assert [name for name, _ in rows] == list(OPERATIONS)
    for name, cell in rows:
        parameters = inspect.signature(OPERATIONS[name]).parameters.values()
        stated = [word for word in re.findall(r"`(\w+)`", cell) if word in {p.name for p in parameters}]
        assert stated == [p.name for p in parameters], name
        defaults = re.findall(r"`\w+` = `?([^,`(]+?)`?(?:,| \(|$)", cell)
        assert defaults == [json.dumps(p.default) for p in parameters if p.default is not p.empty], name


def test_the_readme_names_every_file() -> None:
    readme = (FOLDER / "README.md").read_text("utf-8")
    for path in FOLDER.iterdir():
        assert path.name == "README.md" or f"`{path.name}{'/' * path.is_dir()}" in readme, path.name


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_arguments_are_of_the_readme_s_types(operation: str) -> None:
    readme = (FOLDER / "README.md").read_text("utf-8")
    row = re.search(rf"^\| `{operation}` \| (.*?) \| ", readme, re.MULTILINE)
    assert row is not None
    cells = re.split(r"[,;] (?=`)", row[1])
    for vector in read_vectors(operation):
        for cell, argument in zip(cells, vector["arguments"], strict=False):
            if isinstance(argument, dict) and "shape" in argument:
                kinds = {kind for kind in ("f64", "i8", "i64", "u8") if kind in cell} or {"f32"}
                assert kinds & set(argument), (operation, vector["name"], cell)
            elif isinstance(argument, dict) and "float" not in argument:
                assert "factor" in cell or "codes" in cell, (operation, vector["name"], cell)


def test_every_width_is_there() -> None:
    for operation in ("quantize", "code", "code_static"):
        assert {v["arguments"][2 if operation != "code" else 1] for v in read_vectors(operation)} >= set(range(2, 17))


def test_the_vectors_are_small_and_tiny_has_every_scheme() -> None:
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 2_000_000
    assert set(tiny_expected()["logits_sha256"]["schemes"]) == set(SCHEMES)


def test_the_package_lists_every_file_that_verify_reads() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = setup["options.package_data"]["refmamba"].split("\n")  # a value of several lines is split at lines alone
    folders = (FOLDER / "operations", *(FOLDER / name for name in generated_models()))
    files = [FOLDER / "README.md", FOLDER / "small.json", *(file for folder in folders for file in folder.rglob("*"))]
    for file in filter(Path.is_file, files):
        path = file.relative_to(FOLDER.parent)
        assert any(pattern in (str(path), f"{path.parent}/*") for pattern in patterns), path


def test_the_generated_models_hold_what_the_tiny_one_lacks() -> None:
    models = {name: generated_model(name) for name in generated_models()}
    configs = {name: model.source.config for name, model in models.items()}
    assert sorted(configs) == ["edges", "long", "tiny", "untied"]
    untied, long = configs["untied"], configs["long"]
    assert not untied.tie_embeddings
    assert not untied.use_conv_bias
    assert not untied.use_bias
    assert long.use_bias
    assert untied.d_state % 2
    assert untied.d_conv % 2
    assert long.norm_eps != configs["tiny"].norm_eps
    assert max(map(len, models["long"].expected["sequences"])) > 256
    lengths = [len(s) for s in models["untied"].expected["sequences"]]
    assert len(lengths) > 4
    assert len(set(lengths)) == len(lengths)
    mixed, whole = models["untied"].schemes["mixed"], models["untied"].schemes["whole"]
    assert {q.scale for q in mixed.outputs.values()} == {"per_token"}
    assert not mixed.whole_sequence
    assert {q.scale for q in whole.inputs.values()} == {"per_tensor"}
    assert {q.bits for part in (mixed.weights, mixed.inputs) for q in part.values()} >= {3, 5, 6, 7}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", generated_models())
def test_the_generated_models_give_what_they_say(name: str, backend: str) -> None:
    assert generated_model(name).expected["logits_sha256"]["schemes"] != {}
    assert list(differing(name, backend)) == []


def differing(name: str, backend: str = "reference") -> Iterator[str]:
    """Where a generated model gives something else than its file says, and does not raise."""
    source, calibration, expected, schemes = generated_model(name)
    runs = load_backend(backend)
    frozen = [scheme for scheme in expected["logits_sha256"]["schemes"] if runs.supports(schemes[scheme]) is None]
    assert backend != "reference" or len(frozen) == len(expected["logits_sha256"]["schemes"])
    models = {scheme: quantize_model(source, schemes[scheme], calibration) for scheme in frozen}
    yield from (str(wrong) for _, wrong in check_frozen(runs, models, expected) if wrong)


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_logits_that_are_no_numbers_are_refused(backend: str, positions: Positions) -> None:
    source, calibration, expected, schemes = generated_model("edges")
    assert set(expected["raises"].values()) == {NonFiniteError.__name__}
    for scheme in expected["raises"]:
        runner = load_backend(backend).load(quantize_model(source, schemes[scheme], calibration))
        sequences = [np.array(s) for s in expected["sequences"]]
        assert all(np.all(np.isfinite(source.read(name))) for name in source.config.shapes())
        with pytest.raises(NonFiniteError, match="lm_head"):
            runner.prefill(sequences, logits=positions)
        runner.prefill(sequences, logits="none")


def test_a_calibration_of_another_width_is_refused() -> None:
    source, calibration, _, schemes = generated_model("untied")
    for site in ("layers.1.x_proj", "lm_head"):
        with pytest.raises(DataError, match=f"maxima for {site}, not"):
            quantize_model(source, schemes["int8-static"], {**calibration, site: calibration[site][:-1]})


def smoothed_after_folding(
    source: Any, absmax: Mapping[str, Any], alpha: Mapping[str, float]
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """SPEC section 5 with x_proj's factors taken from the weight into which dt_proj's are folded already."""
    first, _, _ = SMOOTHED(source, absmax, {"dt_proj": alpha["dt_proj"]})
    return SMOOTHED(Mixed(source, first), absmax, alpha)


SMOOTHED = transforms.smoothed


class Mixed:
    """A checkpoint whose x_proj is another one's at the first reading, from which the factors are taken."""

    def __init__(self, source: Any, first: Any) -> None:
        self.config, self.source, self.first, self.seen = source.config, source, first, set[str]()

    def read(self, name: str) -> Any:
        if name.endswith("x_proj.weight") and name not in self.seen:
            self.seen.add(name)
            return self.first.read(name)
        return self.source.read(name)


def test_the_order_of_foldings_shows_in_whole_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameters, "smoothed", smoothed_after_folding)
    for name in ("untied", "long"):  # in tiny, the factors are the same either way
        assert list(differing(name)) != [], name


def test_a_static_maximum_that_counts_as_zero_shows_in_a_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def calls(self: coders.Static, x: Any, site: str) -> Any:
        return [(code_static_above_zero, (x, self.absmax, self.bits, site))]

    monkeypatch.setattr(coders.Static, "calls", calls)
    assert list(differing("edges")) != []


def test_the_generator_writes_the_same_models(tmp_path: Path) -> None:
    code = f"import sys, pathlib; sys.path.insert(0, {str(ROOT / 'tools')!r}); import generated_models as m; " \
           f"folder = pathlib.Path({str(tmp_path)!r}); m.write_edges(folder / 'edges'); " \
           "[m.write_weights(folder / name, model) for name, model in m.GENERATED.items()]"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) == 13
    for file in written:
        assert file.read_bytes() == (FOLDER / file.relative_to(tmp_path)).read_bytes(), file.name


@pytest.mark.skipif(importlib.util.find_spec("mpmath") is None, reason="the generator needs mpmath")
def test_the_generator_writes_the_same_operations(tmp_path: Path) -> None:
    code = f"import sys, pathlib; sys.path.insert(0, {str(ROOT / 'tools')!r}); import make_vectors as m; " \
           f"m.write_operations(pathlib.Path({str(tmp_path / 'operations')!r}))"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    written = sorted((tmp_path / "operations").iterdir())
    assert [file.name for file in written] == sorted(file.name for file in (FOLDER / "operations").iterdir())
    for file in written:
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
