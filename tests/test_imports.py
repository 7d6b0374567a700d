"""Who may import whom: one table for refmamba, backends and eval_tasks, and no circle."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A room and the rooms that it may import, besides itself. Imports inside functions and for type checkers alone count too.
# A file that stands directly in refmamba/ is a room of its own; so is each backend.
RULES: dict[str, set[str]] = {
    "errors": set(),
    "spec": {"errors"},
    "backend": {"errors", "spec", "backends"},  # of backends the registry, which is names as text only
    "backends": set(),
    "backends.reference": {"errors", "spec", "backend"},
    "backends.adapter": {"spec", "backend"},  # for the backends that compute on tensors
    "backends.torch_eager": {"errors", "spec", "backend", "backends.adapter"},
    "backends.triton": {"errors", "spec", "backend", "backends.adapter"},
    "backends.mamba_ssm": {"errors", "spec", "backend", "backends.adapter"},
    "backends.cpu": {"errors", "spec", "backend"},
    "formats": {"errors", "spec"},
    "run": {"errors", "spec", "backend", "backends", "formats"},
    "conformance": {"errors", "spec", "backend", "backends", "formats", "run"},
    "eval_tasks": {"refmamba", "errors", "spec", "backend", "backends", "formats", "run"},
    "paper": {"errors", "spec", "backend", "backends", "formats", "run", "eval_tasks"},
    "teach": {"errors", "spec", "backend", "formats", "run", "conformance"},
    "commands": {
        "refmamba", "errors", "spec", "backend", "backends", "formats", "run", "conformance", "eval_tasks", "paper", "teach",
    },
    "refmamba": {"errors", "spec", "run", "teach"},
    "__main__": {"commands"},
}  # fmt: skip


def module_name(file: Path) -> str:
    """`refmamba.spec.arith` of a file of the package, `refmamba.backends.cpu` of a package's own __init__."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in (() if parts[0] == "refmamba" else ("refmamba",)) + parts if part != "__init__")


LINKS = (("refmamba", "backends"), ("refmamba", "eval_tasks"))  # the same files again
SOURCES = [file for folder in ("refmamba", "backends", "eval_tasks") for file in sorted((ROOT / folder).rglob("*.py"))]
FILES = {module_name(file): file for file in SOURCES if file.relative_to(ROOT).parts[:2] not in LINKS}


def room(module: str) -> str:
    """The room that a module of refmamba stands in."""
    parts = module.split(".")[1:]
    if not parts:
        return "refmamba"
    return ".".join(parts[:2]) if parts[0] == "backends" else parts[0]


def imports(file: Path) -> set[str]:
    """Every module that a file imports, in functions and for type checkers too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                found.add(inner if inner in FILES else str(node.module))
    return found


IMPORTS = {module: imports(file) for module, file in FILES.items()}


@pytest.mark.parametrize("module", FILES)
def test_a_room_imports_only_what_the_table_allows(module: str) -> None:
    mine = room(module)
    for name in IMPORTS[module]:
        if name.split(".")[0] == "refmamba":
            assert room(name) in {mine, *RULES[mine]}, name


@pytest.mark.parametrize("module", [module for module in FILES if room(module) == "spec"])
def test_the_specification_imports_numpy_and_numba_only(module: str) -> None:
    for name in IMPORTS[module]:
        assert name.split(".")[0] in sys.stdlib_module_names | {"numpy", "numba", "refmamba"}, name


def test_there_is_no_circle() -> None:
    graph = {module: {name for name in names if name in FILES and name != module} for module, names in IMPORTS.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(FILES)  # raises CycleError, which names one


def test_nobody_imports_a_command() -> None:
    for module, names in IMPORTS.items():
        if room(module) not in ("commands", "__main__"):
            assert not any(name.startswith("refmamba.commands") for name in names), module


def test_importing_refmamba_loads_nothing_heavy() -> None:
    code = "import sys, refmamba; sys.exit(sum(name in sys.modules for name in ('torch', 'numba', 'numpy', 'click')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_command_line_loads_no_torch() -> None:
    code = "import sys, refmamba.commands.main; sys.exit(sum(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
