"""Who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SPECIFICATION = ("config", "arith", "quantize", "ops", "scheme", "model", "smooth", "trace", "errors")
BACKENDS = sorted(file.stem for file in (ROOT / "backends").glob("*.py") if file.stem != "__init__")
AROUND_CPU = {"cpu", "cpu_kernels", "cpu_vectors"}  # one backend in three files


def imports(file: Path) -> set[str]:
    """Every module that a file imports, inside functions too, but not for type checkers alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


@pytest.mark.parametrize("module", SPECIFICATION)
def test_the_specification_imports_numpy_and_numba_only(module: str) -> None:
    for name in imports(ROOT / "refmamba" / f"{module}.py"):
        first, second = [*name.split("."), ""][:2]
        if first == "refmamba":
            assert second in SPECIFICATION, name
        else:
            assert first in sys.stdlib_module_names | {"numpy", "numba"}, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_import_neither_each_other_nor_the_tasks(backend: str) -> None:
    mine = AROUND_CPU if backend in AROUND_CPU else {backend}
    for name in imports(ROOT / "backends" / f"{backend}.py"):
        assert not name.startswith("refmamba.eval_tasks"), name
        if name.startswith("refmamba.backends."):
            assert name.split(".")[2] in mine, name


def test_tasks_import_no_backend_and_no_torch() -> None:
    for file in (ROOT / "eval_tasks").rglob("*.py"):
        for name in imports(file):
            assert not name.startswith(("refmamba.backends", "torch")), f"{file}: {name}"


def test_importing_refmamba_loads_no_torch() -> None:
    code = "import sys, refmamba, refmamba.cli; sys.exit(sum(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
