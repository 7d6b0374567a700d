"""The vectors themselves: their form and their sources. tests/test_conformance.py runs them on every backend."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from refmamba.conformance.models import SCHEMES, tiny_expected
from refmamba.conformance.vectors import decode, encode, read_vectors, vectors_folder
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
